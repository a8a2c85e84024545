"""What the files of published sets have in common; `sets` finds them.

A set is one file of this folder. Of HR/MR pairs it holds `PAIRS`, {name for `data.py pack
--format`: function (root, options by name) -> Listing}; of labelled images `TASKS`, {name for
`finetune.py --task`: Labelled}. To add a set, copy the file of one that is alike, and edit nothing
else.

Nothing is converted, unpacked or unpickled. What a file of others provokes while it is read becomes
one sentence by `whole`. Pixels of chips are read by tifffile, in threads.
"""

import csv
import datetime
import functools
import hashlib
import importlib
import json
import logging
import math
import os
import pkgutil
import re
import struct
import threading
import xml.etree.ElementTree as ET
from collections import namedtuple
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from xml.sax.saxutils import unescape

import h5py
import numpy as np
import tifffile

import datasets
from imagery import raster
from imagery.bands import IGNORE, positions

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it logs of a file, `whole` raises
HEADERS = threading.Lock()  # of numpy's files; read_numpy says why
GDAL_METADATA, GDAL_NODATA = 42112, 42113  # tags
MOST = 2**30  # bytes of pixels that are read at once

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {name: name for name in SPLITS} | {"valid": "val", "validation": "val"}

# Bands go by one name each: "B", "G", "R" and "NIR" for Sentinel-2's B02, B03, B04 and B08, and
# Sentinel-2's own two-digit names for the others.
BGRN = ["B", "G", "R", "NIR"]
L1C = ("B01", "B", "G", "R", "B05", "B06", "B07", "NIR", "B8A", "B09", "B10", "B11", "B12")
L2A = tuple(band for band in L1C if band != "B10")
RHO = tuple(band for band in L2A if band != "B09")  # ACOLITE's reflectances
# number of bands -> positions of B, G, R, NIR
S2_ORDER = {12: [1, 2, 3, 7], 13: [1, 2, 3, 7]}  # by Sentinel-2's numbers; L2A has no B10
RGBN_ORDER = {4: [2, 1, 0, 3]}

COPERNICUS = "Contains modified Copernicus Sentinel data"  # how it wants to be named
DATE = re.compile(
    r"(?<!\d)(?:(?P<year>(?:19|20)\d\d)(?P<day>[0-3]\d\d)(?=T)"
    r"|((?:19|20)\d\d)([-_]?)([01]\d)\4([0-3]\d)(?:(?=\D|$)|(?=\d{6}(?!\d))))"
)

# An image and what is wanted of it. info: raster.Info, whose path may name a part, "x.pt#12".
# bands: positions. nodata: value or None. read(window, bands) -> (bands, height, width), as
# raster.read without the path. date: ISO text or "". offset: what its makers say is to be added
# to its valid pixels (-1000 for Sentinel-2 from processing baseline 04.00 on); read adds nothing,
# and may return (pixels, valid), as raster.read does of a file with a mask. parts: [(Source, row,
# col)] of an image that lies in several files.
Source = namedtuple("Source", "info bands nodata read date offset parts", defaults=("", 0, ()))
# One MR image and the HR images that may serve it, the best first, maybe none. split: "train",
# "val", "test" or None; site: what must not be divided between splits, or None (then the ground
# decides). Where no georeference is given the images show the same ground, edge to edge. reason:
# why there is no HR image, where more is known than that.
Pair = namedtuple("Pair", "mr hrs split site reason", defaults=(None, None, ""))
# A piece of work. name: what a reader of reports knows it by; open() yields its Pairs, in the same
# order each time, and raises as a reader does. key: differs where what it yields does, such as
# other HR files, bands, dates or splits; resuming compares it.
Unit = namedtuple("Unit", "name open key", defaults=("",))
# What a reader returns. bands: {"mr": names, "hr": names}, as chosen from the files; first those of
# hr that mr has, as mr calls them and in its order; [] without HR. chip: side in MR pixels to cut
# to, None where the user decides. sources: [{"name", "licence", "attribution", "url"}]. skipped:
# [(name, reason)] of what was found and left out.
Listing = namedtuple("Listing", "units bands chip sources skipped", defaults=(None, (), ()))


