"""Optimizers of binary weights against their literal twins and against each other."""

import copy
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

from bnnbook import data, layers, optim, probes, training
from bnnbook.binarize import approx_sign, magnitude_aware_sign, sign, ste_sign
from bnnbook.models import binaryconnect_cnn, binaryconnect_mlp
from tests import reference

CNN = [28.04, 39.19, 48.00, 55.43, 67.88, 78.38, 78.38, 36.95, 26.26]
SVHN = [20.05, 27.71, 33.94, 39.19, 48.00, 55.43, 58.42, 36.95, 26.26]


def test_each_parameter_is_in_exactly_one_list():
    model = binaryconnect_mlp(6, (5, 4), 3)
    binary, real = optim.split_parameters(model)
    listed = sorted(id(p) for p in binary + real)
    assert listed == sorted({id(p) for p in model.parameters()})
    assert [tuple(p.shape) for p in binary] == [(5, 6), (4, 5), (3, 4)]


def test_a_shared_weight_is_listed_once():
    first, second = layers.BinaryLinear(3, 3), layers.BinaryLinear(3, 3)
    second.weight = first.weight
    binary, real = optim.split_parameters(nn.Sequential(first, second, nn.Linear(3, 3)))
    assert len(binary) == 1
    assert len(real) == 2


def test_decided_by_type_not_by_name():
    model = nn.ModuleDict({"binary_quant": nn.Linear(2, 2), "plain": layers.BinaryLinear(2, 2)})
    binary, _ = optim.split_parameters(model)
    assert binary == [model["plain"].weight]


def test_a_model_without_binary_layers_is_refused():
    with pytest.raises(ValueError, match="no binary layer"):
        optim.split_parameters(nn.Linear(2, 2))


@pytest.mark.parametrize(("network", "expected"), [
    (binaryconnect_mlp, [34.72, 36.95, 36.95, 26.26]),
    (lambda: binaryconnect_mlp(hidden=(2048,) * 3), [43.45, 52.26, 52.26, 37.04]),
    (binaryconnect_cnn, CNN),
    (lambda: binaryconnect_cnn(widths=(64, 128, 256)), SVHN),
])  # fmt: skip
def test_glorot_coefficients_of_the_papers_networks(network, expected):
    found = [1 / optim.glorot_coefficient(layer) for layer in layers.binary_layers(network())]
    assert found == pytest.approx(expected, abs=0.01)


def test_the_glorot_coefficient_of_an_expert_layer_is_that_of_one_expert():
    experts = layers.ExpertBinaryConv2d(4, 6, 3, experts=5)
    one = layers.BinaryConv2d(4, 6, 3)
    assert optim.glorot_coefficient(experts) == optim.glorot_coefficient(one)


@pytest.mark.parametrize("power", [0, 1, 2])
def test_scaled_groups_cover_all_parameters(power):
    model = binaryconnect_mlp(6, (5,), 3)
    groups = optim.glorot_scaled_groups(model, 0.1, power)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert groups[-1]["lr"] == 0.1
    assert groups[0]["lr"] == pytest.approx(0.1 * ((6 + 5) / 1.5) ** (power / 2))


def test_scaled_groups_refuse_another_power():
    with pytest.raises(ValueError, match="power must be"):
        optim.glorot_scaled_groups(binaryconnect_mlp(4, (3,), 2), 0.1, 3)


@pytest.mark.parametrize(("kind", "options", "power"), [
    (torch.optim.SGD, {}, 2),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, 2),
    (torch.optim.Adam, {"eps": 0.0}, 1),
])  # fmt: skip
def test_scaling_equals_training_a_network_of_plus_minus_h(kind, options, power):
    """SGD on ±H with η is SGD on ±1 with η/H²; ADAM needs one factor only (H a power of two)."""
    bound, rate = 2.0**-5, 2.0**-9
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 20, generator=generator).double()
    target = torch.randn(64, 8, generator=generator).double()
    start = (2 * torch.rand(8, 20, generator=generator) - 1).double()

    def binary_after(h, lr, steps=200):
        w = nn.Parameter(start * h)
        optimizer = kind([w], lr=lr, **options)
        history = []
        for _ in range(steps):
            w_b = (h * sign(w)).requires_grad_()
            out = x @ w_b.T
            out = (out - out.mean(0)) / out.std(0)  # batch norm, without its epsilon
            (w.grad,) = torch.autograd.grad((out - target).square().mean(), w_b)
            optimizer.step()
            with torch.no_grad():
                w.clamp_(-h, h)
            history.append(sign(w))
        return torch.stack(history)

    scaled, plain = binary_after(1.0, rate / bound**power), binary_after(bound, rate)
    assert torch.equal(scaled, plain)
    assert (scaled[1:] != scaled[:-1]).any()


