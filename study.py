"""Does an HR teacher give better MR features, and is it the HR detail that does it? One command.

    python study.py                         as `make demo`: minutes on 2 CPU cores, out/demo
    python study.py --size laptop           five seeds, every control, two objectives: hours
    python study.py --size laptop --table   what is there so far, as a table, and the pictures
    python study.py --size paper            the commands of the paper's own runs
    python study.py --idea ../fork --flags="--vicreg 2"    a row of TRACK.md, under a fixed budget

A study is a folder of cells, one for each objective, row and seed: a run of train.py, judged by
finetune.py, whose figures end in cells/NAME.json. A cell that is there is not made again, so the
same command goes on after any stop, and several processes, on one machine or many, share a folder.
Every command is printed before it runs and can be typed by itself.

The ground is drawn (`imagery.scenes --kind rows`): classes differ in texture alone, which HR
resolves and MR hardly shows. What is claimed for HR is `sa` minus the best of its controls, seed by
seed, never `sa` minus a baseline that may be sick.
"""

import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange

import figures
from files import write_atomic
from health import duration
from imagery import raster
from run import Formatter, Parser, git_state, positive, script

HERE = Path(__file__).parent

# ---- what is compared

# An encoder small enough for minutes on a CPU: chips of 64 x 64 px are 8 x 8 tokens. Patches of one
# band say little beside their position code, hence --patch-gain.
SMALL = (
    "--model tiny --dim 128 --depth 4 --heads 4 --patch 8 --patch-gain 5 --global-batch 16 "
    "--lr 3e-3 --start-lr 0 --final-lr 0 --warmup-epochs 75 --weight-decay 0.05 "
    "--final-weight-decay 0.05 --beta2 0.95 --momentum 0.99"
)
OBJECTIVES = {
    "ijepa": "--mr-size 64 --targets 2 --target-scale 0.1 0.15 --predictor-dim 64 "
    "--predictor-depth 1",
    "latentmim": "--mr-size 80 --gap 2 --visible 26 --head-dim 256 --decoder-dim 64 "
    "--decoder-depth 1 --decoder-heads 4",
    "mae": "--mr-size 64 --decoder-dim 64 --decoder-depth 1 --decoder-heads 4",
}
SEEN = "--crop-scale 1 1 --vicreg 1"
TAUGHT = SEEN + " --pos ground --affinity-centre image --affinity-weight 60"
BY_HR = TAUGHT + " --hr-teacher {hr}"  # trained on native HR pixels first, then frozen
ROWS = {
    "untrained": "--variant mr --crop-scale 1 1 --steps 1 --lr 0",
    "hr": "--variant hr --crop-scale 0.25 0.25 --vicreg 1",
    "mr": f"--variant mr {SEEN}",  # the variance and covariance terms without HR
    "sa": f"--variant sa {BY_HR}",
    "sa-interp": f"--variant sa-interp {BY_HR}",
    "sa-shuffled": f"--variant sa-shuffled {BY_HR}",
    "sa-mse": f"--variant sa-mse {BY_HR}",
    "regulariser": f"--variant regulariser {TAUGHT}",
    "sa-frozen": f"--variant sa-frozen {TAUGHT}",
    "sa, EMA teacher": f"--variant sa {TAUGHT}",
    "sa, as the paper": "--variant sa --crop-scale 1 1",
    "mr, as the paper": "--variant mr --crop-scale 1 1",
}
BASIC = tuple(ROWS)
# one thing changed in `sa`, for the curves
POINTS = {
    "--hr-share": (0.05, 0.1, 0.25, 0.5),
    "--affinity-weight": (1, 5, 20),
    "--affinity-centre": ("none",),
    "--pos": ("grid",),
    "--ratio": (1,),
}
CHANGED = tuple(f"sa {flag} {value}" for flag, values in POINTS.items() for value in values)
ROWS |= {row: f"{ROWS['sa']} {row[3:]}" for row in CHANGED}
CONTROLS = ("mr", "sa-interp", "sa-shuffled", "regulariser")  # sa is compared with the best of them


