"""The self-supervised objectives: I-JEPA, Latent MIM, MAE. (Their encoder is `ViT`, vit.py.)

Reading order: `Objective`, what train.py asks of every objective; then one class each: `IJEPA`
(arXiv 2301.08243), `LatentMIM` (arXiv 2407.15837), `MAE` (arXiv 2111.06377). A fourth one is a
class and an entry in `OBJECTIVES`.

An objective owns a `student` and its EMA `teacher`. `draw` makes all of a step's random choices on
the CPU, `forward(images, masks)` is pure: no random number, no EMA, no device sync. Shapes: B
images, C bands, N = rows * cols tokens of width D, row-major; `grid` is (rows, cols).
"""

import copy
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat

from vit import (  # noqa: F401, all of these are names of this file too
    SIZES,
    Attention,
    Block,
    Mlp,
    ViT,
    attend,
    init_normal,
    init_xavier,
    position_table,
    take,
    take_patches,
    vit,
)

# ---- what train.py asks of an objective --------------------------------------------------------


class Plan(NamedTuple):
    """The ends of the schedules of a run: rates, weight decays and momentum, warm-up in steps."""

    lr: float
    start_lr: float
    final_lr: float
    warmup: int
    weight_decay: float
    final_weight_decay: float
    momentum: float


class Rates(NamedTuple):
    """What a step is taken with."""

    lr: float
    weight_decay: float
    momentum: float


def linear(step, total, start, end):
    return start + (end - start) * step / total


