"""Pairs of any images of one's own: HR and MR meet by the names of bands, by ground, date or name.

`datasets.images` finds and opens the images.
"""

import difflib
import functools
import itertools
import math
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.common import Listing, Pair, Unit, days_between, digest
from datasets.images import (
    find_masks,
    header,
    list_images,
    open_image,
    parse_masks,
    scaling_of,
    to_unit,
    usual_bands,
)
from imagery import raster
from imagery.bands import meanings, positions


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
    clouds=None,
    mask_band=None,
    mask_values=None,
    max_days=None,
):
    """Any GeoTIFFs and JPEG 2000, paired by their georeference.

    mr, hr: folder, archive, file or glob; without hr, the folders mr/ and hr/ in mr if they are
    there, else images without HR. A file holds all bands, or one, and then its name ends with the
    band's ("..._B04.tif", "..._red.tif") and those next to it that differ in this alone are its
    scene; so are the bands of a Sentinel-2 SAFE folder. mr_bands, hr_bands: names or positions from
    0, as text; all bands when None, but B, G, R, NIR of a scene of one file per band. band_names,
    hr_band_names: what the chosen bands are called, else as in the files. Where both sensors name
    their bands HR gives those that MR has, by what the names mean, and all of its own where MR has
    none of them or hr_bands chooses; else theirs are the same, in the same order.
    warp: how HR of another projection is resampled, "cubic", "bilinear" or "nearest". clouds,
    mask_band, mask_values: what hides the ground, as `images.parse_masks`. max_days: most days
    between the two of a pair, where both tell their date.
    Returns Listing, a unit per MR image. Raises FileNotFoundError or ValueError as its parts do.
    """
    if hr is None and (Path(mr) / "mr").is_dir():
        mr, hr = Path(mr) / "mr", Path(mr) / "hr"
        hr = hr if hr.is_dir() else None
    masks = parse_masks(mask_band, mask_values, clouds)
    images = {"mr": list_images(mr, "--mr")} | ({"hr": list_images(hr, "--hr")} if hr else {})
    hidden = {sensor: find_masks(some, masks) for sensor, some in images.items()}
    tell_masks(masks, images, hidden)
    mr_sources, names = open_sources("mr", images, hidden, mr_bands, band_names, nodata, masks)
    check_band_order({"--mr-bands": mr_sources}, band_names)
    pairs, hr_names, unused = [Pair(source, []) for source in mr_sources], [], []
    if hr is not None:
        if called := hr_band_names:
            same = dict(zip(meanings(names), names, strict=True))
            meant = zip(called, meanings(called), strict=True)
            called = [name if name in names else same.get(m, name) for name, m in meant]
        else:
            info = header(*images["hr"][0])
            hr_bands, called = shared_bands(mr_sources[0], names, info, hr_bands, masks)
        hr_sources, hr_names = open_sources(
            "hr", images, hidden, hr_bands, called or names, nodata, masks
        )
        check_band_order({"--mr-bands": mr_sources, "--hr-bands": hr_sources}, band_names)
        check_band_order({"--hr-bands": hr_sources}, hr_band_names, "--hr-band-names")
        place = [*names, *hr_names].index
        order = sorted(range(len(hr_names)), key=lambda k: place(hr_names[k]))
        hr_names = [hr_names[k] for k in order]
        hr_sources = [s._replace(bands=[s.bands[k] for k in order]) for s in hr_sources]
        pairs, unused = pair_up(mr_sources, hr_sources, mr, hr, warp, max_days)
    units = []
    for pair in pairs:
        # all but read, whose text is another in each run
        about = [(s.info, s.bands, s.nodata, s.date, s.offset) for s in [pair.mr, *pair.hrs]]
        opened = functools.partial(iter, [pair])
        units.append(Unit(pair.mr.info.path.as_posix(), opened, digest((about, masks))))
    return Listing(units, {"mr": names, "hr": hr_names}, skipped=unused)


