"""MADOS: Sentinel-2 with sparse labels of marine debris, oil and water; one band per file."""

import re

import numpy as np

from datasets import common

CLASSES = (
    "Marine Debris", "Dense Sargassum", "Sparse Floating Algae", "Natural Organic Material",
    "Ship", "Oil Spill", "Marine Water", "Sediment-Laden Water", "Foam", "Turbid Water",
    "Shallow Water", "Waves & Wakes", "Oil Platform", "Jellyfish", "Sea snot",
)  # fmt: skip


def find(folder, positions):
    """Each band has its own resolution; the wavelength in its name is the satellite's."""
    files = {}
    for path in folder.glob("Scene_*/*/*.tif"):
        name = re.fullmatch(r"(Scene_\d+)_L2R_(?:rhorc_(\d+)|cl)_(\d+)", path.stem)
        if name:
            scene, wavelength, crop = name.groups()
            files.setdefault(f"{scene}_{crop}", {})[int(wavelength or 0)] = path  # 0: the mask
    files = {s: [found[key] for key in sorted(found)] for s, found in files.items()}
    files = {s: paths for s, paths in files.items() if len(paths) == 12}
    split = common.read_lists(folder / "splits", "{}_X.txt")

    def label(mask, *paths):
        return common.read_tiff(mask)[0]

    def image(mask, *paths):
        height, width = label(mask).shape
        bands = []
        for path in (paths[position] for position in positions):
            band = common.read_float(path, 1)[0]
            rows, cols = height // band.shape[0], width // band.shape[1]
            # nearest neighbour, as the publisher stacks the 20 m and 60 m bands
            with common.whole(path, "TIFF"):
                band = band.repeat(rows, 0).repeat(cols, 1)
                bands.append(common.check_array(band, (height, width)))
        return np.stack(bands)

    return common.Samples(split, files, label, image)


TASKS = {
    "mados": common.Labelled(
        title="MADOS: marine debris and oil spill",
        classes=CLASSES,
        ids=common.numbered(CLASSES, 1),
        bands=common.RHO,
        tile=80,  # 3 x 3 tiles, as Galileo and OlmoEarth evaluate it
        splits="lists of the publisher",
        counts=(1433, 642, 728),
        size="4 GB zipped, 5.4 GB unpacked",
        url="https://zenodo.org/records/10664073",
        licence="CC BY 4.0",
        marks=("Scene_*",),
        folders=("MADOS",),
        open=find,
        stats=common.by_band(  # PANGAEA's
            common.BGRN, (0.05223, 0.04381, 0.03571, 0.03567), (0.03432, 0.03548, 0.03758, 0.05546)
        ),
    )
}
