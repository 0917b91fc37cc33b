"""Steps replayed as a CUDA graph: a tape plays its part on a CPU, CUDA where there is one."""

import contextlib
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tape import Tape, waits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy import ScaledLoss

from bnnbook import binarize, data, graphs, layers, optim, probes, training
from bnnbook.experiments import (
    alexnet,
    binaryconnect,
    bulat2021,
    helwegen2019,
    liu2021,
    martinez2020,
    quist2023,
)
from bnnbook.models import binaryconnect_mlp, binarynet, birealnet20, expertnet

CPU = torch.device("cpu")


@pytest.fixture
def tape(monkeypatch):
    """Let a tape play each graph's part; the list holds those that were recorded."""
    tapes = []

    def record(function, device):
        tapes.append(Tape(function, device))
        return tapes[-1]

    monkeypatch.setattr(graphs, "Graph", record)
    monkeypatch.setattr(graphs, "is_wanted", lambda device: True)
    return tapes


def toy(shape, n=32):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (n,), generator=generator)
    return data.Dataset(images, labels, images[:8], labels[:8], ("a", "b", "c"), "toy")


def mlp():
    model = binaryconnect_mlp(16, (8, 8), 3, weights="stochastic", dropout=0.3)
    optimizer = torch.optim.Adam(optim.glorot_scaled_groups(model, 0.01, 1))
    optim.clip_after_step(optimizer, model)
    return model, [optimizer], (1, 4, 4)


def bop():
    model = binarynet(3, widths=(4, 8), hidden=(16,), image_size=16, weight_quantizer=None)
    binary, real = optim.split_parameters(model)
    return model, [optim.Bop(binary, gamma=0.1, threshold=0), torch.optim.Adam(real)], (3, 16, 16)


def cascade():
    model = birealnet20(3, widths=(4, 8), convolutions=(2, 2), weight_quantizer=None)
    binary, real = optim.split_parameters(model)
    optimizers = [optim.CascadedEMA(binary, 0.1, 0.1), torch.optim.SGD(real, 0.1, 0.9)]
    return model, optimizers, (3, 12, 12)


def experts():
    model = expertnet(3, blocks=(1,), width=8, groups=(1,), experts=2)
    return model, [torch.optim.Adam(model.parameters(), 0.01)], (3, 12, 12)


def fit(setting, device="cpu", epochs=3, graph=True, **options):
    torch.manual_seed(0)
    model, optimizers, shape = setting()
    model.to(device)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizers[0], 0.5)
    options = {"loss": layers.SquaredHingeLoss(), "probes": [probes.FlipRatio()]} | options
    history = training.train(
        model, toy(shape), optimizers, epochs=epochs, batch_size=8, schedulers=[schedule],
        device=device, graph=graph, **{"augment": data.crop_flip(2)} | options,
    )  # fmt: skip
    return model, [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]


def assert_same(first, second):
    assert first[1] == second[1]
    for name, value in first[0].state_dict().items():
        assert torch.equal(value, second[0].state_dict()[name]), name


@pytest.mark.parametrize("setting", [mlp, bop, cascade, experts])
def test_replayed_steps_train_the_same_network(setting, tape):
    model, rows = fit(setting)
    assert len(tape) == 1
    assert all(parameter.grad is None for parameter in model.parameters())  # nothing left behind
    assert_same((model, rows), fit(setting, graph=False))


def interrupted(path, press_ctrl_c_at, device):
    """Train with a checkpoint, pressing Ctrl-C after six steps, and go on."""
    with pytest.MonkeyPatch.context() as patch:
        press_ctrl_c_at(6, patch)
        with pytest.raises(KeyboardInterrupt):
            fit(mlp, device, checkpoint=path)
    return fit(mlp, device, checkpoint=path)


def test_a_graph_is_recorded_after_the_checkpoint_was_read(tape, tmp_path, press_ctrl_c_at):
    assert_same(interrupted(tmp_path / "run.pt", press_ctrl_c_at, "cpu"), fit(mlp))
    assert len(tape) == 3


def test_recording_draws_nothing_and_leaves_the_statistics(tape, monkeypatch):
    def state(run):
        return [b.clone() for b in run.model.buffers()] + [torch.get_rng_state()]

    def look(run):
        before = state(run)
        record(run)
        assert all(map(torch.equal, before, state(run)))

    record = training._Run.record_graph
    monkeypatch.setattr(training._Run, "record_graph", look)
    fit(mlp, epochs=1)
    assert len(tape) == 1


