"""From a folder as it was published to pairs of HR and MR images, described but not yet decoded.

A reader lists `Unit`s: pieces of work, each of which opens to `Pair`s of `Source`s. pack.py cuts
these into a store; it knows no layout, and this file knows no store.
"""

import datetime
import difflib
import functools
import glob
import math
import re
import xml.etree.ElementTree as ET
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import geotiff

# An image and what is wanted of it. info: geotiff.Info, whose path may name a part, "x.pt#12".
# bands: positions. nodata: value or None. read(window, bands) -> (bands, height, width), as
# geotiff.read without the path. date: ISO text or "". offset: what its makers say is to be added
# to its valid pixels (-1000 for Sentinel-2 from processing baseline 04.00 on); read adds nothing.
Source = namedtuple("Source", "info bands nodata read date offset", defaults=("", 0))
# One MR image and the HR images that may serve it, the best first, maybe none. split: "train",
# "val", "test" or None; site: what must not be divided between splits, or None (then the ground
# decides). Where no georeference is given the images show the same ground, edge to edge.
Pair = namedtuple("Pair", "mr hrs split site", defaults=(None, None))
# A piece of work. name: what resuming knows it by; open() yields its Pairs, in the same order each
# time, and raises as a reader does.
Unit = namedtuple("Unit", "name open")
# What a reader returns. bands: {"mr": names, "hr": names}, as chosen from the files; hr's are among
# mr's and in their order, [] without HR. chip: side in MR pixels to cut to, None where the user
# decides. sources: [{"name", "licence", "attribution", "url"}]. skipped: [(name, reason)] of what
# was found and left out.
Listing = namedtuple("Listing", "units bands chip sources skipped", defaults=(None, (), ()))

RASTERS = (".tif", ".tiff", ".jp2")
BGRN = ["B", "G", "R", "NIR"]
# the names of bands that mean the same; "B2" is left alone, it is another band of other satellites
SAME_BAND = {"b02": "B", "b03": "G", "b04": "R", "b08": "NIR"}
SAME_BAND |= {"blue": "B", "green": "G", "red": "R", "nir": "NIR"}
BAND_FILE = re.compile(
    r"(?P<scene>.*?)[_.-]?(?<![A-Za-z0-9])(?P<band>B(0?[1-9]|1[0-2]|8A)|blue|green|red|nir)"
    r"(_\d\dm)?",
    re.IGNORECASE,
)
OFFSET_TAGS = {"BOA_ADD_OFFSET", "RADIO_ADD_OFFSET"}
DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)([-_]?)([01]\d)\2([0-3]\d)(?!\d)")


def read_geotiff(
    mr, hr=None, *, mr_bands=None, hr_bands=None, band_names=None, hr_band_names=None, nodata=None
):
    """Any GeoTIFFs, and JPEG 2000 where rasterio is installed, paired by their georeference.

    mr, hr: folder, file or glob; without hr, the folders mr/ and hr/ in mr if they are there, else
    images without HR. A file holds all bands, or one, and then its name ends with the band's
    ("..._B04.tif", "..._red.tif") and those next to it that differ in this alone are its scene; so
    are the bands of a Sentinel-2 SAFE folder. mr_bands, hr_bands: names or positions from 0, as
    text; all bands when None, but B, G, R, NIR of a scene of one file per band. band_names,
    hr_band_names: what the chosen bands are called, else as in the files.
    Returns Listing, a unit per MR image. Raises FileNotFoundError or ValueError as its parts do.
    """
    if hr is None and (Path(mr) / "mr").is_dir():
        mr, hr = Path(mr) / "mr", Path(mr) / "hr"
        hr = hr if hr.is_dir() else None
    mr_sources, names = open_sources(mr, "mr", mr_bands, band_names, nodata)
    pairs, hr_names = [(source, []) for source in mr_sources], []
    if hr is not None:
        if not hr_bands and not hr_band_names:
            has = [name.lower() for name in describe(*scenes(find_files(hr, "--hr"))[0]).band_names]
            both = [name for name in names if name.lower() in has]
            if 0 < len(both) < max(len(has), len(names)):
                hr_bands = hr_band_names = both
        hr_sources, hr_names = open_sources(hr, "hr", hr_bands, hr_band_names or names, nodata)
        if other := [name for name in hr_names if name not in names]:
            raise ValueError(
                f"--hr-band-names {','.join(hr_names)}: {other[0]} is no band of the MR files "
                f"({','.join(names)}); choose those that both have with --hr-bands"
            )
        check_band_order({"--mr-bands": mr_sources, "--hr-bands": hr_sources}, band_names)
        check_band_order({"--hr-bands": hr_sources}, hr_band_names, "--hr-band-names")
        order = sorted(range(len(hr_names)), key=lambda k: names.index(hr_names[k]))
        hr_names = [hr_names[k] for k in order]
        hr_sources = [s._replace(bands=[s.bands[k] for k in order]) for s in hr_sources]
        pairs = pair_up(mr_sources, hr_sources)
    units = [
        Unit(source.info.path.as_posix(), functools.partial(iter, [Pair(source, hrs)]))
        for source, hrs in pairs
    ]
    return Listing(units, {"mr": names, "hr": hr_names})


def find_files(where, flag):
    """The GeoTIFF and JPEG 2000 files of a folder and its subfolders, one file, or a glob; sorted.

    Of a Sentinel-2 SAFE folder only the images of bands.
    """
    path = Path(where)
    if path.is_dir():
        files = path.rglob("*")
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
        if len(bands) > 1:
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
                # the products' own value of missing pixels, which their files do not declare
                nodata=0.0 if in_safe(path) else file.nodata,
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
            offset = safe_offset(path) if "IMG_DATA" in read.args[0][0].parts else 0
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
        sources.append(Source(info, bands, nodata_of, read, date_of(path.name), offset))
    return sources, names


def positions(wanted, names):
    """Where the wanted bands are among names, by name or by index as text; -1 for those that are
    not."""
    known = {SAME_BAND.get(name.lower(), name).lower(): band for band, name in enumerate(names)}
    known |= {name.lower(): band for band, name in enumerate(names)}
    return [
        int(w)
        if w.isdigit()
        else known.get(w.lower(), known.get(SAME_BAND.get(w.lower(), "?").lower(), -1))
        for w in wanted
    ]


def check_band_order(flags, given, flag_given="--band-names"):
    """Raise ValueError where a file has the bands of another, by their names, in another order.

    flags: the flag that chooses the bands -> sources. given: the names of the flag
    `flag_given`, or None.
    A file that does not name all of its chosen bands says nothing of their order.
    """
    named = [(None, flag_given, given)] if given else []
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

    By ground where files are georeferenced, the nearest date first where names tell it, then the
    likest name; by equal file stem where none is. Raises ValueError if nothing pairs, with the
    reason.
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
    """Sort key: how far the date of an HR file and how little its name resembles an MR file's."""
    days = days_between(mr.date, hr.date) if mr.date and hr.date else math.inf
    a, b = mr.info.path.stem, hr.info.path.stem
    return days, -difflib.SequenceMatcher(None, a, b).ratio(), str(hr.info.path)


def days_between(a, b):
    return abs((datetime.date.fromisoformat(a) - datetime.date.fromisoformat(b)).days)
