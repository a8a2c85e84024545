"""Are the pairs of a store what they seem? Shift, likeness, holes, doubles and leaks of every chip.

    python data.py check pairs
    python data.py check pairs --max-shift 1       and train.py --skip-flagged leaves those out

Writes check.csv, one row a chip with all figures, and check.png, their histograms.
"""

import csv
import hashlib
import io
import math
import os
import tempfile
from collections import Counter
from contextlib import redirect_stdout
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import SPLITS, Store, resample, usable
from figures import save_figure
from imagery import pack
from imagery.shards import table

BATCH_BYTES = 2**22  # stored pixels at a time: what is made of them stays in the processor's cache
REACH = 8  # MR pixels up to which shifts are searched, along rows and columns
BLUR = 0.175  # cycles per pixel, Gaussian: beyond it an MR image is mostly aliasing and noise
EVIDENCE = 100  # of a shift, see measure_shift; unrelated chips of 32 to 128 pixels reach 40 to 80
SLACK = 0.01  # MR pixels by which neighbouring chips may overlap; georeferences are rounded
PLATEAU = 10  # times as many pixels at the highest value as at the next one: the sensor is full


def add_flags(parser):
    # fmt: off
    add = parser.add_argument
    add("path", metavar="STORE", help="a store, or a folder with mr/ and hr/ of GeoTIFFs")
    add("--out", metavar="DIR", help="where check.csv and check.png go (default: the store)")
    g = parser.add_argument_group("flagging; writes flags.csv into the store, leaks included")
    g.add_argument("--max-shift", type=float, metavar="PX",
                   help="flag pairs shifted by more MR pixels (default: flag none)")
    g.add_argument("--min-correlation", type=float, metavar="R",
                   help="flag pairs whose mean band correlation is lower (default: flag none)")
    # fmt: on


def check(path, out=None, max_shift=None, min_correlation=None):
    """Measure every chip of a store, print a summary, write check.csv and check.png.

    path: a store, or a folder with mr/ and hr/ of GeoTIFFs, which is packed for the while and needs
    `out`; pack's contact.png and skipped.csv are left there too. max_shift: MR pixels.
    min_correlation: mean over the bands that both have. With either, flags.csv is written: the
    pairs beyond it and the training chips that leak, see `find_leaks`. Sensors without a common
    band, such as radar and optics, cannot be compared: no pair of theirs is beyond anything.
    Returns the figures, a dict of (N,) or (N, bands) arrays, NaN where there is none. Raises
    FileNotFoundError, OSError or ValueError, one sentence.
    """
    from datasets.folder import read_geotiff  # which itself builds on imagery

    path, flagging = Path(path), max_shift is not None or min_correlation is not None
    if max_shift is not None and not 0 < max_shift < REACH:
        raise ValueError(
            f"--max-shift {max_shift:g}: must be above 0 and below {REACH} MR pixels, as far as "
            "shifts are searched"
        )
    if min_correlation is not None and not -1 <= min_correlation <= 1:
        raise ValueError(f"--min-correlation {min_correlation:g}: must be from -1 to 1")
    bare = not (path / "meta.json").is_file()
    if bare and not ((path / "mr").is_dir() and (path / "hr").is_dir()):
        raise FileNotFoundError(
            f"{path}: neither a store, it has no meta.json, nor a folder with mr/ and hr/ of "
            "GeoTIFFs; make a store with data.py pack"
        )
    if bare and out is None:
        raise ValueError(f"{path}: no store that check.csv could go into; say where with --out DIR")
    if bare and flagging:
        raise ValueError(
            f"{path}: --max-shift and --min-correlation flag the chips of a store; make one with "
            "data.py pack"
        )
    out = path if out is None else Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if bare:
        with tempfile.TemporaryDirectory(
            prefix="check-", dir=out, ignore_cleanup_errors=True
        ) as scratch:
            store = Path(scratch) / "store"
            with redirect_stdout(io.StringIO()) as said:
                # half of a chip's pixels are enough for what check asks, and tell of the nodata
                pack.pack(read_geotiff(path), store, min_valid=0.5, val=0)
            print(said.getvalue().replace(str(store), str(out)), end="")
            for name in ("contact.png", "skipped.csv"):  # of which it speaks
                os.replace(store / name, out / name)
            return examine(store, path, out)
    figures = examine(path, path, out)
    if flagging:
        write_flags(path, figures, max_shift, min_correlation)
    return figures


