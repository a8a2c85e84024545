"""Does an HR teacher give better MR features, and is it the HR detail that does it? One command.

    python study.py                         as `make demo`: minutes on 2 CPU cores, out/demo
    python study.py --size laptop           every control, five seeds, a search of rates: hours
    python study.py --size laptop --table   what is there so far, as a table, and the pictures
    python study.py --size paper            the commands of the paper's own runs
    python study.py --idea ../fork --flags="--vicreg 2"    a row of TRACK.md, under a fixed budget

A study is a folder of cells, one for each objective, row and seed: a run of train.py, judged by
finetune.py, whose figures end in cells/NAME.json. A cell that is there is not made again, so the
same command goes on after any stop, and several processes, on one machine or many, share a folder.
Every command is printed before it runs and can be typed by itself.

The ground is drawn (`imagery.scenes --kind rows`): classes differ in texture alone, which HR
resolves and MR hardly shows. What is claimed for HR is `sa`, or `sa-mse`, minus the best of its
controls, seed by seed, never minus a baseline that may be sick. What cells say, in tables and
pictures, is made by report.py.
"""

import fcntl
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import report
from files import write_atomic
from health import duration, read_log
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
UNSEARCHED = {
    "pixels": "",  # no encoder: each token is the pixels of its patch
    "untrained": "--variant mr --crop-scale 1 1 --steps 1 --lr 0",
    "hr": "--variant hr --crop-scale 0.25 0.25 --vicreg 1",  # the teacher
}
SEARCHED = {
    "mr, as the paper": "--variant mr --crop-scale 1 1",
    "sa, as the paper": "--variant sa --crop-scale 1 1",
    "mr": f"--variant mr {SEEN}",  # the variance and covariance terms without HR
    "regulariser": f"--variant regulariser {TAUGHT}",
    "sa-frozen": f"--variant sa-frozen {TAUGHT}",
    "sa, EMA teacher": f"--variant sa {TAUGHT}",
    "sa-shuffled": f"--variant sa-shuffled {BY_HR}",
    "sa-interp": f"--variant sa-interp {BY_HR}",
    "mse-shuffled": f"--variant mse-shuffled {BY_HR}",
    "mse-interp": f"--variant mse-interp {BY_HR}",
    "sa-mse": f"--variant sa-mse {BY_HR}",
    "sa": f"--variant sa {BY_HR}",
}
# one thing changed in `sa`, for the curves; --hr-shift is of imagery.scenes, in HR pixels of 5 m
POINTS = {
    "--hr-share": (0.05, 0.1, 0.25, 0.5),
    "--affinity-weight": (1, 5, 20),
    "--hr-shift": (1, 2, 4),
    "--affinity-centre": ("none",),
    "--pos": ("grid",),
    "--ratio": (1,),
}
CHANGED = tuple(f"sa {flag} {value}" for flag, values in POINTS.items() for value in values)
TRUNK = "sa --affinity-on trunk"  # of Latent MIM: tokens before the projection head
ROWS = UNSEARCHED | SEARCHED | {row: f"{SEARCHED['sa']} {row[3:]}" for row in (*CHANGED, TRUNK)}


class Size(NamedTuple):
    """A budget. steps: of every row but the teacher. plan: (objective, rows, seeds) in the order in
    which they are made. probes: {name: flags of finetune.py}. rates: the learning rates that every
    row tries with seed 0, judged on validation ground; the best serves all seeds. ceiling: flags of
    a model that is trained from scratch on all labels, if one is. ground: --kind of imagery.scenes.
    """

    scenes: int
    task: tuple  # scenes in train, val and test
    steps: int
    teacher_steps: int
    plan: tuple
    probes: dict
    rates: tuple = ()
    ceiling: str = ""
    ground: str = "rows"


