"""Helwegen et al.'s experiments: what each variant runs, and what a record of it holds."""

import functools
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnnbook import data, experiments, optim, records, training
from bnnbook.binarize import real_weight, sign, ste_sign
from bnnbook.experiments import helwegen2019
from bnnbook.layers import binary_layers
from bnnbook.probes import log_flip_ratio

EVERY = [(name, variant) for name, variants in helwegen2019.VARIANTS.items()
         for variant in variants]  # fmt: skip
# An epoch of 13 steps, whatever the experiments' own recipes become.
TINY = replace(helwegen2019.DIGITS, widths=(4,), hidden=(16,), epochs=2, batch_size=100)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Train a narrower network for a moment; everything else stays the experiment's own."""
    for recipes in helwegen2019.RECIPES.values():
        small = replace(recipes["small"], widths=(4,), hidden=(16,), batch_size=100)
        monkeypatch.setitem(recipes, "small", small)


@pytest.fixture
def started(monkeypatch):
    """Replace training by a look at what it was given; returns the list of what was seen."""
    seen = []
    row = {"train_accuracy": 0.5, "test_accuracy": 0.25, "test_accuracy_own_statistics": 0.75,
           "train_loss": 1.0, "seconds": 2.0}  # fmt: skip

    def look(model, dataset, optimizers, **options):
        for probe in options["probes"]:
            probe.start(model)
            probe.step()
        seen.append(
            SimpleNamespace(model=model, dataset=dataset, optimizers=optimizers, **options)
        )
        return training.History([dict(row)])

    monkeypatch.setattr(training, "train", look)
    monkeypatch.setattr(helwegen2019, "inference_modes", lambda fitted: {})
    return seen


def run_full(monkeypatch, experiment, variant):
    """Start an experiment's full recipe, but on digits."""
    recipes = helwegen2019.RECIPES[experiment]
    whole = replace(recipes["full"], dataset="digits", widths=(4,), hidden=(16,), augment=False)
    monkeypatch.setitem(recipes, "full", whole)
    return getattr(helwegen2019, experiment)(variant, scale="full", device="cpu")


@functools.cache
def fitted(method="sgd", **changes):
    rate = {"rate": 1.0 if method == "sgd" else 0.01}
    recipe = replace(TINY, method=method, **rate | changes)
    return helwegen2019.fit(recipe, device="cpu")


# --- Names and records -------------------------------------------------------------------------


def test_every_name_is_found():
    for name, variants in helwegen2019.VARIANTS.items():
        function, found, recipes = experiments.find(f"helwegen2019.{name}")
        assert function is getattr(helwegen2019, name)
        assert found == variants
        assert set(recipes) == {"small", "full"}


@pytest.mark.parametrize("name", helwegen2019.VARIANTS)
def test_an_unknown_variant_or_scale_lists_the_known(name):
    function = getattr(helwegen2019, name)
    known = ", ".join(helwegen2019.VARIANTS[name])
    with pytest.raises(ValueError, match=f"'x' of helwegen2019.{name}; known: {known}"):
        function("x")
    with pytest.raises(ValueError, match=r"unknown scale 'huge'.*known: small, full"):
        function(scale="huge")


def test_an_unknown_method_lists_the_known():
    with pytest.raises(ValueError, match="unknown method 'lion'; known: bop, adam, sgd"):
        helwegen2019.fit(replace(TINY, method="lion"), device="cpu")


