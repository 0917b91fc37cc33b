"""AlexNet (Krizhevsky, Sutskever, Hinton, NIPS 2012), one function per figure or statement.

The paper's own runs took two GPUs five to six days on ImageNet. Here the full scale is a smaller
network on CIFAR-10 or on your own images, and the small scale is digits, or patches of the two
photographs that come with scikit-learn. What the paper does not say is taken from the authors'
2012 source where a comment says so; the rest is our choice.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bnnbook import data, models, training
from bnnbook.experiments.runs import finished, recipe_at, seeded
from bnnbook.records import Record, encode_array

# The options of the network that each variant changes in its experiment's recipe.
CHANGES = {
    "figure1": {"relu": {"activation": "relu"}, "tanh": {"activation": "tanh"}},
    "lrn": {
        "without": {"lrn": False},
        "lrn": {"lrn": True},
        # ours: the same times 2^0.75, so that it leaves weak activations as they are
        "rescaled": {"lrn": {"k": 1.0, "alpha": 5e-5}},
    },
    "ten_view": {"crops": {}},
    "pooling": {"overlapping": {"pooling": 3}, "adjacent": {"pooling": 2}},
    "dropout_gap": {"none": {"dropout": 0.0}, "dropout": {"dropout": 0.5}},
    "kernels": {"two-towers": {"towers": 2}, "one-tower": {"towers": 1}},
}
VARIANTS = {experiment: tuple(changes) for experiment, changes in CHANGES.items()}

# Error rates in per cent: (top-1, top-5), None where the paper gives none.
PAPER = {
    "ILSVRC-2010": {"sparse coding": (47.1, 28.2), "SIFT + FVs": (45.7, 25.7), "CNN": (37.5, 17.0),
                    "CNN, centre patch": (39.0, 18.3)},
    # top-1 and top-5 on the validation set, top-5 on the test set
    "ILSVRC-2012": {"SIFT + FVs": (None, None, 26.2), "1 CNN": (40.7, 18.2, None),
                    "5 CNNs": (38.1, 16.4, 16.4), "1 CNN*": (39.0, 16.6, None),
                    "7 CNNs*": (36.7, 15.4, 15.3)},
    # percentage points by which each part lowers the error
    "gains": {"two GPUs": (1.7, 1.2), "local response normalisation": (1.4, 1.2),
              "overlapping pooling": (0.4, 0.3), "ten views": (1.5, 1.3)},
}  # fmt: skip
NETWORKS = {"four-layer": models.four_layer_cnn, "small": models.alexnet_small}
PHOTOGRAPHS = "photographs"
TARGET = 0.25  # figure 1's training error
PATIENCE = 5  # epochs after which a learning rate that lags behind the best one stops


@dataclass(frozen=True)
class Recipe:
    """All settings of one training run. SGD with momentum 0.9; biases never decay."""

    dataset: str  # a name of data.load, or "photographs"
    network: str  # "four-layer" or "small", with its options
    epochs: int
    batch_size: int
    lr: float
    options: dict = field(default_factory=dict)
    raw_pixels: bool = False  # 0 to 255 minus the mean image; else each channel standardized
    crop: int | None = None  # side of the random windows to train on, half of them mirrored
    padding: int = 0  # or zeros around an image, from which a crop of its own size is cut
    drops: tuple[float, ...] = (0.5, 0.75, 0.9)  # the lr falls to a tenth at these fractions
    weight_decay: float = 5e-4
    last_decay: float | None = None  # weight decay of the last layer, if it differs
    bias_lr: float = 1.0  # learning rate of the biases, relative to lr
    train_images: int | None = None  # train on the first ones only
    first_layer_scale: float = 1.0  # factor of the first layer's initial weights


# Network and rates are those of the authors' CIFAR-10 file "18 %"; epochs and drops are ours.
FOUR_LAYER = Recipe("cifar10", "four-layer", 60, 128, 1e-3, raw_pixels=True, drops=(0.8, 0.9),
                    weight_decay=0.004, last_decay=1.0, bias_lr=2.0)  # fmt: skip
# Without any regularisation, at a constant learning rate; the epochs are an upper limit.
FIGURE1 = replace(FOUR_LAYER, drops=(), weight_decay=0.0, last_decay=None)
# The paper's batch, momentum and decay; the rest is ours.
ALEXNET = Recipe("cifar10", "small", 60, 128, 0.01, padding=4)
DIGITS = Recipe("digits", "small", 12, 50, 0.02,
                {"widths": (8, 16, 16, 16, 16), "hidden": 64})  # fmt: skip
PATCHES = Recipe(PHOTOGRAPHS, "small", 12, 32, 0.01,
                 {"widths": (16, 32, 32, 32, 32), "hidden": 64, "dropout": 0.0, "lrn": False},
                 crop=24, first_layer_scale=0.1)  # fmt: skip

RECIPES = {
    "figure1": {"small": replace(FIGURE1, dataset="digits", epochs=20, batch_size=50),
                "full": FIGURE1},
    "lrn": {"small": replace(FOUR_LAYER, dataset="digits", epochs=16, batch_size=50, lr=0.01,
                             weight_decay=0.0, last_decay=None),
            "full": FOUR_LAYER},
    "ten_view": {"small": PATCHES, "full": replace(ALEXNET, crop=28, padding=0)},
    "pooling": {"small": DIGITS, "full": ALEXNET},
    "dropout_gap": {"small": replace(DIGITS, epochs=60, batch_size=20, train_images=100),
                    "full": ALEXNET},
    # Like the paper, this starts the first layer about ten times smaller than He et al., whose
    # start `alexnet_small` otherwise has. From that start the first layer hardly moves: its
    # kernels keep looking like their random initialisation.
    "kernels": {"small": PATCHES,
                "full": replace(ALEXNET, dataset="tiny-imagenet-20", crop=56, padding=0,
                                epochs=90, first_layer_scale=0.1)},
}  # fmt: skip

# The learning rates that figure 1 tries: the most promising first, because a rate only runs until
# it is slower than the best one before it.
RATES = {
    "full": {"relu": (0.001, 0.002, 0.0005, 0.004), "tanh": (0.01, 0.003, 0.03, 0.001)},
    "small": {"relu": (0.014, 0.01), "tanh": (0.1, 0.05)},
    "small, torch": {"relu": (0.1, 0.05), "tanh": (0.1, 0.05)},
}


@dataclass
class Fit:
    """A trained network with what is needed to use it."""

    model: nn.Module
    history: training.History
    dataset: data.Dataset
    preprocess: Callable[[Tensor], Tensor]
    recipe: Recipe


# --- The runs ----------------------------------------------------------------------------------


def figure1(variant: str = "relu", *, seed: int = 0, scale: str = "small",
            epochs: int | None = None, start: str = "authors", device=None, checkpoint=None,
            progress: bool | None = None) -> Record:  # fmt: skip
    """Run one curve of figure 1: epochs to 25 % training error, at the best of several rates.

    Variants: relu, tanh. The learning rates tried are `RATES`. An epoch's training error is the
    mean over its batches, each measured before its own update. ``start``: "authors" initialises
    the weights as in their file, for pixels from 0 to 255 minus the mean image; "torch", at small
    scale only, as torch does, for standardized pixels. ``checkpoint`` is a folder here.
    """
    recipe = find_recipe("figure1", variant, scale, epochs)
    known = {"authors": scale, "torch": f"{scale}, torch"}
    if known.get(start) not in RATES:
        raise ValueError(
            f"unknown start {start!r} at {scale} scale; known: authors, torch (small)"
        )
    if start == "torch":
        options = recipe.options | {"weight_std": None}
        recipe = replace(recipe, raw_pixels=False, bias_lr=1.0, options=options)
    rates = RATES[known[start]][variant]
    best, every = fastest(recipe, rates, seed, training.choose_device(device),
                          checkpoint, progress)  # fmt: skip
    reached = [row for row in every if row["rate"] == best.recipe.lr]
    error = 1 - reached[-1]["train_accuracy"]
    metrics = {"epochs_to_target": len(reached), "reached": int(error <= TARGET),
               "best_rate": best.recipe.lr, "epochs_run": len(every)}  # fmt: skip
    best.history.rows[:] = every
    record = make_record("figure1", variant, seed, scale, best, metrics)
    record.recipe |= {"start": start, "target": TARGET, "rates": list(rates)}
    return record


def lrn(variant: str = "lrn", *, seed: int = 0, scale: str = "small", epochs: int | None = None,
        **run) -> Record:  # fmt: skip
    """Run section 3.3's comparison: a four-layer network without and with normalisation.

    The variant "rescaled" multiplies what is normalised by :math:`2^{0.75}`, by which the paper's
    constants divide even where nothing competes. Pixels run from 0 to 255 minus the mean image.
    ``epochs`` shortens the recipe; ``run`` is device, checkpoint, progress of `fit`.
    """
    return plain("lrn", variant, seed, scale, epochs, run)


def pooling(variant: str = "overlapping", *, seed: int = 0, scale: str = "small",
            epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run section 3.4's comparison: pooling windows of 3 pixels or of 2, both with stride 2.

    Arguments as in `lrn`.
    """
    return plain("pooling", variant, seed, scale, epochs, run)


