"""One-bit inference: signs in 64-bit words, products by XOR and popcount, sums and thresholds.

Training is over: nothing here has a gradient. `pack_network` makes a network that computes what
the trained one does; the other names are its pieces.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnnbook.binarize import (
    approx_sign,
    function_of,
    sign,
    ste_sign,
    stochastic_sign,
    swish_sign,
)
from bnnbook.layers import (
    DEPTH,
    GEOMETRY,
    QUANTIZED,
    BinaryConv2d,
    BinaryLayer,
    BinaryLinear,
    ExpertBinaryConv2d,
    channel_means,
    replace_parts,
)

WORD = 64  # bits
SIGNS = (sign, ste_sign, approx_sign, swish_sign)  # quantizers whose forward pass is the sign
BLOCK = 2**15  # words compared at a time: 256 KiB, so that they stay in the cache
GPU_BLOCK = 2**24  # on a GPU, for which each part is some twenty launches
MULTIPLY = ("bits", "floats")

# --- Words -------------------------------------------------------------------------------------


def pack(x: Tensor) -> Tensor:
    r"""Return the signs along the last dimension as bits: 1 where :math:`x \ge 0`, else 0.

    x of shape (..., n) gives int64 words of shape (..., ceil(n / 64)). The sign of element i is
    bit i mod 64 of word i div 64, counted from the least significant one (on a little-endian
    machine, as nearly all are); the bits beyond n are 0. A tensor of bool is taken as bits
    already; NaN, which has no sign, gives 0. Raises ValueError for a tensor without elements along
    its last dimension.

    >>> pack(torch.tensor([0.3, -2.0, 0.0, -0.1, 1.0]))  # 1 + 4 + 16
    tensor([21])
    """
    if x.dim() < 1 or not x.shape[-1]:
        raise ValueError("there is nothing to pack along the last dimension "
                         f"of {tuple(x.shape)}")  # fmt: skip
    bits = x if x.dtype == torch.bool else x >= 0
    bits = F.pad(bits.to(torch.uint8), (0, -x.shape[-1] % WORD))
    places = torch.arange(8, dtype=torch.uint8, device=x.device)
    # eight bits to a byte, then eight bytes read as a word
    octets = (bits.unflatten(-1, (-1, 8)) << places).sum(-1, dtype=torch.uint8)
    if torch.compiler.is_compiling():  # to strides that view does not take
        shifts = torch.arange(0, WORD, 8, device=x.device)
        return (octets.unflatten(-1, (-1, 8)).long() << shifts).sum(-1)
    return octets.view(torch.int64)


def unpack(words: Tensor, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the n signs in words of shape (..., ceil(n / 64)), as ±1 of shape (..., n).

    Raises ValueError if n signs take another number of words, and for a ``dtype`` without -1.

    >>> unpack(torch.tensor([21]), 5)
    tensor([ 1., -1.,  1., -1.,  1.])
    """
    _check_words(words, n)
    if not dtype.is_signed:
        raise ValueError(f"{dtype} has no -1: choose a signed type, such as torch.int8")
    places = torch.arange(8, dtype=torch.uint8, device=words.device)
    bits = (words.contiguous().view(torch.uint8)[..., None] >> places) & 1
    return 2 * bits.flatten(-2)[..., :n].to(dtype) - 1


