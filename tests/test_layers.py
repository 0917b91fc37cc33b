"""Binary layers: what is multiplied, what is trained, and what the loss is."""

import numpy as np
import pytest
import reference
import torch
from torch import nn

from bnnbook import layers
from bnnbook.binarize import real_weight, ste_sign, stochastic_sign
from bnnbook.models import binaryconnect_mlp

LAYERS = [
    (layers.BinaryLinear, (6, 4), (5, 6)),
    (layers.BinaryConv2d, (3, 4, 3), (5, 3, 8, 8)),
]


@pytest.mark.parametrize(("kind", "arguments", "shape"), LAYERS)
@pytest.mark.parametrize("quantizer", [ste_sign, stochastic_sign, None])
def test_weights_multiplied_with_are_exactly_plus_minus_one(kind, arguments, shape, quantizer):
    layer = kind(*arguments, weight_quantizer=quantizer)
    assert layer.binary_weight().abs().eq(1).all()
    assert (layer.weight.abs() == 1).all() == (quantizer is None)


@pytest.mark.parametrize(("kind", "arguments", "shape"), LAYERS)
def test_forward_is_the_real_layer_on_binary_weights(kind, arguments, shape):
    x = torch.randn(shape)
    layer = kind(*arguments, bias=True)
    plain = nn.Linear(*arguments) if len(shape) == 2 else nn.Conv2d(*arguments)
    plain.load_state_dict({"weight": layer.binary_weight().detach(), "bias": layer.bias.detach()})
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize(("kind", "arguments", "shape"), LAYERS)
def test_latent_gradient_is_the_binary_weights_gradient(kind, arguments, shape):
    identity = lambda w: ste_sign(w, clip_value=None)  # noqa: E731
    layer = kind(*arguments, weight_quantizer=identity)
    with torch.no_grad():
        layer.weight[0] = 1.0  # also at the very edge
        layer.weight[1] = -3.0  # and beyond it
    x = torch.randn(shape)
    binary = layer.binary_weight().detach().requires_grad_()
    plain = nn.functional.linear if len(shape) == 2 else nn.functional.conv2d
    plain(x, binary).square().sum().backward()
    layer(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, binary.grad)


@pytest.mark.parametrize(("kind", "arguments", "shape"), LAYERS)
def test_binary_inputs(kind, arguments, shape):
    x = torch.randn(shape)
    layer = kind(*arguments, input_quantizer=ste_sign)
    assert torch.equal(layer(x), layer(x.sign()))


def test_a_quantizer_may_be_a_module_with_parameters():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, w):
            return self.scale * ste_sign(w)

    layer = layers.BinaryLinear(3, 2, weight_quantizer=Scaled())
    layer(torch.randn(4, 3)).sum().backward()
    assert layer.weight_quantizer.scale.grad is not None
    assert layer.binary_weight().abs().eq(2).all()


def test_state_dict_round_trip():
    first, second = layers.BinaryLinear(4, 3), layers.BinaryLinear(4, 3)
    assert list(first.state_dict()) == ["weight"]
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.binary_weight(), second.binary_weight())


def test_initial_latent_weights():
    layer = layers.BinaryLinear(200, 300)
    assert -1 < layer.weight.min() < -0.99
    assert 0.99 < layer.weight.max() < 1
    layer.reset_parameters(bound=2.0)
    assert layer.weight.abs().eq(1).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_repr_names_the_quantizers():
    assert "weight_quantizer=ste_sign" in repr(layers.BinaryLinear(2, 2))
    assert "weight_quantizer=ste_sign" in repr(binaryconnect_mlp())
    assert "input_quantizer" not in repr(layers.BinaryLinear(2, 2))


def test_clipping_touches_latent_weights_only():
    model = nn.Sequential(layers.BinaryLinear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-7.0)
    layers.clip_latent_weights(model)
    assert model[0].weight.eq(-1).all()
    assert model[1].weight.eq(-7).all()
    layers.clip_latent_weights(model, bound=0.25)
    assert model[0].weight.eq(-0.25).all()


def test_quantized_by_restores_the_quantizers_also_after_an_error():
    model = binaryconnect_mlp(4, (5,), 2, weights="stochastic")
    weight = model[1].weight
    with layers.quantized_by(model, real_weight):
        assert torch.equal(model[1].binary_weight(), weight)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), layers.quantized_by(model, ste_sign):
        model(torch.zeros(2, 9))
    assert model[1].weight_quantizer is stochastic_sign


def test_quantized_by_leaves_magnitude_free_weights_alone():
    model = nn.Sequential(layers.BinaryLinear(3, 3, weight_quantizer=None))
    with layers.quantized_by(model, real_weight):
        assert model[0].weight_quantizer is None


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_squared_hinge_loss(reduction):
    generator = np.random.default_rng(0)
    outputs, targets = generator.normal(size=(7, 5)), generator.integers(0, 5, 7)
    outputs[0] = [1, -1, 2, -2, 0]  # on the hinge, beyond it, and in the middle
    expected = reference.squared_hinge(outputs, targets)
    expected = expected.mean() if reduction == "mean" else expected.sum(1).mean()
    loss = layers.SquaredHingeLoss(reduction)(torch.tensor(outputs), torch.tensor(targets))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_squared_hinge_loss_refuses_an_unknown_reduction():
    with pytest.raises(ValueError, match="known: 'mean', 'batchmean'"):
        layers.SquaredHingeLoss("sum")


def test_algorithm_1_agrees_bit_for_bit_with_its_literal_twin():
    """Hundreds of steps in float64 on small integers: every sum is exact, so bits must agree."""
    generator = np.random.default_rng(0)
    x = generator.integers(-3, 4, (16, 12)).astype(float)
    targets = generator.integers(0, 4, 16)
    w = generator.integers(-8, 9, (4, 12)) / 8
    latent, history = reference.binaryconnect_linear(w, x, targets, rate=1 / 64, steps=300)

    layer = layers.BinaryLinear(12, 4, weight_quantizer=lambda v: ste_sign(v, None)).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(w))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1 / 64)
    loss = layers.SquaredHingeLoss()
    for binary in history:
        optimizer.zero_grad()
        loss(layer(torch.tensor(x)), torch.tensor(targets)).backward()
        optimizer.step()
        layers.clip_latent_weights(layer)
        assert torch.equal(layer.binary_weight(), torch.tensor(binary))
    assert torch.equal(layer.weight, torch.tensor(latent))
    assert (np.diff(history, axis=0) != 0).sum() > 20  # it did learn
