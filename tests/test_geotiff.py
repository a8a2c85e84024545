"""imagery/geotiff.py against tifffile's own whole-image reader, and its every message."""

import os
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import refused

from imagery import geotiff

SHARED = Path(os.environ.get("CROSSSCALE_SHARED", Path(__file__).parents[2] / "shared")) / "data"
TRANSFORM = (10.0, 0.0, 399960.25, 0.0, -10.0, 5300040.1)
LO25 = {  # a user-defined CRS with every kind of GeoKey: codes, doubles, text
    "GTModelTypeGeoKey": 1,
    "GTRasterTypeGeoKey": 1,
    "GTCitationGeoKey": "unnamed",
    "GeographicTypeGeoKey": 4326,
    "GeogCitationGeoKey": "WGS 84",
    "GeogAngularUnitsGeoKey": 9102,
    "GeogSemiMajorAxisGeoKey": 6378137.0,
    "ProjectedCSTypeGeoKey": 32767,
    "ProjCoordTransGeoKey": 1,
    "ProjNatOriginLongGeoKey": 25.0,
    "ProjNatOriginLatGeoKey": 0.0,
    "ProjScaleAtNatOriginGeoKey": 1.0,
}


def shared(path):
    if not (SHARED / path).exists():
        pytest.skip(f"no imagery at {SHARED / path}; set CROSSSCALE_SHARED")
    return SHARED / path


def noise(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=shape).astype(dtype)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    return rng.integers(low, high, shape, dtype, endpoint=True)


DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 300, 261), (1, 33, 7), (3, 1, 1)])
def test_write_read_gives_the_same_back(tmp_path, dtype, shape):
    array = noise(shape, dtype)
    path = tmp_path / "a.tif"
    names = tuple(f"b<{i}>" for i in range(shape[0]))
    geotiff.write(path, array, TRANSFORM, LO25, nodata=-9999.5, band_names=names)
    about = geotiff.info(path)
    assert (about.bands, about.height, about.width, about.dtype) == (*shape, np.dtype(dtype))
    assert about.transform == TRANSFORM
    assert about.crs == LO25
    assert about.nodata == -9999.5
    assert about.band_names == names
    assert about.gsd == 10.0
    back = geotiff.read(path)
    assert back.dtype == array.dtype
    assert np.array_equal(back, array)
    whole = tifffile.imread(path).reshape(*shape[1:], shape[0])
    assert np.array_equal(whole.transpose(2, 0, 1), array)
    geotiff.write(path, array, nodata=float("nan"))
    assert np.isnan(geotiff.info(path).nodata)
    assert np.array_equal(geotiff.read(path), array)
    assert os.listdir(tmp_path) == ["a.tif"]  # no temporary file stays


