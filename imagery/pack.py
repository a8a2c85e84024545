"""From pairs of images to a store: chips, splits, statistics (`data.py pack`).

Nothing is resampled on the way in: chips are cut on the MR pixel grid, and the HR chip is the
whole-pixel window around the same ground together with the fractional place of the MR chip in it,
so any pixel ratio and any offset of the two grids stay exact.

Units of a Listing are opened and cut by threads, a few ahead, and written in their order; nothing
that grows with the input is held in memory. Until it is complete the store grows in OUT.packing,
whose journal says how far the files are whole: the same command continues there after a kill.
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import math
import os
import shutil
from collections import Counter, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import figures
from data import FORMAT, INDEX, SPLITS, VERSION, WINDOW, resample
from imagery import raster

ROWS = [name for name in INDEX if name not in ("chip", "hr", "split")]  # known while packing
SKIPPED = "mr_source row col hr_source valid reason".split()
FILES = {
    *("mr.npy", "hr.npy", "index.csv", "meta.json", "skipped.csv", "contact.png"),
    *("flags.csv", "check.csv", "check.png"),  # of data.py check
}
# what grows in OUT.packing; only ever appended to, so that it can be cut back to the journal
GROWING = "store/mr.npy store/hr.npy store/skipped.csv rows.csv chips.bin frames.jsonl".split()
BLOCK_BYTES = 2**25  # stored pixels of the chips that are cut at a time
SURVEY = 256  # units whose headers are read first, where the publisher cut all images to one size
SLACK = 1e-3  # pixels; real georeferences are rounded
ALIKE = 0.05  # of the pixel ratio and of the pixel size: more is another kind of pair
REGION = 1e6  # metres from a frame's anchor within which other projections share its blocks
MOST = 10**6  # of what counts pixels, chips or threads
PICTURES = 16  # pairs on the contact sheet
# Sentinel-2 reflectance x 10000 has 1000 added from processing baseline 04.00 on. Then no pixel is
# darker than a bit below 1000 in any band; without, nearly every chip holds water, shade or plants
# that are, in blue at least, and only deserts, snow and clouds are not. Beyond 2000 in the darkest
# band it is another scale.
DARKEST = 900, 2000

# What all chips of a store share. shape, dtype, gsd, nodata: by sensor, "hr" not in shape where no
# MR image has HR. ratio: HR pixels to an MR pixel (rows, cols). offsets: by sensor, all that are
# added to pixels; offset: DN to add to MR, None where the sources tell. unpaired: whether MR chips
# without HR are kept
Job = namedtuple(
    "Job",
    "chip stride shape dtype ratio gsd nodata crs offsets offset min_valid unpaired",
    defaults=(None, 1.0, False),
)
# Chips to be cut at a time from a Pair. corners: (n, 2); partners: [(hr, ratio, offset)]; reason:
# why there are none; why: what is damaged, and then pair is None
Block = namedtuple("Block", "pair corners partners reason why", defaults=("",))
# One chip: row, a dict for rows.csv or skipped.csv; images, [(pixels, moments)] of MR and maybe HR,
# [] of a chip that is skipped; why, "" of a pair, else why it is none, or what is damaged
Chip = namedtuple("Chip", "row images why")


class NoChip(ValueError):
    """No chip, or none to train on, is left under these flags: there is nothing to continue."""


def add_flags(parser, formats):
    """The flags of `data.py pack`. formats: the names that --format takes."""

    def names(text):
        return [name.strip() for name in text.split(",")]

    # fmt: off
    parser.add_argument("paths", nargs="+", metavar="[ROOT] OUT",
                        help="folder of the set, not with --mr; folder of the store, to be made")
    g = parser.add_argument_group("input")
    g.add_argument("--format", choices=formats, default="geotiff",
                   help="what ROOT holds, as its publisher ships it (default: geotiff)")
    g.add_argument("--mr", help="in place of ROOT, MR images: folder, file or quoted glob")
    g.add_argument("--hr", help="HR images: folder, file or quoted glob (default: none, a store "
                   "of MR alone)")
    choose = "bands of %s files in the order wanted, names or indices from 0 (default: all"
    g.add_argument("--mr-bands", type=names, metavar="B,..", help=choose % "MR" + ")")
    g.add_argument("--hr-bands", type=names, metavar="B,..",
                   help=choose % "HR" + ", or those that MR has by name, if it has any)")
    g.add_argument("--band-names", type=names, metavar="B,G,R,NIR",
                   help="what the chosen bands are called (default: as in the first MR file)")
    g.add_argument("--hr-band-names", type=names, metavar="B,..",
                   help="the same of HR, which may have bands that MR has not (default: as in the "
                   "first HR file; as MR's where either names none)")
    g.add_argument("--nodata", type=float,
                   help="value of missing pixels in files that declare none (default: none)")
    g.add_argument("--clouds", metavar="PRODUCT",
                   help="hide cloud, cloud shadow and cirrus by the mask of sentinel2 (SCL), "
                   "landsat (QA_PIXEL), hls (Fmask) or planet (udm2), which is a band or lies "
                   "beside the image; several with commas; what is hidden counts as missing for "
                   "--min-valid (default: nothing is hidden)")
    g.add_argument("--mask-band", metavar="NAME",
                   help="the same by another mask: a band, or the end of the name of a file beside "
                   "the image, NAME:1 for the second band of that")
    g.add_argument("--mask-values", metavar="N,bitN,..",
                   help="its values that hide the ground, or bits, such as 3,8,9,10 or bit3,bit4")
    g.add_argument("--max-days", type=float, metavar="N",
                   help="most days between HR and MR, where both names tell the date (default: any "
                   "number, the nearest first)")
    g.add_argument("--warp", choices=["cubic", "bilinear", "nearest"],
                   help="how HR of another projection than MR's is resampled (default: cubic)")
    g.add_argument("--offset", type=float, metavar="DN",
                   help="added to MR pixels, of unsigned ones to no less than 0; -1000 for "
                   "Sentinel-2 from processing baseline 04.00 on (default: what SAFE folders say)")
    g = parser.add_argument_group("options of published sets")
    g.add_argument("--product", choices=["10m", "20m"],
                   help="sen2venus: pixels of MR (default: 10m)")
    g.add_argument("--level", choices=["L2A", "L1C"],
                   help="worldstrat: of Sentinel-2 (default: L2A)")
    g.add_argument("--hr-product", dest="hr", choices=["rgbn", "ps"],
                   help="worldstrat: SPOT as taken or pan-sharpened (default: rgbn)")
    g.add_argument("--per-site", type=int, metavar="N",
                   help="rapidai4eo, worldstrat: MR dates of each place (default: 1)")
    g.add_argument("--mr-dataset", metavar="NAME",
                   help="hdf5: the MR images (default: as in the known files)")
    g.add_argument("--hr-dataset", metavar="NAME",
                   help="hdf5: the HR images (default: as in the known files)")
    g.add_argument("--splits", metavar="FILE",
                   help="hdf5: JSON {split: [rows]} (default: the one beside the file)")
    g = parser.add_argument_group("origin, goes into meta.json (of published sets it is known)")
    g.add_argument("--source-name", metavar="TEXT", help="name of the images (default: none)")
    g.add_argument("--licence", metavar="TEXT", help="their licence (default: none)")
    g.add_argument("--attribution", metavar="TEXT", help="who is to be named (default: none)")
    g.add_argument("--url", metavar="URL", help="where they are from (default: none)")
    g = parser.add_argument_group("chips")
    g.add_argument("--chip", type=int,
                   help="side in MR pixels (default: whole images of published sets, else 64)")
    g.add_argument("--stride", type=int, help="step in MR pixels (default: the chip)")
    g.add_argument("--min-valid", type=float, default=1.0,
                   help="least fraction of valid pixels in each chip, above 0 (default: 1.0)")
    g.add_argument("--keep-unpaired", action=argparse.BooleanOptionalAction, default=False,
                   help="keep MR chips without valid HR (default: no; yes without any HR)")
    g = parser.add_argument_group("splits, where the publisher gives none")
    g.add_argument("--split-block", type=int, default=8,
                   help="side in chips of the blocks of ground that are dealt, where no sites are "
                   "known (default: 8)")
    g.add_argument("--val", type=float, default=0.1, help="fraction of chips (default: 0.1)")
    g.add_argument("--test", type=float, default=0.0, help="fraction of chips (default: 0)")
    g.add_argument("--seed", type=int, default=0,
                   help="of the deal, and of what --per-site draws (default: 0)")
    g = parser.add_argument_group("run")
    g.add_argument("--workers", type=int,
                   help="threads that read and cut (default: the CPUs, at most 8)")
    g.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False,
                   help="replace a store that is there, or what another command began to pack "
                   "(default: no)")
    # fmt: on


def pack(
    listing,
    out,
    *,
    chip=None,
    stride=None,
    min_valid=1.0,
    keep_unpaired=False,
    offset=None,
    split_block=8,
    val=0.1,
    test=0.0,
    seed=0,
    workers=None,
    overwrite=False,
    command="",
    inputs=(),
):
    """Cut the pairs of a Listing into a store at `out`; the arguments are flags of `data.py pack`.

    inputs: what the command says of the input, {flag: value}; with others it does not continue.
    Prints a report and returns the store's meta. Raises FileNotFoundError, FileExistsError or
    ValueError, one sentence that names file or flag and remedy; `out` then stays as it was. What
    was packed until then is kept in `out`.packing, and the same call continues there.
    """
    if chip is None:
        chip = listing.chip or 64
    stride = chip if stride is None else stride
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    sizes = chip, stride, split_block, workers
    if min(sizes) < 1 or max(sizes) > MOST or seed < 0:
        raise ValueError(
            f"--chip {chip}, --stride {stride}, --split-block {split_block} and --workers "
            f"{workers} must be 1 to {MOST}, --seed {seed} 0 or more"
        )
    if not (0 < min_valid <= 1 and 0 <= val and 0 <= test and val + test < 1):
        raise ValueError(
            f"--min-valid {min_valid} must be above 0 and at most 1, --val {val} and --test {test} "
            "at least 0 and less than 1 together"
        )
    for sensor, flag in (("mr", "--band-names"), ("hr", "--hr-band-names")):
        names = listing.bands[sensor]
        if len({name.lower() for name in names}) < len(names):
            raise ValueError(
                f"{flag} {','.join(names)}: a name occurs twice; give each band its own"
            )
    out = Path(os.path.realpath(out))  # a link stays, what it leads to is replaced
    folder = out.with_name(f"{out.name}.packing")
    with alone(out), named(folder), ExitStack() as stack:
        check_output(out, overwrite)
        pool = ThreadPoolExecutor(workers)
        stack.callback(pool.shutdown, cancel_futures=True)  # after an error nobody waits for more
        job = survey(listing, pool, chip, stride)
        job = job._replace(min_valid=min_valid, unpaired=keep_unpaired or "hr" not in job.shape)
        if offset is not None:
            kind = job.dtype["mr"]
            most = (np.finfo if kind.kind == "f" else np.iinfo)(kind).max
            if not abs(offset) < most:  # NaN is not
                raise ValueError(
                    f"--offset {offset}: to be added to {kind} pixels, the largest of which is "
                    f"{most}; a smaller number expected"
                )
            job = job._replace(offsets={**job.offsets, "mr": [offset]}, offset=offset)
        plan = {
            **dict(inputs),
            "input": fingerprint(listing, job),
            "--chip": chip,
            "--stride": stride,
            "--min-valid": min_valid,
            "--keep-unpaired": keep_unpaired,
            "--offset": offset,
            "--split-block": split_block,
            "--val": val,
            "--test": test,
            "--seed": seed,
        }
        state = open_partial(folder, plan, listing, job, overwrite)
        try:
            stream(listing, folder, job, state, pool, workers, chip * split_block)
            meta, skipped, notes = complete(listing, folder, job, state, plan, command)
            check_output(out, overwrite)  # what came there meanwhile is not to be deleted
        except BaseException as error:
            if isinstance(error, NoChip) or not state["units"]:
                shutil.rmtree(folder)
            else:
                print(
                    f"{folder}: {state['units']} of {len(listing.units)} units are packed; the "
                    "same command continues from there"
                )
            raise
        if (out / "flags.csv").exists():
            notes.append(
                f"the flags of the old store are gone; python data.py check {out} makes them anew"
            )
        if out.exists():
            os.replace(out, folder / "old")
        os.replace(folder / "store", out)
        shutil.rmtree(folder)
    report(out, meta, skipped, state, notes)
    return meta


@contextmanager
def alone(out):
    """Keep other processes from packing to `out`, by a lock on OUT.packing.lock, which the system
    releases however this process ends. Raises FileExistsError where another holds it."""
    path = out.with_name(f"{out.name}.packing.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = getattr(os, "O_TEMPORARY", 0)  # Windows deletes open files in no other way
    with open(path, "ab", opener=lambda name, how: os.open(name, how | temporary)) as file:
        try:
            lock(file)
            mine = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, PermissionError):
            mine = False
        except OSError as error:  # some network drives have no locks
            print(f"warning: {path}: cannot be locked ({error}); start no other pack to {out}")
            mine = True
        if not mine:  # or its owner deleted it just now
            raise FileExistsError(
                f"{out}: another data.py pack is writing it; wait for it or choose another OUT"
            )
        try:
            yield
        finally:
            if not temporary:
                path.unlink(missing_ok=True)


@contextmanager
def named(path):
    """Give an error of the system its file, where it has none: a full disk names none."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


