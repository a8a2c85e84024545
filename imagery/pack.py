"""From pairs of images to a store: what to cut, and where (`data.py pack`).

Nothing is resampled on the way in: chips are cut on the MR pixel grid, and the HR chip is the
whole-pixel window around the same ground together with the fractional place of the MR chip in it,
so any pixel ratio and any offset of the two grids stay exact.

Units of a Listing are opened and cut by threads, a few ahead, and their chips written in order, as
shards (imagery/shards.py) in OUT.packing, until all are there and become the store. The same
command goes on after the shards that it finds; a shard that a kill interrupts leaves nothing.
"""

import argparse
import hashlib
import itertools
import math
import os
import shutil
from collections import Counter, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import FORMAT, SPLITS, VERSION, WINDOW
from imagery import raster, shards
from imagery.shards import SLACK, Chip, Cut, Image, NoChip, channel_moments, is_part, reasons

FILES = {
    *("index.csv", "meta.json", "skipped.csv", "contact.png", "lock", "old"),
    *("flags.csv", "check.csv", "check.png"),  # of data.py check
}
BLOCK_BYTES = 2**25  # stored pixels of the chips that are cut at a time
SURVEY = 256  # units whose headers are read first, where the publisher cut all images to one size
ALIKE = 0.05  # of the pixel ratio and of the pixel size: more is another kind of pair
MOST = 10**6  # of what counts pixels, chips or threads

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
    g.add_argument("--part", metavar="I/N",
                   help="pack the I-th of N parts of the input, 1/N to N/N, each by a process or "
                   "machine of its own that sees the same folders; the last to end makes the "
                   "store (default: all)")
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
    part=None,
    overwrite=False,
    command="",
    inputs=(),
):
    """Cut the pairs of a Listing into a store at `out`; the arguments are flags of `data.py pack`.

    inputs: what the command says of the input, {flag: value}; with others it does not continue.
    Prints a report and returns the store's meta, None while parts of it are missing. Raises
    FileNotFoundError, FileExistsError or ValueError, one sentence that names file or flag and
    remedy; `out` then stays as it was, and the same call continues after the shards in
    `out`.packing.
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
    units = len(listing.units)
    parts, first, last = units_of(part, units)
    out = Path(os.path.realpath(out))  # a link stays, what it leads to is replaced
    folder = out.with_name(f"{out.name}.packing")
    with named(folder), ExitStack() as stack:
        check_output(out, overwrite)
        wait = stack.enter_context(alone(out, folder, first, last))
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
            "--part of": parts,
            "version": VERSION,
        }
        shards.check_plan(folder, plan, overwrite)
        begin = shards.find_shards(folder, (first, 0), last)[1]
        if begin > (first, 0):
            print(f"{folder}: continuing after {begin[0]} of {units} units")
        try:
            write(listing, folder, job, plan, pool, workers, begin, last)
        except BaseException:
            done = shards.find_shards(folder, (first, 0), last)[1][0] - first
            if any(folder.glob("*.safetensors")):
                print(f"{folder}: {done} of {last - first} units are packed; the same command "
                      "continues from there")  # fmt: skip
            raise
        names, end = shards.find_shards(folder, (0, 0), units)
        if end[0] < units:
            print(
                f"{folder}: part {part} is packed; others are not, the first misses unit {end[0]} "
                f"of {units}"
            )
            return None
        if not wait():
            print(f"{out}: another part made the store")
            return None
        try:
            made = shards.complete(listing, folder, names, job, plan, command)
        except NoChip:
            shutil.rmtree(folder)
            raise
        check_output(out, overwrite)  # what came there meanwhile is not to be deleted
        meta, skipped, without, notes = made
        if (out / "flags.csv").exists():
            notes.append(
                f"the flags of the old store are gone; python data.py check {out} makes them anew"
            )
        (folder / "lock").unlink()
        if out.exists():
            os.replace(out, folder / "old")
        os.replace(folder, out)
        shutil.rmtree(out / "old", ignore_errors=True)
    report(out, meta, skipped, without, notes)
    return meta


def units_of(part, units):
    """(how many parts, first unit, the one after the last) of --part I/N, None for all."""
    if part is None:
        return 1, 0, units
    number, _, parts = part.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 0 < int(number) <= int(parts) <= units):
        raise ValueError(
            f"--part {part}: I/N expected, I from 1 to N, and N no more than the {units} units of "
            "the input, such as --part 1/4"
        )
    number, parts = int(number), int(parts)
    return parts, (number - 1) * units // parts, number * units // parts


@contextmanager
def alone(out, folder, first, last):
    """Make OUT.packing and keep other processes from packing these units into it, by a lock on the
    bytes of their numbers in OUT.packing/lock, which the system releases however this process ends.

    Yields a function that waits until nobody else packs there, and says whether the folder is still
    to be made a store. Raises FileExistsError where another packs them, or for a folder of others.
    Windows has no such locks: there the user starts one command at a time.
    """
    names = {file.name for file in folder.iterdir()} if folder.exists() else set()
    if foreign := {name for name in names - FILES if not is_part(name)}:
        raise FileExistsError(
            f"{folder}: holds {min(foreign)}, which is no part of a store; move it elsewhere, or "
            "choose another OUT"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    with path.open("ab") as file:

        def lock(how, count=0, start=0):  # count 0: all, however many there are
            try:
                if os.name != "nt":
                    import fcntl

                    fcntl.lockf(
                        file, sum(getattr(fcntl, name) for name in how.split()), count, start
                    )
            except (BlockingIOError, PermissionError):
                return False
            except OSError as error:  # some network drives have no locks
                print(f"warning: {path}: cannot be locked ({error}); start no other pack to {out}")
            # or its owner moved it just now
            return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())

        def wait():
            lock("LOCK_UN")  # or two that wait would wait for each other
            return lock("LOCK_EX")

        if not lock("LOCK_EX LOCK_NB", last - first, first):
            raise FileExistsError(
                f"{out}: another data.py pack is writing it; wait for it or choose another OUT"
            )
        try:
            yield wait
        finally:
            left = {f.name for f in folder.iterdir()} if folder.exists() else set()
            if left == {"lock"} and lock("LOCK_EX LOCK_NB"):
                path.unlink()
                folder.rmdir()


@contextmanager
def named(path):
    """Give an error of the system its file, where it has none: a full disk names none."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


