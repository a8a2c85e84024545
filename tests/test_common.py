"""datasets/common.py: a file dropped into the folder is a set; pixels of TIFFs of any layout."""

import dataclasses
import io
import sys
import tracemalloc
import zipfile

import h5py
import layouts
import numpy as np
import pair_layouts
import pytest
import rasterio
import tifffile
from conftest import ROOT, refused

import data
import datasets
import finetune
from datasets import common, tasks
from imagery import raster


@pytest.fixture
def drop(tmp_path, monkeypatch):
    """drop(name, text) puts a file into a folder that is read as part of datasets/."""
    folder, before = tmp_path / "dropped", set(sys.modules)
    folder.mkdir()
    monkeypatch.setattr(datasets, "__path__", [*datasets.__path__, str(folder)])

    def drop(name, text):
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
        common.sets.cache_clear()

    yield drop
    common.sets.cache_clear()
    for name in {name for name in sys.modules if name.startswith("datasets.")} - before:
        del sys.modules[name]
        delattr(datasets, name.removeprefix("datasets."))


def test_a_file_of_pairs_that_is_dropped_in_is_a_format(drop, tmp_path, monkeypatch, capsys):
    pair_layouts.sen2naip(tmp_path / "in")
    text = (ROOT / "datasets/sen2naip.py").read_text("utf-8")
    drop("mine", text.replace('PAIRS = {"sen2naip"', 'PAIRS = {"mine"'))
    for name in ("mine", "sen2naip"):
        command = ["data.py", "pack", "--format", name, tmp_path / "in", tmp_path / name]
        monkeypatch.setattr(sys, "argv", [*map(str, command), "--val", "0"])
        data.main()
    mine, known = (data.Store(tmp_path / name).batch([0, 1]) for name in ("mine", "sen2naip"))
    assert all(np.array_equal(mine[key], known[key]) for key in known)
    monkeypatch.setattr(sys, "argv", ["data.py", "pack", "--format", "nobody", "in", "out"])
    with refused(SystemExit, "mine", "sen2naip", "worldstrat"):
        data.main()


def test_a_labelled_file_that_is_dropped_in_is_a_task(drop, tmp_path, capsys):
    layouts.marida(tmp_path, np.random.default_rng(0))
    text = (ROOT / "datasets/marida.py").read_text("utf-8")
    drop("mine", text.replace('"marida": common', '"my-set": common').replace("MARIDA: ", "Mine: "))
    mine, known = (tasks.load_task(name, tmp_path, tile=8) for name in ("my-set", "marida"))
    assert tasks.fingerprint(mine) == tasks.fingerprint(known) and mine.name == "my-set"
    with pytest.raises(SystemExit):
        finetune.main(["--list-tasks"])
    assert "my-set: Mine: marine debris" in capsys.readouterr().out
    with refused(SystemExit, "--task my-set needs --root"):
        finetune.main(["--task", "my-set", "--encoder", "random"])


def test_a_time_series_that_is_dropped_in_takes_dates(drop):
    text = (ROOT / "datasets/pastis.py").read_text("utf-8")
    drop("mine", text.replace('"pastis": common', '"my-crops": common'))
    words = ["--encoder", "random", "--root", "r", "--dates", "3", "--task"]
    assert finetune.parse_args([*words, "my-crops"]).dates == 3
    with refused(SystemExit, "--dates", "marida", "--task my-crops or pastis"):
        finetune.parse_args([*words, "marida"])


def test_two_files_of_one_name_are_told(drop):
    drop("again", 'PAIRS = {"sen2naip": print}')
    with refused(ValueError, "datasets.sen2naip", "datasets.again", "rename one"):
        common.sets("PAIRS")


def test_every_set_is_a_small_file():
    """As the files of datasets/ are found, whatever they are called."""
    for file in (ROOT / "datasets").glob("*.py"):
        text = file.read_text("utf-8")
        if "\nPAIRS = " in text or "\nTASKS = " in text:
            assert text.count("\n") <= 120 or file.stem == "folder", file


