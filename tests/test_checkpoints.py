"""A run in a file: whole or named as damaged, and continued by no other run."""

import dataclasses
import io
import os
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import MultiStepLR, SequentialLR
from toy import (
    ScaledLoss,
    StopAfter,
    assert_same,
    dataset,
    flip_setting,
    run,
    setting,
    without_time,
)

from bnnbook import checkpoints, data, optim, probes, training
from bnnbook.binarize import sign, ste_sign
from bnnbook.checkpoints import CheckpointError
from bnnbook.layers import BinaryLinear


def with_a_bit_turned(content: bytes) -> bytes:
    """Change a bit in the middle of the largest tensor, which torch would load."""
    parts = zipfile.ZipFile(io.BytesIO(content)).infolist()
    tensors = [part for part in parts if "/data/" in part.filename]
    largest = max(tensors, key=lambda part: part.file_size)
    place = largest.header_offset + largest.file_size
    return content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :]


@pytest.mark.parametrize("damage", [
    lambda content: content[:-400],
    lambda content: content[:3],
    lambda content: b"",
    lambda content: bytes(len(content)),
])  # fmt: skip
def test_a_damaged_checkpoint_is_named_and_moved_aside(tmp_path, damage):
    path = tmp_path / "run.pt"
    run(1, checkpoint=path)
    path.write_bytes(damage(path.read_bytes()))
    kept = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"run\.pt.*moved to run\.pt\.corrupt"):
        run(2, checkpoint=path)
    assert not path.exists()
    assert (tmp_path / "run.pt.corrupt").read_bytes() == kept


def test_a_checkpoint_that_has_changed_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "run.pt"
    run(1, checkpoint=path)
    path.write_bytes(with_a_bit_turned(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"has changed since .* its part .*data"):
        run(1, checkpoint=path)
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoints_have_checksums_whatever_torch_is_set_to(tmp_path):
    path = tmp_path / "run.pt"
    torch.serialization.set_crc32_options(False)
    try:
        whole = run(1, checkpoint=path)
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(run(1, checkpoint=path), whole)


def test_a_second_damaged_checkpoint_does_not_replace_the_first(tmp_path):
    path = tmp_path / "run.pt"
    for content in (b"", b"PK"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
            run(1, checkpoint=path)
    assert (tmp_path / "run.pt.corrupt").read_bytes() == b""
    assert (tmp_path / "run.pt.corrupt-2").read_bytes() == b"PK"


@pytest.mark.parametrize("content", [b"print('precious')", b"\x80\x02\x8a\nl\xfc"])
def test_a_file_that_torch_never_wrote_is_left_alone(tmp_path, content):
    path = tmp_path / "program.py"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"of another kind .* name another file"):
        run(1, checkpoint=path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [[1, 2], {"weight": torch.ones(3)}, np.ones(3)])
def test_a_file_of_ones_own_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    kept = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"of another kind .* name another file"):
        run(1, checkpoint=path)
    assert path.read_bytes() == kept
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_another_format_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "run.pt"
    run(1, checkpoint=path)
    torch.save(torch.load(path, weights_only=True) | {"format": 99}, path)
    with pytest.raises(CheckpointError, match="format 99, this version reads 1"):
        run(1, checkpoint=path)
    assert path.exists()


def test_a_checkpoint_runs_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, ("echo pwned",)

    torch.save({"format": 1, "model": Payload()}, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match="of another kind"):
        run(1, checkpoint=tmp_path / "run.pt")


@pytest.mark.parametrize(("change", "name"), [
    ({"seed": 1}, "seed"),
    ({"epochs": 2}, "epochs"),
    ({"augment": None}, "augmentation"),
    ({"data": dataset(split=3)}, "training images"),
    ({"setting_": setting("deterministic")}, "network"),
    ({"setting_": setting(dropout=0.5)}, "network"),
    ({"batch_size": 25}, "batch_size"),
    ({"data": dataset(seed=4)}, "data"),
    ({"probes": []}, "probes"),
    ({"setting_": setting(lr=0.5)}, "lr, group 0 of Adam"),
])  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, name):
    run(1, checkpoint=tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match=f"another run: its {name}"):
        run(**{"epochs": 1, "checkpoint": tmp_path / "run.pt"} | change)
    assert (tmp_path / "run.pt").exists()


