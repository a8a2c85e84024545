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
import shlex
import uuid
import warnings
import xml.etree.ElementTree as ET
from collections import namedtuple
from contextlib import ExitStack, contextmanager
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

logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # what GDAL says is raised here
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

DRIVERS = {
    **dict.fromkeys((".tif", ".tiff"), "GTiff"),
    **{".vrt": "VRT", ".jp2": "JP2OpenJPEG", ".png": "PNG", ".jpg": "JPEG"},
    **dict.fromkeys((".img", ".bsq", ".bil", ".bip", ".dat"), "ENVI"),
}
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF, both byte orders
TILE = 256  # px a side of the tiles written
ROWS = 256  # rows of an image that are read at a time, about
# sidecar files are looked for one by one: to list a folder of a million files takes minutes
ENV = {"GDAL_DISABLE_READDIR_ON_OPEN": "TRUE", "GDAL_CACHEMAX": 2**28, "GDAL_NUM_THREADS": "1"}
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
        a, b, _, d, e, _ = self.transform
        return math.sqrt(abs(a * e - b * d))

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


def read_rows(path, bands=None, *, masked=False):
    """Read an image from top to bottom: yields what `read` returns of n rows until all were given;
    the file is opened once, and memory holds a few rows of tiles."""
    with _open(path) as file:
        about, step = file.about, file.block_rows
        for row in range(0, about.height, step):
            window = (row, 0, min(step, about.height - row), about.width)
            yield file.read(window, bands, masked)


@contextmanager
def _open(path, grid=None):
    """Yield a _File; whatever GDAL raises becomes one sentence."""
    text = str(path)
    local = not text.startswith("/vsi")
    path = Path(path)
    driver = DRIVERS.get(path.suffix.lower())
    if local and not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if driver is None:
        raise ValueError(
            f"{path}: images are {', '.join(sorted(DRIVERS))}; convert it with gdal_translate"
        )
    if local:
        _refuse_foreign(path, driver)
    with _one_error(ValueError, f"{path}: damaged {driver} (%s); fetch the file again"):
        with rasterio.Env(**ENV), rasterio.open(path if local else text, driver=driver) as file:
            if grid is None:
                yield _File(path, file)
            else:
                with _warped(path, file, grid) as (vrt, alpha):
                    yield _File(path, vrt, alpha)


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


def _refuse_foreign(path, driver):
    """Raise ValueError where GDAL would follow a file to the network or out of its folder."""
    for beside in (".msk", ".ovr"):
        other = path.with_name(path.name + beside)
        if other.is_file() and _start(other) not in MAGIC:
            raise ValueError(f"{other}: no TIFF, as masks and overviews are; delete it")
    if driver == "GTiff" and (magic := _start(path)) not in MAGIC:
        raise ValueError(
            f"{path}: not a TIFF, it starts with {magic!r}; convert it with gdal_translate"
        )
    if driver != "VRT":
        return
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
        source = (folder / name).resolve()
        if (
            name.is_absolute()
            or element.get("relativeToVRT") != "1"
            or folder not in source.parents
        ):
            raise ValueError(
                f"{path}: its source {name} is not below its own folder by a relative path; move "
                "the VRT there and build it again with gdalbuildvrt"
            )
        if source.suffix.lower() not in DRIVERS or source.suffix.lower() == ".vrt":
            raise ValueError(f"{path}: its source {name} is none of {', '.join(sorted(DRIVERS))}")
        if not source.is_file():
            raise FileNotFoundError(f"{source}: no such file, but {path} names it")
        _refuse_foreign(source, DRIVERS[source.suffix.lower()])


def _start(path):
    with path.open("rb") as file:
        return file.read(4)