def lock(file):
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def check_output(out, overwrite):
    if out.exists() and not is_store(out):
        raise FileExistsError(
            f"{out}: exists and is not a store; move it elsewhere, or choose another OUT"
        )
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out}: a store is there; add --overwrite to replace it")
    if out.exists() and (foreign := {file.name for file in out.iterdir()} - FILES):
        raise FileExistsError(
            f"{out}: --overwrite would delete {min(foreign)}, which is no part of the store; move "
            "it elsewhere"
        )


def in_order(pool, function, items, ahead):
    """Yield function(item) of each item in order, computed by the pool, `ahead` of them at most."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# what the chips have in common


def survey(listing, pool, chip, stride):
    """Read headers to say what all chips share, before any pixel is read: the Job.

    Of all units, or of a sample where the publisher cut the images to one size (Listing.chip).
    Raises ValueError if the pairs do not fit each other.
    """
    units, most = listing.units, None
    if listing.chip:
        sample = np.linspace(0, len(units) - 1, min(len(units), SURVEY)).astype(int)
        units, most = [units[i] for i in sample], 16
    found, pairs = [], []  # (ratio, mr, hr, size of a chip's window in hr)
    damaged = []

    def headers(unit):
        try:
            with named(unit.name):
                return list(itertools.islice(unit.open(), most))
        except ValueError as error:
            if not listing.chip:  # a folder of one's own is to be mended
                raise
            damaged.append(error)  # one of the archive's many: it is left out, see `cut`
            return []

    opened = in_order(pool, headers, units, 2 * SURVEY)
    for pair in itertools.chain.from_iterable(
        tqdm(opened, "headers", len(units), leave=False, unit="unit")
    ):
        pairs.append(pair)
        corners = chip_corners(pair.mr.info, chip, stride).reshape(-1, 2)
        for hr in pair.hrs:
            grid = align(pair.mr.info, hr.info)
            _, low, high, inside = place_chips(corners, chip, hr.info, *grid)
            found.append((grid[0], pair.mr, hr, (high - low)[inside].max(0, initial=0)))
    if not pairs and damaged:
        raise damaged[0]
    if not pairs:
        reasons_ = reasons(Counter(reason for _, reason in listing.skipped))
        raise ValueError(f"nothing to pack: no image of a pair was found (skipped: {reasons_})")
    types = Counter((mr.info.dtype, hr.info.dtype) for _, mr, hr, _ in found)
    types = types or Counter((pair.mr.info.dtype, None) for pair in pairs)
    dtype = dict(zip(("mr", "hr"), types.most_common(1)[0][0], strict=True))
    odd = [message for pair in pairs if (message := another_type(pair, dtype))]
    if odd and not listing.chip:
        raise ValueError(f"{odd[0]}; pack them apart")
    found = [f for f in found if (f[1].info.dtype, f[2].info.dtype) == (*dtype.values(),)]
    mr = next(pair.mr for pair in pairs if pair.mr.info.dtype == dtype["mr"])
    hr = ratio = None
    shape = {"mr": (len(listing.bands["mr"]), chip, chip)}
    if listing.bands["hr"]:
        size = np.zeros(2)
        if found:
            middle = np.argsort([ratio[0] for ratio, *_ in found], kind="stable")
            ratio, mr, hr, _ = found[middle[(len(found) - 1) // 2]]
            odd = [pair for pair in found if not alike(pair[0], pair[1], ratio, mr.info.gsd)]
            if odd and not listing.chip:
                other, of, *_ = odd[0]
                raise ValueError(
                    f"{of.info.path}: {other[0]:.6g} HR pixels to an MR pixel of "
                    f"{of.info.gsd or 1:g}, but {ratio[0]:.6g} to {mr.info.gsd or 1:g} in "
                    f"{mr.info.path}; pack files of one pixel size at a time"
                )
            size = np.max([p[3] for p in found if alike(p[0], p[1], ratio, mr.info.gsd)], 0)
        if not size.all():
            raise ValueError(
                f"--chip {chip}: no MR chip of {chip} x {chip} pixels lies wholly on an HR file; "
                "use smaller chips"
            )
        shape["hr"] = (len(listing.bands["hr"]), *size.tolist())
    odd = [pair.mr.info for pair in pairs if not same_gsd(pair.mr, mr.info.gsd)]
    if odd and not listing.chip:
        raise ValueError(
            f"{odd[0].path}: {gsd_text(odd[0].gsd)}, but {mr.info.path} has "
            f"{gsd_text(mr.info.gsd)}; pack files of one pixel size at a time"
        )
    return Job(
        chip=chip,
        stride=stride,
        shape=shape,
        ratio=None if ratio is None else ratio.tolist(),
        gsd={"mr": mr.info.gsd, "hr": hr and hr.info.gsd},
        dtype=dtype,
        nodata={"mr": mr.nodata, "hr": hr and hr.nodata},
        crs=mr.info.crs,
        offsets={
            "mr": sorted({pair.mr.offset for pair in pairs}),
            "hr": sorted({image.offset for _, _, image, _ in found}),
        },
    )


def align(mr, hr):
    """(ratio, offset), each (2,) of rows, cols: HR pixel = offset + ratio * MR pixel, corners.

    Without georeference both images are taken to show the same ground. Raises ValueError if the
    grids are rotated against each other or HR is coarser than MR.
    """
    if mr.transform is None:
        ratio, offset, skew = np.array([hr.height / mr.height, hr.width / mr.width]), np.zeros(2), 0
    else:
        a, b, c, d, e, f = mr.transform
        to_mr = np.array([[e, d], [b, a]])  # (row, col) -> (y, x)
        a, b, hr_c, d, e, hr_f = hr.transform
        to_hr = np.array([[e, d], [b, a]])
        matrix = np.linalg.solve(to_hr, to_mr)
        offset = np.linalg.solve(to_hr, [f - hr_f, c - hr_c])
        ratio = matrix.diagonal().copy()
        skew = np.abs(matrix - np.diag(ratio)).max() * max(mr.height, mr.width)
    if skew > 0.1 or ratio.min() <= 0:
        raise ValueError(
            f"{hr.path}: its pixel grid is rotated or mirrored against {mr.path}; warp one of them "
            "to the axes of the other with gdalwarp"
        )
    if ratio.min() < 1 - 1e-6:
        raise ValueError(
            f"{hr.path}: HR coarser than MR, {ratio.min():.4g} of its pixels to one of {mr.path}; "
            "swap --mr and --hr or choose other files"
        )
    return ratio, offset


def chip_corners(info, chip, stride):
    """(rows, cols, 2) int64 row, col of the top-left corner of every chip of an MR image."""
    rows, cols = (np.arange(0, side - chip + 1, stride) for side in (info.height, info.width))
    return np.stack(np.meshgrid(rows, cols, indexing="ij"), -1)


def place_chips(corners, chip, hr, ratio, offset):
    """Where MR chips lie in an HR image.

    Returns corner (n, 2) float and the whole-pixel window around the chip, low and high (n, 2)
    int64, in HR pixels; inside (n,) bool, whether the image holds the whole window, but for a rim
    of half an MR pixel: publishers cut 320 m to 533 pixels of 0.6 m.
    """
    corner = offset + ratio * corners
    low = np.floor(corner + SLACK).astype(np.int64)
    high = np.ceil(corner + ratio * chip - SLACK).astype(np.int64)
    short = np.maximum(-low, high - (hr.height, hr.width)).max(1)
    return corner, low, high, short <= min(ratio) / 2


def alike(ratio, mr, nominal, gsd):
    """Whether a pair is of the kind that the store holds, by its pixel ratio and MR's pixel."""
    return np.abs(ratio / nominal - 1).max() <= ALIKE and same_gsd(mr, gsd)


