"""data.py: crops agree with the ground, batches and order are exact; every message."""

import json
import os
import shutil
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from landscape import RNG, pair, shift_between
from safetensors.numpy import load_file
from stores import crop_pairs, pixels, write_store

import data
from datasets.folder import read_geotiff
from imagery import pack

SHARED = Path(os.environ.get("CROSSSCALE_SHARED", Path(__file__).parents[2] / "shared")) / "data"


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


def test_resample_of_many_images_is_that_of_each():
    """More than are taken at a time, enlarged and shrunk in one batch, so that a kernel's band is
    wider than one of them needs."""
    images = torch.rand(19, 2, 30, 40, generator=torch.Generator().manual_seed(2))
    side = torch.linspace(3, 30, 19).double()
    windows = torch.stack([30 - side, 0 * side, side, side], 1)
    out = data.resample(images, windows, (11, 9))
    for image, window, found in zip(images, windows, out, strict=True):
        alone = data.resample(image[None], window[None], (11, 9))[0]
        assert torch.allclose(found, alone, atol=1e-5)


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


@pytest.mark.parametrize(
    "hr_gsd, hr_shift",
    [(5.0, (0, 0)), (5.0, (-7.3, 3.9)), (3.0, (-1.0, 2.0)), (10 / 3, (-4.4, 9.1)), (2.5, (-3, 1))],
)
def test_crops_show_the_same_ground(tmp_path, hr_gsd, hr_shift):
    """For grids that are offset by any fraction of a pixel and any ratio of pixel sizes."""
    mr, hr = pair(tmp_path, hr_gsd, (0, 0), hr_shift, side=96, hr_side=int(980 / hr_gsd))
    meta = pack.pack(read_geotiff(mr, hr), tmp_path / "store", chip=32, val=0)
    assert np.allclose(meta["pixel_ratio"], 10 / hr_gsd, rtol=1e-12)
    store = data.Store(tmp_path / "store")
    assert len(store) == 9
    crops = data.draw_crops(0, 0, 9)
    a, b = crop_pairs(store, np.arange(9), crops, 48, 48)
    assert a.shape == b.shape == (9, 2, 48, 48) and a.dtype == b.dtype == torch.float32
    for i in range(9):
        # pixels of the output -> MR pixels
        scale = crops[i, 2:] * 32 / 48
        assert np.abs(shift_between(a[i, 0].numpy(), b[i, 0].numpy()) * scale).max() < 0.02
    store._window[:, :2] += 0.5 * 10 / hr_gsd  # a plain mistake of half an MR pixel shows
    _, b = crop_pairs(store, np.arange(9), crops, 48, 48)
    scale = crops[0, 2:] * 32 / 48
    assert np.allclose(shift_between(a[0, 0].numpy(), b[0, 0].numpy()) * scale, -0.5, atol=0.05)


def test_crops_of_either_sensor_stand_in_for_the_other(tmp_path):
    mr, hr = pair(tmp_path, side=64)
    meta = pack.pack(read_geotiff(mr, hr), tmp_path / "store", chip=32, val=0)
    store = data.Store(tmp_path / "store")
    batch = store.batch([0, 3])
    whole = np.array([[0, 0, 1, 1.0]] * 2)

    def normal(sensor):
        mean, std = (np.array(meta[k][sensor])[:, None, None] for k in ("mean", "std"))
        return (batch[sensor].numpy() - mean) / std

    a, b = crop_pairs(store, [0, 3], whole, 32, 64)
    assert np.allclose(a, normal("mr"), atol=1e-4)
    assert np.allclose(b, normal("hr"), atol=1e-4)
    a, _ = crop_pairs(store, [0, 3], whole, 32, mr_from="hr")
    small = F.interpolate(torch.tensor(normal("hr")), (32, 32), mode="bicubic", antialias=True)
    assert np.allclose(a, small, atol=1e-4)
    _, b = crop_pairs(store, [0, 3], whole, 32, 64, hr_from="mr")
    large = F.interpolate(torch.tensor(normal("mr")), (64, 64), mode="bicubic", antialias=True)
    assert np.allclose(b, large, atol=1e-4)


