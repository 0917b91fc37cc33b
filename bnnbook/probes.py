"""Measurements while a binary network trains, taken on its device with no host sync per step.

A probe has ``start(model)``; ``step()``, called after each optimizer step; ``epoch()``, which
returns the epoch's columns; and ``state_dict`` / ``load_state_dict``, so that a resumed run goes
on counting. To ask for a measurement before ``start`` raises RuntimeError.

The probes that look inside a step, `ActivationSaturation` and `GradientSample`, register hooks on
the network. ``stop()`` removes them, and so does leaving a ``with`` block. A probe whose hooks
(``handles``) need not see every step sets ``looking`` to whether they need the next one: all other
steps may be replayed as a CUDA graph, which calls no hooks.
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from bnnbook.binarize import function_of
from bnnbook.layers import BinaryLayer, ExpertBinaryConv2d, binary_layers


class _SetByStart:
    """An attribute that a probe's ``start`` sets; until then, reading it is an error."""

    def __get__(self, probe, kind: type):
        if probe is None:  # asked of the class
            return self
        raise RuntimeError(f"{kind.__name__} was not started: call start(model) first")


class _OfWeights:
    """Base of the probes of binary weights, which are read anew each time.

    A parametrized weight (`torch.nn.utils.parametrize`) is computed at every access.
    """

    layers: Sequence[BinaryLayer] = _SetByStart()

    @property
    def weights(self) -> list[Tensor]:
        """The weights as they are now."""
        return [layer.weight for layer in self.layers]


class FlipRatio(_OfWeights):
    r"""Measure the fraction of binary weights that flip in one step, averaged over the epoch.

    :math:`\pi = \frac{1}{T\,n} \sum_t \#\{i : \operatorname{sign} w_{t,i} \ne
    \operatorname{sign} w_{t-1,i}\}` over the T steps and the n binary weights, all layers pooled
    (the FF ratio of Liu et al., ICML 2021, eqs. 4 and 5). For stochastic quantizers the sign of
    the latent weight counts, not the draw; without a quantizer the weight is its own sign.
    Column: ``flip_ratio``. Memory: one byte per weight, and another one during a step.

    per_layer: adds a column ``flip_ratio/NAME`` for each binary layer, NAME being its name in the
    model.
    per_step: keeps the ratio of every step, for `history`. The first step of a cascaded EMA flips
    half of all weights, which a figure may have to leave out.
    """

    flips = recorded = length = sizes = _SetByStart()

    def __init__(self, per_layer: bool = False, per_step: bool = False):
        self.per_layer, self.per_step = per_layer, per_step

    def start(self, model: nn.Module) -> None:
        """Remember the signs the model starts with."""
        layers = _named_binary_layers(model)
        self.names, self.layers = list(layers), list(layers.values())
        self.sizes = [weight.numel() for weight in self.weights]
        # the weight's own memory order without gaps: in it the comparison is fastest
        self.strides = [torch.empty_like(w, device="meta").stride() for w in self.weights]
        self.positive = self._signs()
        shape, device = (len(self.sizes),) if self.per_layer else (), _device(self.weights)
        self.flips = torch.zeros(shape, dtype=torch.float64, device=device)
        self.recorded = torch.zeros(0, *shape, dtype=torch.int32, device=device)
        self.steps = self.length = 0

    def step(self) -> None:
        """Count the signs that differ from those before the step."""
        if not self.layers:
            return
        positive = self._signs()
        changed = self.positive.bitwise_xor_(positive)
        # unlike the sum of a bool tensor, count_nonzero is fast on a CPU
        if self.per_layer:
            flips = torch.stack([part.count_nonzero() for part in changed.split(self.sizes)])
        else:
            flips = changed.count_nonzero()
        self.positive = positive
        self.flips += flips
        self.steps += 1
        if self.per_step:
            self._record(flips)

    def _signs(self) -> Tensor:
        """Return whether each weight is >= 0, all layers in one flat tensor of bools."""
        weights = self.weights
        signs = torch.empty(sum(self.sizes), dtype=torch.bool, device=_device(weights))
        offset = 0
        for weight, stride, size in zip(weights, self.strides, self.sizes, strict=True):
            torch.ge(weight.detach(), 0, out=signs.as_strided(weight.shape, stride, offset))
            offset += size
        return signs

    def _record(self, flips: Tensor) -> None:
        if self.length == len(self.recorded):  # full: double the capacity
            more = self.recorded.new_zeros(max(1024, self.length), *flips.shape)
            self.recorded = torch.cat([self.recorded, more])
        self.recorded[self.length] = flips
        self.length += 1

    def history(self) -> Tensor:
        """Return the ratio of every step since the start, on the CPU; needs ``per_step=True``.

        Shape (steps,), or with ``per_layer`` (steps, layers), a ratio for each layer. Raises
        ValueError without ``per_step``.
        """
        if not self.per_step:
            raise ValueError("the steps were not kept: FlipRatio(per_step=True) keeps them")
        flips = self.recorded[: self.length].cpu().double()
        weights = flips.new_tensor(self.sizes if self.per_layer else sum(self.sizes))
        return flips / weights.clamp(min=1)

    def epoch(self) -> dict[str, float]:
        """Return the columns, averaged since the last call; empty without binary weights."""
        if not sum(self.sizes) or not self.steps:
            return {}
        flips = np.atleast_1d(self.flips.cpu().numpy())
        columns = {"flip_ratio": flips.sum().item() / (sum(self.sizes) * self.steps)}
        if self.per_layer:
            for name, count, size in zip(self.names, flips.tolist(), self.sizes, strict=True):
                columns[f"flip_ratio/{name}"] = count / (max(1, size) * self.steps)
        self.flips.zero_()
        self.steps = 0
        return columns

    def state_dict(self) -> dict:
        """Return the counters; the signs can be read from the weights."""
        kept = {"history": self.recorded[: self.length].clone()} if self.per_step else {}
        return {"flips": self.flips.clone(), "steps": self.steps, **kept}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a saved state; the model's own weights must have been loaded before."""
        if state["flips"].shape != self.flips.shape or ("history" in state) != self.per_step:
            raise ValueError("the saved FlipRatio had another per_layer or per_step")
        self.positive = self._signs()
        self.flips.copy_(state["flips"])
        self.steps = state["steps"]
        if self.per_step:
            self.recorded = state["history"].to(self.flips.device)
            self.length = len(self.recorded)


