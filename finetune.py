"""Judge an encoder on labelled imagery: linear probe or fine-tuning, over several seeds.

    python finetune.py --encoder out/sa --task mados --root MADOS --seeds 5
    python finetune.py --encoder out/sa --images task/mr --masks task/masks --classes classes.txt
    torchrun --nproc_per_node=8 finetune.py --protocol finetune ...     the same results on 8 GPUs

Each tile is resized to --image-size and encoded; a head turns every token into class logits (the
paper's is one linear layer); the grid of logits is resized bilinearly to the label and meets
cross-entropy. The epoch with the best mIoU on the validation split is scored on the test split, and
the best seed's model saved for predict.py. Tiles are read by batches while the last one is worked
on, so a task may be larger than memory. On one CPU the same seed gives the same numbers.

Ranks share each global batch of --protocol finetune. Of a frozen encoder they share the encoding of
the tiles, then the seeds. The same command again goes on after a kill: with the first seed that has
no row, in the epoch after the last whole one.

Source: arXiv 2601.12964, the evaluation protocol; hyperparameters as in the first author's public
experiments.
"""

import argparse
import copy
import hashlib
import json
import math
import platform
import shlex
import time
from datetime import datetime, timedelta
from functools import partial
from inspect import signature
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import draw_crops, resample
from datasets.common import sets
from datasets.labels import classes_beside
from datasets.tasks import (
    SPLITS,
    fingerprint,
    list_tasks,
    load_folder,
    load_task,
    own_folder,
)
from files import save_sealed
from imagery.bands import meanings
from model import SIZES, ViT, vit
from run import (
    Parser,
    Stop,
    between,
    git_state,
    hold,
    positive,
    precision_of,
    read_checkpoint,
    script,
    start_ranks,
    whole,
)
from scores import append_row, check_output, print_table, write_matrix
from segment import (
    HEADS,
    Pixels,
    Segmenter,
    balanced_weights,
    crop_labels,
    judge,
    labelled,
    layer_groups,
    mean_iou,
    mean_of,
    probe,
    read_results,
    save_segmenter,
    segmentation_loss,
)
from tiles import Tiles, chunks
from weights import bands_of, load_encoder, weights_hash

PROBES = ("knn", "ridge")  # protocols that train nothing

UNREAD = ("random", "pixels")  # values of --encoder that name no file
PRETRAINING = ("objective", "variant", "seed", "step", "store")  # what train.py says in weights

# The flags that a seed's result depends on, beside the encoder and the task themselves
PROTOCOL = (
    "protocol", "head", "image_size", "crop", "epochs", "global_batch", "lr", "schedule",
    "weight_decay", "layer_decay", "clip", "class_weights", "labels", "remove_place",
)  # fmt: skip


