import numpy as np
import pytest
from conftest import refused
from real_tasks import write_eolearn, write_ukis

from datasets import tasks
from datasets.tasks import load_folder
from imagery import raster
from imagery.bands import IGNORE

UTM = 32633


@pytest.fixture
def folder(tmp_path):
    """folder(stem, image, mask, place) writes a pair, place = (left, top); folder.load() reads."""

    class Folder:
        images, masks = tmp_path / "images", tmp_path / "masks"

        def __call__(self, stem, image, mask, place=None, crs=UTM, **options):
            for path in (self.images, self.masks):
                path.mkdir(exist_ok=True)
            transform = place and (10.0, 0.0, place[0], 0.0, -10.0, place[1])
            crs = crs if place else None
            raster.write(self.images / f"{stem}.tif", image, transform, crs, **options)
            raster.write(self.masks / f"{stem}.tif", mask, transform, crs)

        def lists(self, **splits):
            for split, stems in splits.items():
                (tmp_path / f"{split}.txt").write_text("\n".join(stems) + "\n")
            return tmp_path

        def classes(self, *names):
            (tmp_path / "classes.txt").write_text("\n".join(names) + "\n")
            return tmp_path / "classes.txt"

        def load(self, **options):
            return load_folder(self.images, self.masks, **{"tile": 8, **options})

    return Folder()


def pixels(rng, rows, cols, bands=2, dtype=np.uint16):
    return rng.integers(1, 1000, (bands, rows, cols)).astype(dtype)


def labels(rng, rows, cols, classes=3):
    return rng.integers(0, classes, (rows, cols)).astype(np.uint8)


@pytest.fixture
def three(folder):
    """Three scenes of odd size without georeference, one for each split."""
    rng = np.random.default_rng(0)
    written = {s: (pixels(rng, 19, 13), labels(rng, 19, 13)) for s in ("a", "b", "c")}
    for stem, (image, mask) in written.items():
        folder(stem, image, mask)
    folder.written, folder.splits = written, folder.lists(train=["a"], val=["b"], test=["c.tif"])
    return folder


# ---- reading ----------------------------------------------------------------------------------


def test_tiles_hold_every_pixel_once(three):
    task = three.load(splits=three.splits)
    assert task.images.shape == (18, 2, 8, 8) and task.images.dtype == np.float32
    assert task.labels.dtype == np.int16 and task.classes == ("0", "1", "2")
    for stem, (image, mask) in three.written.items():
        number = [f.path.stem for f in task.files].index(stem)
        found_image = np.full((2, 24, 16), np.nan)
        found_mask = np.full((24, 16), -9)
        for k in np.flatnonzero(task.origin[:, 0] == number):
            _, row, col = task.origin[k]
            assert row % 8 == col % 8 == 0
            found_image[:, row : row + 8, col : col + 8] = task.images[k]
            found_mask[row : row + 8, col : col + 8] = task.labels[k]
        assert np.array_equal(found_image[:, :19, :13], image)
        assert np.array_equal(found_mask[:19, :13], mask)
        assert np.isnan(found_image[:, 19:]).all() and np.isnan(found_image[:, :, 13:]).all()
        assert (found_mask[19:] == IGNORE).all() and (found_mask[:, 13:] == IGNORE).all()
    assert (task.labels != IGNORE).sum() == 3 * 19 * 13


def test_splits_from_lists_leave_out_the_unlisted(three):
    rng = np.random.default_rng(1)
    raster.write(three.images / "d.tif", pixels(rng, 8, 8))  # unlisted, so it needs no mask
    task = three.load(splits=three.splits)
    stems = np.array([f.path.stem for f in task.files])[task.origin[:, 0]]
    assert {*zip(stems, task.split, strict=True)} == {("a", "train"), ("b", "val"), ("c", "test")}


def test_bands_are_chosen_and_ordered(three):
    assert np.array_equal(
        three.load(splits=three.splits, bands=[1, 0]).images,
        three.load(splits=three.splits).images[:, ::-1],
        equal_nan=True,
    )


def test_globs_and_extensions(three):
    (three.images / "a.tif").rename(three.images / "a.TIFF")
    (three.images / "notes.txt").write_text("no image")
    files = three.load(splits=three.splits).files
    assert [file.path.name for file in files] == ["a.TIFF", "b.tif", "c.tif"]
    some = {"val": 0.34, "test": 0.33}
    found = load_folder(str(three.images / "[abc].*"), str(three.masks / "*.tif"), tile=8, **some)
    assert [file.path.name for file in found.files] == ["a.TIFF", "b.tif", "c.tif"]


