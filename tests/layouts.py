"""Write tiny labelled sets of random pixels in the layouts that their publishers ship.

Every function takes a folder and a numpy generator, and returns what a reader must find:
{sample: (split, image float32 (bands, rows, cols) or (dates, bands, rows, cols), mask)}, all bands
in the files' order, the mask with the files' values.
"""

import json
import pickle
from pathlib import Path

import h5py
import numpy as np

from imagery import raster

SPLITS = ("train", "val", "test")
PLACE = (10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0), 32633
S2A = (443, 492, 560, 665, 704, 740, 783, 833, 865, 1614, 2202)
S2B = (442, 492, 559, 665, 704, 739, 780, 833, 864, 1610, 2186)
METRES = (60, 10, 10, 10, 20, 20, 20, 10, 20, 20, 20)  # of the bands above
GEOBENCH = (
    "01 - Coastal aerosol", "02 - Blue", "03 - Green", "04 - Red", "05 - Vegetation Red Edge",
    "06 - Vegetation Red Edge", "07 - Vegetation Red Edge", "08 - NIR",
    "08A - Vegetation Red Edge", "09 - Water vapour", "11 - SWIR", "12 - SWIR",
)  # fmt: skip


def write_lists(folder, truth, pattern, line="{}"):
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        names = [line.format(name) for name, (other, *_) in truth.items() if other == split]
        (folder / pattern.format(split)).write_text("\n".join(names) + "\n", encoding="utf-8")


