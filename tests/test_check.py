"""What `data.py check` measures, against known shifts, slow loops and real pairs."""

import argparse
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from landscape import EAST, NORTH, landscape, write_scene
from stores import edit_store, pixels, rows_of, write_store

import data
from datasets.folder import read_geotiff
from imagery import check, pack, raster, scenes

NOISE = np.random.default_rng(1)


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """A picture takes longer than all else; the tests that look at one ask for it."""
    if "picture" not in request.fixturenames:
        monkeypatch.setattr(check, "draw", lambda *_: None)


@pytest.fixture
def picture():
    return "check.png"


def edit_index(store, change):
    edit_store(store, rows=change)


def edit_pixels(store, sensor, change):
    edit_store(store, **{sensor: change})


def sensed(gsd, row, col, side, spot):
    """The landscape from `spot` on, (row, col) metres further down and right, with noise."""
    transform = (gsd, 0, EAST + spot[0] + col, 0, -gsd, NORTH + spot[1] - row)
    return landscape(transform, side, side) + 50 * NOISE.standard_normal((2, side, side))


def on_mr_pixels(mr, hr, window):
    """What measure_shift takes of an MR chip, an HR chip, and where MR's ground lies in that."""
    return mr.float(), data.resample(hr, window, mr.shape[2:])


def shifted_pairs(shift, ratio, chips=6, side=64):
    """mr, hr, window: HR's content lies (shift, -shift / 2) MR pixels further."""
    gsd, margin = 10 / ratio, 3.25  # HR pixels before the MR chip's corner
    mr, hr = [], []
    for spot in NOISE.uniform(-3000, 3000, (chips, 2)):
        mr.append(sensed(10.0, 0, 0, side, spot))
        row, col = -margin * gsd - 10 * shift, -margin * gsd + 5 * shift
        hr.append(0.6 * sensed(gsd, row, col, round(ratio * side) + 8, spot) + 3000)
    window = torch.tensor([[margin, margin, ratio * side, ratio * side]]).expand(chips, 4).double()
    return torch.tensor(np.array(mr)), torch.tensor(np.array(hr)), window


# ---- shift


@pytest.mark.parametrize("ratio", [1, 2, 10 / 3])
@pytest.mark.parametrize("shift", [0, 0.1, 0.37, 0.5, 1.3, -1.7, 3.6])
def test_a_known_shift_is_recovered(shift, ratio):
    found, confidence = check.measure_shift(*on_mr_pixels(*shifted_pairs(shift, ratio)))
    wanted = torch.tensor([shift, -shift / 2])
    assert (found - wanted).abs().max() < 0.05 and (found - wanted).mean(0).abs().max() < 0.03
    assert confidence.min() > 0.9


def test_shifts_beyond_the_border_are_seen_still():
    found, _ = check.measure_shift(*on_mr_pixels(*shifted_pairs(6.2, 2)))
    assert (found - torch.tensor([6.2, -3.1])).abs().max() < 0.4


def test_shift_of_chips_that_are_not_square():
    mr, hr, window = shifted_pairs(0.5, 2)
    mr, window = mr[:, :, :, 4:-9], window + torch.tensor([0, 8, 0, -26.0])
    found, _ = check.measure_shift(*on_mr_pixels(mr, hr, window))
    assert (found - torch.tensor([0.5, -0.25])).abs().max() < 0.05


def test_scenes_lie_where_they_should():
    pictures = [scenes.scene(0, k, 64) for k in range(6)]
    hr, mr = (torch.tensor(np.array([p[i] for p in pictures]).astype("float32")) for i in (0, 1))
    window = torch.tensor([[0, 0, 128, 128.0]]).expand(6, 4).double()
    found, confidence = check.measure_shift(*on_mr_pixels(mr, hr, window))
    assert found.norm(dim=1).max() < 0.1 and confidence.min() > 0.6


