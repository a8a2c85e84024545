import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, refused
from stores import write_store

import bench

CPU = torch.device("cpu")
STEP = "step --device cpu --model tiny --batch 2 --grid 6 --rounds 2 --objective mae"


def rows_of(tmp_path, line, *more):
    """The rows that a command writes, called within this process."""
    out = tmp_path / "out.json"
    bench.main(bench.parse_args([*line.split(), *map(str, more), "--out", str(out)]))
    found = json.loads(out.read_text())
    assert {"device", "date", "commit", "python", "torch", "triton", "flags"} <= set(found)
    assert not list(tmp_path.glob("*.partial"))
    return found["rows"]


def test_gram_prints_a_table_and_writes_what_repeats_it(tmp_path, capsys):
    line = "gram --shape 2,9,16,2 --shape 1,40,16,1 --rounds 3 --device cpu"
    rows = rows_of(tmp_path, line)
    said = capsys.readouterr().out
    assert "2, 9, 16, 2" in said and "1, 40, 16, 1" in said
    assert [row["form"] for row in rows] == ["eager", "ours"] * 2
    for row in rows:
        assert len(row["forward_ms"]) == len(row["backward_ms"]) == len(row["both_ms"]) == 3
        assert row["both_floor_ms"] >= row["forward_floor_ms"] > 0
        assert row["gain"] > 0 and row["extra_mb"] > 0


@pytest.mark.parametrize(
    "line, mentions",
    [
        ("gram --shape 2,9,16", ["--shape", "2,9,16 is not B,N,D,R"]),
        ("gram --shape 0,9,16,1", ["--shape", "0,9,16,1 is not B,N,D,R"]),
        ("step --batch 0", ["--batch", "0 is not a whole number from 1 up"]),
        ("step --device abacus", ["--device", "abacus"]),
    ],
)
def test_bad_flags_are_named_before_any_work(line, mentions, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.parse_args(line.split())
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"bench.py {line.split()[0]}: ") and all(m in said for m in mentions)


def test_a_missing_folder_is_named_before_any_work():
    with refused(ValueError, "--out no/such/folder: no such folder"):
        bench.main(bench.parse_args("gram --out no/such/folder/x.json".split()))


def test_input_times_a_store_and_names_a_missing_one(tmp_path):
    store = write_store(tmp_path / "pairs")
    line = "input --device cpu --batch 4 --steps 2 --rounds 2 --size 16 --workers 0 --store"
    rows = rows_of(tmp_path, line, store)
    assert [row["form"] for row in rows] == ["DataLoader", "ours"]
    assert all(len(row["pairs_per_s"]) == 2 for row in rows)
    with refused(FileNotFoundError, tmp_path / "none"):
        rows_of(tmp_path, line, tmp_path / "none")


@pytest.mark.slow
def test_step_pairs_ours_with_the_textbooks(tmp_path):
    rows = rows_of(tmp_path, STEP)
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
    command += [str(ROOT / "bench.py"), *STEP.split(), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["form"], row["ranks"]) for row in rows] == [("1 rank", 1), ("2 ranks", 2)] * 2
    objective, _ = bench.build_objective("mae", "tiny", 6, seed=0)
    trainable = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    assert [row["reduced_bytes"] for row in rows] == [0, 4 * trainable] * 2
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_tools_say_what_they_do_a_second(tmp_path):
    rows = rows_of(tmp_path, "tools --device cpu --rounds 1 --model tiny --scenes 3 --size 128")
    assert [row["form"] for row in rows] == ["check", "linear probe", "predict"]
    for row, unit in zip(rows, ("pairs", "tiles", "px"), strict=True):
        assert len(row[f"{unit}_per_s"]) == 1 and row[f"{unit}_per_s"][0] > 0


def test_extra_memory_counts_the_peak():
    """Of a chain that holds two more matrices at once, the gradient's own size aside."""
    side = 512

    def form(student, teacher):
        return (student @ teacher).square().sum()

    square = torch.randn(side, side)
    found = bench.extra_memory(form, square, square) / (4 * side**2)
    assert 2 <= found <= 4


def test_linear_form_needs_a_quarter_of_eagers_memory():
    tokens = bench.draw_tokens((1, 1024, 64, 1), 0, CPU)
    eager = bench.extra_memory(partial(bench.gram_loss, backend="eager"), *tokens)
    assert bench.extra_memory(bench.gram_loss, *tokens) < eager / 4
