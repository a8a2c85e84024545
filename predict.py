"""Class maps of whole scenes: an image in, a GeoTIFF on the same pixels out.

    python predict.py --model out/results scene.tif map.tif
    python predict.py --model out/results --probabilities --png scenes/ maps/
    python predict.py --model out/sa --features --int8 S2B_MSIL2A_20220301.SAFE features.tif

The model says which bands it reads, their statistics and its classes. Windows of --tile px are
resized to what the encoder sees and overlap; their logits are blended with smooth weights whose sum
is 1 everywhere. So are the encoder's tokens for --features, from windows that move by whole tokens.
The scene is read, blended and written by rows of windows: memory depends on its width, not on its
height. Beyond its edges windows see its mirror image. Pixels without data stay without: 255 in
class maps, NaN in the others.
"""

import math
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from datasets.images import (
    header,
    list_images,
    name_of,
    open_image,
    read_rows,
    scaling_of,
    to_unit,
)
from figures import class_colours, composite, optional, paint, save_figure
from imagery import raster
from imagery.bands import positions
from run import Parser, positive, script, whole
from segment import Segmenter, load_segmenter, resize
from weights import bands_of, load_encoder, read_tensors

NO_CLASS = 255  # nodata of the class maps; so they hold at most 255 classes
PREVIEW = 1000  # px a side at most, of --png


