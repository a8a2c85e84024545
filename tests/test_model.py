import copy
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, refused
from einops import rearrange
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounterWithBackend

import model
from affinity import gram_loss, hr_index
from model import (
    IJEPA,
    MAE,
    OBJECTIVES,
    LatentMIM,
    ViT,
    block_index,
    draw_blocks,
    draw_rectangle,
    position_table,
    take_patches,
    vit,
)
from weights import fit_bands, load_encoder, save_encoder


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def sub(state, prefix):
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def close(found, expected, atol=1e-5, rtol=1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)


# ---- positions


@pytest.mark.parametrize("kind, name", [("ijepa", "b_ijepa"), ("latentmim", "d_latentmim")])
def test_positions_golden(golden, kind, name):
    for key, table in golden(f"{name}_posembed").items():
        grid, dim = map(int, re.fullmatch(r"g(\d+)_d(\d+)", key).groups())
        table = table[-grid * grid :]  # Latent MIM's first row is the class token's zero
        close(position_table((grid, grid), dim, kind), table, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", ["ijepa", "latentmim"])
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_ground_positions_put_hr_tokens_around_their_mr_token(kind, ratio):
    """The code of the mean position of an MR token's HR tokens: at spacing 1/3 the middle HR token
    of each MR token lies exactly on it; at any ratio the angles average to it."""
    rows, cols = 3, 5
    fine = position_table((rows * ratio, cols * ratio), 16, kind, 1 / ratio)
    coarse = position_table((rows, cols), 16, kind)
    index = hr_index(torch.arange(15)[None], (rows, cols), ratio)[0].view(15, ratio, ratio)
    if ratio % 2:
        close(fine[index[:, ratio // 2, ratio // 2]], coarse, atol=1e-6)
    # slowest frequency: sin and cos of nearly linear angles
    angle = torch.atan2(fine[:, 3], fine[:, 7])[index].flatten(1).mean(1)
    close(angle, torch.atan2(coarse[:, 3], coarse[:, 7]), atol=1e-5)


def test_positions_of_a_one_token_grid_and_bad_width():
    assert position_table((1, 1), 8, "latentmim").isfinite().all()
    with refused(ValueError, "4", "6"):
        position_table((2, 2), 6, "ijepa")


# ---- ViT


def small(**changes):
    torch.manual_seed(0)
    return ViT(**{"in_channels": 3, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2, **changes})


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("pos", ["ijepa", "latentmim", "learned"])
def test_vit_matches_a_convolution_and_gather(class_token, pos):
    encoder = small(class_token=class_token, pos=pos, pos_grid=(2, 3) if pos == "learned" else None)
    if pos == "learned":
        encoder.pos_embed.normal_()
    images = torch.randn(2, 3, 12, 20)
    index = torch.stack([torch.randperm(15)[:6] for _ in range(2)])
    x = encoder.patch_embed.proj(images).flatten(2).mT + encoder.position((3, 5), 1.0, "cpu")
    x = torch.stack([row[i] for row, i in zip(x, index, strict=True)])
    if class_token:
        x = torch.cat([encoder.cls_token.expand(2, -1, -1), x], 1)
    for block in encoder.blocks:
        x = block(x)
    x = encoder.norm(x)
    close(encoder.encode(images, index), x)
    close(encoder(images, index), x[:, -6:])
    assert encoder(images).shape == (2, 15, 16)
    # all tokens in order are all tokens; a permutation permutes
    order = torch.randperm(15)
    close(encoder(images, order.expand(2, -1)), encoder(images)[:, order])


@pytest.mark.parametrize("class_token", [False, True])
def test_levels_are_the_tokens_of_shallower_encoders(class_token):
    torch.manual_seed(0)
    deep = ViT(in_channels=2, patch_size=4, dim=16, depth=3, heads=2, class_token=class_token)
    images = torch.randn(2, 2, 8, 12)
    for depth, tokens in zip((3, 1, 2, 1), deep.levels(images, (3, 1, 2, 1)), strict=True):
        shallow = ViT(**{**deep.config, "depth": depth})
        shallow.load_state_dict(deep.state_dict(), strict=False)
        assert torch.equal(tokens, shallow(images))


def test_vit_attention_reference():
    block = model.Attention(12, 3)
    x = torch.randn(2, 5, 12)
    q, k, v = block.qkv(x).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / math.sqrt(4)).softmax(-1)
    close(block(x), block.proj((weights @ v).transpose(1, 2).flatten(2)))


def test_vit_sizes_and_messages():
    shapes = {name: (vit(name, depth=1).dim, model.SIZES[name][1]) for name in model.SIZES}
    assert shapes["small"] == (384, 12) and shapes["huge"] == (1280, 32)
    encoder = small()
    with refused(ValueError, "30 x 32", "4 px", "to 32 x 32"):
        encoder(torch.zeros(1, 3, 30, 32))
    with refused(ValueError, "3 bands", "4"):
        encoder(torch.zeros(1, 4, 32, 32))
    with refused(ValueError, "16", "3 attention heads"):
        small(heads=3)
    with refused(ValueError, "rotary", "ijepa", "latentmim", "learned"):
        small(pos="rotary")


def test_starts_are_the_published_ones():
    torch.manual_seed(0)
    normal, xavier = vit("small", depth=1), vit("small", depth=1, pos="latentmim")
    for weight in (normal.patch_embed.proj.weight, normal.blocks[0].mlp.fc2.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    for weight in (xavier.patch_embed.proj.weight, xavier.blocks[0].attn.qkv.weight):
        rows, cols = weight.flatten(1).shape
        bound = math.sqrt(6 / (rows + cols))
        assert 0.99 * bound < float(weight.detach().abs().max()) <= bound
    assert xavier.blocks[0].attn.qkv.bias.eq(0).all()


# ---- I-JEPA


def test_ijepa_parity(golden):
    z = golden("b_ijepa_tiny_nenc1")
    student = ViT(4, 8, 64, 2, 4)
    objective = IJEPA(student, (4, 4), predictor_dim=32, predictor_depth=2)
    student.load_state_dict({k: v for k, v in sub(z, "enc/").items() if k != "pos_embed"})
    objective.teacher.load_state_dict({k: v for k, v in sub(z, "tgt/").items() if k != "pos_embed"})
    predictor = {
        k.removeprefix("predictor_"): v for k, v in sub(z, "pred/").items() if "pos_embed" not in k
    }
    objective.predictor.load_state_dict(predictor)
    images = z["input"]
    masks = {"context": z["masks_enc"][0], "target": z["masks_pred"].transpose(0, 1)}

    close(student(images), z["enc_out_full"])
    close(objective.teacher(images), z["tgt_out_full"])
    loss, tokens, index = objective(images, masks)
    close(tokens, z["enc_out_ctx"])
    assert index.equal(masks["context"])
    predicted = objective.predictor(tokens, index, masks["target"], (4, 4))
    close(rearrange(predicted, "b m t d -> (m b) t d"), z["pred_out"])
    targets = objective.target_tokens(images, masks)
    close(rearrange(targets, "b m t d -> (m b) t d"), z["targets"])
    close(loss, z["loss_smoothl1"], atol=0)

    loss.backward()
    close(student.patch_embed.proj.weight.grad, z["grad/patch_embed.proj.weight"], atol=1e-7)
    close(student.blocks[0].attn.qkv.weight.grad, z["grad/blocks.0.attn.qkv.weight"], atol=1e-7)
    close(objective.predictor.mask_token.grad, z["grad/pred.mask_token"], atol=1e-7)
    for name, norm in sub(z, "gradnorm/").items():
        name = name.replace("P/predictor_", "predictor.").replace("P/", "predictor.")
        name = name if name.startswith("predictor.") else "student." + name
        close(objective.get_parameter(name).grad.norm(), norm, rtol=1e-3, atol=1e-7)
    assert all(p.grad is None for p in objective.teacher.parameters())


def ijepa(grid=(16, 16), **changes):
    encoder = ViT(3, 4, 16, 1, 2)
    return IJEPA(encoder, grid, predictor_dim=16, predictor_depth=1, **changes)


@pytest.mark.parametrize("grid", [(16, 16), (14, 14), (12, 20)])
@pytest.mark.parametrize("cut", ["random", "last"])
def test_ijepa_masks(grid, cut):
    objective = ijepa(grid, context_cut=cut)
    for seed in range(5):
        masks = objective.draw(32, seeded(seed))
        context, target = masks["context"], masks["target"]
        assert context.shape[0] == 32 and context.shape[1] > 10
        assert target.shape[:2] == (32, 4)
        tokens = grid[0] * grid[1]
        for image in range(32):
            hidden = set(target[image].flatten().tolist())
            seen = context[image].tolist()
            assert len(set(seen)) == len(seen) and not hidden & set(seen)
            assert min(seen) >= 0 and max(seen) < tokens and max(hidden) < tokens
            for block in target[image]:  # a filled rectangle
                rows, cols = block // grid[1], block % grid[1]
                height, width = rows.max() - rows.min() + 1, cols.max() - cols.min() + 1
                assert len(set(block.tolist())) == height * width == len(block)
        assert 0.12 < target.shape[2] / tokens < 0.23
        again = objective.draw(32, seeded(seed))
        assert all(masks[key].equal(again[key]) for key in masks)


def test_ijepa_masks_reach_every_token_and_random_cut_is_fair():
    """Published masks never touch the last row and column and lose the bottom of the image."""
    shares = {}
    for cut in ("random", "last"):
        objective = ijepa((14, 14), context_cut=cut)
        seen, hidden = torch.zeros(196), torch.zeros(196)
        for seed in range(40):
            masks = objective.draw(64, seeded(seed))
            seen += torch.bincount(masks["context"].flatten(), minlength=196)
            hidden += torch.bincount(masks["target"].flatten(), minlength=196)
        assert hidden.min() > 0
        rows = seen.view(14, 14).sum(1)
        shares[cut] = float(rows[-3:].sum() / rows[:3].sum())
    assert shares["random"] == pytest.approx(1, abs=0.1)
    assert shares["last"] < 0.7


def test_ijepa_sizes_vary_in_scale_and_aspect_independently():
    u = torch.rand(300, 2, generator=seeded(0), dtype=torch.float64)
    sizes = set(map(tuple, ijepa().block_sizes(u, (0.15, 0.2), (0.75, 1.5)).tolist()))
    assert len(sizes) > 8
    assert {h > w for h, w in sizes} == {True, False}
    for h, w in sizes:  # of the drawn area and aspect, but for rounding the sides
        assert 0.12 < h * w / 256 < 0.23 and 0.6 < h / w < 1.7


def poorest(masks, objective):
    """Context left to each image by its targets alone, for a context block of the whole grid."""
    tokens = math.prod(objective.grid)
    hidden = torch.zeros(len(masks["target"]), tokens, dtype=torch.bool)
    return tokens - hidden.scatter_(1, masks["target"].flatten(1), True).sum(1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ijepa_small_grids_never_fail_to_draw(seed):
    """On 4 x 4 tokens four targets often leave too little: they give way to copies of another."""
    objective, copies = ijepa((4, 4)), 0
    for step in range(200):
        masks = objective.draw(16, seeded(1000 * seed + step))
        context, target = masks["context"], masks["target"]
        assert context.shape[1] > 10
        for image in range(16):
            hidden = set(target[image].flatten().tolist())
            assert not hidden & set(context[image].tolist())
            copies += len({tuple(block.tolist()) for block in target[image]}) < 4
        assert (poorest(masks, objective) > 10).all()
    assert copies > 100


def test_ijepa_gives_up_the_target_that_frees_most():
    """Two targets share their tokens, a third hides others: without it most context is free."""
    objective = ijepa((4, 5), targets=3)
    target = torch.tensor([[0, 1, 5, 6], [1, 2, 6, 7], [12, 13, 17, 18]])
    whole = torch.arange(20)
    kept = model.context_mask(whole[None], target[None], 20)[0]
    assert int(kept.sum()) == 10
    objective.thin_out(target, whole, kept)
    assert target.tolist() == [[0, 1, 5, 6], [1, 2, 6, 7], [0, 1, 5, 6]]
    assert int(kept.sum()) == 14


@pytest.mark.parametrize("grid, scale", [((4, 4), (0.6, 0.6)), ((3, 3), (0.15, 0.2))])
def test_ijepa_refuses_what_a_single_target_would_hide(grid, scale):
    with refused(ValueError, "--target-scale", scale, f"{grid[0]} x {grid[1]}"):
        ijepa(grid, target_scale=scale)
    masks = ijepa((8, 8), targets=2, target_scale=(0.1, 0.15)).draw(8, seeded(0))
    assert masks["context"].shape[1] > 10


@pytest.mark.parametrize("grid", [(5, 5), (3, 7)])
def test_blocks_lie_inside_and_reach_all_corners(grid):
    size = (2, 3)
    index = block_index(*draw_blocks(400, 1, size, grid, seeded(0)), size, grid).flatten(1)
    assert index.unique().equal(torch.arange(grid[0] * grid[1]))
    assert index[0].tolist() == sorted(index[0].tolist())


def test_rectangle_is_that_of_the_paper():
    grid, heights = (14, 14), set()
    for seed in range(60):
        index = draw_rectangle(16, grid, seeded(seed))
        rows = index // 14
        heights.add(int(rows[0].max() - rows[0].min()) + 1)
    assert heights == {5, 6, 7, 8, 9}  # 40 % to 70 % of 14, as in the author's masks


# ---- Latent MIM


def latentmim_from(z):
    student = ViT(4, 8, 64, 2, 4, class_token=True, pos="latentmim")
    objective = LatentMIM(
        student,
        (4, 4),
        gap=2,
        visible=5,
        head_dim=96,
        decoder_dim=32,
        decoder_depth=2,
        decoder_heads=4,
    )

    def ours(state):
        state = {k.replace("embed.proj", "patch_embed.proj"): v for k, v in state.items()}
        key = "patch_embed.proj.weight"
        state[key] = rearrange(state[key], "d (p q c) -> d c p q", p=8, q=8)
        return {k: v for k, v in state.items() if "pos_embed" not in k}

    student.load_state_dict(ours(sub(z, "sd/encoder.")))
    objective.teacher.load_state_dict(ours(sub(z, "sd/target_encoder.")))
    decoder = {k: v for k, v in sub(z, "sd/decoder.").items() if "pos_embed" not in k}
    objective.decoder.load_state_dict(decoder)
    return objective, ours


def patch_pixels(images, patch):
    return rearrange(images, "b c (i p) (j q) -> b (i j) (p q c)", p=patch, q=patch)


def test_latentmim_parity(golden):
    z = golden("d_latentmim_tiny_author")
    objective, ours = latentmim_from(z)
    images = z["imgs"]
    offset = torch.stack([z["gap_row_offset"], z["gap_col_offset"]], dim=-1)
    masks = {"context": z["pid_vis"], "target": z["pid_mask"], "offset": offset}

    assert patch_pixels(objective.patches(images, masks), 8).equal(z["patch_pix"])
    no_gap = take_patches(images[:, :, :32, :32], 8, 0, torch.zeros_like(offset))
    assert patch_pixels(no_gap, 8).equal(z["patch_pix_nogap"])
    trunk = objective.student.encode(objective.patches(images, masks), masks["context"])
    close(trunk, z["x_vis_trunk"])
    close(objective.student.head(trunk), z["x_vis"])
    target = objective.target_tokens(images, masks)
    close(target, z["x_trg"])
    predicted = objective.decoder(z["x_vis"], masks["context"], masks["target"], (4, 4))
    close(predicted, z["x_pred"])
    loss, tokens, index = objective(images, masks)
    close(tokens, z["x_vis"][:, 1:])
    close(loss, z["loss_infonce_patches"], atol=0)

    assert hr_index(index, (4, 4), 2).equal(z["hr_pid"])
    # the author's HR teacher has the target encoder's weights; its patches were drawn per HR cell
    hr = rearrange(z["hr_patch_pix"], "b (i j) (p q c) -> b c (i p) (j q)", i=8, p=8, q=8)
    objective.teacher.load_state_dict(ours(sub(z, "sd/hr_gram_teacher.")))
    with torch.no_grad():
        hr_tokens = objective.teacher.head(objective.teacher(hr, z["hr_pid"]))
    close(hr_tokens, z["x_hr_teacher"])
    affinity = gram_loss(tokens, hr_tokens)
    close(affinity, z["gram_loss"], atol=0)

    (loss + affinity).backward()
    weight = objective.student.patch_embed.proj.weight.grad
    close(rearrange(weight, "d c p q -> d (p q c)"), z["grad/encoder.embed.proj.weight"], atol=1e-6)
    close(objective.decoder.cls_token.grad, z["grad/decoder.cls_token"], atol=1e-6)
    for name, norm in sub(z, "gradnorm/").items():
        name = name.replace("encoder.embed", "encoder.patch_embed").replace("encoder.", "student.")
        close(objective.get_parameter(name).grad.norm(), norm, rtol=1e-3, atol=1e-6)


def slow_patches(images, patch, gap, offset):
    out = []
    for image, offs in zip(images, offset.tolist(), strict=True):
        rows = []
        for i, line in enumerate(offs):
            tops = [(i * (patch + gap) + y, j * (patch + gap) + x) for j, (y, x) in enumerate(line)]
            rows.append(torch.cat([image[:, y : y + patch, x : x + patch] for y, x in tops], 2))
        out.append(torch.cat(rows, 1))
    return torch.stack(out)


@pytest.mark.parametrize("grid, patch, gap", [((2, 3), 4, 2), ((1, 1), 5, 0), ((3, 2), 1, 3)])
def test_take_patches_slow_loop(grid, patch, gap):
    size = [g * (patch + gap) for g in grid]
    images = torch.randn(2, 3, *size)
    offset = torch.randint(0, gap + 1, (2, *grid, 2), generator=seeded(0))
    assert take_patches(images, patch, gap, offset).equal(slow_patches(images, patch, gap, offset))
    # a finer view of the same ground gives the same patches, finer
    fine = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    found = take_patches(fine, 2 * patch, 2 * gap, 2 * offset)
    coarse = take_patches(images, patch, gap, offset)
    assert found.equal(coarse.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_take_patches_says_the_size():
    with refused(ValueError, "12 x 13", "2 x 2 cells", "to 12 x 12"):
        take_patches(torch.zeros(1, 1, 12, 13), 4, 2, torch.zeros(1, 2, 2, 2, dtype=torch.int64))


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


def test_latentmim_masks():
    masks = latentmim().draw(64, seeded(0))
    both = torch.cat([masks["context"], masks["target"]], 1)
    assert both.sort(1).values.equal(torch.arange(16).expand(64, -1))
    assert masks["offset"].unique().tolist() == [0, 1]  # never the gap itself, as published
    assert latentmim(gap=0).draw(2, seeded(0))["offset"].eq(0).all()
    with refused(ValueError, "15", "--visible"):
        latentmim(visible=15)


def test_latentmim_sees_only_what_it_may():
    """Hidden pixels do not reach the student, visible ones do not reach the targets."""
    objective = latentmim()
    masks = objective.draw(2, seeded(0))
    images = torch.randn(2, 3, 24, 24)
    pixels = objective.patches(images, masks)
    changed = pixels.clone()
    for image, seen in zip(changed, masks["context"].tolist(), strict=True):
        for i in seen:
            image[:, i // 4 * 4 :, i % 4 * 4 :][:, :4, :4] += 1
    with torch.no_grad():
        assert not objective.student(pixels, masks["context"]).allclose(
            objective.student(changed, masks["context"])
        )
        close(
            objective.teacher(pixels, masks["target"]), objective.teacher(changed, masks["target"])
        )


def test_affinity_on_trunk_or_head():
    images, tokens = torch.randn(2, 3, 24, 24), {}
    for where in ("head", "trunk"):
        objective = latentmim(affinity_on=where)
        masks = objective.draw(2, seeded(0))
        _, tokens[where], index = objective(images, masks)
        close(objective.encode(images, masks, index), tokens[where])
    close(objective.student.head(tokens["trunk"]), tokens["head"])


def test_info_nce_slow_loop():
    predicted, target, tau = torch.randn(2, 5, 8), torch.randn(2, 5, 8), 0.2
    total = 0.0
    for p, t in zip(predicted.double(), target.double(), strict=True):
        p = (p - p.mean(0)) / (p.std(0) + 1e-4)
        for i in range(5):
            scores = torch.stack([F.cosine_similarity(p[i], t[j], dim=0) for j in range(5)]) / tau
            total += float(scores.logsumexp(0) - scores[i]) * 2 * tau / 10
    assert float(model.info_nce(predicted, target, tau)) == pytest.approx(total, rel=1e-5)


# ---- MAE


def mae(grid=(4, 4), **changes):
    torch.manual_seed(0)
    return MAE(ViT(3, 4, 16, 1, 2), grid, **{"decoder_dim": 24, "decoder_depth": 2,
                                             "decoder_heads": 3, **changes})  # fmt: skip


def test_mae_masks():
    masks = mae().draw(64, seeded(0))
    assert masks["context"].shape == (64, 4) and masks["target"].shape == (64, 12)
    both = torch.cat([masks["context"], masks["target"]], 1)
    assert both.sort(1).values.equal(torch.arange(16).expand(64, -1))
    assert masks["context"].unique().equal(torch.arange(16))
    for share in (0.0, 0.99):
        with refused(ValueError, "--mask-share", share):
            mae(mask_share=share)


def test_mae_slow_loop():
    """Pixels of each hidden patch over all bands, normalised by themselves; mean squared error."""
    objective = mae((2, 4))
    images, masks = torch.randn(3, 3, 8, 16), objective.draw(3, seeded(0))
    loss, tokens, index = objective(images, masks)
    target = objective.target_tokens(images, masks)
    assert index is masks["context"]
    close(tokens, objective.student(images, index))
    for image in range(3):
        for k, place in enumerate(masks["target"][image].tolist()):
            row, col = place // 4 * 4, place % 4 * 4
            pixels = images[image, :, row : row + 4, col : col + 4].permute(1, 2, 0).flatten()
            close(target[image, k], (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt())
    # the decoder, token by token: what is seen and what is asked, each at its place
    position = position_table((2, 4), 24, "ijepa")
    x = torch.cat([objective.embed(tokens) + position[index],
                   objective.mask_token + position[masks["target"]]], 1)  # fmt: skip
    for block in objective.blocks:
        x = block(x)
    predicted = objective.proj(objective.norm(x))[:, 2:]
    close(loss, (predicted - target).square().mean())
    # the teacher takes no part in the loss
    objective.teacher.norm.weight.data += 1
    assert objective(images, masks)[0] == loss


def test_mae_hidden_pixels_reach_no_token():
    objective = mae()
    images, masks = torch.randn(2, 3, 16, 16), objective.draw(2, seeded(0))
    changed = images.clone()
    for image, hidden in zip(changed, masks["target"].tolist(), strict=True):
        for i in hidden:
            image[:, i // 4 * 4 :, i % 4 * 4 :][:, :4, :4] += 1
    assert objective(images, masks)[1].equal(objective(changed, masks)[1])


# ---- VICReg's terms


def test_regularise_slow_loop():
    tokens = 0.3 * torch.randn(3, 5, 4) + 2
    z = tokens.flatten(0, 1).double()
    n, d = z.shape
    mean = z.sum(0) / n
    cov = [[float(((z[:, i] - mean[i]) * (z[:, j] - mean[j])).sum()) / (n - 1) for j in range(d)]
           for i in range(d)]  # fmt: skip
    spread = sum(max(0.0, 1 - math.sqrt(cov[i][i] + 1e-4)) for i in range(d)) / d
    apart = sum(cov[i][j] ** 2 for i in range(d) for j in range(d) if i != j) / (25 * d)
    assert float(model.regularise(tokens)) == pytest.approx(spread + apart, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.regularise(tokens).dtype == torch.float32
    wide = torch.linalg.qr(torch.randn(15, 4)).Q.view(3, 5, 4)  # spread out, uncorrelated
    wide = (wide - wide.flatten(0, 1).mean(0)) * 8
    assert model.regularise(wide) < model.regularise(0.01 * wide)
    tokens = tokens.double().requires_grad_()
    assert torch.autograd.gradcheck(model.regularise, tokens, eps=1e-4, atol=1e-3, rtol=1e-2)


# ---- both objectives' numbers on weights that any machine draws alike, recorded by the code that
# met the published vectors: what a clone without those vectors tests parity against


def refill(module):
    """Weights from numpy's frozen generator, in the order of their names."""
    draws = np.random.RandomState(0)
    for name, parameter in sorted(module.named_parameters()):
        values = draws.standard_normal(tuple(parameter.shape)) * 0.2
        values += "norm" in name and name.endswith("weight")
        parameter.data = torch.from_numpy(values.astype(np.float32))


def recorded_numbers():
    draws = np.random.RandomState(1)
    images = torch.from_numpy(draws.standard_normal((3, 4, 24, 24)).astype(np.float32))
    hr = torch.from_numpy(draws.standard_normal((3, 4, 48, 48)).astype(np.float32))
    order = torch.from_numpy(np.argsort(draws.random_sample((3, 16)), 1))
    offset = torch.from_numpy(draws.randint(0, 2, (3, 4, 4, 2)))
    for name in ("ijepa", "latentmim"):
        shape = dict(in_channels=4, dim=16, depth=2, heads=2)
        if name == "ijepa":
            objective = IJEPA(ViT(patch_size=6, **shape), (4, 4), 12, 2, targets=2)
            masks = {"context": order[:, :6], "target": order[:, 6:].unflatten(1, (2, 5))}
        else:
            encoder = ViT(patch_size=4, class_token=True, pos="latentmim", **shape)
            objective = LatentMIM(encoder, (4, 4), 2, 6, 24, 12, 2, 3)
            masks = {"context": order[:, :6], "target": order[:, 6:], "offset": offset}
        refill(objective)
        loss, tokens, index = objective(images, masks)
        target = objective.target_tokens(images, masks)
        seen = hr if name == "ijepa" else take_patches(hr, 8, 4, 2 * offset)
        with torch.no_grad():
            seen = objective.teacher.head(objective.teacher(seen, hr_index(index, (4, 4), 2)))
        term = gram_loss(tokens, seen)
        (loss + term).backward()
        yield (
            name,
            {
                "loss": loss.item(),
                "affinity": term.item(),
                "tokens": tokens.detach()[1, 2].tolist(),
                "target": target.flatten(1, -2)[1, 2].tolist(),
                "grads": {
                    n: p.grad.norm().item()
                    for n, p in objective.named_parameters()
                    if p.grad is not None
                },
            },
        )


def test_recorded_parity():
    recorded = json.loads((ROOT / "tests" / "golden" / "objectives.json").read_text())
    for name, found in recorded_numbers():
        for key in ("loss", "affinity", "tokens", "target"):
            assert found[key] == pytest.approx(recorded[name][key], rel=1e-4, abs=1e-5), (name, key)
        assert found["grads"] == pytest.approx(recorded[name]["grads"], rel=1e-3, abs=1e-5), name


# ---- schedules, decay, EMA


def plan_of(objective, warmup, peak=None):
    """The `Plan` of the paper's flags, for a run of so many warm-up steps."""
    d = objective.defaults
    lr = peak or d["lr"]
    return model.Plan(
        lr, d["start_lr"] * lr, d["final_lr"] * lr, warmup, d["weight_decay"],
        d["final_weight_decay"], d["momentum"],
    )  # fmt: skip


def test_ijepa_schedules_golden(golden):
    z = golden("b_ijepa_schedules")
    total, plan = int(z["T"]), plan_of(IJEPA, int(z["warmup_steps"]))
    objective = ijepa()
    for step in range(total):
        rates = objective.rates(step, total, plan)
        assert rates.lr == pytest.approx(float(z["lr"][step]), rel=1e-9)
        # the published counter is one ahead for weight decay too: z["wd"][s] belongs to s + 1
        assert rates.weight_decay == pytest.approx(float(z["wd"][step]), rel=1e-9)
        assert rates.momentum == pytest.approx(float(z["ema"][step]), rel=1e-9)


def test_latentmim_schedules_golden(golden):
    z = golden("d_latentmim_schedules")
    plan = plan_of(LatentMIM, 30, float(z["base_lr"]))
    assert z["min_lr_frac"] == LatentMIM.defaults["start_lr"] == LatentMIM.defaults["final_lr"]
    for epoch, lr, momentum in zip(z["epoch"], z["lr"], z["mom"], strict=True):
        rates = latentmim().rates(float(epoch), 300, plan)
        assert rates.lr == pytest.approx(float(lr), rel=1e-9)
        assert rates.momentum == pytest.approx(float(momentum))
        assert rates.weight_decay == pytest.approx(0.05)


def test_weight_decay_groups_golden(golden):
    z = golden("d_latentmim_tiny_author")
    for names, expected in ((z["wd_names"], True), (z["nowd_names"], False)):
        for name in names:
            parameter = torch.zeros(2, 2)
            assert LatentMIM.decays(None, str(name), parameter) == expected, name
    matrix, vector = torch.zeros(2, 2), torch.zeros(2)
    assert IJEPA.decays(None, "predictor.mask_token", torch.zeros(1, 1, 2))
    assert IJEPA.decays(None, "student.patch_embed.proj.weight", matrix)
    assert not IJEPA.decays(None, "student.norm.weight", vector)
    assert not IJEPA.decays(None, "student.blocks.0.attn.qkv.bias", vector)


def test_ema(golden):
    z = golden("d_latentmim_tiny_author")
    name = "blocks.0.attn.qkv.weight"
    teacher, student = torch.nn.Linear(64, 192), torch.nn.Linear(64, 192)
    teacher.weight.data = z[f"sd/target_encoder.{name}"].clone()
    student.weight.data = z[f"sd/encoder.{name}"].clone()
    model.ema_update(teacher, student, 0.9)
    torch.testing.assert_close(teacher.weight.data, z[f"ema0.9/target_encoder.{name}"])


# ---- purity


@pytest.mark.parametrize("name", OBJECTIVES)
def test_forward_is_pure_and_batch_parts_average(name):
    objective, side = unequal(name)
    images = torch.randn(4, 2, side, side)
    masks = objective.draw(4, seeded(0))
    state = torch.get_rng_state()
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    whole = objective(images, masks)[0]
    assert torch.get_rng_state().equal(state)
    assert all(v.equal(before[k]) for k, v in objective.state_dict().items())
    parts = [
        objective(images[i : i + 2], {k: v[i : i + 2] for k, v in masks.items()})[0] for i in (0, 2)
    ]
    close(sum(parts) / 2, whole)


def unequal(name):
    """An objective whose predictor or decoder is wider than its encoder, and its images' side."""
    shape = dict(in_channels=2, patch_size=2, dim=16, depth=1, heads=2)
    if name == "ijepa":
        return IJEPA(ViT(**shape), (12, 12), 24, 1), 24
    if name == "latentmim":
        encoder = ViT(**shape, class_token=True, pos="latentmim")
        return LatentMIM(encoder, (6, 6), 1, 9, 8, 24, 1, 2), 18
    return MAE(ViT(**shape), (6, 6), decoder_dim=24, decoder_depth=1, decoder_heads=2), 12


@pytest.mark.parametrize("name", OBJECTIVES)
def test_compiles_once_for_all_mask_sizes(name):
    """60 steps whose masks change in size: no graph break, at most 3 compilations, eager losses."""
    objective, side = unequal(name)
    counter, sizes = CompileCounterWithBackend("aot_eager"), set()
    torch._dynamo.reset()
    compiled = torch.compile(objective, backend=counter, fullgraph=True)
    images = torch.randn(4, 2, side, side)
    for step in range(60):
        masks = objective.draw(4, seeded(step))
        sizes.add((masks["context"].shape[1], masks["target"].shape[-1]))
        loss = compiled(images, masks)[0]
        close(loss, objective(images, masks)[0])
        if step == 30:  # gradients too
            (grad,) = torch.autograd.grad(loss, objective.student.norm.weight)
            again = torch.autograd.grad(objective(images, masks)[0], objective.student.norm.weight)
            close(grad, again[0])
    assert len(sizes) > 10 or name != "ijepa"
    assert counter.frame_count <= 3


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
