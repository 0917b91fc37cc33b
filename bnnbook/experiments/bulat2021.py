"""Expert binary networks (Bulat et al., ICLR 2021), one function per comparison.

The paper was read as arXiv 2010.03558v1, with the authors' released code; the camera-ready version
may print other numbers. It trains on ImageNet; here the networks are small ones for CIFAR,
trained for fewer epochs. Each value of a recipe names its source. Distillation is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.optim.lr_scheduler import LambdaLR

from bnnbook import data, training
from bnnbook.binarize import real_weight, ste_sign
from bnnbook.experiments.runs import finished, recipe_at, seeded, step_factor
from bnnbook.layers import ExpertBinaryConv2d, binary_layers
from bnnbook.models import expertnet, load_one_expert, summary
from bnnbook.models.expert import ExpertUnit
from bnnbook.probes import FlipRatio
from bnnbook.records import Record, encode_array

STAGES = ("one expert", "stage I", "stage II")  # with an equal number of epochs each


@dataclass(frozen=True)
class Recipe:
    """All settings of one run through the three stages."""

    dataset: str
    epochs: int  # of all stages together
    experts: int = 4  # paper: as in the final model
    start: str = "replicated"  # of the experts; "random": all are trained from the first epoch
    gate: str = "softmax"  # how the gate learns: paper; "sigmoid" is the released code's default
    temperature: float = 1.0  # of that softmax: paper
    # The 20-layer network for CIFAR, a shortcut around each convolution (Bi-Real Net): ours.
    blocks: tuple[int, ...] = (3, 3, 3)
    width: int = 16
    expansion: int = 1
    groups: tuple[int, ...] = (1, 1, 1)
    pointwise: bool = False  # paper: True in its designed networks, False in its baseline
    batch_size: int = 256  # released code
    lr: float = 1e-3  # of Adam: paper
    milestones: tuple[float, ...] = (40 / 75, 55 / 75, 65 / 75)  # lr to a tenth at each: paper
    warmup: float = 10 / 75  # fraction of a stage's epochs: paper; linear, in each stage: ours
    weight_decay: float = 1e-5  # none in stage II: paper
    mixup: float = 0.2  # parameter of the beta distribution: paper
    augment: bool = True  # crops after padding by 4, and flips: usual for CIFAR


# The paper trains a stage for 75 epochs, here it is 45; the rate falls at the same fractions.
FULL = Recipe("cifar10", 135)
# Ours: digits, a small network, two experts, and a higher rate because there are few steps.
SMALL = Recipe("digits", 12, experts=2, blocks=(1, 1), width=8, groups=(1, 1), batch_size=50,
               lr=1e-2, milestones=(0.75,), warmup=0.0, mixup=0.0, augment=False)  # fmt: skip


# --- What varies -------------------------------------------------------------------------------


def _counts(recipe: Recipe) -> dict[str, dict]:
    return {"one": {"experts": 1}, "two": {"experts": 2}, "four": {"experts": 4}}


def _widths(recipe: Recipe) -> dict[str, dict]:
    """Return one-expert networks: narrow, and twice as wide with or without more groups."""
    wide = {"experts": 1, "expansion": 2}
    grouped = wide | {"groups": tuple(4 * group for group in recipe.groups)}
    return {
        "narrow": {"experts": 1},
        "wide-grouped": grouped,
        "wide-grouped-1x1": grouped | {"pointwise": True},  # mixes the groups, at a cost
        "wide": wide,  # four times the binary operations
    }


# The changes that each variant makes to its experiment's recipe, as a function of that recipe.
CHANGES: dict[str, Callable[[Recipe], dict[str, dict]]] = {
    "experts": _counts,
    "gate": lambda recipe: {gate: {"gate": gate} for gate in ("softmax", "sigmoid")},
    "start": lambda recipe: {start: {"start": start} for start in ("replicated", "random")},
    "width": _widths,
    "experts_cifar100": _counts,
}
RECIPES = {name: {"small": SMALL, "full": FULL} for name in CHANGES} | {
    "experts_cifar100": {"small": SMALL, "full": replace(FULL, dataset="cifar100")}
}
VARIANTS = {name: tuple(changes(SMALL)) for name, changes in CHANGES.items()}
BY_RECIPE = tuple(CHANGES)  # equal recipes are the same run, whatever the experiment

# What the paper prints, ImageNet, ResNet-18-like: top-1 and top-5 in %.
PAPER = {
    # tables 1 and 2: (expansion, experts), all with the same binary operations
    "capacity": {(1, 1): (60.9, 83.0), (1, 4): (63.8, 85.1), (1, 8): (64.0, 85.3),
                 (2, 1): (64.6, 85.6), (4, 1): (65.1, 86.0), (2, 4): (66.0, 86.4),
                 (2, 8): (66.3, 86.6)},
    # table 4: stage II, stage I, 1e9 binary operations
    "design": {"1242-2-4:4:16:32": ((66.3, 86.5), (68.4, 87.7), 1.3),
               "1262-2-4:4:16:32": ((66.8, 86.8), (69.0, 88.1), 1.5),
               "1282-2-4:4:16:32": ((67.7, 87.4), (69.7, 88.8), 1.7),
               "1242-2-4:4:8:16": ((67.0, 87.1), (68.9, 88.0), 1.6),
               "1262-2-4:4:8:16": ((67.6, 87.3), (69.7, 88.6), 1.9),
               "1282-2-4:4:8:16": ((67.8, 87.5), (69.7, 88.7), 2.2),
               "1262-2-4:8:8:16": ((67.5, 87.5), (69.5, 88.6), 1.7)},
    # appendix A.2.3: top-1 of stage I by the temperature of the softmax, and with a sigmoid
    "temperature": {0.02: 65.4, 1.0: 65.5, 5.0: 65.4, 25.0: 64.6},
    "sigmoid": 62.7,
}  # fmt: skip


def find_recipe(experiment: str, variant: str, scale: str, epochs: int | None) -> Recipe:
    """Return a variant's recipe at a scale; ``epochs``, if given, replaces the recipe's."""
    recipe = recipe_at("bulat2021", experiment, variant, scale, epochs, VARIANTS, RECIPES)
    return replace(recipe, **CHANGES[experiment](recipe)[variant])


def stage_epochs(epochs: int) -> list[int]:
    """Return the epochs of each stage, equal up to rounding; the last has at least one.

    >>> stage_epochs(135), stage_epochs(1)
    ([45, 45, 45], [0, 0, 1])
    """
    ends = [epochs * (number + 1) // len(STAGES) for number in range(len(STAGES))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


# --- The three stages --------------------------------------------------------------------------


def build_network(recipe: Recipe, dataset: data.Dataset, experts: int) -> nn.Module:
    """Return the recipe's network as the first two stages train it: real weights, binary inputs.

    ``experts`` is their number in each convolution; with 1 there are no gates.
    """
    return expertnet(
        len(dataset.classes), in_channels=dataset.train_images.shape[1], experts=experts,
        blocks=recipe.blocks, width=recipe.width, expansion=recipe.expansion,
        groups=recipe.groups, pointwise=recipe.pointwise, gate=recipe.gate,
        temperature=recipe.temperature, weight_quantizer=real_weight,
    )  # fmt: skip


def binarize_weights(model: nn.Module) -> None:
    """Prepare stage II: each real weight becomes a latent weight, of which the sign is used.

    The learned scale of each output channel is multiplied by the mean magnitude of its weights,
    over all experts, which the sign discards. The paper does not say what happens to the scale;
    this is our choice.
    """
    for unit in (m for m in model.modules() if isinstance(m, ExpertUnit)):
        unit.absorb_magnitude()
        unit.conv.set_quantizers(ste_sign, ste_sign)


class Mixup:
    r"""Mixup: mix each training image with another of its batch, and their losses likewise.

    .. math:: x = \lambda x_i + (1 - \lambda) x_j, \qquad
              L = \lambda L(y_i) + (1 - \lambda) L(y_j)

    :math:`\lambda` is drawn once per batch from Beta(a, a), with a = ``alpha``; 0 mixes nothing.
    Pass both ``augment`` and ``loss`` to `training.train`: they belong together. ``before`` is an
    augmentation that comes first, or None. (Zhang et al., 2018; recalled.)
    """

    def __init__(self, alpha: float, before: Callable | None = None):
        self.alpha, self.before = alpha, before
        self.share, self.order = 1.0, slice(None)

    def augment(self, images: Tensor) -> Tensor:
        """Return the mixed images, floating point from 0 to 255; unmixed ones keep their dtype."""
        images = self.before(images) if self.before else images
        if not self.alpha:
            return images
        alpha = torch.full((), self.alpha, device=images.device)
        # drawn on the device and without a check of alpha, so that nothing waits for the device
        self.share = torch.distributions.Beta(alpha, alpha, validate_args=False).sample()
        self.order = torch.randperm(len(images), device=images.device)
        return self.share * images + (1 - self.share) * images[self.order]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy with both targets of each image."""
        first = self.share * cross_entropy(outputs, targets)
        return first + (1 - self.share) * cross_entropy(outputs, targets[self.order])


