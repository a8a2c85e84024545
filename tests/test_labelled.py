import hashlib
import json
import os
import shutil
import time
import zipfile

import h5py
import layouts
import numpy as np
import pytest
from conftest import refused

from datasets import common, geobench, tasks
from datasets.common import sets
from datasets.tasks import SPLITS, load_task
from imagery import raster
from imagery.bands import IGNORE, positions

TASKS = sets("TASKS")
TILE = 8  # of layouts' 12 to 24 px, so that some tiles reach beyond the image

CLASS = {  # mask value -> class, spelled out
    "mados": lambda value: value - 1,
    "marida": lambda value: 6 if value >= 12 else value - 1,
    "m-cashew-plantation": lambda value: value,
    "m-sa-crop-type": lambda value: value,
    "pastis": lambda value: IGNORE if value in (0, 19) else value - 1,
    "sen1floods11": lambda value: value,
    "substation": lambda value: 1 if value == 3 else 0,
}
BANDS = {  # in the files' order
    "mados": "B01 B G R B05 B06 B07 NIR B8A B11 B12",
    "marida": "B01 B G R B05 B06 B07 NIR B8A B11 B12",
    "m-cashew-plantation": "B01 B G R B05 B06 B07 NIR B8A B09 B11 B12",
    "m-sa-crop-type": "B01 B G R B05 B06 B07 NIR B8A B09 B11 B12",
    "pastis": "B G R B05 B06 B07 NIR B8A B11 B12",
    "sen1floods11": "B01 B G R B05 B06 B07 NIR B8A B09 B10 B11 B12",
    "substation": "B01 B G R B05 B06 B07 NIR B8A B09 B10 B11 B12",
}


@pytest.fixture(params=list(TASKS))
def name(request):
    return request.param


@pytest.fixture
def write(tmp_path):
    """write(name, ...) -> (root, truth) of a tiny set."""

    def write(name, **options):
        return tmp_path, layouts.WRITERS[name](tmp_path, np.random.default_rng(0), **options)

    return write


def find(root, pattern):
    return sorted(root.rglob(pattern))[0]


# ---- pixels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bands", [None, ["B12", "B02", "b8a"]])
def test_every_pixel_is_where_the_publisher_has_it(write, name, bands):
    root, truth = write(name)
    task = load_task(name, root, bands=bands, tile=TILE)
    names = BANDS[name].split()
    positions = [
        names.index(b) for b in (["B", "G", "R", "NIR"] if not bands else ["B12", "B", "B8A"])
    ]
    assert task.positions == tuple(positions)
    assert task.bands == tuple(names[p] for p in positions)
    assert (task.name, task.file_bands, task.gsd) == (name, len(names), 10)
    assert task.images.dtype == np.float32 and task.labels.dtype == np.int16
    assert len(task.files) == len(truth)
    tiles = 0
    for number, sample in enumerate(sorted(truth)):
        split, image, mask = truth[sample]
        image = image[..., positions, :, :]
        rows, cols = mask.shape
        assert (task.files[number].height, task.files[number].width) == (rows, cols)
        for row in range(0, rows, TILE):
            for col in range(0, cols, TILE):
                label = np.full((TILE, TILE), IGNORE)
                pixels = np.full((*image.shape[:-2], TILE, TILE), np.nan)
                for i in range(min(TILE, rows - row)):
                    for j in range(min(TILE, cols - col)):
                        value = int(mask[row + i, col + j])
                        label[i, j] = CLASS[name](value)
                        pixels[..., i, j] = image[..., row + i, col + j]
                found = np.flatnonzero((task.origin == [number, row, col]).all(1))
                assert len(found) == (label != IGNORE).any()
                if not len(found):
                    continue
                tiles += 1
                (k,) = found
                assert np.array_equal(task.labels[k], label)
                assert task.split[k] == split
                got = task.images[k]
                if name == "pastis":  # dates that only others have
                    assert np.isnan(got[len(pixels) :]).all()
                    got = got[: len(pixels)]
                assert np.array_equal(got, pixels, equal_nan=True)
    assert tiles == len(task.images) == len(task.labels) == len(task.origin)


def test_protocol_tiles():
    sides = {name: about.tile for name, about in TASKS.items()}
    assert sides == {
        "mados": 80, "marida": 64, "m-cashew-plantation": 64, "m-sa-crop-type": 64, "pastis": 64,
        "sen1floods11": 64, "substation": None,
    }  # fmt: skip


