"""Real-to-binary training (Martinez, Yang, Bulat, Tzimiropoulos, ICLR 2020), piece by piece.

In the comments, "paper" names the source of a value; values without a source are this book's own
choice. The paper's mixup is left out, and its 350 epochs per step are shortened, with the drops of
the learning rate in proportion. The warm-up keeps its length, except in runs shorter than the
recipe, where it is shortened in proportion as well.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from bnnbook import data, training
from bnnbook.binarize import real_weight, ste_sign
from bnnbook.experiments.runs import finished, recipe_at, seconds_of, seeded, step_factor
from bnnbook.layers import attention_matching, binary_layers
from bnnbook.models import expertnet
from bnnbook.models.expert import ExpertUnit
from bnnbook.records import Record, encode_array

# CIFAR-100, accuracy in per cent, with real downsampling layers; a real network has 78.3.
PAPER = {
    "pieces": {"baseline": 69.6, "attention": 72.6, "attention-logits": 73.9, "scale": 70.9,
               "progressive": 74.6, "full": 76.2},
}  # fmt: skip
DROPS = (150 / 350, 250 / 350, 320 / 350)  # paper: CIFAR-100's epochs at which the rate falls


@dataclass(frozen=True)
class Recipe:
    """All settings of one run."""

    dataset: str
    epochs: int  # of each step, the teacher's training included
    blocks: tuple[int, ...] = (2, 2, 2, 2)  # of two convolutions each; paper: ResNet-18
    width: int = 64  # of the first stage
    attention: float = 0.0  # weight of `attention_matching` in the loss
    logits: float = 0.0  # weight of the cross entropy to the teacher's outputs
    data_driven: bool = False  # with a `DataDrivenScale`
    progressive: bool = False  # three steps, each the teacher of the next; else two
    lr: float = 1e-3  # Adam; paper
    last_lr: float = 2e-4  # of the last step; paper
    weight_decay: float = 1e-5  # but 0 in the last step; paper
    warmup: int = 5  # epochs, in the first step only; paper
    batch_size: int = 128  # paper
    augment: bool = True  # crops after padding by 4, and flips


FULL = Recipe("cifar100", 60)
SMALL = replace(FULL, dataset="digits", epochs=6, blocks=(1, 1), width=8, lr=2e-2, last_lr=2e-2,
                warmup=0, batch_size=50, augment=False)  # fmt: skip
RECIPES = {"pieces": {"small": SMALL, "full": FULL}}

# The paper does not give these weights of the loss. larq has 30 and 3, then 0.8 in the last step,
# but divides the maps by their maximum: with the norm, 30 would drown the cross entropy.
ATTENTION, LOGITS = 1.0, 1.0
CHANGES = {
    "baseline": {},
    "attention": {"attention": ATTENTION},
    "attention-logits": {"attention": ATTENTION, "logits": LOGITS},
    "scale": {"data_driven": True},
    "progressive": {"attention": ATTENTION, "logits": LOGITS, "progressive": True},
    "full": {"attention": ATTENTION, "logits": LOGITS, "progressive": True, "data_driven": True},
}
VARIANTS = {"pieces": tuple(CHANGES)}


def find_recipe(experiment: str, variant: str, scale: str, epochs: int | None) -> Recipe:
    """Return a variant's recipe at a scale.

    ``epochs``, the number for each step, replaces the recipe's if given; fewer epochs shorten the
    warm-up, too.
    """
    recipe = recipe_at("martinez2020", experiment, variant, scale, None, VARIANTS, RECIPES)
    recipe = replace(recipe, **CHANGES[variant])
    if epochs is None:
        return recipe
    warmup = round(recipe.warmup * min(1, epochs / recipe.epochs))
    return replace(recipe, epochs=epochs, warmup=warmup)


# --- The steps ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step of the training sequence: what is binary in it, and how it is taught."""

    name: str
    inputs: str  # of the convolutions, one of `INPUTS`
    weights: str = "real"  # or "binary"
    attention: float = 0.0
    logits: float = 0.0
    teacher: str = ""  # "real", the real network; "previous", the step before; "": none


INPUTS = {"relu": F.relu, "tanh": torch.tanh, "binary": ste_sign}
WEIGHTS = {"real": real_weight, "binary": ste_sign}
REAL = Step("real", "relu")  # the first teacher; same layout, real weights and activations


