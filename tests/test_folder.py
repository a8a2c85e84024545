"""datasets/folder.py: any GeoTIFFs of one's own, by ground and by the names of bands."""

import os
import shutil
import tarfile

import numpy as np
import pair_layouts as layouts
import pytest
from conftest import refused
from pair_layouts import BGRN, pairs_of, same

import data
from datasets.folder import read_geotiff
from imagery import pack, raster


@pytest.mark.parametrize("suffix", [".jp2", ".tif"])
def test_a_sentinel_2_product(tmp_path, suffix):
    if suffix == ".jp2":
        pytest.importorskip("rasterio")
    images = layouts.safe(tmp_path, suffix=suffix)
    for root in (tmp_path, tmp_path / layouts.SAFE):
        listing = read_geotiff(root)
        assert listing.bands == {"mr": BGRN, "hr": []} and len(listing.units) == 1
        ((source, hrs, split, site, _),) = listing.units[0].open()
        assert (hrs, split, site) == ([], None, None)
        bands = [images[band, 10] for band in ("B02", "B03", "B04", "B08")]
        assert same(source, np.concatenate(bands))
        assert source.info.transform == layouts.place(10.0)
        assert raster.crs_name(source.info.crs) == "EPSG:32631"
        assert (source.offset, source.date) == (-1000, "2022-03-01")
        assert source.nodata == 0
    ((source, *_),) = read_geotiff(tmp_path, mr_bands=["B05", "B07"]).units[0].open()
    assert same(source, np.concatenate([images["B05", 20], images["B07", 20]]))
    with refused(ValueError, "B05_20m", "30 x 30", "B02_10m", "60 x 60"):
        read_geotiff(tmp_path, mr_bands=["B02", "B05"])
    ((source, *_),) = read_geotiff(str(tmp_path / "**" / "*_B04_10m*")).units[0].open()
    assert same(source, images["B04", 10]) and (source.offset, source.nodata) == (-1000, 0)
    listing = read_geotiff(tmp_path, tmp_path, mr_bands=["B04"])
    assert listing.bands == {"mr": ["R"], "hr": ["R"]}
    with refused(ValueError, "--mr-bands B11", "B,G,R,NIR,B05,B06,B07"):
        read_geotiff(tmp_path, mr_bands=["B11"])


@pytest.mark.parametrize(
    "name, xml, offset",
    [
        (layouts.SAFE, None, -1000),
        (layouts.SAFE.replace("N0400", "N0510"), None, -1000),
        (layouts.SAFE.replace("N0400", "N0301"), None, 0),
        (layouts.SAFE.replace("N0400", "N9999"), None, 0),
        (layouts.SAFE.replace("N0400", "N9999"), -1000, -1000),
        ("renamed.SAFE", -1000, -1000),
        (layouts.SAFE.replace("MSIL2A", "MSIL1C"), None, -1000),
    ],
)
def test_the_offset_of_a_sentinel_2_product(tmp_path, name, xml, offset):
    """The same of a folder and of archives."""
    layouts.safe(tmp_path / "folder", name, ".tif", xml)
    shutil.make_archive(tmp_path / "zip" / "a", "zip", tmp_path / "folder", name)
    (tmp_path / "tar").mkdir()
    with tarfile.open(tmp_path / "tar" / "a.tar", "w", format=tarfile.GNU_FORMAT) as file:
        file.add(tmp_path / "folder" / name, name)
    for kind in ("folder", "zip", "tar"):
        ((source, *_),) = read_geotiff(tmp_path / kind).units[0].open()
        assert source.offset == offset and source.info.width == 60


def test_a_damaged_product_description(tmp_path):
    layouts.safe(tmp_path, suffix=".tif", offset=-1000)
    (tmp_path / layouts.SAFE / "MTD_MSIL2A.xml").write_text("<a>")
    with refused(ValueError, "MTD_MSIL2A.xml"):
        read_geotiff(tmp_path)


def test_jp2_messages(tmp_path):
    (tmp_path / "a.jp2").write_bytes(b"not an image")
    with refused(ValueError, "a.jp2"):
        read_geotiff(tmp_path)


