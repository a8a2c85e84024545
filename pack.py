"""From pairs of images to a store: chips, splits, statistics (`data.py pack`).

Nothing is resampled on the way in: chips are cut on the MR pixel grid, and the HR chip is the
whole-pixel window around the same ground together with the fractional place of the MR chip in it,
so any pixel ratio and any offset of the two grids stay exact.
"""

import csv
import json
import math
import os
import tempfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from tqdm import tqdm

import geotiff
from data import FORMAT, INDEX, SPLITS, VERSION, WINDOW
from formats import check_band_order, open_sources, pair_up

SKIPPED = "mr_source row col hr_source valid reason".split()
BLOCK_BYTES = 2**28  # decoded at a time when packing
FILES = {"mr.npy", "hr.npy", "index.csv", "meta.json", "skipped.csv", "flags.csv"}
SLACK = 1e-3  # pixels; real georeferences are rounded


def pack(
    mr,
    hr,
    out,
    *,
    chip=64,
    stride=None,
    mr_bands=None,
    hr_bands=None,
    band_names=None,
    nodata=None,
    min_valid=1.0,
    split_block=8,
    val=0.1,
    test=0.0,
    seed=0,
    overwrite=False,
    command="",
):
    """Cut paired GeoTIFFs into a store at `out`; the arguments are the flags of `data.py pack`.

    mr, hr: folder, file or glob. mr_bands, hr_bands: lists of band names or indices, as text.
    Prints a report and returns the store's meta. Raises FileNotFoundError, FileExistsError or
    ValueError, one sentence that names file or flag and remedy; `out` then stays as it was.
    """
    stride = chip if stride is None else stride
    if min(chip, stride, split_block) < 1 or seed < 0:
        raise ValueError(
            f"--chip {chip}, --stride {stride} and --split-block {split_block} must be 1 or more, "
            f"--seed {seed} 0 or more"
        )
    if not (0 < min_valid <= 1 and 0 <= val and 0 <= test and val + test < 1):
        raise ValueError(
            f"--min-valid {min_valid} must be above 0 and at most 1, --val {val} and --test {test} "
            "at least 0 and less than 1 together"
        )
    out = Path(out)
    if out.exists() and not is_store(out):
        raise FileExistsError(f"{out}: exists and is not a store; choose another folder")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out}: a store is there; add --overwrite to replace it")
    if out.exists() and (foreign := {file.name for file in out.iterdir()} - FILES):
        raise FileExistsError(
            f"{out}: --overwrite would delete {min(foreign)}, which is no part of the store; move "
            "it elsewhere"
        )
    given = [name.lower() for name in band_names or []]
    if len(set(given)) < len(given):
        raise ValueError(
            f"--band-names {','.join(band_names)}: a name occurs twice; give each band its own"
        )
    mr_sources, names = open_sources(mr, "mr", mr_bands, band_names, nodata)
    hr_sources, _ = open_sources(hr, "hr", hr_bands, names, nodata)
    check_band_order({"--mr-bands": mr_sources, "--hr-bands": hr_sources}, band_names)
    pairs = [
        (m, chip_corners(m.info, chip, stride), [(h, *align(m.info, h.info)) for h in hrs])
        for m, hrs in pair_up(mr_sources, hr_sources)
    ]
    ratio, hr_size = common_geometry(pairs, chip)
    frames = ground_frames(mr_sources, chip * split_block)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.packing-", dir=out.parent) as scratch:
        store = Path(scratch) / "store"
        store.mkdir()
        kept, skipped, moments, blocks, holes = [], [], [], [], Counter()
        total = sum(len(corners) for _, corners, partners in pairs if partners)
        with (
            (store / "mr.npy").open("wb") as mr_file,
            (store / "hr.npy").open("wb") as hr_file,
            tqdm(total=total, desc="pack", unit="chip") as bar,
        ):
            shape = {"mr": (len(names), chip, chip), "hr": (len(names), *hr_size)}
            dtype = {"mr": mr_sources[0].info.dtype, "hr": hr_sources[0].info.dtype}
            write_header(mr_file, 0, shape["mr"], dtype["mr"])
            write_header(hr_file, 0, shape["hr"], dtype["hr"])
            for m, corners, partners in pairs:
                frame = frames[m.info.path]
                for row, images in cut_chips(m, corners, partners, chip, hr_size, min_valid, holes):
                    bar.update("row" in row)
                    if images is None:
                        skipped.append(row)
                        continue
                    kept.append(row)
                    blocks.append(ground_blocks(m.info, row["row"], row["col"], chip, frame))
                    for file, (pixels, valid) in zip((mr_file, hr_file), images, strict=True):
                        file.write(fill_holes(pixels, valid).tobytes())
                    moments.append([channel_moments(*image) for image in images])
        for path, count in holes.items():
            print(f"warning: {path}: {count} pixels of its chips are NaN or inf, taken as missing")
        if not kept:
            remedy = f"lower --min-valid {min_valid} or --chip {chip}"
            if not any(row.get("valid") for row in skipped):
                remedy = (
                    "one of each pair is all nodata; check what the files declare, and --nodata"
                )
            raise ValueError(f"no chip kept ({reasons(skipped)}); {remedy}")

        # blocks of ground go to splits, chips follow; one that touches two splits goes to neither
        ground, ids = np.unique(np.reshape(blocks, (-1, 3)), axis=0, return_inverse=True)
        ids = ids.reshape(-1, 5)
        sizes = np.bincount(ids[:, 0], minlength=len(ground))
        split = assign_splits(sizes, {"val": val, "test": test}, seed)[ids]
        alone = (split == split[:, :1]).all(1)
        skipped += [
            r | {"reason": "touches two splits"}
            for r, ok in zip(kept, alone, strict=True)
            if not ok
        ]
        keep = np.flatnonzero(alone)
        for sensor in ("mr", "hr"):
            keep_chips(store / f"{sensor}.npy", keep, len(kept), shape[sensor], dtype[sensor])
        kept = [kept[i] | {"chip": n, "hr": n, "split": split[i, 0]} for n, i in enumerate(keep)]
        splits = Counter(row["split"] for row in kept)
        if not splits["train"]:
            raise ValueError(
                f"--split-block {split_block}: no training chip left ({reasons(skipped)}); use "
                "larger blocks, or a --stride that is not smaller than --chip"
            )
        moments = np.array(moments)[keep][[row["split"] == "train" for row in kept]]
        mean, std = statistics(moments)  # (sensor, band)

        meta = {
            "format": FORMAT,
            "version": VERSION,
            "count": {"mr": len(kept), "hr": len(kept)},
            "bands": {"mr": list(names), "hr": list(names)},
            "shape": shape,
            "dtype": {sensor: str(kind) for sensor, kind in dtype.items()},
            "gsd": {"mr": mr_sources[0].info.gsd, "hr": hr_sources[0].info.gsd},
            "pixel_ratio": ratio.tolist(),
            "mean": {"mr": mean[0].tolist(), "hr": mean[1].tolist()},
            "std": {"mr": std[0].tolist(), "hr": std[1].tolist()},
            "nodata": {"mr": as_json(mr_sources[0].nodata), "hr": as_json(hr_sources[0].nodata)},
            "crs": mr_sources[0].info.crs,
            "splits": dict(splits),
            "sources": [],
            "provenance": {
                "command": command,
                "mr": str(mr),
                "hr": str(hr),
                "files": {"mr": len(mr_sources), "hr": len(hr_sources)},
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        }
        (store / "meta.json").write_text(json.dumps(meta, indent=1))
        for name, columns, rows in (("index", INDEX, kept), ("skipped", SKIPPED, skipped)):
            with (store / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
                table.writeheader()
                table.writerows(rows)
        if out.exists():
            os.replace(out, Path(scratch) / "old")
        os.replace(store, out)
    report(out, meta, skipped)
    for name, fraction in (("val", val), ("test", test)):
        if fraction and not splits[name]:
            print(
                f"{name} is empty: the chips lie in {np.count_nonzero(sizes)} blocks of ground of "
                f"{split_block} x {split_block} chips; try another --split-block"
            )
    return meta


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
    """(n, 2) int64 row, col of the top-left corner of every chip of an MR image, row-major."""
    rows, cols = (np.arange(0, side - chip + 1, stride) for side in (info.height, info.width))
    return np.stack(np.meshgrid(rows, cols, indexing="ij"), -1).reshape(-1, 2)


def place_chips(corners, chip, hr, ratio, offset):
    """Where MR chips lie in an HR image.

    Returns corner (n, 2) float and the whole-pixel window around the chip, low and high (n, 2)
    int64, in HR pixels; inside (n,) bool, whether the image holds the whole window.
    """
    corner = offset + ratio * corners
    low = np.floor(corner + SLACK).astype(np.int64)
    high = np.ceil(corner + ratio * chip - SLACK).astype(np.int64)
    return corner, low, high, ((low >= 0) & (high <= (hr.height, hr.width))).all(1)


def common_geometry(pairs, chip):
    """The pixel ratio that all pairs share and the (rows, cols) that hold any chip's HR window."""
    seen, size = None, np.zeros(2, np.int64)
    for mr, corners, partners in pairs:
        for hr, ratio, offset in partners:
            seen = seen or (ratio, mr.info)
            off = np.abs(ratio - seen[0]).max() * chip
            if off > 0.1 or not np.isclose(mr.info.gsd or 1, seen[1].gsd or 1, rtol=1e-3):
                raise ValueError(
                    f"{mr.info.path}: {ratio[0]:.6g} HR pixels to an MR pixel of "
                    f"{mr.info.gsd or 1:g}, but {seen[0][0]:.6g} to {seen[1].gsd or 1:g} in "
                    f"{seen[1].path}; pack files of one pixel size at a time"
                )
            _, low, high, inside = place_chips(corners, chip, hr.info, ratio, offset)
            size = np.maximum(size, (high - low)[inside].max(0, initial=0))
    if not size.all():
        raise ValueError(
            f"--chip {chip}: no MR chip of {chip} x {chip} pixels lies wholly on an HR file; use "
            "smaller chips"
        )
    return seen[0], tuple(size.tolist())


def cut_chips(mr, corners, partners, chip, hr_size, min_valid, nonfinite):
    """Cut the chips of one MR file, each with the first HR file that covers it and is valid enough.

    Yields (row, images): row a dict for index.csv, images ((mr pixels, valid), (hr pixels, valid));
    or a dict for skipped.csv and None. nonfinite: Counter by path, to which NaN and inf are added.
    """
    name = mr.info.path.as_posix()
    if not partners or not len(corners):
        reason = "smaller than a chip" if partners else "no HR file for it"
        yield {"mr_source": name, "reason": reason}, None
        return
    pixels = mr.info.dtype.itemsize + partners[0][0].info.dtype.itemsize * partners[0][1].prod()
    parts = mr.info.height * mr.info.width * len(mr.bands) * pixels / BLOCK_BYTES
    for rows in np.array_split(np.unique(corners[:, 0]), math.ceil(parts)):
        here = corners[np.isin(corners[:, 0], rows)]
        places = [place_chips(here, chip, hr.info, *grid) for hr, *grid in partners]
        fate = {k: {"reason": "no HR file covers it"} for k in range(len(here))}
        waiting = {}  # MR chips that have no HR yet
        covered = np.flatnonzero(np.any([inside for *_, inside in places], axis=0))
        for k, image in zip(
            covered, read_chips(mr, here[covered], (chip, chip), nonfinite), strict=True
        ):
            valid = float(image[1].mean())
            if valid >= min_valid:
                waiting[k] = image
            else:
                fate[k] = {"valid": valid, "reason": "MR not valid enough"}
        for (hr, ratio, _), (corner, low, _, inside) in zip(partners, places, strict=True):
            mine = [k for k in waiting if inside[k]]
            start = np.minimum(
                low, np.maximum(0, (hr.info.height, hr.info.width) - np.array(hr_size))
            )
            for k, image in zip(mine, read_chips(hr, start[mine], hr_size, nonfinite), strict=True):
                valid = float(min(image[1].mean(), waiting[k][1].mean()))
                fate[k] = {"hr_source": hr.info.path.as_posix(), "valid": valid}
                if valid < min_valid:
                    fate[k]["reason"] = "HR not valid enough"
                    continue
                window = [*(corner[k] - start[k]), *(ratio * chip)]
                fate[k] |= zip(WINDOW, map(float, window), strict=True)
                fate[k]["images"] = waiting.pop(k), image
        for k, (row, col) in enumerate(here.tolist()):
            images = fate[k].pop("images", None)
            yield {"mr_source": name, "row": row, "col": col, **fate[k]}, images


def read_chips(source, corners, size, nonfinite):
    """Yield (pixels (C, *size), valid (*size)) at (n, 2) whole-pixel corners, by one read."""
    if not len(corners):
        return
    info = source.info
    low = corners.min(0)
    high = np.minimum(corners.max(0) + size, (info.height, info.width))
    block = geotiff.read(info.path, (*low.tolist(), *(high - low).tolist()), source.bands)
    # an HR file that ends with its chip, among others whose chips need a pixel more of margin
    margin = np.maximum(0, corners.max(0) + size - high)
    block = np.pad(block, ((0, 0), (0, margin[0]), (0, margin[1])), mode="edge")
    valid = geotiff.valid_pixels(block, source.nodata)
    for row, col in corners - low:
        window = slice(row, row + size[0]), slice(col, col + size[1])
        pixels = block[:, *window]
        if pixels.dtype.kind == "f" and not np.isnan(source.nodata or 0):
            nonfinite[info.path] += int((~np.isfinite(pixels)).any(0).sum())
        yield pixels, valid[window]


def fill_holes(pixels, valid):
    """Give missing pixels their band's mean over the chip's valid ones: no edge, no shift."""
    if valid.all():
        return pixels
    mean = pixels[:, valid].mean(1, dtype=np.float64)
    mean = (mean if pixels.dtype.kind == "f" else mean.round()).astype(pixels.dtype)
    return np.where(valid, pixels, mean[:, None, None])


def channel_moments(pixels, valid):
    """(C, 3) float64 per band over the valid pixels: count, mean, sum of squared deviations."""
    values = pixels[:, valid].astype(np.float64)
    mean = values.mean(1)
    return np.stack([np.full(len(mean), values.shape[1]), mean, values.var(1) * values.shape[1]], 1)


def statistics(moments):
    """Pool (chips, ..., 3) moments to mean and standard deviation (...,); a flat band gets std 1.

    Sums squared deviations within chips and between them: no large squares to cancel.
    """
    count, mean, squares = np.moveaxis(moments, -1, 0)
    grand = (count * mean).sum(0) / count.sum(0)
    std = np.sqrt((squares + count * (mean - grand) ** 2).sum(0) / count.sum(0))
    return grand, np.where(std > 0, std, 1.0)


def ground_frames(sources, pixels):
    """The block grid that each MR file's ground is counted in: path -> (number, anchor, side).

    One grid per CRS, anchored at the first file's corner, so that another image of the same ground
    (another date) falls into the same blocks; blocks have `pixels` MR pixels a side. Without
    georeference a file is one block. anchor, side: (y, x) in CRS units.
    """
    grids, frames = [], {}
    for number, info in enumerate(s.info for s in sources):
        if info.transform is None:
            frames[info.path] = number, np.zeros(2), np.full(2, np.inf)
            continue
        frame = next((g for crs, g in grids if geotiff.same_crs(crs, info.crs)), None)
        if frame is None:
            a, b, c, d, e, f = info.transform
            side = pixels * np.array([math.hypot(b, e), math.hypot(a, d)])
            frame = len(grids), np.array([f, c]), side
            grids.append((info.crs, frame))
        frames[info.path] = frame
    return frames


def ground_blocks(info, row, col, chip, frame):
    """The blocks of a chip's centre and of its four corners: (5, 3) int64 grid number, y, x."""
    number, anchor, side = frame
    a, b, c, d, e, f = info.transform or (1, 0, 0, 0, 1, 0)
    rows, cols = row + chip * np.array([0, 0, 1, 1]), col + chip * np.array([0, 1, 0, 1])
    ground = np.stack([d * cols + e * rows + f, a * cols + b * rows + c], 1)
    slack = SLACK * np.abs(ground[3] - ground[0]) / chip
    low, high = ground.min(0) + slack, ground.max(0) - slack
    (bottom, left), (top, right) = low, high
    points = [(low + high) / 2, low, high, (bottom, right), (top, left)]
    return np.column_stack([np.full(5, number), np.floor((points - anchor) / side)]).astype(
        np.int64
    )


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


def write_header(file, count, shape, dtype):
    """Write a .npy header; numpy pads it, so that one for another count is as long."""
    np.lib.format.write_array_header_1_0(
        file,
        {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (count, *shape),
        },
    )


def keep_chips(path, keep, count, shape, dtype):
    """Move the kept of `count` appended chips to the front of a .npy and end it there."""
    with path.open("r+b") as file:
        write_header(file, len(keep), shape, dtype)
        start = file.tell()
        chips = np.memmap(path, dtype, "r+", start, (count, *shape))
        for new, old in enumerate(keep):
            if new != old:
                chips[new] = chips[old]
        size = start + len(keep) * chips[0].nbytes
        chips.flush()
        del chips  # Windows does not cut a file that is mapped
        file.truncate(size)


def as_json(number):
    return None if number is None or math.isnan(number) else number  # NaN is missing anyway


def is_store(path):
    meta = path / "meta.json"
    return meta.is_file() and f'"format": "{FORMAT}"'.encode() in meta.read_bytes()


def reasons(skipped):
    counts = Counter(row["reason"] for row in skipped)
    return ", ".join(f"{n} {reason}" for reason, n in counts.most_common()) or "none"


def report(out, meta, skipped):
    splits = ", ".join(f"{meta['splits'].get(name, 0)} {name}" for name in SPLITS)
    print(
        f"{out}: {meta['count']['hr']} pairs kept ({splits}); skipped: {reasons(skipped)} "
        "(skipped.csv)"
    )
    for sensor in ("mr", "hr"):
        bands, rows, cols = meta["shape"][sensor]
        gsd = meta["gsd"][sensor]
        print(
            f"  {sensor}: {meta['provenance']['files'][sensor]} files, chips {bands} x {rows} x "
            f"{cols} {meta['dtype'][sensor]}, " + (f"gsd {gsd:g}" if gsd else "no georeference")
        )
        for band, mean, std in zip(
            meta["bands"][sensor], meta["mean"][sensor], meta["std"][sensor], strict=True
        ):
            print(f"    {band:8} mean {mean:10.4f}  std {std:10.4f}")