def dropout_gap(variant: str = "dropout", *, seed: int = 0, scale: str = "small",
                epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run section 4.2's point: training error against test error, with and without dropout.

    Arguments as in `lrn`.
    """
    return plain("dropout_gap", variant, seed, scale, epochs, run)


def ten_view(variant: str = "crops", *, seed: int = 0, scale: str = "small",
             epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Train on random crops; test on the centre and on the mean of ten views (section 4.1).

    Its metrics "error, centre" and "error, ten views" are of the same network. Arguments as in
    `lrn`.
    """
    fitted = fit(find_recipe("ten_view", variant, scale, epochs), seed=seed, **run)
    wide = standardized(fitted.dataset, fitted.recipe.raw_pixels)
    average = data.TenViewAverage(fitted.model, fitted.recipe.crop)
    test = fitted.dataset.test_images, fitted.dataset.test_labels
    metrics = {
        "error, centre": 1 - training.evaluate(fitted.model, *test, preprocess=fitted.preprocess),
        "error, ten views": 1 - training.evaluate(average, *test, preprocess=wide),
    }
    return make_record("ten_view", variant, seed, scale, fitted, metrics)


def kernels(variant: str = "two-towers", *, seed: int = 0, scale: str = "small",
            epochs: int | None = None, dataset: str | None = None, **run) -> Record:  # fmt: skip
    """Learn the kernels of figure 3 in miniature: those of a small AlexNet's first layer.

    The array "kernels" of the record holds them as images, the first tower's before the second's;
    "colourfulness, tower i" is the mean `colourfulness` of a tower's kernels. ``dataset`` replaces
    that of the recipe: the name of a NAME.npz of colour images. Other arguments as in `lrn`.
    """
    recipe = find_recipe("kernels", variant, scale, epochs)
    if dataset is not None:
        recipe = replace(recipe, dataset=dataset)
    fitted = fit(recipe, seed=seed, **run)
    weight = fitted.model.conv1.weight.detach()
    towers = enumerate(weight.chunk(fitted.recipe.options["towers"]), 1)
    metrics = {
        f"colourfulness, tower {i}": colourfulness(half).mean().item() for i, half in towers
    }
    record = make_record("kernels", variant, seed, scale, fitted, metrics)
    record.arrays["kernels"] = encode_array(as_images(weight))
    return record


def plain(experiment, variant, seed, scale, epochs, run) -> Record:
    """Fit a variant and record its errors."""
    fitted = fit(find_recipe(experiment, variant, scale, epochs), seed=seed, **run)
    return make_record(experiment, variant, seed, scale, fitted, {})


def find_recipe(experiment: str, variant: str, scale: str, epochs: int | None) -> Recipe:
    """Return a variant's recipe at a scale; unknown names list the known ones."""
    recipe = recipe_at("alexnet", experiment, variant, scale, epochs, VARIANTS, RECIPES)
    return replace(recipe, options=recipe.options | CHANGES[experiment][variant])


# --- Training ----------------------------------------------------------------------------------


def fit(recipe: Recipe, *, seed: int = 0, device=None, checkpoint=None,
        progress: bool | None = None) -> Fit:  # fmt: skip
    """Train the recipe's network; it is tested after the last epoch."""
    device = training.choose_device(device)
    dataset, model, preprocess = prepare(recipe, seed, device)
    optimizer = build_optimizer(model, recipe)
    milestones = [round(share * recipe.epochs) for share in recipe.drops]
    history = training.train(
        model, dataset, optimizer, epochs=recipe.epochs, batch_size=recipe.batch_size,
        augment=augmentation(recipe), preprocess=preprocess, seed=seed, device=device,
        schedulers=[torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)],
        checkpoint=checkpoint, progress=progress, evaluate_every=recipe.epochs, graph=True,
    )  # fmt: skip
    return Fit(model, history, dataset, preprocess, recipe)


