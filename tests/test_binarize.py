"""Quantizers against closed forms, on grids that hold zero and both ends."""

import numpy as np
import pytest
import reference
import torch

from bnnbook import binarize

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA GPU"))]  # fmt: skip
GRID = [-3.0, -1.0, -0.5, -1e-7, -0.0, 0.0, 1e-7, 0.5, 1.0, 3.0, float("inf"), -float("inf")]


def grid(dtype, device="cpu", finite=False):
    values = [v for v in GRID if not finite or abs(v) < 10]
    return torch.tensor(values, dtype=dtype, device=device, requires_grad=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantizer", [binarize.sign, binarize.ste_sign])
def test_sign_is_one_bit_and_never_zero(quantizer, dtype, device):
    x = grid(dtype, device)
    y = quantizer(x)
    assert y.dtype == dtype
    assert y.device == x.device
    assert y.tolist() == [reference.sign(v) for v in x.tolist()]


@pytest.mark.parametrize("value", [0.0, -0.0, 5e-324])
def test_sign_of_zero_is_plus_one(value):
    assert binarize.sign(torch.tensor(value, dtype=torch.float64)).item() == 1.0


def test_sign_carries_no_gradient_and_keeps_its_input():
    x = grid(torch.float32)
    assert not binarize.sign(x).requires_grad
    assert [str(v) for v in x.tolist()] == [str(v) for v in torch.tensor(GRID).tolist()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip_value", [1.0, 0.5, None])
def test_straight_through_gradient(clip_value, dtype, device):
    x = grid(dtype, device)
    upstream = torch.arange(1.0, len(x) + 1, dtype=dtype, device=device)
    binarize.ste_sign(x, clip_value).backward(upstream)
    inside = [clip_value is None or abs(v) <= clip_value for v in x.tolist()]
    assert x.grad.tolist() == [g * i for g, i in zip(upstream.tolist(), inside, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_sigmoid(dtype):
    x = grid(dtype)
    y = binarize.hard_sigmoid(x)
    expected = [reference.hard_sigmoid(v) for v in x.tolist()]
    tolerance = 0.004 if dtype == torch.bfloat16 else 5e-4 if dtype == torch.float16 else 1e-7
    np.testing.assert_allclose(y.tolist(), expected, atol=tolerance)


def test_hard_sigmoid_gradient():
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], requires_grad=True)
    binarize.hard_sigmoid(x).sum().backward()
    assert x.grad.tolist() == [0, 0.5, 0.5, 0.5, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_sign_is_unbiased_with_variance_one_minus_w_squared(dtype, device):
    w = torch.tensor([-1.0, -0.75, 0.0, 0.25, 1.0], dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(0)
    draws = binarize.stochastic_sign(w.expand(100_000, 5), generator)
    assert set(draws.flatten().tolist()) == {-1.0, 1.0}
    assert draws.dtype == dtype
    draws = draws.double()
    np.testing.assert_allclose(draws.mean(0).tolist(), w.tolist(), atol=0.01)
    np.testing.assert_allclose(draws.var(0).tolist(), (1 - w.double() ** 2).tolist(), atol=0.01)


def test_stochastic_sign_is_certain_at_and_beyond_one():
    w = torch.tensor([-5.0, -1.0, 1.0, 5.0]).expand(50_000, 4)
    assert binarize.stochastic_sign(w).unique(dim=0).tolist() == [[-1, -1, 1, 1]]


def test_stochastic_sign_passes_the_gradient_everywhere():
    w = grid(torch.float32, finite=True)
    upstream = torch.arange(1.0, len(w) + 1)
    binarize.stochastic_sign(w).backward(upstream)
    assert w.grad.tolist() == upstream.tolist()


def test_stochastic_sign_follows_its_generator():
    w = torch.zeros(1000)
    first = binarize.stochastic_sign(w, torch.Generator().manual_seed(3))
    again = binarize.stochastic_sign(w, torch.Generator().manual_seed(3))
    other = binarize.stochastic_sign(w, torch.Generator().manual_seed(4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# the warning is torch's own, from tracing autograd functions
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("quantizer", [
    binarize.ste_sign, lambda w: binarize.ste_sign(w, None), binarize.stochastic_sign,
    lambda w: binarize.sign(w) * w,
])  # fmt: skip
def test_quantizers_compile_without_graph_breaks_and_keep_their_gradient(quantizer):
    """In-place operations in an autograd function once made the compiled gradient zero."""
    w = grid(torch.float32, finite=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda v: quantizer(v).sum(), fullgraph=True, backend="aot_eager")
    compiled(w).backward()
    (expected,) = torch.autograd.grad(quantizer(w).sum(), w)
    assert torch.equal(w.grad, expected)
    assert expected.any()
