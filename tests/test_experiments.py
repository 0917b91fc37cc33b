"""BinaryConnect's experiments at small scale: what each variant does, and what a record holds."""

import copy
import functools
import math
from dataclasses import asdict, replace
from datetime import datetime
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from bnnbook import data, experiments, records, training
from bnnbook.binarize import real_weight, sign, ste_sign
from bnnbook.experiments import binaryconnect, runs
from bnnbook.layers import binary_layers

# Of this paper; the other papers' experiments have test files of their own.
EVERY = [(f"binaryconnect.{name}", variant)
         for name, variants in binaryconnect.VARIANTS.items() for variant in variants]  # fmt: skip
COLUMNS = {"epoch", "train_loss", "train_accuracy", "validation_accuracy", "test_accuracy", "lr",
           "seconds"}  # fmt: skip
METRICS = {"test_error", "validation_error", "best_epoch", "last_test_error", "train_loss",
           "first_layer_below_0.1", "first_layer_above_0.99"}  # fmt: skip
MODES = {f"error, {mode}" for mode in ("sign", "real", "real, training statistics", "one sample",
                                       "ensemble")}  # fmt: skip
REAL = ("none", "dropout")
# Small, and the same whatever the experiments' own recipes become: an epoch has 20 steps.
TINY = replace(binaryconnect.SMALL, hidden=(32, 32), epochs=3, batch_size=50, validation=300)


@functools.cache
def once(name, variant, seed=0):
    """The record of one epoch; made once for all tests, which must not change it."""
    return experiments.find(name)[0](variant, seed=seed, epochs=1, device="cpu")


@functools.cache
def fitted(weights="deterministic", clip=True):
    """A small network after one epoch; shared like the records of `once`."""
    recipe = replace(TINY, epochs=1, clip=clip)
    return binaryconnect.fit(recipe, weights, device="cpu")


def without_time(record):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in record.history]


@pytest.fixture
def started(monkeypatch):
    """Replace training by a look at what it was given; returns the list of what was seen."""
    seen = []
    row = {"epoch": 1, "train_loss": 1.0, "validation_accuracy": 0.5, "test_accuracy": 0.25,
           "seconds": 2.0}  # fmt: skip

    def look(model, dataset, optimizer, **options):
        seen.append(SimpleNamespace(model=model, optimizer=optimizer, **options))
        return training.History([row])

    monkeypatch.setattr(training, "train", look)
    monkeypatch.setattr(binaryconnect, "inference_modes", lambda fitted, seed: {})
    return seen


def use_tiny(monkeypatch, experiment, **changes):
    monkeypatch.setitem(binaryconnect.RECIPES, experiment, {"small": replace(TINY, **changes)})


# --- Names -------------------------------------------------------------------------------------


def test_every_name_is_found():
    ours = [f"binaryconnect.{name}" for name in
            ("table1", "table2", "table2_cifar10", "table2_svhn", "clipping")]  # fmt: skip
    assert [name for name in experiments.names() if "binaryconnect" in name] == ours
    assert len(set(experiments.names())) == len(experiments.names())
    function, variants, recipes = experiments.find("binaryconnect.table2")
    assert function is binaryconnect.table2
    assert variants == ("none", "deterministic", "stochastic", "dropout")
    assert set(recipes) == {"small", "full"}


@pytest.mark.parametrize("name", ["binaryconnect.table9", "table2", "binaryconnect", "fit", ""])
def test_an_unknown_experiment_lists_the_known(name):
    with pytest.raises(ValueError, match="unknown experiment") as caught:
        experiments.find(name)
    assert all(known in str(caught.value) for known in experiments.names())
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", experiments.names())
def test_an_unknown_variant_or_scale_lists_the_known(name):
    function, variants, recipes = experiments.find(name)
    with pytest.raises(ValueError, match=f"unknown variant 'x'.*{', '.join(variants)}"):
        function("x")
    with pytest.raises(ValueError, match=f"unknown scale 'huge'.*{', '.join(recipes)}"):
        function(scale="huge")
    if "full" not in recipes:
        with pytest.raises(ValueError, match=r"unknown scale 'full'.*known: small"):
            function(scale="full")


