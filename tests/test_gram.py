"""The fused Gram loss: the operator on any device, the Triton kernels under the interpreter, ahead
of time for GPUs that are not here, and on the one that is.

The rule for numbers comes from rounding theory (`rounding_bounds`): each value may be off by a
small multiple of eps times the sum of the absolute products that it is made of. It asks nothing of
eager's own error, which can be zero by luck on one CPU.
"""

import importlib.metadata
import importlib.util
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from affinity import gram_loss, unit, unit_pairs
from kernels import forms

ROOT = Path(__file__).parent.parent
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, interpreted")
outside = pytest.mark.skipif(INTERPRETED, reason="not under the interpreter")
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
N_SWEEP = [1, 2, 20, 49, 65, 110, 196, 197, 256, 300]
D_SWEEP = [16, 40, 192, 384]
WIDTHS = [(96, 192), (192, 96), (16, 24), (40, 16)]  # student's, teacher's


def tokens(b, n, d, group=1, dtype=torch.float32, noise=0.3, common=0.0, seed=0, device="cpu"):
    """A teacher with a common component, and a student near it. d: their width, or both, (D, D'):
    then the wider one has channels of its own."""
    d, cut = (max(d), d) if isinstance(d, tuple) else (d, (d, d))
    generator = torch.Generator().manual_seed(seed)
    mean = common * torch.randn(d, generator=generator)
    pooled = torch.randn(b, n, d, generator=generator) + mean
    student = pooled + noise * torch.randn(b, n, d, generator=generator)
    teacher = pooled.repeat_interleave(group, 1)
    if group > 1:
        teacher = teacher + 0.1 * torch.randn(b, n * group, d, generator=generator)
    student, teacher = student[..., : cut[0]], teacher[..., : cut[1]]
    return student.to(device, dtype), teacher.to(device, dtype)


def loss_and_grad(student, teacher, backend, scale=1.0):
    student = student.detach().requires_grad_()
    loss = gram_loss(student, teacher, backend=backend)
    (grad,) = torch.autograd.grad(loss * scale, student)
    return loss.detach(), grad


def rounding_bounds(student, teacher, operand, linear):
    """What rounding may cost the loss, and the gradient value by value (B, N, D), both float64.

    Tokens at unit length, s and t, carry an error of eps of float32; u = s - t and the factors of
    each product are rounded to eps of operand on top. So with w = |s| + |t| the error of
    d_ij = (u_i.v_j + v_i.u_j) / 2 is a multiple of (eps |u_i| + eps32 w_i).w_j, and the rest
    follows from loss = mean d^2 and g_i = sum_j d_ij s_j. linear: of the D x D form, whose terms
    cancel. The multiple is 4: for a sum of many products that is more than any order of it costs.
    """
    eps, eps32 = 4 * torch.finfo(operand).eps, 4 * torch.finfo(torch.float32).eps
    b, n, _ = student.shape
    s, t = unit_pairs(student.double(), teacher.double())
    width = max(s.shape[2], t.shape[2])
    s, t = (functional.pad(x, (0, width - x.shape[2])) for x in (s, t))
    u, w = (s - t).abs(), s.abs() + t.abs()
    error = (eps * u + eps32 * w) @ w.mT
    delta, error, s = (s @ s.mT - t @ t.mT).abs(), (error + error.mT) / 2, s.abs()
    g, g_error = delta @ s, (error + eps * delta) @ s
    loss_error = (2 * delta * error + error.square() + eps32 * delta.square()).mean()
    if linear:
        loss_error += eps32 * (u @ w.mT).square().mean()
        g_error += eps32 * (u @ (w.mT @ u + w.mT @ w) + w @ (u.mT @ u + u.mT @ w)) / 4
    g_error += ((g_error + eps * g) * s).sum(-1, keepdim=True) * s + eps * g
    g_error = g_error[..., : student.shape[2]]
    return loss_error, 4 / (b * n**2) * g_error / student.double().norm(dim=-1, keepdim=True)


def assert_only_rounded(student, teacher, loss, grad, operand=torch.float32, linear=False):
    """loss and grad of (student, teacher) against float64, by the rule above; operand: dtype of
    the products, float32 in PyTorch whatever the tokens are."""
    exact, exact_grad = loss_and_grad(student.double(), teacher.double(), "eager")
    bound, grad_bound = rounding_bounds(student, teacher, operand, linear)
    assert grad.shape == student.shape and grad.dtype == student.dtype
    assert (loss - exact).abs() <= bound
    kept = torch.finfo(grad.dtype)  # the gradient is rounded to the tokens' dtype once
    grad_bound += kept.eps * (exact_grad.abs() + kept.smallest_normal)
    assert ((grad - exact_grad).abs() <= grad_bound).all()


