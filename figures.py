"""Pictures: true-colour composites of normalised chips and the principal components of tokens."""

import os

import torch
from einops import rearrange

from imagery.bands import meanings


def composite(images, bands):
    """An RGB picture of each chip: (B, C, H, W) any scale -> (B, H, W, 3) in 0..1, CPU.

    bands: names; R, G and B where all are there, however spelt, else the first three bands, or one
    as grey. Stretched between the 2nd and 98th percentile of all chips together.
    """
    # Sentinel-2 and Landsat 8 and 9 agree on B2, B3 and B4; of others the colours are off here
    bands = meanings(bands, sentinel=True)
    chosen = [bands.index(b) for b in "RGB"] if set("RGB") <= set(bands) else range(len(bands))[:3]
    picture = images.detach().float().cpu()[:, list(chosen)]
    if picture.shape[1] < 3:
        picture = picture[:, :1].expand(-1, 3, -1, -1)
    # per band: sensors differ in brightness from band to band
    flat = picture.transpose(0, 1).flatten(1)
    step = max(1, flat.shape[1] // 1_000_000)  # quantile takes 16 million values at most
    low, high = torch.quantile(flat[:, ::step], torch.tensor([0.02, 0.98]), dim=1).unbind()
    scale = (high - low).clamp_min(1e-6).view(3, 1, 1)
    return rearrange(((picture - low.view(3, 1, 1)) / scale).clamp(0, 1), "b c h w -> b h w c")


def token_colours(tokens, grid):
    """The first three principal components of tokens as colours 0..1: (B, N, D) -> (B, *grid, 3).

    The components are those of all images together, so one colour means one thing throughout.
    """
    x = tokens.detach().double().cpu().flatten(0, 1)
    x = x - x.mean(0)
    _, axes = torch.linalg.eigh(x.mT @ x)
    x = x @ axes[:, -3:].flip(1)
    low, high = torch.quantile(x, torch.tensor([0.02, 0.98], dtype=x.dtype), dim=0)
    colours = ((x - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)
    return colours.view(len(tokens), *grid, 3)


def save_figure(figure, path):
    """Write a matplotlib figure as PNG under a temporary name, then rename it."""
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=120, bbox_inches="tight")
    os.replace(partial, path)


def draw_tokens(path, pictures, tokens):
    """A row per chip: its pictures, then the tokens of student and teacher as PCA colours.

    pictures: {title: (images (B, C, H, W), band names)}. tokens: {title: (tokens (B, N, D), (rows,
    cols))}, None in place of tokens that there are none of.
    """
    from matplotlib.figure import Figure  # here, so that training does not wait for its import

    columns = {title: composite(*picture) for title, picture in pictures.items()}
    there = {title: pair for title, pair in tokens.items() if pair[0] is not None}
    columns |= {title: token_colours(*pair) for title, pair in there.items()}
    rows = len(next(iter(columns.values())))
    figure = Figure(figsize=(2.2 * len(columns), 2.2 * rows))
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (title, drawn) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title, fontsize=9)
        for axis, picture in zip(column, drawn, strict=True):
            axis.imshow(picture.numpy(), interpolation="nearest")
            axis.axis("off")
    save_figure(figure, path)