@pytest.mark.parametrize(("settings", "words"), [
    (("huge", 2, 0), "unknown scale 'huge' of the chapters; known: small, full"),
    (("small", 0, 0), "seeds must be at least 1, not 0"),
    (("small", 1, 2), "epochs must be 0, for the recipes' own number, or at least 3, not 2"),
    (("small", 1, -1), "or at least 3, not -1"),
])  # fmt: skip
def test_what_a_chapter_cannot_be_run_with_is_refused_at_once(settings, words):
    with pytest.raises(ValueError, match=words):
        experiments.check_settings(*settings, least=3)
    for epochs in (0, 3):
        experiments.check_settings("full", 1, epochs, least=3)


def test_an_unknown_optimizer_lists_the_known():
    recipe = replace(binaryconnect.SMALL, optimizer="lion")
    with pytest.raises(ValueError, match="unknown optimizer 'lion'; known: sgd, nesterov, adam"):
        binaryconnect.build_optimizer(nn.Linear(2, 2), recipe)


# --- Records -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_a_record_is_complete(name, variant):
    record = once(name, variant)
    recipe = experiments.find(name)[2]["small"]
    assert (record.experiment, record.variant, record.seed) == (name, variant, 0)
    assert (record.scale, record.shortened) == ("small", f"1 of {recipe.epochs} epochs")
    assert (record.dataset, record.dataset_sha256) == ("digits", data.load("digits").sha256)
    assert record.seconds >= 0
    assert abs((datetime.now().astimezone() - datetime.fromisoformat(record.started)).days) <= 1
    assert record.environment["device"] == records.cpu_model()
    binary = variant not in REAL
    assert set(record.recipe) == {*asdict(recipe), "weights", "dropout", "precision"}
    kind = "stochastic" if variant == "stochastic" else "deterministic"
    assert record.recipe["weights"] == (kind if binary else "real")
    assert record.recipe["dropout"] == 0.5 * (variant == "dropout")
    assert (record.recipe["epochs"], record.recipe["precision"]) == (1, "float32")
    (row,) = record.history
    assert set(row) == COLUMNS | ({"flip_ratio", "saturation"} if binary else set())
    modes = MODES if binary and "table2" in name else set()
    assert set(record.metrics) == METRICS | modes
    assert all(math.isfinite(value) for value in record.metrics.values())
    assert record.metrics["test_error"] == 1 - row["test_accuracy"]
    assert record.metrics["best_epoch"] == 1


@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_the_arrays_of_a_record(name, variant):
    arrays = once(name, variant).arrays
    decoded = {key: records.decode_array(value) for key, value in arrays.items()}
    expected = {"first_layer_density"} if variant not in REAL else set()
    assert set(decoded) == expected | ({"features"} if name.endswith("table2") else set())
    if "features" in decoded:
        assert decoded["features"].shape == (25, 8, 8)
        assert {(f.min(), f.max()) for f in decoded["features"]} == {(0, 255)}
    if expected:
        assert decoded["first_layer_density"].shape == (50,)


@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_a_record_is_saved_and_read_back(name, variant, tmp_path):
    record = once(name, variant)
    back = records.read(records.save(copy.deepcopy(record), tmp_path))
    for field in ("experiment", "variant", "seed", "scale", "shortened", "dataset_sha256",
                  "metrics", "arrays", "environment", "seconds", "started"):  # fmt: skip
        assert getattr(back, field) == getattr(record, field), field
    lists = {name: list(record.recipe[name]) for name in ("hidden", "widths")}
    assert back.recipe == record.recipe | lists
    for key, value in record.history[0].items():
        assert back.history[0][key] == pytest.approx(value, rel=1e-5), key


def test_features_of_the_first_seed_only():
    assert "features" not in once("binaryconnect.table2", "deterministic", seed=1).arrays


def test_a_whole_run_is_not_shortened(monkeypatch):
    use_tiny(monkeypatch, "clipping", epochs=2)
    assert binaryconnect.clipping(device="cpu").shortened is None
    assert binaryconnect.clipping(epochs=2, device="cpu").shortened is None
    assert binaryconnect.clipping(epochs=1, device="cpu").shortened == "1 of 2 epochs"


@pytest.mark.parametrize("variant", ["none", "deterministic", "stochastic", "dropout"])
def test_the_seed_fixes_the_record(variant):
    first = once("binaryconnect.table2", variant)
    again = binaryconnect.table2(variant, epochs=1, device="cpu")
    other = once("binaryconnect.table2", variant, seed=1)
    assert first is not again
    assert (again.metrics, again.arrays) == (first.metrics, first.arrays)
    assert without_time(again) == without_time(first)
    assert other.metrics != first.metrics
    assert without_time(other) != without_time(first)


