import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from real_tasks import SETTINGS, write_eolearn, write_ukis

import finetune
import geotiff
from finetune import Probe, crop_labels, segmentation_loss
from model import ViT, load_encoder, save_encoder
from tasks import IGNORE, confusion_matrix, mean_iou

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A weights file of a ViT for 2 bands, 4 px patches."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    vit = ViT(in_channels=2, patch_size=4, dim=32, depth=1, heads=2)
    save_encoder(vit, path, bands=["R", "NIR"], mean=[100.0, 100.0], std=[50.0, 50.0])
    return path


def write_scenes(folder, shuffled=False, count=6, side=64):
    """Georeferenced scenes of plots of 16 px whose class gives the bands their levels."""
    rng = np.random.default_rng(0)
    levels = np.array([[50, 400], [400, 50], [400, 400]])
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        plots = rng.permutation(np.arange((side // 16) ** 2) % 3).reshape(side // 16, -1)
        mask = plots.repeat(16, 0).repeat(16, 1)
        image = levels[mask].transpose(2, 0, 1) + rng.normal(0, 20, (2, *mask.shape))
        if shuffled:
            mask = rng.permutation(plots.ravel()).reshape(plots.shape).repeat(16, 0).repeat(16, 1)
        place = (10.0, 0.0, 1000.0 * i, 0.0, -10.0, 0.0)
        image = image.clip(0).astype(np.uint16)
        geotiff.write(folder / "images" / f"s{i}.tif", image, place, 32633)
        geotiff.write(folder / "masks" / f"s{i}.tif", mask.astype(np.uint8), place, 32633)
    (folder / "classes.txt").write_text("field\nforest\nsoil\n")
    for split, numbers in (("train", (0, 1, 2)), ("val", (3,)), ("test", (4, 5))):
        (folder / f"{split}.txt").write_text("".join(f"s{k}\n" for k in numbers))
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes") / "plots")


def run(scenes, encoder, out, *flags):
    """Run the script in this process; returns the rows that it added."""
    results = Path(out) / "results.jsonl"
    before = results.read_text().splitlines() if results.exists() else []
    finetune.main([
        "--encoder", str(encoder), "--images", str(scenes / "images"),
        "--masks", str(scenes / "masks"), "--classes", str(scenes / "classes.txt"),
        "--splits", str(scenes), "--tile", "16", "--image-size", "16", "--batch", "16",
        "--epochs", "2", "--device", "cpu", "--out", str(out), *flags,
    ])  # fmt: skip
    lines = results.read_text().splitlines()
    assert lines[: len(before)] == before
    return [json.loads(line) for line in lines[len(before) :]]


# ---- pieces -----------------------------------------------------------------------------------


def test_probe_of_tokens_is_probe_of_images(encoder):
    probe = Probe(load_encoder(encoder), 3, 24)
    images = torch.rand(2, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    logits = probe(images)
    assert logits.shape == (2, 3, 6, 6)
    assert torch.equal(logits, probe(probe.tokens(images)))
    # row 1, column 2 of the grid is token 1 * 6 + 2
    assert torch.allclose(logits[:, :, 1, 2], probe.head(probe.tokens(images)[:, 8]), atol=1e-6)


def test_probe_resizes_by_antialiased_bicubic(encoder):
    probe = Probe(load_encoder(encoder), 3, 24)
    images = torch.rand(2, 2, 50, 50, generator=torch.Generator().manual_seed(0))
    small = F.interpolate(images, (24, 24), mode="bicubic", antialias=True)
    assert torch.equal(probe(images), probe(small))


@pytest.mark.parametrize("size", [7, 16, 40])
def test_crop_labels_is_the_slow_loop(size):
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 9, (3, 16, 16)))
    windows = torch.tensor([[0, 0, 16, 16], [2.5, 7.1, 9.3, 8.9], [6.7, 0.2, 9.3, 15.8]])
    out = crop_labels(labels, windows, size)
    for b, (top, left, height, width) in enumerate(windows.tolist()):
        for i in range(size):
            for j in range(size):
                row, col = top + (i + 0.5) / size * height, left + (j + 0.5) / size * width
                assert out[b, i, j] == labels[b, int(row), int(col)]


def test_loss_is_the_mean_over_labelled_pixels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, generator=generator, requires_grad=True)
    labels = torch.randint(0, 3, (2, 16, 16), generator=generator)
    labels[0, :9] = IGNORE
    big = F.interpolate(logits, (16, 16), mode="bilinear")
    wanted = F.cross_entropy(big, labels, ignore_index=IGNORE)
    assert torch.allclose(segmentation_loss(logits, labels), wanted)
    loss = segmentation_loss(logits, torch.full_like(labels, IGNORE))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_batch_mean_iou_by_hand(encoder):
    probe = Probe(load_encoder(encoder), 3, 16)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5, 16, 32, generator=generator)
    labels = torch.randint(0, 3, (5, 24, 24), generator=generator)
    labels[:2] = 1  # so that batches differ in their classes
    scores = []
    for part in (slice(0, 2), slice(2, 4), slice(4, 5)):
        grid = probe.head(tokens[part]).transpose(1, 2).reshape(-1, 3, 4, 4)
        prediction = F.interpolate(grid, (16, 16), mode="bilinear").argmax(1)
        small = F.interpolate(labels[part, None].float(), (16, 16), mode="nearest-exact")[:, 0]
        iou = []
        for k in range(3):
            union = ((prediction == k) | (small == k)).sum()
            iou += [(((prediction == k) & (small == k)).sum() / union).item()] if union else []
        scores.append(np.mean(iou))
    found = finetune.batch_mean_iou(probe, tokens, labels, batch=2)
    assert found == pytest.approx(np.mean(scores), abs=1e-6)

    native = confusion_matrix(finetune.predict(probe, tokens, 24, 2), labels, 3)
    assert abs(mean_iou(native)[0] - found) > 1e-3  # another resolution and another mean