def test_clip_after_step_and_its_removal():
    model = nn.Sequential(layers.BinaryLinear(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    handle = optim.clip_after_step(optimizer, model)
    for clipped in (True, False):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        assert (model[0].weight.abs().max() <= 1) == clipped
        handle.remove()


def test_zero_gradient_flips_nothing():
    model = nn.Sequential(layers.BinaryLinear(50, 50))
    with torch.no_grad():
        model[0].weight[0] = 0.0
    before = model[0].binary_weight().clone()
    optimizer = torch.optim.Adam(optim.glorot_scaled_groups(model, 0.1, 1)[:1])
    optim.clip_after_step(optimizer, model)
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    for _ in range(20):
        optimizer.step()
    assert torch.equal(model[0].binary_weight(), before)


# --- Three rules, one family ---------------------------------------------------------------------

SHAPES = [(7,), (3, 5), (4, 3, 2, 2)]
RULES = {
    "CascadedEMA": (optim.CascadedEMA, {"alpha": 0.05, "gamma": 0.3}),
    "Bop": (optim.Bop, {"gamma": 0.05, "threshold": 0.02}),
    "LatentSGD": (optim.LatentSGD, {"lr": 0.5, "gamma": 0.3, "weight_decay": 0.1, "clip": 1.0}),
}
each_rule = pytest.mark.parametrize("rule", RULES)
BINARY_RULES = ["CascadedEMA", "Bop"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA"))]  # fmt: skip


def weights_of(values, dtype=torch.float64, device="cpu"):
    return [nn.Parameter(torch.tensor(value, dtype=dtype, device=device)) for value in values]


def run(optimizer, weights, gradients, schedulers=()):
    """Step through (steps, ...) gradients, one array a weight; return the signs after each."""
    history = []
    for step in range(len(gradients[0])):
        for weight, values in zip(weights, gradients, strict=True):
            weight.grad = torch.as_tensor(values[step]).to(weight)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        history.append(torch.cat([sign(weight).flatten() for weight in weights]))
    return torch.stack(history)


def noise(steps, *shapes, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.normal(size=(steps, *shape)) for shape in shapes]


def start(*shapes, seed=1):
    return [np.sign(values) for (values,) in noise(1, *shapes, seed=seed)]


def make(rule, weights, **more):
    kind, options = RULES[rule]
    return kind(weights, **options, **more)


def twin_step(rule, w, buffers, gradient, options):
    if rule == "Bop":
        w, *buffers = reference.bop_step(w, *buffers, gradient, **options)
    elif rule == "CascadedEMA":
        w, *buffers = reference.cascaded_ema_step(w, *buffers, gradient, **options)
    else:
        w, *buffers = reference.latent_sgd_step(w, *buffers, gradient, **options)
    return w, buffers


@each_rule
@pytest.mark.parametrize("device", DEVICES)
def test_equals_its_literal_twin_bit_for_bit(rule, device):
    gradients, twins = noise(100, *SHAPES), start(*SHAPES)
    weights = weights_of(twins, device=device)
    optimizer = make(rule, weights)
    buffers = [[np.zeros_like(w) for _ in optimizer.buffers(optimizer.param_groups[0])]
               for w, weight in zip(twins, weights, strict=True)]  # fmt: skip
    for step in range(100):
        run(optimizer, weights, [values[step : step + 1] for values in gradients])
        for i, weight in enumerate(weights):
            twins[i], buffers[i] = twin_step(rule, twins[i], buffers[i], gradients[i][step],
                                             RULES[rule][1])  # fmt: skip
            assert np.array_equal(weight.detach().cpu().numpy(), twins[i])
            for buffer, twin in zip(optimizer.state[weight].values(), buffers[i], strict=True):
                assert np.array_equal(buffer.cpu().numpy(), twin)


@pytest.mark.usefixtures("compiler")
@each_rule
def test_the_compiled_update_gives_the_same_bits(rule):
    gradients, values = noise(30, *SHAPES), start(*SHAPES)
    pairs = []
    for fused in (False, True):
        weights = weights_of(values, torch.float32)
        optimizer = make(rule, weights, fused=fused)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        pairs.append((run(optimizer, weights, gradients, [schedule]), weights, optimizer))
    (signs, eager, first), (others, compiled, second) = pairs
    assert torch.equal(signs, others)
    for weight, other in zip(eager, compiled, strict=True):
        assert torch.equal(weight, other)
        for name, buffer in first.state[weight].items():
            assert torch.equal(buffer, second.state[other][name])


@pytest.mark.usefixtures("compiler")
def test_a_new_rate_does_not_compile_anew():
    (weight,) = weights_of(start((8,)))
    optimizer = optim.Bop([weight], gamma=0.5, threshold=0.0, fused=True)
    run(optimizer, [weight], noise(2, (8,)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(optimizer, [weight], noise(5, (8,)), [lr_scheduler.ExponentialLR(optimizer, 0.9)])


@pytest.mark.parametrize("lr", [2.0**-6, 0.5, 16.0])
@pytest.mark.parametrize("gamma", [1.0, 0.1])
def test_latent_sgd_from_zero_is_the_cascade_whatever_its_learning_rate(lr, gamma):
    """Facts A3, S11: g = -λw exactly, when λ is a power of two: the same roundings."""
    alpha, gradients = 0.01, noise(1500, (40,))
    decay = 2.0 ** np.round(np.log2(alpha / lr))
    alpha = lr * decay
    (latent,), (binary,) = weights_of([np.zeros(40)]), weights_of([np.ones(40)])
    sgd = optim.LatentSGD([latent], lr=lr, gamma=gamma, weight_decay=decay)
    ema = optim.CascadedEMA([binary], alpha=alpha, gamma=gamma)
    assert torch.equal(run(sgd, [latent], gradients), run(ema, [binary], gradients))
    assert torch.equal(ema.state[binary]["filtered_gradient"], -decay * latent)


@pytest.mark.parametrize("lr", [0.003, 0.7])
def test_latent_sgd_from_zero_flips_as_the_cascade_for_any_other_decay(lr):
    gradients = noise(1500, (40,))
    (latent,), (binary,) = weights_of([np.zeros(40)]), weights_of([np.ones(40)])
    sgd = optim.LatentSGD([latent], lr=lr, gamma=0.1, weight_decay=0.01 / lr)
    ema = optim.CascadedEMA([binary], alpha=0.01, gamma=0.1)
    assert torch.equal(run(sgd, [latent], gradients), run(ema, [binary], gradients))


def test_latent_weights_are_the_filter_plus_a_start_that_is_forgotten():
    """Facts S3: w = -g/λ + w_0 (1 - α)^i."""
    lr, decay, gradients, begin = 0.2, 0.05, noise(400, (30,)), noise(1, (30,), seed=5)[0][0]
    (latent,), (binary,) = weights_of([begin]), weights_of([np.ones(30)])
    run(optim.LatentSGD([latent], lr, gamma=0.1, weight_decay=decay), [latent], gradients)
    ema = optim.CascadedEMA([binary], alpha=lr * decay, gamma=0.1)
    run(ema, [binary], gradients)
    g = ema.state[binary]["filtered_gradient"]
    expected = -g / decay + torch.tensor(begin) * (1 - lr * decay) ** 400
    torch.testing.assert_close(latent.detach(), expected, rtol=1e-11, atol=1e-12)


def test_bop_without_threshold_is_the_first_order_cascade():
    """Facts B2, S14."""
    gradients = noise(1500, (40,))
    (one,), (two,) = weights_of(start((40,))), weights_of(start((40,)))
    bop = run(optim.Bop([one], gamma=0.02, threshold=0.0), [one], gradients)
    assert torch.equal(bop, run(optim.CascadedEMA([two], 0.02, 1.0), [two], gradients))
    assert (bop[1:] != bop[:-1]).any()


@pytest.mark.parametrize(("lr", "momentum", "decay"), [(0.1, 0.9, 1e-4), (0.05, 0.5, 0.2)])
def test_torch_sgd_is_a_cascade_of_other_rates(lr, momentum, decay):
    """Facts A7: alpha and gamma are the roots of x² - (1 - μ + ηλ) x + ηλ, not ηλ and 1 - μ."""
    alpha, gamma = np.sort(np.roots([1, -(1 - momentum + lr * decay), lr * decay]))
    gradients = noise(1500, (40,))
    (latent,), (binary,), (naive,) = (weights_of([np.ones(40) * x]) for x in (0, 1, 1))
    torch_sgd = torch.optim.SGD([latent], lr, momentum=momentum, weight_decay=decay)
    signs = run(torch_sgd, [latent], gradients)
    assert torch.equal(signs, run(optim.CascadedEMA([binary], alpha, gamma), [binary], gradients))
    as_it_looks = optim.CascadedEMA([naive], lr * decay, 1 - momentum)
    assert not torch.equal(signs, run(as_it_looks, [naive], gradients))


# --- What does not matter, and what does ---------------------------------------------------------


def trained_signs(scale_start=1.0, steps=300, kappa=None, **options):
    """The binary weights after each step of training a small binary network by LatentSGD."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 12, generator=generator).sign()
    target = torch.randint(4, (64,), generator=generator)
    latent = [
        nn.Parameter(0.1 * scale_start * torch.randn(shape, generator=generator))
        for shape in [(16, 12), (4, 16)]
    ]
    optimizer, history = optim.LatentSGD(latent, **options), []
    for _ in range(steps):
        a = x
        for w in latent:
            product = F.linear(ste_sign(a), (kappa or partial(ste_sign, clip_value=None))(w))
            a = (product - product.mean(0)) / product.std(0)  # batch norm, without its epsilon
        optimizer.zero_grad()
        F.cross_entropy(a, target).backward()
        optimizer.step()
        history.append(torch.cat([sign(w).flatten() for w in latent]))
    return torch.stack(history)


BASE = {"lr": 0.03, "gamma": 0.1, "weight_decay": 0.3}


@pytest.mark.parametrize("s", [2.0**-7, 4.0])
def test_scaling_start_and_rate_with_decay_unscaled_changes_no_binary_weight(s):
    """Facts A6.1, S7; theorem 1 of Helwegen et al. with weight decay put right."""
    scaled = trained_signs(s, **BASE | {"lr": s * 0.03, "weight_decay": 0.3 / s})
    signs = trained_signs(**BASE)
    assert torch.equal(signs, scaled)
    assert (signs[1:] != signs[:-1]).any(1).sum() > 50


def test_theorem_one_holds_without_decay():
    plain = BASE | {"weight_decay": 0.0}
    assert torch.equal(trained_signs(**plain), trained_signs(0.25, **plain | {"lr": 0.25 * 0.03}))


def test_scaling_with_the_decay_kept_changes_the_run():
    """Facts A6.2, S8."""
    assert not torch.equal(trained_signs(**BASE), trained_signs(4.0, **BASE | {"lr": 0.12}))


def test_clipping_breaks_the_scaling_unless_it_is_scaled_too():
    """Facts A6.7, S9."""
    clipped = BASE | {"clip": 0.1}
    scaled = {"lr": 0.25 * 0.03, "gamma": 0.1, "weight_decay": 0.3 / 0.25}
    signs = trained_signs(**clipped)
    assert not torch.equal(signs, trained_signs(**BASE))  # it is active
    assert not torch.equal(signs, trained_signs(0.25, **scaled, clip=0.1))
    assert torch.equal(signs, trained_signs(0.25, **scaled, clip=0.25 * 0.1))


class KappaForward(torch.autograd.Function):
    """Bi-Real Net's released code: the scale multiplies forward, and is left out backward."""

    @staticmethod
    def forward(ctx, w):
        return sign(w) * w.abs().mean(1, keepdim=True)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize(("kappa", "power", "same"), [
    (KappaForward.apply, 2, True), (KappaForward.apply, 1, False),
    (partial(magnitude_aware_sign, clip_value=None), 1, True),
    (partial(magnitude_aware_sign, clip_value=None), 2, False),
])  # fmt: skip
def test_the_scale_of_a_channel_matters_only_when_left_out_backward(kappa, power, same):
    """Facts A6.8, S10: which learning rate goes with a start scaled by s, s or s²."""
    s, plain = 0.25, {"lr": 0.03, "gamma": 0.1, "weight_decay": 0.0}
    signs = trained_signs(kappa=kappa, **plain)
    scaled = trained_signs(s, kappa=kappa, **plain | {"lr": 0.03 * s**power})
    assert torch.equal(signs, scaled) == same


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**9])
def test_the_cascade_does_not_see_the_scale_of_a_gradient_and_bop_does(factor):
    """Facts A6.5, S12."""
    (gradients,) = noise(600, (40,))
    factors = np.where(np.arange(40) % 2, factor, 1.0)

    def signs(rule, values):
        (weight,) = weights_of(start((40,)))
        return run(make(rule, [weight]), [weight], [values])

    assert torch.equal(signs("CascadedEMA", gradients), signs("CascadedEMA", factors * gradients))
    assert not torch.equal(signs("Bop", gradients), signs("Bop", factors * gradients))


def test_the_first_step_of_the_cascade_flips_half():
    """Facts A8, S13: afterwards every weight is minus the sign of its first gradient."""
    (weight,) = weights_of(start((100, 100)))
    before = weight.detach().clone()
    (gradients,) = noise(1, (100, 100), seed=9)
    run(optim.CascadedEMA([weight], 1e-3, 0.1), [weight], [gradients])
    assert np.array_equal(weight.detach().numpy(), -np.sign(gradients[0]))
    assert (weight != before).double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_bop_flips_less_with_a_higher_threshold_and_a_lower_gamma():
    """Facts S19."""
    (gradients,) = noise(2000, (200,))

    def flips(gamma, threshold):
        (weight,) = weights_of(start((200,)))
        signs = run(optim.Bop([weight], gamma, threshold), [weight], [gradients])
        return (signs[1001:] != signs[1000:-1]).double().mean().item()

    by_threshold = [flips(0.01, tau) for tau in (0, 0.02, 0.05, 0.1)]
    by_gamma = [flips(gamma, 0.05) for gamma in (0.003, 0.01, 0.1)]
    assert by_threshold == sorted(set(by_threshold), reverse=True)
    assert by_gamma == sorted(set(by_gamma))


# --- Schedules -----------------------------------------------------------------------------------

SCHEDULES = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 40),
    "linear": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, 40),
    "step": lambda o: lr_scheduler.MultiStepLR(o, [15, 30], 0.1),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10, 2),
    "constant, then linear": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 1.0), lr_scheduler.LinearLR(o, 1.0, 0.0, 20)], [20]),
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rule", BINARY_RULES)
def test_torch_schedulers_decay_alpha_and_gamma(rule, schedule):
    (twin,), (gradients,) = start((30,)), noise(40, (30,))
    (weight,) = weights_of([twin])
    optimizer = make(rule, [weight])
    scheduler = SCHEDULES[schedule](optimizer)
    options = dict(RULES[rule][1])
    buffers, seen = [np.zeros(30)] * (1 + (rule == "CascadedEMA")), []
    for gradient in gradients:
        seen.append(optimizer.param_groups[0]["lr"])
        options[optimizer.lr_name] = seen[-1]
        run(optimizer, [weight], [gradient[None]], [scheduler])
        twin, buffers = twin_step(rule, twin, buffers, gradient, options)
        assert np.array_equal(weight.detach().numpy(), twin)
    assert seen[0] == RULES[rule][1][optimizer.lr_name]
    assert min(seen) < 0.5 * seen[0]


