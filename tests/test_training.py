"""The training loop: reproducible, resumable to the bit, and clear about what went wrong."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from toy import StopAfter, assert_same, dataset, flip_setting, run, setting, without_time

from bnnbook import binarize, checkpoints, data, layers, optim, probes, training
from bnnbook.layers import BinaryLinear
from bnnbook.models import binaryconnect_cnn


def test_one_row_an_epoch_with_the_documented_columns():
    _, history = run(3)
    assert isinstance(history.frame, pd.DataFrame)
    assert list(history.frame.columns) == [
        "epoch", "train_loss", "train_accuracy", "validation_accuracy", "test_accuracy", "lr",
        "flip_ratio", "saturation", "seconds",
    ]  # fmt: skip
    assert list(history.frame.epoch) == [1, 2, 3]
    assert history.frame.lr.tolist() == pytest.approx([0.01, 0.009, 0.0081])


def test_evaluated_only_as_often_as_asked():
    history = run(5, evaluate_every=2)[1]
    assert history.frame.test_accuracy.notna().tolist() == [False, True, False, True, True]
    assert history.best()["epoch"] in (2, 4, 5)


def test_best_epoch_is_the_last_of_equals():
    rows = [{"epoch": e, "validation_accuracy": a} for e, a in ((1, 0.5), (2, 0.9), (3, 0.9))]
    assert training.History(rows).best()["epoch"] == 3
    with pytest.raises(ValueError, match="hold_out"):
        training.History([{"epoch": 1}]).best()


def test_the_seed_fixes_everything():
    first, again, other = run(seed=1), run(seed=1), run(seed=2)
    assert_same(first, again)
    assert without_time(first[1]) != without_time(other[1])


def test_training_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    made = setting()
    torch.manual_seed(5)
    run(1, made)
    assert torch.equal(torch.rand(3), expected)


def test_the_loop_is_plain_pytorch():
    """Against the loop spelled out, with the same permutations: bit for bit."""
    toy = dataset()
    model, history = run(3, setting("deterministic", dropout=0.0), data=toy, augment=None)
    plain, optimizer, scheduler = setting("deterministic", dropout=0.0)
    loss_function = layers.SquaredHingeLoss()
    losses = []
    for epoch in range(3):
        order = training.epoch_order(50, seed=0, epoch=epoch)
        total = 0.0
        for index in order.split(10):
            images = toy.train_images[index].float() / 255
            loss = loss_function(plain(images), toy.train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / 5
        scheduler.step()
        losses.append(total)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert history.frame.train_loss.tolist() == pytest.approx(losses, rel=1e-6)
    assert history.rows[-1]["test_accuracy"] == training.evaluate(
        plain, toy.test_images, toy.test_labels
    )


def test_epochs_visit_every_image_once_in_another_order():
    first, second = (training.epoch_order(20, 3, epoch) for epoch in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(20))
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("steps", [1, 5, 7, 12])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_resumed_after_ctrl_c_equals_uninterrupted(tmp_path, steps, kind):
    """Stopped within and at the end of an epoch: same history, same weights, bit for bit."""
    path = tmp_path / "run.pt"
    stop = StopAfter(steps)
    same = [probes.FlipRatio(), probes.Saturation(), stop]
    straight = run(4, setting(kind=kind), probes=[*same[:2], StopAfter(-1)])
    with pytest.raises(
        KeyboardInterrupt, match=f"after {steps // 5} epochs and {steps % 5} steps"
    ):
        run(4, setting(kind=kind), probes=same, checkpoint=path)
    assert path.exists()
    again = [probes.FlipRatio(), probes.Saturation(), StopAfter(-1)]
    resumed = run(4, setting(kind=kind, seed=9), probes=again, checkpoint=path)
    assert_same(straight, resumed)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def after_three(rows):
    """End after the third epoch, as seen from the rows alone."""
    assert [row["epoch"] for row in rows] == [*range(1, len(rows) + 1)]
    return len(rows) == 3


def test_a_run_ends_where_stop_says_so():
    lengths = []
    whole = run(5, stop=lambda rows: lengths.append(len(rows)))  # which returns None
    assert lengths == [1, 2, 3, 4, 5]
    assert_same(whole, run(5))
    stopped = run(5, stop=after_three)
    assert_same(stopped, run(3))
    best = run(9, stop=lambda rows: rows[-1]["epoch"] - training.History(rows).best()["epoch"] > 1)
    assert best[1].rows[-1]["epoch"] == best[1].best()["epoch"] + 2 < 9


@pytest.mark.parametrize("steps", [3, 7, 10, 15])  # 15: at the end of the last epoch
def test_a_resumed_run_ends_where_stop_says_so(tmp_path, steps):
    path = tmp_path / "run.pt"
    straight = run(5, stop=after_three, probes=[StopAfter(-1)])
    with pytest.raises(KeyboardInterrupt):
        run(5, stop=after_three, probes=[StopAfter(steps)], checkpoint=path)
    for _ in range(2):  # the second finds a run that has ended
        resumed = run(5, setting(seed=9), stop=after_three, probes=[StopAfter(-1)],
                      checkpoint=path)  # fmt: skip
        assert len(resumed[1].rows) == 3
        assert_same(straight, resumed)
    with pytest.raises(checkpoints.CheckpointError, match="setting of stop is after_three"):
        run(5, stop=lambda rows: False, probes=[StopAfter(-1)], checkpoint=path)


def test_a_finished_run_returns_at_once(tmp_path):
    path = tmp_path / "run.pt"
    first = run(2, checkpoint=path)
    again = run(2, checkpoint=path)
    assert_same(first, again)


def test_a_killed_run_loses_no_more_than_since_the_last_checkpoint(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(f"""
import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
import time, toy as t
class Slow(t.StopAfter):
    def step(self): time.sleep(0.02)
