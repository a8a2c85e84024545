"""Pairs repacked to one HDF5 file: MR (N, C, h, w) and HR (N, C', H, W), row i of both a pair."""

import functools
import math
from pathlib import Path

import h5py

from datasets import common, rapidai4eo, sen2venus

# the datasets of known files, MR and HR, and whose they are
KNOWN = {("sentinel2", "venus"): sen2venus.SOURCES, ("sentinel2", "planet"): rapidai4eo.SOURCES}
SLICE_BYTES = 2**25  # of a unit's rows, in memory once for each worker


def read(root, *, mr_dataset=None, hr_dataset=None, band_names=common.BGRN, splits=None):
    """root: the file, or the folder that holds it, such as sen2venus.hdf5 and rapidai4eo_v1.h5.
    mr_dataset, hr_dataset: the names of datasets other than `KNOWN`. band_names: of the first bands
    of both, B, G, R, NIR in the known ones, although one has 12. splits: a JSON file {"train":
    [rows or sample ids], ...}, else the *split*.json beside it, if there is one; rows in no split
    are skipped. Without splits `sample_ids`, if there are any, say which rows are of one tile."""
    folder = Path(root).is_dir()
    files = [file for file, _ in common.walk(root, (".h5", ".hdf5"))] if folder else [str(root)]
    if len(files) != 1:
        raise common.missing(root, f"one .h5 or .hdf5 file expected, {len(files)} found")
    with common.open_hdf5(path := files[0]) as file:
        has = {name: item for name, item in file.items() if isinstance(item, h5py.Dataset)}
        mr, hr = next((names for names in KNOWN if {*names} <= {*has}), ("sentinel2", "venus"))
        names = {"mr": mr_dataset or mr, "hr": hr_dataset or hr}
        rows, other = (check_dataset(path, has, *each, len(band_names)) for each in names.items())
        if other != rows:
            found = f"{rows} rows in {names['mr']}, {other} in {names['hr']}"
            raise ValueError(f"{path}: {found}; row i of both should be a pair")
        shapes = {sensor: (len(band_names), *has[name].shape[2:]) for sensor, name in names.items()}
        # native, as torch needs
        dtypes = {sensor: has[name].dtype.newbyteorder("=") for sensor, name in names.items()}
        ids = has["sample_ids"][:].ravel() if "sample_ids" in has else []
        ids = [i.decode() if isinstance(i, bytes) else str(i) for i in ids]
    ids = ids if len(ids) == rows else []
    split = read_splits(path, splits, rows, ids)
    sites = [rapidai4eo.tile_of(i) for i in ids] or [None] * rows
    step = SLICE_BYTES // sum(math.prod(shapes[s]) * dtypes[s].itemsize for s in shapes) or 1
    units = []
    for part in (slice(k, min(k + step, rows)) for k in range(0, rows, step)):
        about = path, names, part, shapes, dtypes, split and split[part], sites[part]
        units.append(common.unit(f"{path}#{part.start}", open_rows, *about))
    left = (split or []).count(None)
    skipped = [(path, f"{left} rows in no split")] if left else []
    chip, sources = min(shapes["mr"][1:]), KNOWN.get((*names.values(),), ())
    return common.listing(units, chip, sources, skipped, band_names)


def check_dataset(path, has, sensor, name, bands):
    """How many images a dataset of the file holds; ValueError unless of at least so many bands."""
    if name not in has:
        raise ValueError(
            f"{path}: no dataset {name} for {sensor.upper()}, it has "
            f"{', '.join(has) or 'none'}; name it with --{sensor}-dataset"
        )
    shape, dtype = has[name].shape, has[name].dtype
    if len(shape) != 4 or shape[1] < bands or not all(shape) or dtype.kind not in "iuf":
        raise ValueError(
            f"{path}: dataset {name} is {dtype} of {shape}, numbers of (rows, {bands} bands or "
            f"more, height, width) expected; choose another --{sensor}-dataset, fewer --band-names"
        )
    return shape[0]


def read_splits(path, splits, rows, ids):
    """The split of each row, None where it is in none; None without a table of splits."""
    if splits is None:
        beside = sorted(Path(path).parent.glob("*split*.json"))
        stem = Path(path).stem.split("_")[0]
        beside = [file for file in beside if file.stem.startswith(stem)] or beside
        if len(beside) > 1:
            raise ValueError(
                f"{beside[0]} and {beside[1].name}: both may be the splits of {Path(path).name}; "
                "say which with --splits"
            )
        if not beside:
            return None
        splits = beside[0]
    split, known = common.read_partition(splits), {*ids, *map(str, range(rows))}
    if alien := [member for member in split if member not in known]:
        raise ValueError(
            f"{splits}: it holds {alien[0]}, but {Path(path).name} has rows 0 to {rows - 1}; take "
            "the splits that belong to it"
        )
    return [split.get(str(row), split.get(name)) for row, name in enumerate(ids or [None] * rows)]


def open_rows(path, names, part, shapes, dtypes, split, sites):
    """Yield the Pairs of a slice of rows of an HDF5 file; those in no split are left out."""

    @functools.cache  # read as one with the first pixels that are asked for: headers cost nothing
    def load(sensor):
        with common.open_hdf5(path) as file:
            rows = file[names[sensor]][part, : shapes[sensor][0]]
            return rows.astype(dtypes[sensor], copy=False)

    def source(sensor, number):
        about = f"{path}#{part.start + number}", shapes[sensor], dtypes[sensor]
        return common.array_source(*about, lambda: load(sensor)[number])

    for number, site in enumerate(sites):
        if split is None or split[number]:
            mr, hr = source("mr", number), source("hr", number)
            yield common.Pair(mr, [hr], split and split[number], site)


PAIRS = {"hdf5": read}
