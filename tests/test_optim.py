"""Which parameters are binary, and what BinaryConnect's learning-rate scaling does to them."""

import pytest
import torch
from torch import nn

from bnnbook import layers, optim
from bnnbook.binarize import sign
from bnnbook.models import binaryconnect_cnn, binaryconnect_mlp

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
