"""BinaryConnect (Courbariaux, Bengio, David, NIPS 2015), one function per table or figure.

Hyperparameters come from the paper and, where it is silent, from the authors' code: its early
state (MNIST with plain SGD, weights of ±c) for the full scale, the released one for the small.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bnnbook import data, training
from bnnbook.binarize import real_weight, ste_sign, stochastic_sign
from bnnbook.experiments.runs import check_name, finished
from bnnbook.layers import SquaredHingeLoss, binary_layers, quantized_by
from bnnbook.models import binaryconnect_mlp
from bnnbook.optim import clip_after_step, glorot_scaled_groups
from bnnbook.probes import FlipRatio, Saturation, latent_histogram, layer_weight, share_above
from bnnbook.records import Record, encode_array

VARIANTS = {
    "table1": ("sgd", "sgd-scaled", "nesterov", "nesterov-scaled", "adam", "adam-scaled"),
    "table2": ("none", "deterministic", "stochastic", "dropout"),
    "clipping": ("clipped", "unclipped"),
}


# The paper's test errors in per cent: (mean, spread), the spread None where it gives none.
PAPER = {
    "table1": {"sgd-scaled": 11.45, "nesterov": 15.65, "nesterov-scaled": 11.30, "adam": 12.81,
               "adam-scaled": 10.47},
    "table2 mnist": {"none": (1.30, 0.04), "deterministic": (1.29, 0.08),
                     "stochastic": (1.18, 0.04), "dropout": (1.01, 0.04)},
    "table2 cifar10": {"none": (10.64, None), "deterministic": (9.90, None),
                       "stochastic": (8.27, None)},
    "table2 svhn": {"none": (2.44, None), "deterministic": (2.30, None),
                    "stochastic": (2.15, None)},
}  # fmt: skip


def paper_error(table: str, variant: str) -> str:
    """Return the paper's test error as text, "–" where its table is blank.

    >>> paper_error("table2 mnist", "stochastic"), paper_error("table1", "sgd")
    ('1.18 ± 0.04 %', '–')
    """
    known = PAPER[table].get(variant)
    mean, spread = known if isinstance(known, tuple) else (known, None)
    spread = "" if spread is None else f" ± {spread:.2f}"
    return "–" if mean is None else f"{mean:.2f}{spread} %"


@dataclass(frozen=True)
class Recipe:
    """The settings of one training run, complete."""

    dataset: str
    hidden: tuple[int, ...]
    epochs: int
    batch_size: int
    optimizer: str  # sgd, nesterov (momentum 0.9) or adam (0.9, 0.999)
    lr_start: float
    lr_end: float  # reached exponentially, one step an epoch
    validation: int  # the last training images, as many
    reduction: str = "mean"  # of the squared hinge loss, see SquaredHingeLoss
    lr_scaling: bool = True  # of the binary layers, see glorot_scaled_groups
    clip: bool = True
    init_bound: float = 1.0  # latent weights start at U(-bound, bound), clipped to [-1, 1]
    evaluate_every: int = 1  # epochs
    norm_images: int = 10_000  # batch-norm statistics for the test: from so many training images


# Released code, in miniature: ADAM, mean loss, latent weights from U(-1, 1).
SMALL = Recipe("digits", (256, 256), 30, 50, "adam", 3e-3, 3e-6, validation=300)
# Table 2's MNIST column. The early code trains ±c weights with one learning rate from Glorot's
# initialisation; in units of c that is ±1 weights, rates over c squared and U(-2, 2), clipped.
MNIST = Recipe("mnist", (1024, 1024, 1024), 1000, 200, "sgd", 0.3, 0.01, validation=10_000,
               reduction="batchmean", init_bound=2.0)  # fmt: skip

RECIPES = {
    "table1": {"small": replace(SMALL, hidden=(128, 128), epochs=10, evaluate_every=10)},
    "table2": {"small": SMALL, "full": MNIST},
    "clipping": {"small": replace(SMALL, epochs=12)},
}


@dataclass
class Fit:
    """A trained network with what is needed to use it."""

    model: nn.Module
    history: training.History
    dataset: data.Dataset
    preprocess: Callable[[Tensor], Tensor]
    recipe: Recipe
    settings: dict  # what the recipe leaves open: kind of weights, dropout, precision

    def tested_with(self, weight_quantizer: Callable[[Tensor], Tensor]) -> nn.Module:
        """Return the network with another weight quantizer and statistics collected for it."""
        return test_network(self.model, weight_quantizer, self.dataset, self.preprocess,
                            self.recipe.norm_images)  # fmt: skip


def test_network(model: nn.Module, weight_quantizer, dataset: data.Dataset, preprocess,
                 norm_images: int) -> nn.Module:  # fmt: skip
    """Return a copy that runs with ``weight_quantizer`` and batch-norm statistics made for it."""
    network = copy.deepcopy(model)
    for layer in binary_layers(network):
        layer.weight_quantizer = weight_quantizer
    images = dataset.train_images[:norm_images]
    return training.reestimate_batchnorm(network, images, preprocess=preprocess)


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimizer, its rates scaled and its weights clipped as it says."""
    kinds = {
        "sgd": (torch.optim.SGD, {}, 2),
        "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, 2),
        "adam": (torch.optim.Adam, {}, 1),
    }
    if recipe.optimizer not in kinds:
        raise ValueError(f"unknown optimizer {recipe.optimizer!r}; known: {', '.join(kinds)}")
    kind, options, power = kinds[recipe.optimizer]
    if not any(binary_layers(model)):
        return kind(model.parameters(), lr=recipe.lr_start, fused=True, **options)
    groups = glorot_scaled_groups(model, recipe.lr_start, power if recipe.lr_scaling else 0)
    optimizer = kind(groups, lr=recipe.lr_start, fused=True, **options)
    if recipe.clip:
        clip_after_step(optimizer, model)
    return optimizer


