"""Pretrain a ViT on mid-resolution images, with high-resolution pairs as a teacher's evidence.

    python train.py --store pairs --variant sa                        one process, CPU or GPU
    torchrun --nproc_per_node=8 train.py --store pairs --variant sa   eight GPUs, the same run
    python train.py --store pairs more/ --hr-share 0.25               two stores, HR for a quarter

I-JEPA or Latent MIM on the MR images, plus spatial affinity (arXiv 2601.12964). Top to bottom:
schedules, health, flags, run directory, model, one step's randomness and losses, and `main`, which
joins them. Sample order, crops and masks are functions of (seed, step, position in the global
batch), so any number of ranks and any accumulation train the same run, and resuming needs nothing
but the weights and the step.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from affinity import SpatialAffinity, gram_loss, token_mse
from data import Store, crop_pairs, draw_crops, read_chips, sample_order
from datasets.tasks import load_task
from figures import draw_tokens
from model import (
    IJEPA,
    SIZES,
    LatentMIM,
    draw_rectangle,
    fit_bands,
    load_encoder,
    read_tensors,
    save_encoder,
    take_patches,
    vit,
)
from segment import probe

# What the paper uses where the two frameworks differ; any flag overrides it.
PAPER = {
    "ijepa": dict(
        patch=14,
        mr_size=224,
        crop_scale=[0.3, 1.0],
        global_batch=1024,  # 128 on each of 8 GPUs
        lr=1e-3,
        start_lr=2e-4,
        final_lr=1e-6,
        warmup_epochs=40,
        weight_decay=0.04,
        final_weight_decay=0.4,
        beta2=0.999,
        momentum=0.996,
    ),
    "latentmim": dict(
        patch=16,
        mr_size=280,  # 14 cells of 16 + 4
        crop_scale=[0.2, 1.0],
        global_batch=512,
        lr=None,  # 1.5e-4 x global batch / 256, see main
        start_lr=None,  # lr / 4
        final_lr=None,  # lr / 4
        warmup_epochs=30,
        weight_decay=0.05,
        final_weight_decay=0.05,
        beta2=0.95,
        momentum=0.99,
    ),
}
# What may differ between a run and its continuation
FREE_ON_RESUME = {
    "out",
    "resume",
    "device",
    "device_batch",
    "compile",
    "log_every",
    "save_every",
    "stop_at",
    "probe_task",
    "probe_every",
}


# ---- schedules: pure functions of the step


def linear(step, total, start, end):
    return start + (end - start) * step / total


def cosine(step, total, start, end):
    """Half a cosine from start (step 0) to end (step total)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / total))


def warmup_cosine(step, total, warmup, start, peak, end):
    """Linear from start to peak over `warmup` steps, then half a cosine to end."""
    if step < warmup:
        return linear(step, warmup, start, peak)
    return cosine(step - warmup, max(total - warmup, 1), peak, end)