def mados(root, rng):
    """Two satellites, three resolutions, some NaN; confidence and report masks lie beside."""
    truth = {}
    for number, (scene, waves) in enumerate((("Scene_0", S2A), ("Scene_12", S2B))):
        for crop, split in ((1, "train"), (2, "val" if number else "train"), (10, "test")):
            stack = []
            for wave, metres in zip(waves, METRES, strict=True):
                band = rng.random((240 // metres, 240 // metres)).astype(np.float32)
                band[rng.random(band.shape) < 0.05] = np.nan
                folder = root / "MADOS" / scene / str(metres)
                folder.mkdir(parents=True, exist_ok=True)
                raster.write(folder / f"{scene}_L2R_rhorc_{wave}_{crop}.tif", band)
                stack.append(np.kron(band, np.ones((metres // 10, metres // 10), np.float32)))
            mask = rng.integers(1, 16, (24, 24)) * (rng.random((24, 24)) < 0.1)
            mask[:8, 8:16] = 0  # a tile without a label
            for kind in ("cl", "conf", "rep"):
                wrong = mask if kind == "cl" else mask * 0 + 3
                name = f"{scene}_L2R_{kind}_{crop}.tif"
                raster.write(root / "MADOS" / scene / "10" / name, wrong.astype(np.uint8))
            truth[f"{scene}_{crop}"] = split, np.stack(stack), mask
    write_lists(root / "MADOS/splits", truth, "{}_X.txt")
    return truth


def marida(root, rng):
    truth = {}
    for scene, split in (
        ("1-12-19_48MYU", "train"),
        ("18-9-20_16PCC", "val"),
        ("4-1-18_2x", "test"),
    ):
        for crop in range(2):
            image = rng.random((11, 20, 20)).astype(np.float32)
            image[rng.random(image.shape) < 0.02] = np.nan
            mask = rng.integers(0, 16, (20, 20)).astype(np.float32)
            folder, stem = root / f"MARIDA/patches/S2_{scene}", f"S2_{scene}_{crop}"
            folder.mkdir(parents=True, exist_ok=True)
            raster.write(folder / f"{stem}.tif", image, *PLACE)
            raster.write(folder / f"{stem}_cl.tif", mask, *PLACE)
            raster.write(folder / f"{stem}_conf.tif", mask * 0 + 1, *PLACE)
            truth[f"{scene}_{crop}"] = split, image, mask
    write_lists(root / "MARIDA/splits", truth, "{}_X.txt")
    return truth


class Bomb:
    """What its pickle does when it is unpickled: make the file `path`."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def geobench(root, rng, name, classes, dated):
    """dated: what bands and statistics end in. The pickles make root/unpickled when read."""
    folder, truth, partition = root / name, {}, {"train": [], "valid": [], "test": []}
    folder.mkdir(parents=True)
    bomb = pickle.dumps(Bomb(root / "unpickled"))
    (folder / "task_specs.pkl").write_bytes(bomb)
    for k, split in enumerate(("train", "train", "val", "test", "test")):
        sample = f"sample-{9 - k}"
        image = rng.integers(0, 9000, (12, 20, 20)).astype(np.int16)
        mask = rng.integers(0, classes, (20, 20)).astype(np.uint8)
        with h5py.File(folder / f"{sample}.hdf5", "w") as file:
            file.attrs["pickle"] = repr(bomb) if k else np.void(bomb)
            file["Cloud Probability" + dated] = image[0] * 0
            for band, pixels in reversed(list(zip(GEOBENCH, image, strict=True))):
                file[band + dated] = pixels
            file["label"] = mask
        truth[sample] = split, image.astype(np.float32), mask
        partition["valid" if split == "val" else split].append(sample)
    stats = {
        band + dated: {"mean": 100.0 + k, "std": 10.0 + k, "median": 0.0}
        for k, band in enumerate((*GEOBENCH, "Cloud Probability"))
    }
    stats["label"] = {"mean": 1.0, "std": 1.0}
    (folder / "band_stats.json").write_text(json.dumps(stats))
    (folder / "default_partition.json").write_text(json.dumps(partition))
    (folder / "0.01x_train_partition.json").write_text(json.dumps({**partition, "train": []}))
    return truth


def cashew(root, rng):
    return geobench(root, rng, "m-cashew-plant", 7, "_2019-11-05")


def sa_crop(root, rng):
    return geobench(root / "segmentation_v1.0", rng, "m-SA-crop-type", 10, "")


def pastis(root, rng):
    """Five folds with series of 3 to 7 dates; statistics by fold."""
    folder, truth, features = root / "PASTIS-R", {}, []
    for name in ("DATA_S2", "DATA_S1A", "ANNOTATIONS", "INSTANCE_ANNOTATIONS"):
        (folder / name).mkdir(parents=True)
    for fold in range(1, 6):
        patch, dates = 10000 + 7 * fold, 2 + fold
        image = rng.integers(-100, 9000, (dates, 10, 16, 16)).astype(np.int16)
        mask = rng.integers(0, 20, (3, 16, 16)).astype(np.uint8)
        np.save(folder / f"DATA_S2/S2_{patch}.npy", image)
        np.save(folder / f"DATA_S1A/S1A_{patch}.npy", np.zeros((2, 3, 16, 16), np.float16))
        np.save(folder / f"ANNOTATIONS/TARGET_{patch}.npy", mask)
        np.save(folder / f"INSTANCE_ANNOTATIONS/INSTANCES_{patch}.npy", mask[0])
        said = {str(k): 20180917 + k for k in range(dates)}
        features.append(
            {
                "type": "Feature",
                "id": str(patch),
                "geometry": None,
                "properties": {"ID_PATCH": patch, "Fold": fold, "dates-S2": json.dumps(said)},
            }
        )
        split = {4: "val", 5: "test"}.get(fold, "train")
        truth[str(patch)] = split, image.astype(np.float32), mask[0]
    norm = {
        f"Fold_{fold}": {"mean": [100.0 * fold + k for k in range(10)], "std": [fold + 1.0] * 10}
        for fold in range(1, 6)
    }
    (folder / "NORM_S2_patch.json").write_text(json.dumps(norm))
    collection = {"type": "FeatureCollection", "features": features}
    (folder / "metadata.geojson").write_text(json.dumps(collection))
    return truth


def sen1floods11(root, rng):
    truth, chips = {}, root / "v1.1/data/flood_events/HandLabeled"
    lists = root / "v1.1/splits/flood_handlabeled"
    lists.mkdir(parents=True)
    for layer in ("S1Hand", "S2Hand", "LabelHand", "JRCWaterHand"):
        (chips / layer).mkdir(parents=True)
    names = ("Ghana_103272", "Sri-Lanka_101973", "USA_1", "Paraguay_12", "Bolivia_103757")
    place = (9e-5, 0.0, -0.78, 0.0, -9e-5, 38.1), 4326
    for name, split in zip(names, ("train", "val", "test", "train", "bolivia"), strict=True):
        image = rng.integers(1, 9000, (13, 20, 20)).astype(np.int16)
        image[3, 2, 2] = 0  # a dark pixel
        image[:, 4, :3] = 0  # no data
        mask = rng.integers(-1, 2, (20, 20)).astype(np.int16)
        raster.write(chips / f"S2Hand/{name}_S2Hand.tif", image, *place, nodata=0)
        raster.write(chips / f"S1Hand/{name}_S1Hand.tif", image[:2].astype(np.float32), *place)
        raster.write(chips / f"LabelHand/{name}_LabelHand.tif", mask, *place)
        with (lists / f"flood_{split.replace('val', 'valid')}_data.csv").open("a") as file:
            file.write(f"{name}_S1Hand.tif,{name}_LabelHand.tif\n")
        image = image.astype(np.float32)
        image[:, 4, :3] = np.nan
        if split != "bolivia":
            truth[name] = split, image, mask
    return truth


def substation(root, rng, splits=True):
    """A median image for a mask; places differ in their number of dates."""
    folder, truth, lists = root / "Substation", {}, {"train": [], "val": [], "test": []}
    for name in ("image_stack", "mask"):
        (folder / name).mkdir(parents=True)
    for k in range(10):
        name, split = f"image_{k}", SPLITS[k % 3]
        stack = rng.random((1 + k % 5, 13, 12, 12)).astype(np.float32) * 5000
        mask = rng.integers(0, 4, (12, 12)).astype(np.uint8)
        np.savez(folder / f"image_stack/{name}.npz", stack)
        np.savez(folder / f"mask/{name}.npz", mask)
        lists[split].append(f"{name}.npz")
        truth[name] = split, np.median(stack, 0), mask
    if splits:
        Path(folder / "splits.json").write_text(json.dumps(lists))
    return truth


WRITERS = {
    "mados": mados,
    "marida": marida,
    "m-cashew-plantation": cashew,
    "m-sa-crop-type": sa_crop,
    "pastis": pastis,
    "sen1floods11": sen1floods11,
    "substation": substation,
}