def prepare(recipe: Recipe, seed: int, device: torch.device):
    """Return the recipe's data set, its network as initialised, and its preprocessing."""
    dataset = load_images(recipe, device)
    channels, size = dataset.train_images.shape[1:3]
    with seeded(seed, device):  # on the CPU: the same start on every device
        model = NETWORKS[recipe.network](
            len(dataset.classes), in_channels=channels, image_size=recipe.crop or size,
            **recipe.options,
        )  # fmt: skip
    with torch.no_grad():
        model.conv1.weight.mul_(recipe.first_layer_scale)
    preprocess = standardized(dataset, recipe.raw_pixels)
    if recipe.crop:
        preprocess = data.compose(data.centre_crop(recipe.crop), preprocess)
    return dataset, model.to(device), preprocess


def load_images(recipe: Recipe, device: torch.device) -> data.Dataset:
    """Return the recipe's data set on the device, with its number of training images."""
    dataset = photographs() if recipe.dataset == PHOTOGRAPHS else load_own(recipe.dataset)
    first = slice(recipe.train_images)
    images, labels = dataset.train_images[first], dataset.train_labels[first]
    return replace(dataset, train_images=images, train_labels=labels).to(device)


def load_own(name: str) -> data.Dataset:
    """Return a data set of `data.load`, but raise DataError for a name that it does not know.

    "tiny-imagenet-20" is one that readers must provide: without it, it counts as missing data.
    """
    try:
        return data.load(name)
    except ValueError as error:
        raise data.DataError(
            f"{error}. {name} comes neither with this library nor by a download: put a "
            f"{name}.npz there ({data.NPZ_LAYOUT}), or name its folder by BNNBOOK_DATA"
        ) from error


