"""What is measured while a binary network trains, on the device, without a host sync per step.

A probe has ``start(model)``, ``step()`` after each optimizer step, ``epoch()`` which returns the
epoch's columns, and ``state_dict`` / ``load_state_dict`` so that a resumed run counts on.
"""

import torch
from torch import Tensor, nn

from bnnbook.layers import BinaryLayer, binary_layers


class FlipRatio:
    r"""Measure the share of binary weights that change sign in one step, averaged over the epoch.

    :math:`\pi = \frac{1}{T\,n} \sum_t \#\{i : \operatorname{sign} w_{t,i} \ne
    \operatorname{sign} w_{t-1,i}\}` over the T steps and the n binary weights, all layers pooled.
    For stochastic quantizers the sign of the latent weight counts, not the draw.
    Column: ``flip_ratio``. Memory: one byte a weight.
    """

    def start(self, model: nn.Module) -> None:
        """Remember the signs the model starts with."""
        self.weights = [layer.weight for layer in binary_layers(model)]
        self.positive = [weight.detach() >= 0 for weight in self.weights]
        self.flips = torch.zeros((), dtype=torch.float64, device=_device(self.weights))
        self.steps = 0

    def step(self) -> None:
        """Count the signs that differ from those before the step."""
        for i, weight in enumerate(self.weights):
            positive = weight.detach() >= 0
            # a float32 sum is exact to 2^24 flips a step and, unlike a bool sum, fast on a CPU
            self.flips += (positive ^ self.positive[i]).view(torch.uint8).float().sum()
            self.positive[i] = positive
        self.steps += 1

    def epoch(self) -> dict[str, float]:
        """Return {"flip_ratio": mean since the last call}; empty without weights."""
        weights = sum(weight.numel() for weight in self.weights)
        if not weights or not self.steps:
            return {}
        ratio = self.flips.item() / (weights * self.steps)
        self.flips.zero_()
        self.steps = 0
        return {"flip_ratio": ratio}

    def state_dict(self) -> dict:
        """Return the counters; the signs themselves follow from the weights."""
        return {"flips": self.flips, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Count on from a saved state, after the model's own weights were loaded."""
        self.positive = [weight.detach() >= 0 for weight in self.weights]
        self.flips.copy_(state["flips"])
        self.steps = state["steps"]


class Saturation:
    r"""Measure the share of latent weights with :math:`|w| \ge` ``limit`` at the end of an epoch.

    Column: ``saturation``. A clipped weight sits at exactly :math:`\pm 1`, where only a gradient
    towards zero can move it.
    """

    def __init__(self, limit: float = 0.99):
        self.limit = limit

    def start(self, model: nn.Module) -> None:
        """Remember which weights to look at."""
        self.weights = [layer.weight for layer in binary_layers(model)]

    def step(self) -> None:
        """Do nothing: the share is taken once an epoch."""

    def epoch(self) -> dict[str, float]:
        """Return {"saturation": share}, pooled over all binary layers; empty with none."""
        if not self.weights:
            return {}
        return {"saturation": share_above(self.weights, self.limit)}

    def state_dict(self) -> dict:
        """Return nothing: there is no state."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take nothing back."""


def _device(weights: list[Tensor]) -> torch.device:
    return weights[0].device if weights else torch.device("cpu")


def share_above(weights: list[Tensor], limit: float) -> float:
    """Return the share of all given weights with |w| >= limit, as a fraction.

    >>> share_above([torch.tensor([0.5, -1.0]), torch.tensor([1.0, 0.0])], 0.99)
    0.5
    """
    above = sum((weight.detach().abs() >= limit).sum() for weight in weights)
    return above.item() / sum(weight.numel() for weight in weights)


def latent_histogram(weight: Tensor, bins: int = 50, bound: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return (density, edges) of the weights over [-bound, bound], for BinaryConnect's figure 2.

    density has ``bins`` entries and integrates to the share of weights inside the bounds.

    >>> density, edges = latent_histogram(torch.tensor([-0.5, 0.5, 0.6]), bins=2)
    >>> density.tolist(), edges.tolist()
    ([0.3333333432674408, 0.6666666865348816], [-1.0, 0.0, 1.0])
    """
    values = weight.detach().float().cpu()
    counts, edges = torch.histogram(values.flatten(), bins, range=(-bound, bound))
    return counts / values.numel() / (2 * bound / bins), edges


def layer_weight(model: nn.Module, index: int = 0) -> Tensor:
    """Return the trained weight of the index-th linear or convolutional layer, detached."""
    kinds = (BinaryLayer, nn.Linear, nn.Conv2d)
    return [m for m in model.modules() if isinstance(m, kinds)][index].weight.detach()