def test_one_file_per_band(tmp_path):
    """Two scenes in one folder, one in a folder of its own; a file of all bands beside them."""
    images = {}
    for scene in ("one_2020-01-05", "two_2021-02-03", "three/20220506"):
        for band in ("B02", "B03", "B04", "B08", "B11"):
            path = tmp_path / f"{scene}_{band}.tif"
            images[scene, band] = layouts.tif(path, layouts.pixels(1, 20, 20), 10.0)
    for band in ("blue", "green", "red"):
        images[band] = layouts.tif(
            tmp_path / "four" / f"{band}.tif", layouts.pixels(1, 20, 20), 10.0
        )
    whole = layouts.tif(tmp_path / "five.tif", layouts.pixels(3, 20, 20), 10.0)
    listing = read_geotiff(tmp_path, mr_bands=["0", "1", "2"], band_names=["B", "G", "R"])
    found = {p.mr.info.path.relative_to(tmp_path).as_posix(): p.mr for p in pairs_of(listing)}
    assert sorted(found) == [
        "five.tif",
        "four",
        "one_2020-01-05",
        "three/20220506",
        "two_2021-02-03",
    ]
    for name in ("one_2020-01-05", "three/20220506"):
        bands = [images[name, band] for band in ("B02", "B03", "B04")]
        assert same(found[name], np.concatenate(bands))
    assert same(found["four"], np.concatenate([images[b] for b in ("blue", "green", "red")]))
    assert same(found["five.tif"], whole)
    assert found["one_2020-01-05"].date == "2020-01-05" and found["five.tif"].date == ""
    layouts.tif(tmp_path / "four" / "red.tif", layouts.pixels(3, 20, 20), 10.0)
    with refused(ValueError, "four/red.tif", "3 bands"):
        read_geotiff(tmp_path)


def test_other_band_names_of_hr(tmp_path):
    """HR is used with the bands that both have, by name or as the user says."""
    layouts.tif(
        tmp_path / "mr" / "a.tif", layouts.pixels(5, 20, 20), 10.0, band_names=[*BGRN, "SWIR"]
    )
    names = ["NIR", "R", "G", "B", "haze"]
    hr = layouts.tif(tmp_path / "hr" / "a.tif", layouts.pixels(5, 40, 40), 5.0, band_names=names)
    listing = read_geotiff(tmp_path)
    assert listing.bands == {"mr": [*BGRN, "SWIR"], "hr": BGRN}
    (pair,) = pairs_of(listing)
    assert same(pair.hrs[0], hr[[3, 2, 1, 0]])

    hr = layouts.tif(tmp_path / "hr" / "a.tif", layouts.pixels(3, 40, 40), 5.0)
    with refused(ValueError, "hr/a.tif", "B,G,R,NIR,SWIR", "found 3"):
        read_geotiff(tmp_path)
    listing = read_geotiff(tmp_path, hr_band_names=["R", "G", "B"])
    assert listing.bands["hr"] == ["B", "G", "R"]
    (pair,) = pairs_of(listing)
    assert same(pair.hrs[0], hr[[2, 1, 0]])
    listing = read_geotiff(tmp_path, hr_band_names=["haze", "R", "G"])  # as they are given
    assert listing.bands["hr"] == ["G", "R", "haze"]
    (pair,) = pairs_of(listing)
    assert same(pair.hrs[0], hr[[2, 1, 0]])
    hr = layouts.tif(
        tmp_path / "hr" / "a.tif", layouts.pixels(3, 40, 40), 5.0, band_names=["R", "G", "B"]
    )
    with refused(ValueError, "hr/a.tif", "R,G,B", "--hr-band-names", "--hr-bands B,G,R"):
        read_geotiff(tmp_path, hr_band_names=["B", "G", "R"])


S2 = "B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B11 B12".split()


