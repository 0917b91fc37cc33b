"""Beyond the papers: comparisons that need the rules of several papers in one library.

No paper has these; all recipes are this book's own. Network, training and measurements are those
of `quist2023`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bnnbook import probes
from bnnbook.experiments import quist2023
from bnnbook.experiments.quist2023 import mean_flip_ratio, measured
from bnnbook.experiments.runs import finished, recipe_at, seconds_of
from bnnbook.optim import Bop, CascadedEMA, CounterSGD, LatentSGD, RankedFlips, rate_as_lr
from bnnbook.records import Record, encode_array


@dataclass(frozen=True)
class Recipe:
    """All settings of one training run."""

    dataset: str
    network: str  # one of `NETWORKS`
    epochs: int
    batch_size: int
    rule: str = "second"  # one of `RULES`
    alpha: float = 0.01  # rate of the averages of "first", "second" and "ranked"
    gamma: float = 0.1  # of the other average; of Bop's; 1 minus the momentum of latent weights
    fraction: float = 0.01  # of the weights that "ranked" flips in a step
    evidence: str = "second"  # by which "ranked" chooses them
    threshold: float = 0.0  # of Bop
    lr: float = 1.0  # of latent weights and counters
    bits: int = 8  # of "counter"
    stochastic: bool = True  # how "counter" rounds
    decay: str = "cosine"  # of the rule's alpha, gamma, fraction or lr, step by step
    real_lr: float = 0.1  # of all other parameters: SGD, momentum 0.9, falling as a cosine
    real_weight_decay: float = 0.0
    augment: bool = False
    norm_images: int = 10_000  # training images from which batch-norm statistics are re-estimated


SMALL = Recipe("digits", "perceptron", 6, 50)
FULL = Recipe("fashion-mnist", "perceptron784", 5, 250)
NETWORKS = {
    "perceptron": quist2023.perceptron,
    "perceptron784": partial(quist2023.perceptron, hidden=256, pixels=784),
    "perceptron3072": partial(quist2023.perceptron, hidden=256, pixels=3072),
    "birealnet8": partial(quist2023.birealnet8, in_channels=1),
}
FRACTIONS = (0.001, 0.003, 0.01, 0.03)  # of the weights, flipped in the first step
ALPHAS = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)  # at the start; they fall along a cosine
BITS = (1, 2, 3, 4, 6, 8, 10)


# --- Rules ---------------------------------------------------------------------------------------


def clipped_adam(weights, recipe: Recipe) -> torch.optim.Optimizer:
    """Return torch's Adam for latent weights, which stay in [-1, 1]."""
    optimizer = torch.optim.Adam(weights, recipe.lr, betas=(1 - recipe.gamma, 0.999))

    @torch.no_grad()
    def clip(*_) -> None:
        for weight in weights:
            weight.clamp_(-1.0, 1.0)

    optimizer.register_step_post_hook(clip)
    return optimizer


def ranked_flips(weights, recipe: Recipe) -> RankedFlips:
    """Return the optimizer that flips a given fraction of the weights."""
    return RankedFlips(weights, recipe.fraction, recipe.evidence, recipe.alpha, recipe.gamma)


# By a rule's name, the optimizer of given weights with a recipe's settings.
RULES: dict[str, Callable] = {
    "second": lambda w, r: CascadedEMA(w, r.alpha, r.gamma),
    "first": lambda w, r: CascadedEMA(w, r.alpha, 1.0),
    "bop": lambda w, r: Bop(w, r.gamma, r.threshold),
    "latent": lambda w, r: LatentSGD(w, r.lr, r.gamma, clip=1.0),
    "adam": clipped_adam,
    "ranked": ranked_flips,
    "ranked-slowing": ranked_flips,  # its alpha falls, too: see `schedules`
    "counter": lambda w, r: CounterSGD(w, r.lr, r.bits, stochastic=r.stochastic),
}
LATENT = ("latent", "adam", "counter")  # rules of latent weights, which start at 0 in effect
# What a rule of `race` draws, on a logarithmic scale: (lowest, highest).
SPACE: dict[str, dict[str, tuple[float, float]]] = {
    "latent": {"lr": (1.0, 1000.0), "gamma": (0.01, 1.0)},
    "adam": {"lr": (0.0001, 0.1), "gamma": (0.01, 1.0)},
    "bop": {"gamma": (0.0001, 0.1), "threshold": (1e-7, 1e-3)},
    "first": {"alpha": (0.0001, 1.0)},
    "second": {"alpha": (0.0001, 1.0), "gamma": (0.01, 1.0)},
    "ranked": {"fraction": (0.0001, 0.1), "alpha": (0.001, 1.0)},
}


