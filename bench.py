"""Benchmarks: the Gram loss and what the compiler makes of its kernel, and whole training steps.

    python bench.py gram --out gram.json        times, memory and errors against eager PyTorch
    python bench.py compile --out tiles.json    registers, spills, shared memory; needs no GPU
    python bench.py step --out step.json        pretraining steps against the textbook's
    python bench.py input --store pairs         pairs a second from a store to normalised crops

`gram` runs every form on the same inputs: on a CPU in interleaved rounds, so that what disturbs the
machine disturbs all of them, on a GPU as captured graphs, so that what Python takes is not in the
times. It prints the roofline beside them: the larger of bytes over copy bandwidth and operations
over matrix-product rate, both measured first on the device at hand.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import ctypes
import datetime
import inspect
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import (
    FlopCounterMode,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import counted
from affinity import SpatialAffinity, gram_loss
from data import draw_crops, open_chips, read_crops, render, sample_order, stream
from files import write_atomic
from model import OBJECTIVES, ema_update
from run import keep_pages
from textbook import Pairs, Textbook
from vit import SIZES, vit

# B, N, D, ratio
CPU_SHAPES = ["128,20,384,2", "32,110,384,2", "32,256,384,1", "32,256,384,2", "1,4096,384,1"]
PARTS = ("forward", "backward", "both")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p = commands.add_parser("gram", help="time the forms of the Gram loss", allow_abbrev=False)
    add = p.add_argument
    add("--device", default=device, help="cpu or cuda, default what is there")
    add("--dtype", choices=DTYPES, default="float32", help="of the tokens, default float32")
    add(
        "--autocast",
        choices=["none", "bfloat16", "float16"],
        help="around the forms, as in training; default bfloat16 on cuda, none on cpu",
    )
    add(
        "--shape",
        action="append",
        metavar="B,N,D,R",
        help="images, tokens, width, HR tokens per side; repeatable, default a list",
    )
    add("--rounds", type=int, default=11, help="timed runs of each form on a CPU, default 11")
    add(
        "--model",
        action="store_true",
        help="print what counting says of an H100, the table in kernels/gram.py, and run nothing",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also time torch.compile of the definition, default yes",
    )
    add("--seed", type=int, default=0, help="of the tokens, default 0")
    add("--out", type=Path, help="JSON file to write, default none")
    p = commands.add_parser("compile", help="compile the kernel, no GPU", allow_abbrev=False)
    add = p.add_argument
    add(
        "--arch",
        type=int,
        action="append",
        choices=counted.SHARED_LIMIT,
        help="80, 90 or 100; repeatable, default all",
    )
    add("--jobs", type=int, default=2, help="processes, default 2")
    add("--out", type=Path, help="JSON file to write, default none")
    p = commands.add_parser("step", help="time whole pretraining steps", allow_abbrev=False)
    add = p.add_argument
    add("--device", default=device, help="cpu or cuda, default what is there")
    add("--objective", choices=OBJECTIVES, action="append", help="repeatable, default all")
    add("--model", choices=SIZES, default="small", help="of the student, default small")
    add("--batch", type=int, default=8, help="pairs a step, and a rank, default 8")
    add("--grid", type=int, help="MR tokens a side, default the paper's: 16, Latent MIM 14")
    add("--precision", choices=DTYPES, default="float32", help="of ours: autocast, default float32")
    add("--rounds", type=int, default=5, help="timed steps of each, default 5")
    add("--seed", type=int, default=0, help="of weights, images and masks, default 0")
    add("--out", type=Path, help="JSON file to write, default none")
    p = commands.add_parser("input", help="time the way from store to crops", allow_abbrev=False)
    add = p.add_argument
    add("--store", type=Path, required=True, help="a folder written by data.py pack")
    add("--device", default=device, help="cpu or cuda, default what is there")
    add("--batch", type=int, default=128, help="pairs at once, default 128")
    add("--size", type=int, default=224, help="pixels a side of MR crops, HR twice, default 224")
    add("--workers", type=int, default=2, help="processes of the DataLoader, default 2")
    add("--steps", type=int, default=8, help="batches a round, default 8")
    add("--rounds", type=int, default=5, help="timed rounds of each, default 5")
    add("--seed", type=int, default=0, help="of order and crops, default 0")
    add("--out", type=Path, help="JSON file to write, default none")
    args = parser.parse_args()
    try:
        if args.out and not args.out.parent.is_dir():
            raise ValueError(f"--out {args.out.parent}: no such folder; make it first")
        if getattr(args, "device", "cpu") not in ["cpu", "cuda"][: 1 + torch.cuda.is_available()]:
            raise ValueError(f"--device {args.device}: no such device here; use cpu")
        for name in ("rounds", "batch", "grid", "size", "steps"):
            value = getattr(args, name, None)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: give at least 1")
        benches = {"gram": bench_gram, "compile": bench_compile, "step": bench_step}
        benches["input"] = bench_input
        rows = benches[args.command](args)
    except (ValueError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)
    if args.out:
        write_atomic(args.out, json.dumps({**provenance(args), "rows": rows}, indent=1))


def provenance(args):
    """What it takes to repeat the run: device, versions, commit, date, flags."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # no git on this machine
        commit = ""
    return {
        "device": device_name(getattr(args, "device", "cpu")),
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "flags": {key: str(value) for key, value in vars(args).items()},
    }


