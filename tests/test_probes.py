"""Probes against a count by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from bnnbook import layers, probes
from bnnbook.models import binaryconnect_mlp


def test_flip_ratio_counts_every_sign_change():
    generator = np.random.default_rng(0)
    model = nn.Sequential(layers.BinaryLinear(5, 3), nn.Linear(3, 3), layers.BinaryLinear(3, 2))
    binary = [model[0].weight, model[2].weight]
    probe = probes.FlipRatio()
    probe.start(model)
    flips, steps = 0, 50
    for _ in range(steps):
        for weight in binary:
            before = weight.detach().numpy().copy()
            new = generator.choice([-1.0, -0.0, 0.0, 0.5], before.shape).astype(np.float32)
            flips += ((before >= 0) != (new >= 0)).sum()
            with torch.no_grad():
                weight.copy_(torch.tensor(new))
        probe.step()
    assert probe.epoch()["flip_ratio"] == flips / (steps * 21)
    probe.step()
    assert probe.epoch()["flip_ratio"] == 0


def test_flip_ratio_counts_on_after_a_save():
    model = nn.Sequential(layers.BinaryLinear(4, 1))
    first, second = probes.FlipRatio(), probes.FlipRatio()
    first.start(model)
    with torch.no_grad():
        model[0].weight.neg_()
    first.step()
    second.start(model)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        model[0].weight[0, 0].neg_()
    second.step()
    assert second.epoch()["flip_ratio"] == (4 + 1) / 8


def test_probes_without_binary_weights_give_no_column():
    for probe in (probes.FlipRatio(), probes.Saturation()):
        probe.start(nn.Linear(2, 2))
        probe.step()
        assert probe.epoch() == {}


def test_saturation():
    model = nn.Sequential(layers.BinaryLinear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0, 0.99, 0.5]]))
    probe = probes.Saturation(limit=1.0)
    probe.start(model)
    assert probe.epoch() == {"saturation": 0.5}


def test_latent_histogram_is_numpys():
    weight = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    density, edges = probes.latent_histogram(weight, bins=20, bound=2.0)
    counts, expected_edges = np.histogram(weight.numpy(), 20, range=(-2, 2))
    np.testing.assert_allclose(edges, expected_edges, atol=1e-6)
    np.testing.assert_allclose(density, counts / 2000 / 0.2, rtol=1e-6)


def test_layer_weight():
    model = binaryconnect_mlp(6, (5,), 3)
    assert probes.layer_weight(model).shape == (5, 6)
    assert probes.layer_weight(model, -1).shape == (3, 5)
    with pytest.raises(IndexError):
        probes.layer_weight(nn.ReLU())
