"""datasets/labels.py: polygons burnt as by a slow loop; images of all kinds, and their tags."""

import json
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pair_layouts as layouts
import pytest
from conftest import refused

import finetune
from datasets import labels
from datasets.tasks import load_folder
from imagery import raster
from imagery.bands import IGNORE

SIDE, PLACE = 32, layouts.place(10.0)


def square(left, top, right, bottom):
    """A polygon by pixels of the image, in its CRS."""
    a, _, c, _, e, f = PLACE
    ring = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    return [[c + a * col, f + e * row] for col, row in ring]


def feature(rings, **properties):
    geometry = rings and {"type": "Polygon", "coordinates": rings}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def write_json(path, features, crs="urn:ogc:def:crs:EPSG::32631"):
    about = {"type": "FeatureCollection", "features": features}
    if crs:
        about["crs"] = {"type": "name", "properties": {"name": crs}}
    path.write_text(json.dumps(about))
    return path


FIELDS = [
    feature([square(0, 0, 14.6, 20)], crop="wheat", code=3, area=1.5),
    feature([square(16, 2, 30, 30), square(20, 10, 25, 20)], crop="maize", code=0, area=2.0),
    feature([square(10, 5, 20.4, 8.7)], crop="wheat", code=3, area=3.0),  # over the two
    feature([square(0, 24, 8, 28)], crop=None, code=None, area=4.0),
    feature(None, crop="rye", code=9, area=5.0),
    feature([square(900, 900, 950, 950)], crop="maize", code=0, area=6.0),  # elsewhere
]


def inside(col, row, ring):
    """Whether a point lies in a polygon, by how often a ray from it meets its rim."""
    a, _, c, _, e, f = PLACE
    x, y, odd = c + a * col, f + e * row, False
    for (x0, y0), (x1, y1) in pairwise(ring):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0):
            odd = not odd
    return odd


def slowly(number_of):
    expected = np.full((SIDE, SIDE), IGNORE)
    for one in FIELDS:
        number = number_of(one["properties"])
        if one["geometry"] is None or number is None:
            continue
        outer, *holes = one["geometry"]["coordinates"]
        for row, col in np.ndindex(SIDE, SIDE):
            at = col + 0.5, row + 0.5
            if inside(*at, outer) and not any(inside(*at, hole) for hole in holes):
                expected[row, col] = number
    return expected


@pytest.fixture
def scene(tmp_path):
    (tmp_path / "images").mkdir()
    layouts.tif(tmp_path / "images" / "a.tif", layouts.pixels(3, SIDE, SIDE), 10.0)
    return raster.info(tmp_path / "images" / "a.tif")


def test_polygons_of_names_and_of_ids(tmp_path, scene):
    path = write_json(tmp_path / "fields.geojson", FIELDS)
    found = labels.read_polygons(path, "crop")
    assert found.classes == ("maize", "wheat")
    names = {"maize": 0, "wheat": 1}
    expected = slowly(lambda about: names.get(about["crop"]))
    assert np.array_equal(labels.burn(found, scene), expected)
    assert {*np.unique(expected)} == {IGNORE, 0, 1}
    found = labels.read_polygons(path, "crop", ("rye", "wheat", "oats", "maize"))
    assert np.array_equal(
        labels.burn(found, scene), np.select([expected == 0, expected == 1], [3, 1], IGNORE)
    )
    found = labels.read_polygons(path, "code")  # whatever the numbers are
    assert found.classes == ("0", "3")
    assert np.array_equal(labels.burn(found, scene), expected)
    found = labels.read_polygons(path, "code", ("maize", "rye", "oats", "wheat"))
    assert np.array_equal(labels.burn(found, scene), slowly(lambda about: about["code"]))
    found = labels.read_polygons(path, "code", ignored=(0, 7))
    assert np.array_equal(
        labels.burn(found, scene), slowly(lambda about: {3: 0}.get(about["code"]))
    )


def test_polygons_in_degrees_are_brought_to_the_image(tmp_path, scene):
    """As GeoJSON is to be: longitude and latitude."""

    def degrees(one):
        rings = (one["geometry"] or {}).get("coordinates") or []
        moved = []
        for ring in rings:
            x, y = raster.project("EPSG:32631", "EPSG:4326", *map(list, zip(*ring, strict=True)))
            moved.append([list(map(float, point)) for point in zip(x, y, strict=True)])
        return feature(moved or None, **one["properties"])

    expected = slowly(lambda about: {"maize": 0, "wheat": 1}.get(about["crop"]))
    for crs in (None, "urn:ogc:def:crs:OGC:1.3:CRS84"):
        path = write_json(tmp_path / "fields.json", map_list(degrees, FIELDS), crs)
        found = labels.burn(labels.read_polygons(path, "crop"), scene)
        assert np.array_equal(found, expected)


def map_list(function, items):
    return [function(item) for item in items]