def test_the_error_is_that_of_the_best_validation_epoch():
    rows = [{"epoch": e, "validation_accuracy": v, "test_accuracy": t, "train_loss": 0.5,
             "seconds": 30.0} for e, v, t in ((1, 0.75, 0.5), (2, 0.5, 1.0))]  # fmt: skip
    some = replace(fitted(), history=training.History(rows))
    record = binaryconnect.make_record("clipping", "clipped", 4, "small", some, {"more": 1.0})
    expected = {"test_error": 0.5, "validation_error": 0.25, "best_epoch": 1,
                "last_test_error": 0.0, "train_loss": 0.5, "more": 1.0}  # fmt: skip
    assert expected.items() <= record.metrics.items()
    assert (record.seed, record.seconds) == (4, 60.0)


def test_the_first_layers_shares_and_density_are_of_its_weights():
    some = fitted(clip=False)
    record = binaryconnect.make_record("clipping", "unclipped", 0, "small", some, {})
    weight = some.model[1].weight.detach().abs()
    share = {limit: (weight < limit).float().mean().item() for limit in (0.1, 0.99)}
    assert record.metrics["first_layer_below_0.1"] == pytest.approx(share[0.1], abs=1e-6)
    assert record.metrics["first_layer_above_0.99"] == pytest.approx(1 - share[0.99], abs=1e-6)
    density = records.decode_array(record.arrays["first_layer_density"])
    inside = (weight <= 1).float().mean().item()
    assert inside < 1
    assert density.sum() * 2 / 50 == pytest.approx(inside, abs=1e-5)


# --- What the variants do ----------------------------------------------------------------------


@pytest.mark.parametrize("variant", binaryconnect.VARIANTS["table1"])
def test_table1_has_the_optimizers_and_rates_that_its_names_say(variant, started):
    binaryconnect.table1(variant, lr=0.01, device="cpu")
    (run,) = started
    name, _, scaled = variant.partition("-")
    kind = {"sgd": torch.optim.SGD, "nesterov": torch.optim.SGD, "adam": torch.optim.Adam}[name]
    assert type(run.optimizer) is kind
    settings = run.optimizer.defaults
    if name == "adam":
        assert settings["betas"] == (0.9, 0.999)
    else:
        nesterov = name == "nesterov"
        assert (settings["momentum"], settings["nesterov"]) == (0.9 * nesterov, nesterov)
    power = {"adam": 1, "sgd": 2, "nesterov": 2}[name] if scaled else 0
    rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert rates.keys() == {id(p) for p in run.model.parameters()}
    layers = list(binary_layers(run.model))
    widths = [64, *binaryconnect.RECIPES["table1"]["small"].hidden, 10]
    assert [tuple(layer.weight.shape[::-1]) for layer in layers] == list(pairwise(widths))
    for layer in layers:
        c = math.sqrt(1.5 / sum(layer.weight.shape))
        assert rates.pop(id(layer.weight)) == pytest.approx(0.01 / c**power)
    assert set(rates.values()) == {0.01}


def test_table1_ends_at_a_thousandth_of_its_rate(monkeypatch):
    use_tiny(monkeypatch, "table1")
    record = binaryconnect.table1("adam", lr=0.02, device="cpu")
    assert (record.recipe["lr_start"], record.recipe["lr_end"]) == (0.02, 0.02 / 1000)
    rates = [row["lr"] for row in record.history]
    assert rates == pytest.approx([0.02, 0.02 / math.sqrt(1000), 0.02 / 1000])


@pytest.mark.parametrize("variant", binaryconnect.VARIANTS["table1"])
def test_table1s_recipe_says_what_was_run(variant):
    recipe = once("binaryconnect.table1", variant).recipe
    name, _, scaled = variant.partition("-")
    assert (recipe["optimizer"], recipe["lr_scaling"]) == (name, bool(scaled))


def test_clipping_keeps_the_latent_weights_in_the_unit_interval():
    clipped, unclipped = (
        torch.cat([layer.weight.detach().flatten().abs() for layer in binary_layers(each.model)])
        for each in (fitted(clip=True), fitted(clip=False))
    )
    assert clipped.max() == 1
    assert unclipped.max() > 1.01
    for variant in ("clipped", "unclipped"):
        assert once("binaryconnect.clipping", variant).recipe["clip"] == (variant == "clipped")
    ends = [once("binaryconnect.clipping", v).arrays for v in ("clipped", "unclipped")]
    assert ends[0] != ends[1]


