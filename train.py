"""Pretrain a ViT on mid-resolution images, with high-resolution pairs as a teacher's evidence.

    torchrun --nproc_per_node=8 train.py                 on pairs/, or on scenes drawn for a trial
    python train.py --store pairs --variant sa           one process, CPU or GPU: the same run
    python train.py --store pairs more/ --hr-share 0.25  two stores, HR for a quarter of the pairs

I-JEPA, Latent MIM or MAE on the MR images, plus spatial affinity (arXiv 2601.12964). Top to bottom:
what the variants see, the model and its HR teacher, one step's randomness and affinity, and `main`,
which sets up and ends in the loop; flags are in flags.py. Sample order, crops and masks are
functions of (seed, step, position in the global batch), so any number of ranks and any accumulation
train the same run, and a checkpoint holds all that resuming needs beside the flags.
"""

import contextlib
import copy
import json
import math
import platform
import re
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import flags
from affinity import SpatialAffinity, gram_loss, token_mse
from data import (
    choose_bands,
    draw_crops,
    moved,
    next_pairs,
    open_chips,
    read_crops,
    read_csv,
    render,
    sample_order,
    source_text,
    stream,
    verify_beside,
)
from figures import draw_curves, draw_tokens, optional
from files import write_atomic
from flags import FREE_ON_RESUME, draw_trial
from health import health, read_log, token_sums
from imagery.bands import meanings
from model import OBJECTIVES, Plan, draw_rectangle, ema_update, regularise, vit
from run import (
    Run,
    Stop,
    check_space,
    fresh,
    git_state,
    open_run,
    precision_of,
    read_checkpoint,
    script,
    start_ranks,
)
from weights import bands_of, fit_bands, load_encoder, read_tensors, weights_hash, write_tensors


class Variant(NamedTuple):
    """What the student sees, what its HR teacher sees, and the loss between the two."""

    student: str
    teacher: str | None = None
    loss: object = None
    shuffled: bool = False  # the teacher sees the ground of the next pair
    frozen: bool = False  # the teacher stays as it was drawn, untrained


VARIANTS = {
    "mr": Variant("mr"),
    "hr": Variant("hr"),  # the HR crop, resampled to the MR input's size
    "sa": Variant("mr", "hr", gram_loss),
    "sa-interp": Variant("mr", "mr", gram_loss),  # the MR crop resampled up: no real detail
    "sa-mse": Variant("mr", "hr", token_mse),  # tokens, not their relations
    # controls: real detail of other ground; a teacher that knows nothing; the student's own teacher
    # on the student's own image, ratio 1
    "sa-shuffled": Variant("mr", "hr", gram_loss, shuffled=True),
    "sa-frozen": Variant("mr", "hr", gram_loss, frozen=True),
    "regulariser": Variant("mr", "mr", gram_loss),
    "mse-interp": Variant("mr", "mr", token_mse),  # and the controls of sa-mse
    "mse-shuffled": Variant("mr", "hr", token_mse, shuffled=True),
}

parse_args = partial(flags.parse_args, VARIANTS)

# Steps in a row that are not finite before a run gives up; it is no worse for them
PATIENCE = 10

# ---- the model and its HR teacher


