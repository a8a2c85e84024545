"""Write real labelled scenes, which come as numpy files, as folders of GeoTIFFs.

    python tests/real_tasks.py OUT      (CROSSSCALE_SHARED names the data, default ../shared)

makes OUT/ukis and OUT/eolearn, each with images, masks and classes.txt. What --bands, --tile and
--ignore-index they need is in `SETTINGS`.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from imagery import raster  # noqa: E402  (the root is on the path only now when run by hand)

SETTINGS = {
    "ukis": ["--bands", "0,1,2,3", "--tile", "64", "--block", "2"],
    # 101 x 100 px: few tiles, so small ones; five dates of one place, so split by ground
    "eolearn": ["--bands", "1,2,3,7", "--tile", "20", "--block", "1", "--ignore-index", "0"],
}


def write_ukis(data, out):
    """One Sentinel-2 scene, 6 bands float32 reflectance, 512 x 512. data: folder `ukis_csmask`.

    The publisher gives no place: a local grid of 10 m stands in for one.
    """
    with np.load(data / "sentinel2.npz", allow_pickle=False) as file:
        image, mask = file["img"].transpose(2, 0, 1), file["msk"][..., 0]
    place = (10.0, 0.0, 0.0, 0.0, -10.0, 0.0)
    write_task(out, {"sentinel2": image}, mask, place, None)
    names = ["cloud shadow", "water", "snow", "land", "cloud"]
    (out / "classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


def write_eolearn(data, out):
    """Five dates of one Sentinel-2 patch, 13 bands float32 reflectance, 101 x 100, one land cover
    mask for all. data: folder `eolearn_testeopatch`."""
    images = np.load(data / "REFERENCE_SCENES.npy", allow_pickle=False).transpose(0, 3, 1, 2)
    mask = np.load(data / "LULC.npy", allow_pickle=False)[..., 0].astype(np.uint8)
    box = json.loads((data / "bbox.geojson").read_text(encoding="utf-8"))
    x, y = np.array(box["coordinates"][0]).T
    rows, cols = mask.shape
    place = (np.ptp(x) / cols, 0.0, x.min(), 0.0, -np.ptp(y) / rows, y.max())
    write_task(out, {f"date_{i}": image for i, image in enumerate(images)}, mask, place, 32633)
    names = ["no data", "cultivated", "forest", "grassland", "shrubland", "water", "wetland",
             "tundra", "artificial"]  # fmt: skip
    (out / "classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


def write_task(out, images, mask, transform, crs):
    for folder in ("images", "masks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        raster.write(out / "images" / f"{name}.tif", image, transform, crs)
        raster.write(out / "masks" / f"{name}.tif", mask, transform, crs)


if __name__ == "__main__":
    shared = Path(os.environ.get("CROSSSCALE_SHARED", ROOT.parent / "shared")) / "data"
    write_ukis(shared / "ukis_csmask", Path(sys.argv[1]) / "ukis")
    write_eolearn(shared / "eolearn_testeopatch", Path(sys.argv[1]) / "eolearn")
    for name, flags in SETTINGS.items():
        task = Path(sys.argv[1]) / name
        print(f"python finetune.py --encoder random --images {task}/images --masks {task}/masks "
              f"--classes {task}/classes.txt {' '.join(flags)}")  # fmt: skip
