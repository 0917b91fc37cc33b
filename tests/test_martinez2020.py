"""Real-to-binary's pieces: recipes against the paper, teachers and students, short runs."""

import functools
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch.nn import functional as F

from bnnbook import data, probes, records
from bnnbook.binarize import real_weight, ste_sign
from bnnbook.experiments import martinez2020
from bnnbook.layers import DataDrivenScale, attention_matching, binary_layers
from bnnbook.models.expert import ExpertUnit

TINY = replace(martinez2020.SMALL, epochs=1, width=4, batch_size=200)
HELPED = {"attention": 1.0, "logits": 2.0}


@functools.cache
def digits():
    return data.load("digits")


@functools.cache
def fitted(**changes):
    return martinez2020.fit(replace(TINY, **changes), device="cpu", progress=False)


def network(seed=0, **changes):
    torch.manual_seed(seed)
    return martinez2020.build_network(replace(TINY, **changes), digits())


# --- Recipes -------------------------------------------------------------------------------------


def test_an_unknown_variant_or_scale_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown variant 'x'.*baseline, attention, attention-l"):
        martinez2020.pieces("x")
    with pytest.raises(ValueError, match=r"unknown scale 'huge'.*known: small, full"):
        martinez2020.pieces(scale="huge")


@pytest.mark.parametrize("scale", ["small", "full"])
def test_every_variant_has_a_recipe_of_its_own(scale):
    variants = martinez2020.VARIANTS["pieces"]
    assert list(martinez2020.PAPER["pieces"]) == list(variants)
    assert len({martinez2020.find_recipe("pieces", v, scale, None) for v in variants}) == len(
        variants
    )
    assert martinez2020.find_recipe("pieces", "full", scale, 3).epochs == 3


def test_the_full_recipe_has_the_papers_numbers():
    full = martinez2020.find_recipe("pieces", "baseline", "full", None)
    assert (full.lr, full.last_lr, full.weight_decay) == (1e-3, 2e-4, 1e-5)
    assert (full.batch_size, full.warmup, full.dataset) == (128, 5, "cifar100")
    assert [round(350 * drop) for drop in martinez2020.DROPS] == [150, 250, 320]
    with torch.device("meta"):
        model = martinez2020.expertnet(100, blocks=full.blocks, groups=(1,) * 4, width=full.width,
                                       experts=1, pointwise=False)  # fmt: skip
    assert len(list(binary_layers(model))) == 16  # ResNet-18: and stem and output layer
    for last, rates in ((False, (1e-3, 1e-5)), (True, (2e-4, 0))):
        group = martinez2020.build_optimizer(model, full, last).param_groups[0]
        assert (group["lr"], group["weight_decay"]) == rates