def build_objective(args, bands):
    """The objective with its student, from the flags; ValueError if size and patch do not fit."""
    kind = OBJECTIVES[args.objective]
    if args.init:
        given = load_encoder(args.init, args.heads)
        encoder = fit_bands(given, bands, f"--init {args.init}").train()
    else:
        sizes = {k: v for k in ("dim", "depth", "heads") if (v := getattr(args, k)) is not None}
        shape = dict(in_channels=len(bands), patch_size=args.patch, **kind.encoder)
        encoder = vit(args.model, **sizes, **shape)
        encoder.patch_embed.proj.weight.data *= args.patch_gain
    own = {name: getattr(args, name) for name in kind.flags}
    gap = own.get("gap", 0)
    cell = encoder.patch_size + gap
    if args.mr_size % cell:
        raise ValueError(
            f"--mr-size {args.mr_size} is no multiple of the {encoder.patch_size} px patch"
            + (f" + {gap} px gap" if gap else "")
            + f"; try {max(1, round(args.mr_size / cell)) * cell}"
        )
    grid = (args.mr_size // cell, args.mr_size // cell)
    return kind(encoder, grid, ratio=args.ratio, **own)


class Teacher(NamedTuple):
    """Who sees the HR image: a callable (hr, index, spacing) -> tokens, the bands and the patch
    that it takes, and (mean, std) of the sensor's bands where it does not take the store's."""

    tokens: object
    bands: list
    patch: int
    statistics: tuple | None = None


def build_teacher(args, objective, bands, device):
    """The HR teacher of a variant, of any variant for the last picture."""
    seen = bands["hr"] if VARIANTS[args.variant].teacher != "mr" else bands["mr"]
    if args.hr_teacher == "ema":
        # it shares the student's weights, so it takes its bands: those that HR lacks hold their
        # mean, and those that it has beyond them would be lost without a word
        own = bands[VARIANTS[args.variant].student]
        more = [band for band in seen or [] if band not in own]
        if more and VARIANTS[args.variant].teacher:
            raise ValueError(
                f"--store {args.store[0]}: HR has the bands {','.join(more)} that MR "
                f"({','.join(own)}) has not, and the EMA teacher reads MR's; give --hr-teacher "
                "WEIGHTS that read them, or pack MR's bands alone (--hr-bands)"
            )
        tokens = objective.hr_tokens
        if VARIANTS[args.variant].frozen:  # before any checkpoint is read
            tokens = copy.deepcopy(objective).requires_grad_(False).hr_tokens
        return Teacher(tokens, own, objective.student.patch_size)
    encoder = load_encoder(args.hr_teacher, args.hr_teacher_heads)
    names = dict(zip(meanings(seen), seen, strict=True))
    own = [names.get(band) for band in meanings(bands_of(encoder))]  # as the store spells them
    if not own or None in own:
        encoder, own = fit_bands(encoder, seen, f"--hr-teacher {args.hr_teacher}"), seen
    meta, statistics = encoder.meta, None
    if VARIANTS[args.variant].teacher != "mr" and {"mean", "std"} <= meta.keys():
        of = {band: (m, s) for band, m, s in zip(own, meta["mean"], meta["std"], strict=True)}
        statistics = tuple(zip(*(of.get(band, (0.0, 1.0)) for band in seen), strict=True))
    print(f"--hr-teacher: reads {','.join(own)}, normalised by "
          + ("its own statistics" if statistics else "the store's"))  # fmt: skip
    if VARIANTS[args.variant].loss is token_mse and encoder.dim != objective.student.dim:
        raise ValueError(
            f"--variant {args.variant}: compares tokens themselves, {objective.student.dim} wide, "
            f"and those of --hr-teacher {args.hr_teacher} are {encoder.dim} wide; take --variant sa"
        )
    encoder.requires_grad_(False).to(device)
    return Teacher(encoder, own, encoder.patch_size, statistics)


def build_affinity(args, teacher):
    """Spatial affinity with a teacher; None for the variants without."""
    variant = VARIANTS[args.variant]
    if variant.loss is None:
        return None
    spacing = 1 / args.ratio if args.pos == "ground" else 1.0
    encode = partial(teacher.tokens, spacing=spacing)
    return SpatialAffinity(
        torch.compile(encode) if args.compile else encode,
        args.ratio,
        variant.loss,
        centre=args.affinity_centre == "image",
        # in 16 bits a teacher in a basis of its own, far from the student token by token, loses
        # the small loss
        exact=args.hr_teacher != "ema" or variant.frozen,
        patch=teacher.patch,
    )


# ---- one step


def draw_step(args, objective, step):
    """All random choices of a step for the whole global batch, on the CPU: the masks, a dict of
    tensors whose first axis is the position in the global batch, and the crops, (batch, 4)."""
    # a torch CPU generator keeps 32 bits of its seed: mix both numbers into them
    mixed = np.random.SeedSequence((args.seed, step, 2)).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(mixed))
    masks = objective.draw(args.global_batch, generator)
    if args.affinity_index == "block":
        masks["block"] = draw_rectangle(args.global_batch, objective.grid, generator)
    return masks, draw_crops(args.seed, step, args.global_batch, tuple(args.crop_scale))


