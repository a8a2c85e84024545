"""The whole road in one command, without a download: scenes, pairs, pretraining, probe, map.

    python demo.py                          as `make demo`: Latent MIM, 6 minutes on 2 CPU cores
    python demo.py --objective ijepa --out out/demo-ijepa
    python demo.py --steps 20000            a budget at which pretraining has something to say

Prints every command before it runs it, so that any of them can be typed, changed and run alone.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from figures import composite, save_figure, token_colours
from imagery import raster
from run import positive
from weights import load_encoder

HERE = Path(__file__).parent
# One small architecture for both objectives: windows of 32 x 32 px are 8 x 8 tokens of 4 px. Tokens
# this small leave texture to what the transformer makes of several, so that there is something to
# learn; at this budget little of it is.
SIDE = 32
MODEL = "--model tiny --dim 96 --depth 4 --heads 4 --patch 4"
OBJECTIVE = {
    "latentmim": "--mr-size 40 --gap 1 --visible 20 --head-dim 256 --decoder-dim 96 "
    "--decoder-depth 1 --decoder-heads 4 --momentum 0.99",
    "ijepa": "--mr-size 32 --targets 3 --target-scale 0.1 0.15 --predictor-dim 48 "
    "--predictor-depth 1 --momentum 0.99",
}
TRAINING = "--global-batch 32 --lr 1e-3 --crop-scale 0.6 1 --log-every 25"
PROBE = f"--tile {SIDE} --image-size {SIDE} --no-crop --lr 1e-2 --schedule cosine"
ENCODERS = ("random", "mr", "sa")


def run(command):
    """Print a command as one would type it, run it in the project's folder, stop where it fails."""
    words = [str(word) for word in command]
    print("\n$ " + shlex.join(["python", *words[1:]]), flush=True)
    done = subprocess.run(words, cwd=HERE)
    if done.returncode:
        sys.exit(done.returncode)


def print_table(rows):
    """mIoU per encoder, mean and deviation over seeds, and the IoU of every class."""
    names = list(next(iter(rows.values()))[0]["iou"])
    print(f"\n{'encoder':<10}{'mIoU':>8}{'+-':>8}" + "".join(f"{name:>11}" for name in names))
    for encoder, seeds in rows.items():
        miou = np.array([row["miou"] for row in seeds])
        iou = np.array([[row["iou"][name] for name in names] for row in seeds], float)
        line = f"{encoder:<10}{miou.mean():8.4f}{miou.std(ddof=1) if len(miou) > 1 else 0:8.4f}"
        seen = np.isfinite(iou).sum(0)  # a class absent from labels and predictions has no IoU
        mean = np.where(seen, np.nansum(iou, 0) / np.maximum(seen, 1), np.nan)
        print(line + "".join(f"{value:11.3f}" for value in mean))


def meaning(rows, steps):
    """One honest sentence on what the table says."""
    scores = {name: np.array([row["miou"] for row in seeds]) for name, seeds in rows.items()}
    spread = max(s.std(ddof=1) if len(s) > 1 else 0.0 for s in scores.values())
    gain = {name: scores[name].mean() - scores["random"].mean() for name in ("mr", "sa")}
    hr = scores["sa"].mean() - scores["mr"].mean()
    verdict = ", ".join(
        f"{name} {'beats' if g > 2 * spread else 'loses to' if g < -2 * spread else 'equals'} "
        f"random by {100 * g:+.1f} points"
        for name, g in gain.items()
    )
    return (
        f"After {steps} steps {verdict}; HR affinity adds {100 * hr:+.1f} to mr (probe seeds "
        f"differ by {100 * spread:.1f}; one seed of pretraining says nothing of its own spread)."
    )


def tile_colours(encoder, images):
    """Token colours of images (B, C, h, w), encoded in the tiles of SIDE pixels that the encoder
    knows: (B, h / patch, w / patch, 3)."""
    rows, cols, grid = images.shape[2] // SIDE, images.shape[3] // SIDE, SIDE // encoder.patch_size
    tiles = rearrange(images, "b c (i h) (j w) -> (b i j) c h w", h=SIDE, w=SIDE)
    with torch.no_grad():
        colours = token_colours(encoder(tiles), (grid, grid))
    return rearrange(colours, "(b i j) h w c -> b (i h) (j w) c", i=rows, j=cols)