def test_weights_hash_sees_every_weight():
    vit = ViT(in_channels=2, patch_size=4, dim=32, depth=1, heads=2)
    first = finetune.weights_hash(vit)
    assert first == finetune.weights_hash(vit)
    for weight in vit.parameters():
        before = weight.data.flatten()[0].item()
        weight.data.view(-1)[0] += 1
        assert finetune.weights_hash(vit) != first
        weight.data.view(-1)[0] = before


# ---- the script -------------------------------------------------------------------------------


def test_separable_task_is_learnt_and_shuffled_labels_are_not(scenes, encoder, tmp_path):
    flags = ["--epochs", "15", "--lr", "0.03"]
    (row,) = run(scenes, f"random:{encoder}", tmp_path / "out", *flags)
    assert row["miou"] > 0.95 and row["accuracy"] > 0.95 and min(row["iou"].values()) > 0.9
    (row,) = run(
        write_scenes(tmp_path / "shuffled", shuffled=True), f"random:{encoder}",
        tmp_path / "out", *flags,
    )  # fmt: skip
    assert row["miou"] < 0.5


@pytest.mark.parametrize("protocol", ["linear", "finetune"])
def test_only_finetuning_changes_the_encoder(scenes, encoder, tmp_path, monkeypatch, protocol):
    probes = []
    monkeypatch.setattr(finetune, "Probe", lambda *a: probes.append(Probe(*a)) or probes[-1])
    (row,) = run(scenes, encoder, tmp_path, "--protocol", protocol)
    before, after = load_encoder(encoder).state_dict(), probes[0].encoder.state_dict()
    same = [torch.equal(before[name], after[name]) for name in before]
    assert all(same) if protocol == "linear" else not any(same)
    wanted = {"linear": (1e-3, 0.0), "finetune": (1e-4, 0.05)}[protocol]
    assert (row["settings"]["lr"], row["settings"]["weight_decay"]) == wanted
    assert row["encoder_hash"] == finetune.weights_hash(load_encoder(encoder))


def without_time(row):
    return {k: v for k, v in row.items() if k not in ("seconds", "finished", "confusion")}