@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_a_record_is_complete_and_can_be_saved(name, variant, tmp_path):
    record = getattr(helwegen2019, name)(variant, seed=3, epochs=1, device="cpu")
    recipe = helwegen2019.RECIPES[name]["small"]
    assert (record.experiment, record.variant) == (f"helwegen2019.{name}", variant)
    assert (record.seed, record.scale) == (3, "small")
    assert record.shortened == f"1 of {recipe.epochs} epochs"
    assert record.dataset_sha256 == data.load("digits").sha256
    assert set(record.recipe) == {*asdict(recipe), "precision"}
    (row,) = record.history
    assert {"train_loss", "train_accuracy", "test_accuracy", "test_accuracy_own_statistics",
            "flip_ratio", "last_layer_pi", "seconds"} <= set(row)  # fmt: skip
    assert ("saturation" in row) == record.recipe["clip"]
    assert record.metrics["test_error"] == 1 - row["test_accuracy"]
    assert record.metrics["train_error"] == 1 - row["train_accuracy"]
    assert all(math.isfinite(value) for value in record.metrics.values())
    assert len(record.metrics) == (13 if name == "latent_inference" else 5)
    back = records.read(records.save(record, tmp_path))
    assert back.metrics == record.metrics


def test_a_whole_run_is_not_shortened():
    whole = helwegen2019.RECIPES["figure1"]["small"].epochs
    some = fitted()
    for epochs, words in ((whole, None), (1, f"1 of {whole} epochs"),
                          (99, f"99 epochs instead of {whole} epochs")):  # fmt: skip
        changed = replace(some, recipe=replace(some.recipe, epochs=epochs))
        record = helwegen2019.make_record("figure1", "middle", 0, "small", changed)
        assert record.shortened == words


@pytest.mark.parametrize("method", ["bop", "adam", "sgd"])
def test_the_seed_fixes_the_run(method):
    recipe = replace(TINY, method=method, epochs=1)
    losses = [helwegen2019.fit(recipe, seed=seed, device="cpu").history.rows[0]["train_loss"]
              for seed in (1, 1, 2)]  # fmt: skip
    assert losses[0] == losses[1] != losses[2]


# --- What the variants run ---------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "gamma", "threshold"), [
    ("middle", 1e-3, 1e-6), ("high-gamma", 1e-2, 1e-6), ("low-gamma", 1e-4, 1e-6),
    ("no-threshold", 1e-3, 0.0), ("high-threshold", 1e-3, 1e-5),
])  # fmt: skip
def test_figure1_has_the_papers_settings(variant, gamma, threshold, started, monkeypatch):
    assert helwegen2019.RECIPES["figure1"]["full"].dataset == "cifar10"
    run_full(monkeypatch, "figure1", variant)
    (run,) = started
    bop, adam = run.optimizers
    assert type(bop) is optim.Bop
    assert bop.param_groups[0]["lr"] == pytest.approx(gamma)
    assert bop.param_groups[0]["threshold"] == pytest.approx(threshold)
    assert type(adam) is torch.optim.Adam
    assert adam.param_groups[0]["lr"] == 0.01
    assert (run.epochs, run.batch_size) == (100, 100)
    assert all(layer.weight_quantizer is None for layer in binary_layers(run.model))


@pytest.mark.parametrize(("name", "epochs", "milestones"), [
    ("section52", 500, (100, 200, 300, 400)), ("section52_short", 160, (100, 120, 140)),
])  # fmt: skip
@pytest.mark.parametrize("variant", ["bop", "latent"])
def test_section52_is_the_papers_but_for_its_declared_length(name, variant, epochs, milestones,
                                                             started, monkeypatch):  # fmt: skip
    record = run_full(monkeypatch, name, variant)
    (run,) = started
    first, real = run.optimizers
    assert (run.epochs, run.batch_size) == (epochs, 50)
    assert tuple(record.recipe["milestones"]) == milestones
    if variant == "bop":
        (group,) = first.param_groups
        assert (type(first), group["lr"], group["threshold"]) == (optim.Bop, 1e-4, 1e-8)
        assert (real.param_groups[0]["lr"], len(run.schedulers)) == (0.01, 1)
    else:
        assert type(first) is torch.optim.Adam
        for group, layer in zip(first.param_groups, binary_layers(run.model), strict=True):
            assert group["lr"] == pytest.approx(1e-3 / optim.glorot_coefficient(layer))
        assert (real.param_groups[0]["lr"], len(run.schedulers)) == (1e-3, 2)


