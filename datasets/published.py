"""Labelled Sentinel-2 sets as their publishers ship them: what they are, and how to read a sample.

`TASKS` describes every set; `open_set` finds one on disk and says how its images and labels are
read. Nothing is converted, unpacked or unpickled. `tasks.load_task` cuts what this reads to tiles.

Bands go by one name each: "B", "G", "R" and "NIR" for Sentinel-2's B02, B03, B04 and B08, as in
the stores of HR/MR pairs, and Sentinel-2's own two-digit names for the others: "B01", "B05",
"B06", "B07", "B8A", "B09", "B10", "B11", "B12".
"""

import csv
import json
import re
import threading
import zipfile
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import h5py
import numpy as np

from imagery import geotiff
from imagery.bands import IGNORE, positions

SPLITS = ("train", "val", "test")

L1C = ("B01", "B", "G", "R", "B05", "B06", "B07", "NIR", "B8A", "B09", "B10", "B11", "B12")
L2A = tuple(band for band in L1C if band != "B10")
RHO = tuple(band for band in L2A if band != "B09")  # ACOLITE's reflectances
LAND = ("B", "G", "R", "B05", "B06", "B07", "NIR", "B8A", "B11", "B12")
FOLDS = {1: "train", 2: "train", 3: "train", 4: "val", 5: "test"}
HDF5 = dict(zip(L1C, "01 02 03 04 05 06 07 08 08A 09 10 11 12".split(), strict=True))
HEADERS = threading.Lock()  # of numpy's files; read_npy says why


@dataclass(frozen=True)
class Published:
    """A labelled set, as published.

    classes: names in the order of their ids. ids: value in the mask -> class id or IGNORE. bands:
    names in the order of the files. tile: pixels a side in the protocol that scores are compared
    by, None for the whole image. counts: samples in train, val and test, None where the publisher
    gives no split. stats: {band: (mean, std)} as published. marks: what the folder holds, by which
    it is known. folders: where that may lie below --root. archives: what the download is called.
    size, licence: as others quote the page at `url`, which has the last word.
    """

    title: str
    classes: tuple
    ids: dict
    bands: tuple
    tile: int | None
    splits: str
    counts: tuple | None
    size: str
    url: str
    licence: str
    marks: tuple
    folders: tuple
    archives: tuple
    stats: dict


def by_band(bands, mean, std):
    """{band: (mean, std)}"""
    return dict(zip(bands, zip(mean, std, strict=True), strict=True))


def numbered(classes, first=0):
    """{value: class id} of a mask whose classes begin at the value `first`; 0 is ignored if not."""
    return {0: IGNORE} | {first + k: k for k in range(len(classes))}


BGRN = ("B", "G", "R", "NIR")
MADOS_CLASSES = (
    "Marine Debris", "Dense Sargassum", "Sparse Floating Algae", "Natural Organic Material",
    "Ship", "Oil Spill", "Marine Water", "Sediment-Laden Water", "Foam", "Turbid Water",
    "Shallow Water", "Waves & Wakes", "Oil Platform", "Jellyfish", "Sea snot",
)  # fmt: skip
MARIDA_CLASSES = (
    "Marine Debris", "Dense Sargassum", "Sparse Sargassum", "Natural Organic Material", "Ship",
    "Clouds", "Marine Water", "Sediment-Laden Water", "Foam", "Turbid Water", "Shallow Water",
)  # fmt: skip
CASHEW_CLASSES = (
    "no data", "well-managed plantation", "poorly-managed plantation", "non-plantation",
    "residential", "background", "uncertain",
)  # fmt: skip
SA_CLASSES = (
    "No Data", "Lucerne/Medics", "Planted pastures", "Fallow", "Wine grapes", "Weeds",
    "Small grain grazing", "Wheat", "Canola", "Rooibos",
)  # fmt: skip
PASTIS_CLASSES = (
    "Background", "Meadow", "Soft winter wheat", "Corn", "Winter barley", "Winter rapeseed",
    "Spring barley", "Sunflower", "Grapevine", "Beet", "Winter triticale", "Winter durum wheat",
    "Fruits/vegetables/flowers", "Potatoes", "Leguminous fodder", "Soybeans", "Orchard",
    "Mixed cereal", "Sorghum", "Void",
)  # fmt: skip