def device_name(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name():
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def triton_version():
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


# ---- gram


def bench_gram(args):
    """Time the forms of the Gram loss; prints a table and returns its rows as dicts."""
    if args.device not in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
        raise ValueError(f"--device {args.device}: no such device here; use cpu")
    device = torch.device(args.device)
    dtype, cuda = DTYPES[args.dtype], device.type == "cuda"
    shapes = [] if args.shape else list(counted.SHAPES)
    for text in args.shape or ([] if cuda or args.model else CPU_SHAPES):
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){3}", text):
            raise ValueError(f"--shape {text}: give B,N,D,R, four positive numbers: 32,256,384,2")
        shapes.append(tuple(map(int, text.split(","))))
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}: give at least 1")
    if args.model:
        print(counted.table(shapes, counted.H100))
        return []

    low = args.autocast or ("bfloat16" if cuda and args.dtype == "float32" else "none")
    low = None if low == "none" else DTYPES[low]
    forms = {"eager": lambda s, t: gram_loss(s, t, backend="eager")}
    if args.compile and (cuda or shutil.which("cc") or shutil.which("cl")):
        torch._dynamo.config.recompile_limit = 64  # one per shape and per pass
        torch._functorch.config.donated_buffer = False  # its backward pass is timed again and again
        forms["compile"] = torch.compile(forms["eager"], dynamic=False)
    elif args.compile:
        print("torch.compile is left out: no C compiler")
    forms["ours"] = gram_loss

    bandwidth, rate = ceilings(device, low or dtype)
    print(f"{device_name(args.device)}, {dtype}, autocast {low}: copies at ", end="")
    print(f"{bandwidth / 1e9:.0f} GB/s, multiplies matrices at {rate / 1e12:.2f} TFLOP/s")
    chip = {"bandwidth": bandwidth, "rate": rate}
    if cuda:  # what counting says of this device
        found = torch.cuda.get_device_properties(device)
        chip |= {"capability": (found.major, found.minor), "launch": 2e-6}
        chip |= {"processors": found.multi_processor_count}
        print(counted.table(shapes, chip | {"float32": ceilings(device, torch.float32)[1]}))
    print("medians in ms (10..90 %) and the roofline's share of each; Python: of a call, in us\n")
    print(f"{'B, N, D, ratio':20}{'form':8}", end="")
    print("".join(f"{name:>30}" for name in ("forward", "backward", "both")), end="")
    print(f"{'eager/it':>9}{'extra MB':>9}{'loss err':>9}{'grad err':>9}{'Python':>7}")
    rows = []
    for shape in shapes:
        with own_stream(device):
            student, teacher = draw_tokens(shape, args.seed, device, dtype)
            found = bench_shape(forms, student, teacher, args.rounds, low)
        for row in found:
            row |= {"shape": shape, "dtype": str(dtype), "autocast": str(low)}
            for part in PARTS:
                size = student.element_size()
                row[f"{part}_floor_ms"] = 1e3 * counted.floor(shape, size, chip, part)
            rows.append(row)
            print_row(row)
    return rows


