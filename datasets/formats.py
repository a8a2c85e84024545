"""From a folder as it was published to pairs of HR and MR images, described but not yet decoded.

A reader lists `Unit`s: pieces of work, each of which opens to `Pair`s of `Source`s. pack.py cuts
these into a store; it knows no layout, and this file knows no store.
"""

import csv
import datetime
import difflib
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import xml.etree.ElementTree as ET
import zlib
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

from imagery import geotiff
from imagery.bands import SAME_BAND, meanings, positions

# An image and what is wanted of it. info: geotiff.Info, whose path may name a part, "x.pt#12".
# bands: positions. nodata: value or None. read(window, bands) -> (bands, height, width), as
# geotiff.read without the path. date: ISO text or "". offset: what its makers say is to be added
# to its valid pixels (-1000 for Sentinel-2 from processing baseline 04.00 on); read adds nothing.
Source = namedtuple("Source", "info bands nodata read date offset", defaults=("", 0))
# One MR image and the HR images that may serve it, the best first, maybe none. split: "train",
# "val", "test" or None; site: what must not be divided between splits, or None (then the ground
# decides). Where no georeference is given the images show the same ground, edge to edge.
Pair = namedtuple("Pair", "mr hrs split site", defaults=(None, None))
# A piece of work. name: what a reader of reports knows it by; open() yields its Pairs, in the same
# order each time, and raises as a reader does. key: differs where what it yields does, such as
# other HR files, bands, dates or splits; resuming compares it.
Unit = namedtuple("Unit", "name open key", defaults=("",))
# What a reader returns. bands: {"mr": names, "hr": names}, as chosen from the files; first those of
# hr that mr has, as mr calls them and in its order; [] without HR. chip: side in MR pixels to cut
# to, None where the user decides. sources: [{"name", "licence", "attribution", "url"}]. skipped:
# [(name, reason)] of what was found and left out.
Listing = namedtuple("Listing", "units bands chip sources skipped", defaults=(None, (), ()))

RASTERS = (".tif", ".tiff", ".jp2")
BGRN = ["B", "G", "R", "NIR"]
BAND_FILE = re.compile(
    r"(?P<scene>.*?)[_.-]?(?<![A-Za-z0-9])(?P<band>B(0?[1-9]|1[0-2]|8A)|blue|green|red|nir)"
    r"(_\d\dm)?",
    re.IGNORECASE,
)
OFFSET_TAGS = {"BOA_ADD_OFFSET", "RADIO_ADD_OFFSET"}
DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)([-_]?)([01]\d)\2([0-3]\d)(?!\d)")
MONTH = re.compile(r"(?<!\d)(20\d\d)[-_]?(0[1-9]|1[0-2])(?!\d)")
SAMPLE_ID = re.compile(r"\d\d[NS]_\d+[EW]-\d+[NS]_\d+_\d+")
PLANET_OR_S2 = re.compile(r"(?<![A-Za-z0-9])(PF|S2)(?![A-Za-z0-9])")
# number of bands -> positions of B, G, R, NIR in the order of Sentinel-2's numbers: L2A has no B10
S2_BANDS = {12: [1, 2, 3, 7], 13: [1, 2, 3, 7]}


def read_geotiff(
    mr, hr=None, *, mr_bands=None, hr_bands=None, band_names=None, hr_band_names=None, nodata=None
):
    """Any GeoTIFFs, and JPEG 2000 where rasterio is installed, paired by their georeference.

    mr, hr: folder, file or glob; without hr, the folders mr/ and hr/ in mr if they are there, else
    images without HR. A file holds all bands, or one, and then its name ends with the band's
    ("..._B04.tif", "..._red.tif") and those next to it that differ in this alone are its scene; so
    are the bands of a Sentinel-2 SAFE folder. mr_bands, hr_bands: names or positions from 0, as
    text; all bands when None, but B, G, R, NIR of a scene of one file per band. band_names,
    hr_band_names: what the chosen bands are called, else as in the files. Where both sensors name
    their bands HR gives those that MR has, by what the names mean, and all of its own where MR has
    none of them or hr_bands chooses; else theirs are the same, in the same order.
    Returns Listing, a unit per MR image. Raises FileNotFoundError or ValueError as its parts do.
    """
    if hr is None and (Path(mr) / "mr").is_dir():
        mr, hr = Path(mr) / "mr", Path(mr) / "hr"
        hr = hr if hr.is_dir() else None
    mr_sources, names = open_sources(mr, "mr", mr_bands, band_names, nodata)
    check_band_order({"--mr-bands": mr_sources}, band_names)
    pairs, hr_names = [(source, []) for source in mr_sources], []
    if hr is not None:
        if called := hr_band_names:
            same = dict(zip(meanings(names), names, strict=True))
            meant = zip(called, meanings(called), strict=True)
            called = [name if name in names else same.get(m, name) for name, m in meant]
        else:
            path, files = scenes(find_files(hr, "--hr"))[0]
            has = list(files or describe(path).band_names)
            hr_bands, called = shared_bands(mr_sources[0], names, path, has, hr_bands)
        hr_sources, hr_names = open_sources(hr, "hr", hr_bands, called or names, nodata)
        check_band_order({"--mr-bands": mr_sources, "--hr-bands": hr_sources}, band_names)
        check_band_order({"--hr-bands": hr_sources}, hr_band_names, "--hr-band-names")
        place = [*names, *hr_names].index
        order = sorted(range(len(hr_names)), key=lambda k: place(hr_names[k]))
        hr_names = [hr_names[k] for k in order]
        hr_sources = [s._replace(bands=[s.bands[k] for k in order]) for s in hr_sources]
        pairs = pair_up(mr_sources, hr_sources, mr, hr)
    units = []
    for source, hrs in pairs:
        # all but read, whose text is another in each run
        about = [(s.info, s.bands, s.nodata, s.date, s.offset) for s in [source, *hrs]]
        opened = functools.partial(iter, [Pair(source, hrs)])
        units.append(Unit(source.info.path.as_posix(), opened, digest(about)))
    return Listing(units, {"mr": names, "hr": hr_names})


