import os
import shlex

import numpy as np
import pytest
import rasterio
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.warp import transform as project

from imagery import raster

T = (10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0)
rng = np.random.default_rng(0)


def pixels(bands=3, height=70, width=90, dtype=np.uint16):
    return rng.integers(1, 200, (bands, height, width)).astype(dtype)


def save(path, array, transform=T, crs="EPSG:32631", mask=None, kinds=None, points=None, **profile):
    """Write a file by rasterio itself."""
    shape = dict(zip(("count", "height", "width"), array.shape, strict=True))
    if transform is not None:
        profile |= {"transform": rasterio.Affine(*transform), "crs": crs}
    profile = {"driver": "GTiff", "dtype": array.dtype} | shape | profile
    with rasterio.open(path, "w", **profile) as file:
        file.write(array)
        if mask is not None:
            file.write_mask(mask)
        if points:
            file.gcps = points, rasterio.CRS.from_epsg(32631)
        if kinds:
            file.colorinterp = kinds
    return path


def refused(what, *args, error=ValueError, **options):
    with pytest.raises(error) as found:
        what(*args, **options)
    assert "\n" not in str(found.value)
    return str(found.value)


LAYOUTS = [
    {},
    {"tiled": True, "blockxsize": 16, "blockysize": 32, "compress": "deflate", "predictor": 2},
    {"interleave": "band", "compress": "lzw", "blockysize": 3},
    {"interleave": "pixel", "compress": "zstd", "BIGTIFF": "YES", "ENDIANNESS": "BIG"},
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
def test_windows_bands_and_rows_are_slices(tmp_path, layout, dtype):
    array = pixels(dtype=dtype)
    path = save(tmp_path / "x.tif", array, **layout)
    about = raster.info(path)
    assert (about.bands, about.height, about.width) == array.shape and about.dtype == dtype
    assert about.transform == T and about.crs == "EPSG:32631" and about.gsd == 10
    assert about.bounds == (500000, 4999300, 500900, 5000000)
    found = raster.read(path, (5, 60, 33, 30), [2, 0])
    assert found.dtype == dtype and (found == array[[2, 0], 5:38, 60:90]).all()
    assert (raster.read(path) == array).all()
    assert raster.read(path, (5, 60, 0, 30)).shape == (3, 0, 30)


def test_a_window_or_band_outside_is_refused(tmp_path):
    path = save(tmp_path / "x.tif", pixels())
    assert "leaves the image of 70 x 90" in refused(raster.read, path, (60, 0, 11, 5))
    assert "leaves the image" in refused(raster.read, path, (-1, 0, 5, 5))
    assert "the file has 3, counted from 0" in refused(raster.read, path, None, [3])


def test_files_that_are_no_images_are_said(tmp_path):
    assert "no such file" in refused(raster.info, tmp_path / "x.tif", error=FileNotFoundError)
    (tmp_path / "x.tif").write_bytes(b"<GDAL_WMS></GDAL_WMS>")
    assert "not a TIFF, it starts with" in refused(raster.info, tmp_path / "x.tif")
    (tmp_path / "x.txt").write_text("")
    assert "images are .bil" in refused(raster.info, tmp_path / "x.txt")
    whole = save(tmp_path / "y.tif", pixels(), compress="deflate").read_bytes()
    for size in (9, 200, len(whole) - 50):
        (tmp_path / "z.tif").write_bytes(whole[:size])
        assert "fetch the file again" in refused(raster.read, tmp_path / "z.tif")


VRT = """<VRTDataset rasterXSize="90" rasterYSize="70"><VRTRasterBand dataType="UInt16" band="1">
<SimpleSource><SourceFilename relativeToVRT="{}">{}</SourceFilename><SourceBand>1</SourceBand>
</SimpleSource></VRTRasterBand></VRTDataset>"""


def test_a_vrt_stays_in_its_folder(tmp_path):
    (tmp_path / "in").mkdir()
    array = pixels()
    save(tmp_path / "in/x.tif", array)
    save(tmp_path / "out.tif", array)
    path = tmp_path / "in/m.vrt"
    path.write_text(VRT.format(1, "x.tif"))
    assert (raster.read(path) == array[:1]).all()
    for relative, name in ((1, "../out.tif"), (0, tmp_path / "in/x.tif"), (0, "x.tif"),
                           (0, "/vsicurl/http://localhost/x.tif")):  # fmt: skip
        path.write_text(VRT.format(relative, name))
        assert "no image below its own folder" in refused(raster.info, path)
    (tmp_path / "in/w.tif").write_text("<GDAL_WMS></GDAL_WMS>")
    path.write_text(VRT.format(1, "w.tif"))
    assert "not a TIFF" in refused(raster.info, path)
    path.write_text(VRT.format(1, "no.tif"))
    assert "names it" in refused(raster.info, path, error=FileNotFoundError)
    path.write_text(VRT.format(1, "x.tif").replace('band="1"', 'subClass="VRTDerivedRasterBand"'))
    assert "only plain mosaics" in refused(raster.info, path)
    path.rename(tmp_path / "in/v.tif")
    assert "not a TIFF" in refused(raster.info, tmp_path / "in/v.tif")
    (tmp_path / "in/x.tif.msk").write_text(VRT.format(0, tmp_path / "out.tif"))
    assert "no TIFF, as masks" in refused(raster.info, tmp_path / "in/x.tif")


HOLE = np.ones((70, 90), bool)
HOLE[10:30, 40:80] = False
RGBA = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]


