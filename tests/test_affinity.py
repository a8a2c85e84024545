import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import affinity
from affinity import SpatialAffinity, gram_loss, hr_index, pool_to_mr, token_mse

gram_eager = partial(gram_loss, backend="eager")


def pair(b, n, d, group=1, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(b, n, d, generator=generator, dtype=torch.float64)
    teacher = torch.randn(b, n * group, d, generator=generator, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


def loss_and_grad(loss, student, teacher, scale=1.0):
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    (value * scale).backward()
    return value.detach(), student.grad


def slow_gram(student, teacher, group):
    """The definition, token pair by token pair, in float64."""
    total, (b, n, _) = 0.0, student.shape
    for image in range(b):
        s = [v.double() / v.double().norm() for v in student[image]]
        t = [v.double().mean(0) for v in teacher[image].split(group)]
        t = [v / v.norm() for v in t]
        for i in range(n):
            for j in range(n):
                total += float(s[i] @ s[j] - t[i] @ t[j]) ** 2
    return total / (b * n * n)


# ---- index and pooling


def test_hr_index_author(golden):
    z = golden("e_author_masks")
    assert hr_index(z["lmim_grid14_in"], (14, 14), 2).equal(z["lmim_grid14_out"])
    assert hr_index(z["lmim_grid14_in"], (14, 14), 3).equal(z["lmim_grid14_s3_out"])
    assert hr_index(z["ijepa_grid16_in"], (16, 16), 2).equal(z["ijepa_grid16_out"])


@pytest.mark.parametrize("ratio", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (7, 2)])
def test_hr_index_covers_the_same_ground(grid, ratio):
    # paint every HR token with the id of the MR token it lies on, and read it back
    mr_ids = torch.arange(grid[0] * grid[1]).view(grid)
    painted = mr_ids.repeat_interleave(ratio, 0).repeat_interleave(ratio, 1).flatten()
    index = mr_ids.flatten()[None].flip(1)
    found = hr_index(index, grid, ratio)
    assert painted[found].equal(index.repeat_interleave(ratio**2, 1))
    assert found.sort(1).values.equal(torch.arange(painted.numel())[None])


def test_pool_is_the_mean_of_the_ground():
    tokens = torch.randn(2, 5 * 9, 4)
    torch.testing.assert_close(pool_to_mr(tokens, 3), tokens.view(2, 5, 9, 4).mean(2))
    assert pool_to_mr(tokens.bfloat16(), 3).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="45"):
        pool_to_mr(tokens, 2)


# ---- the loss against the public implementations; `test_gram.py` does the same for the kernel