LAYOUTS = [
    {"planarconfig": "contig", "rowsperstrip": 7},
    {"planarconfig": "separate", "rowsperstrip": 7},
    {"planarconfig": "contig", "tile": (32, 48)},
    {"planarconfig": "separate", "tile": (32, 48)},
    {"planarconfig": "contig", "tile": (64, 64), "compression": "lzw", "predictor": 2},
    {"planarconfig": "separate", "rowsperstrip": 16, "compression": "zstd", "predictor": 2},
    {"planarconfig": "contig", "rowsperstrip": 300, "byteorder": ">"},
    {"planarconfig": "contig", "tile": (32, 32), "byteorder": ">", "compression": "zlib"},
    {"planarconfig": "separate", "tile": (32, 32), "bigtiff": True},
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_window_and_bands_equal_a_slice_of_the_whole(tmp_path, layout):
    array = noise((5, 101, 130), "uint16")
    path = tmp_path / "a.tif"
    contig = layout["planarconfig"] == "contig"
    data = np.moveaxis(array, 0, -1) if contig else array
    tifffile.imwrite(path, data, photometric="minisblack", metadata=None, **layout)
    assert np.array_equal(geotiff.read(path), array)
    rng = np.random.default_rng(1)
    windows = [(0, 0, 1, 1), (100, 129, 1, 1), (0, 0, 101, 130), (32, 48, 32, 48)]
    for _ in range(20):
        row, col = rng.integers(0, 101), rng.integers(0, 130)
        windows.append((row, col, rng.integers(1, 102 - row), rng.integers(1, 131 - col)))
    for row, col, height, width in windows:
        bands = rng.permutation(5)[: rng.integers(1, 6)].tolist()
        part = geotiff.read(path, (row, col, height, width), bands)
        assert part.dtype == np.dtype("uint16")
        assert np.array_equal(part, array[bands, row : row + height, col : col + width])


def test_only_the_tiles_of_the_window_are_decoded(tmp_path):
    path = tmp_path / "a.tif"
    geotiff.write(path, noise((2, 600, 600), "uint8"))
    with tifffile.TiffFile(path) as tif:
        where = tif.pages[0].dataoffsets[8]  # the last tile
    with path.open("r+b") as file:
        file.seek(where)
        file.write(b"\xff" * 64)
    assert geotiff.read(path, (0, 0, 512, 600)).shape == (2, 512, 600)
    with refused(ValueError, f"{path}: ", "8"):
        geotiff.read(path)


def test_pages_are_bands_but_overviews_and_masks_are_not(tmp_path):
    path = tmp_path / "pages.tif"
    array = noise((3, 40, 50), "uint16")
    with tifffile.TiffWriter(path) as tif:
        for page in array:
            tif.write(page, photometric="minisblack", metadata=None)
        tif.write(array[0] > 9, subfiletype=4, metadata=None)
        tif.write(array[0, ::2, ::2], photometric="minisblack", subfiletype=1, metadata=None)
    assert geotiff.info(path).bands == 3
    assert np.array_equal(geotiff.read(path, (3, 4, 10, 20), [2, 0]), array[[2, 0], 3:13, 4:24])


def test_a_tile_left_out_reads_as_nodata(tmp_path):
    path = tmp_path / "sparse.tif"
    array = np.full((1, 512, 256), 7, "int16")
    geotiff.write(path, array, nodata=-1)
    with tifffile.TiffFile(path, mode="r+") as tif:
        for tag in ("TileOffsets", "TileByteCounts"):
            values = tif.pages[0].tags[tag].value
            tif.pages[0].tags[tag].overwrite((values[0], 0))
    back = geotiff.read(path)
    assert (back[:, :256] == 7).all() and (back[:, 256:] == -1).all()


def transform_tags(path):
    with tifffile.TiffFile(path) as tif:
        return tif.pages[0].geotiff_tags


def test_pixel_is_point_is_half_a_pixel_away(tmp_path):
    """The same tie point, once of the pixel's corner and once of its centre."""
    for kind, shift in ((1, 0.0), (2, 0.5)):
        keys = [1, 1, 0, 1, 1025, 0, 1, kind]
        tags = [
            (33550, 12, 3, (10.0, 20.0, 0.0), True),
            (33922, 12, 6, (2.0, 3.0, 0.0, 1000.0, 5000.0, 0.0), True),
            (34735, 3, 8, keys, True),
        ]
        path = tmp_path / f"{kind}.tif"
        tifffile.imwrite(path, np.zeros((8, 8), "uint8"), extratags=tags, metadata=None)
        expected = (10.0, 0.0, 1000 - (2 + shift) * 10, 0.0, -20.0, 5000 + (3 + shift) * 20)
        assert geotiff.info(path).transform == expected


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize(
    "transform", [TRANSFORM, (3.0, 1.0, 500.5, 1.0, -3.0, 900.25), (5.0, 0.0, 1.0, 0.0, 5.0, 2.0)]
)
def test_transform_survives_in_either_convention(tmp_path, kind, transform):
    path = tmp_path / "a.tif"
    crs = LO25 | {"GTRasterTypeGeoKey": kind}
    geotiff.write(path, np.zeros((1, 4, 6), "uint8"), transform, crs)
    about = geotiff.info(path)
    assert about.transform == transform
    assert about.crs == crs
    left, bottom, right, top = about.bounds
    a, b, c, d, e, f = transform
    x = [a * col + b * row + c for row in (0, 4) for col in (0, 6)]
    y = [d * col + e * row + f for row in (0, 4) for col in (0, 6)]
    assert (left, bottom, right, top) == (min(x), min(y), max(x), max(y))
    model = transform_tags(path)
    if "ModelTransformation" in model and kind == 1:
        matrix = np.array(model["ModelTransformation"])
        assert np.allclose(matrix @ [6, 4, 0, 1], [a * 6 + b * 4 + c, d * 6 + e * 4 + f, 0, 1])


def test_without_georeference(tmp_path):
    path = tmp_path / "a.tif"
    geotiff.write(path, noise((20, 30), "uint8"))
    about = geotiff.info(path)
    assert (about.transform, about.crs, about.nodata, about.band_names) == (None, None, None, ())
    assert about.gsd is None and about.bounds is None
    assert about.bands == 1


@pytest.mark.parametrize("code, key", [(26914, "ProjectedCSType"), (4326, "GeographicType")])
def test_epsg_code(tmp_path, code, key):
    path = tmp_path / "a.tif"
    geotiff.write(path, np.zeros((4, 4), "uint8"), TRANSFORM, code)
    crs = geotiff.info(path).crs
    assert crs[f"{key}GeoKey"] == code
    assert geotiff.crs_name(crs) == f"EPSG:{code}"
    assert transform_tags(path)[f"{key}GeoKey"] == code


def test_same_crs():
    a, b = {"ProjectedCSTypeGeoKey": 26914}, {"ProjectedCSTypeGeoKey": 26913}
    assert geotiff.same_crs(a, a | {"GTCitationGeoKey": "another name"})
    assert not geotiff.same_crs(a, b)
    assert geotiff.same_crs(None, None)
    assert not geotiff.same_crs(a, None) and not geotiff.same_crs(None, a)
    assert not geotiff.same_crs(a, LO25)
    near = LO25 | {"ProjNatOriginLongGeoKey": 25.0 + 1e-12, "GTCitationGeoKey": "Lo25"}
    assert geotiff.same_crs(LO25, near)
    assert not geotiff.same_crs(LO25, LO25 | {"ProjNatOriginLongGeoKey": 27.0})
    assert not geotiff.same_crs(LO25, LO25 | {"ProjFalseEastingGeoKey": 5.0})
    fewer = {k: v for k, v in LO25.items() if k != "GeogSemiMajorAxisGeoKey"}
    assert geotiff.same_crs(LO25, fewer)  # WGS 84 has but one axis
    assert not geotiff.same_crs(LO25, LO25 | {"GeographicTypeGeoKey": 4148})
    assert "ProjNatOriginLong 25.0" in geotiff.crs_name(LO25)
    assert geotiff.crs_name(None) == "none"


def test_same_crs_of_the_south_african_scenes():
    folder = shared("homonim_ngi_s2_l8")
    files = sorted(folder.glob("*/*.tif"))
    crs = [geotiff.info(path).crs for path in files]
    assert len(files) == 6
    assert all(geotiff.same_crs(crs[0], other) for other in crs)


def test_real_files_read_and_round_trip(tmp_path):
    files = [
        shared("homonim_ngi_s2_l8/hr_ngi_5m_rgb/ngi_rgb_byte_1.tif"),
        shared("homonim_ngi_s2_l8/mr/landsat8_byte.tif"),
        shared("opengeos_naip_5m/naip_m_4709963_se_14_1_20090818.tif"),
        *sorted(shared("sen1floods11_sample").rglob("*.tif")),
        *sorted(shared("stactools_naip").glob("*.tif")),
    ]
    for path in files:
        about = geotiff.info(path)
        array = geotiff.read(path)
        whole = tifffile.imread(path)
        if whole.shape[-1] == about.bands and whole.ndim == 3:
            whole = np.moveaxis(whole, -1, 0)
        assert np.array_equal(array, whole.reshape(array.shape), equal_nan=True)
        copy = tmp_path / path.name
        geotiff.write(copy, array, about.transform, about.crs, about.nodata, about.band_names)
        again = geotiff.info(copy)
        assert (again.transform, again.crs) == (about.transform, about.crs)
        assert again.band_names == about.band_names
        assert np.array_equal(geotiff.read(copy), array, equal_nan=True)


def test_band_names_of_real_sentinel_2():
    path = shared("homonim_ngi_s2_l8/mr/sentinel2_b432_byte.tif")
    assert geotiff.info(path).band_names == ("B4", "B3", "B2")


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
@pytest.mark.parametrize("shape", [(1, 300, 261), (3, 700, 530), (2, 5, 1100)])
def test_rows_in_any_portions_give_the_file_that_the_whole_gives(tmp_path, shape, dtype):
    array = noise(shape, dtype)
    names = tuple(f"b{i}" for i in range(shape[0]))
    geotiff.write(tmp_path / "whole.tif", array, TRANSFORM, LO25, 3, names)
    cuts = [0, *sorted(np.random.default_rng(0).integers(0, shape[1], 6)), shape[1]]
    with geotiff.writer(
        tmp_path / "rows.tif", shape, dtype, TRANSFORM, LO25, 3, names
    ) as write_rows:
        for start, stop in pairwise(cuts):
            write_rows(array[:, start:stop])
    whole, rows = ((tmp_path / f"{name}.tif").read_bytes() for name in ("whole", "rows"))
    assert whole == rows
    assert np.array_equal(geotiff.read(tmp_path / "rows.tif"), array)


def halved(array, nodata, floats):
    """Overview by a slow loop over pixels."""
    bands, height, width = array.shape
    out = np.empty((bands, -(-height // 2), -(-width // 2)), array.dtype)
    for k, y, x in np.ndindex(out.shape):
        pixels = [
            array[k, min(2 * y + i, height - 1), min(2 * x + j, width - 1)]
            for i in (0, 1)
            for j in (0, 1)
        ]
        if floats:
            valid = [p for p in pixels if np.isfinite(p) and p != nodata]
            out[k, y, x] = np.mean(valid) if valid else pixels[0]
        else:
            out[k, y, x] = max(pixels, key=pixels.count)  # the first of the commonest
    return out


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_overviews_equal_a_slow_loop(tmp_path, dtype):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 4, (2, 1041, 30)).astype(dtype)
    if dtype == "float32":
        array[rng.random(array.shape) < 0.5] = np.nan
    geotiff.write(tmp_path / "a.tif", array, nodata=3)
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        assert [page.subfiletype for page in tif.pages] == [0, 1, 1]
        pages = [page.asarray().transpose(2, 0, 1) for page in tif.pages]
    for fine, coarse in pairwise(pages):
        expected = halved(fine, 3, dtype == "float32")
        assert coarse.shape == expected.shape
        assert np.allclose(coarse, expected, rtol=1e-6, equal_nan=True)
    assert geotiff.info(tmp_path / "a.tif").bands == 2  # overviews are no bands
    assert geotiff.read(tmp_path / "a.tif").shape == array.shape


CLASSES = ("water", "forêt & <bois>", "sol nu")
COLOURS = ((0, 0, 255), (0, 128, 0), (200, 150, 100))


@pytest.mark.parametrize("kind", [1, 2])
def test_rasterio_reads_what_we_write(tmp_path, kind):
    rasterio = pytest.importorskip("rasterio")
    path = tmp_path / "map.tif"
    crs = LO25 | {"GTRasterTypeGeoKey": kind}
    ids = np.random.default_rng(0).integers(0, 3, (1, 1300, 1100), np.uint8)
    ids[:, :300] = 255
    geotiff.write(path, ids, TRANSFORM, crs, 255, ("a <b>",), classes=CLASSES, colours=COLOURS)
    with rasterio.open(path) as src:
        assert src.transform[:6] == TRANSFORM
        assert tuple(src.bounds) == geotiff.info(path).bounds
        assert src.crs.to_dict()["proj"] == "tmerc" and src.crs.to_dict()["lon_0"] == 25
        assert src.tags()["AREA_OR_POINT"] == {1: "Area", 2: "Point"}[kind]
        assert (src.nodata, src.count, src.dtypes) == (255, 1, ("uint8",))
        assert src.descriptions == geotiff.info(path).band_names == ("a <b>",)
        assert src.block_shapes == [(256, 256)]
        assert src.compression.name == "deflate"
        assert src.overviews(1) == [2, 4]
        assert src.colorinterp[0].name == "palette"
        colours = src.colormap(1)
        assert [colours[i][:3] for i in range(3)] == list(COLOURS)
        tags = src.tags(1)
        assert [tags[f"CLASS_{i}"] for i in range(3)] == list(CLASSES)
        assert np.array_equal(src.read(), ids)
    with tifffile.TiffFile(path) as tif:  # colours are 0..65535 in a TIFF
        assert [page.colormap[:, 0].tolist() for page in tif.pages] == [[0, 0, 65535]] * 3
    with rasterio.open(path, overview_level=0) as src:
        assert np.array_equal(src.read(), halved(ids, 255, False))


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int32", "float32", "float64"])
def test_rasterio_reads_every_dtype_and_many_bands(tmp_path, dtype):
    rasterio = pytest.importorskip("rasterio")
    path = tmp_path / "a.tif"
    array = noise((33, 130, 70), dtype)
    geotiff.write(path, array, TRANSFORM, 32633)
    with rasterio.open(path) as src:
        assert src.dtypes == (dtype,) * 33
        side = {1: 128, 2: 128, 4: 64, 8: 64}[array.itemsize]  # tiles of 2 MB at most
        assert src.block_shapes == [(side, side)] * 33
        assert src.crs.to_epsg() == 32633 and src.nodata is None
        assert np.array_equal(src.read(), array)


LAYOUTS_BY_ROWS = [
    {"rowsperstrip": 7},
    {"rowsperstrip": 1},
    {"rowsperstrip": 900},
    {"tile": (32, 48)},
    {"tile": (512, 512), "compression": "zlib"},
]


@pytest.mark.parametrize("layout", LAYOUTS_BY_ROWS)
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_read_rows_decodes_every_tile_once(tmp_path, monkeypatch, layout, planar):
    array = noise((3, 901, 61), "uint16")
    path = tmp_path / "a.tif"
    data = np.moveaxis(array, 0, -1) if planar == "contig" else array
    tifffile.imwrite(
        path, data, photometric="minisblack", planarconfig=planar, metadata=None, **layout
    )
    decoded, decode = [], geotiff._decode
    monkeypatch.setattr(
        geotiff, "_decode", lambda *args: (decoded.append(args[-1]), decode(*args))[1]
    )
    parts = list(geotiff.read_rows(path, [2, 0]))
    assert np.array_equal(np.concatenate(parts, axis=1), array[[2, 0]])
    assert len(decoded) == len(set(decoded))
    assert max(part.shape[1] for part in parts) <= 1024
    with refused(ValueError, path, "3"):
        next(geotiff.read_rows(path, [3]))


def test_bigtiff_where_4_gb_do_not_do(tmp_path, monkeypatch):
    """The compressed size decides, known before the file is begun."""
    kinds = []

    class Writer(tifffile.TiffWriter):
        def __init__(self, file, bigtiff):
            kinds.append(bigtiff)
            super().__init__(file, bigtiff=True)

    monkeypatch.setattr(tifffile, "TiffWriter", Writer)
    geotiff.write(tmp_path / "a.tif", np.zeros((1, 600, 600), "uint8"))
    monkeypatch.setattr(geotiff, "CLASSIC", 100)
    geotiff.write(tmp_path / "a.tif", np.zeros((1, 600, 600), "uint8"))
    assert kinds == [False, True]
    assert geotiff.read(tmp_path / "a.tif").shape == (1, 600, 600)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("no")])
def test_an_interrupted_writer_leaves_nothing(tmp_path, error):
    with pytest.raises((KeyboardInterrupt, ValueError)):
        with geotiff.writer(tmp_path / "a.tif", (1, 600, 600), "uint8") as write_rows:
            write_rows(np.zeros((1, 599, 600), "uint8"))
            raise error
    assert os.listdir(tmp_path) == []


def test_what_a_writer_refuses(tmp_path):
    path = tmp_path / "a.tif"

    def begin(*args, **kwargs):
        with geotiff.writer(path, *args, **kwargs) as write_rows:
            write_rows(np.zeros((1, 3, 8), "uint8"))

    with refused(ValueError, path, "3 rows of 4"):
        begin((1, 4, 8), "uint8")
    with refused(ValueError, path, "3 rows of 2"):
        begin((1, 2, 8), "uint8")
    with refused(ValueError, path, "(1, n, 9)", "(1, 3, 8)"):
        begin((1, 3, 9), "uint8")
    with refused(ValueError, path, "int16", "uint8"):
        begin((1, 3, 8), "int16")
    with refused(ValueError, path, "bool"):
        begin((1, 3, 8), "bool")
    with refused(ValueError, path, "0"):
        begin((1, 0, 8), "uint8")
    with refused(ValueError, path, "uint8"):
        begin((2, 3, 8), "uint8", colours=COLOURS)
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    geotiff.write(path, np.ones((4, 4), "uint8"))

    def half(tif, *args, **kwargs):
        tif.filehandle.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(tifffile.TiffWriter, "write", half)
    with refused(OSError, "no space"):
        geotiff.write(path, np.zeros((4, 4), "uint8"))
    assert (geotiff.read(path) == 1).all()
    assert os.listdir(tmp_path) == ["a.tif"]


def test_valid_pixels():
    array = np.array([[[0, 0, 5.0]], [[0, 3, 4.0]]])
    assert geotiff.valid_pixels(array, 0).tolist() == [[False, True, True]]
    assert geotiff.valid_pixels(array, None).all()
    array[1, 0, 2] = np.nan
    assert geotiff.valid_pixels(array, None).tolist() == [[True, True, False]]
    array[1, 0, 2] = np.inf
    assert geotiff.valid_pixels(array, float("nan")).tolist() == [[True, True, False]]
    assert geotiff.valid_pixels(np.zeros((2, 3, 4, 4), "uint8"), -9999.0).shape == (2, 4, 4)


@pytest.mark.parametrize("use", [geotiff.info, geotiff.read])
def test_no_such_file_and_not_a_tiff(tmp_path, use):
    with refused(FileNotFoundError, tmp_path / "none.tif"):
        use(tmp_path / "none.tif")
    path = tmp_path / "b.tif"
    for content in (b"", b"PK\3\4 a zip file", b"II"):
        path.write_bytes(content)
        with refused(ValueError, f"{path}: "):
            use(path)


@pytest.mark.parametrize("writer", ["ours", "other"])
def test_truncated_anywhere(tmp_path, writer):
    """Whatever byte it ends at: in the header, in the tags, in the pixels."""
    path = tmp_path / "whole.tif"
    array = noise((3, 64, 64), "uint8")
    if writer == "ours":
        geotiff.write(path, array, TRANSFORM, LO25, 0, ("B", "G", "R"))
    else:
        tifffile.imwrite(path, array, photometric="minisblack", planarconfig="separate")
    content = path.read_bytes()
    cut = tmp_path / "cut.tif"
    for size in [*range(4, 1500, 9), *range(1500, len(content), 977), len(content) - 1]:
        cut.write_bytes(content[:size])
        with refused(ValueError, f"{cut}: "):
            geotiff.info(cut)
    with refused(ValueError, f"{cut}: ", len(content) - 1):
        geotiff.read(cut)


def test_truncated_in_a_georeference_that_follows_the_pixels(tmp_path):
    """libtiff puts tags last; a cut there must not pass for a file without georeference."""
    scale, tie = struct.pack("<3d", 10, 10, 0), struct.pack("<6d", 0, 0, 0, 500, 900, 0)
    pixels, values = 8, 8 + 64 + 2 + 11 * 12 + 4
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 4, 1, pixels), (277, 3, 1, 1), (278, 3, 1, 8), (279, 4, 1, 64)]
    tags += [(33550, 12, 3, values), (33922, 12, 6, values + len(scale))]
    content = struct.pack("<2sHI", b"II", 42, pixels + 64) + bytes(64)
    content += struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *t) for t in tags)
    content += bytes(4) + scale + tie
    path = tmp_path / "cut.tif"
    path.write_bytes(content)
    assert geotiff.info(path).transform == (10.0, 0.0, 500.0, 0.0, -10.0, 900.0)
    for size in range(len(content) - len(scale + tie), len(content), 5):
        path.write_bytes(content[:size])
        with refused(ValueError, f"{path}: "):
            geotiff.info(path)


