"""MARIDA: Sentinel-2 with sparse labels of marine debris; one file of 11 bands a sample."""

from os.path import isfile

from datasets import common

CLASSES = (
    "Marine Debris", "Dense Sargassum", "Sparse Sargassum", "Natural Organic Material", "Ship",
    "Clouds", "Marine Water", "Sediment-Laden Water", "Foam", "Turbid Water", "Shallow Water",
)  # fmt: skip


def find(folder, positions):
    """Lists name a sample without the S2_ of its file."""
    files = {}
    for mask in folder.glob("patches/S2_*/S2_*_cl.tif"):
        image = mask.with_name(mask.name.removesuffix("_cl.tif") + ".tif")
        if isfile(image):
            files[image.stem.removeprefix("S2_")] = image, mask
    split = common.read_lists(folder / "splits", "{}_X.txt")
    return common.tiff_samples(split, files, len(common.RHO), positions)


TASKS = {
    "marida": common.Labelled(
        title="MARIDA: marine debris archive",
        classes=CLASSES,
        # waves, cloud shadows, wakes and mixed water count as marine water, in the publisher's way
        ids=common.numbered(CLASSES, 1) | dict.fromkeys((12, 13, 14, 15), 6),
        bands=common.RHO,
        tile=64,  # of 256: debris is a few pixels wide, so a token must not be wider
        splits="lists of the publisher",
        counts=(694, 328, 359),
        size="about 4.4 GB",
        url="https://zenodo.org/records/5151941",
        licence="CC BY 4.0",
        marks=("patches",),
        folders=("MARIDA",),
        open=find,
        stats=common.by_band(
            common.RHO,
            (0.05198, 0.04784, 0.04057, 0.03164, 0.02973, 0.03457, 0.03875, 0.03436, 0.03921,
             0.02358, 0.01589),
            (0.04726, 0.04744, 0.04699, 0.04967, 0.04947, 0.06458, 0.07595, 0.07120, 0.08251,
             0.05111, 0.03524),
        ),
    )
}  # fmt: skip