def own_stream(device):
    """A GPU's stream for what is to be captured: a backward pass runs on its forward pass's."""
    cuda = device.type == "cuda"
    return torch.cuda.stream(torch.cuda.Stream()) if cuda else contextlib.nullcontext()


def draw_tokens(shape, seed, device, dtype):
    """A student 30 % from its teacher, whose ratio**2 HR tokens are equal."""
    b, n, d, ratio = shape
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(b, n, d, generator=generator)
    student = teacher + 0.3 * torch.randn(b, n, d, generator=generator)
    return student.to(device, dtype), teacher.repeat_interleave(ratio**2, 1).to(device, dtype)


def print_row(row):
    print(f"{', '.join(map(str, row['shape'])):20}{row['form']:8}", end="")
    for part in PARTS:
        values = sorted(row[f"{part}_ms"])
        low, middle, high = (values[round(q * (len(values) - 1))] for q in (0.1, 0.5, 0.9))
        share = row[f"{part}_floor_ms"] / middle
        cell = f"{middle:.3f} ({low:.3f}..{high:.3f}) {share:>4.0%}"
        print(f"{cell:>30}", end="")
    print(f"{row['speedup']:>8.2f}x{row['extra_mb']:>9.1f}", end="")
    print(f"{row['loss_error']:>9.0e}{row['grad_error']:>9.0e}{row['python_us']:>7.0f}", flush=True)


def bench_shape(forms, student, teacher, rounds, low=None):
    """One row per form: times in ms, forward alone, backward alone and both; the speed-up over
    eager as the median of paired ratios; memory; errors against float64; Python's share of a call
    in us. low: dtype of autocast around the forms, None for none."""
    device = student.device
    exact, exact_grad = loss_and_grad(
        lambda s, t: gram_loss(s, t, backend="matmul"), student.double(), teacher.double()
    )
    rows, calls = [], {}
    with torch.autocast(device.type, low, enabled=low is not None):
        for name, form in forms.items():
            leaf = student.detach().requires_grad_()
            loss, grad = loss_and_grad(form, student, teacher)  # warms up and compiles, too
            calls[name, "forward"] = partial(torch.no_grad()(form), student, teacher)
            # a gradient kept for many calls, where in training it is for one
            backward = partial(torch.autograd.grad, form(leaf, teacher), leaf, retain_graph=True)
            calls[name, "backward"] = backward
            calls[name, "both"] = both = partial(loss_and_grad, form, student, teacher)
            memory = peak_memory(both, device) - student.numel() * student.element_size()
            row = {"form": name, "extra_mb": memory / 2**20}
            row["loss_error"] = abs(float(loss) / float(exact) - 1)
            row["grad_error"] = float((grad.double() - exact_grad).norm() / exact_grad.norm())
            row["python_us"] = host_time(both, device) * 1e6
            rows.append({**row, **{f"{part}_ms": [] for part in PARTS}})
        for _ in range(rounds if device.type == "cpu" else 1):
            for row in rows:
                for part in PARTS:
                    row[f"{part}_ms"] += milliseconds(calls[row["form"], part], device)
    for row in rows:
        pairs = zip(rows[0]["both_ms"], row["both_ms"], strict=False)
        row["speedup"] = statistics.median(eager / own for eager, own in pairs)
    return rows


def loss_and_grad(form, student, teacher):
    student = student.detach().requires_grad_()
    loss = form(student, teacher)
    (grad,) = torch.autograd.grad(loss, student)
    return loss.detach(), grad