def test_whole_images_where_the_protocol_says_so(write):
    root, truth = write("substation")
    assert load_task("substation", root).images.shape == (len(truth), 4, 12, 12)


def test_mados_sorts_wavelengths_as_numbers_of_either_satellite(write):
    root, truth = write("mados")
    task = load_task("mados", root, bands=BANDS["mados"].split(), tile=24)
    assert {*task.classes} == {*TASKS["mados"].classes} and len(task.classes) == 15
    first = [f.path.name for f in task.files]
    assert first[0] == "Scene_0_L2R_cl_1.tif" and "Scene_12_L2R_cl_1.tif" in first
    for number, sample in enumerate(sorted(truth)):
        k = np.flatnonzero(task.origin[:, 0] == number)[0]
        assert np.array_equal(task.images[k], truth[sample][1], equal_nan=True)


def test_marida_counts_water_of_four_kinds_as_marine_water():
    assert TASKS["marida"].classes[6] == "Marine Water" and len(TASKS["marida"].classes) == 11


def test_dark_pixels_are_no_holes(write):
    root, _ = write("sen1floods11")
    task = load_task("sen1floods11", root, tile=20)
    assert (task.images[:, 2, 2, 2] == 0).all()  # red is 0, the other bands are not
    assert np.isnan(task.images[:, :, 4, :3]).all()
    assert task.labels.shape[0] == 4  # the publisher's labels stay where the image has no data


# ---- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [18, 19, 20])
def test_pastis_classes(write, classes):
    root, truth = write("pastis")
    task = load_task("pastis", root, tile=16, pastis_classes=classes)
    assert len(task.classes) == classes
    assert task.classes[0] == ("Meadow" if classes == 18 else "Background")
    assert task.classes[-1] == ("Void" if classes == 20 else "Sorghum")
    for k, sample in enumerate(sorted(truth)):
        mask = truth[sample][2].astype(int)
        for value in range(20):
            wanted = IGNORE if value == 19 else value - 1 if classes == 18 else value
            assert (task.labels[k][mask == value] == wanted).all()


@pytest.mark.parametrize("dates, wanted", [(1, [0]), (2, [0, 6]), (3, [0, 3, 6]), (9, range(7))])
def test_dates_are_spread_evenly(write, dates, wanted):
    root, truth = write("pastis")
    task = load_task("pastis", root, tile=16, dates=dates)
    assert task.images.shape[1] == min(dates, 7)
    k = sorted(truth).index("10035")  # the patch of fold 5, with 7 dates
    assert np.array_equal(task.images[k], truth["10035"][1][list(wanted)][:, [0, 1, 2, 6]])
    short = sorted(truth).index("10007")  # 3 dates
    assert np.isnan(task.images[short, 3:]).all()
    assert not np.isnan(task.images[short, :3]).any()


def test_series_of_few_dates_are_whole(write):
    root, truth = write("pastis")
    short = load_task("pastis", root, tile=16, dates=5).images[sorted(truth).index("10007")]
    assert np.array_equal(short[:3], truth["10007"][1][:, [0, 1, 2, 6]])


def test_substation_without_lists_is_drawn_by_seed(write):
    root, _ = write("substation", splits=False)
    first, again, other = (load_task("substation", root, split_seed=s) for s in (1, 1, 2))
    assert [np.sum(first.split == split) for split in SPLITS] == [6, 2, 2]
    assert first.split_hash == again.split_hash != other.split_hash
    assert np.array_equal(first.split, again.split)


@pytest.mark.parametrize("extra", ["", "MADOS"])
def test_root_is_the_set_or_holds_it(write, extra):
    root, _ = write("mados")
    assert len(load_task("mados", root / extra, tile=24).images) == 6


@pytest.mark.parametrize(
    "folder", ["m-cashew-plantation", "segmentation_v0.9.1/m-cashew-plantation"]
)
def test_both_names_of_the_cashew_folder(write, folder):
    root, _ = write("m-cashew-plantation")
    (root / folder).parent.mkdir(exist_ok=True)
    (root / "m-cashew-plant").rename(root / folder)
    assert len(load_task("m-cashew-plantation", root, tile=20).images) == 5


def test_a_partition_of_all_training_samples_will_do(write):
    root, truth = write("m-sa-crop-type")
    path = find(root, "default_partition.json")
    path.rename(path.with_name("1.00x_train_partition.json"))
    assert len(load_task("m-sa-crop-type", root, tile=20).images) == len(truth)


