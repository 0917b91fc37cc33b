"""The papers' networks: exact numbers of weights and products, shapes, kinds of weight."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnnbook import models
from bnnbook.binarize import (
    approx_sign,
    dorefa_activation,
    dorefa_weight,
    hard_sigmoid,
    magnitude_aware_sign,
    real_weight,
    ste_sign,
    stochastic_sign,
)
from bnnbook.layers import (
    BinaryConv2d,
    BinaryLayer,
    BinaryLinear,
    ExpertBinaryConv2d,
    LearnableShift,
    binary_layers,
)
from bnnbook.models import (
    alexnet,
    alexnet_small,
    architecture_name,
    binaryconnect_cnn,
    binaryconnect_mlp,
    binarynet,
    birealnet18,
    birealnet20,
    expertnet,
    four_layer_cnn,
    load_one_expert,
    parse_architecture,
    reactnet_a,
    reactnet_small,
    summary,
)
from bnnbook.models.alexnet import TowerNorm
from bnnbook.models.bireal import BiRealBlock
from bnnbook.models.expert import ExpertUnit
from bnnbook.models.reactnet import ReActBlock

# Every network in a size that a test can run; all take (N, 3, 16, 16) and return (N, 10).
SMALL = {
    "alexnet": partial(alexnet_small, image_size=16, widths=(4, 8, 6, 6, 4), hidden=8),
    "four layers": partial(four_layer_cnn, image_size=16, weight_std=None),
    "binarynet": partial(binarynet, widths=(4, 6), hidden=(8,), image_size=16),
    "bireal": partial(birealnet20, widths=(4, 8, 16), convolutions=(2, 1, 1)),
    "bireal, pad": partial(birealnet20, widths=(4, 8), convolutions=(1, 2), shortcut="pad"),
    "bireal, binary": partial(
        birealnet20, widths=(4, 8), convolutions=(1, 2), shortcut="pool-binary"
    ),
    "react": partial(reactnet_small, channels=(4, 8, 16, 16)),
    "expert": partial(expertnet, width=8, blocks=(1, 1), groups=(1, 2), expansion=2),
    "one expert": partial(expertnet, width=8, blocks=(1, 1), groups=(1, 2), experts=1),
    "driven": partial(expertnet, width=8, blocks=(1, 1), groups=(1, 2), data_driven=True),
    "sigmoid gate": partial(expertnet, width=8, blocks=(1, 1), groups=(1, 2), gate="sigmoid"),
}
BINARY = [name for name in SMALL if name not in ("alexnet", "four layers")]
INPUT = (3, 16, 16)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA"))]  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def weights(network):
    return sum(layer.weight.numel() for layer in binary_layers(network))


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def on_meta(constructor, *arguments, **options):
    """Build a network that is too large to fill with numbers: shapes only."""
    with torch.device("meta"):
        return constructor(*arguments, **options)


def total(network, shape=(3, 224, 224)):
    return summary(network, shape).loc["total"]


@pytest.fixture(scope="module")
def alexnet_table():
    return summary(on_meta(alexnet), (3, 224, 224))


# --- Numbers of weights and of operations ------------------------------------------------------


@pytest.mark.parametrize(("network", "expected"), [
    (binaryconnect_mlp, 2_910_208),
    (partial(binaryconnect_mlp, hidden=(2048,) * 3), 10_014_720),
    (binaryconnect_cnn, 14_022_016),
    (partial(binaryconnect_cnn, widths=(64, 128, 256)), 6_397_632),
    (binarynet, 10_352_000),
    (partial(binarynet, padding="same"), 14_022_016),
    (birealnet20, 267_264),
    (birealnet18, 10_985_472),
    (reactnet_small, 1_055_744),
    (reactnet_a, 28_253_184),
])  # fmt: skip
def test_binary_weights(network, expected):
    assert weights(on_meta(network)) == expected


@pytest.mark.parametrize(("name", "bops", "weights_of_one"), [
    ("1242-2-4:4:16:32", 1.3e9, 6_002_688),
    ("1262-2-4:4:16:32", 1.5e9, 7_116_800),
    ("1282-2-4:4:16:32", 1.7e9, 8_230_912),
    ("1242-2-4:4:8:16", 1.6e9, 8_140_800),
    ("1262-2-4:4:8:16", 1.9e9, 9_844_736),
    ("1282-2-4:4:8:16", 2.2e9, 11_548_672),
    ("1262-2-4:8:8:16", 1.7e9, 9_586_688),
])  # fmt: skip
def test_binary_operations_of_the_expert_networks_are_the_papers(name, bops, weights_of_one):
    network = on_meta(expertnet, 1000, **parse_architecture(name), stem="light", experts=1)
    found = total(network)
    assert weights(network) == weights_of_one
    assert round(found.bops, -8) == bops
    # what stays real: the stem, the shortcuts that change the size, the last layer
    assert found.macs == pytest.approx(44.6e6 + 38.5e6 + 1.0e6, abs=0.2e6)


def test_experts_cost_memory_but_no_binary_operations():
    one, four = (on_meta(expertnet, experts=n) for n in (1, 4))
    assert weights(four) == 4 * weights(one)
    assert total(four, (3, 32, 32)).bops == total(one, (3, 32, 32)).bops
    gates = sum(4 * layer.in_channels for layer in binary_layers(four))
    assert total(four, (3, 32, 32)).macs == total(one, (3, 32, 32)).macs + gates


def test_without_the_pointwise_units_the_final_expert_network_would_cost_less():
    network = on_meta(expertnet, 1000, **parse_architecture("1262-2-4:8:8:16"), stem="light",
                      experts=1, pointwise=False)  # fmt: skip
    assert total(network).bops == pytest.approx(1.142e9, abs=0.001e9)


@pytest.mark.parametrize(("shortcut", "bops", "macs"), [
    ("pool-conv", 1.676e9, 118_013_952 + 19_267_584 + 512_000),
    ("pool-binary", 1.695e9, 118_013_952 + 512_000),
    ("pad", 1.676e9, 118_013_952 + 512_000),
])  # fmt: skip
def test_operations_of_the_resnet_18_layout(shortcut, bops, macs):
    found = total(on_meta(birealnet18, shortcut=shortcut))
    assert found.bops == pytest.approx(bops, abs=0.001e9)
    assert found.macs == macs


def test_the_strong_baseline_has_the_binary_operations_of_resnet_18():
    network = on_meta(expertnet, 1000, blocks=(2, 2, 2, 2), experts=1, pointwise=False,
                      stem="light")  # fmt: skip
    assert total(network).bops == total(on_meta(birealnet18)).bops


def test_operations_of_birealnet20():
    found = total(on_meta(birealnet20, shortcut="pad"), (3, 32, 32))
    assert found.bops + found.macs == pytest.approx(40.55e6, abs=0.005e6)
    assert found.macs == 32 * 32 * 432 + 640
    assert parameters(on_meta(birealnet20)) - parameters(on_meta(birealnet20, shortcut="pad")) == (
        16 * 32 + 32 * 64 + 2 * 32 + 2 * 64
    )


def test_operations_of_the_binaryconnect_cnn_are_real_additions():
    found = total(on_meta(binaryconnect_cnn), (3, 32, 32))
    network, count = binaryconnect_cnn().eval(), []
    for layer in binary_layers(network):
        layer.register_forward_hook(
            lambda m, _, out: count.append(m.weight[0].numel() * out[0].numel())
        )
    network(torch.zeros(1, 3, 32, 32))
    assert sum(count) == pytest.approx(617.0e6, abs=0.05e6)
    assert (found.macs, found.bops) == (sum(count), 0)


def test_only_the_first_layer_of_binarynet_multiplies_real_numbers():
    table = summary(on_meta(binarynet), (3, 32, 32))
    assert table.loc["total", "macs"] == table.loc["0", "macs"] == 30 * 30 * 128 * 27
    assert table.loc["0", "bops"] == 0


@pytest.mark.parametrize("stage", [1, 2])
def test_twice_the_width_with_four_times_the_groups_costs_the_same(stage):
    def bops(expansion, groups):
        network = on_meta(expertnet, blocks=(1, 1), expansion=expansion, groups=(groups,) * 2,
                          width=32, experts=1)  # fmt: skip
        return summary(network, (3, 32, 32)).loc[f"stage{stage}.1.conv", "bops"]

    assert bops(1, 1) == bops(2, 4) == bops(4, 16)
    assert bops(2, 1) == 4 * bops(1, 1)


# --- AlexNet -----------------------------------------------------------------------------------


def test_parameters_of_alexnet(alexnet_table):
    assert alexnet_table.loc["total", "parameters"] == 60_965_224
    assert alexnet_table.loc["total", "bits"] == 32 * 60_965_224
    assert parameters(on_meta(alexnet, towers=1)) == 62_378_344
    fully_connected = alexnet_table.loc[["fc6", "fc7", "fc8"], "parameters"].sum()
    assert fully_connected / 60_965_224 > 0.95


def test_torchvisions_alexnet_is_another_network():
    import torchvision

    table = summary(on_meta(torchvision.models.alexnet), (3, 224, 224))
    assert table.loc["total", "parameters"] == 61_100_840


def test_operations_and_neurons_of_alexnet(alexnet_table):
    assert alexnet_table.loc["total", "macs"] == pytest.approx(724.4e6, abs=0.1e6)
    layers = [*(f"conv{n}" for n in range(1, 6)), "fc6", "fc7", "fc8"]
    neurons = [int(np.prod(shape)) for shape in alexnet_table.loc[layers, "output"]]
    assert neurons == [290_400, 186_624, 64_896, 64_896, 43_264, 4096, 4096, 1000]
    assert sum(neurons) == 659_272


@pytest.mark.parametrize("pooling", [2, 3])
@pytest.mark.parametrize("pixels", [224, 227])
def test_feature_maps_of_alexnet(pixels, pooling):
    table = summary(on_meta(alexnet, pooling=pooling), (3, pixels, pixels))
    sizes = [table.loc[name, "output"][-1] for name in
             ("conv1", "conv2", "conv3", "conv4", "conv5", "pool5")]  # fmt: skip
    assert sizes == [55, 27, 13, 13, 13, 6]


def test_ways_to_make_55_of_224_pixels():
    source = 1 + int(np.ceil((224 - 11) / 4))
    padded = F.conv2d(torch.zeros(1, 3, 224, 224), torch.zeros(1, 3, 11, 11), stride=4, padding=2)
    assert source == padded.shape[-1] == 1 + (227 - 11) // 4 == 55


def test_the_overhang_is_seen_at_224_pixels_only():
    network = alexnet(10, widths=(2, 4, 4, 4, 2), hidden=4)
    for pixels in (224, 227):
        x = torch.randn(1, 3, pixels, pixels)
        bare = F.conv2d(x, network.conv1.weight, network.conv1.bias, stride=4)
        found = network.conv1(network.overhang(x))
        assert found.shape[-1] == 55
        assert bare.shape[-1] == (54 if pixels == 224 else 55)
        assert torch.equal(found[..., : bare.shape[-1], : bare.shape[-1]], bare)


def tower(network, number, x, half):
    """Convolution, ReLU and, where the paper has it, normalisation, for half of the kernels."""
    conv = getattr(network, f"conv{number}")
    each = conv.out_channels // 2
    part = slice(half * each, (half + 1) * each)
    x = F.conv2d(x, conv.weight[part], conv.bias[part], padding=conv.padding).relu()
    if number in (1, 2):  # the paper's formula, by framework: no division of alpha by the size
        x = F.local_response_norm(x, 5, alpha=5e-4, beta=0.75, k=2.0)
    return F.max_pool2d(x, 3, 2, ceil_mode=True) if number in (1, 2, 5) else x


def test_two_towers_meet_at_conv3_and_the_fully_connected_layers_only():
    network = alexnet_small(image_size=16, widths=(8, 12, 10, 8, 6), hidden=12).eval()
    x = 100 * torch.randn(4, 3, 16, 16)  # of the size that makes normalisation matter
    first, second = (tower(network, 2, tower(network, 1, x, half), half) for half in (0, 1))
    both = torch.cat([first, second], 1)
    ends = [tower(network, 5, tower(network, 4, tower(network, 3, both, half), half), half)
            for half in (0, 1)]  # fmt: skip
    features = torch.cat(ends, 1).flatten(1)
    for layer in (network.fc6, network.fc7):
        features = layer(features).relu()
    torch.testing.assert_close(network.fc8(features), network(x))


def test_normalisation_stays_within_a_tower():
    x = torch.full((1, 8, 1, 1), 100.0)
    x[:, 4:] = 0
    alone, together = TowerNorm(2)(x), TowerNorm(1)(x)
    # the first tower's last map: two neighbours on its own side, none on the other
    expected = 100 / (2 + 1e-4 * 3 * 100**2) ** 0.75
    assert alone[0, 3].item() == pytest.approx(expected)
    x[:, 4:] = 100
    assert torch.equal(TowerNorm(2)(x)[:, :4], alone[:, :4])
    assert not torch.allclose(TowerNorm(1)(x)[:, :4], together[:, :4])


@pytest.mark.parametrize("constructor", [alexnet, alexnet_small])
def test_initial_values_of_alexnet(constructor):
    network = constructor(10, widths=(16, 32, 32, 32, 16), hidden=64, weight_std=0.01,
                          hidden_bias=1.0)  # fmt: skip
    for name in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"):
        layer = getattr(network, name)
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.1)
        biased = name in ("conv2", "conv4", "conv5", "fc6", "fc7")
        assert (layer.bias == (1.0 if biased else 0.0)).all()


def test_initial_values_of_he():
    network = alexnet_small(widths=(4, 8, 64, 64, 4), towers=1)
    assert network.conv4.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    assert network.fc8.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert (network.conv4.bias == 0).all()


def test_alexnet_without_parts():
    def names(**options):
        return {name for name, _ in on_meta(alexnet, 10, **options).named_children()}

    assert names() - names(lrn=False) == {"norm1", "norm2"}
    assert names() - names(without=4) == {"conv4"}
    for number in (2, 3, 4, 5):
        for pixels, constructor in ((224, alexnet), (32, alexnet_small)):
            network = on_meta(constructor, 10, without=number)
            assert total(network, (3, pixels, pixels)).output == (10,)


def test_dropout_follows_both_hidden_layers_of_alexnet():
    names = [name for name, _ in on_meta(alexnet).named_children()]
    assert names[names.index("fc6") :] == [
        "fc6", "relu6", "dropout6", "fc7", "relu7", "dropout7", "fc8",
    ]  # fmt: skip


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_four_layer_network(activation):
    network = four_layer_cnn(activation=activation, lrn=True)
    table = summary(network, (3, 32, 32))
    pools = [table.loc[f"pool{n}", "output"] for n in (1, 2, 3)]
    assert pools == [(32, 16, 16), (32, 8, 8), (64, 4, 4)]
    assert table.loc["total", "parameters"] == 2432 + 25_632 + 51_264 + 10_250
    assert f"{activation}3" in table.index
    assert "norm2" in table.index
    assert "norm3" not in table.index
    stds = [layer.weight.std().item() for layer in network if hasattr(layer, "weight")]
    assert stds == pytest.approx([1e-4, 0.01, 0.01, 0.01], rel=0.1)


def test_other_constants_of_the_four_layer_network_may_be_none_at_all():
    network, normal = on_meta(four_layer_cnn, lrn={}), on_meta(four_layer_cnn, lrn=True)
    assert str(network) == str(normal)
    assert "LocalResponseNorm" not in str(on_meta(four_layer_cnn))


# --- How the networks are put together ---------------------------------------------------------


@pytest.mark.parametrize("kind", ["deterministic", "stochastic", "real"])
def test_forward_shapes_and_kinds_of_weight(kind):
    mlp = binaryconnect_mlp(64, (16, 16), 10, weights=kind)
    cnn = binaryconnect_cnn(10, widths=(4, 8), hidden=8, image_size=8, weights=kind)
    assert mlp(torch.randn(5, 1, 8, 8)).shape == (5, 10)
    assert cnn(torch.randn(5, 3, 8, 8)).shape == (5, 10)
    for network, layers in ((mlp, 3), (cnn, 7)):
        assert len(list(binary_layers(network))) == (0 if kind == "real" else layers)
        for layer in binary_layers(network):
            assert set(layer.binary_weight().unique().tolist()) == {-1.0, 1.0}


def test_the_real_network_starts_as_glorot_says():
    layer = binaryconnect_mlp(300, (500,), weights="real")[1]
    bound = (6 / 800) ** 0.5
    assert 0.99 * bound < layer.weight.abs().max() <= bound


def test_dropout_only_where_asked():
    count = [
        sum(isinstance(m, nn.Dropout) for m in binaryconnect_mlp(4, (3, 3), dropout=d))
        for d in (0.0, 0.5)
    ]
    assert count == [0, 2]


def test_order_of_layers_in_binarynet():
    names = [type(layer).__name__ for layer in on_meta(binarynet)]
    conv, pooled = ["BinaryConv2d", "BatchNorm2d"], ["BinaryConv2d", "MaxPool2d", "BatchNorm2d"]
    assert names == [*(conv + pooled) * 3, "Flatten", *["BinaryLinear", "BatchNorm1d"] * 3]


def test_batch_norm_of_binarynet_shifts_only():
    norms = [m for m in binarynet(widths=(4,), hidden=(5,)) if "Norm" in type(m).__name__]
    for norm in norms:
        assert (norm.eps, norm.momentum) == (1e-3, 0.01)
        assert [name for name, _ in norm.named_parameters()] == ["bias"]
        assert (norm.weight == 1).all()  # a constant, which no checkpoint holds
        assert "weight" not in norm.state_dict()
    x = torch.randn(50, 4, 3, 3)
    with torch.no_grad():
        norms[0].bias.copy_(torch.arange(4.0))
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
    expected = (x - mean) / (var + 1e-3).sqrt() + torch.arange(4.0)[:, None, None]
    torch.testing.assert_close(norms[0](x), expected)
    torch.testing.assert_close(norms[0].running_mean, 0.01 * mean.flatten())


@pytest.mark.parametrize("stride", [1, 2])
def test_a_bireal_block_literally(stride):
    block = BiRealBlock(4, 8, stride).eval()
    x = torch.randn(2, 4, 7, 7)
    binary = torch.where(block.conv.weight >= 0, 1.0, -1.0)
    scale = block.conv.weight.abs().mean((1, 2, 3))[:, None, None]
    y = scale * F.conv2d(torch.where(x >= 0, 1.0, -1.0), binary, stride=stride, padding=1)
    _, conv, norm = block.shortcut
    pooled = F.avg_pool2d(x, stride, ceil_mode=True)
    assert isinstance(conv, nn.Conv2d)
    assert not isinstance(conv, BinaryConv2d)
    expected = block.norm(y) + norm(F.conv2d(pooled, conv.weight))
    torch.testing.assert_close(block(x), expected)


def test_a_bireal_block_of_one_size_has_an_identity_around_it():
    block = BiRealBlock(4, 4)
    nn.init.zeros_(block.norm.weight)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x)


def test_the_shortcut_without_parameters():
    block = BiRealBlock(2, 5, 2, shortcut="pad")
    nn.init.zeros_(block.norm.weight)
    x = torch.randn(2, 2, 7, 7)
    assert torch.equal(block(x)[:, :2], x[:, :, ::2, ::2])
    assert (block(x)[:, 2:] == 0).all()


def test_the_binary_shortcut_is_binary():
    _, conv, _ = BiRealBlock(2, 4, 2, shortcut="pool-binary").shortcut
    assert isinstance(conv, BinaryConv2d)
    assert conv.input_quantizer is approx_sign


@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (8, 1), (8, 2)])
def test_a_react_block_literally(channels, stride):
    block = ReActBlock(4, channels, stride, conv=partial(BinaryConv2d, input_quantizer=ste_sign))
    for parameter in block.parameters():  # start values would hide what a shift does
        nn.init.normal_(parameter)

    def rprelu(x, activation):
        gamma, zeta = (p[:, None, None] for p in (activation.gamma, activation.zeta))
        return F.prelu(x - gamma, activation.slope) + zeta

    def half(x, shift, conv, norm, **options):
        shifted = torch.where(x + shift.shift[:, None, None] >= 0, 1.0, -1.0)
        return norm(F.conv2d(shifted, torch.where(conv.weight >= 0, 1.0, -1.0), **options))

    x = torch.randn(2, 4, 6, 6)
    block.eval()
    y = half(x, block.shift3, block.conv3, block.norm3, stride=stride, padding=1)
    y = rprelu(y + (F.avg_pool2d(x, 2) if stride == 2 else x), block.activation3)
    copies = zip(block.conv1, block.norm1, strict=True)
    y = torch.cat([half(y, block.shift1, conv, norm) + y for conv, norm in copies], 1)
    assert len(block.conv1) == channels // 4
    torch.testing.assert_close(block(x), rprelu(y, block.activation1))


@pytest.mark.parametrize("data_driven", [False, True])
def test_an_expert_unit_literally(data_driven):
    unit = ExpertUnit(8, 16, 3, 2, experts=1, data_driven=data_driven, groups=2).eval()
    for parameter in (unit.norm.bias, unit.scale.scale):
        nn.init.normal_(parameter)
    x = torch.randn(2, 8, 6, 6)
    normed = unit.norm(x)
    signs, binary = (torch.where(t >= 0, 1.0, -1.0) for t in (normed, unit.conv.weight))
    y = F.conv2d(signs, binary, stride=2, padding=1, groups=2) * unit.scale.scale[:, None, None]
    if data_driven:
        y = y * unit.data_driven(normed)
    _, squeeze, norm1, prelu1, expand, norm2, prelu2 = unit.shortcut
    assert (squeeze.out_channels, expand.out_channels) == (2, 16)
    short = prelu2(norm2(expand(prelu1(norm1(squeeze(F.avg_pool2d(x, 2)))))))
    torch.testing.assert_close(unit(x), F.prelu(y, unit.activation.weight) + short)


def test_the_sums_of_an_expert_unit_start_at_order_1():
    unit = ExpertUnit(64, 32, 3)
    x = unit.scale(unit.conv(torch.randn(50, 64, 5, 5)))[:, :, 1:-1, 1:-1]
    assert x.std().item() == pytest.approx(1, rel=0.1)


def test_a_block_of_the_expert_network():
    network = expertnet(blocks=(2, 1), groups=(1, 2), width=8, expansion=2, experts=3)
    convs = [unit.conv for stage in (network.stage1, network.stage2) for unit in stage]
    assert [type(conv) for conv in convs] == [ExpertBinaryConv2d] * 9
    assert [conv.kernel_size[0] for conv in convs] == [3, 3, 1] * 3
    assert [conv.groups for conv in convs] == [1] * 6 + [2, 2, 1]
    assert [conv.in_channels for conv in convs] == [8, 16, 16, 16, 16, 16, 16, 32, 32]
    assert [conv.stride[0] for conv in convs] == [1] * 6 + [2, 1, 1]
    assert {len(conv.weight) for conv in convs} == {3}
    assert all(isinstance(c, nn.Identity) for c in [u.shortcut for u in network.stage1[1:]])


def test_names_of_architectures():
    for name in ("1242-2-4:4:16:32", "11-1-1:2", "1262-4-8:8:8:16"):
        assert architecture_name(**parse_architecture(name)) == name


@pytest.mark.parametrize("data_driven", [False, True])
def test_one_expert_becomes_several_equal_ones(data_driven):
    options = {"width": 8, "blocks": (1, 1), "groups": (1, 2), "data_driven": data_driven}
    one, several = expertnet(**options, experts=1), expertnet(**options, experts=3)
    one(torch.randn(20, *INPUT))  # statistics of batch norm are copied, too
    gates = [layer.gate.weight.clone() for layer in binary_layers(several)]
    load_one_expert(several, one)
    x = torch.randn(8, *INPUT)
    torch.testing.assert_close(several.eval()(x), one.eval()(x))
    for layer, gate in zip(binary_layers(several), gates, strict=True):
        assert (layer.weight == layer.weight[:1]).all()
        assert torch.equal(layer.gate.weight, gate)


# --- What holds for all of them ----------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SMALL)
def test_gradients_reach_every_parameter(name, device):
    network = SMALL[name]().to(device)
    out = network(torch.randn(16, *INPUT).to(device))
    assert out.shape == (16, 10)
    (out * torch.randn_like(out)).sum().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("name", SMALL)
def test_state_dict_round_trip(name):
    first, second = SMALL[name](), SMALL[name]()
    first(torch.randn(16, *INPUT))
    second.load_state_dict(first.state_dict())
    x = torch.randn(4, *INPUT)
    assert torch.equal(first.eval()(x), second.eval()(x))


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("padding_value", [0.0, 1.0])
def test_weights_and_inputs_of_binary_layers(name, padding_value):
    network = SMALL[name](weight_quantizer=ste_sign, padding_value=padding_value)
    layers, seen = list(binary_layers(network)), []
    for layer in layers:
        layer.register_forward_pre_hook(lambda m, x: seen.append(m.quantized_input(x[0])))
    network(torch.randn(4, *INPUT))
    assert len(seen) == len(layers)
    if name == "binarynet":  # its first layer takes the image
        seen, (first, *_) = seen[1:], seen
        assert len(first.unique()) > 2
        convolutions = layers[1:]
    else:
        convolutions = layers
    assert all((x.abs() == 1).all() for x in seen)
    assert all((layer.binary_weight().abs() == 1).all() for layer in layers)
    paddings = {m.padding_value for m in convolutions if isinstance(m, nn.Conv2d)}
    assert paddings == {padding_value}


@pytest.mark.parametrize("name", BINARY)
def test_quantizers_of_the_binary_networks(name):
    binary = SMALL[name](weight_quantizer=None)
    assert all((layer.weight.abs() == 1).all() for layer in binary_layers(binary))
    both = SMALL[name](weight_quantizer=magnitude_aware_sign, input_quantizer=dorefa_activation)
    for layer in list(binary_layers(both))[1:]:
        assert layer.weight_quantizer is magnitude_aware_sign
        assert layer.input_quantizer is dorefa_activation


@pytest.mark.parametrize("name", SMALL)
def test_a_summary_of_every_network(name):
    network = SMALL[name]()
    table = summary(network, INPUT)
    assert table.loc["total", "parameters"] == parameters(network)
    assert table.loc["total", "output"] == (10,)
    layers = table.drop("total")
    for column in ("parameters", "bits", "macs", "bops"):
        assert layers[column].sum() == table.loc["total", column]
    saved = 31 * weights(network)
    assert table.loc["total", "bits"] == 32 * parameters(network) - saved
    assert (layers.bops > 0).sum() == len(list(binary_layers(network))) - (name == "binarynet")


# --- Summary -----------------------------------------------------------------------------------


def test_the_operations_of_a_layer_literally():
    layers = [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9, 9), 6 * 5 * 5 * 2 * 9, 0),
        (BinaryConv2d(4, 6, 3, input_quantizer=ste_sign), (4, 9, 9), 0, 6 * 7 * 7 * 4 * 9),
        (BinaryLinear(7, 5), (7,), 7 * 5, 0),
        (BinaryLinear(7, 5, input_quantizer=ste_sign), (7,), 0, 7 * 5),
        (BinaryLinear(7, 5, weight_quantizer=real_weight, input_quantizer=ste_sign), (7,), 35, 0),
        (BinaryLinear(7, 5, weight_quantizer=None, input_quantizer=ste_sign), (7,), 0, 35),
        (nn.Conv1d(2, 3, 5), (2, 9), 3 * 5 * 2 * 5, 0),
        (nn.BatchNorm2d(4), (4, 9, 9), 0, 0),
    ]
    for layer, shape, macs, bops in layers:
        found = summary(layer, shape).iloc[0]
        assert (found.macs, found.bops, found.kind) == (macs, bops, type(layer).__name__)


def test_bits_of_a_layer():
    def bits(**options):
        return total(BinaryLinear(7, 5, **options), (7,)).bits

    assert bits() == bits(weight_quantizer=None) == 35
    assert bits(bias=True) == 35 + 5 * 32
    assert bits(weight_quantizer=real_weight) == 35 * 32
    assert bits(weight_quantizer=partial(dorefa_weight, bits=2)) == 70
    two = BinaryLinear(7, 5, input_quantizer=partial(dorefa_activation, bits=2))
    assert (total(two, (7,)).macs, total(two, (7,)).bops) == (35, 0)


def test_an_input_quantizer_may_have_one_parameter_for_each_channel():
    shifted = BinaryConv2d(3, 4, 1, input_quantizer=nn.Sequential(LearnableShift(3), Sign()))
    row = total(shifted, (3, 2, 2))
    assert (row.macs, row.bops) == (0, 48)


class Sign(nn.Module):
    def forward(self, x):
        return ste_sign(x)


def test_layers_used_twice_or_never():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.never = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.twice(self.twice(x))

    table = summary(Odd(), (4,))
    assert table.loc["twice", ["parameters", "macs"]].tolist() == [20, 32]
    assert table.loc["never", ["parameters", "macs", "output"]].tolist() == [15, 0, None]
    assert table.loc["total", "parameters"] == 35


def test_a_summary_changes_nothing():
    generator = torch.Generator().manual_seed(3)
    network = nn.Sequential(
        BinaryConv2d(3, 4, 3, weight_quantizer=partial(stochastic_sign, generator=generator)),
        nn.BatchNorm2d(4), nn.Dropout(0.5),
        BinaryConv2d(4, 4, 3, weight_quantizer=stochastic_sign), nn.BatchNorm2d(4),
    )  # fmt: skip
    network[1].eval()
    modes = [module.training for module in network.modules()]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random, own = torch.get_rng_state(), generator.get_state()
    summary(network, (3, 8, 8))
    with pytest.raises(ValueError, match="no input of shape"):
        summary(network, (5, 8, 8))
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(generator.get_state(), own)
    assert not any(module._forward_hooks for module in network.modules())
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_summary_of_a_network_in_another_precision(dtype):
    network = SMALL["bireal"]().to(dtype)
    assert total(network, INPUT).bops == total(SMALL["bireal"](), INPUT).bops


@pytest.mark.parametrize("shape", [224, (), (3, 0, 32), (3, 32.0, 32), None, "3"])
def test_what_is_no_shape(shape):
    with pytest.raises(ValueError, match=r"without the batch dimension, such as \(3, 32, 32\)"):
        summary(nn.ReLU(), shape)


@pytest.mark.parametrize(("network", "shape"), [
    (alexnet, (3, 32, 32)),
    (birealnet20, (1, 32, 32)),
    (binarynet, (3, 24, 24)),
    (binaryconnect_mlp, (100,)),
])  # fmt: skip
def test_a_shape_that_the_network_does_not_take(network, shape):
    with pytest.raises(ValueError, match=rf"the model takes no input of shape \({shape[0]},"):
        summary(on_meta(network), shape)


# --- Arguments that make no sense --------------------------------------------------------------


def test_unknown_kind_of_weight():
    with pytest.raises(ValueError, match="known: real, deterministic, stochastic"):
        binaryconnect_mlp(weights="binary")


@pytest.mark.parametrize(("network", "message"), [
    (partial(alexnet, pooling=4), "unknown pooling 4; known: 2, 3"),
    (partial(alexnet, without=1), "unknown without 1; known: None, 2, 3, 4, 5"),
    (partial(alexnet, image_size=225), "image_size must be 224, 227 or from 8 to 64, not 225"),
    (partial(alexnet, 0), "num_classes: positive integers, not 0"),
    (partial(alexnet, widths=(8, 8)), "widths: 5 numbers, not 2"),
    (partial(four_layer_cnn, weight_std=(0.01,)), "weight_std: 4 numbers, not 1"),
    (partial(birealnet20, widths=(8, 8)), "convolutions: 2 numbers, not 3"),
    (partial(alexnet_small, image_size=4), "from 8 to 64, not 4"),
    (partial(four_layer_cnn, activation="elu"), "unknown activation 'elu'; known: relu, tanh"),
    (partial(four_layer_cnn, image_size=7), "at least 8, not 7"),
    (partial(binarynet, padding="full"), "unknown padding 'full'; known: valid, same"),
    (partial(binarynet, image_size=8), "image_size 8 is too small for 3 poolings"),
    (partial(binarynet, padding_value=0.5), "padding_value"),
    (partial(birealnet20, shortcut="conv"), "known: pool-conv, pool-binary, pad"),
    (partial(birealnet20, widths=()), r"widths: positive integers, not \(\)"),
    (partial(BiRealBlock, 4, 4, shortcut="none"), "unknown shortcut 'none'"),
    (partial(reactnet_small, channels=(4, 6)), "a block makes 4 or 8 channels of 4, not 6"),
    (partial(expertnet, stem="7x7"), "unknown stem '7x7'; known: 3x3, light"),
    *[(partial(expertnet, stem="light", width=width), f"even and at least 4, not {width}")
      for width in (1, 2, 5)],
    (partial(expertnet, experts=0), "experts: positive integers, not 0"),
    (partial(expertnet, experts=2.0), "experts: positive integers, not 2.0"),
    (partial(expertnet, blocks=(1, 1)), "groups: 2 numbers, not 4"),
    (partial(expertnet, groups=(1, 1, 1, 0)), "groups: positive integers"),
    (partial(parse_architecture, "1262-2"), "'1262-2' is no architecture; .* '1262-2-4:8:8:16'"),
    (partial(parse_architecture, "12-2-4"), "groups: 2 numbers, not 1"),
    (partial(parse_architecture, "10-2-4:8"), "blocks: positive integers"),
    (partial(architecture_name, (1, 2), 0, (1, 1)), "expansion: positive integers"),
    (partial(architecture_name, (10, 2), 1, (1, 1)), r"at most 9 in a stage, .* not \(10, 2\)"),
])  # fmt: skip
def test_wrong_arguments(network, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        network()


@pytest.mark.parametrize(
    "network", [binarynet, birealnet18, birealnet20, reactnet_small, expertnet]
)
@pytest.mark.parametrize("argument", ["weight_quantizer", "input_quantizer"])
def test_a_quantizer_is_a_function(network, argument):
    message = f"{argument} must be a function such as binarize.ste_sign, or None, not a str"
    with torch.device("meta"), pytest.raises(TypeError, match=message):
        network(**{argument: "sign"})


@pytest.mark.parametrize("options", [{"width": 16}, {"blocks": (2, 1)}, {"data_driven": True}])
def test_networks_that_differ_in_more_than_their_experts(options):
    same = {"width": 8, "blocks": (1, 1), "groups": (1, 1)}
    several, one = expertnet(**same), expertnet(**(same | options), experts=1)
    before = {name: value.clone() for name, value in several.state_dict().items()}
    with pytest.raises(ValueError, match="the networks differ in more than their experts: "):
        load_one_expert(several, one)
    assert all(torch.equal(value, before[name]) for name, value in several.state_dict().items())


def test_everything_public_is_exported():
    assert sorted(models.__all__) == models.__all__
    assert all(callable(getattr(models, name)) for name in models.__all__)


@pytest.mark.parametrize("name", ["bireal", "bireal, binary", "one expert"])
def test_gradients_keep_the_layout_of_channels_last(name):
    """One contiguous gradient, such as that of torch's mean, would spread over a residual path."""
    torch.manual_seed(0)
    net = SMALL[name]().to(memory_format=torch.channels_last)
    layouts = []

    def note(module, inputs, outputs):
        if outputs.dim() == 4 and min(outputs.shape[1:]) > 1:  # else both layouts are one
            outputs.register_hook(
                lambda g: layouts.append(g.is_contiguous(memory_format=torch.channels_last))
            )

    for module in net.modules():
        module.register_forward_hook(note)
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    net(x).square().sum().backward()
    assert len(layouts) > 5
    assert all(layouts)