def cosine(step, total, start, end):
    """Half a cosine from start (step 0) to end (step total)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / total))


def warmup_cosine(step, total, warmup, start, peak, end):
    """Linear from start to peak over `warmup` steps, then half a cosine to end."""
    if step < warmup:
        return linear(step, warmup, start, peak)
    return cosine(step - warmup, max(total - warmup, 1), peak, end)


class Objective(nn.Module):
    """A self-supervised objective: a student, its EMA teacher, and all that is its own.

    student: `ViT`. grid: (rows, cols) of its tokens. ratio: HR tokens per MR token side.

    A subclass states `encoder` (arguments of its `ViT`), `defaults` (the paper's values of flags
    that all objectives share; start_lr and final_lr as shares of lr, lr per image of the global
    batch where it is `lr_per_image`), `flags` (its own, {name: help, or (help, choices or least
    value)}, keywords of its constructor, whose defaults are theirs), and three methods:

        draw(batch, generator)          all random choices of a step for the global batch, on the
                                        CPU: {name: tensor (batch, ...)}; "context" (batch, K)
                                        int64, the ids that the student sees, is among them
        target_tokens(images, masks)    what is predicted, (B, ..., D'), for the log
        forward(images, masks)          loss, the student's tokens (B, K, D), their index (B, K)

    with images (B, C, H, W) and the masks of these images. The methods below are right where the
    student sees the image as it is.
    """

    encoder = {}
    defaults = {}
    flags = {}
    small = ""  # flags of a model that a CPU trains in minutes
    affinity_flags = ()  # those of `flags` that matter to the affinity alone

    def __init__(self, student, grid, ratio=2):
        super().__init__()
        self.student, self.grid, self.ratio = student, grid, ratio
        self.teacher = copy.deepcopy(student).requires_grad_(False)

    def encode(self, images, masks, index):
        """Student tokens (B, K, D) at any index (B, K), as the affinity compares them."""
        return self.student(images, index)

    def hr_tokens(self, images, index=None, spacing=1.0):
        """The EMA teacher's tokens of HR images, as the affinity compares them."""
        return self.teacher(images, index, spacing)

    def hr_side(self, patch):
        """Pixels a side of the HR image on the ground of an MR image, for a teacher of a patch."""
        return self.ratio * self.grid[0] * patch

    def views(self, hr, masks, patch):
        """HR images (P, C, side, side) as a teacher of a patch sees them, a patch per HR token."""
        return hr

    def decays(self, name, parameter):
        """Does weight decay act on this parameter?"""
        return parameter.ndim != 1 and "bias" not in name

    def rates(self, step, total, plan):
        """`Rates` of step 0..total-1: a pure function, so that resuming needs no state."""
        return Rates(
            warmup_cosine(step, total, plan.warmup, plan.start_lr, plan.lr, plan.final_lr),
            cosine(step, total, plan.weight_decay, plan.final_weight_decay),
            linear(step, total, plan.momentum, 1.0),
        )


@torch.no_grad()
def ema_update(teacher, student, momentum, bad=None):
    """teacher <- momentum * teacher + (1 - momentum) * student, parameter by parameter. bad: a 0-d
    tensor, above 0 where the teacher is to stay as it is."""
    ours, theirs = list(teacher.parameters()), list(student.parameters())
    if bad is None or bad.device.type == "cpu":  # one pass, no memory for the change
        torch._foreach_lerp_(ours, theirs, 0.0 if bad is not None and bad > 0 else 1 - momentum)
    else:  # the host would wait for a lerp's weight
        change = torch._foreach_sub(theirs, ours)
        torch._foreach_mul_(change, (1 - momentum) * (bad == 0))
        torch._foreach_add_(ours, change)


def regularise(tokens):
    """VICReg's variance and covariance terms, which keep tokens from saying all the same.

    tokens: (B, K, D), of one step on one device: the terms are not additive over micro-batches.
    Returns mean_d max(0, 1 - sqrt(var_d + 1e-4)) + sum_{d != e} cov_de^2 / (25 D), float32, with
    var and cov over the n = B K tokens (n - 1 below). Source: VICReg (arXiv 2105.04906), its
    weights 25 and 1 scaled; on I-JEPA: C-JEPA (arXiv 2410.19560).
    """
    with torch.autocast(tokens.device.type, enabled=False):
        z = tokens.flatten(0, 1).float()
        z = z - z.mean(0)
        covariance = z.mT @ z / max(len(z) - 1, 1)
        variance = covariance.diagonal()
        spread = F.relu(1 - (variance + 1e-4).sqrt()).mean()
        apart = covariance.square().sum() - variance.square().sum()
        return spread + apart / (25 * z.shape[1])


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

    h and w are drawn once, from `low` to `high` of the grid's sides, positions per image; 2 at
    least where the grid has them, or there would be no relation to compare.
    Source: arXiv 2601.12964, `block` affinity. (Published code draws a size per image and cuts all
    to the smallest, which leaves the top rows of each rectangle.)
    """
    least = [max(min(2, g), int(low * g)) for g in grid]
    most = [max(a, int(high * g)) for a, g in zip(least, grid, strict=True)]
    size = tuple(
        int(torch.randint(a, b + 1, (), generator=generator))
        for a, b in zip(least, most, strict=True)
    )
    return block_index(*draw_blocks(batch, 1, size, grid, generator), size, grid).flatten(1)


SIZE_STEPS = 256  # areas and aspects of blocks are drawn in so many steps: all can be looked at


def context_mask(whole, target, tokens):
    """Which of N tokens lie in the context block and in no target: (B, W) and (B, M, T) ids ->
    (B, N) bool."""
    mask = torch.zeros(len(whole), tokens, dtype=torch.bool).scatter_(1, whole, True)
    return mask.scatter_(1, target.flatten(1), False)


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
        *before, last = self.blocks
        for block in before:
            x = block(x)
        x = last(x, length)  # nobody reads the context after it
        return rearrange(self.proj(self.norm(x)), "(b m) t d -> b m t d", m=blocks)


class IJEPA(Objective):
    """Predict the teacher's tokens of hidden blocks from a context block (arXiv 2301.08243).

    Scales are shares of the grid's area. context_cut: which ids go when the contexts are cut to the
    smallest of the global batch, "random", or "last" as published (which drops the bottom of the
    image). Raises ValueError where a single target block could leave `min_context` tokens or fewer.
    """

    defaults = dict(
        patch=14, mr_size=224, crop_scale=[0.3, 1.0], global_batch=1024,  # 128 on each of 8 GPUs
        lr=1e-3, start_lr=0.2, final_lr=1e-3, warmup_epochs=40, weight_decay=0.04,
        final_weight_decay=0.4, beta2=0.999, momentum=0.996,
    )  # fmt: skip
    flags = dict(
        predictor_dim="width of the predictor; paper: 384",
        predictor_depth="its blocks; paper: 12",
        targets="target blocks an image; paper: 4",
        target_scale="share of the grid; paper: 0.15 0.2",
        context_scale="share of the grid; paper: 0.85 1",
        context_cut=(
            "ids that go when contexts are cut to one length; paper: last",
            ("random", "last"),
        ),
    )
    small = (
        "--mr-size 32 --targets 3 --target-scale 0.1 0.15 --predictor-dim 48 --predictor-depth 1"
    )
    min_context = 10
    target_aspect, context_aspect = (0.75, 1.5), (1.0, 1.0)

    def __init__(
        self, student, grid, predictor_dim=384, predictor_depth=12, targets=4,
        target_scale=(0.15, 0.2), context_scale=(0.85, 1.0), context_cut="random", ratio=2,
    ):  # fmt: skip
        super().__init__(student, grid, ratio)
        heads = student.config["heads"]
        self.predictor = Predictor(student.dim, predictor_dim, predictor_depth, heads)
        self.targets, self.context_cut = targets, context_cut
        self.target_scale, self.context_scale = target_scale, context_scale
        # every size that can be drawn: with a single block, too many tokens must be left
        steps = torch.linspace(0, 1, SIZE_STEPS + 1, dtype=torch.float64)
        u = torch.cartesian_prod(steps, steps)
        block = self.block_sizes(u, target_scale, self.target_aspect).unique(dim=0)
        whole = self.block_sizes(u, context_scale, self.context_aspect).unique(dim=0)[:, None]
        if (whole.prod(-1) - block.minimum(whole).prod(-1)).min() <= self.min_context:
            raise ValueError(
                f"I-JEPA masks: a single target of scale {target_scale} can leave "
                f"{self.min_context} or fewer of the context's tokens (scale {context_scale}) on a "
                f"grid of {grid[0]} x {grid[1]}; lower --target-scale, or take a larger grid"
            )

    def block_sizes(self, u, scale, aspect):
        """(rows, cols) of blocks, area and aspect by u (..., 2) in 0..1: (..., 2) int64."""
        u = (u * SIZE_STEPS).round() / SIZE_STEPS
        area = (scale[0] + u[..., 0] * (scale[1] - scale[0])) * self.grid[0] * self.grid[1]
        ratio = aspect[0] + u[..., 1] * (aspect[1] - aspect[0])
        sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=-1)
        return sides.round().clamp(min=1).minimum(torch.tensor(self.grid)).long()

    def draw(self, batch, generator):
        """One step's masks: {"context": (batch, K), "target": (batch, targets, T)} int64, CPU.

        Sizes are drawn once, positions per image; every context is cut to the smallest, so call
        this with the *global* batch and slice. An image whose targets leave `min_context` context
        tokens or fewer is drawn again, up to 20 times; then the draw with most context is kept
        and targets give way, one after the other, to copies of another, until enough is left.
        """
        tokens = self.grid[0] * self.grid[1]
        u = torch.rand(4, generator=generator, dtype=torch.float64).view(2, 2)
        target_size = tuple(self.block_sizes(u[0], self.target_scale, self.target_aspect).tolist())
        whole_size = tuple(self.block_sizes(u[1], self.context_scale, self.context_aspect).tolist())
        target = torch.zeros(batch, self.targets, math.prod(target_size), dtype=torch.int64)
        whole = torch.zeros(batch, math.prod(whole_size), dtype=torch.int64)
        kept = torch.zeros(batch, tokens, dtype=torch.bool)
        count = torch.full((batch,), -1)  # tokens kept; none drawn yet
        for _ in range(20):
            poor = count <= self.min_context
            if not poor.any():
                break
            corner = draw_blocks(batch, self.targets, target_size, self.grid, generator)
            new_target = block_index(*corner, target_size, self.grid)
            corner = draw_blocks(batch, 1, whole_size, self.grid, generator)
            new_whole = block_index(*corner, whole_size, self.grid).flatten(1)
            new_kept = context_mask(new_whole, new_target, tokens)
            better = poor & (new_kept.sum(1) > count)
            target[better], whole[better] = new_target[better], new_whole[better]
            kept[better], count = new_kept[better], count.maximum(new_kept.sum(1) * poor)
        for image in (count <= self.min_context).nonzero()[:, 0].tolist():
            self.thin_out(target[image], whole[image], kept[image])
        order = torch.arange(tokens).expand(batch, -1)
        if self.context_cut == "random":
            order = torch.rand(batch, tokens, generator=generator).argsort(1)
        # ids that are kept first, in `order`, then the batch minimum of them, row-major again
        chosen = order.gather(1, (~kept).gather(1, order).int().argsort(dim=1, stable=True))
        context = chosen[:, : int(kept.sum(1).min())].sort(dim=1).values
        return {"context": context, "target": target}

    def thin_out(self, target, whole, kept):
        """Replace targets of one image, in place, by copies of another until context is left: the
        one whose removal frees most goes first. target (M, T), whole (W,) ids, kept (N,) bool."""
        blocks = list(range(len(target)))
        while kept.sum() <= self.min_context and len(blocks) > 1:
            without = [[b for b in blocks if b != gone] for gone in blocks]
            masks = [context_mask(whole[None], target[None, b], len(kept))[0] for b in without]
            kept[:], blocks = max(zip(masks, without, strict=True), key=lambda m: int(m[0].sum()))
        gone = [k for k in range(len(target)) if k not in blocks]
        target[gone] = target[blocks[0]].clone()

    @torch.no_grad()
    def target_tokens(self, images, masks):
        """Teacher tokens of the whole image, LayerNorm without affine, at the targets' ids."""
        tokens = self.teacher(images)
        tokens = F.layer_norm(tokens.float(), tokens.shape[-1:])
        target = masks["target"]
        return take(tokens, target.flatten(1)).unflatten(1, target.shape[1:])

    def forward(self, images, masks):
        grid = self.student.grid(images)
        tokens = self.student(images, masks["context"])
        predicted = self.predictor(tokens, masks["context"], masks["target"], grid)
        loss = F.smooth_l1_loss(predicted.float(), self.target_tokens(images, masks))
        return loss, tokens, masks["context"]

    def rates(self, step, total, plan):
        # as published: lr and weight decay count steps from 1, the momentum from 0
        momentum = super().rates(step, total, plan).momentum
        return super().rates(step + 1, total, plan)._replace(momentum=momentum)


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


class CrossAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.kv_proj = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, memory):
        k, v = self.kv_proj(memory).chunk(2, dim=-1)
        return self.proj(attend(self.q_proj(x), k, v, self.heads))


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