def test_the_rate_warms_up_and_drops_where_the_paper_drops_it():
    recipe = replace(martinez2020.FULL, epochs=350)
    factors = [martinez2020.rate_factor(epoch, recipe, 5) for epoch in range(350)]
    assert factors[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    falls = [epoch for epoch in range(6, 350) if factors[epoch] < factors[epoch - 1]]
    assert falls == [150, 250, 320]
    assert factors[-1] == pytest.approx(1e-3)
    assert martinez2020.rate_factor(0, recipe, 0) == 1


@pytest.mark.parametrize(("epochs", "warmup"), [(6, 0), (12, 1), (36, 3), (60, 5), (120, 5)])
def test_a_shortened_run_has_a_shortened_warm_up(epochs, warmup):
    recipe = martinez2020.find_recipe("pieces", "full", "full", epochs)
    assert (recipe.epochs, recipe.warmup) == (epochs, warmup)
    factors = [martinez2020.rate_factor(e, recipe, recipe.warmup) for e in range(epochs)]
    assert max(factors) == factors[warmup] == 1  # the whole rate, before the first drop
    assert factors[-1] < 0.02  # six epochs are too coarse for the third drop


def test_the_papers_numbers_rise_with_every_piece():
    numbers = martinez2020.PAPER["pieces"]
    order = [numbers[v] for v in ("baseline", "attention", "attention-logits", "progressive",
                                  "full")]  # fmt: skip
    assert order == sorted(order)
    assert numbers["scale"] > numbers["baseline"]


@pytest.mark.parametrize(("changes", "names", "teachers"), [
    ({}, ["activations", "binary"], ["", ""]),
    (HELPED, ["activations", "binary"], ["real", "real"]),
    (HELPED | {"progressive": True}, ["tanh", "activations", "binary"],
     ["real", "previous", "previous"]),
])  # fmt: skip
def test_the_plan_of_the_steps(changes, names, teachers):
    steps = martinez2020.plan(replace(TINY, **changes))
    assert [step.name for step in steps] == names
    assert [step.teacher for step in steps] == teachers
    assert [step.weights for step in steps] == ["real"] * (len(steps) - 1) + ["binary"]
    if "progressive" in changes:  # the last of three steps has logits only
        assert [step.attention for step in steps] == [1, 1, 0]
        assert all(step.logits == 2 for step in steps)


# --- Steps, teacher and student ------------------------------------------------------------------


def test_a_step_sets_quantizers_and_the_scale_takes_over_the_magnitude():
    model = network()
    martinez2020.begin(model, martinez2020.Step("tanh", "tanh"))
    assert {layer.input_quantizer for layer in binary_layers(model)} == {torch.tanh}
    assert {layer.weight_quantizer for layer in binary_layers(model)} == {real_weight}
    units = [module for module in model.modules() if isinstance(module, ExpertUnit)]
    before = [unit.scale.scale.detach().clone() for unit in units]
    martinez2020.begin(model, martinez2020.Step("binary", "binary", "binary"))
    assert {layer.weight_quantizer for layer in binary_layers(model)} == {ste_sign}
    for unit, scale in zip(units, before, strict=True):
        kappa = unit.conv.weight.abs().mean((1, 2, 3))
        torch.testing.assert_close(unit.scale.scale.detach(), scale * kappa.detach())
    probes.require_binary(model)


def test_block_features_are_those_of_every_second_unit_and_the_outputs_the_networks():
    model = network(blocks=(2, 1), width=4).eval()
    images = torch.randn(3, 1, 8, 8)
    features, outputs = martinez2020.block_features(model, images)
    assert [tuple(f.shape) for f in features] == [(3, 4, 8, 8), (3, 4, 8, 8), (3, 8, 4, 4)]
    torch.testing.assert_close(outputs, model(images))
    torch.testing.assert_close(features[-1], model.stage2(model.stage1(model.stem(images))))


def test_a_student_keeps_what_it_saw_in_training_only():
    student = martinez2020.Student(network())
    student.eval()
    student(torch.randn(2, 1, 8, 8))
    assert student.images is None
    student.train()
    images = torch.randn(2, 1, 8, 8)
    student(images)
    assert student.images is images
    assert len(student.features) == 2


def test_the_loss_is_its_formula_and_leaves_the_teacher_alone():
    teacher, student = network(1), martinez2020.Student(network(2))
    step = martinez2020.Step("binary", "binary", "binary", attention=0.5, logits=2.0)
    loss = martinez2020.Distillation(student, teacher, step)
    images, targets = torch.randn(6, 1, 8, 8), torch.arange(6)
    outputs = student.train()(images)
    features, theirs = martinez2020.block_features(teacher.eval(), images)
    p = theirs.softmax(1).detach()
    expected = (
        F.cross_entropy(outputs, targets)
        + 0.5 * attention_matching(student.features, features)
        - 2.0 * (p * outputs.log_softmax(1)).sum(1).mean()
    )
    value = loss(outputs, targets)
    assert student.features == []
    torch.testing.assert_close(value, expected)
    value.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is None and not p.requires_grad for p in loss.teacher.parameters())
    assert any(p.grad is not None and p.grad.any() for p in student.network.stem.parameters())


def test_a_weight_of_zero_leaves_a_term_out():
    student = martinez2020.Student(network(2))
    loss = martinez2020.Distillation(student, network(1), martinez2020.Step("x", "binary"))
    outputs, targets = student(torch.randn(6, 1, 8, 8)), torch.arange(6)
    assert torch.equal(loss(outputs, targets), F.cross_entropy(outputs, targets))


