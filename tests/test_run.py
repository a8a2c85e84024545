"""What scripts share: ranks, a run's folder, errors said once, stopping."""

import os
import platform
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, refused

import run
from files import save_sealed
from run import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))

# ---- ranks


def test_only_the_first_rank_prints(capsys):
    for rank in (0, 1):
        ranks = Ranks(rank, 1, torch.device("cpu"))
        with pytest.raises(ValueError), ranks.quiet():
            print("out", rank)
            print("err", rank, file=sys.stderr)
            raise ValueError("told by whoever catches it")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("out 0\n", "err 0\n")
    print("again")
    assert capsys.readouterr().out == "again\n"


def test_alone_a_rank_shares_with_nobody():
    ranks, x = Ranks(0, 1, torch.device("cpu")), torch.ones(2)
    assert ranks.gather("x") == ["x"] and ranks.share(x, 0) is x and ranks.sum([x])[0] is x


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc, whose setting this is")
def test_pages_that_are_freed_are_kept():
    """A block of 64 MB comes from the heap, which stays, and not from the kernel by itself."""
    code = (
        "import ctypes, sys, torch, run\n"
        "if sys.argv[1] == 'keep': run.start_ranks('cpu')\n"
        "class Info(ctypes.Structure): _fields_ = [(k, ctypes.c_size_t) for k in 'abcdefghij']\n"
        "ask = getattr(ctypes.CDLL(None), 'mallinfo2', None)\n"
        "if ask: ask.restype = Info\n"
        "before = ask().d if ask else 0\n"  # hblks: blocks that mmap gave
        "held = torch.empty(2**24)\n"
        "print(ask().d - before if ask else 'old')"
    )
    mapped = {}
    for word in ("keep", "leave"):
        line = [sys.executable, "-c", code, word]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
        mapped[word] = done.stdout.strip()
    if mapped["keep"] == "old":
        pytest.skip("glibc before 2.33 does not tell")
    assert mapped["keep"] == "0" and int(mapped["leave"]) > 0


# ---- the run directory


def test_a_damaged_checkpoint_is_one_sentence(tmp_path):
    path = tmp_path / "ckpt.pt"
    save_sealed({"step": 3}, path)
    assert run.read_checkpoint(path, ALONE) == {"step": 3}
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], bytes([whole[0] ^ 1]) + whole[1:]):
        path.write_bytes(damaged)
        with refused(ValueError, path, "--fresh"):
            run.read_checkpoint(path, ALONE)


def test_a_disk_without_room_for_the_checkpoints(tmp_path):
    with refused(ValueError, tmp_path, "GB"):
        run.check_space(tmp_path, 10**18)
    run.check_space(tmp_path, 1)


def test_a_second_start_is_told_who_holds_the_run_until_that_dies(tmp_path):
    code = f"import run, pathlib, time; run.hold(pathlib.Path({str(tmp_path)!r})); print(1); "
    other = subprocess.Popen(
        [sys.executable, "-u", "-c", code + "time.sleep(60)"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert other.stdout.readline() == "1\n"
        with refused(ValueError, tmp_path, f"process {other.pid} "):
            run.hold(tmp_path)
    finally:
        other.kill()
        other.wait()
    run.hold(tmp_path)
    # what a kill at this moment leaves may be started in
    assert run.open_run(tmp_path, {}, ()) is None


def test_fresh_runs_are_numbered(tmp_path, monkeypatch):
    out = tmp_path / "run"
    for name in ("run", "run-2", "run-3"):
        assert run.fresh(out).name == name
        run.fresh(out).mkdir()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # the same run, its workers again
    assert run.fresh(out).name == "run-3"


def test_other_flags_stop_with_a_table_and_may_be_overridden(tmp_path, capsys):
    def config(**args):
        return {"args": args, "steps": 10, "precision": "float32", "chips": "abc"}

    config_now, then = config(lr=0.2, dim=16, out="b"), config(lr=0.1, dim=8, out="a")
    with refused(ValueError, tmp_path, "--lr 0.1, now 0.2 (and 1 more)", "--override lr dim"):
        run.compare(tmp_path, then, config_now, {"out"}, [])
    run.compare(tmp_path, then, config_now, {"out"}, ["lr", "dim"])
    assert "lr 0.2, 0.1 before" in capsys.readouterr().out
    assert config_now["overrides"] == [{"lr": (0.1, 0.2), "dim": (8, 16)}]
    with refused(ValueError, "--override width"):
        run.compare(tmp_path, then, config_now, {"out"}, ["width"])
    with pytest.raises(ValueError):
        run.compare(tmp_path, then, config(lr=0.2, dim=16, out="b"), {"out"}, ["lr"])
    table = capsys.readouterr().err
    assert "there" in table and "dim" in table and "lr" not in table


# ---- stopping


def test_a_signal_is_heard_a_step_later(monkeypatch):
    stops = run.Stop(ALONE)
    with run.Stop.listening():
        stops.share(torch.tensor(True))
        assert stops.hear() == []
        os.kill(os.getpid(), signal.SIGUSR1)
        assert run.Stop.asked == "SIGUSR1"
        assert stops.share(torch.tensor(False)).item() == 0
        assert stops.hear() == [(False, True)]
        assert stops.hear(now=True) == [(True, False)]
    assert run.Stop.asked is None


def test_ctrl_c_says_what_it_does_and_a_second_one_ends_at_once(monkeypatch, capsys):
    clock = iter([10.0, 10.1, 12.0])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    with run.Stop.listening():
        signal.raise_signal(signal.SIGINT)
        assert "stopping after this step" in capsys.readouterr().err
        signal.raise_signal(signal.SIGINT)  # torchrun's copy of the same one
        assert run.Stop.asked == "SIGINT" and capsys.readouterr().err == ""
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_rank_that_is_lost_is_one_sentence_and_no_fault_of_one_that_was_asked_to_stop(
    monkeypatch, capsys
):
    told = "[/src/gloo/pair.cc:537] Read error [10.0.0.1]:5: Connection reset by peer. Check more"

    def lose(args):
        raise RuntimeError(told)

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with refused(SystemExit, "train.py: another rank is gone (Read error", "it goes on"):
        run.script(lose, lambda: None, "it goes on", stops=True)
    run.script(lambda args: run.Stop.ask("SIGTERM") or lose(args), lambda: None, "x", stops=True)
    assert "train.py: stopped by SIGTERM; x" in capsys.readouterr().out
    told = "a mistake"
    with pytest.raises(RuntimeError, match=told):  # of ours: as Python says it
        run.script(lose, lambda: None, "x", stops=True)


def test_the_death_of_torchrun_asks_to_stop(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(os, "getppid", lambda: 42)
    stops = run.Stop(ALONE)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with run.Stop.listening():
        stops.share()
        assert stops.hear(now=True) == [(True, False)] and "torchrun" in run.Stop.asked
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # without it, whoever started it may leave
    monkeypatch.setattr(os, "getppid", lambda: 42)
    stops = run.Stop(ALONE)
    monkeypatch.setattr(os, "getppid", lambda: 2)
    stops.share()
    assert stops.hear(now=True) == [(False, False)]
