"""pack.py: packing keeps the ground, splits share none; every message."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from landscape import (
    EAST,
    NORTH,
    RNG,
    landscape,
    pack_files,
    pair,
    rows_of,
    shift_between,
    write_scene,
)

import data
import geotiff
import pack

SHARED = Path(os.environ.get("CROSSSCALE_SHARED", Path(__file__).parents[2] / "shared")) / "data"


def test_chips_are_the_pixels_of_the_files(tmp_path):
    mr, hr = pair(tmp_path, 3.0, (0, 0), (-4.0, 7.0), side=100, hr_side=340)
    pack_files(mr, hr, tmp_path / "store", chip=32, val=0)
    store = data.Store(tmp_path / "store")
    mr_scene, hr_scene = geotiff.read(mr + "/a.tif"), geotiff.read(hr + "/a.tif")
    rows = rows_of(tmp_path / "store")
    assert len(rows) == len(store) == 9
    size = store.meta["shape"]["hr"][1]
    assert size == 108  # 32 x 10 / 3 = 106.67 pixels touch at most 108
    for i, row in enumerate(rows):
        r, c = int(row["row"]), int(row["col"])
        batch = store.batch([i])
        assert np.array_equal(batch["mr"][0], mr_scene[:, r : r + 32, c : c + 32])
        # the corner in HR pixels of the file, by hand
        top, left = (10 * r + 7.0) / 3, (10 * c + 4.0) / 3
        origin = float(row["hr_row"]), float(row["hr_col"])
        assert batch["hr_window"][:, :2].tolist() == [list(origin)]
        y, x = round(top - origin[0]), round(left - origin[1])
        assert np.allclose([top - y, left - x], origin, atol=1e-9)
        assert -1e-9 <= origin[0] and origin[0] + 32 * 10 / 3 <= size + 1e-9
        assert np.array_equal(batch["hr"][0], hr_scene[:, y : y + size, x : x + size])


def test_statistics_and_holes(tmp_path):
    """Holes do not count, are filled with the chip's mean, and too many of them drop the chip."""
    pair(tmp_path, side=64)
    mr = landscape((10.0, 0, EAST, 0, -10.0, NORTH), 64, 64)
    hr = landscape((5.0, 0, EAST, 0, -5.0, NORTH), 128, 128)
    mr[:, :16, :16] = 0  # chip 0: all of it
    mr[:, 0, 20] = 0  # chip 1: one pixel
    mr[0, 0, 40] = 0  # chip 2: one band of a pixel, which is no hole
    hr[:, 0:20, 96:128] = 0  # chip 3: more than half
    write_scene(tmp_path / "mr/a.tif", 10.0, (0, 0), 64, 64, array=mr, nodata=0)
    write_scene(tmp_path / "hr/a.tif", 5.0, (0, 0), 128, 128, array=hr, nodata=0)
    mr_in, hr_in = str(tmp_path / "mr"), str(tmp_path / "hr")
    meta = pack_files(mr_in, hr_in, tmp_path / "store", chip=16, min_valid=0.9, val=0)
    store = data.Store(tmp_path / "store")
    assert len(store) == 14
    skipped = [(r["row"], r["col"], r["reason"]) for r in rows_of(tmp_path / "store", "skipped")]
    assert skipped == [("0", "0", "MR not valid enough"), ("0", "48", "HR not valid enough")]
    chip = store.batch([0])["mr"][0].numpy()
    real = mr[:, :16, 16:32].astype(float)
    mean = [np.delete(real[band].reshape(-1), 4).mean() for band in range(2)]
    assert np.array_equal(chip[:, 0, 4], np.rint(mean))
    assert float(rows_of(tmp_path / "store")[0]["valid"]) == 255 / 256
    kept = np.ones((64, 64), bool)
    kept[:16, :16] = kept[0, 20] = kept[:16, 48:] = False
    for band in range(2):
        assert np.isclose(meta["mean"]["mr"][band], mr[band][kept].mean(), rtol=1e-12)
        assert np.isclose(meta["std"]["mr"][band], mr[band][kept].std(), rtol=1e-12)


