"""The book's experiments: one module per paper and one beyond them, one function per comparison.

Each function runs one variant with one seed at one scale and returns a `records.Record`.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from bnnbook.experiments import (
    alexnet,
    beyond,
    binaryconnect,
    bulat2021,
    helwegen2019,
    liu2021,
    martinez2020,
    quist2023,
)
from bnnbook.experiments.runs import check_settings as check_settings

MODULES = (
    alexnet,
    binaryconnect,
    helwegen2019,
    quist2023,
    bulat2021,
    liu2021,
    martinez2020,
    beyond,
)

# The order in which `bnnbook record` runs them: first the orders of filters, whose claims wait for
# their records; then the papers' central figures and tables, one paper after the other; then what
# takes minutes and is beyond the papers; then what other open claims wait for, the most useful for
# its running time first; last what takes days.
PRIORITY = (
    "quist2023.order",
    "quist2023.alpha_sweep",
    "quist2023.alpha_decay",
    "quist2023.scale_invariance",
    "helwegen2019.figure1",
    "helwegen2019.section52_short",
    "binaryconnect.table2_cifar10",
    "alexnet.figure1",
    "beyond.evidence",
    "beyond.memory",
    "beyond.rates",
    "beyond.decay",
    "beyond.race",
    "beyond.alphas_short",
    "beyond.alphas_middle",
    "beyond.alphas_long",
    "beyond.alphas_mnist",
    "beyond.alphas_cifar10",
    "beyond.alphas_residual",
    "liu2021.steps_short",
    "liu2021.steps_long",
    "quist2023.latent_parity",
    "helwegen2019.latent_inference",
    "liu2021.optimizer",
    "martinez2020.pieces",
    "bulat2021.experts",
    "binaryconnect.table2",
    "helwegen2019.scaling",
    "quist2023.spectra",
    "quist2023.gamma_sweep",
    "liu2021.two_step",
    "liu2021.weight_decay",
    "bulat2021.width",
    "bulat2021.gate",
    "bulat2021.start",
    "bulat2021.experts_cifar100",
    "alexnet.lrn",
    "alexnet.pooling",
    "alexnet.dropout_gap",
    "alexnet.ten_view",
    "alexnet.kernels",
    "binaryconnect.table1",
    "binaryconnect.table2_svhn",
    "binaryconnect.clipping",
    "helwegen2019.section52",
)


def names() -> list[str]:
    """Return the experiments' names, paper by paper.

    >>> "binaryconnect.table2" in names()
    True
    """
    return [f"{_short(paper)}.{name}" for paper in MODULES for name in paper.VARIANTS]


class Experiment(NamedTuple):
    """A figure or table of a paper: the function that runs it, its variants, its recipes."""

    function: Callable
    variants: tuple[str, ...]
    recipes: dict  # by scale


def find(name: str) -> Experiment:
    """Return an experiment such as "binaryconnect.table2"; an unknown name lists the known ones.

    >>> sorted(find("binaryconnect.table2").recipes)
    ['full', 'small']
    """
    paper, short = _split(name)
    return Experiment(getattr(paper, short), paper.VARIANTS[short], paper.RECIPES[short])


def recipe(name: str, variant: str, scale: str, epochs: int | None = None):
    """Return the recipe of one run of an experiment, shortened to ``epochs`` if they are given."""
    paper, short = _split(name)
    return paper.find_recipe(short, variant, scale, epochs)


@functools.cache
def same_runs(name: str, variant: str, scale: str) -> tuple[tuple[str, str], ...]:
    """Return the other experiments and their variants that are, at this scale, the same run.

    Those have the same recipe, in experiments of one paper whose runs depend on nothing else (each
    module's ``BY_RECIPE``).

    >>> same_runs("bulat2021.width", "narrow", "full")
    (('bulat2021.experts', 'one'),)
    """
    paper, short = _split(name)
    shared = getattr(paper, "BY_RECIPE", ())
    if short not in shared:
        return ()
    sought = paper.find_recipe(short, variant, scale, None)
    return tuple(
        (f"{_short(paper)}.{other}", each)
        for other in shared
        for each in paper.VARIANTS[other]
        if (other, each) != (short, variant) and scale in paper.RECIPES[other]
        and paper.find_recipe(other, each, scale, None) == sought
    )  # fmt: skip


def _split(name: str) -> tuple[ModuleType, str]:
    """Return the paper's module and the experiment's name in it; ValueError for an unknown one."""
    if name not in names():
        raise ValueError(f"unknown experiment {name!r}; known: {', '.join(names())}")
    paper, short = name.split(".", 1)
    return next(module for module in MODULES if _short(module) == paper), short


def _short(paper) -> str:
    return paper.__name__.rpartition(".")[2]