# ---- the PyTorch forms, and the operator that carries all of them


@pytest.mark.parametrize("backend", ["matmul", "linear", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", N_SWEEP)
def test_pytorch_forms_against_float64(n, dtype, backend):
    for d in (*D_SWEEP, *WIDTHS):
        student, teacher = tokens(2, n, d, group=1 if d in (16, 192, 384) else 4, dtype=dtype)
        loss, grad = loss_and_grad(student, teacher, backend)
        assert_only_rounded(student, teacher, loss, grad, linear=backend != "matmul")


def test_another_width_asks_for_float32_operands(monkeypatch):
    """Under autocast and for 16-bit tokens; tokens of one width follow them."""
    asked = []
    monkeypatch.setattr(forms, "pick", lambda s, t, operand: asked.append(operand) or "matmul")
    for widths in ((8, 8), (8, 12)):
        for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                gram_loss(*tokens(1, 4, widths, dtype=dtype))
    assert asked == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("backend", ["eager", "auto", "matmul", "linear"])
@pytest.mark.parametrize("side", [0, 1])
def test_a_nan_token_gives_nan(side, backend):
    pair = tokens(2, 9, 16, group=4)
    pair[side][1, 3, 5] = torch.nan
    loss, grad = loss_and_grad(*pair, backend)
    assert loss.isnan() and grad[1].isnan().all() and grad[0].isfinite().all()


@pytest.mark.parametrize("widths", [(16, 16), (16, 24), (24, 16)])
@pytest.mark.parametrize("backend", ["matmul", "linear"])
def test_large_batches_and_images_are_cut(backend, widths, monkeypatch):
    student, teacher = tokens(5, 30, widths, dtype=torch.float64)
    whole = loss_and_grad(student, teacher, backend)
    for chunk in (30 * 30 * 2, 30 * 7, 1):  # two images, seven rows, one row at a time
        monkeypatch.setattr(forms, "CHUNK", chunk)
        for a, b in zip(loss_and_grad(student, teacher, backend), whole, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("widths", [(8, 8), (8, 12), (8, 6)])
@pytest.mark.parametrize("backend", ["matmul", "linear"])
def test_gradient_is_exact(backend, widths):
    student, teacher = tokens(2, 5, widths, group=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: gram_loss(s, teacher, backend=backend), student.requires_grad_()
    )


def test_linear_bound_near_the_teacher_and_independent():
    for noise, common in ((0.03, 0.0), (0.03, 3.0), (0.003, 3.0), (30.0, 3.0)):
        student, teacher = tokens(1, 800, 64, noise=noise, common=common)
        exact = gram_loss(student.double(), teacher.double(), backend="eager")
        found = gram_loss(student, teacher, backend="linear")
        assert abs(float(found) / float(exact) - 1) < 1e-4


def rotated(n, d, noise=0.0003):
    """A student that is its teacher rotated, nearly: tiny loss, large u."""
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(1, n, d, generator=generator)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    return (teacher + noise * torch.randn(1, n, d, generator=generator)) @ rotation, teacher


def test_auto_leaves_the_linear_form_where_its_terms_cancel():
    student, teacher = rotated(768, 384)
    exact = gram_loss(student.double(), teacher.double(), backend="eager")

    def error(backend):
        return abs(float(gram_loss(student, teacher, backend=backend)) / float(exact) - 1)

    assert error("linear") > 1e-2
    assert error("auto") == error("matmul") < 1e-4
    # one bad image is enough, however large the losses beside it
    other = tokens(1, 768, 384, noise=30.0)
    student, teacher = torch.cat((student, other[0])), torch.cat((teacher, other[1]))
    assert not forms.linear(student, teacher, False)[2]
    assert forms.linear(student[1:], teacher[1:], False)[2]


def test_operator_is_well_formed():
    for n, widths, want_grad in (
        (5, 16, True),
        (5, 16, False),
        (40, 16, True),
        (5, (16, 24), True),
    ):
        student, teacher = tokens(2, n, widths, group=4)
        args = student.requires_grad_(want_grad), teacher, "auto", torch.float32, want_grad
        torch.library.opcheck(forms.gram_fused, args)


@pytest.mark.parametrize("widths", [(16, 16), (16, 24), (24, 16)])
@pytest.mark.parametrize("backend", ["auto", "matmul", "linear"])
def test_compiles_without_a_graph_break(backend, widths):
    torch.compiler.reset()  # each case is a first compilation, not the ninth
    student, teacher = tokens(2, 12, widths, group=4)
    compiled = torch.compile(
        lambda s, t: 2 * gram_loss(s, t, backend=backend), backend="aot_eager", fullgraph=True
    )
    student.requires_grad_()
    loss = compiled(student, teacher)
    loss.backward()
    expected = loss_and_grad(student, teacher, backend, scale=2.0)
    torch.testing.assert_close(loss, 2 * expected[0])
    torch.testing.assert_close(student.grad, expected[1])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(student, teacher), loss)


def test_no_gradient_work_without_gradient(monkeypatch):
    wanted = []
    matmul = forms.matmul
    monkeypatch.setattr(forms, "matmul", lambda *args: wanted.append(args[2]) or matmul(*args))
    student, teacher = tokens(1, 4, 8)
    loss = gram_loss(student, teacher.clone().requires_grad_())
    assert not loss.requires_grad
    with torch.no_grad():
        gram_loss(student.requires_grad_(), teacher)
    gram_loss(student, teacher)
    assert wanted == [False, False, True]


def test_loss_used_twice_and_weighted():
    student, teacher = tokens(2, 9, 24)
    student.requires_grad_()
    loss = gram_loss(student, teacher)
    (loss * loss + 3 * loss).backward()
    expected = loss_and_grad(student, teacher, "eager", scale=2 * loss.item() + 3)[1]
    torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=1e-9)


def test_small_float16_gradients_survive_until_the_scaler():
    """A gradient below float16's smallest number, times a loss scale that lifts it above."""
    student, teacher = tokens(512, 20, 16, noise=0.03, common=3.0, dtype=torch.float16)
    exact = loss_and_grad(student.double(), teacher.double(), "eager", scale=2.0**20)[1]
    found = loss_and_grad(student, teacher, "auto", scale=2.0**20)[1].double()
    assert exact.abs().max() / 2**20 < 6e-8
    assert (found - exact).norm() / exact.norm() < 1e-2


def test_factor_is_not_rounded_to_the_gradients_16_bits():
    """Values round either way and average out, a rounded factor would shift them all: by 4e-3."""
    student, teacher = tokens(3, 50, 64, dtype=torch.bfloat16)
    exact = loss_and_grad(student.double(), teacher.double(), "eager", scale=1.0039)[1]
    found = loss_and_grad(student, teacher, "auto", scale=1.0039)[1].double()
    assert abs(float((found * exact).sum() / exact.square().sum()) - 1) < 3e-4


def test_double_backward_is_refused():
    student, teacher = tokens(1, 4, 8)
    student.requires_grad_()
    with pytest.raises(RuntimeError, match="eager"):
        torch.autograd.grad(gram_loss(student, teacher), student, create_graph=True)
    (grad,) = torch.autograd.grad(
        gram_loss(student, teacher, backend="eager"), student, create_graph=True
    )
    grad.square().sum().backward()


@outside
def test_triton_refuses_what_it_cannot_do():
    student, teacher = tokens(1, 4, 8)
    with pytest.raises(RuntimeError, match="cpu" if HAS_TRITON else "triton") as error:
        gram_loss(student, teacher, backend="triton")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cuda"):
        gram_loss(student, teacher, backend="cuda")


def test_serves_where_triton_is_missing(monkeypatch):
    """Also that a wish for it is answered by what to install."""
    forms.kernel_missing.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "kernels.gram", raising=False)
    monkeypatch.delattr("kernels.gram", raising=False)
    student, teacher = tokens(1, 4, 8)
    assert gram_loss(student, teacher) > 0
    with pytest.raises(RuntimeError, match=r"triton >= 3\.5"):
        gram_loss(student, teacher, backend="triton")
    forms.kernel_missing.cache_clear()