def masked_file(path, kind):
    array = pixels(dtype=np.float32 if kind == "nan" else np.uint8)
    array[:, 0, 0] = 0  # black is no hole
    if kind == "nodata":
        array[:, 0, 0] = 1
        return save(path, np.where(HOLE, array, 0), nodata=0)
    if kind == "nan":
        return save(path, np.where(HOLE, array, np.float32("nan")))
    if kind == "alpha":
        return save(path, np.concatenate([array, 255 * HOLE[None].astype(np.uint8)]), kinds=RGBA)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=kind == "inside"):
        return save(path, array, mask=HOLE)


@pytest.mark.parametrize("kind", ["nodata", "nan", "alpha", "inside", "outside"])
def test_masks_of_all_kinds_are_alike(tmp_path, kind):
    path = masked_file(tmp_path / "x.tif", kind)
    assert (tmp_path / "x.tif.msk").exists() == (kind == "outside")
    assert raster.info(path).bands == 3
    found, valid = raster.read(path, (5, 30, 50, 60), masked=True)
    assert (valid == HOLE[5:55, 30:90]).all() and found.shape == (3, 50, 60)
    assert (raster.read(path, bands=[1], masked=True)[1] == HOLE).all()
    # and so they are where the file is warped, here to a grid of twice the pixel size
    grid = raster.Grid("EPSG:32631", (20, 0, T[2], 0, -20, T[5]), 35, 45, "nearest")
    _, valid = raster.read(path, masked=True, grid=grid)
    assert (valid == HOLE[::2, ::2]).all()


def test_an_alpha_that_varies_is_an_image(tmp_path, capsys):
    array = pixels(4, dtype=np.uint8)
    array[:, :, :80] = 0  # the rest of a sheet at the rim of a country
    path = save(tmp_path / "x.tif", array, kinds=RGBA)
    assert raster.info(path).bands == 4
    found, valid = raster.read(path, masked=True)
    assert (found == array).all() and valid.all()
    assert capsys.readouterr().out.count("called alpha, varies like an image") == 1
    with rasterio.open(path, "r+") as file:
        file.write(np.full((70, 90), 255, np.uint8), 4)
    assert raster.info(path).bands == 3
    with rasterio.open(path, "r+") as file:
        file.set_band_description(4, "NIR")  # saturated
    assert raster.info(path).bands == 4
    assert capsys.readouterr().out == ""


def test_an_image_that_is_called_alpha_is_warped_as_an_image(tmp_path):
    array = pixels(4, dtype=np.uint8)
    path = save(tmp_path / "x.tif", array, kinds=RGBA)
    grid = raster.Grid("EPSG:32631", (10, 0, T[2] + 100, 0, -10, T[5]), 60, 90, "cubic")
    found, valid = raster.read(path, masked=True, grid=grid)
    assert (found[:, :, :80] == array[:, :60, 10:]).all()
    assert valid[:, :80].all() and not valid[:, 80:].any()


def test_south_up_is_turned(tmp_path):
    array = pixels()
    array[:, :20] = 0
    path = save(tmp_path / "x.tif", array, (10, 0, 500000, 0, 10, 4999300), nodata=0)
    assert raster.info(path).transform == T
    found, valid = raster.read(path, (2, 3, 60, 50), masked=True)
    assert (found == array[:, ::-1][:, 2:62, 3:53]).all()
    assert (valid == (array[0, ::-1][2:62, 3:53] > 0)).all()
    assert (raster.read(path) == array[:, ::-1]).all()
    grid = raster.Grid("EPSG:32631", (10, 0, T[2] + 100, 0, -10, T[5]), 60, 90, "cubic")
    found, valid = raster.read(path, masked=True, grid=grid)
    assert (found[:, :50, :80] == array[:, :19:-1][:, :50, 10:]).all()
    assert valid[:50, :80].all() and not valid[50:].any() and not valid[:, 80:].any()


