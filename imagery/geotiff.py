"""Read, window and write GeoTIFF with tifffile and imagecodecs; no GDAL, no PROJ.

Pixel coordinates are (row, col) with (0, 0) the top-left *corner* of the first pixel, whatever
the file's own convention: a PixelIsPoint file is shifted by half a pixel on reading and back on
writing. Bands count from 0.
"""

import itertools
import logging
import math
import os
import struct
import tempfile
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from xml.sax.saxutils import escape, unescape

import imagecodecs
import numpy as np
import tifffile

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it logs of a file, _open raises

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF, both byte orders
PIXEL_SCALE, TIEPOINT, TRANSFORMATION = 33550, 33922, 34264
GEO_KEYS, GEO_DOUBLES, GEO_ASCII = 34735, 34736, 34737
GDAL_METADATA, GDAL_NODATA = 42112, 42113
KEY_NAMES = {int(key): key.name for key in tifffile.TIFF.GEO_KEYS}
COMPRESSED = 2**17  # pixels shrink to no less than 1 in this, whatever the codec
CLASSIC = 2**32 - 2**25  # bytes of pixels in a TIFF that is no BigTIFF, with room for the tags
TILE = 256  # px a side of the tiles written
POINT = 2  # GTRasterTypeGeoKey: the tie point is the centre of a pixel
USER_DEFINED = 32767


@dataclass(frozen=True)
class Info:
    """What a GeoTIFF says of itself.

    transform: (a, b, c, d, e, f), x = a col + b row + c and y = d col + e row + f of pixel corners,
    in CRS units; None when not georeferenced. crs: GeoKey name -> value, None when there are none.
    nodata: None when not declared. band_names: one per band, or () when the file names none.
    """

    path: Path
    width: int
    height: int
    bands: int
    dtype: np.dtype
    nodata: float | None
    transform: tuple | None
    crs: dict | None
    band_names: tuple

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
        a, b, c, d, e, f = self.transform
        corners = [(0, 0), (0, self.width), (self.height, 0), (self.height, self.width)]
        x = [a * col + b * row + c for row, col in corners]
        y = [d * col + e * row + f for row, col in corners]
        return min(x), min(y), max(x), max(y)


def info(path):
    """Describe the first image of a TIFF without decoding pixels.

    Further full-size pages of a one-band file count as its bands; overviews do not, and a mask says
    which pixels are nodata.
    Raises FileNotFoundError, and ValueError if it is not a TIFF or is truncated.
    """
    with _open(path) as (_, _, _, about):
        return about


def read(path, window=None, bands=None):
    """Read pixels; only the tiles or strips that the window touches are decoded.

    window: (row, col, height, width) in pixels, the whole image when None. bands: list of band
    indices, in the order wanted. Returns (bands, height, width) of the file's dtype in native byte
    order; tiles that a sparse file leaves out hold nodata, or 0. Raises as `info` does, and
    ValueError for a window or band outside of the file or for data that cannot be decoded.
    """
    with _open(path) as (tif, pages, mask, about):
        return _read(tif, pages, mask, about, window, bands)