@contextmanager
def _warped(path, file, grid):
    """Yield (a WarpedVRT, the number of its alpha band), both masks and missing ground in that."""
    about = _File(path, file)
    if about.flip:
        raise ValueError(f"{path}: south-up, and to be warped; turn it with gdalwarp first")
    options = {} if about.alpha else {"add_alpha": True}
    if about.about.nodata is not None:
        options["src_nodata"] = options["nodata"] = about.about.nodata
    if not about.about.crs:
        raise ValueError(f"{path}: no CRS, so it cannot be warped")
    with (
        _without_alpha(file, about.alpha) as source,
        WarpedVRT(
            source,
            src_crs=about.about.crs,
            src_transform=rasterio.Affine(*about.about.transform),
            crs=grid.crs,
            transform=rasterio.Affine(*grid.transform),
            width=grid.width,
            height=grid.height,
            resampling=Resampling[grid.resampling],
            tolerance=0.01,  # px; GDAL's 0.125 would be seen at a pixel ratio of 2
            **options,
        ) as vrt,
    ):
        yield vrt, about.alpha or vrt.count


@contextmanager
def _without_alpha(file, alpha):
    """The file, or where GDAL takes an image of it for a mask, a VRT of it in memory that says
    better: the warp would blend by it."""
    if alpha or ColorInterp.alpha not in file.colorinterp:
        yield file
        return
    name = f"/vsimem/{uuid.uuid4()}.vrt"
    rasterio.shutil.copy(file, name, driver="VRT")
    try:
        with rasterio.open(name, "r+") as source:
            source.colorinterp = [
                ColorInterp.undefined if kind is ColorInterp.alpha else kind
                for kind in file.colorinterp
            ]
        with rasterio.open(name) as source:
            yield source
    finally:
        rasterio.shutil.delete(name)


