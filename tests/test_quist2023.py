"""The gradient-filter experiments: what each variant runs, what a record holds, the explorer."""

import functools
import json
import math
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from browser import Browser, find_chromium
from torch import nn

from bnnbook import data, filters, plots, probes, records, training
from bnnbook.binarize import magnitude_aware_sign, sign
from bnnbook.experiments import quist2023
from bnnbook.layers import binary_layers
from bnnbook.optim import CascadedEMA, split_parameters

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = list(quist2023.VARIANTS)
TINY = replace(quist2023.SMALL, epochs=2, batch_size=100)
FLIPS = {"flip_ratio", "last_flip_ratio"}


@functools.cache
def once(name, variant, seed=0):
    """The record of one epoch; made once for all tests, which must not change it."""
    return getattr(quist2023, name)(variant, seed=seed, epochs=1, device="cpu")


@functools.cache
def fitted(**changes):
    return quist2023.fit(replace(TINY, **changes), device="cpu")


@pytest.fixture
def started(monkeypatch):
    """Replace training by a look at what it was given; returns the list of what was seen."""
    seen = []

    def look(model, dataset, optimizers, **options):
        seen.append({"model": model, "data": dataset, "optimizers": optimizers, **options})
        for probe in options["probes"]:
            probe.start(model)
            probe.step()
        row = {"epoch": 1, "train_loss": 1.0, "test_accuracy": 0.25, "flip_ratio": 0.5,
               "seconds": 2.0}  # fmt: skip
        return training.History([row])

    monkeypatch.setattr(training, "train", look)
    return seen


# --- Names and recipes ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_unknown_variant_or_scale_lists_the_known(name):
    function = getattr(quist2023, name)
    with pytest.raises(ValueError, match=f"unknown variant 'x'.*{quist2023.VARIANTS[name][0]}"):
        function("x")
    with pytest.raises(ValueError, match=r"unknown scale 'huge'.*known: small, full"):
        function(scale="huge")


