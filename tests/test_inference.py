"""One-bit inference: bits and thresholds give what the float network gives."""

import itertools
from functools import partial

import numpy as np
import pytest
import reference
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bnnbook import binarize, data, inference, layers, training
from bnnbook.binarize import ste_sign
from bnnbook.inference import pack, pack_network, popcount, thresholds, unpack, xnor_product
from bnnbook.models import binaryconnect_mlp, binarynet, birealnet20, expertnet, reactnet_small

LENGTHS = (1, 2, 7, 63, 64, 65, 100, 127, 128, 129, 192, 1000)
BOTH = {"weight_quantizer": ste_sign, "input_quantizer": ste_sign}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def as_int64(words: list[int]) -> list[int]:
    return [word - 2**64 if word >= 2**63 else word for word in words]


# --- Words -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", LENGTHS)
def test_words_are_those_of_the_literal_loop(n):
    x = torch.randn(3, n)
    x[0, ::3] = 0.0
    x[1, ::2] = -0.0
    assert pack(x).tolist() == [as_int64(reference.pack(row)) for row in x.tolist()]
    assert pack(x >= 0).equal(pack(x))


@pytest.mark.parametrize("n", LENGTHS)
def test_unpack_returns_the_signs(n):
    x = torch.randn(2, 3, n)
    assert unpack(pack(x), n).equal(binarize.sign(x))
    assert unpack(pack(x), n, torch.float64).dtype == torch.float64


def test_a_slice_of_words_is_unpacked_as_well():
    x = torch.randn(5, 200)
    words = pack(x)
    assert unpack(words[:, :2], 128).equal(binarize.sign(x[:, :128]))


def test_popcount_counts_every_bit():
    single = torch.tensor([1 << i for i in range(63)] + [-(2**63)])
    assert popcount(single).tolist() == [1] * 64
    words = torch.randint(-(2**63), 2**63 - 1, (2000,))
    ends = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    for each in (words, ends):
        assert popcount(each).tolist() == [(w % 2**64).bit_count() for w in each.tolist()]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("rows", ["random", "all +1", "all -1"])
def test_products_are_those_of_the_signs(n, rows):
    fill = {"random": torch.randn, "all +1": torch.ones, "all -1": lambda *s: -torch.ones(s)}
    a, b = torch.randn(2, 4, n), fill[rows](5, n)
    a[0, 0], a[0, 1] = 1, -1
    found = xnor_product(pack(a), pack(b), n)
    assert found.dtype == torch.int64
    assert found.equal((binarize.sign(a).double() @ binarize.sign(b).double().T).long())
    literal = [[reference.xnor_product(reference.pack(x), reference.pack(y), n) for y in b]
               for x in a.flatten(0, 1)]  # fmt: skip
    assert found.flatten(0, 1).tolist() == literal


@pytest.mark.parametrize("n", [1, 63, 65, 200])
def test_masked_elements_count_as_zero(n):
    a, b, mask = torch.randn(6, n), torch.randn(5, n), torch.rand(6, n) < 0.6
    mask[0], mask[1] = False, True
    expected = (binarize.sign(a) * mask) @ binarize.sign(b).T
    assert xnor_product(pack(a), pack(b), n, pack(mask)).equal(expected.long())
    expected = (binarize.sign(a) * mask[0]) @ binarize.sign(b).T
    assert xnor_product(pack(a), pack(b), n, pack(mask[0])).equal(expected.long())


@pytest.mark.parametrize("n", [63, 64, 70])
def test_bits_beyond_n_are_not_counted(n):
    a, b = torch.randn(6, n), torch.randn(5, n)
    everything = torch.tensor([-1])  # 64 bits, in each word
    assert xnor_product(pack(a), pack(b), n, everything).equal(xnor_product(pack(a), pack(b), n))


