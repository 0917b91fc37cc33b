"""Adam and training strategies (Liu et al., ICML 2021): optimizer, weight decay, two steps.

The paper trains on ImageNet; here its comparisons are made on CIFAR-10, so only their directions
can be expected to agree, not the numbers. Sections 1 to 3 were read in translation, section 4 was
not available. In the comments, "paper" and "released code" (AdamBNN) name the source of a value;
values without a source are this book's own choice.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from bnnbook import data, probes, training
from bnnbook.binarize import real_weight
from bnnbook.experiments.quist2023 import DECAYS, NETWORKS, EachStep, forward_scaled_sign
from bnnbook.experiments.runs import finished, recipe_at, seconds_of, seeded
from bnnbook.layers import binary_layers
from bnnbook.optim import split_parameters
from bnnbook.records import Record, encode_array

BOUND = 1.5  # of the histogram of latent weights: the quantizer passes no gradient beyond 1

# The paper's measurements, all on ImageNet. Table 1, one step: weight decay, FF ratio (flips a
# step and weight), C2I and top-1 accuracy in per cent; then two steps.
PAPER = {
    "weight_decay": {
        "2x": (1e-5, 2.33e-3, 0.4810, 61.73),
        "1x": (5e-6, 1.62e-3, 0.4960, 61.89),
        "0x": (0.0, 2.86e-4, 0.5243, 61.49),
        "minus-20x": (-1e-4, 1.07e-7, 0.9740, 26.21),
    },
    "two_step": {"2x": (1e-5, 4.89e-4, 0.6315, 62.63), "1x": (5e-6, 4.50e-4, 0.6636, 63.23)},
    # figure 7: one step, two steps; figure 3: share of saturated inputs after epoch 1 and the last
    "optimizer": {"adam": (61.49, 63.23), "sgd": (58.98, 61.25)},
    "saturation": {"adam": (0.3545, 0.2381), "sgd": (0.4254, 0.3861)},
}


@dataclass(frozen=True)
class Recipe:
    """All settings of one run."""

    dataset: str
    network: str  # one of `quist2023.NETWORKS`
    epochs: int  # of each step
    lr: float  # falls linearly to 0, once per epoch: paper and released code
    falls: str = "epoch"  # after every "epoch", or after every "update"
    optimizer: str = "adam"  # of all parameters: paper; "adam" or "sgd"
    weight_decay: float = 0.0  # of latent weights, added to their gradient as torch does it
    steps: tuple[str, ...] = ("binary",)  # each "binary" or "real" (weights), one after another
    first_weight_decay: float = 0.0  # of the first of two steps
    batch_size: int = 256  # released code
    momentum: float = 0.9  # of SGD; Adam's first beta, the second is 0.999: released code
    start: float = 1e-3  # latent weights start as U(-start, start); released code: U(0, start)
    augment: bool = True  # crops after padding by 4, and flips


# The released code: 256 epochs a step on ImageNet, with a teacher's outputs as targets.
FULL = Recipe("cifar10", "birealnet20", 100, lr=1.25e-3)
SMALL = replace(FULL, dataset="digits", network="perceptron", epochs=6, lr=1e-2, batch_size=50,
                augment=False)  # fmt: skip

RATES = {  # paper: figure 8, read off its axes: 0.0001 to 0.005 and 0.002 to 0.2
    "adam": (1e-4, 1e-3, 5e-3, 2e-2),
    "sgd": (2e-4, 2e-3, 2e-2, 2e-1),
}
FACTORS = {"0x": 0, "1x": 1, "2x": 2, "20x": 20, "minus-20x": -20}  # paper: without the 20x
STEPS = {"one-step": ("binary",), "two-step": ("real", "binary"), "twice": ("binary", "binary")}
MULTIPLES = (1, 4, 16, 64)  # of the learning rate, in `steps_short` and `steps_long`
# Our own: as many epochs in all for one step as for two, without decay, at several rates. A rate
# that only falls after an epoch would still be half the first in the last of two epochs.
EQUAL = {
    name: {
        "small": replace(SMALL, epochs=epochs, falls="update"),
        "full": replace(FULL, epochs=epochs, network="birealnet8", falls="update"),
    }
    for name, epochs in (("steps_short", 4), ("steps_long", 8))
}

VARIANTS = {
    "optimizer": tuple(f"{name}-{lr:g}" for name, rates in RATES.items() for lr in rates),
    "weight_decay": tuple(FACTORS),
    "two_step": tuple(STEPS),
} | dict.fromkeys(EQUAL, tuple(f"{steps}-{by:g}x" for steps in STEPS for by in MULTIPLES))
RECIPES = {
    "optimizer": {"small": SMALL, "full": FULL},
    "weight_decay": {
        "small": replace(SMALL, weight_decay=1e-5),
        "full": replace(FULL, weight_decay=5e-6),  # paper
    },
    "two_step": {
        "small": replace(SMALL, first_weight_decay=1e-5),
        "full": replace(FULL, first_weight_decay=5e-6),  # paper: 5e-6, then 0
    },
} | EQUAL
BY_RECIPE = tuple(VARIANTS)  # equal recipes are the same run, whatever the experiment


def find_recipe(experiment: str, variant: str, scale: str, epochs: int | None) -> Recipe:
    """Return a variant's recipe at a scale.

    ``epochs`` replaces the recipe's if given: the number for each step or, where steps share it
    (`EQUAL`), for all together.
    """
    recipe = recipe_at("liu2021", experiment, variant, scale, epochs, VARIANTS, RECIPES)
    if experiment == "optimizer":
        kind, _, lr = variant.partition("-")
        recipe = replace(recipe, optimizer=kind, lr=float(lr))
    elif experiment == "weight_decay":
        recipe = replace(recipe, weight_decay=recipe.weight_decay * FACTORS[variant])
    elif experiment == "two_step":
        recipe = replace(recipe, steps=STEPS[variant])
        if variant != "two-step":
            recipe = replace(recipe, first_weight_decay=0.0)
    else:
        recipe = _share(recipe, *variant.rsplit("-", 1))
    return recipe


def _share(recipe: Recipe, name: str, multiple: str) -> Recipe:
    """Return the recipe of the named steps, which share its epochs, at a multiple of its rate."""
    steps = STEPS[name]
    each, left = divmod(recipe.epochs, len(steps))
    if left:
        raise ValueError(f"{len(steps)} steps cannot share {recipe.epochs} epochs")
    lr = recipe.lr * float(multiple.removesuffix("x"))
    return replace(recipe, steps=steps, epochs=each, lr=lr)


def scaled_sign(w: Tensor) -> Tensor:
    r"""Binarise to :math:`\kappa_c \operatorname{sign}(w)`, as the released code does.

    :math:`\kappa_c` is the mean of :math:`|w|` over output channel c of w (out, in, ...). Backward
    :math:`\partial q/\partial w = 1` where :math:`|w| \le 1`, else 0, without :math:`\kappa_c`. A
    latent weight beyond 1 gets no gradient any more, and is not clipped either.
    """
    return forward_scaled_sign(w, 1.0)


QUANTIZERS = {"binary": scaled_sign, "real": real_weight}


# --- Training ----------------------------------------------------------------------------------


@dataclass
class Fit:
    """A trained network with what was measured during training."""

    model: nn.Module
    histories: list[training.History]  # one per step
    dataset: data.Dataset
    recipe: Recipe
    start: nn.Module  # the network before the first step


def build_model(recipe: Recipe) -> nn.Module:
    """Return the recipe's network with small latent weights of either sign."""
    model = NETWORKS[recipe.network](scaled_sign)
    with torch.no_grad():
        for layer in binary_layers(model):
            layer.weight.uniform_(-recipe.start, recipe.start)
    return model


