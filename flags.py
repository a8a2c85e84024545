"""The flags of train.py: what each means, its default, and what follows from several of them.

`parse_args` resolves all of them, so that a run's config.json says everything: an objective's own
defaults, the rates that follow from others, a `--config` that is repeated, and the trial that a
run without a store is. A flag that would do nothing is refused.
"""

import argparse
import inspect
import math
import os
import subprocess
import sys
from pathlib import Path

import torch

from model import OBJECTIVES, SIZES
from run import Formatter, Parser, between, positive, read_config, whole

# What may differ between a run and its continuation
FREE_ON_RESUME = {
    "out", "resume", "override", "fresh", "config", "trial", "device", "device_batch", "compile",
    "checkpoint_activations", "log_every", "save_every", "stop_at", "probe_task", "probe_every",
    "plot", "profile", "store",  # a moved store is the same: `chips` tells others
}  # fmt: skip

# Flags of the affinity, which variants without one refuse
AFFINITY_FLAGS = (
    "ratio", "affinity_weight", "affinity_index", "affinity_centre", "hr_teacher",
    "hr_teacher_heads", "pos",
)  # fmt: skip

# Without --store: pairs/, or where that is not procedural scenes and, without a GPU, a model that a
# CPU trains
PAIRS, TRIAL = Path("pairs"), Path("out/scenes")
SMALL = (
    "--model tiny --dim 96 --depth 4 --heads 4 --patch 4 --crop-scale 0.6 1 --global-batch 32 "
    "--lr 1e-3 --momentum 0.99 --steps 500 --log-every 25"
).split()


