"""The papers' networks: exact numbers of weights and products, shapes, kinds of weight."""

import pytest
import torch
from torch import nn

from bnnbook.layers import binary_layers
from bnnbook.models import binaryconnect_cnn, binaryconnect_mlp


def weights(network):
    return sum(layer.weight.numel() for layer in binary_layers(network))


@pytest.mark.parametrize(("network", "expected"), [
    (binaryconnect_mlp, 2_910_208),
    (lambda: binaryconnect_mlp(hidden=(2048,) * 3), 10_014_720),
    (binaryconnect_cnn, 14_022_016),
    (lambda: binaryconnect_cnn(widths=(64, 128, 256)), 6_397_632),
])  # fmt: skip
def test_binary_weights(network, expected):
    assert weights(network()) == expected


def test_multiply_accumulates_of_the_cnn():
    network, count = binaryconnect_cnn().eval(), []
    for layer in binary_layers(network):
        layer.register_forward_hook(
            lambda m, _, out: count.append(m.weight[0].numel() * out[0].numel())
        )
    network(torch.zeros(1, 3, 32, 32))
    assert sum(count) == pytest.approx(617.0e6, abs=0.05e6)


@pytest.mark.parametrize("kind", ["deterministic", "stochastic", "real"])
def test_forward_shapes_and_kinds_of_weight(kind):
    mlp = binaryconnect_mlp(64, (16, 16), 10, weights=kind)
    cnn = binaryconnect_cnn(10, widths=(4, 8), hidden=8, image_size=8, weights=kind)
    assert mlp(torch.randn(5, 1, 8, 8)).shape == (5, 10)
    assert cnn(torch.randn(5, 3, 8, 8)).shape == (5, 10)
    for network, layers in ((mlp, 3), (cnn, 7)):
        assert len(list(binary_layers(network))) == (0 if kind == "real" else layers)
        for layer in binary_layers(network):
            assert set(layer.binary_weight().unique().tolist()) == {-1.0, 1.0}


def test_the_real_network_starts_as_glorot_says():
    layer = binaryconnect_mlp(300, (500,), weights="real")[1]
    bound = (6 / 800) ** 0.5
    assert 0.99 * bound < layer.weight.abs().max() <= bound


def test_dropout_only_where_asked():
    count = [
        sum(isinstance(m, nn.Dropout) for m in binaryconnect_mlp(4, (3, 3), dropout=d))
        for d in (0.0, 0.5)
    ]
    assert count == [0, 2]


def test_unknown_kind_of_weight():
    with pytest.raises(ValueError, match="known: real, deterministic, stochastic"):
        binaryconnect_mlp(weights="binary")