def log_flip_ratio(ratio):
    r"""Return Helwegen et al.'s :math:`\pi_t = \log(r + e^{-9})`, natural logarithm (eq. 7).

    r is the fraction of weights that flip in a step: a number, an array or a tensor. The constant
    is :math:`e^{-9} \approx 1.23 \cdot 10^{-4}`, not :math:`10^{-9}`, so the smallest value is -9.
    The paper's figure 1 shows the last layer only: ``FlipRatio(per_layer=True)`` measures it.

    >>> [round(float(log_flip_ratio(ratio)), 2) for ratio in (0.0, 0.001, 1.0)]
    [-9.0, -6.79, 0.0]
    """
    log1p = torch.log1p if isinstance(ratio, Tensor) else np.log1p
    return log1p(ratio * math.exp(9)) - 9  # the same number, and exactly -9 at 0


class C2I(_OfWeights):
    r"""Measure the correlation to initialisation: the fraction of signs that are as at the start.

    :math:`C2I = 1 - \frac{1}{n} \sum_i \tfrac12 |\operatorname{sign} w_{T,i} -
    \operatorname{sign} w_{0,i}|`: 1 if nothing has changed, 1/2 for independent signs, 0 if every
    sign is reversed. Liu et al. (ICML 2021, eq. 7) print another factor 1/2 before the sum. With
    it no value could lie below 1/2, yet their Table 1 lists .4810 and .4960: it was not used
    there, nor is it here. Column: ``c2i``. Memory: one byte per weight.
    """

    initial = _SetByStart()

    def start(self, model: nn.Module) -> None:
        """Remember the signs the model starts with."""
        self.layers = list(_named_binary_layers(model).values())
        self.initial = self._signs()

    def _signs(self) -> Tensor:
        # in index order, whatever the memory layout, because checkpoints hold it
        signs = [(weight.detach() >= 0).flatten() for weight in self.weights]
        return torch.cat(signs) if signs else torch.zeros(0, dtype=torch.bool)

    def step(self) -> None:
        """Do nothing: this is measured once per epoch."""

    def epoch(self) -> dict[str, float]:
        """Return {"c2i": fraction}, pooled over all binary weights; empty without any."""
        if not len(self.initial):
            return {}
        same = (self._signs() == self.initial).count_nonzero()
        return {"c2i": same.item() / len(self.initial)}

    def state_dict(self) -> dict:
        """Return the initial signs."""
        return {"initial": self.initial.clone()}

    def load_state_dict(self, state: dict) -> None:
        """Restore the initial signs of the run that is resumed."""
        if state["initial"].shape != self.initial.shape:
            raise ValueError("the saved C2I is of another network")
        self.initial.copy_(state["initial"])