@pytest.mark.parametrize("variant", binaryconnect.VARIANTS["table2"])
def test_table2s_networks(variant, started):
    binaryconnect.table2(variant, device="cpu")
    model = started[0].model
    drops = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    hidden = binaryconnect.RECIPES["table2"]["small"].hidden
    assert drops == ([0.5] * len(hidden) if variant == "dropout" else [])
    layers = list(binary_layers(model))
    assert len(layers) == (0 if variant in REAL else len(hidden) + 1)
    for layer in layers:
        draws = [layer.binary_weight() for _ in range(2)]
        assert set(draws[0].unique().tolist()) == {-1.0, 1.0}
        assert torch.equal(*draws) == (variant == "deterministic")


def test_a_real_network_starts_as_glorot_says(started):
    binaryconnect.table2("none", device="cpu")
    weight = started[0].model[1].weight.detach()
    bound = math.sqrt(6 / (64 + len(weight)))
    assert 0.99 * bound < weight.abs().max() <= bound


def test_the_seed_fixes_where_training_starts_and_nothing_else(started):
    state = torch.get_rng_state()
    for seed in (1, 1, 2):
        binaryconnect.table2("stochastic", seed=seed, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = (run.model[1].weight for run in started)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert [run.seed for run in started] == [1, 1, 2]


def test_small_scale_starts_uniform_in_the_unit_interval(started):
    binaryconnect.table2("deterministic", device="cpu")
    weight = started[0].model[4].weight.detach().abs()
    assert weight.max() < 1
    assert (weight < 0.5).float().mean() == pytest.approx(0.5, abs=0.02)


def test_full_scale_is_the_early_codes_recipe(started, monkeypatch):
    """Half the weights start at ±1: U(-2, 2), clipped; MNIST's other settings as in the paper."""
    recipe = binaryconnect.RECIPES["table2"]["full"]
    assert (recipe.dataset, recipe.hidden, recipe.epochs) == ("mnist", (1024,) * 3, 1000)
    assert (recipe.batch_size, recipe.validation) == (200, 10_000)
    digits = replace(recipe, dataset="digits", validation=300)
    monkeypatch.setitem(binaryconnect.RECIPES["table2"], "full", digits)
    binaryconnect.table2("deterministic", scale="full", device="cpu")
    (run,) = started
    weights = torch.cat([w.weight.detach().flatten().abs() for w in binary_layers(run.model)])
    assert weights.max() == 1
    assert (weights == 1).float().mean() == pytest.approx(0.5, abs=0.002)
    assert (weights < 0.5).float().mean() == pytest.approx(0.25, abs=0.002)
    assert type(run.optimizer) is torch.optim.SGD
    rates = [group["lr"] for group in run.optimizer.param_groups]
    assert rates[1] == pytest.approx(0.3 * 2048 / 1.5)
    assert rates[-1] == 0.3
    assert 0.3 * run.schedulers[0].gamma ** 999 == pytest.approx(0.01)  # the last epoch's rate
    assert run.loss(torch.zeros(2, 10), torch.tensor([0, 1])) == 10


@pytest.mark.parametrize(("weights", "quantizer"), [
    ("deterministic", ste_sign), ("stochastic", real_weight),
])  # fmt: skip
def test_an_epoch_is_tested_the_papers_way(weights, quantizer):
    some = fitted(weights)
    last = some.history.rows[-1]
    assert 1 - last["test_accuracy"] == binaryconnect.error(some, some.tested_with(quantizer))


# --- Table 1 at full scale ---------------------------------------------------------------------


@pytest.fixture
def full_table1(monkeypatch):
    """Put a tiny recipe in place of table 1's full one."""
    recipe = replace(TINY, epochs=2, evaluate_every=5)
    monkeypatch.setitem(binaryconnect.RECIPES, "table1", {"small": TINY, "full": recipe})
    monkeypatch.setattr(binaryconnect, "TRIAL_EPOCHS", 1)
    monkeypatch.setattr(binaryconnect, "RATES", (1e-5, 0.01, 0.1))


def test_full_table1_runs_at_the_rate_that_validates_best(full_table1):
    record = binaryconnect.table1("adam-scaled", scale="full", device="cpu")
    trials = {}
    for rate in binaryconnect.RATES:
        recipe = replace(TINY, epochs=1, lr_start=rate, lr_end=rate / 1000)
        row = binaryconnect.fit(recipe, "deterministic", device="cpu").history.rows[-1]
        trials[rate] = 1 - row["validation_accuracy"]
        assert record.metrics[f"validation error, trial at {rate:g}"] == trials[rate]
    best = min(trials, key=trials.get)
    assert trials[best] < trials[1e-5]
    assert (record.recipe["lr_start"], record.recipe["lr_end"]) == (best, best / 1000)
    assert (len(record.history), record.shortened) == (2, None)
    given = binaryconnect.table1("adam-scaled", scale="full", lr=best, device="cpu")
    assert without_time(given) == without_time(record)
    assert not any("trial" in name for name in given.metrics)


def test_a_rate_that_diverges_loses(full_table1, monkeypatch):
    fit = binaryconnect.fit

    def diverging(recipe, *args, **options):
        if recipe.lr_start != 0.01:
            raise training.NonFiniteLossError("the loss is nan")
        return fit(recipe, *args, **options)

    monkeypatch.setattr(binaryconnect, "fit", diverging)
    metrics = binaryconnect.table1("sgd", scale="full", device="cpu").metrics
    trials = [metrics[f"validation error, trial at {rate:g}"] for rate in (1e-5, 0.01, 0.1)]
    assert trials[0] == trials[2] == 1.0
    assert trials[1] < 1


def test_the_time_of_the_trials_counts(full_table1, monkeypatch):
    monkeypatch.setattr(binaryconnect, "try_rates", lambda *_: ({0.01: 0.5}, 1000.0))
    record = binaryconnect.table1("adam", scale="full", device="cpu")
    assert 1000 <= record.seconds < 1100


def test_an_interrupted_trial_continues(full_table1, tmp_path, monkeypatch, press_ctrl_c_at):
    """A folder keeps each trial and the run, so that no trial has to be run twice."""
    straight = binaryconnect.table1("nesterov-scaled", scale="full", device="cpu")
    with monkeypatch.context() as patch:
        press_ctrl_c_at(27, patch)  # the second trial's step 7
        with pytest.raises(KeyboardInterrupt):
            binaryconnect.table1("nesterov-scaled", scale="full", device="cpu",
                                 checkpoint=tmp_path)  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"trial1e-05.pt", "trial0.01.pt"}
    resumed = binaryconnect.table1("nesterov-scaled", scale="full", device="cpu",
                                   checkpoint=tmp_path)  # fmt: skip
    assert (tmp_path / "run.pt").exists()
    assert resumed.metrics == straight.metrics
    assert without_time(resumed) == without_time(straight)