def rate_factor(recipe: Recipe, epochs: int) -> Callable[[int], float]:
    """Return the learning rate's factor in a stage, as a function of its epoch, from 0."""
    warmup = round(recipe.warmup * epochs)
    falls = [round(share * epochs) for share in recipe.milestones]
    return partial(step_factor, warmup=warmup, falls=falls)


@dataclass
class Fit:
    """A network after all stages, and what was measured during training."""

    model: nn.Module
    rows: list[dict]  # epochs numbered across stages, with the column ``stage``: 0, 1 or 2
    dataset: data.Dataset
    preprocess: Callable[[Tensor], Tensor]
    recipe: Recipe
    stage1: Tensor  # `firing` after stage I


def fit(recipe: Recipe, *, dataset: data.Dataset | None = None, seed: int = 0, device=None,
        checkpoint=None, progress: bool | None = None) -> Fit:  # fmt: skip
    """Train the recipe's network through the three stages; ``checkpoint`` is a folder here.

    ``dataset`` replaces the recipe's.
    """
    device = training.choose_device(device)
    dataset = (dataset or data.load(recipe.dataset)).to(device)
    preprocess = data.standardize(dataset)
    with seeded(seed, device):  # on the CPU: the same start on every device
        one, model = (build_network(recipe, dataset, n).to(device) for n in (1, recipe.experts))
    replicated = recipe.start == "replicated"
    rows, fires = [], None
    for stage, epochs in enumerate(stage_epochs(recipe.epochs)):
        network = one if replicated and stage == 0 else model
        if replicated and stage == 1:
            load_one_expert(model, one)
        if stage == 2:
            fires = firing(model, dataset, preprocess)
            binarize_weights(model)
        if epochs:
            rows += _train(network, dataset, preprocess, recipe, stage, epochs, seed=seed,
                           device=device, checkpoint=checkpoint, progress=progress)  # fmt: skip
    for epoch, row in enumerate(rows, 1):
        row["epoch"] = epoch
    return Fit(model, rows, dataset, preprocess, recipe, fires)


