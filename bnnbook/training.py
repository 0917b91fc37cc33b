"""One loop: train, evaluate, checkpoint, resume. The images stay on the device as uint8."""

import contextlib
import hashlib
import inspect
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from bnnbook import checkpoints, graphs
from bnnbook.data import Dataset, unit_range
from bnnbook.layers import BinaryLayer

CHECK_EVERY = 64  # steps between two looks at the losses on a CPU; elsewhere it is once an epoch
FUNCTIONS = ("loss", "augment", "preprocess", "test_model")  # which train takes
SHOWN = ("train_loss", "validation_accuracy", "test_accuracy")  # beside the progress bar
MOST_OFF = 0.01  # of the gradient's length, by which a replayed step may differ: it rounds alike
CHECKPOINT_MINUTES = 5.0  # between two checkpoints, unless `train` is told otherwise


class NonFiniteLossError(ArithmeticError):
    """The loss became infinite or not a number; the message names epoch and step."""


@dataclass
class History:
    """What a training run measured: ``rows`` holds a dict an epoch, ``frame`` the same as a table.

    Columns: epoch (from 1), train_loss and train_accuracy (over the epoch, in training mode),
    validation_accuracy (with a validation set), test_accuracy, lr, the probes' columns, seconds.
    Accuracies are fractions.
    """

    rows: list[dict] = field(default_factory=list)

    @property
    def frame(self):
        """The history as a pandas DataFrame, one row an epoch."""
        import pandas

        return pandas.DataFrame(self.rows)

    def best(self) -> dict:
        """Return the epoch with the best validation accuracy, of equals the later one."""
        rows = [row for row in self.rows if "validation_accuracy" in row]
        if not rows:
            raise ValueError("no validation accuracy: train on data.hold_out(n)")
        return max(rows, key=lambda row: (row["validation_accuracy"], row["epoch"]))


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """Return the device to use: the one named, else CUDA if there is any, else the CPU.

    Raises ValueError for an unknown name and for CUDA where there is none.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(device)):
        raise ValueError(f"unknown device {str(device)!r}; known: auto, cpu, cuda, cuda:N")
    device = torch.device(device)
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ValueError(
            f"device '{device}' was asked for, but torch finds {found or 'no'} CUDA GPU"
            f"{'s' if found > 1 else ''}; use 'cpu'{' or a lower number' if found else ''}"
        )
    return device


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the type to autocast to: bfloat16 where the GPU has it, else float16; CPU: None."""
    if device.type != "cuda":
        return None
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bfloat16 else torch.float16


def precision(device: torch.device) -> str:
    """Return the name of the type that training computes in on a device.

    >>> precision(torch.device("cpu"))
    'float32'
    """
    return str(autocast_dtype(device) or torch.float32).removeprefix("torch.")


def _autocast(device: torch.device, enabled: bool = True):
    dtype = autocast_dtype(device)
    return torch.autocast(device.type, dtype, enabled=enabled and dtype is not None)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, *, preprocess: Callable = unit_range,
            batch_size: int = 1000) -> Tensor:  # fmt: skip
    """Return the model's outputs in evaluation mode, computed without autocast, (N, classes).

    On CUDA torch lets convolutions round their float32 inputs to TF32, which ±1 survive exactly;
    ``torch.backends.cudnn.allow_tf32 = False`` forbids it.

    images: as in a `bnnbook.data.Dataset`, uint8 (N, C, H, W), unless ``preprocess`` takes others.
    """
    if preprocess is unit_range and images.is_floating_point():
        raise ValueError("images are uint8, from 0 to 255; for ones of real numbers name the "
                         "preprocess that the model was trained with")  # fmt: skip
    device = _device_of(model)
    with _evaluation_mode(model):
        batches = (preprocess(part.to(device)) for part in images.split(batch_size))
        return torch.cat([model(batch).float() for batch in batches])


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module):
    """Put the model into evaluation mode, and each of its parts back into the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Return the fraction of rows whose largest output is the label.

    outputs: (N, classes), of two classes or more; another shape raises ValueError.

    >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
    0.5
    """
    return _hits(outputs, labels.to(outputs.device)).item() / len(labels)


