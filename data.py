"""Paired HR and MR imagery: a store, the order it is read in, crops of the same ground in both.

    python data.py pack --mr sentinel2/ --hr venus/ OUT --band-names B,G,R,NIR
    python data.py check OUT
    python data.py verify OUT       every byte against its digest

A store is a folder of shards, files of about 256 MB whose rows are chips: `mr` (n, C, h, w), `hr`
(m, C', H, W) of those that have a pair, in the files' own dtype, and `hr_window` (n, 4). index.csv
says of each chip where it lies and where it is from, meta.json what the chips are, the statistics
that normalise them, and the digests of all else. The HR chip is whole pixels of its file; where the
MR chip's ground lies in it is a window (row, col, height, width) of fractional pixels, so any ratio
and any offset of the two grids is exact. Crops are made from that on the training device.
"""

import argparse
import csv
import functools
import hashlib
import json
import math
import os
import shlex
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

FORMAT = "crossscale store"
VERSION = 3
WINDOW = "hr_row hr_col hr_height hr_width".split()
INDEX = (  # shard: of meta["shards"]; place, hr: rows there; crs, a to f: as raster.Info says them
    "chip shard place hr mr_source hr_source row col hr_row hr_col hr_height hr_width mr_date "
    "hr_date crs a b c d e f split valid"
).split()
SPLITS = "train val test".split()


class Store:
    """A packed store, opened read-only. `meta` is meta.json; `len` counts chips.

    hr_share: fraction of the training split's pairs that keep their HR, the others become chips
    without; drawn by seed, and a smaller share is a part of a larger one. `has_hr` (N,) bool says
    which chips have HR; `flagged` (N,) bool which `data.py check` marked; `sensors` which have
    pixels, "mr" first.

    Raises FileNotFoundError if the folder holds no store, ValueError if it is of another version,
    not complete or damaged: sizes and headers of shards, the index and meta.json are compared with
    their digests, pixels by `verify`.
    """

    def __init__(self, path, hr_share=1.0, seed=0):
        path = Path(path)
        self.meta = meta = read_meta(path)
        self.sensors = [sensor for sensor in ("mr", "hr") if meta["shape"][sensor]]
        self._shards = [open_shard(path, about)[1] for about in meta["shards"]]
        self._split = np.empty(len(self), "U5")
        self._place = np.empty((len(self), 3), np.int64)  # shard, row of its mr and of its hr or -1
        for chip, row in enumerate(read_index(path, meta)):
            self._split[chip] = row["split"]
            self._place[chip] = row["shard"], row["place"], row["hr"] or -1
        self._window = np.empty((len(self), 4))
        for shard, tensors in enumerate(self._shards):
            here = self._place[:, 0] == shard
            self._window[here] = tensors["hr_window"][self._place[here, 1]]
        self.has_hr = self._place[:, 2] >= 0
        self.flagged = np.zeros(len(self), bool)
        if (path / "flags.csv").is_file():
            with usable(path / "flags.csv") as file:
                flagged = np.array([int(row["chip"]) for row in read_csv(file)], np.int64)
                if (flagged < 0).any():
                    raise ValueError("a chip below 0")
                self.flagged[flagged] = True
        pairs = np.flatnonzero(self.has_hr & (self._split == "train"))
        drop = np.random.default_rng((seed, 3)).permutation(pairs)[round(hr_share * len(pairs)) :]
        self.has_hr[drop] = False

    def __len__(self):
        return self.meta["count"]["mr"]

    def split(self, name):
        """Chip numbers of a split ("train", "val", "test"), ascending int64; maybe none."""
        return np.flatnonzero(self._split == name)

    def batch(self, indices, sensors=("mr", "hr")):
        """Read chips. indices: (B,) chip numbers in any order, repeats allowed. sensors: whose
        pixels are wanted; the others are not read.

        Returns mr (B, C, h, w) and hr (B, C', H, W) as stored, zeros where a chip has no HR and no
        key where the store has none; has_hr (B,) bool; hr_window (B, 4) float64: top, left, height,
        width of the MR chip's ground in pixels of the HR chip, zeros where it has none.
        """
        indices = np.asarray(indices)
        has_hr = self.has_hr[indices]
        shard, mr, hr = self._place[indices].T
        batch = {
            "has_hr": torch.from_numpy(has_hr),
            "hr_window": torch.from_numpy(self._window[indices]),
        }
        for sensor, rows in (("mr", mr), ("hr", np.where(has_hr, hr, -1))):
            if sensor in sensors and sensor in self.sensors:
                shape, dtype = self.meta["shape"][sensor], self.meta["dtype"][sensor]
                out = np.zeros((len(indices), *shape), dtype)
                # row by row, in the order of the disk; a fancy index would copy the batch twice
                for k in np.lexsort((rows, shard)).tolist():
                    if rows[k] >= 0:
                        out[k] = self._shards[shard[k]][sensor][rows[k]]
                batch[sensor] = torch.from_numpy(out)
        return batch


