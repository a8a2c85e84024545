"""Where tests find reference vectors and real imagery, which lie beside the project."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("CROSSSCALE_SHARED", ROOT.parent / "shared")).resolve()

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings


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
