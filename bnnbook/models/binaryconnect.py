"""The two networks of BinaryConnect (Courbariaux, Bengio, David, NIPS 2015)."""

from collections.abc import Sequence
from functools import partial

from torch import nn

from bnnbook.binarize import ste_sign, stochastic_sign
from bnnbook.layers import BinaryConv2d, BinaryLinear
from bnnbook.models._arguments import check_choice, check_counts

# How a layer makes the weight it multiplies with from its trained weight.
QUANTIZERS = {
    "real": None,
    "deterministic": partial(ste_sign, clip_value=None),
    "stochastic": stochastic_sign,
}


def _linear(inputs: int, outputs: int, weights: str) -> nn.Module:
    return _layer(weights, BinaryLinear, nn.Linear, inputs, outputs)


def _conv(inputs: int, outputs: int, weights: str) -> nn.Module:
    return _layer(weights, BinaryConv2d, nn.Conv2d, inputs, outputs, kernel_size=3, padding=1)


def _layer(weights: str, binary: type, real: type, *sizes: int, **options) -> nn.Module:
    """Return a binary layer, or for "real" weights a Glorot-initialised real one, without bias."""
    check_choice("weights", weights, QUANTIZERS)
    quantizer = QUANTIZERS[weights]
    if quantizer is not None:
        return binary(*sizes, **options, weight_quantizer=quantizer)
    layer = real(*sizes, **options, bias=False)
    nn.init.xavier_uniform_(layer.weight)
    return layer


def binaryconnect_mlp(in_features: int = 784, hidden: Sequence[int] = (1024, 1024, 1024),
                      classes: int = 10, *, weights: str = "deterministic",
                      dropout: float = 0.0) -> nn.Sequential:  # fmt: skip
    """Return the MNIST network: 784 - 3 x 1024 ReLU - 10, every layer binary, even the last.

    Each hidden layer is linear, batch norm, ReLU; the output layer has batch norm but no ReLU, and
    is trained with `SquaredHingeLoss`. ``weights`` is "deterministic", "stochastic" or "real" (the
    same network without binarisation, Glorot-initialised); other values raise ValueError.
    ``dropout`` is the fraction of hidden units dropped. Input (N, ...) is flattened, output (N,
    classes). The bias of algorithm 1 is that of batch norm. 2 910 208 weights.

    >>> net = binaryconnect_mlp()
    >>> sum(layer.weight.numel() for layer in net if isinstance(layer, nn.Linear))
    2910208
    """
    check_counts(in_features=in_features, hidden=tuple(hidden), classes=classes)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in zip((in_features, *hidden), hidden, strict=False):
        layers += [_linear(inputs, outputs, weights), nn.BatchNorm1d(outputs, eps=1e-4), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
    layers += [_linear(hidden[-1], classes, weights), nn.BatchNorm1d(classes, eps=1e-4)]
    return nn.Sequential(*layers)


def binaryconnect_cnn(classes: int = 10, *, widths: Sequence[int] = (128, 256, 512),
                      hidden: int = 1024, in_channels: int = 3, image_size: int = 32,
                      weights: str = "deterministic") -> nn.Sequential:  # fmt: skip
    """Return the CIFAR-10 network: (2x128C3)-MP2-(2x256C3)-MP2-(2x512C3)-MP2-(2x1024FC)-10.

    C3 is a 3 x 3 convolution with padding 1, MP2 a 2 x 2 max-pooling; batch norm and ReLU follow
    the pooling. ``weights`` as in `binaryconnect_mlp`; ``widths=(64, 128, 256)`` is the SVHN net.
    Input (N, in_channels, image_size, image_size), output (N, classes). 14 022 016 weights. Raises
    ValueError for images too small to be pooled so often.

    >>> net = binaryconnect_cnn()
    >>> sum(m.weight.numel() for m in net if isinstance(m, (nn.Linear, nn.Conv2d)))
    14022016
    """
    check_counts(classes=classes, widths=tuple(widths), hidden=hidden, in_channels=in_channels)
    if image_size < 2 ** len(widths):
        raise ValueError(f"image_size must be at least {2 ** len(widths)} for {len(widths)} "
                         f"poolings, not {image_size}")  # fmt: skip
    layers: list[nn.Module] = []
    channels = in_channels
    for width in widths:
        for pooled in (False, True):
            layers += [_conv(channels, width, weights)] + [nn.MaxPool2d(2)] * pooled
            layers += [nn.BatchNorm2d(width, eps=1e-4), nn.ReLU()]
            channels = width
    features = channels * (image_size // 2 ** len(widths)) ** 2
    head = binaryconnect_mlp(features, (hidden, hidden), classes, weights=weights)
    return nn.Sequential(*layers, *head)