@pytest.mark.parametrize(
    "mr, hr, options, bands, at",
    [
        ("B2 B3 B4 B8", "R G B N", {}, "B2 B3 B4 B8", [2, 1, 0, 3]),
        ("B8 B4 B3", "R G B N", {}, "B8 B4 B3", [3, 0, 1]),
        ("B02 B03 B04 B08", "Red Green Blue NIR", {}, "B02 B03 B04 B08", [2, 1, 0, 3]),
        ("Blue Green Red NIR", "R G B N", {}, "Blue Green Red NIR", [2, 1, 0, 3]),
        ("B G R NIR", "red GREEN blue Near-Infrared", {}, "B G R NIR", [2, 1, 0, 3]),
        (" ".join(S2), "Red Green Blue", {}, "B02 B03 B04", [2, 1, 0]),
        (" ".join(S2), "Red Green Blue NIR", {"hr_bands": ["B02", "B03"]}, "B02 B03", [2, 1]),
        (" ".join(S2), "R G B", {"mr_bands": ["B08", "B04"]}, "B04", [0]),
        ("B1 B2 B3 B4 B8 B8A", "R G B N", {"mr_bands": ["B4", "B2"]}, "B4 B2", [0, 2]),
        ("B1 B2 B3 B4", "B4 B3 haze", {}, "B3 B4", [1, 0]),
        ("R G B", "Blue Green Red", {"band_names": ["x", "y", "z"]}, "x y z", [2, 1, 0]),
        (None, "R G B N", {"band_names": ["B", "G", "R", "NIR"]}, "B G R NIR", [2, 1, 0, 3]),
        (None, "R G B", {"band_names": ["x", "y", "z"]}, "x y z", [0, 1, 2]),
        ("B G R", None, {}, "B G R", [0, 1, 2]),
        ("1 2 3", "R G B", {}, "1 2 3", [0, 1, 2]),
        ("B02 B03 B04", "x y z", {"hr_band_names": ["R", "B", "G"]}, "B02 B03 B04", [1, 2, 0]),
        # bands that MR has not: HR's own where MR has none of them or the user asks
        ("VV VH", "B G R NIR", {}, "B G R NIR", [0, 1, 2, 3]),
        ("VV VH", "Red Green Blue", {"hr_bands": ["B02", "0"]}, "Blue Red", [2, 0]),
        ("VV VH", "R G", {}, "R G", [0, 1]),
        ("VV VH", None, {"hr_band_names": ["R", "G"]}, "R G", [0, 1]),
        ("1 2", "VH Red B", {"hr_band_names": ["VH", "R", "B"]}, "VH R B", [0, 1, 2]),
        (None, "B G R", {"band_names": ["VV", "VH"]}, "B G R", [0, 1, 2]),
        ("B02 B03 B04", "R haze G", {"hr_bands": ["haze", "R"]}, "B04 haze", [0, 1]),
        ("B02 B03 B04", "R haze N", {"hr_bands": ["2", "1"]}, "N haze", [2, 1]),
        ("B02 B03", "G VV R", {"hr_band_names": ["G", "VV", "R"]}, "B03 VV R", [0, 1, 2]),
        ("c1 c2 c3", "R G B", {}, "R G B", [0, 1, 2]),
        ("B1 B2 B3 B4 B5", "R G B N", {}, "R G B N", [0, 1, 2, 3]),  # not Sentinel-2's
        ("B1 B2 B3 B4 B5 B6 B7 B8", "Red Green NIR", {}, "Red Green NIR", [0, 1, 2]),
        ("B02 B03 B04", "B1 B2 B3 B4", {"hr_bands": ["B4", "B2"]}, "B4 B2", [3, 1]),
    ],
)
def test_bands_are_matched_by_what_their_names_mean(tmp_path, mr, hr, options, bands, at):
    arrays = {}
    for sensor, names, gsd in (("mr", mr, 10.0), ("hr", hr, 5.0)):
        count = len((names or mr or hr).split())
        count = len(options.get("band_names", range(count))) if names is None else count
        array = layouts.pixels(count, 20, 20)
        about = {"band_names": names.split()} if names else {}
        arrays[sensor] = layouts.tif(tmp_path / sensor / "a.tif", array, gsd, **about)
    listing = read_geotiff(tmp_path, **options)
    assert listing.bands["hr"] == bands.split()
    ((pair),) = pairs_of(listing)
    assert same(pair.hrs[0], arrays["hr"][at])


