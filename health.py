"""What tells whether training is healthy: figures of tokens, and a log line for a reader.

Sums over tokens add up over micro-batches and ranks (`token_sums`), so that any number of ranks
logs the same figures (`health`).
"""

import json

import torch


@torch.no_grad()
def token_sums(tokens, index, places, target):
    """Sums over student tokens (B, K, D) at index (B, K) of a grid of `places` tokens, and target
    tokens (B, ..., D'): a list of tensors that add up over micro-batches and ranks, for `health`.
    """
    x, y = tokens.flatten(0, -2).double(), target.flatten(0, -2).double()
    unit, place = torch.nn.functional.normalize(x, dim=-1), index.flatten()
    here = x.new_zeros(places, x.shape[1]).index_add_(0, place, x)
    count = x.new_zeros(places).index_add_(0, place, torch.ones_like(x[:, 0]))
    # the targets' count is a number that the shape tells
    return [x.mT @ x, unit.sum(0), here, count, y.sum(0), y.square().sum(0), len(y) + 0 * y.sum()]


def health(second_moment, unit_sum, here, count, target_sum, target_square, targets):
    """What tells whether training is healthy, from `token_sums`.

    rank: exp of the entropy of the tokens' normalised singular values (effective rank; RankMe,
    arXiv 2210.02885), 1 to D. place: share of the tokens' variance that their place in the grid
    explains, estimated without bias from the sums of squares between and within places; tokens
    that are mostly place say little of the ground. cosine: mean cosine between any two student
    tokens. target_var: variance of the targets over tokens, averaged over D.
    """
    values = torch.linalg.eigvalsh(second_moment).clamp_min(0).sqrt()
    share = values / values.sum().clamp_min(1e-300)
    n, seen = count.sum(), int((count > 0).sum())
    mean = here.sum(0).square().sum() / n
    between_places = (here.square().sum(1) / count.clamp_min(1)).sum() - mean
    total = second_moment.trace() - mean
    within = (total - between_places) / max(float(n) - seen, 1)  # mean square
    place = (between_places - (seen - 1) * within) / (total + within).clamp_min(1e-300)
    variance = (target_square / targets - (target_sum / targets).square()).mean()
    return {
        "rank": float(torch.special.entr(share).sum().exp()),
        "place": float(place),
        "cosine": float((unit_sum / n).square().sum()),
        "target_var": float(variance),
    }


# ---- log lines


def read_log(run):
    """The entries of a run's log, dicts. run: its folder."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def duration(seconds):
    """Seconds as a reader says them: 40 s, 12 min, 1 h 12 min."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def log_line(entry, total, seconds_left):
    """A log entry for a reader, and a sentence where training has collapsed."""
    aside = {"vicreg": "vic {:.4f}", "probe_miou": "probe {:.4f}", "gb": "{:.1f} GB"}
    told = {key: text.format(entry[key]) for key, text in aside.items() if entry.get(key)}
    parts = f"ssl {entry['ssl']:.4f} aff {entry['affinity']:.4f} {told.pop('vicreg', '')}".strip()
    line = " | ".join([
        f"step {entry['step']:05d}/{total}",
        f"loss {entry['loss']:.4f} ({parts})",
        f"rank {entry['rank']:.1f}",
        f"place {100 * entry['place']:.0f} %",
        f"cos {entry['cosine']:.2f}",
        f"var {entry['target_var']:.2f}",
        f"grad {entry['grad_norm']:.2f}",
        f"lr {entry['lr']:.1e}",
        f"ema {entry['momentum']:.4f}",
        f"{entry['ms']:.0f} ms",
        f"{entry['images_per_s']:,.0f} img/s",
        *told.values(),
        f"{duration(seconds_left)} left",
    ])  # fmt: skip
    if entry["rank"] < 2:
        line += (
            f"\nWARNING: the student's tokens have collapsed (effective rank {entry['rank']:.2f}): "
            f"they all say the same. Start again with a lower --lr, or a higher --vicreg."
        )
    return line
