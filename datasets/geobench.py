"""GEO-Bench: cashew plantations in Benin and crop types in South Africa, Sentinel-2.

One HDF5 file a sample, one dataset a band, "08 - NIR", or "08 - NIR_2019-11-05" of several dates.
The pickles in the files and beside them are never touched.
"""

import numpy as np

from datasets import common

NUMBERS = dict(zip(common.L1C, "01 02 03 04 05 06 07 08 08A 09 10 11 12".split(), strict=True))


def find(folder, positions):
    files = {path.stem: [path] for path in folder.glob("*.hdf5")}
    names = ("default_partition.json", "1.00x_train_partition.json")
    partition = next((folder / n for n in names if (folder / n).is_file()), folder / names[0])
    split = common.read_partition(partition)
    bands = [NUMBERS[common.L2A[position]] for position in positions]
    return common.Samples(
        split,
        files,
        lambda path: read_datasets(path, ["label"])[0],
        lambda path: read_datasets(path, bands).astype(np.float32),
        read_stats(folder / "band_stats.json"),
    )


def read_stats(path):
    """{band: (mean, std)}; where bands are named by date, over the dates."""
    stats = {}
    with common.whole(path, "JSON"):
        said = common.read_json(path)
        for band in common.L2A:
            dates = [said[key] for key in sorted(said) if is_band(key, NUMBERS[band])]
            each = [float(date["mean"]) for date in dates], [float(date["std"]) for date in dates]
            common.by_band([band] * len(dates), *each)  # which checks them
            if dates:
                mean, std = np.array(each)
                std = np.sqrt((std**2 + mean**2).mean() - mean.mean() ** 2)
                stats |= common.by_band([band], [mean.mean()], [std])
    return stats


def is_band(name, number):
    """Whether a dataset is of this band: "08 - NIR", "08 - NIR_2019-11-05" of "08"."""
    return name.startswith(f"{number} - ")


def read_datasets(path, names):
    """Stack datasets of one file, named exactly or by band number -> (n, rows, cols).

    Of a band with several dates, the first is read. Attributes, which hold pickles, are not.
    Raises ValueError for a dataset that is not there, and for a damaged file.
    """
    with common.open_hdf5(path) as file:
        held = sorted(file)
        found = [[key for key in held if key == n or is_band(key, n)] for n in names]
        if [] in found:
            raise ValueError(
                f"{path}: no dataset {names[found.index([])]!r}; it holds {', '.join(held)}"
            )
        bands = np.stack([file[keys[0]][()] for keys in found])
        return common.check_array(bands, (len(names), None, None))


def geobench(title, classes, splits, counts, *folders):
    return common.Labelled(
        title=f"GEO-Bench: {title}",
        classes=classes,
        ids=common.numbered(classes),
        bands=common.L2A,
        tile=64,  # 16 tiles, the paper's protocol
        splits=splits,
        counts=counts,
        size="part of the 57 GB of GEO-Bench",
        url="https://huggingface.co/datasets/recursix/geo-bench-1.0",
        licence="not verified: see the page",
        marks=("*.hdf5",),
        folders=tuple(
            f"{at}{folder}"
            for at in ("", "segmentation_v1.0/", "segmentation_v0.9.1/")
            for folder in folders
        ),
        open=find,
        stats={},  # band_stats.json
    )


TASKS = {
    "m-cashew-plantation": geobench(
        "cashew plantations in Benin",
        ("no data", "well-managed plantation", "poorly-managed plantation", "non-plantation",
         "residential", "background", "uncertain"),
        "partition of the publisher; chips of different splits overlap on the ground",
        (1350, 400, 50),
        "m-cashew-plantation",
        "m-cashew-plant",
    ),
    "m-sa-crop-type": geobench(
        "crop types in South Africa",
        ("No Data", "Lucerne/Medics", "Planted pastures", "Fallow", "Wine grapes", "Weeds",
         "Small grain grazing", "Wheat", "Canola", "Rooibos"),
        "partition of the publisher",
        (3000, 1000, 1000),
        "m-SA-crop-type",
        "m-sa-crop-type",
    ),
}  # fmt: skip