class _File:
    """An open file: `about`, its Info, and `read`."""

    def __init__(self, path, file, alpha=None):
        self.file, self.alpha = file, alpha or _alpha(path, file)
        if file.count == 1 and len(file.subdatasets) > 1:
            raise ValueError(
                f"{path}: holds {len(file.subdatasets)} images; split them, the first with "
                f"gdal_translate {shlex.quote(f'GTIFF_DIR:1:{path}')} OUT.tif"
            )
        if not file.count:
            raise ValueError(f"{path}: holds no image")
        self.bands = [n for n in file.indexes if n != self.alpha]
        self.mask = any(
            MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags
            for flags in file.mask_flag_enums
        )
        transform, crs = _georeference(path, file)
        self.flip = bool(transform) and transform[4] > 0 and transform[1] == transform[3] == 0
        if self.flip:
            a, b, c, d, e, f = transform
            transform = (a, b, c, d, -e, f + e * file.height)
        names = tuple(file.descriptions[n - 1] or "" for n in self.bands)
        scaling = tuple((file.scales[n - 1], file.offsets[n - 1]) for n in self.bands)
        self.about = Info(
            path=path,
            width=file.width,
            height=file.height,
            bands=len(self.bands),
            dtype=np.result_type(*(file.dtypes[n - 1] for n in self.bands)),
            nodata=file.nodata,
            transform=transform,
            crs=crs and _name(crs),
            band_names=names if any(names) else (),
            scaling=() if {*scaling} == {(1.0, 0.0)} else scaling,
            date=_date(file.tags().get("TIFFTAG_DATETIME", "")),
        )

    @property
    def block_rows(self):
        """How many rows to read at a time: whole rows of tiles or strips."""
        height = self.file.block_shapes[0][0]
        return height * max(1, ROWS // height) if height < self.about.height else height

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
        up = about.height - row - height if self.flip else row
        window = Window(col, up, width, height)
        indexes = [self.bands[band] for band in bands]
        wanted = [*indexes, self.alpha] if masked and self.alpha else indexes
        pixels = self.file.read(wanted, window=window)
        if self.flip:
            pixels = pixels[:, ::-1]
        if not masked:
            return pixels
        chosen = pixels[: len(bands)]
        valid = (
            np.isfinite(chosen).any(0)
            if chosen.dtype.kind == "f"
            else np.ones((height, width), bool)
        )
        if about.nodata is not None:
            valid &= (chosen != about.nodata).any(0)
        if self.alpha:
            valid &= pixels[-1] != 0
        elif self.mask:
            inside = self.file.dataset_mask(window=window) != 0
            valid &= inside[::-1] if self.flip else inside
        return chosen, valid


def _alpha(path, file):
    """The number of the band that masks the others, None without one.

    Aerial images with NIR call it alpha, as TIFF calls any fourth band: a band with a name of its
    own is an image, and so is one whose values vary. What a mask shows has one value mostly.
    """
    for number, kind in enumerate(file.colorinterp, 1):
        if kind is not ColorInterp.alpha or file.count < 2:
            continue
        name = (file.descriptions[number - 1] or "alpha").lower()
        if "alpha" in name or "mask" in name:
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
    """(transform, crs) of an open file, by its ground control points where it has no transform."""
    if not file.transform.is_identity:
        return tuple(file.transform)[:6], file.crs
    points, crs = file.gcps
    if len(points) < 3:
        return None, file.crs
    fit = from_gcps(points)
    apart = [math.dist(~fit * (p.x, p.y), (p.col, p.row)) for p in points]
    if max(apart) > FIT:
        raise ValueError(
            f"{path}: its ground control points lie up to {max(apart):.3g} px off any affine "
            "transform; warp it with gdalwarp -tps first"
        )
    return tuple(fit)[:6], crs


def _date(text):
    """ISO date of a TIFFTAG_DATETIME, "2018:07:16 10:20:30"; "" of anything else."""
    day = text[:10].replace(":", "-")
    return day if len(day) == 10 and day[:4].isdecimal() and day[:2] in ("19", "20") else ""


# ---- ground


def _name(crs):
    """Say "EPSG:n" where a rasterio CRS is one, else WKT."""
    return crs.to_string() or None


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
    try:
        return offset_on_ground(about, crs) < 0.01
    except ValueError:
        return False


def offset_on_ground(about, crs):
    """By how many of its pixels an image moves at most if its CRS is taken for another."""
    x, y = corners(about, 5)
    moved = np.subtract(project(about.crs, crs, x, y), (x, y))
    apart = np.hypot(*moved).max() / about.gsd
    return apart if np.isfinite(apart) else math.inf


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


def valid_pixels(array, nodata):
    """Where an image (..., bands, rows, cols) has data: (..., rows, cols) bool. Missing are pixels
    at which a band is not finite, or all bands are nodata (float or None)."""
    if array.dtype.kind == "f":
        valid = np.isfinite(array).all(-3)
    else:
        valid = np.ones((*array.shape[:-3], *array.shape[-2:]), bool)
    if nodata is not None:
        valid &= (array != nodata).any(-3)
    return valid


def masked(found, nodata):
    """(pixels, valid) of what a reader gives: pixels alone, or with what their mask says. Valid is
    what the mask shows and `valid_pixels` finds; nodata: float or None."""
    pixels, shown = found if isinstance(found, tuple) else (found, True)
    return pixels, shown & valid_pixels(pixels, nodata)


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
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3:
        raise ValueError(f"{path}: (bands, rows, cols) expected, got shape {array.shape}")
    with writer(
        path, array.shape, array.dtype, transform, crs, nodata, band_names, **more
    ) as write_rows:
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
    Raises ValueError where the arguments do not fit each other, or for rows of another shape or
    dtype, or too few of them.
    """
    path, dtype = Path(path), np.dtype(dtype)
    bands, height, width = shape
    if dtype.kind not in "iuf":
        raise ValueError(f"{path}: pixels are whole numbers or floats, got {dtype}; convert first")
    if min(shape) < 1:
        raise ValueError(f"{path}: an image of shape {tuple(shape)} holds no pixel")
    if band_names and len(band_names) != bands:
        raise ValueError(f"{path}: {len(band_names)} band names for {bands} bands")
    if colours and (bands > 1 or dtype != np.uint8 or len(colours) > 256):
        raise ValueError(
            f"{path}: a colour table is for one band of uint8 and at most 256 values, got {bands} "
            f"of {dtype} and {len(colours)}"
        )
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
    rough, whole = (path.with_name(f"{path.name}.{os.getpid()}.{k}.tmp") for k in (1, 2))
    with ExitStack() as stack:
        stack.enter_context(_one_error(OSError, f"{path}: cannot be written (%s)"))
        stack.callback(rough.unlink, missing_ok=True)
        stack.callback(whole.unlink, missing_ok=True)
        threads = str(min(4, os.cpu_count()))
        with rasterio.Env(**ENV | {"GDAL_PAM_ENABLED": "NO"}):
            with rasterio.open(rough, "w", driver="GTiff", **layout) as file:
                for n, name in enumerate(band_names, 1):
                    file.set_band_description(n, name)
                if classes:
                    file.update_tags(1, **{f"CLASS_{k}": name for k, name in enumerate(classes)})
                if colours:
                    file.write_colormap(1, dict(enumerate(map(tuple, colours))))
                if scaling:
                    file.scales, file.offsets = zip(*scaling, strict=True)
                write_rows = _Rows(path, file, shape, dtype, tile)
                yield write_rows
                write_rows.finish()
            how = "average" if dtype.kind == "f" or scaling else "mode"
            rasterio.shutil.copy(
                rough, whole, driver="COG", compress="deflate", predictor="yes", blocksize=tile,
                overview_resampling=how, bigtiff="if_safer", num_threads=threads,
            )  # fmt: skip
        _write_categories(path, classes)
        os.replace(whole, path)


class _Rows:
    """Call it with parts (bands, n, width); they go to the file by whole rows of tiles, as a tile
    that is written twice would be compressed twice. Raises ValueError as `writer` says."""

    def __init__(self, path, file, shape, dtype, tile):
        self.path, self.file, self.shape, self.dtype, self.tile = path, file, shape, dtype, tile
        self.waiting, self.row, self.held = [], 0, 0

    def __call__(self, part):
        bands, height, width = self.shape
        if part.dtype != self.dtype or (len(part), part.shape[2]) != (bands, width):
            raise ValueError(
                f"{self.path}: rows of shape ({bands}, n, {width}) {self.dtype} expected, got "
                f"{part.shape} {part.dtype}"
            )
        self.waiting.append(part.copy())
        self.held += part.shape[1]
        done = self.row + self.held
        if done > height:
            raise ValueError(f"{self.path}: got {done} rows of {height}")
        ready = self.held if done == height else self.held // self.tile * self.tile
        if ready:
            joined = np.concatenate(self.waiting, axis=1)
            self.file.write(joined[:, :ready], window=Window(0, self.row, width, ready))
            self.row, self.held, self.waiting = self.row + ready, done - self.row - ready, []
            self.waiting.append(joined[:, ready:])

    def finish(self):
        if self.row < self.shape[1]:
            raise ValueError(f"{self.path}: got {self.row + self.held} rows of {self.shape[1]}")


def _write_categories(path, classes):
    """Class names as GDAL keeps them beside a GeoTIFF; what an older file had there goes."""
    beside = path.with_name(path.name + ".aux.xml")
    beside.unlink(missing_ok=True)
    if classes:
        names = "".join(f"<Category>{escape(name)}</Category>" for name in classes)
        temporary = beside.with_name(f"{beside.name}.{os.getpid()}.tmp")
        temporary.write_text(
            f'<PAMDataset><PAMRasterBand band="1"><CategoryNames>{names}</CategoryNames>'
            "</PAMRasterBand></PAMDataset>",
            "utf-8",
        )
        os.replace(temporary, beside)
