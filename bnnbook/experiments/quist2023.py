"""Gradient filters (Quist, Li, van Gemert, ICLR 2023), one function per comparison of the paper.

We could not read the body of the paper, and its CIFAR-10 code is not released. The comparisons
follow a published review of the paper; where no comment names a source, a recipe's numbers are
this book's own choice. None of the paper's accuracies is known to us.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from bnnbook import data, filters, probes, training
from bnnbook.binarize import approx_sign, magnitude_aware_sign, sign, ste_sign
from bnnbook.experiments.runs import finished, recipe_at, seeded
from bnnbook.layers import BinaryLinear, binary_layers
from bnnbook.models import birealnet20
from bnnbook.optim import CascadedEMA, LatentSGD, split_parameters
from bnnbook.records import Record, encode_array

TINY = 2.0**-60  # a latent weight that starts at ±TINY is in effect a 0 with a random sign
START_STEPS = 200  # number of first steps whose flip ratios a record keeps one by one


@dataclass(frozen=True)
class Recipe:
    """All settings of one training run."""

    dataset: str
    network: str  # one of `NETWORKS`
    epochs: int
    alpha: float  # at the first step
    gamma: float = 0.1
    decay: str = "none"  # of alpha, one of `DECAYS`, step by step
    optimizer: str = "filter"  # CascadedEMA; for latent weights "latent" or "torch", both SGD
    latent_lr: float = 1.0  # lr of latent weights; their weight decay is alpha over it
    start: float = 0.0  # latent weights start as U(-start, start); 0: at 0 with a random sign
    clip: float | None = None  # bound of the latent weights
    quantizer: str = "sign"  # of the latent weights, one of `QUANTIZERS`
    batch_size: int = 50
    real_lr: float = 0.1  # of all other parameters: SGD, momentum 0.9, falling as a cosine
    real_weight_decay: float = 0.0  # of them, batch normalisation left out
    augment: bool = False  # crops after padding by 4, and flips
    norm_images: int = 10_000  # training images from which batch-norm statistics are re-estimated


SMALL = Recipe("digits", "perceptron", 16, alpha=0.01)
# Batch, rates and cosine of the real parameters are recalled from the paper and unverified.
FULL = Recipe("cifar10", "birealnet20", 150, alpha=1e-3, batch_size=256, real_weight_decay=1e-4,
              augment=True)  # fmt: skip


def cosine(u: float) -> float:
    """Return the factor of alpha at progress u, from 1 to 0 along half a cosine."""
    return (1 + math.cos(math.pi * u)) / 2


# How alpha decays: its factor as a function of the progress u, from 0 to 1.
DECAYS: dict[str, Callable[[float], float]] = {
    "none": lambda u: 1.0,
    "linear": lambda u: 1 - u,  # the released ImageNet code, there once per epoch
    "cosine": cosine,  # the CIFAR-10 study, says the review
    "step": lambda u: 0.1 ** sum((u >= 0.5, u >= 0.75)),
    "exponential": lambda u: 1e-3**u,
    "restarts": lambda u: cosine(4 * u % 1 if u < 1 else 1.0),  # four cosines in a row
    # The same two shapes with their freeze points about exchanged, in ten epochs of CIFAR-10
    "slow-exponential": lambda u: 0.1**u,
    "early-cosine": lambda u: max(cosine(min(u / 0.36, 1)), 1e-6),  # rates are above 0
    "stopped-exponential": lambda u: 0.1**u * min(1, 10 * (1 - u)),  # to 0 in the last tenth
}


def forward_scaled_sign(w: Tensor, clip_value: float = math.inf) -> Tensor:
    r"""Binarise to :math:`\kappa_c \operatorname{sign}(w)` and pass the gradient unchanged.

    :math:`\kappa_c` is the mean of :math:`|w|` over output channel c of w (out, in, ...). Backward
    :math:`\partial q/\partial w = 1` where :math:`|w| \le` ``clip_value``, else 0: unlike in
    `magnitude_aware_sign`, :math:`\kappa_c` is left out of the backward pass, as in the PyTorch
    code of Bi-Real Net and in the latent mode of Quist et al.'s released code.
    """
    passed = w.clamp(-clip_value, clip_value) if clip_value < math.inf else w
    # minus its detached copy it is exactly 0, but has a gradient
    return magnitude_aware_sign(w, None).detach() + (passed - passed.detach())


QUANTIZERS = {"sign": partial(ste_sign, clip_value=None), "scaled": forward_scaled_sign}


def perceptron(weight_quantizer, hidden: int = 128, pixels: int = 64) -> nn.Sequential:
    """Return an MLP, pixels-hidden-hidden-10, with all weights and hidden activations binary.

    Batch normalisation follows every layer; its gains and shifts are the only real parameters.
    Input (N, ...) with ``pixels`` numbers an image, by default the digits'; output (N, 10).
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, units in pairwise([pixels, hidden, hidden, 10]):
        quantizer = approx_sign if len(layers) > 1 else None
        layers.append(BinaryLinear(inputs, units, weight_quantizer=weight_quantizer,
                                   input_quantizer=quantizer))  # fmt: skip
        layers.append(nn.BatchNorm1d(units))
    return nn.Sequential(*layers)