def test_statistics_are_of_the_training_split_only(tmp_path):
    mr, hr = pair(tmp_path, side=96)
    meta = pack_files(mr, hr, tmp_path / "store", chip=16, split_block=2, val=0.3, test=0.2)
    store = data.Store(tmp_path / "store")
    train = store.batch(store.split("train"))
    for sensor in ("mr", "hr"):
        pixels = train[sensor].numpy().astype(float)
        assert np.allclose(meta["mean"][sensor], pixels.mean((0, 2, 3)), rtol=1e-12)
        assert np.allclose(meta["std"][sensor], pixels.std((0, 2, 3)), rtol=1e-12)


def test_nan_and_inf_are_holes_and_said(tmp_path, capsys):
    mr, hr = pair(tmp_path)
    array = geotiff.read(mr + "/a.tif").astype("float32")
    array[0, 3, 3], array[1, 4, 4] = np.nan, np.inf
    write_scene(tmp_path / "mr/a.tif", 10.0, (0, 0), 64, 64, array=array)
    meta = pack_files(mr, hr, tmp_path / "store", chip=32, min_valid=0.5, val=0)
    assert "a.tif: 2 pixels of its chips are NaN or inf" in capsys.readouterr().out
    store = data.Store(tmp_path / "store")
    assert meta["dtype"] == {"mr": "float32", "hr": "uint16"}
    chip = store.batch([0])["mr"].numpy()
    assert np.isfinite(chip).all() and np.isfinite(meta["mean"]["mr"]).all()
    valid = np.isfinite(array).all(0)[:32, :32]
    assert np.allclose(chip[0, :, 3, 3], array[:, :32, :32][:, valid].mean(1))


def test_a_flag_says_what_is_missing_where_files_do_not(tmp_path):
    mr, hr = pair(tmp_path)
    array = geotiff.read(mr + "/a.tif")
    array[:, :32, :32] = 7
    write_scene(tmp_path / "mr/a.tif", 10.0, (0, 0), 64, 64, array=array)
    assert pack_files(mr, hr, tmp_path / "one", chip=32, val=0)["count"]["mr"] == 4
    assert pack_files(mr, hr, tmp_path / "two", chip=32, val=0, nodata=7)["count"]["mr"] == 3


def test_bands_by_index_and_by_name(tmp_path):
    mr, hr = pair(tmp_path, bands=3, band_names=("R", "G", "B"))
    by_name = {"mr_bands": ["b", "R"], "hr_bands": ["2", "0"]}
    meta = pack_files(mr, hr, tmp_path / "store", chip=32, val=0, **by_name)
    assert meta["bands"] == {"mr": ["B", "R"], "hr": ["B", "R"]}
    store = data.Store(tmp_path / "store")
    scene = geotiff.read(mr + "/a.tif")
    assert np.array_equal(store.mr[0], scene[[2, 0], :32, :32])
    assert np.array_equal(store.hr[0], geotiff.read(hr + "/a.tif")[[2, 0], :64, :64])
    meta = pack_files(mr, hr, tmp_path / "other", chip=32, val=0, band_names=["x", "y", "z"])
    assert meta["bands"] == {"mr": ["x", "y", "z"], "hr": ["x", "y", "z"]}