@pytest.mark.parametrize("begin", [0.3, 1 / 3, 0.7])
@pytest.mark.parametrize("rule", BINARY_RULES)
def test_a_linear_schedule_may_end_a_rounding_beside_zero(rule, begin):
    """LinearLR's recursion can end at -3e-20."""
    (weight,) = weights_of(start((4,)))
    optimizer = make(rule, [weight])
    for steps in (3, 6, 7, 30):
        optimizer.param_groups[0]["lr"] = 0.01
        optimizer.param_groups[0].pop("initial_lr", None)
        scheduler = lr_scheduler.LinearLR(optimizer, begin, 0.0, steps)
        run(optimizer, [weight], noise(steps + 3, (4,)), [scheduler])
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_a_linear_schedule_may_end_a_rounding_beside_one():
    (weight,) = weights_of(start((4,)))
    optimizer = optim.CascadedEMA([weight], 0.1, 1.0)
    for steps in range(2, 30):
        lent = optim.rate_as_lr(optimizer, "gamma")
        optimizer.param_groups[0].update(gamma=1.0)
        optimizer.param_groups[0].pop("initial_gamma", None)
        scheduler = lr_scheduler.LinearLR(lent, 0.1, 1.0, steps)
        run(optimizer, [weight], noise(steps + 2, (4,)), [scheduler])