FLIPS = {
    "gamma": 0.1,
    "cycle": 4,
    "drop": 2,
    "momentum": 0.9,
    "scale": data.unit_range,
    "padding": 1,
    "smooth": 0.1,
}


def flip_run(path, made=None, probes=(), **changes):
    """Train three epochs with schedules of alpha and gamma; ``made`` are objects to go on with."""
    chosen = FLIPS | changes
    model, optimizers, schedulers = made or flip_setting(
        *(chosen[name] for name in ("gamma", "cycle", "drop", "momentum"))
    )
    return training.train(
        model, dataset(), optimizers, epochs=3, batch_size=10, schedulers=schedulers,
        augment=data.crop_flip(chosen["padding"]), preprocess=chosen["scale"], device="cpu",
        loss=partial(cross_entropy, label_smoothing=chosen["smooth"]), checkpoint=path,
        probes=probes,
    )  # fmt: skip


@pytest.mark.parametrize(("change", "name"), [
    ({"gamma": 0.5}, "gamma of CascadedEMA"),
    ({"cycle": 2}, "T_0 of CosineAnnealingWarmRestarts"),
    ({"drop": 1}, "milestones of MultiStepLR"),
    ({"momentum": 0.8}, r"momentum of SGD \(1 of the optimizers\)"),
    ({"scale": data.signed_range}, "setting of preprocess"),
    ({"padding": 2}, "setting of augment"),
    ({"smooth": 0.2}, "setting of loss"),
])  # fmt: skip
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, change, name):
    flip_run(tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match=f"another run: its {name}"):
        flip_run(tmp_path / "run.pt", **change)


class Weighted:
    """A loss that is an object."""

    def __init__(self, power):
        self.power, self.calls = power, 0

    def __call__(self, outputs, targets):
        self.calls += 1
        return cross_entropy(outputs, targets) ** self.power

    def method(self, outputs, targets):
        return self(outputs, targets)


def closing_over(weight):
    return lambda outputs, targets: cross_entropy(outputs, targets, weight=weight)


WEIGHTS = torch.tensor([1.0, 2.0, 3.0])


def loss_run(path, loss, frozen=()):
    model, optimizers, _ = flip_setting()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return training.train(model, dataset(), optimizers, epochs=1, batch_size=10, device="cpu",
                          loss=loss, checkpoint=path)  # fmt: skip


@pytest.mark.parametrize(("make", "one", "other"), [
    (lambda p: nn.CrossEntropyLoss(label_smoothing=p), 0.0, 0.5),
    (lambda w: nn.CrossEntropyLoss(weight=w), WEIGHTS, WEIGHTS.flip(0)),
    (lambda w: partial(cross_entropy, weight=w), WEIGHTS, WEIGHTS.flip(0)),
    (closing_over, WEIGHTS, 2 * WEIGHTS),
    (Weighted, 1, 2),
    (lambda p: Weighted(p).method, 1, 2),
])  # fmt: skip
def test_a_checkpoint_of_another_loss_is_refused_and_of_the_same_continued(
    tmp_path, make, one, other
):
    loss, path = make(one), tmp_path / "run.pt"
    whole = without_time(loss_run(path, loss))
    assert without_time(loss_run(path, loss)) == whole  # whatever it has counted meanwhile
    assert without_time(loss_run(path, make(one))) == whole
    with pytest.raises(CheckpointError, match="another run: its setting of loss"):
        loss_run(path, make(other))


def steep_sign(slope):
    """A quantizer that was made with a number."""
    return lambda w: sign(w) + slope * (w - w.detach())


class Passing(torch.autograd.Function):
    """A quantizer whose name, apply, says nothing."""

    @staticmethod
    def forward(ctx, w):
        return sign(w)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Stopping(Passing):
    @staticmethod
    def backward(ctx, gradient):
        return 0 * gradient