# fmt: off
def build_parser(variants):
    p = Parser(
        prog="train.py",
        description="Pretrain with I-JEPA, Latent MIM or MAE, and spatial affinity.",
        allow_abbrev=False,
        formatter_class=Formatter,
    )
    on_off = argparse.BooleanOptionalAction

    g = p.add_argument_group("run")
    g.add_argument("--store", type=Path, nargs="+", metavar="DIR", help="folders written by "
                   "data.py pack, each with its own sensors and statistics (default: pairs, or "
                   "where that is not, scenes drawn for a trial)")
    g.add_argument("--out", type=Path, help="run directory; out/OBJECTIVE-VARIANT-sSEED if not set")
    g.add_argument("--objective", choices=OBJECTIVES, default="ijepa", help="self-supervision")
    g.add_argument("--variant", choices=variants, default="sa",
                   help="mr, hr: that sensor alone; sa: MR with HR affinity; sa-interp: the 'HR' "
                   "is the MR crop resampled; sa-mse: tokens instead of Gram matrices; "
                   "sa-shuffled: HR of another pair; sa-frozen: a teacher that stays untrained; "
                   "mse-interp, mse-shuffled: so with sa-mse; regulariser: no HR, the MR crop as "
                   "it is")
    g.add_argument("--seed", type=int, default=0, help="weights, order, crops and masks")
    g.add_argument("--config", type=Path, metavar="RUN/config.json", help="repeat that run: its "
                   "flags, but for --out, --resume, --override, --fresh and --stop-at; flags "
                   "given beside it win")
    g.add_argument("--resume", nargs="?", choices=["auto", "must"], const="must", default="auto",
                   help="auto: start, or continue the run of the same flags in --out; --resume "
                   "alone: there must be one")
    g.add_argument("--override", nargs="+", default=[], metavar="NAME", help="continue although "
                   "these differ, named as config.json does: lr, steps, ...")
    g.add_argument("--fresh", action="store_true", help="where --out holds a run, start a new one "
                   "beside it, in OUT-2, OUT-3, ...")
    g.add_argument("--stop-at", type=positive, metavar="STEP", help="save and stop here, early")
    g.add_argument("--plot", type=Path, nargs="+", metavar="RUN", help="train nothing: draw loss "
                   "and health of these runs, those that differ in -sSEED alone as a band, to "
                   "curves.png in the first")

    g = p.add_argument_group("images")
    g.add_argument("--hr-share", type=between(0, 1), default=1.0, help="share of the training "
                   "pairs that keep their HR, drawn by --seed; the other chips train with the SSL "
                   "loss alone")
    g.add_argument("--skip-flagged", action=on_off, default=False,
                   help="leave out the chips that data.py check flagged")
    g.add_argument("--mr-size", type=positive, help="pixels a side that MR crops are resampled "
                   "to; paper: 224 (ijepa, mae), 280 (latentmim, gaps included)")
    g.add_argument("--crop-scale", type=between(0.001, 1), nargs=2, metavar=("MIN", "MAX"),
                   help="share of the chip's area; paper: 0.3 1 (ijepa), 0.2 1 (latentmim)")

    g = p.add_argument_group("model")
    g.add_argument("--model", choices=sorted(SIZES), default="small", help="paper: small")
    g.add_argument("--patch", type=positive, help="pixels; paper: 14 (ijepa), 16 (latentmim)")
    g.add_argument("--dim", type=positive, help="width, instead of the model's")
    g.add_argument("--depth", type=positive, help="blocks, instead of the model's")
    g.add_argument("--heads", type=positive, help="attention heads, instead of the model's, or of "
                   "--init where nothing in the file tells")
    g.add_argument("--patch-gain", type=between(1e-6), default=1.0, help="factor on the patch "
                   "weights at the start: of few bands or pixels a patch says little beside its "
                   "position code, and tokens stay mostly place; paper: 1")
    g.add_argument("--init", type=Path, metavar="CKPT", help="start from this encoder, whose "
                   "architecture replaces the flags above; 3-band weights are inflated")

    g = p.add_argument_group("of one objective (model.py)")
    for name, takers in own_flags().items():
        text = "; ".join(f"{taker}: {help} (default: {value})"
                         for taker, (help, value, _) in takers.items())
        _, value, limit = next(iter(takers.values()))
        kind = dict(default=argparse.SUPPRESS, help=text)
        if isinstance(value, str):
            kind |= dict(choices=limit)
        elif isinstance(value, tuple):
            kind |= dict(type=between(0.001, 1), nargs=2, metavar=("MIN", "MAX"))
        elif isinstance(value, float):
            kind |= dict(type=between(0.001 if limit is None else limit))
        else:
            kind |= dict(type=positive if limit is None else whole)
        g.add_argument("--" + name.replace("_", "-"), **kind)

    g = p.add_argument_group("affinity")
    g.add_argument("--ratio", type=positive, default=2, help="HR per MR token side; paper: 2")
    g.add_argument("--affinity-weight", type=between(0), default=1.0, help="lambda; paper: 1")
    g.add_argument("--affinity-index", choices=["visible", "block"], default="visible",
                   help="the context, or a rectangle in a second student pass")
    g.add_argument("--affinity-centre", choices=["none", "image"], default="none",
                   help="subtract the mean of an image's tokens first; paper: none")
    g.add_argument("--hr-teacher", default="ema", metavar="ema|WEIGHTS", help="who sees the HR "
                   "image: the student's EMA, or any encoder that weights.py reads, frozen; "
                   "paper: ema")
    g.add_argument("--hr-teacher-heads", type=positive, metavar="HEADS", help="attention heads of "
                   "--hr-teacher WEIGHTS where nothing in the file tells")
    g.add_argument("--pos", choices=["grid", "ground"], default="grid",
                   help="HR token positions, 0..rg-1 or in MR grid units; paper: grid")

    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=between(1e-9), default=300,
                   help="passes over the store; paper: 300")
    g.add_argument("--steps", type=positive, help="updates, instead of --epochs")
    g.add_argument("--warmup-epochs", type=between(0, 300), help="as if --epochs was "
                   "300, else the same share; paper: 40 (ijepa), 30 (latentmim)")
    g.add_argument("--global-batch", type=positive, help="pairs an update, over all ranks; paper: "
                   "128 a GPU (ijepa, here 1024), 512 (latentmim)")
    g.add_argument("--device-batch", type=positive, help="pairs at once on a rank, the rest "
                   "accumulates; less needs less memory (none: up to 128 on a GPU, 16 on a CPU)")
    g.add_argument("--lr", type=between(0), help="peak; paper: 1e-3 (ijepa, meant for a global "
                   "batch of 1024), 1.5e-4 x global batch / 256 (latentmim, mae)")
    g.add_argument("--start-lr", type=between(0), help="paper: lr / 5 (ijepa), lr / 4 (latentmim)")
    g.add_argument("--final-lr", type=between(0), help="paper: lr / 1000 (ijepa), lr / 4 "
                   "(latentmim)")
    g.add_argument("--weight-decay", type=between(0),
                   help="paper: 0.04 (ijepa), 0.05 (latentmim)")
    g.add_argument("--final-weight-decay", type=between(0),
                   help="paper: 0.4 (ijepa), 0.05 (latentmim)")
    g.add_argument("--beta2", type=between(0, 0.999999),
                   help="AdamW's; paper: 0.999 (ijepa), 0.95 (latentmim)")
    g.add_argument("--momentum", type=between(0, 1), help="of the EMA teacher at the start, 1 at "
                   "the end; paper: 0.996 (ijepa), 0.99 (latentmim)")
    g.add_argument("--clip", type=between(1e-9), metavar="NORM", help="scale gradients of a larger "
                   "norm down to this one; paper: never")
    g.add_argument("--vicreg", type=between(0), default=0.0, help="weight of VICReg's variance and "
                   "covariance terms on the context tokens of each micro-batch (they change with "
                   "--device-batch and ranks); paper: 0")

    g = p.add_argument_group("probe")
    g.add_argument("--probe-task", nargs=2, metavar=("NAME", "DIR"), help="a task of finetune.py "
                   "--list-tasks and its folder: the log gains the validation mIoU of nearest "
                   "neighbours on the student's tokens")
    g.add_argument("--probe-every", type=positive, default=1000, help="steps between probes")

    g = p.add_argument_group("machine")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to run")
    g.add_argument("--precision", choices=["auto", "float32", "bfloat16", "float16"],
                   default="auto", help="autocast; auto: bfloat16 on a GPU that has it, else "
                   "float16; float32 on the CPU")
    g.add_argument("--compile", action=on_off, default=False, help="torch.compile the objective "
                   "and the teacher's pass")
    g.add_argument("--checkpoint-activations", action=on_off, default=False, help="compute the "
                   "student's blocks again in the backward pass: the same losses in less memory, "
                   "a third slower")
    g.add_argument("--profile", type=positive, metavar="STEPS", help="record so many steps, after "
                   "two, in OUT/trace-START.json, which ui.perfetto.dev shows")
    g.add_argument("--log-every", type=positive, default=50, help="steps between log lines")
    g.add_argument("--save-every", type=positive, default=1000, help="steps between checkpoints")
    return p
