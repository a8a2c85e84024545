"""Spatial affinity: the student's tokens relate to each other as an HR teacher's do.

The loss of Cross-Scale Pretraining (arXiv 2601.12964), in the order in which it is computed: which
HR tokens lie on an MR token's ground (`hr_index`), one token per MR token from them (`pool_to_mr`),
and the squared difference of the two Gram matrices (`gram_loss`: its definition, then the forms
that give loss and gradient in one pass). `SpatialAffinity` joins them for any student and teacher;
nothing here knows how either is trained. Imports without Triton.

B images, K tokens that the student sees, D their width, r = ratio HR tokens per MR token side.
"""

import functools
import logging

import torch
import torch.nn.functional as F

BACKENDS = ("auto", "eager", "triton", "linear", "matmul")
LINEAR_FROM = 2  # tokens per channel from which the linear form is tried; see `gram_fused`
CHUNK = 2**21  # elements of a temporary of the PyTorch forms: 8 MB in float32

log = logging.getLogger("crossscale")


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


def check_pair(student, teacher):
    """Raise ValueError unless student is (B, N, D) and teacher (B, N * G, D), none of it empty."""
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


def unit_pairs(student, teacher):
    """Check (B, N, D) student against (B, N * G, D) teacher; both pooled to (B, N, D), unit length,
    float32 or float64, the teacher without gradient."""
    check_pair(student, teacher)
    exact = torch.float64 if student.dtype == torch.float64 else torch.float32
    student, teacher = student.to(exact), teacher.detach().to(exact)
    n = student.shape[1]
    return unit(student), unit(teacher.unflatten(1, (n, -1)).mean(2))