RUNS = [
    (alexnet, "pooling", "overlapping"),
    (binaryconnect, "table2", "stochastic"),
    (bulat2021, "experts", "two"),
    (helwegen2019, "figure1", "middle"),
    (liu2021, "two_step", "two-step"),
    (martinez2020, "pieces", "full"),
    (quist2023, "order", "second-cosine"),
]


@pytest.mark.parametrize(("paper", "name", "variant"), RUNS)
def test_experiments_can_be_replayed(paper, name, variant, tape, monkeypatch):
    short = replace(paper.RECIPES[name]["small"], batch_size=400, epochs=1)
    monkeypatch.setitem(paper.RECIPES, name, {"small": short})
    replayed = getattr(paper, name)(variant, device="cpu")
    assert tape
    monkeypatch.setattr(graphs, "is_wanted", lambda device: False)
    stepped = getattr(paper, name)(variant, device="cpu")
    assert (replayed.metrics, replayed.arrays) == (stepped.metrics, stepped.arrays)


def counting_loss():
    """Return a loss that grows with each call, by a number of Python's."""
    calls = []

    def loss(outputs, targets):
        calls.append(outputs)
        return nn.functional.cross_entropy(outputs, targets) * len(calls)

    return loss


def test_what_python_counts_is_refused_and_without_the_check_trains_otherwise(tape, monkeypatch):
    with pytest.raises(graphs.GraphError, match="train with graph=False"):
        fit(mlp, loss=counting_loss())
    monkeypatch.setattr(graphs, "MOST_OFF", math.inf)
    replayed, stepped = (fit(mlp, loss=counting_loss(), graph=g)[1] for g in (True, False))
    assert replayed != stepped  # so the tape does replay


def test_an_augmentation_that_draws_in_python_is_refused(tape):
    draw = random.Random(0)
    with pytest.raises(graphs.GraphError):
        fit(mlp, augment=lambda images: images + 99 * draw.random() * (images > 127))


def test_the_tape_refuses_what_waits(tape):
    def mean_of_positive(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets) + outputs[outputs > 0].mean()

    with pytest.raises(RuntimeError, match="capturing"):
        fit(mlp, loss=mean_of_positive)


@pytest.mark.parametrize(("paper", "name", "variant"), RUNS)
def test_experiments_keep_no_result_of_a_step(paper, name, variant, monkeypatch):
    """It would belong to that step's stream, and the next training of the network to another."""
    held, step = [], training.train_step

    def look(run, index):
        step(run, index)
        held.append(graphs.is_held(run.model))

    monkeypatch.setattr(training, "train_step", look)
    short = replace(paper.RECIPES[name]["small"], batch_size=400, epochs=1)
    monkeypatch.setitem(paper.RECIPES, name, {"small": short})
    getattr(paper, name)(variant, device="cpu")
    assert held
    assert not any(held)


class NeverWaits(TorchDispatchMode):
    """Fails where a step would wait for a GPU; torch keeps Adam's step counters on the CPU."""

    def __init__(self, optimizers):
        super().__init__()
        self.optimizers, self.operations = optimizers, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        counters = [id(state.get("step")) for o in self.optimizers for state in o.state.values()]
        assert not waits(operation, args, kwargs) or id(args[0]) in counters, operation
        self.operations += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("setting", [mlp, bop, cascade])
def test_no_step_waits_for_the_device(setting, monkeypatch):
    step, counts = training.train_step, []

    def watched(run, index):
        with NeverWaits(run.optimizers) as mode:
            step(run, index)
        counts.append(mode.operations)

    monkeypatch.setattr(training, "train_step", watched)
    looks = [probes.FlipRatio(per_layer=True, per_step=True), probes.C2I(), probes.Saturation(),
             probes.ActivationSaturation(), probes.GradientSample(4, 8)]  # fmt: skip
    fit(setting, probes=looks)
    assert len(counts) == 12
    assert min(counts) > 50


def test_steps_that_a_probe_looks_into_are_not_replayed(tape, monkeypatch):
    replays, replay = [], Tape.__call__
    monkeypatch.setattr(Tape, "__call__", lambda self: replays.append(1) or replay(self))
    rows = []
    for graph in (True, False):
        seen = [probes.ActivationSaturation(limit=0.5, every=3, per_layer=True)]
        rows.append(fit(bop, probes=seen, graph=graph)[1])
    assert rows[0] == rows[1]
    assert 0 < rows[0][0]["activation_saturation"] < 1
    assert len(replays) == 1 + 2 * 3  # the check, and of each epoch's four steps two


