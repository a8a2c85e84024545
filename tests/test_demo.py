import subprocess
import sys

import pytest
from conftest import ROOT

import demo


def rows(*mious):
    iou = {"water": 0.5, "sea": None}
    return [{"miou": miou, "iou": iou, "seed": k} for k, miou in enumerate(mious)]


def test_meaning_is_what_the_numbers_say():
    said = demo.meaning(
        {"random": rows(0.50, 0.51), "mr": rows(0.40, 0.41), "sa": rows(0.60, 0.61)}, 700
    )
    assert "After 700 steps mr loses to random by -10.0 points, sa beats random by +10.0" in said
    assert "HR affinity adds +20.0 to mr" in said
    said = demo.meaning(
        {"random": rows(0.50, 0.55), "mr": rows(0.51, 0.56), "sa": rows(0.49, 0.54)}, 7
    )
    assert "mr equals random by +1.0 points, sa equals random by -1.0" in said


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
    assert "exists; remove it to run the demo anew, or name another" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("flag", ["--steps", "--seeds"])
def test_none_of_something_is_refused(tmp_path, monkeypatch, capsys, flag):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path / "new"), flag, "0"])
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    assert stopped.value.code == 2
    assert f"{flag}: 0 is not a whole number from 1 up" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
