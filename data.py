"""Paired HR and MR imagery: pack GeoTIFFs into a store, read it, crop both to the same ground.

    python data.py pack --mr sentinel2/ --hr venus/ OUT --band-names B,G,R,NIR

A store is a folder: mr.npy (N, C, h, w) and hr.npy (N, C, H, W) in the files' own dtype, memory-
mapped; index.csv, one row a chip; meta.json, what the chips are and the statistics that normalise
them. Nothing is resampled on the way in: chips are cut on the MR pixel grid, and the HR chip is
the whole-pixel window around the same ground together with the fractional place of the MR chip's
corner in it (hr_row, hr_col), so any pixel ratio and any offset of the two grids stay exact.
Crops are made from that on the training device.
"""

import argparse
import csv
import difflib
import functools
import glob
import json
import math
import os
import shlex
import sys
import tempfile
import tokenize
from collections import Counter, namedtuple
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import geotiff

FORMAT = "crossscale store"
VERSION = 1
INDEX = "chip mr_source hr_source row col hr_row hr_col split valid".split()
SKIPPED = "mr_source row col hr_source valid reason".split()
FILES = {"mr.npy", "hr.npy", "index.csv", "meta.json", "skipped.csv"}
SPLITS = "train val test".split()
BLOCK_BYTES = 2**28  # decoded at a time when packing
SLACK = 1e-3  # pixels; real georeferences are rounded


class Store:
    """A packed store, opened read-only. `meta` is meta.json; `len` counts chips.

    Raises FileNotFoundError if the folder holds no store, ValueError if it is of another version,
    not complete or damaged.
    """

    def __init__(self, path):
        path = Path(path)
        if not (path / "meta.json").is_file():
            raise FileNotFoundError(
                f"{path}: not a store, it has no meta.json; make one with data.py pack"
            )
        with usable(path / "meta.json") as file:
            self.meta = meta = json.loads(file.read_text("utf-8"))
            if (meta["format"], meta["version"]) != (FORMAT, VERSION):
                raise ValueError(f"version {VERSION} expected, {meta['version']} found")
            mean, std, gsd, shape = (
                [meta[key][sensor] for sensor in ("mr", "hr")]
                for key in ("mean", "std", "gsd", "shape")
            )
            bands = {*map(len, (meta["bands"], *mean, *std)), *(bands for bands, _, _ in shape)}
            if len(bands) > 1 or len(meta["pixel_ratio"]) != 2:
                raise ValueError("lists that do not fit its bands")
            positive = [*np.ravel(std), *meta["pixel_ratio"], *(side or 1 for side in gsd)]
            if not np.isfinite([*np.ravel(mean), *positive]).all() or min(positive) <= 0:
                raise ValueError("numbers that are not finite or not above 0")
        self.mr, self.hr = self._open(path / "mr.npy"), self._open(path / "hr.npy")
        with usable(path / "index.csv") as file:
            with file.open(newline="", encoding="utf-8") as lines:
                rows = list(csv.DictReader(lines))
            if len(rows) != len(self):
                raise ValueError(f"{len(self)} rows expected, one a chip, {len(rows)} found")
            columns = [[row[key] for row in rows] for key in ("hr_row", "hr_col", "valid", "split")]
            numbers, self._split = np.array(columns[:3], np.float64), np.array(columns[3])
            if not np.isfinite(numbers).all() or not set(columns[3]) <= set(SPLITS):
                raise ValueError("a row that is not whole")
            self._origin = numbers[:2].T.copy()

    def _open(self, path):
        with usable(path) as file:
            shape = (self.meta["count"], *self.meta["shape"][path.stem])
            dtype = self.meta["dtype"][path.stem]
            array = np.lib.format.open_memmap(file, mode="r")
            if (array.shape, str(array.dtype)) != (shape, dtype):
                raise ValueError(f"{shape} {dtype} expected, {array.shape} {array.dtype} found")
        return array

    def __len__(self):
        return len(self.mr)

    def split(self, name):
        """Chip numbers of a split ("train", "val", "test"), ascending int64; maybe none."""
        return np.flatnonzero(self._split == name)

    def batch(self, indices, sensors=("mr", "hr")):
        """Read chips. indices: (B,) chip numbers in any order, repeats allowed. sensors: whose
        pixels are wanted; the others are not read.

        Returns mr (B, C, h, w) and hr (B, C, H, W) as stored, has_hr (B,) bool, and hr_origin
        (B, 2) float64: row, col of the MR chip's top-left corner in pixels of the HR chip.
        """
        indices = np.asarray(indices)
        order, back = np.unique(indices, return_inverse=True)  # ascending reads, each chip once
        return {
            **{s: torch.from_numpy(getattr(self, s)[order][back]) for s in sensors},
            "has_hr": torch.ones(len(back), dtype=torch.bool),
            "hr_origin": torch.from_numpy(self._origin[indices]),
        }


