"""Paired HR and MR imagery: a store, the order it is read in, crops of the same ground in both.

    python data.py pack --mr sentinel2/ --hr venus/ OUT --band-names B,G,R,NIR
    python data.py check OUT

A store is a folder: mr.npy (N, C, h, w) and, for the chips that have a pair, hr.npy (P, C', H, W),
in the files' own dtype, memory-mapped; index.csv, one row a chip; meta.json, what the chips are and
the statistics that normalise them. The HR chip is whole pixels of its file; where the MR chip's
ground lies in it is a window (hr_row, hr_col, hr_height, hr_width) of fractional pixels, so any
ratio and any offset of the two grids is exact. Crops are made from that on the training device.
"""

import argparse
import csv
import functools
import hashlib
import inspect
import json
import math
import os
import shlex
import sys
import tokenize
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

FORMAT = "crossscale store"
VERSION = 2
WINDOW = "hr_row hr_col hr_height hr_width".split()
INDEX = (
    "chip hr mr_source hr_source row col hr_row hr_col hr_height hr_width mr_date hr_date crs "
    "a b c d e f split valid"
).split()  # crs, a to f: where the MR chip lies, as raster.Info says it of an image
SPLITS = "train val test".split()


class Store:
    """A packed store, opened read-only. `meta` is meta.json; `len` counts chips.

    hr_share: fraction of the training split's pairs that keep their HR, the others become chips
    without; drawn by seed, and a smaller share is a part of a larger one. `has_hr` (N,) bool says
    which chips have HR; `flagged` (N,) bool which `data.py check` marked.

    Raises FileNotFoundError if the folder holds no store, ValueError if it is of another version,
    not complete or damaged.
    """

    def __init__(self, path, hr_share=1.0, seed=0):
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such folder; make a store with data.py pack")
        if not (path / "meta.json").is_file():
            raise FileNotFoundError(
                f"{path}: not a store, it has no meta.json; make one with data.py pack"
            )
        with usable(path / "meta.json") as file:
            self.meta = meta = json.loads(file.read_text("utf-8"))
            if (meta["format"], meta["version"]) != (FORMAT, VERSION):
                raise ValueError(f"version {VERSION} expected, {meta['version']} found")
            sensors = [s for s in ("mr", "hr") if meta["shape"][s] is not None]
            mean, std, gsd, shape, bands = (
                [meta[key][sensor] for sensor in sensors]
                for key in ("mean", "std", "gsd", "shape", "bands")
            )
            lists = zip(bands, mean, std, shape, strict=True)
            if not all({len({*b}), *map(len, (b, m, s))} == {size[0]} for b, m, s, size in lists):
                raise ValueError("lists that do not fit its bands")
            positive = np.concatenate([*std, [side or 1 for side in gsd]])
            if not np.isfinite([*np.concatenate(mean), *positive]).all() or positive.min() <= 0:
                raise ValueError("numbers that are not finite or not above 0")
        self.mr = self._open(path / "mr.npy")
        self.hr = self._open(path / "hr.npy") if "hr" in sensors else None
        with usable(path / "index.csv") as file:
            self._split = np.empty(len(self), "U5")
            self._hr = np.empty(len(self), np.int64)  # row in hr.npy, or -1
            self._window = np.empty((len(self), 4))
            valid, row = np.empty(len(self)), -1
            for row, cells in enumerate(read_csv(file)):
                if row < len(self):
                    self._split[row] = cells["split"]
                    self._hr[row] = int(cells["hr"] or -1)
                    self._window[row] = [float(cells[key] or 0) for key in WINDOW]
                    valid[row] = float(cells["valid"])
            if row + 1 != len(self):
                raise ValueError(f"{len(self)} rows expected, one a chip, {row + 1} found")
            if not np.isfinite([*self._window.T, valid]).all() or not set(self._split) <= {*SPLITS}:
                raise ValueError("a row that is not whole")
            self.has_hr = self._hr >= 0
            count = 0 if self.hr is None else len(self.hr)
            if not np.array_equal(np.sort(self._hr[self.has_hr]), np.arange(count)):
                raise ValueError(f"rows that do not fit the {count} chips of hr.npy")
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

    def _open(self, path):
        with usable(path) as file:
            shape = (self.meta["count"][path.stem], *self.meta["shape"][path.stem])
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

        Returns mr (B, C, h, w) and hr (B, C', H, W) as stored, zeros where a chip has no HR and no
        key where the store has none; has_hr (B,) bool; hr_window (B, 4) float64: top, left, height,
        width of the MR chip's ground in pixels of the HR chip.
        """
        indices = np.asarray(indices)
        has_hr = self.has_hr[indices]
        batch = {
            "has_hr": torch.from_numpy(has_hr),
            "hr_window": torch.from_numpy(self._window[indices]),
        }
        if "mr" in sensors:
            batch["mr"] = torch.from_numpy(read_rows(self.mr, indices))
        if "hr" in sensors and self.hr is not None:
            batch["hr"] = torch.from_numpy(read_rows(self.hr, self._hr[indices], has_hr))
        return batch


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
        for sensor in ("mr", "hr") if store.hr is not None else ("mr",):
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


def read_rows(array, rows, wanted=True):
    """array[rows] of a memory map, zeros where not `wanted`. Each row is copied straight to its
    place, in ascending order; a fancy index copies the batch twice and takes twice as long."""
    out = np.zeros((len(rows), *array.shape[1:]), array.dtype)
    order = np.argsort(rows)
    for place in order[np.broadcast_to(wanted, len(rows))[order]]:
        out[place] = array[rows[place]]
    return out


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
        *(OSError, ValueError, TypeError, LookupError, OverflowError),
        *(csv.Error, tokenize.TokenError),
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

    # what a reader is told, as far as it takes it
    options = "hr mr_bands hr_bands band_names hr_band_names nodata product level per_site".split()
    options += "mr_dataset hr_dataset splits warp clouds mask_band mask_values max_days".split()

    parser = argparse.ArgumentParser(
        prog="data.py", description="Paired HR and MR imagery for pretraining.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, dest="command")
    about = "measure shift, likeness, doubles and leaks of the pairs of a store"
    p = commands.add_parser("check", help=about, description=about, allow_abbrev=False)
    check.add_flags(p)
    about = (
        "Cut pairs of images into a store: a published set as it was downloaded (--format NAME "
        "ROOT OUT), or images of your own (--mr DIR --hr DIR OUT). After a kill the same command "
        "continues."
    )
    p = commands.add_parser(
        "pack", help="cut pairs of images into a store", description=about, allow_abbrev=False
    )
    pack.add_flags(p, sets("PAIRS"))
    args = vars(parser.parse_args())
    command = args.pop("command")
    try:
        if command == "check":
            check.check(**args)
            return
        reader = sets("PAIRS")[args["format"]]
        if len(args["paths"]) != (1 if args["mr"] else 2):
            raise ValueError(
                f"{' '.join(args['paths'])}: ROOT and OUT expected, or OUT alone with --mr"
            )
        *root, out = args.pop("paths")
        pack.check_output(Path(out), args["overwrite"])  # before headers are read
        takes = inspect.signature(reader).parameters
        given = {key: args.pop(key) for key in options}
        given = {key: value for key, value in given.items() if value is not None}
        if wrong := sorted(given.keys() - takes.keys()):
            known = sorted(takes.keys() & options)
            raise ValueError(
                f"--{wrong[0]}: not for --format {args['format']}".replace("_", "-")
                + f", which takes {', '.join(known) or 'none of them'}"
            )
        if "seed" in takes:
            given["seed"] = args["seed"]
        first = "--mr" if args["mr"] else "ROOT"
        root = args.pop("mr") or root[0]
        listing = reader(root, **given)
        # what must be the same to continue; places in full: elsewhere one name is another place
        inputs = {"--format": args["format"], first: os.path.abspath(root)}
        for key, value in given.items():
            product = key == "hr" and args["format"] == "worldstrat"
            flag = "--hr-product" if product else "--" + key.replace("_", "-")
            inputs[flag] = os.path.abspath(value) if flag in ("--hr", "--splits") else value
        source = {"name": args.pop("source_name")}
        source |= {key: args.pop(key) for key in ("licence", "attribution", "url")}
        if any(source.values()):
            listing = listing._replace(sources=[{k: v or "" for k, v in source.items()}])
        del args["format"]
        command_line = shlex.join(["data.py", *sys.argv[1:]])
        pack.pack(listing, out, **args, inputs=inputs, command=command_line)
    except KeyboardInterrupt:
        left = "nothing was written" if command == "check" else "the same command continues"
        print(f"data.py: interrupted; {left}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