def test_what_is_ignored(folder):
    rng = np.random.default_rng(0)
    image, mask = pixels(rng, 8, 32, dtype=np.float32), labels(rng, 8, 32)
    image[:, 0, 0] = 0  # nodata in all bands
    image[1, 0, 1] = 0  # a dark pixel in one band
    image[0, 0, 2], image[1, 0, 3] = np.nan, np.inf
    mask[0, 4] = 77
    image[:, :, 8:16] = 0  # a tile without data
    mask[:, 16:24] = 77  # a tile without labels
    for stem in "abc":
        folder(stem, image, mask, nodata=0)
    task = folder.load(ignore_index=77)
    assert len(task.images) == 3 * 2  # the two tiles without a label are dropped
    first = task.origin[:, 2] == 0
    assert (task.labels[first, 0, :5] == [IGNORE, mask[0, 1], IGNORE, IGNORE, IGNORE]).all()
    assert (task.labels[first] == IGNORE).sum() == 3 * 4
    missing = np.isnan(task.images[first, :, 0, :5])  # in both bands, whichever it was
    assert (missing == [True, False, True, True, False]).all()
    assert not np.isinf(task.images).any()


def test_nodata_of_a_mask_is_ignored(three):
    wanted = three.load(splits=three.splits)
    for stem, (_, mask) in three.written.items():
        mask[2:4, 5] = 255
        raster.write(three.masks / f"{stem}.tif", mask, nodata=255)
    task = three.load(splits=three.splits)
    assert task.nodata == (255,) and wanted.nodata == () and task.classes == wanted.classes
    first = (task.origin[:, 1:] == 0).all(1)
    assert (task.labels[first][:, 2:4, 5] == IGNORE).all()
    wanted.labels[np.flatnonzero(first)[:, None, None], [[2], [3]], [[5]]] = IGNORE
    assert np.array_equal(task.labels, wanted.labels)


@pytest.mark.parametrize("ids", [(0, 1, 3, 4), (4, 5), (1, 2), (0, 3), (0, 2, 4, 6), (0, 255)])
def test_without_names_the_ids_that_occur_are_the_classes(three, ids):
    for stem in "abc":
        mask = np.resize(ids, (19, 13)).astype(np.uint8)
        raster.write(three.masks / f"{stem}.tif", mask)
    task = three.load(splits=three.splits)
    assert task.classes == tuple(map(str, ids))
    assert np.array_equal(task.labels[0, 0, : len(ids)], np.arange(len(ids)))


@pytest.mark.parametrize("declared", [None, 0])
@pytest.mark.parametrize("named", [False, True])
def test_what_is_ignored_is_no_class(three, declared, named):
    """Ids 1 to 3, 0 and 255 without a label: three classes, and the labels of masks from 0 to 2."""
    wanted = three.load(splits=three.splits)
    for stem, (_, mask) in three.written.items():
        ids = np.where(mask == 1, 2, np.where(mask == 0, 1, 3)).astype(np.uint8)
        ids[2], ids[3] = 0, 255
        raster.write(three.masks / f"{stem}.tif", ids, nodata=declared)
    classes = three.classes("unlabelled", "a", "b", "c") if named else None
    ignored = (0, 255) if declared is None else 255
    task = three.load(splits=three.splits, ignore_index=ignored, classes=classes)
    assert task.classes == (("a", "b", "c") if named else ("1", "2", "3"))
    top = (wanted.origin[:, 1] == 0)[:, None] & np.isin(np.arange(8), (2, 3))  # (tile, row)
    wanted.labels[top] = IGNORE
    assert np.array_equal(task.labels, wanted.labels)


def test_a_mask_of_one_bit_has_two_classes(three):
    rasterio = pytest.importorskip("rasterio")
    for stem, (_, mask) in three.written.items():
        shape = dict(height=mask.shape[0], width=mask.shape[1], count=1, dtype="uint8", nbits=1)
        shape |= dict(transform=rasterio.Affine(10, 0, 0, 0, -10, 0), crs=UTM)
        with rasterio.open(three.masks / f"{stem}.tif", "w", driver="GTiff", **shape) as file:
            file.write((mask == 2).astype(np.uint8), 1)
    task = three.load(splits=three.splits)
    first = (task.origin[:, 1:] == 0).all(1)
    wanted = [mask[:8, :8] == 2 for _, mask in three.written.values()]
    assert task.classes == ("0", "1") and np.array_equal(task.labels[first], wanted)


