import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from model import ViT, load_encoder, save_encoder
from segment import HEADS, Segmenter, UperNet, encode, load_segmenter, save_segmenter

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
    for depth, wanted in ((12, [3, 6, 9, 12]), (24, [6, 12, 18, 24]), (1, 4 * [1])):
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
    with pytest.raises(ValueError, match="head is 'mlpp'; choose linear, mlp, upernet"):
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
    assert "model_b.safetensors: the best of 3 results, validation mIoU 0.6000" in said


@pytest.mark.parametrize(
    "lines, message",
    [
        (None, "holds no results.jsonl of finetune.py, so no model"),
        ("", "names no model; run finetune.py with --save-model"),
        ('{"val_miou": 1}\n', "names no model; run finetune.py with --save-model"),
        ('{"model": "gone", "val_miou": 1}', "gone: no such model; give a model_"),
        ('{"model": "../../gone", "val_miou": 1}', "results.gone: no such model"),
        ('{"model": "x"}\n', "not the rows of finetune.py .KeyError"),
        ("5\n", "not the rows of finetune.py .AttributeError"),
        ("{", "not the rows of finetune.py .JSONDecodeError"),
        ("\udc80", "not the rows of finetune.py .UnicodeDecodeError"),
    ],
)
def test_folders_without_a_model(tmp_path, lines, message):
    folder = tmp_path / "results"
    folder.mkdir()
    if lines is not None:
        (folder / "results.jsonl").write_bytes(lines.encode(errors="surrogateescape"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_segmenter(folder)


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


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"segmenter": None}, r"no segmentation model but weights without a head; train one"),
        ({"config": None}, r"not a segmentation model \(KeyError: 'config'\)"),
        ({"meta": None}, r"not a segmentation model \(KeyError: 'meta'\)"),
        ({"meta": []}, r"not a segmentation model \(TypeError"),
        ({"segmenter": {"image_size": 24}}, r"not a segmentation model \(KeyError: 'head'\)"),
        ({"segmenter": {"image_size": 24, "head": "x"}}, r"ValueError: head is 'x'; choose"),
        ({"segmenter": {"image_size": 25, "head": "linear"}}, r"image_size \(25\) do not fit"),
        ({"segmenter": {"image_size": 24, "head": "mlp"}}, r"RuntimeError: Error.* Sequential"),
        ({"meta": {**META, "classes": ["a", "b"]}}, r"RuntimeError: Error.* Linear"),
        ({"meta": {**META, "classes": "abc"}}, r"its classes \(abc\) do not fit"),
        ({"meta": {**META, "bands": ["R"]}}, r"its bands \(\['R'\]\) do not fit"),
        ({"meta": {**META, "mean": [1.0]}}, r"its mean \(\[1.0\]\) do not fit"),
        ({"meta": {**META, "std": [1.0, 0.0]}}, r"its std \(.*\) do not fit"),
        ({"meta": {**META, "std": [1.0, "x"]}}, r"its std \(.*\) do not fit"),
        ({"meta": {**META, "std": 5}}, r"not a segmentation model \(TypeError"),
        ({"meta": {**META, "tile": 0}}, r"its tile \(0\) do not fit"),
        ({"meta": {k: META[k] for k in META if k != "tile"}}, r"KeyError: 'tile'"),
    ],
)
def test_damaged_facts_get_one_sentence(saved, facts, message):
    rewrite(saved, **facts)
    with pytest.raises(ValueError, match=message) as caught:
        load_segmenter(saved)
    assert str(caught.value).startswith(f"{saved}: ") and "\n" not in str(caught.value)


def test_damaged_weights_get_one_sentence(saved):
    good = load_file(saved)
    for tensors, message in [
        ({**good, "head.weight": good["head.weight"] * math.nan}, "its head holds NaN or inf"),
        ({**good, "encoder.norm.bias": good["encoder.norm.bias"] / 0}, "hold NaN or inf"),
        ({k: good[k] for k in good if k != "head.bias"}, "not a segmentation model"),
        ({k: good[k] for k in good if "norm1" not in k}, "weights missing"),
        ({"head.weight": good["head.weight"]}, "no vision transformer found"),
    ]:
        rewrite(saved, tensors)
        with pytest.raises(ValueError, match=message) as caught:
            load_segmenter(saved)
        assert str(caught.value).startswith(f"{saved}: ") and "\n" not in str(caught.value)


def test_foreign_files_get_one_sentence(saved, tmp_path):
    save_encoder(small_vit(), tmp_path / "encoder.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    (tmp_path / "text.pt").write_text("text")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "weights.pt")
    torch.save({"code": np.random.default_rng}, tmp_path / "code.pt")
    save_file({"x": torch.zeros(1)}, tmp_path / "json.safetensors", {"crossscale": "{"})
    save_file({"x": torch.zeros(1)}, tmp_path / "five.safetensors", {"crossscale": "5"})
    for name, message in [
        ("encoder.safetensors", "weights without a head; train one on them with finetune.py"),
        ("text.safetensors", "not a readable safetensors file"),
        ("text.pt", "not a readable torch checkpoint"),
        ("weights.pt", "weights without a head"),
        ("code.pt", "holds more than tensors"),
        ("json.safetensors", "not a segmentation model .JSONDecodeError"),
        ("five.safetensors", "not a segmentation model .TypeError"),
        ("nowhere.safetensors", "no such model; give a model_"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            load_segmenter(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)
