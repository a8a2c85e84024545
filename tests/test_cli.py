"""What holds for all scripts together: help, imports without Triton, and what the README names."""

import functools
import importlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT, refused

SCRIPTS = (
    "train.py;finetune.py;predict.py;study.py;bench.py gram;data.py pack;data.py check;"
    "-m imagery.scenes"
).split(";")
FILES = [p.relative_to(ROOT) for d in (".", "datasets", "imagery") for p in ROOT.glob(f"{d}/*.py")]
MODULES = sorted(".".join(p.with_suffix("").parts) for p in FILES if p.stem != "__init__")


def python(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT)


@functools.cache  # importing torch takes seconds
def help_of(script):
    done = python(*script.split(), "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_help(script):
    text = help_of(script)
    # an option without help ends its line, and the next option follows
    bare = re.findall(r"^  (--[\w-]+)[^\n]*\n(?=  --|\n|$)", text, re.M)
    assert [flag for flag in bare if not re.search(rf"{flag}\b[^\n]*  \S", text)] == []
    assert not re.search(r"Path\(|default: None", text)  # what a user would not type


@pytest.mark.parametrize(
    "words", ["train --sto", "finetune --enc", "imagery.scenes --sce", "study --obj"]
)
def test_flags_are_never_abbreviated(words, monkeypatch):
    script, flag = words.split()
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", flag, "1"])
    with refused(SystemExit, flag):
        getattr(module, "parse_args", module.main)(*[None] * (script == "finetune"))


def test_everything_imports_without_triton():
    """As on macOS and Windows: the import system is told that Triton is not there."""
    code = f"import sys; sys.modules['triton'] = None\nimport {', '.join(MODULES)}"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_a_step_trains_without_triton(tmp_path):
    """The affinity loss and its gradient, with Triton hidden."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from affinity import gram_loss\n"
        "s = torch.randn(2, 5, 8, requires_grad=True)\n"
        "gram_loss(s, torch.randn(2, 20, 8)).backward(); assert s.grad.abs().sum() > 0"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_readme_names_what_is_there():
    readme = (ROOT / "README.md").read_text()
    for module, name in re.findall(r"`([\w.]+)\.(\w+)`", readme):
        if module in MODULES and name not in ("py", "png", "csv"):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
    for file in re.findall(r"`((?:[a-z]+/)?\w+\.(?:py|txt))`", readme):
        if file != "task/classes.txt":
            assert (ROOT / file).exists(), file
    flags = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", readme))
    flags -= {"--nproc", "--max-restarts", "--hidden"}  # torchrun's, and the example's
    helps = "".join(help_of(script) for script in SCRIPTS)
    assert sorted(f for f in flags if f not in helps) == []


@pytest.mark.parametrize("run", sorted(p.name for p in (ROOT / "runs").glob("*_*.sh")))
def test_published_runs_are_commands_of_train(run):
    import train

    text = (ROOT / "runs" / run).read_text().replace("\\\n", " ")
    words = re.search(r"train\.py (.*)", text)[1].replace('"$@"', "")
    words = re.sub(r'"\$\{\w+:-([^}]*)\}"', r"\1", words).split()
    args = train.parse_args(words)
    assert args.objective in run and str(args.store[0]).split("/")[-1] in run
    assert (args.model, args.epochs, args.variant) == ("small", 300, "sa")


def test_readme_says_how_long_the_method_is():
    told = re.findall(r"^\| `([\w/.]+)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    assert len(told) > 4
    for name, lines in told:
        files = [ROOT / name] if (ROOT / name).is_file() else [*(ROOT / name).glob("*.py")]
        there = sum(len(file.read_text().splitlines()) for file in files)
        assert abs(there - int(lines)) <= 0.1 * there, f"{name}: {there} lines"