@contextmanager
def usable(file):
    """Yield a file of a store; whatever its reading or checking trips over becomes one sentence."""
    try:
        yield file
    except (OSError, ValueError, TypeError, KeyError, csv.Error, tokenize.TokenError) as error:
        raise ValueError(
            f"{file}: cannot be used ({type(error).__name__}: {error}); pack the store again"
        ) from error


def sample_order(seed, step, global_batch, count):
    """Which samples step `step` sees: a pure function, so there is no sampler state to save.

    Walks one seeded permutation of 0..count-1 per epoch and goes on into the next where an epoch
    ends within a batch. Returns (global_batch,) int64 positions.
    """
    place = np.arange(step * global_batch, (step + 1) * global_batch)
    order = np.empty(global_batch, np.int64)
    for epoch in range(place[0] // count, place[-1] // count + 1):
        here = place // count == epoch
        order[here] = _permutation(seed, epoch, count)[place[here] % count]
    return order


@functools.lru_cache(maxsize=2)  # the epoch at hand and, at its end, the next
def _permutation(seed, epoch, count):
    return np.random.default_rng((seed, epoch, 0)).permutation(count)


def draw_crops(seed, step, global_batch, scale=(0.3, 1.0), aspect=(3 / 4, 4 / 3)):
    """Draw one crop window per image; image i's depends on (seed, step, i) alone.

    scale: range of the area as a fraction of the chip, uniform. aspect: range of width / height,
    log-uniform. A draw that is longer than the chip is drawn again, up to 10 times, then the whole
    chip is taken (torchvision's rule, and the paper's). Returns (global_batch, 4) float64: top,
    left, height, width as fractions of the chip.
    """
    # one row of numbers per image: a larger batch adds rows and changes none
    draws = np.random.default_rng((seed, step, 1)).random((global_batch, 22))
    area = scale[0] + draws[:, 0:10] * (scale[1] - scale[0])
    ratio = np.exp(np.log(aspect[0]) + draws[:, 10:20] * np.log(aspect[1] / aspect[0]))
    height, width = np.sqrt(area / ratio), np.sqrt(area * ratio)
    fits = (height <= 1) & (width <= 1)
    first = fits.argmax(1)
    image = np.arange(global_batch)
    height = np.where(fits.any(1), height[image, first], 1.0)
    width = np.where(fits.any(1), width[image, first], 1.0)
    return np.stack([draws[:, 20] * (1 - height), draws[:, 21] * (1 - width), height, width], 1)


def resample(images, windows, size):
    """Resample a window of each image to one size: antialiased cubic, as PIL and PyTorch.

    images: (B, C, H, W), any dtype. windows: (B, 4) float: top, left, height, width in pixels,
    corners at whole numbers, each window within its image. size: (rows, cols). Returns
    (B, C, rows, cols) float32 on the device of images.

    Separable Keys kernel (a = -0.5), widened by the scale where it shrinks: two batched matrix
    products with one weight matrix per image and axis. Equals F.interpolate(mode="bicubic",
    antialias=True) on a full window. On a part of an image the taps use the real pixels beyond the
    window; at the image's edge they are cut and the weights renormalised.
    """
    windows = torch.as_tensor(windows)
    rows = _cubic_weights(windows[:, 0], windows[:, 2], size[0], images.shape[2], images.device)
    cols = _cubic_weights(windows[:, 1], windows[:, 3], size[1], images.shape[3], images.device)
    with torch.autocast(images.device.type, enabled=False):  # 16 bits would round the reflectances
        out = torch.einsum("bchw,btw->bcht", images.float(), cols)
        return torch.einsum("bsh,bcht->bcst", rows, out)


def _cubic_weights(start, length, size, pixels, device):
    """(B, size, pixels) float32 weights of the pixels of one axis; start, length: (B,) pixels."""
    step = length / size
    centre = start[:, None] + (torch.arange(size, device=step.device) + 0.5) * step[:, None]
    # pixel - floor(centre) is a small whole number, so float32 loses nothing of a distance far
    # from the origin, and devices without float64 can do the rest
    base = centre.floor()
    base, rest = (x.to(device, torch.float32)[..., None] for x in (base, centre - base))
    reach = step.to(device, torch.float32).clamp(min=1)[:, None, None]
    x = ((torch.arange(pixels, device=device) + 0.5 - base - rest) / reach).abs()
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    return weights / weights.sum(-1, keepdim=True)


def crop_pairs(batch, crops, meta, mr_size, hr_size=None, mr_from="mr", hr_from="hr"):
    """Crop MR and HR to the same continuous ground window, resample and normalise them.

    batch: of Store.batch, images on any device. crops: (B, 4) of draw_crops. meta: Store.meta.
    mr_size, hr_size: side of the output in pixels. mr_from, hr_from: the sensor whose pixels, mean
    and std serve as each input ("hr" as MR is the variant `hr`, "mr" as HR is `sa-interp`).
    Returns mr (B, C, mr_size, mr_size) float32, and hr (B, C, hr_size, hr_size) or None without
    hr_size, on the device of the batch.
    """
    origin = batch["hr_origin"]
    crops = torch.as_tensor(crops, dtype=torch.float64, device=origin.device)
    chip = torch.tensor(meta["shape"]["mr"][1:], dtype=torch.float64, device=origin.device)
    ratio = torch.tensor(meta["pixel_ratio"], dtype=torch.float64, device=origin.device)
    corner, side = crops[:, :2] * chip, crops[:, 2:] * chip  # MR pixels
    windows = {
        "mr": torch.cat([corner, side], 1),
        "hr": torch.cat([origin + corner * ratio, side * ratio], 1),
    }

    def view(sensor, size):
        images = resample(batch[sensor], windows[sensor], (size, size))
        mean, std = (
            torch.tensor(meta[name][sensor], device=images.device).view(-1, 1, 1)
            for name in ("mean", "std")
        )
        return (images - mean) / std

    return view(mr_from, mr_size), hr_size and view(hr_from, hr_size)


# Packing: files -> pairs -> chips -> splits -> store

Source = namedtuple("Source", "info bands nodata")  # a file, and what is wanted of it


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
        kept = [kept[i] | {"chip": n, "split": split[i, 0]} for n, i in enumerate(keep)]
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
            "count": len(kept),
            "bands": list(names),
            "shape": shape,
            "dtype": {sensor: str(kind) for sensor, kind in dtype.items()},
            "gsd": {"mr": mr_sources[0].info.gsd, "hr": hr_sources[0].info.gsd},
            "pixel_ratio": ratio.tolist(),
            "mean": {"mr": mean[0].tolist(), "hr": mean[1].tolist()},
            "std": {"mr": std[0].tolist(), "hr": std[1].tolist()},
            "nodata": {"mr": as_json(mr_sources[0].nodata), "hr": as_json(hr_sources[0].nodata)},
            "crs": mr_sources[0].info.crs,
            "splits": dict(splits),
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
        sources.append(Source(info, bands, nodata if info.nodata is None else info.nodata))
    return sources, names


def check_band_order(flags, given):
    """Raise ValueError where a file has the bands of another, by their names, in another order.

    flags: the flag that chooses the bands -> sources. given: the names of --band-names, or None.
    A file that does not name all of its chosen bands says nothing of their order.
    """
    named = [(None, "--band-names", given)] if given else []
    for flag, sources in flags.items():
        for info, bands, _ in sources:
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
        for (hr, *_), (corner, low, _, inside) in zip(partners, places, strict=True):
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
                fate[k]["hr_row"], fate[k]["hr_col"] = (corner[k] - start[k]).tolist()
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
        f"{out}: {meta['count']} pairs kept ({splits}); skipped: {reasons(skipped)} (skipped.csv)"
    )
    for sensor in ("mr", "hr"):
        bands, rows, cols = meta["shape"][sensor]
        gsd = meta["gsd"][sensor]
        print(
            f"  {sensor}: {meta['provenance']['files'][sensor]} files, chips {bands} x {rows} x "
            f"{cols} {meta['dtype'][sensor]}, " + (f"gsd {gsd:g}" if gsd else "no georeference")
        )
        for band, mean, std in zip(
            meta["bands"], meta["mean"][sensor], meta["std"][sensor], strict=True
        ):
            print(f"    {band:8} mean {mean:10.4f}  std {std:10.4f}")


