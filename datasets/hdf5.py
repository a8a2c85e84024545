"""Pairs repacked to one HDF5 file: MR (N, C, h, w) and HR (N, C', H, W), row i of both a pair."""

import functools
import math
from contextlib import contextmanager
from pathlib import Path

import h5py

from datasets import rapidai4eo, sen2venus
from datasets.common import (
    BGRN,
    Listing,
    Pair,
    array_source,
    missing,
    read_array,
    read_json,
    split_name,
    unit,
    walk,
    whole,
)

# the datasets of known files, MR and HR, and whose they are
KNOWN = {
    ("sentinel2", "venus"): sen2venus.SOURCES,
    ("sentinel2", "planet"): rapidai4eo.SOURCES,
}
SLICE_BYTES = 2**25  # of a unit's rows, in memory once for each worker


def read(root, *, mr_dataset=None, hr_dataset=None, band_names=BGRN, splits=None):
    """root: the file, or the folder that holds it, such as sen2venus.hdf5 and rapidai4eo_v1.h5.
    mr_dataset, hr_dataset: the names of datasets other than `KNOWN`. band_names: of the first bands
    of both, B, G, R, NIR in the known ones, although one has 12. splits: a JSON file {"train":
    [rows or sample ids], ...}, else the *split*.json beside it, if there is one; rows in no split
    are skipped. Without splits `sample_ids`, where the file has them, say which rows are of one
    tile.
    """
    files = [str(root)]
    if Path(root).is_dir():
        files = [path for path, _ in walk(root, (".h5", ".hdf5"))]
    if len(files) != 1:
        raise missing(root, f"one .h5 or .hdf5 file expected, {len(files)} found")
    path = files[0]
    with opened(path) as file:
        has = {name: item for name, item in file.items() if isinstance(item, h5py.Dataset)}
        mr, hr = next((names for names in KNOWN if {*names} <= {*has}), ("sentinel2", "venus"))
        names = {"mr": mr_dataset or mr, "hr": hr_dataset or hr}
        for sensor, name in names.items():
            check_dataset(path, has, sensor, name, band_names)
        rows, other = (len(has[name]) for name in names.values())
        if other != rows:
            raise ValueError(
                f"{path}: {rows} rows in {names['mr']}, {other} in {names['hr']}; row i of both "
                "should be a pair"
            )
        shapes = {sensor: (len(band_names), *has[name].shape[2:]) for sensor, name in names.items()}
        # native byte order, as torch needs
        dtypes = {sensor: has[name].dtype.newbyteorder("=") for sensor, name in names.items()}
        ids = has["sample_ids"][:].ravel() if "sample_ids" in has else []
        ids = [i.decode() if isinstance(i, bytes) else str(i) for i in ids]
    ids = ids if len(ids) == rows else []
    split = read_splits(path, splits, rows, ids)
    sites = [rapidai4eo.tile_of(i) for i in ids] or [None] * rows
    row_bytes = sum(math.prod(shapes[s]) * dtypes[s].itemsize for s in shapes)
    step = max(1, SLICE_BYTES // row_bytes)
    units = []
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        about = path, names, part, shapes, dtypes, split and split[part], sites[part]
        units.append(unit(f"{path}#{start}", open_rows, *about))
    left = split.count(None) if split else 0
    skipped = [(path, f"{left} rows in no split")] if left else []
    chip = min(shapes["mr"][1:])
    bands = {"mr": list(band_names), "hr": list(band_names)}
    return Listing(units, bands, chip, KNOWN.get((*names.values(),), ()), skipped)


def check_dataset(path, has, sensor, name, band_names):
    """Raise ValueError unless the datasets `has` hold images of so many bands called `name`."""
    if name not in has:
        raise ValueError(
            f"{path}: no dataset {name} for {sensor.upper()}, it has "
            f"{', '.join(has) or 'none'}; name it with --{sensor}-dataset"
        )
    shape, dtype = has[name].shape, has[name].dtype
    if len(shape) != 4 or shape[1] < len(band_names) or not all(shape):
        raise ValueError(
            f"{path}: dataset {name} is {shape}, (rows, {len(band_names)} bands or "
            "more, height, width) expected; choose another, or fewer --band-names"
        )
    if dtype.kind not in "iuf":
        raise ValueError(
            f"{path}: dataset {name} is {dtype}, integers or floats expected; "
            f"choose another with --{sensor}-dataset, or convert it"
        )


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
    with whole(splits, "JSON"):
        given = {name: list(members) for name, members in read_json(splits).items()}
    row_of = {name: row for row, name in enumerate(ids)}
    split = [None] * rows
    for name, members in given.items():
        name = split_name(splits, name)
        for member in members:
            row = row_of.get(member, -1) if isinstance(member, str) else member
            if type(row) is not int or not 0 <= row < rows:  # true is an int
                raise ValueError(
                    f"{splits}: {name} holds {member!r}, but {Path(path).name} has rows 0 to "
                    f"{rows - 1}; take the splits that belong to it"
                )
            if split[row] not in (None, name):
                raise ValueError(
                    f"{splits}: row {row} is in {split[row]} and in {name}; choose one"
                )
            split[row] = name
    return split


def open_rows(path, names, part, shapes, dtypes, split, sites):
    """Yield the Pairs of a slice of rows of an HDF5 file; those in no split are left out."""

    @functools.cache  # read as one with the first pixels that are asked for: headers cost nothing
    def load():
        with opened(path) as file:
            return {
                sensor: file[name][part, : shapes[sensor][0]].astype(dtypes[sensor], copy=False)
                for sensor, name in names.items()
            }

    def read_row(sensor, number, window=None, bands=None):
        return read_array(load()[sensor][number], window, bands)

    for number, site in enumerate(sites):
        if split is None or split[number]:
            mr, hr = (
                array_source(
                    f"{path}#{part.start + number}",
                    shapes[sensor],
                    dtypes[sensor],
                    functools.partial(read_row, sensor, number),
                )
                for sensor in ("mr", "hr")
            )
            yield Pair(mr, [hr], split and split[number], site)


@contextmanager
def opened(path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with whole(path, "HDF5"), h5py.File(path, "r") as file:
        yield file


PAIRS = {"hdf5": read}