# fmt: off
def parse_args(argv=None):
    share = between(1e-9, 1)  # of something, never none of it
    parser = Parser(
        prog="finetune.py",
        description="Linear probe or fine-tuning of an encoder on images and masks.",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    flag = parser.add_argument_group("encoder").add_argument
    flag("--encoder", required=True, help="run folder, weights file, 'random' (an untrained ViT of "
         "--model and --patch), 'random:RUN' (the architecture of RUN, untrained), drawn for each "
         "seed anew, or 'pixels' (tokens are the pixels of their --patch)")
    flag("--model", default="small", choices=SIZES, help="of --encoder random (default small)")
    flag("--patch", type=positive, default=14, help="pixels, of --encoder random (default 14)")
    flag("--heads", type=positive, help="attention heads, for weights whose width does not tell")

    flag = parser.add_argument_group("task").add_argument
    flag("--task", default="geotiff", choices=["geotiff", *sets("TASKS")], help="a published set "
         "in --root, or geotiff, folders of your own (default geotiff)")
    flag("--list-tasks", action="version", version=list_tasks(), help="print the published sets "
         "with classes, sizes, splits and where to get them")
    flag("--root", type=Path, help="folder of the set as published; for geotiff one with images "
         "(or mr), masks and, where there are, classes.txt and splits")
    flag("--bands", type=band_list, help="in the order that the encoder expects: names such as "
         "B,G,R,NIR or B02,B11, or for geotiff 0-based positions such as 2,1,0,3 (default "
         "B,G,R,NIR of a published set, all of geotiff)")
    flag("--tile", type=positive, help="pixels per side that images are cut to; edges are filled "
         "up (default: the set's own protocol, 64 for geotiff)")
    flag("--split-seed", type=whole, default=0, help="which draw, where splits are drawn "
         "(default 0)")
    flag("--split-hash", metavar="HEX", help="go on only if the splits have this hash, as the rows "
         "of an earlier run say")
    flag("--stats", default="task", choices=["task", "encoder"], help="mean and std that the bands "
         "are normalised by: the task's (the publisher's, else of the training split), or those "
         "that the encoder was pretrained with (default task)")
    flag("--dates", type=positive, help="of a time series: dates per sample (default: all)")
    flag("--pastis-classes", type=int, default=18, choices=[18, 19, 20], help="18 ignores "
         "background and void, 19 void only, 20 nothing (default 18, as the paper)")

    flag = parser.add_argument_group("task geotiff").add_argument
    flag("--images", help="folder of images, scenes of one file per band among them, or a glob "
         "pattern in quotes (default: of --root)")
    flag("--masks", help="folder of GeoTIFFs or a glob pattern, paired by name without extension")
    flag("--labels-file", metavar="FILE", help="in place of --masks: polygons of a GeoJSON file, "
         "of a GeoPackage or shapefile where fiona is installed; pixels outside have no label")
    flag("--label-field", metavar="NAME", help="which of its fields tells the class, as text or id")
    flag("--classes", help="text file, one class name per line, line number from 0 = class id "
         "(default: classes.txt beside the masks; without it the ids name themselves)")
    flag("--ignore-index", type=numbers, metavar="N,N", help="mask values that are no label and no "
         "class, such as 255 or 0,255, beside the masks' nodata (default: none)")
    flag("--clouds", metavar="PRODUCT", help="hide cloud, its shadow and cirrus, whose pixels then "
         "have no label, by the masks of sentinel2 (SCL), landsat, hls or planet, which are bands "
         "or lie beside the images, as for data.py pack (default: nothing is hidden)")
    flag("--splits", help="folder of train.txt, val.txt and test.txt, names without extension")
    flag("--block", type=positive, default=4, help="without --splits: side in tiles of the blocks "
         "of ground that are kept together (default 4)")
    flag("--val", type=share, default=0.2, help="without --splits: fraction (default 0.2)")
    flag("--test", type=share, default=0.2, help="without --splits: fraction (default 0.2)")

    flag = parser.add_argument_group("protocol").add_argument
    flag("--protocol", default="linear", choices=["linear", "finetune", "knn", "ridge"],
         help="train the head only, or the encoder too; or judge the tokens without training, by "
         "nearest neighbours or ridge regression, a check within seconds (default linear)")
    flag("--head", default="linear", choices=HEADS, help="one linear layer per token (paper), an "
         "MLP per token, or a multi-level UPerNet, for --protocol finetune above all (default "
         "linear)")
    flag("--remove-place", action="store_true", help="of --protocol knn and ridge: take the mean "
         "training token of each place in the tile off first (default: tokens as they are)")
    flag("--image-size", type=positive, default=224, help="pixels per side that the encoder sees, "
         "a multiple of its patch (default 224)")
    flag("--crop", action=argparse.BooleanOptionalAction, default=True,
         help="train on random crops of 0.3 to 1 of the tile's area (default yes, as the paper); "
         "--no-crop lets a frozen encoder see each tile only once, which is much faster")
    flag("--epochs", type=positive, default=100, help="over the training tiles (default 100)")
    flag("--global-batch", type=positive, default=64, help="tiles an update, over all ranks "
         "(default 64)")
    flag("--device-batch", type=positive, help="tiles at once on a rank in training, the rest "
         "accumulates; less needs less memory (default: all that fall to the rank)")
    flag("--lr", type=between(1e-12, 1e30), help="learning rate (default 1e-3 linear, 1e-4 "
         "finetune)")
    flag("--schedule", default="constant", choices=["constant", "cosine"],
         help="of the learning rate over all steps, cosine ends at 0 (default constant)")
    flag("--weight-decay", type=between(0, 1e30), help="of AdamW (default 0 linear, 0.05 finetune)")
    flag("--layer-decay", type=share, default=1.0, help="of --protocol finetune: factor of the "
         "learning rate from each block to the one before (default 1, none, as the paper; 0.65 to "
         "0.9 is usual)")
    flag("--clip", type=between(1e-9), metavar="NORM", help="scale gradients of a larger norm down "
         "to this one (default never, as the paper)")
    flag("--class-weights", default="none", choices=["none", "balanced"], help="of the loss; "
         "balanced: 1 / sqrt(f), f the class's share of the labelled training pixels, scaled to a "
         "mean of 1 over these pixels (default none)")
    flag("--labels", type=share, default=1.0, help="fraction of the training tiles whose labels "
         "are used, drawn by seed (default 1)")
    flag("--seeds", type=positive, default=1, help="runs, with seeds 0, 1, ...: weights of the "
         "head, order, crops, choice of --labels (default 1; seeds differ by up to a point "
         "of mIoU, so compare over 5)")

    flag = parser.add_argument_group("output").add_argument
    flag("--out", type=Path, default=Path("out/results"), help="folder; results.jsonl in it gains "
         "a row for each seed that has none of the same settings there, and a model_*.safetensors "
         "for predict.py, of the seed with the best validation mIoU (default out/results)")
    flag = parser.add_argument_group("machine").add_argument
    flag("--device", default="auto", choices=["auto", "cpu", "cuda"],
         help="where to run (default auto: cuda where there is one)")
    flag("--precision", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
         help="autocast of the encoder and upernet (default auto: bfloat16 on a GPU that has it, "
         "else float16; float32 on the CPU)")
    flag("--compile", action=argparse.BooleanOptionalAction, default=False,
         help="torch.compile the encoder (default no)")
    return checked(parser, parser.parse_args(argv))


def checked(parser, args):
    """The args, completed; the parser says which do not go together."""
    own, probes = args.task == "geotiff", args.protocol in PROBES
    needless = [  # flags, whether they mean nothing here, and why
        (["images", "masks", "labels_file"], own and args.root,
         "and --root both say where the task is; keep one"),
        (["labels_file"], args.masks, "and --masks are both labels; keep one"),
        (["images", "masks", "labels_file", "label_field", "classes", "ignore_index", "clouds",
          "splits", "block", "val", "test"], not own,
         f"is for --task geotiff; {args.task} has its own"),
        (["head", "crop", "epochs", "lr", "schedule", "weight_decay", "layer_decay", "clip",
          "class_weights", "device_batch"], probes,
         f"means nothing to --protocol {args.protocol}; it trains no head"),
        (["remove_place"], not probes, "is for --protocol knn and ridge"),
        (["layer_decay"], args.protocol == "linear",
         "is for --protocol finetune; linear leaves the encoder as it is"),
        (["heads"], args.encoder == "random",
         "is for weights; --encoder random has those of its --model"),
    ]
    for name in ("dates", "pastis_classes"):
        takes = [k for k, v in sets("TASKS").items() if name in signature(v.open).parameters]
        needless.append(([name], args.task not in takes,
                         f"is not for --task {args.task}, but --task {' or '.join(takes)}"))
    for names, refused, reason in needless:
        for name in names:
            if refused and getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} {reason}")
    for wrong, sentence in [
        (own and not args.root and not (args.images and (args.masks or args.labels_file)),
         "no task; name --task with --root (see --list-tasks), or --images and --masks, or "
         "--labels-file, of your own"),
        (bool(args.labels_file) != bool(args.label_field), "--labels-file and --label-field go "
         "together: a file of polygons, and the field that tells their class"),
        (not own and args.root is None, f"--task {args.task} needs --root, the folder of the set "
         "as published; --list-tasks says where to get it"),
        (not own and args.bands and isinstance(args.bands[0], int),
         f"--bands of --task {args.task} are names (see --list-tasks)"),
        (args.splits is None and args.val + args.test >= 1,
         f"--val {args.val} and --test {args.test} leave nothing to train on"),
    ]:
        if wrong:
            parser.error(sentence)
    trains = args.protocol == "finetune"
    args.tile = args.tile or (64 if own else None)
    args.lr = args.lr or (1e-4 if trains else 1e-3)
    if args.weight_decay is None:
        args.weight_decay = 0.05 if trains else 0.0
    return args