def test_the_small_table1_makes_no_trials(started):
    binaryconnect.table1("adam-scaled", device="cpu", checkpoint="run.pt")
    (run,) = started
    assert run.checkpoint == "run.pt"
    assert run.optimizer.defaults["lr"] == binaryconnect.RECIPES["table1"]["small"].lr_start


# --- The convolutional columns of table 2 ------------------------------------------------------


def images_of(count, size=32):
    """A data set of random colour images; classes follow each other."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return data.Dataset(images, torch.arange(count) % 10, images[:10], torch.arange(10),
                        tuple("0123456789"), name="toy")  # fmt: skip


def test_the_full_recipes_of_the_convolutional_networks():
    """Values of the released code's cifar10.py and svhn.py, but for what the module says."""
    recipe = binaryconnect.RECIPES["table2_cifar10"]["full"]
    assert (recipe.dataset, recipe.widths, recipe.hidden) == (
        "cifar10", (128, 256, 512), (1024, 1024))  # fmt: skip
    assert (recipe.epochs, recipe.batch_size, recipe.optimizer) == (500, 50, "adam")
    assert (recipe.lr_start, recipe.lr_end, recipe.validation) == (0.003, 0.000002, 5000)
    assert (recipe.reduction, recipe.lr_scaling, recipe.clip) == ("mean", True, True)
    assert (recipe.init_bound, recipe.whiten) == (1.0, True)
    svhn = binaryconnect.RECIPES["table2_svhn"]["full"]
    changed = {k for k, v in asdict(recipe).items() if asdict(svhn)[k] != v}
    assert changed == {"dataset", "widths", "epochs", "lr_start", "lr_end", "validation"}
    assert (svhn.dataset, svhn.widths, svhn.epochs) == ("svhn+extra", (64, 128, 256), 200)
    assert (svhn.lr_start, svhn.lr_end, svhn.validation) == (0.01, 0.000003, 6000)
    table1 = binaryconnect.RECIPES["table1"]["full"]
    assert (table1.widths, table1.hidden, table1.epochs) == ((64, 128, 256), (512, 512), 100)
    assert 0.003 in binaryconnect.RATES


