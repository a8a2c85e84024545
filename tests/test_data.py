"""data.py: packing keeps the ground, crops agree with it, splits share none; every message."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from stores import write_store

import data
import geotiff

SHARED = Path(os.environ.get("CROSSSCALE_SHARED", Path(__file__).parents[2] / "shared")) / "data"
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
    geotiff.write(path, array, transform, crs, **more)
    return array


def pair(folder, hr_gsd=5.0, mr_shift=(0, 0), hr_shift=(0, 0), side=64, hr_side=None, **more):
    """One MR and one HR scene; returns the two folders as strings."""
    hr_side = hr_side or int(side * 10 / hr_gsd)
    write_scene(folder / "mr" / "a.tif", 10.0, mr_shift, side, side, **more)
    write_scene(folder / "hr" / "a.tif", hr_gsd, hr_shift, hr_side, hr_side, **more)
    return str(folder / "mr"), str(folder / "hr")


def rows_of(store, name="index"):
    with (Path(store) / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def full(pixels):
    return torch.tensor([[0.0, 0.0, *pixels]], dtype=torch.float64)


# resampling


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint16, torch.int16, torch.uint8])
@pytest.mark.parametrize(
    "pixels, size",
    [((64, 64), (224, 224)), ((128, 128), (56, 56)), ((67, 31), (40, 97)), ((9, 7), (3, 2))],
)
def test_resample_equals_interpolate_on_the_whole_image(dtype, pixels, size):
    images = (torch.rand(3, 4, *pixels, generator=torch.Generator().manual_seed(0)) * 200).to(dtype)
    out = data.resample(images, full(pixels).expand(3, 4), size)
    expected = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
    assert out.dtype == torch.float32
    assert torch.allclose(out / 200, expected / 200, atol=1e-5)


def keys(x):
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def slow_resample(line, start, length, size):
    """The definition, one output sample and one tap at a time."""
    step = length / size
    reach = max(step, 1.0)
    out = []
    for i in range(size):
        centre = start + (i + 0.5) * step
        weights = [keys((j + 0.5 - centre) / reach) for j in range(len(line))]
        out.append(sum(w * v for w, v in zip(weights, line, strict=True)) / sum(weights))
    return out


def test_resample_of_fractional_windows_equals_a_slow_loop():
    line = RNG.normal(size=(3, 41))
    windows = [(0.0, 41.0), (3.37, 20.5), (30.9, 10.1)]
    for size in (5, 17, 60):
        expected = [slow_resample(v, *w, size) for v, w in zip(line, windows, strict=True)]
        images = torch.tensor(line, dtype=torch.float32)
        vertical = torch.tensor([(top, 0.0, length, 1.0) for top, length in windows])
        out = data.resample(images[:, None, :, None], vertical.double(), (size, 1))
        assert np.allclose(out[:, 0, :, 0], expected, atol=1e-5)
        horizontal = vertical[:, [1, 0, 3, 2]]
        out = data.resample(images[:, None, None, :], horizontal.double(), (1, size))
        assert np.allclose(out[:, 0, 0, :], expected, atol=1e-5)


def test_resample_uses_the_pixels_beyond_the_window():
    image = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(1))
    window = torch.tensor([[10.0, 8.0, 20.0, 24.0]])
    out = data.resample(image, window, (40, 48))
    whole = data.resample(image, full((40, 40)), (80, 80))
    assert torch.allclose(out, whole[..., 20:60, 16:64], atol=1e-5)
    cut = F.interpolate(image[..., 10:30, 8:32], (40, 48), mode="bicubic", antialias=True)
    assert torch.allclose(out[..., 4:-4, 4:-4], cut[..., 4:-4, 4:-4], atol=1e-5)
    assert not torch.allclose(out, cut, atol=1e-3)


def test_resample_ignores_autocast():
    images, windows = torch.full((1, 1, 8, 8), 4097.0), full((8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(data.resample(images, windows, (16, 16)), torch.tensor(4097.0))


# crops and the order of samples


def test_crops_depend_on_seed_step_and_place_only():
    crops = data.draw_crops(3, 7, 64)
    assert crops.shape == (64, 4) and crops.dtype == np.float64
    assert np.array_equal(crops[:16], data.draw_crops(3, 7, 16))
    assert not np.array_equal(crops, data.draw_crops(3, 8, 64))
    assert not np.array_equal(crops, data.draw_crops(4, 7, 64))


def test_crops_lie_in_the_chip_and_in_the_ranges():
    top, left, height, width = data.draw_crops(0, 0, 20000, (0.2, 0.9), (0.5, 2.0)).T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 1 + 1e-12).all() and (left + width <= 1 + 1e-12).all()
    area, aspect = height * width, width / height
    assert area.min() > 0.2 - 1e-9 and area.max() < 0.9 + 1e-9
    assert aspect.min() > 0.5 - 1e-9 and aspect.max() < 2 + 1e-9
    assert abs(np.median(np.log(aspect))) < 0.02  # neither orientation is preferred
    free = (top / (1 - height)), (left / (1 - width))
    assert all(abs(f.mean() - 0.5) < 0.01 and f.max() > 0.99 for f in free)


def test_a_crop_that_cannot_fit_is_the_whole_chip():
    assert np.array_equal(data.draw_crops(0, 0, 5, (1.0, 1.0)), [[0, 0, 1, 1]] * 5)


@pytest.mark.parametrize("count, batch", [(10, 4), (7, 7), (3, 8), (100, 1)])
def test_sample_order_walks_one_permutation_an_epoch(count, batch):
    steps = [data.sample_order(5, step, batch, count) for step in range(3 * count)]
    stream = np.concatenate(steps)
    assert stream.dtype == np.int64
    epochs = stream[: len(stream) // count * count].reshape(-1, count)
    assert (np.sort(epochs, 1) == np.arange(count)).all()
    assert count < 10 or not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(steps[2], data.sample_order(5, 2, batch, count))


# the same ground in both sensors


def shift_between(a, b):
    """(rows, cols) by which b's content lies further than a's, in pixels, by least squares."""
    a, b = a[2:-2, 2:-2], b[2:-2, 2:-2]
    down, right = np.gradient((a + b) / 2)
    terms = np.stack([a, np.ones_like(a), -down, -right], -1).reshape(-1, 4)
    return np.linalg.lstsq(terms, b.reshape(-1), rcond=None)[0][2:]


@pytest.mark.parametrize(
    "hr_gsd, hr_shift",
    [(5.0, (0, 0)), (5.0, (-7.3, 3.9)), (3.0, (-1.0, 2.0)), (10 / 3, (-4.4, 9.1)), (2.5, (-3, 1))],
)
def test_crops_show_the_same_ground(tmp_path, hr_gsd, hr_shift):
    """For grids that are offset by any fraction of a pixel and any ratio of pixel sizes."""
    mr, hr = pair(tmp_path, hr_gsd, (0, 0), hr_shift, side=96, hr_side=int(980 / hr_gsd))
    meta = data.pack(mr, hr, tmp_path / "store", chip=32, val=0)
    assert np.allclose(meta["pixel_ratio"], 10 / hr_gsd, rtol=1e-12)
    store = data.Store(tmp_path / "store")
    assert len(store) == 9
    batch = store.batch(np.arange(9))
    crops = data.draw_crops(0, 0, 9)
    a, b = data.crop_pairs(batch, crops, meta, 48, 48)
    assert a.shape == b.shape == (9, 2, 48, 48) and a.dtype == b.dtype == torch.float32
    for i in range(9):
        # pixels of the output -> MR pixels
        scale = crops[i, 2:] * 32 / 48
        assert np.abs(shift_between(a[i, 0].numpy(), b[i, 0].numpy()) * scale).max() < 0.02
    wrong = batch | {"hr_origin": batch["hr_origin"] + 0.5 * 10 / hr_gsd}
    _, b = data.crop_pairs(wrong, crops, meta, 48, 48)
    scale = crops[0, 2:] * 32 / 48
    assert np.allclose(shift_between(a[0, 0].numpy(), b[0, 0].numpy()) * scale, -0.5, atol=0.05)


def test_crops_of_either_sensor_stand_in_for_the_other(tmp_path):
    mr, hr = pair(tmp_path, side=64)
    meta = data.pack(mr, hr, tmp_path / "store", chip=32, val=0)
    batch = data.Store(tmp_path / "store").batch([0, 3])
    whole = np.array([[0, 0, 1, 1.0]] * 2)

    def normal(sensor):
        mean, std = (np.array(meta[k][sensor])[:, None, None] for k in ("mean", "std"))
        return (batch[sensor].numpy() - mean) / std

    a, b = data.crop_pairs(batch, whole, meta, 32, 64)
    assert np.allclose(a, normal("mr"), atol=1e-4)
    assert np.allclose(b, normal("hr"), atol=1e-4)
    a, b = data.crop_pairs(batch, whole, meta, 32, mr_from="hr")
    assert b is None
    small = F.interpolate(torch.tensor(normal("hr")), (32, 32), mode="bicubic", antialias=True)
    assert np.allclose(a, small, atol=1e-4)
    _, b = data.crop_pairs(batch, whole, meta, 32, 64, hr_from="mr")
    large = F.interpolate(torch.tensor(normal("mr")), (64, 64), mode="bicubic", antialias=True)
    assert np.allclose(b, large, atol=1e-4)


# packing


def test_chips_are_the_pixels_of_the_files(tmp_path):
    mr, hr = pair(tmp_path, 3.0, (0, 0), (-4.0, 7.0), side=100, hr_side=340)
    data.pack(mr, hr, tmp_path / "store", chip=32, val=0)
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
        assert batch["hr_origin"].tolist() == [list(origin)]
        y, x = round(top - origin[0]), round(left - origin[1])
        assert np.allclose([top - y, left - x], origin, atol=1e-9)
        assert -1e-9 <= origin[0] and origin[0] + 32 * 10 / 3 <= size + 1e-9
        assert np.array_equal(batch["hr"][0], hr_scene[:, y : y + size, x : x + size])


def test_batch_keeps_order_and_repeats(tmp_path):
    mr, hr = pair(tmp_path)
    data.pack(mr, hr, tmp_path / "store", chip=16, val=0)
    store = data.Store(tmp_path / "store")
    batch = store.batch(np.array([5, 0, 5, 12]))
    assert batch["mr"].dtype == torch.uint16
    assert batch["has_hr"].tolist() == [True] * 4 and batch["has_hr"].dtype == torch.bool
    assert batch["hr_origin"].shape == (4, 2) and batch["hr_origin"].dtype == torch.float64
    for i, chip in enumerate([5, 0, 5, 12]):
        for sensor in ("mr", "hr"):
            assert np.array_equal(batch[sensor][i], getattr(store, sensor)[chip])


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
    meta = data.pack(mr_in, hr_in, tmp_path / "store", chip=16, min_valid=0.9, val=0)
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
    meta = data.pack(mr, hr, tmp_path / "store", chip=16, split_block=2, val=0.3, test=0.2)
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
    meta = data.pack(mr, hr, tmp_path / "store", chip=32, min_valid=0.5, val=0)
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
    assert data.pack(mr, hr, tmp_path / "one", chip=32, val=0)["count"] == 4
    assert data.pack(mr, hr, tmp_path / "two", chip=32, val=0, nodata=7)["count"] == 3


def test_bands_by_index_and_by_name(tmp_path):
    mr, hr = pair(tmp_path, bands=3, band_names=("R", "G", "B"))
    by_name = {"mr_bands": ["b", "R"], "hr_bands": ["2", "0"]}
    meta = data.pack(mr, hr, tmp_path / "store", chip=32, val=0, **by_name)
    assert meta["bands"] == ["B", "R"]
    store = data.Store(tmp_path / "store")
    scene = geotiff.read(mr + "/a.tif")
    assert np.array_equal(store.mr[0], scene[[2, 0], :32, :32])
    assert np.array_equal(store.hr[0], geotiff.read(hr + "/a.tif")[[2, 0], :64, :64])
    meta = data.pack(mr, hr, tmp_path / "other", chip=32, val=0, band_names=["x", "y", "z"])
    assert meta["bands"] == ["x", "y", "z"]


def test_reading_in_small_blocks_changes_nothing(tmp_path, monkeypatch):
    mr, hr = pair(tmp_path, 3.0, (0, 0), (-4.0, 7.0), side=100, hr_side=340)
    options = {"chip": 16, "stride": 10, "split_block": 2, "val": 0.2}
    data.pack(mr, hr, tmp_path / "one", **options)
    monkeypatch.setattr(data, "BLOCK_BYTES", 1000)
    data.pack(mr, hr, tmp_path / "two", **options)
    for name in ("mr.npy", "hr.npy", "index.csv", "skipped.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_several_hr_files_on_one_mr_and_several_mr_on_one_hr(tmp_path):
    """Every chip takes a file that covers it wholly; of several, the one with the likest name."""
    for date in ("2019-07", "2020-08"):
        write_scene(tmp_path / f"mr/T31_{date}_10m.tif", 10.0, (0, 0), 64, 64)
        write_scene(tmp_path / f"hr/T31_{date}_05m.tif", 5.0, (0, 0), 80, 128)
        write_scene(tmp_path / f"hr/south_{date}.tif", 5.0, (0, -320), 64, 128)
    data.pack(tmp_path / "mr", tmp_path / "hr", tmp_path / "store", chip=32, val=0)
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
    data.pack(mr, hr, tmp_path / "store", chip=32, val=0)
    sources = [Path(row["hr_source"]).name for row in rows_of(tmp_path / "store")]
    assert sources == ["other.tif", "a.tif", "a.tif", "a.tif"]


def test_an_hr_file_as_small_as_its_chip_beside_one_that_needs_a_margin(tmp_path):
    write_scene(tmp_path / "mr/a.tif", 10.0, (0, 0), 32, 32)
    write_scene(tmp_path / "hr/a.tif", 5.0, (0, 0), 64, 64)
    write_scene(tmp_path / "mr/b.tif", 10.0, (5000, 0), 32, 32)
    write_scene(tmp_path / "hr/b.tif", 5.0, (4998, 2), 66, 66)
    data.pack(tmp_path / "mr", tmp_path / "hr", tmp_path / "store", chip=32, val=0)
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
    meta = data.pack(
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
    assert data.Store(tmp_path / "store").meta["count"] == 16


def test_big_endian_files_are_stored_native(tmp_path):
    array = RNG.integers(0, 999, (40, 40), dtype="uint16")
    for sensor, factor in (("mr", 1), ("hr", 2)):
        (tmp_path / sensor).mkdir()
        image = array.repeat(factor, 0).repeat(factor, 1)
        tifffile.imwrite(tmp_path / sensor / "a.tif", image, byteorder=">", metadata=None)
    data.pack(tmp_path / "mr", tmp_path / "hr", tmp_path / "store", chip=20, val=0)
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
    meta = data.pack(tmp_path / "mr", tmp_path / "hr", tmp_path / "store", chip=16, **options)
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
    again = data.pack(tmp_path / "mr", tmp_path / "hr", tmp_path / "again", chip=16, **options)
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
    split = data.assign_splits(sizes, {"val": 0.1, "test": 0.0}, seed)
    share = sizes[split == "val"].sum() / sizes.sum()
    assert sizes[split == "train"].sum() > 0 and share > 0
    assert "test" not in split
    fine = 0.1 + sizes[sizes > 0].min() / sizes.sum()
    assert share <= fine
    if (sizes > 0).sum() > 2:
        assert set(data.assign_splits(sizes, {"val": 0.1, "test": 0.1}, seed)) == {
            "train", "val", "test"
        }  # fmt: skip


def test_one_block_says_why_there_is_no_val(tmp_path, capsys):
    mr, hr = pair(tmp_path)
    meta = data.pack(mr, hr, tmp_path / "store", chip=16)
    assert meta["splits"] == {"train": 16}
    out = capsys.readouterr().out
    assert "val is empty: the chips lie in 1 blocks of ground of 8 x 8 chips; try another" in out
    assert len(data.Store(tmp_path / "store").split("val")) == 0


# real imagery


def test_south_african_pairs(tmp_path):
    folder = SHARED / "homonim_ngi_s2_l8"
    if not folder.exists():
        pytest.skip(f"no imagery at {folder}; set CROSSSCALE_SHARED")
    bgr = {"mr_bands": ["B2", "B3", "B4"], "hr_bands": ["2", "1", "0"], "split_block": 4}
    mr = folder / "mr" / "sentinel2_b432_byte.tif"
    meta = data.pack(mr, folder / "hr_ngi_5m_rgb", tmp_path / "store", **bgr)
    store = data.Store(tmp_path / "store")
    assert meta["bands"] == ["B2", "B3", "B4"] and meta["pixel_ratio"] == [2.0, 2.0]
    assert meta["gsd"] == {"mr": 10.0, "hr": 5.0}
    assert len(store) > 100 and meta["splits"]["val"] > 0
    batch = store.batch(store.split("train"))
    whole = np.array([[0.0, 0.0, 1.0, 1.0]] * len(batch["mr"]))
    a, b = data.crop_pairs(batch, whole, meta, 64, 64)
    alike = [np.corrcoef(a[:, k].flatten(), b[:, k].flatten())[0, 1] for k in range(3)]
    off = [np.corrcoef(a[:, k, 8:].flatten(), b[:, k, :-8].flatten())[0, 1] for k in range(3)]
    assert min(alike) > 0.5 and min(np.subtract(alike, off)) > 0.1
    with pytest.raises(ValueError, match=r"landsat8_byte\.tif: 3 bands expected .* found 24"):
        data.pack(
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
    meta = data.pack(coarse, path.parent, tmp_path / "store", split_block=2, **order, **names)
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
        data.pack(mr, hr, tmp_path / "store")
    mr, hr = pair(tmp_path)
    content = (tmp_path / "hr/a.tif").read_bytes()
    (tmp_path / "hr/a.tif").write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"a\.tif: truncated"):
        data.pack(mr, hr, tmp_path / "store")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"--hr .*empty: no \.tif or \.tiff found; give"):
        data.pack(mr, tmp_path / "empty", tmp_path / "store")
    with pytest.raises(FileNotFoundError, match=r"--mr .*none"):
        data.pack(tmp_path / "none*", hr, tmp_path / "store")


def test_damage_found_late_leaves_nothing_behind(tmp_path):
    mr, hr = pair(tmp_path)
    content = bytearray((tmp_path / "hr/a.tif").read_bytes())
    content[-400:-300] = b"\xff" * 100
    (tmp_path / "hr/a.tif").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tif: damaged TIFF"):
        data.pack(mr, hr, tmp_path / "store")
    assert sorted(os.listdir(tmp_path)) == ["hr", "mr"]


def test_bands_that_do_not_fit(tmp_path):
    mr, hr = pair(tmp_path, bands=4)
    write_scene(tmp_path / "hr/b.tif", 5.0, (0, 0), 128, 128, bands=3)
    names = ["B", "G", "R", "NIR"]
    message = r"b\.tif: 4 bands expected \(B,G,R,NIR\), found 3; use --hr-bands to choose them, "
    with pytest.raises(ValueError, match=message + "such as --hr-bands 2,1,0 for RGB files"):
        data.pack(mr, hr, tmp_path / "store", band_names=names)
    message = r"b\.tif: --hr-bands 3,2,1,0 asked for, the file has 3 bands \(without names\)"
    with pytest.raises(ValueError, match=message):
        data.pack(mr, hr, tmp_path / "store", hr_bands=["3", "2", "1", "0"])
    with pytest.raises(ValueError, match=r"a\.tif: --mr-bands B8 asked for, the file has 4"):
        data.pack(mr, hr, tmp_path / "store", mr_bands=["B8"])


BGR, RGB = ("B", "G", "R"), ("r", "g", "b")


def test_bands_of_one_name_in_another_order(tmp_path):
    mr, hr = pair(tmp_path, bands=3, band_names=BGR)
    write_scene(tmp_path / "hr/a.tif", 5.0, (0, 0), 128, 128, bands=3, band_names=RGB)
    options = {"chip": 32, "val": 0}
    message = r"hr.a\.tif: its bands are r,g,b, but .*mr.a\.tif has B,G,R; use --hr-bands B,G,R$"
    for names in (None, ["x", "y", "z"]):  # the flag hides no disagreement of files
        with pytest.raises(ValueError, match=message):
            data.pack(mr, hr, tmp_path / "store", band_names=names, **options)
    message = r"mr.a\.tif: its bands are B,G,R, but --band-names has R,G,B; use --mr-bands R,G,B$"
    with pytest.raises(ValueError, match=message):
        data.pack(mr, hr, tmp_path / "store", band_names=["R", "G", "B"], **options)
    data.pack(mr, hr, tmp_path / "store", hr_bands=["B", "G", "R"], **options)
    scene = geotiff.read(hr + "/a.tif", (0, 0, 64, 64))
    assert np.array_equal(data.Store(tmp_path / "store").hr[0], scene[::-1])


def test_bands_of_one_name_in_another_order_within_a_folder(tmp_path):
    mr, hr = pair(tmp_path, bands=3)  # which name none
    for sensor, gsd, side in (("mr", 10.0, 64), ("hr", 5.0, 128)):
        write_scene(tmp_path / sensor / "b.tif", gsd, (0, 0), side, side, 3, band_names=BGR)
    for name, some in (("d", ("G", "", "")), ("e", ("", "G", ""))):  # too few names to tell
        write_scene(tmp_path / f"mr/{name}.tif", 10.0, (0, 0), 64, 64, 3, band_names=some)
    assert data.pack(mr, hr, tmp_path / "store", chip=32, val=0)["bands"] == ["0", "1", "2"]
    write_scene(tmp_path / "mr/c.tif", 10.0, (0, 0), 64, 64, 3, band_names=RGB)
    message = r"mr.c\.tif: its bands are r,g,b, but .*mr.b\.tif has B,G,R; use --mr-bands B,G,R$"
    with pytest.raises(ValueError, match=message):
        data.pack(mr, hr, tmp_path / "other", chip=32, val=0)


def test_a_band_name_twice(tmp_path):
    with pytest.raises(ValueError, match="--band-names B,G,b: a name occurs twice; give each"):
        data.pack(*pair(tmp_path, bands=3), tmp_path / "store", band_names=["B", "G", "b"])


def test_complex_pixels(tmp_path):
    mr, hr = pair(tmp_path)
    array = np.zeros((2, 64, 64), "complex64")
    write_scene(tmp_path / "mr/a.tif", 10.0, (0, 0), 64, 64, array=array)
    with pytest.raises(ValueError, match=r"a\.tif: complex pixels \(complex64\); convert them"):
        data.pack(mr, hr, tmp_path / "store")


def test_mixed_types(tmp_path):
    mr, hr = pair(tmp_path)
    array = np.zeros((2, 64, 64), "uint8")
    write_scene(tmp_path / "mr/b.tif", 10.0, (0, 0), 64, 64, array=array)
    with pytest.raises(ValueError, match=r"b\.tif: uint8, but .*a\.tif is uint16; convert"):
        data.pack(mr, hr, tmp_path / "store")


def test_pairs_that_are_none(tmp_path):
    mr, hr = pair(tmp_path, hr_shift=(5000, 0))
    with pytest.raises(ValueError, match=r"a\.tif: bounds .* do not overlap .*a\.tif.*same ground"):
        data.pack(mr, hr, tmp_path / "store")
    write_scene(tmp_path / "hr/a.tif", 5.0, (0, 0), 128, 128, crs=32632)
    with pytest.raises(ValueError, match=r"CRS EPSG:32632, but .* has EPSG:32631; warp"):
        data.pack(mr, hr, tmp_path / "store")
    geotiff.write(tmp_path / "hr/a.tif", np.zeros((2, 128, 128), "uint16"))
    with pytest.raises(ValueError, match=r"hr.a\.tif: no georeference, but .* has one"):
        data.pack(mr, hr, tmp_path / "store")
    (tmp_path / "mr/a.tif").unlink()
    geotiff.write(tmp_path / "mr/b.tif", np.zeros((2, 64, 64), "uint16"))
    with pytest.raises(ValueError, match=r"no HR file is named as an MR file is .*b\.tif and .*a"):
        data.pack(mr, hr, tmp_path / "store")
    (tmp_path / "hr/sub").mkdir()
    shutil.copy(tmp_path / "hr/a.tif", tmp_path / "hr/sub/a.tif")
    with pytest.raises(ValueError, match=r"a\.tif: the same name as .*a\.tif, and no georef"):
        data.pack(mr, hr, tmp_path / "store")


def test_grids_that_do_not_fit(tmp_path):
    mr, hr = pair(tmp_path)
    with pytest.raises(ValueError, match=r"mr.a\.tif: HR coarser than MR, 0\.5 of its .*swap"):
        data.pack(hr, mr, tmp_path / "store")
    turned = (4.0, 3.0, EAST - 300, 3.0, -4.0, NORTH + 300)
    geotiff.write(tmp_path / "hr/a.tif", np.zeros((2, 300, 300), "uint16"), turned, 32631)
    with pytest.raises(ValueError, match=r"a\.tif: its pixel grid is rotated or mirrored"):
        data.pack(mr, hr, tmp_path / "store")
    pair(tmp_path)
    write_scene(tmp_path / "mr/b.tif", 30.0, (0, 0), 30, 30)
    with pytest.raises(ValueError, match=r"b\.tif: 6 HR pixels to an MR pixel of 30, but 2 to 10"):
        data.pack(mr, hr, tmp_path / "store")


def test_rotated_grids_that_agree_are_fine(tmp_path):
    for sensor, scale in (("mr", 2.0), ("hr", 1.0)):
        (tmp_path / sensor).mkdir()
        turned = (4.0 * scale, 3.0 * scale, EAST, 3.0 * scale, -4.0 * scale, NORTH)
        array = np.zeros((1, int(128 / scale), int(128 / scale)), "uint16")
        geotiff.write(tmp_path / sensor / "a.tif", array, turned, 32631)
    meta = data.pack(tmp_path / "mr", tmp_path / "hr", tmp_path / "store", chip=32, val=0)
    assert meta["count"] == 4 and np.allclose(meta["pixel_ratio"], 2)
    assert meta["std"]["mr"] == [1.0]  # a flat band does not divide by 0


def test_no_chip(tmp_path):
    mr, hr = pair(tmp_path, hr_side=32)
    with pytest.raises(ValueError, match="--chip 64: no MR chip of 64 x 64 pixels lies wholly"):
        data.pack(mr, hr, tmp_path / "store")
    mr, hr = pair(tmp_path)
    array = np.zeros((2, 64, 64), "uint16")
    write_scene(tmp_path / "mr/a.tif", 10.0, (0, 0), 64, 64, array=array, nodata=0)
    message = r"no chip kept \(4 MR not valid enough\); "
    with pytest.raises(ValueError, match=message + "one of each pair is all nodata; check"):
        data.pack(mr, hr, tmp_path / "store", chip=32)
    array[:, ::2] = 1
    write_scene(tmp_path / "mr/a.tif", 10.0, (0, 0), 64, 64, array=array, nodata=0)
    with pytest.raises(ValueError, match=message + "lower --min-valid 1.0 or --chip 32"):
        data.pack(mr, hr, tmp_path / "store", chip=32)
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
        data.pack(mr, hr, tmp_path / "store", **bad)


def test_an_output_that_exists(tmp_path):
    mr, hr = pair(tmp_path)
    store = tmp_path / "store"
    store.mkdir()
    (store / "meta.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="store: exists and is not a store; choose"):
            data.pack(mr, hr, store, overwrite=overwrite)
    shutil.rmtree(store)
    data.pack(mr, hr, store, chip=32, val=0)
    with pytest.raises(FileExistsError, match="store: a store is there; add --overwrite"):
        data.pack(mr, hr, store, chip=16, val=0)
    assert len(data.Store(store)) == 4
    (store / "notes.txt").write_text("mine")
    message = "store: --overwrite would delete notes.txt, which is no part of the store; move it"
    with pytest.raises(FileExistsError, match=message):
        data.pack(mr, hr, store, chip=16, val=0, overwrite=True)
    (store / "notes.txt").unlink()
    data.pack(mr, hr, store, chip=16, val=0, overwrite=True)
    assert len(data.Store(store)) == 16
    assert {path.name for path in store.iterdir()} == data.FILES
    assert sorted(os.listdir(tmp_path)) == ["hr", "mr", "store"]


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    data.pack(*pair(folder), folder / "store", chip=16, val=0)
    return folder / "store"


def refused(store, name, message):
    """Opening the store says one sentence: which file, what is wrong with it, what to do."""
    with pytest.raises(ValueError) as caught:
        data.Store(store)
    text = str(caught.value)
    assert text.startswith(f"{store / name}: cannot be used (") and message in text
    assert text.endswith("; pack the store again") and "\n" not in text


def test_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none: not a store, it has no meta\.json; make"):
        data.Store(tmp_path / "none")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda meta: meta | {"version": 99}, "version 1 expected, 99 found"),
        (lambda meta: [meta], "TypeError: list indices"),
        (lambda meta: {k: v for k, v in meta.items() if k != "std"}, "KeyError: 'std'"),
        (lambda meta: meta | {"mean": {"mr": [1.0, 2.0]}}, "KeyError: 'hr'"),
        (lambda meta: meta | {"mean": {"mr": [1.0], "hr": [1.0]}}, "do not fit its bands"),
        (lambda meta: meta | {"bands": ["B"]}, "do not fit its bands"),
        (lambda meta: meta | {"pixel_ratio": [2.0]}, "do not fit its bands"),
        (lambda meta: meta | {"pixel_ratio": [2.0, 0.0]}, "not above 0"),
        (lambda meta: meta | {"mean": {"mr": [1.0, 2.0], "hr": [1.0, np.nan]}}, "not finite"),
        (lambda meta: meta | {"std": {"mr": [1.0, 2.0], "hr": [1.0, -2.0]}}, "not above 0"),
        (lambda meta: meta | {"gsd": {"mr": np.inf, "hr": 5.0}}, "not finite"),
    ],
)
def test_a_meta_that_does_not_fit(whole_store, tmp_path, change, message):
    store = shutil.copytree(whole_store, tmp_path / "store")
    meta = json.loads((store / "meta.json").read_text())
    (store / "meta.json").write_text(json.dumps(change(meta)))
    refused(store, "meta.json", message)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("meta.json", lambda content: content[:200], "JSONDecodeError"),
        ("meta.json", lambda content: b"\xff" + content, "UnicodeDecodeError"),
        ("mr.npy", lambda content: b"", "EOF"),
        ("mr.npy", lambda content: content[:-10], "ValueError"),
        ("mr.npy", lambda content: content.replace(b"), }", b"(, }"), "TokenError"),
        ("hr.npy", lambda content: b"PK\3\4" + content, "magic string"),
        (
            "hr.npy",
            lambda content: content.replace(b"<u2", b"<i2"),
            "(16, 2, 32, 32) uint16 expected, (16, 2, 32, 32) int16 found",
        ),
        ("index.csv", lambda content: b"".join(content.splitlines(True)[:-2]), "16 rows expected"),
        ("index.csv", lambda content: content.replace(b"hr_col", b"column"), "KeyError: 'hr_col'"),
        ("index.csv", lambda content: content.replace(b",0.0,", b",north,", 1), "convert string"),
        ("index.csv", lambda content: content.replace(b",0.0,", b",nan,", 1), "not whole"),
        ("index.csv", lambda content: content.replace(b",train,", b",tra,", 1), "not whole"),
        *(("index.csv", lambda content, n=n: content[:-n], "") for n in (5, 6, 9, 12, 20)),
    ],
)
def test_a_file_of_a_store_that_is_damaged(whole_store, tmp_path, name, change, message):
    store = shutil.copytree(whole_store, tmp_path / "store")
    content = (store / name).read_bytes()
    assert change(content) != content
    (store / name).write_bytes(change(content))
    refused(store, name, message)
    (store / name).unlink()
    if name != "meta.json":
        refused(store, name, "FileNotFoundError")


def test_command_line(tmp_path, monkeypatch, capsys):
    mr, hr = pair(tmp_path, bands=3)
    out = tmp_path / "out" / "store"
    flags = ["--mr", mr, "--hr", hr, "--chip", "16", "--split-block", "1", "--val", "0.25"]
    order = ["--mr-bands", "2,1,0", "--hr-bands", "2,1,0", "--band-names", "B, G,R"]
    monkeypatch.setattr(sys, "argv", ["data.py", "pack", str(out), *flags, *order])
    data.main()
    printed = capsys.readouterr().out
    assert f"{out}: 16 pairs kept (12 train, 4 val, 0 test); skipped: none" in printed
    assert "mr: 1 files, chips 3 x 16 x 16 uint16, gsd 10" in printed
    meta = data.Store(out).meta
    assert meta["bands"] == ["B", "G", "R"]
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

    monkeypatch.setattr(data, "statistics", stop)
    monkeypatch.setattr(sys, "argv", ["data.py", "pack", "--mr", mr, "--hr", hr, mr + "/../store"])
    with pytest.raises(SystemExit) as exit_:
        data.main()
    assert exit_.value.code == 130
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1] == "data.py: interrupted; nothing was written"
    assert sorted(os.listdir(tmp_path)) == ["hr", "mr"]


def test_a_batch_reads_only_the_sensors_asked_for(tmp_path):
    store = data.Store(write_store(tmp_path / "s"))
    both = store.batch([3, 1])
    for sensor, other in (("mr", "hr"), ("hr", "mr")):
        batch = store.batch([3, 1], {sensor})
        assert other not in batch and batch[sensor].equal(both[sensor])
        assert batch["hr_origin"].equal(both["hr_origin"])