print("started", flush=True)
t.run(400, probes=[Slow(-1)], checkpoint={str(tmp_path / "run.pt")!r}, checkpoint_minutes=0.001)
""")
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"started\n"
    deadline = time.monotonic() + 60
    while not (tmp_path / "run.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    process.stdout.close()
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert state["step"] + state["epoch"] > 0


def test_without_a_device_a_run_is_where_its_model_is(monkeypatch):
    made = setting()
    made[0].to("meta")
    with pytest.raises(ValueError, match="the model is on meta, the run on cpu"):
        run(1, made)
    monkeypatch.setattr(training, "choose_device", lambda _: torch.device("cuda"))
    assert len(run(1, device=None)[1].rows) == 1


def test_a_run_changes_cudnn_as_it_says_and_puts_it_back(monkeypatch):
    seen, cudnn = [], torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", False)
    monkeypatch.setattr(cudnn, "benchmark", True)

    def look(outputs, targets):
        seen.append((cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32))
        return cross_entropy(outputs, targets)

    model, optimizers, _ = flip_setting()
    training.train(model, dataset(), optimizers, epochs=1, batch_size=10, device="cpu", loss=look)
    assert set(seen) == {(False, True, False)}
    assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (True, False, False)


@pytest.mark.parametrize(("kind", "needs"), [
    (torch.optim.lr_scheduler.ReduceLROnPlateau, "ReduceLROnPlateau.step needs its metrics"),
    (None, "LBFGS.step needs its closure"),
])  # fmt: skip
def test_a_step_that_asks_for_more_is_refused_at_once(kind, needs):
    model, optimizer, scheduler = setting()
    if kind is None:
        made = model, torch.optim.LBFGS(model.parameters()), scheduler
    else:
        made = model, optimizer, kind(optimizer)
    with pytest.raises(ValueError, match=needs):
        run(1, made)


def test_a_single_scheduler_and_a_single_probe_need_no_list():
    made = setting()
    found = run(2, made, schedulers=made[2], probes=probes.FlipRatio())[1]
    other = run(2, probes=[probes.FlipRatio()])[1]
    assert without_time(found) == without_time(other)
    assert without_time(run(1, schedulers=None)[1]) == without_time(run(1, schedulers=[])[1])


def test_latent_weights_are_not_for_rules_that_flip():
    model = nn.Sequential(nn.Flatten(), BinaryLinear(16, 3), nn.BatchNorm1d(3))
    binary, real = optim.split_parameters(model)
    optimizers = [optim.Bop(binary, 0.1, 0), torch.optim.Adam(real)]
    with pytest.raises(ValueError, match=r"1\.weight is latent.*weight_quantizer=None"):
        training.train(model, dataset(), optimizers, epochs=1, batch_size=10, device="cpu")


@pytest.mark.parametrize("name", ["2.bias", "2.weight", "3.bias"])
def test_real_weights_are_not_for_rules_that_flip(name):
    binary = BinaryLinear(16, 3, weight_quantizer=None)
    model = nn.Sequential(nn.Flatten(), binary, nn.BatchNorm1d(3), nn.Linear(3, 3))
    weights = [binary.weight, model.get_parameter(name)]
    with pytest.raises(ValueError, match=rf"{name} is real, of a .*split_parameters"):
        training.train(model, dataset(), optim.Bop(weights, 0.1, 0), epochs=1, batch_size=10,
                       device="cpu")  # fmt: skip


def test_counters_that_no_gradient_can_reach_are_refused():
    def once(bits, **quantizer):
        layer = BinaryLinear(16, 3, weight_quantizer=partial(binarize.ste_sign, **quantizer))
        model = nn.Sequential(nn.Flatten(), layer, nn.BatchNorm1d(3))
        counters = optim.CounterSGD([layer.weight], 0.1, bits)
        return training.train(model, dataset(), counters, epochs=1, batch_size=10, device="cpu")

    with pytest.raises(ValueError, match="of 1 passes no gradient to a counter of 7"):
        once(3)
    assert once(3, clip_value=None).rows
    assert once(1).rows  # ±1 is all there is


def test_the_look_at_a_counters_quantizer_changes_nothing():
    class FirstSeen(nn.Module):
        """Balances weights by their mean, and notes the size of the first it sees."""

        size = None

        def forward(self, w):
            self.size = self.size or w.abs().max().item()
            return binarize.ste_sign(w - w.mean(), clip_value=None)

    layer = BinaryLinear(16, 3, weight_quantizer=FirstSeen())
    model = nn.Sequential(nn.Flatten(), layer, nn.BatchNorm1d(3))
    counters = optim.CounterSGD([layer.weight], 0.1, 8)
    with torch.no_grad():
        layer.weight.fill_(3.0)
    training.train(model, dataset(), counters, epochs=1, batch_size=10, device="cpu")
    assert layer.weight_quantizer.size == 3


def test_a_counters_quantizer_without_any_gradient_is_refused():
    layer = BinaryLinear(16, 3, weight_quantizer=binarize.sign)
    model = nn.Sequential(nn.Flatten(), layer, nn.BatchNorm1d(3))
    counters = optim.CounterSGD([layer.weight], 0.1, 8)
    with pytest.raises(ValueError, match="of 1 passes no gradient to a counter of 255"):
        training.train(model, dataset(), counters, epochs=1, batch_size=10, device="cpu")


def test_averages_of_binary_weights_are_not_taken_for_a_binary_network():
    model, optimizers, _ = flip_setting()
    average = torch.optim.swa_utils.AveragedModel(model)

    def averaged(network):
        average.update_parameters(network)
        return average.module

    with pytest.raises(ValueError, match=r"1\.weight is not ±1"):
        training.train(model, dataset(), optimizers, epochs=5, batch_size=10, device="cpu",
                       test_model=averaged)  # fmt: skip


@pytest.mark.parametrize("shape", [(-1, 1), (-1,)])
def test_outputs_that_are_not_one_a_class_are_refused(shape):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1), nn.Unflatten(1, (1,)))
    if shape == (-1,):
        model = nn.Sequential(model, nn.Flatten(0))
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"one output per class.*\(10,"):
        training.train(model, dataset(), sgd, epochs=1, batch_size=10, device="cpu",
                       loss=lambda outputs, _: outputs.mean())  # fmt: skip
    with pytest.raises(ValueError, match="one output per class"):
        training.accuracy(torch.zeros(4, 1), torch.zeros(4))


@pytest.mark.parametrize("shape", [(4, 1), (1,), (3,), ()])
def test_labels_of_another_shape_are_not_broadcast(shape):
    outputs = torch.eye(4)
    assert training.accuracy(outputs, torch.tensor([0, 1, 2, 0])) == 0.75
    with pytest.raises(ValueError, match=r"of shape \(4,\) for .* \(4, 4\); .*") as e:
        training.accuracy(outputs, torch.zeros(shape, dtype=torch.int64))
    assert str(e.value).endswith(f"these are {shape}")
    model, toy = setting("deterministic")[0], dataset()
    with pytest.raises(ValueError, match=r"these are \(30, 1\)"):
        training.evaluate(model, toy.test_images, toy.test_labels[:, None])


def test_there_is_no_accuracy_of_nothing():
    model, toy = setting("deterministic")[0], dataset()
    with pytest.raises(ValueError, match="the set is empty"):
        training.accuracy(torch.zeros(0, 3), torch.zeros(0))
    with pytest.raises(ValueError, match="the set is empty"):
        training.evaluate(model, toy.test_images[:0], toy.test_labels[:0])


def test_images_of_real_numbers_are_not_scaled_twice():
    model, images = setting("deterministic")[0], dataset().test_images
    for measure in (training.predict, training.reestimate_batchnorm):
        with pytest.raises(ValueError, match="images are uint8"):
            measure(model, images / 255)
    assert torch.equal(
        training.predict(model, images / 255, preprocess=lambda part: part),
        training.predict(model, images, preprocess=lambda part: part / 255),
    )


@pytest.mark.parametrize("measure", [training.predict, training.reestimate_batchnorm])
def test_what_was_frozen_in_evaluation_mode_stays_so(measure):
    model = setting()[0].train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    norms[0].eval()
    measure(model, dataset().test_images)
    assert [norm.training for norm in norms] == [False, True, True]
    assert model.training


def test_an_optimizers_earlier_state_is_laid_out_as_the_weights_are():
    """Otherwise torch's fused Adam pairs the wrong numbers, without a word."""
    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 3))
        adam = torch.optim.Adam(model.parameters(), 0.01, fused=fused)
        x = torch.randn(8, 3, 4, 4)
        for _ in range(5):
            model(x).square().mean().backward()
            adam.step()
            adam.zero_grad()
        training.train(model, dataset(shape=(3, 4, 4)), adam, epochs=1, batch_size=10,
                       device="cpu")  # fmt: skip
        weights.append(model[0].weight.detach())
    torch.testing.assert_close(*weights, atol=1e-5, rtol=0)