# fmt: on


def numbers(text):
    return tuple(int(word) for word in text.split(","))


def band_list(text):
    """Names, or ints where all are whole numbers."""
    words = [word.strip() for word in text.split(",")]
    if "" in words or len({word.isdecimal() for word in words}) > 1:
        raise argparse.ArgumentTypeError(f"{text} is no list of names, or of positions, alone")
    return [int(word) for word in words] if words[0].isdecimal() else words


def load(args):
    """The task of --task; folders of GeoTIFFs are found under --root or given one by one."""
    if args.task != "geotiff":
        return load_task(
            args.task, args.root, bands=args.bands, tile=args.tile, dates=args.dates,
            pastis_classes=args.pastis_classes, split_seed=args.split_seed,
        )  # fmt: skip
    folder = own_folder(args.root) if args.root else {
        "images": args.images, "masks": args.masks, "polygons": args.labels_file,
        "field": args.label_field, "classes": classes_beside(args.images, args.masks),
    }  # fmt: skip
    if folder["classes"] and not args.classes:
        print(f"classes as {folder['classes']} names them")
    folder |= {k: v for k in ("classes", "splits") if (v := getattr(args, k)) is not None}
    return load_folder(
        **folder, bands=args.bands, ignore_index=args.ignore_index, tile=args.tile,
        clouds=args.clouds, block=args.block, val=args.val, test=args.test,
        split_seed=args.split_seed,
    )  # fmt: skip


