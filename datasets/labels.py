"""What labels images of one's own: masks beside them, or polygons that are burnt into their pixels.

Of polygons GeoJSON needs nothing but Python; GeoPackages and shapefiles are read by fiona, where it
is installed.
"""

import glob
import math
import shlex
from collections import namedtuple
from pathlib import Path

import numpy as np
import rasterio.features
import rasterio.warp

from datasets.common import find_bands, read_json, read_lines, whole
from datasets.images import header, list_images, name_of, open_image, scaling_of, to_unit
from imagery import raster
from imagery.bands import IGNORE

UNNAMED_CLASSES = 256  # without a class file, an id beyond this is a fill value, not a class
WITH_FIONA = (".gpkg", ".shp")

# path: of the file. crs: text. shapes: [(GeoJSON geometry, class id)]. boxes: (n, 4) their bounds
# in the crs: left, bottom, right, top. classes: names in the order of the ids.
Polygons = namedtuple("Polygons", "path crs shapes boxes classes")


# images


def named_images(images, masks):
    """{name without extension: (path, files)} of `list_images`, without what lies in `masks`."""
    found = {}
    for path, files in list_images(images, "--images"):
        name = name_of(path, files)
        if masks and Path(masks) != Path(images) and Path(masks) in path.parents:
            continue
        if name in found:
            raise ValueError(
                f"{path}: shares its name with {found[name][0]}, so images and masks cannot be "
                "paired by name; rename one"
            )
        found[name] = path, files
    return found


def open_of_task(path, files, bands):
    """(Source, raster.Info that its bands are positions in) of an image.

    bands: positions or names, None for the usual. Raises ValueError for one that is not there.
    """
    about = header(path, files)
    if bands and isinstance(bands[0], str):
        if not about.band_names:
            raise ValueError(
                f"{path}: its bands are unnamed, so {','.join(bands)} cannot be found; name them, "
                "or give 0-based positions to --bands"
            )
        bands = find_bands(bands, about.band_names, path)
    if bands is not None and not all(0 <= band < about.bands for band in bands):
        raise ValueError(
            f"{path}: --bands {','.join(map(str, bands))} asks for more than its {about.bands} "
            f"bands; use positions 0 to {about.bands - 1}"
        )
    source = open_image(about, files, None if bands is None else list(bands))
    return source, source.info if files else about  # of a scene only the chosen are opened


def check_alike(sources, files, bands):
    """Raise ValueError where images have other bands than the first; say where their tags make
    another unit of their pixels."""
    for source, file in zip(sources, files, strict=True):
        if bands is None and len(source.bands) != len(sources[0].bands):
            raise ValueError(
                f"{file.path}: {len(source.bands)} bands, but {files[0].path} has "
                f"{len(sources[0].bands)}; choose the common ones with --bands"
            )
        if source.bands != sources[0].bands:
            raise ValueError(
                f"{file.path}: the bands are its {source.bands}, those of other images "
                f"{sources[0].bands}; bring all to one order"
            )
    tags = [scaling_of(source) for source in sources]
    if moved := [f for f, one in zip(files, tags, strict=True) if one != tags[0]]:
        print(
            f"{moved[0].path}: its tags of scale and offset are not those of {files[0].path}; the "
            f"pixels of {len(moved)} of {len(files)} images are brought to the unit of that"
        )


def read_image(source, scaling):
    """Read one image (bands, rows, cols) float32 in the pixels of files that are tagged by
    `scaling`, NaN in all bands of a pixel without data."""
    pixels, valid = raster.masked(source.read(None, source.bands), source.nodata)
    image, change = pixels.astype(np.float32), to_unit(source, scaling)
    if (change[0] != 1).any() or change[1].any():
        gain, shift = (np.float32(each)[:, None, None] for each in change)
        image = image * gain + shift
    image[:, ~valid] = np.nan
    return image


# masks


def list_tiffs(where):
    """The TIFF files of a folder, or of a glob pattern, as {name without extension: path}.

    Raises FileNotFoundError if there is none, ValueError if two share a name.
    """
    if Path(where).is_dir():
        files = [p for p in Path(where).iterdir() if p.suffix.lower() in (".tif", ".tiff")]
    else:
        files = [Path(p) for p in glob.glob(str(where), recursive=True)]
    if not files:
        raise FileNotFoundError(
            f"{where}: no .tif or .tiff file there; name a folder, or a glob pattern in quotes"
        )
    found = {}
    for path in sorted(files):
        if path.stem in found:
            raise ValueError(
                f"{path}: shares its name with {found[path.stem]}, so images and masks cannot be "
                "paired by name; rename one"
            )
        found[path.stem] = path
    return found


