"""What labels images of one's own: masks beside them, or polygons that are burnt into their pixels.

Of polygons GeoJSON needs nothing but Python; GeoPackages and shapefiles are read by fiona, where it
is installed.
"""

import shlex
from collections import namedtuple
from pathlib import Path

import numpy as np
import rasterio.crs
import rasterio.features
import rasterio.warp

from datasets.common import read_json, read_lines, whole
from datasets.images import find_files, grid_for, list_images, name_of
from imagery import raster
from imagery.bands import IGNORE

UNNAMED_CLASSES = 256  # without a class file, an id beyond this is a fill value, not a class
WITH_FIONA = (".gpkg", ".shp")

# path: of the file. crs: text. shapes: [(GeoJSON geometry, class id)]. boxes: (n, 4) their bounds
# in the crs: left, bottom, right, top. classes: names in the order of the ids.
Polygons = namedtuple("Polygons", "path crs shapes boxes classes")


def by_name(images, masks):
    """{name without extension: of `list_images`} of images, without what lies in `masks`."""
    own = Path(masks) if masks and Path(masks) != Path(images) else None
    listed = [one for one in list_images(images, "--images") if own not in one[0].parents]
    return unique((name_of(*one), one) for one in listed)


def unique(named):
    """A dict of (name, (path, ...)); raises ValueError where two share a name."""
    found = {}
    for name, one in named:
        if name in found:
            raise ValueError(
                f"{one[0]}: shares its name with {found[name][0]}, so images and masks cannot be "
                "paired by name; rename one"
            )
        found[name] = one
    return found


# masks


def open_masks(masks, names, files, classes, ignored):
    """(path and nodata of each, function from a position to the labels) of masks of some images.

    masks: folder or glob. names: of the images. files: their raster.Info. classes, ignored: of
    `read_mask`. Raises FileNotFoundError for a mask that is missing, ValueError for one that is
    none or of unknown place.
    """
    found = unique((path.stem, (path,)) for path in find_files(masks, "--masks"))
    paths, nodata, grids = [], [], []
    for name, file in zip(names, files, strict=True):
        if name not in found:
            raise FileNotFoundError(
                f"{file.path}: no mask of that name in {masks}; add one, or list only the labelled "
                "images in --splits"
            )
        label = raster.info(*found[name])
        if label.bands != 1 or label.dtype.kind not in "iuf":
            raise ValueError(
                f"{label.path}: {label.bands} bands of {label.dtype}; a mask has one band of class "
                "ids, so check --masks"
            )
        paths.append(label.path)
        nodata.append(label.nodata)
        grids.append(grid_for(file, label))
    if warped := [path for path, grid in zip(paths, grids, strict=True) if grid]:
        print(
            f"{warped[0]}: on another grid than its image; "
            f"{len(warped)} of {len(paths)} masks are warped to their images' (nearest)"
        )
    return paths, nodata, lambda k: read_mask(paths[k], classes, (*ignored, nodata[k]), grids[k])


def read_mask(path, classes, ignored, grid=None):
    """Read one mask as int16 class ids (rows, cols), IGNORE where it holds one of `ignored` or
    has no data.

    classes: the names, or None. ignored: numbers or None. Raises ValueError for ids that no class
    has.
    """
    mask, valid = raster.read(path, masked=True, grid=grid)
    mask, valid = mask[0], valid & np.isfinite(mask[0])
    ids = np.where(valid, mask, 0).astype(np.int64)
    if (odd := mask[valid & (ids != mask)]).size:
        raise ValueError(f"{path}: {mask.dtype} values such as {odd[0]:g}; class ids are whole")
    return own_labels(ids, valid, classes, ignored, path)


def class_ids(mask, valid, ids, path, remedy="check --task and --root"):
    """The int16 labels of a mask by ids, {value: class id or IGNORE}; IGNORE where it is not valid
    (bool of its shape). Raises ValueError for other values; path, remedy: where they come from, and
    what to do."""
    values, at = np.unique(mask[valid], return_inverse=True)
    if alien := [value for value in values.tolist() if value not in ids]:
        known = sorted(value for value in ids if value is not None)
        raise ValueError(
            f"{path}: a mask of the values {some(alien)}, those known are {some(known)}; {remedy}"
        )
    label = np.full(mask.shape, IGNORE, np.int16)
    label[valid] = np.array([ids[value] for value in values.tolist()], np.int16)[at.ravel()]
    return label


def own_labels(mask, valid, classes, ignored, path):
    """`class_ids` of one's own, of which the values are the ids of `classes`, names or None."""
    count = UNNAMED_CLASSES if classes is None else len(classes)
    ids = dict(zip(range(count), range(count), strict=True)) | dict.fromkeys(ignored, IGNORE)
    remedy = "name them in --classes, or pass --ignore-index with what is no class"
    return class_ids(mask, valid, ids, path, remedy)


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
    names = tuple(read_lines(path, "--classes wants a text file with one class name per line"))
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
    features, crs = (with_fiona if path.suffix.lower() in WITH_FIONA else geojson)(path)
    with whole(path, "vector"):
        drawn = [f for f in features if f["geometry"] and "Polygon" in f["geometry"]["type"]]
        fields = sorted({key for f in drawn for key in f["properties"] or {}})
        if field not in fields:
            raise ValueError(
                f"{path}: no polygon has the field {field}; --label-field can be "
                f"{', '.join(fields[:10]) or 'nothing, as there are none'}"
            )
        labelled = [(f["geometry"], f["properties"].get(field)) for f in drawn]
        labelled = [(shape, v) for shape, v in labelled if v is not None and v not in ignored]
        boxes = [rasterio.features.bounds(geometry) for geometry, _ in labelled]
        text = any(isinstance(value, str) for _, value in labelled)
        if not text and (odd := [v for _, v in labelled if v != int(v) or not 0 <= v < 2**15]):
            raise ValueError(
                f"{path}: {field} holds {odd[0]}; names of classes are text, ids whole numbers"
            )
        values = sorted({str(value) if text else int(value) for _, value in labelled})
        if classes and not text:  # numbers are ids of the classes
            id_of = dict(zip(values, values, strict=True))
        else:
            id_of = {value: k for k, value in enumerate(classes or values)}
        if alien := [value for value in values if value not in id_of]:
            raise ValueError(
                f"{path}: {field} holds {alien[0]}, which --classes does not name "
                f"({', '.join(classes[:10])}); add a line for it"
            )
        shapes = [(shape, id_of[str(v) if text else int(v)]) for shape, v in labelled]
    return Polygons(path, crs, shapes, np.array(boxes), classes or tuple(map(str, values)))


def geojson(path):
    """(features, crs) of a GeoJSON file, in longitude and latitude unless it says otherwise."""
    about = read_json(path)
    with whole(path, "GeoJSON"):
        named = (about.get("crs") or {}).get("properties", {}).get("name", "EPSG:4326")
        crs = rasterio.crs.CRS.from_user_input(named)  # also urn:ogc:def:crs:EPSG::32631
        return about["features"], crs.to_string()


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
    if not near.any():
        return label
    shapes, numbers = zip(*(polygons.shapes[k] for k in np.flatnonzero(near)), strict=True)
    with whole(polygons.path, "vector"):
        if polygons.crs != info.crs:
            shapes = rasterio.warp.transform_geom(polygons.crs, info.crs, shapes)
        return rasterio.features.rasterize(
            zip(shapes, numbers, strict=True),
            out=label,
            transform=rasterio.Affine(*info.transform),
            all_touched=False,
        )
