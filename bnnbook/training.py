"""The training loop: train, evaluate, checkpoint and resume, with uint8 images on the device."""

import contextlib
import copy
import hashlib
import itertools
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from bnnbook import _checks, checkpoints, graphs
from bnnbook._checks import parameters_of
from bnnbook.data import Dataset, unit_range
from bnnbook.layers import binary_layers

DISTINCT_SEEDS = 4096  # torch's generator takes 32 bits: 12 for these, 20 to count epochs
CHECK_EVERY = 64  # steps between two checks of the losses on a CPU; on a GPU, one check per epoch
FUNCTIONS = ("loss", "augment", "preprocess", "test_model", "stop")  # arguments of `train`
# Columns of a `History` that no probe may have, too.
COLUMNS = ("epoch", "train_loss", "train_accuracy", "validation_accuracy", "test_accuracy", "lr",
           "seconds")  # fmt: skip
SHOWN = ("train_loss", "validation_accuracy", "test_accuracy")  # on the progress bar
# What BNNBOOK_PRECISION may name: autocast's dtype, None for none.
PRECISIONS = {"auto": None, "float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
STOPS = (signal.SIGINT, signal.SIGTERM)  # the signals that stop a run
CHECKPOINT_MINUTES = 5.0  # between two checkpoints, unless `train` is given another number


class NonFiniteLossError(ArithmeticError):
    """The loss, a weight, a buffer or an optimizer's average became infinite or NaN."""


@dataclass
class History:
    """What a training run measured: ``rows`` has one dict per epoch, ``frame`` is their table.

    Columns: epoch (from 1), train_loss and train_accuracy (over the epoch, in training mode),
    validation_accuracy (with a validation set), test_accuracy, lr, the probes' columns, seconds.
    Accuracies are fractions.
    """

    rows: list[dict] = field(default_factory=list)

    @property
    def frame(self):
        """The history as a pandas DataFrame, one row per epoch."""
        import pandas

        return pandas.DataFrame(self.rows)

    def best(self) -> dict:
        """Return the row of the best validation accuracy; of several equal ones, the last.

        Raises ValueError for a run without a validation set.
        """
        rows = [row for row in self.rows if "validation_accuracy" in row]
        if not rows:
            raise ValueError("no validation accuracy: train on data.hold_out(n)")
        return max(rows, key=lambda row: (row["validation_accuracy"], row["epoch"]))


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """Return the named device; for None and "auto", CUDA if available, else the CPU.

    Raises ValueError for an unknown name and for a GPU that torch does not find.
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
    """Return the dtype that autocast computes in on a device; None stands for float32.

    That is what the environment's BNNBOOK_PRECISION names, else the device's `usual_dtype`. Raises
    ValueError for another name than those in `PRECISIONS`.
    """
    asked = os.environ.get("BNNBOOK_PRECISION") or "auto"
    if asked not in PRECISIONS:
        raise ValueError(f"unknown precision {asked!r}; known: {', '.join(PRECISIONS)}")
    return usual_dtype(device) if asked == "auto" else PRECISIONS[asked]


def usual_dtype(device: torch.device) -> torch.dtype | None:
    """Return bfloat16 for a GPU that supports it, float16 for another one, None for a CPU.

    A CPU stays with float32 although some (with AVX-512 BF16 or AMX) are faster in bfloat16: most
    are not, and small-scale results should not depend on which one it is.
    """
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):  # of several GPUs, this one is asked
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bfloat16 else torch.float16


def precision(device: torch.device) -> str:
    """Return the name of the dtype that training computes in on a device.

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
    """Return the model's outputs, of shape (N, classes), in evaluation mode and without autocast.

    On CUDA, torch lets convolutions round their float32 inputs to TF32, which represents ±1
    exactly; ``torch.backends.cudnn.allow_tf32 = False`` prevents this. Raises ValueError for
    floating-point images if ``preprocess`` is the default, which is for uint8.

    images: as in a `bnnbook.data.Dataset`, uint8 (N, C, H, W), or as ``preprocess`` takes them.
    batch_size: images per forward pass.
    """
    _check_uint8(images, preprocess)
    device = _device_of(model)
    with _evaluation_mode(model), _autocast(device, enabled=False):
        # copies, because a preprocess may work in place
        batches = (preprocess(part.to(device, copy=True)) for part in images.split(batch_size))
        return torch.cat([model(batch).float() for batch in batches])


def _check_uint8(images: Tensor, preprocess: Callable) -> None:
    """Raise ValueError for floating-point images if ``preprocess`` is the default, for uint8."""
    if preprocess is unit_range and images.is_floating_point():
        raise ValueError("images are uint8, from 0 to 255; for floating-point images, pass the "
                         "preprocess that the model was trained with")  # fmt: skip


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module):
    """Put the model into evaluation mode; afterwards, give each module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Return the fraction of rows whose largest output is that of the label.

    Raises ValueError for outputs of another shape than (N, classes), or of fewer than two classes,
    for labels of another shape than (N,), and for N = 0. A row with a NaN is no hit.

    >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
    0.5
    """
    if not len(outputs):
        raise ValueError("there is nothing to take the accuracy of: the set is empty")
    return _hits(outputs, labels.to(outputs.device)).item() / len(labels)