def examine(path, name, out):
    """Measure, report and draw the store at `path`, called `name`; returns the figures."""
    store = Store(path)
    figures = read_index(path / "index.csv") | measure(store)
    figures["duplicate_of"] = find_duplicates(figures)
    figures["leak"], figures["leak_by"] = find_leaks(figures, store.meta["shape"]["mr"][1:])
    write_table(out / "check.csv", figures)
    report(name, figures, store)
    draw(out / "check.png", name, figures, store)
    print(f"  see {out / 'check.csv'} and {out / 'check.png'}")
    return figures


def read_index(path):
    """Columns of index.csv: source (N,) numbers into sources, row, col, split, valid, days, crs
    (N,) numbers into crs_names, transform (N, 6).

    days: (N,) from the MR date to the HR date, NaN where one is unknown. transform: of the MR chip,
    NaN where it is not georeferenced.
    """
    numbers, codes = {}, {}
    columns = {key: [] for key in "source row col split valid days crs transform".split()}
    with usable(path) as file, file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            days = math.nan
            if row["mr_date"] and row["hr_date"]:
                mr, hr = (datetime.fromisoformat(row[key]) for key in ("mr_date", "hr_date"))
                days = (hr.date() - mr.date()).days
            columns["source"].append(numbers.setdefault(row["mr_source"], len(numbers)))
            columns["row"].append(int(row["row"] or 0))
            columns["col"].append(int(row["col"] or 0))
            columns["split"].append(SPLITS.index(row["split"]))
            columns["valid"].append(float(row["valid"]))
            columns["days"].append(days)
            columns["crs"].append(codes.setdefault(row["crs"], len(codes)))
            columns["transform"].append([float(row[key] or "nan") for key in "abcdef"])
    arrays = {key: np.array(column) for key, column in columns.items()}
    return arrays | {"sources": [*numbers], "crs_names": [*codes]}


# ---- pixels


