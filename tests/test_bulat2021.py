"""The expert-network experiments: recipes, stages, what a record holds, the gate's gradients."""

import functools
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnnbook import data, records, training
from bnnbook.binarize import real_weight, sign, ste_sign
from bnnbook.experiments import bulat2021
from bnnbook.layers import ExpertBinaryConv2d, binary_layers
from bnnbook.models import expertnet, parse_architecture
from bnnbook.models.expert import GATES, SigmoidGateConv2d

EXPERIMENTS = list(bulat2021.VARIANTS)
TINY = replace(bulat2021.SMALL, epochs=3, batch_size=100)


@functools.cache
def once(name, variant):
    """The record of one epoch; made once for all tests, which must not change it."""
    return getattr(bulat2021, name)(variant, epochs=1, device="cpu")


@functools.cache
def fitted(**changes):
    return bulat2021.fit(replace(TINY, **changes), device="cpu")


@pytest.fixture
def started(monkeypatch):
    """Replace training by a look at what it was given; returns the list of what was seen."""
    seen = []

    def look(model, dataset, optimizer, **options):
        weights = [layer.weight.detach().clone() for layer in binary_layers(model)]
        quantizers = {layer.weight_quantizer for layer in binary_layers(model)}
        seen.append({"model": model, "optimizer": optimizer, "weights": weights,
                     "quantizers": quantizers, **options})  # fmt: skip
        row = {"train_loss": 1.0, "test_accuracy": 0.25, "seconds": 2.0}
        return training.History([row] * options["epochs"])

    monkeypatch.setattr(training, "train", look)
    return seen


# --- Names and recipes ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_unknown_variant_or_scale_lists_the_known(name):
    function = getattr(bulat2021, name)
    with pytest.raises(ValueError, match=f"unknown variant 'x'.*{bulat2021.VARIANTS[name][0]}"):
        function("x")
    with pytest.raises(ValueError, match=r"unknown scale 'huge'.*known: small, full"):
        function(scale="huge")
    assert function.__defaults__ is None or function.__defaults__[0] in bulat2021.VARIANTS[name]


@pytest.mark.parametrize("scale", ["small", "full"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_variant_has_a_recipe_of_its_own(name, scale):
    found = [bulat2021.find_recipe(name, variant, scale, None)
             for variant in bulat2021.VARIANTS[name]]  # fmt: skip
    assert len(set(found)) == len(found)
    assert bulat2021.find_recipe(name, bulat2021.VARIANTS[name][0], scale, 4).epochs == 4


def test_the_full_recipe_holds_the_papers_numbers():
    full = bulat2021.find_recipe("experts", "four", "full", None)
    assert (full.lr, full.weight_decay, full.mixup, full.temperature) == (1e-3, 1e-5, 0.2, 1)
    assert (full.experts, full.gate, full.start) == (4, "softmax", "replicated")
    factor = bulat2021.rate_factor(full, 75)  # of the paper's length
    rates = [factor(epoch) for epoch in range(75)]
    for fall in (40, 55, 65):
        assert rates[fall] == pytest.approx(rates[fall - 1] / 10)
    assert rates[:11] == pytest.approx([(epoch + 1) / 11 for epoch in range(11)])
    assert rates[74] == pytest.approx(1e-3)
    assert bulat2021.stage_epochs(full.epochs) == [45, 45, 45]
    hundred = bulat2021.find_recipe("experts_cifar100", "four", "full", None)
    assert hundred == replace(full, dataset="cifar100")


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 12, 100])
def test_stages_share_the_epochs(epochs):
    stages = bulat2021.stage_epochs(epochs)
    assert sum(stages) == epochs
    assert stages[2] >= 1
    assert max(stages) - min(stages) <= 1


def test_the_full_network_has_twenty_layers_with_a_shortcut_around_each_binary_one():
    recipe = bulat2021.FULL
    images = torch.zeros(100, 3, 32, 32, dtype=torch.uint8)
    labels = torch.arange(100)
    toy = data.Dataset(images, labels, images, labels, [str(n) for n in range(100)], "toy")
    with torch.device("meta"):
        network = bulat2021.build_network(recipe, toy, recipe.experts)
    convs = list(binary_layers(network))
    assert len(convs) + 2 == 20
    assert {type(conv) for conv in convs} == {ExpertBinaryConv2d}
    assert [conv.out_channels for conv in convs] == [16] * 6 + [32] * 6 + [64] * 6
    assert network.output[-1].out_features == 100