def test_reading_in_small_blocks_changes_nothing(tmp_path, monkeypatch):
    mr, hr = pair(tmp_path, 3.0, (0, 0), (-4.0, 7.0), side=100, hr_side=340)
    options = {"chip": 16, "stride": 10, "split_block": 2, "val": 0.2}
    pack_files(mr, hr, tmp_path / "one", **options)
    monkeypatch.setattr(pack, "BLOCK_BYTES", 1000)
    pack_files(mr, hr, tmp_path / "two", **options)
    for name in ("mr.npy", "hr.npy", "index.csv", "skipped.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_several_hr_files_on_one_mr_and_several_mr_on_one_hr(tmp_path):
    """Every chip takes a file that covers it wholly; of several, the one with the likest name."""
    for date in ("2019-07", "2020-08"):
        write_scene(tmp_path / f"mr/T31_{date}_10m.tif", 10.0, (0, 0), 64, 64)
        write_scene(tmp_path / f"hr/T31_{date}_05m.tif", 5.0, (0, 0), 80, 128)
        write_scene(tmp_path / f"hr/south_{date}.tif", 5.0, (0, -320), 64, 128)
    pack_files(tmp_path / "mr", tmp_path / "hr", tmp_path / "store", chip=32, val=0)
    rows = rows_of(tmp_path / "store")
    assert len(rows) == 8
    for row in rows:
        date = Path(row["mr_source"]).stem[4:11]
        south = int(row["row"]) == 32
        assert Path(row["hr_source"]).name == (
            f"south_{date}.tif" if south else f"T31_{date}_05m.tif"
        )


def test_the_next_hr_file_serves_where_the_first_has_holes(tmp_path):
    mr, hr = pair(tmp_path)
    array = geotiff.read(hr + "/a.tif")
    write_scene(tmp_path / "hr/other.tif", 5.0, (0, 0), 128, 128)
    array[:, :64, :64] = 0
    write_scene(tmp_path / "hr/a.tif", 5.0, (0, 0), 128, 128, array=array, nodata=0)
    pack_files(mr, hr, tmp_path / "store", chip=32, val=0)
    sources = [Path(row["hr_source"]).name for row in rows_of(tmp_path / "store")]
    assert sources == ["other.tif", "a.tif", "a.tif", "a.tif"]


def test_an_hr_file_as_small_as_its_chip_beside_one_that_needs_a_margin(tmp_path):
    write_scene(tmp_path / "mr/a.tif", 10.0, (0, 0), 32, 32)
    write_scene(tmp_path / "hr/a.tif", 5.0, (0, 0), 64, 64)
    write_scene(tmp_path / "mr/b.tif", 10.0, (5000, 0), 32, 32)
    write_scene(tmp_path / "hr/b.tif", 5.0, (4998, 2), 66, 66)
    pack_files(tmp_path / "mr", tmp_path / "hr", tmp_path / "store", chip=32, val=0)
    store = data.Store(tmp_path / "store")
    assert store.hr.shape == (2, 2, 65, 65)
    small = geotiff.read(tmp_path / "hr/a.tif")
    assert np.array_equal(store.hr[0][:, :64, :64], small)
    assert np.array_equal(store.hr[0][:, 64, :64], small[:, 63])


def test_without_georeference_files_pair_by_name_and_are_blocks(tmp_path):
    for name in "abcd":
        for sensor, side in (("mr", 60), ("hr", 200)):
            (tmp_path / sensor).mkdir(exist_ok=True)
            array = RNG.integers(0, 999, (3, side, side), dtype="uint16")
            geotiff.write(tmp_path / sensor / f"{name}.tif", array)
    geotiff.write(tmp_path / "mr" / "lonely.tif", np.zeros((3, 60, 60), "uint16"))
    meta = pack_files(
        tmp_path / "mr", tmp_path / "hr", tmp_path / "store", chip=30, val=0.25, test=0.25
    )
    assert meta["pixel_ratio"] == [200 / 60] * 2 and meta["gsd"] == {"mr": None, "hr": None}
    rows = rows_of(tmp_path / "store")
    assert len(rows) == 16
    assert all(Path(r["mr_source"]).name == Path(r["hr_source"]).name for r in rows)
    splits = {Path(r["mr_source"]).stem: set() for r in rows}
    for r in rows:
        splits[Path(r["mr_source"]).stem].add(r["split"])
    assert sorted(len(s) for s in splits.values()) == [1, 1, 1, 1]
    assert set.union(*splits.values()) == {"train", "val", "test"}
    (lonely,) = rows_of(tmp_path / "store", "skipped")
    assert lonely["reason"] == "no HR file for it"
    assert data.Store(tmp_path / "store").meta["count"]["hr"] == 16


def test_big_endian_files_are_stored_native(tmp_path):
    array = RNG.integers(0, 999, (40, 40), dtype="uint16")
    for sensor, factor in (("mr", 1), ("hr", 2)):
        (tmp_path / sensor).mkdir()
        image = array.repeat(factor, 0).repeat(factor, 1)
        tifffile.imwrite(tmp_path / sensor / "a.tif", image, byteorder=">", metadata=None)
    pack_files(tmp_path / "mr", tmp_path / "hr", tmp_path / "store", chip=20, val=0)
    chip = data.Store(tmp_path / "store").batch([0])["mr"]
    assert np.array_equal(chip[0, 0], array[:20, :20])


# splits


def ground_of(row):
    """Ground rectangle of a chip of the index: left, bottom, right, top."""
    a, _, c, _, e, f = geotiff.info(row["mr_source"]).transform
    left, top = c + a * int(row["col"]), f + e * int(row["row"])
    return np.array([left, top + 16 * e, left + 16 * a, top])


@pytest.mark.parametrize("seed", range(4))
def test_splits_share_no_ground(tmp_path, seed):
    """Two images of the same ground on shifted grids, overlapping chips."""
    write_scene(tmp_path / "mr/a.tif", 10.0, (0, 0), 100, 90)
    write_scene(tmp_path / "mr/b.tif", 10.0, (73.0, -41.0), 90, 90)
    write_scene(tmp_path / "hr/a.tif", 5.0, (0, 0), 240, 240)
    options = {"stride": 9, "split_block": 2, "val": 0.3, "test": 0.2, "seed": seed}
    meta = pack_files(tmp_path / "mr", tmp_path / "hr", tmp_path / "store", chip=16, **options)
    rows = rows_of(tmp_path / "store")
    assert {r["split"] for r in rows} == {"train", "val", "test"}
    assert {Path(r["mr_source"]).name for r in rows} == {"a.tif", "b.tif"}
    skipped = [r["reason"] for r in rows_of(tmp_path / "store", "skipped")]
    assert skipped.count("touches two splits") > 0
    boxes = np.array([ground_of(r) for r in rows])
    split = np.array([r["split"] for r in rows])
    left, bottom, right, top = boxes.T
    wide = np.minimum(right[:, None], right) - np.maximum(left[:, None], left)
    high = np.minimum(top[:, None], top) - np.maximum(bottom[:, None], bottom)
    shared = (wide > 0.1) & (high > 0.1)
    assert not (shared & (split[:, None] != split)).any()
    again = pack_files(tmp_path / "mr", tmp_path / "hr", tmp_path / "again", chip=16, **options)
    assert again["splits"] == meta["splits"]
    store = data.Store(tmp_path / "store")
    assert len(store.split("train")) == meta["splits"]["train"]
    assert store.split("val").dtype == np.int64
    assert np.array_equal(store.split("test"), np.flatnonzero(split == "test"))
    scenes = {name: geotiff.read(tmp_path / "mr" / name) for name in ("a.tif", "b.tif")}
    for chip, row in zip(
        store.mr, rows, strict=True
    ):  # still each its own after chips were dropped
        r, c = int(row["row"]), int(row["col"])
        scene = scenes[Path(row["mr_source"]).name]
        assert np.array_equal(chip, scene[:, r : r + 16, c : c + 16])


@pytest.mark.parametrize("sizes", [[1, 1], [64, 2], [5] * 6, [1] * 200, [0, 3, 3, 0], [9, 1, 1]])
@pytest.mark.parametrize("seed", range(3))
def test_blocks_are_dealt_near_their_share_and_no_split_is_empty(sizes, seed):
    sizes = np.array(sizes)
    split = pack.assign_splits(sizes, {"val": 0.1, "test": 0.0}, seed)
    share = sizes[split == "val"].sum() / sizes.sum()
    assert sizes[split == "train"].sum() > 0 and share > 0
    assert "test" not in split
    fine = 0.1 + sizes[sizes > 0].min() / sizes.sum()
    assert share <= fine
    if (sizes > 0).sum() > 2:
        assert set(pack.assign_splits(sizes, {"val": 0.1, "test": 0.1}, seed)) == {
            "train", "val", "test"
        }  # fmt: skip


def test_one_block_says_why_there_is_no_val(tmp_path, capsys):
    mr, hr = pair(tmp_path)
    meta = pack_files(mr, hr, tmp_path / "store", chip=16)
    assert meta["splits"] == {"train": 16}
    out = capsys.readouterr().out
    assert (
        "val is empty: the chips lie in 1 sites or blocks of ground of 8 x 8 chips; try another"
        in out
    )
    assert len(data.Store(tmp_path / "store").split("val")) == 0


# real imagery


def test_south_african_pairs(tmp_path):
    folder = SHARED / "homonim_ngi_s2_l8"
    if not folder.exists():
        pytest.skip(f"no imagery at {folder}; set CROSSSCALE_SHARED")
    bgr = {"mr_bands": ["B2", "B3", "B4"], "hr_bands": ["2", "1", "0"], "split_block": 4}
    mr = folder / "mr" / "sentinel2_b432_byte.tif"
    meta = pack_files(mr, folder / "hr_ngi_5m_rgb", tmp_path / "store", **bgr)
    store = data.Store(tmp_path / "store")
    assert meta["bands"] == {"mr": ["B2", "B3", "B4"], "hr": ["B2", "B3", "B4"]} and meta[
        "pixel_ratio"
    ] == [2.0, 2.0]
    assert meta["gsd"] == {"mr": 10.0, "hr": 5.0}
    assert len(store) > 100 and meta["splits"]["val"] > 0
    batch = store.batch(store.split("train"))
    whole = np.array([[0.0, 0.0, 1.0, 1.0]] * len(batch["mr"]))
    a, b = data.crop_pairs(batch, whole, meta, 64, 64)
    alike = [np.corrcoef(a[:, k].flatten(), b[:, k].flatten())[0, 1] for k in range(3)]
    off = [np.corrcoef(a[:, k, 8:].flatten(), b[:, k, :-8].flatten())[0, 1] for k in range(3)]
    assert min(alike) > 0.5 and min(np.subtract(alike, off)) > 0.1
    with pytest.raises(ValueError, match=r"landsat8_byte\.tif: 3 bands expected .* found 24"):
        pack_files(
            folder / "mr", folder / "hr_ngi_5m_rgb", tmp_path / "b", band_names=["x", "y", "z"]
        )


def test_north_dakota_with_a_simulated_mr(tmp_path):
    path = SHARED / "opengeos_naip_5m" / "naip_m_4709963_se_14_1_20170827.tif"
    if not path.exists():
        pytest.skip(f"no imagery at {path}; set CROSSSCALE_SHARED")
    about, array = geotiff.info(path), geotiff.read(path)
    a, b, c, d, e, f = about.transform
    mean = array.reshape(4, about.height // 2, 2, about.width // 2, 2).mean((2, 4))
    coarse = tmp_path / path.name
    geotiff.write(coarse, mean.round().astype("uint8"), (2 * a, b, c, d, 2 * e, f), about.crs)
    order = {"mr_bands": ["2", "1", "0", "3"], "hr_bands": ["2", "1", "0", "3"]}
    names = {"band_names": ["B", "G", "R", "NIR"]}
    meta = pack_files(coarse, path.parent, tmp_path / "store", split_block=2, **order, **names)
    assert meta["shape"] == {"mr": (4, 64, 64), "hr": (4, 129, 129)}  # other dates are offset
    store = data.Store(tmp_path / "store")
    same = [r for r in rows_of(tmp_path / "store") if Path(r["hr_source"]).name == path.name]
    assert len(same) == len(store) == 35
    batch = store.batch(np.arange(len(store)))
    mr, hr = (x.numpy() for x in data.crop_pairs(batch, [[0, 0, 1, 1]] * 35, meta, 64, 64))
    shifts = [shift_between(m[3], h[3]) for m, h in zip(mr, hr, strict=True)]
    assert np.abs(shifts).max() < 0.05


# bad input


def test_files_that_cannot_be_read(tmp_path):
    mr, hr = pair(tmp_path)
    (tmp_path / "hr/a.tif").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"a\.tif: not a TIFF"):
        pack_files(mr, hr, tmp_path / "store")
    mr, hr = pair(tmp_path)
    content = (tmp_path / "hr/a.tif").read_bytes()
    (tmp_path / "hr/a.tif").write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"a\.tif: truncated"):
        pack_files(mr, hr, tmp_path / "store")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"--hr .*empty: no \.tif or \.tiff found; give"):
        pack_files(mr, tmp_path / "empty", tmp_path / "store")
    with pytest.raises(FileNotFoundError, match=r"--mr .*none"):
        pack_files(tmp_path / "none*", hr, tmp_path / "store")


