"""Substation: power substations; Sentinel-2 L1C of four or five dates a place, a .npz each."""

import numpy as np

from datasets import common


def find(folder, positions, *, split_seed=0):
    """The median over the dates is taken: one label is for all. split_seed: of splits drawn where
    there is no splits.json."""
    masks = {path.stem: path for path in folder.glob("mask/*.npz")}
    images = {path.stem: path for path in folder.glob("image*/*.npz")}
    files = {name: (images[name], masks[name]) for name in images.keys() & masks.keys()}
    if (listed := folder / "splits.json").is_file():
        split = common.read_partition(listed)
    else:
        names = sorted(files)
        ends = [round(0.6 * len(names)), round(0.8 * len(names))]
        parts = np.split(np.random.default_rng(split_seed).permutation(names), ends)
        split = common.join_lists(
            dict(zip(common.SPLITS, map(np.ndarray.tolist, parts), strict=True)), folder
        )

    def image(path, mask):
        stack = common.read_numpy(path, (None, len(common.L1C), None, None))
        return np.median(stack[:, positions].astype(np.float32), axis=0)

    return common.Samples(
        split, files, lambda path, mask: common.read_numpy(mask, (None, None)), image
    )


TASKS = {
    "substation": common.Labelled(
        title="Substation: power substations",
        classes=("background", "substation"),
        ids={0: 0, 1: 0, 2: 0, 3: 1},
        bands=common.L1C,
        tile=None,  # 228 px, seen whole, as the paper does
        splits="splits.json where there is one, else 60/20/20 drawn by seed",
        counts=None,
        size="26,522 places, 76 GB: the images and mask.tar.gz",
        url="https://huggingface.co/datasets/neurograce/SubstationDataset",
        licence="CC BY 4.0; labels from OpenStreetMap, ODbL",
        marks=("image*/*.npz", "mask/*.npz"),
        folders=("Substation", "substation"),
        open=find,
        stats=common.by_band(
            common.L1C,
            (1431, 1233, 1209, 1192, 1448, 2238, 2609, 2537, 2828, 884, 20, 2226, 1537),
            (157, 254, 290, 420, 363, 457, 575, 606, 630, 156, 3, 554, 523),
        ),
    )
}