# fmt: on


def own_flags():
    """The flags that belong to objectives: {flag: {objective: (help, default, limit)}}."""
    found = {}
    for name, objective in OBJECTIVES.items():
        defaults = inspect.signature(objective.__init__).parameters
        for flag, text in objective.flags.items():
            text, limit = (text, None) if isinstance(text, str) else text
            found.setdefault(flag, {})[name] = (text, defaults[flag].default, limit)
    return found


def parse_args(variants, argv=None):
    """All flags of a run, resolved: what its config.json records. variants: those of train.py."""
    p, typed = build_parser(variants), sys.argv[1:] if argv is None else list(argv)
    given = {word.split("=")[0] for word in typed if word.startswith("--")}
    words = typed
    first = p.parse_known_args(words)[0]
    trial = not (first.store or first.config or PAIRS.exists())
    if first.config:
        words = flags_of(first.config, leave=not_repeated(first, given)) + words
        first = p.parse_known_args(words)[0]
    if trial:
        words = [*trial_words(first.device, first.objective), *words]
    own = {flag: takers[first.objective][1] for flag, takers in own_flags().items()
           if first.objective in takers}  # fmt: skip
    rates = dict(OBJECTIVES[first.objective].defaults)
    lr, start, final = (rates.pop(k, None) for k in ("lr", "start_lr", "final_lr"))
    per_image = rates.pop("lr_per_image", None)
    p.set_defaults(**rates)
    args = p.parse_args(words)
    args.trial, args.store = trial, args.store or [PAIRS]
    # what was typed wins over what a config or a trial says of the same thing by another name
    if "--epochs" in given and "--steps" not in given:
        args.steps = None
    if "--init" in given and "--heads" not in given:
        args.heads = None
    for flag, why in unused(args, variants[args.variant], given):
        p.error(f"--{flag.replace('_', '-')}: {why}")
    for name, value in own.items():
        vars(args).setdefault(name, list(value) if isinstance(value, tuple) else value)
    for name, value in vars(args).items():
        if name.endswith("_scale") and value[0] > value[1]:
            p.error(f"argument --{name.replace('_', '-')}: MIN {value[0]} is above MAX {value[1]}")
    if args.variant == "regulariser":
        args.ratio = 1
    if not 0 <= args.seed < 2**63:
        p.error(f"argument --seed: {args.seed} is not between 0 and 2**63 - 1")
    if args.out is None:
        args.out = Path("out") / f"{args.objective}-{args.variant}-s{args.seed}"
    if args.lr is None:
        args.lr = lr if per_image is None else per_image * args.global_batch
    args.start_lr = start * args.lr if args.start_lr is None else args.start_lr
    args.final_lr = final * args.lr if args.final_lr is None else args.final_lr
    return args