def check_encoder(encoder, name, task, image_size):
    """Raise ValueError if the encoder does not read the task's bands or the image size."""
    wanted, patch = [] if name in UNREAD else bands_of(encoder), encoder.patch_size
    if encoder.in_channels != len(task.bands):
        raise ValueError(
            f"--encoder {name} reads {encoder.in_channels} bands ({','.join(wanted) or 'unnamed'}),"
            f" the task has {len(task.bands)}; choose and order them with --bands, or take an "
            "encoder of that data"
        )
    # folders of one's own may name bands in some files only, and take positions
    own = task.name == "geotiff"
    named = [(file.path, file.band_names) for file in task.files if file.band_names] if own else []
    for path, names in named or [(task.name, task.bands)]:
        places = list(task.positions) if named else list(range(len(names)))
        meant, means = meanings(wanted), meanings(names)  # Blue and B02 are one band
        found = [means[place] for place in places]
        if found != meant and sorted(found) == sorted(meant):
            order = [str(places[found.index(band)]) for band in meant] if own else wanted
            raise ValueError(
                f"--encoder {name} reads the bands {','.join(wanted)}, but those of {path} come as "
                f"{','.join(names[place] for place in places)}; pass --bands "
                + shlex.quote(",".join(order))
            )
    if image_size % patch:
        raise ValueError(
            f"--image-size {image_size} is no multiple of the encoder's patch of {patch} px; try "
            f"{max(1, round(image_size / patch)) * patch}"
        )


def load_epoch(path, modules, generator, ranks):
    """Read the checkpoint of a seed, if the first rank has one, into modules by name and the
    generator; returns what `train` wants to know of the epochs that are done, a dict."""
    if not ranks.first(path.is_file):
        return {"epoch": 0, "val_miou": -1.0, "best_epoch": 0, "weights": None, "history": []}
    saved = read_checkpoint(path, ranks, "remove it to start the seed anew")
    for name, module in modules.items():
        module.load_state_dict(saved.pop(name))
    generator.set_state(saved.pop("generator"))
    return saved


