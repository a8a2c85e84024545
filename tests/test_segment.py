import json
import math
import re
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from safetensors.torch import load_file, save_file
from stores import write_store
from test_train import log_of, run, weights_of

import finetune
from imagery import raster
from imagery.bands import IGNORE
from imagery.scenes import write_scenes
from model import ViT
from segment import (
    HEADS,
    Pixels,
    Segmenter,
    UperNet,
    confusion_matrix,
    encode,
    fit_bank,
    fit_ridge,
    judge,
    knn_scores,
    load_segmenter,
    mean_iou,
    mean_of,
    probe,
    save_segmenter,
    token_labels,
)
from tiles import batches
from weights import load_encoder, save_encoder

META = {
    "classes": ["field", "forest", "soil"], "bands": ["R", "NIR"], "positions": [2, 3],
    "file_bands": 4, "mean": [100.0, 120.0], "std": [50.0, 60.0], "tile": 16, "gsd": 10.0,
    "encoder": "out/sa", "sources": [], "task": "geotiff", "protocol": "linear", "seed": 0,
    "val_miou": 0.5, "miou": 0.4,
}  # fmt: skip


def small_vit(depth=2, **changes):
    torch.manual_seed(0)
    return ViT(**{"in_channels": 2, "patch_size": 4, "dim": 32, "depth": depth, "heads": 2,
                  **changes})  # fmt: skip


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# ---- tokens and heads -------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_features_are_what_images_give(head):
    segmenter = Segmenter(small_vit(), 3, 24, head)
    images = noise(2, 2, 16, 16)
    logits = segmenter(images)
    assert logits.shape == (2, 3, *(2 * [24 if head == "upernet" else 6]))
    assert logits.dtype == torch.float32
    assert torch.equal(logits, segmenter(segmenter.features(images)))
    assert segmenter.tokens(images).shape == (2, 36, 32)
    # the deepest level is the encoder's output
    assert torch.equal(segmenter.features(images)[..., -32:], segmenter.tokens(images))


def test_heads_per_token_by_hand():
    images = noise(2, 2, 24, 24)
    for head in ("linear", "mlp"):
        segmenter = Segmenter(small_vit(), 3, 24, head)
        # row 1, column 2 of the grid is token 1 * 6 + 2
        token = segmenter.encoder(images)[:, 8]
        if head == "mlp":
            first, _, last = segmenter.head
            token = F.gelu(token @ first.weight.T + first.bias)
        else:
            last = segmenter.head
        wanted = token @ last.weight.T + last.bias
        torch.testing.assert_close(segmenter(images)[:, :, 1, 2], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(50, 50), (24, 40), (24, 24)])
def test_images_are_resized_by_antialiased_bicubic(shape):
    segmenter = Segmenter(small_vit(), 3, 24)
    images = noise(2, 2, *shape)
    small = F.interpolate(images, (24, 24), mode="bicubic", antialias=True)
    torch.testing.assert_close(segmenter(images), segmenter(small))


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("side", [4, 12, 28])
def test_upernet_of_any_depth_and_odd_grids(depth, side):
    segmenter = Segmenter(small_vit(depth, class_token=True), 5, side, "upernet")
    assert segmenter.depths[-1] == depth and min(segmenter.depths) >= 1
    assert segmenter(noise(1, 2, side, side)).shape == (1, 5, side, side)  # 4 px patches, x4


def test_upernet_reads_its_four_levels_and_no_neighbour_in_the_batch():
    torch.manual_seed(0)
    head = UperNet(16, 3, width=8)
    levels = noise(2, 64, 5, 7).requires_grad_()
    logits = head(levels)
    assert logits.shape == (2, 3, 20, 28)
    logits[0].square().sum().backward()
    use = levels.grad.unflatten(1, (4, 16)).abs().sum((2, 3, 4))
    assert (use[0] > 0).all() and (use[1] == 0).all()
    assert all(weight.grad is not None for weight in head.parameters())
    torch.testing.assert_close(head(levels[1:])[0], logits[1], atol=1e-5, rtol=1e-5)


