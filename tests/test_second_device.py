"""The library on a second device: nothing meets a tensor of the CPU, and no number changes."""

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
import toy
from matplotlib.figure import Figure
from tape import Tape, waits
from torch import nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from bnnbook import (
    binarize,
    data,
    experiments,
    graphs,
    inference,
    layers,
    optim,
    plots,
    probes,
    training,
)
from bnnbook.models import (
    binaryconnect_mlp,
    binarynet,
    birealnet20,
    expertnet,
    reactnet_small,
    summary,
)

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch knows no devices written in Python", allow_module_level=True)
if torch.cuda.is_available():  # torch would take the second device's streams for those of CUDA
    pytest.skip("CUDA itself is tested in the other files", allow_module_level=True)

from second_device import CPU, DEVICE, Second


@pytest.fixture(autouse=True)
def choice(monkeypatch):
    """Let the library, which knows CPUs and CUDA, be asked for the second device."""
    choose = training.choose_device

    def choose_also(device=None):
        return DEVICE if torch.device(device or "cpu").type == DEVICE.type else choose(device)

    monkeypatch.setattr(training, "choose_device", choose_also)


@pytest.fixture
def tape(monkeypatch):
    """Let a tape play each graph's part; the list holds those that were recorded."""
    tapes = []
    monkeypatch.setattr(graphs, "Graph", lambda *made: tapes.append(Tape(*made)) or tapes[-1])
    monkeypatch.setattr(graphs, "is_wanted", lambda device: device.type == DEVICE.type)
    return tapes


@pytest.fixture
def default():
    """A function that makes a device torch's default; after the test it is the CPU again."""
    yield torch.set_default_device
    torch.set_default_device(None)


# --- The device itself -------------------------------------------------------------------------


@pytest.mark.parametrize("meet", [
    lambda here, there: here + there,
    lambda here, there: here.add_(there),
    lambda here, there: torch.cat([here, there]),
    lambda here, there: nn.functional.linear(here[None], there[None]),
    lambda here, there: torch.where(here > 0, here, there),
])  # fmt: skip
def test_tensors_on_two_devices_do_not_meet(meet):
    with pytest.raises(RuntimeError, match="on the same device, but found at least two"):
        meet(torch.ones(3, device=DEVICE), torch.ones(3, device=CPU))


def test_what_a_gpu_allows_is_allowed():
    here = torch.arange(6.0, device=DEVICE).view(2, 3)
    assert (here + torch.tensor(1.0)).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert here[torch.tensor([1])].tolist() == [[3, 4, 5]]
    with pytest.raises(RuntimeError, match="on the same device"):
        torch.ones(2)[torch.zeros(1, dtype=torch.int64, device=DEVICE)]
    here.copy_(torch.zeros(2, 3))
    assert here.device == DEVICE
    assert here.cpu().equal(torch.zeros(2, 3))


def test_numpy_and_a_cpus_generator_have_no_part_in_it():
    here = torch.ones(3, device=DEVICE)
    for use in (lambda tensor: tensor.numpy(), np.asarray):
        with pytest.raises(TypeError, match="can't convert"):
            use(here)
    generator = torch.Generator().manual_seed(0)
    for draw in (partial(torch.randperm, 3), partial(torch.rand, 3)):
        with pytest.raises(RuntimeError, match="device type for generator"):
            draw(generator=generator, device=DEVICE)


def test_a_network_trains_on_it_as_on_the_cpu():
    results = []
    for device in (CPU, DEVICE):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
        images = torch.randn(5, 3, 8, 8)
        net.to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(net.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            net(images.to(device)).square().mean().backward()
            optimizer.step()
        assert {p.grad.device for p in net.parameters()} == {device}
        results.append([value.tolist() for value in net.state_dict().values()])
    assert results[0] == results[1]


# --- Experiments -------------------------------------------------------------------------------

# One variant of each; what has no small scale, or runs as another one does, is left out.
SAME = {"table2_svhn", "experts_cifar100", "steps_long", "section52", "rates", "decay", "race"}
RUNS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": (module, name, list(variants)[-1])
    for module in experiments.MODULES for name, variants in module.VARIANTS.items()
    if name not in SAME and "small" in module.RECIPES[name] and not name.startswith("alphas")
}  # fmt: skip
# Hooks, or trainings of one epoch each, are not worth a graph.
STEP_BY_STEP = {"alexnet.figure1", "quist2023.spectra", "beyond.memory"}


