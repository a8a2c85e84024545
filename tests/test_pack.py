"""imagery/pack.py: packing keeps the ground, splits share none; every message."""

import csv
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pair_layouts
import pytest
import tifffile
from conftest import refused
from landscape import (
    EAST,
    NORTH,
    RNG,
    image,
    landscape,
    pack_files,
    pair,
    rows_of,
    shift_between,
    write_scene,
)
from stores import crop_pairs, pixels

import data
import figures
from datasets import common, sen2naip
from datasets.folder import read_geotiff
from imagery import check, chips, pack, raster, shards

SHARED = Path(os.environ.get("CROSSSCALE_SHARED", Path(__file__).parents[2] / "shared")) / "data"


ROOT, TESTS = map(str, (Path(__file__).parents[1], Path(__file__).parent))
draw_contact = shards.draw_contact


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """A contact sheet costs more than all the rest of a small store."""
    monkeypatch.setattr(shards, "draw_contact", lambda store, *_: (store / "contact.png").touch())


def content(store):
    """The files of a store by name, without the date of packing and the command."""
    files = {path.name: path.read_bytes() for path in sorted(store.iterdir())}
    meta = json.loads(files.pop("meta.json"))
    del meta["provenance"], meta["digest"]
    return files | {"meta": meta}


def patches(count=6, chips=2, ratio=2, bands=3, site=None, split=None, hr=True, name="u{}"):
    """Units of `chips` pairs without georeference, whole images of 16 MR pixels; each its own."""
    rng = np.random.default_rng(3)

    def unit(n):
        pairs = []
        for k in range(chips):
            arrays = [
                rng.integers(1, 999, (bands, side, side), dtype="uint16")
                for side in (16, 16 * ratio)
            ]
            mr = image(f"{n}.pt#{k}", arrays[0], date="2020-01-02")
            hrs = [image(f"{n}_hr.pt#{k}", arrays[1], date="2020-01-05")] if hr else []
            pairs.append(common.Pair(mr, hrs, split and split(n), site and site(n)))
        return common.Unit(name.format(n), lambda: iter(pairs))

    names = ["R", "G", "B", "NIR", "S1", "S2"][:bands]
    return common.Listing(
        [unit(n) for n in range(count)], {"mr": names, "hr": names if hr else []}, 16
    )


def test_chips_are_the_pixels_of_the_files(tmp_path):
    mr, hr = pair(tmp_path, 3.0, (0, 0), (-4.0, 7.0), side=100, hr_side=340)
    pack_files(mr, hr, tmp_path / "store", chip=32, val=0)
    store = data.Store(tmp_path / "store")
    mr_scene, hr_scene = raster.read(mr + "/a.tif"), raster.read(hr + "/a.tif")
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
    array = raster.read(mr + "/a.tif").astype("float32")
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
    array = raster.read(mr + "/a.tif")
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
    scene = raster.read(mr + "/a.tif")
    batch = store.batch([0])
    assert np.array_equal(batch["mr"][0], scene[[2, 0], :32, :32])
    assert np.array_equal(batch["hr"][0], raster.read(hr + "/a.tif")[[2, 0], :64, :64])
    meta = pack_files(mr, hr, tmp_path / "other", chip=32, val=0, band_names=["x", "y", "z"])
    assert meta["bands"] == {"mr": ["x", "y", "z"], "hr": ["x", "y", "z"]}


