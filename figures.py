"""Every picture: chips in true colour, tokens as colours or similarities, maps, curves, scores."""

import base64
import json
from contextlib import contextmanager

import torch
from einops import rearrange

from files import replacing, write_atomic
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


@contextmanager
def optional(path):
    """Whatever fails within, while a picture is drawn, is a warning: results do not hang on it."""
    try:
        yield
    except Exception as error:  # whatever it trips over
        missing = error.name if isinstance(error, ImportError) else None
        reason = f" without {missing}" if missing else f": {error!r}"
        print(f"{path.parent}: warning: no {path.name}{reason}")


def save_figure(figure, path):
    """Write a matplotlib figure as PNG, atomically."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120, bbox_inches="tight")


def draw_tokens(path, pictures, tokens, rows=4):
    """A row for each of the first chips: its pictures, then the tokens of student and teacher as
    PCA colours, as they are and without what their place explains, the mean over all chips there.

    pictures: {title: (images (B, C, H, W), band names)}. tokens: {title: (tokens (B, N, D), (rows,
    cols))}, None in place of tokens that there are none of.
    """
    from matplotlib.figure import Figure  # here, so that training does not wait for its import

    columns = {title: composite(*picture) for title, picture in pictures.items()}
    for title, (x, grid) in tokens.items():
        if x is None:
            continue
        columns[title] = token_colours(x, grid)
        if len(x) >= 2 * rows:  # of fewer the mean is the ground's, too
            bare = x - x.mean(0)
            share = 1 - bare.square().sum() / (x - x.flatten(0, 1).mean(0)).square().sum()
            columns[f"without place\n({share:.0%} of the variance)"] = token_colours(bare, grid)
    rows = min(rows, len(next(iter(columns.values()))))
    figure = Figure(figsize=(2.2 * len(columns), 2.2 * rows))
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (title, drawn) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title, fontsize=9)
        for axis, picture in zip(column, drawn, strict=False):
            axis.imshow(picture.numpy(), interpolation="nearest")
            axis.axis("off")
    save_figure(figure, path)


# ---- one palette for classes, in every picture and map

# what a reader takes for granted, by a word in the class's name
WORDS = {
    "water river sea lake": "#2b6cb0", "forest wood woods tree trees": "#1b5e20",
    "orchard": "#7cb342", "meadow grass grassland pasture": "#b6d77a",
    "built urban road buildings": "#7f7f7f", "soil bare": "#a0724a", "sand": "#e6d690",
    "snow ice": "#eef3f8", "cloud clouds": "#e8e8e8",
}  # fmt: skip
EXPECTED = {word: colour for words, colour in WORDS.items() for word in words.split()}
# told apart by the colour-blind: Okabe and Ito's (jfly.uni-koeln.de/color), then Paul Tol's muted
CYCLE = (
    "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#332288",
    "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255", "#aa4499",
)  # fmt: skip


def class_colours(names):
    """(red, green, blue) of 0..255 for class names: what a reader expects of water, forest or
    meadow, else the next of a colour-blind-safe cycle; two classes never share a colour."""
    taken, colours, cycle = set(), [], 0
    for name in names:
        words = name.lower().replace("-", " ").split()
        colour = next((EXPECTED[w] for w in words if w in EXPECTED), None)
        while colour is None or colour in taken:
            # beyond the cycle's length the same hues again, darker each time
            dark = 0.75 ** (cycle // len(CYCLE))
            rgb = bytes.fromhex(CYCLE[cycle % len(CYCLE)][1:])
            colour, cycle = "#" + bytes(int(dark * v) for v in rgb).hex(), cycle + 1
            if dark < 0.1:
                break  # 130 classes on: nobody tells them apart
        taken.add(colour)
        colours.append(tuple(bytes.fromhex(colour[1:])))
    return colours


def paint(ids, colours):
    """A class map as a picture: (h, w) uint8 -> (h, w, 3) uint8, white where no class is; arrays.
    colours: of `class_colours`."""
    table = torch.full((256, 3), 255, dtype=torch.uint8)
    table[: len(colours)] = torch.tensor(colours, dtype=torch.uint8)
    return table[torch.as_tensor(ids).long()].numpy()


# ---- pictures of a study


def similarity(tokens, row, col):
    """Cosine of one token with all of a scene, without what the scene's tokens share, which is how
    the affinity loss compares them when centred: (h, w, D) -> (h, w) float32 in -1..1."""
    x = tokens.float()
    x = x - x[~x.isnan().any(-1)].mean(0)
    return torch.nn.functional.cosine_similarity(x, x[row, col], dim=-1)


def draw_panels(path, columns, marks=(), legend=()):
    """Pictures side by side, a column each -> PNG.

    columns: {title: a list of (h, w, 3) pictures as matplotlib takes them, or (h, w) similarities
    in -1..1, one a row, of the same ground}. marks: for each row (x, y) in 0..1, drawn as a ring in
    every panel. legend: [(name, (red, green, blue) of 0..255)].
    """
    from matplotlib.figure import Figure

    rows = len(next(iter(columns.values())))
    figure = Figure(figsize=(1.9 * len(columns) + 0.7, 2.0 * rows + 0.6), layout="constrained")
    show_panels(figure, columns, marks, legend)
    save_figure(figure, path)


def show_panels(figure, columns, marks=(), legend=()):
    """`draw_panels` in a figure, or a part of one."""
    from matplotlib.patches import Patch

    rows = len(next(iter(columns.values())))
    axes, image = figure.subplots(rows, len(columns), squeeze=False), None
    for column, (title, panels) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title, fontsize=10)
        for k, (axis, panel) in enumerate(zip(column, panels, strict=True)):
            axis.axis("off")
            if panel is None:
                continue
            h, w = panel.shape[:2]
            shown = axis.imshow(panel, "RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            image = shown if panel.ndim == 2 else image
            if k < len(marks):
                x, y = marks[k]
                axis.plot(x * w - 0.5, y * h - 0.5, "o", ms=9, mfc="none", mec="black", mew=2.6)
                axis.plot(x * w - 0.5, y * h - 0.5, "o", ms=9, mfc="none", mec="white", mew=1.2)
    if image is not None:
        bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=30, pad=0.01)
        bar.set_label("cosine similarity to the ringed token", fontsize=9)
    if legend:
        handles = [Patch(color=[v / 255 for v in colour], label=name) for name, colour in legend]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(legend), fontsize=9,
                      frameon=False)  # fmt: skip


CURVES = {"ssl": "SSL loss", "affinity": "affinity loss", "rank": "effective rank of tokens",
          "place": "share of variance that is place", "cosine": "mean cosine of tokens",
          "grad_norm": "gradient norm"}  # fmt: skip


def draw_curves(path, runs):
    """Loss and health over steps -> PNG. runs: {name: a list of logs, one a seed, each a list of
    entries of log.jsonl}; a line is the mean over seeds, its band their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), layout="constrained")
    for axis, (key, title) in zip(figure.subplots(2, 3).flat, CURVES.items(), strict=True):
        for (name, logs), colour in zip(runs.items(), CYCLE * len(runs), strict=False):
            steps = [entry["step"] for entry in min(logs, key=len)]
            values = torch.tensor([[e[key] or 0.0 for e in log[: len(steps)]] for log in logs])
            if key == "affinity" and not values.any():
                continue
            axis.plot(steps, values.mean(0), color=colour, lw=1.5, label=name)
            axis.fill_between(steps, values.amin(0), values.amax(0), color=colour, alpha=0.2, lw=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        if key in ("affinity", "grad_norm"):
            axis.set_yscale("log")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center",
                  fontsize=9, frameon=False)  # fmt: skip
    save_figure(figure, path)