def standardized(dataset: data.Dataset, raw_pixels: bool) -> Callable[[Tensor], Tensor]:
    """Return a preprocessing: 0 to 255 minus the mean image, or each channel standardized."""
    if not raw_pixels:
        return data.standardize(dataset)
    centre = data.subtract_mean_image(dataset)
    return lambda images: 255 * centre(images)


def augmentation(recipe: Recipe) -> Callable[[Tensor], Tensor] | None:
    """Return the recipe's random crops and reflections, or None."""
    if recipe.crop:
        return data.random_crop(recipe.crop)
    return data.crop_flip(recipe.padding) if recipe.padding else None


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return SGD with momentum 0.9 and the recipe's rates and decays; biases do not decay."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    decays = [recipe.weight_decay] * len(layers)
    if recipe.last_decay is not None:
        decays[-1] = recipe.last_decay
    biases = {"params": [layer.bias for layer in layers], "lr": recipe.bias_lr * recipe.lr}
    weights = [{"params": [layer.weight], "weight_decay": decay}
               for layer, decay in zip(layers, decays, strict=True)]  # fmt: skip
    return torch.optim.SGD([biases, *weights], lr=recipe.lr, momentum=0.9, fused=True)


def fastest(recipe: Recipe, rates, seed: int, device: torch.device, checkpoint,
            progress: bool | None) -> tuple[Fit, list[dict]]:  # fmt: skip
    """Train once at each learning rate; return the fastest fit to the target, and all rows.

    A rate stops when it cannot win any more, and when its training error after `PATIENCE` or more
    epochs is above that of the best rate after as many. If none reaches the target, the one with
    the least training error is best. A rate that diverges is left out of the rows. Raises
    NonFiniteLossError if all diverge.
    """
    best, best_key, every, limit, leader = None, None, [], recipe.epochs, []
    for rate in rates:
        here = replace(recipe, lr=rate)
        folder = checkpoint and Path(checkpoint) / f"rate{rate:g}"
        fitted = train_until(TARGET, here, limit, seed, device, folder, progress, leader)
        if fitted is None:
            continue
        rows = [row | {"rate": rate} for row in fitted.history.rows]
        error = 1 - rows[-1]["train_accuracy"]
        key = (error > TARGET, len(rows) if error <= TARGET else error)
        if best is None or key < best_key:
            best, best_key = fitted, key
            leader = [1 - row["train_accuracy"] for row in rows]
        if error <= TARGET:
            limit = max(1, len(rows) - 1)
        every += rows
    if best is None:
        raise training.NonFiniteLossError(f"all rates diverged: {', '.join(map(str, rates))}")
    return best, every