@pytest.mark.parametrize("flags", [("--crop",), ("--no-crop",), ("--protocol", "finetune")])
def test_seeds_repeat_and_differ(scenes, encoder, tmp_path, flags):
    rows = run(scenes, encoder, tmp_path, *flags, "--seeds", "2")
    again = run(scenes, encoder, tmp_path, *flags, "--seeds", "2")
    assert [*map(without_time, rows)] == [*map(without_time, again)]
    assert rows[0]["seed"] == 0 and rows[1]["seed"] == 1
    assert rows[0]["iou"] != rows[1]["iou"]


def test_cached_tokens_train_like_recomputed_ones(scenes, encoder, tmp_path, monkeypatch):
    """The whole tile as its only crop: the encoder then sees each image anew in every step."""
    (cached,) = run(scenes, encoder, tmp_path, "--no-crop", "--epochs", "5")
    whole = np.array([[0.0, 0.0, 1.0, 1.0]])
    monkeypatch.setattr(finetune, "draw_crops", lambda seed, step, n: whole.repeat(n, 0))
    (cropped,) = run(scenes, encoder, tmp_path, "--crop", "--epochs", "5")
    assert cropped["miou"] == pytest.approx(cached["miou"], abs=1e-3)


@pytest.mark.parametrize("protocol", ["linear", "finetune"])
def test_training_crops_show_image_and_label_of_the_same_ground(
    scenes, encoder, tmp_path, monkeypatch, protocol
):
    images, labels = [], []
    tokens, loss = Probe.tokens, finetune.segmentation_loss

    def spy_tokens(self, x):
        if torch.is_grad_enabled():
            images.append(x)
        return tokens(self, x)

    monkeypatch.setattr(Probe, "tokens", spy_tokens)
    monkeypatch.setattr(finetune, "segmentation_loss", lambda x, y: labels.append(y) or loss(x, y))
    # 2 x 2 plots to a tile, and as many pixels to the encoder as to the label
    run(scenes, encoder, tmp_path, "--protocol", protocol, "--tile", "32", "--image-size", "32")
    image, label = torch.cat(images), torch.cat(labels)
    assert image.shape == (2 * 12, 2, 32, 32)
    # the levels of the plots: band 0 is low in class 0, band 1 in class 1
    shown = torch.where(image[:, 0] < 0, 0, torch.where(image[:, 1] < 0, 1, 2))
    assert (shown == label).float().mean() > 0.97  # all but edges, which the kernel softens
    assert len({tuple(each.flatten().tolist()) for each in label}) == len(label)  # crops differ


def test_random_encoders_are_drawn_by_seed(scenes, encoder, tmp_path):
    first, second = run(scenes, f"random:{encoder}", tmp_path, "--seeds", "2")
    assert first["encoder_hash"] != second["encoder_hash"]
    assert first["architecture"] == {**load_encoder(encoder).config}
    (plain,) = run(scenes, "random", tmp_path, "--model", "tiny", "--patch", "8")
    assert plain["architecture"]["dim"] == 192 and plain["architecture"]["in_channels"] == 2


def test_label_fraction(scenes, encoder, tmp_path):
    full, quarter, least = (
        run(scenes, encoder, tmp_path, "--epochs", "1", "--labels", fraction)[0]["tiles"]
        for fraction in ("1", "0.25", "0.0001")
    )
    assert full == {"train": 48, "val": 16, "test": 32}
    assert quarter == {**full, "train": 12}
    assert least == {**full, "train": 1}


def test_row_and_table(scenes, encoder, tmp_path, capsys):
    (row,) = run(scenes, encoder, tmp_path / "out")
    assert {
        "encoder", "encoder_hash", "data_hash", "protocol", "seed", "miou", "miou_batchmean",
        "accuracy", "iou", "val_miou", "best_epoch", "confusion", "tiles", "split_by", "mean",
        "std", "architecture", "settings", "commit", "versions", "device", "finished", "seconds",
    } == {*row}  # fmt: skip
    text = capsys.readouterr().out
    for name in ("field", "forest", "soil", f"{row['miou']:.4f}", f"{row['miou_batchmean']:.4f}"):
        assert name in text
    lines = (tmp_path / "out" / row["confusion"]).read_text().splitlines()
    assert lines[0] == "label / prediction,field,forest,soil"
    matrix = torch.tensor([[int(n) for n in line.split(",")[1:]] for line in lines[1:]])
    assert matrix.sum() == 2 * 64 * 64  # every test pixel at native resolution, once
    assert mean_iou(matrix)[0] == pytest.approx(row["miou"])
    assert row["accuracy"] == pytest.approx((matrix.diagonal().sum() / matrix.sum()).item())
    assert not [*(tmp_path / "out").glob("*.tmp")]