def draw(out, names, side=2 * SIDE):
    """HR, MR, label, prediction and token colours of three test scenes -> out/figure.png."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    classes = (out / "task" / "classes.txt").read_text().split("\n")[:-1]
    colours = ListedColormap(
        ["#2b6cb0", "#1b4d2b", "#6aa84f", "#f1c232", "#e69138", "#b6d7a8", "#a0724a", "#7f7f7f"]
    )
    encoders = {
        name: load_encoder(out / name if name != "random" else out / "mr") for name in names
    }
    untrained = encoders["random"]
    torch.manual_seed(0)
    encoders["random"] = type(untrained)(**untrained.config).eval()
    scenes = sorted(p.name for p in (out / "maps_mr").glob("*.tif"))[:3]

    # the window of each scene with the most predicted ground and classes in it
    rows = []
    for scene in scenes:
        label = raster.read(out / "task" / "masks" / scene)[0]
        known = raster.read(out / "maps_mr" / scene)[0] != 255
        spots = [(r, c) for r in range(0, label.shape[0] - side + 1, side)
                 for c in range(0, label.shape[1] - side + 1, side)]  # fmt: skip
        row, col = max(
            spots,
            key=lambda s: (
                known[s[0] : s[0] + side, s[1] : s[1] + side].mean(),
                len(np.unique(label[s[0] : s[0] + side, s[1] : s[1] + side])),
            ),
        )
        window = (row, col, side, side)
        read = {
            "mr": raster.read(out / "task" / "mr" / scene, window),
            "hr": raster.read(out / "task" / "hr" / scene, tuple(2 * w for w in window)),
            "label": label[row : row + side, col : col + side],
        }
        for name in names:
            read[f"{name}: prediction"] = raster.read(out / f"maps_{name}" / scene, window)[0]
        rows.append(read)

    bands = ["B", "G", "R", "NIR"]
    mr, hr = (
        torch.from_numpy(np.stack([row[sensor] for row in rows]).astype(np.float32))
        for sensor in ("mr", "hr")
    )
    mean, std = (torch.tensor(encoders["mr"].meta[key]).view(-1, 1, 1) for key in ("mean", "std"))
    columns = {"HR": composite(hr, bands), "MR": composite(mr, bands)}
    labels = {
        key: np.stack([row[key] for row in rows])
        for key in ("label", *(f"{name}: prediction" for name in names))
    }
    for name in names:
        columns[f"{name}: tokens"] = tile_colours(encoders[name], (mr - mean) / std)

    count = len(columns) + len(labels)
    figure = Figure(figsize=(1.9 * count, 2.0 * len(rows) + 0.6))
    axes = figure.subplots(len(rows), count, squeeze=False)
    order = ["HR", "MR", *labels, *(key for key in columns if "tokens" in key)]
    for column, title in zip(axes.T, order, strict=True):
        column[0].set_title(title, fontsize=9)
        for k, axis in enumerate(column):
            if title in labels:
                shown = np.ma.masked_equal(labels[title][k], 255)
                axis.imshow(shown, colours, vmin=0, vmax=7, interpolation="nearest")
            else:
                axis.imshow(columns[title][k].numpy(), interpolation="nearest")
            axis.axis("off")
    handles = [Patch(color=colours(i), label=name) for i, name in enumerate(classes)]
    figure.legend(
        handles=handles, loc="lower center", ncols=len(classes), fontsize=8, frameon=False
    )
    save_figure(figure, out / "figure.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    flag = parser.add_argument
    flag("--out", type=Path, default=Path("out/demo"), help="new folder (default out/demo)")
    flag("--objective", choices=sorted(OBJECTIVE), default="latentmim", help="default latentmim")
    flag("--steps", type=positive, default=500, help="of pretraining, per encoder (default 500)")
    flag("--seeds", type=positive, default=3, help="of the probe (default 3)")
    flag("--quick", action="store_true", help="2 minutes: few scenes and steps, to see it work")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out {args.out} exists; remove it to run the demo anew, or name another")
    scenes, task, size, steps, epochs = 24, 12, 256, args.steps, 60
    if args.quick:
        scenes, task, size, steps, epochs = 4, 4, 128, 20, 10
    out, python, start = args.out.resolve(), sys.executable, time.perf_counter()

    run([python, "-m", "imagery.scenes", out / "pairs", "--scenes", scenes, "--size", size,
         "--seed", 0])  # fmt: skip
    run([python, "-m", "imagery.scenes", out / "task", "--scenes", task, "--size", size,
         "--seed", 1])  # fmt: skip
    run([python, "data.py", "pack", "--mr", out / "pairs/mr", "--hr", out / "pairs/hr",
         out / "store", "--chip", SIDE])  # fmt: skip
    for variant in ("mr", "sa"):
        run([python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1",
             "train.py", "--store", out / "store", "--out", out / variant, "--variant", variant,
             "--objective", args.objective, *MODEL.split(), *OBJECTIVE[args.objective].split(),
             *TRAINING.split(), "--steps", steps])  # fmt: skip
    rows = {}
    for name in ENCODERS:
        encoder = f"random:{out / 'mr'}" if name == "random" else out / name
        results = out / f"results_{name}"
        run([python, "finetune.py", "--encoder", encoder, "--images", out / "task/mr", "--masks",
             out / "task/masks", "--classes", out / "task/classes.txt", *PROBE.split(), "--epochs",
             epochs, "--seeds", args.seeds, "--out", results, "--maps",
             out / f"maps_{name}"])  # fmt: skip
        lines = (results / "results.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) for line in lines]

    # a scene that the probe has not seen
    run([python, "predict.py", "--model", out / "results_sa", "--png",
         out / "pairs/mr/scene_000.tif", out / "map.tif"])  # fmt: skip
    draw(out, ENCODERS)
    print_table(rows)
    print("\n" + meaning(rows, steps))
    print("A larger budget: python demo.py --steps 20000 --out out/demo-long")
    print(f"{args.out / 'map.tif'} opens in any GIS, {args.out / 'map.png'} shows it")
    print(f"Look at {args.out / 'figure.png'} ({time.perf_counter() - start:.0f} s in all)")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # the interrupted script has said what it leaves
