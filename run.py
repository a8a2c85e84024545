"""A run's ranks, folder, checkpoints and log lines: what scripts share, and no method is in.

Top to bottom: kinds of flags; how a script starts on any number of ranks, says an error once and
stops when it is asked to; opening a run directory; `Run`, which logs and saves.
"""

import argparse
import contextlib
import ctypes
import fcntl
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from files import load_sealed, save_sealed, write_atomic
from health import log_line

# ---- flags


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, where argparse would print all flags, once a rank."""

    def error(self, message):
        fail(f"{self.prog}: {message}")


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells a flag's default where it has one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return value


def whole(text):
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def between(low, high=math.inf):
    def parse(text):
        value = float(text)
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    return parse


# ---- ranks


class Ranks(NamedTuple):
    """This process among those that torchrun started: 0 of 1 without it."""

    rank: int
    world: int
    device: torch.device

    def sum(self, tensors):
        """Add tensors up over the ranks, in place; returns them."""
        for tensor in tensors if self.world > 1 else ():
            dist.all_reduce(tensor)
        return tensors

    def share(self, tensor, source):
        """Send a tensor of rank `source` into that of all others, in place; returns it."""
        if self.world > 1:
            dist.broadcast(tensor, source)
        return tensor

    def gather(self, value):
        """[the value of each rank], on all ranks: anything that pickles."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self):
        if self.world > 1:
            dist.barrier()

    def first(self, decide):
        """What decide() returns on the first rank, on all of them: they may lie on machines that
        share no disk. Its ValueError or OSError is raised on all, so that none waits for ever."""
        said = (None, None)
        if self.rank == 0:
            try:
                said = (decide(), None)
            except (ValueError, OSError) as error:
                if self.world == 1:
                    raise
                said = (None, str(error))
        value, error = self.gather(said)[0]
        if error is not None:
            raise ValueError(error)
        return value

    @contextlib.contextmanager
    def quiet(self):
        """Only the first rank prints within; errors of the others pass."""
        with contextlib.ExitStack() as stack:
            if self.rank:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield


def start_ranks(device, patience=None):
    """Join the other ranks. device: "auto", "cpu" or "cuda". patience: how long a rank may wait for
    the others, a timedelta; default PyTorch's, some minutes. Raises ValueError without the GPU."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU found; use --device cpu")
    where = torch.device("cpu")
    if cuda:
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(where)
    else:
        keep_pages()
    if world > 1:
        backend, meeting = "nccl" if cuda else "gloo", {}
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun starts its workers again beside what the dead ones have said in its store,
            # where nobody answers; on several nodes the counts of restarts differ (runs/nodes.sh)
            store, *_ = next(dist.rendezvous("env://"))
            again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            meeting = dict(store=dist.PrefixStore(again, store), rank=rank, world_size=world)
        with handling(signal.SIG_DFL):  # it waits in C++, where a signal would not be heard
            dist.init_process_group(backend, timeout=patience, **meeting)
    return Ranks(rank, world, where)


def keep_pages():
    """Have glibc keep the memory that is freed: every step takes the same gigabytes again, and to
    get them from the kernel page by page is up to a twentieth of a step on a CPU."""
    if platform.libc_ver()[0] == "glibc":  # its settings cannot be set by the environment from here
        glibc = ctypes.CDLL(None)
        glibc.mallopt(-4, 0)  # M_MMAP_MAX: no block comes from, and goes to, the kernel by itself
        glibc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's end stays


def precision_of(name, device):
    """The dtype's name for autocast: "auto" is bfloat16 on a GPU that has it, else float16; float32
    on the CPU."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