def _train(network, dataset, preprocess, recipe, stage, epochs, *, seed, checkpoint, **run):
    """Train one stage; return the rows of its history."""
    decay = 0.0 if stage == 2 else recipe.weight_decay
    optimizer = torch.optim.Adam(network.parameters(), recipe.lr, weight_decay=decay)
    mixup = Mixup(recipe.mixup, data.crop_flip(padding=4) if recipe.augment else None)
    history = training.train(
        network, dataset, optimizer, epochs=epochs, batch_size=recipe.batch_size,
        schedulers=[LambdaLR(optimizer, rate_factor(recipe, epochs))], preprocess=preprocess,
        augment=mixup.augment if recipe.mixup else mixup.before, loss=mixup.loss,
        probes=[FlipRatio()], seed=len(STAGES) * seed + stage, graph=True,
        checkpoint=checkpoint and Path(checkpoint) / f"stage{stage}.pt", **run,
    )  # fmt: skip
    return [row | {"stage": stage} for row in history.rows]


# --- Which expert fires ------------------------------------------------------------------------


@torch.no_grad()
def firing(model: nn.Module, dataset: data.Dataset, preprocess: Callable) -> Tensor:
    """Return the fraction of each class's test images for which each expert fires.

    Shape (layers, experts, classes), on the CPU; the fractions of a layer's experts add up to 1. A
    network without gates has 0 layers.
    """
    layers = [m for m in binary_layers(model) if isinstance(m, ExpertBinaryConv2d)]
    chosen: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
    handles = [layer.register_forward_pre_hook(
        lambda layer, inputs: chosen[layer].append(layer.selected(inputs[0])))
        for layer in layers]  # fmt: skip
    try:
        training.predict(model, dataset.test_images, preprocess=preprocess)
    finally:
        for handle in handles:
            handle.remove()
    labels = one_hot(dataset.test_labels, len(dataset.classes)).double()
    seen = labels.sum(0).clamp(min=1)
    counts = [one_hot(torch.cat(chosen[layer]), layer.experts).double().T @ labels / seen
              for layer in layers]  # fmt: skip
    fractions = torch.stack(counts) if counts else labels.new_zeros(0, 1, labels.shape[1])
    return fractions.cpu()