def same_gsd(mr, gsd):
    return abs((mr.info.gsd or 1) / (gsd or 1) - 1) <= ALIKE


def gsd_text(gsd):
    return f"gsd {gsd:g}" if gsd else "no georeference"


def fingerprint(listing, job):
    """Text that another input has not: what a partial store is continued by."""
    digest = hashlib.sha256()
    for unit in listing.units:
        # by its name it is found again, by its key it is known to be the same
        digest.update(f"{unit.name}\n{unit.key}\n".encode(errors="surrogateescape"))
    digest.update(repr((listing.bands, job)).encode())
    return f"{len(listing.units)} units {digest.hexdigest()[:12]}"


# the partial store


def open_partial(folder, plan, listing, job, overwrite):
    """Make OUT.packing, or take up the one that the same command left; returns its state.

    Raises FileExistsError if another command left it, unless it may be overwritten.
    """
    names = {file.name for file in folder.iterdir()} if folder.exists() else set()
    if names - {"plan.json.partial"} and "plan.json" not in names:
        raise FileExistsError(
            f"{folder}: exists and is no partial store; move it elsewhere, or choose another OUT"
        )
    if "plan.json" in names:
        old = json.loads((folder / "plan.json").read_text("utf-8"))
        # as text, in which NaN is NaN
        was, now = ({k: f"{v}" for k, v in p.items() if v is not None} for p in (old, plan))
        other = [k for k in {**now, **was} if now.get(k) != was.get(k)]
        if other and not overwrite:
            was, now = (p.get(other[0], "not given") for p in (was, now))
            raise FileExistsError(
                f"{folder}: another command was interrupted there ({other[0]} {was}, now {now}); "
                "repeat that one to continue it, or discard it with --overwrite or by deleting the "
                "folder"
            )
        if other or not (folder / "store").exists():  # it went to OUT, and the rest stayed
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json.partial").write_text(json.dumps(plan), "utf-8")
    os.replace(folder / "plan.json.partial", folder / "plan.json")

    entry, end = read_journal(folder / "journal.jsonl")
    if entry is None:
        shutil.rmtree(folder / "store", ignore_errors=True)
        (folder / "store").mkdir()
        for name in (*GROWING, "journal.jsonl"):
            (folder / name).write_bytes(b"")
        for sensor, shape in job.shape.items():
            with (folder / "store" / f"{sensor}.npy").open("wb") as file:
                write_header(file, 0, shape, job.dtype[sensor])
        with (folder / "store" / "skipped.csv").open("wb") as file:
            file.write(csv_line(SKIPPED))
            for name, reason in listing.skipped:
                file.write(csv_line(fill_row(SKIPPED, {"mr_source": name, "reason": reason})))
        skipped = Counter(reason for _, reason in listing.skipped)
        return {
            "units": 0,
            "chips": 0,
            "skipped": skipped,
            "without": Counter(),
            "valid": 0.0,  # most of a chip that was skipped
            "holes": {},
            "damaged": [],  # what the first of the files that cannot be read say
        }
    sizes = entry.pop("sizes")
    done = entry["units"] == len(listing.units)  # then the arrays may have been closed up already
    for name, size in {**sizes, "journal.jsonl": end}.items():
        found = (folder / name).stat().st_size if (folder / name).exists() else -1
        if found < size and not (done and name.endswith(".npy")):
            raise ValueError(
                f"{folder / name}: {size} bytes expected, {found} found; delete {folder} and pack "
                "again"
            )
        if found > size:
            os.truncate(folder / name, size)
    print(f"{folder}: continuing after {entry['units']} of {len(listing.units)} units")
    return entry | {key: Counter(entry[key]) for key in ("skipped", "without")}