def read_meta(path):
    """meta.json of a store, a dict. Raises FileNotFoundError or ValueError where it is none."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder; make a store with data.py pack")
    if not (path / "meta.json").is_file():
        raise FileNotFoundError(
            f"{path}: not a store, it has no meta.json; make one with data.py pack"
        )
    with usable(path / "meta.json") as file:
        meta = json.loads(file.read_text("utf-8"))
        if (meta["format"], meta["version"]) != (FORMAT, VERSION):
            again = meta.get("provenance", {}).get("command") or "data.py pack"
            raise ValueError(
                f"version {VERSION} expected, {meta['version']} found, so repeat: python {again} "
                "--overwrite"
            )
        if meta["digest"] != meta_digest(meta):
            raise ValueError("its digest is another, it was changed after packing")
    return meta


def meta_digest(meta):
    """SHA-256 of what meta.json says beside its digest, 64 hex digits."""
    rest = {key: value for key, value in meta.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def open_shard(folder, about):
    """A shard as (facts, tensors): what its header says of its chips, a dict, and read-only arrays
    by name, mapped from the file, so that only what is taken of them is read.

    about: what meta.json says of it: file, bytes, digest (of the header); or a dict of the file
    alone. Raises ValueError unless size and header are what they were when it was written.
    """
    with usable(folder / about["file"]) as path:
        size = path.stat().st_size
        if size != about.get("bytes", size):
            raise ValueError(f"{about['bytes']} bytes expected, {size} found")
        digest = header_digest(path)
        if digest != about.get("digest", digest):
            raise ValueError("its header has another digest")
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["crossscale"])
            tensors = {name: file.get_tensor(name).numpy() for name in file.keys()}
    for array in tensors.values():
        array.flags.writeable = False
    return facts, tensors


def header_digest(path):
    """SHA-256 of the header of a safetensors file, 64 hex digits."""
    with open(path, "rb") as file:
        size = file.read(8)
        # no longer than the format allows, whatever it claims
        header = file.read(min(int.from_bytes(size, "little"), 100_000_000))
    return hashlib.sha256(size + header).hexdigest()


def row_digests(tensors):
    """What the header of a shard keeps of each chip, to tell later whether it is whole: a list of
    n int, CRC-32 over all of its rows. tensors: arrays by name, of n rows, or of one for each chip
    that has a window where their name begins with "hr" (but for the windows themselves)."""
    digests, hr = [], 0
    for k, window in enumerate(tensors["hr_window"]):
        digest, paired = 0, window[2] > 0
        for name in sorted(tensors):
            of_hr = name.startswith("hr") and name != "hr_window"
            if paired or not of_hr:
                digest = zlib.crc32(np.ascontiguousarray(tensors[name][hr if of_hr else k]), digest)
        digests.append(digest)
        hr += int(paired)
    return digests


def verify(path, part=0, of=1):
    """Compare every byte of a store, or of every of-th of its shards, with its digest. Yields a
    line for each chip that is damaged, with its sources. Raises ValueError as `Store` does."""
    path = Path(path)
    meta = read_meta(path)
    next(read_index(path, meta), None)  # compares the index with its digest
    for number, about in list(enumerate(meta["shards"]))[part::of]:
        try:
            facts, tensors = open_shard(path, about)
            found = row_digests(tensors)
            bad = [k for k, digest in enumerate(facts["digests"]) if digest != found[k]]
        except ValueError as error:
            yield str(error)
            bad = None  # all that are in the index
        if bad == []:
            continue
        # rows of an index of millions are kept only where something is damaged
        index = (row for row in read_index(path, meta) if int(row["shard"]) == number)
        rows = {int(row["place"]): row for row in index}
        for k in rows if bad is None else bad:
            row = rows.get(k)  # a chip that no split has is in no index
            text = f"chip {row['chip']} ({source_text(row)})" if row else f"row {k}, unused"
            yield f"{path / about['file']}: {text}"


def verify_beside(paths):
    """Start a thread that `verify`s stores while a run trains on them. Returns a function to call
    now and then: it raises ValueError, the damaged chips by name, once there are any.

    The ranks of a machine share its disk, and the work: each takes its part of the shards.
    """
    part, of = (int(os.environ.get(k, d)) for k, d in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    found = []

    def work():
        for path in paths:
            try:
                lines = list(verify(path, part, of))
            except (ValueError, OSError) as error:
                lines = [str(error)]
            if lines:
                more = f", and {len(lines) - 3} more" if len(lines) > 3 else ""
                found.append(
                    f"{'; '.join(lines[:3])}{more}: damaged since it was packed, and may have been "
                    "trained on; pack it again, and start again with --fresh"
                )

    def look():
        if found:
            raise ValueError(found[0])

    threading.Thread(target=work, daemon=True).start()  # the end of a run does not wait for it
    return look


def source_text(row):
    """Where a chip was cut, for a reader. row: of index.csv."""
    source = row["mr_source"] + (f" and {row['hr_source']}" if row["hr_source"] else "")
    return f"{source} at row {row['row']}, column {row['col']}"


class Chips(NamedTuple):
    """What a run trains on."""

    stores: list
    ids: np.ndarray  # (n, 2) int64, number of the store and of its chip
    has_hr: np.ndarray  # (n,) bool
    digest: str  # 12 hex digits that change with them
    bands: dict  # {"mr": names, "hr": names, or None without HR}


def open_chips(paths, student="mr", pairs=0, hr_share=1.0, seed=0, skip_flagged=False):
    """The training chips of several stores: `Chips`.

    student: the sensor that the student sees; of "hr", chips with HR alone. pairs: how many chips
    must have HR, for a teacher that sees it. hr_share, seed: of `Store`. skip_flagged: leave out
    what data.py check flagged. Raises ValueError where the stores do not go together or too few
    chips are left.
    """
    stores = [Store(path, hr_share, seed) for path in paths]
    ids, has_hr, digest, bands, where = [], [], hashlib.sha256(), {"mr": None, "hr": None}, {}
    for number, (path, store) in enumerate(zip(paths, stores, strict=True)):
        for sensor in store.sensors:
            own, first = store.meta["bands"][sensor], where.setdefault(sensor, path)
            bands[sensor] = bands[sensor] or own
            if own != bands[sensor] and (sensor == student or (sensor == "hr" and pairs)):
                raise ValueError(
                    f"{path}: its {sensor} bands are {','.join(own)}, those of {first} "
                    f"{','.join(bands[sensor])}; pack both with the same band names"
                )
        chips = store.split("train")
        if skip_flagged:
            chips = chips[~store.flagged[chips]]
        if student == "hr":
            chips = chips[store.has_hr[chips]]
        if len(chips) == 0:
            raise ValueError(
                f"{path}: no chip in its train split"
                + (", or all are flagged" if skip_flagged else "")
                + (" has HR" if student == "hr" else "")
                + "; pack it again"
            )
        ids.append(np.column_stack([np.full_like(chips, number), chips]))
        has_hr.append(store.has_hr[chips])
        facts = {k: store.meta[k] for k in ("bands", "shape", "dtype", "mean", "std")}
        for part in (json.dumps(facts).encode(), chips.tobytes(), has_hr[-1].tobytes()):
            digest.update(part)
    ids, has_hr = np.concatenate(ids), np.concatenate(has_hr)
    if has_hr.sum() < pairs:
        more = f"raise --hr-share {hr_share:g}, " if hr_share < 1 else ""
        raise ValueError(
            f"{', '.join(map(str, paths))}: {has_hr.sum() or 'no'} training chip has HR, {pairs} "
            f"must; pack some with it, {more}or take --variant mr"
        )
    return Chips(stores, ids, has_hr, digest.hexdigest()[:12], bands)


def read_index(path, meta):
    """The rows of a store's index.csv, dicts of text, one a chip in their order."""
    with usable(path / "index.csv") as file:
        with file.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != meta["index"]:
                raise ValueError("its digest is another, it was changed after packing")
        yield from read_csv(file)