def open_masks(masks, names, files, classes, ignored):
    """(path and nodata of each, function from a position to the labels) of masks of some images.

    Raises FileNotFoundError for a mask that is missing.
    """
    found, warped = list_tiffs(masks), []
    for name, file in zip(names, files, strict=True):
        if name not in found:
            raise FileNotFoundError(
                f"{file.path}: no mask of that name in {masks}; add one, or list only the labelled "
                "images in --splits"
            )
    paths = [found[name] for name in names]
    checked = [check_mask(file, mask, warped) for file, mask in zip(files, paths, strict=True)]
    nodata, grids = zip(*checked, strict=True)
    if warped:
        print(
            f"{warped[0]}: on another grid than its image; "
            f"{len(warped)} of {len(paths)} masks are warped to their images' (nearest)"
        )
    return paths, nodata, lambda k: read_mask(paths[k], classes, (*ignored, nodata[k]), grids[k])


def check_mask(file, mask, warped):
    """Compare the headers of an image, raster.Info, and its mask -> (the mask's nodata, the
    raster.Grid of the image if the mask has another, and then it is appended to `warped`)."""
    label = raster.info(mask)
    if label.bands != 1:
        raise ValueError(
            f"{mask}: {label.bands} bands; a mask has one band of class ids, so check --masks"
        )
    if label.dtype.kind not in "iuf":
        raise ValueError(f"{mask}: values of type {label.dtype}; a mask holds class ids")
    apart = grids_apart(file, label)
    placed = file.crs and label.crs and file.transform and label.transform
    if apart > 0.01 and not placed:
        raise ValueError(
            f"{mask}: its grid lies up to {apart:.3g} px off its image's, {label.height} x "
            f"{label.width} pixels over {file.height} x {file.width}, and no CRS tells how the two "
            "lie; resample the mask to the image's grid, or add the georeference"
        )
    grid = None
    if apart > 0.01:
        how = (file.height, file.width)
        grid = raster.Grid(file.crs, file.transform, *how, "nearest")
        warped.append(mask)
    return label.nodata, grid


def grids_apart(file, label):
    """Most pixels by which the grid of a mask lies off its image's; inf of another CRS or size."""
    if (file.height, file.width) != (label.height, label.width):
        return math.inf
    if not (file.transform and label.transform):
        return 0.0
    if file.crs and label.crs and not raster.same_ground(label, file.crs):
        return math.inf
    at = [np.array(raster.corners(about)) for about in (file, label)]
    return np.abs(at[0] - at[1]).max() / file.gsd


def read_mask(path, classes, ignored, grid=None):
    """Read one mask as int16 class ids (rows, cols), IGNORE where it holds one of `ignored` or
    has no data.

    classes: the names, or None. ignored: numbers or None. Raises ValueError for ids that no class
    has.
    """
    mask, valid = raster.read(path, masked=True, grid=grid)
    if mask.dtype.kind == "f":
        valid &= np.isfinite(mask[0])
        mask = np.where(valid, mask, 0)
        if (mask != mask.round()).any():
            raise ValueError(
                f"{path}: values of type {mask.dtype} such as {mask[mask != mask.round()][0]:g}; a "
                "mask holds whole numbers, the class ids"
            )
    return check_ids(mask[0].astype(np.int64), valid, path, classes, ignored)


def check_ids(mask, valid, path, classes, ignored):
    """Labels int16 of mask values, IGNORE where one is `ignored` or not valid. Raises ValueError
    for ids that no class has; path: where they come from."""
    ignored = np.logical_or.reduce([mask == value for value in ignored]) | ~valid
    ids = np.unique(mask[~ignored])
    count = UNNAMED_CLASSES if classes is None else len(classes)
    alien = ids[(ids < 0) | (ids >= count)]
    if len(alien):
        raise ValueError(
            f"{path}: class ids {some(alien)} found, but classes go from 0 to {count - 1}; name "
            f"them in --classes, or pass --ignore-index {alien[0]} if that is no class"
        )
    return np.where(ignored, IGNORE, mask).astype(np.int16)


def some(ids):
    return ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")


def classes_beside(images, masks):
    """The classes.txt that lies in the folder of the masks, or in one that holds both; None."""
    for folder in filter(None, (masks, masks and Path(masks).parent, Path(images).parent)):
        if (path := Path(folder) / "classes.txt").is_file():
            return path
    return None


