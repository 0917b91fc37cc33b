"""Binary layers: what is multiplied, what is trained, and what the loss is."""

import copy
from functools import partial

import numpy as np
import pytest
import reference
import torch
from torch import nn

from bnnbook import layers
from bnnbook.binarize import magnitude_aware_sign, real_weight, sign, ste_sign, stochastic_sign
from bnnbook.models import binaryconnect_mlp
from bnnbook.optim import split_parameters

LAYERS = [
    (layers.BinaryLinear, (6, 4), (5, 6)),
    (layers.BinaryConv2d, (3, 4, 3), (5, 3, 8, 8)),
]


@pytest.mark.parametrize(("kind", "arguments", "shape"), LAYERS)
@pytest.mark.parametrize("quantizer", [ste_sign, stochastic_sign, None])
def test_weights_multiplied_with_are_exactly_plus_minus_one(kind, arguments, shape, quantizer):
    layer = kind(*arguments, weight_quantizer=quantizer)
    assert layer.binary_weight().abs().eq(1).all()
    assert (layer.weight.abs() == 1).all() == (quantizer is None)


@pytest.mark.parametrize(("kind", "arguments", "shape"), LAYERS)
def test_forward_is_the_real_layer_on_binary_weights(kind, arguments, shape):
    x = torch.randn(shape)
    layer = kind(*arguments, bias=True)
    plain = nn.Linear(*arguments) if len(shape) == 2 else nn.Conv2d(*arguments)
    plain.load_state_dict({"weight": layer.binary_weight().detach(), "bias": layer.bias.detach()})
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize(("kind", "arguments", "shape"), LAYERS)
def test_latent_gradient_is_the_binary_weights_gradient(kind, arguments, shape):
    identity = lambda w: ste_sign(w, clip_value=None)  # noqa: E731
    layer = kind(*arguments, weight_quantizer=identity)
    with torch.no_grad():
        layer.weight[0] = 1.0  # also at the very edge
        layer.weight[1] = -3.0  # and beyond it
    x = torch.randn(shape)
    binary = layer.binary_weight().detach().requires_grad_()
    plain = nn.functional.linear if len(shape) == 2 else nn.functional.conv2d
    plain(x, binary).square().sum().backward()
    layer(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, binary.grad)


@pytest.mark.parametrize(("kind", "arguments", "shape"), LAYERS)
def test_binary_inputs(kind, arguments, shape):
    x = torch.randn(shape)
    layer = kind(*arguments, input_quantizer=ste_sign)
    assert torch.equal(layer(x), layer(x.sign()))


class Scaled(nn.Module):
    """A quantizer that learns."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, w):
        return self.scale * ste_sign(w)


def test_a_quantizer_may_be_a_module_with_parameters():
    layer = layers.BinaryLinear(3, 2, weight_quantizer=Scaled())
    layer(torch.randn(4, 3)).sum().backward()
    assert layer.weight_quantizer.scale.grad is not None
    assert layer.binary_weight().abs().eq(2).all()


@pytest.mark.parametrize("make", [
    lambda **q: layers.BinaryLinear(3, 3, **q),
    lambda **q: layers.ExpertBinaryConv2d(3, 3, 3, **q),  # has another module inside
])  # fmt: skip
def test_another_quantizer_may_take_the_place_of_a_module(make):
    model = nn.Sequential(make(weight_quantizer=Scaled(), input_quantizer=Scaled()))
    (before,) = model
    quantizers, keys = (before.weight_quantizer, before.input_quantizer), list(model.state_dict())
    for other in (real_weight, Scaled()):
        with layers.quantized_by(model, other):
            assert before.weight_quantizer is other
            assert torch.equal(before.binary_weight(), other(before.weight))
        assert (before.weight_quantizer, before.input_quantizer) == quantizers
        assert sorted(model.state_dict()) == sorted(keys)
    before.set_quantizers(ste_sign, None)
    assert not [key for key in model.state_dict() if "scale" in key]
    assert before.binary_weight().abs().eq(1).all()
    before.set_quantizers(*quantizers)
    assert list(model.state_dict()) == keys
    before.set_quantizers(None, before.input_quantizer)
    assert sorted(set(keys) - set(model.state_dict())) == ["0.weight_quantizer.scale"]


@pytest.mark.parametrize("options", [{}, {"weight_quantizer": None, "input_quantizer": ste_sign}])
def test_a_layer_of_ones_own(options):
    """As the docstring of BinaryLayer says, here without a bias."""

    class BinaryBilinear(layers.BinaryLayer, nn.Module):
        def __init__(self, weight_quantizer=ste_sign, input_quantizer=None):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(1, 4, 5))
            self.set_quantizers(weight_quantizer, input_quantizer)
            self.reset_parameters()

        def forward(self, x):
            x = self.quantized_input(x)
            return nn.functional.bilinear(x[:, :4], x[:, 4:], self.binary_weight())

    torch.manual_seed(0)
    model = nn.Sequential(BinaryBilinear(**options), nn.Linear(1, 2))
    binary, real = split_parameters(model)
    assert [p is model[0].weight for p in binary] == [True]
    assert len(list(real)) == 2
    assert (model[0].weight.abs() == 1).all() == ("weight_quantizer" in options)
    model(torch.randn(6, 9)).square().sum().backward()
    assert model[0].weight.grad.all()
    assert "quantizer=ste_sign" in repr(model)


def test_state_dict_round_trip():
    first, second = layers.BinaryLinear(4, 3), layers.BinaryLinear(4, 3)
    assert list(first.state_dict()) == ["weight"]
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.binary_weight(), second.binary_weight())


def test_a_layer_without_latent_weights_notices_when_it_is_given_some():
    latent = nn.Sequential(layers.BinaryLinear(4, 3))
    free = nn.Sequential(layers.BinaryLinear(4, 3, weight_quantizer=None))
    with pytest.raises(RuntimeError, match=r"0\.weight must be exactly ±1 without a weight_quant"):
        free.load_state_dict(latent.state_dict())
    latent[0].set_quantizers(None, None)  # the way that the message names
    free.load_state_dict(latent.state_dict())
    assert torch.equal(free[0].weight, latent[0].weight)
    free.load_state_dict({}, strict=False)


def test_initial_latent_weights():
    layer = layers.BinaryLinear(200, 300)
    assert -1 < layer.weight.min() < -0.99
    assert 0.99 < layer.weight.max() < 1
    layer.reset_parameters(bound=2.0)
    assert layer.weight.abs().eq(1).float().mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("kind", "arguments", "shape"), [
    *LAYERS, (layers.ExpertBinaryConv2d, (3, 4, 3), (5, 3, 8, 8))])  # fmt: skip
def test_biases_are_off_by_default_and_start_at_zero(kind, arguments, shape):
    assert kind(*arguments).bias is None
    layer = kind(*arguments, bias=True)
    assert not layer.bias.any()
    nn.init.ones_(layer.bias)
    layer.reset_parameters()
    assert not layer.bias.any()


def test_repr_names_the_quantizers():
    assert "weight_quantizer=ste_sign" in repr(layers.BinaryLinear(2, 2))
    assert "weight_quantizer=ste_sign" in repr(binaryconnect_mlp())
    assert "input_quantizer" not in repr(layers.BinaryLinear(2, 2))


@pytest.mark.parametrize(("quantizer", "shown"), [
    (partial(ste_sign, clip_value=2.0), "ste_sign(clip_value=2.0)"),
    (partial(stochastic_sign, generator=torch.Generator()),
     "stochastic_sign(generator=Generator)"),
    (partial(ste_sign, surrogate=nn.functional.hardtanh), "ste_sign(surrogate=hardtanh)"),
    (partial(ste_sign, surrogate=partial(ste_sign, clip_value=2)),
     "ste_sign(surrogate=ste_sign(clip_value=2))"),
    (partial(ste_sign, surrogate=nn.Softshrink(2)), "ste_sign(surrogate=Softshrink(2))"),
    (partial(ste_sign, surrogate=object()), "ste_sign(surrogate=object)"),
])  # fmt: skip
def test_a_repr_names_no_place_in_memory(quantizer, shown):
    """A network's repr tells whose a checkpoint is, in another process, too."""
    assert f"weight_quantizer={shown}" in repr(
        layers.BinaryLinear(2, 2, weight_quantizer=quantizer)
    )


