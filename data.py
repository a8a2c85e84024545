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
import inspect
import json
import os
import shlex
import sys
import tokenize
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

FORMAT = "crossscale store"
VERSION = 2
WINDOW = "hr_row hr_col hr_height hr_width".split()
INDEX = (
    "chip hr mr_source hr_source row col hr_row hr_col hr_height hr_width mr_date hr_date crs "
    "a b c d e f split valid"
).split()  # crs, a to f: where the MR chip lies, as geotiff.Info says it of an image
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
            fits = [{*map(len, each)} == {size[0]} for *each, size in lists]
            if not all(fits) or [b for b in bands[0] if b in bands[-1]] != bands[-1]:
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
            hr = np.zeros((len(indices), *self.hr.shape[1:]), self.hr.dtype)
            hr[has_hr] = read_rows(self.hr, self._hr[indices[has_hr]])
            batch["hr"] = torch.from_numpy(hr)
        return batch


def read_rows(array, rows):
    order, back = np.unique(rows, return_inverse=True)  # ascending reads, each row once
    return array[order][back]


def read_csv(path):
    """The rows of a table, one after the other: an index may have millions."""
    with path.open(newline="", encoding="utf-8") as lines:
        yield from csv.DictReader(lines)


def read_chips(stores, chips, sensors=("mr", "hr")):
    """Read chips of several stores: [(meta, place, batch)], one for each store that has a share.

    chips: (B, 2) int, number of the store and of its chip. place: (n,) int64, which of the B these
    are. batch: of `Store.batch`.
    """
    parts = []
    for number in np.unique(chips[:, 0]):
        place = np.flatnonzero(chips[:, 0] == number)
        batch = stores[number].batch(chips[place, 1], sensors)
        parts.append((stores[number].meta, torch.from_numpy(place), batch))
    return parts


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

    batch: of Store.batch, pixels on any device, has_hr on the CPU. crops: (B, 4) of draw_crops.
    meta: Store.meta. mr_size, hr_size: side of the output in pixels. mr_from, hr_from: the sensor
    whose pixels, mean and std serve as each input ("hr" as MR is the variant `hr`, "mr" as HR is
    `sa-interp`).

    Returns, on the device of the batch, mr (B, C, mr_size, mr_size) float32, and hr (P, C, hr_size,
    hr_size) of the P chips that have HR, in their order; None without hr_size. Student and teacher
    share weights, so HR comes with MR's bands: those that HR lacks hold 0, their mean.
    """
    window = batch["hr_window"]
    crops = torch.as_tensor(crops, dtype=torch.float64, device=window.device)
    chip = torch.tensor(meta["shape"]["mr"][1:], dtype=torch.float64, device=window.device)
    windows = {
        "mr": torch.cat([crops[:, :2] * chip, crops[:, 2:] * chip], 1),
        "hr": torch.cat(
            [window[:, :2] + crops[:, :2] * window[:, 2:], crops[:, 2:] * window[:, 2:]], 1
        ),
    }

    def view(sensor, size, rows=slice(None)):
        images = resample(batch[sensor][rows], windows[sensor][rows], (size, size))
        mean, std = (
            torch.tensor(meta[name][sensor], device=images.device).view(-1, 1, 1)
            for name in ("mean", "std")
        )
        return (images - mean) / std

    mr = view(mr_from, mr_size)
    if hr_size is None:
        return mr, None
    pairs = batch["has_hr"].nonzero()[:, 0]
    if not len(pairs):
        return mr, mr.new_empty(0, len(meta["bands"]["mr"]), hr_size, hr_size)
    if len(pairs) == len(batch["has_hr"]):
        pairs = slice(None)  # no copy
    hr = view(hr_from, hr_size, pairs)
    if hr_from == "hr" and meta["bands"]["hr"] != meta["bands"]["mr"]:
        place = [meta["bands"]["mr"].index(name) for name in meta["bands"]["hr"]]
        narrow, hr = hr, hr.new_zeros(len(hr), len(meta["bands"]["mr"]), hr_size, hr_size)
        hr[:, place] = narrow
    return mr, hr


def main():
    from datasets import formats  # these build on this file
    from imagery import check, pack

    # what a reader is told, as far as it takes it
    options = "hr mr_bands hr_bands band_names hr_band_names nodata product level per_site".split()
    options += "mr_dataset hr_dataset splits".split()

    def names(text):
        return [name.strip() for name in text.split(",")]

    parser = argparse.ArgumentParser(
        prog="data.py", description="Paired HR and MR imagery for pretraining.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, dest="command")
    about = "measure shift, likeness, doubles and leaks of the pairs of a store"
    p = commands.add_parser("check", help=about, description=about, allow_abbrev=False)
    check.add_flags(p)
    # fmt: off
    about = (
        "Cut pairs of images into a store: a published set as it was downloaded (--format NAME "
        "ROOT OUT), or images of your own (--mr DIR --hr DIR OUT). After a kill the same command "
        "continues."
    )
    p = commands.add_parser(
        "pack", help="cut pairs of images into a store", description=about, allow_abbrev=False
    )
    p.add_argument("paths", nargs="+", metavar="[ROOT] OUT",
                   help="folder of the set, not with --mr; folder of the store, to be made")
    g = p.add_argument_group("input")
    g.add_argument("--format", choices=formats.FORMATS, default="geotiff",
                   help="what ROOT holds, as its publisher ships it (default: geotiff)")
    g.add_argument("--mr", help="in place of ROOT, MR images: folder, file or quoted glob")
    g.add_argument("--hr", help="HR images: folder, file or quoted glob (default: none, a store "
                   "of MR alone)")
    choose = "bands of %s files in the order wanted, names or indices from 0 (default: all)"
    g.add_argument("--mr-bands", type=names, metavar="B,..", help=choose % "MR")
    g.add_argument("--hr-bands", type=names, metavar="B,..", help=choose % "HR")
    g.add_argument("--band-names", type=names, metavar="B,G,R,NIR",
                   help="what the chosen bands are called (default: as in the first MR file)")
    g.add_argument("--hr-band-names", type=names, metavar="B,..",
                   help="the same of HR, where its bands are others (default: as MR's)")
    g.add_argument("--nodata", type=float,
                   help="value of missing pixels in files that declare none (default: none)")
    g.add_argument("--offset", type=float, metavar="DN",
                   help="added to MR pixels, of unsigned ones to no less than 0; -1000 for "
                   "Sentinel-2 from processing baseline 04.00 on (default: what SAFE folders say)")
    g = p.add_argument_group("options of published sets")
    g.add_argument("--product", choices=["10m", "20m"],
                   help="sen2venus: pixels of MR (default: 10m)")
    g.add_argument("--level", choices=["L2A", "L1C"],
                   help="worldstrat: of Sentinel-2 (default: L2A)")
    g.add_argument("--hr-product", dest="hr", choices=["rgbn", "ps"],
                   help="worldstrat: SPOT as taken or pan-sharpened (default: rgbn)")
    g.add_argument("--per-site", type=int, metavar="N",
                   help="rapidai4eo, worldstrat: MR dates of each place (default: 1)")
    g.add_argument("--mr-dataset", metavar="NAME",
                   help="hdf5: the MR images (default: as in the known files)")
    g.add_argument("--hr-dataset", metavar="NAME",
                   help="hdf5: the HR images (default: as in the known files)")
    g.add_argument("--splits", metavar="FILE",
                   help="hdf5: JSON {split: [rows]} (default: the one beside the file)")
    g = p.add_argument_group("origin, goes into meta.json (of published sets it is known)")
    g.add_argument("--source-name", metavar="TEXT", help="name of the images (default: none)")
    g.add_argument("--licence", metavar="TEXT", help="their licence (default: none)")
    g.add_argument("--attribution", metavar="TEXT", help="who is to be named (default: none)")
    g.add_argument("--url", metavar="URL", help="where they are from (default: none)")
    g = p.add_argument_group("chips")
    g.add_argument("--chip", type=int,
                   help="side in MR pixels (default: whole images of published sets, else 64)")
    g.add_argument("--stride", type=int, help="step in MR pixels (default: the chip)")
    g.add_argument("--min-valid", type=float, default=1.0,
                   help="least fraction of valid pixels in each chip, above 0 (default: 1.0)")
    g.add_argument("--keep-unpaired", action=argparse.BooleanOptionalAction, default=False,
                   help="keep MR chips without valid HR (default: no; yes without any HR)")
    g = p.add_argument_group("splits, where the publisher gives none")
    g.add_argument("--split-block", type=int, default=8,
                   help="side in chips of the blocks of ground that are dealt, where no sites are "
                   "known (default: 8)")
    g.add_argument("--val", type=float, default=0.1, help="fraction of chips (default: 0.1)")
    g.add_argument("--test", type=float, default=0.0, help="fraction of chips (default: 0)")
    g.add_argument("--seed", type=int, default=0,
                   help="of the deal, and of what --per-site draws (default: 0)")
    g = p.add_argument_group("run")
    g.add_argument("--workers", type=int,
                   help="threads that read and cut (default: the CPUs, at most 8)")
    g.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False,
                   help="replace a store that is there, or what another command began to pack "
                   "(default: no)")
    # fmt: on
    args = vars(parser.parse_args())
    command = args.pop("command")
    try:
        if command == "check":
            check.check(**args)
            return
        reader = formats.FORMATS[args["format"]]
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