def read_csv(path):
    """The rows of a table, one after the other: an index may have millions."""
    with path.open(newline="", encoding="utf-8") as lines:
        yield from csv.DictReader(lines)


@contextmanager
def usable(file):
    """Yield a file of a store; whatever its reading or checking trips over becomes one sentence."""
    try:
        yield file
    except (
        *(OSError, ValueError, TypeError, LookupError, OverflowError, AttributeError),
        *(csv.Error, RuntimeError, SafetensorError),
    ) as error:
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
    rows, cols = (
        moved(_taps(windows[:, k], windows[:, 2 + k], size[k]), lambda x: x.to(images.device))
        for k in (0, 1)
    )
    return _resample(images, rows, cols)


def _taps(start, length, size):
    """Where the output pixels of one axis lie among the input's: (base, rest, reach, band).

    start, length: (B,) pixels. base + rest: (B, size) float32 centres; base is whole and rest in
    0..1, so that float32 loses nothing far from the origin, and devices without float64 can go on
    from here. reach: (B,) float32, how much wider the kernel is than in an enlargement. band: int,
    no pixel further than that from `base` has a weight.
    """
    step = length / size
    centre = start[:, None] + (torch.arange(size, device=step.device) + 0.5) * step[:, None]
    base = centre.floor()
    reach = step.clamp(min=1).float()
    band = math.ceil(2 * reach.max()) + 1 if len(reach) else 0
    return base.float(), (centre - base).float(), reach, band