def test_clipping_touches_latent_weights_only():
    model = nn.Sequential(layers.BinaryLinear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-7.0)
    layers.clip_latent_weights(model)
    assert model[0].weight.eq(-1).all()
    assert model[1].weight.eq(-7).all()
    layers.clip_latent_weights(model, bound=0.25)
    assert model[0].weight.eq(-0.25).all()


def test_clipping_leaves_weights_without_a_quantizer_at_plus_minus_one():
    model = nn.Sequential(layers.BinaryLinear(3, 3, weight_quantizer=None))
    layers.clip_latent_weights(model, bound=0.25)
    assert model[0].weight.abs().eq(1).all()


def test_a_weight_that_is_computed_from_others_cannot_be_clipped():
    model = nn.Sequential(layers.BinaryLinear(3, 3))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(TypeError, match="ParametrizedBinaryLinear's weight is computed from oth"):
        layers.clip_latent_weights(model)


def test_quantized_by_restores_the_quantizers_also_after_an_error():
    model = binaryconnect_mlp(4, (5,), 2, weights="stochastic")
    weight = model[1].weight
    with layers.quantized_by(model, real_weight):
        assert torch.equal(model[1].binary_weight(), weight)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), layers.quantized_by(model, ste_sign):
        model(torch.zeros(2, 9))
    assert model[1].weight_quantizer is stochastic_sign


def test_quantized_by_leaves_magnitude_free_weights_alone():
    model = nn.Sequential(layers.BinaryLinear(3, 3, weight_quantizer=None))
    with layers.quantized_by(model, real_weight):
        assert model[0].weight_quantizer is None


@pytest.mark.parametrize("model", [
    layers.BinaryLinear(3, 3), nn.Sequential(layers.BinaryLinear(3, 3, weight_quantizer=None)),
])  # fmt: skip
def test_no_quantizer_is_not_another_quantizer(model):
    before = [layer.weight_quantizer for layer in layers.binary_layers(model)]
    with pytest.raises(TypeError, match=r"real_weight runs"), layers.quantized_by(model, None):
        pass
    assert [layer.weight_quantizer for layer in layers.binary_layers(model)] == before


def test_latent_weights_are_not_multiplied_with_for_want_of_a_quantizer():
    layer = layers.BinaryLinear(6, 4)
    for copied in (layer, copy.deepcopy(layer)):
        with pytest.raises(ValueError, match=r"exactly ±1; set_quantizers\(None, \.\.\.\)"):
            copied.weight_quantizer = None
        assert copied.binary_weight().abs().eq(1).all()
    layer.set_quantizers(None, ste_sign)
    layer.weight_quantizer = layer.input_quantizer = None
    assert layer.weight.abs().eq(1).all()


@pytest.mark.parametrize(("kind", "arguments", "shape"), [
    *LAYERS, (layers.ExpertBinaryConv2d, (3, 4, 3), (5, 3, 8, 8))])  # fmt: skip
@pytest.mark.parametrize("quantizer", [ste_sign, None])
def test_layers_are_made_on_a_device_and_in_a_type(kind, arguments, shape, quantizer):
    options = {"weight_quantizer": quantizer, "bias": True}
    layer = kind(*arguments, **options, device="cpu", dtype=torch.float64)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert layer(torch.randn(shape, dtype=torch.float64)).dtype == torch.float64
    empty = nn.utils.skip_init(kind, *arguments, **options, dtype=torch.float64)
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty.binary_weight(), layer.binary_weight())
    assert {p.device.type for p in kind(*arguments, device="meta").parameters()} == {"meta"}


# --- A real network made binary ------------------------------------------------------------------


def manual_twin(real, weight_quantizer, input_quantizer):
    """A real layer as a binary one, with its weights copied number by number."""
    options = {"weight_quantizer": weight_quantizer, "input_quantizer": input_quantizer}
    options["bias"] = real.bias is not None
    if isinstance(real, nn.Linear):
        twin = layers.BinaryLinear(real.in_features, real.out_features, **options)
    else:
        geometry = {name: getattr(real, name) for name in layers.GEOMETRY}
        twin = layers.BinaryConv2d(real.in_channels, real.out_channels, real.kernel_size,
                                   **geometry, **options)  # fmt: skip
    state = {name: p.detach().clone() for name, p in real.named_parameters()}
    if weight_quantizer is None:
        state["weight"] = torch.where(state["weight"] >= 0, 1.0, -1.0).to(state["weight"])
    twin.double().load_state_dict(state)
    return twin


INNER = [
    (nn.Linear(6, 4), (5, 6)),
    (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 9)),
    (nn.Conv2d(4, 4, 3, dilation=2, padding=3, bias=False), (2, 4, 9, 9)),
    (nn.Conv2d(4, 4, (1, 3), stride=2, padding="valid"), (2, 4, 9, 9)),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), (2, 4, 9, 9)),
    (nn.Conv2d(4, 4, 3, padding="same"), (2, 4, 9, 9)),
]


@pytest.mark.parametrize(("real", "shape"), INNER)
@pytest.mark.parametrize("quantizer", [ste_sign, magnitude_aware_sign, None])
def test_a_layer_made_binary_keeps_its_weights_and_its_geometry(real, shape, quantizer):
    real = copy.deepcopy(real).double()
    x = torch.randn(shape, dtype=torch.float64)
    draws = torch.get_rng_state()
    q = {"weight_quantizer": quantizer, "input_quantizer": ste_sign}
    binary = layers.binarized(real, lambda name, layer: True, **q)
    assert torch.equal(torch.get_rng_state(), draws)
    assert torch.equal(sign(binary.weight), sign(real.weight))
    assert torch.equal(binary.weight, real.weight) == (quantizer is not None)
    assert torch.equal(binary(x), manual_twin(real, *q.values())(x))


def real_network():
    torch.manual_seed(0)
    inner = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), inner, nn.BatchNorm2d(4), inner, nn.Flatten())
    return network.extend([nn.Linear(144, 7), nn.Linear(7, 2)])


def test_all_but_the_first_and_the_last_layer_become_binary_in_a_copy():
    network = real_network().eval()
    network[1].weight.requires_grad_(False).data = network[1].weight.bfloat16()
    network[1].train()
    binary = layers.binarized(network)
    kinds = [type(layer) for layer in binary if "weight" in dict(layer.named_parameters())]
    assert kinds == [nn.Conv2d, layers.BinaryConv2d, nn.BatchNorm2d, layers.BinaryConv2d,
                     layers.BinaryLinear, nn.Linear]  # fmt: skip
    assert binary[1] is binary[3]  # used twice, as before
    assert [m.training for m in binary.modules()] == [m.training for m in network.modules()]
    pairs = list(zip(binary.named_parameters(), network.named_parameters(), strict=True))
    for (name, ours), (theirs_name, theirs) in pairs:
        assert (name, ours.requires_grad, ours.dtype) == (
            theirs_name, theirs.requires_grad, theirs.dtype)  # fmt: skip
        assert torch.equal(ours, theirs)
        assert ours is not theirs
    assert not any(layers.binary_layers(network))


def test_a_layer_made_binary_sees_real_inputs_by_default():
    binary = layers.binarized(real_network().double())
    x = torch.randn(2, 144, dtype=torch.float64)
    expected = nn.functional.linear(x, sign(binary[5].weight), binary[5].bias)
    assert torch.equal(binary[5](x), expected)


def test_where_chooses_the_layers_that_become_binary():
    from torchvision.models import mobilenet_v2

    network = mobilenet_v2(num_classes=10)  # its convolutions have groups
    small = lambda name, layer: getattr(layer, "kernel_size", 0) == (3, 3)  # noqa: E731
    binary = layers.binarized(network, small)
    assert len(list(layers.binary_layers(binary))) == 18
    last = layers.binarized(network, lambda name, layer: name == "classifier.1")
    assert [name for name, m in last.named_modules()
            if isinstance(m, layers.BinaryLayer)] == ["classifier.1"]  # fmt: skip


def hooked():
    network = real_network()
    network[5].register_forward_hook(lambda *_: None)
    return network


