"""The study: cells, what they say, and that pages quote what files hold."""

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT, refused

import report
import study
import train

TINY = study.SIZES["minute"]


@pytest.fixture
def out(tmp_path):
    (tmp_path / "cells").mkdir()
    return tmp_path


# ---- commands


@pytest.mark.parametrize(
    "objective, row",
    [(objective, row) for objective in study.OBJECTIVES for row in study.ROWS
     if row != "pixels" and (objective == "latentmim" or row != study.TRUNK)],
)  # fmt: skip
def test_every_cell_is_a_command_of_train(out, objective, row):
    """Rows differ in what is compared: data, model, schedule, seed and budget are the same."""
    first, words = (
        study.training(study.Cell(objective, name, 3), study.SIZES["laptop"], out)
        for name in ("mr", row)
    )
    given, common = (train.parse_args([str(w) for w in each[1:]]) for each in (words, first))
    assert given.seed == 3 and given.objective == objective
    differ = {k for k, v in vars(given).items() if v != vars(common)[k]}
    compared = {"variant", "hr_teacher", "affinity_weight", "affinity_centre", "pos", "ratio"}
    compared |= {
        "untrained": {"steps", "lr", "vicreg"},
        "hr": {"crop_scale", "steps", "log_every"},
    }.get(row, set())
    compared |= {"vicreg"} if "paper" in row else set()
    compared |= {"hr_share"} if "hr-share" in row else set()
    compared |= {"store"} if "hr-shift" in row else set()
    compared |= {"affinity_on"} if "affinity-on" in row else set()
    assert differ <= compared | {"out"}
    assert given.lr == 0 or given.lr == common.lr
    assert ("{hr}" in study.ROWS[row]) == (given.hr_teacher != "ema")


def test_the_papers_commands_are_commands(capsys):
    study.main(study.parse_args(["--size", "paper"]))
    text = capsys.readouterr().out.replace("\\\n", " ")
    words = re.search(r"train\.py (.*)", text)[1]
    for name, value in (
        ("objective", "latentmim"),
        ("variant", "sa"),
        ("seed", "1"),
        ("name", "x"),
    ):
        words = words.replace(f"${name}", value)
    args = train.parse_args(words.split())
    assert (args.model, args.epochs, args.seed) == ("small", 300, 1)
    variants = re.search(r"for variant in (.*);", text)[1].split()
    assert set(variants) == set(train.VARIANTS)


# ---- making cells


def fake(out, log):
    """In place of `study.call`: writes what train.py and finetune.py would leave."""

    def call(words, quiet=False):
        words = [str(word) for word in words]
        log.append(words)
        if words[0] == "train.py":
            run = ROOT / words[words.index("--out") + 1]
            run.mkdir(parents=True, exist_ok=True)
            steps = int(words[len(words) - words[::-1].index("--steps")])
            entry = {"step": steps, "loss": 1.0, "rank": 9.0, "place": 0.1, "cosine": 0.0}
            (run / "log.jsonl").write_text(json.dumps(entry) + "\n")
            (run / "config.json").write_text(json.dumps({"steps": steps}))
            (run / "encoder.safetensors").touch()
        elif words[0] == "finetune.py":
            results = ROOT / words[words.index("--out") + 1]
            results.mkdir(parents=True, exist_ok=True)
            rows = [{"miou": value, "val_miou": 0.5} for value in (0.25, 0.75)]
            (results / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    return call


@pytest.mark.parametrize("jobs", [1, 3])
def test_cells_are_made_once_and_after_their_teacher(out, monkeypatch, jobs):
    log = []
    monkeypatch.setattr(study, "call", fake(out, log))
    size = TINY._replace(plan=(("ijepa", study.FEW, 2),))
    study.make_all(size, out, jobs)
    made = [words for words in log if words[0] == "train.py"]
    assert len(made) == 2 * len(study.FEW)
    at = {str(words[words.index("--out") + 1]).split("/")[-1]: k for k, words in enumerate(made)}
    for seed in (0, 1):
        assert at[f"ijepa-hr-s{seed}"] < at[f"ijepa-sa-s{seed}"]
    found = study.read_cells(out)
    assert {f["scores"]["ridge"]["miou"] for f in found} == {0.5}
    assert all(f["command"].startswith("python train.py") for f in found)
    assert study.make_all(size, out, jobs) == 0
    assert len([words for words in log if words[0] == "train.py"]) == len(made)


def test_a_run_that_was_stopped_goes_on(out, monkeypatch):
    log, cell = [], study.Cell("ijepa", "mr", 0)
    monkeypatch.setattr(study, "call", fake(out, log))
    run = out / "runs" / cell.name
    run.mkdir(parents=True)
    (run / "encoder.safetensors").touch()  # of a checkpoint on the way
    (run / "config.json").write_text('{"steps": 4}')
    (run / "log.jsonl").write_text('{"step": 2}\n')
    study.make(cell, TINY, out)
    assert log[0][0] == "train.py"
    (out / "cells" / f"{cell.name}.json").unlink()
    study.make(cell, TINY, out)  # trained, not judged
    assert [words[0] for words in log] == ["train.py", "finetune.py", "finetune.py"]


def holding(lock):
    """A process that holds the lock of a cell until it is closed."""
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)  # fmt: skip
    other.stdout.readline()
    return other


