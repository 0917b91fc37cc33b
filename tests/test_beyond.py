"""The experiments beyond the papers: what each variant runs, and what a record holds."""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bnnbook import optim, records
from bnnbook.binarize import sign
from bnnbook.experiments import beyond
from bnnbook.experiments.runs import seeded

EXPERIMENTS = list(beyond.VARIANTS)
METRICS = {"test_error", "renewed_test_error", "train_loss", "flip_ratio", "last_flip_ratio"}


@functools.cache
def once(name, variant, seed=0, epochs=1):
    """The record of one epoch; made once for all tests, which must not change it."""
    return getattr(beyond, name)(variant, seed=seed, epochs=epochs, device="cpu")


def having(scale):
    """The experiments of this scale."""
    return [name for name in EXPERIMENTS if scale in beyond.RECIPES[name]]


@pytest.mark.parametrize(
    ("name", "scale"), [(name, scale) for scale in ("small", "full") for name in having(scale)]
)
def test_every_variant_has_a_recipe_of_its_own(name, scale):
    elsewhere = {"alphas_mnist": "mnist", "alphas_cifar10": "cifar10"}
    found = [beyond.find_recipe(name, variant, scale, None) for variant in beyond.VARIANTS[name]]
    assert len(set(found)) == len(found)
    assert all(recipe.rule in beyond.RULES for recipe in found)
    assert {recipe.dataset for recipe in found} == {
        {"small": "digits", "full": elsewhere.get(name, "fashion-mnist")}[scale]
    }
    assert beyond.find_recipe(name, beyond.VARIANTS[name][0], scale, 3).epochs == 3


def test_the_variants_change_what_their_names_say():
    recipe = beyond.find_recipe("evidence", "asked-0.003", "full", None)
    assert (recipe.rule, recipe.evidence, recipe.fraction) == ("ranked", "asked", 0.003)
    free, ranked = (beyond.find_recipe("rates", f"{kind}-0.1", "full", None)
                    for kind in ("free", "ranked"))  # fmt: skip
    assert (free.rule, ranked.rule) == ("second", "ranked")
    assert replace(free, rule="ranked") == ranked
    nearest = beyond.find_recipe("memory", "nearest-3", "full", None)
    assert (nearest.rule, nearest.bits, nearest.stochastic) == ("counter", 3, False)
    exact = beyond.find_recipe("memory", "float", "full", None)
    assert (exact.rule, exact.lr, exact.gamma) == ("latent", nearest.lr, 1.0)


def test_what_falls_is_what_the_variant_names(monkeypatch):
    """Seen in the optimizer after the last step: the fraction and alpha, or one of them, are 0."""
    found, kept = {}, []

    def choose(weights, recipe):
        kept.append(beyond.build_optimizer(weights, recipe))
        return kept[-1]

    monkeypatch.setitem(beyond.fit.keywords, "choose", choose)
    for variant in beyond.VARIANTS["decay"]:
        beyond.decay(variant, epochs=1, device="cpu")
        group = kept[-1].param_groups[0]
        found[variant] = group["lr"] == 0, group["alpha"] == 0
    assert found == {"none": (False, False), "number": (True, False), "alpha": (False, True),
                     "both": (True, True)}  # fmt: skip


def test_only_the_alphas_of_other_data_and_networks_have_no_small_scale():
    only = set(EXPERIMENTS) - set(having("small"))
    assert only == {"alphas_mnist", "alphas_cifar10", "alphas_residual"}
    with pytest.raises(ValueError, match=r"unknown scale 'small'.*known: full"):
        beyond.alphas_residual(scale="small")


def test_the_lengths_differ_in_nothing_but_their_epochs():
    for scale in ("small", "full"):
        short, middle, long = (beyond.find_recipe(f"alphas_{name}", "0.003", scale, None)
                               for name in ("short", "middle", "long"))  # fmt: skip
        assert short.epochs == 1 < middle.epochs < long.epochs
        assert all(replace(each, epochs=middle.epochs) == middle for each in (short, long))
        assert (middle.rule, middle.alpha, middle.decay) == ("second", 0.003, "cosine")


@pytest.mark.parametrize("name", beyond.ELSEWHERE)
def test_the_orders_differ_in_nothing_but_the_second_average(name):
    for alpha in beyond.ALPHAS:
        second, first = (beyond.find_recipe(name, f"{prefix}{alpha:g}", "full", None)
                         for prefix in ("", "first-"))  # fmt: skip
        assert (second.rule, second.alpha) == ("second", alpha)
        assert first == replace(second, rule="first")
    weight = [torch.nn.Parameter(torch.ones(3))]
    rates = [beyond.build_optimizer(weight, each).param_groups[0] for each in (first, second)]
    assert [(group["lr"], group["gamma"]) for group in rates] == [(alpha, 1.0), (alpha, 0.1)]