@pytest.mark.parametrize(("network", "where", "message"), [
    (real_network(), lambda name, layer: False, "must choose among 0, 1, 5, 6; by default"),
    (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), None, "must choose among 0, 1"),
    (nn.ReLU(), None, "must choose among the linear layers and convolutions"),
    (nn.MultiheadAttention(4, 2), lambda name, layer: True, r"leave out out_proj \(NonDyn"),
    (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), lambda name, layer: True, "Param"),
    (hooked(), None, r"parts of its own, can become binary; let where leave out 5 \(Linear\)"),
    (layers.binarized(real_network()), None, "must choose among 0, 6"),
])  # fmt: skip
def test_what_cannot_become_binary_is_named(network, where, message):
    with pytest.raises(ValueError, match=message):
        layers.binarized(network, where)


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_squared_hinge_loss(reduction):
    generator = np.random.default_rng(0)
    outputs, targets = generator.normal(size=(7, 5)), generator.integers(0, 5, 7)
    outputs[0] = [1, -1, 2, -2, 0]  # on the hinge, beyond it, and in the middle
    expected = reference.squared_hinge(outputs, targets)
    expected = expected.mean() if reduction == "mean" else expected.sum(1).mean()
    loss = layers.SquaredHingeLoss(reduction)(torch.tensor(outputs), torch.tensor(targets))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("targets", [torch.zeros(2).long(), torch.zeros(4, 1).long()])
def test_squared_hinge_loss_needs_a_target_for_each_output(targets):
    with pytest.raises(ValueError, match=r"targets \(N,\), not \(4, 3\)"):
        layers.SquaredHingeLoss()(torch.zeros(4, 3), targets)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squared_hinge_loss_of_half_precision_does_not_overflow(dtype):
    outputs, targets = torch.tensor([[304.0, 0.0]]), torch.tensor([0])
    loss = layers.SquaredHingeLoss()
    assert loss(outputs.to(dtype), 1 - targets) == loss(outputs, 1 - targets) == (305**2 + 1) / 2


def test_squared_hinge_loss_refuses_an_unknown_reduction():
    with pytest.raises(ValueError, match="known: 'mean', 'batchmean'"):
        layers.SquaredHingeLoss("sum")


def test_algorithm_1_agrees_bit_for_bit_with_its_literal_twin():
    """Hundreds of steps in float64 on small integers: every sum is exact, so bits must agree."""
    generator = np.random.default_rng(0)
    x = generator.integers(-3, 4, (16, 12)).astype(float)
    targets = generator.integers(0, 4, 16)
    w = generator.integers(-8, 9, (4, 12)) / 8
    latent, history = reference.binaryconnect_linear(w, x, targets, rate=1 / 64, steps=300)

    layer = layers.BinaryLinear(12, 4, weight_quantizer=lambda v: ste_sign(v, None)).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(w))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1 / 64)
    loss = layers.SquaredHingeLoss()
    for binary in history:
        optimizer.zero_grad()
        loss(layer(torch.tensor(x)), torch.tensor(targets)).backward()
        optimizer.step()
        layers.clip_latent_weights(layer)
        assert torch.equal(layer.binary_weight(), torch.tensor(binary))
    assert torch.equal(layer.weight, torch.tensor(latent))
    assert (np.diff(history, axis=0) != 0).sum() > 20  # it did learn


# --- The convolution's border ------------------------------------------------------------------


def convolve(x, weight, stride=1, padding=0, groups=1, value=0.0, dilation=1):
    """A convolution of one sample, x (C, H, W), weight (O, C / groups, kh, kw), spelled out."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)), constant_values=value)
    outputs, inputs = weight.shape[:2]
    kh, kw = (dilation * (k - 1) + 1 for k in weight.shape[2:])
    shape = [(size - k) // stride + 1 for size, k in zip(x.shape[1:], (kh, kw), strict=True)]
    y = np.zeros((outputs, *shape))
    for o, i, j in np.ndindex(y.shape):
        first = o // (outputs // groups) * inputs  # this output's group of input channels
        patch = x[
            first : first + inputs, i * stride : i * stride + kh, j * stride : j * stride + kw
        ]
        y[o, i, j] = (patch[:, ::dilation, ::dilation] * weight[o]).sum()
    return y


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
@pytest.mark.parametrize(("stride", "groups", "dilation"), [(1, 1, 1), (2, 2, 1), (1, 2, 2)])
def test_the_border_is_padded_after_the_input_is_quantized(stride, groups, dilation, value):
    layer = layers.BinaryConv2d(4, 6, 3, stride=stride, padding=1, groups=groups, bias=True,
                                dilation=dilation, input_quantizer=ste_sign,
                                padding_value=value)  # fmt: skip
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 4, 5, 6)
    weight = layer.binary_weight().detach().numpy()
    expected = [convolve(np.where(sample >= 0, 1, -1), weight, stride, 1, groups, value, dilation)
                for sample in x.numpy()]  # fmt: skip
    expected += layer.bias.detach().numpy()[:, None, None]
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("padding", ["same", "valid", (1, 2), 0])
def test_a_zero_border_is_torchs_own(padding):
    """A binary border of -1 is one of 0, less what a border of ones would add."""
    x = torch.randn(2, 3, 6, 7)
    make = {v: layers.BinaryConv2d(3, 4, (3, 5), padding=padding, padding_value=v)
            for v in (0, 1, -1)}  # fmt: skip
    for layer in make.values():
        layer.load_state_dict(make[0].state_dict())
    plain = nn.functional.conv2d(x, make[0].binary_weight(), padding=padding)
    assert torch.equal(make[0](x), plain)
    torch.testing.assert_close((make[1](x) + make[-1](x)) / 2, plain)
    assert torch.equal(make[1](x), make[-1](x)) == (padding in ("valid", 0))


def test_only_a_binary_border_keeps_the_input_binary():
    x = torch.full((1, 1, 3, 3), -0.5)
    ones = {v: layers.BinaryConv2d(1, 1, 3, padding=1, input_quantizer=ste_sign, padding_value=v)
            for v in (0, 1, -1)}  # fmt: skip
    for layer in ones.values():
        nn.init.ones_(layer.weight)
    # at a corner 4 of 9 places lie inside: sums of nine numbers of ±1 are odd
    assert {v: layer(x)[0, 0, 0, 0].item() for v, layer in ones.items()} == {0: -4, 1: 1, -1: -9}


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("kind", [layers.BinaryConv2d, layers.ExpertBinaryConv2d])
def test_a_border_of_the_input_itself(kind, mode, dilation):
    """It stays binary, as the quantized input is."""
    layer = kind(2, 3, 3, padding="same", dilation=dilation, padding_mode=mode,
                 input_quantizer=ste_sign)  # fmt: skip
    x = torch.randn(2, 2, 5, 6)
    chosen = layer.selected(x).tolist() if hasattr(layer, "experts") else [...] * 2
    names = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    expected = []
    for sample, k in zip(x.numpy(), chosen, strict=True):
        around = np.pad(sample, ((0, 0), *[(dilation, dilation)] * 2), mode=names[mode])
        weight = layer.binary_weight()[k].detach().numpy()
        expected.append(convolve(np.where(around >= 0, 1, -1), weight, dilation=dilation))
    assert layer(x).tolist() == np.array(expected).tolist()


def test_a_border_is_a_number_or_a_mode():
    with pytest.raises(ValueError, match="padding_value=1 needs padding_mode='zeros', not 'refl"):
        layers.BinaryConv2d(1, 1, 3, padding=1, padding_mode="reflect", padding_value=1)


@pytest.mark.parametrize("value", [0.5, 2, float("nan"), None])
def test_other_borders_are_refused(value):
    with pytest.raises(ValueError, match="padding_value must be 0, 1 or -1"):
        layers.BinaryConv2d(1, 1, 3, padding=1, padding_value=value)


def test_repr_names_a_border_that_is_not_torchs():
    assert "padding_value" not in repr(layers.BinaryConv2d(1, 1, 3))
    assert "padding_value=1.0" in repr(layers.BinaryConv2d(1, 1, 3, padding_value=1.0))


# --- Experts -----------------------------------------------------------------------------------

EXPERT_OPTIONS = [
    {},
    {"groups": 2, "stride": 2, "padding": 1},
    {"padding": 1, "padding_value": 1.0, "bias": True, "experts": 2},
    {"padding": 1, "padding_value": -1.0, "groups": 4, "experts": 7},
    {"padding": "same", "bias": True, "experts": 1},
    {"padding": 1, "dilation": 2, "padding_value": 1.0},
    {"weight_quantizer": magnitude_aware_sign, "input_quantizer": None},
    {"weight_quantizer": None},
]


def expert_layer(in_channels=4, out_channels=8, seed=0, **options):
    """An expert convolution whose gate splits a batch."""
    torch.manual_seed(seed)
    layer = layers.ExpertBinaryConv2d(in_channels, out_channels, 3, **options).double()
    nn.init.normal_(layer.gate.weight, std=3.0)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def inputs(samples=6, channels=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, channels, 5, 6, generator=generator, dtype=torch.float64)


def winners(layer, x):
    """Each sample's expert, from the mean of the real input; the first of equal scores."""
    scores = x.numpy().mean((2, 3)) @ layer.gate.weight.detach().numpy().T
    scores = scores + layer.gate.bias.detach().numpy()
    return [max(range(layer.experts), key=lambda k: (row[k], -k)) for row in scores]