def not_repeated(first, given):
    """The flags of the run in --config that are not repeated: those of its folder, and what was
    derived there from a flag that is given anew."""
    before = dict.fromkeys(("lr", "start_lr", "final_lr", "global_batch"), math.nan)
    before |= read_config(first.config)["args"]
    if before.get("objective") not in OBJECTIVES:
        raise ValueError(f"{first.config}: not of a run of train.py; it names no objective")
    if "--objective" in given and first.objective != before["objective"]:
        raise ValueError(
            f"--objective {first.objective}: {first.config} is of {before['objective']}, whose "
            "settings mean other things there; give the flags without --config"
        )
    leave = ["out", "resume", "override", "fresh", "stop_at", "config", "trial"]
    rule = OBJECTIVES[before["objective"]].defaults
    derived = rule.get("lr_per_image", 0) * before["global_batch"]
    if "--global-batch" in given and math.isclose(before["lr"], derived):
        leave.append("lr")
    if "--lr" in given or "lr" in leave:
        rates = ("start_lr", "final_lr")
        leave += [k for k in rates if math.isclose(before[k], rule[k] * before["lr"])]
    return leave


def flags_of(path, leave):
    """The flags of a run as they are typed, from its config.json, but for those to leave."""
    words = []
    for name, value in read_config(path)["args"].items():
        flag = "--" + name.replace("_", "-")
        if name in leave or value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return words


def trial_words(device, objective):
    """The flags of a run that has no store: scenes and, without a GPU, what a CPU trains."""
    cpu = device == "cpu" or not torch.cuda.is_available()
    small = [*SMALL, *OBJECTIVES[objective].small.split()] if cpu else []
    return ["--store", str(TRIAL / "pairs"), *small]


def unused(args, variant, given):
    """The flags that were given but would do nothing: [(name, why)]."""
    own, takers = OBJECTIVES[args.objective], own_flags()
    idle = {name: f"not for --objective {args.objective}, but for {', '.join(takes)}"
            for name, takes in takers.items() if args.objective not in takes}  # fmt: skip
    if variant.teacher is None:
        why = f"--variant {args.variant} has no affinity that it could change"
        idle |= dict.fromkeys((*AFFINITY_FLAGS, *own.affinity_flags), why)
    if args.variant == "regulariser":
        idle["ratio"] = "the teacher of --variant regulariser sees what the student sees"
    if variant.frozen:
        why = "the teacher of --variant sa-frozen is the student as it was drawn"
        idle |= dict.fromkeys(("hr_teacher", "hr_teacher_heads"), why)
    if args.variant == "mr":
        idle["hr_share"] = "--variant mr looks at no HR"
    if args.init:
        why = f"the architecture is that of --init {args.init}"
        idle |= dict.fromkeys(("model", "patch", "dim", "depth", "patch_gain"), why)
    if "--steps" in given:
        idle["epochs"] = "--steps says how long to train"
    if args.hr_teacher == "ema":
        idle.setdefault("hr_teacher_heads", "the EMA teacher has the student's heads")
    if not args.probe_task:
        idle["probe_every"] = "there is no --probe-task"
    return [(k, why) for k, why in idle.items() if "--" + k.replace("_", "-") in given]


def draw_trial(args, ranks):
    """Where there is no store yet, draw procedural scenes and pack them, on rank 0."""
    store, images = TRIAL / "pairs", TRIAL / "images"
    if not args.trial:
        return
    if ranks.rank == 0:
        print(f"no store given: training on scenes drawn for a trial, {store}; bring your own "
              "images with python data.py pack, then --store\nits flags, where you give none: "
              + " ".join(trial_words(args.device, args.objective)), flush=True)  # fmt: skip
        commands = [
            f"imagery.scenes {images} --scenes 24 --size 256 --seed 0",
            f"data pack --mr {images}/mr --hr {images}/hr {store} --chip 32",
        ]
        here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        for command, made in zip(commands, (images, store), strict=True):
            if not made.exists():
                print(f"$ python -m {command}", flush=True)
                if subprocess.run([sys.executable, "-m", *command.split()], env=here).returncode:
                    raise ValueError(f"{made}: could not be made for a trial; give --store")
    ranks.wait()
