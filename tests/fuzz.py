"""Damaged files to every reader of weights, checkpoints, stores and published sets: each is read,
or refused in a sentence that names the file.

    python tests/fuzz.py --seconds 60 --seed 0      as .ci/run does; hours by the flag

A seed gives the same files. What neither loads nor is refused by ValueError or FileNotFoundError in
one line, takes over 10 s or asks for more memory than a laptop has ends the run with its seed and
number, and the file is kept.
"""

import argparse
import contextlib
import io
import logging
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import layouts
import pair_layouts
from stores import write_store

from data import Store
from datasets.common import sets
from datasets.tasks import load_task
from files import save_sealed
from imagery import raster
from model import ViT
from run import Ranks, read_checkpoint, read_config
from segment import Segmenter, load_segmenter, save_segmenter
from weights import load_encoder, save_encoder

SLOW = 10  # seconds
MEMORY = 2**33  # bytes of address space beyond what the libraries take
PAIRS = {  # layouts that differ in their kinds of files, small ones
    "sen2venus": lambda root: pair_layouts.sen2venus(root, patches=1),
    "sen2naip": pair_layouts.sen2naip,
    "worldstrat": pair_layouts.worldstrat,
    "hdf5": lambda root: pair_layouts.hdf5(root / "sen2venus.hdf5"),
}


def samples(folder):
    """Small whole inputs, {kind: (path that its errors name, reader without arguments)}."""
    torch.manual_seed(0)
    encoder, alone = ViT(dim=8, depth=1, heads=2, patch_size=2), Ranks(0, 1, torch.device("cpu"))
    places, readers = {}, {}

    def add(kind, name, reader):
        (folder / kind).mkdir()
        places[kind], readers[kind] = folder / kind / name, reader
        return places[kind]

    path = add("encoder", "encoder.safetensors", load_encoder)
    save_encoder(encoder, path, bands=["B", "G", "R", "NIR"])
    torch.save(encoder.state_dict(), add("foreign", "a.pt", lambda p: load_encoder(p, heads=2)))
    path = add("checkpoint", "ckpt.pt", lambda path: read_checkpoint(path, alone))
    save_sealed({"objective": encoder.state_dict(), "step": 1}, path)
    save_segmenter(
        add("segmenter", "model.safetensors", load_segmenter), Segmenter(encoder, 2, 8),
        classes=["a", "b"], bands=[], positions=[0, 1, 2, 3], file_bands=4, mean=[0.0] * 4,
        std=[1.0] * 4, tile=8, gsd=None,
    )  # fmt: skip
    add("config", "config.json", read_config).write_text(
        '{"args": {"lr": 0.1}, "steps": 1, "precision": "float32", "chips": "a"}'
    )
    raster.write(
        add("geotiff", "a.tif", lambda path: (raster.info(path), raster.read(path))),
        np.arange(3 * 40 * 40, dtype=np.uint16).reshape(3, 40, 40), *layouts.PLACE, nodata=7,
    )  # fmt: skip
    write_store(add("store", "pairs", read_store))
    for name, write in layouts.WRITERS.items():
        write(add(name, "root", lambda root, name=name: load_task(name, root, tile=8)),
              np.random.default_rng(0))  # fmt: skip
    for name, write in PAIRS.items():
        write(add(f"pairs of {name}", "root", lambda root, name=name: read_pairs(name, root)))
    return {kind: (place, readers[kind]) for kind, place in places.items()}


def read_store(path):
    store = Store(path)
    store.batch(np.arange(min(len(store), 100)))


def read_pairs(name, root):
    for unit in sets("PAIRS")[name](str(root)).units:
        for pair in unit.open():
            for source in (pair.mr, *pair.hrs):
                source.read(None, source.bands)


def mutated(data, draw):
    """Bytes with a few changes: flips, cuts, repeats, numbers at the ends of their ranges."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        if not data:
            break
        at, kind = draw.randrange(len(data)), draw.randrange(6)
        if draw.random() < 0.5:  # headers matter more than pixels
            at = draw.randrange(min(len(data), 512))
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at] = draw.randrange(256)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = data[at : at + draw.randrange(1, 64)]
        elif kind == 4:
            size = draw.choice((2, 4, 8))
            data[at : at + size] = draw.choice((b"\0", b"\xff", b"\x7f")) * size
        else:
            data[at:at] = b"[" * draw.choice((1, 5000))
    return bytes(data)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", help="these alone, default all")
    args = parser.parse_args()
    folder, draw = Path(tempfile.mkdtemp(prefix="fuzz-")), random.Random(args.seed)
    known = samples(folder)
    kinds = {kind: known[kind] for kind in args.kinds or known}
    files = {kind: sorted(p for p in (folder / kind).rglob("*") if p.is_file()) for kind in kinds}
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for path, reader in kinds.values():
            reader(path)  # whole, each is read
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(
        resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1])
    )
    outcomes, number, end = {kind: [0, 0] for kind in kinds}, 0, time.monotonic() + args.seconds
    while time.monotonic() < end:
        kind = draw.choice([*kinds])
        (path, reader), file = kinds[kind], draw.choice(files[kind])
        whole = file.read_bytes()
        file.write_bytes(mutated(whole, draw))
        start, told = time.monotonic(), f"seed {args.seed}, number {number}, {kind}, {file}"
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                reader(path)
            outcomes[kind][0] += 1
        except (ValueError, FileNotFoundError) as error:
            if "\n" in str(error) or str(path) not in str(error):
                sys.exit(f"{told}: not one sentence: {error}")
            outcomes[kind][1] += 1
        except BaseException as error:
            sys.exit(f"{told}: {error!r}")
        if time.monotonic() - start > SLOW:
            sys.exit(f"{told}: took over {SLOW} s")
        file.write_bytes(whole)
        number += 1
    for kind, (read, refused) in outcomes.items():
        print(f"{kind:24} {read:7} read {refused:7} refused")
    print(f"seed {args.seed}: {number} files, each read or refused in a sentence")


if __name__ == "__main__":
    main()
