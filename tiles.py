"""The tiles of a task as an encoder reads them: normalised, by batches, or as tokens that are kept.

`batches` reads one batch ahead; `keep_tokens` encodes tiles once, divided over ranks; `Tiles` gives
a split's images, or its tokens where it has them. A task is a `datasets.tasks.Task`.
"""

import copy
import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import torch
from tqdm import tqdm


def normalised(task, index, mean, std):
    """Images and labels of some tiles: (n, [dates,] bands, tile, tile) float32, and int64.

    mean, std: (bands,). Pixels without data become 0, which is the mean; dates without any stay
    NaN, which tells `encode` to leave them out.
    """
    mean, std = (np.asarray(each, np.float32)[:, None, None] for each in (mean, std))
    images = (task.images[index] - mean) / std
    absent = np.isnan(images).all((-3, -2, -1)) if images.ndim == 5 else np.zeros(len(images), bool)
    np.nan_to_num(images, copy=False)
    images[absent] = np.nan
    return torch.from_numpy(images), labels_of(task, index)


def labels_of(task, index, device=None):
    """Labels of some tiles: (n, tile, tile) int64 on the device."""
    return torch.from_numpy(task.labels[index]).to(device).long()


def batches(task, parts, mean, std, device):
    """Yield `normalised` images and labels of each index in `parts`, on the device.

    A thread reads one batch ahead, so that a task may be larger than memory and the disk slow.
    """
    with ThreadPoolExecutor(1) as reader:
        ahead = deque()
        for index in parts:
            ahead.append(reader.submit(normalised, task, index, mean, std))
            if len(ahead) == 2:
                images, labels = ahead.popleft().result()
                yield images.to(device), labels.to(device)
        for images, labels in (read.result() for read in ahead):
            yield images.to(device), labels.to(device)


def chunks(index, size):
    return [index[k : k + size] for k in range(0, len(index), size)]


def token_home(shape, device):
    """Where float32 tokens of a shape are kept: on the device, in main memory where they would take
    more than half of what a GPU has free. Says their size where it is large."""
    size = 4 * math.prod(shape)
    if size > 2**32:
        print(f"tokens kept in memory: {size / 2**30:.1f} GiB")
    if device.type == "cuda" and size > torch.cuda.mem_get_info(device)[0] / 2:
        return torch.device("cpu")
    return device


@torch.no_grad()
def keep_tokens(segmenter, stream, parts, ranks, after):
    """Encode tiles once, each part by one rank -> the tokens of all on every rank, (n, N, F).

    stream: from a list of parts, each a list of tiles, to their images and labels. after: called
    by all ranks together whenever each has encoded a part.
    """
    device, width = ranks.device, segmenter.encoder.dim * len(segmenter.depths or [0])
    shape = (sum(map(len, parts)), segmenter.grid**2, width)
    tokens, at = torch.empty(shape, device=token_home(shape, device)), 0
    own = (segmenter.features(x) for x, _ in stream(parts[ranks.rank :: ranks.world]))
    for first in tqdm(range(0, len(parts), ranks.world), "encode", leave=False):
        encoded = next(own, None)  # all ranks at once, before any sends
        for source, part in enumerate(parts[first : first + ranks.world]):
            mine = source == ranks.rank
            value = encoded if mine else torch.empty(len(part), *shape[1:], device=device)
            tokens[at : at + len(part)] = ranks.share(value.contiguous(), source)
            at += len(part)
        after()
    return tokens


class Tiles:
    """A task as the seeds read it: `of`, its tiles by split, and tokens that are kept of them."""

    def __init__(self, task, mean, std, device):
        self.task, self.mean, self.std, self.device = task, mean, std, device
        self.of = {split: np.flatnonzero(task.split == split) for split in ("train", "val", "test")}
        self.kept = {}  # split -> the tokens of its tiles

    def images(self, parts):
        return batches(self.task, parts, self.mean, self.std, self.device)

    def keep(self, segmenter, splits, batch, ranks, after):
        """The same with the tokens of some splits, which ranks encode together; `after` as
        `keep_tokens` calls it."""
        other = copy.copy(self)
        parts = {split: chunks(self.of[split], batch) for split in splits}
        tokens = keep_tokens(segmenter, self.images, [*chain(*parts.values())], ranks, after)
        sizes = [len(self.of[split]) for split in splits]
        other.kept = dict(zip(splits, tokens.split(sizes), strict=True))
        return other

    def read(self, split, parts):
        """A stream of images, or of tokens where kept, and labels of lists of a split's tiles."""
        if split not in self.kept:
            yield from self.images(parts)
        else:
            for part in parts:
                rows = torch.from_numpy(np.searchsorted(self.of[split], part))
                tokens = self.kept[split][rows.to(self.kept[split].device)]
                yield tokens.to(self.device), labels_of(self.task, part, self.device)
