"""Benchmarks: training steps, the Gram loss, the way from a store to crops, the tools.

    python bench.py step --out step.json                    steps against the textbook's
    torchrun --nproc_per_node 2 bench.py step               the same on two ranks, against one
    python bench.py gram --out gram.json                    the Gram loss against eager PyTorch
    python bench.py gram --count                            what counting says of its kernel
    python bench.py input --store pairs                     pairs a second, against a DataLoader
    python bench.py tools                                   check, linear probe, predict

What is compared takes turns, so that what disturbs the machine disturbs all of it; a GPU replays
captured graphs, so that what Python takes is not in the times. Beside them stands what the device
could do at best, measured first: bytes over its copy bandwidth, operations over its rate in matrix
products.
"""

import argparse
import collections
import contextlib
import ctypes
import datetime
import inspect
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils import flop_counter

import counted
import run
from affinity import SpatialAffinity, gram_loss
from data import Store, draw_crops, open_chips, read_crops, render, sample_order, stream
from files import write_atomic
from model import OBJECTIVES, ema_update
from textbook import Textbook, plain_pairs
from vit import SIZES, vit

# B, N, D, ratio
CPU_SHAPES = [(128, 20, 384, 2), (32, 110, 384, 2), (32, 256, 384, 1), (1, 4096, 384, 1)]
PARTS = ("forward", "backward", "both")


# fmt: off
def parse_args(argv=None):
    shared = argparse.ArgumentParser(add_help=False)
    flag = shared.add_argument
    flag("--device", choices=["auto", "cpu", "cuda"], default="auto",
         help="cuda where there is one")
    flag("--rounds", type=run.positive, default=5, help="timed turns of each")
    flag("--seed", type=run.whole, default=0, help="of all that is drawn")
    flag("--out", type=Path, help="JSON file to write")
    parser = run.Parser(prog="bench.py", description=__doc__, allow_abbrev=False,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(bench):
        p = commands.add_parser(bench.__name__.removeprefix("bench_"), help=bench.__doc__,
                                description=bench.__doc__, parents=[shared], allow_abbrev=False,
                                formatter_class=run.Formatter)
        p.set_defaults(bench=bench)
        return p.add_argument

    precision = dict(default="auto", choices=["auto", "float32", "bfloat16", "float16"],
                     help="autocast around ours; auto as train.py: float32 on a CPU")
    flag = command(bench_step)
    flag("--objective", choices=OBJECTIVES, action="append", help="repeatable (default: all)")
    flag("--model", choices=SIZES, default="small", help="of the student")
    flag("--batch", type=run.positive, default=8, help="pairs a step, and a rank")
    flag("--grid", type=run.positive, help="MR tokens a side (default: the paper's 16, of Latent "
         "MIM 14)")
    flag("--precision", **precision)
    flag = command(bench_gram)
    flag("--shape", type=shape, action="append", metavar="B,N,D,R", help="images, tokens, width, "
         "HR tokens a side; repeatable (default: a list)")
    flag("--count", action="store_true", help="print what counting says of an H100, run nothing")
    flag("--precision", **precision)
    flag = command(bench_input)
    flag("--store", type=Path, required=True, help="a folder written by data.py pack")
    flag("--batch", type=run.positive, default=32, help="pairs at once")
    flag("--size", type=run.positive, default=224, help="pixels a side of MR crops, HR twice that")
    flag("--workers", type=run.whole, default=1, help="processes of the DataLoader")
    flag("--steps", type=run.positive, default=4, help="batches a round")
    flag = command(bench_tools)
    flag("--model", choices=SIZES, default="small", help="of the encoder")
    flag("--scenes", type=run.positive, default=6, help="scenes that are drawn")
    flag("--size", type=run.positive, default=256, help="MR pixels a side of each")
    return parser.parse_args(argv)
# fmt: on


def shape(text):
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){3}", text):
        raise argparse.ArgumentTypeError(f"{text} is not B,N,D,R, four numbers, as 32,256,384,2")
    return tuple(map(int, text.split(",")))


def main(args):
    if args.out and not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out.parent}: no such folder; make it first")
    ranks, (commit, edits) = run.start_ranks(args.device), run.git_state()
    with ranks.quiet():
        rows = args.bench(args, ranks)
        facts = {
            "device": device_name(ranks.device),
            "date": datetime.date.today().isoformat(),
            "commit": commit and commit + "-dirty" * bool(edits),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": getattr(sys.modules.get("triton"), "__version__", None),  # None: took no part
            "flags": {k: str(v) for k, v in vars(args).items() if k != "bench"},
        }
        print(f"\n{facts['device']}, torch {facts['torch']}, {facts['date']}, commit {commit}")
        if args.out and ranks.rank == 0:
            write_atomic(args.out, json.dumps({**facts, "rows": rows}, indent=1))


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{named[1] if named else platform.processor()}, {torch.get_num_threads()} threads"


