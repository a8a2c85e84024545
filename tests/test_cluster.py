"""What happens to a job on a cluster: ranks and launchers that die, signals, nodes without a shared
disk. The same line, typed again, goes on; so every test here starts torchrun, and is slow."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from stores import write_store
from test_finetune import losses_of, words_of, write_scenes
from test_train import command, log_of

import finetune
import train
from model import ViT
from weights import save_encoder

pytestmark = pytest.mark.slow
PATIENCE = 500  # seconds, of a machine that does other things, too


class Job:
    """torchrun of a script, with its own log. Leaving the block ends what is left of it."""

    def __init__(self, script, words, log, ranks=1, *launcher):
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        words = [*torchrun, *(launcher or ["--standalone"]), ROOT / script, *words]
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)], stdout=log.open("w"), stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=log.parent,
        )  # fmt: skip
        self.ranks = {}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for pid in (self.process.pid, *self.ranks.values()):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def until(self, true):
        """Wait until true(), which is asked often; the ranks are known from then on."""
        end = time.monotonic() + PATIENCE
        while not true():
            assert self.process.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.01)
        for pid in (
            Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ):
            told = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            self.ranks |= {int(x[5:]): int(pid) for x in told if x.startswith("RANK=")}

    def said(self):
        return self.log.read_text()

    def ends(self, code=0):
        """Wait for the end of torchrun, which is to come with this exit code."""
        assert self.process.wait(PATIENCE) == code, self.said()
        return self.said()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid, seconds=30):
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A store, a labelled task and an encoder of its bands, in a folder."""
    folder = tmp_path_factory.mktemp("cluster")
    write_store(folder / "pairs")
    write_scenes(folder / "plots")
    torch.manual_seed(0)
    encoder = ViT(in_channels=2, patch_size=4, dim=32, depth=1, heads=2)
    save_encoder(encoder, folder / "encoder.safetensors")
    return folder


def words_for(script, work, out, steps):
    if script == "train.py":
        return command(work / "pairs", out, steps=steps, save_every=5)
    flags = ["--protocol", "finetune", "--lr", "0.003", "--epochs", str(steps)]
    return words_of(work / "plots", work / "encoder.safetensors", out, *flags)


def saved(script, out):
    """Whether a run has got somewhere: some steps in a checkpoint."""
    return bool([*out.glob("ckpt.pt" if script == "train.py" else "ckpt*seed0.pt")])


def losses(script, out):
    if script == "train.py":
        return [entry["loss"] for entry in log_of(out)]
    return losses_of(json.loads((out / "results.jsonl").read_text()))


@pytest.fixture(scope="module")
def whole(work):
    """The losses of a script's run of one process, that nothing happens to."""

    def run(script, steps):
        out = work / f"whole-{script}-{steps}"
        if not out.exists():
            words = [str(word) for word in words_for(script, work, out, steps)]
            if script == "train.py":
                train.main(train.parse_args(words))
            else:
                finetune.main(words)
        return losses(script, out)

    return run


def test_a_worker_that_dies_brings_the_job_back(work, whole, tmp_path):
    out = tmp_path / "run"
    words = words_for("train.py", work, out, 60)
    with Job("train.py", words, tmp_path / "log", 2, "--standalone", "--max-restarts=3") as job:
        job.until(lambda: "step 00006" in job.said())
        for rank, again in ((1, 1), (0, 2)):  # the first rank's lock dies with it
            os.kill(job.ranks[rank], signal.SIGKILL)
            job.until(lambda again=again: job.said().count("steps ") > again)
        said = job.ends()
    assert said.count("steps ") == 3 and "Traceback" not in said
    assert "another rank is gone" in said
    assert [e["step"] for e in log_of(out)] == list(range(1, 61))
    assert losses("train.py", out) == pytest.approx(whole("train.py", 60), rel=1e-4)


@pytest.mark.parametrize("script, steps", [("train.py", 100), ("finetune.py", 40)])
def test_two_nodes_of_which_one_loses_its_launcher(work, whole, tmp_path, script, steps):
    """Two agents over loopback; only the first has the folder. torchrun of the second is killed,
    its rank stops by itself and takes the others along; both start again and go on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def start(node, more=()):
        words = [*words_for(script, work, tmp_path / f"node{node}" / "run", steps), *more]
        launcher = f"--nnodes=2 --node-rank={node} --master-addr=127.0.0.1 --master-port={port}"
        return Job(script, words, tmp_path / f"log{node}", 1, *launcher.split())

    out = tmp_path / "node0" / "run"
    with start(0) as first, start(1) as second:
        first.until(lambda: saved(script, out))
        second.until(lambda: True)
        os.kill(second.process.pid, signal.SIGKILL)
        assert gone(second.ranks[1]) and gone(first.ranks[0])
        assert "the end of torchrun: stop" in second.said() or script == "finetune.py"
        first.process.terminate()  # as srun --kill-on-bad-exit does
        assert first.process.wait(60) is not None and "Traceback" not in second.said()
    with start(0) as first, start(1) as second:
        first.ends(), second.ends()
    assert not (tmp_path / "node1" / "run").exists()  # only the first rank writes
    assert losses(script, out) == pytest.approx(whole(script, steps), rel=1e-4)
    if script == "train.py":
        with start(0, ["--lr", "0.5"]) as first, start(1, ["--lr", "0.5"]) as second:
            said = [job.ends(1) for job in (first, second)]  # refused on both
        assert all("--override" in each for each in said), said


@pytest.mark.parametrize("script, name", [
    ("train.py", "SIGTERM"), ("train.py", "SIGINT"), ("train.py", "SIGUSR1"),
    ("finetune.py", "SIGTERM"),
])  # fmt: skip
def test_signals_end_all_ranks_with_0_and_the_same_line_goes_on(
    work, whole, tmp_path, script, name
):
    out, steps = tmp_path / "run", 100 if script == "train.py" else 40
    words = words_for(script, work, out, steps)
    handled = "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"
    with Job(script, words, tmp_path / "log", 2, "--standalone", handled) as job:
        job.until(lambda: saved(script, out))
        job.process.send_signal(getattr(signal, name))
        job.process.wait(PATIENCE)
        assert all(gone(pid) for pid in job.ranks.values())
        assert f'{script}", line' not in job.said()  # no traceback but torchrun's own
    if script == "train.py":
        assert (out / "stopped").read_text() == f"asked to by {name}\n"
    words = [str(word) for word in words]
    if script == "train.py":  # on one rank, where it was on two
        train.main(train.parse_args(words))
        assert not (out / "stopped").exists()
    else:
        finetune.main(words)
    assert losses(script, out) == pytest.approx(whole(script, steps), rel=1e-4)


@pytest.mark.parametrize("flags", [dict(mr_size=30), dict(steps="none")], ids=str)
def test_several_ranks_say_it_once(work, tmp_path, flags):
    words = command(work / "pairs", tmp_path / "run", **flags)
    with Job("train.py", words, tmp_path / "log", 2) as job:
        said = job.ends(1)
    assert sum(line.startswith("train.py: ") for line in said.splitlines()) == 1


def test_a_run_that_is_killed_goes_on_bit_for_bit():
    """Before every 20th of its file operations, and at a few random moments."""
    words = [ROOT / "tests" / "kills.py", "--every", "20", "--kills", "4"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0 and "4 kills" in done.stdout, done.stdout + done.stderr
