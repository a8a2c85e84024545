"""Images of one's own, as they lie on a disk: files of all bands, or of one band each, SAFE folders
and archives; what their names tell of bands and dates; masks of clouds that lie beside them.

`list_images` finds them, `header` describes one, and `open_image` makes a Source of some bands,
`open_images` of those that all have. All of pack, finetune and predict read through these, so an
image means the same to each of them.
"""

import functools
import glob
import math
import re
import shlex
import tarfile
import xml.etree.ElementTree as ET
import zipfile
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.common import BGRN, Source, date_of, whole
from imagery import raster
from imagery.bands import SAME_BAND, meanings, positions

RASTERS = (".tif", ".tiff", ".jp2")  # of a folder; a file may be any of raster.DRIVERS
ARCHIVES = {".zip": "/vsizip", ".tar": "/vsitar"}  # which GDAL reads without unpacking
BAND_FILE = re.compile(
    r"(?P<scene>.*?)[_.-]?(?<![A-Za-z0-9])(?P<band>B(0?[1-9]|1[0-2]|8A)|coastal|blue|green|red"
    r"|rededge[1-3]?|nir(?:0[89])?|swir(?:16|22|[12])?|V[VH]|H[VH])(_\d\dm)?",
    re.IGNORECASE,
)
# what producers put beside the bands: quality, clouds, angles, pictures
COMPANION = re.compile(
    r"(?:^|[_.-])(SCL|TCI|PVI|AOT|WVP|CLM|CLD|SNW|MSK_\w+|BQA|QA(?:\d\d|_\w+)?|[FS]?mask|udm2?"
    r"|[VS][AZ]A|ST_(?:B10|B6|ATRAN|CDIST|DRAD|EMIS|EMSD|TRAD|URAD|QA)|atmos_opacity"
    r"|thumbnail|preview|overview|browse|visual|ql)(?:_\d\dm|_clip)?$",
    re.IGNORECASE,
)
# products whose numbers are other bands than Sentinel-2's, by the names of their files
TM = "B G R NIR SWIR1 B6 SWIR2 pan".split()
OLI = "coastal B G R NIR SWIR1 SWIR2 pan cirrus TIRS1 TIRS2".split()
NUMBERED = {r"L[CO]0[89]_|HLS\.L30\.": OLI, r"L[ETM]0[457]_": TM}
# PlanetScope of 4 and 8 bands and RapidEye, where the file does not name them
PLANET = {
    4: ("blue", "green", "red", "nir"),
    5: ("blue", "green", "red", "rededge", "nir"),
    8: ("coastal", "blue", "green_i", "green", "yellow", "red", "rededge", "nir"),
}
OFFSET_TAGS = {"BOA_ADD_OFFSET", "RADIO_ADD_OFFSET"}

# A mask band, and the values or bits of it that hide the ground; band: of its file, or None
Mask = namedtuple("Mask", "name band values bits")
# product -> --mask-band and --mask-values: cloud, its shadow and cirrus, as its makers tell them
CLOUDS = {
    "sentinel2": ("SCL", "3,8,9,10"),
    "landsat": ("QA_PIXEL", "bit1,bit2,bit3,bit4"),
    "hls": ("Fmask", "bit1,bit2,bit3"),
    "planet": ("udm2:0", "0"),  # its first band says where the ground is clear
}


def listed(where):
    """All images, companions among them, of a folder and its subfolders, of an archive, one file,
    or a glob; sorted. Of an archive that is also unpacked only that."""
    path, folder = Path(where), Path(where).is_dir()
    if folder:
        files = [file for file in path.rglob("*") if not file.name.startswith(".")]
    else:
        files = [path] if path.is_file() else [*map(Path, glob.glob(str(where), recursive=True))]
    kinds = RASTERS if folder else raster.DRIVERS
    found = [file for file in files if file.suffix.lower() in kinds and file.is_file()]
    for file in files:
        if file.suffix.lower() in ARCHIVES:
            beside = file.parent.glob(f"{glob.escape(file.stem)}*/") if folder else ()
            found += [] if any(map(Path.is_dir, beside)) else members(file)
    return sorted(found)