def decays(objective, name, parameter):
    """Does weight decay act on this parameter? As published for each framework."""
    if objective == "ijepa":
        return parameter.ndim != 1 and "bias" not in name
    return not any(word in name for word in ("bias", "norm", "embed"))


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """teacher <- momentum * teacher + (1 - momentum) * student, parameter by parameter."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


# ---- health: sums over tokens, so that any number of ranks logs the same numbers


@torch.no_grad()
def token_sums(tokens, target):
    """Sums over student tokens (B, K, D) and target tokens (B, ..., D): a list of tensors that add
    up over micro-batches and ranks, for `health`."""
    x, y = tokens.flatten(0, -2).double(), target.flatten(0, -2).double()
    unit = torch.nn.functional.normalize(x, dim=-1)
    count = torch.tensor([len(x), len(y)], dtype=torch.float64, device=x.device)
    return [x.mT @ x, unit.sum(0), y.sum(0), y.square().sum(0), count]


def health(second_moment, unit_sum, target_sum, target_square, count):
    """What tells whether training is healthy, from `token_sums`.

    rank: exp of the entropy of the tokens' normalised singular values (effective rank; RankMe,
    arXiv 2210.02885), 1 to D. cosine: mean cosine between any two student tokens. target_var:
    variance of the targets over tokens, averaged over D.
    """
    values = torch.linalg.eigvalsh(second_moment).clamp_min(0).sqrt()
    share = values / values.sum().clamp_min(1e-300)
    n, m = count
    variance = (target_square / m - (target_sum / m).square()).mean()
    return {
        "rank": float(torch.special.entr(share).sum().exp()),
        "cosine": float((unit_sum / n).square().sum()),
        "target_var": float(variance),
    }


# ---- flags


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return value


def between(low, high=math.inf):
    def parse(text):
        value = float(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    return parse


# fmt: off
def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description="Pretrain with I-JEPA or Latent MIM and spatial affinity.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    on_off = argparse.BooleanOptionalAction

    g = p.add_argument_group("run")
    g.add_argument("--store", type=Path, required=True, nargs="+", metavar="DIR",
                   help="folders written by data.py pack, each with its own sensors and statistics")
    g.add_argument("--out", type=Path, help="run directory; out/OBJECTIVE-VARIANT-sSEED if not set")
    g.add_argument("--objective", choices=sorted(PAPER), default="ijepa", help="self-supervision")
    g.add_argument("--variant", choices=["mr", "hr", "sa", "sa-interp", "sa-mse"], default="sa",
                   help="mr, hr: that sensor alone; sa: MR with HR affinity; sa-interp: the 'HR' "
                   "is the MR crop resampled; sa-mse: tokens instead of Gram matrices")
    g.add_argument("--seed", type=int, default=0, help="weights, order, crops and masks")
    g.add_argument("--resume", action=on_off, default=False, help="continue the run in --out")
    g.add_argument("--stop-at", type=positive, metavar="STEP", help="save and stop here, early")

    g = p.add_argument_group("images")
    g.add_argument("--hr-share", type=between(0, 1), default=1.0, help="share of the training "
                   "pairs that keep their HR, drawn by --seed; the other chips train with the SSL "
                   "loss alone")
    g.add_argument("--skip-flagged", action=on_off, default=False,
                   help="leave out the chips that data.py check flagged")
    g.add_argument("--mr-size", type=positive, help="pixels a side that MR crops are resampled "
                   "to; paper: 224 (ijepa), 280 (latentmim, gaps included)")
    g.add_argument("--ratio", type=positive, default=2, help="HR per MR token side; paper: 2")
    g.add_argument("--crop-scale", type=between(0.001, 1), nargs=2, metavar=("MIN", "MAX"),
                   help="share of the chip's area; paper: 0.3 1 (ijepa), 0.2 1 (latentmim)")

    g = p.add_argument_group("model")
    g.add_argument("--model", choices=sorted(SIZES), default="small", help="paper: small")
    g.add_argument("--patch", type=positive, help="pixels; paper: 14 (ijepa), 16 (latentmim)")
    g.add_argument("--dim", type=positive, help="width, instead of the model's")
    g.add_argument("--depth", type=positive, help="blocks, instead of the model's")
    g.add_argument("--heads", type=positive, help="attention heads, instead of the model's")
    g.add_argument("--init", type=Path, metavar="CKPT", help="start from this encoder, whose "
                   "architecture replaces the flags above; 3-band weights are inflated")

    g = p.add_argument_group("I-JEPA")
    g.add_argument("--predictor-dim", type=positive, default=384, help="width; paper: 384")
    g.add_argument("--predictor-depth", type=positive, default=12, help="blocks; paper: 12")
    g.add_argument("--targets", type=positive, default=4, help="target blocks an image; paper: 4")
    g.add_argument("--target-scale", type=between(0.001, 1), nargs=2, default=[0.15, 0.2],
                   metavar=("MIN", "MAX"), help="share of the grid; paper: 0.15 0.2")
    g.add_argument("--context-scale", type=between(0.001, 1), nargs=2, default=[0.85, 1.0],
                   metavar=("MIN", "MAX"), help="share of the grid; paper: 0.85 1")
    g.add_argument("--context-cut", choices=["random", "last"], default="random",
                   help="ids that go when contexts are cut to one length; paper: last")

    g = p.add_argument_group("Latent MIM")
    g.add_argument("--gap", type=int, default=4, help="pixels between MR patches; paper: 4")
    g.add_argument("--visible", type=positive, default=20, help="patches seen; paper: 20")
    g.add_argument("--head-dim", type=positive, default=4096, help="projection width; paper: 4096")
    g.add_argument("--decoder-dim", type=positive, default=512, help="width; paper: 512")
    g.add_argument("--decoder-depth", type=positive, default=3, help="blocks; paper: 3")
    g.add_argument("--decoder-heads", type=positive, default=16, help="attention heads; paper: 16")
    g.add_argument("--tau", type=between(1e-3), default=0.2, help="InfoNCE temperature; paper: 0.2")
    g.add_argument("--gap-offset", choices=["same", "paper"], default="same",
                   help="HR patches on the ground of their MR patch, or drawn apart; "
                   "paper: paper")

    g = p.add_argument_group("affinity")
    g.add_argument("--affinity-weight", type=between(0), default=1.0, help="lambda; paper: 1")
    g.add_argument("--affinity-on", choices=["head", "trunk"], default="head",
                   help="Latent MIM tokens it compares, projected or not; paper: head")
    g.add_argument("--affinity-index", choices=["visible", "block"], default="visible",
                   help="the context, or a rectangle in a second student pass")
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
    g.add_argument("--lr", type=between(0), help="peak; paper: 1e-3 (ijepa), 1.5e-4 x global "
                   "batch / 256 (latentmim)")
    g.add_argument("--start-lr", type=between(0), help="paper: 2e-4 (ijepa), lr / 4 (latentmim)")
    g.add_argument("--final-lr", type=between(0), help="paper: 1e-6 (ijepa), lr / 4 (latentmim)")
    g.add_argument("--weight-decay", type=between(0),
                   help="paper: 0.04 (ijepa), 0.05 (latentmim)")
    g.add_argument("--final-weight-decay", type=between(0),
                   help="paper: 0.4 (ijepa), 0.05 (latentmim)")
    g.add_argument("--beta2", type=between(0, 0.999999),
                   help="AdamW's; paper: 0.999 (ijepa), 0.95 (latentmim)")
    g.add_argument("--momentum", type=between(0, 1), help="of the EMA teacher at the start, 1 at "
                   "the end; paper: 0.996 (ijepa), 0.99 (latentmim)")

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
    g.add_argument("--compile", action=on_off, default=False, help="torch.compile the objective")
    g.add_argument("--log-every", type=positive, default=50, help="steps between log lines")
    g.add_argument("--save-every", type=positive, default=1000, help="steps between checkpoints")

    objective = p.parse_known_args(argv)[0].objective
    p.set_defaults(**PAPER[objective])
    args = p.parse_args(argv)
    for name in ("crop_scale", "target_scale", "context_scale"):
        low, high = getattr(args, name)
        if low > high:
            p.error(f"argument --{name.replace('_', '-')}: MIN {low} is above MAX {high}")
    for name in ("seed", "gap"):
        if getattr(args, name) < 0:
            p.error(f"argument --{name}: {getattr(args, name)} is below 0")
    if args.out is None:
        args.out = Path("out") / f"{args.objective}-{args.variant}-s{args.seed}"
    if args.lr is None:
        args.lr = 1.5e-4 * args.global_batch / 256
    if args.start_lr is None:
        args.start_lr = args.lr / 4
    if args.final_lr is None:
        args.final_lr = args.lr / 4
    return args
# fmt: on


# ---- the run directory


def git_state():
    """(commit, dirty) of this checkout; (None, None) outside git."""
    here = Path(__file__).parent
    try:
        ask = [["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "-uno"]]
        commit, status = (
            subprocess.run(a, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for a in ask
        )
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return commit, bool(status)


def write_atomic(path, write):
    """write(temporary path), flushed to disk, then renamed to path."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def open_run(out, resume, config):
    """Check or make the run directory; returns the checkpoint to continue from, or None.

    config: {"args": every flag}. Raises ValueError if the folder is not ours, holds a run and
    `resume` is off, or holds a run of other flags.
    """
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    ours = "config.json" in names and names & {"log.jsonl", "ckpt.pt", "ckpt.previous.pt"}
    if (out.exists() and not out.is_dir()) or (names and not ours):
        raise ValueError(f"--out {out}: exists and is not a run directory; choose another")
    path, previous = out / "ckpt.pt", out / "ckpt.previous.pt"
    if not path.is_file() and previous.is_file():
        path = previous  # killed between the two renames of `save_checkpoint`
    if resume and not ours:
        raise ValueError(f"--resume: no run in {out} (no config.json); start it without --resume")
    if not path.is_file():
        return None  # no run, or one that stopped before its first checkpoint: nothing to lose
    if not resume:
        raise ValueError(
            f"--out {out}: holds a run; add --resume to continue it, or choose another"
        )
    try:
        before = json.loads((out / "config.json").read_text())
        before = before["args"] | {key: before[key] for key in ("steps", "precision", "chips")}
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{out / 'config.json'}: damaged, or not of a run; start a new run from the weights "
            f"with --init {out / 'ckpt.pt'}"
        ) from None
    now = config["args"] | {key: config[key] for key in ("steps", "precision", "chips")}
    for name, value in now.items():
        if name == "chips" and before[name] != value:
            raise ValueError(
                f"{out}: was trained on chips {before[name]}, the stores now hold {value}; bring "
                f"back what was packed and flagged then, or start a new run with --init {out}"
            )
        if name not in FREE_ON_RESUME and before.get(name) != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{out}: was trained with {flag} {before.get(name)}, now {value}; repeat its flags "
                f"to continue, or start a new run from its weights with --init {out}"
            )
    try:
        return read_tensors(path)[0]
    except ValueError as error:
        if path == previous:
            raise
        raise ValueError(
            f"{error}; rename {previous} to {path.name} to continue from the one before"
        ) from None