def test_test_score_is_of_the_best_validation_epoch(scenes, encoder, tmp_path, monkeypatch):
    """Training beyond the best epoch must not move the score."""
    original = finetune.mean_iou

    def ends_after(epochs, best):
        scores = {best: 2.0}  # better than any true one
        count = iter(range(1, 99))

        def stub(matrix):
            miou, iou = original(matrix)
            return scores.get(next(count), miou), iou

        monkeypatch.setattr(finetune, "mean_iou", stub)
        flags = ["--lr", "0.02", "--no-crop", "--epochs", str(epochs)]
        return run(scenes, encoder, tmp_path, *flags)[0]

    long, short, last = ends_after(8, best=3), ends_after(3, best=3), ends_after(8, best=8)
    assert long["best_epoch"] == short["best_epoch"] == 3
    assert long["iou"] == short["iou"] != last["iou"]


def test_cosine_ends_at_zero(scenes, encoder, tmp_path, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **options):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    run(scenes, encoder, tmp_path, "--schedule", "cosine", "--lr", "0.1")
    assert len(rates) == 2 * 3  # epochs x batches of 16 out of 48
    assert rates == pytest.approx([0.05 * (1 + np.cos(np.pi * t / 6)) for t in range(6)])
    rates.clear()
    run(scenes, encoder, tmp_path, "--lr", "0.1")
    assert rates == [0.1] * 6


def test_statistics(scenes, encoder, tmp_path):
    (task,) = run(scenes, encoder, tmp_path, "--epochs", "1")
    train = np.concatenate([geotiff.read(scenes / "images" / f"s{i}.tif") for i in (0, 1, 2)], 1)
    assert task["mean"] == pytest.approx(train.mean((1, 2)).tolist(), rel=1e-5)
    assert task["std"] == pytest.approx(train.std((1, 2)).tolist(), rel=1e-5)
    (own,) = run(scenes, encoder, tmp_path, "--epochs", "1", "--stats", "encoder")
    assert own["mean"] == [100.0, 100.0] and own["std"] == [50.0, 50.0]


def test_maps_keep_the_georeference_and_are_what_was_scored(scenes, encoder, tmp_path):
    # 64 px scenes in tiles of 24: the last tiles reach beyond the image
    flags = ["--tile", "24", "--image-size", "24", "--maps", str(tmp_path / "maps"), "--seeds", "2"]
    row, _ = run(scenes, encoder, tmp_path / "out", *flags)
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == ["s4.tif", "s5.tif"]
    matrix = 0
    for name in ("s4.tif", "s5.tif"):
        of_map = geotiff.info(tmp_path / "maps" / name)
        of_image = geotiff.info(scenes / "images" / name)
        assert (of_map.transform, of_map.crs) == (of_image.transform, of_image.crs)
        assert of_map.nodata == 255 and of_map.dtype == np.uint8
        prediction = geotiff.read(tmp_path / "maps" / name)
        mask = geotiff.read(scenes / "masks" / name)
        matrix = matrix + confusion_matrix(torch.tensor(prediction), torch.tensor(mask), 3)
    assert mean_iou(matrix)[0] == pytest.approx(row["miou"])