def tell_masks(masks, images, hidden):
    """Say how many images have each mask. Raises ValueError for one that no image has."""
    for mask in masks:
        said = []
        for sensor, some in images.items():
            without = [
                path
                for (path, _), has in zip(some, hidden[sensor], strict=True)
                if mask not in [one for *_, one in has]
            ]
            if len(without) < len(some):
                said.append(
                    f"{mask.name}: hides what it marks in {len(some) - len(without)} of "
                    f"{len(some)} {sensor.upper()} images"
                    + (f"; {without[0]} has none and is used whole" if without else "")
                )
        if not said:
            path = images["mr"][0][0]
            raise ValueError(
                f"{path}: no band {mask.name} in it, nor a file beside it that is called as it is "
                f"and {mask.name}; nor has another image; choose another --mask-band or --clouds"
            )
        print(*said, sep="\n")


def open_sources(sensor, images, hidden, wanted, names, nodata, masks):
    """Describe the images of one sensor and choose their bands.

    images: {sensor: of `list_images`}. hidden: {sensor: of `find_masks`}. wanted: list of band
    names or indices as text, all bands when None. names: what the bands are called, else as in the
    first file. nodata: for files that declare none. Returns sources, names.
    Raises ValueError for a band that is not there, another number of bands, complex or mixed dtype.
    """
    sources, flag, images = [], f"--{sensor}-bands", images[sensor]
    heads = [header(*image) for image in tqdm(images, f"{sensor} headers", leave=False)]
    usual = [
        usual_bands(info, files, masks) for info, (_, files) in zip(heads, images, strict=True)
    ]
    wanted = wanted or common_bands(heads, usual, flag)
    rows = zip(heads, images, usual, hidden[sensor], strict=True)
    for info, (path, files), bands, hides in rows:
        has, count = info.band_names, info.bands
        bands = positions(wanted, has) if wanted else bands
        if min(bands) < 0 or max(bands) >= count:
            raise ValueError(
                f"{path}: {flag} {','.join(wanted)} asked for, the file has {count} bands "
                f"({','.join(has) if any(has) else 'without names'}); use indices from 0"
            )
        source = open_image(info, files, bands, nodata, hides)
        info = source.info
        names = names or [has[b] if has else str(b) for b in bands]
        if len(bands) != len(names):
            raise ValueError(
                f"{path}: {len(names)} bands expected ({','.join(names)}), found {len(bands)}; use "
                f"{flag} to choose them, such as {flag} 2,1,0 for RGB files"
                + (", or say with --hr-band-names what they are" if sensor == "hr" else "")
            )
        if info.dtype.kind == "c":
            raise ValueError(
                f"{path}: complex pixels ({info.dtype}); convert them to amplitudes, such as with "
                f"gdal_calc.py -A {shlex.quote(str(path))} --calc 'abs(A)' --outfile OUT.tif"
            )
        if sources and info.dtype != sources[0].info.dtype:
            raise ValueError(
                f"{path}: {info.dtype}, but {sources[0].info.path} is {sources[0].info.dtype}; "
                f"pack them apart, or convert one: gdal_translate -ot {gdal_type(sources[0])} "
                f"{shlex.quote(str(path))} OUT.tif"
            )
        sources.append(source)
    return one_unit(sources, flag), names


def common_bands(heads, usual, flag):
    """The names of the bands that all images have, where they name them and have different ones,
    as PlanetScope's of 4 and 8 bands; else None."""
    names = [[info.band_names[b] for b in bands] for info, bands in zip(heads, usual, strict=True)
             if info.band_names]  # fmt: skip
    if len(names) < len(heads) or len({*map(len, names)}) == 1 or not all(map(all, names)):
        return None
    meant = [{*meanings(some)} for some in names]
    common = set.intersection(*meant)
    chosen = [n for n, m in zip(names[0], meanings(names[0]), strict=True) if m in common]
    if chosen:
        print(f"{flag}: {','.join(chosen)}, which all of {len(heads)} files have; some have more")
    return chosen or None