def test_images_of_a_later_substation_download(write):
    root, truth = write("substation")
    (root / "Substation/image_stack").rename(root / "Substation/images")
    assert len(load_task("substation", root).images) == len(truth)


# ---- statistics and splits --------------------------------------------------------------------


def test_published_statistics(write):
    for name in ("mados", "marida", "sen1floods11", "substation"):
        root, _ = write(name)
        task = load_task(name, root, tile=TILE)
        wanted = [TASKS[name].stats[band] for band in ("B", "G", "R", "NIR")]
        assert np.array_equal(np.stack([task.mean, task.std], 1), wanted)
        assert task.mean.dtype == task.std.dtype == np.float64
    assert TASKS["sen1floods11"].stats["B10"] == (63.78, 144.00)
    assert TASKS["marida"].stats["B12"] == (0.01589, 0.03524)
    assert TASKS["substation"].stats["NIR"] == (2537, 606)


@pytest.mark.parametrize("name", ["m-cashew-plantation", "m-sa-crop-type"])
def test_geobench_statistics_are_of_its_file(write, name):
    root, _ = write(name)
    task = load_task(name, root, tile=20, bands=["B8A", "NIR", "B12"])
    assert task.mean.tolist() == [108, 107, 111]
    assert task.std == pytest.approx([18, 17, 21])


def test_geobench_statistics_by_date_are_pooled(write):
    root, _ = write("m-cashew-plantation")
    path = root / "m-cashew-plant/band_stats.json"
    stats = json.loads(path.read_text()) | {"02 - Blue_2019-12-05": {"mean": 301.0, "std": 11.0}}
    path.write_text(json.dumps(stats))
    task = load_task("m-cashew-plantation", root, tile=20)
    pixels = [101 - 11, 101 + 11, 301 - 11, 301 + 11]  # of these means and deviations
    assert task.mean[0] == pytest.approx(np.mean(pixels))
    assert task.std[0] == pytest.approx(np.std(pixels))


def test_pastis_statistics_are_of_the_training_folds(write):
    root, _ = write("pastis")
    task = load_task("pastis", root, tile=16)
    assert task.mean.tolist() == [200, 201, 202, 206]  # folds 1, 2 and 3 of 100 * fold + band
    assert task.std.tolist() == [3, 3, 3, 3]


WRONG = ("NaN", "Infinity", "null", "[5]", "1e30")


@pytest.mark.parametrize("name", ["m-cashew-plantation", "m-sa-crop-type", "pastis"])
@pytest.mark.parametrize(
    "key, value",
    [("mean", value) for value in WRONG]
    + [("std", value) for value in (*WRONG, "0", "-3", "1e-40", "1e-9")],
)
def test_statistics_that_are_none(write, name, key, value):
    root, _ = write(name)
    path = find(root, "NORM_S2_patch.json" if name == "pastis" else "band_stats.json")
    said, value = json.loads(path.read_text()), json.loads(value)
    if name == "pastis":
        said["Fold_2"][key][3] = value
    else:
        said[next(band for band in said if band.startswith("05"))][key] = value
    path.write_text(json.dumps(said))
    with refused(ValueError, path):
        load_task(name, root, tile=TILE)


@pytest.mark.parametrize("count", [9, 0, 11])
def test_pastis_statistics_of_another_number_of_bands(write, count):
    root, _ = write("pastis")
    path = find(root, "NORM_S2_patch.json")
    said = json.loads(path.read_text())
    for fold in said.values():
        fold["mean"] = [100.0] * count
    path.write_text(json.dumps(said))
    with refused(ValueError, path):
        load_task("pastis", root, tile=TILE)


def test_bands_without_published_statistics_are_measured(write):
    root, truth = write("mados")
    task = load_task("mados", root, tile=24, bands=["B", "B12"])
    train = np.stack([image[[1, 10]] for split, image, _ in truth.values() if split == "train"])
    assert task.mean == pytest.approx(np.nanmean(train, (0, 2, 3)), rel=1e-6)
    assert task.std == pytest.approx(np.nanstd(train, (0, 2, 3)), rel=1e-5)


def test_statistics_of_a_series_are_of_all_dates(write):
    root, truth = write("pastis")
    (root / "PASTIS-R/NORM_S2_patch.json").unlink()
    task = load_task("pastis", root, tile=16)
    train = [image[:, [0, 1, 2, 6]] for split, image, _ in truth.values() if split == "train"]
    train = np.concatenate(train).astype(np.float64)
    assert task.mean == pytest.approx(train.mean((0, 2, 3)))
    assert task.std == pytest.approx(train.std((0, 2, 3)))