def prepare(args, chips, objective, teacher, ranks, device_batch, step):
    """What a rank needs of a step, on the CPU: a list with a dict for each of its micro-batches.

    "student" and "teacher": what each sees, of `read_crops`; the teacher sees the pairs alone.
    "masks": this micro-batch's. "pairs": which of its chips are pairs, None where all are. "share":
    its number of pairs over the mean number of a micro-batch, so that the affinity is a mean over
    the pairs of the global batch.
    """
    variant = VARIANTS[args.variant]
    order = sample_order(args.seed, step, args.global_batch, len(chips.ids))
    masks, crops = draw_step(args, objective, step)
    paired, taught = chips.has_hr[order], order
    if variant.shuffled:
        taught = next_pairs(args.seed, step, args.global_batch, chips.has_hr)
    stride, parts = ranks.world * device_batch, []
    for first in range(ranks.rank * device_batch, args.global_batch, stride):
        here = slice(first, first + device_batch)
        pairs = first + np.flatnonzero(paired[here])
        ids = chips.ids[order[here]]
        part = {
            "student": read_crops(chips.stores, ids, variant.student, crops[here], args.mr_size),
            "teacher": [],
            "masks": {name: mask[here] for name, mask in masks.items()},
            "pairs": None if len(pairs) == device_batch else torch.from_numpy(pairs - first),
            "share": len(pairs) / max(paired.sum(), 1) * (args.global_batch / device_batch),
        }
        if variant.teacher:
            ids, side = chips.ids[taught[pairs]], objective.hr_side(teacher.patch)
            part["teacher"] = read_crops(
                chips.stores, ids, variant.teacher, crops[pairs], side, teacher.statistics
            )
        parts.append(part)
    return parts


def affinity_of(objective, affinity, part, mr, hr, tokens, index):
    """The affinity of a micro-batch's pairs, a mean: scalar. tokens, index: the student's."""
    masks, pairs = part["masks"], part["pairs"]
    if "block" in masks:
        index = masks["block"]
        tokens = objective.encode(mr, masks, index)
    if pairs is not None:  # the chips without HR learn from the SSL loss alone
        tokens, index = tokens[pairs], index[pairs]
        masks = {name: mask[pairs] for name, mask in masks.items()}
    hr = objective.views(hr, masks, affinity.patch)
    return affinity(tokens, index, hr, objective.grid)


# ---- the run


def micro_batches(args, ranks):
    """Pairs at once on a rank, and how many times that: one update is accumulation x ranks x
    device batch, position by position. ValueError if --global-batch does not divide so."""
    # unless set, as many at once as fit: the paper's 128 on a GPU, 16 on a CPU, or fewer
    most = 128 if ranks.device.type == "cuda" else 16
    share = args.global_batch // ranks.world
    device_batch = args.device_batch or max(n for n in range(1, most + 1) if share % n == 0)
    unit = device_batch * ranks.world
    if args.global_batch % unit:
        near = args.global_batch // unit * unit
        raise ValueError(
            f"--global-batch {args.global_batch} is not a multiple of --device-batch "
            f"{device_batch} x {ranks.world} ranks = {unit}; try "
            + " or ".join(str(n) for n in (near, near + unit) if n)
        )
    return device_batch, args.global_batch // unit


def build_optimizer(objective, lr, beta2):
    """AdamW with two groups of weights, with and without weight decay."""
    named = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if objective.decays(n, p) == decays], "decays": decays}
        for decays in (True, False)
    ]
    # fused, it leaves weights, moments and its count of steps alone where it is told of a bad step
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True)


def describe(args, chips, objective, ranks, total, precision):
    """What config.json says of a run, what its weights say, and the diff of an edited tree."""
    commit, edits = git_state()
    variant, cuda = VARIANTS[args.variant], ranks.device.type == "cuda"
    config = {
        "args": json.loads(json.dumps(vars(args), default=str)),
        "encoder": objective.student.config,
        "steps": total,
        "chips": chips.digest,
        "ranks": ranks.world,
        "precision": precision,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit,
        "dirty": bool(edits),
    }
    # several stores: the encoder is said to read what the first one holds
    first = chips.stores[0].meta
    facts = {
        "objective": args.objective,
        "variant": args.variant,
        "seed": args.seed,
        "store": [path.resolve().name for path in args.store],
        "bands": chips.bands[variant.student],
        **{key: first[key][variant.student] for key in ("mean", "std", "gsd")},
        "mr_size": args.mr_size,
        "sources": [source for store in chips.stores for source in store.meta["sources"]],
        "commit": commit,
    }
    return config, facts, edits