@pytest.mark.parametrize(
    "tag, value, mention",
    [
        ("BitsPerSample", 99, ""),
        ("TileLength", 0, "0 x 256"),
        ("TileByteCounts", (5, 5), "2 byte counts"),
        ("ImageLength", 2**16 - 1, "256"),
        ("TileWidth", 2**32 - 16, "4294967280"),
        ("GeoKeyDirectoryTag", (1, 1, 0, 1, 1024, 34999, 1, 0), "34999"),
    ],
)
def test_tags_that_do_not_fit(tmp_path, tag, value, mention):
    path = tmp_path / "a.tif"
    geotiff.write(path, noise((2, 64, 64), "uint8"), TRANSFORM, LO25, 255)
    with tifffile.TiffFile(path, mode="r+") as tif:
        tif.pages[0].tags[tag].overwrite(value, dtype="I" if tag == "TileWidth" else None)
    with refused(ValueError, f"{path}: ", mention):
        geotiff.info(path)


@pytest.mark.parametrize("text", ["none", "", "1.#QNAN", "0,0"])
def test_nodata_that_is_no_number_declares_none(tmp_path, text):
    path = tmp_path / "a.tif"
    geotiff.write(path, noise((2, 64, 64), "uint8"), TRANSFORM, LO25, 255)
    with tifffile.TiffFile(path, mode="r+") as tif:
        tif.pages[0].tags["GDAL_NODATA"].overwrite(text)
    assert geotiff.info(path).nodata is None