@pytest.mark.parametrize("scale", ["small", "full"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_variant_has_a_recipe_of_its_own(name, scale):
    found = [quist2023.find_recipe(name, variant, scale, None)
             for variant in quist2023.VARIANTS[name]]  # fmt: skip
    assert len(set(found)) == len(found)
    assert all(recipe.decay in quist2023.DECAYS for recipe in found)
    assert quist2023.find_recipe(name, quist2023.VARIANTS[name][0], scale, 3).epochs == 3


def test_the_default_variants_exist():
    for name in EXPERIMENTS:
        default = getattr(quist2023, name).__defaults__[0]
        assert default in quist2023.VARIANTS[name]


def test_full_scale_is_the_declared_recipe():
    """The numbers of facts that are not the paper's but this book's, except where recalled."""
    full = quist2023.find_recipe("latent_parity", "filter", "full", None)
    assert (full.dataset, full.network, full.epochs, full.batch_size) == (
        "cifar10", "birealnet20", 150, 256,
    )  # fmt: skip
    assert (full.alpha, full.gamma, full.decay) == (1e-3, 0.1, "cosine")
    assert (full.real_lr, full.real_weight_decay, full.augment) == (0.1, 1e-4, True)
    weights, _ = split_parameters(quist2023.build_model(full))
    assert sum(weight.numel() for weight in weights) == 267_264
    alphas = {quist2023.find_recipe("alpha_sweep", v, "full", None).alpha
              for v in quist2023.VARIANTS["alpha_sweep"]}  # fmt: skip
    assert alphas == {1e-1, 1e-2, 1e-3, 1e-4, 1e-5}


def test_the_orders_match_in_what_their_names_say():
    def rates(variant):
        recipe = quist2023.find_recipe("order", f"{variant}-none", "full", None)
        return recipe.alpha, recipe.gamma

    second, noise, flips = map(rates, ("second", "first-same-noise", "first-same-flips"))
    assert second == (1e-3, 0.1)
    assert noise[1] == flips[1] == 1
    assert filters.noise_gain(noise) == pytest.approx(filters.noise_gain(second), rel=1e-9)
    assert filters.flip_rate(flips) == pytest.approx(filters.flip_rate(second), rel=1e-9)


def test_orders_of_another_alpha_match_too(started):
    quist2023.order("first-same-noise-none", alpha=0.2, device="cpu")
    group = started[0]["optimizers"][0].param_groups[0]
    assert group["gamma"] == 1
    assert group["lr"] == pytest.approx(filters.same_noise_alpha((0.2, 0.1)))


def test_the_grid_clips_and_scales_as_its_names_say():
    for variant in quist2023.VARIANTS["scale_invariance"]:
        recipe = quist2023.find_recipe("scale_invariance", variant, "small", None)
        assert (recipe.clip == 1) == variant.startswith("clipped")
        assert (recipe.quantizer == "scaled") == ("scaled" in variant)
        assert variant.endswith(f"-lr{recipe.latent_lr:g}-start{recipe.start:g}")
        assert recipe.optimizer == "latent"
        assert recipe.alpha == quist2023.SMALL.alpha


@pytest.mark.parametrize("name", [name for name in quist2023.DECAYS if name != "restarts"])
def test_a_decay_starts_at_one_and_never_rises(name):
    factor = quist2023.DECAYS[name]
    values = [factor(u) for u in np.linspace(0, 1, 101)]
    assert values[0] == 1
    assert all(b <= a for a, b in pairwise(values))
    middle_and_end = {
        "none": (1, 1),
        "linear": (0.5, 0),
        "cosine": (0.5, 0),
        "step": (0.1, 0.01),
        "exponential": (1e-3**0.5, 1e-3),
        "slow-exponential": (0.1**0.5, 0.1),
        "early-cosine": (1e-6, 1e-6),
        "stopped-exponential": (0.1**0.5, 0),
    }
    assert (factor(0.5), values[-1]) == pytest.approx(middle_and_end[name], abs=1e-12)


def test_an_early_cosine_freezes_like_the_exponential_and_a_slow_exponential_like_linear():
    steps = 10 * (50_000 // quist2023.FULL.batch_size)
    alpha = quist2023.RECIPES["alpha_decay"]["full"].alpha

    def freeze_point(name):
        factor = quist2023.DECAYS[name]
        return filters.freeze_point([alpha * factor(i / steps) for i in range(steps)]) / steps

    for name, other in (("early-cosine", "exponential"), ("slow-exponential", "linear")):
        assert freeze_point(name) == pytest.approx(freeze_point(other), abs=0.025)


def test_an_early_cosine_is_a_cosine_in_less_time():
    early, cosine = quist2023.DECAYS["early-cosine"], quist2023.DECAYS["cosine"]
    assert [early(0.36 * u) for u in (0.25, 0.5, 0.75)] == pytest.approx(
        [cosine(u) for u in (0.25, 0.5, 0.75)]
    )


def test_a_stopped_exponential_is_a_slow_one_until_its_last_tenth():
    stopped, slow = (quist2023.DECAYS[f"{name}-exponential"] for name in ("stopped", "slow"))
    assert all(stopped(u) == slow(u) for u in np.linspace(0, 0.89, 90))
    assert stopped(0.95) == pytest.approx(slow(0.95) / 2)


def test_restarts_are_four_cosines_in_a_row():
    cosine, factor = quist2023.DECAYS["cosine"], quist2023.DECAYS["restarts"]
    for start in (0, 0.25, 0.5, 0.75):
        assert factor(start) == 1
        assert factor(start + 0.125) == 0.5
        assert factor(start + 0.249) == pytest.approx(cosine(0.996))
    assert factor(1) == 0


# --- Networks, starts, optimizers ----------------------------------------------------------------


def test_the_small_network_is_binary_but_for_batch_norm():
    model = quist2023.perceptron(None)
    weights, real = split_parameters(model)
    assert [tuple(w.shape) for w in weights] == [(128, 64), (128, 128), (10, 128)]
    assert sum(p.numel() for p in real) == 2 * (128 + 128 + 10)
    layers = list(binary_layers(model))
    assert [layer.input_quantizer is None for layer in layers] == [True, False, False]


def test_the_same_seed_gives_the_same_signs_in_every_form():
    def signs(**changes):
        torch.manual_seed(3)
        model = quist2023.build_model(replace(TINY, **changes))
        return model, [sign(layer.weight.detach()) for layer in binary_layers(model)]

    _, binary = signs()
    zero, from_zero = signs(optimizer="latent")
    one, from_one = signs(optimizer="latent", start=1.0)
    small, _ = signs(optimizer="torch", start=0.25)
    assert all(map(torch.equal, binary, from_zero))
    assert all(map(torch.equal, binary, from_one))
    assert {w.abs().item() for w in next(binary_layers(zero)).weight[0]} == {quist2023.TINY}
    weight = next(binary_layers(one)).weight
    assert 0.95 < weight.abs().max() <= 1
    assert torch.equal(next(binary_layers(small)).weight, 0.25 * weight)


@pytest.mark.parametrize("kind", ["filter", "latent", "torch"])
def test_all_optimizers_are_the_same_filter(kind):
    """From gradients to signs: the filter's own, for weights that started at zero."""
    recipe = replace(TINY, optimizer=kind, alpha=0.02, gamma=0.25, latent_lr=0.5)
    gradients = np.random.default_rng(0).normal(size=(300, 40))
    start = torch.ones(40) if kind == "filter" else torch.full((40,), quist2023.TINY)
    weight = nn.Parameter(start.double())
    optimizer = quist2023.binary_optimizer([weight], recipe)
    g = filters.filter_gradients((0.02, 0.25), gradients)
    for gradient, expected in zip(gradients, g, strict=True):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        assert torch.equal(torch.sign(weight.detach()), torch.tensor(-np.sign(expected)))


def test_an_unknown_optimizer_lists_the_known():
    with pytest.raises(ValueError, match="unknown optimizer 'lion'; known: filter, latent, torch"):
        quist2023.binary_optimizer([], replace(TINY, optimizer="lion"))


def test_the_clip_bound_reaches_the_optimizer():
    weight = nn.Parameter(torch.zeros(2))
    recipe = replace(TINY, optimizer="latent", clip=0.5)
    assert quist2023.binary_optimizer([weight], recipe).param_groups[0]["clip"] == 0.5


def test_batch_norm_has_no_weight_decay():
    recipe = replace(quist2023.FULL, real_weight_decay=0.125)
    model = quist2023.build_model(recipe)
    decay = {id(p): group["weight_decay"]
             for group in quist2023.real_optimizer(model, recipe).param_groups
             for p in group["params"]}  # fmt: skip
    norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    convolutions = [m.weight for m in model.modules() if type(m) is nn.Conv2d]
    assert {decay[id(p)] for p in norms} == {0}
    assert {decay[id(p)] for p in convolutions} == {0.125}
    assert len(decay) == len(split_parameters(model)[1])


def test_forward_scaling_leaves_the_gradient_alone():
    w = torch.randn(3, 5, requires_grad=True)
    quantized = quist2023.forward_scaled_sign(w)
    quantized.backward(torch.arange(15.0).reshape(3, 5))
    assert torch.equal(quantized, magnitude_aware_sign(w, None))
    assert torch.equal(w.grad, torch.arange(15.0).reshape(3, 5))


def test_forward_scaling_may_stop_the_gradient_beyond_a_bound():
    w = torch.tensor([[0.5, -2.0, 1.0]], requires_grad=True)
    quantized = quist2023.forward_scaled_sign(w, clip_value=1.0)
    quantized.sum().backward()
    assert torch.equal(quantized, magnitude_aware_sign(w, None))
    assert w.grad.tolist() == [[1.0, 0.0, 1.0]]


def test_alpha_decays_in_every_step(started):
    recipe = replace(TINY, decay="linear", alpha=0.5)
    quist2023.fit(recipe, device="cpu")
    (run,) = started
    binary, real = run["optimizers"]
    assert isinstance(binary, CascadedEMA)
    alphas, rates = [], []
    for _ in range(26):
        alphas.append(binary.param_groups[0]["lr"])
        rates.append(real.param_groups[0]["lr"])
        binary.step()
        real.step()
    assert alphas == pytest.approx([0.5 * (1 - i / 26) for i in range(26)])
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * i / 26)) for i in range(26)])
    assert binary.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    assert [type(s) for s in run["schedulers"]] == [quist2023.EachStep] * 2