def test_the_widths_cost_what_their_names_say():
    """All convolutions but the very first, whose input is as narrow as the stem."""
    bops, digits = {}, data.load("digits")
    for variant in bulat2021.VARIANTS["width"]:
        recipe = bulat2021.find_recipe("width", variant, "full", None)
        with torch.device("meta"):
            network = bulat2021.build_network(recipe, digits, 1)
        bulat2021.binarize_weights(network)
        table = bulat2021.summary(network, (1, 32, 32))
        bops[variant] = table[[name.endswith(".conv") for name in table.index]].bops
    narrow, grouped = bops["narrow"], bops["wide-grouped"]
    assert (narrow[1:] == grouped[1:]).all()
    assert grouped["stage1.0.conv"] == narrow["stage1.0.conv"] / 2
    assert (bops["wide"][1:] == 4 * narrow[1:]).all()
    assert bops["wide-grouped-1x1"].sum() > grouped.sum()


def test_what_the_paper_prints_is_complete():
    assert len(bulat2021.PAPER["design"]) == len(bulat2021.PAPER["capacity"]) == 7
    for name, (binary, real, _) in bulat2021.PAPER["design"].items():
        assert parse_architecture(name)["expansion"] == 2
        assert all(stage2 < stage1 for stage2, stage1 in zip(binary, real, strict=True))


# --- The gate's gradients ------------------------------------------------------------------------


def gate_gradient(kind, experts, z, upstream):
    """The gradient that a gate of this kind gives the scores z, by way of the whole layer."""
    layer = GATES[kind](1, 1, 1, experts=len(experts), weight_quantizer=real_weight,
                        input_quantizer=real_weight).double()  # fmt: skip
    layer.weight.data = experts.reshape(layer.weight.shape).clone()
    layer.gate.weight.data.zero_()
    layer.gate.bias.data = z.clone()
    y = layer(torch.ones(1, 1, 1, 1, dtype=torch.double))
    y.backward(upstream.reshape(1, 1, 1, 1))
    return y.item(), layer.gate.bias.grad, layer.weight.grad.flatten()


@pytest.mark.parametrize("kind", list(GATES))
def test_the_gate_learns_from_all_experts_and_the_winner_alone_learns(kind):
    z, w = torch.randn(2, 5, dtype=torch.double)
    y, dz, dw = gate_gradient(kind, w, z, torch.tensor(3.0, dtype=torch.double))
    winner = z.argmax()
    g = 3 * w
    s = z.softmax(0)
    slopes = z.sigmoid() * (1 - z.sigmoid())
    jacobian = {"softmax": torch.diag(s) - torch.outer(s, s), "sigmoid": torch.diag(slopes)}[kind]
    assert y == pytest.approx(w[winner].item())
    torch.testing.assert_close(dz, jacobian @ g, rtol=1e-12, atol=1e-12)
    assert dw.tolist() == [3.0 if k == winner else 0.0 for k in range(5)]


def test_equal_experts_silence_the_softmax_gate_and_not_the_sigmoid_gate():
    z = torch.randn(4, dtype=torch.double)
    equal, upstream = torch.full((4,), 0.7, dtype=torch.double), torch.tensor(3.0).double()
    assert not gate_gradient("softmax", equal, z, upstream)[1].any()
    pushed = gate_gradient("sigmoid", equal, z, upstream)[1]
    assert (pushed > 0).all()  # all in the same direction


def test_the_one_hot_reading_of_equation_4_has_no_gradient():
    s = F.one_hot(torch.tensor(2), 5).double()
    assert not (torch.diag(s) - torch.outer(s, s)).any()


def test_both_gates_compute_the_same():
    soft, logistic = (GATES[kind](4, 6, 3, experts=3, padding=1, groups=2, bias=True)
                      for kind in ("softmax", "sigmoid"))  # fmt: skip
    logistic.load_state_dict(soft.state_dict())
    x = torch.randn(5, 4, 6, 6)
    assert torch.equal(soft(x), logistic(x))


def test_a_network_takes_the_gate_by_name():
    network = expertnet(width=4, blocks=(1,), groups=(1,), gate="sigmoid")
    assert {type(layer) for layer in binary_layers(network)} == {SigmoidGateConv2d}
    with pytest.raises(ValueError, match="unknown gate 'hard'; known: softmax, sigmoid"):
        expertnet(gate="hard")