def test_bands_of_hr_that_mr_has_not(tmp_path, capsys):
    def write(mr, hr):
        for sensor, names, gsd in (("mr", mr.split(), 10.0), ("hr", hr.split(), 5.0)):
            array = layouts.pixels(len(names), 20, 20)
            layouts.tif(tmp_path / sensor / "a.tif", array, gsd, band_names=names)

    write("B02 B03 B04", "R haze G N")
    assert read_geotiff(tmp_path).bands["hr"] == ["B03", "B04"]
    path = tmp_path / "hr" / "a.tif"
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(f"{path}: haze,N left out") and "B02,B03,B04" in said
    read_geotiff(tmp_path, hr_bands=["R", "haze"])  # as asked for
    assert not capsys.readouterr().out
    write("c1 c2 c3", "R G B")
    read_geotiff(tmp_path)
    (said,) = capsys.readouterr().out.splitlines()
    assert all(word in said for word in (str(path), "R,G,B", "c1,c2,c3", "--hr-band-names"))
    # the band names of one satellite in the files of another mean other bands
    write("B2 B3 B4 B8", "B1 B2 B3 B4")
    for options in ({}, {"hr_bands": ["B1", "B2"]}):
        with refused(ValueError, path, "B2", "B2,B3,B4,B8", "--hr-band-names", "--hr-bands"):
            read_geotiff(tmp_path, **options)
    assert read_geotiff(tmp_path, hr_bands=["B1"]).bands["hr"] == ["B1"]
    # without names in the MR file, --band-names is of HR too where the number fits; that is told
    layouts.tif(tmp_path / "mr" / "a.tif", layouts.pixels(4, 20, 20), 10.0)
    assert read_geotiff(tmp_path, band_names=[*"wxyz"]).bands["hr"] == [*"wxyz"]
    (said,) = capsys.readouterr().out.splitlines()[1:]
    assert "B1,B2,B3,B4" in said and "w,x,y,z" in said and "--hr-band-names" in said


def test_bands_of_hr_alone_are_read_by_name_in_every_file(tmp_path):
    layouts.tif(tmp_path / "mr" / "a.tif", layouts.pixels(2, 20, 20), 10.0, band_names=["VV", "VH"])
    first, second = (
        layouts.tif(tmp_path / "hr" / name, layouts.pixels(3, 40, 40), 5.0, band_names=names)
        for name, names in (("a.tif", [*"BGR"]), ("b.tif", [*"RGB"]))
    )
    ((a, b),) = (pair.hrs for pair in pairs_of(read_geotiff(tmp_path)))
    assert same(a, first) and same(b, second[::-1])


def test_one_order_by_other_names_is_no_disagreement(tmp_path):
    for name, bands in (("a", "B02 B03 B04"), ("b", "Blue Green Red")):
        array = layouts.pixels(3, 20, 20)
        layouts.tif(tmp_path / f"{name}.tif", array, 10.0, band_names=bands.split())
    assert read_geotiff(tmp_path).bands["mr"] == ["B02", "B03", "B04"]
    array = layouts.pixels(3, 20, 20)
    layouts.tif(tmp_path / "c.tif", array, 10.0, band_names=["Red", "Green", "Blue"])
    *_, last = pairs_of(listing := read_geotiff(tmp_path))
    assert listing.bands["mr"] == ["B02", "B03", "B04"] and same(last.mr, array[::-1])
    with refused(ValueError, "c.tif", "Red,Green,Blue", "a.tif", "--mr-bands B02,B03,B04"):
        read_geotiff(tmp_path, mr_bands=["0", "1", "2"])


def test_the_nearest_date_serves_first(tmp_path):
    layouts.tif(tmp_path / "mr" / "S2_20180710_x.tif", layouts.pixels(1, 20, 20), 10.0)
    for day in ("20160710", "20180801", "20180101"):
        layouts.tif(tmp_path / "hr" / f"naip_{day}.tif", layouts.pixels(1, 40, 40), 5.0)
    layouts.tif(tmp_path / "hr" / "S2_x.tif", layouts.pixels(1, 40, 40), 5.0)
    (pair,) = pairs_of(read_geotiff(tmp_path))
    assert [hr.date for hr in pair.hrs] == ["2018-08-01", "2018-01-01", "2016-07-10", ""]


def test_pairs_further_apart_than_max_days_are_left_out(tmp_path, capsys):
    for day, east in (("20180710", 300_000.0), ("20200101", 302_000.0)):
        path = tmp_path / "mr" / f"S2_{day}.tif"
        layouts.tif(path, layouts.pixels(1, 20, 20), 10.0, east)
        for hr in ("20180720", "20180601", "undated"):
            path = tmp_path / "hr" / f"naip_{east:.0f}_{hr}.tif"
            layouts.tif(path, layouts.pixels(1, 40, 40), 5.0, east)
    os.remove(tmp_path / "hr" / "naip_302000_undated.tif")
    listing = read_geotiff(tmp_path, max_days=10)
    first, second = pairs_of(listing)
    assert [hr.date for hr in first.hrs] == ["2018-07-20", ""]  # at most, not less
    assert (second.hrs, second.reason) == ([], "its HR is more than 10 days away")
    reasons = {name.rpartition("/")[2]: reason for name, reason in listing.skipped}
    assert reasons == dict.fromkeys(
        ["naip_300000_20180601.tif", "naip_302000_20180601.tif", "naip_302000_20180720.tif"],
        "HR that serves no MR image",
    )
    out = capsys.readouterr().out
    assert "naip_300000_undated.tif: no date in its name, as in 1 of 7 files" in out
    assert [len(pair.hrs) for pair in pairs_of(read_geotiff(tmp_path))] == [3, 2]
    os.remove(tmp_path / "hr" / "naip_300000_undated.tif")
    with refused(ValueError, "--max-days 3"):
        read_geotiff(tmp_path, max_days=3)


