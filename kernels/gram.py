"""The Gram loss and its gradient in two Triton kernels, nothing N x N in memory.

B images, N tokens of width D each, s_i the student's and t_i the teacher's at unit length:

    L = mean_bij d_ij^2,  d_ij = s_i.s_j - t_i.t_j             s, t = unit(student), unit(teacher)
    dL/ds_i = 4 / (B N^2) g_i,  g_i = sum_j d_ij s_j           loss = (s @ s.mT - t @ t.mT)
    dL/dS_i = 4 / (B N^2) (g_i - (g_i.s_i) s_i) / |S_i|               .square().mean()

On the left the mathematics, S the student before its normalisation; on the right eager PyTorch.

**No cancellation.** d is a small difference of numbers near one: in 16 bits nothing of it is left
once the student is near its teacher. With u = s - t, formed in float32 and rounded once, it is

    d_ij = u_i.s_j + t_i.u_j,  t_i = s_i - u_i

exactly, and every term is as small as the result: rounding costs a *relative* error. (It is the
same as (u_i.v_j + v_i.u_j) / 2 with v = s + t, but needs u and s only, and s_j serves g too.) That
holds where s_i is near t_i token by token; a student that equals its teacher up to a rotation of D
has a small loss and a large u, and no 16-bit form survives that. The same is true of a teacher of
another width, D': zeros are appended to the narrower of the two, in `unit_kernel`, and every
product stays what it was. u is kept times 256, a power of two that changes no bit and keeps float16
clear of its subnormal numbers.

**Two kernels.** `unit_kernel` reads student and teacher once, pools, normalises, and writes u, s
and 1/|S|. In `gram_kernel` a program owns BM rows of i and holds a panel of BM x BN values d on the
chip: it walks D to form them, sums their squares, and multiplies them with s_j, walking D again.
No accumulator is as wide as D, so any D fits the registers. If all of an image's columns fit one
panel (N <= 256) the product is made twice, once for g.s and once, projected, for the gradient; else
float32 partial sums of g go to a scratch array (the gradient itself in float32) and are projected
when the last panel is done. Images of few tokens are packed, BM // N to a program.

**Counts**, forward and gradient: 6 B N^2 D operations (8 with the product made twice). Bytes, each
once: B N D (G + 2) of input and gradient, G teacher tokens to a student token; on top of that u and
s, written and read. They are made for as many images at a time as fit into the size of the student
tensor (or 16 MB).

**Given up:** double backward; float64; the 16-bit rotated case above. The loss of a batch in which
one token is NaN is NaN, as in eager PyTorch, but the NaN may reach the gradient of an image beside.
No GPU was at hand: the tiles were chosen by what the compiler makes of them (registers, shared
memory, tensor-core instructions: `python bench.py compile`), that of Triton 3.7.1, which torch 2.13
brings; no speed on a GPU is measured.

Deterministic: every sum has one order, no atomics. Source of the loss: arXiv 2601.12964; the
gradient in the forward pass, as fused linear cross-entropy kernels do.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

CHUNK = 64  # widths are padded to a multiple with zeros: `gram_kernel` walks them without a mask
WORKSPACE = 2**24  # bytes that nobody misses: below it, a batch is not cut


@triton.jit(do_not_specialize=["rows", "n"])
def unit_kernel(
    student,  # (images, n, D), any float dtype and strides
    teacher,  # (images, n * G, D'), the G of one student token contiguous
    u,  # (rows + padding, pad) out: 256 (s - t), operand dtype; zero in the padding
    s,  # (rows + padding, pad) out: the student at unit length
    inverse,  # (rows + padding,) out, float32: 1 / |S|, zero for a token of zero norm
    rows,  # images * n
    n,  # tokens per image
    s_image,  # the student's strides, in elements
    s_token,
    s_channel,
    t_image,  # the teacher's
    t_token,
    t_channel,
    width,  # D
    t_width,  # D', the teacher's
    pad,  # the wider of both, rounded up to whole chunks; zeros beyond either
    G: tl.constexpr,
    WIDTH: tl.constexpr,  # power of two >= pad
    ROWS: tl.constexpr,  # tokens per program
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    image, token = (row // n)[:, None], (row % n)[:, None]
    d = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows)[:, None]

    at = student + image * s_image + token * s_token + d * s_channel
    a = tl.load(at, mask=inside & (d < width), other=0.0).to(tl.float32)
    b = tl.zeros((ROWS, WIDTH), tl.float32)  # the mean of G, times G: unit length forgets it
    for g in tl.static_range(G):
        at = teacher + image * t_image + (token * G + g) * t_token + d * t_channel
        b += tl.load(at, mask=inside & (d < t_width), other=0.0).to(tl.float32)

    norm_a, norm_b = tl.sqrt(tl.sum(a * a, 1)), tl.sqrt(tl.sum(b * b, 1))
    inverse_a = tl.where(norm_a == 0, 0.0, 1 / tl.maximum(norm_a, 1e-12))
    inverse_b = tl.where(norm_b == 0, 0.0, 1 / tl.maximum(norm_b, 1e-12))
    a, b = a * inverse_a[:, None], b * inverse_b[:, None]

    out = row[:, None] * pad + d
    tl.store(u + out, (256 * (a - b)).to(u.dtype.element_ty), mask=d < pad)
    tl.store(s + out, a.to(s.dtype.element_ty), mask=d < pad)
    tl.store(inverse + row, inverse_a)


@triton.jit
def tile(x, row, k, pad, ROWS: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """x[row : row + ROWS, k : k + BK], x a tensor descriptor or a pointer to rows of pad."""
    if TMA:
        return x.load([row, k])
    else:
        return tl.load(x + (row + tl.arange(0, ROWS))[:, None] * pad + (k + tl.arange(0, BK)))


@triton.jit(do_not_specialize=["rows", "n", "group", "tiles"])
def gram_kernel(
    u_i,  # (rows + padding, pad) 256 (s - t), in tiles of BM rows
    s_i,  # (rows + padding, pad) unit student, in tiles of BM rows
    u_j,  # u in tiles of BN rows
    s_j,  # s in tiles of BN rows
    inverse,  # (rows + padding,) float32: 1 / |S|
    loss,  # (programs,) out, float32: the sum of (256 d)^2 over a program's rows
    grad,  # (rows, width) out: (g - (g.s) s) / |S|
    scratch,  # (rows, width) float32, g while the panels pass; may be grad; unused if ONE_PANEL
    rows,  # images * n
    n,  # tokens per image
    group,  # rows that see each other: n, or those of the BM // n images packed together
    tiles,  # programs to a group
    width,  # D
    pad,  # the operands' width: D, or a wider teacher's, rounded up to whole chunks
    WANT_GRAD: tl.constexpr,
    ONE_PANEL: tl.constexpr,  # group <= BN
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    TMA: tl.constexpr,  # u and s are tensor descriptors
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    base = tl.program_id(0) // tiles * group  # the group's first row
    row = tl.program_id(0) % tiles * BM  # the tile's, within the group
    size = tl.minimum(group, rows - base)  # the last group may hold fewer images
    i = row + tl.arange(0, BM)
    d = tl.arange(0, BK)[None, :]
    out = (base + i)[:, None] * width + d
    total = tl.zeros((BM,), tl.float32)
    radial = tl.zeros((BM,), tl.float32)  # g.s

    delta = tl.zeros((BM, BN), tl.float32)  # 256 d
    for start in range(0, BN if ONE_PANEL else size, BN):  # known to be one: fewer registers
        j = start + tl.arange(0, BN)
        delta = tl.zeros((BM, BN), tl.float32)
        for k in range(0, pad, BK):
            a = tile(u_i, base + row, k, pad, BM, BK, TMA)
            b = tile(s_i, base + row, k, pad, BM, BK, TMA)
            t = b - a * (1 / 256)  # in the operands' dtype: it rounds once, as through float32
            other = tile(s_j, base + start, k, pad, BN, BK, TMA)
            delta = tl.dot(a, other.T, delta, input_precision=PRECISION)
            other = tile(u_j, base + start, k, pad, BN, BK, TMA)
            delta = tl.dot(t, other.T, delta, input_precision=PRECISION)
        same = (i // n)[:, None] == (j // n)[None, :]
        inside = (i < size)[:, None] & (j < size)[None, :]
        delta = tl.where(same & inside, delta, 0.0)
        total += tl.sum(delta * delta, 1)

        if WANT_GRAD:
            for k in range(0, pad, BK):
                other = tile(s_j, base + start, k, pad, BN, BK, TMA)
                g = tl.dot(delta.to(other.dtype), other, input_precision=PRECISION)
                b = tile(s_i, base + row, k, pad, BM, BK, TMA).to(tl.float32)
                radial += tl.sum(g * b, 1)
                if not ONE_PANEL:
                    mask = (i < size)[:, None] & (d + k < width)
                    if start > 0:
                        g += tl.load(scratch + out + k, mask=mask, other=0.0)
                    tl.store(scratch + out + k, g, mask=mask)
            if not ONE_PANEL:
                tl.debug_barrier()  # the next to read a value may be another thread

    tl.store(loss + tl.program_id(0), tl.sum(total))
    if WANT_GRAD:
        norm = tl.load(inverse + base + i)[:, None] * (1 / 256)
        for k in range(0, pad, BK):
            mask = (i < size)[:, None] & (d + k < width)
            if ONE_PANEL:  # again, from the panel on the chip: cheaper than rows kept in memory
                other = tile(s_j, base, k, pad, BN, BK, TMA)
                g = tl.dot(delta.to(other.dtype), other, input_precision=PRECISION)
            else:
                g = tl.load(scratch + out + k, mask=mask, other=0.0)
            b = tile(s_i, base + row, k, pad, BM, BK, TMA).to(tl.float32)
            g = (g - radial[:, None] * b) * norm
            tl.store(grad + out + k, g.to(grad.dtype.element_ty), mask=mask)


# unfused, or a student equal to its teacher would differ from it by a rounding
UNIT_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
# (BM, BN, BK, num_warps, num_stages) in 16 bits, by the major compute capability; others than 9 and
# 10 take the row of 8. For N <= 128; for the columns of a 14 x 14 or 16 x 16 grid in one panel; for
# several panels, whose rows are fewer, so that an image of many tokens is work for many processors.
# Of the tiles tried the largest that spill no register: on Triton 3.7.1, and on 3.9 as well.
TILES = {
    8: ((128, 128, 32, 8, 2), (64, 256, 32, 8, 3), (64, 128, 32, 8, 3)),
    9: ((128, 128, 64, 8, 3), (128, 256, 32, 8, 2), (64, 128, 64, 8, 3)),
    10: ((128, 128, 32, 8, 3), (64, 256, 32, 8, 3), (64, 128, 64, 8, 3)),
}


def tiles_for(capability, operand, n, tf32=False):
    """How to launch `gram_kernel` for an operand dtype on a compute capability, e.g. (9, 0).

    Returns (constants BM, BN, BK, ONE_PANEL, PRECISION, TMA; options for the compiler).
    """
    major = capability[0] if capability[0] in TILES else 8
    if operand == torch.float32:
        bm, bn, bk, warps, stages = (64, 64, 32, 4 if tf32 else 8, 2)
    else:
        bm, bn, bk, warps, stages = TILES[major][(n > 128) + (n > 256)]
    constants = {
        "BM": bm,
        "BN": bn,
        "BK": bk,
        "ONE_PANEL": n <= bn,
        "PRECISION": "tf32" if tf32 else "ieee",
        "TMA": major > 8 and operand != torch.float32,
    }
    return constants, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def unsupported(device, dtype):
    """Why the kernels cannot run on a torch.device with tokens of a dtype; None if they can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernel takes float32, bfloat16 and float16 tokens, not {dtype}"
    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda" or torch.version.hip:
        return f"the kernel needs an NVIDIA GPU, found {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"the kernel needs compute capability 8.0 (A100) or later, found {found}"
    return None