# --- The stages ----------------------------------------------------------------------------------


def test_the_stages_train_what_the_paper_says(started):
    bulat2021.fit(replace(TINY, weight_decay=0.125), seed=2, device="cpu")
    one, first, second = started
    assert [type(run["optimizer"]) for run in started] == [torch.optim.Adam] * 3
    assert {layer.weight.dim() for layer in binary_layers(one["model"])} == {4}
    assert all((w == w[:1]).all() for w in first["weights"])
    assert all(torch.equal(a, b[1])
               for a, b in zip(one["weights"], first["weights"], strict=True))  # fmt: skip
    assert first["model"] is second["model"]
    assert [run["quantizers"] for run in started] == [{real_weight}, {real_weight}, {ste_sign}]
    decays = [run["optimizer"].param_groups[0]["weight_decay"] for run in started]
    assert decays == [0.125, 0.125, 0]
    assert [run["seed"] for run in started] == [6, 7, 8]


def test_random_experts_are_there_from_the_start_and_differ(started):
    bulat2021.fit(replace(TINY, start="random"), device="cpu")
    assert len({id(run["model"]) for run in started}) == 1
    assert all((w[0] != w[1]).any() for w in started[0]["weights"])


def test_all_numbers_of_experts_start_from_the_same_network(started):
    for experts in (1, 2):
        bulat2021.fit(replace(TINY, experts=experts), device="cpu")
    for ours, theirs in zip(started[0]["weights"], started[3]["weights"], strict=True):
        assert torch.equal(ours, theirs)


def test_scales_take_over_the_size_of_the_weights():
    recipe = replace(TINY, groups=(1, 2))
    for experts in (1, 3):
        model = bulat2021.build_network(recipe, data.load("digits"), experts)
        before = [(unit.scale.scale.clone(), unit.conv.weight.clone()) for unit in model.stage2]
        bulat2021.binarize_weights(model)
        for unit, (scale, weight) in zip(model.stage2, before, strict=True):
            channels = weight.reshape(experts, unit.conv.out_channels, -1)
            expected = scale * channels.abs().mean((0, 2))
            torch.testing.assert_close(unit.scale.scale, expected)
            assert (unit.conv.binary_weight() == sign(weight)).all()