def test_reading_in_small_blocks_changes_nothing(tmp_path, monkeypatch):
    mr, hr = pair(tmp_path, 3.0, (0, 0), (-4.0, 7.0), side=100, hr_side=340)
    options = {"chip": 16, "stride": 10, "split_block": 2, "val": 0.2}
    pack_files(mr, hr, tmp_path / "one", **options)
    monkeypatch.setattr(chips, "BLOCK_BYTES", 1000)
    pack_files(mr, hr, tmp_path / "two", **options)
    for name in ("index.csv", "skipped.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for sensor in ("mr", "hr"):
        assert np.array_equal(pixels(tmp_path / "one", sensor), pixels(tmp_path / "two", sensor))


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
    array = raster.read(hr + "/a.tif")
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
    hr, small = pixels(tmp_path / "store", "hr"), raster.read(tmp_path / "hr/a.tif")
    assert hr.shape == (2, 2, 65, 65)
    assert np.array_equal(hr[0][:, :64, :64], small)
    assert np.array_equal(hr[0][:, 64, :64], small[:, 63])


def test_without_georeference_files_pair_by_name_and_are_blocks(tmp_path, capsys):
    for name in "abcd":
        for sensor, side in (("mr", 60), ("hr", 200)):
            (tmp_path / sensor).mkdir(exist_ok=True)
            array = RNG.integers(0, 999, (3, side, side), dtype="uint16")
            raster.write(tmp_path / sensor / f"{name}.tif", array)
    raster.write(tmp_path / "mr" / "lonely.tif", np.zeros((3, 60, 60), "uint16"))
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
    assert lonely["reason"] == "no HR file of its name"
    assert "4 pairs by name, ground unknown" in capsys.readouterr().out
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
    a, _, c, _, e, f = raster.info(row["mr_source"]).transform
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
    scenes = {name: raster.read(tmp_path / "mr" / name) for name in ("a.tif", "b.tif")}
    for chip, row in zip(
        pixels(tmp_path / "store", "mr"), rows, strict=True
    ):  # still each its own after chips were dropped
        r, c = int(row["row"]), int(row["col"])
        scene = scenes[Path(row["mr_source"]).name]
        assert np.array_equal(chip, scene[:, r : r + 16, c : c + 16])


@pytest.mark.parametrize("sizes", [[1, 1], [64, 2], [5] * 6, [1] * 200, [0, 3, 3, 0], [9, 1, 1]])
@pytest.mark.parametrize("seed", range(3))
def test_blocks_are_dealt_near_their_share_and_no_split_is_empty(sizes, seed):
    sizes = np.array(sizes)
    split = shards.assign_splits(sizes, {"val": 0.1, "test": 0.0}, seed)
    share = sizes[split == "val"].sum() / sizes.sum()
    assert sizes[split == "train"].sum() > 0 and share > 0
    assert "test" not in split
    fine = 0.1 + sizes[sizes > 0].min() / sizes.sum()
    assert share <= fine
    if (sizes > 0).sum() > 2:
        assert set(shards.assign_splits(sizes, {"val": 0.1, "test": 0.1}, seed)) == {
            "train", "val", "test"
        }  # fmt: skip


def test_one_block_says_why_there_is_no_val(tmp_path, capsys):
    mr, hr = pair(tmp_path)
    meta = pack_files(mr, hr, tmp_path / "store", chip=16)
    assert meta["splits"] == {"train": 16}
    out = capsys.readouterr().out
    assert "val is empty" in out
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
    whole = np.array([[0.0, 0.0, 1.0, 1.0]] * len(store.split("train")))
    a, b = crop_pairs(store, store.split("train"), whole, 64, 64)
    alike = [np.corrcoef(a[:, k].flatten(), b[:, k].flatten())[0, 1] for k in range(3)]
    off = [np.corrcoef(a[:, k, 8:].flatten(), b[:, k, :-8].flatten())[0, 1] for k in range(3)]
    assert min(alike) > 0.5 and min(np.subtract(alike, off)) > 0.1
    with refused(ValueError, "landsat8_byte.tif", "3 bands", "13"):
        pack_files(
            folder / "mr", folder / "hr_ngi_5m_rgb", tmp_path / "b", band_names=["x", "y", "z"]
        )


def test_north_dakota_with_a_simulated_mr(tmp_path):
    path = SHARED / "opengeos_naip_5m" / "naip_m_4709963_se_14_1_20170827.tif"
    if not path.exists():
        pytest.skip(f"no imagery at {path}; set CROSSSCALE_SHARED")
    about, array = raster.info(path), raster.read(path)
    a, b, c, d, e, f = about.transform
    mean = array.reshape(4, about.height // 2, 2, about.width // 2, 2).mean((2, 4))
    coarse = tmp_path / path.name
    raster.write(coarse, mean.round().astype("uint8"), (2 * a, b, c, d, 2 * e, f), about.crs)
    order = {"mr_bands": ["2", "1", "0", "3"], "hr_bands": ["2", "1", "0", "3"]}
    names = {"band_names": ["B", "G", "R", "NIR"]}
    meta = pack_files(coarse, path.parent, tmp_path / "store", split_block=2, **order, **names)
    assert meta["shape"] == {"mr": (4, 64, 64), "hr": (4, 129, 129)}  # other dates are offset
    store = data.Store(tmp_path / "store")
    same = [r for r in rows_of(tmp_path / "store") if Path(r["hr_source"]).name == path.name]
    assert len(same) == len(store) == 35
    mr, hr = (x.numpy() for x in crop_pairs(store, np.arange(35), [[0, 0, 1, 1]] * 35, 64, 64))
    shifts = [shift_between(m[3], h[3]) for m, h in zip(mr, hr, strict=True)]
    assert np.abs(shifts).max() < 0.05


# bad input


def test_files_that_cannot_be_read(tmp_path):
    mr, hr = pair(tmp_path)
    (tmp_path / "hr/a.tif").write_bytes(b"not an image")
    with refused(ValueError, "hr/a.tif"):
        pack_files(mr, hr, tmp_path / "store")
    mr, hr = pair(tmp_path)
    content = (tmp_path / "hr/a.tif").read_bytes()
    (tmp_path / "hr/a.tif").write_bytes(content[:-100])
    with refused(pack.NoChip, "hr/a.tif"):
        pack_files(mr, hr, tmp_path / "store")
    (tmp_path / "empty").mkdir()
    with refused(FileNotFoundError, "--hr", tmp_path / "empty"):
        pack_files(mr, tmp_path / "empty", tmp_path / "store")
    with refused(FileNotFoundError, "--mr", tmp_path / "none*"):
        pack_files(tmp_path / "none*", hr, tmp_path / "store")


def test_damage_found_late_leaves_nothing_behind(tmp_path):
    mr, hr = pair(tmp_path)
    content = bytearray((tmp_path / "hr/a.tif").read_bytes())
    content[-400:-300] = b"\xff" * 100
    (tmp_path / "hr/a.tif").write_bytes(content)
    with refused(pack.NoChip, "hr/a.tif"):
        pack_files(mr, hr, tmp_path / "store")
    assert sorted(os.listdir(tmp_path)) == ["hr", "mr"]


def test_damaged_files_among_many_are_left_out_and_told(tmp_path, capsys):
    for k in range(4):
        write_scene(tmp_path / "mr" / f"{k}.tif", 10.0, (9000 * k, 0), 64, 64)
        write_scene(tmp_path / "hr" / f"{k}.tif", 5.0, (9000 * k, 0), 128, 128)
    whole = pack_files(tmp_path / "mr", tmp_path / "hr", tmp_path / "whole", chip=32, val=0)
    content = bytearray((tmp_path / "hr/2.tif").read_bytes())
    content[-400:-300] = b"\xff" * 100
    (tmp_path / "hr/2.tif").write_bytes(content)
    capsys.readouterr()
    meta = pack_files(tmp_path / "mr", tmp_path / "hr", tmp_path / "store", chip=32, val=0)
    assert (whole["count"]["mr"], meta["count"]["mr"]) == (16, 12)
    said = capsys.readouterr().out
    assert "1 cannot be read" in said and re.search(r"warning: .*hr/2\.tif", said)
    (row,) = rows_of(tmp_path / "store", "skipped")
    assert row["mr_source"].endswith("mr/2.tif") and row["reason"] == "cannot be read"
    assert {Path(row["mr_source"]).stem for row in rows_of(tmp_path / "store")} == {"0", "1", "3"}


def test_a_published_set_with_damaged_headers(tmp_path, capsys):
    pair_layouts.sen2naip(tmp_path)
    first, second = sorted(tmp_path.rglob("lr.tif"))
    listing = sen2naip.read(tmp_path)
    second.write_bytes(b"II*\0gone")
    meta = pack.pack(listing, tmp_path / "store", val=0)
    assert meta["count"]["mr"] == 1
    assert re.search(rf"warning: .*{second}", capsys.readouterr().out)
    first.write_bytes(b"II*\0gone")
    with refused(ValueError, "lr.tif"):
        pack.pack(listing, tmp_path / "none", val=0)


def test_bands_that_do_not_fit(tmp_path):
    mr, hr = pair(tmp_path, bands=4)
    write_scene(tmp_path / "hr/b.tif", 5.0, (0, 0), 128, 128, bands=3)
    names = ["B", "G", "R", "NIR"]
    with refused(ValueError, "hr/b.tif", "4 bands", "B,G,R,NIR", "found 3", "--hr-bands"):
        pack_files(mr, hr, tmp_path / "store", band_names=names)
    with refused(ValueError, "hr/b.tif", "--hr-bands 3,2,1,0", "3 bands"):
        pack_files(mr, hr, tmp_path / "store", hr_bands=["3", "2", "1", "0"])
    with refused(ValueError, "mr/a.tif", "--mr-bands B8", "4"):
        pack_files(mr, hr, tmp_path / "store", mr_bands=["B8"])


BGR, RGB = ("B", "G", "R"), ("r", "g", "b")


def test_bands_of_one_name_in_another_order(tmp_path):
    mr, hr = pair(tmp_path, bands=3, band_names=BGR)
    write_scene(tmp_path / "hr/a.tif", 5.0, (0, 0), 128, 128, bands=3, band_names=RGB)
    options = {"chip": 32, "val": 0}
    with refused(ValueError, "mr/a.tif", "B,G,R", "--band-names", "--mr-bands R,G,B"):
        pack_files(mr, hr, tmp_path / "store", band_names=["R", "G", "B"], **options)
    scene = raster.read(hr + "/a.tif", (0, 0, 64, 64))
    for k, more in enumerate(({}, {"band_names": [*"xyz"]}, {"hr_bands": [*"BGR"]})):
        pack_files(mr, hr, tmp_path / f"{k}", **more, **options)
        assert np.array_equal(pixels(tmp_path / f"{k}", "hr")[0], scene[::-1])


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
    with refused(ValueError, "mr/c.tif", "r,g,b", "mr/b.tif", "--mr-bands B,G,R"):
        pack_files(mr, hr, tmp_path / "other", chip=32, val=0)


def test_a_band_name_twice(tmp_path):
    with refused(ValueError, "--band-names B,G,b"):
        pack_files(*pair(tmp_path, bands=3), tmp_path / "store", band_names=["B", "G", "b"])
    with refused(ValueError, "--hr-band-names", "x,y,X", "twice"):
        pack_files(*pair(tmp_path, bands=3), tmp_path / "store", hr_band_names=["x", "y", "X"])


@pytest.mark.parametrize("name, dtype, mentions", [
    ("a", "complex64", ["complex64"]), ("b", "uint8", ["uint8", "uint16", "apart"]),
])  # fmt: skip
def test_pixels_of_another_type(tmp_path, name, dtype, mentions):
    mr, hr = pair(tmp_path)
    array, path = np.zeros((2, 64, 64), dtype), tmp_path / f"mr/{name}.tif"
    if dtype == "complex64":
        tifffile.imwrite(path, array, planarconfig="separate", metadata=None)
    else:
        about = raster.info(mr + "/a.tif")
        raster.write(path, array, about.transform, about.crs)
    with refused(ValueError, f"mr/{name}.tif", *mentions):
        pack_files(mr, hr, tmp_path / "store")


def test_pairs_that_are_none(tmp_path):
    mr, hr = pair(tmp_path, hr_shift=(5000, 0))
    with refused(ValueError, "hr/a.tif", "mr/a.tif", "in EPSG:32631, 4.4 km away"):
        pack_files(mr, hr, tmp_path / "store")
    write_scene(tmp_path / "hr/a.tif", 5.0, (0, 0), 128, 128, crs=32632)
    with refused(ValueError, "hr/a.tif", "EPSG:32632", "mr/a.tif", "EPSG:32631"):
        pack_files(mr, hr, tmp_path / "store")
    raster.write(tmp_path / "hr/a.tif", np.zeros((2, 128, 128), "uint16"))
    with refused(ValueError, "hr/a.tif", "mr/a.tif", "georeference"):
        pack_files(mr, hr, tmp_path / "store")
    (tmp_path / "mr/a.tif").unlink()
    raster.write(tmp_path / "mr/b.tif", np.zeros((2, 64, 64), "uint16"))
    with refused(ValueError, "mr/b.tif", "hr/a.tif"):
        pack_files(mr, hr, tmp_path / "store")
    (tmp_path / "mr/b.tif").rename(tmp_path / "mr/a.tif")
    for name in ("one", "other"):
        (tmp_path / "hr" / name).mkdir()
        shutil.copy(tmp_path / "hr/a.tif", tmp_path / "hr" / name / "a.tif")
    (tmp_path / "hr/a.tif").unlink()
    with refused(ValueError, "mr/a.tif", "several files have its name", "the same subfolder"):
        pack_files(mr, hr, tmp_path / "store")


def test_grids_that_do_not_fit(tmp_path):
    mr, hr = pair(tmp_path)
    with refused(ValueError, "mr/a.tif", "HR", "0.5"):
        pack_files(hr, mr, tmp_path / "store")
    pair(tmp_path)
    write_scene(tmp_path / "mr/b.tif", 30.0, (0, 0), 30, 30)
    with refused(ValueError, "mr/b.tif", "6 HR", "2 to"):
        pack_files(mr, hr, tmp_path / "store")


def test_hr_on_other_axes_is_warped(tmp_path, capsys):
    mr, hr = map(Path, pair(tmp_path))
    turned = (4.0, 3.0, EAST - 730, 3.0, -4.0, NORTH - 170)
    raster.write(hr / "a.tif", np.full((2, 300, 300), 7, "uint16"), turned, 32631)
    meta = pack_files(mr, hr, tmp_path / "store", val=0)
    assert "warped to MR's axes (cubic)" in capsys.readouterr().out
    assert meta["count"] == {"mr": 1, "hr": 1} and meta["shape"]["hr"] == (2, 128, 128)
    assert meta["mean"]["hr"] == [7, 7] and meta["pixel_ratio"] == [2, 2]


def smooth_ground(crs, place, height, width):
    """A field over longitude and latitude, imaged in some CRS: (1, height, width) uint16."""
    a, _, c, _, e, f = place
    col, row = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    lon, lat = raster.project(crs, "EPSG:4326", (a * col + c).ravel(), (e * row + f).ravel())
    field = np.zeros(lon.shape)
    rng = np.random.default_rng(0)
    for _ in range(60):
        u, v, phase = *rng.normal(0, 5e3, 2), rng.uniform(0, 7)
        field += np.cos(u * (lon - 3) + v * (lat - 44) + phase)
    return (5000 + 100 * field).reshape(1, height, width).astype(np.uint16)


@pytest.mark.parametrize("crs", ["EPSG:32631", "EPSG:32630", "EPSG:2154", "EPSG:4326"])
def test_warped_hr_shows_the_same_ground(tmp_path, crs):
    """`check` finds HR of any projection within 0.05 MR pixels of MR."""
    place = (10.0, 0.0, 450000.0, 0.0, -10.0, 4900000.0)
    (x,), (y,) = raster.project("EPSG:32631", crs, [450640], [4899360])
    step = 5 / 111320 if crs == "EPSG:4326" else 5.0
    here = (step, 0.0, x - 240 * step, 0.0, -step, y + 240 * step)
    for sensor, to, at, side in (("mr", "EPSG:32631", place, 128), ("hr", crs, here, 480)):
        (tmp_path / sensor).mkdir()
        raster.write(tmp_path / sensor / "a.tif", smooth_ground(to, at, side, side), at, to)
    store = tmp_path / "store"
    meta = pack_files(tmp_path / "mr", tmp_path / "hr", store, chip=32, val=0)
    assert meta["count"]["hr"] >= 9
    found = check.check(store)
    assert np.abs(found["shift"]).max() < 0.05
    assert found["correlation"].min() > 0.99
    with (store / "index.csv").open() as lines:
        assert {row["crs"] for row in csv.DictReader(lines)} == {"EPSG:32631"}


def test_chips_across_sheets_take_all_of_them(tmp_path):
    mr, hr = map(Path, pair(tmp_path))
    whole = raster.read(hr / "a.tif")
    about = raster.info(hr / "a.tif")
    pack_files(mr, hr, tmp_path / "one", chip=16, val=0)
    a, b, c, d, e, f = about.transform
    for row, rows in ((0, slice(50)), (50, slice(50, None))):
        for col, cols in ((0, slice(70)), (70, slice(70, None))):
            at = (a, b, c + a * col, d, e, f + e * row)
            path, names = hr / f"s_{row}_{col}.tif", about.band_names
            raster.write(path, whole[:, rows, cols], at, about.crs, band_names=names)
    (hr / "a.tif").unlink()
    pack_files(mr, hr, tmp_path / "four", chip=16, val=0)
    one, four = (pixels(tmp_path / name, "hr") for name in ("one", "four"))
    assert len(one) == len(four) == 16 and (one == four).all()
    with (tmp_path / "four/index.csv").open() as lines:
        sources = [row["hr_source"] for row in csv.DictReader(lines)]
    assert sorted({text.count(".tif") for text in sources}) == [1, 2, 4]


def test_a_rim_of_half_an_mr_pixel_is_repeated(tmp_path, capsys):
    mr, hr = map(Path, pair(tmp_path))
    about, whole = raster.info(hr / "a.tif"), raster.read(hr / "a.tif")
    for cut, count in ((1, 16), (2, 9)):
        raster.write(hr / "a.tif", whole[:, :-cut, :-cut], about.transform, about.crs)
        pack_files(mr, hr, tmp_path / f"store{cut}", chip=16, val=0)
        assert len(data.Store(tmp_path / f"store{cut}")) == count
        # the chips of the last row and column, until they are left out
        assert ("7 pairs: HR ends less than" in capsys.readouterr().out) == (cut == 1)
    last = pixels(tmp_path / "store1", "hr")[15]
    assert (last[:, -1] == last[:, -2]).all() and (last[:, :, -1] == last[:, :, -2]).all()
    assert (last[:, :-1, :-1] == whole[:, -32:-1, -32:-1]).all()


def test_two_zones_share_one_split_for_one_ground(tmp_path):
    place = (10.0, 0.0, 450000.0, 0.0, -10.0, 4900000.0)
    (x,), (y,) = raster.project("EPSG:32631", "EPSG:32630", [452560], [4897440])
    there = (10.0, 0.0, x - 2560, 0.0, -10.0, y + 2560)
    for name, crs, at in (("a", "EPSG:32631", place), ("b", "EPSG:32630", there)):
        (tmp_path / "mr").mkdir(exist_ok=True)
        raster.write(tmp_path / f"mr/{name}.tif", smooth_ground(crs, at, 512, 512), at, crs)
    pack_files(tmp_path / "mr", None, tmp_path / "store", chip=32, split_block=4, val=0.3)
    with (tmp_path / "store/index.csv").open() as lines:
        rows = [*csv.DictReader(lines)]
    centre = []
    for row in rows:
        a, _, c, _, e, f = (float(row[key]) for key in "abcdef")
        middle = [c + 16 * a], [f + 16 * e]
        centre.append(np.ravel(raster.project(row["crs"], "EPSG:32631", *middle)))
    centre, val = np.array(centre), np.array([row["split"] == "val" for row in rows])
    zone = np.array([row["crs"] == "EPSG:32630" for row in rows])
    assert 0 < val[zone].mean() < 1 and 0 < val[~zone].mean() < 1
    near = np.abs(centre[val][:, None] - centre[~val]).max(2)
    assert near.min() > 250  # chips of 320 m, some turned by 4 degrees


def test_rotated_grids_that_agree_are_fine(tmp_path):
    for sensor, scale in (("mr", 2.0), ("hr", 1.0)):
        (tmp_path / sensor).mkdir()
        turned = (4.0 * scale, 3.0 * scale, EAST, 3.0 * scale, -4.0 * scale, NORTH)
        array = np.zeros((1, int(128 / scale), int(128 / scale)), "uint16")
        raster.write(tmp_path / sensor / "a.tif", array, turned, 32631)
    meta = pack_files(tmp_path / "mr", tmp_path / "hr", tmp_path / "store", chip=32, val=0)
    assert meta["count"]["hr"] == 4 and np.allclose(meta["pixel_ratio"], 2)
    assert meta["std"]["mr"] == [1.0]  # a flat band does not divide by 0


def test_no_chip(tmp_path):
    mr, hr = pair(tmp_path, hr_side=32)
    with refused(ValueError, "--chip 64"):
        pack_files(mr, hr, tmp_path / "store")
    mr, hr = pair(tmp_path)
    array = np.zeros((2, 64, 64), "uint16")
    write_scene(tmp_path / "mr/a.tif", 10.0, (0, 0), 64, 64, array=array, nodata=0)
    with refused(pack.NoChip, "4 MR", "nodata"):
        pack_files(mr, hr, tmp_path / "store", chip=32)
    array[:, ::2] = 1
    write_scene(tmp_path / "mr/a.tif", 10.0, (0, 0), 64, 64, array=array, nodata=0)
    with refused(pack.NoChip, "4 MR", "--min-valid 1.0", "--chip 32"):
        pack_files(mr, hr, tmp_path / "store", chip=32)
    assert not (tmp_path / "store").exists()
    pack_files(mr, hr, tmp_path / "store", chip=32, val=0, min_valid=0.5)  # as the error said


@pytest.mark.parametrize(
    "bad",
    [
        {"chip": 0},
        {"stride": 0},
        {"stride": 10**30},
        {"offset": float("nan")},
        {"offset": float("-inf")},
        {"offset": -70000},
        {"split_block": 0},
        {"seed": -1},
        {"min_valid": 0},
        {"val": 0.6, "test": 0.4},
        {"val": -1},
    ],
)
def test_flags_out_of_range(tmp_path, bad):
    mr, hr = pair(tmp_path)
    with refused(ValueError, "--" + next(iter(bad)).replace("_", "-")):
        pack_files(mr, hr, tmp_path / "store", **bad)


def test_an_output_that_exists(tmp_path):
    mr, hr = pair(tmp_path)
    store = tmp_path / "store"
    store.mkdir()
    (store / "meta.json").write_text("{}")
    for overwrite in (False, True):
        with refused(FileExistsError, f"{store}: "):
            pack_files(mr, hr, store, overwrite=overwrite)
    shutil.rmtree(store)
    pack_files(mr, hr, store, chip=32, val=0)
    with refused(FileExistsError, f"{store}: ", "--overwrite"):
        pack_files(mr, hr, store, chip=16, val=0)
    assert len(data.Store(store)) == 4
    (store / "notes.txt").write_text("mine")
    with refused(FileExistsError, f"{store}: ", "--overwrite", "notes.txt"):
        pack_files(mr, hr, store, chip=16, val=0, overwrite=True)
    (store / "notes.txt").unlink()
    pack_files(mr, hr, store, chip=16, val=0, overwrite=True)
    assert len(data.Store(store)) == 16
    files = {"0000000-00000.safetensors", "index.csv", "meta.json", "skipped.csv", "contact.png"}
    assert {path.name for path in store.iterdir()} == files
    assert sorted(os.listdir(tmp_path)) == ["hr", "mr", "store"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_comes_to_the_output_meanwhile_stays(tmp_path, monkeypatch, capsys, overwrite):
    out = tmp_path / "store"
    pack.pack(patches(), tmp_path / "whole", val=0)

    def meanwhile(store, *_):
        (store / "contact.png").touch()
        out.mkdir()
        (out / "thesis.txt").write_text("precious")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "draw_contact", meanwhile)
        with refused(FileExistsError, f"{out}: "):
            pack.pack(patches(), out, val=0, overwrite=overwrite)
    assert (out / "thesis.txt").read_text() == "precious"
    shutil.rmtree(out)
    monkeypatch.setattr(pack, "cut", None)  # nothing is packed again
    pack.pack(patches(), out, val=0)
    assert content(out) == content(tmp_path / "whole")


def test_a_store_that_comes_to_the_output_meanwhile_stays(tmp_path, monkeypatch):
    pack.pack(patches(hr=False), tmp_path / "other", val=0)
    other = content(tmp_path / "other")

    def meanwhile(store, *_):
        (store / "contact.png").touch()
        (tmp_path / "other").rename(tmp_path / "store")

    monkeypatch.setattr(shards, "draw_contact", meanwhile)
    with refused(FileExistsError, f"{tmp_path / 'store'}: ", "--overwrite"):
        pack.pack(patches(), tmp_path / "store", val=0)
    assert content(tmp_path / "store") == other


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
@pytest.mark.parametrize("there", [False, True])
def test_an_output_that_is_a_link(tmp_path, there):
    """The store is made where the link leads to, and the link stays."""
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "store", target_is_directory=True)
    if there:
        pack.pack(patches(3), tmp_path / "disk" / "store", val=0)
    pack.pack(patches(), tmp_path / "link", val=0, overwrite=there)
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "disk") == ["store"]
    assert len(data.Store(tmp_path / "link")) == 12 and len(os.listdir(tmp_path)) == 2


