"""AlexNet's experiments at small scale: what each variant changes, and what a record holds."""

import copy
import functools
from dataclasses import replace

import pytest
import torch

from bnnbook import data, records, training
from bnnbook.experiments import alexnet
from bnnbook.layers import LocalResponseNorm
from bnnbook.models import four_layer_cnn

EVERY = [(name, variant) for name, variants in alexnet.VARIANTS.items() for variant in variants]
CPU = torch.device("cpu")
# A few steps on a few images.
TINY = replace(alexnet.RECIPES["figure1"]["small"], epochs=4, train_images=100, lr=0.01)


@functools.cache
def once(name, variant):
    """The record of one epoch; made once for all tests, which must not change it."""
    return getattr(alexnet, name)(variant, epochs=1, device="cpu")


@pytest.fixture
def accuracies(monkeypatch):
    """Give every epoch of a learning rate the training accuracy that the test says."""
    given, seen = {}, []

    def train(model, dataset, optimizer, **options):
        rate = optimizer.param_groups[-1]["lr"]
        epoch = sum(r == rate for r in seen)
        seen.append(rate)
        if given[rate] is None:
            raise training.NonFiniteLossError("diverged")
        row = {"epoch": 1, "train_loss": 1.0, "train_accuracy": given[rate][epoch], "seconds": 1.0}
        return training.History([row])

    monkeypatch.setattr(training, "train", train)
    return given


def fastest(rates):
    return alexnet.fastest(TINY, rates, 0, CPU, None, False)


@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_every_variant_leaves_a_record_that_can_be_saved(name, variant, tmp_path):
    record = once(name, variant)
    assert (record.experiment, record.variant) == (f"alexnet.{name}", variant)
    assert (record.scale, record.dataset_sha256 != "") == ("small", True)
    planned = alexnet.RECIPES[name]["small"].epochs
    assert record.shortened == f"1 of {planned} epochs"
    back = records.read(records.save(copy.deepcopy(record), tmp_path))
    assert back.metrics == record.metrics
    assert 0 <= record.metrics["test_error"] <= 1
    for option, value in alexnet.CHANGES[name][variant].items():
        assert record.recipe["options"][option] == value


@pytest.mark.parametrize("name", alexnet.VARIANTS)
def test_an_unknown_variant_or_scale_lists_the_known(name):
    known = ", ".join(alexnet.VARIANTS[name])
    with pytest.raises(ValueError, match=f"'x' of alexnet.{name}; known: {known}"):
        getattr(alexnet, name)("x")
    with pytest.raises(ValueError, match=r"unknown scale 'huge'.*known: small, full"):
        getattr(alexnet, name)(scale="huge")


def test_the_rate_that_reaches_the_target_first_wins(accuracies):
    accuracies |= {0.1: [0.5, 0.6, 0.76], 0.2: [0.7, 0.8], 0.3: [0.2]}
    best, rows = fastest((0.1, 0.2, 0.3))
    assert best.recipe.lr == 0.2
    # the third rate may run one epoch only: after two it could not win any more
    assert [row["rate"] for row in rows] == [0.1] * 3 + [0.2] * 2 + [0.3]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 1, 2, 1]


def test_without_a_winner_the_least_training_error_is_best(accuracies):
    accuracies |= {0.1: [0.1, 0.2, 0.3, 0.4], 0.2: [0.1, 0.2, 0.3, 0.5], 0.3: None}
    best, rows = fastest((0.1, 0.2, 0.3))
    assert best.recipe.lr == 0.2
    assert {row["rate"] for row in rows} == {0.1, 0.2}


def test_a_rate_that_lags_behind_stops(accuracies, monkeypatch):
    monkeypatch.setattr(alexnet, "PATIENCE", 2)
    accuracies |= {0.1: [0.2, 0.4, 0.5, 0.6], 0.2: [0.3, 0.3, 0.9, 0.9]}
    best, rows = fastest((0.1, 0.2))
    assert best.recipe.lr == 0.1
    assert [row["rate"] for row in rows] == [0.1] * 4 + [0.2] * 2


