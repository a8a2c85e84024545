"""A small store of smooth random landscapes for tests, written without any imagery."""

import csv
import json

import numpy as np
import torch
import torch.nn.functional as F

import data


def crop_pairs(store, chips, crops, mr_size, hr_size=None, mr_from="mr", hr_from="hr"):
    """The same ground in both sensors of some chips of one store, as train.py reads it."""
    ids, crops = np.column_stack([np.zeros_like(chips), chips]), np.array(crops, float)
    views = ((mr_from, mr_size), (hr_from, hr_size))
    return tuple(
        data.render(data.read_crops([store], ids, sensor, crops, size)) if size else None
        for sensor, size in views
    )


def write_store(
    path,
    chips=16,
    size=16,
    ratio=2,
    bands=("B", "G", "R", "NIR"),
    seed=0,
    pairs=None,
    hr_bands=None,
):
    """mr (chips, C, size, size) and hr (pairs, C', ratio * size, ...) uint16 of the same ground.

    pairs: chips that have HR, in any order, all when None. hr_bands: `bands` when None.
    """
    generator = torch.Generator().manual_seed(seed)
    hr_bands = bands if hr_bands is None else hr_bands
    names = [*bands, *(name for name in hr_bands if name not in bands)]
    coarse = torch.rand(chips, len(names), 6, 6, generator=generator)
    hr = F.interpolate(coarse, (ratio * size, ratio * size), mode="bicubic")
    hr = (2000 + 1000 * hr + 200 * torch.rand(hr.shape, generator=generator)).clamp(0, 10000)
    mr = F.avg_pool2d(hr, ratio)[:, : len(bands)]
    pairs = list(range(chips)) if pairs is None else list(pairs)
    hr = hr[pairs][:, [names.index(name) for name in hr_bands]]
    arrays = {"mr": mr.numpy().astype(np.uint16), "hr": hr.numpy().astype(np.uint16)}
    if not pairs:
        del arrays["hr"]
    path.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)
    meta = {
        "format": data.FORMAT,
        "version": data.VERSION,
        "count": {"mr": chips, "hr": len(pairs)},
        "shape": {"hr": None} | {k: list(v.shape[1:]) for k, v in arrays.items()},
        "dtype": {k: str(v.dtype) for k, v in arrays.items()},
        "bands": {"mr": list(bands), "hr": list(hr_bands)},
        "gsd": {"mr": 10.0, "hr": 10.0 / ratio},
        "sources": [],
        "pixel_ratio": [float(ratio), float(ratio)],
        "mean": {k: v.mean((0, 2, 3)).tolist() for k, v in arrays.items()},
        "std": {k: v.std((0, 2, 3)).tolist() for k, v in arrays.items()},
    }
    (path / "meta.json").write_text(json.dumps(meta))
    with open(path / "index.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, data.INDEX)
        writer.writeheader()
        for i in range(chips):
            split = "val" if i % 8 == 7 else "train"
            row = {"chip": i, "hr": "", "split": split, "valid": 1}
            if i in pairs:
                side = ratio * size
                window = dict(zip(data.WINDOW, (0, 0, side, side), strict=True))
                row |= {"hr": pairs.index(i), **window}
            writer.writerow(row)
    return path
