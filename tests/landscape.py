"""Scenes of one smooth landscape on any pixel grid, as GeoTIFFs, for tests of pairs."""

import csv
from pathlib import Path

import numpy as np

from datasets import common
from datasets.folder import read_geotiff
from imagery import pack, raster

RNG = np.random.default_rng(0)
EAST, NORTH = 400000.0, 5200000.0
WAVES = [  # wavelength in x and y (metres), phase; per band a different mix
    (210.0, 330.0, 0.3),
    (-170.0, 260.0, 1.1),
    (480.0, -140.0, 2.0),
]


def landscape(transform, height, width, bands=2):
    """Exact area means of a smooth function of the ground over the pixels of a grid, uint16."""
    a, _, c, _, e, f = transform
    x = c + a * (np.arange(width) + 0.5) - EAST
    y = f + e * (np.arange(height)[:, None] + 0.5) - NORTH
    out = np.zeros((bands, height, width))
    for band in range(bands):
        for k, (along_x, along_y, phase) in enumerate(WAVES):
            blur = np.sinc(a / along_x) * np.sinc(e / along_y)  # the pixel's box, integrated
            wave = np.sin(2 * np.pi * (x / along_x + y / along_y) + phase + band)
            out[band] += 900 * (1 + (k + band) % 3) * blur * wave
    return np.rint(out + 12000).astype("uint16")


def write_scene(path, gsd, shift, height, width, bands=2, crs=32631, **more):
    """Write the landscape on a grid whose corner lies shift (x, y) metres from EAST, NORTH."""
    path.parent.mkdir(exist_ok=True, parents=True)
    transform = (gsd, 0.0, EAST + shift[0], 0.0, -gsd, NORTH + shift[1])
    array = more.pop("array", None)
    array = landscape(transform, height, width, bands) if array is None else array
    raster.write(path, array, transform, crs, **more)
    return array


def image(name, array, transform=None, nodata=None, **more):
    """A common.Source of an array (bands, rows, cols) in memory; more: date, offset."""
    bands, height, width = array.shape
    crs = "EPSG:32631" if transform else None
    about = (Path(name), width, height, bands, array.dtype, nodata, transform, crs, ())

    def read(window, bands):
        row, col, height, width = window
        return array[bands, row : row + height, col : col + width]

    return common.Source(raster.Info(*about), list(range(bands)), nodata, read, **more)


def pair(folder, hr_gsd=5.0, mr_shift=(0, 0), hr_shift=(0, 0), side=64, hr_side=None, **more):
    """One MR and one HR scene; returns the two folders as strings."""
    hr_side = hr_side or int(side * 10 / hr_gsd)
    write_scene(folder / "mr" / "a.tif", 10.0, mr_shift, side, side, **more)
    write_scene(folder / "hr" / "a.tif", hr_gsd, hr_shift, hr_side, hr_side, **more)
    return str(folder / "mr"), str(folder / "hr")


def pack_files(mr, hr, out, **options):
    """pack.pack of GeoTIFFs; options of the reader and of pack together."""
    reader = {"mr_bands", "hr_bands", "band_names", "hr_band_names", "nodata"} & options.keys()
    listing = read_geotiff(mr, hr, **{key: options.pop(key) for key in reader})
    return pack.pack(listing, out, **options)


def rows_of(store, name="index"):
    with (Path(store) / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def shift_between(a, b):
    """(rows, cols) by which b's content lies further than a's, in pixels, by least squares."""
    a, b = a[2:-2, 2:-2], b[2:-2, 2:-2]
    down, right = np.gradient((a + b) / 2)
    terms = np.stack([a, np.ones_like(a), -down, -right], -1).reshape(-1, 4)
    return np.linalg.lstsq(terms, b.reshape(-1), rcond=None)[0][2:]