@pytest.mark.parametrize("step", [1, 3])
def test_a_loss_that_is_not_finite_names_epoch_and_step(tmp_path, step):
    class Poison(StopAfter):
        def start(self, model):
            self.model = model

        def step(self):
            self.left -= 1
            if self.left == 0:
                with torch.no_grad():
                    self.model[-1].bias.fill_(float("nan"))

    path = tmp_path / "run.pt"
    expected = rf"loss is nan in epoch 2, step {step + 1} of 5"
    with pytest.raises(training.NonFiniteLossError, match=expected):
        run(4, probes=[Poison(5 + step)], checkpoint=path, checkpoint_minutes=0)
    saved = torch.load(path, weights_only=True)
    assert all(torch.isfinite(v).all() for k, v in saved["model"][0].items() if "bias" not in k)
    assert (saved["epoch"], saved["step"]) <= (1, step)


def behind_a_sign():
    """A network whose binary layer takes the sign of what comes before it."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4),
        layers.BinaryConv2d(4, 4, 2, input_quantizer=binarize.ste_sign), nn.BatchNorm2d(4),
        nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


class Corrupt(StopAfter):
    """A probe that puts a number into a tensor after so many steps, where no loss sees it."""

    def __init__(self, steps, number, choose):
        super().__init__(steps)
        self.number, self.choose = number, choose

    def start(self, model):
        self.model = model

    def step(self):
        self.left -= 1
        if self.left == 0:
            self.choose(self.model)[-1] = self.number


@pytest.mark.parametrize("late", [False, True])
def test_nan_that_a_sign_hides_from_the_loss_is_found(late):
    losses = []

    def a_nan_pixel(images):
        images = data.unit_range(images)
        images[0, 0, 0, 0] = float("nan") if len(losses) >= (6 if late else 0) else 0
        return images

    def loss(outputs, targets):
        losses.append(cross_entropy(outputs, targets))
        return losses[-1]

    model = behind_a_sign()
    adam = torch.optim.Adam(model.parameters(), 0.01)
    with pytest.raises(
        training.NonFiniteLossError, match=r"^0\.weight \(and \d+ more\) holds NaN"
    ):
        training.train(model, dataset(), adam, epochs=4, batch_size=10, device="cpu",
                       preprocess=a_nan_pixel, loss=loss)  # fmt: skip
    assert len(losses) == (10 if late else 1)
    assert torch.stack(losses).isfinite().all()  # which is why it takes a look at the weights


@pytest.mark.parametrize(("number", "choose", "name"), [
    (float("inf"), lambda model: model[1].running_var, "1.running_var"),
    (float("nan"), lambda model: model[1].running_mean, "1.running_mean"),
    (float("-inf"), lambda model: model[2].weight.data, "2.weight"),
])  # fmt: skip
def test_a_tensor_that_is_not_finite_is_named(number, choose, name):
    """None of these shows in the loss: batch norms train with the batch's, and a sign is ±1."""
    model = behind_a_sign()
    sgd = torch.optim.SGD(model.parameters(), 0.01)
    with pytest.raises(training.NonFiniteLossError, match=rf"^{name} holds NaN or infinite"):
        training.train(model, dataset(), sgd, epochs=3, batch_size=10, device="cpu",
                       probes=Corrupt(10, number, choose))  # fmt: skip


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_a_gradient_that_an_average_swallows_is_found(number):
    model, optimizers, _ = flip_setting()
    calls = []

    def swallow(gradient):
        calls.append(1)
        return gradient.index_fill(0, torch.tensor([1]), number) if len(calls) == 7 else gradient

    model[1].weight.register_hook(swallow)
    expected = r"^momentum of 1\.weight in CascadedEMA \(and 1 more\) holds NaN"
    with pytest.raises(training.NonFiniteLossError, match=expected):
        training.train(model, dataset(), optimizers, epochs=5, batch_size=10, device="cpu")
    assert model[1].weight.abs().eq(1).all()  # where nothing shows it
    assert len(calls) == 10