def test_damage_found_late_leaves_nothing_behind(tmp_path):
    mr, hr = pair(tmp_path)
    content = bytearray((tmp_path / "hr/a.tif").read_bytes())
    content[-400:-300] = b"\xff" * 100
    (tmp_path / "hr/a.tif").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tif: damaged TIFF"):
        pack_files(mr, hr, tmp_path / "store")
    assert sorted(os.listdir(tmp_path)) == ["hr", "mr"]


def test_bands_that_do_not_fit(tmp_path):
    mr, hr = pair(tmp_path, bands=4)
    write_scene(tmp_path / "hr/b.tif", 5.0, (0, 0), 128, 128, bands=3)
    names = ["B", "G", "R", "NIR"]
    message = r"b\.tif: 4 bands expected \(B,G,R,NIR\), found 3; use --hr-bands to choose them, "
    with pytest.raises(ValueError, match=message + "such as --hr-bands 2,1,0 for RGB files"):
        pack_files(mr, hr, tmp_path / "store", band_names=names)
    message = r"b\.tif: --hr-bands 3,2,1,0 asked for, the file has 3 bands \(without names\)"
    with pytest.raises(ValueError, match=message):
        pack_files(mr, hr, tmp_path / "store", hr_bands=["3", "2", "1", "0"])
    with pytest.raises(ValueError, match=r"a\.tif: --mr-bands B8 asked for, the file has 4"):
        pack_files(mr, hr, tmp_path / "store", mr_bands=["B8"])


