"""Probes against a count by hand."""

import copy
import io
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bnnbook import data, layers, optim, probes, training
from bnnbook.binarize import magnitude_aware_sign, real_weight, ste_sign, stochastic_sign
from bnnbook.models import binaryconnect_mlp

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA"))]  # fmt: skip


EVERY = {
    "flips": lambda: probes.FlipRatio(per_layer=True, per_step=True),
    "flips, pooled": probes.FlipRatio,
    "c2i": probes.C2I,
    "saturation": probes.Saturation,
    "activations": lambda: probes.ActivationSaturation(every=1),
    "gradients": lambda: probes.GradientSample(8, 8),
}


def mixed_network():
    """One layer of each kind: latent, binary, experts, real; the convolutions laid out oddly."""
    torch.manual_seed(0)
    model = nn.Sequential(
        layers.BinaryConv2d(3, 4, 3, padding=1, weight_quantizer=magnitude_aware_sign),
        nn.BatchNorm2d(4),
        layers.BinaryConv2d(4, 4, 3, weight_quantizer=None, input_quantizer=ste_sign),
        nn.BatchNorm2d(4),
        layers.ExpertBinaryConv2d(4, 4, 3, experts=2),
        nn.Flatten(),
        layers.BinaryLinear(4, 3),
        nn.Linear(3, 2),
    )
    for conv in (model[0], model[2]):
        conv.to(memory_format=torch.channels_last)
    return model


def random_signs(model, share, generator):
    """Flip a share of each binary layer's weights; return how many flipped in each."""
    flips = []
    for layer in layers.binary_layers(model):
        flip = torch.from_numpy(generator.random(tuple(layer.weight.shape)) < share)
        with torch.no_grad():
            layer.weight.mul_(torch.where(flip.to(layer.weight.device), -1, 1))
        flips.append(int(flip.sum()))
    return flips


def latent(model):
    """All weights of the binary layers, one behind the other."""
    return np.concatenate([w.weight.detach().numpy().ravel() for w in layers.binary_layers(model)])


