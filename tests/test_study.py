"""The study: cells, what they say, and that pages quote what files hold."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, refused

import study
import train

TINY = study.SIZES["minute"]


def facts(row, seed=0, miou=0.3, objective="ijepa", rank=50.0):
    return {
        **study.Cell(objective, row, seed)._asdict(),
        "scores": {"ridge": {"miou": miou, "val_miou": miou}},
        "health": {"loss": 1.0, "rank": rank, "place": 0.1, "cosine": 0.2},
        "seconds": 60, "device": "cpu", "torch": "2", "commit": "abc",
    }  # fmt: skip


@pytest.fixture
def out(tmp_path):
    (tmp_path / "cells").mkdir()
    return tmp_path


# ---- commands


@pytest.mark.parametrize("objective", study.OBJECTIVES)
@pytest.mark.parametrize("row", study.ROWS)
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
    compared |= {"untrained": {"steps", "lr", "vicreg"}, "hr": {"crop_scale"}}.get(row, set())
    compared |= {"vicreg"} if "paper" in row else set()
    compared |= {"hr_share"} if "hr-share" in row else set()
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
    size = TINY._replace(seeds=2)
    study.make_all(study.cells_of(size), size, out, jobs)
    made = [words for words in log if words[0] == "train.py"]
    assert len(made) == 2 * len(study.COMPARED)
    at = {str(words[words.index("--out") + 1]).split("/")[-1]: k for k, words in enumerate(made)}
    for seed in (0, 1):
        assert at[f"ijepa-hr-s{seed}"] < at[f"ijepa-sa-s{seed}"]
    found = study.read_cells(out)
    assert {f["scores"]["ridge"]["miou"] for f in found} == {0.5}
    assert all(f["command"].startswith("python train.py") for f in found)
    study.make_all(study.cells_of(size), size, out, jobs)
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


def test_a_cell_that_another_process_makes_is_left_alone(out, monkeypatch):
    log, cell = [], study.Cell("ijepa", "mr", 0)
    monkeypatch.setattr(study, "call", fake(out, log))
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    lock = out / "cells" / f"{cell.name}.lock"
    with subprocess.Popen([sys.executable, "-c", hold, str(lock)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as other:  # fmt: skip
        other.stdout.readline()
        study.make(cell, TINY, out)
        assert log == []
        other.stdin.close()
    study.make(cell, TINY, out)
    assert len(log) == 2


def test_a_command_that_fails_ends_the_study_with_its_words(out, capsys):
    with refused(ValueError, "train.py", "code 2", "--banana"):
        study.call(["train.py", "--banana"], quiet=True)


# ---- what cells say


def test_an_interval_is_that_of_paired_differences():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        d = 2 + rng.standard_normal(5)
        mean, low, high, _ = study.interval(d, 500)
        assert mean == pytest.approx(d.mean()) and low <= mean <= high
        held += low <= 2 <= high
    assert held > 140
    assert study.interval([1.0, 1.0, 1.0])[:3] == (1, 1, 1)
    assert np.isnan(study.interval([1.0])[1:]).all()


def test_the_smallest_difference_is_found_in_four_of_five_studies():
    """With as many seeds, and a spread of 1, a t-test at 5 % finds what `interval` says."""
    rng = np.random.default_rng(0)
    for n in (3, 5, 10):
        k = n - 2
        effect = (study.T975[k] + study.T80[k]) / np.sqrt(n)
        d = effect + rng.standard_normal((20_000, n))
        t = d.mean(1) / (d.std(1, ddof=1) / np.sqrt(n))
        assert 0.72 < (t > study.T975[k]).mean() < 0.9


def test_a_claim_is_sa_minus_its_best_control():
    scores = {
        "mr": {0: 0.30, 1: 0.30, 2: 0.3},
        "sa-interp": {0: 0.35, 1: 0.33, 2: 0.34},
        "sa": {0: 0.50, 1: 0.48, 2: 0.49},
    }
    said = study.claim(scores)
    assert "+15.0 points" in said and "sa-interp" in said and "3 seeds" in said
    assert "nothing is shown" not in said
    assert "nothing is shown" in study.claim(scores | {"sa": {0: 0.30, 1: 0.36, 2: 0.35}})
    two = study.claim({row: {0: seeds[0], 1: seeds[1]} for row, seeds in scores.items()})
    assert "two seeds" in two and "interval" not in two
    one = study.claim({"mr": {0: 0.3}, "sa": {0: 0.5, 1: 0.5}})
    assert "one seed" in one and "+20.0" in one
    assert "No claim" in study.claim({"sa": {0: 0.5}})


def test_a_table_says_who_collapsed_and_over_how_many_seeds():
    cells = [facts("mr", rank=1.2), facts("sa", 0, 0.5), facts("sa", 1, 0.7)]
    text = study.table(cells)
    assert "| mr (collapsed) | 1 | 30.0 |" in text
    assert "| sa | 2 | 60.0 ± 14.1 |" in text and "| 10 % | 50 | 0.20 | 1.0 |" in text
    assert text.index("| mr") < text.index("| sa")


def test_the_ceiling_stands_in_the_untrained_row_alone(out, monkeypatch):
    log = []
    monkeypatch.setattr(study, "call", fake(out, log))
    size = TINY._replace(rows=("untrained", "mr"), ceiling="--protocol finetune --no-crop")
    study.make_all(study.cells_of(size), size, out, 1)
    (scratch,) = (words for words in log if "finetune" in words)
    assert scratch[scratch.index("--encoder") + 1].startswith("random:")
    rows = study.table(study.read_cells(out)).splitlines()
    assert f"| {study.CEILING} | ridge |" in rows[2]
    assert "| untrained | 1 | 50.0 | 50.0 |" in rows[4] and "| mr | 1 |  | 50.0 |" in rows[5]


def test_a_few_steps_claim_nothing():
    cells = [facts("mr") | {"steps": 4}, facts("sa", 0, 0.5) | {"steps": 4}]
    assert "4 steps say nothing" in study.table(cells) and "adds" not in study.table(cells)
    assert "adds +20.0" in study.table([cell | {"steps": 400} for cell in cells])


def test_an_idea_without_a_train_py_is_refused(tmp_path):
    with refused(ValueError, "--idea", "train.py"):
        study.main(study.parse_args(["--idea", str(tmp_path), "--out", str(tmp_path / "out")]))


def test_collected_rows_are_means_over_pretraining_seeds(tmp_path, capsys):
    for seed, values in ((0, (0.2, 0.4)), (1, (0.5,))):
        folder = tmp_path / f"s{seed}"
        folder.mkdir()
        about = {"objective": "ijepa", "variant": "sa", "seed": seed}
        rows = [{"task": "mados", "protocol": "linear", "pretraining": about, "miou": v}
                for v in values]  # fmt: skip
        (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    study.main(study.parse_args(["--collect", str(tmp_path / "s0"), str(tmp_path / "s1")]))
    said = capsys.readouterr().out
    assert "| mados | linear | ijepa | sa | 2 | 40.0 ± 14.1 |" in said


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


def test_gains_are_points_of_a_curve_with_the_usual_value_among_them():
    scores = {"sa": {0: 0.5, 1: 0.6}, "sa --hr-share 0.25": {0: 0.4}, "mr": {0: 0.3, 1: 0.4}}
    curves, levels = study.gains(scores)
    assert curves == {"--hr-share": {0.25: [0.4], 1: [0.5, 0.6]}}
    assert levels == {"mr": pytest.approx(0.35)}
    assert study.gains({"sa": {0: 0.5}}) == ({}, {})
    order = study.cells_of(study.SIZES["laptop"])
    assert order[-1].row in study.CHANGED and order[0].row not in study.CHANGED
    assert len(set(order)) == len(order)


# ---- pictures


def test_tokens_that_are_shown_lie_deep_in_parcels_of_different_classes():
    label = torch.zeros(64, 64, dtype=torch.uint8)
    label[:, 32:] = 2
    label[40:, :16] = 1
    shown = study.tokens_to_show(label, (8, 8))
    assert len(shown) == 3
    for kind, (row, col) in enumerate(shown):
        assert (label[8 * row : 8 * row + 8, 8 * col : 8 * col + 8] == kind).all()


def test_the_part_of_a_picture_on_the_ground_of_tokens():
    picture = torch.arange(64).view(8, 8)
    part = [slice(1, 3), slice(2, 4)]
    assert study.cut(picture, (4, 4), part).equal(picture[2:6, 4:8])
    assert study.cut(picture[..., None].expand(8, 8, 3), (4, 4), part).shape == (4, 4, 3)


# ---- pages


@pytest.mark.parametrize("page", ["README.md", "RESULTS.md"])
def test_pages_quote_what_the_cells_say(page):
    text = (ROOT / page).read_text()
    for name, block in re.findall(r"<!-- (\w+) -->\n(.*?)<!-- end -->", text, re.DOTALL):
        cells = (ROOT / "results" / name / "cells.jsonl").read_text().splitlines()
        assert block == study.table(map(json.loads, cells)), name


def test_publishing_fills_a_block_and_leaves_the_others(out, monkeypatch):
    page = "a\n<!-- demo -->\n<!-- end -->\nb\n<!-- laptop -->\nold\n<!-- end -->\n"
    for name in ("README.md", "RESULTS.md"):
        (out / name).write_text(page)
    (out / "scores.png").write_text("picture")
    monkeypatch.setattr(study, "HERE", out)
    for report in ("one\n", "two\n"):
        study.publish(out, "demo", [], report)
        assert (out / "README.md").read_text() == page.replace("demo -->\n", f"demo -->\n{report}")
    assert (out / "results" / "demo" / "scores.png").exists()
