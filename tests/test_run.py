"""What scripts share: health figures, log lines, a run's folder, errors said once."""

import sys

import pytest
import torch
import torch.nn.functional as F

import run
from run import Ranks

# ---- health


def test_health_knows_collapse_from_variety():
    generator = torch.Generator().manual_seed(0)
    varied = torch.randn(8, 64, 32, generator=generator)
    flat = torch.ones(8, 64, 32) + 1e-4 * varied
    index = torch.arange(64).expand(8, -1)
    good = run.health(*run.token_sums(varied, index, 64, 2 * varied))
    bad = run.health(*run.token_sums(flat, index, 64, flat))
    assert good["rank"] > 28 and abs(good["cosine"]) < 0.01
    assert good["target_var"] == pytest.approx(4, rel=0.1)
    assert bad["rank"] < 1.1 and bad["cosine"] > 0.99 and bad["target_var"] < 1e-6
    unit = F.normalize(varied.flatten(0, 1).double(), dim=-1)
    assert good["cosine"] == pytest.approx(float((unit @ unit.mT).mean()))
    values = torch.linalg.svdvals(varied.flatten(0, 1).double())
    share = values / values.sum()
    assert good["rank"] == pytest.approx(float((-share * share.log()).sum().exp()))
    # sums over parts are the sums over the whole
    parts = [run.token_sums(v, index[: len(v)], 64, 2 * v) for v in varied.split(3)]
    joined = run.health(*[sum(values) for values in zip(*parts, strict=True)])
    assert joined == pytest.approx(good)


def test_collapse_is_called_out_in_words():
    names = "step loss ssl affinity place cosine target_var grad_norm lr momentum ms images_per_s"
    entry = dict.fromkeys(names.split(), 1)
    said = run.log_line(entry | {"rank": 1.2, "gb": None}, 10, 4000)
    assert "tokens have collapsed (effective rank 1.20)" in said and "1 h 7 min left" in said
    said = run.log_line(entry | {"rank": 20.0, "gb": 2.5}, 10, 40)
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
        found.append(run.health(*run.token_sums(tokens, index, 196, tokens))["place"])
    assert sum(found) / 30 == pytest.approx(share, abs=0.02)


def test_only_the_first_rank_prints(capsys):
    for rank in (0, 1):
        ranks = Ranks(rank, 1, torch.device("cpu"))
        with pytest.raises(ValueError), ranks.quiet():
            print("out", rank)
            print("err", rank, file=sys.stderr)
            raise ValueError("told by whoever catches it")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("out 0\n", "err 0\n")
    print("again")
    assert capsys.readouterr().out == "again\n"


def test_alone_a_rank_shares_with_nobody():
    ranks, x = Ranks(0, 1, torch.device("cpu")), torch.ones(2)
    assert ranks.gather("x") == ["x"] and ranks.share(x, 0) is x and ranks.sum([x])[0] is x