RIDGE = {"ridge": "--protocol ridge"}
MANY = RIDGE | {
    "ridge, 10 % of labels": "--protocol ridge --labels 0.1 --seeds 3",
    "ridge, 1 % of labels": "--protocol ridge --labels 0.01 --seeds 3",
    "kNN": "--protocol knn",
    "kNN, place removed": "--protocol knn --remove-place",
    "linear": "--protocol linear --no-crop --epochs 30 --lr 1e-2 --schedule cosine",
}
SCRATCH = "--protocol finetune --no-crop --epochs 40 --global-batch 16 --lr 1e-3 --schedule cosine"
FEW = ("untrained", "hr", "mr", "sa-interp", "sa")
DEMO = (*FEW, "sa-shuffled")
CONTROLLED = (*UNSEARCHED, *sum(report.CONTROLS.values(), ()), *report.CONTROLS)
OTHERS = tuple(row for row in SEARCHED if row not in CONTROLLED)
EVERY = CONTROLLED + OTHERS
SIZES = {
    "minute": Size(4, (3, 1, 2), 4, 4, (("ijepa", FEW, 1),), RIDGE),
    "demo": Size(75, (20, 6, 14), 250, 500, (("ijepa", DEMO, 1),), RIDGE),
    "laptop": Size(
        75, (20, 6, 14), 400, 800,
        (("ijepa", CONTROLLED, 5), ("ijepa", OTHERS, 3), ("ijepa", CHANGED, 1),
         ("latentmim", CONTROLLED, 3), ("latentmim", (TRUNK,), 1)),
        MANY, (1e-3, 2e-3, 4e-3), SCRATCH,
    ),
    # fields, woods, water and towns in four bands, whose colour gives some of the classes away
    "landscape": Size(
        75, (20, 6, 14), 400, 800, (("ijepa", CONTROLLED, 3),), MANY, (2e-3, 4e-3), SCRATCH,
        "landscape",
    ),
    # meant for half an hour of an H100 with --jobs 4, where such steps wait for launches; never run
    "gpu": Size(
        300, (60, 12, 40), 2000, 4000,
        (("ijepa", EVERY, 3), ("latentmim", EVERY, 3), ("mae", EVERY, 3)),
        MANY, (2e-3, 4e-3), SCRATCH,
    ),
}  # fmt: skip

PAPER = """\
# One GPU of 80 GB or more each; GPU-hours: python bench.py step says what a step takes.
python data.py pack --format sen2venus SEN2VENUS/ pairs
for variant in mr hr sa sa-interp sa-shuffled sa-mse mse-interp mse-shuffled sa-frozen \\
    regulariser; do
  for objective in ijepa latentmim; do
    for seed in 0 1 2; do
      name=$objective-$variant-s$seed
      torchrun --nproc_per_node=8 train.py --store pairs --objective $objective \\
          --variant $variant --seed $seed --out out/$name
      torchrun --nproc_per_node=8 finetune.py --encoder out/$name --task mados --root MADOS/ \\
          --seeds 5 --out scores/$name
    done
  done
done
python study.py --collect scores/*
"""


# ---- cells


class Cell(NamedTuple):
    """lr: of a trial of the search; None is the rate that the search found, or SMALL's."""

    objective: str
    row: str
    seed: int
    lr: float | None = None

    @property
    def name(self):
        row = self.row.replace(", ", "-").replace(" ", "-")
        rate = "" if self.lr is None else f"-lr{self.lr:g}"
        return f"{self.objective}-{row}{rate}-s{self.seed}"

    def trials(self, size):
        """The cells whose learning rates this one chooses from."""
        row = self.row.split(" --")[0]
        rates = size.rates if self.lr is None and row in SEARCHED else ()
        return [Cell(self.objective, row, 0, lr) for lr in rates]

    def needs(self, size):
        """The cells that must be there first."""
        first = [Cell(self.objective, "hr", self.seed)] if "{hr}" in ROWS[self.row] else []
        first += [Cell(self.objective, "untrained", 0)] if self.row == "pixels" else []
        return first + self.trials(size)


def cells_of(size):
    """All cells in an order in which none waits for a later one; seeds outermost, so that whatever
    is there compares rows at equal numbers."""
    cells = []
    for objective, rows, seeds in size.plan:
        for seed in range(seeds):
            for row in rows:
                cell = Cell(objective, row, seed)
                if row != "pixels" or seed == 0:  # nothing there is random
                    cells += [*cell.needs(size), cell]
    return list(dict.fromkeys(cells))


def path_of(cell, out):
    return out / "cells" / f"{cell.name}.json"


def read_cells(out):
    """The facts of the cells that are there, objective by objective, in the order of ROWS, curves
    last by name."""
    order = (*UNSEARCHED, *SEARCHED)

    def place(facts):
        row = facts["row"]
        return facts["objective"], order.index(row) if row in order else len(order), row

    return sorted(report.read_cells(out), key=place)