class Scaled(nn.Flatten):
    """A layer with a number that its repr does not show."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.calls = factor, 0

    def forward(self, x):
        self.calls += 1
        return self.factor * super().forward(x)


def in_sequence(scheduler):
    """Return a schedule of which another is a part."""
    return SequentialLR(scheduler.optimizer, [scheduler], [])


def made_run(path, quantizer=ste_sign, first=None, falls=1.0, bound=None, offset=None,
             within=lambda scheduler: scheduler):  # fmt: skip
    """Train one epoch; each argument is something that only its maker knows."""
    torch.manual_seed(0)
    model = nn.Sequential(
        first or nn.Flatten(), BinaryLinear(16, 3, weight_quantizer=quantizer), nn.BatchNorm1d(3)
    )
    adam = torch.optim.Adam(model.parameters(), 0.01)
    if bound:
        optim.clip_after_step(adam, model, bound)
    scheduler = torch.optim.lr_scheduler.LambdaLR(adam, lambda epoch: falls**epoch)
    offset = np.zeros(1, dtype=np.float32) if offset is None else offset
    return training.train(
        model, dataset(), adam, epochs=1, batch_size=10, schedulers=within(scheduler),
        device="cpu", preprocess=lambda images: images / 255 + torch.from_numpy(offset),
        checkpoint=path,
    )  # fmt: skip


@pytest.mark.parametrize(("one", "other", "name"), [
    ({"quantizer": steep_sign(1)}, {"quantizer": steep_sign(2)}, "weight_quantizer of 1"),
    ({"quantizer": Passing.apply}, {"quantizer": Stopping.apply}, ""),
    ({"first": Scaled(1.0)}, {"first": Scaled(2.0)}, "factor of 0"),
    ({"falls": 0.5}, {"falls": 0.1}, "factors of LambdaLR"),
    ({"falls": 0.5, "within": in_sequence}, {"falls": 0.1, "within": in_sequence},
     "factors of SequentialLR"),
    ({"bound": 1.0}, {"bound": 0.5}, "step hooks of Adam"),
    ({"bound": 1.0}, {}, "step hooks of Adam"),
    ({}, {"bound": 1.0}, "step hooks of Adam"),
    ({"offset": np.zeros(1, np.float32)}, {"offset": np.ones(1, np.float32)},
     "setting of preprocess"),
])  # fmt: skip
def test_what_parts_were_made_with_belongs_to_a_run(tmp_path, one, other, name):
    path = tmp_path / "run.pt"
    whole = without_time(made_run(path, **one))
    assert without_time(made_run(path, **one)) == whole
    with pytest.raises(CheckpointError, match=f"another run: its {name}"):
        made_run(path, **other)


def test_what_a_layer_counts_is_no_setting(tmp_path):
    used = Scaled(1.0)
    used(torch.ones(2, 3))
    whole = without_time(made_run(tmp_path / "run.pt", first=used))
    assert without_time(made_run(tmp_path / "run.pt", first=Scaled(1.0))) == whole


def test_parameters_that_a_quantizer_knows_are_no_setting(tmp_path):
    def learned(start):
        scale = nn.Parameter(torch.tensor(start))
        return lambda w: ste_sign(w) * scale.detach().sign()

    whole = without_time(made_run(tmp_path / "run.pt", quantizer=learned(0.5)))
    assert without_time(made_run(tmp_path / "run.pt", quantizer=learned(0.7))) == whole


def test_a_checkpoint_from_before_functions_of_a_schedule_were_kept_continues(tmp_path):
    path = tmp_path / "run.pt"
    whole = without_time(made_run(path, falls=0.5))
    state = torch.load(path, weights_only=True)
    assert "lr_lambdas of LambdaLR (0 of the schedulers)" in state["settings"]  # torch's, without
    del state["settings"]["factors of LambdaLR (0 of the schedulers)"]
    torch.save(state, path)
    assert without_time(made_run(path, falls=0.5)) == whole


def test_a_network_that_a_function_knows_may_have_moved_on(tmp_path):
    """As where a notebook's cell is run again, after an interruption, on the same network."""
    model, optimizers, _ = flip_setting()

    def once():
        average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
        return training.train(
            model, dataset(), optimizers, epochs=1, batch_size=10, device="cpu",
            loss=lambda outputs, targets: cross_entropy(outputs, targets) * bool(average),
            checkpoint=tmp_path / "run.pt",
        )  # fmt: skip

    assert without_time(once()) == without_time(once())


