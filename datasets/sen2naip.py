"""SEN2NAIP v1: Sentinel-2 (10 m, 121 x 121) and NAIP (2.5 m, 484 x 484), both R, G, B, NIR.

2,851 cross-sensor pairs (3 GB unpacked) and 35,314 synthetic ones.
"""

from pathlib import Path

from datasets import common

SOURCES = (
    common.terms(
        "SEN2NAIP",
        "CC-BY-4.0",
        "Aybar et al., Scientific Data, 2024, doi:10.1038/s41597-024-04214-y",
        "https://huggingface.co/datasets/isp-uv-es/SEN2NAIP",
    ),
)


def read(root):
    """root: holds a folder for each pair, lr.tif and hr.tif, cross-sensor or synthetic, at any
    depth. No splits: the folder (ROI_0000) is the site."""
    found = {}
    for path, name in common.walk(root, (".tif",)):
        folder, _, file = name.rpartition("/")
        if sensor := {"lr.tif": "mr", "hr.tif": "hr"}.get(file.lower()):
            found.setdefault(folder, {})[sensor] = path
    pairs, skipped = common.complete(found)
    if not pairs:
        wanted = "no ROI_*/lr.tif with hr.tif"
        if next(common.walk(root, (".taco",)), None):
            wanted += " (.taco containers, v2, are not read; export them with tacoreader)"
        raise common.missing(root, wanted)
    sites = [Path(mr).parent.relative_to(root).as_posix() for mr, _ in pairs]
    places = [(s, [(*pair, "", "")], None, s) for s, pair in zip(sites, pairs, strict=True)]
    units = common.tiff_units(places, common.RGBN_ORDER)
    first = first_mr(units)  # 121 in v1; other exports have other sizes
    chip = min(first.info.height, first.info.width)
    return common.listing(units, chip, SOURCES, skipped)


def first_mr(units):
    """The MR image of the first pair that can be read; raises what the first raised where none."""
    failed = None
    for one in units:
        try:
            return next(one.open()).mr
        except (ValueError, OSError) as error:
            failed = failed or error
    raise failed


PAIRS = {"sen2naip": read}
