import copy

import numpy as np
import pytest
import torch
from stores import write_store
from torch.nn import functional as F

import bench
import textbook
from affinity import hr_index
from data import Store, read_crops, render
from model import IJEPA, MAE, OBJECTIVES, LatentMIM
from vit import Block, ViT

CPU = torch.device("cpu")


def build(name):
    """An objective whose predictor or decoder is wider than its encoder, in float64."""
    torch.manual_seed(0)
    shape = dict(in_channels=2, patch_size=2, dim=16, depth=2, heads=2)
    if name == "ijepa":
        objective = IJEPA(ViT(**shape), (8, 8), 24, 2, targets=3)
    elif name == "latentmim":
        encoder = ViT(**shape, class_token=True, pos="latentmim")
        objective = LatentMIM(encoder, (6, 6), 1, 9, 8, 24, 2, 2)
    else:
        objective = MAE(ViT(**shape), (6, 6), decoder_dim=24, decoder_depth=2, decoder_heads=2)
    return objective.double()


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_is_the_textbooks(name, paired):
    """The same losses, and weights and teachers after two steps. In float64, but for the losses
    themselves, which are float32: what is asked is a few of its roundings."""
    found, generator = {}, torch.Generator().manual_seed(0)
    objective = build(name)
    masks, side = objective.draw(3, generator), objective.hr_side(2)
    hr = torch.randn(3, 2, side, side, generator=generator, dtype=torch.float64)
    batch = F.avg_pool2d(hr, 2), masks, hr if paired else None
    start = copy.deepcopy(objective.state_dict())
    for form, kind in {"ours": bench.Ours, "plain": textbook.Textbook}.items():
        objective.load_state_dict(start)
        named = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for n, p in named if objective.decays(n, p) == yes], "weight_decay": wd}
            for yes, wd in ((True, 0.5), (False, 0.0))
        ]
        # Adam divides by a gradient's size: where that is rounding alone, eps keeps its weight
        stepper = kind(objective, groups, lr=1e-2, eps=1e-5)
        losses = [bench.exhaust(stepper.step(*batch, momentum=0.5)).item() for _ in range(2)]
        found[form] = losses, copy.deepcopy(objective.state_dict())
        if form == "plain":
            for ours, theirs in zip(*(t.parameters() for t in stepper.teachers), strict=True):
                assert ours.equal(theirs)
    assert found["ours"][0] == pytest.approx(found["plain"][0], rel=1e-5)
    assert found["ours"][0][0] != found["ours"][0][1]
    for key, value in found["plain"][1].items():
        torch.testing.assert_close(found["ours"][1][key], value, rtol=1e-5, atol=2e-5)
        if "embed.proj.weight" in key:
            assert (value - start[key]).abs().median() > 1e-4


def test_the_loop_finds_the_hr_tokens():
    index = torch.stack([torch.randperm(15)[:6] for _ in range(2)])
    for ratio in (1, 2, 3):
        assert textbook.hr_tokens(index, (3, 5), ratio).equal(hr_index(index, (3, 5), ratio))


def test_blocks_keep_less():
    blocks, x = torch.nn.Sequential(*(Block(64, 4) for _ in range(6))), torch.randn(8, 100, 64)

    def gradient():
        x.grad = None
        blocks(x.requires_grad_()).square().sum().backward()

    ours = bench.peak_memory(gradient, CPU)
    textbook.make_plain(blocks)
    assert ours < 0.85 * bench.peak_memory(gradient, CPU)


def test_plain_pairs_are_the_crops_of_whole_pixels(tmp_path):
    """Where a window has whole pixels and fills the chip both sides give one image."""
    store = Store(write_store(tmp_path / "pairs"))
    ids, crops = np.array([3, 5]), np.tile([0.0, 0.0, 1.0, 1.0], (2, 1))
    plain = textbook.plain_pairs(store, ids, crops, 12, [0, 1])
    for images, sensor, size in zip(plain, ("mr", "hr"), (12, 24), strict=True):
        ours = render(read_crops([store], np.column_stack([0 * ids, ids]), sensor, crops, size))
        torch.testing.assert_close(images, ours, rtol=1e-4, atol=1e-4)