def hooked(model):
    model[0].register_forward_hook(lambda *_: None)


def hooked_parameter(model):
    next(model.parameters()).register_post_accumulate_grad_hook(lambda _: None)


@pytest.mark.parametrize("hang", [hooked, hooked_parameter])
def test_a_model_with_hooks_is_trained_step_by_step(hang, tape):
    def setting():
        made = mlp()
        hang(made[0])
        return made

    fit(setting, epochs=1)
    assert tape == []


def test_a_network_of_which_a_result_is_kept_is_trained_step_by_step(tape):
    model, optimizers, shape = mlp()
    kept = model(torch.zeros(2, *shape))
    with pytest.warns(UserWarning, match="still kept"):
        fit(lambda: (model, optimizers, shape), epochs=1)
    assert tape == []
    del kept
    fit(lambda: (model, optimizers, shape), epochs=1)
    assert len(tape) == 1


def test_a_result_in_a_reference_cycle_is_not_kept(tape):
    def setting():
        made = mlp()
        kept = [made[0](torch.zeros(2, 1, 4, 4))]
        kept.append(kept)
        return made

    fit(setting, epochs=1)
    assert len(tape) == 1


def test_the_probes_with_hooks_see_every_step(tape):
    sample = probes.GradientSample(weights=4, steps=100)
    fit(mlp, probes=[sample])
    assert all((g != 0).any(1).all() for g in sample.gradients().values())
    assert tape == []


def test_the_environment_turns_graphs_off(monkeypatch):
    gpu = torch.device("cuda")
    assert graphs.is_wanted(gpu)
    monkeypatch.setenv("BNNBOOK_GRAPHS", "0")
    assert not graphs.is_wanted(gpu)
    assert not graphs.is_wanted(CPU)


@pytest.fixture
def cuda(monkeypatch):
    """Names of torch.cuda that a graph needs, doing nothing; a context that stands for capture."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {"CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
                 "Stream": lambda device: stream, "current_stream": lambda: stream,
                 "device": contextlib.nullcontext, "stream": contextlib.nullcontext,
                 "graph": lambda graph, stream: contextlib.nullcontext()}  # fmt: skip
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)


def test_a_function_is_warmed_up_recorded_and_then_only_replayed(cuda):
    calls = []
    graph = graphs.Graph(lambda: calls.append(1) or len(calls), CPU)
    assert graph() == graph() == len(calls) == graphs.WARM_UP + 1


def test_where_a_graph_is_refused_the_error_says_what_to_do(cuda, monkeypatch):
    @contextlib.contextmanager
    def refuse(graph, stream):
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.raises(graphs.GraphError, match=r"capturing.*start anew with BNNBOOK_GRAPHS=0"):
        graphs.Graph(lambda: None, CPU)


def test_a_gpu_without_room_is_no_refusal(cuda, monkeypatch):
    """With less at once, or later, the same step can be recorded."""

    @contextlib.contextmanager
    def full(graph, stream):
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setattr(torch.cuda, "graph", full)
    with pytest.raises(torch.OutOfMemoryError):
        graphs.Graph(lambda: None, CPU)


def test_what_fails_in_recording_leaves_the_statistics(tape, monkeypatch):
    torch.manual_seed(0)
    made = mlp()
    before = [b.clone() for b in made[0].buffers()]
    with pytest.raises(RuntimeError, match="capturing"):
        fit(lambda: made, loss=lambda outputs, targets: outputs[outputs > 0].mean())
    assert all(map(torch.equal, before, made[0].buffers()))


def test_a_run_that_is_over_records_no_graph(tape, tmp_path):
    whole = fit(mlp, checkpoint=tmp_path / "run.pt")
    del tape[:]
    model, rows = fit(mlp, checkpoint=tmp_path / "run.pt")
    assert tape == []
    assert rows == whole[1]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_loss_may_learn_too(tape):
    losses = []
    for graph in (True, False):
        loss = ScaledLoss()

        def setting(loss=loss):
            model, optimizers, shape = mlp()
            return model, [*optimizers, torch.optim.SGD(loss.parameters(), 0.1)], shape

        losses.append((loss, fit(setting, loss=loss, graph=graph)[1]))
    assert_same(*losses)
    assert losses[0][0].calls == 12  # neither those of the recording nor of its check
    assert losses[0][0].scale != 1


class AtTheEnd(probes.FlipRatio):
    """A probe that changes something of the model after each epoch."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def start(self, model):
        self.model = model
        super().start(model)

    def epoch(self):
        self.change(self.model)
        return super().epoch()