def gdal_type(source):
    """What gdal_translate -ot calls the pixels of a Source."""
    names = {"i": "Int", "u": "UInt", "f": "Float"}
    kind, size = source.info.dtype.kind, 8 * source.info.dtype.itemsize
    return "Byte" if (kind, size) == ("u", 8) else f"{names[kind]}{size}"


def one_unit(sources, flag):
    """Sources whose pixels mean the same: where files differ in their scale and offset, the first's
    are what the others are brought to."""
    if len({s.info.scaling for s in sources}) < 2:
        return sources
    first, made = sources[0], []
    for s in sources:
        gain, shift = to_unit(s, scaling_of(first))
        if np.abs(gain - 1).max() > 1e-9 or np.ptp(shift) > 1e-6:
            own, one = scaling_of(s), scaling_of(first)
            raise ValueError(
                f"{s.info.path}: its scale and offset are {own[0]}, those of {first.info.path} "
                f"{one[0]}; pack them apart, or unscale each: gdal_translate -unscale -ot Float32 "
                f"{shlex.quote(str(s.info.path))} OUT.tif"
            )
        made.append(s._replace(offset=round(float(shift[0]), 6)))
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


def shared_bands(mr, names, info, wanted, masks):
    """Which bands of the HR files to take, and what to call them: (hr_bands, names or None).

    mr: a source, whose bands are called names. info: header of an HR file. wanted: of its bands
    those that the user chose, or None. A band that MR has gets MR's name.
    Unless they are wanted, bands that MR has not are left out, or none where it has none of them.
    names are None, for MR's, where one sensor does not name its bands or both use the same names.
    Raises ValueError if a band is called as one of MR's that is another.
    """
    path, has = info.path, info.band_names
    at = positions(wanted, has) if wanted else usual_bands(info, None, masks)
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
                f"{flag} {shlex.quote(','.join(has))}"
            )


def pair_up(mr_sources, hr_sources, mr, hr, warp, max_days=None):
    """Find the HR files that may serve each MR file: ([Pair], the best first, and [(HR path,
    reason)] of those that serve none).

    By ground where files are georeferenced, the nearest date first where names tell it, then the
    likest name; by name, as same_name, where none is. mr, hr: where they were looked for. Raises
    ValueError if nothing pairs, with the reason.
    """
    everyone = [*mr_sources, *hr_sources]
    placed = [s.info for s in everyone if s.info.transform is not None]
    if not placed:
        pairs, gaps = same_name(mr_sources, hr_sources, mr, hr), {}
    elif len(placed) < len(everyone):
        bare = next(s.info for s in everyone if s.info.transform is None)
        raise ValueError(
            f"{bare.path}: no georeference, but {placed[0].path} has one; pack them apart, or add "
            "it: gdal_translate -a_srs EPSG:CODE -a_ullr LEFT TOP RIGHT BOTTOM "
            f"{shlex.quote(str(bare.path))} OUT.tif"
        )
    else:
        pairs, gaps = by_ground(mr_sources, hr_sources, warp)
    unknown = [s.info.path for s in everyone if not s.date]
    if 0 < len(unknown) < len(everyone) or (unknown and max_days is not None):
        print(
            f"{unknown[0]}: no date in its name, as in {len(unknown)} of {len(everyone)} files; "
            "they pair by ground and name, whatever their time"
        )
    if max_days is not None:
        pairs = [within(pair, max_days) for pair in pairs]
    hrs = [hr for pair in pairs for hr in pair.hrs]
    serve = {s.info.path for hr in hrs for s in [hr, *(part[0] for part in hr.parts)]}
    if not serve:
        first = pairs[0]
        if placed and first.reason and max_days is None:
            raise ValueError(
                f"{first.mr.info.path} in {raster.crs_name(first.mr.info.crs)}: {first.reason} "
                f"({hr_sources[0].info.path}, for instance), and so it is with every MR file; give "
                "folders of the same ground"
            )
        if max_days is not None and any("days" in pair.reason for pair in pairs):
            raise ValueError(f"--max-days {max_days:g}: no HR image is that near to its MR image; "
                             "allow more")  # fmt: skip
        raise ValueError(
            f"no HR file is named as an MR file is ({mr_sources[0].info.path} and "
            f"{hr_sources[0].info.path}, for instance); without georeference the two of a pair "
            "need the same name"
        )
    idle = [s.info.path for s in hr_sources if s.info.path not in serve]
    return pairs, [(path.as_posix(), gaps.get(path, "HR that serves no MR image")) for path in idle]