@pytest.mark.parametrize(
    "text, field, mentions",
    [
        ("{", "crop", ["fields.geojson", "JSON"]),
        ('{"type": "FeatureCollection"}', "crop", ["fields.geojson", "features"]),
        (None, "kind", ["fields.geojson", "kind", "--label-field", "area, code, crop"]),
        (None, "area", ["fields.geojson", "area holds 1.5", "whole numbers"]),
    ],
)
def test_vector_files_that_are_none(tmp_path, text, field, mentions):
    path = write_json(tmp_path / "fields.geojson", FIELDS)
    if text:
        path.write_text(text)
    with refused(ValueError, *mentions):
        labels.read_polygons(path, field)


def test_more_that_polygons_cannot_be(tmp_path, scene):
    path = write_json(tmp_path / "fields.geojson", FIELDS)
    with refused(ValueError, "fields.geojson", "maize", "--classes", "wheat, oats"):
        labels.read_polygons(path, "crop", ("wheat", "oats"))
    with refused(FileNotFoundError, "none.geojson"):
        labels.read_polygons(tmp_path / "none.geojson", "crop")
    layouts.tif(tmp_path / "bare.tif", layouts.pixels(3, SIDE, SIDE))
    with refused(ValueError, "bare.tif", "fields.geojson", "georeference"):
        labels.burn(labels.read_polygons(path, "crop"), raster.info(tmp_path / "bare.tif"))


def test_geopackages_are_read_by_fiona(tmp_path, scene, monkeypatch):
    path = tmp_path / "my fields.gpkg"
    path.write_bytes(b"SQLite format 3\0")
    monkeypatch.setitem(sys.modules, "fiona", None)  # as where it is not installed
    with refused(ValueError, "pip install fiona", f"'{tmp_path}/my fields.geojson' '{path}'"):
        labels.read_polygons(path, "crop")

    class Layer(list):
        crs = SimpleNamespace(to_wkt=lambda: "EPSG:32631")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    features = [SimpleNamespace(__geo_interface__=one) for one in FIELDS]
    fiona = SimpleNamespace(open=lambda path: Layer(features))
    monkeypatch.setitem(sys.modules, "fiona", fiona)
    expected = slowly(lambda about: {"maize": 0, "wheat": 1}.get(about["crop"]))
    found = labels.burn(labels.read_polygons(path, "crop"), scene)
    assert np.array_equal(found, expected)


def test_a_task_of_polygons(tmp_path, scene):
    path = write_json(tmp_path / "fields.geojson", FIELDS)
    task = load_folder(
        tmp_path / "images", polygons=path, field="crop", tile=8, block=1, val=0.25, test=0.25
    )
    assert task.classes == ("maize", "wheat")
    expected = slowly(lambda about: {"maize": 0, "wheat": 1}.get(about["crop"]))
    for label, (_, row, col) in zip(task.labels, task.origin, strict=True):
        assert np.array_equal(label, expected[row : row + 8, col : col + 8])
    task = load_folder(
        tmp_path / "images", polygons=path, field="code", tile=8, block=1, val=0.25, test=0.25
    )
    assert task.classes == ("0", "3")
    rye = feature([square(0, 22, 12, 32)], crop="rye", code=5)
    write_json(path, [*FIELDS, rye])
    task = load_folder(
        tmp_path / "images", polygons=path, field="code", ignore_index=0, tile=8, block=1
    )
    assert task.classes == ("3", "5")
    codes = slowly(lambda about: {3: 0}.get(about["code"]))
    codes[22:32, :12] = 1
    for label, (_, row, col) in zip(task.labels, task.origin, strict=True):
        assert np.array_equal(label, codes[row : row + 8, col : col + 8])


def test_images_of_a_task_may_be_scenes(tmp_path):
    """A scene of one file per band is one image, named as its files begin; companions are none."""
    mask = layouts.RNG.integers(0, 2, (SIDE, SIDE)).astype("uint8")
    stack = layouts.pixels(4, SIDE, SIDE)
    for name in "ab":
        for band, array in zip(("B02", "B03", "B04", "B08"), stack, strict=True):
            layouts.tif(tmp_path / "scenes" / f"{name}_{band}.tif", array[None], 10.0)
        layouts.tif(tmp_path / "scenes" / f"{name}_SCL.tif", mask[None], 10.0)
        layouts.tif(tmp_path / "stacks" / f"{name}.tif", stack, 10.0)
        layouts.tif(tmp_path / "masks" / f"{name}.tif", mask, 10.0)
    options = {"tile": 8, "block": 1, "val": 0.25, "test": 0.25}
    scenes = load_folder(tmp_path / "scenes", tmp_path / "masks", **options)
    stacks = load_folder(tmp_path / "stacks", tmp_path / "masks", **options)
    assert np.array_equal(scenes.images, stacks.images) and scenes.bands == ("B", "G", "R", "NIR")
    assert np.array_equal(scenes.labels, stacks.labels)
    assert (scenes.positions, scenes.file_bands) == ((0, 1, 2, 3), 4)
    two = load_folder(tmp_path / "scenes", tmp_path / "masks", bands=["NIR", "B"], **options)
    assert np.array_equal(two.images, stacks.images[:, [3, 0]])


