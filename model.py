"""Vision transformer, I-JEPA and Latent MIM, and reading of pretrained encoders.

Reading order: position codes and `ViT`; the predictor and `IJEPA` (arXiv 2301.08243); the decoder
and `LatentMIM` (arXiv 2407.15837); `save_encoder` and `load_encoder`.

An objective owns a `student` and its EMA `teacher`. `draw` makes all of a step's random choices on
the CPU, `forward(images, masks)` is pure: no random number, no EMA, no device sync. Shapes: B
images, C bands, N = rows * cols tokens of width D, row-major; `grid` is (rows, cols).
"""

import copy
import json
import math
import os
import pickle
import re
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

# name: (width, depth, heads), as published for ViT
SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}


# ---- positions and masks ----------------------------------------------------------------------


@torch.compiler.assume_constant_result  # to torch.compile a constant, not a part of the graph
def position_table(grid, dim, kind, spacing=1.0, device="cpu"):
    """Sine-cosine code of every token of a grid: (rows * cols, dim) float32.

    kind: "ijepa", integer coordinates 0..g-1, or "latentmim", i * g / (g - 1).
    spacing: distance of two tokens in units of the grid whose coordinates are wanted. 1 numbers
    this grid's own tokens; 1/r places the tokens of an r times finer grid at their centres on the
    coarse one, (q + 0.5)/r - 0.5 (METHOD "ground" positions).
    The first half of the channels encodes the column, the second the row, each as [sin, cos] with
    frequencies 10000^(-k / (dim/4)). Raises ValueError if dim is no multiple of 4.
    """
    return cached_table(grid, dim, kind, spacing, torch.device(device))


@lru_cache(maxsize=64)  # built once per grid and device: a copy to the GPU would be a sync
def cached_table(grid, dim, kind, spacing, device):
    if dim % 4:
        raise ValueError(f"a sine-cosine position code needs a width divisible by 4, found {dim}")
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    codes = []
    for count in grid:
        coordinate = (torch.arange(count, dtype=torch.float64) + 0.5) * spacing - 0.5
        if kind == "latentmim":
            coarse = count * spacing
            coordinate = coordinate * coarse / max(coarse - 1, 1)
        angle = coordinate[:, None] * frequency
        codes.append(torch.cat([angle.sin(), angle.cos()], dim=1))
    rows, cols = grid
    table = torch.cat([codes[1].repeat(rows, 1), codes[0].repeat_interleave(cols, dim=0)], dim=1)
    return table.float().to(device)


def take(tokens, index):
    """Tokens (B, N, D) at index (B, K) int64 -> (B, K, D)."""
    return torch.take_along_dim(tokens, index[:, :, None], dim=1)


def take_patches(images, patch, gap, offset):
    """Cut one patch out of each cell of a gapped image and set the patches side by side.

    images: (B, C, rows * (patch + gap), cols * (patch + gap)). patch, gap: pixels.
    offset: (B, rows, cols, 2) int64, row and column of the patch in its cell, 0..gap.
    Returns (B, C, rows * patch, cols * patch). The r times larger view of the same ground is
    `take_patches(hr, r * patch, r * gap, r * offset)`. Raises ValueError if the size does not fit.
    Source: Latent MIM's patch gap, which keeps neighbours from touching.
    """
    b, _, height, width = images.shape
    rows, cols = offset.shape[1:3]
    cell = patch + gap
    if (height, width) != (rows * cell, cols * cell):
        raise ValueError(
            f"images of {height} x {width} px are not {rows} x {cols} cells of {patch} + {gap} px; "
            f"resize to {rows * cell} x {cols * cell}"
        )
    device = images.device
    pixel = torch.arange(patch, device=device)
    top = torch.arange(rows, device=device)[:, None] * cell + offset[..., 0]  # (B, rows, cols)
    left = torch.arange(cols, device=device) * cell + offset[..., 1]
    y = (top[..., None] + pixel)[..., :, None]  # (B, rows, cols, patch, 1)
    x = (left[..., None] + pixel)[..., None, :]
    image = torch.arange(b, device=device).view(-1, 1, 1, 1, 1)
    patches = images[image, :, y, x]  # (B, rows, cols, patch, patch, C)
    return rearrange(patches, "b i j p q c -> b c (i p) (j q)")


# ---- the vision transformer -------------------------------------------------------------------


