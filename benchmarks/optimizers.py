"""The optimizers' steps on the 11 million binary weights of a Bi-Real Net 18 against torch's SGD.

`torch.optim.SGD(momentum, weight_decay, fused=True)` is the fastest step torch has. The literal
loop does what the papers' released optimizers do: new tensors, one concatenation, a boolean mask.
"""

import torch
from torch import nn

from benchmarks.timing import best, row
from bnnbook.optim import Bop, CascadedEMA, split_parameters

ALPHA, GAMMA = 1e-3, 0.1


def shapes() -> list[tuple[int, ...]]:
    """Return the shapes of the binary weights of a Bi-Real Net 18."""
    from bnnbook.models import birealnet18

    with torch.device("meta"):
        binary, _ = split_parameters(birealnet18())
    return [tuple(weight.shape) for weight in binary]


def parameters(device: torch.device) -> list[nn.Parameter]:
    """Return binary weights of these shapes, each with a gradient."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(s, generator=generator).sign()) for s in shapes()]
    weights = [nn.Parameter(weight.detach().to(device)) for weight in weights]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator).to(device)
    return weights


@torch.no_grad()
def literal_step(weights, momentum, filtered) -> None:
    """Take the cascade's step as one would first write it."""
    for i, weight in enumerate(weights):
        momentum[i] = (1 - GAMMA) * momentum[i] + GAMMA * weight.grad
        filtered[i] = (1 - ALPHA) * filtered[i] + ALPHA * momentum[i]
    binary = torch.cat([weight.flatten() for weight in weights])
    mask = torch.cat([g.flatten() for g in filtered]) * binary > 0
    binary[mask] = -binary[mask]
    for weight, part in zip(weights, binary.split([w.numel() for w in weights]), strict=True):
        weight.copy_(part.view_as(weight))


def literal(weights):
    """Return the literal step, with its own buffers."""
    buffers = [[torch.zeros_like(w) for w in weights] for _ in range(2)]
    return lambda: literal_step(weights, *buffers)


def run(device: torch.device, repeats: int) -> list[dict]:
    """Time the steps; every optimizer has its own weights."""
    sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    functions = {
        "sgd": torch.optim.SGD(parameters(device), **sgd, fused=True).step,
        "literal": literal(parameters(device)),
    }
    rules = {"CascadedEMA": (CascadedEMA, (ALPHA, GAMMA), 1.5), "Bop": (Bop, (1e-4, 1e-8), 1.2)}
    for name, (kind, rates, _) in rules.items():
        for fused in (True, False):
            optimizer = kind(parameters(device), *rates, fused=fused)
            functions[f"{name}{', fused' * fused}"] = optimizer.step
    times = best(functions, device, repeats)
    table = []
    for name, (_, _, limit) in rules.items():
        for variant in (f"{name}, fused", name):
            ours, plain = times[variant], times["sgd"]
            goal = f"<= {limit}" if "fused" in variant else ""
            met = ours <= limit * plain if goal else None
            table.append(row(f"{variant} / SGD, fused", ours, plain, goal, met))
    for variant in ("CascadedEMA, fused", "CascadedEMA"):
        ours, plain = times[variant], times["literal"]
        table.append(
            row(f"literal loop / {variant}", ours, plain, ">= 4", plain >= 4 * ours, "speed")
        )
    return table
