"""A run's ranks, folder, checkpoints and log lines: what scripts share, and no method is in.

Top to bottom: kinds of flags; how a script starts on any number of ranks and says an error once;
files that are whole or not there; opening a run directory; `Run`, which logs and saves; `health`,
what a log line tells of tokens.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

# ---- flags


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, where argparse would print all flags, once a rank."""

    def error(self, message):
        fail(f"{self.prog}: {message}")


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
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=patience)
    return Ranks(rank, world, where)


def precision_of(name, device):
    """The dtype's name for autocast: "auto" is bfloat16 on a GPU that has it, else float16; float32
    on the CPU."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def script(main, parse_args, interrupted):
    """Run main(parse_args()) as a program: an error is one sentence on stderr and exit code 2.

    interrupted: what Ctrl-C leaves, for a sentence.
    """
    name = Path(sys.argv[0]).name
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        fail(f"{name}: {error}")
    except KeyboardInterrupt:
        fail(f"{name}: interrupted; {interrupted}", 130)
    if dist.is_initialized():
        # All ranks leave together, and at once: everything is written, and taking a process group
        # apart has hung (DDP waits under Python's lock for gloo's threads) and aborted.
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)


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


# ---- files


def write_atomic(path, write):
    """write(temporary path), flushed to disk, then renamed to path."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


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


# ---- the run directory


def open_run(out, resume, config, free):
    """Check the run directory; returns the checkpoint to continue from (a dict), or None.

    config: {"args": every flag, "steps", "precision", "chips"}. free: the flags that may differ
    between a run and its continuation. Raises ValueError if the folder is not ours, holds a run and
    `resume` is off, or holds a run of other flags.
    """
    for parent in out.parents:
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"--out {out}: {parent} is a file; choose another")
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
        if "encoder.safetensors" in names:
            raise ValueError(
                f"--out {out}: holds finished weights and no checkpoint to continue from; choose "
                f"another, or start from them with --init {out}"
            )
        return None  # no run, or one that stopped before its first checkpoint: nothing to lose
    if not resume:
        raise ValueError(
            f"--out {out}: holds a run; add --resume to continue it, or choose another"
        )
    before, now = read_config(out / "config.json"), config
    derived = ("steps", "precision", "chips", "hr_teacher_weights")
    before, now = (c["args"] | {k: c.get(k) for k in derived} for c in (before, now))
    for name, value in now.items():
        if name == "chips" and before[name] != value:
            raise ValueError(
                f"{out}: was trained on chips {before[name]}, the stores now hold {value}; bring "
                f"back what was packed and flagged then, or start a new run with --init {out}"
            )
        if name not in free and before.get(name) != value:
            flag = "--" + name.replace("_", "-") if name in config["args"] else name
            raise ValueError(
                f"{out}: was trained with {flag} {before.get(name)}, now {value}; repeat its flags "
                f"to continue, or start a new run from its weights with --init {out}"
            )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file provokes, in one sentence
        reason = str(error).splitlines()[0] if str(error) else "it ends too soon"
        remedy = f"start a new run with --init {out}"
        if path != previous and previous.is_file():
            remedy = f"rename {previous} to {path.name} to continue from the one before"
        raise ValueError(f"{path}: not a readable checkpoint ({reason}); {remedy}") from None


def read_config(path):
    """config.json of a run: {"args": its flags, and what followed from them}, or ValueError."""
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
        config["args"].keys(), config["steps"], config["precision"], config["chips"]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give the config.json of a run") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path}: damaged, or not of a run; start a new run, from its weights with --init"
        ) from None
    return config


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


class Run:
    """When a run logs and saves, and how: steps count from 0, log lines say how many are done.

    out: the folder. total: steps of the whole run; this process goes from start to stop.
    """

    def __init__(self, out, ranks, start, stop, total, log_every, save_every):
        self.out, self.ranks, self.stop, self.total = out, ranks, stop, total
        self.log_every, self.save_every = log_every, save_every
        self.clock, self.logged = time.perf_counter(), start

    def begin(self, config, start, edits):
        """Make the folder and write config.json, edits.diff of an edited tree, and the log."""
        if self.ranks.rank:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config, indent=1) + "\n"
        write_atomic(self.out / "config.json", lambda to: to.write_text(text))
        if edits:
            write_atomic(self.out / "edits.diff", lambda to: to.write_text(edits))
        # log lines after the checkpoint belong to steps that will be taken again
        kept = log_until(self.out / "log.jsonl", start)
        write_atomic(self.out / "log.jsonl", lambda to: to.write_text(kept))

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
        if self.ranks.rank == 0:
            entry |= more() if more else {}
            print(log_line(entry, self.total, seconds * (self.stop - step - 1)), flush=True)
            with open(self.out / "log.jsonl", "a") as log:
                log.write(json.dumps(entry) + "\n")
        self.clock, self.logged = time.perf_counter(), step + 1

    def save(self, step, modules, **state):
        """Write ckpt.pt: the state of modules by name, more state, and how many steps are done."""
        state |= {name: module.state_dict() for name, module in modules.items()}
        save_checkpoint(self.out / "ckpt.pt", state | {"step": step + 1})


