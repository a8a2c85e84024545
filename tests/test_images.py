"""datasets/images.py: what lies on a disk, its bands, its masks, and what its pixels mean."""

import os
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pair_layouts as layouts
import pytest
import rasterio
from conftest import refused
from pair_layouts import BGRN, pairs_of, pixels_of
from rasterio.enums import ColorInterp

from datasets import images
from datasets.folder import read_geotiff
from imagery import pack, raster

SIDE = 40
KINDS = np.arange(SIDE * SIDE // 4, dtype="uint8").reshape(SIDE // 2, SIDE // 2) % 12


def valid_of(source):
    return raster.masked(source.read(None, source.bands), source.nodata)[1]


def spread(mask):
    """A mask of half the pixels, on the pixels of the image."""
    return np.kron(mask, np.ones((2, 2), bool))


def the_mr(root, **options):
    (pair,) = pairs_of(read_geotiff(root, **options))
    return pair.mr


def band_files(folder, stem, bands, side=SIDE, gsd=10.0, suffix=".tif"):
    return {
        band: layouts.tif(folder / f"{stem}{band}{suffix}", layouts.pixels(1, side, side), gsd)
        for band in bands
    }


# masks of the files themselves


@pytest.mark.parametrize("kind", ["nodata", "alpha", "inside", "outside"])
def test_a_hole_is_a_hole_however_it_is_marked(tmp_path, kind):
    hole = np.zeros((SIDE, SIDE), bool)
    hole[5:20, 10:30] = True
    array = layouts.pixels(4, SIDE, SIDE, dtype="uint16")
    array[:, hole] = 0
    if kind == "alpha":
        array = np.concatenate([array, np.where(hole, 0, 65535).astype("uint16")[None]])
    about = {"nodata": 0} if kind == "nodata" else {}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=kind == "inside"),
        rasterio.open(
            tmp_path / "a.tif", "w", driver="GTiff", count=len(array), height=SIDE, width=SIDE,
            dtype="uint16", crs="EPSG:32631", transform=rasterio.Affine(*layouts.place(10.0)),
            **about,
        ) as file,
    ):  # fmt: skip
        if kind == "alpha":
            file.colorinterp = [*[ColorInterp.undefined] * 4, ColorInterp.alpha]
        file.write(array)
        if kind in ("inside", "outside"):
            file.write_mask(~hole)
    source = the_mr(tmp_path)
    assert len(source.bands) == 4 and np.array_equal(valid_of(source), ~hole)
    parts = [valid for _, valid in images.read_rows(source)]
    assert np.array_equal(np.concatenate(parts), ~hole)


def test_rows_may_be_taken_in_turn_and_by_another_thread(tmp_path):
    """A GDAL environment that stayed open in between would be missed there."""
    array = layouts.tif(tmp_path / "a.tif", layouts.pixels(1, 2100, 20), 10.0)
    one, other = (images.read_rows(the_mr(tmp_path)) for _ in range(2))
    found = [[next(one)], [next(other)]]
    with ThreadPoolExecutor(1) as pool:
        found[0] += pool.submit(list, one).result()
    found[1] += other
    for parts in found:
        assert len(parts) > 2
        assert np.array_equal(np.concatenate([pixels for pixels, _ in parts], 1), array)


# clouds


def test_sentinel_2_clouds_of_a_scene(tmp_path):
    """SCL of 20 m over bands of 10 m: a pixel is missing where SCL says 3, 8, 9, 10, or nothing."""
    scene = tmp_path / "S2B_14TNT_20200701_0_L2A"
    band_files(scene, "", ["B02", "B03", "B04", "B08"])
    layouts.tif(scene / "SCL.tif", KINDS[None], 20.0, nodata=0)
    layouts.tif(scene / "TCI.tif", layouts.pixels(3, SIDE, SIDE, dtype="uint8"), 10.0)
    expected = ~spread(np.isin(KINDS, [0, 3, 8, 9, 10]))
    for options in (
        {"clouds": "sentinel2"},
        {"mask_band": "SCL", "mask_values": "3,8, 9,10"},
        {"mask_band": "scl:0", "mask_values": "3,bit3"},  # 8 to 11
    ):
        source = the_mr(tmp_path, **options)
        wanted = expected & ~spread(KINDS == 11) if "bit3" in options.values() else expected
        wanted = expected & ~spread(KINDS == 11) if "3,bit3" in options.values() else wanted
        assert np.array_equal(valid_of(source), wanted), options
        part = source.read((3, 5, 7, 9), source.bands)[1]
        assert np.array_equal(part, wanted[3:10, 5:14])
    assert valid_of(the_mr(tmp_path)).all()