def popcount(words: Tensor) -> Tensor:
    """Return how many bits of each int64 word are 1, by adding bits, pairs, nibbles and bytes.

    >>> popcount(torch.tensor([0, 21, -1]))
    tensor([ 0,  3, 64])
    """
    # >> copies the highest bit; every mask has a 0 where the copy could show
    x = words - ((words >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    return (x + (x >> 32)) & 0x7F


def xnor_product(a: Tensor, b: Tensor, n: int, valid: Tensor | None = None) -> Tensor:
    r"""Return the products of packed rows: :math:`n - 2 \operatorname{popcount}(a \oplus b)`.

    a: words of shape (..., ceil(n / 64)), as `pack` returns them.
    b: words of shape (rows, ceil(n / 64)).
    valid: words that broadcast to the shape of a. With bit 0 an element of a counts as 0, as on a
    zero-padded border; bits beyond n have no effect.

    The result, int64 of shape (..., rows), is what the ±1 behind the words give,
    :math:`\sum_i a_i b_i`: a product is -1 where the signs differ, else +1. With v = ``valid`` it
    is :math:`\operatorname{popcount}(v) - 2 \operatorname{popcount}((a \oplus b) \wedge v)`.

    Raises TypeError for words that are not int64 and ValueError if n signs take another number of
    words. (The identity is that of binarized neural networks, Courbariaux et al., 2016.)

    >>> a = torch.tensor([1.0, -1.0, 1.0])
    >>> b = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 1.0]])
    >>> xnor_product(pack(a), pack(b), 3)
    tensor([1, 3])
    """
    for words in (a, b):
        _check_words(words, n)
    if b.dim() != 2:
        raise ValueError(f"b must be (rows, words), not {tuple(b.shape)}")
    rows = a.reshape(-1, a.shape[-1])
    masks = None if valid is None else _up_to(n, valid).expand_as(a).reshape(rows.shape)
    block = GPU_BLOCK if b.is_cuda else BLOCK
    step = max(1, block // max(1, b.numel()))
    parts = [_products(rows[i : i + step], b, n, None if masks is None else masks[i : i + step])
             for i in range(0, len(rows), step)]  # fmt: skip
    products = torch.cat(parts) if parts else rows.new_empty(0, len(b))
    return products.reshape(*a.shape[:-1], len(b))


def _up_to(n: int, valid: Tensor) -> Tensor:
    """Return the words with 0 in the bits beyond n."""
    if valid.dtype != torch.int64:
        raise TypeError(f"packed words are int64, not {valid.dtype}")
    return valid & pack(torch.ones(n, dtype=torch.bool, device=valid.device))


def _products(a: Tensor, b: Tensor, n: int, valid: Tensor | None) -> Tensor:
    """Return the products of all rows of a with all rows of b at once."""
    differ = a[:, None] ^ b
    if valid is None:
        return n - 2 * popcount(differ).sum(-1)
    counted = popcount(valid).sum(-1, keepdim=True)
    return counted - 2 * popcount(differ & valid[:, None]).sum(-1)


def _check_words(words: Tensor, n: int) -> None:
    if words.dtype != torch.int64:
        raise TypeError(f"packed words are int64, not {words.dtype}")
    if n < 1 or words.dim() < 1 or words.shape[-1] != -(-n // WORD):
        raise ValueError(f"{n} signs take {-(-n // WORD)} words of {WORD} bits along the last "
                         f"dimension, not {tuple(words.shape)}")  # fmt: skip


# --- Layers ------------------------------------------------------------------------------------


class Packed(nn.Module):
    r"""Base class of packed layers: a binary layer's weights as bits, and the reals beside them.

    ``words`` has a row of bits for each output channel. ``scale``, None or one number c for each
    channel, is what the weight quantizer multiplies the sign by, and ``bias`` that of the layer:

    .. math:: y = c \cdot k + b, \qquad k = n - 2 \operatorname{popcount}(a \oplus w)

    k is an integer. Without scale and bias, y is therefore exactly what the float layer returns
    while its n products are added up in a type in which that sum is exact: below
    :math:`2^{24}` in float32. With a scale, the float layer rounds in every addition, and y once.
    Scales that are all 1 are left out, unless the quantizer is a module with parameters: it may
    learn them.

    ``binary_input`` says whether the layer multiplies bits: only if its ``input_quantizer`` is a
    sign, of the library or a function that gives the same on a grid of numbers. Any other input is
    multiplied with the weights, unpacked each time, in the same call as before: that saves stored
    bytes and no operation.

    Raises ValueError if the weight quantizer draws at random, or gives an output channel weights
    of several magnitudes.
    """

    def __init__(self, layer: BinaryLayer):
        super().__init__()
        rows, scale = _signs_and_scale(layer)
        self.n = rows[0].numel()
        self.shape = rows.shape
        self.binary_input = _is_sign(layer.input_quantizer, layer.weight)
        self.input_quantizer = layer.input_quantizer
        self.register_buffer("words", pack(rows.flatten(1)))
        self.register_buffer("scale", scale)
        bias = None if layer.bias is None else layer.bias.detach().clone()
        self.register_buffer("bias", bias)

    def unpacked(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights that the layer was made from: ±1, times the scale."""
        weight = unpack(self.words, self.n, dtype).view(self.shape)
        if self.scale is None:
            return weight
        return weight * self.scale.to(dtype).view(-1, *[1] * (weight.dim() - 1))

    def real(self, products: Tensor, dtype: torch.dtype) -> Tensor:
        """Return c · k + b for integer products k of shape (..., out)."""
        y = products.to(dtype)
        y = y if self.scale is None else y * self.scale.to(dtype)
        return y if self.bias is None else y + self.bias.to(dtype)

    def _real_input(self, x: Tensor) -> Tensor:
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def extra_repr(self) -> str:
        """Name the shape of the weights and the kind of input in what torch prints."""
        kind = "binary" if self.binary_input else "real"
        return f"{tuple(self.shape)}, {kind} input" + ", scaled" * (self.scale is not None)


def _signs_and_scale(layer: BinaryLayer) -> tuple[Tensor, Tensor | None]:
    """Return a layer's binary weights, and its channels' scales unless they stay 1."""
    quantizer = function_of(layer.weight_quantizer)
    draws = quantizer is stochastic_sign
    with _undrawn(layer.weight):
        weight = layer.weight if draws else layer.binary_weight().detach()
        draws = draws or not weight.equal(layer.binary_weight())
    if draws:
        raise ValueError("the weight quantizer draws new weights each time; choose which to pack, "
                         "for example with layers.quantized_by(model, ste_sign)")  # fmt: skip
    magnitudes = weight.abs().flatten(1)
    scale = magnitudes[:, 0].clone()
    if not (magnitudes == scale[:, None]).all():
        raise ValueError("the weight quantizer gives one output channel weights of several "
                         "magnitudes; only signs, and one scale a channel, can be packed"
                         )  # fmt: skip
    learned = list(quantizer.parameters()) if isinstance(quantizer, nn.Module) else []
    return weight, None if (scale == 1).all() and not learned else scale


def _is_sign(quantizer: Callable | None, weight: Tensor) -> bool:
    """Return whether a quantizer of inputs is the sign; weight: gives the dtype and the device."""
    if function_of(quantizer) in SIGNS:
        return True
    # one with a state may become another function when that is loaded
    stateful = isinstance(quantizer, nn.Module) and quantizer.state_dict()
    if quantizer is None or stateful or function_of(quantizer) is stochastic_sign:
        return False
    ends = torch.finfo(weight.dtype)
    extremes = weight.new_tensor([0.0, -0.0, ends.tiny, -ends.tiny, ends.max, ends.min])
    # the many numbers in between are for quantizers that draw
    between = torch.linspace(-2, 3, 4096, device="cpu").to(weight)
    grid = torch.cat([extremes, between]).expand(2, -1)
    with _undrawn(weight):
        try:
            return quantizer(grid).equal(sign(grid))
        except Exception:  # whatever one's own function does not accept
            return False


@contextmanager
def _undrawn(weight: Tensor):
    """Inside a with block, leave no gradients and no draws of torch's generators behind."""
    devices = [weight.device] if weight.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        yield


def _check_maps(x: Tensor, channels: int) -> None:
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"the input must be (N, {channels}, H, W), not {tuple(x.shape)}")


class PackedLinear(Packed):
    """A `BinaryLinear` with packed weights; see `Packed` for what it computes and how exactly.

    Input (..., in_features), output (..., out_features). Raises ValueError for another input.

    >>> layer = BinaryLinear(100, 3, input_quantizer=ste_sign)
    >>> x = torch.randn(7, 100)
    >>> torch.equal(PackedLinear(layer)(x), layer(x))
    True
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the product for x of shape (..., in_features)."""
        if not x.dim() or x.shape[-1] != self.n:
            raise ValueError(f"the input must be (..., {self.n}), not {tuple(x.shape)}")
        if not self.binary_input:
            return F.linear(self._real_input(x), self.unpacked(x.dtype), self.bias)
        return self.real(xnor_product(pack(x), self.words, self.n), x.dtype)


class PackedConv2d(Packed):
    """A `BinaryConv2d` with packed weights; see `Packed` for what it computes and how exactly.

    Input (N, in_channels, H, W), output (N, out_channels, H', W'). Strides, dilations, groups and
    all paddings are those of the layer; on a border padded with 0 the masked product of
    `xnor_product` counts only what lies inside the image. The output has its channels last in
    memory where torch's would: if those of the layer's weight (``layout``) or of the input are.
    Raises ValueError for another input.
    """

    def __init__(self, layer: BinaryConv2d):
        super().__init__(layer)
        for name in ("in_channels", "kernel_size", *GEOMETRY, "padding_value",
                     "_reversed_padding_repeated_twice"):  # fmt: skip
            setattr(self, name, getattr(layer, name))
        self.layout = _layout(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution for x of shape (N, in_channels, H, W)."""
        _check_maps(x, self.in_channels)
        if not self.binary_input:
            return self._convolve_real(self._real_input(x))
        patches, valid = pack(self.patches(self._padded(x))), self.valid(x)
        kernels = self.words.unflatten(0, (self.groups, -1))
        products = [xnor_product(patches[..., group, :], kernel, self.n, valid)
                    for group, kernel in enumerate(kernels)]  # fmt: skip
        y = self.real(torch.cat(products, -1), x.dtype)
        # because torch rounds real sums by other code where channels lie last
        last = torch.channels_last in (self.layout, _layout(x))
        layout = torch.channels_last if last else torch.contiguous_format
        return y.permute(0, 3, 1, 2).contiguous(memory_format=layout)

    def _convolve_real(self, x: Tensor) -> Tensor:
        weight = self.unpacked(x.dtype).contiguous(memory_format=self.layout)
        return BinaryConv2d._convolve(self, x, weight, self.bias, self.groups)

    def patches(self, x: Tensor) -> Tensor:
        """Return what the kernels see of a padded map: (N, H', W', groups, elements)."""
        for dim in (2, 3):
            size, gap = self.kernel_size[dim - 2], self.dilation[dim - 2]
            x = x.unfold(dim, gap * (size - 1) + 1, self.stride[dim - 2])[..., ::gap]
        return x.unflatten(1, (self.groups, -1)).permute(0, 3, 4, 1, 2, 5, 6).flatten(4)

    def valid(self, x: Tensor) -> Tensor | None:
        """Return words with bit 0 where a kernel lies on the zero border; None without one."""
        border = self._reversed_padding_repeated_twice
        if not any(border) or self.padding_value or self.padding_mode != "zeros":
            return None
        inside = F.pad(torch.ones_like(x[:1], dtype=torch.uint8), border) > 0
        return pack(self.patches(inside)[..., 0, :])

    def _padded(self, x: Tensor) -> Tensor:
        """Return the padded map of x; only its signs matter."""
        border = self._reversed_padding_repeated_twice
        if self.padding_mode == "zeros":
            return F.pad(x, border, value=self.padding_value) >= 0
        return F.pad(x, border, self.padding_mode) >= 0


def _layout(x: Tensor) -> torch.memory_format:
    """Return how a 4-D tensor lies in memory; what is ambiguous counts as contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


class PackedExpertConv2d(nn.Module):
    """An `ExpertBinaryConv2d` with packed kernels, each a `PackedConv2d`; the gate stays real.

    Input (N, in_channels, H, W), output (N, out_channels, H', W'). Raises ValueError as they do.
    """

    def __init__(self, layer: ExpertBinaryConv2d):
        super().__init__()
        self.gate = copy.deepcopy(layer.gate)
        self.experts = nn.ModuleList(PackedConv2d(_expert(layer, k)) for k in range(layer.experts))

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of each sample with the kernel that its gate chooses."""
        _check_maps(x, self.gate.in_features)
        chosen = self.gate(channel_means(x)).argmax(1).tolist()
        pairs = zip(chosen or [0], x.split(1), strict=True)  # no samples: any kernel will do
        return torch.cat([self.experts[k](sample) for k, sample in pairs])


def _expert(layer: ExpertBinaryConv2d, number: int) -> BinaryConv2d:
    """Return one expert of a layer as a convolution of its own."""
    options = {name: getattr(layer, name) for name in (*GEOMETRY, "padding_value", *QUANTIZED)}
    options["device"] = "meta"  # neither memory nor draws
    one = BinaryConv2d(layer.in_channels, layer.out_channels, layer.kernel_size, **options)
    one.weight, one.bias = nn.Parameter(layer.weight[number].detach()), layer.bias
    return one


# --- Normalisation and sign --------------------------------------------------------------------


def thresholds(function: Callable, n: int, shape, device=None) -> tuple[Tensor, Tensor]:
    r"""Return what stands for the sign of a function of an integer: a threshold, a direction.

    function: what lies between a sum of n products and the next sign, channel by channel, such as
    batch normalisation in evaluation mode. shape: that of one sample for it, channels first:
    (channels,) after a linear layer, (channels, 1, 1) after a convolution. device: the function's;
    torch's default device if not given.

    Returns t (int64) and ``rising`` (bool), both of shape (channels,), such that for every integer
    k from -n to n and every channel

    .. math:: f(k) \ge 0 \iff k \ge t \text{ if rising, else } k \le t .

    A channel whose sign never changes is rising, with t = -n or n + 1. For batch normalisation the
    formula is :math:`t = \mu - \beta \sqrt{\sigma^2 + \epsilon} / \gamma`, rounded up or, for
    :math:`\gamma < 0`, down. Here the function is evaluated on all integers instead, in batches
    of shape (N, channels, ...), so that t is right for its rounded arithmetic too. Raises
    ValueError if a sign changes more than once.

    >>> norm = nn.BatchNorm1d(2).eval()
    >>> norm.running_mean = torch.tensor([0.5, 0.5])
    >>> norm.weight.data = torch.tensor([1.0, -1.0])
    >>> thresholds(norm, 3, (2,))
    (tensor([1, 0]), tensor([ True, False]))
    """
    k = torch.arange(-n, n + 1, device=device)
    maps = k.float().view(-1, *[1] * len(shape))
    with torch.no_grad():  # in blocks, because all sums of a wide layer may take a gigabyte
        parts = maps.split(max(1, 2 * BLOCK // math.prod(shape)))
        positive = torch.cat([function(part.repeat(1, *shape)).flatten(1) >= 0 for part in parts])
    rising = positive[-1] | ~positive[0]
    count = positive.sum(0)
    t = torch.where(rising, n + 1 - count, count - n - 1)
    if not torch.equal(_compare(k[:, None], t, rising), positive):
        raise ValueError("the function's sign changes more than once between "
                         f"{-n} and {n}: no threshold can stand for it")  # fmt: skip
    return t, rising


def _compare(k: Tensor, threshold: Tensor, rising: Tensor) -> Tensor:
    return torch.where(rising, k >= threshold, k <= threshold)


class Threshold(nn.Module):
    """Compare an integer with its channel's threshold, in place of normalisation and sign.

    ``threshold`` and ``rising`` are what `thresholds` returns. Input (N, channels, ...), integers
    in any floating-point type; output ±1 in that type.
    """

    def __init__(self, threshold: Tensor, rising: Tensor):
        super().__init__()
        self.register_buffer("threshold", threshold.int())
        self.register_buffer("rising", rising)

    def forward(self, x: Tensor) -> Tensor:
        """Return +1 where the comparison holds and -1 elsewhere."""
        shape = -1, *[1] * (x.dim() - 2)
        # in half precision the threshold would be rounded
        k = x.to(torch.promote_types(x.dtype, torch.float32))
        above = _compare(k, self.threshold.view(shape), self.rising.view(shape))
        return 2 * above.to(x.dtype) - 1

    def extra_repr(self) -> str:
        """Count channels, and those that fall, in what torch prints."""
        return f"{len(self.rising)} channels, {int((~self.rising).sum())} falling"


# --- Networks ----------------------------------------------------------------------------------

PACKED = {BinaryLinear: PackedLinear, BinaryConv2d: PackedConv2d,
          ExpertBinaryConv2d: PackedExpertConv2d}  # fmt: skip
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# Both let an order of integers pass, and channels stay channels.
MONOTONE = (nn.Identity, nn.Dropout, nn.MaxPool2d)


def pack_network(model: nn.Module, *, multiply: str = "bits") -> nn.Module:
    """Return a copy for inference whose binary weights are bits, in evaluation mode.

    Each binary layer becomes its counterpart in `PACKED`. In a `torch.nn.Sequential`, batch
    normalisation between two layers that multiply bits becomes a `Threshold`; max-pooling may
    stand before it. It does not behind a linear layer with a scale or a bias, whose inputs may
    have more than two dimensions, behind a layer that is used or listed more than once, and where
    a layer with a scale or a bias has another dtype than the normalisation. All other modules stay
    as they are, among them modules with hooks or a forward of their own, subclasses of binary
    layers and of normalisations, and layers that `Packed` refuses: `real_layers` names what still
    holds real numbers. A Sequential must be called as a whole: a model that calls slices of it
    gets thresholds for some and not for other parts.

    multiply: "bits" compares words; "floats" multiplies signs as before, unpacked each time, which
    stores the same bytes and is many times faster where torch has fast convolutions.

    To load a saved ``state_dict``, pack a new network of the same constructor and load it there;
    ``multiply`` is that of the new one. A scale that a weight quantizer learns must be a parameter
    of it. Raises ValueError for an unknown ``multiply``.

    >>> from bnnbook.models import binarynet
    >>> net = binarynet(widths=(8,), hidden=(16,), in_channels=1, image_size=8).eval()
    >>> x = torch.randn(5, 1, 8, 8)
    >>> torch.equal(pack_network(net)(x), net(x))
    True
    """
    if multiply not in MULTIPLY:
        raise ValueError(f"unknown multiply {multiply!r}; known: {', '.join(MULTIPLY)}")
    holder = nn.ModuleList([copy.deepcopy(model).eval()])  # the model's parent
    layers = [module for module in holder.modules() if type(module) in PACKED]
    replace_parts(holder, {layer: _packed_if_possible(layer) for layer in layers})
    modules = list(holder.modules())
    shared = _shared(modules)
    for parent in modules:
        if type(parent).forward is nn.Sequential.forward and "forward" not in vars(parent):
            _fold(parent, shared)
    for module in holder.modules() if multiply == "floats" else ():
        if isinstance(module, Packed):
            module.binary_input = False  # after the thresholds, which integers need
    return holder[0]


def _shared(modules: list[nn.Module]) -> set[int]:
    """Return the ids of the parts that stand in more than one place of these modules."""
    places = Counter(id(part) for module in modules for part in _held(vars(module)))
    return {key for key, count in places.items() if count > 1}


def _held(value, depth: int = DEPTH) -> Iterator[nn.Module]:
    """Yield the modules in a value, as deep in lists and dicts as `replace_parts` looks."""
    if isinstance(value, nn.Module):
        yield value
    elif depth and isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _held(part, depth - 1)


def _packed_if_possible(layer: BinaryLayer) -> nn.Module:
    try:
        return PACKED[type(layer)](layer).eval() if _is_plain(layer) else layer
    except ValueError:
        return layer


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module computes what its class does: no hooks, no forward of its own."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not hooks and "forward" not in vars(module)


def _fold(sequence: nn.Sequential, shared: set[int]) -> None:
    """Replace each normalisation between packed layers with binary inputs by its thresholds.

    ``shared``: ids of layers that are used more than once, which must keep what they compute.
    """
    layers = list(sequence)
    for index, norm in enumerate(layers):
        before = _next(layers[:index][::-1], MONOTONE)
        after = _next(layers[index + 1 :], (*MONOTONE, nn.Flatten))
        foldable = _multiplies_bits(before) and _multiplies_bits(after) and _is_fixed(norm)
        if foldable and (_has_integers(before) or _can_give_up_reals(before, norm, shared)):
            sequence[index] = _threshold(before, norm).eval()
            before.scale = before.bias = None  # they are in the threshold now


def _has_integers(layer: Packed) -> bool:
    return layer.scale is None and layer.bias is None


def _can_give_up_reals(layer: Packed, norm: nn.Module, shared: set[int]) -> bool:
    """Return whether the layer's scale and bias can be left to the thresholds behind it."""
    reals = [part for part in (layer.scale, layer.bias) if part is not None]
    alike = all(part.dtype == norm.running_mean.dtype for part in reals)
    return isinstance(layer, PackedConv2d) and alike and id(layer) not in shared


def _next(layers: list[nn.Module], passing: tuple) -> nn.Module | None:
    """Return the first layer that is not exactly one of the passing kinds."""
    # a subclass may compute something else
    stops = (layer for layer in layers if type(layer) not in passing or not _is_plain(layer))
    return next(stops, None)


def _is_fixed(norm: nn.Module) -> bool:
    """Return whether this is batch normalisation with statistics of its own."""
    kind = nn.utils.parametrize.type_before_parametrizations(norm)
    return kind in NORMS and norm.running_mean is not None and _is_plain(norm)


def _multiplies_bits(layer: nn.Module | None) -> bool:
    return isinstance(layer, Packed) and layer.binary_input


def _threshold(layer: Packed, norm: nn.Module) -> Threshold:
    """Return the thresholds of a packed layer's scale and bias and the norm behind it."""
    shape = [norm.num_features] + [1, 1] * isinstance(norm, nn.BatchNorm2d)
    mean = norm.running_mean

    def function(k):
        y = layer.real(k.to(mean.dtype).movedim(1, -1), mean.dtype)
        return norm(y.movedim(-1, 1))

    return Threshold(*thresholds(function, layer.n, shape, mean.device))


def real_layers(model: nn.Module) -> dict[str, int]:
    """Return the modules that keep real numbers, by name, with the bytes these take when stored.

    What counts are the floating-point entries of the ``state_dict``: not words and thresholds.

    >>> real_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    {'0': 36}
    """
    found: dict[str, int] = {}
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            name = key.rpartition(".")[0]
            found[name] = found.get(name, 0) + tensor.nbytes
    return found