def test_order_of_layers_in_binaryconnects_networks():
    """Batch norm and ReLU follow the pooling; the output has batch norm and no ReLU."""
    linear, conv = ["BinaryLinear", "BatchNorm1d"], ["BinaryConv2d", "BatchNorm2d", "ReLU"]
    pooled = ["BinaryConv2d", "MaxPool2d", "BatchNorm2d", "ReLU"]
    names = [type(layer).__name__ for layer in binaryconnect_mlp(4, (3, 3), 2)]
    assert names == ["Flatten", *[*linear, "ReLU"] * 2, *linear]
    names = [type(layer).__name__ for layer in binaryconnect_cnn(widths=(2, 2), hidden=3)]
    assert names == [*(conv + pooled) * 2, "Flatten", *[*linear, "ReLU"] * 2, *linear]


@pytest.mark.parametrize(("network", "message"), [
    (lambda: binaryconnect_mlp(hidden=()), "hidden: positive integers"),
    (lambda: binaryconnect_cnn(widths=(8, 8, 8), image_size=4), "image_size must be at least 8"),
])  # fmt: skip
def test_binaryconnects_networks_refuse_what_would_be_empty(network, message):
    with pytest.raises(ValueError, match=message):
        network()


@pytest.mark.parametrize(("quantizer", "macs"), [
    (torch.relu, 16), (hard_sigmoid, 16), (lambda x: dorefa_activation(x, 4), 16),
    (partial(dorefa_activation, bits=2), 16), (dorefa_activation, 0), (ste_sign, 0), (None, 16),
])  # fmt: skip
def test_operations_are_binary_only_when_the_input_has_two_values(quantizer, macs):
    model = nn.Sequential(BinaryLinear(4, 4, input_quantizer=quantizer))
    total = summary(model, (4,)).loc["total"]
    assert (total["macs"], total["bops"]) == (macs, 16 - macs)