def draw_scores(path, scores, zero):
    """mIoU of every row, a dot a seed and a bar at the mean of several -> PNG. scores: {row: {seed:
    mIoU in 0..1}}. zero: the mIoU of the untrained encoder, a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.42 * len(scores) + 1.1), layout="constrained")
    show_scores(figure.subplots(), scores, zero)
    save_figure(figure, path)


def show_scores(axis, scores, zero):
    """`draw_scores` on an axis."""
    for k, values in enumerate(scores.values()):
        points = 100 * torch.tensor(list(values.values()))
        axis.plot(points, [k] * len(points), "o", color=CYCLE[4], ms=5, alpha=0.6)
        if len(points) > 1:
            axis.plot([points.mean()] * 2, [k - 0.3, k + 0.3], color="black", lw=2)
    axis.axvline(100 * zero, color="grey", ls=":", lw=1)
    axis.set_yticks(range(len(scores)), list(scores))
    axis.invert_yaxis()
    axis.set_xlabel("mIoU of a ridge probe on MR images, %: a dot a seed (dotted: untrained)")


def draw_overview(path, title, affinity, marks, maps, legend, scores, zero):
    """A study on one slide -> PNG: affinity maps and class maps, as for `draw_panels`, and scores,
    as for `draw_scores`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 9), layout="constrained")
    figure.suptitle(title, fontsize=15)
    left, right = figure.subfigures(1, 2, width_ratios=(2.1, 1))
    top, bottom = left.subfigures(2, 1, height_ratios=(len(marks) + 0.2, 1.6))
    show_panels(top, affinity, marks)
    show_panels(bottom, maps, legend=legend)
    show_scores(right.subplots(), scores, zero)
    save_figure(figure, path)


AXES = {"--hr-share": "share of the pairs that have HR", "--affinity-weight": "affinity weight",
        "--hr-shift": "HR beside its place, pixels of 5 m"}  # fmt: skip