@pytest.mark.parametrize(("table", "factor"), [
    ("table2", 0.996605), ("table2_cifar10", 0.985480), ("table2_svhn", 0.960253),
])  # fmt: skip
def test_the_rates_fall_as_in_the_authors_code(table, factor):
    """Their factor an epoch, whose last rate is that after the last epoch."""
    recipe = binaryconnect.RECIPES[table]["full"]
    rate = (recipe.lr_end / recipe.lr_start) ** (1 / recipe.epochs)
    assert rate == pytest.approx(factor, abs=5e-7)


@pytest.mark.parametrize(("table", "weights", "coefficients"), [
    ("table2_cifar10", 14_022_016,
     [28.04, 39.19, 48.00, 55.43, 67.88, 78.38, 78.38, 36.95, 26.26]),
    ("table2_svhn", 6_397_632,
     [20.05, 27.71, 33.94, 39.19, 48.00, 55.43, 58.42, 36.95, 26.26]),
])  # fmt: skip
def test_the_full_networks_and_their_scaled_rates(table, weights, coefficients):
    recipe = binaryconnect.RECIPES[table]["full"]
    model = binaryconnect.build_network(recipe, images_of(10), "deterministic")
    layers = list(binary_layers(model))
    assert sum(layer.weight.numel() for layer in layers) == weights
    optimizer = binaryconnect.build_optimizer(model, recipe)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    scaled = [rates.pop(id(layer.weight)) / recipe.lr_start for layer in layers]
    assert scaled == pytest.approx(coefficients, abs=0.01)
    assert set(rates.values()) == {recipe.lr_start}
    kinds = [type(module).__name__ for module in model]
    assert kinds[:7] == ["BinaryConv2d", "BatchNorm2d", "ReLU", "BinaryConv2d", "MaxPool2d",
                         "BatchNorm2d", "ReLU"]  # fmt: skip


@pytest.mark.parametrize("table", ["table2_cifar10", "table2_svhn"])
@pytest.mark.parametrize("variant", ["none", "deterministic", "stochastic"])
def test_the_convolutional_variants(table, variant, started):
    getattr(binaryconnect, table)(variant, device="cpu")
    (run,) = started
    recipe = binaryconnect.RECIPES[table]["small"]
    convolutions = [m for m in run.model.modules() if isinstance(m, nn.Conv2d)]
    wide, deep = recipe.widths
    assert [m.out_channels for m in convolutions] == [wide, wide, deep, deep]
    layers = list(binary_layers(run.model))
    assert len(layers) == (0 if variant == "none" else 7)
    for layer in layers:
        draws = [layer.binary_weight() for _ in range(2)]
        assert set(draws[0].unique().tolist()) == {-1.0, 1.0}
        assert torch.equal(*draws) == (variant == "deterministic")
    rates = [group["lr"] for group in run.optimizer.param_groups]
    assert max(rates) == recipe.lr_start if variant == "none" else max(rates) > recipe.lr_start
    assert run.loss(torch.zeros(2, 10), torch.tensor([0, 1])) == 1


def test_the_convolutional_networks_see_whitened_images(started):
    binaryconnect.table2_cifar10("none", device="cpu")
    digits = data.load("digits").hold_out(300)
    images = digits.test_images[:20]
    expected = data.zca_whiten(digits)(images)
    torch.testing.assert_close(started[0].preprocess(images), expected)


def test_what_is_prepared_is_kept_for_the_next_run():
    root, cpu = data.root_folder(), torch.device("cpu")
    first = binaryconnect.prepare("digits", 300, True, cpu, root)
    assert binaryconnect.prepare("digits", 300, True, cpu, root)[1] is first[1]
    assert len(binaryconnect.prepare("digits", 200, True, cpu, root)[0].train_images) == 1100


def test_svhns_validation_images_are_of_both_parts(monkeypatch, tmp_path):
    base, extra = images_of(40, size=4), images_of(60, size=4)
    seen = []

    def svhn(root, split, download):
        seen.append((root, split, download))
        return SimpleNamespace(data=extra.train_images.numpy(), labels=extra.train_labels.numpy())

    monkeypatch.setattr("torchvision.datasets.SVHN", svhn)
    monkeypatch.setattr(data, "load", lambda name, root: base if name == "svhn" else None)
    both = binaryconnect.svhn_with_extra(tmp_path, per_class=1, extra_per_class=2)
    assert seen == [(tmp_path, "extra", True)]
    assert (both.name, len(both.train_images)) == ("svhn+extra", 100 - 30)
    held = torch.cat([base.train_images[-10:], extra.train_images[-20:]])
    assert torch.equal(both.validation_images, held)
    assert torch.equal(both.validation_labels, torch.arange(30) % 10)
    kept = torch.cat([base.train_images[:-10], extra.train_images[:-20]])
    assert torch.equal(both.train_images, kept)
    assert torch.equal(both.test_images, base.test_images)