@pytest.mark.parametrize("side", [16, 32, 64])
def test_chips_with_nothing_in_common_have_no_shift(side):
    generator = torch.Generator().manual_seed(side)
    for coarse in (side // 8, side // 3, side):
        mr, hr = (torch.randn(40, 3, coarse, coarse, generator=generator) for _ in range(2))
        mr = F.interpolate(mr, (side, side), mode="bicubic")
        hr = F.interpolate(hr, (2 * side, 2 * side), mode="bicubic")
        window = torch.tensor([[0, 0, 2.0 * side, 2 * side]]).expand(40, 4).double()
        assert check.measure_shift(*on_mr_pixels(mr, hr, window))[0].isnan().all()


@pytest.mark.parametrize("side", [1, 3, 7, 8])
def test_tiny_and_constant_chips_have_no_shift(side):
    for value in (0.0, 7.0):
        mr, hr = torch.full((2, 1, side, side), value), torch.rand(2, 1, 2 * side, 2 * side)
        window = torch.tensor([[0, 0, 2.0 * side, 2 * side]]).expand(2, 4).double()
        found, confidence = check.measure_shift(*on_mr_pixels(mr, hr, window))
        assert found.isnan().all() and confidence.isfinite().all()


# ---- other figures of a pair


def test_correlation_is_pearson(tmp_path):
    store = write_store(tmp_path / "store", chips=5, hr_bands=("G", "NIR"))
    edit_pixels(store, "hr", lambda hr: hr[::-1])  # so that the likeness is not near 1
    found = check.check(store)["correlation"]
    mr, hr = (torch.tensor(pixels(store, s).astype("float32")) for s in ("mr", "hr"))
    hr = F.interpolate(hr, (16, 16), mode="bicubic", antialias=True)
    for chip in range(5):
        for n, band in enumerate((1, 3)):
            pair = np.stack([mr[chip, band].flatten(), hr[chip, n].flatten()])
            assert found[chip, n] == pytest.approx(np.corrcoef(pair)[0, 1], abs=1e-5)
    assert rows_of(store, "check")[0]["correlation_NIR"] == f"{found[0, 1]:.5g}"


@pytest.mark.parametrize("hr_bands", [("NIR", "VV", "G"), ("VV", "NIR", "G", "VH")])
def test_bands_are_compared_by_name(tmp_path, hr_bands):
    found = [
        check.check(write_store(tmp_path / str(n), chips=5, size=32, hr_bands=hr_bands))
        for n, hr_bands in enumerate((hr_bands, ("NIR", "G")))
    ]
    assert found[0]["shared"] == found[1]["shared"] == ["NIR", "G"]
    assert found[0]["correlation"].min() > 0.8 and found[0]["correlation"].shape == (5, 2)
    assert np.nanmax(np.abs(found[0]["shift"])) < 0.1


def test_sensors_without_a_common_band(tmp_path, picture, capsys):
    """Nothing is said of their likeness, and doubles and leaks are found all the same."""
    hr_bands = ("B", "G", "R", "NIR")
    store = write_store(tmp_path / "store", chips=16, bands=("VV", "VH"), hr_bands=hr_bands)

    def double(array):
        array[3], array[7] = array[2], array[0]  # 7 is held out

    for sensor in ("mr", "hr"):
        edit_pixels(store, sensor, double)
    figures = check.check(store, max_shift=0.1, min_correlation=1)
    assert np.isnan(figures["shift"]).all() and figures["correlation"].shape == (16, 0)
    assert np.flatnonzero(figures["duplicate_of"] >= 0).tolist() == [3, 7]
    assert figures["leak"][0] == 7 and np.flatnonzero(data.Store(store).flagged).tolist() == [0]
    assert (figures["mr_flat"] == 0).all() and (figures["hr_saturated"] == 0).all()
    said = [line for line in capsys.readouterr().out.splitlines() if "in common" in line]
    assert len(said) == 1 and "VV,VH" in said[0] and "B,G,R,NIR" in said[0]
    row = rows_of(store, "check")[3]
    assert row["shift"] == "" and row["duplicate_of"] == "2"
    assert not [key for key in row if key.startswith("correlation")]
    assert (store / picture).is_file()


def test_constant_bands(tmp_path):
    store = write_store(tmp_path / "store", chips=4)

    def flatten(array):
        array[1, 2], array[2] = 77, 12000

    edit_pixels(store, "mr", flatten)
    figures = check.check(store, max_shift=0.1, min_correlation=0)
    assert figures["mr_flat"].tolist() == [0, 1, 4, 0] and not figures["hr_flat"].any()
    assert np.isnan(figures["correlation"]).sum(1).tolist() == [0, 1, 4, 0]
    row = rows_of(store, "check")[2]
    assert row["shift"] == row["correlation_B"] == "" and row["mr_flat"] == "4"
    assert 2 not in [int(row["chip"]) for row in rows_of(store, "flags")]


def test_saturation(tmp_path):
    store = write_store(tmp_path / "store", chips=6)

    def clip(hr):
        hr[3:] = np.minimum(hr[3:], 2500)  # not the highest value of the set: content
        hr[:3] = np.minimum(hr[:3], 2600)
        hr[3:, 1] = np.minimum(hr[3:, 1], 2000)
        hr[:, 1, 0, 0] = np.arange(6) + 3000

    edit_pixels(store, "hr", clip)

    def full(mr):
        mr[2, :, :4] = 65535

    edit_pixels(store, "mr", full)
    figures = check.check(store)
    hr = pixels(store, "hr")
    wanted = (hr[:, [0, 2, 3]] == 2600).mean((2, 3)).sum(1) / 4
    assert np.allclose(figures["hr_saturated"], wanted) and wanted[:3].all()
    assert figures["mr_saturated"].tolist() == [0, 0, 0.25, 0, 0, 0]


def test_a_natural_maximum_is_no_saturation():
    natural = check.highest(NOISE.normal(30, 5, (20, 1, 64, 64)).astype("uint8"))
    assert not check.saturated(natural, np.dtype("uint8")).any()
    rare = check.highest(NOISE.random((20, 1, 8, 8), np.float32))
    assert not check.saturated(rare, np.dtype("float32")).any()


def test_dates_and_valid_share(tmp_path, capsys):
    store = write_store(tmp_path / "store", chips=4)
    dates = {
        0: {"mr_date": "2020-03-01", "hr_date": "2020-02-28", "valid": 0.5},
        1: {"mr_date": "2020-03-01T10:30:00", "hr_date": "2020-03-11"},
        2: {"hr_date": "2020-03-11"},
    }
    edit_index(store, dates.get)
    figures = check.check(store)
    assert figures["days"].tolist()[:2] == [-2, 10] and np.isnan(figures["days"][2:]).all()
    out = capsys.readouterr().out
    assert "dates        days apart: median 6, 95th percentile 10" in out
    assert "nodata       12.50% of pixels, in 1 chips" in out
    assert [row["days"] for row in rows_of(store, "check")] == ["-2", "10", "", ""]


# ---- chips against each other


def test_duplicates_and_leaks_by_pixels(tmp_path, capsys):
    store = write_store(tmp_path / "store", chips=16)  # 7 and 15 are val

    def double(array):
        array[5], array[6], array[7] = array[2], array[2], array[3]

    for sensor in ("mr", "hr"):
        edit_pixels(store, sensor, double)

    def lend(hr):
        hr[9] = hr[15]  # an HR image that serves two MR images

    edit_pixels(store, "hr", lend)
    figures = check.check(store, max_shift=2)
    assert {i: d for i, d in enumerate(figures["duplicate_of"]) if d >= 0} == {5: 2, 6: 2, 7: 3}
    assert {i: d for i, d in enumerate(figures["leak"]) if d >= 0} == {3: 7, 9: 15}
    flags = {row["chip"]: row["reason"] for row in rows_of(store, "flags")}
    assert flags == {"3": "same pixels as val chip 7", "9": "same pixels as val chip 15"}
    out = capsys.readouterr().out
    assert "duplicates   2 within a split, 1 across" in out
    assert "leaks        2 train chips have the same pixels as val chips" in out
    assert "2 of 16 chips flagged (0 shifted, 0 unlike, 2 leaking)" in out
    assert rows_of(store, "check")[7]["duplicate_of"] == "3"


def place(split, row, col, path="a"):
    return {"split": split, "row": row, "col": col, "mr_source": path}


def test_leaks_by_ground(tmp_path, capsys):
    store = write_store(tmp_path / "store", chips=6, size=16)
    edit_index(
        store,
        {
            0: place("val", 16, 16),
            1: place("train", 0, 0),  # touches a corner
            2: place("train", 1, 31),  # one pixel
            3: place("train", 16, 32),
            4: place("test", 31, 16),
            5: place("train", 16, 16, path="b"),
        }.get,
    )
    figures = check.check(store)
    assert figures["leak"].tolist() == [4, -1, 0, -1, -1, -1]
    assert figures["leak_by"].tolist() == ["ground", "", "ground", "", "", ""]
    out = capsys.readouterr().out
    assert "1 val chips have ground of test chips" in out
    assert "1 train chips have ground of val chips" in out
    assert not (store / "flags.csv").exists()
    check.check(store, min_correlation=-1)
    assert [[*row.values()] for row in rows_of(store, "flags")] == [
        ["2", "same ground as val chip 0"]  # and not chip 0: what is held out stays
    ]


def test_leaks_by_ground_are_a_loop():
    count, rng = 300, np.random.default_rng(0)
    figures = {
        "split": rng.choice(3, count, p=[0.7, 0.2, 0.1]),
        "source": rng.integers(0, 3, count),
        "row": rng.integers(0, 160, count),
        "col": rng.integers(0, 160, count),
        "sources": ["a", "b", ""],
        "mr_digest": np.stack([np.arange(count)] * 2, 1) + 1,
        "transform": np.full((count, 6), np.nan),
        "crs": np.zeros(count, int),
        "crs_names": [""],
    }
    leak, _ = check.find_leaks(figures, (10, 14))
    split, source, row, col, *_ = figures.values()
    for i in range(count):
        others = [
            j
            for j in range(count)
            if source[i] == source[j] < 2
            and abs(row[i] - row[j]) < 10
            and abs(col[i] - col[j]) < 14
            and split[j] > split[i]
        ]
        assert (leak[i] in others) if others else leak[i] == -1


@pytest.mark.parametrize("turn", [0, 30])
def test_ground_of_georeferenced_chips(tmp_path, capsys, turn):
    """By what the store says of its chips: files may be elsewhere, and lie in several parts."""
    store = write_store(tmp_path / "store", chips=6, size=16)
    cos, sin = 10 * np.cos(np.radians(turn)), 10 * np.sin(np.radians(turn))
    grid = {"a": cos, "b": sin, "d": sin, "e": -cos}
    # along the rows of the grid, in its pixels: one pixel into the first chip, beside it, ...
    for chip, (right, down, crs) in enumerate(
        [(0, 0, "x"), (16, 0, "x"), (15, 15, "x"), (0, 0, "y"), (0, 16, "x"), (0, -16, "x")]
    ):
        corner = {"c": 5e5 + cos * right + sin * down, "f": 4e6 + sin * right - cos * down}
        where = place("train" if chip else "val", 0, 0, path=f"{chip}.SAFE") | grid | corner
        edit_index(store, lambda i, c=chip, w=where, n=crs: w | {"crs": n} if i == c else None)
    assert check.check(store)["leak"].tolist() == [-1, -1, 0, -1, -1, -1]
    assert "compared within the projection alone: x and EPSG:4326" in capsys.readouterr().out
    edit_index(store, lambda i: dict.fromkeys(("crs", *"abcdef"), ""))
    assert (check.check(store)["leak"] == -1).all()  # by source, and each has its own


def test_ground_in_several_projections(tmp_path):
    """Chips of another zone, turned by 4 degrees, and of another datum's name."""
    store = write_store(tmp_path / "store", chips=6, size=16)
    corner = {"EPSG:32614": (3e5, 5e6), "EPSG:26914": (3e5, 5e6)}
    corner["EPSG:32613"] = [v[0] for v in raster.project("EPSG:32614", "EPSG:32613", [3e5], [5e6])]

    def rows(chip):
        crs, right, down = [
            ("EPSG:32614", 0, 0),  # held out
            ("EPSG:26914", 16, 0),  # beside it
            ("EPSG:26914", 15, 15),  # a pixel of it
            ("EPSG:32613", 0, -1),  # turned about a corner
            ("EPSG:32613", 15, -18),  # beyond an edge, though not beyond the box around it
            ("EPSG:32614", 16, 0),
        ][chip]
        x, y = corner[crs]
        grid = {"a": 10, "b": 0, "c": x + 10 * right, "d": 0, "e": -10, "f": y - 10 * down}
        return place("train" if chip else "val", 0, 0, path=f"{chip}.tif") | grid | {"crs": crs}

    edit_index(store, rows)
    assert check.check(store)["leak"].tolist() == [-1, -1, 0, 0, -1, -1]


def test_packed_chips_know_their_ground(tmp_path):
    """Dates of one place, packed as they should not be: leaks are seen from any folder."""
    for name, side in (("2019", 64), ("2020", 32)):
        write_scene(tmp_path / "mr" / f"{name}.tif", 10.0, (0, 0), side, side)
        write_scene(tmp_path / "hr" / f"{name}.tif", 5.0, (0, 0), 2 * side, 2 * side)
    pack.pack(read_geotiff(tmp_path / "mr", tmp_path / "hr"), tmp_path / "store", chip=16, val=0)
    rows = rows_of(tmp_path / "store")
    assert {row["crs"] for row in rows} == {"EPSG:32631"}
    for row in rows:
        a, b, c, d, e, f = (float(row[key]) for key in "abcdef")
        assert (a, b, d, e) == (10, 0, 0, -10)
        assert (c - EAST, NORTH - f) == (10 * int(row["col"]), 10 * int(row["row"]))
    first = next(n for n, row in enumerate(rows) if "2020" in row["mr_source"])
    edit_index(tmp_path / "store", lambda i: {"split": "val" if i == first else "train"})
    shutil.rmtree(tmp_path / "mr")
    leak = check.check(tmp_path / "store")["leak"]
    twins = [
        n
        for n, row in enumerate(rows)
        if (row["row"], row["col"]) == (rows[first]["row"], rows[first]["col"]) and n != first
    ]
    assert np.flatnonzero(leak >= 0).tolist() == twins


# ---- stores of every kind, and what is written


def test_shift_of_a_store_and_flags(tmp_path, capsys):
    pairs = [0, 3, 4, 7]
    store = write_store(tmp_path / "store", chips=8, size=64, pairs=pairs, bands=("G", "R"))
    (store / "flags.csv").write_text("chip,reason\n1,by hand\n")
    amounts = {0: 0.0, 3: 0.4, 4: 1.3, 7: -2.2}
    hr = np.empty((4, 2, 136, 136), "uint16")
    mr = pixels(store, "mr")
    for chip, amount in amounts.items():
        one, two, window = shifted_pairs(amount, 2, chips=1)
        mr[chip], hr[pairs.index(chip)] = one[0], two[0]
    fields = dict(zip(data.WINDOW, window[0].tolist(), strict=True))
    rows = lambda i: fields if i in pairs else None  # noqa: E731
    edit_store(store, rows=rows, mr=lambda _: mr, hr=lambda _: hr)

    found = check.check(store)["shift"]
    for chip in range(8):
        wanted = np.array([1, -0.5]) * amounts.get(chip, np.nan)
        assert np.allclose(found[chip], wanted, atol=0.05, equal_nan=True)
    assert data.Store(store).flagged.nonzero()[0].tolist() == [1]  # nobody asked for others
    out = capsys.readouterr().out
    assert "8 chips (7 train, 1 val, 0 test), 4 pairs" in out and "largest: chip 7 (2.4" in out

    check.check(store, max_shift=1, out=tmp_path / "there")
    assert data.Store(store).flagged.nonzero()[0].tolist() == [4, 7]
    reasons = [row["reason"] for row in rows_of(store, "flags")]
    assert reasons[1].startswith("shifted by 2.4") and reasons[1].endswith(" MR pixels")
    assert (
        "replaced" in (out := capsys.readouterr().out) and "(2 shifted, 0 unlike, 0 leaking)" in out
    )
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == ["check.csv"]
    check.check(store, min_correlation=0.999)
    reasons = {row["chip"]: row["reason"] for row in rows_of(store, "flags")}
    assert reasons["4"].startswith("band correlation 0.") and "0" not in reasons


def test_a_store_without_pairs(tmp_path, capsys):
    store = write_store(tmp_path / "store", chips=5, pairs=[])
    figures = check.check(store, max_shift=1)
    assert "hr_flat" not in figures and not data.Store(store).flagged.any()
    assert "5 chips (5 train, 0 val, 0 test), 0 pairs" in capsys.readouterr().out
    assert rows_of(store, "check")[4]["mr_saturated"] == "0"
    meta = data.read_meta(store)
    none = {key: meta[key] | {"hr": None} for key in ("bands", "mean", "std", "gsd")}
    edit_store(store, none)
    assert np.isnan(check.check(store)["shift"]).all()


def test_batches_do_not_matter_and_files_repeat(tmp_path, monkeypatch):
    store = write_store(tmp_path / "store", chips=11, size=24, pairs=[9, 2, 3, 10])
    check.check(store)
    whole = (store / "check.csv").read_bytes()
    monkeypatch.setattr(check, "BATCH_BYTES", 2 * (24 * 24 * 4 * 2 * 5))
    check.check(store)
    assert (store / "check.csv").read_bytes() == whole


@pytest.mark.parametrize("pairs", [[], [2, 0]])
def test_the_picture(tmp_path, picture, pairs, capsys):
    store = write_store(tmp_path / "store", chips=3, size=32, pairs=pairs)
    there = {path.name for path in store.iterdir()}
    check.check(store)
    assert (store / picture).read_bytes()[:4] == b"\x89PNG"
    assert {path.name for path in store.iterdir()} - there == {"check.csv", picture}
    assert ("no pair, so check.png has no shifts" in capsys.readouterr().out) == (not pairs)


def test_a_picture_that_fails_is_a_warning(tmp_path, monkeypatch, capsys):
    store = write_store(tmp_path / "store", chips=2)
    (store / "check.png").write_text("of other figures")
    monkeypatch.setattr(check, "draw", lambda *_: 1 / 0)
    check.check(store)
    out = capsys.readouterr().out
    assert "warning: no check.png: ZeroDivisionError" in out and "and" not in out.splitlines()[-1]
    assert (store / "check.csv").is_file() and not (store / "check.png").exists()


# ---- messages


def run(*flags):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    check.add_flags(parser)
    return check.check(**vars(parser.parse_args([str(flag) for flag in flags])))


def test_flags_that_make_no_sense(tmp_path):
    store = write_store(tmp_path / "store", chips=2)
    for value in (0, -1, 8, "nan"):
        with refused(ValueError, "--max-shift", "0", "8"):
            run(store, "--max-shift", value)
    with refused(ValueError, "--min-correlation 1.5", "-1", "1"):
        run(store, "--min-correlation", 1.5)
    assert run(store, "--out", tmp_path / "deep/er")["leak"].tolist() == [-1, -1]


def test_neither_store_nor_folder(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with refused(FileNotFoundError, f"{path}: ", "meta.json", "mr", "hr"):
            run(path)


def test_folders_need_out_and_take_no_flags(tmp_path):
    for sensor in ("mr", "hr"):
        (tmp_path / sensor).mkdir()
    with refused(ValueError, tmp_path, "--out"):
        run(tmp_path)
    with refused(ValueError, "--out", "--max-shift", "--min-correlation"):
        run(tmp_path, "--out", tmp_path / "out", "--max-shift", 1)


def test_out_that_is_a_file(tmp_path):
    store = write_store(tmp_path / "store", chips=2)
    (tmp_path / "out").write_text("")
    with refused(FileExistsError, tmp_path / "out"):
        run(store, "--out", tmp_path / "out")


def test_a_date_that_is_none(tmp_path):
    store = write_store(tmp_path / "store", chips=2)
    edit_index(store, lambda i: {"mr_date": "May", "hr_date": "2020-01-01"})
    with refused(ValueError, f"{store / 'index.csv'}: ", "May"):
        run(store)


# ---- real imagery


def test_real_pairs_have_their_known_shift(real):
    with np.load(real("homonim_ngi_s2_l8/pairs_x2_rgb_uint8.npz"), allow_pickle=False) as file:
        mr, hr = file["mr"], file["hr"]
    window = torch.tensor([[0, 0, 128.0, 128]]).expand(len(mr), 4).double()
    found, _ = check.measure_shift(*on_mr_pixels(torch.tensor(mr), torch.tensor(hr), window))
    length = found.norm(dim=1)
    assert found.isfinite().all(1).sum() >= 165
    found, mr, hr, length = (x[length.isfinite().numpy()] for x in (found, mr, hr, length))
    assert 0.5 < length.median() < 0.75 and 0.9 < length.quantile(0.95) < 1.2

    # the best of all shifts by whole HR pixels, half an MR pixel, by correlation
    def alike(a, b):
        a, b = (x.reshape(*x.shape[:2], -1) - x.mean((2, 3))[..., None] for x in (a, b))
        return ((a * b).sum(2) / np.sqrt((a * a).sum(2) * (b * b).sum(2))).mean(1)

    some = slice(None, None, 5)
    tries = [(row, col) for row in range(-4, 5) for col in range(-4, 5)]
    best = []
    for row, col in tries:
        moved = hr[some, :, 8 + row : 120 + row, 8 + col : 120 + col].astype("float64")
        moved = moved.reshape(-1, 3, 56, 2, 56, 2).mean((3, 5))
        best.append(alike(mr[some, :, 4:60, 4:60].astype("float64"), moved))
    wanted = np.array(tries)[np.argmax(best, 0)] / 2
    apart = np.abs(found[some].numpy() - wanted)
    assert np.median(apart) < 0.25 and (apart <= 0.5).mean() > 0.9


def test_real_files_have_their_known_shift(real, tmp_path, capsys):
    """The pairs as GeoTIFFs, packed for the while: grids with an offset, holes, four HR files."""
    source = real("homonim_ngi_s2_l8/mr/sentinel2_b432_byte.tif").parent.parent
    (tmp_path / "mr").mkdir()
    shutil.copy(source / "mr/sentinel2_b432_byte.tif", tmp_path / "mr")
    shutil.copytree(source / "hr_ngi_5m_rgb", tmp_path / "hr")
    out = tmp_path / "out"
    figures = run(tmp_path, "--out", out)
    length = np.hypot(*figures["shift"].T)
    assert np.isfinite(length).mean() > 0.9 and len(length) > 100
    assert 0.5 < np.nanmedian(length) < 0.75 and 0.9 < np.nanquantile(length, 0.95) < 1.2
    assert (length > 1.5).sum() <= 2 and (figures["valid"] < 1).any()  # shadows that wandered
    assert {p.name for p in out.iterdir()} == {"check.csv", "contact.png", "skipped.csv"}
    assert f"look at {out / 'contact.png'}" in (text := capsys.readouterr().out)
    assert re.search(r"MR pixels; median \+0\.(49|5\d) rows", text) and "largest: chip" in text