def test_batch_keeps_order_and_repeats(tmp_path):
    mr, hr = pair(tmp_path)
    pack.pack(read_geotiff(mr, hr), tmp_path / "store", chip=16, val=0)
    store = data.Store(tmp_path / "store")
    batch = store.batch(np.array([5, 0, 5, 12]))
    assert batch["mr"].dtype == torch.uint16
    assert batch["has_hr"].tolist() == [True] * 4 and batch["has_hr"].dtype == torch.bool
    assert batch["hr_window"].shape == (4, 4) and batch["hr_window"].dtype == torch.float64
    assert batch["hr_window"].tolist() == [[0, 0, 32, 32]] * 4
    for i, chip in enumerate([5, 0, 5, 12]):
        for sensor in ("mr", "hr"):
            assert np.array_equal(batch[sensor][i], pixels(tmp_path / "store", sensor)[chip])


def test_batch_is_the_rows_one_by_one_and_zeros_without_hr(tmp_path):
    """Of two shards, read as their format says it."""
    path = write_store(tmp_path / "store", chips=8, pairs=[6, 1, 4])
    store = data.Store(path)
    files = [load_file(path / shard["file"]) for shard in store.meta["shards"]]
    assert [len(file["mr"]) for file in files] == [4, 4]
    mr, hr = (np.concatenate([file[sensor] for file in files]) for sensor in ("mr", "hr"))
    indices = np.array([4, 0, 6, -7, 6, 3, -1])  # from the end, too, as an array's
    batch = store.batch(indices)
    for i, chip in enumerate(indices % 8):
        assert np.array_equal(batch["mr"][i], mr[chip])
        paired = chip in (1, 4, 6)
        assert bool(batch["has_hr"][i]) == paired
        one = hr[[1, 4, 6].index(chip)] if paired else np.zeros_like(hr[0])
        assert np.array_equal(batch["hr"][i], one)
        assert batch["hr_window"][i].tolist() == ([0, 0, 32, 32] if paired else [0] * 4)
    with pytest.raises(IndexError):
        store.batch([8])


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    pack.pack(read_geotiff(*pair(folder)), folder / "store", chip=16, val=0)
    return folder / "store"


def test_no_store(tmp_path):
    with refused(FileNotFoundError, f"{tmp_path / 'none'}: ", "no such folder"):
        data.Store(tmp_path / "none")
    (tmp_path / "none").mkdir()
    with refused(FileNotFoundError, f"{tmp_path / 'none'}: ", "meta.json"):
        data.Store(tmp_path / "none")


def test_a_store_of_version_2_is_told_how_to_pack_it(whole_store, tmp_path):
    store = shutil.copytree(whole_store, tmp_path / "store")
    old = {"format": data.FORMAT, "version": 2}
    old |= {"provenance": {"command": "data.py pack --mr 'my files' out"}}
    (store / "meta.json").write_text(json.dumps(old))
    again = "python data.py pack --mr 'my files' out --overwrite"
    with refused(ValueError, f"{store / 'meta.json'}: ", "version 3", "2 found", again):
        data.Store(store)


SHARD = "0000000-00000.safetensors"


@pytest.mark.parametrize(
    "name, change, mention",
    [
        ("meta.json", lambda content: content[:200], ""),
        ("meta.json", lambda content: b"\xff" + content, ""),
        ("meta.json", lambda content: b"[" + content + b"]", ""),
        ("meta.json", lambda content: content.replace(b'"std"', b'"dts"'), "digest"),
        ("meta.json", lambda content: content.replace(b'"mr": 10.0', b'"mr": 30.0'), "digest"),
        ("index.csv", lambda content: b"".join(content.splitlines(True)[:-2]), "digest"),
        ("index.csv", lambda content: content.replace(b",train,", b",val,", 1), "digest"),
        (SHARD, lambda content: b"", "bytes expected, 0 found"),
        (SHARD, lambda content: content[:-10], "bytes expected"),
        (SHARD, lambda content: content.replace(b'"U16"', b'"I16"'), "header"),
        (SHARD, lambda content: b"\xff" * 8 + content[8:], "header"),
    ],
)
def test_a_file_of_a_store_that_is_damaged(whole_store, tmp_path, name, change, mention):
    store = shutil.copytree(whole_store, tmp_path / "store")
    content = (store / name).read_bytes()
    assert change(content) != content
    (store / name).write_bytes(change(content))
    with refused(ValueError, f"{store / name}: ", mention):
        data.Store(store)
    (store / name).unlink()
    with refused(FileNotFoundError if name == "meta.json" else ValueError, store, name):
        data.Store(store)