def test_rates_fall_to_a_tenth_after_the_milestones():
    recipe = replace(TINY, epochs=4, milestones=(1, 3), rate=0.01)
    rates = [row["lr"] for row in helwegen2019.fit(recipe, device="cpu").history.rows]
    assert rates == pytest.approx([0.01, 0.001, 0.001, 0.0001])


@pytest.mark.parametrize(("variant", "rate", "start"), [
    ("reference", 1.0, 1.0), ("low-rate", 0.01, 1.0), ("low-rate-scaled", 0.01, 0.01),
])  # fmt: skip
def test_scaling_has_the_theorems_conditions(variant, rate, start, started):
    helwegen2019.scaling(variant, device="cpu")
    (run,) = started
    sgd, _ = run.optimizers
    assert type(sgd) is optim.LatentSGD
    for group, layer in zip(sgd.param_groups, binary_layers(run.model), strict=True):
        assert group["lr"] == pytest.approx(rate)
        assert (group["gamma"], group["weight_decay"], group["clip"]) == (1.0, 0.0, None)
        bound = 2 * start * optim.glorot_coefficient(layer)
        assert 0.8 * bound < layer.weight.abs().max() <= bound * (1 + 1e-6)
        far = (100 * torch.ones_like(layer.weight)).requires_grad_()
        layer.weight_quantizer(far).sum().backward()
        assert (far.grad == 1).all()  # no mask


def test_theorem_one_holds_bit_for_bit_in_the_whole_network():
    """A power of two scales start and rate: each binary weight and each loss is the same."""
    recipe = replace(TINY, method="sgd", rate=1.0)
    scaled = replace(recipe, rate=2.0**-7, init_scale=2.0**-7)
    runs = [helwegen2019.fit(each, device="cpu") for each in (recipe, scaled)]
    for one, two in zip(*(binary_layers(run.model) for run in runs), strict=True):
        assert torch.equal(one.weight * 2.0**-7, two.weight)
        assert torch.equal(sign(one.weight), sign(two.weight))
    losses = [[row["train_loss"] for row in run.history.rows] for run in runs]
    assert losses[0] == losses[1]
    other = helwegen2019.fit(replace(recipe, rate=2.0**-7), device="cpu")
    assert other.history.rows[-1]["train_loss"] != losses[0][-1]


@pytest.mark.parametrize(("variant", "kind", "rate"), [
    ("adam", torch.optim.Adam, 1e-3), ("adam-high", torch.optim.Adam, 1e-2),
    ("sgd", optim.LatentSGD, 1.0),
])  # fmt: skip
def test_latent_inference_trains_as_its_variant_says(variant, kind, rate, started):
    helwegen2019.latent_inference(variant, device="cpu")
    (run,) = started
    assert type(run.optimizers[0]) is kind
    assert {group["lr"] for group in run.optimizers[0].param_groups} == {rate}


def test_clipping_is_as_the_recipe_says():
    weights = {clip: torch.cat([layer.weight.detach().flatten().abs() for layer in binary_layers(
        fitted(rate=30.0, clip=clip).model)]) for clip in (True, False)}  # fmt: skip
    assert weights[True].max() == 1
    assert weights[False].max() > 1


def test_augmentation_is_for_coloured_images_only(monkeypatch, started):
    helwegen2019.figure1(device="cpu")
    assert started[0].augment is None
    assert helwegen2019.RECIPES["figure1"]["full"].augment
    helwegen2019.fit(replace(TINY, augment=True), device="cpu")
    assert started[1].augment is not None


# --- What is measured --------------------------------------------------------------------------


def test_the_last_layers_pi_is_the_papers_metric():
    """The mean over an epoch's steps of the logarithm, not the logarithm of the mean."""
    some = fitted("bop", threshold=1e-4)
    for row in some.history.rows:
        last = [value for name, value in row.items() if name.startswith("flip_ratio/")][-1]
        of_mean = float(log_flip_ratio(last))
        assert -9 <= row["last_layer_pi"] <= of_mean  # Jensen
    recipe = replace(TINY, method="bop", rate=1e-2, threshold=1e9)
    frozen = helwegen2019.fit(recipe, device="cpu")
    assert [row["last_layer_pi"] for row in frozen.history.rows] == [-9.0, -9.0]