def test_a_schedule_may_take_gamma_to_one_and_back():
    """The average of a step with gamma 1 is its gradient, which the next step must still know."""
    gradients = noise(60, (40,))
    (latent,), (binary,) = weights_of([np.zeros(40)]), weights_of([np.ones(40)])
    sgd = optim.LatentSGD([latent], lr=0.5, gamma=1.0, weight_decay=2.0**-5)
    ema = optim.CascadedEMA([binary], alpha=2.0**-6, gamma=1.0)
    rates = [1, 0.5, 0.1, 1]  # each for ten steps
    steps = [
        lr_scheduler.LambdaLR(optim.rate_as_lr(o, "gamma"), lambda i: rates[i // 10 % 4])
        for o in (sgd, ema)
    ]
    signs = run(sgd, [latent], gradients, steps[:1])
    assert torch.equal(signs, run(ema, [binary], gradients, steps[1:]))


def test_weights_that_must_stay_binary_are_not_for_latent_rules():
    layer = layers.BinaryLinear(4, 3, weight_quantizer=None)
    rule = optim.LatentSGD([layer.weight], 0.1)
    layer.weight.grad = torch.ones_like(layer.weight)
    with pytest.raises(ValueError, match="LatentSGD holds a weight that must stay ±1"):
        rule.step()
    assert layer.weight.abs().eq(1).all()


def test_learning_rate_decay_is_alpha_decay():
    """Facts A5, S4: with the same cosine, and the decay fixed, every sign is the same."""
    gradients = noise(2000, (40,))
    (latent,), (binary,) = weights_of([np.zeros(40)]), weights_of([np.ones(40)])
    sgd = optim.LatentSGD([latent], lr=0.5, gamma=0.1, weight_decay=2.0**-5)
    ema = optim.CascadedEMA([binary], alpha=2.0**-6, gamma=0.1)
    cosines = [lr_scheduler.CosineAnnealingLR(o, 2000) for o in (sgd, ema)]
    signs = run(sgd, [latent], gradients, cosines[:1])
    assert torch.equal(signs, run(ema, [binary], gradients, cosines[1:]))
    assert ema.param_groups[0]["lr"] == 0.0


def test_alpha_decay_needs_the_cascade_and_not_the_direct_form():
    """Facts A4, S5: the recursion in g alone, with alpha_i put in, is another filter."""
    gamma, steps = 0.1, 400
    alphas = 0.02 * (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2
    (x,) = noise(steps, ())
    (weight,) = weights_of([np.ones(())])
    optimizer, cascade = optim.CascadedEMA([weight], 0.02, gamma), []
    naive, right, q = [0.0, 0.0], [0.0, 0.0], 1 - gamma
    for i, a in enumerate(alphas):
        optimizer.param_groups[0]["lr"] = a
        run(optimizer, [weight], [x[i : i + 1]])
        cascade.append(optimizer.state[weight]["filtered_gradient"].item())
        naive.append(a * gamma * x[i] + (2 - a - gamma) * naive[-1] - (1 - a) * q * naive[-2])
        before = alphas[i - 1] if i else a
        r = a / before
        right.append(a * gamma * x[i] + (1 - a + q * r) * right[-1]
                     - q * (1 - before) * r * right[-2])  # fmt: skip
    scale = np.abs(cascade).max()
    assert np.abs(np.array(right[2:]) - cascade).max() < 1e-12 * scale
    assert np.abs(np.array(naive[2:]) - cascade).max() > 1e-3 * scale


@each_rule
def test_a_rate_of_zero_freezes_and_one_beyond_is_refused(rule):
    (weight,) = weights_of(start((40,)))
    optimizer = make(rule, [weight])
    run(optimizer, [weight], noise(20, (40,)))
    optimizer.param_groups[0]["lr"] = 0.0
    assert len(run(optimizer, [weight], noise(20, (40,), seed=4)).unique(dim=0)) == 1
    name = "lr" if rule != "LatentSGD" else "gamma"
    for rate in (1.5, -0.1, math.nan):
        optimizer.param_groups[0][name] = rate
        with pytest.raises(ValueError, match=r"must stay in \[0, 1\]"):
            run(optimizer, [weight], noise(1, (40,)))


def test_any_rate_can_be_lent_to_a_scheduler_and_resumed():
    def make_all():
        (weight,) = weights_of(start((20,)))
        optimizer = optim.CascadedEMA([weight], 0.05, 0.8)
        lent = optim.rate_as_lr(optimizer, "gamma")
        schedulers = [lr_scheduler.CosineAnnealingLR(lent, 30), SCHEDULES["linear"](optimizer)]
        return weight, optimizer, schedulers

    (gradients,) = noise(30, (20,))
    weight, optimizer, schedulers = make_all()
    whole = run(optimizer, [weight], [gradients], schedulers)
    assert optimizer.param_groups[0]["gamma"] == pytest.approx(0, abs=1e-9)
    weight, optimizer, schedulers = make_all()
    first = run(optimizer, [weight], [gradients[:11]], schedulers)
    saved = [weight.detach().clone(), *(part.state_dict() for part in (optimizer, *schedulers))]
    weight, optimizer, schedulers = make_all()
    weight.data.copy_(saved[0])
    for part, state in zip((optimizer, *schedulers), saved[1:], strict=True):
        part.load_state_dict(state)
    rest = run(optimizer, [weight], [gradients[11:]], schedulers)
    assert torch.equal(torch.cat([first, rest]), whole)


def test_a_schedule_of_a_lent_rate_is_taken_up_at_its_last_epoch():
    """torch looks there for the rate it began with, here initial_gamma, and wants it only then."""
    optimizer = make("CascadedEMA", weights_of(start((2,))))
    lent = optim.rate_as_lr(optimizer, "gamma")
    with pytest.raises(KeyError, match="initial_lr"):
        lr_scheduler.ExponentialLR(lent, 0.5, last_epoch=3)
    lr_scheduler.ExponentialLR(lent, 0.5)
    again = lr_scheduler.LambdaLR(lent, lambda epoch: 1 / (1 + epoch), last_epoch=3)
    assert optimizer.param_groups[0]["gamma"] == again.get_last_lr()[0] == 0.3 / 5


def test_a_rate_that_is_not_there_cannot_be_lent():
    with pytest.raises(ValueError, match="no rate 'beta' in the groups; known: gamma, lr"):
        optim.rate_as_lr(make("CascadedEMA", weights_of(start((2,)))), "beta")


# --- Edge cases ----------------------------------------------------------------------------------


@each_rule
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_zero_gradient_never_flips(rule, zero):
    (weight,) = weights_of(start((200,)), torch.float32)
    optimizer = make(rule, [weight])
    if rule == "Bop":
        optimizer.param_groups[0]["threshold"] = 0.0
    before = sign(weight)
    assert (run(optimizer, [weight], [np.full((300, 200), zero)]) == before).all()


@pytest.mark.parametrize("rule", BINARY_RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_become_and_stay_exactly_binary(rule, dtype):
    weight = nn.Parameter(torch.randn(50, 20).to(dtype))
    weight.data[0] = 0.0
    optimizer = make(rule, [weight])
    assert torch.equal(weight[1:].detach(), sign(weight[1:])), "made ±1 by their signs"
    (gradients,) = noise(50, (50, 20))
    signs = run(optimizer, [weight], [gradients])
    assert weight.dtype == dtype
    assert set(weight.flatten().tolist()) == {-1.0, 1.0}
    assert (signs[1:] != signs[:-1]).any()


@pytest.mark.parametrize("rule", BINARY_RULES)
def test_a_weight_that_starts_at_zero_becomes_either_sign(rule):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(10_000))
    make(rule, [weight])
    assert set(weight.tolist()) == {-1.0, 1.0}
    assert weight.mean().item() == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("rule", BINARY_RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_have_float32_buffers(rule, dtype):
    """Their flips are those of a float32 weight, also after the state was saved and loaded."""
    (gradients,) = noise(200, (40,))
    gradients = torch.tensor(gradients).to(dtype)
    (half,), (full,) = weights_of(start((40,)), dtype), weights_of(start((40,)), torch.float32)
    first = make(rule, [half])
    signs = run(first, [half], [gradients[:100]])
    state = first.state_dict()
    second = make(rule, [half])
    second.load_state_dict(state)
    assert {b.dtype for b in second.state[half].values()} == {torch.float32}
    signs = torch.cat([signs, run(second, [half], [gradients[100:]])])
    assert torch.equal(signs.float(), run(make(rule, [full]), [full], [gradients.float()]))


@each_rule
def test_state_dict_round_trip(rule, tmp_path):
    gradients, values = noise(60, *SHAPES), start(*SHAPES)
    weights = weights_of(values)
    whole = run(make(rule, weights), weights, gradients)
    weights = weights_of(values)
    optimizer = make(rule, weights)
    run(optimizer, weights, [g[:25] for g in gradients])
    torch.save([optimizer.state_dict(), [w.detach() for w in weights]], tmp_path / "state.pt")
    state, values = torch.load(tmp_path / "state.pt", weights_only=True)
    weights = [nn.Parameter(value) for value in values]
    optimizer = make(rule, weights)
    optimizer.load_state_dict(state)
    assert torch.equal(run(optimizer, weights, [g[25:] for g in gradients]), whole[25:])


@each_rule
def test_binary_values_survive_being_saved_in_bfloat16(rule):
    """Signs of latent weights too, and a run goes on from buffers that were saved so."""
    (weight,) = weights_of(start((40,)), torch.float32)
    optimizer = make(rule, [weight])
    run(optimizer, [weight], noise(30, (40,)))
    small = nn.Parameter(weight.detach().bfloat16().float())
    assert torch.equal(sign(small), sign(weight))
    state = optimizer.state_dict()
    state["state"] = {0: {k: v.bfloat16() for k, v in state["state"][0].items()}}
    resumed = make(rule, [small])
    resumed.load_state_dict(state)
    assert all(buffer.dtype == torch.float32 for buffer in resumed.state[small].values())
    run(resumed, [small], noise(5, (40,)))


@each_rule
def test_sparse_gradients_are_those_of_the_dense_tensor(rule):
    (one,), (two,) = weights_of(start((20, 3))), weights_of(start((20, 3)))
    dense, sparse = make(rule, [one]), make(rule, [two])
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        gradient = torch.randn(20, 3, generator=generator).double()
        gradient[torch.rand(20, generator=generator) < 0.7] = 0
        one.grad, two.grad = gradient, gradient.to_sparse()
        dense.step()
        sparse.step()
    assert torch.equal(one, two)


@each_rule
def test_a_weight_without_gradient_is_left_alone(rule):
    with_gradient, without = weights_of(start((5,), (5,)))
    before = without.detach().clone()
    optimizer = make(rule, [with_gradient, without])
    with_gradient.grad = torch.ones_like(with_gradient)
    optimizer.step()
    assert torch.equal(without, before)
    assert without not in optimizer.state
    make(rule, [without]).step()


def test_groups_have_their_own_rates():
    gradients, values = noise(100, (20,), (20,)), start((20,), (20,))
    together = weights_of(values)
    groups = [{"params": together[:1], "alpha": 0.5}, {"params": together[1:], "gamma": 1.0}]
    both = optim.CascadedEMA(groups, alpha=0.01, gamma=0.2)
    assert [(g["lr"], g["gamma"]) for g in both.param_groups] == [(0.5, 0.2), (0.01, 1.0)]
    signs = run(both, together, gradients)
    apart = []
    for value, gradient, rates in zip(values, gradients, [(0.5, 0.2), (0.01, 1.0)], strict=True):
        (weight,) = weights_of([value])
        apart.append(run(optim.CascadedEMA([weight], *rates), [weight], [gradient]))
    assert torch.equal(signs, torch.cat(apart, 1))


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan, math.inf])
def test_rates_outside_of_zero_to_one_are_refused(rate):
    weights = weights_of(start((3,)))
    before = weights[0].detach().clone() * 0.5
    weights[0].data.copy_(before)
    for kind, options in [
        (optim.CascadedEMA, {"alpha": rate, "gamma": 0.1}),
        (optim.CascadedEMA, {"alpha": 0.1, "gamma": rate}),
        (optim.Bop, {"gamma": rate, "threshold": 0.0}),
        (optim.LatentSGD, {"lr": 0.1, "gamma": rate}),
    ]:
        with pytest.raises(ValueError, match=r"(alpha|gamma) must be in \(0, 1\]"):
            kind(weights, **options)
    assert torch.equal(weights[0], before), "refused before anything was changed"


@pytest.mark.parametrize(("kind", "options", "message"), [
    (optim.Bop, {"gamma": 0.1, "threshold": -1e-9}, "threshold must be"),
    (optim.Bop, {"gamma": 0.1, "threshold": math.inf}, "threshold must be"),
    (optim.LatentSGD, {"lr": -0.1}, "lr must be"),
    (optim.LatentSGD, {"lr": 1.0, "weight_decay": 1.5}, "lr \\* weight_decay must be at most 1"),
    (optim.LatentSGD, {"lr": 1.0, "clip": 0.0}, "clip must be"),
    (optim.LatentSGD, {"lr": 1.0, "clip": math.nan}, "clip must be"),
])  # fmt: skip
def test_other_numbers_that_make_no_sense_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(weights_of(start((3,))), **options)


def test_a_refused_group_is_not_added():
    optimizer = make("Bop", weights_of(start((3,))))
    with pytest.raises(ValueError, match="gamma must be"):
        optimizer.add_param_group({"params": weights_of(start((2,))), "gamma": 5})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("rule", BINARY_RULES)
@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy])
@pytest.mark.parametrize("kind", [
    partial(layers.BinaryLinear, 6, 4), partial(layers.ExpertBinaryConv2d, 3, 4, 3),
])  # fmt: skip
def test_a_rule_that_flips_refuses_latent_weights(rule, copied, kind):
    """At ±1 the gradient of approx_sign is 0 and that of swish_sign turned round."""
    layer = copied(kind(weight_quantizer=approx_sign))
    optimizer = make(rule, [layer.weight])
    layer.weight.grad = torch.ones_like(layer.weight)
    with pytest.raises(ValueError, match=rf"{rule} holds a latent weight.*set_quantizers\(None"):
        optimizer.step()
    layer.set_quantizers(None, ste_sign)
    optimizer.step()
    layer.set_quantizers(ste_sign, ste_sign)
    make("LatentSGD", [layer.weight]).step()


