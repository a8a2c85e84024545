"""Open, read, warp and write georeferenced images with rasterio (GDAL).

Pixel coordinates are (row, col) with (0, 0) the top-left *corner* of the first pixel; bands count
from 0. A south-up image is turned upside down on reading, so that everybody else sees north up.

Files of strangers reach neither the network nor other folders: a file is opened by the one driver
that its extension names (GDAL would take a WMS description called "x.tif" for one), what lies
beside it has to be a TIFF, and the sources of a VRT lie in the VRT's folder. Paths that begin with
/vsi are the user's own wish. Nothing here is shared between threads: each read opens its file.
"""

import logging
import math
import os
import re
import shlex
import tempfile
import uuid
import warnings
import xml.etree.ElementTree as ET
from collections import namedtuple
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import rasterio
import rasterio.shutil
import rasterio.warp
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import from_gcps
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from files import replacing, write_atomic

logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # what GDAL says is raised here
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

DRIVERS = {
    **dict.fromkeys((".tif", ".tiff"), "GTiff"),
    **{".vrt": "VRT", ".jp2": "JP2OpenJPEG", ".png": "PNG", ".jpg": "JPEG"},
    **dict.fromkeys((".img", ".bsq", ".bil", ".bip", ".dat"), "ENVI"),
}
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF, both byte orders
TILE = 256  # px a side of the tiles written
# sidecar files are looked for one by one: to list a folder of a million files takes minutes
ENV = {"GDAL_DISABLE_READDIR_ON_OPEN": "TRUE", "GDAL_CACHEMAX": 2**28, "GDAL_NUM_THREADS": "1"}
SHRUNK = 2**17  # pixels shrink to no less than 1 in this, whatever the codec
FIT = 0.1  # px within which ground control points have to lie on one affine transform

# Where an image is warped to. transform as of Info; resampling: "cubic", "bilinear" or "nearest"
Grid = namedtuple("Grid", "crs transform height width resampling")


@dataclass(frozen=True)
class Info:
    """What an image says of itself.

    transform: (a, b, c, d, e, f), x = a col + b row + c and y = d col + e row + f of pixel corners,
    in CRS units; None when not georeferenced. crs: "EPSG:n" where it is one, else WKT; None when
    there is none. nodata: None when not declared. band_names: one per band, or () when the file
    names none. scaling: (scale, offset) of each band from pixels to units, () where all are (1, 0).
    An alpha band is a mask and does not count as a band.
    """

    path: Path
    width: int
    height: int
    bands: int
    dtype: np.dtype
    nodata: float | None
    transform: tuple | None
    crs: str | None
    band_names: tuple
    scaling: tuple = ()
    date: str = ""

    @property
    def gsd(self):
        """Side of a pixel in CRS units (metres in most projections); None if not georeferenced."""
        if self.transform is None:
            return None
        return math.sqrt(abs(rasterio.Affine(*self.transform).determinant))

    @property
    def bounds(self):
        """(left, bottom, right, top) in CRS units; None if not georeferenced."""
        if self.transform is None:
            return None
        x, y = corners(self)
        return min(x), min(y), max(x), max(y)


def corners(about, n=2):
    """x and y, lists of n * n numbers, of points that lie evenly over an image."""
    a, b, c, d, e, f = about.transform
    rows = np.repeat(np.linspace(0, about.height, n), n)
    cols = np.tile(np.linspace(0, about.width, n), n)
    return (a * cols + b * rows + c).tolist(), (d * cols + e * rows + f).tolist()


# ---- reading


def info(path):
    """Describe an image without decoding pixels.

    Raises FileNotFoundError, and ValueError if its driver cannot read it or it holds several images
    or ground control points that no affine transform fits.
    """
    with _open(path) as file:
        return file.about


def read(path, window=None, bands=None, *, masked=False, grid=None):
    """Read pixels; only the tiles or strips that the window touches are decoded.

    window: (row, col, height, width) in pixels, the whole image when None. bands: list of band
    indices, in the order wanted. grid: Grid to warp to, in whose pixels the window then is.
    Returns (bands, height, width) of the file's dtype, and if `masked` also which pixels are valid
    (height, width) bool: with a band that is finite and one that is not nodata, hidden by no alpha
    or mask, and of a warp with ground under them. Raises as `info` does, and ValueError for a
    window or band outside of the file or for data that cannot be decoded.
    """
    with _open(path, grid) as file:
        return file.read(window, bands, masked)


