"""predict.py: blending against a slow loop, no seams, files as rasterio reads them, messages."""

import os
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pair_layouts
import pytest
import rasterio
import tifffile
import torch
import torch.nn.functional as F
from conftest import refused

import finetune
import predict
from datasets.images import header, open_image
from figures import class_colours
from imagery import raster, scenes
from model import ViT
from predict import NO_CLASS, blend_weights, choose_bands, window_starts
from segment import Segmenter, save_segmenter
from weights import load_encoder, save_encoder

CLASSES = ["water", "forêt", "field", "built <up>", "soil"]
BANDS = ["B", "G", "R", "NIR"]
PLACE = (10.0, 0.0, 399960.25, 0.0, -10.0, 5300040.5)
META = dict(classes=CLASSES, bands=BANDS, positions=[0, 1, 2, 3], file_bands=4, tile=12, gsd=10.0,
            mean=[100.0, 200.0, 300.0, 400.0], std=[50.0, 60.0, 70.0, 80.0])  # fmt: skip


def segmenter(head="linear", **changes):
    torch.manual_seed(0)
    encoder = ViT(in_channels=4, patch_size=4, dim=16, depth=2, heads=2)
    made = Segmenter(encoder, len(CLASSES), 16, head)
    for weight in made.head.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    made.meta = {**META, **changes}
    return made.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A segmentation model as finetune.py saves it."""
    path = tmp_path_factory.mktemp("model") / "model_a.safetensors"
    save_segmenter(path, segmenter(), **META)
    return path


def image(height, width, bands=4, seed=0):
    """Smooth ground with noise, uint16, in the scale of META."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.normal(size=(1, bands, 6, 6)))
    smooth = F.interpolate(coarse, (height, width), mode="bicubic")[0].numpy()
    mean, std = (np.resize(META[key], bands)[:, None, None] for key in ("mean", "std"))
    return (mean + std * (smooth + 0.2 * rng.normal(size=smooth.shape))).clip(1).astype(np.uint16)


def write(path, array, transform=PLACE, crs=32633, nodata=0, band_names=tuple(BANDS)):
    raster.write(path, array, transform, crs, nodata, band_names)
    return path


def main(*words):
    predict.main([str(word) for word in ("--device", "cpu", *words)])


# ---- windows and blending ---------------------------------------------------------------------


@pytest.mark.parametrize("size, tile, overlap, unit", [
    (100, 16, 8, 1), (101, 16, 8, 1), (7, 16, 8, 1), (16, 16, 8, 1), (17, 16, 0, 1),
    (50, 12, 5, 3), (50, 12, 11, 3), (11, 12, 6, 12), (97, 12, 6, 12), (64, 64, 63, 1),
])  # fmt: skip
def test_windows_cover_a_side_and_their_weights_sum_to_1(size, tile, overlap, unit):
    starts = window_starts(size, tile, overlap, unit)
    assert starts[0] == 0 and sorted(set(starts)) == starts
    assert all(start % unit == 0 for start in starts)
    assert size <= starts[-1] + tile < size + unit or len(starts) == 1
    assert all(b - a <= max(unit, tile - overlap) for a, b in pairwise(starts))
    weights, total = blend_weights(starts, tile), torch.zeros(starts[-1] + tile)
    assert (weights > 0).all()
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + tile] += weight
    assert torch.allclose(total, torch.ones_like(total), atol=1e-6)