def build_model(recipe: Recipe) -> nn.Module:
    """Return the recipe's network; a seed gives the same signs to latent and binary weights."""
    latent = recipe.rule in LATENT
    quantizer = quist2023.QUANTIZERS["sign"] if latent else None
    return quist2023.started(NETWORKS[recipe.network](quantizer), 0.0 if latent else None)


def build_optimizer(weights, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the optimizer of the binary layers' weights."""
    return RULES[recipe.rule](weights, recipe)


def schedules(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> list:
    """Return the schedules of the rule; alpha of "ranked-slowing" falls as a cosine, too."""
    found = quist2023.binary_schedules(optimizer, recipe, steps)
    if recipe.rule == "ranked-slowing":
        alpha = rate_as_lr(optimizer, "alpha")
        found.append(quist2023.EachStep(alpha, quist2023.cosine, steps))
    return found


fit = partial(quist2023.fit, build=build_model, choose=build_optimizer, schedules=schedules)


def draw(rule: str, trial: int, seed: int, recipe: Recipe) -> Recipe:
    """Return the recipe with the rule and its numbers of a trial of `race`, log-uniform."""
    names = list(SPACE)
    rng = np.random.default_rng([seed, trial, names.index(rule)])
    drawn = {name: float(np.exp(rng.uniform(math.log(low), math.log(high))))
             for name, (low, high) in SPACE[rule].items()}  # fmt: skip
    return replace(recipe, rule=rule, **drawn)


# --- What varies ---------------------------------------------------------------------------------


def _evidence() -> dict[str, dict]:
    """Return each evidence with each number of flips."""
    return {f"{evidence}-{fraction:g}": {"evidence": evidence, "fraction": fraction}
            for evidence in RankedFlips.BUFFERS for fraction in FRACTIONS}  # fmt: skip


def _rates() -> dict[str, dict]:
    """Return alphas, of the filter that decides how many flip, and with their number given."""
    return {f"{name}-{alpha:g}": changes | {"alpha": alpha}
            for name, changes in (("free", {"rule": "second"}), ("ranked", {}))
            for alpha in (1.0, 0.1, 0.01, 0.001)}  # fmt: skip


def _decay() -> dict[str, dict]:
    """Return what falls as a cosine: the number of flips, alpha by which they are chosen, both."""
    rules = {"none": "ranked", "number": "ranked", "alpha": "ranked-slowing",
             "both": "ranked-slowing"}  # fmt: skip
    return {name: {"rule": rule, "decay": "cosine" if name in ("number", "both") else "none"}
            for name, rule in rules.items()}  # fmt: skip


def _memory() -> dict[str, dict]:
    """Return counters of some bits with both roundings, and float32."""
    return {"float": {"rule": "latent"}} | {
        f"{name}-{bits}": {"stochastic": name == "stochastic", "bits": bits}
        for name in ("stochastic", "nearest") for bits in BITS
    }  # fmt: skip


def _alphas() -> dict[str, dict]:
    """Return alphas of the second-order filter and of the first-order one."""
    return {f"{prefix}{alpha:g}": {"rule": rule, "alpha": alpha}
            for prefix, rule in (("", "second"), ("first-", "first"))
            for alpha in ALPHAS}  # fmt: skip


# What `alphas_short` and its like change: how long the training is, the data, the network.
ELSEWHERE: dict[str, dict[str, dict]] = {
    "alphas_short": {"small": {"epochs": 1}, "full": {"epochs": 1}},
    "alphas_middle": {"small": {}, "full": {}},
    "alphas_long": {"small": {"epochs": 24}, "full": {"epochs": 20}},
    "alphas_mnist": {"full": {"dataset": "mnist"}},
    "alphas_cifar10": {"full": {"dataset": "cifar10", "network": "perceptron3072"}},
    "alphas_residual": {"full": {"network": "birealnet8", "epochs": 2}},
}
CHANGES: dict[str, dict[str, dict]] = {
    "evidence": _evidence(),
    "rates": _rates(),
    "decay": _decay(),
    "memory": _memory(),
    "race": {rule: {"rule": rule} for rule in SPACE},
} | dict.fromkeys(ELSEWHERE, _alphas())
BASE = {
    "evidence": {"rule": "ranked"},
    "rates": {"rule": "ranked"},
    "decay": {},
    "memory": {"rule": "counter", "gamma": 1.0, "lr": 100.0},
    "race": {},
}
RECIPES = {name: {"small": replace(SMALL, **changes), "full": replace(FULL, **changes)}
           for name, changes in BASE.items()}  # fmt: skip
RECIPES |= {
    name: {scale: replace({"small": SMALL, "full": FULL}[scale], **changes)
           for scale, changes in scales.items()}
    for name, scales in ELSEWHERE.items()
}  # fmt: skip
VARIANTS = {name: tuple(changes) for name, changes in CHANGES.items()}
# Equal recipes are the same run, whatever the experiment; but these two do more than train once.
BY_RECIPE = tuple(name for name in CHANGES if name not in ("memory", "race"))
TRIALS = {"small": 3, "full": 6}  # of `race`, for each rule and seed
HELD_OUT = {"small": 300, "full": 10_000}  # training images by which it chooses


def find_recipe(experiment: str, variant: str, scale: str, epochs: int | None) -> Recipe:
    """Return a variant's recipe at a scale; ``epochs``, if given, replaces the recipe's."""
    recipe = recipe_at("beyond", experiment, variant, scale, epochs, VARIANTS, RECIPES)
    return replace(recipe, **CHANGES[experiment][variant])


# --- One function per comparison -----------------------------------------------------------------


def evidence(variant: str = "second-0.01", *, seed: int = 0, scale: str = "small",
             epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Flip a given number of weights, chosen by one kind of evidence.

    ``epochs`` shortens the recipe; ``run`` takes `fit`'s device, checkpoint and progress.
    """
    return _run("evidence", variant, seed, scale, epochs, **run)


def rates(variant: str = "ranked-0.01", *, seed: int = 0, scale: str = "small",
          epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run one alpha, which decides how many weights flip ("free") or only which ("ranked").

    ``epochs`` and ``run`` as in `evidence`.
    """
    return _run("rates", variant, seed, scale, epochs, **run)


def decay(variant: str = "both", *, seed: int = 0, scale: str = "small",
          epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Let the number of flips fall, or alpha, by which they are chosen, or both, or neither.

    ``epochs`` and ``run`` as in `evidence`.
    """
    return _run("decay", variant, seed, scale, epochs, **run)


def memory(variant: str = "stochastic-4", *, seed: int = 0, scale: str = "small",
           epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run counters of some bits as latent weights, rounded at random or to nearest; or floats.

    The record adds "gradient", the root mean square of the first steps' gradients in each layer.
    ``epochs`` and ``run`` as in `evidence`.
    """
    sample = probes.GradientSample(256, 100)
    fitted = fit(find_recipe("memory", variant, scale, epochs), seed=seed, samples=[sample], **run)
    squares = [np.square(np.asarray(rows)).mean() for rows in sample.gradients().values()]
    found = {"gradient": encode_array(np.sqrt(squares, dtype=np.float32))}
    return make_record("memory", variant, seed, scale, fitted, arrays=found)


def race(variant: str = "second", *, seed: int = 0, scale: str = "small",
         epochs: int | None = None, checkpoint=None, **run) -> Record:  # fmt: skip
    """Choose a rule's numbers out of `SPACE` by a validation set, then train with the best.

    Each of `TRIALS` draws trains without the held-out images and is judged by them; the winner,
    retrained on all images from another start, gives the record. Arrays: the trials'
    "validation_error", "trial_flips" and what was drawn. ``epochs`` and ``run`` as in `evidence`;
    ``checkpoint`` is a folder.
    """
    recipe = find_recipe("race", variant, scale, epochs)
    folder = checkpoint and Path(checkpoint)
    drawn = [draw(variant, trial, seed, recipe) for trial in range(TRIALS[scale])]
    errors, flips, spent = [], [], 0.0
    for trial, candidate in enumerate(drawn):
        fitted = fit(candidate, seed=1000 * (seed + 1) + trial, validation=HELD_OUT[scale],
                     checkpoint=folder and folder / f"trial{trial}.pt", **run)  # fmt: skip
        errors.append(1 - fitted.history.rows[-1]["validation_accuracy"])
        flips.append(mean_flip_ratio(fitted.history.rows))
        spent += seconds_of(fitted.history.rows)
    best = drawn[int(np.argmin(errors))]
    fitted = fit(best, seed=seed, checkpoint=folder and folder / "winner.pt", **run)
    arrays = {"validation_error": errors, "trial_flips": flips}
    arrays |= {name: [getattr(trial, name) for trial in drawn] for name in SPACE[variant]}
    encoded = {name: encode_array(np.float32(values)) for name, values in arrays.items()}
    return make_record("race", variant, seed, scale, fitted, arrays=encoded, before=spent)


def alphas_short(variant: str = "0.01", *, seed: int = 0, scale: str = "small",
                 epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run the filter of second order, or of first, with one alpha, for one epoch.

    ``epochs`` and ``run`` as in `evidence`.
    """
    return _run("alphas_short", variant, seed, scale, epochs, **run)


def alphas_middle(variant: str = "0.01", *, seed: int = 0, scale: str = "small",
                  epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run the same filter five times as long as `alphas_short`, or six times on the digits."""
    return _run("alphas_middle", variant, seed, scale, epochs, **run)


def alphas_long(variant: str = "0.01", *, seed: int = 0, scale: str = "small",
                epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run the same filter four times as long as `alphas_middle`."""
    return _run("alphas_long", variant, seed, scale, epochs, **run)


def alphas_mnist(variant: str = "0.01", *, seed: int = 0, scale: str = "full",
                 epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run `alphas_middle` on MNIST; at full scale only."""
    return _run("alphas_mnist", variant, seed, scale, epochs, **run)


def alphas_cifar10(variant: str = "0.01", *, seed: int = 0, scale: str = "full",
                   epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Run `alphas_middle` on CIFAR-10, with a perceptron of 3072 inputs; at full scale only."""
    return _run("alphas_cifar10", variant, seed, scale, epochs, **run)


def alphas_residual(variant: str = "0.01", *, seed: int = 0, scale: str = "full",
                    epochs: int | None = None, **run) -> Record:  # fmt: skip
    """Train a small Bi-Real Net for two epochs with one alpha; at full scale only."""
    return _run("alphas_residual", variant, seed, scale, epochs, **run)


def _run(experiment, variant, seed, scale, epochs, **run) -> Record:
    fitted = fit(find_recipe(experiment, variant, scale, epochs), seed=seed, **run)
    return make_record(experiment, variant, seed, scale, fitted)


def make_record(experiment: str, variant: str, seed: int, scale: str, fitted: quist2023.Fit,
                arrays: dict | None = None, before: float = 0.0) -> Record:  # fmt: skip
    """Return a finished run's record, with the metrics of `quist2023.measured`.

    before: the seconds of the trials before it.
    """
    return finished(
        f"beyond.{experiment}", variant, seed, scale, recipe=fitted.recipe,
        planned=RECIPES[experiment][scale].epochs, history=fitted.history.rows,
        dataset=fitted.dataset, metrics=measured(fitted), arrays=arrays, before=before,
    )  # fmt: skip
