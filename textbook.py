"""The pretraining step as a textbook has it, and the way to it: what bench.py compares with.

The same mathematics from the same weights as model.py and train.py, by the shortest road: the patch
embedding is a convolution of the whole image, whose tokens are gathered afterwards; every block
computes all of its tokens; target encoder and HR teacher are two EMA copies, updated tensor by
tensor; a Python loop finds the HR tokens of each MR token; the Gram matrices are eager float32; and
AdamW goes from tensor to tensor. Attention is PyTorch's fused one here, too.

B images, N tokens of width D, K of them context; `objective` is one of model.py.
"""

import copy
import itertools
import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from affinity import gram_loss
from model import info_nce
from vit import attend, position_table, take, take_patches


def mlp(module, x):
    return module.fc2(F.gelu(module.fc1(x)))


def run_blocks(blocks, x):
    for block in blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
        x = x + block.attn.proj(attend(q, k, v, block.attn.heads))
        x = x + mlp(block.mlp, block.norm2(x))
    return x


def encode(encoder, images, index=None):
    """Tokens of a `ViT`, its class token in front: (B, [1 +] N or K, D)."""
    position = encoder.position(encoder.grid(images), 1.0, images.device)
    x = encoder.patch_embed.proj(images).flatten(2).mT + position
    x = x if index is None else take(x, index)
    if encoder.class_token:
        x = torch.cat([encoder.cls_token.expand(len(x), -1, -1), x], dim=1)
    return encoder.norm(run_blocks(encoder.blocks, x))


def ijepa(self, teacher, images, masks):
    context, target, grid = masks["context"], masks["target"], self.student.grid(images)
    tokens = encode(self.student, images, context)
    with torch.no_grad():
        wanted = encode(teacher, images)
        wanted = take(F.layer_norm(wanted, wanted.shape[-1:]), target.flatten(1))
    head = self.predictor
    position = position_table(grid, head.mask_token.shape[-1], "ijepa", device=images.device)
    seen = head.embed(tokens) + position[context]
    asked = head.mask_token + position[target.flatten(0, 1)]
    x = torch.cat([repeat(seen, "b k d -> (b m) k d", m=target.shape[1]), asked], dim=1)
    x = head.proj(head.norm(run_blocks(head.blocks, x)))[:, context.shape[1] :]
    return F.smooth_l1_loss(x, wanted.view_as(x)), tokens


def latentmim(self, teacher, images, masks):
    context, target, head = masks["context"], masks["target"], self.decoder
    cut = take_patches(images, self.student.patch_size, self.gap, masks["offset"])
    tokens = self.student.head(encode(self.student, cut, context))
    with torch.no_grad():
        wanted = teacher.head(encode(teacher, cut, target))[:, 1:]
    position = position_table(
        self.grid, head.mask_token.shape[-1], "latentmim", device=images.device
    )
    seen, asked, memory = position[context], position[target], head.embed(tokens)
    near = torch.softmax(asked @ seen.mT / math.sqrt(seen.shape[-1]), dim=-1)
    x = head.mask_token + near @ memory[:, 1:].to(near.dtype) + asked
    x = torch.cat([head.cls_token.expand(len(x), -1, -1), x], dim=1)
    memory = torch.cat([memory[:, :1], memory[:, 1:] + seen], dim=1)
    for block in head.blocks:
        q, k, v = block.self_attn.qkv(block.norm1(x)).chunk(3, dim=-1)
        x = x + block.self_attn.proj(attend(q, k, v, block.self_attn.heads))
        k, v = block.cross_attn.kv_proj(block.norm2kv(memory)).chunk(2, dim=-1)
        q = block.cross_attn.q_proj(block.norm2q(x))
        x = x + block.cross_attn.proj(attend(q, k, v, block.cross_attn.heads))
        x = x + mlp(block.mlp, block.norm3(x))
    x = head.head(head.norm(x))[:, 1:]
    return info_nce(x, wanted, self.tau), tokens[:, 1:]


def mae(self, teacher, images, masks):
    context, target, p = masks["context"], masks["target"], self.student.patch_size
    tokens = encode(self.student, images, context)
    position = position_table(
        self.student.grid(images), self.mask_token.shape[-1], "ijepa", device=images.device
    )
    x = torch.cat([self.embed(tokens) + position[context], self.mask_token + position[target]], 1)
    x = self.proj(self.norm(run_blocks(self.blocks, x)))[:, context.shape[1] :]
    pixels = take(rearrange(images, "b c (i p) (j q) -> b (i j) (p q c)", p=p, q=p), target)
    mean, var = pixels.mean(-1, keepdim=True), pixels.var(-1, keepdim=True)
    return F.mse_loss(x, (pixels - mean) / (var + 1e-6).sqrt()), tokens


LOSSES = {"ijepa": ijepa, "latentmim": latentmim, "mae": mae}


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
    """An objective with two teachers of its own and AdamW, to take plain steps with.

    name: of `LOSSES`. groups: of AdamW. The objective's own teacher is the target encoder; its
    copy sees the HR images.
    """

    def __init__(self, name, objective, groups, **options):
        self.objective, self.loss = objective, LOSSES[name]
        self.teachers = [objective.teacher, copy.deepcopy(objective.teacher)]
        self.optimizer = torch.optim.AdamW(groups, foreach=False, fused=False, **options)

    def step(self, images, masks, hr=None, momentum=0.996):
        """Take a step, part by part: yields the name of each part once it is done, and the loss.
        hr: images of the same ground; None for the step without affinity."""
        objective, context = self.objective, masks["context"]
        loss, tokens = self.loss(objective, self.teachers[0], images, masks)
        yield "objective", loss
        if hr is not None:
            r, p = objective.ratio, objective.student.patch_size
            index = hr_tokens(context, objective.grid, r)
            if "offset" in masks:
                hr = take_patches(hr, r * p, r * objective.gap, r * masks["offset"])
            with torch.no_grad():
                seen = self.teachers[1].head(encode(self.teachers[1], hr, index))
            seen = seen[:, seen.shape[1] - index.shape[1] :]
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