def test_every_labelled_set_says_whose_it_is():
    for about in common.sets("TASKS").values():
        assert about.licence and about.url and about.size and about.open.__module__


@pytest.mark.parametrize(
    "name, date",
    [
        ("naip_m_4709963_se_14_1_20180716", "2018-07-16"),
        ("T31TCJ_20220301T105859_B02", "2022-03-01"),
        ("2019-07-25_x", "2019-07-25"),
        ("20189999_2020_01_31", "2020-01-31"),
        ("m_20180231", ""),
        ("120180716", ""),
        ("2018-0716", ""),
    ],
)
def test_dates_in_names(name, date):
    assert common.date_of(name) == date


# ---- pixels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", ">u2", "<i2", "float32"])
@pytest.mark.parametrize(
    "layout",
    [
        {"planarconfig": "contig"},
        {"planarconfig": "separate"},
        {"planarconfig": "contig", "tile": (16, 16), "compression": "zlib"},
        {"planarconfig": "separate", "rowsperstrip": 5, "compression": "lzw"},
        "pages",
    ],
)
def test_pixels_of_a_tiff_of_any_layout(tmp_path, dtype, layout):
    rng, path = np.random.default_rng(0), tmp_path / "a.tif"
    pixels = rng.integers(0, 200, (5, 19, 23)).astype(dtype)
    with tifffile.TiffWriter(path, byteorder=">" if dtype[0] == ">" else "<") as tif:
        if layout == "pages":
            for band in pixels:
                tif.write(band, photometric="minisblack", metadata=None)
        else:
            array = pixels.transpose(1, 2, 0) if layout["planarconfig"] == "contig" else pixels
            tif.write(array, photometric="minisblack", metadata=None, **layout)
    found = common.read_tiff(path)
    assert np.array_equal(found, pixels) and found.dtype.isnative
    assert np.array_equal(common.read_tiff(path, (2, 3, 5, 7), [4, 0]), pixels[[4, 0], 2:7, 3:10])


def test_what_a_tiff_says_of_itself_is_what_gdal_reads(tmp_path):
    """One with all there is to say, one whose points are centres, one in degrees, one of nothing;
    a turned one, and one in a CRS without a code, are taken as of no ground."""
    utm, degrees = (10.0, 0.0, 3e5, 0.0, -10.0, 5e6), (1e-4, 0.0, 8.5, 0.0, -1e-4, 47.25)
    turned = (8.0, 6.0, 3e5, 6.0, -8.0, 5e6)
    lcc = "+proj=lcc +lat_1=44 +lat_2=49 +lat_0=46.5 +lon_0=3 +x_0=7 +y_0=66 +ellps=GRS80"
    for name, place, crs, tags, grounded in [
        ("all", utm, 32631, {"nodata": 7}, True),
        ("point", utm, 26914, {"AREA_OR_POINT": "Point"}, True),
        ("degrees", degrees, 4326, {}, True),
        ("bare", None, None, {}, True),
        ("turned", turned, 32631, {}, False),
        ("own", utm, lcc, {}, False),
    ]:
        path = tmp_path / f"{name}.tif"
        about = dict(driver="GTiff", width=5, height=4, count=2, dtype="uint16")
        if place:
            about |= dict(
                transform=rasterio.Affine(*place), crs=rasterio.crs.CRS.from_user_input(crs)
            )
        with rasterio.open(path, "w", **about, nodata=tags.pop("nodata", None)) as file:
            file.update_tags(**tags)
            if name == "all":
                file.descriptions = "Blue", "Grün & Rot"
        with common.open_tiff(path) as (_, info):
            pass
        known = raster.info(path)
        if not grounded:
            assert (info.transform, info.crs) == (None, None) and known.transform
            known = dataclasses.replace(known, transform=None, crs=None)
        assert info == known


def test_one_band_has_three_axes(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.arange(12, dtype="uint8").reshape(3, 4))
    assert common.read_tiff(tmp_path / "a.tif").shape == (1, 3, 4)


