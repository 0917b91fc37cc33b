"""Quantizers: real numbers in, exactly -1 or +1 out, and what passes for their gradient.

Every function keeps shape, dtype and device, and takes float16, bfloat16, float32 or float64.
"""

import torch
from torch import Tensor


def sign(x: Tensor) -> Tensor:
    r"""Return +1 where x >= 0 and -1 elsewhere, never 0.

    :math:`\operatorname{sign}(x) = +1` if :math:`x \ge 0`, else :math:`-1` (BinaryConnect, eq. 1).
    ``torch.sign(0)`` is 0, which would make a binary weight ternary. No gradient flows.

    >>> sign(torch.tensor([-0.5, -0.0, 0.0, 2.0]))
    tensor([-1.,  1.,  1.,  1.])
    """
    # The half step lifts 0 (and -0) to +1; on a CPU ten times as fast as torch.where. Nothing in
    # place: inside an autograd function torch.compile (2.11) would make the gradient zero.
    return x.detach().sign().add(0.5).sign()


class _STESign(torch.autograd.Function):
    """Forward: sign. Backward: the gradient, masked to |x| <= clip_value."""

    @staticmethod
    def forward(ctx, x, clip_value):
        ctx.clip_value = clip_value
        if clip_value is not None:
            ctx.save_for_backward(x)
        return sign(x)

    @staticmethod
    def backward(ctx, gradient):
        if ctx.clip_value is None:
            return gradient, None
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() <= ctx.clip_value), None


def ste_sign(x: Tensor, clip_value: float | None = 1.0) -> Tensor:
    r"""Binarise by sign; on the way back, behave like the identity (straight-through estimator).

    Forward :math:`q(x) = \operatorname{sign}(x)`. Backward :math:`\partial q/\partial x = 1` where
    :math:`|x| \le` ``clip_value``, else 0; with ``clip_value=None`` it is 1 everywhere.

    BinaryConnect uses the plain identity (``None``) on its weights and keeps them in [-1, 1] by
    clipping; there the mask would change nothing. The mask matters for activations.

    >>> x = torch.tensor([-2.0, 0.0, 1.0], requires_grad=True)
    >>> ste_sign(x).sum().backward(); x.grad
    tensor([0., 1., 1.])
    """
    return _STESign.apply(x, clip_value)


def hard_sigmoid(x: Tensor) -> Tensor:
    r"""Return :math:`\sigma(x) = \operatorname{clip}((x + 1)/2,\ 0,\ 1)` (BinaryConnect, eq. 3).

    Backward: 1/2 where :math:`|x| \le 1`, else 0.

    >>> hard_sigmoid(torch.tensor([-3.0, 0.0, 0.5, 3.0]))
    tensor([0.0000, 0.5000, 0.7500, 1.0000])
    """
    return ((x + 1) / 2).clamp(0, 1)


class _StochasticSign(torch.autograd.Function):
    """Forward: a Bernoulli draw of -1 or +1. Backward: the gradient, unchanged."""

    @staticmethod
    def forward(ctx, w, generator):
        # float32 draws: in half precision the grid of rand() would be too coarse for p near 0 or 1
        draw = torch.rand(w.shape, generator=generator, device=w.device)
        return (draw < hard_sigmoid(w.float())).to(w.dtype) * 2 - 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def stochastic_sign(w: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""Draw each weight: +1 with probability :math:`\sigma(w)`, else -1 (BinaryConnect, eq. 2).

    :math:`\sigma` is `hard_sigmoid`. For :math:`|w| \le 1` the draw is unbiased:
    :math:`E[w_b] = w` and :math:`\operatorname{Var}[w_b] = 1 - w^2`.
    Backward: :math:`\partial q/\partial w = 1` everywhere.

    ``generator`` draws the numbers; the default is torch's global one for the device of ``w``.

    >>> stochastic_sign(torch.tensor([-1.0, 1.0, 7.0]))
    tensor([-1.,  1.,  1.])
    """
    return _StochasticSign.apply(w, generator)


def real_weight(w: Tensor) -> Tensor:
    """Return w itself: the quantizer that does not quantize, to run a network on latent weights.

    Forward :math:`q(w) = w`, backward 1. BinaryConnect's second way to run at test time.
    """
    return w