@needs_triton
def test_names_what_the_kernel_does_not_support(monkeypatch):
    from kernels import gram

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert "float64" in gram.unsupported(cpu, torch.float64)
    monkeypatch.setattr(gram.triton.knobs.runtime, "interpret", False)
    assert "cpu" in gram.unsupported(cpu, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "7.5" in gram.unsupported(cuda, torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert gram.unsupported(cuda, torch.bfloat16) is None


@needs_triton
def test_an_old_gpu_is_told_once_and_served(monkeypatch, caplog):
    from kernels import gram

    monkeypatch.setattr(gram, "unsupported", lambda device, dtype: "the GPU is too old")
    forms.kernel_missing.cache_clear()
    for _ in range(2):
        assert forms.kernel_missing(torch.device("cuda"), torch.float32) == "the GPU is too old"
    forms.kernel_missing.cache_clear()
    (record,) = caplog.records
    assert "the GPU is too old" in record.message


def test_what_auto_takes(monkeypatch):
    """The linear form from 2 tokens a channel on where its rival multiplies in float32, from 16
    where that is the kernel in 16 bits."""
    for missing, operand, first in (
        ("no kernel", torch.bfloat16, 2),
        (None, torch.float32, 2),
        (None, torch.bfloat16, 16),
    ):
        monkeypatch.setattr(forms, "kernel_missing", lambda *_, missing=missing: missing)
        for n, widths in ((first * 8 - 1, 8), (first * 8, 8), (first * 8, (8, 9))):
            taken = forms.pick(*tokens(1, n, widths), operand)
            quadratic = "matmul" if missing else "triton"
            assert taken == ("linear" if (n, widths) == (first * 8, 8) else quadratic)


def test_the_linear_form_is_not_asked_where_16_bits_would_lose_more(monkeypatch):
    """Where its terms cancel bfloat16 operands lose more: no one reads whether they did."""
    student, teacher = rotated(768, 48)
    kernel, _, exact = rounded_forms(student, teacher, torch.bfloat16)
    linear = errors(loss_and_grad(student, teacher, "linear"), exact)
    assert 1e-2 < linear[0] < errors(kernel, exact)[0] and linear[1] < errors(kernel, exact)[1]

    class Unread:
        def __bool__(self):
            raise AssertionError("the host read a value of the device")

    found = forms.linear(student, teacher, True)
    monkeypatch.setattr(forms, "kernel_missing", lambda *_: None)
    monkeypatch.setattr(forms, "linear", lambda *_: (*found[:2], Unread()))
    loss, grad = forms.gram_fused(student, teacher, "auto", torch.bfloat16, True)
    assert loss.equal(found[0]) and grad.equal(found[1])


class Launches(TorchDispatchMode):
    """Names of the operators that would launch something on a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "empty" not in func.__name__:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@outside
@needs_triton
@pytest.mark.parametrize("n, kernels", [(20, 2), (200, 2), (300, 3)])
def test_a_call_launches_four_things_at_most(n, kernels, monkeypatch):
    """Two kernels, three over 256 tokens, and a sum; the backward pass one."""
    from kernels import gram

    launched = []

    class Stub:
        def __getitem__(self, grid):
            return lambda *args, **constants: launched.append(grid)

    for name in ("unit_kernel", "gram_kernel", "project_kernel"):
        monkeypatch.setattr(gram, name, Stub())
    monkeypatch.setattr(gram, "this_chip", lambda device: ((9, 0), 132))
    student, teacher = tokens(2, n, 64, 4)
    with Launches() as torchs:
        gram.loss_and_grad(student, teacher, torch.bfloat16, True)
    assert len(launched) == kernels and torchs.names == ["sum.default"]
    student.requires_grad_()
    loss, one = gram_loss(student, teacher), torch.ones(())
    with Launches() as torchs:
        torch.autograd.grad(loss, student, one)
    assert torchs.names == ["mul.out"]


@outside
@needs_triton
def test_no_processor_waits_for_work_that_could_be_shared():
    from kernels import gram

    def programs(b, n, d=384):
        plan = gram.plan(b, n, d, d, torch.bfloat16, (9, 0), 132)
        return plan.programs, plan.splits, plan.constants["BM"]

    assert programs(128, 20) == (43, 1, 64)  # three images to a program, not six
    assert programs(512, 20) == (86, 1, 128)  # there six: one wave of larger tiles
    assert programs(128, 60) == (128, 1, 64)
    assert programs(128, 110) == (128, 1, 128)
    assert programs(128, 130) == programs(128, 192) == (384, 1, 64)  # no tile nearly empty
    assert programs(128, 256) == (256, 1, 128)
    assert programs(4, 1024, 768) == (128, 4, 128)  # four programs share a tile's panels
    assert programs(1, 4096) == (128, 4, 128)
    assert programs(1, 16384) == (128, 1, 128)
    for n in (257, 300, 700, 1500):  # every program has a panel
        plan = gram.plan(1, n, 384, 384, torch.bfloat16, (9, 0), 132)
        assert plan.splits <= math.ceil(n / plan.constants["BN"]) and plan.programs <= 132


@outside
@needs_triton
def test_the_table_in_the_kernels_head_is_what_counting_says():
    import counted
    from kernels import gram

    assert counted.table(counted.SHAPES, counted.H100) in gram.__doc__


# ---- the kernels, interpreted: the tests below marked `inside` run in one process of their own,
# since the interpreter's switch changes what @triton.jit makes


@outside
@needs_triton
@pytest.mark.slow
def test_interpreted():
    tests = [test for test in globals().values() if inside.mark in getattr(test, "pytestmark", ())]
    expected = sum(
        math.prod(len(mark.args[1]) for mark in test.pytestmark if mark.name == "parametrize")
        for test in tests
    )
    command = [sys.executable, "-m", "pytest", "-k", "test_kernel_", "-W", "ignore", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    # all of them, or a name that -k does not know would pass with none
    assert expected > 50 and f"\n{expected} passed" in run.stdout, run.stdout[-4000:]


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n", N_SWEEP)
def test_kernel_against_float64(n, dtype):
    for d in (*D_SWEEP, *(WIDTHS if n in (1, 20, 65) else ())) if n <= 256 else (40,):
        b = 7 if n <= 20 else 2 if n < 100 else 1
        student, teacher = tokens(b, n, d, 1 if d in (16, 192, 384) else 4, dtype)
        loss, grad = loss_and_grad(student, teacher, "triton")
        operand = torch.float32 if d in WIDTHS else dtype
        assert_only_rounded(student, teacher, loss, grad, operand)


@inside
@pytest.mark.parametrize("side", [0, 1])
def test_kernel_keeps_nan(side):
    pair = tokens(2, 20, 40, group=4)
    pair[side][1, 3, 5] = torch.nan
    loss, grad = loss_and_grad(*pair, "triton")
    assert loss.isnan() and grad[1].isnan().any()


BUGS = {
    "row mask of the last tile": ("tl.where(same & inside", "tl.where(same"),
    "image mask": ("tl.where(same & inside", "tl.where(inside"),
    "factor 2": ("delta = tl.dot(t, u_j.T, delta,", "tl.dot(t, u_j.T, delta,"),
    "projection": ("g - radial[:, None] * s", "g"),
    "rows for columns": ("height + base + start, k", "height + base + row, k"),
    "the first panels' share": ("if start > first:", "if start > first + BN:"),
    "the programs' shares": ("split * share", "0 * share"),
    "their sum": ("range(splits)", "range(1, splits)"),
    "projection of their sum": ("g - tl.sum(g * s, 1)[:, None] * s", "g"),
    "group of tokens": ("(token * G + g)", "(token + g)"),
    "norm": ("inverse + base + i", "inverse + base + 0 * i"),
    "the student's own width": ("inside & (d < width)", "inside"),
    "the teacher's own width": ("inside & (d < t_width)", "inside & (d < width)"),
}


@inside
@pytest.mark.parametrize("bug", BUGS)
def test_kernel_bugs_are_caught(bug, tmp_path):
    """The rule sees each of these, planted in a copy of the file."""
    from kernels import gram

    right, wrong = BUGS[bug]
    source = Path(gram.__file__).read_text()
    assert right in source
    (tmp_path / "planted.py").write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("planted", tmp_path / "planted.py")
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)

    def check(module):
        # packed, two groups; several tiles and panels, to one program and to three; widths apart
        for b, n, widths, processors in ((5, 20, 24, 1), (2, 150, 24, 1), (1, 150, 24, 9),
                                         (2, 9, (24, 40), 1)):  # fmt: skip
            student, teacher = tokens(b, n, widths, group=4)
            chip = ((8, 0), processors)
            loss, grad = module.loss_and_grad(student, teacher, torch.float32, True, chip=chip)
            assert_only_rounded(student, teacher, loss, grad)

    check(gram)
    with pytest.raises(AssertionError):
        check(planted)


@inside
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("n", [1, 20, 65, 150, 200, 300])
def test_kernel_tiles_agree(n, capability):
    """Every tile shape of every chip, with tensor descriptors and without, one and more panels; on
    a chip that the programs fill, and on one whose processors share a tile's panels."""
    from kernels import gram

    student, teacher = tokens(5 if n < 100 else 2, n, 40, dtype=torch.float16)
    for processors in (1, 200):
        chip = (capability, processors)
        loss, grad = gram.loss_and_grad(student, teacher, torch.float16, True, chip=chip)
        assert grad.dtype == torch.float32
        assert_only_rounded(student, teacher, loss, grad.half(), operand=torch.float16)
        alone, empty = gram.loss_and_grad(student, teacher, torch.float16, False, chip=chip)
        assert alone == loss and empty.numel() == 0


@inside
def test_kernel_takes_over_where_the_linear_form_loses_digits():
    """In float32 the device decides: nothing that the host does depends on what it found."""
    student, teacher = rotated(64, 32)
    exact = loss_and_grad(student.double(), teacher.double(), "eager")
    kernel, auto, linear = (
        loss_and_grad(student, teacher, name) for name in ("triton", "auto", "linear")
    )
    assert all(a.equal(b) for a, b in zip(auto, kernel, strict=True))
    assert errors(kernel, exact)[0] < 1e-3 < errors(linear, exact)[0]
    student, teacher = tokens(2, 64, 32, group=4)
    linear, auto = (loss_and_grad(student, teacher, name) for name in ("linear", "auto"))
    assert all(a.equal(b) for a, b in zip(auto, linear, strict=True))


@inside
def test_kernel_is_deterministic_and_takes_any_strides():
    student, teacher = tokens(3, 21, 40, group=4)
    first = loss_and_grad(student, teacher, "triton")
    turned = student.transpose(0, 2).contiguous().transpose(0, 2)
    sliced = torch.cat((torch.ones(3, 1, 40), student), 1)[:, 1:]  # a class token dropped
    for other in (student, turned, sliced):
        again = loss_and_grad(other, teacher, "triton")
        assert first[0].equal(again[0]) and first[1].equal(again[1])
    expanded = teacher[:1].expand(3, -1, -1)
    torch.testing.assert_close(
        gram_loss(student, expanded, backend="triton"), gram_loss(student, expanded.contiguous())
    )


@inside
def test_kernel_edges():
    student, teacher = tokens(2, 20, 40)
    student[0, 3] = 0
    teacher[1, 5] = 0
    loss, grad = loss_and_grad(student, teacher, "triton", scale=3.0)
    expected = loss_and_grad(student, teacher, "eager", scale=3.0)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(grad, expected[1], rtol=1e-4, atol=1e-8)
    assert grad[0, 3].eq(0).all()
    loss, grad = loss_and_grad(teacher, teacher, "triton")
    assert loss == 0 and grad.eq(0).all()
    with pytest.raises(ValueError, match="student"):
        gram_loss(student[:, :0], teacher[:, :0], backend="triton")


@inside
def test_kernel_in_autocast_rounds_u_and_s_alone():
    """float32 tokens: float16 products, a float32 gradient."""
    student, teacher = tokens(2, 49, 40, noise=0.03, common=3.0)
    with torch.autocast("cpu", torch.float16):
        loss, grad = loss_and_grad(student, teacher, "triton")
    exact = loss_and_grad(student.double(), teacher.double(), "eager")
    assert grad.dtype == torch.float32
    assert 1e-7 < abs(float(loss) / float(exact[0]) - 1) < 1e-3
    assert (grad - exact[1]).norm() / exact[1].norm() < 5e-3


@inside
def test_kernel_gram_loss_is_the_public_name(golden):
    from kernels.gram import gram_loss as fused

    z = golden("a_dinov3_gram")
    for i in range(int(z["n_cases"])):
        student = z[f"c{i}_student"].requires_grad_()
        loss = fused(student, z[f"c{i}_teacher"])
        loss.backward()
        torch.testing.assert_close(loss, z[f"c{i}_noneg0_loss"], rtol=1e-5, atol=0)
        torch.testing.assert_close(student.grad, z[f"c{i}_noneg0_grad"], rtol=1e-4, atol=1e-9)
    z = golden("a_author_hr_gram")
    for i in range(int(z["n_cases"])):
        if int(z[f"c{i}_scale"]) != 3:  # there the author pools the centre token alone
            loss = fused(z[f"c{i}_student"], z[f"c{i}_teacher_hr"])
            torch.testing.assert_close(loss, z[f"c{i}_gram_loss"], rtol=1e-5, atol=0)


# ---- what 16 bits can hold: the kernel's arithmetic in PyTorch, since the interpreter cannot
# multiply bfloat16


def rounded_forms(student, teacher, dtype):
    """(loss, gradient) of the kernel's form and of the textbook's, operands rounded to a dtype and
    sums in float32; and the exact ones."""
    exact = loss_and_grad(student.double(), teacher.double(), "eager")
    s, t = unit(student), unit(teacher)
    scale = 4 / (s.shape[0] * s.shape[1] ** 2) / student.norm(dim=-1, keepdim=True)

    def cut(x):
        return x.to(dtype).float()

    def finish(delta, s):
        g = cut(delta) @ s
        return delta.square().mean(), (g - (g * s).sum(-1, keepdim=True) * s) * scale

    u, s16, t16 = cut(s - t), cut(s), cut(t)
    kernel = finish(u @ s16.mT + cut(s16 - u) @ u.mT, s16)
    textbook = finish(s16 @ s16.mT - t16 @ t16.mT, s16)
    return kernel, textbook, exact


def errors(found, exact):
    loss = abs(float(found[0]) / float(exact[0]) - 1)
    return loss, float((found[1] - exact[1]).norm() / exact[1].norm())


def test_bfloat16_holds_near_the_teacher():
    student, teacher = tokens(1, 256, 384, noise=0.03, common=3.0)
    kernel, textbook, exact = rounded_forms(student, teacher, torch.bfloat16)
    loss, grad = errors(kernel, exact)
    lost_loss, lost_grad = errors(textbook, exact)
    print(f"bfloat16, 3 % from the teacher: loss {loss:.1e}, gradient {grad:.1e}; ", end="")
    print(f"textbook {lost_loss:.1e}, {lost_grad:.1e}")
    assert loss < 1e-2 and grad < 2e-2
    assert lost_loss > 0.5 and lost_grad > 0.5


def test_no_16_bit_form_holds_a_rotated_teacher():
    student, teacher = rotated(256, 384)
    kernel, textbook, exact = rounded_forms(student, teacher, torch.bfloat16)
    assert errors(kernel, exact)[0] > 0.5 and errors(textbook, exact)[0] > 0.5


# ---- ahead of time, without a GPU

SHARED_KB = {80: 163, 90: 227, 100: 227}  # what one program may have on an architecture


def launches():
    """(arch, kernel, tokens, operands, constants, options) of all that "auto" can choose."""
    from kernels import gram

    for arch, operands in itertools.product(SHARED_KB, ("bf16", "fp16", "fp32", "tf32")):
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(operands, torch.float32)
        seen = []
        for n, b in itertools.product((20, 64, 128, 192, 256, 4096), (4096, 1)):
            plan = gram.plan(b, n, 384, 384, dtype, (arch // 10, 0), 132, operands == "tf32")
            if (plan.constants, plan.options) not in seen:
                seen.append((plan.constants, plan.options))
                for want_grad in (True, False):
                    constants = {**plan.constants, "WANT_GRAD": want_grad}
                    yield arch, "gram", "-", operands, constants, plan.options
    pairs = ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "bf16"), ("fp32", "fp32")
    for arch, width, (tokens, operands) in itertools.product(SHARED_KB, (512, 2048), pairs):
        constants = {"WIDTH": width, "ROWS": 2048 // width}  # D of 384 and 1280
        yield arch, "unit", tokens, operands, {"G": 4, **constants}, gram.UNIT_OPTIONS
        yield arch, "project", "-", operands, constants, {}


def compiled(arch, kernel, tokens, operands, constants, options):
    """Compile a kernel for an architecture: (KB of shared memory, bytes of a thread's registers
    that spill, PTX)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels import gram

    function = getattr(gram, f"{kernel}_kernel")
    held = "fp32" if operands == "tf32" else operands
    types = dict.fromkeys(("inverse", "loss", "grad", "sums"), "*fp32")
    types |= dict.fromkeys(("student", "teacher"), f"*{tokens}")
    types |= dict.fromkeys(("pair", "own", "other"), f"*{held}")
    types |= {"skip": "*i1", "scale": "fp32"}
    if operands not in ("fp32", "tf32"):  # there alone the device chooses the form
        constants = {**constants, "skip": None}
    if constants.get("TMA"):
        for name, rows in (("own", "BM"), ("other", "BN")):
            types[name] = f"tensordesc<{held}[{constants[rows]}, {constants['BK']}]>"
    # as a launch has it: channels adjacent, torch's tensors aligned, D a multiple of 16
    constants = {**constants, "s_channel": 1, "t_channel": 1} if kernel == "unit" else constants
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in function.arg_names}
    aligned = "width", "t_width", "pad", "s_image", "s_token", "t_image", "t_token"
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind[0] == "*" or name in aligned
    }
    source = ASTSource(function, signature, constants, attributes)
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        command = [tools / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(arch, kernel, tokens, operands, constants, usage.splitlines()[-1])  # pytest -s
    spilled = int(re.search(r"STACK:(\d+)", usage)[1])
    return result.metadata.shared / 1024, spilled, result.asm["ptx"]


@outside
@needs_triton
def test_every_launch_compiles_fits_and_does_not_spill():
    """Not a byte on the Triton that the CUDA build of torch brings; a few registers on others."""
    most = 0 if importlib.metadata.version("triton") == "3.7.1" else 64
    unit = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    for launch in launches():
        arch, kernel, _, operands, *_ = launch
        shared, spilled, ptx = compiled(*launch)
        assert shared <= SHARED_KB[arch], launch
        if operands in ("bf16", "fp16"):
            assert spilled <= most, launch
            assert kernel != "gram" or unit[arch] in ptx, launch
        if operands == "fp32":  # no tf32 behind the user's back
            assert not any(name in ptx for name in unit.values()), launch


# ---- on a GPU


class TestGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("n", N_SWEEP)
    def test_against_float64(self, n, dtype):
        for d in (*D_SWEEP, 768, 1280):
            student, teacher = tokens(3, n, d, 4, dtype, device="cuda")
            loss, grad = loss_and_grad(student, teacher, "triton")
            assert_only_rounded(student, teacher, loss, grad, operand=dtype)

    def test_near_the_teacher(self):
        student, teacher = tokens(1, 256, 384, noise=0.03, common=3.0, device="cuda")
        exact = loss_and_grad(student.double(), teacher.double(), "eager")
        with torch.autocast("cuda", torch.bfloat16):
            loss, grad = errors(loss_and_grad(student, teacher, "triton"), exact)
        assert loss < 1e-2 and grad < 2e-2

    def test_deterministic_and_compiled_once_for_all_n(self):
        from kernels import gram

        counts = set()
        for n in (130, 144, 201, 255, 256):
            student, teacher = tokens(4, n, 384, dtype=torch.bfloat16, device="cuda")
            first = loss_and_grad(student, teacher, "triton")
            again = loss_and_grad(student, teacher, "triton")
            assert first[0].equal(again[0]) and first[1].equal(again[1])
            counts.add(len(gram.gram_kernel.device_caches[torch.cuda.current_device()][0]))
        assert len(counts) == 1

    def test_tf32_follows_torch(self):
        student, teacher = tokens(2, 100, 384, device="cuda")
        exact = gram_loss(student.double(), teacher.double(), backend="eager")
        loss = gram_loss(student, teacher, backend="triton")
        assert abs(float(loss) / float(exact) - 1) < 1e-5

    def test_extra_memory(self):
        """As training feeds it: u and s in 16 bits, beside a gradient."""
        from bench import extra_memory

        student, teacher = tokens(128, 256, 384, 4, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            extra = extra_memory(gram_loss, student, teacher)
        assert extra <= 1.1 * student.numel() * student.element_size()

    @pytest.mark.parametrize("n", [20, 256, 600, 1024])  # the last two in the linear form
    @pytest.mark.parametrize("autocast", [True, False])
    def test_no_host_waits_and_a_graph_captures_it(self, n, autocast):
        student, teacher = tokens(2, n, 32, 4, device="cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            expected = loss_and_grad(student, teacher, "auto")
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                loss_and_grad(student, teacher, "auto")
            finally:
                torch.cuda.set_sync_debug_mode("default")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = loss_and_grad(student, teacher, "auto")
        graph.replay()
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))

    def test_processors_that_share_panels_agree(self):
        from kernels import gram

        student, teacher = tokens(1, 2000, 384, dtype=torch.bfloat16, device="cuda")
        capability, _ = gram.this_chip(student.device)
        for processors in (1, 132, 1000):
            chip = (capability, processors)
            loss, grad = gram.loss_and_grad(student, teacher, torch.bfloat16, True, chip=chip)
            assert_only_rounded(student, teacher, loss, grad.bfloat16(), operand=torch.bfloat16)
            again = gram.loss_and_grad(student, teacher, torch.bfloat16, True, chip=chip)
            assert loss.equal(again[0]) and grad.equal(again[1])

    def test_takes_over_where_the_linear_form_loses_digits(self):
        student, teacher = (x.cuda() for x in rotated(768, 48))
        auto, kernel = (loss_and_grad(student, teacher, name) for name in ("auto", "triton"))
        assert all(a.equal(b) for a, b in zip(auto, kernel, strict=True))
