"""Sen1Floods11: floods on all continents, hand-labelled; Sentinel-2 L1C and water, or not."""

import re
from os.path import isfile
from pathlib import Path

from datasets import common
from imagery.bands import IGNORE


def find(folder, positions):
    """Lists name the Sentinel-1 chip; the Sentinel-2 chip of the same place is read."""
    chips = folder / "data/flood_events/HandLabeled"
    lists, split, files = folder / "splits/flood_handlabeled", {}, {}
    for name in common.SPLITS:
        rows = common.table(lists / f"flood_{'valid' if name == 'val' else name}_data.csv")
        split[name] = [re.sub(r"_S1(Hand)?\.tif$", "", Path(row[0]).name) for row in rows]
    split = common.join_lists(split, lists)
    for name in split:
        paths = chips / f"S2Hand/{name}_S2Hand.tif", chips / f"LabelHand/{name}_LabelHand.tif"
        if all(map(isfile, paths)):  # False of a name that is none, too
            files[name] = paths
    return common.tiff_samples(split, files, len(common.L1C), positions)


TASKS = {
    "sen1floods11": common.Labelled(
        title="Sen1Floods11: floods, hand-labelled",
        classes=("not water", "water"),
        ids={-1: IGNORE, 0: 0, 1: 1},
        bands=common.L1C,
        tile=64,  # 64 tiles, as Galileo evaluates it
        splits="lists of the publisher; the Bolivia chips are left out",
        counts=(252, 89, 90),
        size="about 3 GB of the 14 GB: data/flood_events/HandLabeled and splits",
        url="gs://sen1floods11/v1.1",
        licence="none stated with the files; cite Bonafilia et al. 2020",
        marks=("data/flood_events/HandLabeled/S2Hand",),
        folders=("v1.1", "sen1floods11/v1.1", "Sen1Floods11/v1.1", "sen1floods11", "Sen1Floods11"),
        open=find,
        stats=common.by_band(
            common.L1C,
            (1626.92, 1396.03, 1364.06, 1218.23, 1466.07, 2386.90, 2845.61, 2622.96, 3077.48,
             486.87, 63.78, 2030.65, 1179.17),
            (700.17, 739.09, 735.25, 864.94, 776.88, 921.37, 1084.37, 1022.63, 1196.44, 336.61,
             144.00, 980.87, 764.61),
        ),
    )
}  # fmt: skip