def test_the_last_of_each_class():
    labels = torch.randint(7, (500,), generator=torch.Generator().manual_seed(2))
    mask = binaryconnect.last_of_each_class(labels, 9)
    expected = [i for c in range(7) for i in (labels == c).nonzero()[-9:].flatten().tolist()]
    assert mask.nonzero().flatten().tolist() == sorted(expected)


# --- At test time ------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(some, weight_of, images, statistics=None):
    """The network spelled out: its outputs, and the mean and variance that each batch norm saw.

    ``statistics`` are those to normalise with; without, each batch norm uses the batch's own.
    """
    x, seen = some.preprocess(images).flatten(1), []
    layers, norms = list(binary_layers(some.model)), some.model[2::3]
    for i, (layer, norm) in enumerate(zip(layers, norms, strict=True)):
        x = x @ weight_of(layer.weight).T
        seen.append((x.mean(0), x.var(0)))
        mean, variance = statistics[i] if statistics else (x.mean(0), x.var(0, correction=0))
        x = (x - mean) / (variance + 1e-4).sqrt() * norm.weight + norm.bias
        x = x if norm is norms[-1] else torch.relu(x)
    return x, seen


def error_of(outputs, labels):
    return (outputs.argmax(1) != labels).float().mean().item()


@pytest.mark.parametrize("weights", ["deterministic", "stochastic"])
def test_test_network_leaves_the_model_alone(weights):
    some = fitted(weights)
    some.model.train()
    before = {k: v.clone() for k, v in some.model.state_dict().items()}
    quantizers = [layer.weight_quantizer for layer in binary_layers(some.model)]
    network = some.tested_with(real_weight)
    assert all(torch.equal(v, before[k]) for k, v in some.model.state_dict().items())
    assert [layer.weight_quantizer for layer in binary_layers(some.model)] == quantizers
    assert {layer.weight_quantizer for layer in binary_layers(network)} == {real_weight}
    assert some.model.training


@pytest.mark.parametrize("count", [100, 1000])
@pytest.mark.parametrize(
    ("quantizer", "weight_of"), [(ste_sign, sign), (real_weight, lambda w: w)]
)
def test_statistics_are_of_the_weights_in_use(quantizer, weight_of, count):
    """From the first ``norm_images`` training images, and not those that training left."""
    some = fitted()
    network = binaryconnect.test_network(some.model, quantizer, some.dataset, some.preprocess,
                                         norm_images=count)  # fmt: skip
    _, seen = by_hand(some, weight_of, some.dataset.train_images[:count])
    for norm, old, (mean, variance) in zip(network[2::3], some.model[2::3], seen, strict=True):
        torch.testing.assert_close(norm.running_mean, mean, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(norm.running_var, variance, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(norm.running_var, old.running_var, atol=1e-3, rtol=1e-3)


def test_the_inference_modes_are_what_one_computes_by_hand():
    some = fitted()
    test, labels = some.dataset.test_images, some.dataset.test_labels
    trained = [(norm.running_mean, norm.running_var) for norm in some.model[2::3]]
    statistics = {
        of: by_hand(some, of, some.dataset.train_images)[1] for of in (sign, real_weight)
    }
    expected = {
        "sign": by_hand(some, sign, test, statistics[sign])[0],
        "real": by_hand(some, real_weight, test, statistics[real_weight])[0],
        "real, training statistics": by_hand(some, real_weight, test, trained)[0],
    }
    drawn = binaryconnect.sampled_outputs(some, seed=5, samples=4)
    expected |= {"one sample": drawn[0], "ensemble": drawn.sum(0)}
    modes = binaryconnect.inference_modes(some, seed=5, samples=4)
    assert list(modes) == [f"error, {name}" for name in expected]
    for name, outputs in expected.items():
        # a rounding may turn one of the 497 images
        assert modes[f"error, {name}"] == pytest.approx(error_of(outputs, labels), abs=1.01 / 497)
    assert len({round(value, 2) for value in modes.values()}) > 1


def test_the_networks_tested_give_the_outputs_computed_by_hand():
    some, images = fitted(), fitted().dataset.test_images
    for quantizer, weight_of in ((ste_sign, sign), (real_weight, real_weight)):
        _, statistics = by_hand(some, weight_of, some.dataset.train_images)
        expected, _ = by_hand(some, weight_of, images, statistics)
        outputs = training.predict(some.tested_with(quantizer), images, preprocess=some.preprocess)
        torch.testing.assert_close(outputs, expected, atol=1e-3, rtol=1e-3)


def test_sampled_networks_are_fixed_by_their_seed_and_by_nothing_else():
    some = fitted("stochastic")
    before = {k: v.clone() for k, v in some.model.state_dict().items()}
    state = torch.get_rng_state()
    first = binaryconnect.sampled_outputs(some, seed=3, samples=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again = binaryconnect.sampled_outputs(some, seed=3, samples=3)
    assert first.shape == (3, 497, 10)
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, binaryconnect.sampled_outputs(some, seed=4, samples=3))
    assert all(torch.equal(v, before[k]) for k, v in some.model.state_dict().items())


def test_a_network_that_leaves_nothing_to_chance_has_one_sample():
    some = replace(fitted(), model=copy.deepcopy(fitted().model))
    with torch.no_grad():
        for layer in binary_layers(some.model):
            layer.weight.copy_(sign(layer.weight))
    drawn = binaryconnect.sampled_outputs(some, seed=0, samples=2)
    images = some.dataset.test_images
    binary = training.predict(some.tested_with(ste_sign), images, preprocess=some.preprocess)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], binary)