@pytest.mark.parametrize("kind", [
    partial(optim.CascadedEMA, alpha=0.1, gamma=0.1),
    partial(optim.Bop, gamma=0.1, threshold=0.0),
    partial(optim.RankedFlips, fraction=0.1),
])  # fmt: skip
def test_a_rate_under_the_papers_name_is_not_ignored(kind):
    optimizer = kind([nn.Parameter(torch.ones(3))])
    optimizer.step()
    optimizer.param_groups[0][optimizer.lr_name] = 0.5
    with pytest.raises(ValueError, match=rf"set {optimizer.lr_name} as group\['lr'\]"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latent_weights_in_half_precision_are_refused(dtype):
    """1 - 0.001 rounds to 1 in bfloat16: their decay would be lost without a word."""
    with pytest.raises(ValueError, match="keep them in float32"):
        optim.LatentSGD(weights_of(start((3,)), dtype), lr=0.1)


def test_without_zeros_nothing_random_is_drawn():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    make("CascadedEMA", weights_of(start((30,))))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_shared_weight_is_scaled_once():
    first, second = layers.BinaryLinear(3, 3), layers.BinaryLinear(3, 3)
    second.weight = first.weight
    groups = optim.glorot_scaled_groups(nn.Sequential(first, second), 0.1, 1)
    assert [len(group["params"]) for group in groups] == [1, 0]


def test_negative_decay_makes_latent_weights_explode():
    """Facts C3: the pole 1 - alpha lies outside of the unit circle."""
    (weight,) = weights_of([np.array([0.1, -0.1])])
    optimizer = optim.LatentSGD([weight], lr=1.0, weight_decay=-0.1)
    run(optimizer, [weight], [np.zeros((100, 2))])
    assert weight.abs().min() > 1000


def test_a_gradient_that_is_not_a_number_leaves_the_weight_binary():
    """It never flips again; that the loss is no number any more is for the loop to notice."""
    for rule in BINARY_RULES:
        (weight,) = weights_of([np.ones(3)])
        run(make(rule, [weight]), [weight], [np.array([[math.nan, 1.0, 1.0]])])
        assert weight.tolist() == [1.0, -1.0, -1.0]


class HostTraffic(TorchDispatchMode):
    """Refuse what would make a GPU wait: reading a number, or counting with a mask."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        waits = {"_local_scalar_dense", "nonzero", "masked_select", "index", "index_put_"}
        assert name not in waits, name
        return func(*args, **(kwargs or {}))


@each_rule
def test_a_step_does_not_wait_for_the_device(rule):
    (weight,) = weights_of(start((20,)))
    optimizer = make(rule, [weight])
    weight.grad = torch.ones_like(weight)
    with HostTraffic():
        optimizer.step()
    with pytest.raises(AssertionError, match="index_put_"), HostTraffic():
        weight.data[weight.data > 0] = 1.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@each_rule
def test_a_step_does_not_wait_for_the_gpu(rule):
    (weight,) = weights_of(start((20,)), device="cuda")
    optimizer = make(rule, [weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


# --- As an optimizer of torch --------------------------------------------------------------------


@each_rule
def test_step_takes_a_closure(rule):
    (weight,) = weights_of(start((4,)))
    optimizer = make(rule, [weight])

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum() + weight.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(4 + start((4,))[0].sum())


@each_rule
def test_a_grad_scaler_steps_it(rule):
    (gradients,) = noise(40, (10,))
    (one,), (two,) = (
        weights_of(start((10,)), torch.float32),
        weights_of(start((10,)), torch.float32),
    )
    plain, scaled = make(rule, [one]), make(rule, [two])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for gradient in torch.tensor(gradients).float():
        one.grad = gradient
        plain.step()
        scaled.zero_grad()
        scaler.scale(two @ gradient).backward()
        scaler.step(scaled)
        scaler.update()
    assert torch.equal(one, two)


@pytest.mark.usefixtures("compiler")
def test_a_compiled_step_is_the_step():
    (one,), (two,) = weights_of(start((10,))), weights_of(start((10,)))
    gradients = noise(10, (10,))
    plain, compiled = make("CascadedEMA", [one]), make("CascadedEMA", [two])
    compiled.step = torch.compile(compiled.step)
    assert torch.equal(run(plain, [one], gradients), run(compiled, [two], gradients))


@each_rule
def test_copies_and_pickles(rule):
    (weight,) = weights_of(start((10,)))
    optimizer = make(rule, [weight])
    run(optimizer, [weight], noise(5, (10,)))
    other = copy.deepcopy(optimizer)
    (copied,) = other.param_groups[0]["params"]
    gradients = noise(20, (10,), seed=7)
    assert torch.equal(run(optimizer, [weight], gradients), run(other, [copied], gradients))


def test_trains_a_network_and_resumes_it_exactly(tmp_path, press_ctrl_c_at):
    digits = data.load("digits")

    def train(epochs, checkpoint=None):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), layers.BinaryLinear(64, 64, weight_quantizer=None),
                              nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))  # fmt: skip
        binary, real = optim.split_parameters(model)
        optimizers = optim.CascadedEMA(binary, 0.01, 0.1), torch.optim.Adam(real)
        cosine = lr_scheduler.LambdaLR(optimizers[0], lambda epoch: 0.7**epoch)
        history = training.train(model, digits, optimizers, epochs=epochs, batch_size=50,
                                 schedulers=[cosine], probes=[probes.FlipRatio()], device="cpu",
                                 checkpoint=checkpoint)  # fmt: skip
        return model, history

    model, history = train(4)
    assert set(model[1].weight.flatten().tolist()) == {-1.0, 1.0}
    assert history.rows[-1]["test_accuracy"] > 0.8
    assert history.rows[-1]["flip_ratio"] < history.rows[0]["flip_ratio"]
    with pytest.MonkeyPatch.context() as patch:
        press_ctrl_c_at(60, patch)  # in the third epoch
        with pytest.raises(KeyboardInterrupt):
            train(4, tmp_path / "run.pt")
    resumed, rows = train(4, tmp_path / "run.pt")
    assert torch.equal(resumed[1].weight, model[1].weight)
    different = [name for name in history.frame if name != "seconds"]
    assert rows.frame[different].equals(history.frame[different])


# --- Rules of this book --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gradient", "first", "second", "normalised"])
def test_ranked_flips_equal_their_literal_twin(kind):
    generator = torch.Generator().manual_seed(3)
    gradients = torch.randn(100, 6, 8, generator=generator, dtype=torch.float64)
    gradients = (4 * gradients).round() / 4  # ties, and zeros
    gradients[:, 0, 0] = 0.0
    weight = nn.Parameter(sign(torch.randn(6, 8, generator=generator, dtype=torch.float64)))
    optimizer = optim.RankedFlips([weight], 0.125, kind, alpha=0.25, gamma=0.5)
    twin, m, s = weight.detach().numpy().copy(), np.zeros((6, 8)), np.full((6, 8), 1e-300)
    flipped = 0
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        e, m, s = reference.evidence_step(kind, m, s, gradient.numpy(), 0.25, 0.5)
        before = twin
        twin = reference.ranked_flips(before, e * before, 6)
        flipped += (twin != before).sum()
        np.testing.assert_array_equal(weight.detach().numpy(), twin)
    assert flipped > 500
    assert weight[0, 0] == twin[0, 0]


@pytest.mark.parametrize("values", [
    [3.0, 1.0, 3.0, 3.0, -5.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.0] * 6, [-1.0] * 6,
    [math.nan, 2.0, math.nan, 1.0, 2.0, math.nan], [math.inf, 1.0, 2.0, math.inf, 3.0, 3.0],
])  # fmt: skip
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 6])
def test_the_strongest_flip_and_of_equal_ones_the_first(values, count):
    weight = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0])
    clean = np.nan_to_num(np.array(values), nan=0.0, posinf=1e9)
    expected = reference.ranked_flips(weight.numpy(), clean, count)
    optim.flip_strongest(weight, torch.tensor(values), count)
    assert weight.tolist() == expected.tolist()


def test_the_strongest_flip_in_any_memory_order():
    weight = torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last)
    strength = torch.arange(24.0).view(2, 3, 2, 2)
    optim.flip_strongest(weight, strength, 2)
    assert weight.flatten().tolist() == [1.0] * 22 + [-1.0] * 2


@pytest.mark.parametrize(("evidence", "part"), [("random", 1.0), ("asked", 0.5)])
def test_random_evidence_flips_the_given_number_of_those_it_may(evidence, part):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(4000))
    optimizer = optim.RankedFlips([weight], 0.05, evidence, alpha=1.0, gamma=1.0)
    weight.grad = torch.cat([torch.rand(2000) + 0.1, -torch.rand(2000) - 0.1])
    optimizer.step()
    flipped = (weight.detach() < 0).nonzero().squeeze(1)
    assert len(flipped) == 200
    assert (flipped < 2000).float().mean() == pytest.approx(1 / (2 * part), abs=0.2)
    if evidence == "asked":
        assert (flipped < 2000).all()
        assert flipped.float().mean() == pytest.approx(1000, abs=200)  # not the strongest ones


def test_a_fraction_of_a_weight_flips_as_often():
    torch.manual_seed(0)
    weight, flips = nn.Parameter(torch.ones(10)), 0
    optimizer = optim.RankedFlips([weight], 0.03, "random")
    for _ in range(1000):
        before = weight.detach().clone()
        weight.grad = torch.zeros(10)
        optimizer.step()
        flips += int((weight.detach() != before).sum())
    assert flips == pytest.approx(300, abs=60)
    assert set(weight.tolist()) == {-1.0, 1.0}


def _rules_of_this_book():
    ranked = [partial(optim.RankedFlips, fraction=0.05, evidence=e)
              for e in optim.RankedFlips.BUFFERS]  # fmt: skip
    return [*ranked, partial(optim.CounterSGD, lr=10.0, bits=3)]


@pytest.mark.parametrize("make", _rules_of_this_book())
def test_rules_of_this_book_resume_bit_for_bit(make, tmp_path, press_ctrl_c_at):
    def train(checkpoint=None):
        torch.manual_seed(1)
        latent = make.func is optim.CounterSGD
        quantizer = partial(ste_sign, clip_value=None) if latent else None
        layer = layers.BinaryLinear(64, 10, weight_quantizer=quantizer)
        model = nn.Sequential(nn.Flatten(), layer, nn.BatchNorm1d(10))
        binary, real = optim.split_parameters(model)
        rules = [make(binary), torch.optim.SGD(real, 0.1)]
        training.train(model, data.load("digits"), rules, epochs=3, batch_size=100,
                       probes=[probes.FlipRatio()], checkpoint=checkpoint,
                       device="cpu")  # fmt: skip
        return layer.weight

    straight = train()
    with pytest.MonkeyPatch.context() as patch:
        press_ctrl_c_at(20, patch)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run.pt")
    assert torch.equal(train(tmp_path / "run.pt"), straight)
    assert set(straight.abs().unique().tolist()) <= {1.0, 3.0, 5.0, 7.0}


def test_ranked_flips_see_by_default_what_a_usual_cascade_sees():
    """What differs from a cascade of alpha 0.01 and gamma 0.1 is how many weights flip."""
    seen = []
    for rule in (partial(optim.RankedFlips, fraction=0.1),
                 partial(optim.CascadedEMA, alpha=0.01, gamma=0.1)):  # fmt: skip
        weights = weights_of(start((40,)))
        optimizer = rule(weights)
        run(optimizer, weights, noise(30, (40,)))
        seen.append(optimizer.state[weights[0]]["filtered_gradient"])
    assert torch.equal(*seen)


@pytest.mark.parametrize("options", [
    {"fraction": 0.0}, {"fraction": 1.5}, {"fraction": 0.1, "evidence": "guess"},
    {"fraction": 0.1, "alpha": 0.0}, {"fraction": 0.1, "gamma": 2.0},
])  # fmt: skip
def test_ranked_flips_refuse_other_numbers(options):
    with pytest.raises(ValueError, match=r"must be in|unknown evidence 'guess'; known: gradient"):
        optim.RankedFlips([nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_counters_equal_their_literal_twin(bits):
    generator = torch.Generator().manual_seed(bits)
    top = 2**bits - 1
    weight = nn.Parameter(2 * torch.rand(5, 7, generator=generator, dtype=torch.float64) - 1)
    optimizer = optim.CounterSGD([weight], 0.7, bits, stochastic=False)
    level = ((weight.detach() + top) / 2).numpy().astype(int)
    levels = []
    for _ in range(100):
        gradient = torch.randn(5, 7, generator=generator, dtype=torch.float64)
        weight.grad = gradient.clone()
        optimizer.step()
        level = reference.counter_step(level, gradient.numpy(), 0.7, bits)
        np.testing.assert_array_equal(weight.detach().numpy(), 2 * level - top)
        levels.append(level)
    assert set(np.unique(levels)) >= {0, top}
    assert set(np.unique(levels)) <= set(range(top + 1))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_stochastic_counters_are_right_on_average(bits):
    """An update much smaller than a level moves a share of the counters, and never a float."""
    torch.manual_seed(0)
    top, n = 2**bits - 1, 40_000
    for stochastic in (True, False):
        weight = nn.Parameter(torch.full((n,), 1.0 / top))
        optimizer = optim.CounterSGD([weight], 1.0, bits, stochastic=stochastic)
        assert (weight == 1.0).all()
        weight.grad = torch.full((n,), 0.1 / top)  # a twentieth of the distance of two levels
        optimizer.step()
        moved = (weight == -1.0).float().mean().item()
        assert ((weight == -1.0) | (weight == 1.0)).all()
        assert moved == (pytest.approx(0.05, abs=0.01) if stochastic else 0.0)


def test_counters_round_at_random_unless_told_otherwise():
    """Rounded to the nearest, updates below 1/V would all be lost."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(2000))
    optimizer = optim.CounterSGD([weight], 0.1, 1)
    weight.grad = torch.ones(2000)
    optimizer.step()
    assert (weight < 0).float().mean().item() == pytest.approx(0.05, abs=0.02)


def test_counters_at_a_rate_of_zero_stand_still():
    weight = nn.Parameter(torch.tensor([0.5, -0.5]))
    optimizer = optim.CounterSGD([weight], 0.0, 3)
    before = weight.detach().clone()
    weight.grad = torch.full((2,), 100.0)
    optimizer.step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_counters_start_with_the_signs_of_their_weights(bits):
    top = 2**bits - 1
    weight = nn.Parameter(torch.tensor([1e-18, -1e-18, 0.0, 1.0, -1.0, -0.99 / top, 2.0]))
    optim.CounterSGD([weight], 1.0, bits)
    assert weight.tolist() == [1.0, -1.0, 1.0, top, -top, -1.0, top]


def test_counters_of_many_bits_train_as_clipped_sgd():
    torch.manual_seed(0)
    start, gradients = 2 * torch.rand(200) - 1, 0.1 * torch.randn(50, 200)
    latent, counter = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    rules = optim.LatentSGD([latent], 1.0, clip=1.0), optim.CounterSGD([counter], 1.0, 16)
    for gradient in gradients:
        for weight, rule in zip((latent, counter), rules, strict=True):
            weight.grad = gradient.clone()
            rule.step()
    assert torch.allclose(counter / (2**16 - 1), latent, atol=1e-3)
    assert (latent.abs() == 1).any()


@pytest.mark.parametrize(("options", "words"), [
    ({"lr": -1.0, "bits": 2}, "lr must be a number >= 0, not -1"),
    ({"lr": math.inf, "bits": 2}, "lr must be a number >= 0, not inf"),
    ({"lr": 1.0, "bits": 0}, "bits must be an integer from 1 to 16, not 0"),
    ({"lr": 1.0, "bits": 17}, "bits must be an integer from 1 to 16, not 17"),
    ({"lr": 1.0, "bits": 2.0}, "bits must be an integer from 1 to 16, not 2.0"),
])  # fmt: skip
def test_counters_refuse_other_numbers(options, words):
    with pytest.raises(ValueError, match=words):
        optim.CounterSGD([nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("bits", [1, 8, 16])
def test_without_a_gradient_no_counter_moves(bits):
    torch.manual_seed(0)
    weight = nn.Parameter(2 * torch.rand(5000) - 1)
    optimizer = optim.CounterSGD([weight], 1.0, bits)
    before = weight.detach().clone()
    weight.grad = torch.zeros(5000)
    for _ in range(20):
        optimizer.step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("factor", [0.1, 0.3, 0.7])
def test_a_threshold_that_a_scheduler_takes_to_zero_still_flips_nothing_without_a_gradient(factor):
    """LinearLR's rounding ends a little below 0, where 0 > threshold would hold."""
    for steps in range(2, 12):
        weight = nn.Parameter(torch.ones(3))
        optimizer = optim.Bop([weight], gamma=0.1, threshold=1e-6)
        view = optim.rate_as_lr(optimizer, "threshold")
        scheduler = lr_scheduler.LinearLR(view, factor, 0.0, total_iters=steps)
        for _ in range(steps + 2):
            weight.grad = torch.zeros(3)
            optimizer.step()
            scheduler.step()
            assert (weight == 1).all()


@pytest.mark.parametrize(("rule", "name", "value"), [
    (partial(optim.Bop, gamma=0.1, threshold=0.0), "threshold", -1.0),
    (partial(optim.Bop, gamma=0.1, threshold=0.0), "threshold", math.nan),
    (partial(optim.LatentSGD, lr=0.1), "lr", -1.0),
    (partial(optim.CounterSGD, lr=0.1, bits=2), "lr", math.nan),
])  # fmt: skip
def test_a_number_set_outside_its_bounds_is_refused_at_the_next_step(rule, name, value):
    weight = nn.Parameter(torch.ones(3))
    optimizer = rule([weight])
    weight.grad = torch.ones(3)
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"a scheduler set {name} to {value}; it must stay in"):
        optimizer.step()


def test_nothing_of_a_refused_group_stays():
    optimizer = optim.LatentSGD([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match="would lose small updates"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2).half())]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("make", [
    partial(lr_scheduler.OneCycleLR, max_lr=0.5, total_steps=10, cycle_momentum=False),
    partial(lr_scheduler.CyclicLR, base_lr=0.1, max_lr=0.4, step_size_up=3, cycle_momentum=False),
])  # fmt: skip
def test_two_rates_have_schedulers_that_keep_numbers_in_the_group(make):
    """OneCycleLR and CyclicLR write max_lr and the like there, each for its own rate."""
    both, one = (optim.CascadedEMA([nn.Parameter(torch.ones(2))], 0.01, 0.1) for _ in range(2))
    lent = optim.rate_as_lr(both, "gamma")
    high = make(lent, max_lr=0.9)
    schedules = [make(both), high], [make(one)]
    for _ in range(8):
        assert both.param_groups[0]["lr"] == one.param_groups[0]["lr"]
        for optimizer, schedulers in zip((both, one), schedules, strict=True):
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
    assert both.param_groups[0]["gamma"] != both.param_groups[0]["lr"]


def test_a_rate_from_numpy_has_a_scheduler():
    optimizer = optim.CascadedEMA([nn.Parameter(torch.ones(2))], np.float64(0.01), np.float64(0.1))
    assert optim.rate_as_lr(optimizer, "gamma").param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(("key", "value", "words"), [
    ("lr", 1.0, r"a scheduler set lr to 1.0; it must stay in \[0, 0.2\]"),
    ("clip", -1, "clip must be None or > 0, not -1"),
])  # fmt: skip
def test_latent_sgd_keeps_its_bounds_when_a_schedule_changes_them(key, value, words):
    weight = nn.Parameter(torch.tensor([0.5, -0.5]))
    optimizer = optim.LatentSGD([weight], lr=0.1, weight_decay=5.0)
    weight.grad = torch.zeros(2)
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert weight.tolist() == [0.5, -0.5]


def test_a_schedule_may_raise_the_rate_to_the_edge_and_end_gamma_at_zero():
    weight = nn.Parameter(torch.tensor([0.5, -0.5]))
    optimizer = optim.LatentSGD([weight], lr=0.1, weight_decay=0.1)
    weight.grad = torch.zeros(2)
    optimizer.param_groups[0].update(lr=10.0 * (1 + 1e-12), gamma=0.0)
    optimizer.step()
    assert weight.abs().max() < 1e-6


def test_counters_of_no_bits_are_refused_in_a_step_too():
    weight = nn.Parameter(torch.tensor([0.5, -0.5]))
    optimizer = optim.CounterSGD([weight], 0.1, 3)
    weight.grad = torch.ones(2)
    optimizer.param_groups[0]["bits"] = 0
    with pytest.raises(ValueError, match="bits must be an integer from 1 to 16, not 0"):
        optimizer.step()


def test_counters_that_are_loaded_first_stay_counters():
    torch.manual_seed(0)
    trained, loaded = nn.Parameter(torch.randn(50)), nn.Parameter(torch.empty(50))
    optimizer = optim.CounterSGD([trained], 0.3, 4, stochastic=False)
    for _ in range(3):
        trained.grad = torch.randn(50)
        optimizer.step()
    loaded.data.copy_(trained.data)  # the network's state, and only then the optimizer
    again = optim.CounterSGD([loaded], 0.3, 4, stochastic=False)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(loaded, trained)
    assert len(trained.unique()) > 4
    optim.CounterSGD([loaded], 0.3, 2)
    assert loaded.abs().max() == 3  # fewer bits hold less


@pytest.mark.parametrize("make", [
    lambda groups: optim.Bop(groups, gamma=0.1, threshold=0.0),
    lambda groups: optim.CascadedEMA(groups, alpha=0.1, gamma=0.1),
])  # fmt: skip
def test_a_refused_optimizer_changes_no_weight(make):
    first, second = (nn.Parameter(torch.tensor([0.3, -0.2])) for _ in range(2))
    with pytest.raises(ValueError, match="gamma must"):
        make([{"params": [first]}, {"params": [second], "gamma": 5}])
    assert torch.equal(first, second)
    assert first[0] == 0.3
    assert len(make(iter([first])).param_groups) == 1


def test_the_state_of_another_kind_of_optimizer_is_refused():
    weight = nn.Parameter(torch.ones(2))
    bop = optim.Bop([weight], gamma=0.1, threshold=0.0)
    averages = optim.CascadedEMA([weight], alpha=0.1, gamma=0.2)
    with pytest.raises(ValueError, match="no state of CascadedEMA: its groups have no gamma"):
        averages.load_state_dict(bop.state_dict())
    assert averages.param_groups[0]["gamma"] == 0.2


def test_a_state_of_an_unknown_evidence_is_refused():
    ranked = optim.RankedFlips([nn.Parameter(torch.ones(2))], fraction=0.5)
    state = copy.deepcopy(ranked.state_dict())
    state["param_groups"][0]["evidence"] = "third"
    with pytest.raises(ValueError, match="unknown evidence 'third'; known: gradient, first"):
        ranked.load_state_dict(state)
    assert ranked.param_groups[0]["evidence"] == "second"


def test_a_state_whose_weights_lack_a_buffer_is_refused_before_anything_changes():
    """Latent weights have all the rates of a cascaded EMA, and only one of its buffers."""
    latent = optim.LatentSGD([nn.Parameter(torch.randn(4))], lr=0.1, gamma=0.2)
    filtered = optim.CascadedEMA([nn.Parameter(torch.randn(4))], alpha=0.3, gamma=0.4)
    for optimizer in (latent, filtered):
        (weight,) = optimizer.param_groups[0]["params"]
        weight.grad = torch.ones(4)
        optimizer.step()
    before = copy.deepcopy(filtered.state_dict())
    with pytest.raises(ValueError, match="of CascadedEMA: its weights have no filtered_gradient"):
        filtered.load_state_dict(latent.state_dict())
    after = filtered.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][0][k], v) for k, v in before["state"][0].items())
    # a state of before the first step has no buffers yet, and is taken
    fresh = optim.CascadedEMA([nn.Parameter(torch.randn(4))], alpha=0.5, gamma=0.6)
    filtered.load_state_dict(fresh.state_dict())
    assert filtered.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("make", [lambda w: optim.Bop([w], gamma=0.1, threshold=0.0),
                                  lambda w: optim.LatentSGD([w], lr=0.1)])  # fmt: skip
