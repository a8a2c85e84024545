"""The procedural scenes: functions of their seed, with sensors and labels on the same ground."""

import numpy as np
import pytest
from conftest import refused

from imagery import raster, scenes

SIZE = 96  # MR pixels a side: big enough for every class in four scenes
IDS = range(len(scenes.CLASSES))


@pytest.fixture(scope="module")
def four():
    """hr (4, 4, 192, 192), mr (4, 4, 96, 96), label (4, 96, 96)."""
    made = [scenes.scene(0, k, SIZE) for k in range(4)]
    return [np.stack(arrays) for arrays in zip(*made, strict=True)]


def roughness(images, labels, kind):
    """Deviation of NIR from its 5 x 5 mean, over the pixels of a class away from its edge."""
    nir = images[:, 3].astype(float)
    window = np.lib.stride_tricks.sliding_window_view
    pure = (window(labels, (5, 5), axis=(1, 2)) == kind).all((-2, -1))
    centre = nir[:, 2:-2, 2:-2] - window(nir, (5, 5), axis=(1, 2)).mean((-2, -1))
    return centre[pure].std()


def best_shift(moving, fixed, reach=3):
    """(rows, cols) by which `moving` (N, h, w) must be rolled to agree best with `fixed`."""
    inner = (slice(None), slice(reach, -reach), slice(reach, -reach))
    shifts = [(i, j) for i in range(-reach, reach + 1) for j in range(-reach, reach + 1)]
    score = [
        np.corrcoef(np.roll(moving, s, (1, 2))[inner].ravel(), fixed[inner].ravel())[0, 1]
        for s in shifts
    ]
    return shifts[int(np.argmax(score))]


# ---- the landscape and the sensors ---------------------------------------------------------------


def test_shapes_types_and_range(four):
    hr, mr, label = four
    assert hr.shape == (4, 4, 2 * SIZE, 2 * SIZE) and hr.dtype == np.uint16
    assert mr.shape == (4, 4, SIZE, SIZE) and mr.dtype == np.uint16
    assert label.shape == (4, SIZE, SIZE) and label.dtype == np.uint8
    assert all(1 <= image.min() and image.max() < 8000 for image in (hr, mr))  # reflectance < 0.8


def test_a_scene_is_a_function_of_seed_and_number(four):
    again = scenes.scene(0, 2, SIZE)
    for array, new in zip(four, again, strict=True):
        np.testing.assert_array_equal(array[2], new)
    for other in (scenes.scene(1, 2, SIZE), scenes.scene(2, 0, SIZE)):
        assert all((old != new).mean() > 0.3 for old, new in zip(again, other, strict=True))


def test_a_sensor_without_blur_averages_areas():
    truth = np.random.default_rng(0).random((4, 24, 24), dtype=np.float32)
    mr = scenes.sample(truth, 4, 0)
    for row in range(6):
        for col in range(6):
            block = truth[:, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
            np.testing.assert_allclose(mr[:, row, col], block.mean((1, 2)), rtol=1e-5)
    hr = scenes.sample(truth, 2, 0)
    np.testing.assert_allclose(hr.reshape(4, 6, 2, 6, 2).mean((2, 4)), mr, rtol=1e-5)
    np.testing.assert_allclose(scenes.sample(truth, 1, 0), truth, rtol=1e-6)


def test_the_point_spread_blurs_without_a_shift():
    point = np.zeros((1, 41, 41), np.float32)
    point[0, 20, 17] = 1
    seen = scenes.sample(point, 1, 1.5)[0]
    np.testing.assert_allclose(seen.sum(), 1, rtol=1e-5)
    rows, cols = np.indices(seen.shape)
    assert (seen * rows).sum() == pytest.approx(20, abs=1e-3)
    assert (seen * cols).sum() == pytest.approx(17, abs=1e-3)
    assert (seen * (rows - 20) ** 2).sum() == pytest.approx(1.5**2, rel=1e-3)
    flat = np.full((2, 12, 12), 0.3, np.float32)
    np.testing.assert_allclose(scenes.sample(flat, 2, 0.8), 0.3, rtol=1e-5)


def test_recorded_values_are_reflectance_times_10000():
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.1, 0.4, (4, 64, 64)).astype(np.float32)
    stored = scenes.record(rng, truth) / 1e4
    for band, expected in zip(stored, truth, strict=True):
        slope, offset = np.polyfit(expected.ravel(), band.ravel(), 1)
        assert abs(slope - 1) < 0.1 and abs(offset) < 0.015
        assert 0.002 < np.std(band - slope * expected - offset) < 0.004
    assert (scenes.record(rng, np.full((4, 8, 8), -1, np.float32)) == 1).all()  # 0 is for nodata