def read_rows(path, bands=None):
    """Read an image from top to bottom: yields (bands, n, width) until all rows were given.

    The file is opened once and every tile or strip decoded once; memory holds one row of tiles.
    bands, dtype, nodata and errors: as of `read`.
    """
    with _open(path) as (tif, pages, mask, about):
        height = _tiling(pages[0])[0]
        height *= -(-TILE // height)  # strips of a row or two: many at once
        for row in range(0, about.height, height):
            window = (row, 0, min(height, about.height - row), about.width)
            yield _read(tif, pages, mask, about, window, bands)


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
):
    """Write a GDAL-compatible GeoTIFF from top to bottom, with overviews; memory stays small.

        with geotiff.writer("map.tif", (1, rows, cols), np.uint8, nodata=255) as write_rows:
            write_rows(part)    # (1, n, cols), any n, until all rows were given

    Tiles of 256 px a side, less where many bands make them larger than 2 MB, deflate with
    predictor, the bands of a pixel side by side. Each overview halves the one before, down to
    512 px: floats by the mean of what is valid, integers by the commonest value, or the top-left
    one where all differ (so class ids stay class ids).
    transform, crs, nodata, band_names: as in `Info`, whose values give the same georeference back
    exactly; crs may also be an EPSG code (4000 to 4999 are taken as geographic, others as
    projected). classes: names, in the order of the ids; in the file as metadata CLASS_0, CLASS_1,
    ... of the band. colours: (red, green, blue) of 0..255 for the values 0, 1, ... of one uint8
    band.

    The file appears under its name only when it is complete, and replaces one that is there;
    BigTIFF where 4 GB do not do. Raises ValueError where the arguments do not fit each other, or
    for rows of another shape or dtype, or too few of them.
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
    if isinstance(crs, int):
        geographic = 4000 <= crs < 5000
        crs = {
            "GTModelTypeGeoKey": 2 if geographic else 1,
            "GTRasterTypeGeoKey": 1,
            "GeographicTypeGeoKey" if geographic else "ProjectedCSTypeGeoKey": crs,
        }

    tile = TILE
    while tile > 16 and tile * tile * bands * dtype.itemsize > 2**21:
        tile //= 2
    tags = []
    if transform is not None:
        tags += _transform_tags(transform, crs)
    if crs:
        tags += _geokey_tags(crs)
    if band_names or classes:
        # GDAL escapes what it puts into XML once more
        bands_named = [
            ("DESCRIPTION", i, ' role="description"', n) for i, n in enumerate(band_names)
        ]
        classes_named = [(f"CLASS_{i}", 0, "", name) for i, name in enumerate(classes)]
        items = [
            f'<Item name="{key}" sample="{band}"{role}>{escape(escape(name))}</Item>'
            for key, band, role, name in bands_named + classes_named
        ]
        text = "\n  ".join(["<GDALMetadata>", *items]) + "\n</GDALMetadata>"
        # the tag holds ASCII; XML says the rest in it
        text = text.encode("ascii", "xmlcharrefreplace").decode()
        tags.append((GDAL_METADATA, 2, 0, text, True))
    if nodata is not None:
        tags.append((GDAL_NODATA, 2, 0, f"{nodata:.17g}", True))
    palette = None
    if colours:
        palette = np.zeros((3, 256), np.uint16)
        palette[:, : len(colours)] = 257 * np.asarray(colours, np.uint16).T

    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with ExitStack() as stack:
            threads = stack.enter_context(ThreadPoolExecutor(min(4, os.cpu_count())))
            levels = []
            while not levels or max(height, width) > 2 * TILE:
                if levels:
                    height, width = -(-height // 2), -(-width // 2)
                # nameless: nothing stays of it, whatever ends the process
                spool = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
                levels.append(_Level((bands, height, width), dtype, nodata, tile, spool, threads))
            for level, coarser in itertools.pairwise(levels):
                level.coarser = coarser

            def write_rows(rows):
                if rows.dtype != dtype or (len(rows), rows.shape[2]) != (bands, shape[2]):
                    raise ValueError(
                        f"{path}: rows of shape ({bands}, n, {shape[2]}) {dtype} expected, got "
                        f"{rows.shape} {rows.dtype}"
                    )
                levels[0].put(rows)

            yield write_rows
            if levels[0].rows != shape[1]:
                raise ValueError(f"{path}: got {levels[0].rows} rows of {shape[1]}")
            size = sum(sum(level.sizes) for level in levels)
            with tifffile.TiffWriter(temporary, bigtiff=size > CLASSIC) as tif:
                for level in levels:
                    level.spool.seek(0)
                    tif.write(
                        (level.spool.read(size) for size in level.sizes),
                        shape=level.shape[1:] if bands == 1 else (*level.shape[1:], bands),
                        dtype=dtype,
                        photometric="minisblack" if palette is None else "palette",
                        planarconfig=None if bands == 1 else "contig",
                        tile=(tile, tile),
                        compression="zlib",
                        predictor=3 if dtype.kind == "f" else 2,
                        colormap=palette,
                        subfiletype=0 if level is levels[0] else 1,
                        metadata=None,
                        extratags=tags if level is levels[0] else (),
                    )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _Level:
    """One resolution of a file that is being written: rows in, compressed tiles into the spool,
    rows of half the size on to the next level."""

    def __init__(self, shape, dtype, nodata, tile, spool, threads):
        self.shape, self.nodata, self.tile, self.coarser = shape, nodata, tile, None
        self.spool, self.sizes, self.threads = spool, [], threads
        self.rows, self.waiting = 0, np.empty((shape[0], 0, shape[2]), dtype)

    def put(self, rows):
        self.rows += rows.shape[1]
        waiting = np.concatenate([self.waiting, rows], axis=1)
        while waiting.shape[1] >= self.tile or (waiting.shape[1] and self.rows == self.shape[1]):
            part, waiting = waiting[:, : self.tile], waiting[:, self.tile :]
            columns = range(0, self.shape[2], self.tile)
            tiles = [part[:, :, col : col + self.tile] for col in columns]
            for data in self.threads.map(self.compress, tiles):
                self.spool.write(data)
                self.sizes.append(len(data))
            if self.coarser:
                self.coarser.put(_halve(part, self.nodata))
        self.waiting = waiting.copy()  # not a view that keeps all rows in memory

    def compress(self, part):
        """(bands, rows, cols) -> the bytes of a whole tile, with the predictor of its dtype."""
        bands, rows, cols = part.shape
        tile = np.zeros((self.tile, self.tile, bands), part.dtype)
        tile[:rows, :cols] = part.transpose(1, 2, 0)
        predict = (
            imagecodecs.floatpred_encode if tile.dtype.kind == "f" else imagecodecs.delta_encode
        )
        return imagecodecs.deflate_encode(predict(tile, axis=-2))


def _halve(rows, nodata):
    """Half the resolution of (bands, rows, cols), odd sides rounded up; see `writer` for how."""
    rows = np.pad(rows, [(0, 0), (0, rows.shape[1] % 2), (0, rows.shape[2] % 2)], mode="edge")
    four = np.stack([rows[:, i::2, j::2] for i in (0, 1) for j in (0, 1)])  # (4, bands, h, w)
    if rows.dtype.kind == "f":
        valid = np.isfinite(four)
        if nodata is not None:
            valid &= four != nodata
        count = valid.sum(0)
        mean = np.where(valid, four, 0).sum(0) / np.maximum(count, 1)
        return np.where(count, mean, four[0]).astype(rows.dtype)
    votes = (four[:, None] == four).sum(0, dtype=np.uint8)
    return np.take_along_axis(four, votes.argmax(0)[None], axis=0)[0]


def as_float(array, nodata):
    """Pixels (bands, rows, cols) as float32, NaN where a band is missing: not finite, or all bands
    nodata (one band at that value is a dark pixel). nodata: float or None."""
    missing = ~np.isfinite(array)
    if nodata is not None:
        missing |= (array == nodata).all(0)
    return np.where(missing, np.float32(np.nan), array.astype(np.float32))


def valid_pixels(array, nodata):
    """Say which pixels hold data: all bands finite, and not every band equal to nodata.

    One band at the nodata value is a dark pixel, not a hole: 0 is both in 8-bit imagery.
    array: (..., bands, rows, cols). nodata: float or None. Returns bool (..., rows, cols).
    """
    valid = np.isfinite(array).all(-3)
    if nodata is not None:
        valid &= (array != nodata).any(-3)
    return valid


def same_crs(a, b):
    """Whether two CRS (GeoKey dicts or None) are the same, as far as their keys tell.

    EPSG codes are compared where both have one. Two user-defined CRS are compared by their
    parameters, to 1e-9 relative; citations and redundant ellipsoid axes do not count. A code
    against a user-defined CRS is a difference: telling needs the EPSG database.
    """
    if not a or not b:
        return not a and not b
    if _epsg(a) or _epsg(b):
        return _epsg(a) == _epsg(b)
    a, b = _parameters(a), _parameters(b)
    return a.keys() == b.keys() and all(np.allclose(a[k], b[k], rtol=1e-9, atol=1e-12) for k in a)


def crs_name(crs):
    """Name a CRS for people: 'EPSG:26914', 'user-defined (...)' or 'none'."""
    if not crs:
        return "none"
    if _epsg(crs):
        return f"EPSG:{_epsg(crs)}"
    numbers = {k.removesuffix("GeoKey"): v for k, v in _parameters(crs).items()}
    return "user-defined (" + ", ".join(f"{k} {v}" for k, v in numbers.items()) + ")"


@contextmanager
def _open(path):
    """Yield the TiffFile, its band pages, its mask's page or None, and its Info; says what is wrong
    with a file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic not in MAGIC:
            raise ValueError(
                f"{path}: not a TIFF, it starts with {magic!r}; convert it with gdal_translate"
            )
        with ExitStack() as stack:
            try:
                tif = stack.enter_context(tifffile.TiffFile(path))
                pages = _band_pages(tif)
                mask = _mask_page(tif, pages)
                about = _describe(path, pages, mask)
            # what the parser and the parts below trip over where a tag holds another type or count
            except (struct.error, LookupError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}: truncated or damaged TIFF ({error}); fetch the file again"
                ) from error
            yield tif, pages, mask, about
    except OSError as error:
        error.filename = error.filename or str(path)  # a read that fails does not say of which file
        raise