def test_a_state_can_be_loaded_again_and_into_a_copy(make):
    optimizer = make(nn.Parameter(torch.ones(2)))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())


@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loaded_state_is_a_copy(rule, dtype):
    """Two optimizers that went on with the same buffers would filter each other's gradients."""
    ours, theirs = (weights_of(start((20,)), dtype) for _ in range(2))
    first, second = make(rule, ours), make(rule, theirs)
    run(first, ours, noise(3, (20,)))
    second.load_state_dict(first.state_dict())
    loaded = copy.deepcopy(second.state_dict()["state"][0])
    run(first, ours, noise(3, (20,), seed=5))
    for name, buffer in second.state[theirs[0]].items():
        assert torch.equal(buffer, loaded[name])
        assert not torch.equal(buffer, first.state[ours[0]][name])


def test_a_weight_without_brackets_is_refused_in_the_words_of_torch():
    with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts"):
        optim.Bop(nn.Parameter(torch.ones(2)), gamma=0.1, threshold=0.0)


def test_a_schedule_of_an_older_state_finds_its_numbers():
    """Before, what a scheduler keeps for gamma stood under its own name: max_lr, not max_gamma."""
    optimizer = optim.CascadedEMA([nn.Parameter(torch.ones(2))], alpha=0.1, gamma=0.2)
    lent = optim.rate_as_lr(optimizer, "gamma")
    cycle = lr_scheduler.OneCycleLR(lent, max_lr=0.5, total_steps=9, cycle_momentum=False)
    for group in optimizer.param_groups:
        group["max_lr"] = group.pop("max_gamma")
    optimizer.step()
    cycle.step()
    assert 0.02 < optimizer.param_groups[0]["gamma"] < 0.5


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step")  # torch's own copies warn, too
@pytest.mark.parametrize("renew", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_a_copy_of_a_scheduler_of_another_rate_keeps_the_weights(renew):
    weight = nn.Parameter(torch.ones(3))
    optimizer = optim.CascadedEMA([weight], alpha=0.01, gamma=0.1)
    scheduler = lr_scheduler.ExponentialLR(optim.rate_as_lr(optimizer, "gamma"), 0.5)
    if renew is copy.deepcopy:  # the hook on the optimizer cannot be pickled
        weight, optimizer, scheduler = renew((weight, optimizer, scheduler))
    else:
        scheduler = renew(scheduler)
        optimizer = scheduler.optimizer.param_groups[0].optimizer
        (weight,) = optimizer.param_groups[0]["params"]
    assert optimizer.param_groups[0]["params"][0] is weight
    weight.grad = torch.ones(3)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["gamma"] == 0.05
    assert (weight == -1).all()


def test_five_dimensions_alone_make_no_experts():
    assert 1 / optim.glorot_coefficient(nn.Conv3d(4, 8, 3)) == pytest.approx(
        math.sqrt((4 + 8) * 27 / 1.5)
    )


def test_a_number_that_one_group_of_a_state_lacks_is_missed():
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = optim.Bop([{"params": [w]} for w in weights], gamma=0.1, threshold=0.0)
    state = optimizer.state_dict()
    del state["param_groups"][1]["threshold"]
    with pytest.raises(ValueError, match="its groups have no threshold"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(("optimizer", "key", "value", "message"), [
    (partial(optim.LatentSGD, lr=0.1), "weight_decay", math.nan, "weight_decay must be a number"),
    (partial(optim.RankedFlips, fraction=0.1), "evidence", "x", "unknown evidence 'x'"),
])  # fmt: skip
def test_what_a_group_is_given_later_is_checked_at_the_step(optimizer, key, value, message):
    weight = nn.Parameter(torch.ones(2))
    made = optimizer([weight])
    made.param_groups[0][key] = value
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match=message):
        made.step()
    assert (weight == 1).all()


def test_a_gradient_whose_square_underflows_is_no_evidence():
    weight = nn.Parameter(torch.ones(3))
    optimizer = optim.RankedFlips([weight], fraction=1 / 3, evidence="normalised", alpha=0.1)
    weight.grad = torch.tensor([1e-25, 0.1, 0.1])
    optimizer.step()
    assert weight[0] == 1


def test_no_more_weights_flip_than_there_are():
    weight = torch.ones(3)
    optim.flip_strongest(weight, torch.tensor([0.5, 0.2, -0.1]), 9)
    assert weight.tolist() == [-1, -1, 1]
    with pytest.raises(ValueError, match="strength must have the weight's shape"):
        optim.flip_strongest(weight, torch.ones(2), 1)


def test_a_weight_without_values_is_no_error():
    weight = nn.Parameter(torch.empty(3, device="meta"))
    assert optim.Bop([weight], gamma=0.1, threshold=0.0).param_groups[0]["params"][0].is_meta
