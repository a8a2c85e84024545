"""From pairs of images to a store (`data.py pack`): the command, its parts and its end.

Nothing is resampled on the way in: chips are cut on the MR pixel grid, and the HR chip is the
whole-pixel window around the same ground together with the fractional place of the MR chip in it,
so any pixel ratio and any offset of the two grids stay exact.

Units of a Listing are opened and cut (imagery/chips.py) by threads, a few ahead, and written in
order, as shards (imagery/shards.py) in OUT.packing, until all are there and become the store. The
same command goes on after the shards that it finds; a shard that a kill interrupts leaves nothing.
"""

import argparse
import hashlib
import inspect
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import FORMAT, SPLITS, VERSION
from imagery import shards
from imagery.chips import cut, gsd_text, in_order, lay_out, named, survey
from imagery.shards import NoChip, is_part, reasons

FILES = {
    *("index.csv", "meta.json", "skipped.csv", "contact.png", "lock", "old"),
    *("flags.csv", "check.csv", "check.png"),  # of data.py check
}
MOST = 10**6  # of what counts pixels, chips or threads


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


# what a reader of a set is told, as far as it takes it
OPTIONS = (
    "hr mr_bands hr_bands band_names hr_band_names nodata product level per_site mr_dataset "
    "hr_dataset splits warp clouds mask_band mask_values max_days"
).split()


def command(readers, args, typed):
    """What `data.py pack` does. readers: {name: function (root, options) -> Listing}; args: values
    of `add_flags`; typed: the command, to be kept."""
    name = args.pop("format")
    if len(args["paths"]) != (1 if args["mr"] else 2):
        raise ValueError(
            f"{' '.join(args['paths'])}: ROOT and OUT expected, or OUT alone with --mr"
        )
    *root, out = args.pop("paths")
    check_output(Path(out), args["overwrite"])  # before headers are read
    takes = inspect.signature(readers[name]).parameters
    given = {key: value for key in OPTIONS if (value := args.pop(key)) is not None}
    if wrong := sorted(given.keys() - takes.keys()):
        known = ", ".join(sorted(takes.keys() & OPTIONS)) or "none of them"
        flag = wrong[0].replace("_", "-")
        raise ValueError(f"--{flag}: not for --format {name}, which takes {known}")
    if "seed" in takes:
        given["seed"] = args["seed"]
    first = "--mr" if args["mr"] else "ROOT"
    root = args.pop("mr") or root[0]
    listing = readers[name](root, **given)
    # what must be the same to continue; places in full: elsewhere one name is another place
    inputs = {"--format": name, first: os.path.abspath(root)}
    for key, value in given.items():
        product = key == "hr" and name == "worldstrat"
        flag = "--hr-product" if product else "--" + key.replace("_", "-")
        inputs[flag] = os.path.abspath(value) if flag in ("--hr", "--splits") else value
    source = {"name": args.pop("source_name")}
    source |= {key: args.pop(key) for key in ("licence", "attribution", "url")}
    if any(source.values()):
        listing = listing._replace(sources=[{k: v or "" for k, v in source.items()}])
    pack(listing, out, **args, inputs=inputs, command=typed)


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
    folder.mkdir(parents=True, exist_ok=True)
    refuse_foreign(folder)
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


def check_output(out, overwrite):
    if out.exists() and not is_store(out):
        raise FileExistsError(
            f"{out}: exists and is not a store; move it elsewhere, or choose another OUT"
        )
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out}: a store is there; add --overwrite to replace it")
    if out.exists():
        refuse_foreign(out)


def refuse_foreign(folder):
    """Raise FileExistsError where a folder that is to be replaced holds what is no store's."""
    names = {file.name for file in folder.iterdir()} - FILES
    if foreign := [name for name in sorted(names) if not is_part(name)]:
        raise FileExistsError(
            f"{folder}: holds {foreign[0]}, which is no part of a store, so --overwrite does "
            "not delete it; move it elsewhere, or choose another OUT"
        )


def is_store(path):
    meta = path / "meta.json"
    return meta.is_file() and f'"format": "{FORMAT}"'.encode() in meta.read_bytes()


def fingerprint(listing, job):
    """Text that another input has not: what a partial store is continued by."""
    digest = hashlib.sha256()
    for unit in listing.units:
        # by its name it is found again, by its key it is known to be the same
        digest.update(f"{unit.name}\n{unit.key}\n".encode(errors="surrogateescape"))
    digest.update(repr((listing.bands, job)).encode())
    return f"{len(listing.units)} units {digest.hexdigest()[:12]}"


def write(listing, folder, job, plan, pool, workers, begin, last):
    """Cut the units from position `begin` up to unit `last` into shards, with a bar. A position is
    (unit, block); `workers` units are open at a time."""

    def lay(unit):
        return unit, lay_out(job, listing.units[unit])

    def blocks():  # with the position of the next
        for unit, found in in_order(pool, lay, range(begin[0], last), workers):
            for k, block in enumerate(found):
                if (unit, k) >= begin:
                    ends = k + 1 == len(found)
                    yield ((unit + 1, 0) if ends else (unit, k + 1)), listing.units[unit], block

    cuts = in_order(pool, lambda work: (work[0], cut(job, *work[1:])), blocks(), 2 * workers)
    made, chips = shards.write_shards(folder, plan, job.shape, job.dtype, cuts, begin, last), 0
    with tqdm(desc="pack", total=last, initial=begin[0], unit="unit", unit_scale=True) as bar:
        for end, count in made:
            chips += count
            bar.set_postfix_str(f"{chips:,} chips", refresh=False)
            bar.update(end[0] - bar.n)


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
    if (out / "contact.png").is_file():
        print(f"  look at {out / 'contact.png'}")
    for note in notes:
        print(note)