@contextmanager
def opened(archive):
    """Yield the names of what a .zip or .tar holds, and a function that reads the start of one."""
    with whole(archive, archive.suffix):
        if archive.suffix.lower() == ".zip":
            with zipfile.ZipFile(archive) as file:
                yield file.namelist(), lambda name: file.open(name).read(2**24)
        else:
            with tarfile.open(archive) as file:
                yield file.getnames(), lambda name: file.extractfile(name).read(2**24)


def members(archive):
    """The images in a .zip or .tar, as paths that GDAL reads."""
    with opened(archive) as (names, _):
        names = [name for name in names if ".." not in Path(name).parts and name[0] != "/"]
    # GDAL would open what lies beside an image by whatever driver it likes
    if odd := [n for n in names if n.lower().endswith((".msk", ".ovr"))]:
        raise ValueError(f"{archive}: holds {odd[0]}, which is not read in archives; unpack it")
    root = f"{ARCHIVES[archive.suffix.lower()]}/{{{archive.resolve()}}}"
    return [Path(f"{root}/{name}") for name in names if name.lower().endswith(RASTERS)]


def find_files(where, flag):
    """The images of `listed`, of a Sentinel-2 SAFE folder only those of bands. Companions (quality,
    clouds, pictures) are left alone, and named. Raises FileNotFoundError."""
    files = [
        p for p in listed(where) if not in_safe(p) or ("IMG_DATA" in p.parts and band_of(p)[1])
    ]
    beside = {file: match[1] for file in files if (match := COMPANION.search(file.stem))}
    if 0 < len(beside) < len(files):  # else the user wants them, or so calls all images
        named = ", ".join(sorted({*beside.values()}))
        raster.say_once(f"{flag} {where}: {len(beside)} companion files left alone ({named})")
        files = [file for file in files if file not in beside]
    if not files:
        raise FileNotFoundError(
            f"{flag} {where}: no .tif, .tiff or .jp2 found; give a folder, an archive (.zip, .tar),"
            " a file or a quoted glob of them"
        )
    return files


def in_safe(path):
    return any(part.upper().endswith(".SAFE") for part in path.parts[:-1])


def band_of(path):
    """(scene, band): what a file's name says before its band's name, and that; (path, "") of one
    that ends with no band."""
    match = BAND_FILE.fullmatch(path.stem)
    if not match:
        return path, ""
    band = SAME_BAND.get(match["band"].lower(), match["band"])
    number = int(match[3]) if match[3] and match[3].isdecimal() else 0
    for product, names in NUMBERED.items():
        if number and re.match(product, path.name) and number <= len(names):
            band = names[number - 1]
    return scene_of(path, match["scene"]), band


def scene_of(path, stem):
    """What the files of one scene have in common: their folder, and how their names begin."""
    if "IMG_DATA" in path.parts:  # L2A has a subfolder for each pixel size
        return Path(*path.parts[: path.parts.index("IMG_DATA")])
    return path.parent / stem if stem else path.parent


def list_images(where, flag):
    """[(path, files)] of the images that `find_files` finds; files: None, or {band: file} of a
    scene whose bands lie in a file each, and then path is what their names have in common."""
    groups = {}
    for file in find_files(where, flag):
        scene, band = band_of(file)
        # sorted by path, so R10m comes first and the finest file of a band is the one that stays
        groups.setdefault(scene, {}).setdefault(band, file)
    images = []
    for scene, bands in groups.items():
        if len(bands) > 1 or "IMG_DATA" in next(iter(bands.values())).parts:
            images.append((scene, bands))
        else:
            images += [(file, None) for file in bands.values()]
    return images


def name_of(path, files=None):
    """What an image is called, without extension."""
    return path.stem if files is None or path.suffix.endswith("}") else path.name