def test_a_value_that_one_mask_declares_as_nodata_and_another_labels_is_a_class(three):
    raster.write(three.masks / "a.tif", three.written["a"][1], nodata=0)
    assert three.load(splits=three.splits).classes == ("0", "1", "2")
    names = three.classes("x", "y", "z")
    assert three.load(splits=three.splits, classes=names).classes == ("x", "y", "z")


def test_a_rounded_georeference_is_the_same_grid(three):
    for stem, (image, mask) in three.written.items():
        raster.write(three.images / f"{stem}.tif", image, (10.0, 0, 0, 0, -10.0, 5e6), UTM)
        place = (10.001, 0, 0.04, 0, -10.0, 5e6 + 0.05)
        raster.write(three.masks / f"{stem}.tif", mask, place, UTM)
    assert len(three.load(splits=three.splits).images) == 18


def test_band_stats_are_of_valid_pixels(folder):
    images = np.random.default_rng(0).normal(5, 2, (6, 3, 4, 4)).astype(np.float32)
    images[:, 2] = 7
    images[1:3, :, 2] = np.nan
    mean, std = tasks.band_stats(images)
    for band in range(3):
        values = images[:, band][~np.isnan(images[:, band])].astype(np.float64)
        assert mean[band] == pytest.approx(values.mean())
        assert std[band] == (1 if band == 2 else pytest.approx(values.std()))


def test_fingerprint_sees_pixels_labels_splits_and_names(three):
    task = three.load(splits=three.splits)
    prints = {tasks.fingerprint(task), tasks.fingerprint(three.load(splits=three.splits))}
    assert len(prints) == 1
    for name in ("images", "labels", "split"):
        array = getattr(task, name)
        before = array[0].copy()
        array[0] = "val" if name == "split" else 1
        prints.add(tasks.fingerprint(task))
        array[0] = before
    names = three.classes("x", "y", "z")
    prints.add(tasks.fingerprint(three.load(splits=three.splits, classes=names)))
    assert len(prints) == 5


# ---- splits by ground -------------------------------------------------------------------------


def cells(task, split):
    """Pixels of ground, 2 to an image pixel's side, that a split's tiles cover."""
    ground = set()
    for number, row, col in task.origin[task.split == split]:
        a, _, x, _, e, y = task.files[number].transform
        rows = min(8, task.files[number].height - row)
        cols = min(8, task.files[number].width - col)
        for i in range(2 * rows):
            for j in range(2 * cols):
                cx, cy = x + a * (col + (j + 0.5) / 2), y + e * (row + (i + 0.5) / 2)
                ground.add((round(cx / 2.5), round(cy / 2.5)))
    return ground