BACKENDS = ["eager", "auto", "matmul", "linear"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gram_dinov3(golden, backend):
    z = golden("a_dinov3_gram")
    for i in range(int(z["n_cases"])):
        loss, grad = loss_and_grad(
            partial(gram_loss, backend=backend), z[f"c{i}_student"], z[f"c{i}_teacher"]
        )
        torch.testing.assert_close(loss, z[f"c{i}_noneg0_loss"], rtol=1e-5, atol=0)
        torch.testing.assert_close(grad, z[f"c{i}_noneg0_grad"], rtol=1e-4, atol=1e-9)
        exact = gram_loss(z[f"c{i}_student"].double(), z[f"c{i}_teacher"].double(), backend=backend)
        torch.testing.assert_close(exact, z[f"c{i}_f64_loss"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gram_and_mse_author(golden, backend):
    gram = partial(gram_loss, backend=backend)

    z = golden("a_author_hr_gram")
    for i in range(int(z["n_cases"])):
        student, teacher, scale = z[f"c{i}_student"], z[f"c{i}_teacher_hr"], int(z[f"c{i}_scale"])
        if scale == 3:  # the author's bilinear pooling keeps the centre token alone; ours is a mean
            teacher = teacher.unflatten(1, (-1, 9))[:, :, 4]
        for name, function in (("gram", gram), ("mse", token_mse)):
            loss, grad = loss_and_grad(function, student, teacher)
            torch.testing.assert_close(loss, z[f"c{i}_{name}_loss"], rtol=1e-5, atol=0)
            torch.testing.assert_close(grad, z[f"c{i}_{name}_grad"], rtol=1e-4, atol=1e-8)


# ---- the loss against its definition and its identities


@pytest.mark.parametrize(
    "n, d, group", [(1, 16, 1), (2, 40, 4), (7, 16, 9), (20, 64, 4), (49, 40, 1)]
)
def test_gram_slow_loop(n, d, group):
    student, teacher = pair(2, n, d, group)
    slow = slow_gram(student, teacher, group)
    for backend in BACKENDS:
        loss = float(gram_loss(student, teacher, backend=backend))
        # at n = 1 the loss is zero: its terms have squares of eps left, those of linear eps itself
        assert loss == pytest.approx(slow, rel=1e-5, abs=1e-6 if backend == "linear" else 1e-12)


@pytest.mark.parametrize("function", [gram_eager, gram_loss, token_mse])
def test_gradient_is_exact(function):
    student, teacher = pair(2, 5, 8, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda s: function(s, teacher), student.requires_grad_())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gram_identities(backend):
    gram_loss = partial(affinity.gram_loss, backend=backend)
    student, teacher = pair(3, 12, 16, dtype=torch.float64)
    loss = gram_loss(student, teacher)
    rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    order = torch.randperm(12)
    scale = torch.rand(3, 12, 1, dtype=torch.float64) + 0.5
    assert gram_loss(student, student) == 0
    for other in (
        gram_loss(student @ rotation, teacher),
        gram_loss(student[:, order], teacher[:, order]),
        gram_loss(student * scale, teacher),
        gram_loss(teacher, student),
    ):
        torch.testing.assert_close(other, loss)


@pytest.mark.parametrize("function", [gram_eager, gram_loss, token_mse])
def test_autocast_does_not_reach_inside(function):
    student, teacher = pair(2, 20, 64, 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = function(student, teacher)
    assert inside.dtype == torch.float32
    assert inside == function(student, teacher)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_strides(dtype):
    student, teacher = pair(2, 9, 24, dtype=dtype)
    turned = student.transpose(0, 2).contiguous().transpose(0, 2)
    loss, grad = loss_and_grad(gram_loss, turned, teacher.expand(2, -1, -1), scale=3.0)
    reference, exact = loss_and_grad(gram_loss, student.double(), teacher.double(), scale=3.0)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    "function", [*(partial(gram_loss, backend=b) for b in BACKENDS), token_mse]
)
def test_zero_token_gets_zero_gradient(function):
    student, teacher = pair(1, 4, 8)
    student[0, 2] = 0
    _, grad = loss_and_grad(function, student, teacher)
    assert grad[0, 2].eq(0).all() and grad.isfinite().all() and grad[0, 1].ne(0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_teacher_gets_no_gradient(backend):
    student, teacher = pair(1, 4, 8)
    gram_loss(student.requires_grad_(), teacher.requires_grad_(), backend=backend).backward()
    assert teacher.grad is None


@pytest.mark.parametrize(
    "student, teacher",
    [
        ((2, 0, 8), (2, 0, 8)),
        ((2, 4, 8), (2, 6, 8)),
        ((2, 4, 8), (2, 0, 8)),
        ((2, 4, 8), (2, 4, 0)),
        ((2, 4, 8), (3, 4, 8)),
        ((4, 8), (4, 8)),
    ],
)
def test_shapes_are_checked(student, teacher):
    for function in (gram_eager, gram_loss, token_mse):
        with pytest.raises(ValueError, match=re.escape(str(student))) as error:
            function(torch.zeros(student), torch.zeros(teacher))
        assert str(teacher) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("n, widths", [(1, (16, 8)), (7, (16, 24)), (20, (40, 16))])
def test_gram_of_another_width_slow_loop(n, widths):
    """Gram matrices are N x N, however wide the tokens are."""
    student, teacher = pair(2, n, max(widths), 4)
    student, teacher = student[..., : widths[0]], teacher[..., : widths[1]]
    slow = slow_gram(student, teacher, 4)
    for backend in BACKENDS:
        loss = float(gram_loss(student, teacher, backend=backend))
        assert loss == pytest.approx(slow, rel=1e-5, abs=1e-6 if backend == "linear" else 1e-12)
    with pytest.raises(ValueError, match=f"{widths[1]} wide.* {widths[0]} wide"):
        token_mse(student, teacher)


@pytest.mark.parametrize("side", [0, 1])
def test_a_nan_token_gives_nan(side):
    tokens = pair(2, 4, 8)
    tokens[side][1, 2, 3] = torch.nan
    assert gram_eager(*tokens).isnan() and token_mse(*tokens).isnan()


# ---- the add-on


def test_spatial_affinity_is_the_loss_on_the_same_ground():
    """A teacher whose HR tokens are the student's, repeated over the ground: no loss at all."""
    grid, ratio = (3, 4), 2
    mr = torch.randn(2, 12, 8)
    image = mr.mT.unflatten(2, grid)  # (B, D, rows, cols)
    hr = image.repeat_interleave(ratio, 2).repeat_interleave(ratio, 3)
    index = torch.tensor([[0, 5, 11], [2, 3, 4]])
    seen = []

    def encode(hr, index):
        seen.append(torch.is_grad_enabled())
        return torch.take_along_dim(hr.flatten(2).mT, index[..., None], 1)

    tokens = torch.take_along_dim(mr, index[..., None], 1).requires_grad_()
    affinity = SpatialAffinity(encode, ratio)
    assert affinity(tokens, index, hr, grid) < 1e-12
    assert seen == [False]
    other = affinity(tokens, index, hr.flip(2), grid)
    expected = gram_loss(
        tokens, torch.take_along_dim(image.flip(2).flatten(2).mT, index[..., None], 1)
    )
    torch.testing.assert_close(other, expected)
    torch.testing.assert_close(
        SpatialAffinity(encode, ratio, token_mse)(tokens, index, hr, grid), F.mse_loss(mr, mr)
    )


def add_on(teacher, ratio=2, **options):
    """SpatialAffinity with a teacher that gives these tokens; on (tokens, grid, hr)."""
    affinity = SpatialAffinity(lambda hr, index: teacher, ratio, **options)

    def call(tokens, grid=(2, 3), hr=None):
        index = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
        return affinity(tokens, index, hr, grid)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("loss", [gram_loss, token_mse])
def test_centred_after_pooling_and_before_the_norm(loss, dtype):
    student, teacher = pair(2, 6, 16, 4, dtype)
    rows = student.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = add_on(teacher, loss=loss, centre=True)(rows)
    expected = 0.0
    for s, t in zip(student.double(), teacher.double(), strict=True):  # image by image
        t = torch.stack([ground.mean(0) for ground in t.split(4)])
        s, t = s - s.mean(0), t - t.mean(0)
        expected += float(loss(s[None], t[None])) / 2
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    (grad,) = torch.autograd.grad(found, rows)
    # what all tokens of an image share has no effect: the gradient has no mean
    assert grad.float().sum(1).abs().max() < 0.05 * grad.float().abs().sum(1).max()
    shifted = add_on(teacher + 2, loss=loss, centre=True)(student + 3)
    assert float(shifted) == pytest.approx(expected, rel=0.1 if dtype == torch.bfloat16 else 1e-4)
    assert abs(float(add_on(teacher, loss=loss)(student)) / expected - 1) > 0.01


def test_exact_hides_autocast_from_the_loss():
    seen = []

    def loss(student, teacher):
        seen.append((student.dtype, teacher.dtype, torch.is_autocast_enabled("cpu")))
        return gram_loss(student, teacher)

    half, full = torch.bfloat16, torch.float32
    student, teacher = pair(2, 6, 16, 4, half)
    with torch.autocast("cpu", half):
        add_on(teacher, loss=loss)(student)
        add_on(teacher, loss=loss, exact=True)(student)
        add_on(teacher, loss=loss, centre=True)(student)
        add_on(teacher, loss=loss, centre=True, exact=True)(student)
    assert seen == [
        (half, half, True),
        (full, full, False),
        (full, full, True),
        (full, full, False),
    ]


def test_an_hr_image_of_another_grid_is_refused():
    """24 x 24 tokens where ratio 2 of 8 x 8 asks for 16 x 16."""
    student, teacher = pair(1, 6, 16, 4)
    call = add_on(teacher, patch=4)
    assert call(student, (8, 8), torch.zeros(1, 3, 64, 64)) > 0
    for height, width, found in ((96, 96, "24 x 24"), (64, 96, "16 x 24"), (66, 64, "16.5 x 16")):
        with pytest.raises(ValueError, match=f"{found}.*16 x 16") as error:
            call(student, (8, 8), torch.zeros(1, 3, height, width))
        assert "\n" not in str(error.value)
    assert add_on(teacher)(student, (8, 8), torch.zeros(1, 3, 96, 96)) > 0  # patch not said


def test_the_teachers_tokens_are_counted():
    student, teacher = pair(1, 6, 16, 9)  # as many as ratio 3 has: they would pool, to nonsense
    for options in ({}, {"centre": True}):
        with pytest.raises(ValueError, match="54"):
            add_on(teacher, **options)(student)