TASKS = {
    "mados": Published(
        title="MADOS: marine debris and oil spill",
        classes=MADOS_CLASSES,
        ids=numbered(MADOS_CLASSES, 1),
        bands=RHO,
        tile=80,  # 3 x 3 tiles, as Galileo and OlmoEarth evaluate it
        splits="lists of the publisher",
        counts=(1433, 642, 728),
        size="4 GB zipped, 5.4 GB unpacked",
        url="https://zenodo.org/records/10664073",
        licence="CC BY 4.0",
        marks=("Scene_*",),
        folders=("MADOS",),
        archives=("MADOS.zip",),
        stats=by_band(
            BGRN, (0.05223, 0.04381, 0.03571, 0.03567), (0.03432, 0.03548, 0.03758, 0.05546)
        ),  # PANGAEA's
    ),
    "marida": Published(
        title="MARIDA: marine debris archive",
        classes=MARIDA_CLASSES,
        # waves, cloud shadows, wakes and mixed water count as marine water, in the publisher's way
        ids=numbered(MARIDA_CLASSES, 1) | dict.fromkeys((12, 13, 14, 15), 6),
        bands=RHO,
        tile=64,  # of 256: debris is a few pixels wide, so a token must not be wider
        splits="lists of the publisher",
        counts=(694, 328, 359),
        size="about 4.4 GB",
        url="https://zenodo.org/records/5151941",
        licence="CC BY 4.0",
        marks=("patches",),
        folders=("MARIDA",),
        archives=("MARIDA.zip", "patches.zip"),
        stats=by_band(
            RHO,
            (0.05198, 0.04784, 0.04057, 0.03164, 0.02973, 0.03457, 0.03875, 0.03436, 0.03921,
             0.02358, 0.01589),
            (0.04726, 0.04744, 0.04699, 0.04967, 0.04947, 0.06458, 0.07595, 0.07120, 0.08251,
             0.05111, 0.03524),
        ),
    ),
    "m-cashew-plantation": Published(
        title="GEO-Bench: cashew plantations in Benin",
        classes=CASHEW_CLASSES,
        ids=numbered(CASHEW_CLASSES),
        bands=L2A,
        tile=64,  # 16 tiles, the paper's protocol
        splits="partition of the publisher; chips of different splits overlap on the ground",
        counts=(1350, 400, 50),
        size="part of the 57 GB of GEO-Bench",
        url="https://huggingface.co/datasets/recursix/geo-bench-1.0",
        licence="not verified: see the page",
        marks=("*.hdf5",),
        folders=("m-cashew-plantation", "m-cashew-plant"),
        archives=("m-cashew-plant*.zip",),
        stats={},  # band_stats.json
    ),
    "m-sa-crop-type": Published(
        title="GEO-Bench: crop types in South Africa",
        classes=SA_CLASSES,
        ids=numbered(SA_CLASSES),
        bands=L2A,
        tile=64,  # 16 tiles, the paper's protocol
        splits="partition of the publisher",
        counts=(3000, 1000, 1000),
        size="part of the 57 GB of GEO-Bench",
        url="https://huggingface.co/datasets/recursix/geo-bench-1.0",
        licence="not verified: see the page",
        marks=("*.hdf5",),
        folders=("m-SA-crop-type", "m-sa-crop-type"),
        archives=("m-SA-crop-type*.zip",),
        stats={},  # band_stats.json
    ),
    "pastis": Published(
        title="PASTIS-R: crops in France, time series; 18 classes without background and void",
        classes=PASTIS_CLASSES,
        ids=numbered(PASTIS_CLASSES),
        bands=LAND,
        tile=64,  # 4 tiles, the paper's protocol
        splits="folds 1 to 3, 4 and 5",
        counts=(1455, 482, 496),
        size="about 54 GB zipped, with Sentinel-1",
        url="https://zenodo.org/records/5735646",
        licence="CC BY 4.0",
        marks=("DATA_S2", "ANNOTATIONS"),
        folders=("PASTIS-R", "PASTIS", "PASTIS-HD"),
        archives=("PASTIS*.zip",),
        stats={},  # NORM_S2_patch.json
    ),
    "sen1floods11": Published(
        title="Sen1Floods11: floods, hand-labelled",
        classes=("not water", "water"),
        ids={-1: IGNORE, 0: 0, 1: 1},
        bands=L1C,
        tile=64,  # 64 tiles, as Galileo evaluates it
        splits="lists of the publisher; the Bolivia chips are left out",
        counts=(252, 89, 90),
        size="about 3 GB of the 14 GB: data/flood_events/HandLabeled and splits",
        url="gs://sen1floods11/v1.1",
        licence="none stated with the files; cite Bonafilia et al. 2020",
        marks=("data/flood_events/HandLabeled/S2Hand",),
        folders=("v1.1", "sen1floods11/v1.1", "Sen1Floods11/v1.1", "sen1floods11", "Sen1Floods11"),
        archives=("v1.1*.zip", "*en1*loods11*.zip", "*en1*loods11*.tar.gz"),
        stats=by_band(
            L1C,
            (1626.92, 1396.03, 1364.06, 1218.23, 1466.07, 2386.90, 2845.61, 2622.96, 3077.48,
             486.87, 63.78, 2030.65, 1179.17),
            (700.17, 739.09, 735.25, 864.94, 776.88, 921.37, 1084.37, 1022.63, 1196.44, 336.61,
             144.00, 980.87, 764.61),
        ),
    ),
    "substation": Published(
        title="Substation: power substations",
        classes=("background", "substation"),
        ids={0: 0, 1: 0, 2: 0, 3: 1},
        bands=L1C,
        tile=None,  # 228 px, seen whole, as the paper does
        splits="splits.json where there is one, else 60/20/20 drawn by seed",
        counts=None,
        size="26,522 places, 76 GB: the images and mask.tar.gz",
        url="https://huggingface.co/datasets/neurograce/SubstationDataset",
        licence="CC BY 4.0; labels from OpenStreetMap, ODbL",
        marks=("image*/*.npz", "mask/*.npz"),
        folders=("Substation", "substation"),
        archives=("image_stack.tar.gz", "images.zip", "mask.tar.gz"),
        stats=by_band(
            L1C,
            (1431, 1233, 1209, 1192, 1448, 2238, 2609, 2537, 2828, 884, 20, 2226, 1537),
            (157, 254, 290, 420, 363, 457, 575, 606, 630, 156, 3, 554, 523),
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A set found on disk.

    split: {sample: "train", "val" or "test"}, sorted by sample. path(sample): the file that stands
    for it. label(sample) -> (rows, cols) as in the file; ids: value -> class id or IGNORE.
    image(sample) -> float32 (bands, rows, cols), or (dates, bands, rows, cols) where `dates`, the
    most that a sample has, is not None; NaN where the image has no data. classes: the names.
    stats: {band: (mean, std)}, of the bands that the publisher gives them for.
    """

    split: dict
    path: Callable
    label: Callable
    image: Callable
    ids: dict
    classes: tuple
    stats: dict
    dates: int | None = None


def find_bands(wanted, held, what, sentinel=False):
    """Positions of the bands called `wanted` among those that the files hold, by name.

    sentinel: whether a bare B2 is Sentinel-2's whatever else they hold. Raises ValueError naming
    the missing ones and what there is; `what` names the set.
    """
    found = positions([name.strip() for name in wanted], held, sentinel)
    missing = [name for name, at in zip(wanted, found, strict=True) if at < 0]
    if missing:
        raise ValueError(
            f"--bands {','.join(wanted)}: {what} has no {','.join(missing)}; its bands are "
            f"{','.join(held) or 'unnamed'}"
        )
    return tuple(found)


def find_folder(task, root):
    """The folder of a set, which is `root` or lies in it under one of the publisher's names.

    Raises FileNotFoundError that says what was looked for, and where an archive was not unpacked.
    """
    root = Path(root)
    places = [root] + [root / folder for folder in task.folders]
    if task.marks == ("*.hdf5",):
        places += [root / f"segmentation_v{v}" / f for v in ("1.0", "0.9.1") for f in task.folders]
    for place in places:
        if all(any(place.glob(mark)) for mark in task.marks):
            return place
    packed = [path for place in places for name in task.archives for path in place.glob(name)]
    if packed:
        raise FileNotFoundError(f"{packed[0]} is not unpacked; unpack it where it lies")
    held = sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else []
    raise FileNotFoundError(
        f"--root {root}: no {task.title.split(':')[0]} set there; looked for "
        f"{' and '.join(task.marks)} in it and in {', '.join(task.folders)}, found "
        f"{', '.join(held) or 'nothing'}; download it from {task.url}"
    )


def open_set(name, root, positions, dates=None, pastis_classes=18, split_seed=0):
    """Find a set and its splits -> Source. No pixel is read yet.

    name: a key of TASKS. positions: the bands to read, from 0, in the order wanted. dates: how
    many of a time series, spread evenly; default all. pastis_classes: 18 ignores background and
    void, 19 ignores void, 20 ignores void and keeps its class. split_seed: for the set that comes
    without splits. Raises FileNotFoundError or ValueError in one sentence.
    """
    task = TASKS[name]
    folder = find_folder(task, root)
    positions = list(positions)
    match name:
        case "mados":
            return open_mados(task, folder, positions)
        case "marida":
            return open_marida(task, folder, positions)
        case "pastis":
            return open_pastis(task, folder, positions, dates, pastis_classes)
        case "sen1floods11":
            return open_sen1floods11(task, folder, positions)
        case "substation":
            return open_substation(task, folder, positions, split_seed)
        case _:
            return open_geobench(task, folder, positions)


def open_mados(task, folder, positions):
    """One band per file at its own resolution; the wavelength in its name is the satellite's."""
    files = {}
    for path in folder.glob("Scene_*/*/*.tif"):
        name = re.fullmatch(r"(Scene_\d+)_L2R_(?:rhorc_(\d+)|cl)_(\d+)", path.stem)
        if name:
            scene, wavelength, crop = name.groups()
            files.setdefault(f"{scene}_{crop}", {})[int(wavelength or 0)] = path  # 0: the mask
    files = {name: [found[key] for key in sorted(found)] for name, found in files.items()}
    split = read_lists(folder / "splits", "{}_X.txt")
    check_files(folder / "splits", split, files, "a mask and 11 bands", 12)

    def image(name):
        mask, bands = geotiff.info(files[name][0]), []
        for path in (files[name][1 + position] for position in positions):
            band = read_tiff(path, 1)[0]
            rows, cols = mask.height // band.shape[0], mask.width // band.shape[1]
            # nearest neighbour, as the publisher stacks the 20 m and 60 m bands
            bands.append(band.repeat(rows, 0).repeat(cols, 1))
            if bands[-1].shape != (mask.height, mask.width):
                raise ValueError(
                    f"{path}: {band.shape[0]} x {band.shape[1]} pixels do not divide its mask's "
                    f"{mask.height} x {mask.width}; download it again"
                )
        return np.stack(bands)

    return Source(
        split, lambda name: files[name][2], lambda name: geotiff.read(files[name][0])[0], image,
        task.ids, task.classes, task.stats,
    )  # fmt: skip


def open_marida(task, folder, positions):
    """One file of 11 bands a sample; lists name it without the S2_ of its file."""
    masks = {p.stem[:-3]: p for p in folder.glob("patches/S2_*/S2_*_cl.tif")}
    images = {stem: path.with_name(f"{stem}.tif") for stem, path in masks.items()}
    files = {s.removeprefix("S2_"): (p, masks[s]) for s, p in images.items() if p.is_file()}
    split = read_lists(folder / "splits", "{}_X.txt")
    check_files(folder / "splits", split, files, "an image and a _cl mask", 2)
    return Source(
        split,
        lambda name: files[name][0],
        lambda name: geotiff.read(files[name][1])[0],
        lambda name: read_tiff(files[name][0], len(task.bands), positions),
        task.ids, task.classes, task.stats,
    )  # fmt: skip


def open_geobench(task, folder, positions):
    """One HDF5 file a sample, one dataset a band. The files' pickles are never touched."""
    files = {path.stem: [path] for path in folder.glob("*.hdf5")}
    names = ("default_partition.json", "1.00x_train_partition.json")
    partition = next((folder / n for n in names if (folder / n).is_file()), folder / names[0])
    split = read_partition(partition)
    check_files(partition, split, files, "an .hdf5 file", 1)

    stats, place = {}, folder / "band_stats.json"
    with whole(place, "JSON"):
        said = read_json(place)
        for band in task.bands:
            # where bands are named by date, so are their statistics
            dates = [said[key] for key in sorted(said) if is_band(key, HDF5[band])]
            for date in dates:
                check_stats(place, band, date["mean"], date["std"])
            if dates:
                mean = np.array([date["mean"] for date in dates])
                square = np.array([date["std"] for date in dates]) ** 2 + mean**2
                stats[band] = mean.mean(), np.sqrt(square.mean() - mean.mean() ** 2)

    bands = [HDF5[task.bands[position]] for position in positions]
    return Source(
        split,
        lambda name: files[name][0],
        lambda name: read_hdf5(files[name][0], ["label"])[0],
        lambda name: read_hdf5(files[name][0], bands).astype(np.float32),
        task.ids, task.classes, stats,
    )  # fmt: skip


def open_pastis(task, folder, positions, dates, classes):
    """Series of as many dates as a patch has; the dates of two patches need not agree."""
    if classes not in (18, 19, 20):
        raise ValueError(f"--pastis-classes {classes}: choose 18, 19 or 20")
    files, split, place = {}, {}, folder / "metadata.geojson"
    with whole(place, "JSON"):
        for feature in read_json(place)["features"]:
            name = str(feature["properties"]["ID_PATCH"])
            split[name] = FOLDS[int(feature["properties"]["Fold"])]
            paths = folder / f"DATA_S2/S2_{name}.npy", folder / f"ANNOTATIONS/TARGET_{name}.npy"
            files[name] = [path for path in paths if path.is_file()]
    split = dict(sorted(split.items()))
    check_files(place, split, files, "DATA_S2 and ANNOTATIONS", 2)

    def series(name):
        return read_npy(files[name][0], (None, len(task.bands), None, None))

    def chosen(name):
        count = len(series(name))
        if dates is None or count <= dates:
            return np.arange(count)
        return np.linspace(0, count - 1, dates).round().astype(int)

    def image(name):
        return series(name)[np.ix_(chosen(name), positions)].astype(np.float32)

    def label(name):
        return np.array(read_npy(files[name][1], (None, None, None))[0])

    # the mean over the training folds, as the publisher's loader does; a patch normalised by its
    # own fold, as in other public code, would tell its test fold's statistics to the model
    stats, path = {}, folder / "NORM_S2_patch.json"
    if path.is_file():
        with whole(path, "JSON"):
            said = read_json(path)
            folds = [said[f"Fold_{fold}"] for fold in (1, 2, 3)]
            for fold in folds:
                for band, *pair in zip_longest(task.bands, fold["mean"], fold["std"]):
                    check_stats(path, band, *pair)
            mean, std = (np.mean([fold[key] for fold in folds], 0) for key in ("mean", "std"))
            stats = by_band(task.bands, mean, std)

    ids, names = {**task.ids, 19: IGNORE}, task.classes[:classes]
    if classes == 18:
        ids, names = {0: IGNORE, 19: IGNORE} | {k: k - 1 for k in range(1, 19)}, task.classes[1:19]
    longest = max((len(chosen(name)) for name in split), default=0)
    return Source(split, lambda name: files[name][0], label, image, ids, names, stats, longest)


def open_sen1floods11(task, folder, positions):
    """Lists name the Sentinel-1 chip; the Sentinel-2 chip of the same place is read."""
    chips = folder / "data/flood_events/HandLabeled"
    lists, split = folder / "splits/flood_handlabeled", {}
    for name in SPLITS:
        path = lists / f"flood_{'valid' if name == 'val' else name}_data.csv"
        with whole(path, "CSV"):
            rows = [row[0] for row in csv.reader(read_lines(path)) if row]
        split[name] = [re.sub(r"_S1(Hand)?\.tif$", "", Path(row).name) for row in rows]
    split, files = join_lists(split, lists), {}
    for name in split:
        paths = chips / f"S2Hand/{name}_S2Hand.tif", chips / f"LabelHand/{name}_LabelHand.tif"
        files[name] = [path for path in paths if path.is_file()]
    check_files(lists, split, files, "S2Hand and LabelHand", 2)
    return Source(
        split,
        lambda name: files[name][0],
        lambda name: geotiff.read(files[name][1])[0],
        lambda name: read_tiff(files[name][0], len(task.bands), positions),
        task.ids, task.classes, task.stats,
    )  # fmt: skip


def open_substation(task, folder, positions, seed):
    """Four or five dates of a place, of which the median is taken: one label is for all."""
    masks = {path.stem: path for path in folder.glob("mask/*.npz")}
    images = {path.stem: path for path in folder.glob("image*/*.npz")}
    files = {name: (images[name], masks[name]) for name in images.keys() & masks.keys()}
    listed = folder / "splits.json"
    if listed.is_file():
        split = read_partition(listed)
        check_files(listed, split, files, "an image stack and a mask", 2)
    else:
        names = sorted(files)
        ends = [round(0.6 * len(names)), round(0.8 * len(names))]
        parts = np.split(np.random.default_rng(seed).permutation(names), ends)
        split = join_lists(dict(zip(SPLITS, map(np.ndarray.tolist, parts), strict=True)), folder)

    def image(name):
        stack = read_npz(files[name][0], (None, len(task.bands), None, None))
        return np.median(stack[:, positions].astype(np.float32), axis=0)

    return Source(
        split,
        lambda name: files[name][0],
        lambda name: read_npz(files[name][1], (None, None)),
        image, task.ids, task.classes, task.stats,
    )  # fmt: skip


def check_stats(path, band, mean, std):
    """Raise ValueError unless a band's statistics can be of reflectances, whatever their unit."""
    numbers = all(type(value) in (int, float) for value in (mean, std))
    if band is None or not numbers or not (abs(mean) < 1e6 and 1e-6 < std < 1e6):
        raise ValueError(
            f"{path}: band {band} has the mean {str(mean)[:30]} and the standard deviation "
            f"{str(std)[:30]}, where finite numbers should be, the second above 0; download it "
            "again"
        )


def is_band(name, number):
    """Whether a GEO-Bench dataset is of this band: "08 - NIR", "08 - NIR_2019-11-05" of "08"."""
    return name.startswith(f"{number} - ")


@contextmanager
def whole(path, kind):
    """Name the file in whatever its content provokes while it is read -> ValueError.

    What already is a sentence about the file passes. For reading only: the errors that a damaged or
    foreign file provokes are those of a mistake in the code.
    """
    try:
        yield
    except (
        ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError,
        ValueError, csv.Error, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        if str(error).startswith(f"{path}: "):
            raise
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"
        raise ValueError(
            f"{path}: no whole {kind} file as its publisher ships it ({reason}); copy or download "
            "it again"
        ) from error


def check_array(array, shape):
    """The array, if it holds numbers in this shape, where None is any length but 0."""
    fits = array.ndim == len(shape) and all(
        found and wanted in (None, found) for found, wanted in zip(array.shape, shape, strict=True)
    )
    if not fits or array.dtype.kind not in "biuf":
        wanted = " x ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"{array.dtype} of shape {array.shape}, wanted numbers of shape {wanted}")
    return array


def read_hdf5(path, names):
    """Stack datasets of one HDF5 file, named exactly or by band number -> (n, rows, cols).

    Of a band with several dates, the first is read. Attributes, which hold pickles, are not.
    Raises ValueError for a dataset that is not there, and for a damaged file.
    """
    with whole(path, "HDF5"), h5py.File(path, "r") as file:
        held = sorted(file)
        found = [[key for key in held if key == n or is_band(key, n)] for n in names]
        if [] in found:
            raise ValueError(
                f"{path}: no dataset {names[found.index([])]!r}; it holds {', '.join(held)}"
            )
        bands = np.stack([file[keys[0]][()] for keys in found])
        return check_array(bands, (len(names), None, None))


def read_npy(path, shape):
    """Map a .npy file, so that only what is taken of it is read. shape: as of `check_array`."""
    # one thread at a time: numpy parses the header with `ast`, whose parser Python 3.11 shares
    # between threads, so that a fraction of files fail (github.com/python/cpython/issues/106905)
    with whole(path, ".npy"), HEADERS:
        return check_array(np.load(path, mmap_mode="r", allow_pickle=False), shape)


def read_npz(path, shape):
    """The array of a .npz file that holds one, called arr_0. shape: as of `check_array`."""
    with whole(path, ".npz"), HEADERS, np.load(path, allow_pickle=False) as file:
        return check_array(file["arr_0"], shape)


def read_tiff(path, count, bands=None):
    """Read bands of a GeoTIFF of `count` -> float32, NaN where not finite or where all are nodata.

    Raises ValueError for a file of another number of bands, as positions tell nothing there.
    """
    about = geotiff.info(path)
    if about.bands != count:
        raise ValueError(
            f"{path}: {about.bands} bands, its publisher ships {count}; download it again"
        )
    return geotiff.as_float(geotiff.read(path, bands=bands), about.nodata)


def read_lines(path):
    """The lines of a UTF-8 text file, with or without a byte order mark, stripped.

    Raises FileNotFoundError, or ValueError if it is not UTF-8.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file, which comes with the set; download it")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    return [line.strip() for line in text.rstrip().split("\n")]


def read_json(path):
    """Read a JSON file that holds an object. Raises ValueError if it does not."""
    with whole(path, "JSON"):
        found = json.loads("\n".join(read_lines(path)))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__} where names and values should be")
        return found


def read_lists(folder, pattern):
    """Read one text file per split -> {sample: split}. pattern: its name, {} the split."""
    return join_lists({s: read_lines(folder / pattern.format(s)) for s in SPLITS}, folder)


def join_lists(lists, where):
    """{split: samples} -> {sample: split}, sorted. Raises ValueError for a sample in two."""
    split = {}
    for name in SPLITS:
        for sample in filter(None, lists[name]):
            if split.setdefault(sample, name) != name:
                raise ValueError(
                    f"{where}: {sample} is listed for {split[sample]} and for {name}; keep it in "
                    "one split only"
                )
    return dict(sorted(split.items()))


def read_partition(path):
    """Read {"train": [samples], "valid" or "val": [...], "test": [...]} -> {sample: split}."""
    with whole(path, "JSON"):
        found = read_json(path)
        found.setdefault("val", found.get("valid", []))
        lists = {s: [str(n).removesuffix(".npz") for n in found.get(s, [])] for s in SPLITS}
    return join_lists(lists, path)


def check_files(where, split, files, what, count):
    """Raise FileNotFoundError if a listed sample has not its `count` files."""
    missing = [name for name in split if len(files.get(name, ())) != count]
    if missing:
        raise FileNotFoundError(
            f"{where}: {len(missing)} of {len(split)} listed samples lack {what}, the first is "
            f"{missing[0]}; complete the download, or take them off the list"
        )