def test_clouds_of_a_safe_folder(tmp_path):
    layouts.safe(tmp_path, suffix=".tif")
    (folder,) = tmp_path.rglob("R20m")
    kinds = KINDS.repeat(2, 0).repeat(2, 1)[:30, :30]
    layouts.tif(folder / "T31TCJ_20220301T105859_SCL_20m.tif", kinds[None], 20.0)
    source = the_mr(tmp_path, clouds="sentinel2")
    assert np.array_equal(valid_of(source), ~spread(np.isin(kinds, [3, 8, 9, 10])))
    assert source.bands == [0, 1, 2, 3] and source.offset == -1000


def test_clouds_of_landsat_by_bits_and_its_own_numbers(tmp_path, capsys):
    stem = "LC08_L2SP_030028_20200701_20200913_02_T1_"
    arrays = band_files(tmp_path, f"{stem}SR_", [f"B{n}" for n in range(1, 8)], suffix=".TIF")
    layouts.tif(tmp_path / f"{stem}ST_B10.TIF", layouts.pixels(1, SIDE, SIDE), 10.0)
    bits = (1 << np.arange(SIDE * SIDE) % 16).astype("uint16").reshape(1, SIDE, SIDE)
    layouts.tif(tmp_path / f"{stem}QA_PIXEL.TIF", bits, 10.0, nodata=1)
    other = np.full((1, SIDE, SIDE), 2, "uint16")
    layouts.tif(tmp_path / f"{stem}SR_QA_AEROSOL.TIF", other, 10.0)
    layouts.tif(tmp_path / f"{stem.replace('0701_', '0717_')}QA_PIXEL.TIF", other, 10.0)
    (pair,) = pairs_of(listing := read_geotiff(tmp_path, clouds="landsat"))
    source = pair.mr
    assert listing.bands["mr"] == BGRN and source.date == "2020-07-01"
    expected = np.concatenate([arrays[f"B{n}"] for n in (2, 3, 4, 5)])
    assert np.array_equal(pixels_of(source), expected)
    assert np.array_equal(valid_of(source), ~np.isin(bits[0], [1, 2, 4, 8, 16]))
    assert "QA_PIXEL: hides what it marks in 1 of 1 MR images" in capsys.readouterr().out


@pytest.mark.parametrize("sensor, numbers", [("L30", "2345"), ("S30", "2348")])
def test_clouds_and_bands_of_hls(tmp_path, sensor, numbers):
    stem = f"HLS.{sensor}.T14TNT.2009230T165512.v2.0."
    arrays = band_files(tmp_path, stem, [f"B{n:02d}" for n in range(1, 12)])
    for angle in ("SAA", "SZA", "VAA", "VZA"):
        layouts.tif(tmp_path / f"{stem}{angle}.tif", layouts.pixels(1, SIDE, SIDE), 10.0)
    flags = (np.arange(SIDE * SIDE) % 256).astype("uint8").reshape(1, SIDE, SIDE)
    layouts.tif(tmp_path / f"{stem}Fmask.tif", flags, 10.0, nodata=255)
    source = the_mr(tmp_path, clouds="hls")
    assert source.date == "2009-08-18"
    assert np.array_equal(pixels_of(source), np.concatenate([arrays[f"B0{n}"] for n in numbers]))
    hidden = [any(value >> bit & 1 for bit in (1, 2, 3)) for value in flags.ravel().tolist()]
    assert np.array_equal(valid_of(source), ~np.reshape(hidden, (SIDE, SIDE)))


