"""A training step of Bi-Real Net 20 at batch 256, against one without binarisation.

And against one with torch's global average pooling, on a CPU in bfloat16 as well.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.timing import best, row
from bnnbook.binarize import approx_sign, real_weight, ste_sign
from bnnbook.layers import binary_layers
from bnnbook.models import birealnet20
from bnnbook.optim import CascadedEMA, split_parameters
from bnnbook.training import autocast_dtype

BATCH = 256


def network(device: torch.device, weights=None, inputs=approx_sign) -> nn.Module:
    """Return the network with these quantizers, as `training.train` lays it out."""
    torch.manual_seed(0)
    model = birealnet20(weight_quantizer=weights)
    for layer in binary_layers(model):
        layer.input_quantizer = inputs
    return model.to(device, memory_format=torch.channels_last).train()


def step_of(model: nn.Module, optimizers, device: torch.device, compiled: bool = False,
            dtype: torch.dtype | None = None):  # fmt: skip
    """Return a training step on a fixed batch; compiled as by `training.train(compile=True)`."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,), generator=generator).to(device)
    dtype = dtype or autocast_dtype(device)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            outputs = forward(images)
        cross_entropy(outputs.float(), labels).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def sgd(parameters) -> torch.optim.Optimizer:
    """Return the baseline's optimizer."""
    return torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-4)


def binary_step(device: torch.device, compiled: bool = False):
    """Return the step with weights of exactly ±1 and CascadedEMA."""
    model = network(device)
    binary, real = split_parameters(model)
    return step_of(model, [CascadedEMA(binary, 1e-3, 0.1), sgd(real)], device, compiled)


def latent_step(device: torch.device, weights, inputs, compiled: bool = False):
    """Return the step with SGD on every parameter; `real_weight` and None binarise nothing."""
    model = network(device, weights, inputs)
    return step_of(model, [sgd(model.parameters())], device, compiled)


def pooling_steps(device: torch.device, dtype: torch.dtype | None) -> dict:
    """Return the latent step with the library's global average pooling and with torch's."""
    steps = {}
    for name in ("ours", "torch"):
        model = network(device, ste_sign)
        if name == "torch":
            model.output[0] = nn.AdaptiveAvgPool2d(1)
        steps[name] = step_of(model, [sgd(model.parameters())], device, dtype=dtype)
    return steps


def run(device: torch.device, repeats: int) -> list[dict]:
    """Time the steps; the goal is for the compiled ones, where the sign needs no separate pass."""
    functions = {}
    for compiled in (False, True):
        how = ", compiled" * compiled
        functions |= {
            f"real{how}": latent_step(device, real_weight, None, compiled),
            f"binary, CascadedEMA{how}": binary_step(device, compiled),
            f"binary, latent weights{how}": latent_step(device, ste_sign, approx_sign, compiled),
        }
    times, table = best(functions, device, repeats), []
    for name, time in times.items():
        if "real" not in name:
            compiled = ", compiled" * name.endswith("compiled")
            real = times[f"real{compiled}"]
            goal, met = ("<= 1.15", time <= 1.15 * real) if compiled else ("", None)
            table.append(row(f"{name} / real{compiled}", time, real, goal, met))
    for dtype in dict.fromkeys((autocast_dtype(device), torch.bfloat16)):
        times = best(pooling_steps(device, dtype), device, repeats)
        what = f"pooling by channel / AdaptiveAvgPool2d, {dtype or 'torch.float32'}"
        table.append(row(what.replace("torch.", ""), times["ours"], times["torch"], "", None))
    return table
