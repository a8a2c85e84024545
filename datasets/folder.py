"""Pairs of any GeoTIFFs of one's own, and of JPEG 2000: found, described, paired by ground."""

import difflib
import functools
import glob
import itertools
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.common import BGRN, Listing, Pair, Source, Unit, date_of, days_between, digest
from imagery import raster
from imagery.bands import SAME_BAND, meanings, positions

RASTERS = (".tif", ".tiff", ".jp2")  # of a folder; a file may be any of raster.DRIVERS
BAND_FILE = re.compile(
    r"(?P<scene>.*?)[_.-]?(?<![A-Za-z0-9])(?P<band>B(0?[1-9]|1[0-2]|8A)|blue|green|red|nir)"
    r"(_\d\dm)?",
    re.IGNORECASE,
)
# what producers put beside the bands: quality, clouds, pictures
COMPANION = re.compile(
    r"(?:^|[_.-])(SCL|TCI|PVI|AOT|WVP|CLM|CLD|SNW|QA|QA_\w+|BQA|F?mask|udm2?|thumbnail|preview|overview"
    r"|browse|ql)(?:_\d\dm|_clip)?$",
    re.IGNORECASE,
)
OFFSET_TAGS = {"BOA_ADD_OFFSET", "RADIO_ADD_OFFSET"}


