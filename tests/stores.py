"""A small store of smooth random landscapes for tests, written without any imagery."""

import csv
import hashlib
import itertools

import numpy as np
import torch
import torch.nn.functional as F

import data
from imagery import shards


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
    pairs = list(range(chips)) if pairs is None else sorted(pairs)
    hr = hr[pairs][:, [names.index(name) for name in hr_bands]]
    arrays = {"mr": mr.numpy().astype(np.uint16), "hr": hr.numpy().astype(np.uint16)}
    if not pairs:
        del arrays["hr"]
    path.mkdir(parents=True)
    meta = {
        "format": data.FORMAT,
        "version": data.VERSION,
        "bands": {"mr": list(bands), "hr": list(hr_bands)},
        "gsd": {"mr": 10.0, "hr": 10.0 / ratio},
        "sources": [],
        "pixel_ratio": [float(ratio), float(ratio)],
        "mean": {k: v.mean((0, 2, 3)).tolist() for k, v in arrays.items()},
        "std": {k: v.std((0, 2, 3)).tolist() for k, v in arrays.items()},
    }
    rows = [{"split": "val" if i % 8 == 7 else "train", "valid": 1} for i in range(chips)]
    for i in pairs:
        rows[i] |= dict(zip(data.WINDOW, (0, 0, ratio * size, ratio * size), strict=True))
    return save_store(path, meta, rows, arrays)


def save_store(path, meta, rows, arrays):
    """Write a store of two shards. rows: of index.csv, whose chips have HR where they have a
    window; arrays: {"mr": (chips, ...), "hr": (pairs, ...)}."""
    windows = np.array([[float(row.get(key) or 0) for key in data.WINDOW] for row in rows])
    has_hr = windows[:, 2] > 0
    cuts, about, index = [0, (len(rows) + 1) // 2, len(rows)], [], []
    for shard, (first, last) in enumerate(itertools.pairwise(cuts)):
        before, here = has_hr[:first].sum(), has_hr[first:last]
        tensors = {"hr_window": windows[first:last], "mr": arrays["mr"][first:last]}
        if "hr" in arrays:
            tensors["hr"] = arrays["hr"][before : before + here.sum()]
        name = f"{first:07}-00000.safetensors"
        tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
        shards.save_shard(path / name, {}, tensors)
        size, digest = (path / name).stat().st_size, data.header_digest(path / name)
        about.append({"file": name, "bytes": size, "digest": digest})
        for place in range(last - first):
            own = {"chip": first + place, "shard": shard, "place": place}
            own["hr"] = here[:place].sum() if here[place] else ""
            index.append(shards.fill_row(data.INDEX, rows[first + place] | own))
    with shards.table(path / "index.csv", data.INDEX) as table:
        table.writerows(index)
    digest = hashlib.sha256((path / "index.csv").read_bytes()).hexdigest()
    meta = meta | {
        "count": {"mr": len(rows), "hr": int(has_hr.sum())},
        "shape": {"hr": None} | {k: list(v.shape[1:]) for k, v in arrays.items()},
        "dtype": {k: str(v.dtype) for k, v in arrays.items()},
        "shards": about,
        "index": digest,
    }
    shards.write_meta(path, meta)
    return path


def pixels(path, sensor):
    """All pixels of a sensor: of MR by chip, of HR those of the chips that have it, in order."""
    store = data.Store(path)
    batch = store.batch(np.arange(len(store)), {sensor})
    return batch[sensor].numpy()[store.has_hr if sensor == "hr" else slice(None)]


def edit_store(path, meta=(), rows=None, **change):
    """Write a store again with other meta, other rows (a function of the chip that returns what
    changes, or None) or other pixels (mr, hr: a function of all, in place or not)."""
    store = data.Store(path)
    table = [row | (rows(int(row["chip"])) or {} if rows else {}) for row in rows_of(path)]
    arrays = {sensor: pixels(path, sensor) for sensor in store.sensors}
    for sensor, edit in change.items():
        new = edit(arrays[sensor])
        arrays[sensor] = arrays[sensor] if new is None else new
    for name in [about["file"] for about in store.meta["shards"]]:
        (path / name).unlink()
    return save_store(path, store.meta | dict(meta), table, arrays)


def rows_of(path, name="index"):
    with (path / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))
