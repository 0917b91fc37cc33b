"""What the experiments of all papers share: names checked, and a finished run made a record."""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

from bnnbook import training
from bnnbook.data import Dataset
from bnnbook.records import SCALES, Record, environment


def check_name(what: str, name: str, known: Collection[str], experiment: str) -> None:
    """Raise ValueError, listing the known ones, for an unknown variant or scale."""
    if name not in known:
        listed = ", ".join(known)
        raise ValueError(f"unknown {what} {name!r} of {experiment}; known: {listed}")


def check_settings(scale: str, seeds: int, epochs: int, least: int = 1) -> None:
    """Raise ValueError, at once, for a chapter's settings that it cannot be run with.

    epochs: 0 for the recipes' own number, or else ``least`` or more, which its claims compare.
    """
    check_name("scale", scale, SCALES, "the chapters")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, not {seeds}")
    if epochs and epochs < least:
        raise ValueError(
            f"epochs must be 0, for the recipes' own number, or at least {least}, not {epochs}"
        )


def finished(experiment: str, variant: str, seed: int, scale: str, *, recipe, planned: int,
             history: list[dict], dataset: Dataset, metrics: Mapping,
             arrays: Mapping | None = None, settings: Mapping | None = None,
             ) -> Record:  # fmt: skip
    """Return the record of a run that has just ended.

    experiment: with its paper, such as "binaryconnect.table2".
    recipe: a dataclass with ``epochs``; another number than ``planned`` is a shortened run.
    settings: what the recipe leaves open; the precision is added.
    dataset: on the device that the run used.
    """
    device = dataset.train_images.device
    seconds = sum(row["seconds"] for row in history)
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
