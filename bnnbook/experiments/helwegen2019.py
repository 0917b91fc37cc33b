"""Latent weights do not exist (Helwegen et al., NeurIPS 2019), one function per figure or test.

Hyperparameters come from the paper (read as arXiv 1906.02107v1) and, where it is silent, from the
authors' code: models/binarynet.py and data/cifar10.py. Our own choices are marked as such. No
validation set is held out, and the test error is that after the last epoch: it selects nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

from bnnbook import data, training
from bnnbook.binarize import real_weight, ste_sign
from bnnbook.experiments.runs import finished, recipe_at, seeded
from bnnbook.layers import binary_layers, quantized_by
from bnnbook.models import binarynet
from bnnbook.optim import (
    Bop,
    LatentSGD,
    clip_after_step,
    glorot_coefficient,
    glorot_scaled_groups,
    split_parameters,
)
from bnnbook.probes import FlipRatio, Saturation, log_flip_ratio
from bnnbook.records import Record

# Factors of the recipe's gamma and threshold: "middle" stands in both panels of the figure.
FIGURE1 = {"middle": (1, 1), "high-gamma": (10, 1), "low-gamma": (0.1, 1),
           "no-threshold": (1, 0), "high-threshold": (1, 10)}  # fmt: skip
# How the latent weights are trained: method and learning rate.
LATENT = {"adam": ("adam", 1e-3), "adam-high": ("adam", 1e-2), "sgd": ("sgd", 1.0)}
# Factors of the recipe's learning rate and of the Glorot start.
SCALING = {"reference": (1, 1), "low-rate": (0.01, 1), "low-rate-scaled": (0.01, 0.01)}

VARIANTS = {
    "figure1": tuple(FIGURE1),
    "section52_short": ("bop", "latent"),
    "scaling": tuple(SCALING),
    "latent_inference": tuple(LATENT),
    "section52": ("bop", "latent"),
}

# What the paper prints. figure1: read off its curves near epoch 100, accuracies as fractions:
# (train, validation, pi); a pair is a range.
PAPER = {
    "figure1": {"high-gamma": (0.695, (0.62, 0.73), -4.0), "middle": (0.785, 0.79, (-7.3, -5.9)),
                "low-gamma": (0.63, 0.655, (-9.0, -8.0)),
                "no-threshold": (0.765, (0.28, 0.65), -4.1),
                "high-threshold": (0.425, 0.455, (-9.0, -7.2))},
    "section52": {"bop": 0.913, "latent": 0.909},
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """All settings of one training run."""

    dataset: str
    epochs: int
    batch_size: int
    method: str  # of the binary weights: bop, or with latent weights adam or sgd
    rate: float  # gamma of bop, else the learning rate of the latent weights
    threshold: float = 0.0  # of bop
    milestones: tuple[int, ...] = ()  # the rate falls to a tenth after these epochs
    real_lr: float = 0.01  # Adam's learning rate of batch normalisation's shifts
    real_decays: bool = False  # whether real_lr falls at the milestones too
    lr_scaling: bool = False  # of latent weights: rates over Glorot's coefficient (BinaryConnect)
    clip: bool = False  # latent weights to [-1, 1]
    init_scale: float = 1.0  # factor of Glorot's uniform initialisation
    widths: tuple[int, ...] = (128, 256, 512)
    hidden: tuple[int, ...] = (1024, 1024)
    augment: bool = True  # crops after padding by 4, and flips
    norm_images: int = 10_000  # training images from which batch-norm statistics are re-estimated


# The released code's set "bop", the paper's section 5.1.
CIFAR = Recipe("cifar10", 100, 100, "bop", rate=1e-3, threshold=1e-6)
# The paper's section 5.2, and the settings in which its baseline differs.
BOP52 = replace(CIFAR, epochs=500, batch_size=50, rate=1e-4, threshold=1e-8,
                milestones=(100, 200, 300, 400))  # fmt: skip
BASELINE52 = {"method": "adam", "rate": 1e-3, "threshold": 0.0, "real_lr": 1e-3,
              "real_decays": True, "lr_scaling": True, "clip": True}  # fmt: skip
# Ours: digits, a narrow BinaryNet, and rates for 416 steps instead of 50 000.
DIGITS = replace(CIFAR, dataset="digits", epochs=16, batch_size=50, rate=1e-2, threshold=1e-4,
                 widths=(16,), hidden=(64, 64, 64), augment=False, norm_images=500)  # fmt: skip
DIGITS52 = replace(DIGITS, rate=3e-2, threshold=1e-6)

RECIPES = {
    "figure1": {"small": DIGITS, "full": CIFAR},
    "section52_short": {
        "small": replace(DIGITS52, epochs=18, milestones=(12, 14, 16)),
        "full": replace(BOP52, epochs=160, milestones=(100, 120, 140)),
    },
    "scaling": {
        "small": replace(DIGITS, epochs=8, method="sgd", rate=1.0, threshold=0.0),
        "full": replace(CIFAR, method="sgd", rate=1.0, threshold=0.0),
    },
    "latent_inference": {
        "small": replace(DIGITS, epochs=8, method="adam", rate=1e-3, threshold=0.0, clip=True),
        "full": replace(CIFAR, method="adam", rate=1e-3, threshold=0.0, clip=True),
    },
    "section52": {
        "small": replace(DIGITS52, epochs=20, milestones=(4, 8, 12, 16)),
        "full": BOP52,
    },
}


def figure1(variant: str = "middle", *, seed: int = 0, scale: str = "small",
            epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run one curve of figure 1: Bop with one gamma and one threshold.

    Variants: middle (in both panels), high-gamma and low-gamma (ten times, a tenth), no-threshold
    (0) and high-threshold (ten times). ``epochs`` shortens the recipe; ``run`` takes `fit`'s
    device, checkpoint and progress.
    """
    recipe = find_recipe("figure1", variant, scale, epochs)
    gamma, threshold = FIGURE1[variant]
    recipe = replace(recipe, rate=recipe.rate * gamma, threshold=recipe.threshold * threshold)
    return make_record("figure1", variant, seed, scale, fit(recipe, seed=seed, **run))