def test_flags_of_a_store_that_is_replaced_are_told(tmp_path, capsys):
    pack.pack(patches(), tmp_path / "store")
    assert "data.py check" not in capsys.readouterr().out
    (tmp_path / "store" / "flags.csv").write_text("chip,reason\n1,shift\n")
    pack.pack(patches(), tmp_path / "store", overwrite=True)
    assert f"python data.py check {tmp_path / 'store'} " in capsys.readouterr().out


def test_a_full_disk_and_a_failing_one_name_a_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "ground_keys", full)
        with refused(OSError, "No space left", "store.packing"):
            pack.pack(patches(), tmp_path / "store")
    shutil.rmtree(tmp_path / "store.packing")
    listing = patches()
    for when in (0, 1):  # of the survey, of the pass that cuts
        count = iter(range(9))

        def opened(count=count, when=when):
            return full() if next(count) == when else listing.units[0].open()

        units = [common.Unit("far.tif", opened), *listing.units]
        with refused(OSError, "No space left", "far.tif"):
            pack.pack(listing._replace(units=units), tmp_path / "store")
    image = next(listing.units[0].open()).mr._replace(read=full)
    units = [common.Unit("far.tif", lambda: iter([common.Pair(image, [])]))]
    with refused(OSError, "No space left", "far.tif"):
        pack.pack(listing._replace(units=units, bands={"mr": "RGB", "hr": []}), tmp_path / "store")


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
    with refused(SystemExit, f"data.py: {out}: ", "--overwrite"):
        data.main()