def main():
    def names(text):
        return [name.strip() for name in text.split(",")]

    parser = argparse.ArgumentParser(
        prog="data.py", description="Paired HR and MR imagery for pretraining.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser(
        "pack",
        help="cut paired GeoTIFFs into a store",
        description=pack.__doc__.split("\n")[0],
        allow_abbrev=False,
    )
    p.add_argument("out", metavar="OUT", help="folder of the store, to be made")
    g = p.add_argument_group("input")
    g.add_argument("--mr", required=True, help="MR GeoTIFFs: folder, file or quoted glob")
    g.add_argument("--hr", required=True, help="HR GeoTIFFs: folder, file or quoted glob")
    choose = "bands of %s files in the order wanted, names or indices from 0 (default: all)"
    g.add_argument("--mr-bands", type=names, metavar="B,..", help=choose % "MR")
    g.add_argument("--hr-bands", type=names, metavar="B,..", help=choose % "HR")
    g.add_argument(
        "--band-names",
        type=names,
        metavar="B,G,R,NIR",
        help="what the chosen bands are called (default: as in the first MR file)",
    )
    g.add_argument(
        "--nodata",
        type=float,
        help="value of missing pixels in files that declare none (default: none)",
    )
    g = p.add_argument_group("chips")
    g.add_argument("--chip", type=int, default=64, help="side in MR pixels (default: 64)")
    g.add_argument("--stride", type=int, help="step in MR pixels (default: the chip)")
    g.add_argument(
        "--min-valid",
        type=float,
        default=1.0,
        help="least fraction of valid pixels in each chip, above 0 (default: 1.0)",
    )
    g = p.add_argument_group("splits")
    g.add_argument(
        "--split-block",
        type=int,
        default=8,
        help="side in chips of the blocks of ground that are split (default: 8)",
    )
    g.add_argument("--val", type=float, default=0.1, help="fraction of chips (default: 0.1)")
    g.add_argument("--test", type=float, default=0.0, help="fraction of chips (default: 0)")
    g.add_argument("--seed", type=int, default=0, help="of the deal of blocks (default: 0)")
    p.add_argument(
        "--overwrite",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="replace a store that is there (default: no)",
    )
    args = parser.parse_args()
    try:
        pack(**vars(args), command=shlex.join(["data.py", *sys.argv[1:]]))
    except KeyboardInterrupt:
        print("data.py: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