def slow_map(model, array, nodata, overlap, tokens):
    """Logits or tokens with whole maps of sums and weights, window by window, cell by cell."""
    tile, (height, width) = model.meta["tile"], array.shape[1:]
    side, unit = (model.grid, 3) if tokens else (tile, 1)  # tokens of 3 px
    rows, cols = (window_starts(n, tile, overlap, unit) for n in (height, width))
    pad = [(0, 0), (0, max(0, rows[-1] + tile - height)), (0, max(0, cols[-1] + tile - width))]
    valid = (array != nodata).any(0)
    mean, std = (np.array(model.meta[key])[:, None, None] for key in ("mean", "std"))
    scene = np.where(valid, (array - mean) / std, 0)
    scene = torch.from_numpy(np.pad(scene, pad, mode="symmetric")).float()
    known = np.pad(valid, pad[1:], mode="symmetric")
    size = [n * side // tile for n in scene.shape[1:]]
    total = torch.zeros(model.encoder.dim if tokens else model.classes, *size).double()
    weights, bell = torch.zeros(size).double(), np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
    for row in rows:
        for col in cols:
            window = scene[None, :, row : row + tile, col : col + tile]
            if known[row : row + tile, col : col + tile].any():
                with torch.no_grad():
                    result = (
                        model.tokens(window).mT.unflatten(2, (side, side))
                        if tokens
                        else (F.interpolate(model(window), (tile, tile), mode="bilinear"))
                    )
                for i, j in np.ndindex(side, side):
                    y, x = row * side // tile + i, col * side // tile + j
                    total[:, y, x] += bell[i] * bell[j] * result[0, :, i, j]
                    weights[y, x] += bell[i] * bell[j]
    return (total / weights).numpy(), valid


def predicted(model, path, **options):
    """All rows of predict.predict together: values, valid."""
    source = open_image(header(path), None, [0, 1, 2, 3])
    parts = list(predict.predict(model, source, model.meta["mean"], model.meta["std"], **options))
    return np.concatenate([p[0] for p in parts], 1), np.concatenate([p[1] for p in parts])


@pytest.mark.parametrize("shape, overlap, head", [
    ((31, 40), 6, "linear"), ((25, 13), 9, "linear"), ((5, 30), 6, "linear"),
    ((12, 12), 6, "linear"), ((4, 7), 0, "linear"), ((29, 24), 0, "linear"),
    ((14, 20), 6, "upernet"),
])  # fmt: skip
def test_blending_equals_a_slow_loop(tmp_path, shape, overlap, head):
    model = segmenter(head)
    array = image(*shape)
    array[:, 3:17, 5:30] = 0
    path = write(tmp_path / "a.tif", array)
    logits, known = predicted(model, path, overlap=overlap, batch=3)
    slow, valid = slow_map(model, array, 0, overlap, tokens=False)
    assert logits.shape == (5, *shape) and np.array_equal(known, valid)
    slow = slow[:, : shape[0], : shape[1]]
    assert np.allclose(logits[:, valid], slow[:, valid], atol=1e-4)

    tokens, known = predicted(model, path, overlap=overlap, tokens=True)
    slow, _ = slow_map(model, array, 0, overlap, tokens=True)
    rows, cols = (-(-n // 3) for n in shape)
    assert tokens.shape == (16, rows, cols) and known.shape == (rows, cols)
    for y, x in np.ndindex(rows, cols):
        if y < shape[0] // 3 and x < shape[1] // 3:
            assert known[y, x] == valid[3 * y : 3 * y + 3, 3 * x : 3 * x + 3].any()
        if known[y, x]:
            assert np.allclose(tokens[:, y, x], slow[:, y, x], atol=1e-4)


def test_a_scene_gives_the_same_however_its_file_is_cut(tmp_path):
    model, array, found = segmenter(), image(300, 50), []
    write(tmp_path / "a.tif", array)
    for name, layout in (("b", {"rowsperstrip": 7}), ("c", {"tile": (16, 32)})):
        tifffile.imwrite(
            tmp_path / f"{name}.tif", array, photometric="minisblack", planarconfig="separate",
            extratags=[(42113, 2, 0, "0", True)], metadata=None, **layout,
        )  # fmt: skip
    for name in "abc":
        found.append(predicted(model, tmp_path / f"{name}.tif")[0])
        assert np.array_equal(found[0], found[-1])


def test_memory_does_not_grow_with_the_height(tmp_path, monkeypatch):
    """Only one row of windows is held, whatever the scene."""
    seen, pad = set(), F.pad
    monkeypatch.setattr(F, "pad", lambda *a: (moved := pad(*a), seen.add(moved.shape))[0])
    path = write(tmp_path / "a.tif", image(200, 30))
    for tokens, shape in ((False, (5, 12, 30)), (True, (16, 4, 10))):
        predicted(segmenter(), path, tokens=tokens)
        assert seen == {shape}
        seen.clear()


def test_a_pixel_that_lacks_a_band_is_seen_as_in_training(tmp_path):
    """The band is the mean there, as in `segment.normalised`; only what lacks all has no class."""
    model, array = segmenter(), image(24, 30).astype(np.float32)
    array[1, 3:9, 4:11] = np.nan
    array[:, 15:20, 20:] = np.nan
    path = write(tmp_path / "a.tif", array, nodata=None)
    values, valid = predicted(model, path)
    assert np.array_equal(valid, ~np.isnan(array).all(0))
    mean = np.array(model.meta["mean"], np.float32)[:, None, None]
    filled = write(tmp_path / "b.tif", np.where(np.isnan(array), mean, array), nodata=None)
    assert np.allclose(values, predicted(model, filled)[0], atol=1e-4)


@pytest.mark.parametrize("height, width, tile", [(136, 68, 34), (17, 119, 34), (82, 41, 82)])
def test_feature_maps_of_any_size_have_the_tokens_that_they_say(tmp_path, height, width, tile):
    """n / (tile / grid) is not n * grid / tile in floats."""
    torch.manual_seed(0)
    save_encoder(ViT(4, 4, 16, 1, 2), tmp_path / "e.safetensors", mean=META["mean"],
                 std=META["std"], bands=BANDS, mr_size=56)  # fmt: skip
    scene = write(tmp_path / "s.tif", image(height, width))
    main("--model", tmp_path / "e.safetensors", "--tile", tile, "--features", scene,
         tmp_path / "f.tif")  # fmt: skip
    found = raster.info(tmp_path / "f.tif")
    assert (found.height, found.width) == (-(-height * 14 // tile), -(-width * 14 // tile))


def test_features_are_not_of_their_place_in_a_window(tmp_path):
    """A scene without content has tokens of position alone, which blending must even out."""
    model = segmenter()
    scene = np.repeat(np.round(META["mean"]), 60 * 60).reshape(-1, 60, 60).astype(np.uint16)
    path = write(tmp_path / "a.tif", scene[:4])
    spread = {}
    for overlap in (None, 0):
        tokens, _ = predicted(model, path, tokens=True, overlap=overlap)
        inside = slice(model.grid, -model.grid)
        spread[overlap] = tokens[:, inside, inside].std((1, 2)).mean()
    assert spread[None] < 0.05 * spread[0]


def test_windows_without_data_are_not_encoded(tmp_path, monkeypatch):
    count, forward = [], Segmenter.forward
    spy = lambda self, x: (count.append(len(x)), forward(self, x))[1]  # noqa: E731
    monkeypatch.setattr(Segmenter, "forward", spy)
    array = image(48, 48)
    array[:, :, :30] = 0  # the third of four columns of windows has data on its right
    path = write(tmp_path / "a.tif", array)
    _, valid = predicted(segmenter(), path, overlap=0)
    assert sum(count) == 8 and np.array_equal(valid, array[0] > 0)


@pytest.fixture(scope="module")
def landscape():
    """A model fitted in closed form to a procedural scene, and the scene: context matters."""
    torch.manual_seed(0)
    _, mr, mask = scenes.scene(0, 0, 256)
    encoder = ViT(in_channels=4, patch_size=4, dim=96, depth=2, heads=4)
    for name, weight in encoder.named_parameters():
        if name.endswith("weight") and weight.ndim > 1:
            torch.nn.init.normal_(weight, std=1.5 / weight[0].numel() ** 0.5)
    mean, std = mr.mean((1, 2)), mr.std((1, 2))
    model = Segmenter(encoder, len(scenes.CLASSES), 32).eval()
    model.meta = dict(META, classes=list(scenes.CLASSES), mean=mean.tolist(), std=std.tolist(),
                      tile=32)  # fmt: skip
    normal = torch.from_numpy((mr - mean[:, None, None]) / std[:, None, None]).float()
    corners = torch.randint(0, 256 - 32, (200, 2)).tolist()
    windows = torch.stack([normal[:, y : y + 32, x : x + 32] for y, x in corners])
    truth = [mask[y + 2 : y + 32 : 4, x + 2 : x + 32 : 4] for y, x in corners]  # at token centres
    truth = torch.from_numpy(np.stack(truth)).flatten().long()
    with torch.no_grad():
        tokens = model.tokens(windows).flatten(0, 1).double()
    target = F.one_hot(truth, model.classes).double()
    tokens = torch.cat([tokens, torch.ones(len(tokens), 1)], 1)
    fit = torch.linalg.solve(tokens.T @ tokens + 10 * torch.eye(97), tokens.T @ target).float()
    model.head.weight.data, model.head.bias.data = fit[:-1].T.contiguous(), fit[-1].contiguous()
    return model, mr, mask


def class_changes(ids, step):
    """Share of pixel pairs whose class changes, (across window borders, elsewhere)."""
    rates = []
    for axis in (0, 1):
        change = np.diff(ids.astype(int), axis=axis) != 0
        border = (np.arange(1, ids.shape[axis]) % step) == 0
        rates.append([change.compress(where, axis).mean() for where in (border, ~border)])
    return np.mean(rates, 0)


def test_no_seams(tmp_path, landscape):
    made, mr, mask = landscape
    path = write(tmp_path / "a.tif", mr)
    ratio = {}
    for overlap, step in ((None, 32 - 18), (0, 32)):
        ids = predicted(made, path, overlap=overlap)[0].argmax(0)
        border, elsewhere = class_changes(ids, step)
        ratio[overlap] = border / elsewhere
        assert (ids == mask).mean() > 0.6
    assert ratio[None] <= 1.1
    assert ratio[0] > 3  # without overlap there are seams, and this measure sees them


# ---- files ------------------------------------------------------------------------------------


def test_a_map_keeps_place_and_holes_and_names_its_classes(tmp_path, trained, capsys):
    array = image(530, 70)
    array[:, 100:200, :50] = 0
    write(tmp_path / "a.tif", array)
    main("--model", trained, tmp_path / "a.tif", tmp_path / "map.tif", "--probabilities", "--png",
         "--features")  # fmt: skip
    assert sorted(os.listdir(tmp_path)) == [
        "a.tif", "map.png", "map.tif", "map.tif.aux.xml", "map_features.tif",
        "map_probabilities.tif",
    ]  # fmt: skip
    hole = np.zeros((530, 70), bool)
    hole[100:200, :50] = True
    with rasterio.open(tmp_path / "a.tif") as src, rasterio.open(tmp_path / "map.tif") as made:
        assert (made.bounds, made.crs, made.transform) == (src.bounds, src.crs, src.transform)
        assert made.shape == src.shape and made.dtypes == ("uint8",) and made.nodata == NO_CLASS
        assert made.block_shapes == [(256, 256)] and made.overviews(1)[0] == 2
        assert made.compression.name == "deflate"
        assert [made.tags(1)[f"CLASS_{k}"] for k in range(5)] == CLASSES
        colours = [made.colormap(1)[k][:3] for k in range(5)]
        assert colours == class_colours(CLASSES) and len(set(colours)) == 5
        ids = made.read(1)
    assert np.array_equal(ids == NO_CLASS, hole) and ids[~hole].max() < 5
    with rasterio.open(tmp_path / "map_probabilities.tif") as made:
        assert (made.bounds, made.crs) == (src.bounds, src.crs)
        assert made.descriptions == tuple(CLASSES) and np.isnan(made.nodata)
        shares = made.read()
    assert np.isnan(shares[:, hole]).all()
    assert np.allclose(shares[:, ~hole].sum(0), 1, atol=2e-3)
    best = np.take_along_axis(shares[:, ~hole], ids[~hole].astype(int)[None], 0)[0]
    assert (best >= shares[:, ~hole].max(0) - 1e-3).all()
    with rasterio.open(tmp_path / "map_features.tif") as made:
        assert made.crs == src.crs and made.count == 16
        assert made.transform[:6] == (30.0, 0.0, PLACE[2], 0.0, -30.0, PLACE[5])
        assert made.shape == (177, 24) and np.isnan(made.nodata)
        tokens = made.read()
    assert np.array_equal(np.isnan(tokens).all(0), np.isnan(tokens).any(0))
    assert np.isnan(tokens[:, 34:66, :16]).all() and np.isfinite(tokens[:, :33]).all()
    printed = capsys.readouterr().out
    assert "bands 0,1,2,3 (by name)" in printed
    line = printed.splitlines()[-1]
    assert "map.tif: 530 x 70 px in " in line and f"{100 * hole.mean():.1f} % without data" in line
    most = np.bincount(ids[~hole]).argmax()
    assert f"{CLASSES[most]} {100 * (ids[~hole] == most).mean():.1f} %" in line


def test_the_picture_shows_scene_and_map_pixel_by_pixel(tmp_path, trained, monkeypatch):
    shown = []
    monkeypatch.setattr(predict, "PREVIEW", 100)
    monkeypatch.setattr(predict, "draw_map", lambda path, *parts: shown.extend(parts))
    array = image(530, 70)
    write(tmp_path / "a.tif", array)
    main("--model", trained, tmp_path / "a.tif", tmp_path / "m.tif", "--png")
    _, picture, _, ids, counts = shown
    assert np.array_equal(picture, array[:, ::6, ::6])
    whole = raster.read(tmp_path / "m.tif")[0]
    assert np.array_equal(ids, whole[::6, ::6])
    assert np.array_equal(counts, np.bincount(whole.ravel(), minlength=256))


def test_turned_scenes_keep_their_place(tmp_path, trained):
    for place in (PLACE, (8.0, 6.0, 1e5, 6.0, -8.0, 2e6)):
        write(tmp_path / "a.tif", image(24, 36), place, 32633)
        main("--model", trained, tmp_path / "a.tif", tmp_path / "m.tif", "--features",
             "--overwrite")  # fmt: skip
        with rasterio.open(tmp_path / "a.tif") as src:
            with rasterio.open(tmp_path / "m.tif") as made:
                assert (made.bounds, made.crs, made.transform) == (
                    src.bounds, src.crs, src.transform
                )  # fmt: skip
            with rasterio.open(tmp_path / "m_features.tif") as made:  # 36 is 12 tokens of 3 px
                assert made.bounds == src.bounds
        assert raster.info(tmp_path / "m.tif").crs == "EPSG:32633"


def test_the_real_sentinel_2_scene(tmp_path, real):
    scene = real("homonim_ngi_s2_l8/mr/sentinel2_b432_byte.tif")
    torch.manual_seed(0)
    made = Segmenter(ViT(in_channels=3, patch_size=8, dim=16, depth=1, heads=2), 4, 32)
    stats = raster.read(scene).reshape(3, -1)[::-1]
    save_segmenter(
        tmp_path / "model.safetensors", made, classes=list("abcd"), bands=["B", "G", "R"],
        positions=[0, 1, 2], file_bands=3, mean=stats.mean(1).tolist(), std=stats.std(1).tolist(),
        tile=64, gsd=10.0,
    )  # fmt: skip
    main("--model", tmp_path / "model.safetensors", scene, tmp_path / "map.tif", "--png",
         "--overlap", 8)  # fmt: skip
    with rasterio.open(scene) as src, rasterio.open(tmp_path / "map.tif") as result:
        assert (result.bounds, result.crs, result.transform) == (src.bounds, src.crs, src.transform)
        assert result.shape == src.shape and result.nodata == NO_CLASS
        assert result.tags()["AREA_OR_POINT"] == src.tags()["AREA_OR_POINT"]
        assert result.read(1).max() < 4
    assert raster.info(tmp_path / "map.tif").crs == raster.info(scene).crs
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_several_scenes_a_folder_a_glob(tmp_path, trained):
    folder = tmp_path / "in"
    folder.mkdir()
    for k, name in enumerate(("a", "b", "c")):
        write(folder / f"{name}.tif", image(20 + k, 30, seed=k))
    main("--model", trained, folder, tmp_path / "all")
    main("--model", trained, f"{folder}/[ab].tif", tmp_path / "two", "--probabilities")
    main("--model", trained, folder / "a.tif", folder / "c.tif", tmp_path / "named")
    main("--model", trained, folder / "b.tif", tmp_path / "one")  # a folder, as it has no .tif
    assert sorted(p.name for p in (tmp_path / "all").glob("*.tif")) == ["a.tif", "b.tif", "c.tif"]
    assert sorted(p.name for p in (tmp_path / "two").glob("*.tif")) == [
        "a.tif", "a_probabilities.tif", "b.tif", "b_probabilities.tif"
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "named").glob("*.tif")) == ["a.tif", "c.tif"]
    assert (tmp_path / "one/b.tif").read_bytes() == (tmp_path / "all/b.tif").read_bytes()
    assert raster.info(tmp_path / "all/c.tif").height == 22


def test_an_encoder_alone_gives_features(tmp_path, capsys):
    torch.manual_seed(0)
    encoder = ViT(in_channels=4, patch_size=4, dim=16, depth=1, heads=2)
    facts = {key: META[key] for key in ("bands", "mean", "std", "gsd")}
    save_encoder(encoder, tmp_path / "encoder.safetensors", **facts, mr_size=17)
    array = image(48, 32)
    write(tmp_path / "a.tif", array)
    main("--model", tmp_path, tmp_path / "a.tif", tmp_path / "f.tif", "--features", "--tile", 16,
         "--overlap", 0)  # fmt: skip
    about = raster.info(tmp_path / "f.tif")
    assert (about.bands, about.height, about.width, about.gsd) == (16, 12, 8, 40.0)
    mean, std = (np.array(META[key])[:, None, None] for key in ("mean", "std"))
    window = torch.from_numpy((array[:, 16:32, :16] - mean) / std).float()
    with torch.no_grad():
        tokens = load_encoder(tmp_path)(window[None])[0].T.reshape(16, 4, 4).numpy()
    found = raster.read(tmp_path / "f.tif")[:, 4:8, :4]
    assert np.allclose(found, tokens, rtol=1e-3, atol=1e-3)
    assert found.dtype == np.float32
    with refused(SystemExit, f"--model {tmp_path}", "--features"):
        main("--model", tmp_path, tmp_path / "a.tif", tmp_path / "m.tif")
    # weights that say nothing of their data are normalised by the scene
    save_encoder(encoder, tmp_path / "bare.safetensors")
    main("--model", tmp_path / "bare.safetensors", tmp_path / "a.tif", tmp_path / "g.tif",
         "--features", "--image-size", 16)  # fmt: skip
    assert "normalised by those of the scene" in capsys.readouterr().out
    assert raster.info(tmp_path / "g.tif").height == 3  # 48 px of 16 px tokens


def test_a_model_of_finetune_knows_the_scenes_of_its_task(tmp_path, capsys):
    land, results = tmp_path / "land", tmp_path / "results"
    scenes.write_scenes(land, 4, 64, 0)
    encoder = ViT(in_channels=4, patch_size=4, dim=16, depth=1, heads=2)
    save_encoder(encoder, tmp_path / "encoder.safetensors", bands=BANDS)
    finetune.main([
        "--encoder", str(tmp_path / "encoder.safetensors"), "--images", str(land / "mr"),
        "--masks", str(land / "masks"), "--classes", str(land / "classes.txt"), "--tile", "32",
        "--image-size", "32", "--block", "1", "--no-crop", "--epochs", "1", "--device", "cpu",
        "--out", str(results),
    ])  # fmt: skip
    main("--model", results, land / "mr/scene_000.tif", tmp_path / "map.tif")
    printed = capsys.readouterr()
    assert "bands 0,1,2,3 (by name)" in printed.out and "warning" not in printed.err
    with (
        rasterio.open(tmp_path / "map.tif") as made,
        rasterio.open(land / "mr/scene_000.tif") as src,
    ):
        assert (made.bounds, made.crs, made.shape) == (src.bounds, src.crs, src.shape)
        assert [made.tags(1)[f"CLASS_{k}"] for k in range(8)] == list(scenes.CLASSES)


def test_a_scene_without_any_data(tmp_path, trained, capsys):
    write(tmp_path / "a.tif", np.zeros((4, 30, 20), np.uint16))
    main("--model", trained, tmp_path / "a.tif", tmp_path / "m.tif", "--png", "--features",
         "--probabilities")  # fmt: skip
    assert (raster.read(tmp_path / "m.tif") == NO_CLASS).all()
    assert np.isnan(raster.read(tmp_path / "m_features.tif")).all()
    printed = capsys.readouterr()
    assert "100.0 % without data" in printed.out and "warning" not in printed.err


# ---- what scenes are made of ------------------------------------------------------------------


def test_a_scene_of_a_file_per_band_or_zipped_is_as_its_stack(tmp_path, trained, capsys):
    array = image(40, 30)
    array[:, 3:9, 4:20] = 0
    write(tmp_path / "stack.tif", array)
    folder, archive = tmp_path / "S2B_20200701", tmp_path / "zipped" / "S2B_20200702.zip"
    folder.mkdir()
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        for name, band in zip(("B08", "B04", "B03", "B02"), array[::-1], strict=True):
            write(folder / f"{name}.tif", band[None], band_names=())
            file.write(folder / f"{name}.tif", f"{name}.tif")
    write(folder / "SCL.tif", array[:1], band_names=())
    options = ("--probabilities", "--features", "--png")
    main("--model", trained, tmp_path / "stack.tif", tmp_path / "a", *options)
    main("--model", trained, folder, archive, tmp_path / "a", *options)
    assert "bands B,G,R,NIR (by name)" in capsys.readouterr().out
    for kind in ("", "_probabilities", "_features"):
        expected = raster.read(tmp_path / "a" / f"stack{kind}.tif")
        for name in ("S2B_20200701", "S2B_20200702"):
            found = raster.read(tmp_path / "a" / f"{name}{kind}.tif")
            assert np.array_equal(found, expected, equal_nan=True)


def test_the_offset_of_a_safe_folder_is_added(tmp_path, trained, capsys):
    images = pair_layouts.safe(tmp_path, suffix=".tif")
    stack = np.concatenate([images[band, 10] for band in ("B02", "B03", "B04", "B08")])
    write(tmp_path / "stack.tif", stack, pair_layouts.place(10.0), 32631)
    safe = tmp_path / pair_layouts.SAFE
    main("--model", trained, safe, tmp_path / "a.tif", "--probabilities")
    assert "-1000 is added to its pixels, as its product says" in capsys.readouterr().out
    main("--model", trained, tmp_path / "stack.tif", tmp_path / "b.tif", "--offset", -1000,
         "--probabilities")  # fmt: skip
    main("--model", trained, safe, tmp_path / "c.tif", "--offset", 0, "--probabilities")
    a, b, c = (raster.read(tmp_path / f"{name}_probabilities.tif") for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_tags_of_scale_and_offset_are_brought_to_the_models(tmp_path, capsys):
    """One reflectance, as the model's files were tagged, and by another scale and offset."""
    save_segmenter(tmp_path / "m.safetensors", segmenter(), **META, scaling=[[0.001, -0.1]] * 4)
    array = image(30, 20).astype("int16")
    raster.write(tmp_path / "a.tif", array, PLACE, 32633, scaling=[(0.001, -0.1)] * 4)
    other = (array * 0.001 - 0.1 - 0.5).astype("float32")
    raster.write(tmp_path / "b.tif", other, PLACE, 32633, scaling=[(1.0, 0.5)] * 4)
    for name in "ab":
        main("--model", tmp_path / "m.safetensors", tmp_path / f"{name}.tif",
             tmp_path / f"map_{name}.tif", "--probabilities")  # fmt: skip
    out = capsys.readouterr().out
    assert "b.tif: its tags say scale and offset (1.0, 0.5)" in out and "a.tif: its tags" not in out
    a, b = (raster.read(tmp_path / f"map_{name}_probabilities.tif") for name in "ab")
    assert np.abs(a - b).max() < 2e-3  # of 11 bits each


@pytest.mark.parametrize("tagged", [False, True], ids=["plain", "tagged"])
def test_tags_count_for_an_encoder_as_for_a_model(tmp_path, capsys, tagged):
    """Pretrained on files without tags, or on pixels whose tags were not looked at."""
    scaling = [(0.001, -0.1)] * 4
    stored, plain = image(30, 20).astype("int16"), tmp_path / "plain.tif"
    values = (stored * 0.001 - 0.1).astype("float32")
    raster.write(plain, stored if tagged else values, PLACE, 32633, band_names=BANDS)
    raster.write(tmp_path / "b.tif", stored, PLACE, 32633, band_names=BANDS, scaling=scaling)
    gain, shift = (1, 0) if tagged else scaling[0]
    facts = dict(mean=[m * gain + shift for m in META["mean"]], std=[s * gain for s in META["std"]])
    save_encoder(segmenter().encoder, tmp_path / "e.safetensors", bands=BANDS, **facts)
    model = tmp_path / "e.safetensors"
    for name in ("plain", "b"):
        main("--model", model, tmp_path / f"{name}.tif", tmp_path / f"f_{name}.tif", "--features",
             "--tile", 16)  # fmt: skip
    out, err = capsys.readouterr()
    assert ("b.tif: its tags say scale and offset (0.001, -0.1)" in out) == (not tagged)
    assert "warning" not in err
    expected, found = (raster.read(tmp_path / f"f_{name}.tif") for name in ("plain", "b"))
    assert np.abs(expected - found).max() < 4e-3  # of 11 bits each


def test_features_in_8_bits_are_off_by_half_a_step_at_most(tmp_path, trained):
    array = image(60, 45)
    array[:, :24, :24] = 0
    write(tmp_path / "a.tif", array)
    for name, more in (("whole", ()), ("small", ("--int8",))):
        main("--model", trained, tmp_path / "a.tif", tmp_path / f"{name}.tif", "--features", *more)
    with (
        rasterio.open(tmp_path / "whole_features.tif") as whole,
        rasterio.open(tmp_path / "small_features.tif") as small,
    ):
        assert {*small.dtypes} == {"uint8"} and small.transform == whole.transform
        scales, offsets = (np.array(v)[:, None, None] for v in (small.scales, small.offsets))
        expected, found = whole.read(), small.read(masked=True)
        assert np.array_equal(found.mask, np.isnan(expected)) and found.mask.any()
        found = found.astype("float64") * scales + offsets
        error = np.abs(found - expected).filled(0)
        assert (error <= scales * (0.5 + 1e-6)).all()
        assert (found.min((1, 2)) == np.nanmin(expected, (1, 2))).all()
        assert (scales > 0).all() and (
            np.nanmax(expected, (1, 2)) <= found.max((1, 2)) + 1e-6
        ).all()


def test_features_in_8_bits_of_nothing(tmp_path, trained):
    write(tmp_path / "a.tif", np.zeros((4, 30, 20), np.uint16))
    main("--model", trained, tmp_path / "a.tif", tmp_path / "m.tif", "--features", "--int8")
    assert (raster.read(tmp_path / "m_features.tif") == 255).all()


def test_the_picture_says_what_its_halves_are(tmp_path, trained, monkeypatch):
    array, said = image(30, 20), []
    array[:, :5] = 0
    monkeypatch.setattr(predict, "save_figure", lambda figure, path: said.append(figure))
    write(tmp_path / "my_scene.tif", array)
    main("--model", trained, tmp_path / "my_scene.tif", tmp_path / "m.tif", "--png")
    (figure,) = said
    left, right = (axis.get_title() for axis in figure.axes)
    assert "my_scene.tif" in left and "class" in right
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[-1] == "white: no data" and any(text.startswith("water") for text in texts)
    assert "share" in legend.get_title().get_text()


# ---- what does not fit ------------------------------------------------------------------------


def about(names=(), count=None, gsd=10.0, crs=None, north=0.0):
    return raster.Info(
        Path("s.tif"), 100, 100, count or len(names), np.dtype("uint16"), None,
        (gsd, 0.0, 0.0, 0.0, -gsd, north), crs, tuple(names),
    )  # fmt: skip


@pytest.mark.parametrize("scene, flag, expected", [
    (about(("NIR", "R", "G", "B")), None, ([3, 2, 1, 0], "by name")),
    (about(("B01", "B02", "B03", "B04", "B05", "B08")), None, ([1, 2, 3, 5], "by name")),
    (about(("red", "Green", "BLUE", "B08")), None, ([2, 1, 0, 3], "by name")),
    (about(("B8", "B4", "B3", "B2")), None, ([3, 2, 1, 0], "by name")),
    (about(count=13), None, ([1, 2, 3, 7], "at the positions of the training files")),
    (about(count=4), None, ([0, 1, 2, 3], "in the scene's order")),
    (about(("x1", "x2", "x3", "x4")), None, ([0, 1, 2, 3], "in the scene's order")),
    (about(("B", "G", "R", "NIR")), "3,2,1,0", ([3, 2, 1, 0], "--bands")),
    (about(("B", "G", "R", "SWIR", "X")), "B,G,R,SWIR", ([0, 1, 2, 3], "--bands")),
])  # fmt: skip
def test_bands_are_found(scene, flag, expected):
    model = segmenter(positions=[1, 2, 3, 7], file_bands=13)
    bands, how = choose_bands(scene, model, flag and flag.split(","))
    assert bands == expected[0] and how.startswith(expected[1])


def test_weights_without_names_read_red_green_and_blue(tmp_path):
    torch.save(ViT(3, 4, 32, 1, 4).state_dict(), tmp_path / "rgb.pt")
    model = predict.load_model(tmp_path / "rgb.pt", None, None, 4, torch.device("cpu"))
    assert choose_bands(about(("B", "G", "R")), model) == ([2, 1, 0], "by name")
    assert choose_bands(about(("B02", "B03", "B04", "B08")), model)[0] == [2, 1, 0]
    assert choose_bands(about(count=3), model)[0] == [0, 1, 2]


@pytest.mark.parametrize("scene, flag, mentions", [
    (about(("B", "G", "R")), None, ["3 bands (B,G,R)", "NIR", "--bands"]),
    (about(count=5), None, ["5 bands", "4 (B,G,R,NIR)", "--bands 0,1,2,3"]),
    (about(count=5), "0,1,2", ["--bands 0,1,2", "5 bands"]),
    (about(count=5), "0,1,2,5", ["--bands 0,1,2,5", "5 bands", "from 0"]),
    (about(("B", "G", "R", "X")), "B,G,R,NIR", ["--bands B,G,R,NIR", "4 bands (B,G,R,X)"]),
    # Landsat's B8 is no near infrared
    (about(("Red", "Green", "Blue", "B8")), None, ["none is NIR", "--bands"]),
])  # fmt: skip
def test_bands_that_do_not_fit(scene, flag, mentions):
    with refused(ValueError, "s.tif", *mentions):
        choose_bands(scene, segmenter(), flag and flag.split(","))


def test_another_gsd_is_said_with_the_window_that_fits():
    model = segmenter(tile=64)
    assert predict.gsd_warning(about(count=4, gsd=11.9), model) is None
    assert predict.gsd_warning(about(count=4, gsd=8.4), model) is None
    found = predict.gsd_warning(about(count=4, gsd=20.0), model)
    assert all(each in found for each in ("s.tif", " 20 ", " 10;", "--tile 32 "))
    degrees = about(count=4, gsd=10 / 111_320, crs="EPSG:4326")
    assert predict.gsd_warning(degrees, model) is None
    north = about(count=4, gsd=10 / 111_320, crs="EPSG:4326", north=60.0)
    assert " 7.0" in predict.gsd_warning(north, model)
    assert predict.gsd_warning(about(count=4), segmenter(gsd=None)) is None
    of_degrees = segmenter(gsd=10 / 111_320)
    assert predict.gsd_warning(degrees, of_degrees) is None
    assert predict.gsd_warning(about(count=4, gsd=10.0), of_degrees) is None
    fit = f"--tile {round(of_degrees.meta['tile'] / 3)} "
    assert fit in predict.gsd_warning(about(count=4, gsd=30.0), of_degrees)
    beyond = about(count=4, gsd=10 / 111_320, crs="EPSG:4326", north=600.0)
    predict.gsd_warning(beyond, model)  # no place on Earth, but no reason to stop


def test_another_scale_is_said_with_the_numbers(tmp_path, trained, capsys):
    array = image(40, 30)
    write(tmp_path / "same.tif", array)
    write(tmp_path / "small.tif", (array / 10000).astype(np.float32))
    main("--model", trained, tmp_path / "same.tif", tmp_path / "a.tif")
    assert "warning" not in capsys.readouterr().err
    main("--model", trained, tmp_path / "small.tif", tmp_path / "b.tif")
    error = capsys.readouterr().err
    assert all(each in error for each in ("small.tif", "mean 0.0", "100,200,300,400", "--offset"))
    main("--model", trained, tmp_path / "small.tif", tmp_path / "c.tif", "--scale", 1e4)
    write(tmp_path / "more.tif", array + 1000)
    main("--model", trained, tmp_path / "more.tif", tmp_path / "d.tif", "--offset", -1000)
    assert "warning" not in capsys.readouterr().err
    maps = [raster.read(tmp_path / f"{name}.tif") for name in "abcd"]
    assert np.array_equal(maps[0], maps[3]) and (maps[0] == maps[2]).mean() > 0.999
    assert not np.array_equal(maps[0], maps[1])


def test_the_offset_comes_before_the_scale(tmp_path, trained, capsys):
    """(value - 1000) / 4 of a file is what another file holds, bit for bit where the model has
    statistics; holes stay holes."""
    array = image(40, 30)
    stored = 4 * array + 1000
    stored[:, 5:9, 5:9] = array[:, 5:9, 5:9] = 0
    plain, packed = write(tmp_path / "plain.tif", array), write(tmp_path / "packed.tif", stored)
    units = ("--offset", -1000, "--scale", 0.25)
    save_encoder(segmenter().encoder, tmp_path / "bare.safetensors")  # normalised by the scene
    for model, kinds in (
        (trained, ("--probabilities", "--features")),
        (tmp_path / "bare.safetensors", ("--features", "--tile", 16)),
    ):
        for scene, flags in ((plain, ()), (packed, units)):
            main("--model", model, scene, tmp_path / scene.stem / "map.tif", *kinds, *flags)
        printed = capsys.readouterr()
        assert "warning" not in printed.err
        for path in (tmp_path / "plain").glob("*.tif"):
            wanted, found = raster.read(path), raster.read(tmp_path / "packed" / path.name)
            # 11 bits of values up to 4, whose last one statistics of the scene may turn
            close = 0 if model == trained else 2**-9
            assert np.allclose(found, wanted, rtol=0, atol=close, equal_nan=True)
            path.unlink(), (tmp_path / "packed" / path.name).unlink()


def test_what_is_refused_before_any_work(tmp_path, trained):
    scene = write(tmp_path / "a.tif", image(20, 20))
    (tmp_path / "other").mkdir()
    same = write(tmp_path / "other" / "a.tif", image(20, 20))
    (tmp_path / "old.tif").write_bytes(b"precious")
    old, out = tmp_path / "old.tif", tmp_path / "new.tif"
    for words, *mentions in [
        ((scene, old), "old.tif", "--overwrite"),
        ((scene, scene, "--overwrite"), "a.tif", "itself"),
        ((scene, same, tmp_path / "maps"), "maps/a.tif", "another"),
        ((scene, same, old), "old.tif", "folder"),
        ((scene, out, "--int8"), "--int8", "--features"),
        ((tmp_path / "none*.tif", out), "none*.tif"),
        (("--model", tmp_path / "none", scene, out), "none"),
        ((scene, out, "--overlap", 12), "--overlap 12", "12 px"),
        ((scene, out, "--image-size", 32), "--image-size"),
        ((scene, out, "--features", "--tile", 11), "--features", "11 px", "--tile 12"),
        ((scene, out, "--scale", 0), "--scale 0"),
        *([] if torch.cuda.is_available() else [((scene, out, "--device", "cuda"), "--device")]),
    ]:
        with refused(SystemExit, *mentions):
            main("--model", trained, *words)
    assert not out.exists() and old.read_bytes() == b"precious"
    main("--model", trained, scene, old, "--overwrite")
    assert raster.info(old).bands == 1
    main("--model", trained, scene, out, "--features", "--tile", 12)  # as the error said


def test_a_damaged_tile_is_found_before_the_work(tmp_path, trained):
    scene = write(tmp_path / "a.tif", image(600, 20))
    with tifffile.TiffFile(scene) as tif:
        where = tif.pages[0].dataoffsets[2]
    with scene.open("r+b") as file:
        file.seek(where)
        file.write(b"\xff" * 64)
    with refused(SystemExit, "a.tif", "fetch the file again"):
        main("--model", trained, scene, tmp_path / "m.tif")
    assert not (tmp_path / "m.tif").exists()


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (OSError("disk full"), 2)])
def test_an_interrupted_run_leaves_nothing(tmp_path, trained, monkeypatch, capsys, error, code):
    scene = write(tmp_path / "a.tif", image(60, 20))
    calls, forward = [], ViT.forward

    def fail(self, images):
        calls.append(1)
        if len(calls) > 3:
            raise error
        return forward(self, images)

    monkeypatch.setattr(ViT, "forward", fail)
    with pytest.raises(SystemExit) as stopped:
        main("--model", trained, scene, tmp_path / "m.tif", "--features", "--png",
             "--probabilities", "--batch", 2)  # fmt: skip
    assert len(calls) == 4 and stopped.value.code == code
    said = capsys.readouterr().err.splitlines()[-1]
    assert ("interrupted; maps that were finished stay" if code == 130 else "disk full") in said
    assert os.listdir(tmp_path) == ["a.tif"]