def test_a_masks_infinity_is_nothing_wrong():
    model, optimizers, _ = flip_setting()
    model.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
    model.register_buffer("empty", torch.zeros(0))
    training.train(model, dataset(), optimizers, epochs=1, batch_size=10, device="cpu")


@pytest.mark.parametrize(("options", "message"), [
    ({"batch_size": 10.0}, "batch_size must be a whole number, not 10.0"),
    ({"epochs": 1.5}, "epochs must be a whole number, not 1.5"),
    ({"evaluate_every": "2"}, "evaluate_every must be a whole number, not '2'"),
    ({"data": torch.utils.data.DataLoader([1])}, r"bnnbook\.data\.Dataset, not a DataLoader"),
    ({"setting_": (*setting()[:1], torch.optim.Adam, None)}, "Adam'> is no optimizer"),
])  # fmt: skip
def test_arguments_of_the_wrong_kind(options, message):
    with pytest.raises(TypeError, match=message):
        run(**options)
    assert len(run(np.int64(1), batch_size=np.int64(10))[1].rows) == 1


@pytest.mark.parametrize(("options", "message"), [
    ({"epochs": 0}, "epochs must be at least 1"),
    ({"evaluate_every": 0}, "evaluate_every must be at least 1"),
    ({"batch_size": 0}, "batch_size must be from 1 to the 50"),
    ({"batch_size": 51}, "batch_size must be from 1 to the 50"),
    ({"device": "tpu9"}, "unknown device 'tpu9'; known: auto, cpu, cuda"),
])  # fmt: skip
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_cuda_asked_for_and_absent():
    with pytest.raises(ValueError, match="finds no CUDA GPU"):
        training.choose_device("cuda")
    assert training.choose_device("auto").type == "cpu"


