"""BinaryNet for CIFAR-10 as Helwegen et al. (NeurIPS 2019) run it: weights and activations ±1."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from bnnbook.binarize import ste_sign
from bnnbook.layers import BinaryConv2d, BinaryLinear
from bnnbook.models._arguments import check_choice, check_counts

# Pixels by which the first convolution pads each side.
PADDINGS = {"valid": 0, "same": 1}


def binarynet(classes: int = 10, *, widths: Sequence[int] = (128, 256, 512),
              hidden: Sequence[int] = (1024, 1024), in_channels: int = 3, image_size: int = 32,
              padding: str = "valid", padding_value: float = 0.0, weight_quantizer=ste_sign,
              input_quantizer=ste_sign) -> nn.Sequential:  # fmt: skip
    """Return the network of the Bop experiments: 10 352 000 binary weights.

    Two 3 x 3 convolutions of each width, then fully connected layers; every weight is binary, and
    so is the input of every layer but the first. 2 x 2 max-pooling follows every second
    convolution; then, as after every layer, comes batch normalisation, which learns a shift and no
    gain (eps 0.001, momentum 0.01 in torch's sense). Input (N, in_channels, image_size,
    image_size) with values in [-1, 1], output (N, classes) for the cross entropy.

    - padding: of the first convolution. "valid", as in the released code, turns 32 x 32 pixels
      into 30 x 30; "same" gives BinaryConnect's 14 022 016 weights, as in the paper.
    - padding_value: with which the other convolutions pad their inputs; see `BinaryConv2d`.
    - weight_quantizer: a quantizer such as `ste_sign` for latent weights; None for weights that
      are ±1 themselves, as `Bop` and `CascadedEMA` train them.
    - input_quantizer: binarises the inputs of all layers but the first.

    Raises ValueError for an unknown padding and for an image that is too small for all poolings,
    TypeError for a quantizer that is no function. (arXiv 1906.02107, section 5, and its code.)
    """
    check_counts(classes=classes, widths=tuple(widths), hidden=tuple(hidden),
                 in_channels=in_channels)  # fmt: skip
    check_choice("padding", padding, PADDINGS)
    border = PADDINGS[padding]
    size = (image_size + 2 * border - 2) // 2 ** len(widths)
    if size < 1:
        raise ValueError(f"image_size {image_size} is too small for {len(widths)} poolings")
    latent = {"weight_quantizer": weight_quantizer}
    both = latent | {"input_quantizer": input_quantizer}
    channels = [width for width in widths for _ in range(2)]
    layers = [BinaryConv2d(in_channels, widths[0], 3, padding=border, **latent), _norm(widths[0])]
    for number, (inputs, width) in enumerate(pairwise(channels)):
        layers.append(BinaryConv2d(inputs, width, 3, padding=1, padding_value=padding_value,
                                   **both))  # fmt: skip
        layers += [nn.MaxPool2d(2)] * (number % 2 == 0) + [_norm(width)]
    layers.append(nn.Flatten())
    for inputs, units in pairwise([channels[-1] * size**2, *hidden, classes]):
        layers += [BinaryLinear(inputs, units, **both), _norm(units, nn.BatchNorm1d)]
    return nn.Sequential(*layers)


def _norm(channels: int, kind: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """Return batch normalisation with a learned shift and no gain, like Keras's scale=False."""
    norm = kind(channels, eps=1e-3, momentum=0.01)
    # a constant gain of 1: without any, CUDA's backward pass has no gradient for the shift
    del norm.weight
    norm.register_buffer("weight", torch.ones(channels), persistent=False)
    return norm