def short_run(run: str, device):
    """Return the numbers of an experiment with few steps."""
    module, name, variant = RUNS[run]
    recipe = module.RECIPES[name]["small"]
    short = {"epochs": 2 if name.startswith("steps") else 1,
             "batch_size": min(400, getattr(recipe, "train_images", None) or 400)}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.RECIPES, name, {"small": replace(recipe, **short)})
        record = getattr(module, name)(variant, device=device)
    return record.metrics, record.arrays, toy.without_time(training.History(record.history))


on_the_cpu = cache(partial(short_run, device="cpu"))


@pytest.mark.parametrize("run", RUNS)
def test_experiments_give_the_same_numbers_on_another_device(run, tape):
    assert short_run(run, DEVICE) == on_the_cpu(run)
    assert bool(tape) == (run not in STEP_BY_STEP)


DRAWS = ("uniform_", "normal_", "bernoulli_", "random_")


class MakesNothingElsewhere(TorchDispatchMode):
    """Fails where a tensor is made on the second device; torch's Adam counts its steps on it."""

    number = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert (kwargs or {}).get("device") != DEVICE, operation
        name = operation._schema.name.removeprefix("aten::")
        assert name not in DRAWS or not isinstance(args[0], Second), operation
        self.number += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("run", RUNS)
def test_another_default_device_changes_nothing(run, default):
    expected = on_the_cpu(run)
    default(DEVICE)
    with MakesNothingElsewhere():
        assert short_run(run, CPU) == expected


@pytest.mark.parametrize("run", ["alexnet.lrn", "helwegen2019.figure1", "liu2021.optimizer"])
def test_a_gpu_may_be_the_default_device(run, default):
    expected = on_the_cpu(run)
    default(DEVICE)
    assert short_run(run, DEVICE) == expected


def test_another_default_device_leaves_the_draws(default):
    images, labels = torch.zeros(9, 1, 4, 4, dtype=torch.uint8), torch.arange(9)
    dataset = data.Dataset(images, labels, images, labels, ("a",) * 9, "toy")

    def drawn():
        generator = torch.Generator().manual_seed(0)
        batches = [batch for _, batch in data.batches(images, labels, 3, generator)]
        return [training.epoch_order(9, 1, 2), *batches, dataset.hold_out(4, seed=3).train_labels]

    expected = drawn()
    default(DEVICE)
    assert all(map(torch.equal, drawn(), expected))


RULES = {
    "CascadedEMA": partial(optim.CascadedEMA, alpha=0.1, gamma=0.1),
    "Bop": partial(optim.Bop, gamma=0.1, threshold=0.01),
    "LatentSGD": partial(optim.LatentSGD, lr=0.1, gamma=0.1),
    "CounterSGD": partial(optim.CounterSGD, lr=0.5, bits=4),
    "RankedFlips": partial(optim.RankedFlips, fraction=0.1),
}