@contextlib.contextmanager
def handling(handler):
    """Within, `handler` gets the signals by which a run is asked to end."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopped(Exception):
    """A run that ends in the middle because it was asked to: says where."""


class Stop:
    """Whether someone wants the run to end, and whether its last step was bad: what all ranks are
    to know of each other after every step, without waiting for it.

    A batch system asks by SIGTERM or SIGUSR1 and a user by Ctrl-C, some rank or all of them. So
    does the death of torchrun, whose ranks would else train on with nobody to end them.
    """

    asked = None  # the signal's name, once there was one
    since = 0.0  # when it came, seconds of time.monotonic

    @classmethod
    @contextlib.contextmanager
    def listening(cls):
        """Within, a signal only says that it came; it is the loop that stops. A second Ctrl-C ends
        the process where it is: a step may take minutes."""
        cls.asked = None
        try:
            with handling(lambda number, _: cls.ask(signal.Signals(number).name)):
                yield
        except RuntimeError as error:
            if cls.asked and lost(error):  # that rank has heard it first
                raise Stopped(f"by {cls.asked}") from None
            raise
        finally:
            cls.asked = None

    @classmethod
    def ask(cls, name):
        now = time.monotonic()
        # torchrun sends its workers the Ctrl-C that the terminal has sent them, too
        if name == "SIGINT" and cls.asked and now - cls.since > 1:
            raise KeyboardInterrupt
        if not cls.asked:
            said = f"{name}: stopping after this step; Ctrl-C again stops at once"
            print(said, file=sys.stderr, flush=True)
            cls.asked, cls.since = name, now

    def __init__(self, ranks):
        self.ranks, self.told = ranks, []
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def share(self, bad=None):
        """Sum the wish to stop, and `bad`, a 0-d bool tensor, over the ranks in one reduction.
        Returns on how many ranks the step was bad, a 0-d float32 tensor on the device."""
        device = self.ranks.device
        if self.parent not in (None, os.getppid()) and not Stop.asked:
            Stop.ask("the end of torchrun")
        told = torch.full((2,), float(Stop.asked is not None), device=device)
        told[1] = 0 if bad is None else bad
        self.ranks.sum([told])
        self.told.append(self.fetch(told))
        return told[1]

    def check(self, told):
        """Share the wish to stop, and raise Stopped(told) on all ranks where there was one."""
        self.share()
        if any(stop for stop, _ in self.hear()):
            raise Stopped(told)

    def fetch(self, told):
        """Start to copy a tensor to the host: (its copy, the event to wait for or False)."""
        host = torch.empty(2, pin_memory=told.is_cuda).copy_(told, non_blocking=True)
        return host, told.is_cuda and torch.cuda.current_stream().record_event()

    def hear(self, now=False):
        """What was shared of the steps before the last one, or with `now` of that, too: a list of
        (whether to stop, whether the step was bad), equal on all ranks, so that all stop after the
        same step."""
        heard = []
        while len(self.told) > (not now):
            host, copied = self.told.pop(0)
            if copied:
                copied.synchronize()
            heard.append(tuple(value > 0 for value in host.tolist()))
        return heard


def script(main, parse_args, interrupted, stops=False):
    """Run main(parse_args()) as a program: an error is one sentence on stderr and exit code 2.

    interrupted: what Ctrl-C leaves, for a sentence. stops: whether main looks at `Stop`, and so
    ends in its own time where it is asked to.
    """
    name = Path(sys.argv[0]).name
    try:
        args = parse_args()  # a rank that waits in `fail` is to end at torchrun's SIGTERM
        with Stop.listening() if stops else contextlib.nullcontext():
            main(args)
            if dist.is_initialized():
                # All ranks leave together, and at once: everything is written, and taking a process
                # group apart has hung (DDP waits under Python's lock for gloo's threads) and
                # aborted.
                dist.barrier()
                sys.stdout.flush()
                os._exit(0)
    except (ValueError, OSError) as error:
        fail(f"{name}: {error}")
    except Stopped as stopped:
        print(f"{name}: stopped {stopped}; {interrupted}", flush=True)
        if dist.is_initialized():
            os._exit(0)
    except RuntimeError as error:
        if not lost(error):
            raise
        reason = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).split(". ")[0]
        fail(f"{name}: another rank is gone ({reason}); {interrupted}")
    except KeyboardInterrupt:
        fail(f"{name}: interrupted; {interrupted}", 130)


def lost(error):
    """Whether a RuntimeError says that a rank waits for another one in vain."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def fail(sentence, code=2):
    """Say a sentence and leave, once for all ranks: the first speaks at once. Another one waits to
    be ended by torchrun, as it is where the first has left too; else the fault is its own."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(3)
        sentence += f" (rank {rank})"
    print(sentence, file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(code)  # nothing is left to write, and the group may wait for ranks that are gone
    sys.exit(code)


# ---- the run directory


def git_state():
    """(commit, the diff of an edited tree) of this checkout; (None, "") outside git."""
    ask = [["git", "rev-parse", "HEAD"], ["git", "diff", "HEAD"]]
    try:
        said = [
            subprocess.run(a, cwd=Path(__file__).parent, capture_output=True, check=True).stdout
            for a in ask
        ]
    except (OSError, subprocess.CalledProcessError):
        return None, ""
    commit, diff = (text.decode(errors="replace") for text in said)
    return commit.strip(), diff


held = None  # the lock of this process, which works on one run at a time


def hold(out, name="run.lock"):
    """Make a run's folder and hold it until this process ends, in whatever way: a second start in
    it is a ValueError that says who holds it. The file that does it says that the folder is ours,
    and stays."""
    global held
    out.mkdir(parents=True, exist_ok=True)
    if held is not None:
        held.close()
    held = open(out / name, "a+")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.seek(0)
        who = held.read().strip() or "another process"
        raise ValueError(
            f"--out {out}: is written to by {who}; wait for its end, or choose another"
        ) from None
    except OSError as error:
        print(f"{out}: its file system has no locks ({error}); start no second run in it")
    held.truncate(0)
    held.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}\n")
    held.flush()


def fresh(out):
    """The first of out-2, out-3, ... that is not there, or out itself; once torchrun has started
    the workers again, the last that is."""
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    number, last = 1, out
    while (path := out.with_name(f"{out.name}-{number}") if number > 1 else out).exists():
        number, last = number + 1, path
    return last if again else path


def open_run(out, config, free, override=(), must=False):
    """Take the run directory; returns the path of the checkpoint to continue from, or None.

    config: {"args": every flag, "steps", "precision", "chips"}. free: the flags that may differ
    between a run and its continuation; override: those that the user lets differ, which config then
    tells. must: whether a run has to be there. Raises ValueError if the folder is not ours, if
    another process works in it, or if it holds a run of other flags, after a table of them.
    """
    for parent in out.parents:
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"--out {out}: {parent} is a file; choose another")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    ours = "config.json" in names and names & {"log.jsonl", "ckpt.pt", "ckpt.previous.pt"}
    ours = ours or "run.lock" in names
    if (out.exists() and not out.is_dir()) or (names and not ours):
        raise ValueError(f"--out {out}: exists and is not a run directory; choose another")
    path, previous = out / "ckpt.pt", out / "ckpt.previous.pt"
    if not path.is_file() and previous.is_file():
        path = previous  # killed between the two renames of `save_checkpoint`
    if must and "config.json" not in names:
        raise ValueError(f"--resume: no run in {out} (no config.json); start it without --resume")
    if not path.is_file() and "encoder.safetensors" in names:
        raise ValueError(
            f"--out {out}: holds finished weights and no checkpoint to continue from; choose "
            f"another, or start from them with --init {shlex.quote(str(out))}"
        )
    hold(out)
    if not path.is_file():
        return None  # no run, or one that stopped before its first checkpoint: nothing to lose
    then = read_config(out / "config.json")
    compare(out, then, config, free, override)
    return path


def compare(out, then, config, free, override):
    """Raise ValueError where a run was of other flags than config's, but for those of free; tell
    in config those of override."""
    derived = ("steps", "precision", "chips", "hr_teacher_weights")
    before, now = (c["args"] | {k: c.get(k) for k in derived} for c in (then, config))
    other = {name: (before.get(name), value) for name, value in now.items()
             if name not in free and before.get(name) != value}  # fmt: skip
    unknown = [name for name in override if name not in now]
    if unknown:
        raise ValueError(f"--override {unknown[0]}: no flag of a run; name one as config.json does")
    changed = {name: other.pop(name) for name in override if name in other}
    config["overrides"] = then.get("overrides", []) + ([changed] if changed else [])
    for name, (old, new) in changed.items():
        print(f"{out}: goes on with {name} {new}, {old} before (--override)")
    if not other:
        return
    lines = [("", "there", "now"), *((name, *map(str, pair)) for name, pair in other.items())]
    wide = [min(60, max(map(len, column))) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(f"{word:{w}}" for word, w in zip(line, wide, strict=True)).rstrip(),
              file=sys.stderr)  # fmt: skip
    if "chips" in other:
        raise ValueError(
            f"{out}: was trained on chips {before['chips']}, the stores now hold {now['chips']}; "
            "bring back what was packed and flagged then, or start a new run with --fresh, from "
            f"its weights with --init {shlex.quote(str(out))}"
        )
    name, (old, new) = next(iter(other.items()))
    flag = "--" + name.replace("_", "-") if name in config["args"] else name
    more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
    raise ValueError(
        f"{out}: was trained with {flag} {old}, now {new}{more}; repeat its flags to continue, go "
        f"on with these by --override {' '.join(other)}, or start a new run beside it with --fresh"
    )


def read_checkpoint(path, ranks, remedy=None):
    """The checkpoint on the first rank's disk, a tree on the CPU of every rank; ValueError if it is
    damaged. It travels as it is in the file, by pieces that fit a GPU."""

    def read():
        try:
            return load_sealed(path), path.stat().st_size
        except Exception as error:  # whatever a damaged file provokes, in one sentence
            reason = str(error).removeprefix(f"{path}: ").splitlines() or ["it ends too soon"]
            previous, then = path.with_name("ckpt.previous.pt"), remedy
            if then is None and path != previous and previous.is_file():
                old, new = shlex.quote(str(previous)), shlex.quote(str(path))
                then = f"to continue from the one before: mv {old} {new}"
            then = then or "start a new run with --fresh"
            raise ValueError(f"{path}: not a readable checkpoint ({reason[0]}); {then}") from None

    kept = []
    size = ranks.first(lambda: kept.extend(read()) or kept[1])
    if ranks.world == 1:
        return kept[0]
    received = io.BytesIO()
    with open(path, "rb") if ranks.rank == 0 else contextlib.nullcontext() as file:
        for at in range(0, size, 1 << 28):
            piece = torch.empty(min(1 << 28, size - at), dtype=torch.uint8)
            if file:
                file.readinto(piece.numpy())
            piece = ranks.share(piece.to(ranks.device), 0)
            if not file:
                received.write(piece.cpu().numpy())
    if kept:
        return kept[0]
    received.seek(0)
    return torch.load(received, map_location="cpu", weights_only=True)


def read_config(path):
    """config.json of a run: {"args": its flags, and what followed from them}, or ValueError."""
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
        config["args"].keys(), config["steps"], config["precision"], config["chips"]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give the config.json of a run") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"{path}: damaged, or not of a run; start a new run, from its weights with --init"
        ) from None
    return config


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
    save_sealed(state, new)
    if path.is_file():
        os.replace(path, path.with_name("ckpt.previous.pt"))
    os.replace(new, path)


def copied(tree):
    """A tree of dicts, lists and tuples with copies of its tensors, on the CPU."""
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(copied, tree))
    return tree.detach().to("cpu", copy=True) if torch.is_tensor(tree) else tree


def check_space(out, size):
    """Raise ValueError if the disk of a run has no room for its checkpoints of `size` bytes: one,
    the one before, and the next, which is written beside them."""
    there = sum(p.stat().st_size for p in out.glob("ckpt*.pt"))
    need, free = 3 * size - there, shutil.disk_usage(out).free
    if free < need:
        raise ValueError(
            f"{out}: its checkpoints need {need / 1e9:.3g} GB more and its disk has "
            f"{free / 1e9:.3g} GB; make room, or choose another --out"
        )


class Run:
    """When a run logs and saves, and how: steps count from 0, log lines say how many are done.

    out: the folder. total: steps of the whole run; this process goes from start to stop.
    """

    def __init__(self, out, ranks, start, stop, total, log_every, save_every):
        self.out, self.ranks, self.stop, self.total = out, ranks, stop, total
        self.log_every, self.save_every = log_every, save_every
        self.clock, self.logged = time.perf_counter(), start
        self.writer, self.writing = ThreadPoolExecutor(1), None
        self.heard, self.skipped, self.in_a_row = start, 0, 0

    def begin(self, config, start, edits):
        """Write config.json, edits.diff of an edited tree, and the log."""
        if self.ranks.rank:
            return
        text = json.dumps(config, indent=1) + "\n"
        write_atomic(self.out / "config.json", text)
        if edits:
            write_atomic(self.out / "edits.diff", edits)
        # log lines after the checkpoint belong to steps that will be taken again
        kept = log_until(self.out / "log.jsonl", start)
        write_atomic(self.out / "log.jsonl", kept)
        (self.out / "stopped").unlink(missing_ok=True)

    def saves(self, step):
        return (step + 1) % self.save_every == 0 or step + 1 == self.stop

    def logs(self, step):
        return step == 0 or (step + 1) % self.log_every == 0 or self.saves(step)

    def log(self, step, entry, images, more=None):
        """Print and write a log line: entry, with the step's time and what is left. images: those
        of a step, over all ranks. more: called on rank 0 for more of the entry, in no step's time.
        """
        now = time.perf_counter()
        seconds = (now - self.clock) / max(step + 1 - self.logged, 1)
        cuda = self.ranks.device.type == "cuda"
        entry = {
            "step": step + 1,
            **entry,
            "ms": 1000 * seconds,
            "images_per_s": images / seconds,
            "gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        }
        if self.skipped:
            entry["skipped"], self.skipped = self.skipped, 0
        if self.ranks.rank == 0:
            entry |= more() if more else {}
            print(log_line(entry, self.total, seconds * (self.stop - step - 1)), flush=True)
            with open(self.out / "log.jsonl", "a") as log:
                log.write(json.dumps(entry) + "\n")
        self.clock, self.logged = time.perf_counter(), step + 1

    def hear(self, stops, now):
        """Count the bad steps that `Stop` knows of, which have changed nothing: those in a row are
        `in_a_row`, up to step `heard`. Returns whether to stop."""
        stopping = False
        for stop, bad in stops.hear(now):
            self.heard, stopping = self.heard + 1, stopping or stop
            self.in_a_row = self.in_a_row + 1 if bad else 0
            self.skipped += bad
            if bad and self.ranks.rank == 0:
                print(f"step {self.heard}: skipped, its loss or gradients are not finite")
        return stopping

    def save(self, step, modules, then, **state):
        """Write ckpt.pt: the state of modules by name, more state, and how many steps are done. A
        thread writes a copy, so that training waits for no disk; then(copy) is called there."""
        state |= {name: module.state_dict() for name, module in modules.items()}
        state = copied(state | {"step": step + 1})
        self.written()

        def write():
            save_checkpoint(self.out / "ckpt.pt", state)
            then(state)

        self.writing = self.writer.submit(write)

    def written(self):
        """Wait for the last `save`, and raise what went wrong there."""
        if self.writing:
            self.writing.result()

    def close(self, stopped=False):
        """Wait for what is being written; `stopped` in the folder tells whoever starts the run
        again that it was asked to stop."""
        self.written()
        if stopped:
            text = f"asked to by {Stop.asked or 'another rank'}\n"
            write_atomic(self.out / "stopped", text)