def set_argv(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["data.py", "pack", *map(str, words)])


@pytest.mark.parametrize(
    "words, mentions",
    [
        (["a", "b", "c"], ["a b c", "ROOT", "OUT", "--mr"]),
        (["a", "--hr", "b"], ["a: ", "ROOT", "OUT"]),
        (["a", "b", "--mr", "c"], ["a b: ", "ROOT", "OUT"]),
        (["a", "b", "--format", "sen2naip", "--product", "20m"], ["--product", "sen2naip"]),
        (["a", "b", "--mr-dataset", "x"], ["--mr-dataset", "geotiff"]),
    ],
)
def test_flags_that_do_not_fit(monkeypatch, words, mentions):
    set_argv(monkeypatch, *words)
    with refused(SystemExit, "data.py: ", *mentions):
        data.main()


def test_where_images_are_from_goes_into_the_store(tmp_path, monkeypatch):
    pair(tmp_path)
    origin = ["--source-name", "Mine", "--licence", "CC0", "--url", "x.org"]
    set_argv(monkeypatch, tmp_path, tmp_path / "store", "--chip", 32, "--val", 0, *origin)
    data.main()  # a ROOT with mr/ and hr/
    source = {"name": "Mine", "licence": "CC0", "attribution": "", "url": "x.org"}
    assert data.Store(tmp_path / "store").meta["sources"] == [source]


def test_what_a_listing_says_of_itself_goes_into_the_store(tmp_path):
    sources = [{"name": "S", "licence": "CC0", "attribution": "A", "url": "u"}]
    listing = patches()._replace(sources=sources, skipped=[("x/y.pt", "no HR of its date")])
    meta = pack.pack(listing, tmp_path / "store", val=0)
    assert meta["sources"] == sources and meta["count"] == {"mr": 12, "hr": 12}
    assert meta["shape"] == {"mr": (3, 16, 16), "hr": (3, 32, 32)}  # whole images
    row = rows_of(tmp_path / "store")[3]
    assert (row["mr_source"], row["mr_date"], row["hr_date"]) == (
        "1.pt#1", "2020-01-02", "2020-01-05"
    )  # fmt: skip
    (skipped,) = rows_of(tmp_path / "store", "skipped")
    assert (skipped["mr_source"], skipped["reason"]) == ("x/y.pt", "no HR of its date")
    with refused(ValueError, "nothing to pack", "1 no HR of its date"):
        pack.pack(listing._replace(units=[]), tmp_path / "none")


# resuming


def break_at(monkeypatch, calls, error=KeyboardInterrupt):
    """Raise where the block of that number would be cut."""
    cut, seen = pack.cut, iter(range(10**6))

    def stop(*work):
        if next(seen) == calls:
            raise error("stop")
        return cut(*work)

    monkeypatch.setattr(pack, "cut", stop)


