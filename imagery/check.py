"""Are the pairs of a store what they seem? Shift, likeness, holes, doubles and leaks of every chip.

    python data.py check pairs
    python data.py check pairs --max-shift 1       and train.py --skip-flagged leaves those out

Writes check.csv, one row a chip with all figures, and check.png, their histograms.
"""

import hashlib
import io
import math
import os
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from datetime import date
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import SPLITS, Store, read_index, resample, usable
from figures import optional, save_figure
from imagery import pack, raster
from imagery.chips import in_order
from imagery.shards import table

BATCH_BYTES = 2**22  # stored pixels at a time: what is made of them stays in the processor's cache
REACH = 8  # MR pixels up to which shifts are searched, along rows and columns
BLUR = 0.175  # cycles per pixel, Gaussian: beyond it an MR image is mostly aliasing and noise
EVIDENCE = 100  # of a shift, see measure_shift; unrelated chips of 32 to 128 pixels reach 40 to 80
SLACK = 0.01  # of an MR pixel, by which neighbours may overlap; georeferences are rounded
PLATEAU = 10  # pixels of a chip at the highest value of all, in the mean: the sensor is full


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
    if bare and (flagging or out is None):
        raise ValueError(
            f"{path}: no store, so --out DIR must say where check.csv goes, and nothing can be "
            "flagged by --max-shift or --min-correlation; make a store with data.py pack"
        )
    out = path if out is None else Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if not bare:
        figures = examine(path, path, out)
        if flagging:
            shift = math.inf if max_shift is None else max_shift
            write_flags(path, figures, shift, -2 if min_correlation is None else min_correlation)
        return figures
    with tempfile.TemporaryDirectory(prefix="check-", dir=out, ignore_cleanup_errors=True) as made:
        store = Path(made) / "store"
        with redirect_stdout(io.StringIO()) as said:
            # half of a chip's pixels are enough for what check asks, and tell of the nodata
            pack.pack(read_geotiff(path), store, min_valid=0.5, val=0)
        print(said.getvalue().replace(str(store), str(out)), end="")
        for name in ("contact.png", "skipped.csv"):  # of which it speaks
            if (store / name).is_file():
                os.replace(store / name, out / name)
        return examine(store, path, out)


def examine(path, name, out):
    """Measure, report and draw the store at `path`, called `name`; returns the figures."""
    store = Store(path)
    figures = columns_of(path, store) | measure(store)
    figures["duplicate_of"] = find_duplicates(figures)
    figures["leak"], figures["leak_by"] = find_leaks(figures, store.meta["shape"]["mr"][1:])
    write_table(out / "check.csv", figures)
    report(name, figures, store)
    picture = out / "check.png"
    picture.unlink(missing_ok=True)  # of other figures
    with optional(picture):
        draw(picture, name, figures, store)
    print(f"  see {out / 'check.csv'}" + (f" and {picture}" if picture.is_file() else ""))
    return figures


