"""Quantizers against closed forms, on grids that hold zero, both ends and their neighbours."""

import functools
import math

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
    number = torch.finfo(dtype)
    beside = [1 - number.eps, 1 + number.eps, number.tiny, number.tiny * number.eps, number.max]
    values = [v for v in GRID + beside + [-v for v in beside] if not finite or abs(v) < 10]
    return torch.tensor(values, dtype=dtype, device=device, requires_grad=True)


def gradient(quantizer, x):
    """The quantizer's slope at x, as plain numbers."""
    (slope,) = torch.autograd.grad(quantizer(x), x, torch.ones_like(x))
    assert slope.dtype == x.dtype
    return slope.double().cpu().numpy()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantizer", [
    binarize.sign, binarize.ste_sign, binarize.approx_sign, binarize.swish_sign,
])  # fmt: skip
def test_sign_is_one_bit_and_never_zero(quantizer, dtype, device):
    x = grid(dtype, device)
    y = quantizer(x)
    assert y.dtype == dtype
    assert y.device == x.device
    assert y.tolist() == [reference.sign(v) for v in x.tolist()]


@pytest.mark.parametrize("value", [0.0, -0.0, 5e-324])
def test_sign_of_zero_is_plus_one(value):
    assert binarize.sign(torch.tensor(value, dtype=torch.float64)).item() == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 100])  # short and long tensors take different code paths
def test_sign_of_what_is_not_a_number_is_one_bit_too(length, dtype):
    x = torch.tensor([math.nan, -math.nan], dtype=dtype).repeat(length)
    assert set(binarize.sign(x).abs().tolist()) == {1.0}