def train(args, segmenter, task, chosen, read, generator, ranks, path):
    """Train on the chosen tiles by split, and leave the best epoch's weights in the segmenter.

    read: from a split and lists of tiles in it to a stream of their images or tokens, and labels.
    path: of the checkpoint, from which an interrupted seed goes on. Returns {"val_miou",
    "best_epoch", "history": loss and validation mIoU of each epoch, and of the test split "matrix"
    and "miou_batchmean"}.
    """
    device, seed = ranks.device, generator.initial_seed()
    frozen = args.protocol != "finetune"
    classes, size = len(task.classes), (args.image_size, args.image_size)
    tile, batch = task.labels.shape[-1], args.global_batch

    segmenter.encoder.requires_grad_(not frozen)
    trained = segmenter.head if frozen else segmenter
    groups = [{"params": trained.parameters(), "scale": 1.0}]
    if not frozen:
        groups = layer_groups(segmenter, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay)
    params = [weight for group in optimizer.param_groups for weight in group["params"]]
    scaler = torch.amp.GradScaler(device.type, enabled=segmenter.dtype == torch.float16)
    weights = None
    if args.class_weights == "balanced":
        weights = balanced_weights((task.labels[k] for k in chosen["train"]), classes).to(device)

    def score(split, image_size=None):
        """`judge` of a split whose batches are dealt to the ranks: all's matrix, own scores."""
        parts = chunks(chosen[split], batch)[ranks.rank :: ranks.world]
        matrix, scores = judge(segmenter, read(split, parts), classes, image_size)
        return ranks.sum([matrix.to(device)])[0], scores

    count = len(chosen["train"])
    an_epoch = math.ceil(count / batch)
    steps = args.epochs * an_epoch
    modules = {"model": trained, "optimizer": optimizer, "scaler": scaler}
    done = load_epoch(path, modules, generator, ranks)
    step, stops, told = done["epoch"] * an_epoch, Stop(ranks), f"seed {seed}, {args.protocol}"
    with tqdm(total=steps, initial=step, desc=told, unit="step") as bar:
        for epoch in range(done["epoch"] + 1, args.epochs + 1):
            order = torch.randperm(count, generator=generator).split(batch)
            # each rank takes its share of a global batch, of the last one it may be no tile
            shares = [k.tensor_split(ranks.world)[ranks.rank].numpy() for k in order]
            stream = read("train", [chosen["train"][k] for k in shares])
            total = torch.zeros((), device=device)
            for k, (x, labels) in zip(order, stream, strict=True):
                if args.crop:  # drawn by position in the global batch
                    windows = torch.from_numpy(draw_crops(seed, step, len(k))) * tile
                    windows = windows.tensor_split(ranks.world)[ranks.rank]
                    labels = crop_labels(labels, windows, tile)
                decay = (1 + math.cos(math.pi * step / steps)) / 2
                for group in optimizer.param_groups:
                    scale = group["scale"] * (decay if args.schedule == "cosine" else 1)
                    group["lr"] = args.lr * scale
                # the loss is a mean over the labelled pixels of the whole global batch
                (counted,) = ranks.sum([labelled(labels, weights)])
                most = args.device_batch or max(len(x), 1)
                for part in (slice(at, at + most) for at in range(0, len(x), most)):
                    images = resample_series(x[part], windows[part], size) if args.crop else x[part]
                    loss = segmentation_loss(segmenter(images), labels[part], weights, counted)
                    scaler.scale(loss).backward()
                    total += loss.detach()
                # summed by hand: DistributedDataParallel takes a mean, and wants a backward pass of
                # each rank, of which one may have no tile in the last batch of an epoch
                if ranks.world > 1:
                    for weight in params:
                        weight.grad = weight.grad if weight.grad is not None else 0 * weight.data
                    ranks.sum([weight.grad for weight in params])
                if args.clip:
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(params, args.clip)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                step += 1
                bar.update()
                stops.check(f"in epoch {epoch} of seed {seed}")
            last = ranks.sum([total])[0].item() / an_epoch  # a device sync, so once an epoch
            if not math.isfinite(last):
                raise ValueError(f"loss {last} in epoch {epoch}; lower --lr")
            val, _ = mean_iou(score("val")[0])
            done |= {"epoch": epoch, "history": [*done["history"], [last, val]]}
            if val > done["val_miou"]:
                state = {name: value.clone() for name, value in trained.state_dict().items()}
                done |= {"val_miou": val, "best_epoch": epoch, "weights": state}
            if ranks.rank == 0:
                state = {name: module.state_dict() for name, module in modules.items()}
                state |= {"generator": generator.get_state()} | done
                save_sealed(state, path)
            bar.set_postfix(loss=f"{last:.3f}", val=f"{val:.4f}", best=f"{done['val_miou']:.4f}")
    trained.load_state_dict(done["weights"])
    matrix, scores = score("test", args.image_size)
    return {
        **{key: done[key] for key in ("val_miou", "best_epoch", "history")},
        "matrix": matrix,
        "miou_batchmean": mean_of([*chain(*ranks.gather(scores))]),
    }


