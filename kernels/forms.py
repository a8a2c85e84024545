"""The Gram loss with its gradient in one pass: the forms in PyTorch, the operator, the choice.

For one image, s_i and t_i the student's and teacher's tokens at unit length, i = 1..N, the loss is
the mean over i, j of d_ij^2 with d_ij = s_i.s_j - t_i.t_j. With u = s - t and v = s + t it is

    d_ij = (u_i.v_j + v_i.u_j) / 2                      double = u @ v.mT
                                                        delta = (double + double.mT) / 2

exactly: nothing cancels as the student nears its teacher, and one product serves both halves. A
teacher of another width is the same with zeros appended to the narrower of the two. The definition
is in `affinity.gram_loss`, two Triton kernels in `gram.py`; this file imports without Triton.

B images, N student tokens of width D, and G teacher tokens to each of them.
"""

import functools
import logging

import torch
import torch.nn.functional as F

LINEAR_FROM = 2  # tokens per channel from which the linear form is tried; see `pick`
CHUNK = 2**21  # elements of a temporary: 8 MB in float32
NO_FLOAT64 = {"mps"}  # types of device that have none: sums over an image stay in float32 there

log = logging.getLogger("crossscale")


def check_pair(student, teacher):
    """Raise ValueError unless student is (B, N, D) and teacher (B, N * G, D'), none of it empty."""
    if student.ndim != 3 or teacher.ndim != 3 or 0 in student.shape:
        raise ValueError(
            f"tokens must be (B, N, D) with B, N, D > 0; found student {tuple(student.shape)}, "
            f"teacher {tuple(teacher.shape)}"
        )
    (b, n, _), (bt, m, _) = student.shape, teacher.shape
    if b != bt or m % n or 0 in teacher.shape:
        raise ValueError(
            f"teacher {tuple(teacher.shape)} does not fit student {tuple(student.shape)}; give "
            f"(B, N * G, D'), the G tokens of one student token contiguous"
        )


def gram_loss(student, teacher, backend="auto"):
    """`affinity.gram_loss` by one of these forms, "auto", "matmul", "linear" or "triton".

    The kernel multiplies in the tokens' dtype, float32 tokens under autocast in autocast's. A
    teacher of another width is in a basis of its own, far from the student token by token however
    small the loss: 16 bits would lose it, and the operands are float32.
    """
    check_pair(student, teacher)
    device, operand = student.device.type, student.dtype
    if student.shape[2] != teacher.shape[2]:
        operand = torch.promote_types(operand, torch.float32)
    elif operand == torch.float32 and torch.is_autocast_enabled(device):
        operand = torch.get_autocast_dtype(device)
    want_grad = torch.is_grad_enabled() and student.requires_grad
    with torch.autocast(device, enabled=False):
        return gram_fused(student, teacher.detach(), backend, operand, want_grad)[0]


# ---- the forms


def widen(x, width):
    """x (..., D) with zeros appended up to a width; x itself if it has it."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def sums_and_differences(student, teacher):
    """Unit student s (B, N, D); u = s - t and v = s + t, as wide as the wider of the two; and
    1 / |student| (B, N, 1), 0 for a token of zero norm."""
    exact = torch.promote_types(student.dtype, torch.float32)
    s, t = student.to(exact), teacher.to(exact)
    if s.shape[1] != t.shape[1]:
        t = t.unflatten(1, (s.shape[1], -1)).mean(2)
    norms = [torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (s, t)]
    inverse, inverse_t = (torch.where(x == 0, 0, 1 / x.clamp_min(1e-12)) for x in norms)
    s, t = s * inverse, t * inverse_t
    width = max(s.shape[-1], t.shape[-1])
    wide, t = widen(s, width), widen(t, width)
    return s, wide - t, wide + t, inverse


def project(g, s, inverse, out):
    """out = (g - (g.s) s) / |S|: the gradient through the normalisation. Overwrites g."""
    radial = (g * s).sum(-1, keepdim=True)
    torch.mul(g.addcmul_(radial, s, value=-1), inverse, out=out)


def wide_sum(x):
    """The sum of x in float64 where its device has that."""
    return x.sum(dtype=x.dtype if x.device.type in NO_FLOAT64 else torch.float64)


def squares(delta):
    """Sum of squares; rows in the dtype of delta, which needs no copy of it, then `wide_sum`."""
    rows = torch.linalg.vector_norm(delta, dim=-1)
    return wide_sum(rows.square_())


def matmul(student, teacher, want_grad):
    """Sum of d_ij^2, and (g - (g.s) s) / |S| with g_i = sum_j d_ij s_j, by matrix products.

    4 B N^2 D operations; a few images at a time, of large ones a few rows, so that the temporaries
    stay small. Shapes as `gram_loss`; the gradient is empty if not wanted.
    """
    b, n, d = student.shape
    total = 0
    grad = student.new_empty(student.shape if want_grad else 0)
    largest = n * max(n, d, teacher.shape[2])
    images, rows = max(1, CHUNK // largest), min(n, max(1, CHUNK // n))
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
    d = student.shape[2]
    total, sound = 0, True
    grad = student.new_empty(student.shape if want_grad else 0)
    for image in range(len(student)):
        s, u, v, inverse = sums_and_differences(student[image, None], teacher[image, None])
        a, b, c = u.mT @ u, v.mT @ v, u.mT @ v
        ab = wide_sum(a * b)
        part = ((ab + wide_sum(c * c.mT)) / 2).clamp_min(0)
        total, sound = total + part, sound & (ab <= 100 * part)
        if want_grad:  # of the student's own channels
            g = (u @ (c.mT + b)[..., :d]).baddbmm_(v, (a + c)[..., :d])
            project(g, s, inverse / 4, out=grad[image, None])
    return total, grad, sound


# ---- the choice, and the operator that carries all forms


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


def pick(student, teacher, operand, linear=True):
    """What "auto" takes: the kernel where it runs, else `matmul`; `linear` if it may be cheaper.

    The linear form wants operands of float32 or better. Counting operations it overtakes the
    kernel's 6 N^2 D at N = 1.7 D and `matmul`'s 4 at 2.5 D; timed, on the CPU, at N = 2 D.
    """
    missing = kernel_missing(student.device, student.dtype)
    exact = missing or operand == torch.float32
    capturing = student.is_cuda and torch.cuda.is_current_stream_capturing()  # no sync allowed
    long = student.shape[1] >= LINEAR_FROM * max(student.shape[2], teacher.shape[2])
    if linear and exact and long and not capturing:
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
        backend = pick(student, teacher, operand)
    if backend == "linear":
        total, grad, sound = linear(student, teacher, want_grad)
        if auto and not sound:
            backend = pick(student, teacher, operand, linear=False)
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