def read_classes(path):
    """Class names from a text file, one per line, the line number from 0 being the class id.

    Raises FileNotFoundError, or ValueError for an empty line or a name given twice.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: no such file; --classes wants a text file with one class name per line"
        )
    names = tuple(read_lines(path))
    if "" in names:
        raise ValueError(
            f"{path}: line {names.index('') + 1} is empty; line numbers are class ids, so give "
            "every id a name"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path}: {twice} names two classes; give each line a name of its own")
    return names


# polygons


def read_polygons(path, field, classes=None, ignored=()):
    """The polygons of a file with the class that a field tells -> Polygons.

    A field of text holds names of classes, one of whole numbers their ids in `classes`; without
    `classes` all values that occur, sorted, are the classes. Features whose value is none or one of
    `ignored` have no label. Raises FileNotFoundError, or ValueError in one sentence.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    features, crs = (with_fiona if path.suffix.lower() in WITH_FIONA else geojson)(path)
    with whole(path, "vector"):
        drawn = [f for f in features if f["geometry"] and "Polygon" in f["geometry"]["type"]]
        fields = sorted({key for f in drawn for key in f["properties"] or {}})
        if field not in fields:
            raise ValueError(
                f"{path}: no polygon has the field {field}; --label-field can be "
                f"{', '.join(fields[:10]) or 'nothing, as there are none'}"
            )
        values = [f["properties"].get(field) for f in drawn]
        labelled = [
            (f["geometry"], value)
            for f, value in zip(drawn, values, strict=True)
            if value is not None and value not in ignored
        ]
        boxes = [rasterio.features.bounds(geometry) for geometry, _ in labelled]
    text = any(isinstance(value, str) for _, value in labelled)
    if not text and (odd := [v for _, v in labelled if v != int(v) or not 0 <= v < 2**15]):
        raise ValueError(
            f"{path}: {field} holds {odd[0]}; names of classes are text, ids whole numbers"
        )
    labelled = [(g, str(v) if text else int(v)) for g, v in labelled]
    if classes and not text:  # numbers are ids of the classes
        return Polygons(path, crs, labelled, np.array(boxes), classes)
    values = sorted({value for _, value in labelled})
    names = classes or tuple(map(str, values))
    if alien := [value for value in values if str(value) not in names]:
        raise ValueError(
            f"{path}: {field} holds {alien[0]}, which --classes does not name "
            f"({', '.join(names[:10])}); add a line for it"
        )
    shapes = [(geometry, names.index(str(value))) for geometry, value in labelled]
    return Polygons(path, crs, shapes, np.array(boxes), names)


def geojson(path):
    """(features, crs) of a GeoJSON file, in longitude and latitude unless it says otherwise."""
    about = read_json(path)
    with whole(path, "GeoJSON"):
        named = (about.get("crs") or {}).get("properties", {}).get("name", "EPSG:4326")
        return about["features"], "EPSG:4326" if "CRS84" in named else crs_of(named)


def crs_of(named):
    """ "EPSG:32631" of "urn:ogc:def:crs:EPSG::32631", as GeoJSON of before 2016 names a CRS."""
    return f"EPSG:{named.rpartition(':')[2]}" if named.startswith("urn:") else named


def with_fiona(path):
    """(features, crs) of the first layer of a file that fiona reads."""
    try:
        import fiona
    except ImportError:
        made = shlex.join(["ogr2ogr", "-t_srs", "EPSG:4326", f"{path.with_suffix('.geojson')}"])
        raise ValueError(
            f"{path}: {path.suffix} is read by fiona, which is not installed; pip install fiona, "
            f"or convert it: {made} {shlex.quote(str(path))}"
        ) from None
    with whole(path, "vector"), fiona.open(path) as layer:
        return [feature.__geo_interface__ for feature in layer], layer.crs.to_wkt()


def burn(polygons, info):
    """Class ids of an image's pixels, (rows, cols) int16: of the polygon that the pixel's centre
    lies in, the last of several; IGNORE in none. info: raster.Info of the image.

    Raises ValueError for an image without a CRS.
    """
    if not (info.crs and info.transform):
        raise ValueError(
            f"{info.path}: no georeference, so {polygons.path} cannot be laid on it; add one with "
            "gdal_translate -a_srs -a_ullr"
        )
    size = info.height, info.width
    label = np.full(size, IGNORE, np.int16)
    x, y = raster.project(info.crs, polygons.crs, *raster.corners(info, 21))
    left, bottom, right, top = polygons.boxes.reshape(-1, 4).T
    near = (left <= x.max()) & (right >= x.min()) & (bottom <= y.max()) & (top >= y.min())
    near = [polygons.shapes[k] for k in np.flatnonzero(near)]
    if not near:
        return label
    shapes = [g for g, _ in near]
    if polygons.crs != info.crs:
        with whole(polygons.path, "vector"):
            shapes = rasterio.warp.transform_geom(polygons.crs, info.crs, shapes)
    with whole(polygons.path, "vector"):
        return rasterio.features.rasterize(
            [(shape, number) for shape, (_, number) in zip(shapes, near, strict=True)],
            out=label,
            transform=rasterio.Affine(*info.transform),
            all_touched=False,
        )
