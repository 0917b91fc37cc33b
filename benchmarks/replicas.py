"""What K runs cost as replicas in one batched step, as a multiple of K runs one by one.

A replica is a run of its own: another seed, its own mini-batches and batch-norm statistics. The
parameters of all are stacked, `torch.func` maps the gradient of one over the stack, and the
optimizers, whose rules are elementwise, step once for all. "ratio" is the time of one batched step
of K runs over that of K steps of one run alone; `benchmarks/packing.py` times processes.
Everything is in float32: under autocast on a CPU, torch 2.11 cannot map batch normalisation of
bfloat16.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from benchmarks.timing import seconds
from bnnbook.binarize import sign
from bnnbook.layers import BinaryLayer, SquaredHingeLoss
from bnnbook.models import binaryconnect_mlp, birealnet20
from bnnbook.optim import CascadedEMA, LatentSGD, split_parameters
from bnnbook.training import to_channels_last

REPLICAS = (1, 2, 4, 8)
STEPS = 24  # after which a replica's weights are compared with those of its run alone
ENOUGH = 5.0  # seconds after which three repeats will do

Batch = tuple[Tensor, Tensor]  # inputs and labels; of replicas, stacked
Step = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Kind:
    """A kind of run; ``optimizers`` makes optimizers of its binary and its real parameters."""

    network: Callable[[], nn.Module]
    optimizers: Callable[[list[Tensor], list[Tensor]], list[torch.optim.Optimizer]]
    loss: Callable[[Tensor, Tensor], Tensor]
    shape: tuple[int, ...]  # of one input
    batch: int

    def model(self, seed: int, device: torch.device) -> nn.Module:
        """Return the network of a seed, in training mode."""
        torch.manual_seed(seed)
        return self.network().to(device).train()

    def batches(self, seed: int, device: torch.device, steps: int = 1) -> list[Batch]:
        """Return the random mini-batches of a seed's run."""
        draw = torch.Generator().manual_seed(seed)
        inputs = torch.randn(steps, self.batch, *self.shape, generator=draw).to(device)
        labels = torch.randint(0, 10, (steps, self.batch), generator=draw).to(device)
        return list(zip(inputs, labels, strict=True))


def latent(binary, real) -> list[torch.optim.Optimizer]:
    """Return optimizers of clipped latent weights and of real parameters."""
    return [LatentSGD(binary, lr=100.0, gamma=0.1, clip=1.0), torch.optim.SGD(real, 0.1, 0.9)]


def flipping(binary, real) -> list[torch.optim.Optimizer]:
    """Return optimizers of weights of exactly ±1 and of real parameters."""
    return [CascadedEMA(binary, alpha=1e-3, gamma=0.1), torch.optim.SGD(real, 0.1, 0.9)]


HINGE = SquaredHingeLoss("batchmean")
SMALL = partial(binaryconnect_mlp, 64, (256, 256))
KINDS = {
    "digits perceptron": Kind(SMALL, latent, HINGE, (64,), 50),
    "MNIST perceptron": Kind(binaryconnect_mlp, latent, HINGE, (784,), 100),
    "Bi-Real Net 20": Kind(partial(birealnet20, weight_quantizer=None), flipping, cross_entropy,
                           (3, 32, 32), 100),
}  # fmt: skip


def alone(kind: Kind, model: nn.Module) -> Step:
    """Return the step of one run, in the memory layout that `training.train` uses."""
    to_channels_last(model)
    optimizers = kind.optimizers(*split_parameters(model))

    def step(inputs: Tensor, labels: Tensor) -> None:
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        kind.loss(model(inputs), labels).backward()
        update(optimizers)

    return step