class Saturation(_OfWeights):
    r"""Measure the fraction of latent weights with :math:`|w| \ge` ``limit`` after each epoch.

    Column: ``saturation``. A clipped weight sits at exactly :math:`\pm 1`, where only an update
    towards zero can move it.
    """

    def __init__(self, limit: float = 0.99):
        self.limit = limit

    def start(self, model: nn.Module) -> None:
        """Remember which weights to look at."""
        self.layers = list(_named_binary_layers(model).values())

    def step(self) -> None:
        """Do nothing: this is measured once per epoch."""

    def epoch(self) -> dict[str, float]:
        """Return {"saturation": fraction}, pooled over all binary weights; empty without any."""
        if not any(weight.numel() for weight in self.weights):
            return {}
        return {"saturation": share_above(self.weights, self.limit)}

    def state_dict(self) -> dict:
        """Return nothing: there is no state."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Do nothing: there is no state."""


class _Hooked:
    """Base of the probes that register hooks on a network, and remove them again."""

    handles = ()
    steps = _SetByStart()

    def stop(self) -> None:
        """Remove the hooks from the network; what was measured stays."""
        for handle in self.handles:
            handle.remove()
        self.handles = ()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.stop()


class ActivationSaturation(_Hooked):
    r"""Measure the fraction of binary layers' inputs with :math:`|a| >` ``limit`` in training.

    There a clipped straight-through estimator passes no gradient back: the saturation of Liu et
    al. (ICML 2021, figure 3, first binary convolution). a is the real input, before its quantizer;
    layers without ``input_quantizer`` are left out. To stay cheap it looks only at the first step
    of an epoch and every ``every``-th one after it, and never at passes in evaluation mode.
    Column: ``activation_saturation``, over the inputs of all layers together.

    per_layer: adds a column ``activation_saturation/NAME`` for each of these layers.

    Raises ValueError for an ``every`` below 1.
    """

    above = _SetByStart()

    def __init__(self, limit: float = 1.0, every: int = 16, per_layer: bool = False):
        if every < 1:
            raise ValueError(f"every must be at least 1, not {every}")
        self.limit, self.every, self.per_layer = limit, every, per_layer

    def start(self, model: nn.Module) -> None:
        """Register a hook on each layer with an input quantizer."""
        self.stop()
        # also those that share a weight, whose inputs differ
        layers = {name or type(layer).__name__: layer for name, layer in model.named_modules()
                  if isinstance(layer, BinaryLayer) and layer.input_quantizer is not None
                  }  # fmt: skip
        self.names, self.steps, self.looking = list(layers), 0, True
        device = _device([layer.weight for layer in layers.values()])
        self.above = torch.zeros(len(layers), dtype=torch.int64, device=device)
        self.seen = torch.zeros_like(self.above)
        self.handles = [
            layer.register_forward_pre_hook(partial(self._look, number), with_kwargs=True)
            for number, layer in enumerate(layers.values())
        ]

    def _look(self, number: int, layer: nn.Module, inputs: tuple, keywords: dict) -> None:
        # torch.compile recompiles for each new value of a Python number or list that a hook reads:
        # hence a bool, which has two values, and counts in tensors
        if self.looking and layer.training:
            a = (*inputs, *keywords.values())[0].detach()
            self.above[number] += (a.abs() > self.limit).count_nonzero()
            self.seen[number] += a.numel()

    def step(self) -> None:
        """Count the step, and decide whether the hooks look at the next one."""
        self.steps += 1
        self.looking = self.steps % self.every == 0

    def epoch(self) -> dict[str, float]:
        """Return the columns of the steps looked at since the last call; empty without any."""
        above, seen = self.above.tolist(), self.seen.tolist()
        self.steps, self.looking = 0, True
        if not sum(seen):
            return {}
        columns = {"activation_saturation": sum(above) / sum(seen)}
        if self.per_layer:
            for name, count, inputs in zip(self.names, above, seen, strict=True):
                columns[f"activation_saturation/{name}"] = count / inputs if inputs else math.nan
        self.above.zero_()
        self.seen.zero_()
        return columns

    def state_dict(self) -> dict:
        """Return the counters, and the epoch's steps so far, which tell when to look next."""
        return {"above": self.above.clone(), "seen": self.seen.clone(), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Go on counting from a saved state."""
        if state["above"].shape != self.above.shape:
            raise ValueError("the saved ActivationSaturation is of another network, or of a "
                             "version that counted layers which share a weight once")  # fmt: skip
        self.above.copy_(state["above"])
        self.seen.copy_(state["seen"])
        self.steps = state["steps"]
        self.looking = self.steps % self.every == 0


class GradientSample(_Hooked):
    """Record the gradient of some weights of each binary layer in every step.

    weights: how many of each layer (all, if it has fewer); which ones is drawn once from ``seed``,
    without touching torch's own generators.
    steps: how many are recorded, after the first ``after`` ones.

    The record stays on the device and takes 4 · weights · layers · steps bytes. There is no
    column: `gradients` returns the record, for `power_spectrum`, `lag_one_autocorrelation` and
    `signal_to_noise`. Raises ValueError for ``weights`` or ``steps`` below 1 and for a negative
    ``after``.

    A gradient is taken as backward leaves it in ``weight.grad``, before the optimizer. For a
    latent weight it has passed through the quantizer's backward. With a GradScaler, which training
    uses where autocast means float16, it is still multiplied by the loss scale, which changes in
    the course of a run. A step without a backward pass through a layer leaves zeros.
    """

    buffer = columns = _SetByStart()

    def __init__(self, weights: int = 256, steps: int = 4096, *, after: int = 0, seed: int = 0):
        if weights < 1 or steps < 1 or after < 0:
            raise ValueError(
                f"weights and steps must be at least 1 and after at least 0, "
                f"not {weights}, {steps} and {after}"
            )
        self.size, self.capacity, self.after, self.seed = weights, steps, after, seed

    def start(self, model: nn.Module) -> None:
        """Draw the weights, and register a hook on the gradient of each trained layer's weight."""
        self.stop()
        generator = torch.Generator().manual_seed(self.seed)
        weights = {name: layer.weight for name, layer in _named_binary_layers(model).items()
                   if layer.weight.requires_grad}  # fmt: skip
        computed = [name for name, weight in weights.items() if not weight.is_leaf]
        if computed:
            raise ValueError(f"{computed[0]}.weight is computed from other parameters, as by a "
                             "parametrization, and keeps no gradient")  # fmt: skip
        device = _device(list(weights.values()))
        self.indices = {}
        for name, weight in weights.items():
            order = torch.randperm(weight.numel(), generator=generator, device="cpu")
            # a copy: a view would keep the whole permutation in memory
            self.indices[name] = order[: self.size].clone().to(device)
        widths = [len(index) for index in self.indices.values()]
        self.buffer = torch.zeros(self.capacity, sum(widths), device=device)
        self.columns = dict(zip(weights, self.buffer.split(widths, dim=1), strict=True))
        self.steps, self.handles = 0, []
        for name, weight in weights.items():
            hook = partial(self._keep, self.indices[name], self.columns[name])
            self.handles.append(weight.register_post_accumulate_grad_hook(hook))

    def _keep(self, index: Tensor, column: Tensor, weight: Tensor) -> None:
        row = self.steps - self.after
        if 0 <= row < self.capacity:
            column[row] = weight.grad.take(index)

    def step(self) -> None:
        """Go on to the next row; after the last one remove the hooks."""
        self.steps += 1
        if self.steps >= self.after + self.capacity:
            self.stop()

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients so far by layer name: float32 (steps, weights), on the CPU."""
        rows = self._rows()
        return {name: column[:rows].cpu() for name, column in self.columns.items()}

    def _rows(self) -> int:
        return min(max(self.steps - self.after, 0), self.capacity)

    def epoch(self) -> dict[str, float]:
        """Return no columns."""
        return {}

    def state_dict(self) -> dict:
        """Return the record so far."""
        return {"steps": self.steps, "gradients": self.buffer[: self._rows()].clone()}

    def load_state_dict(self, state: dict) -> None:
        """Go on recording from a saved state; ValueError for one of other weights or steps."""
        rows, width = state["gradients"].shape
        if width != self.buffer.shape[1] or rows > self.capacity:
            raise ValueError(f"the state has {rows} steps of {width} weights, this probe records "
                             f"{self.capacity} of {self.buffer.shape[1]}")  # fmt: skip
        self.steps = state["steps"]
        self.buffer[:rows] = state["gradients"].to(self.buffer.device)
        if self.steps >= self.after + self.capacity:
            self.stop()


def _centred(gradients) -> np.ndarray:
    x = np.asarray(gradients, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"gradients must be (steps, weights), 2 steps or more, not {x.shape}")
    constant = (x == x[0]).all(0)  # whose mean may be off by a rounding
    return np.where(constant, 0.0, x - x.mean(0))


def power_spectrum(gradients, segment: int = 256) -> tuple[np.ndarray, np.ndarray]:
    r"""Return (frequencies, power) of gradients over time: Welch's estimate, mean over weights.

    gradients: (steps, weights), as from `GradientSample`. Each weight's series is standardised to
    mean 0 and standard deviation 1, so that white noise has power 1 at every frequency; after a
    filter its power is :math:`|H(e^{i\omega})|^2` divided by the variance of the filtered noise.
    Frequencies are in cycles per step, from 0 to 1/2, ``segment`` // 2 + 1 of them;
    :math:`\omega = 2\pi f`. Segments of ``segment`` steps overlap by half under a Hann window.
    Weights whose gradient never changes are left out.

    Raises ValueError for fewer steps than ``segment``, and if no gradient changes at all.
    """
    from scipy.signal import welch

    x = _centred(gradients)
    if not 2 <= segment <= len(x):
        raise ValueError(f"segment must be from 2 to the {len(x)} steps recorded, not {segment}")
    deviation = x.std(0)
    if not deviation.any():
        raise ValueError("no gradient changes: there is no spectrum")
    x = x[:, deviation > 0] / deviation[deviation > 0]
    # two-sided: the one-sided estimate doubles all frequencies but the first and the last
    f, power = welch(x, axis=0, nperseg=segment, detrend=False, return_onesided=False)
    half = segment // 2 + 1
    return np.abs(f[:half]), power[:half].mean(1)


def lag_one_autocorrelation(gradients) -> np.ndarray:
    r"""Return each weight's correlation between successive gradients, (weights,).

    :math:`\rho_1 = \sum_t (g_t - \bar g)(g_{t+1} - \bar g) / \sum_t (g_t - \bar g)^2` for
    gradients (steps, weights). Over T steps, white noise has :math:`0 \pm 1/\sqrt T`; after an EMA
    of rate :math:`\alpha` it has :math:`1 - \alpha`. NaN for a weight whose gradient is constant.
    """
    x = _centred(gradients)
    power = (x * x).sum(0)
    return (x[:-1] * x[1:]).sum(0) / np.where(power > 0, power, np.nan)


def signal_to_noise(gradients) -> np.ndarray:
    r"""Return each weight's :math:`|\bar g| / \sigma`, (weights,), for gradients (steps, weights).

    :math:`\bar g` is the mean over the steps, :math:`\sigma` the standard deviation of a single
    step's gradient. The mean of pure noise is not exactly zero: over T independent steps the
    median ratio is :math:`0.67 / \sqrt T`, .011 for 4000 steps, and only values well above it mean
    something. NaN for a weight whose gradient never changes.
    """
    deviation = _centred(gradients).std(0)
    mean = np.asarray(gradients, dtype=np.float64).mean(0)
    return np.abs(mean) / np.where(deviation > 0, deviation, np.nan)


def binary_report(model: nn.Module):
    """Return a table of the weights that each layer multiplies with: are they really binary?

    A pandas DataFrame with one row for each binary, linear or convolutional layer, in the order of
    the model's modules, and the columns

    - layer: its name in the model.
    - weight: ``latent`` (a quantizer makes it binary), ``binary`` (±1 itself), ``expert`` (several
      of either kind, one of which fires), ``real`` (an ordinary layer).
    - quantizer: the weight quantizer's name, "" without one.
    - values: how many different values the forward pass multiplies with.
    - binary: the fraction of weights that are exactly -1 or +1. A latent weight that is NaN or
      infinite does not count, although its sign would be ±1.
    - scaled_binary: whether each output channel is ±s with its own s > 0, ±1 included, and all
      latent weights are finite.
    - input: the input quantizer's name, ``real`` without one.

    A stochastic quantizer draws once; torch's generators are left as they were, a generator of
    the quantizer's own is not.

    >>> from bnnbook.layers import BinaryLinear
    >>> model = nn.Sequential(BinaryLinear(9, 8), nn.Linear(8, 2))
    >>> binary_report(model)[["layer", "weight", "quantizer", "binary", "input"]]
      layer  weight quantizer  binary input
    0     0  latent  ste_sign     1.0  real
    1     1    real               0.0  real
    """
    import pandas

    kinds = (BinaryLayer, nn.Linear, nn.modules.conv._ConvNd)
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(devices):
        rows = [{"layer": name or type(layer).__name__, **_report(layer)}
                for name, layer in model.named_modules() if isinstance(layer, kinds)]  # fmt: skip
    columns = ["layer", "weight", "quantizer", "values", "binary", "scaled_binary", "input"]
    return pandas.DataFrame(rows, columns=columns)


def _report(layer: nn.Module) -> dict:
    binary = isinstance(layer, BinaryLayer)
    weight = layer.binary_weight() if binary else layer.weight
    size, finite = weight.abs(), layer.weight.isfinite()  # the sign of NaN would be ±1
    # the output channels of each expert count by themselves
    channels = size.flatten(0, 1) if isinstance(layer, ExpertBinaryConv2d) else size
    least, most = channels.flatten(1).aminmax(dim=1)
    return {
        "weight": _kind(layer),
        "quantizer": _name(layer.weight_quantizer) if binary else "",
        "values": len(weight.unique()),
        "binary": ((size == 1) & finite).count_nonzero().item() / size.numel(),
        "scaled_binary": bool(((least == most) & (least > 0)).all() and finite.all()),
        "input": (_name(layer.input_quantizer) if binary else "") or "real",
    }


def _kind(layer: nn.Module) -> str:
    if not isinstance(layer, BinaryLayer):
        return "real"
    if isinstance(layer, ExpertBinaryConv2d):
        return "expert"
    return "binary" if layer.weight_quantizer is None else "latent"


def _name(quantizer) -> str:
    function = function_of(quantizer)
    return "" if function is None else getattr(function, "__name__", type(function).__name__)


def require_binary(model: nn.Module, scaled: bool = False) -> None:
    """Raise ValueError, naming the layers, unless all binary layers multiply with exactly ±1.

    ``scaled`` also allows ±s with one s > 0 for each output channel, as `magnitude_aware_sign`
    returns. A latent weight that is NaN or infinite is not binary, whatever its sign. A model
    without binary layers raises ValueError too, and so does a `torch.nn.TransformerEncoderLayer`
    that would not call its binary layers; real layers are not checked.

    >>> from bnnbook.layers import BinaryLinear, quantized_by
    >>> from bnnbook.binarize import real_weight
    >>> model = nn.Sequential(BinaryLinear(9, 8), nn.Linear(8, 2))
    >>> require_binary(model)
    >>> with quantized_by(model, real_weight):
    ...     require_binary(model)
    Traceback (most recent call last):
    ValueError: not binary: layer 0 (latent, real_weight): 72 values, 0 % of the weights ±1
    """
    report = binary_report(model)
    report = report[report["weight"] != "real"]
    if report.empty:
        raise ValueError("the model has no binary layer")
    _check_called(model)
    passed = report["scaled_binary"] if scaled else report["binary"] == 1
    wrong = [
        f"layer {row.layer} ({', '.join(filter(None, [row.weight, row.quantizer]))}): "
        f"{row.values} values, {100 * row.binary:.3g} % of the weights ±1"
        for row in report[~passed].itertuples()
    ]
    if wrong:
        finite = all(layer.weight.isfinite().all() for layer in binary_layers(model))
        hint = "" if finite else "; there are latent weights that are NaN or infinite"
        raise ValueError("not binary: " + "; ".join(wrong) + hint)


def _check_called(model: nn.Module) -> None:
    """Raise ValueError for a layer of torch that reads its binary layers' weights instead."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.TransformerEncoderLayer):
            continue
        fast = module.activation_relu_or_gelu and module.self_attn.batch_first
        if fast and any(isinstance(m, BinaryLayer) for m in (module.linear1, module.linear2)):
            raise ValueError(
                f"{name or 'the model'} has a fast path in evaluation mode that multiplies with "
                "the latent weights of its binary layers: set its activation_relu_or_gelu to 0, "
                "or let layers.binarized make the network"
            )


def _named_binary_layers(model: nn.Module) -> dict[str, BinaryLayer]:
    """Return the binary layers by their names in the model, in the order of its modules.

    Of layers that share a weight, only the first is returned.
    """
    first = {}
    for layer in binary_layers(model):
        # a parametrized weight is no parameter: such a layer shares its weight with no other
        weight = layer._parameters.get("weight", layer)
        first.setdefault(id(weight), id(layer))
    found = set(first.values())
    return {
        name or type(layer).__name__: layer
        for name, layer in model.named_modules()
        if id(layer) in found
    }


def _device(weights: list[Tensor]) -> torch.device:
    return weights[0].device if weights else torch.device("cpu")


def share_above(weights: list[Tensor], limit: float) -> float:
    r"""Return the fraction of all given weights with :math:`|w| \ge` ``limit``.

    Raises ValueError if there are none.

    >>> share_above([torch.tensor([0.5, -1.0]), torch.tensor([1.0, 0.0])], 0.99)
    0.5
    """
    total = sum(weight.numel() for weight in weights)
    if not total:
        raise ValueError("there are no weights")
    return sum((weight.detach().abs() >= limit).sum() for weight in weights).item() / total


def latent_histogram(weight: Tensor, bins: int = 50, bound: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return (density, edges) of the weights over [-bound, bound], for BinaryConnect's figure 2.

    density has ``bins`` entries and integrates to the fraction of weights inside the bounds.

    >>> density, edges = latent_histogram(torch.tensor([-0.5, 0.5, 0.6]), bins=2)
    >>> density.tolist(), edges.tolist()
    ([0.3333333432674408, 0.6666666865348816], [-1.0, 0.0, 1.0])
    """
    values = weight.detach().float().cpu()
    counts, edges = torch.histogram(values.flatten(), bins, range=(-bound, bound))
    return counts / values.numel() / (2 * bound / bins), edges


def layer_weight(model: nn.Module, index: int = 0) -> Tensor:
    """Return the trained weight of the index-th linear or convolutional layer, detached."""
    kinds = (BinaryLayer, nn.Linear, nn.Conv2d)
    return [m for m in model.modules() if isinstance(m, kinds)][index].weight.detach()


def channel_magnitudes(weight: Tensor) -> Tensor:
    r"""Return the mean :math:`|w|` of each output channel of a weight (out, ...), detached.

    Liu et al. (ICML 2021, figures 4 and 5) call it the channel-wise absolute mean; its standard
    deviation over the channels is their SDAM. It shows how evenly the channels were trained: one
    whose weights hardly ever get a gradient stays where it began.

    >>> channel_magnitudes(torch.tensor([[1.0, -3.0], [0.0, 0.5]]))
    tensor([2.0000, 0.2500])
    """
    return weight.detach().float().flatten(1).abs().mean(1)
