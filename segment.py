"""A segmentation model: an encoder with a head that turns its tokens into class logits.

Reading order: `encode`, the tokens of images; `UperNet` and `Segmenter`; `save_segmenter` and
`load_segmenter`; the loss and what else training asks for; `judge` and `mean_iou`, how a task is
scored; `probe`, which judges an encoder without a training loop. Shapes: B images of C bands, g x g
tokens of width D, row-major.
"""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

from imagery.bands import IGNORE
from tiles import batches, chunks
from weights import parse_encoder, read_tensors, write_tensors

HEADS = ("linear", "mlp", "upernet")


# ---- tokens and heads -------------------------------------------------------------------------


def mixed_precision(device, dtype=None):
    """Autocast to dtype; unless told, to bfloat16 on a GPU that computes in it, else to none."""
    if dtype is None:
        cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if cuda else torch.float32
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def encode(encoder, images, image_size, depths=None, dtype=None):
    """Tokens of normalised images, resized (antialiased bicubic) to image_size pixels a side.

    images: (B, C, h, w), or (B, T, C, h, w) for time series, where a date that a sample lacks is
    all NaN: the tokens are averaged over the dates that it has. depths: numbers of blocks, whose
    tokens are joined along D (`ViT.levels`); default those of the last. dtype: of
    `mixed_precision`. Returns (B, N, D or len(depths) * D) float32. Source of the average:
    arXiv 2601.12964, evaluation.
    """
    if images.ndim == 5:
        present = ~images.isnan().flatten(2).all(2)  # (B, T)
        tokens = (image_size // encoder.patch_size) ** 2
        total = images.new_zeros(len(images), tokens, encoder.dim * len(depths or [0]))
        for part in present.nonzero().split(len(images)):  # the memory of one date, not of all
            sample, date = part.T
            encoded = encode(encoder, images[sample, date], image_size, depths, dtype)
            total = total.index_add(0, sample, encoded)
        return total / present.sum(1).clamp(min=1)[:, None, None]
    if images.shape[-2:] != (image_size, image_size):
        images = F.interpolate(images, (image_size, image_size), mode="bicubic", antialias=True)
    with mixed_precision(images.device, dtype):
        if depths is None:
            return encoder(images).float()
        return torch.cat(encoder.levels(images, depths), dim=2).float()


class Pixels(nn.Module):
    """In place of an encoder: a token is the pixels of its patch, C * patch**2 values. Whatever a
    probe makes of images without any features, the zero of a table."""

    def __init__(self, in_channels, patch_size):
        super().__init__()
        self.in_channels, self.patch_size, self.meta = in_channels, patch_size, {}
        self.dim = in_channels * patch_size**2
        self.config = {"in_channels": in_channels, "patch_size": patch_size}
        eye = torch.eye(self.dim).view(self.dim, in_channels, patch_size, patch_size)
        self.kernel = nn.Parameter(eye, requires_grad=False)

    def forward(self, images):
        return F.conv2d(images, self.kernel, stride=self.patch_size).flatten(2).mT


def resize(maps, size):
    return F.interpolate(maps, size, mode="bilinear")


def convolution(inputs, outputs, side):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False),
        nn.GroupNorm(1, outputs),
        nn.ReLU(),
    )


def double(dim):
    return nn.ConvTranspose2d(dim, dim, 2, stride=2)