def _hits(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the number of rows whose largest output is the label."""
    if outputs.dim() != 2 or outputs.shape[1] < 2:
        raise ValueError(
            f"a network has one output a class, (N, classes), two classes or more; this one's are "
            f"{tuple(outputs.shape)}"
        )
    return (outputs.argmax(1) == labels).sum()


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, **options) -> float:
    """Return the accuracy of the model in evaluation mode; options as in `predict`."""
    return accuracy(predict(model, images, **options), labels)


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, images: Tensor, *, preprocess: Callable = unit_range,
                         batch_size: int = 1000) -> nn.Module:  # fmt: skip
    """Collect batch-norm statistics anew by a clean pass over the images; returns the model.

    Running statistics belong to the weights they were collected under. A network that is run with
    other weights (real ones after stochastic training, say) needs new ones. Dropout stays off.
    """
    device = next(model.parameters()).device
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    with _evaluation_mode(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch: the plain average over all batches seen
            norm.train()
        try:
            # parts of equal size, because each counts the same
            for part in images.tensor_split(-(-len(images) // batch_size)):
                model(preprocess(part.to(device)))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return model


def train(model: nn.Module, data: Dataset, optimizers, *, epochs: int, batch_size: int,
          loss: Callable = cross_entropy, augment: Callable | None = None,
          preprocess: Callable = unit_range, schedulers=(), probes=(),
          test_model: Callable[[nn.Module], nn.Module] | None = None, evaluate_every: int = 1,
          seed: int = 0, device=None, autocast: bool = True, compile: bool = False,
          graph: bool = False,
          checkpoint: str | os.PathLike | None = None, checkpoint_minutes: float | None = None,
          progress: bool | None = None) -> History:  # fmt: skip
    """Train the model in place and return its `History`, one row an epoch.

    Each epoch is one permutation of the training images, fixed by ``seed`` and the epoch's number;
    an incomplete last batch is dropped. A batch goes from uint8 through ``augment`` and
    ``preprocess`` to the model, all on the device.

    optimizers: one torch optimizer or several; each steps once a batch, without a closure.
    schedulers: one torch scheduler or several; each steps once an epoch, without a measure.
    probes: one or several, see `bnnbook.probes`.
    test_model: makes from the model the network that is evaluated after an epoch; default itself.
    evaluate_every: evaluate after every so many epochs, and after the last.
    device: "cpu", "cuda", "auto" for the best there is, or None for the model's own. Another one
    than the model's raises ValueError.
    autocast: on CUDA, compute in the type `autocast_dtype` chooses.
    compile: use torch.compile.
    graph: on CUDA, record the forward and the backward pass once as a CUDA graph and replay it,
    for steps too small to keep a GPU busy. The numbers are the same, but augment, preprocess, loss
    and model must be made of tensor operations on the device: a number that Python draws for each
    batch would be drawn once (a first replay is compared with a step, and refused). Step by step
    as ever on a CPU, in float16, for steps that a probe looks into, for a model with other hooks
    than such a probe's, for one of which an output that can be differentiated is still kept (a
    warning says so), and where BNNBOOK_GRAPHS=0 is set.
    checkpoint: a file. If it is there, the run continues from it, to the very same numbers (if
    all randomness comes from torch's global generators, and on CUDA if the backward pass of no
    layer adds in changing order, as that of overlapping max-pooling does); it is written every
    ``checkpoint_minutes`` (by default `CHECKPOINT_MINUTES`), at the end, and on Ctrl-C after the
    step in progress. A file of other data, another network or other settings is refused; functions
    are known by their names and the numbers they were made with, not by their code.
    progress: a bar; by default only on a terminal and on Colab.

    Raises NonFiniteLossError, checkpoints.CheckpointError, graphs.GraphError, and ValueError for
    arguments that make no sense.
    """
    if checkpoint_minutes is None:
        checkpoint_minutes = CHECKPOINT_MINUTES
    device = _device_of(model) if device is None else choose_device(device)
    run = _Run(model, data, optimizers, epochs=epochs, batch_size=batch_size, loss=loss,
               augment=augment, preprocess=preprocess, schedulers=_as_tuple(schedulers),
               probes=_as_tuple(probes), test_model=test_model, every=evaluate_every, seed=seed,
               device=device, autocast=autocast, compile=compile, graph=graph,
               checkpoint=checkpoint and Path(checkpoint), minutes=checkpoint_minutes)  # fmt: skip
    with (
        _reproducible(run.device, seed), _stop_signals(run), _hooks_off_after(run.probes),
        _bar(run, progress) as bar,
    ):  # fmt: skip
        run.resume()
        if run.epoch < epochs:
            run.record_graph()
        while run.epoch < epochs:
            bar.update(run.epoch - bar.n)
            train_epoch(run)
            run.end_epoch()
            bar.set_postfix(run.summary())
            run.save_when_due()
        bar.update(epochs - bar.n)
        run.save_if_possible()
        run.save_when_due()  # Ctrl-C meanwhile: other trainings of the same run do not begin
    return History(run.rows)


def train_epoch(run: "_Run") -> None:
    """Go through the rest of the run's current epoch, step by step."""
    run.model.train()
    order = epoch_order(len(run.labels), run.seed, run.epoch).to(run.device)
    while run.step < run.steps:
        train_step(run, order[run.step * run.batch_size : (run.step + 1) * run.batch_size])
        run.step += 1
        run.after_step()


