"""Expert binary networks (Bulat, Martinez, Tzimiropoulos, ICLR 2021; after arXiv 2010.03558v1)."""

import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bnnbook.binarize import ste_sign
from bnnbook.layers import (
    BinaryConv2d,
    ChannelScale,
    DataDrivenScale,
    ExpertBinaryConv2d,
    GlobalAveragePool,
)
from bnnbook.models._arguments import check_choice, check_counts, check_lengths


class SigmoidGateConv2d(ExpertBinaryConv2d):
    r"""The expert convolution with the gate gradient of the released training code.

    Forward as in `ExpertBinaryConv2d`. Backward each score learns independently, through the slope
    of a logistic function instead of the softmax Jacobian:

    .. math::

        \frac{\partial L}{\partial z_j} = \sigma(z_j)\,(1 - \sigma(z_j))\, g_j, \qquad
        g_j = \Big\langle \frac{\partial L}{\partial q_w(W_k)},\ q_w(W_j) \Big\rangle .

    Equal experts then push all scores in one direction, which says nothing about which is better.
    ``temperature`` has no effect. On a tie the first expert wins; the released code adds up all
    experts that tie.

    Source: the default of the authors' training code; the paper's ablation (A.2.3) finds it worse.
    """

    def _chosen(self, scores: Tensor, experts: Tensor) -> Tensor:
        slopes = scores.sigmoid()
        fires = nn.functional.one_hot(scores.argmax(1), len(experts)).to(experts.dtype)
        return (fires + (slopes - slopes.detach())).to(experts.dtype) @ experts


GATES = {"softmax": ExpertBinaryConv2d, "sigmoid": SigmoidGateConv2d}