# ---- what is measured


def clock(device):
    """Seconds on the clock, once a GPU has done its work, and of the CPU's own time, over its
    threads: others may be on the machine. Of a GPU the same twice."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return np.full(2, time.perf_counter())
    return np.array([time.perf_counter(), time.process_time() / torch.get_num_threads()])


def milliseconds(function, device, which=0):
    """Times of a call by `clock`: one on a CPU. On a GPU many, of a captured graph that no Python
    holds up, each with the inputs out of the cache."""
    if device.type == "cpu":
        start = clock(device)
        function()
        return [(clock(device) - start)[which] * 1e3]
    from triton.testing import do_bench

    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        function()
    return do_bench(graph.replay, return_mode="all")


def own_stream(device):
    """A GPU's stream for what is to be captured: a backward pass runs on its forward pass's."""
    cuda = device.type == "cuda"
    return torch.cuda.stream(torch.cuda.Stream()) if cuda else contextlib.nullcontext()


def ceilings(device, dtype):
    """Bytes per second of a large copy, operations per second of a large matrix product."""
    side, count = (8192, 2**28) if device.type == "cuda" else (2048, 2**25)
    with own_stream(device):
        a = torch.randn(count, device=device)
        copy = partial(torch.empty_like(a).copy_, a)
        product = partial(torch.matmul, *torch.randn(2, side, side, device=device).to(dtype))
        copied, multiplied = (
            min(t for _ in range(5) for t in milliseconds(call, device, 1)) / 1e3
            for call in (copy, product)
        )
    return 8 * count / copied, 2 * side**3 / multiplied


def peak_memory(function, device):
    """Peak bytes that a call holds beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    # the CPU's allocator keeps no peak: add up what the profiler saw
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        function()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events))


# the CPU's attention, which the counter does not know
flop_counter.register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)(
    lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v)
)
flop_counter.register_flop_formula(
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
)(lambda grad, q, k, v, *_, **__: flop_counter.sdpa_backward_flop_count(grad, q, k, v))


# ---- gram


def bench_gram(args, ranks):
    """Time the Gram loss and its gradient against eager PyTorch."""
    device, cuda = ranks.device, ranks.device.type == "cuda"
    sizes = args.shape or (counted.SHAPES if cuda or args.count else CPU_SHAPES)
    if args.count:
        print(counted.table(sizes, counted.H100))
        return []
    low = getattr(torch, run.precision_of(args.precision, device))
    chip = dict(zip(("bandwidth", "rate"), ceilings(device, low), strict=True))
    if cuda:  # what counting says of this device
        about = torch.cuda.get_device_properties(device)
        chip |= {"capability": (about.major, about.minor), "launch": 2e-6}
        chip |= {"processors": about.multi_processor_count}
        print(counted.table(sizes, chip | {"float32": ceilings(device, torch.float32)[1]}))
    print(f"float32 tokens, autocast {low}; {chip['bandwidth'] / 1e9:.0f} GB/s, ", end="")
    print(
        f"{chip['rate'] / 1e12:.2f} TFLOP/s; medians in ms (10..90 %), and the roofline's share\n"
    )
    print(f"{'B, N, D, ratio':20}{'form':6}{'forward':>30}{'backward':>30}{'both':>30}", end="")
    print(f"{'gain':>9}{'extra MB':>9}")
    rows = []
    for size in sizes:
        with own_stream(device), torch.autocast(device.type, low, enabled=low != torch.float32):
            found = bench_shape(*draw_tokens(size, args.seed, device), args.rounds)
        for row in found:
            rows.append({"shape": size, "autocast": str(low), **row})
            print(f"{', '.join(map(str, size)):20}{row['form']:6}", end="")
            for part in PARTS:
                first, middle, last = np.quantile(row[f"{part}_ms"], (0.1, 0.5, 0.9))
                rows[-1][f"{part}_floor_ms"] = best = 1e3 * counted.floor(size, 4, chip, part)
                cell = f"{middle:.3f} ({first:.3f}..{last:.3f}) {best / middle:>4.0%}"
                print(f"{cell:>30}", end="")
            print(f"{row['gain']:>8.2f}x{row['extra_mb']:>9.1f}", flush=True)
    return rows


