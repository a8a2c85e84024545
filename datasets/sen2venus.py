"""SEN2VENµS: Sentinel-2 at 10 or 20 m with VENµS at 5 m, 132,955 pairs of 29 sites.

Michel et al. 2022. v2 (zenodo.org/records/14603764) has 139.5 GB of zips; 10 m and 5 m alone are
87 GB unpacked. Values are reflectance x 10000; VENµS is adjusted to Sentinel-2 by its makers.
"""

import functools
import re
from operator import getitem
from pathlib import Path

import torch

from datasets import common

SOURCES = (
    common.terms(
        "SEN2VENµS",
        "non-commercial; see the record",
        "Michel et al., Data 7(7), 96, 2022, doi:10.3390/data7070096",
        "https://zenodo.org/records/6514159",
    ),
)
# product: what file names say of the bands, the bands, side of an MR patch
PRODUCTS = {
    "10m": (["b2b3b4b8"], common.BGRN, 128),
    "20m": (["b4b5b6b8a", "b5b6b7b8a"], ["B05", "B06", "B07", "B8A"], 64),
}


def read(root, *, product="10m"):
    """v1, a .pt of patches per date and sensor; v2, a GeoTIFF per patch.

    root: holds the unpacked sites, at any depth. product: "10m" pairs B, G, R, NIR of 10 m (128
    pixels) with VENµS at 5 m (256); "20m" pairs B05, B06, B07, B8A of 20 m (64) with the same at
    5 m, which v1 calls b4b5b6b8a. site: the VENµS site, for there are no splits; both dates are the
    day that images share. v1: {SITE}_{TILE}_{DATE}_05m_b2b3b4b8.pt, int16. v2 is found by the same
    parts of the path, in any order.
    """
    if product not in PRODUCTS:
        raise ValueError(f"--product {product}: 10m or 20m expected")
    keys, names, chip = PRODUCTS[product]
    part = re.compile(r"(?<![0-9a-z])(05m|5m|10m|20m)(?![0-9a-z])")
    found = {}  # path without its gsd -> {sensor: path}
    for path, name in common.walk(root, (".pt", ".tif", ".tiff")):
        name = name.lower()
        gsd = part.findall(name)
        if gsd and any(re.search(rf"(?<![0-9a-z]){key}(?![0-9a-z])", name) for key in keys):
            sensor = "mr" if gsd[-1] == product else "hr" if gsd[-1] in ("05m", "5m") else None
            found.setdefault(part.sub("", name), {})[sensor] = path
    pairs, skipped = common.complete(found)
    if not pairs:
        raise common.missing(
            root, f"no pair of *_05m_{keys[0]}.pt and *_{product}_{keys[0]}.pt, nor such .tif"
        )
    units = []
    for mr, hr in pairs:
        place = Path(mr).relative_to(root).as_posix()
        about = re.search(r"([^/]+?)_*_\d\d[A-Z]{3}_\d{4}-\d\d-\d\d", place)
        site = about[1] if about else place.split("/")[0] if "/" in place else Path(root).name
        date = common.date_of(place)
        if mr.lower().endswith(".pt"):
            units.append(common.unit(place, open_patches, mr, hr, date, site))
        else:
            places = [(place, [(mr, hr, date, date)], None, site)]
            units += common.tiff_units(places, {len(names): [0, 1, 2, 3]}, bands=names)
    return common.listing(units, chip, SOURCES, skipped, names)


def open_patches(mr_path, hr_path, date, site):
    """Yield the Pairs of patches of two .pt files."""
    mr, hr = load_patches(mr_path), load_patches(hr_path)
    if len(mr) != len(hr):
        raise ValueError(
            f"{hr_path}: {len(hr)} patches, but {Path(mr_path).name} has {len(mr)}; unpack both "
            "again"
        )
    for at in range(len(mr)):
        sources = [
            common.array_source(f"{path}#{at}", images.shape[1:], images.dtype, patch, date)
            for path, images in ((mr_path, mr), (hr_path, hr))
            for patch in [functools.partial(getitem, images, at)]
        ]
        yield common.Pair(sources[0], sources[1:], None, site)


def load_patches(path):
    """(patches, 4, height, width) array of a .pt file, mapped, not read, where it can be."""
    with common.whole(path, ".pt"):
        try:
            images = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file of before torch 1.6 cannot be mapped
            images = torch.load(path, map_location="cpu", weights_only=True)
        return common.check_array(images.detach().numpy(), (None, 4, None, None))


PAIRS = {"sen2venus": read}
