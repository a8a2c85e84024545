"""The vision transformer: position codes of the grid at hand, patches cut with gaps, and `ViT`.

Parameters carry the names of timm's VisionTransformer. Shapes: B images, C bands, N = rows * cols
tokens of width D, row-major; `grid` is (rows, cols).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

# name: (width, depth, heads), as published for ViT
SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


# ---- positions and masks ----------------------------------------------------------------------


def position_table(grid, dim, kind, spacing=1.0, device="cpu"):
    """Sine-cosine code of every token of a grid: (rows * cols, dim) float32.

    kind: "ijepa", integer coordinates 0..g-1, or "latentmim", i * g / (g - 1).
    spacing: distance of two tokens in units of the grid whose coordinates are wanted. 1 numbers
    this grid's own tokens; 1/r places the tokens of an r times finer grid at their centres on the
    coarse one, (q + 0.5)/r - 0.5 ("ground" positions).
    The first half of the channels encodes the column, the second the row, each as [sin, cos] with
    frequencies 10000^(-k / (dim/4)). Raises ValueError if dim is no multiple of 4.

    Computed where it is used, from nothing but the shape: there is no table to copy to a device,
    and none that a tracer could leave its own tensors in.
    """
    if dim % 4:
        raise ValueError(f"a sine-cosine position code needs a width divisible by 4, found {dim}")
    channel = torch.arange(dim // 4, dtype=torch.float64, device=device)
    codes = []
    for count in grid:
        place = torch.arange(count, dtype=torch.float64, device=device)
        coordinate = (place + 0.5) * spacing - 0.5
        if kind == "latentmim":
            coarse = count * spacing
            coordinate = coordinate * coarse / max(coarse - 1, 1)
        angle = coordinate[:, None] * 10000.0 ** (-channel / (dim // 4))
        codes.append(torch.cat([angle.sin(), angle.cos()], dim=1).float())
    rows, cols = grid
    return torch.cat([codes[1].repeat(rows, 1), codes[0].repeat_interleave(cols, dim=0)], dim=1)


def take(tokens, index):
    """Tokens (B, N, D) at index (B, K) int64 -> (B, K, D)."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


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
    top = torch.arange(rows, device=device)[:, None] * cell + offset[..., 0]  # (B, rows, cols)
    left = torch.arange(cols, device=device) * cell + offset[..., 1]
    image = torch.arange(b, device=device)[:, None, None]
    windows = images.unfold(2, patch, 1).unfold(3, patch, 1)  # a view: a patch at every pixel
    patches = windows[image, :, top, left]  # (B, rows, cols, C, patch, patch)
    return rearrange(patches, "b i j c p q -> b c (i p) (j q)")


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


def lean(function, x):
    """function(x), a linear map of something cheap, which is computed again in the backward pass
    instead of kept. The map is not: recomputation ends where all that the gradient needs is there.
    """
    if torch.compiler.is_compiling() or not x.requires_grad:  # a compiler decides by itself
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


def attend(q, k, v, heads):
    """Attention of queries (B, N, D) to keys and values (B, M, D) -> (B, N, D)."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise ValueError(f"a width of {dim} does not divide into {heads} attention heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, last=0):
        """Tokens (B, N, D), each attending to all -> (B, N, D), or the `last` of them alone."""
        if last:
            parts = [p.tensor_split([x.shape[2]]) for p in (self.qkv.weight, self.qkv.bias)]
            of_query, of_rest = zip(*parts, strict=True)
            q, kv = F.linear(x[:, -last:], *of_query), F.linear(x, *of_rest)
            return self.proj(attend(q, *kv.chunk(2, dim=-1), self.heads))
        return self.proj(attend(*self.qkv(x).chunk(3, dim=-1), self.heads))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        # a quarter of what a block would keep for its backward pass is the GELU of this
        return lean(lambda hidden: self.fc2(F.gelu(hidden)), self.fc1(x))


class Block(nn.Module):
    def __init__(self, dim, heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio + 1e-6))  # a ratio of two widths may be a bit low

    def forward(self, x, last=0):
        """Tokens (B, N, D) -> (B, N, D), or the `last` of them alone, all that the caller reads."""
        x = x[:, -last:] + self.attn(self.norm1(x), last)
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A plain vision transformer; parameters carry the names of timm's VisionTransformer.

    in_channels: bands. patch_size: pixels. dim: width, a multiple of `heads`.
    class_token: one more token, which `forward` drops and `encode` keeps in front.
    pos: "ijepa" or "latentmim" (`position_table` for the grid at hand), or "learned" with
    pos_grid = (rows, cols) of the stored table, resized to the grid at hand (bicubic).
    """

    def __init__(
        self, in_channels=4, patch_size=14, dim=384, depth=12, heads=6, mlp_ratio=4.0,
        class_token=False, pos="ijepa", pos_grid=None,
    ):  # fmt: skip
        given = locals()
        super().__init__()
        if pos not in ("ijepa", "latentmim", "learned"):
            raise ValueError(f"pos is {pos!r}; choose ijepa, latentmim or learned")
        self.config = {k: v for k, v in given.items() if k not in ("self", "__class__")}
        self.in_channels, self.patch_size, self.dim = in_channels, patch_size, dim
        self.class_token, self.pos, self.meta = class_token, pos, {}
        self.checkpointed = False  # whether blocks are computed again in the backward pass
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
            if self.checkpointed and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
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