def fit(recipe: Recipe, weights: str, *, dropout: float = 0.0, seed: int = 0, device=None,
        checkpoint=None, progress: bool | None = None) -> Fit:  # fmt: skip
    """Train the recipe's perceptron with "real", "deterministic" or "stochastic" weights.

    After an epoch it is tested the paper's way: deterministic with its binary weights, stochastic
    with its real ones, each with batch-norm statistics collected for the weights in use.
    """
    device = training.choose_device(device)
    dataset = data.load(recipe.dataset).hold_out(recipe.validation).to(device)
    preprocess = data.subtract_mean_image(dataset)
    # drawn on the CPU: the same start on every device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        inputs, classes = dataset.train_images[0].numel(), len(dataset.classes)
        model = binaryconnect_mlp(inputs, recipe.hidden, classes, weights=weights, dropout=dropout)
        for layer in binary_layers(model):
            layer.reset_parameters(recipe.init_bound)
    optimizer = build_optimizer(model.to(device), recipe)
    decay = (recipe.lr_end / recipe.lr_start) ** (1 / max(1, recipe.epochs - 1))
    quantizer = real_weight if weights == "stochastic" else ste_sign
    history = training.train(
        model, dataset, optimizer, epochs=recipe.epochs, batch_size=recipe.batch_size,
        loss=SquaredHingeLoss(recipe.reduction), preprocess=preprocess, seed=seed, device=device,
        schedulers=[torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)],
        probes=[FlipRatio(), Saturation(limit=1.0)], checkpoint=checkpoint, progress=progress,
        evaluate_every=recipe.evaluate_every,
        test_model=lambda m: test_network(m, quantizer, dataset, preprocess, recipe.norm_images),
    )  # fmt: skip
    settings = {"weights": weights, "dropout": dropout, "precision": training.precision(device)}
    return Fit(model, history, dataset, preprocess, recipe, settings)


