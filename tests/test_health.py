"""Figures of tokens and the log line: what tells whether training is healthy."""

import pytest
import torch
import torch.nn.functional as F

import health


def test_health_knows_collapse_from_variety():
    generator = torch.Generator().manual_seed(0)
    varied = torch.randn(8, 64, 32, generator=generator)
    flat = torch.ones(8, 64, 32) + 1e-4 * varied
    index = torch.arange(64).expand(8, -1)
    good = health.health(*health.token_sums(varied, index, 64, 2 * varied))
    bad = health.health(*health.token_sums(flat, index, 64, flat))
    assert good["rank"] > 28 and abs(good["cosine"]) < 0.01
    assert good["target_var"] == pytest.approx(4, rel=0.1)
    assert bad["rank"] < 1.1 and bad["cosine"] > 0.99 and bad["target_var"] < 1e-6
    unit = F.normalize(varied.flatten(0, 1).double(), dim=-1)
    assert good["cosine"] == pytest.approx(float((unit @ unit.mT).mean()))
    values = torch.linalg.svdvals(varied.flatten(0, 1).double())
    share = values / values.sum()
    assert good["rank"] == pytest.approx(float((-share * share.log()).sum().exp()))
    # sums over parts are the sums over the whole
    parts = [health.token_sums(v, index[: len(v)], 64, 2 * v) for v in varied.split(3)]
    joined = health.health(*[sum(values) for values in zip(*parts, strict=True)])
    assert joined == pytest.approx(good)


def test_collapse_is_called_out_in_words():
    names = "step loss ssl affinity place cosine target_var grad_norm lr momentum ms images_per_s"
    entry = dict.fromkeys(names.split(), 1)
    said = health.log_line(entry | {"rank": 1.2, "gb": None}, 10, 4000)
    assert "tokens have collapsed (effective rank 1.20)" in said and "1 h 7 min left" in said
    said = health.log_line(entry | {"rank": 20.0, "gb": 2.5}, 10, 40)
    assert "collapsed" not in said and "2.5 GB | 40 s left" in said


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_place_is_told_without_bias(share):
    """32 images of 20 tokens on 196 places, where the plain ratio says 0.39 for no place at all."""
    generator = torch.Generator().manual_seed(0)
    place = torch.randn(196, 24, generator=generator)
    found = []
    for _ in range(30):
        index = torch.rand(32, 196, generator=generator).argsort(1)[:, :20]
        content = torch.randn(32, 20, 24, generator=generator)
        tokens = share**0.5 * place[index] + (1 - share) ** 0.5 * content + 3.0
        found.append(health.health(*health.token_sums(tokens, index, 196, tokens))["place"])
    assert sum(found) / 30 == pytest.approx(share, abs=0.02)
