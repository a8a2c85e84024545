"""Spatial affinity: the student's tokens relate to each other as an HR teacher's do.

The loss of Cross-Scale Pretraining (arXiv 2601.12964), in the order in which it is computed: which
HR tokens lie on an MR token's ground (`hr_index`), one token per MR token from them (`pool_to_mr`),
and the squared difference of the two Gram matrices (`gram_loss`). `SpatialAffinity` joins them for
any student and teacher; nothing here knows how either is trained. The forms that give the Gram loss
and its gradient in one pass are in `kernels/`; all of this imports without Triton.

B images, K tokens that the student sees, D their width, r = ratio HR tokens per MR token side.
"""

import torch
import torch.nn.functional as F

from kernels import forms

BACKENDS = ("auto", "eager", "triton", "linear", "matmul")


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


def at_least_float32(tokens):
    """Tokens in float32, or float64 if they are in it."""
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


def unit(tokens):
    """Tokens (..., D) over their L2 norm. A token of zero norm has no direction: it stays zero and
    gets zero gradient, where F.normalize would give 1e12 times the incoming one. NaN stays NaN."""
    norm = tokens.norm(dim=-1, keepdim=True)
    return torch.where(norm == 0, 0, tokens / norm.clamp_min(1e-12))


def unit_pairs(student, teacher):
    """Check (B, N, D) student against (B, N * G, D') teacher; both pooled to N tokens, unit length,
    float32 or float64, the teacher without gradient."""
    forms.check_pair(student, teacher)
    teacher = teacher.detach().unflatten(1, (student.shape[1], -1))
    dtype = at_least_float32(student).dtype
    return unit(at_least_float32(student)), unit(teacher.to(dtype).mean(2))


def gram_loss(student, teacher, *, backend="auto"):
    """Mean squared difference of two Gram matrices of unit tokens: mean (s_i.s_j - t_i.t_j)^2.

    student: (B, N, D), any float dtype, not normalised. teacher: (B, N * G, D'), the G tokens of
    one student token contiguous and averaged (G = 1 or ratio**2), of any width; gets no gradient.
    Returns a scalar, float32 (float64 for float64 input): autocast is off inside, since a Gram
    matrix in 16 bits loses the small differences that the loss is made of. A token of zero norm
    gets zero gradient. Raises ValueError if shapes do not fit or N = 0.

    backend: "eager" is the definition, below in two lines. The others compute the gradient along
    with the loss and cannot be differentiated twice: "matmul" and "linear" of `kernels.forms` in
    PyTorch on any device; "triton" by `kernels.gram` on NVIDIA GPUs (RuntimeError elsewhere), which
    under autocast multiplies in its dtype without that loss, if the teacher is near the student
    token by token, as its EMA is. "auto" takes what suits.
    Source: arXiv 2601.12964, spatial affinity; DINOv3's Gram loss (arXiv 2508.10104) unclamped.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    if backend != "eager":
        return forms.gram_loss(student, teacher, backend)
    with torch.autocast(student.device.type, enabled=False):
        s, t = unit_pairs(student, teacher)
        return (s @ s.mT - t @ t.mT).square().mean()


def token_mse(student, teacher):
    """Mean squared difference of the unit tokens themselves, the paper's `sa-mse` ablation.

    Arguments, result and errors as `gram_loss`, but tokens of another width do not compare:
    ValueError.
    """
    with torch.autocast(student.device.type, enabled=False):
        s, t = unit_pairs(student, teacher)
        if s.shape != t.shape:
            raise ValueError(
                f"token_mse compares tokens themselves: a teacher {t.shape[2]} wide does not fit a "
                f"student {s.shape[2]} wide; use gram_loss"
            )
        return F.mse_loss(s, t)


class SpatialAffinity:
    """The affinity term for any student: loss = affinity(tokens, index, hr, grid).

    encode: callable (hr, index) -> (B, K * ratio**2, D'), the teacher's tokens at those ids of the
        HR grid; called without gradient.
    ratio: HR tokens per MR token side.
    loss: `gram_loss`, or `token_mse` for the ablation.
    centre: compare tokens minus their mean over the image's K: what all of an image share drowns
        the rest. Pooled first, centred second, normalised last.
    exact: float32 operands also under autocast: for any teacher but the student's EMA. One in a
        basis of its own is far from the student token by token, and 16 bits lose the small loss.
    patch: side in pixels of an HR token; with it the HR image's size is checked.
    """

    def __init__(self, encode, ratio, loss=gram_loss, *, centre=False, exact=False, patch=None):
        self.encode, self.ratio, self.loss = encode, ratio, loss
        self.centre, self.exact, self.patch = centre, exact, patch

    def __call__(self, tokens, index, hr, grid):
        """tokens: (B, K, D), the student's. index: (B, K) int64, their ids on the MR token grid of
        (rows, cols). hr: (B, C, H, W), the same ground with ratio times the tokens a side.
        Returns a scalar, float32, with gradient to the tokens alone. Raises ValueError if the HR
        image or the teacher's tokens are not as many as that."""
        wanted = [self.ratio * side for side in grid]
        if self.patch and list(hr.shape[-2:]) != [self.patch * side for side in wanted]:
            found = [f"{side / self.patch:g}" for side in hr.shape[-2:]]
            raise ValueError(
                f"the HR image has {' x '.join(found)} tokens of {self.patch} px; ratio "
                f"{self.ratio} of {grid[0]} x {grid[1]} asks for {wanted[0]} x {wanted[1]}"
            )
        with torch.no_grad():
            teacher = self.encode(hr, hr_index(index, grid, self.ratio))
        if teacher.shape[1] != index.shape[1] * self.ratio**2:
            raise ValueError(
                f"the teacher gave {teacher.shape[1]} tokens an image where "
                f"{index.shape[1]} x {self.ratio}**2 were asked for"
            )
        if self.centre:  # sums and differences: autocast leaves their dtype alone
            tokens, teacher = (
                at_least_float32(tokens),
                pool_to_mr(at_least_float32(teacher), self.ratio),
            )
            tokens, teacher = (x - x.mean(1, keepdim=True) for x in (tokens, teacher))
        if not self.exact:
            return self.loss(tokens, teacher)
        with torch.autocast(tokens.device.type, enabled=False):
            return self.loss(at_least_float32(tokens), at_least_float32(teacher))