def test_a_shared_weight_is_stored_once_and_multiplied_twice():
    first, second = BinaryLinear(8, 8), BinaryLinear(8, 8)
    second.weight = first.weight
    total = summary(nn.Sequential(first, second), (8,)).loc["total"]
    assert (total["parameters"], total["bits"], total["macs"]) == (64, 64, 128)


def test_one_expert_of_latent_weights_does_not_get_into_a_binary_network():
    options = {"width": 8, "groups": (1,) * 4, "blocks": (1,) * 4}
    model = expertnet(experts=2, weight_quantizer=None, **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="must be exactly ±1"):
        load_one_expert(model, expertnet(experts=1, **options))
    binary = {name for name, module in model.named_modules() if isinstance(module, BinaryLayer)}
    for name in binary:
        assert torch.equal(model.state_dict()[f"{name}.weight"], before[f"{name}.weight"])


@pytest.mark.parametrize(("kind", "image"), [(nn.Conv1d, (2, 30)), (nn.Conv3d, (2, 4, 4, 4))])
def test_convolutions_of_other_dimensions_are_counted(kind, image):
    """As the page on one's own code makes a layer."""

    class Layer(BinaryLayer, kind):
        def forward(self, x):
            x, weight = self.quantized_input(x), self.binary_weight()
            return self._conv_forward(x, weight, self.bias)

    layer = Layer(2, 8, 3, padding=1, bias=False)
    layer.set_quantizers(weight_quantizer=None, input_quantizer=ste_sign)
    row = summary(nn.Sequential(layer), image).iloc[0]
    kernel, places = 3 ** (len(image) - 1), np.prod(image[1:])
    assert row.bops == 2 * 8 * kernel * places
    assert row.bits == 2 * 8 * kernel