def find_files(where, flag):
    """The GeoTIFF and JPEG 2000 files of a folder and its subfolders, one file, or a glob; sorted.

    Of a Sentinel-2 SAFE folder only the images of bands.
    """
    path = Path(where)
    if path.is_dir():
        files = (file for file in path.rglob("*") if not file.name.startswith("."))
    elif path.is_file():
        files = [path]
    else:
        files = map(Path, glob.glob(str(where), recursive=True))
    files = [p for p in files if p.suffix.lower() in RASTERS and p.is_file()]
    files = [p for p in files if not in_safe(p) or ("IMG_DATA" in p.parts and band_of(p)[1])]
    if not files:
        raise FileNotFoundError(
            f"{flag} {where}: no .tif or .tiff found; give a folder, a file or a quoted glob of "
            "them or of .jp2"
        )
    return sorted(files)


def in_safe(path):
    return any(part.upper().endswith(".SAFE") for part in path.parts[:-1])


def band_of(path):
    """(scene, band): what a file's name says before its band's name, and that; (path, "") of one
    that ends with no band."""
    match = BAND_FILE.fullmatch(path.stem)
    if not match:
        return path, ""
    folder = path.parent
    if "IMG_DATA" in path.parts:  # L2A has a subfolder for each pixel size
        folder = Path(*path.parts[: path.parts.index("IMG_DATA")])
        return folder, match["band"].upper()
    return folder / match["scene"] if match["scene"] else folder, match["band"]


def scenes(files):
    """Gather the files that hold one band each: [(path of the scene, {band: file})], else
    [(path of the file, None)]."""
    groups = {}
    for file in files:
        scene, band = band_of(file)
        # sorted by path, so R10m comes first and the finest file of a band is the one that stays
        groups.setdefault(scene, {}).setdefault(SAME_BAND.get(band.lower(), band), file)
    listed = []
    for scene, bands in groups.items():
        if len(bands) > 1 or "IMG_DATA" in next(iter(bands.values())).parts:
            listed.append((scene, bands))
        else:
            listed += [(file, None) for file in bands.values()]
    return listed


def describe(path, files=None):
    """Info of an image: of one file, or of a scene as if its files were one."""
    if files is None:
        return jp2_info(path) if path.suffix.lower() == ".jp2" else geotiff.info(path)
    first, *others = [describe(file) for file in files.values()]
    for other in [first, *others]:
        if other.bands != 1:
            raise ValueError(
                f"{other.path}: {other.bands} bands, but it is named as one band of {path}; rename "
                "it, or give its folder apart"
            )
        here = (other.width, other.height, other.dtype, other.transform)
        if here != (first.width, first.height, first.dtype, first.transform):
            raise ValueError(
                f"{other.path}: {other.height} x {other.width} {other.dtype}, but {first.path} is "
                f"{first.height} x {first.width} {first.dtype}, or their ground differs; choose "
                "bands of one pixel size and type"
            )
    return replace(first, path=path, bands=len(files), band_names=tuple(files))


def read_raster(path, window=None, bands=None):
    read = jp2_read if path.suffix.lower() == ".jp2" else geotiff.read
    return read(path, window, bands)


def read_scene(files, window=None, bands=None):
    """Read bands that lie in a file each; as geotiff.read."""
    bands = range(len(files)) if bands is None else bands
    return np.concatenate([read_raster(files[band], window) for band in bands])


def rasterio_for(path):
    try:
        import rasterio
    except ImportError as error:
        raise ValueError(
            f"{path}: JPEG 2000 needs rasterio; pip install rasterio, or convert the file with "
            "gdal_translate"
        ) from error
    return rasterio


def jp2_info(path):
    rasterio = rasterio_for(path)
    try:
        with rasterio.open(path) as file:
            transform = None if file.transform.is_identity else tuple(file.transform)[:6]
            code = file.crs.to_epsg() if file.crs else None
            if file.crs and code is None:
                raise ValueError(f"{path}: a CRS without EPSG code; convert it with gdal_translate")
            key = "GeographicTypeGeoKey"
            if code and not file.crs.is_geographic:
                key = "ProjectedCSTypeGeoKey"
            return geotiff.Info(
                path=path,
                width=file.width,
                height=file.height,
                bands=file.count,
                dtype=np.dtype(file.dtypes[0]),
                nodata=file.nodata,
                transform=transform,
                crs={key: code} if code else None,
                band_names=(),
            )
    except rasterio.errors.RasterioIOError as error:
        raise ValueError(f"{path}: cannot be read ({error}); fetch the file again") from error


def jp2_read(path, window=None, bands=None):
    rasterio = rasterio_for(path)
    if window is not None:
        row, col, height, width = window
        window = rasterio.windows.Window(col, row, width, height)
    try:
        with rasterio.open(path) as file:
            return file.read(None if bands is None else [b + 1 for b in bands], window=window)
    except rasterio.errors.RasterioIOError as error:
        raise ValueError(f"{path}: cannot be read ({error}); fetch the file again") from error


