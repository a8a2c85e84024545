"""The report: what cells say, in numbers, tables and pages that quote what files hold."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, refused

import report


def facts(row, seed=0, miou=0.3, objective="ijepa", rank=50.0):
    return {
        "objective": objective, "row": row, "seed": seed,
        "scores": {"ridge": {"miou": miou, "val_miou": miou}},
        "health": {"loss": 1.0, "rank": rank, "place": 0.1, "cosine": 0.2},
        "command": "", "seconds": 60, "device": "cpu", "torch": "2", "commit": "abc",
    }  # fmt: skip


@pytest.fixture
def out(tmp_path):
    (tmp_path / "cells").mkdir()
    return tmp_path


# ---- what cells say


def test_an_interval_is_that_of_paired_differences():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        d = 2 + rng.standard_normal(5)
        mean, low, high, _ = report.interval(d, 500)
        assert mean == pytest.approx(d.mean()) and low <= mean <= high
        held += low <= 2 <= high
    assert held > 140
    assert report.interval([1.0, 1.0, 1.0])[:3] == (1, 1, 1)
    assert np.isnan(report.interval([1.0])[1:]).all()


def test_the_smallest_difference_is_found_in_four_of_five_studies():
    """With as many seeds, and a spread of 1, a t-test at 5 % finds what `interval` says."""
    rng = np.random.default_rng(0)
    for n in (3, 5, 10):
        k = n - 2
        effect = (report.T975[k] + report.T80[k]) / np.sqrt(n)
        d = effect + rng.standard_normal((20_000, n))
        t = d.mean(1) / (d.std(1, ddof=1) / np.sqrt(n))
        assert 0.72 < (t > report.T975[k]).mean() < 0.9


def test_a_claim_is_sa_minus_its_best_control():
    scores = {
        "mr": {0: 0.30, 1: 0.30, 2: 0.3},
        "sa-interp": {0: 0.35, 1: 0.33, 2: 0.34},
        "sa": {0: 0.50, 1: 0.48, 2: 0.49},
    }
    said = report.claim(scores)
    assert "+15.0 points" in said and "sa-interp" in said and "3 seeds" in said
    assert "nothing is shown" not in said
    assert "nothing is shown" in report.claim(scores | {"sa": {0: 0.30, 1: 0.36, 2: 0.35}})
    two = report.claim({row: {0: seeds[0], 1: seeds[1]} for row, seeds in scores.items()})
    assert "two seeds" in two and "interval" not in two
    one = report.claim({"mr": {0: 0.3}, "sa": {0: 0.5, 1: 0.5}})
    assert "one seed" in one and "+20.0" in one
    assert "no claim" in report.claim({"sa": {0: 0.5}})
    own = scores | {"sa-mse": {0: 0.6}, "mse-interp": {0: 0.5}}
    assert "sa-mse" not in report.claim(own)
    assert "+10.0 points to the best control (mse-interp)" in report.claim(own, "sa-mse")


def test_a_table_says_who_collapsed_and_over_how_many_seeds():
    cells = [facts("mr", rank=1.2), facts("sa", 0, 0.5), facts("sa", 1, 0.7)]
    text = report.table(cells)
    assert "| mr (collapsed) | 1 | 30.0 |" in text
    assert "| sa | 2 | 60.0 ± 14.1 |" in text and "| 10 % | 50 | 0.20 | 1.0 |" in text
    assert text.index("| mr") < text.index("| sa")


def test_trials_have_a_table_of_their_own():
    tried = [
        facts("mr", miou=v) | {"trial": True, "lr": lr} for lr, v in ((1e-3, 0.3), (2e-3, 0.2))
    ]
    kept = facts("mr", miou=0.3) | {"lr": 1e-3}
    assert "| mr | **30.0** | 20.0 |" in report.search_table([*tried, kept])
    assert "| mr | 1 | 0.001 | 30.0 |" in report.table([*tried, kept])
    assert report.search_table([kept]) == ""


def test_what_hr_adds_by_each_probe():
    """The best control is chosen for each probe by itself."""
    cells = [facts("mr", s) for s in (0, 1)] + [facts("sa-interp", s, 0.4) for s in (0, 1)]
    cells += [facts("sa", s, 0.5) for s in (0, 1)]
    for cell in cells:
        value = {"mr": 0.9, "sa-interp": 0.1, "sa": 0.6 + 0.02 * cell["seed"]}[cell["row"]]
        cell["scores"]["kNN"] = {"miou": value, "val_miou": value}
    said = report.claims_table(report.by_row(cells)["ijepa"])
    assert "| sa | ridge | 50.0 ± 0.0 | sa-interp 40.0 ± 0.0 | +10.0 | +10.0 to +10.0 | 2 |" in said
    assert "| sa | kNN | 61.0 ± 1.4 | mr 90.0 ± 0.0 | -29.0 | -30.0 to -28.0 | 2 |" in said


def test_a_task_without_headroom_is_said_to_tell_nothing():
    zero, ceiling = facts("pixels", miou=0.2), facts("untrained", miou=0.3)
    for top, words in ((0.34, "too few"), (0.66, "36.0 points")):
        zero["scores"][report.CEILING] = {"miou": top, "val_miou": top}
        rows = report.by_row([zero, ceiling])["ijepa"]
        assert words in report.headroom(rows)
    assert report.headroom({"mr": {}}) == ""


def test_a_few_steps_claim_nothing():
    cells = [facts("mr") | {"steps": 4}, facts("sa", 0, 0.5) | {"steps": 4}]
    assert "4 steps say nothing" in report.table(cells) and "adds" not in report.table(cells)
    assert "adds +20.0" in report.table([cell | {"steps": 400} for cell in cells])


def test_collected_rows_are_means_over_pretraining_seeds(tmp_path):
    for seed, values in ((0, (0.2, 0.4)), (1, (0.5,))):
        folder = tmp_path / f"s{seed}"
        folder.mkdir()
        about = {"objective": "ijepa", "variant": "sa", "seed": seed}
        rows = [{"task": "mados", "protocol": "linear", "pretraining": about, "miou": v}
                for v in values]  # fmt: skip
        (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    said = report.collect([tmp_path / "s0", tmp_path / "s1"])
    assert "| mados |  | linear | 1 | ijepa | sa | 2 | 40.0 ± 14.1 |" in said
    # labels, data and pretraining tell rows apart; encoders without pretraining have their name
    other = {"task": "mados", "protocol": "linear", "pretraining": about, "miou": 0.9}
    for k, change in enumerate((
        {"settings": {"labels": 0.1}}, {"data_hash": "f00"}, {"pretraining": about | {"step": 9}},
        {"pretraining": {}, "encoder": "pixels"}, {"pretraining": {}, "encoder": "random"},
    )):  # fmt: skip
        (tmp_path / f"o{k}").mkdir()
        (tmp_path / f"o{k}" / "results.jsonl").write_text(json.dumps(other | change) + "\n")
    said = report.collect([tmp_path / name for name in ("s0", "s1", *(f"o{k}" for k in range(5)))])
    assert len(said.splitlines()) == 2 + 1 + 5 and said.count("| 90.0 |") == 5
    (tmp_path / "o0" / "results.jsonl").write_text('{"task')
    with refused(ValueError, f"{tmp_path / 'o0'}", "line 1"):
        report.collect([tmp_path / "o0"])
    with refused(ValueError, f"{tmp_path / 'none'}", "no results of finetune.py"):
        report.collect([tmp_path / "none"])


def test_gains_are_points_of_a_curve_with_the_usual_value_among_them():
    scores = {"sa": {0: 0.5, 1: 0.6}, "sa --hr-share 0.25": {0: 0.4}, "mr": {0: 0.3, 1: 0.4}}
    curves, levels = report.gains(scores)
    assert curves == {"--hr-share": {0.25: [0.4], 1: [0.5, 0.6]}}
    assert levels == {"mr": pytest.approx(0.35)}
    assert report.gains({"sa": {0: 0.5}}) == ({}, {})


# ---- pictures


def test_tokens_that_are_shown_lie_deep_in_parcels_of_different_classes():
    label = torch.zeros(64, 64, dtype=torch.uint8)
    label[:, 32:] = 2
    label[40:, :16] = 1
    shown = report.tokens_to_show(label, (8, 8))
    assert len(shown) == 3
    for kind, (row, col) in enumerate(shown):
        assert (label[8 * row : 8 * row + 8, 8 * col : 8 * col + 8] == kind).all()


def test_the_part_of_a_picture_on_the_ground_of_tokens():
    picture = torch.arange(64).view(8, 8)
    part = [slice(1, 3), slice(2, 4)]
    assert report.cut(picture, (4, 4), part).equal(picture[2:6, 4:8])
    assert report.cut(picture[..., None].expand(8, 8, 3), (4, 4), part).shape == (4, 4, 3)


# ---- pages


@pytest.mark.parametrize("page", ["README.md", "RESULTS.md"])
def test_pages_quote_what_the_cells_say(page):
    text = (ROOT / page).read_text()
    for block, said in re.findall(r"<!-- ([\w-]+) -->\n(.*?)<!-- end -->", text, re.DOTALL):
        name = block.split("-")[0]
        cells = (ROOT / "results" / name / "cells.jsonl").read_text().splitlines()
        assert said == report.blocks(name, [*map(json.loads, cells)])[block], block


def test_publishing_fills_a_block_and_leaves_the_others(out, monkeypatch):
    page = "a\n<!-- demo -->\n<!-- end -->\nb\n<!-- laptop -->\nold\n<!-- end -->\n"
    for name in ("README.md", "RESULTS.md"):
        (out / name).write_text(page)
    (out / "scores.png").write_text("picture")
    (out / "TRACK.md").write_text(report.TRACK)
    for score in (0.3, 0.4):
        cells = [facts("mr", miou=score)]
        report.publish(out, out, "demo", cells)
        said = page.replace("demo -->\n", f"demo -->\n{report.table(cells)}")
        assert (out / "README.md").read_text() == said
    assert (out / "results" / "demo" / "scores.png").exists()


def test_a_study_of_the_tracks_budget_gives_its_first_rows(out):
    for name in ("README.md", "RESULTS.md"):
        (out / name).write_text("")
    (out / "TRACK.md").write_text(report.TRACK)
    command = "python train.py --out x --steps 400 --variant {} --lr 0.002"
    cells = [facts("mr", s) | {"command": command.format("mr")} for s in range(3)]
    taught = command.format("sa --hr-teacher out/laptop/runs/ijepa-hr-s{}")
    cells += [facts("sa", s, 0.5) | {"command": taught.format(s)} for s in range(4)]
    cells += [facts("sa-mse", 0) | {"command": command}]  # too few seeds
    cells += [facts("hr", s) | {"command": command.replace("400", "800")} for s in range(3)]
    for _ in range(2):
        report.publish(out, out, "laptop", cells)
        rows = (out / "TRACK.md").read_text().splitlines()
        assert len(rows) == len(report.TRACK.splitlines()) + 2
        assert rows[-2].startswith("| `--variant mr --lr 0.002` | 30.0 ± 0.0 |  | abc |")
        assert rows[-1].startswith("| `--variant sa --hr-teacher {hr} --lr 0.002` | 50.0 ± 0.0 | +")