def train_until(target: float, recipe: Recipe, limit: int, seed: int, device: torch.device,
                folder, progress: bool | None, leader=()) -> Fit | None:  # fmt: skip
    """Train until an epoch's training error is at most the target, for at most ``limit`` epochs.

    ``leader``: the errors of the best run so far; a run that lags behind it after `PATIENCE`
    epochs stops. Each epoch is a call of `training.train` with its own checkpoint in the folder.
    Returns None for a run that diverged.
    """
    dataset, model, preprocess = prepare(recipe, seed, device)
    optimizer = build_optimizer(model, recipe)
    # the test after every epoch only monitors the run: a part of the images is enough
    few = replace(dataset, test_images=dataset.test_images[:1000],
                  test_labels=dataset.test_labels[:1000])  # fmt: skip
    history = training.History()
    for epoch in range(limit):
        try:
            one = training.train(
                model, few, optimizer, epochs=1, batch_size=recipe.batch_size, device=device,
                preprocess=preprocess, seed=1000 * seed + epoch, progress=progress,
                checkpoint=folder and folder / f"epoch{epoch}.pt",
            )  # fmt: skip
        except training.NonFiniteLossError:
            return None
        history.rows.append(one.rows[0] | {"epoch": epoch + 1})
        error = 1 - one.rows[0]["train_accuracy"]
        lags = PATIENCE <= epoch + 1 <= len(leader) and error > leader[epoch]
        if error <= target or lags:
            break
    return Fit(model, history, dataset, preprocess, recipe)


# --- What is recorded --------------------------------------------------------------------------


def make_record(experiment: str, variant: str, seed: int, scale: str, fitted: Fit,
                metrics: dict) -> Record:  # fmt: skip
    """Return a finished run's record; its errors are measured after the last epoch."""
    dataset, rows = fitted.dataset, fitted.history.rows
    train = dataset.train_images[:10_000], dataset.train_labels[:10_000]
    test = dataset.test_images, dataset.test_labels
    metrics = {
        "test_error": 1 - training.evaluate(fitted.model, *test, preprocess=fitted.preprocess),
        "train_error": 1 - training.evaluate(fitted.model, *train, preprocess=fitted.preprocess),
        **metrics,
    }
    return finished(
        f"alexnet.{experiment}", variant, seed, scale, recipe=fitted.recipe, history=rows,
        planned=RECIPES[experiment][scale].epochs, dataset=dataset, metrics=metrics,
    )  # fmt: skip


def colourfulness(kernels: Tensor) -> Tensor:
    """Return how much of each kernel (n, 3, H, W) is colour: 0 for grey, at most 1.

    This is the fraction of its sum of squares that remains after subtracting each pixel's mean
    over red, green and blue.

    >>> grey, red = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    >>> red[:, 0] = 1
    >>> colourfulness(torch.cat([grey, red])).tolist()
    [0.0, 0.6666666865348816]
    """
    colour = kernels - kernels.mean(1, keepdim=True)
    return colour.square().sum((1, 2, 3)) / kernels.square().sum((1, 2, 3)).clamp_min(1e-12)


def as_images(kernels: Tensor) -> Tensor:
    """Return kernels (n, 3, H, W) as uint8 images (n, H, W, 3), each stretched to 0 to 255."""
    low, high = kernels.amin((1, 2, 3), keepdim=True), kernels.amax((1, 2, 3), keepdim=True)
    stretched = (kernels - low) / (high - low).clamp_min(1e-12) * 255
    return stretched.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


# --- Photographs -------------------------------------------------------------------------------


def photograph(name: str = "china.jpg") -> Tensor:
    """Return one of scikit-learn's photographs, china.jpg or flower.jpg, as uint8 (3, H, W)."""
    from sklearn.datasets import load_sample_image

    return torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1).contiguous()


def photographs(size: int = 28, train: int = 1200, test: int = 600) -> data.Dataset:
    """Return patches of two photographs, labelled by photograph and by its left to right third.

    Both are halved in size first. Patches for training and testing overlap: this set shows what a
    first layer learns and what views do, not how well anything generalises.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(end):
        return torch.randint(end, (train + test,), generator=generator, device="cpu")

    halves = [nn.functional.avg_pool2d(photograph(name).float(), 2).round().to(torch.uint8)
              for name in ("china.jpg", "flower.jpg")]  # fmt: skip
    tiles = torch.stack([tile for half in halves for tile in half[:, :, :318].chunk(3, 2)])
    labels = draw(len(tiles))
    tops, lefts = (draw(side - size + 1) for side in tiles.shape[2:])
    unflipped = torch.zeros_like(labels, dtype=torch.bool)
    images = data.crop(tiles[labels], tops, lefts, unflipped, padding=0, size=size)
    names = [f"{name}, {part}" for name in ("china", "flower")
             for part in ("left", "middle", "right")]  # fmt: skip
    return data.Dataset(images[:train], labels[:train], images[train:], labels[train:], names,
                        name=PHOTOGRAPHS)  # fmt: skip
