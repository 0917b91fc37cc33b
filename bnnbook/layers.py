"""Layers that multiply with binary weights, and the layers and losses that surround them.

Three kinds of weight, three words: a *latent* weight is real and only its sign is used, a *binary*
weight is exactly -1 or +1, a *real* weight is an ordinary parameter.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnnbook.binarize import function_of, sign, ste_sign

Quantizer = Callable[[Tensor], Tensor]
QUANTIZED = ("weight_quantizer", "input_quantizer")
# What a convolution is given beside its numbers of channels and its bias.
GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")
# How deep a module's parts are looked for: its attributes, a list or dict of them, and two more
# within. Deeper is somebody's data.
DEPTH = 4


class BinaryLayer:
    """Base class of binary layers: a trained ``weight`` and the binary weight made from it.

    ``weight`` is latent (real) when ``weight_quantizer`` is set, exactly -1 or +1 when it is None.
    In the latter case only an optimizer that flips signs may train it (`optim.Bop`,
    `optim.CascadedEMA`), and loading values other than ±1 raises RuntimeError.

    To make another torch layer binary, inherit from this class first and from the layer second,
    call `set_quantizers` once the weight exists, and use `quantized_input` and `binary_weight` in
    ``forward``. The library's optimizers and probes then recognise the layer.
    """

    weight: nn.Parameter
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None

    def binary_weight(self) -> Tensor:
        """Return what the forward pass multiplies with; a stochastic quantizer draws anew."""
        return self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return the input as the forward pass sees it."""
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def set_quantizers(self, weight_quantizer: Quantizer | None, input_quantizer) -> None:
        """Set the quantizers; a layer without a weight quantizer gets weights of exactly ±1.

        Raises TypeError unless each is a function or None; a quantizer's name is not enough.
        """
        self._check_quantizer("input_quantizer", input_quantizer)  # before the weights change
        if weight_quantizer is None and not _are_signs(self.weight):
            with torch.no_grad():
                stored_weight(self).copy_(sign(self.weight))
        self.input_quantizer, self.weight_quantizer = input_quantizer, weight_quantizer

    def reset_parameters(self, bound: float = 1.0) -> None:
        """Draw weights from U(-bound, bound), clipped to [-1, 1]; biases start at 0."""
        with torch.no_grad():
            stored_weight(self).uniform_(-bound, bound).clamp_(-1, 1)
            # the quantizer is not set yet while torch's own constructor runs
            if getattr(self, "weight_quantizer", self) is None:
                self.weight.copy_(sign(self.weight))
            if getattr(self, "bias", None) is not None:  # a user's layer may lack the attribute
                self.bias.zero_()

    def __setattr__(self, name: str, value) -> None:
        if name in QUANTIZED:
            self._check_quantizer(name, value)
            # a quantizer may be a module or a function; nn.Module would refuse to replace one by
            # the other
            self.__dict__.get("_modules", {}).pop(name, None)
        super().__setattr__(name, value)
        if name in ("weight", "weight_quantizer"):
            self._mark_weight()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._mark_weight()  # a copied parameter has lost its attributes

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self._mark_weight()  # to_empty, for one, makes a new parameter
        return self

    def _mark_weight(self) -> None:
        """Let the weight say whether it is latent, for optimizers, which do not see the layer."""
        weight = self.__dict__.get("_parameters", {}).get("weight")
        if weight is not None:  # one that is computed from others is not evaluated for this
            weight.latent = getattr(self, "weight_quantizer", None) is not None

    def _check_quantizer(self, kind: str, quantizer) -> None:
        """Raise an error for what is no quantizer, and for None where the weights are real."""
        if quantizer is not None and not callable(quantizer):
            raise TypeError(f"{kind} must be a function such as binarize.ste_sign, or None, "
                            f"not a {type(quantizer).__name__}")  # fmt: skip
        weight = getattr(self, "weight", None)
        if kind == "input_quantizer" or quantizer is not None or weight is None:
            return
        if not _are_signs(weight):
            raise ValueError("without a weight_quantizer the weights must be exactly ±1; "
                             "set_quantizers(None, ...) takes their signs")  # fmt: skip

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        weight, errors = state_dict.get(prefix + "weight"), rest[-1]
        if self.weight_quantizer is None and weight is not None and not _are_signs(weight):
            state_dict = {k: v for k, v in state_dict.items() if k != prefix + "weight"}
            errors.append(f"{prefix}weight must be exactly ±1 without a weight_quantizer; to take "
                          "the signs of latent weights, load them into a layer that has one, then "
                          "call set_quantizers(None, ...)")  # fmt: skip
            rest = (rest[0], False, *rest[2:])  # strict=False: the weight is left out on purpose
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._mark_weight()  # torch may have put another parameter in its place

    def extra_repr(self) -> str:
        """Add the quantizers' names to what torch prints."""
        quantizers = [f"{kind}={_name(getattr(self, kind))}" for kind in QUANTIZED
                      if getattr(self, kind) is not None]  # fmt: skip
        return ", ".join([super().extra_repr(), *quantizers])