class ExpertUnit(nn.Module):
    r"""One expert convolution and its shortcut, in the order of Real-to-Binary's baseline.

    .. math:: y = \mathrm{PReLU}(a \odot \mathrm{EBConv}(BN(x))) + s(x)

    with a learned scale :math:`a` per output channel (equation 1). It starts at one over the
    square root of the number of products in a sum, which makes the outputs of order 1; in the
    released code it starts at 1. Batch normalisation comes before the sign, so its shift acts as a
    learned threshold. :math:`s` is the identity or, where the size changes, average pooling and
    two real 1 x 1 convolutions, each with batch normalisation and PReLU.

    ``data_driven`` also multiplies by the `DataDrivenScale` of the normalised input. With one
    expert the convolution is a plain `BinaryConv2d`; otherwise ``gate`` selects how the gate
    learns: "softmax" or "sigmoid", see `SigmoidGateConv2d`. Other options (groups, padding_value)
    go to the convolution. Input (N, in_channels, H, W), output (N, out_channels, H / stride,
    W / stride), rounded up. (The order is that of the released code.)
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, *,
                 experts: int = 4, gate: str = "softmax", temperature: float = 1.0,
                 data_driven: bool = False, weight_quantizer=ste_sign, input_quantizer=ste_sign,
                 **conv):  # fmt: skip
        super().__init__()
        layer = BinaryConv2d
        if experts > 1:
            layer = partial(GATES[gate], experts=experts, temperature=temperature)
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = layer(in_channels, out_channels, kernel_size, stride=stride,
                          padding=kernel_size // 2, weight_quantizer=weight_quantizer,
                          input_quantizer=input_quantizer, **conv)  # fmt: skip
        self.scale = ChannelScale(out_channels)
        nn.init.constant_(self.scale.scale, self.conv.weight.shape[-3:].numel() ** -0.5)
        self.data_driven = DataDrivenScale(in_channels, out_channels) if data_driven else None
        self.activation = nn.PReLU(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else _downsample(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the unit's output for x of shape (N, in_channels, H, W)."""
        normed = self.norm(x)
        y = self.scale(self.conv(normed))
        if self.data_driven is not None:
            y = y * self.data_driven(normed)
        return self.activation(y) + self.shortcut(x)

    @torch.no_grad()
    def absorb_magnitude(self) -> None:
        """Multiply each output channel's scale by the mean magnitude of its weights.

        The mean is over all experts. So the outputs keep their size when the weights become ±1.
        """
        size = self.conv.weight.abs().mean((-3, -2, -1))  # of each expert, if there are several
        self.scale.scale *= size.reshape(-1, len(self.scale.scale)).mean(0)


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return the real shortcut, with a quarter of the channels between its two convolutions."""
    middle = max(1, inputs // 4)
    return nn.Sequential(
        nn.AvgPool2d(stride, ceil_mode=True),
        nn.Conv2d(inputs, middle, 1, bias=False), nn.BatchNorm2d(middle), nn.PReLU(middle),
        nn.Conv2d(middle, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.PReLU(outputs),
    )  # fmt: skip


def _convolution(inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """Return a real convolution with batch normalisation and ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class LightStem(nn.Module):
    """The released model's stem for ImageNet, from daBNN: a quarter of the size, little work.

    A 3 x 3 convolution with stride 2 to half the width; then, side by side, max-pooling and a
    1 x 1 followed by a 3 x 3 convolution, both of which halve the map; last a 1 x 1 convolution
    over the two.
    Input (N, in_channels, H, W), output (N, width, H / 4, W / 4). Raises ValueError unless
    ``width`` is even and at least 4.
    """

    def __init__(self, in_channels: int, width: int):
        super().__init__()
        if width < 4 or width % 2:
            raise ValueError(f"the light stem's width must be even and at least 4, not {width}")
        half, quarter = width // 2, width // 4
        self.first = _convolution(in_channels, half, 3, 2)
        self.branch = nn.Sequential(
            _convolution(half, quarter, 1), _convolution(quarter, half, 3, 2)
        )
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.last = _convolution(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the feature map that the first stage takes."""
        x = self.first(x)
        return self.last(torch.cat([self.branch(x), self.pool(x)], 1))


def _plain_stem(in_channels: int, width: int) -> nn.Sequential:
    return _convolution(in_channels, width, 3)


STEMS = {"3x3": _plain_stem, "light": LightStem}


def expertnet(classes: int = 10, *, blocks: Sequence[int] = (1, 1, 1, 1), expansion: int = 1,
              groups: Sequence[int] = (1, 1, 1, 1), experts: int = 4, width: int = 64,
              in_channels: int = 3, stem: str = "3x3", pointwise: bool = True,
              data_driven: bool = False, gate: str = "softmax", temperature: float = 1.0,
              weight_quantizer=ste_sign, input_quantizer=ste_sign,
              padding_value: float = 0.0) -> nn.Sequential:  # fmt: skip
    """Return an expert binary network, N0N1N2N3-E-G0:G1:G2:G3 in the paper's notation.

    A real stem, one stage for each number of ``blocks``, global average pooling, a real output
    layer. A block is three `ExpertUnit`: two 3 x 3 in groups, and a 1 x 1 without groups, which
    mixes them. Each stage has twice the channels of the one before; the first has ``width`` times
    ``expansion``, and all others begin with stride 2. Input (N, in_channels, H, W), output
    (N, classes).

    - blocks, expansion, groups: N, E and G of the name; see `parse_architecture`. Twice the width
      with four times the groups costs the same number of binary operations.
    - experts: of each convolution; one fires per sample. With 1 there are no gates.
    - width: channels of the stem.
    - stem: "3x3", a convolution for small images, is ours; "light", `LightStem`, is for ImageNet.
    - pointwise: False leaves out the 1 x 1 units.
    - data_driven: multiply by a `DataDrivenScale`, as the paper's final model does.
    - gate: how the gates learn, "softmax" as in the paper or "sigmoid" (`SigmoidGateConv2d`).
    - temperature: of the softmax through which the gates learn; see `ExpertBinaryConv2d`.
    - weight_quantizer: `ste_sign`; `real_weight` is for stage I, binary activations with real
      weights; None is for weights that are ±1 themselves.
    - input_quantizer: binarises the input of each expert convolution.
    - padding_value: see `BinaryConv2d`.

    The final model is ``expertnet(1000, **parse_architecture("1262-2-4:8:8:16"), stem="light",
    data_driven=True)``; ``expertnet(1000, blocks=(2, 2, 2, 2), experts=1, pointwise=False)`` has
    the layout of Real-to-Binary's strong baseline. Raises ValueError for numbers that do not fit
    together and for an unknown stem or gate, TypeError for a quantizer that is no function.
    (Sections 4.1 to 4.3.)
    """
    _check_architecture(blocks, expansion, groups)
    check_counts(classes=classes, experts=experts, width=width, in_channels=in_channels)
    check_choice("stem", stem, STEMS)
    check_choice("gate", gate, GATES)
    stages = OrderedDict(stem=STEMS[stem](in_channels, width))
    unit = partial(ExpertUnit, experts=experts, gate=gate, temperature=temperature,
                   data_driven=data_driven, weight_quantizer=weight_quantizer,
                   input_quantizer=input_quantizer, padding_value=padding_value)  # fmt: skip
    channels = width
    for number, (count, group) in enumerate(zip(blocks, groups, strict=True)):
        units = []
        for i in range(count):
            outputs, stride = width * expansion * 2**number, 2 if number and not i else 1
            units += [unit(channels, outputs, 3, stride, groups=group),
                      unit(outputs, outputs, 3, groups=group)]  # fmt: skip
            if pointwise:
                units.append(unit(outputs, outputs, 1))
            channels = outputs
        stages[f"stage{number + 1}"] = nn.Sequential(*units)
    output = [GlobalAveragePool(), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(stages | {"output": nn.Sequential(*output)})


def parse_architecture(name: str) -> dict:
    """Return the arguments of `expertnet` that the paper's name of a network stands for.

    >>> parse_architecture("1262-2-4:8:8:16")
    {'blocks': (1, 2, 6, 2), 'expansion': 2, 'groups': (4, 8, 8, 16)}
    """
    parts = re.fullmatch(r"(\d+)-(\d+)-(\d+(?::\d+)*)", name)
    if parts is None:
        raise ValueError(f"{name!r} is no architecture; one is written like '1262-2-4:8:8:16'")
    blocks, expansion, groups = parts.groups()
    found = {"blocks": tuple(int(n) for n in blocks), "expansion": int(expansion),
             "groups": tuple(int(n) for n in groups.split(":"))}  # fmt: skip
    _check_architecture(**found)
    return found


def architecture_name(blocks: Sequence[int], expansion: int, groups: Sequence[int]) -> str:
    """Return the paper's name of a network.

    Raises ValueError for numbers that do not fit together and for more than 9 blocks in a stage,
    which the name gives one digit.

    >>> architecture_name((1, 2, 6, 2), 2, (4, 8, 8, 16))
    '1262-2-4:8:8:16'
    """
    _check_architecture(blocks, expansion, groups)
    if max(blocks) > 9:
        raise ValueError(f"blocks: at most 9 in a stage, one digit of the name, not {blocks!r}")
    return f"{''.join(map(str, blocks))}-{expansion}-{':'.join(map(str, groups))}"


def _check_architecture(blocks, expansion, groups) -> None:
    check_counts(blocks=tuple(blocks), expansion=expansion, groups=tuple(groups))
    check_lengths(len(blocks), groups=groups)


def load_one_expert(model: nn.Module, one: nn.Module) -> None:
    """Copy a trained one-expert network into every expert of the model.

    ``model`` and ``one`` are `expertnet` networks that differ only in ``experts``; ``one`` has 1.
    Everything else is copied as well; the gates, which ``one`` does not have, keep their initial
    values. Right after that all experts are equal, so both networks compute the same. Raises
    ValueError for networks that differ in more, RuntimeError for latent weights where ``model``
    has ±1. (Section 4.1, second step.)
    """
    gates = ".conv.gate."
    state = {name: value for name, value in model.state_dict().items() if gates not in name}
    alone = one.state_dict()
    differ = sorted(state.keys() ^ alone.keys()) or [
        name for name in state if alone[name].shape != state[name].shape[-alone[name].dim() :]
    ]
    if differ:
        raise ValueError(f"the networks differ in more than their experts: {', '.join(differ)}")
    # the experts' weight has one more dimension, along which it is repeated
    copied = {name: alone[name].expand_as(value) for name, value in state.items()}
    model.load_state_dict({**model.state_dict(), **copied})
