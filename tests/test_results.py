"""The records that ship with the library: of runs that happened, and that the code can repeat."""

import json
import sys
from dataclasses import asdict

import pytest

from bnnbook import experiments, records

SHIPPED = list(records.read_all())
# What a run changes in the recipe that `find_recipe` gives for its variant.
VARIED = {
    "alexnet.figure1": {"lr"},
    "beyond.race": {"lr", "gamma", "threshold", "alpha", "fraction"},
    "binaryconnect.table1": {"optimizer", "lr_scaling", "lr_start", "lr_end"},
    "helwegen2019.figure1": {"rate", "threshold"},
    "helwegen2019.scaling": {"rate", "init_scale"},
    "helwegen2019.latent_inference": {"method", "rate"},
}
IDS = [f"{r.experiment}-{r.variant}-{r.seed}" for r in SHIPPED]


def test_there_are_records():
    assert SHIPPED


def test_no_two_runs_have_the_same_history():
    """A copied record would look like a second seed; but several experiments may share a run."""
    runs = {}
    for r in SHIPPED:
        runs.setdefault(losses_of(r), set()).add((r.seed, json.dumps(r.recipe, sort_keys=True)))
    assert [each for each in runs.values() if len(each) > 1] == []
    assert len({(r.experiment, r.variant, losses_of(r)) for r in SHIPPED}) == len(SHIPPED)


def test_a_run_that_was_repeated_gave_the_same_numbers():
    """The same run of two experiments, by commits that may differ, on one kind of processor.

    The first run of four experts was made before the average of a map had a gradient in the map's
    own memory format (db5ba79), with which convolutions round differently.
    """
    rounded_otherwise = "bulat2021.experts", "four", 0
    runs = {(r.experiment, r.variant, r.seed, r.shortened, r.made_on): r for r in SHIPPED
            if (r.experiment, r.variant, r.seed) != rounded_otherwise}  # fmt: skip
    pairs = [
        (run, runs[name, variant, *others])
        for (*of_run, seed, shortened, made_on), run in runs.items()
        for name, variant in experiments.same_runs(*of_run, "full")
        if (name, variant, *(others := (seed, shortened, made_on))) in runs
    ]
    repeated = [pair for pair in pairs if pair[0].started != pair[1].started]  # not copied
    assert len(repeated) >= 2 * 15
    assert all(numbers_of(one) == numbers_of(other) for one, other in repeated)


def numbers_of(record):
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in record.history]
    return rows, record.metrics, record.arrays


def losses_of(record) -> tuple[float, ...]:
    """The training losses, which tell two runs apart."""
    return tuple(row["train_loss"] for row in record.history)


@pytest.mark.parametrize("record", SHIPPED, ids=IDS)
def test_a_record_says_what_was_run_and_where(record):
    assert record.scale == "full"
    assert record.environment["commit"]
    assert record.environment["dirty"] is False
    assert record.environment["device"]
    if record.experiment != "alexnet.figure1":  # which stops at its target, once for each rate
        assert len(record.history) == record.recipe["epochs"]
    assert record.seconds > 0


@pytest.mark.parametrize("record", SHIPPED, ids=IDS)
def test_a_record_follows_todays_recipe_but_for_its_declared_shortening(record):
    function, variants, _ = experiments.find(record.experiment)
    assert record.variant in variants
    paper = sys.modules[function.__module__]
    name = record.experiment.partition(".")[2]
    today = paper.find_recipe(name, record.variant, "full", None)
    today = json.loads(json.dumps(asdict(today)))  # tuples are lists in a record
    known = {k: v for k, v in record.recipe.items() if k in today}
    changed = {k for k, v in known.items() if today[k] != v}
    assert changed - VARIED.get(record.experiment, set()) <= {"epochs"}
    changed &= {"epochs"}
    assert (record.shortened is None) == (not changed)
    if changed:
        assert record.shortened == f"{known['epochs']} of {today['epochs']} epochs"


@pytest.mark.parametrize("record", SHIPPED, ids=IDS)
def test_the_metrics_follow_from_the_history(record):
    if "validation_accuracy" not in record.history[-1]:
        pytest.skip("nothing was held out: no epoch is chosen")
    best = max(record.history, key=lambda row: (row["validation_accuracy"], row["epoch"]))
    assert record.metrics["best_epoch"] == best["epoch"]
    assert record.metrics["test_error"] == pytest.approx(1 - best["test_accuracy"], abs=1e-6)
    last = record.history[-1]
    assert record.metrics["train_loss"] == pytest.approx(last["train_loss"], rel=1e-5)