def _hits(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the number of rows whose largest output is that of the label."""
    _check_outputs(outputs, 2)
    if labels.shape != outputs.shape[:1]:  # the comparison below would broadcast
        raise ValueError(
            f"labels are one number per row, of shape ({len(outputs)},) for outputs of shape "
            f"{tuple(outputs.shape)}; these are {tuple(labels.shape)}"
        )
    largest, index = outputs.max(1)
    return ((index == labels) & ~largest.isnan()).sum()  # torch takes NaN for the largest


def _check_outputs(outputs: Tensor, classes: int) -> None:
    """Raise ValueError for outputs of another shape than (N, classes), or of too few classes."""
    if outputs.dim() != 2 or outputs.shape[1] < max(classes, 2):
        raise ValueError(
            "a network has one output per class, of shape (N, classes) with "
            f"{max(classes, 2)} classes or more here; this one's are {tuple(outputs.shape)}"
        )


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, **options) -> float:
    """Return the accuracy of the model in evaluation mode; options as in `predict`.

    Raises ValueError as `accuracy` and `predict` do.
    """
    return accuracy(predict(model, images, **options), labels)


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, images: Tensor, *, preprocess: Callable = unit_range,
                         batch_size: int = 1000) -> nn.Module:  # fmt: skip
    """Collect the batch-norm statistics anew in one pass over the images; return the model.

    Running statistics belong to the weights under which they were collected. A network that is run
    with other weights (real ones after stochastic training, say) needs new ones. In this pass only
    the batch norms are in training mode, so dropout stays off. Autocast is off, too.

    images, preprocess, batch_size: as in `predict`. Raises ValueError if there are no images, or
    for floating-point ones as `predict` does. After an error, such as torch's for a batch of one,
    the statistics are what they were.
    """
    _check_uint8(images, preprocess)
    if not len(images) or batch_size < 1:
        raise ValueError(f"{len(images)} images in batches of {batch_size} give no statistics")
    device = _device_of(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    before = [copy.deepcopy(norm.state_dict()) for norm in norms]
    with _evaluation_mode(model), _autocast(device, enabled=False):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # which makes torch average over all batches
            norm.train()
        try:
            # parts of equal size (but for one image), because each counts the same
            for part in images.tensor_split(-(-len(images) // batch_size)):
                model(preprocess(part.to(device, copy=True)))
        except BaseException:
            for norm, state in zip(norms, before, strict=True):
                norm.load_state_dict(state)
            raise
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return model


def own_statistics(model: nn.Module, images: Tensor, *,
                   weight_quantizer: Callable | None = None, **options) -> nn.Module:  # fmt: skip
    """Return a copy of the model with batch-norm statistics collected anew over the images.

    weight_quantizer: the copy's binary layers get this one, if it is given, such as
    `binarize.real_weight` to run with latent weights.
    options: as in `reestimate_batchnorm`.
    """
    network = copy.deepcopy(model)
    for layer in binary_layers(network) if weight_quantizer else ():
        layer.weight_quantizer = weight_quantizer
    return reestimate_batchnorm(network, images, **options)


def train(model: nn.Module, data: Dataset, optimizers, *, epochs: int, batch_size: int,
          loss: Callable = cross_entropy, augment: Callable | None = None,
          preprocess: Callable = unit_range, schedulers=(), probes=(),
          test_model: Callable[[nn.Module], nn.Module] | None = None, evaluate_every: int = 1,
          stop: Callable[[list[dict]], bool] | None = None, seed: int = 0, device=None,
          autocast: bool = True, compile: bool = False, graph: bool = False,
          checkpoint: str | os.PathLike | None = None, checkpoint_minutes: float | None = None,
          progress: bool | None = None) -> History:  # fmt: skip
    """Train the model in place and return its `History`, one row per epoch.

    Each epoch goes through one permutation of the training images, which ``seed`` and the epoch's
    number fix; an incomplete last batch is dropped. A batch goes from uint8 through ``augment``
    and ``preprocess`` to the model, all on the device.

    optimizers: one torch optimizer or several; each steps once per batch, without a closure.
    loss: a function of the outputs, in float32, and the labels.
    augment: a function of a whole batch, uint8 (N, C, H, W), such as `data.crop_flip`. A random
    transform of torchvision draws only once for all of the batch.
    schedulers: one torch scheduler or several; each steps once per epoch, without a metric.
    probes: one or several, see `bnnbook.probes`.
    test_model: a function of the model that returns the network to evaluate; by default the model.
    evaluate_every: epochs from one evaluation to the next; the last of ``epochs`` is always
    evaluated (one after which ``stop`` ends the run need not be).
    stop: a function of the rows so far, called after each epoch; the run ends where it returns
    True. It should depend on the rows alone, so that a resumed run ends at the same epoch. With
    an ``evaluate_every`` above 1, the rows between two evaluations have no accuracies.
    device: "cpu", "cuda", "auto" (CUDA if available) or None for the model's own; it must be of
    the same type as the model's.
    autocast: compute in the dtype that `autocast_dtype` chooses: on a CPU usually float32.
    compile: use torch.compile.
    graph: on CUDA, record the forward and the backward pass once as a CUDA graph and replay it,
    for steps too small to keep a GPU busy. The results are the same, but ``augment``,
    ``preprocess``, ``loss`` and the model must consist of tensor operations on the device: a
    random number that Python draws for each batch would be drawn only once (such a graph is
    refused, because its first replay is compared with an ordinary step). Nor may a probe or a hook
    later replace a tensor or a quantizer, freeze a layer, or set a number of a module; once an
    epoch this is looked up, and refused. There is no graph on a CPU, in float16, for steps that a
    probe looks into, for a model with hooks other than such a probe's, if at the start an earlier
    output of the model is still kept with its autograd graph (a warning says so), and where the
    environment has BNNBOOK_GRAPHS=0.
    checkpoint: a file. If it exists, the run continues from it and gives exactly the same numbers,
    provided that all randomness comes from torch's global generators, that whatever changes is in
    the state_dict of the model, the loss, an optimizer, a scheduler or a probe (a moving average
    of the weights can be a probe), and that, on CUDA, no layer's backward pass adds in varying
    order, as that of overlapping max-pooling does. The file is written every
    ``checkpoint_minutes`` (by default `CHECKPOINT_MINUTES`), at the end, and on Ctrl-C or SIGTERM
    after the step in progress. A file of other data, another network or other settings is refused;
    functions, quantizers, layers and schedules are compared by name and by the values they were
    made with (a layer by those that it keeps under their arguments' names), not by their code, and
    probes by their classes only.
    progress: show a progress bar; by default only on a terminal and on Colab.

    Raises NonFiniteLossError if the loss becomes infinite or NaN; after the first step and after
    each epoch, parameters, buffers (a mask's -inf excepted) and optimizers' averages are looked
    at as well. Raises checkpoints.CheckpointError for a checkpoint that is damaged or of another
    run, graphs.GraphError for a step that cannot be recorded, ValueError or TypeError for
    unsuitable arguments, and KeyboardInterrupt on Ctrl-C.
    """
    if checkpoint_minutes is None:
        checkpoint_minutes = CHECKPOINT_MINUTES
    device = _device_of(model) if device is None else choose_device(device)
    run = _Run(
        model=model, data=data, optimizers=_as_tuple(optimizers), epochs=epochs,
        batch_size=batch_size, loss=loss, augment=augment, preprocess=preprocess,
        schedulers=_as_tuple(schedulers), probes=_as_tuple(probes), test_model=test_model,
        evaluate_every=evaluate_every, stop=stop, seed=seed, device=device, autocast=autocast,
        compile=compile, graph=graph, checkpoint=checkpoint and Path(checkpoint).expanduser(),
        checkpoint_minutes=checkpoint_minutes,
    )  # fmt: skip
    with _reproducible(run.device, run.seed), _stop_signals(run), _bar(run, progress) as bar:
        try:
            run.begin()
            is_over = run.is_over()
            if not is_over:
                run.record_graph()
            while not is_over:
                bar.update(run.epoch - bar.n)
                train_epoch(run)
                run.end_epoch()
                bar.set_postfix(run.summary())
                run.save_when_due()
                is_over = run.is_over()
            bar.update(run.epoch - bar.n)
            run.save_if_possible()
            run.save_when_due()  # after Ctrl-C in the meantime, raise: nothing else shall begin
        finally:
            run.end()
    return History(run.rows)


def train_epoch(run: "_Run") -> None:
    """Run the remaining steps of an epoch of `train`, which alone can call this."""
    run.model.train()
    run.check_replay()
    order = epoch_order(len(run.labels), run.seed, run.epoch).to(run.device)
    while run.step < run.steps:
        train_step(run, order[run.step * run.batch_size : (run.step + 1) * run.batch_size])
        run.step += 1
        run.after_step()


def train_step(run: "_Run", index: Tensor) -> None:
    """Take one step of `train` on the images at ``index``; loss and hits stay on the device."""
    value, hits = run.gradients(index)
    for optimizer in run.optimizers:
        if any(p.grad is not None for p in parameters_of(optimizer)):
            run.scaler.step(optimizer)
        else:  # of frozen layers, which the scaler would refuse
            optimizer.step()
    run.scaler.update()
    run.clear_gradients()
    for probe in run.probes:
        probe.step()
    run.losses[run.step] = value
    run.hits += hits


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """Return the permutation of ``n`` training images for ``seed`` and ``epoch``: always the same.

    Seeds below `DISTINCT_SEEDS` that differ have permutations of their own, others most probably.

    >>> torch.equal(epoch_order(9, seed=1, epoch=4), epoch_order(9, seed=1, epoch=4))
    True
    """
    number = (seed << 20) + epoch
    if not 0 <= seed < DISTINCT_SEEDS:
        digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
        number = int.from_bytes(digest[:4], "little")
    generator = torch.Generator().manual_seed(number)
    return torch.randperm(n, generator=generator, device="cpu")


def to_channels_last(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
    """Convert the model's 4-D parameters, and the optimizers' buffers for them, to channels last.

    The buffers must follow, because torch's fused optimizers assume that a parameter and its
    buffers have the same layout. `torch.nn.Module.to` would refuse a model with 5-D parameters.
    """
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dim() == parameter.dim() == 4:
                    state[name] = value.contiguous(memory_format=torch.channels_last)


def _sums(data: Dataset) -> dict[str, object]:
    """Return the sums of the data's images, by name, if they are whole numbers.

    `dataclasses.replace` keeps a set's hash, so these tell that images were replaced.
    """
    sets = {name: getattr(data, f"{name}_images") for name in ("train", "validation", "test")}
    whole = {k: v for k, v in sets.items() if v is not None and not v.is_floating_point()}
    # in parts, since torch makes a copy in int64
    return {f"sum of the {name} images": sum(part.sum().item() for part in images.split(5000))
            for name, images in whole.items()}  # fmt: skip


@dataclass(kw_only=True, eq=False, repr=False)
class _Run:
    """The state of a training run, and how it is written to a checkpoint and read back."""

    model: nn.Module  # these are the arguments of `train`, optimizers and the like as tuples
    data: Dataset
    optimizers: tuple
    epochs: int
    batch_size: int
    loss: Callable
    augment: Callable | None
    preprocess: Callable
    schedulers: tuple
    probes: tuple
    test_model: Callable | None
    evaluate_every: int
    stop: Callable | None
    seed: int
    device: torch.device
    autocast: bool
    compile: bool
    graph: bool
    checkpoint: Path | None
    checkpoint_minutes: float

    def __post_init__(self):
        self.check()
        self.data, self.seed = self.data.to(self.device), int(self.seed)
        self.labels = self.data.train_labels
        self.steps = len(self.labels) // self.batch_size
        self.classes = int(self.labels.max()) + 1
        self.channels_last = any(isinstance(m, nn.Conv2d) for m in self.model.modules())
        if self.channels_last:
            to_channels_last(self.model, self.optimizers)
        self.forward = torch.compile(self.model) if self.compile else self.model
        is_half = self.autocast and autocast_dtype(self.device) == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=is_half)
        owners = (part for part in (self.model, self.loss) if isinstance(part, nn.Module))
        held = [p for part in (*owners, *self.optimizers) for p in parameters_of(part)]
        self.parameters = list(dict.fromkeys(held))
        self.clear_gradients()  # left behind by an earlier loop
        self.losses = torch.zeros(self.steps, device=self.device)  # of this epoch
        self.hits = torch.zeros((), dtype=torch.int64, device=self.device)
        self.epoch = self.step = 0
        self.rows: list[dict] = []
        self.started = self.saved = time.monotonic()
        self.replay, self.sampling_probes, self.begun, self.signal = None, [], False, None
        self.settings = {}
        if self.checkpoint:
            self.settings = checkpoints.settings(**self.configuration()) | self.measured()

    def check(self) -> None:
        """Raise an error for arguments that the run could not use."""
        _checks.check_data(self.data, self.batch_size, epochs=self.epochs,
                           evaluate_every=self.evaluate_every, seed=self.seed)  # fmt: skip
        _checks.check_device(self.model, self.device)
        _checks.check_optimizers(self.optimizers, self.model, self.loss)
        _checks.check_steps((*self.optimizers, *self.schedulers))
        _checks.check_schedulers(self.schedulers, self.optimizers, self.model)
        if not self.checkpoint_minutes >= 0:
            raise ValueError(f"checkpoint_minutes must be a number from 0 on, not "
                             f"{self.checkpoint_minutes}")  # fmt: skip

    def begin(self) -> None:
        """Let the probes begin to look at the model, and read the checkpoint if there is one."""
        for probe in self.probes:
            probe.start(self.model)
        self.sampling_probes = [p for p in self.probes if hasattr(p, "looking")]
        if self.checkpoint:
            for parts in self.parts().values():
                checkpoints.check_parts(parts)
        self.resume()
        self.begun = True

    def end(self) -> None:
        """Take the probes' hooks off the model, and note how the run has left its settings."""
        for probe in self.probes:
            getattr(probe, "stop", lambda: None)()
        if self.begun:  # a run that was refused has changed nothing
            checkpoints.note_settings(**self.configuration())

    def record_graph(self) -> None:
        """Record the passes as a CUDA graph, if that is asked for and possible."""
        asked = self.graph and graphs.is_wanted(self.device)
        known = sum(len(getattr(probe, "handles", ())) for probe in self.sampling_probes)
        if not asked or self.scaler.is_enabled() or graphs.count_hooks(self.model) > known:
            return
        if graphs.is_held(self.model):
            warnings.warn("an earlier result of this network, such as a loss, is still kept, so "
                          "its steps cannot be recorded as a CUDA graph and run one by one",
                          stacklevel=3)  # fmt: skip
            return
        self.model.train()
        with _looking_away(self.sampling_probes):
            self.replay = graphs.GraphedPasses(self)

    def gradients(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients on the images at ``index``; return the loss and the hits."""
        if self.replay is None or any(probe.looking for probe in self.sampling_probes):
            return self.passes(index)
        return self.replay(index)

    def passes(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Run the forward and backward pass on the images at ``index``; return loss and hits."""
        images, targets = self.batch(index), self.labels[index]
        torch.clear_autocast_cache()  # within a caller's own autocast, it has the last step's
        with _autocast(self.device, self.autocast):
            outputs = self.forward(images)
        _check_outputs(outputs, self.classes)  # on CUDA the loss would end the whole process
        with _autocast(self.device, enabled=False):
            value = self.loss(outputs.float(), targets)
            self.scaler.scale(value).backward()
        return value.detach(), _hits(outputs, targets)

    def batch(self, index: Tensor) -> Tensor:
        """Return the training images at ``index`` as the model takes them."""
        images = self.data.train_images[index]
        images = self.preprocess(self.augment(images) if self.augment else images)
        if self.channels_last:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    def clear_gradients(self) -> None:
        """Forget all gradients, also of parameters that no optimizer holds, or that are new."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for parameter in self.parameters:
            parameter.grad = None

    def after_step(self) -> None:
        """Check the losses from time to time, and save or stop when that is due."""
        if self.step == 1 and self.epoch == 0:
            self.check_losses()
            self.check_tensors(self.model, self.optimizers)
        is_cpu = self.device.type == "cpu"  # on a GPU, a check has to wait for the device
        if self.step == self.steps or (is_cpu and self.step % CHECK_EVERY == 0):
            self.check_losses()
        if self.step < self.steps:  # after the last step, the epoch is ended first
            self.save_when_due()

    def save_when_due(self) -> None:
        """Save when it is time; after Ctrl-C, save and raise KeyboardInterrupt."""
        if self.signal is not None:
            self.check_losses()
            self.save()
            where = f"; {self.checkpoint} holds the run, the same call continues it"
            raise KeyboardInterrupt(f"stopped after {self.epoch} epochs and {self.step} steps"
                                    f"{where if self.checkpoint else ''}")  # fmt: skip
        if self.checkpoint and time.monotonic() - self.saved > 60 * self.checkpoint_minutes:
            self.check_losses()
            self.save_if_possible()

    def check_replay(self) -> None:
        """Raise GraphError if a replay does not know what the run's step is by now."""
        if self.replay is not None:
            self.replay.check_fixed(self)

    def check_losses(self) -> None:
        """Raise NonFiniteLossError for a loss that is not finite, GraphError as `check_replay`."""
        self.check_replay()
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

    def check_tensors(self, network: nn.Module, optimizers: Iterable = ()) -> None:
        """Raise an error for a tensor that is not finite, and for a binary weight that is not ±1.

        The tensors are those of the network and of the optimizers' states.
        """
        bad = _checks.not_finite(network, optimizers)
        if bad:
            more = f" (and {len(bad) - 1} more)" if bad[1:] else ""
            raise NonFiniteLossError(
                f"{bad[0]}{more} holds NaN or infinite numbers, although the loss is finite: the "
                "sign of NaN is still ±1, and a weight whose averaged gradient is not finite "
                "never learns again. Look at what augment and preprocess return (a NaN pixel, a "
                "division by 0), then at the gradients and the learning rate"
            )
        _checks.check_binary(network)

    def end_epoch(self) -> None:
        """Evaluate, add a row to the history, and let the schedulers step."""
        row = {
            "epoch": self.epoch + 1,
            "train_loss": self.losses.mean().item(),
            "train_accuracy": self.hits.item() / (self.steps * self.batch_size),
            **(self.accuracies() if self.is_evaluated() else {}),
            "lr": float(self.optimizers[0].param_groups[-1]["lr"]),  # a tensor's changes in place
        }
        for probe in self.probes:
            _add_columns(row, probe)
        self.check_tensors(self.model, self.optimizers)
        for scheduler in self.schedulers:
            scheduler.step()
        now = time.monotonic()
        row["seconds"] = now - self.started
        # plain numbers only: a NumPy scalar could be saved, but not loaded safely
        self.rows.append({k: v.item() if hasattr(v, "item") else v for k, v in row.items()})
        self.started = now
        self.epoch, self.step = self.epoch + 1, 0
        self.hits.zero_()

    def is_over(self) -> bool:
        """Return whether there is no further epoch: after the last one, or if `stop` says so."""
        between = self.stop is not None and self.rows and self.step == 0
        return bool(between and self.stop([*self.rows])) or self.epoch == self.epochs

    def is_evaluated(self) -> bool:
        """Return whether the network is evaluated after the current epoch."""
        return (self.epoch + 1) % self.evaluate_every == 0 or self.epoch + 1 == self.epochs

    def accuracies(self) -> dict[str, float]:
        """Return the accuracies of the network that `test_model` makes."""
        network = self.test_model(self.model) if self.test_model else self.model
        if network is not self.model:  # which is checked when the epoch is complete
            self.check_tensors(network)
        sets = {"validation": self.data.validation_images, "test": self.data.test_images}
        labels = {"validation": self.data.validation_labels, "test": self.data.test_labels}
        return {
            f"{name}_accuracy": evaluate(network, images, labels[name], preprocess=self.preprocess)
            for name, images in sets.items()
            if images is not None
        }

    def summary(self) -> dict[str, str]:
        """Return the `SHOWN` columns of the last row, formatted for the progress bar."""
        return {k: f"{v:.4f}" for k, v in self.rows[-1].items() if k in SHOWN}

    def identity(self) -> dict:
        """Return what must be the same in a checkpoint for it to continue this run."""
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
            "probes": [type(probe).__name__ for probe in self.probes],
            "schedulers": [type(scheduler).__name__ for scheduler in self.schedulers],
            "precision": precision(self.device) if self.autocast else "float32",
            "device type": self.device.type,
            # earlier versions gave seeds 4096 apart the same orders
            **({} if 0 <= self.seed < DISTINCT_SEEDS else {"way to order images": "hashed"}),
        }

    def measured(self) -> dict[str, object]:
        """Return what sets the columns of the history, which a file need not have noted."""
        tested = {name: getattr(self.data, f"{name}_labels") for name in ("validation", "test")}
        found = {f"{name} labels": hashlib.sha256(labels.cpu().numpy().tobytes()).hexdigest()
                 for name, labels in tested.items() if labels is not None}  # fmt: skip
        return {**_sums(self.data), **found, "evaluate_every": self.evaluate_every}

    def configuration(self) -> dict:
        """Return the arguments of `checkpoints.settings` that describe this run."""
        functions = {name: getattr(self, name) for name in FUNCTIONS}
        return {"model": self.model, "functions": functions, "optimizers": self.optimizers,
                "schedulers": self.schedulers}  # fmt: skip

    def parts(self) -> dict[str, list]:
        """Return everything with a state_dict, by name."""
        return {
            "model": [self.model],
            "optimizers": self.optimizers,
            "schedulers": self.schedulers,
            "probes": self.probes,
            "scaler": [self.scaler],
            "loss": [self.loss] if isinstance(self.loss, nn.Module) else [],
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
        """Write a checkpoint; if that fails, as on a full disk, warn and let the run go on."""
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
        # only the names that both have, because another torch may have more settings
        checkpoints.compare(self.checkpoint, here, there)
        for name, parts in self.parts().items():
            # a file of an earlier version has no state of the loss
            for part, saved in zip(parts, state.get(name, ()), strict=name in state):
                checkpoints.load_part(self.checkpoint, part, saved)
        self.epoch, self.step, self.rows = state["epoch"], state["step"], state["rows"]
        self.losses.copy_(state["losses"])
        self.hits.copy_(state["hits"])
        self.started = time.monotonic() - state["seconds"]
        torch.set_rng_state(state["random"].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"].cpu(), self.device)


def _add_columns(row: dict, probe) -> None:
    """Add a probe's columns; raise ValueError for one that the loop or another probe has."""
    columns = probe.epoch()
    taken = [name for name in columns if name in COLUMNS or name in row]
    if taken:
        raise ValueError(
            f"{type(probe).__name__} returns the column {taken[0]!r}, which the loop or another "
            "probe has already: leave one of the two probes out, or rename its column"
        )
    row.update(columns)


def _as_tuple(parts) -> tuple:
    if parts is None:
        return ()
    return tuple(parts) if isinstance(parts, Iterable) else (parts,)


@contextlib.contextmanager
def _reproducible(device: torch.device, seed: int):
    """Seed torch for this run only, and ask cuDNN for deterministic kernels."""
    cudnn = torch.backends.cudnn  # whose flags() would also set allow_tf32
    before = cudnn.benchmark, cudnn.deterministic
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seed_generators(seed, device)
        cudnn.benchmark, cudnn.deterministic = False, True
        try:
            yield
        finally:
            cudnn.benchmark, cudnn.deterministic = before


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's global generators of the CPU and of the device, and of no other device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters, or, as in a packed network, of its buffers."""
    held = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if held is None else held.device


@contextlib.contextmanager
def _looking_away(probes: Sequence):
    """Switch off the hooks of those probes that look into some steps only."""
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
    """With a checkpoint, make Ctrl-C and SIGTERM wait for the step in progress."""

    def ask(number, frame):
        if run.signal is not None:  # the second Ctrl-C does not wait
            raise KeyboardInterrupt
        run.signal = number

    with stops_handled(ask) if run.checkpoint else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def stops_handled(handler: Callable):
    """Let the handler have Ctrl-C and SIGTERM; in a thread, to which none comes, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # a handler of None was not installed from Python, and could not be put back
    heard = [number for number in STOPS if signal.getsignal(number) is not None]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _bar(run: _Run, progress: bool | None) -> tqdm:
    if progress is None:
        progress = sys.stderr.isatty() or "google.colab" in sys.modules
    return tqdm(total=run.epochs, unit="epoch", disable=not progress, leave=False)