def experts_used(fires: Tensor) -> np.ndarray:
    r"""Return each layer's effective number of experts, :math:`\exp(-\sum_j p_j \ln p_j)`.

    :math:`p_j` is the fraction of all test images for which expert j fires. The result is 1 if one
    expert always fires, and the number of experts if all fire equally often. ``fires`` is that of
    `firing`, for classes of equal size.
    """
    p = fires.mean(2).clamp(min=1e-12)
    return (-(p * p.log()).sum(1)).exp().numpy()


# --- One function per comparison ---------------------------------------------------------------


def experts(variant: str = "two", *, seed: int = 0, scale: str = "small",
            epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run a network with one, two or four experts (table 1), for the same number of epochs.

    ``epochs`` replaces the recipe's; ``run`` takes `fit`'s device, checkpoint (a folder) and
    progress.
    """
    return _run("experts", variant, seed, scale, epochs, **run)


def experts_cifar100(variant: str = "two", *, seed: int = 0, scale: str = "small",
                     epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run `experts` on CIFAR-100 (table 7); at small scale the two are the same."""
    return _run("experts_cifar100", variant, seed, scale, epochs, **run)


def gate(variant: str = "softmax", *, seed: int = 0, scale: str = "small",
         epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run a network whose gates learn through a softmax or a sigmoid (appendix A.2.3).

    ``epochs`` and ``run`` as in `experts`.
    """
    return _run("gate", variant, seed, scale, epochs, **run)


def start(variant: str = "replicated", *, seed: int = 0, scale: str = "small",
          epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run experts that start as copies of a trained one, or at random, all from the first stage.

    ``epochs`` and ``run`` as in `experts`. (Section 4.1.)
    """
    return _run("start", variant, seed, scale, epochs, **run)


def width(variant: str = "narrow", *, seed: int = 0, scale: str = "small",
          epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run one-expert networks: narrow, or twice as wide with four groups or none (table 2).

    "wide-grouped-1x1" adds the convolution that mixes the groups. ``epochs`` and ``run`` as in
    `experts`.
    """
    return _run("width", variant, seed, scale, epochs, **run)


def _run(experiment, variant, seed, scale, epochs, **run) -> Record:
    recipe = find_recipe(experiment, variant, scale, epochs)
    return make_record(experiment, variant, seed, scale, fit(recipe, seed=seed, **run))


def make_record(experiment: str, variant: str, seed: int, scale: str, fitted: Fit) -> Record:
    """Return a finished run's record: errors after stages I and II, operations, use of experts.

    "bops" and "macs" are for one image, without the experts that do not fire. The array "fires" is
    `firing` at the end of training, in steps of 1/255.
    """
    rows, images = fitted.rows, fitted.dataset.test_images
    fires = firing(fitted.model, fitted.dataset, fitted.preprocess)
    total = summary(fitted.model, tuple(images.shape[1:])).loc["total"]
    metrics = {
        "test_error": 1 - rows[-1]["test_accuracy"],
        "train_loss": rows[-1]["train_loss"],
        "bops": int(total.bops),
        "macs": int(total.macs),
        "bits": int(total.bits),
    }
    if stage1 := [row for row in rows if row["stage"] == 1]:
        metrics |= {"stage_1_test_error": 1 - stage1[-1]["test_accuracy"],
                    "stage_1_first_loss": stage1[0]["train_loss"]}  # fmt: skip
    if len(fires):
        metrics |= {"experts_used": experts_used(fires).mean().item(),
                    "experts_used_stage_1": experts_used(fitted.stage1).mean().item(),
                    "largest_share": fires.mean(2).amax(1).mean().item()}  # fmt: skip
    return finished(
        f"bulat2021.{experiment}", variant, seed, scale, recipe=fitted.recipe, history=rows,
        planned=RECIPES[experiment][scale].epochs, dataset=fitted.dataset, metrics=metrics,
        arrays={"fires": encode_array((255 * fires).round().byte())} if len(fires) else {},
    )  # fmt: skip