def safe_offset(path):
    """What is to be added to the pixels of a Sentinel-2 product: -1000 from baseline 04.00 on.

    Read from the product's MTD_MSI*.xml, else from the baseline in its name; 0 of other files.
    """
    for folder in [path, *path.parents][:4]:
        for mtd in sorted(folder.glob("MTD_MSIL*.xml")):
            try:
                items = ET.parse(mtd).iter()
            except ET.ParseError as error:
                raise ValueError(f"{mtd}: damaged XML ({error}); fetch it again") from error
            found = [e.text for e in items if e.tag.rpartition("}")[2] in OFFSET_TAGS]
            return float(found[0]) if found else 0
        if folder.name.upper().endswith(".SAFE"):
            baseline = re.search(r"_N(\d{4})_", folder.name)
            # 9999 are those that users processed, who are known to have an MTD
            return -1000 if baseline and 400 <= int(baseline[1]) < 9999 else 0
    return 0


def date_of(text):
    """The first date in a name, "20200131" or "2020-01-31", as ISO text; "" without one."""
    for match in DATE.finditer(text):
        try:
            return datetime.date(int(match[1]), int(match[3]), int(match[4])).isoformat()
        except ValueError:
            continue  # digits of something else
    return ""


def open_sources(where, sensor, wanted, names, nodata):
    """Describe the files of one sensor and choose their bands.

    wanted: list of band names or indices as text, all bands when None. names: what the bands are
    called, else as in the first file. nodata: for files that declare none. Returns sources, names.
    Raises ValueError for a band that is not there, another number of bands, complex or mixed dtype.
    """
    sources, flag = [], f"--{sensor}-bands"
    listed = scenes(find_files(where, f"--{sensor}"))
    for path, files in tqdm(listed, f"{sensor} headers", leave=False):
        info = None if files else describe(path)
        has = list(files) if files else info.band_names
        count = len(files) if files else info.bands
        usual = BGRN if files and {*BGRN} <= {*files} else list(map(str, range(count)))
        bands = positions(wanted or usual, has)
        if min(bands) < 0 or max(bands) >= count:
            raise ValueError(
                f"{path}: {flag} {','.join(wanted)} asked for, the file has {count} bands "
                f"({','.join(has) if any(has) else 'without names'}); use indices from 0"
            )
        read, offset = functools.partial(read_raster, path), 0
        if files:  # only the chosen are opened: the others may have another pixel size
            files = {has[band]: files[has[band]] for band in bands}
            bands, info = list(range(len(files))), describe(path, files)
            read = functools.partial(read_scene, list(files.values()))
            if "IMG_DATA" in read.args[0][0].parts:
                offset = safe_offset(path)
                info = replace(info, nodata=0.0)  # the product's, which its files do not declare
        names = names or [info.band_names[b] if info.band_names else str(b) for b in bands]
        if len(bands) != len(names):
            raise ValueError(
                f"{path}: {len(names)} bands expected ({','.join(names)}), found {len(bands)}; use "
                f"{flag} to choose them, such as {flag} 2,1,0 for RGB files"
                + (", or say with --hr-band-names what they are" if sensor == "hr" else "")
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
        sources.append(Source(info, bands, nodata_of, read, date_of(path.name), offset))
    return sources, names


def names_of(source):
    """[(name in the file, what it means)] of a source's bands; [] unless all are named, and not by
    numbers."""
    has = source.info.band_names
    names = [(has[band], meanings(has)[band]) for band in source.bands if has]
    return names if all(name and not name.isdecimal() for name, _ in names) else []


def shared_bands(mr, names, path, has, wanted):
    """Which bands of the HR files to take, and what to call them: (hr_bands, names or None).

    mr: a source, whose bands are called names. has: what the HR file at path calls all of its
    bands. wanted: bands chosen from these by the user, or None. A band that MR has gets MR's name.
    Unless they are wanted, bands that MR has not are left out, or none where it has none of them.
    names are None, for MR's, where one sensor does not name its bands or both use the same names.
    Raises ValueError if a band is called as one of MR's that is another.
    """
    at = positions(wanted, has) if wanted else range(len(has))
    if not has or min(at) < 0 or max(at) >= len(has):
        return wanted, None
    theirs = [(has[band], meanings(has)[band]) for band in at]
    ours = names_of(mr) or list(zip(names, meanings(names), strict=True))
    if not all(name and not name.isdecimal() for name, _ in ours + theirs):
        return wanted, None
    if sorted(name.lower() for name, _ in ours) == sorted(name.lower() for name, _ in theirs):
        return wanted, None  # check_band_order compares them, in every file
    name_of = {meant: name for name, meant in reversed(theirs)}
    both = [(name_of[m], name) for (_, m), name in zip(ours, names, strict=True) if m in name_of]
    left = [name for name, _ in theirs if name not in dict(both)]
    mr_has = ",".join(name for name, _ in ours)
    if both and not wanted:
        if left:
            print(f"{path}: {','.join(left)} left out, as MR has {mr_has}; --hr-bands can take all")
        return [theirs_name for theirs_name, _ in both], [name for _, name in both]
    own = [name for name, _ in theirs]
    if not both and not names_of(mr) and len(own) == len(names):
        # the names that the user gives are of bands in this order
        print(f"{path}: its {','.join(own)} are called {','.join(names)}, as MR's; "
              "--hr-band-names can say otherwise")  # fmt: skip
        return wanted, None
    if same := [name for name in left if name.lower() in [n.lower() for n in names]]:
        raise ValueError(
            f"{path}: its {','.join(same)} cannot be told from MR's ({mr_has}), which mean other "
            "bands; say what HR's are with --hr-band-names, or choose others with --hr-bands"
        )
    if not both:
        print(f"{path}: {','.join(own)} are other bands than MR's ({mr_has}) by their names; if "
              "they are not, say what MR calls them with --hr-band-names")  # fmt: skip
    return own, [dict(both).get(name, name) for name in own]


def check_band_order(flags, given, flag_given="--band-names"):
    """Raise ValueError where a file has the bands of another, by their names, in another order.

    flags: the flag that chooses the bands -> sources. given: the names of the flag
    `flag_given`, or None. Names that mean the same are the same.
    A file that does not name all of its chosen bands says nothing of their order.
    """
    named = [(None, flag_given, given, meanings(given))] if given else []
    for flag, sources in flags.items():
        for source in sources:
            if about := names_of(source):
                named.append((flag, source.info.path, *map(list, zip(*about, strict=True))))
    orders = {}  # what they mean, sorted -> who has them first, and in which order
    for flag, who, names, meant in named:
        first, has, order = orders.setdefault(tuple(sorted(meant)), (who, names, meant))
        if meant != order:
            raise ValueError(
                f"{who}: its bands are {','.join(names)}, but {first} has {','.join(has)}; use "
                f"{flag} {','.join(has)}"
            )


def pair_up(mr_sources, hr_sources, mr, hr):
    """Find the HR files that may serve each MR file: [(mr, [hr, ...])], the best first.

    By ground where files are georeferenced, the nearest date first where names tell it, then the
    likest name; by name, as same_name, where none is. mr, hr: where they were looked for. Raises
    ValueError if nothing pairs, with the reason.
    """
    everyone = [*mr_sources, *hr_sources]
    placed = [s.info for s in everyone if s.info.transform is not None]
    if not placed:
        pairs = same_name(mr_sources, hr_sources, mr, hr)
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


def same_name(mr_sources, hr_sources, mr, hr):
    """Pairs [(mr, [hr] or [])] by file stem; where more than one file of a sensor has it, by their
    path under the folders mr and hr."""
    stems = {}
    for k, sources in enumerate((mr_sources, hr_sources)):
        for source in sources:
            stems.setdefault(source.info.path.stem, ([], []))[k].append(source)
    twin = {}  # path of an MR file -> its HR source
    for mrs, hrs in stems.values():
        places = {under(h.info.path, hr): h for h in hrs}
        found = {m.info.path: places.get(under(m.info.path, mr)) for m in mrs}
        if len(mrs) < 2 and len(hrs) < 2:
            found = {m.info.path: h for m in mrs for h in hrs}
        elif hrs and (len(places) < len(hrs) or not any(found.values())):
            first, other = (hrs if len(hrs) > 1 else mrs)[:2]
            raise ValueError(
                f"{other.info.path}: the same name as {first.info.path}, and no georeference to "
                "tell them apart; rename one, or give HR and MR the same subfolders"
            )
        twin |= found
    return [(m, [twin[m.info.path]] if twin.get(m.info.path) else []) for m in mr_sources]


def under(path, where):
    """The path of a file, without suffix, under the folder given or where a glob begins."""
    folder = Path(where)
    while not folder.is_dir():
        folder = folder.parent
    return path.relative_to(folder).with_suffix("")


def unlike(mr, hr):
    """Sort key: how far the date of an HR file and how little its name resembles an MR file's."""
    days = days_between(mr.date, hr.date) if mr.date and hr.date else math.inf
    a, b = mr.info.path.stem, hr.info.path.stem
    return days, -difflib.SequenceMatcher(None, a, b).ratio(), str(hr.info.path)


def days_between(a, b):
    return abs(day_number(a) - day_number(b))


@functools.lru_cache
def day_number(date):
    return datetime.date.fromisoformat(date).toordinal()


# What is published: where, under which terms, how large (bytes as the publisher gives them, or
# counted from the sizes of its images). sources: one for each sensor whose terms differ.
Published = namedtuple("Published", "title url size pairs sources")


def terms(name, licence, attribution, url):
    return {"name": name, "licence": licence, "attribution": attribution, "url": url}


COPERNICUS = (
    "Copernicus Sentinel data terms (free and open)",
    "Contains modified Copernicus Sentinel data",
)
URLS = {
    "sen2venus": "https://zenodo.org/records/6514159",
    "rapidai4eo": "https://source.coop/planet/rapidai4eo",
    "worldstrat": "https://zenodo.org/records/6810792",
    "sen2naip": "https://huggingface.co/datasets/isp-uv-es/SEN2NAIP",
}
PUBLISHED = {
    "sen2venus": Published(
        "SEN2VENµS",
        URLS["sen2venus"],
        "139.5 GB of zips (v2, zenodo.org/records/14603764); 10 m and 5 m alone 87 GB unpacked",
        "132,955, 5 m to 10 m (x2)",
        (
            terms(
                "SEN2VENµS",
                "non-commercial; see the record",
                "Michel et al., Data 7(7), 96, 2022, doi:10.3390/data7070096",
                URLS["sen2venus"],
            ),
        ),
    ),
    "rapidai4eo": Published(
        "RapidAI4EO",
        URLS["rapidai4eo"],
        "17 TB; take a part of it",
        "500,000 places, 79 million images, 3 m to 10 m (x3.33)",
        (
            terms(
                "RapidAI4EO, Planet Fusion",
                "CC-BY-NC-SA-3.0",
                "Planet Labs PBC; RapidAI4EO project, European Union's Horizon 2020 research and "
                "innovation programme, grant agreement No 101004356",
                URLS["rapidai4eo"],
            ),
            terms("RapidAI4EO, Sentinel-2", *COPERNICUS, URLS["rapidai4eo"]),
        ),
    ),
    "worldstrat": Published(
        "WorldStrat",
        URLS["worldstrat"],
        "107 GB",
        "about 4,000 places, 6 m to 10 m (x1.7), 1.5 m pan-sharpened",
        (
            terms(
                "WorldStrat, SPOT 6/7",
                "CC-BY-NC-4.0",
                "Cornebise, Oršolić, Kalaitzis: WorldStrat, 2022, arXiv 2207.06418; Airbus SPOT",
                URLS["worldstrat"],
            ),
            terms("WorldStrat, Sentinel-2", "CC-BY-4.0", COPERNICUS[1], URLS["worldstrat"]),
        ),
    ),
    "sen2naip": Published(
        "SEN2NAIP (v1)",
        URLS["sen2naip"],
        "cross-sensor 3 GB unpacked; synthetic not known",
        "2,851 cross-sensor, 35,314 synthetic, 2.5 m to 10 m (x4)",
        (
            terms(
                "SEN2NAIP",
                "CC-BY-4.0",
                "Aybar et al., Scientific Data, 2024, doi:10.1038/s41597-024-04214-y",
                URLS["sen2naip"],
            ),
        ),
    ),
}


def read_sen2venus(root, *, product="10m"):
    """SEN2VENµS as published: v1, a .pt of patches per date and sensor; v2, a GeoTIFF per patch.

    root: holds the unpacked sites, at any depth. product: "10m" pairs B, G, R, NIR of 10 m (128
    pixels) with VENµS at 5 m (256); "20m" pairs B05, B06, B07, B8A of 20 m (64) with the same at
    5 m, which v1 calls b4b5b6b8a. site: the VENµS site, for there are no splits; both dates are the
    day that images share. v1: {SITE}_{TILE}_{DATE}_05m_b2b3b4b8.pt, int16 reflectance x 10000,
    Michel et al. 2022. v2 is found by the same parts of the path, in any order.
    """
    if product not in SEN2VENUS:
        raise ValueError(f"--product {product}: 10m or 20m expected")
    keys, names, chip = SEN2VENUS[product]
    part = re.compile(r"(?<![0-9a-z])(05m|5m|10m|20m)(?![0-9a-z])")
    found = {}  # path without its gsd -> {sensor: path}
    for path, name in walk(root, (".pt", ".tif", ".tiff")):
        name = name.lower()
        gsd = part.findall(name)
        if gsd and any(re.search(rf"(?<![0-9a-z]){key}(?![0-9a-z])", name) for key in keys):
            sensor = "mr" if gsd[-1] == product else "hr" if gsd[-1] in ("05m", "5m") else None
            found.setdefault(part.sub("", name), {})[sensor] = path
    pairs, skipped = complete(found)
    if not pairs:
        raise missing(
            root, f"no pair of *_05m_{keys[0]}.pt and *_{product}_{keys[0]}.pt, nor such .tif"
        )
    units = []
    for mr, hr in pairs:
        place = Path(mr).relative_to(root).as_posix()
        about = re.search(r"([^/]+?)_*_\d\d[A-Z]{3}_\d{4}-\d\d-\d\d", place)
        site = about[1] if about else place.split("/")[0] if "/" in place else Path(root).name
        opened = open_patches if mr.lower().endswith(".pt") else open_tiffs
        orders = {len(names): [0, 1, 2, 3]}
        date = date_of(place)
        units.append(unit(place, opened, [(mr, hr, date, date)], orders, orders, None, site))
    sources = PUBLISHED["sen2venus"].sources
    return Listing(units, {"mr": names, "hr": names}, chip, sources, skipped)


SEN2VENUS = {
    "10m": (["b2b3b4b8"], BGRN, 128),
    "20m": (["b4b5b6b8a", "b5b6b7b8a"], ["B05", "B06", "B07", "B8A"], 64),
}


def read_rapidai4eo(root, *, per_site=1, seed=0):
    """RapidAI4EO as published: monthly Sentinel-2 (60 x 60) and 5-day Planet Fusion (200 x 200).

    root: holds the imagery, or a part of it. Files are told apart by PF or S2 (PF-SR, S2-SR) in
    their path, places by their sample id (33N_15E-243N_01_09), else by folder, and months and days
    by the date in their name. per_site: months drawn for each place, by seed; each pairs with the
    Planet image nearest to the month's middle, which serves as the mosaic's date. site: the tile of
    the places, which lie close together. S2 has 12 bands, in the order of their numbers unless the
    files name them; Planet B, G, R, NIR.
    """
    check_per_site(per_site)
    units, rest = [], {}
    # the images of a place come one after the other, so that its list is not held for long
    for place, images in itertools.groupby(rapidai4eo_images(root), key=itemgetter(0)):
        months, days = rest.setdefault(place, ({}, {}))
        for _, sensor, date, path in images:
            (months if sensor == "S2" else days)[date] = path
        if not months or not days:
            continue
        del rest[place]
        drawn = sorted(months, key=lambda month: zlib.crc32(f"{seed} {place} {month}".encode()))
        chosen = []
        for month in sorted(drawn[:per_site]):
            day = min(days, key=functools.partial(days_between, month))
            chosen.append((months[month], days[day], month, day))
        tile = place.rsplit("_", 2)[0] if SAMPLE_ID.fullmatch(place) else place
        units.append(unit(place, open_tiffs, chosen, S2_BANDS, {4: [0, 1, 2, 3]}, None, tile))
    skipped = [
        (place, "no Planet image" if months else "no Sentinel-2 image")
        for place, (months, days) in rest.items()
    ]
    if not units:
        wanted = "no place with S2-SR/*_YYYY-MM.tif and PF-SR/*_YYYY-MM-DD.tif"
        raise missing(root, wanted)
    sources = PUBLISHED["rapidai4eo"].sources
    return Listing(units, {"mr": BGRN, "hr": BGRN}, 60, sources, skipped)


def rapidai4eo_images(root):
    """Yield (place, "PF" or "S2", date, path)."""
    for path, name in walk(root, (".tif", ".tiff")):
        sensors, stem = PLANET_OR_S2.findall(name), name.rpartition("/")[2]
        month = MONTH.search(stem)
        middle = f"{month[1]}-{month[2]}-15" if month else ""
        date = date_of(stem) if sensors[-1:] == ["PF"] else middle
        if sensors and date:
            ids = SAMPLE_ID.findall(name)
            place = ids[-1] if ids else PLANET_OR_S2.split(name)[0].strip("/")
            yield place, sensors[-1], date, path


def read_worldstrat(root, *, level="L2A", hr="rgbn", per_site=1):
    """WorldStrat as published: SPOT 6/7 and up to 16 Sentinel-2 revisits of each place.

    root: holds hr_dataset and lr_dataset, at any depth, and the two .csv tables. level: "L2A" (12
    bands) or "L1C" (13). hr: "rgbn" (6 m, as taken) or "ps" (1.5 m, pan-sharpened); both R, G, B,
    NIR. per_site: revisits of a place to take, those nearest to the SPOT image in date first where
    metadata.csv tells, else the first. Sizes differ from place to place.
    Splits: stratified_train_val_test_split.csv; its places that are not on disk are skipped.
    """
    if level not in ("L2A", "L1C") or hr not in ("rgbn", "ps"):
        raise ValueError(f"--level {level} --hr-product {hr}: L2A or L1C and rgbn or ps expected")
    check_per_site(per_site)
    hr_file = re.compile(rf"(.+)_{hr}\.tiff?", re.IGNORECASE)
    mr_file = re.compile(rf"(.+)-(\d+)-{level}_data\.tiff?", re.IGNORECASE)
    hrs, mrs, tables = {}, {}, {}
    for path, name in walk(root, (".tif", ".tiff", ".csv")):
        name = name.rpartition("/")[2]
        if match := hr_file.fullmatch(name):
            hrs[match[1]] = path
        elif match := mr_file.fullmatch(name):
            mrs.setdefault(match[1], {})[int(match[2])] = path
        elif name in ("metadata.csv", "stratified_train_val_test_split.csv"):
            tables[name] = path
    table_path = tables.get("stratified_train_val_test_split.csv")
    splits, dates = worldstrat_splits(table_path), {}
    header, *rows = table(tables.get("metadata.csv")) or [[]]
    for row in (dict(zip(header, cells, strict=False)) for cells in rows):
        place = row.get("tile") or next(iter(row.values()))
        days = date_of(row.get("lowres_date", "")), date_of(row.get("highres_date", ""))
        dates[place, int(row["n"]) if row.get("n", "").isdecimal() else None] = days
    units, skipped = [], []
    for place in sorted({*splits, *hrs, *mrs}):
        if place not in hrs or place not in mrs:
            skipped.append((place, f"no {level} image" if place in hrs else f"no {hr} image"))
            continue
        visits = []
        for n, path in mrs[place].items():
            days = dates.get((place, n), ("", ""))
            gap = days_between(*days) if all(days) else math.inf
            visits.append((gap, n, (path, hrs[place], *days)))
        chosen = [files for _, _, files in sorted(visits)[:per_site]]
        orders = S2_BANDS, {4: [2, 1, 0, 3]}
        units.append(unit(place, open_tiffs, chosen, *orders, splits.get(place), place))
    if not units:
        wanted = f"no place with <AOI>_{hr}.tiff (hr_dataset) and <AOI>-<n>-{level}_data.tiff"
        raise missing(root, f"{wanted} (lr_dataset)")
    if dealt := sum(unit.name not in splits for unit in units):
        who = table_path or f"{root}: no stratified_train_val_test_split.csv"
        print(f"{who}: {dealt} of {len(units)} places are in no split; they are dealt by site")
    sources = PUBLISHED["worldstrat"].sources
    return Listing(units, {"mr": BGRN, "hr": BGRN}, 64, sources, skipped)


def worldstrat_splits(path):
    """{place: split} of the publisher's table, with a header or without; {} without a table.

    The columns are those called tile and split, else the last is the split and the place is the
    first cell that is no number. Rows without either are left out.
    """
    rows = table(path)
    header = [cell.lower() for cell in rows[0]] if rows else []
    if not {*header} & SPLIT_NAMES.keys():
        rows = rows[1:]
    at = header.index("split") if "split" in header else -1
    splits = {}
    for row in rows:
        if len(row) < 2 or row[at:][:1] in ([], [""]):
            continue
        split, others = split_name(path, row[at]), [*row]
        del others[at]
        place = next((cell for cell in others if cell and not cell.isdecimal()), others[-1])
        if "tile" in header and row[header.index("tile") :]:
            place = row[header.index("tile")]
        if splits.setdefault(place, split) != split:
            raise ValueError(f"{path}: {place} is in {splits[place]} and in {split}; choose one")
    return splits


def read_sen2naip(root):
    """SEN2NAIP v1 as published, cross-sensor or synthetic: a folder for each pair, lr.tif, hr.tif.

    Sentinel-2 (121 x 121, 10 m) and NAIP (484 x 484, 2.5 m), both R, G, B, NIR. No splits: the
    folder (ROI_0000) is the site.
    """
    found = {}
    for path, name in walk(root, (".tif",)):
        folder, _, file = name.rpartition("/")
        if sensor := {"lr.tif": "mr", "hr.tif": "hr"}.get(file.lower()):
            found.setdefault(folder, {})[sensor] = path
    pairs, skipped = complete(found)
    if not pairs:
        wanted = "no ROI_*/lr.tif with hr.tif"
        if next(walk(root, (".taco",)), None):
            wanted += " (.taco containers, v2, are not read; export them with tacoreader)"
        raise missing(root, wanted)
    order = {4: [2, 1, 0, 3]}
    units = []
    for mr, hr in pairs:
        site = Path(mr).parent.relative_to(root).as_posix()
        units.append(unit(site, open_tiffs, [(mr, hr, "", "")], order, order, None, site))
    first = first_info(mr for mr, _ in pairs)  # 121 in v1; other exports have other sizes
    chip = min(first.height, first.width)
    return Listing(units, {"mr": BGRN, "hr": BGRN}, chip, PUBLISHED["sen2naip"].sources, skipped)


def first_info(paths):
    """Info of the first file that can be read; raises what the first raised where none can."""
    failed = None
    for path in paths:
        try:
            return geotiff.info(path)
        except (ValueError, OSError) as error:
            failed = failed or error
    raise failed


def read_hdf5(root, *, mr_dataset=None, hr_dataset=None, band_names=BGRN, splits=None):
    """Pairs repacked to one HDF5 file: MR (N, C, h, w) and HR (N, C', H, W), row i of both a pair.

    root: the file, or the folder that holds it. Known by their datasets: sen2venus.hdf5
    (`sentinel2` and `venus`) and rapidai4eo_v1.h5 (`sentinel2` and `planet`); mr_dataset,
    hr_dataset name those of others. band_names: of the first bands of both, B, G, R, NIR in the
    known ones, although one has 12. splits: a JSON file {"train": [rows or sample ids], ...}, else
    the *split*.json beside it, if there is one; rows in no split are skipped. Without splits
    `sample_ids`, where the file has them, say which rows are of one tile.
    """
    files = [str(root)]
    if Path(root).is_dir():
        files = [path for path, _ in walk(root, (".h5", ".hdf5"))]
    if len(files) != 1:
        raise missing(root, f"one .h5 or .hdf5 file expected, {len(files)} found")
    path = files[0]
    with opened_hdf5(path) as file:
        has = {name: item.shape for name, item in file.items() if isinstance(item, h5py.Dataset)}
        known = next((k for k in HDF5 if {*k[:2]} <= {*has}), ("sentinel2", "venus", None))
        names = {"mr": mr_dataset or known[0], "hr": hr_dataset or known[1]}
        for sensor, name in names.items():
            if name not in has:
                raise ValueError(
                    f"{path}: no dataset {name} for {sensor.upper()}, it has "
                    f"{', '.join(has) or 'none'}; name it with --{sensor}-dataset"
                )
            if len(has[name]) != 4 or has[name][1] < len(band_names) or not all(has[name]):
                raise ValueError(
                    f"{path}: dataset {name} is {has[name]}, (rows, {len(band_names)} bands or "
                    "more, height, width) expected; choose another, or fewer --band-names"
                )
        rows, other = (has[name][0] for name in names.values())
        if other != rows:
            raise ValueError(
                f"{path}: {rows} rows in {names['mr']}, {other} in {names['hr']}; row i of both "
                "should be a pair"
            )
        shapes = {sensor: (len(band_names), *has[name][2:]) for sensor, name in names.items()}
        ids = [] if "sample_ids" not in has else [text(i) for i in file["sample_ids"][:].ravel()]
        # native byte order, as torch needs
        dtypes = {sensor: file[name].dtype.newbyteorder("=") for sensor, name in names.items()}
        for sensor, name in names.items():
            if dtypes[sensor].kind not in "iuf":
                raise ValueError(
                    f"{path}: dataset {name} is {dtypes[sensor]}, integers or floats expected; "
                    f"choose another with --{sensor}-dataset, or convert it"
                )
    ids = ids if len(ids) == rows else []
    split = hdf5_splits(path, splits, rows, ids)
    sites = [i.rsplit("_", 2)[0] if SAMPLE_ID.fullmatch(i) else i for i in ids] or [None] * rows
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
    sources = PUBLISHED[known[2]].sources if tuple(names.values()) == known[:2] and known[2] else ()
    return Listing(units, {"mr": list(band_names), "hr": list(band_names)}, chip, sources, skipped)


HDF5 = [("sentinel2", "venus", "sen2venus"), ("sentinel2", "planet", "rapidai4eo")]
SLICE_BYTES = 2**25  # of a unit's rows, in memory once for each worker


def hdf5_splits(path, splits, rows, ids):
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
    try:
        given = json.loads(Path(splits).read_text("utf-8"))
        given = {name: list(members) for name, members in given.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f'{splits}: not the JSON {{"train": [rows], "val": ..., "test": ...}} ({error})'
        ) from error
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


# opening a unit


def unit(name, opens, *about):
    """The Unit that opens by opens(*about), which is its key as well: text, numbers and paths."""
    return Unit(name, functools.partial(opens, *about), digest(about))


def digest(about):
    return hashlib.sha256(repr(about).encode(errors="surrogateescape")).hexdigest()[:16]


def open_tiffs(files, mr_orders, hr_orders, split=None, site=None):
    """Yield the Pair of each (mr path, hr path, mr date, hr date)."""
    for mr_path, hr_path, mr_date, hr_date in files:
        mr = tiff_source(Path(mr_path), mr_orders, mr_date)
        hr = tiff_source(Path(hr_path), hr_orders, hr_date)
        # publishers cut both to the same ground; a georeference that only one has, or another CRS,
        # cannot say it better
        if not (
            mr.info.transform and hr.info.transform and geotiff.same_crs(mr.info.crs, hr.info.crs)
        ):
            mr, hr = (s._replace(info=replace(s.info, transform=None, crs=None)) for s in (mr, hr))
        yield Pair(mr, [hr], split, site)


def tiff_source(path, orders, date):
    """A Source of B, G, R, NIR, by the names in the file, else by orders: bands -> positions."""
    info = geotiff.info(path)
    bands = positions(BGRN, info.band_names, sentinel=True)  # sets without it write no B2
    if min(bands) < 0:
        bands = orders.get(info.bands)
    if bands is None:
        raise ValueError(
            f"{path}: {info.bands} bands without the names B, G, R, NIR, "
            f"{' or '.join(map(str, orders))} expected; pack it with --format geotiff, --mr-bands"
        )
    return Source(info, bands, info.nodata, functools.partial(geotiff.read, path), date)


def open_patches(files, mr_orders, hr_orders, split, site):
    """Yield the Pairs of patches of two .pt files."""
    ((mr_path, hr_path, date, _),) = files
    mr, hr = load_patches(mr_path), load_patches(hr_path)
    if len(mr) != len(hr):
        raise ValueError(
            f"{hr_path}: {len(hr)} patches, but {Path(mr_path).name} has {len(mr)}; unpack both "
            "again"
        )
    for number in range(len(mr)):
        sources = [
            array_source(
                f"{path}#{number}",
                images.shape[1:],
                images.dtype,
                functools.partial(read_array, images[number]),
                date,
            )
            for path, images in ((mr_path, mr), (hr_path, hr))
        ]
        yield Pair(sources[0], sources[1:], split, site)


def load_patches(path):
    """(patches, 4, height, width) array of a .pt file, mapped, not read, where it can be."""
    try:
        try:
            images = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file of before torch 1.6 cannot be mapped
            images = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds more than a tensor, and that code is not run; fetch it again from its "
            "publisher"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, LookupError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: damaged .pt file ({reason}); unpack it again") from error
    shape = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] != 4:
        raise ValueError(f"{path}: a tensor (patches, 4, height, width) expected, found {shape}")
    # bfloat16, for one, is unknown to numpy
    dtype = np.dtype(getattr(np, str(images.dtype).removeprefix("torch."), object))
    if images.layout != torch.strided or images.is_meta or dtype.kind not in "iuf":
        layout = "meta" if images.is_meta else str(images.layout).removeprefix("torch.")
        raise ValueError(
            f"{path}: a {layout} tensor of {images.dtype}; save it again, dense, as int16 or "
            "float32"
        )
    return images.detach().numpy()