def milliseconds(function, device):
    """Times of a call: one on a CPU. On a GPU many, of a captured graph that no Python holds up,
    each with the inputs out of the cache."""
    if device.type == "cpu":
        start = time.perf_counter()
        function()
        return [(time.perf_counter() - start) * 1e3]
    from triton.testing import do_bench

    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        function()
    return do_bench(graph.replay, return_mode="all")


def host_time(function, device):
    """Median seconds after which a call returns: Python's and the launches', while the device works
    on behind it. 0 on a CPU, where nothing works behind it."""
    times = []
    for _ in range(20 if device.type == "cuda" else 0):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times or [0])


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


def extra_memory(form, student, teacher):
    """Peak bytes of forward and backward beyond the inputs and the gradient itself."""
    peak = peak_memory(partial(loss_and_grad, form, student, teacher), student.device)
    return peak - student.numel() * student.element_size()


def ceilings(device, dtype):
    """Bytes per second of a large copy, operations per second of a large matrix product."""
    side, count = (8192, 2**28) if device.type == "cuda" else (2048, 2**25)
    rounds = 1 if device.type == "cuda" else 8
    with own_stream(device):
        a = torch.randn(count, device=device)
        b = torch.empty_like(a)
        copies = [t for _ in range(rounds) for t in milliseconds(partial(b.copy_, a), device)]
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        product = partial(torch.matmul, a, b)
        products = [t for _ in range(rounds) for t in milliseconds(product, device)]
    return 8 * count / min(copies) * 1e3, 2 * side**3 / min(products) * 1e3


# ---- compile


def bench_compile(args):
    """Compile every launch that "auto" can choose; prints a table and returns its rows as dicts."""
    if triton_version() is None:
        raise ValueError("compile needs Triton, which is not installed: pip install 'triton>=3.5'")
    cells = {"arch": 4, "kernel": 7, "tokens": 6, "operands": 8, "gradient": 8, "tiles": 10}
    cells |= {"panels": 6, "warps": 5, "stages": 6, "shared_kb": 9, "registers": 9, "stack": 5}
    cells |= {"unit": 7}
    print(" ".join(f"{name:>{width}}" for name, width in cells.items()))
    rows = []
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        for row in pool.map(
            counted.compiled,
            *zip(*counted.launches(args.arch or counted.SHARED_LIMIT), strict=True),
        ):
            rows.append(row)
            print(" ".join(f"{row[name]!s:>{width}}" for name, width in cells.items()), flush=True)
    print(f"\nTriton {triton_version()}. ", end="")
    print("stack: bytes per thread in memory, 0 where no register spills. N and D are arguments:")
    print("a line of gram serves all N of its panels and all D, one of unit all D up to its tile.")
    return rows


# ---- step

attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@register_flop_formula(attention)  # the CPU's, which the counter does not know
def attention_flops(q, k, v, *_, **__):
    return sdpa_flop_count(q, k, v)


@register_flop_formula(attention_backward)
def attention_backward_flops(grad, q, k, v, *_, **__):
    return sdpa_backward_flop_count(grad, q, k, v)


def bench_step(args):
    """Time pretraining steps against the textbook's; prints a table and returns its rows.

    Under torchrun every rank takes the same steps with images of its own, ours alone, and gradients
    are averaged: the same command with one rank and with two gives the cost of the reduction.
    """
    device, world = torch.device(args.device), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    rank = dist.get_rank() if world > 1 else 0
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    rate = ceilings(device, torch.float32)[1]
    if args.device == "cpu":  # of the CPU's own time: others may be on the machine
        a, times = torch.randn(2048, 2048), []
        for _ in range(8):
            start = time.process_time()
            a @ a
            times.append(time.process_time() - start)
        rate = 2 * 2048**3 / min(times) * torch.get_num_threads()
    head = f"{'objective':11}{'affinity':9}{'step':10}{'s':>7}{'CPU s':>8}{'gain':>6}"
    head += f"{'images/s':>10}{'GFLOP':>7}{'of peak':>8}{'MB':>7}{'state MB':>9}  parts in s"
    if rank == 0:
        print(f"{device_name(args.device)}, matrix products at {rate / 1e9:.0f} GFLOP/s; ", end="")
        print(
            f"{world} x {args.batch} images; medians of {args.rounds} interleaved rounds\n\n{head}"
        )
    rows = []
    for name, paired in itertools.product(args.objective or OBJECTIVES, (True, False)):
        for row in bench_objective(args, name, paired, device, world, rank):
            used = [s / torch.get_num_threads() for s in row["cpu_seconds"]]
            used = statistics.median(used if args.device == "cpu" else row["seconds"])
            row["peak_share"] = row["flops"] / used / rate
            rows.append(row)
            print_step(row) if rank == 0 else None
    if world > 1:
        dist.destroy_process_group()
        args.out = args.out if rank == 0 else None
    return rows