def test_labels_are_the_commonest_class_of_the_ground(four):
    _, ground = scenes.landscape(np.random.default_rng((0, 1)), SIZE)
    for row in range(0, SIZE, 5):
        for col in range(SIZE):
            cells = ground[4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
            count = np.bincount(cells.ravel(), minlength=8)
            assert count[four[2][1, row, col]] == count.max()


def test_sensors_and_labels_lie_on_the_same_ground(four):
    hr, mr, label = four
    water = (label == scenes.WATER).astype(float)
    assert best_shift(water, -mr[:, 3].astype(float)) == (0, 0)
    # in HR pixels: better than half an MR pixel
    assert best_shift(np.kron(water, np.ones((2, 2))), -hr[:, 3].astype(float)) == (0, 0)
    assert best_shift(mr[:, 3].repeat(2, 1).repeat(2, 2).astype(float), hr[:, 3]) == (0, 0)


def test_every_class_occurs(four):
    share = np.bincount(four[2].ravel(), minlength=len(IDS)) / four[2].size
    assert len(share) == len(IDS) and share.min() > 0.02 and share.max() < 0.5


def test_colour_gives_water_and_forest_away_but_not_the_crops(four):
    _, mr, label = four
    colour = mr.transpose(0, 2, 3, 1).reshape(-1, 4).astype(float)
    colour = (colour - colour.mean(0)) / colour.std(0)
    truth = label.ravel()
    centroid = np.stack([colour[truth == k].mean(0) for k in IDS])
    guess = ((colour[:, None] - centroid) ** 2).sum(2).argmin(1)
    iou = [((guess == k) & (truth == k)).sum() / ((guess == k) | (truth == k)).sum() for k in IDS]
    assert iou[scenes.WATER] > 0.8 and iou[scenes.FOREST] > 0.6
    similar = [scenes.ORCHARD, scenes.ROWS, scenes.STRIPS, scenes.MEADOW]
    assert np.mean([iou[k] for k in similar]) < 0.25


def test_rows_show_in_hr_and_hardly_in_mr_but_strips_in_both(four):
    hr, mr, label = four
    fine = label.repeat(2, 1).repeat(2, 2)
    rows, strips, meadow = (
        (roughness(hr, fine, k), roughness(mr, label, k))
        for k in (scenes.ROWS, scenes.STRIPS, scenes.MEADOW)
    )
    assert rows[0] > 2 * meadow[0]  # HR tells rows from grass by their texture
    assert rows[1] < 0.5 * rows[0]  # most of it is gone in MR
    assert strips[1] > 1.5 * meadow[1] and strips[1] > 0.7 * strips[0]


# ---- the files -----------------------------------------------------------------------------------


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def test_files_hold_the_scenes_and_their_place(tmp_path):
    out = tmp_path / "new" / "out"
    scenes.main([str(out), "--scenes", "2", "--size", "32", "--seed", "3"])
    assert sorted(contents(out)) == ["classes.txt"] + [
        f"{folder}/scene_{k:03d}.tif" for folder in ("hr", "masks", "mr") for k in range(2)
    ]
    assert (out / "classes.txt").read_text().split("\n")[scenes.STRIPS] == "strip crop"
    corners = []
    for k in range(2):
        arrays = dict(zip(("hr", "mr", "masks"), scenes.scene(3, k, 32), strict=True))
        infos = {name: raster.info(out / name / f"scene_{k:03d}.tif") for name in arrays}
        for name, array in arrays.items():
            stored = raster.read(out / name / f"scene_{k:03d}.tif")
            np.testing.assert_array_equal(stored, array.reshape(stored.shape))
            assert infos[name].dtype == array.dtype
            assert infos[name].bounds == infos["mr"].bounds
            assert infos[name].crs == infos["mr"].crs
        assert [infos[name].gsd for name in arrays] == [5, 10, 10]
        assert infos["hr"].band_names == infos["mr"].band_names == ("B", "G", "R", "NIR")
        assert infos["mr"].crs == "EPSG:32635"
        corners.append(infos["mr"].bounds)
    assert corners[0][2] < corners[1][0]  # right of the first is left of the second: no overlap


def test_scenes_never_share_ground():
    boxes = [scenes.corner(k, 100) for k in range(45)]
    for i, (x, y) in enumerate(boxes):
        assert all(max(abs(x - a), abs(y - b)) > 1000 for a, b in boxes[:i])


def test_the_number_of_scenes_changes_none_of_them(tmp_path):
    scenes.write_scenes(tmp_path / "three", 3, 16, seed=0)
    (tmp_path / "out").mkdir()  # empty: nothing to lose
    scenes.write_scenes(tmp_path / "out", 2, 16, seed=0)
    three, two = contents(tmp_path / "three"), contents(tmp_path / "out")
    assert two == {name: data for name, data in three.items() if "_002" not in name}


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    scene = scenes.scene

    def stop(seed, k, size, kind):
        if k == 1:
            raise KeyboardInterrupt
        return scene(seed, k, size)

    monkeypatch.setattr(scenes, "scene", stop)
    with pytest.raises(KeyboardInterrupt):
        scenes.write_scenes(tmp_path / "out", 2, 16, seed=1)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("name", ["notes.txt", "hr/scene_000.tif"])
def test_a_folder_that_holds_anything_is_refused(tmp_path, name):
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    with refused(SystemExit, "python -m imagery.scenes: ", tmp_path / "out"):
        scenes.main([str(tmp_path / "out"), "--scenes", "1", "--size", "16"])
    assert foreign.read_text() == "mine"


def test_a_file_in_the_way_and_bad_flags_are_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for words, *mentions in (
        ([tmp_path / "file"], tmp_path / "file"),
        ([tmp_path / "new", "--scenes", "0"], "--scenes 0", "1"),
        ([tmp_path / "new", "--size", "8"], "--size 8", "16"),
        ([tmp_path / "new", "--seed", "-1"], "--seed -1", "0"),
    ):
        with refused(SystemExit, *mentions):
            scenes.main([*map(str, words)])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---- rows: texture alone -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rowed():
    made = [scenes.scene(0, k, SIZE, "rows") for k in range(4)]
    return [np.stack(arrays) for arrays in zip(*made, strict=True)]


def test_rows_have_every_class_and_one_band(rowed):
    hr, mr, label = rowed
    assert hr.shape == (4, 1, 2 * SIZE, 2 * SIZE) and mr.shape == (4, 1, SIZE, SIZE)
    shares = np.bincount(label.ravel(), minlength=5) / label.size
    assert len(shares) == 5 and shares.min() > 0.05


def test_brightness_does_not_tell_rows_apart(rowed):
    _, mr, label = rowed
    means = [mr[:, 0][label == kind].mean() for kind in range(5)]
    assert np.ptp(means) < 0.5 * mr.std()


def test_hr_resolves_rows_that_mr_hardly_shows(rowed):
    hr, mr, label = rowed
    window = np.lib.stride_tricks.sliding_window_view

    def contrast(image, kind, side):
        """Mean deviation within windows that lie wholly in parcels of a class."""
        labels = label.repeat(image.shape[-1] // SIZE, 1).repeat(image.shape[-1] // SIZE, 2)
        pure = (window(labels, (side, side), axis=(1, 2)) == kind).all((-2, -1))
        return window(image[:, 0], (side, side), axis=(1, 2))[pure].std((-2, -1)).mean()

    fine, coarse = (
        np.array([contrast(image, kind, side) for kind in range(5)])
        for image, side in ((hr, 14), (mr, 7))
    )
    assert (fine[:4] > 3 * fine[4]).all()  # of all periods
    assert coarse[0] < 1.5 * coarse[4] < coarse[3]  # 12 m as if there were no rows, 34 m not


def test_contrast_that_sensors_leave_is_what_is_said():
    side = np.arange(1024) * scenes.GROUND
    for period, fine, coarse in ((34, 0.94, 0.66), (24, 0.89, 0.44), (17, 0.80, 0.19)):
        waves = [np.sin(2 * np.pi * (np.cos(a) * side[:, None] + np.sin(a) * side) / period)
                 for a in (0.2, 0.9, 1.5)]  # fmt: skip
        truth = np.float32(waves).reshape(3, 512, 2, 512, 2).mean((2, 4))
        for factor, blur, left in ((1, 0.4, fine), (2, 0.8, coarse)):
            seen = scenes.sample(truth, factor, blur)[:, 20:-20, 20:-20]
            assert abs(seen.std() / np.sqrt(0.5) - left) < 0.03


def test_hr_can_lie_beside_its_place(tmp_path):
    """Misregistration on purpose: in HR pixels, to the east; MR and labels stay."""
    for name, shift in (("right", 0), ("wrong", 2)):
        scenes.write_scenes(tmp_path / name, 1, 64, 3, "rows", shift)
    read = {n: [raster.read(tmp_path / n / k / "scene_000.tif") for k in ("hr", "mr", "masks")]
            for n in ("right", "wrong")}  # fmt: skip
    (hr, mr, mask), (moved, *others) = read["right"], read["wrong"]
    assert np.array_equal(moved, np.roll(hr, 2, -1)) and not np.array_equal(moved, hr)
    assert np.array_equal(mr, others[0]) and np.array_equal(mask, others[1])