def test_products_in_blocks_are_those_at_once(monkeypatch):
    a, b, mask = torch.randn(37, 130), torch.randn(5, 130), torch.rand(37, 130) < 0.5
    whole = xnor_product(pack(a), pack(b), 130, pack(mask))
    monkeypatch.setattr(inference, "BLOCK", 100)
    assert xnor_product(pack(a), pack(b), 130, pack(mask)).equal(whole)
    assert xnor_product(pack(a[:0]), pack(b), 130).shape == (0, 5)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: pack(torch.zeros(3, 0)), ValueError, "nothing to pack"),
    (lambda: pack(torch.tensor(1.0)), ValueError, "nothing to pack"),
    (lambda: unpack(torch.zeros(2, dtype=torch.int64), 64), ValueError, "64 signs take 1 words"),
    (lambda: unpack(torch.zeros(1, dtype=torch.int64), 65), ValueError, "65 signs take 2 words"),
    (lambda: unpack(torch.zeros(1), 64), TypeError, "int64, not torch.float32"),
    (lambda: xnor_product(pack(torch.ones(2, 70)), pack(torch.ones(3, 60)), 70), ValueError,
     "70 signs take 2 words"),
    (lambda: xnor_product(pack(torch.ones(70)), pack(torch.ones(70)), 70), ValueError,
     "b must be"),
    (lambda: xnor_product(torch.ones(2, 2), pack(torch.ones(3, 70)), 70), TypeError, "int64"),
    (lambda: xnor_product(*[pack(torch.ones(3, 70))] * 2, 70, torch.tensor([True])), TypeError,
     "int64, not torch.bool"),
    (lambda: unpack(torch.tensor([21]), 5, torch.uint8), ValueError, "torch.uint8 has no -1"),
    (lambda: unpack(torch.tensor([21]), 5, torch.bool), ValueError, "torch.bool has no -1"),
])  # fmt: skip
def test_wrong_words_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- Layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", LENGTHS)
def test_a_packed_linear_layer_is_the_float_one(n):
    layer = layers.BinaryLinear(n, 5, **BOTH)
    for shape in ((4, n), (n,), (2, 3, n)):
        x = torch.randn(shape)
        assert inference.PackedLinear(layer)(x).equal(layer(x))


GEOMETRIES = [
    dict(zip(("stride", "padding", "dilation", "groups"), each, strict=True))
    for each in itertools.product((1, 2, 3), (0, 1, 2), (1, 2), (1, 2, 4))
]


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_a_packed_convolution_is_the_float_one(options):
    layer = layers.BinaryConv2d(8, 12, 3, **options, **BOTH)
    x = torch.randn(2, 8, 9, 7)
    assert inference.PackedConv2d(layer)(x).equal(layer(x))


@pytest.mark.parametrize("options", GEOMETRIES[::7], ids=str)
def test_a_packed_convolution_is_the_literal_loop(options):
    layer = layers.BinaryConv2d(4, 4, (3, 2), **options, **BOTH)
    x = torch.randn(4, 6, 7)
    literal = reference.binary_convolution(x.numpy(), layer.weight.detach().numpy(), **options)
    found = inference.PackedConv2d(layer)(x[None])[0]
    assert np.array_equal(found.numpy(), literal)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch, of even kernels
@pytest.mark.parametrize("channels", [1, 7, 8, 63, 64, 65])
@pytest.mark.parametrize("padding", [0, (2, 1), "same", "valid"])
def test_channels_and_paddings_of_any_number(channels, padding):
    layer = layers.BinaryConv2d(channels, 3, (4, 3), padding=padding, **BOTH)
    x = torch.randn(2, channels, 6, 5)
    with torch.no_grad():
        assert inference.PackedConv2d(layer)(x).equal(layer(x))


@pytest.mark.parametrize("options", [
    {"padding_value": 1}, {"padding_value": -1}, {"padding_mode": "reflect"},
    {"padding_mode": "replicate"}, {"padding_mode": "circular"},
], ids=str)  # fmt: skip
def test_a_border_of_signs_is_multiplied_like_the_rest(options):
    layer = layers.BinaryConv2d(5, 6, 3, padding=(2, 1), **options, **BOTH)
    x = torch.randn(2, 5, 6, 7)
    assert inference.PackedConv2d(layer)(x).equal(layer(x))


@pytest.mark.parametrize("inputs", [1.0, -1.0])
@pytest.mark.parametrize("weights", [1.0, -1.0])
def test_extremes(inputs, weights):
    linear, conv = layers.BinaryLinear(130, 4, **BOTH), layers.BinaryConv2d(9, 4, 3, **BOTH)
    for layer, shape in ((linear, (2, 130)), (conv, (2, 9, 4, 4))):
        nn.init.constant_(layer.weight, weights)
        found = pack_network(layer)(torch.full(shape, inputs))
        assert found.unique().tolist() == [inputs * weights * layer.weight[0].numel()]


WEIGHTS = {
    "None": None,
    "sign": binarize.sign,
    "ste_sign": ste_sign,
    "ste_sign, unclipped": partial(ste_sign, clip_value=None),
    "approx_sign": binarize.approx_sign,
    "swish_sign": partial(binarize.swish_sign, beta=3.0),
    "dorefa_weight, one bit": binarize.dorefa_weight,
}
INPUTS = (binarize.sign, ste_sign, partial(ste_sign, clip_value=2.0), binarize.approx_sign,
          binarize.swish_sign)  # fmt: skip


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_every_quantizer_to_one_bit(weights, inputs):
    both = {"weight_quantizer": weights, "input_quantizer": inputs}
    linear = layers.BinaryLinear(70, 5, **both)
    conv = layers.BinaryConv2d(3, 5, 3, padding=1, **both)
    for layer, x in ((linear, torch.randn(4, 70)), (conv, torch.randn(4, 3, 5, 5))):
        with torch.no_grad():
            layer.weight.flatten()[:2] = 1.0 if weights is None else 0.0
            x.view(-1)[:3] = torch.tensor([0.0, -0.0, 1e-30])
        packed = pack_network(layer)
        assert packed.binary_input
        assert packed.scale is None
        assert packed.unpacked().equal(layer.binary_weight())
        assert packed(x).equal(layer(x))


