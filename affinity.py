"""Spatial affinity: the student's tokens relate to each other as an HR teacher's do.

The loss of Cross-Scale Pretraining (arXiv 2601.12964), in the order in which it is computed: which
HR tokens lie on an MR token's ground (`hr_index`), one token per MR token from them (`pool_to_mr`),
and the squared difference of the two Gram matrices (`gram_loss`). `SpatialAffinity` joins them for
any student and teacher; nothing here knows how either is trained.

B images, K tokens that the student sees, D their width, r = ratio HR tokens per MR token side.
"""

import torch
import torch.nn.functional as F


def hr_index(index, grid, ratio):
    """The HR tokens that cover each MR token.

    index: (B, K) int64, row-major MR token ids. grid: (rows, cols) of the MR tokens. ratio: int >=
    1. Returns (B, K * ratio**2) int64, ids in the (ratio * rows, ratio * cols) grid; the ratio**2
    of one MR token are contiguous and row-major: (ratio row + i, ratio col + j).
    Source: arXiv 2601.12964, spatial affinity. Published code loops with a device sync per token.
    """
    row, col = index // grid[1], index % grid[1]
    step = torch.arange(ratio, device=index.device)
    rows = (ratio * row[..., None] + step)[..., :, None]  # (B, K, r, 1)
    cols = (ratio * col[..., None] + step)[..., None, :]  # (B, K, 1, r)
    return (rows * (ratio * grid[1]) + cols).flatten(1)


def pool_to_mr(tokens, ratio):
    """Average the ratio**2 HR tokens of each MR token.

    tokens: (B, K * ratio**2, D), the tokens of one MR token contiguous. ratio: int >= 1.
    Returns (B, K, D), dtype of tokens. Raises ValueError if the token count does not divide.
    Source: arXiv 2601.12964, spatial affinity. A plain mean: resizing bilinearly to one token, as
    published code does, drops the outer tokens for ratio > 2.
    """
    if tokens.shape[1] % ratio**2:
        raise ValueError(f"{tokens.shape[1]} HR tokens are no multiple of ratio**2 = {ratio**2}")
    return tokens.unflatten(1, (-1, ratio**2)).mean(2)


def unit(tokens):
    """Tokens (..., D) over their L2 norm. A token of zero norm has no direction: it stays zero and
    gets zero gradient, where F.normalize would give 1e12 times the incoming one."""
    norm = tokens.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, tokens / norm.clamp_min(1e-12), 0)


def unit_pairs(student, teacher):
    """Check (B, N, D) student against (B, N * G, D) teacher; both pooled to (B, N, D), unit length,
    float32 or float64, the teacher without gradient."""
    if student.ndim != 3 or teacher.ndim != 3 or 0 in student.shape:
        raise ValueError(
            f"tokens must be (B, N, D) with B, N, D > 0; found student {tuple(student.shape)}, "
            f"teacher {tuple(teacher.shape)}"
        )
    (b, n, d), (bt, m, dt) = student.shape, teacher.shape
    if (b, d) != (bt, dt) or m % n or m == 0:
        raise ValueError(
            f"teacher {tuple(teacher.shape)} does not fit student {tuple(student.shape)}; give "
            f"(B, N * G, D), the G tokens of one student token contiguous"
        )
    exact = torch.float64 if student.dtype == torch.float64 else torch.float32
    student, teacher = student.to(exact), teacher.detach().to(exact)
    return unit(student), unit(teacher.unflatten(1, (n, m // n)).mean(2))


def gram_loss(student, teacher):
    """Mean squared difference of two Gram matrices of unit tokens: mean (s_i.s_j - t_i.t_j)^2.

    student: (B, N, D), any float dtype, not normalised. teacher: (B, N * G, D), the G tokens of one
    student token contiguous and averaged (G = 1 or ratio**2); gets no gradient. Returns a scalar,
    float32 (float64 for float64 input): autocast is off inside, since a Gram matrix in 16 bits
    loses the small differences that the loss is made of. A token of zero norm gets zero gradient.
    Raises ValueError if shapes do not fit or N = 0.
    Source: arXiv 2601.12964, spatial affinity; DINOv3's Gram loss (arXiv 2508.10104) unclamped.
    """
    with torch.autocast(student.device.type, enabled=False):
        s, t = unit_pairs(student, teacher)
        return (s @ s.mT - t @ t.mT).square().mean()


def token_mse(student, teacher):
    """Mean squared difference of the unit tokens themselves, the paper's `sa-mse` ablation.

    Arguments, result and errors as `gram_loss`.
    """
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(*unit_pairs(student, teacher))


class SpatialAffinity:
    """The affinity term for any student: loss = affinity(tokens, index, hr, grid).

    encode: callable (hr, index) -> (B, K * ratio**2, D), the teacher's tokens at those ids of the
    HR grid; called without gradient. ratio: HR tokens per MR token side. loss: `gram_loss`, or
    `token_mse` for the ablation.
    """

    def __init__(self, encode, ratio, loss=gram_loss):
        self.encode, self.ratio, self.loss = encode, ratio, loss

    def __call__(self, tokens, index, hr, grid):
        """tokens: (B, K, D), the student's. index: (B, K) int64, their ids on the MR token grid of
        (rows, cols). hr: (B, C, H, W), the same ground with ratio times the tokens a side.
        Returns a scalar, float32, with gradient to the tokens alone."""
        with torch.no_grad():
            teacher = self.encode(hr, hr_index(index, grid, self.ratio))
        return self.loss(tokens, teacher)