def draw_tokens(size, seed, device):
    """A student 30 % from its teacher, whose ratio**2 HR tokens are equal."""
    b, n, d, ratio = size
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(b, n, d, generator=generator)
    student = teacher + 0.3 * torch.randn(b, n, d, generator=generator)
    return student.to(device), teacher.repeat_interleave(ratio**2, 1).to(device)


def bench_shape(student, teacher, rounds):
    """A row of eager PyTorch and one of ours: times in ms of forward, backward and both; the gain
    over eager, a median of paired ratios; memory beyond inputs and gradient."""
    device, rows, calls = student.device, [], {}
    for name, form in {"eager": partial(gram_loss, backend="eager"), "ours": gram_loss}.items():
        leaf = student.detach().requires_grad_()
        calls[name, "forward"] = partial(torch.no_grad()(form), student, teacher)
        # a gradient kept for many calls, where in training it is for one
        backward = partial(torch.autograd.grad, form(leaf, teacher), leaf, retain_graph=True)
        calls[name, "backward"] = backward
        calls[name, "both"] = partial(gradient, form, student, teacher)
        calls[name, "both"]()  # warms up
        rows.append({"form": name, **{f"{part}_ms": [] for part in PARTS}})
        rows[-1]["extra_mb"] = extra_memory(form, student, teacher) / 2**20
    turns = range(rounds if device.type == "cpu" else 1)
    for _, row, part in itertools.product(turns, rows, PARTS):
        row[f"{part}_ms"] += milliseconds(calls[row["form"], part], device)
    for row in rows:
        pairs = zip(rows[0]["both_ms"], row["both_ms"], strict=False)
        row["gain"] = median(eager / own for eager, own in pairs)
    return rows


def gradient(form, student, teacher):
    student = student.detach().requires_grad_()
    return torch.autograd.grad(form(student, teacher), student)


def extra_memory(form, student, teacher):
    """Peak bytes of forward and backward beyond the inputs and the gradient itself."""
    peak = peak_memory(partial(gradient, form, student, teacher), student.device)
    return peak - student.nbytes


# ---- step


def bench_step(args, ranks):
    """Time pretraining steps and their parts against the textbook's; under torchrun, where every
    rank has images of its own and gradients are averaged, against ours on one rank alone."""
    rate = ceilings(ranks.device, torch.float32)[1]
    print(f"matrix products at {rate / 1e9:.0f} GFLOP/s; {args.batch} images a rank; ", end="")
    print(f"medians of {args.rounds} interleaved rounds\n")
    head = f"{'objective':11}{'affinity':9}{'step':10}{'s':>7}{'CPU s':>8}{'gain':>6}"
    head += f"{'images/s':>10}{'GFLOP':>7}{'of peak':>8}{'MB':>7}{'state MB':>9}  parts in s"
    print(head, flush=True)
    rows = []
    for name, paired in itertools.product(args.objective or OBJECTIVES, (True, False)):
        for row in bench_objective(args, name, paired, ranks):
            rows.append(row)
            seconds, busy = median(row["seconds"]), median(row["cpu_seconds"])
            row["peak_share"] = row["flops"] / busy / rate
            print(f"{name:11}{'yes' if paired else 'no':9}{row['form']:10}", end="")
            print(f"{seconds:>7.3f}{busy:>8.3f}{row['gain']:>5.2f}x", end="")
            print(f"{row['images_per_s']:>10.2f}{row['flops'] / 1e9:>7.0f}", end="")
            print(f"{row['peak_share']:>8.0%}{row['peak_bytes'] / 1e6:>7.0f}", end="")
            print(f"{row['state_bytes'] / 1e6:>9.0f}  ", end="")
            parts = ", ".join(f"{k} {median(v):.3f}" for k, v in row["parts"].items())
            print(parts, flush=True)
            if row["reduced_bytes"]:
                print(f"  which reduces {row['reduced_bytes'] / 1e6:.0f} MB of gradients a step")
    return rows