def test_sign_keeps_shape_and_memory_format():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert binarize.sign(x).stride() == x.stride()
    assert binarize.sign(x[..., 0]).shape == (2, 3, 4)
    assert binarize.sign(torch.tensor(-0.0, dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", ["sign", "ste_sign", "approx_sign", "swish_sign"])
def test_sign_refuses_other_numbers_by_the_name_of_their_dtype(name, dtype):
    with pytest.raises(TypeError, match=f"floating-point numbers, not {dtype}"):
        getattr(binarize, name)(torch.ones(3, dtype=dtype))


def test_sign_carries_no_gradient_and_keeps_its_input():
    x = torch.tensor(GRID, requires_grad=True)
    assert not binarize.sign(x).requires_grad
    assert [str(v) for v in x.tolist()] == [str(v) for v in torch.tensor(GRID).tolist()]


@pytest.mark.parametrize("name", ["sign", "ste_sign", "approx_sign", "swish_sign"])
def test_sign_survives_flushing_of_subnormal_numbers(name):
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-45, -1e-30])
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        y = getattr(binarize, name)(x)
    finally:
        torch.set_flush_denormal(False)
    assert y.abs().tolist() == [1] * 5
    assert y[[0, 1, 2, 4]].tolist() == [1, 1, 1, -1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip_value", [1.0, 0.5, None])
def test_straight_through_gradient(clip_value, dtype, device):
    x = grid(dtype, device)
    upstream = torch.arange(1.0, len(x) + 1, dtype=dtype, device=device)
    binarize.ste_sign(x, clip_value).backward(upstream)
    inside = [clip_value is None or abs(v) <= clip_value for v in x.tolist()]
    assert x.grad.tolist() == [g * i for g, i in zip(upstream.tolist(), inside, strict=True)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip_value", [1e-3, 0.3, 1.0, 1.7, 2.0, 3.3, 100.0])
def test_straight_through_gradient_ends_between_two_neighbouring_numbers(
    clip_value, dtype, device
):
    edge = torch.tensor(clip_value, dtype=dtype)
    after = edge.double().item() + math.ldexp(
        torch.finfo(dtype).eps, math.frexp(edge.item())[1] - 1
    )
    x = torch.tensor([edge, -edge, after, -after], dtype=dtype, device=device, requires_grad=True)
    assert gradient(lambda v: binarize.ste_sign(v, clip_value), x).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("clip_value", [0, -1.0, math.inf, math.nan])
def test_straight_through_refuses_a_clip_value_that_means_nothing(clip_value):
    with pytest.raises(ValueError, match="positive number or None"):
        binarize.ste_sign(torch.zeros(3), clip_value)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_approx_sign_is_a_tent(dtype, device):
    x = grid(dtype, device)
    expected = [2 - 2 * abs(v) if abs(v) <= 1 else 0 for v in x.tolist()]
    np.testing.assert_allclose(gradient(binarize.approx_sign, x), expected,
                               rtol=0, atol=torch.finfo(dtype).eps)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [1.0, 5.0])
def test_gradient_of_swish_sign(beta, dtype, device):
    x = grid(dtype, device)
    # beyond 600 / beta the slope is 0 in every dtype, and cosh would overflow
    u = beta * np.clip(x.detach().double().cpu().numpy(), -600 / beta, 600 / beta)
    expected = beta * (2 - u * np.tanh(u / 2)) / (1 + np.cosh(u))
    slope = gradient(functools.partial(binarize.swish_sign, beta=beta), x)
    np.testing.assert_allclose(slope, expected, rtol=0, atol=4 * beta * torch.finfo(dtype).eps)


def test_swish_sign_in_numbers():
    """Height beta, least value -0.369 for beta = 5, sign change where beta |x| = 2.399."""
    x = torch.linspace(-3, 3, 600_001, dtype=torch.float64, requires_grad=True)
    slope = gradient(binarize.swish_sign, x)
    assert slope.max() == slope[300_000] == 5
    assert slope.min() == pytest.approx(-0.369, abs=5e-4)
    crossing = 5 * x[300_000:][torch.tensor(slope[300_000:] < 0)][0].item()
    assert crossing == pytest.approx(2.399, abs=5e-4)


@pytest.mark.parametrize("beta", [0, -5.0, math.inf, math.nan])
def test_swish_sign_refuses_a_beta_that_is_not_positive(beta):
    with pytest.raises(ValueError, match="beta must be a positive number"):
        binarize.swish_sign(torch.zeros(3), beta)


@pytest.mark.parametrize(("quantizer", "second_moment"), [
    (binarize.ste_sign, 2 / 3), (binarize.approx_sign, 1 / 3), (binarize.swish_sign, None),
])  # fmt: skip
def test_areas_and_second_moments_of_the_pseudo_gradients(quantizer, second_moment):
    """Each slope integrates to 2, the height of the step it stands for."""
    x = torch.linspace(-20, 20, 400_001, dtype=torch.float64, requires_grad=True)
    slope = torch.tensor(gradient(quantizer, x))
    assert torch.trapezoid(slope, x).item() == pytest.approx(2, abs=2e-4)
    if second_moment is not None:
        moment = torch.trapezoid(slope * x**2, x).item()
        assert moment == pytest.approx(second_moment, abs=2e-4)


# --- Scales and more than one bit --------------------------------------------------------------

SHAPES = [(3, 5), (4, 2, 3, 3), (2, 3, 2, 3, 3)]  # linear, convolution, one dimension more


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip_value", [1.0, None])
@pytest.mark.parametrize("shape", SHAPES)
def test_magnitude_aware_sign_scales_each_output_channel(shape, clip_value, dtype, device):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    w.view(shape[0], -1)[0, :3] = torch.tensor([0.0, 1.0, -3.0])
    w.requires_grad_()
    forward, backward = np.empty(shape), np.empty(shape)
    for channel, weights in enumerate(w.detach().double().cpu().numpy()):
        kappa = sum(abs(v) for v in weights.flatten()) / weights.size
        forward[channel] = kappa * np.vectorize(reference.sign)(weights)
        backward[channel] = kappa * (True if clip_value is None else np.abs(weights) <= clip_value)
    quantizer = functools.partial(binarize.magnitude_aware_sign, clip_value=clip_value)
    y = quantizer(w)
    assert y.dtype == dtype
    tolerance = 2 * torch.finfo(dtype).eps
    np.testing.assert_allclose(y.detach().double().cpu().numpy(), forward, rtol=tolerance)
    np.testing.assert_allclose(gradient(quantizer, w), backward, rtol=tolerance)


def test_magnitude_aware_sign_of_zeros_is_zero():
    assert binarize.magnitude_aware_sign(torch.zeros(2, 3)).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("shape", [(), (4,)])
def test_magnitude_aware_sign_needs_output_channels(shape):
    with pytest.raises(ValueError, match="output channels and inputs"):
        binarize.magnitude_aware_sign(torch.ones(shape))


def levels(bits):
    """All values that k bits can stand for, in [0, 1]."""
    return np.arange(2**bits) / (2**bits - 1)


def dorefa(x, bits):
    """Round to the nearest of the levels, one number at a time; Python, too, rounds to even."""
    n = 2**bits - 1
    return [round(n * min(max(v, 0.0), 1.0)) / n for v in x]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_dorefa_activation(bits, dtype, device):
    x = torch.cat([grid(dtype, device).detach(),
                   torch.tensor([0.25, 1 / 6, 0.501, 2.0], device=device).to(dtype)])  # fmt: skip
    x.requires_grad_()
    quantizer = functools.partial(binarize.dorefa_activation, bits=bits)
    y = quantizer(x)
    assert y.dtype == dtype
    # half way between two levels, to the precision of the dtype, either may be chosen
    n = 2**bits - 1
    exact = torch.tensor(x.tolist(), dtype=torch.float64) * n
    decided = (exact % 1 - 0.5).abs() > n * torch.finfo(dtype).eps
    expected = torch.tensor(dorefa(x.tolist(), bits), dtype=dtype)
    assert y[decided].tolist() == expected[decided].tolist()
    known = torch.tensor(levels(bits), dtype=dtype).tolist()
    assert set(y.tolist()) <= set(known)
    assert gradient(quantizer, x).tolist() == [0 <= v <= 1 for v in x.tolist()]


def test_dorefa_activation_has_a_gradient_at_zero_where_denormals_are_flushed():
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            x = torch.tensor([-0.1, -0.0, 0.0, 1.0, 1.1], dtype=dtype, requires_grad=True)
            binarize.dorefa_activation(x).sum().backward()
            assert x.grad.tolist() == [0, 1, 1, 1, 0]
    finally:
        torch.set_flush_denormal(False)


def test_dorefa_activation_rounds_halves_to_even():
    half = torch.tensor(0.5, dtype=torch.float64)
    quantized = [binarize.dorefa_activation(half, bits).item() for bits in (1, 2, 3)]
    assert quantized == [0, 2 / 3, 4 / 7]  # of 0.5, 1.5 and 3.5 steps


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_dorefa_weight(bits, dtype, device):
    w = torch.linspace(-2.1, 1.6, 50).to(device, dtype).requires_grad_()
    quantizer = functools.partial(binarize.dorefa_weight, bits=bits)
    y = quantizer(w)
    assert y.dtype == dtype
    squashed = np.tanh(w.detach().double().cpu().numpy())
    x = squashed / (2 * np.abs(squashed).max()) + 0.5
    decided = np.abs(x * (2**bits - 1) % 1 - 0.5) > 0.05
    expected = 2 * np.array(dorefa(x, bits)) - 1
    assert decided.mean() > 0.5
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(y.detach().double().cpu().numpy()[decided], expected[decided],
                               rtol=0, atol=eps)  # fmt: skip
    if bits == 1:
        assert set(y.tolist()) == {-1.0, 1.0}
    slope = (1 - squashed**2) / np.abs(squashed).max()
    np.testing.assert_allclose(gradient(quantizer, w), slope, rtol=0, atol=2 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_is_minus_one_to_dorefa_and_plus_one_to_ste_sign(dtype):
    w = torch.tensor([0.0, -0.0, 0.5, -0.5], dtype=dtype)
    assert binarize.dorefa_weight(w).tolist() == [-1, -1, 1, -1]
    assert binarize.ste_sign(w).tolist() == [1, 1, 1, -1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dorefa_weight_of_zeros_is_not_nan(dtype):
    w = torch.zeros(4, dtype=dtype, requires_grad=True)
    assert binarize.dorefa_weight(w).tolist() == [-1] * 4


@pytest.mark.parametrize("bits", [0, 9, -1, 1.5])
@pytest.mark.parametrize("quantizer", [binarize.dorefa_activation, binarize.dorefa_weight])
def test_dorefa_refuses_other_numbers_of_bits(quantizer, bits):
    with pytest.raises(ValueError, match="from 1 to 8"):
        quantizer(torch.ones(3), bits)


# --- All of them -------------------------------------------------------------------------------

QUANTIZERS = {
    "ste_sign": binarize.ste_sign,
    "identity": functools.partial(binarize.ste_sign, clip_value=None),
    "approx_sign": binarize.approx_sign,
    "swish_sign": binarize.swish_sign,
    "magnitude_aware_sign": binarize.magnitude_aware_sign,
    "dorefa_activation": functools.partial(binarize.dorefa_activation, bits=2),
    "dorefa_weight": functools.partial(binarize.dorefa_weight, bits=2),
    "stochastic_sign": binarize.stochastic_sign,
}
by_name = pytest.mark.parametrize("name", QUANTIZERS)


@by_name
def test_no_more_than_one_tensor_is_kept_for_the_backward_pass(name):
    w = torch.randn(8, 100, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t,
                                                  lambda t: t):  # fmt: skip
        QUANTIZERS[name](w)
    assert sum(size == w.numel() for size in kept) <= 1
    assert sum(size for size in kept if size != w.numel()) <= len(w)  # a scale for each channel


@by_name
@pytest.mark.parametrize("device", DEVICES)
def test_quantizers_keep_their_input_and_its_dtype_under_autocast(name, device):
    w = torch.randn(4, 30, device=device, requires_grad=True)
    before = w.detach().clone()
    expected = (QUANTIZERS[name](w), gradient(QUANTIZERS[name], w))
    with torch.autocast(device, dtype=torch.bfloat16):
        y = QUANTIZERS[name](w)
    (slope,) = torch.autograd.grad(y, w, torch.ones_like(y))
    assert torch.equal(w, before)
    assert y.dtype == slope.dtype == torch.float32
    assert name == "stochastic_sign" or torch.equal(y, expected[0])
    np.testing.assert_allclose(slope.double().cpu().numpy(), expected[1], rtol=1e-6)


@by_name
def test_a_gradient_that_is_not_contiguous_is_taken_as_it_is(name):
    w = torch.randn(6, 4, requires_grad=True)
    upstream = torch.randn(4, 6).T
    (expected,) = torch.autograd.grad(QUANTIZERS[name](w), w, upstream.contiguous())
    (slope,) = torch.autograd.grad(QUANTIZERS[name](w), w, upstream)
    assert torch.equal(slope, expected)


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
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [None, False])
def test_quantizers_compile_without_graph_breaks_and_keep_their_gradient(dynamic, device):
    """In-place operations in an autograd function once made the compiled gradient zero."""
    quantizers = [*QUANTIZERS.values(), lambda w: binarize.sign(w) * w]

    def each_sum(w):
        return torch.stack([quantizer(w).sum() for quantizer in quantizers])

    w = grid(torch.float32, device, finite=True)[:, None].detach().requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(each_sum, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    sums, expected_sums = compiled(w), each_sum(w)
    for name, upstream in zip([*QUANTIZERS, "sign"], torch.eye(len(quantizers)), strict=True):
        upstream = upstream.to(device)
        (slope,) = torch.autograd.grad(sums, w, upstream, retain_graph=True)
        (expected,) = torch.autograd.grad(expected_sums, w, upstream, retain_graph=True)
        torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-6, msg=name)
        assert expected.any(), name
    same = [name != "stochastic_sign" for name in [*QUANTIZERS, "sign"]]
    torch.testing.assert_close(sums[same], expected_sums[same])


class Quantize(torch.nn.Module):
    """What torch.export and torch.jit.trace take: one quantizer as a module."""

    def __init__(self, name):
        super().__init__()
        self.quantizer = QUANTIZERS[name]

    def forward(self, w):
        return self.quantizer(w)


DRAWN = "stochastic_sign"
by_fixed_name = pytest.mark.parametrize("name", [name for name in QUANTIZERS if name != DRAWN])


@by_fixed_name
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exported_quantizer_is_the_same_and_has_an_onnx_form(name, dtype):
    """ONNX knows neither copysign nor a largest number without the dimension it is taken along."""
    w = grid(dtype, finite=True).detach()[:, None]
    exported = torch.export.export(Quantize(name), (w,), strict=False)
    assert torch.equal(exported.module()(w), QUANTIZERS[name](w))
    calls = [node for node in exported.graph.nodes if node.op == "call_function"]
    names = {node.target.name() for node in calls}
    assert not {n for n in names if "copysign" in n or "signbit" in n}
    assert all(len(node.args) > 1 for node in calls if node.target.name() == "aten::amax")


# torch is about to retire torch.jit, and says so in a warning
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@by_name
@pytest.mark.parametrize("gradients", [True, False])
def test_a_traced_quantizer_can_be_saved(name, gradients, tmp_path):
    w = grid(torch.float32, finite=True).detach()[:, None]
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(Quantize(name), w, check_trace=name != DRAWN)
    traced.save(tmp_path / "traced.pt")
    again = torch.jit.load(tmp_path / "traced.pt")(w)
    assert again.shape == w.shape
    assert name == DRAWN or torch.equal(again, QUANTIZERS[name](w))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_certain_draw_is_certain_in_half_precision_too(dtype):
    """A draw in half precision would round up to 1 now and then."""
    torch.manual_seed(0)
    ones = torch.ones(1_000_000, dtype=dtype)
    assert (binarize.stochastic_sign(ones) == 1).all()
    assert (binarize.stochastic_sign(-ones) == -1).all()


@pytest.mark.parametrize("name", ["ste_sign", "approx_sign", "swish_sign", "dorefa_activation"])
def test_quantizers_work_under_torch_func(name):
    quantizer = getattr(binarize, name)
    x = torch.tensor([-1.5, -0.4, 0.2, 0.9], requires_grad=True)
    (expected,) = torch.autograd.grad(quantizer(x).sum(), x)
    assert torch.equal(torch.func.grad(lambda v: quantizer(v).sum())(x.detach()), expected)
    rows = torch.func.vmap(torch.func.grad(lambda v: quantizer(v).sum()))(x.detach().view(2, 2))
    assert torch.equal(rows.flatten(), expected)


@pytest.mark.parametrize("name", ["magnitude_aware_sign", "dorefa_weight", "stochastic_sign"])
def test_weights_side_by_side_are_quantized_each_by_itself_under_torch_func(name):
    """Each has its own scale, largest magnitude or draw."""
    several = torch.tensor([[[-1.5, -0.4, 0.2]], [[0.9, 0.1, -3.0]]])
    of_one = torch.func.grad(lambda w: QUANTIZERS[name](w).sum())
    slopes = torch.func.vmap(of_one, randomness="different")(several)
    for w, slope in zip(several, slopes, strict=True):
        expected = gradient(QUANTIZERS[name], w.clone().requires_grad_())
        np.testing.assert_allclose(slope, expected, rtol=1e-6)


def test_not_even_the_least_number_that_can_be_drawn_turns_a_certain_minus_one(monkeypatch):
    """torch.rand returns exactly 0 about once in 2^24 draws."""
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))
    w = torch.tensor([-3.0, -1.0, -0.999, 1.0])
    assert binarize.stochastic_sign(w).tolist() == [-1, -1, 1, 1]


def test_integers_and_an_empty_weight_are_told_apart():
    for integers in (torch.tensor([[1, 2]]), torch.tensor([[True]])):
        with pytest.raises(TypeError, match="floating-point"):
            binarize.magnitude_aware_sign(integers)
    assert binarize.dorefa_weight(torch.ones(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_hard_sigmoid_has_no_slope_just_beyond_its_ends(dtype):
    x = torch.tensor(
        [-1.0, 1.0, -1 - torch.finfo(dtype).eps, 1 + torch.finfo(dtype).eps], dtype=dtype
    )
    x.requires_grad_()
    binarize.hard_sigmoid(x).sum().backward()
    assert x.grad.tolist() == [0.5, 0.5, 0, 0]


def test_a_clip_value_beyond_all_numbers_clips_none_but_infinity():
    x = torch.tensor([3e38, math.inf], requires_grad=True)
    binarize.ste_sign(x, 1e39).sum().backward()
    assert x.grad.tolist() == [1, 0]
    with pytest.raises(ValueError, match="clip_value must be a positive number"):
        binarize.ste_sign(x, torch.tensor(0.5))