@pytest.mark.parametrize("shape", [(70,), (3, 5, 5)])
def test_a_scale_stays_real_and_is_rounded_once(shape):
    both = {"weight_quantizer": binarize.magnitude_aware_sign, "input_quantizer": ste_sign}
    layer = (layers.BinaryLinear(70, 5, **both) if len(shape) == 1
             else layers.BinaryConv2d(3, 5, 3, padding=1, **both))  # fmt: skip
    with torch.no_grad():
        layer.weight[0] = 0.0  # its scale is 0
    x, packed = torch.randn(40, *shape), pack_network(layer)
    assert packed.unpacked().equal(layer.binary_weight())
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-5)
    unscaled = pack_network(layer)
    unscaled.scale = None
    channels = (1, -1) + (1,) * (len(shape) - 1)
    # a product of an integer and a float32 number is exact in float64, and is rounded once here
    rounded = (unscaled(x).double() * packed.scale.double().view(channels)).float()
    assert packed(x).equal(rounded)


REAL_INPUTS = (None, binarize.dorefa_activation, binarize.magnitude_aware_sign, torch.relu)


@pytest.mark.parametrize("inputs", REAL_INPUTS)
@pytest.mark.parametrize("weights", [ste_sign, binarize.magnitude_aware_sign])
def test_inputs_of_more_values_are_multiplied_as_before(inputs, weights):
    both = {"weight_quantizer": weights, "input_quantizer": inputs, "bias": True}
    linear = layers.BinaryLinear(70, 5, **both)
    conv = layers.BinaryConv2d(4, 6, 3, padding=1, groups=2, padding_mode="reflect", **both)
    for layer, x in ((linear, torch.randn(4, 70)), (conv, torch.randn(4, 4, 5, 5))):
        nn.init.normal_(layer.bias)
        packed = pack_network(layer)
        assert not packed.binary_input
        assert packed(x).equal(layer(x))