def read_journal(path):
    """The last whole entry, None without one, and where it ends; a kill may cut a line short."""
    last, end = None, 0
    if path.exists():
        with path.open("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):
                    last, end = line, end + len(line)
    return last and json.loads(last), end


def stream(listing, folder, job, state, pool, ahead, block_pixels):
    """Cut the units that the journal does not have yet, and append their chips.

    state: what the journal's last entry says; brought up to date with every unit. ahead: units
    that are open at a time. block_pixels: side of a block of ground.
    """
    record = record_of(job)
    frames = [
        (frame["crs"], np.array(frame["anchor"]), np.array(frame["side"]))
        for frame in map(json.loads, (folder / "frames.jsonl").read_text("utf-8").splitlines())
    ]
    todo = listing.units[state["units"] :]

    def work():
        lay = partial(lay_out, job)
        for unit, blocks in zip(todo, in_order(pool, lay, todo, ahead), strict=True):
            yield from ((unit, k / len(blocks), block) for k, block in enumerate(blocks, 1))
            yield unit, 1.0, None

    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("ab")) for name in GROWING}
        journal = stack.enter_context((folder / "journal.jsonl").open("ab"))
        bar = stack.enter_context(
            tqdm(
                desc="pack",
                total=len(listing.units),
                initial=state["units"],
                unit="unit",
                unit_scale=True,
            )
        )
        for unit, share, block, chips, holes in in_order(
            pool, partial(cut, job), work(), 2 * ahead
        ):
            if block is None:
                state["units"] += 1
                for file in files.values():
                    file.flush()
                sizes = {name: file.tell() for name, file in files.items()}
                journal.write(json.dumps({"unit": unit.name, **state, "sizes": sizes}).encode())
                journal.write(b"\n")
                journal.flush()
                continue
            kept = [chip for chip in chips if chip.images]
            for chip in chips:
                if not chip.images:
                    files["store/skipped.csv"].write(csv_line(fill_row(SKIPPED, chip.row)))
                    state["skipped"][chip.row["reason"]] += 1
                    state["damaged"] = [*state["damaged"], *filter(None, [chip.why])][:5]
                    state["valid"] = max(state["valid"], chip.row.get("valid", 0.0))
                elif chip.why:
                    state["without"][chip.why] += 1
            known = len(frames)
            records = np.zeros(len(kept), record)
            if kept:
                records["keys"] = ground_keys(block.pair, kept, job.chip, block_pixels, frames)
                records["split"] = SPLITS.index(block.pair.split) if block.pair.split else -1
            for crs, anchor, side in frames[known:]:
                frame = {"crs": crs, "anchor": anchor.tolist(), "side": side.tolist()}
                files["frames.jsonl"].write(json.dumps(frame).encode() + b"\n")
            for chip, about in zip(kept, records, strict=True):
                files["rows.csv"].write(csv_line(fill_row(ROWS, chip.row)))
                about["hr"] = len(chip.images) == 2
                for sensor, (pixels, moments) in zip(job.shape, chip.images, strict=False):
                    files[f"store/{sensor}.npy"].write(pixels.tobytes())
                    about[sensor + "_moments"] = moments
            files["chips.bin"].write(records.tobytes())
            for path, count in holes.items():
                path = path if path in state["holes"] or len(state["holes"]) < 5 else "other files"
                state["holes"][path] = state["holes"].get(path, 0) + count
            state["chips"] += len(kept)
            bar.set_postfix_str(f"{state['chips']:,} chips", refresh=False)
            bar.n = state["units"] + share
            bar.update(0)