# A labelled set, as published. classes: names in the order of their ids. ids: value in the mask ->
# class id or IGNORE. bands: names in the order of the files. tile: pixels a side in the protocol
# that scores are compared by, None for the whole image. counts: samples in train, val and test,
# None where the publisher gives no split. marks: what the folder holds, by which it is known.
# folders: where that may lie below --root. size, licence: as others quote the page at `url`, which
# has the last word. open(folder, positions of the bands, options by name: dates, pastis_classes,
# split_seed) -> Samples. stats: {band: (mean, std)} as published.
Labelled = namedtuple(
    "Labelled",
    "title classes ids bands tile splits counts size url licence marks folders open stats",
)
# A labelled set found on disk; no pixel is read yet. split: {sample: "train", "val" or "test"},
# sorted by sample. files: {sample: paths} of those that are complete; the first path stands for it.
# label(*paths) -> (rows, cols) as in the file. image(*paths) -> float32 (bands, rows, cols), or
# (dates, bands, rows, cols) where `dates`, the most that a sample has, is not None; NaN where the
# image has no data. stats, ids, classes: in place of the set's own.
Samples = namedtuple(
    "Samples", "split files label image stats ids classes dates", defaults=(None,) * 4
)


@functools.cache
def sets(kind):
    """{name: set} of all files of this folder, sorted by name. kind: "PAIRS" or "TASKS".

    Raises ValueError where two files give one name.
    """
    found, of = {}, {}
    for file in pkgutil.iter_modules(datasets.__path__, "datasets."):
        for name, one in getattr(importlib.import_module(file.name), kind, {}).items():
            if name in found:
                raise ValueError(f"{of[name]} and {file.name} both hold {name}; rename one")
            found[name], of[name] = one, file.name
    return dict(sorted(found.items()))


# what tells what there is


def walk(root, suffixes):
    """Yield (path, name under root, by "/") of the files with one of the suffixes, sorted."""
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    for folder, folders, files in os.walk(root):
        folders.sort()
        under = "" if folder == str(root) else Path(folder).relative_to(root).as_posix() + "/"
        for name in sorted(files):
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield os.path.join(folder, name), under + name


def missing(root, wanted):
    """The error for a folder that is not what was expected; says what is there instead."""
    there = sorted(path.name for path in Path(root).iterdir()) if Path(root).is_dir() else []
    more = f" and {len(there) - 5} more" if len(there) > 5 else ""
    return FileNotFoundError(
        f"{root}: {wanted}; it holds {', '.join(there[:5]) or 'nothing'}{more}; unpack archives "
        "and give the folder that they are in"
    )


def find_folder(about, root):
    """The folder of a Labelled set, which is `root` or lies in it under one of its names."""
    for place in (Path(root), *(Path(root, folder) for folder in about.folders)):
        if all(any(place.glob(mark)) for mark in about.marks):
            return place
    raise missing(
        root,
        f"no {about.title.split(':')[0]} set, which has {' and '.join(about.marks)}, in it or in "
        f"{', '.join(about.folders)} (it is at {about.url})",
    )


def complete(found):
    """([(mr, hr)], skipped) of name -> {"mr": path, "hr": path}, where one may be missing."""
    pairs = [(f["mr"], f["hr"]) for f in found.values() if "mr" in f and "hr" in f]
    skipped = [
        (f.get("mr") or f["hr"], f"no {'HR' if 'mr' in f else 'MR'} file for it")
        for f in found.values()
        if ("mr" in f) != ("hr" in f)
    ]
    return pairs, skipped


def check_per_site(per_site):
    if per_site < 1:
        raise ValueError(f"--per-site {per_site}: 1 or more MR dates of each place expected")


def terms(name, licence, attribution, url):
    return {"name": name, "licence": licence, "attribution": attribution, "url": url}


def date_of(text):
    """The first date in a name as ISO text, "" without one: "20200131", with a time behind it or
    without, "2020-01-31", or the day of the year as HLS writes it, "2020031T"."""
    for match in DATE.finditer(text):
        with suppress(ValueError):  # digits of something else
            if match["day"]:
                first = datetime.date(int(match["year"]), 1, 1)
                date = first + datetime.timedelta(int(match["day"]) - 1)
                if date.year == first.year:
                    return str(date)
            else:
                return str(datetime.date(int(match[3]), int(match[5]), int(match[6])))
    return ""


def days_between(a, b):
    return abs(datetime.date.fromisoformat(a) - datetime.date.fromisoformat(b)).days


