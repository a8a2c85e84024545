"""Judge an encoder on labelled imagery: linear probe or fine-tuning, over several seeds.

    python finetune.py --encoder out/sa --images task/mr --masks task/masks \\
        --classes task/classes.txt --protocol linear --seeds 5

Each tile is resized to --image-size and encoded; one linear layer turns every token into class
logits; the grid of logits is resized bilinearly to the label and meets cross-entropy. The epoch
with the best mIoU on the validation split is scored on the test split. Tiles, labels and images
stay in the memory of the training device. On one CPU the same seed gives the same numbers.

Source: arXiv 2601.12964, the evaluation protocol; hyperparameters as in the first author's public
experiments.
"""

import argparse
import copy
import csv
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

import geotiff
from data import draw_crops, resample
from model import ViT, load_encoder, vit
from tasks import (
    IGNORE,
    SPLITS,
    band_stats,
    confusion_matrix,
    fingerprint,
    load_folder,
    mean_iou,
)

UNPREDICTED = 255  # in the class maps; so they hold at most 255 classes


# fmt: off
def parse_args(argv):
    parser = argparse.ArgumentParser(
        description="Linear probe or fine-tuning of an encoder on images and masks.",
        allow_abbrev=False,
    )
    flag = parser.add_argument_group("encoder").add_argument
    flag("--encoder", required=True, help="run folder, weights file, 'random' (an untrained ViT of "
         "--model and --patch) or 'random:RUN' (the architecture of RUN, untrained); random "
         "weights are drawn anew for each seed")
    flag("--model", default="small", choices=["tiny", "small", "base", "large", "huge"],
         help="size of --encoder random (default small)")
    flag("--patch", type=positive, default=14, help="pixels, of --encoder random (default 14)")
    flag("--heads", type=positive, help="attention heads, for weights whose width does not tell")

    flag = parser.add_argument_group("task").add_argument
    flag("--images", required=True, help="folder of GeoTIFFs, or a glob pattern in quotes")
    flag("--masks", required=True, help="the same for the masks, paired by name without extension")
    flag("--classes", help="text file, one class name per line, line number from 0 = class id "
         "(default: the ids name themselves)")
    flag("--ignore-index", type=int, help="mask value that is no label (default: none)")
    flag("--bands", type=band_list, help="0-based positions in the images, in the order that the "
         "encoder expects, such as 2,1,0,3 (default: all)")
    flag("--tile", type=positive, default=64, help="pixels per side that images are cut to; edges "
         "are filled up (default 64)")
    flag("--splits", help="folder of train.txt, val.txt and test.txt, names without extension")
    flag("--block", type=positive, default=4, help="without --splits: side in tiles of the blocks "
         "of ground that are kept together (default 4)")
    flag("--val", type=fraction, default=0.2, help="without --splits: fraction (default 0.2)")
    flag("--test", type=fraction, default=0.2, help="without --splits: fraction (default 0.2)")
    flag("--split-seed", type=int, default=0, help="without --splits: which draw (default 0)")
    flag("--stats", default="task", choices=["task", "encoder"], help="mean and std that the bands "
         "are normalised by: of the task's training split, or those that the encoder was "
         "pretrained with (default task)")

    flag = parser.add_argument_group("protocol").add_argument
    flag("--protocol", default="linear", choices=["linear", "finetune"],
         help="train the linear layer only, or the encoder too (default linear)")
    flag("--image-size", type=positive, default=224, help="pixels per side that the encoder sees, "
         "a multiple of its patch (default 224)")
    flag("--crop", action=argparse.BooleanOptionalAction, default=True,
         help="train on random crops of 0.3 to 1 of the tile's area (default yes, as the paper); "
         "--no-crop lets the linear probe encode each tile only once, which is much faster")
    flag("--epochs", type=positive, default=100, help="over the training tiles (default 100)")
    flag("--batch", type=positive, default=64, help="tiles (default 64)")
    flag("--lr", type=float, help="learning rate (default 1e-3 linear, 1e-4 finetune)")
    flag("--schedule", default="constant", choices=["constant", "cosine"],
         help="of the learning rate over all steps, cosine ends at 0 (default constant)")
    flag("--weight-decay", type=float, help="of AdamW (default 0 linear, 0.05 finetune)")
    flag("--labels", type=fraction, default=1.0, help="fraction of the training tiles whose labels "
         "are used, drawn by seed (default 1)")
    flag("--seeds", type=positive, default=1, help="runs, with seeds 0, 1, ...: weights of the "
         "linear layer, order, crops, choice of --labels (default 1; seeds differ by up to a point "
         "of mIoU, so compare over 5)")

    flag = parser.add_argument_group("output").add_argument
    flag("--out", type=Path, default=Path("out/results"), help="folder; results.jsonl in it gains "
         "a row per seed (default out/results)")
    flag("--maps", type=Path, help="new folder for a GeoTIFF class map of each test image, from "
         f"seed 0; {UNPREDICTED} where nothing is predicted")
    flag("--device", default="auto", choices=["auto", "cpu", "cuda"],
         help="where to run (default auto: cuda where there is one)")
    args = parser.parse_args(argv)
    if args.lr is None:
        args.lr = {"linear": 1e-3, "finetune": 1e-4}[args.protocol]
    if args.weight_decay is None:
        args.weight_decay = {"linear": 0.0, "finetune": 0.05}[args.protocol]
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if not 0 < args.lr < math.inf:
        parser.error(f"--lr {args.lr} is not a number above 0")
    if not 0 <= args.weight_decay < math.inf:
        parser.error(f"--weight-decay {args.weight_decay} is not a number from 0 up")
    if args.split_seed < 0:
        parser.error(f"--split-seed {args.split_seed} is below 0")
    if args.splits is None and args.val + args.test >= 1:
        parser.error(f"--val {args.val} and --test {args.test} leave nothing to train on")
    if args.heads and args.encoder == "random":
        parser.error("--heads is for weights; --encoder random has those of its --model")
    return args