def batched(kind: Kind, models: list[nn.Module]) -> tuple[Step, dict[str, Tensor]]:
    """Return one step of all these networks' runs, and the stacked state that it changes.

    The step takes (K, N, ...) inputs and (K, N) labels; the state has the names of a state dict.
    """
    model = models[0]
    parameters, buffers = stack_module_state(models)
    name = {id(parameter): name for name, parameter in model.named_parameters()}
    parts = ([parameters[name[id(p)]] for p in part] for part in split_parameters(model))
    optimizers = kind.optimizers(*parts)

    def loss(parameters, buffers, inputs, labels):
        outputs = functional_call(model, (parameters, buffers), (inputs,))
        return kind.loss(outputs, labels)

    gradients = vmap(grad(loss), randomness="different")

    def step(inputs: Tensor, labels: Tensor) -> None:
        with torch.no_grad():  # on the stack; `grad` differentiates each replica inside
            found = gradients(parameters, buffers, inputs, labels)
        for key, parameter in parameters.items():
            parameter.grad = found[key]
        update(optimizers)

    return step, parameters | buffers


def update(optimizers: list[torch.optim.Optimizer]) -> None:
    """Let each optimizer step once, then drop the gradients."""
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def stacked(kind: Kind, count: int, device: torch.device, steps: int = 1) -> list[Batch]:
    """Return the mini-batches of the seeds 0, 1, ... side by side, for each step."""
    runs = (kind.batches(seed, device, steps) for seed in range(count))
    return [tuple(map(torch.stack, zip(*step, strict=True))) for step in zip(*runs, strict=True)]


def run(device: torch.device, repeats: int, kinds: dict[str, Kind] = KINDS) -> list[dict]:
    """Time each kind of run, and tell how far a replica strays from the same run alone."""
    table = []
    for name, kind in kinds.items():
        for count in REPLICAS:
            found = replicas(kind, count, device, repeats)
            table.append({"what": f"{name}: {count} in one step / alone", **found})
        table.append({"what": f"{name}: the second of 2 in one step", **stray(kind, device)})
    return table


def compared(ours: Callable[[], float], alone: Callable[[], float], images: int, repeats: int):
    """Return the median ratio of the seconds that two functions, called in turns, return."""
    ours(), alone()
    times, began = [], time.perf_counter()
    while len(times) < repeats and (len(times) < 3 or time.perf_counter() < began + ENOUGH):
        times.append((ours(), alone()))
    took, plain = (statistics.median(column) for column in zip(*times, strict=True))
    return {"ratio": statistics.median(a / b for a, b in times), "seconds": took,
            "plain_seconds": plain, "images_per_second": images / took}  # fmt: skip


def replicas(kind: Kind, count: int, device: torch.device, repeats: int) -> dict:
    """Time one step of ``count`` replicas against as many steps of the first one alone."""
    step, _ = batched(kind, [kind.model(seed, device) for seed in range(count)])
    both = partial(step, *stacked(kind, count, device)[0])
    one = partial(alone(kind, kind.model(0, device)), *kind.batches(0, device)[0])
    times = (partial(seconds, do, device) for do in (both, partial(again, one, count)))
    return compared(*times, count * kind.batch, repeats)


def again(step: Callable[[], None], times: int) -> None:
    """Take ``step`` so many ``times``."""
    for _ in range(times):
        step()


def stray(kind: Kind, device: torch.device) -> dict:
    """Return after which step the first binary weight differs, and what share does at the end.

    Rounding is all that differs; the same run in another memory layout strays too.
    """
    models = [kind.model(seed, device) for seed in range(2)]
    names = [name for name, layer in models[1].named_modules() if isinstance(layer, BinaryLayer)]
    step, state = batched(kind, models)
    single, first = alone(kind, models[1]), None
    for number, (inputs, labels) in enumerate(stacked(kind, 2, device, STEPS), 1):
        step(inputs, labels)
        single(inputs[1], labels[1])
        pairs = ((state[f"{n}.weight"][1], models[1].get_submodule(n).weight) for n in names)
        differ = torch.cat([(sign(a) != sign(b)).flatten() for a, b in pairs])
        if first is None and differ.any():
            first = number
    return {"first_step": first, "differ": differ.float().mean().item()}