@pytest.mark.parametrize("samples", [1, 6])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", EXPERT_OPTIONS)
def test_each_sample_meets_its_own_expert(options, training, samples):
    layer, x = expert_layer(**options).train(training), inputs(samples)
    chosen = winners(layer, x)
    assert samples == 1 or layer.experts == 1 or len(set(chosen)) > 1
    assert layer.selected(x).tolist() == chosen
    quantizer = layer.weight_quantizer or real_weight
    padding = 1 if options.get("padding") == "same" else options.get("padding", 0)
    expected = []
    for sample, k in zip(x, chosen, strict=True):
        # here selected, then binarised; in the layer the other way round
        weight = quantizer(layer.weight[k]).detach().numpy()
        seen = layer.quantized_input(sample).numpy()
        expected.append(convolve(seen, weight, layer.stride[0], padding, layer.groups,
                                 layer.padding_value, layer.dilation[0]))  # fmt: skip
    expected = np.array(expected)
    if layer.bias is not None:
        expected += layer.bias.detach().numpy()[:, None, None]
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-10)


def test_the_gate_sees_the_real_input_and_not_its_signs():
    layer = expert_layer(1, 1, experts=2)
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        layer.gate.bias.zero_()
    x = torch.full((1, 1, 3, 3), -0.1, dtype=torch.float64)
    x[0, 0, 0, 0] = 9.0  # the mean of the signs is negative, that of the input positive
    assert layer.selected(x).tolist() == [0]


def test_of_equal_scores_the_first_wins_alone():
    layer, x = expert_layer(experts=5), inputs()
    nn.init.zeros_(layer.gate.weight)
    with torch.no_grad():
        layer.gate.bias.copy_(torch.tensor([-1.0, 2.0, 0.0, 2.0, 2.0]))
    assert layer.selected(x).tolist() == [1] * 6
    plain = nn.functional.conv2d(ste_sign(x), layer.binary_weight()[1])
    torch.testing.assert_close(layer(x), plain)


@pytest.mark.parametrize("temperature", [0.02, 1.0, 25.0])
def test_the_gates_gradient_is_that_of_a_softmax(temperature):
    scores = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    one_hot = layers._WinnerTakesAll.apply(scores, torch.eye(4, dtype=torch.float64), temperature)
    assert one_hot.tolist() == np.eye(4)[scores.detach().numpy().argmax(1)].tolist()
    upstream = torch.randn(6, 4, dtype=torch.float64)
    (slope,) = torch.autograd.grad(one_hot, scores, upstream)
    for n in range(6):
        z = np.exp((scores[n].detach().numpy() - scores[n].max().item()) / temperature)
        s = z / z.sum()
        jacobian = (np.diag(s) - np.outer(s, s)) / temperature  # equation 4
        np.testing.assert_allclose(slope[n], jacobian @ upstream[n].numpy(), atol=1e-12)
        np.testing.assert_allclose(jacobian @ np.ones(4), 0, atol=1e-12)
        fired = one_hot[n].detach().numpy()
        assert not (np.diag(fired) - np.outer(fired, fired)).any()  # equation 4 read literally


@pytest.mark.parametrize("options", EXPERT_OPTIONS)
def test_gradients_are_those_of_the_winner_and_of_a_soft_mixture_for_the_gate(options):
    layer, x = expert_layer(temperature=2.0, **options), inputs().requires_grad_()
    upstream = torch.randn_like(layer(x))
    parameters = [x, *layer.parameters()]
    found = torch.autograd.grad(layer(x), parameters, upstream)
    scores, experts = layer.gate(x.mean((2, 3))), layer.binary_weight()
    outputs = []
    for n, k in enumerate(winners(layer, x.detach())):
        mixture = torch.einsum("e,e...", (scores[n] / 2).softmax(0), experts.detach())
        weight = experts[k] + mixture - mixture.detach()  # adds 0, and the gate's gradient
        seen = layer.quantized_input(x[n : n + 1])
        if layer.padding_value:
            seen = nn.functional.pad(seen, [1] * 4, value=layer.padding_value)
        outputs.append(nn.functional.conv2d(
            seen, weight, layer.bias, layer.stride, 0 if layer.padding_value else layer.padding,
            layer.dilation, layer.groups))  # fmt: skip
    expected = torch.autograd.grad(torch.cat(outputs), parameters, upstream)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_only_winners_learn_but_every_gate_does():
    layer, x = expert_layer(experts=5), inputs(2)
    layer(x).square().sum().backward()
    chosen = set(winners(layer, x))
    assert 0 < len(chosen) < 5
    assert [bool(g.any()) for g in layer.weight.grad] == [k in chosen for k in range(5)]
    assert layer.gate.weight.grad.any(1).all()
    assert layer.gate.bias.grad.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("quantizer", [ste_sign, magnitude_aware_sign])
@pytest.mark.parametrize("experts", [2, 4, 9])
def test_equal_experts_leave_the_gate_alone(experts, quantizer, dtype):
    """Whatever the gate says the output is the same, and the gate's gradient exactly zero."""
    layer = expert_layer(experts=experts, weight_quantizer=quantizer).to(dtype)
    x = inputs(16).to(dtype)
    second = layer.weight[1].clone()
    gate = layer.gate.weight.clone()
    layer.replicate(1)
    assert all(torch.equal(weight, second) for weight in layer.weight)
    assert torch.equal(layer.gate.weight, gate)
    before = layer(x)
    before.square().sum().backward()
    assert layer.weight.grad.any()
    assert not layer.gate.weight.grad.any()
    assert not layer.gate.bias.grad.any()
    nn.init.normal_(layer.gate.weight)
    assert torch.equal(layer(x), before)


def test_the_first_expert_is_replicated_by_default():
    layer = layers.ExpertBinaryConv2d(2, 3, 3, experts=3)
    first = layer.weight[0].clone()
    layer.replicate()
    assert all(torch.equal(weight, first) for weight in layer.weight)


def test_a_soft_mixture_of_binary_weights_is_not_binary():
    layer = expert_layer(experts=4)
    soft = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    mixture = torch.einsum("e,e...", soft, layer.binary_weight())
    assert mixture.detach().abs().round(decimals=9).unique().tolist() == [0, 0.2, 0.4, 0.6, 0.8, 1]
    scores = torch.randn(6, 4, dtype=torch.float64)
    selected = layers._WinnerTakesAll.apply(scores, layer.binary_weight().flatten(1), 1.0)
    assert selected.abs().eq(1).all()


def test_each_output_channel_of_each_expert_has_its_own_scale():
    layer = expert_layer(experts=3, weight_quantizer=magnitude_aware_sign)
    scales = layer.binary_weight().abs().flatten(2)
    torch.testing.assert_close(scales, scales[..., :1].expand_as(scales))
    torch.testing.assert_close(scales[..., 0], layer.weight.abs().flatten(2).mean(2))


def test_memory_format_does_not_matter():
    layer, x = expert_layer(padding=1), inputs()
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), layer(x))
    assert layer(x[:1].to(memory_format=torch.channels_last)).shape == (1, 8, 5, 6)