def anneal(model):
    next(layers.binary_layers(model)).weight_quantizer = binarize.ste_sign


def freeze(model):
    next(layers.binary_layers(model)).weight.requires_grad_(False)


def no_dropout(model):
    next(m for m in model.modules() if isinstance(m, nn.Dropout)).p = 0.0


def move(model):
    weight = next(layers.binary_layers(model)).weight
    weight.data = weight.data.clamp(-1, 1)


@pytest.mark.parametrize(("change", "name"), [
    (anneal, "weight_quantizer of"), (freeze, "weight has"), (no_dropout, "p of"),
    (move, "weight has"),
])  # fmt: skip
def test_a_replay_that_would_not_know_of_a_change_is_refused(change, name, tape):
    """And without the check it trains another network, so there is something to refuse."""
    with pytest.raises(graphs.GraphError, match=rf"{name}.*graph=False"):
        fit(mlp, probes=[AtTheEnd(change)])
    assert len(fit(mlp, probes=[AtTheEnd(change)], graph=False)[1]) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Run, "check_replay", lambda run: None)
        replayed = fit(mlp, probes=[AtTheEnd(change)])
    with pytest.raises(AssertionError):
        assert_same(replayed, fit(mlp, probes=[AtTheEnd(change)], graph=False))


def test_what_the_first_pass_finds_out_and_the_mode_of_evaluation_are_no_change(tape, tmp_path):
    class Once(nn.Module):
        scale = None

        def forward(self, x):
            self.scale = self.scale or 0.5
            return self.scale * x

    def setting():
        model, optimizers, shape = mlp()
        return nn.Sequential(model, Once()), optimizers, shape

    options = {"probes": [AtTheEnd(nn.Module.eval)], "checkpoint_minutes": 0}
    replayed = fit(setting, checkpoint=tmp_path / "run.pt", **options)
    assert_same(replayed, fit(setting, graph=False, **options))


def test_a_loss_with_a_parameter_of_the_same_name_hides_no_change_of_the_network(tape):
    class Scaling(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network, self.scale = network, nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * self.network(x)

    def setting():
        model, optimizers, shape = mlp()
        return Scaling(model), optimizers, shape

    def replace_scale(model):
        model.scale.data = 2 * model.scale.data

    with pytest.raises(graphs.GraphError, match="scale has changed"):
        fit(setting, loss=ScaledLoss(), probes=[AtTheEnd(replace_scale)])


def test_what_a_forward_pass_sets_is_refused(tape):
    class Counting(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x

    def setting():
        model, optimizers, shape = mlp()
        return nn.Sequential(model, Counting()), optimizers, shape

    with pytest.raises(graphs.GraphError, match="calls of 1 has changed"):
        fit(setting)


def test_a_hook_that_replaces_a_tensor_is_noticed_within_the_first_epoch(tape):
    def setting():
        model, (optimizer,), shape = mlp()
        optimizer.register_step_post_hook(lambda *_: move(model))
        return model, [optimizer], shape

    with pytest.raises(graphs.GraphError, match="weight has changed"):
        fit(setting, epochs=1)


# --- On a GPU ----------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@needs_cuda
@pytest.mark.parametrize("setting", [mlp, bop, cascade, experts])
def test_a_cuda_graph_trains_the_same_network(setting):
    assert_same(fit(setting, "cuda"), fit(setting, "cuda", graph=False))


@needs_cuda
@pytest.mark.parametrize(("paper", "name", "variant"), [*RUNS, (bulat2021, "gate", "sigmoid")])
def test_experiments_are_recorded_as_cuda_graphs(paper, name, variant, monkeypatch):
    """With mixup, which is drawn in the graph; a step that cannot be recorded is a GraphError."""
    of_paper = {"mixup": 0.2, "epochs": 3} if paper is bulat2021 else {"epochs": 1}
    short = replace(paper.RECIPES[name]["small"], batch_size=400, **of_paper)
    monkeypatch.setitem(paper.RECIPES, name, {"small": short})
    record = getattr(paper, name)(variant, device="cuda")
    assert all(math.isfinite(value) for value in record.metrics.values())


@needs_cuda
def test_a_run_with_a_cuda_graph_resumes(tmp_path, press_ctrl_c_at):
    assert_same(interrupted(tmp_path / "run.pt", press_ctrl_c_at, "cuda"), fit(mlp, "cuda"))