# one unit: from headers to chips


def record_of(job):
    """dtype of what is kept of a chip for the end, in chips.bin."""
    moments = [(f"{s}_moments", "<f8", (shape[0], 4)) for s, shape in job.shape.items()]
    return np.dtype([("keys", "<i8", 5), ("split", "i1"), ("hr", "?"), *moments])


def lay_out(job, unit):
    """Open a unit and divide it: [Block]."""
    blocks, none = [], np.zeros((0, 2), int)
    try:
        with named(unit.name):
            pairs = list(unit.open())
    except ValueError as error:
        return [Block(None, none, [], "cannot be read", str(error))]
    for pair in pairs:
        mr, partners, reason = pair.mr, [], pair.reason or "no HR file for it"
        if why := another_type(pair, job.dtype):
            blocks.append(Block(None, none, [], "another type of pixels", why))
            continue
        for hr in pair.hrs:
            reason = "another pixel ratio"
            try:
                ratio, offset = align(mr.info, hr.info)
            except ValueError:  # the survey raises it of what it sees
                continue
            if alike(ratio, mr, np.array(job.ratio), job.gsd["mr"]):
                partners.append((hr, ratio, offset))
        corners = chip_corners(mr.info, job.chip, job.stride)
        if not same_gsd(mr, job.gsd["mr"]):
            blocks.append(Block(pair, none, [], "another pixel size"))
        elif not corners.size:
            blocks.append(Block(pair, none, [], "smaller than a chip"))
        elif not partners and not job.unpaired:
            blocks.append(Block(pair, none, [], reason))
        else:
            rows, cols = corners.shape[:2]
            chips = max(1, int(BLOCK_BYTES / chip_bytes(job)))
            across, down = min(cols, chips), max(1, chips // cols)
            blocks += [
                Block(pair, corners[r : r + down, c : c + across].reshape(-1, 2), partners, reason)
                for r in range(0, rows, down)
                for c in range(0, cols, across)
            ]
    return blocks


def another_type(pair, dtype):
    """What a pair has another type of pixels of than the store, as text; "" if it has none."""
    for sensor, source in (("mr", pair.mr), *(("hr", hr) for hr in pair.hrs)):
        if source.info.dtype != dtype[sensor]:
            return (
                f"{source.info.path}: {source.info.dtype} pixels, but the {sensor.upper()} of this "
                f"store is {dtype[sensor]}"
            )
    return ""


def chip_bytes(job):
    """Pixels in bytes that are decoded for a chip, MR and HR together."""
    spread = (max(job.chip, job.stride) / job.chip) ** 2
    return spread * sum(math.prod(job.shape[s]) * job.dtype[s].itemsize for s in job.shape)


def cut(job, work):
    """Cut a block; one whose file is damaged is left out: archives of a million files have some.

    work: (unit, share, Block or None). Returns it with [Chip] and what NaN and inf were found,
    {path: pixels}. What cannot be reached is an OSError, and stops.
    """
    unit, share, block = work
    holes = Counter()
    if block is None:
        return unit, share, block, [], holes
    if block.why:
        chip = Chip({"mr_source": unit.name, "reason": block.reason}, [], block.why)
        return unit, share, block, [chip], holes
    try:
        with named(unit.name):
            chips = cut_block(job, block, holes)
    except ValueError as error:
        chips = [Chip({"mr_source": unit.name, "reason": "cannot be read"}, [], str(error))]
    return unit, share, block, chips, holes


def cut_block(job, block, holes):
    """Cut the chips of a block, each with the first HR image that covers it and is valid enough:
    [Chip]. holes: Counter by path, to which NaN and inf are added."""
    mr, here = block.pair.mr, block.corners
    row = {"mr_source": mr.info.path.as_posix(), "mr_date": mr.date}
    if not len(here):
        return [Chip(row | {"reason": block.reason}, [], "")]
    places = [place_chips(here, job.chip, hr.info, *grid) for hr, *grid in block.partners]
    size = np.array(job.shape["hr"][1:]) if places else None
    fits = [((high - low) <= size).all(1) for _, low, high, _ in places]
    fate = [{"reason": "no HR file covers it" if places else block.reason} for _ in here]
    for (*_, inside), fit in zip(places, fits, strict=True):
        for k in np.flatnonzero(inside & ~fit):
            fate[k] = {"reason": "another pixel ratio"}
        inside &= fit
    wanted = np.arange(len(here))
    if not job.unpaired:
        wanted = np.flatnonzero(np.any([inside for *_, inside in places], axis=0))

    waiting, images = {}, {}  # MR chips without HR yet; what is stored
    offset = mr.offset if job.offset is None else job.offset
    read = read_chips(mr, here[wanted], job.shape["mr"][1:], offset, holes)
    for k, image in zip(wanted, read, strict=True):
        valid = float(image[1].mean())
        if valid >= job.min_valid:
            waiting[k] = image
            fate[k]["valid"] = valid
        else:
            fate[k] = {"valid": valid, "reason": "MR not valid enough"}
    for (hr, ratio, _), (corner, low, high, inside) in zip(block.partners, places, strict=True):
        mine = [k for k in waiting if inside[k] and k not in images]
        sides = np.array([hr.info.height, hr.info.width])
        # inside, but where the chip itself ends beyond the image: there a rim is repeated
        start = np.minimum(low, np.maximum(0, sides - size))
        start = np.where((low < 0) | (high > sides), low, start)
        read = read_chips(hr, start[mine], job.shape["hr"][1:], hr.offset, holes)
        for k, image in zip(mine, read, strict=True):
            valid = float(min(image[1].mean(), waiting[k][1].mean()))
            source = {"hr_source": files_of(hr, start[k], size), "hr_date": hr.date}
            if valid < job.min_valid:
                bad = {"reason": "HR not valid enough"}
                # of a chip that stays, valid is its own
                fate[k] |= bad if job.unpaired else bad | source | {"valid": valid}
                continue
            window = map(float, (*(corner[k] - start[k]), *(ratio * job.chip)))
            window = dict(zip(WINDOW, window, strict=True))
            fate[k] = {"valid": valid, **source, **window}
            images[k] = [waiting[k], image]
    if job.unpaired:
        images = {k: images.get(k, [image]) for k, image in waiting.items()}
    chips = []
    for k, (top, left) in enumerate(here.tolist()):
        stored = [(fill_holes(*image), channel_moments(*image)) for image in images.get(k, [])]
        why = fate[k].get("reason", "") if stored else ""
        place = chip_place(mr.info, top, left)
        chips.append(Chip(row | {"row": top, "col": left} | place | fate[k], stored, why))
    return chips


def files_of(source, start, size):
    """The files that a chip's pixels come from, as text."""
    files = [
        part.info.path.as_posix()
        for part, *place in source.parts
        if (start < np.add(place, (part.info.height, part.info.width))).all()
        and (start + size > place).all()
    ]
    return "; ".join(files) or source.info.path.as_posix()


def chip_place(info, row, col):
    """crs and a to f of index.csv: name of the CRS and transform of the chip at a whole pixel."""
    if info.transform is None:
        return {}
    a, b, c, d, e, f = info.transform
    corner = a * col + b * row + c, d * col + e * row + f
    values = raster.crs_name(info.crs), a, b, corner[0], d, e, corner[1]
    return dict(zip(("crs", *"abcdef"), values, strict=True))


def read_chips(source, corners, size, offset, holes):
    """Yield (pixels (C, *size), valid (*size)) at (n, 2) whole-pixel corners, by one read.

    offset: what is added to the valid pixels. holes: Counter by path, for NaN and inf.
    """
    if not len(corners):
        return
    info = source.info
    low = np.maximum(0, corners.min(0))
    high = np.minimum(corners.max(0) + size, (info.height, info.width))
    found = source.read((*low.tolist(), *(high - low).tolist()), source.bands)
    block, valid = raster.masked(found, source.nodata)
    # an HR file that ends with its chip, among others whose chips need a pixel more of margin
    # and one that ends up to half an MR pixel short: its last row or column is repeated
    before, after = low - corners.min(0), np.maximum(0, corners.max(0) + size - high)
    if before.any() or after.any():
        rim = [*zip(before.tolist(), after.tolist(), strict=True)]
        block, valid = np.pad(block, [(0, 0), *rim], mode="edge"), np.pad(valid, rim, mode="edge")
    if offset:
        block = add_offset(block, offset, source.nodata)
    for row, col in corners - corners.min(0):
        window = slice(row, row + size[0]), slice(col, col + size[1])
        pixels = block[:, *window]
        if pixels.dtype.kind == "f" and not np.isnan(source.nodata or 0):
            missing = int((~np.isfinite(pixels)).any(0).sum())
            if missing:
                holes[info.path.as_posix()] += missing
        yield pixels, valid[window]


def add_offset(pixels, offset, nodata):
    """pixels + offset in their own dtype, clipped to what it holds; nodata stays nodata."""
    if pixels.dtype.kind == "f":
        moved = (pixels + offset).astype(pixels.dtype)
    else:
        about = np.iinfo(pixels.dtype)
        moved = np.clip(np.rint(pixels + float(offset)), about.min, about.max).astype(pixels.dtype)
    return moved if nodata is None else np.where(pixels == nodata, pixels, moved)


def fill_holes(pixels, valid):
    """Give missing pixels their band's mean over the chip's valid ones: no edge, no shift."""
    if valid.all():
        return pixels
    mean = pixels[:, valid].mean(1, dtype=np.float64)
    mean = (mean if pixels.dtype.kind == "f" else mean.round()).astype(pixels.dtype)
    return np.where(valid, pixels, mean[:, None, None])


def channel_moments(pixels, valid):
    """(C, 4) float64 per band over the valid pixels, of which there is one at least: count, mean,
    sum of squared deviations, least."""
    # all are valid nearly always, and to pick them one by one takes 30 times as long
    values = pixels.reshape(len(pixels), -1) if valid.all() else pixels[:, valid]
    values = values.astype(np.float64)
    least, mean, count = values.min(1), values.mean(1), values.shape[1]
    values -= mean[:, None]
    squares = np.einsum("cn,cn->c", values, values)
    return np.stack([np.full(len(mean), count), mean, squares, least], 1)


def pool_moments(moments):
    """(n, C, 4) moments of n sets of pixels to those of all of them together, (C, 4).

    Sums squared deviations within sets and between them: no large squares to cancel.
    """
    count, mean, squares, least = np.moveaxis(moments, -1, 0)
    total = count.sum(0)
    grand = (count * mean).sum(0) / total
    squares = (squares + count * (mean - grand) ** 2).sum(0)
    return np.stack([total, grand, squares, least.min(0)], 1)


def statistics(moments, chips):
    """Mean and standard deviation per band, lists, over the chips of those numbers; a flat band
    gets std 1. moments: (N, C, 4), maybe a memory map, read a part at a time."""
    parts = np.array_split(chips, math.ceil(len(chips) / 2**16))
    count, mean, squares, _ = pool_moments(np.stack([pool_moments(moments[p]) for p in parts])).T
    std = np.sqrt(squares / count)
    return mean.tolist(), np.where(std > 0, std, 1.0).tolist()


# splits


def ground_keys(pair, chips, chip, block_pixels, frames):
    """What a chip must not be divided from: (n, 5) int64, the block of ground of its centre and of
    its four corners; one number for all five where the site or the file decides.

    frames: [(crs, anchor, side)], the block grids, to which an image far from all adds one,
    anchored at the first image's corner, so that another image of the same ground (another date)
    falls into the same blocks; blocks have `block_pixels` MR pixels a side.
    """
    info = pair.mr.info
    if pair.site is not None or info.transform is None:
        name = info.path.as_posix() if pair.site is None else str(pair.site)
        digest = hashlib.sha256(name.encode()).digest()
        return -1 - (int.from_bytes(digest[:8], "little") >> 2)
    if not chips:
        return 0
    a, b, c, d, e, f = info.transform
    number = next((n for n, frame in enumerate(frames) if near(info, frame)), None)
    if number is None:
        number = len(frames)
        side = block_pixels * np.array([math.hypot(b, e), math.hypot(a, d)])
        frames.append((info.crs, np.array([f, c]), side))
    crs, anchor, side = frames[number]
    corner = np.array([[here.row["row"], here.row["col"]] for here in chips])
    rows, cols = (corner[:, :1] + [0, 0, chip, chip], corner[:, 1:] + [0, chip, 0, chip])
    y, x = d * cols + e * rows + f, a * cols + b * rows + c  # (n, 4)
    if crs != info.crs:
        x, y = (v.reshape(y.shape) for v in raster.project(info.crs, crs, x.ravel(), y.ravel()))
    slack = SLACK / block_pixels * side
    south, north = y.min(1) + slack[0], y.max(1) - slack[0]
    west, east = x.min(1) + slack[1], x.max(1) - slack[1]
    y = np.stack([(south + north) / 2, south, north, south, north], 1)
    x = np.stack([(west + east) / 2, west, east, east, west], 1)
    down, across = np.floor((y - anchor[0]) / side[0]), np.floor((x - anchor[1]) / side[1])
    # 24 bits for each: the Earth has fewer blocks of a metre a side along its equator
    return (
        number * 2**48 + (down.astype(np.int64) + 2**23) * 2**24 + across.astype(np.int64) + 2**23
    )


def near(info, frame):
    """Whether an image is dealt by the blocks of ground of this frame: in its CRS, or so near that
    the frame's CRS has little distortion there."""
    crs, anchor, _ = frame
    if crs == info.crs or not crs or not info.crs:
        return crs == info.crs
    if raster.is_geographic(crs):
        return False
    try:
        x, y = raster.project(info.crs, crs, *raster.corners(info))
    except ValueError:
        return False
    return bool(np.hypot(x - anchor[1], y - anchor[0]).max() < REGION)


def deal(records, fractions, seed):
    """Deal chips to splits: the publisher's where given, else with their site or block of ground.

    Returns split (N,) int8 positions in SPLITS, -1 for a chip that touches two; and how many sites
    or blocks were dealt.
    """
    keys, first, ids = np.unique(records["keys"], return_index=True, return_inverse=True)
    # numbered as they come, whatever their keys are
    ids = np.argsort(np.argsort(first))[ids].reshape(-1, 5)
    given = records["split"]
    sizes = np.bincount(ids[given < 0, 0], minlength=len(keys))
    dealt = assign_splits(sizes, fractions, seed)
    dealt = np.array([SPLITS.index(name) for name in dealt], np.int8)[ids]
    alone = (dealt == dealt[:, :1]).all(1)
    return np.where(given >= 0, given, np.where(alone, dealt[:, 0], -1)), np.count_nonzero(sizes)


def assign_splits(sizes, fractions, seed):
    """Deal blocks of ground to "train" and the splits of `fractions` (name -> share of chips).

    sizes: (blocks,) chips of each. Blocks are taken in a seeded order as long as that brings the
    split closer to its share; a split that would get none gets the block nearest to its share, as
    long as train keeps one. Returns (blocks,) names.
    """
    split = np.full(len(sizes), "train")
    order = np.random.default_rng(seed).permutation(np.flatnonzero(sizes))
    left = len(order)  # blocks that train has
    for name, fraction in fractions.items():
        target, taken = fraction * sizes.sum(), 0
        for block in order:
            closer = abs(taken + sizes[block] - target) < target - taken
            if closer and split[block] == "train" and left > 1:
                split[block] = name
                taken += sizes[block]
                left -= 1
        if fraction and not taken and left > 1:
            free = order[split[order] == "train"]
            split[free[np.abs(sizes[free] - target).argmin()]] = name
            left -= 1
    return split


# the store


def complete(listing, folder, job, state, plan, command):
    """Deal the splits, close the arrays up, write tables, meta.json and the contact sheet.

    May be repeated after a kill. Returns meta, skipped (Counter of reasons) and notes to print.
    Raises NoChip if no chip, or none of the training split, is left.
    """
    skipped = Counter(state["skipped"])
    if not state["chips"]:
        if state["damaged"]:
            raise NoChip(state["damaged"][0])
        remedy = f"lower --min-valid {job.min_valid} or --chip {job.chip}"
        if not state["valid"]:
            remedy = "one of each pair is all nodata; check what the files declare, and --nodata"
        raise NoChip(f"no chip kept ({reasons(skipped)}); {remedy}")
    records = np.memmap(folder / "chips.bin", record_of(job), "r")
    fractions = {"val": plan["--val"], "test": plan["--test"]}
    split, dealt = deal(records, fractions, plan["--seed"])
    keep = split >= 0
    skipped["touches two splits"] += int((~keep).sum())
    skipped = +skipped
    count = {name: int((split == n).sum()) for n, name in enumerate(SPLITS)}
    if not count["train"]:
        raise NoChip(
            f"--split-block {plan['--split-block']}: no training chip left ({reasons(skipped)}); "
            "use larger blocks, or a --stride that is not smaller than --chip"
            if dealt
            else "no training chip left: the publisher's splits have none of these in train; pack "
            "the whole set"
        )
    train = np.flatnonzero(split == 0)
    # pairs of the other splits only: better their statistics than none
    pairs = train[records["hr"][train]]
    pairs = pairs if len(pairs) else np.flatnonzero(keep & records["hr"])
    place = {"mr": close_up(keep), "hr": close_up(keep[records["hr"]])}
    here = {"mr": train} | ({"hr": pairs} if len(pairs) else {})
    stats = {s: statistics(records[f"{s}_moments"], chips) for s, chips in here.items()}
    for sensor, shape in job.shape.items():
        move_chips(folder / "store" / f"{sensor}.npy", place[sensor], shape, job.dtype[sensor])
    if "hr" not in here:
        (folder / "store" / "hr.npy").unlink(missing_ok=True)
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "count": {s: int((place[s] >= 0).sum()) for s in ("mr", "hr")},
        "bands": {s: list(listing.bands[s]) if s in here else [] for s in ("mr", "hr")},
        "shape": {s: job.shape[s] if s in here else None for s in ("mr", "hr")},
        "dtype": {s: str(job.dtype[s]) if s in here else None for s in ("mr", "hr")},
        "gsd": job.gsd,
        "pixel_ratio": job.ratio,
        "mean": {s: stats[s][0] if s in here else None for s in ("mr", "hr")},
        "std": {s: stats[s][1] if s in here else None for s in ("mr", "hr")},
        "nodata": {s: as_json(value) for s, value in job.nodata.items()},
        "offset": job.offsets,
        "crs": job.crs,
        "splits": {name: n for name, n in count.items() if n},
        "sources": list(listing.sources),
        "provenance": {
            "command": command,
            "units": len(listing.units),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }
    (folder / "store" / "meta.json").write_text(json.dumps(meta, indent=1))
    hr_place = np.full(len(keep), -1)
    hr_place[records["hr"]] = place["hr"]
    shown = keep & records["hr"] if "hr" in here else keep
    shown = np.random.default_rng(plan["--seed"]).permutation(place["mr"][shown])[:PICTURES]
    rows = write_tables(folder, split, place["mr"], hr_place, set(shown.tolist()))
    draw_contact(folder / "store", meta, rows)

    notes = [f"warning: left out: {message}" for message in state["damaged"]]
    notes += [
        f"warning: {path}: {holes} pixels of its chips are NaN or inf, taken as missing"
        for path, holes in state["holes"].items()
    ]
    least = records["mr_moments"][train, :, 3]
    darkest = np.quantile(least, 0.05, axis=0, method="higher").min()  # a few have dead pixels
    if (
        job.offsets["mr"] == [0]
        and job.dtype["mr"].itemsize == 2
        and DARKEST[0] <= darkest < DARKEST[1]
    ):
        notes.append(
            f"warning: MR has hardly a pixel below {darkest:.0f} in any band, as Sentinel-2 from "
            "processing baseline 04.00 on, to which 1000 is added; if these are, pack again with "
            "--offset -1000 --overwrite"
        )
    notes += [
        f"{name} is empty: the chips lie in {dealt} sites or blocks of ground of "
        f"{plan['--split-block']} x {plan['--split-block']} chips; try another --split-block"
        for name, fraction in fractions.items()
        if fraction and dealt and not count[name]
    ]
    return meta, skipped, notes


def write_header(file, count, shape, dtype):
    """Write a .npy header; numpy pads it, so that one for another count is as long."""
    np.lib.format.write_array_header_1_0(
        file,
        {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (count, *shape),
        },
    )


def close_up(keep):
    """Where n chips go when those of `keep` (n,) bool are to lie without gaps: (n,) int64, -1 for
    the others. Only chips beyond the new end move, into the gaps: no pixels that are still to be
    read are overwritten, so the move can be repeated after a kill."""
    count = np.count_nonzero(keep)
    place = np.where(keep, np.arange(len(keep)), -1)
    place[count:][keep[count:]] = np.flatnonzero(~keep[:count])
    return place


def move_chips(path, place, shape, dtype):
    """Move the chips of a .npy to their `place`, and end the file and its header there."""
    count = int((place >= 0).sum())
    with path.open("r+b") as file:
        write_header(file, count, shape, dtype)
        start = file.tell()
        each = math.prod(shape) * dtype.itemsize
        size = start + count * each
        if path.stat().st_size == size:
            return
        for old in np.flatnonzero((place >= 0) & (place != np.arange(len(place)))):
            file.seek(start + int(old) * each)
            pixels = file.read(each)
            file.seek(start + int(place[old]) * each)
            file.write(pixels)
        file.truncate(size)


def write_tables(folder, split, place, hr_place, pictured):
    """Write index.csv and the end of skipped.csv; returns the rows of the `pictured` chips."""
    count = int((place >= 0).sum())
    source = np.full(count, -1)
    source[place[place >= 0]] = np.flatnonzero(place >= 0)
    moved, pictures = {}, {}

    def rows():
        with (folder / "rows.csv").open(newline="", encoding="utf-8") as lines:
            for old, row in enumerate(csv.reader(lines)):
                yield old, dict(zip(ROWS, row, strict=True))

    if (source != np.arange(count)).any():
        moved = {old: row for old, row in rows() if old >= count and place[old] >= 0}
    with (
        (folder / "store" / "index.csv").open("wb") as index,
        (folder / "store" / "skipped.csv").open("ab") as skipped,
    ):
        index.write(csv_line(INDEX))
        for old, row in rows():
            if place[old] < 0:
                row["reason"] = "touches two splits"
                skipped.write(csv_line(fill_row(SKIPPED, row)))
            if old < count:
                here = source[old]
                row = moved.get(here, row)
                about = {"chip": old, "split": SPLITS[split[here]]}
                about["hr"] = hr_place[here] if hr_place[here] >= 0 else ""
                index.write(csv_line(fill_row(INDEX, row | about)))
                if old in pictured:
                    pictures[old] = row | about
    return pictures


def draw_contact(store, meta, rows):
    """Write contact.png: HR (left) and MR of a few pairs side by side, the same ground in both.

    rows: of index.csv by chip, of chips that all have HR or all have none.
    """
    from matplotlib.figure import Figure  # here: it takes a second to import

    def pictures(sensor, chips, windows, side):
        pixels = torch.from_numpy(np.load(store / f"{sensor}.npy", mmap_mode="r")[chips])
        side = min(256, side)
        images = resample(pixels, torch.tensor(windows, dtype=torch.float64), (side, side))
        return figures.composite(images, meta["bands"][sensor])

    side = meta["shape"]["mr"][1]
    columns = [pictures("mr", list(rows), [[0, 0, side, side]] * len(rows), side)]
    if all(row["hr"] != "" for row in rows.values()):
        windows = [[float(row[key]) for key in WINDOW] for row in rows.values()]
        hr_side = round(side * max(meta["pixel_ratio"]))
        columns.insert(0, pictures("hr", [row["hr"] for row in rows.values()], windows, hr_side))
    across = min(4, len(rows))
    down = math.ceil(len(rows) / across)
    width = 1.05 * len(columns) + 0.1  # of a pair, in pictures; an Axes for each would take seconds
    figure = Figure(figsize=(1.7 * width * across, 1.7 * 1.2 * down))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    for k, (chip, row) in enumerate(rows.items()):
        left, top = k % across * width, k // across * 1.2
        name = f"{chip}: {Path(row['mr_source']).name}"
        name = name if len(name) <= 36 else f"{name[:12]}...{name[-21:]}"
        axis.text(
            left, top + 0.17, f"{name} ({row['row']}, {row['col']})", fontsize=5, parse_math=False
        )
        for n, column in enumerate(columns):
            extent = (left + 1.05 * n, left + 1.05 * n + 1, top + 1.2, top + 0.2)
            axis.imshow(column[k].numpy(), extent=extent, aspect="auto", interpolation="nearest")
    axis.set(xlim=(0, width * across), ylim=(1.2 * down, 0))  # imshow changes them
    figures.save_figure(figure, store / "contact.png")


def csv_line(values):
    line = io.StringIO(newline="")
    csv.writer(line).writerow(values)
    return line.getvalue().encode()


def fill_row(columns, row):
    return [row.get(name, "") for name in columns]


def reasons(counts):
    return ", ".join(f"{n} {reason}" for reason, n in Counter(counts).most_common()) or "none"


def report(out, meta, skipped, state, notes):
    splits = ", ".join(f"{meta['splits'].get(name, 0)} {name}" for name in SPLITS)
    chips, pairs = meta["count"]["mr"], meta["count"]["hr"]
    alone = f"{chips} chips, " if chips > pairs else ""
    print(f"{out}: {alone}{pairs} pairs kept ({splits}); skipped: {reasons(skipped)} (skipped.csv)")
    if chips > pairs:
        print(f"  chips without HR, those that touched two splits too: {reasons(state['without'])}")
    for sensor, shape in meta["shape"].items():
        if shape is None:
            continue
        print(
            f"  {sensor}: chips {shape[0]} x {shape[1]} x {shape[2]} {meta['dtype'][sensor]}, "
            + gsd_text(meta["gsd"][sensor])
        )
        for band, mean, std in zip(
            meta["bands"][sensor], meta["mean"][sensor], meta["std"][sensor], strict=True
        ):
            print(f"    {band:8} mean {mean:10.4f}  std {std:10.4f}")
    print(f"  look at {out / 'contact.png'}")
    for note in notes:
        print(note)


def as_json(number):
    return None if number is None or math.isnan(number) else number  # NaN is missing anyway


def is_store(path):
    meta = path / "meta.json"
    return meta.is_file() and f'"format": "{FORMAT}"'.encode() in meta.read_bytes()
