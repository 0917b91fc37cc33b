"""Bi-Real Net (Liu et al., ECCV 2018): a shortcut around every binary convolution."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from bnnbook.binarize import approx_sign, magnitude_aware_sign
from bnnbook.layers import BinaryConv2d, GlobalAveragePool
from bnnbook.models._arguments import check_choice, check_counts, check_lengths

BINARY_CONV = partial(
    BinaryConv2d, weight_quantizer=magnitude_aware_sign, input_quantizer=approx_sign
)


class PadShortcut(nn.Module):
    """Take every stride-th pixel and append channels of zeros: a shortcut without parameters.

    Input (N, C, H, W), output (N, C + more, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, more: int, stride: int):
        super().__init__()
        self.more, self.stride = more, stride

    def forward(self, x: Tensor) -> Tensor:
        """Return the smaller, deeper map."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))


def _pooled(inputs: int, outputs: int, stride: int, conv) -> nn.Sequential:
    """Return average pooling, a 1 x 1 convolution made by ``conv``, and batch normalisation."""
    pool = nn.AvgPool2d(stride, ceil_mode=True)
    return nn.Sequential(pool, conv(inputs, outputs, 1), nn.BatchNorm2d(outputs))


def _pooled_real(inputs: int, outputs: int, stride: int, conv) -> nn.Sequential:
    return _pooled(inputs, outputs, stride, partial(nn.Conv2d, bias=False))


def _padded(inputs: int, outputs: int, stride: int, conv) -> nn.Module:
    return PadShortcut(outputs - inputs, stride)


# Shortcuts for blocks that change the size, by name; called with the numbers of channels before
# and after, the stride and the block's binary convolution.
SHORTCUTS = {"pool-conv": _pooled_real, "pool-binary": _pooled, "pad": _padded}


class BiRealBlock(nn.Module):
    r"""One binary convolution and its shortcut: :math:`y = BN(q_x(x) \circledast q_w(W)) + s(x)`.

    Input (N, in_channels, H, W), output (N, out_channels, H / stride, W / stride), rounded up.
    ``conv`` constructs the binary convolution with its quantizers. The real input bypasses the
    sign along s, which is the identity unless the size changes; then it is ``shortcut``, one of
    `SHORTCUTS`. (After the authors' PyTorch code.)
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *,
                 conv=BINARY_CONV, shortcut: str = "pool-conv"):  # fmt: skip
        super().__init__()
        check_choice("shortcut", shortcut, SHORTCUTS)
        self.conv = conv(in_channels, out_channels, 3, stride=stride, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        resized = SHORTCUTS[shortcut]
        self.shortcut = nn.Identity() if same else resized(in_channels, out_channels, stride, conv)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for x of shape (N, in_channels, H, W)."""
        return self.norm(self.conv(x)) + self.shortcut(x)


def birealnet20(classes: int = 10, *, in_channels: int = 3, widths: Sequence[int] = (16, 32, 64),
                convolutions: Sequence[int] = (6, 6, 6), shortcut: str = "pool-conv",
                weight_quantizer=magnitude_aware_sign, input_quantizer=approx_sign,
                padding_value: float = 0.0) -> nn.Sequential:  # fmt: skip
    """Return a Bi-Real ResNet-20 for small images: 267 264 binary weights.

    A real 3 x 3 convolution with batch normalisation; three stages of `BiRealBlock`, the second
    and third of which begin with stride 2; global average pooling; a real output layer. Input
    (N, in_channels, H, W), output (N, classes). Quist et al. (2023) train a network of this name;
    NEITHER its widths nor its shortcuts could be checked. Three public implementations have 16, 32
    and 64 channels, and shortcuts of either kind.

    - convolutions: the number of binary convolutions in each stage.
    - shortcut: where the size changes. "pool-conv": average pooling, real 1 x 1 convolution, batch
      normalisation, as in Bi-Real Net; "pool-binary": the same with a binary convolution; "pad":
      every second pixel, with zeros as new channels, without parameters.
    - weight_quantizer: for latent weights; None for weights that are ±1 themselves, as `Bop` and
      `CascadedEMA` train them. The default is Bi-Real Net's; `ste_sign` leaves out its scale,
      which batch normalisation removes anyway.
    - input_quantizer: binarises the input of each binary convolution.
    - padding_value: see `BinaryConv2d`.

    Raises ValueError for an unknown shortcut and for ``widths`` and ``convolutions`` of different
    lengths, TypeError for a quantizer that is no function.
    """
    first = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
    return _birealnet([first], classes, in_channels, widths, convolutions, shortcut, padding_value,
                      weight_quantizer, input_quantizer)  # fmt: skip


def birealnet18(classes: int = 1000, *, in_channels: int = 3,
                widths: Sequence[int] = (64, 128, 256, 512),
                convolutions: Sequence[int] = (4, 4, 4, 4), shortcut: str = "pool-conv",
                weight_quantizer=magnitude_aware_sign, input_quantizer=approx_sign,
                padding_value: float = 0.0) -> nn.Sequential:  # fmt: skip
    """Return Bi-Real Net-18 for ImageNet: 10 985 472 binary weights; options as `birealnet20`.

    The stem is a real 7 x 7 convolution with stride 2, batch normalisation and 3 x 3 max-pooling
    with stride 2. Input (N, 3, 224, 224), output (N, classes). ``convolutions=(6, 8, 12, 6)`` is
    the 34-layer network. (ECCV 2018, and the authors' PyTorch code.)
    """
    first = partial(nn.Conv2d, kernel_size=7, stride=2, padding=3, bias=False)
    pool = nn.MaxPool2d(3, 2, padding=1)
    return _birealnet([first, pool], classes, in_channels, widths, convolutions, shortcut,
                      padding_value, weight_quantizer, input_quantizer)  # fmt: skip


def _birealnet(stem, classes, in_channels, widths, convolutions, shortcut, padding_value,
               weight_quantizer, input_quantizer) -> nn.Sequential:  # fmt: skip
    """Return stem, stages and output layer.

    stem: a constructor of its convolution, and the layers after its batch normalisation.
    """
    check_counts(classes=classes, in_channels=in_channels, widths=tuple(widths),
                 convolutions=tuple(convolutions))  # fmt: skip
    check_lengths(len(widths), convolutions=convolutions)
    conv = partial(BinaryConv2d, weight_quantizer=weight_quantizer,
                   input_quantizer=input_quantizer, padding_value=padding_value)  # fmt: skip
    first, *pool = stem
    channels = widths[0]
    parts = OrderedDict(
        stem=nn.Sequential(first(in_channels, channels), nn.BatchNorm2d(channels), *pool)
    )
    for number, (width, count) in enumerate(zip(widths, convolutions, strict=True), 1):
        blocks = []
        for stride in [1 if number == 1 else 2] + [1] * (count - 1):
            blocks.append(BiRealBlock(channels, width, stride, conv=conv, shortcut=shortcut))
            channels = width
        parts[f"stage{number}"] = nn.Sequential(*blocks)
    output = nn.Sequential(GlobalAveragePool(), nn.Flatten(), nn.Linear(channels, classes))
    return nn.Sequential(parts | {"output": output})
