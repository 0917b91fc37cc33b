"""Networks of ReActNet's blocks (Liu et al., ECCV 2020): binary, with learned shifts."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from bnnbook.binarize import approx_sign, magnitude_aware_sign
from bnnbook.layers import BinaryConv2d, GlobalAveragePool, LearnableShift, RPReLU
from bnnbook.models._arguments import check_counts
from bnnbook.models.bireal import BINARY_CONV

CHANNELS_A = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)


class ReActBlock(nn.Module):
    r"""A binary 3 x 3 and a binary 1 x 1 convolution, each shifted before and after.

    Each half is :math:`y = \mathrm{RPReLU}(BN(\operatorname{sign}(x + b) \circledast q_w(W)) + x)`
    with one learned shift b per channel. The shortcut around a 3 x 3 convolution with ``stride`` 2
    is average pooling. To double the channels, two 1 x 1 convolutions, each with its own shortcut,
    stand side by side, so that every shortcut is an identity. Input (N, in_channels, H, W), output
    (N, out_channels, H / stride, W / stride), rounded up. ``conv`` constructs the binary
    convolutions with their quantizers. Raises ValueError unless out_channels is in_channels or
    twice as many. (After ReActNet's released code.)
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *,
                 conv=BINARY_CONV):  # fmt: skip
        super().__init__()
        if out_channels not in (in_channels, 2 * in_channels):
            raise ValueError(f"a block makes {in_channels} or {2 * in_channels} channels of "
                             f"{in_channels}, not {out_channels}")  # fmt: skip
        self.shift3 = LearnableShift(in_channels)
        self.conv3 = conv(in_channels, in_channels, 3, stride=stride, padding=1)
        self.norm3 = nn.BatchNorm2d(in_channels)
        self.shortcut = nn.Identity() if stride == 1 else nn.AvgPool2d(stride, ceil_mode=True)
        self.activation3 = RPReLU(in_channels)
        copies = range(out_channels // in_channels)
        self.shift1 = LearnableShift(in_channels)
        self.conv1 = nn.ModuleList(conv(in_channels, in_channels, 1) for _ in copies)
        self.norm1 = nn.ModuleList(nn.BatchNorm2d(in_channels) for _ in copies)
        self.activation1 = RPReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for x of shape (N, in_channels, H, W)."""
        x = self.activation3(self.norm3(self.conv3(self.shift3(x))) + self.shortcut(x))
        shifted = self.shift1(x)
        copies = zip(self.conv1, self.norm1, strict=True)
        return self.activation1(torch.cat([norm(conv(shifted)) + x for conv, norm in copies], 1))


def reactnet_small(classes: int = 10, *, in_channels: int = 3,
                   channels: Sequence[int] = (32, 64, 128, 128, 256, 256), stride: int = 1,
                   weight_quantizer=magnitude_aware_sign, input_quantizer=approx_sign,
                   padding_value: float = 0.0) -> nn.Sequential:  # fmt: skip
    """Return a small network of `ReActBlock` for CIFAR-10; the paper has none, this is ours.

    A real 3 x 3 convolution with batch normalisation, the blocks, global average pooling, a real
    output layer. ``channels`` lists those of the stem, then those of each block; a block that
    doubles them has stride 2, except for the first. ``stride`` is that of the stem; the quantizers
    and ``padding_value`` are as in `birealnet20`. 1 055 744 binary weights. Input (N, in_channels,
    H, W), output (N, classes). Raises ValueError for channels that neither stay the same nor
    double, TypeError for a quantizer that is no function.
    """
    check_counts(classes=classes, in_channels=in_channels, channels=tuple(channels), stride=stride)
    conv = partial(BinaryConv2d, weight_quantizer=weight_quantizer,
                   input_quantizer=input_quantizer, padding_value=padding_value)  # fmt: skip
    blocks = []
    for number, (inputs, outputs) in enumerate(pairwise(channels)):
        step = 2 if number and outputs > inputs else 1
        blocks.append(ReActBlock(inputs, outputs, step, conv=conv))
    first = nn.Conv2d(in_channels, channels[0], 3, stride=stride, padding=1, bias=False)
    output = [GlobalAveragePool(), nn.Flatten(), nn.Linear(channels[-1], classes)]
    return nn.Sequential(OrderedDict(stem=nn.Sequential(first, nn.BatchNorm2d(channels[0])),
                                     blocks=nn.Sequential(*blocks),
                                     output=nn.Sequential(*output)))  # fmt: skip


def reactnet_a(classes: int = 1000, **options) -> nn.Sequential:
    """Return ReActNet-A for ImageNet: 28 253 184 binary weights; options as `reactnet_small`.

    MobileNet's layout of 13 blocks behind a 3 x 3 convolution with stride 2. Input
    (N, 3, 224, 224), output (N, classes). (ECCV 2020; Quist et al. train it as well.)
    """
    return reactnet_small(classes, channels=CHANNELS_A, stride=2, **options)