@pytest.mark.parametrize("dtype, nodata", [("uint8", None), ("uint8", 7), ("float32", None)])
@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_a_mask_in_the_file_says_where_data_is(tmp_path, dtype, nodata, interleave):
    import rasterio

    path, array = tmp_path / "a.tif", noise((3, 70, 90), dtype)
    valid = noise((70, 90), "uint8") > 60
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        with rasterio.open(path, "w", "GTiff", 90, 70, 3, dtype=dtype, nodata=nodata, tiled=True,
                           blockxsize=32, blockysize=32, interleave=interleave,
                           compress="deflate") as file:  # fmt: skip
            file.write(array)
            file.write_mask(valid)
    fill = nodata if nodata is not None else np.nan if dtype == "float32" else 0
    about = geotiff.info(path)
    assert about.bands == 3 and np.array_equal(about.nodata, fill, equal_nan=True)
    expected = np.where(valid, array, np.asarray(fill, dtype))
    assert np.array_equal(geotiff.read(path), expected, equal_nan=True)
    part = geotiff.read(path, (5, 30, 40, 50), [2])
    assert np.array_equal(part, expected[2:, 5:45, 30:80], equal_nan=True)
    rows = np.concatenate(list(geotiff.read_rows(path, [1])), axis=1)
    assert np.array_equal(rows, expected[1:2], equal_nan=True)


