"""From cut chips to a store: shards, splits, statistics, tables and meta.json.

A shard holds the chips of consecutive blocks of the input and is called after the first, "unit -
block.safetensors"; its header says where it ends. So what is done of the input is what shards are
there, one after the other, and whoever finds all of them makes a store of them (`complete`). A
chip that touches two splits stays in its shard, unused, and is left out of the index.
"""

import csv
import functools
import hashlib
import json
import math
import re
from collections import Counter, namedtuple
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

import figures
from data import (
    FORMAT,
    INDEX,
    SPLITS,
    VERSION,
    WINDOW,
    Store,
    header_digest,
    meta_digest,
    open_shard,
    resample,
    row_digests,
)
from files import replacing, write_atomic
from imagery import raster

SHARD_BYTES = 2**28  # of pixels
SHARD_ROWS = 10**5  # chips and what was skipped, which its header lists
NAME = re.compile(r"\d{7,}-\d{5,}\.safetensors")
SKIPPED = "mr_source row col hr_source valid reason".split()
CHIP = "image row col hr_source hr_date valid".split()  # of a chip in a shard's header
SLACK = 1e-3  # MR pixels; real georeferences are rounded
REGION = 1e6  # metres from a frame's anchor within which other projections share its blocks
PICTURES = 16  # pairs on the contact sheet
# Sentinel-2 reflectance x 10000 has 1000 added from processing baseline 04.00 on. Then no pixel is
# darker than a bit below 1000 in any band; without, nearly every chip holds water, shade or plants
# that are, in blue at least, and only deserts, snow and clouds are not. Beyond 2000 in the darkest
# band it is another scale.
DARKEST = 900, 2000

# What the chips of one MR image share. transform, crs, height, width: as of raster.Info; split: the
# publisher's or None; site: what must not be divided, or None
Image = namedtuple("Image", "mr_source mr_date crs transform height width split site")
# One chip. row: dict, by the names of CHIP, WINDOW or SKIPPED; images: [(pixels, moments)] of MR
# and maybe HR, [] of a chip that is skipped; why: "" of a pair, else why it has no HR
Chip = namedtuple("Chip", "row images why", defaults=("",))
# A block that was cut. image: an Image or None; holes: as in `new_told`; damaged: what its file
# says where it cannot be read
Cut = namedtuple("Cut", "image chips holes damaged", defaults=({}, ""))


class NoChip(ValueError):
    """No chip, or none to train on, is left under these flags: there is nothing to continue."""


# ---- writing shards


def write_shards(folder, plan, shape, dtype, cuts, begin, stop):
    """Write what was cut as shards, each whole or not there; yields (position, chips) after each.

    plan: what the header says of the command. shape, dtype: {sensor: of a chip}. cuts: (position,
    Cut) in order, the position that of the next block: (unit, block). begin: the first's; stop: the
    unit after the last.
    """
    sizes = {s: math.prod(shape[s]) * dtype[s].itemsize for s in shape}
    images, chips, skipped, told = [], [], [], new_told()

    def write(end):
        windows = [[chip.row.get(key, 0) for key in WINDOW] for chip in chips]
        tensors = {"hr_window": np.array(windows, float).reshape(-1, 4)}
        for k, s in enumerate(shape):
            rows = [chip.images[k] for chip in chips if len(chip.images) > k]
            tensors[s] = [pixels for pixels, _ in rows] or np.empty((0, *shape[s]), dtype[s])
            sums = np.array([moments for _, moments in rows])
            tensors[f"{s}_sums"] = sums.reshape(-1, shape[s][0], 4)
        facts = {
            **{"plan": plan, "begin": begin, "end": end, "images": images, **told},
            "chips": [[chip.row.get(key, "") for key in CHIP] for chip in chips],
            "skipped": skipped,
        }
        save_shard(folder / "{:07}-{:05}.safetensors".format(*begin), facts, tensors)

    size = 0
    for end, cut in cuts:
        kept = [chip for chip in cut.chips if chip.images]
        for chip in kept:
            chip.row["image"] = len(images)
            size += sum(sizes[s] for s, _ in zip(shape, chip.images, strict=False))
            told["without"].update([chip.why] if chip.why else [])
        images += [cut.image] if kept else []
        chips += kept
        skipped += [fill_row(SKIPPED, chip.row) for chip in cut.chips if not chip.images]
        merge_told(told, {"holes": cut.holes, "damaged": [cut.damaged] if cut.damaged else []})
        if size >= SHARD_BYTES or len(chips) + len(skipped) >= SHARD_ROWS:
            write(end)
            begin, size, images, chips, skipped, told = end, 0, [], [], [], new_told()
        yield end, len(kept)
    if tuple(begin) != (stop, 0):
        write((stop, 0))