@pytest.mark.parametrize("tail", ["", "_clip"])
def test_clouds_of_planet_in_hr(tmp_path, tail, capsys):
    """udm2 lies beside the image, named as it until the product; HR of 5 m is warped with it."""
    layouts.tif(tmp_path / "mr" / "a.tif", layouts.pixels(4, 20, 20), 10.0, band_names=BGRN)
    names = ["20200701_170102_1029_3B_", "20200702_170102_1029_3B_"]
    for name in names:
        array = layouts.pixels(4, SIDE, SIDE)
        layouts.tif(tmp_path / "hr" / f"{name}AnalyticMS_SR{tail}.tif", array, 5.0)
        clear = layouts.RNG.integers(0, 2, (SIDE, SIDE))
        udm = np.stack([clear, *[1 - clear] * 7]).astype("uint8")
        layouts.tif(tmp_path / "hr" / f"{name}udm2{tail}.tif", udm, 5.0)
    (pair,) = pairs_of(read_geotiff(tmp_path, clouds="planet"))
    for hr in pair.hrs[:2]:
        udm = raster.read(str(hr.info.path).replace("AnalyticMS_SR", "udm2"))
        assert np.array_equal(valid_of(hr), udm[0] == 1)
    assert "udm2: hides what it marks in 2 of 2 HR images" in capsys.readouterr().out
    os.remove(tmp_path / "hr" / f"{names[1]}udm2{tail}.tif")
    (pair,) = pairs_of(read_geotiff(tmp_path, clouds="sentinel2,planet".partition(",")[2]))
    out = capsys.readouterr().out
    assert "1 of 2 HR images" in out and f"{names[1]}AnalyticMS_SR{tail}.tif has none" in out


def test_a_mask_that_is_a_band_is_no_image_band(tmp_path, capsys):
    array = layouts.pixels(5, SIDE, SIDE, dtype="uint16")
    array[4] = KINDS.repeat(2, 0).repeat(2, 1)
    layouts.tif(tmp_path / "a.tif", array, 10.0, band_names=[*BGRN, "SCL"])
    listing = read_geotiff(tmp_path, clouds="sentinel2")
    (pair,) = pairs_of(listing)
    assert listing.bands["mr"] == BGRN
    assert np.array_equal(valid_of(pair.mr), ~np.isin(array[4], [3, 8, 9, 10]))
    assert read_geotiff(tmp_path).bands["mr"] == BGRN
    assert "SCL is no image and left out" in capsys.readouterr().out
    assert read_geotiff(tmp_path, mr_bands=[*"01234"]).bands["mr"] == [*BGRN, "SCL"]


