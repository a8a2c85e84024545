import base64
import json
import re

import matplotlib.axes
import numpy as np
import pytest
import torch
from matplotlib.image import imread

from figures import (
    CURVES,
    class_colours,
    composite,
    draw_curves,
    draw_gains,
    draw_overview,
    draw_panels,
    draw_scores,
    draw_tokens,
    optional,
    paint,
    similarity,
    token_colours,
    write_page,
)


def test_composite_puts_red_in_the_red_channel():
    images = torch.zeros(2, 4, 8, 8)
    images[:, 2, :, :4] = 5.0  # red in the left half
    picture = composite(images, ["B", "G", "R", "NIR"])
    assert picture.shape == (2, 8, 8, 3) and picture.min() >= 0 and picture.max() <= 1
    assert picture[:, :, :4, 0].eq(1).all() and picture[:, :, 4:].eq(0).all()
    assert picture[..., 1:].eq(0).all()


@pytest.mark.parametrize("bands", [["VV"], ["VV", "VH"], ["a", "b", "c", "d", "e"]])
def test_composite_of_any_bands(bands):
    picture = composite(torch.randn(1, len(bands), 5, 7), bands)
    assert picture.shape == (1, 5, 7, 3) and picture.isfinite().all()


def test_token_colours_tell_groups_apart_and_mean_one_thing_in_all_images():
    centres = 10 * torch.eye(4, 16)
    groups = torch.randint(0, 4, (3, 12), generator=torch.Generator().manual_seed(0))
    noise = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(1))
    colours = token_colours(centres[groups] + 0.1 * noise, (3, 4)).view(-1, 3)
    distance = torch.cdist(colours, colours)
    same = groups.view(-1, 1) == groups.view(1, -1)
    assert distance[same].max() < 0.5 * distance[~same].min()
    assert token_colours(torch.ones(1, 6, 8), (2, 3)).isfinite().all()


@pytest.mark.parametrize("hr", [torch.randn(2, 24, 8), None])
def test_draw_tokens_writes_one_picture(tmp_path, hr):
    path = tmp_path / "tokens.png"
    draw_tokens(
        path,
        {
            "HR": (torch.randn(2, 2, 16, 24), ["VV", "VH"]),
            "MR": (torch.randn(2, 4, 8, 12), ["B", "G", "R", "NIR"]),
        },
        {"student": (torch.randn(2, 6, 16), (2, 3)), "teacher": (hr, (4, 6))},
    )
    assert [p.name for p in tmp_path.iterdir()] == ["tokens.png"]
    picture = imread(path)
    assert np.ptp(picture) > 0.5 and (picture.shape[1] > 1.7 * picture.shape[0]) == (hr is not None)


def test_classes_have_the_colours_that_a_reader_expects_and_none_twice():
    blue, green, _, other, again = class_colours(["Water", "forest", "lake", "banana", "built-up"])
    assert blue[2] > max(blue[:2]) and green[1] > max(green[0], green[2])
    assert np.ptp(again) == 0  # grey
    names = [f"class {k}" for k in range(100)]
    assert len(set(class_colours(names))) == 100
    assert class_colours(names[:5]) == class_colours(names)[:5]  # whatever follows
    assert other == class_colours(["water", "lake", "banana"])[2]
    assert len(class_colours([f"class {k}" for k in range(255)])) == 255


def test_a_class_map_is_painted_and_white_where_no_class_is():
    picture = paint(np.uint8([[0, 1], [255, 2]]), [(1, 2, 3), (4, 5, 6)])
    assert picture.dtype == np.uint8
    assert picture.tolist() == [[[1, 2, 3], [4, 5, 6]], [[255] * 3, [255] * 3]]


def test_similarity_leaves_out_what_a_scene_shares():
    tokens = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
    near = similarity(tokens, 2, 3)
    assert near[2, 3].item() == pytest.approx(1, abs=1e-6) and near.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(similarity(tokens + 100, 2, 3), near, atol=1e-4, rtol=0)
    x = (tokens - tokens.flatten(0, 1).mean(0)).double()
    slow = [[float(x[i, j] @ x[2, 3] / x[i, j].norm() / x[2, 3].norm()) for j in range(5)]
            for i in range(4)]  # fmt: skip
    torch.testing.assert_close(near.double(), torch.tensor(slow).double(), atol=1e-5, rtol=0)
    tokens[0, 0] = float("nan")  # ground without data
    assert similarity(tokens, 2, 3).isnan().sum() == 1


