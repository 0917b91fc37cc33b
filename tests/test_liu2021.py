"""The experiments on Adam and training strategies: recipes against the paper, short runs."""

import functools
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from bnnbook import data, probes, records, training
from bnnbook.binarize import magnitude_aware_sign, real_weight
from bnnbook.experiments import liu2021
from bnnbook.layers import binary_layers

EXPERIMENTS = list(liu2021.VARIANTS)
TINY = replace(liu2021.SMALL, epochs=1, batch_size=100)


@functools.cache
def once(name, variant):
    """The record of one epoch; made once for all tests, which must not change it."""
    return getattr(liu2021, name)(variant, epochs=1, device="cpu", progress=False)


# --- Recipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_unknown_variant_or_scale_lists_the_known(name):
    function = getattr(liu2021, name)
    assert function.__defaults__[0] in liu2021.VARIANTS[name]
    with pytest.raises(ValueError, match=f"unknown variant 'x'.*{liu2021.VARIANTS[name][0]}"):
        function("x")
    with pytest.raises(ValueError, match=r"unknown scale 'huge'.*known: small, full"):
        function(scale="huge")


@pytest.mark.parametrize("scale", ["small", "full"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_variant_has_a_recipe_of_its_own(name, scale):
    found = [liu2021.find_recipe(name, variant, scale, None) for variant in liu2021.VARIANTS[name]]
    assert len(set(found)) == len(found)
    assert liu2021.find_recipe(name, liu2021.VARIANTS[name][0], scale, 3).epochs == 3


def test_the_full_recipe_has_the_released_codes_numbers():
    full = liu2021.FULL
    assert (full.lr, full.momentum, full.batch_size) == (1.25e-3, 0.9, 256)
    model = liu2021.build_model(full)
    adam = liu2021.build_optimizer(model, full, 0)
    assert adam.param_groups[0]["betas"] == (0.9, 0.999)
    assert sum(p.numel() for p in adam.param_groups[0]["params"]) == 267_264
    assert all(w.abs().max() <= 1e-3 for w in adam.param_groups[0]["params"])


def test_the_rates_cover_the_papers_sweep():
    rates = liu2021.RATES
    assert min(rates["adam"]) <= 1e-4
    assert max(rates["adam"]) >= 5e-3
    assert 1e-3 in rates["adam"]
    assert min(rates["sgd"]) <= 2e-3
    assert max(rates["sgd"]) >= 2e-1


def test_weight_decays_are_those_of_table_1():
    for variant, (decay, *_) in liu2021.PAPER["weight_decay"].items():
        recipe = liu2021.find_recipe("weight_decay", variant, "full", None)
        assert recipe.weight_decay == pytest.approx(decay)
        assert recipe.optimizer == "adam"


def test_the_papers_numbers_are_in_the_order_that_the_book_states():
    table = liu2021.PAPER["weight_decay"]
    flips, c2i = ([table[v][i] for v in ("minus-20x", "0x", "1x", "2x")] for i in (1, 2))
    assert flips == sorted(flips)
    assert c2i == sorted(c2i, reverse=True)
    assert table["2x"][1] / table["1x"][1] == pytest.approx(1.438, abs=5e-4)
    assert all(table[v][2] < 0.5 for v in ("1x", "2x"))  # impossible with the factor 1/2 of eq. 7
    assert all(liu2021.PAPER["optimizer"]["adam"][i] > liu2021.PAPER["optimizer"]["sgd"][i]
               for i in (0, 1))  # fmt: skip


def test_two_steps_are_real_weights_first_and_the_control_is_as_long():
    def recipe(variant):
        return liu2021.find_recipe("two_step", variant, "full", None)

    assert recipe("two-step").steps == ("real", "binary")
    assert (recipe("two-step").first_weight_decay, recipe("two-step").weight_decay) == (5e-6, 0)
    assert recipe("twice").steps == ("binary", "binary")
    assert recipe("one-step").steps == ("binary",)
    assert recipe("twice").first_weight_decay == recipe("one-step").first_weight_decay == 0


@pytest.mark.parametrize("name", ["steps_short", "steps_long"])
def test_one_step_is_as_long_as_two_at_each_rate(name):
    recipes = [liu2021.find_recipe(name, v, "full", None) for v in liu2021.VARIANTS[name]]
    assert {len(r.steps) * r.epochs for r in recipes} == {liu2021.RECIPES[name]["full"].epochs}
    rates = {r.lr / liu2021.FULL.lr for r in recipes}
    assert rates == {1, 4, 16, 64}
    assert {(r.steps, r.lr) for r in recipes} == {
        (steps, by * liu2021.FULL.lr) for steps in liu2021.STEPS.values() for by in rates
    }
    assert {(r.weight_decay, r.first_weight_decay) for r in recipes} == {(0, 0)}


def test_two_steps_cannot_share_an_odd_number_of_epochs():
    assert liu2021.find_recipe("steps_short", "one-step-1x", "small", 3).epochs == 3
    with pytest.raises(ValueError, match="2 steps cannot share 3 epochs"):
        liu2021.find_recipe("steps_short", "two-step-1x", "small", 3)


@pytest.mark.parametrize(("falls", "rates"), [
    ("epoch", [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]),
    ("update", [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
])  # fmt: skip
def test_the_rate_falls_to_zero_by_the_epoch_or_by_the_update(falls, rates):
    recipe = replace(TINY, epochs=2, batch_size=25, falls=falls)
    model = liu2021.build_model(recipe)
    optimizer = liu2021.build_optimizer(model, recipe, 0)
    schedule, seen = liu2021.build_schedule(optimizer, recipe, 100), []
    for _ in range(2):
        for _ in range(4):
            seen.append(optimizer.param_groups[1]["lr"] / recipe.lr)
            optimizer.step()
        schedule.step()
    assert seen == pytest.approx(rates)
    assert optimizer.param_groups[0]["lr"] == 0


def test_only_the_first_of_two_steps_has_its_own_decay():
    recipe = replace(TINY, weight_decay=0.5, first_weight_decay=0.25, steps=("real", "binary"))
    model = liu2021.build_model(recipe)
    decays = [liu2021.build_optimizer(model, recipe, n).param_groups[0]["weight_decay"]
              for n in (0, 1)]  # fmt: skip
    assert decays == [0.25, 0.5]
    single = liu2021.build_optimizer(model, replace(recipe, steps=("binary",)), 0)
    assert [group["weight_decay"] for group in single.param_groups] == [0.5, 0]


def test_an_unknown_optimizer_lists_the_known():
    with pytest.raises(ValueError, match="unknown optimizer 'lion'; known: adam, sgd"):
        liu2021.build_optimizer(liu2021.build_model(TINY), replace(TINY, optimizer="lion"), 0)


# --- Quantizer and optimizers --------------------------------------------------------------------


def test_the_released_codes_quantizer():
    w = torch.tensor([[0.5, -0.25, 0.0], [3.0, -1.0, 2.0]], requires_grad=True)
    out = liu2021.scaled_sign(w)
    assert torch.equal(out, magnitude_aware_sign(w, None))  # to the last digit: κ times ±1
    out.backward(torch.full_like(w, 3.0))
    assert w.grad.tolist() == [[3.0, 3.0, 3.0], [0.0, 3.0, 0.0]]


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_negative_decay_makes_a_weight_without_gradient_grow(kind):
    layer = liu2021.NETWORKS["perceptron"](liu2021.scaled_sign)
    weights = [w.weight for w in binary_layers(layer)]
    recipe = replace(TINY, optimizer=kind, lr=0.01, weight_decay=-0.5)
    optimizer = liu2021.build_optimizer(layer, recipe, 0)
    before = weights[0].detach().clone()
    for _ in range(20):
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert (weights[0].abs() > before.abs()).all()
    assert torch.equal(weights[0] >= 0, before >= 0)


# --- Runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "variant"), [
    ("optimizer", "sgd-0.002"), ("weight_decay", "minus-20x"), ("two_step", "two-step"),
    ("steps_short", "one-step-4x"),
])  # fmt: skip
def test_a_record_is_complete(name, variant, tmp_path):
    record = once(name, variant)
    recipe = liu2021.find_recipe(name, variant, "small", 1)
    assert (record.experiment, record.variant, record.seed) == (f"liu2021.{name}", variant, 0)
    planned = liu2021.RECIPES[name]["small"].epochs
    assert (record.scale, record.shortened) == ("small", f"1 of {planned} epochs")
    assert record.dataset_sha256 == data.load("digits").sha256
    assert record.recipe == {**asdict(recipe), "precision": "float32"}
    assert len(record.history) == 1
    assert set(record.history[0]) >= {"flip_ratio", "c2i", "activation_saturation"}
    assert all(math.isfinite(value) for value in record.metrics.values())
    assert record.metrics["test_error"] == 1 - record.history[-1]["test_accuracy"]
    saved = records.read(records.save(record, tmp_path))
    assert saved.metrics.keys() == record.metrics.keys()
    histogram = records.decode_array(saved.arrays["latent_histogram"])
    assert 0.9 < histogram.sum() * 2 * liu2021.BOUND / 60 <= 1 + 1e-6
    assert records.decode_array(saved.arrays["magnitudes"]).shape == (128,)
    assert ("test_accuracy, step 1" in saved.arrays) == (name == "two_step")


def test_the_measures_are_those_of_the_final_network():
    fitted = liu2021.fit(TINY, device="cpu", progress=False)
    metrics, arrays = liu2021.measure(fitted)
    weights = [layer.weight.detach().numpy() for layer in binary_layers(fitted.model)]
    start = [layer.weight.detach().numpy() for layer in binary_layers(fitted.start)]
    all_of = np.concatenate([w.ravel() for w in weights])
    small = np.float32(TINY.start)  # the bound as float32 weights are compared with it
    assert metrics["unmoved"] == pytest.approx((np.abs(all_of) < small).mean(), abs=1e-4)
    same = np.mean((all_of >= 0) == (np.concatenate([w.ravel() for w in start]) >= 0))
    assert metrics["c2i"] == pytest.approx(same)
    magnitudes = np.abs(weights[1]).mean(1)
    assert metrics["magnitude"] == pytest.approx(magnitudes.mean(), rel=1e-4)
    assert metrics["magnitude_spread"] == pytest.approx(magnitudes.std(ddof=1), rel=1e-3)
    np.testing.assert_allclose(records.decode_array(arrays["magnitudes"]), magnitudes, rtol=1e-4)


def test_steps_have_the_weights_that_they_name_and_end_binary(monkeypatch):
    seen = []

    def look(model, *_, **options):
        seen.append([layer.weight_quantizer for layer in binary_layers(model)])
        for probe in options["probes"]:
            probe.start(model)
        return training.History([{"epoch": 1, "test_accuracy": 0.5, "seconds": 1.0}])

    monkeypatch.setattr(training, "train", look)
    fitted = liu2021.fit(replace(TINY, steps=("real", "binary")), device="cpu")
    assert [set(quantizers) for quantizers in seen] == [{real_weight}, {liu2021.scaled_sign}]
    probes.require_binary(fitted.model, scaled=True)
    assert len(fitted.histories) == 2


def test_two_steps_continue_from_a_checkpoint_folder(tmp_path):
    recipe = replace(TINY, steps=("real", "binary"))
    options = {"device": "cpu", "progress": False, "checkpoint": tmp_path / "run.pt"}
    first = liu2021.fit(recipe, **options)
    assert sorted(p.name for p in (tmp_path / "run.pt").iterdir()) == ["step0.pt", "step1.pt"]
    again = liu2021.fit(recipe, **options)
    for one, two in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert [h.rows for h in again.histories] == [h.rows for h in first.histories]


def test_the_full_recipe_runs_on_small_images(toy_images, monkeypatch):
    """CIFAR-10's shapes but for the size: all of the full recipe, in two steps."""
    toy_images(8)
    toy = replace(liu2021.FULL, dataset="toy", batch_size=16, epochs=1)
    monkeypatch.setitem(liu2021.RECIPES, "optimizer", {"full": toy})
    record = liu2021.optimizer("adam-0.001", scale="full", device="cpu", progress=False)
    assert all(math.isfinite(value) for value in record.metrics.values())
    layers = [c for c in record.history[0] if c.startswith("activation_saturation/")]
    assert len(layers) == 18