def test_a_checkpoint_of_frozen_layers_is_not_continued_with_others(tmp_path):
    loss_run(tmp_path / "run.pt", cross_entropy, ["2.bias"])
    with pytest.raises(CheckpointError, match=r"its list of frozen parameters is \['2.bias'\]"):
        loss_run(tmp_path / "run.pt", cross_entropy)


def test_moved_schedules_are_the_same_run(tmp_path):
    path, made, whole = tmp_path / "run.pt", flip_setting(), flip_run(None)
    with pytest.raises(KeyboardInterrupt):
        flip_run(path, made, [StopAfter(7)])
    for objects in (made, made, flip_setting()):  # the interrupted, the complete, and new ones
        assert without_time(flip_run(path, objects, [StopAfter(0)])) == without_time(whole)


def test_after_an_error_the_same_objects_go_on_from_the_checkpoint(tmp_path, monkeypatch):
    def fail_after_epoch(run):
        if run.epoch == 1 and run.step == 0:
            raise OSError("no space")

    path, made, whole = tmp_path / "run.pt", flip_setting(), flip_run(None)
    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "check_losses", training._Run.save)  # before schedules move
        patch.setattr(training._Run, "save_when_due", fail_after_epoch)
        with pytest.raises(OSError, match="no space"):
            flip_run(path, made)
    assert path.exists()
    assert without_time(flip_run(path, made)) == without_time(whole)


def test_what_a_function_finds_out_is_no_other_setting(tmp_path):
    found, calls = None, 0

    def loss(outputs, targets):
        nonlocal found, calls
        found, calls = outputs.detach(), calls + 1
        return cross_entropy(outputs, targets)

    def once():
        model = flip_setting()[0]
        optimizer = optim.CascadedEMA([model[1].weight], 0.01, 0.1)
        return training.train(model, dataset(), optimizer, epochs=1, batch_size=10, device="cpu",
                              loss=loss, checkpoint=tmp_path / "run.pt")  # fmt: skip

    assert without_time(once()) == without_time(once())
    assert calls == 5


def test_a_checkpoint_from_before_settings_were_kept_continues(tmp_path):
    path = tmp_path / "run.pt"
    flip_run(path)
    state = torch.load(path, weights_only=True)
    del state["settings"]
    torch.save(state, path)
    assert len(flip_run(path).rows) == 3


def test_a_full_disk_costs_only_the_checkpoint(tmp_path, monkeypatch):
    def full(state, file):
        if isinstance(file, Path):
            raise OSError(28, "No space left on device")
        save(state, file)

    path, save = tmp_path / "run.pt", torch.save
    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match="not written: .*No space left"):
        history = run(2, checkpoint=path, checkpoint_minutes=0)[1]
    assert without_time(history) == without_time(run(2)[1])
    assert list(tmp_path.iterdir()) == []


class Counting(StopAfter):
    """A probe whose state is what it is given."""

    def __init__(self, state):
        super().__init__(0)
        self.state = state

    def state_dict(self):
        return self.state


@pytest.mark.parametrize("state", [{"seen": np.ones(3)}, {"how": lambda: 1}])
def test_a_probe_that_no_checkpoint_can_hold_is_refused_before_the_first_step(tmp_path, state):
    model, *rest = setting()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"Counting\.state_dict\(\) holds more than"):
        run(1, (model, *rest), probes=[Counting(state)], checkpoint=tmp_path / "run.pt")
    assert all(map(torch.equal, before, model.parameters()))
    assert len(run(1, probes=[Counting(state)])[1].rows) == 1  # without one it has no need to


def numpy_rate():
    model, _, _ = setting()
    return model, torch.optim.Adam(model.parameters(), lr=np.logspace(-3, -1, 5)[2]), ()


def numpy_cosine():
    model, optimizer, _ = setting()
    factor = lambda epoch: 0.5 * (1 + np.cos(np.pi * epoch / 5))  # noqa: E731
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def numpy_milestones():
    model, optimizer, _ = setting()
    return model, optimizer, MultiStepLR(optimizer, np.arange(1, 3))