@pytest.mark.parametrize("declared, missing", [(None, 1), ("7", 2), ("nan", 1), ("unknown", 1)])
def test_pixels_as_floats_are_missing_where_all_chosen_bands_are_nodata(
    tmp_path, declared, missing
):
    pixels = np.ones((3, 4, 4), np.float32)
    pixels[:, 0, 0], pixels[:, 1, 1], pixels[0, 2, 2] = np.inf, 7, 7
    tags = [] if declared is None else [(42113, 2, 0, declared, True)]
    about = {"planarconfig": "separate", "photometric": "minisblack", "extratags": tags}
    tifffile.imwrite(tmp_path / "a.tif", pixels, metadata=None, **about)
    found = common.read_float(tmp_path / "a.tif", 3, [2, 1])
    assert found.dtype == np.float32 and np.isnan(found).sum(axis=(1, 2)).tolist() == [missing] * 2
    assert np.array_equal(found[:, 2], pixels[[2, 1], 2])
    with refused(ValueError, "a.tif", "3 bands", "ships 4"):
        common.read_float(tmp_path / "a.tif", 4)


def test_a_tiff_that_is_cut_off_or_claims_too_much_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    about = {"planarconfig": "separate", "photometric": "minisblack", "tile": (16, 16)}
    tifffile.imwrite(path, np.ones((4, 64, 64), "uint16"), **about)
    content = path.read_bytes()
    for size in (0, 4, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with refused(ValueError, path):
            common.read_tiff(path)
    tifffile.imwrite(path, np.eye(64), compression="zlib", rowsperstrip=8, metadata=None)
    with tifffile.TiffFile(path) as tif:
        last = tif.pages[0].dataoffsets[-1]
    path.write_bytes(path.read_bytes()[:last])  # a whole strip is gone
    with refused(ValueError, path, f"ends at {last}"):
        common.read_tiff(path)
    tifffile.imwrite(path, np.ones((64, 64), "uint16"), compression="zlib", metadata=None)
    with tifffile.TiffFile(path, mode="r+b") as tif:
        for name in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            tif.pages[0].tags[name].overwrite(2**20)
    with refused(ValueError, path, "2199023255552 bytes"):
        common.read_tiff(path)
    path.write_bytes(b"<VRTDataset/>")
    with refused(ValueError, path):
        common.read_tiff(path)


# ---- files that claim to be larger than they are


def claims(name, path):
    """A small file that claims to hold `name` bytes of pixels, and its reader."""
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:  # nothing of it is on the disk
            shape = {
                "many": (10**9, 4, 32, 32),
                "one": (2, 4, 2**15, 2**14),
                "flat": (2**17, 2**17),
            }
            file.create_dataset("x", shape[name], "float32", chunks=True)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            header, side = io.BytesIO(), 2**17 if name == "many" else 2**15
            facts = {"descr": "<f4", "fortran_order": False, "shape": (side, side)}
            np.lib.format.write_array_header_1_0(header, facts)
            archive.writestr("arr_0.npy", header.getvalue() + bytes(10**6))
    return path


@pytest.mark.parametrize("name, file", [
    ("many", "a.h5"), ("one", "a.h5"), ("flat", "a.h5"), ("many", "a.npz"), ("one", "a.npz"),
])  # fmt: skip
def test_what_a_file_claims_is_checked_before_memory_is_asked_for(tmp_path, name, file):
    path = claims(name, tmp_path / file)
    assert path.stat().st_size < 10_000
    readers = {
        ".h5": lambda: common.open_hdf5(path).__enter__()["x"][0],
        ".npz": lambda: common.read_numpy(path, (None, None)),
    }
    tracemalloc.start()
    try:
        with refused(ValueError, path, "bytes"):
            readers[path.suffix]()
        assert tracemalloc.get_traced_memory()[1] < 10**8  # numpy's arrays are in it
    finally:
        tracemalloc.stop()