def test_one_copy_of_the_selected_weights_is_kept():
    layer, x = expert_layer(16, 16, experts=4), inputs(10, 16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t,
                                                  lambda t: t):  # fmt: skip
        layer(x)
    one = layer.weight[0].numel()
    assert sum(size == 10 * one for size in kept) == 1
    assert sum(kept) <= (10 + 2 * 4) * one + 2 * x.numel() + 1000  # latent and binary experts


def test_experts_are_binary_layers_and_their_gates_real_ones():
    layer = expert_layer(bias=True)
    binary, real = split_parameters(layer)
    assert [p is layer.weight for p in binary] == [True]
    assert {id(p) for p in real} == {id(p) for p in (*layer.gate.parameters(), layer.bias)}
    gate = layer.gate.weight.clone()
    with torch.no_grad():
        layer.weight.mul_(9)
    layers.clip_latent_weights(layer)
    assert layer.weight.abs().max() == 1
    assert torch.equal(layer.gate.weight, gate)
    with layers.quantized_by(layer, real_weight):
        assert torch.equal(layer.binary_weight(), layer.weight)
    assert "experts=4" in repr(layer)
    assert layer.weight.shape == (4, 8, 4, 3, 3)
    other = expert_layer(bias=True, seed=5)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(inputs()), layer(inputs()))


def test_experts_start_apart_and_in_minus_one_to_one():
    layer = layers.ExpertBinaryConv2d(8, 16, 3)
    assert 0.9 < layer.weight.abs().max() <= 1
    assert not torch.equal(layer.weight[0], layer.weight[1])
    free = layers.ExpertBinaryConv2d(8, 16, 3, weight_quantizer=None)
    assert free.weight.abs().eq(1).all()
    assert free.binary_weight() is free.weight


def test_experts_under_autocast():
    layer, x = expert_layer().float(), inputs().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == layer.gate.weight.grad.dtype == torch.float32
    reference_layer = expert_layer().float()
    reference_layer(x).square().sum().backward()
    torch.testing.assert_close(y.float(), reference_layer(x))  # sums of 36 signs are exact
    torch.testing.assert_close(layer.weight.grad, reference_layer.weight.grad)
    torch.testing.assert_close(layer.gate.weight.grad, reference_layer.gate.weight.grad,
                               rtol=0.1, atol=1.0)  # fmt: skip


@pytest.mark.parametrize(("device", "samples"), [
    ("cpu", 8),
    pytest.param("cuda", 256, marks=pytest.mark.skipif(not torch.cuda.is_available(),
                                                       reason="needs CUDA")),
])  # fmt: skip
def test_a_batch_of_experts_is_convolved_in_bfloat16_as_it_is_trained(device, samples):
    """One convolution of samples · groups groups, channels last and deterministic."""
    torch.manual_seed(0)
    layer = layers.ExpertBinaryConv2d(64, 64, 3, padding=1, groups=4)
    x = torch.randn(samples, 64, 16, 16)
    with torch.no_grad():  # a clear choice, which no rounding turns
        layer.gate.weight.copy_(torch.eye(4, 64))
        x[range(samples), [n % 4 for n in range(samples)]] += 5
    x.requires_grad_()
    expected = layer(x)
    expected.sum().backward()
    slopes = x.grad.clone(), layer.weight.grad.clone()
    layer.zero_grad()
    layer.to(device)
    there = x.detach().to(device, memory_format=torch.channels_last).requires_grad_()
    # enabled has to be said: left out, this would turn cuDNN off
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        with torch.autocast(device, torch.bfloat16):
            found = layer(there)
        found.float().sum().backward()
    torch.testing.assert_close(found.float().cpu(), expected, rtol=2**-8, atol=0)  # whole numbers
    for slope, other in zip(slopes, (there.grad, layer.weight.grad), strict=True):
        assert (slope - other.cpu()).norm() < 0.02 * slope.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_experts_are_evaluated_with_as_many_samples_as_training_predicts_at_once():
    """In float32, one convolution of a thousand groups: is there an engine for it?"""
    torch.manual_seed(0)
    layer = layers.ExpertBinaryConv2d(64, 64, 3, padding=1)
    x = torch.randn(1000, 64, 8, 8)
    with torch.no_grad():
        expected = layer(x)
        found = layer.cuda()(x.cuda().to(memory_format=torch.channels_last)).cpu()
    alike = (found == expected).all((1, 2, 3))  # whole numbers, but for a choice on the edge
    assert alike.float().mean() > 0.99


# the warning is torch's own, from tracing autograd functions
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_experts_compile_without_graph_breaks_and_keep_their_gradients():
    layer, x = expert_layer(padding=1, padding_value=1.0), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x).square().sum(), list(layer.parameters()))
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
        assert other.any()


@pytest.mark.parametrize("options", EXPERT_OPTIONS)
def test_exported_experts_take_batches_of_any_size(options):
    layer = expert_layer(**options).eval()
    sizes = ({0: torch.export.Dim("samples")},)
    exported = torch.export.export(layer, (inputs(3),), dynamic_shapes=sizes, strict=False)
    for samples in (2, 3, 7):
        x = inputs(samples, seed=samples)
        torch.testing.assert_close(exported.module()(x), layer(x))


@pytest.mark.parametrize("options", [{"experts": 0}, {"temperature": 0.0}, {"temperature": -1.0}])
def test_experts_and_temperature_must_be_positive(options):
    with pytest.raises(ValueError, match="experts must be a positive integer and temp"):
        layers.ExpertBinaryConv2d(4, 8, 3, **options)


@pytest.mark.parametrize("shape", [(4, 5, 5), (2, 3, 5, 5)])
def test_experts_refuse_other_inputs(shape):
    with pytest.raises(ValueError, match=r"must be \(N, 4, H, W\)"):
        expert_layer()(torch.zeros(shape, dtype=torch.float64))


# --- What stands around binary layers ----------------------------------------------------------

AROUND = [layers.LearnableShift, layers.RPReLU, layers.ChannelScale]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def filled(module):
    """The module with parameters that are neither 0 nor 1."""
    for number, parameter in enumerate(module.parameters()):
        nn.init.uniform_(parameter, 0.1 + number, 0.9 + number)
    return module


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 4, 2)])
@pytest.mark.parametrize("kind", AROUND)
def test_one_number_for_each_channel(kind, shape):
    module, x = filled(kind(3)).double(), torch.randn(shape, dtype=torch.float64)
    y = module(x).detach().numpy()
    for n, c, *place in np.ndindex(shape):
        value = x[(n, c, *place)].item()
        numbers = {name: p[c].item() for name, p in module.named_parameters()}
        if kind is layers.LearnableShift:
            expected = value + numbers["shift"]
        elif kind is layers.ChannelScale:
            expected = value * numbers["scale"]
        else:
            moved = value - numbers["gamma"]
            expected = (moved if moved > 0 else numbers["slope"] * moved) + numbers["zeta"]
        assert y[(n, c, *place)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", AROUND)
def test_gradients_of_the_layers_around(kind):
    module = filled(kind(3)).double()
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_what_the_layers_around_start_as():
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(layers.LearnableShift(3)(x), x)
    assert torch.equal(layers.ChannelScale(3)(x), x)
    assert torch.equal(layers.RPReLU(3)(x), nn.PReLU(3)(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", [
    layers.LearnableShift(3), layers.RPReLU(3), layers.ChannelScale(3), layers.LocalResponseNorm(),
])  # fmt: skip
def test_real_parameters_do_not_widen_half_precision(module, dtype):
    assert module(torch.ones(2, 3, 4, 4, dtype=dtype)).dtype == dtype


def test_a_shift_before_a_sign_is_a_threshold():
    shift = layers.LearnableShift(2)
    with torch.no_grad():
        shift.shift.copy_(torch.tensor([-0.5, 2.0]))
    x = torch.tensor([[0.4, -1.9], [0.5, -2.0], [0.6, -2.1]])
    assert ste_sign(shift(x)).tolist() == [[-1, 1], [1, 1], [1, -1]]


@pytest.mark.parametrize(("channels", "hidden"), [((6, 16), 2), ((6, 5), 1)])
def test_data_driven_scale(channels, hidden):
    scale = layers.DataDrivenScale(*channels).double()
    x = torch.randn(4, channels[0], 3, 5, dtype=torch.float64)
    assert scale.squeeze.weight.shape == (hidden, channels[0])
    assert [name for name, _ in scale.named_parameters()] == ["squeeze.weight", "excite.weight"]
    mean = x.numpy().mean((2, 3))
    squeezed = np.maximum(0, mean @ scale.squeeze.weight.detach().numpy().T)
    expected = 1 / (1 + np.exp(-squeezed @ scale.excite.weight.detach().numpy().T))
    y = scale(x)
    assert y.shape == (4, channels[1], 1, 1)
    np.testing.assert_allclose(y[:, :, 0, 0].detach().numpy(), expected, rtol=1e-12)
    assert ((y > 0) & (y < 1)).all()


def test_data_driven_scale_refuses_a_reduction_below_one():
    with pytest.raises(ValueError, match="reduction must be 1 or more"):
        layers.DataDrivenScale(4, 4, reduction=0)


# --- Local response normalisation --------------------------------------------------------------


def response_norm(a, size=5, alpha=1e-4, beta=0.75, k=2.0):
    """AlexNet, section 3.3, spelled out for a of shape (N, C, H, W)."""
    b = np.empty_like(a)
    for n, i, y, x in np.ndindex(a.shape):
        first, last = max(0, i - size // 2), min(a.shape[1] - 1, i + size // 2)
        total = sum(a[n, j, y, x] ** 2 for j in range(first, last + 1))
        b[n, i, y, x] = a[n, i, y, x] / (k + alpha * total) ** beta
    return b


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 12])
@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_local_response_norm_is_the_papers_formula(size, channels):
    x = 50 * torch.randn(2, channels, 3, 2, dtype=torch.float64)
    norm = layers.LocalResponseNorm(size, alpha=1e-3, beta=0.6, k=1.5)
    expected = response_norm(x.numpy(), size, 1e-3, 0.6, 1.5)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_local_response_norm_is_torchs_with_five_times_alpha(scale):
    x = scale * torch.randn(4, 96, 5, 5).relu()
    torchs = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)
    difference = (layers.LocalResponseNorm()(x) - torchs(x)).abs().max() / scale
    assert difference < 1e-6
    assert (nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0)(x) - torchs(x)).abs().max() / scale > 1e-4
    as_run = layers.LocalResponseNorm(alpha=2e-5)(x)
    assert (nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0)(x) - as_run).abs().max() / scale < 1e-6


