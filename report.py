"""What the cells of a study say: tables, intervals, pictures, and the pages that quote them.

Tables show rows in the order in which cells come. A cell is a dict, as study.py writes it:
objective, row, seed, lr, trial (of the search of learning rates), scores {probe: {"miou",
"val_miou"}}, health, command, run, steps, seconds, device, commit.
"""

import json
import math
import re
import shutil
import time

import numpy as np
import torch
from einops import rearrange

import figures
from files import write_atomic
from health import read_log
from imagery import raster

# a claim for HR is a row minus the best of these, which have all of it but the HR of their ground
CONTROLS = {
    "sa": ("mr", "regulariser", "sa-shuffled", "sa-interp"),
    "sa-mse": ("mr", "regulariser", "mse-shuffled", "mse-interp"),
}
CEILING = "from scratch, all labels"
SHORT = 100  # steps of pretraining below which nothing is claimed
T975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 1 to 9 degrees
T80 = (1.38, 1.06, 0.98, 0.94, 0.92, 0.91, 0.90, 0.89, 0.88)  # of freedom


# ---- numbers


def read_cells(out):
    """The facts of the cells that are there, dicts."""
    return [json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))]


def by_row(cells, trials=False):
    """{objective: {row: {seed: facts}}}; of the trials: {learning rate: facts} instead."""
    found = {}
    for facts in cells:
        if facts.get("trial", False) == trials:
            rows = found.setdefault(facts["objective"], {})
            rows.setdefault(facts["row"], {})[facts["lr" if trials else "seed"]] = facts
    return found


def scores_of(rows, probe="ridge", split="miou"):
    """{row: {seed: mIoU}}."""
    return {row: {key: facts["scores"][probe][split] for key, facts in seeds.items()}
            for row, seeds in rows.items()}  # fmt: skip