class UperNet(nn.Module):
    """Pyramid pooling and a feature pyramid over four depths of a plain ViT.

    Takes (B, 4 * dim, rows, cols), the tokens of four depths joined, shallow first; the grids are
    brought to 4, 2, 1 and 1/2 times their size. Returns logits (B, classes, 4 rows, 4 cols).
    Source: UPerNet (arXiv 1807.10221) as BEiT and MAE use it on plain ViTs, half as wide. GroupNorm
    instead of BatchNorm: a map must not depend on what else is in its batch.
    """

    def __init__(self, dim, classes, width=256):
        super().__init__()
        self.scales = nn.ModuleList(
            [
                nn.Sequential(double(dim), nn.GroupNorm(1, dim), nn.GELU(), double(dim)),
                double(dim),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), convolution(dim, width, 1))
            for side in (1, 2, 3, 6)
        )
        self.context = convolution(dim + 4 * width, width, 3)
        self.lateral = nn.ModuleList(convolution(dim, width, 1) for _ in range(3))
        self.smooth = nn.ModuleList(convolution(width, width, 3) for _ in range(3))
        self.fuse = convolution(4 * width, width, 3)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, levels):
        parts = zip(self.scales, levels.chunk(4, dim=1), strict=True)
        *fine, coarse = [scale(level) for scale, level in parts]
        pooled = [resize(pool(coarse), coarse.shape[-2:]) for pool in self.pools]
        path = [self.context(torch.cat([coarse, *pooled], dim=1))]
        for lateral, level in zip(self.lateral, reversed(fine), strict=True):
            path.append(lateral(level) + resize(path[-1], level.shape[-2:]))
        path[1:] = [smooth(level) for smooth, level in zip(self.smooth, path[1:], strict=True)]
        size = path[-1].shape[-2:]
        return self.classify(self.fuse(torch.cat([resize(level, size) for level in path], dim=1)))


class Segmenter(nn.Module):
    """An encoder (`model.ViT`) and a head, for class logits of images.

    classes: their number. image_size: pixels a side that the encoder sees, a multiple of its patch;
    images of another size are resized. head: "linear", one linear layer per token (the paper's);
    "mlp", one hidden layer of the encoder's width with GELU per token; "upernet", see `UperNet`.

    dtype: of `mixed_precision`, for the encoder and upernet; it is no part of the weights.

    forward takes normalised images (B, C, h, w), time series (B, T, C, h, w), or their `features`
    (B, N, F) kept from before, and returns logits (B, classes, g, g) float32: g = image_size /
    patch, 4 times that for upernet.
    """

    def __init__(self, encoder, classes, image_size, head="linear"):
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head is {head!r}; choose {', '.join(HEADS)}")
        self.encoder, self.classes, self.image_size = encoder, classes, image_size
        self.kind, self.meta, self.depths, dim = head, {}, None, encoder.dim
        self.dtype = None
        if head == "linear":
            self.head = nn.Linear(dim, classes)
        elif head == "mlp":
            self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, classes))
        else:
            depth = len(encoder.blocks)
            self.depths = [math.ceil(depth * quarter / 4) for quarter in (1, 2, 3, 4)]
            self.head = UperNet(dim, classes)

    @property
    def grid(self):
        """Tokens a side."""
        return self.image_size // self.encoder.patch_size

    def features(self, images):
        """What the head reads, (B, N, F) float32: F is D, or 4 D for upernet."""
        return encode(self.encoder, images, self.image_size, self.depths, self.dtype)

    def tokens(self, images):
        """The encoder's tokens of images or time series: (B, N, D) float32."""
        return encode(self.encoder, images, self.image_size, dtype=self.dtype)

    def forward(self, x):
        x = x if x.ndim == 3 else self.features(x)
        if self.kind != "upernet":
            return rearrange(self.head(x), "b (r c) k -> b k r c", r=self.grid)
        with mixed_precision(x.device, self.dtype):
            return self.head(rearrange(x, "b (r c) f -> b f r c", r=self.grid)).float()


# ---- reading and writing ----------------------------------------------------------------------


def save_segmenter(path, segmenter, **meta):
    """Write a `Segmenter` to a safetensors file, atomically; it needs no other file.

    meta: JSON-able facts, which `load_segmenter` returns as `segmenter.meta`: classes (names),
    bands (names in the order that the encoder reads, [] if unknown), positions (0-based, of these
    bands in the training files), file_bands (how many those had), mean and std (per band, in the
    files' units), tile (pixels of the files' grid that image_size covers), gsd, encoder, sources,
    task, protocol, seed, val_miou, miou. `load_encoder` reads the file too, for its encoder.
    """
    state = {
        name: weight.contiguous()
        for name, weight in segmenter.state_dict().items()
        if not name.startswith("encoder.head.")  # Latent MIM's projection
    }
    facts = {
        "config": segmenter.encoder.config,
        "segmenter": {"image_size": segmenter.image_size, "head": segmenter.kind},
        "meta": meta,
    }
    write_tensors(path, state, facts)


