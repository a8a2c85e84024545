"""WorldStrat: SPOT 6/7 (6 m, 1.5 m pan-sharpened) and up to 16 Sentinel-2 revisits of each place.

About 4,000 places, 107 GB; sizes differ from place to place.
"""

import math
import re

from datasets import common

URL = "https://zenodo.org/records/6810792"
SOURCES = (
    common.terms(
        "WorldStrat, SPOT 6/7",
        "CC-BY-NC-4.0",
        "Cornebise, Oršolić, Kalaitzis: WorldStrat, 2022, arXiv 2207.06418; Airbus SPOT",
        URL,
    ),
    common.terms("WorldStrat, Sentinel-2", "CC-BY-4.0", common.COPERNICUS, URL),
)
SPLIT_TABLE = "stratified_train_val_test_split.csv"


def read(root, *, level="L2A", hr="rgbn", per_site=1):
    """root: holds hr_dataset and lr_dataset, at any depth, and the two .csv tables. level: "L2A"
    (12 bands) or "L1C" (13). hr: "rgbn" (6 m, as taken) or "ps" (1.5 m, pan-sharpened); both R, G,
    B, NIR. per_site: revisits of a place to take, those nearest to the SPOT image in date first
    where metadata.csv tells, else the first. Places of the split table that are not on disk
    are skipped.
    """
    if level not in ("L2A", "L1C") or hr not in ("rgbn", "ps"):
        raise ValueError(f"--level {level} --hr-product {hr}: L2A or L1C and rgbn or ps expected")
    common.check_per_site(per_site)
    hr_file = re.compile(rf"(.+)_{hr}\.tiff?", re.IGNORECASE)
    mr_file = re.compile(rf"(.+)-(\d+)-{level}_data\.tiff?", re.IGNORECASE)
    hrs, mrs, tables = {}, {}, {}
    for path, name in common.walk(root, (".tif", ".tiff", ".csv")):
        name = name.rpartition("/")[2]
        if match := hr_file.fullmatch(name):
            hrs[match[1]] = path
        elif match := mr_file.fullmatch(name):
            mrs.setdefault(match[1], {})[int(match[2])] = path
        elif name in ("metadata.csv", SPLIT_TABLE):
            tables[name] = path
    splits, dates = read_split_table(tables.get(SPLIT_TABLE)), {}
    header, *rows = common.table(tables.get("metadata.csv")) or [[]]
    for row in (dict(zip(header, cells, strict=False)) for cells in rows):
        place = row.get("tile") or next(iter(row.values()))
        days = (
            common.date_of(row.get("lowres_date", "")),
            common.date_of(row.get("highres_date", "")),
        )
        dates[place, int(row["n"]) if row.get("n", "").isdecimal() else None] = days
    places, skipped = [], []
    for place in sorted({*splits, *hrs, *mrs}):
        if place not in hrs or place not in mrs:
            skipped.append((place, f"no {level} image" if place in hrs else f"no {hr} image"))
            continue
        visits = []
        for n, path in mrs[place].items():
            days = dates.get((place, n), ("", ""))
            gap = common.days_between(*days) if all(days) else math.inf
            visits.append((gap, n, (path, hrs[place], *days)))
        chosen = [files for _, _, files in sorted(visits)[:per_site]]
        places.append((place, chosen, splits.get(place), place))
    if not places:
        wanted = f"no place with <AOI>_{hr}.tiff (hr_dataset) and <AOI>-<n>-{level}_data.tiff"
        raise common.missing(root, f"{wanted} (lr_dataset)")
    if dealt := sum(split is None for *_, split, _ in places):
        who = tables.get(SPLIT_TABLE) or f"{root}: no {SPLIT_TABLE}"
        print(f"{who}: {dealt} of {len(places)} places are in no split; they are dealt by site")
    units = common.tiff_units(places, common.S2_ORDER, common.RGBN_ORDER)
    return common.listing(units, 64, SOURCES, skipped)


def read_split_table(path):
    """{place: split} of the publisher's table, with a header or without; {} without a table. The
    last cell of a row is the split, the first that is no number the place."""
    splits = {}
    for n, row in enumerate(common.table(path)):
        header = n == 0 and row[-1].lower() not in common.SPLIT_NAMES
        if header or len(row) < 2:
            continue
        split, place = common.split_name(path, row[-1]), next(c for c in row if not c.isdecimal())
        if splits.setdefault(place, split) != split:
            raise ValueError(f"{path}: {place} is in {splits[place]} and in {split}; choose one")
    return splits


PAIRS = {"worldstrat": read}