def header(path, files=None):
    """Info of an image with all of its bands; of a scene that of its first file, as its bands may
    have several pixel sizes."""
    if files:
        first = raster.info(next(iter(files.values())))
        return replace(first, path=path, bands=len(files), band_names=tuple(files))
    info = raster.info(path)
    if not info.band_names and "_Analytic" in path.name and info.bands in PLANET:
        return replace(info, band_names=PLANET[info.bands])
    return info


def usual_bands(info, files=None, hides=()):
    """Which bands of an image are meant where none are named, as positions: B, G, R, NIR of a scene
    of one file per band, else all that are no mask."""
    names = info.band_names
    if files and {*BGRN} <= {*names}:
        return positions(BGRN, names)
    hide = {mask.name.lower() for _, mask in hides}
    no_image = [k for k, n in enumerate(names) if n.lower() in hide or COMPANION.fullmatch(n)]
    if 0 < len(no_image) < info.bands:
        left = ",".join(names[k] for k in no_image)
        raster.say_once(
            f"{info.path}: {left} is no image and left out; name the bands to take it; in other "
            "files alike",
            (left, info.path.parent),
        )
        return [k for k in range(info.bands) if k not in no_image]
    return list(range(info.bands))


def names_of(info, bands):
    """[(name in the file, what it means)] of some bands; [] unless all are named, and not by
    numbers."""
    has = info.band_names
    names = [(has[band], meanings(has)[band]) for band in bands] if has else []
    return names if all(name and not name.isdecimal() for name, _ in names) else []


def open_images(images, hides, flag, wanted=None, names=None, nodata=None):
    """Open the images of one sensor, with the same bands: ([Source], what the bands are called).

    images, hides: of `list_images` and `find_masks`. flag: that by which bands are chosen. wanted:
    names or positions from 0, as text; None for the usual, in files that name them by name, and of
    those the ones that all files have. names: what they are called, else as in the first file.
    nodata: for files that declare none. Raises ValueError for a band that is not there, and where
    files name the same bands in another order.
    """
    with tqdm(images, "headers", leave=False) as bar:  # gone before an error is said
        heads = [header(*image) for image in bar]
    usual = [
        usual_bands(info, files, hide)
        for info, (_, files), hide in zip(heads, images, hides, strict=True)
    ]
    wanted = wanted or common_bands(heads, usual, flag)
    sources, orders = [], {}  # what bands mean, sorted -> who has them first, and in which order
    if names:
        meant, who = meanings(names), f"--{'hr-' * ('hr' in flag)}band-names"
        orders[tuple(sorted(meant))] = who, names, meant
    for info, (path, files), bands, hide in zip(heads, images, usual, hides, strict=True):
        has, count = info.band_names, info.bands
        bands = positions(wanted, has) if wanted else bands
        if not all(0 <= band < count for band in bands):
            raise ValueError(
                f"{path}: {flag} {','.join(wanted)} asked for, the file has {count} bands "
                f"({','.join(has) if any(has) else 'without names'}); use indices from 0"
            )
        names = names or [has[b] if has else str(b) for b in bands]
        if len(bands) != len(names):
            raise ValueError(
                f"{path}: {len(names)} bands expected ({','.join(names)}), found {len(bands)}; use "
                f"{flag} to choose them, such as {flag} 2,1,0 for RGB files"
                + (", or say with --hr-band-names what they are" if "hr" in flag else "")
            )
        if own := names_of(info, bands):
            own, meant = map(list, zip(*own, strict=True))
            who, first, order = orders.setdefault(tuple(sorted(meant)), (path, own, meant))
            if meant != order:
                raise ValueError(
                    f"{path}: its bands are {','.join(own)}, but {who} has {','.join(first)}; use "
                    f"{flag} {shlex.quote(','.join(first))}"
                )
        sources.append(open_image(info, files, bands, nodata, hide))
    return sources, names


def common_bands(heads, usual, flag):
    """The names of the usual bands that all images have, where all name them; else None."""
    every = [names_of(*each) for each in zip(heads, usual, strict=True)]
    common = set.intersection(*({meant for _, meant in some} for some in every))
    chosen = [name for name, meant in every[0] if meant in common]
    if chosen and len(chosen) < max(map(len, every)):
        print(f"{flag}: {','.join(chosen)}, which all of {len(heads)} files have; some have more")
    return chosen or None