def test_a_cell_that_another_process_makes_is_left_alone(out, monkeypatch):
    log, cell = [], study.Cell("ijepa", "mr", 0)
    monkeypatch.setattr(study, "call", fake(out, log))
    with holding(out / "cells" / f"{cell.name}.lock") as other:
        study.make(cell, TINY, out)
        assert log == []
        other.stdin.close()
    study.make(cell, TINY, out)
    assert len(log) == 2


def test_what_another_process_left_undone_is_made_where_it_is_needed(out, monkeypatch):
    log = []
    monkeypatch.setattr(study, "call", fake(out, log))
    size = TINY._replace(plan=(("ijepa", ("hr", "sa"), 1),))
    with holding(out / "cells" / "ijepa-hr-s0.lock") as other, ThreadPoolExecutor(1) as pool:
        making = pool.submit(study.make_all, size, out, 1)
        time.sleep(0.3)
        assert log == []
        other.kill()
        making.result(timeout=60)
    assert [facts["row"] for facts in study.read_cells(out)] == ["hr", "sa"]


def test_a_command_that_fails_ends_the_study_with_its_words(out, capsys):
    with refused(ValueError, "train.py", "code 2", "--banana"):
        study.call(["train.py", "--banana"], quiet=True)


def test_every_row_tries_the_same_rates_and_keeps_the_best_of_its_own(out, monkeypatch):
    """Judged on validation ground, with seed 0; curves take the rate of `sa`."""
    log = []
    monkeypatch.setattr(study, "call", fake(out, log))
    rates = (1e-3, 2e-3, 4e-3)
    rows = ("hr", "mr", "sa", "sa --hr-share 0.25")
    size = TINY._replace(plan=(("ijepa", rows, 2),), rates=rates)

    def judged(encoder, *_):
        name = encoder[1].name
        best = "lr0.001" if "-mr-" in name else "lr0.004"
        return {"miou": 0.4, "val_miou": 0.9 if best in name else 0.1}

    monkeypatch.setattr(study, "judge", judged)
    study.make_all(size, out, 2)
    facts = study.read_cells(out)
    trials = {(f["row"], f["lr"]) for f in facts if f["trial"]}
    assert trials == {(row, lr) for row in ("mr", "sa") for lr in rates}
    kept = {(f["row"], f["seed"]): f["lr"] for f in facts if not f["trial"]}
    assert kept == {(row, seed): lr for seed in (0, 1) for row, lr in
                    (("hr", None), ("mr", 1e-3), ("sa", 4e-3), (rows[3], 4e-3))}  # fmt: skip
    runs = [words[words.index("--out") + 1].split("/")[-1] for words in log]
    assert len(runs) == len(set(runs)) == 2 + 2 * 3 + 2 + 2  # a trial is the run of seed 0
    for words in log:
        args = train.parse_args([str(w) for w in words[1:]])
        assert args.lr == (
            3e-3 if args.variant == "hr" else float(re.search("lr(.*)-s", str(args.out))[1])
        )


def test_no_cell_waits_for_a_later_one():
    for name in ("minute", "demo", "laptop", "gpu"):
        size, before = study.SIZES[name], set()
        for cell in study.cells_of(size):
            assert before >= set(cell.needs(size)), (name, cell)
            before.add(cell)
        assert len({study.path_of(cell, ROOT) for cell in before}) == len(before)


def test_pixels_and_the_ceiling_are_the_ends_of_a_table(out, monkeypatch):
    log = []
    monkeypatch.setattr(study, "call", fake(out, log))
    size = TINY._replace(plan=(("ijepa", ("pixels", "mr"), 2),), ceiling="--protocol finetune")
    study.make_all(size, out, 1)
    (scratch,) = (words for words in log if "finetune" in words)
    assert scratch[scratch.index("--encoder") + 1].startswith("random:")
    assert sum("pixels" in words for words in log) == 1
    rows = report.table(study.read_cells(out)).splitlines()
    assert f"| ridge | {report.CEILING} |" in rows[2]
    assert "| pixels | 1 | 50.0 | 50.0 |" in rows[4] and "| mr | 2 | 50.0 ± 0.0 |  |" in rows[6]


def test_an_idea_without_a_train_py_is_refused(tmp_path):
    with refused(ValueError, "--idea", "train.py"):
        study.main(study.parse_args(["--idea", str(tmp_path), "--out", str(tmp_path / "out")]))


def test_an_idea_adds_a_row_with_its_difference_to_the_record(out, monkeypatch, capsys):
    log = []
    monkeypatch.setattr(study, "HERE", out)
    monkeypatch.setattr(study, "call", fake(out, log))
    monkeypatch.setattr(study, "draw_ground", lambda *_: None)
    monkeypatch.setattr(study, "ROWS", dict(study.ROWS))
    for flags in ("--variant mr", "--variant sa"):
        study.track(out, flags, out)
    rows = (out / "TRACK.md").read_text().splitlines()
    assert rows[-2].startswith("| `--variant mr` | 50.0 ± 0.0 |  |")
    assert rows[-1].startswith("| `--variant sa` | 50.0 ± 0.0 | +0.0 |")
    assert len([words for words in log if words[0].endswith("train.py")]) == 6
