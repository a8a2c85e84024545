"""Pairs of any images of one's own: HR and MR meet by the names of bands, by ground, date or name.

`datasets.images` finds and opens the images.
"""

import difflib
import functools
import itertools
import math
import shlex
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from datasets.common import Listing, Pair, Unit, days_between, digest
from datasets.images import (
    bounds_in,
    find_masks,
    header,
    list_images,
    names_of,
    open_images,
    parse_masks,
    scaling_of,
    tell_units,
    to_unit,
    usual_bands,
)
from imagery import raster
from imagery.bands import meanings, positions
from imagery.chips import align


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
    """Any GeoTIFFs and JPEG 2000, paired by their georeference: Listing, a unit per MR image.

    mr, hr: as `list_images` takes them; without hr, the folders mr/ and hr/ in mr if they are
    there, else images without HR. The others are the flags of `data.py pack`, bands as text: names
    or positions from 0. Where both sensors name their bands HR gives those that MR has, by what the
    names mean, and all of its own where MR has none of them or hr_bands chooses; else theirs are
    the same, in the same order. Raises FileNotFoundError or ValueError as its parts do.
    """
    if hr is None and (Path(mr) / "mr").is_dir():
        mr, hr = Path(mr) / "mr", Path(mr) / "hr"
        hr = hr if hr.is_dir() else None
    masks = parse_masks(mask_band, mask_values, clouds)
    images = {"mr": list_images(mr, "--mr")} | ({"hr": list_images(hr, "--hr")} if hr else {})
    hides = find_masks(images, masks)
    mr_sources, names = open_images(
        images["mr"], hides["mr"], "--mr-bands", mr_bands, band_names, nodata
    )
    mr_sources = alike(mr_sources, "--mr")
    pairs, hr_names, unused = [Pair(source, []) for source in mr_sources], [], []
    if hr is not None:
        if called := hr_band_names:
            same = dict(zip(meanings(names), names, strict=True))
            meant = zip(called, meanings(called), strict=True)
            called = [name if name in names else same.get(m, name) for name, m in meant]
        else:
            info = header(*images["hr"][0])
            hr_bands, called = shared_bands(mr_sources[0], names, info, hr_bands, hides["hr"][0])
        hr_sources, hr_names = open_images(
            images["hr"], hides["hr"], "--hr-bands", hr_bands, called or names, nodata
        )
        order = sorted(range(len(hr_names)), key=lambda k: [*names, *hr_names].index(hr_names[k]))
        hr_names = [hr_names[k] for k in order]
        hr_sources = [s._replace(bands=[s.bands[k] for k in order]) for s in hr_sources]
        pairs, unused = pair_up(mr_sources, alike(hr_sources, "--hr"), mr, hr, warp, max_days)
    units = []
    for pair in pairs:
        # all but read, whose text is another in each run
        about = [(s.info, s.bands, s.nodata, s.date, s.offset) for s in [pair.mr, *pair.hrs]]
        opened = functools.partial(iter, [pair])
        units.append(Unit(pair.mr.info.path.as_posix(), opened, digest((about, masks))))
    return Listing(units, {"mr": names, "hr": hr_names}, skipped=unused)


def alike(sources, flag):
    """Sources whose pixels mean the same: where files differ in their offset, the first's is what
    the others are brought to. Raises ValueError where they differ in more."""
    tell_units(sources, flag)
    first, made = sources[0], []
    for source in sources:
        path, own, one = source.info.path, scaling_of(source), scaling_of(first)
        if source.info.dtype.kind == "c":
            raise ValueError(
                f"{path}: complex pixels ({source.info.dtype}); convert them to amplitudes, "
                f"such as with gdal_calc.py -A {shlex.quote(str(path))} --calc 'abs(A)' "
                "--outfile OUT.tif"
            )
        gain, shift = to_unit(source, one)
        if np.abs(gain - 1).max() > 1e-9 or np.ptp(shift) > 1e-6:
            raise ValueError(
                f"{path}: its scale and offset are {own[0]}, those of {first.info.path} "
                f"{one[0]}; pack them apart, or unscale each: gdal_translate -unscale -ot Float32 "
                f"{shlex.quote(str(path))} OUT.tif"
            )
        made.append(source._replace(offset=round(float(shift[0]), 6)))
    return made