def columns_of(path, store):
    """Columns of index.csv: source (N,) numbers into sources, row, col, split, valid, days, crs
    (N,) numbers into crs_names, transform (N, 6).

    days: (N,) from the MR date to the HR date, NaN where one is unknown. transform: of the MR chip,
    NaN where it is not georeferenced.
    """
    numbers, codes = {}, {}
    columns = {key: [] for key in "source row col split valid days crs transform".split()}
    with usable(path / "index.csv"):
        for row in read_index(path, store.meta):
            dates = [row[key][:10] for key in ("mr_date", "hr_date")]
            mr, hr = (date.fromisoformat(d).toordinal() if all(dates) else math.nan for d in dates)
            values = (
                numbers.setdefault(row["mr_source"], len(numbers)),
                int(row["row"] or 0),
                int(row["col"] or 0),
                SPLITS.index(row["split"]),
                float(row["valid"]),
                hr - mr,
                codes.setdefault(row["crs"], len(codes)),
                [float(row[key] or "nan") for key in "abcdef"],
            )
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
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
    own = meta["bands"]
    names = [name for name in own.get("hr") or [] if name in own["mr"]]
    figures = {
        "shift": np.full((count, 2), np.nan),
        "confidence": np.full(count, np.nan),
        "correlation": np.full((count, len(names)), np.nan),
    }
    for sensor in store.sensors:
        figures[f"{sensor}_digest"] = np.zeros((count, 2), np.int64)
        figures[f"{sensor}_top"] = np.full((count, len(own[sensor]), 2), np.nan)

    def figures_of(chips):
        """The chips, all with HR or all without, and {name: their figures}."""
        sensors = store.sensors if store.has_hr[chips[0]] else ["mr"]
        batch, found = store.batch(chips, sensors), {}
        for sensor in sensors:
            pixels = batch[sensor].numpy()
            found[f"{sensor}_top"] = highest(pixels)
            found[f"{sensor}_digest"] = [digest(chip) for chip in pixels]
        if names and len(sensors) > 1:
            mr, hr = (batch[s][:, [own[s].index(name) for name in names]] for s in sensors)
            mr, hr = mr.float(), resample(hr, batch["hr_window"], mr.shape[2:])
            found["correlation"] = correlate(mr, hr)
            found["shift"], found["confidence"] = measure_shift(mr, hr)
        return chips, found

    chip_bytes = sum(
        math.prod(meta["shape"][s]) * np.dtype(meta["dtype"][s]).itemsize for s in store.sensors
    )
    size = int(np.clip(BATCH_BYTES // chip_bytes, 1, 256))
    batches = [
        chips[start : start + size]
        for chips in map(np.flatnonzero, (store.has_hr, ~store.has_hr))
        for start in range(0, len(chips), size)
    ]
    # a thread for each processor, each of which works alone: small arrays gain nothing by sharing
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        bar = tqdm(in_order(pool, figures_of, batches, 2 * threads), "check", len(batches))
        for chips, found in bar:
            for key, values in found.items():
                figures[key][chips] = values
    torch.set_num_threads(threads)
    for sensor in store.sensors:
        has = store.has_hr if sensor == "hr" else np.full(count, True)
        top, area = figures.pop(f"{sensor}_top")[has], math.prod(meta["shape"][sensor][1:])
        flat, full = (figures.setdefault(f"{sensor}_{key}", np.full(count, np.nan))
                      for key in ("flat", "saturated"))  # fmt: skip
        flat[has] = (top[:, :, 1] == area).sum(1)
        full[has] = saturated(top, np.dtype(meta["dtype"][sensor])) / area
    return figures | {"shared": names}


def digest(chip):
    """(2,) int64 that equal pixels share: 128 bits of SHA-256, for which processors have a way."""
    return np.frombuffer(hashlib.sha256(np.ascontiguousarray(chip)).digest()[:16], np.int64)


def highest(pixels):
    """The highest value of each chip and band, and how many pixels have it: (B, C, H, W) ->
    (B, C, 2) float64."""
    top = pixels.max((2, 3), keepdims=True)
    return np.stack([top[..., 0, 0], (pixels == top).sum((2, 3))], -1, dtype=np.float64)


def saturated(top, dtype):
    """Pixels at which the sensor is full, the mean over the bands, of `highest` of all chips: (N,).

    Full is the highest value that the dtype has, or the highest that a band has anywhere, where
    many pixels of a chip have that: few have a natural maximum.
    """
    value, count = np.moveaxis(top, -1, 0)  # (N, C)
    most = value.max(0)
    count = np.where(value == most, count, 0)
    full = count.sum(0) > PLATEAU * (count > 0).sum(0)
    if dtype.kind in "iu":
        full |= most == np.iinfo(dtype).max
    return (count * full).mean(1)


def correlate(a, b):
    """Pearson's correlation by chip and band: (B, C, h, w) twice -> (B, C), NaN if constant."""
    # cubic weights leave a constant constant up to float32 rounding
    small = [4e-6 * x.abs().amax((2, 3)) for x in (a, b)]
    a, b = (x - x.mean((2, 3), keepdim=True) for x in (a, b))
    flat = [x.abs().amax((2, 3)) <= least for x, least in zip((a, b), small, strict=True)]
    scale = torch.linalg.vector_norm(a, dim=(2, 3)) * torch.linalg.vector_norm(b, dim=(2, 3))
    return torch.where(flat[0] | flat[1], math.nan, (a * b).sum((2, 3)) / scale)


def measure_shift(mr, hr):
    """How far HR's content lies from MR's, by phase correlation. Source: Kuglin and Hines 1975.

    mr, hr: (B, C, h, w) float32, the same bands, HR resampled to MR's pixels. Returns shift (B, 2)
    float64, rows and columns in MR pixels, positive where HR's content lies further down and right,
    NaN where the two have too little in common to tell or are less alike when moved by it;
    confidence (B,) the share of the cross power that is in phase there, 0 to 1.

    The cross power is of image gradients and summed over the bands, so that frequencies in which
    the bands disagree count less. It is whitened softly: R / (|R| + 4 mean|R|). Whitened fully,
    the many frequencies without content would outvote a smooth landscape. The peak is sought on
    ever finer grids (Guizar-Sicairos et al. 2008), and HR is moved by the shift found so far, since
    two windows at one place pull the estimate to 0.
    """
    rows, cols = mr.shape[2:]
    # a border of MR is left for HR's window to move in; a longer shift is measured 5 % too short
    margin = min(REACH, min(rows, cols) // 16)
    reach = min(REACH, max(min(rows, cols) // 4, 1))
    size = torch.tensor([rows - 2 * margin, cols - 2 * margin])
    y, x = torch.fft.fftfreq(size[0]), torch.fft.rfftfreq(size[1])
    # of a real image the columns of negative frequency are those of positive, which count for both
    both = torch.where((x == 0) | (x == 0.5), 1.0, 2.0)
    hann, hann_x = (torch.hann_window(n, periodic=False) for n in size)
    hann = hann[:, None] * hann_x
    radius = y[:, None] ** 2 + x**2
    weight = radius * torch.exp(-radius / (2 * BLUR**2))

    def spectrum(images):
        images = images - images.mean((2, 3), keepdim=True)
        images = images / images.square().mean((2, 3), keepdim=True).sqrt().clamp_min(1e-12)
        return torch.fft.rfft2(images * hann)

    inner = np.s_[:, :, margin : rows - margin, margin : cols - margin]
    mr, near = mr[inner], hr[inner]
    fixed = spectrum(mr).conj()
    shift, alike = torch.zeros(len(mr), 2, dtype=torch.float64), []
    for span, step in ((reach, 0.5), (0.75, 0.05), (0.2, 0.01)):
        moved = shift.clamp(-margin, margin)
        if alike:
            ground = torch.cat([margin + moved, size.expand(len(mr), 2)], 1)
            near = resample(hr, ground, size.tolist())
        alike.append(correlate(mr, near).nanmean(1))
        cross = (spectrum(near) * fixed).sum(1) * weight
        power = cross.abs()
        middle = (power * both).sum((1, 2), keepdim=True) / size.prod()
        cross = cross * both / (power + 4 * middle).clamp_min(1e-20)
        ticks = torch.arange(-span, span + step / 2, step, dtype=torch.float64)
        ticks = (shift - moved)[..., None] + ticks  # (B, 2, T)
        rise, run = (
            torch.polar(torch.ones(()), (2 * math.pi * t[..., None] * f).float())
            for t, f in zip(ticks.unbind(1), (y, x), strict=True)
        )
        surface = (rise @ cross @ run.mT).real  # (B, T, T)
        peak, place = surface.flatten(1).max(1)
        count = surface.shape[-1]
        place = torch.stack([place // count, place % count], 1)
        shift = moved + ticks.gather(2, place[..., None])[..., 0]
    power = cross.abs()
    total = power.sum((1, 2)).clamp_min(1e-20)
    confidence = (peak / total).clamp(0, 1).double()
    # Gaussian log likelihood ratio, of as many frequencies as carry the power
    frequencies = total.square() / (power.square() / both).sum((1, 2)).clamp_min(1e-20)
    evidence = -frequencies * torch.log1p(-confidence.square().clamp_max(1 - 1e-6))
    # shadows that wander over a ridge have a peak of their own, far from where the ground lies
    shift[(evidence < EVIDENCE) | (alike[-1] < alike[0] - 0.01)] = math.nan
    return shift, confidence


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

    def search(kind, keys, chips, meets):
        """Among chips of one key: keys (n, k) int, chips (n,); meets(i, others) -> (m,) bool."""
        group = np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)
        order = np.argsort(group, kind="stable")
        for some in np.split(chips[order], np.flatnonzero(np.diff(group[order])) + 1):
            mixed = len(some) > 1 and np.ptp(split[some])
            for i in some[leak[some] < 0] if mixed else ():
                later = some[split[some] > split[i]]
                later = later[meets(i, later)]
                if len(later):
                    leak[i], by[i] = later.min(), kind

    for key in [key for key in figures if key.endswith("_digest")]:
        some = np.flatnonzero(figures[key].any(1))
        search("pixels", figures[key][some], some, lambda _, others: others >= 0)
    frame, places = corners_on_ground(figures, chip)
    some = np.flatnonzero(np.isfinite(places).all((1, 2)))
    low, high, frame = places[some].min(1), places[some].max(1), frame[some]
    # cells as large as a frame's largest box: a box meets four at most, those of its corners
    cell = np.zeros((frame.max(initial=0) + 1, 2))
    np.maximum.at(cell, frame, high - low)
    cells = [
        np.column_stack([frame, np.floor(np.stack([x, y], 1) / cell[frame])])
        for x in (low[:, 0], high[:, 0])
        for y in (low[:, 1], high[:, 1])
    ]
    keys, slack = np.concatenate(cells).astype(np.int64), SLACK / min(chip)
    search("ground", keys, np.tile(some, 4), lambda i, o: overlap(places[i], places[o], slack))
    return leak, by


def corners_on_ground(figures, chip):
    """Where each chip lies: frame (N,) int64, and its corners there, in order, (N, 4, 2), NaN where
    nothing is known. A frame is the CRS, of several longitude and latitude; without georeference it
    is the source, in pixels."""
    row, col = np.array([[0, 0, chip[0], chip[0]], [0, chip[1], chip[1], 0]])
    a, b, c, d, e, f = figures["transform"].T[..., None]
    places = np.stack([a * col + b * row + c, d * col + e * row + f], 2)
    pixels = np.stack([figures["col"][:, None] + col, figures["row"][:, None] + row], 2)
    placed, crs, names = np.isfinite(a[:, 0]), figures["crs"], figures["crs_names"]
    known = np.array([name != "" for name in figures["sources"]])[figures["source"]]
    places[known & ~placed] = pixels[known & ~placed]
    frame = np.where(placed, crs, len(names) + figures["source"])
    codes, degrees = {*crs[placed].tolist()}, len(names) + len(figures["sources"])
    for number in codes if len(codes) > 1 else ():
        some = placed & (crs == number)
        try:
            ground = raster.project(names[number], "EPSG:4326", *places[some].reshape(-1, 2).T)
        except ValueError as error:
            print(f"warning: ground is compared within the projection alone: {error}")
            continue
        places[some], frame[some] = np.stack(ground, 1).reshape(-1, 4, 2), degrees
    # a chip across the line where dates change would be all around the Earth
    places[(frame == degrees) & (np.ptp(places[..., 0], 1) > 180)] = np.nan
    return frame, places


def overlap(a, b, slack):
    """Whether a convex quadrilateral (4, 2), corners in order, and others (n, 4, 2) share more than
    a rim, by `slack` of their size: then no edge of either separates them. Returns (n,) bool."""
    a = np.broadcast_to(a, b.shape)
    edges = np.concatenate([q - np.roll(q, 1, 1) for q in (a, b)], 1)  # (n, 8, 2)
    across = edges[..., ::-1] * [1, -1]
    a, b = (np.einsum("npk,nek->nep", q, across) for q in (a, b))  # of each corner, along each
    shared = np.minimum(a.max(2), b.max(2)) - np.maximum(a.min(2), b.min(2))
    return (shared > slack * np.ptp(a, 2)).all(1)


# ---- what it comes to


def write_table(path, figures):
    """check.csv: one row a chip, a figure that there is not left empty."""
    columns = {
        "split": np.array(SPLITS)[figures["split"]],
        "mr_source": [figures["sources"][number] for number in figures["source"]],
        **{key: figures[key] for key in ("row", "col")},
        "shift_row": figures["shift"][:, 0],
        "shift_col": figures["shift"][:, 1],
        "shift": np.hypot(*figures["shift"].T),
        "confidence": figures["confidence"],
    }
    for name, column in zip(figures["shared"], figures["correlation"].T, strict=True):
        columns[f"correlation_{name}"] = column
    wanted = "valid mr_flat hr_flat mr_saturated hr_saturated days".split()
    columns |= {key: figures[key] for key in wanted if key in figures}
    for key in ("duplicate_of", "leak"):
        columns[key] = np.where(figures[key] < 0, "", figures[key].astype(str))
    columns["leak_by"] = figures["leak_by"]

    def text(value):
        if isinstance(value, str | np.integer):
            return value
        return "" if math.isnan(value) else f"{value:.5g}"

    with table(path, ["chip", *columns]) as lines:
        for n, row in enumerate(zip(*columns.values(), strict=True)):
            lines.writerow([n, *map(text, row)])


def write_flags(path, figures, max_shift, min_correlation):
    """flags.csv of a store: a chip and why `train.py --skip-flagged` shall leave it out."""
    shift, alike, leak = np.hypot(*figures["shift"].T), mean_correlation(figures), figures["leak"]
    split, by = figures["split"], figures["leak_by"]
    # of leaks the training side alone: what is held out stays what others have measured on
    leaking = (leak >= 0) & (split == SPLITS.index("train"))
    kinds = [
        ("shifted", shift > max_shift, lambda i: f"shifted by {shift[i]:.2f} MR pixels"),
        ("unlike", alike < min_correlation, lambda i: f"band correlation {alike[i]:.2f}"),
        ("leaking", leaking, lambda i: f"same {by[i]} as {SPLITS[split[leak[i]]]} chip {leak[i]}"),
    ]
    flagged = np.flatnonzero(np.any([where for _, where, _ in kinds], 0)).tolist()
    there = (path / "flags.csv").is_file()
    with table(path / "flags.csv", ["chip", "reason"]) as lines:
        for i in flagged:
            lines.writerow((i, "; ".join(why(i) for _, where, why in kinds if where[i])))
    counts = ", ".join(f"{np.count_nonzero(where)} {kind}" for kind, where, _ in kinds)
    print(
        f"  {'replaced' if there else 'wrote'} {path / 'flags.csv'}: {len(flagged)} of "
        f"{len(split)} chips flagged ({counts}); train.py --skip-flagged leaves them out"
    )


def mean_correlation(figures):
    """(N,) over the shared bands that are not constant, NaN where none is."""
    known = np.isfinite(figures["correlation"])
    total = figures["correlation"].sum(1, where=known)
    return np.divide(total, known.sum(1), out=np.full(len(total), np.nan), where=known.any(1))


def report(name, figures, store):
    """Print what the figures say: counts, middle and tail, the worst chips."""

    def line(title, *values):
        print(f"  {title:12} {''.join(values)}")

    def spread(values, tail, form=".2f"):
        middle, end = np.nanquantile(values, [0.5, tail])
        return f"median {middle:{form}}, {100 * tail:.0f}th percentile {end:{form}}"

    split, shift, alike = figures["split"], figures["shift"], mean_correlation(figures)
    pairs, length = int(store.has_hr.sum()), np.hypot(*shift.T)
    known = np.isfinite(length)
    counts = np.bincount(split, minlength=3).tolist()
    counts = ", ".join(f"{n} {s}" for s, n in zip(SPLITS, counts, strict=True))
    print(f"{name}: {len(split)} chips ({counts}), {pairs} pairs")
    if known.any():
        rows, cols = np.median(shift[known], 0)
        most = f", largest {length[known].max():.2f} MR pixels; "
        line("shift", spread(length, 0.95), most, f"median {rows:+.2f} rows, {cols:+.2f} columns")
        line("", "largest: ", worst(length, length))
    if not pairs:
        line("likeness", "no pair, so check.png has no shifts, correlations or dates to show")
    elif not figures["shared"]:
        mr, hr = (",".join(store.meta["bands"][sensor]) for sensor in ("mr", "hr"))
        line("likeness", f"neither shift nor correlation is known: MR ({mr}) and HR ({hr}) have "
             "no band in common")  # fmt: skip
    elif pairs > known.sum():
        line("", f"{pairs - known.sum()} of {pairs} pairs: too little in common to tell")
    for band, column in zip(figures["shared"], figures["correlation"].T, strict=True):
        if np.isfinite(column).any():
            line("correlation", f"{band}: ", spread(column, 0.05))
    if np.isfinite(alike).any():
        line("", "lowest: ", worst(-alike, alike))
    valid = figures["valid"]
    line("nodata", f"{1 - valid.mean():.2%} of pixels, in {(valid < 1).sum()} chips")
    for sensor in store.sensors:
        flat, full = figures[f"{sensor}_flat"], figures[f"{sensor}_saturated"]
        line(sensor, f"{np.nanmean(full):.3%} of pixels saturated, in {(full > 0).sum()} chips; "
             f"{(flat > 0).sum()} chips with a constant band")  # fmt: skip
    days = np.abs(figures["days"])
    if np.isfinite(days).any():
        line("dates", "days apart: ", spread(days, 0.95, ".0f"))
    first = figures["duplicate_of"]
    again = first >= 0
    across = int((split[again] != split[first[again]]).sum())
    line("duplicates", f"{again.sum() - across} within a split, {across} across")
    for by, what in (("pixels", "the same pixels as"), ("ground", "ground of")):
        chips = np.flatnonzero(figures["leak_by"] == by)
        sides = Counter((SPLITS[split[i]], SPLITS[split[figures["leak"][i]]]) for i in chips)
        if sides:
            line("leaks", ", ".join(f"{n} {a} chips have {what} {b} chips"
                                    for (a, b), n in sides.items()))  # fmt: skip
    if not figures["leak_by"].any():
        line("leaks", "none between splits")


def worst(order, values, number=3):
    """The chips that are highest in `order`, with their values, as text; NaN counts as none."""
    chips = np.argsort(-order, kind="stable")[: min(number, np.isfinite(order).sum())]
    return ", ".join(f"chip {i} ({values[i]:.2f})" for i in chips)


def draw(path, name, figures, store):
    """check.png: the shifts as a scatter, the other figures as histograms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="tight")
    title = f"{name}: {len(store)} chips, {int(store.has_hr.sum())} pairs"
    figure.suptitle(title, parse_math=False)
    where, *axes = figure.subplots(2, 3).flat
    shift = figures["shift"][np.isfinite(figures["shift"][:, 0])]
    where.scatter(shift[:, 1], shift[:, 0], s=6, alpha=0.5, linewidths=0)
    edge = max(1.0, 1.05 * np.abs(shift).max(initial=0))
    where.set(xlim=(-edge, edge), ylim=(edge, -edge), aspect="equal", xlabel="columns")
    where.set(title="shift of HR against MR (MR pixels)", ylabel="rows")
    where.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    where.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    bands = dict(zip(figures["shared"], figures["correlation"].T, strict=True))
    full = {sensor: figures[f"{sensor}_saturated"] for sensor in store.sensors}
    shares = np.linspace(0, 1, 41)
    for axis, (title, unit, bins, columns) in zip(
        axes,
        (
            ("length of the shift (MR pixels)", "pairs", 40, {"": np.hypot(*shift.T)}),
            ("band correlation", "pairs", 40, bands),
            ("valid share", "chips", shares, {"": figures["valid"]}),
            ("saturated share", "chips", shares, full),
            ("HR date after MR date (days)", "pairs", 40, {"": figures["days"]}),
        ),
        strict=True,
    ):
        axis.set(title=title, ylabel=unit)
        for label, column in columns.items():
            kind = "step" if label else "bar"
            axis.hist(column[np.isfinite(column)], bins, histtype=kind, label=label or None)
        if not any(np.isfinite(column).any() for column in columns.values()):
            axis.text(0.5, 0.5, "none known", transform=axis.transAxes, ha="center")
        elif "" not in columns:
            axis.legend()
        if bins is shares:
            axis.set(yscale="log", ylim=(0.5, None))
    save_figure(figure, path)
