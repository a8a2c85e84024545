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

CHUNK = 2**21  # elements of a temporary: 8 MB in float32

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
    """The sum over the last two axes, in float64."""
    return x.sum((-2, -1), dtype=torch.float64)


def empty_grad(student, want_grad):
    """Where a gradient goes: of the student's shape, empty if not wanted; float32 even of tokens in
    16 bits, since near the teacher it would vanish in float16."""
    exact = torch.promote_types(student.dtype, torch.float32)
    return student.new_empty(student.shape if want_grad else 0, dtype=exact)


def mean(total, student):
    """The loss from the sum of all d_ij^2."""
    b, n, _ = student.shape
    return total.div(b * n**2).to(torch.promote_types(student.dtype, torch.float32))


def matmul(student, teacher, want_grad):
    """The loss, and the gradient 4 / (B N^2) (g - (g.s) s) / |S| with g_i = sum_j d_ij s_j, by
    matrix products.

    4 B N^2 D operations; a few images at a time, of large ones a few rows, so that the temporaries
    stay small. Shapes as `gram_loss`; the gradient as `empty_grad`.
    """
    b, n, d = student.shape
    total, grad = 0, empty_grad(student, want_grad)
    largest = n * max(n, d, teacher.shape[2])
    images, rows = max(1, CHUNK // largest), min(n, max(1, CHUNK // n))
    for first in range(0, b, images):
        part = slice(first, first + images)
        s, u, v, inverse = sums_and_differences(student[part], teacher[part])
        inverse *= 2 / (b * n**2)
        for row in range(0, n, rows):
            i = slice(row, row + rows)
            double = u[:, i] @ v.mT  # 2 delta, when its mirror image is added
            double = double + double.mT if rows == n else double.baddbmm_(v[:, i], u.mT)
            # rows in the dtype of double, which needs no copy of it
            total = total + wide_sum(torch.linalg.vector_norm(double, dim=-1).square_()) / 4
            if want_grad:
                project(double @ s, s[:, i], inverse[:, i], out=grad[part, i])
    return mean(total, student), grad


def linear(student, teacher, want_grad):
    """As `matmul`, at a cost linear in N: 10 B N D^2 operations and no N x N matrix at all.

    With A = U'U, B = V'V, C = U'V (D x D): the sum is (<A, B> + <C, C'>) / 2 and g is
    (U (C' + B) + V (A + C)) / 4. The two terms of the sum cancel where the student is a rotation of
    its teacher: the third result, a bool on the device, tells whether in every image less than two
    digits were lost.
    """
    b, n, d = student.shape
    total, sound, grad = 0, True, empty_grad(student, want_grad)
    # on a CPU an image at a time stays in the cache, on a GPU several share a launch
    images = 1 if student.device.type == "cpu" else max(1, CHUNK // (n * teacher.shape[2]))
    for first in range(0, b, images):
        part = slice(first, first + images)
        s, u, v, inverse = sums_and_differences(student[part], teacher[part])
        uu, vv, uv = u.mT @ u, v.mT @ v, u.mT @ v
        first_term = wide_sum(uu * vv)
        squared = ((first_term + wide_sum(uv * uv.mT)) / 2).clamp_min(0)
        total, sound = total + squared.sum(), sound & (first_term <= 100 * squared).all()
        if want_grad:  # of the student's own channels
            g = (u @ (uv.mT + vv)[..., :d]).baddbmm_(v, (uu + uv)[..., :d])
            project(g, s, inverse / (b * n**2), out=grad[part])
    return mean(total, student), grad, sound


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


def pick(student, teacher, operand):
    """What "auto" takes: the linear form where it is cheaper, else the kernel, else `matmul`.

    Counting operations the linear form, in float32, overtakes `matmul` at N = 2.5 D, the kernel at
    1.7 D; timed, on the CPU, at 2 D. In 16 bits the kernel multiplies faster, and counting puts it
    at about 16 D: see the table in `gram.py`.
    """
    missing = kernel_missing(student.device, student.dtype)
    tokens, width = student.shape[1], max(student.shape[2], teacher.shape[2])
    # without the kernel the host reads whether it is sound, which a captured graph forbids
    capturing = missing and student.is_cuda and torch.cuda.is_current_stream_capturing()
    if tokens >= (2 if missing or operand == torch.float32 else 16) * width and not capturing:
        return "linear"
    return "matmul" if missing else "triton"


def run(
    student: torch.Tensor,
    teacher: torch.Tensor,
    backend: str,
    operand: torch.dtype,
    want_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator: the loss, and its gradient as `empty_grad`, kept for the backward pass.

    Arguments as `gram_loss`, checked there; operand is the dtype that the kernel multiplies in.
    """
    auto = backend == "auto"
    if auto:
        backend = pick(student, teacher, operand)
    missing = kernel_missing(student.device, student.dtype)
    otherwise = None
    if backend == "linear":
        *result, sound = linear(student, teacher, want_grad)
        # where digits are lost `matmul` or the kernel takes over, unless that rounds to 16 bits: it
        # would lose more
        if not auto or (not missing and operand != torch.float32) or (missing and sound):
            return tuple(result)
        # no host waits for the device to know whether the result is sound: the kernel looks there
        backend, otherwise = ("matmul", None) if missing else ("triton", (*result, sound))
    if backend == "matmul":
        return matmul(student, teacher, want_grad)
    if missing:
        raise RuntimeError(f"gram_loss: {missing}; use backend='auto'")
    from kernels import gram

    return gram.loss_and_grad(student, teacher, operand, want_grad, otherwise)


def run_fake(student, teacher, backend, operand, want_grad):
    grad = empty_grad(student, want_grad)
    return grad.new_empty(()), grad


def keep_grad(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # or zeros of the gradient's size come for the second output
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def scale_grad(ctx, grad_loss, _):
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError(
            "gram_loss keeps its gradient from the forward pass and cannot be differentiated "
            "twice; use backend='eager' for that"
        )
    if grad_loss is None:
        return (None,) * 5
    (grad,) = ctx.saved_tensors
    # one pass, multiplied in float32 and rounded to the tokens' dtype once
    out = torch.empty_like(grad, dtype=ctx.dtype)
    return torch.mul(grad, grad_loss, out=out), None, None, None, None


# what torch.library.custom_op would do, without the checks that it makes at every call
library = torch.library.Library("crossscale", "FRAGMENT")
library.define("gram_loss" + torch.library.infer_schema(run, mutates_args=()))
library.impl("gram_loss", run, "CompositeExplicitAutograd")
torch.library.register_fake("crossscale::gram_loss", run_fake, lib=library)
torch.library.register_autograd(
    "crossscale::gram_loss", scale_grad, setup_context=keep_grad, lib=library
)
gram_fused = torch.ops.crossscale.gram_loss.default