def test_quarters_of_the_depth():
    for depth, wanted in ((12, [3, 6, 9, 12]), (5, [2, 3, 4, 5]), (1, [1, 1, 1, 1])):
        assert Segmenter(small_vit(depth), 3, 24, "upernet").depths == wanted


@pytest.mark.parametrize("head", HEADS)
def test_time_series_are_averaged_over_the_dates_that_exist(head):
    segmenter = Segmenter(small_vit(), 3, 24, head)
    series = noise(3, 4, 2, 16, 16)
    series[0, 1:3] = series[1, 0] = series[2] = math.nan
    series[:, 3] = math.nan  # a date that no sample has
    found = segmenter.features(series)
    for sample, dates in ((0, [0]), (1, [1, 2])):
        wanted = segmenter.features(series[sample, dates]).mean(0)
        torch.testing.assert_close(found[sample], wanted, atol=1e-5, rtol=1e-5)
    assert (found[2] == 0).all()
    assert (segmenter.features(series[2:]) == 0).all()
    assert segmenter(series).isfinite().all()
    found.sum().backward()
    assert all(weight.grad.isfinite().all() for weight in segmenter.encoder.parameters())


def test_a_series_of_one_date_is_an_image():
    vit, images = small_vit(), noise(3, 2, 24, 24)
    torch.testing.assert_close(encode(vit, images[:, None], 24), encode(vit, images, 24))


def test_unknown_head():
    with refused(ValueError, "mlpp", *HEADS):
        Segmenter(small_vit(), 3, 24, "mlpp")


# ---- reading and writing ----------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pos", ["latentmim", "learned"])
def test_a_saved_model_is_the_same_model(tmp_path, head, pos):
    vit = small_vit(class_token=True, pos=pos, pos_grid=(6, 6) if pos == "learned" else None)
    vit.head = torch.nn.Linear(32, 8)  # a projection, which segmentation does not use
    segmenter = Segmenter(vit, 3, 24, head).eval()
    path = tmp_path / "model_x.safetensors"
    save_segmenter(path, segmenter, **META)
    read = load_segmenter(path)
    images = noise(2, 2, 16, 16)
    assert torch.equal(read(images), segmenter(images))
    assert (read.meta, read.kind, read.classes, read.image_size) == (META, head, 3, 24)
    assert not read.training and [*tmp_path.iterdir()] == [path]
    # as an encoder to go on from
    encoder = load_encoder(path)
    assert torch.equal(encoder(images), vit(images)) and encoder.meta["bands"] == ["R", "NIR"]


def test_a_folder_gives_its_best_model(tmp_path, capsys):
    for name, classes in (("model_a.safetensors", 3), ("model_b.safetensors", 2)):
        meta = {**META, "classes": META["classes"][:classes]}
        save_segmenter(tmp_path / name, Segmenter(small_vit(), classes, 24), **meta)
    rows = [
        {"model": "model_a.safetensors", "val_miou": 0.2},
        {"model": "model_b.safetensors", "val_miou": 0.6},
        {"model": "model_a.safetensors", "val_miou": 0.4},
        {"model": None, "val_miou": 0.9},
        {"val_miou": 0.8},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "results.jsonl").write_text(lines)
    assert load_segmenter(tmp_path).classes == 2
    said = capsys.readouterr().out
    assert "model_b.safetensors" in said and "0.6000" in said


@pytest.mark.parametrize(
    "lines, kind, mention",
    [
        (None, FileNotFoundError, "results.jsonl"),
        ("", FileNotFoundError, "--protocol"),
        ('{"val_miou": 1}\n', FileNotFoundError, "--protocol"),
        ('{"model": "gone", "val_miou": 1}', FileNotFoundError, "results/gone"),
        ('{"model": "../../gone", "val_miou": 1}', FileNotFoundError, "results/gone"),
        ("5\n", FileNotFoundError, "--protocol"),
        ("{", FileNotFoundError, "--protocol"),
        ("\udc80", FileNotFoundError, "--protocol"),
    ],
)
def test_folders_without_a_model(tmp_path, lines, kind, mention):
    folder = tmp_path / "results"
    folder.mkdir()
    if lines is not None:
        (folder / "results.jsonl").write_bytes(lines.encode(errors="surrogateescape"))
    with refused(kind, folder, mention):
        load_segmenter(folder)


