"""Which chips images have, and cutting them: headers, pixel grids, blocks, pixels.

A block is what is read at a time, some 32 MB of chips of one pair of images: neither rows of chips
nor whole images, since a scene may be larger than memory.
"""

import itertools
import math
from collections import Counter, deque, namedtuple
from contextlib import contextmanager

import numpy as np
from tqdm import tqdm

from data import WINDOW
from imagery import raster
from imagery.shards import SLACK, Chip, Cut, Image, channel_moments, reasons

BLOCK_BYTES = 2**25  # stored pixels of the chips that are cut at a time
SURVEY = 256  # units whose headers are read first, where the publisher cut all images to one size
ALIKE = 0.05  # of the pixel ratio and of the pixel size: more is another kind of pair
# What all chips of a store share. shape, dtype, gsd, nodata: by sensor, "hr" not in shape where no
# MR image has HR. ratio: HR pixels to an MR pixel (rows, cols). offsets: by sensor, all that are
# added to pixels; offset: DN to add to MR, None where the sources tell. unpaired: whether MR chips
# without HR are kept
Job = namedtuple(
    "Job",
    "chip stride shape dtype ratio gsd nodata crs offsets offset min_valid unpaired",
    defaults=(None, 1.0, False),
)
# Chips to be cut at a time from a Pair. corners: (n, 2); partners: [(hr, ratio, offset)]; reason:
# why there are none; why: what is damaged, and then pair is None
Block = namedtuple("Block", "pair corners partners reason why", defaults=("",))


@contextmanager
def named(path):
    """Give an error of the system its file, where it has none: a full disk names none."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


def in_order(pool, function, items, ahead):
    """Yield function(item) of each item in order, computed by the pool, `ahead` of them at most."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# ---- what all chips have in common