def bench_objective(args, name, paired, ranks):
    """The rows of an objective with or without affinity: the textbook's step, or under torchrun
    ours on one rank, and ours on all. gain: in images a second of the CPU's time."""
    device, batch, rows = ranks.device, None, []
    plain, best = ("textbook", "ours") if ranks.world == 1 else ("1 rank", f"{ranks.world} ranks")
    for form in (plain, best):
        objective, groups = build_objective(name, args.model, args.grid, args.seed)
        batch = batch or draw_batch(objective, args.batch, paired, args.seed + ranks.rank, device)
        objective.to(device)
        if form == "textbook":
            stepper = Textbook(objective, groups, lr=1e-4)
        else:
            low = getattr(torch, run.precision_of(args.precision, device))
            together = form == best and ranks.world > 1
            stepper = Ours(objective, groups, low, together, lr=1e-4)
        step = partial(stepper.step, *batch)
        exhaust(step())  # warms up and makes the moments
        with flop_counter.FlopCounterMode(display=False) as counter:
            exhaust(step())
        weights = [p for group in groups for p in group["params"]]
        teachers = getattr(stepper, "teachers", [objective.teacher])
        held = [*weights, *weights, *weights, *(p for t in teachers for p in t.parameters())]
        reduced = weights if form == best and ranks.world > 1 else []
        rows.append({
            "objective": name, "affinity": paired, "form": form, "step": step,
            "ranks": ranks.world if form == best else 1, "flops": counter.get_total_flops(),
            "peak_bytes": peak_memory(lambda step=step: exhaust(step()), device),
            "state_bytes": sum(p.nbytes for p in held),  # weights, two moments, EMA copies
            "reduced_bytes": sum(p.nbytes for p in reduced),
            "seconds": [], "cpu_seconds": [], "parts": {},
        })  # fmt: skip
    for _, row in itertools.product(range(args.rounds), rows):
        ranks.wait()
        if row["form"] == best or ranks.rank == 0:
            time_parts(row, device)
    for row in rows if ranks.rank == 0 else ():
        del row["step"]
        pairs = zip(rows[0]["cpu_seconds"], row["cpu_seconds"], strict=True)
        row["gain"] = row["ranks"] * median(before / own for before, own in pairs)
        row["images_per_s"] = row["ranks"] * args.batch / median(row["seconds"])
    return rows if ranks.rank == 0 else []


def exhaust(parts):
    *_, (_, loss) = parts
    return loss


def time_parts(row, device):
    """Take a step and add its seconds, on the clock and of the CPU, and those of its parts."""
    if row["form"] != "textbook":
        run.keep_pages()
    elif platform.libc_ver()[0] == "glibc":  # what it has come to by itself
        for option, value in ((-4, 65536), (-3, 2**25), (-1, 2**26)):
            ctypes.CDLL(None).mallopt(option, value)
    start = last = clock(device)
    for part, _ in row["step"]():
        now = clock(device)
        row["parts"].setdefault(part, []).append(float(now[0] - last[0]))
        last = now
    row["seconds"].append(float(last[0] - start[0]))
    row["cpu_seconds"].append(float(last[1] - start[1]))


def build_objective(name, size, grid, seed):
    """An objective with its paper's defaults, and the groups of weights that AdamW takes."""
    kind = OBJECTIVES[name]
    torch.manual_seed(seed)
    student = vit(size, in_channels=4, patch_size=kind.defaults["patch"], **kind.encoder)
    gap = inspect.signature(kind).parameters.get("gap")
    grid = grid or kind.defaults["mr_size"] // (student.patch_size + (gap.default if gap else 0))
    objective = kind(student, (grid, grid))
    named = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if objective.decays(n, p) == decays], "weight_decay": wd}
        for decays, wd in ((True, 0.04), (False, 0.0))
    ]
    return objective, groups


def draw_batch(objective, batch, paired, seed, device):
    """Normalised MR images, masks, and the HR images of the same size of ground, or None."""
    generator = torch.Generator().manual_seed(seed)
    masks = objective.draw(batch, generator)
    side = objective.hr_side(objective.student.patch_size)
    images = torch.randn(batch, 4, side, side, generator=generator)
    mr = F.avg_pool2d(images, objective.ratio).to(device)
    return mr, {k: v.to(device) for k, v in masks.items()}, images.to(device) if paired else None


class Ours:
    """The step as train.py takes it; arguments and parts as `Textbook`. together: whether ranks
    average their gradients."""

    def __init__(self, objective, groups, precision=torch.float32, together=False, **options):
        self.objective, self.precision = objective, precision
        self.model = DistributedDataParallel(objective) if together else objective
        self.optimizer = torch.optim.AdamW(groups, fused=True, **options)
        self.weights = [p for group in groups for p in group["params"]]
        self.affinity = SpatialAffinity(objective.hr_tokens, objective.ratio)

    def step(self, images, masks, hr=None, momentum=0.996):
        objective, low = self.objective, self.precision != torch.float32
        with torch.autocast(images.device.type, self.precision, enabled=low):
            loss, tokens, index = self.model(images, masks)
            yield "objective", loss
            if hr is not None:
                seen = objective.views(hr, masks, objective.student.patch_size)
                loss = loss + self.affinity(tokens, index, seen, objective.grid)
                yield "affinity", loss
        loss.backward()
        yield "backward", loss
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.weights])
        self.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        yield "optimizer", loss
        ema_update(objective.teacher, objective.student, momentum, self.optimizer.found_inf)
        yield "ema", loss


