"""The Gram loss and its gradient in Triton kernels, nothing N x N in memory.

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

**The kernels.** `unit_kernel` reads student and teacher once, pools, normalises, and writes u, s
and 1/|S|. In `gram_kernel` a program owns BM rows of i and holds a panel of BM x BN values d on the
chip: it walks D to form them, sums their squares, and multiplies them with s_j, walking D again.
No accumulator is as wide as D, so any D fits the registers. If all of an image's columns fit one
panel (N <= 256) the product is made twice, once for g.s and once, projected, for the gradient. Else
float32 sums of g pass through memory from panel to panel, and `project_kernel` makes the gradient
of them; where programs are fewer than processors several share a tile's panels, each with sums of
its own. Images of few tokens are packed, BM // N to a program.

**Counts**, forward and gradient: 6 B N^2 D operations (8 with the product made twice). Bytes, each
once: B N D (G + 2) of input and gradient, G teacher tokens to a student token; on top of that u and
s, written and read, and the gradient's way through the backward pass. By `counted.py`'s model of an
H100, float32 tokens, bfloat16 operands, times in microseconds (`python bench.py gram --count`):

     B,     N,   D, r   floor      MB   GFLOP  programs  kernel  linear   eager
   128,    20, 384, 2       8      40     0.5        43      28       -     154
   128,    60, 384, 2      24     118     1.6       128      49       -     293
   128,   110, 384, 2      43     217     6.4       128      84       -     510
   128,   130, 384, 2      51     256    19.3       384     137       -     614
   128,   256, 384, 2     101     504    25.8       256     210       -    1460
     4,  1024, 768, 2      25     235    19.3       128     117       -     859
     1,  4096, 384, 2      13     117    38.7       128     139     273    1540
     1,  8192, 384, 1      15     146   154.6       128     450     418    5713
     1, 16384, 384, 1      31     240   618.5       128    1688     733   22269

Launches: two kernels (over 256 tokens three) and the sum of their losses, one in the backward pass.

**Given up:** double backward; float64; the 16-bit rotated case above. The loss of a batch in which
one token is NaN is NaN, as in eager PyTorch, but the NaN may reach the gradient of an image beside.
No GPU was at hand: the tiles were chosen by what the compiler makes of them (registers, shared
memory, tensor-core instructions: `tests/test_gram.py` holds it), that of Triton 3.7.1, which torch
2.13 brings, and by the model. No speed on a GPU is measured: `python bench.py gram` there says what
the model is worth.

Deterministic: every sum has one order, no atomics. Source of the loss: arXiv 2601.12964; the
gradient in the forward pass, as fused linear cross-entropy kernels do.
"""

import functools
import types

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

CHUNK = 64  # widths are padded to a multiple with zeros: `gram_kernel` walks them without a mask