class Size(NamedTuple):
    """A budget. steps: of every row but the teacher. probes: {name: flags of finetune.py}.
    ceiling: flags of a model that is trained from scratch on all labels, if one is. points: seeds
    of the curves' points, after all else."""

    scenes: int
    task: tuple  # scenes in train, val and test
    steps: int
    teacher_steps: int
    objectives: tuple
    rows: tuple
    seeds: int
    probes: dict
    ceiling: str = ""
    points: int = 0


RIDGE = {"ridge": "--protocol ridge"}
FEW = {"ridge, 10 % of labels": "--protocol ridge --labels 0.1 --seeds 3"}
MANY = {
    "ridge, 1 % of labels": "--protocol ridge --labels 0.01 --seeds 3",
    "kNN": "--protocol knn",
    "kNN, place removed": "--protocol knn --remove-place",
    "ridge, place removed": "--protocol ridge --remove-place",
    "linear": "--protocol linear --no-crop --epochs 30 --lr 1e-2 --schedule cosine",
}
CEILING = "from scratch, all labels"
SCRATCH = "--protocol finetune --no-crop --epochs 40 --global-batch 16 --lr 1e-3 --schedule cosine"
COMPARED = ("hr", "untrained", "mr", "sa", "sa-interp", "sa-shuffled")
SIZES = {
    "minute": Size(4, (3, 1, 2), 4, 4, ("ijepa",), COMPARED, 1, RIDGE),
    "demo": Size(75, (16, 4, 12), 400, 800, ("ijepa",), COMPARED, 1, RIDGE | FEW),
    "laptop": Size(75, (20, 6, 14), 800, 800, ("ijepa", "latentmim"), BASIC, 5,
                   RIDGE | FEW | MANY, SCRATCH, 3),
    "gpu": Size(600, (60, 12, 40), 20_000, 20_000, ("ijepa", "latentmim", "mae"), BASIC, 5,
                RIDGE | FEW | MANY, SCRATCH, 3),
}  # fmt: skip

PAPER = """\
# One GPU of 80 GB or more each; GPU-hours: python bench.py step says what a step takes.
python data.py pack --format sen2venus SEN2VENUS/ pairs
for variant in mr hr sa sa-interp sa-mse sa-shuffled sa-frozen regulariser; do
  for objective in ijepa latentmim; do
    for seed in 0 1 2; do
      name=$objective-$variant-s$seed
      torchrun --nproc_per_node=8 train.py --store pairs --objective $objective \\
          --variant $variant --seed $seed --out runs/$name
      torchrun --nproc_per_node=8 finetune.py --encoder runs/$name --task mados --root MADOS/ \\
          --seeds 5 --out scores/$name
    done
  done
done
python study.py --collect scores/*
"""


# ---- cells


class Cell(NamedTuple):
    objective: str
    row: str
    seed: int

    @property
    def name(self):
        return f"{self.objective}-{self.row.replace(', ', '-').replace(' ', '-')}-s{self.seed}"


def cells_of(size):
    """All cells, seeds outermost, so that whatever is there compares rows at equal numbers."""
    rounds = [(size.rows, size.seeds), (CHANGED, min(size.points, size.seeds))]
    return [Cell(objective, row, seed) for rows, seeds in rounds for seed in range(seeds)
            for objective in size.objectives for row in rows]  # fmt: skip