@pytest.mark.parametrize(("augmented", "name"), [(False, None), (True, "augment")])
def test_augmentation_is_the_recipes(started, augmented, name):
    quist2023.fit(replace(TINY, augment=augmented), device="cpu")
    assert getattr(started[0]["augment"], "__name__", None) == name


def test_the_seed_fixes_the_start_and_nothing_else(started):
    state = torch.get_rng_state()
    for seed in (1, 1, 2):
        quist2023.fit(TINY, seed=seed, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = (next(binary_layers(run["model"])).weight for run in started)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert [run["seed"] for run in started] == [1, 1, 2]


# --- What the theory promises of real runs -------------------------------------------------------


def test_latent_weights_and_filter_agree_bit_for_bit_when_alpha_is_a_power_of_two():
    runs = [fitted(alpha=2**-7, optimizer=kind) for kind in ("filter", "latent")]
    assert torch.equal(*(run.flips.history() for run in runs))
    for ours, theirs in zip(*(binary_layers(run.model) for run in runs), strict=True):
        assert torch.equal(ours.weight, sign(theirs.weight))


def test_learning_rate_and_start_scale_together_at_fixed_alpha_only():
    latent = {"optimizer": "latent", "start": 1.0, "latent_lr": 4.0}
    scaled = {"optimizer": "latent", "start": 2**-6, "latent_lr": 2**-4}
    reference = fitted(**latent).flips.history()
    assert torch.equal(reference, fitted(**scaled).flips.history())
    assert not torch.equal(reference, fitted(**scaled, alpha=TINY.alpha / 64).flips.history())
    clipped = fitted(**latent, clip=0.02).flips.history()
    assert not torch.equal(clipped, reference)
    assert torch.equal(clipped, fitted(**scaled, clip=0.02 / 64).flips.history())
    assert not torch.equal(clipped, fitted(**scaled, clip=0.02).flips.history())


def test_the_first_step_flips_half_of_the_weights():
    flips = fitted().flips.history()
    assert flips[0] == pytest.approx(0.5, abs=0.02)
    assert flips[1:].max() < 0.3


def test_a_second_average_flips_less():
    """The noise law says 0.21 at these rates; in training it is less pronounced."""
    second, first = fitted(alpha=0.1), fitted(alpha=0.1, gamma=1.0)
    ratio = second.flips.history()[10:].mean() / first.flips.history()[10:].mean()
    assert ratio < 0.4


def test_renewed_statistics_leave_the_network_as_it_was():
    run = fitted()
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    assert 0 < run.renewed_error() < 0.9
    assert all(torch.equal(value, before[k]) for k, value in run.model.state_dict().items())


def test_the_full_recipe_runs_on_small_images(toy_images, monkeypatch):
    """CIFAR-10's shapes but for the size: all of the full recipe, in two steps."""
    toy_images(8)
    toy = replace(quist2023.FULL, dataset="toy", batch_size=16, epochs=1)
    for name, variant in (("order", "second-cosine"), ("scale_invariance", "scaled-lr1-start1")):
        monkeypatch.setitem(quist2023.RECIPES, name, {"full": toy})
        record = getattr(quist2023, name)(variant, scale="full", device="cpu")
        assert record.recipe["network"] == "birealnet20"
        layers = [column for column in record.history[0] if column.startswith("flip_ratio/")]
        assert len(layers) == 18
        assert records.decode_array(record.arrays["start_flips"]).shape == (2,)
        assert all(math.isfinite(value) for value in record.metrics.values())


# --- Records -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_record_is_complete_and_read_back(name, tmp_path):
    variant = quist2023.VARIANTS[name][-1]
    record = once(name, variant)
    recipe = quist2023.find_recipe(name, variant, "small", 1)
    assert (record.experiment, record.variant, record.seed) == (f"quist2023.{name}", variant, 0)
    assert (record.scale, record.shortened) == ("small", f"1 of {quist2023.SMALL.epochs} epochs")
    assert record.dataset_sha256 == data.load("digits").sha256
    assert record.recipe == asdict(recipe) | {"precision": "float32"}
    assert set(record.metrics) >= {"test_error", "renewed_test_error", "train_loss"} | FLIPS
    assert all(math.isfinite(value) for value in record.metrics.values())
    assert record.metrics["test_error"] == 1 - record.history[-1]["test_accuracy"]
    assert records.decode_array(record.arrays["start_flips"]).shape == (26,)
    back = records.read(records.save(record, tmp_path))
    assert (back.metrics, back.recipe, back.arrays) == (
        record.metrics, record.recipe, record.arrays,
    )  # fmt: skip


def test_a_whole_run_is_not_shortened_and_the_seed_fixes_it(monkeypatch):
    monkeypatch.setitem(quist2023.RECIPES, "alpha_sweep", {"small": TINY})
    first, again, other = (quist2023.alpha_sweep(seed=seed, device="cpu") for seed in (0, 0, 1))
    assert first.shortened is None
    assert (first.metrics, first.arrays) == (again.metrics, again.arrays)
    assert first.metrics != other.metrics
    assert first.metrics["flip_ratio"] == first.history[1]["flip_ratio"]


def test_flips_of_layers_are_pooled_by_their_sizes():
    run = fitted()
    pooled = run.flips.history()
    by_layer = probes.FlipRatio(per_layer=True, per_step=True)
    by_layer.start(run.model)
    by_layer.recorded = torch.tensor([[1, 2, 3], [0, 0, 1280]], dtype=torch.int32)
    by_layer.length = 2
    record = quist2023.make_record(
        "order", "second-none", 0, "small", replace(run, flips=by_layer)
    )
    total = 128 * 64 + 128 * 128 + 1280
    expected = [6 / total, 1280 / total]
    assert records.decode_array(record.arrays["start_flips"]) == pytest.approx(expected, rel=1e-6)
    assert pooled.shape == (26,)


@pytest.mark.parametrize("decay", sorted(quist2023.DECAYS))
def test_the_noise_of_a_run_follows_its_schedule_step_by_step(decay):
    recipe = {"alpha": 0.2, "gamma": 0.5, "decay": decay, "epochs": 3}
    found = quist2023.noise_flips(recipe, 20)
    alphas = 0.2 * np.array([quist2023.DECAYS[decay](i / 60) for i in range(60)])
    rng, flips = np.random.default_rng(0), np.zeros(60)
    m = g = np.zeros(20_000)
    for i, alpha in enumerate(alphas):  # the filter itself, on noise
        m = 0.5 * m + 0.5 * rng.normal(size=m.shape)
        before, g = g, (1 - alpha) * g + alpha * m
        flips[i] = np.mean(np.sign(before) != np.sign(g)) if i else 0.5
    assert found == pytest.approx(flips.reshape(3, 20).mean(1), abs=0.003)
    assert found[0] > found[2] or decay == "none"


def test_an_interrupted_run_ends_in_the_same_record(tmp_path, monkeypatch, press_ctrl_c_at):
    monkeypatch.setitem(quist2023.RECIPES, "alpha_decay", {"small": TINY})
    straight = quist2023.alpha_decay(device="cpu")
    path = tmp_path / "run.pt"
    with monkeypatch.context() as patch:
        press_ctrl_c_at(17, patch)
        with pytest.raises(KeyboardInterrupt):
            quist2023.alpha_decay(device="cpu", checkpoint=path)
    resumed = quist2023.alpha_decay(device="cpu", checkpoint=path)
    assert (resumed.metrics, resumed.arrays) == (straight.metrics, straight.arrays)


def test_spectra_are_of_three_phases(monkeypatch):
    record = once("spectra", "second")
    phases = ("start", "middle", "end")
    names = {f"{name}, {phase}" for name in ("snr", "autocorrelation") for phase in phases}
    assert names <= set(record.metrics)
    for phase in phases:
        power = records.decode_array(record.arrays[f"power, {phase}"])
        assert len(power) == 5  # segments of 8 steps, a third of the epoch
        assert np.isfinite(power).all()


def test_gradient_statistics_of_known_noise():
    rng = np.random.default_rng(0)
    white = rng.normal(size=(4000, 60))
    numbers, power = quist2023.gradient_statistics(white + 0.1)
    assert numbers["snr"] == pytest.approx(0.1, abs=0.01)
    assert numbers["autocorrelation"] == pytest.approx(0, abs=0.01)
    assert power.dtype == np.float32
    assert power[1:].mean() == pytest.approx(1, abs=0.05)
    smooth, _ = quist2023.gradient_statistics(filters.filter_gradients(0.5, white))
    assert smooth["autocorrelation"] == pytest.approx(0.5, abs=0.05)


# --- Figures and the explorer --------------------------------------------------------------------


def test_the_z_plane_holds_every_pole_and_zero():
    fig, ax = plt.subplots()
    plots.z_plane(*filters.ema_cascade(0.1, 0.4), ax)
    drawn = {line.get_marker(): line.get_xydata() for line in ax.lines}
    assert sorted(drawn["x"][:, 0]) == pytest.approx([0.6, 0.9])
    assert drawn["o"].tolist() == [[0, 0]]
    assert [text.get_text() for text in ax.texts] == ["2"]
    plt.close(fig)
    fig, ax = plt.subplots()
    plots.z_plane(*filters.sgd_filter(1.0, 0.9, 0.01), ax)
    (poles,) = (line.get_xydata() for line in ax.lines if line.get_marker() == "x")
    assert sorted(poles[:, 1]) == pytest.approx([-0.083516, 0.083516], abs=1e-6)
    plt.close(fig)


@pytest.fixture(scope="module")
def explorer(tmp_path_factory):
    """The explorer in a page of its own, in a headless Chromium."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium here: install chromium or google-chrome to test the explorer")
    folder = tmp_path_factory.mktemp("explorer")
    assets = ROOT / "book" / "assets"
    scripts = [assets / "vega" / "vega.min.js", assets / "filter-explorer.js"]
    tags = "".join(f"<script src='{path.as_uri()}'></script>" for path in scripts)
    page = folder / "page.html"
    page.write_text(
        "<!doctype html><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<body style='margin: 0'><div id='filter-explorer'>static</div>{tags}</body>",
        encoding="utf-8",
    )
    with Browser(program, folder / "profile") as browser:
        opened = browser.open(page.as_uri(), width=390, height=900)
        yield opened


def move(page, alpha, gamma):
    """Set both sliders as a reader would; return the rates that the explorer then has."""
    for name, rate in (("alpha", alpha), ("gamma", gamma)):
        page.evaluate(
            f"(e => {{ e.value = {math.log10(rate)}; e.dispatchEvent(new Event('input')); }})"
            f"(document.getElementById('filter-explorer-{name}'))"
        )
    view = "document.getElementById('filter-explorer').view"
    read = f"[{view}.signal('alpha'), {view}.signal('gamma')]"
    return page.evaluate(read)


def series(page, data):
    view = "document.getElementById('filter-explorer').view"
    return json.loads(page.evaluate(f"JSON.stringify({view}.data('{data}'))"))


# alpha < gamma, both equal, momentum off, both at an end of their range
@pytest.mark.parametrize("rates", [(1e-3, 0.1), (0.1, 0.1), (0.01, 1.0), (1.0, 1.0), (1e-5, 1e-3)])
def test_the_explorer_computes_what_the_library_does(explorer, rates):
    alpha, gamma = move(explorer, *rates)
    assert (alpha, gamma) == pytest.approx(rates, rel=1e-9)
    impulse = series(explorer, "impulse")
    ages = [row["k"] for row in impulse]
    assert ages[0] == 0
    assert ages[-1] == 99_999
    gain = series(explorer, "gain")
    omega = [row["omega"] for row in gain]
    assert omega[-1] == pytest.approx(math.pi)
    law = series(explorer, "law")
    (here,) = series(explorer, "here")
    for name, rest in (("first", ()), ("second", (gamma,))):
        h = filters.impulse_response((alpha, *rest), 100_000)[ages]
        assert [row[name] for row in impulse] == pytest.approx(h.tolist(), rel=1e-6, abs=1e-300)
        decibels = 20 * np.log10(np.abs(filters.frequency_response((alpha, *rest), omega)))
        assert [row[name] for row in gain] == pytest.approx(decibels.tolist(), abs=1e-6)
        flips = [filters.flip_rate((min(1.0, row["a"]), *rest)) for row in law]
        assert [row[name] for row in law] == pytest.approx(flips, rel=1e-6)
        assert here[name] == pytest.approx(filters.flip_rate((alpha, *rest)), rel=1e-6)
    view = "document.getElementById('filter-explorer').view"
    numbers = explorer.evaluate(f"['delay', 'noiseSecond'].map(name => {view}.signal(name))")
    expected = [filters.delay((alpha, gamma)), filters.noise_gain((alpha, gamma))]
    assert numbers == pytest.approx(expected, rel=1e-6)


def test_the_explorer_stays_in_a_phone_and_says_what_it_shows(explorer):
    move(explorer, 1e-3, 0.1)
    assert explorer.errors == []
    assert [url for url in explorer.requests if not url.startswith("file:")] == []
    assert explorer.evaluate("document.documentElement.scrollWidth") <= 390
    text = explorer.evaluate("document.getElementById('filter-explorer').innerText")
    assert "mean delay 1008 steps" in text
    assert "one flip every 306 steps" in text
    labels = explorer.evaluate("[...document.querySelectorAll('input')].map(e => e.ariaLabel)")
    assert len(labels) == 2
    assert all(labels)
    assert "static" not in text