def test_networks_take_the_images_of_their_data_sets():
    for name, shape in (("perceptron784", (1, 28, 28)), ("perceptron3072", (3, 32, 32)),
                        ("birealnet8", (1, 28, 28))):  # fmt: skip
        assert beyond.NETWORKS[name](None)(torch.rand(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize("name", having("small"))
def test_a_record_is_complete(name):
    default = getattr(beyond, name).__defaults__[0]
    record = once(name, default)
    planned = beyond.RECIPES[name]["small"].epochs
    assert (record.experiment, record.variant) == (f"beyond.{name}", default)
    assert (record.scale, record.shortened) == (
        "small", None if planned == 1 else f"1 of {planned} epochs"
    )  # fmt: skip
    assert set(record.metrics) == METRICS
    assert all(math.isfinite(value) for value in record.metrics.values())
    assert record.recipe["rule"] == beyond.find_recipe(name, default, "small", 1).rule
    with pytest.raises(ValueError, match=f"unknown variant 'x'.*{default}"):
        getattr(beyond, name)("x")


@pytest.mark.parametrize("rule", beyond.RULES)
def test_every_rule_starts_from_the_same_signs_and_moves_them(rule):
    recipe = replace(beyond.SMALL, rule=rule, epochs=1, lr=1.0, fraction=0.05)
    signs = []
    for each in (beyond.SMALL, recipe):
        with seeded(4, torch.device("cpu")):
            model = beyond.build_model(each)
            weights = optim.split_parameters(model)[0]
            beyond.build_optimizer(weights, each)
        signs.append([sign(w).detach() for w in weights])
    assert all(torch.equal(a, b) for a, b in zip(*signs, strict=True))
    fitted = beyond.fit(recipe, seed=4, device="cpu")
    weights = optim.split_parameters(fitted.model)[0]
    assert any((sign(w) != s).any() for w, s in zip(weights, signs[0], strict=True))
    if rule not in beyond.LATENT:
        assert all(set(w.unique().tolist()) == {-1.0, 1.0} for w in weights)
    bound = {"counter": 255.0}.get(rule, 1.0)
    assert all(w.abs().max() <= bound for w in weights)
    assert (rule == "counter") == any((w.abs() > 1).any() for w in weights)


def test_all_kinds_of_evidence_flip_the_given_number():
    """A fraction small enough that each finds as many weights as it may flip."""
    flips = [once("evidence", f"{evidence}-0.003").metrics["flip_ratio"]
             for evidence in optim.RankedFlips.BUFFERS]  # fmt: skip
    expected = 0.003 * np.mean([(1 + math.cos(math.pi * t / 28)) / 2 for t in range(26)])
    assert flips == pytest.approx([expected] * len(flips), rel=0.15)


def test_the_memory_record_has_the_first_gradients_of_each_layer():
    sizes = records.decode_array(once("memory", "float").arrays["gradient"])
    assert sizes.shape == (3,)
    assert (sizes > 0).all()
    again = beyond.memory("float", seed=1, epochs=1, device="cpu")
    assert (records.decode_array(again.arrays["gradient"]) != sizes).any()


@pytest.mark.parametrize("rule", beyond.SPACE)
def test_trials_are_drawn_within_their_ranges_and_anew_for_each_seed(rule):
    drawn = [beyond.draw(rule, trial, seed, beyond.SMALL)
             for trial in range(20) for seed in range(2)]  # fmt: skip
    assert len(set(drawn)) == 40
    assert drawn[0] == beyond.draw(rule, 0, 0, beyond.SMALL)
    for name, (low, high) in beyond.SPACE[rule].items():
        values = [getattr(recipe, name) for recipe in drawn]
        assert low <= min(values) < max(values) <= high
        middle, width = math.log(low * high) / 2, math.log(high / low)
        assert np.log(values).mean() == pytest.approx(middle, abs=0.2 * width)


def test_the_race_retrains_its_best_trial_on_all_images(monkeypatch):
    seen, original = [], beyond.fit

    def look(recipe, **options):
        seen.append((recipe, options))
        fitted = original(recipe, **options)
        fitted.history.rows[-1]["seconds"] = 10.0
        return fitted

    monkeypatch.setattr(beyond, "fit", look)
    record = beyond.race("bop", seed=1, epochs=1, device="cpu")
    assert record.seconds == 10 * (beyond.TRIALS["small"] + 1)
    *trials, (winner, last) = seen
    assert len(trials) == beyond.TRIALS["small"]
    assert all(options["validation"] == 300 for _, options in trials)
    assert "validation" not in last
    errors = records.decode_array(record.arrays["validation_error"])
    assert np.argmin(errors) > 0
    assert winner == trials[int(np.argmin(errors))][0]
    assert record.recipe["threshold"] == winner.threshold
    assert records.decode_array(record.arrays["gamma"]) == pytest.approx(
        [recipe.gamma for recipe, _ in trials], rel=1e-6
    )
    seeds = [options["seed"] for _, options in seen]
    assert len(set(seeds)) == len(seeds)


def test_the_race_resumes_from_its_folder(tmp_path, press_ctrl_c_at):
    straight = once("race", "ranked", 5)
    with pytest.MonkeyPatch.context() as patch:
        press_ctrl_c_at(40, patch)  # in the second trial
        with pytest.raises(KeyboardInterrupt):
            beyond.race("ranked", seed=5, epochs=1, device="cpu", checkpoint=tmp_path / "race")
    again = beyond.race("ranked", seed=5, epochs=1, device="cpu", checkpoint=tmp_path / "race")
    assert again.metrics == straight.metrics
    assert again.arrays == straight.arrays