def shared_bands(mr, names, info, wanted, hides):
    """Which bands of the HR files to take, and what to call them: (hr_bands, names or None).

    mr: a source, whose bands are called names. info: header of an HR file. wanted: of its bands
    those that the user chose, or None. A band that MR has gets MR's name.
    Unless they are wanted, bands that MR has not are left out, or none where it has none of them.
    names are None, for MR's, where one sensor does not name its bands.
    Raises ValueError if a band is called as one of MR's that is another.
    """
    path, has = info.path, info.band_names
    at = positions(wanted, has) if wanted else usual_bands(info, None, hides)
    if not has or not all(0 <= band < len(has) for band in at):
        return wanted, None
    theirs, in_files = names_of(info, at), names_of(mr.info, mr.bands)
    ours = in_files or list(zip(names, meanings(names), strict=True))
    if not theirs or any(name.isdecimal() for name, _ in ours):
        return wanted, None
    name_of = {meant: name for name, meant in reversed(theirs)}
    both = {name_of[m]: name for (_, m), name in zip(ours, names, strict=True) if m in name_of}
    own = [name for name, _ in theirs]
    left = [name for name in own if name not in both]
    mr_has = ",".join(name for name, _ in ours)
    if both and not wanted:
        if left:
            print(f"{path}: {','.join(left)} left out, as MR has {mr_has}; --hr-bands can take all")
        return [*both], [*both.values()]
    if not both and not in_files and len(own) == len(names):
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
    return own, [both.get(name, name) for name in own]


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
    serve = {s.info.path for p in pairs for hr in p.hrs for s in (hr, *(of for of, *_ in hr.parts))}
    if not serve:
        first = pairs[0]
        remedy = f"--max-days {max_days} can be more" if max_days else "give HR of the same ground"
        if not placed:
            remedy = "without georeference the two of a pair need the same name"
        raise ValueError(
            f"{first.mr.info.path} in {raster.crs_name(first.mr.info.crs)}: {first.reason} "
            f"({hr_sources[0].info.path}, for instance), and no other MR file has any; {remedy}"
        )
    idle = [s.info.path for s in hr_sources if s.info.path not in serve]
    return pairs, [(path.as_posix(), gaps.get(path, "HR that serves no MR image")) for path in idle]


def within(pair, most):
    """The Pair with the HR images alone that are no more than so many days away, or whose date is
    unknown."""
    day = pair.mr.date
    near = [hr for hr in pair.hrs if not (day and hr.date) or days_between(day, hr.date) <= most]
    reason = pair.reason if near or not pair.hrs else f"its HR is more than {most:g} days away"
    return pair._replace(hrs=near, reason=reason)


def by_ground(mr_sources, hr_sources, warp):
    """([Pair], {HR path: where it lies if no MR image shares its ground}): of each MR image the HR
    images that do, the best first: those nearest in time, each file alone and then, for chips that
    none covers alone, all of one date together. HR of another projection or axes is warped to MR's,
    unless the two agree."""
    pairs, boxes, said = [], {}, Counter()
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


def on_axes_of(mr, hr, warp, said):
    """The HR Source in the CRS and on the axes of an MR image; None if they share no ground.

    said: Counter of (crs, crs, what was done), to which this one is added.
    """
    info = hr.info
    names = raster.crs_name(info.crs), raster.crs_name(mr.crs)
    if raster.same_ground(info, mr.crs):
        info = replace(info, crs=mr.crs)
        with suppress(ValueError):  # of axes that are turned
            align(mr, info)
            if hr.info.crs != mr.crs:
                said[*names, "the same ground to 0.01 pixel, so pixels are used as they are"] += 1
            return hr._replace(info=info)
    grid = raster.warp_grid(info, mr, warp)
    if grid is None:
        return None
    said[*names, f"warped to MR's axes ({warp})"] += 1
    crs, transform, height, width, _ = grid
    info = replace(info, crs=crs, transform=transform, height=height, width=width)
    return hr._replace(info=info, read=functools.partial(hr.read, grid=grid))


def mosaics(sources):
    """[a Source of all of these on one pixel grid], [] unless there are two at least."""
    first = sources[0].info
    a, b, c, d, e, f = first.transform
    parts = []
    for s in sources:
        t = s.info.transform
        col, row = np.linalg.solve([[a, b], [d, e]], [t[2] - c, t[5] - f])
        one = np.allclose(np.delete(t, [2, 5]), (a, b, d, e), rtol=1e-6, atol=abs(a) * 1e-6)
        if one and max(abs(row - round(row)), abs(col - round(col))) < 0.02:
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
    """[Pair] by the path under the folders mr and hr, else by file stem where one file of each
    sensor has it. Each two are taken to show the same ground, edge to edge, which is said; two of
    another shape are none."""
    places = {under(h.info.path, hr): h for h in hr_sources}
    stems = {h.info.path.stem: h for h in hr_sources}
    count = [Counter(s.info.path.stem for s in some) for some in (mr_sources, hr_sources)]
    pairs = []
    for m in mr_sources:
        path, info, reason = m.info.path, m.info, ""
        hr_source = places.get(under(path, mr))
        if hr_source is None and path.stem in stems:
            if all(some[path.stem] == 1 for some in count):
                hr_source = stems[path.stem]
            else:
                reason = "several files have its name, and no HR in the same subfolder"
        elif hr_source is None:
            reason = "no HR file of its name"
        if hr_source:
            down, across = hr_source.info.height / info.height, hr_source.info.width / info.width
            if abs(down - across) > max(1 / info.height, 1 / info.width):  # a pixel of HR
                reason = "another shape than HR of its name, and no georeference"
        pairs.append(Pair(m, [] if reason else [hr_source], reason=reason))
    if paired := sum(not pair.reason for pair in pairs):
        print(f"{paired} pairs by name, ground unknown: no file is georeferenced, so each two are "
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