def test_the_reason_of_what_serves_nothing_is_where_it_lies(tmp_path):
    layouts.tif(tmp_path / "mr" / "a.tif", layouts.pixels(1, 20, 20), 10.0)
    layouts.tif(tmp_path / "mr" / "b.tif", layouts.pixels(1, 20, 20), 10.0, 310_000.0)
    layouts.tif(tmp_path / "hr" / "a.tif", layouts.pixels(1, 40, 40), 5.0)
    x, y = raster.project("EPSG:32631", "EPSG:32632", [312_345.0], [5_000_000.0])
    place = (5.0, 0.0, float(x[0]), 0.0, -5.0, float(y[0]))
    raster.write(tmp_path / "hr" / "c.tif", layouts.pixels(1, 40, 40), place, 32632)
    listing = read_geotiff(tmp_path)
    first, second = pairs_of(listing)
    assert first.hrs and second.hrs == []
    assert second.reason == "no HR on its ground, the nearest is in EPSG:32632, 2.1 km away"
    ((name, reason),) = listing.skipped
    assert name.endswith("hr/c.tif")
    assert reason == "HR on no MR image's ground, in EPSG:32632, 2.1 km away"
    os.remove(tmp_path / "mr" / "a.tif")
    os.remove(tmp_path / "hr" / "a.tif")
    with refused(ValueError, "mr/b.tif in EPSG:32631", "in EPSG:32632, 2.1 km away", "hr/c.tif"):
        read_geotiff(tmp_path)


def test_without_a_ground_two_of_a_name_pair_if_their_shapes_are_alike(tmp_path, capsys):
    for name, side in (("a", 40), ("b", 45)):  # b shows other ground than its MR
        layouts.tif(tmp_path / "mr" / f"{name}.tif", layouts.pixels(1, 20, 20))
        layouts.tif(tmp_path / "hr" / f"{name}.tif", layouts.pixels(1, 40, side))
    first, second = pairs_of(read_geotiff(tmp_path))
    assert first.hrs and second.hrs == []
    assert second.reason == "another shape than HR of its name, and no georeference"
    assert "1 pairs by name, ground unknown" in capsys.readouterr().out


def test_files_of_one_name_pair_by_their_folders(tmp_path):
    def write(*names):
        for name in names:
            side = 20 if name.startswith("mr") else 40
            layouts.tif(tmp_path / f"{name}.tif", layouts.pixels(1, side, side))

    def found(*where):
        pairs = pairs_of(read_geotiff(*where or [tmp_path]))
        names = [
            [s.info.path.relative_to(tmp_path).as_posix() for s in [p.mr, *p.hrs]] for p in pairs
        ]
        return [[name.removesuffix(".tif") for name in some] for some in names]

    write("mr/site1/img", "mr/site2/img", "mr/site3/img", "mr/2020/b", "hr/site1/img", "hr/b")
    site1 = ["mr/site1/img", "hr/site1/img"]
    expected = [["mr/2020/b", "hr/b"], site1, ["mr/site2/img"], ["mr/site3/img"]]
    assert found() == expected
    write("hr/site2/img", "hr/site9/img")
    expected[2].append("hr/site2/img")
    assert found() == expected
    assert found(str(tmp_path / "mr" / "*" / "*.tif"), tmp_path / "hr") == expected
    assert found(str(tmp_path / "m*" / "*" / "*.tif"), tmp_path / "hr" / "b.tif") == [
        expected[0],
        ["mr/site1/img"],
        ["mr/site2/img"],
        ["mr/site3/img"],
    ]
    for name in ("site1", "site2", "site9"):
        os.remove(tmp_path / "hr" / name / "img.tif")
    assert len(found()) == 4
    write("hr/img")
    assert found() == [expected[0], *([f"mr/site{n}/img"] for n in "123")]
    assert "in the same subfolder" in pairs_of(read_geotiff(tmp_path))[1].reason
    write("mr/img")
    assert found()[1] == ["mr/img", "hr/img"]