def by_band(bands, mean, std):
    """{band: (mean, std)}. Raises ValueError unless they can be of reflectances in some unit."""
    stats = {}
    for band, *pair in zip(bands, mean, std, strict=True):
        stats[band] = tuple(map(float, pair))
        if not (abs(stats[band][0]) < 1e6 and 1e-6 < stats[band][1] < 1e6):
            raise ValueError(f"band {band} has the mean and the standard deviation {stats[band]}")
    return stats


def numbered(classes, first=0):
    """{value: class id} of a mask whose classes begin at the value `first`; 0 is ignored if not."""
    return {0: IGNORE} | {first + k: k for k in range(len(classes))}


# lists and tables


def read_lines(path, remedy="a list comes with its set, download it"):
    """The lines of a UTF-8 text file, with or without a byte order mark, stripped.

    Raises FileNotFoundError, or ValueError if it is not UTF-8.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; {remedy}")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    return [line.strip() for line in text.rstrip().split("\n")]


def read_json(path):
    """Read a JSON file that holds an object. Raises ValueError if it does not."""
    with whole(path, "JSON"):
        found = json.loads("\n".join(read_lines(path)))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__} where names and values should be")
        return found


def table(path):
    """The rows of a .csv, lists of text without the empty cells at their ends, none of them empty;
    [] without a path."""
    if path is None:
        return []
    with whole(path, "CSV"):
        rows = [[cell.strip() for cell in row] for row in csv.reader(read_lines(path))]
    for row in rows:
        while row and not row[-1]:
            row.pop()
    return [row for row in rows if row]


def split_name(path, name):
    if name.strip().lower() not in SPLIT_NAMES:
        raise ValueError(f"{path}: split {name}; train, val or test expected")
    return SPLIT_NAMES[name.strip().lower()]


def read_lists(folder, pattern):
    """Read one text file per split -> {sample: split}. pattern: its name, {} the split."""
    lists = {s: read_lines(Path(folder) / pattern.format(s)) for s in SPLITS}
    return join_lists(lists, folder)


def join_lists(lists, where):
    """{split: samples} -> {sample: split}, sorted. Raises ValueError for a sample in two."""
    split = {}
    for name, samples in lists.items():
        for sample in filter(None, samples):
            if split.setdefault(sample, name) != name:
                raise ValueError(
                    f"{where}: {sample} is listed for {split[sample]} and for {name}; keep it in "
                    "one split only"
                )
    return dict(sorted(split.items()))


def read_partition(path):
    """Read {"train": [samples], "valid" or "val": [...], "test": [...]} -> {sample: split}."""
    with whole(path, "JSON"):
        lists = {
            split_name(path, name): [str(sample).removesuffix(".npz") for sample in samples]
            for name, samples in read_json(path).items()
        }
    return join_lists(lists, path)


# pixels


@contextmanager
def whole(path, kind):
    """Name the file in whatever its content provokes while it is read -> ValueError.

    What already is a sentence about the file passes. For reading only: the errors that a damaged or
    foreign file provokes are those of a mistake in the code.
    """
    try:
        yield
    except Exception as error:  # there is no end of what libraries raise on damaged files
        if str(error).startswith(f"{path}: "):
            raise
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"
        raise ValueError(
            f"{path}: no whole {kind} file as its publisher ships it ({reason}); copy or download "
            "it again"
        ) from error


def check_array(array, shape):
    """The array, if it holds numbers in this shape, where None is any length but 0."""
    fits = array.ndim == len(shape) and all(
        found and wanted in (None, found) for found, wanted in zip(array.shape, shape, strict=True)
    )
    if not fits or array.dtype.kind not in "iuf":
        wanted = " x ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"{array.dtype} of shape {array.shape}, wanted numbers of shape {wanted}")
    return array


def check_claim(path, claimed, parts=1):
    """Raise ValueError where a file claims to hold more bytes than it can, or more in one of the
    `parts` that it is read by than memory is to hold: before any are asked for."""
    size = Path(path).stat().st_size
    if claimed > raster.SHRUNK * size:
        raise ValueError(f"pixels of {claimed} bytes in a file of {size}")
    if claimed > MOST * parts:
        raise ValueError(f"{claimed // parts} bytes of pixels at once, at most {MOST} are read")


def read_numpy(path, shape):
    """The array of a .npy file, mapped, so that only what is taken of it is read; of a .npz file
    that which is called arr_0. shape: as of `check_array`."""
    # one thread at a time: numpy parses the header with `ast`, whose parser Python 3.11 shares
    # between threads, so that a fraction of files fail (github.com/python/cpython/issues/106905)
    with whole(path, path.suffix), HEADERS:
        file = np.load(path, mmap_mode="r", allow_pickle=False)
        if path.suffix == ".npy":
            return check_array(file, shape)
        with file:
            with file.zip.open("arr_0.npy") as member:
                one = np.lib.format.read_magic(member) == (1, 0)
                header = "read_array_header_1_0" if one else "read_array_header_2_0"
                claimed, _, dtype = getattr(np.lib.format, header)(member)
            check_claim(path, math.prod(claimed) * dtype.itemsize)
            return check_array(file["arr_0"], shape)


@contextmanager
def open_hdf5(path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with whole(path, "HDF5"), h5py.File(path, "r") as file:
        for held in file.values():
            if isinstance(held, h5py.Dataset) and held.shape:  # of many images some are read
                check_claim(path, held.nbytes, held.shape[0] if held.ndim == 4 else 1)
        yield file


@contextmanager
def open_tiff(path):
    """Yield the pages that hold the bands of a TIFF's first image, and its raster.Info."""
    with whole(path, "TIFF"), tifffile.TiffFile(path) as tif:
        first, size = tif.pages.first, tif.filehandle.size
        # tifffile drops the tags whose values lie beyond the end, a georeference among them
        tif.filehandle.seek(first.offset)
        (tags,) = struct.unpack(tif.tiff.tagnoformat, tif.filehandle.read(tif.tiff.tagnosize))
        if len(first.tags) < tags:
            raise ValueError(f"{tags - len(first.tags)} of {tags} tags are cut off")
        like = first.shape, first.dtype, 0  # further full-size pages of one band are bands
        more = tif.pages[1:] if first.samplesperpixel == 1 else []
        pages = [first, *(p for p in more if (p.shape, p.dtype, p.subfiletype) == like)]
        end = max(np.add(page.dataoffsets, page.databytecounts).max() for page in pages)
        if end > size:  # whatever the codec makes of what is cut off
            raise ValueError(f"pixels up to byte {end}, it ends at {size}")
        check_claim(path, sum(page.nbytes for page in pages))
        yield pages, describe(Path(path), first, first.samplesperpixel * len(pages))