def open_image(info, files=None, bands=None, nodata=None, hides=()):
    """The Source of some bands of an image. info: its `header`. bands: positions among those, None
    for `usual_bands`. nodata: for files that declare none. hides: [(file, Mask)] of `find_masks`.

    Raises ValueError where the files of a scene do not fit each other, or a mask not its image.
    """
    path = info.path
    bands = usual_bands(info, files) if bands is None else bands
    offset = 0
    if files:  # only the chosen are opened: the others may have another pixel size
        files = [files[info.band_names[band]] for band in bands]
        info, bands = join(path, files, [info.band_names[b] for b in bands]), range(len(bands))
        if "IMG_DATA" in files[0].parts:
            offset = safe_offset(path)
            info = replace(info, nodata=0.0)  # the product's, which its files do not declare
    nodata = nodata if info.nodata is None else info.nodata
    read = functools.partial(read_image, files or [path], [place(info, *one) for one in hides])
    return Source(info, list(bands), nodata, read, date_in(path) or info.date, offset)


def join(path, files, names):
    """Info of a scene of one file per band, as if its files were one."""
    every = [raster.info(file) for file in files]
    first = every[0]
    for other in every:
        here = (1, first.width, first.height, first.dtype, first.transform)
        if (other.bands, other.width, other.height, other.dtype, other.transform) != here:
            raise ValueError(
                f"{other.path}: {other.bands} bands of {other.height} x {other.width} "
                f"{other.dtype}, but in {path} it is to be one of {first.height} x {first.width} "
                f"{first.dtype} on the ground of {first.path}; choose bands of one pixel size"
            )
    scaling = tuple(pair for each in every for pair in each.scaling or ((1.0, 0.0),))
    scaling = () if {*scaling} == {(1.0, 0.0)} else scaling
    return replace(first, path=path, bands=len(files), band_names=tuple(names), scaling=scaling)


def read_image(files, masks, window=None, bands=None, grid=None):
    """Read bands that lie in one file, or in a file each: (pixels, valid), as raster.read; what a
    mask hides is not valid. masks: [(file, band, Grid or None, Mask)]."""
    if len(files) == 1:
        pixels, valid = raster.read(files[0], window, bands, masked=True, grid=grid)
    else:
        bands = range(len(files)) if bands is None else bands
        read = (raster.read(files[band], window, masked=True, grid=grid) for band in bands)
        pixels, valid = zip(*read, strict=True)
        pixels, valid = np.concatenate(pixels), np.any(valid, 0)
    for file, band, own, mask in masks:
        own = grid._replace(resampling="nearest") if grid else own
        values, known = raster.read(file, window, [band], masked=True, grid=own)
        hidden = np.isin(values[0], mask.values) | ((values[0].astype(np.int64) & mask.bits) != 0)
        valid = valid & known & ~hidden
    return pixels, valid


def read_rows(source):
    """Read a Source from top to bottom: yields (pixels, valid) of n rows until all were given.

    No file stays open in between: GDAL's environment is a thread's own, and who takes the rows may
    go on in another, or open and close other files meanwhile.
    """
    about = source.info
    # 1024 rows are whole tiles of nearly all files, so that few are decoded twice
    for row in range(0, about.height, 1024):
        window = row, 0, min(1024, about.height - row), about.width
        pixels, valid = source.read(window, source.bands)
        if source.nodata is not None:
            valid = valid & (pixels != source.nodata).any(0)
        yield pixels, valid


# masks of clouds