@pytest.mark.parametrize("make", [numpy_rate, numpy_cosine, numpy_milestones])
def test_numbers_of_numpy_are_held_by_a_checkpoint(tmp_path, make):
    def fit(path, *more):
        model, optimizer, scheduler = make()
        return model, training.train(model, dataset(), optimizer, epochs=np.int64(3),
                                     batch_size=10, schedulers=scheduler, device="cpu",
                                     probes=more, checkpoint=path, seed=np.int64(0))  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run.pt", StopAfter(7))
    resumed = fit(tmp_path / "run.pt", StopAfter(-1))
    assert_same(resumed, fit(None))
    assert resumed[1].rows[-1]["epoch"] == 3


def test_a_schedule_that_no_checkpoint_can_hold_is_refused_before_the_first_step(tmp_path):
    class Table:
        def __init__(self):
            self.factors = np.ones(9)

        def __call__(self, epoch):
            return self.factors[epoch]

    model, optimizer, _ = setting()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, Table())
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"LambdaLR\.state_dict\(\) holds more than"):
        run(1, (model, optimizer, schedule), checkpoint=tmp_path / "run.pt")
    assert all(map(torch.equal, before, model.parameters()))


def test_what_is_changed_after_ctrl_c_belongs_to_another_run(tmp_path):
    """In a notebook the same objects go on; what the run itself has moved is no change."""
    path, made = tmp_path / "run.pt", setting()
    loss = nn.CrossEntropyLoss()

    def go_on(*more):
        model, optimizer, scheduler = made
        return training.train(model, dataset(), optimizer, epochs=3, batch_size=10, loss=loss,
                              schedulers=scheduler, device="cpu", checkpoint=path,
                              probes=more)  # fmt: skip

    for steps in (7, 2):  # the learning rate has fallen in between
        with pytest.raises(KeyboardInterrupt):
            go_on(StopAfter(steps))
    rate = made[1].param_groups[0]["lr"]
    made[1].param_groups[0]["lr"] = rate / 10
    with pytest.raises(CheckpointError, match="another run: its lr, group 0 of Adam"):
        go_on(StopAfter(0))
    made[1].param_groups[0]["lr"] = rate
    loss.label_smoothing = 0.5
    with pytest.raises(CheckpointError, match="another run: its setting of loss"):
        go_on(StopAfter(0))
    loss.label_smoothing = 0.0  # all is as it was
    assert go_on(StopAfter(0)).rows[-1]["epoch"] == 3


@pytest.mark.parametrize("between", ["a change taken back", "a run without a checkpoint"])
def test_the_same_objects_go_on_after(between, tmp_path):
    path, made, whole = tmp_path / "run.pt", setting(), run(3)[1]
    watched = [probes.FlipRatio(), probes.Saturation()]
    with pytest.raises(KeyboardInterrupt):
        run(3, made, checkpoint=path, probes=[*watched, StopAfter(7)])
    if between == "a change taken back":
        rate = made[1].param_groups[0]["lr"]
        made[1].param_groups[0]["lr"] = 2 * rate
        with pytest.raises(CheckpointError, match="another run: its lr"):
            run(3, made, checkpoint=path, probes=[*watched, StopAfter(-1)])
        made[1].param_groups[0]["lr"] = rate
    else:
        run(2, made)
    again = run(3, made, checkpoint=path, probes=[*watched, StopAfter(-1)])
    assert without_time(again[1]) == without_time(whole)


def test_replaced_images_are_other_data(tmp_path):
    """The hash of the set, and the labels, stay what they were."""
    toy = dataset()
    run(1, data=toy, checkpoint=tmp_path / "run.pt")
    other = dataclasses.replace(toy, test_images=255 - toy.test_images)
    with pytest.raises(CheckpointError, match="another run: its sum of the test images"):
        run(1, data=other, checkpoint=tmp_path / "run.pt")


def test_a_quantizer_that_is_a_module_has_a_checkpoint_too(tmp_path):
    def once():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), BinaryLinear(16, 3, input_quantizer=nn.Hardtanh(), bias=False)
        )
        adam = torch.optim.Adam(model.parameters())
        return model, training.train(model, dataset(), adam, epochs=1, batch_size=10,
                                     device="cpu", checkpoint=tmp_path / "run.pt")  # fmt: skip

    assert_same(once(), once())