BGR, RGB = ("B", "G", "R"), ("r", "g", "b")


def test_bands_of_one_name_in_another_order(tmp_path):
    mr, hr = pair(tmp_path, bands=3, band_names=BGR)
    write_scene(tmp_path / "hr/a.tif", 5.0, (0, 0), 128, 128, bands=3, band_names=RGB)
    options = {"chip": 32, "val": 0}
    message = r"hr.a\.tif: its bands are r,g,b, but .*mr.a\.tif has B,G,R; use --hr-bands B,G,R$"
    for names in (None, ["x", "y", "z"]):  # the flag hides no disagreement of files
        with pytest.raises(ValueError, match=message):
            pack_files(mr, hr, tmp_path / "store", band_names=names, **options)
    message = r"mr.a\.tif: its bands are B,G,R, but --band-names has R,G,B; use --mr-bands R,G,B$"
    with pytest.raises(ValueError, match=message):
        pack_files(mr, hr, tmp_path / "store", band_names=["R", "G", "B"], **options)
    pack_files(mr, hr, tmp_path / "store", hr_bands=["B", "G", "R"], **options)
    scene = geotiff.read(hr + "/a.tif", (0, 0, 64, 64))
    assert np.array_equal(data.Store(tmp_path / "store").hr[0], scene[::-1])