@pytest.fixture
def small(monkeypatch):
    """A shard a block, and small blocks."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    monkeypatch.setattr(chips, "BLOCK_BYTES", 10000)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("calls", [5, 9])
def test_a_stopped_command_continues_to_the_same_store(
    tmp_path, monkeypatch, small, workers, calls
):
    listing = patches()
    pack.pack(listing, tmp_path / "whole", val=0.2, workers=2)
    with monkeypatch.context() as patch:
        break_at(patch, calls)
        with pytest.raises(KeyboardInterrupt):
            pack.pack(listing, tmp_path / "store", val=0.2, workers=workers)
    assert sorted(os.listdir(tmp_path)) == ["store.packing", "whole"]
    there = {p.name for p in (tmp_path / "store.packing").iterdir()} - {"lock"}
    assert there and there < {p.name for p in (tmp_path / "whole").iterdir()}
    pack.pack(listing, tmp_path / "store", val=0.2, workers=workers)
    assert content(tmp_path / "store") == content(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["store", "whole"]


PART = """
import os, sys
from datasets.folder import read_geotiff
from imagery import chips, pack, shards
shards.SHARD_BYTES, chips.BLOCK_BYTES = 30000, 20000
listing, part = read_geotiff('mr', 'hr'), sys.argv[2] if len(sys.argv) > 2 else None
pack.pack(listing, sys.argv[1], chip=16, stride=12, split_block=2, val=0.3, part=part, workers=2)
sys.stdout.flush()
os._exit(0)
"""


def start(tmp_path, *words):
    env = os.environ | {"PYTHONPATH": ROOT}
    words = [sys.executable, "-c", PART, *words]
    return subprocess.Popen(words, cwd=tmp_path, env=env, stdout=subprocess.PIPE)


def four_scenes(tmp_path, side=48):
    """In two zones; some chips touch two splits, and are at gaps that others fill."""
    for k in range(4):
        crs = 32631 + k // 2
        write_scene(tmp_path / f"mr/{k}.tif", 10.0, (k * 900, 0), side, side, crs=crs)
        write_scene(tmp_path / f"hr/{k}.tif", 5.0, (k * 900, 0), 2 * side, 2 * side, crs=crs)


@pytest.mark.slow  # seconds, but minutes on a machine that others use
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_process_killed_at_any_moment_continues_to_the_same_store(tmp_path, small):
    """By forks, which need no import; the later ones have the longer to live."""
    four_scenes(tmp_path)
    listing = read_geotiff(tmp_path / "mr", tmp_path / "hr")
    options = {"chip": 16, "stride": 12, "split_block": 2, "val": 0.3, "workers": 2}
    begun = time.monotonic()
    pack.pack(listing, tmp_path / "whole", **options)
    took, whole, rng = (
        time.monotonic() - begun,
        content(tmp_path / "whole"),
        np.random.default_rng(),
    )
    assert len(whole) > 10
    fork = multiprocessing.get_context("fork").Process
    kills = 0
    for _ in range(3):
        for k in range(1, 30):
            child = fork(target=pack.pack, args=(listing, tmp_path / "store"), kwargs=options)
            child.start()
            child.join(rng.uniform(0, took * k / 8))
            child.kill()
            child.join()
            kills += child.exitcode == -9
            if (tmp_path / "store").exists():  # maybe killed after its last rename
                break
        else:  # the machine was busier than at first
            pack.pack(listing, tmp_path / "store", **options)
        assert content(tmp_path / "store") == whole
        shutil.rmtree(tmp_path / "store")
    assert kills > 2


def test_parts_of_several_processes_are_the_same_store(tmp_path):
    four_scenes(tmp_path)
    at_once = [start(tmp_path, "store", f"{k}/3") for k in (3, 1, 2)]
    assert start(tmp_path, "whole").wait() == 0
    said = [process.communicate()[0].decode() for process in at_once]
    assert [process.returncode for process in at_once] == [0, 0, 0]
    assert sum("pairs kept" in text for text in said) == 1
    assert sorted(os.listdir(tmp_path)) == ["hr", "mr", "store", "whole"]
    for name in ("index.csv", "skipped.csv"):
        one, two = (list(data.read_csv(tmp_path / s / name)) for s in ("store", "whole"))
        for row in [*one, *two]:
            row |= dict.fromkeys(("shard", "place", "hr"))
        assert one == two
    for sensor in ("mr", "hr"):
        assert np.array_equal(
            pixels(tmp_path / "store", sensor), pixels(tmp_path / "whole", sensor)
        )
    one, two = (data.Store(tmp_path / name).meta for name in ("store", "whole"))
    assert all(one[key] == two[key] for key in ("mean", "std", "splits", "count"))


def test_parts_that_are_none_and_parts_that_wait(tmp_path, capsys):
    for bad in ("0/3", "4/3", "1/7", "2", "a/b", "-1/3"):
        with refused(ValueError, f"--part {bad}", "6 units"):
            pack.pack(patches(), tmp_path / "store", part=bad)
    assert pack.pack(patches(), tmp_path / "store", part="2/2") is None
    assert "part 2/2 is packed; others are not" in capsys.readouterr().out
    with refused(FileExistsError, "store.packing", "--part of 2, now 3"):
        pack.pack(patches(), tmp_path / "store", part="1/3")
    with refused(FileExistsError, "store.packing", "--part of 2, now 1"):
        pack.pack(patches(), tmp_path / "store")
    assert pack.pack(patches(), tmp_path / "store", part="1/2")["count"]["mr"] == 12
    assert len(data.Store(tmp_path / "store").meta["shards"]) == 2


@pytest.mark.parametrize("stage", ["write_tables", "write_meta", "draw_contact", "replace"])
def test_a_kill_while_the_store_is_completed(tmp_path, monkeypatch, stage):
    write_scene(tmp_path / "mr/a.tif", 10.0, (0, 0), 80, 80)
    write_scene(tmp_path / "hr/a.tif", 5.0, (0, 0), 160, 160)
    listing = read_geotiff(tmp_path / "mr", tmp_path / "hr")
    options = {"chip": 16, "stride": 9, "split_block": 2, "val": 0.3}
    pack.pack(listing, tmp_path / "whole", **options)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pack.shutil if stage == "replace" else shards, stage, stop, raising=False)
        if stage == "replace":
            real = os.replace
            to_out = lambda a, b: stop() if Path(b) == tmp_path / "store" else real(a, b)  # noqa: E731
            patch.setattr(os, "replace", to_out)
        with pytest.raises(KeyboardInterrupt):
            pack.pack(listing, tmp_path / "store", **options)
    pack.pack(listing, tmp_path / "store", **options)
    assert content(tmp_path / "store") == content(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["hr", "mr", "store", "whole"]
    reasons = [row["reason"] for row in rows_of(tmp_path / "store", "skipped")]
    assert reasons.count("touches two splits") == len(reasons) > 0


@pytest.mark.parametrize("overwrite", [False, True])
def test_one_pack_at_a_time_writes_a_store(tmp_path, overwrite):
    """The second neither joins in nor deletes what the first writes; a dead one holds no lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, "store"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([ROOT, TESTS])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout.readline().strip() == b"held"
        before = sorted(tmp_path.rglob("*"))
        with refused(FileExistsError, f"{tmp_path / 'store'}: ", "another"):
            pack.pack(patches(), tmp_path / "store", overwrite=overwrite)
        assert sorted(tmp_path.rglob("*")) == before
        other.kill()
    assert pack.pack(patches(), tmp_path / "store", overwrite=True)["count"]["mr"] == 12
    assert os.listdir(tmp_path) == ["store"]


HOLD = """
import sys, numpy, landscape
from datasets import common
from imagery import pack
pixels = numpy.ones((1, 16, 16), "uint8")
def opened():
    if opened.times == 1:  # after the survey
        print("held", flush=True)
        sys.stdin.read()
    opened.times += 1
    return iter([common.Pair(landscape.image("a", pixels), [])])
opened.times = 0
unit = common.Unit("a", opened)
pack.pack(common.Listing([unit], {"mr": ["x"], "hr": []}, 16), sys.argv[1])
"""


def test_a_drive_without_locks_is_told(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    pack.pack(patches(), tmp_path / "store")
    assert "[Errno 38]" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["store"]


def stopped(tmp_path, monkeypatch, **options):
    with monkeypatch.context() as patch:
        break_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            pack.pack(patches(), tmp_path / "store", **options)
    return tmp_path / "store.packing"


def test_another_command_does_not_continue(tmp_path, monkeypatch, small):
    stopped(tmp_path, monkeypatch, val=0)
    with refused(FileExistsError, "store.packing", "--val 0, now 0.1", "--overwrite"):
        pack.pack(patches(), tmp_path / "store")
    with refused(FileExistsError, "store.packing", "6 units", "now 5 units"):
        pack.pack(patches(5), tmp_path / "store", val=0)
    meta = pack.pack(patches(5), tmp_path / "store", val=0, overwrite=True)
    assert meta["count"]["mr"] == 10 and os.listdir(tmp_path) == ["store"]


@pytest.mark.parametrize(
    "more, was",
    [
        (["--hr", "{}/hr2"], "{}/hr"),
        (["--mr", "{}/mr2"], "{}/mr"),
        (["--hr-bands", "1,0"], "not given"),
        (["--nodata", "7"], "nan"),
    ],
)
def test_another_input_does_not_continue(tmp_path, monkeypatch, small, more, was):
    for k in range(3):
        write_scene(tmp_path / f"mr/{k}.tif", 10.0, (9000 * k, 0), 64, 64)
        write_scene(tmp_path / f"hr/{k}.tif", 5.0, (9000 * k, 0), 128, 128)
    for sensor in ("mr", "hr"):
        shutil.copytree(tmp_path / sensor, tmp_path / f"{sensor}2")
    monkeypatch.chdir(tmp_path)
    words = ["--mr", "mr", "--hr", "hr", "out", "--nodata", "nan", "--workers", "1"]
    with monkeypatch.context() as patch:
        break_at(patch, 2)
        set_argv(patch, *words)
        with pytest.raises(SystemExit):
            data.main()
        set_argv(patch, *words, *[word.format(tmp_path) for word in more])
        told = f"{more[0]} {was.format(tmp_path)}, now"
        with refused(SystemExit, "data.py: ", "out.packing", told):
            data.main()
    set_argv(monkeypatch, *words)
    data.main()
    assert len(data.Store("out")) == 3


@pytest.mark.parametrize("more", ["--level L1C", "--hr-product ps", "--per-site 2"])
def test_another_choice_from_a_published_set_does_not_continue(tmp_path, monkeypatch, small, more):
    pair_layouts.worldstrat(tmp_path / "root")
    words = ["--format", "worldstrat", tmp_path / "root", tmp_path / "out", "--chip", 32]
    words += ["--min-valid", 0.5, "--workers", 1]
    with monkeypatch.context() as patch:
        break_at(patch, 1)
        set_argv(patch, *words)
        with pytest.raises(SystemExit):
            data.main()
        set_argv(patch, *words, *more.split())
        with refused(SystemExit, "out.packing", *more.split(), "not given"):
            data.main()


def test_a_unit_with_another_key_does_not_continue(tmp_path, monkeypatch, small):
    """What decides the content of a unit is more than what it is called."""

    def listing(key):
        units = [unit._replace(key=key) for unit in patches().units]
        return patches()._replace(units=units)

    with monkeypatch.context() as patch:
        break_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            pack.pack(listing("a"), tmp_path / "store")
    with refused(FileExistsError, "store.packing", "now 6 units"):
        pack.pack(listing("b"), tmp_path / "store")
    assert pack.pack(listing("a"), tmp_path / "store")["count"]["mr"] == 12


def test_what_is_no_partial_store_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "store.packing").mkdir()
    (tmp_path / "store.packing" / "mine.txt").write_text("x")
    with refused(FileExistsError, f"{tmp_path / 'store.packing'}: "):
        pack.pack(patches(), tmp_path / "store", overwrite=True)
    assert os.listdir(tmp_path / "store.packing") == ["mine.txt"]


