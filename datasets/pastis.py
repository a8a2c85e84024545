"""PASTIS-R: Sentinel-2 time series of crops in France, a .npy of (dates, 10, 128, 128) a patch."""

from os.path import isfile

import numpy as np

from datasets import common
from imagery.bands import IGNORE

BANDS = common.RHO[1:]  # without B01
FOLDS = {1: "train", 2: "train", 3: "train", 4: "val", 5: "test"}
CLASSES = (
    "Background", "Meadow", "Soft winter wheat", "Corn", "Winter barley", "Winter rapeseed",
    "Spring barley", "Sunflower", "Grapevine", "Beet", "Winter triticale", "Winter durum wheat",
    "Fruits/vegetables/flowers", "Potatoes", "Leguminous fodder", "Soybeans", "Orchard",
    "Mixed cereal", "Sorghum", "Void",
)  # fmt: skip


def find(folder, positions, *, dates=None, pastis_classes=18):
    """Series of as many dates as a patch has; the dates of two patches need not agree.

    dates: how many, spread evenly; default all. pastis_classes: 18 ignores background and void, 19
    ignores void, 20 ignores void and keeps its class.
    """
    if pastis_classes not in (18, 19, 20):
        raise ValueError(f"--pastis-classes {pastis_classes}: choose 18, 19 or 20")
    files, split, place = {}, {}, folder / "metadata.geojson"
    with common.whole(place, "JSON"):
        for feature in common.read_json(place)["features"]:
            name = str(feature["properties"]["ID_PATCH"])
            split[name] = FOLDS[int(feature["properties"]["Fold"])]
            paths = folder / f"DATA_S2/S2_{name}.npy", folder / f"ANNOTATIONS/TARGET_{name}.npy"
            if all(map(isfile, paths)):
                files[name] = paths
    split = dict(sorted(split.items()))

    def series(path):
        return common.read_numpy(path, (None, len(BANDS), None, None))

    def chosen(count):
        if dates is None or count <= dates:
            return np.arange(count)
        return np.linspace(0, count - 1, dates).round().astype(int)

    def image(path, mask):
        pixels = series(path)
        return pixels[np.ix_(chosen(len(pixels)), positions)].astype(np.float32)

    def label(path, mask):
        return np.array(common.read_numpy(mask, (None, None, None))[0])

    ids, classes = {**common.numbered(CLASSES), 19: IGNORE}, CLASSES[:pastis_classes]
    if pastis_classes == 18:
        ids, classes = {0: IGNORE, 19: IGNORE} | {k: k - 1 for k in range(1, 19)}, CLASSES[1:19]
    longest = max((len(chosen(len(series(path)))) for path, _ in files.values()), default=0)
    stats = read_stats(folder / "NORM_S2_patch.json")
    return common.Samples(split, files, label, image, stats, ids, classes, longest)


def read_stats(path):
    """{band: (mean, std)}, {} without the file.

    The mean over the training folds, as the publisher's loader does; a patch normalised by its own
    fold, as in other public code, would tell its test fold's statistics to the model.
    """
    if not path.is_file():
        return {}
    with common.whole(path, "JSON"):
        said = common.read_json(path)
        folds = [said[f"Fold_{fold}"] for fold in (1, 2, 3)]
        stats = [common.by_band(BANDS, fold["mean"], fold["std"]) for fold in folds]
        return {band: np.mean([each[band] for each in stats], 0) for band in BANDS}


TASKS = {
    "pastis": common.Labelled(
        title="PASTIS-R: crops in France, time series; 18 classes without background and void",
        classes=CLASSES,
        ids=common.numbered(CLASSES),
        bands=BANDS,
        tile=64,  # 4 tiles, the paper's protocol
        splits="folds 1 to 3, 4 and 5",
        counts=(1455, 482, 496),
        size="about 54 GB zipped, with Sentinel-1",
        url="https://zenodo.org/records/5735646",
        licence="CC BY 4.0",
        marks=("DATA_S2", "ANNOTATIONS"),
        folders=("PASTIS-R", "PASTIS", "PASTIS-HD"),
        open=find,
        stats={},  # NORM_S2_patch.json
    )
}