def _cubic_weights(taps, pixels, part):
    """(B, size, pixels) float32 weights of the pixels of one axis, of a part of the images. They
    are worked out within the band, which is all that is not 0."""
    base, rest, reach = (tap[part] for tap in taps[:3])
    offset = torch.arange(-taps[3], taps[3] + 1, device=base.device)
    x = ((offset + 0.5 - rest[..., None]) / reach[:, None, None]).abs()
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    pixel = base[..., None].long() + offset
    inside = (pixel >= 0) & (pixel < pixels)
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0)) * inside
    weights = weights / weights.sum(-1, keepdim=True)
    dense = weights.new_zeros(*base.shape, pixels)
    return dense.scatter_add_(-1, pixel.clamp(0, pixels - 1), weights)


def _resample(images, rows, cols):
    # on a CPU so many at a time stay in its cache
    group = 8 if images.device.type == "cpu" else max(len(images), 1)
    out = []
    with torch.autocast(images.device.type, enabled=False):  # 16 bits would round the reflectances
        for first in range(0, max(len(images), 1), group):
            part = slice(first, first + group)
            row_weights = _cubic_weights(rows, images.shape[2], part)
            col_weights = _cubic_weights(cols, images.shape[3], part)
            wide = torch.einsum("bchw,btw->bcht", images[part].float(), col_weights)
            out.append(torch.einsum("bsh,bcht->bcst", row_weights, wide))
    return torch.cat(out)


# ---- from chips to crops: what a step needs is read and worked out on the CPU, as tensors that
# travel to the device in one go; `render` makes images of it there


def read_crops(stores, chips, sensor, crops, size, statistics=None):
    """Read the pixels of some chips, and where in them the crops lie.

    chips: (n, 2) int, number of the store and of its chip. sensor: "mr", or "hr" (of chips that
    have HR). crops: (n, 4) of `draw_crops`: equal crops of a chip's two sensors are the same
    continuous ground. size: pixels a side of the images to come. statistics: (mean, std), a value
    a band, in place of the stores' own. Returns what `render` takes: a list with a dict of CPU
    tensors for each store, empty without chips.
    """
    parts, places = [], []
    for number in np.unique(chips[:, 0]):
        place = np.flatnonzero(chips[:, 0] == number)
        store = stores[number]
        batch = store.batch(chips[place, 1], {sensor})
        window, crop = batch["hr_window"], torch.from_numpy(crops[place])
        if sensor == "mr":
            height, width = batch["mr"].shape[-2:]
            window = torch.tensor([[0, 0, height, width]], dtype=torch.float64)
        start, side = window[:, :2] + crop[:, :2] * window[:, 2:], crop[:, 2:] * window[:, 2:]
        mean, std = statistics or (store.meta[key][sensor] for key in ("mean", "std"))
        parts.append({
            "images": batch[sensor],
            "rows": _taps(start[:, 0], side[:, 0], size),
            "cols": _taps(start[:, 1], side[:, 1], size),
            "mean": torch.tensor(mean)[:, None, None],
            "std": torch.tensor(std)[:, None, None],
        })  # fmt: skip
        places.append(place)
    if len(parts) > 1:  # the images of each store come one after the other
        parts[0]["order"] = torch.from_numpy(np.concatenate(places).argsort())
    return parts


