"""What the probes add to a training step of Bi-Real Net 20 at batch 256."""

import torch

from benchmarks.network import network, sgd, step_of
from benchmarks.timing import best, row
from bnnbook import probes
from bnnbook.optim import CascadedEMA, split_parameters


def probed_step(device: torch.device, probe=None):
    """Return a training step, followed by that of the probe if there is one."""
    model = network(device)
    binary, real = split_parameters(model)
    step = step_of(model, [CascadedEMA(binary, 1e-3, 0.1), sgd(real)], device)
    if probe is None:
        return step
    probe.start(model)

    def probed() -> None:
        step()
        probe.step()

    return probed


def run(device: torch.device, repeats: int) -> list[dict]:
    """Time a step with each probe, one at a time."""
    cases = {
        "FlipRatio": (probes.FlipRatio(), 1),
        "FlipRatio, per layer and step": (probes.FlipRatio(per_layer=True, per_step=True), 1),
        "C2I": (probes.C2I(), 1),
        "GradientSample": (probes.GradientSample(), 1),
        # timed at every step, but counted for one in 16, which is how often it looks
        "ActivationSaturation": (probes.ActivationSaturation(every=1), 16),
    }
    functions = {"none": probed_step(device)}
    functions |= {name: probed_step(device, probe) for name, (probe, _) in cases.items()}
    times = best(functions, device, repeats)
    none, table = times.pop("none"), []
    for name, seconds in times.items():
        seconds = none + (seconds - none) / cases[name][1]
        table.append(row(f"{name} / no probe", seconds, none, "<= 1.05", seconds <= 1.05 * none))
    return table