def untrained(encoder):
    """Whether --encoder is drawn by the seed."""
    return encoder.split(":")[0] == "random"


def build(args, template, classes, seed, device, dtype):
    """The segmentation model that a seed starts from."""
    torch.manual_seed(seed)
    encoder = ViT(**template.config) if untrained(args.encoder) else copy.deepcopy(template)
    torch.manual_seed(seed)  # the same head, whatever encoder was drawn before it
    segmenter = Segmenter(encoder, classes, args.image_size, args.head).to(device)
    segmenter.dtype = dtype
    if args.compile:
        segmenter.features = torch.compile(segmenter.features)
    return segmenter


def resample_series(images, windows, size):
    """`data.resample` of images (B, bands, h, w) or time series (B, dates, bands, h, w)."""
    flat = resample(images.flatten(1, -3), windows, size)
    return flat.unflatten(1, images.shape[1:-2])


def judge_seed(args, template, tiles, seed, ranks, dtype, path):
    """Train and score one model -> what its row and its files are made of, a dict."""
    start, task = time.perf_counter(), tiles.task
    segmenter = build(args, template, len(task.classes), seed, ranks.device, dtype)
    about = {"seed": seed, "encoder_hash": weights_hash(segmenter.encoder)}
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(tiles.of["train"]), generator=generator)
    order = order[: max(1, round(args.labels * len(order)))].numpy()
    chosen = {**tiles.of, "train": tiles.of["train"][order]}
    if args.protocol in PROBES:
        stops = Stop(ranks)

        def read(split, parts):
            for x, labels in tiles.read(split, parts):
                stops.check(f"in seed {seed}")
                yield x if x.ndim == 3 else segmenter.features(x), labels

        found = probe(
            segmenter.encoder, task, args.protocol, args.image_size, train=chosen["train"],
            seed=seed, batch=args.global_batch, read=read, place=not args.remove_place,
        )  # fmt: skip
        if found["head"]:  # ridge regression is a linear head
            weight, bias = found["head"]
            segmenter.head.load_state_dict({"weight": weight, "bias": bias})
        found |= {"best_epoch": None, "history": None}
    else:
        if args.protocol == "linear" and not tiles.kept:  # random weights are of this seed alone
            tiles = keep(args, tiles, segmenter, ranks)
        found = train(args, segmenter, task, chosen, tiles.read, generator, ranks, path)
    trained = segmenter if args.protocol == "finetune" else segmenter.head
    return about | {
        **{key: found[key] for key in ("val_miou", "best_epoch", "history", "miou_batchmean")},
        "matrix": found["matrix"].cpu(),
        "state": {name: value.cpu() for name, value in trained.state_dict().items()},
        "tiles": {split: len(index) for split, index in chosen.items()},
        "seconds": round(time.perf_counter() - start, 2),
    }


def keep(args, tiles, segmenter, ranks):
    """`tiles` with the tokens of those that a frozen encoder sees only as they are, once."""
    stops, cropped = Stop(ranks), args.crop and args.protocol not in PROBES
    return tiles.keep(
        segmenter, SPLITS[1:] if cropped else SPLITS, args.global_batch, ranks,
        after=lambda: stops.check("while tiles were encoded"),
    )  # fmt: skip