def open_rows(path, names, part, shapes, dtypes, split, sites):
    """Yield the Pairs of a slice of rows of an HDF5 file; those in no split are left out."""
    # read as one with the first pixels that are asked for: headers alone cost nothing
    rows = functools.cache(functools.partial(load_rows, path, names, part, shapes, dtypes))
    for number, site in enumerate(sites):
        if split is None or split[number]:
            mr, hr = (
                array_source(
                    f"{path}#{part.start + number}",
                    shapes[sensor],
                    dtypes[sensor],
                    functools.partial(read_row, rows, sensor, number),
                )
                for sensor in ("mr", "hr")
            )
            yield Pair(mr, [hr], split and split[number], site)


def load_rows(path, names, part, shapes, dtypes):
    with opened_hdf5(path) as file:
        return {
            sensor: file[name][part, : shapes[sensor][0]].astype(dtypes[sensor], copy=False)
            for sensor, name in names.items()
        }


def read_row(rows, sensor, number, window=None, bands=None):
    return read_array(rows()[sensor][number], window, bands)


def array_source(path, shape, dtype, read, date=""):
    bands, height, width = shape
    info = geotiff.Info(Path(path), width, height, bands, dtype, None, None, None, ())
    return Source(info, list(range(bands)), None, read, date)


def read_array(image, window=None, bands=None):
    """As geotiff.read of an array (bands, height, width)."""
    row, col, height, width = window or (0, 0, *image.shape[1:])
    image = image[:, row : row + height, col : col + width]
    return image.copy() if bands is None else image[bands]