def render(parts):
    """The images of `read_crops`, normalised, in the order of its chips: (n, C, size, size)
    float32 on the device of the parts. No copy from the CPU, no answer from the device."""
    images = [
        (_resample(part["images"], part["rows"], part["cols"]) - part["mean"]) / part["std"]
        for part in parts
    ]
    return torch.cat(images)[parts[0]["order"]] if len(images) > 1 else images[0]


def choose_bands(images, own, wanted):
    """Images (B, C, H, W) of bands `own` as images of bands `wanted`, two lists of names; a band
    that they lack holds 0, its mean."""
    if own == wanted:
        return images
    zero = torch.zeros_like(images[:, :1])
    picked = [images[:, own.index(b), None] if b in own else zero for b in wanted]
    return torch.cat(picked, dim=1)


def next_pairs(seed, step, global_batch, has_hr):
    """For each sample of a step the next pair in the global order that is another chip: the HR that
    the control `sa-shuffled` shows. has_hr: (N,) bool, two at least. Returns (global_batch,)."""
    order = following = sample_order(seed, step, global_batch, len(has_hr))
    while True:
        step += 1  # the last samples of a step look into the next one
        following = np.concatenate([following, sample_order(seed, step, global_batch, len(has_hr))])
        pairs = np.flatnonzero(has_hr[following])
        found = np.searchsorted(pairs, np.arange(global_batch), side="right")
        while found.max() < len(pairs):
            same = following[pairs[found]] == order
            if not same.any():
                return following[pairs[found]]
            found += same


def stream(prepare, start, stop, device):
    """Yield prepare(step), a tree of CPU tensors, moved to a device, for steps start..stop-1.

    The next step's is read by a thread, pinned and copied on a CUDA stream of its own while this
    one computes, so the loop waits neither for the disk nor for a copy.
    """
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def get(step):
        tree = prepare(step)
        if copies is None:
            return moved(tree, lambda x: x.to(device)), None
        with torch.cuda.stream(copies):
            tree = moved(tree, lambda x: x.pin_memory().to(device, non_blocking=True))
            return tree, copies.record_event()

    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(get, start) if start < stop else None
        for step in range(start, stop):
            tree, copied = coming.result()
            coming = ahead.submit(get, step + 1) if step + 1 < stop else None
            if copied is not None:
                here = torch.cuda.current_stream(device)
                here.wait_event(copied)
                moved(tree, lambda x: x.record_stream(here))  # noqa: B023, called at once
            yield tree


def moved(tree, move):
    """A tree of dicts, lists and tuples with move(tensor) in place of each tensor."""
    if isinstance(tree, dict):
        return {key: moved(value, move) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(moved(value, move) for value in tree)
    return move(tree) if torch.is_tensor(tree) else tree


def main():
    from datasets.common import sets  # this builds on imagery, and that on this file
    from imagery import check, pack

    parser = argparse.ArgumentParser(
        prog="data.py", description="Paired HR and MR imagery for pretraining.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, dest="command")
    about = "measure shift, likeness, doubles and leaks of the pairs of a store"
    p = commands.add_parser("check", help=about, description=about, allow_abbrev=False)
    check.add_flags(p)
    about = "compare every byte of a store with its digest, and name the chips that are damaged"
    p = commands.add_parser("verify", help=about, description=about, allow_abbrev=False)
    p.add_argument("path", metavar="STORE", help="folder of the store")
    about = (
        "Cut pairs of images into a store: a published set as it was downloaded (--format NAME "
        "ROOT OUT), or images of your own (--mr DIR --hr DIR OUT). After a kill the same command "
        "continues."
    )
    p = commands.add_parser(
        "pack", help="cut pairs of images into a store", description=about, allow_abbrev=False
    )
    readers = sets("PAIRS")
    pack.add_flags(p, readers)
    args = vars(parser.parse_args())
    command = args.pop("command")
    try:
        if command == "pack":
            pack.command(readers, args, shlex.join(["data.py", *sys.argv[1:]]))
        elif command == "check":
            check.check(**args)
        else:
            damaged = False
            for line in verify(args["path"]):
                damaged = True
                print(line, flush=True)
            if damaged:
                raise ValueError(f"{args['path']}: damaged; pack it again")
            print(f"{args['path']}: all chips are whole")
    except KeyboardInterrupt:
        left = "the same command continues" if command == "pack" else "nothing was written"
        print(f"data.py: interrupted; {left}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