def open_task(args):
    """The encoder and the task of the flags, and the mean and std that normalise its bands;
    everything wrong with them is raised here."""
    if args.encoder not in UNREAD:
        template = load_encoder(args.encoder.removeprefix("random:"), args.heads)
    task = load(args)
    if args.split_hash and args.split_hash.lower() != task.split_hash:
        raise ValueError(
            f"--split-hash {args.split_hash}: the splits of {args.task} have {task.split_hash}; "
            "they are others than those wanted, so compare the files and --split-seed"
        )
    if args.encoder == "random":
        template = vit(args.model, in_channels=len(task.bands), patch_size=args.patch)
    if args.encoder == "pixels":
        if args.protocol == "finetune" or args.head == "upernet":
            raise ValueError("--encoder pixels: has nothing to fine-tune, and no blocks; probe it")
        template = Pixels(len(task.bands), args.patch)
    check_encoder(template, args.encoder, task, args.image_size)
    if args.stats == "task":
        return template, task, task.mean, task.std
    if "mean" not in template.meta or "std" not in template.meta:
        raise ValueError(
            f"--stats encoder: {args.encoder} carries no mean and std; use --stats task"
        )
    return template, task, np.array(template.meta["mean"]), np.array(template.meta["std"])


def describe(args, template, tiles, ranks, precision):
    """What the rows of all seeds share, a dict; "run" changes with all that a result depends on."""
    task = tiles.task
    trained = not untrained(args.encoder) and args.encoder not in UNREAD
    commit, edits = git_state()
    cuda = ranks.device.type == "cuda"
    facts = {
        "task": task.name,
        "data_hash": fingerprint(task),
        "mean": tiles.mean.tolist(),
        "std": tiles.std.tolist(),
        "architecture": template.config,
        "precision": precision,
    }
    weights = weights_hash(template) if trained else args.encoder.split(":")[0]
    on = [facts, weights, [getattr(args, name) for name in PROTOCOL]]
    meta = template.meta if trained else {}
    return facts | {
        "encoder": args.encoder,
        "pretraining": {name: meta[name] for name in PRETRAINING if name in meta},
        "split_hash": task.split_hash,
        "run": hashlib.sha256(json.dumps(on, sort_keys=True).encode()).hexdigest()[:12],
        "protocol": args.protocol,
        "head": args.head,
        "split_by": task.split_by,
        "tile": task.labels.shape[-1],
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "commit": commit and commit + "-dirty" * bool(edits),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "ranks": ranks.world,
    }


def write_seed(args, template, tiles, facts, found, rows, model):
    """Write the files and the row of a seed, and add the row to `rows`, those of the run."""
    task, seed = tiles.task, found["seed"]
    matrix, (miou, iou) = found["matrix"], mean_iou(found["matrix"])
    by_name = zip(task.classes, iou.tolist(), strict=True)
    confusion = f"confusion_{args.protocol}_{facts['run']}_seed{seed}.csv"
    write_matrix(args.out / confusion, matrix.tolist(), task.classes)
    best = max((row["val_miou"] for row in rows.values() if row["model"]), default=-1)
    if model and (found["val_miou"] > best or not (args.out / model).is_file()):
        segmenter = build(args, template, len(task.classes), seed, torch.device("cpu"), None)
        trained = segmenter if args.protocol == "finetune" else segmenter.head
        trained.load_state_dict(found["state"])
        save_segmenter(
            args.out / model, segmenter, classes=list(task.classes),
            bands=list(task.bands) if all(task.bands) else [],
            positions=list(task.positions), file_bands=task.file_bands, mean=facts["mean"],
            std=facts["std"], tile=facts["tile"], gsd=task.gsd, encoder=args.encoder,
            sources=template.meta.get("sources", []), task=task.name, protocol=args.protocol,
            seed=seed, val_miou=found["val_miou"], miou=miou, scaling=task.scaling,
        )  # fmt: skip
    rows[seed] = {
        **{key: value for key, value in found.items() if key not in ("matrix", "state")},
        **facts,
        "miou": miou,
        "accuracy": (matrix.diagonal().sum() / matrix.sum()).item(),
        # None: no part of the mean
        "iou": {name: None if math.isnan(value) else value for name, value in by_name},
        "model": model,  # one file for all seeds: the best of them
        "confusion": confusion,
        "finished": datetime.now().strftime("%Y%m%d-%H%M%S"),
    }
    append_row(args.out / "results.jsonl", rows[seed])