def measure(store):
    """Read every chip once. Returns `shared`, the names of the bands that both sensors have, and
    per chip shift (N, 2) rows and columns in MR pixels, confidence, correlation (N, shared bands);
    for each sensor `*_flat`, how many bands are constant, `*_saturated`, the share of saturated
    pixels, `*_digest` (N, 2) int64 of the pixels.
    """
    meta, count = store.meta, len(store)
    sensors = store.sensors
    own = {sensor: meta["bands"][sensor] for sensor in sensors}
    names = [name for name in own.get("hr", []) if name in own["mr"]]
    places = {sensor: [own[sensor].index(name) for name in names] for sensor in sensors}
    figures = {
        "shared": names,
        "shift": np.full((count, 2), np.nan),
        "confidence": np.full(count, np.nan),
        "correlation": np.full((count, len(names)), np.nan),
    }
    for sensor in sensors:
        bands = len(meta["bands"][sensor])
        figures[f"{sensor}_flat"] = np.full(count, np.nan)
        figures[f"{sensor}_digest"] = np.zeros((count, 2), np.int64)
        # the two highest values of each band and how many pixels have them
        figures[f"{sensor}_top"] = np.tile([-np.inf, 0], (count, bands, 2, 1))
    bytes_of = sum(
        math.prod(meta["shape"][s]) * np.dtype(meta["dtype"][s]).itemsize for s in sensors
    )
    size = int(np.clip(BATCH_BYTES // bytes_of, 1, 256))
    with tqdm(total=count, desc="check", unit="chip") as bar:
        for start in range(0, count, size):
            chips = np.arange(start, min(start + size, count))
            batch = store.batch(chips)
            pairs = store.has_hr[chips]
            for sensor in sensors:
                has = pairs if sensor == "hr" else slice(None)
                pixels, here = batch[sensor].numpy()[has], chips[has]
                if not len(here):
                    continue
                figures[f"{sensor}_flat"][here] = (np.ptp(pixels, axis=(2, 3)) == 0).sum(1)
                figures[f"{sensor}_top"][here] = highest(pixels)
                figures[f"{sensor}_digest"][here] = [digest(chip) for chip in pixels]
            if names and pairs.any():
                mr, hr = (batch[sensor][pairs][:, places[sensor]] for sensor in sensors)
                mr, window, here = mr.float(), batch["hr_window"][pairs], chips[pairs]
                alike = correlate(mr, resample(hr, window, mr.shape[2:]))
                figures["correlation"][here] = alike.numpy()
                shift, confidence = measure_shift(mr, hr, window)
                figures["shift"][here], figures["confidence"][here] = shift, confidence
            bar.update(len(chips))
    for sensor in sensors:
        top, area = figures.pop(f"{sensor}_top"), math.prod(meta["shape"][sensor][1:])
        share = saturated(top, np.dtype(meta["dtype"][sensor])) / area
        share[np.isnan(figures[f"{sensor}_flat"])] = np.nan  # chips without HR
        figures[f"{sensor}_saturated"] = share
    return figures


def digest(chip):
    """(2,) int64 that equal pixels share: 128 bits of SHA-256, for which processors have a way."""
    return np.frombuffer(hashlib.sha256(np.ascontiguousarray(chip)).digest()[:16], np.int64)


def highest(pixels):
    """The two highest values of each chip and band, and how many pixels have them.

    pixels: (B, C, H, W). Returns (B, C, 2, 2) float64, (value, count) by rank; -inf and 0 where
    there is no second value.
    """
    flat = pixels.reshape(*pixels.shape[:2], -1)
    top = flat.max(2, keepdims=True)
    below = flat < top
    second = flat.max(2, keepdims=True, where=below, initial=flat.min())
    number = ((flat == second) & below).sum(2)
    second = np.where(number, second[..., 0].astype(float), -np.inf)
    first = np.stack([top[..., 0].astype(float), (~below).sum(2)], -1)
    return np.stack([first, np.stack([second, number], -1)], 2)


def saturated(top, dtype):
    """Pixels at which the sensor is full, the mean over the bands, of `highest` of all chips: (N,).

    Full is the highest value that the dtype has, or the highest that a band has anywhere, where
    that is a plateau: a natural maximum is no more frequent than the value below it.
    """
    value, count = np.moveaxis(top, -1, 0)  # (N, C, 2)
    most = value.max((0, 2))  # of each band
    at_most = np.where(value[:, :, 0] == most, count[:, :, 0], 0)
    lower = np.where(value < most[:, None], value, -np.inf)
    following = lower.max((0, 2))
    at_following = ((lower == following[:, None]) * count).sum((0, 2), where=np.isfinite(lower))
    full = at_most.sum(0) > PLATEAU * np.maximum(at_following, 1)
    if dtype.kind in "iu":
        full |= most == np.iinfo(dtype).max
    return (at_most * full).mean(1)


def correlate(a, b):
    """Pearson's correlation by chip and band: (B, C, h, w) twice -> (B, C), NaN if constant."""
    a, b = (x.double() - x.double().mean((2, 3), keepdim=True) for x in (a, b))
    scale = (a.square().sum((2, 3)) * b.square().sum((2, 3))).sqrt()
    # cubic weights leave a constant constant up to float32 rounding
    constant = torch.minimum(a.abs().amax((2, 3)), b.abs().amax((2, 3))) < 1e-6 * scale.sqrt()
    return torch.where(constant | (scale == 0), math.nan, (a * b).sum((2, 3)) / scale)


def measure_shift(mr, hr, window):
    """How far HR's content lies from MR's, by phase correlation. Source: Kuglin and Hines 1975.

    mr: (B, C, h, w). hr: (B, C, H, W), the same bands. window: (B, 4), MR's ground in pixels of HR.
    Returns shift (B, 2) float64, rows and columns in MR pixels, positive where HR's content lies
    further down and right, NaN where the two have too little in common to tell or are less alike
    when moved by it; confidence (B,) the share of the cross power that is in phase there, 0 to 1.

    The cross power is of image gradients and summed over the bands, so that frequencies in which
    the bands disagree count less. It is whitened softly: R / (|R| + 4 mean|R|). Whitened fully,
    the many frequencies without content would outvote a smooth landscape. The peak is sought on
    ever finer grids (Guizar-Sicairos et al. 2008), and HR is resampled at the shift found so far,
    since two windows at one place pull the estimate to 0.
    """
    chip = torch.tensor(mr.shape[2:])
    # a border of MR is left for HR's window to move in; a longer shift is measured 5 % too short
    margin = min(REACH, int(chip.min()) // 16)
    reach = min(REACH, max(int(chip.min()) // 4, 1))
    size = chip - 2 * margin
    pixel = window[:, 2:] / chip  # HR pixels to an MR pixel
    y, x = (torch.fft.fftfreq(n) for n in size.tolist())
    hann, hann_x = (torch.hann_window(n, periodic=False) for n in size.tolist())
    hann = hann[:, None] * hann_x
    radius = y[:, None] ** 2 + x**2
    weight = radius * torch.exp(-radius / (2 * BLUR**2))

    def spectrum(images):
        images = images - images.mean((2, 3), keepdim=True)
        images = images / images.square().mean((2, 3), keepdim=True).sqrt().clamp_min(1e-12)
        return torch.fft.fft2(images * hann)

    mr = mr[:, :, margin : chip[0] - margin, margin : chip[1] - margin].float()
    fixed = spectrum(mr)
    shift, alike = torch.zeros(len(mr), 2, dtype=torch.float64), []
    for span, step in ((reach, 0.5), (0.75, 0.05), (0.75, 0.05)):
        moved = shift.clamp(-margin, margin)
        ground = torch.cat([window[:, :2] + (margin + moved) * pixel, pixel * size], 1)
        near = resample(hr, ground, size.tolist())
        alike.append(correlate(mr, near).nanmean(1))
        cross = (spectrum(near) * fixed.conj()).sum(1) * weight
        power = cross.abs()
        cross = cross / (power + 4 * power.mean((1, 2), keepdim=True)).clamp_min(1e-20)
        ticks = torch.arange(-span, span + step / 2, step, dtype=torch.float64)
        ticks = (shift - moved)[..., None] + ticks  # (B, 2, T)
        angles = (
            (2 * math.pi * t[..., None] * f).float()
            for t, f in zip(ticks.unbind(1), (y, x), strict=True)
        )
        rise, run = (torch.complex(angle.cos(), angle.sin()) for angle in angles)
        surface = torch.einsum("btk,bkl,bul->btu", rise, cross, run).real
        peak, place = surface.flatten(1).max(1)
        count = surface.shape[-1]
        place = torch.stack([place // count, place % count], 1).clamp(1, count - 2)
        shift = moved + ticks.gather(2, place[..., None])[..., 0] + step * vertex(surface, place)
    power = cross.abs()
    total = power.sum((1, 2)).clamp_min(1e-20)
    confidence = (peak / total).clamp(0, 1).double()
    # Gaussian log likelihood ratio, of as many frequencies as carry the power
    frequencies = total.square() / power.square().sum((1, 2)).clamp_min(1e-20)
    evidence = -frequencies * torch.log1p(-confidence.square().clamp_max(1 - 1e-6))
    # shadows that wander over a ridge have a peak of their own, far from where the ground lies
    shift[(evidence < EVIDENCE) | (alike[-1] < alike[0] - 0.01)] = math.nan
    return shift, confidence


def vertex(surface, place):
    """Where a parabola through a peak and its neighbours has its top: (B, T, T), (B, 2) -> (B, 2)
    in steps from the peak, one parabola an axis.
    """
    image, (row, col) = torch.arange(len(place)), place.unbind(1)
    middle = surface[image, row, col]
    sides = [
        (surface[image, row - 1, col], surface[image, row + 1, col]),
        (surface[image, row, col - 1], surface[image, row, col + 1]),
    ]
    bends = [(low - high, 2 * (low - 2 * middle + high)) for low, high in sides]
    return torch.stack([(slope / bend.clamp_max(-1e-12)).clamp(-1, 1) for slope, bend in bends], 1)


# ---- chips against each other


def find_duplicates(figures):
    """(N,) the first chip that has the same pixels, MR and HR; -1 where a chip is the first."""
    keys = np.concatenate([figures[key] for key in figures if key.endswith("_digest")], 1)
    _, first, group = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    first = first[group.reshape(-1)]
    return np.where(first < np.arange(len(first)), first, -1)


def find_leaks(figures, chip):
    """Chips that a later split (train, val, test) has too: leak (N,) its first such chip or -1, and
    leak_by (N,) "pixels", where MR or HR is the same, or "ground", where the MR windows overlap.

    chip: (rows, cols) of MR. Chips without a source are compared by pixels alone.
    """
    split = figures["split"]
    leak, by = np.full(len(split), -1), np.full(len(split), "", "U6")
    for key in [key for key in figures if key.endswith("_digest")]:
        there = np.flatnonzero(figures[key].any(1))
        for chips in shared_by_splits(figures[key][there], there, split):
            for here in np.unique(split[chips])[:-1]:
                mine = chips[split[chips] == here]
                leak[mine], by[mine] = chips[split[chips] > here][0], "pixels"
    frame, box = ground_boxes(figures, chip)
    known = np.flatnonzero(frame >= 0)
    if len(known):
        # cells as large as the largest box: a box meets four at most, those of its corners
        cell = (box[:, 1] - box[:, 0])[known].max(0)
        edges = np.floor((box[known] + [[SLACK], [-SLACK]]) / cell).astype(int)  # (n, 2, 2)
        cells = np.concatenate(
            [
                np.column_stack([frame[known], edges[:, i, 0], edges[:, j, 1]])
                for i in (0, 1)
                for j in (0, 1)
            ]
        )
        for chips in shared_by_splits(cells, np.tile(known, 4), split):
            mine = chips[leak[chips] < 0]
            low = np.maximum(box[mine, None, 0], box[chips, 0])
            high = np.minimum(box[mine, None, 1], box[chips, 1])
            meets = (high - low > SLACK).all(2) & (split[chips] > split[mine, None])
            found = meets.any(1)
            leak[mine[found]] = chips[meets.argmax(1)[found]]
            by[mine[found]] = "ground"
    return leak, by


def shared_by_splits(keys, chips, split):
    """Yield the chips, ascending, of every key that chips of more than one split have.

    keys: (n, k) int. chips: (n,). split: (N,) of all chips.
    """
    _, group = np.unique(keys, axis=0, return_inverse=True)
    group = group.reshape(-1)
    lowest, highest = np.full(group.max() + 1, len(SPLITS)), np.full(group.max() + 1, -1)
    np.minimum.at(lowest, group, split[chips])
    np.maximum.at(highest, group, split[chips])
    mixed = (lowest < highest)[group]
    order = np.argsort(group[mixed], kind="stable")
    group, chips = group[mixed][order], chips[mixed][order]
    if len(chips):
        for part in np.split(chips, np.flatnonzero(np.diff(group)) + 1):
            yield np.unique(part)


def ground_boxes(figures, chip):
    """Where each chip lies: frame (N,) int64, -1 unknown; box (N, 2, 2) its lowest and highest
    (row, col).

    A frame is a CRS, counted in pixels of its first chip; without georeference it is the source.
    """
    placed = ~np.isnan(figures["transform"]).any(1)
    a, b, c, d, e, f = np.where(placed, figures["transform"].T, 0)
    one, nil = np.ones(len(placed)), np.zeros(len(placed))
    there = np.array([[e, d, f], [b, a, c], [nil, nil, one]])  # row, col, 1 -> y, x, 1
    here = np.array([[one, nil, figures["row"]], [nil, one, figures["col"]], [nil, nil, one]])
    matrices = np.where(placed, there, here).transpose(2, 0, 1)
    named = np.array([name != "" for name in figures["sources"]])[figures["source"]]
    alone = np.where(named, len(figures["crs_names"]) + figures["source"], -1)
    frame = np.where(placed, figures["crs"], alone)
    _, first, number = np.unique(frame, return_index=True, return_inverse=True)
    matrices = np.linalg.solve(matrices[first][number.reshape(-1)], matrices)
    corners = np.array([[0, 0], [0, chip[1]], [chip[0], 0], chip])
    ground = corners @ matrices[:, :2, :2].swapaxes(1, 2) + matrices[:, None, :2, 2]  # (N, 4, 2)
    return frame, np.stack([ground.min(1), ground.max(1)], 1)


# ---- what it comes to


def write_table(path, figures):
    """check.csv: one row a chip, a figure that there is not left empty."""
    columns = {
        "split": [SPLITS[number] for number in figures["split"]],
        "mr_source": [figures["sources"][number] for number in figures["source"]],
        "row": figures["row"],
        "col": figures["col"],
        "shift_row": figures["shift"][:, 0],
        "shift_col": figures["shift"][:, 1],
        "shift": np.hypot(*figures["shift"].T),
        "confidence": figures["confidence"],
    }
    columns |= {
        f"correlation_{name}": column
        for name, column in zip(figures["shared"], figures["correlation"].T, strict=True)
    }
    wanted = "valid mr_flat hr_flat mr_saturated hr_saturated days".split()
    columns |= {key: figures[key] for key in wanted if key in figures}
    for key in ("duplicate_of", "leak"):
        columns[key] = np.where(figures[key] < 0, "", figures[key].astype(str))
    columns["leak_by"] = figures["leak_by"]

    def text(value):
        if isinstance(value, str | np.integer):
            return value
        return "" if math.isnan(value) else f"{value:.5g}"

    rows = ([n, *map(text, row)] for n, row in enumerate(zip(*columns.values(), strict=True)))
    with table(path, ["chip", *columns]) as lines:
        lines.writerows(rows)


def write_flags(path, figures, max_shift, min_correlation):
    """flags.csv of a store: a chip and why `train.py --skip-flagged` shall leave it out."""
    shift, alike = np.hypot(*figures["shift"].T), mean_correlation(figures)
    leak, reasons, counts = figures["leak"], {}, Counter()

    def flag(chips, kind, why):
        for chip in chips.tolist():
            reasons.setdefault(chip, []).append(why(chip))
        counts[kind] = len(chips)

    if max_shift is not None:
        chips = np.flatnonzero(shift > max_shift)
        flag(chips, "shifted", lambda i: f"shifted by {shift[i]:.2f} MR pixels")
    if min_correlation is not None:
        chips = np.flatnonzero(alike < min_correlation)
        flag(chips, "unlike", lambda i: f"band correlation {alike[i]:.2f}")
    # the training side alone: what is held out stays what others have measured on
    chips = np.flatnonzero((leak >= 0) & (figures["split"] == SPLITS.index("train")))
    held = [SPLITS[number] for number in figures["split"]]
    flag(
        chips,
        "leaking",
        lambda i: f"same {figures['leak_by'][i]} as {held[leak[i]]} chip {leak[i]}",
    )
    there = (path / "flags.csv").is_file()
    with table(path / "flags.csv", ["chip", "reason"]) as lines:
        lines.writerows((chip, "; ".join(reasons[chip])) for chip in sorted(reasons))
    print(
        f"  {'replaced' if there else 'wrote'} {path / 'flags.csv'}: {len(reasons)} of "
        f"{len(shift)} chips flagged ({', '.join(f'{n} {kind}' for kind, n in counts.items())}); "
        "train.py --skip-flagged leaves them out"
    )


def mean_correlation(figures):
    """(N,) over the shared bands that are not constant, NaN where none is."""
    known = np.isfinite(figures["correlation"])
    total = figures["correlation"].sum(1, where=known)
    return np.divide(total, known.sum(1), out=np.full(len(total), np.nan), where=known.any(1))


def report(name, figures, store):
    """Print what the figures say: counts, middle and tail, the worst chips."""
    split, shift, alike = figures["split"], figures["shift"], figures["correlation"]
    number = {SPLITS[s]: n for s, n in enumerate(np.bincount(split, minlength=3).tolist())}
    pairs, length = int(store.has_hr.sum()), np.hypot(*shift.T)
    known = np.isfinite(length)
    counts = ", ".join(f"{n} {s}" for s, n in number.items())
    print(f"{name}: {len(split)} chips ({counts}), {pairs} pairs")
    if known.any():
        middle, tail = np.quantile(length[known], [0.5, 0.95])
        rows, cols = np.median(shift[known], 0)
        print(
            f"  shift        median {middle:.2f}, 95th percentile {tail:.2f}, largest "
            f"{length[known].max():.2f} MR pixels; median {rows:+.2f} rows, {cols:+.2f} columns"
        )
        print(f"               largest: {worst(length, figures, '.2f')}")
    if pairs and not figures["shared"]:
        mr, hr = (",".join(store.meta["bands"][sensor]) for sensor in ("mr", "hr"))
        print(
            f"  likeness     neither shift nor correlation is known: MR ({mr}) and HR ({hr}) have "
            "no band in common"
        )
    elif pairs > known.sum():
        print(
            f"               {pairs - known.sum()} of {pairs} pairs: too little in common to tell"
        )
    for band, column in zip(figures["shared"], alike.T, strict=True):
        if np.isfinite(column).any():
            middle, tail = np.nanquantile(column, [0.5, 0.05])
            print(f"  correlation  {band}: median {middle:.2f}, 5th percentile {tail:.2f}")
    if np.isfinite(alike).any():
        print(f"               lowest: {worst(-mean_correlation(figures), figures, '.2f', -1)}")
    valid = figures["valid"]
    print(f"  nodata       {1 - valid.mean():.2%} of pixels, in {(valid < 1).sum()} chips")
    for sensor in ("mr", "hr"):
        if f"{sensor}_flat" in figures:
            flat, full = figures[f"{sensor}_flat"], figures[f"{sensor}_saturated"]
            print(
                f"  {sensor}           {np.nanmean(full):.3%} of pixels saturated, in "
                f"{(full > 0).sum()} chips; {(flat > 0).sum()} chips with a constant band"
            )
    days = np.abs(figures["days"][np.isfinite(figures["days"])])
    if len(days):
        middle, tail = np.quantile(days, [0.5, 0.95])
        print(f"  dates        {middle:.0f} days apart in the median, 95th percentile {tail:.0f}")
    first = figures["duplicate_of"]
    again = first >= 0
    across = int((split[again] != split[first[again]]).sum())
    print(f"  duplicates   {again.sum() - across} within a split, {across} across")
    for by, what in (("pixels", "the same pixels as"), ("ground", "ground of")):
        found = figures["leak_by"] == by
        if found.any():
            sides = Counter(
                (SPLITS[split[i]], SPLITS[split[figures["leak"][i]]]) for i in np.flatnonzero(found)
            )
            text = ", ".join(f"{n} {a} chips have {what} {b} chips" for (a, b), n in sides.items())
            print(f"  leaks        {text}")
    if not figures["leak_by"].any():
        print("  leaks        none between splits")
    codes = [name for name in figures["crs_names"] if name]
    if len(codes) > 1:
        print(f"               the ground of {', '.join(codes)} is not compared with each other")


def worst(values, figures, form, sign=1, number=3):
    """The chips with the largest values, as text; NaN counts as none."""
    order = np.argsort(-values, kind="stable")[: min(number, np.isfinite(values).sum())]
    return ", ".join(f"chip {i} ({sign * values[i]:{form}})" for i in order)


def draw(path, name, figures, store):
    """check.png: the shifts as a scatter, the other figures as histograms."""
    from matplotlib.figure import Figure

    shift = figures["shift"][np.isfinite(figures["shift"][:, 0])]
    length = np.hypot(*shift.T)
    figure = Figure(figsize=(12, 7))
    title = f"{name}: {len(store)} chips, {int(store.has_hr.sum())} pairs"
    figure.suptitle(title, parse_math=False)
    (where, far, alike), (valid, full, apart) = figure.subplots(2, 3)
    where.scatter(shift[:, 1], shift[:, 0], s=6, alpha=0.5, linewidths=0)
    edge = max(1.0, 1.05 * np.abs(shift).max(initial=0))
    where.set(xlim=(-edge, edge), ylim=(edge, -edge), aspect="equal", xlabel="columns")
    where.set(title="shift of HR against MR (MR pixels)", ylabel="rows")
    where.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    where.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    far.hist(length, 40)
    far.set(title="length of the shift (MR pixels)", ylabel="pairs")
    for band, column in zip(figures["shared"], figures["correlation"].T, strict=True):
        alike.hist(column[np.isfinite(column)], 40, histtype="step", label=band)
    alike.set(title="band correlation", ylabel="pairs")
    shares = np.linspace(0, 1, 41)
    valid.hist(figures["valid"], shares)
    valid.set(title="valid share", ylabel="chips", yscale="log", ylim=(0.5, None))
    for sensor in ("mr", "hr"):
        share = figures.get(f"{sensor}_saturated", np.empty(0))
        full.hist(share[np.isfinite(share)], shares, histtype="step", label=sensor)
    full.set(title="saturated share", ylabel="chips", yscale="log", ylim=(0.5, None))
    apart.hist(figures["days"][np.isfinite(figures["days"])], 40)
    apart.set(title="HR date after MR date (days)", ylabel="pairs")
    for axis in (alike, full):
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    empty = {where: shift, alike: figures["correlation"], far: shift, apart: figures["days"]}
    for axis, values in empty.items():
        if not np.isfinite(values).any():
            axis.text(0.5, 0.5, "none known", transform=axis.transAxes, ha="center")
    figure.tight_layout()
    save_figure(figure, path)