def gram_loss(student, teacher, *, backend="auto"):
    """Mean squared difference of two Gram matrices of unit tokens: mean (s_i.s_j - t_i.t_j)^2.

    student: (B, N, D), any float dtype, not normalised. teacher: (B, N * G, D), the G tokens of one
    student token contiguous and averaged (G = 1 or ratio**2); gets no gradient. Returns a scalar,
    float32 (float64 for float64 input): autocast is off inside, since a Gram matrix in 16 bits
    loses the small differences that the loss is made of. A token of zero norm gets zero gradient.
    Raises ValueError if shapes do not fit or N = 0.

    backend: "eager" is the definition, below in two lines. The others compute the gradient along
    with the loss, in `gram_fused`, and cannot be differentiated twice: "matmul" and "linear" in
    PyTorch on any device; "triton" by `kernels.gram` on NVIDIA GPUs (RuntimeError elsewhere), which
    under autocast multiplies in its dtype without that loss. "auto" takes what suits (`pick`).
    Source: arXiv 2601.12964, spatial affinity; DINOv3's Gram loss (arXiv 2508.10104) unclamped.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    device = student.device.type
    operand = student.dtype
    if operand == torch.float32 and torch.is_autocast_enabled(device):
        operand = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        if backend == "eager":
            s, t = unit_pairs(student, teacher)
            return (s @ s.mT - t @ t.mT).square().mean()
        check_pair(student, teacher)
        want_grad = torch.is_grad_enabled() and student.requires_grad
        return gram_fused(student, teacher.detach(), backend, operand, want_grad)[0]


# ---- the same loss with its gradient in one pass: d_ij = (u_i.v_j + v_i.u_j) / 2, u = s - t and
# v = s + t. Nothing cancels as the student nears its teacher, and one product serves both halves.


def sums_and_differences(student, teacher):
    """Unit student s, u = s - t, v = s + t, and 1 / |student| (0 for a token of zero norm)."""
    exact = torch.promote_types(student.dtype, torch.float32)
    s, t = student.to(exact), teacher.to(exact)
    if s.shape != t.shape:
        t = t.unflatten(1, (s.shape[1], -1)).mean(2)
    norms = [torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (s, t)]
    inverse, inverse_t = (torch.where(x > 0, 1 / x.clamp_min(1e-12), 0) for x in norms)
    s, t = s * inverse, t * inverse_t
    return s, s - t, s + t, inverse


def project(g, s, inverse, out):
    """out = (g - (g.s) s) / |S|: the gradient through the normalisation. Overwrites g."""
    radial = (g * s).sum(-1, keepdim=True)
    torch.mul(g.addcmul_(radial, s, value=-1), inverse, out=out)


def squares(delta):
    """Sum of squares in float64; rows in the dtype of delta, which needs no copy of it."""
    return torch.linalg.vector_norm(delta, dim=-1).double().square().sum()


def matmul(student, teacher, want_grad):
    """Sum of d_ij^2, and (g - (g.s) s) / |S| with g_i = sum_j d_ij s_j, by matrix products.

    4 B N^2 D operations; a few images at a time, of large ones a few rows, so that the temporaries
    stay small. Shapes as `gram_loss`; the gradient is empty if not wanted.
    """
    b, n, d = student.shape
    total = 0
    grad = student.new_empty(student.shape if want_grad else 0)
    images, rows = max(1, CHUNK // (n * max(n, d))), min(n, max(1, CHUNK // n))
    for first in range(0, b, images):
        part = slice(first, first + images)
        s, u, v, inverse = sums_and_differences(student[part], teacher[part])
        for row in range(0, n, rows):
            i = slice(row, row + rows)
            double = u[:, i] @ v.mT  # 2 delta, when its mirror image is added
            double = double + double.mT if rows == n else double.baddbmm_(v[:, i], u.mT)
            total = total + squares(double) / 4
            if want_grad:
                project(double @ s, s[:, i], inverse[:, i] / 2, out=grad[part, i])
    return total, grad


def linear(student, teacher, want_grad):
    """As `matmul`, at a cost linear in N: 10 B N D^2 operations and no N x N matrix at all.

    With A = U'U, B = V'V, C = U'V (D x D): the sum is (<A, B> + <C, C'>) / 2 and g is
    (U (C' + B) + V (A + C)) / 4. The two terms of the sum cancel where the student is a rotation of
    its teacher: the third result tells whether, in every image, less than two digits were lost.
    """
    total, sound = 0, True
    grad = student.new_empty(student.shape if want_grad else 0)
    for image in range(len(student)):
        s, u, v, inverse = sums_and_differences(student[image, None], teacher[image, None])
        a, b, c = u.mT @ u, v.mT @ v, u.mT @ v
        ab = (a * b).sum(dtype=torch.float64)
        part = ((ab + (c * c.mT).sum(dtype=torch.float64)) / 2).clamp_min(0)
        total, sound = total + part, sound & (ab <= 100 * part)
        if want_grad:
            g = (u @ (c.mT + b)).baddbmm_(v, a + c)
            project(g, s, inverse / 4, out=grad[image, None])
    return total, grad, sound


@functools.cache
def kernel_missing(device, dtype):
    """Why the Triton kernel cannot serve a device and dtype, or None; said once where it should."""
    try:
        from kernels import gram
    except ImportError as error:
        reason = f"Triton is missing or too old ({error}); the kernel needs triton >= 3.5"
    else:
        reason = gram.unsupported(device, dtype)
    if reason and device.type == "cuda":
        log.warning("gram_loss: %s; the PyTorch form serves", reason)
    return reason


def pick(student, operand, linear=True):
    """What "auto" takes: the kernel where it runs, else `matmul`; `linear` if it may be cheaper.

    The linear form wants operands of float32 or better. Counting operations it overtakes the
    kernel's 6 N^2 D at N = 1.7 D and `matmul`'s 4 at 2.5 D; timed, on the CPU, at N = 2 D.
    """
    missing = kernel_missing(student.device, student.dtype)
    exact = missing or operand == torch.float32
    capturing = student.is_cuda and torch.cuda.is_current_stream_capturing()  # no sync allowed
    if linear and exact and student.shape[1] >= LINEAR_FROM * student.shape[2] and not capturing:
        return "linear"
    return "matmul" if missing else "triton"


@functools.cache
def say(backend, device, dtype):
    log.debug("gram_loss: auto takes %s for %s on %s", backend, dtype, device)


@torch.library.custom_op("crossscale::gram_loss", mutates_args=())
def gram_fused(
    student: torch.Tensor,
    teacher: torch.Tensor,
    backend: str,
    operand: torch.dtype,
    want_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator: the loss, and (g - (g.s) s) / |S|, the student's gradient but for 4 / (B N^2).

    Arguments as `gram_loss`, checked there; operand is the dtype that the kernel multiplies in.
    The gradient is kept without its factor, or it would vanish in float16. Empty if not wanted.
    """
    b, n, _ = student.shape
    auto = backend == "auto"
    if auto:
        backend = pick(student, operand)
    if backend == "linear":
        total, grad, sound = linear(student, teacher, want_grad)
        if auto and not sound:
            backend = pick(student, operand, linear=False)
    if auto:
        say(backend, student.device, operand)
    if backend == "triton":
        if missing := kernel_missing(student.device, student.dtype):
            raise RuntimeError(f"gram_loss: {missing}; use backend='auto'")
        from kernels import gram

        return gram.loss_and_grad(student, teacher, operand, want_grad)
    if backend == "matmul":
        total, grad = matmul(student, teacher, want_grad)
    return total.div(b * n**2).to(torch.promote_types(student.dtype, torch.float32)), grad


@gram_fused.register_fake
def _(student, teacher, backend, operand, want_grad):
    loss = student.new_empty((), dtype=torch.promote_types(student.dtype, torch.float32))
    return loss, student.new_empty(student.shape if want_grad else 0)


def keep_grad(ctx, inputs, output):
    ctx.save_for_backward(output[1])


def scale_grad(ctx, grad_loss, _):
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError(
            "gram_loss keeps its gradient from the forward pass and cannot be differentiated "
            "twice; use backend='eager' for that"
        )
    (grad,) = ctx.saved_tensors
    b, n, _ = grad.shape
    # one pass, multiplied in float32 and rounded once: as a scalar the factor would be rounded to
    # the 16 bits of the gradient first
    factor = grad_loss.reshape(1) * (4 / (b * n**2))
    return torch.mul(grad, factor, out=torch.empty_like(grad)), None, None, None, None


gram_fused.register_autograd(scale_grad, setup_context=keep_grad)


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

    def __init__(self, encode, ratio, loss=gram_loss, *, centre=False, exact=False, patch=None):
        self.encode, self.ratio, self.loss = encode, ratio, loss
        self.centre, self.exact, self.patch = centre, exact, patch

    def __call__(self, tokens, index, hr, grid):
        with torch.no_grad():
            teacher = self.encode(hr, hr_index(index, grid, self.ratio))
        if self.centre:
            teacher = pool_to_mr(teacher.float(), self.ratio)
            tokens = tokens.float()
            teacher, tokens = (v - v.mean(1, keepdim=True) for v in (teacher, tokens))
        return self.loss(tokens, teacher)