def test_no_optimizer():
    with pytest.raises(ValueError, match="no optimizer"):
        training.train(setting()[0], dataset(), (), epochs=1, batch_size=10, device="cpu")


def test_an_optimizer_of_another_network():
    model, optimizers, _ = flip_setting()
    optimizers.append(torch.optim.SGD(flip_setting()[0].parameters(), lr=0.1))
    with pytest.raises(ValueError, match="SGD holds no parameter of this model"):
        training.train(model, dataset(), optimizers, epochs=1, batch_size=10, device="cpu")


@pytest.mark.parametrize("first", [0, 2])  # moved by the first step, or only in the second epoch
def test_binary_weights_in_the_hands_of_a_real_optimizer(first):
    model, (flipper, *_), _ = flip_setting()
    adam = torch.optim.Adam(model.parameters())
    late = torch.optim.lr_scheduler.LambdaLR(adam, lambda epoch: float(epoch >= first - 1))
    with pytest.raises(ValueError, match=r"1\.weight is not ±1 any more.*split_parameters"):
        training.train(model, dataset(), adam, epochs=3, batch_size=10, device="cpu",
                       schedulers=[late])  # fmt: skip
    with pytest.raises(ValueError, match=r"CascadedEMA holds 1 .* an optimizer before it"):
        training.train(model, dataset(), [adam, flipper], epochs=3, batch_size=10, device="cpu")


def real_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


def real_run(model, epochs=3, parameters=None, data=None, **options):
    adam = torch.optim.Adam(parameters or model.parameters(), 0.05)
    history = training.train(model, data or dataset(), adam, epochs=epochs, batch_size=10,
                             device="cpu", **options)  # fmt: skip
    return model, history


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_callers_own_autocast_changes_nothing(precision, monkeypatch):
    """Nested in another, torch's autocast would keep the weights of the first step."""
    monkeypatch.setenv("BNNBOOK_PRECISION", precision)
    alone = real_run(real_network())
    with torch.autocast("cpu", torch.bfloat16):
        within = real_run(real_network())
        outputs = training.predict(within[0], dataset().test_images)
    assert_same(alone, within)
    assert torch.equal(outputs, training.predict(alone[0], dataset().test_images))


def test_in_float16_an_optimizer_of_frozen_layers_is_left_out(monkeypatch):
    monkeypatch.setenv("BNNBOOK_PRECISION", "float16")
    model = real_network()
    frozen = model[1].requires_grad_(False)
    optimizers = [
        torch.optim.SGD(frozen.parameters(), 0.1),
        torch.optim.SGD(model[3].parameters(), 0.1),
    ]
    before = frozen.weight.clone(), model[3].weight.clone()
    training.train(model, dataset(), optimizers, epochs=1, batch_size=10, device="cpu")
    assert torch.equal(before[0], frozen.weight)
    assert not torch.equal(before[1], model[3].weight)


def test_gradients_that_no_optimizer_takes_are_not_added_up():
    """Of a layer left out of the optimizer, as of all others, a step's gradient is its own."""
    model, norms = real_network(), []

    class Looking(nn.CrossEntropyLoss):
        def forward(self, outputs, targets):
            held = model[1].weight.grad
            norms.append(0.0 if held is None else held.norm().item())
            return super().forward(outputs, targets)

    real_run(model, epochs=2, parameters=model[3].parameters(), loss=Looking())
    assert norms == [0.0] * 10
    assert model[1].weight.grad is None


def test_a_parameter_that_replaces_another_has_gradients_of_its_own():
    model, seen = real_network(), []
    sgd = torch.optim.SGD(model.parameters(), 0.1)

    class Replacing(probes.FlipRatio):
        def step(self):
            if not seen:
                model[3].weight = nn.Parameter(model[3].weight.detach().clone())
                sgd.param_groups[0]["params"][2] = model[3].weight
            seen.append(model[3].weight.grad is None)

    training.train(model, dataset(), sgd, epochs=1, batch_size=10, probes=Replacing())
    assert seen == [True] * 5