@contextmanager
def _open(path, grid=None):
    """Yield a _File; whatever GDAL raises becomes one sentence."""
    text, path = str(path), Path(path)
    local = not text.startswith("/vsi")
    driver = DRIVERS.get(path.suffix.lower())
    if local and not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if driver is None:
        raise ValueError(
            f"{path}: images are {', '.join(sorted(DRIVERS))}; convert it with gdal_translate"
        )
    size = _own_bytes(path, driver) if local else math.inf
    with (
        _one_error(ValueError, f"{path}: damaged {driver} (%s); fetch the file again"),
        rasterio.Env(**ENV),
        rasterio.open(path if local else text, driver=driver) as file,
    ):
        opened = _File(path, file)
        about = opened.about
        if about.width * about.height * about.bands * about.dtype.itemsize > SHRUNK * size:
            raise ValueError(
                f"{path}: {about.width} x {about.height} pixels cannot be in its {size} bytes; "
                "fetch the file again, or fill a sparse one with gdal_translate"
            )
        if grid is None:
            yield opened
        else:
            with _warped(path, opened, grid) as warped:
                yield warped


@contextmanager
def _one_error(kind, sentence):
    """Make one error of what rasterio raises, whose errors have no common class of their own, and
    say the reason in the sentence, at %s."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("rasterio."):
            raise
        reason = str(error.__cause__ or error).replace("\n", " ")
        raise kind(sentence.replace("%s", reason)) from error


def _own_bytes(path, driver):
    """Bytes of a file, of a VRT with its sources. Raises ValueError where GDAL would follow it to
    the network or out of its folder."""
    for beside in (".msk", ".ovr"):
        other = path.with_name(path.name + beside)
        if other.is_file() and _start(other) not in MAGIC:
            raise ValueError(f"{other}: no TIFF, as masks and overviews are; delete it")
    size = path.stat().st_size
    if driver == "GTiff" and (magic := _start(path)) not in MAGIC:
        raise ValueError(
            f"{path}: not a TIFF, it starts with {magic!r}; convert it with gdal_translate"
        )
    if driver != "VRT":
        return size
    try:
        tree = ET.parse(path)
    except ET.ParseError as error:
        raise ValueError(f"{path}: damaged XML ({error}); build the VRT again") from error
    folder = path.parent.resolve()
    for element in tree.iter():
        tag = element.tag
        if element.get("subClass") or tag in ("SourceDataset", "OpenOptions", "GDALWarpOptions"):
            raise ValueError(f"{path}: only plain mosaics are read, as gdalbuildvrt makes them")
        if tag != "SourceFilename":
            continue
        name = Path(element.text or "")
        source, kind = (folder / name).resolve(), DRIVERS.get(name.suffix.lower())
        relative = element.get("relativeToVRT") == "1" and not name.is_absolute()
        if not relative or folder not in source.parents or kind in (None, "VRT"):
            raise ValueError(
                f"{path}: its source {name} is no image below its own folder by a relative path; "
                "move the VRT there and build it again with gdalbuildvrt"
            )
        if not source.is_file():
            raise FileNotFoundError(f"{source}: no such file, but {path} names it")
        size += _own_bytes(source, kind)
    return size


def _start(path):
    with path.open("rb") as file:
        return file.read(4)


@contextmanager
def _warped(path, opened, grid):
    """Yield the _File of a warp of another; its alpha has both masks and missing ground."""
    about, file, alpha = opened.about, opened.file, opened.alpha
    if not (about.crs and about.transform):
        raise ValueError(f"{path}: no CRS, so it cannot be warped")
    options = {} if alpha else {"add_alpha": True}
    if about.nodata is not None:
        options["src_nodata"] = options["nodata"] = about.nodata
    with (
        _without_alpha(file)
        if not alpha and ColorInterp.alpha in file.colorinterp
        else nullcontext(file) as source,
        WarpedVRT(
            source,
            src_crs=about.crs,
            src_transform=opened.transform,
            crs=grid.crs,
            transform=rasterio.Affine(*grid.transform),
            width=grid.width,
            height=grid.height,
            resampling=Resampling[grid.resampling],
            tolerance=0.01,  # px; GDAL's 0.125 would be seen at a pixel ratio of 2
            **options,
        ) as vrt,
    ):
        yield _File(path, vrt, alpha or vrt.count)


@contextmanager
def _without_alpha(file):
    """A file whose alpha is an image, as a VRT in memory that says so: a warp blends by alpha."""
    name = f"/vsimem/{uuid.uuid4()}.vrt"
    rasterio.shutil.copy(file, name, driver="VRT")
    try:
        with rasterio.open(name, "r+") as source:
            source.colorinterp = [ColorInterp.undefined] * file.count
        with rasterio.open(name) as source:
            yield source
    finally:
        rasterio.shutil.delete(name)


class _File:
    """An open file: `about`, its Info, and `read`. transform: as the file has it, an Affine."""

    def __init__(self, path, file, alpha=None):
        if len(file.subdatasets) > 1 >= file.count or not file.count:
            raise ValueError(
                f"{path}: holds {len(file.subdatasets)} images; split them, the first with "
                f"gdal_translate {shlex.quote(f'GTIFF_DIR:1:{path}')} OUT.tif"
            )
        self.file, self.alpha = file, alpha or _alpha(path, file)
        self.bands = [n for n in file.indexes if n != self.alpha]
        self.mask = any(
            MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags
            for flags in file.mask_flag_enums
        )
        place, crs = _georeference(path, file)
        self.transform = place
        self.flip = place is not None and place.e > 0 and place.b == place.d == 0
        if self.flip:
            place = place @ rasterio.Affine(1, 0, 0, 0, -1, file.height)
        names = tuple(file.descriptions[n - 1] or "" for n in self.bands)
        scaling = tuple((file.scales[n - 1], file.offsets[n - 1]) for n in self.bands)
        day = re.match(r"((?:19|20)\d\d):(\d\d):(\d\d)", file.tags().get("TIFFTAG_DATETIME", ""))
        self.about = Info(
            path=path,
            width=file.width,
            height=file.height,
            bands=len(self.bands),
            dtype=np.result_type(*(file.dtypes[n - 1] for n in self.bands)),
            nodata=file.nodata,
            transform=place and tuple(place)[:6],
            crs=(crs and crs.to_string()) or None,  # "EPSG:n" where it is one, else WKT
            band_names=names if any(names) else (),
            scaling=() if {*scaling} == {(1.0, 0.0)} else scaling,
            date="-".join(day.groups()) if day else "",
        )

    def read(self, window, bands, masked):
        about = self.about
        row, col, height, width = window or (0, 0, about.height, about.width)
        bands = list(range(about.bands) if bands is None else bands)
        if min(row, col) < 0 or row + height > about.height or col + width > about.width:
            raise ValueError(
                f"{about.path}: window (row {row}, col {col}, {height} x {width}) leaves the image "
                f"of {about.height} x {about.width} pixels"
            )
        if not all(0 <= band < about.bands for band in bands):
            raise ValueError(
                f"{about.path}: bands {bands} asked for, the file has {about.bands}, counted from 0"
            )
        up = slice(None, None, -1 if self.flip else 1)
        window = Window(col, about.height - row - height if self.flip else row, width, height)
        wanted = [self.bands[band] for band in bands]
        wanted += [self.alpha] if masked and self.alpha else []
        pixels = self.file.read(wanted, window=window)[:, up]
        if not masked:
            return pixels
        chosen = pixels[: len(bands)]
        valid = np.isfinite(chosen).any(0)
        if about.nodata is not None:
            valid &= (chosen != about.nodata).any(0)
        if self.alpha:
            valid &= pixels[-1] != 0
        elif self.mask:
            valid &= self.file.dataset_mask(window=window)[up] != 0
        return chosen, valid


def _alpha(path, file):
    """The number of the band that masks the others, None without one.

    Aerial images with NIR call it alpha, as TIFF calls any fourth band: a band with a name of its
    own is an image, and so is one whose values vary. What a mask shows has one value mostly.
    """
    if file.count < 2 or ColorInterp.alpha not in file.colorinterp:
        return None
    number = file.colorinterp.index(ColorInterp.alpha) + 1
    name = (file.descriptions[number - 1] or "alpha").lower()
    if "alpha" not in name and "mask" not in name:
        return None
    shape = tuple(min(512, side) for side in (file.height, file.width))
    sample = file.read(number, out_shape=shape)
    top, full = sample.max(), {1, 255, np.iinfo(np.uint16).max}
    if top == 0 or (top in full and (sample == top).sum() >= (sample > 0).sum() / 2):
        return number
    say_once(
        f"{path}: band {number}, called alpha, varies like an image and is used as one; "
        "in other files alike",
        path.parent,
    )
    return None


SAID = set()


def say_once(sentence, about=None):
    """Print a warning; of one thing (default: the sentence) only the first."""
    if (about or sentence) not in SAID:
        SAID.add(about or sentence)
        print(f"warning: {sentence}")


def _georeference(path, file):
    """(Affine or None, rasterio CRS or None) of an open file, by its ground control points where it
    has no transform."""
    if not file.transform.is_identity:
        return file.transform, file.crs
    points, crs = file.gcps
    if len(points) < 3:
        return None, file.crs
    fit = from_gcps(points)
    apart = max(math.dist(~fit @ (p.x, p.y), (p.col, p.row)) for p in points)
    if apart > FIT:
        raise ValueError(
            f"{path}: its ground control points lie up to {apart:.3g} px off any affine transform; "
            "warp it with gdalwarp -tps first"
        )
    return fit, crs


# ---- ground


def crs_name(crs):
    """Name a CRS for people: 'EPSG:26914', the name in its WKT, or 'none'."""
    if not crs:
        return "none"
    return crs.split('"')[1] if '"' in crs else crs


def is_geographic(crs):
    """Whether a CRS (text or None) is in degrees."""
    return bool(crs) and rasterio.crs.CRS.from_user_input(crs).is_geographic


def project(crs, to, x, y):
    """Points of one CRS in another: (x, y) float64 arrays, inf or NaN where it does not reach.
    Raises ValueError for a CRS that is not tied to the Earth."""
    sentence = f"{crs_name(crs)} and {crs_name(to)}: not comparable (%s)"
    with _one_error(ValueError, sentence), rasterio.Env():
        return tuple(map(np.array, rasterio.warp.transform(crs, to, x, y)))


def same_ground(about, crs):
    """Whether the CRS of an image may be taken for another: its points then lie where they lay, to
    a hundredth of its pixel. NAD83 and WGS84 of one UTM zone agree, and so does an EPSG code with
    the same CRS as WKT or with heights. crs: text or None."""
    if about.crs == crs or not about.crs or not crs:
        return about.crs == crs
    x, y = corners(about, 5)
    try:
        moved = np.subtract(project(about.crs, crs, x, y), (x, y))
    except ValueError:
        return False
    return bool(np.hypot(*moved).max() < 0.01 * about.gsd)  # NaN and inf are not


def warp_grid(hr, mr, resampling="cubic"):
    """The Grid by which an image gets the axes of another: the pixel size of the first, pixels that
    divide alike from the other's corner, whatever the file, its size what both have in common.

    hr, mr: Info with CRS. Returns None where they share no ground.
    """
    x, y = project(hr.crs, mr.crs, *corners(hr, 21))
    a, b, c, d, e, f = mr.transform
    matrix = np.array([[a, b], [d, e]])
    finite = np.isfinite(x) & np.isfinite(y)
    if not finite.all():
        return None
    col, row = np.linalg.solve(matrix, [x - c, y - f])  # in MR pixels
    if is_geographic(hr.crs) == is_geographic(mr.crs):
        step = hr.gsd / mr.gsd
    else:
        # the area of the quadrilateral of the corners, which are first and last of 21 x 21 points
        down, across = (np.array([v[-1] - v[0], v[20] - v[420]]) for v in (row, col))
        area = abs(down[0] * across[1] - down[1] * across[0]) / 2
        step = math.sqrt(area / hr.width / hr.height)
    step = float(f"{step:.4g}")  # MR pixels; one for all sheets of a set
    low = np.maximum(0, [row.min(), col.min()])
    high = np.minimum([mr.height, mr.width], [row.max(), col.max()])
    first = np.floor(low / step + 1e-6).astype(int)
    last = np.ceil(high / step - 1e-6).astype(int)
    if (last - first < 1).any():
        return None
    height, width = (last - first).tolist()
    c, f = (matrix @ (first[::-1] * step) + [c, f]).tolist()
    place = (a * step, b * step, c, d * step, e * step, f)
    return Grid(mr.crs, place, height, width, resampling)


# ---- pixels


def masked(found, nodata):
    """(pixels, valid) of what a reader gives: pixels (bands, rows, cols) alone, or with what their
    mask shows. Of that pixels are valid but those at which a band is not finite, or all bands are
    nodata (float or None)."""
    pixels, shown = found if isinstance(found, tuple) else (found, True)
    valid = shown & np.isfinite(pixels).all(0)
    return pixels, valid if nodata is None else valid & (pixels != nodata).any(0)


def as_float(array, nodata):
    """Pixels (bands, rows, cols) as float32, NaN where a band is missing: not finite, or all bands
    nodata (one band at that value is a dark pixel). nodata: float or None."""
    missing = ~np.isfinite(array)
    if nodata is not None:
        missing |= (array == nodata).all(-3)
    return np.where(missing, np.float32("nan"), array.astype(np.float32))


# ---- writing


def write(path, array, transform=None, crs=None, nodata=None, band_names=(), **more):
    """Write an array (bands, rows, cols) or (rows, cols) at once, as `writer` does by rows."""
    array = np.asarray(array)
    array = array[None] if array.ndim == 2 else array
    rows = writer(path, array.shape, array.dtype, transform, crs, nodata, band_names, **more)
    with rows as write_rows:
        write_rows(array)


@contextmanager
def writer(
    path,
    shape,
    dtype,
    transform=None,
    crs=None,
    nodata=None,
    band_names=(),
    classes=(),
    colours=(),
    scaling=(),
):
    """Write a cloud-optimised GeoTIFF from top to bottom, with overviews; memory stays small.

        with raster.writer("map.tif", (1, rows, cols), np.uint8, nodata=255) as write_rows:
            write_rows(part)    # (1, n, cols), any n, until all rows were given

    Overviews are means of what is valid for floats and scaled integers, the commonest value of
    other integers, so class ids stay class ids. transform, crs, nodata, band_names, scaling: as in
    `Info`; crs may also be an EPSG code. classes: names, in the order of the ids, which go into
    path.aux.xml as GDAL's category names, and into the band's metadata as CLASS_0, CLASS_1, ...
    colours: (red, green, blue) of 0..255 for the values 0, 1, ... of one uint8 band.

    The file appears under its name only when it is complete, and replaces one that is there.
    Raises OSError where it cannot be written, ValueError for rows that do not fit, or too few.
    """
    path, dtype, (bands, height, width) = Path(path), np.dtype(dtype), shape
    tile = TILE
    while tile > 16 and tile * tile * bands * dtype.itemsize > 2**21:
        tile //= 2
    layout = {"count": bands, "height": height, "width": width, "dtype": dtype.name}
    layout |= {"tiled": True, "blockxsize": tile, "blockysize": tile, "interleave": "pixel"}
    layout |= {"compress": "deflate", "zlevel": 1, "bigtiff": "if_safer", "nodata": nodata}
    if crs:
        layout["crs"] = rasterio.crs.CRS.from_user_input(crs)
    if transform is not None:
        layout["transform"] = rasterio.Affine(*transform)
    row = 0

    def write_rows(part):
        # GDAL's cache holds the tiles until all their rows are there
        nonlocal row
        n = part.shape[1]
        if part.shape != (bands, n, width) or part.dtype != dtype or row + n > height:
            raise ValueError(
                f"{path}: rows ({bands}, up to {height - row}, {width}) of {dtype} expected, got "
                f"{part.shape} of {part.dtype}"
            )
        file.write(part, window=Window(0, row, width, n))
        row += n

    with (
        _one_error(OSError, f"{path}: cannot be written (%s)"),
        replacing(path) as whole,
        tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as folder,
        rasterio.Env(**ENV | {"GDAL_PAM_ENABLED": "NO"}),
    ):
        rough = Path(folder) / "rows.tif"
        with rasterio.open(rough, "w", driver="GTiff", **layout) as file:
            for n, name in enumerate(band_names, 1):
                file.set_band_description(n, name)
            if classes:
                file.update_tags(1, **{f"CLASS_{k}": name for k, name in enumerate(classes)})
            if colours:
                file.write_colormap(1, dict(enumerate(map(tuple, colours))))
            if scaling:
                file.scales, file.offsets = zip(*scaling, strict=True)
            yield write_rows
        if row != height:
            raise ValueError(f"{path}: got {row} rows of {height}")
        how = "average" if dtype.kind == "f" or scaling else "mode"
        rasterio.shutil.copy(
            rough, whole, driver="COG", compress="deflate", predictor="yes", blocksize=tile,
            overview_resampling=how, bigtiff="if_safer", num_threads=str(min(4, os.cpu_count())),
        )  # fmt: skip
        beside = path.with_name(path.name + ".aux.xml")
        beside.unlink(missing_ok=True)  # of an older file
        if classes:  # as GDAL keeps them beside a GeoTIFF
            names = "".join(f"<Category>{escape(name)}</Category>" for name in classes)
            xml = f'<PAMRasterBand band="1"><CategoryNames>{names}</CategoryNames></PAMRasterBand>'
            write_atomic(beside, f"<PAMDataset>{xml}</PAMDataset>")
