import numpy as np
import pytest
import torch
from matplotlib.image import imread

from figures import composite, draw_tokens, token_colours


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