def test_maps_leave_out_nodata_and_the_ground_of_other_splits(scenes, encoder, tmp_path):
    holes = tmp_path / "holes"
    for name in ("images", "masks"):
        (holes / name).mkdir(parents=True)
    for i in range(6):
        about = geotiff.info(scenes / "images" / f"s{i}.tif")
        image, mask = (geotiff.read(scenes / n / f"s{i}.tif") for n in ("images", "masks"))
        image[:, 5:9, 30:40] = 0
        for name, array in (("images", image), ("masks", mask)):
            nodata = 0 if name == "images" else None
            path = holes / name / f"s{i}.tif"
            geotiff.write(path, array, about.transform, about.crs, nodata=nodata)
    finetune.main([
        "--encoder", str(encoder), "--images", str(holes / "images"), "--masks",
        str(holes / "masks"), "--tile", "16", "--block", "1", "--image-size", "16", "--epochs", "1",
        "--device", "cpu", "--out", str(tmp_path / "out"), "--maps", str(tmp_path / "maps"),
    ])  # fmt: skip
    row = json.loads((tmp_path / "out" / "results.jsonl").read_text())
    maps = [geotiff.read(path)[0] for path in (tmp_path / "maps").iterdir()]
    assert all((each[5:9, 30:40] == 255).all() for each in maps)
    predicted = sum((each != 255).sum() for each in maps)
    assert row["tiles"]["test"] * 256 - len(maps) * 40 <= predicted < row["tiles"]["test"] * 256
    assert "ground" in row["split_by"]


# ---- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--bands", "0"], r"--encoder .* reads 2 bands \(R,NIR\), the task has 1; .*--bands"),
        (["--image-size", "18"], r"--image-size 18 is no multiple .* of 4 px; try 16 or 20"),
        (["--image-size", "2"], r"--image-size 2 is no multiple .* of 4 px; try 4$"),
        (["--masks", "nowhere"], r"nowhere: no \.tif or \.tiff file there"),
        (["--classes", "nowhere"], r"nowhere: no such file; --classes"),
        (["--encoder", "nowhere"], r"nowhere: no such"),
        (["--encoder", "random", "--patch", "8", "--stats", "encoder"], r"--stats encoder: random"),
        (["--bands", "0,5"], r"s0\.tif: --bands 0,5 asks for more than its 2 bands"),
        (["--maps", "."], r"--maps \. exists; name a new folder"),
        (["--maps", str(ROOT / "LICENSE" / "x")], r"--maps .*x cannot be written \(.*\); name"),
        (["--tile", "100000"], r"--tile 100000: the largest image is 64 px wide or high"),
    ],
)
def test_bad_input_exits_with_one_sentence(scenes, encoder, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        run(scenes, encoder, tmp_path / "out", *flags)
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2
    assert error.startswith("finetune.py: ")
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--epochs", "0"], ["--labels", "1.5"], ["--bands", "a"], ["--epoch", "3"], ["--lr", "nan"],
        ["--lr", "0"], ["--lr", "inf"], ["--weight-decay", "-1"], ["--weight-decay", "nan"],
        ["--split-seed", "-1"], ["--heads", "4", "--encoder", "random"],
    ],
)  # fmt: skip
def test_bad_flags_are_refused(scenes, encoder, tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as caught:
        run(scenes, encoder, tmp_path / "out", *flags)
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_held_out_fractions_must_leave_some(capsys):
    flags = ["--encoder", "e", "--images", "i", "--masks", "m", "--val", "0.6", "--test", "0.6"]
    with pytest.raises(SystemExit):
        finetune.parse_args(flags)
    assert "--val 0.6 and --test 0.6 leave nothing to train on" in capsys.readouterr().err
    assert finetune.parse_args([*flags, "--splits", "s"]).val == 0.6  # unused beside lists


@pytest.mark.parametrize("out", ["/proc/x", "file/x", "folder"])
def test_an_output_that_cannot_be_written(scenes, encoder, tmp_path, capsys, monkeypatch, out):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "results.jsonl").mkdir(parents=True)
    if out == "/proc/x" and sys.platform != "linux":
        pytest.skip("no /proc")
    monkeypatch.setattr(finetune, "load_folder", None)  # refused before it is called
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        finetune.main(["--encoder", str(encoder), "--images", "i", "--masks", "m",
                       "--out", str(tmp_path / out)])  # fmt: skip
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert re.search(r"^finetune.py: --out .* cannot be written \(.*\); name another", error), error
    assert sorted(tmp_path.rglob("*")) == before


def write_named(scenes, folder, *names):
    """The scenes with band names, as a folder of their own."""
    shutil.copytree(scenes, folder)
    for path in (folder / "images").iterdir():
        about = geotiff.info(path)
        geotiff.write(path, geotiff.read(path), about.transform, about.crs, band_names=names)
    return folder


