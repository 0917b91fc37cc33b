"""Quantizers: real numbers in, a few exact values out, with a surrogate for their gradient.

Every function keeps shape, dtype and device, and takes float16, bfloat16, float32 or float64.
The binary ones return exactly -1 or +1, even for NaN, whose sign means nothing (but a single NaN
spoils the maximum that `dorefa_weight` takes). `sign` and the quantizers built on it raise
TypeError for integers, which have no gradient.
"""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor


def function_of(quantizer: Callable | None) -> Callable | None:
    """Return the function of a `functools.partial`, and any other quantizer as it is.

    >>> from functools import partial
    >>> function_of(partial(ste_sign, clip_value=None)).__name__
    'ste_sign'
    """
    return getattr(quantizer, "func", quantizer)


def _is_exported() -> bool:
    """Return whether torch.export, torch.jit.trace or an ONNX exporter is recording this call."""
    # torch.compiler.is_exporting is newer than torch 2.6, and true in torch.compile, too
    exported = torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
    return exported or torch.jit.is_tracing()


def sign(x: Tensor) -> Tensor:
    r"""Return +1 where x >= 0 and -1 elsewhere, never 0.

    :math:`\operatorname{sign}(x) = +1` if :math:`x \ge 0`, else :math:`-1` (BinaryConnect, eq. 1).
    ``torch.sign(0)`` is 0, which would make a binary weight ternary. No gradient flows.

    >>> sign(torch.tensor([-0.5, -0.0, 0.0, 2.0]))
    tensor([-1.,  1.,  1.,  1.])
    """
    if not x.is_floating_point():
        raise TypeError(f"sign takes floating-point numbers, not {x.dtype}")
    if _is_exported():
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)  # ONNX has no copysign
    # -0 + 0 is 0, and every other x + 0 is x: two passes over memory, where torch.where takes ten
    # times as long on a CPU. Nothing in place: inside an autograd function torch.compile (2.11)
    # would make the gradient zero.
    return torch.copysign(x.new_ones(()), x.detach() + 0.0)


def _just_above(limit: float, dtype: torch.dtype) -> float:
    """Return the next larger number that the dtype can represent, or infinity."""
    info = torch.finfo(dtype)
    step = math.ldexp(info.eps, math.frexp(limit)[1] - 1)
    above = (round(limit / step) + 1) * step
    return above if above <= info.max else math.inf


def _apply(function: type[torch.autograd.Function], *arguments) -> Tensor:
    """Apply an autograd function; torch.jit.trace gets only its forward, without a gradient."""
    # a trace that calls back into Python, as the backward pass would, cannot be saved
    return (function.forward if torch.jit.is_tracing() else function.apply)(*arguments)


class _STESign(torch.autograd.Function):
    """Forward: sign. Backward: the gradient, masked to |x| <= clip_value."""

    generate_vmap_rule = True  # works under torch.func, but in reverse mode only

    @staticmethod
    def forward(x, clip_value):
        return sign(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.clip_value = inputs
        if ctx.clip_value is not None:
            ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, gradient):
        if ctx.clip_value is None:
            return gradient, None
        (x,) = ctx.saved_tensors
        # gradient * (x.abs() <= clip_value) in one pass, not five; hardtanh leaves its ends out
        end = _just_above(ctx.clip_value, x.dtype)
        return torch.ops.aten.hardtanh_backward(gradient, x, -end, end), None


def ste_sign(x: Tensor, clip_value: float | None = 1.0) -> Tensor:
    r"""Binarise by sign, with the gradient of the identity (straight-through estimator).

    Forward :math:`q(x) = \operatorname{sign}(x)`. Backward :math:`\partial q/\partial x = 1` where
    :math:`|x| \le` ``clip_value`` (and where x is NaN), else 0; with ``clip_value=None`` it is 1
    everywhere. Raises ValueError unless ``clip_value`` is a positive number (no tensor) or None.

    BinaryConnect uses the plain identity (``None``) for its weights, which it clips to [-1, 1]:
    there the mask would change nothing. The mask matters for activations.

    Source: Bengio et al., 2013, for the estimator; Courbariaux et al., 2016, for the mask.

    >>> x = torch.tensor([-2.0, 0.0, 1.0], requires_grad=True)
    >>> ste_sign(x).sum().backward(); x.grad
    tensor([0., 1., 1.])
    """
    is_tensor = isinstance(clip_value, Tensor)
    if clip_value is not None and (is_tensor or not 0 < clip_value < math.inf):
        raise ValueError(f"clip_value must be a positive number or None, not {clip_value!r}")
    return _apply(_STESign, x, clip_value)


