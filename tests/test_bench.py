import json
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
from stores import write_store

import bench

ROOT = Path(__file__).parent.parent


def run(*arguments):
    command = [sys.executable, "-W", "ignore", str(ROOT / "bench.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_gram_prints_a_table_and_writes_what_repeats_it(tmp_path):
    out = tmp_path / "gram.json"
    done = run("gram", "--shape", "2,9,16,2", "--shape", "1,40,16,1", "--rounds", "3",
               "--device", "cpu", "--no-compile", "--out", str(out))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2, 9, 16, 2" in done.stdout and "1, 40, 16, 1" in done.stdout
    found = json.loads(out.read_text())
    assert {"device", "date", "commit", "python", "torch", "triton", "flags"} <= set(found)
    assert [row["form"] for row in found["rows"]] == ["eager", "ours"] * 2
    for row in found["rows"]:
        assert len(row["forward_ms"]) == len(row["backward_ms"]) == len(row["both_ms"]) == 3
        assert row["both_floor_ms"] >= row["forward_floor_ms"] > 0
        assert row["loss_error"] < 1e-5 and row["grad_error"] < 1e-5
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shape", "2,9,16"], "bench.py: --shape 2,9,16: give B,N,D,R, four positive numbers"),
        (["--shape", "0,9,16,1"], "bench.py: --shape 0,9,16,1: give B,N,D,R"),
        (["--rounds", "0"], "bench.py: --rounds 0: give at least 1"),
        (["--device", "abacus"], "bench.py: --device abacus: no such device here; use cpu"),
        (["--out", "no/such/folder/x.json"], "bench.py: --out no/such/folder: no such folder"),
    ],
)
def test_bad_flags_are_named_before_any_work(arguments, message):
    done = run("gram", *arguments)
    assert done.returncode == 2 and done.stderr.startswith(message), done.stderr
    assert "Traceback" not in done.stderr


def test_input_times_a_store_and_names_a_missing_one(tmp_path):
    store = write_store(tmp_path / "pairs")
    line = ["input", "--device", "cpu", "--batch", "4", "--steps", "2", "--rounds", "2"]
    line += ["--size", "16", "--workers", "0", "--store"]
    done = run(*line, str(store), "--out", str(tmp_path / "x.json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["form"] for row in rows] == ["DataLoader", "ours"]
    assert all(len(row["pairs_per_s"]) == 2 for row in rows)
    done = run(*line, str(tmp_path / "none"))
    assert done.returncode == 2 and done.stderr.startswith(f"bench.py: {tmp_path}/none: no such")


def test_bad_flags_of_step():
    done = run("step", "--batch", "0")
    assert done.returncode == 2 and done.stderr == "bench.py: --batch 0: give at least 1\n"


STEP = "step --device cpu --model tiny --batch 2 --grid 6 --rounds 2 --objective mae".split()


def test_step_pairs_ours_with_the_textbooks(tmp_path):
    out = tmp_path / "step.json"
    done = run(*STEP, "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    forms = [(row["form"], row["affinity"]) for row in rows]
    assert forms == [("textbook", True), ("ours", True), ("textbook", False), ("ours", False)]
    for row in rows:
        parts = ["objective", "affinity", "backward", "optimizer", "ema"]
        assert list(row["parts"]) == [p for p in parts if row["affinity"] or p != "affinity"]
        assert len(row["seconds"]) == len(row["cpu_seconds"]) == 2
        assert row["flops"] > 0 and row["peak_bytes"] > 0 and not row["reduced_bytes"]
    for plain, ours in (rows[:2], rows[2:]):  # less work, less memory: counted, not timed
        assert ours["flops"] < plain["flops"]
        assert ours["peak_bytes"] < plain["peak_bytes"]
        assert ours["state_bytes"] < plain["state_bytes"]


@pytest.mark.slow
def test_ranks_say_what_they_reduce(tmp_path):
    out = tmp_path / "step.json"
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [str(ROOT / "bench.py"), *STEP, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["form"], row["ranks"]) for row in rows] == [("ours", 2)] * 2
    objective, _ = bench.build_objective(Namespace(seed=0, model="tiny", grid=6), "mae")
    trainable = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    assert rows[0]["reduced_bytes"] == 4 * trainable
    assert [path for path in tmp_path.iterdir()] == [out]


def test_extra_memory_counts_the_peak():
    """Of a chain that holds two more matrices at once, the gradient's own size aside."""
    side = 512

    def form(student, teacher):
        return (student @ teacher).square().sum()

    square = torch.randn(side, side)
    found = bench.extra_memory(form, square, square) / (4 * side**2)
    assert 2 <= found <= 4


def test_linear_form_needs_a_quarter_of_eagers_memory():
    tokens = bench.draw_tokens((1, 1024, 64, 1), 0, torch.device("cpu"), torch.float32)
    eager = bench.extra_memory(partial(bench.gram_loss, backend="eager"), *tokens)
    assert bench.extra_memory(bench.gram_loss, *tokens) < eager / 4