def test_split_hash_is_of_samples_and_splits(write, name):
    root, truth = write(name)
    hashes = {
        load_task(name, root, tile=t, bands=b).split_hash for t, b in ((4, ["B"]), (12, ["R"]))
    }
    lines = sorted(f"{sample} {split}" for sample, (split, *_) in truth.items())
    assert hashes == {hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]}


def test_a_subset_is_told(write, name, capsys):
    root, _ = write(name)
    load_task(name, root, tile=TILE)
    said = capsys.readouterr().err
    assert ("scores do not compare with published ones" in said) == (name != "substation")


def test_no_word_where_the_counts_are_published(write, capsys, monkeypatch):
    root, _ = write("marida")
    about = TASKS["marida"]._replace(counts=(2, 2, 2))
    monkeypatch.setitem(sets("TASKS"), "marida", about)
    load_task("marida", root, tile=TILE)
    assert "samples" not in capsys.readouterr().err


# ---- memory -----------------------------------------------------------------------------------


def test_images_lie_in_a_file_that_leaves_nothing(write, name, monkeypatch, tmp_path_factory):
    root, _ = write(name)
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tasks.tempfile, "tempdir", str(folder))
    task = load_task(name, root, tile=TILE)
    assert isinstance(task.images, np.memmap) and not any(folder.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no disk that is full at hand")
def test_a_full_disk_is_told(write, monkeypatch):
    root, _ = write("marida")
    full = open("/dev/full", "r+b", buffering=0)
    monkeypatch.setattr(tasks.tempfile, "TemporaryFile", lambda: full)
    with refused(OSError, "marida", "No space left", "TMPDIR"):
        load_task("marida", root, tile=TILE)


# ---- the pickles ------------------------------------------------------------------------------


def test_pickles_are_never_read(write):
    root, _ = write("m-cashew-plantation")
    load_task("m-cashew-plantation", root, tile=20)
    assert not (root / "unpickled").exists()
    (root / "bomb").mkdir()
    layouts.pickle.loads(layouts.pickle.dumps(layouts.Bomb(root / "bomb/went off"))).close()
    assert (root / "bomb/went off").exists()  # so the one above would have been seen


# ---- bad input --------------------------------------------------------------------------------


def test_unknown_task():
    with refused(ValueError, "--task mado", *TASKS, "geotiff"):
        load_task("mado", ".")


def test_wrong_root_says_what_was_looked_for(name, tmp_path):
    (tmp_path / "holiday.jpg").write_text("")
    wanted = (*TASKS[name].marks, *TASKS[name].folders, TASKS[name].url, "unpack")
    with refused(FileNotFoundError, tmp_path, "holiday.jpg", *wanted):
        load_task(name, tmp_path)
    with refused(FileNotFoundError, tmp_path / "nowhere", "nothing", *wanted):
        load_task(name, tmp_path / "nowhere")


def test_missing_bands_are_named(name):
    names = f"--bands B02,B13,VV: --task {name}", "B13,VV;", BANDS[name].replace(" ", ",")
    with refused(ValueError, *names):
        load_task(name, ".", bands=["B02", "B13", "VV"])


def test_the_names_of_bands():
    names = "B2 b02 B b g B8 nir B08 b8a B11 B1 B05 B5".split()
    found = [common.L1C[at] for at in positions(names, common.L1C, sentinel=True)]
    assert found == "B B B B G NIR NIR NIR B8A B11 B01 B05 B05".split()


PIECES = {  # a file of one sample, by pattern; how many samples there are, and its name
    "mados": ("Scene_0_L2R_rhorc_865_2.tif", 6, "Scene_0"),
    "marida": ("S2_18-9-20_16PCC_1.tif", 6, "18-9-20_16PCC_1"),
    "m-cashew-plantation": ("sample-7.hdf5", 5, "sample-7"),
    "m-sa-crop-type": ("sample-7.hdf5", 5, "sample-7"),
    "pastis": ("TARGET_10021.npy", 5, "10021"),
    "sen1floods11": ("Ghana_103272_S2Hand.tif", 4, "Ghana_103272"),
    "substation": ("image_3.npz", 10, "image_3"),
}


def test_missing_files_are_counted(write, name):
    root, _ = write(name)
    pattern, count, sample = PIECES[name]
    find(root, pattern).unlink()
    with refused(FileNotFoundError, root, f"1 of {count} ", sample):
        load_task(name, root, tile=TILE)


def test_damaged_files_are_named(write, name):
    root, _ = write(name)
    path = find(root, PIECES[name][0])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with refused(ValueError, path):
        load_task(name, root, tile=TILE, bands=BANDS[name].split())


ARRAYS = (np.int16(5), np.zeros(9), np.zeros((0, 0)), np.full((2, 3), "5"))
PASTIS = ((2, 3, 16, 16), (0, 10, 16, 16), (10, 16, 16), (2, 10, 0, 16), (2, 11, 16, 16))


@pytest.mark.parametrize(
    "name, pattern, array",
    [("pastis", "S2_10021.npy", np.zeros(shape, np.int16)) for shape in PASTIS]
    + [("pastis", "TARGET_10021.npy", np.zeros((16, 16), np.uint8))]
    + [("pastis", "TARGET_10021.npy", array) for array in ARRAYS]
    + [("substation", "image_stack/image_3.npz", np.zeros((2, 4, 12, 12)))]
    + [("substation", "image_stack/image_3.npz", np.zeros((0, 13, 12, 12)))]
    + [("substation", "mask/image_3.npz", array) for array in ARRAYS],
)
def test_arrays_of_another_shape_are_named(write, name, pattern, array):
    root, _ = write(name)
    path = find(root, pattern)
    (np.savez if path.suffix == ".npz" else np.save)(path, array)
    with refused(ValueError, path):
        load_task(name, root, tile=TILE)


@pytest.mark.parametrize(
    "dataset, array",
    [
        ("02 - Blue", None),  # a group
        ("02 - Blue", np.zeros((20, 21), np.int16)),
        ("02 - Blue", np.int16(5)),
        ("02 - Blue", np.full((20, 20), b"5")),
        ("label", None),
        ("label", np.zeros((1, 20, 20), np.uint8)),
    ],
)
def test_odd_datasets_are_named(write, dataset, array):
    root, _ = write("m-sa-crop-type")
    with h5py.File(find(root, "sample-7.hdf5"), "r+") as file:
        del file[dataset]
        if array is None:
            file.create_group(dataset)
        else:
            file[dataset] = array
    with refused(ValueError, "sample-7.hdf5"):
        load_task("m-sa-crop-type", root, tile=TILE)


@pytest.mark.parametrize(
    "name, pattern, shape",
    [
        ("sen1floods11", "Ghana*_S2Hand.tif", (3, 20, 20)),
        ("marida", "S2_1-12-19_48MYU_1.tif", (12, 20, 20)),
        ("mados", "Scene_0_L2R_rhorc_492_2.tif", (2, 24, 24)),
    ],
)
def test_images_of_another_number_of_bands_are_named(write, name, pattern, shape):
    root, _ = write(name)
    path = find(root, pattern)
    raster.write(path, np.zeros(shape, np.float32))
    with refused(ValueError, path, f"{shape[0]} bands"):
        load_task(name, root, tile=TILE)


def test_alien_labels_are_named(write, name):
    root, _ = write(name)
    if name in ("mados", "marida"):
        value, path = 17, find(root, "*_cl*.tif")
        raster.write(path, np.full(raster.read(path)[0].shape, value, np.uint8))
    elif name.startswith("m-"):
        value, path = 17, find(root, "*.hdf5")
        with h5py.File(path, "r+") as file:
            file["label"][3, 3] = value
    elif name == "pastis":
        value, path = 27, find(root, "TARGET_*.npy")
        np.save(path, np.full((3, 16, 16), value, np.uint8))
    elif name == "sen1floods11":
        value, path = 7, find(root, "Ghana*_LabelHand.tif")
        raster.write(path, np.full((20, 20), value, np.int16))
    else:
        value, path = 4, find(root, "mask/image_0.npz")
        np.savez(path, np.full((12, 12), value, np.uint8))
    with refused(ValueError, f" {value}"):
        load_task(name, root, tile=TILE)


LISTS = {
    "mados": "val_X.txt",
    "marida": "test_X.txt",
    "m-cashew-plantation": "default_partition.json",
    "m-sa-crop-type": "band_stats.json",
    "pastis": "metadata.geojson",
    "sen1floods11": "flood_valid_data.csv",
}


@pytest.mark.parametrize("name", LISTS)
def test_missing_lists_are_named(write, name):
    root, _ = write(name)
    find(root, LISTS[name]).unlink()
    with refused(FileNotFoundError, LISTS[name]):
        load_task(name, root, tile=TILE)


@pytest.mark.parametrize("name", [n for n in LISTS if n.startswith("m-") or n == "pastis"])
def test_damaged_lists_are_named(write, name):
    root, _ = write(name)
    path = find(root, LISTS[name])
    path.write_text(path.read_text()[:-20])
    with refused(ValueError, path):
        load_task(name, root, tile=TILE)


@pytest.mark.parametrize(
    "name, pattern, text",
    [
        *(
            ("pastis", "metadata.geojson", text)
            for text in ("{}", '{"features": [1, 2]}', '{"features": 1}',
                         '{"features": [{"properties": null}]}')
        ),
        ("pastis", "NORM_S2_patch.json", '{"Fold_1": 5, "Fold_2": 5, "Fold_3": 5}'),
        ("pastis", "NORM_S2_patch.json", '{"Fold_1": 5}'),
        ("m-sa-crop-type", "default_partition.json", '{"train": 5}'),
        ("m-sa-crop-type", "band_stats.json", '{"02 - Blue": 5}'),
        ("substation", "splits.json", '{"train": null}'),
        ("substation", "splits.json", "[1, 2]"),
        pytest.param("substation", "splits.json", "[" * 100_000, id="deep"),
        pytest.param("sen1floods11", "flood_test_data.csv", "x" * 200_000, id="long"),
    ],
)  # fmt: skip
def test_lists_of_another_build_are_named(write, name, pattern, text):
    root, _ = write(name)
    path = find(root, pattern)
    path.write_text(text)
    with refused(ValueError, path):
        load_task(name, root)


@pytest.mark.parametrize(
    "name, pattern, text",
    [
        ("pastis", "metadata.geojson", '{"features": []}'),
        ("m-cashew-plantation", "default_partition.json", "{}"),
    ],
)
def test_a_list_without_an_entry(write, name, pattern, text):
    root, _ = write(name)
    find(root, pattern).write_text(text)
    with refused(ValueError, root):
        load_task(name, root)


def test_a_fold_that_is_none(write):
    root, _ = write("pastis")
    path = root / "PASTIS-R/metadata.geojson"
    path.write_text(path.read_text().replace('"Fold": 5', '"Fold": 6'))
    with refused(ValueError, path, "6"):
        load_task("pastis", root)


def test_a_substation_list_may_say_valid_and_must_name_a_test(write):
    root, truth = write("substation")
    path = root / "Substation/splits.json"
    lists = json.loads(path.read_text())
    path.write_text(json.dumps({"valid": lists["val"], **{s: lists[s] for s in ("train", "test")}}))
    task = load_task("substation", root)
    assert task.split.tolist() == [truth[sample][0] for sample in sorted(truth)]
    path.write_text(json.dumps({"valid": lists["val"], "train": lists["train"]}))
    with refused(ValueError, "test split"):
        load_task("substation", root)


def test_the_first_error_ends_the_reading():
    begun = []

    def fail(item):
        begun.append(item)
        if item == 0:
            raise ValueError("no")
        time.sleep(0.01)

    with pytest.raises(ValueError, match="no"):
        tasks.gather(fail, 2000, 8, "reading")
    assert len(begun) < 2000


def test_a_sample_in_two_splits(write):
    root, _ = write("marida")
    (root / "MARIDA/splits/val_X.txt").write_text("1-12-19_48MYU_0\n")
    with refused(ValueError, "MARIDA/splits", "1-12-19_48MYU_0", "train", "val"):
        load_task("marida", root)


def test_an_empty_split(write):
    root, _ = write("marida")
    (root / "MARIDA/splits/val_X.txt").write_text("\n")
    with refused(ValueError, "val split"):
        load_task("marida", root, tile=TILE)
    for split in ("train", "test"):
        (root / f"MARIDA/splits/{split}_X.txt").write_text("")
    with refused(ValueError, root):
        load_task("marida", root, tile=TILE)


@pytest.mark.parametrize(
    "name, options, mentions",
    [
        ("marida", {}, ["--tile 64", ".tif", "20 px"]),
        ("marida", {"dates": 2}, ["--dates 2", "--task marida"]),
        ("pastis", {"dates": 0}, ["--dates 0", "1"]),
        ("pastis", {"pastis_classes": 17}, ["--pastis-classes 17", "18", "19", "20"]),
    ],
)
def test_wrong_options(write, name, options, mentions):
    with refused(ValueError, *mentions):
        load_task(name, write(name)[0], **options)


def test_images_that_do_not_fit_their_masks(write):
    root, _ = write("mados")
    raster.write(find(root, "*_rhorc_704_1.tif"), np.zeros((7, 7), np.float32))
    with refused(ValueError, "704_1.tif", "(21, 21)", "24 x 24"):
        load_task("mados", root, tile=24, bands=["B05"])
    root, _ = write("marida")
    path = find(root, "S2_1-12-19_48MYU_0.tif")
    raster.write(path, np.zeros((11, 19, 20), np.float32))
    with refused(ValueError, "MYU_0.tif", "19 x 20", "20 x 20"):
        load_task("marida", root, tile=TILE)


def test_images_of_several_sizes(write):
    root, _ = write("substation")
    np.savez(find(root, "image_stack/image_0.npz"), np.zeros((2, 13, 16, 16), np.float32))
    np.savez(find(root, "mask/image_0.npz"), np.zeros((16, 16), np.uint8))
    with refused(ValueError, "12, 16 px", "--tile"):
        load_task("substation", root)
    assert load_task("substation", root, tile=TILE).images.shape[-1] == TILE


def test_a_band_that_a_file_lacks(write):
    root, _ = write("m-sa-crop-type")
    with h5py.File(find(root, "sample-7.hdf5"), "r+") as file:
        del file["08 - NIR"]
    with refused(ValueError, "sample-7.hdf5", "'08'", "01 - Coastal"):
        load_task("m-sa-crop-type", root, tile=20)


# ---- one's own folder -------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("mr", "masks", "splits"):
        (tmp_path / folder).mkdir()
    for stem, split in zip("abc", SPLITS, strict=True):
        image = rng.integers(1, 99, (3, 16, 16)).astype(np.uint16)
        raster.write(tmp_path / f"mr/{stem}.tif", image, band_names=("B04", "B03", "NIR"))
        raster.write(tmp_path / f"masks/{stem}.tif", rng.integers(0, 2, (16, 16)).astype(np.uint8))
        (tmp_path / f"splits/{split}.txt").write_text(stem)
    (tmp_path / "classes.txt").write_text("x\ny\n")
    return tmp_path


def test_own_folder(own):
    task = load_task("geotiff", own, tile=8)
    assert task.classes == ("x", "y") and task.split_by == "file lists" and task.name == "geotiff"
    assert (task.bands, task.positions, task.file_bands) == (("B04", "B03", "NIR"), (0, 1, 2), 3)
    assert task.mean == pytest.approx(task.images[task.split == "train"].mean((0, 2, 3)))
    named, numbered = (load_task("geotiff", own, tile=8, bands=b) for b in (["NIR", "R"], [2, 0]))
    assert tasks.fingerprint(named) == tasks.fingerprint(numbered)
    assert np.array_equal(named.images, task.images[:, [2, 0]])
    assert named.positions == (2, 0) and named.bands == ("NIR", "B04")
    with refused(ValueError, "--bands B8A", "a.tif", "B04,B03,NIR"):
        load_task("geotiff", own, bands=["B8A"])
    for path in (own / "mr").iterdir():
        raster.write(path, raster.read(path))
    with refused(ValueError, "a.tif", " R "):
        load_task("geotiff", own, bands=["R"])
    assert load_task("geotiff", own, tile=8, bands=[2]).bands == ("",)


def test_own_folder_in_short(own):
    (own / "mr").rename(own / "images")
    shutil.rmtree(own / "splits")
    (own / "classes.txt").unlink()
    task = load_task("geotiff", own, tile=16, split_seed=1)
    assert task.classes == ("0", "1") and task.split_by == "image"
    assert len({load_task("geotiff", own, tile=16, split_seed=s).split_hash for s in range(9)}) > 1
    shutil.rmtree(own / "masks")
    with refused(FileNotFoundError, own, "masks"):
        load_task("geotiff", own)


# ---- the table --------------------------------------------------------------------------------


def test_list_tasks_says_where_and_what():
    said = tasks.list_tasks()
    for name, about in TASKS.items():
        assert name in said and about.url in said
    assert "geotiff" in said and max(map(len, said.split("\n"))) <= 120


def test_the_table_holds_together():
    for name, about in TASKS.items():
        assert BANDS[name].split() == list(about.bands)
        assert {*about.ids.values()} - {IGNORE} == set(range(len(about.classes)))
        assert len({*about.classes}) == len(about.classes)
        assert {*about.stats} <= {*about.bands}


# ---- real samples and torchgeo's fixtures -----------------------------------------------------


def test_real_sen1floods11_chip(real, tmp_path):
    shutil.copytree(real("sen1floods11_sample/v1.1"), tmp_path / "v1.1")
    chips = tmp_path / "v1.1/data/flood_events/HandLabeled"
    lists = tmp_path / "v1.1/splits/flood_handlabeled"
    lists.mkdir(parents=True)
    for name, split in (("Spain_7370579", "train"), ("a", "valid"), ("b", "test")):
        for layer in ("S2Hand", "LabelHand"):
            source = chips / f"{layer}/Spain_7370579_{layer}.tif"
            if not (chips / f"{layer}/{name}_{layer}.tif").exists():
                shutil.copy(source, chips / f"{layer}/{name}_{layer}.tif")
        (lists / f"flood_{split}_data.csv").write_text(f"{name}_S1Hand.tif,{name}_LabelHand.tif\n")
    task = load_task("sen1floods11", tmp_path)
    image = raster.read(chips / "S2Hand/Spain_7370579_S2Hand.tif", bands=[1, 2, 3, 7])
    label = raster.read(chips / "LabelHand/Spain_7370579_LabelHand.tif")[0]
    train = task.split == "train"
    for _, row, col in task.origin[train]:
        (k,) = np.flatnonzero(train & (task.origin[:, 1:] == [row, col]).all(1))
        window = np.s_[row : row + 64, col : col + 64]
        assert np.array_equal(task.labels[k], label[window])
        assert np.array_equal(task.images[k], image[:, *window])
    assert (task.labels[train] == 1).sum() == (label == 1).sum()
    assert (task.labels[train] == 0).sum() == (label == 0).sum()
    assert {*map(tuple, task.origin[train][:, 1:])} == {
        (r, c)
        for r in range(0, 512, 64)
        for c in range(0, 512, 64)
        if (label[r : r + 64, c : c + 64] >= 0).any()
    }


def test_real_geobench_file(real):
    path = real("geobench_eurosat_sample/m-eurosat/id_1905.hdf5")
    pixels = geobench.read_datasets(path, ["02", "08", "08A", "12"])
    assert pixels.shape == (4, 64, 64) and pixels.dtype == np.int16
    with h5py.File(path) as file:
        for band, name in enumerate(
            ("02 - Blue", "08 - NIR", "08A - Vegetation Red Edge", "12 - SWIR")
        ):
            assert np.array_equal(pixels[band], file[name])
    with refused(ValueError, "id_1905.hdf5", "'label'", "01 - Coastal"):
        geobench.read_datasets(path, ["label"])


def test_torchgeo_pastis(real, tmp_path):
    with zipfile.ZipFile(real("torchgeo_fixtures/PASTIS-R.zip")) as file:
        file.extractall(tmp_path)
    task = load_task("pastis", tmp_path, tile=32, pastis_classes=20)
    assert task.split.tolist() == ["train", "train", "train", "val", "test"]
    counts = [len(np.load(tmp_path / f"PASTIS-R/DATA_S2/S2_{k}.npy")) for k in range(5)]
    assert (~np.isnan(task.images[:, :, 0, 0, 0])).sum(1).tolist() == counts
    for k in range(5):
        image = np.load(tmp_path / f"PASTIS-R/DATA_S2/S2_{k}.npy")[:, [0, 1, 2, 6]]
        mask = np.load(tmp_path / f"PASTIS-R/ANNOTATIONS/TARGET_{k}.npy")[0]
        assert np.array_equal(task.images[k, : len(image)], image)
        assert np.array_equal(task.labels[k], np.where(mask == 19, IGNORE, mask.astype(int)))


def test_torchgeo_substation(real):
    root = real("torchgeo_fixtures/substation/image_stack").parent
    task = load_task("substation", root)
    assert task.images.shape == (5, 4, 32, 32)
    for k in range(5):
        with np.load(root / f"image_stack/image_{k}.npz") as file:
            assert np.array_equal(task.images[k], np.median(file["arr_0"][:, [1, 2, 3, 7]], 0))
        with np.load(root / f"mask/image_{k}.npz") as file:
            assert np.array_equal(task.labels[k], file["arr_0"] == 3)