@contextmanager
def opened_hdf5(path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except OSError as error:  # h5py's messages name no file
        raise ValueError(f"{path}: damaged or no HDF5 ({error}); fetch it again") from error


# what the readers share


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


def check_per_site(per_site):
    if per_site < 1:
        raise ValueError(f"--per-site {per_site}: 1 or more MR dates of each place expected")


def complete(found):
    """([(mr, hr)], skipped) of name -> {"mr": path, "hr": path}, where one may be missing."""
    pairs = [(f["mr"], f["hr"]) for f in found.values() if "mr" in f and "hr" in f]
    skipped = [
        (f.get("mr") or f["hr"], f"no {'HR' if 'mr' in f else 'MR'} file for it")
        for f in found.values()
        if ("mr" in f) != ("hr" in f)
    ]
    return pairs, skipped


def missing(root, wanted):
    """The error for a folder that is not what was expected; says what is there instead."""
    there = [] if not Path(root).is_dir() else sorted(path.name for path in Path(root).iterdir())
    more = f" and {len(there) - 5} more" if len(there) > 5 else ""
    return FileNotFoundError(
        f"{root}: {wanted}, at any depth; it holds {', '.join(there[:5]) or 'nothing'}{more}; "
        "unpack the archives and give the folder that they are in"
    )


def table(path):
    """The rows of a .csv, lists of text without the empty cells at their ends, none of them empty;
    [] without a path."""
    if path is None:
        return []
    try:
        with open(path, newline="", encoding="utf-8-sig") as lines:
            rows = [[cell.strip() for cell in row] for row in csv.reader(lines)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); fetch it again") from error
    for row in rows:
        while row and not row[-1]:
            row.pop()
    return [row for row in rows if row]


SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def split_name(path, name):
    if name.strip().lower() not in SPLIT_NAMES:
        raise ValueError(f"{path}: split {name}; train, val or test expected")
    return SPLIT_NAMES[name.strip().lower()]


def text(value):
    return value.decode() if isinstance(value, bytes) else str(value)


FORMATS = {
    "sen2venus": read_sen2venus,
    "rapidai4eo": read_rapidai4eo,
    "worldstrat": read_worldstrat,
    "sen2naip": read_sen2naip,
    "hdf5": read_hdf5,
    "geotiff": read_geotiff,
}
