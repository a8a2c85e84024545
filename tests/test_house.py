"""The rules of the house, held over the syntax trees: who may know whom, and what nobody may do."""

import ast
import graphlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT

# What a room may import at module level, beside the standard library, itself, imagery.bands and
# files, which know nobody; * stands for any library. What pretraining on a packed store needs is in
# the first block alone.
ROOMS = {
    "files": "torch",
    "kernels": "torch triton",
    "kernels.forms": "torch",  # without Triton, which not every machine has
    "affinity": "torch kernels",
    "vit": "torch einops",
    "model": "torch einops vit",
    "weights": "torch einops numpy safetensors model",
    "data": "torch numpy safetensors",
    "figures": "torch einops matplotlib",
    "health": "torch",
    "run": "torch health",
    "flags": "torch model run",
    "train": "torch einops numpy safetensors flags health affinity data model weights run figures",
    # what images on a disk need, and what judges an encoder
    "imagery": "* data figures",
    "imagery.bands": "",
    "datasets": "* imagery",
    "tiles": "torch numpy tqdm",
    "segment": "* tiles model weights",
    "scores": "numpy",
    "finetune": "* scores tiles segment weights model data run datasets imagery figures",
    "predict": "* segment weights model data run datasets imagery figures",
    "report": "* health imagery figures",
    "study": "* report run health imagery figures",
    "textbook": "torch affinity vit",
    "counted": "torch affinity kernels",  # without Triton, until a function is called
    "bench": "* affinity kernels model vit data run textbook counted",
}
SCRIPTS = {"train", "finetune", "predict", "study", "bench"}
LONGEST = 150  # lines of a function
MACHINE = re.compile(r"(?<![\w.~})])/(home|Users|root|work|mnt|scratch)/\w|[A-Z]:\\Users")

TREES = {
    file.relative_to(ROOT): ast.parse(file.read_text("utf-8"))
    for file in sorted([*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")])
}
MODULES = {
    ".".join(file.with_suffix("").parts): tree
    for file, tree in TREES.items()
    if file.parts[0] != "tests" and file.stem != "__init__"
}


def imports(node, everywhere=False):
    """The dotted names that a tree imports; those inside functions only with `everywhere`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            for alias in child.names:  # of `from imagery import pack` pack is a file
                full = f"{child.module}.{alias.name}"
                yield full if full in MODULES else child.module
        elif everywhere or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from imports(child, everywhere)


@pytest.mark.parametrize("module", MODULES)
def test_a_room_knows_only_whom_it_may(module):
    room = module if module in ROOMS else module.split(".")[0]
    may = {room, "imagery.bands", "files", *sys.stdlib_module_names, *ROOMS[room].split()}

    def allowed(name):
        first = name.split(".")[0]
        return name in may or first in may or ("*" in may and first not in ROOMS)

    assert [name for name in imports(MODULES[module]) if not allowed(name)] == []


def test_no_circle_of_imports():
    graph = {name: set(imports(tree)) & MODULES.keys() for name, tree in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_nobody_imports_a_script():
    found = {(name, other) for name, tree in MODULES.items() for other in imports(tree, True)}
    assert {pair for pair in found if pair[1] in SCRIPTS} == set()


def test_no_function_is_long():
    long = {
        f"{file}: {node.name}": lines
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (lines := node.end_lineno - node.lineno + 1) > LONGEST
    }
    assert long == {}


def test_packages_are_only_folders():
    inits = [file for file in TREES if file.name == "__init__.py"]
    assert [file for file in inits if (ROOT / file).stat().st_size] == []


def test_no_file_names_a_place_on_a_machine():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git checkout, which would tell the files that are tracked")
    files = [ROOT / name for name in done.stdout.splitlines() if name[-4:] not in (".npz", ".png")]
    texts = {file: file.read_text("utf-8") for file in files if file.is_file()}
    found = {str(file): MACHINE.search(text) for file, text in texts.items()}
    assert {file: match[0] for file, match in found.items() if match} == {}