def test_mixup_mixes_images_and_losses_in_the_same_shares():
    torch.manual_seed(0)
    images = torch.arange(6.0).reshape(6, 1, 1, 1).expand(-1, 1, 2, 2)
    targets, outputs = torch.arange(6) % 3, torch.randn(6, 3)
    mixup = bulat2021.Mixup(0.2)
    mixed = mixup.augment(images)
    share, order = mixup.share, mixup.order
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * images[order])
    both = share * F.one_hot(targets, 3) + (1 - share) * F.one_hot(targets[order], 3)
    expected = -(both * outputs.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(mixup.loss(outputs, targets), expected)


def test_without_mixup_nothing_is_mixed(started):
    mixup = bulat2021.Mixup(0.0)
    images = torch.randint(0, 256, (4, 1, 2, 2), dtype=torch.uint8)
    assert torch.equal(mixup.augment(images), images)
    outputs, targets = torch.randn(4, 3), torch.arange(4) % 3
    torch.testing.assert_close(mixup.loss(outputs, targets), F.cross_entropy(outputs, targets))
    bulat2021.fit(TINY, device="cpu")
    bulat2021.fit(replace(TINY, augment=True), device="cpu")
    bulat2021.fit(replace(TINY, augment=True, mixup=0.5), device="cpu")
    names = [getattr(run["augment"], "__name__", None) for run in started[::3]]
    assert names == [None, "augment", "augment"]
    assert started[6]["augment"].__self__.before is not None


# --- Which expert fires --------------------------------------------------------------------------


def test_firing_counts_the_choices_by_class():
    run = fitted()
    fires = bulat2021.firing(run.model, run.dataset, run.preprocess)
    layers = [m for m in run.model.modules() if isinstance(m, ExpertBinaryConv2d)]
    assert fires.shape == (len(layers), 2, 10)
    torch.testing.assert_close(fires.sum(1), torch.ones(len(layers), 10, dtype=torch.double))
    # the first convolution's choice, followed by hand
    run.model.eval()
    with torch.no_grad():
        x = run.model.stem(run.preprocess(run.dataset.test_images))
        chosen = layers[0].selected(run.model.stage1[0].norm(x))
    for digit in range(10):
        share = (chosen[run.dataset.test_labels == digit] == 1).double().mean()
        assert fires[0, 1, digit] == pytest.approx(share.item())
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_the_effective_number_of_experts():
    fires = torch.zeros(3, 4, 10, dtype=torch.double)
    fires[0, 0] = 1
    fires[1] = 0.25
    fires[2, :2] = 0.5
    assert bulat2021.experts_used(fires) == pytest.approx([1, 4, 2])


# --- Records -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_record_is_complete_and_read_back(name, tmp_path):
    variant = bulat2021.VARIANTS[name][-1]
    record = once(name, variant)
    recipe = bulat2021.find_recipe(name, variant, "small", 1)
    assert (record.experiment, record.variant, record.seed) == (f"bulat2021.{name}", variant, 0)
    assert record.shortened == f"1 of {bulat2021.SMALL.epochs} epochs"
    assert record.recipe == asdict(recipe) | {"precision": "float32"}
    assert all(math.isfinite(value) for value in record.metrics.values())
    assert record.metrics["test_error"] == 1 - record.history[-1]["test_accuracy"]
    assert record.metrics["bops"] > record.metrics["macs"]
    assert [row["stage"] for row in record.history] == [2]
    if recipe.experts > 1:
        fires = records.decode_array(record.arrays["fires"])
        assert fires.shape == (4, recipe.experts, 10)
        assert np.abs(fires.astype(int).sum(1) - 255).max() <= recipe.experts / 2
        assert 1 <= record.metrics["experts_used"] <= recipe.experts
    back = records.read(records.save(record, tmp_path))
    assert (back.metrics, back.arrays) == (record.metrics, record.arrays)
    assert back.recipe == json.loads(json.dumps(record.recipe))  # tuples are lists there


def test_the_seed_fixes_a_run_and_an_interrupted_one_ends_the_same(
    tmp_path, monkeypatch, press_ctrl_c_at
):
    monkeypatch.setitem(bulat2021.RECIPES, "gate", {"small": TINY})
    straight = bulat2021.gate("softmax", device="cpu")
    assert straight.shortened is None
    assert [(row["epoch"], row["stage"]) for row in straight.history] == [(1, 0), (2, 1), (3, 2)]
    folder = tmp_path / "run.pt"
    with monkeypatch.context() as patch:
        press_ctrl_c_at(20, patch)
        with pytest.raises(KeyboardInterrupt):
            bulat2021.gate("softmax", device="cpu", checkpoint=folder)
    assert sorted(path.name for path in folder.iterdir()) == ["stage0.pt", "stage1.pt"]
    resumed = bulat2021.gate("softmax", device="cpu", checkpoint=folder)
    assert (resumed.metrics, resumed.arrays) == (straight.metrics, straight.arrays)
    other = bulat2021.gate("softmax", seed=1, device="cpu")
    assert other.metrics != straight.metrics


def test_the_full_recipe_runs_on_small_images(toy_images, monkeypatch):
    """CIFAR-10's shapes but for the size: all of the full recipe, in a few steps."""
    toy_images(8)
    toy = replace(bulat2021.FULL, dataset="toy", batch_size=16, epochs=3)
    for name, variant in (("gate", "sigmoid"), ("width", "wide-grouped-1x1")):
        monkeypatch.setitem(bulat2021.RECIPES, name, {"full": toy})
        record = getattr(bulat2021, name)(variant, scale="full", device="cpu")
        assert [row["stage"] for row in record.history] == [0, 1, 2]
        assert all(math.isfinite(value) for value in record.metrics.values())
        if name == "gate":
            assert records.decode_array(record.arrays["fires"]).shape == (18, 4, 10)


def test_the_gate_is_an_ordinary_real_layer():
    """It is no binary layer, so stage II leaves it real."""
    model = fitted().model
    gates = [m.gate for m in model.modules() if isinstance(m, ExpertBinaryConv2d)]
    assert all(type(gate) is nn.Linear for gate in gates)
    assert all(len(gate.weight.unique()) > 2 for gate in gates)