# --- Interrupted -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["stochastic", "dropout"])
def test_an_interrupted_run_ends_in_the_same_record(
    variant, tmp_path, monkeypatch, press_ctrl_c_at
):
    use_tiny(monkeypatch, "table2", epochs=2)
    straight = binaryconnect.table2(variant, device="cpu")
    path = tmp_path / "run.pt"
    with monkeypatch.context() as patch:
        press_ctrl_c_at(27, patch)
        with pytest.raises(KeyboardInterrupt):
            binaryconnect.table2(variant, device="cpu", checkpoint=path)
    assert torch.load(path, weights_only=True)["step"] == 7
    resumed = binaryconnect.table2(variant, device="cpu", checkpoint=path)
    assert resumed.metrics == straight.metrics
    assert without_time(resumed) == without_time(straight)
    assert (resumed.arrays, resumed.recipe) == (straight.arrays, straight.recipe)


# --- The paper's numbers -----------------------------------------------------------------------


def test_the_papers_numbers():
    """Test errors in per cent, tables 1 and 2; table 1 leaves plain SGD unscaled blank."""
    paper = binaryconnect.PAPER
    assert paper["table1"] == {
        "sgd-scaled": 11.45,
        "nesterov": 15.65, "nesterov-scaled": 11.30,
        "adam": 12.81, "adam-scaled": 10.47,
    }  # fmt: skip
    assert paper["table2 mnist"] == {
        "none": (1.30, 0.04), "deterministic": (1.29, 0.08), "stochastic": (1.18, 0.04),
        "dropout": (1.01, 0.04),
    }  # fmt: skip
    means = {"cifar10": (10.64, 9.90, 8.27), "svhn": (2.44, 2.30, 2.15)}
    for name, expected in means.items():
        assert paper[f"table2 {name}"] == {
            variant: (mean, None)
            for variant, mean in zip(
                ("none", "deterministic", "stochastic"), expected, strict=True
            )
        }
    assert set(paper) == {"table1", "table2 mnist", "table2 cifar10", "table2 svhn"}


def test_the_papers_variants_are_ours():
    for name, numbers in binaryconnect.PAPER.items():
        assert set(numbers) <= set(binaryconnect.VARIANTS[name.split()[0]])


def test_seeded_draws_alike_and_leaves_the_generator_as_it_was():
    before, drawn = torch.get_rng_state(), []
    for seed in (3, 3, 4):
        with runs.seeded(seed, torch.device("cpu")):
            drawn.append(torch.rand(5))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_features_are_stretched_one_by_one():
    weight = torch.arange(30 * 64, dtype=torch.float32).reshape(30, 64) - 700
    images = binaryconnect.features(weight, data.load("digits")).numpy()
    expected = np.rint(np.arange(64) / 63 * 255).reshape(8, 8)
    assert images.shape == (25, 8, 8)
    assert np.abs(images - expected).max() <= 1
