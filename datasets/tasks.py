"""Labelled segmentation tasks, on which an encoder is judged.

A `Task` is a set of square tiles with their labels, splits and origins; whatever the layout on
disk, the probe sees only this. `load_task` reads the published sets of this folder as they come
from their publishers, `load_folder` images and masks, or polygons, of one's own.

Tiles are held as float32: 4 bands at 64 px take 64 KiB a tile, so 100,000 tiles need 6.5 GB, in a
temporary file.
"""

import hashlib
import inspect
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from einops import rearrange
from tqdm import tqdm

from datasets.common import BGRN, SPLITS, find_folder, read_lists, sets
from datasets.images import (
    bounds_in,
    find_masks,
    open_images,
    parse_masks,
    scaling_of,
    tell_units,
    to_unit,
)
from datasets.labels import (
    burn,
    by_name,
    class_ids,
    classes_beside,
    open_masks,
    own_labels,
    read_classes,
    read_polygons,
    some,
)
from imagery import raster
from imagery.bands import IGNORE, positions
from imagery.chips import in_order

AHEAD = 16  # samples that are read at once, at most, and wait to be written
MEMORY = 2**30  # bytes that these may take


@dataclass(frozen=True)
class Task:
    """Tiles of one labelled set, cut without overlap on each image's own pixel grid.

    images: (N, bands, tile, tile) float32 in the files' units, (N, dates, bands, tile, tile) for
        time series; NaN where the image has no data, beyond its right and lower edge, and in the
        dates that it lacks. A np.memmap: take it by batches, never whole.
    labels: (N, tile, tile) int16 class ids, IGNORE where unlabelled; from `load_folder` also where
        the image has no data, while published sets keep their publishers' labels there.
    split: (N,) "train", "val" or "test".
    origin: (N, 3) int64: position in `files`, row and column of the tile's first pixel.
    files: raster.Info of each image, of published sets without their ground. classes: the class
        names, in the order of their ids.
    split_by: in words, what kept the splits apart. nodata: the values that the masks declare as
        nodata, which are IGNORE in the labels.
    name: the set. bands: the name of each band, "" where unknown. positions: which
        of the files' `file_bands` bands they are, from 0. mean, std: (bands,) float64, the
        publisher's, else of the training split. gsd: units per pixel of the files, or None.
    split_hash: 12 hex digits of a SHA-256 over who is in which split. scaling: (scale, offset) of
    each band from pixels to units, as the files are tagged; () of published sets.
    """

    images: np.ndarray
    labels: np.ndarray
    split: np.ndarray
    origin: np.ndarray
    files: tuple
    classes: tuple
    split_by: str
    nodata: tuple
    name: str
    bands: tuple
    positions: tuple
    file_bands: int
    mean: np.ndarray
    std: np.ndarray
    gsd: float | None
    split_hash: str
    scaling: tuple = ()