def saved(state):
    """The state after a way through a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def one_step(model, inputs, targets=None):
    """Forward and backward, as a training step before the optimizer; the gradients stay."""
    model.zero_grad(set_to_none=True)
    outputs = model(inputs)
    targets = torch.zeros(len(inputs), dtype=torch.int64) if targets is None else targets
    cross_entropy(outputs, targets.to(outputs.device)).backward()


# --- Flips -------------------------------------------------------------------------------------


def test_flip_ratio_counts_every_sign_change():
    generator = np.random.default_rng(0)
    model = nn.Sequential(layers.BinaryLinear(5, 3), nn.Linear(3, 3), layers.BinaryLinear(3, 2))
    binary = [model[0].weight, model[2].weight]
    probe = probes.FlipRatio()
    probe.start(model)
    flips, steps = 0, 50
    for _ in range(steps):
        for weight in binary:
            before = weight.detach().numpy().copy()
            new = generator.choice([-1.0, -0.0, 0.0, 0.5], before.shape).astype(np.float32)
            flips += ((before >= 0) != (new >= 0)).sum()
            with torch.no_grad():
                weight.copy_(torch.tensor(new))
        probe.step()
    assert probe.epoch()["flip_ratio"] == flips / (steps * 21)
    probe.step()
    assert probe.epoch()["flip_ratio"] == 0


def test_flip_ratio_counts_on_after_a_save():
    model = nn.Sequential(layers.BinaryLinear(4, 1))
    first, second = probes.FlipRatio(), probes.FlipRatio()
    first.start(model)
    with torch.no_grad():
        model[0].weight.neg_()
    first.step()
    second.start(model)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        model[0].weight[0, 0].neg_()
    second.step()
    assert second.epoch()["flip_ratio"] == (4 + 1) / 8


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_probes_without_binary_weights_give_no_column(make):
    for model in (nn.Linear(2, 2), layers.BinaryLinear(0, 3, weight_quantizer=ste_sign)):
        probe = make()
        probe.start(model)
        probe.step()
        assert probe.epoch() == {}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_weights_beside_others_flips_nothing():
    model = nn.Sequential(*(layers.BinaryLinear(n, 2, weight_quantizer=ste_sign) for n in (0, 1)))
    probe = probes.FlipRatio(per_layer=True, per_step=True)
    probe.start(model)
    with torch.no_grad():
        model[1].weight[0].neg_()
    probe.step()
    assert probe.history().tolist() == [[0, 0.5]]
    assert probe.epoch() == {"flip_ratio": 0.5, "flip_ratio/0": 0, "flip_ratio/1": 0.5}


@pytest.mark.parametrize("name", EVERY)
def test_a_probe_that_was_not_started_says_so(name):
    def used(probe):
        probe.step()
        return probe.epoch()

    probe, started = EVERY[name](), EVERY[name]()
    started.start(mixed_network())
    reads = {"flips": [probes.FlipRatio.history], "gradients": [probes.GradientSample.gradients]}
    if state := started.state_dict():
        used_state = [lambda p: p.state_dict(), lambda p: p.load_state_dict(state)]
    else:
        used_state = []
    # a sample of gradients has no columns, and so nothing to miss
    columns = [] if name == "gradients" else [lambda p: p.epoch()]
    for use in (used, *columns, *reads.get(name, []), *used_state):
        use(started)
        with pytest.raises(RuntimeError, match=r"was not started: call start\(model\) first"):
            use(probe)


@pytest.mark.parametrize("device", DEVICES)
def test_flips_of_each_layer_and_step(device):
    model, generator = mixed_network().to(device), np.random.default_rng(0)
    names, sizes = ["0", "2", "4", "6"], np.array([4 * 27, 4 * 36, 2 * 4 * 36, 12])
    probe, pooled = probes.FlipRatio(per_layer=True, per_step=True), probes.FlipRatio()
    steps_only = probes.FlipRatio(per_step=True)
    flips = []
    for p in (probe, pooled, steps_only):
        p.start(model)
    for share in (0.5, 0.1, 0, 1, 0.02):
        flips.append(random_signs(model, share, generator))
        for p in (probe, pooled, steps_only):
            p.step()
    flips = np.array(flips)
    ratios = flips.sum(0) / sizes / 5
    columns = probe.epoch()
    assert columns.pop("flip_ratio") == flips.sum() / sizes.sum() / 5
    expected = {f"flip_ratio/{name}": r for name, r in zip(names, ratios, strict=True)}
    assert columns == pytest.approx(expected)
    assert pooled.epoch() == {"flip_ratio": flips.sum() / sizes.sum() / 5}
    np.testing.assert_allclose(probe.history(), flips / sizes, rtol=1e-12)
    np.testing.assert_allclose(steps_only.history(), flips.sum(1) / sizes.sum(), rtol=1e-12)
    random_signs(model, 1, generator)
    probe.step()
    assert set(probe.epoch().values()) == {1.0}  # the epoch's columns start anew
    assert probe.history().shape == (6, 4)  # the steps go on


def test_a_layer_that_is_the_model_has_its_types_name():
    probe = probes.FlipRatio(per_layer=True)
    probe.start(layers.BinaryLinear(2, 2))
    probe.step()
    assert set(probe.epoch()) == {"flip_ratio", "flip_ratio/BinaryLinear"}


def test_the_history_has_room_for_any_number_of_steps():
    model = nn.Sequential(layers.BinaryLinear(4, 1))
    probe = probes.FlipRatio(per_step=True)
    probe.start(model)
    expected = np.random.default_rng(0).integers(0, 5, 2600)
    for flips in expected:
        with torch.no_grad():
            model[0].weight[0, :flips] *= -1
        probe.step()
    assert np.array_equal(probe.history() * 4, expected)


@pytest.mark.parametrize("options", [{"per_step": True}, {"per_layer": True, "per_step": True}])
def test_a_resumed_flip_ratio_counts_on_exactly(options):
    model = mixed_network()
    through, first = probes.FlipRatio(**options), probes.FlipRatio(**options)
    through.start(model)
    first.start(model)
    generator = np.random.default_rng(1)
    for step in range(6):
        random_signs(model, 0.2, generator)
        if step == 3:
            second = probes.FlipRatio(**options)
            second.start(mixed_network())  # another start, as in training
            second.load_state_dict(saved(first.state_dict()))
            # the step's flips lie before the state was loaded: not counted twice, so count here
            random_signs(model, 0.3, generator)
            for probe in (through, first):
                probe.step()
            resumed = probes.FlipRatio(**options)
            resumed.start(model)
            resumed.load_state_dict(saved(first.state_dict()))
            first = resumed
        else:
            through.step()
            first.step()
    assert first.epoch() == through.epoch()
    assert torch.equal(first.history(), through.history())


def test_a_flip_ratio_of_other_options_is_refused():
    model, probe = mixed_network(), probes.FlipRatio()
    probe.start(model)
    for options in ({"per_layer": True}, {"per_step": True}):
        other = probes.FlipRatio(**options)
        other.start(model)
        with pytest.raises(ValueError, match="another per_layer or per_step"):
            other.load_state_dict(probe.state_dict())
        with pytest.raises(ValueError, match="another per_layer or per_step"):
            probe.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="per_step=True"):
        probe.history()


def test_the_first_step_of_a_cascaded_ema_flips_half_of_the_weights():
    """Whatever its random sign, a weight becomes minus the sign of its first gradient.

    Half, because behind batch normalisation a gradient is at right angles to its weights.
    """
    torch.manual_seed(0)
    model = nn.Sequential(layers.BinaryLinear(64, 300, weight_quantizer=None),
                          nn.BatchNorm1d(300), nn.ReLU(), nn.Linear(300, 10))  # fmt: skip
    probe = probes.FlipRatio(per_step=True)
    probe.start(model)
    rule = optim.CascadedEMA([model[0].weight], alpha=1e-3, gamma=0.1)
    inputs, targets = torch.randn(500, 64), torch.randint(10, (500,))
    for _ in range(3):
        one_step(model, inputs, targets)
        rule.step()
        probe.step()
    history = probe.history()
    assert abs(history[0] - 0.5) < 0.02
    assert history[1:].max() < 0.25


def test_log_flip_ratio_is_helwegens():
    ratios = np.array([0.0, 1e-9, 1 / 10240, 1e-4, 0.01, 0.5, 1.0])
    expected = [math.log(r + math.exp(-9)) for r in ratios]
    np.testing.assert_allclose(probes.log_flip_ratio(ratios), expected, rtol=1e-12, atol=1e-12)
    tensor = probes.log_flip_ratio(torch.tensor(ratios, dtype=torch.float32))
    assert tensor.dtype == torch.float32
    np.testing.assert_allclose(tensor, expected, rtol=1e-5, atol=1e-5)
    for zero in (0, 0.0, np.float32(0), torch.zeros(()), torch.zeros((), dtype=torch.bfloat16)):
        assert float(probes.log_flip_ratio(zero)) == -9


def test_c2i_is_the_share_of_signs_that_are_as_at_the_start():
    model, generator = mixed_network(), np.random.default_rng(0)
    start = latent(model)
    probe = probes.C2I()
    probe.start(model)
    assert probe.epoch() == {"c2i": 1.0}
    for share in (0.3, 0.3, 0.9):
        random_signs(model, share, generator)
        now = latent(model)
        probe.step()
        changed = np.abs(np.sign(now) - np.sign(start)) / 2
        assert probe.epoch()["c2i"] == pytest.approx(1 - changed.sum() / len(start), abs=1e-12)
    assert probe.epoch()["c2i"] < 0.5  # impossible with the printed factor 1/2
    # a resumed run has its own start, another layout in memory, and takes the saved signs
    again = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    resumed = probes.C2I()
    resumed.start(again)
    assert resumed.epoch() == {"c2i": 1.0}
    resumed.load_state_dict(saved(probe.state_dict()))
    assert resumed.epoch() == probe.epoch()


# --- Saturation --------------------------------------------------------------------------------


def test_saturation():
    model = nn.Sequential(layers.BinaryLinear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0, 0.99, 0.5]]))
    probe = probes.Saturation(limit=1.0)
    probe.start(model)
    assert probe.epoch() == {"saturation": 0.5}


def test_saturation_takes_99_hundredths_as_the_limit_by_default():
    model = nn.Sequential(layers.BinaryLinear(5, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-1.0, 0.99, -0.989, 0.98, 0.5]]))
    probe = probes.Saturation()
    probe.start(model)
    assert probe.epoch() == {"saturation": 0.4}


def test_latent_histogram_is_numpys():
    weight = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    density, edges = probes.latent_histogram(weight, bins=20, bound=2.0)
    counts, expected_edges = np.histogram(weight.numpy(), 20, range=(-2, 2))
    np.testing.assert_allclose(edges, expected_edges, atol=1e-6)
    np.testing.assert_allclose(density, counts / 2000 / 0.2, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_latent_histogram_of_a_parameter_has_fifty_bins_from_minus_one_to_one(dtype):
    weight = nn.Parameter(torch.tensor([-0.99, 0.01, 0.01, 5.0], dtype=dtype))
    density, edges = probes.latent_histogram(weight)
    np.testing.assert_allclose(edges, np.linspace(-1, 1, 51), atol=1e-6)
    assert density.nonzero().flatten().tolist() == [0, 25]
    assert density.sum().item() * 2 / 50 == pytest.approx(0.75)  # what lies within
    assert not probes.layer_weight(layers.BinaryLinear(3, 2)).requires_grad


def test_layer_weight():
    model = binaryconnect_mlp(6, (5,), 3)
    assert probes.layer_weight(model).shape == (5, 6)
    assert probes.layer_weight(model, -1).shape == (3, 5)
    with pytest.raises(IndexError):
        probes.layer_weight(nn.ReLU())


class Inputs:
    """What each binary layer with an input quantizer gets in training mode, step by step."""

    def __init__(self, model):
        self.seen = []
        for layer in (model[2], model[4]):
            layer.register_forward_pre_hook(lambda m, a: self.seen.append(a[0].detach().clone()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("every", [1, 3])
def test_activation_saturation_is_the_share_of_large_inputs(every, device):
    model = mixed_network().to(device)
    inputs = Inputs(model)
    probe = probes.ActivationSaturation(every=every, per_layer=True)
    probe.start(model)
    torch.manual_seed(1)
    for _ in range(7):
        one_step(model, torch.randn(8, 3, 5, 5, device=device))
        probe.step()
        model.eval()
        with torch.no_grad():
            model(100 * torch.randn(8, 3, 5, 5, device=device))  # not training: not counted
        model.train()
    steps = [inputs.seen[4 * step : 4 * step + 2] for step in range(0, 7, every)]
    above = np.sum([[(np.abs(a.cpu().numpy()) > 1).sum() for a in step] for step in steps], 0)
    size = np.sum([[a.numel() for a in step] for step in steps], 0)
    assert 0 < above.sum() < size.sum()
    assert probe.epoch() == pytest.approx({
        "activation_saturation": above.sum() / size.sum(),
        "activation_saturation/2": above[0] / size[0],
        "activation_saturation/4": above[1] / size[1],
    })  # fmt: skip
    assert probe.epoch() == {}  # nothing since


def test_activation_saturation_at_the_limit_and_with_another_limit():
    model = nn.Sequential(layers.BinaryLinear(4, 1, input_quantizer=ste_sign))
    for limit, share in ((1.0, 0.5), (2.0, 0.25), (0.1, 1.0)):
        with probes.ActivationSaturation(limit) as probe:
            probe.start(model)
            model(torch.tensor([[1.0, -1.0, -2.0, 2.5]]))
            assert probe.epoch() == {"activation_saturation": share}


def test_activation_saturation_looks_at_every_sixteenth_step_by_default():
    model = nn.Sequential(layers.BinaryLinear(1, 1, input_quantizer=ste_sign))
    with probes.ActivationSaturation() as probe:
        probe.start(model)
        for step in range(34):
            model(torch.full((1, 1), 2.0 if step in (0, 16, 32) else 0.5))
            probe.step()
        assert probe.seen.tolist() == [3]
        assert probe.epoch() == {"activation_saturation": 1.0}


def test_activation_saturation_of_a_layer_that_was_not_called_is_not_a_number():
    model = nn.ModuleList(layers.BinaryLinear(2, 2, input_quantizer=ste_sign) for _ in range(2))
    with probes.ActivationSaturation(per_layer=True) as probe:
        probe.start(model)
        model[0](torch.tensor([[3.0, 0.5]]))
        columns = probe.epoch()
    assert math.isnan(columns.pop("activation_saturation/1"))
    assert columns == {"activation_saturation": 0.5, "activation_saturation/0": 0.5}


def test_activation_saturation_of_an_input_that_is_given_by_its_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layers.BinaryLinear(4, 1, input_quantizer=ste_sign)

        def forward(self, x):
            return self.layer(x=x)

    model = Named()
    with probes.ActivationSaturation() as probe:
        probe.start(model)
        model(torch.tensor([[1.0, -1.5, -2.0, 2.5]]))
        assert probe.epoch() == {"activation_saturation": 0.75}
    assert not model.layer._forward_pre_hooks


def test_a_resumed_activation_saturation_looks_at_the_same_steps():
    model = nn.Sequential(layers.BinaryLinear(4, 3, input_quantizer=ste_sign))
    inputs = torch.randn(11, 1, 4, generator=torch.Generator().manual_seed(0)) * 2

    def run(probe, steps):
        for x in inputs[steps]:
            model(x)
            probe.step()

    whole = probes.ActivationSaturation(every=4)
    whole.start(model)
    run(whole, slice(11))
    whole.stop()
    first, second = (probes.ActivationSaturation(every=4) for _ in range(2))
    first.start(model)
    run(first, slice(6))
    first.stop()
    second.start(model)
    second.load_state_dict(saved(first.state_dict()))
    run(second, slice(6, 11))
    expected = (inputs[[0, 4, 8]].abs() > 1).double().mean().item()
    assert second.epoch() == whole.epoch() == {"activation_saturation": expected}
    run(second, slice(2, 3))  # the first step of the next epoch, however short that is
    expected = (inputs[2].abs() > 1).double().mean().item()
    assert second.epoch() == {"activation_saturation": expected}


def test_activation_saturation_needs_steps_and_leaves_the_network_alone():
    with pytest.raises(ValueError, match="every must be at least 1, not 0"):
        probes.ActivationSaturation(every=0)
    model = mixed_network()
    x, probe = torch.randn(4, 3, 5, 5), probes.ActivationSaturation(every=1)
    with probe:
        probe.start(model)
        probe.start(model)  # hangs no second set of hooks
        model(x)
        once = probe.above.sum()
    assert not any(module._forward_pre_hooks for module in model.modules())
    model(x)
    probe.step()
    model(x)
    assert probe.above.sum() == once > 0


# the warning is torch's own, from tracing autograd functions
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_probes_see_the_same_in_a_compiled_network():
    results, graphs = [], []
    torch._dynamo.reset()
    for compiled in (False, True):
        model = nn.Sequential(*mixed_network()[2:4], nn.Flatten(), nn.Linear(36, 2))
        measured = [probes.ActivationSaturation(every=3), probes.GradientSample(5, 9)]
        for probe in measured:
            probe.start(model)
        torch.manual_seed(2)

        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        forward = torch.compile(model, backend=backend) if compiled else model
        for _ in range(9):
            one_step(forward, torch.randn(4, 4, 5, 5))
            for probe in measured:
                probe.step()
        results.append((measured[0].epoch(), *measured[1].gradients().values()))
        used = len(graphs)
        measured[0].stop()  # also for a network that was compiled with the hooks
        forward(torch.randn(4, 4, 5, 5))
        assert measured[0].epoch() == {}
        torch._dynamo.reset()
    assert results[0][0] == results[1][0]
    assert results[0][0]
    torch.testing.assert_close(results[0][1], results[1][1])
    assert used == 2  # one with a look at the inputs and one without, not one a step


# --- Gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_sample_records_each_steps_gradients(device):
    model = mixed_network().to(device)
    probe = probes.GradientSample(weights=20, steps=4, after=1, seed=3)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    probe.start(model)
    assert torch.equal(torch.get_rng_state(), state)  # the run's own draws stay what they were
    kept = []
    for _ in range(7):
        one_step(model, torch.randn(8, 3, 5, 5, device=device))
        kept.append({name: model[int(name)].weight.grad.cpu().numpy().ravel() for name in "0246"})
        model.zero_grad(set_to_none=True)
        probe.step()
    record = probe.gradients()
    assert [*record] == ["0", "2", "4", "6"]
    for name, gradients in record.items():
        index = probe.indices[name].cpu().numpy()
        assert len(set(index)) == len(index) == (12 if name == "6" else 20)
        assert gradients.shape == (4, len(index))
        expected = np.stack([step[name][index] for step in kept[1:5]])
        assert np.abs(expected).max() > 0
        assert np.array_equal(gradients, expected)
    # full: the hooks are off
    assert not any(w._post_accumulate_grad_hooks for w in model.parameters())


def test_gradient_sample_draws_its_weights_from_the_seed():
    drawn = []
    for seed in (0, 0, 1):
        probe = probes.GradientSample(weights=20, steps=1, seed=seed)
        probe.start(nn.Sequential(layers.BinaryLinear(100, 100)))
        drawn.append(probe.indices["0"])
        probe.stop()
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_gradient_sample_of_a_step_without_a_backward_pass_is_zero():
    model = nn.Sequential(layers.BinaryLinear(4, 3))
    with probes.GradientSample(steps=3) as probe:
        probe.start(model)
        for step in range(3):
            if step != 1:
                one_step(model, torch.randn(5, 4))
            probe.step()
    assert probe.gradients()["0"].any(1).tolist() == [True, False, True]


def test_gradient_sample_holds_no_more_than_its_indices():
    probe = probes.GradientSample(weights=20, steps=4)
    probe.start(nn.Sequential(layers.BinaryLinear(100, 100)))
    (index,) = probe.indices.values()
    assert index.untyped_storage().nbytes() == 20 * 8  # and not a permutation of 10 000


def test_gradient_sample_in_training_where_the_gradients_are_gone_after_a_step():
    d = data.load("digits")
    model = binaryconnect_mlp(64, (12,), 10)
    with probes.GradientSample(weights=30, steps=100) as probe:
        training.train(model, d, torch.optim.SGD(model.parameters(), 0.01), epochs=1,
                       batch_size=100, probes=[probe, probes.C2I()])  # fmt: skip
    for gradients in probe.gradients().values():
        assert gradients.shape == (13, 30)
        assert (gradients.abs().amax(1) > 0).all()
    assert not any(w._post_accumulate_grad_hooks for w in model.parameters())


def test_a_resumed_gradient_sample_records_on_exactly():
    torch.manual_seed(0)
    model = nn.Sequential(layers.BinaryLinear(8, 3))
    inputs = torch.randn(9, 5, 8)

    def run(probe, steps):
        probe.start(model)
        if steps.start:
            probe.load_state_dict(saved(whole_state))
        for x in inputs[steps]:
            one_step(model, x)
            probe.step()
        probe.stop()

    whole, first, second, third = (probes.GradientSample(6, 5, after=2) for _ in range(4))
    run(whole, slice(0, 9))
    run(first, slice(0, 4))
    whole_state = first.state_dict()
    assert whole_state["gradients"].shape == (2, 6)
    run(second, slice(4, 9))
    assert torch.equal(second.gradients()["0"], whole.gradients()["0"])
    # a record that was complete stays as it is, and gets no hooks
    whole_state = whole.state_dict()
    run(third, slice(8, 9))
    assert torch.equal(third.gradients()["0"], whole.gradients()["0"])


def test_gradient_sample_leaves_out_frozen_layers_and_refuses_nonsense():
    model = nn.Sequential(layers.BinaryLinear(4, 3), layers.BinaryLinear(3, 2))
    model[0].weight.requires_grad_(False)
    probe = probes.GradientSample(steps=2)
    probe.start(model)
    one_step(model, torch.randn(3, 4))
    probe.step()
    assert [*probe.gradients()] == ["1"]
    for options in ({"weights": 0}, {"steps": 0}, {"after": -1}):
        with pytest.raises(ValueError, match="at least"):
            probes.GradientSample(**options)


def test_a_state_of_other_gradients_is_refused():
    model = nn.Sequential(layers.BinaryLinear(4, 3))
    one, four = probes.GradientSample(weights=1, steps=3), probes.GradientSample(4, 3)
    for probe in (one, four):
        probe.start(model)
        one_step(model, torch.randn(2, 4))
        probe.step()
    with pytest.raises(ValueError, match="1 steps of 1 weights, this probe records 3 of 4"):
        four.load_state_dict(one.state_dict())
    short = probes.GradientSample(4, 1)
    short.start(model)
    four.step()
    with pytest.raises(ValueError, match="2 steps of 4 weights, this probe records 1 of 4"):
        short.load_state_dict(four.state_dict())


def test_the_gradient_of_a_weight_that_is_computed_is_not_there():
    model = nn.Sequential(layers.BinaryLinear(4, 3), layers.BinaryLinear(3, 2))
    nn.utils.parametrizations.weight_norm(model[1])
    with pytest.raises(ValueError, match=r"1\.weight is computed from other parameters"):
        probes.GradientSample().start(model)
    assert not model[0].weight._post_accumulate_grad_hooks


def test_what_c2i_has_saved_stays_as_it_is():
    model = nn.Sequential(layers.BinaryLinear(4, 3))
    probe = probes.C2I()
    probe.start(model)
    state = probe.state_dict()
    before = state["initial"].clone()
    probe.load_state_dict({"initial": ~before if before.dtype == torch.bool else -before})
    assert torch.equal(state["initial"], before)


def white_noise(steps=4096, weights=40, seed=0):
    return np.random.default_rng(seed).standard_normal((steps, weights))


def filtered(noise, rate):
    """An exponential moving average, step by step, from its stationary start on."""
    m = noise[0] * math.sqrt(rate / (2 - rate))
    series = []
    for g in noise:
        m = (1 - rate) * m + rate * g
        series.append(m)
    return np.array(series)


def test_power_spectrum_is_welchs():
    """One series, one segment after the other, a discrete Fourier sum for each frequency."""
    x = white_noise(40, 2)
    segment, t = 16, np.arange(16)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * t / segment)
    z = (x - x.mean(0)) / x.std(0)
    expected = []
    for k in range(segment // 2 + 1):
        wave = window * np.exp(-2j * np.pi * k * t / segment)
        parts = [z[start : start + segment, i] for i in (0, 1) for start in (0, 8, 16, 24)]
        expected.append(np.mean([abs(sum(wave * part)) ** 2 / sum(window**2) for part in parts]))
    frequencies, power = probes.power_spectrum(torch.from_numpy(x), segment)
    np.testing.assert_allclose(frequencies, np.arange(9) / 16, atol=1e-15)
    np.testing.assert_allclose(power, expected, rtol=1e-10)


def test_power_spectrum_of_white_noise_is_1_and_of_an_ema_its_response():
    noise = white_noise(weights=100)
    _, flat = probes.power_spectrum(3 * noise + 7)
    # 100 weights and about 16 independent segments: 2.5 % a frequency; the mean is taken out
    assert np.abs(flat[1:] - 1).max() < 6 * 0.025
    alpha = 0.1
    f, power = probes.power_spectrum(filtered(noise, alpha))
    omega, p = 2 * np.pi * f, 1 - alpha
    response = alpha**2 / (1 + p**2 - 2 * p * np.cos(omega)) / (alpha / (2 - alpha))
    high = f > 0.05  # where the window's width no longer smears the slope
    np.testing.assert_allclose(power[high], response[high], rtol=0.15)
    assert power[1] > 10


def test_lag_one_autocorrelation():
    x = white_noise(400, 3)
    for column, rho in enumerate(probes.lag_one_autocorrelation(torch.from_numpy(x))):
        c = x[:, column] - x[:, column].mean()
        expected = sum(a * b for a, b in itertools.pairwise(c)) / sum(a * a for a in c)
        assert rho == pytest.approx(expected, rel=1e-10)
    rho = probes.lag_one_autocorrelation(white_noise())
    assert np.abs(rho).max() < 5 / 64  # five deviations of 1/sqrt(4096)
    rho = probes.lag_one_autocorrelation(filtered(white_noise(), 0.2))
    np.testing.assert_allclose(rho.mean(), 0.8, atol=0.01)
    alternating = np.tile([[1.0], [-1.0]], (500, 1))
    assert probes.lag_one_autocorrelation(alternating)[0] == pytest.approx(-0.999)


def test_signal_to_noise():
    x = np.array([[1.0, -4.0], [3.0, 2.0], [5.0, -4.0]])
    deviation = [math.sqrt(8 / 3), math.sqrt(8)]
    np.testing.assert_allclose(probes.signal_to_noise(x), [3 / deviation[0], 2 / deviation[1]])
    snr = probes.signal_to_noise(torch.from_numpy(white_noise(weights=400) - 0.5))
    np.testing.assert_allclose(np.median(snr), 0.5, rtol=0.02)
    floor = np.median(probes.signal_to_noise(white_noise(weights=2000)))
    assert floor == pytest.approx(0.6745 / 64, rel=0.08)  # of nothing at all


def test_gradients_that_never_change():
    x = white_noise(64, 3)
    x[:, 1] = 2.0
    for measure in (probes.lag_one_autocorrelation, probes.signal_to_noise):
        assert np.isnan(measure(x)).tolist() == [False, True, False]
    _, power = probes.power_spectrum(x, 16)
    np.testing.assert_allclose(power, probes.power_spectrum(x[:, [0, 2]], 16)[1])
    with pytest.raises(ValueError, match="no gradient changes"):
        probes.power_spectrum(np.ones((64, 2)), 16)


def test_records_of_gradients_that_are_too_short_or_misshapen():
    for measure in (probes.power_spectrum, probes.lag_one_autocorrelation, probes.signal_to_noise):
        for shape in ((5,), (1, 4)):
            with pytest.raises(ValueError, match=r"must be \(steps, weights\)"):
                measure(np.zeros(shape))
    for segment in (1, 33):
        with pytest.raises(ValueError, match=f"from 2 to the 32 steps recorded, not {segment}"):
            probes.power_spectrum(white_noise(32, 2), segment)


# --- All of them -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_a_step_never_waits_for_the_device(name, monkeypatch):
    """Whatever makes the host wait, on a GPU, for a number: none of it within a step."""

    def wait(*_, **__):
        raise AssertionError("this waits for the device")

    model, probe = mixed_network(), EVERY[name]()
    probe.start(model)
    with monkeypatch.context() as patch:
        for method in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__",
                       "nonzero", "__index__"):  # fmt: skip
            patch.setattr(torch.Tensor, method, wait)
        for _ in range(2):
            one_step(model, torch.randn(4, 3, 5, 5))
            probe.step()
    probe.epoch()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("name", EVERY)
def test_a_step_never_synchronises_a_gpu(name):
    model, probe = mixed_network().cuda(), EVERY[name]()
    probe.start(model)
    inputs, targets = torch.randn(4, 3, 5, 5).cuda(), torch.zeros(4, dtype=torch.int64).cuda()
    one_step(model, inputs, targets)
    probe.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one_step(model, inputs, targets)
        probe.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- Are the weights really binary? ------------------------------------------------------------


def test_binary_report_tells_the_layers_apart():
    model = mixed_network()
    state = torch.get_rng_state()
    report = probes.binary_report(model)
    rows = [tuple(row) for row in report.itertuples(index=False)]
    assert [*report.columns] == ["layer", "weight", "quantizer", "values", "binary",
                                 "scaled_binary", "input"]  # fmt: skip
    assert [row[:4] for row in rows] == [
        ("0", "latent", "magnitude_aware_sign", 8),
        ("2", "binary", "", 2),
        ("4", "expert", "ste_sign", 2),
        ("4.gate", "real", "", 8),
        ("6", "latent", "ste_sign", 2),
        ("7", "real", "", 6),
    ]
    assert [row[4:] for row in rows] == [
        (0.0, True, "real"),
        (1.0, True, "ste_sign"),
        (1.0, True, "ste_sign"),
        (0.0, False, "real"),
        (1.0, True, "real"),
        (0.0, False, "real"),
    ]
    assert torch.equal(torch.get_rng_state(), state)


def test_binary_report_does_not_disturb_a_stochastic_network():
    model = nn.Sequential(layers.BinaryLinear(30, 20, weight_quantizer=stochastic_sign))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    report = probes.binary_report(model)
    assert torch.equal(torch.rand(3), expected)
    assert report.loc[0, ["quantizer", "binary"]].tolist() == ["stochastic_sign", 1.0]
    assert model[0].weight.grad is None


def test_binary_report_of_experts_that_are_scaled_each_by_itself():
    conv = layers.ExpertBinaryConv2d(2, 3, 3, experts=2, weight_quantizer=magnitude_aware_sign)
    row = probes.binary_report(conv).loc[0]
    assert (row["values"], row["scaled_binary"], row["binary"]) == (12, True, 0.0)


def test_require_binary():
    model = nn.Sequential(layers.BinaryLinear(9, 8), layers.BinaryLinear(8, 2), nn.Linear(2, 2))
    probes.require_binary(model)
    model[1].set_quantizers(None, None)
    probes.require_binary(model)
    with torch.no_grad():
        model[1].weight[0, 0] = 0.0  # ternary
    with pytest.raises(ValueError, match=r"layer 1 \(binary\): 3 values, 93.8 % of the"):
        probes.require_binary(model)
    with pytest.raises(ValueError, match="layer 1"):
        probes.require_binary(model, scaled=True)
    with layers.quantized_by(model, real_weight), pytest.raises(ValueError, match="not bin") as e:
        probes.require_binary(model)
    assert "layer 0 (latent, real_weight): 72 values" in str(e.value)
    assert "layer 1 (binary)" in str(e.value)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("quantizer", [ste_sign, magnitude_aware_sign, stochastic_sign])
def test_latent_weights_that_are_not_finite_are_not_binary(number, quantizer):
    model = nn.Sequential(layers.BinaryLinear(5, 4, weight_quantizer=quantizer),
                          layers.ExpertBinaryConv2d(1, 2, 2, experts=2))  # fmt: skip
    with torch.no_grad():
        for layer in layers.binary_layers(model):
            layer.weight.view(-1)[-1] = number
    report = probes.binary_report(model)
    report = report[report["weight"] != "real"]
    assert report["binary"].tolist() == [0 if quantizer is magnitude_aware_sign else 0.95, 15 / 16]
    assert not report["scaled_binary"].any()
    for scaled in (False, True):
        with pytest.raises(ValueError, match=r"layer 0 .*; layer 1 .*are NaN or infinite"):
            probes.require_binary(model, scaled=scaled)


def test_require_binary_up_to_a_scale():
    model = nn.Sequential(layers.BinaryConv2d(2, 3, 3, weight_quantizer=magnitude_aware_sign))
    probes.require_binary(model, scaled=True)
    with pytest.raises(ValueError, match=r"layer 0 \(latent, magnitude_aware_sign\): 6 values"):
        probes.require_binary(model)
    with torch.no_grad():
        model[0].weight[1] = 0.0  # a scale of 0 is not binary
    with pytest.raises(ValueError, match="layer 0"):
        probes.require_binary(model, scaled=True)


def test_require_binary_of_a_real_network():
    with pytest.raises(ValueError, match="no binary layer"):
        probes.require_binary(nn.Linear(2, 2))


def test_a_shared_weight_counts_once():
    first, second = layers.BinaryLinear(4, 4), layers.BinaryLinear(4, 4)
    second.weight = first.weight
    probe = probes.FlipRatio()
    probe.start(nn.Sequential(first, second))
    assert sum(probe.sizes) == 16


def test_a_saved_flip_count_does_not_change_afterwards():
    layer = layers.BinaryLinear(2, 2)
    probe = probes.FlipRatio()
    probe.start(layer)
    with torch.no_grad():
        layer.weight.neg_()
    probe.step()
    state = probe.state_dict()
    probe.epoch()
    assert state["flips"].item() == 4


def test_saved_counts_of_inputs_do_not_change_afterwards():
    layer = layers.BinaryLinear(2, 1, input_quantizer=ste_sign)
    with probes.ActivationSaturation() as probe:
        probe.start(layer)
        layer(torch.tensor([[2.0, 0.5]]))
        state = probe.state_dict()
        probe.epoch()
    assert (state["above"].item(), state["seen"].item()) == (1, 2)


def test_channel_magnitudes_are_means_over_everything_but_the_output_channels():
    weight = torch.randn(3, 2, 5, 5, requires_grad=True)
    found = probes.channel_magnitudes(weight)
    expected = [np.abs(kernel).mean() for kernel in weight.detach().numpy()]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not found.requires_grad
    assert probes.channel_magnitudes(weight.bfloat16()).dtype == torch.float32


def test_parametrized_weights_are_looked_at_as_they_are_now():
    model = nn.Sequential(
        layers.BinaryLinear(20, 30), nn.BatchNorm1d(30), layers.BinaryLinear(30, 3)
    )
    plain = copy.deepcopy(model)
    nn.utils.parametrizations.weight_norm(model[0])
    watched = [probes.FlipRatio(per_layer=True), probes.C2I()]
    for probe in watched:
        probe.start(model)
    with torch.no_grad():
        model[0].parametrizations.weight.original1[:10] *= -1  # a third of the layer's 600
        assert torch.equal(model[0].weight[:10] < 0, plain[0].weight[:10] >= 0)
    for probe in watched:
        probe.step()
    assert watched[0].epoch() == {"flip_ratio": 200 / 690, "flip_ratio/0": 200 / 600,
                                  "flip_ratio/2": 0}  # fmt: skip
    assert watched[1].epoch() == {"c2i": 490 / 690}


def test_a_transformer_that_reads_the_weights_itself_is_not_binary():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder.linear1 = layers.BinaryLinear(8, 16, bias=True)
    with pytest.raises(ValueError, match="the model has a fast path"):
        probes.require_binary(encoder)
    encoder.activation_relu_or_gelu = 0
    probes.require_binary(encoder)
    encoder = nn.TransformerEncoderLayer(8, 2, 16)  # with the batch second, torch calls them
    encoder.linear1 = layers.BinaryLinear(8, 16, bias=True)
    probes.require_binary(encoder)


def test_a_constant_gradient_has_no_correlation_whatever_its_value():
    gradients = np.stack([np.full(300, 0.1), np.random.default_rng(0).normal(size=300)], axis=1)
    for measure in (probes.lag_one_autocorrelation, probes.signal_to_noise):
        assert np.isnan(measure(gradients)).tolist() == [True, False]
    alone = probes.power_spectrum(gradients[:, 1:], 64)
    np.testing.assert_allclose(probes.power_spectrum(gradients, 64), alone, rtol=1e-12)


def test_the_inputs_of_layers_that_share_a_weight_are_all_measured():
    first, second = (layers.BinaryLinear(4, 4, input_quantizer=ste_sign) for _ in range(2))
    second.weight = first.weight
    model = nn.Sequential(first, second)
    probe = probes.ActivationSaturation(per_layer=True)
    probe.start(model)
    model(torch.full((2, 4), 3.0))
    assert {"activation_saturation/0", "activation_saturation/1"} < set(probe.epoch())


@pytest.mark.parametrize("probe", [probes.C2I, probes.ActivationSaturation])
def test_the_state_of_another_network_is_refused(probe):
    small, large = (
        nn.Sequential(*[layers.BinaryLinear(1, 1, input_quantizer=ste_sign) for _ in range(n)])
        for n in (1, 3)
    )
    made = [probe(), probe()]
    for each, model in zip(made, (small, large), strict=True):
        each.start(model)
    with pytest.raises(ValueError, match="of another network"):
        made[1].load_state_dict(made[0].state_dict())


def test_no_weights_have_no_share():
    with pytest.raises(ValueError, match="there are no weights"):
        probes.share_above([], 0.5)


def test_a_network_without_layers_has_an_empty_report():
    report = probes.binary_report(nn.ReLU())
    assert report.empty
    assert [*report.columns] == [*probes.binary_report(nn.Linear(2, 2)).columns]
    with pytest.raises(ValueError, match="no binary layer"):
        probes.require_binary(nn.ReLU())


@pytest.mark.parametrize("part", ["linear1", "linear2"])
def test_a_single_binary_part_of_a_transformers_fast_path_is_found(part):
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True))
    setattr(encoder[0], part, layers.BinaryLinear(8, 8, bias=True))
    with pytest.raises(ValueError, match="0 has a fast path"):
        probes.require_binary(encoder)