class _ApproxSign(torch.autograd.Function):
    """Forward: sign. Backward: the gradient times a tent of height 2 over [-1, 1]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return sign(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * torch.rsub(x.abs(), 2, alpha=2).relu()  # 2 - 2|x|, in one pass


def approx_sign(x: Tensor) -> Tensor:
    r"""Binarise by sign, with the gradient of a piecewise quadratic (Bi-Real Net).

    Forward :math:`q(x) = \operatorname{sign}(x)`. Backward
    :math:`\partial q/\partial x = 2 - 2|x|` where :math:`|x| \le 1`, else 0: the derivative of
    :math:`2x - x|x|`, which runs from -1 to +1 over [-1, 1]. The area under this slope is 2, as
    for `ste_sign`, but more of it lies close to zero (second moment 1/3 instead of 2/3).

    Source: Liu et al., ECCV 2018, and their released code.

    >>> x = torch.tensor([-2.0, -0.5, 0.0, 1.0], requires_grad=True)
    >>> approx_sign(x).sum().backward(); x.grad
    tensor([0., 1., 2., 0.])
    """
    return _apply(_ApproxSign, x)


class _SwishSign(torch.autograd.Function):
    """Forward: sign. Backward: the gradient times the derivative of the sign-swish."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, beta):
        return sign(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.beta = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        # written with s = sigmoid(-b|x|) because cosh overflows; beyond 100 the slope is 0
        z = (x.abs() * -ctx.beta).clamp(min=-100)
        s = z.sigmoid()
        slope = s * (1 - s) * (2 + z * (1 - 2 * s))
        return gradient * (slope * (2 * ctx.beta)), None


def swish_sign(x: Tensor, beta: float = 5.0) -> Tensor:
    r"""Binarise by sign, with the gradient of the sign-swish function.

    Forward :math:`q(x) = \operatorname{sign}(x)`. Backward, with :math:`\beta` = ``beta``,

    .. math::

        \frac{\partial q}{\partial x} =
        \frac{\beta\,[2 - \beta x \tanh(\beta x / 2)]}{1 + \cosh \beta x}
        = 2 \beta\, s (1 - s)\,[2 - \beta |x| (1 - 2 s)],\quad s = \sigma(-\beta |x|),

    with the logistic function :math:`\sigma`. The slope is :math:`\beta` at 0 and the area under
    it is 2; beyond :math:`\beta |x| = 2.399` it is negative, so a gradient pushes x the other way.
    Raises ValueError unless ``beta`` is a positive number.

    Source: larq's ``swish_sign``, after BNN+ (Darabi et al., 2018; recalled).

    >>> x = torch.tensor([0.0, 1.0], requires_grad=True)
    >>> swish_sign(x).sum().backward(); x.grad
    tensor([ 5.0000, -0.1950])
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be a positive number, not {beta!r}")
    return _apply(_SwishSign, x, beta)


def magnitude_aware_sign(w: Tensor, clip_value: float | None = 1.0) -> Tensor:
    r"""Binarise by sign and scale each output channel by its mean magnitude (Bi-Real Net).

    Forward :math:`q(w) = \kappa_c \operatorname{sign}(w)`, where :math:`\kappa_c` is the mean of
    :math:`|w|` over output channel c, a constant in the backward pass. Backward
    :math:`\partial q/\partial w = \kappa_c` where :math:`|w| \le` ``clip_value``, else 0; with
    ``clip_value=None`` everywhere. The released PyTorch code leaves :math:`\kappa_c` out of the
    backward pass.

    Shape: (out, in, ...), as the weights of linear and convolutional layers. Raises ValueError
    for fewer than two dimensions.

    Source: Liu et al., ECCV 2018; larq's quantizer of this name.

    >>> magnitude_aware_sign(torch.tensor([[0.5, -0.25, 0.0], [3.0, 3.0, -3.0]]))
    tensor([[ 0.2500, -0.2500,  0.2500],
            [ 3.0000,  3.0000, -3.0000]])
    """
    if w.dim() < 2:
        raise ValueError(f"w must have output channels and inputs, (out, in, ...); got {w.dim()} "
                         "dimension(s)")  # fmt: skip
    binary = ste_sign(w, clip_value)
    return w.detach().abs().mean(tuple(range(1, w.dim())), keepdim=True) * binary


class _Levels(torch.autograd.Function):
    """Forward: round x in [0, 1] to a multiple of 1/n. Backward: the gradient, unchanged."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, n):
        # by a tensor: a GPU divides by a number by multiplying with its rounded reciprocal, which
        # gives slightly different levels
        return (x * n).round() / torch.full((), n, dtype=x.dtype, device=x.device)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class _ClippedLevels(torch.autograd.Function):
    """As `_Levels`, of x clipped to [0, 1]. Backward: the gradient, masked to 0 <= x <= 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, n):
        return _Levels.forward(x.clamp(0, 1), n)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (x.clamp(0, 1) == x), None


def _steps(bits: int) -> int:
    """Return n, the number of steps between the 2^bits levels; raise ValueError for other bits."""
    if bits not in range(1, 9):
        raise ValueError(f"bits must be a whole number from 1 to 8, not {bits!r}")
    return 2**bits - 1


def dorefa_activation(x: Tensor, bits: int = 1) -> Tensor:
    r"""Quantize activations to :math:`2^k` levels in [0, 1], k = ``bits``, 1 to 8 (DoReFa-Net).

    Forward :math:`q(x) = \operatorname{round}(n \operatorname{clip}(x, 0, 1)) / n` with
    :math:`n = 2^k - 1`. Backward :math:`\partial q/\partial x = 1` where :math:`0 \le x \le 1`,
    else 0. Halves round to the even neighbour: with one bit, 0.5 becomes 0. One bit here means
    0 and 1, not -1 and +1. Raises ValueError for other ``bits``.

    Source: Zhou et al., 2016, read through larq's ``dorefa``.

    >>> dorefa_activation(torch.tensor([-1.0, 0.2, 0.5, 0.9, 7.0]), bits=2)
    tensor([0.0000, 0.3333, 0.6667, 1.0000, 1.0000])
    """
    return _apply(_ClippedLevels, x, _steps(bits))


def dorefa_weight(w: Tensor, bits: int = 1) -> Tensor:
    r"""Quantize weights to :math:`2^k` levels in [-1, 1], k = ``bits``, 1 to 8 (DoReFa-Net).

    Forward :math:`q(w) = 2 \operatorname{round}(n x) / n - 1` with :math:`n = 2^k - 1` and
    :math:`x = \tanh(w) / (2 \max |\tanh w|) + 1/2`; the maximum is over all of w and a constant in
    the backward pass. Backward :math:`\partial q/\partial w = (1 - \tanh^2 w) / \max |\tanh w|`:
    gradients pass straight through the rounding. Raises ValueError for other ``bits``.

    Halves round to the even neighbour. With one bit, therefore, w = 0 becomes -1, where `ste_sign`
    gives +1, and so does a positive w so small that x rounds to 1/2 in its dtype.

    Source: Zhou et al., 2016, read through larq's ``dorefa``.

    >>> dorefa_weight(torch.tensor([-0.7, 0.0, 0.1]))
    tensor([-1., -1.,  1.])
    """
    if not _is_exported() and not w.numel():
        return w.clone()  # there is no maximum
    squashed = w.tanh()
    # clamped, so that weights that are all 0 do not become NaN; the maximum is taken over one
    # dimension, as the ONNX exporter needs it
    largest = squashed.detach().abs().flatten().amax(0).clamp(min=torch.finfo(w.dtype).tiny)
    return 2 * _apply(_Levels, squashed / (2 * largest) + 0.5, _steps(bits)) - 1


def hard_sigmoid(x: Tensor) -> Tensor:
    r"""Return :math:`\sigma(x) = \operatorname{clip}((x + 1)/2,\ 0,\ 1)` (BinaryConnect, eq. 3).

    Backward: 1/2 where :math:`|x| \le 1`, else 0.

    >>> hard_sigmoid(torch.tensor([-3.0, 0.0, 0.5, 3.0]))
    tensor([0.0000, 0.5000, 0.7500, 1.0000])
    """
    return ((x.clamp(max=1) + 1) / 2).clamp(min=0)  # just beyond 1, x + 1 would round to 2


class _StochasticSign(torch.autograd.Function):
    """Forward: a Bernoulli draw of -1 or +1. Backward: the gradient, unchanged."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w, generator):
        # float32 draws: in half precision the grid of rand() would be too coarse for p near 0 or 1
        draw = torch.rand(w.shape, generator=generator, device=w.device)
        return (draw < hard_sigmoid(w.float())).to(w.dtype) * 2 - 1

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def stochastic_sign(w: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""Draw each weight: +1 with probability :math:`\sigma(w)`, else -1 (BinaryConnect, eq. 2).

    :math:`\sigma` is `hard_sigmoid`. For :math:`|w| \le 1` the draw is unbiased:
    :math:`E[w_b] = w` and :math:`\operatorname{Var}[w_b] = 1 - w^2`.
    Backward: :math:`\partial q/\partial w = 1` everywhere.

    ``generator`` draws the numbers; by default torch's global generator of the device of ``w``.

    >>> stochastic_sign(torch.tensor([-1.0, 1.0, 7.0]))
    tensor([-1.,  1.,  1.])
    """
    return _apply(_StochasticSign, w, generator)


# torch binds the arguments of forward at each call; found once, a signature costs nothing then
for _each in (_STESign, _ApproxSign, _SwishSign, _Levels, _ClippedLevels, _StochasticSign):
    _each.forward.__signature__ = inspect.signature(_each.forward)


def real_weight(w: Tensor) -> Tensor:
    """Return w itself: the identity as a quantizer, to run a network on its latent weights.

    Forward :math:`q(w) = w`, backward 1. BinaryConnect's second method of test-time inference.
    """
    return w
