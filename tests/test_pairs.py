"""datasets/: each published layout of pairs is read as it is shipped; every message."""

import json
import os
import pickle

import h5py
import numpy as np
import pair_layouts as layouts
import pytest
import torch
from conftest import refused
from pair_layouts import BGRN, pairs_of, pixels_of, same

import data
from datasets import hdf5, rapidai4eo, sen2naip, sen2venus, worldstrat
from datasets.common import sets
from imagery import pack, raster

# SEN2VENµS


def test_sen2venus_v1(tmp_path):
    images = layouts.sen2venus(tmp_path)
    listing = sen2venus.read(tmp_path)
    assert listing.bands == {"mr": BGRN, "hr": BGRN} and listing.chip == 128
    assert [unit.name for unit in listing.units] == [
        "ALSACE/ALSACE_C_32ULU_2018-02-14_10m_b2b3b4b8.pt",
        "NARYN/NARYN_C__43TFG_2019-07-25_10m_b2b3b4b8.pt",
    ]
    assert listing.sources[0]["licence"] == "non-commercial; see the record"
    pairs = pairs_of(listing)
    assert [pair.site for pair in pairs] == 3 * ["ALSACE_C"] + 3 * ["NARYN_C"]
    assert pairs[4].mr.info.path.name == "NARYN_C__43TFG_2019-07-25_10m_b2b3b4b8.pt#1"
    assert {pair.split for pair in pairs} == {None}
    for number, pair in enumerate(pairs):
        stem = ("ALSACE_C_32ULU_2018-02-14", "NARYN_C__43TFG_2019-07-25")[number // 3]
        assert same(pair.mr, images[f"{stem}_10m_b2b3b4b8"][number % 3])
        assert same(pair.hrs[0], images[f"{stem}_05m_b2b3b4b8"][number % 3])
        assert pair.mr.date == pair.hrs[0].date == stem[-10:]
    assert [p.site for p in pairs_of(sen2venus.read(tmp_path / "NARYN"))] == 3 * ["NARYN_C"]


def test_sen2venus_of_20_m(tmp_path):
    images = layouts.sen2venus(tmp_path)
    listing = sen2venus.read(tmp_path, product="20m")
    assert listing.bands["hr"] == ["B05", "B06", "B07", "B8A"] and listing.chip == 64
    pair = next(listing.units[0].open())
    assert same(pair.mr, images["ALSACE_C_32ULU_2018-02-14_20m_b4b5b6b8a"][0])
    assert same(pair.hrs[0], images["ALSACE_C_32ULU_2018-02-14_05m_b4b5b6b8a"][0])
    with refused(ValueError, "--product 60m", "10m", "20m"):
        sen2venus.read(tmp_path, product="60m")


@pytest.mark.parametrize("names", [None, ["B8A", "B7", "B06", "B5"]])
def test_sen2venus_of_20_m_names_its_own_bands(tmp_path, names):
    """A GeoTIFF is read by the names in it, and those are of the 20 m bands."""
    arrays = {}
    for gsd, side in (("05m", 32), ("20m", 8)):
        path = tmp_path / f"ATTO/ATTO_20NQF_2018-08-01_b4b5b6b8a_{gsd}/patch_0000_{gsd}.tif"
        about = {"band_names": names} if names else {}
        arrays[gsd] = layouts.tif(path, layouts.pixels(4, side, side), float(gsd[:-1]), **about)
    (pair,) = pairs_of(sen2venus.read(tmp_path, product="20m"))
    order = [3, 2, 1, 0] if names else [0, 1, 2, 3]
    assert same(pair.mr, arrays["20m"][order]) and same(pair.hrs[0], arrays["05m"][order])


def test_sen2venus_files_of_before_torch_1_6_are_read_too(tmp_path):
    images = layouts.sen2venus(tmp_path, ["ARM_14SPE_2018-01-01"])
    for path in (tmp_path / "ARM").glob("*.pt"):
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    pair = next(sen2venus.read(tmp_path).units[0].open())
    assert same(pair.hrs[0], images["ARM_14SPE_2018-01-01_05m_b2b3b4b8"][0])


def test_sen2venus_v2(tmp_path):
    images = layouts.sen2venus_v2(tmp_path)
    listing = sen2venus.read(tmp_path)
    pairs = pairs_of(listing)
    assert [pair.site for pair in pairs] == ["ATTO", "ATTO"]
    for number, pair in enumerate(pairs):
        folder = "ATTO/ATTO_20NQF_2018-08-01_b2b3b4b8_"
        assert same(pair.mr, images[f"{folder}10m/patch_{number:04d}_10m.tif"])
        assert same(pair.hrs[0], images[f"{folder}05m/patch_{number:04d}_05m.tif"])
        assert pair.mr.info.gsd == 10 and pair.hrs[0].info.gsd == 5
        assert pair.mr.date == "2018-08-01"


def test_sen2venus_files_without_a_partner_are_skipped(tmp_path):
    layouts.sen2venus(tmp_path)
    (tmp_path / "ALSACE" / "ALSACE_C_32ULU_2018-02-14_05m_b2b3b4b8.pt").unlink()
    listing = sen2venus.read(tmp_path)
    assert len(listing.units) == 1
    ((name, reason),) = listing.skipped
    assert name.endswith("ALSACE_C_32ULU_2018-02-14_10m_b2b3b4b8.pt")
    assert reason == "no HR file for it"


class Hostile:
    def __reduce__(self):
        return os.system, ("echo hostile code ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pt_file_with_code_is_refused(tmp_path, zipped, capfd):
    layouts.sen2venus(tmp_path, ["ARM_14SPE_2018-01-01"])
    path = tmp_path / "ARM" / "ARM_14SPE_2018-01-01_05m_b2b3b4b8.pt"
    torch.save(Hostile(), path, _use_new_zipfile_serialization=zipped)
    with refused(ValueError, path):
        pairs_of(sen2venus.read(tmp_path))
    path.write_bytes(pickle.dumps(Hostile()))
    with refused(ValueError, path):
        pairs_of(sen2venus.read(tmp_path))
    assert "hostile code ran" not in capfd.readouterr().out


def test_sen2venus_files_that_do_not_fit(tmp_path):
    layouts.sen2venus(tmp_path, ["ARM_14SPE_2018-01-01"])
    path = tmp_path / "ARM" / "ARM_14SPE_2018-01-01_05m_b2b3b4b8.pt"
    content = path.read_bytes()
    for bad, found in (
        (torch.zeros(2, 4, 8, 8), "2 patches"),
        (torch.zeros(2, 3, 8, 8), "(2, 3, 8, 8)"),
        ({"images": torch.zeros(2, 4, 8, 8)}, "dict"),
    ):
        torch.save(bad, path)
        with refused(ValueError, path, found):
            pairs_of(sen2venus.read(tmp_path))
    for bad in (content[: len(content) // 2], b""):
        path.write_bytes(bad)
        with refused(ValueError, path):
            pairs_of(sen2venus.read(tmp_path))


def test_sen2venus_tensors_that_numpy_has_not(tmp_path):
    images = layouts.sen2venus(tmp_path, ["ARM_14SPE_2018-01-01"])
    path = tmp_path / "ARM" / "ARM_14SPE_2018-01-01_05m_b2b3b4b8.pt"
    plain = torch.from_numpy(images[path.stem])
    for bad, found in (
        (plain.bfloat16(), "BFloat16"),
        (plain.to(torch.complex64), "complex64"),
        (plain > 0, "bool"),
        (plain.to_sparse(), "Sparse"),
        (plain.to("meta"), "meta"),
    ):
        torch.save(bad, path)
        with refused(ValueError, path, found):
            pairs_of(sen2venus.read(tmp_path))
    torch.save(plain.float().requires_grad_(), path)
    pair = pairs_of(sen2venus.read(tmp_path))[1]
    assert same(pair.hrs[0], images[path.stem][1].astype("float32"))


# RapidAI4EO


def test_rapidai4eo(tmp_path):
    images = layouts.rapidai4eo(tmp_path)
    listing = rapidai4eo.read(tmp_path, per_site=2)
    assert listing.bands == {"mr": BGRN, "hr": BGRN} and listing.chip == 60
    assert [source["licence"][:5] for source in listing.sources] == ["CC-BY", "Coper"]
    assert len(listing.units) == 3
    (unit,) = [unit for unit in listing.units if unit.name == "33N_15E-243N_02_04"]
    may, june = unit.open()
    assert may.site == june.site == "33N_15E-243N"
    assert same(may.mr, images["33N_15E-243N_02_04_2018-05_S2-SR"][[1, 2, 3, 7]])
    assert same(may.hrs[0], images["33N_15E-243N_02_04_2018-05-13_PF-SR"])
    assert same(june.hrs[0], images["33N_15E-243N_02_04_2018-06-17_PF-SR"])
    assert (may.mr.date, may.hrs[0].date) == ("2018-05-15", "2018-05-13")
    assert may.mr.info.bounds == may.hrs[0].info.bounds


def test_rapidai4eo_draws_months_by_seed(tmp_path):
    layouts.rapidai4eo(tmp_path, [f"33N_15E-243N_{k:02d}_00" for k in range(4)])

    def drawn(seed):
        return [pair.mr.date for pair in pairs_of(rapidai4eo.read(tmp_path, seed=seed))]

    assert drawn(0) == drawn(0) and len(drawn(0)) == 4
    assert len({tuple(drawn(seed)) for seed in range(9)}) > 1


def test_rapidai4eo_names_of_bands_go_before_their_number(tmp_path):
    images = layouts.rapidai4eo(tmp_path, ["33N_15E-243N_01_09"])
    names = ["B8", "B4", "B3", "B2", *(f"x{k}" for k in range(8))]
    for path in tmp_path.rglob("*_S2-SR.tif"):
        layouts.tif(path, images[path.stem], 10.0, band_names=names)
    pair = next(rapidai4eo.read(tmp_path).units[0].open())
    assert same(pair.mr, images[pair.mr.info.path.stem][[3, 2, 1, 0]])


def test_rapidai4eo_with_the_sensors_at_the_top(tmp_path):
    array = layouts.pixels(4, 200, 200), layouts.pixels(12, 60, 60)
    for name in ("33N_15E-243N_01_09", "33N_15E-243N_01_10"):
        layouts.tif(tmp_path / "PF" / name / "2018-05-13.tif", array[0], 3.0)
        layouts.tif(tmp_path / "S2" / name / "2018_05.tif", array[1], 10.0)
    layouts.tif(tmp_path / "PF" / "33N_15E-243N_01_11" / "2018-05-13.tif", array[0], 3.0)
    listing = rapidai4eo.read(tmp_path)
    assert [unit.name for unit in listing.units] == ["33N_15E-243N_01_09", "33N_15E-243N_01_10"]
    assert listing.skipped == [("33N_15E-243N_01_11", "no Sentinel-2 image")]


def test_listing_opens_no_file(tmp_path):
    """Names are listed although there is nothing in the files."""
    for k in range(200):
        folder = tmp_path / f"33N_15E-{k // 100:03d}N_{k % 100:02d}_00"
        for part in ("S2-SR/2018-05.tif", "S2-SR/2018-06.tif", "PF-SR/2018-05-13.tif"):
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            (folder / part).touch()
    listing = rapidai4eo.read(tmp_path)
    assert len(listing.units) == 200
    assert len(pickle.dumps(listing.units)) < 80_000
    with refused(ValueError, "2018-05.tif"):
        list(listing.units[0].open())


# WorldStrat


def test_worldstrat(tmp_path):
    images = layouts.worldstrat(tmp_path)
    listing = worldstrat.read(tmp_path)
    assert listing.bands == {"mr": BGRN, "hr": BGRN} and listing.chip == 64
    assert [source["licence"] for source in listing.sources] == ["CC-BY-NC-4.0", "CC-BY-4.0"]
    pairs = pairs_of(listing)
    aois = ["Amnesty POI-1-1-1", "Landcover-77", "UNHCR-SSD-1"]
    assert [(p.site, p.split) for p in pairs] == list(
        zip(aois, ("train", "val", "test"), strict=True)
    )
    for aoi, pair in zip(aois, pairs, strict=True):  # the third visit was nearest in date
        assert same(pair.mr, images[f"{aoi}-3-L2A_data"][[1, 2, 3, 7]])
        assert same(pair.hrs[0], images[f"{aoi}_rgbn"][[2, 1, 0, 3]])
        assert (pair.mr.date, pair.hrs[0].date) == ("2019-02-12", "2019-02-10")
        assert pair.mr.info.transform is None  # HR has none: edge to edge
    assert listing.skipped == [("Not-on-disk-1", "no rgbn image")]


def test_worldstrat_options(tmp_path):
    images = layouts.worldstrat(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    listing = worldstrat.read(tmp_path, level="L1C", hr="ps", per_site=2)
    first, second = listing.units[0].open()
    assert same(first.mr, images["Amnesty POI-1-1-1-1-L1C_data"][[1, 2, 3, 7]])
    assert same(second.mr, images["Amnesty POI-1-1-1-2-L1C_data"][[1, 2, 3, 7]])
    assert same(second.hrs[0], images["Amnesty POI-1-1-1_ps"][[2, 1, 0, 3]])
    assert first.mr.date == ""
    with refused(ValueError, "--level L3", "L2A", "L1C"):
        worldstrat.read(tmp_path, level="L3")


def test_worldstrat_tables_without_names_of_columns(tmp_path):
    layouts.worldstrat(tmp_path)
    lines = (tmp_path / "stratified_train_val_test_split.csv").read_text().splitlines()[1:]
    numbered = [",aoi,set", *(f"{k},{line}" for k, line in enumerate(lines))]
    (tmp_path / "stratified_train_val_test_split.csv").write_text("\n".join(numbered) + "\n")
    assert [p.split for p in pairs_of(worldstrat.read(tmp_path))] == [
        "train",
        "val",
        "test",
    ]
    (tmp_path / "stratified_train_val_test_split.csv").write_text("tile,split\nLandcover-77,dev\n")
    with refused(ValueError, "stratified_train_val_test_split.csv", "dev"):
        worldstrat.read(tmp_path)


THREE = "{0},train{1}\n{2},val{1}\n{3},test{1}\n"
AOIS = ("Amnesty POI-1-1-1", "Landcover-77", "UNHCR-SSD-1")


@pytest.mark.parametrize(
    "text",
    [
        "tile,split\n" + THREE.format(AOIS[0], ",,", *AOIS[1:]),
        "tile,split,,\n\n" + THREE.format(AOIS[0], "", *AOIS[1:]),
        THREE.format(AOIS[0], "", *AOIS[1:]),
        "\n" + THREE.format(AOIS[0], " ,", *AOIS[1:]),
        "0,{},train\n1,{},val\n2,{},test\n".format(*AOIS),
    ],
    ids=range(5),
)
def test_worldstrat_tables_that_are_ragged_or_headless(tmp_path, capsys, text):
    layouts.worldstrat(tmp_path)
    (tmp_path / "stratified_train_val_test_split.csv").write_text(text)
    pairs = pairs_of(worldstrat.read(tmp_path))
    assert [(p.site, p.split) for p in pairs] == list(
        zip(AOIS, ("train", "val", "test"), strict=True)
    )
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "text, dealt",
    [
        ("", 3),
        ("tile,split\n", 3),
        ("tile,split\nelsewhere,train\n", 3),
        ("tile;split\nLandcover-77;val\n", 3),
        ("tile,split\nLandcover-77,val\nUNHCR-SSD-1\n", 2),
        ("1,train\nLandcover-77,val\nUNHCR-SSD-1,\n", 2),
    ],
    ids=range(6),
)
def test_worldstrat_says_how_many_places_are_in_no_split(tmp_path, capsys, text, dealt):
    layouts.worldstrat(tmp_path)
    path = tmp_path / "stratified_train_val_test_split.csv"
    path.write_text(text)
    pairs = pairs_of(worldstrat.read(tmp_path))
    assert [p.split for p in pairs].count(None) == dealt
    said = capsys.readouterr().out
    assert str(path) in said and f"{dealt} of 3 " in said and said.count("\n") == 1
    path.unlink()
    worldstrat.read(tmp_path)
    said = capsys.readouterr().out
    assert path.name in said and "3 of 3 " in said


def test_worldstrat_tables_that_say_nonsense(tmp_path):
    layouts.worldstrat(tmp_path)
    path = tmp_path / "stratified_train_val_test_split.csv"
    for text, mention in (
        ("5,7\n6,8\n", "split 8"),
        ("tile,split\na,train\na,test\n", "a is in train and in test"),
        ("\udcff", ""),
    ):
        path.write_bytes(text.encode(errors="surrogateescape"))
        with refused(ValueError, path, mention):
            worldstrat.read(tmp_path)
    path.unlink()
    for n in ("²", "", "x", "1.5"):  # no numbers of visits, so no dates
        (tmp_path / "metadata.csv").write_text(
            f"tile,n,lowres_date,highres_date\nLandcover-77,{n},2019-01-01,2019-01-02,,\n", "utf-8"
        )
        assert {p.mr.date for p in pairs_of(worldstrat.read(tmp_path))} == {""}
    (tmp_path / "metadata.csv").write_text(
        "tile,n,lowres_date,highres_date\nLandcover-77,2,2019-01-01,2019-01-02,,\n"
    )
    assert [p.mr.date for p in pairs_of(worldstrat.read(tmp_path))] == [
        "",
        "2019-01-01",
        "",
    ]


# SEN2NAIP


@pytest.mark.parametrize("part", ["cross-sensor", "synthetic"])
def test_sen2naip(tmp_path, part):
    images = layouts.sen2naip(tmp_path, part)
    (tmp_path / part / "ROI_0002").mkdir()
    layouts.tif(tmp_path / part / "ROI_0002" / "lr.tif", layouts.pixels(4, 31, 31), 10.0)
    listing = sen2naip.read(tmp_path)
    assert listing.bands == {"mr": BGRN, "hr": BGRN} and listing.chip == 31
    assert [unit.name for unit in listing.units] == [f"{part}/ROI_0000", f"{part}/ROI_0001"]
    for name, pair in zip(("ROI_0000", "ROI_0001"), pairs_of(listing), strict=True):
        assert same(pair.mr, images[name][0][[2, 1, 0, 3]])
        assert same(pair.hrs[0], images[name][1][[2, 1, 0, 3]])
        assert pair.site == f"{part}/{name}"
        assert (pair.mr.info.gsd, pair.hrs[0].info.gsd) == (10, 2.5)
    ((name, reason),) = listing.skipped
    assert name.endswith("lr.tif") and reason == "no HR file for it"


def test_sen2naip_with_a_damaged_file(tmp_path):
    layouts.sen2naip(tmp_path)
    for k in range(2):
        path = tmp_path / "cross-sensor" / f"ROI_{k:04d}" / "lr.tif"
        whole = path.read_bytes()
        path.write_bytes(whole[:50])
        if k == 0:
            listing = sen2naip.read(tmp_path)
            assert listing.chip == 31 and len(listing.units) == 2
    with refused(ValueError, "ROI_0000/lr.tif"):
        sen2naip.read(tmp_path)


def test_sen2naip_bands(tmp_path):
    layouts.sen2naip(tmp_path)
    layouts.tif(tmp_path / "cross-sensor" / "ROI_0000" / "hr.tif", layouts.pixels(3, 124, 124), 2.5)
    with refused(ValueError, "ROI_0000/hr.tif", "3 bands", "--format"):
        pairs_of(sen2naip.read(tmp_path))
    (tmp_path / "v2").mkdir()
    (tmp_path / "v2" / "sen2naipv2-crosssensor.taco").touch()
    with refused(FileNotFoundError, ".taco"):
        sen2naip.read(tmp_path / "v2")


# HDF5


@pytest.mark.parametrize("name, hr", [("sen2venus.hdf5", "venus"), ("rapidai4eo_v1.h5", "planet")])
def test_hdf5_repacks(tmp_path, monkeypatch, name, hr):
    images = layouts.hdf5(tmp_path / name, hr)
    monkeypatch.setattr(hdf5, "SLICE_BYTES", 2**17)  # units of a few rows
    listing = hdf5.read(tmp_path)
    assert listing.chip == images["sentinel2"].shape[2] and len(listing.units) > 2
    assert listing.sources == (rapidai4eo if hr == "planet" else sen2venus).SOURCES
    pairs = pairs_of(listing)
    assert [pair.split for pair in pairs] == ["train"] * 3 + ["val", "train", "test"]
    for row, pair in zip((0, 1, 2, 3, 5, 6), pairs, strict=True):
        assert same(pair.mr, images["sentinel2"][row, :4])
        assert same(pair.hrs[0], images[hr][row])
        assert pair.mr.info.path.name == f"{name}#{row}"
        assert pair.site == ("33N_15E-243N" if hr == "planet" else None)
    assert listing.skipped == [(str(tmp_path / name), "1 rows in no split")]


def test_hdf5_of_other_names_and_fewer_bands(tmp_path):
    images = layouts.hdf5(tmp_path / "mine.h5", "aerial", splits=False)
    options = {"mr_dataset": "sentinel2", "hr_dataset": "aerial", "band_names": ["B", "G", "R"]}
    listing = hdf5.read(tmp_path / "mine.h5", **options)
    assert listing.bands["mr"] == ["B", "G", "R"] and listing.sources == ()
    pairs = pairs_of(listing)
    assert len(pairs) == 7 and pairs[0].split is None
    assert same(pairs[6].hrs[0], images["aerial"][6, :3])


def test_hdf5_splits_by_sample_id(tmp_path):
    layouts.hdf5(tmp_path / "rapidai4eo_v1.h5", "planet", splits=False)
    given = {"train": ["33N_15E-243N_02_09"], "valid": ["33N_15E-243N_00_09"]}
    (tmp_path / "other.json").write_text(json.dumps(given))
    pairs = pairs_of(hdf5.read(tmp_path, splits=tmp_path / "other.json"))
    assert [(p.split, p.mr.info.path.name[-1]) for p in pairs] == [("val", "0"), ("train", "2")]


def test_hdf5_splits_that_do_not_fit(tmp_path):
    path, splits = tmp_path / "sen2venus.hdf5", tmp_path / "splits_v1.json"
    layouts.hdf5(path)
    for given, mention in (
        ({"train": [0, 7]}, "holds 7"),
        ({"train": [-1]}, "holds -1"),
        ({"train": ["a"]}, "holds a"),
        ({"train": [0, True]}, "holds True"),
        ({"train": [1.0]}, "holds 1.0"),
        ({"train": [0], "test": [0]}, "0 is listed"),
        ({"dev": [0]}, "dev"),
        ([0, 1], "JSON"),
    ):
        splits.write_text(json.dumps(given))
        with refused(ValueError, splits, mention):
            hdf5.read(tmp_path)
    (tmp_path / "splits_v2.json").write_text("{}")
    with refused(ValueError, splits.name, "splits_v2.json", path.name):
        hdf5.read(tmp_path)


def test_hdf5_files_that_do_not_fit(tmp_path):
    path = tmp_path / "sen2venus.hdf5"
    images = layouts.hdf5(path)
    with refused(ValueError, path, "planet", "sentinel2", "venus", "--hr-dataset"):
        hdf5.read(path, hr_dataset="planet")
    with refused(ValueError, path, "venus", "(7, 4, 64, 64)", "5 bands"):
        hdf5.read(path, mr_dataset="venus", band_names=list("abcde"))
    with h5py.File(path, "w") as file:
        file["sentinel2"], file["venus"] = images["sentinel2"], images["venus"][:6]
    with refused(ValueError, path, "7 rows in sentinel2", "6 in venus"):
        hdf5.read(path)
    content = path.read_bytes()
    for bad in (b"", b"text", content[: len(content) // 2]):
        path.write_bytes(bad)
        with refused(ValueError, path):
            hdf5.read(path)
    with refused(FileNotFoundError, tmp_path / "none.h5"):
        hdf5.read(tmp_path / "none.h5")
    layouts.hdf5(tmp_path / "b.h5")
    with refused(FileNotFoundError, tmp_path, "2 found"):
        hdf5.read(tmp_path)


@pytest.mark.parametrize("dtype", [">i2", ">f4", ">u2", "<i4"])
def test_hdf5_of_another_byte_order(tmp_path, dtype):
    images = {name: layouts.pixels(4, 4, 64, 64).astype(dtype) for name in ("sentinel2", "venus")}
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for name, array in images.items():
            file[name] = array
    listing = hdf5.read(tmp_path)
    for row, pair in enumerate(pairs_of(listing)):
        assert pair.mr.info.dtype.isnative and pixels_of(pair.mr).dtype.isnative
        for source, name in ((pair.mr, "sentinel2"), (pair.hrs[0], "venus")):
            assert same(source, images[name][row].astype(np.dtype(dtype).newbyteorder("=")))
            torch.from_numpy(pixels_of(source))


@pytest.mark.parametrize("dtype", ["bool", "complex64", "S4"])
def test_hdf5_of_no_pixels(tmp_path, dtype):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["sentinel2"] = layouts.pixels(2, 4, 8, 8)
        file["venus"] = layouts.pixels(2, 4, 16, 16).astype(dtype)
    with refused(ValueError, "x.h5", "venus", "--hr-dataset"):
        hdf5.read(tmp_path)


def test_hdf5_damage_within_the_rows(tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        for name in ("sentinel2", "venus"):
            file.create_dataset(name, data=layouts.pixels(4, 4, 64, 64), compression="gzip")
    listing = hdf5.read(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)
    with refused(ValueError, path):
        pixels_of(pairs_of(listing)[0].mr)


# a folder that is something else


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("sen2venus", ["*_05m_b2b3b4b8.pt", "*_10m_b2b3b4b8.pt", ".tif"]),
        ("rapidai4eo", ["S2-SR/*_YYYY-MM.tif", "PF-SR/*_YYYY-MM-DD.tif"]),
        ("worldstrat", ["<AOI>_rgbn.tiff", "<AOI>-<n>-L2A_data.tiff", "lr_dataset"]),
        ("sen2naip", ["ROI_*/lr.tif", "hr.tif"]),
        ("hdf5", [".h5", ".hdf5"]),
    ],
)
def test_another_folder_is_told_what_was_looked_for(tmp_path, name, wanted):
    (tmp_path / "empty").mkdir()
    with refused(FileNotFoundError, tmp_path / "empty", *wanted):
        sets("PAIRS")[name](tmp_path / "empty")
    for k in range(7):
        (tmp_path / "empty" / f"{k}.7z").touch()
    with refused(FileNotFoundError, tmp_path / "empty", *wanted, "0.7z", "4.7z", "2 more"):
        sets("PAIRS")[name](tmp_path / "empty")
    with refused(FileNotFoundError, tmp_path / "nowhere"):
        sets("PAIRS")[name](tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["rapidai4eo", "worldstrat"])
@pytest.mark.parametrize("per_site", [0, -1])
def test_no_date_of_a_place(tmp_path, name, per_site):
    getattr(layouts, name)(tmp_path)
    with refused(ValueError, f"--per-site {per_site}"):
        sets("PAIRS")[name](tmp_path, per_site=per_site)


def test_every_published_set_says_whose_it_is():
    published = rapidai4eo, sen2naip, sen2venus, worldstrat
    assert {next(iter(module.PAIRS)) for module in published} == {*sets("PAIRS")} - {
        "hdf5",
        "geotiff",
    }
    for module in published:
        for source in module.SOURCES:
            assert {*source} == {"name", "licence", "attribution", "url"} and all(source.values())


def keys_of(listing):
    return [unit.key for unit in listing.units]


@pytest.mark.parametrize(
    "name, write, other",
    [
        ("rapidai4eo", layouts.rapidai4eo, {"per_site": 2}),
        ("worldstrat", layouts.worldstrat, {"level": "L1C"}),
        ("worldstrat", layouts.worldstrat, {"hr": "ps"}),
        ("worldstrat", layouts.worldstrat, {"per_site": 2}),
        ("sen2venus", layouts.sen2venus, {"product": "20m"}),
        ("sen2naip", layouts.sen2naip, None),
        ("hdf5", lambda root: layouts.hdf5(root / "sen2venus.hdf5"), {"band_names": ["B", "G"]}),
    ],
)
def test_the_key_of_a_unit_says_what_was_chosen(tmp_path, name, write, other):
    write(tmp_path)
    read = sets("PAIRS")[name]
    keys = keys_of(read(tmp_path))
    assert keys == keys_of(read(tmp_path)) and len({*keys}) == len(keys)
    assert all(len(key) == 16 for key in keys)
    if other:
        assert not {*keys} & {*keys_of(read(tmp_path, **other))}


def test_the_key_of_a_unit_says_its_split(tmp_path):
    layouts.worldstrat(tmp_path)
    keys = keys_of(worldstrat.read(tmp_path))
    path = tmp_path / "stratified_train_val_test_split.csv"
    path.write_text(path.read_text().replace("Landcover-77,val", "Landcover-77,test"))
    others = keys_of(worldstrat.read(tmp_path))
    assert [a == b for a, b in zip(keys, others, strict=True)] == [True, False, True]
    (tmp_path / "h").mkdir()
    layouts.hdf5(tmp_path / "h" / "x.hdf5", splits=False)
    keys = keys_of(hdf5.read(tmp_path / "h"))
    (tmp_path / "h" / "splits.json").write_text('{"train": [0, 1], "val": [2]}')
    assert keys != keys_of(hdf5.read(tmp_path / "h"))


# from a published folder to a store


@pytest.mark.parametrize(
    "name, write, options, chips, splits",
    [
        ("sen2venus", layouts.sen2venus, {"chip": 32}, 6, {"train": 3, "val": 3}),
        ("sen2venus", layouts.sen2venus_v2, {"chip": 32, "val": 0}, 2, {"train": 2}),
        ("rapidai4eo", layouts.rapidai4eo, {"val": 0.3}, 3, {"train": 2, "val": 1}),
        ("worldstrat", layouts.worldstrat, {"chip": 39}, 3, {"train": 1, "val": 1, "test": 1}),
        ("sen2naip", layouts.sen2naip, {"val": 0.5}, 2, {"train": 1, "val": 1}),
        ("hdf5", lambda root: layouts.hdf5(root / "sen2venus.hdf5"), {}, 6, None),
    ],
)
def test_a_store_holds_the_pixels(tmp_path, name, write, options, chips, splits):
    """Chips are whole MR images here, so the whole HR image is theirs, edge to edge."""
    write(tmp_path / "in")
    listing = sets("PAIRS")[name](tmp_path / "in")
    meta = pack.pack(listing, tmp_path / "store", **options)
    assert meta["count"] == {"mr": chips, "hr": chips}
    assert meta["splits"] == (splits or {"train": 4, "val": 1, "test": 1})
    assert meta["bands"] == listing.bands
    assert [source["url"] for source in meta["sources"]] == [s["url"] for s in listing.sources]
    sources = {pair.mr.info.path.as_posix(): pair for pair in pairs_of(listing)}
    store = data.Store(tmp_path / "store")
    for number, row in enumerate(data.read_csv(tmp_path / "store" / "index.csv")):
        pair, batch = sources[row["mr_source"]], store.batch([number])
        top, left, height, width = batch["hr_window"][0].tolist()
        side = store.meta["shape"]["mr"][1]
        window = int(row["row"]), int(row["col"]), side, side
        mr, _ = raster.masked(pair.mr.read(window, pair.mr.bands), None)
        assert np.array_equal(batch["mr"][0], mr)
        whole, found = pixels_of(pair.hrs[0]), batch["hr"][0].numpy()
        height, width = min(found.shape[1], whole.shape[1]), min(found.shape[2], whole.shape[2])
        assert np.array_equal(found[:, :height, :width], whole[:, :height, :width])
        assert (top, left) == (0, 0)
        assert row["mr_date"] == pair.mr.date and row["hr_date"] == pair.hrs[0].date
        assert pair.split in (None, row["split"])
    sites = {}
    for row in data.read_csv(tmp_path / "store" / "index.csv"):
        sites.setdefault(sources[row["mr_source"]].site, set()).add(row["split"])
    assert all(len(found) == 1 for site, found in sites.items() if site is not None)
