"""The pretraining step as a textbook has it, and the way to it: what bench.py compares with.

The same mathematics from the same weights as model.py and train.py, by the shortest road: the patch
embedding is a convolution of the whole image, whose tokens are gathered afterwards; every block
computes all of its tokens and keeps all that its gradient needs; target encoder and HR teacher are
two EMA copies, updated tensor by tensor; a Python loop finds the HR tokens of each MR token; the
Gram matrices are eager float32; and AdamW goes from tensor to tensor. Attention is PyTorch's fused
one here, too.
"""

import copy
import itertools
from functools import partial

import torch
import torch.nn.functional as F

from affinity import gram_loss
from vit import Block, Mlp, ViT, take, take_patches


def embed(encoder, images, index=None, spacing=1.0):
    """`ViT.embed`: all patches first, then those that are asked for."""
    position = encoder.position(encoder.grid(images), spacing, images.device)
    tokens = encoder.patch_embed.proj(images).flatten(2).mT + position
    tokens = tokens if index is None else take(tokens, index)
    if encoder.class_token:
        tokens = torch.cat([encoder.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
    return tokens


def run_block(block, x, last=0):
    """`Block`: all tokens first, then those that are asked for."""
    return Block.forward(block, x)[:, -last:]


def run_mlp(mlp, x):
    """`Mlp`, which keeps what it has computed."""
    return mlp.fc2(F.gelu(mlp.fc1(x)))


def make_plain(module):
    """Have all blocks and encoders of a module go by the functions above; a copy needs its own."""
    for part in module.modules():
        if isinstance(part, ViT):
            part.embed = partial(embed, part)
        elif isinstance(part, (Block, Mlp)):
            part.forward = partial(run_block if isinstance(part, Block) else run_mlp, part)


def hr_tokens(context, grid, ratio):
    """The ids of the HR tokens on the ground of each MR token: (B, K * ratio**2) int64."""
    index = []
    for image in context:
        for token in image:
            row, col = int(token) // grid[1], int(token) % grid[1]
            for i in range(ratio):
                for j in range(ratio):
                    index.append((ratio * row + i) * ratio * grid[1] + ratio * col + j)
    return torch.tensor(index, device=context.device).view(len(context), -1)


class Textbook:
    """An objective with two teachers of its own and AdamW, to take plain steps with; it stays
    plain. groups: of AdamW. The objective's own teacher is the target encoder, its copy sees the HR
    images."""

    def __init__(self, objective, groups, **options):
        self.objective = objective
        self.teachers = [objective.teacher, copy.deepcopy(objective.teacher)]
        make_plain(objective)
        make_plain(self.teachers[1])
        self.optimizer = torch.optim.AdamW(groups, foreach=False, fused=False, **options)

    def step(self, images, masks, hr=None, momentum=0.996):
        """Take a step, part by part: yields the name of each part once it is done, and the loss.
        hr: images of the same ground; None for the step without affinity."""
        objective, teacher = self.objective, self.teachers[1]
        loss, tokens, context = objective(images, masks)
        yield "objective", loss
        if hr is not None:
            r, p = objective.ratio, objective.student.patch_size
            index = hr_tokens(context, objective.grid, r)
            if "offset" in masks:
                hr = take_patches(hr, r * p, r * objective.gap, r * masks["offset"])
            with torch.no_grad():
                seen = teacher.head(teacher(hr, index))
            loss = loss + gram_loss(tokens, seen, backend="eager")
            yield "affinity", loss
        loss.backward()
        yield "backward", loss
        self.optimizer.step()
        self.optimizer.zero_grad()
        yield "optimizer", loss
        with torch.no_grad():
            for teacher in self.teachers:
                weights = zip(teacher.parameters(), objective.student.parameters(), strict=True)
                for ours, theirs in weights:
                    ours.mul_(momentum).add_(theirs, alpha=1 - momentum)
        yield "ema", loss


def plain_pairs(store, ids, crops, size, items):
    """The pairs of a batch for a DataLoader: chip by chip cropped to whole pixels and resized, as
    torchvision's RandomResizedCrop does it, then normalised.

    store: `data.Store`. ids: (n,) its chips. crops: (n, 4) of `data.draw_crops`. size: pixels a
    side of the MR images, the HR ones have twice as many. items: those of the n that are wanted.
    Returns [mr, hr], (items, C, side, side) each.
    """
    views = {"mr": [], "hr": []}
    for item, (sensor, images) in itertools.product(items, views.items()):
        image = store.batch(ids[item : item + 1], {sensor})[sensor].float()
        edges = zip(crops[item], image.shape[-2:] * 2, strict=True)
        top, left, height, width = (round(share * side) for share, side in edges)
        image = image[..., top : top + max(height, 1), left : left + max(width, 1)]
        side = size if sensor == "mr" else 2 * size
        image = F.interpolate(image, (side, side), mode="bicubic", antialias=True)[0]
        mean, std = (torch.tensor(store.meta[k][sensor])[:, None, None] for k in ("mean", "std"))
        images.append((image - mean) / std)
    return [torch.stack(images) for images in views.values()]
