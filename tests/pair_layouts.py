"""Tiny folders in the true layouts of the published HR/MR pairs, and the pixels that are in them.

Each function writes one and returns {name: array}, the images in the publisher's band order.
"""

import json
from pathlib import Path

import h5py
import numpy as np
import torch

from imagery import raster

RNG = np.random.default_rng(0)


def pixels(*shape, dtype="int16"):
    return RNG.integers(100, 4000 if np.dtype(dtype).itemsize > 1 else 255, shape).astype(dtype)


def place(gsd, east=300_000.0, north=5_000_000.0):
    return (gsd, 0.0, east, 0.0, -gsd, north)


def tif(path, array, gsd=None, east=300_000.0, crs=32631, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if gsd:
        options |= {"transform": place(gsd, east), "crs": crs}
    raster.write(path, array, **options)
    return array


def sen2venus(root, sites=("ALSACE_C_32ULU_2018-02-14", "NARYN_C__43TFG_2019-07-25"), patches=3):
    """v1: <SITE>/<SITE>_<TILE>_<DATE>_<gsd>_<bands>.pt; patches a quarter of the true side."""
    images = {}
    for stem in sites:
        folder = Path(root) / stem.split("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        for part, side in {
            "05m_b2b3b4b8": 64,
            "10m_b2b3b4b8": 32,
            "05m_b4b5b6b8a": 64,
            "20m_b4b5b6b8a": 16,
        }.items():
            images[f"{stem}_{part}"] = pixels(patches, 4, side, side)
            torch.save(torch.from_numpy(images[f"{stem}_{part}"]), folder / f"{stem}_{part}.pt")
        (folder / f"{stem}_patches.gpkg").write_bytes(b"SQLite format 3\0")
        (folder / "index.csv").write_text("venus_product_id\tsentinel2_product_id\n")
    return images


def sen2venus_v2(root):
    """v2, as its index names the parts: <bands>_<gsd>, a GeoTIFF per patch."""
    images = {}
    for number in range(2):
        for gsd, side in (("05m", 64), ("10m", 32)):
            name = f"ATTO/ATTO_20NQF_2018-08-01_b2b3b4b8_{gsd}/patch_{number:04d}_{gsd}.tif"
            images[name] = tif(Path(root) / name, pixels(4, side, side), float(gsd[:-1]))
    return images


def rapidai4eo(root, places=("33N_15E-243N_01_09", "33N_15E-243N_02_04", "31N_05E-201N_00_00")):
    """imagery/<zone>/<tile>/<sample>/{PF-SR,S2-SR}/<sample>_<date>_<product>.tif"""
    images = {}
    for k, sample in enumerate(places):
        zone, tile = sample.split("_")[:2]
        folder = Path(root) / "imagery" / zone / tile / sample
        for month in ("2018-05", "2018-06"):
            path = folder / "S2-SR" / f"{sample}_{month}_S2-SR.tif"
            images[path.stem] = tif(path, pixels(12, 60, 60, dtype="uint16"), 10.0, 3e5 + 600 * k)
        for day in ("2018-05-03", "2018-05-13", "2018-06-17", "2018-07-02"):
            path = folder / "PF-SR" / f"{sample}_{day}_PF-SR.tif"
            images[path.stem] = tif(path, pixels(4, 200, 200, dtype="uint16"), 3.0, 3e5 + 600 * k)
    return images


def worldstrat(root):
    """hr_dataset/<AOI>/ and lr_dataset/<AOI>/{L1C,L2A}/, the split and the metadata table."""
    root, images = Path(root), {}
    splits, dates = ["tile,split"], ["tile,n,lowres_date,highres_date"]
    sizes = {"Amnesty POI-1-1-1": 40, "Landcover-77": 39, "UNHCR-SSD-1": 41}
    days = ("2019-01-05", "2019-03-01", "2019-02-12")  # of n = 1, 2, 3
    for (aoi, side), split in zip(sizes.items(), ("train", "val", "test"), strict=True):
        splits.append(f"{aoi},{split}")
        hr = root / "hr_dataset" / aoi
        for part, bands, size in (
            ("rgbn", 4, side * 5 // 3),
            ("ps", 4, side * 6),
            ("pan", 1, side * 6),
        ):
            array = pixels(bands, size, size, dtype="uint16")
            images[f"{aoi}_{part}"] = tif(hr / f"{aoi}_{part}.tiff", array)
        for n, day in enumerate(days, 1):
            dates.append(f"{aoi},{n},{day} 10:00:00+00:00,2019-02-10")
            for level, bands in (("L1C", 13), ("L2A", 12)):
                name = f"{aoi}-{n}-{level}_data"
                array = pixels(bands, side, side).astype("float32")
                images[name] = tif(root / "lr_dataset" / aoi / level / f"{name}.tiff", array, 10.0)
    splits.append("Not-on-disk-1,train")
    (root / "stratified_train_val_test_split.csv").write_text("\n".join(splits) + "\n")
    (root / "metadata.csv").write_text("\n".join(dates) + "\n")
    return images


def sen2naip(root, part="cross-sensor"):
    images = {}
    for k in range(2):
        folder = Path(root) / part / f"ROI_{k:04d}"
        lr, hr = pixels(4, 31, 31, dtype="uint16"), pixels(4, 124, 124, dtype="uint8")
        images[f"ROI_{k:04d}"] = tif(folder / "lr.tif", lr, 10.0), tif(folder / "hr.tif", hr, 2.5)
        (folder / "metadata.json").write_text("{}")
    return images


def hdf5(path, hr="venus", rows=7, splits=True):
    """The repacks: sen2venus.hdf5 (`venus`), rapidai4eo_v1.h5 (`planet`, 12 bands, sample_ids)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    planet = hr == "planet"
    images = {
        "sentinel2": pixels(rows, 12 if planet else 4, *([60, 60] if planet else [32, 32])),
        hr: pixels(rows, 4, *([200, 200] if planet else [64, 64])),
    }
    with h5py.File(path, "w") as file:
        for name, array in images.items():
            file[name] = array
        if planet:
            ids = [f"33N_15E-243N_{k:02d}_09" for k in range(rows)]
            file["sample_ids"] = np.array(ids, dtype="S")
    if splits:
        given = {"train": [0, 1, 2, 5], "val": [3], "test": [6]}  # row 4 is in none
        name = "rapidai4eo_splits.json" if planet else "splits_v1.json"
        (path.parent / name).write_text(json.dumps(given))
    return images


SAFE = "S2B_MSIL2A_20220301T105859_N0400_R094_T31TCJ_20220301T130000.SAFE"


def safe(root, name=SAFE, suffix=".jp2", offset=None):
    """A Sentinel-2 product: bands of 10 and 20 m, a true colour image and a quality mask."""
    granule = Path(root) / name / "GRANULE" / "L2A_T31TCJ_A026000_20220301T105859"
    levels = {10: ["B02", "B03", "B04", "B08", "TCI"], 20: ["B02", "B05", "B06", "B07"]}
    images = {}
    if "MSIL1C" in name:
        levels = {10: ["B02", "B03", "B04", "B08"], 20: ["B05"], 60: ["B01"]}
    for gsd, bands in levels.items():
        folder = granule / "IMG_DATA" / ("" if "MSIL1C" in name else f"R{gsd}m")
        for band in bands:
            ending = "" if "MSIL1C" in name else f"_{gsd}m"
            path = folder / f"T31TCJ_20220301T105859_{band}{ending}{suffix}"
            array = pixels(3 if band == "TCI" else 1, 600 // gsd, 600 // gsd, dtype="uint16")
            images[band, gsd] = array
            (tif if suffix == ".tif" else jp2)(path, array, float(gsd))
    (granule / "QI_DATA").mkdir()
    (granule / "QI_DATA" / f"MSK_CLDPRB_20m{suffix}").write_bytes(b"not to be read")
    if offset is not None:
        text = f"""<n1:Level-2A_User_Product xmlns:n1="https://psd-14.sentinel2.eo.esa.int"><n1:Info>
            <BOA_ADD_OFFSET_VALUES_LIST><BOA_ADD_OFFSET band_id="0">{offset}</BOA_ADD_OFFSET>
            </BOA_ADD_OFFSET_VALUES_LIST></n1:Info></n1:Level-2A_User_Product>"""
        (Path(root) / name / "MTD_MSIL2A.xml").write_text(text)
    return images


def jp2(path, array, gsd):
    import rasterio

    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path,
        "w",
        driver="JP2OpenJPEG",
        width=array.shape[2],
        height=array.shape[1],
        count=len(array),
        dtype=array.dtype,
        crs="EPSG:32631",
        transform=rasterio.Affine(*place(gsd)),
        QUALITY="100",
        REVERSIBLE="YES",
        YCBCR420="NO",
    ) as file:
        file.write(array)


# what a Listing gives of a layout

BGRN = ["B", "G", "R", "NIR"]


def pairs_of(listing):
    return [pair for unit in listing.units for pair in unit.open()]


def pixels_of(source):
    return raster.masked(source.read(None, source.bands), None)[0]


def same(source, array):
    """Whole and in part, the source gives these bands, of which its info says the truth."""
    whole, part = pixels_of(source), source.read((1, 2, 5, 7), source.bands)
    part, _ = raster.masked(part, None)
    assert whole.dtype == array.dtype == source.info.dtype
    assert (len(whole), source.info.height, source.info.width) == array.shape
    return np.array_equal(whole, array) and np.array_equal(part, array[:, 1:6, 2:9])