class LatentMIM(Objective):
    """Predict the teacher's tokens of hidden patches, told apart by InfoNCE (arXiv 2407.15837).

    The student gets a projection `head` of its own; the teacher has one too. gap: pixels between
    patches, so images are rows * (patch + gap) high. visible: patches that the student sees.
    affinity_on: which tokens `forward` returns, the projection "head"'s (paper) or the "trunk"'s.
    gap_offset: the HR patches of an MR patch lie on its ground ("same"), or are drawn apart
    ("paper", as published).
    """

    encoder = dict(class_token=True, pos="latentmim")
    defaults = dict(
        patch=16, mr_size=280, crop_scale=[0.2, 1.0], global_batch=512,  # 14 cells of 16 + 4 px
        lr_per_image=1.5e-4 / 256, start_lr=0.25, final_lr=0.25, warmup_epochs=30,
        weight_decay=0.05, final_weight_decay=0.05, beta2=0.95, momentum=0.99,
    )  # fmt: skip
    flags = dict(
        gap=("pixels between MR patches; paper: 4", 0),
        visible="patches seen; paper: 20",
        head_dim="width of the projection; paper: 4096",
        decoder_dim="width of the decoder; paper: 512",
        decoder_depth="its blocks; paper: 3",
        decoder_heads="its attention heads; paper: 16",
        tau="temperature of InfoNCE; paper: 0.2",
        affinity_on=("tokens that the affinity compares; paper: head", ("head", "trunk")),
        gap_offset=(
            "HR patches on the ground of their MR patch, or drawn apart; paper: paper",
            ("same", "paper"),
        ),
    )
    small = (
        "--mr-size 40 --gap 1 --visible 20 --head-dim 256 --decoder-dim 96 --decoder-depth 1 "
        "--decoder-heads 4"
    )
    affinity_flags = ("affinity_on", "gap_offset")

    def __init__(
        self, student, grid, gap=4, visible=20, head_dim=4096, decoder_dim=512, decoder_depth=3,
        decoder_heads=16, tau=0.2, affinity_on="head", gap_offset="same", ratio=2,
    ):  # fmt: skip
        if not 0 < visible < grid[0] * grid[1] - 1:
            raise ValueError(
                f"{visible} visible patches leave fewer than two targets of the "
                f"{grid[0] * grid[1]} on the grid; lower --visible"
            )
        student.head = projection_head(student.dim, head_dim).apply(init_xavier)
        super().__init__(student, grid, ratio)
        self.decoder = Decoder(student.dim, decoder_dim, decoder_depth, decoder_heads)
        self.gap, self.visible, self.tau = gap, visible, tau
        self.affinity_on, self.gap_offset = affinity_on, gap_offset

    def draw(self, batch, generator):
        """One step's masks on the CPU, int64: {"context": (batch, visible), "target": (batch, N -
        visible), "offset": (batch, rows, cols, 2)}, the last for `take_patches`, 0..gap-1; and,
        for gap_offset "paper", "hr_offset" of the ratio times finer cells."""
        rows, cols = self.grid
        order = torch.rand(batch, rows * cols, generator=generator).argsort(1)
        context, target = order.split([self.visible, rows * cols - self.visible], dim=1)
        masks = {"context": context, "target": target}
        cells = {"offset": 1} | ({"hr_offset": self.ratio} if self.gap_offset == "paper" else {})
        for name, r in cells.items():
            shape = (batch, r * rows, r * cols, 2)
            masks[name] = torch.randint(0, max(self.gap, 1), shape, generator=generator)
        return masks

    def patches(self, images, masks):
        return take_patches(images, self.student.patch_size, self.gap, masks["offset"])

    def encode(self, images, masks, index):
        tokens = self.student(self.patches(images, masks), index)
        return self.student.head(tokens) if self.affinity_on == "head" else tokens

    def hr_tokens(self, images, index=None, spacing=1.0):
        tokens = self.teacher(images, index, spacing)
        return self.teacher.head(tokens) if self.affinity_on == "head" else tokens

    def hr_side(self, patch):
        # gaps included; `views` cuts the patches and fits them to the teacher's
        return self.ratio * self.grid[0] * (self.student.patch_size + self.gap)

    def views(self, hr, masks, patch):
        p, r = self.student.patch_size, self.ratio
        if self.gap_offset == "paper":
            hr = take_patches(hr, p, self.gap, masks["hr_offset"])
        else:  # the r * r HR patches of an MR patch lie on its ground
            hr = take_patches(hr, r * p, r * self.gap, r * masks["offset"])
        if patch == p:
            return hr
        # each r p patch by itself: what touches it in the picture does not on the ground
        rows, cols = self.grid
        cells = rearrange(hr, "b c (i p) (j q) -> (b i j) c p q", i=rows, j=cols)
        cells = F.interpolate(cells, (r * patch, r * patch), mode="bicubic", antialias=True)
        return rearrange(cells, "(b i j) c p q -> b c (i p) (j q)", i=rows, j=cols)

    @torch.no_grad()
    def target_tokens(self, images, masks):
        """The teacher sees the target patches only: (B, T, D) after its projection head."""
        return self.teacher.head(self.teacher(self.patches(images, masks), masks["target"]))

    def forward(self, images, masks):
        context, target = masks["context"], masks["target"]
        trunk = self.student.encode(self.patches(images, masks), context)
        tokens = self.student.head(trunk)
        predicted = self.decoder(tokens, context, target, self.grid)
        loss = info_nce(predicted, self.target_tokens(images, masks), self.tau)
        shown = tokens if self.affinity_on == "head" else trunk
        return loss, shown[:, -context.shape[1] :], context

    def decays(self, name, parameter):
        return not any(word in name for word in ("bias", "norm", "embed"))

    def rates(self, step, total, plan):
        momentum = cosine(step, total, plan.momentum, 1.0)
        return super().rates(step, total, plan)._replace(momentum=momentum)


