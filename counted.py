"""What counting says of the time of the Gram loss's kernels, without a GPU.

A model of a chip is four rates. An operator of PyTorch takes the longer of its bytes over the
memory's rate and its operations over the processors', the kernels what `gram.plan` says besides,
and every launch its own time. No number of it is measured: `bench.py gram` does that on a GPU, and
prints the same table from the rates that it found there.
"""

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from affinity import gram_loss
from kernels import forms

# B, N, D, ratio: those of training, then large scenes
SHAPES = [
    *((128, 20, 384, 2), (128, 60, 384, 2), (128, 110, 384, 2), (128, 130, 384, 2)),
    *((128, 256, 384, 2), (4, 1024, 768, 2), (1, 4096, 384, 2), (1, 8192, 384, 1)),
    (1, 16384, 384, 1),
]
# bytes a second of memory, operations a second in bfloat16 and float32, seconds of a launch
H100 = {"capability": (9, 0), "processors": 132, "bandwidth": 3e12, "rate": 790e12}
H100 |= {"float32": 50e12, "launch": 2e-6}


def floor(shape, size, chip, part="both"):
    """Seconds that no way of computing the loss can undercut: each byte and operation once.

    size: bytes of a token's element. part: "forward", "backward" (which scales a gradient that the
    forward pass kept in float32) or "both".
    """
    b, n, d, ratio = shape
    if part == "backward":
        return b * n * d * (4 + size) / chip["bandwidth"]
    grad = part == "both"
    # student and teacher in, gradient out; symmetric products, or those of the linear form
    moved = (1 + ratio**2 + grad) * b * n * d * size
    operations = min(2 * n, 6 * d) + grad * min(2 * n, 4 * d)
    return max(moved / chip["bandwidth"], b * n * d * operations / chip["rate"])


class Counter(TorchDispatchMode):
    """Adds up the seconds that a chip would spend in each operator of PyTorch."""

    def __init__(self, chip):
        super().__init__()
        self.chip, self.seconds = chip, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.is_view or func.namespace == "prim" or func is torch.ops.aten._unsafe_view.default:
            return out
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        moved = sum(x.nbytes for x in tensors)
        count = flop_registry.get(func._overloadpacket, lambda *_, **__: 0)
        operations = count(*args, **(kwargs or {}), out_val=out)
        self.seconds += self.chip["launch"]
        self.seconds += max(moved / self.chip["bandwidth"], operations / self.chip["float32"])
        return out


def counted(shape, chip):
    """What the kernels move and do for float32 tokens and bfloat16 operands, forward and gradient,
    and the seconds that they, the linear form and eager PyTorch would take: a dict."""
    from kernels import gram  # which imports Triton, as all below

    b, n, d, ratio = shape
    plan = gram.plan(b, n, d, d, torch.bfloat16, chip["capability"], chip["processors"])
    tokens, pair = 4 * b * n * d, 4 * plan.height * plan.pad  # bytes
    unit = (1 + ratio**2) * tokens + pair
    backward = 2 * tokens
    moved = [unit, pair + plan.splits * tokens, backward]
    if not plan.constants["ONE_PANEL"]:
        moved.append(plan.splits * tokens + pair / 2 + tokens)  # project_kernel
    seconds = [x / chip["bandwidth"] + chip["launch"] for x in moved]
    seconds[1] = max(seconds[1], plan.seconds + chip["launch"])
    row = {"floor": floor(shape, 4, chip), "bytes": sum(moved), "operations": plan.operations}
    row |= {"programs": plan.programs, "kernel": sum(seconds) + chip["launch"]}  # the loss's sum
    with FakeTensorMode():
        student, teacher = torch.empty(b, n, d), torch.empty(b, n * ratio**2, d)
        if n >= 2 * d:  # from where "auto" may take it
            with Counter(chip) as linear:
                forms.linear(student, teacher, True)
            row["linear"] = linear.seconds + seconds[2]  # and the backward pass
        student.requires_grad_()
        with Counter(chip) as eager:
            torch.autograd.grad(gram_loss(student, teacher, backend="eager"), student)
    return {**row, "eager": eager.seconds}


def table(shapes, chip):
    """`counted` as text, times in microseconds."""
    lines = ["     B,     N,   D, r   floor      MB   GFLOP  programs  kernel  linear   eager"]
    for shape in shapes:
        row = counted(shape, chip)
        text = "{:6},{:6},{:4},{:2}".format(*shape) + f"{1e6 * row['floor']:8.0f}"
        text += f"{row['bytes'] / 1e6:8.0f}{row['operations'] / 1e9:8.1f}{row['programs']:10}"
        for name in ("kernel", "linear", "eager"):
            text += f"{1e6 * row[name]:8.0f}" if name in row else f"{'-':>8}"
        lines.append(text)
    return "\n".join(lines)