def read_geotiff(
    mr,
    hr=None,
    *,
    mr_bands=None,
    hr_bands=None,
    band_names=None,
    hr_band_names=None,
    nodata=None,
    warp="cubic",
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
    warp: how HR of another projection is resampled, "cubic", "bilinear" or "nearest".
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
        pairs = pair_up(mr_sources, hr_sources, mr, hr, warp)
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
    kinds = RASTERS if path.is_dir() else raster.DRIVERS
    files = [p for p in files if p.suffix.lower() in kinds and p.is_file()]
    files = [p for p in files if not in_safe(p) or ("IMG_DATA" in p.parts and band_of(p)[1])]
    beside = [file for file in files if COMPANION.search(file.stem)]
    if beside and len(files) > 1:
        kinds = sorted({COMPANION.search(file.stem)[1] for file in beside})
        raster.say_once(
            f"{flag} {where}: {len(beside)} companion files left alone ({', '.join(kinds)})"
        )
        files = [file for file in files if file not in {*beside}]
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
        return raster.info(path)
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


def read_raster(path, window=None, bands=None, grid=None):
    return raster.read(path, window, bands, masked=True, grid=grid)


def read_scene(files, window=None, bands=None, grid=None):
    """Read bands that lie in a file each: (pixels, valid), as raster.read."""
    bands = range(len(files)) if bands is None else bands
    pixels, valid = zip(*(read_raster(files[b], window, None, grid) for b in bands), strict=True)
    return np.concatenate(pixels), np.any(valid, 0)


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
        read, offset = functools.partial(raster.read, path), 0
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
        date = date_in(path) or info.date
        sources.append(Source(info, bands, nodata_of, read, date, offset))
    return one_unit(sources, flag), names


def date_in(path):
    """ISO date that a path tells: of its name, also as HLS writes it (2009230T), else of the next
    folder that is called by one; "" without."""
    for name in [path.name, *(folder.name for folder in path.parents[:3])]:
        if date := date_of(re.sub(r"(?<!\d)(\d{8})\d{6}(?!\d)", r"\1", name)):
            return date
        if day := re.search(r"(?<!\d)((?:19|20)\d\d)([0-3]\d\d)(?=T)", name):
            return str(datetime.strptime(day[0], "%Y%j").date()) if 0 < int(day[2]) < 367 else ""
    return ""


def one_unit(sources, flag):
    """Sources whose pixels mean the same: where files differ in their scale and offset, the first's
    are what the others are brought to."""
    scalings = {s.info.scaling for s in sources}
    if len(scalings) < 2:
        return sources
    first, made = sources[0], []
    one = first.info.scaling or ((1.0, 0.0),) * first.info.bands
    for s in sources:
        here = s.info.scaling or ((1.0, 0.0),) * s.info.bands
        pairs = [(here[b], one[a]) for a, b in zip(first.bands, s.bands, strict=True)]
        gain = {round(own[0] / base[0], 12) for own, base in pairs}
        shift = {round((own[1] - base[1]) / base[0], 6) for own, base in pairs}
        if gain != {1.0} or len(shift) > 1:
            raise ValueError(
                f"{s.info.path}: its scale is {here[0]}, that of {first.info.path} {one[0]}; bring "
                "them to one with gdal_translate -unscale, or pack them apart"
            )
        made.append(s._replace(offset=s.offset + shift.pop()))
    moved = sum(s.offset != old.offset for s, old in zip(made, sources, strict=True))
    print(
        f"{flag[: -len('-bands')]}: {moved} of {len(made)} files have another offset in their tags "
        f"than {first.info.path}; their pixels are brought to its unit"
    )
    return made


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


def pair_up(mr_sources, hr_sources, mr, hr, warp):
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
        pairs = by_ground(mr_sources, hr_sources, warp)
    if any(hrs for _, hrs in pairs):
        return pairs

    mr, hr = mr_sources[0].info, hr_sources[0].info
    if not placed:
        raise ValueError(
            f"no HR file is named as an MR file is ({mr.path} and {hr.path}, for instance); "
            "without georeference the two of a pair need the same name"
        )
    raise ValueError(
        f"{hr.path}: no HR file is on the ground of {mr.path} in {raster.crs_name(mr.crs)}, nor "
        f"of any other MR file; it lies {away(mr, hr)}; give folders of the same ground"
    )


def by_ground(mr_sources, hr_sources, warp):
    """[(mr, [hr, ...])] of the HR images that share ground with each MR image, the best first:
    those nearest in time, each file alone and then, for chips that none covers alone, all of one
    date together. HR of another projection or axes is warped to MR's, unless the two agree."""
    pairs, boxes, said = [], {}, {}
    for m in mr_sources:
        if m.info.crs not in boxes:
            boxes[m.info.crs] = np.array([bounds_in(hr.info, m.info.crs) for hr in hr_sources])
        left, bottom, right, top = boxes[m.info.crs].T
        west, south, east, north = m.info.bounds
        meets = (left < east) & (right > west) & (bottom < north) & (top > south)
        hrs = [on_axes_of(m.info, hr_sources[i], warp, said) for i in np.flatnonzero(meets)]
        hrs = sorted((hr for hr in hrs if hr), key=functools.partial(unlike, m))
        together = []
        for _, some in itertools.groupby(hrs, lambda hr: (hr.date, hr.offset)):
            some = list(some)
            together += some + mosaics(some)
        pairs.append((m, together))
    for (crs, to, how), count in said.items():
        print(f"HR in {crs}, MR in {to} ({count} pairs of files): {how}")
    return pairs


def bounds_in(info, crs):
    """Bounds of an image in another CRS; NaN where it does not reach."""
    if info.crs == crs or not info.crs or not crs:
        return info.bounds if info.crs == crs else (math.nan,) * 4
    try:
        x, y = raster.project(info.crs, crs, *raster.corners(info, 21))
    except ValueError:
        return (math.nan,) * 4
    box = x.min(), y.min(), x.max(), y.max()
    return box if np.isfinite(box).all() else (math.nan,) * 4


def on_axes_of(mr, hr, warp, said):
    """The HR Source in the CRS and on the axes of an MR image; None if they share no ground.

    said: {(crs, crs, what was done): files}, to which this one is added.
    """
    info, names = hr.info, (raster.crs_name(hr.info.crs), raster.crs_name(mr.crs))
    how = ""
    if info.crs != mr.crs and raster.same_ground(info, mr.crs):
        how = "the same ground to a hundredth of a pixel, so its pixels are used as they are"
        info = replace(info, crs=mr.crs)
    if info.crs == mr.crs:
        a, b, _, d, e, _ = mr.transform
        c, f = info.transform[:2], info.transform[3:5]
        turn = np.linalg.solve([c, f], [[a, b], [d, e]])
        skew = np.abs(turn - np.diag(turn.diagonal())).max() * max(mr.height, mr.width)
        if skew <= 0.1 and turn.diagonal().min() > 0:
            if how:
                said[(*names, how)] = said.get((*names, how), 0) + 1
            return hr._replace(info=info)
    grid = raster.warp_grid(info, mr, warp)
    if grid is None:
        return None
    how = f"warped to MR's axes ({warp})"
    said[(*names, how)] = said.get((*names, how), 0) + 1
    info = replace(
        info, crs=grid.crs, transform=grid.transform, height=grid.height, width=grid.width
    )
    return hr._replace(info=info, read=functools.partial(hr.read, grid=grid))


def mosaics(sources):
    """[a Source of all of these on one pixel grid], [] unless there are two at least."""
    first = sources[0].info
    a, b, c, d, e, f = first.transform
    parts = []
    for s in sources:
        t = s.info.transform
        col, row = np.linalg.solve([[a, b], [d, e]], [t[2] - c, t[5] - f])
        alike = np.allclose(np.delete(t, [2, 5]), (a, b, d, e), rtol=1e-6, atol=abs(a) * 1e-6)
        if alike and max(abs(row - round(row)), abs(col - round(col))) < 0.02:
            parts.append((s, round(row), round(col)))
    if len(parts) < 2 or len({s.info.bounds for s, *_ in parts}) == 1:
        return []
    top, left = (min(part[k] for part in parts) for k in (1, 2))
    parts = [(s, row - top, col - left) for s, row, col in parts]
    height = max(row + s.info.height for s, row, _ in parts)
    width = max(col + s.info.width for s, _, col in parts)
    place = (a, b, c + a * left + b * top, d, e, f + d * left + e * top)
    info = replace(first, transform=place, height=height, width=width)
    bands = list(range(len(sources[0].bands)))
    read = functools.partial(read_mosaic, parts)
    return [sources[0]._replace(info=info, bands=bands, nodata=None, read=read, parts=parts)]


def read_mosaic(parts, window, bands):
    """Read several images of one pixel grid as one: (pixels, valid); where two show the same ground
    the first that is valid there counts. parts: [(Source, row, col)]."""
    top, left, height, width = window
    pixels = np.zeros((len(bands), height, width), parts[0][0].info.dtype)
    valid = np.zeros((height, width), bool)
    for s, row, col in parts:
        low = np.maximum([top, left], [row, col])
        high = np.minimum([top + height, left + width], [row + s.info.height, col + s.info.width])
        if (high <= low).any():
            continue
        here = tuple(
            slice(a, b) for a, b in zip(low - [top, left], high - [top, left], strict=True)
        )
        size = high - low
        own = (low - [row, col]).tolist() + size.tolist()
        found, there = raster.masked(s.read(own, [s.bands[b] for b in bands]), s.nodata)
        fresh = there & ~valid[here]
        pixels[:, *here] = np.where(fresh, found, pixels[:, *here])
        valid[here] |= there
    return pixels, valid


def away(mr, hr):
    """Where an HR image lies from an MR image, in words."""
    box = bounds_in(hr, mr.crs)
    where = f"in {raster.crs_name(hr.crs)}"
    if not np.isfinite(box).all() or raster.is_geographic(mr.crs):
        return f"{where}, {hr.bounds}"
    west, south, east, north = mr.bounds
    gap = math.hypot(max(0, box[0] - east, west - box[2]), max(0, box[1] - north, south - box[3]))
    return f"{where}, {gap / 1000:,.1f} km away" if gap else f"{where}, beside it"


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


PAIRS = {"geotiff": read_geotiff}
