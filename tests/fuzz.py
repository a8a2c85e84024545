"""Damaged files to every reader of weights, checkpoints, stores, published sets and images of one's
own: each is read, or refused in a sentence that names the file.

    python tests/fuzz.py --seconds 60 --seed 0      as .ci/run does; hours by the flag

A seed gives the same files. What neither loads nor is refused by ValueError or FileNotFoundError in
one line, takes over 10 s or asks for more memory than a laptop has ends the run with its seed and
number, and the file is kept.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import random
import resource
import shutil
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
from datasets.folder import read_geotiff
from datasets.tasks import load_folder, load_task
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
    "rapidai4eo": lambda root: pair_layouts.rapidai4eo(root, ["33N_15E-243N_01_09"]),
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
        reader = sets("PAIRS")[name]
        write(add(f"pairs of {name}", "root", lambda root, reader=reader: read_pairs(reader(root))))
    own_images(add)
    return {kind: (place, readers[kind]) for kind, place in places.items()}


def own_images(add):
    """Add what people have: a product, an archive, a mosaic, folders of pairs and of labels."""
    path = add("SAFE of JPEG 2000", "root", lambda p: read_pairs(read_geotiff(p)))
    pair_layouts.safe(path, offset=-1000)
    path = add("zipped scene", "a.zip", lambda p: read_pairs(read_geotiff(p, clouds="sentinel2")))
    for name in ("B02", "B03", "B04", "B08", "SCL"):
        pixels = pair_layouts.pixels(1, 20, 20, dtype="uint8")
        pair_layouts.tif(path.parent / "in" / f"{name}.tif", pixels, 10.0)
    shutil.make_archive(path.with_suffix(""), "zip", path.parent / "in")
    shutil.rmtree(path.parent / "in")
    path = add("VRT", "root", lambda root: raster.read(root / "a.vrt", masked=True))
    sources = ""
    for k in range(2):
        pair_layouts.tif(path / f"{k}.tif", pair_layouts.pixels(1, 20, 20), 10.0)
        sources += f"""<SimpleSource><SourceFilename relativeToVRT="1">{k}.tif</SourceFilename>
            <SourceBand>1</SourceBand><SrcRect xOff="0" yOff="0" xSize="20" ySize="20"/>
            <DstRect xOff="{20 * k}" yOff="0" xSize="20" ySize="20"/></SimpleSource>"""
    (
        path / "a.vrt"
    ).write_text(f"""<VRTDataset rasterXSize="40" rasterYSize="20"><SRS>EPSG:32631</SRS>
        <GeoTransform>3e5, 10, 0, 5e6, 0, -10</GeoTransform>
        <VRTRasterBand dataType="Int16" band="1">{sources}</VRTRasterBand></VRTDataset>""")
    path = add("folder of pairs", "root", lambda p: read_pairs(read_geotiff(p, clouds="planet")))
    for sensor, gsd, crs in (("mr", 10.0, 32631), ("hr", 5.0, 32632)):
        x, y = raster.project("EPSG:32631", f"EPSG:{crs}", [300_000.0], [5_000_000.0])
        at = (gsd, 0.0, float(x[0]), 0.0, -gsd, float(y[0]))
        for name, bands, kind in (("a_AnalyticMS", 4, "uint16"), ("a_udm2", 8, "uint8")):
            (path / sensor).mkdir(parents=True, exist_ok=True)
            array = pair_layouts.pixels(bands, 40, 40, dtype=kind)
            raster.write(path / sensor / f"{name}.tif", array, at, crs)
    path = add("images and masks", "root", read_masks)
    for name in "abc":
        pair_layouts.tif(path / "images" / f"{name}.tif", pair_layouts.pixels(2, 16, 16), 10.0)
        mask = np.arange(256, dtype="uint8").reshape(16, 16) % 2
        pair_layouts.tif(path / "masks" / f"{name}.tif", mask, 10.0)
    truth = {"a": ("train",), "b": ("val",), "c": ("test",)}
    layouts.write_lists(path / "lists", truth, "{}.txt")
    (path / "classes.txt").write_text("field\nwood\n")
    other = add("images and polygons", "root", read_polygons)
    shutil.copytree(path / "images", other / "images")
    features = []
    for name, x in (("wheat", 3e5), ("maize", 3e5 + 90)):
        ring = [[x, 5e6], [x, 49e5], [32e4, 49e5], [32e4, 5e6], [x, 5e6]]
        geometry = {"type": "Polygon", "coordinates": [ring]}
        features.append({"properties": {"crop": name}, "geometry": geometry})
    crs = {"properties": {"name": "urn:ogc:def:crs:EPSG::32631"}}
    (other / "a.json").write_text(json.dumps({"crs": crs, "features": features}))


def read_masks(root):
    lists, classes = root / "lists", root / "classes.txt"
    load_folder(root / "images", root / "masks", splits=lists, classes=classes, tile=8)


def read_polygons(root):
    load_folder(root / "images", polygons=root / "a.json", field="crop", tile=8, block=1)


def read_store(path):
    store = Store(path)
    store.batch(np.arange(min(len(store), 100)))


def read_pairs(listing):
    for unit in listing.units:
        for pair in unit.open():
            for source in (pair.mr, *pair.hrs):
                whole = 0, 0, source.info.height, source.info.width
                source.read(whole, source.bands)


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