def test_images_of_other_tags_come_in_one_unit(tmp_path, capsys):
    mask = layouts.RNG.integers(0, 2, (SIDE, SIDE)).astype("uint8")
    first = layouts.pixels(2, SIDE, SIDE)
    for name, array, scaling in (
        ("a", first, (1e-4, 0.0)),
        ("b", first + np.int16(1000), (1e-4, -0.1)),
        ("c", (first * 1e-4).astype("float32"), (1.0, 0.0)),
    ):
        path = tmp_path / "images" / f"{name}.tif"
        layouts.tif(path, array, 10.0, scaling=[scaling] * 2)
        layouts.tif(tmp_path / "masks" / f"{name}.tif", mask, 10.0)
    options = {"tile": 8, "block": 1, "val": 0.25, "test": 0.25}
    task = load_folder(tmp_path / "images", tmp_path / "masks", **options)
    assert task.scaling == ((1e-4, 0.0),) * 2
    for image, (_, row, col) in zip(task.images, task.origin, strict=True):
        assert np.abs(image - first[:, row : row + 8, col : col + 8]).max() < 1e-2
    assert "b.tif, have another scale" in (out := capsys.readouterr().out) and "2 of 3" in out


def test_classes_lie_beside_the_masks(tmp_path, scene, capsys):
    layouts.tif(tmp_path / "masks" / "a.tif", layouts.RNG.integers(0, 2, (SIDE, SIDE)), 10.0)
    words = ["--encoder", "random", "--images", str(tmp_path / "images")]
    words += ["--masks", str(tmp_path / "masks"), "--tile", "8", "--block", "1"]
    assert finetune.load(finetune.parse_args(words)).classes == ("0", "1")
    for folder, names in ((tmp_path, ("field", "wood")), (tmp_path / "masks", ("land", "sea"))):
        (folder / "classes.txt").write_text("\n".join(names))
        assert finetune.load(finetune.parse_args(words)).classes == names
        assert f"classes as {folder / 'classes.txt'} names them" in capsys.readouterr().out
    other = tmp_path / "other.txt"
    other.write_text("x\ny")
    task = finetune.load(finetune.parse_args([*words, "--classes", str(other)]))
    assert task.classes == ("x", "y")


def test_what_clouds_hide_has_no_label(tmp_path, scene, capsys):
    """SCL of 20 m beside the image: 8 is cloud, 3 its shadow, 0 unknown to the mask itself."""
    layouts.tif(tmp_path / "masks" / "a.tif", layouts.RNG.integers(0, 2, (SIDE, SIDE)), 10.0)
    scl = np.full((1, SIDE // 2, SIDE // 2), 4, "uint8")
    scl[0, :3], scl[0, 10, 10:] = 8, 3
    layouts.tif(tmp_path / "images" / "a_SCL.tif", scl, 20.0)
    words = ["--encoder", "random", "--images", str(tmp_path / "images")]
    words += ["--masks", str(tmp_path / "masks"), "--tile", "8", "--block", "1"]
    plain, hidden = (
        finetune.load(finetune.parse_args([*words, *more]))
        for more in ([], ["--clouds", "sentinel2"])
    )
    assert "SCL: hides what it marks in 1 of 1 MR images" in capsys.readouterr().out
    clear = ~np.isin(scl[0], (3, 8)).repeat(2, 0).repeat(2, 1)
    assert (plain.labels != IGNORE).all() and len(hidden.labels) == len(plain.labels)
    for label, image, (_, row, col) in zip(
        hidden.labels, hidden.images, hidden.origin, strict=True
    ):
        part = clear[row : row + 8, col : col + 8]
        assert np.array_equal(label != IGNORE, part) and np.array_equal(~np.isnan(image[0]), part)
    with refused(SystemExit, "--clouds", "marida"):
        finetune.parse_args([*words[:2], "--task", "marida", "--root", "r", "--clouds", "hls"])


@pytest.mark.parametrize(
    "words, mentions",
    [
        (
            ["--masks", "m", "--labels-file", "f", "--label-field", "x"],
            ["--labels-file", "--masks"],
        ),
        (["--labels-file", "f"], ["--label-field"]),
        (["--masks", "m", "--label-field", "x"], ["--labels-file"]),
        ([], ["--masks", "--labels-file"]),
    ],
)
def test_flags_of_labels(words, mentions):
    with refused(SystemExit, *mentions):
        finetune.parse_args(["--encoder", "random", "--images", "i", *words])