def _read(tif, pages, mask, about, window=None, bands=None):
    """`read` of an open file."""
    path = about.path
    row, col, height, width = window or (0, 0, about.height, about.width)
    bands = range(about.bands) if bands is None else bands
    if min(row, col) < 0 or row + height > about.height or col + width > about.width:
        raise ValueError(
            f"{path}: window (row {row}, col {col}, {height} x {width}) leaves the image of "
            f"{about.height} x {about.width} pixels"
        )
    if not all(0 <= band < about.bands for band in bands):
        raise ValueError(
            f"{path}: bands {list(bands)} asked for, the file has {about.bands}, counted from 0"
        )
    fill = 0 if about.nodata is None else about.nodata
    with np.errstate(invalid="ignore"):  # an integer file may declare a nodata of NaN
        out = np.full((len(bands), height, width), fill, about.dtype)

    separate = pages[0].planarconfig == 2
    # where the samples of each band lie: (page, plane of the page) -> [(index in out, sample)]
    sources = {}
    for k, band in enumerate(bands):
        if len(pages) > 1:
            sources.setdefault((band, 0), []).append((k, 0))
        elif separate:
            sources.setdefault((0, band), []).append((k, 0))
        else:
            sources.setdefault((0, 0), []).append((k, band))

    for (number, plane), samples in sources.items():
        tile_height, tile_width, tile_rows, tile_cols = _tiling(pages[number])
        for r in range(row // tile_height, math.ceil((row + height) / tile_height)):
            for c in range(col // tile_width, math.ceil((col + width) / tile_width)):
                index = (plane * tile_rows + r) * tile_cols + c
                tile = _decode(path, tif, pages[number], index)
                if tile is None:
                    continue
                top, left = r * tile_height, c * tile_width
                y0, y1 = max(row, top), min(row + height, top + tile.shape[0])
                x0, x1 = max(col, left), min(col + width, left + tile.shape[1])
                part = tile[y0 - top : y1 - top, x0 - left : x1 - left]
                for k, sample in samples:
                    out[k, y0 - row : y1 - row, x0 - col : x1 - col] = part[..., sample]

    if mask is not None:
        whole = replace(about, bands=1, dtype=np.dtype(np.uint8), nodata=None)
        valid = _read(tif, [mask], None, whole, (row, col, height, width))[0]
        out[:, valid == 0] = fill
    return out


def _band_pages(tif):
    """The pages that hold the bands; raises TiffFileError unless all their pixels are there."""
    if len(tif.pages) == 0:
        raise tifffile.TiffFileError("no image in it")
    page = tif.pages.first
    # tifffile drops the tags whose values lie beyond the end, a georeference among them
    tif.filehandle.seek(page.offset)
    (tags,) = struct.unpack(tif.tiff.tagnoformat, tif.filehandle.read(tif.tiff.tagnosize))
    if len(page.tags) < tags:
        raise tifffile.TiffFileError(f"{tags - len(page.tags)} of {tags} tags are cut off")
    pages = [page]
    if page.samplesperpixel == 1:
        same = (page.shape, page.dtype, 0)
        pages += [p for p in tif.pages[1:] if (p.shape, p.dtype, p.subfiletype) == same]
    for page in pages:
        if page.dtype is None:
            raise tifffile.TiffFileError("pixels of an unknown type")
        height, width, rows, cols = _tiling(page)
        planes = page.samplesperpixel if page.planarconfig == 2 else 1
        offsets, counts = np.array(page.dataoffsets), np.array(page.databytecounts)
        if not len(offsets) == len(counts) == planes * rows * cols > 0:
            raise tifffile.TiffFileError(
                f"{planes * rows * cols} tiles or strips, {len(offsets)} offsets and {len(counts)} "
                "byte counts"
            )
        end = (offsets + counts).max()
        if end > tif.filehandle.size:
            raise tifffile.TiffFileError(
                f"pixels up to byte {end}, the file ends at {tif.filehandle.size}"
            )
        # a damaged width would ask for all the memory there is
        bits = height * width * page.samplesperpixel // planes * page.bitspersample
        if 0 < counts.max() * (1 if page.compression == 1 else COMPRESSED) < bits / 8:
            raise tifffile.TiffFileError(
                f"{height} x {width} pixels in a tile or strip of at most {counts.max()} bytes"
            )
    return pages


def _tiling(page):
    """Height and width of a tile or strip of a page, and how many rows and columns of them."""
    height = page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
    width = page.tilewidth if page.is_tiled else page.imagewidth
    if min(height, width) < 1:
        raise tifffile.TiffFileError(f"tiles or strips of {height} x {width} pixels")
    return height, width, -(-page.imagelength // height), -(-page.imagewidth // width)


def _mask_page(tif, pages):
    """The page that says which pixels hold data, as GDAL keeps it in the file; None without."""
    size = pages[0].imagelength, pages[0].imagewidth
    for page in tif.pages[1:]:
        if page.subfiletype == 4 and (page.imagelength, page.imagewidth) == size:
            return page
    return None


def _nodata(page, mask):
    """The value of missing pixels: as declared; with a mask alone NaN, or 0 of whole numbers."""
    with suppress(ValueError):  # what is no number declares nothing
        return float(page.tags.valueof(GDAL_NODATA, "none"))
    if mask is None:
        return None
    return math.nan if page.dtype.kind == "f" else 0.0


def _describe(path, pages, mask):
    page = pages[0]
    crs = _geokeys(page)
    bands = page.samplesperpixel * len(pages)
    return Info(
        path=Path(path),
        width=page.imagewidth,
        height=page.imagelength,
        bands=bands,
        dtype=page.dtype.newbyteorder("="),
        nodata=_nodata(page, mask),
        transform=_transform(page, crs),
        crs=crs,
        band_names=_band_names(page.tags.valueof(GDAL_METADATA), bands),
    )


def _decode(path, tif, page, index):
    """Decode one tile or strip to (rows, cols, samples); None where a sparse file leaves it out."""
    if page.databytecounts[index] == 0:
        return None
    tif.filehandle.seek(page.dataoffsets[index])
    data = tif.filehandle.read(page.databytecounts[index])
    try:
        tables = {"jpegtables": page.jpegtables} if page.jpegtables else {}
        tile, _, shape = page.decode(data, index, **tables)
    except (RuntimeError, ValueError) as error:  # imagecodecs errors are RuntimeErrors
        raise ValueError(
            f"{path}: damaged TIFF, tile or strip {index} cannot be decoded ({error}); "
            "fetch the file again"
        ) from error
    return tile[0, : shape[1], : shape[2]]


def _band_names(text, bands):
    """The DESCRIPTION items of GDAL's metadata, one per band, or ()."""
    if not text:
        return ()
    try:
        items = ET.fromstring(text).iter("Item")
    except ET.ParseError:
        return ()  # a broken comment is no reason to refuse the pixels
    names = {  # escaped twice, see `writer`
        i.get("sample"): unescape(i.text or "") for i in items if i.get("role") == "description"
    }
    return tuple(names.get(str(band), "") for band in range(bands)) if any(names.values()) else ()


def _geokeys(page):
    """GeoKeys as name -> int, float, tuple or str; unknown keys by their number."""
    if GEO_KEYS not in page.tags:
        return None
    directory = page.tags[GEO_KEYS].value
    keys = {}
    for i in range(4, 4 + 4 * directory[3], 4):
        key, tag, count, value = directory[i : i + 4]
        if tag == GEO_ASCII:
            value = page.tags[tag].value[value : value + count].removesuffix("|")
        elif tag:
            numbers = np.atleast_1d(page.tags[tag].value)[value : value + count].tolist()
            value = numbers[0] if count == 1 else tuple(numbers)
        keys[KEY_NAMES.get(key, str(key))] = value
    return keys


def _geokey_tags(crs):
    """The three GeoKey tags, the reverse of `_geokeys`."""
    numbers = {name: key for key, name in KEY_NAMES.items()}
    directory, doubles, text = [], [], ""
    for key, value in sorted((numbers.get(n) or int(n), value) for n, value in crs.items()):
        if isinstance(value, str):
            value = value.encode("ascii", "replace").decode()  # citations, which only people read
            directory += [key, GEO_ASCII, len(value) + 1, len(text)]
            text += value + "|"
        elif isinstance(value, int):
            directory += [key, 0, 1, value]
        else:
            values = np.atleast_1d(value).tolist()
            directory += [key, GEO_DOUBLES, len(values), len(doubles)]
            doubles += values
    directory = [1, 1, 0, len(crs), *directory]
    tags = [(GEO_KEYS, 3, len(directory), directory, True)]
    if doubles:
        tags.append((GEO_DOUBLES, 12, len(doubles), doubles, True))
    if text:
        tags.append((GEO_ASCII, 2, 0, text, True))
    return tags


def _corner(crs):
    """Where the file's raster coordinate (0, 0) lies, in pixels from the corner."""
    return 0.5 if crs and crs.get("GTRasterTypeGeoKey") == POINT else 0.0


def _transform(page, crs):
    shift = _corner(crs)
    if PIXEL_SCALE in page.tags and TIEPOINT in page.tags:
        width, height = page.tags[PIXEL_SCALE].value[:2]
        col, row, _, x, y, _ = page.tags[TIEPOINT].value[:6]
        height = abs(height)  # some write it negative, which GDAL ignores, too
        return (width, 0.0, x - (col + shift) * width, 0.0, -height, y + (row + shift) * height)
    if TRANSFORMATION in page.tags:
        a, b, _, c, d, e, _, f = page.tags[TRANSFORMATION].value[:8]
        return (a, b, c - shift * (a + b), d, e, f - shift * (d + e))
    return None


def _transform_tags(transform, crs):
    a, b, c, d, e, f = map(float, transform)
    shift = _corner(crs)
    if b == d == 0 and a > 0 > e:
        # tie the corner, not the centre, so that c and f are stored as they are
        return [
            (PIXEL_SCALE, 12, 3, (a, -e, 0.0), True),
            (TIEPOINT, 12, 6, (-shift, -shift, 0.0, c, f, 0.0), True),
        ]
    x, y = c + shift * (a + b), f + shift * (d + e)
    matrix = (a, b, 0.0, x, d, e, 0.0, y, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    return [(TRANSFORMATION, 12, 16, matrix, True)]


def _epsg(crs):
    """The EPSG code of a CRS, None where it is user-defined."""
    code = crs.get("ProjectedCSTypeGeoKey", crs.get("GeographicTypeGeoKey", USER_DEFINED))
    return None if code in (0, USER_DEFINED) else code


def _parameters(crs):
    """The numbers that define a user-defined CRS."""
    numbers = {k: v for k, v in crs.items() if not isinstance(v, str) and k != "GTRasterTypeGeoKey"}
    if numbers.get("GeographicTypeGeoKey", USER_DEFINED) != USER_DEFINED:
        # the code of the base CRS says all of it; writers repeat its parts or not
        numbers = {
            k: v
            for k, v in numbers.items()
            if k == "GeographicTypeGeoKey" or not k.startswith("Geog")
        }
    return numbers