def test_a_handler_from_outside_python_is_left_alone(tmp_path, monkeypatch):
    outside = SimpleNamespace(
        SIGINT=signal.SIGINT, SIGTERM=signal.SIGTERM, getsignal=lambda number: None,
        signal=lambda *_: pytest.fail("could not be put back"),
    )  # fmt: skip
    monkeypatch.setattr(training, "signal", outside)
    real_run(real_network(), epochs=1, checkpoint=tmp_path / "run.pt")


def test_a_preprocess_that_works_in_place_leaves_the_images_alone():
    def inverted(images):
        return images.bitwise_not_().float() / 255

    toy = dataset()
    before = toy.test_images.clone()
    in_place = real_run(real_network(), data=toy, preprocess=inverted)
    assert torch.equal(toy.test_images, before)
    assert_same(in_place, real_run(real_network(), preprocess=lambda x: (255 - x).float() / 255))


def test_a_rate_that_is_a_tensor_is_noted_as_it_was():
    model = real_network()
    adam = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1))
    schedule = torch.optim.lr_scheduler.ExponentialLR(adam, 0.1)
    history = training.train(model, dataset(), adam, epochs=3, batch_size=10, device="cpu",
                             schedulers=schedule)  # fmt: skip
    assert history.frame.lr.tolist() == pytest.approx([0.1, 0.01, 0.001])


def test_too_few_outputs_are_named_before_the_loss_meets_a_label():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))

    def loss(outputs, targets):
        pytest.fail("on CUDA, this would end the process")

    with pytest.raises(ValueError, match=r"3 classes or more here; this one's are \(10, 2\)"):
        real_run(model, loss=loss)


def test_a_packed_network_without_parameters_is_evaluated():
    images, labels = dataset().test_images, dataset().test_labels
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16, affine=False))
    assert 0 <= training.evaluate(network, images, labels) <= 1


def test_only_the_runs_own_generators_are_seeded(monkeypatch):
    """torch.manual_seed would seed every GPU, and one only gets its state back."""

    def fail(*_):
        pytest.fail("all devices were seeded")

    monkeypatch.setattr(torch, "manual_seed", fail)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", fail)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    real_run(model, epochs=1)


def test_a_loss_that_is_not_finite_before_any_step_is_not_blamed_on_the_rate():
    with pytest.raises(training.NonFiniteLossError, match=r"step 1 of 5; look at preprocess"):
        run(1, preprocess=lambda images: images / 0.0)


def test_two_optimizers_each_step():
    model, _, _ = setting("deterministic")
    binary, real = optim.split_parameters(model)
    before = [p.detach().clone() for p in binary + real]
    both = torch.optim.SGD(binary, lr=1.0), torch.optim.Adam(real, lr=0.1)
    training.train(model, dataset(), both, epochs=1, batch_size=10, device="cpu")
    assert all((a != b).any() for a, b in zip(before, binary + real, strict=True))