def log_until(path, step):
    """The lines of a log that belong to steps up to `step`; a kill may have cut the last one."""
    kept = ""
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            kept += line + "\n" if json.loads(line)["step"] <= step else ""
    return kept


def save_checkpoint(path, state):
    """Write state to path, flushed to disk before it takes the name; the one before is kept."""
    new = path.with_name("ckpt.new.pt")
    write_atomic(new, lambda to: torch.save(state, to))
    if path.is_file():
        os.replace(path, path.with_name("ckpt.previous.pt"))
    os.replace(new, path)


def duration(seconds):
    """Seconds as a reader says them: 40 s, 12 min, 1 h 12 min."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def report(entry, total, seconds_left):
    """One log line, and a sentence where training has collapsed."""
    memory = f"{entry['gb']:.1f} GB | " if entry["gb"] else ""
    if "probe_miou" in entry:
        memory = f"probe {entry['probe_miou']:.4f} | {memory}"
    print(
        f"step {entry['step']:05d}/{total} | loss {entry['loss']:.4f} (ssl {entry['ssl']:.4f} aff "
        f"{entry['affinity']:.4f}) | rank {entry['rank']:.1f} | cos {entry['cosine']:.2f} | var "
        f"{entry['target_var']:.2f} | grad {entry['grad_norm']:.2f} | lr {entry['lr']:.1e} | ema "
        f"{entry['momentum']:.4f} | {entry['ms']:.0f} ms | {entry['images_per_s']:,.0f} img/s | "
        f"{memory}{duration(seconds_left)} left",
        flush=True,
    )
    if entry["rank"] < 2:
        print(
            f"WARNING: the student's tokens have collapsed (effective rank {entry['rank']:.2f}): "
            f"they all say the same. Start again with a lower --lr or a higher --momentum."
        )


# ---- the model


def build_objective(args, bands):
    """The objective with its student, from the flags; ValueError if size and patch do not fit."""
    if args.init:
        given = load_encoder(args.init)
        encoder = fit_bands(given, bands).train()
        if encoder is not given:
            print(f"--init: {given.in_channels}-band weights fitted to {','.join(bands)}")
    else:
        sizes = {k: v for k in ("dim", "depth", "heads") if (v := getattr(args, k)) is not None}
        latent = {"class_token": True, "pos": "latentmim"} if args.objective == "latentmim" else {}
        encoder = vit(args.model, in_channels=len(bands), patch_size=args.patch, **sizes, **latent)
    gap = args.gap if args.objective == "latentmim" else 0
    cell = encoder.patch_size + gap
    if args.mr_size % cell:
        raise ValueError(
            f"--mr-size {args.mr_size} is no multiple of the {encoder.patch_size} px patch"
            + (f" + {gap} px gap" if gap else "")
            + f"; try {max(1, round(args.mr_size / cell)) * cell}"
        )
    grid = (args.mr_size // cell, args.mr_size // cell)
    if args.objective == "ijepa":
        return IJEPA(
            encoder,
            grid,
            args.predictor_dim,
            args.predictor_depth,
            targets=args.targets,
            target_scale=tuple(args.target_scale),
            context_scale=tuple(args.context_scale),
            cut=args.context_cut,
        )
    return LatentMIM(
        encoder,
        grid,
        gap=gap,
        visible=args.visible,
        head_dim=args.head_dim,
        decoder_dim=args.decoder_dim,
        decoder_depth=args.decoder_depth,
        decoder_heads=args.decoder_heads,
        tau=args.tau,
        affinity_on=args.affinity_on,
    )


def build_affinity(args, teacher):
    """Spatial affinity with the EMA teacher as HR teacher; None for the variants without."""
    if args.variant in ("mr", "hr"):
        return None
    spacing = 1 / args.ratio if args.pos == "ground" else 1.0

    def encode(hr, index):
        tokens = teacher(hr, index, spacing)
        return teacher.head(tokens) if args.affinity_on == "head" else tokens

    return SpatialAffinity(encode, args.ratio, token_mse if args.variant == "sa-mse" else gram_loss)


# ---- the chips


def training_chips(args, stores):
    """Which chips a run trains on: (n, 2) int64 store and chip, has_hr (n,) bool, and 12 hex digits
    that change with them. Raises ValueError where stores do not go together or nothing is left."""
    sensor = "hr" if args.variant == "hr" else "mr"
    chips, has_hr, digest = [], [], hashlib.sha256()
    for number, (path, store) in enumerate(zip(args.store, stores, strict=True)):
        bands, first = (each.meta["bands"][sensor] for each in (store, stores[0]))
        if bands != first:
            raise ValueError(
                f"{path}: its {sensor} bands are {','.join(bands)}, those of {args.store[0]} "
                f"{','.join(first)}; pack both with the same --band-names"
            )
        ids = store.split("train")
        if args.skip_flagged:
            ids = ids[~store.flagged[ids]]
        if args.variant == "hr":
            ids = ids[store.has_hr[ids]]
        if len(ids) == 0:
            raise ValueError(
                f"{path}: no chip in its train split"
                + (", or all are flagged" if args.skip_flagged else "")
                + (" has HR" if args.variant == "hr" else "")
                + "; pack it again"
            )
        chips.append(np.column_stack([np.full_like(ids, number), ids]))
        has_hr.append(store.has_hr[ids])
        facts = {k: store.meta[k] for k in ("bands", "shape", "dtype", "mean", "std")}
        for part in (json.dumps(facts).encode(), ids.tobytes(), has_hr[-1].tobytes()):
            digest.update(part)
    chips, has_hr = np.concatenate(chips), np.concatenate(has_hr)
    if args.variant.startswith("sa") and not has_hr.any():
        raise ValueError(
            f"--variant {args.variant}: no training chip has HR; pack some with it, raise "
            f"--hr-share {args.hr_share:g}, or take --variant mr"
        )
    return chips, has_hr, digest.hexdigest()[:12]


# ---- one step


def draw_step(args, objective, step):
    """All random choices of a step for the whole global batch, on the CPU: dict of tensors whose
    first axis is the position in the global batch."""
    # a torch CPU generator keeps 32 bits of its seed: mix both numbers into them
    mixed = np.random.SeedSequence((args.seed, step, 2)).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(mixed))
    masks = objective.draw(args.global_batch, generator)
    crops = draw_crops(args.seed, step, args.global_batch, tuple(args.crop_scale))
    masks["crop"] = torch.from_numpy(crops)
    if args.affinity_index == "block":
        masks["block"] = draw_rectangle(args.global_batch, objective.grid, generator)
    if args.gap_offset == "paper":
        cells = [args.ratio * cells for cells in objective.grid]
        shape = (args.global_batch, *cells, 2)
        masks["hr_offset"] = torch.randint(0, max(args.gap, 1), shape, generator=generator)
    return masks


def step_losses(args, model, objective, affinity, parts, masks):
    """Losses of one micro-batch on its device: SSL, affinity (the mean over the pairs in it, 0
    without), how many pairs those are, and, for `health`, student tokens and MR images.

    model: `objective`, or what DDP and torch.compile made of it. parts: of `read_chips`, with the
    crops of its chips in each batch.
    """
    views = [
        crop_pairs(
            batch,
            batch["crop"],
            meta,
            args.mr_size,
            args.ratio * args.mr_size if affinity else None,
            mr_from="hr" if args.variant == "hr" else "mr",
            hr_from="mr" if args.variant == "sa-interp" else "hr",
        )
        for meta, _, batch in parts
    ]
    mr = in_order([mr for mr, _ in views], [place for _, place, _ in parts])
    loss_ssl, tokens, index = model(mr, masks)
    places = [place[batch["has_hr"]] for _, place, batch in parts]  # on the CPU, as the masks were
    pairs = torch.cat(places).sort()[0]
    if affinity is None or not len(pairs):
        return loss_ssl, torch.zeros_like(loss_ssl), 0, tokens, mr
    hr = in_order([hr for _, hr in views], places)
    compared = tokens
    if args.affinity_index == "block":
        index = masks["block"]
        compared = objective.encode(mr, masks, index)
    # the chips without HR learn from the SSL loss alone
    pairs = slice(None) if len(pairs) == len(mr) else pairs.to(mr.device)
    if args.objective == "latentmim":
        patch, r = objective.student.patch_size, args.ratio
        if args.gap_offset == "paper":
            hr = take_patches(hr, patch, args.gap, masks["hr_offset"][pairs])
        else:  # the r * r HR patches of an MR patch lie on its ground
            hr = take_patches(hr, r * patch, r * args.gap, r * masks["offset"][pairs])
    loss_affinity = affinity(compared[pairs], index[pairs], hr, objective.grid)
    return loss_ssl, loss_affinity, len(hr), tokens, mr


def in_order(parts, places):
    """Join tensors whose rows belong at `places` (CPU), in the order of the places."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)[torch.cat(places).argsort().to(parts[0].device)]