def test_local_response_norm_does_nothing_to_small_activations():
    """It divides by 2^0.75, to 0.1 %, unless activations are of the order of 100."""

    def deviation(scale):
        x = scale * torch.randn(4, 96, 8, 8, generator=torch.Generator().manual_seed(0)).abs()
        y = layers.LocalResponseNorm()(x.double())
        return (y * 2**0.75 / x - 1).abs().mean().item()

    assert deviation(1) < 0.001
    assert deviation(100) > 0.4


def test_neighbours_compete_in_local_response_norm():
    norm, x = layers.LocalResponseNorm(), torch.full((1, 12, 1, 1), 100.0)
    louder = x.clone()
    louder[0, 4] = 500.0
    change = (norm(louder) / norm(x)).flatten()
    assert [i for i, ratio in enumerate(change) if ratio < 0.99] == [2, 3, 5, 6]
    assert torch.equal(change[[0, 1, *range(7, 12)]], torch.ones(7))


def test_local_response_norm_gradient_and_memory_format():
    x = 30 * torch.randn(2, 7, 2, 3, dtype=torch.float64)
    norm = layers.LocalResponseNorm()
    assert torch.autograd.gradcheck(norm, (x.clone().requires_grad_(),))
    torch.testing.assert_close(norm(x.to(memory_format=torch.channels_last)), norm(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_local_response_norm_of_large_activations_in_half_precision(dtype):
    """The square of 300 is beyond float16."""
    x = torch.full((1, 8, 1, 1), 300.0, dtype=dtype)
    expected = response_norm(x.double().numpy())
    np.testing.assert_allclose(layers.LocalResponseNorm()(x).double(), expected,
                               rtol=torch.finfo(dtype).eps)  # fmt: skip


@pytest.mark.parametrize("size", [0, 2, -3])
def test_local_response_norm_refuses_windows_without_a_middle(size):
    with pytest.raises(ValueError, match="size must be odd and positive"):
        layers.LocalResponseNorm(size)


def test_repr_names_the_constants_of_local_response_norm():
    assert "5, alpha=0.0001, beta=0.75, k=2.0" in repr(layers.LocalResponseNorm())


def test_a_refused_load_leaves_the_binary_weights():
    layer = layers.BinaryLinear(4, 3, weight_quantizer=None, bias=True)
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="must be exactly ±1"):
        layer.load_state_dict({"weight": torch.full((3, 4), 0.3), "bias": torch.zeros(3)})
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_global_average_pool_is_torchs_but_for_the_layout_of_the_gradient(dtype, device):
    torch.manual_seed(0)
    layout = {"memory_format": torch.channels_last}
    x = torch.randn(3, 5, 7, 4, device=device, dtype=dtype).contiguous(**layout).requires_grad_()
    upstream = torch.randn(3, 5, 1, 1, device=device, dtype=dtype)
    ours, torchs = layers.GlobalAveragePool()(x), nn.AdaptiveAvgPool2d(1)(x)
    torch.testing.assert_close(ours, torchs)
    torch.testing.assert_close(layers.channel_means(x), x.mean((2, 3)))
    gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (ours, torchs)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].is_contiguous(**layout)


def test_an_expert_layer_can_be_laid_out_channels_last():
    torch.manual_seed(0)
    layer = layers.ExpertBinaryConv2d(4, 6, 3, experts=3)
    x = torch.randn(5, 4, 7, 7)
    layer(x).sum().backward()
    before, gradient = layer(x), layer.weight.grad.clone()
    moved = layer.to(memory_format=torch.channels_last)
    assert moved is layer
    assert layer.weight.shape == (3, 6, 4, 3, 3)
    assert torch.equal(layer.weight.grad, gradient)
    torch.testing.assert_close(layer(x), before)
    assert layer.double().weight.dtype == torch.float64


def test_gradients_of_single_samples_by_torch_func():
    torch.manual_seed(0)
    layer = layers.BinaryLinear(4, 3, input_quantizer=ste_sign)
    x, weights = torch.randn(5, 4), dict(layer.named_parameters())

    def loss(weights, sample):
        return torch.func.functional_call(layer, weights, (sample,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)["weight"]
    for sample, gradient in zip(x, found, strict=True):
        layer.zero_grad()
        layer(sample).square().sum().backward()
        torch.testing.assert_close(gradient, layer.weight.grad)


# --- Attention matching, the bipolar penalty, the elastic link -----------------------------------


def attention_twin(features):
    """A literal twin of the attention map: squares summed over channels, over their norm."""
    maps = np.zeros((features.shape[0], features.shape[2] * features.shape[3]))
    for n, sample in enumerate(features):
        q = sum(channel**2 for channel in sample).ravel()
        maps[n] = q / np.sqrt((q**2).sum())
    return maps


def matching_twin(students, teachers):
    """A literal twin of the loss: distances summed over places, averaged over samples."""
    total = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        difference = attention_twin(student) - attention_twin(teacher)
        total += np.mean([np.sqrt((row**2).sum()) for row in difference])
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_matching_is_its_formula(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [((4, 3, 5, 6), (4, 7, 5, 6)), ((4, 8, 2, 3), (4, 8, 2, 3))]
    students, teachers = zip(*(
        [torch.randn(shape, generator=generator).to(dtype) for shape in pair] for pair in shapes
    ), strict=True)  # fmt: skip
    twin = matching_twin(*([f.double().numpy() for f in side] for side in (students, teachers)))
    found = layers.attention_matching(students, teachers)
    assert found.item() == pytest.approx(twin, rel=1e-5)
    assert found.dtype == torch.float32
    for each in students:
        np.testing.assert_allclose(layers.attention_map(each),
                                   attention_twin(each.double().numpy()), rtol=1e-5)  # fmt: skip


def test_attention_matching_does_not_feel_a_factor():
    a = torch.randn(3, 4, 5, 5)
    assert layers.attention_matching([a], [a]) == 0
    assert layers.attention_matching([a], [-8 * a]) == 0
    assert layers.attention_matching([a], [a[:, :2]]) > 0
    assert layers.attention_matching([a, a], [a, a[:, :2]]) > 0


def test_attention_matching_teaches_only_the_student():
    student = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    before = layers.attention_matching([student], [teacher])
    before.backward()
    assert teacher.grad is None
    with torch.no_grad():
        moved = student - 0.1 * student.grad
    assert layers.attention_matching([moved], [teacher]) < before


def test_attention_of_a_dead_map_is_zero_and_has_a_finite_gradient():
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    assert torch.equal(layers.attention_map(dead), torch.zeros(2, 16))
    for teacher in (torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)):
        layers.attention_matching([dead], [teacher]).backward()
        assert dead.grad.isfinite().all()


def test_attention_matching_refuses_what_does_not_fit():
    a, wide = torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) and \(2, 3, 4, 5\) have maps of diff"):
        layers.attention_matching([a], [wide])
    with pytest.raises(ValueError, match="shorter than"):
        layers.attention_matching([a, a], [a])
    with pytest.raises(ValueError, match="no features to compare"):
        layers.attention_matching([], [])
    with pytest.raises(ValueError, match=r"features must be \(N, C, H, W\), not \(2, 3\)"):
        layers.attention_map(torch.ones(2, 3))