def plan(recipe: Recipe) -> list[Step]:
    """Return the student's steps, of which the last trains the binary network.

    A progressive recipe has the paper's three: tanh activations, then binary ones, then binary
    weights too, each taught by the network of the step before, the last through its logits only.
    Other recipes have the baseline's two, both taught by the real network if by any.
    """
    helped = {"attention": recipe.attention, "logits": recipe.logits}
    if not recipe.progressive:
        helped["teacher"] = "real" if any(helped.values()) else ""
        return [Step("activations", "binary", **helped),
                Step("binary", "binary", "binary", **helped)]  # fmt: skip
    return [
        Step("tanh", "tanh", **helped, teacher="real"),
        Step("activations", "binary", **helped, teacher="previous"),
        Step("binary", "binary", "binary", logits=recipe.logits, teacher="previous"),
    ]


def begin(network: nn.Module, step: Step) -> None:
    """Set the quantizers of a step, and rescale the channels whose weights become binary.

    The learned scale of each output channel is multiplied by the mean magnitude of its real
    weights, so that its outputs keep their size with weights of ±1 (XNOR-Net's scale; that it is
    used here is our choice).
    """
    if step.weights == "binary":
        for unit in network.modules():
            if isinstance(unit, ExpertUnit):
                unit.absorb_magnitude()
    for layer in binary_layers(network):
        layer.set_quantizers(WEIGHTS[step.weights], INPUTS[step.inputs])


# --- Teacher and student -----------------------------------------------------------------------


def block_features(network: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the features at the end of each block (of two convolutions), and the outputs."""
    features, x = [], images
    for name, part in network.named_children():
        for number, unit in enumerate(part if name.startswith("stage") else [part]):
            x = unit(x)
            if number % 2:
                features.append(x)
    return features, x


class Student(nn.Module):
    """A network that keeps its training inputs and features until the loss has used them."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.images, self.features = network, None, []

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's outputs."""
        features, outputs = block_features(self.network, images)
        if self.training:
            self.images, self.features = images, features
        return outputs


class Distillation:
    r"""Loss of a student with a teacher: :math:`L = L_{CE} + a\, L_{att} + b\, L_{logits}`.

    :math:`L_{att}` is `attention_matching` at the ends of blocks, a = ``step.attention``;
    :math:`L_{logits} = -\sum_c p_c^T \log p_c^S` the cross entropy to the teacher's probabilities,
    b = ``step.logits``. A term of weight 0 is left out.
    """

    def __init__(self, student: Student, teacher: nn.Module, step: Step):
        self.student, self.step = student, step
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of the batch that the student has just seen."""
        features, theirs = self.look()
        ours, self.student.features = self.student.features, []  # free them with the batch's graph
        loss = F.cross_entropy(outputs, targets)
        if self.step.attention:
            loss = loss + self.step.attention * attention_matching(ours, features)
        if self.step.logits:
            loss = loss + self.step.logits * F.cross_entropy(outputs, theirs.float().softmax(1))
        return loss

    @torch.no_grad()
    def look(self) -> tuple[list[Tensor], Tensor]:
        """Return the teacher's features and outputs for that batch."""
        images = self.student.images
        dtype = training.autocast_dtype(images.device)
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            return block_features(self.teacher, images)


# --- Training ----------------------------------------------------------------------------------


@dataclass
class Fit:
    """The networks and training histories of all steps, by the steps' names."""

    networks: dict[str, nn.Module]
    histories: dict[str, training.History]
    dataset: data.Dataset
    recipe: Recipe


def build_network(recipe: Recipe, dataset: data.Dataset) -> nn.Module:
    """Return the recipe's network, in Real-to-Binary's block order, with real downsampling."""
    return expertnet(len(dataset.classes), blocks=recipe.blocks, groups=(1,) * len(recipe.blocks),
                     width=recipe.width, in_channels=dataset.train_images.shape[1], experts=1,
                     pointwise=False, data_driven=recipe.data_driven)  # fmt: skip


def rate_factor(epoch: int, recipe: Recipe, warmup: int) -> float:
    """Return the learning rate's factor in an epoch: linear warm-up, then a tenth at each drop."""
    return step_factor(epoch, warmup, [drop * recipe.epochs for drop in DROPS])


def build_optimizer(model: nn.Module, recipe: Recipe, last: bool) -> torch.optim.Optimizer:
    """Return Adam with the step's learning rate; only convolutions and output layer decay."""
    parameters = list(model.parameters())
    decay = 0.0 if last else recipe.weight_decay
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
              {"params": [p for p in parameters if p.dim() <= 1]}]  # fmt: skip
    return torch.optim.Adam(groups, recipe.last_lr if last else recipe.lr)