def interval(differences, draws=10_000):
    """Of paired differences, one a seed: their mean, its 95 % bootstrap interval, and the smallest
    true difference that a t-test of this design finds in 4 of 5 cases (nan for one seed)."""
    d = np.asarray(differences, float)
    if len(d) < 2:
        return d.mean(), math.nan, math.nan, math.nan
    means = np.random.default_rng(0).choice(d, (draws, len(d))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    k = min(len(d) - 1, len(T975)) - 1
    return d.mean(), low, high, (T975[k] + T80[k]) * d.std(ddof=1) / math.sqrt(len(d))


def gain_of(scores, row="sa"):
    """A row minus the best of its controls, over the seeds of both: that control, the seeds, and
    the `interval` of the differences; None where either has not run."""
    controls = [control for control in CONTROLS[row] if control in scores]
    if row not in scores or not controls:
        return None
    best = max(controls, key=lambda control: np.mean([*scores[control].values()]))
    seeds = sorted(scores[row].keys() & scores[best].keys())
    return best, seeds, interval([scores[row][s] - scores[best][s] for s in seeds])


def claim(scores, row="sa"):
    """One sentence on what HR adds: a row minus the best of its controls."""
    found = gain_of(scores, row)
    if found is None:
        return f"no claim: `{row}` or its controls have not run."
    best, seeds, (gain, low, high, least) = found
    said = f"in `{row}`, HR of the right ground adds {100 * gain:+.1f} points to the best control "
    said += f"({best})"
    if len(seeds) < 3:
        count = {1: "one seed", 2: "two seeds"}[len(seeds)]
        return f"{said}: {count} of pretraining, so a sign, not a result."
    verdict = "" if low > 0 else "; the interval holds 0, so nothing is shown"
    return (f"{said}, 95 % interval {100 * low:+.1f} to {100 * high:+.1f} over {len(seeds)} seeds; "
            f"the design finds {100 * least:.1f} points in 4 of 5 cases{verdict}.")  # fmt: skip


def claims(rows):
    """What rows show, in sentences."""
    steps = max(facts.get("steps", 0) for seeds in rows.values() for facts in seeds.values())
    if steps < SHORT:
        return f"{steps} steps say nothing of who wins: this shows that everything works."
    scores = scores_of(rows)
    said = [claim(scores, row) for row in CONTROLS if row == "sa" or gain_of(scores, row)]
    return " ".join(text[:1].upper() + text[1:] for text in said) + headroom(rows)


def headroom(rows):
    """One sentence on whether a task can tell encoders apart; "" where its ends have not run."""
    if not {"pixels", "untrained"} <= rows.keys():
        return ""
    scores = rows["pixels"][0]["scores"]
    if CEILING not in scores:
        return ""
    low = max(np.mean([*each.values()]) for each in
              (scores_of(rows)["pixels"], scores_of(rows)["untrained"]))  # fmt: skip
    room = 100 * (scores[CEILING]["miou"] - low)
    if room < 5:
        return f" The task has {room:.1f} points of headroom: too few to tell encoders apart."
    above = f"{room:.1f} points above untrained and pixels"
    return f" Trained from scratch on all labels, a model is {above}."


def claims_table(rows):
    """What HR adds by each probe, as Markdown: a probe may see what another does not."""
    lines = [
        "| row | probe | mIoU | best control | HR adds | 95 % interval | seeds |",
        "|---" * 7 + "|",
    ]
    for row, controls in CONTROLS.items():
        compared = {name: rows[name] for name in (*controls, row) if name in rows}
        probes = dict.fromkeys(p for facts in rows.get(row, {}).values() for p in facts["scores"])
        for probe in probes if len(compared) > 1 else ():
            scores = scores_of(compared, probe)
            best, seeds, (gain, low, high, _) = gain_of(scores, row)
            within = f"{100 * low:+.1f} to {100 * high:+.1f}" if len(seeds) > 1 else ""
            lines.append(
                f"| {row} | {probe} | {mean_and_spread([*scores[row].values()])} | "
                f"{best} {mean_and_spread([*scores[best].values()])} | {100 * gain:+.1f} | "
                f"{within} | {len(seeds)} |"
            )
    return "\n".join(lines) + "\n"


def mean_and_spread(scores):
    """mIoU in % as a reader reads it, with the deviation of several seeds; "" of none."""
    scores = 100 * np.array(scores)
    spread = f" ± {scores.std(ddof=1):.1f}" if len(scores) > 1 else ""
    return f"{scores.mean():.1f}{spread}" if len(scores) else ""


# ---- tables


def table(cells, rows=None, probes=None):
    """What the cells of a study say, as Markdown. rows, probes: only these."""
    cells = [c for c in cells if rows is None or c["row"] in rows]
    lines = []
    for objective, found in by_row(cells).items():
        every = [facts for seeds in found.values() for facts in seeds.values()]
        probes_there = dict.fromkeys(probe for facts in every for probe in facts["scores"])
        shown = [p for p in sorted(probes_there, key=CEILING.__eq__)  # the ceiling last
                 if probes is None or p in probes]  # fmt: skip
        searched = any(facts.get("lr") for facts in every)
        head = ["row", "seeds", *["lr"] * searched, *shown, "place", "rank", "cos", "core-min"]
        lines += [
            f"**{objective}**: {claims(found)}",
            "",
            f"| {' | '.join(head)} |",
            "|---" * len(head) + "|",
        ]
        for row, seeds in found.items():
            lines.append(f"| {' | '.join(line_of(row, seeds, shown, searched))} |")
        lines += ["", foot(every), ""]
    return "\n".join(lines).rstrip() + "\n"


def line_of(row, seeds, probes, searched):
    """The cells of a table's line."""
    facts, name = [*seeds.values()], row
    values = [[f["scores"][probe]["miou"] for f in facts if probe in f["scores"]]
              for probe in probes]  # fmt: skip
    health = [f["health"] for f in facts if "health" in f]
    place, rank, cosine = ([h[key] for h in health] for key in ("place", "rank", "cosine"))
    if health and np.mean(rank) < 2:
        name += " (collapsed)"
    on_hr = [f["on_hr"]["miou"] for f in facts if "on_hr" in f]
    if on_hr:
        name += f" (its HR images: {mean_and_spread(on_hr)})"
    said = ["", "", ""]
    if health:
        said = [f"{100 * np.mean(place):.0f} %", f"{np.mean(rank):.0f}", f"{np.mean(cosine):.2f}"]
    rate = [f"{facts[0]['lr']:g}" if facts[0].get("lr") else ""] * searched
    minutes = f"{np.mean([f['seconds'] for f in facts]) / 60:.1f}"
    return [name, str(len(facts)), *rate, *map(mean_and_spread, values), *said, minutes]


def foot(every):
    commits = ", ".join(sorted({str(facts["commit"]) for facts in every}))
    return (
        "mIoU in % of frozen encoders on MR images of ground held out, ± deviation over seeds of "
        "pretraining (`hr`, the teacher, too, though it was trained on HR). place: share of the "
        "tokens' variance that their place explains; rank: directions that they use; cos: mean "
        "cosine of two; core-min: minutes on one thread, of a machine that did other things, too. "
        f"{every[0]['device']}, torch {every[0]['torch']}, commit {commits}."
    )


def search_table(cells):
    """The learning rates that every row tried, and the best, as Markdown; "" where none did."""
    lines = []
    for objective, rows in by_row(cells, trials=True).items():
        rates = sorted({lr for tried in rows.values() for lr in tried})
        lines += [f"| {objective}, lr | " + " | ".join(f"{lr:g}" for lr in rates) + " |",
                  "|---" * (len(rates) + 1) + "|"]  # fmt: skip
        for row, tried in scores_of(rows, split="val_miou").items():
            best = max(tried, key=tried.get)
            cells = [f"{100 * tried[lr]:.1f}" if lr in tried else "" for lr in rates]
            cells[rates.index(best)] = f"**{cells[rates.index(best)]}**"
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n" * bool(lines)


# what does not tell two evaluations apart
SAME = ("encoder", "out", "seeds", "device", "precision", "compile", "device_batch", "global_batch")


def collect(folders):
    """A table of finetune.py's result folders: mean and deviation over pretraining seeds. Only rows
    that differ in nothing but seeds are averaged. Raises ValueError where a folder has none."""
    groups = {}
    for folder in folders:
        path = folder / "results.jsonl"
        if not path.is_file():
            raise ValueError(f"{folder}: no results of finetune.py, there is no results.jsonl")
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError:
                raise ValueError(f"{path}: line {number} is no result; delete it") from None
            about, settings = dict(row["pretraining"]), row.get("settings", {})
            seed = about.pop("seed", None)
            shown = (
                row["task"], row.get("data_hash", ""), row["protocol"], settings.get("labels", 1),
                about.get("objective", row.get("encoder", "")), about.get("variant", ""),
            )  # fmt: skip
            rest = {key: value for key, value in settings.items() if key not in SAME}
            key = shown, json.dumps((about, rest), sort_keys=True)
            groups.setdefault(key, {}).setdefault(seed, []).append(row["miou"])
    lines = [
        "| task | data | protocol | labels | encoder | variant | pretraining seeds | mIoU |",
        "|---" * 8 + "|",
    ]
    for (shown, _), seeds in sorted(groups.items(), key=str):
        means = [np.mean(scores) for scores in seeds.values()]
        lines.append(f"| {' | '.join(map(str, shown))} | {len(means)} | {mean_and_spread(means)} |")
    return "\n".join(lines)


# ---- pages


def blocks(name, cells):
    """What pages quote of a study: {block: text}."""
    main = {"pixels", "untrained", "hr", *CONTROLS, *sum(CONTROLS.values(), ())}
    few = [c for c in cells if c["objective"] == "ijepa"]
    return {
        name: table(cells),
        f"{name}-short": table(few, main, ("ridge", "ridge, 10 % of labels", "linear", CEILING)),
        f"{name}-search": search_table(cells),
    } | {
        f"{name}-probes-{objective}": claims_table(rows)
        for objective, rows in by_row(cells).items() if gain_of(scores_of(rows))
    }  # fmt: skip


def publish(home, out, name, cells):
    """Keep a study's figures and pictures in results/, its tables in README.md and RESULTS.md where
    they say <!-- block --> ... <!-- end -->, and the track's first rows in TRACK.md."""
    folder = home / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cells.jsonl").write_text("".join(json.dumps(c) + "\n" for c in cells))
    for picture in (*out.glob("*.png"), *out.glob("*.html")):
        shutil.copy(picture, folder / picture.name)
    said_of = blocks(name, cells)
    for page in (home / "README.md", home / "RESULTS.md"):
        text = page.read_text()
        for block, said in said_of.items():
            place = re.compile(f"(?<=<!-- {block} -->\n).*?(?=<!-- end -->)", re.DOTALL)
            text = place.sub(lambda _, said=said: said, text, count=1)
        write_atomic(page, text)
    for flags, facts in track_rows(cells) if name == "laptop" else ():
        if f"`{flags}`" not in (home / "TRACK.md").read_text():
            scores = [each["scores"]["ridge"]["miou"] for each in facts]
            add_to_track(home, flags, scores, facts[0]["commit"])


TRACK_SEEDS = 3
TRACK = """\
# The track: training ideas under one budget

`python study.py --idea FOLDER --flags="..."` trains I-JEPA with a fork's `train.py` and these flags
beside those of the budget (400 steps of 16 pairs; 128 wide, 4 deep; ground drawn with `--kind
rows`), three seeds, and judges the encoder by a ridge probe on MR images of ground held out: mIoU
in %, ± deviation over seeds. A difference to the record (the best row above it) below that
deviation is noise. `{hr}` in flags stands for a teacher trained on HR for 800 steps. An untrained
encoder is the zero.

| flags | mIoU | to the record | commit | date |
|---|---|---|---|---|
"""


def track_rows(cells):
    """The rows of a study that ran the track's budget: (flags beside the budget's, the facts of its
    seeds)."""
    found = by_row(cells).get("ijepa", {})
    for seeds in found.values():
        facts = [seeds[seed] for seed in range(TRACK_SEEDS) if seed in seeds]
        steps = " --steps 400 "
        if len(facts) == TRACK_SEEDS and steps in facts[0]["command"]:
            flags = facts[0]["command"].split(steps)[1]
            yield re.sub(r"--hr-teacher \S+", "--hr-teacher {hr}", flags), facts


def add_to_track(home, flags, scores, commit):
    """Add a row to TRACK.md, with its difference to the best above; returns the row."""
    path = home / "TRACK.md"
    lines = path.read_text().splitlines() if path.exists() else TRACK.splitlines()
    before = [float(line.split("|")[2].split()[0]) for line in lines if line[:3] == "| `"]
    mean, spread = 100 * np.mean(scores), 100 * np.std(scores, ddof=1)
    record = f"{mean - max(before):+.1f}" if before else ""
    lines.append(f"| `{flags}` | {mean:.1f} ± {spread:.1f} | {record} | {commit} | "
                 f"{time.strftime('%Y-%m-%d')} |")  # fmt: skip
    write_atomic(path, "\n".join(lines) + "\n")
    return lines[-1]


# ---- pictures


def draw(out, task, cells, call):
    """All pictures of a study from the facts of its cells, and its runs. task: scenes in train, val
    and test. call: runs a command, a list of words, as study.py does."""
    for objective, rows in by_row(cells).items():
        scores = scores_of(rows)
        main = {row: values for row, values in scores.items() if " --" not in row}
        logs = {row: [read_log(out / "runs" / facts["run"]) for facts in rows[row].values()]
                for row in main if row not in ("untrained", "pixels")}  # fmt: skip
        with figures.optional(curves := out / f"curves_{objective}.png"):
            figures.draw_curves(curves, logs)
        if "untrained" not in scores:
            continue
        zero = np.mean([*scores["untrained"].values()])
        with figures.optional(out / f"scores_{objective}.png"):
            figures.draw_scores(out / f"scores_{objective}.png", main, zero)
            figures.draw_gains(out / f"gains_{objective}.png", *gains(scores))
        if all(0 in rows.get(row, ()) for row in TITLES if row != "sa-mse"):  # not in a demo
            scene = f"scene_{sum(task) - 1:03d}.tif"
            with figures.optional(out / f"maps_{objective}.png"):
                draw_scene(out, objective, rows, main, zero, scene, call)


TITLES = {
    "untrained": "student,\nuntrained",
    "mr": "student of\nMR alone (mr)",
    "sa": "taught relations\nof HR (sa)",
    "sa-mse": "taught tokens\nof HR (sa-mse)",
    "hr": "HR teacher,\non HR",
}


def draw_scene(out, objective, rows, scores, zero, scene, call):
    """affinity.png and affinity.html: on a scene held out, the similarity of three tokens, or of
    any, to all others, for the student before and after and for its HR teacher; maps.png: what a
    probe makes of each; overview.png: both, and the scores."""
    drawn = out / "drawn"
    drawn.mkdir(exist_ok=True)

    def predict(*words):
        call(["predict.py", "--model", *words, "--overwrite"], quiet=True)

    tokens, maps = {}, {}
    titles = {row: title for row, title in TITLES.items() if row in rows}
    for row in titles:
        run = out / "runs" / rows[row][0]["run"]
        sensor, side = ("hr", 2) if row == "hr" else ("mr", 1)
        path, image = drawn / f"features_{row}.tif", out / "task" / sensor / scene
        predict(run, "--features", "--image-size", 64, image, path)
        values = torch.from_numpy(raster.read(path))
        tokens[row] = torch.nn.functional.avg_pool2d(values, side).permute(1, 2, 0)
        if row != "hr":
            path = drawn / f"map_{row}.tif"
            predict(run / "scores" / "ridge", image, path)
            maps[row] = raster.read(path)[0]
    mr, hr, label = (raster.read(out / "task" / folder / scene) for folder in ("mr", "hr", "masks"))
    classes = (out / "task" / "classes.txt").read_text().split("\n")[:-1]
    grid = tokens["mr"].shape[:2]
    # the quarter of the scene around its middle, so that rows can be seen
    part = [slice(side // 4, side // 4 * 3) for side in grid]
    inside = {row: value[part[0], part[1]] for row, value in tokens.items()}
    bands = raster.info(out / "task" / "mr" / scene).band_names
    views = {name: figures.composite(torch.from_numpy(image[None].astype(np.float32)), bands)[0]
             for name, image in (("HR", hr), ("MR", mr))}  # fmt: skip
    views = {name: cut(view, grid, part) for name, view in views.items()}
    marks = tokens_to_show(cut(torch.from_numpy(label[0]), grid, part), inside["mr"].shape[:2])
    h, w = inside["mr"].shape[:2]
    affinity = {name: [view] * len(marks) for name, view in views.items()}
    for row, title in titles.items():
        affinity[title] = [figures.similarity(inside[row], i, j).numpy() for i, j in marks]
    places = [((j + 0.5) / w, (i + 0.5) / h) for i, j in marks]
    figures.draw_panels(out / f"affinity_{objective}.png", affinity, places)
    named = {title: inside[row] for row, title in titles.items()}
    figures.write_page(out / f"affinity_{objective}.html", views, named)
    colours = figures.class_colours(classes)
    columns = {name: [view] for name, view in views.items()}
    named = {"labels": label[0]}
    for row, value in maps.items():
        score = 100 * rows[row][0]["scores"]["ridge"]["miou"]
        named[f"{titles[row]}\nmIoU {score:.0f} %"] = value
    for title, ids in named.items():
        columns[title] = [cut(figures.paint(ids, colours), grid, part)]
    legend = [*zip(classes, colours, strict=True)]
    figures.draw_panels(out / f"maps_{objective}.png", columns, legend=legend)
    figures.draw_overview(
        out / f"overview_{objective}.png",
        f"{objective}: {claims(rows).split(', 95 %')[0]}",
        affinity, places, columns, legend, scores, zero,
    )  # fmt: skip


def cut(picture, grid, part):
    """The part of a picture (h, w, ...) on the ground of some tokens of a grid."""
    scale = [side // cells for side, cells in zip(picture.shape, grid, strict=False)]
    rows, cols = (slice(p.start * s, p.stop * s) for p, s in zip(part, scale, strict=True))
    return picture[rows, cols]


def tokens_to_show(label, grid, count=3):
    """Tokens (row, col) that lie wholly in one class each, of `count` classes, in the middle of the
    largest parcels that can be found."""
    blocks = rearrange(label, "(h a) (w b) -> h w (a b)", h=grid[0], w=grid[1])
    pure = (blocks == blocks[..., :1]).all(-1)
    # a token whose eight neighbours are of its class, too, lies deep in a parcel
    kinds = torch.where(pure, blocks[..., 0].long(), -1)
    around = kinds[None].float().unfold(1, 3, 1).unfold(2, 3, 1)[0].flatten(2)
    deep = (around == around[..., 4:5]).sum(-1) + 20 * (around[..., 4] >= 0)
    found = {}
    for at in deep.flatten().argsort(descending=True, stable=True).tolist():
        row, col = at // deep.shape[1] + 1, at % deep.shape[1] + 1
        kind = kinds[row, col].item()
        if kind >= 0:
            found.setdefault(kind, (row, col))
    return [found[kind] for kind in sorted(found)][:count]


def gains(scores):
    """The curves: {flag: {value: mIoU of each seed}} of the values that have run; and {row: mean
    mIoU} of the levels beside them."""
    usual = {"--hr-share": 1, "--affinity-weight": 60, "--hr-shift": 0}
    found = {}
    for flag, value in usual.items():
        of = {float(row.split()[-1]): [*seeds.values()] for row, seeds in scores.items()
              if row.startswith(f"sa {flag} ")}  # fmt: skip
        of |= {value: [*scores["sa"].values()]} if "sa" in scores else {}
        found[flag] = dict(sorted(of.items()))
    levels = {row: np.mean([*scores[row].values()]) for row in ("untrained", "mr") if row in scores}
    return {flag: points for flag, points in found.items() if len(points) > 1}, levels