def test_more_pixels_than_a_file_can_hold_are_refused(tmp_path):
    """A header asks for exabytes; sparse files of a size that people have are read."""
    path = save(tmp_path / "x.tif", pixels(1), compress="deflate")
    header = bytearray(path.read_bytes())
    start = int.from_bytes(header[4:8], "little")
    for k in range(int.from_bytes(header[start : start + 2], "little")):
        tag = start + 2 + 12 * k
        if int.from_bytes(header[tag : tag + 2], "little") in (256, 257):  # width and height
            header[tag + 2 : tag + 12] = b"\4\0\1\0\0\0" + (10**9).to_bytes(4, "little")
    path.write_bytes(header)
    assert "1000000000 x 1000000000 pixels cannot be in its" in refused(raster.info, path)
    (tmp_path / "m.vrt").write_text(VRT.format(1, "x.tif").replace("70", "1000000000"))
    save(path, pixels(1))
    assert "x 1000000000 pixels cannot" in refused(raster.info, tmp_path / "m.vrt")
    shape = {"driver": "GTiff", "count": 1, "width": 10**5, "height": 10**5, "dtype": "uint8"}
    with rasterio.open(path, "w", tiled=True, sparse_ok=True, **shape):
        pass
    assert path.stat().st_size < 2**22 and raster.info(path).width == 10**5


def test_world_files_and_control_points_are_a_georeference(tmp_path):
    array = pixels()
    path = save(tmp_path / "x.tif", array, None)
    assert raster.info(path).transform is None and raster.info(path).gsd is None
    (tmp_path / "x.tfw").write_text("10\n0\n0\n-10\n500005\n4999995\n")
    assert raster.info(path).transform == T
    path = tmp_path / "g.tif"
    fit = rasterio.Affine(*T)
    points = [GroundControlPoint(r, c, *(fit * (c, r))) for r in (0, 70) for c in (0, 90)]
    save(path, array, None, points=points)
    about = raster.info(path)
    assert about.crs == "EPSG:32631" and np.allclose(about.transform, T, rtol=0, atol=1e-6)
    points[0].x += 40
    save(path, array, None, points=points)
    assert "gdalwarp -tps" in refused(raster.info, path)


def test_names_scales_and_dates_are_read(tmp_path):
    path = save(tmp_path / "x.tif", pixels())
    assert raster.info(path).scaling == () and raster.info(path).date == ""
    with rasterio.open(path, "r+") as file:
        file.descriptions = ("B", None, "R")
        file.scales, file.offsets = [1e-4] * 3, [0, 0, -0.1]
        file.update_tags(TIFFTAG_DATETIME="2018:07:16 10:00:00")
    about = raster.info(path)
    assert about.band_names == ("B", "", "R") and about.date == "2018-07-16"
    assert about.scaling == ((1e-4, 0), (1e-4, 0), (1e-4, -0.1))


def test_crs_of_the_same_ground_are_the_same(tmp_path):
    def about(crs, place=T):
        return raster.info(save(tmp_path / "x.tif", pixels(), place, crs))

    utm = about("EPSG:32614", (0.6, 0, 600000, 0, -0.6, 4000000))
    assert raster.same_ground(utm, "EPSG:26914")
    assert raster.same_ground(utm, rasterio.CRS.from_epsg(32614).to_wkt())
    assert raster.same_ground(utm, "+proj=utm +zone=14 +datum=WGS84")
    assert raster.same_ground(utm, "EPSG:32614+5773")
    for other in ("EPSG:32615", "EPSG:4326", "EPSG:3857", None, 'LOCAL_CS["x",UNIT["metre",1]]'):
        assert not raster.same_ground(utm, other)
    assert raster.crs_name(utm.crs) == "EPSG:32614" and raster.crs_name(None) == "none"


