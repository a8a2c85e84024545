"""From a folder as it was published to pairs of HR and MR images, described but not yet decoded.

A reader lists `Unit`s: pieces of work, each of which opens to `Pair`s of `Source`s. pack.py cuts
these into a store; it knows no layout, and this file knows no store.
"""

import difflib
import functools
import glob
from collections import namedtuple
from pathlib import Path

import numpy as np
from tqdm import tqdm

import geotiff

# An image and what is wanted of it. info: geotiff.Info, whose path may name a part, "x.pt#12".
# bands: positions. nodata: value or None. read(window, bands) -> (bands, height, width), as
# geotiff.read without the path.
Source = namedtuple("Source", "info bands nodata read")
# One MR image and the HR images that may serve it, the best first, maybe none. split: "train",
# "val", "test" or None; site: what must not be divided between splits, or None (then the ground
# decides); dates: ISO text or "".
Pair = namedtuple("Pair", "mr hrs split site mr_date hr_date", defaults=(None, None, "", ""))
# A piece of work. name: what resuming knows it by; open() yields its Pairs.
Unit = namedtuple("Unit", "name open")
# What a reader returns. bands: {"mr": names, "hr": names}, as chosen from the files. chip: side in
# MR pixels to cut to, None where the user decides. sources: [{"name", "licence", "attribution",
# "url"}]. skipped: [(name, reason)] of what was found and left out.
Listing = namedtuple("Listing", "units bands chip sources skipped", defaults=(None, (), ()))


def find_files(where, flag):
    """The .tif and .tiff files of a folder and its subfolders, one file, or a glob; sorted."""
    path = Path(where)
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.suffix.lower() in (".tif", ".tiff")]
    elif path.is_file():
        files = [path]
    else:
        files = [Path(p) for p in glob.glob(str(where), recursive=True)]
    if not files:
        raise FileNotFoundError(
            f"{flag} {where}: no .tif or .tiff found; give a folder, a file or a quoted glob"
        )
    return sorted(files)


def open_sources(where, sensor, wanted, names, nodata):
    """Describe the files of one sensor and choose their bands.

    wanted: list of band names or indices as text, all bands when None. names: what the bands are
    called, else as in the first file. nodata: for files that declare none. Returns sources, names.
    Raises ValueError for a band that is not there, another number of bands, complex or mixed dtype.
    """
    sources, flag = [], f"--{sensor}-bands"
    for path in tqdm(find_files(where, f"--{sensor}"), f"{sensor} headers", leave=False):
        info = geotiff.info(path)
        bands = list(range(info.bands))
        if wanted:
            known = {name.lower(): band for band, name in enumerate(info.band_names)}
            bands = [int(w) if w.isdigit() else known.get(w.lower(), -1) for w in wanted]
        if min(bands) < 0 or max(bands) >= info.bands:
            has = f"{','.join(info.band_names)}" if any(info.band_names) else "without names"
            raise ValueError(
                f"{path}: {flag} {','.join(wanted)} asked for, the file has {info.bands} bands "
                f"({has}); use indices from 0"
            )
        names = names or [info.band_names[b] if info.band_names else str(b) for b in bands]
        if len(bands) != len(names):
            raise ValueError(
                f"{path}: {len(names)} bands expected ({','.join(names)}), found {len(bands)}; use "
                f"{flag} to choose them, such as {flag} 2,1,0 for RGB files"
            )
        if info.dtype.kind == "c":
            raise ValueError(
                f"{path}: complex pixels ({info.dtype}); convert them to amplitudes, such as with "
                "gdal_calc.py --calc 'abs(A)'"
            )
        if sources and info.dtype != sources[0].info.dtype:
            raise ValueError(
                f"{path}: {info.dtype}, but {sources[0].info.path} is {sources[0].info.dtype}; "
                "convert one with gdal_translate -ot, or pack them apart"
            )
        nodata_of = nodata if info.nodata is None else info.nodata
        read = functools.partial(geotiff.read, path)
        sources.append(Source(info, bands, nodata_of, read))
    return sources, names