# fmt: on


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return value


def fraction(text):
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def band_list(text):
    return [int(position) for position in text.split(",")]


class Probe(nn.Module):
    """An encoder and one linear layer per token.

    forward takes images (B, bands, rows, cols), or their tokens (B, N, D) kept from before, and
    returns logits (B, classes, g, g) float32, g = image_size / patch.
    """

    def __init__(self, encoder, classes, image_size):
        super().__init__()
        self.encoder, self.classes, self.image_size = encoder, classes, image_size
        self.head = nn.Linear(encoder.dim, classes)

    def tokens(self, images):
        if images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        bfloat16 = images.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
            return self.encoder(images).float()

    def forward(self, x):
        x = x if x.ndim == 3 else self.tokens(x)
        rows = self.image_size // self.encoder.patch_size
        return rearrange(self.head(x), "b (r c) k -> b k r c", r=rows)


def upsample(logits, size):
    return F.interpolate(logits, (size, size), mode="bilinear")


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


def segmentation_loss(logits, labels):
    """Mean cross-entropy of the labelled pixels; 0, not NaN, where a batch of crops has none."""
    logits = upsample(logits, labels.shape[-1])
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)


def normalised(task, index, mean, std, device):
    """Images and labels of some tiles, for training: (n, bands, tile, tile) float32, and int64.

    mean, std: (bands,). Pixels without data become 0, which is the mean.
    """
    mean, std = (np.asarray(each, np.float32)[:, None, None] for each in (mean, std))
    images = torch.from_numpy(np.nan_to_num((task.images[index] - mean) / std))
    labels = torch.from_numpy(task.labels[index])
    return images.to(device), labels.to(device).long()


@torch.no_grad()
def predict(probe, inputs, size, batch):
    """Class ids (N, size, size) int16 of images or tokens, as Probe takes them."""
    parts = [upsample(probe(part), size).argmax(1).short() for part in inputs.split(batch)]
    return torch.cat(parts)