@pytest.mark.parametrize("change", [lambda c: c[:200], lambda c: b"", lambda c: c[:-1] + b"}}"])
def test_a_partial_store_that_was_damaged(tmp_path, monkeypatch, small, change):
    """As by a power cut: what cannot be read is packed again."""
    pack.pack(patches(), tmp_path / "whole", val=0)
    folder = stopped(tmp_path, monkeypatch, val=0)
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(change(path.read_bytes()))
    (folder / (path.name + ".partial")).write_bytes(b"half")
    pack.pack(patches(), tmp_path / "store", val=0)
    if change(b"xyz" * 99) != b"xyz" * 98 + b"xy}}":
        assert content(tmp_path / "store") == content(tmp_path / "whole")


def test_interrupted(tmp_path, monkeypatch, capsys):
    mr, hr = pair(tmp_path)
    set_argv(monkeypatch, "--mr", mr, "--hr", hr, tmp_path / "store")
    with monkeypatch.context() as patch:
        break_at(patch, 0)
        with pytest.raises(SystemExit) as exit_:
            data.main()
    assert exit_.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("data.py: interrupted")
    assert sorted(os.listdir(tmp_path)) == ["hr", "mr"]  # no unit was done


def test_an_error_late_says_that_work_is_kept(tmp_path, monkeypatch, capsys, small):
    break_at(monkeypatch, 7, ValueError)
    with pytest.raises(ValueError, match="stop"):
        pack.pack(patches(), tmp_path / "store", workers=1)
    assert "store.packing: 3 of 6 units" in capsys.readouterr().out


# memory


def test_no_read_is_larger_than_a_block(tmp_path, monkeypatch):
    """Neither rows of chips nor whole images: a scene may be larger than memory."""
    sizes = []
    arrays = {"mr": np.ones((2, 256, 512), "uint16"), "hr": np.ones((2, 512, 1024), "uint16")}

    def spy(array):
        source = image("x", array)

        def read(window, bands):
            sizes.append(array.itemsize * len(bands) * window[2] * window[3])
            return source.read(window, bands)

        return source._replace(read=read)

    pairs = [common.Pair(spy(arrays["mr"]), [spy(arrays["hr"])])]
    listing = common.Listing(
        [common.Unit("x", lambda: iter(pairs))], {s: ["a", "b"] for s in arrays}
    )
    monkeypatch.setattr(chips, "BLOCK_BYTES", 2**17)
    assert pack.pack(listing, tmp_path / "store", chip=32, val=0)["count"]["mr"] == 128
    assert max(sizes) <= 2**17 and len(sizes) > 20


def test_only_a_few_units_are_open_at_a_time(tmp_path, monkeypatch):
    listing, opened, done = patches(30), [], []
    units = [common.Unit(u.name, lambda u=u: opened.append(u) or u.open()) for u in listing.units]
    cut, most = pack.cut, []

    def watch(job, unit, block):
        most.append(len(opened) - len(units) - len(done))  # the survey opens all of them once
        done.append(unit) if unit not in done else None
        return cut(job, unit, block)

    monkeypatch.setattr(pack, "cut", watch)
    pack.pack(listing._replace(units=units), tmp_path / "store", val=0, workers=2)
    assert len(opened) == 60 and max(most) <= 2 + 2 * 2 + 1


# splits


def test_the_publishers_splits_are_kept(tmp_path):
    listing = patches(split=lambda n: ["train", "val", "test"][n % 3])
    meta = pack.pack(listing, tmp_path / "store", val=0.9)
    assert meta["splits"] == {"train": 4, "val": 4, "test": 4}
    for row in rows_of(tmp_path / "store"):
        assert row["split"] == ["train", "val", "test"][int(row["mr_source"].split(".")[0]) % 3]
    with refused(pack.NoChip, "train"):
        pack.pack(patches(split=lambda n: "val"), tmp_path / "none")
    assert not (tmp_path / "none.packing").exists()


def test_some_chips_have_a_split_and_the_others_are_dealt(tmp_path):
    pack.pack(patches(split=lambda n: "test" if n < 3 else None), tmp_path / "store", val=0.4)
    split = {row["mr_source"]: row["split"] for row in rows_of(tmp_path / "store")}
    assert {split[f"{n}.pt#0"] for n in range(3)} == {"test"}
    assert {split[f"{n}.pt#0"] for n in range(3, 6)} == {"train", "val"}


@pytest.mark.parametrize("seed", range(3))
def test_a_site_is_never_divided(tmp_path, seed):
    meta = pack.pack(
        patches(12, site=lambda n: f"site {n % 4}"), tmp_path / "store", val=0.25, seed=seed
    )
    assert meta["splits"] == {"train": 18, "val": 6}
    sites = {}
    for row in rows_of(tmp_path / "store"):
        sites.setdefault(int(row["mr_source"].split(".")[0]) % 4, set()).add(row["split"])
    assert all(len(splits) == 1 for splits in sites.values())


def test_sites_decide_although_there_is_ground(tmp_path):
    """Two sites whose images overlap in ground that says nothing, as of simulated georeferences."""
    array = RNG.integers(1, 99, (1, 32, 32), dtype="uint8")
    pairs = [
        common.Pair(image(f"{n}.tif", array, (10.0, 0, 0, 0, -10.0, 0)), [], None, f"s{n}")
        for n in range(4)
    ]
    unit = common.Unit("u", lambda: iter(pairs))
    listing = common.Listing([unit], {"mr": ["a"], "hr": []})
    meta = pack.pack(listing, tmp_path / "store", chip=16, stride=8, val=0.25)
    assert meta["splits"] == {"train": 27, "val": 9}


# partial pairing


def test_mr_without_any_hr(tmp_path, capsys):
    meta = pack.pack(patches(hr=False), tmp_path / "store", val=0)
    assert meta["count"] == {"mr": 12, "hr": 0} and meta["pixel_ratio"] is None
    assert meta["shape"]["hr"] is None and meta["mean"]["hr"] is None and meta["bands"]["hr"] == []
    store = data.Store(tmp_path / "store")
    assert len(store) == 12 and not store.has_hr.any() and store.sensors == ["mr"]
    assert "12 chips, 0 pairs kept" in capsys.readouterr().out


def test_chips_without_hr_are_kept_or_skipped(tmp_path, capsys):
    """HR covers the upper half and has holes on the right."""
    mr, hr = pair(tmp_path)
    array = raster.read(hr + "/a.tif")[:, :64]
    array[:, 3, 100] = 0
    write_scene(tmp_path / "hr/a.tif", 5.0, (0, 0), 64, 128, array=array, nodata=0)
    write_scene(tmp_path / "mr/b.tif", 10.0, (9000, 0), 32, 32)
    pack_files(mr, hr, tmp_path / "pairs", chip=32, val=0)
    assert len(data.Store(tmp_path / "pairs")) == 1
    reasons = [row["reason"] for row in rows_of(tmp_path / "pairs", "skipped")]
    assert reasons == [
        "HR not valid enough",
        "no HR file covers it",
        "no HR file covers it",
        "no HR on its ground, the nearest is in EPSG:32631, 8.4 km away",
    ]
    capsys.readouterr()
    meta = pack_files(mr, hr, tmp_path / "all", chip=32, val=0, keep_unpaired=True)
    assert meta["count"] == {"mr": 5, "hr": 1} and not rows_of(tmp_path / "all", "skipped")
    out = capsys.readouterr().out
    assert "5 chips, 1 pairs kept (5 train" in out
    assert "2 no HR file covers it, 1 HR not valid enough, 1 no HR on its ground" in out
    store = data.Store(tmp_path / "all")
    assert store.has_hr.tolist() == [True, False, False, False, False]
    rows = rows_of(tmp_path / "all")
    assert [row["valid"] for row in rows] == ["1.0"] * 5
    assert all(row["hr_source"] == row["hr_row"] == row["hr_width"] == "" for row in rows[1:])
    scene = raster.read(mr + "/a.tif")
    assert np.array_equal(store.batch([3])["mr"][0], scene[:, 32:, 32:])
    assert np.allclose(meta["mean"]["hr"], pixels(tmp_path / "all", "hr").mean((0, 2, 3)))