# ---- the run


def main(args):
    # Ranks. torchrun sets these; without it there is one.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU found; use --device cpu")
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    precision = args.precision
    if precision == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if bf16 else "float16" if cuda else "float32"
    autocast = torch.autocast(
        device.type, getattr(torch, precision), enabled=precision != "float32"
    )

    # The batch: one update is accumulation x ranks x device batch, position by position.
    # Unless set, as many at once as fit: the paper's 128 on a GPU, 16 on a CPU, or fewer.
    device_batch = args.device_batch or max(
        n for n in range(1, 129 if cuda else 17) if args.global_batch // world % n == 0
    )
    if args.global_batch % (device_batch * world):
        unit = device_batch * world
        near = args.global_batch // unit * unit
        raise ValueError(
            f"--global-batch {args.global_batch} is not a multiple of --device-batch "
            f"{device_batch} x {world} ranks = {unit}; try "
            + " or ".join(str(n) for n in (near, near + unit) if n)
        )
    accumulation = args.global_batch // (device_batch * world)

    def share(values):
        """This rank's part of a tensor over the global batch, micro-batch after micro-batch."""
        mine = values.view(accumulation, world, device_batch, *values.shape[1:])[:, rank]
        return mine.flatten(0, 1)

    # Data, model, affinity. The same seed gives the same weights on every rank.
    stores = [Store(path, args.hr_share, args.seed) for path in args.store]
    sensor = "hr" if args.variant == "hr" else "mr"
    train, has_hr, chips_hash = training_chips(args, stores)
    flagged = sum(int(store.flagged[store.split("train")].sum()) for store in stores)
    flagged = f", {flagged} flagged left out" if args.skip_flagged else ""
    bands = stores[0].meta["bands"][sensor]
    total = args.steps or max(1, round(args.epochs * len(train) / args.global_batch))
    warmup = round(total * args.warmup_epochs / 300)
    torch.manual_seed(args.seed)
    objective = build_objective(args, bands).to(device)
    encoder = objective.student
    affinity = build_affinity(args, objective.teacher)
    draw_step(args, objective, 0)  # masks that cannot be drawn say so now
    if args.probe_task and rank == 0:
        task = load_task(*args.probe_task, bands=bands)
    probe_size = objective.grid[0] * encoder.patch_size

    # Optimiser: two groups, with and without weight decay.
    named = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if decays(args.objective, n, p) == yes], "decay": yes}
        for yes in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), fused=cuda)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")

    # Run directory and resume.
    commit, dirty = git_state()
    config = {
        "args": json.loads(json.dumps(vars(args), default=str)),
        "encoder": encoder.config,
        "steps": total,
        "chips": chips_hash,
        "ranks": world,
        "accumulation": accumulation,
        "precision": precision,
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit,
        "dirty": dirty,
    }
    # several stores: the encoder is said to read what the first one holds
    facts = {
        "objective": args.objective,
        "variant": args.variant,
        "bands": bands,
        **{key: stores[0].meta[key][sensor] for key in ("mean", "std", "gsd")},
        "mr_size": args.mr_size,
        "sources": [source for store in stores for source in store.meta["sources"]],
        "commit": commit,
    }
    saved = open_run(args.out, args.resume, config)
    start = 0
    if saved is not None:
        try:
            objective.load_state_dict(saved["objective"])
            optimizer.load_state_dict(saved["optimizer"])
            scaler.load_state_dict(saved["scaler"])
            start = int(saved["step"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{args.out / 'ckpt.pt'}: a checkpoint of another architecture or program "
                f"({str(error).splitlines()[0]}); choose another --out, or --init from it"
            ) from None
    if world > 1:
        # only now, when every rank has made the same checks and none can be left waiting
        dist.init_process_group("nccl" if cuda else "gloo")
        dist.barrier()
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config, indent=1) + "\n"
        write_atomic(args.out / "config.json", lambda to: to.write_text(text))
        # log lines after the checkpoint belong to steps that will be taken again
        log_path = args.out / "log.jsonl"
        kept = log_until(log_path, start)
        write_atomic(log_path, lambda to: to.write_text(kept))
        print(
            f"{args.out}: {args.objective} {args.variant}, encoder of "
            f"{sum(p.numel() for p in encoder.parameters()) / 1e6:.1f} M parameters, grid "
            f"{objective.grid[0]} x {objective.grid[1]} of {encoder.patch_size} px, "
            f"{len(train)} chips, {has_hr.sum()} with HR{flagged}, steps {start} to {total}, batch "
            f"{args.global_batch} = {accumulation} x {world} ranks x {device_batch}, {precision}",
            flush=True,
        )

    model = objective
    if world > 1:
        ids = [device] if cuda else None
        model = DistributedDataParallel(model, ids, broadcast_buffers=False)
    if args.compile:
        model = torch.compile(model)

    # the pixels that this variant looks at, and no others, are read and travel to the device
    sensors = {sensor} | ({"mr" if args.variant == "sa-interp" else "hr"} if affinity else set())

    def prepare(step):
        """What a rank needs of a step: [(parts, masks)] of its micro-batches, and how many pairs
        there are in the global batch. Pinned, so that the copy to a GPU overlaps."""
        order = sample_order(args.seed, step, args.global_batch, len(train))
        masks = draw_step(args, objective, step)
        mine = share(torch.from_numpy(order)).numpy()
        masks = {key: share(value) for key, value in masks.items()}
        ready = []
        for micro in range(accumulation):
            part = slice(micro * device_batch, (micro + 1) * device_batch)
            crops, parts = masks["crop"][part], read_chips(stores, train[mine[part]], sensors)
            parts = [
                (meta, place, pin(batch | {"crop": crops[place]})) for meta, place, batch in parts
            ]
            ready.append((parts, pin({k: v[part] for k, v in masks.items() if k != "crop"})))
        return ready, int(has_hr[order].sum())

    # has_hr stays on the CPU: it decides shapes, and a GPU's answer would have to be waited for
    def pin(tensors):
        return {k: v.pin_memory() if cuda and k != "has_hr" else v for k, v in tensors.items()}

    def to_device(tensors):
        return {
            k: v if k == "has_hr" else v.to(device, non_blocking=True) for k, v in tensors.items()
        }

    # The loop. The next step's chips and masks are read while this one computes.
    stop = min(total, args.stop_at or total)
    ahead = ThreadPoolExecutor(1)
    coming = ahead.submit(prepare, start) if start < stop else None
    clock, logged = time.perf_counter(), start
    for step in range(start, stop):
        ijepa = args.objective == "ijepa"  # whose lr and weight decay count steps from 1
        lr = warmup_cosine(step + ijepa, total, warmup, args.start_lr, args.lr, args.final_lr)
        weight_decay = cosine(step + ijepa, total, args.weight_decay, args.final_weight_decay)
        momentum = (linear if ijepa else cosine)(step, total, args.momentum, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decay"] else 0.0
        saving = (step + 1) % args.save_every == 0 or step + 1 == stop
        probing = args.probe_task and (step + 1 == stop or (step + 1) % args.probe_every == 0)
        logging = saving or probing or step == 0 or (step + 1) % args.log_every == 0

        ready, pairs = coming.result()
        if step + 1 < stop:
            coming = ahead.submit(prepare, step + 1)
        losses, sums = torch.zeros(2, device=device), None
        for micro, (parts, masks) in enumerate(ready):
            parts = [(meta, place, to_device(batch)) for meta, place, batch in parts]
            masks = to_device(masks)
            # gradients travel once an update
            last = world == 1 or micro == accumulation - 1
            with contextlib.nullcontext() if last else model.no_sync():
                with autocast:
                    loss_ssl, loss_affinity, here, tokens, mr = step_losses(
                        args, model, objective, affinity, parts, masks
                    )
                    # the mean over the pairs of the global batch, whatever share is here: 1 where
                    # all chips are pairs
                    loss_affinity = loss_affinity * (here * accumulation * world / max(pairs, 1))
                    loss = loss_ssl + args.affinity_weight * loss_affinity
                scaler.scale(loss / accumulation).backward()
            losses += torch.stack([loss_ssl, loss_affinity]).detach() / accumulation
            if logging:
                with autocast:
                    more = token_sums(tokens.detach(), objective.target_tokens(mr, masks))
                sums = [a + b for a, b in zip(sums, more, strict=True)] if sums else more
        if logging:
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for _, p in named if p.grad is not None])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        # EMA after the step, so the teacher never saw a gradient of the batch it judges
        ema_update(objective.teacher, encoder, momentum)

        if logging:  # the only device syncs of the loop
            if world > 1:
                losses /= world
                for value in (losses, *sums):
                    dist.all_reduce(value)
            ssl, aff = losses.tolist()
            value = ssl + args.affinity_weight * aff
            if not math.isfinite(value):
                raise ValueError(
                    f"step {step + 1}: the loss is {value}; {args.out} keeps what was saved before;"
                    f" start again with a lower --lr, or with --precision bfloat16 or float32"
                )
            now = time.perf_counter()
            seconds = (now - clock) / (step + 1 - logged)
            clock, logged = now, step + 1
            entry = {
                "step": step + 1,
                "loss": value,
                "ssl": ssl,
                "affinity": aff,
                **health(*sums),
                "grad_norm": float(norm),
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "ms": 1000 * seconds,
                "images_per_s": args.global_batch / seconds,
                "gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
            }
            if probing and rank == 0:  # the others wait in the next step's reduction
                entry["probe_miou"] = probe(encoder, task, "knn", probe_size)["val_miou"]
                clock = time.perf_counter()
            if rank == 0:
                report(entry, total, seconds * (stop - step - 1))
                with open(log_path, "a") as log:
                    log.write(json.dumps(entry) + "\n")
        if saving and not all(p.isfinite().all() for _, p in named):
            raise ValueError(
                f"step {step + 1}: the update left weights that are not finite; {args.out} keeps "
                f"what was saved before; start again with a lower --lr"
            )
        if saving and rank == 0:
            state = {
                "objective": objective.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "step": step + 1,
                "facts": json.dumps({"config": encoder.config, "meta": facts | {"step": step + 1}}),
            }
            save_checkpoint(args.out / "ckpt.pt", state)
            save_encoder(encoder, args.out / "encoder.safetensors", **facts, step=step + 1)
    ahead.shutdown()
    if rank == 0 and stop < total:
        print(f"{args.out}: stopped after step {stop} of {total}; --resume continues")

    if rank == 0 and start < stop == total:
        # what the tokens tell apart, on ground held out of training where there is any
        store, meta = stores[0], stores[0].meta
        if args.variant == "hr":
            meta = meta | {"bands": {"mr": bands, "hr": bands}}
        chips = store.split("val") if len(store.split("val")) else store.split("train")
        paired = chips[store.has_hr[chips]]
        batch = to_device(store.batch((paired if len(paired) else chips)[:4]))
        whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64, device=device)
        size = objective.grid[0] * encoder.patch_size
        mr, hr = crop_pairs(
            batch, whole.expand(len(batch["mr"]), -1), meta, size, args.ratio * size,
            mr_from=sensor, hr_from="mr" if args.variant == "sa-interp" else "hr",
        )  # fmt: skip
        spacing = 1 / args.ratio if args.pos == "ground" else 1.0
        with torch.no_grad():
            tokens = encoder(mr)
            hr_tokens = objective.teacher(hr, spacing=spacing) if len(hr) else None
        draw_tokens(args.out / "tokens.png", mr, hr, tokens, hr_tokens, encoder.patch_size, bands)
        print(f"{args.out}: encoder.safetensors to share, tokens.png to look at")
    if world > 1:
        # DDP first: it lets go of the process group under Python's lock, for which gloo's threads
        # may be waiting, and as the last owner it would wait for them in turn
        del model
        dist.destroy_process_group()


if __name__ == "__main__":
    arguments = parse_args()
    try:
        main(arguments)
    except (ValueError, OSError) as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "train.py: interrupted; the same command with --resume continues from the last "
            f"checkpoint, made every {arguments.save_every} steps",
            file=sys.stderr,
        )
        sys.exit(130)