def test_bands_of_one_name_in_another_order_within_a_folder(tmp_path):
    mr, hr = pair(tmp_path, bands=3)  # which name none
    for sensor, gsd, side in (("mr", 10.0, 64), ("hr", 5.0, 128)):
        write_scene(tmp_path / sensor / "b.tif", gsd, (0, 0), side, side, 3, band_names=BGR)
    for name, some in (("d", ("G", "", "")), ("e", ("", "G", ""))):  # too few names to tell
        write_scene(tmp_path / f"mr/{name}.tif", 10.0, (0, 0), 64, 64, 3, band_names=some)
    assert pack_files(mr, hr, tmp_path / "store", chip=32, val=0)["bands"] == {
        "mr": ["0", "1", "2"],
        "hr": ["0", "1", "2"],
    }
    write_scene(tmp_path / "mr/c.tif", 10.0, (0, 0), 64, 64, 3, band_names=RGB)
    message = r"mr.c\.tif: its bands are r,g,b, but .*mr.b\.tif has B,G,R; use --mr-bands B,G,R$"
    with pytest.raises(ValueError, match=message):
        pack_files(mr, hr, tmp_path / "other", chip=32, val=0)


def test_a_band_name_twice(tmp_path):
    with pytest.raises(ValueError, match="--band-names B,G,b: a name occurs twice; give each"):
        pack_files(*pair(tmp_path, bands=3), tmp_path / "store", band_names=["B", "G", "b"])