def within(pair, most):
    """The Pair with the HR images alone that are no more than so many days away, or whose date is
    unknown."""
    near = [
        hr
        for hr in pair.hrs
        if not (pair.mr.date and hr.date) or days_between(pair.mr.date, hr.date) <= most
    ]
    reason = pair.reason if near or not pair.hrs else f"its HR is more than {most:g} days away"
    return pair._replace(hrs=near, reason=reason)


def by_ground(mr_sources, hr_sources, warp):
    """([Pair], {HR path: where it lies if no MR image shares its ground}): of each MR image the HR
    images that do, the best first: those nearest in time, each file alone and then, for chips that
    none covers alone, all of one date together. HR of another projection or axes is warped to MR's,
    unless the two agree."""
    pairs, boxes, said = [], {}, {}
    nearest = np.full(len(hr_sources), np.inf)
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
        across = np.maximum(0, np.maximum(left - east, west - right))
        gap = np.hypot(across, np.maximum(0, np.maximum(bottom - north, south - top)))
        gap = np.where(np.isnan(gap), np.inf, gap)
        gap *= 111e3 if raster.is_geographic(m.info.crs) else 1  # metres in a degree, about
        nearest = np.minimum(nearest, gap)
        near = away(hr_sources[gap.argmin()], gap.min())
        reason = "" if hrs else f"no HR on its ground, the nearest is {near}"
        pairs.append(Pair(m, together, reason=reason))
    for (crs, to, how), count in said.items():
        print(f"HR in {crs}, MR in {to} ({count} pairs of files): {how}")
    where = {
        hr.info.path: f"HR on no MR image's ground, {away(hr, gap)}"
        for hr, gap in zip(hr_sources, nearest, strict=True)
        if gap
    }
    return pairs, where


def away(hr, gap):
    """Where an HR image lies that is `gap` metres from MR, in words; far ones roughly, so that a
    report can count them."""
    where = f"in {raster.crs_name(hr.info.crs)}"
    if not np.isfinite(gap):
        return f"{where}, which does not reach MR's"
    return f"{where}, {float(f'{gap / 1000:.2g}'):g} km away" if gap else f"{where}, beside it"


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


def same_name(mr_sources, hr_sources, mr, hr):
    """[Pair] by file stem; where more than one file of a sensor has it, by their path under the
    folders mr and hr. Each two are taken to show the same ground, edge to edge, which is said; two
    of another shape are none."""
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
    pairs = []
    for m in mr_sources:
        hr = twin.get(m.info.path)
        reason = "" if hr else "no HR file of its name"
        if hr:
            down, across = hr.info.height / m.info.height, hr.info.width / m.info.width
            if abs(down - across) > max(1 / m.info.height, 1 / m.info.width):  # a pixel of HR
                hr, reason = None, "another shape than HR of its name, and no georeference"
        pairs.append(Pair(m, [hr] if hr else [], reason=reason))
    if count := sum(bool(pair.hrs) for pair in pairs):
        print(f"{count} pairs by name, ground unknown: no file is georeferenced, so each two are "
              "taken to show the same ground, edge to edge")  # fmt: skip
    return pairs


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