def birealnet8(quantizer: Callable | None, in_channels: int = 3) -> nn.Module:
    """Return a Bi-Real Net with two binary convolutions a stage, half as wide as that of 20."""
    return birealnet20(in_channels=in_channels, widths=(8, 16, 32), convolutions=(2, 2, 2),
                       weight_quantizer=quantizer)  # fmt: skip


NETWORKS = {
    "perceptron": perceptron,
    "birealnet8": birealnet8,
    "birealnet20": lambda quantizer: birealnet20(weight_quantizer=quantizer),
}


# --- What varies -------------------------------------------------------------------------------


def _order(recipe: Recipe) -> dict[str, dict]:
    """Return the second-order filter, and first-order ones of equal noise gain or flip rate."""
    rates = recipe.alpha, recipe.gamma
    same = {
        "second": {},
        "first-same-noise": {"alpha": filters.same_noise_alpha(rates), "gamma": 1.0},
        "first-same-flips": {"alpha": filters.same_flip_rate_alpha(rates), "gamma": 1.0},
    }
    return {f"{name}-{decay}": changes | {"decay": decay}
            for name, changes in same.items() for decay in ("none", "cosine")}  # fmt: skip


def _scale_invariance(recipe: Recipe) -> dict[str, dict]:
    """Return the grid of clipping, scaling, learning rate and start of the latent weights."""
    modes = {"plain": {}, "clipped": {"clip": 1.0}, "scaled": {"quantizer": "scaled"},
             "clipped-scaled": {"clip": 1.0, "quantizer": "scaled"}}  # fmt: skip
    return {
        f"{mode}-lr{lr:g}-start{start:g}": changes
        | {"optimizer": "latent", "latent_lr": lr, "start": start}
        for mode, changes in modes.items()
        for lr in (1 / 64, 1.0, 64.0, 4096.0)
        for start in (0.0, 1.0)
        if start or "scaled" not in mode  # all zero, the scale would be 0 as well
    }


# The changes that each variant makes to its experiment's recipe, as a function of that recipe; the
# most informative experiments come first.
CHANGES: dict[str, Callable[[Recipe], dict[str, dict]]] = {
    "latent_parity": lambda recipe: {
        name: {"optimizer": name} for name in ("filter", "latent", "torch")
    },
    "order": _order,
    "alpha_decay": lambda recipe: {decay: {"decay": decay} for decay in DECAYS},
    "alpha_sweep": lambda recipe: {
        f"{alpha:g}-{decay}": {"alpha": alpha, "decay": decay}
        for decay in ("none", "cosine")
        for alpha in (0.1, 0.01, 0.001, 0.0001, 0.00001)
    },
    "gamma_sweep": lambda recipe: {
        f"{gamma:g}-{decay}": {"gamma": gamma, "decay": decay}
        for decay in ("none", "cosine")
        for gamma in (1.0, 0.3, 0.1, 0.03, 0.01)
    },
    "spectra": lambda recipe: {"second": {}, "first": {"gamma": 1.0}},
    "scale_invariance": _scale_invariance,
}
BASE: dict[str, dict] = {
    "alpha_decay": {"small": replace(SMALL, alpha=0.1), "full": replace(FULL, alpha=0.01)},
    "gamma_sweep": {"small": replace(SMALL, alpha=0.1), "full": replace(FULL, alpha=0.01)},
    "latent_parity": {
        "small": replace(SMALL, decay="cosine"), "full": replace(FULL, decay="cosine")
    },
}  # fmt: skip
RECIPES = {name: BASE.get(name, {"small": SMALL, "full": FULL}) for name in CHANGES}
VARIANTS = {name: tuple(changes(SMALL)) for name, changes in CHANGES.items()}
# Equal recipes are the same run, whatever the experiment; but "spectra" records gradients as well.
BY_RECIPE = tuple(name for name in CHANGES if name != "spectra")