def load_folder(
    images, masks=None, *, polygons=None, field=None, classes=None, bands=None, ignore_index=None,
    clouds=None, tile=64, splits=None, block=4, val=0.2, test=0.2, split_seed=0,
):  # fmt: skip
    """Read a task from images and masks that are paired by file name without extension, or from
    images and polygons.

    images: as `list_images` takes them, a scene of one file per band being one image. masks: a
    folder or a glob. polygons, field: in place of masks, of `read_polygons`. classes: of
    `read_classes`; without it the ids that occur are the classes and name themselves. bands:
    0-based positions or names; default all, B, G, R, NIR of a scene of one file per band.
    ignore_index: the mask value, or values, that are no label, beside the nodata that a mask
    declares; none of them is a class, so that ids 1 to N with 0 ignored are N classes. clouds:
    products whose masks hide pixels of the images (`parse_masks`). tile: pixels.

    splits: a folder with train.txt, val.txt and test.txt of file names without extension; images
    in none of them are left out. Without it the fractions `val` and `test` are held out: by
    ground, in square blocks of `block` tiles, where all images are georeferenced, whatever their
    CRS, and by whole images elsewhere. Drawn with split_seed.

    Tiles without a single label are dropped. Raises ValueError or FileNotFoundError naming the
    file or flag, what was found and the remedy; headers are all checked before pixels are read.
    """
    ignored = (ignore_index,) if np.ndim(ignore_index) == 0 else tuple(ignore_index)
    listed = None
    if splits is not None:
        listed = read_lists(splits, "{}.txt")
        listed = {n.removesuffix(".tif").removesuffix(".tiff"): s for n, s in listed.items()}
    names = None if classes is None else read_classes(classes)
    found = by_name(images, masks)
    chosen = sorted(found if listed is None else listed)
    if missing := [name for name in chosen if name not in found]:
        raise FileNotFoundError(
            f"{images}: no image named {missing[0]}, which the --splits lists name; add it, or "
            "take the name off its list"
        )
    found = [found[name] for name in chosen]
    hides = find_masks({"mr": found}, parse_masks(clouds=clouds))["mr"]
    sources, _ = open_images(found, hides, "--bands", bands and [str(band) for band in bands])
    files, scaling = tuple(source.info for source in sources), scaling_of(sources[0])
    if odd := [source for source in sources if source.bands != sources[0].bands]:
        raise ValueError(
            f"{odd[0].info.path}: the bands are its {odd[0].bands}, those of other images "
            f"{sources[0].bands}; bring all to one order"
        )
    tell_units(sources, "--images")
    of = masks or polygons
    if polygons is None:
        paths, nodata, label_of = open_masks(masks, chosen, files, names, ignored)
    else:
        drawn = read_polygons(polygons, field, names, ignored)
        names, nodata, paths = drawn.classes, [None], [polygons] * len(files)

        def label_of(k):
            label = burn(drawn, files[k])
            return own_labels(label, label != IGNORE, names, (), polygons)

    side = max(max(file.height, file.width) for file in files)
    if tile > side:
        raise ValueError(
            f"--tile {tile}: the largest image is {side} px wide or high; use at most that"
        )

    def read(k):
        image, label = read_pixels(sources[k], scaling), label_of(k)
        label[np.isnan(image[0])] = IGNORE
        return image, label

    largest = max(file.height * file.width for file in files) * 4 * len(sources[0].bands)
    ahead = max(1, min(AHEAD, MEMORY // largest))
    image, label, origin, _ = gather(read, len(files), tile, "images and masks", ahead)
    if not len(label):
        raise ValueError(
            f"{of}: no labelled pixel in any image; check --ignore-index, nodata, and that images "
            "and labels show the same ground"
        )
    ids = np.flatnonzero(np.bincount(label[label != IGNORE]))
    # a class may be absent from a sample; ids far above the others are fill values, but for the
    # 0 and 255 of a mask of two classes
    fill = ids[-1] >= 2 * len(ids) and np.diff(ids).max(initial=0) > 2
    if names is None and fill and ids.tolist() != [0, 255]:
        position = origin[label.max((1, 2)).argmax(), 0]
        raise ValueError(
            f"{paths[position]}: class id {ids[-1]} found, while all masks hold only "
            f"{some(ids)}; pass --ignore-index {ids[-1]} if that is no class, or name the "
            "classes in --classes"
        )
    if len(ids) < 2:
        raise ValueError(
            f"{of}: all labelled pixels are of class {ids[0]}, which leaves nothing to tell "
            "apart; check --ignore-index and the nodata that the masks declare"
        )
    label, names = number_classes(label, ids, names, {*ignored, *nodata})

    if listed is not None:
        split, split_by = np.array([listed[n] for n in chosen])[origin[:, 0]], "file lists"
    else:
        split, split_by = draw_splits(files, origin, tile, block, val, test, split_seed)
    for name in SPLITS:
        if name not in split:
            raise ValueError(
                f"{of}: no labelled pixel falls in the {name} split ({split_by}, "
                f"{len(label)} labelled tiles); label more, or choose other --splits or --block"
            )
    if (keep := split != "").sum() < len(split):
        image, label, split, origin = image[keep], label[keep], split[keep], origin[keep]
    nodata = tuple(np.unique([value for value in nodata if value is not None]).tolist())
    places = tuple(sources[0].bands)
    mean, std = band_stats(image, np.flatnonzero(split == "train"))
    tiles = (f"{chosen[n]} {row} {col}" for n, row, col in origin)
    return Task(
        image, label, split, origin, files, names, split_by, nodata, "geotiff",
        tuple(files[0].band_names[k] if files[0].band_names else "" for k in places),
        places, files[0].bands, mean, std, files[0].gsd,
        hash_splits(zip(tiles, split, strict=True)), tuple(scaling),
    )  # fmt: skip


def read_pixels(source, scaling):
    """Read one image (bands, rows, cols) float32 in the pixels of files that are tagged by
    `scaling`, NaN in all bands of a pixel without data."""
    pixels, valid = raster.masked(source.read(None, source.bands), source.nodata)
    image, change = pixels.astype(np.float32), to_unit(source, scaling)
    if (change[0] != 1).any() or change[1].any():
        gain, shift = (np.float32(each)[:, None, None] for each in change)
        image = image * gain + shift
    image[:, ~valid] = np.nan
    return image


def load_task(name, root, *, bands=None, tile=None, dates=None, pastis_classes=18, split_seed=0):
    """Read a labelled set as its publisher ships it -> Task, with its splits and statistics.

    name: one of `sets`, or "geotiff" for a folder of one's own (`own_folder`). root: the set's
    folder, or the one it lies in. bands: names, default B, G, R, NIR. tile:
    pixels, default that of the protocol which scores are compared by. dates: of a time series, how
    many, spread evenly; default all. pastis_classes: 18 (without background and void), 19 (without
    void) or 20 (void is a class, though ignored). split_seed: for a set that has no splits.

    Tiles without a single label are dropped. Raises ValueError, FileNotFoundError or OSError in one
    sentence; a split whose size is not the published one is only told, on stderr.
    """
    if name == "geotiff":
        return load_folder(**own_folder(root), bands=bands, tile=tile or 64, split_seed=split_seed)
    known = sets("TASKS")
    if name not in known:
        raise ValueError(f"--task {name}: no such task; choose from {', '.join(known)}, geotiff")
    about = known[name]
    takes = inspect.signature(about.open).parameters
    if dates is not None and ("dates" not in takes or dates < 1):
        raise ValueError(f"--dates {dates}: 1 or more of a time series, --task {name} has no such")
    bands = [band.strip() for band in bands or BGRN]
    places = tuple(positions(bands, about.bands, sentinel=True))
    if lost := [band for band, at in zip(bands, places, strict=True) if at < 0]:
        raise ValueError(
            f"--bands {','.join(bands)}: --task {name} has no {','.join(lost)}; its bands are "
            + ",".join(about.bands)
        )
    options = {"dates": dates, "pastis_classes": pastis_classes, "split_seed": split_seed}
    options = {key: value for key, value in options.items() if key in takes}
    found = about.open(find_folder(about, root), list(places), **options)
    ids, stats = found.ids or about.ids, about.stats if found.stats is None else found.stats
    samples, splits = list(found.split), list(found.split.values())
    if not samples:
        raise ValueError(f"--root {root}: its lists name no sample")
    if lost := [name for name in samples if name not in found.files]:
        raise FileNotFoundError(
            f"--root {root}: {len(lost)} of {len(samples)} listed samples lack a file, the first "
            f"is {lost[0]}; complete the download, or take them off the list"
        )
    counts = tuple(splits.count(split) for split in SPLITS)
    if about.counts not in (None, counts):
        print(
            f"{about.title}: {counts[0]}, {counts[1]} and {counts[2]} samples in train, val and "
            f"test, published are {about.counts[0]}, {about.counts[1]} and {about.counts[2]}; "
            "scores do not compare with published ones",
            file=sys.stderr,
        )
    side = tile or about.tile

    def read(k):
        paths = found.files[samples[k]]
        raw, image = found.label(*paths), found.image(*paths)
        if image.shape[-2:] != raw.shape:
            raise ValueError(
                f"{paths[0]}: {image.shape[-2]} x {image.shape[-1]} pixels, its mask has "
                f"{raw.shape[0]} x {raw.shape[1]}; download it again"
            )
        if side and side > max(raw.shape):
            raise ValueError(
                f"--tile {side}: {paths[0]} is {max(raw.shape)} px wide or high; use at most that"
            )
        if found.dates is not None:  # NaN in the dates that only others have
            lacks = found.dates - len(image)
            image = np.pad(image, [(0, lacks)] + [(0, 0)] * 3, constant_values=np.nan)
        return image, class_ids(raw, np.ones(raw.shape, bool), ids, paths[0])

    images, labels, origin, sizes = gather(read, len(samples), side, name)
    files = tuple(
        raster.Info(found.files[sample][0], *size, len(about.bands), *[None] * 4, about.bands)
        for sample, size in zip(samples, sizes, strict=True)
    )
    split = np.array(splits)[origin[:, 0]]
    for part in SPLITS:
        if part not in split:
            raise ValueError(f"--root {root}: no labelled pixel in the {part} split of the set")
    names = tuple(about.bands[place] for place in places)
    if all(band in stats for band in names):
        mean, std = np.array([stats[band] for band in names], np.float64).T
    else:
        mean, std = band_stats(images, np.flatnonzero(split == "train"))
    return Task(
        images, labels, split, origin, files, found.classes or about.classes, about.splits, (),
        name, names, places, len(about.bands), mean, std, 10.0,
        hash_splits(found.split.items()),
    )  # fmt: skip


def own_folder(root):
    """What `load_folder` takes, of a folder of one's own: root/images (or root/mr) and root/masks,
    root/classes.txt and the lists in root/splits where they are there -> dict."""
    root = Path(root)
    images = next((root / f for f in ("images", "mr") if (root / f).is_dir()), None)
    if images is None or not (root / "masks").is_dir():
        raise FileNotFoundError(
            f"--root {root}: --task geotiff wants the folders images (or mr) and masks in it"
        )
    masks, splits = root / "masks", root / "splits"
    found = {"images": images, "masks": masks, "classes": classes_beside(images, masks)}
    return found | {"splits": splits if splits.is_dir() else None}


def gather(read, count, tile, what, ahead=AHEAD):
    """Read samples by threads and cut them to tiles: (images, labels, origin) as in Task, of the
    tiles that have a label, and the (width, height) of each sample.

    read(k) -> image (..., rows, cols) float32, labels (rows, cols) int16. tile: pixels, None for
    whole samples. what: they are, in words. ahead: samples to read at once. The images go to a
    temporary file without a name (on Windows: one that goes on closing), so that it never stays
    behind. Raises OSError where the disk, of which the environment variable TMPDIR decides, is too
    full; the first error ends it.
    """
    labels, origin, sizes = [], [], []

    def one(k):
        image, label = read(k)
        rows, cols = label.shape
        side = tile or max(rows, cols)
        corner = np.indices((-(-rows // side), -(-cols // side))).reshape(2, -1).T * side
        label = cut(label[None], side, IGNORE)[:, 0]
        keep = (label != IGNORE).any((1, 2))
        tiles = cut(image.reshape(-1, rows, cols), side, np.nan)[keep]
        tiles = tiles.reshape(len(tiles), *image.shape[:-2], side, side)
        return tiles, label[keep], np.insert(corner[keep], 0, k, axis=1), (cols, rows)

    with ThreadPoolExecutor(ahead) as pool, tempfile.TemporaryFile() as file:
        parts = in_order(pool, one, range(count), ahead)
        for tiles, *more in tqdm(parts, what, count, unit="sample"):
            if labels and more[0].shape[1:] != labels[0].shape[1:]:
                sides = sorted({len(labels[0][0]), tiles.shape[-1]})
                raise ValueError(f"{what}: images of {some(sides)} px; pass --tile")
            try:
                file.write(tiles.astype(np.float32).tobytes())
                file.flush()
            except OSError as error:
                raise OSError(
                    f"{tempfile.gettempdir()}: no room for {what} ({error.strerror}); name a "
                    "larger disk in the environment variable TMPDIR, or take fewer --bands"
                ) from error
            for some_of, part in zip((labels, origin, sizes), more, strict=True):
                some_of.append(part)
        labels, origin = np.concatenate(labels), np.concatenate(origin)
        shape = len(labels), *tiles.shape[1:]
        # an empty file cannot be mapped
        images = np.memmap(file, np.float32, "r+", shape=shape) if labels.size else np.empty(shape)
    return images, labels, origin, sizes


def list_tasks():
    """The sets of `load_task` as text: where to get them, what they hold."""
    entries = []
    for name, about in sets("TASKS").items():
        counts = "/".join(map(str, about.counts)) if about.counts else "not published"
        entries += [
            f"{name}: {about.title}",
            f"    {len(about.classes)} classes: {', '.join(about.classes)}",
            f"    bands {','.join(about.bands)}; tiles of "
            + (f"{about.tile} px" if about.tile else "the whole image"),
            f"    train/val/test samples {counts}: {about.splits}",
            f"    {about.url} ({about.size}; licence: {about.licence})",
        ]
    entries += [
        "geotiff: your own images and masks",
        "    GeoTIFFs paired by name in ROOT/images (or mr) and ROOT/masks; where there are any, "
        "class names in ROOT/classes.txt and lists in ROOT/splits/train.txt, val.txt and test.txt",
    ]
    return "\n".join(
        textwrap.fill(entry, 100, subsequent_indent=" " * 8, break_on_hyphens=False)
        for entry in entries
    )


def number_classes(label, ids, names, ignored):
    """Number the classes from 0 without those that are none: (labels int16, names of the classes).

    label: class ids, or IGNORE. ids: those that occur. names: by id, or None, then the classes are
    `ids`. ignored: mask values without a label, which are no class unless another mask labels them.
    """
    kept = ids if names is None else [k for k in range(len(names)) if k in ids or k not in ignored]
    number = np.full(max(kept) + 2, IGNORE, np.int16)  # IGNORE, -1, finds itself at the end
    number[kept] = np.arange(len(kept))
    return number[label], tuple(str(k) if names is None else names[k] for k in kept)


def cut(array, tile, fill):
    """Cut (bands, rows, cols) to (n, bands, tile, tile), row-major, the last ones filled up.

    Tiles never overlap, so that each pixel is scored once and no two splits share one.
    """
    _, rows, cols = array.shape
    padded = np.pad(array, ((0, 0), (0, -rows % tile), (0, -cols % tile)), constant_values=fill)
    return rearrange(padded, "c (r h) (q w) -> (r q) c h w", h=tile, w=tile)


def draw_splits(files, origin, tile, block, val, test, seed):
    """Assign tiles to splits by blocks of ground, or by file where ground is unknown.

    origin (N, 3) as in Task. Returns ((N,) split names, how it was done); "" marks a tile that
    covers ground of another split, which happens where images overlap off each other's grid.
    Raises ValueError if there are fewer groups than splits need.
    """
    bounds = np.array([ground(files[n], *at, tile, files[0].crs) for n, *at in origin.tolist()])
    placed = np.isfinite(bounds).all()
    if placed:
        side = block * tile * files[0].gsd
        centre = (bounds[:, :2] + bounds[:, 2:]) / 2
        # from the upper left corner, where the tiles of the first image begin
        upper_left = bounds[:, 0].min(), bounds[:, 3].max()
        group = np.floor((centre - upper_left) / side)
        how = f"ground, blocks of {side:g} CRS units"
    else:
        group, how = origin[:, :1], "image"
    _, group = np.unique(group, axis=0, return_inverse=True)
    groups = group.max() + 1
    held = [max(1, round(fraction * groups)) for fraction in (val, test)]
    if sum(held) >= groups:
        raise ValueError(
            f"--images: {groups} separate groups (by {how}) are too few for train, val and test; "
            + ("use a smaller --block, --tile, --val or --test" if how != "image" else "add images")
            + ", or --splits with lists of your own"
        )
    names = np.repeat(SPLITS, [groups - sum(held), *held])
    split = np.random.default_rng(seed).permutation(names)[group.ravel()]
    if placed:
        for keep, others in (("test", ("train", "val")), ("val", ("train",))):
            split[overlaps(bounds, split == keep) & np.isin(split, others)] = ""
    return split, how


def ground(file, row, col, tile, crs):
    """(left, bottom, right, top) in a CRS of a tile's part inside its image, NaN without ground."""
    if file.transform is None:
        return (np.nan,) * 4
    a, b, c, d, e, f = file.transform
    place = a, b, c + a * col + b * row, d, e, f + d * col + e * row
    size = {"height": min(tile, file.height - row), "width": min(tile, file.width - col)}
    return bounds_in(replace(file, transform=place, **size), crs)


def overlaps(bounds, chosen):
    """Which boxes (N, 4) share more than a rim with one of the chosen (N,) bool -> (N,) bool."""
    rim = 1e-4 * (bounds[:, 2] - bounds[:, 0]).max()  # rounding of corners, not ground
    left, bottom, right, top = bounds.T
    hit = np.zeros(len(bounds), bool)
    for l0, b0, r0, t0 in bounds[chosen] + [rim, rim, -rim, -rim]:
        hit |= (left < r0) & (right > l0) & (bottom < t0) & (top > b0)
    return hit


def band_stats(images, index=None):
    """Mean and standard deviation of each band over the valid pixels of some tiles.

    images: (N, bands, h, w) or (N, dates, bands, h, w), read one tile at a time. index: the tiles,
    default all. Returns two float64 (bands,); a band without variation gets 1, so that it can be
    divided by, and one without a valid pixel NaN and 1.
    """
    index = range(len(images)) if index is None else index

    def mean_of(value):
        total = count = 0
        for k in index:
            part = rearrange(images[k].astype(np.float64), "... c h w -> c (... h w)")
            valid = ~np.isnan(part)
            total = total + np.where(valid, value(part), 0).sum(1)
            count = count + valid.sum(1)
        with np.errstate(invalid="ignore"):  # 0 / 0 = NaN is a band without data
            return total / count

    mean = mean_of(lambda part: part)
    std = np.sqrt(mean_of(lambda part: (part - mean[:, None]) ** 2))
    return mean, np.where(std > 0, std, 1.0)


def hash_splits(members):
    """12 hex digits of a SHA-256 over (member, split) pairs, whatever their order."""
    lines = sorted(f"{name} {split}" for name, split in members)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def fingerprint(task):
    """12 hex digits of a SHA-256 over pixels, labels, splits and class names."""
    digest = hashlib.sha256("\n".join(task.classes).encode())
    for array in (task.images, task.labels, task.split):
        digest.update(f"{array.dtype} {array.shape}".encode())
        for part in array:  # never a copy of the whole
            digest.update(part.tobytes())
    return digest.hexdigest()[:12]