def training(cell, size, out):
    """The words of train.py for a cell."""
    steps = size.teacher_steps if cell.row == "hr" else size.steps
    flags = f"{SMALL} {OBJECTIVES[cell.objective]} --steps {steps} {ROWS[cell.row]}"
    teacher = out / "runs" / cell._replace(row="hr").name
    return ["train.py", "--store", out / "store", "--out", out / "runs" / cell.name,
            "--objective", cell.objective, "--seed", cell.seed, "--log-every", max(1, steps // 20),
            *flags.format(hr=teacher).split()]  # fmt: skip


def call(words, quiet=False):
    """Print a command as one would type it and run it, on one CPU thread; ValueError if it fails.
    quiet: what it says is shown only then."""
    words = [str(word) for word in words]
    print("$ " + shlex.join(["python", *words]), flush=True)
    env = os.environ | ({} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"})
    done = subprocess.run([sys.executable, *words], cwd=HERE, env=env, text=True,
                          capture_output=quiet)  # fmt: skip
    if done.returncode:
        said = (done.stdout + done.stderr).strip() if quiet else ""
        print(said[-3000:], file=sys.stderr)
        reason = said.splitlines()[-1] if said else "see above"
        raise ValueError(f"{words[0]} ended with code {done.returncode}: {reason}")


def draw_ground(out, size):
    """The pairs, packed, and the labelled scenes, of other ground, of a study."""
    for folder, scenes, seed in (("pairs", size.scenes, 0), ("task", sum(size.task), 1)):
        if not (out / folder).exists():
            call(["-m", "imagery.scenes", out / folder, "--kind", "rows", "--scenes", scenes,
                  "--seed", seed])  # fmt: skip
    names = [f"scene_{k:03d}\n" for k in range(sum(size.task))]
    (out / "task" / "splits").mkdir(exist_ok=True)
    for split, count in zip(("train", "val", "test"), size.task, strict=True):
        (out / "task" / "splits" / f"{split}.txt").write_text("".join(names[:count]))
        names = names[count:]
    if not (out / "store").exists():
        call(["data.py", "pack", "--mr", out / "pairs/mr", "--hr", out / "pairs/hr",
              out / "store", "--chip", 64])  # fmt: skip


def make(cell, size, out):
    """Train and judge a cell, and write its figures; nothing if another process is at it."""
    path, start = out / "cells" / f"{cell.name}.json", time.perf_counter()
    with (out / "cells" / f"{cell.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # dies with this process
        except OSError:
            return
        if path.exists():
            return
        run, words = out / "runs" / cell.name, training(cell, size, out)
        train(run, words)
        scores = {}
        if cell.row == "untrained" and size.ceiling:
            # the headroom: what a supervised model of MR images makes of the same labels
            scratch = f"random:{run}"
            scores[CEILING] = judge(scratch, out, run / "scores" / "ceiling", size.ceiling)
        for name, flags in size.probes.items():
            results = run / "scores" / name.replace(" ", "-").replace(",", "").replace("%", "pc")
            scores[name] = judge(run, out, results, flags)
        log = log_of(run)
        commit, edits = git_state()
        cuda = torch.cuda.is_available()
        facts = {
            **cell._asdict(), "command": shlex.join(["python", *map(str, words)]),
            "steps": log[-1]["step"], "scores": scores,
            "health": {key: log[-1][key] for key in ("loss", "rank", "place", "cosine")},
            "seconds": round(time.perf_counter() - start),
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
            "commit": commit and commit[:12] + "-dirty" * bool(edits), "torch": torch.__version__,
        }  # fmt: skip
        write_atomic(path, json.dumps(facts, indent=1) + "\n")


def judge(run, out, results, flags):
    """The mIoU of a run's encoder by one probe, a mean over the probe's seeds: of val and test."""
    flags = flags.split() + ["--no-save-model"] * (flags != RIDGE["ridge"])
    call(["finetune.py", "--encoder", run, "--root", out / "task", "--bands", "0", "--tile", 64,
          "--image-size", 64, "--stats", "encoder", "--out", results, *flags],
         quiet=True)  # fmt: skip
    rows = [json.loads(line) for line in (results / "results.jsonl").open()]
    return {key: float(np.mean([row[key] for row in rows])) for key in ("miou", "val_miou")}


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def train(run, words):
    """Bring a run to its last step, from where it was stopped; nothing if it is there."""
    if (run / "encoder.safetensors").exists():
        steps = json.loads((run / "config.json").read_text())["steps"]
        if log_of(run)[-1]["step"] == steps:
            return
    call(words, quiet=True)


def make_all(cells, size, out, jobs):
    """Make all cells, `jobs` at once, each after its teacher; says how far it is."""
    todo = [cell for cell in cells if not (out / "cells" / f"{cell.name}.json").exists()]
    start, made, failed = time.perf_counter(), 0, threading.Event()

    def work(cell):
        teacher = out / "cells" / f"{cell._replace(row='hr').name}.json"
        while "{hr}" in ROWS[cell.row] and not teacher.exists() and not failed.is_set():
            time.sleep(1)  # another worker, or process, is at it
        nonlocal made
        if failed.is_set():
            return
        try:
            make(cell, size, out)
        except ValueError as error:
            failed.set()
            raise ValueError(f"{cell.name}: {error}") from None
        made += 1
        left = (time.perf_counter() - start) / made * (len(todo) - made)
        print(f"{cell.name} is done, {made} of {len(todo)}; {duration(left)} left", flush=True)

    # what does not wait for a teacher first, else workers would wait for each other
    todo.sort(key=lambda c: (c.row in CHANGED, c.seed, c.objective, "{hr}" in ROWS[c.row]))
    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(work, cell) for cell in todo]:
            done.result()


# ---- what the cells say

SHORT = 100  # steps of pretraining below which nothing is claimed
T975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 1 to 9 degrees
T80 = (1.38, 1.06, 0.98, 0.94, 0.92, 0.91, 0.90, 0.89, 0.88)  # of freedom


def interval(differences, draws=10_000):
    """Of paired differences, one a seed: their mean, its 95 % bootstrap interval, and the smallest
    true difference that a t-test of this design finds in 4 of 5 cases (nan for one seed)."""
    d = np.asarray(differences, float)
    if len(d) < 2:
        return d.mean(), math.nan, math.nan, math.nan
    means = np.random.default_rng(0).choice(d, (draws, len(d))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    k = min(len(d) - 1, len(T975)) - 1
    return d.mean(), low, high, (T975[k] + T80[k]) * d.std(ddof=1) / math.sqrt(len(d))


def read_cells(out):
    """The facts of the cells that are there, dicts."""
    return [json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))]


def by_row(cells):
    """{objective: {row: {seed: facts}}}."""
    found = {}
    for facts in cells:
        rows = found.setdefault(facts["objective"], {})
        rows.setdefault(facts["row"], {})[facts["seed"]] = facts
    return {objective: {row: rows[row] for row in ROWS if row in rows}
            for objective, rows in found.items()}  # fmt: skip


def scores_of(rows, probe="ridge"):
    """{row: {seed: mIoU}}."""
    return {row: {seed: facts["scores"][probe]["miou"] for seed, facts in seeds.items()}
            for row, seeds in rows.items()}  # fmt: skip


def claim(scores):
    """One sentence on what HR adds: sa minus the best of its controls, over the seeds of both."""
    controls = [row for row in CONTROLS if row in scores]
    if "sa" not in scores or not controls:
        return "No claim: `sa` or its controls have not run."
    mean = {row: np.mean([*scores[row].values()]) for row in controls}
    best = max(mean, key=mean.get)
    seeds = sorted(scores["sa"].keys() & scores[best].keys())
    gain, low, high, least = interval([scores["sa"][s] - scores[best][s] for s in seeds])
    said = f"HR of the right ground adds {100 * gain:+.1f} points to the best control ({best})"
    if len(seeds) < 3:
        count = {1: "one seed", 2: "two seeds"}[len(seeds)]
        return f"{said}: {count} of pretraining, so a sign, not a result."
    verdict = "" if low > 0 else "; the interval holds 0, so nothing is shown"
    return (f"{said}, 95 % interval {100 * low:+.1f} to {100 * high:+.1f} over {len(seeds)} seeds; "
            f"the design finds {100 * least:.1f} points in 4 of 5 cases{verdict}.")  # fmt: skip


def mean_and_spread(scores):
    """mIoU in % as a reader reads it, with the deviation of several seeds; "" of none."""
    scores = 100 * np.array(scores)
    spread = f" ± {scores.std(ddof=1):.1f}" if len(scores) > 1 else ""
    return f"{scores.mean():.1f}{spread}" if len(scores) else ""


def table(cells):
    """What the cells of a study say, as Markdown."""
    lines = []
    for objective, rows in by_row(cells).items():
        every = [facts["scores"] for seeds in rows.values() for facts in seeds.values()]
        probes = list(dict.fromkeys(probe for scores in every for probe in scores))
        steps = max(
            facts.get("steps", SHORT) for seeds in rows.values() for facts in seeds.values()
        )
        said = claim(scores_of(rows))
        if steps < SHORT:
            said = f"{steps} steps say nothing of who wins: this shows that everything works."
        lines += [f"**{objective}**, {said}", "",
                  "| row | seeds | " + " | ".join(probes) + " | place | rank | cos | core-min |",
                  "|" + "---|" * (len(probes) + 6)]  # fmt: skip
        for row, seeds in rows.items():
            values = []
            for probe in probes:
                scores = [facts["scores"] for facts in seeds.values() if probe in facts["scores"]]
                values.append(mean_and_spread([each[probe]["miou"] for each in scores]))
            place, rank, cosine = (
                np.mean([facts["health"][key] for facts in seeds.values()])
                for key in ("place", "rank", "cosine")
            )
            sick = " (collapsed)" if rank < 2 else ""
            minutes = np.mean([facts["seconds"] for facts in seeds.values()]) / 60
            health = [f"{100 * place:.0f} %", f"{rank:.0f}", f"{cosine:.2f}", f"{minutes:.1f}"]
            cells = [row + sick, str(len(seeds)), *values, *health]
            lines.append("| " + " | ".join(cells) + " |")
        facts = next(iter(next(iter(rows.values())).values()))
        foot = (
            "mIoU in % of frozen encoders on MR images of ground held out, ± deviation over "
            "pretraining seeds (`hr`, the teacher, too, though it was trained on HR). place: "
            "share of the tokens' variance that their place explains; rank: directions that "
            "they use; cos: mean cosine of two; core-min: minutes on one thread, of a machine "
            "that did other things, too. "
            f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}."
        )
        lines += ["", foot, ""]
    return "\n".join(lines).rstrip() + "\n"