def test_a_header_that_claims_more_than_the_file(whole_store, tmp_path):
    """Before any memory is taken, and whatever digests say: a shard of others has none."""
    path = shutil.copytree(whole_store, tmp_path / "store") / SHARD
    content = path.read_bytes()
    for old, new in ((b'"shape":[16', b'"shape":[99'), (b'"shape":[16', b'"shape":[10')):
        new = content.replace(old.replace(b":", b": "), new.replace(b":", b": "))
        assert new != content
        path.write_bytes(new)
        with refused(ValueError, path):
            data.open_shard(path.parent, {"file": path.name})
    for size in (2**40, len(content)):
        path.write_bytes(size.to_bytes(8, "little") + content[8:])
        with refused(ValueError, path):
            data.open_shard(path.parent, {"file": path.name})


def test_verify_names_the_chips_of_every_flip(whole_store, tmp_path):
    store = shutil.copytree(whole_store, tmp_path / "store")
    assert list(data.verify(store)) == []
    content = (store / SHARD).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    for name, about in header.items():
        if name == "__metadata__":
            continue
        begin, end = about["data_offsets"]
        each = (end - begin) // 16
        for chip in (0, 7, 15):
            at = start + begin + chip * each + RNG.integers(each)
            (store / SHARD).write_bytes(
                content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]
            )
            (line,) = data.verify(store)
            assert list(data.verify(store, 1, 2)) == []  # that part has no shard
            row, col = 16 * (chip // 4), 16 * (chip % 4)
            assert f"chip {chip} (" in line and f"at row {row}, column {col})" in line
            assert "mr/a.tif and " in line and "hr/a.tif" in line
    for at in (9, start - 9):  # of the header: all chips in it
        (store / SHARD).write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        assert len(list(data.verify(store))) == 17
    with pytest.raises(ValueError, match=f"{store / SHARD}.*14 more: damaged since it was packed"):
        look = data.verify_beside([whole_store, store])
        for _ in range(200):
            look()
            time.sleep(0.05)


def test_a_batch_reads_only_the_sensors_asked_for(tmp_path):
    store = data.Store(write_store(tmp_path / "s"))
    both = store.batch([3, 1])
    for sensor, other in (("mr", "hr"), ("hr", "mr")):
        batch = store.batch([3, 1], {sensor})
        assert other not in batch and batch[sensor].equal(both[sensor])
        assert batch["hr_window"].equal(both["hr_window"])


# chips without HR, HR with other bands, several stores


def test_chips_without_hr(tmp_path):
    whole = data.Store(write_store(tmp_path / "whole"))
    part = data.Store(write_store(tmp_path / "part", pairs=[9, 2, 5]))
    assert len(part) == 16 and part.has_hr.nonzero()[0].tolist() == [2, 5, 9]
    batch, every = part.batch([5, 3, 9, 5]), whole.batch([5, 3, 9, 5])
    assert batch["has_hr"].tolist() == [True, False, True, True]
    assert batch["mr"].equal(every["mr"])
    for i in range(4):
        assert batch["hr"][i].equal(every["hr"][i] if i != 1 else torch.zeros_like(every["hr"][i]))
    assert data.read_crops([part], np.empty((0, 2), int), "hr", np.empty((0, 4)), 24) == []


def test_a_store_of_mr_alone(tmp_path):
    store = data.Store(write_store(tmp_path / "s", pairs=[]))
    assert store.sensors == ["mr"] and not store.has_hr.any() and len(store.split("train")) == 14
    batch = store.batch([1, 2])
    assert "hr" not in batch


def test_hr_share_is_exact_reproducible_and_nested(tmp_path):
    path = write_store(tmp_path / "s", chips=64)
    whole = data.Store(path).has_hr
    train = data.Store(path).split("train")
    shares = [data.Store(path, share, seed=1).has_hr for share in (0.0, 0.1, 0.25, 0.5, 1.0)]
    assert [has[train].sum() for has in shares] == [0, 6, 14, 28, 56]
    assert all((few <= many).all() for few, many in pairwise(shares))
    assert (shares[2] == data.Store(path, 0.25, seed=1).has_hr).all()
    assert (shares[2] != data.Store(path, 0.25, seed=2).has_hr).any()
    held_out = np.setdiff1d(np.arange(64), train)
    assert (shares[0][held_out] == whole[held_out]).all()
    batch = data.Store(path, 0.25, seed=1).batch(train)
    assert batch["has_hr"].sum() == 14 and not batch["hr"][~batch["has_hr"]].any()


@pytest.mark.parametrize("hr_bands", ["B G R NIR", "VH B", "VH VV", "B"])
def test_hr_has_the_bands_that_it_has(tmp_path, hr_bands):
    path = write_store(tmp_path / "s", bands=["VV", "VH"], hr_bands=hr_bands.split(), ratio=3)
    store, chips = data.Store(path), data.open_chips([path], pairs=1)
    assert chips.bands == store.meta["bands"] == {"mr": ["VV", "VH"], "hr": hr_bands.split()}
    mr, hr = crop_pairs(store, [3, 1], [[0, 0, 1, 1]] * 2, 16, 48)
    for sensor, images in (("mr", mr), ("hr", hr)):
        stored = store.batch([3, 1], {sensor})[sensor].float()
        mean, std = (torch.tensor(store.meta[k][sensor])[:, None, None] for k in ("mean", "std"))
        torch.testing.assert_close(images, (stored - mean) / std, rtol=0, atol=1e-4)


def test_bands_are_chosen_by_name():
    images = torch.arange(6.0).view(1, 3, 1, 2) + 1
    own = ["B", "G", "R"]
    assert data.choose_bands(images, own, own) is images
    found = data.choose_bands(images, own, ["R", "NIR", "B"])
    assert found.equal(torch.stack([images[:, 2], 0 * images[:, 0], images[:, 0]], 1))
    assert data.choose_bands(images, own, ["G"]).equal(images[:, 1:2])


def test_flags(tmp_path):
    path = write_store(tmp_path / "s")
    assert not data.Store(path).flagged.any()
    (path / "flags.csv").write_text("chip,reason\n3,shift\n7,shift\n3,again\n")
    assert data.Store(path).flagged.nonzero()[0].tolist() == [3, 7]
    for text in ("chip,reason\n99,shift\n", "number\n3\n", "chip,reason\nthree,shift\n"):
        (path / "flags.csv").write_text(text)
        refused(path, "flags.csv", "")


def test_crops_of_several_stores_keep_their_order(tmp_path):
    stores = [
        data.Store(write_store(tmp_path / "a", size=16)),
        data.Store(write_store(tmp_path / "b", size=20, ratio=3, pairs=[4, 1], seed=1)),
    ]
    chips = np.array([[1, 4], [0, 3], [1, 1], [0, 3], [1, 1]])
    crops = data.draw_crops(0, 0, 5)
    for sensor in ("mr", "hr"):
        images = data.render(data.read_crops(stores, chips, sensor, crops, 12))
        assert images.shape == (5, 4, 12, 12)
        for i in range(5):
            each = slice(i, i + 1)
            alone = data.render(data.read_crops(stores, chips[each], sensor, crops[each], 12))
            torch.testing.assert_close(images[each], alone)
    # statistics of a teacher's own
    own = ([5.0] * 4, [2.0] * 4)
    plain = data.render(data.read_crops(stores, chips, "mr", crops, 12, ([0.0] * 4, [1.0] * 4)))
    torch.testing.assert_close(
        data.render(data.read_crops(stores, chips, "mr", crops, 12, own)), (plain - 5) / 2
    )


@pytest.mark.parametrize("count, batch", [(7, 3), (4, 4), (2, 5), (30, 8)])
def test_next_pairs_are_the_next_ones_in_the_global_order(count, batch):
    """Against a plain walk; never the chip's own HR, and whatever the batch is cut into."""
    has_hr = np.random.default_rng(count).random(count) < 0.6
    has_hr[:2] = True
    whole = np.concatenate([data.sample_order(3, step, batch, count) for step in range(40)])
    for step in range(4):
        found = data.next_pairs(3, step, batch, has_hr)
        for place in range(batch):
            at = step * batch + place
            later = (c for c in whole[at + 1 :] if has_hr[c] and c != whole[at])
            assert found[place] == next(later)


def test_a_stream_reads_ahead_in_order_and_passes_errors_on():
    seen = []

    def prepare(step):
        seen.append(step)
        if step == 5:
            raise ValueError("a damaged file")
        return [{"x": torch.tensor([step]), "share": 0.5, "none": None, "two": (torch.ones(1),)}]

    cpu = torch.device("cpu")
    steps = data.stream(prepare, 2, 4, cpu)
    (first,) = next(steps)
    assert first["x"] == 2 and first["share"] == 0.5 and first["none"] is None
    assert [part["x"].item() for (part,) in steps] == [3] and seen == [2, 3]
    assert list(data.stream(prepare, 3, 3, cpu)) == []
    with pytest.raises(ValueError, match="a damaged file"):
        list(data.stream(prepare, 4, 7, cpu))