def test_bands_in_another_order_are_refused(scenes, encoder, tmp_path, capsys):
    swapped = write_named(scenes, tmp_path / "swapped", "NIR", "R")
    with pytest.raises(SystemExit) as caught:
        run(swapped, encoder, tmp_path / "out")
    error = capsys.readouterr().err
    assert caught.value.code == 2 and not (tmp_path / "out").exists()
    assert re.search(r"reads the bands R,NIR, but .*s0\.tif come as NIR,R; pass --bands 1,0", error)
    run(swapped, encoder, tmp_path / "out", "--bands", "1,0", "--epochs", "1")
    # the order is told in positions of the file, of which two were chosen
    file = SimpleNamespace(path="s0.tif", band_names=("NIR", "B", "R"))
    task = SimpleNamespace(images=np.zeros((1, 2, 4, 4)), files=[file])
    with pytest.raises(ValueError, match=r"s0\.tif come as NIR,R; pass --bands 2,0"):
        finetune.check_encoder(load_encoder(encoder), "e", task, [0, 2], 16)
    # names of another kind tell nothing
    foreign = write_named(scenes, tmp_path / "foreign", "B8", "B4")
    run(foreign, encoder, tmp_path / "out", "--epochs", "1")


def test_nodata_of_masks_is_said(scenes, encoder, tmp_path, capsys):
    masks = shutil.copytree(scenes, tmp_path / "task") / "masks"
    for path in masks.iterdir():
        about = geotiff.info(path)
        geotiff.write(path, geotiff.read(path), about.transform, about.crs, nodata=2)
    run(tmp_path / "task", encoder, tmp_path / "out", "--epochs", "1")
    assert capsys.readouterr().out.count("mask value 2 is nodata and ignored") == 1


def test_a_folder_of_something_else_is_left_alone(scenes, encoder, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(SystemExit):
        run(scenes, encoder, tmp_path)
    assert "exists and holds no results.jsonl" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_diverging_run_stops(scenes, encoder, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run(scenes, encoder, tmp_path, "--lr", "1e30", "--protocol", "finetune")
    assert caught.value.code == 2
    assert re.search(r"finetune.py: loss .* in epoch \d; lower --lr", capsys.readouterr().err)


def test_an_interrupt_is_one_line(scenes, encoder, tmp_path, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "segmentation_loss", interrupt)
    with pytest.raises(SystemExit) as caught:
        run(scenes, encoder, tmp_path / "out")
    assert caught.value.code == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("finetune.py: interrupted; finished seeds keep their rows in ")


def test_the_script_prints_no_traceback(tmp_path):
    (tmp_path / "a.tif").write_text("text")
    done = subprocess.run(
        [sys.executable, ROOT / "finetune.py", "--encoder", "random", "--images", tmp_path,
         "--masks", tmp_path, "--out", tmp_path / "out"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("finetune.py: ") and "a.tif: not a TIFF" in done.stderr


# ---- real labelled scenes ---------------------------------------------------------------------


@pytest.mark.parametrize("name, write, source", [
    ("ukis", write_ukis, "ukis_csmask/sentinel2.npz"),
    ("eolearn", write_eolearn, "eolearn_testeopatch/LULC.npy"),
])  # fmt: skip
def test_real_scenes_are_probed(real, tmp_path, name, write, source):
    task = tmp_path / name
    write(real(source).parent, task)
    torch.manual_seed(0)
    path = tmp_path / "encoder.safetensors"
    save_encoder(ViT(in_channels=4, patch_size=8, dim=64, depth=2, heads=2), path)
    finetune.main([
        "--encoder", str(path), "--images", str(task / "images"),
        "--masks", str(task / "masks"), "--classes", str(task / "classes.txt"),
        *SETTINGS[name], "--image-size", "64", "--epochs", "5", "--lr", "0.01", "--no-crop",
        "--device", "cpu", "--out", str(tmp_path / "out"), "--maps", str(tmp_path / "maps"),
    ])  # fmt: skip
    row = json.loads((tmp_path / "out" / "results.jsonl").read_text())
    assert row["accuracy"] > 0.5
    for path in (tmp_path / "maps").iterdir():
        image = geotiff.info(task / "images" / path.name)
        assert geotiff.info(path).transform == image.transform