def round_up(count, multiple):
    return triton.cdiv(count, multiple) * multiple


def loss_and_grad(student, teacher, operand, want_grad, capability=None):
    """The loss, and the gradient as a backward pass needs it.

    student: (B, N, D), float32, bfloat16 or float16. teacher: (B, N * G, D'). operand: dtype in
    which u and s are multiplied; sums are float32 in any case. capability: compute capability to
    choose tiles for, the device's if None.
    Returns loss, a float32 scalar, and (g - (g.s) s) / |S| in the student's shape and dtype: times
    4 / (B N^2) it is dL/dS, and without that factor it does not vanish in float16. Empty if not
    wanted.
    """
    (b, n, d), device = student.shape, student.device
    if capability is None:  # on the CPU there is the interpreter alone
        on_gpu = device.type == "cuda"
        capability = torch.cuda.get_device_capability(device) if on_gpu else (8, 0)
    # torch's own switch: float32 products do not fall to tf32 unless its matmuls may
    tf32 = operand == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    constants, options = tiles_for(capability, operand, n, tf32)
    bm, bn, bk = constants["BM"], constants["BN"], constants["BK"]
    pad = round_up(max(d, teacher.shape[2]), CHUNK)
    packed = max(1, bm // n)  # images in one program
    tiles = triton.cdiv(packed * n, bm)  # programs to a group

    # u and s of a few images at a time, so that they stay small, and in the cache of the chip
    apart = want_grad and not constants["ONE_PANEL"] and student.dtype != torch.float32
    image_bytes = n * (2 * pad * operand.itemsize + 4 * d * apart)
    size = min(student.numel() * student.itemsize, 2**32)  # offsets in the kernel are 32 bit
    parts = triton.cdiv(b * image_bytes, max(size, WORKSPACE))
    images = min(round_up(triton.cdiv(b, parts), packed), b)
    height = round_up(images * n + max(bm, bn), CHUNK)  # tiles reach past the last row: zeros there
    u, s = torch.empty(2, height, pad, dtype=operand, device=device)
    inverse = torch.empty(height, device=device)
    scratch = torch.empty(images, n, d, device=device) if apart else None
    programs = triton.cdiv(images, packed) * tiles
    loss = torch.zeros(triton.cdiv(b, images), round_up(programs, 4), device=device)  # aligned rows
    grad = torch.empty(student.shape if want_grad else (0,), dtype=student.dtype, device=device)

    operands = u, s, u, s
    if constants["TMA"]:
        blocks = (u, bm), (s, bm), (u, bn), (s, bn)
        operands = [TensorDescriptor.from_tensor(x, [rows, bk]) for x, rows in blocks]
    width = triton.next_power_of_2(pad)
    block = max(1, 2048 // width)  # tokens per program of unit_kernel
    with torch.cuda.device_of(student):  # Triton launches on the current device
        for part, first in enumerate(range(0, b, images)):
            x, y = student[first : first + images], teacher[first : first + images]
            rows = x.shape[0] * n
            unit_kernel[(triton.cdiv(height, block),)](
                *(x, y, u, s, inverse, rows, n, *x.stride(), *y.stride(), d, y.shape[2], pad),
                **{"G": y.shape[1] // n, "WIDTH": width, "ROWS": block, **UNIT_OPTIONS},
            )
            out = grad[first : first + images]
            gram_kernel[(triton.cdiv(x.shape[0], packed) * tiles,)](
                *(*operands, inverse, loss[part], out, scratch if apart else out),
                *(rows, n, packed * n, tiles, d, pad),
                **{"WANT_GRAD": want_grad, **constants, **options},
            )
    return loss.sum(dtype=torch.float64).div(256**2 * b * n**2).float(), grad


def gram_loss(student, teacher):
    """The Gram loss by these kernels: arguments, result and errors as `affinity.gram_loss`, and a
    RuntimeError where they cannot run."""
    from kernels import forms  # which imports this file, when its choice asks for it

    return forms.gram_loss(student, teacher, backend="triton")