def test_pictures_of_a_study(tmp_path):
    row = [np.random.default_rng(0).random((8, 8, 3)), np.zeros((4, 4))]
    columns = {"picture": [row[0]] * 2, "similarity": [row[1], None]}
    draw_panels(tmp_path / "a.png", columns, [(0.5, 0.5)] * 2, [("water", (0, 0, 255))])
    log = [{"step": s, **dict.fromkeys(CURVES, 0.5 * s)} for s in (1, 2, 3)]
    draw_curves(tmp_path / "b.png", {"mr": [log, log[:2]], "sa": [log]})
    draw_scores(tmp_path / "c.png", {"mr": {0: 0.3, 1: 0.4}, "sa": {0: 0.5}}, 0.2)
    draw_gains(tmp_path / "d.png", {"--x": {0.1: [0.3, 0.4], 1: [0.5]}}, {"mr": 0.3})
    draw_gains(tmp_path / "e.png", {}, {})
    assert sorted(p.stem for p in tmp_path.iterdir()) == ["a", "b", "c", "d"]
    for path in tmp_path.iterdir():
        assert np.ptp(imread(path)) > 0.5


def test_a_page_holds_tokens_whose_cosines_are_those_of_similarity(tmp_path):
    """Read as its script does: signed bytes, row by row, products over 127 squared. Rounding moves
    an entry by half a step of 1/127, so a cosine of D entries by sqrt(D) / 127 and a little."""
    tokens = torch.randn(5, 4, 16)
    picture = torch.rand(10, 8, 3)
    write_page(tmp_path / "page.html", {"HR": picture}, {"student": tokens})
    text = (tmp_path / "page.html").read_text()
    view, panel = json.loads(re.search(r"panels = (\[.*\]), bytes", text)[1])
    assert (view["title"], panel["title"]) == ("HR", "student") and panel["grid"] == [5, 4, 16]
    rgba = np.frombuffer(base64.b64decode(view["pixels"]), np.uint8).reshape(10, 8, 4)
    assert np.abs(rgba[..., :3] / 255 - picture.numpy()).max() < 0.003
    values = np.frombuffer(base64.b64decode(panel["tokens"]), np.int8).reshape(20, 16) / 127
    expected = similarity(tokens, 1, 2).flatten().numpy()
    assert np.abs(values @ values[6] - expected).max() < 1.1 * 16**0.5 / 127


def test_an_overview_holds_panels_maps_and_scores(tmp_path):
    maps, near = torch.rand(8, 8, 3).numpy(), torch.rand(4, 4).numpy()
    draw_overview(
        tmp_path / "o.png", "a title", {"MR": [maps] * 2, "student": [near] * 2},
        [(0.5, 0.5), (0.2, 0.8)], {"labels": [maps]}, [("field", (10, 20, 30))],
        {"mr": {0: 0.3}, "sa": {0: 0.4, 1: 0.5}}, 0.2,
    )  # fmt: skip
    assert imread(tmp_path / "o.png").shape[0] > 800


def test_tokens_without_place_get_a_panel_where_chips_are_many(tmp_path, monkeypatch):
    """Tokens that are place and little else: the title says so, and few chips show none."""
    titles = []
    title = matplotlib.axes.Axes.set_title

    def spy(self, text, **kwargs):
        titles.append(text)
        return title(self, text, **kwargs)

    monkeypatch.setattr(matplotlib.axes.Axes, "set_title", spy)
    for chips in (8, 2):
        tokens = 3 * torch.randn(1, 16, 6) + 0.3 * torch.randn(chips, 16, 6)
        draw_tokens(tmp_path / "t.png", {"MR": (torch.rand(chips, 1, 8, 8), ["P"])},
                    {"student": (tokens, (4, 4))})  # fmt: skip
        assert ["without" in text for text in titles] == [False, False, True][: 2 + (chips == 8)]
        if chips == 8:
            assert int(re.search(r"(\d+)%", titles[-1])[1]) > 90
        titles.clear()


def test_a_picture_that_fails_is_a_warning_and_no_more(tmp_path, capsys):
    for error in (MemoryError(), ModuleNotFoundError("no", name="matplotlib"), ValueError("x")):
        with optional(tmp_path / "a.png"):
            raise error
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all("warning: no a.png" in line for line in said)
    assert "without matplotlib" in said[1]
    with pytest.raises(KeyboardInterrupt), optional(tmp_path / "a.png"):
        raise KeyboardInterrupt