def find_recipe(experiment: str, variant: str, scale: str, epochs: int | None,
                alpha: float | None = None) -> Recipe:  # fmt: skip
    """Return a variant's recipe at a scale.

    ``epochs`` and ``alpha``, if given, replace the recipe's; alpha before the variant's changes.
    """
    recipe = recipe_at("quist2023", experiment, variant, scale, epochs, VARIANTS, RECIPES)
    recipe = recipe if alpha is None else replace(recipe, alpha=alpha)
    return replace(recipe, **CHANGES[experiment](recipe)[variant])


# --- Training ----------------------------------------------------------------------------------


class EachStep:
    """A learning-rate schedule that advances after every optimizer step, not after each epoch.

    ``factor`` is a function of the progress, which is 0 before the first of ``steps`` steps and 1
    after the last. `training.train` only saves and restores it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable, steps: int):
        self.scheduler = LambdaLR(optimizer, lambda step: factor(min(1.0, step / steps)))
        optimizer.register_step_post_hook(lambda *_: self.scheduler.step())

    def step(self) -> None:
        """Do nothing at the end of an epoch."""

    def state_dict(self) -> dict:
        """Return the scheduler's state."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Go on from a saved state."""
        self.scheduler.load_state_dict(state)


@dataclass
class Fit:
    """A trained network with what was measured during training."""

    model: nn.Module
    history: training.History
    dataset: data.Dataset
    preprocess: Callable[[Tensor], Tensor]
    recipe: Recipe
    flips: probes.FlipRatio

    @property
    def error(self) -> float:
        """The test error with the running statistics of batch normalisation."""
        return 1 - self.history.rows[-1]["test_accuracy"]

    def renewed_error(self, augment: Callable[[Tensor], Tensor] | None = None) -> float:
        """Return the test error with batch-norm statistics re-estimated for the final weights.

        They come from training images, after ``augment``, if it is given, as in training.
        """
        images = self.dataset.train_images[: self.recipe.norm_images]
        with seeded(0, images.device):
            images = augment(images) if augment else images
        network = training.own_statistics(self.model, images, preprocess=self.preprocess)
        test = self.dataset.test_images, self.dataset.test_labels
        return 1 - training.evaluate(network, *test, preprocess=self.preprocess)


def build_model(recipe: Recipe) -> nn.Module:
    """Return the recipe's network; a seed gives the same signs to latent and binary weights."""
    latent = recipe.optimizer != "filter"
    model = NETWORKS[recipe.network](QUANTIZERS[recipe.quantizer] if latent else None)
    return started(model, recipe.start if latent else None)


@torch.no_grad()
def started(model: nn.Module, start: float | None) -> nn.Module:
    """Draw the binary layers' weights from U(-1, 1), and scale those of latent ones; in place.

    start: None for weights that are not latent, else as in a `Recipe`.
    """
    for layer in binary_layers(model):
        layer.weight.uniform_(-1, 1)
        if start is not None:
            layer.weight.copy_(start * layer.weight if start else TINY * sign(layer.weight))
    return model