def test_convolutions_and_test_model():
    torch.manual_seed(0)
    toy = dataset(shape=(3, 8, 8))
    model = binaryconnect_cnn(3, widths=(4, 4), hidden=8, image_size=8)
    seen = []
    history = training.train(
        model, toy, torch.optim.Adam(model.parameters()), epochs=2, batch_size=10, device="cpu",
        augment=data.crop_flip(padding=1), test_model=lambda m: seen.append(m) or m,
    )  # fmt: skip
    assert seen == [model, model]
    assert len(history.rows) == 2
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_trains_expert_layers_whose_weights_have_five_dimensions():
    torch.manual_seed(0)
    model = nn.Sequential(layers.ExpertBinaryConv2d(1, 3, 3, experts=2), nn.Conv2d(3, 3, 2),
                          nn.Flatten())  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    training.train(model, dataset(), optimizer, epochs=1, batch_size=10, device="cpu")
    assert model[1].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_training_learns_the_same(monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m: compile_(m, backend="aot_eager"))
    torch._dynamo.reset()
    plain = run(2, setting("deterministic", dropout=0.0), augment=None)
    compiled = run(2, setting("deterministic", dropout=0.0), augment=None, compile=True)
    losses = [m[1].frame.train_loss.tolist() for m in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_trains_and_resumes(tmp_path, monkeypatch, dtype):
    """The paths of a T4 (float16, scaled losses) and of newer GPUs, taken on a CPU."""
    monkeypatch.setenv("BNNBOOK_PRECISION", str(dtype).removeprefix("torch."))
    seen, scales = [], []

    class Watch(StopAfter):
        def start(self, model):
            model[1].register_forward_hook(lambda m, i, out: seen.append((m.training, out.dtype)))
            self.weight = model[1].weight

        def step(self):
            scales.append(self.weight.dtype)
            super().step()

    straight = run(3, probes=[Watch(-1)])
    assert set(seen) == {(True, dtype), (False, torch.float32)}  # tested in full precision
    assert set(scales) == {torch.float32}  # latent weights stay in full precision
    with pytest.raises(KeyboardInterrupt):
        run(3, probes=[Watch(7)], checkpoint=tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)["scaler"][0]
    assert (saved.get("scale") == 2.0**16) == (dtype == torch.float16)
    assert_same(straight, run(3, probes=[Watch(-1)], checkpoint=tmp_path / "run.pt"))


def test_a_cpu_computes_in_float32_unless_asked_otherwise(monkeypatch):
    cpu = torch.device("cpu")
    assert training.autocast_dtype(cpu) is None
    for name, dtype in (("auto", None), ("float32", None), ("bfloat16", torch.bfloat16)):
        monkeypatch.setenv("BNNBOOK_PRECISION", name)
        assert training.autocast_dtype(cpu) is dtype
        assert training.precision(cpu) == ("float32" if dtype is None else name)
        assert training.usual_dtype(cpu) is None


def test_a_gpu_computes_in_float32_if_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    gpu = torch.device("cuda")
    assert training.precision(gpu) == "bfloat16"
    monkeypatch.setenv("BNNBOOK_PRECISION", "float32")
    assert training.autocast_dtype(gpu) is None
    assert (training.precision(gpu), training.usual_dtype(gpu)) == ("float32", torch.bfloat16)


def test_an_unknown_precision_is_refused(monkeypatch):
    monkeypatch.setenv("BNNBOOK_PRECISION", "float8")
    with pytest.raises(ValueError, match="unknown precision 'float8'; known: auto, float32, bfl"):
        run(1)


def test_a_checkpoint_of_another_precision_is_refused(tmp_path, monkeypatch):
    run(1, checkpoint=tmp_path / "run.pt")
    monkeypatch.setenv("BNNBOOK_PRECISION", "bfloat16")
    with pytest.raises(checkpoints.CheckpointError, match="precision"):
        run(1, checkpoint=tmp_path / "run.pt")


def test_what_an_earlier_loop_left_in_grad_does_not_count():
    clean, left = setting(), setting()
    for parameter in left[0].parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    assert_same(run(2, clean), run(2, left))


def test_a_probes_numpy_numbers_survive_a_resume(tmp_path):
    class Numpy(StopAfter):
        def epoch(self):
            return {"half": np.float64(0.5)}

    with pytest.raises(KeyboardInterrupt):
        run(3, probes=[Numpy(7)], checkpoint=tmp_path / "run.pt")
    history = run(3, probes=[Numpy(-1)], checkpoint=tmp_path / "run.pt")[1]
    assert history.frame.half.tolist() == [0.5] * 3


@pytest.mark.parametrize("name", ["flip_ratio", "lr", "seconds", "test_accuracy"])
def test_a_column_that_is_there_already_is_not_overwritten(name):
    class Double(StopAfter):
        def epoch(self):
            return {"own": 1.0, name: 0.5}

    both = [probes.FlipRatio(), Double(-1)]
    with pytest.raises(ValueError, match=f"Double returns the column '{name}', which"):
        run(3, probes=both, evaluate_every=2)


@pytest.mark.parametrize("batch_size", [59, 7, 1000])
def test_reestimation_needs_no_full_batches(batch_size):
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16))
    training.reestimate_batchnorm(model, dataset(n=70).train_images, batch_size=batch_size)
    assert torch.isfinite(model[1].running_var).all()


def test_reestimated_statistics_are_those_of_the_images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 2))
    images = dataset(n=60).train_images
    training.reestimate_batchnorm(model, images, batch_size=len(images))
    x = images.flatten(1) / 255
    assert torch.allclose(model[1].running_mean, x.mean(0))
    assert torch.allclose(model[1].running_var, x.var(0))
    assert model.training
    assert model[1].momentum == 0.1


@pytest.mark.parametrize(("number", "batch_size"), [(0, 10), (30, 0)])
def test_a_pass_over_nothing_costs_no_statistics(number, batch_size):
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16))
    images = dataset().test_images
    training.reestimate_batchnorm(model, images)
    before = model[1].running_var.clone()
    with pytest.raises(ValueError, match=f"{number} images in batches of {batch_size}"):
        training.reestimate_batchnorm(model, images[:number], batch_size=batch_size)
    assert torch.equal(model[1].running_var, before)


def test_own_statistics_are_a_copys():
    images = dataset(n=70).train_images
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Flatten(), BinaryLinear(images[0].numel(), 4), norm).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = training.own_statistics(model, images, weight_quantizer=binarize.real_weight)
    assert model[1].weight_quantizer is binarize.ste_sign
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    products = data.unit_range(images).flatten(1) @ model[1].weight.T
    torch.testing.assert_close(network[2].running_mean, products.mean(0))
    same = training.own_statistics(model, images)
    assert same[1].weight_quantizer is binarize.ste_sign
    assert not torch.equal(same[2].running_mean, network[2].running_mean)