def parse_masks(mask_band=None, mask_values=None, clouds=None):
    """[Mask] of --mask-band, --mask-values and --clouds, which are text or None.

    mask_band: the name of a band, or of a file beside the image; after a colon the band in that
    file, by name or from 0. mask_values: whole numbers, or bits as bit3, with commas. clouds:
    products of CLOUDS, with commas. Raises ValueError.
    """
    if (mask_band is None) != (mask_values is None):
        raise ValueError("--mask-band and --mask-values go together; give both, or --clouds")
    wanted = [] if mask_band is None else [(mask_band, mask_values)]
    for product in filter(None, (clouds or "").split(",")):
        if product not in CLOUDS:
            raise ValueError(f"--clouds {product}: one of {', '.join(CLOUDS)} expected")
        wanted.append(CLOUDS[product])
    masks = []
    for name, values in wanted:
        words = [word.strip().lower() for word in values.split(",")]
        wrong = [word for word in words if not re.fullmatch(r"-?\d+|bit(\d|[1-5]\d)", word)]
        if wrong:
            raise ValueError(f"--mask-values {values}: whole numbers expected, or bits as bit3")
        bits = sum({1 << int(word[3:]) for word in words if word.startswith("bit")})
        name, _, band = name.partition(":")
        plain = tuple(int(word) for word in words if not word.startswith("bit"))
        masks.append(Mask(name, band or None, plain, bits))
    return masks


def find_masks(images, masks):
    """What hides the ground of images: {sensor: [[(file, Mask)]]} of {sensor: of `list_images`}.

    A mask is a band of the image, or lies beside it in a file that is called as the image is, or
    begins to be, and then as the mask. Says how many images have each; raises ValueError for one
    that none has.
    """
    listings = {}

    def file_of(mask, path, files):
        name, own = mask.name.lower(), path if files else path.with_suffix("")
        if not files and name in (band.lower() for band in header(path).band_names):
            return path
        folder = str(path).partition("{")[2].partition("}")[0]  # the archive that it lies in
        folder = folder or (path if path.is_dir() else path.parent)
        if folder not in listings:
            about = [(file, COMPANION.search(file.stem)) for file in listed(folder)]
            listings[folder] = [
                (scene_of(f, f.stem[: m.start()]), m[1].lower(), f) for f, m in about if m
            ]
        near = [(s, f) for s, kind, f in listings[folder] if kind == name and begins(own, s)]
        return max(near, key=lambda one: len(one[0].name))[1] if near else None  # of equals, first

    hides = {sensor: [[] for _ in some] for sensor, some in images.items()}
    for mask in masks:
        told = False
        for sensor, some in images.items():
            found = [file_of(mask, *image) for image in some]
            for hide, file in zip(hides[sensor], found, strict=True):
                hide += [(file, mask)] if file else []
            if count := len(found) - found.count(None):
                told = True
                print(
                    f"{mask.name}: hides what it marks in {count} of {len(some)} "
                    f"{sensor.upper()} images"
                    + (f"; {some[found.index(None)][0]} has none" if None in found else "")
                )
        if not told:
            raise ValueError(
                f"{some[0][0]}: no band {mask.name} in it, nor a file beside it that is called as "
                f"it is and {mask.name}; nor has another image; choose another --mask-band or "
                "--clouds"
            )
    return hides


def begins(path, scene):
    """Whether a path is a scene's, or goes on after its name with a sign."""
    rest = path.name[len(scene.name) :]
    alike = path.parent == scene.parent and path.name.startswith(scene.name)
    return path == scene or (alike and not rest[:1].isalnum())


def place(info, file, mask):
    """(file, band, Grid or None, Mask): where an image's mask is, and how it is read. Raises
    ValueError where nothing tells."""
    about = info if file == info.path else raster.info(file)
    band = 0
    if about.bands > 1 or mask.band is not None:
        (band,) = positions([mask.band or mask.name], about.band_names)
    if not 0 <= band < about.bands:
        raise ValueError(
            f"{file}: {about.bands} bands ({','.join(about.band_names) or 'unnamed'}); say which "
            f"is the mask, such as --mask-band {mask.name}:0"
        )
    if about.dtype.kind not in "iu":
        raise ValueError(f"{file}: {about.dtype} pixels; a mask holds whole numbers")
    return file, band, grid_for(info, about), mask