def binary_optimizer(weights: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """Return the optimizer of the binary weights; all three are the filter (alpha, gamma).

    torch's SGD equals it only for a constant alpha, with the settings that `sgd_rates` inverts.
    """
    alpha, gamma, lr = recipe.alpha, recipe.gamma, recipe.latent_lr
    if recipe.optimizer == "filter":
        return CascadedEMA(weights, alpha, gamma)
    if recipe.optimizer == "latent":
        return LatentSGD(weights, lr, gamma, weight_decay=alpha / lr, clip=recipe.clip)
    if recipe.optimizer == "torch":
        momentum = (1 - alpha) * (1 - gamma)
        return torch.optim.SGD(weights, lr, momentum, weight_decay=alpha * gamma / lr)
    raise ValueError(f"unknown optimizer {recipe.optimizer!r}; known: filter, latent, torch")


def real_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return SGD for the real parameters, with weight decay on all but one-dimensional ones."""
    _, real = split_parameters(model)
    groups = [
        {"params": [p for p in real if p.dim() > 1], "weight_decay": recipe.real_weight_decay},
        {"params": [p for p in real if p.dim() <= 1]},
    ]
    return torch.optim.SGD([g for g in groups if g["params"]], recipe.real_lr, momentum=0.9)


def binary_schedules(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> list:
    """Return the schedules of the binary weights' optimizer over so many steps."""
    return [EachStep(optimizer, DECAYS[recipe.decay], steps)]


def fit(recipe: Recipe, *, seed: int = 0, device=None, checkpoint=None,
        progress: bool | None = None, samples: Sequence[probes.GradientSample] = (),
        build: Callable = build_model, choose: Callable = binary_optimizer,
        schedules: Callable = binary_schedules, validation: int = 0) -> Fit:  # fmt: skip
    """Train the recipe's network; ``samples`` record gradients during training.

    build, choose, schedules: functions, like the default ones, that return the network, the
    optimizer of its binary weights and the schedules of that optimizer.
    validation: how many of the training images to hold out.
    """
    device = training.choose_device(device)
    dataset = data.load(recipe.dataset).to(device)
    dataset = dataset.hold_out(validation) if validation else dataset
    preprocess = data.standardize(dataset)
    with seeded(seed, device):  # on the CPU: the same start on every device
        model = build(recipe).to(device)
        binary = choose(split_parameters(model)[0], recipe)  # which draws signs of 0
    real = real_optimizer(model, recipe)
    steps = recipe.epochs * (len(dataset.train_images) // recipe.batch_size)
    flips = probes.FlipRatio(per_layer=recipe.network != "perceptron", per_step=True)
    history = training.train(
        model, dataset, [binary, real], epochs=recipe.epochs, batch_size=recipe.batch_size,
        augment=data.crop_flip(padding=4) if recipe.augment else None, preprocess=preprocess,
        schedulers=[*schedules(binary, recipe, steps), EachStep(real, DECAYS["cosine"], steps)],
        probes=[flips, *samples], seed=seed, device=device, checkpoint=checkpoint,
        progress=progress, graph=True,
    )  # fmt: skip
    return Fit(model, history, dataset, preprocess, recipe, flips)


# --- One function per comparison ---------------------------------------------------------------


def alpha_sweep(variant: str = "0.01-none", *, seed: int = 0, scale: str = "small",
                epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run one alpha, constant or with cosine decay: accuracy and flip ratio over alpha.

    ``epochs`` shortens the recipe; ``run`` takes `fit`'s device, checkpoint and progress.
    """
    return _run("alpha_sweep", variant, seed, scale, epochs, **run)


def alpha_decay(variant: str = "cosine", *, seed: int = 0, scale: str = "small",
                epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run one schedule of alpha out of `DECAYS`; the review names cosine and none as the paper's.

    ``epochs`` and ``run`` as in `alpha_sweep`.
    """
    return _run("alpha_decay", variant, seed, scale, epochs, **run)


def gamma_sweep(variant: str = "0.1-none", *, seed: int = 0, scale: str = "small",
                epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run one gamma, with alpha constant or under a cosine; gamma 1 is the first order.

    The comparison is ours. ``epochs`` and ``run`` as in `alpha_sweep`.
    """
    return _run("gamma_sweep", variant, seed, scale, epochs, **run)


def order(variant: str = "second-none", *, seed: int = 0, scale: str = "small",
          epochs: int | None = None, alpha: float | None = None, **run) -> Record:  # fmt: skip
    """Run the second-order filter, or a first-order one of the same noise gain or flip rate.

    ``alpha`` is that of the second-order filter, by default the recipe's; ``epochs`` and ``run``
    as in `alpha_sweep`.
    """
    return _run("order", variant, seed, scale, epochs, alpha, **run)


def latent_parity(variant: str = "filter", *, seed: int = 0, scale: str = "small",
                  epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run the filter on ±1 weights, or as latent weights under `LatentSGD` or torch's own SGD.

    ``epochs`` and ``run`` as in `alpha_sweep`.
    """
    return _run("latent_parity", variant, seed, scale, epochs, **run)


def scale_invariance(variant: str = "plain-lr1-start0", *, seed: int = 0, scale: str = "small",
                     epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run latent weights with one learning rate and start, clipped or not, scaled or not.

    Alpha is the same in all variants.

    ``epochs`` and ``run`` as in `alpha_sweep`.
    """
    return _run("scale_invariance", variant, seed, scale, epochs, **run)


def spectra(variant: str = "second", *, seed: int = 0, scale: str = "small",
            epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Record gradients at the start, in the middle and at the end of a run: are they noise?

    Metrics and arrays are those of `gradient_statistics`. ``epochs`` and ``run`` as in
    `alpha_sweep`.
    """
    recipe = find_recipe("spectra", variant, scale, epochs)
    images = len(data.load(recipe.dataset).train_images)
    steps = recipe.epochs * (images // recipe.batch_size)
    length = min(4096, max(2, steps // 3))
    samples = [probes.GradientSample(256, length, after=phase * (steps - length) // 2)
               for phase in range(3)]  # fmt: skip
    fitted = fit(recipe, seed=seed, samples=samples, **run)
    metrics, arrays = {}, {}
    for phase, sample in zip(("start", "middle", "end"), samples, strict=True):
        numbers, power = gradient_statistics(np.hstack(list(sample.gradients().values())))
        metrics |= {f"{name}, {phase}": value for name, value in numbers.items()}
        arrays[f"power, {phase}"] = encode_array(power)
    return make_record("spectra", variant, seed, scale, fitted, metrics, arrays)


def gradient_statistics(gradients: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Return statistics of gradients (steps, weights), and their power spectrum.

    "snr" and "autocorrelation" are medians over the weights of `signal_to_noise` and
    `lag_one_autocorrelation`; the power is that of `power_spectrum`, float32.
    """
    numbers = {"snr": probes.signal_to_noise(gradients),
               "autocorrelation": probes.lag_one_autocorrelation(gradients)}  # fmt: skip
    _, power = probes.power_spectrum(gradients, min(256, len(gradients)))
    medians = {name: float(np.nanmedian(values)) for name, values in numbers.items()}
    return medians, power.astype(np.float32)


def _run(experiment, variant, seed, scale, epochs, alpha=None, **run) -> Record:
    fitted = fit(find_recipe(experiment, variant, scale, epochs, alpha), seed=seed, **run)
    return make_record(experiment, variant, seed, scale, fitted)


def make_record(experiment: str, variant: str, seed: int, scale: str, fitted: Fit,
                metrics: dict | None = None, arrays: dict | None = None) -> Record:  # fmt: skip
    """Return a finished run's record: the last epoch's error, flip ratios, history."""
    flips = fitted.flips.history()
    if flips.dim() == 2:  # one column per layer: pool the layers, weighted by their sizes
        sizes = flips.new_tensor(fitted.flips.sizes)
        flips = flips @ sizes / sizes.sum()
    beginning = encode_array(flips[:START_STEPS].float().numpy())
    return finished(
        f"quist2023.{experiment}", variant, seed, scale, recipe=fitted.recipe,
        planned=RECIPES[experiment][scale].epochs, history=fitted.history.rows,
        dataset=fitted.dataset, metrics=measured(fitted) | (metrics or {}),
        arrays={"start_flips": beginning, **(arrays or {})},
    )  # fmt: skip


def measured(fitted: Fit) -> dict[str, float]:
    """Return the metrics of a run: the last epoch's errors, loss and flip ratios.

    "flip_ratio" is the mean over all epochs but the first, which begins with the flips of the
    start. Where training augments its images, "augmented_test_error" is with batch-norm statistics
    of such images, "renewed_test_error" with those of the images as they are: a network that has
    come to rest was trained under the former.
    """
    rows = fitted.history.rows
    errors = {"test_error": fitted.error, "renewed_test_error": fitted.renewed_error()}
    if fitted.recipe.augment:
        errors["augmented_test_error"] = fitted.renewed_error(data.crop_flip(padding=4))
    return {
        **errors,
        "train_loss": rows[-1]["train_loss"],
        "flip_ratio": mean_flip_ratio(rows),
        "last_flip_ratio": rows[-1]["flip_ratio"],
    }


def mean_flip_ratio(rows: Sequence[Mapping]) -> float:
    """Return the mean flip ratio of a history's rows but the first, unless it is the only one."""
    return float(np.mean([row["flip_ratio"] for row in rows[1:] or rows]))


def noise_flips(recipe: Mapping, batches: int) -> NDArray:
    """Return the flips a step, in each epoch, of pure noise through a run's filter from zero.

    recipe: as a record has it, with "alpha", "gamma", "decay" and "epochs". batches: an epoch's
    steps. Like the schedule itself, the rates of `filters.decaying_flip_rates` change in every
    step.
    """
    steps = batches * recipe["epochs"]
    factor = DECAYS[recipe["decay"]]
    alphas = [recipe["alpha"] * factor(i / steps) for i in range(steps)]
    found = filters.decaying_flip_rates(alphas, recipe["gamma"])
    return found.reshape(recipe["epochs"], batches).mean(1)