class ScaledSign(nn.Module):
    """A quantizer with a learned scale for each output of a linear layer."""

    def __init__(self, outputs):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(outputs, 1))

    def forward(self, weight):
        return self.scale * ste_sign(weight)


def xnor(weight):
    """XNOR-Net's quantizer, which asks for the dimensions of a convolution's weight."""
    return ste_sign(weight) * weight.detach().abs().mean((1, 2, 3), keepdim=True)


@pytest.mark.parametrize(("layer", "shape"), [
    (BinaryConv2d(3, 5, 3, weight_quantizer=xnor), (3, 8, 8)),
    (ExpertBinaryConv2d(3, 5, 3, weight_quantizer=xnor), (3, 8, 8)),
    (BinaryLinear(8, 5, weight_quantizer=ScaledSign(5)), (8,)),
])  # fmt: skip
def test_a_weight_quantizer_may_have_one_scale_for_each_channel(layer, shape):
    total = models.summary(nn.Sequential(layer), shape).loc["total"]
    real = sum(p.numel() for p in layer.parameters()) - layer.weight.numel()
    assert total.bits == layer.weight.numel() + 32 * real


def test_sizes_may_be_integers_of_numpy():
    assert binarynet(np.int64(10), widths=(np.int32(8),), hidden=(16,), image_size=16)
