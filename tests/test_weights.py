import copy
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from safetensors.torch import save_file

import model
from model import LatentMIM, ViT, take_patches
from weights import fit_bands, load_encoder, save_encoder


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
    encoder = ViT(3, 4, 192, 1, 3)
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
        exec(re.search(r'python -c "(.*)"', error.line)[1])  # the remedy works as printed
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


def test_fit_bands_inflates_three():
    encoder = small()
    wide = fit_bands(encoder, ["B", "G", "R", "NIR"])
    grey = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        close(wide(grey.expand(-1, 4, -1, -1)), encoder(grey.expand(-1, 3, -1, -1)))
    old, new = encoder.patch_embed.proj.weight, wide.patch_embed.proj.weight
    close(new[:, 2], old[:, 0] * 0.75)
    close(new[:, 3], old.mean(1) * 0.75)
    with refused(ValueError, "4 bands", "2 (X,Y)"):
        fit_bands(wide, ["X", "Y"])


def test_fit_bands_puts_known_bands_in_their_place():
    encoder = small()  # 3 bands of no known name: R, G, B
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        close(fit_bands(encoder, ["B", "G", "R"])(images.flip(1)), encoder(images))
        encoder.meta = {"bands": ["NIR", "R", "G"]}
        close(fit_bands(encoder, ["G", "NIR", "R"])(images[:, [2, 0, 1]]), encoder(images))
    assert fit_bands(encoder, ["NIR", "R", "G"]) is encoder
    assert fit_bands(encoder, ["0", "1", "2"]) is encoder  # the names tell nothing


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


def test_missing_positions_are_said(tmp_path, capsys):
    torch.save(small().state_dict(), tmp_path / "bare.pt")
    load_encoder(tmp_path / "bare.pt", heads=2)
    assert "no position table: I-JEPA's sine-cosine positions assumed" in capsys.readouterr().out
