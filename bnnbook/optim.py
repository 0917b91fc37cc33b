"""Which parameters are binary, how fast each may move, and what happens after a step."""

import math

import torch
from torch import nn

from bnnbook.layers import binary_layers, clip_latent_weights


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return (binary, real): the weights of binary layers, and every other parameter.

    Decided by layer type, never by name; a shared parameter is listed once, as binary if any of
    its layers is. Raises ValueError when the model has no binary layer.

    >>> from bnnbook.models import binaryconnect_mlp
    >>> [len(part) for part in split_parameters(binaryconnect_mlp())]
    [4, 8]
    """
    binary = list({id(layer.weight): layer.weight for layer in binary_layers(model)}.values())
    if not binary:
        raise ValueError("the model has no binary layer (BinaryLinear, BinaryConv2d)")
    known = {id(weight) for weight in binary}
    return binary, [p for p in model.parameters() if id(p) not in known]


def glorot_coefficient(layer: nn.Module) -> float:
    r"""Return BinaryConnect's coefficient :math:`c = \sqrt{1.5 / (n_{in} + n_{out})}` of a layer.

    :math:`n_{in}` and :math:`n_{out}` are the fans of ``layer.weight``, kernel area included. c is
    half the bound of Glorot's uniform initialisation (released code, ``binary_connect.py``).

    >>> round(1 / glorot_coefficient(nn.Linear(784, 1024)), 2)
    34.72
    """
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(layer.weight)
    return math.sqrt(1.5 / (fan_in + fan_out))


def glorot_scaled_groups(model: nn.Module, lr: float, power: int) -> list[dict]:
    r"""Return parameter groups with BinaryConnect's learning-rate scaling, for any optimizer.

    The rate of each binary layer is :math:`\eta / c^k`, that of all other parameters
    :math:`\eta`. Here :math:`\eta` = ``lr``, c = `glorot_coefficient` and k = ``power``: 1 for
    ADAM, 2 for SGD and Nesterov momentum, 0 for no scaling. The paper speaks of scaling *with* c;
    its code divides by it.

    >>> from bnnbook.models import binaryconnect_mlp
    >>> groups = glorot_scaled_groups(binaryconnect_mlp(), lr=0.01, power=1)
    >>> [round(group["lr"], 4) for group in groups]
    [0.3472, 0.3695, 0.3695, 0.2626, 0.01]
    """
    if power not in (0, 1, 2):
        raise ValueError(f"power must be 0 (no scaling), 1 (ADAM) or 2 (SGD), not {power!r}")
    _, real = split_parameters(model)
    scaled = [
        {"params": [layer.weight], "lr": lr / glorot_coefficient(layer) ** power}
        for layer in binary_layers(model)
    ]
    return [*scaled, {"params": real, "lr": lr}]


def clip_after_step(optimizer: torch.optim.Optimizer, model: nn.Module, bound: float = 1.0):
    """Clip the model's latent weights to [-bound, bound] after each step of the optimizer.

    Returns the handle; ``handle.remove()`` ends it. See `layers.clip_latent_weights`.
    """
    return optimizer.register_step_post_hook(lambda *_: clip_latent_weights(model, bound))
