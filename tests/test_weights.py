import copy
import importlib.util
import json
import shlex
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from landscape import pack_files, pair
from safetensors.torch import save_file

import model
import train
from model import LatentMIM, ViT, position_table, take_patches
from segment import Segmenter
from weights import fit_bands, known_heads, load_encoder, save_encoder, to_timm


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def sub(state, prefix):
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def close(found, expected, atol=1e-5, rtol=1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)


def small(**changes):
    torch.manual_seed(0)
    return ViT(**{"in_channels": 3, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2, **changes})


def latentmim(**changes):
    torch.manual_seed(0)
    encoder = ViT(3, 4, 16, 1, 2, class_token=True, pos="latentmim")
    return LatentMIM(
        encoder,
        (4, 4),
        **{
            "gap": 2,
            "visible": 5,
            "head_dim": 24,
            "decoder_dim": 16,
            "decoder_depth": 1,
            "decoder_heads": 2,
            **changes,
        },
    )


# ---- reading and writing encoders


def same_tokens(a, b, bands=3, side=8):
    images = torch.randn(2, bands, side, side)
    with torch.no_grad():
        close(a(images), b(images))


def test_our_export_round_trip(tmp_path, capsys):
    encoder = small(class_token=True, pos="latentmim", mlp_ratio=2.0)
    encoder.head = model.projection_head(16, 8)
    save_encoder(encoder, tmp_path / "encoder.safetensors", bands=["B", "G", "R"], mean=[1.0])
    loaded = load_encoder(tmp_path)
    same_tokens(loaded, encoder)
    assert loaded.config == encoder.config
    assert loaded.meta == {"bands": ["B", "G", "R"], "mean": [1.0]}
    assert not loaded.training
    assert (
        "crossscale ViT at top level: 3 bands, patch 4, 16 wide, 2 deep" in capsys.readouterr().out
    )
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.safetensors"]
    (tmp_path / "other").touch()
    assert (tmp_path / "encoder.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def changed(encoder):
    """A copy with other weights, as a student's are not its teacher's."""
    other = copy.deepcopy(encoder)
    for weight in other.state_dict().values():
        weight += 0.1 * torch.randn_like(weight)
    return other


def test_our_checkpoint_gives_its_student(tmp_path):
    objective = latentmim()
    objective.teacher = changed(objective.teacher)
    facts = json.dumps({"config": objective.student.config, "meta": {"bands": ["a", "b", "c"]}})
    state = {"objective": objective.state_dict(), "facts": facts, "step": 3}
    torch.save(state, tmp_path / "ckpt.pt")
    loaded = load_encoder(tmp_path / "ckpt.pt")
    same_tokens(loaded, objective.student)
    assert loaded.meta == {"bands": ["a", "b", "c"]}


@pytest.mark.parametrize("right, other", [
    ("target_encoder.module.", "encoder.module."),  # I-JEPA
    ("state_dict.module.encoder.", "state_dict.module.target_encoder."),  # Latent MIM
    ("teacher.backbone.", "student.module.backbone."),  # DINO
    ("objective.student.", "objective.teacher."),  # ours, in whichever order they lie
])  # fmt: skip
@pytest.mark.parametrize("first", ["right", "other"])
def test_which_of_two_encoders_is_read(tmp_path, right, other, first):
    encoder = small()
    places = [(right, encoder), (other, changed(encoder))]
    tree = {
        place + name: weight
        for place, vit in (places if first == "right" else reversed(places))
        for name, weight in vit.state_dict().items()
    }
    torch.save(tree, tmp_path / "both.pt")
    same_tokens(load_encoder(tmp_path / "both.pt", heads=2), encoder)


@pytest.mark.parametrize("grid, side", [((2, 3), (8, 12)), ((3, 1), (12, 4)), ((2, 3), (16, 20))])
@pytest.mark.parametrize("class_token", [False, True])
def test_learned_positions_of_a_grid_that_is_no_square(tmp_path, grid, side, class_token):
    """Saved and read again, at their own grid and resized to another one, by a plain loop."""
    encoder = small(pos="learned", pos_grid=grid, class_token=class_token)
    encoder.pos_embed.normal_()
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    loaded = load_encoder(tmp_path)
    assert tuple(loaded.config["pos_grid"]) == grid
    images = torch.randn(1, 3, *side)
    with torch.no_grad():
        assert torch.equal(loaded(images), encoder(images))
        rows, cols = side[0] // 4, side[1] // 4
        table = encoder.pos_embed.view(*grid, 16).movedim(2, 0)[None]
        if (rows, cols) != grid:
            table = F.interpolate(table, (rows, cols), mode="bicubic", antialias=True)
        found = loaded.embed(images)[0, int(class_token) :].view(rows, cols, 16)
        for row, col in np.ndindex(rows, cols):
            patch = images[:, :, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
            wanted = encoder.patch_embed.proj(patch)[0, :, 0, 0] + table[0, :, row, col]
            close(found[row, col], wanted)


def test_official_ijepa(golden, tmp_path, capsys):
    z = golden("b_ijepa_tiny_nenc1")
    checkpoint = {
        "encoder": {f"module.{k}": v for k, v in sub(z, "enc/").items()},
        "predictor": {f"module.{k}": v for k, v in sub(z, "pred/").items()},
        "target_encoder": {f"module.{k}": v for k, v in sub(z, "tgt/").items()},
        "epoch": 3,
        "loss": 0.5,
        "opt": {"state": {}},
    }
    torch.save(checkpoint, tmp_path / "jepa.pth.tar")
    with refused(ValueError, "jepa.pth.tar", "64", "heads="):
        load_encoder(tmp_path / "jepa.pth.tar")
    encoder = load_encoder(tmp_path / "jepa.pth.tar", heads=4)
    close(encoder(z["input"]), z["tgt_out_full"])
    said = capsys.readouterr().out
    assert "target_encoder.module." in said and "(ijepa) checked and dropped" in said
    assert encoder.config["pos"] == "ijepa" and encoder.meta == {}


def test_official_latentmim(golden, tmp_path, capsys):
    z = golden("d_latentmim_tiny_author")
    state = {f"module.{k}": v for k, v in sub(z, "sd/").items()}
    torch.save({"state_dict": state, "epoch": 300}, tmp_path / "lmim.pth")
    encoder = load_encoder(tmp_path / "lmim.pth", heads=4)
    offset = torch.stack([z["gap_row_offset"], z["gap_col_offset"]], dim=-1)
    patches = take_patches(z["imgs"], 8, 2, offset)
    close(encoder.encode(patches, z["pid_vis"]), z["x_vis_trunk"])
    said = capsys.readouterr().out
    assert "4 bands, patch 8" in said and "left out: head" in said and "(latentmim)" in said


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
def test_timm_style_with_learned_positions(prefix, tmp_path, capsys):
    encoder = small(class_token=True, pos="learned", pos_grid=(2, 2))
    encoder.pos_embed.normal_()
    state = dict(encoder.state_dict())
    state["pos_embed"] = torch.cat([torch.ones(1, 1, 16), state["pos_embed"]], 1)
    state["cls_token"] = state["cls_token"] - 1  # timm adds the first position to it
    state["head.weight"] = torch.zeros(10, 16)
    save_file({prefix + k: v for k, v in state.items()}, tmp_path / "timm.safetensors")
    loaded = load_encoder(tmp_path / "timm.safetensors", heads=2)
    same_tokens(loaded, encoder)
    assert loaded(torch.randn(1, 3, 12, 8)).shape == (1, 6, 16)  # another grid: resized
    said = capsys.readouterr().out
    assert "learned positions of a 2 x 2 grid" in said and "left out: head" in said


def test_layer_scale_is_folded(tmp_path):
    encoder = small(depth=1)
    state = dict(encoder.state_dict())
    scaled = {**state, "blocks.0.ls1.gamma": torch.full((16,), 2.0)}
    scaled["blocks.0.attn.proj.weight"] = state["blocks.0.attn.proj.weight"] / 2
    scaled["blocks.0.attn.proj.bias"] = state["blocks.0.attn.proj.bias"] / 2
    torch.save({"model": scaled}, tmp_path / "dino.pth")
    same_tokens(load_encoder(tmp_path / "dino.pth", heads=2), encoder)


def test_published_widths_need_no_heads(tmp_path):
    encoder = ViT(3, 4, 192, 12, 3)
    torch.save(encoder.state_dict(), tmp_path / "tiny.pt")
    assert load_encoder(tmp_path / "tiny.pt").config["heads"] == 3


class Settings:
    """Stands for the training configuration that published files carry."""


def test_bad_encoder_files(tmp_path):
    (tmp_path / "run").mkdir()
    for path, said in (("nowhere", "nowhere"), ("run", "run/encoder.safetensors")):
        with refused(FileNotFoundError, f"{tmp_path / said}: "):
            load_encoder(tmp_path / path)

    state = small().state_dict()
    torch.save({"state_dict": state, "cfg": Settings()}, tmp_path / "code.pth")
    torch.save({**state, "args": Settings()}, tmp_path / "flat.pth")
    for name in ("code", "flat"):
        with refused(ValueError, f"{tmp_path / name}.pth: ", "Settings") as error:
            load_encoder(tmp_path / f"{name}.pth")
        exec(shlex.split(error.line)[-1])  # the remedy works as printed
        same_tokens(load_encoder(tmp_path / f"{name}-weights.pt", heads=2), small())

    whole = (tmp_path / "code-weights.pt").read_bytes()
    for name, content in {
        "a.pt": b"no checkpoint", "b.safetensors": b"nor this", "c.pt": b"",
        "text.pth": b"hello world", "cut.pt": whole[: len(whole) // 2],
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with refused(ValueError, f"{tmp_path / name}: "):
            load_encoder(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        "5", "{", "", "null", "[]", '"config meta"', '{"config": {}}', '{"config": [], "meta": {}}',
        '{"config": {}, "meta": 5}', pytest.param("[" * 99999, id="deep"),
    ],
)  # fmt: skip
def test_odd_metadata_get_one_sentence(tmp_path, text):
    path = tmp_path / "x.safetensors"
    save_file(small().state_dict(), path, {"crossscale": text})
    with refused(ValueError, f"{path}: ", "config", "meta"):
        load_encoder(path)


def test_other_programs_metadata_are_passed_over(tmp_path):
    state = small().state_dict()
    save_file(state, tmp_path / "x.safetensors", {"format": "pt"})
    assert load_encoder(tmp_path / "x.safetensors", heads=2).meta == {}


# ---- bands


def columns(encoder, places):
    """The kernels of some bands: (D, bands, patch, patch)."""
    return encoder.patch_embed.proj.weight.detach()[:, places]


def test_fit_bands_inflates_three(capsys):
    encoder = small()
    wide = fit_bands(encoder, ["B", "G", "R", "NIR"], "--init x.pt")
    said = "--init x.pt: B as B, G as G, R as R, NIR as the mean of all; all x 0.75\n"
    assert capsys.readouterr().out == said
    grey = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        close(wide(grey.expand(-1, 4, -1, -1)), encoder(grey.expand(-1, 3, -1, -1)))
    close(columns(wide, [2, 1, 0]), columns(encoder, [0, 1, 2]) * 0.75)
    close(columns(wide, 3), columns(encoder, [0, 1, 2]).mean(1) * 0.75)
    assert wide.meta == {"bands": ["B", "G", "R", "NIR"]}
    with refused(ValueError, "--hr-teacher x.pt", "4 bands (B,G,R,NIR)", "2 (X,Y)"):
        fit_bands(wide, ["X", "Y"], "--hr-teacher x.pt")
    five = fit_bands(wide, ["NIR", "X", "B", "G", "R"])
    close(columns(five, [2, 3, 4, 0]), columns(wide, [0, 1, 2, 3]) * 0.8)


def test_fit_bands_puts_known_bands_in_their_place():
    encoder = small()  # 3 bands of no known name: R, G, B
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        close(fit_bands(encoder, ["B", "G", "R"])(images.flip(1)), encoder(images))
        encoder.meta = {"bands": ["NIR", "R", "G"]}
        close(fit_bands(encoder, ["G", "NIR", "R"])(images[:, [2, 0, 1]]), encoder(images))
        # a band of no known name beside two that are known
        mixed = fit_bands(encoder, ["SWIR", "Green", "Red"])
    close(columns(mixed, [2, 1]), columns(encoder, [1, 2]))
    close(columns(mixed, 0), columns(encoder, [0, 1, 2]).mean(1))


def test_names_that_tell_nothing_leave_the_order(capsys):
    encoder = small()
    for bands in (["0", "1", "2"], ["VV", "VH", "x"], ["Red", "green", "B"]):
        assert fit_bands(encoder, bands, "--init x") is encoder
        assert f"--init x: its 3 bands (R,G,B) read {','.join(bands)}" in capsys.readouterr().out
    encoder.meta = {"bands": []}  # a model of files without names
    assert fit_bands(encoder, ["B", "G", "R"]) is encoder
    assert "3 bands (unnamed)" in capsys.readouterr().out


def test_a_superset_is_selected_by_name(capsys):
    """Bands that the images lack are as good as at their mean, 0."""
    encoder = small(in_channels=5)
    encoder.meta = {"bands": ["B", "G", "R", "NIR", "SWIR1"], "mean": [1, 2, 3, 4, 5]}
    encoder.meta["std"] = [5, 4, 3, 2, 1]
    images = torch.randn(2, 4, 8, 8)
    fitted = fit_bands(encoder.eval(), ["B08", "B02", "B03", "B04"], "it")
    assert capsys.readouterr().out == (
        "it: B08 as NIR, B02 as B, B03 as G, B04 as R, SWIR1 left out\n"
    )
    with torch.no_grad():
        close(fitted(images[:, [3, 0, 1, 2]]), encoder(F.pad(images, (0, 0, 0, 0, 0, 1))))
    assert fitted.meta["mean"] == [4, 1, 2, 3] and fitted.meta["std"] == [2, 5, 4, 3]
    assert not fitted.training


SPELLINGS = [
    "Blue,Green,Red", "Red,Green,Blue", "B,G,R,NIR", "B02,B03,B04,B08", "B2,B3,B4,B8",
    "NIR,red,green,blue", "B04,B03,B02",
]  # fmt: skip
PLACES = {"b": 2, "g": 1, "r": 0, "blue": 2, "green": 1, "red": 0, "b02": 2, "b03": 1, "b04": 0,
          "b2": 2, "b3": 1, "b4": 0}  # fmt: skip


@pytest.mark.parametrize("names", SPELLINGS)
def test_rgb_weights_land_on_their_bands_from_images_to_weights(tmp_path, names, capsys):
    """Pack, --init, the weights of the run."""
    names = names.split(",")
    mr, hr = pair(tmp_path, bands=len(names), band_names=tuple(names))
    pack_files(mr, hr, tmp_path / "pairs", chip=32, val=0)
    encoder = ViT(3, 4, 32, 1, 4)
    torch.save(encoder.state_dict(), tmp_path / "rgb.pt")
    words = "--heads 4 --mr-size 24 --predictor-dim 16 --predictor-depth 1 --targets 2 --device cpu"
    words += " --global-batch 4 --steps 1 --lr 0 --start-lr 0 --final-lr 0 --target-scale 0.08 0.12"
    folders = ["--store", tmp_path / "pairs", "--out", tmp_path / "run", "--init"]
    folders.append(tmp_path / "rgb.pt")
    train.main(train.parse_args([*words.split(), *map(str, folders)]))
    assert f"--init {tmp_path / 'rgb.pt'}: " in capsys.readouterr().out
    trained = load_encoder(tmp_path / "run")
    assert trained.meta["bands"] == names
    for place, name in enumerate(names):
        own = PLACES.get(name.lower(), slice(None))
        kernel = columns(encoder, [own] if isinstance(own, int) else own).mean(1)
        close(columns(trained, place), kernel * 3 / len(names))


def test_names_of_bands_in_metadata_are_checked(tmp_path):
    for bands in ("RGB", ["R"], ["R", "G", 3]):
        save_encoder(small(), tmp_path / "x.safetensors", bands=bands)
        with refused(ValueError, tmp_path / "x.safetensors", "3 bands"):
            load_encoder(tmp_path / "x.safetensors")


# ---- other people's programs


class Named(type):
    def __getattr__(cls, name):
        return name


class Stub(types.ModuleType):
    """A module in which every name is a class of nothing."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Named(name, (), {})


@pytest.fixture(scope="session")
def timm_vit():
    """timm's VisionTransformer. Of torchvision, which has to be built for the very torch that there
    is, timm only wants the names while it is imported."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("no timm; pip install --no-deps --target DIR timm, and PYTHONPATH=DIR")
    stubs = {}
    if importlib.util.find_spec("torchvision") is None:
        for name in ("", ".ops", ".ops.misc", ".datasets", ".transforms", ".transforms.functional"):
            stubs[name] = sys.modules["torchvision" + name] = Stub("torchvision" + name)
            if name:
                parent, _, leaf = name.rpartition(".")
                setattr(stubs[parent], leaf, stubs[name])
    try:
        from timm.models.vision_transformer import VisionTransformer
    finally:
        for name in stubs:
            del sys.modules["torchvision" + name]

    def build(**changes):
        torch.manual_seed(0)
        plain = dict(img_size=(32, 32), patch_size=8, embed_dim=192, depth=12, num_heads=3)
        vit = VisionTransformer(**plain | dict(num_classes=0) | changes).eval()
        with torch.no_grad():
            for weight in vit.parameters():
                weight += 0.05 * torch.randn(weight.shape)
        return vit

    return build


def same_as_timm(encoder, vit, tolerance=1e-4):
    size = vit.patch_embed.img_size
    images = torch.randn(2, encoder.in_channels, *size)
    with torch.no_grad():
        close(encoder.encode(images), vit.forward_features(images), tolerance, tolerance)


def moco_table(side, dim):
    """MoCo v3's positions: the row's sines before the column's; none of the class token."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    omega = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = [place.flatten()[:, None].double() * omega for place in (y, x)]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1).float()
    return F.pad(table, (0, 0, 1, 0))[None]


def as_mae(state):
    table = position_table((4, 4), 192, "ijepa")
    state["pos_embed"] = F.pad(table, (0, 0, 1, 0))[None]
    own = {"mask_token": torch.ones(1, 1, 8), "decoder_blocks.0.norm1.weight": torch.ones(8)}
    return {"model": state | own | {"decoder_pos_embed": torch.ones(1, 17, 8)}}


def as_dino(state):
    student = {f"module.backbone.{key}": value + 1 for key, value in state.items()}
    teacher = {f"backbone.{key}": value for key, value in state.items()}
    return {"student": student, "teacher": teacher | {"head.mlp.0.weight": torch.ones(3, 3)}}


def as_dinov2(state):
    return state | {"mask_token": torch.zeros(1, 192)}


@pytest.mark.parametrize(
    "changes, wrap, note",
    [
        ({}, dict, "learned positions of a 4 x 4 grid"),
        (dict(num_classes=7), dict, "left out: head"),
        (dict(in_chans=13, mlp_ratio=2.0), dict, "13 bands"),
        (dict(no_embed_class=True), dict, "learned"),  # as FlexiViT and DeiT III
        (dict(class_token=False, global_pool="avg", fc_norm=False), dict, "learned"),
        (dict(class_token=False, global_pool="map"), dict, "left out: attn_pool"),
        (dict(init_values=1e-5), as_dinov2, "LayerScale folded in"),
        ({}, as_dino, "at teacher.backbone."),
        ({}, as_mae, "positions (ijepa) checked"),
    ],
    ids="timm head bands flexivit gap map dinov2 dino mae".split(),
)
def test_published_vits(timm_vit, tmp_path, capsys, changes, wrap, note):
    vit = timm_vit(**changes)
    saved = wrap({key: value.detach() for key, value in vit.state_dict().items()})
    if wrap is as_mae:
        vit.pos_embed.data = saved["model"]["pos_embed"]
    torch.save(saved, tmp_path / "vit.pth")
    same_as_timm(load_encoder(tmp_path / "vit.pth"), vit)
    assert note in capsys.readouterr().out


@pytest.mark.parametrize("stripped", [False, True])
def test_moco_v3_has_12_heads_at_384(timm_vit, tmp_path, stripped):
    """Told by its names or, where the converter of its authors shortened them, its positions."""
    vit = timm_vit(embed_dim=384, num_heads=12)
    if stripped:
        vit.pos_embed.data = moco_table(4, 384)
    state = {key: value.detach() for key, value in vit.state_dict().items()}
    ours = {f"module.base_encoder.{key}": value for key, value in state.items()}
    ours |= {"module.base_encoder.head.0.weight": torch.ones(2, 2)}
    ours |= {f"module.momentum_encoder.{key}": value + 1 for key, value in state.items()}
    torch.save({"model": state} if stripped else {"state_dict": ours}, tmp_path / "moco.pth")
    same_as_timm(load_encoder(tmp_path / "moco.pth"), vit)
    six = load_encoder(tmp_path / "moco.pth", heads=6)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():  # what a guess by the width would give
        assert (six(images) - vit.forward_features(images)[:, 1:]).abs().max() > 1e-2


def test_heads_are_known_of_families_that_are_told_apart():
    base = dict(dim=768, depth=12, class_token=True, pos="learned", pos_grid=(2, 2))
    table = torch.ones(4, 768)
    assert known_heads(base, table, "") == 12
    assert known_heads(base | dict(class_token=False), table, "") is None  # SigLIP or timm's gap
    assert known_heads(base | dict(class_token=False, pos="ijepa"), table, "") == 12
    assert known_heads(base | dict(dim=384), torch.ones(4, 384), "") == 6
    assert known_heads(base | dict(dim=384), moco_table(2, 384)[0, 1:], "") == 12
    assert known_heads(base | dict(dim=384), torch.ones(4, 384), "module.base_encoder.") == 12
    assert known_heads(base | dict(depth=8), table, "") is None


def test_heads_that_nothing_tells_are_asked_for(timm_vit, tmp_path):
    gap = dict(class_token=False, global_pool="avg", fc_norm=False)
    vit = timm_vit(embed_dim=768, num_heads=16, depth=2, **gap)
    cases = {"gap": vit.state_dict(), "thin": timm_vit(embed_dim=96).state_dict()}
    cases["shallow"] = timm_vit(embed_dim=768, num_heads=8, depth=8, mlp_ratio=3.0).state_dict()
    for name, state in cases.items():
        torch.save(state, tmp_path / f"{name}.pt")
        with refused(ValueError, tmp_path / f"{name}.pt", "heads=", "--heads"):
            load_encoder(tmp_path / f"{name}.pt")
    same_as_timm(load_encoder(tmp_path / "gap.pt", heads=16), vit)


@pytest.mark.parametrize(
    "changes, mention",
    [
        (dict(global_pool="avg"), "fc_norm"),
        (dict(reg_tokens=4, no_embed_class=True), "reg_token"),
        (dict(reg_tokens=4), "rows"),
        (dict(pre_norm=True), "patch_embed.proj.bias"),
        (dict(qk_norm=True), "k_norm"),
        (dict(embed_norm_layer="layernorm"), "patch_embed.norm"),
        (dict(final_norm=False), "norm"),
    ],
)
def test_vits_of_other_tokens_are_refused(timm_vit, tmp_path, changes, mention):
    torch.save(timm_vit(depth=1, **changes).state_dict(), tmp_path / "other.pt")
    with refused(ValueError, tmp_path / "other.pt", mention):
        load_encoder(tmp_path / "other.pt", heads=3)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("pos", ["ijepa", "latentmim", "learned"])
def test_to_timm_and_back(timm_vit, tmp_path, pos, class_token):
    encoder = small(pos=pos, pos_grid=(2, 2), class_token=class_token, in_channels=4)
    encoder.head = model.projection_head(16, 8)
    if pos == "learned":
        encoder.pos_embed.normal_()
    vit = timm_vit(
        img_size=(8, 12), patch_size=4, in_chans=4, embed_dim=16, depth=2, num_heads=2,
        class_token=class_token, global_pool="token" if class_token else "", fc_norm=False,
    )  # fmt: skip
    state = to_timm(encoder, (2, 3))
    vit.load_state_dict(state, strict=True)
    same_as_timm(encoder, vit, 1e-5)
    torch.save(state, tmp_path / "vit.pt")
    same_as_timm(load_encoder(tmp_path / "vit.pt", heads=2, grid=(2, 3)), vit, 1e-5)
    if pos == "learned":
        with refused(ValueError, tmp_path / "vit.pt", "rows", "grid=(rows, cols)"):
            load_encoder(tmp_path / "vit.pt", heads=2)


def exported(kind):
    """The model and images of it, for the tests of exporters."""
    torch.manual_seed(0)
    pos = {"plain": "ijepa", "linear": "learned", "upernet": "latentmim"}[kind]
    encoder = ViT(3, 4, 16, 4, 2, class_token=True, pos=pos, pos_grid=(2, 2))
    if pos == "learned":
        encoder.pos_embed.normal_()
    whole = encoder if kind == "plain" else Segmenter(encoder, 5, 16, kind)
    return whole.eval(), torch.randn(2, 3, 12, 12)


every_export = pytest.mark.parametrize("kind", ["plain", "linear", "upernet"])


@every_export
def test_torch_export_in_any_order(kind):
    """Nothing of a trace stays in the model or its process: other sizes go on, before and after."""
    whole, images = exported(kind)
    with torch.no_grad():
        before = whole(images)
        first = torch.export.export(whole, (images,)).module()
        wide = torch.export.export(whole, (F.pad(images, (0, 4)),)).module()
        close(first(images), before)
        close(wide(F.pad(images, (0, 4))), whole(F.pad(images, (0, 4))))
        assert whole(images).equal(before)


@every_export
@pytest.mark.slow
def test_onnx_gives_the_same(kind, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="no onnxruntime")
    pytest.importorskip("onnxscript", reason="no onnxscript, which torch.onnx writes with")
    whole, images = exported(kind)
    torch.export.export(whole, (images,))
    torch.onnx.export(whole, (images,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        close(torch.from_numpy(found), whole(images))


# ---- what is refused


def test_weights_of_other_kinds_get_one_sentence(tmp_path):
    state = small().state_dict()
    facts = json.dumps({"config": {"dim": "x"}, "meta": {}})
    cases = {
        "tensor.pt": (torch.zeros(3), "Tensor"),
        "resnet.pt": ({"conv1.weight": torch.zeros(3)}, "conv1.weight"),
        "registers.pt": ({**state, "register_tokens": torch.zeros(1, 4, 16)}, "register_tokens"),
        "gated.pt": ({k.replace("fc1", "w12"): v for k, v in state.items()}, "fc1"),
        "extra.pt": ({**state, "blocks.0.attn.q_norm.weight": torch.ones(8)}, "q_norm"),
        "clip.pt": ({**state, "norm_pre.weight": torch.ones(16)}, "norm_pre"),
        "nan.pt": ({k: v * float("nan") for k, v in state.items()}, "NaN"),
        "table.pt": ({**state, "pos_embed": torch.zeros(1, 4, 5)}, ""),
        "oblong.pt": ({**state, "pos_embed": torch.zeros(1, 6, 16)}, "6 rows"),
        "rope.pt": ({**state, "rope_embed.periods": torch.ones(4)}, "rope_embed"),
        "gamma.pt": ({**state, "blocks.0.ls1.gamma": torch.zeros(3)}, ""),
        "name.pt": ({**state, "blocks.x.foo": torch.zeros(3)}, ""),
        "scalar.pt": ({**state, "blocks.0.mlp.fc1.weight": torch.tensor(1.0)}, ""),
        "facts.pt": ({"student": state, "facts": facts}, ""),
        "list.pt": ({"student": state, "facts": "[]"}, ""),
        "json.pt": ({"student": state, "facts": "{"}, ""),
    }
    for name, (content, mention) in cases.items():
        torch.save(content, tmp_path / name)
        with refused(ValueError, f"{tmp_path / name}: ", mention):
            load_encoder(tmp_path / name, heads=2)


def test_heads_that_the_file_contradicts(tmp_path):
    save_encoder(small(), tmp_path / "encoder.safetensors")
    with refused(ValueError, tmp_path / "encoder.safetensors", "2 heads", "4"):
        load_encoder(tmp_path, heads=4)
    assert load_encoder(tmp_path, heads=2).config["heads"] == 2


def test_missing_positions_are_said(tmp_path, capsys):
    torch.save(small().state_dict(), tmp_path / "bare.pt")
    load_encoder(tmp_path / "bare.pt", heads=2)
    assert "no position table: I-JEPA's sine-cosine positions assumed" in capsys.readouterr().out


def test_a_flipped_bit_of_an_export_is_always_seen(tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_encoder(ViT(dim=8, depth=1, heads=2, patch_size=2), path, bands=["B", "G", "R", "NIR"])
    load_encoder(path)
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(head), *range(head, len(whole), 37)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with refused(ValueError, path):
            load_encoder(path)


def test_metadata_cannot_ask_for_more_than_the_weights(tmp_path):
    """What the weights show is read off them, whatever the metadata say."""
    path, encoder = tmp_path / "encoder.safetensors", small(mlp_ratio=43 / 16)
    config = dict(encoder.config)
    for name, value in (("depth", 10**6), ("dim", 10**6), ("mlp_ratio", 1e6), ("in_channels", 9)):
        encoder.config = config | {name: value}
        save_encoder(encoder, path)
        loaded = load_encoder(path)
        assert loaded.config == config
        same_tokens(loaded, encoder)
    encoder.config = config | {"pos": "learned", "pos_grid": (10**6, 10**6)}
    save_encoder(encoder, path)
    with refused(ValueError, path, "positions"):
        load_encoder(path)
    state = encoder.state_dict() | {"norm.weight": torch.ones(1).expand(10**12)}
    torch.save(state, tmp_path / "few.pt")
    with refused(ValueError, tmp_path / "few.pt", "claim"):
        load_encoder(tmp_path / "few.pt", heads=2)