def bench_objective(args, name, paired, device, world, rank):
    """The rows of an objective with or without affinity: ours, and on one rank the textbook's."""
    batch = draw_batch(args, name, paired, device, rank)
    forms = {"ours": Ours} if world > 1 else {"textbook": partial(Textbook, name), "ours": Ours}
    rows = []
    for form, kind in forms.items():
        objective, groups = build_objective(args, name)
        stepper = kind(objective.to(device), groups, lr=1e-4)
        if form == "ours":
            stepper.precision = DTYPES[args.precision]
        weights = [p for group in groups for p in group["params"]]
        row = {"objective": name, "affinity": paired, "form": form, "ranks": world}
        row |= {"seconds": [], "cpu_seconds": [], "parts": {}}
        row["reduced_bytes"] = sum(p.nbytes for p in weights) if world > 1 else 0
        row["step"] = partial(stepper.step, *batch)
        exhaust(row["step"]())  # warms up and makes the moments
        with FlopCounterMode(display=False) as counter:
            exhaust(row["step"]())
        row["flops"] = counter.get_total_flops()
        row["peak_bytes"] = peak_memory(lambda row=row: exhaust(row["step"]()), device)
        teachers = getattr(stepper, "teachers", [objective.teacher])
        held = [*weights, *weights, *weights, *(p for t in teachers for p in t.parameters())]
        row["state_bytes"] = sum(p.nbytes for p in held)  # weights, two moments, EMA copies
        rows.append(row)
    for _ in range(args.rounds):
        for row in rows:
            time_parts(row, device)
    for row in rows:
        del row["step"]
        pairs = zip(rows[0]["cpu_seconds"], row["cpu_seconds"], strict=True)
        row["gain"] = statistics.median(plain / own for plain, own in pairs)
        row["images_per_s"] = world * args.batch / statistics.median(row["seconds"])
    return rows


def exhaust(parts):
    *_, (_, loss) = parts
    return loss


def set_malloc(form):
    """Of ours as train.py sets it; of the textbook's what glibc has come to by itself."""
    if form == "ours":
        keep_pages()
    elif platform.libc_ver()[0] == "glibc":
        for option, value in ((-4, 65536), (-3, 2**25), (-1, 2**26)):
            ctypes.CDLL(None).mallopt(option, value)


def time_parts(row, device):
    """Take a step and add its seconds, on the clock and of the CPU, and those of its parts."""
    if device.type == "cpu":
        set_malloc(row["form"])
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = last = time.perf_counter()
    cpu = time.process_time()
    for part, _ in row["step"]():
        wait()
        now = time.perf_counter()
        row["parts"].setdefault(part, []).append(now - last)
        last = now
    row["seconds"].append(last - start)
    row["cpu_seconds"].append(time.process_time() - cpu)


def print_step(row):
    median = statistics.median
    print(f"{row['objective']:11}{'yes' if row['affinity'] else 'no':9}{row['form']:10}", end="")
    print(f"{median(row['seconds']):>7.3f}{median(row['cpu_seconds']):>8.3f}", end="")
    print(f"{row['gain']:>5.2f}x{row['images_per_s']:>10.2f}{row['flops'] / 1e9:>7.0f}", end="")
    print(f"{row['peak_share']:>8.0%}{row['peak_bytes'] / 1e6:>7.0f}", end="")
    print(f"{row['state_bytes'] / 1e6:>9.0f}  ", end="")
    print(", ".join(f"{k} {median(v):.3f}" for k, v in row["parts"].items()), flush=True)
    if row["reduced_bytes"]:
        print(
            f"{row['ranks']} ranks reduce {row['reduced_bytes'] / 1e6:.0f} MB of gradients a step"
        )


