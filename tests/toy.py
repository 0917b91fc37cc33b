"""A small data set and training run that several test files share."""

import os
import signal

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, ExponentialLR, MultiStepLR

from bnnbook import data, layers, optim, probes, training
from bnnbook.layers import BinaryLinear
from bnnbook.models import binaryconnect_mlp


def dataset(n=60, seed=0, shape=(1, 4, 4), split=None):
    generator = torch.Generator().manual_seed(seed)

    def part(count):
        images = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
        return images, torch.randint(0, 3, (count,), generator=generator)

    return data.Dataset(*part(n), *part(30), ("a", "b", "c"), "toy").hold_out(10, seed=split)


def setting(weights="stochastic", seed=0, kind=torch.optim.Adam, dropout=0.3, lr=0.01):
    torch.manual_seed(seed)
    model = binaryconnect_mlp(16, (8, 8), 3, weights=weights, dropout=dropout)
    optimizer = kind(optim.glorot_scaled_groups(model, lr, 1))
    optim.clip_after_step(optimizer, model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return model, optimizer, scheduler


def run(epochs=4, setting_=None, **options):
    model, optimizer, scheduler = setting_ or setting()
    options = {"batch_size": 10, "device": "cpu", "schedulers": [scheduler]} | options
    options.setdefault("probes", [probes.FlipRatio(), probes.Saturation()])
    options.setdefault("augment", data.crop_flip(padding=1))
    history = training.train(model, options.pop("data", dataset()), optimizer, epochs=epochs,
                             loss=layers.SquaredHingeLoss(), **options)  # fmt: skip
    return model, history


def without_time(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]


def assert_same(first, second):
    assert without_time(first[1]) == without_time(second[1])
    for name, value in first[0].state_dict().items():
        assert torch.equal(value, second[0].state_dict()[name]), name


class ScaledLoss(nn.Module):
    """A loss that learns a number and counts its calls."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs, labels):
        self.calls += 1
        return nn.functional.cross_entropy(self.scale * outputs, labels)


class StopAfter:
    """A probe that presses Ctrl-C after so many steps."""

    def __init__(self, steps):
        self.left = steps

    def start(self, model):
        pass

    def step(self):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)

    def epoch(self):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def flip_setting(gamma=0.1, cycle=4, drop=2, momentum=0.9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), BinaryLinear(16, 3, weight_quantizer=None))
    model.append(nn.BatchNorm1d(3))
    binary, real = optim.split_parameters(model)
    flipper = optim.CascadedEMA(binary, 0.01, gamma)
    optimizers = [flipper, torch.optim.SGD(real[:1], 0.1, momentum),
                  torch.optim.SGD(real[1:], 0.1, 0.5)]  # fmt: skip
    schedulers = [CosineAnnealingWarmRestarts(flipper, cycle),
                  ExponentialLR(optim.rate_as_lr(flipper, "gamma"), 0.5),
                  MultiStepLR(optimizers[1], [drop])]  # fmt: skip
    return model, optimizers, schedulers
