"""Where tests find reference vectors and real imagery, which lie beside the project."""

import io
import os
import re
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("CROSSSCALE_SHARED", ROOT.parent / "shared")).resolve()

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings


@contextmanager
def refused(kind, *mentions):
    """What runs within raises `kind`, exactly, with one line that names each of the mentions: the
    file, the flag, the number that matters. `.line` of what is given then holds it.

    kind: a type or several; SystemExit of a script: it ends with 2 and the line ends its stderr.
    """
    error, said = SimpleNamespace(line=None), io.StringIO()
    with redirect_stderr(said), pytest.raises(kind) as caught:
        yield error
    error.line = str(caught.value)
    if kind is SystemExit:
        assert caught.value.code == 2, said.getvalue()
        error.line = re.split(r"[\r\n]", said.getvalue().rstrip("\n"))[-1]  # after usage or a bar
        assert re.match(r"\w+\.py: |python -m [\w.]+: |.*: error: ", error.line), said.getvalue()
    else:
        assert caught.type in (kind if isinstance(kind, tuple) else (kind,)), repr(caught.value)
    assert error.line.strip() and "\n" not in error.line, error.line
    missing = [each for each in map(str, mentions) if each not in error.line]
    assert not missing, f"{missing} not in: {error.line}"


@pytest.fixture(scope="session")
def golden():
    """golden("name") -> dict of tensors; the smallest come with the tests."""

    def load(name):
        for folder in (SHARED / "golden", ROOT / "tests" / "golden"):
            if (folder / f"{name}.npz").is_file():
                with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
                    return {
                        key: torch.from_numpy(np.asarray(file[key]))
                        if file[key].dtype.kind in "fiu"
                        else file[key]
                        for key in file.files
                    }
        pytest.skip(f"no {name}.npz in CROSSSCALE_SHARED/golden ({SHARED})")

    return load


@pytest.fixture(scope="session")
def real():
    """real("folder/file") -> path of real imagery, or skip."""

    def find(name):
        path = SHARED / "data" / name
        if not path.exists():
            pytest.skip(f"no {name} in CROSSSCALE_SHARED/data ({SHARED})")
        return path

    return find


def gradient_norms(monkeypatch):
    """A list that gains the norm of all gradients whenever AdamW takes a step."""
    norms, step = [], torch.optim.AdamW.step

    def spy(self, *args, **options):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm([g for g in grads if g is not None]).item())
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    return norms