def test_a_negative_pixel_scale_is_read_as_others_read_it(tmp_path):
    import rasterio

    path = tmp_path / "a.tif"
    tags = [(33550, 12, 3, (10.0, -10.0, 0.0), True),
            (33922, 12, 6, (0.0, 0.0, 0.0, 5e5, 4e6, 0.0), True)]  # fmt: skip
    tifffile.imwrite(path, noise((8, 9), "uint8"), photometric="minisblack", extratags=tags)
    with rasterio.open(path) as file:
        assert geotiff.info(path).transform == tuple(file.transform)[:6]


def test_a_citation_in_another_script_is_written_as_far_as_ascii_goes(tmp_path):
    crs = LO25 | {"GTCitationGeoKey": "RGF93 é"}
    geotiff.write(tmp_path / "a.tif", noise((1, 20, 20), "uint8"), TRANSFORM, crs)
    found = geotiff.info(tmp_path / "a.tif").crs
    assert found == crs | {"GTCitationGeoKey": "RGF93 ?"} and geotiff.same_crs(found, crs)


@pytest.mark.parametrize("layout", [{"rowsperstrip": 16}, {"tile": (32, 32), "bigtiff": True}, {}])
def test_random_bytes_in_the_header_are_said_of_the_file(tmp_path, layout):
    path = tmp_path / "a.tif"
    array = noise((3, 64, 64), "uint8")
    if layout:
        tifffile.imwrite(path, array, photometric="minisblack", planarconfig="separate", **layout)
    else:
        geotiff.write(path, array, TRANSFORM, LO25, 0, ("B", "G", "R"))
    content = np.fromfile(path, "uint8")
    with tifffile.TiffFile(path) as tif:
        header = min(tif.pages[0].dataoffsets)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = content.copy()
        damaged[rng.integers(4, header, 2)] = rng.integers(0, 256, 2)
        damaged.tofile(path)
        try:
            geotiff.info(path)
            geotiff.read(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
    assert 0 < refused < 200


def test_a_disk_that_fails_is_said_of_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    geotiff.write(path, np.zeros((8, 8), "uint8"))

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(geotiff, "_decode", fail)
    with refused(OSError, "Input/output error", path):
        geotiff.read(path)


def test_arguments_that_do_not_fit(tmp_path):
    path = tmp_path / "a.tif"
    geotiff.write(path, np.zeros((3, 8, 9), "uint8"))
    for window in [(0, 0, 9, 9), (0, 1, 8, 9), (-1, 0, 2, 2)]:
        with refused(ValueError, path, "8 x 9"):
            geotiff.read(path, window)
    for bands in [[3], [-1], [0, 7]]:
        with refused(ValueError, path, "3"):
            geotiff.read(path, bands=bands)
    with refused(ValueError, path, "2", "3"):
        geotiff.write(path, np.zeros((3, 8, 9), "uint8"), band_names=("B", "G"))
    with refused(ValueError, path, "(8,)"):
        geotiff.write(path, np.zeros(8, "uint8"))