def evaluate(args, ranks):
    """Train and score one model per seed; everything wrong with the input is raised before."""
    ranks.first(lambda: check_output(args.out))
    template, task, mean, std = open_task(args)
    tiles = Tiles(task, mean, std, ranks.device)
    precision = precision_of(args.precision, ranks.device)
    dtype, facts = getattr(torch, precision), describe(args, template, tiles, ranks, precision)
    results, classes, run = args.out / "results.jsonl", task.classes, facts["run"]
    frozen, drawn = args.protocol != "finetune", untrained(args.encoder)

    def take():  # by rank 0, which alone reads and writes results
        """The folder for this process alone, and the rows that another one has left in it."""
        args.out.mkdir(parents=True, exist_ok=True)
        results.touch()
        hold(args.out, f"{args.protocol}_{run}.lock")
        return {row["seed"]: row for row in read_results(results) if row.get("run") == run}

    rows = ranks.first(take)
    seeds = range(args.seeds)
    if args.protocol == "ridge" and args.labels == 1 and not drawn and args.seeds > 1:
        seeds = range(1)
        print("ridge on all labels draws nothing by the seed: one row, of seed 0")
    todo = [seed for seed in seeds if seed not in rows]
    print(
        f"task {task.name} {facts['data_hash']}: {len(task.bands)} bands, {len(classes)} classes "
        f"({', '.join(classes)[:60]}), {facts['tile']} px tiles: "
        + ", ".join(f"{len(index)} {split}" for split, index in tiles.of.items())
        + f" (split by {task.split_by}, --split-hash {task.split_hash})"
        + "".join(f"; mask value {value:g} is nodata and ignored" for value in task.nodata)
    )
    model = None
    if args.encoder != "pixels" and args.protocol != "knn" and not args.remove_place:
        model = f"model_{args.protocol}_{run}.safetensors"

    # one rank and one seed of a probe: the tokens are needed once, so not kept
    once = args.protocol in PROBES and ranks.world == len(todo) == 1
    # all ranks fine-tune one seed together; of a frozen encoder each takes another seed
    team, width = (ranks._replace(rank=0, world=1), ranks.world) if frozen else (ranks, 1)

    def checkpoint(seed):
        return args.out / f"ckpt_{args.protocol}_{run}_seed{seed}.pt"

    with Stop.listening():
        if frozen and not drawn and todo and not once:
            segmenter = build(args, template, len(classes), 0, ranks.device, dtype)
            tiles = keep(args, tiles, segmenter, ranks)
        for turn in chunks(todo, width):
            own, found = turn[ranks.rank : ranks.rank + 1] if frozen else turn, None
            for seed in own:
                found = judge_seed(args, template, tiles, seed, team, dtype, checkpoint(seed))
            for each in ranks.gather(found) if frozen else [found]:
                if each and ranks.rank == 0:
                    write_seed(args, template, tiles, facts, each, rows, model)
                    checkpoint(each["seed"]).unlink(missing_ok=True)

    if ranks.rank == 0:
        print_table([rows[seed] for seed in seeds], classes)
        print(f"\nrows added to {results}: {len(todo)}")
        if len(todo) < len(seeds):
            print(f"rows of the same settings there before: {len(seeds) - len(todo)}")
        if model and (args.out / model).is_file():
            print(
                f"model of the best seed: {args.out / model}; a map with it:\n"
                "    python predict.py --model "
                f"{shlex.quote(str(args.out / model))} scene.tif map.tif"
            )


def start(args):
    # a rank without a seed of its own waits for those of others, for hours
    ranks = start_ranks(args.device, patience=timedelta(days=7))
    with ranks.quiet():
        evaluate(args, ranks)


def main(argv=None):
    left = "finished seeds keep their rows; the same command goes on from there"
    script(start, partial(parse_args, argv), left)


if __name__ == "__main__":
    main()