def build_objective(args, name):
    """An objective with its paper's defaults, and the groups of weights that AdamW takes."""
    kind = OBJECTIVES[name]
    torch.manual_seed(args.seed)
    student = vit(args.model, in_channels=4, patch_size=kind.defaults["patch"], **kind.encoder)
    gap = inspect.signature(kind).parameters.get("gap")
    cell = kind.defaults["patch"] + (gap.default if gap else 0)
    grid = args.grid or kind.defaults["mr_size"] // cell
    objective = kind(student, (grid, grid))
    named = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if objective.decays(n, p) == decays], "weight_decay": wd}
        for decays, wd in ((True, 0.04), (False, 0.0))
    ]
    return objective, groups


def draw_batch(args, name, paired, device, rank=0):
    """Normalised MR images, masks, and the HR images of the same size of ground, or None."""
    objective, _ = build_objective(args, name)
    generator = torch.Generator().manual_seed(args.seed + rank)
    masks = objective.draw(args.batch, generator)
    side = objective.hr_side(objective.student.patch_size)
    images = torch.randn(args.batch, 4, side, side, generator=generator)
    mr = F.avg_pool2d(images, objective.ratio).to(device)
    return mr, {k: v.to(device) for k, v in masks.items()}, images.to(device) if paired else None


class Ours:
    """The step as train.py takes it; arguments and parts as `Textbook`."""

    def __init__(self, objective, groups, **options):
        self.objective, self.precision = objective, torch.float32
        self.model = DistributedDataParallel(objective) if dist.is_initialized() else objective
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


# ---- input


def bench_input(args):
    """Time reading, cropping and normalising pairs; prints pairs a second and returns the rows."""
    device = torch.device(args.device)
    chips = open_chips([args.store], pairs=1)
    store, ids = chips.stores[0], chips.ids[chips.has_hr]
    count = args.batch * args.steps
    order = np.concatenate(
        [sample_order(args.seed, step, args.batch, len(ids)) for step in range(args.steps)]
    )
    crops = draw_crops(args.seed, 0, count)

    def prepare(step):
        part = slice(step * args.batch, (step + 1) * args.batch)
        sizes = {"mr": args.size, "hr": 2 * args.size}
        chosen = ids[order[part]]
        return [read_crops([store], chosen, k, crops[part], size) for k, size in sizes.items()]

    def ours():
        for parts in stream(prepare, 0, args.steps, device):
            yield [render(part) for part in parts]

    pairs = Pairs(store, ids[order, 1], crops, args.size)
    loader = torch.utils.data.DataLoader(
        pairs, args.batch, num_workers=args.workers, persistent_workers=args.workers > 0
    )
    forms = {
        "DataLoader": lambda: ([view.to(device) for view in views] for views in loader),
        "ours": ours,
    }
    rates = {form: [] for form in forms}
    for turn in range(args.rounds + 1):  # the first one warms up
        for form, run in forms.items():
            start = time.perf_counter()
            (views,) = collections.deque(run(), maxlen=1)
            assert len(views[0]) == args.batch
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                rates[form].append(count / (time.perf_counter() - start))
    print(f"{device_name(args.device)}: {len(ids)} pairs, crops of {args.size} and ", end="")
    print(f"{2 * args.size} px, batches of {args.batch}; pairs a second, medians of rounds\n")
    for form, values in rates.items():
        print(f"{form:12}{statistics.median(values):>8.0f} ({min(values):.0f}..{max(values):.0f})")
    return [{"form": form, "pairs_per_s": values} for form, values in rates.items()]


if __name__ == "__main__":
    main()
