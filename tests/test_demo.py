import subprocess
import sys

import pytest
from conftest import ROOT, refused

import demo


def rows(*mious):
    iou = {"water": 0.5, "sea": None}
    return [{"miou": miou, "iou": iou, "seed": k} for k, miou in enumerate(mious)]


def test_meaning_is_what_the_numbers_say():
    said = demo.meaning(
        {"random": rows(0.50, 0.51), "mr": rows(0.40, 0.41), "sa": rows(0.60, 0.61)}, 700
    )
    for words in ("700 steps", "mr loses to random by -10.0", "sa beats random by +10.0", "+20.0"):
        assert words in said
    said = demo.meaning(
        {"random": rows(0.50, 0.55), "mr": rows(0.51, 0.56), "sa": rows(0.49, 0.54)}, 7
    )
    assert "mr equals random by +1.0" in said and "sa equals random by -1.0" in said


def test_table_shows_every_encoder_and_absent_classes(capsys):
    demo.print_table({"random": rows(0.25), "mr": rows(0.5, 0.7)})
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ["encoder", "mIoU", "+-", "water", "sea"]
    assert said[2].split() == ["random", "0.2500", "0.0000", "0.500", "nan"]
    assert said[3].split() == ["mr", "0.6000", "0.1414", "0.500", "nan"]


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = subprocess.run(
        [sys.executable, str(ROOT / "demo.py"), "--out", str(tmp_path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert str(tmp_path) in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("flag", ["--steps", "--seeds"])
def test_none_of_something_is_refused(tmp_path, monkeypatch, flag):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path / "new"), flag, "0"])
    with refused(SystemExit, flag, "0", "1"):
        demo.main()
    assert not (tmp_path / "new").exists()