def test_a_warp_carries_the_clouds_along(tmp_path):
    """HR of another projection, with a mask: what is hidden stays hidden where it comes to lie."""
    layouts.tif(tmp_path / "mr" / "a.tif", layouts.pixels(1, 40, 40), 10.0)
    x, y = raster.project("EPSG:32631", "EPSG:32632", [300_200.0], [4_999_800.0])
    side, clouds = 200, np.zeros((200, 200), "uint8")
    clouds[:, :100] = 1
    place = (5.0, 0.0, float(x[0]) - 500, 0.0, -5.0, float(y[0]) + 500)
    for name, array in (("b", layouts.pixels(1, side, side)), ("b_CLM", clouds[None])):
        path = tmp_path / "hr" / f"{name}.tif"
        path.parent.mkdir(exist_ok=True)
        raster.write(path, array, place, 32632)
    (pair,) = pairs_of(read_geotiff(tmp_path, mask_band="CLM", mask_values="1"))
    (hr,) = pair.hrs
    valid, cols = valid_of(hr), np.arange(hr.info.width) + 0.5
    a, b, c, d, e, f = hr.info.transform
    for row in (10, hr.info.height // 2, hr.info.height - 10):
        x, _ = raster.project(
            "EPSG:32631", "EPSG:32632", a * cols + b * row + c, d * cols + e * row + f
        )
        away = np.abs(x - (place[2] + 500)) > 10  # two pixels from the edge
        inside = (x > place[2] + 10) & (x < place[2] + 990)
        assert np.array_equal(valid[row][away & inside], (x > place[2] + 500)[away & inside])


@pytest.mark.parametrize(
    "options, mentions",
    [
        ({"mask_band": "SCL"}, ["--mask-values"]),
        ({"mask_values": "3"}, ["--mask-band"]),
        ({"mask_band": "SCL", "mask_values": "3,cloud"}, ["3,cloud", "bit3"]),
        ({"clouds": "spot"}, ["--clouds spot", "sentinel2"]),
        ({"clouds": "landsat"}, ["a.tif", "QA_PIXEL", "--clouds"]),
        ({"mask_band": "udm2", "mask_values": "0"}, ["a_udm2.tif", "8 bands", "udm2:0"]),
        ({"mask_band": "CLM", "mask_values": "0"}, ["a_CLM.tif", "float32"]),
    ],
)
def test_masks_that_are_none(tmp_path, options, mentions):
    layouts.tif(tmp_path / "a.tif", layouts.pixels(4, SIDE, SIDE), 10.0)
    layouts.tif(tmp_path / "a_udm2.tif", np.ones((8, SIDE, SIDE), "uint8"), 10.0)
    layouts.tif(tmp_path / "a_CLM.tif", np.ones((1, SIDE, SIDE), "float32"), 10.0)
    with refused(ValueError, *mentions):
        read_geotiff(tmp_path, **options)


def test_clouds_are_missing_pixels_of_a_store(tmp_path):
    layouts.tif(tmp_path / "in" / "a.tif", layouts.pixels(2, SIDE, SIDE), 10.0)
    scl = np.full((1, SIDE, SIDE), 4, "uint8")
    scl[0, :10] = 9
    layouts.tif(tmp_path / "in" / "a_SCL.tif", scl, 10.0)
    listing = read_geotiff(tmp_path / "in", clouds="sentinel2")
    meta = pack.pack(listing, tmp_path / "all", chip=20, val=0)
    assert meta["count"]["mr"] == 2
    meta = pack.pack(listing, tmp_path / "half", chip=20, val=0, min_valid=0.5)
    assert meta["count"]["mr"] == 4


# companions


@pytest.mark.parametrize(
    "name",
    "SCL SCL_20m TCI PVI AOT WVP CLM QA_PIXEL QA_RADSAT QA60 Fmask udm2 udm udm2_clip thumbnail "
    "preview MSK_CLDPRB_20m VZA ST_EMIS visual".split(),
)
def test_companions_are_no_images(tmp_path, name, capsys):
    band_files(tmp_path, "S2_20200101_", ["B02", "B03", "B04", "B08"])
    layouts.tif(tmp_path / f"S2_20200101_{name}.tif", layouts.pixels(3, 9, 9, dtype="uint8"), 20.0)
    (tmp_path / "S2_20200101_B02.tif.aux.xml").write_text("<PAMDataset></PAMDataset>")
    (tmp_path / "S2_20200101_ql.jpg").write_bytes(b"")
    listing = read_geotiff(tmp_path)
    assert [Path(unit.name).name for unit in listing.units] == ["S2_20200101"]
    assert listing.bands["mr"] == BGRN
    assert "1 companion files left alone" in capsys.readouterr().out


def test_files_that_all_end_as_companions_are_what_is_meant(tmp_path):
    for name in "ab":
        layouts.tif(tmp_path / f"{name}_overview.tif", layouts.pixels(3, 20, 20), 10.0)
    assert len(read_geotiff(tmp_path).units) == 2
    assert len(read_geotiff(tmp_path / "a_overview.tif").units) == 1


# bands


def test_planet_of_4_and_8_bands(tmp_path, capsys):
    """The bands that both have, by the names in the files or else by the product."""
    eight = layouts.pixels(8, SIDE, SIDE)
    four = layouts.pixels(4, SIDE, SIDE)
    layouts.tif(tmp_path / "20200701_1_3B_AnalyticMS_SR_8b.tif", eight, 3.0)
    layouts.tif(tmp_path / "20200702_1_3B_AnalyticMS_SR.tif", four, 3.0)
    listing = read_geotiff(tmp_path)
    assert listing.bands["mr"] == ["blue", "green", "red", "nir"]
    first, second = (pixels_of(pair.mr) for pair in pairs_of(listing))
    assert np.array_equal(first, eight[[1, 3, 5, 7]]) and np.array_equal(second, four)
    assert "--mr-bands: blue,green,red,nir, which all of 2 files have" in capsys.readouterr().out
    layouts.tif(tmp_path / "20200703.tif", four[:3], 3.0)
    with refused(ValueError, "--mr-bands"):
        read_geotiff(tmp_path)


def test_polarisations_are_bands_of_one_scene(tmp_path):
    arrays = band_files(tmp_path, "S1A_IW_20200701_", ["VV", "VH"])
    listing = read_geotiff(tmp_path)
    assert listing.bands["mr"] == ["VH", "VV"]
    (pair,) = pairs_of(listing)
    assert np.array_equal(pixels_of(pair.mr), np.concatenate([arrays["VH"], arrays["VV"]]))


# archives


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
@pytest.mark.parametrize("inner", ["", "scene_20200701/"])
def test_archives_are_read_as_they_are(tmp_path, suffix, inner):
    folder = tmp_path / "made"
    arrays = band_files(folder, "", ["B02", "B03", "B04", "B08"])
    layouts.tif(folder / "SCL.tif", KINDS[None], 20.0)
    archive = tmp_path / "in" / f"S2_20200701{suffix}"
    archive.parent.mkdir()
    names = sorted(path.name for path in folder.iterdir())
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for name in names:
                file.write(folder / name, inner + name)
    else:
        with tarfile.open(archive, "w") as file:
            for name in names:
                file.add(folder / name, inner + name)
    whole = np.concatenate([arrays[band] for band in ("B02", "B03", "B04", "B08")])
    for where in (archive, archive.parent):
        source = the_mr(where, clouds="sentinel2")
        assert np.array_equal(pixels_of(source), whole) and source.date == "2020-07-01"
        assert np.array_equal(valid_of(source), ~spread(np.isin(KINDS, [3, 8, 9, 10])))
    assert images.name_of(source.info.path, True) == (inner.strip("/") or "S2_20200701")
    # unpacked beside it, it is not read twice
    os.rename(folder, archive.parent / "S2_20200701.SAVE")
    source = the_mr(archive.parent)
    assert "vsi" not in str(source.info.path) and np.array_equal(pixels_of(source), whole)


def test_archives_that_are_none(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\3\4 no archive")
    with refused(ValueError, "a.zip", "copy or download"):
        read_geotiff(tmp_path)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("x.tif", b"")
        file.writestr("x.tif.msk", b"<WMS>")
    with refused(ValueError, "a.zip", "x.tif.msk", "unpack"):
        read_geotiff(tmp_path)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("../x.tif", b"")
        file.writestr("readme.txt", b"")
    with refused(FileNotFoundError, "no .tif"):
        read_geotiff(tmp_path)


# dates


@pytest.mark.parametrize(
    "path, date",
    [
        ("S2A_20200131T101010_x.tif", "2020-01-31"),
        ("planet_20200131170102.tif", "2020-01-31"),
        ("HLS.S30.T14TNT.2020366T165512.v2.0.tif", "2020-12-31"),
        ("HLS.S30.T14TNT.2019366T165512.v2.0.tif", ""),
        ("2020-01-31/a.tif", "2020-01-31"),
        ("20200131/tiles/a.tif", "2020-01-31"),
        ("a_12345678.tif", ""),
    ],
)
def test_dates_of_names_and_folders(path, date):
    assert images.date_in(Path("x/y/z") / path) == date


def test_a_date_in_the_tags(tmp_path):
    layouts.tif(tmp_path / "a.tif", layouts.pixels(1, 20, 20), 10.0)
    with rasterio.open(tmp_path / "a.tif", "r+", IGNORE_COG_LAYOUT_BREAK="YES") as file:
        file.update_tags(TIFFTAG_DATETIME="2018:07:16 10:20:30")
    assert the_mr(tmp_path).date == "2018-07-16"