def init_normal(module):
    """I-JEPA's start: every weight N(0, 0.02), biases 0.

    Its paper code also rescales by depth, but the training script draws all weights anew.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_xavier(module):
    """Latent MIM's start: Xavier uniform for every linear map, patches included, biases 0."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.data.flatten(1))  # a view: fills the weight itself
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_heads(dim, heads):
    if dim % heads:
        raise ValueError(f"a width of {dim} does not divide into {heads} attention heads")
    return heads


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = check_heads(dim, heads)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (t h d) -> t b h n d", t=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class CrossAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = check_heads(dim, heads)
        self.q_proj = nn.Linear(dim, dim)
        self.kv_proj = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, memory):
        q = rearrange(self.q_proj(x), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(self.kv_proj(memory), "b n (t h d) -> t b h n d", t=2, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A plain vision transformer; parameters carry the names of timm's VisionTransformer.

    in_channels: bands. patch_size: pixels. dim: width, a multiple of `heads`.
    class_token: one more token, which `forward` drops and `encode` keeps in front.
    pos: "ijepa" or "latentmim" (`position_table` for the grid at hand), or "learned" with
    pos_grid = (rows, cols) of the stored table, resized to the grid at hand (bicubic).
    """

    def __init__(
        self,
        in_channels=4,
        patch_size=14,
        dim=384,
        depth=12,
        heads=6,
        mlp_ratio=4.0,
        class_token=False,
        pos="ijepa",
        pos_grid=None,
    ):
        super().__init__()
        if pos not in ("ijepa", "latentmim", "learned"):
            raise ValueError(f"pos is {pos!r}; choose ijepa, latentmim or learned")
        self.config = dict(
            in_channels=in_channels,
            patch_size=patch_size,
            dim=dim,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
            class_token=class_token,
            pos=pos,
            pos_grid=pos_grid,
        )
        self.in_channels, self.patch_size, self.dim = in_channels, patch_size, dim
        self.class_token, self.pos, self.meta = class_token, pos, {}
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Identity()  # Latent MIM's projection; `forward` never applies it
        if class_token:
            self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        if pos == "learned":
            self.register_buffer("pos_embed", torch.zeros(1, pos_grid[0] * pos_grid[1], dim))
        else:
            position_table((1, 1), dim, pos)  # a width without a position code says so now
        # each framework's own start
        self.apply(init_xavier if pos == "latentmim" else init_normal)

    def grid(self, images):
        """(rows, cols) of images (B, C, H, W); ValueError if bands or size do not fit."""
        _, bands, height, width = images.shape
        p = self.patch_size
        if bands != self.in_channels:
            raise ValueError(f"the encoder reads {self.in_channels} bands, the images have {bands}")
        if height % p or width % p:
            raise ValueError(
                f"images of {height} x {width} px are no multiple of the {p} px patch; "
                f"resize to {max(1, round(height / p)) * p} x {max(1, round(width / p)) * p}"
            )
        return height // p, width // p

    def position(self, grid, spacing, device):
        if self.pos != "learned":
            return position_table(grid, self.dim, self.pos, spacing, device)
        table = rearrange(self.pos_embed, "1 (h w) d -> 1 d h w", h=self.config["pos_grid"][0])
        if table.shape[-2:] != grid:
            table = F.interpolate(table, grid, mode="bicubic", antialias=True)
        return rearrange(table, "1 d h w -> (h w) d")

    def embed(self, images, index=None, spacing=1.0):
        """What the first block reads: patches and positions, behind the class token if any."""
        p = self.patch_size
        position = self.position(self.grid(images), spacing, images.device)
        patches = rearrange(images, "b c (i p) (j q) -> b (i j) (c p q)", p=p, q=p)
        if index is not None:
            # masked tokens are dropped before the embedding: they cost nothing at all
            patches, position = take(patches, index), position[index]
        weight, bias = self.patch_embed.proj.weight, self.patch_embed.proj.bias
        tokens = F.linear(patches, weight.flatten(1), bias) + position
        if self.class_token:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return tokens

    def encode(self, images, index=None, spacing=1.0):
        """As `forward`, with the class token, if there is one, in front: (B, 1 + K, D)."""
        tokens = self.embed(images, index, spacing)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def levels(self, images, depths):
        """Patch tokens after some blocks, each through the last LayerNorm: a list of (B, N, D).

        depths: numbers of blocks, 1 to all, in any order; the last block gives `forward`'s tokens.
        """
        tokens, after = self.embed(images), {}
        for depth, block in enumerate(self.blocks, 1):
            tokens = block(tokens)
            if depth in depths:
                after[depth] = self.norm(tokens)[:, int(self.class_token) :]
        return [after[depth] for depth in depths]

    def forward(self, images, index=None, spacing=1.0):
        """Patch tokens after the last LayerNorm.

        images: (B, C, H, W) float, H and W multiples of the patch. index: None for all N tokens,
        or (B, K) int64, the tokens that the transformer sees. spacing: see `position_table`.
        Returns (B, N or K, D). Raises ValueError if bands or size do not fit.
        """
        return self.encode(images, index, spacing)[:, int(self.class_token) :]


def vit(name, **changes):
    """A `ViT` of a published size, "tiny" to "huge"; `changes` override any of its arguments."""
    dim, depth, heads = SIZES[name]
    return ViT(**{"dim": dim, "depth": depth, "heads": heads, **changes})


def freeze_copy(module):
    """The teacher at step 0: a copy without gradients."""
    return copy.deepcopy(module).requires_grad_(False)


# ---- I-JEPA -----------------------------------------------------------------------------------


def draw_blocks(batch, count, size, grid, generator):
    """Top-left corners (batch, count) x 2 of blocks placed uniformly over the *whole* grid.

    (Published samplers never reach the last row and column.)
    """
    top, left = (
        torch.randint(0, cells - side + 1, (batch, count), generator=generator)
        for cells, side in zip(grid, size, strict=True)
    )
    return top, left


def block_index(top, left, size, grid):
    """Row-major token ids of blocks: top, left (...) int64 -> (..., size[0] * size[1]) int64."""
    rows = top[..., None, None] + torch.arange(size[0])[:, None]
    cols = left[..., None, None] + torch.arange(size[1])
    return (rows * grid[1] + cols).flatten(-2)


def draw_rectangle(batch, grid, generator, low=0.4, high=0.7):
    """A rectangle of tokens per image: (batch, h * w) int64, CPU.

    h and w are drawn once, from `low` to `high` of the grid's sides, positions per image.
    Source: arXiv 2601.12964, `block` affinity. (Published code draws a size per image and cuts all
    to the smallest, which leaves the top rows of each rectangle.)
    """
    size = tuple(
        int(torch.randint(max(1, int(low * g)), int(high * g) + 1, (), generator=generator))
        for g in grid
    )
    return block_index(*draw_blocks(batch, 1, size, grid, generator), size, grid).flatten(1)


class Predictor(nn.Module):
    """I-JEPA's narrow ViT: from context tokens and target positions to target tokens."""

    def __init__(self, token_dim, dim, depth, heads):
        super().__init__()
        position_table((1, 1), dim, "ijepa")  # as in `ViT`
        self.embed = nn.Linear(token_dim, dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.proj = nn.Linear(dim, token_dim)
        self.apply(init_normal)

    def forward(self, tokens, context, target, grid):
        """tokens (B, K, D), context (B, K), target (B, M, T) ids -> (B, M, T, D)."""
        blocks, length = target.shape[1:]
        position = position_table(grid, self.mask_token.shape[-1], "ijepa", device=tokens.device)
        seen = self.embed(tokens) + position[context]
        asked = self.mask_token + position[target.flatten(0, 1)]
        # each target block is predicted by itself: blocks become images
        x = torch.cat([repeat(seen, "b k d -> (b m) k d", m=blocks), asked], dim=1)
        for block in self.blocks:
            x = block(x)
        return rearrange(self.proj(self.norm(x[:, -length:])), "(b m) t d -> b m t d", m=blocks)


class IJEPA(nn.Module):
    """Predict the teacher's tokens of hidden blocks from a context block (arXiv 2301.08243).

    student: `ViT`. grid: (rows, cols) of its images, for `draw`. Scales are shares of the grid's
    area. cut: which ids go when the contexts are cut to the smallest of the global batch,
    "random", or "last" as published (which drops the bottom of the image).
    """

    def __init__(
        self,
        student,
        grid,
        predictor_dim=384,
        predictor_depth=12,
        targets=4,
        target_scale=(0.15, 0.2),
        target_aspect=(0.75, 1.5),
        context_scale=(0.85, 1.0),
        min_context=10,
        cut="random",
    ):
        super().__init__()
        self.student, self.teacher = student, freeze_copy(student)
        heads = student.config["heads"]
        self.predictor = Predictor(student.dim, predictor_dim, predictor_depth, heads)
        self.grid, self.targets, self.min_context, self.cut = grid, targets, min_context, cut
        self.target_scale, self.target_aspect = target_scale, target_aspect
        self.context_scale = context_scale

    def draw_size(self, scale, aspect, generator):
        """(rows, cols) of a block of random area and, independently, random aspect."""
        (s0, s1), (a0, a1) = scale, aspect
        u = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        area = (s0 + u[0] * (s1 - s0)) * self.grid[0] * self.grid[1]
        ratio = a0 + u[1] * (a1 - a0)
        sides = math.sqrt(area * ratio), math.sqrt(area / ratio)
        return tuple(
            min(max(round(side), 1), cells) for side, cells in zip(sides, self.grid, strict=True)
        )

    def draw(self, batch, generator):
        """One step's masks: {"context": (batch, K), "target": (batch, targets, T)} int64, CPU.

        Sizes are drawn once, positions per image; every context is cut to the smallest, so call
        this with the *global* batch and slice. Raises ValueError if 20 draws leave some image
        `min_context` context tokens or fewer.
        """
        tokens = self.grid[0] * self.grid[1]
        target_size = self.draw_size(self.target_scale, self.target_aspect, generator)
        context_size = self.draw_size(self.context_scale, (1.0, 1.0), generator)
        target = torch.empty(batch, self.targets, math.prod(target_size), dtype=torch.int64)
        kept = torch.zeros(batch, tokens, dtype=torch.bool)
        for _ in range(20):
            poor = kept.sum(1) <= self.min_context
            if not poor.any():
                break
            corner = draw_blocks(batch, self.targets, target_size, self.grid, generator)
            new_target = block_index(*corner, target_size, self.grid)
            corner = draw_blocks(batch, 1, context_size, self.grid, generator)
            inside = block_index(*corner, context_size, self.grid).flatten(1)
            new_kept = torch.zeros_like(kept).scatter_(1, inside, True)
            new_kept.scatter_(1, new_target.flatten(1), False)
            target[poor], kept[poor] = new_target[poor], new_kept[poor]
        if (kept.sum(1) <= self.min_context).any():
            raise ValueError(
                f"I-JEPA masks: {self.targets} targets of scale {self.target_scale} leave "
                f"{self.min_context} or fewer context tokens on a grid of {self.grid[0]} x "
                f"{self.grid[1]}; use smaller or fewer targets (--target-scale, --targets)"
            )
        order = torch.arange(tokens).expand(batch, -1)
        if self.cut == "random":
            order = torch.rand(batch, tokens, generator=generator).argsort(1)
        # ids that are kept first, in `order`, then the batch minimum of them, row-major again
        chosen = order.gather(1, (~kept).gather(1, order).int().argsort(dim=1, stable=True))
        context = chosen[:, : int(kept.sum(1).min())].sort(dim=1).values
        return {"context": context, "target": target}

    def encode(self, images, masks, index):
        """Student tokens (B, K, D) at any index (B, K), as `SpatialAffinity` compares them."""
        return self.student(images, index)

    @torch.no_grad()
    def target_tokens(self, images, masks):
        """Teacher tokens of the whole image, LayerNorm without affine, at the targets' ids."""
        tokens = self.teacher(images)
        tokens = F.layer_norm(tokens.float(), tokens.shape[-1:])
        target = masks["target"]
        return take(tokens, target.flatten(1)).unflatten(1, target.shape[1:])

    def forward(self, images, masks):
        """images (B, C, H, W) -> loss scalar, context tokens (B, K, D), their index (B, K)."""
        grid = self.student.grid(images)
        tokens = self.student(images, masks["context"])
        predicted = self.predictor(tokens, masks["context"], masks["target"], grid)
        loss = F.smooth_l1_loss(predicted.float(), self.target_tokens(images, masks))
        return loss, tokens, masks["context"]


# ---- Latent MIM -------------------------------------------------------------------------------


def projection_head(dim, hidden):
    """MLP dim-hidden-hidden-dim, no bias, LayerNorm after every layer, GELU between."""
    head = nn.Sequential()
    for i, (d_in, d_out) in enumerate([(dim, hidden), (hidden, hidden), (hidden, dim)]):
        head.add_module(f"linear{i}", nn.Linear(d_in, d_out, bias=False))
        head.add_module(f"norm{i}", nn.LayerNorm(d_out))
        if i < 2:
            head.add_module(f"act{i}", nn.GELU())
    return head


class CrossBlock(nn.Module):
    """Self-attention over the queries, cross-attention to the visible tokens, MLP."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.self_attn = Attention(dim, heads)
        self.norm2q = nn.LayerNorm(dim, eps=1e-6)
        self.norm2kv = nn.LayerNorm(dim, eps=1e-6)
        self.cross_attn = CrossAttention(dim, heads)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x, memory):
        x = x + self.self_attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2q(x), self.norm2kv(memory))
        return x + self.mlp(self.norm3(x))


class Decoder(nn.Module):
    """Latent MIM's cross-attention decoder: from visible tokens to the hidden ones."""

    def __init__(self, token_dim, dim, depth, heads):
        super().__init__()
        position_table((1, 1), dim, "latentmim")  # as in `ViT`
        self.embed = nn.Linear(token_dim, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(CrossBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, token_dim)
        self.apply(init_xavier)

    def forward(self, tokens, context, target, grid):
        """tokens (B, [1 +] K, D), a class token allowed in front -> (B, T, D) at target (B, T)."""
        position = position_table(
            grid, self.mask_token.shape[-1], "latentmim", device=tokens.device
        )
        seen, asked = position[context], position[target]  # (B, K, d), (B, T, d)
        memory = self.embed(tokens)
        patches = memory[:, -context.shape[1] :]
        # a query starts as the mean of what is seen, weighted by nearness of position
        near = torch.softmax(asked @ seen.mT / math.sqrt(seen.shape[-1]), dim=-1)
        queries = self.mask_token + near @ patches.to(near.dtype) + asked
        queries = torch.cat([self.cls_token.expand(len(queries), -1, -1), queries], dim=1)
        # the class token's position is zero
        memory = memory + F.pad(seen, (0, 0, memory.shape[1] - seen.shape[1], 0))
        for block in self.blocks:
            queries = block(queries, memory)
        return self.head(self.norm(queries[:, 1:]))


def info_nce(predicted, target, tau=0.2):
    """Patch InfoNCE of each image against its own other patches, times 2 tau; scalar float32.

    predicted, target: (B, T, D). Predictions are standardised over the token axis, both sides
    L2-normalised. Source: Latent MIM, "infonce_patches".
    """
    with torch.autocast(predicted.device.type, enabled=False):
        predicted, target = predicted.float(), target.float()
        mean, std = predicted.mean(1, keepdim=True), predicted.std(1, keepdim=True)
        predicted = F.normalize((predicted - mean) / (std + 1e-4), dim=-1)
        scores = predicted @ F.normalize(target, dim=-1).mT / tau  # (B, T, T)
        label = torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
        return F.cross_entropy(scores.mT, label) * (2 * tau)


class LatentMIM(nn.Module):
    """Predict the teacher's tokens of hidden patches, told apart by InfoNCE (arXiv 2407.15837).

    student: `ViT`, which gets a projection `head` of its own; the teacher has one too. grid: (rows,
    cols) of patches. gap: pixels between patches, so images are rows * (patch + gap) high.
    visible: patches that the student sees. affinity_on: which tokens `forward` returns, the
    projection "head"'s (paper) or the "trunk"'s.
    """

    def __init__(
        self,
        student,
        grid,
        gap=4,
        visible=20,
        head_dim=4096,
        decoder_dim=512,
        decoder_depth=3,
        decoder_heads=16,
        tau=0.2,
        affinity_on="head",
    ):
        super().__init__()
        if not 0 < visible < grid[0] * grid[1] - 1:
            raise ValueError(
                f"{visible} visible patches leave fewer than two targets of the "
                f"{grid[0] * grid[1]} on the grid; lower --visible"
            )
        student.head = projection_head(student.dim, head_dim).apply(init_xavier)
        self.student, self.teacher = student, freeze_copy(student)
        self.decoder = Decoder(student.dim, decoder_dim, decoder_depth, decoder_heads)
        self.grid, self.gap, self.visible, self.tau = grid, gap, visible, tau
        self.affinity_on = affinity_on

    def draw(self, batch, generator):
        """One step's masks on the CPU, int64: {"context": (batch, visible), "target": (batch, N -
        visible), "offset": (batch, rows, cols, 2)}, the last for `take_patches`, 0..gap-1."""
        rows, cols = self.grid
        order = torch.rand(batch, rows * cols, generator=generator).argsort(1)
        offset = torch.randint(0, max(self.gap, 1), (batch, rows, cols, 2), generator=generator)
        context, target = order.split([self.visible, rows * cols - self.visible], dim=1)
        return {"context": context, "target": target, "offset": offset}

    def patches(self, images, masks):
        return take_patches(images, self.student.patch_size, self.gap, masks["offset"])

    def encode(self, images, masks, index):
        """Student tokens (B, K, D) at any index (B, K), as `SpatialAffinity` compares them."""
        tokens = self.student(self.patches(images, masks), index)
        return self.student.head(tokens) if self.affinity_on == "head" else tokens

    @torch.no_grad()
    def target_tokens(self, images, masks):
        """The teacher sees the target patches only: (B, T, D) after its projection head."""
        return self.teacher.head(self.teacher(self.patches(images, masks), masks["target"]))

    def forward(self, images, masks):
        """images (B, C, H, W) with gaps -> loss, context tokens (B, K, D), their index (B, K)."""
        context, target = masks["context"], masks["target"]
        trunk = self.student.encode(self.patches(images, masks), context)
        tokens = self.student.head(trunk)
        predicted = self.decoder(tokens, context, target, self.grid)
        loss = info_nce(predicted, self.target_tokens(images, masks), self.tau)
        shown = tokens if self.affinity_on == "head" else trunk
        return loss, shown[:, -context.shape[1] :], context


# ---- reading and writing encoders -------------------------------------------------------------


def save_encoder(encoder, path, **meta):
    """Write a `ViT` (without projection head) to a safetensors file, atomically.

    meta: JSON-able facts that travel with the weights, such as bands, mean and std; `load_encoder`
    returns them as `encoder.meta`.
    """
    state = {k: v.contiguous() for k, v in encoder.state_dict().items() if k[:5] != "head."}
    write_tensors(path, state, {"config": encoder.config, "meta": meta})


def write_tensors(path, state, facts):
    """Write tensors by name and JSON-able facts to a safetensors file, atomically; the reverse of
    `read_tensors`."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    # as bytes: safetensors' own writer lets nobody but the owner read the file
    partial.write_bytes(save(state, metadata={"crossscale": json.dumps(facts)}))
    os.replace(partial, path)


RESAVE = (
    "python -c \"import torch; c = torch.load('{path}', map_location='cpu', weights_only=False); "
    "c = c.state_dict() if hasattr(c, 'state_dict') else c; "
    "torch.save({{k: v for k, v in c.items() if torch.is_tensor(v) or isinstance(v, dict) "
    "and all(map(torch.is_tensor, v.values()))}}, '{weights}')\""
)


def read_tensors(path):
    """All tensors of a .safetensors or torch file: (nested dict, crossscale facts or None).

    The facts of our exports are a dict with the dicts config and meta in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such encoder; give a run directory or a weights file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                facts = (file.metadata() or {}).get("crossscale")
                state = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
        if facts is None:
            return state, None
        try:
            facts = json.loads(facts)
            fits = isinstance(facts["config"], dict) and isinstance(facts["meta"], dict)
        except (ValueError, LookupError, TypeError, RecursionError):
            fits = False
        if not fits:
            raise ValueError(
                f"{path}: its crossscale metadata is no JSON object with the objects config and "
                "meta; export or fetch it again"
            )
        return state, facts
    try:
        return torch.load(path, map_location="cpu", weights_only=True), None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise ValueError(f"{path}: not a readable torch checkpoint; fetch it again") from None
        raise ValueError(
            f"{path}: holds more than tensors (a {found[1]}), and reading that could run code; if "
            f"you trust its source, re-save the weights alone: "
            + RESAVE.format(path=path, weights=path.with_name(path.stem + "-weights.pt"))
        ) from None
    except Exception as error:  # whatever a damaged or foreign file provokes, in one sentence
        reason = str(error).splitlines()[0] if str(error) else "it ends too soon"
        raise ValueError(f"{path}: not a readable torch checkpoint ({reason})") from None


def find_encoder(tree, path):
    """The ViT state dict in a checkpoint: (flat dict, where it was found)."""
    flat, stack = {}, [("", tree)]
    while stack:
        prefix, node = stack.pop()
        for key, value in node.items():
            if isinstance(value, dict):
                stack.append((f"{prefix}{key}.", value))
            elif torch.is_tensor(value):
                flat[f"{prefix}{key}"] = value
    ending = "blocks.0.attn.qkv.weight"
    found = [key[: -len(ending)] for key in flat if re.search(r"(^|\.)" + re.escape(ending), key)]
    # a checkpoint may hold several: I-JEPA's own evaluation reads the target encoder, Latent MIM's
    # and ours the student; ViTs trained by DINO the teacher
    order = [
        r"objective\.student\.",
        r"target_encoder\.(module\.)?",
        r"(state_dict\.)?(module\.)?encoder\.",
        r"teacher\..*",
        r"student\..*",
        r".*",
    ]
    for pattern in order:
        for prefix in sorted(found):
            if re.fullmatch(pattern, prefix):
                inside = [key for key in flat if key.startswith(prefix)]
                return {key[len(prefix) :]: flat[key] for key in inside}, prefix
    raise ValueError(
        f"{path}: no vision transformer found (no key ends in {ending}); "
        f"it holds {', '.join(sorted(flat)[:3]) or 'no tensors'} ..."
    )


def load_encoder(path, heads=None):
    """Read a pretrained encoder from a run directory or a weights file -> `ViT` in eval mode.

    Understands our exports and checkpoints, official I-JEPA and Latent MIM files, and timm, MAE and
    DINO ViT state dicts, as .safetensors or as torch files (`weights_only=True`: nothing in them is
    run). Width, depth, patch and bands are read off the weights; `heads` follows from the width for
    the published sizes. `encoder.meta` holds what the export says of its data, {} for other files.
    Prints what was recognised and what was left out. Raises FileNotFoundError or ValueError.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "encoder.safetensors"
    tree, facts = read_tensors(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds a {type(tree).__name__}, not a dict of weights")
    try:
        return parse_encoder(tree, facts, path, heads)
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ValueError) as e:
        if str(e).startswith(f"{path}:"):
            raise
        reason = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        raise ValueError(f"{path}: not the weights of a plain ViT ({reason})") from None


def parse_encoder(tree, facts, path, heads):
    """`load_encoder` for what `read_tensors` found."""
    state, found_at = find_encoder(tree, path)
    if facts is None and isinstance(tree.get("facts"), str):  # our ckpt.pt
        facts = json.loads(tree["facts"])
    notes = []

    # Latent MIM's names: embed.proj (D, row * col * channel), pos_embed.pos_embeds
    patches = state.pop("embed.proj.weight", None)
    if patches is not None:
        values = patches.shape[1]
        # 4 bands or 3 where the rest is a square, else the fewest that leave a square
        bands = next(
            c for c in (4, 3, *range(1, values + 1)) if values == c * math.isqrt(values // c) ** 2
        )
        side = math.isqrt(values // bands)
        state["patch_embed.proj.weight"] = rearrange(
            patches, "d (p q c) -> d c p q", p=side, q=side
        )
        state["patch_embed.proj.bias"] = state.pop("embed.proj.bias")
        notes.append("Latent MIM's flat patch weights")
    table = state.pop("pos_embed.pos_embeds", None)
    table = state.pop("pos_embed", None) if table is None else table

    # LayerScale multiplies a branch's output: the same as scaling its last linear map
    for key in [key for key in state if key.endswith((".ls1.gamma", ".ls2.gamma"))]:
        gamma = state.pop(key)
        last = key[: -len("ls1.gamma")] + ("attn.proj." if ".ls1." in key else "mlp.fc2.")
        state[last + "weight"] = state[last + "weight"] * gamma[:, None]
        state[last + "bias"] = state[last + "bias"] * gamma
        if "LayerScale folded in" not in notes:
            notes.append("LayerScale folded in")

    weight = state.get("patch_embed.proj.weight")
    if weight is None or weight.ndim != 4:
        raise ValueError(f"{path}: no patch embedding (patch_embed.proj.weight) beside the blocks")
    dim, bands, patch = weight.shape[:3]
    config = dict(
        in_channels=bands,
        patch_size=patch,
        dim=dim,
        depth=1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / dim
        if "blocks.0.mlp.fc1.weight" in state
        else 4.0,
        class_token="cls_token" in state,
    )
    if facts is not None:
        config = facts["config"]
    else:
        config["heads"] = heads or HEADS.get(dim)
        if config["heads"] is None:
            raise ValueError(f"{path}: width {dim} is no published size; give heads=")
    if table is not None:
        table = table.reshape(-1, dim).float()
        side = math.isqrt(len(table))
        grid = tuple(config.get("pos_grid") or (side, side))
        if config["class_token"] and len(table) == grid[0] * grid[1] + 1:
            state["cls_token"] = state["cls_token"] + table[0]  # its position, for good
            table = table[1:]
        if grid[0] * grid[1] != len(table):
            raise ValueError(f"{path}: a position table of {len(table)} rows is no square grid")
        for kind in ("ijepa", "latentmim"):
            if torch.allclose(position_table(grid, dim, kind), table, atol=1e-4):
                config["pos"] = kind
                notes.append(f"sine-cosine positions ({kind}) checked and dropped")
                break
        else:
            config["pos"], config["pos_grid"] = "learned", grid
            state["pos_embed"] = table[None]
            notes.append(f"learned positions of a {grid[0]} x {grid[1]} grid")
    elif facts is None:
        notes.append("no position table: I-JEPA's sine-cosine positions assumed")

    encoder = ViT(**config)
    wanted = encoder.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    wrong = sorted(k for k in wanted.keys() & state.keys() if wanted[k].shape != state[k].shape)
    extra = sorted(state.keys() - wanted.keys())
    # what would change the tokens; a head or a predictor beside the encoder would not
    blocking = [k for k in extra if re.match(r"blocks\.|norm_pre|.*(reg|dist|storage)\w*_token", k)]
    if missing or wrong or blocking:
        raise ValueError(
            f"{path}: another architecture than a plain ViT: "
            f"{len(missing)} weights missing, {len(wrong)} of another shape, {len(blocking)} "
            f"unknown (such as {(missing + wrong + blocking)[0]})"
        )
    broken = [key for key in wanted if not state[key].isfinite().all()]
    if broken:
        raise ValueError(f"{path}: {len(broken)} weights hold NaN or inf (such as {broken[0]})")
    encoder.load_state_dict({key: state[key].float() for key in wanted})
    encoder.meta = facts["meta"] if facts else {}
    left = sorted({key.split(".")[0] for key in extra})
    notes += [f"left out: {', '.join(left)}"] if left else []
    print(
        f"{path}: {'crossscale ' if facts else ''}ViT at {found_at or 'top level'}: "
        f"{encoder.in_channels} bands, patch {patch}, {dim} wide, {config['depth']} deep, "
        f"{config['heads']} heads" + "".join(f"; {note}" for note in notes)
    )
    return encoder.eval()


def fit_bands(encoder, bands):
    """The encoder for images of `bands`, a list of names such as ["B", "G", "R", "NIR"].

    Its own bands are those of `encoder.meta`, or R, G, B for 3-band weights without. Known bands
    keep their weights, in their new place; 3-band weights are inflated, every other band getting
    the mean of the three, and all scaled by 3 / len(bands), so that a patch which is equal in all
    bands gives the same token as before. Returns `encoder` itself where nothing changes, also where
    the number of bands fits and the names tell nothing. Raises ValueError if the number does not.
    """
    if encoder.in_channels not in (3, len(bands)):
        raise ValueError(
            f"the encoder reads {encoder.in_channels} bands, the data has {len(bands)} "
            f"({','.join(bands)}); only 3-band weights can be inflated"
        )
    own = encoder.meta.get("bands") or ["R", "G", "B"]
    same_count = encoder.in_channels == len(bands)
    if own == bands or (same_count and set(own) != set(bands)):
        return encoder
    weight = encoder.patch_embed.proj.weight.data
    kernels, mean = dict(zip(own, weight.unbind(1), strict=True)), weight.mean(1)
    weight = torch.stack([kernels.get(band, mean) for band in bands], dim=1)
    fitted = ViT(**{**encoder.config, "in_channels": len(bands)})
    state = {"patch_embed.proj.weight": weight * encoder.in_channels / len(bands)}
    fitted.load_state_dict({**encoder.state_dict(), **state})
    return fitted