# ---- health: sums over tokens, so that any number of ranks logs the same numbers


@torch.no_grad()
def token_sums(tokens, index, places, target):
    """Sums over student tokens (B, K, D) at index (B, K) of a grid of `places` tokens, and target
    tokens (B, ..., D'): a list of tensors that add up over micro-batches and ranks, for `health`.
    """
    x, y = tokens.flatten(0, -2).double(), target.flatten(0, -2).double()
    unit, place = torch.nn.functional.normalize(x, dim=-1), index.flatten()
    here = x.new_zeros(places, x.shape[1]).index_add_(0, place, x)
    count = x.new_zeros(places).index_add_(0, place, torch.ones_like(x[:, 0]))
    # the targets' count is a number that the shape tells
    return [x.mT @ x, unit.sum(0), here, count, y.sum(0), y.square().sum(0), len(y) + 0 * y.sum()]


def health(second_moment, unit_sum, here, count, target_sum, target_square, targets):
    """What tells whether training is healthy, from `token_sums`.

    rank: exp of the entropy of the tokens' normalised singular values (effective rank; RankMe,
    arXiv 2210.02885), 1 to D. place: share of the tokens' variance that their place in the grid
    explains, estimated without bias from the sums of squares between and within places; tokens
    that are mostly place say little of the ground. cosine: mean cosine between any two student
    tokens. target_var: variance of the targets over tokens, averaged over D.
    """
    values = torch.linalg.eigvalsh(second_moment).clamp_min(0).sqrt()
    share = values / values.sum().clamp_min(1e-300)
    n, seen = count.sum(), int((count > 0).sum())
    mean = here.sum(0).square().sum() / n
    between_places = (here.square().sum(1) / count.clamp_min(1)).sum() - mean
    total = second_moment.trace() - mean
    within = (total - between_places) / max(float(n) - seen, 1)  # mean square
    place = (between_places - (seen - 1) * within) / (total + within).clamp_min(1e-300)
    variance = (target_square / targets - (target_sum / targets).square()).mean()
    return {
        "rank": float(torch.special.entr(share).sum().exp()),
        "place": float(place),
        "cosine": float((unit_sum / n).square().sum()),
        "target_var": float(variance),
    }


# ---- log lines


def duration(seconds):
    """Seconds as a reader says them: 40 s, 12 min, 1 h 12 min."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def log_line(entry, total, seconds_left):
    """A log entry for a reader, and a sentence where training has collapsed."""
    aside = {"vicreg": "vic {:.4f}", "probe_miou": "probe {:.4f}", "gb": "{:.1f} GB"}
    told = {key: text.format(entry[key]) for key, text in aside.items() if entry.get(key)}
    parts = f"ssl {entry['ssl']:.4f} aff {entry['affinity']:.4f} {told.pop('vicreg', '')}".strip()
    line = " | ".join([
        f"step {entry['step']:05d}/{total}",
        f"loss {entry['loss']:.4f} ({parts})",
        f"rank {entry['rank']:.1f}",
        f"place {100 * entry['place']:.0f} %",
        f"cos {entry['cosine']:.2f}",
        f"var {entry['target_var']:.2f}",
        f"grad {entry['grad_norm']:.2f}",
        f"lr {entry['lr']:.1e}",
        f"ema {entry['momentum']:.4f}",
        f"{entry['ms']:.0f} ms",
        f"{entry['images_per_s']:,.0f} img/s",
        *told.values(),
        f"{duration(seconds_left)} left",
    ])  # fmt: skip
    if entry["rank"] < 2:
        line += (
            f"\nWARNING: the student's tokens have collapsed (effective rank {entry['rank']:.2f}): "
            f"they all say the same. Start again with a lower --lr, or a higher --vicreg."
        )
    return line