def test_a_bias_is_added_to_the_integers():
    layer = layers.BinaryLinear(100, 5, bias=True, **BOTH)
    layer.bias.data = torch.tensor([0.5, -3.0, 0.0, 1e-3, 100.0])
    x = torch.randn(20, 100)
    integers = inference.PackedLinear(layers.BinaryLinear(100, 5, **BOTH))
    integers.words = inference.PackedLinear(layer).words
    assert inference.PackedLinear(layer)(x).equal(integers(x) + layer.bias)
    torch.testing.assert_close(inference.PackedLinear(layer)(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types(dtype):
    layer = layers.BinaryLinear(100, 5, **BOTH).to(dtype)
    x = torch.randn(6, 100, dtype=dtype)
    found = pack_network(layer)(x)
    assert found.dtype == dtype
    assert found.equal(layer(x))


@pytest.mark.parametrize(("quantizer", "message"), [
    (binarize.stochastic_sign, "draws new weights"),
    (partial(binarize.stochastic_sign, generator=None), "draws new weights"),
    (lambda w: binarize.stochastic_sign(w), "draws new weights"),
    (binarize.real_weight, "several magnitudes"),
    (partial(binarize.dorefa_weight, bits=2), "several magnitudes"),
])  # fmt: skip
def test_weights_that_are_no_signs_are_refused_and_stay(quantizer, message):
    options = {"weight_quantizer": quantizer, "input_quantizer": ste_sign}
    for layer in (layers.BinaryLinear(20, 3, **options), layers.BinaryConv2d(2, 3, 3, **options)):
        draws = torch.get_rng_state()
        with pytest.raises(ValueError, match=message):
            (inference.PackedLinear if isinstance(layer, nn.Linear) else inference.PackedConv2d)(
                layer
            )
        packed = pack_network(nn.Sequential(layer))
        assert type(packed[0]) is type(layer)
        assert inference.real_layers(packed) == {"0": 4 * layer.weight.numel()}
        assert torch.get_rng_state().equal(draws)


def tanh_sign(x):
    soft = torch.tanh(2 * x)
    return binarize.sign(x) + (soft - soft.detach())


class Threshold(nn.Module):
    """A sign only as long as its threshold is 0, which a state_dict may change."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return ste_sign(x + self.shift)


@pytest.mark.parametrize(("quantizer", "is_sign"), [
    (tanh_sign, True),
    (lambda x: ste_sign(x), True),
    (lambda x: binarize.stochastic_sign(x), False),
    (lambda x: ste_sign(x - 1e-3), False),
    (lambda x: ste_sign(x - x.mean()), False),
    (lambda x: ste_sign(-x), False),
    (lambda x: x.sign_(), False),
    (torch.sign, False),  # of 0 is 0
    (nn.Hardtanh(), False),
    (lambda x: x.no_such_method(), False),
    (Threshold(), False),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_quantizer_of_ones_own_is_known_by_its_values(quantizer, is_sign, dtype):
    layer = layers.BinaryLinear(65, 3, input_quantizer=quantizer, dtype=dtype)
    draws = torch.get_rng_state()
    packed = inference.PackedLinear(layer)
    assert torch.get_rng_state().equal(draws)
    assert packed.binary_input == is_sign
    if is_sign:
        x = torch.randn(9, 65, dtype=dtype)
        assert packed(x).equal(layer(x))


@pytest.mark.parametrize(("layer", "shape"), [
    (layers.BinaryLinear(20, 3, **BOTH), (2, 21)),
    (layers.BinaryConv2d(2, 3, 3, **BOTH), (2, 3, 8, 8)),
    (layers.BinaryConv2d(2, 3, 3, **BOTH), (2, 8, 8)),
    (layers.ExpertBinaryConv2d(2, 3, 3, experts=2), (2, 8, 8)),
])  # fmt: skip
def test_inputs_of_another_shape_are_refused(layer, shape):
    with pytest.raises(ValueError, match="the input must be"):
        pack_network(layer)(torch.zeros(shape))


@pytest.mark.parametrize("options", [
    {}, {"weight_quantizer": None}, {"groups": 2, "stride": 2, "bias": False},
])  # fmt: skip
def test_the_gate_chooses_among_packed_experts(options):
    layer = layers.ExpertBinaryConv2d(4, 6, 3, experts=3, padding=1, **options)
    nn.init.normal_(layer.gate.weight, std=5)
    x = torch.randn(30, 4, 6, 6)
    assert len(layer.selected(x).unique()) == 3
    draws = torch.get_rng_state()
    packed = pack_network(layer)
    assert torch.get_rng_state().equal(draws)
    assert packed(x).equal(layer(x))
    assert list(inference.real_layers(packed)) == ["gate"]


# --- Normalisation and sign --------------------------------------------------------------------


def normalisation(channels: int, kind=nn.BatchNorm1d, eps=1e-3) -> nn.Module:
    """Batch normalisation of sums of about 100 products, with gains of both signs and 0."""
    norm = kind(channels, eps=eps).eval()
    norm.running_mean.normal_(0, 10)
    norm.running_var.uniform_(1, 200)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    with torch.no_grad():
        norm.weight[:6] = torch.tensor([0.0, 0.0, 0.0, -0.0, 1e-20, -1e-20])
        norm.bias[:6] = torch.tensor([1.0, -1.0, 0.0, 0.0, 1e-25, 0.0])
        norm.running_mean[6:20].round_()
        norm.bias[6:20] = 0.0  # an integer at which the function is exactly 0
        norm.running_var[20:30] = torch.logspace(-12, -3, 10)
        norm.running_var[30:34] = 0.0
        norm.bias[34:36] = torch.tensor([1e9, -1e9])  # never changes sign
    return norm


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
@pytest.mark.parametrize("n", [1, 64, 100, 1001])
def test_a_threshold_is_normalisation_and_sign_on_every_integer(kind, n):
    norm = normalisation(300, kind)
    shape = (300, 1, 1) if kind is nn.BatchNorm2d else (300,)
    t, rising = thresholds(norm, n, shape)
    falling = (~rising).sum()
    assert inference.Threshold(t, rising).extra_repr() == f"300 channels, {falling} falling"
    assert rising[norm.weight > 0.01].all()
    assert not rising[(norm.weight < -0.5) & (t.abs() < n)].any()
    k = torch.arange(-n, n + 1.0).view(-1, *[1] * len(shape)).repeat(1, *shape)
    expected = binarize.sign(norm(k))
    assert inference.Threshold(t, rising)(k).equal(expected)
    literal = [[1.0 if (j >= t[c] if rising[c] else j <= t[c]) else -1.0
                for c in range(0, 300, 7)] for j in range(-n, n + 1)]  # fmt: skip
    assert expected.flatten(1)[:, ::7].tolist() == literal
    assert ((t >= -n - 1) & (t <= n + 1)).all()


def test_thresholds_hold_for_maps_of_any_layout():
    """Torch normalises maps by other code than vectors; the signs must agree."""
    norm = normalisation(96, nn.BatchNorm2d)
    threshold = inference.Threshold(*thresholds(norm, 200, (96, 1, 1)))
    for size, layout in itertools.product((1, 3, 8), (torch.contiguous_format,
                                                      torch.channels_last)):  # fmt: skip
        k = torch.randint(-200, 201, (50, 96, size, size)).float().to(memory_format=layout)
        assert threshold(k).equal(binarize.sign(norm(k)))


def test_a_sign_that_changes_twice_has_no_threshold():
    with pytest.raises(ValueError, match="more than once"):
        thresholds(lambda k: k.square() - 4, 5, (2,))
    bent = nn.Sequential(nn.PReLU(2, init=-1.0))
    with pytest.raises(ValueError, match="more than once"):
        thresholds(lambda k: bent(k) - 1, 5, (2,))


# --- Networks ----------------------------------------------------------------------------------


def settled(model: nn.Module, shape) -> nn.Module:
    """The model with batch-norm statistics, gains and shifts as after some training."""
    for module in model.modules():
        if isinstance(module, inference.NORMS):
            module.momentum = None
            nn.init.normal_(module.bias)
            if isinstance(module.weight, nn.Parameter):
                nn.init.normal_(module.weight)
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.randn(32, *shape))
    return model.eval()


def small_binarynet(**options) -> nn.Module:
    return binarynet(widths=(16, 24), hidden=(70,), in_channels=1, image_size=8, **options)


@pytest.mark.parametrize("options", [
    {}, {"weight_quantizer": None}, {"padding": "same"}, {"padding_value": -1.0},
])  # fmt: skip
def test_a_packed_binarynet_has_the_same_logits_bit_for_bit(options):
    net = settled(small_binarynet(**options), (1, 8, 8))
    packed, x = pack_network(net), torch.randn(200, 1, 8, 8)
    assert packed(x).equal(net(x))
    kinds = [type(module) for module in packed]
    assert kinds.count(inference.Threshold) == 4
    assert list(inference.real_layers(packed)) == ["1", str(len(packed) - 1)]


@pytest.mark.parametrize(("model", "shape", "real"), [
    (partial(birealnet20, weight_quantizer=ste_sign, in_channels=1), (1, 8, 8), 23 + 3),
    (partial(reactnet_small, weight_quantizer=ste_sign, in_channels=1, channels=(8, 8, 16)),
     (1, 8, 8), None),
    (partial(expertnet, experts=2, expansion=2, groups=(2, 2, 2, 2), weight_quantizer=ste_sign,
             in_channels=1), (1, 16, 16), None),
])  # fmt: skip
def test_networks_with_real_shortcuts_keep_their_norms_and_their_outputs(model, shape, real):
    net = settled(model(), shape)
    packed, x = pack_network(net), torch.randn(20, *shape)
    assert packed(x).equal(net(x))
    assert not any(isinstance(module, inference.Threshold) for module in packed.modules())
    assert not list(layers.binary_layers(packed))


def test_channels_that_lie_last_stay_last():
    net = settled(birealnet20(weight_quantizer=ste_sign), (3, 8, 8))
    net = net.to(memory_format=torch.channels_last)
    first = layers.BinaryConv2d(3, 8, 3).to(memory_format=torch.channels_last)
    x = torch.randn(20, 3, 8, 8)
    for model in (net, nn.Sequential(first), first):
        found, expected = pack_network(model)(x), model(x)
        assert found.equal(expected)
        assert found.stride() == expected.stride()
    assert pack_network(first).layout == torch.channels_last


def test_a_scale_and_a_bias_move_into_the_threshold():
    both = {"weight_quantizer": binarize.magnitude_aware_sign, "input_quantizer": ste_sign}
    net = nn.Sequential(
        layers.BinaryConv2d(4, 9, 3, padding=1, bias=True, **both), nn.MaxPool2d(2),
        nn.BatchNorm2d(9), nn.Flatten(), layers.BinaryLinear(81, 5, **both),
    )  # fmt: skip
    nn.init.normal_(net[0].bias)
    net = settled(net, (4, 6, 6))
    packed, x = pack_network(net), torch.randn(300, 4, 6, 6)
    assert isinstance(packed[2], inference.Threshold)
    assert packed[0].scale is None
    assert packed[0].bias is None
    torch.testing.assert_close(packed(x), net(x))


@pytest.mark.parametrize("between", [
    [nn.BatchNorm2d(9), nn.PReLU()], [nn.AvgPool2d(2), nn.BatchNorm2d(9)],
    [nn.BatchNorm2d(9, track_running_stats=False)],
], ids=str)  # fmt: skip
def test_what_is_no_integer_behind_a_sign_is_not_folded(between):
    conv = partial(layers.BinaryConv2d, padding=1, **BOTH)
    net = settled(nn.Sequential(conv(4, 9, 3), *between, conv(9, 3, 3)), (4, 6, 6))
    packed, x = pack_network(net), torch.randn(20, 4, 6, 6)
    assert not any(isinstance(module, inference.Threshold) for module in packed)
    assert packed(x).equal(net(x))


SCALED = {"weight_quantizer": binarize.magnitude_aware_sign, "input_quantizer": ste_sign}


def has_thresholds(model: nn.Module) -> bool:
    return any(isinstance(module, inference.Threshold) for module in model.modules())


def test_a_scaled_linear_layer_keeps_its_norm():
    """Its scale runs over the last dimension, the norm over the second."""
    net = settled(nn.Sequential(layers.BinaryLinear(20, 6, **SCALED), nn.BatchNorm1d(6),
                                layers.BinaryLinear(6, 3, **BOTH)), (6, 20))  # fmt: skip
    packed, x = pack_network(net), torch.randn(50, 6, 20)
    assert not has_thresholds(packed)
    torch.testing.assert_close(packed(x), net(x))
    plain = settled(nn.Sequential(layers.BinaryLinear(20, 7, **BOTH), nn.BatchNorm1d(6),
                                  layers.BinaryLinear(7, 3, **BOTH)), (6, 20))  # fmt: skip
    packed = pack_network(plain)
    assert has_thresholds(packed)
    assert packed(x).equal(plain(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_thresholds_are_not_rounded_to_half_precision(dtype):
    threshold = inference.Threshold(torch.tensor([257, 2049]), torch.tensor([True, True]))
    sums = torch.tensor([[256, 2048], [258, 2050]], dtype=dtype)
    assert threshold(sums)[0].tolist() == [-1, -1]
    assert threshold(sums).dtype == dtype


def test_a_scale_of_another_type_than_the_norm_stays():
    conv = partial(layers.BinaryConv2d, **SCALED)
    net = settled(nn.Sequential(conv(4, 9, 3), nn.BatchNorm2d(9), conv(9, 3, 3)), (4, 8, 8))
    assert has_thresholds(pack_network(net))
    net[0].bfloat16()
    assert not has_thresholds(pack_network(net))


def test_a_sequence_with_a_forward_of_its_own_is_not_folded():
    class Backwards(nn.Sequential):
        def forward(self, x):
            return self[0](self[2](self[1](x)))

    conv = partial(layers.BinaryConv2d, **BOTH)
    parts = conv(4, 4, 3), nn.BatchNorm2d(4), conv(4, 4, 3)
    net = settled(Backwards(*parts), (4, 9, 9))
    packed, x = pack_network(net), torch.randn(20, 4, 9, 9)
    assert not has_thresholds(packed)
    assert packed(x).equal(net(x))
    assert has_thresholds(pack_network(nn.Sequential(*parts)))


@pytest.mark.parametrize("hooked", [0, 1])
def test_what_has_hooks_stays(hooked):
    conv = partial(layers.BinaryConv2d, **BOTH)
    net = settled(nn.Sequential(conv(4, 4, 3), nn.BatchNorm2d(4), conv(4, 4, 3)), (4, 9, 9))
    net[hooked].register_forward_hook(lambda module, inputs, output: -output)
    packed, x = pack_network(net), torch.randn(20, 4, 9, 9)
    assert not has_thresholds(packed)
    assert packed(x).equal(net(x))


class Negated(nn.Identity):
    def forward(self, x):
        return -x


class Shifted(nn.Identity):
    def forward(self, x):
        return x + 7


class NegatedPool(nn.MaxPool2d):
    def forward(self, x):
        return -super().forward(x)


class MagnitudeNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).abs() - 0.5


def changed(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, inputs, output: -output)
    return module


def replaced(module: nn.Module) -> nn.Module:
    module.forward = lambda x: x - 3
    return module


@pytest.mark.parametrize("between", [
    [nn.BatchNorm2d(4), Shifted()], [nn.BatchNorm2d(4), changed(nn.Identity())],
    [nn.BatchNorm2d(4), replaced(nn.Identity())],
    [Negated(), nn.BatchNorm2d(4)], [NegatedPool(2), nn.BatchNorm2d(4)],
    [changed(nn.MaxPool2d(2)), nn.BatchNorm2d(4)],
    [MagnitudeNorm(4)], [replaced(nn.BatchNorm2d(4))],
], ids=str)  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
def test_what_may_change_values_on_the_way_to_the_next_layer_stays(between, bias):
    conv = partial(layers.BinaryConv2d, **BOTH)
    net = nn.Sequential(conv(4, 4, 3, bias=bias), *between, conv(4, 4, 3))
    if bias:
        nn.init.normal_(net[0].bias, std=9)
    net = settled(net, (4, 12, 12))
    packed, x = pack_network(net), torch.randn(20, 4, 12, 12)
    assert not has_thresholds(packed)
    assert packed(x).equal(net(x))


def test_a_forward_of_its_own_stays():
    conv = partial(layers.BinaryConv2d, **BOTH)
    net = settled(nn.Sequential(conv(4, 4, 3), nn.BatchNorm2d(4), conv(4, 4, 3)), (4, 9, 9))
    last = net[2]
    for module in (replaced(last), replaced(net)):
        assert not has_thresholds(pack_network(net))
        x = torch.randn(20, 4, 9, 9)
        assert pack_network(net)(x).equal(net(x))
        del module.forward


@pytest.mark.parametrize("hold", [
    lambda layer: [layer], lambda layer: (layer,), lambda layer: {"0": [layer]},
])  # fmt: skip
def test_a_layer_that_a_parent_holds_in_a_list_too_keeps_its_bias(hold):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            conv = partial(layers.BinaryConv2d, padding=1, **BOTH)
            self.parts = nn.Sequential(conv(4, 4, 3, bias=True), nn.BatchNorm2d(4), conv(4, 4, 3))
            nn.init.normal_(self.parts[0].bias, std=9)
            self.held = hold(self.parts[0])

        def forward(self, x):
            held = self.held["0"] if isinstance(self.held, dict) else self.held
            return self.parts(x) + held[0](x)

    net = settled(Twice(), (4, 6, 6))
    packed, x = pack_network(net), torch.randn(20, 4, 6, 6)
    assert packed(x).equal(net(x))
    assert type(packed.parts[0]) is inference.PackedConv2d


def test_a_layer_that_is_used_twice_is_packed_once_and_keeps_its_scale():
    conv = layers.BinaryConv2d(4, 4, 3, padding=1, bias=True, **SCALED)
    net = settled(nn.Sequential(conv, nn.BatchNorm2d(4), conv), (4, 6, 6))
    packed, x = pack_network(net), torch.randn(20, 4, 6, 6)
    assert packed[0] is packed[2]
    assert type(packed[0]) is inference.PackedConv2d
    assert not has_thresholds(packed)
    torch.testing.assert_close(packed(x), net(x))


def test_a_subclass_stays_because_it_may_compute_something_else():
    class Negated(layers.BinaryLinear):
        def forward(self, x):
            return -super().forward(x)

    net = nn.Sequential(Negated(70, 3, **BOTH))
    assert type(pack_network(net)[0]) is Negated


def test_a_flattened_map_is_no_channel():
    net = settled(nn.Sequential(layers.BinaryConv2d(4, 2, 3, **SCALED), nn.Flatten(),
                                nn.BatchNorm1d(32), layers.BinaryLinear(32, 3, **BOTH)),
                  (4, 6, 6))  # fmt: skip
    packed = pack_network(net)
    assert not has_thresholds(packed)
    torch.testing.assert_close(packed(torch.ones(2, 4, 6, 6)), net(torch.ones(2, 4, 6, 6)))


@pytest.mark.parametrize("options", [
    {"padding_value": -1.0}, {"dilation": 2}, {"padding_mode": "circular"},
])  # fmt: skip
def test_experts_keep_their_geometry(options):
    layer = layers.ExpertBinaryConv2d(4, 6, 3, experts=3, padding=1, **options)
    nn.init.normal_(layer.gate.weight, std=5)
    x = torch.randn(30, 4, 6, 6)
    packed = pack_network(layer)
    assert packed(x).equal(layer(x))
    assert packed(x[:0]).shape == layer(x)[:0].shape
    assert packed.gate is not layer.gate


def test_inputs_whose_channels_lie_last_give_such_outputs():
    for kernel in (1, 3):
        layer = layers.BinaryConv2d(8, 6, kernel, **BOTH)
        x = torch.randn(5, 8, 7, 7).to(memory_format=torch.channels_last)
        found, expected = pack_network(layer)(x), layer(x)
        assert found.equal(expected)
        assert found.stride() == expected.stride()


def test_thresholds_of_wide_layers_are_found_in_blocks(monkeypatch):
    norm = normalisation(300)
    whole = thresholds(norm, 200, (300,))
    monkeypatch.setattr(inference, "BLOCK", 1000)
    assert all(a.equal(b) for a, b in zip(whole, thresholds(norm, 200, (300,)), strict=True))


def test_first_layers_with_real_inputs_keep_their_norm():
    net = settled(binaryconnect_mlp(64, (32, 32)), (64,))
    packed, x = pack_network(net), torch.randn(20, 64)
    assert packed(x).equal(net(x))
    norms = [isinstance(module, nn.BatchNorm1d) for module in packed]
    assert sum(norms) == 3


def test_packing_changes_nothing_in_the_model():
    net = settled(small_binarynet(), (1, 8, 8)).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    packed = pack_network(net)
    assert net.training
    assert not any(module.training for module in packed.modules())
    assert all(tensor.equal(before[name]) for name, tensor in net.state_dict().items())
    packed(torch.randn(3, 1, 8, 8))
    assert all(tensor.equal(before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("options", [
    {}, {"weight_quantizer": None}, {"padding": "same"}, {"padding_value": -1.0},
])  # fmt: skip
def test_the_same_bits_are_multiplied_as_floats(options, monkeypatch):
    net = settled(small_binarynet(**options), (1, 8, 8))
    bits, x = pack_network(net), torch.randn(50, 1, 8, 8)
    floats = pack_network(net, multiply="floats")
    floats.load_state_dict(bits.state_dict())
    assert [type(module) for module in floats] == [type(module) for module in bits]
    expected = bits(x)
    monkeypatch.setattr(inference, "xnor_product", None)
    assert floats(x).equal(expected)
    assert floats(x).equal(net(x))


def test_an_expert_too_is_multiplied_as_floats(monkeypatch):
    layer = layers.ExpertBinaryConv2d(3, 4, 3, experts=2).eval()
    monkeypatch.setattr(inference, "xnor_product", None)
    x = torch.randn(5, 3, 8, 8)
    assert pack_network(layer, multiply="floats")(x).equal(layer(x))


def test_unknown_ways_to_multiply_are_refused():
    with pytest.raises(ValueError, match="unknown multiply 'words'; known: bits, floats"):
        pack_network(nn.Linear(2, 2), multiply="words")


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_a_packed_network_is_saved_and_loaded(form, tmp_path):
    net = settled(small_binarynet(), (1, 8, 8))
    packed, path, x = pack_network(net), tmp_path / "packed", torch.randn(50, 1, 8, 8)
    if form == "torch":
        torch.save(packed.state_dict(), path)
        state = torch.load(path, weights_only=True)
    else:
        save_file(packed.state_dict(), path)
        state = load_file(path)
    other = settled(small_binarynet(), (1, 8, 8))
    again = pack_network(other)
    assert not again(x).equal(net(x))
    again.load_state_dict(state)
    assert again(x).equal(net(x))
    assert sum(tensor.nbytes for tensor in state.values()) < 0.2 * sum(
        tensor.nbytes for tensor in net.state_dict().values()
    )


class Scale(nn.Module):
    """A weight quantizer whose learned scale, one for each channel, starts at 1."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1))

    def forward(self, weight):
        return self.scale * ste_sign(weight)


def test_a_scale_that_starts_at_1_is_saved_and_loaded():
    def network():
        linear = partial(layers.BinaryLinear, input_quantizer=ste_sign)
        return nn.Sequential(linear(64, 8, weight_quantizer=Scale(8)), nn.BatchNorm1d(8),
                             linear(8, 3, weight_quantizer=Scale(3)))  # fmt: skip

    net, x = settled(network(), (64,)), torch.randn(20, 64)
    nn.init.normal_(net[0].weight_quantizer.scale)
    again = pack_network(network())
    again.load_state_dict(pack_network(net).state_dict())
    assert again(x).equal(pack_network(net)(x))
    torch.testing.assert_close(again(x), net(x))


def test_a_network_trained_on_digits_gives_the_same_logits_for_every_image():
    digits = data.load("digits")
    net = small_binarynet()
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    training.train(net, digits, adam, epochs=2, batch_size=100, preprocess=data.signed_range,
                   progress=False)  # fmt: skip
    packed = pack_network(net)
    predict = partial(training.predict, images=digits.test_images, preprocess=data.signed_range)
    assert predict(packed).equal(predict(net))


def test_a_list_of_layers_is_packed_with_them():
    class InOrder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = layers.BinaryLinear(70, 5, **BOTH)
            self.order = [self.inner]

        def forward(self, x):
            return self.order[0](x)

    net, x = InOrder(), torch.randn(3, 70)
    packed = pack_network(net)
    assert packed.order[0] is packed.inner
    assert isinstance(packed.inner, inference.PackedLinear)
    assert packed(x).equal(net(x))


def test_a_transformer_with_packed_layers_calls_them():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    encoder.linear1 = layers.BinaryLinear(8, 16, bias=True, **BOTH)
    encoder.activation_relu_or_gelu = 0
    expected = encoder(torch.ones(2, 3, 8)).detach()
    encoder.activation_relu_or_gelu = 1
    with torch.no_grad():
        torch.testing.assert_close(pack_network(encoder)(torch.ones(2, 3, 8)), expected)


@pytest.mark.usefixtures("compiler")
def test_compiled_words_are_the_same():
    conv = layers.BinaryConv2d(3, 4, 3, padding=1, **BOTH)
    packed, x = inference.PackedConv2d(conv), torch.randn(2, 3, 6, 6)
    assert torch.compile(packed)(x).equal(packed(x))