def check_band_order(flags, given):
    """Raise ValueError where a file has the bands of another, by their names, in another order.

    flags: the flag that chooses the bands -> sources. given: the names of --band-names, or None.
    A file that does not name all of its chosen bands says nothing of their order.
    """
    named = [(None, "--band-names", given)] if given else []
    for flag, sources in flags.items():
        for info, bands, *_ in sources:
            names = [info.band_names[band] for band in bands] if info.band_names else []
            named += [(flag, info.path, names)] if all(names) else []
    orders = {}  # lower-case names, sorted -> who has them first, and in which order
    for flag, who, names in named:
        lower = [name.lower() for name in names]
        first, order = orders.setdefault(tuple(sorted(lower)), (who, names))
        if lower != [name.lower() for name in order]:
            raise ValueError(
                f"{who}: its bands are {','.join(names)}, but {first} has {','.join(order)}; use "
                f"{flag} {','.join(order)}"
            )


def pair_up(mr_sources, hr_sources):
    """Find the HR files that may serve each MR file: [(mr, [hr, ...])], the best first.

    By ground where files are georeferenced, the likest file name (the same date, often) first; by
    equal file stem where none is. Raises ValueError if nothing pairs, with the reason.
    """
    everyone = [*mr_sources, *hr_sources]
    placed = [s.info for s in everyone if s.info.transform is not None]
    if not placed:
        stems = {}
        for hr in hr_sources:
            twin = stems.setdefault(hr.info.path.stem, hr)
            if twin is not hr:
                raise ValueError(
                    f"{hr.info.path}: the same name as {twin.info.path}, and no georeference to "
                    "tell them apart; rename one"
                )
        pairs = [
            (m, [stems[m.info.path.stem]] if m.info.path.stem in stems else []) for m in mr_sources
        ]
    elif len(placed) < len(everyone):
        bare = next(s.info for s in everyone if s.info.transform is None)
        raise ValueError(
            f"{bare.path}: no georeference, but {placed[0].path} has one; add it with "
            "gdal_translate -a_srs -a_ullr, or pack them apart"
        )
    else:
        left, bottom, right, top = np.array([hr.info.bounds for hr in hr_sources]).T
        pairs = []
        for m in mr_sources:
            west, south, east, north = m.info.bounds
            meets = (left < east) & (right > west) & (bottom < north) & (top > south)
            hrs = [hr_sources[i] for i in np.flatnonzero(meets)]
            hrs = [hr for hr in hrs if geotiff.same_crs(m.info.crs, hr.info.crs)]
            pairs.append((m, sorted(hrs, key=functools.partial(unlike, m))))
    if any(hrs for _, hrs in pairs):
        return pairs

    mr, hr = mr_sources[0].info, hr_sources[0].info
    if not placed:
        raise ValueError(
            f"no HR file is named as an MR file is ({mr.path} and {hr.path}, for instance); "
            "without georeference the two of a pair need the same name"
        )
    mr_crs = {geotiff.crs_name(s.info.crs): s.info.crs for s in mr_sources}
    hr_crs = {geotiff.crs_name(s.info.crs): s.info.crs for s in hr_sources}
    if not any(geotiff.same_crs(a, b) for a in mr_crs.values() for b in hr_crs.values()):
        raise ValueError(
            f"{hr.path}: CRS {geotiff.crs_name(hr.crs)}, but {mr.path} has "
            f"{geotiff.crs_name(mr.crs)}; warp the HR files with gdalwarp -t_srs"
        )
    raise ValueError(
        f"{hr.path}: bounds {hr.bounds} do not overlap {mr.bounds} of {mr.path}, nor does any "
        "other pair; give folders of the same ground"
    )


def unlike(mr, hr):
    """Sort key: how little an HR file's name resembles that of an MR file."""
    a, b = mr.info.path.stem, hr.info.path.stem
    return -difflib.SequenceMatcher(None, a, b).ratio(), str(hr.info.path)