def test_arrays_close_up_when_chips_without_hr_are_among_them(tmp_path):
    """Dropped chips, moved chips, and some without HR: still each its own pixels."""
    write_scene(tmp_path / "mr/a.tif", 10.0, (0, 0), 100, 100)
    write_scene(tmp_path / "hr/a.tif", 5.0, (0, -300), 120, 200)
    options = {"chip": 16, "stride": 9, "split_block": 2, "val": 0.3, "keep_unpaired": True}
    meta = pack_files(tmp_path / "mr", tmp_path / "hr", tmp_path / "store", **options)
    assert 0 < meta["count"]["hr"] < meta["count"]["mr"] and meta["splits"]["val"] > 0
    store, rows = data.Store(tmp_path / "store"), rows_of(tmp_path / "store")
    mr, hr = (raster.read(tmp_path / s / "a.tif") for s in ("mr", "hr"))
    for n, row in enumerate(rows):
        r, c = int(row["row"]), int(row["col"])
        batch = store.batch([n])
        assert np.array_equal(batch["mr"][0], mr[:, r : r + 16, c : c + 16])
        if row["hr"]:
            top, left = 2 * r - 60, 2 * c
            assert np.array_equal(batch["hr"][0], hr[:, top : top + 32, left : left + 32])
    assert len(rows) + len(rows_of(tmp_path / "store", "skipped")) == 100


def test_pairs_in_val_alone_still_have_statistics(tmp_path):
    listing = patches(split=lambda n: "val" if n == 0 else "train")
    units = [
        u if n == 0 else common.Unit(u.name, lambda u=u: (p._replace(hrs=[]) for p in u.open()))
        for n, u in enumerate(listing.units)
    ]
    meta = pack.pack(listing._replace(units=units), tmp_path / "store", keep_unpaired=True)
    assert meta["count"] == {"mr": 12, "hr": 2}
    hr = pixels(tmp_path / "store", "hr").astype(float)
    assert np.allclose(meta["mean"]["hr"], hr.mean((0, 2, 3)))


# ratios


def sized(*sides, chip=16):
    """A published set whose HR images have those sides, of MR images of 16."""

    def unit(n, side):
        arrays = [RNG.integers(1, 99, (1, s, s), dtype="uint8") for s in (16, side)]
        pairs = [common.Pair(image(f"{n}", arrays[0]), [image(f"{n}h", arrays[1])])]
        return common.Unit(str(n), lambda: iter(pairs))

    units = [unit(n, side) for n, side in enumerate(sides)]
    return common.Listing(units, {"mr": ["a"], "hr": ["a"]}, chip)


def test_ratios_that_differ_a_little_share_a_store(tmp_path):
    meta = pack.pack(sized(106, 105, 107), tmp_path / "store", val=0)
    assert meta["shape"]["hr"] == (1, 107, 107) and meta["pixel_ratio"] == [106 / 16] * 2
    heights = [float(row["hr_height"]) for row in rows_of(tmp_path / "store")]
    assert heights == [106, 105, 107]


def test_another_ratio_is_skipped_in_a_published_set_and_refused_in_a_folder(tmp_path):
    pack.pack(sized(32, 32, 48), tmp_path / "store", val=0)
    (skipped,) = rows_of(tmp_path / "store", "skipped")
    assert (skipped["mr_source"], skipped["reason"]) == ("2", "another pixel ratio")
    with refused(ValueError, "2: ", "3 HR", "2 to"):
        pack.pack(sized(32, 32, 48, chip=None), tmp_path / "other", chip=16)


def test_mr_of_another_pixel_size_without_hr(tmp_path):
    for k, (gsd, side) in enumerate([(10.0, 64), (10.3, 64), (60.0, 64)]):
        write_scene(tmp_path / f"mr/{k}.tif", gsd, (9000 * k, 0), side, side)
    mentions = "mr/2.tif", "gsd 60", "mr/0.tif", "gsd 10"
    with refused(ValueError, *mentions):
        pack_files(tmp_path / "mr", None, tmp_path / "store", chip=16)
    write_scene(tmp_path / "hr/0.tif", 5.0, (0, 0), 128, 128)
    with refused(ValueError, *mentions):
        pack_files(tmp_path / "mr", tmp_path / "hr", tmp_path / "all", chip=16, keep_unpaired=True)
    (tmp_path / "mr/2.tif").unlink()
    assert pack_files(tmp_path / "mr", None, tmp_path / "store", chip=16)["count"]["mr"] == 32


def test_mr_of_another_pixel_size_in_a_published_set(tmp_path):
    pairs = [
        common.Pair(image(f"{gsd}", np.ones((1, 16, 16), "uint8"), (gsd, 0, 0, 0, -gsd, 0)), [])
        for gsd in (10.0, 60.0)
    ]
    units = [common.Unit(f"{n}", lambda p=p: iter([p])) for n, p in enumerate(pairs)]
    meta = pack.pack(common.Listing(units, {"mr": ["a"], "hr": []}, 16), tmp_path / "store")
    (skipped,) = rows_of(tmp_path / "store", "skipped")
    assert (skipped["mr_source"], skipped["reason"]) == ("60.0", "another pixel size")
    assert meta["count"]["mr"] == 1


def test_pairs_that_the_survey_did_not_see(tmp_path, monkeypatch):
    """A window larger than what the headers of the sample led to, and HR coarser than MR."""
    monkeypatch.setattr(chips, "SURVEY", 2)
    pack.pack(sized(100, 101, 8, 99, 100), tmp_path / "store", val=0)
    skipped = [(r["mr_source"], r["reason"]) for r in rows_of(tmp_path / "store", "skipped")]
    assert skipped == [("1", "another pixel ratio"), ("2", "another pixel ratio")]
    listing = sized(32, 32, 32)
    units = [*listing.units]
    units[1] = of_type("float32")
    pack.pack(listing._replace(units=units), tmp_path / "other")
    assert len(data.Store(tmp_path / "other")) == 2


def of_type(dtype):
    odd = image("odd", np.ones((1, 16, 16), dtype))
    hr = image("odd_hr", np.ones((1, 32, 32), "uint8"))
    return common.Unit("1", lambda: iter([common.Pair(odd, [hr])]))


@pytest.mark.parametrize("where", [0, 1, 2])
def test_one_file_of_another_type(tmp_path, capsys, where):
    """Left out of a published set with a warning, wherever it is; an error in a folder."""
    listing = sized(32, 32)
    listing.units.insert(where, of_type("float32"))
    meta = pack.pack(listing, tmp_path / "store", val=0)
    assert meta["count"]["mr"] == 2 and meta["dtype"]["mr"] == "uint8"
    (skipped,) = rows_of(tmp_path / "store", "skipped")
    assert (skipped["mr_source"], skipped["reason"]) == ("1", "another type of pixels")
    assert "warning: left out: odd: float32" in capsys.readouterr().out
    with refused(ValueError, "odd: ", "float32", "uint8"):
        pack.pack(listing._replace(chip=None), tmp_path / "other", chip=16)


# bands


def test_hr_has_bands_that_mr_has_not(tmp_path, monkeypatch):
    """Radar MR and optical HR; the contact sheet shows each in its own bands."""
    radar, optical = ("VV", "VH"), ("B02", "B03", "B04", "B08")
    write_scene(tmp_path / "mr/a.tif", 10.0, (0, 0), 64, 64, 2, band_names=radar)
    scene = write_scene(tmp_path / "hr/a.tif", 5.0, (0, 0), 128, 128, 4, band_names=optical)
    store = tmp_path / "store"
    meta = pack_files(tmp_path / "mr", tmp_path / "hr", store, chip=32, val=0)
    assert meta["bands"] == {"mr": [*radar], "hr": [*optical]}
    assert np.array_equal(pixels(store, "hr")[0], scene[:, :64, :64])
    shown, composite = [], figures.composite

    def seen(images, bands):
        shown.append((images.shape[1], bands))
        return composite(images, bands)

    monkeypatch.setattr(figures, "composite", seen)
    draw_contact(store, [row | {"chip": n} for n, row in enumerate(rows_of(store))])
    assert shown == [(4, [*optical]), (2, [*radar])]
    assert (store / "contact.png").read_bytes()[:4] == b"\x89PNG"


def test_hr_has_some_of_many_bands(tmp_path):
    listing = patches(bands=6)
    units = [
        common.Unit(
            u.name,
            lambda u=u: (
                p._replace(hrs=[hr._replace(bands=[2, 0]) for hr in p.hrs]) for p in u.open()
            ),
        )
        for u in listing.units
    ]
    listing = listing._replace(units=units, bands={"mr": listing.bands["mr"], "hr": ["R", "B"]})
    meta = pack.pack(listing, tmp_path / "store", val=0)
    assert meta["bands"] == {"mr": ["R", "G", "B", "NIR", "S1", "S2"], "hr": ["R", "B"]}
    batch = data.Store(tmp_path / "store").batch([0])
    assert batch["mr"].shape[1:] == (6, 16, 16) and batch["hr"].shape[1:] == (2, 32, 32)
    first = next(iter(listing.units[0].open())).hrs[0]
    assert np.array_equal(
        batch["hr"][0], raster.masked(first.read((0, 0, 32, 32), [2, 0]), None)[0]
    )