def test_the_bipolar_penalty_and_its_gradient():
    weights = [torch.randn(3, 4, requires_grad=True), torch.randn(5, requires_grad=True)]
    penalty = layers.bipolar_penalty(weights, 0.3)
    expected = sum(0.3 * (1 - w**2) for each in weights for w in each.flatten().tolist())
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    penalty.backward()
    for weight in weights:
        torch.testing.assert_close(weight.grad, -0.6 * weight.detach())
    ends = [torch.tensor([1.0, -1.0, 1.0])]
    assert layers.bipolar_penalty(ends, 5.0) == 0


def descend(start, steps, clip):
    """Gradient descent on the bipolar penalty alone, with a rate of 0.1."""
    w = start.clone()
    for _ in range(steps):
        w.requires_grad_()
        (gradient,) = torch.autograd.grad(layers.bipolar_penalty([w], 0.5), w)
        w = (w - 0.1 * gradient).detach()
        w = w.clamp(-1, 1) if clip else w
    return w


def test_the_bipolar_penalty_needs_clipping():
    start = torch.tensor([-0.9, -1e-3, 0.0, 1e-3, 0.5])
    clipped, free = descend(start, 100, clip=True), descend(start, 100, clip=False)
    assert torch.equal(clipped, torch.tensor([-1.0, -1.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(free, start * 1.1**100)  # negative decay: a pole outside the circle


def test_the_bipolar_penalty_refuses():
    with pytest.raises(ValueError, match="strength must not be negative, not -1"):
        layers.bipolar_penalty([torch.ones(2)], -1)
    with pytest.raises(ValueError, match="no weights to regularise"):
        layers.bipolar_penalty([], 1.0)


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 4), (2, 6), (6, 2), (4, 1)])
def test_the_elastic_link_is_its_formula(inputs, outputs):
    link = layers.ElasticLink(inputs, outputs)
    with torch.no_grad():
        link.balance.fill_(0.5)
    x, y = torch.randn(3, inputs, 2, 5), torch.randn(3, outputs, 2, 5)
    expected = y.clone()
    for c in range(outputs):
        if outputs >= inputs:
            expected[:, c] += 0.5 * x[:, c % inputs]
        else:
            group = inputs // outputs
            expected[:, c] += 0.5 * sum(x[:, c * group + i] for i in range(group)) / group
    torch.testing.assert_close(link(x, y), expected)
    assert [name for name, _ in link.named_parameters()] == ["balance"]
    assert repr(link) == f"ElasticLink({inputs}, {outputs})"


def test_the_elastic_link_passes_gradients_to_both_and_to_its_balance():
    link = layers.ElasticLink(2, 4)
    x, y = torch.randn(1, 2, 3, 3, requires_grad=True), torch.randn(1, 4, 3, 3, requires_grad=True)
    link(x, y).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))  # two copies of each channel
    assert torch.equal(y.grad, torch.ones_like(y))
    assert link.balance.grad.item() == pytest.approx(2 * x.sum().item(), rel=1e-4)


def test_the_elastic_link_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="must divide the other, not 4 and 6"):
        layers.ElasticLink(4, 6)
    with pytest.raises(ValueError, match="not 0 and 6"):
        layers.ElasticLink(0, 6)
    link = layers.ElasticLink(2, 2)
    with pytest.raises(ValueError, match=r"same height and width, not \(4, 4\) and \(2, 2\)"):
        link(torch.ones(1, 2, 4, 4), torch.ones(1, 2, 2, 2))


# --- Out of PyTorch ------------------------------------------------------------------------------


def small_network():
    torch.manual_seed(0)
    q = {"input_quantizer": ste_sign}
    # sums of 27 signs are odd: none is 0, whose sign would hang on the order of the sum
    convolution = layers.BinaryConv2d(3, 4, 3, padding=1, padding_value=1, **q)
    linear = layers.BinaryLinear(4 * 5 * 6, 3, weight_quantizer=None, **q)
    around = nn.BatchNorm2d(4), layers.RPReLU(4), nn.Flatten()
    return nn.Sequential(convolution, *around, linear).eval()


@pytest.mark.filterwarnings("ignore")  # of the exporter about itself
def test_a_network_becomes_an_onnx_file(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    network, x = small_network(), inputs(channels=3).float()
    sizes = ({0: torch.export.Dim("samples")},)
    torch.onnx.export(network, (x[:2],), tmp_path / "net.onnx", dynamo=True, dynamic_shapes=sizes)
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, network(x).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_features_are_extracted_where_binary_layers_are_leaves():
    from torchvision.models.feature_extraction import create_feature_extractor

    network, x = small_network(), inputs(channels=3).float()
    leaves = {"leaf_modules": [layers.BinaryConv2d, layers.RPReLU, layers.BinaryLinear]}
    features = create_feature_extractor(network, ["0", "4"], tracer_kwargs=leaves)(x)
    assert torch.equal(features["0"], network[0](x))
    assert torch.equal(features["4"], network(x))


@pytest.mark.parametrize("kind", ["weight_quantizer", "input_quantizer"])
@pytest.mark.parametrize("wrong", ["ste_sign", torch.ones(2, 3)])
def test_what_is_no_quantizer_is_refused_when_the_layer_is_made(kind, wrong):
    with pytest.raises(TypeError, match=f"{kind} must be a function such as binarize"):
        layers.BinaryLinear(3, 2, **{kind: wrong})
    layer = layers.BinaryLinear(3, 2, input_quantizer=ste_sign)
    with pytest.raises(TypeError, match=f"{kind} must be a function such as binarize"):
        setattr(layer, kind, wrong)
    assert getattr(layer, kind) is ste_sign


def test_a_refused_pair_of_quantizers_leaves_the_latent_weights():
    layer = layers.BinaryLinear(3, 2)
    before = layer.weight.detach().clone()
    with pytest.raises(TypeError, match="input_quantizer must be a function"):
        layer.set_quantizers(None, "ste_sign")
    assert torch.equal(layer.weight, before)
    assert layer.weight_quantizer is ste_sign


def test_a_binarized_transformer_multiplies_with_signs_in_its_fast_path_too():
    """Without gradients torch's layer reads the weights of its parts, and does not call them."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    binary = layers.binarized(encoder, lambda name, _: name.startswith("linear"))
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        quick, real = binary(x), encoder(x)
    torch.testing.assert_close(quick, binary(x.requires_grad_()).detach())
    assert (quick - real).abs().max() > 0.1


def test_a_weight_that_is_assigned_is_latent_as_the_one_before():
    for quantizer in (ste_sign, None):
        layer = layers.BinaryLinear(4, 3, weight_quantizer=quantizer)
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        layer.load_state_dict(state, assign=True)
        assert layer.weight.latent == (quantizer is not None)
        layer.weight = nn.Parameter(torch.ones(3, 4))
        assert layer.weight.latent == (quantizer is not None)


def test_an_expert_convolution_survives_a_conversion_that_fails():
    layer = layers.ExpertBinaryConv2d(3, 4, 3, experts=2)

    def fail(_):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        layer._apply(fail)
    assert layer.weight.shape == (2, 4, 3, 3, 3)
    assert layer(torch.randn(2, 3, 8, 8)).shape == (2, 4, 6, 6)


class InOrder(nn.Module):
    """Holds its layers as modules, and in a list, which it calls."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.order = [self.a, self.b, self.c]

    def forward(self, x):
        for layer in self.order:
            x = layer(x)
        return x


def test_a_list_of_layers_becomes_binary_with_them():
    torch.manual_seed(0)
    net, x = InOrder(), torch.randn(5, 4)
    binary = layers.binarized(net)
    assert binary.order[1] is binary.b
    assert isinstance(binary.b, layers.BinaryLinear)
    assert binary.b.weight is not net.b.weight
    with torch.no_grad():
        middle = nn.functional.linear(net.a(x), sign(net.b.weight), net.b.bias)
        torch.testing.assert_close(binary(x), net.c(middle))


def test_a_network_with_a_copy_of_its_own_making_becomes_binary():
    class Copied(InOrder):
        def __deepcopy__(self, memo):
            copied = type(self)()
            copied.load_state_dict(self.state_dict())
            return copied

    assert isinstance(layers.binarized(Copied()).order[1], layers.BinaryLinear)


def test_a_moved_layer_computes_no_parametrization():
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.spectral_norm(layers.BinaryLinear(4, 4))
    before = layer.parametrizations.weight[0]._u.clone()
    assert torch.equal(layer.to("cpu").parametrizations.weight[0]._u, before)


def test_a_new_memory_keeps_the_mark_of_a_latent_weight():
    with torch.device("meta"):
        layer = layers.BinaryLinear(3, 2)
    assert layer.to_empty(device="cpu").weight.latent is True
    layer = layers.BinaryLinear(3, 2, weight_quantizer=None)
    assert layer.to("meta").weight.latent is False


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_of_experts_takes_an_empty_batch(bias):
    layer = layers.ExpertBinaryConv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=bias)
    assert layer(torch.zeros(0, 4, 5, 5)).shape == (0, 6, 3, 3)