def batch_mean_iou(probe, inputs, labels, batch):
    """Mean of the batches' mIoUs, at the resolution that the encoder sees.

    Labels are resized to it by nearest neighbour. Published numbers of this protocol were very
    likely made so; they depend on the batch, so `miou` from one matrix is the figure to trust.
    """
    size, tile, scores = probe.image_size, labels.shape[-1], []
    for part, label in zip(inputs.split(batch), labels.split(batch), strict=True):
        whole = torch.tensor([[0, 0, tile, tile]]).expand(len(label), 4)
        label = crop_labels(label, whole, size)
        prediction = predict(probe, part, size, batch)
        scores.append(mean_iou(confusion_matrix(prediction, label, probe.classes, IGNORE))[0])
    return float(np.nanmean(scores))


def commit():
    """Commit of the code, "-dirty" where it was changed since; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def weights_hash(encoder):
    """12 hex digits of a SHA-256 over the names and values of all weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def write_matrix(path, matrix, classes):
    """Save a confusion matrix as CSV, rows label, columns prediction, both with class names."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["label / prediction", *classes])
        rows.writerows([name, *counts] for name, counts in zip(classes, matrix, strict=True))
    os.replace(temporary, path)


def write_maps(folder, task, tiles, predictions):
    """Write one class map per image of `tiles` (positions in the task): uint8, georeferenced.

    predictions: (len(tiles), tile, tile). Pixels without image data and ground outside the tiles
    are UNPREDICTED, which is also the nodata value.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = np.isnan(task.images[tiles, 0])
    predictions = np.where(missing, UNPREDICTED, predictions).astype(np.uint8)
    tile = predictions.shape[-1]
    for number in np.unique(task.origin[tiles, 0]):
        file = task.files[number]
        # whole tiles: the last ones of a row or column reach beyond the image
        size = [-(-side // tile) * tile for side in (file.height, file.width)]
        canvas = np.full(size, UNPREDICTED, np.uint8)
        for k in np.flatnonzero(task.origin[tiles, 0] == number):
            _, row, col = task.origin[tiles][k]
            canvas[row : row + tile, col : col + tile] = predictions[k]
        canvas = canvas[: file.height, : file.width]
        path = folder / f"{file.path.stem}.tif"
        geotiff.write(path, canvas, file.transform, file.crs, nodata=UNPREDICTED)


def print_table(rows, classes):
    """Print the scores of all seeds, then the IoU of each class, with mean and deviation."""
    columns = {"val_miou": "val mIoU", "miou": "mIoU", "miou_batchmean": "batch mean",
               "accuracy": "accuracy"}  # fmt: skip
    scores = np.array([[row[key] for key in columns] for row in rows])
    lines = dict(zip((row["seed"] for row in rows), scores, strict=True))
    if len(rows) > 1:
        lines |= {"mean": scores.mean(0), "std": scores.std(0, ddof=1)}
    print(f"\n{'seed':<6}" + "".join(f"{name:>12}" for name in columns.values()))
    for name, line in lines.items():
        print(f"{name:<6}" + "".join(f"{value:12.4f}" for value in line))

    print(f"\n{'class':<24}{'IoU':>8}{'std':>8}")
    for name in classes:
        # None: absent from that seed's labels and predictions
        values = [row["iou"][name] for row in rows if row["iou"][name] is not None]
        mean = f"{np.mean(values):8.4f}" if values else f"{'absent':>8}"
        std = f"{np.std(values, ddof=1):8.4f}" if len(values) > 1 else ""
        print(f"{name:<24}{mean}{std}")


def check_output(out, maps):
    """Raise FileExistsError where results would mix with, or replace, something else, and OSError
    where they cannot be written; leaves nothing behind."""
    results = out / "results.jsonl"
    ours = results.exists()
    if out.exists() and not ours and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(
            f"--out {out} exists and holds no results.jsonl; name a new folder, or one of earlier "
            "results to add to"
        )
    if maps and maps.exists():
        raise FileExistsError(f"--maps {maps} exists; name a new folder, or remove it")
    for flag, folder in (("--out", out), ("--maps", maps or out)):
        try:
            there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
            tempfile.TemporaryDirectory(dir=there).cleanup()  # permissions alone do not tell
            if ours:
                results.open("a").close()
        except OSError as error:
            raise OSError(
                f"{flag} {folder} cannot be written ({error}); name another folder"
            ) from error


def check_encoder(encoder, name, task, bands, image_size):
    """Raise ValueError if the encoder does not read the task's bands or the image size.

    bands: the positions that the task has of its files' bands, or None for all.
    """
    wanted, count = encoder.meta.get("bands", []), task.images.shape[1]
    if encoder.in_channels != count:
        raise ValueError(
            f"--encoder {name} reads {encoder.in_channels} bands ({','.join(wanted) or 'unnamed'}),"
            f" the task has {count}; choose and order them with --bands, or take an encoder of "
            "that data"
        )
    for file in task.files:
        found = [file.band_names[band] for band in bands or range(count)] if file.band_names else []
        if found != wanted and sorted(found) == sorted(wanted):
            order = ",".join(str(file.band_names.index(band)) for band in wanted)
            raise ValueError(
                f"--encoder {name} reads the bands {','.join(wanted)}, but those of {file.path} "
                f"come as {','.join(found)}; pass --bands {order}"
            )
    patch = encoder.patch_size
    if image_size % patch:
        low = image_size // patch * patch
        raise ValueError(
            f"--image-size {image_size} is no multiple of the encoder's patch of {patch} px; try "
            + " or ".join(str(n) for n in (low, low + patch) if n)
        )


def evaluate(args):
    """Train and score one probe per seed; everything wrong with the input is raised before."""
    linear, untrained = args.protocol == "linear", args.encoder.split(":")[0] == "random"
    check_output(args.out, args.maps)
    if args.encoder != "random":
        template = load_encoder(args.encoder.removeprefix("random:"), args.heads)
    task = load_folder(
        args.images, args.masks, classes=args.classes, bands=args.bands,
        ignore_index=args.ignore_index, tile=args.tile, splits=args.splits,
        block=args.block, val=args.val, test=args.test, split_seed=args.split_seed,
    )  # fmt: skip
    bands, classes = task.images.shape[1], task.classes
    if args.encoder == "random":
        template = vit(args.model, in_channels=bands, patch_size=args.patch)
    check_encoder(template, args.encoder, task, args.bands, args.image_size)
    mean, std = band_stats(task.images[task.split == "train"])
    if args.stats == "encoder":
        if "mean" not in template.meta or "std" not in template.meta:
            raise ValueError(
                f"--stats encoder: {args.encoder} carries no mean and std; use --stats task"
            )
        mean, std = np.array(template.meta["mean"]), np.array(template.meta["std"])
    if args.maps and len(classes) > UNPREDICTED:
        raise ValueError(f"--maps holds at most {UNPREDICTED} classes, found {len(classes)}")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available; use --device cpu")

    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    results.touch()
    tiles = {split: np.flatnonzero(task.split == split) for split in SPLITS}
    data_hash, size = fingerprint(task), (args.image_size, args.image_size)
    print(
        f"task {data_hash}: {bands} bands, {len(classes)} classes, {args.tile} px tiles: "
        + ", ".join(f"{len(index)} {split}" for split, index in tiles.items())
        + f" (split by {task.split_by})"
        + "".join(f"; mask value {value:g} is nodata and ignored" for value in task.nodata)
    )

    rows = []
    for seed in range(args.seeds):
        start = time.perf_counter()
        torch.manual_seed(seed)
        encoder = ViT(**template.config) if untrained else copy.deepcopy(template)
        encoder_hash = weights_hash(encoder)
        torch.manual_seed(seed)  # the same linear layer, whatever encoder was drawn before it
        probe = Probe(encoder, len(classes), args.image_size).to(device)
        encoder.requires_grad_(not linear)
        trained = probe.head if linear else probe
        optimizer = torch.optim.AdamW(
            trained.parameters(), lr=args.lr, weight_decay=args.weight_decay
        )

        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(tiles["train"]), generator=generator)
        order = order[: max(1, round(args.labels * len(order)))].numpy()
        chosen = {**tiles, "train": tiles["train"][order]}
        inputs, labels = {}, {}
        for split, index in chosen.items():
            inputs[split], labels[split] = normalised(task, index, mean, std, device)
            # a frozen encoder gives an uncropped tile the same tokens in every epoch
            if linear and (split != "train" or not args.crop):
                parts = tqdm(inputs[split].split(args.batch), f"seed {seed}, encode {split}")
                with torch.no_grad():
                    inputs[split] = torch.cat([probe.tokens(part) for part in parts])

        count = len(inputs["train"])
        steps, step, best = args.epochs * math.ceil(count / args.batch), 0, -1.0
        with tqdm(total=steps, desc=f"seed {seed}, {args.protocol}", unit="step") as bar:
            for epoch in range(1, args.epochs + 1):
                for index in torch.randperm(count, generator=generator).split(args.batch):
                    image, label = inputs["train"][index], labels["train"][index]
                    if args.crop:
                        windows = torch.from_numpy(draw_crops(seed, step, len(index))) * args.tile
                        image = resample(image, windows, size)
                        label = crop_labels(label, windows, args.tile)
                    decay = (1 + math.cos(math.pi * step / steps)) / 2
                    for group in optimizer.param_groups:
                        group["lr"] = args.lr * (decay if args.schedule == "cosine" else 1)
                    loss = segmentation_loss(probe(image), label)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    step += 1
                    bar.update()
                last = loss.item()  # a device sync, so once an epoch
                if not math.isfinite(last):
                    raise ValueError(f"loss {last} in epoch {epoch}; lower --lr")
                prediction = predict(probe, inputs["val"], args.tile, args.batch)
                val, _ = mean_iou(confusion_matrix(prediction, labels["val"], len(classes), IGNORE))
                if val > best:
                    best, best_epoch = val, epoch
                    weights = {name: value.clone() for name, value in trained.state_dict().items()}
                bar.set_postfix(loss=f"{last:.3f}", val=f"{val:.4f}", best=f"{best:.4f}")

        trained.load_state_dict(weights)
        prediction = predict(probe, inputs["test"], args.tile, args.batch)
        matrix = confusion_matrix(prediction, labels["test"], len(classes), IGNORE)
        miou, iou = mean_iou(matrix)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        saved = args.out / f"confusion_{stamp}_{encoder_hash}_{args.protocol}_seed{seed}.csv"
        write_matrix(saved, matrix.tolist(), classes)
        row = {
            "encoder": args.encoder,
            "encoder_hash": encoder_hash,
            "data_hash": data_hash,
            "protocol": args.protocol,
            "seed": seed,
            "miou": miou,
            "miou_batchmean": batch_mean_iou(probe, inputs["test"], labels["test"], args.batch),
            "accuracy": (matrix.diagonal().sum() / matrix.sum()).item(),
            # None: absent from labels and predictions, and so no part of the mean
            "iou": {
                name: None if math.isnan(value) else value
                for name, value in zip(classes, iou.tolist(), strict=True)
            },
            "val_miou": best,
            "best_epoch": best_epoch,
            "confusion": saved.name,
            "tiles": {split: len(index) for split, index in chosen.items()},
            "split_by": task.split_by,
            "mean": mean.tolist(),
            "std": std.tolist(),
            "architecture": template.config,
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "commit": commit(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "finished": stamp,
            "seconds": round(time.perf_counter() - start, 2),
        }
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        if args.maps and seed == 0:
            write_maps(args.maps, task, tiles["test"], prediction.cpu().numpy())

    print_table(rows, classes)
    print(f"\nrows added to {results}: {args.seeds}")


def main(argv=None):
    args = parse_args(argv)
    try:
        evaluate(args)
    except (ValueError, OSError) as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            f"finetune.py: interrupted; finished seeds keep their rows in {args.out}",
            file=sys.stderr,
        )
        sys.exit(130)


if __name__ == "__main__":
    main()