def rate_of(cell, size, out):
    """The learning rate of a cell: its own, or that of its best trial; None for SMALL's."""
    found = {trial.lr: json.loads(path_of(trial, out).read_text()) for trial in cell.trials(size)}
    return max(found, key=lambda lr: found[lr]["scores"]["ridge"]["val_miou"], default=cell.lr)


def training(cell, size, out, lr=None):
    """The words of train.py for a cell."""
    steps = size.teacher_steps if cell.row == "hr" else size.steps
    flags = f"{SMALL} {OBJECTIVES[cell.objective]} --steps {steps} {ROWS[cell.row]}"
    flags, _, shift = flags.partition(" --hr-shift ")  # of the ground, not of train.py
    flags += "" if lr is None else f" --lr {lr:g}"
    teacher, store = out / "runs" / Cell(cell.objective, "hr", cell.seed).name, store_of(out, shift)
    return ["train.py", "--store", store, "--out", out / "runs" / cell._replace(lr=lr).name,
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


def store_of(out, shift=""):
    return out / (f"store-shift-{shift}" if shift else "store")


def draw_pairs(out, size, shift=""):
    """The pairs of a study, packed; with HR that lies `shift` of its pixels beside its place."""
    pairs, store = out / ("pairs" + store_of(out, shift).name[5:]), store_of(out, shift)
    if not pairs.exists():
        call(["-m", "imagery.scenes", pairs, "--kind", size.ground, "--scenes", size.scenes,
              *(["--hr-shift", shift] if shift else [])])  # fmt: skip
    if not store.exists():
        call(["data.py", "pack", "--mr", pairs / "mr", "--hr", pairs / "hr", store, "--chip", 64])


def draw_ground(out, size):
    """The pairs, packed, and the labelled scenes, of other ground, of a study."""
    draw_pairs(out, size)
    if not (out / "task").exists():
        call(["-m", "imagery.scenes", out / "task", "--kind", size.ground, "--seed", 1,
              "--scenes", sum(size.task)])  # fmt: skip
    names = [f"scene_{k:03d}\n" for k in range(sum(size.task))]
    (out / "task" / "splits").mkdir(exist_ok=True)
    for split, count in zip(("train", "val", "test"), size.task, strict=True):
        (out / "task" / "splits" / f"{split}.txt").write_text("".join(names[:count]))
        names = names[count:]


def make(cell, size, out):
    """Train and judge a cell, and write its figures; nothing if another process is at it."""
    path, start = path_of(cell, out), time.perf_counter()
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # dies with this process
        except OSError:
            return
        if path.exists():
            return
        lr = rate_of(cell, size, out)
        run = out / "runs" / cell._replace(lr=lr).name
        scores, facts = {}, cell._asdict() | {"trial": cell.lr is not None, "lr": lr}
        if cell.row != "pixels":
            if "--hr-shift" in cell.row:
                draw_pairs(out, size, cell.row.split()[-1])
            words = training(cell, size, out, lr)
            train(run, words)
            log = read_log(run)
            facts |= {
                "command": shlex.join(["python", *map(str, words)]), "run": run.name,
                "steps": log[-1]["step"],
                "health": {key: log[-1][key] for key in ("loss", "rank", "place", "cosine")},
            }  # fmt: skip
        if cell.row == "pixels" and size.ceiling:
            # the headroom: what a supervised model of MR images makes of the same labels
            shape = ["--encoder", f"random:{out / 'runs' / cell._replace(row='untrained').name}"]
            scores[report.CEILING] = judge(shape, out, run / "scores" / "ceiling", size.ceiling)
        encoder = ["--encoder", run, "--stats", "encoder"]
        encoder = ["--encoder", "pixels", "--patch", 8] if cell.row == "pixels" else encoder
        for name, flags in (RIDGE if facts["trial"] else size.probes).items():
            results = run / "scores" / name.replace(" ", "-").replace(",", "").replace("%", "pc")
            scores[name] = judge(encoder, out, results, flags)
        if cell.row == "hr":
            facts["on_hr"] = judge(encoder, out, run / "scores" / "on-hr", RIDGE["ridge"], "hr")
        commit, edits = git_state()
        cuda = torch.cuda.is_available()
        facts |= {
            "scores": scores, "seconds": round(time.perf_counter() - start),
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
            "commit": commit and commit[:12] + "-dirty" * bool(edits), "torch": torch.__version__,
        }  # fmt: skip
        write_atomic(path, json.dumps(facts, indent=1) + "\n")


def judge(encoder, out, results, flags, sensor="mr"):
    """The mIoU of an encoder by one probe, a mean over the probe's seeds: of val and test."""
    task, side = out / "task", 64 if sensor == "mr" else 128
    call(["finetune.py", *encoder, "--images", task / sensor, "--masks", task / "masks",
          "--classes", task / "classes.txt", "--splits", task / "splits", "--tile", side,
          "--image-size", side, "--out", results, *flags.split()], quiet=True)  # fmt: skip
    rows = [json.loads(line) for line in (results / "results.jsonl").open()]
    return {key: float(np.mean([row[key] for row in rows])) for key in ("miou", "val_miou")}


def train(run, words):
    """Bring a run to its last step, from where it was stopped; nothing if it is there."""
    if (run / "encoder.safetensors").exists():
        steps = json.loads((run / "config.json").read_text())["steps"]
        if read_log(run)[-1]["step"] == steps:
            return
    call(words, quiet=True)


def make_all(size, out, jobs):
    """Make all cells, `jobs` at once, each after those that it needs; says how far it is. Returns
    how many were made."""
    todo = [cell for cell in cells_of(size) if not path_of(cell, out).exists()]
    start, made, failed = time.perf_counter(), 0, threading.Event()

    def work(cell):
        nonlocal made
        try:
            for other in cell.needs(size):
                while not path_of(other, out).exists() and not failed.is_set():
                    make(other, size, out)  # nothing, while another worker or process is at it
                    time.sleep(1)
            if failed.is_set():
                return
            make(cell, size, out)
        except ValueError as error:
            failed.set()
            raise ValueError(f"{cell.name}: {error}") from None
        made += 1
        left = (time.perf_counter() - start) / made * (len(todo) - made)
        print(f"{cell.name} is done, {made} of {len(todo)}; {duration(left)} left", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(work, cell) for cell in todo]:
            done.result()
    return made


# ---- the track: one budget for any idea


def track(idea, flags, out):
    """Run a fork's train.py under the track's budget, three seeds, and add a row to TRACK.md."""
    size = SIZES["laptop"]
    ROWS["idea"] = flags or "--variant mr " + SEEN
    draw_ground(out, size)
    ask = ["git", "-C", idea, "describe", "--always", "--dirty"]
    commit = subprocess.run(ask, capture_output=True, text=True).stdout.strip() or "no commit"
    name = f"{commit}-{hashlib.sha256(ROWS['idea'].encode()).hexdigest()[:6]}"
    scores = []
    for seed in range(report.TRACK_SEEDS):
        cell = Cell("ijepa", "idea", seed)
        run = out / "runs" / f"idea-{name}-s{seed}"
        for teacher in cell.needs(size):
            make(teacher, size, out)
        words = training(cell, size, out)
        words[0], words[words.index("--out") + 1] = idea / "train.py", run
        train(run, words)
        encoder = ["--encoder", run, "--stats", "encoder"]
        scores.append(judge(encoder, out, run / "scores", RIDGE["ridge"])["miou"])
    print(report.add_to_track(HERE, ROWS["idea"], scores, commit))


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
        help="train nothing: print the table of what is there and draw its pictures anew",
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
    args.out = args.out or HERE / "out" / ("laptop" if args.idea else args.size)
    return args


def main(args):
    if args.collect:
        return print(report.collect(args.collect))
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
    plan = [(objective, rows, min(seeds, args.seeds or seeds))
            for objective, rows, seeds in size.plan
            if args.objective in (None, objective)]  # fmt: skip
    size = size._replace(plan=tuple(plan))
    made = 0
    if not args.table:
        draw_ground(args.out, size)
        made = make_all(size, args.out, args.jobs)
    cells = read_cells(args.out)
    if not cells:
        raise ValueError(f"{args.out}: no cell of a study is there; start it without --table")
    said = report.table(cells)
    if made or args.table or not (args.out / "table.md").exists():
        report.draw(args.out, size.task, cells, call)
        write_atomic(args.out / "table.md", said)
    print("\n" + said)
    if args.publish:
        report.publish(HERE, args.out, args.size, cells)
    print(f"{args.out}: table.md and its pictures ({duration(time.perf_counter() - start)})")


if __name__ == "__main__":
    script(main, parse_args, "the same command goes on from there")
