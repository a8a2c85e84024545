"""Paired HR and MR imagery: pack GeoTIFFs into a store, read it, crop both to the same ground.

    python data.py pack --mr sentinel2/ --hr venus/ OUT --band-names B,G,R,NIR

A store is a folder: mr.npy (N, C, h, w) and hr.npy (N, C, H, W) in the files' own dtype, memory-
mapped; index.csv, one row a chip; meta.json, what the chips are and the statistics that normalise
them. Nothing is resampled on the way in: chips are cut on the MR pixel grid, and the HR chip is
the whole-pixel window around the same ground together with the fractional place of the MR chip's
corner in it (hr_row, hr_col), so any pixel ratio and any offset of the two grids stay exact.
Crops are made from that on the training device.
"""

import csv
import functools
import json
from pathlib import Path

import numpy as np
import torch

FORMAT = "crossscale store"
VERSION = 1
COLUMNS = "chip mr_source hr_source row col hr_row hr_col split valid".split()


class Store:
    """A packed store, opened read-only. `meta` is meta.json; `len` counts chips.

    Raises FileNotFoundError if the folder holds no store, ValueError if it is of another version
    or not complete.
    """

    def __init__(self, path):
        path = Path(path)
        if not (path / "meta.json").is_file():
            raise FileNotFoundError(
                f"{path}: not a store, it has no meta.json; make one with data.py pack"
            )
        self.meta = json.loads((path / "meta.json").read_text())
        version = self.meta.get("version")
        if self.meta.get("format") != FORMAT or version != VERSION:
            raise ValueError(
                f"{path}: a store of version {VERSION} expected, found {version}; pack it again"
            )
        self.mr = self._open(path, "mr")
        self.hr = self._open(path, "hr")
        with (path / "index.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        if len(rows) != len(self):
            raise ValueError(
                f"{path / 'index.csv'}: {len(self)} rows expected, one a chip, found {len(rows)}; "
                "pack the store again"
            )
        self._origin = np.array([(row["hr_row"], row["hr_col"]) for row in rows], np.float64)
        self._split = np.array([row["split"] for row in rows])

    def _open(self, path, sensor):
        file = path / f"{sensor}.npy"
        shape = (self.meta["count"], *self.meta["shape"][sensor])
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:  # numpy's word for a file shorter than its header
            raise ValueError(
                f"{file}: missing or cut short, {shape} {self.meta['dtype'][sensor]} expected; "
                "pack the store again"
            ) from error
        if array.shape != shape or array.dtype != self.meta["dtype"][sensor]:
            raise ValueError(
                f"{file}: {shape} {self.meta['dtype'][sensor]} expected, found {array.shape} "
                f"{array.dtype}; pack the store again"
            )
        return array

    def __len__(self):
        return self.meta["count"]

    def split(self, name):
        """Chip numbers of a split ("train", "val", "test"), ascending int64; maybe none."""
        return np.flatnonzero(self._split == name)

    def batch(self, indices):
        """Read chips. indices: (B,) chip numbers in any order, repeats allowed.

        Returns mr (B, C, h, w) and hr (B, C, H, W) as stored, has_hr (B,) bool, and hr_origin
        (B, 2) float64: row, col of the MR chip's top-left corner in pixels of the HR chip.
        """
        indices = np.asarray(indices)
        order, back = np.unique(indices, return_inverse=True)  # ascending reads, each chip once
        return {
            "mr": torch.from_numpy(self.mr[order][back]),
            "hr": torch.from_numpy(self.hr[order][back]),
            "has_hr": torch.ones(len(back), dtype=torch.bool),
            "hr_origin": torch.from_numpy(self._origin[indices]),
        }


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