# --- Runs ----------------------------------------------------------------------------------------


def test_each_teacher_is_the_network_as_its_own_step_left_it(monkeypatch):
    taught = []
    original = martinez2020.Distillation.__init__

    def look(self, student, teacher, step):
        kinds = {(layer.input_quantizer, layer.weight_quantizer)
                 for layer in binary_layers(teacher)}  # fmt: skip
        taught.append((step.name, kinds))
        original(self, student, teacher, step)

    monkeypatch.setattr(martinez2020.Distillation, "__init__", look)
    run = martinez2020.fit(replace(TINY, progressive=True, **HELPED), device="cpu", progress=False)
    assert list(run.networks) == ["real", "tanh", "activations", "binary"]
    assert taught == [
        ("tanh", {(F.relu, real_weight)}),
        ("activations", {(torch.tanh, real_weight)}),
        ("binary", {(ste_sign, real_weight)}),
    ]
    probes.require_binary(run.networks["binary"])
    first, second = (next(binary_layers(run.networks[n])).weight for n in ("tanh", "activations"))
    assert not torch.equal(first, second)


def test_without_help_no_teacher_is_trained():
    assert list(fitted().networks) == ["activations", "binary"]


def test_the_data_driven_scale_is_the_students_only():
    run = fitted(data_driven=True, attention=1.0)
    gates = {name: sum(isinstance(m, DataDrivenScale) for m in model.modules())
             for name, model in run.networks.items()}  # fmt: skip
    assert gates == {"real": 0, "activations": 4, "binary": 4}


def test_a_run_continues_from_its_folder(tmp_path):
    options = {"device": "cpu", "progress": False, "checkpoint": tmp_path / "run.pt"}
    recipe = replace(TINY, attention=1.0)
    first = martinez2020.fit(recipe, **options)
    names = {path.name for path in (tmp_path / "run.pt").iterdir()}
    assert names == {"real.pt", "activations.pt", "binary.pt"}
    again = martinez2020.fit(recipe, **options)
    pairs = zip(first.networks["binary"].parameters(), again.networks["binary"].parameters(),
                strict=True)  # fmt: skip
    assert all(torch.equal(one, two) for one, two in pairs)


def test_a_record_is_complete(tmp_path, monkeypatch):
    monkeypatch.setitem(martinez2020.RECIPES["pieces"], "small", replace(TINY, epochs=2))
    record = martinez2020.pieces("full", epochs=1, device="cpu", progress=False)
    recipe = martinez2020.find_recipe("pieces", "full", "small", 1)
    assert (record.experiment, record.variant) == ("martinez2020.pieces", "full")
    assert record.shortened == "1 of 2 epochs"
    expected = {**asdict(recipe), "precision": "float32", "blocks": recipe.blocks}
    assert record.recipe == expected
    names = ["real", "tanh", "activations", "binary"]
    assert set(record.metrics) == {"test_error", "train_loss",
                                   *(f"test_error, {name}" for name in names)}  # fmt: skip
    assert all(math.isfinite(value) for value in record.metrics.values())
    assert record.metrics["test_error"] == record.metrics["test_error, binary"]
    saved = records.read(records.save(record, tmp_path))
    assert set(saved.arrays) == {f"test_accuracy, {name}" for name in names}


def test_the_full_recipe_runs_on_small_images(toy_images, monkeypatch):
    """CIFAR's shapes but for the size, two steps of training each, on a narrow network."""
    toy_images(16)
    toy = replace(martinez2020.FULL, dataset="toy", batch_size=16, epochs=1, width=8)
    monkeypatch.setitem(martinez2020.RECIPES, "pieces", {"full": toy})
    record = martinez2020.pieces("full", scale="full", device="cpu", progress=False)
    assert all(math.isfinite(value) for value in record.metrics.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_teacher_works_under_autocast():
    run = martinez2020.fit(replace(TINY, progressive=True, **HELPED), device="cuda")
    assert all(math.isfinite(h.rows[-1]["train_loss"]) for h in run.histories.values())