def restore(path, saved, objective, optimizer, scaler):
    """Load a checkpoint, a dict; returns the steps that are done."""
    try:
        saved = dict(saved)
        objective.load_state_dict(saved["objective"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        for group in optimizer.param_groups:
            group["fused"] = True  # not so in a checkpoint of an older program's CPU run
        return int(saved["step"])
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: a checkpoint of another architecture or program "
            f"({str(error).splitlines()[0]}); choose another --out, or --init from it"
        ) from None


def draw_picture(args, chips, objective, teacher, device):
    """tokens.png: what the tokens tell apart, on ground held out of training where there is any."""
    variant, store = VARIANTS[args.variant], chips.stores[0]
    ids = store.split("val") if len(store.split("val")) else store.split("train")
    ids = ids[store.has_hr[ids]][:16] if store.has_hr[ids].any() else ids[:16]
    ids, whole = np.column_stack([0 * ids, ids]), np.tile([0.0, 0.0, 1.0, 1.0], (len(ids), 1))
    encoder, grid, r = objective.student, objective.grid, args.ratio
    sensor = "mr" if variant.teacher == "mr" else "hr"

    def images(sensor, side, statistics=None):
        parts = read_crops([store], ids, sensor, whole, side, statistics)
        return render(moved(parts, lambda x: x.to(device)))

    mr = images(variant.student, grid[0] * encoder.patch_size)
    hr = hr_tokens = None
    if store.has_hr[ids[:, 1]].all() and chips.bands[sensor]:
        hr = images(sensor, r * grid[0] * teacher.patch, teacher.statistics)
        spacing = 1 / r if args.pos == "ground" else 1.0
    with torch.no_grad():
        tokens = encoder(mr)
        if hr is not None and set(chips.bands[sensor]) & set(teacher.bands):
            seen = choose_bands(hr, chips.bands[sensor], teacher.bands)
            own = args.hr_teacher == "ema" and not variant.frozen
            encode = objective.teacher if own else teacher.tokens
            hr_tokens = encode(seen, spacing=spacing)
    fine = (r * grid[0], r * grid[1])
    fine_title = "HR" if sensor == "hr" else "MR resampled up"
    title = "MR" if variant.student == "mr" else "HR as MR"
    pictures = {} if hr is None else {fine_title: (hr, chips.bands[sensor])}
    pictures[title] = (mr, chips.bands[variant.student])
    drawn = {f"student tokens ({title})": (tokens, grid)}
    drawn[f"teacher tokens ({fine_title})"] = (hr_tokens, fine)
    draw_tokens(args.out / "tokens.png", pictures, drawn)


def plot(runs):
    """Draw the curves of finished or running runs, folders, into the first of them."""
    logs = {}
    for run in runs:
        if not (run / "log.jsonl").is_file():
            raise ValueError(f"--plot {run}: no run of train.py; it holds no log.jsonl")
        name = re.sub(r"-s\d+$", "", run.resolve().name)
        logs.setdefault(name, []).append([line for line in read_log(run) if "ssl" in line])
    draw_curves(runs[0] / "curves.png", logs)
    print(f"{runs[0] / 'curves.png'}: {', '.join(logs)}")


def main(args):
    if args.plot:
        return plot(args.plot)
    ranks = start_ranks(args.device)
    device, cuda = ranks.device, ranks.device.type == "cuda"
    precision = precision_of(args.precision, device)
    enabled = precision != "float32"
    autocast = torch.autocast(device.type, getattr(torch, precision), enabled=enabled)
    device_batch, accumulation = micro_batches(args, ranks)
    draw_trial(args, ranks)
    if args.fresh:
        args.out = ranks.first(partial(fresh, args.out))

    # Chips, model, teacher. The same seed gives the same weights on every rank.
    variant = VARIANTS[args.variant]
    pairs = 0 if variant.teacher is None else 2 if variant.shuffled else 1
    chips = open_chips(
        args.store, variant.student, pairs, args.hr_share, args.seed, args.skip_flagged
    )
    bands = chips.bands[variant.student]
    total = args.steps or max(1, round(args.epochs * len(chips.ids) / args.global_batch))
    torch.manual_seed(args.seed)
    objective = build_objective(args, bands).to(device)
    teacher = build_teacher(args, objective, chips.bands, device)
    affinity = build_affinity(args, teacher)
    encoder, probe = objective.student, None
    if args.probe_task and ranks.rank == 0:
        probe = load_probe(args.probe_task, bands, encoder, objective.grid)

    optimizer = build_optimizer(objective, args.lr, args.beta2)
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
    plan = Plan(
        args.lr, args.start_lr, args.final_lr, round(total * args.warmup_epochs / 300),
        args.weight_decay, args.final_weight_decay, args.momentum,
    )  # fmt: skip

    # The run directory: a new run, or one that goes on.
    config, facts, edits = describe(args, chips, objective, ranks, total, precision)
    config["accumulation"] = accumulation
    if args.hr_teacher != "ema":
        config["hr_teacher_weights"] = weights_hash(teacher.tokens)
    start = enter(args, ranks, config, objective, optimizer, scaler)
    stop = max(start, min(total, args.stop_at or total))
    run = Run(args.out, ranks, start, stop, total, args.log_every, args.save_every)
    run.begin(config, start, edits)
    encoder.checkpointed = args.checkpoint_activations
    if ranks.rank == 0:
        steps = f"{start} to {total}"
        greet(args, chips, objective, steps, accumulation, ranks.world, precision, not cuda)

    model = objective
    if ranks.world > 1:
        # averages the gradients over the ranks, each a mean over its share of the global batch
        model = DistributedDataParallel(
            model, [device] if cuda else None, forward_sync_buffers=False
        )
    if args.compile:
        model = torch.compile(model)
    seen = chips.bands[variant.teacher or "hr"]
    ready = partial(prepare, args, chips, objective, teacher, ranks, device_batch)
    stops, stopping = Stop(ranks), False
    look = verify_beside(args.store)
    watch = profiler(args, start) if args.profile and ranks.rank == 0 else None

    # The loop. `stream` reads the next step's chips and draws its masks while this one computes.
    for step, parts in zip(range(start, stop), stream(ready, start, stop, device), strict=True):
        rates = objective.rates(step, total, plan)
        for group in optimizer.param_groups:
            group["lr"] = rates.lr
            group["weight_decay"] = rates.weight_decay if group["decays"] else 0.0
        probes = args.probe_task and (step + 1 == stop or (step + 1) % args.probe_every == 0)
        logs = run.logs(step) or probes

        losses, sums = torch.zeros(3, device=device), None
        for part in parts:
            # gradients travel between ranks once an update, with the last micro-batch
            travel = ranks.world == 1 or part is parts[-1]
            with autocast, contextlib.nullcontext() if travel else model.no_sync():
                mr = render(part["student"])
                loss_ssl, tokens, index = model(mr, part["masks"])
                loss_affinity = loss_vicreg = torch.zeros_like(loss_ssl)
                if part["teacher"]:  # the same ground, as a teacher of other bands may see it
                    hr = choose_bands(render(part["teacher"]), seen, teacher.bands)
                    loss_affinity = affinity_of(objective, affinity, part, mr, hr, tokens, index)
                    loss_affinity = loss_affinity * part["share"]
                if args.vicreg:
                    loss_vicreg = regularise(tokens)
                loss = loss_ssl + args.affinity_weight * loss_affinity + args.vicreg * loss_vicreg
            # times 1, or NaN: an infinite loss may have finite gradients, and they travel
            scaler.scale(loss * (1 + 0 * loss.detach()) / accumulation).backward()
            losses += torch.stack([loss_ssl, loss_affinity, loss_vicreg]).detach() / accumulation
            if logs:
                with autocast:
                    target = objective.target_tokens(mr, part["masks"])
                places = objective.grid[0] * objective.grid[1]
                more = token_sums(tokens.detach(), index, places, target)
                sums = [a + b for a, b in zip(sums, more, strict=True)] if sums else more
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
        if args.clip:
            torch.nn.utils.clip_grads_with_norm_(weights, args.clip, norm)
        # A step that is not finite on some rank changes nothing on any. float16's gradients
        # overflow now and then, which is for its scaler to see.
        bad = stops.share(~(losses.sum() if scaler.is_enabled() else norm).isfinite())
        optimizer.found_inf = (bad > 0).float()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        # EMA after the step, so the teacher never saw a gradient of the batch it judges
        ema_update(objective.teacher, encoder, rates.momentum, bad)

        if logs and not bad.item():  # the only device syncs of the loop
            losses /= ranks.world
            ssl, aff, vicreg = ranks.sum([losses, *sums])[0].tolist()
            value = ssl + args.affinity_weight * aff + args.vicreg * vicreg
            entry = {"loss": value, "ssl": ssl, "affinity": aff}
            entry |= {"vicreg": vicreg} if args.vicreg else {}
            entry |= health(*sums) | {"grad_norm": float(norm)} | rates._asdict()
            # rank 0 probes while the others wait in the next step's reduction
            run.log(step, entry, args.global_batch, probe if probes else None)
        if watch:
            watch.step()
        if logs:
            look()
        stopping = run.hear(stops, now=run.saves(step))
        if run.in_a_row >= min(PATIENCE, stop - start):
            raise ValueError(fault(args, chips, run.heard - 1, run.in_a_row, losses, rates.lr))
        if run.saves(step) or stopping:
            size = torch.nn.utils.get_total_norm([p.detach() for p in weights]).item()
            if not math.isfinite(size):
                raise ValueError(
                    f"step {step + 1}: the update left weights of norm {size}; {args.out} keeps "
                    "what was saved before; start again with a lower --lr"
                )
            if ranks.rank == 0:
                meta = facts | {"step": step + 1}
                modules = {"objective": objective, "optimizer": optimizer, "scaler": scaler}
                about = json.dumps({"config": encoder.config, "meta": meta})
                run.save(step, modules, partial(export, args.out), facts=about)
        if stopping:
            stop = step + 1
            break

    if watch:
        watch.stop()
    if ranks.rank == 0:
        run.close(stopping and stop < total)
        leave(args, chips, objective, teacher, device, stop, start, total)


def profiler(args, start):
    """Record --profile steps, after two, for https://ui.perfetto.dev; to be told of each step."""
    path = args.out / f"trace-{start}.json"

    def write(profile):
        write_atomic(path, lambda part: profile.export_chrome_trace(str(part)))
        print(f"{path}: open it in https://ui.perfetto.dev", flush=True)

    steps = torch.profiler.schedule(wait=1, warmup=1, active=args.profile, repeat=1)
    watch = torch.profiler.profile(schedule=steps, on_trace_ready=write)
    watch.start()
    return watch


def enter(args, ranks, config, objective, optimizer, scaler):
    """Take the run directory, and load its checkpoint if it has one, on whatever machine a rank is;
    returns the steps that are done."""
    path = ranks.first(
        lambda: open_run(args.out, config, FREE_ON_RESUME, args.override, args.resume == "must")
    )
    start = 0
    if path is not None:
        saved = read_checkpoint(path, ranks)
        start = restore(path, saved, objective, optimizer, scaler)
    weights = [w.nbytes for w in objective.state_dict().values()]
    moments = [2 * p.nbytes for p in objective.parameters() if p.requires_grad]
    ranks.first(lambda: check_space(args.out, sum(weights) + sum(moments)))
    if path is not None and ranks.rank == 0 and not exported(args.out, saved):
        export(args.out, saved)  # a kill came between the two
    return start


def export(out, saved):
    """Write the student of a checkpoint, a dict, as encoder.safetensors."""
    state = {
        name.removeprefix("student."): value
        for name, value in saved["objective"].items()
        if name.startswith("student.") and not name.startswith("student.head.")
    }
    write_tensors(out / "encoder.safetensors", state, json.loads(saved["facts"]))


def exported(out, saved):
    """Whether encoder.safetensors is of a checkpoint, a dict, and whole."""
    try:
        return read_tensors(out / "encoder.safetensors")[1] == json.loads(saved["facts"])
    except (ValueError, OSError):
        return False


def greet(args, chips, objective, steps, accumulation, world, precision, cpu):
    """Say what is about to be trained."""
    encoder, grid = objective.student, objective.grid
    trunk = sum(p.numel() for n, p in encoder.named_parameters() if not n.startswith("head."))
    flagged = sum(int(s.flagged[s.split("train")].sum()) for s in chips.stores)
    flagged = f", {flagged} flagged left out" if args.skip_flagged else ""
    device_batch = args.global_batch // accumulation // world
    print(
        f"{args.out}: {args.objective} {args.variant}, encoder of {trunk / 1e6:.1f} M parameters, "
        f"grid {grid[0]} x {grid[1]} of {encoder.patch_size} px, {len(chips.ids)} chips, "
        f"{chips.has_hr.sum()} with HR{flagged}, steps {steps}, batch {args.global_batch} = "
        f"{accumulation} x {world} ranks x {device_batch}, {precision}",
        flush=True,
    )
    if cpu and trunk * args.global_batch > 1e9:
        print(
            f"on a CPU each step of {trunk / 1e6:.1f} M parameters and {args.global_batch} chips "
            "takes minutes; --model tiny and a smaller --global-batch are quicker",
            flush=True,
        )


def leave(args, chips, objective, teacher, device, done, start, total):
    """Say what the run has come to after `done` steps, with a picture where it is complete."""
    if done < total:
        print(f"{args.out}: stopped after step {done} of {total}; the same command goes on")
        return
    if start == total:
        print(f"{args.out}: all steps are done already; encoder.safetensors is there")
    picture, checkpoint = args.out / "tokens.png", args.out / "ckpt.pt"
    if picture.is_file() and picture.stat().st_mtime >= checkpoint.stat().st_mtime:
        return
    with optional(picture):
        draw_picture(args, chips, objective, teacher, device)
    look = ", tokens.png to look at" if picture.is_file() else ""
    print(f"{args.out}: encoder.safetensors to share{look}")


def fault(args, chips, step, count, losses, lr):
    """What to say of a run whose last `count` steps were not finite, up to `step`."""
    terms = zip(("ssl", "affinity", "vicreg"), losses.tolist(), strict=True)
    said = (
        f"step {step + 1}: the loss or its gradients are not finite ("
        + ", ".join(f"{name} {value:.4g}" for name, value in terms)
        + f", lr {lr:.1e}), for {count} steps in a row, which changed nothing; "
    )
    bad = []
    order = sample_order(args.seed, step, args.global_batch, len(chips.ids))
    for number, chip in chips.ids[order].tolist():
        store, path = chips.stores[number], args.store[number]
        for sensor in ("mr", "hr") if store.has_hr[chip] else ("mr",):
            mean, std = (np.array(store.meta[k][sensor])[:, None, None] for k in ("mean", "std"))
            pixels = store.batch(np.array([chip]), {sensor})[sensor][0].double().numpy()
            with np.errstate(all="ignore"):
                if not (abs(pixels - mean) / std < 1e6).all():
                    bad.append(f"{sensor.upper()} of chip {chip} of {path}{source(path, chip)}")
    if bad:
        what = "pixels that are not finite, or a million deviations off"
        return f"{said}{what}: {', '.join(bad[:3])}; pack without them"
    return f"{said}the pixels are as they should be: a lower --lr, or --precision float32, may help"


def source(path, chip):
    """Where a chip of a store was cut, for a reader; "" where its index does not say."""
    for row in read_csv(path / "index.csv") if (path / "index.csv").is_file() else ():
        if row["chip"] == str(chip) and row["mr_source"]:
            return f" ({source_text(row)})"
    return ""


def load_probe(task, bands, encoder, grid):
    """A function that adds to a log entry the validation mIoU of nearest neighbours on a task, a
    name and a folder."""
    from datasets.tasks import load_task  # reads imagery: not for those who do not ask
    from segment import probe

    task = load_task(*task, bands=bands)
    side = grid[0] * encoder.patch_size
    return lambda: {"probe_miou": probe(encoder, task, "knn", side)["val_miou"]}


if __name__ == "__main__":
    left = "the same command continues from the last checkpoint"
    script(main, parse_args, left, stops=True)
