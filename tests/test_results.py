"""The records that ship with the library: of runs that happened, and that the code can repeat."""

from dataclasses import asdict

import pytest

from bnnbook import experiments, records
from bnnbook.experiments.binaryconnect import Recipe

SHIPPED = list(records.read_all())
IDS = [f"{r.experiment}-{r.variant}-{r.seed}" for r in SHIPPED]


def test_there_are_records():
    assert SHIPPED


def test_no_two_runs_have_the_same_history():
    """A copied record would look like a second seed."""
    losses = [tuple(row["train_loss"] for row in r.history) for r in SHIPPED]
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("record", SHIPPED, ids=IDS)
def test_a_record_says_what_was_run_and_where(record):
    assert record.scale == "full"
    assert record.environment["commit"]
    assert record.environment["dirty"] is False
    assert record.environment["device"]
    assert len(record.history) == record.recipe["epochs"]
    assert record.seconds > 0


@pytest.mark.parametrize("record", SHIPPED, ids=IDS)
def test_a_record_follows_todays_recipe_but_for_its_declared_shortening(record):
    _, variants, recipes = experiments.find(record.experiment)
    assert record.variant in variants
    today = asdict(recipes["full"])
    today["hidden"] = list(today["hidden"])
    known = {k: v for k, v in record.recipe.items() if k in Recipe.__dataclass_fields__}
    changed = {k for k, v in known.items() if today[k] != v}
    assert changed <= {"epochs"}
    assert (record.shortened is None) == (not changed)
    if changed:
        assert record.shortened == f"{known['epochs']} of {today['epochs']} epochs"


@pytest.mark.parametrize("record", SHIPPED, ids=IDS)
def test_the_metrics_follow_from_the_history(record):
    best = max(record.history, key=lambda row: (row["validation_accuracy"], row["epoch"]))
    assert record.metrics["best_epoch"] == best["epoch"]
    assert record.metrics["test_error"] == pytest.approx(1 - best["test_accuracy"], abs=1e-6)
    last = record.history[-1]
    assert record.metrics["train_loss"] == pytest.approx(last["train_loss"], rel=1e-5)