def _are_signs(weight: Tensor) -> bool:
    return weight.is_meta or bool((weight.abs() == 1).all())  # meta tensors have no values


def stored_weight(layer: BinaryLayer) -> nn.Parameter:
    """Return a layer's weight, to be written to.

    Raises TypeError for a weight that is computed from others (a parametrization, weight norm):
    what is written there is lost.
    """
    weight = layer.weight
    if not isinstance(weight, nn.Parameter):
        raise TypeError(f"a {type(layer).__name__}'s weight is computed from others, as by a "
                        "parametrization or weight norm: change those instead")  # fmt: skip
    return weight


def _name(quantizer: Quantizer) -> str:
    function = function_of(quantizer)
    name = getattr(function, "__name__", type(function).__name__)
    options = [f"{k}={_shown(v)}" for k, v in getattr(quantizer, "keywords", {}).items()]
    return f"{name}({', '.join(options)})" if options else name


def _shown(option) -> str:
    """Return an option as text, a function by its name: without a place in memory."""
    if isinstance(option, partial):
        return _name(option)
    text = getattr(option, "__name__", None) or str(option)
    return type(option).__name__ if " at 0x" in text else text


class BinaryLinear(BinaryLayer, nn.Linear):
    r"""Multiply by binary weights: :math:`y = q_x(x)\, q_w(W)^\top + b`.

    Input (..., in_features), output (..., out_features). :math:`q_w` is ``weight_quantizer``;
    with None, ``weight`` itself is binary and stays so. :math:`q_x` is ``input_quantizer``; None
    leaves the input real. ``bias`` is off by default: batch normalisation, which usually follows,
    has one. ``device`` and ``dtype`` are torch's.

    >>> layer = BinaryLinear(3, 2)
    >>> sorted(set(layer.binary_weight().flatten().tolist())) in ([-1.0], [1.0], [-1.0, 1.0])
    True
    """

    def __init__(self, in_features: int, out_features: int, *, weight_quantizer=ste_sign,
                 input_quantizer=None, bias: bool = False, device=None,
                 dtype: torch.dtype | None = None):  # fmt: skip
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.set_quantizers(weight_quantizer, input_quantizer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product for x of shape (..., in_features)."""
        return F.linear(self.quantized_input(x), self.binary_weight(), self.bias)


class BinaryConv2d(BinaryLayer, nn.Conv2d):
    r"""Convolve with binary weights: :math:`y = q_x(x) \circledast q_w(W) + b`.

    Input (N, in_channels, H, W), output (N, out_channels, H', W') as in `torch.nn.Conv2d`; the
    quantizers are those of `BinaryLinear`.

    ``padding_value`` fills the border of the quantized input. 0, as in the papers' code, adds a
    third value to a binary input; 1 and -1 keep it binary. Raises ValueError for any other value,
    and for 1 or -1 with a ``padding_mode`` other than ``"zeros"``.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size, *, stride=1, padding=0,
                 dilation=1, groups: int = 1, weight_quantizer=ste_sign, input_quantizer=None,
                 bias: bool = False, padding_mode: str = "zeros", padding_value: float = 0.0,
                 device=None, dtype: torch.dtype | None = None):  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding,
                         dilation=dilation, groups=groups, bias=bias, padding_mode=padding_mode,
                         device=device, dtype=dtype)  # fmt: skip
        if padding_value not in (-1, 0, 1):
            raise ValueError(f"padding_value must be 0, 1 or -1, not {padding_value!r}")
        if padding_value and padding_mode != "zeros":
            raise ValueError(f"padding_value={padding_value} needs padding_mode='zeros', "
                             f"not {padding_mode!r}")  # fmt: skip
        self.padding_value = padding_value
        self.set_quantizers(weight_quantizer, input_quantizer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution for x of shape (N, in_channels, H, W)."""
        x, weight = self.quantized_input(x), self.binary_weight()
        return self._convolve(x, weight, self.bias, self.groups)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        padding = self.padding
        if self.padding_value or self.padding_mode != "zeros":
            mode = "constant" if self.padding_value else self.padding_mode
            x = F.pad(x, self._reversed_padding_repeated_twice, mode, self.padding_value)
            padding = 0
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, groups)

    def extra_repr(self) -> str:
        """Add a padding value other than 0 to what torch prints."""
        padded = f", padding_value={self.padding_value}" if self.padding_value else ""
        return super().extra_repr() + padded


class _WinnerTakesAll(torch.autograd.Function):
    """Forward: the best expert of each sample. Backward: as if a softmax had mixed them."""

    @staticmethod
    def forward(scores, experts, temperature):
        return experts[scores.argmax(1)]

    @staticmethod
    def setup_context(ctx, inputs, output):
        scores, experts, ctx.temperature = inputs
        ctx.save_for_backward(scores, experts)

    @staticmethod
    def backward(ctx, gradient):
        scores, experts = ctx.saved_tensors
        indices = torch.arange(len(experts), device=scores.device)
        fires = (scores.argmax(1)[:, None] == indices).to(gradient.dtype)
        # relative to expert 0, which the Jacobian ignores: equal experts then give exactly 0
        to_gate = gradient @ (experts - experts[0]).T
        highest = scores.amax(1, keepdim=True)
        s = ((scores - highest).to(gradient.dtype) / ctx.temperature).softmax(1)
        to_scores = s * (to_gate - (s * to_gate).sum(1, keepdim=True)) / ctx.temperature
        return to_scores.to(scores.dtype), fires.T @ gradient, None


class ExpertBinaryConv2d(BinaryConv2d):
    r"""Convolve each sample with one of several binary kernels, chosen by a gate on its input.

    .. math::

        y = q_x(x) \circledast q_w(W_k) + b, \qquad k = \operatorname{argmax}_j z_j, \qquad
        z = \omega\, \bar x + c

    where :math:`\bar x` is the mean of the real input over its positions, and :math:`\omega, c`
    is ``gate``, a real linear layer (expert binary networks, equations 2, 3 and 5; the constant c
    is in the code only). The winner takes all: one expert fires for each sample, the first one on
    a tie. In the backward pass only the winner's weights get a gradient, but all scores do, as if
    :math:`\sum_j s_j\, q_w(W_j)` had been used with :math:`s = \operatorname{softmax}(z / T)`, T =
    ``temperature``:

    .. math::

        \frac{\partial L}{\partial z_j} = \frac{s_j}{T} \Big(g_j - \sum_i s_i\, g_i\Big), \qquad
        g_j = \Big\langle \frac{\partial L}{\partial q_w(W_k)},\ q_w(W_j) \Big\rangle .

    We read equation 4 as this softmax; with the one-hot choice the gradient would be 0. Equal
    experts, as `replicate` makes them, give the gate a gradient of exactly 0.

    ``weight`` has the shape (experts, out_channels, in_channels // groups, kh, kw); the weight
    quantizer sees the first two as one, so that each output channel of each expert has its own
    scale. ``bias`` is shared. Input and output are those of `BinaryConv2d`; the batch dimension is
    required. Raises ValueError unless ``experts`` is a positive integer and ``temperature``
    positive, and for an input of another shape.

    Source: Bulat, Martinez, Tzimiropoulos, ICLR 2021 (read as arXiv 2010.03558v1).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size, *, experts: int = 4,
                 stride=1, padding=0, dilation=1, groups: int = 1, weight_quantizer=ste_sign,
                 input_quantizer=ste_sign, bias: bool = False, temperature: float = 1.0,
                 padding_mode: str = "zeros", padding_value: float = 0.0,
                 device=None, dtype: torch.dtype | None = None):  # fmt: skip
        whole = isinstance(experts, Integral) and not isinstance(experts, bool)
        if not whole or experts < 1 or not temperature > 0:
            raise ValueError("experts must be a positive integer and temperature positive, "
                             f"not {experts!r} and {temperature!r}")  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding,
                         dilation=dilation, groups=groups, bias=bias, padding_mode=padding_mode,
                         padding_value=padding_value, device=device, dtype=dtype)  # fmt: skip
        self.experts, self.temperature = experts, temperature
        self.weight = nn.Parameter(self.weight.new_empty(experts, *self.weight.shape))
        self.gate = nn.Linear(in_channels, experts, device=device, dtype=dtype)
        self.reset_parameters()
        self.set_quantizers(weight_quantizer, input_quantizer)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, H', W') for x of shape (N, in_channels, H, W)."""
        scores = self._scores(x)
        samples = scores.shape[0]  # not len(), a constant to torch.export
        if samples == 0:  # torch convolves in one group at least; any expert will do
            x, weight = self.quantized_input(x), self.binary_weight()[0]
            return self._convolve(x, weight, self.bias, self.groups)
        weight = self._chosen(scores, self.binary_weight().flatten(1))
        # one grouped convolution for all samples: they stand side by side, as channels of one
        x = self.quantized_input(x).flatten(0, 1)[None]
        weight = weight.view(-1, *self.weight.shape[2:])
        bias = None if self.bias is None else self.bias.repeat(samples)
        y = self._convolve(x, weight, bias, self.groups * samples)
        return y.reshape(samples, self.out_channels, *y.shape[2:])

    def _chosen(self, scores: Tensor, experts: Tensor) -> Tensor:
        """Return each sample's flattened kernel, (N, kernel size); here the gate learns."""
        return _WinnerTakesAll.apply(scores, experts, self.temperature)

    def binary_weight(self) -> Tensor:
        """Return the binary weights of all experts, in the shape of ``weight``."""
        if self.weight_quantizer is None:
            return self.weight
        return self.weight_quantizer(self.weight.flatten(0, 1)).reshape(self.weight.shape)

    @torch.no_grad()
    def selected(self, x: Tensor) -> Tensor:
        """Return the index of the expert that fires for each sample of x, shape (N,)."""
        return self._scores(x).argmax(1)

    @torch.no_grad()
    def replicate(self, index: int = 0) -> None:
        """Copy one expert's weights to all, as the paper starts; the gate stays as it is."""
        stored_weight(self).copy_(self.weight[index].clone())

    def _apply(self, fn, recurse: bool = True):
        # to(memory_format=torch.channels_last) would also convert five dimensions, and fail
        shape = self.weight.shape
        for tensor in self._stored():
            tensor.data = tensor.data.flatten(0, 1)
        try:
            return super()._apply(fn, recurse)
        finally:  # also after an error, such as one for lack of memory
            for tensor in self._stored():
                tensor.data = tensor.data.unflatten(0, shape[:2])

    def _stored(self) -> list[Tensor]:
        """Return the weight and its gradient, if they are there; none if it is computed."""
        weight = self._parameters.get("weight")
        return [] if weight is None else [t for t in (weight, weight.grad) if t is not None]

    def _scores(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"the input must be (N, {self.in_channels}, H, W), "
                             f"not {tuple(x.shape)}")  # fmt: skip
        return self.gate(channel_means(x))

    def extra_repr(self) -> str:
        """Add the number of experts to what torch prints."""
        return f"{super().extra_repr()}, experts={self.experts}, temperature={self.temperature}"