@torch.no_grad()
def by_hand(some, weight_of, images, statistics=None):
    """Outputs of the tiny network spelled out; and the moments that each batch norm saw."""
    x, seen = data.signed_range(images), []
    first, second, third, fourth = binary_layers(some.model)
    norms = [m for m in some.model if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def normalise(x):
        axes = (0, 2, 3) if x.dim() == 4 else (0,)
        seen.append((x.mean(axes), x.var(axes)))
        mean, var = statistics[len(seen) - 1] if statistics else seen[-1]
        shape = (1, -1, 1, 1) if x.dim() == 4 else (1, -1)
        bias = norms[len(seen) - 1].bias
        return (x - mean.view(shape)) / (var.view(shape) + 1e-3).sqrt() + bias.view(shape)

    x = normalise(F.conv2d(x, weight_of(first.weight)))
    x = normalise(F.max_pool2d(F.conv2d(sign(x), weight_of(second.weight), padding=1), 2))
    x = normalise(sign(x.flatten(1)) @ weight_of(third.weight).T)
    return normalise(sign(x) @ weight_of(fourth.weight).T), seen


def share(outputs, labels):
    return (outputs.argmax(1) == labels).float().mean().item()


def test_the_inference_modes_are_what_one_computes_by_hand():
    some = fitted()
    before = {k: v.clone() for k, v in some.model.state_dict().items()}
    modes = helwegen2019.inference_modes(some)
    assert all(torch.equal(v, before[k]) for k, v in some.model.state_dict().items())
    assert all(layer.weight_quantizer is not real_weight for layer in binary_layers(some.model))
    norms = [m for m in some.model if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    running = [(norm.running_mean, norm.running_var) for norm in norms]
    digits, count = some.dataset, some.recipe.norm_images
    for name, weight_of in (("binary", sign), ("latent", real_weight)):
        _, own = by_hand(some, weight_of, digits.train_images[:count])
        for kind, statistics in (("running", running), ("own", own)):
            for part in ("train", "test"):
                images = getattr(digits, f"{part}_images")[:count]
                outputs, _ = by_hand(some, weight_of, images, statistics)
                expected = share(outputs, getattr(digits, f"{part}_labels")[:count])
                found = modes[f"{part} accuracy, {name}, {kind} statistics"]
                # a rounding may turn the sign of an activation and so a few of the images
                assert found == pytest.approx(expected, abs=5 / 497), (name, kind, part)


def test_own_statistics_are_those_of_binary_weights_on_the_first_images():
    some = fitted("bop")
    probe = helwegen2019.OwnStatistics(some.dataset, 300)
    probe.start(some.model)
    probe.step()
    _, own = by_hand(some, ste_sign, some.dataset.train_images[:300])
    outputs, _ = by_hand(some, ste_sign, some.dataset.test_images, own)
    expected = share(outputs, some.dataset.test_labels)
    found = probe.epoch()["test_accuracy_own_statistics"]
    assert found == pytest.approx(expected, abs=5 / 497)
    assert probe.state_dict() == {}
    probe.load_state_dict({})


def test_a_run_is_resumed_exactly(tmp_path, press_ctrl_c_at, monkeypatch):
    whole = fitted("bop", threshold=1e-4)
    options = {"device": "cpu", "checkpoint": tmp_path / "run.pt"}
    with monkeypatch.context() as patch:
        press_ctrl_c_at(17, patch)
        with pytest.raises(KeyboardInterrupt):
            helwegen2019.fit(whole.recipe, **options)
    resumed = helwegen2019.fit(whole.recipe, **options)
    for one, two in zip(whole.history.rows, resumed.history.rows, strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}