def load_segmenter(path):
    """Read a model of `save_segmenter` -> `Segmenter` in eval mode, with its facts in `.meta`.

    path: the file, or the results folder of finetune.py: then the model of the row with the highest
    val_miou, which is printed. Raises FileNotFoundError or ValueError in one sentence, also for a
    folder of models of several tasks; nothing in the file is run.
    """
    path = Path(path)
    path = best_model(path) if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such model; give a model_*.safetensors of finetune.py, or its folder"
        )
    state, facts = read_tensors(path)
    if "segmenter" not in (facts or {}):
        raise ValueError(
            f"{path}: no segmentation model but weights without a head; train one on them with "
            f"finetune.py --encoder {path}, and give its model_*.safetensors"
        )
    encoder, meta = parse_encoder(state, facts, path), facts["meta"]
    try:
        segmenter = Segmenter(encoder, len(meta["classes"]), **facts["segmenter"])
        head = {name[5:]: value for name, value in state.items() if name.startswith("head.")}
        segmenter.head.load_state_dict(head)
    except (LookupError, TypeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: head and facts do not fit ({reason}); train it again") from None
    segmenter.meta = meta
    return segmenter.eval()


def read_results(results):
    """The rows of a results.jsonl, dicts. Lines that are none, as a run that was cut off leaves
    them, are told and left out."""
    rows = []
    for number, line in enumerate(results.read_bytes().splitlines(), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            print(f"warning: {results}: line {number} is no result; was a run cut off?")
    return rows


def best_model(folder):
    """The model file that the best row of a results folder names; prints which it is.

    Raises FileNotFoundError where no row names a model, ValueError where models of several tasks
    are there, whose scores do not compare.
    """
    results = folder / "results.jsonl"
    if not results.is_file():
        raise FileNotFoundError(f"{folder}: holds no results.jsonl of finetune.py, so no model")
    rows = [row for row in read_results(results) if row.get("model")]
    if not rows:
        raise FileNotFoundError(
            f"{results}: names no model (knn, pixels and --remove-place have none); run "
            "finetune.py with another --protocol"
        )
    bests = {}  # the best row of each task
    for row in sorted(rows, key=lambda row: -row["val_miou"]):
        bests.setdefault((row.get("task"), tuple(row.get("iou", ()))), row)
    best, *others = bests.values()
    if others:
        told = (
            f"{folder / row['model']} for {task} ({len(names)} classes: {', '.join(names)[:60]})"
            for (task, names), row in bests.items()
        )
        raise ValueError(
            f"{results}: models of {len(bests)} tasks, so give the file; the best are "
            + "; ".join(told)
        )
    path = folder / Path(best["model"]).name
    print(f"{path}: the best of {len(rows)} results, validation mIoU {best['val_miou']:.4f}")
    return path


# ---- training --------------------------------------------------------------------------------


def crop_labels(labels, windows, size):
    """Nearest label at the pixel centres of a resized window.

    labels: (B, h, w). windows: (B, 4) pixels (top, left, height, width) on the CPU. Returns
    (B, size, size).
    """
    place = (torch.arange(size) + 0.5) / size
    row = (windows[:, 0, None] + windows[:, 2, None] * place).long().to(labels.device)  # (B, size)
    col = (windows[:, 1, None] + windows[:, 3, None] * place).long().to(labels.device)
    image = torch.arange(len(labels), device=labels.device)
    return labels[image[:, None, None], row[:, :, None], col[:, None, :]]


def labelled(labels, weights=None):
    """The number of labelled pixels, or the sum of their classes' weights: a scalar tensor."""
    if weights is None:
        return (labels != IGNORE).sum()
    return F.pad(weights, (0, 1))[labels].sum()  # IGNORE, -1, finds the 0 at the end


def segmentation_loss(logits, labels, weights=None, count=None):
    """Mean cross-entropy of the labelled pixels; 0, not NaN, where a batch of crops has none.

    weights: (classes,), then the mean is weighted by those of the pixels' classes. count: the
    `labelled` of a larger batch that these tiles are a part of, so that the losses of its parts add
    up to its mean; default their own.
    """
    logits = resize(logits, labels.shape[-1])
    total = F.cross_entropy(logits, labels, weights, ignore_index=IGNORE, reduction="sum")
    count = labelled(labels, weights) if count is None else count
    return total / torch.where(count > 0, count, 1)


def balanced_weights(labels, classes):
    """1 / sqrt(f) of each class, f its share of the labelled pixels, scaled to a mean of 1 over
    these pixels: (classes,) float32, 0 for a class without any.

    labels: integer arrays (tile, tile), one by one.
    """
    share = sum(np.bincount(each[each != IGNORE], minlength=classes) for each in labels)
    share = share / share.sum()
    weights = np.where(share > 0, 1 / np.sqrt(np.where(share > 0, share, 1)), 0)
    return torch.tensor(weights / (share * weights).sum(), dtype=torch.float32)


def layer_groups(segmenter, decay):
    """Parameter groups of AdamW with a "scale" of the learning rate: decay**(depth + 1 - layer).

    The patch embedding and class token are layer 0, block k from 1 up layer k, the last norm and
    the head layer depth + 1, as BEiT (arXiv 2106.08254) and MAE fine-tune. decay 1: all alike.
    """
    last = len(segmenter.encoder.blocks) + 1
    groups = {}
    for name, weight in segmenter.named_parameters():
        parts = name.split(".")
        layer = last
        if parts[:2] == ["encoder", "blocks"]:
            layer = 1 + int(parts[2])
        elif parts[:2] in (["encoder", "patch_embed"], ["encoder", "cls_token"]):
            layer = 0
        groups.setdefault(layer, []).append(weight)
    return [{"params": group, "scale": decay ** (last - n)} for n, group in groups.items()]


# ---- scoring a task ---------------------------------------------------------------------------


@torch.no_grad()
def judge(model, stream, classes, image_size=None):
    """Score a model on batches of a split.

    model: from images or features to logits (B, classes, rows, cols). stream: of those and labels
    (B, tile, tile). Returns the confusion matrix at the labels' resolution (classes, classes), and
    if image_size is given the mIoU of each batch at that size (labels by nearest neighbour).
    Published numbers of this protocol were very likely made by the mean of these; it depends on the
    batch, so the matrix is what to trust. Matrices and lists of parts add up to the split's.
    """
    matrix, scores = torch.zeros(classes, classes, dtype=torch.int64), []
    for x, labels in stream:
        logits = model(x)
        prediction = resize(logits, labels.shape[-1]).argmax(1)
        matrix = matrix.to(x.device) + confusion_matrix(prediction, labels, classes, IGNORE)
        if image_size is not None:
            nearest = F.interpolate(labels[:, None].float(), image_size, mode="nearest-exact")
            prediction = resize(logits, image_size).argmax(1)
            small = confusion_matrix(prediction, nearest[:, 0].long(), classes, IGNORE)
            scores.append(mean_iou(small)[0])
    return matrix, scores


def mean_of(scores):
    """The mean of the scores that are numbers, NaN where there is none."""
    return float(np.nanmean(scores)) if np.isfinite(scores).any() else math.nan


def confusion_matrix(prediction, label, classes, ignore_index=IGNORE):
    """Count label and prediction pairs; matrices of batches and ranks add up to the split's.

    prediction, label: integer tensors of one shape. classes: their number. Pixels whose label is
    ignore_index do not count. Returns (classes, classes) int64, rows label, columns prediction.
    Raises ValueError for an id that is not below `classes`.
    """
    counted = label != ignore_index
    label, prediction = label[counted].long(), prediction[counted].long()
    for name, ids in (("label", label), ("prediction", prediction)):
        if ids.numel() and not 0 <= ids.min() <= ids.max() < classes:
            raise ValueError(
                f"{name} ids reach from {ids.min()} to {ids.max()}; {classes} classes go from 0 "
                f"to {classes - 1}"
            )
    pairs = label * classes + prediction
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def mean_iou(matrix):
    """Intersection over union from a confusion matrix (classes, classes), rows label.

    Returns (mean as float, (classes,) float64). A class absent from both labels and predictions
    has IoU NaN and is left out of the mean; a matrix of zeros has mean NaN.
    """
    matrix = matrix.cpu().double()
    hit = matrix.diagonal()
    iou = hit / (matrix.sum(0) + matrix.sum(1) - hit)  # 0 / 0 = NaN is the absent class
    return iou.nanmean().item(), iou


# ---- probes without a training loop -----------------------------------------------------------


def token_labels(labels, grid, classes):
    """What each token shows: shares of the classes among its labelled pixels.

    labels: (B, h, w) int64. grid: tokens a side; where that does not divide the pixels, a pixel
    counts for each token that it touches. Returns shares (B, grid**2, classes) float32, summing to
    1, and whether a token has a label at all (B, grid**2) bool.
    """
    # IGNORE is -1: its column comes first and is left out
    one_hot = F.one_hot(labels - IGNORE, classes + 1)[..., 1:].movedim(-1, 1).float()
    share = rearrange(F.adaptive_avg_pool2d(one_hot, grid), "b k r c -> b (r c) k")
    total = share.sum(2, keepdim=True)
    return share / torch.where(total > 0, total, 1), total[..., 0] > 0


def knn_scores(tokens, bank, votes, k=20, temperature=0.07, rows=1024):
    """Class scores of tokens by their nearest neighbours in a bank, by cosine.

    tokens: (n, D). bank: (m, D), L2-normalised. votes: (m, classes). The k nearest vote by softmax
    of cosine / temperature; `rows` tokens are compared at a time. Returns (n, classes).
    Source: the k-NN evaluation of DINO (arXiv 2104.14294), per token.
    """
    scores = []
    for part in F.normalize(tokens, dim=-1).split(rows):
        near, index = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        weight = (near / temperature).softmax(1)
        scores.append((weight[:, :, None] * votes[index]).sum(1))
    return torch.cat(scores)


def fit_bank(stream, size, seed):
    """A seeded uniform sample of at most `size` labelled tokens, L2-normalised, with their shares.

    stream: of tokens (n, D) and shares (n, classes). A token stays whose random key is among the
    smallest so far, so only the sample is ever held.
    """
    generator = torch.Generator().manual_seed(seed)
    key = bank = votes = None
    for tokens, share in stream:
        fresh = torch.rand(len(tokens), generator=generator, dtype=torch.float64), tokens, share
        if key is not None:
            fresh = [torch.cat(pair) for pair in zip((key, bank, votes), fresh, strict=True)]
        keep = fresh[0].argsort()[:size]
        key, bank, votes = fresh[0][keep], *(each[keep.to(each.device)] for each in fresh[1:])
    return F.normalize(bank, dim=-1), votes


def fit_ridge(stream, penalties):
    """Closed-form ridge regression from standardised tokens to class shares.

    stream: of tokens (n, D) and shares (n, classes), which are summed up in float64, never held.
    penalties: of the squared weights, for tokens of unit variance and the mean squared error.
    Returns a list of (weight (classes, D), bias (classes,)) for raw tokens, one for each penalty.
    """
    count = x_sum = y_sum = xx = xy = 0
    for tokens, share in stream:
        x, y = tokens.double(), share.double()
        count, x_sum, y_sum = count + len(x), x_sum + x.sum(0), y_sum + y.sum(0)
        xx, xy = xx + x.T @ x, xy + x.T @ y
    x_mean, y_mean = x_sum / count, y_sum / count
    covariance = xx / count - x_mean[:, None] * x_mean
    spread = covariance.diagonal().clamp(min=0).sqrt()
    spread = torch.where(spread > 1e-6, spread, 1)  # a channel that never varies tells nothing
    values, vectors = torch.linalg.eigh(covariance / (spread[:, None] * spread))
    target = vectors.T @ ((xy / count - x_mean[:, None] * y_mean) / spread[:, None])
    fits = []
    for penalty in penalties:
        weight = vectors @ (target / (values.clamp(min=0) + penalty)[:, None]) / spread[:, None]
        fits.append((weight.T.float(), (y_mean - x_mean @ weight).float()))
    return fits


@torch.no_grad()
def probe(
    encoder, task, protocol, image_size, *, train=None, seed=0, batch=64, bank=20_000,
    penalties=(1e-4, 1e-3, 1e-2, 1e-1, 1.0), read=None, place=True,
):  # fmt: skip
    """Judge a frozen encoder on a task in one pass, without a training loop.

    protocol: "knn", by the nearest of a seeded sample of `bank` labelled training tokens, or
    "ridge", by the linear map with the best of `penalties` on the validation split. A token's label
    is the mix of its pixels' (`token_labels`); predictions are scored at the labels' resolution.
    train: positions of the training tiles, default all. read: from a split and lists of positions
    in it to a stream of their tokens and labels; default by the encoder, with the task's
    statistics. place: False takes the mean training token of each place in the tile off all tokens
    first, so that what their place tells of them is no help and no noise. Draws nothing from
    torch's global generators. Returns {"val_miou", "miou_batchmean", "matrix" of the test split,
    "head": (weight, bias) of ridge with place, or None}.
    """
    device, classes = next(encoder.parameters()).device, len(task.classes)
    grid = image_size // encoder.patch_size

    def encoded(split, parts):
        for images, labels in batches(task, parts, task.mean, task.std, device):
            yield encode(encoder, images, image_size), labels

    def tokens_of(split, index=None):
        parts = chunks(np.flatnonzero(task.split == split) if index is None else index, batch)
        stream = (read or encoded)(split, parts)
        stream = ((tokens - mean_token, labels) for tokens, labels in stream)
        return tqdm(stream, f"{protocol}, {split}", len(parts), leave=False)

    mean_token = 0.0
    if not place:
        count = total = 0
        for tokens, _ in tokens_of("train", train):
            count, total = count + len(tokens), total + tokens.double().sum(0)
        mean_token = (total / count).to(tokens.dtype)

    def labelled():
        for tokens, labels in tokens_of("train", train):
            share, known = token_labels(labels, grid, classes)
            yield tokens[known], share[known]

    if protocol == "knn":
        nearest = fit_bank(labelled(), bank, seed)
        heads, scorers = [None], [lambda tokens: knn_scores(tokens, *nearest)]
    else:
        heads = fit_ridge(labelled(), penalties)
        scorers = [partial(lambda head, tokens: F.linear(tokens, *head), head) for head in heads]

    def logits(scorer, tokens):
        scores = scorer(tokens.flatten(0, 1))
        return rearrange(scores, "(b r c) k -> b k r c", r=grid, c=grid)

    models = [partial(logits, scorer) for scorer in scorers]
    matrices = [0] * len(models)
    for part in tokens_of("val"):
        found = (judge(model, [part], classes)[0] for model in models)
        matrices = [sum(pair) for pair in zip(matrices, found, strict=True)]
    scores = [mean_iou(matrix)[0] for matrix in matrices]
    val_miou = max(scores)
    best = scores.index(val_miou)
    head, model = heads[best], models[best]
    matrix, scores = judge(model, tokens_of("test"), classes, image_size)
    return {
        "val_miou": val_miou,
        "miou_batchmean": mean_of(scores),
        "matrix": matrix,
        "head": head if place else None,  # the mean tokens are no part of a head
    }