# fmt: off
def parse_args(argv=None):
    parser = Parser(
        prog="predict.py", description="Class maps, probabilities and features of whole scenes.",
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("scenes", nargs="+", help="GeoTIFFs or JPEG 2000, scenes of one file per band, SAFE "
         "folders, .zip or .tar of them, folders of any of these, or glob patterns in quotes")
    flag("out", type=Path, help="a GeoTIFF for one scene, or a folder, where each map is named as "
         "its scene")
    flag = parser.add_argument_group("model").add_argument
    flag("--model", required=True, help="model_*.safetensors of finetune.py, or its results folder "
         "(then the best); with --features also a pretraining run or a weights file")
    flag("--heads", type=positive, help="attention heads, for weights whose width does not tell")
    flag("--image-size", type=positive, help="pixels a side that an encoder alone sees (default: "
         "as it was pretrained, at most 224; a segmentation model knows its own)")

    flag = parser.add_argument_group("scene").add_argument
    flag("--bands", type=lambda text: text.split(","), help="names or 0-based positions in the "
         "scenes, in the order that the model reads, such as 2,1,0,3 (default: found by name, else "
         "as in the model's training files, else all in order)")
    flag("--scale", type=float, default=1.0, help="pixel values are multiplied by it, such as "
         "10000 for reflectances where the model was trained on x 10000 (default 1)")
    flag("--offset", type=float, help="added to pixel values before --scale, such as -1000 for "
         "Sentinel-2 products since baseline 04.00 (default: what SAFE folders say, else 0)")

    flag = parser.add_argument_group("windows").add_argument
    flag("--tile", type=positive, help="pixels of the scene per side of a window (default: as the "
         "model was trained; 64 for an encoder alone)")
    flag("--overlap", type=whole, help="pixels that neighbouring windows share (default "
         "half of --tile and half a token, for --features 7/8 of --tile; less is faster and shows "
         "seams)")
    flag("--batch", type=positive, default=32, help="windows at once (default 32)")
    flag("--device", default="auto", choices=["auto", "cpu", "cuda"],
         help="where to run (default auto: cuda where there is one)")

    flag = parser.add_argument_group("output").add_argument
    flag("--probabilities", action="store_true", help="also write OUT_probabilities.tif: a float32 "
         "band per class, rounded to 11 bits")
    flag("--features", action="store_true", help="also write OUT_features.tif: the encoder's "
         "tokens, a float32 band per channel, rounded to 11 bits, a pixel per token (in a pass of "
         "its own); OUT itself for an encoder alone")
    flag("--int8", action="store_true", help="write --features in 8 bits, a quarter of the size: "
         "each band's scale and offset tags say what its values 0 to 254 mean, 255 is nodata")
    flag("--png", action="store_true", help="also write OUT.png: scene and map side by side, with "
         f"legend, at most {PREVIEW} px a side")
    flag("--overwrite", action="store_true", help="replace outputs that exist (default: refuse)")
    args = parser.parse_args(argv)
    if not (math.isfinite(args.scale) and args.scale and math.isfinite(args.offset or 0)):
        parser.error(f"--scale {args.scale} and --offset {args.offset} make no pixel values")
    if args.int8 and not args.features:
        parser.error("--int8 is for --features")
    return args
# fmt: on


# ---- the model, and what it reads of a scene --------------------------------------------------


def load_model(path, tile, image_size, heads, device):
    """The `Segmenter` of a saved model or a results folder; of a pretraining run or weights one
    without classes, whose head nobody asks. meta["tile"]: px of a scene that it sees at once."""
    path = Path(path)
    results = path.is_dir() and (path / "results.jsonl").exists()
    if results or (path.is_file() and "segmenter" in (read_tensors(path)[1] or {})):
        if image_size or heads:
            raise ValueError(f"--image-size and --heads: {path} says its own; leave them out")
        model = load_segmenter(path)
    else:
        encoder = load_encoder(path, heads)
        patch = encoder.patch_size
        size = image_size or max(1, min(224, encoder.meta.get("mr_size", 224)) // patch) * patch
        if size % patch:
            raise ValueError(f"--image-size {size}: no multiple of the encoder's {patch} px patch")
        model = Segmenter(encoder, 1, size).eval()
        model.meta = encoder.meta | {"classes": [], "bands": bands_of(encoder), "tile": 64}
    model.meta["tile"] = tile or model.meta["tile"]
    return model.to(device)


def token_unit(model):
    """The fewest px of a scene that are whole tokens."""
    return model.meta["tile"] // math.gcd(model.meta["tile"], model.grid)


def choose_bands(about, model, flag=None):
    """Where in a scene the bands are that the model reads, in its order, and how they were found.

    flag: list of names or positions as text, or None. Raises ValueError where nothing tells.
    """
    count, own = model.encoder.in_channels, model.meta.get("bands") or []
    fit = (
        f"{about.path} has {about.bands} bands ({','.join(about.band_names) or 'unnamed'}), the "
        f"model reads {count} ({','.join(own) or 'unnamed'})"
    )
    if flag:
        bands = positions(flag, about.band_names)
        if min(bands) < 0 or len(bands) != count or max(bands) >= about.bands:
            raise ValueError(
                f"--bands {','.join(flag)}: {fit}; give a name, or a position counted from 0, for "
                "each of the model's"
            )
        return bands, "--bands"
    bands = positions(own, about.band_names)
    if bands and min(bands) >= 0:
        return bands, "by name"
    if bands and max(bands) >= 0:
        missing = ",".join(name for name, band in zip(own, bands, strict=True) if band < 0)
        raise ValueError(f"{fit}; none is {missing}, so choose with --bands")
    if model.meta.get("positions") and about.bands == model.meta.get("file_bands"):
        return list(model.meta["positions"]), "at the positions of the training files"
    if about.bands == count:
        return list(range(count)), "in the scene's order, as no names tell"
    raise ValueError(f"{fit}; choose, such as --bands {','.join(map(str, range(count)))}")


def gsd_warning(about, model):
    """A sentence if pixels are over 20 % larger or smaller than those of the training, or None."""
    trained, found = model.meta.get("gsd"), about.gsd
    if not trained or not found:
        return None
    degree = 111_320  # metres; along the sides of a square of the pixel's area
    if raster.is_geographic(about.crs):
        middle = math.radians((about.bounds[1] + about.bounds[3]) / 2)
        degree *= math.sqrt(abs(math.cos(middle)))
    trained, found = (gsd * degree if gsd < 0.01 else gsd for gsd in (trained, found))
    if 1 / 1.2 <= found / trained <= 1.2:
        return None
    fit = max(1, round(model.meta["tile"] * trained / found))
    return (
        f"{about.path}: pixels of {found:.4g} m, the model was trained on {trained:.4g}; "
        f"--tile {fit} would show it the scale that it knows"
    )


def pixels_of(part, valid):
    """Pixels (bands, rows, cols) as float32, NaN where one is missing or not valid (rows, cols)."""
    pixels = part.astype(np.float32)
    return np.where(valid & np.isfinite(pixels), pixels, np.float32("nan"))


def survey(source):
    """Read a scene once, so that a damaged tile is found before the work.

    Returns mean and std (bands,) of its valid pixels, NaN if it has none, and a small picture
    (bands, h, w) float32, NaN in holes; all in the file's units.
    """
    step = -(-max(source.info.height, source.info.width) // PREVIEW)
    row, parts = 0, []
    for part, valid in read_rows(source):
        some = slice(-row % step, None, step), slice(None, None, step)
        parts.append(pixels_of(part[:, *some], valid[some]))
        row += part.shape[1]
    picture = np.concatenate(parts, axis=1)
    seen = picture[:, ~np.isnan(picture).any(0)].astype(np.float64)
    if not seen.size:
        return *np.full((2, len(picture)), np.nan), picture
    return seen.mean(1), seen.std(1), picture


def units(source, model, scale, offset, mean):
    """(gain, shift), arrays (bands,), from a Source's pixels to the model's units, by what its
    product says is to be added, else by `offset`; by tags of scale and offset; then by `scale`.

    A model of finetune.py knows the tags of its files. Pretraining keeps none, and statistics
    alone: the tags count where they bring the scene's `mean` (bands,) closer to those.
    """
    if offset is not None:
        source = source._replace(offset=offset)
    elif source.offset:
        print(f"{source.info.path}: {source.offset:g} is added to its pixels, as its product says")
    own, meta = scaling_of(source), model.meta
    ways = [[tuple(pair) for pair in meta["scaling"]]] if meta.get("scaling") else [own]
    if "scaling" not in meta and "mean" in meta:
        ways.append([(1.0, 0.0)] * len(own))
    changes = [[each * scale for each in to_unit(source, way)] for way in ways]
    off = [abs((mean * gain + shift - meta.get("mean", 0)) / meta.get("std", 1)).sum()
           for gain, shift in changes]  # fmt: skip
    best = int(np.argmin(off))  # of equals, and of NaN, the first
    if ways[best] != own:
        print(f"{source.info.path}: its tags say scale and offset {own[0]}, the model's files had "
              f"{ways[best][0]}; its pixels are brought to those")  # fmt: skip
    return changes[best]


def scale_warning(path, mean, std, model):
    """A sentence if a scene's statistics are far from those that the model was trained with."""
    if "mean" not in model.meta:
        return None
    trained = [np.array(model.meta[key]) for key in ("mean", "std")]
    spread = std / trained[1]
    if not ((abs(mean - trained[0]) > 2 * trained[1]) | (spread > 4) | (spread < 1 / 4)).any():
        return None
    shown = [",".join(f"{v:.4g}" for v in values) for values in (mean, std, *trained)]
    return (
        f"{path}: the bands have mean {shown[0]} and std {shown[1]}, the model was trained on "
        f"mean {shown[2]} and std {shown[3]}; if units differ, pass --scale or --offset"
    )


# ---- windows ----------------------------------------------------------------------------------


def window_starts(size, tile, overlap, unit=1):
    """Where windows begin along a side of `size` px: the last one ends at the edge, or beyond it by
    less than `unit` px; a side smaller than a window has one window. All are multiples of unit."""
    stride = max(unit, (tile - overlap) // unit * unit)
    last = max(0, -((tile - size) // unit) * unit)
    return [*range(0, last, stride), last]


def blend_weights(starts, side):
    """Weights (len(starts), side) of windows along an axis: a smooth bell, divided by what all
    windows over a place sum to, so that they sum to 1 there."""
    bell = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
    total = np.zeros(starts[-1] + side)
    for start in starts:
        total[start : start + side] += bell
    return torch.tensor(np.stack([bell / total[s : s + side] for s in starts])).float()


def window_rows(parts, height, width, starts, tile):
    """Rows of windows of a scene: yields (bands, tile, width) for each start.

    parts: iterator over the scene's rows, (bands, n, ...), all `height`. Beyond the bottom and the
    right edge, up to `width`, lies the mirror image.
    """
    top, held = 0, next(parts)
    for start in starts:
        while top + held.shape[1] < min(start + tile, height):
            held, top = np.concatenate([held[:, start - top :], next(parts)], axis=1), start
        rows = held[:, start - top : start - top + tile]
        pad = [(0, 0), (0, tile - rows.shape[1]), (0, width - rows.shape[2])]
        yield np.pad(rows, pad, mode="symmetric")


@torch.inference_mode()
def predict(model, source, mean, std, *, tokens=False, overlap=None, batch=32):
    """Classify or encode a scene: yields finished rows, top to bottom, on the model's device.

    Rows are (values, valid): logits (classes, n, width) float32 or, if `tokens`, the encoder's
    (D, n, token columns), and where there is data, bool (n, width or token columns). A token covers
    tile / grid px, the first one begins at the scene's corner; n differs between rows and may be 0.
    source: datasets.common.Source of the bands in the model's order. mean, std: (bands,), in its
    units. overlap: px, default for logits half a window and half a token, for tokens 7/8 of one.
    """
    about, tile, grid = source.info, model.meta["tile"], model.grid
    device = next(model.parameters()).device
    if overlap is None:
        # tokens carry their place in the window, which averages out over eight places a side. Where
        # one window has the border of a token, the next is to have its centre, so that the kinks
        # that bilinear logits have there even out
        half = min(3 * tile // 4, math.ceil((tile + tile / grid) / 2))
        overlap = tile - tile // 8 if tokens else half
    # tokens of different windows must lie on one grid, so windows move by whole tokens
    side, unit = (grid, token_unit(model)) if tokens else (tile, 1)
    rows, cols = (window_starts(n, tile, overlap, unit) for n in (about.height, about.width))
    height, width = (-(-n * side // tile) for n in (about.height, about.width))
    down, across = ([start * side // tile for start in starts] for starts in (rows, cols))
    to_rows, to_cols = (blend_weights(starts, side).to(device) for starts in (down, across))
    ends = [*down[1:], down[-1] + side]  # of what no later row of windows touches
    # the weighted sums of one row of windows are held, whatever the height
    channels = model.encoder.dim if tokens else len(model.meta["classes"])
    sums = torch.zeros(channels, side, across[-1] + side, device=device)

    mean, std = (torch.tensor(x).float().to(device)[:, None, None] for x in (mean, std))
    parts = (pixels_of(*part) for part in read_rows(source))
    parts = window_rows(parts, about.height, cols[-1] + tile, rows, tile)
    label = f"{about.path.name}, {'tokens' if tokens else 'classes'}"
    with tqdm(total=len(rows) * len(cols), desc=label, unit=" windows") as bar:
        for row, part in enumerate(parts):
            strip = torch.from_numpy(part).to(device)
            valid = ~strip.isnan().all(0)
            # what is missing is the mean, as in training
            strip = ((strip - mean) / std).nan_to_num(0.0)
            columns = valid.any(0).cpu().numpy()
            filled = [k for k, col in enumerate(cols) if columns[col : col + tile].any()]
            bar.update(len(cols) - len(filled))
            for some in (filled[k : k + batch] for k in range(0, len(filled), batch)):
                images = torch.stack([strip[..., cols[k] : cols[k] + tile] for k in some])
                if tokens:
                    windows = model.tokens(images).mT.unflatten(2, (grid, grid))
                else:
                    windows = resize(model(images), (tile, tile))
                for k, window in zip(some, windows, strict=True):
                    weight = to_rows[row, :, None] * to_cols[k]
                    sums[:, :, across[k] : across[k] + side] += weight * window
                bar.update(len(some))
            count = ends[row] - down[row]
            done = sums[:, : min(count, max(0, height - down[row])), :width]
            # a token has data where any of its pixels has
            valid = F.adaptive_max_pool2d(valid[None].float(), (side, across[-1] + side))[0] > 0
            yield done, valid[: done.shape[1], :width]
            sums = F.pad(sums[:, count:], (0, 0, 0, count))


# ---- outputs ----------------------------------------------------------------------------------


def output_paths(scenes, out, model, args):
    """{scene: {kind: path}} for the kinds that were asked for; raises before anything is lost.
    scenes: {path: files}."""
    folder = out.is_dir() or len(scenes) > 1 or out.suffix.lower() not in (".tif", ".tiff")
    if folder and out.is_file():
        raise ValueError(f"{out}: a file, but {len(scenes)} scenes need a folder")
    outputs, taken = {}, {scene.resolve() for scene in scenes}
    for scene, files in scenes.items():
        base, kinds = out / f"{name_of(scene, files)}.tif" if folder else out, {}
        if model.meta["classes"]:
            kinds["map"] = base
        if args.probabilities:
            kinds["probabilities"] = base.with_stem(f"{base.stem}_probabilities")
        if args.features:
            kinds["features"] = base.with_stem(f"{base.stem}_features") if kinds else base
        if args.png:
            kinds["png"] = base.with_suffix(".png")
        for path in kinds.values():
            if path.resolve() in taken:
                raise ValueError(f"{path}: is itself a scene, or the map of another; name it apart")
            if path.exists() and not args.overwrite:
                raise FileExistsError(f"{path}: exists; pass --overwrite, or write elsewhere")
            taken.add(path.resolve())
        outputs[scene] = kinds
    return outputs


def map_scene(source, model, mean, std, picture, paths, args):
    """Predict one scene and write what was asked for; returns one line on it.

    mean, std: of `predict`. picture: of `survey`. paths: kind -> path, of `output_paths`.
    """
    start, about, classes = time.perf_counter(), source.info, model.meta["classes"]
    size, line = (about.height, about.width), ""
    work = partial(predict, model, source, mean, std, overlap=args.overlap, batch=args.batch)
    if "map" in paths:
        ids, counts = write_classes(paths, work(), about, classes)
        known = max(1, counts[:NO_CLASS].sum())
        shares = [f"{name} {100 * counts[k] / known:.1f} %" for k, name in enumerate(classes)]
        line = f"; {', '.join(shares)}; {100 * counts[NO_CLASS] / counts.sum():.1f} % without data"
    if "features" in paths:
        side = model.meta["tile"] / model.grid  # px of the scene that a token covers
        place = about.transform
        place = place and [v * k for v, k in zip(place, [side, side, 1] * 2, strict=True)]
        shape = (model.encoder.dim, *(-(-n * model.grid // model.meta["tile"]) for n in size))
        write = write_bytes if args.int8 else write_floats
        write(paths["features"], (rounded(*part) for part in work(tokens=True)), shape, place,
              about.crs)  # fmt: skip
    if "png" in paths:
        with optional(paths["png"]):
            draw_map(paths["png"], about.path.name, picture, model.meta, ids, counts)
    seconds = time.perf_counter() - start
    return (
        f"{next(iter(paths.values()))}: {size[0]} x {size[1]} px in {seconds:.1f} s "
        f"({size[0] * size[1] / seconds:,.0f} px/s){line}"
    )


def write_classes(paths, work, about, classes):
    """Write the map, and probabilities where paths has them, of the rows that `predict` yields.
    Returns the map's ids as small as the picture of `survey`, and how many pixels each has."""
    size, place, crs = (about.height, about.width), about.transform, about.crs
    counts, preview, step, row = np.zeros(256, np.int64), [], -(-max(size) // PREVIEW), 0
    with ExitStack() as stack:
        write = raster.writer(paths["map"], (1, *size), np.uint8, place, crs, NO_CLASS, ("class",),
                              classes, class_colours(classes))  # fmt: skip
        write, share = stack.enter_context(write), None
        if "probabilities" in paths:
            shape = (len(classes), *size)
            share = raster.writer(paths["probabilities"], shape, np.float32, place, crs, math.nan,
                                  classes)  # fmt: skip
            share = stack.enter_context(share)
        for logits, valid in work:
            ids = logits.argmax(0).masked_fill(~valid, NO_CLASS).byte().cpu().numpy()
            write(ids[None])
            if share:
                share(rounded(logits.softmax(0), valid))
            counts += np.bincount(ids.ravel(), minlength=256)
            preview.append(ids[-row % step :: step, ::step])
            row += len(ids)
    return np.concatenate(preview), counts


def rounded(values, valid):
    """float32 array of 11 significant bits, which deflate to half the size; NaN where not valid."""
    return values.masked_fill(~valid, float("nan")).half().float().cpu().numpy()


def write_floats(path, parts, shape, place, crs):
    with raster.writer(path, shape, np.float32, place, crs, math.nan) as write_rows:
        for part in parts:
            write_rows(part)


def write_bytes(path, parts, shape, place, crs):
    """Write parts (bands, n, cols) in 8 bits: value v of a band stands for scale * v + offset, its
    tags, from its least value at 0 to its largest at 254. So none is off by more than half a step.

    Ranges are known at the end only, so the parts wait in a temporary file beside `path`.
    """
    low, high, row = np.full(shape[0], np.inf), np.full(shape[0], -np.inf), 0
    with tempfile.TemporaryFile(dir=path.parent) as waiting:
        kept = np.memmap(waiting, np.float16, "w+", shape=shape)  # of 11 bits, as they come
        for part in parts:
            low = np.fmin(low, np.fmin.reduce(part, (1, 2), initial=np.inf))
            high = np.fmax(high, np.fmax.reduce(part, (1, 2), initial=-np.inf))
            kept[:, row : row + part.shape[1]] = part
            row += part.shape[1]
        step, low = np.where(high > low, (high - low) / 254, 1), np.where(low > high, 0, low)
        scaling = list(zip(step.tolist(), low.tolist(), strict=True))
        with raster.writer(path, shape, np.uint8, place, crs, 255, scaling=scaling) as write_rows:
            for first in range(0, shape[1], 64):
                part = kept[:, first : first + 64]
                part = ((part - low[:, None, None]) / step[:, None, None]).round()
                write_rows(np.where(np.isnan(part), 255, part).astype(np.uint8))


def draw_map(path, name, picture, meta, ids, counts):
    """PNG of a scene (bands, h, w) beside its class map (h, w), commonest class first in legend.
    meta: the model's, with its classes and bands."""
    from matplotlib.figure import Figure  # here, so that --help does not wait for its import
    from matplotlib.patches import Patch

    classes, bands = meta["classes"], meta.get("bands") or [""] * len(picture)
    colours = class_colours(classes)
    known = ~np.isnan(picture).any(0)
    # what is missing is the mean, so that the colours are stretched by what is there
    mean = picture[:, known].mean(1) if known.any() else np.zeros(len(picture), np.float32)
    pixels = torch.from_numpy(np.where(known, picture, mean[:, None, None])[None])
    scene = composite(pixels, bands)[0].numpy()
    scene[~known] = 1
    height, width = ids.shape
    figure = Figure(figsize=(12, 1.4 + min(6 * height / width, 60)), layout="constrained")
    titles = f"The scene: {name}\n(stretched)", "The map: the model's class of each pixel"
    halves = zip(figure.subplots(1, 2), (scene, paint(ids, colours)), titles, strict=True)
    for axis, image, title in halves:
        axis.imshow(image, interpolation="nearest")
        axis.set_title(title, fontsize=10, parse_math=False)
        axis.axis("off")
    total = max(1, counts[:NO_CLASS].sum())
    order = [k for k in np.argsort(-counts[: len(classes)], kind="stable") if counts[k]]
    labels = {k: f"{classes[k]} {100 * counts[k] / total:.1f} %" for k in order}
    handles = [Patch(color=np.array(colours[k]) / 255, label=labels[k]) for k in order]
    if counts[NO_CLASS]:
        handles.append(Patch(facecolor="white", edgecolor="grey", label="white: no data"))
    title = "classes of the map, and their share of the ground that has data"
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)),
                  frameon=False, title=title)  # fmt: skip
    save_figure(figure, path)


def run(args):
    """Map all scenes; everything wrong with flags and headers is raised before the first one."""
    cuda = torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise ValueError("--device cuda: no GPU found; use --device cpu")
    # not run.start_ranks: what it has glibc keep is ten times the memory of a large scene
    device = torch.device("cuda" if cuda and args.device != "cpu" else "cpu")
    scenes = dict(image for where in args.scenes for image in list_images(where, "scenes"))
    model = load_model(args.model, args.tile, args.image_size, args.heads, device)
    classes, tile, unit = model.meta["classes"], model.meta["tile"], token_unit(model)
    if not classes and (args.probabilities or args.png or not args.features):
        raise ValueError(
            f"--model {args.model} is an encoder without classes; pass --features alone, or a "
            "model of finetune.py"
        )
    if len(classes) > NO_CLASS:
        raise ValueError(f"a map holds {NO_CLASS} classes, --model has {len(classes)}")
    if args.overlap is not None and args.overlap >= tile:
        raise ValueError(f"--overlap {args.overlap} is not below the window of {tile} px")
    if args.features and tile % model.grid and unit > tile // 2:
        raise ValueError(
            f"--features: {model.grid} x {model.grid} tokens in windows of {tile} px share no "
            f"grid; pass --tile {max(1, round(tile / model.grid)) * model.grid}"
        )
    outputs = output_paths(scenes, args.out, model, args)
    sources = {}
    for scene, files in scenes.items():
        about = header(scene, files)
        bands, how = choose_bands(about, model, args.bands)
        sources[scene] = open_image(about, files, bands)
        shown = ",".join(about.band_names[b] if files else str(b) for b in bands)
        print(f"{scene}: bands {shown} ({how})")
        warn(gsd_warning(sources[scene].info, model))
        if about.transform is None:
            warn(f"{scene}: has no georeference, so its map has none")
    for scene, paths in outputs.items():
        mean, std, picture = survey(sources[scene])
        gain, shift = units(sources[scene], model, args.scale, args.offset, mean)
        warn(scale_warning(scene, mean * gain + shift, std * abs(gain), model))
        if "mean" in model.meta and "std" in model.meta:
            # in the units of the file, so that its pixels are read as they are
            mean, std = (model.meta["mean"] - shift) / gain, model.meta["std"] / gain
        else:
            print(f"{scene}: the model has no statistics; normalised by those of the scene")
            std = np.maximum(std, 1e-6)
        next(iter(paths.values())).parent.mkdir(parents=True, exist_ok=True)
        print(map_scene(sources[scene], model, mean, std, picture, paths, args))


def warn(sentence):
    if sentence:
        print(f"warning: {sentence}", file=sys.stderr)


def main(argv=None):
    script(run, partial(parse_args, argv), "maps that were finished stay")


if __name__ == "__main__":
    main()