def train_step(run: "_Run", index: Tensor) -> None:
    """Do one step on the images at index. Losses and hits stay on the device."""
    value, hits = run.gradients(index)
    for optimizer in run.optimizers:
        run.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    run.scaler.update()
    for probe in run.probes:
        probe.step()
    run.losses[run.step] = value
    run.hits += hits


class _GraphedGradients:
    """What `_Run.passes` does, replayed as a CUDA graph."""

    def __init__(self, run: "_Run"):
        self.index = torch.arange(run.batch_size, device=run.device)
        held = (p for o in run.optimizers for group in o.param_groups for p in group["params"])
        self.parameters = list(dict.fromkeys((*run.model.parameters(), *held)))  # a loss's, too
        with _undone(run):
            self.graph = graphs.Graph(partial(self.step, run, self.index), run.device)
        self.grads = [parameter.grad for parameter in self.parameters]
        self.check(run)

    def step(self, run: "_Run", index: Tensor) -> tuple[Tensor, Tensor]:
        """Compute gradients into new tensors; the graph keeps those of its recording."""
        for parameter in self.parameters:
            parameter.grad = None
        return run.passes(index)

    def check(self, run: "_Run") -> None:
        """Raise GraphError if on other images a replay computes other gradients than a step."""
        index = (self.index + run.batch_size) % len(run.labels)
        with _undone(run):
            self.step(run, index)
        stepped = [p.grad for p in self.parameters if p.grad is not None]
        with _undone(run):
            self(index)
        replayed = [p.grad for p in self.parameters if p.grad is not None]
        off = sum((a - b).float().norm() ** 2 for a, b in zip(stepped, replayed, strict=True))
        if off > MOST_OFF**2 * sum(a.float().norm() ** 2 for a in stepped):
            raise graphs.GraphError(
                "replayed as a CUDA graph the step has other gradients. Does augment, preprocess, "
                "the loss or the model use a number that Python draws or counts? Then it takes "
                "graph=False"
            )
        for parameter in self.parameters:
            parameter.grad = None

    def __call__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        self.index.copy_(index)
        outputs = self.graph()
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            parameter.grad = grad  # which the optimizer's zero_grad took off
        return outputs


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """Return the permutation of n training images for this seed and epoch, the same everywhere.

    >>> torch.equal(epoch_order(9, seed=1, epoch=4), epoch_order(9, seed=1, epoch=4))
    True
    """
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    return torch.randperm(n, generator=generator)