@pytest.mark.parametrize("crs", ["EPSG:32631", "EPSG:32630", "EPSG:2154", "EPSG:4326"])
def test_a_warp_shows_the_ground_where_it_is(tmp_path, crs):
    """A wave over longitude and latitude, imaged in some CRS and warped to UTM 31N."""

    def ground(from_crs, place, height, width):
        a, _, c, _, e, f = place
        col, row = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        x, y = (a * col + c).ravel(), (e * row + f).ravel()
        lon, lat = map(np.array, project(from_crs, "EPSG:4326", x, y))
        wave = 1000 + 400 * np.sin(lon * 8e3) + 400 * np.cos(lat * 1e4)
        return wave.reshape(1, height, width).astype(np.float32)

    mr = raster.Info("m", 40, 40, 1, np.float32, None, (10, 0, 450000, 0, -10, 4900000),
                     "EPSG:32631", ())  # fmt: skip
    (x,), (y,) = project("EPSG:32631", crs, [450200], [4899800])
    step = 5 / 111320 if crs == "EPSG:4326" else 5
    place = (step, 0, x - 80 * step, 0, -step, y + 80 * step)
    path = save(tmp_path / "x.tif", ground(crs, place, 160, 160), place, crs)
    about = raster.info(path)
    grid = raster.warp_grid(about, mr)
    found, valid = raster.read(path, masked=True, grid=grid)
    assert found.shape[1:] == (grid.height, grid.width)
    a, _, c, _, e, f = grid.transform
    # the pixels divide from MR's corner, at HR's own size
    assert np.allclose([(c - 450000) / a % 1, (f - 4900000) / e % 1], 0.5, atol=0.501)
    assert abs(a / (4.234 if crs == "EPSG:4326" else 5) - 1) < 0.01
    true = ground("EPSG:32631", grid.transform, grid.height, grid.width)
    inner = valid.copy()
    inner[:3], inner[-3:], inner[:, :3], inner[:, -3:] = False, False, False, False
    assert inner.mean() > 0.4
    # a shift of 0.1 px would be an error of 13 in such waves
    assert np.abs(found - true)[0][inner].mean() < 4


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
@pytest.mark.parametrize("bands", [1, 4, 20])
def test_what_is_written_is_read(tmp_path, dtype, bands):
    array = pixels(bands, 700, 130, dtype)
    path, names = tmp_path / "x.tif", tuple(f"b{k}" for k in range(bands))
    with raster.writer(path, array.shape, dtype, T, 32631, 7, names) as write_rows:
        for row in range(0, 700, 90):
            write_rows(array[:, row : row + 90])
        assert not path.exists()
    about = raster.info(path)
    assert (about.transform, about.crs, about.nodata) == (T, "EPSG:32631", 7)
    assert about.band_names == names
    assert (raster.read(path) == array).all()
    with rasterio.open(path) as file:
        assert file.overviews(1) and file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
    assert os.listdir(tmp_path) == ["x.tif"]


def test_a_class_map_has_names_colours_and_class_ids_in_overviews(tmp_path):
    path, colours = tmp_path / "m.tif", [(1, 2, 3), (4, 5, 6)]
    array = np.where(np.arange(1200) // 300 % 2, 9, 1)[None, :, None] * np.ones((1, 1, 1100))
    raster.write(path, array.astype(np.uint8), T, 32631, 255, ("class",),
                 classes=("wäter & <land>", "b"), colours=colours)  # fmt: skip
    with rasterio.open(path) as file:
        assert [file.colormap(1)[k][:3] for k in (0, 1)] == colours
        assert file.tags(1)["CLASS_0"] == "wäter & <land>"
        assert {*np.unique(file.read(1, out_shape=(150, 137)))} == {1, 9}
        xml = (tmp_path / "m.tif.aux.xml").read_text("utf-8")
    assert "<Category>wäter &amp; &lt;land&gt;</Category><Category>b</Category>" in xml
    raster.write(path, array.astype(np.uint8))
    assert os.listdir(tmp_path) == ["m.tif"]


def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path):
    path, one = tmp_path / "x.tif", np.zeros((1, 5, 5), np.uint8)

    def write(*parts):
        with raster.writer(path, (1, 5, 5), np.uint8) as write_rows:
            for part in parts:
                write_rows(part)

    assert "got 3 rows of 5" in refused(write, one[:, :3])
    assert "up to 0, 5) of uint8 expected, got (1, 3, 5)" in refused(write, one, one[:, :3])
    assert "expected, got (1, 5, 4)" in refused(write, one[:, :, :4])
    assert "expected, got (1, 5, 5) of float32" in refused(write, one.astype(np.float32))
    with pytest.raises(KeyError), raster.writer(path, (1, 5, 5), np.uint8):
        raise KeyError
    assert os.listdir(tmp_path) == []
    missing = tmp_path / "no" / "x.tif"
    assert "cannot be written" in refused(raster.write, missing, one, error=OSError)


def test_several_images_in_a_file_are_said(tmp_path):
    path = tmp_path / "a b.tif"
    save(path, pixels(1))
    save(path, pixels(1), APPEND_SUBDATASET="YES")
    said = refused(raster.info, path)
    assert "holds 2 images" in said
    command = shlex.split(said[said.index("gdal_translate") :])
    assert command[1] == f"GTIFF_DIR:1:{path}"


def test_pixels_without_data():
    array = np.array([[[1, 0, 0, 5]], [[2, 0, 3, 5]]], np.float32)
    array[1, 0, 3] = np.nan
    assert raster.masked(array, 0)[1].tolist() == [[True, False, True, False]]
    shown = np.array([[False, True, True, True]])
    assert raster.masked((array, shown), None)[1].tolist() == [[False, True, True, False]]
    found = raster.as_float(array, 0)
    assert np.isnan(found).tolist() == [[[0, 1, 0, 0]], [[0, 1, 0, 1]]]
