"""AlexNet (Krizhevsky, Sutskever, Hinton, NIPS 2012), a small version, a four-layer network."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bnnbook.layers import LocalResponseNorm
from bnnbook.models._arguments import check_choice, check_counts, check_lengths

Layers = list[tuple[str, nn.Module]]

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}
# Layers whose biases start at 1 in the paper, so that their ReLUs are active from the start.
BIASED = ("conv2", "conv4", "conv5", "fc6", "fc7")


class TowerNorm(LocalResponseNorm):
    """`LocalResponseNorm` within each tower; the towers' channels lie side by side.

    Each GPU of the released code normalises its own maps, so a map at the border between two
    towers has neighbours on its own side only. Input and output (N, channels, H, W).
    """

    def __init__(self, towers: int):
        super().__init__()
        self.towers = towers

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised input, (N, channels, H, W)."""
        normalise = super().forward
        return torch.cat([normalise(tower) for tower in x.chunk(self.towers, 1)], 1)


def alexnet(num_classes: int = 1000, *, image_size: int = 224, in_channels: int = 3,
            widths: Sequence[int] = (96, 256, 384, 384, 256), hidden: int = 4096, towers: int = 2,
            lrn: bool = True, pooling: int = 3, without: int | None = None, dropout: float = 0.5,
            weight_std: float | None = 0.01, hidden_bias: float = 1.0
            ) -> nn.Sequential:  # fmt: skip
    r"""Return AlexNet: five convolutions, three fully connected layers, 60 965 224 parameters.

    Input (N, 3, 224, 224) or (N, 3, 227, 227), output (N, num_classes). The layers are named
    conv1 to conv5 and fc6 to fc8, with relu, norm, pool and dropout numbered to match; the feature
    maps are 55, 27, 13, 13, 13 and 6 wide.

    - image_size: 224 and 227 give the same network; for other sizes see `alexnet_small`.
    - widths: numbers of kernels of the five convolutions.
    - hidden: units of fc6 and of fc7.
    - towers: with the paper's 2, one for each GPU, conv2, conv4 and conv5 see only the maps of
      their own half; conv3 and the fully connected layers see all. Normalisation stays within a
      tower, as in the released code. 1 is the network without this separation, with 62 378 344
      parameters.
    - lrn: normalise after relu1 and relu2. On inputs of order 1 this does little but divide by
      :math:`2^{0.75}`; it was made for pixels from 0 to 255.
    - pooling: 3 for overlapping windows, 2 for adjacent ones, both with stride 2. The maps have
      the same size in both.
    - without: 2, 3, 4 or 5 leaves out that convolution; its pooling stays.
    - dropout: the fraction of the outputs of fc6 and fc7 that is dropped.
    - weight_std, hidden_bias: weights start as N(0, weight_std²); biases of conv2, conv4, conv5,
      fc6 and fc7 at ``hidden_bias``, the others at 0. With a ``weight_std`` of None the start is
      that of He et al., with a variance of 2 over the fan-in; fc8 then keeps 0.01.

    Windows of 11 pixels with stride 4 do not fit into 224. The released code lets the last one
    extend beyond the right and lower borders by 3 pixels; so does this network, by padding there,
    which changes nothing for 227. Elsewhere this network follows the paper where that code departs
    from it: ReLU before normalisation, one initialisation for all layers. Raises ValueError for
    other values of ``image_size``, ``pooling`` and ``without``. (Section 3, figure 2; section 5 on
    the initialisation.)

    >>> with torch.device("meta"):  # shapes without memory
    ...     net = alexnet()
    >>> sum(p.numel() for p in net.parameters())
    60965224
    """
    check_counts(num_classes=num_classes, in_channels=in_channels, widths=tuple(widths),
                 hidden=hidden, towers=towers)  # fmt: skip
    check_lengths(5, widths=widths)
    check_choice("pooling", pooling, (2, 3))
    check_choice("without", without, (None, 2, 3, 4, 5))
    layers, size = _first_convolution(image_size, in_channels, widths[0])
    channels = widths[0]
    for number, width, kernel in zip(range(1, 6), widths, (0, 5, 3, 3, 3), strict=True):
        if number not in (1, without):
            groups = 1 if number == 3 else towers
            conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2, groups=groups)
            layers.append((f"conv{number}", conv))
            channels = width
        layers += _after_convolution(number, towers, lrn, pooling)
    layers += _classifier(channels * size**2, hidden, num_classes, dropout)
    return _initialised(nn.Sequential(OrderedDict(layers)), weight_std, hidden_bias)


def alexnet_small(num_classes: int = 10, *, image_size: int = 32,
                  widths: Sequence[int] = (48, 128, 192, 192, 128), hidden: int = 512,
                  weight_std: float | None = None, hidden_bias: float = 0.0, **options
                  ) -> nn.Sequential:  # fmt: skip
    """Return an AlexNet for small images; other options as in `alexnet`.

    The paper has no such network: these sizes are ours. The first convolution is 5 x 5 with stride
    1 and padding 2, the widths are half the paper's, fc6 and fc7 have 512 units. Each pooling
    halves the map and rounds down: 32, 16, 8, 4 for CIFAR-10. Input (N, in_channels, image_size,
    image_size) with ``image_size`` from 8 to 64, output (N, num_classes). Weights are initialised
    as by He et al. and biases at 0: in a network this small, N(0, 0.01²) makes signals of order 1
    vanish.
    """
    return alexnet(num_classes, image_size=image_size, widths=widths, hidden=hidden,
                   weight_std=weight_std, hidden_bias=hidden_bias, **options)  # fmt: skip