def check_output(out, overwrite):
    if out.exists() and not is_store(out):
        raise FileExistsError(
            f"{out}: exists and is not a store; move it elsewhere, or choose another OUT"
        )
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out}: a store is there; add --overwrite to replace it")
    if out.exists() and (
        foreign := {f.name for f in out.iterdir() if f.name not in FILES and not is_part(f.name)}
    ):
        raise FileExistsError(
            f"{out}: --overwrite would delete {min(foreign)}, which is no part of the store; move "
            "it elsewhere"
        )


def is_store(path):
    meta = path / "meta.json"
    return meta.is_file() and f'"format": "{FORMAT}"'.encode() in meta.read_bytes()


def in_order(pool, function, items, ahead):
    """Yield function(item) of each item in order, computed by the pool, `ahead` of them at most."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def cut_units(listing, job, pool, ahead, begin, last):
    """Yield (position of the next block, Cut) of the blocks from `begin` on, in order, a position
    being (unit, block); `ahead` units are open at a time."""
    units = range(begin[0], last)

    def lay(unit):
        return unit, lay_out(job, listing.units[unit])

    def blocks():
        for unit, found in in_order(pool, lay, units, ahead):
            for k, block in enumerate(found):
                if (unit, k) >= begin:
                    ends = k + 1 == len(found)
                    yield ((unit + 1, 0) if ends else (unit, k + 1)), listing.units[unit], block

    yield from in_order(pool, lambda work: (work[0], cut(job, *work[1:])), blocks(), 2 * ahead)


def write(listing, folder, job, plan, pool, workers, begin, last):
    """Cut the units from position `begin` up to unit `last` into shards, with a bar."""
    cuts, chips = cut_units(listing, job, pool, workers, begin, last), 0
    with tqdm(desc="pack", total=last, initial=begin[0], unit="unit", unit_scale=True) as bar:
        for end, count in shards.write_shards(
            folder, plan, job.shape, job.dtype, cuts, begin, last
        ):
            chips += count
            bar.set_postfix_str(f"{chips:,} chips", refresh=False)
            bar.update(end[0] - bar.n)


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


# one unit: from headers to chips


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


def cut(job, unit, block):
    """Cut a Block of a unit: a Cut. One whose file is damaged is left out: archives of a million
    files have some. What cannot be reached is an OSError, and stops."""
    if block.why:
        chip = Chip({"mr_source": unit.name, "reason": block.reason}, [])
        return Cut(None, [chip], {}, block.why)
    holes, mr = Counter(), block.pair.mr
    try:
        with named(unit.name):
            chips = cut_block(job, block, holes)
    except ValueError as error:
        chip = Chip({"mr_source": unit.name, "reason": "cannot be read"}, [])
        return Cut(None, [chip], {}, str(error))
    about = mr.info.crs, mr.info.transform, mr.info.height, mr.info.width, block.pair.split
    site = None if block.pair.site is None else str(block.pair.site)
    return Cut(Image(mr.info.path.as_posix(), mr.date, *about, site), chips, holes)


def cut_block(job, block, holes):
    """Cut the chips of a block, each with the first HR image that covers it and is valid enough:
    [Chip]. holes: Counter by path, to which NaN and inf are added."""
    mr, here = block.pair.mr, block.corners
    row = {"mr_source": mr.info.path.as_posix()}
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
        stored = [
            (np.ascontiguousarray(fill_holes(*image)), channel_moments(*image))
            for image in images.get(k, [])
        ]
        why = fate[k].get("reason", "") if stored else ""
        chips.append(Chip(row | {"row": top, "col": left} | fate[k], stored, why))
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


def report(out, meta, skipped, without, notes):
    splits = ", ".join(f"{meta['splits'].get(name, 0)} {name}" for name in SPLITS)
    chips, pairs = meta["count"]["mr"], meta["count"]["hr"]
    alone = f"{chips} chips, " if chips > pairs else ""
    print(f"{out}: {alone}{pairs} pairs kept ({splits}); skipped: {reasons(skipped)} (skipped.csv)")
    if chips > pairs:
        print(f"  chips without HR, those that touched two splits too: {reasons(without)}")
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
