"""Judge an encoder on labelled imagery: linear probe or fine-tuning, over several seeds.

    python finetune.py --encoder out/sa --task mados --root MADOS --seeds 5
    python finetune.py --encoder out/sa --images task/mr --masks task/masks --classes classes.txt

Each tile is resized to --image-size and encoded; a head turns every token into class logits (the
paper's is one linear layer); the grid of logits is resized bilinearly to the label and meets
cross-entropy. The epoch with the best mIoU on the validation split is scored on the test split, and
the best seed's model saved for predict.py. Tiles are read by batches while the last one is worked
on, so a task may be larger than memory. On one CPU the same seed gives the same numbers.

Source: arXiv 2601.12964, the evaluation protocol; hyperparameters as in the first author's public
experiments.
"""

import argparse
import copy
import csv
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

from data import draw_crops, resample
from datasets.tasks import (
    SPLITS,
    TASKS,
    fingerprint,
    list_tasks,
    load_folder,
    load_task,
    own_folder,
)
from imagery import geotiff
from imagery.bands import IGNORE, meanings
from model import ViT, vit
from run import positive
from segment import (
    HEADS,
    Segmenter,
    batches,
    by_name,
    chunks,
    judge,
    mean_iou,
    probe,
    resize,
    save_segmenter,
)
from weights import bands_of, load_encoder, weights_hash

UNPREDICTED = 255  # in the class maps; so they hold at most 255 classes