def build_optimizer(model: nn.Module, recipe: Recipe, number: int) -> torch.optim.Optimizer:
    """Return the optimizer of the step with this number; latent weights alone decay."""
    latent, real = split_parameters(model)
    first = number == 0 and len(recipe.steps) > 1
    decay = recipe.first_weight_decay if first else recipe.weight_decay
    # set in the group below, since torch's constructors refuse the paper's negative weight decay
    groups = [{"params": latent}, {"params": real}]
    if recipe.optimizer == "adam":
        optimizer = torch.optim.Adam(groups, recipe.lr, (recipe.momentum, 0.999))
    elif recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, recipe.lr, recipe.momentum)
    else:
        raise ValueError(f"unknown optimizer {recipe.optimizer!r}; known: adam, sgd")
    optimizer.param_groups[0]["weight_decay"] = decay
    return optimizer


def build_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, images: int):
    """Return the schedule by which a step's learning rate falls to zero, given so many images."""
    if recipe.falls == "epoch":
        return LambdaLR(optimizer, lambda epoch: 1 - epoch / recipe.epochs)
    updates = recipe.epochs * (images // recipe.batch_size)
    return EachStep(optimizer, DECAYS["linear"], updates)


def fit(recipe: Recipe, *, seed: int = 0, device=None, checkpoint=None,
        progress: bool | None = None) -> Fit:  # fmt: skip
    """Train the recipe's network, step by step.

    ``checkpoint`` is a file, or a folder for more than one step.
    """
    device = training.choose_device(device)
    dataset = data.load(recipe.dataset).to(device)
    with seeded(seed, device):  # on the CPU: the same start on every device
        model = build_model(recipe).to(device)
    start, histories = copy.deepcopy(model), []
    for number, weights in enumerate(recipe.steps):
        for layer in binary_layers(model):
            layer.set_quantizers(QUANTIZERS[weights], layer.input_quantizer)
        path = checkpoint
        if checkpoint and len(recipe.steps) > 1:
            path = Path(checkpoint) / f"step{number}.pt"
        optimizer = build_optimizer(model, recipe, number)
        schedule = build_schedule(optimizer, recipe, len(dataset.train_images))
        histories.append(training.train(
            model, dataset, optimizer, epochs=recipe.epochs, batch_size=recipe.batch_size,
            augment=data.crop_flip(padding=4) if recipe.augment else None,
            preprocess=data.standardize(dataset), schedulers=[schedule],
            probes=[probes.FlipRatio(), probes.C2I(), probes.ActivationSaturation(per_layer=True)],
            graph=True,
            seed=seed + 1000 * number, device=device, checkpoint=path, progress=progress,
        ))  # fmt: skip
    return Fit(model, histories, dataset, recipe, start)


# --- One function per comparison -----------------------------------------------------------------


def optimizer(variant: str = "adam-0.001", *, seed: int = 0, scale: str = "small",
              epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run Adam or SGD at one learning rate (figures 3 to 5, 7 and 8).

    ``epochs`` shortens the recipe; ``run`` takes `fit`'s device, checkpoint and progress.
    """
    return _run("optimizer", variant, seed, scale, epochs, run)


def weight_decay(variant: str = "1x", *, seed: int = 0, scale: str = "small",
                 epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run Adam with none, once, twice, 20 or -20 times the recipe's weight decay (table 1).

    ``epochs`` and ``run`` as in `optimizer`.
    """
    return _run("weight_decay", variant, seed, scale, epochs, run)


def two_step(variant: str = "two-step", *, seed: int = 0, scale: str = "small",
             epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run one step, or a step with real weights and then one with binary ones (table 1, figure 7).

    "twice" is our control: it is as long as two steps and restarts the learning rate, too, but has
    binary weights in both. ``epochs`` and ``run`` as in `optimizer`.
    """
    return _run("two_step", variant, seed, scale, epochs, run)


def steps_short(variant: str = "two-step-1x", *, seed: int = 0, scale: str = "small",
                epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run one step, two, or the control, as long as each other, at one of four learning rates.

    Two steps share the recipe's epochs, so one step is twice as long as either of them. ``epochs``
    replaces their sum; ``run`` as in `optimizer`.
    """
    return _run("steps_short", variant, seed, scale, epochs, run)


def steps_long(variant: str = "two-step-1x", *, seed: int = 0, scale: str = "small",
               epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run the same as `steps_short`, twice as long."""
    return _run("steps_long", variant, seed, scale, epochs, run)


def _run(experiment, variant, seed, scale, epochs, run) -> Record:
    fitted = fit(find_recipe(experiment, variant, scale, epochs), seed=seed, **run)
    return make_record(experiment, variant, seed, scale, fitted)


def make_record(experiment: str, variant: str, seed: int, scale: str, fitted: Fit) -> Record:
    """Return a finished run's record; its history is that of the last step."""
    *before, last = fitted.histories
    arrays = {f"test_accuracy, step {number}": encode_array(
                  np.array([row["test_accuracy"] for row in history.rows], np.float32))
              for number, history in enumerate(before, 1)}  # fmt: skip
    metrics, measured = measure(fitted)
    return finished(
        f"liu2021.{experiment}", variant, seed, scale, recipe=fitted.recipe,
        planned=find_recipe(experiment, variant, scale, None).epochs, history=last.rows,
        dataset=fitted.dataset, metrics=metrics, arrays=arrays | measured,
        before=sum(seconds_of(history.rows) for history in before),
    )  # fmt: skip


def measure(fitted: Fit) -> tuple[dict[str, float], dict]:
    """Return the metrics and the arrays of a run's record.

    - flip_ratio: the FF ratio, averaged over the epochs of the last step.
    - unmoved: fraction of latent weights still below the bound of their initialisation.
    - magnitude, magnitude_spread: mean and standard deviation over the output channels of the
      channels' mean latent magnitudes, in the first binary layer with a quantized input.
    - arrays: these magnitudes, and the histogram of all latent weights from -`BOUND` to `BOUND`.
    """
    rows, layers = fitted.histories[-1].rows, list(binary_layers(fitted.model))
    first = next(layer for layer in layers if layer.input_quantizer is not None)
    magnitudes = probes.channel_magnitudes(first.weight)
    latents = torch.cat([layer.weight.detach().flatten() for layer in layers])
    metrics = {
        "test_error": 1 - rows[-1]["test_accuracy"],
        "train_loss": rows[-1]["train_loss"],
        "flip_ratio": float(np.mean([row["flip_ratio"] for row in rows])),
        "c2i": rows[-1]["c2i"],
        "activation_saturation": rows[-1]["activation_saturation"],
        "unmoved": 1 - probes.share_above([latents], fitted.recipe.start),
        "magnitude": magnitudes.mean().item(),
        "magnitude_spread": magnitudes.std().item(),
    }
    histogram, _ = probes.latent_histogram(latents, bins=60, bound=BOUND)
    arrays = {"magnitudes": magnitudes.cpu(), "latent_histogram": histogram}
    return metrics, {name: encode_array(array.numpy()) for name, array in arrays.items()}