def test_complex_pixels(tmp_path):
    mr, hr = pair(tmp_path)
    array = np.zeros((2, 64, 64), "complex64")
    tifffile.imwrite(tmp_path / "mr/a.tif", array, planarconfig="separate", metadata=None)
    with pytest.raises(ValueError, match=r"a\.tif: complex pixels \(complex64\); convert them"):
        pack_files(mr, hr, tmp_path / "store")


def test_mixed_types(tmp_path):
    mr, hr = pair(tmp_path)
    array = np.zeros((2, 64, 64), "uint8")
    write_scene(tmp_path / "mr/b.tif", 10.0, (0, 0), 64, 64, array=array)
    with pytest.raises(ValueError, match=r"b\.tif: uint8, but .*a\.tif is uint16; convert"):
        pack_files(mr, hr, tmp_path / "store")


def test_pairs_that_are_none(tmp_path):
    mr, hr = pair(tmp_path, hr_shift=(5000, 0))
    with pytest.raises(ValueError, match=r"a\.tif: bounds .* do not overlap .*a\.tif.*same ground"):
        pack_files(mr, hr, tmp_path / "store")
    write_scene(tmp_path / "hr/a.tif", 5.0, (0, 0), 128, 128, crs=32632)
    with pytest.raises(ValueError, match=r"CRS EPSG:32632, but .* has EPSG:32631; warp"):
        pack_files(mr, hr, tmp_path / "store")
    geotiff.write(tmp_path / "hr/a.tif", np.zeros((2, 128, 128), "uint16"))
    with pytest.raises(ValueError, match=r"hr.a\.tif: no georeference, but .* has one"):
        pack_files(mr, hr, tmp_path / "store")
    (tmp_path / "mr/a.tif").unlink()
    geotiff.write(tmp_path / "mr/b.tif", np.zeros((2, 64, 64), "uint16"))
    with pytest.raises(ValueError, match=r"no HR file is named as an MR file is .*b\.tif and .*a"):
        pack_files(mr, hr, tmp_path / "store")
    (tmp_path / "hr/sub").mkdir()
    shutil.copy(tmp_path / "hr/a.tif", tmp_path / "hr/sub/a.tif")
    with pytest.raises(ValueError, match=r"a\.tif: the same name as .*a\.tif, and no georef"):
        pack_files(mr, hr, tmp_path / "store")


def test_grids_that_do_not_fit(tmp_path):
    mr, hr = pair(tmp_path)
    with pytest.raises(ValueError, match=r"mr.a\.tif: HR coarser than MR, 0\.5 of its .*swap"):
        pack_files(hr, mr, tmp_path / "store")
    turned = (4.0, 3.0, EAST - 300, 3.0, -4.0, NORTH + 300)
    geotiff.write(tmp_path / "hr/a.tif", np.zeros((2, 300, 300), "uint16"), turned, 32631)
    with pytest.raises(ValueError, match=r"a\.tif: its pixel grid is rotated or mirrored"):
        pack_files(mr, hr, tmp_path / "store")
    pair(tmp_path)
    write_scene(tmp_path / "mr/b.tif", 30.0, (0, 0), 30, 30)
    with pytest.raises(ValueError, match=r"b\.tif: 6 HR pixels to an MR pixel of 30, but 2 to 10"):
        pack_files(mr, hr, tmp_path / "store")


def test_rotated_grids_that_agree_are_fine(tmp_path):
    for sensor, scale in (("mr", 2.0), ("hr", 1.0)):
        (tmp_path / sensor).mkdir()
        turned = (4.0 * scale, 3.0 * scale, EAST, 3.0 * scale, -4.0 * scale, NORTH)
        array = np.zeros((1, int(128 / scale), int(128 / scale)), "uint16")
        geotiff.write(tmp_path / sensor / "a.tif", array, turned, 32631)
    meta = pack_files(tmp_path / "mr", tmp_path / "hr", tmp_path / "store", chip=32, val=0)
    assert meta["count"]["hr"] == 4 and np.allclose(meta["pixel_ratio"], 2)
    assert meta["std"]["mr"] == [1.0]  # a flat band does not divide by 0