@triton.jit(do_not_specialize=["rows", "height", "n"])
def unit_kernel(
    student,  # (B, n, D), any float dtype and strides
    teacher,  # (B, n * G, D'), the G of one student token contiguous
    pair,  # (2, height, pad) out, operand dtype: u = 256 (s - t), and s, the student at unit length
    inverse,  # (height,) out, float32: 1 / |S|, zero for a token of zero norm
    skip,  # None, or a bool: true to do nothing
    rows,  # B * n
    height,  # rows, and padding, of zeros
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
    if skip is not None:
        if tl.load(skip):
            return
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
    tl.store(pair + out, (256 * (a - b)).to(pair.dtype.element_ty), mask=d < pad)
    out += height.to(tl.int64) * pad
    tl.store(pair + out, a.to(pair.dtype.element_ty), mask=d < pad)
    tl.store(inverse + row, inverse_a)


@triton.jit
def tile(x, row, k, pad, ROWS: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """x[row : row + ROWS, k : k + BK], x a tensor descriptor or a pointer to rows of pad."""
    if TMA:
        return x.load([row, k])
    else:
        x += row.to(tl.int64) * pad
        return tl.load(x + tl.arange(0, ROWS)[:, None] * pad + (k + tl.arange(0, BK)))


@triton.jit(do_not_specialize=["rows", "height", "n", "group", "tiles", "splits"])
def gram_kernel(
    own,  # (2 * height, pad): u above s, in tiles of BM rows
    other,  # the same in tiles of BN rows
    inverse,  # (height,) float32: 1 / |S|
    loss,  # (programs,) out, float32: each program's share of the loss
    grad,  # (rows, width) out, float32: dL/dS; if not ONE_PANEL (splits, rows, width), 256 g
    skip,  # None, or a bool: true to do nothing
    rows,  # B * n
    height,  # rows of u, padding included
    n,  # tokens per image
    group,  # rows that see each other: n, or those of the BM // n images packed together
    tiles,  # tiles of BM rows to a group
    splits,  # programs to a tile, which share its panels
    width,  # D
    pad,  # the operands' width: D, or a wider teacher's, rounded up to whole chunks
    scale,  # 1 / (B n^2)
    WANT_GRAD: tl.constexpr,
    ONE_PANEL: tl.constexpr,  # group <= BN, and one split
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    TMA: tl.constexpr,  # own and other are tensor descriptors
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    if skip is not None:
        if tl.load(skip):
            return
    place = tl.program_id(0) // splits  # of the tile among all
    base = place // tiles * group  # the group's first row
    row = place % tiles * BM  # the tile's, within the group
    size = tl.minimum(group, rows - base)  # the last group may hold fewer images
    i = row + tl.arange(0, BM)
    d = tl.arange(0, BK)[None, :]
    out = base.to(tl.int64) * width + i[:, None] * width + d
    split = tl.program_id(0) % splits
    share = tl.cdiv(tl.cdiv(size, BN), splits) * BN
    first = 0 if ONE_PANEL else split * share
    last = BN if ONE_PANEL else tl.minimum(first + share, size)
    out += split * rows.to(tl.int64) * width
    total = tl.zeros((BM,), tl.float32)
    delta = tl.zeros((BM, BN), tl.float32)  # 256 d
    for start in range(first, last, BN):  # known to be one: fewer registers
        j = start + tl.arange(0, BN)
        delta = tl.zeros((BM, BN), tl.float32)
        for k in range(0, pad, BK):
            u = tile(own, base + row, k, pad, BM, BK, TMA)
            s = tile(own, height + base + row, k, pad, BM, BK, TMA)
            t = s - u * (1 / 256)  # in the operands' dtype: it rounds once, as through float32
            s_j = tile(other, height + base + start, k, pad, BN, BK, TMA)
            delta = tl.dot(u, s_j.T, delta, input_precision=PRECISION)
            u_j = tile(other, base + start, k, pad, BN, BK, TMA)
            delta = tl.dot(t, u_j.T, delta, input_precision=PRECISION)
        same = (i // n)[:, None] == (j // n)[None, :]
        inside = (i < size)[:, None] & (j < size)[None, :]
        delta = tl.where(same & inside, delta, 0.0)
        total += tl.sum(delta * delta, 1)

        if WANT_GRAD and not ONE_PANEL:
            for k in range(0, pad, BK):
                s_j = tile(other, height + base + start, k, pad, BN, BK, TMA)
                g = tl.dot(delta.to(s_j.dtype), s_j, input_precision=PRECISION)
                mask = (i < size)[:, None] & (d + k < width)
                if start > first:
                    g += tl.load(grad + out + k, mask=mask, other=0.0)
                tl.store(grad + out + k, g, mask=mask)
            tl.debug_barrier()  # the next to read a value may be another thread

    tl.store(loss + tl.program_id(0), tl.sum(total) * (scale / 65536))
    if WANT_GRAD and ONE_PANEL:
        norm = tl.load(inverse + base + i)[:, None] * (scale / 64)
        radial = tl.zeros((BM,), tl.float32)  # g.s
        for writing in tl.static_range(2):
            for k in range(0, pad, BK):  # twice from the panel on the chip: g has no room there
                s_j = tile(other, height + base, k, pad, BN, BK, TMA)
                g = tl.dot(delta.to(s_j.dtype), s_j, input_precision=PRECISION)
                s = tile(own, height + base + row, k, pad, BM, BK, TMA).to(tl.float32)
                if writing:
                    mask = (i < size)[:, None] & (d + k < width)
                    tl.store(grad + out + k, (g - radial[:, None] * s) * norm, mask=mask)
                else:
                    radial += tl.sum(g * s, 1)


@triton.jit(do_not_specialize=["rows", "height", "splits"])
def project_kernel(
    sums,  # (splits, rows, width) float32: 256 g in `splits` parts
    pair,  # (2, height, pad), s in the second half
    inverse,  # (height,) float32: 1 / |S|
    grad,  # (rows, width) out, float32: dL/dS; may be sums if splits is 1
    skip,  # None, or a bool: true to do nothing
    rows,  # B * n
    height,  # rows of s, padding included
    splits,
    width,  # D
    pad,  # the operands' width
    scale,  # 1 / (B n^2)
    WIDTH: tl.constexpr,  # power of two >= pad
    ROWS: tl.constexpr,  # tokens per program
):
    if skip is not None:
        if tl.load(skip):
            return
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)[None, :]
    mask = (row < rows)[:, None] & (d < width)
    at = row[:, None] * width + d
    g = tl.zeros((ROWS, WIDTH), tl.float32)
    for part in range(splits):  # in this order
        g += tl.load(sums + part * rows.to(tl.int64) * width + at, mask=mask, other=0.0)
    s = tl.load(pair + (height + row)[:, None] * pad + d, mask=mask, other=0.0).to(tl.float32)
    norm = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None] * (scale / 64)
    tl.store(grad + at, (g - tl.sum(g * s, 1)[:, None] * s) * norm, mask=mask)


# unfused, or a student equal to its teacher would differ from it by a rounding
UNIT_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
# What one processor of an H100 is taken to do in a second: operations, in tiles as small as these
# half of those in large products, and bytes from and to the L2 cache. Not measured here; they
# decide between two tiles, and they are behind the table above.
OPERATIONS, BYTES = 790e12 / 132 / 2, 7e12 / 132


def fitting(n, major):
    """Tiles (BM, BN, BK, num_warps, num_stages) in 16 bits for n tokens an image on a chip of that
    major compute capability: of those tried the largest that spill no register on Triton 3.7.1, and
    on 3.9 as well. 128 x 256 does so on Hopper alone."""
    if n <= 128:  # one or several images in a program
        return (128, 128, 64, 8, 3), (64, 64 if n <= 64 else 128, 64, 4 if n <= 64 else 8, 3)
    tiles = (128, 256, 32, 8, 2), (64, 256, 32, 8, 2)
    return tiles[1:] if major != 9 else tiles if n <= 256 else tiles[:1]


@functools.lru_cache(4096)
def plan(b, n, width, wide, operand, capability, processors, tf32=False):
    """How to launch the kernels for a shape on a chip; prepared once a shape.

    width, wide: D and the wider of D and D'. operand: dtype of the products. capability: compute
    capability, e.g. (9, 0). processors: how many the chip has.
    Returns a namespace: pad, height, group, tiles, splits as the kernels take them, programs of
    `gram_kernel`, constants BM to TMA and options for the compiler; its operations, and the seconds
    that they are thought to take.
    """
    pad, size = round_up(wide, CHUNK), operand.itemsize
    shapes = fitting(n, capability[0])
    if operand == torch.float32:
        shapes = ((64, 64, 32, 4 if tf32 else 8, 2),)
    plans = []
    for bm, bn, bk, warps, stages in shapes:
        packed = max(1, bm // n)  # images in one program
        tiles = triton.cdiv(packed * n, bm)
        programs = triton.cdiv(b, packed) * tiles
        panels = triton.cdiv(packed * n, bn)
        # where programs are fewer than processors, several share a tile's panels, at least one each
        share = triton.cdiv(panels, max(1, min(panels, processors // programs)))
        splits = triton.cdiv(panels, share)
        one = panels == 1
        moved = 2 * bm + (4 if one else 3) * bn, 2 * bm if one else 0  # rows of pad values, a panel
        moved = size * pad * sum(moved) * share + 4 * width * bm * (2 * share - 1)
        products = 2 * bm * bn * pad * (4 if one else 3) * share
        waves = triton.cdiv(programs * splits, processors)
        plans.append(
            types.SimpleNamespace(
                seconds=waves * max(products / OPERATIONS, moved / BYTES),
                operations=products * programs * splits,
                pad=pad,
                height=round_up(b * n + max(bm, bn), CHUNK),  # tiles reach past the last row
                group=packed * n,
                tiles=tiles,
                splits=splits,
                programs=programs * splits,
                constants={
                    "ONE_PANEL": one,
                    "PRECISION": "tf32" if tf32 else "ieee",
                    "TMA": capability[0] in (9, 10) and operand != torch.float32,
                    **{"BM": bm, "BN": bn, "BK": bk},
                },
                options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
            )
        )
    return min(plans, key=lambda plan: plan.seconds)


@functools.cache
def this_chip(device):
    """Compute capability and number of processors of a device."""
    if device.type == "cpu":  # the interpreter's
        return (8, 0), 132
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor), found.multi_processor_count


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


def loss_and_grad(student, teacher, operand, want_grad, skip=None, chip=None):
    """The loss, and its gradient with respect to the student.

    student: (B, N, D), float32, bfloat16 or float16. teacher: (B, N * G, D'). operand: dtype in
    which u and s are multiplied; sums are float32 in any case. chip: compute capability and
    processors to choose tiles for, the device's if None.
    skip: (loss, gradient, bool) on the device: where the bool is true, what is there is returned,
    and little computed; else the gradient is overwritten. No host needs to know which.
    Returns loss, a float32 scalar, and dL/dS, (B, N, D) float32, which does not vanish where
    float16 would. Empty if not wanted.
    """
    (b, n, d), (_, m, wide), device = student.shape, teacher.shape, student.device
    # torch's own switch: float32 products do not fall to tf32 unless its matmuls may
    tf32 = operand == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    p = plan(b, n, d, max(d, wide), operand, *(chip or this_chip(device)), tf32)
    pair = torch.empty(2 * p.height, p.pad, dtype=operand, device=device)
    inverse = torch.empty(p.height, device=device)
    loss = torch.empty(p.programs, device=device)
    found, grad, skip = skip or (None, None, None)
    if grad is None:
        grad = torch.empty(student.shape if want_grad else 0, device=device)
    split = want_grad and p.splits > 1
    sums = torch.empty(p.splits, b * n, d, device=device) if split else grad
    own = other = pair
    if p.constants["TMA"]:
        bm, bn, bk = (p.constants[name] for name in ("BM", "BN", "BK"))
        own = TensorDescriptor.from_tensor(pair, [bm, bk])
        other = own if bm == bn else TensorDescriptor.from_tensor(pair, [bn, bk])
    scale, width = 1 / (b * n**2), triton.next_power_of_2(p.pad)
    block = max(1, 2048 // width)  # tokens to a program that holds whole rows
    with torch.cuda.device_of(student):  # Triton launches on the current device
        unit_kernel[(triton.cdiv(p.height, block),)](
            *(student, teacher, pair, inverse, skip, b * n, p.height, n),
            *(*student.stride(), *teacher.stride(), d, wide, p.pad),
            **{"G": m // n, "WIDTH": width, "ROWS": block, **UNIT_OPTIONS},
        )
        gram_kernel[(p.programs,)](
            *(own, other, inverse, loss, sums, skip, b * n, p.height, n),
            *(p.group, p.tiles, p.splits, d, p.pad, scale),
            **{"WANT_GRAD": want_grad, **p.constants, **p.options},
        )
        if want_grad and not p.constants["ONE_PANEL"]:
            project_kernel[(triton.cdiv(b * n, block),)](
                *(sums, pair, inverse, grad, skip, b * n, p.height, p.splits, d, p.pad, scale),
                **{"WIDTH": width, "ROWS": block},
            )
    loss = loss.sum()
    return (loss if skip is None else torch.where(skip, found, loss)), grad


def gram_loss(student, teacher):
    """The Gram loss by these kernels: arguments, result and errors as `affinity.gram_loss`, and a
    RuntimeError where they cannot run."""
    from kernels import forms  # which imports this file, when its choice asks for it

    return forms.gram_loss(student, teacher, backend="triton")