@pytest.mark.parametrize("seed", range(4))
def test_split_by_ground_shares_no_ground(folder, seed):
    rng = np.random.default_rng(0)
    folder("a", pixels(rng, 61, 64), labels(rng, 61, 64), place=(500000, 5000000))
    folder("a_again", pixels(rng, 61, 64), labels(rng, 61, 64), place=(500000, 5000000))
    # half a pixel and part of a tile off: its tiles straddle the blocks of the others
    folder("b", pixels(rng, 40, 40), labels(rng, 40, 40), place=(500000 + 305, 5000000 - 175))
    task = folder.load(block=2, split_seed=seed)
    train, val, test = (cells(task, split) for split in tasks.SPLITS)
    assert train and val and test
    assert not train & val and not train & test and not val & test
    # a place is in one split at all dates
    of = {}
    for number, row, col in task.origin[task.origin[:, 0] < 2]:
        found = task.split[(task.origin == [number, row, col]).all(1)]
        assert of.setdefault((row, col), found) == found
    # whole blocks: neighbours within one are never apart
    for (row, col), found in of.items():
        assert of.get((row // 16 * 16, col // 16 * 16), found) == found


def test_split_by_ground_drops_nothing_on_one_grid(folder):
    rng = np.random.default_rng(0)
    for i in range(2):
        place = (500000 + 640 * i, 5000000)
        folder(f"part_{i}", pixels(rng, 64, 64), labels(rng, 64, 64), place=place)
    task = folder.load(block=2)
    assert len(task.images) == 2 * 64
    assert "ground" in task.split_by
    assert [(task.split == s).sum() for s in tasks.SPLITS] == [20 * 4, 6 * 4, 6 * 4]


def test_filling_up_the_last_tiles_takes_no_ground(folder):
    rng = np.random.default_rng(0)
    for i in range(2):  # side by side; the first one's last tiles reach 40 m into the second
        place = (500000 + 600 * i, 5000000)
        folder(f"part_{i}", pixels(rng, 64, 60), labels(rng, 64, 60), place=place)
    assert all(len(folder.load(block=2, split_seed=s).images) == 2 * 64 for s in range(3))


def test_split_is_drawn_by_seed(folder):
    rng = np.random.default_rng(0)
    folder("a", pixels(rng, 64, 64), labels(rng, 64, 64), place=(500000, 5000000))
    first, again, other = (folder.load(block=2, split_seed=s).split for s in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("seed", range(3))
def test_one_ground_in_two_zones_is_in_one_split(folder, seed):
    """Points all over each tile lie in no tile of another split, in whichever zone it was cut."""
    rng, zones = np.random.default_rng(0), (UTM, UTM + 1)
    x, y = raster.project(f"EPSG:{UTM}", f"EPSG:{UTM + 1}", [740000.0], [5000000.0])
    places = (740000, 5000000), (float(x[0]) - 100, float(y[0]) + 50)
    for zone, place in zip(zones, places, strict=True):
        folder(f"{zone}", pixels(rng, 96, 96), labels(rng, 96, 96), place=place, crs=zone)
    task = folder.load(block=3, split_seed=seed)
    assert "ground" in task.split_by and {*task.split} == {"train", "val", "test"}
    assert {*task.origin[:, 0]} == {0, 1} and len(task.split) > 144  # of 288 tiles
    corner = np.array(places)[task.origin[:, 0]] + task.origin[:, :0:-1] * [10, -10]
    at = np.linspace(4, 76, 5)
    for mine, other in ((0, 1), (1, 0)):
        own, theirs = (task.origin[:, 0] == n for n in (mine, other))
        left, top = corner[theirs].T
        for (x0, y0), split in zip(corner[own], task.split[own], strict=True):
            x, y = np.meshgrid(x0 + at, y0 - at)
            crs = (f"EPSG:{zones[n]}" for n in (mine, other))
            x, y = (v[:, None] for v in raster.project(*crs, x.ravel(), y.ravel()))
            hit = ((x > left) & (x < left + 80) & (y < top) & (y > top - 80)).any(0)
            assert {*task.split[theirs][hit]} <= {split}


@pytest.mark.parametrize("crs", [[None] * 5, [UTM, None] * 3])
def test_without_common_ground_whole_images_are_split(folder, crs):
    rng = np.random.default_rng(0)
    for i in range(5):
        place = crs[i] and (500000 + 1000 * i, 5000000)
        folder(f"{i}", pixels(rng, 16, 16), labels(rng, 16, 16), place=place, crs=crs[i])
    task = folder.load(block=1)
    assert task.split_by == "image"
    for number in range(5):
        assert len({*task.split[task.origin[:, 0] == number]}) == 1


# ---- bad input --------------------------------------------------------------------------------


def spoil_not_a_tiff(f):
    (f.images / "b.tif").write_text("this is text")


def spoil_truncated(f):
    whole = (f.masks / "b.tif").read_bytes()
    (f.masks / "b.tif").write_bytes(whole[: len(whole) // 2])


def spoil_ids(f):
    mask = f.written["b"][1].copy()
    mask[0, 0], mask[0, 1] = 9, 255
    raster.write(f.masks / "b.tif", mask)


def spoil_negative(f):
    raster.write(f.masks / "b.tif", f.written["b"][1].astype(np.int16) - 1)


def spoil_fill_value(f):
    raster.write(f.masks / "b.tif", f.written["b"][1].astype(np.uint16) + 65533)


def spoil_size(f):
    raster.write(f.masks / "b.tif", f.written["b"][1][:-1])


def spoil_float(f):
    raster.write(f.masks / "b.tif", f.written["b"][1] + np.float32(0.5))


def spoil_mask_bands(f):
    raster.write(f.masks / "b.tif", np.stack([f.written["b"][1]] * 3))


def spoil_fill(f):
    mask = f.written["b"][1].copy()
    mask[3:5] = 255
    raster.write(f.masks / "b.tif", mask)


def spoil_missing(f):
    (f.masks / "b.tif").unlink()


def spoil_missing_image(f):
    (f.images / "b.tif").unlink()


def spoil_bands(f):
    raster.write(f.images / "b.tif", np.stack([f.written["b"][1]] * 3))


def spoil_twins(f):
    raster.write(f.images / "b.tiff", f.written["b"][0])


def spoil_labels(f):
    raster.write(f.masks / "b.tif", np.full((19, 13), 2, np.uint8))


def spoil_all_labels(f):
    for stem in "abc":
        raster.write(f.masks / f"{stem}.tif", np.full((19, 13), 2, np.uint8))


def spoil_all_but_one_class(f):
    for stem, (_, mask) in f.written.items():
        raster.write(f.masks / f"{stem}.tif", np.where(mask == 1, 255, 0).astype(np.uint8))


def spoil_nothing(f):
    pass


@pytest.mark.parametrize(
    "spoil, options, mentions",
    [
        (spoil_not_a_tiff, {}, ["images/b.tif"]),
        (spoil_truncated, {}, ["masks/b.tif"]),
        (spoil_ids, {"named": True}, ["masks/b.tif", "9, 255", "0, 1, 2;", "--ignore-index"]),
        (spoil_negative, {}, ["masks/b.tif", "values -1,", "--ignore-index"]),
        (spoil_fill_value, {}, ["masks/b.tif", "65533", "--classes"]),
        (spoil_size, {}, ["masks/b.tif", "18 x 13", "19 x 13"]),
        (spoil_float, {}, ["masks/b.tif", "float32"]),
        (spoil_mask_bands, {}, ["masks/b.tif", "3 bands"]),
        (spoil_fill, {}, ["masks/b.tif", "255", "--classes"]),
        (spoil_nothing, {"tile": 20}, ["--tile 20", "19 px"]),
        (spoil_missing, {}, ["images/b.tif", "masks"]),
        (spoil_missing_image, {}, ["images", " b,", "--splits"]),
        (spoil_bands, {}, ["b.tif", "2 bands expected (0,1)", "found 3", "--bands"]),
        (spoil_twins, {}, ["b.tiff", "b.tif,"]),
        (spoil_labels, {"ignore_index": 2}, ["val split"]),
        (spoil_all_labels, {"ignore_index": 2}, ["label"]),
        (spoil_all_labels, {}, ["masks", "class 2", "--ignore-index"]),
        (spoil_all_but_one_class, {"ignore_index": 255}, ["class 0", "--ignore-index"]),
        (
            spoil_all_but_one_class,
            {"ignore_index": 255, "named": True},
            ["class 0", "--ignore-index"],
        ),
        (spoil_nothing, {"bands": [0, 2]}, ["a.tif", "--bands 0,2", "2 bands"]),
        (spoil_nothing, {"bands": [-1]}, ["a.tif", "--bands -1", "from 0"]),
        (spoil_nothing, {"splits": None, "val": 0.5, "test": 0.5}, ["3 separate", "image"]),
        (spoil_nothing, {"splits": "nowhere"}, ["nowhere/train.txt"]),
        (spoil_nothing, {"classes": "nowhere.txt"}, ["nowhere.txt", "--classes"]),
    ],
)
def test_bad_input_is_told_in_one_sentence(three, spoil, options, mentions):
    spoil(three)
    options = {"splits": three.splits, **options}
    if options.pop("named", False):
        options["classes"] = three.classes("x", "y", "z")
    with refused((ValueError, FileNotFoundError), *mentions):
        three.load(**options)


def test_bad_lists(three):
    both = three.lists(train=["a", "b"])
    with refused(ValueError, both, "b is listed for train and for val"):
        three.load(splits=both)
    with refused(ValueError, "test split"):
        three.load(splits=three.lists(train=["a"], test=[""]))


def test_a_byte_order_mark_is_no_part_of_a_name(three):
    names = three.classes("x", "y", "z")
    for path in (three.splits / "train.txt", names):
        path.write_text(path.read_text(), encoding="utf-8-sig")
    assert three.load(splits=three.splits, classes=names).classes == ("x", "y", "z")


def test_bad_class_files(three):
    names = three.classes("x")
    names.write_bytes("prairie\nforêt\n".encode("latin-1"))
    with refused(ValueError, "classes.txt", "UTF-8", "byte 11"):
        three.load(classes=names)
    with refused(ValueError, "classes.txt", "line 2"):
        three.load(classes=three.classes("x", "", "z"))
    with refused(ValueError, "classes.txt", "x names"):
        three.load(classes=three.classes("x", "y", "x"))


def test_empty_folder(three, tmp_path):
    (tmp_path / "empty").mkdir()
    for where in (tmp_path / "empty", tmp_path / "*.png"):
        with refused(FileNotFoundError, where):
            load_folder(where, three.masks)


# ---- real labelled scenes ---------------------------------------------------------------------


def test_ukis_scene(real, tmp_path):
    write_ukis(real("ukis_csmask/sentinel2.npz").parent, tmp_path)
    task = load_folder(
        tmp_path / "images", tmp_path / "masks", classes=tmp_path / "classes.txt",
        bands=[0, 1, 2, 3], block=2,
    )  # fmt: skip
    assert task.images.shape == (64, 4, 64, 64)
    counts = np.bincount(task.labels.ravel(), minlength=5)
    assert counts.tolist() == [28583, 840, 0, 183124, 49597]
    assert {*task.split} == {*tasks.SPLITS}


def test_eolearn_land_cover_of_odd_size(real, tmp_path):
    write_eolearn(real("eolearn_testeopatch/LULC.npy").parent, tmp_path)
    task = load_folder(
        tmp_path / "images", tmp_path / "masks", classes=tmp_path / "classes.txt",
        bands=[1, 2, 3, 7], tile=20, block=1, ignore_index=0,
    )  # fmt: skip
    assert len(task.files) == 5 and task.images.shape[1:] == (4, 20, 20)
    assert (task.labels != IGNORE).sum() == 5 * (101 * 100 - 155)
    assert task.files[0].bounds == pytest.approx((465181.05, 5079244.89, 466180.53, 5080254.63))
    # all five dates of a place are in one split
    of = {}
    for (_, row, col), split in zip(task.origin, task.split, strict=True):
        assert of.setdefault((row, col), split) == split


def test_masks_on_another_grid_or_crs_are_warped(tmp_path, capsys):
    """Squares of two classes, drawn at 5 m in a larger frame, and by their ground in UTM 34."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    rows, cols = np.indices((32, 32))
    labels = (rows // 8 + cols // 8) % 2
    image = np.random.default_rng(0).integers(1, 9, (2, 32, 32)).astype(np.uint8)
    place = (10.0, 0.0, 500000.0, 0.0, -10.0, 4000000.0)
    half = np.kron(labels, np.ones((2, 2), int))
    finer = np.pad(half, 4, constant_values=7)
    about = raster.Info("x", 32, 32, 1, None, None, place, "EPSG:32633", ())
    x, y = raster.project("EPSG:32633", "EPSG:32634", *raster.corners(about))
    west, north = float(x.min()) - 20, float(y.max()) + 20
    size = int(max(np.ptp(x), np.ptp(y))) + 40
    east, south = np.meshgrid(west + np.arange(size) + 0.5, north - np.arange(size) - 0.5)
    x, y = raster.project("EPSG:32634", "EPSG:32633", east.ravel(), south.ravel())
    row, col = ((4000000 - y) // 10).astype(int), ((x - 500000) // 10).astype(int)
    inside = (np.minimum(row, col) >= 0) & (np.maximum(row, col) < 32)
    there = np.where(inside, labels[row.clip(0, 31), col.clip(0, 31)], 7).reshape(size, size)
    masks = {
        "a": (half, (5.0, 0, 500000.0, 0, -5.0, 4000000.0), 32633),
        "b": (finer, (5.0, 0, 499980.0, 0, -5.0, 4000020.0), 32633),
        "c": (there, (1.0, 0, west, 0, -1.0, north), 32634),
    }
    for name, (mask, at, crs) in masks.items():
        raster.write(tmp_path / f"images/{name}.tif", image, place, 32633)
        raster.write(tmp_path / f"masks/{name}.tif", mask.astype(np.uint8), at, crs)
    (tmp_path / "lists").mkdir()
    for split, name in zip(("train", "val", "test"), masks, strict=True):
        (tmp_path / f"lists/{split}.txt").write_text(name)
    task = tasks.load_folder(
        tmp_path / "images", tmp_path / "masks", tile=32, splits=tmp_path / "lists"
    )
    assert "3 of 3 masks are warped to their images' (nearest)" in capsys.readouterr().out
    assert task.labels.shape == (3, 32, 32)
    assert (task.labels[:2] == labels).all()
    assert (task.labels[2] == labels).mean() > 0.99  # 1 m pixels at the borders of squares