def _over_channels(values: Tensor, x: Tensor) -> Tensor:
    """Return per-channel values in x's dtype, shaped to broadcast over x of (N, C, ...)."""
    # a single channel would broadcast to any number
    if not torch.jit.is_tracing() and (x.dim() < 2 or x.shape[1] != len(values)):
        raise ValueError(f"the input must be (N, {len(values)}, ...), not {tuple(x.shape)}")
    return values.to(x.dtype).view(-1, *[1] * (x.dim() - 2))


class GlobalAveragePool(nn.Module):
    """Average each channel over all positions: (N, C, H, W) to (N, C, 1, 1), or without N.

    The means are those of ``AdaptiveAvgPool2d(1)``. But their gradient keeps the memory format of
    the input; torch's is contiguous, and in a channels-last residual network, where it is added to
    every gradient before it, makes each layer work with two formats at once. On a CPU that costs a
    quarter of a training step of Bi-Real Net 20 (``python -m benchmarks network``).

    >>> GlobalAveragePool()(torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]]))
    tensor([[[[3.]]]])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the means."""
        return F.avg_pool2d(x, x.shape[-2:])


def channel_means(x: Tensor) -> Tensor:
    """Return the mean of each channel over all positions: `GlobalAveragePool`, (N, C)."""
    return GlobalAveragePool()(x).flatten(1)