def test_rates_that_all_diverge_are_an_error(accuracies):
    accuracies |= {0.1: None, 0.2: None}
    with pytest.raises(training.NonFiniteLossError, match=r"all rates diverged: 0\.1, 0\.2"):
        fastest((0.1, 0.2))


def test_an_interrupted_search_goes_on_from_its_checkpoints(tmp_path, monkeypatch):
    whole, rows = alexnet.fastest(TINY, (0.01, 0.02), 0, CPU, tmp_path / "a", False)
    original, calls = training.train, []

    def stop_at_the_third(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(training, "train", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        alexnet.fastest(TINY, (0.01, 0.02), 0, CPU, tmp_path / "b", False)
    monkeypatch.setattr(training, "train", original)
    resumed, again = alexnet.fastest(TINY, (0.01, 0.02), 0, CPU, tmp_path / "b", False)
    drop = {"seconds"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in again] == [
        {k: v for k, v in row.items() if k not in drop} for row in rows
    ]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_figure1_says_how_many_epochs_the_best_rate_took():
    record = once("figure1", "relu")
    rows = [row for row in record.history if row["rate"] == record.metrics["best_rate"]]
    assert record.metrics["epochs_to_target"] == len(rows)
    reached = 1 - rows[-1]["train_accuracy"] <= alexnet.TARGET
    assert record.metrics["reached"] == reached
    assert record.recipe["rates"] == list(alexnet.RATES["small"]["relu"])


def test_the_recipes_networks_and_rates_reach_the_optimizer():
    recipe = replace(alexnet.FOUR_LAYER, dataset="digits", train_images=50)
    _, model, _ = alexnet.prepare(recipe, 0, CPU)
    groups = alexnet.build_optimizer(model, recipe).param_groups
    assert [group["lr"] for group in groups] == [0.002, 0.001, 0.001, 0.001, 0.001]
    assert [group["weight_decay"] for group in groups] == [0, 0.004, 0.004, 0.004, 1.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_rescaled_normalisation_is_the_papers_times_what_it_divides_by_at_least():
    x = 100 * torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    norm = four_layer_cnn(**alexnet.CHANGES["lrn"]["rescaled"]).norm1
    torch.testing.assert_close(norm(x), LocalResponseNorm()(x) * 2**0.75, rtol=1e-12, atol=0)
    torch.testing.assert_close(norm(x * 1e-6), x * 1e-6, rtol=1e-9, atol=0)  # weak ones stay


def test_ten_views_are_tested_beside_the_centre():
    metrics = once("ten_view", "crops").metrics
    assert {"error, centre", "error, ten views"} <= metrics.keys()
    assert metrics["error, centre"] == metrics["test_error"]


def test_kernels_are_recorded_as_images():
    record = once("kernels", "two-towers")
    images = records.decode_array(record.arrays["kernels"])
    assert images.shape[0] == 16
    assert images.shape[-1] == 3
    assert {(image.min(), image.max()) for image in images} == {(0, 255)}
    assert {"colourfulness, tower 1", "colourfulness, tower 2"} <= record.metrics.keys()


def test_images_that_the_reader_has_not_brought_are_a_data_set_that_is_lacking(
    tmp_path, monkeypatch, toy_images
):
    monkeypatch.setenv("BNNBOOK_DATA", str(tmp_path))
    for options in ({"scale": "full"}, {"dataset": "tiny-imagenet-20"}):
        with pytest.raises(data.DataError, match="unknown data set 'tiny-imagenet-20'") as caught:
            alexnet.kernels("one-tower", epochs=1, device="cpu", **options)
        assert str(tmp_path) in str(caught.value)
        assert "put a tiny-imagenet-20.npz there (x_train, " in str(caught.value)
    toy_images(32)  # what the reader has brought is used
    assert alexnet.kernels("one-tower", epochs=1, device="cpu", dataset="toy").dataset == "toy"


def test_patches_of_the_photographs():
    patches = alexnet.photographs(size=12, train=60, test=30)
    assert patches.train_images.shape == (60, 3, 12, 12)
    assert len(patches.classes) == 6
    assert set(patches.train_labels.tolist()) == set(range(6))
    assert patches.sha256 == alexnet.photographs(size=12, train=60, test=30).sha256