def test_a_probe_without_a_state_is_refused_with_a_checkpoint_only(tmp_path):
    class Bare:
        start = step = lambda *_: None
        epoch = dict

    with pytest.raises(ValueError, match="Bare needs a state_dict"):
        run(1, probes=[Bare()], checkpoint=tmp_path / "run.pt")


def preprocessing(number):
    return [
        data.compose(data.crop_flip(number), data.unit_range),
        data.standardize(dataset(seed=number)),
        data.subtract_mean_image(dataset(seed=number)),
    ]


def test_functions_are_told_apart_by_what_they_were_made_with_however_deep():
    """Inside a tuple of functions, and behind functools.cache."""
    for one, other, same in zip(*map(preprocessing, (1, 2, 1)), strict=True):
        told = [checkpoints._described(function) for function in (one, other, same)]
        assert told[0] != told[1]
        assert told[0] == told[2]


def test_a_scheduler_that_notes_no_first_rate_is_continued(tmp_path):
    class Halving:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            for group in self.optimizer.param_groups:
                group["lr"] /= 2

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    def once(path, probes_):
        model, _, _ = setting()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        return run(3, (model, optimizer, Halving(optimizer)), probes=probes_, checkpoint=path)

    whole = once(None, [StopAfter(0)])
    with pytest.raises(KeyboardInterrupt):
        once(tmp_path / "run.pt", [StopAfter(12)])
    assert_same(once(tmp_path / "run.pt", [StopAfter(0)]), whole)


def test_a_loss_that_learns_goes_on_from_where_it_was(tmp_path):
    def learn(path=None, stop=()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), BinaryLinear(16, 3), nn.BatchNorm1d(3))
        loss = ScaledLoss()
        adam = torch.optim.Adam([*model.parameters(), *loss.parameters()], 0.01)
        history = training.train(
            model, dataset(), adam, epochs=3, batch_size=10, loss=loss, device="cpu",
            probes=stop, checkpoint=path,
        )  # fmt: skip
        return without_time(history), loss.scale.item(), loss.calls.item()

    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        learn(path, StopAfter(7))
    assert learn(path, StopAfter(99)) == learn() == learn(path, StopAfter(99))


def test_a_checkpoint_from_before_a_loss_was_kept_continues(tmp_path):
    path = tmp_path / "run.pt"
    whole = run(1, checkpoint=path)
    state = torch.load(path, weights_only=True)
    del state["loss"]
    torch.save(state, path)
    assert_same(run(1, checkpoint=path), whole)


@pytest.mark.parametrize(("change", "name"), [
    ({"evaluate_every": 2}, "evaluate_every"),
    ({"data": dataclasses.replace(dataset(), test_labels=1 - dataset().test_labels.clamp(0, 1))},
     "test labels"),
])  # fmt: skip
def test_what_the_columns_depend_on_belongs_to_a_run(tmp_path, change, name):
    path = tmp_path / "run.pt"
    run(1, checkpoint=path)
    with pytest.raises(CheckpointError, match=f"another run: its {name} is"):
        run(1, checkpoint=path, **change)


def test_the_home_folder_has_its_short_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run(1, checkpoint="~/run.pt")
    assert (tmp_path / "run.pt").exists()


def test_a_state_that_does_not_fit_is_of_another_run(tmp_path):
    class Lazy(nn.Module):
        """A loss that makes a buffer when it is first called."""

        def forward(self, outputs, labels):
            self.register_buffer("calls", torch.ones(()))
            return cross_entropy(outputs, labels)

    model, optimizer, _ = setting()
    options = {"epochs": 1, "batch_size": 10, "device": "cpu", "checkpoint": tmp_path / "run.pt"}
    training.train(model, dataset(), optimizer, loss=Lazy(), **options)
    with pytest.raises(CheckpointError, match="this Lazy does not take"):
        training.train(model, dataset(), optimizer, loss=Lazy(), **options)


def test_an_old_run_whose_images_had_another_order_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    run(1, checkpoint=path, seed=5000)
    state = torch.load(path, weights_only=True)
    del state["identity"]["way to order images"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="its way to order images is None"):
        run(1, checkpoint=path, seed=5000)