def new_told():
    """What shards say beside their chips: why those have no HR; where NaN and inf were found {path:
    pixels}, and by "" the pairs with a repeated rim; what files say that cannot be read."""
    return {"without": Counter(), "holes": Counter(), "damaged": []}


def merge_told(told, more):
    told["without"].update(more.get("without", {}))
    for path, count in more["holes"].items():
        known = path in ("", *told["holes"]) or len(told["holes"]) < 5
        path = path if known else "other files"
        told["holes"][path] += count
    told["damaged"] = [*told["damaged"], *more["damaged"]][:5]


def save_shard(path, facts, tensors):
    """Write a shard with the digests of its chips, row by row: no second copy of 256 MB.

    facts: JSON-able. tensors: rows by name, an array or a list of contiguous arrays.
    """
    facts = json.dumps({**facts, "digests": row_digests(tensors)})
    header, end = {"__metadata__": {"crossscale": facts}}, 0
    kinds = {name: np.asarray(rows[:1]) for name, rows in tensors.items()}
    names = sorted(kinds, key=lambda name: -kinds[name].itemsize)  # so that each is aligned
    for name in names:
        shape = len(tensors[name]), *kinds[name].shape[1:]
        begin, end = end, end + math.prod(shape) * kinds[name].itemsize
        header[name] = {
            "dtype": f"{kinds[name].dtype.kind.upper()}{8 * kinds[name].itemsize}",
            "shape": shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for row in tensors[name]:
                file.write(np.ascontiguousarray(row))


def is_part(name):
    """Whether a file is called as a shard, or as one of a store's that is not whole yet."""
    return bool(NAME.fullmatch(name)) or name.endswith(".partial")


def find_shards(folder, begin, stop):
    """Names of the shards that follow one another from a position on, and where the next begins:
    ([name], (unit, block)). One that was damaged, as by a power cut, is as none."""
    names = []
    while begin[0] < stop:
        name = "{:07}-{:05}.safetensors".format(*begin)
        try:
            begin = tuple(open_shard(folder, {"file": name})[0]["end"])
        except ValueError:
            break
        names.append(name)
    return names, begin


def check_plan(folder, plan, overwrite):
    """Raise FileExistsError if a shard in the folder is another command's, or delete those."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            old = open_shard(folder, {"file": path.name})[0]["plan"]
        except ValueError:
            continue  # it is damaged, and written again
        # as text, in which NaN is NaN
        was, now = ({k: f"{v}" for k, v in p.items() if v is not None} for p in (old, plan))
        other = [key for key in {**now, **was} if now.get(key) != was.get(key)]
        if other and overwrite:
            path.unlink(missing_ok=True)
        elif other:
            was, now = (p.get(other[0], "not given") for p in (was, now))
            raise FileExistsError(
                f"{folder}: another command was interrupted there ({other[0]} {was}, now {now}); "
                "repeat that one to continue it, or discard it with --overwrite or by deleting the "
                "folder"
            )


# ---- statistics


def channel_moments(pixels, valid):
    """(C, 4) float64 per band over the valid pixels, of which there is one at least: count, mean,
    sum of squared deviations, least."""
    # all are valid nearly always, and to pick them one by one takes 30 times as long
    values = pixels.reshape(len(pixels), -1) if valid.all() else pixels[:, valid]
    values = values.astype(np.float64)
    least, mean, count = values.min(1), values.mean(1), values.shape[1]
    values -= mean[:, None]
    squares = np.einsum("cn,cn->c", values, values)
    return np.stack([np.full(len(mean), count), mean, squares, least], 1)


def pool_moments(moments):
    """(n, C, 4) moments of n sets of pixels to those of all of them together, (C, 4).

    Sums squared deviations within sets and between them: no large squares to cancel.
    """
    count, mean, squares, least = np.moveaxis(moments, -1, 0)
    total = count.sum(0)
    grand = (count * mean).sum(0) / total
    squares = (squares + count * (mean - grand) ** 2).sum(0)
    return np.stack([total, grand, squares, least.min(0)], 1)


def statistics(moments):
    """Mean and standard deviation per band, lists, of (N, C, 4) moments; a flat band gets std 1."""
    parts = np.array_split(moments, math.ceil(len(moments) / 2**16))
    count, mean, squares, _ = pool_moments(np.stack([pool_moments(part) for part in parts])).T
    std = np.sqrt(squares / count)
    return mean.tolist(), np.where(std > 0, std, 1.0).tolist()


# ---- splits


def ground_keys(image, corner, chip, block_pixels, frames):
    """What chips must not be divided from: (n, 5) int64, the block of ground of the centre and of
    the four corners; one number for all five where the site or the file decides.

    image: Image. corner: (n, 2) row and col of its chips. frames: [(crs, anchor, side)], the block
    grids, to which an image far from all adds one, anchored at the first image's corner, so that
    another image of the same ground (another date) falls into the same blocks; blocks have
    `block_pixels` MR pixels a side.
    """
    if image.site is not None or image.transform is None:
        name = image.mr_source if image.site is None else str(image.site)
        digest = hashlib.sha256(name.encode()).digest()
        return -1 - (int.from_bytes(digest[:8], "little") >> 2)
    a, b, c, d, e, f = image.transform
    number = next((n for n, frame in enumerate(frames) if near(image, frame)), None)
    if number is None:
        number = len(frames)
        side = block_pixels * np.array([math.hypot(b, e), math.hypot(a, d)])
        frames.append((image.crs, np.array([f, c]), side))
    crs, anchor, side = frames[number]
    rows, cols = (corner[:, :1] + [0, 0, chip, chip], corner[:, 1:] + [0, chip, 0, chip])
    y, x = d * cols + e * rows + f, a * cols + b * rows + c  # (n, 4)
    if crs != image.crs:
        x, y = (v.reshape(y.shape) for v in raster.project(image.crs, crs, x.ravel(), y.ravel()))
    slack = SLACK / block_pixels * side
    south, north = y.min(1) + slack[0], y.max(1) - slack[0]
    west, east = x.min(1) + slack[1], x.max(1) - slack[1]
    y = np.stack([(south + north) / 2, south, north, south, north], 1)
    x = np.stack([(west + east) / 2, west, east, east, west], 1)
    down, across = np.floor((y - anchor[0]) / side[0]), np.floor((x - anchor[1]) / side[1])
    # 24 bits for each: the Earth has fewer blocks of a metre a side along its equator
    return (
        number * 2**48 + (down.astype(np.int64) + 2**23) * 2**24 + across.astype(np.int64) + 2**23
    )


def near(image, frame):
    """Whether an image is dealt by the blocks of ground of this frame: in its CRS, or so near that
    the frame's CRS has little distortion there."""
    crs, anchor, _ = frame
    if crs == image.crs or not crs or not image.crs:
        return crs == image.crs
    if raster.is_geographic(crs):
        return False
    try:
        x, y = raster.project(image.crs, crs, *raster.corners(image))
    except ValueError:
        return False
    return bool(np.hypot(x - anchor[1], y - anchor[0]).max() < REGION)


def deal(keys, given, fractions, seed):
    """Deal chips to splits: the publisher's where given, else with their site or block of ground.

    keys: (N, 5) of `ground_keys`. given: (N,) int8 positions in SPLITS or -1. Returns split (N,)
    int8, -1 for a chip that touches two; and how many sites or blocks were dealt.
    """
    keys, first, ids = np.unique(keys, return_index=True, return_inverse=True)
    # numbered as they come, whatever their keys are
    ids = np.argsort(np.argsort(first))[ids].reshape(-1, 5)
    sizes = np.bincount(ids[given < 0, 0], minlength=len(keys))
    dealt = assign_splits(sizes, fractions, seed)
    dealt = np.array([SPLITS.index(name) for name in dealt], np.int8)[ids]
    alone = (dealt == dealt[:, :1]).all(1)
    return np.where(given >= 0, given, np.where(alone, dealt[:, 0], -1)), np.count_nonzero(sizes)


def assign_splits(sizes, fractions, seed):
    """Deal blocks of ground to "train" and the splits of `fractions` (name -> share of chips).

    sizes: (blocks,) chips of each. Blocks are taken in a seeded order as long as that brings the
    split closer to its share; a split that would get none gets the block nearest to its share, as
    long as train keeps one. Returns (blocks,) names.
    """
    split = np.full(len(sizes), "train")
    order = np.random.default_rng(seed).permutation(np.flatnonzero(sizes))
    left = len(order)  # blocks that train has
    for name, fraction in fractions.items():
        target, taken = fraction * sizes.sum(), 0
        for block in order:
            closer = abs(taken + sizes[block] - target) < target - taken
            if closer and split[block] == "train" and left > 1:
                split[block] = name
                taken += sizes[block]
                left -= 1
        if fraction and not taken and left > 1:
            free = order[split[order] == "train"]
            split[free[np.abs(sizes[free] - target).argmin()]] = name
            left -= 1
    return split


def number_chips(keep):
    """Which of n chips gets each number: (count,) positions of those of `keep` (n,) bool. They keep
    their places, and those beyond the end fill the gaps in order: so stores had it when pixels had
    to be moved for it, and runs on them can be repeated."""
    place = np.arange(len(keep))
    count = np.count_nonzero(keep)
    place[np.flatnonzero(~keep[:count])] = count + np.flatnonzero(keep[count:])
    return place[:count]


# ---- the store


def complete(listing, folder, names, job, plan, command):
    """Make a store of a folder that holds all shards: deal the splits, write the tables, meta.json
    and the contact sheet. May be repeated after a kill.

    listing, job, plan, command: as of pack.pack. names: of the shards, in order. Returns meta,
    skipped (Counter of reasons), why chips have no HR (Counter) and notes to print. Raises NoChip
    if no chip, or none of the training split, is left.
    """
    opened = functools.lru_cache(3)(lambda n: open_shard(folder, {"file": names[n]}))
    told, frames, skipped, valid = new_told(), [], Counter(r for _, r in listing.skipped), 0.0
    keys, given, place, sums = [], [], [], {sensor: [] for sensor in job.shape}
    for n in range(len(names)):
        facts, tensors = opened(n)
        merge_told(told, facts)
        skipped.update(row[-1] for row in facts["skipped"])
        valid = max([valid, *(row[-2] or 0 for row in facts["skipped"])])
        chips = np.array([row[:3] for row in facts["chips"]], np.int64).reshape(-1, 3)
        key = np.zeros((len(chips), 5), np.int64)
        for k, image in enumerate(facts["images"]):
            image, here = Image(*image), chips[:, 0] == k
            key[here] = ground_keys(
                image, chips[here, 1:], job.chip, job.chip * plan["--split-block"], frames
            )
        splits = [SPLITS.index(image[-2]) if image[-2] else -1 for image in facts["images"]]
        given.append(np.array(splits, np.int8)[chips[:, 0]])
        has_hr = tensors["hr_window"][:, 2] > 0
        hr = np.where(has_hr, np.cumsum(has_hr) - 1, -1)
        keys.append(key)
        place.append(np.stack([np.full(len(chips), n), np.arange(len(chips)), hr], 1))
        for sensor in sums:
            sums[sensor].append(tensors[f"{sensor}_sums"])
    keys, given, place = (np.concatenate(some) for some in (keys, given, place))
    has_hr = place[:, 2] >= 0
    if not len(keys):
        if told["damaged"]:
            raise NoChip(told["damaged"][0])
        remedy = f"lower --min-valid {job.min_valid} or --chip {job.chip}"
        if not valid:
            remedy = "one of each pair is all nodata; check what the files declare, and --nodata"
        raise NoChip(f"no chip kept ({reasons(skipped)}); {remedy}")
    fractions = {"val": plan["--val"], "test": plan["--test"]}
    split, dealt = deal(keys, given, fractions, plan["--seed"])
    keep = split >= 0
    skipped["touches two splits"] += int((~keep).sum())
    skipped = +skipped
    count = {name: int((split == n).sum()) for n, name in enumerate(SPLITS)}
    if not count["train"]:
        raise NoChip(
            f"--split-block {plan['--split-block']}: no training chip left ({reasons(skipped)}); "
            "use larger blocks, or a --stride that is not smaller than --chip"
            if dealt
            else "no training chip left: the publisher's splits have none of these in train; pack "
            "the whole set"
        )
    train = split == 0
    # pairs of the other splits only: better their statistics than none
    pairs = has_hr & train if (has_hr & train).any() else has_hr & keep
    sums = {sensor: np.concatenate(some) for sensor, some in sums.items()}
    stats = {"mr": statistics(sums["mr"][train])}
    if pairs.any():
        stats["hr"] = statistics(sums["hr"][pairs[has_hr]])
    order = number_chips(keep)
    shown = np.flatnonzero(has_hr[order]) if "hr" in stats else np.arange(len(order))
    shown = np.random.default_rng(plan["--seed"]).permutation(shown)[:PICTURES]
    rows = write_tables(folder, listing.skipped, opened, len(names), place, order, split, shown)
    with open(folder / "index.csv", "rb") as index:
        digest = hashlib.file_digest(index, "sha256").hexdigest()
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "count": {"mr": len(order), "hr": int(has_hr[order].sum())},
        "bands": {s: list(listing.bands[s]) if s in stats else [] for s in ("mr", "hr")},
        "shape": {s: job.shape[s] if s in stats else None for s in ("mr", "hr")},
        "dtype": {s: str(job.dtype[s]) if s in stats else None for s in ("mr", "hr")},
        "gsd": job.gsd,
        "pixel_ratio": job.ratio,
        "mean": {s: stats[s][0] if s in stats else None for s in ("mr", "hr")},
        "std": {s: stats[s][1] if s in stats else None for s in ("mr", "hr")},
        "nodata": {s: as_json(value) for s, value in job.nodata.items()},
        "offset": job.offsets,
        "crs": job.crs,
        "splits": {name: n for name, n in count.items() if n},
        "sources": list(listing.sources),
        "provenance": {
            "command": command,
            "units": len(listing.units),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        "index": digest,
        "shards": [
            {
                "file": name,
                "bytes": (folder / name).stat().st_size,
                "digest": header_digest(folder / name),
            }
            for name in names
        ],
    }
    write_meta(folder, meta)
    with figures.optional(folder / "contact.png"):
        draw_contact(folder, rows)
    notes = [f"warning: left out: {message}" for message in told["damaged"]]
    if rims := told["holes"].pop("", 0):
        notes.append(
            f"{rims} pairs: HR ends less than half an MR pixel short of the chip, so its last row "
            "or column is repeated"
        )
    notes += [
        f"warning: {path}: {holes} pixels of its chips are NaN or inf, taken as missing"
        for path, holes in told["holes"].items()
    ]
    least = sums["mr"][train, :, 3]
    darkest = np.quantile(least, 0.05, axis=0, method="higher").min()  # a few have dead pixels
    if (
        job.offsets["mr"] == [0]
        and job.dtype["mr"].itemsize == 2
        and DARKEST[0] <= darkest < DARKEST[1]
    ):
        notes.append(
            f"warning: MR has hardly a pixel below {darkest:.0f} in any band, as Sentinel-2 from "
            "processing baseline 04.00 on, to which 1000 is added; if these are, pack again with "
            "--offset -1000 --overwrite"
        )
    notes += [
        f"{name} is empty: the chips lie in {dealt} sites or blocks of ground of "
        f"{plan['--split-block']} x {plan['--split-block']} chips; try another --split-block"
        for name, fraction in fractions.items()
        if fraction and dealt and not count[name]
    ]
    return meta, skipped, told["without"], notes


def write_meta(folder, meta):
    meta = json.loads(json.dumps(meta))  # tuples are lists from here on
    write_atomic(folder / "meta.json", json.dumps(meta | {"digest": meta_digest(meta)}, indent=1))


def write_tables(folder, left_out, opened, shards, place, order, split, shown):
    """Write index.csv and skipped.csv. left_out: [(name, reason)]. opened: number -> (facts,
    tensors) of a shard. place: (N, 3) shard, row and HR's row of every chip; order: which chip gets
    each number; split: (N,) -1 for those that no split has. Returns the rows of the chips `shown`.
    """

    def row_of(old):
        shard, at, hr = place[old].tolist()
        facts, tensors = opened(shard)
        row = dict(zip(CHIP, facts["chips"][at], strict=True))
        image = Image(*facts["images"][row["image"]])
        row |= {"mr_source": image.mr_source, "mr_date": image.mr_date, "shard": shard, "place": at}
        if image.transform is not None:
            a, b, c, d, e, f = image.transform
            corner = a * row["col"] + b * row["row"] + c, d * row["col"] + e * row["row"] + f
            values = raster.crs_name(image.crs), a, b, corner[0], d, e, corner[1]
            row |= dict(zip(("crs", *"abcdef"), values, strict=True))
        if hr >= 0:
            row |= {"hr": hr, **dict(zip(WINDOW, tensors["hr_window"][at].tolist(), strict=True))}
        return row

    pictured, rows = {*shown.tolist()}, []
    with table(folder / "index.csv", INDEX) as index:
        for chip, old in enumerate(order.tolist()):
            row = row_of(old) | {"chip": chip, "split": SPLITS[split[old]]}
            index.writerow(fill_row(INDEX, row))
            rows += [row] if chip in pictured else []
    with table(folder / "skipped.csv", SKIPPED) as skipped:
        for name, reason in left_out:
            skipped.writerow(fill_row(SKIPPED, {"mr_source": name, "reason": reason}))
        for n in range(shards):
            skipped.writerows(opened(n)[0]["skipped"])
        for old in np.flatnonzero(split < 0).tolist():
            row = row_of(old) | {"reason": "touches two splits"}
            skipped.writerow(fill_row(SKIPPED, row))
    return rows


@contextmanager
def table(path, columns):
    """Yield a csv.writer of a table that appears under its name when it is whole."""
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        yield rows


def draw_contact(folder, rows):
    """Write contact.png: HR (left) and MR of a few pairs side by side, the same ground in both.

    rows: of index.csv, dicts, of chips that all have HR or all have none.
    """
    from matplotlib.figure import Figure  # here: it takes a second to import

    store = Store(folder)
    batch = store.batch([row["chip"] for row in rows])
    side = store.meta["shape"]["mr"][1]
    whole = torch.tensor([[0.0, 0.0, side, side]] * len(rows), dtype=torch.float64)
    columns = {"MR": ("mr", whole, side)}
    if batch["has_hr"].all():
        hr_side = round(side * max(store.meta["pixel_ratio"]))
        columns = {"HR": ("hr", batch["hr_window"], hr_side), **columns}
    for title, (sensor, windows, pixels) in columns.items():
        size = (min(256, pixels),) * 2
        images = resample(batch[sensor], windows, size)
        columns[title] = figures.composite(images, store.meta["bands"][sensor]).numpy()
    across = min(4, len(rows))
    down = math.ceil(len(rows) / across)
    width = 1.05 * len(columns) + 0.1  # of a pair, in pictures; an Axes for each would take seconds
    figure = Figure(figsize=(1.7 * width * across, 1.7 * (1.25 * down + 0.25)))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    many = f"{len(rows)} of {len(store)} chips, the same ground in {' (left) and '.join(columns)}"
    axis.text(0, -0.1, f"{many}: number, file, (row, column)", fontsize=8)
    for k, row in enumerate(rows):
        left, top = k % across * width, k // across * 1.25
        name = f"{row['chip']}: {Path(row['mr_source']).name}"
        name = name if len(name) <= 36 else f"{name[:12]}...{name[-21:]}"
        axis.text(left, top + 0.1, f"{name} ({row['row']}, {row['col']})", fontsize=5,
                  parse_math=False)  # fmt: skip
        for n, (title, pictures) in enumerate(columns.items()):
            x, y = left + 1.05 * n, top + 0.25
            axis.imshow(pictures[k], extent=(x, x + 1, y + 1, y), aspect="auto",
                        interpolation="nearest")  # fmt: skip
            axis.text(x, y - 0.02, title, fontsize=5)
    axis.set(xlim=(0, width * across), ylim=(1.25 * down, -0.25))  # imshow changes them
    figures.save_figure(figure, folder / "contact.png")


def fill_row(columns, row):
    return [row.get(name, "") for name in columns]


def reasons(counts):
    most = Counter(counts).most_common()
    rest = [f"{sum(n for _, n in most[8:])} for other reasons"] if most[8:] else []
    return ", ".join([f"{n} {reason}" for reason, n in most[:8]] + rest) or "none"


def as_json(number):
    return None if number is None or math.isnan(number) else number  # NaN is missing anyway
