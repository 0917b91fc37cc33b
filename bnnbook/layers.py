"""Layers whose weights are binary when they are multiplied, and the loss that goes with them.

Three kinds of weight, three words: a *latent* weight is real and only its sign is used, a *binary*
weight is exactly -1 or +1, a *real* weight is an ordinary parameter.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnnbook.binarize import sign, ste_sign

Quantizer = Callable[[Tensor], Tensor]
QUANTIZED = ("weight_quantizer", "input_quantizer")


class BinaryLayer:
    """What binary layers share: a trained ``weight``, and the binary one made from it.

    ``weight`` is latent (real) when ``weight_quantizer`` is set, exactly -1 or +1 when it is None.
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
        """Set the quantizers; a layer without a weight quantizer gets weights of exactly ±1."""
        self.weight_quantizer, self.input_quantizer = weight_quantizer, input_quantizer
        if weight_quantizer is None:
            with torch.no_grad():
                self.weight.copy_(sign(self.weight))

    def reset_parameters(self, bound: float = 1.0) -> None:
        """Draw weights from U(-bound, bound), clipped to [-1, 1]; biases start at 0."""
        with torch.no_grad():
            self.weight.uniform_(-bound, bound).clamp_(-1, 1)
            # the quantizer is not set yet while torch's own constructor runs
            if getattr(self, "weight_quantizer", self) is None:
                self.weight.copy_(sign(self.weight))
            if self.bias is not None:
                self.bias.zero_()

    def extra_repr(self) -> str:
        """Add the quantizers' names to what torch prints."""
        quantizers = [f"{kind}={_name(getattr(self, kind))}" for kind in QUANTIZED
                      if getattr(self, kind) is not None]  # fmt: skip
        return ", ".join([super().extra_repr(), *quantizers])


def _name(quantizer: Quantizer) -> str:
    function = getattr(quantizer, "func", quantizer)  # functools.partial keeps the function inside
    name = getattr(function, "__name__", type(function).__name__)
    options = getattr(quantizer, "keywords", {})
    return name + (
        "(" + ", ".join(f"{k}={v}" for k, v in options.items()) + ")" if options else ""
    )


class BinaryLinear(BinaryLayer, nn.Linear):
    r"""Multiply by binary weights: :math:`y = q_x(x)\, q_w(W)^\top + b`.

    Input (..., in_features), output (..., out_features). :math:`q_w` is ``weight_quantizer``;
    None says that ``weight`` itself is and stays binary. :math:`q_x` is ``input_quantizer``; None
    leaves the input real. ``bias`` is off: batch normalisation, which usually follows, has one.

    >>> layer = BinaryLinear(3, 2)
    >>> sorted(set(layer.binary_weight().flatten().tolist())) in ([-1.0], [1.0], [-1.0, 1.0])
    True
    """

    def __init__(self, in_features: int, out_features: int, *, weight_quantizer=ste_sign,
                 input_quantizer=None, bias: bool = False):  # fmt: skip
        super().__init__(in_features, out_features, bias=bias)
        self.set_quantizers(weight_quantizer, input_quantizer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product for x of shape (..., in_features)."""
        return F.linear(self.quantized_input(x), self.binary_weight(), self.bias)


class BinaryConv2d(BinaryLayer, nn.Conv2d):
    r"""Convolve with binary weights: :math:`y = q_x(x) \circledast q_w(W) + b`.

    Input (N, in_channels, H, W), output (N, out_channels, H', W') as in `torch.nn.Conv2d`; the
    quantizers are those of `BinaryLinear`. Zero padding adds a third value to a binary input.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size, *, stride=1, padding=0,
                 groups: int = 1, weight_quantizer=ste_sign, input_quantizer=None,
                 bias: bool = False):  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding,
                         groups=groups, bias=bias)  # fmt: skip
        self.set_quantizers(weight_quantizer, input_quantizer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution for x of shape (N, in_channels, H, W)."""
        return self._conv_forward(self.quantized_input(x), self.binary_weight(), self.bias)


def binary_layers(model: nn.Module) -> Iterator[BinaryLayer]:
    """Yield the binary layers of a model, in the order of its modules."""
    return (module for module in model.modules() if isinstance(module, BinaryLayer))


@contextmanager
def quantized_by(model: nn.Module, weight_quantizer: Quantizer):
    """Run every latent-weight layer of the model with another quantizer, inside a with block.

    BinaryConnect's three ways to run a trained network are ``real_weight``, ``ste_sign`` and
    ``stochastic_sign`` here. Layers without latent weights are left alone. Batch-norm statistics
    belong to the weights they were collected under: see `training.reestimate_batchnorm`.
    """
    layers = [layer for layer in binary_layers(model) if layer.weight_quantizer is not None]
    before = [layer.weight_quantizer for layer in layers]
    try:
        for layer in layers:
            layer.weight_quantizer = weight_quantizer
        yield model
    finally:
        for layer, quantizer in zip(layers, before, strict=True):
            layer.weight_quantizer = quantizer


def clip_latent_weights(model: nn.Module, bound: float = 1.0) -> None:
    r"""Clip latent weights in place: :math:`w \leftarrow \max(-b, \min(b, w))`, b = ``bound``.

    BinaryConnect does so after each update: beyond :math:`\pm 1` a weight would grow without any
    effect on its binary value. Weights without a quantizer are already binary and are not touched.
    """
    with torch.no_grad():
        for layer in binary_layers(model):
            if layer.weight_quantizer is not None:
                layer.weight.clamp_(-bound, bound)


class SquaredHingeLoss(nn.Module):
    r"""Squared hinge loss of one-against-all targets: :math:`\max(0,\ 1 - t\,y)^2`.

    :math:`t = +1` for the right class and -1 for the others. Input: outputs y of shape
    (N, classes) and integer targets (N,). ``reduction="mean"`` averages over batch and classes
    (BinaryConnect's released code); ``"batchmean"`` sums over classes and averages over the batch
    (its earlier code). They differ by a factor of ``classes``, which SGD feels and ADAM does not.

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
        margin = outputs.neg().scatter(1, targets[:, None], outputs.gather(1, targets[:, None]))
        loss = F.relu(1 - margin).square()
        return loss.mean() if self.reduction == "mean" else loss.sum(1).mean()