def test_predict_restores_the_mode_and_keeps_the_statistics():
    model = setting()[0]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    outputs = training.predict(model, dataset().test_images, batch_size=7)
    assert outputs.shape == (30, 3)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_no_progress_bar_without_a_terminal(capfd):
    run(1)
    assert capfd.readouterr() == ("", "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(1, progress=True)
    assert "epoch" in capfd.readouterr().err


def test_ctrl_c_during_the_last_checkpoint_stops_what_would_follow(tmp_path, monkeypatch):
    save = training._Run.save

    def interrupted(run):
        save(run)
        if run.signal is None:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "save", interrupted)
        with pytest.raises(KeyboardInterrupt, match="2 epochs"):
            run(2, checkpoint=tmp_path / "run.pt")
    assert_same(run(2, checkpoint=tmp_path / "run.pt"), run(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_cuda_trains_and_resumes(tmp_path):
    def once(**options):
        model = setting()[0].cuda()
        optimizer = torch.optim.Adam(optim.glorot_scaled_groups(model, 0.01, 1))
        history = training.train(model, dataset(), optimizer, epochs=4, batch_size=10,
                                 device="cuda", **options)  # fmt: skip
        return model, history

    straight = once(probes=[StopAfter(-1)])
    with pytest.raises(KeyboardInterrupt):
        once(probes=[StopAfter(7)], checkpoint=tmp_path / "run.pt")
    assert_same(straight, once(probes=[StopAfter(-1)], checkpoint=tmp_path / "run.pt"))


def test_the_probes_hooks_come_off_at_the_end_and_after_an_error():
    for fails in (False, True):
        model, optimizer, _ = setting()
        probe = probes.GradientSample(weights=4, steps=1000)
        options = {"loss": lambda y, t: y.sum() * float("nan")} if fails else {}
        with contextlib.suppress(training.NonFiniteLossError):
            training.train(model, dataset(), optimizer, epochs=1, batch_size=10, device="cpu",
                           probes=[probe], **options)  # fmt: skip
        steps = 1 if fails else 5
        assert {len(gradients) for gradients in probe.gradients().values()} == {steps}
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_refused_run_leaves_no_hooks_behind(tmp_path):
    """A probe whose state no checkpoint can hold is refused after it has started."""

    class Unsaved(probes.ActivationSaturation):
        def state_dict(self):
            return {"when": object()}

    layer = BinaryLinear(16, 3, input_quantizer=binarize.ste_sign)
    model = nn.Sequential(nn.Flatten(), layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        with pytest.raises(ValueError, match="holds more than tensors"):
            training.train(model, dataset(), optimizer, epochs=1, batch_size=10, device="cpu",
                           probes=[Unsaved()], checkpoint=tmp_path / "run.pt")  # fmt: skip
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("seed", [4096, 2**32 - 1, 2**63])
def test_large_seeds_have_orders_of_their_own(seed):
    orders = {tuple(training.epoch_order(50, seed + more, epoch).tolist())
              for more in (0, -4096) for epoch in (0, 5)}  # fmt: skip
    assert len(orders) == 4


def test_the_orders_of_small_seeds_are_those_of_the_records():
    generator = torch.Generator().manual_seed((3 << 20) + 7)
    assert torch.equal(training.epoch_order(50, 3, 7), torch.randperm(50, generator=generator))


def test_nan_hits_no_label():
    outputs = torch.tensor([[torch.nan, 0.0], [2.0, torch.nan], [torch.inf, 0.0]])
    assert training.accuracy(outputs, torch.tensor([0, 1, 0])) == 1 / 3


def test_an_error_costs_no_statistics():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16))
    images = dataset().test_images
    training.reestimate_batchnorm(model, images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        training.reestimate_batchnorm(model, images[:1])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("minutes", [-1, float("nan")])
def test_minutes_between_checkpoints_are_a_number(minutes, tmp_path):
    with pytest.raises(ValueError, match="checkpoint_minutes must be a number from 0 on"):
        run(1, checkpoint=tmp_path / "run.pt", checkpoint_minutes=minutes)


@pytest.mark.filterwarnings("ignore:Detected call of")  # torch's, of steps not taken
@pytest.mark.parametrize("view", [lambda made: made, lambda made: optim.rate_as_lr(made, "gamma")])
def test_a_scheduler_needs_its_optimizer(view):
    model, optimizers, _ = flip_setting()

    def scheduler(weights):
        other = optim.CascadedEMA(weights, 0.01, 0.1)
        return torch.optim.lr_scheduler.ExponentialLR(view(other), 0.5)

    run(1, (model, optimizers, scheduler([nn.Parameter(torch.ones(2))])))  # of somebody's own
    with pytest.raises(ValueError, match="ExponentialLR belongs to another optimizer"):
        run(1, (model, optimizers, scheduler(optimizers[0].param_groups[0]["params"])))
