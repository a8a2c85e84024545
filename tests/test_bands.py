import pytest

from imagery.bands import is_sentinel, meanings, positions


@pytest.mark.parametrize("names", [
    "B G R NIR", "Blue Green Red NIR", "BLUE green Red nir", "B02 B03 B04 B08", "b2 B3 b4 B8",
    "b g r n", "B G R Near_Infrared", "B G R near-infrared",
])  # fmt: skip
def test_every_spelling_is_one_band(names):
    names = names.split()
    assert meanings(names) == ["B", "G", "R", "NIR"]
    assert positions(["R", "NIR"], names) == [2, 3]
    assert positions(["Red", "blue", "B03"], names) == [2, 0, 1]


@pytest.mark.parametrize("names, told", [
    ("B2", False), ("B2 B3 B4", True), ("B2 B3 B4 B5", False), ("B1 B2 B3 B4 B8", False),
    ("B2 B8A", True), ("B5 B02", True), ("VV VH", False), ("", False), ("B10 B11 B2", False),
])  # fmt: skip
def test_a_bare_number_is_sentinels_only_where_the_names_tell(names, told):
    names = names.split()
    assert is_sentinel(names) == told
    meant = dict(zip(names, meanings(names), strict=True))
    assert meant.get("B2", "B") == ("B" if told or "B2" not in names else "b2")
    assert meanings(["B2", "VV"], sentinel=True) == ["B", "vv"]


def test_positions_by_number_name_and_meaning():
    landsat = ["B2", "B3", "B4", "B5"]
    assert positions(["3", "b2", "B02", "B", "9"], landsat) == [3, 0, -1, -1, 9]
    assert positions(["B2", "B5", "B8A", "b04"], ["B04", "B02", "B8A", "B05"]) == [1, 3, 2, 0]
    assert positions(["B2"], ["B", "G"], sentinel=True) == [0]
    assert positions(["B2"], ["B", "G"]) == [-1]
    assert positions(["B2"], ["B04", "B02"]) == [1]  # the file's names say whose B2 is meant
    # of two that mean the same the first, but a name as it is comes before
    assert positions(["B", "Blue", "B02"], ["B02", "Blue"]) == [0, 1, 0]