# fmt: off
def parse_args(argv):
    parser = argparse.ArgumentParser(
        description="Linear probe or fine-tuning of an encoder on images and masks.",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    flag = parser.add_argument_group("encoder").add_argument
    flag("--encoder", required=True, help="run folder, weights file, 'random' (an untrained ViT of "
         "--model and --patch) or 'random:RUN' (the architecture of RUN, untrained); random "
         "weights are drawn anew for each seed")
    flag("--model", default="small", choices=["tiny", "small", "base", "large", "huge"],
         help="size of --encoder random (default small)")
    flag("--patch", type=positive, default=14, help="pixels, of --encoder random (default 14)")
    flag("--heads", type=positive, help="attention heads, for weights whose width does not tell")

    flag = parser.add_argument_group("task").add_argument
    flag("--task", default="geotiff", choices=["geotiff", *TASKS], help="a published set in "
         "--root, or geotiff, folders of your own (default geotiff)")
    flag("--list-tasks", action="version", version=list_tasks(), help="print the published sets "
         "with classes, sizes, splits and where to get them")
    flag("--root", type=Path, help="folder of the set as published; for geotiff one with images "
         "(or mr), masks and, where there are, classes.txt and splits")
    flag("--bands", type=band_list, help="in the order that the encoder expects: names such as "
         "B,G,R,NIR or B02,B11, or for geotiff 0-based positions such as 2,1,0,3 (default "
         "B,G,R,NIR of a published set, all of geotiff)")
    flag("--tile", type=positive, help="pixels per side that images are cut to; edges are filled "
         "up (default: the set's own protocol, 64 for geotiff)")
    flag("--split-seed", type=int, default=0, help="which draw, where splits are drawn (default 0)")
    flag("--split-hash", metavar="HEX", help="go on only if the splits have this hash, as the rows "
         "of an earlier run say")
    flag("--stats", default="task", choices=["task", "encoder"], help="mean and std that the bands "
         "are normalised by: the task's (the publisher's, else of the training split), or those "
         "that the encoder was pretrained with (default task)")
    flag("--dates", type=positive, help="of a time series: dates per sample (default: all)")
    flag("--pastis-classes", type=int, default=18, choices=[18, 19, 20], help="18 ignores "
         "background and void, 19 void only, 20 nothing (default 18, as the paper)")

    flag = parser.add_argument_group("task geotiff").add_argument
    flag("--images", help="folder of GeoTIFFs, or a glob pattern in quotes (default: of --root)")
    flag("--masks", help="the same for the masks, paired by name without extension")
    flag("--classes", help="text file, one class name per line, line number from 0 = class id "
         "(default: the ids name themselves)")
    flag("--ignore-index", type=int, help="mask value that is no label (default: none)")
    flag("--splits", help="folder of train.txt, val.txt and test.txt, names without extension")
    flag("--block", type=positive, default=4, help="without --splits: side in tiles of the blocks "
         "of ground that are kept together (default 4)")
    flag("--val", type=fraction, default=0.2, help="without --splits: fraction (default 0.2)")
    flag("--test", type=fraction, default=0.2, help="without --splits: fraction (default 0.2)")

    flag = parser.add_argument_group("protocol").add_argument
    flag("--protocol", default="linear", choices=["linear", "finetune", "knn", "ridge"],
         help="train the head only, or the encoder too; or judge the tokens without training, by "
         "nearest neighbours or ridge regression, a check within seconds (default linear)")
    flag("--head", default="linear", choices=HEADS, help="one linear layer per token (paper), an "
         "MLP per token, or a multi-level UPerNet, for --protocol finetune above all (default "
         "linear)")
    flag("--image-size", type=positive, default=224, help="pixels per side that the encoder sees, "
         "a multiple of its patch (default 224)")
    flag("--crop", action=argparse.BooleanOptionalAction, default=True,
         help="train on random crops of 0.3 to 1 of the tile's area (default yes, as the paper); "
         "--no-crop lets a frozen encoder see each tile only once, which is much faster")
    flag("--epochs", type=positive, default=100, help="over the training tiles (default 100)")
    flag("--batch", type=positive, default=64, help="tiles (default 64)")
    flag("--lr", type=float, help="learning rate (default 1e-3 linear, 1e-4 finetune)")
    flag("--schedule", default="constant", choices=["constant", "cosine"],
         help="of the learning rate over all steps, cosine ends at 0 (default constant)")
    flag("--weight-decay", type=float, help="of AdamW (default 0 linear, 0.05 finetune)")
    flag("--layer-decay", type=fraction, default=1.0, help="of --protocol finetune: factor of the "
         "learning rate from each block to the one before (default 1, none, as the paper; 0.65 to "
         "0.9 is usual)")
    flag("--class-weights", default="none", choices=["none", "balanced"], help="of the loss; "
         "balanced: 1 / sqrt(f), f the class's share of the labelled training pixels, scaled to a "
         "mean of 1 over these pixels (default none)")
    flag("--labels", type=fraction, default=1.0, help="fraction of the training tiles whose labels "
         "are used, drawn by seed (default 1)")
    flag("--seeds", type=positive, default=1, help="runs, with seeds 0, 1, ...: weights of the "
         "head, order, crops, choice of --labels (default 1; seeds differ by up to a point "
         "of mIoU, so compare over 5)")

    flag = parser.add_argument_group("output").add_argument
    flag("--out", type=Path, default=Path("out/results"), help="folder; results.jsonl in it gains "
         "a row per seed (default out/results)")
    flag("--save-model", action=argparse.BooleanOptionalAction, default=True,
         help="the seed with the best validation mIoU as --out/model_*.safetensors, for predict.py "
         "(default yes; --protocol knn has none)")
    flag("--maps", type=Path, help="new folder for a GeoTIFF class map of each test image, from "
         f"seed 0; {UNPREDICTED} where nothing is predicted")
    flag("--device", default="auto", choices=["auto", "cpu", "cuda"],
         help="where to run (default auto: cuda where there is one)")
    args = parser.parse_args(argv)
    changed = {name for name, value in vars(args).items() if value != parser.get_default(name)}

    def refuse(names, reason):
        for name in names:
            if name in changed:
                parser.error(f"--{name.replace('_', '-')} {reason}")

    if args.task == "geotiff":
        refuse(["dates", "pastis_classes"], "is for --task pastis")
        if args.root:
            refuse(["images", "masks"], "and --root both say where the task is; keep one")
        elif not (args.images and args.masks):
            parser.error("no task; name --task with --root (see --list-tasks), or --images and "
                         "--masks of your own")
        args.tile = args.tile or 64
    else:
        refuse(["images", "masks", "classes", "ignore_index", "splits", "block", "val", "test"],
               f"is for --task geotiff; {args.task} has its own")
        if args.root is None:
            parser.error(f"--task {args.task} needs --root, the folder of the set as published; "
                         "--list-tasks says where to get it")
        if args.task != "pastis":
            refuse(["dates", "pastis_classes"], "is for --task pastis")
        if args.bands and isinstance(args.bands[0], int):
            parser.error(f"--bands of --task {args.task} are names (see --list-tasks)")
    if args.protocol in ("knn", "ridge"):
        refuse(["head", "crop", "epochs", "lr", "schedule", "weight_decay", "layer_decay",
                "class_weights"], f"means nothing to --protocol {args.protocol}; it trains no head")
    elif args.protocol == "linear":
        refuse(["layer_decay"], "is for --protocol finetune; linear leaves the encoder as it is")
    if args.lr is None:
        args.lr = {"finetune": 1e-4}.get(args.protocol, 1e-3)
    if args.weight_decay is None:
        args.weight_decay = {"finetune": 0.05}.get(args.protocol, 0.0)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if not 0 < args.lr < math.inf:
        parser.error(f"--lr {args.lr} is not a number above 0")
    if not 0 <= args.weight_decay < math.inf:
        parser.error(f"--weight-decay {args.weight_decay} is not a number from 0 up")
    if args.split_seed < 0:
        parser.error(f"--split-seed {args.split_seed} is below 0")
    if args.splits is None and args.val + args.test >= 1:
        parser.error(f"--val {args.val} and --test {args.test} leave nothing to train on")
    if args.heads and args.encoder == "random":
        parser.error("--heads is for weights; --encoder random has those of its --model")
    return args
# fmt: on


def fraction(text):
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def band_list(text):
    """Names, or ints where all are whole numbers."""
    words = [word.strip() for word in text.split(",")]
    if "" in words or len({word.isdecimal() for word in words}) > 1:
        raise argparse.ArgumentTypeError(f"{text} is no list of names, or of positions, alone")
    return [int(word) for word in words] if words[0].isdecimal() else words


def crop_labels(labels, windows, size):
    """Nearest label at the pixel centres of a resized window.

    labels: (B, h, w). windows: (B, 4) pixels (top, left, height, width) on the CPU. Returns
    (B, size, size).
    """
    place = (torch.arange(size) + 0.5) / size
    row = (windows[:, 0, None] + windows[:, 2, None] * place).long().to(labels.device)  # (B, size)
    col = (windows[:, 1, None] + windows[:, 3, None] * place).long().to(labels.device)
    image = torch.arange(len(labels), device=labels.device)
    return labels[image[:, None, None], row[:, :, None], col[:, None, :]]


def segmentation_loss(logits, labels, weights=None):
    """Mean cross-entropy of the labelled pixels; 0, not NaN, where a batch of crops has none.

    weights: (classes,), then the mean is weighted by those of the pixels' classes.
    """
    logits = resize(logits, labels.shape[-1])
    total = F.cross_entropy(logits, labels, weights, ignore_index=IGNORE, reduction="sum")
    if weights is None:
        return total / (labels != IGNORE).sum().clamp(min=1)
    counted = F.pad(weights, (0, 1))[labels].sum()  # IGNORE, -1, finds the 0 at the end
    return total / torch.where(counted > 0, counted, 1)


def balanced_weights(labels, classes):
    """1 / sqrt(f) of each class, f its share of the labelled pixels, scaled to a mean of 1 over
    these pixels: (classes,) float32, 0 for a class without any.

    labels: integer arrays (tile, tile), one by one.
    """
    share = sum(np.bincount(each[each != IGNORE], minlength=classes) for each in labels)
    share = share / share.sum()
    weights = np.where(share > 0, 1 / np.sqrt(np.where(share > 0, share, 1)), 0)
    return torch.tensor(weights / (share * weights).sum(), dtype=torch.float32)


def layer_groups(segmenter, decay):
    """Parameter groups of AdamW with a "scale" of the learning rate: decay**(depth + 1 - layer).

    The patch embedding and class token are layer 0, block k from 1 up layer k, the last norm and
    the head layer depth + 1, as BEiT (arXiv 2106.08254) and MAE fine-tune. decay 1: all alike.
    """
    last = len(segmenter.encoder.blocks) + 1
    groups = {}
    for name, weight in segmenter.named_parameters():
        parts = name.split(".")
        layer = last
        if parts[:2] == ["encoder", "blocks"]:
            layer = 1 + int(parts[2])
        elif parts[:2] in (["encoder", "patch_embed"], ["encoder", "cls_token"]):
            layer = 0
        groups.setdefault(layer, []).append(weight)
    return [{"params": group, "scale": decay ** (last - n)} for n, group in groups.items()]


def commit():
    """Commit of the code, "-dirty" where it was changed since; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def write_matrix(path, matrix, classes):
    """Save a confusion matrix as CSV, rows label, columns prediction, both with class names."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["label / prediction", *classes])
        rows.writerows([name, *counts] for name, counts in zip(classes, matrix, strict=True))
    os.replace(temporary, path)


def write_maps(folder, task, tiles, predictions):
    """Write one class map per image of `tiles` (positions in the task): uint8, georeferenced.

    predictions: (len(tiles), tile, tile). Pixels without image data and ground outside the tiles
    are UNPREDICTED, which is also the nodata value.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tile = predictions.shape[-1]
    for number in np.unique(task.origin[tiles, 0]):
        file = task.files[number]
        # whole tiles: the last ones of a row or column reach beyond the image
        size = [-(-side // tile) * tile for side in (file.height, file.width)]
        canvas = np.full(size, UNPREDICTED, np.uint8)
        for k in np.flatnonzero(task.origin[tiles, 0] == number):
            _, row, col = task.origin[tiles[k]]
            missing = np.isnan(task.images[tiles[k], 0])
            canvas[row : row + tile, col : col + tile] = np.where(
                missing, UNPREDICTED, predictions[k]
            )
        canvas = canvas[: file.height, : file.width]
        path = folder / f"{file.path.stem}.tif"
        geotiff.write(path, canvas, file.transform, file.crs, nodata=UNPREDICTED)


def print_table(rows, classes):
    """Print the scores of all seeds, then the IoU of each class, with mean and deviation."""
    columns = {"val_miou": "val mIoU", "miou": "mIoU", "miou_batchmean": "batch mean",
               "accuracy": "accuracy"}  # fmt: skip
    scores = np.array([[row[key] for key in columns] for row in rows])
    lines = dict(zip((row["seed"] for row in rows), scores, strict=True))
    if len(rows) > 1:
        lines |= {"mean": scores.mean(0), "std": scores.std(0, ddof=1)}
    print(f"\n{'seed':<6}" + "".join(f"{name:>12}" for name in columns.values()))
    for name, line in lines.items():
        print(f"{name:<6}" + "".join(f"{value:12.4f}" for value in line))

    print(f"\n{'class':<24}{'IoU':>8}{'std':>8}")
    for name in classes:
        # None: absent from that seed's labels and predictions
        values = [row["iou"][name] for row in rows if row["iou"][name] is not None]
        mean = f"{np.mean(values):8.4f}" if values else f"{'absent':>8}"
        std = f"{np.std(values, ddof=1):8.4f}" if len(values) > 1 else ""
        print(f"{name:<24}{mean}{std}")


def check_output(out, maps):
    """Raise FileExistsError where results would mix with, or replace, something else, and OSError
    where they cannot be written; leaves nothing behind."""
    results = out / "results.jsonl"
    ours = results.exists()
    if out.exists() and not ours and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(
            f"--out {out} exists and holds no results.jsonl; name a new folder, or one of earlier "
            "results to add to"
        )
    if maps and maps.exists():
        raise FileExistsError(f"--maps {maps} exists; name a new folder, or remove it")
    for flag, folder in (("--out", out), ("--maps", maps or out)):
        try:
            there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
            tempfile.TemporaryDirectory(dir=there).cleanup()  # permissions alone do not tell
            if ours:
                results.open("a").close()
        except OSError as error:
            raise OSError(
                f"{flag} {folder} cannot be written ({error}); name another folder"
            ) from error


def load(args):
    """The task of --task; folders of GeoTIFFs are found under --root or given one by one."""
    if args.task != "geotiff":
        return load_task(
            args.task, args.root, bands=args.bands, tile=args.tile, dates=args.dates,
            pastis_classes=args.pastis_classes, split_seed=args.split_seed,
        )  # fmt: skip
    folder = own_folder(args.root) if args.root else {"images": args.images, "masks": args.masks}
    folder |= {k: v for k in ("classes", "splits") if (v := getattr(args, k)) is not None}
    return load_folder(
        **folder, bands=args.bands, ignore_index=args.ignore_index, tile=args.tile,
        block=args.block, val=args.val, test=args.test, split_seed=args.split_seed,
    )  # fmt: skip


def check_encoder(encoder, name, task, image_size):
    """Raise ValueError if the encoder does not read the task's bands or the image size."""
    wanted = [] if name == "random" else bands_of(encoder)
    if encoder.in_channels != len(task.bands):
        raise ValueError(
            f"--encoder {name} reads {encoder.in_channels} bands ({','.join(wanted) or 'unnamed'}),"
            f" the task has {len(task.bands)}; choose and order them with --bands, or take an "
            "encoder of that data"
        )
    # folders of one's own may name bands in some files only, and take positions
    own = task.name == "geotiff"
    named = [(file.path, file.band_names) for file in task.files if file.band_names] if own else []
    for path, names in named or [(task.name, task.bands)]:
        places = list(task.positions) if named else list(range(len(names)))
        meant, means = meanings(wanted), meanings(names)  # Blue and B02 are one band
        found = [means[place] for place in places]
        if found != meant and sorted(found) == sorted(meant):
            order = [str(places[found.index(band)]) for band in meant] if own else wanted
            raise ValueError(
                f"--encoder {name} reads the bands {','.join(wanted)}, but those of {path} come as "
                f"{','.join(names[place] for place in places)}; pass --bands {','.join(order)}"
            )
    patch = encoder.patch_size
    if image_size % patch:
        low = image_size // patch * patch
        raise ValueError(
            f"--image-size {image_size} is no multiple of the encoder's patch of {patch} px; try "
            + " or ".join(str(n) for n in (low, low + patch) if n)
        )


def token_home(count, segmenter, device):
    """Where the tokens of `count` tiles are kept: on the device, in main memory where they would
    take more than half of what a GPU has free. Says their size where it is large."""
    grid = segmenter.image_size // segmenter.encoder.patch_size
    size = 4 * count * grid**2 * segmenter.encoder.dim * len(segmenter.depths or [0])
    if size > 2**32:
        print(f"tokens kept in memory: {size / 2**30:.1f} GiB")
    if device.type == "cuda" and size > torch.cuda.mem_get_info(device)[0] / 2:
        return torch.device("cpu")
    return device


def train(args, segmenter, task, chosen, mean, std, generator):
    """Train on the chosen tiles by split, and leave the best epoch's weights in the segmenter.

    Returns its validation mIoU and number, and the test split as `judge` does.
    """
    device, seed = torch.device(args.device), generator.initial_seed()
    frozen = args.protocol != "finetune"
    classes, size = len(task.classes), (args.image_size, args.image_size)
    tile = task.labels.shape[-1]

    def read(parts):
        return batches(task, parts, mean, std, device)

    segmenter.encoder.requires_grad_(not frozen)
    trained = segmenter.head if frozen else segmenter
    groups = [{"params": trained.parameters(), "scale": 1.0}]
    if not frozen:
        groups = layer_groups(segmenter, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay)
    weights = None
    if args.class_weights == "balanced":
        weights = balanced_weights((task.labels[k] for k in chosen["train"]), classes).to(device)

    # a frozen encoder gives an uncropped tile the same tokens in every epoch
    kept, cached = {}, [s for s in SPLITS if frozen and (s != "train" or not args.crop)]
    if cached:
        home = token_home(sum(len(chosen[split]) for split in cached), segmenter, device)
    for split in cached:
        parts = chunks(chosen[split], args.batch)
        with torch.no_grad():
            kept[split] = [
                (segmenter.features(images).to(home), labels)
                for images, labels in tqdm(read(parts), f"seed {seed}, encode {split}", len(parts))
            ]
    if "train" in kept:
        tokens, token_labels = (torch.cat(each) for each in zip(*kept.pop("train"), strict=True))

    def held_out(split):
        if split not in kept:
            return read(chunks(chosen[split], args.batch))
        return ((x.to(device), labels) for x, labels in kept[split])

    count = len(chosen["train"])
    steps, step, best = args.epochs * math.ceil(count / args.batch), 0, -1.0
    with tqdm(total=steps, desc=f"seed {seed}, {args.protocol}", unit="step") as bar:
        for epoch in range(1, args.epochs + 1):
            order = torch.randperm(count, generator=generator).split(args.batch)
            if "train" in cached:
                stream = ((tokens[k].to(device), token_labels[k]) for k in order)
            else:
                stream = read([chosen["train"][k.numpy()] for k in order])
            for x, labels in stream:
                if args.crop:
                    windows = torch.from_numpy(draw_crops(seed, step, len(x))) * tile
                    x = resample_series(x, windows, size)
                    labels = crop_labels(labels, windows, tile)
                decay = (1 + math.cos(math.pi * step / steps)) / 2
                for group in optimizer.param_groups:
                    scale = group["scale"] * (decay if args.schedule == "cosine" else 1)
                    group["lr"] = args.lr * scale
                loss = segmentation_loss(segmenter(x), labels, weights)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                bar.update()
            last = loss.item()  # a device sync, so once an epoch
            if not math.isfinite(last):
                raise ValueError(f"loss {last} in epoch {epoch}; lower --lr")
            val, _ = mean_iou(judge(segmenter, held_out("val"), classes)[0])
            if val > best:
                best, best_epoch = val, epoch
                state = {name: value.clone() for name, value in trained.state_dict().items()}
            bar.set_postfix(loss=f"{last:.3f}", val=f"{val:.4f}", best=f"{best:.4f}")
    trained.load_state_dict(state)
    return best, best_epoch, judge(segmenter, held_out("test"), classes, args.image_size)


def resample_series(images, windows, size):
    """`data.resample` of images (B, bands, h, w) or time series (B, dates, bands, h, w)."""
    if images.ndim == 4:
        return resample(images, windows, size)
    bands = images.shape[2]
    cropped = resample(rearrange(images, "b t c h w -> b (t c) h w"), windows, size)
    return rearrange(cropped, "b (t c) h w -> b t c h w", c=bands)


def evaluate(args):
    """Train and score one model per seed; everything wrong with the input is raised before."""
    untrained = args.encoder.split(":")[0] == "random"
    check_output(args.out, args.maps)
    if args.encoder != "random":
        template = load_encoder(args.encoder.removeprefix("random:"), args.heads)
    task = load(args)
    if args.split_hash and args.split_hash.lower() != task.split_hash:
        raise ValueError(
            f"--split-hash {args.split_hash}: the splits of {args.task} have {task.split_hash}; "
            "they are others than those wanted, so compare the files and --split-seed"
        )
    bands, classes = len(task.bands), task.classes
    if args.encoder == "random":
        template = vit(args.model, in_channels=bands, patch_size=args.patch)
    check_encoder(template, args.encoder, task, args.image_size)
    mean, std = task.mean, task.std
    if args.stats == "encoder":
        if "mean" not in template.meta or "std" not in template.meta:
            raise ValueError(
                f"--stats encoder: {args.encoder} carries no mean and std; use --stats task"
            )
        mean, std = np.array(template.meta["mean"]), np.array(template.meta["std"])
    if args.maps and args.task != "geotiff":
        raise ValueError(
            f"--maps is for --task geotiff; map {args.task} with the saved model and predict.py"
        )
    if args.maps and len(classes) > UNPREDICTED:
        raise ValueError(f"--maps holds at most {UNPREDICTED} classes, found {len(classes)}")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available; use --device cpu")

    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    results.touch()
    tiles = {split: np.flatnonzero(task.split == split) for split in SPLITS}
    data_hash, tile = fingerprint(task), task.labels.shape[-1]
    print(
        f"task {task.name} {data_hash}: {bands} bands, {len(classes)} classes, {tile} px tiles: "
        + ", ".join(f"{len(index)} {split}" for split, index in tiles.items())
        + f" (split by {task.split_by}, --split-hash {task.split_hash})"
        + "".join(f"; mask value {value:g} is nodata and ignored" for value in task.nodata)
    )

    rows, model = [], None
    if args.save_model and args.protocol != "knn":
        # to the microsecond: two commands may start in one second
        model = datetime.now().strftime("model_%Y%m%d-%H%M%S-%f.safetensors")
    for seed in range(args.seeds):
        start = time.perf_counter()
        torch.manual_seed(seed)
        encoder = ViT(**template.config) if untrained else copy.deepcopy(template)
        encoder_hash = weights_hash(encoder)
        torch.manual_seed(seed)  # the same head, whatever encoder was drawn before it
        segmenter = Segmenter(encoder, len(classes), args.image_size, args.head).to(device)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(tiles["train"]), generator=generator)
        order = order[: max(1, round(args.labels * len(order)))].numpy()
        chosen = {**tiles, "train": tiles["train"][order]}
        if args.protocol in ("knn", "ridge"):
            found = probe(
                encoder, task, args.protocol, args.image_size, mean=mean, std=std,
                train=chosen["train"], seed=seed, batch=args.batch,
            )  # fmt: skip
            best, best_epoch = found["val_miou"], None
            matrix, predictions, batchmean = (
                found[key] for key in ("matrix", "predictions", "miou_batchmean")
            )
            if found["head"]:  # ridge regression is a linear head
                weight, bias = found["head"]
                segmenter.head.load_state_dict({"weight": weight, "bias": bias})
        else:
            best, best_epoch, (matrix, predictions, batchmean) = train(
                args, segmenter, task, chosen, mean, std, generator
            )
        miou, iou = mean_iou(matrix)
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")  # runs side by side keep theirs
        saved = args.out / f"confusion_{stamp}_{encoder_hash}_{args.protocol}_seed{seed}.csv"
        write_matrix(saved, matrix.tolist(), classes)
        if model and best > max((row["val_miou"] for row in rows), default=-1):
            save_segmenter(
                args.out / model, segmenter, classes=list(classes),
                bands=list(task.bands) if all(task.bands) else [],
                positions=list(task.positions), file_bands=task.file_bands, mean=mean.tolist(),
                std=std.tolist(), tile=tile, gsd=task.gsd, encoder=args.encoder,
                sources=template.meta.get("sources", []), task=task.name, protocol=args.protocol,
                seed=seed, val_miou=best, miou=miou,
            )  # fmt: skip
        row = {
            "encoder": args.encoder,
            "encoder_hash": encoder_hash,
            "task": task.name,
            "data_hash": data_hash,
            "split_hash": task.split_hash,
            "protocol": args.protocol,
            "head": args.head,
            "seed": seed,
            "miou": miou,
            "miou_batchmean": batchmean,
            "accuracy": (matrix.diagonal().sum() / matrix.sum()).item(),
            "iou": by_name(iou, classes),  # None: no part of the mean
            "val_miou": best,
            "best_epoch": best_epoch,
            "model": model,  # one file for all seeds: the best of them
            "confusion": saved.name,
            "tiles": {split: len(index) for split, index in chosen.items()},
            "split_by": task.split_by,
            "tile": tile,
            "mean": mean.tolist(),
            "std": std.tolist(),
            "architecture": template.config,
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "commit": commit(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "finished": stamp,
            "seconds": round(time.perf_counter() - start, 2),
        }
        with results.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a kill left a torn line, which is not to take this one
                    file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")
        rows.append(row)
        if args.maps and seed == 0:
            write_maps(args.maps, task, tiles["test"], predictions.numpy())

    print_table(rows, classes)
    print(f"\nrows added to {results}: {args.seeds}")
    if model:
        print(
            f"model of the best seed: {args.out / model}; a map with it:\n"
            f"    python predict.py --model {args.out / model} scene.tif map.tif"
        )


def main(argv=None):
    args = parse_args(argv)
    try:
        evaluate(args)
    except (ValueError, OSError) as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            f"finetune.py: interrupted; finished seeds keep their rows in {args.out}",
            file=sys.stderr,
        )
        sys.exit(130)


if __name__ == "__main__":
    main()