def section52(variant: str = "bop", *, seed: int = 0, scale: str = "small",
              epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run section 5.2 (figure 2): Bop or the latent-weight baseline, 500 epochs, stepwise decay.

    ``epochs`` and ``run`` as in `figure1`.
    """
    return _against_latent("section52", variant, seed, scale, epochs, run)


def section52_short(variant: str = "bop", *, seed: int = 0, scale: str = "small",
                    epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run section 5.2 in 160 epochs: 100 at the first rate, then 20 at each of three more.

    The shortening is ours. ``epochs`` and ``run`` as in `figure1`.
    """
    return _against_latent("section52_short", variant, seed, scale, epochs, run)


def _against_latent(experiment, variant, seed, scale, epochs, run) -> Record:
    recipe = find_recipe(experiment, variant, scale, epochs)
    if variant == "latent":
        recipe = replace(recipe, **BASELINE52)
    fitted = fit(recipe, seed=seed, **run)
    return make_record(experiment, variant, seed, scale, fitted)


def scaling(variant: str = "reference", *, seed: int = 0, scale: str = "small",
            epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run section 3's example of theorem 1: plain SGD on latent weights, initialised by Glorot.

    Variants: reference (learning rate 1), low-rate (0.01), and low-rate-scaled (0.01, with initial
    weights also multiplied by 0.01). There is no clipping and no mask, so that the theorem's
    conditions hold; Adam trains batch norm's shifts in all three. ``epochs`` and ``run`` as in
    `figure1`.
    """
    recipe = find_recipe("scaling", variant, scale, epochs)
    rate, start = SCALING[variant]
    recipe = replace(recipe, rate=recipe.rate * rate, init_scale=start)
    return make_record("scaling", variant, seed, scale, fit(recipe, seed=seed, **run))


def latent_inference(variant: str = "adam", *, seed: int = 0, scale: str = "small",
                     epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run section 3's test: use a trained network with its latent weights, activations binary.

    Variants: adam (learning rate 0.001), adam-high (0.01), sgd (1). The metrics are accuracies on
    training and test images, with binary and latent weights, and with two kinds of batch-norm
    statistics; see `inference_modes`. ``epochs`` and ``run`` as in `figure1`.
    """
    recipe = find_recipe("latent_inference", variant, scale, epochs)
    method, rate = LATENT[variant]
    fitted = fit(replace(recipe, method=method, rate=rate), seed=seed, **run)
    modes = inference_modes(fitted)
    return make_record("latent_inference", variant, seed, scale, fitted, modes)


def find_recipe(experiment: str, variant: str, scale: str, epochs: int | None) -> Recipe:
    """Return the recipe at a scale; ``epochs``, if given, replaces the recipe's."""
    return recipe_at("helwegen2019", experiment, variant, scale, epochs, VARIANTS, RECIPES)


# --- One run -----------------------------------------------------------------------------------


@dataclass
class Fit:
    """A trained network with what is needed to use it."""

    model: nn.Module
    history: training.History
    dataset: data.Dataset
    recipe: Recipe


class OwnStatistics:
    """Probe that tests a copy with re-estimated batch-norm statistics after each epoch.

    The running statistics average over about 100 steps, in which weights may have flipped. Column:
    ``test_accuracy_own_statistics``.
    """

    def __init__(self, dataset: data.Dataset, norm_images: int):
        self.dataset, self.norm_images = dataset, norm_images

    def start(self, model: nn.Module) -> None:
        """Remember the model."""
        self.model = model

    def step(self) -> None:
        """Do nothing: the test is once per epoch."""

    def epoch(self) -> dict[str, float]:
        """Return the test accuracy of the copy."""
        network = own_statistics(self.model, self.dataset, self.norm_images)
        return {"test_accuracy_own_statistics": accuracy(network, self.dataset)}

    def state_dict(self) -> dict:
        """Return nothing: there is no state."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Do nothing: there is no state."""


def fit(recipe: Recipe, *, seed: int = 0, device=None, checkpoint=None,
        progress: bool | None = None) -> Fit:  # fmt: skip
    """Train the recipe's BinaryNet; the history also has the flips of the last layer.

    Column ``last_layer_pi``: the paper's `log_flip_ratio` of the last layer in each step, averaged
    over the epoch. ``test_accuracy`` is with running batch-norm statistics; `OwnStatistics` adds a
    column for re-estimated ones.
    """
    device = training.choose_device(device)
    dataset = data.load(recipe.dataset).to(device)
    with seeded(seed, device):  # on the CPU: the same start on every device
        model = build_network(recipe, dataset)
    optimizers = build_optimizers(model.to(device), recipe)
    decaying = optimizers if recipe.real_decays else optimizers[:1]
    flips = FlipRatio(per_layer=True, per_step=True)
    probes = [flips, OwnStatistics(dataset, recipe.norm_images)]
    history = training.train(
        model, dataset, optimizers, epochs=recipe.epochs, batch_size=recipe.batch_size,
        augment=data.crop_flip(padding=4) if recipe.augment else None,
        preprocess=data.signed_range, seed=seed, device=device, checkpoint=checkpoint,
        schedulers=[MultiStepLR(each, recipe.milestones, 0.1) for each in decaying],
        probes=[*probes, Saturation(limit=1.0)] if recipe.clip else probes, progress=progress,
        graph=True,
    )  # fmt: skip
    last_layer = flips.history()[:, -1].reshape(len(history.rows), -1)
    for row, pi in zip(history.rows, log_flip_ratio(last_layer).mean(1).tolist(), strict=True):
        row["last_layer_pi"] = pi
    return Fit(model, history, dataset, recipe)


def build_network(recipe: Recipe, dataset: data.Dataset) -> nn.Module:
    """Return BinaryNet with Glorot's uniform initialisation times ``init_scale``; ±1 for Bop.

    The quantizer of latent weights has no mask: with clipping to [-1, 1] it would change nothing,
    and without clipping theorem 1 forbids it.
    """
    quantizer = None if recipe.method == "bop" else partial(ste_sign, clip_value=None)
    channels, size = dataset.train_images.shape[1:3]
    model = binarynet(len(dataset.classes), widths=recipe.widths, hidden=recipe.hidden,
                      in_channels=channels, image_size=size,
                      weight_quantizer=quantizer)  # fmt: skip
    for layer in binary_layers(model):
        # twice the coefficient is Glorot's bound
        layer.reset_parameters(2 * recipe.init_scale * glorot_coefficient(layer))
    return model


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return the optimizer of the binary weights, and Adam for the shifts of batch norm."""
    binary, real = split_parameters(model)
    if recipe.method not in ("bop", "adam", "sgd"):
        raise ValueError(f"unknown method {recipe.method!r}; known: bop, adam, sgd")
    groups = glorot_scaled_groups(model, recipe.rate, int(recipe.lr_scaling))[:-1]
    if recipe.method == "bop":
        first = Bop(binary, recipe.rate, recipe.threshold)
    elif recipe.method == "adam":
        first = torch.optim.Adam(groups, fused=True)
    else:
        first = LatentSGD(groups, lr=recipe.rate)
    if recipe.clip:
        clip_after_step(first, model)
    return [first, torch.optim.Adam(real, lr=recipe.real_lr, fused=True)]


def own_statistics(model: nn.Module, dataset: data.Dataset, norm_images: int,
                   quantizer: Callable | None = None) -> nn.Module:  # fmt: skip
    """Return a copy with re-estimated batch-norm statistics, under another quantizer if given.

    ``quantizer`` is for latent weights; weights that are ±1 themselves need none.
    """
    return training.own_statistics(model, dataset.train_images[:norm_images],
                                   weight_quantizer=quantizer,
                                   preprocess=data.signed_range)  # fmt: skip


def accuracy(network: nn.Module, dataset: data.Dataset, part: str = "test",
             images: int | None = None) -> float:  # fmt: skip
    """Return the accuracy on the first ``images`` images of a part, "train" or "test"."""
    inputs, labels = getattr(dataset, f"{part}_images"), getattr(dataset, f"{part}_labels")
    return training.evaluate(network, inputs[:images], labels[:images],
                             preprocess=data.signed_range)  # fmt: skip


def inference_modes(fitted: Fit) -> dict[str, float]:
    """Return accuracies with binary and latent weights, each with two kinds of statistics.

    Keys are such as "test accuracy, latent, own statistics". Running statistics were collected in
    training, under the binary weights of the last steps; own ones are re-estimated for the weights
    in use, with binary activations. Both parts are limited to their first ``norm_images`` images.
    """
    found, count = {}, fitted.recipe.norm_images
    for part, (name, quantizer) in product(
        ("train", "test"), (("binary", ste_sign), ("latent", real_weight))
    ):
        with quantized_by(fitted.model, quantizer):
            value = accuracy(fitted.model, fitted.dataset, part, count)
        found[f"{part} accuracy, {name}, running statistics"] = value
        network = own_statistics(fitted.model, fitted.dataset, count, quantizer)
        value = accuracy(network, fitted.dataset, part, count)
        found[f"{part} accuracy, {name}, own statistics"] = value
    return found


def make_record(experiment: str, variant: str, seed: int, scale: str, fitted: Fit,
                metrics: dict | None = None) -> Record:  # fmt: skip
    """Return a finished run's record, with the errors after the last epoch."""
    rows, recipe = fitted.history.rows, fitted.recipe
    metrics = {
        "test_error": 1 - rows[-1]["test_accuracy"],
        "test_error_own_statistics": 1 - rows[-1]["test_accuracy_own_statistics"],
        "train_error": 1 - rows[-1]["train_accuracy"],
        "train_loss": rows[-1]["train_loss"],
        "last_layer_pi": rows[-1]["last_layer_pi"],
        **(metrics or {}),
    }
    return finished(
        f"helwegen2019.{experiment}", variant, seed, scale, recipe=recipe, history=rows,
        planned=RECIPES[experiment][scale].epochs, dataset=fitted.dataset, metrics=metrics,
    )  # fmt: skip