def test_no_chip(tmp_path):
    mr, hr = pair(tmp_path, hr_side=32)
    with pytest.raises(ValueError, match="--chip 64: no MR chip of 64 x 64 pixels lies wholly"):
        pack_files(mr, hr, tmp_path / "store")
    mr, hr = pair(tmp_path)
    array = np.zeros((2, 64, 64), "uint16")
    write_scene(tmp_path / "mr/a.tif", 10.0, (0, 0), 64, 64, array=array, nodata=0)
    message = r"no chip kept \(4 MR not valid enough\); "
    with pytest.raises(ValueError, match=message + "one of each pair is all nodata; check"):
        pack_files(mr, hr, tmp_path / "store", chip=32)
    array[:, ::2] = 1
    write_scene(tmp_path / "mr/a.tif", 10.0, (0, 0), 64, 64, array=array, nodata=0)
    with pytest.raises(ValueError, match=message + "lower --min-valid 1.0 or --chip 32"):
        pack_files(mr, hr, tmp_path / "store", chip=32)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "bad",
    [
        {"chip": 0},
        {"stride": 0},
        {"split_block": 0},
        {"seed": -1},
        {"min_valid": 0},
        {"val": 0.6, "test": 0.4},
        {"val": -1},
    ],
)
def test_flags_out_of_range(tmp_path, bad):
    mr, hr = pair(tmp_path)
    with pytest.raises(ValueError, match="--" + next(iter(bad)).replace("_", "-")):
        pack_files(mr, hr, tmp_path / "store", **bad)


def test_an_output_that_exists(tmp_path):
    mr, hr = pair(tmp_path)
    store = tmp_path / "store"
    store.mkdir()
    (store / "meta.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="store: exists and is not a store; choose"):
            pack_files(mr, hr, store, overwrite=overwrite)
    shutil.rmtree(store)
    pack_files(mr, hr, store, chip=32, val=0)
    with pytest.raises(FileExistsError, match="store: a store is there; add --overwrite"):
        pack_files(mr, hr, store, chip=16, val=0)
    assert len(data.Store(store)) == 4
    (store / "notes.txt").write_text("mine")
    message = "store: --overwrite would delete notes.txt, which is no part of the store; move it"
    with pytest.raises(FileExistsError, match=message):
        pack_files(mr, hr, store, chip=16, val=0, overwrite=True)
    (store / "notes.txt").unlink()
    pack_files(mr, hr, store, chip=16, val=0, overwrite=True)
    assert len(data.Store(store)) == 16
    assert {path.name for path in store.iterdir()} == pack.FILES - {
        "flags.csv",
        "check.csv",
        "check.png",
    }
    assert sorted(os.listdir(tmp_path)) == ["hr", "mr", "store"]


def test_command_line(tmp_path, monkeypatch, capsys):
    mr, hr = pair(tmp_path, bands=3)
    out = tmp_path / "out" / "store"
    flags = ["--mr", mr, "--hr", hr, "--chip", "16", "--split-block", "1", "--val", "0.25"]
    order = ["--mr-bands", "2,1,0", "--hr-bands", "2,1,0", "--band-names", "B, G,R"]
    monkeypatch.setattr(sys, "argv", ["data.py", "pack", str(out), *flags, *order])
    data.main()
    printed = capsys.readouterr().out
    assert f"{out}: 16 pairs kept (12 train, 4 val, 0 test); skipped: none" in printed
    assert "mr: chips 3 x 16 x 16 uint16, gsd 10" in printed
    meta = data.Store(out).meta
    assert meta["bands"] == {"mr": ["B", "G", "R"], "hr": ["B", "G", "R"]}
    assert meta["provenance"]["command"].startswith("data.py pack")
    with pytest.raises(SystemExit) as exit_:
        data.main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error == [f"data.py: {out}: a store is there; add --overwrite to replace it"]


def test_interrupted(tmp_path, monkeypatch, capsys):
    mr, hr = pair(tmp_path)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pack, "cut", stop)
    monkeypatch.setattr(sys, "argv", ["data.py", "pack", "--mr", mr, "--hr", hr, mr + "/../store"])
    with pytest.raises(SystemExit) as exit_:
        data.main()
    assert exit_.value.code == 130
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1] == "data.py: interrupted; the same command continues"
    assert sorted(os.listdir(tmp_path)) == ["hr", "mr"]