def publish(out, name, cells, report):
    """Keep a study's figures and pictures in results/, and its table in README.md and RESULTS.md
    where they say <!-- name --> ... <!-- end -->."""
    folder = HERE / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cells.jsonl").write_text("".join(json.dumps(c) + "\n" for c in cells))
    for picture in out.glob("*.png"):
        shutil.copy(picture, folder / picture.name)
    for page in (HERE / "README.md", HERE / "RESULTS.md"):
        block = re.compile(f"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)", re.DOTALL)
        text = block.sub(lambda _: report, page.read_text(), count=1)
        write_atomic(page, text)


# ---- pictures


def draw_scene(out, size, objective, scores):
    """affinity.png: on a scene held out, the similarity of three tokens to all others, for the
    student before and after and for its HR teacher; maps.png: what a probe makes of each."""
    runs = {row: out / "runs" / Cell(objective, row, 0).name
            for row in ("untrained", "mr", "sa", "hr")}  # fmt: skip
    scene, drawn = f"scene_{sum(size.task) - 1:03d}.tif", out / "drawn"
    drawn.mkdir(exist_ok=True)
    tokens, maps = {}, {}
    for row, run in runs.items():
        sensor, side = ("hr", 2) if row == "hr" else ("mr", 1)
        path = drawn / f"features_{row}.tif"
        call(["predict.py", "--model", run, "--features", "--image-size", 64, "--overwrite",
              out / "task" / sensor / scene, path], quiet=True)  # fmt: skip
        values = torch.from_numpy(raster.read(path))
        tokens[row] = torch.nn.functional.avg_pool2d(values, side).permute(1, 2, 0)
        if row != "hr":
            path = drawn / f"map_{row}.tif"
            call(["predict.py", "--model", run / "scores" / "ridge", "--png", "--overwrite",
                  out / "task" / "mr" / scene, path], quiet=True)  # fmt: skip
            maps[row] = raster.read(path)[0]
    mr, hr, label = (raster.read(out / "task" / folder / scene) for folder in ("mr", "hr", "masks"))
    classes = (out / "task" / "classes.txt").read_text().split("\n")[:-1]
    grid = tokens["mr"].shape[:2]
    # the quarter of the scene around its middle, so that rows can be seen
    part = [slice(side // 4, side // 4 * 3) for side in grid]
    inside = {row: value[part[0], part[1]] for row, value in tokens.items()}
    views = {name: figures.composite(torch.from_numpy(image[None].astype(np.float32)), ["P"])[0]
             for name, image in (("HR", hr), ("MR", mr))}  # fmt: skip
    views = {name: cut(view, grid, part) for name, view in views.items()}
    marks = tokens_to_show(cut(torch.from_numpy(label[0]), grid, part), inside["mr"].shape[:2])
    h, w = inside["mr"].shape[:2]
    columns = {name: [view] * len(marks) for name, view in views.items()}
    titles = {"untrained": "student, untrained", "mr": "student after MR alone",
              "sa": "student taught by HR", "hr": "HR teacher, on HR"}  # fmt: skip
    for row, title in titles.items():
        columns[title] = [figures.similarity(inside[row], i, j).numpy() for i, j in marks]
    places = [((j + 0.5) / w, (i + 0.5) / h) for i, j in marks]
    figures.draw_panels(out / "affinity.png", columns, places)
    colours = figures.class_colours(classes)
    columns = {name: [view] for name, view in views.items()}
    named = {"labels": label[0]}
    for row, value in maps.items():
        named[f"{titles[row]}\nmIoU {100 * scores[row][0]:.0f} %"] = value
    for title, ids in named.items():
        columns[title] = [cut(figures.paint(ids, colours), grid, part)]
    figures.draw_panels(out / "maps.png", columns, legend=[*zip(classes, colours, strict=True)])


def cut(picture, grid, part):
    """The part of a picture (h, w, ...) on the ground of some tokens of a grid."""
    scale = [side // cells for side, cells in zip(picture.shape, grid, strict=False)]
    rows, cols = (slice(p.start * s, p.stop * s) for p, s in zip(part, scale, strict=True))
    return picture[rows, cols]


def tokens_to_show(label, grid, count=3):
    """Tokens (row, col) that lie wholly in one class each, of `count` classes, in the middle of the
    largest parcels that can be found."""
    blocks = rearrange(label, "(h a) (w b) -> h w (a b)", h=grid[0], w=grid[1])
    pure = (blocks == blocks[..., :1]).all(-1)
    # a token whose eight neighbours are of its class, too, lies deep in a parcel
    kinds = torch.where(pure, blocks[..., 0].long(), -1)
    around = kinds[None].float().unfold(1, 3, 1).unfold(2, 3, 1)[0].flatten(2)
    deep = (around == around[..., 4:5]).sum(-1) + 20 * (around[..., 4] >= 0)
    found = {}
    for at in deep.flatten().argsort(descending=True, stable=True).tolist():
        row, col = at // deep.shape[1] + 1, at % deep.shape[1] + 1
        kind = kinds[row, col].item()
        if kind >= 0:
            found.setdefault(kind, (row, col))
    return [found[kind] for kind in sorted(found)][:count]


def draw(out, size, cells):
    """All pictures of a study from the facts of its cells, and its runs."""
    for objective, rows in by_row(cells).items():
        logs = {row: [log_of(out / "runs" / Cell(objective, row, seed).name) for seed in seeds]
                for row, seeds in rows.items() if row != "untrained"}  # fmt: skip
        with figures.optional(curves := out / f"curves_{objective}.png"):
            figures.draw_curves(curves, logs)
        scores = scores_of(rows)
        if "untrained" in scores:
            zero = np.mean([*scores["untrained"].values()])
            with figures.optional(out / f"scores_{objective}.png"):
                figures.draw_scores(out / f"scores_{objective}.png", scores, zero)
                figures.draw_gains(out / f"gains_{objective}.png", *gains(scores))
        if {"untrained", "mr", "sa", "hr"} <= {row for row in rows if 0 in rows[row]}:
            draw_scene(out, size, objective, scores)


def gains(scores):
    """The curves: {flag: {value: mIoU of each seed}} of the values that have run; and {row: mean
    mIoU} of the levels beside them."""
    usual = {"--hr-share": 1, "--affinity-weight": 60}
    found = {}
    for flag in usual:
        points = {value: scores.get(f"sa {flag} {value}", {}) for value in POINTS[flag]}
        points[usual[flag]] = scores.get("sa", {})
        found[flag] = {v: [*points[v].values()] for v in sorted(points) if points[v]}
    levels = {row: np.mean([*scores[row].values()]) for row in ("untrained", "mr") if row in scores}
    return {flag: points for flag, points in found.items() if len(points) > 1}, levels


# ---- the track: one budget for any idea


def track(idea, flags, out):
    """Run a fork's train.py under the track's budget, three seeds, and add a row to TRACK.md."""
    size = SIZES["demo"]._replace(rows=("hr", "idea"), seeds=3, probes=RIDGE)
    ROWS["idea"] = flags or "--variant mr " + SEEN
    draw_ground(out, size)
    ask = ["git", "-C", idea, "describe", "--always", "--dirty"]
    commit = subprocess.run(ask, capture_output=True, text=True).stdout.strip() or "no commit"
    name = f"{commit}-{hashlib.sha256(ROWS['idea'].encode()).hexdigest()[:6]}"
    scores = []
    for seed in range(size.seeds):
        cell = Cell("ijepa", "idea", seed)
        run = out / "runs" / f"idea-{name}-s{seed}"
        if "{hr}" in ROWS["idea"]:
            make(Cell("ijepa", "hr", seed), size, out)
        words = training(cell, size, out)
        words[0], words[words.index("--out") + 1] = idea / "train.py", run
        train(run, words)
        scores.append(100 * judge(run, out, run / "scores", RIDGE["ridge"])["miou"])
    path = HERE / "TRACK.md"
    lines = path.read_text().splitlines() if path.exists() else TRACK.splitlines()
    before = [float(line.split("|")[2].split()[0]) for line in lines if line[:4] == "| `-"]
    mean, spread = np.mean(scores), np.std(scores, ddof=1)
    record = f"{mean - max(before):+.1f}" if before else ""
    lines.append(f"| `{ROWS['idea']}` | {mean:.1f} ± {spread:.1f} | {record} | {commit} | "
                 f"{time.strftime('%Y-%m-%d')} |")  # fmt: skip
    write_atomic(path, "\n".join(lines) + "\n")
    print(lines[-1])


TRACK = """\
# The track: training ideas under one budget

`python study.py --idea FOLDER --flags="..."` trains I-JEPA with a fork's `train.py` and these flags
beside those of the budget (400 steps of 16 pairs; 128 wide, 4 deep; ground drawn with `--kind
rows`), three seeds, and judges the encoder by a ridge probe on MR images of ground held out: mIoU
in %, ± deviation over seeds. A difference to the record (the best row above it) below that
deviation is noise. `{hr}` in flags stands for a teacher trained on HR for 800 steps.

| flags | mIoU | to the record | commit | date |
|---|---|---|---|---|
"""


# ---- the command


def parse_args(argv=None):
    parser = Parser(prog="study.py", description=__doc__.splitlines()[0], allow_abbrev=False,
                    formatter_class=Formatter)  # fmt: skip
    flag = parser.add_argument
    flag("--size", choices=[*SIZES, "paper"], default="demo", help="the budget")
    flag("--out", type=Path, help="folder, which goes on where it was left; out/SIZE if not set")
    flag(
        "--jobs",
        type=positive,
        default=max(1, os.cpu_count() or 1),
        help="runs side by side, on a thread each; on a GPU 1 to 4",
    )
    flag("--seeds", type=positive, help="of pretraining, instead of the size's")
    flag("--objective", choices=OBJECTIVES, help="only this one")
    flag(
        "--table",
        action="store_true",
        help="make nothing: print the table of what is there and draw its pictures",
    )
    flag(
        "--publish",
        action="store_true",
        help="keep table and pictures in results/, and the table in README.md and RESULTS.md",
    )
    flag(
        "--collect",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="print a table of result folders of finetune.py, of runs by whatever commands",
    )
    flag(
        "--idea",
        type=Path,
        metavar="FOLDER",
        help="a fork to run under the track's budget: adds a row to TRACK.md",
    )
    flag("--flags", default="", help="of train.py for --idea, beside those of the budget")
    args = parser.parse_args(argv)
    args.out = args.out or HERE / "out" / ("track" if args.idea else args.size)
    return args


def collect(folders):
    """A table of finetune.py's result folders: mean and deviation over pretraining seeds."""
    groups = {}
    for folder in folders:
        for line in (folder / "results.jsonl").read_text().splitlines():
            row = json.loads(line)
            about = row["pretraining"]
            key = (row["task"], row["protocol"], about.get("objective"), about.get("variant"))
            groups.setdefault(key, {}).setdefault(about.get("seed"), []).append(row["miou"])
    print(
        "| task | protocol | objective | variant | pretraining seeds | mIoU |\n" + "|---" * 6 + "|"
    )
    for key, seeds in sorted(groups.items(), key=str):
        means = [np.mean(scores) for scores in seeds.values()]
        print("| " + " | ".join(map(str, key)) + f" | {len(means)} | {mean_and_spread(means)} |")


def main(args):
    if args.collect:
        return collect(args.collect)
    # commands are said as one types them in this folder
    args.out = Path(os.path.relpath(args.out, HERE))
    args.idea = args.idea and Path(os.path.relpath(args.idea, HERE))
    if args.idea and not (HERE / args.idea / "train.py").is_file():
        raise ValueError(f"--idea {args.idea}: holds no train.py; name the folder of a fork")
    os.chdir(HERE)
    if args.size == "paper":
        return print(PAPER, end="")
    (args.out / "cells").mkdir(parents=True, exist_ok=True)
    if args.idea:
        return track(args.idea, args.flags, args.out)
    size, start = SIZES[args.size], time.perf_counter()
    if args.seeds:
        size = size._replace(seeds=args.seeds)
    if args.objective:
        size = size._replace(objectives=(args.objective,))
    if not args.table:
        draw_ground(args.out, size)
        make_all(cells_of(size), size, args.out, args.jobs)
    cells = read_cells(args.out)
    draw(args.out, size, cells)
    report = table(cells)
    write_atomic(args.out / "table.md", report)
    print("\n" + report)
    if args.publish:
        publish(args.out, args.size, cells, report)
    print(f"{args.out}: table.md, affinity.png, maps.png, curves and scores "
          f"({duration(time.perf_counter() - start)})")  # fmt: skip


if __name__ == "__main__":
    script(main, parse_args, "the same command goes on from there")