class LearnableShift(nn.Module):
    r"""Add a learned number to each channel: :math:`y = x + b_c`, with b = ``shift``.

    In front of a sign, -b is a learned threshold. Input and output (N, channels, ...); b starts
    at 0.

    Source: ReActNet's RSign (Liu et al., ECCV 2020; recalled): this shift, followed by the sign.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the shifted input."""
        return x + _over_channels(self.shift, x)


class RPReLU(nn.Module):
    r"""PReLU between two learned shifts: :math:`y = f_c(x - \gamma_c) + \zeta_c`.

    :math:`f_c(u) = u` where :math:`u > 0`, else :math:`\beta_c u`. Each channel has its own
    :math:`\gamma` = ``gamma`` and :math:`\zeta` = ``zeta``, which start at 0, and :math:`\beta` =
    ``slope``, which starts at 0.25. Input and output (N, channels, ...).

    Source: ReActNet (Liu et al., ECCV 2020; recalled).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))
        self.zeta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x."""
        bent = F.prelu(x - _over_channels(self.gamma, x), self.slope.to(x.dtype))
        return bent + _over_channels(self.zeta, x)


class ChannelScale(nn.Module):
    r"""Multiply each channel by a learned number: :math:`y = a_c\, x`, with a = ``scale``.

    Input and output (N, channels, ...); a starts at 1. After a binary convolution it takes the
    place of XNOR-Net's analytic scale, and is learned by backpropagation.

    Source: Bulat, Martinez, Tzimiropoulos, ICLR 2021, equation 1.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled input."""
        return x * _over_channels(self.scale, x)