# ---- input, tools


def bench_input(args, ranks):
    """Time the way from a store to normalised crops against a DataLoader's."""
    device, count = ranks.device, args.batch * args.steps
    chips = open_chips([args.store], pairs=1)
    store, ids = chips.stores[0], chips.ids[chips.has_hr]
    ids = ids[np.concatenate(
        [sample_order(args.seed, step, args.batch, len(ids)) for step in range(args.steps)]
    )]  # fmt: skip
    crops = draw_crops(args.seed, 0, count)

    def prepare(step):
        part = slice(step * args.batch, (step + 1) * args.batch)
        sizes = {"mr": args.size, "hr": 2 * args.size}
        return [read_crops([store], ids[part], k, crops[part], size) for k, size in sizes.items()]

    plain = partial(plain_pairs, store, ids[:, 1], crops, args.size)
    loader = torch.utils.data.DataLoader(
        range(count), args.batch, collate_fn=plain,
        num_workers=args.workers, persistent_workers=args.workers > 0,
    )  # fmt: skip
    forms = {
        "DataLoader": lambda: ([view.to(device) for view in views] for views in loader),
        "ours": lambda: (
            [render(part) for part in parts] for parts in stream(prepare, 0, args.steps, device)
        ),
    }
    rates = {form: [] for form in forms}
    for turn, form in itertools.product(range(args.rounds + 1), forms):  # the first warms up
        start = clock(device)
        (views,) = collections.deque(forms[form](), maxlen=1)
        assert len(views[0]) == args.batch
        if turn:
            rates[form].append(float(count / (clock(device) - start)[0]))
    print(f"crops of {args.size} and {2 * args.size} px, batches of {args.batch}")
    return print_rates("pairs", rates)


def print_rates(unit, rates):
    """Print medians and ranges of rates, {form: one of each round}; returns rows for them."""
    for form, values in rates.items():
        print(f"{form:16}{median(values):>10,.1f} {unit}/s ", end="")
        print(f"({min(values):,.1f}..{max(values):,.1f})", flush=True)
    return [{"form": form, f"{unit}_per_s": values} for form, values in rates.items()]


def bench_tools(args, ranks):
    """Time data.py check, the linear probe with --crop and predict.py on drawn scenes, by seconds
    of one core, or of a GPU's clock, their start and pictures left out."""
    from imagery import check, scenes

    def spent():
        return time.perf_counter() if ranks.device.type == "cuda" else sum(os.times()[:4])

    def call(words):
        """What a script says, called within the folder, and the seconds it took."""
        start, (script, *more) = spent(), words.split()
        command = [sys.executable, here / script, *more]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{words}: {(done.stderr.splitlines() or ['failed'])[-1]}")
        return done.stdout, spent() - start

    here, rates = Path(__file__).parent, {"check": [], "linear probe": [], "predict": []}
    device, pixels = f"--device {ranks.device.type}", args.size**2
    with tempfile.TemporaryDirectory() as folder:
        scenes.write_scenes(Path(folder, "drawn"), args.scenes, args.size, args.seed)
        call("data.py pack --mr drawn/mr --hr drawn/hr pairs --chip 64")
        store = Store(Path(folder, "pairs"))
        for turn in range(args.rounds):
            start = spent()
            check.measure(store)
            rates["check"].append(len(store) / (spent() - start))
            probe = f"--images drawn/mr --masks drawn/masks --encoder random --model {args.model}"
            _, seconds = call(f"finetune.py {probe} --epochs 1 --out {turn} {device}")
            row = json.loads(Path(folder, str(turn), "results.jsonl").read_text())
            seconds -= call("finetune.py --help")[1]
            rates["linear probe"].append(sum(row["tiles"].values()) / seconds)
            _, seconds = call(
                f"predict.py --model {turn} drawn/mr/scene_000.tif {turn}.tif {device}"
            )
            rates["predict"].append(pixels / (seconds - call("predict.py --help")[1]))
    units = {"check": "pairs", "linear probe": "tiles", "predict": "px"}
    return [row for name, unit in units.items() for row in print_rates(unit, {name: rates[name]})]


if __name__ == "__main__":
    run.script(main, parse_args, "nothing was written")