def describe(path, page, bands):
    """raster.Info of an image by the tags of a page. Of its ground only a transform without turn
    in a CRS of a code: whatever else a publisher has, its pairs show the same ground."""
    nodata, names, transform, crs = None, {}, None, None
    with suppress(ValueError):  # what is no number declares nothing
        nodata = float(page.tags.valueof(GDAL_NODATA, "none"))
    with suppress(ET.ParseError):
        items = ET.fromstring(page.tags.valueof(GDAL_METADATA, "<none/>")).iter("Item")
        # GDAL escapes what it puts into XML once more
        items = [(i.get("sample"), unescape(i.text or ""), i.get("role")) for i in items]
        names = {band: name for band, name, role in items if role == "description"}
    names = tuple(names.get(str(band), "") for band in range(bands)) if any(names.values()) else ()
    tags = page.geotiff_tags or {}
    code = int(tags.get("ProjectedCSTypeGeoKey", tags.get("GeographicTypeGeoKey", 0)))
    if "ModelPixelScale" in tags and "ModelTiepoint" in tags and 0 < code < 32767:
        width, height = np.abs(tags["ModelPixelScale"][:2]).tolist()
        col, row, _, x, y, _ = tags["ModelTiepoint"][:6]
        point = 0.5 if int(tags.get("GTRasterTypeGeoKey", 1)) == 2 else 0.0  # centres are tied
        x, y = x - (col + point) * width, y + (row + point) * height
        transform = (width, 0.0, x, 0.0, -height, y)
        crs = f"EPSG:{code}"
    size = page.imagewidth, page.imagelength, bands, page.dtype.newbyteorder("=")
    return raster.Info(path, *size, nodata, transform, crs, names)