class DataDrivenScale(nn.Module):
    r"""Compute a scale for each output channel from the input: :math:`G(x)` in (0, 1).

    .. math:: G(x) = \sigma\big(V \max(0,\ U \bar x)\big)

    with :math:`\bar x` the mean of the real, pre-sign input over its positions, matrices U
    (hidden, in_channels) and V (out_channels, hidden) without biases, and the logistic function
    :math:`\sigma`; hidden is ``out_channels // reduction``, at least 1. Input (N, in_channels, H,
    W), output (N, out_channels, 1, 1), by which the convolution's output is multiplied. Raises
    ValueError for a ``reduction`` below 1.

    Source: Real-to-Binary (Martinez et al., ICLR 2020), where r = 8 is ``reduction``.
    """

    def __init__(self, in_channels: int, out_channels: int, reduction: int = 8):
        super().__init__()
        if reduction < 1:
            raise ValueError(f"reduction must be 1 or more, not {reduction!r}")
        hidden = max(1, out_channels // reduction)
        self.squeeze = nn.Linear(in_channels, hidden, bias=False)
        self.excite = nn.Linear(hidden, out_channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scales."""
        return self.excite(self.squeeze(channel_means(x)).relu()).sigmoid()[:, :, None, None]


class LocalResponseNorm(nn.Module):
    r"""Divide each activation by the activity of neighbouring channels at the same position.

    .. math::

        b^i = a^i \Big/ \Big(k + \alpha \sum_{j = \max(0,\, i - n/2)}^{\min(C - 1,\, i + n/2)}
        (a^j)^2\Big)^{\beta}

    The sum runs over n = ``size`` channels, fewer at the ends. :math:`\alpha` is not divided by n,
    unlike in `torch.nn.LocalResponseNorm` and in AlexNet's released code: for what that code ran,
    pass ``alpha=2e-5``. Input and output (N, C, ...); half precision is computed in float32,
    because in float16 the square of 256 overflows. Raises ValueError unless ``size`` is odd and
    positive.

    On activations of order 1 it does little but divide by :math:`k^\beta`: it was made for pixels
    from 0 to 255.

    Source: AlexNet (Krizhevsky, Sutskever, Hinton, NIPS 2012), section 3.3.
    """

    def __init__(self, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0):
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size must be odd and positive, not {size!r}")
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised input."""
        a = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        ends = [0, 0] * (x.dim() - 2) + [self.size // 2] * 2
        squares = F.pad(a.square(), ends)
        # shifted sums: less than half the time of torch's pooling over channels on a CPU
        shifted = [squares.narrow(1, first, x.shape[1]) for first in range(self.size)]
        activity = sum(shifted[1:], shifted[0])
        return (a * (self.k + self.alpha * activity).pow(-self.beta)).to(x.dtype)

    def extra_repr(self) -> str:
        """Name the constants in what torch prints."""
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


def binary_layers(model: nn.Module) -> Iterator[BinaryLayer]:
    """Yield the binary layers of a model, in the order of its modules."""
    return (module for module in model.modules() if isinstance(module, BinaryLayer))


@contextmanager
def quantized_by(model: nn.Module, weight_quantizer: Quantizer):
    """Inside a with block, run every latent-weight layer of the model with another quantizer.

    BinaryConnect's three methods of test-time inference are ``ste_sign``, ``real_weight`` and
    ``stochastic_sign``. Layers without latent weights are left alone. Batch-norm statistics
    belong to the weights they were collected under: see `training.reestimate_batchnorm`. Raises
    TypeError for None, which is no quantizer: that of the real weights is ``real_weight``.
    """
    if weight_quantizer is None:
        raise TypeError("weight_quantizer must be a function such as binarize.ste_sign, not None; "
                        "binarize.real_weight runs the network on its latent weights"
                        )  # fmt: skip
    layers = [layer for layer in binary_layers(model) if layer.weight_quantizer is not None]
    before = [layer.weight_quantizer for layer in layers]
    try:
        for layer in layers:
            layer.weight_quantizer = weight_quantizer
        yield model
    finally:
        for layer, quantizer in zip(layers, before, strict=True):
            layer.weight_quantizer = quantizer


def binarized(model: nn.Module, where: Callable[[str, nn.Module], bool] | None = None, *,
              weight_quantizer: Quantizer | None = ste_sign,
              input_quantizer: Quantizer | None = None) -> nn.Module:  # fmt: skip
    """Return a copy of a network in which `BinaryLinear` and `BinaryConv2d` replace real layers.

    where: called with the name and the layer for each `torch.nn.Linear` and `torch.nn.Conv2d` that
    is not binary yet; those for which it is true are replaced. By default all but the first and
    the last are, in the order of the modules.
    weight_quantizer, input_quantizer: of the new layers. The old weights become their latent
    weights; with ``weight_quantizer=None`` only their signs remain.

    Geometry, bias, dtype, device, training mode and ``requires_grad`` stay, and so do parameters
    that are shared (with ``weight_quantizer=None`` a real layer that shares one has signs, too).
    An activation in front of a layer stays, too: the signs of what a ReLU returns are all +1. A
    parent that holds its layers in a list, too, finds the new ones there. One that reads a layer's
    weight and does not call the layer, as torchvision's Swin does, goes on with the latent weight:
    in `models.summary` such a layer has no output. (Of `torch.nn.TransformerEncoderLayer`, whose
    fast path does the same, that path is switched off.)

    Raises ValueError if no layer is chosen, and for chosen layers that compute something else or
    would lose something: those of a subclass, those with hooks or with a forward, modules or
    buffers of their own, those compiled by themselves.

    >>> net = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 7), nn.Linear(7, 6))
    >>> binary = binarized(net)
    >>> [type(layer).__name__ for layer in binary]
    ['Linear', 'BinaryLinear', 'Linear']
    >>> torch.equal(binary[1].weight, net[1].weight)
    True
    """
    holder = nn.ModuleList([copy.deepcopy(model)])  # the model's parent
    quantizers = weight_quantizer, input_quantizer
    chosen = _chosen_layers(holder[0], where)
    replace_parts(holder, {layer: _binary_counterpart(layer, *quantizers) for layer in chosen})
    return holder[0]


def replace_parts(network: nn.Module, parts: dict[nn.Module, nn.Module]) -> None:
    """Replace parts of a network wherever its modules hold them: as modules, or in a list too."""
    by_id = {id(old): new for old, new in parts.items() if new is not old}
    for module in list(network.modules()):
        if id(getattr(module, "_orig_mod", None)) in by_id:  # its forward is bound to the old one
            raise ValueError("a layer that torch.compile has compiled by itself cannot be "
                             "replaced: compile it, or the whole network, afterwards")  # fmt: skip
        _swap(vars(module), by_id)
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # no fast path, which would not call its layers


def _swap(value, new: dict[int, nn.Module], depth: int = DEPTH):
    """Return a value with the modules of these ids replaced; lists and dicts change in place."""
    if depth and isinstance(value, dict):
        for key, part in value.items():
            value[key] = _swap(part, new, depth - 1)
    elif depth and isinstance(value, list):
        value[:] = [_swap(part, new, depth - 1) for part in value]
    elif depth and type(value) is tuple:
        return tuple(_swap(part, new, depth - 1) for part in value)
    return new.get(id(value), value)


def _chosen_layers(model: nn.Module, where: Callable | None) -> list[nn.Module]:
    """Return the real layers that `binarized` replaces, or raise ValueError."""
    real = {name: module for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not isinstance(module, BinaryLayer)
            }  # fmt: skip
    inner = list(real)[1:-1]
    names = inner if where is None else [name for name in real if where(name, real[name])]
    if not names:
        raise ValueError("no layer to make binary: where must choose among "
                         f"{', '.join(real) or 'the linear layers and convolutions'}; "
                         "by default it leaves out the first and the last")  # fmt: skip
    refused = [f"{name} ({type(real[name]).__name__})"
               for name in names if not _is_plain(real[name])]  # fmt: skip
    if refused:
        raise ValueError("only a Linear or a Conv2d itself, without hooks or parts of its own, "
                         f"can become binary; let where leave out {', '.join(refused)}"
                         )  # fmt: skip
    return [real[name] for name in names]


def _is_plain(layer: nn.Module) -> bool:
    own = vars(layer)
    hooks = [value for name, value in own.items() if name.endswith("_hooks")]  # torch's dicts
    parts = own["_modules"], own["_buffers"], "forward" in own
    return type(layer) in (nn.Linear, nn.Conv2d) and not any((*hooks, *parts))


def _binary_counterpart(layer: nn.Module, *quantizers: Quantizer | None) -> BinaryLayer:
    """Return a binary layer of the same geometry that holds the same parameters."""
    options = {"bias": layer.bias is not None, "device": "meta"}  # neither memory nor draws
    if isinstance(layer, nn.Linear):
        binary = BinaryLinear(layer.in_features, layer.out_features, **options)
    else:
        options |= {name: getattr(layer, name) for name in GEOMETRY}
        binary = BinaryConv2d(layer.in_channels, layer.out_channels, layer.kernel_size, **options)
    binary.weight, binary.bias = layer.weight, layer.bias
    binary.set_quantizers(*quantizers)
    return binary.train(layer.training)


def clip_latent_weights(model: nn.Module, bound: float = 1.0) -> None:
    r"""Clip latent weights in place: :math:`w \leftarrow \max(-b, \min(b, w))`, b = ``bound``.

    BinaryConnect does this after each update: beyond :math:`\pm 1` a weight would grow without any
    effect on its binary value. Weights without a quantizer are already binary and are not touched.
    Raises ValueError unless ``bound`` is positive, and TypeError as `stored_weight` does.
    """
    if not bound > 0:
        raise ValueError(f"bound must be positive, not {bound!r}")
    with torch.no_grad():
        for layer in binary_layers(model):
            if layer.weight_quantizer is not None:
                stored_weight(layer).clamp_(-bound, bound)


class SquaredHingeLoss(nn.Module):
    r"""Squared hinge loss for one-against-all targets: :math:`\max(0,\ 1 - t\,y)^2`.

    :math:`t = +1` for the right class and -1 for the others. Input: outputs y of shape
    (N, classes) and integer targets (N,). ``reduction="mean"`` averages over batch and classes
    (BinaryConnect's released code); ``"batchmean"`` sums over classes and averages over the batch
    (its earlier code). The two differ by a factor of ``classes``, which matters to SGD but not to
    ADAM. Half precision is computed in float32, because in float16 the square of 256 overflows.
    Raises ValueError for any other ``reduction``, and for targets of another shape.

    >>> SquaredHingeLoss()(torch.tensor([[1.0, -1.0], [0.0, 0.0]]), torch.tensor([0, 1]))
    tensor(0.5000)
    """

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        if reduction not in ("mean", "batchmean"):
            raise ValueError(f"unknown reduction {reduction!r}; known: 'mean', 'batchmean'")
        self.reduction = reduction

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        if not torch.jit.is_tracing() and targets.shape != outputs.shape[:1] + outputs.shape[2:]:
            raise ValueError("outputs must be (N, classes) and targets (N,), not "
                             f"{tuple(outputs.shape)} and {tuple(targets.shape)}")  # fmt: skip
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        margin = outputs.neg().scatter(1, targets[:, None], outputs.gather(1, targets[:, None]))
        loss = F.relu(1 - margin).square()
        return loss.mean() if self.reduction == "mean" else loss.sum(1).mean()


def attention_map(features: Tensor) -> Tensor:
    r"""Return where a feature map is active: :math:`Q / \lVert Q \rVert_2`, (N, H · W), float32.

    :math:`Q_p = \sum_c A_{c,p}^2` sums over the channels of A = ``features`` (N, C, H, W) at each
    position p. A positive factor on A drops out; a map of zeros stays zero. Raises ValueError for
    features of another shape.

    Source: Real-to-Binary (Martinez et al., ICLR 2020). larq divides by the maximum instead.

    >>> attention_map(torch.tensor([[[[3.0, 0.0]], [[0.0, 4.0]]]])).round(decimals=3)
    tensor([[0.4900, 0.8720]])
    """
    if features.dim() != 4:
        raise ValueError(f"features must be (N, C, H, W), not {tuple(features.shape)}")
    features = features.float()
    largest = features.detach().abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-30)
    # a power of two, which rounds nothing: the squares of large or small numbers would be inf or 0
    scale = largest.frexp().mantissa / largest
    energy = (scale * features).square().sum(1).flatten(1)
    return F.normalize(energy, dim=1)


def attention_matching(students: Iterable[Tensor], teachers: Iterable[Tensor]) -> Tensor:
    r"""Return the distance between two networks' attention maps, summed over the layers compared.

    .. math::

        L_{att} = \sum_j \Big\lVert \frac{Q_S^j}{\lVert Q_S^j \rVert_2} -
        \frac{Q_T^j}{\lVert Q_T^j \rVert_2} \Big\rVert_2

    with the `attention_map` of the student's and the teacher's features at each layer j, averaged
    over the N samples. Features are (N, C, H, W); the numbers of channels may differ. The teacher
    gets no gradient. Raises ValueError for lists that are empty or of different lengths, and for
    maps of different sizes.

    Source: Real-to-Binary (Martinez et al., ICLR 2020), at the ends of blocks. That the norm is
    not squared and that samples are averaged is our reading.
    """
    distances = []
    for student, teacher in zip(students, teachers, strict=True):
        ours, theirs = attention_map(student), attention_map(teacher.detach())
        if (len(student), *student.shape[2:]) != (len(teacher), *teacher.shape[2:]):
            raise ValueError(f"features of {tuple(student.shape)} and {tuple(teacher.shape)} have "
                             "maps of different sizes")  # fmt: skip
        distances.append(torch.linalg.vector_norm(ours - theirs, dim=1).mean())
    if not distances:
        raise ValueError("there are no features to compare")
    return torch.stack(distances).sum()


def bipolar_penalty(weights: Iterable[Tensor], strength: float) -> Tensor:
    r"""Return :math:`\lambda \sum_i (1 - w_i^2)`; for weights in [-1, 1] it is least at ±1.

    :math:`\lambda` = ``strength``; the sum runs over all tensors in ``weights``. Its gradient is
    :math:`-2 \lambda w`, that of a negative weight decay: without clipping to [-1, 1], every
    weight but 0 runs away. Raises ValueError for a negative ``strength`` and for no weights.

    Source: Tang, Hua, Wang, AAAI 2017, through notes on the paper; its value of :math:`\lambda`
    is not known to us.

    >>> bipolar_penalty([torch.tensor([0.5, -1.0])], 0.25)
    tensor(0.1875)
    """
    if strength < 0:
        raise ValueError(f"strength must not be negative, not {strength!r}")
    # a sum in half precision would overflow, or lose what is small
    parts = [(1 - weight.square()).sum(dtype=torch.promote_types(weight.dtype, torch.float32))
             for weight in weights]  # fmt: skip
    if not parts:
        raise ValueError("there are no weights to regularise")
    return strength * torch.stack(parts).sum()


class ElasticLink(nn.Module):
    r"""Add a convolution's real input to its output: :math:`z = y + \gamma\, s(x)`.

    x (N, in_channels, H, W) is the input of the binary convolution before its sign, and y
    (N, out_channels, H, W) the convolution's output. :math:`\gamma` = ``balance`` is one learned
    number. s has no parameters: it is the identity for equal numbers of channels, repeats x to
    expand, and averages groups of neighbouring channels to squeeze. Raises ValueError if neither
    number of channels divides the other, for an x of another number of channels, and if x and y
    differ in height or width.

    Source: the idea of Hu et al. (AAAI 2022), from its abstract: the input, a learned balance,
    squeeze and expand. We could not read their formulas: that :math:`\gamma` is one number that
    starts at 1, and what s does to the channels, is our choice.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        least, most = sorted((in_channels, out_channels))
        if least < 1 or most % least:
            raise ValueError("one of the numbers of channels must divide the other, "
                             f"not {in_channels} and {out_channels}")  # fmt: skip
        self.in_channels, self.out_channels = in_channels, out_channels
        self.balance = nn.Parameter(torch.ones(()))

    def matched(self, x: Tensor) -> Tensor:
        """Return x with out_channels channels, s(x)."""
        if not torch.jit.is_tracing() and x.shape[1] != self.in_channels:
            raise ValueError(f"x must have {self.in_channels} channels, not {x.shape[1]}")
        if self.in_channels <= self.out_channels:
            return x.repeat(1, self.out_channels // self.in_channels, 1, 1)
        return x.unflatten(1, (self.out_channels, -1)).mean(2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the output y with the link from the input x."""
        if x.shape[2:] != y.shape[2:]:
            raise ValueError(f"input and output must have the same height and width, not "
                             f"{tuple(x.shape[2:])} and {tuple(y.shape[2:])}")  # fmt: skip
        return y + self.balance.to(y.dtype) * self.matched(x)

    def extra_repr(self) -> str:
        """Name the numbers of channels in what torch prints."""
        return f"{self.in_channels}, {self.out_channels}"