# ---- MAE ----------------------------------------------------------------------------------------


class MAE(Objective):
    """Predict the pixels of hidden patches, each normalised by itself (arXiv 2111.06377).

    mask_share: share of the patches that are hidden. The teacher, an EMA of the student, takes no
    part in the loss: it is there for the affinity. Not in the paper; it shows that the affinity is
    an add-on.
    """

    defaults = dict(
        patch=14, mr_size=224, crop_scale=[0.2, 1.0], global_batch=1024,
        lr_per_image=1.5e-4 / 256, start_lr=0.0, final_lr=0.0, warmup_epochs=30,  # its 40 of 400
        weight_decay=0.05, final_weight_decay=0.05, beta2=0.95, momentum=0.996,
    )  # fmt: skip
    flags = dict(
        mask_share="share of the patches that are hidden; its paper: 0.75",
        decoder_dim="width of the decoder; its paper: 512",
        decoder_depth="its blocks; its paper: 8",
        decoder_heads="its attention heads; its paper: 16",
    )
    small = "--mr-size 32 --decoder-dim 96 --decoder-depth 2 --decoder-heads 4"

    def __init__(
        self, student, grid, mask_share=0.75, decoder_dim=512, decoder_depth=8, decoder_heads=16,
        ratio=2,
    ):  # fmt: skip
        super().__init__(student, grid, ratio)
        self.visible = round((1 - mask_share) * grid[0] * grid[1])
        if not 0 < self.visible < grid[0] * grid[1]:
            raise ValueError(
                f"--mask-share {mask_share} leaves {self.visible} of {grid[0] * grid[1]} patches "
                "visible; there must be visible and hidden ones"
            )
        position_table((1, 1), decoder_dim, "ijepa")  # as in `ViT`
        self.embed = nn.Linear(student.dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_dim) * 0.02)
        self.blocks = nn.ModuleList(Block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.proj = nn.Linear(decoder_dim, student.patch_size**2 * student.in_channels)
        for part in (self.embed, self.blocks, self.proj):
            part.apply(init_xavier)

    def draw(self, batch, generator):
        """One step's masks: {"context": (batch, K), "target": (batch, N - K)} int64, CPU."""
        order = torch.rand(batch, self.grid[0] * self.grid[1], generator=generator).argsort(1)
        return {"context": order[:, : self.visible], "target": order[:, self.visible :]}

    def target_tokens(self, images, masks):
        """Pixels of the hidden patches over all bands, less their mean, over their deviation."""
        p = self.student.patch_size
        pixels = rearrange(images, "b c (i p) (j q) -> b (i j) (p q c)", p=p, q=p)
        pixels = take(pixels, masks["target"])
        mean, var = pixels.mean(-1, keepdim=True), pixels.var(-1, keepdim=True)
        return (pixels - mean) / (var + 1e-6).sqrt()

    def forward(self, images, masks):
        context, target = masks["context"], masks["target"]
        tokens = self.student(images, context)
        width = self.mask_token.shape[-1]
        position = position_table(self.student.grid(images), width, "ijepa", device=images.device)
        seen, asked = self.embed(tokens) + position[context], self.mask_token + position[target]
        x = torch.cat([seen, asked], dim=1)
        *before, last = self.blocks
        for block in before:
            x = block(x)
        x = last(x, target.shape[1])  # nobody reads the context after it
        predicted = self.proj(self.norm(x))
        loss = F.mse_loss(predicted.float(), self.target_tokens(images, masks))
        return loss, tokens, context


OBJECTIVES = {"ijepa": IJEPA, "latentmim": LatentMIM, "mae": MAE}


def __getattr__(name):
    if name == "load_encoder":  # its room is weights.py, which builds on this file
        from weights import load_encoder

        return load_encoder
    raise AttributeError(f"module 'model' has no attribute {name!r}")