def table2(variant: str = "deterministic", *, seed: int = 0, scale: str = "small",
           epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run one row of table 2 (also figures 1, 2 and 3): test error by regulariser.

    Variants: none, deterministic, stochastic (both without dropout) and dropout (0.5 on the hidden
    units of the real network). Binary variants also report the ways to run them at test time.
    ``epochs`` shortens the recipe; ``run`` is device, checkpoint, progress of `fit`.
    """
    recipe = find_recipe("table2", variant, scale, epochs)
    weights = variant if variant in ("deterministic", "stochastic") else "real"
    fitted = fit(recipe, weights, dropout=0.5 * (variant == "dropout"), seed=seed, **run)
    modes = inference_modes(fitted, seed) if weights != "real" else {}
    return make_record("table2", variant, seed, scale, fitted, modes)


def table1(variant: str = "adam-scaled", *, seed: int = 0, scale: str = "small",
           epochs: int | None = None, lr: float | None = None, **run) -> Record:  # fmt: skip
    """Run one cell of table 1: an optimizer, with and without learning-rate scaling.

    The network is deterministic; ``lr`` is the first learning rate and the last is a thousandth of
    it. ``epochs`` and ``run`` as in `table2`.
    """
    recipe = find_recipe("table1", variant, scale, epochs)
    lr = recipe.lr_start if lr is None else lr
    optimizer, _, scaling = variant.partition("-")
    recipe = replace(recipe, optimizer=optimizer, lr_scaling=bool(scaling), lr_start=lr,
                     lr_end=lr / 1000)  # fmt: skip
    fitted = fit(recipe, "deterministic", seed=seed, **run)
    return make_record("table1", variant, seed, scale, fitted, {})


def clipping(variant: str = "clipped", *, seed: int = 0, scale: str = "small",
             epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run section 2.4's point: the latent weights with and without clipping.

    ``epochs`` and ``run`` as in `table2`.
    """
    recipe = find_recipe("clipping", variant, scale, epochs)
    recipe = replace(recipe, clip=variant == "clipped")
    fitted = fit(recipe, "deterministic", seed=seed, **run)
    return make_record("clipping", variant, seed, scale, fitted, {})


def find_recipe(experiment: str, variant: str, scale: str, epochs: int | None) -> Recipe:
    """Return the recipe at a scale, shortened to ``epochs``; unknown names list the known ones."""
    name = f"binaryconnect.{experiment}"
    check_name("variant", variant, VARIANTS[experiment], name)
    check_name("scale", scale, RECIPES[experiment], name)
    recipe = RECIPES[experiment][scale]
    return recipe if epochs is None else replace(recipe, epochs=epochs)


def inference_modes(fitted: Fit, seed: int, samples: int = 30) -> dict[str, float]:
    """Return the test error of each way to run the network at test time (section 2.6).

    "real, training statistics" pairs real weights with batch-norm statistics that were collected
    under binary ones: the wrong pairing, kept to show what it costs.
    """
    errors = {
        "sign": error(fitted, fitted.tested_with(ste_sign)),
        "real": error(fitted, fitted.tested_with(real_weight)),
    }
    with quantized_by(fitted.model, real_weight):
        errors["real, training statistics"] = error(fitted, fitted.model)
    outputs = sampled_outputs(fitted, seed, samples)
    labels = fitted.dataset.test_labels
    errors["one sample"] = 1 - training.accuracy(outputs[0], labels)
    errors["ensemble"] = 1 - training.accuracy(outputs.mean(0), labels)
    return {f"error, {mode}": value for mode, value in errors.items()}


def sampled_outputs(fitted: Fit, seed: int, samples: int) -> Tensor:
    """Return the test outputs of ``samples`` networks drawn by eq. 2, (samples, N, classes)."""
    dataset, preprocess = fitted.dataset, fitted.preprocess
    network, device = copy.deepcopy(fitted.model), dataset.test_images.device
    layers = [(layer, layer.weight.detach().clone()) for layer in binary_layers(network)]
    outputs = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for _ in range(samples):
            for layer, latent in layers:
                layer.weight.data, layer.weight_quantizer = stochastic_sign(latent), real_weight
            images = dataset.train_images[: fitted.recipe.norm_images]
            training.reestimate_batchnorm(network, images, preprocess=preprocess)
            outputs.append(training.predict(network, dataset.test_images, preprocess=preprocess))
    return torch.stack(outputs)


def error(fitted: Fit, network: nn.Module) -> float:
    """Return the test error of a network on the fit's data, as a fraction."""
    test = fitted.dataset.test_images, fitted.dataset.test_labels
    return 1 - training.evaluate(network, *test, preprocess=fitted.preprocess)


def make_record(experiment: str, variant: str, seed: int, scale: str, fitted: Fit,
                metrics: dict) -> Record:  # fmt: skip
    """Return a finished run's record: error at the best validation epoch, weights, history."""
    best, last = fitted.history.best(), fitted.history.rows[-1]
    weight = layer_weight(fitted.model)
    binary = [layer.weight for layer in binary_layers(fitted.model)][:1]
    metrics = {
        "test_error": 1 - best["test_accuracy"],
        "validation_error": 1 - best["validation_accuracy"],
        "best_epoch": best["epoch"],
        "last_test_error": 1 - last["test_accuracy"],
        "train_loss": last["train_loss"],
        "first_layer_below_0.1": 1 - share_above([weight], 0.1),
        "first_layer_above_0.99": share_above([weight], 0.99),
        **metrics,
    }
    arrays = {}
    if binary:
        arrays["first_layer_density"] = encode_array(latent_histogram(weight)[0].numpy())
    if seed == 0 and experiment == "table2":
        arrays["features"] = encode_array(features(weight, fitted.dataset).numpy())
    return finished(
        f"binaryconnect.{experiment}", variant, seed, scale, recipe=fitted.recipe,
        planned=RECIPES[experiment][scale].epochs, history=fitted.history.rows,
        dataset=fitted.dataset, metrics=metrics, arrays=arrays, settings=fitted.settings,
    )  # fmt: skip


def features(weight: Tensor, dataset: data.Dataset, count: int = 25) -> Tensor:
    """Return the first ``count`` units' weights as uint8 images (count, H, W), each stretched."""
    images = weight[:count].reshape(count, *dataset.train_images.shape[-2:]).float().cpu()
    low, high = images.amin((1, 2), keepdim=True), images.amax((1, 2), keepdim=True)
    return ((images - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8)