def test_a_layer_that_was_compiled_by_itself_is_not_replaced():
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 2))
    net[1] = torch.compile(net[1], backend="eager")
    with pytest.raises(ValueError, match="compile it, or the whole network, afterwards"):
        layers.binarized(net, lambda name, layer: name.startswith("1"))
    assert isinstance(
        layers.binarized(net, lambda name, layer: name == "0")[0], layers.BinaryLinear
    )


@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1e8, 1e18])
def test_attention_does_not_depend_on_the_size_of_features(scale):
    torch.manual_seed(0)
    features = torch.randn(2, 3, 4, 4)
    np.testing.assert_allclose(layers.attention_map(scale * features),
                               layers.attention_map(features), rtol=1e-5)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_bipolar_penalty_of_many_weights_in_half_precision(dtype):
    weights = torch.zeros(100_000, dtype=dtype)
    assert layers.bipolar_penalty([weights], 1e-6).item() == pytest.approx(0.1)


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, w):
        return w / 2


@pytest.mark.parametrize("write", [
    lambda layer: layer.reset_parameters(),
    lambda layer: layer.set_quantizers(None, None),
    lambda layer: layer.replicate(),
])  # fmt: skip
def test_a_weight_that_is_computed_from_others_is_not_written_to(write):
    layer = layers.ExpertBinaryConv2d(3, 2, 3, experts=2)
    nn.utils.parametrize.register_parametrization(layer, "weight", Halved())
    with pytest.raises(TypeError, match="ExpertBinaryConv2d's weight is computed from others"):
        write(layer)


def test_experts_with_a_parametrized_weight_are_converted():
    layer = layers.ExpertBinaryConv2d(3, 2, 3, experts=2)
    nn.utils.parametrize.register_parametrization(layer, "weight", Halved())
    before = layer.weight.detach().double()
    assert torch.equal(layer.double().weight, before)


class Signs(nn.Module):
    """A parametrization whose weights are ±1."""

    def forward(self, w):
        return sign(w)


def test_a_computed_weight_of_signs_needs_no_quantizer():
    layer = layers.BinaryLinear(3, 2)
    nn.utils.parametrize.register_parametrization(layer, "weight", Signs())
    layer.set_quantizers(None, ste_sign)
    assert layer.weight_quantizer is None


def test_what_a_weight_is_computed_from_is_real():
    layer = layers.BinaryLinear(3, 2)
    nn.utils.parametrize.register_parametrization(layer, "weight", Halved())
    other = layers.BinaryLinear(3, 2)
    binary, real = split_parameters(nn.Sequential(layer, other))
    assert [id(p) for p in binary] == [id(other.weight)]
    assert any(p is layer.parametrizations.weight.original for p in real)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_latent_weights_are_clipped_to_a_positive_bound(bound):
    layer = layers.BinaryLinear(3, 2)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="bound must be positive"):
        layers.clip_latent_weights(layer, bound)
    assert torch.equal(layer.weight, before)


def test_a_weight_that_is_loaded_by_swapping_is_still_known_as_latent():
    layer = layers.BinaryLinear(3, 2)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.load_state_dict(layers.BinaryLinear(3, 2).state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert layer.weight.latent


def test_weights_without_values_are_loaded():
    meta = layers.BinaryLinear(3, 2, weight_quantizer=None, device="meta")
    layer = layers.BinaryLinear(3, 2, weight_quantizer=None, device="meta")
    layer.load_state_dict(meta.state_dict(), assign=True)
    assert layer.weight.is_meta


@pytest.mark.parametrize("change", [
    lambda layer: setattr(layer, "forward", lambda x: x),
    lambda layer: layer.register_module("adapter", nn.Linear(2, 2)),
    lambda layer: layer.register_buffer("count", torch.zeros(())),
    lambda layer: layer.register_state_dict_post_hook(lambda *_: None),
])  # fmt: skip
def test_a_layer_with_parts_of_its_own_does_not_become_binary(change):
    layer = nn.Linear(2, 2)
    change(layer)
    with pytest.raises(ValueError, match=r"parts of its own, can become binary; .* 0 \(Linear\)"):
        layers.binarized(nn.Sequential(layer), lambda name, layer: name == "0")


@pytest.mark.parametrize("experts", [True, 1.5, 0])
def test_experts_are_counted_in_integers(experts):
    assert layers.ExpertBinaryConv2d(2, 3, 3, experts=np.int64(2)).weight.shape[0] == 2
    with pytest.raises(ValueError, match="experts must be a positive integer"):
        layers.ExpertBinaryConv2d(2, 3, 3, experts=experts)


@pytest.mark.parametrize("layer", [
    layers.LearnableShift(8), layers.RPReLU(8), layers.ChannelScale(8),
])  # fmt: skip
@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (8,)])
def test_a_number_for_each_channel_needs_these_channels(layer, shape):
    with pytest.raises(ValueError, match=r"the input must be \(N, 8, \.\.\.\)"):
        layer(torch.zeros(shape))


def test_an_elastic_link_needs_its_channels():
    with pytest.raises(ValueError, match="x must have 8 channels, not 16"):
        layers.ElasticLink(8, 4)(torch.zeros(1, 16, 2, 2), torch.zeros(1, 4, 2, 2))


def test_channels_are_averaged_with_and_without_a_batch():
    x = torch.randn(5, 3, 4)
    assert torch.allclose(layers.GlobalAveragePool()(x), x.mean((1, 2), keepdim=True))


def test_maps_of_equal_size_but_another_form_are_not_matched():
    with pytest.raises(ValueError, match="maps of different sizes"):
        layers.attention_matching([torch.ones(1, 1, 1, 4)], [torch.ones(1, 1, 2, 2)])


def test_maps_of_another_number_of_samples_are_not_matched():
    """A single sample of the teacher would be broadcast to all of the student's."""
    with pytest.raises(ValueError, match="maps of different sizes"):
        layers.attention_matching([torch.ones(2, 1, 4, 4)], [torch.ones(1, 1, 4, 4)])


def test_a_bipolar_penalty_of_no_strength_is_zero():
    weight = torch.tensor([0.5, -0.25], requires_grad=True)
    penalty = layers.bipolar_penalty([weight], 0.0)
    penalty.backward()
    assert penalty == 0
    assert not weight.grad.any()