def train_step(network: nn.Module, teacher: nn.Module | None, step: Step, number: int,
               dataset: data.Dataset, recipe: Recipe, **run) -> training.History:  # fmt: skip
    """Train the network in place through one step; the student's first step has number 0."""
    begin(network, step)
    student, loss = network, F.cross_entropy
    if teacher is not None:
        student = Student(network)
        loss = Distillation(student, teacher, step)
    optimizer = build_optimizer(student, recipe, last=step.weights == "binary")
    warmup = recipe.warmup if number == 0 else 0
    schedule = LambdaLR(optimizer, lambda epoch: rate_factor(epoch, recipe, warmup))
    return training.train(
        student, dataset, optimizer, epochs=recipe.epochs, batch_size=recipe.batch_size, loss=loss,
        augment=data.crop_flip(padding=4) if recipe.augment else None,
        preprocess=data.standardize(dataset), schedulers=[schedule], graph=True, **run,
    )  # fmt: skip


def fit(recipe: Recipe, *, seed: int = 0, device=None, checkpoint=None,
        progress: bool | None = None) -> Fit:  # fmt: skip
    """Train the real teacher, if there is one, and the student; ``checkpoint`` is a folder."""
    device = training.choose_device(device)
    dataset = data.load(recipe.dataset).to(device)
    networks, histories = {}, {}
    with seeded(seed, device):  # on the CPU: the same start on every device
        network = build_network(recipe, dataset).to(device)
        real = build_network(replace(recipe, data_driven=False), dataset).to(device)
    steps, previous = plan(recipe), None
    taught = any(step.teacher for step in steps)  # then the teacher's own training has number -1
    for number, step in enumerate([REAL, *steps] if taught else steps):
        teacher = {"real": networks.get("real"), "previous": previous}.get(step.teacher)
        student = real if step is REAL else network
        histories[step.name] = train_step(
            student, teacher, step, number - taught, dataset, recipe, seed=seed + 1000 * number,
            checkpoint=checkpoint and Path(checkpoint) / f"{step.name}.pt", device=device,
            progress=progress,
        )  # fmt: skip
        # a copy, because the next step trains the same network on
        networks[step.name] = previous = copy.deepcopy(student)
    return Fit(networks, histories, dataset, recipe)


def pieces(variant: str = "full", *, seed: int = 0, scale: str = "small",
           epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Train the paper's strong baseline, alone or with some or all of the paper's pieces.

    Variants: baseline; attention and attention-logits, taught by a real network in both steps;
    scale, the data-driven scale alone; progressive, attention and logits in three steps; full, all
    of them. ``epochs`` shortens the recipe; ``run`` takes `fit`'s device, checkpoint and progress.
    """
    fitted = fit(find_recipe("pieces", variant, scale, epochs), seed=seed, **run)
    return make_record(variant, seed, scale, fitted)


def make_record(variant: str, seed: int, scale: str, fitted: Fit) -> Record:
    """Return a finished run's record; its history is that of the last step.

    "test_error, STEP" is the test error after each step, "test_accuracy, STEP" that of its epochs.
    """
    rows = {name: history.rows for name, history in fitted.histories.items()}
    errors = {f"test_error, {name}": 1 - each[-1]["test_accuracy"] for name, each in rows.items()}
    arrays = {f"test_accuracy, {name}": encode_array(
                  np.array([row["test_accuracy"] for row in each], np.float32))
              for name, each in rows.items()}  # fmt: skip
    *before, last = rows.values()  # the last step is called "binary"
    return finished(
        "martinez2020.pieces", variant, seed, scale, recipe=fitted.recipe,
        planned=RECIPES["pieces"][scale].epochs, history=last, dataset=fitted.dataset,
        metrics={"test_error": 1 - last[-1]["test_accuracy"],
                 "train_loss": last[-1]["train_loss"], **errors}, arrays=arrays,
        before=sum(map(seconds_of, before)),
    )  # fmt: skip
