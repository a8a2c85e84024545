import math
import re

import pytest
import torch
import torch.utils.flop_counter
from conftest import refused

import vit as vits
from affinity import hr_index
from vit import ViT, position_table, take_patches, vit


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
    block = vits.Attention(12, 3)
    x = torch.randn(2, 5, 12)
    q, k, v = block.qkv(x).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / math.sqrt(4)).softmax(-1)
    close(block(x), block.proj((weights @ v).transpose(1, 2).flatten(2)))


def test_a_block_for_its_last_tokens_alone():
    """As the whole block's last tokens, with their gradients to all tokens and weights."""
    block = vits.Block(12, 3).double()
    x, weight = torch.randn(2, 7, 12).double(), torch.randn(2, 3, 12).double()
    found = []
    for function in (lambda x: block(x, 3), lambda x: block(x)[:, -3:]):
        x = x.detach().requires_grad_()
        out = function(x)
        found.append([out, *torch.autograd.grad((out * weight).sum(), [x, *block.parameters()])])
    for ours, expected in zip(*found, strict=True):
        close(ours, expected, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_lean_mlp_has_the_plain_ones_gradients(dtype):
    """Bit for bit, also under autocast, though the GELU is computed twice."""
    mlp, x, found = vits.Mlp(8, 32), torch.randn(2, 5, 8), []
    for function in (mlp, lambda x: mlp.fc2(torch.nn.functional.gelu(mlp.fc1(x)))):
        x = x.detach().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            out = function(x)
        found.append(
            [out, *torch.autograd.grad(out.float().square().sum(), [x, *mlp.parameters()])]
        )
    for ours, expected in zip(*found, strict=True):
        assert ours.equal(expected)


def test_a_lean_mlp_computes_no_linear_map_twice():
    calls = torch.utils.flop_counter.FlopCounterMode(display=False)
    with calls:
        vits.Mlp(8, 32)(torch.randn(2, 5, 8, requires_grad=True)).sum().backward()
    assert calls.get_total_flops() == 6 * 2 * 10 * 8 * 32  # two maps, each with two gradients


def test_vit_sizes_and_messages():
    shapes = {name: (vit(name, depth=1).dim, vits.SIZES[name][1]) for name in vits.SIZES}
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


# ---- patches cut with gaps


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