def grid_for(info, mask):
    """The Grid of an image, on which its mask is read; None where that has it, to a hundredth of a
    pixel, or nothing tells of another. info, mask: raster.Info. Raises ValueError where they differ
    and it is unknown how the two lie."""
    apart, size = math.inf, (info.height, info.width)
    placed = info.crs and mask.crs and info.transform and mask.transform
    if size == (mask.height, mask.width):
        if not (info.transform and mask.transform):
            return None
        if not placed or raster.same_ground(mask, info.crs):
            at = np.array(raster.corners(info)) - raster.corners(mask)
            apart = np.abs(at).max() / info.gsd
    if apart <= 0.01:
        return None
    if not placed:
        raise ValueError(
            f"{mask.path}: {mask.height} x {mask.width} pixels over {info.height} x {info.width} "
            f"of {info.path}, up to {apart:.3g} px off, and no CRS tells how the two lie; resample "
            "it to the image's grid, or add the georeference"
        )
    return raster.Grid(info.crs, info.transform, *size, "nearest")


def bounds_in(info, crs):
    """Bounds of an image in another CRS; NaN where it does not reach."""
    if info.crs == crs:
        return info.bounds
    nowhere = (math.nan,) * 4
    if not info.crs or not crs:
        return nowhere
    try:
        x, y = raster.project(info.crs, crs, *raster.corners(info, 21))
    except ValueError:
        return nowhere
    box = x.min(), y.min(), x.max(), y.max()
    return box if np.isfinite(box).all() else nowhere


# what pixels mean, and when


def safe_offset(path):
    """What is to be added to the pixels of a Sentinel-2 product: -1000 from baseline 04.00 on.

    Read from the product's MTD_MSI*.xml, in a folder or an archive, else from the baseline in its
    name; 0 of other files.
    """
    folders = [path, *path.parents][:4]
    head, _, archive = str(path).partition("}")[0].partition("{")
    if archive:
        with opened(Path(archive)) as (names, read):
            inside = {Path(f"{head}{{{archive}}}") / name: name for name in names}
            texts = {
                mtd: read(name)
                for mtd, name in inside.items()
                if mtd.match("MTD_MSIL*.xml") and mtd.parent in folders
            }
    else:
        mtds = (mtd for folder in folders for mtd in sorted(folder.glob("MTD_MSIL*.xml")))
        texts = {mtd: mtd.read_bytes() for mtd in mtds}
    for mtd, text in texts.items():
        with whole(mtd, "XML"):
            tags = ((e.tag.rpartition("}")[2], e.text) for e in ET.fromstring(text).iter())
            return next((float(text) for tag, text in tags if tag in OFFSET_TAGS), 0)
    product = next((f.name for f in folders if f.name.upper().endswith(".SAFE")), "")
    baseline = re.search(r"_N(\d{4})_", product)
    # 9999 are those that users processed, who are known to have an MTD
    return -1000 if baseline and 400 <= int(baseline[1]) < 9999 else 0


def date_in(path):
    """ISO date that a path tells: of its name, else of the next folder that is called by one; ""
    without."""
    names = [path.name, *(folder.name for folder in path.parents[:3])]
    return next(filter(None, map(date_of, names)), "")


def scaling_of(source):
    """[(scale, offset)] of a Source's bands, from pixels to units."""
    return [(source.info.scaling or ((1.0, 0.0),) * source.info.bands)[b] for b in source.bands]


def to_unit(source, scaling):
    """(gain, shift), arrays (bands,), by which a Source's pixels become those of files that are
    tagged by `scaling`, the offset of its product included."""
    own, base = np.array(scaling_of(source)).T, np.array(scaling).T
    return own[0] / base[0], (source.offset * own[0] + own[1] - base[1]) / base[0]


def tell_units(sources, flag):
    """Say where files are tagged by another scale or offset than the first, to whose unit the
    caller brings them."""
    first = sources[0]
    moved = [s.info.path for s in sources if scaling_of(s) != scaling_of(first)]
    if moved:
        print(
            f"{flag}: {len(moved)} of {len(sources)} files, such as {moved[0]}, have another scale "
            f"or offset in their tags than {first.info.path}; their pixels are brought to its unit"
        )