def survey(listing, pool, chip, stride):
    """Read headers to say what all chips share, before any pixel is read: the Job.

    Of all units, or of a sample where the publisher cut the images to one size (Listing.chip).
    Raises ValueError if the pairs do not fit each other.
    """
    units, most = listing.units, None
    if listing.chip:
        sample = np.linspace(0, len(units) - 1, min(len(units), SURVEY)).astype(int)
        units, most = [units[i] for i in sample], 16
    found, pairs = [], []  # (ratio, mr, hr, size of a chip's window in hr)
    damaged = []

    def headers(unit):
        try:
            with named(unit.name):
                return list(itertools.islice(unit.open(), most))
        except ValueError as error:
            if not listing.chip:  # a folder of one's own is to be mended
                raise
            damaged.append(error)  # one of the archive's many: it is left out, see `cut`
            return []

    opened = in_order(pool, headers, units, 2 * SURVEY)
    with tqdm(opened, "headers", len(units), leave=False, unit="unit") as bar:
        for pair in itertools.chain.from_iterable(bar):
            pairs.append(pair)
            corners = chip_corners(pair.mr.info, chip, stride).reshape(-1, 2)
            for hr in pair.hrs:
                grid = align(pair.mr.info, hr.info)
                _, low, high, inside = place_chips(corners, chip, hr.info, *grid)
                found.append((grid[0], pair.mr, hr, (high - low)[inside].max(0, initial=0)))
    if not pairs and damaged:
        raise damaged[0]
    if not pairs:
        reasons_ = reasons(Counter(reason for _, reason in listing.skipped))
        raise ValueError(f"nothing to pack: no image of a pair was found (skipped: {reasons_})")
    types = Counter((mr.info.dtype, hr.info.dtype) for _, mr, hr, _ in found)
    types = types or Counter((pair.mr.info.dtype, None) for pair in pairs)
    dtype = dict(zip(("mr", "hr"), types.most_common(1)[0][0], strict=True))
    odd = [message for pair in pairs if (message := another_type(pair, dtype))]
    if odd and not listing.chip:
        raise ValueError(f"{odd[0]}; pack them apart")
    found = [f for f in found if (f[1].info.dtype, f[2].info.dtype) == (*dtype.values(),)]
    mr = next(pair.mr for pair in pairs if pair.mr.info.dtype == dtype["mr"])
    hr = ratio = None
    shape = {"mr": (len(listing.bands["mr"]), chip, chip)}
    if listing.bands["hr"]:
        size = np.zeros(2)
        if found:
            middle = np.argsort([ratio[0] for ratio, *_ in found], kind="stable")
            ratio, mr, hr, _ = found[middle[(len(found) - 1) // 2]]
            odd = [pair for pair in found if not alike(pair[0], pair[1], ratio, mr.info.gsd)]
            if odd and not listing.chip:
                other, of, *_ = odd[0]
                raise ValueError(
                    f"{of.info.path}: {other[0]:.6g} HR pixels to an MR pixel of "
                    f"{of.info.gsd or 1:g}, but {ratio[0]:.6g} to {mr.info.gsd or 1:g} in "
                    f"{mr.info.path}; pack files of one pixel size at a time"
                )
            size = np.max([p[3] for p in found if alike(p[0], p[1], ratio, mr.info.gsd)], 0)
        if not size.all():
            raise ValueError(
                f"--chip {chip}: no MR chip of {chip} x {chip} pixels lies wholly on an HR file; "
                "use smaller chips"
            )
        shape["hr"] = (len(listing.bands["hr"]), *size.tolist())
    odd = [pair.mr.info for pair in pairs if not same_gsd(pair.mr, mr.info.gsd)]
    if odd and not listing.chip:
        raise ValueError(
            f"{odd[0].path}: {gsd_text(odd[0].gsd)}, but {mr.info.path} has "
            f"{gsd_text(mr.info.gsd)}; pack files of one pixel size at a time"
        )
    return Job(
        chip=chip,
        stride=stride,
        shape=shape,
        ratio=None if ratio is None else ratio.tolist(),
        gsd={"mr": mr.info.gsd, "hr": hr and hr.info.gsd},
        dtype=dtype,
        nodata={"mr": mr.nodata, "hr": hr and hr.nodata},
        crs=mr.info.crs,
        offsets={
            "mr": sorted({pair.mr.offset for pair in pairs}),
            "hr": sorted({image.offset for _, _, image, _ in found}),
        },
    )


def align(mr, hr):
    """(ratio, offset), each (2,) of rows, cols: HR pixel = offset + ratio * MR pixel, corners.

    Without georeference both images are taken to show the same ground. Raises ValueError if the
    grids are rotated against each other or HR is coarser than MR.
    """
    if mr.transform is None:
        ratio, offset, skew = np.array([hr.height / mr.height, hr.width / mr.width]), np.zeros(2), 0
    else:
        a, b, c, d, e, f = mr.transform
        to_mr = np.array([[e, d], [b, a]])  # (row, col) -> (y, x)
        a, b, hr_c, d, e, hr_f = hr.transform
        to_hr = np.array([[e, d], [b, a]])
        matrix = np.linalg.solve(to_hr, to_mr)
        offset = np.linalg.solve(to_hr, [f - hr_f, c - hr_c])
        ratio = matrix.diagonal().copy()
        skew = np.abs(matrix - np.diag(ratio)).max() * max(mr.height, mr.width)
    if skew > 0.1 or ratio.min() <= 0:
        raise ValueError(
            f"{hr.path}: its pixel grid is rotated or mirrored against {mr.path}; warp one of them "
            "to the axes of the other with gdalwarp"
        )
    if ratio.min() < 1 - 1e-6:
        raise ValueError(
            f"{hr.path}: HR coarser than MR, {ratio.min():.4g} of its pixels to one of {mr.path}; "
            "swap --mr and --hr or choose other files"
        )
    return ratio, offset


def chip_corners(info, chip, stride):
    """(rows, cols, 2) int64 row, col of the top-left corner of every chip of an MR image."""
    rows, cols = (np.arange(0, side - chip + 1, stride) for side in (info.height, info.width))
    return np.stack(np.meshgrid(rows, cols, indexing="ij"), -1)


def place_chips(corners, chip, hr, ratio, offset):
    """Where MR chips lie in an HR image.

    Returns corner (n, 2) float and the whole-pixel window around the chip, low and high (n, 2)
    int64, in HR pixels; inside (n,) bool, whether the image holds the whole window, but for a rim
    of half an MR pixel: publishers cut 320 m to 533 pixels of 0.6 m.
    """
    corner = offset + ratio * corners
    low = np.floor(corner + SLACK).astype(np.int64)
    high = np.ceil(corner + ratio * chip - SLACK).astype(np.int64)
    short = np.maximum(-low, high - (hr.height, hr.width)).max(1)
    return corner, low, high, short <= min(ratio) / 2


def alike(ratio, mr, nominal, gsd):
    """Whether a pair is of the kind that the store holds, by its pixel ratio and MR's pixel."""
    return np.abs(ratio / nominal - 1).max() <= ALIKE and same_gsd(mr, gsd)


def same_gsd(mr, gsd):
    return abs((mr.info.gsd or 1) / (gsd or 1) - 1) <= ALIKE


def gsd_text(gsd):
    return f"gsd {gsd:g}" if gsd else "no georeference"


# ---- one unit: from headers to chips


def lay_out(job, unit):
    """Open a unit and divide it: [Block]."""
    blocks, none = [], np.zeros((0, 2), int)
    try:
        with named(unit.name):
            pairs = list(unit.open())
    except ValueError as error:
        return [Block(None, none, [], "cannot be read", str(error))]
    for pair in pairs:
        mr, partners, reason = pair.mr, [], pair.reason or "no HR file for it"
        if why := another_type(pair, job.dtype):
            blocks.append(Block(None, none, [], "another type of pixels", why))
            continue
        for hr in pair.hrs:
            reason = "another pixel ratio"
            try:
                ratio, offset = align(mr.info, hr.info)
            except ValueError:  # the survey raises it of what it sees
                continue
            if alike(ratio, mr, np.array(job.ratio), job.gsd["mr"]):
                partners.append((hr, ratio, offset))
        corners = chip_corners(mr.info, job.chip, job.stride)
        if not same_gsd(mr, job.gsd["mr"]):
            blocks.append(Block(pair, none, [], "another pixel size"))
        elif not corners.size:
            blocks.append(Block(pair, none, [], "smaller than a chip"))
        elif not partners and not job.unpaired:
            blocks.append(Block(pair, none, [], reason))
        else:
            rows, cols = corners.shape[:2]
            chips = max(1, int(BLOCK_BYTES / chip_bytes(job)))
            across, down = min(cols, chips), max(1, chips // cols)
            blocks += [
                Block(pair, corners[r : r + down, c : c + across].reshape(-1, 2), partners, reason)
                for r in range(0, rows, down)
                for c in range(0, cols, across)
            ]
    return blocks


def another_type(pair, dtype):
    """What a pair has another type of pixels of than the store, as text; "" if it has none."""
    for sensor, source in (("mr", pair.mr), *(("hr", hr) for hr in pair.hrs)):
        if source.info.dtype != dtype[sensor]:
            return (
                f"{source.info.path}: {source.info.dtype} pixels, but the {sensor.upper()} of this "
                f"store is {dtype[sensor]}"
            )
    return ""


def chip_bytes(job):
    """Pixels in bytes that are decoded for a chip, MR and HR together."""
    spread = (max(job.chip, job.stride) / job.chip) ** 2
    return spread * sum(math.prod(job.shape[s]) * job.dtype[s].itemsize for s in job.shape)


def cut(job, unit, block):
    """Cut a Block of a unit: a Cut. One whose file is damaged is left out: archives of a million
    files have some. What cannot be reached is an OSError, and stops."""
    if block.why:
        chip = Chip({"mr_source": unit.name, "reason": block.reason}, [])
        return Cut(None, [chip], {}, block.why)
    holes, mr = Counter(), block.pair.mr
    try:
        with named(unit.name):
            chips = cut_block(job, block, holes)
    except ValueError as error:
        chip = Chip({"mr_source": unit.name, "reason": "cannot be read"}, [])
        return Cut(None, [chip], {}, str(error))
    about = mr.info.crs, mr.info.transform, mr.info.height, mr.info.width, block.pair.split
    site = None if block.pair.site is None else str(block.pair.site)
    return Cut(Image(mr.info.path.as_posix(), mr.date, *about, site), chips, holes)


def cut_block(job, block, holes):
    """Cut the chips of a block, each with the first HR image that covers it and is valid enough:
    [Chip]. holes: Counter by path, to which NaN and inf are added, and by "" repeated rims."""
    mr, here = block.pair.mr, block.corners
    row = {"mr_source": mr.info.path.as_posix()}
    if not len(here):
        return [Chip(row | {"reason": block.reason}, [], "")]
    places = [place_chips(here, job.chip, hr.info, *grid) for hr, *grid in block.partners]
    size = np.array(job.shape["hr"][1:]) if places else None
    fits = [((high - low) <= size).all(1) for _, low, high, _ in places]
    fate = [{"reason": "no HR file covers it" if places else block.reason} for _ in here]
    for (*_, inside), fit in zip(places, fits, strict=True):
        for k in np.flatnonzero(inside & ~fit):
            fate[k] = {"reason": "another pixel ratio"}
        inside &= fit
    wanted = np.arange(len(here))
    if not job.unpaired:
        wanted = np.flatnonzero(np.any([inside for *_, inside in places], axis=0))

    waiting, images = {}, {}  # MR chips without HR yet; what is stored
    offset = mr.offset if job.offset is None else job.offset
    read = read_chips(mr, here[wanted], job.shape["mr"][1:], offset, holes)
    for k, image in zip(wanted, read, strict=True):
        valid = float(image[1].mean())
        if valid >= job.min_valid:
            waiting[k] = image
            fate[k]["valid"] = valid
        else:
            fate[k] = {"valid": valid, "reason": "MR not valid enough"}
    for (hr, ratio, _), (corner, low, high, inside) in zip(block.partners, places, strict=True):
        mine = [k for k in waiting if inside[k] and k not in images]
        sides = np.array([hr.info.height, hr.info.width])
        # inside, but where the chip itself ends beyond the image: there a rim is repeated
        start = np.minimum(low, np.maximum(0, sides - size))
        rim = (low < 0) | (high > sides)
        start = np.where(rim, low, start)
        read = read_chips(hr, start[mine], job.shape["hr"][1:], hr.offset, holes)
        for k, image in zip(mine, read, strict=True):
            valid = float(min(image[1].mean(), waiting[k][1].mean()))
            source = {"hr_source": files_of(hr, start[k], size), "hr_date": hr.date}
            if valid < job.min_valid:
                bad = {"reason": "HR not valid enough"}
                # of a chip that stays, valid is its own
                fate[k] |= bad if job.unpaired else bad | source | {"valid": valid}
                continue
            window = map(float, (*(corner[k] - start[k]), *(ratio * job.chip)))
            window = dict(zip(WINDOW, window, strict=True))
            fate[k] = {"valid": valid, **source, **window}
            images[k] = [waiting[k], image]
            holes.update([""] if rim[k].any() else [])
    if job.unpaired:
        images = {k: images.get(k, [image]) for k, image in waiting.items()}
    chips = []
    for k, (top, left) in enumerate(here.tolist()):
        stored = [
            (np.ascontiguousarray(fill_holes(*image)), channel_moments(*image))
            for image in images.get(k, [])
        ]
        why = fate[k].get("reason", "") if stored else ""
        chips.append(Chip(row | {"row": top, "col": left} | fate[k], stored, why))
    return chips


def files_of(source, start, size):
    """The files that a chip's pixels come from, as text."""
    files = [
        part.info.path.as_posix()
        for part, *place in source.parts
        if (start < np.add(place, (part.info.height, part.info.width))).all()
        and (start + size > place).all()
    ]
    return "; ".join(files) or source.info.path.as_posix()


def read_chips(source, corners, size, offset, holes):
    """Yield (pixels (C, *size), valid (*size)) at (n, 2) whole-pixel corners, by one read.

    offset: what is added to the valid pixels. holes: Counter by path, for NaN and inf.
    """
    if not len(corners):
        return
    info = source.info
    low = np.maximum(0, corners.min(0))
    high = np.minimum(corners.max(0) + size, (info.height, info.width))
    found = source.read((*low.tolist(), *(high - low).tolist()), source.bands)
    block, valid = raster.masked(found, source.nodata)
    # an HR file that ends with its chip, among others whose chips need a pixel more of margin
    # and one that ends up to half an MR pixel short: its last row or column is repeated
    before, after = low - corners.min(0), np.maximum(0, corners.max(0) + size - high)
    if before.any() or after.any():
        rim = [*zip(before.tolist(), after.tolist(), strict=True)]
        block, valid = np.pad(block, [(0, 0), *rim], mode="edge"), np.pad(valid, rim, mode="edge")
    if offset:
        block = add_offset(block, offset, source.nodata)
    for row, col in corners - corners.min(0):
        window = slice(row, row + size[0]), slice(col, col + size[1])
        pixels = block[:, *window]
        if pixels.dtype.kind == "f" and not np.isnan(source.nodata or 0):
            missing = int((~np.isfinite(pixels)).any(0).sum())
            if missing:
                holes[info.path.as_posix()] += missing
        yield pixels, valid[window]


def add_offset(pixels, offset, nodata):
    """pixels + offset in their own dtype, clipped to what it holds; nodata stays nodata."""
    if pixels.dtype.kind == "f":
        moved = (pixels + offset).astype(pixels.dtype)
    else:
        about = np.iinfo(pixels.dtype)
        moved = np.clip(np.rint(pixels + float(offset)), about.min, about.max).astype(pixels.dtype)
    return moved if nodata is None else np.where(pixels == nodata, pixels, moved)


def fill_holes(pixels, valid):
    """Give missing pixels their band's mean over the chip's valid ones: no edge, no shift."""
    if valid.all():
        return pixels
    mean = pixels[:, valid].mean(1, dtype=np.float64)
    mean = (mean if pixels.dtype.kind == "f" else mean.round()).astype(pixels.dtype)
    return np.where(valid, pixels, mean[:, None, None])