def test_hidden_files_are_left_alone(tmp_path):
    for name in ("a.tif", "b/c.tif", ".x.tif"):
        layouts.tif(tmp_path / name, layouts.pixels(1, 20, 20), 10.0)
    for name in ("._a.tif", "b/._c.tif"):  # what macOS writes to other drives
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    names = [unit.name for unit in read_geotiff(tmp_path).units]
    assert names == [(tmp_path / name).as_posix() for name in ("a.tif", "b/c.tif")]


def test_units_open_again(tmp_path):
    layouts.tif(tmp_path / "a.tif", layouts.pixels(1, 20, 20), 10.0)
    (unit,) = read_geotiff(tmp_path).units
    assert unit.name == (tmp_path / "a.tif").as_posix()
    assert len(list(unit.open())) == len(list(unit.open())) == 1


def keys_of(listing):
    return [unit.key for unit in listing.units]


def test_the_key_of_a_geotiff_says_its_hr_bands_and_nodata(tmp_path):
    for sensor, gsd, side in (("mr", 10.0, 20), ("hr", 5.0, 40)):
        layouts.tif(tmp_path / sensor / "a.tif", layouts.pixels(2, side, side), gsd)
    whole = read_geotiff(tmp_path)
    assert keys_of(whole) == keys_of(read_geotiff(tmp_path))
    names = ["x", "y"]
    found = {*keys_of(whole), *keys_of(read_geotiff(tmp_path / "mr"))}
    for options in (
        {"nodata": 0},
        {"hr_bands": ["1", "0"], "band_names": names},
        {"mr_bands": ["1", "0"], "band_names": names},
    ):
        found |= {*keys_of(read_geotiff(tmp_path, **options))}
    os.rename(tmp_path / "hr" / "a.tif", tmp_path / "hr" / "b.tif")
    found |= {*keys_of(read_geotiff(tmp_path))}
    assert len(found) == 6


def test_real_imagery_by_date(real):
    folder = real("opengeos_naip_5m/naip_m_4709963_se_14_1_20180716.tif").parent
    listing = read_geotiff(folder)
    assert min(pair.mr.date for pair in pairs_of(listing)) == "2009-08-18"
    assert raster.info(pairs_of(listing)[0].mr.info.path).bands == 4


@pytest.mark.parametrize("sensor", ["mr", "hr"])
def test_a_sentinel_2_product_makes_a_store(tmp_path, sensor):
    """The offset of its processing baseline is added, and its nodata stays."""
    images = layouts.safe(tmp_path / "mr", suffix=".tif")
    if sensor == "hr":
        layouts.tif(tmp_path / "hr" / "a.tif", layouts.pixels(4, 120, 120), 5.0)
    listing = read_geotiff(tmp_path)
    meta = pack.pack(listing, tmp_path / "store", chip=30, split_block=1)
    assert meta["count"] == {"mr": 4, "hr": 4 if sensor == "hr" else 0}
    assert meta["bands"] == {"mr": BGRN, "hr": BGRN if sensor == "hr" else []}
    store = data.Store(tmp_path / "store")
    whole = np.concatenate([images[band, 10] for band in ("B02", "B03", "B04", "B08")])
    for number, row in enumerate(data.read_csv(tmp_path / "store" / "index.csv")):
        r, c = int(row["row"]), int(row["col"])
        expected = whole[:, r : r + 30, c : c + 30].astype(int) - 1000
        assert np.array_equal(store.batch([number], ["mr"])["mr"][0], np.maximum(expected, 0))


def test_advice_can_be_typed_as_it_is(tmp_path):
    layouts.tif(tmp_path / "my mr" / "a.tif", layouts.pixels(1, 20, 20, dtype="uint16"), 10.0)
    path = tmp_path / "my mr" / "b.tif"
    layouts.tif(path, layouts.pixels(1, 20, 20, dtype="uint16"), 10.0, scaling=[(0.1, 0.0)])
    with refused(ValueError, f"gdal_translate -unscale -ot Float32 '{path}' OUT.tif"):
        read_geotiff(tmp_path / "my mr")
    layouts.tif(path, layouts.pixels(1, 20, 20, dtype="uint16"))
    with refused(ValueError, f"-a_ullr LEFT TOP RIGHT BOTTOM '{path}' OUT.tif"):
        read_geotiff(tmp_path / "my mr", tmp_path / "my mr")