def decode_tiff(path):
    """Pixels (bands, rows, cols) of the first image of a TIFF, in native byte order, and its Info.
    Raises ValueError in one sentence."""
    with open_tiff(path) as (pages, info):
        pixels = [page.asarray(maxworkers=1) for page in pages]  # threads read whole files
        pixels = np.moveaxis(pixels[0], -1, 0) if pages[0].axes == "YXS" else np.stack(pixels)
        pixels = check_array(pixels.reshape(-1, *pixels.shape[-2:]), (None, None, None))
        return pixels.astype(info.dtype, copy=False), info


def read_tiff(path, window=None, bands=None):
    """Pixels of a TIFF; window: (row, col, height, width), bands: positions, all when None. The
    chips of sets are small, so all is decoded."""
    return read_array(decode_tiff(path)[0], window, bands)


def read_array(image, window=None, bands=None):
    """As `read_tiff` of an array (bands, height, width)."""
    row, col, height, width = window or (0, 0, *image.shape[1:])
    image = image[:, row : row + height, col : col + width]
    bands = range(len(image)) if bands is None else bands
    return np.stack([image[band] for band in bands])  # faster than image[bands] of pixels by pixel


def read_float(path, count, bands=None):
    """Bands of a TIFF of `count` -> float32, NaN where not finite or where all are nodata.

    Raises ValueError for a file of another number of bands, as positions tell nothing there.
    """
    pixels, info = decode_tiff(path)
    if len(pixels) != count:
        raise ValueError(
            f"{path}: {len(pixels)} bands, its publisher ships {count}; download it again"
        )
    return raster.as_float(read_array(pixels, bands=bands), info.nodata)


def tiff_samples(split, files, count, positions):
    """Samples of one TIFF of `count` bands and a mask each; files: {sample: (image, mask)}."""
    return Samples(
        split,
        files,
        lambda image, mask: read_tiff(mask)[0],
        lambda image, mask: read_float(image, count, positions),
    )


# pairs


def listing(units, chip, sources, skipped=(), bands=BGRN):
    """The Listing of a set whose MR and HR images have the same bands."""
    return Listing(units, {"mr": list(bands), "hr": list(bands)}, chip, sources, skipped)


def unit(name, opens, *about):
    """The Unit that opens by opens(*about), which is its key as well: text, numbers and paths."""
    return Unit(name, functools.partial(opens, *about), digest(about))


def tiff_units(places, mr_orders, hr_orders=None, bands=BGRN):
    """Units of GeoTIFFs of these bands. places: (name, [(mr path, hr path, mr date, hr date)],
    split, site); orders: number of bands -> their positions, in files that do not name them."""
    about = mr_orders, hr_orders or mr_orders, bands
    return [unit(name, open_tiffs, files, *about, *more) for name, files, *more in places]


def digest(about):
    return hashlib.sha256(repr(about).encode(errors="surrogateescape")).hexdigest()[:16]


def open_tiffs(files, mr_orders, hr_orders, bands, split, site):
    """Yield the Pair of each of the files of `tiff_units`."""
    for mr_path, hr_path, mr_date, hr_date in files:
        mr = tiff_source(Path(mr_path), mr_orders, bands, mr_date)
        hr = tiff_source(Path(hr_path), hr_orders, bands, hr_date)
        # publishers cut both to the same ground; a georeference that only one has, or another CRS,
        # cannot say it better
        if not (mr.info.transform and hr.info.transform and mr.info.crs == hr.info.crs):
            mr, hr = (s._replace(info=replace(s.info, transform=None, crs=None)) for s in (mr, hr))
        yield Pair(mr, [hr], split, site)


def tiff_source(path, orders, names, date):
    """A Source of the named bands, by the names in the file, else by orders: bands -> positions."""
    with open_tiff(path) as (_, info):
        pass
    bands = positions(names, info.band_names, sentinel=True)  # sets without it write no B2
    if min(bands) < 0:
        bands = orders.get(info.bands)
    if bands is None:
        raise ValueError(
            f"{path}: {info.bands} bands without the names {', '.join(names)}, "
            f"{' or '.join(map(str, orders))} expected; pack it with --format geotiff, --mr-bands"
        )
    return Source(info, bands, info.nodata, functools.partial(read_tiff, path), date)


def array_source(path, shape, dtype, image, date=""):
    """A Source of the array (bands, height, width) that image() gives."""

    def read(window=None, bands=None):
        return read_array(image(), window, bands)

    bands, height, width = shape
    info = raster.Info(Path(path), width, height, bands, dtype, None, None, None, ())
    return Source(info, list(range(bands)), None, read, date)