# offsets


def test_an_offset_is_added_and_holes_stay(tmp_path):
    array = RNG.integers(900, 3000, (2, 32, 32), dtype="uint16")
    array[:, 0, 0] = 0  # nodata
    array[0, 1, 1] = 0  # one band of it
    told = image("a", array, None, 0.0, offset=-1000.0)
    listing = common.Listing(
        [common.Unit("a", lambda: iter([common.Pair(told, [])]))], {"mr": ["x", "y"], "hr": []}
    )
    options = {"chip": 32, "val": 0, "min_valid": 0.9}
    meta = pack.pack(listing, tmp_path / "told", **options)
    chip = pixels(tmp_path / "told", "mr")[0]
    wanted = np.maximum(array.astype(int) - 1000, 0)
    assert meta["offset"]["mr"] == [-1000.0] and chip[0, 1, 1] == 0
    assert np.array_equal(chip[:, 2:], wanted[:, 2:]) and chip.dtype == np.uint16
    assert np.allclose(chip[:, 0, 0], wanted.reshape(2, -1)[:, 1:].mean(1), atol=0.5)
    assert np.allclose(meta["mean"]["mr"], wanted.reshape(2, -1)[:, 1:].mean(1))
    meta = pack.pack(listing, tmp_path / "given", offset=-100, **options)
    assert meta["offset"]["mr"] == [-100]
    assert pixels(tmp_path / "given", "mr")[0, 1, 9, 9] == array[1, 9, 9] - 100


def test_offsets_of_signed_and_real_pixels():
    assert chips.add_offset(np.int16([[5, -32768, 7]]), -10, 7).tolist() == [[-5, -32768, 7]]
    assert chips.add_offset(np.uint8([250, 3]), 10.0, None).tolist() == [255, 13]
    real = chips.add_offset(np.float32([0.5, np.nan]), -0.25, None)
    assert real.dtype == np.float32 and real[0] == 0.25 and np.isnan(real[1])


@pytest.mark.parametrize(
    "low, options, warns",
    [
        (1000, {}, True),
        (930, {}, True),
        (200, {}, False),
        (2500, {}, False),
        (1000, {"offset": -1000}, False),
    ],
)
def test_an_offset_that_was_not_removed_is_told(tmp_path, capsys, low, options, warns):
    units = []
    for n in range(20):
        array = RNG.integers(low, low + 3000, (3, 16, 16), dtype="uint16")
        array[0, :2, :2] = low
        array[1] += 400
        if n == 0:
            array[:, 3, 3] = 1  # dead
        pairs = [common.Pair(image(str(n), array), [])]
        units.append(common.Unit(str(n), lambda pairs=pairs: iter(pairs)))
    listing = common.Listing(units, {"mr": ["B", "G", "R"], "hr": []}, 16)
    pack.pack(listing, tmp_path / "store", val=0, **options)
    out = capsys.readouterr().out
    assert ("warning: " in out) == ("--offset -1000 --overwrite" in out) == warns


# parts


def test_moments_of_parts_are_those_of_all():
    images = RNG.normal(1e6, 1, (40, 3, 8, 8))
    valid = np.ones((8, 8), bool)
    moments = np.stack([shards.channel_moments(chip, valid) for chip in images])
    parts = np.stack([shards.pool_moments(moments[:7]), shards.pool_moments(moments[7:])])
    count, mean, squares, least = shards.pool_moments(parts).T
    assert (count == 40 * 64).all() and np.allclose(mean, images.mean((0, 2, 3)), rtol=1e-14)
    assert np.allclose(squares / count, images.var((0, 2, 3)), rtol=1e-9)
    assert np.array_equal(least, images.min((0, 2, 3)))


@pytest.mark.parametrize("seed", range(5))
def test_numbers_have_no_gaps_and_few_chips_get_another(seed):
    rng = np.random.default_rng(seed)
    keep = rng.random(50) < rng.random()
    keep[7] = True
    order = shards.number_chips(keep)
    assert sorted(order) == np.flatnonzero(keep).tolist()
    gaps = order != np.arange(len(order))
    assert (gaps == ~keep[: len(order)]).all() and (np.diff(order[gaps]) > 0).all()


# the picture


@pytest.mark.parametrize("hr", [True, False])
def test_contact_sheet(tmp_path, monkeypatch, hr):
    """Red left half and blue right half in HR and MR of every pair."""
    monkeypatch.setattr(shards, "draw_contact", draw_contact)
    units = []
    for n in range(3):
        arrays = [np.full((3, side, side), 10, "uint8") for side in (16, 40)]
        for array in arrays:
            half = array.shape[1] // 2
            array[0, :, :half] = 200
            array[2, :, half:] = 200
        name = "a_name_that_is_much_too_long_for_the_picture_it_stands_above_" + str(n)
        pairs = [common.Pair(image(name, arrays[0]), [image("h", arrays[1])] if hr else [])]
        units.append(common.Unit(str(n), lambda pairs=pairs: iter(pairs)))
    names = ["B04", "B03", "blue"]
    listing = common.Listing(units, {"mr": names, "hr": names if hr else []}, 16)
    pack.pack(listing, tmp_path / "store", val=0)
    from PIL import Image

    picture = np.asarray(Image.open(tmp_path / "store" / "contact.png").convert("RGB")).astype(int)
    red = ((picture[..., 0] > 200) & (picture[..., 1:] < 90).all(-1)).sum()
    blue = ((picture[..., 2] > 200) & (picture[..., :2] < 90).all(-1)).sum()
    assert red > 0.15 * picture[..., 0].size and abs(red / blue - 1) < 0.1


def test_a_picture_that_fails_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards, "draw_contact", lambda *_: 1 / 0)
    assert pack.pack(patches(), tmp_path / "store")["count"]["mr"] == 12
    out = capsys.readouterr().out
    assert "warning: no contact.png: ZeroDivisionError" in out and "look at" not in out
    assert len(data.Store(tmp_path / "store")) == 12


def test_names_on_the_contact_sheet_are_no_formulas(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "draw_contact", draw_contact)
    pairs = [common.Pair(image(r"a$\x$.tif", np.ones((1, 16, 16), "uint8")), [])]
    unit = common.Unit("u", lambda: iter(pairs))
    pack.pack(common.Listing([unit], {"mr": ["a"], "hr": []}, 16), tmp_path / "store")
    assert (tmp_path / "store" / "contact.png").stat().st_size


# the ground


@pytest.mark.parametrize("hr_gsd", [5.0, 3.0, 1.5])
@pytest.mark.parametrize("shift", [(0.0, 0.0), (-4.3, 6.1)])
def test_every_crop_shows_the_same_ground(tmp_path, hr_gsd, shift):
    """Random crops of both sensors agree to 0.05 MR pixels, for ratios 2, 10/3 and 6.67 and grids
    that are off by a fraction of a pixel."""
    side = int(64 * 10 / hr_gsd) + 12
    mr, hr = pair(tmp_path, hr_gsd, (0, 0), shift, side=64, hr_side=side)
    meta = pack_files(mr, hr, tmp_path / "store", chip=31, stride=32, val=0)
    assert np.allclose(meta["pixel_ratio"], 10 / hr_gsd)
    store = data.Store(tmp_path / "store")
    chips = np.arange(24) % len(store)
    crops = data.draw_crops(3, 1, 24)
    a, b = crop_pairs(store, chips, crops, 32, 32)
    scale = crops[:, 2:] * 31 / 32  # MR pixels to a pixel of the crop
    shifts = [shift_between(m[0], h[0]) for m, h in zip(a.numpy(), b.numpy(), strict=True)]
    assert np.abs(shifts * scale).max() < 0.05


def test_a_window_at_the_edge_of_the_hr_image_is_moved_into_it(tmp_path):
    """The last chip touches 107 HR pixels, the last of the image; 108 are stored."""
    mr, hr = pair(tmp_path, 3.0, (0, 0), (-3.0, 3.0), side=96, hr_side=321)
    meta = pack_files(mr, hr, tmp_path / "store", chip=32, val=0)
    assert meta["shape"]["hr"] == (2, 108, 108)
    last = rows_of(tmp_path / "store")[-1]
    assert np.isclose(float(last["hr_row"]), 4 / 3) and np.isclose(float(last["hr_col"]), 4 / 3)
    a, b = crop_pairs(data.Store(tmp_path / "store"), [8], [[0, 0, 1, 1]], 32, 32)
    assert np.abs(shift_between(a[0, 0].numpy(), b[0, 0].numpy())).max() < 0.05
