"""RapidAI4EO: monthly Sentinel-2 (10 m, 60 x 60) and 5-day Planet Fusion (3 m, 200 x 200).

500,000 places in Europe, 79 million images, 17 TB: take a part of it. HR to MR is x3.33.
"""

import functools
import itertools
import re
import zlib
from operator import itemgetter

from datasets import common

URL = "https://source.coop/planet/rapidai4eo"
SOURCES = (
    common.terms(
        "RapidAI4EO, Planet Fusion",
        "CC-BY-NC-SA-3.0",
        "Planet Labs PBC; RapidAI4EO project, European Union's Horizon 2020 research and "
        "innovation programme, grant agreement No 101004356",
        URL,
    ),
    common.terms(
        "RapidAI4EO, Sentinel-2",
        "Copernicus Sentinel data terms (free and open)",
        common.COPERNICUS,
        URL,
    ),
)
MONTH = re.compile(r"(?<!\d)(20\d\d)[-_]?(0[1-9]|1[0-2])(?!\d)")
SAMPLE_ID = re.compile(r"\d\d[NS]_\d+[EW]-\d+[NS]_\d+_\d+")
PLANET_OR_S2 = re.compile(r"(?<![A-Za-z0-9])(PF|S2)(?![A-Za-z0-9])")


def read(root, *, per_site=1, seed=0):
    """root: holds the imagery, or a part of it. Files are told apart by PF or S2 (PF-SR, S2-SR) in
    their path, places by their sample id (33N_15E-243N_01_09), else by folder, and months and days
    by the date in their name. per_site: months drawn for each place, by seed; each pairs with the
    Planet image nearest to the month's middle, which serves as the mosaic's date. site: the tile of
    the places, which lie close together. S2 has 12 bands, in the order of their numbers unless the
    files name them; Planet B, G, R, NIR.
    """
    common.check_per_site(per_site)
    places, rest = [], {}
    # the images of a place come one after the other, so that its list is not held for long
    for place, images in itertools.groupby(find_images(root), key=itemgetter(0)):
        months, days = rest.setdefault(place, ({}, {}))
        for _, sensor, date, path in images:
            (months if sensor == "S2" else days)[date] = path
        if not months or not days:
            continue
        del rest[place]
        drawn = sorted(months, key=lambda month: zlib.crc32(f"{seed} {place} {month}".encode()))
        chosen = []
        for month in sorted(drawn[:per_site]):
            day = min(days, key=functools.partial(common.days_between, month))
            chosen.append((months[month], days[day], month, day))
        places.append((place, chosen, None, tile_of(place)))
    skipped = [
        (place, "no Planet image" if months else "no Sentinel-2 image")
        for place, (months, days) in rest.items()
    ]
    if not places:
        raise common.missing(root, "no place with S2-SR/*_YYYY-MM.tif and PF-SR/*_YYYY-MM-DD.tif")
    units = common.tiff_units(places, common.S2_ORDER, {4: [0, 1, 2, 3]})
    return common.listing(units, 60, SOURCES, skipped)


def find_images(root):
    """Yield (place, "PF" or "S2", date, path)."""
    for path, name in common.walk(root, (".tif", ".tiff")):
        sensors, stem = PLANET_OR_S2.findall(name), name.rpartition("/")[2]
        month = MONTH.search(stem)
        middle = f"{month[1]}-{month[2]}-15" if month else ""
        date = common.date_of(stem) if sensors[-1:] == ["PF"] else middle
        if sensors and date:
            ids = SAMPLE_ID.findall(name)
            place = ids[-1] if ids else PLANET_OR_S2.split(name)[0].strip("/")
            yield place, sensors[-1], date, path


def tile_of(place):
    """What a sample id says of the tile, "33N_15E-243N"; the whole name of any other place."""
    return place.rsplit("_", 2)[0] if SAMPLE_ID.fullmatch(place) else place


PAIRS = {"rapidai4eo": read}