def _first_convolution(image_size: int, channels: int, width: int) -> tuple[Layers, int]:
    """Return the first convolution for this image size, and the size of the last feature map."""
    if image_size in (224, 227):
        overhang = nn.ZeroPad2d((0, 3, 0, 3))
        return [("overhang", overhang), ("conv1", nn.Conv2d(channels, width, 11, stride=4))], 6
    if 8 <= image_size <= 64:
        return [("conv1", nn.Conv2d(channels, width, 5, padding=2))], image_size // 8
    raise ValueError(f"image_size must be 224, 227 or from 8 to 64, not {image_size}")


def _after_convolution(number: int, towers: int, lrn: bool, pooling: int) -> Layers:
    """Return what follows the convolution of this number: ReLU, normalisation, pooling."""
    layers: Layers = [(f"relu{number}", nn.ReLU())]
    if lrn and number in (1, 2):
        layers.append((f"norm{number}", TowerNorm(towers)))
    if number in (1, 2, 5):
        # windows of 3 may extend beyond the border, as in the released code: both halve the map
        layers.append((f"pool{number}", nn.MaxPool2d(pooling, 2, ceil_mode=pooling == 3)))
    return layers


def _classifier(features: int, hidden: int, num_classes: int, dropout: float) -> Layers:
    """Return the three fully connected layers, with dropout after the first two."""
    layers: Layers = [("flatten", nn.Flatten())]
    for number, inputs in ((6, features), (7, hidden)):
        layers += [(f"fc{number}", nn.Linear(inputs, hidden)), (f"relu{number}", nn.ReLU()),
                   (f"dropout{number}", nn.Dropout(dropout))]  # fmt: skip
    return [*layers, ("fc8", nn.Linear(hidden, num_classes))]


def _initialised(network: nn.Sequential, weight_std, hidden_bias: float) -> nn.Sequential:
    """Return the network after drawing its weights and setting its biases."""
    for name, layer in network.named_children():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            std = weight_std
            if std is None:
                std = 0.01 if name == "fc8" else (2 / layer.weight[0].numel()) ** 0.5
            nn.init.normal_(layer.weight, 0, std)
            nn.init.constant_(layer.bias, hidden_bias if name in BIASED else 0)
    return network


def four_layer_cnn(num_classes: int = 10, *, activation: str = "relu",
                   lrn: bool | Mapping = False, in_channels: int = 3, image_size: int = 32,
                   weight_std: Sequence[float] | None = (1e-4, 0.01, 0.01, 0.01)
                   ) -> nn.Sequential:  # fmt: skip
    """Return a stand-in for the network of AlexNet's figure 1, in which ReLU outruns tanh.

    The paper does not describe its four layers. These are those of the CIFAR-10 network "18 %"
    that comes with the authors' cuda-convnet; that figure 1 shows this network is NOT established.
    Three 5 x 5 convolutions with padding 2 and 32, 32 and 64 kernels, each followed by 3 x 3
    pooling with stride 2 (maximum, average, average); one fully connected layer. Input (N,
    in_channels, image_size, image_size), at least 8 pixels wide; output (N, num_classes).

    - activation: "relu" or "tanh", applied before the pooling.
    - lrn: `LocalResponseNorm` after the first two poolings, with other constants if they are given
      by name; their file normalises within a map.
    - weight_std: a standard deviation for each layer; biases start at 0. The default is that of
      their file, for pixels from 0 to 255 minus the mean image. None keeps torch's initialisation.

    Their weight decay (0.004 on the convolutions, 1 on the last layer) is left to the optimizer;
    figure 1 uses no regularisation. Raises ValueError for other activations, and for images that
    are too small.
    """
    check_counts(num_classes=num_classes, in_channels=in_channels)
    check_choice("activation", activation, ACTIVATIONS)
    if image_size < 8:
        raise ValueError(f"image_size must be at least 8, not {image_size}")
    layers: Layers = []
    for number, (inputs, width) in enumerate(((in_channels, 32), (32, 32), (32, 64)), 1):
        pool = nn.MaxPool2d if number == 1 else nn.AvgPool2d
        layers += [(f"conv{number}", nn.Conv2d(inputs, width, 5, padding=2)),
                   (f"{activation}{number}", ACTIVATIONS[activation]()),
                   (f"pool{number}", pool(3, 2, ceil_mode=True))]  # fmt: skip
        if number < 3 and (lrn or isinstance(lrn, Mapping)):  # a mapping may be empty
            constants = {} if lrn is True else lrn
            layers.append((f"norm{number}", LocalResponseNorm(**constants)))
    last = nn.Linear(64 * (image_size // 8) ** 2, num_classes)
    network = nn.Sequential(OrderedDict([*layers, ("flatten", nn.Flatten()), ("fc4", last)]))
    if weight_std is not None:
        _draw_each(network, weight_std)
    return network


def _draw_each(network: nn.Sequential, weight_std: Sequence[float]) -> None:
    """Draw each layer's weights with its own standard deviation, and set its biases to 0."""
    check_lengths(4, weight_std=weight_std)
    layers = [layer for layer in network if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer, std in zip(layers, weight_std, strict=True):
        nn.init.normal_(layer.weight, 0, std)
        nn.init.zeros_(layer.bias)
