"""What all papers' experiments share: their recipes' lookup, seeding, and records of runs."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta

import torch

from bnnbook import training
from bnnbook.data import Dataset
from bnnbook.records import SCALES, Record, environment
from bnnbook.training import seed_generators


def check_name(what: str, name: str, known: Collection[str], experiment: str) -> None:
    """Raise ValueError, listing the known ones, for an unknown variant or scale."""
    if name not in known:
        listed = ", ".join(known)
        raise ValueError(f"unknown {what} {name!r} of {experiment}; known: {listed}")


def recipe_at(paper: str, experiment: str, variant: str, scale: str, epochs: int | None,
              variants: Mapping, recipes: Mapping):  # fmt: skip
    """Return the recipe of an experiment at a scale, before its variant's changes.

    epochs: None for the recipe's own.
    variants, recipes: by experiment, a paper's ``VARIANTS`` and ``RECIPES``. Raises ValueError,
    listing the known ones, for an unknown variant or scale.
    """
    name = f"{paper}.{experiment}"
    check_name("variant", variant, variants[experiment], name)
    check_name("scale", scale, recipes[experiment], name)
    recipe = recipes[experiment][scale]
    return recipe if epochs is None else replace(recipe, epochs=epochs)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators within a with block, and restore their states after it.

    A network constructed within is on the CPU, whatever torch's default device, so that it starts
    the same on every device.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device("cpu"):
        seed_generators(seed, device)
        yield


def step_factor(epoch: int, warmup: int, falls: Sequence[float]) -> float:
    """Return a learning rate's factor: a linear warm-up, then a tenth from each fall on.

    epoch: from 0. warmup: how many epochs are below the full rate.

    >>> [round(step_factor(epoch, 2, (4, 5)), 2) for epoch in range(6)]
    [0.33, 0.67, 1.0, 1.0, 0.1, 0.01]
    """
    return min(1.0, (epoch + 1) / (warmup + 1)) * 0.1 ** sum(epoch >= fall for fall in falls)


def check_settings(scale: str, seeds: int, epochs: int, least: int = 1) -> None:
    """Raise ValueError for settings with which a chapter cannot be run.

    epochs: 0 for the recipes' own number, otherwise at least ``least``, which its claims need.
    """
    check_name("scale", scale, SCALES, "the chapters")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, not {seeds}")
    if epochs and epochs < least:
        raise ValueError(
            f"epochs must be 0, for the recipes' own number, or at least {least}, not {epochs}"
        )


def seconds_of(history: Sequence[Mapping]) -> float:
    """Return how long the epochs of a history took."""
    return sum(row["seconds"] for row in history)


def finished(experiment: str, variant: str, seed: int, scale: str, *, recipe, planned: int,
             history: list[dict], dataset: Dataset, metrics: Mapping,
             arrays: Mapping | None = None, settings: Mapping | None = None,
             before: float = 0.0) -> Record:  # fmt: skip
    """Return the record of a run that has just ended.

    experiment: its name with the paper's, such as "binaryconnect.table2".
    history: of the last training. before: the seconds that the run's other trainings took.
    recipe: a dataclass; if its ``epochs`` differ from ``planned``, the record says so.
    settings: what the recipe leaves open; the precision is added.
    dataset: on the device that the run used.
    """
    device = dataset.train_images.device
    seconds = before + seconds_of(history)
    words = "of" if recipe.epochs < planned else "epochs instead of"
    shortened = f"{recipe.epochs} {words} {planned} epochs"
    return Record(
        experiment=experiment, variant=variant, seed=seed, scale=scale,
        recipe={**asdict(recipe), "precision": training.precision(device), **(settings or {})},
        history=history, metrics=dict(metrics), arrays=dict(arrays or {}),
        shortened=shortened if recipe.epochs != planned else None,
        dataset=dataset.name, dataset_sha256=dataset.sha256, environment=environment(device),
        seconds=round(seconds, 1),
        started=(datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="minutes"),
    )  # fmt: skip