@pytest.mark.parametrize(("name", "fused"), [*((name, False) for name in RULES), ("Bop", True)])
def test_a_step_stays_where_its_weights_are(name, fused, default, monkeypatch):
    monkeypatch.setattr(optim, "_compiled", lambda update: update)
    weight = nn.Parameter(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    optimizer = RULES[name]([weight])
    optimizer.param_groups[0]["fused"] = fused
    default(DEVICE)
    with MakesNothingElsewhere() as mode:
        for _ in range(3):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
    assert mode.number > 10


def test_a_quantizer_is_drawn_whatever_the_default_device(default):
    expected = plots.quantizer(binarize.ste_sign, Figure().add_subplot())
    default(DEVICE)
    drawn = plots.quantizer(binarize.ste_sign, Figure().add_subplot())
    for line, other in zip(expected.lines, drawn.lines, strict=True):
        assert np.array_equal(line.get_xydata(), other.get_xydata())


# --- Parts of the library -----------------------------------------------------------------------


def looks():
    return [probes.FlipRatio(per_layer=True, per_step=True), probes.C2I(), probes.Saturation(),
            probes.ActivationSaturation(), probes.GradientSample(4, 30)]  # fmt: skip


def fit(device, **options):
    torch.manual_seed(0)
    model = binaryconnect_mlp(16, (8, 8), 3, weights="stochastic", dropout=0.3).to(device)
    optimizer = torch.optim.Adam(optim.glorot_scaled_groups(model, 0.01, 1))
    optim.clip_after_step(optimizer, model)
    options = {"epochs": 3, "batch_size": 10, "device": device, "graph": True} | options
    history = training.train(model, toy.dataset(), optimizer, augment=data.crop_flip(1), **options)
    return model.cpu(), history


def test_a_run_with_probes_is_that_of_the_cpu():
    results = []
    for device in (CPU, DEVICE):
        seen = looks()
        toy_run = fit(device, probes=seen)
        gradients = {name: g.tolist() for name, g in seen[-1].gradients().items()}
        results.append((toy_run, seen[0].history().tolist(), gradients))
    toy.assert_same(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


@pytest.mark.parametrize("steps", [5, 7])
def test_a_run_resumes_on_it(steps, tmp_path, tape):
    path = tmp_path / "run.pt"
    whole = fit(DEVICE, probes=[probes.FlipRatio(), toy.StopAfter(-1)])
    with pytest.raises(KeyboardInterrupt):
        fit(DEVICE, checkpoint=path, probes=[probes.FlipRatio(), toy.StopAfter(steps)])
    resumed = fit(DEVICE, checkpoint=path, probes=[probes.FlipRatio(), toy.StopAfter(-1)])
    toy.assert_same(resumed, whole)
    assert len(tape) == 3


class CountsWaits(TorchDispatchMode):
    """Counts what Python waits for; torch keeps Adam's step counters on the CPU."""

    number = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        on_cpu = operation is torch.ops.aten._local_scalar_dense.default and args[0].device == CPU
        self.number += waits(operation, args, kwargs) and not on_cpu
        return operation(*args, **(kwargs or {}))


def test_an_epoch_waits_as_often_whatever_its_number_of_steps():
    counts = []
    for batch_size in (25, 10, 5):  # 2, 5 and 10 steps
        with CountsWaits() as mode:
            fit(DEVICE, epochs=1, batch_size=batch_size, probes=looks())
        counts.append(mode.number)
    assert 0 < counts[0] == counts[1] == counts[2]


NETWORKS = {
    "binarynet": (partial(binarynet, widths=(4, 8), hidden=(70,), image_size=8), (3, 8, 8)),
    "birealnet20": (partial(birealnet20, widths=(4, 8), convolutions=(2, 2)), (3, 8, 8)),
    "reactnet_small": (partial(reactnet_small, channels=(8, 8, 16)), (3, 8, 8)),
    "expertnet": (partial(expertnet, blocks=(1,), width=8, groups=(1,), experts=2), (3, 16, 16)),
}


@pytest.mark.parametrize("multiply", ["bits", "floats"])
@pytest.mark.parametrize("name", NETWORKS)
def test_packed_networks_keep_their_outputs(name, multiply, default):
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model, images = build(weight_quantizer=binarize.ste_sign), torch.randn(9, *shape)
    model.train()(images)
    expected = model.eval()(images)
    on_device = model.to(DEVICE)
    assert (
        inference.pack_network(on_device, multiply=multiply)(images.to(DEVICE))
        .cpu()
        .equal(expected)
    )
    default(DEVICE)
    packed = inference.pack_network(on_device, multiply=multiply)
    assert packed(images.to(DEVICE)).cpu().equal(expected)
    assert inference.real_layers(packed)
    assert inference.pack_network(model.to(CPU), multiply=multiply)(images).equal(expected)


def test_thresholds_of_a_function_on_a_device(default):
    norm = nn.BatchNorm1d(5).eval()
    nn.init.normal_(norm.weight)
    expected = [x.tolist() for x in inference.thresholds(norm, 9, (5,))]
    norm.to(DEVICE)
    assert [x.tolist() for x in inference.thresholds(norm, 9, (5,), DEVICE)] == expected
    default(DEVICE)
    assert [x.tolist() for x in inference.thresholds(norm, 9, (5,))] == expected


class Learned(nn.Module):
    """A quantizer with a parameter, which moves with its layer."""

    def __init__(self):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        return binarize.ste_sign(x - self.threshold)


def test_what_looks_at_a_network_looks_on_its_device():
    dataset = toy.dataset()
    torch.manual_seed(0)
    model = nn.Sequential(layers.BinaryConv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(),
                          layers.BinaryLinear(16, 3, weight_quantizer=Learned()))  # fmt: skip

    def seen():
        training.reestimate_batchnorm(model, dataset.train_images, batch_size=10)
        error = training.evaluate(model, dataset.test_images, dataset.test_labels)
        return [error, str(summary(model, (1, 4, 4))), str(probes.binary_report(model)),
                training.predict(model, dataset.test_images).tolist(),
                probes.share_above([model[0].weight], 0.3)]  # fmt: skip

    on_cpu = seen()
    model.to(DEVICE)
    assert seen() == on_cpu