@pytest.mark.parametrize("torn", ['{"model": "mod', "\udc80", "5", "[1]", ""])
@pytest.mark.parametrize("first", [False, True])
def test_a_torn_line_costs_no_model(tmp_path, capsys, torn, first):
    save_segmenter(tmp_path / "a.safetensors", Segmenter(small_vit(), 3, 24), **META)
    rows = [
        json.dumps({"model": f"{name}.safetensors", "val_miou": miou})
        for name, miou in (("a", 0.6), ("b", 0.5))
    ]
    lines = "\n".join([torn, *rows] if first else [*rows, torn + "\n"])
    (tmp_path / "results.jsonl").write_bytes(lines.encode(errors="surrogateescape"))
    assert load_segmenter(tmp_path).classes == 3
    said = capsys.readouterr().out
    assert f"results.jsonl: line {1 if first else 3} " in said and "a.safetensors" in said


def test_a_folder_of_several_tasks_asks_for_the_file(tmp_path):
    rows = [
        {"model": "a", "val_miou": 0.2, "task": "mados", "iou": {"oil": None, "foam": 0.1}},
        {"model": "b", "val_miou": 0.3, "task": "mados", "iou": {"oil": 0.1, "foam": 0.1}},
        {"model": "c", "val_miou": 0.9, "task": "marida", "iou": {"oil": 0.1, "foam": 0.1}},
        {"model": "d", "val_miou": 0.1, "task": "mados", "iou": {"oil": 0.1, "ship": 0.1}},
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bests = [f"{tmp_path / name} for {task}" for name, task in
             (("c", "marida"), ("b", "mados"), ("d", "mados"))]  # fmt: skip
    with refused(ValueError, tmp_path / "results.jsonl", "3 tasks", *bests, "oil, foam"):
        load_segmenter(tmp_path)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    save_segmenter(path, Segmenter(small_vit(), 3, 24), **META)
    return path


def rewrite(path, tensors=None, **facts):
    """The file again with some facts changed, or removed where None is given."""
    known = {
        "config": small_vit().config,
        "segmenter": {"image_size": 24, "head": "linear"},
        "meta": META,
    }
    known = {k: v for k, v in {**known, **facts}.items() if v is not None}
    tensors = load_file(path) if tensors is None else tensors
    save_file(tensors, path, {"crossscale": json.dumps(known)})


def meta(**changes):
    return {"meta": {**META, **changes}}


@pytest.mark.parametrize(
    "facts, mention",
    [
        ({"segmenter": None}, "finetune.py --encoder"),
        ({"config": None}, "config"),
        ({"meta": None}, "meta"),
        ({"meta": []}, "meta"),
        ({"segmenter": {"image_size": 24, "head": "x"}}, "head"),
        ({"segmenter": {"image_size": 24, "head": "mlp"}}, "head"),
        (meta(classes=["a", "b"]), "head"),
        ({"meta": {"bands": ["R", "NIR"]}}, "classes"),
        (meta(bands=["R"]), "bands"),
    ],
)  # fmt: skip
def test_damaged_facts_get_one_sentence(saved, facts, mention):
    rewrite(saved, **facts)
    with refused(ValueError, f"{saved}: ", mention):
        load_segmenter(saved)


def test_weights_without_a_head_are_trained_by_the_remedy(saved):
    """What is said to type is a command that finetune.py understands."""
    rewrite(saved, segmenter=None)
    with refused(ValueError, saved) as error:
        load_segmenter(saved)
    flags = re.search(r"finetune\.py (--encoder \S+),", error.line)[1].split()
    assert load_encoder(finetune.parse_args([*flags, "--root", "r"]).encoder).dim == 32


def test_damaged_weights_get_one_sentence(saved):
    good = load_file(saved)
    for tensors, mention in [
        ({**good, "encoder.norm.bias": good["encoder.norm.bias"] / 0}, "norm.bias"),
        ({k: good[k] for k in good if k != "head.bias"}, ""),
        ({k: good[k] for k in good if "norm1" not in k}, "blocks.0.norm1"),
        ({"head.weight": good["head.weight"]}, ""),
    ]:
        rewrite(saved, tensors)
        with refused(ValueError, f"{saved}: ", mention):
            load_segmenter(saved)


def test_foreign_files_get_one_sentence(saved, tmp_path):
    save_encoder(small_vit(), tmp_path / "encoder.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    (tmp_path / "text.pt").write_text("text")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "weights.pt")
    torch.save({"code": np.random.default_rng}, tmp_path / "code.pt")
    save_file({"x": torch.zeros(1)}, tmp_path / "json.safetensors", {"crossscale": "{"})
    save_file({"x": torch.zeros(1)}, tmp_path / "five.safetensors", {"crossscale": "5"})
    names = ("text.safetensors", "text.pt", "weights.pt", "code.pt", "json.safetensors",
             "five.safetensors", "encoder.safetensors")  # fmt: skip
    for name in names:
        with refused(ValueError, f"{tmp_path / name}: "):
            load_segmenter(tmp_path / name)
    with refused(FileNotFoundError, f"{tmp_path / 'nowhere.safetensors'}: "):
        load_segmenter(tmp_path / "nowhere.safetensors")


# ---- reading and scoring a task ---------------------------------------------------------------


def toy_task(count=12, side=12, dates=None, seed=0):
    """Tiles of 4 px plots whose class gives the two bands their levels; some labels are missing."""
    rng = np.random.default_rng(seed)
    levels = np.array([[50, 400], [400, 50], [400, 400]], np.float32)
    label = rng.integers(0, 3, (count, side // 4, side // 4)).repeat(4, 1).repeat(4, 2)
    series = () if dates is None else (dates,)
    image = np.broadcast_to(
        np.expand_dims(levels[label].transpose(0, 3, 1, 2), 1 if dates else ()),
        (count, *series, 2, side, side),
    )
    image = (image + rng.normal(0, 10, image.shape)).astype(np.float32)
    label = np.where(rng.random(label.shape) < 0.2, IGNORE, label).astype(np.int16)
    return SimpleNamespace(
        images=image, labels=label, classes=("field", "forest", "soil"),
        split=np.array(["train", "val", "test"])[np.arange(count) * 3 // count],
        mean=np.array([280.0, 280.0]), std=np.array([170.0, 170.0]),
    )  # fmt: skip


def test_batches_are_the_tiles_normalised():
    task = toy_task(dates=3)
    task.images[2, 1] = np.nan  # a date that is absent
    task.images[2, 0, :, :3] = np.nan  # pixels of one that is not
    parts = [np.array([2, 0]), np.array([5, 3, 1])]
    found = [*batches(task, parts, task.mean, task.std, torch.device("cpu"))]
    for (images, labels), index in zip(found, parts, strict=True):
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert (labels.numpy() == task.labels[index]).all()
        wanted = (task.images[index] - 280) / 170
        wanted[np.isnan(wanted)] = 0
        if index[0] == 2:
            wanted[0, 1] = np.nan
        np.testing.assert_allclose(images, wanted, rtol=1e-6)
    assert np.isnan(task.images[2, 1]).all()  # the task itself is left alone


def test_batches_of_a_memmap_and_errors_of_the_reader(tmp_path):
    task = toy_task()
    shape = task.images.shape
    mapped = np.memmap(tmp_path / "images", np.float32, "w+", shape=shape)
    mapped[:] = task.images
    parts = [[0, 1, 2], [7]]

    def read():
        return [x for x, _ in batches(task, parts, [0, 0], [1, 1], torch.device("cpu"))]

    wanted = read()
    task.images = mapped
    assert all(torch.equal(a, b) for a, b in zip(read(), wanted, strict=True))
    parts.append([99])
    with pytest.raises(IndexError):
        read()


def test_one_batch_is_read_ahead_and_no_more():
    task, reads = toy_task(), []

    class Images:
        def __getitem__(self, index):
            reads.append(index)
            return images[index]

    images, task.images = task.images, Images()
    stream = batches(task, [[k] for k in range(12)], [0, 0], [1, 1], torch.device("cpu"))
    for k in range(10):
        next(stream)
        assert len(reads) <= k + 2
    stream.close()
    assert len(reads) <= 12


def test_judge_by_hand():
    generator = torch.Generator().manual_seed(0)
    segmenter = Segmenter(small_vit(), 3, 16)
    tokens = torch.randn(5, 16, 32, generator=generator)
    labels = torch.randint(0, 3, (5, 24, 24), generator=generator)
    labels[:2] = 1  # so that batches differ in their classes
    labels[4, :5] = IGNORE
    native, scores = 0, []
    for part in (slice(0, 2), slice(2, 4), slice(4, 5)):
        grid = segmenter.head(tokens[part]).transpose(1, 2).reshape(-1, 3, 4, 4)
        prediction = F.interpolate(grid, (24, 24), mode="bilinear").argmax(1)
        native = native + confusion_matrix(prediction, labels[part], 3)
        prediction = F.interpolate(grid, (16, 16), mode="bilinear").argmax(1)
        small = F.interpolate(labels[part, None].float(), (16, 16), mode="nearest-exact")[:, 0]
        iou = []
        for k in range(3):
            hit = ((prediction == k) & (small == k)).sum()
            union = (((prediction == k) & (small != IGNORE)) | (small == k)).sum()
            iou += [(hit / union).item()] if union else []
        scores.append(np.mean(iou))
    stream = [*zip(tokens.split(2), labels.split(2), strict=True)]
    matrix, found = judge(segmenter, stream, 3, 16)
    assert torch.equal(matrix, native)
    assert found == pytest.approx(scores, abs=1e-6)
    assert abs(mean_iou(native)[0] - mean_of(found)) > 1e-3  # another resolution, another mean
    assert judge(segmenter, stream, 3)[1] == [] and math.isnan(mean_of([]))
    assert mean_of([0.5, math.nan, 0.7]) == pytest.approx(0.6)
    # parts of a split add up to it, also where one has no batch
    parts = [judge(segmenter, each, 3, 16) for each in (stream[:1], [], stream[1:])]
    matrices, several = zip(*parts, strict=True)
    assert torch.equal(sum(matrices), native) and [*chain(*several)] == found


# ---- metric -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8])
def test_confusion_matrix_is_the_slow_loop(dtype):
    rng = np.random.default_rng(0)
    label, prediction = rng.integers(0, 5, (2, 3, 7, 5))
    label[0, :2] = 200
    slow = np.zeros((5, 5), int)
    for a, b in zip(label.ravel(), prediction.ravel(), strict=True):
        if a != 200:
            slow[a, b] += 1
    label, prediction = torch.tensor(label).to(dtype), torch.tensor(prediction).to(dtype)
    fast = confusion_matrix(prediction, label, 5, 200)
    assert fast.dtype == torch.int64
    assert np.array_equal(fast, slow)
    assert (fast.sum(0) != fast.sum(1)).any()  # so that swapped axes would be seen


def test_confusion_matrices_of_batches_add_up():
    label, prediction = torch.from_numpy(np.random.default_rng(0).integers(0, 4, (2, 6, 5, 5)))
    label[3] = IGNORE
    parts = zip(prediction.split(4), label.split(4), strict=True)
    assert torch.equal(
        sum(confusion_matrix(p, t, 4) for p, t in parts), confusion_matrix(prediction, label, 4)
    )


def test_confusion_matrix_without_a_labelled_pixel_is_zero():
    assert not confusion_matrix(torch.zeros(2, 3), torch.full((2, 3), IGNORE), 4).any()


@pytest.mark.parametrize("label, prediction", [(3, 0), (-2, 0), (0, 3), (0, -1)])
def test_confusion_matrix_refuses_ids_that_no_class_has(label, prediction):
    with refused(ValueError, label or prediction, "0 to 2"):
        confusion_matrix(torch.tensor([prediction]), torch.tensor([label]), 3)


def test_mean_iou_by_hand():
    # class 0: 6 / (6 + 2 + 1), class 1: 3 / (3 + 1 + 2), class 2 absent, class 3 only predicted
    matrix = torch.tensor([[6, 1, 0, 1], [1, 3, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]])
    matrix[3, 1], matrix[1, 0] = 0, 1
    miou, iou = mean_iou(matrix)
    assert iou[:2].tolist() == [6 / 9, 3 / 5]
    assert iou[2].isnan()
    assert iou[3] == 0  # predicted where it is not: a wrong class counts, an absent one does not
    assert miou == pytest.approx((6 / 9 + 3 / 5 + 0) / 3)


def test_mean_iou_of_nothing_is_nan():
    assert np.isnan(mean_iou(torch.zeros(3, 3, dtype=torch.int64))[0])


# ---- probes without a training loop -----------------------------------------------------------


def miou_of(found):
    return mean_iou(found["matrix"])[0]


@pytest.mark.parametrize("side, grid", [(12, 3), (16, 4), (10, 4), (3, 4)])
def test_token_labels_are_the_slow_loop(side, grid):
    labels = torch.from_numpy(np.random.default_rng(0).integers(-1, 3, (2, side, side)))
    labels[0, : side // 2] = IGNORE
    share, known = token_labels(labels, grid, 3)
    assert share.shape == (2, grid**2, 3)
    for b in range(2):
        for row in range(grid):
            for col in range(grid):
                rows, cols = (
                    slice(math.floor(k * side / grid), math.ceil((k + 1) * side / grid))
                    for k in (row, col)
                )
                pixels = [k for k in labels[b, rows, cols].flatten().tolist() if k != IGNORE]
                wanted = [pixels.count(k) / max(1, len(pixels)) for k in range(3)]
                assert share[b, row * grid + col].tolist() == pytest.approx(wanted, abs=1e-6)
                assert known[b, row * grid + col] == bool(pixels)


def test_knn_is_the_slow_loop():
    tokens, raw, votes = noise(7, 5), noise(11, 5) + 1, noise(11, 3).softmax(1)
    found = knn_scores(tokens, F.normalize(raw, dim=1), votes, k=4, temperature=0.1, rows=3)
    for token, scores in zip(tokens, found, strict=True):
        cosine = [float(token @ other / token.norm() / other.norm()) for other in raw]
        near = sorted(range(11), key=lambda k: -cosine[k])[:4]
        weight = [math.exp(cosine[k] / 0.1) for k in near]
        wanted = sum(w * votes[k] for w, k in zip(weight, near, strict=True)) / sum(weight)
        torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=1e-4)
    # fewer in the bank than are asked for
    assert knn_scores(tokens, F.normalize(raw[:2], dim=1), votes[:2]).isfinite().all()


def test_the_bank_is_a_uniform_sample_by_seed():
    tokens = torch.arange(1.0, 61)[:, None] @ torch.ones(1, 2)
    tokens[:, 1] = 1  # a direction of its own each
    share = torch.eye(60)
    whole, votes = fit_bank(zip(tokens.split(7), share.split(7), strict=True), 1000, 0)
    order = votes.argmax(1)
    assert sorted(order.tolist()) == [*range(60)]
    torch.testing.assert_close(whole, F.normalize(tokens, dim=1)[order])
    seen = torch.zeros(60)
    for seed in range(200):
        parts = zip(tokens.split(7), share.split(7), strict=True)
        bank, votes = fit_bank(parts, 15, seed)
        torch.testing.assert_close(bank, F.normalize(tokens, dim=1)[votes.argmax(1)])
        seen += votes.sum(0)
    assert len(bank) == 15 and (seen - 50).abs().max() < 5 * math.sqrt(200 * 0.25 * 0.75)


def test_ridge_is_the_penalised_least_squares_of_standardised_tokens():
    x, y = noise(50, 6) * torch.tensor([1.0, 5, 0.1, 1, 2, 0]) + 3, noise(50, 3).softmax(1)
    fits = fit_ridge(zip(x.split(16), y.split(16), strict=True), (0.01, 1.0))
    z = x.double() - x.double().mean(0)
    z[:, :5] /= z[:, :5].std(0, correction=0)
    z[:, 5] = 0  # a channel without variation
    for penalty, (weight, bias) in zip((0.01, 1.0), fits, strict=True):
        # least squares of the rows below each other: |z w - y|^2 / n + penalty |w|^2
        rows = torch.cat([z / math.sqrt(50), math.sqrt(penalty) * torch.eye(6)])
        centred = (y.double() - y.double().mean(0)) / math.sqrt(50)
        solution = torch.linalg.lstsq(rows, torch.cat([centred, torch.zeros(6, 3)])).solution
        wanted = z @ solution + y.double().mean(0)
        torch.testing.assert_close(x @ weight.T + bias, wanted.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("protocol", ["knn", "ridge"])
@pytest.mark.parametrize("dates", [None, 3])
def test_probes_tell_a_separable_task_from_a_shuffled_one(protocol, dates):
    vit, task = small_vit(), toy_task(150, dates=dates)
    if dates:
        task.images[:, 2] = np.nan
    state = torch.get_rng_state()
    found = probe(vit, task, protocol, 12, batch=5)
    assert torch.equal(state, torch.get_rng_state())
    assert miou_of(found) > 0.9 and found["val_miou"] > 0.9  # corners of plots are blurred
    assert found["matrix"].sum() == (task.labels[100:] != IGNORE).sum()
    task.labels = np.random.default_rng(0).permutation(task.labels)
    assert miou_of(probe(vit, task, protocol, 12)) < 0.5


@pytest.fixture
def noisy():
    """A task whose predictions a single label more would change."""
    task = toy_task(24)
    task.images += np.random.default_rng(1).normal(0, 300, task.images.shape).astype(np.float32)
    return task


@pytest.mark.parametrize("protocol", ["knn", "ridge"])
def test_probes_repeat_and_read_only_the_tiles_that_they_may(noisy, protocol):
    vit = small_vit()
    first = probe(vit, noisy, protocol, 12, bank=20)
    again = probe(vit, noisy, protocol, 12, bank=20)
    assert torch.equal(first["matrix"], again["matrix"]) and first["val_miou"] == again["val_miou"]
    other = probe(vit, noisy, protocol, 12, bank=20, seed=1)
    assert torch.equal(first["matrix"], other["matrix"]) == (protocol == "ridge")
    fewer = probe(vit, noisy, protocol, 12, train=np.arange(4))
    noisy.images[4:8] = 1e6
    noisy.labels[4:8] = 0
    changed = probe(vit, noisy, protocol, 12, train=np.arange(4))
    assert fewer["val_miou"] == changed["val_miou"]
    assert torch.equal(fewer["matrix"], changed["matrix"])


@pytest.mark.parametrize("protocol", ["knn", "ridge"])
def test_each_splits_labels_have_one_use(noisy, protocol):
    """What train.py logs of a probe is of validation labels, the encoder stays as it is."""
    vit = small_vit()
    weights = {name: value.clone() for name, value in vit.state_dict().items()}
    labels = noisy.labels

    def probed(split):
        """With the labels of one split moved on by a class."""
        wrong = np.where(labels == IGNORE, IGNORE, (labels + 1) % 3)
        noisy.labels = np.where((noisy.split == split)[:, None, None], wrong, labels)
        return probe(vit, noisy, protocol, 12, penalties=[0.1])

    right, test, val = probed(None), probed("test"), probed("val")
    assert right["val_miou"] == test["val_miou"] != val["val_miou"]
    assert torch.equal(right["matrix"], val["matrix"])
    assert miou_of(right) != miou_of(test)
    assert right["miou_batchmean"] != test["miou_batchmean"]
    assert all(torch.equal(weights[name], value) for name, value in vit.state_dict().items())


def test_a_probe_on_the_way_shows_validation_scores_and_moves_no_weight(tmp_path):
    """`train.py --probe-task`: other labels change what is logged of them and nothing else."""
    store, logged, weights = write_store(tmp_path / "pairs"), {}, []
    for other in ("none", "val", "test"):
        task = tmp_path / other
        write_scenes(task, scenes=4, size=64, seed=0)
        (task / "splits").mkdir()
        for split, numbers in (("train", (0, 1)), ("val", (2,)), ("test", (3,))):
            names = [f"scene_{k:03d}" for k in numbers]
            (task / "splits" / f"{split}.txt").write_text("\n".join(names))
            for path in (task / "masks" / f"{name}.tif" for name in names if split == other):
                file, mask = raster.info(path), (raster.read(path)[0] + 1) % 8
                raster.write(path, mask.astype(np.uint8), file.transform, file.crs)
        run(store, task / "out", steps=3, probe_task=["geotiff", task], probe_every=2)
        logged[other] = [entry.get("probe_miou") for entry in log_of(task / "out")]
        weights.append(weights_of(task / "out"))
    assert logged["none"] == logged["test"] and logged["none"][0] is None
    assert all(a != b for a, b in zip(logged["none"][1:], logged["val"][1:], strict=True))
    for name, value in weights[0].items():
        assert value.equal(weights[1][name]) and value.equal(weights[2][name])


def test_the_penalty_is_chosen_on_the_validation_split(noisy):
    """Labels that one penalty has all right, in the validation split and in the test split."""
    vit, penalties = small_vit(), (1e-3, 1e-1, 10.0)
    fits = [probe(vit, noisy, "ridge", 12, penalties=[each]) for each in penalties]
    noisy.images[noisy.split == "val"] = noisy.images[noisy.split == "test"]
    ((images, _),) = batches(noisy, [noisy.split == "test"], noisy.mean, noisy.std, None)

    def predictions(fit):
        with torch.no_grad():
            logits = F.linear(encode(vit, images, 12), *fit["head"])
        logits = logits.mT.unflatten(2, (3, 3))
        return F.interpolate(logits, (12, 12), mode="bilinear").argmax(1)

    for chosen, fit in enumerate(fits):
        for split, right in (("val", chosen), ("test", chosen - 1)):
            noisy.labels[noisy.split == split] = predictions(fits[right])
        found = probe(vit, noisy, "ridge", 12, penalties=penalties)
        assert torch.equal(found["head"][0], fit["head"][0])
        assert found["val_miou"] == 1 > miou_of(found)


@pytest.mark.parametrize("protocol", ["knn", "ridge"])
def test_without_place_what_a_place_adds_to_tokens_changes_nothing(noisy, protocol):
    vit = small_vit()
    generator = torch.Generator().manual_seed(0)
    offsets = 30 * torch.randn(3 * 3, vit.dim, generator=generator)

    def reader(shift):
        def read(split, parts):
            for images, labels in batches(noisy, parts, noisy.mean, noisy.std, torch.device("cpu")):
                yield encode(vit, images, 12) + shift * offsets, labels

        return read

    def found(shift, place):
        return probe(vit, noisy, protocol, 12, read=reader(shift), place=place)["matrix"]

    plain, removed = found(0, True), found(0, False)
    changed = (found(1, False) - removed).abs().sum() / removed.sum()
    assert changed < 0.01  # rounding alone
    assert (found(1, True) - plain).abs().sum() / plain.sum() > 0.01 or protocol == "ridge"
    assert probe(vit, noisy, "ridge", 12, place=False)["head"] is None


def test_a_class_that_is_absent_has_no_iou():
    task = toy_task(24)
    task.classes = (*task.classes, "water")
    assert mean_iou(probe(small_vit(), task, "knn", 12)["matrix"])[1][3].isnan()


def test_the_head_of_ridge_is_a_linear_segmenter():
    vit, task = small_vit(), toy_task(24)
    found = probe(vit, task, "ridge", 12)
    segmenter = Segmenter(vit, 3, 12)
    weight, bias = found["head"]
    segmenter.head.load_state_dict({"weight": weight, "bias": bias})
    stream = batches(task, [np.arange(16, 24)], task.mean, task.std, torch.device("cpu"))
    assert torch.equal(judge(segmenter, stream, 3)[0], found["matrix"])
    assert probe(vit, task, "knn", 12)["head"] is None


def test_pixels_are_tokens_of_a_patch():
    """In the order of `take_patches`, exactly, and a probe takes them for an encoder's."""
    images = torch.randn(2, 3, 8, 12)
    tokens = Pixels(3, 4)(images)
    for row in range(2):
        for col in range(3):
            patch = images[:, :, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
            assert tokens[:, 3 * row + col].equal(patch.flatten(1))
