"""A small run is killed, before each of its file operations and at random moments; then the same
command ends with the weights, exports and losses of a run that nothing happened to, bit for bit.

    python tests/kills.py --kills 50 --seed 0

Runs are forks of this process, which has imported all that they need, so a kill costs no start.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.figure  # noqa: F401, for the picture of a run
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from stores import write_store

import train
from weights import read_tensors

torch.set_num_threads(1)  # a fork has no other threads

WORDS = (
    "--dim 16 --depth 1 --patch 4 --heads 2 --global-batch 4 --mr-size 24 --predictor-dim 16 "
    "--predictor-depth 1 --targets 2 --target-scale 0.08 0.12 --lr 1e-3 --steps 6 --save-every 2 "
    "--log-every 1 --device cpu"
)
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir")  # the events of sys.addaudithook


def start(store, out, point=None):
    """Fork a run; with `point`, it kills itself before its file operation of that number. Without
    mercy: no handler runs, no buffer is flushed. Returns its process id."""
    if pid := os.fork():
        return pid
    count = 0

    def watch(event, args):
        nonlocal count
        if event in CHANGES and str(args[0]).startswith(str(out)):
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(watch)
    code = 1
    try:
        sys.stdout = sys.stderr = open(f"{out}.log", "a")
        train.main(train.parse_args([*WORDS.split(), "--store", str(store), "--out", str(out)]))
        code = 0
    except BaseException as error:
        print(repr(error), flush=True)
    finally:
        Path(f"{out}.operations").write_text(str(count))
        os._exit(code)


def ended(pid):
    """Wait for a run: whether it came to its end, False where it was killed."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"a run ended with {code}")
    return code == 0


def made(out):
    """What a run has made: tensors by name, and facts with the losses."""
    saved, (exported, facts) = (
        torch.load(out / "ckpt.pt"),
        read_tensors(out / "encoder.safetensors"),
    )
    tensors = saved["objective"] | {f"exported {name}": value for name, value in exported.items()}
    for number, state in saved["optimizer"]["state"].items():
        tensors |= {f"{number} {name}": value for name, value in state.items()}
    facts["meta"].pop("commit")  # someone may work on the checkout
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [(entry["step"], entry["loss"], entry["rank"]) for entry in log]
    return tensors, (facts, losses, (out / "tokens.png").exists(), (out / "config.json").exists())


def same(out, whole):
    tensors, facts = made(out)
    equal = tensors.keys() == whole[0].keys() and facts == whole[1]
    return equal and all(value.equal(whole[0][key]) for key, value in tensors.items())


def main(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=50, help="at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="of the file operations, each N-th")
    args = parser.parse_args(argv)
    folder, draw = Path(tempfile.mkdtemp(prefix="kills-")), random.Random(args.seed)
    store = write_store(folder / "pairs")
    begun = time.monotonic()
    if not ended(start(store, folder / "whole")):
        raise SystemExit("the run itself was killed")
    seconds, whole = time.monotonic() - begun, made(folder / "whole")
    operations = int((folder / "whole.operations").read_text())

    points = range(0, operations, args.every)
    for point in points:
        out = folder / f"point-{point}"
        ended(start(store, out, point))  # threads may bring their operations in another order
        if not ended(start(store, out)) or not same(out, whole):
            raise SystemExit(f"{out}: killed before file operation {point}, it did not go on")
    print(f"{len(points)} of {operations} file operations: each killed run went on bit for bit")

    kills = runs = 0
    while kills < args.kills:
        out, runs, done = folder / f"random-{runs}", runs + 1, False
        while not done:
            pid = start(store, out)
            if kills < args.kills:
                time.sleep(draw.uniform(0, 1.2 * seconds))
                os.kill(pid, signal.SIGKILL)  # of a run that has ended, nothing
            done = ended(pid)
            kills += not done
        if not same(out, whole):
            raise SystemExit(f"{out}: not what a run is that was never killed")
    print(f"seed {args.seed}: {kills} kills at random moments of {runs} runs, all bit for bit")


if __name__ == "__main__":
    main()