def draw_gains(path, curves, levels):
    """mIoU over a flag's values, a panel a flag -> PNG; nothing where there are none. curves:
    {flag: {value: mIoU in 0..1 of each seed}}. levels: {row: mIoU}, dotted lines."""
    from matplotlib.figure import Figure

    if not curves:
        return
    figure = Figure(figsize=(4.2 * len(curves), 3.4), layout="constrained")
    for axis, (flag, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0],
                                    curves.items(), strict=True):  # fmt: skip
        for value, scores in points.items():
            axis.plot([value] * len(scores), [100 * s for s in scores], "o", color=CYCLE[4], ms=5)
        means = [100 * sum(scores) / len(scores) for scores in points.values()]
        axis.plot(list(points), means, color="black", lw=1.5, label="sa")
        for (name, level), style in zip(levels.items(), (":", "--"), strict=False):
            axis.axhline(100 * level, color="grey", ls=style, lw=1, label=name)
        if min(points) > 0:
            axis.set_xscale("log")
        axis.set_xticks(list(points), [f"{value:g}" for value in points])
        axis.minorticks_off()
        axis.set_xlabel(AXES.get(flag, flag))
        axis.set_ylabel("mIoU, %")
        axis.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


PAGE = """\
<!doctype html>
<meta charset="utf-8">
<title>Affinity maps</title>
<style>
body { font: 14px sans-serif; margin: 1em; }
figure { display: inline-block; margin: 4px; text-align: center; }
canvas { width: 230px; height: 230px; image-rendering: pixelated; cursor: crosshair; }
</style>
<p>Click a place: the cosine similarity of its token to all others, from -1 (blue) to 1 (red).
<div id="panels"></div>
<script>
const panels = PANELS, bytes = code => Uint8Array.from(atob(code), c => c.charCodeAt(0));
for (const panel of panels) {
  const figure = document.getElementById("panels").appendChild(document.createElement("figure"));
  const canvas = figure.appendChild(document.createElement("canvas"));
  figure.appendChild(document.createElement("figcaption")).textContent = panel.title;
  [panel.canvas, canvas.height, canvas.width] = [canvas, ...panel.grid];
  panel.values = bytes(panel.pixels || panel.tokens);
  if (panel.tokens) panel.values = new Int8Array(panel.values.buffer);
  canvas.onclick = e => {
    const box = canvas.getBoundingClientRect();
    show((e.clientX - box.left) / box.width, (e.clientY - box.top) / box.height);
  };
}
function show(x, y) {
  for (const {canvas, grid: [rows, cols, width], values, tokens} of panels) {
    const context = canvas.getContext("2d"), image = context.createImageData(cols, rows);
    const row = Math.floor(y * rows), col = Math.floor(x * cols), at = (row * cols + col) * width;
    for (let k = 0; k < rows * cols; k++) {
      if (!tokens) { for (let c = 0; c < 4; c++) image.data[4 * k + c] = values[4 * k + c]; }
      else {
        let s = 0;
        for (let c = 0; c < width; c++) s += values[at + c] * values[k * width + c];
        s /= 127 * 127;
        const fade = 255 * (1 - Math.min(1, Math.abs(s)));
        image.data.set(s > 0 ? [255, fade, fade, 255] : [fade, fade, 255, 255], 4 * k);
      }
    }
    context.putImageData(image, 0, 0);
    context.strokeStyle = "black";
    const side = Math.max(1, cols / 20);
    context.strokeRect(x * cols - side / 2, y * rows - side / 2, side, side);
  }
}
show(0.5, 0.5);
</script>
"""


def write_page(path, pictures, tokens):
    """Affinity maps of any token, as a page that needs no server: click a place, and every panel
    shows how alike its token is to all others.

    pictures: {title: (h, w, 3) float in 0..1}, of the same ground as the tokens. tokens: {title:
    (rows, cols, D)}; compared as `similarity` does, rounded to 8 bits.
    """
    panels = []
    for title, values in tokens.items():
        x = values.float() - values.float().flatten(0, 1).mean(0)
        x = (127 * torch.nn.functional.normalize(x, dim=-1)).round().clamp(-127, 127)
        code = base64.b64encode(x.to(torch.int8).numpy().tobytes()).decode()
        panels.append({"title": title, "grid": list(x.shape), "tokens": code})
    for title, picture in pictures.items():
        rgb = (255 * torch.as_tensor(picture)).round().to(torch.uint8)
        alpha = torch.full_like(rgb[..., :1], 255)
        code = base64.b64encode(torch.cat([rgb, alpha], -1).numpy().tobytes()).decode()
        panels.insert(0, {"title": title, "grid": list(rgb.shape), "pixels": code})
    page = PAGE.replace("PANELS", json.dumps(panels))
    write_atomic(path, page)