def to_channels_last(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
    """Lay out 4-D parameters channels last; `torch.nn.Module.to` refuses 5-D ones.

    So are the optimizers' buffers of them: torch's fused rules take their layouts to be the same.
    """
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dim() == parameter.dim() == 4:
                    state[name] = value.contiguous(memory_format=torch.channels_last)


class _Run:
    """The state of a training run, and how it is written to a checkpoint and read back."""

    def __init__(self, model, data, optimizers, *, epochs, batch_size, checkpoint, minutes, device,
                 seed, compile, **settings):  # fmt: skip
        self.optimizers = _as_tuple(optimizers)
        _validate(data, self.optimizers, epochs, settings["every"], batch_size, model, device)
        _check_held(self.optimizers, model, settings["loss"])
        _check_not_latent(self.optimizers, model)
        _check_steps((*self.optimizers, *settings["schedulers"]))
        self.__dict__.update(settings)
        self.model, self.data, self.device, self.seed = model, data.to(device), device, seed
        self.epochs, self.batch_size = epochs, batch_size
        self.checkpoint, self.minutes, self.stop = checkpoint, minutes, None
        self.labels = self.data.train_labels
        self.steps = len(self.labels) // batch_size
        self.channels_last = any(isinstance(m, nn.Conv2d) for m in model.modules())
        if self.channels_last:
            to_channels_last(model, self.optimizers)
        self.forward = torch.compile(model) if compile else model
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=self.autocast and autocast_dtype(device) == torch.float16
        )
        self.losses = torch.zeros(self.steps, device=device)
        self.hits = torch.zeros((), dtype=torch.int64, device=device)
        self.epoch = self.step = 0
        self.rows: list[dict] = []
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)  # what an earlier loop left behind
        self.started = self.saved = time.monotonic()
        for probe in self.probes:
            probe.start(model)
        self.replay, self.lookers = None, [p for p in self.probes if hasattr(p, "looking")]
        if checkpoint:
            checkpoints.check_probes(self.probes)
        self.settings = self.current_settings() if checkpoint else {}

    def record_graph(self) -> None:
        """Make a CUDA graph of the passes, if that is asked for and possible."""
        asked = self.graph and graphs.is_wanted(self.device)
        known = sum(len(getattr(probe, "handles", ())) for probe in self.lookers)
        if not asked or self.scaler.is_enabled() or graphs.count_hooks(self.model) > known:
            return
        if graphs.is_held(self.model):
            warnings.warn("a result of this network from before, such as a loss, is still kept: "
                          "with it steps cannot be recorded as a CUDA graph, and run one by one",
                          stacklevel=3)  # fmt: skip
            return
        self.model.train()
        with _looking_away(self.lookers):
            self.replay = _GraphedGradients(self)

    def gradients(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients on the images at index; return the loss and the hits."""
        if self.replay is None or any(probe.looking for probe in self.lookers):
            return self.passes(index)
        return self.replay(index)

    def passes(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Do the forward and the backward pass on the images at index: the loss, and the hits."""
        images, targets = self.batch(index), self.labels[index]
        with _autocast(self.device, self.autocast):
            outputs = self.forward(images)
        value = self.loss(outputs.float(), targets)
        self.scaler.scale(value).backward()
        return value.detach(), _hits(outputs, targets)

    def batch(self, index: Tensor) -> Tensor:
        """Return the training images at index as the model takes them."""
        images = self.data.train_images[index]
        images = self.preprocess(self.augment(images) if self.augment else images)
        if self.channels_last:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    def after_step(self) -> None:
        """Look at the losses now and then, and at whether a checkpoint is due."""
        if self.step == 1 and self.epoch == 0:
            _check_binary(self.model)
        is_cpu = self.device.type == "cpu"  # an accelerator would have to be waited for
        if self.step == self.steps or (is_cpu and self.step % CHECK_EVERY == 0):
            self.check_losses()
        if self.step < self.steps:  # after the last one the epoch is ended first
            self.save_when_due()

    def save_when_due(self) -> None:
        """Write a checkpoint and stop, if that was asked for; or write one because it is time."""
        if self.stop is not None:
            self.check_losses()
            self.save()
            where = f"; {self.checkpoint} holds the run, the same call continues it"
            raise KeyboardInterrupt(f"stopped after {self.epoch} epochs and {self.step} steps"
                                    f"{where if self.checkpoint else ''}")  # fmt: skip
        if self.checkpoint and time.monotonic() - self.saved > 60 * self.minutes:
            self.check_losses()
            self.save_if_possible()

    def check_losses(self) -> None:
        """Raise if a loss of this epoch is not finite."""
        bad = (~self.losses[: self.step].isfinite()).nonzero()
        if len(bad):
            step = bad[0].item()
            is_first = step == self.epoch == 0
            raise NonFiniteLossError(
                f"the loss is {self.losses[step].item()} in epoch {self.epoch + 1}, "
                f"step {step + 1} of {self.steps}; "
                + ("look at preprocess, model and loss: no weight has moved yet" if is_first
                   else "a smaller learning rate usually helps")
            )  # fmt: skip

    def end_epoch(self) -> None:
        """Evaluate, add a row to the history, and let the schedulers step."""
        row = {
            "epoch": self.epoch + 1,
            "train_loss": self.losses.mean().item(),
            "train_accuracy": self.hits.item() / (self.steps * self.batch_size),
            **(self.accuracies() if self.is_evaluated() else {}),
            "lr": self.optimizers[0].param_groups[-1]["lr"],
        }
        for probe in self.probes:
            row.update(probe.epoch())
        _check_binary(self.model)
        for scheduler in self.schedulers:
            scheduler.step()
        now = time.monotonic()
        row["seconds"] = now - self.started
        # plain numbers only: a NumPy scalar could be saved, but not loaded safely
        self.rows.append({k: v.item() if hasattr(v, "item") else v for k, v in row.items()})
        self.started = now
        self.epoch, self.step = self.epoch + 1, 0
        self.hits.zero_()

    def is_evaluated(self) -> bool:
        """Return whether the current epoch is one to evaluate after."""
        return (self.epoch + 1) % self.every == 0 or self.epoch + 1 == self.epochs

    def accuracies(self) -> dict[str, float]:
        """Return the accuracies of the network that `test_model` makes."""
        network = self.test_model(self.model) if self.test_model else self.model
        _check_binary(network)
        sets = {"validation": self.data.validation_images, "test": self.data.test_images}
        labels = {"validation": self.data.validation_labels, "test": self.data.test_labels}
        return {
            f"{name}_accuracy": evaluate(network, images, labels[name], preprocess=self.preprocess)
            for name, images in sets.items()
            if images is not None
        }

    def summary(self) -> dict[str, str]:
        """Return the last row in short, for the progress bar."""
        return {k: f"{v:.4f}" for k, v in self.rows[-1].items() if k in SHOWN}

    def identity(self) -> dict:
        """Return what must agree for a checkpoint to continue this run."""
        labels = self.labels.cpu().numpy().tobytes()
        is_module = isinstance(self.loss, nn.Module)
        return {
            "data": f"{self.data.name} {self.data.sha256}",
            "training images": f"{len(self.labels)} {hashlib.sha256(labels).hexdigest()}",
            "network": repr(self.model),
            "loss": repr(self.loss) if is_module else checkpoints.name_of(self.loss),
            "augmentation": checkpoints.name_of(self.augment),
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "parameters": [tuple(p.shape) for p in self.model.parameters()],
            "optimizers": [type(optimizer).__name__ for optimizer in self.optimizers],
            "initial rates": [
                group.get("initial_lr", group["lr"])
                for optimizer in self.optimizers
                for group in optimizer.param_groups
            ],
            "probes": [type(probe).__name__ for probe in self.probes],
            "schedulers": [type(scheduler).__name__ for scheduler in self.schedulers],
            "precision": precision(self.device) if self.autocast else "float32",
            "device type": self.device.type,
        }

    def current_settings(self) -> dict[str, object]:
        """Return the numbers that functions, optimizers and schedulers are set to, by name."""
        functions = {name: getattr(self, name) for name in FUNCTIONS}
        return checkpoints.settings(self.model, functions, optimizers=self.optimizers,
                                    schedulers=self.schedulers)  # fmt: skip

    def parts(self) -> dict[str, list]:
        """Return everything with a state_dict, by name."""
        return {
            "model": [self.model],
            "optimizers": self.optimizers,
            "schedulers": self.schedulers,
            "probes": self.probes,
            "scaler": [self.scaler],
        }

    def save(self) -> None:
        """Write the checkpoint, if the run has one."""
        if not self.checkpoint:
            return
        parts = self.parts().items()
        state = {name: [part.state_dict() for part in members] for name, members in parts}
        state |= {
            "identity": self.identity(), "settings": self.settings, "epoch": self.epoch,
            "step": self.step, "rows": self.rows, "losses": self.losses, "hits": self.hits,
            "seconds": time.monotonic() - self.started, "random": torch.get_rng_state(),
        }  # fmt: skip
        if self.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoints.write(state, self.checkpoint)
        self.saved = time.monotonic()

    def save_if_possible(self) -> None:
        """Write a checkpoint; a full disk costs no more than the checkpoint."""
        try:
            self.save()
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            self.saved = time.monotonic()
            warnings.warn(
                f"the run goes on, but its checkpoint was not written: {error}", stacklevel=2
            )

    def resume(self) -> None:
        """Continue from the checkpoint if there is one."""
        if not self.checkpoint or not self.checkpoint.exists():
            return
        state = checkpoints.read(self.checkpoint)
        checkpoints.compare(self.checkpoint, self.identity(), state["identity"])
        there = state.get("settings", {})
        here = {name: self.settings.get(name, value) for name, value in there.items()}
        checkpoints.compare(self.checkpoint, here, there)  # another torch may have more settings
        for name, parts in self.parts().items():
            for part, saved in zip(parts, state[name], strict=True):
                part.load_state_dict(saved)
        self.epoch, self.step, self.rows = state["epoch"], state["step"], state["rows"]
        self.losses.copy_(state["losses"])
        self.hits.copy_(state["hits"])
        self.started = time.monotonic() - state["seconds"]
        torch.set_rng_state(state["random"].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"].cpu(), self.device)


def _check_binary(model: nn.Module) -> None:
    """Raise if weights without a quantizer are not ±1 any more: results would not be binary."""
    for name, layer in model.named_modules():
        is_binary = isinstance(layer, BinaryLayer) and layer.weight_quantizer is None
        if is_binary and not (layer.weight.abs() == 1).all():
            raise ValueError(
                f"{name}.weight is not ±1 any more. Without a weight_quantizer only an optimizer "
                "that flips signs (Bop, CascadedEMA) may hold it: see split_parameters"
            )


def _as_tuple(parts) -> tuple:
    return tuple(parts) if isinstance(parts, Iterable) else (parts,)


def _validate(data, optimizers, epochs, every, batch_size, model, device) -> None:
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, not {epochs}")
    if every < 1:
        raise ValueError(f"evaluate_every must be at least 1, not {every}")
    if not 1 <= batch_size <= len(data.train_labels):
        raise ValueError(
            f"batch_size must be from 1 to the {len(data.train_labels)} training images, "
            f"not {batch_size}"
        )
    if not optimizers:
        raise ValueError("no optimizer was given")
    wrong = {p.device.type for p in model.parameters()} - {device.type}
    if wrong:
        raise ValueError(
            f"the model is on {wrong.pop()}, the run on {device.type}: move the model there "
            "before the optimizers are made, or name the model's device"
        )


def _check_steps(parts: Iterable) -> None:
    """Raise for an optimizer or a scheduler whose step asks for more than this loop gives."""
    for part in parts:
        _, *parameters = inspect.signature(type(part).step).parameters.values()  # after self
        for each in parameters:
            if each.default is each.empty and each.kind == each.POSITIONAL_OR_KEYWORD:
                raise ValueError(
                    f"{type(part).__name__}.step needs its {each.name}, which train does not give "
                    "it: take another, or a loop of your own"
                )


def _check_not_latent(optimizers, model: nn.Module) -> None:
    """Raise if a rule that flips ±1 holds latent weights, which it would overwrite by signs."""
    flipped = {id(p) for o in optimizers if getattr(o, "binary", False)
               for group in o.param_groups for p in group["params"]}  # fmt: skip
    for name, layer in model.named_modules():
        latent = isinstance(layer, BinaryLayer) and layer.weight_quantizer is not None
        if latent and id(layer.weight) in flipped:
            raise ValueError(
                f"{name}.weight is latent, for its layer has a weight_quantizer; Bop and "
                "CascadedEMA are for layers with weight_quantizer=None"
            )


def _check_held(optimizers, model, loss) -> None:
    """Raise if an optimizer holds nothing that is trained here."""
    modules = [part for part in (model, loss) if isinstance(part, nn.Module)]
    ours = {id(parameter) for module in modules for parameter in module.parameters()}
    for optimizer in optimizers:
        if not any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                f"{type(optimizer).__name__} holds no parameter of this model: was it made for "
                "another, or before a layer was replaced?"
            )


@contextlib.contextmanager
def _reproducible(device: torch.device, seed: int):
    """Seed torch for this run only, and ask cuDNN for deterministic kernels."""
    cudnn = torch.backends.cudnn  # whose flags() would also set allow_tf32
    before = cudnn.benchmark, cudnn.deterministic
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        cudnn.benchmark, cudnn.deterministic = False, True
        try:
            yield
        finally:
            cudnn.benchmark, cudnn.deterministic = before


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextlib.contextmanager
def _undone(run: _Run):
    """Take back what passes change besides gradients: buffers and random numbers."""
    modules = [part for part in (run.model, run.loss) if isinstance(part, nn.Module)]
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    devices = [run.device] if run.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@contextlib.contextmanager
def _looking_away(probes: Sequence):
    """Let the hooks of probes that look into some steps only do nothing."""
    before = [probe.looking for probe in probes]
    for probe in probes:
        probe.looking = False
    try:
        yield
    finally:
        for probe, looking in zip(probes, before, strict=True):
            probe.looking = looking


@contextlib.contextmanager
def _stop_signals(run: _Run):
    """With a checkpoint, let Ctrl-C and SIGTERM finish the step in progress first."""
    if not run.checkpoint or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number, frame):
        if run.stop is not None:  # the second Ctrl-C does not wait
            raise KeyboardInterrupt
        run.stop = number

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _hooks_off_after(probes: Sequence):
    """Take the probes' hooks off the model at the end, however it comes."""
    try:
        yield
    finally:
        for probe in probes:
            getattr(probe, "stop", lambda: None)()


def _bar(run: _Run, progress: bool | None) -> tqdm:
    if progress is None:
        progress = sys.stderr.isatty() or "google.colab" in sys.modules
    return tqdm(total=run.epochs, unit="epoch", disable=not progress, leave=False)
