"""A folder of results: rows of scores, confusion matrices, and the table on the screen.

results.jsonl holds a row for each seed of each run, an object a line; what lies beside is named in
the rows. Top to bottom: what is checked before anything is written; rows; files; the table.
"""

import csv
import json
import os
import tempfile

import numpy as np

from files import replacing


def check_output(out):
    """Raise FileExistsError where results would mix with something else, and OSError where they
    cannot be written; leaves nothing behind."""
    results = out / "results.jsonl"
    ours = results.exists()
    if out.exists() and not ours and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(
            f"--out {out} exists and holds no results.jsonl; name a new folder, or one of earlier "
            "results to add to"
        )
    try:
        there = next(p for p in (out, *out.absolute().parents) if p.exists())
        tempfile.TemporaryDirectory(dir=there).cleanup()  # permissions alone do not tell
        if ours:
            results.open("a").close()
    except OSError as error:
        raise OSError(f"--out {out} cannot be written ({error}); name another folder") from error


def append_row(results, row):
    """Add a row to results.jsonl, on a line of its own where a kill has left a torn one."""
    with results.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")


def write_matrix(path, matrix, classes):
    """Save a confusion matrix as CSV, rows label, columns prediction, both with class names."""
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["label / prediction", *classes])
        rows.writerows([name, *counts] for name, counts in zip(classes, matrix, strict=True))


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
