"""A network layer by layer: shapes, parameters, bits of storage, operations for one input."""

import math

from torch import Tensor, linspace, nn, no_grad, random, zeros
from torch.func import functional_call

from bnnbook.binarize import function_of, stochastic_sign
from bnnbook.layers import BinaryLayer

REAL_BITS = 32
MOST_LEVELS = 2**8  # a quantizer that returns more different values counts as real
COUNTS = ("parameters", "bits", "macs", "bops")


def summary(model: nn.Module, input_shape):
    """Return a pandas DataFrame with a row for each layer, and the row "total" at the end.

    input_shape: shape of one input without the batch dimension, such as (3, 32, 32).

    The index is the layer's name in the model; the columns are

    - kind: its class;
    - output: the shape of its output for one input, None if it was not used;
    - parameters: the number of its own (the statistics of batch normalisation do not count); one
      that two layers share counts for the first;
    - bits: of storage for the parameters, 1 for a binary weight, 32 for a real parameter;
    - macs: multiply-accumulates with a real weight or a real input. BinaryConnect's layers count
      here: their binary weights turn multiplications into additions, but of real numbers;
    - bops: multiply-accumulates of a binary weight and a binary input, done by XNOR and popcount.

    Only linear layers and convolutions, but for transposed ones, count operations, those on
    padding included; of several experts one fires, but all are stored. A latent weight takes the
    bits of what its quantizer returns: 1 for two values, 32 for more than 256. Operations are bops
    only with 1 bit on both sides.

    The model runs once on shapes alone (torch's meta device) and in evaluation mode, so its
    weights, statistics and mode stay as they are, and so do torch's random generators; forward
    hooks of its modules are called once. Raises ValueError for a shape that the model does not
    accept.

    >>> table = summary(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (4,))
    >>> table.loc["total", ["parameters", "bits", "macs", "bops"]].tolist()
    [15, 480, 12, 0]
    >>> table.loc["0", "kind"], table.loc["0", "output"]
    ('Linear', (3,))
    """
    import pandas

    outputs = _output_shapes(model, _checked(input_shape))
    counted: set[int] = set()
    rows = [_row(name or type(module).__name__, module, outputs.get(module, []), counted)
            for name, module in model.named_modules() if _is_layer(module, outputs)]  # fmt: skip
    total = {count: sum(row[count] for row in rows) for count in COUNTS}
    rows.append(_row("total", model, outputs.get(model, []), set()) | total)
    return pandas.DataFrame(rows).set_index("name")


def _checked(input_shape) -> tuple[int, ...]:
    """Return the shape as a tuple, or raise ValueError."""
    shape = tuple(input_shape) if isinstance(input_shape, (tuple, list)) else ()
    if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError("input_shape is the shape of one input without the batch dimension, "
                         f"such as (3, 32, 32), not {input_shape!r}")  # fmt: skip
    return shape


def _output_shapes(model: nn.Module, input_shape: tuple[int, ...]) -> dict[nn.Module, list]:
    """Return the output shapes of each module, one for each time it was used."""
    shapes: dict[nn.Module, list] = {}

    def note(module, _, output):
        if isinstance(output, Tensor):
            shapes.setdefault(module, []).append(output.shape[1:])

    modes = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_hook(note) for module in model.modules()]
    state = {name: tensor.to("meta") for name, tensor in
             (*model.named_parameters(), *model.named_buffers())}  # fmt: skip
    dtype = next((tensor.dtype for tensor in model.parameters()), None)
    try:
        with no_grad():
            x = zeros(1, *input_shape, dtype=dtype, device="meta")
            functional_call(model.eval(), state, x)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the model takes no input of shape {input_shape}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return shapes


def _is_layer(module: nn.Module, outputs: dict) -> bool:
    """Return whether a module gets a row: it has own parameters, or was used and has no parts."""
    if any(True for _ in module.parameters(recurse=False)):
        return True
    parts = any(True for _ in module.children())
    return module in outputs and not parts and not isinstance(module, nn.Identity)


def _row(name: str, module: nn.Module, outputs: list, counted: set[int]) -> dict:
    """Return the row of a module whose outputs had these shapes.

    ``counted``: ids of the parameters of earlier rows, which are not counted again.
    """
    own = [p for p in module.parameters(recurse=False) if id(p) not in counted]
    counted.update(map(id, own))
    parameters = sum(p.numel() for p in own)
    macs = _products(module) * sum(shape.numel() for shape in outputs)
    binary = isinstance(module, BinaryLayer)
    weights = module.weight.numel() if binary and any(p is module.weight for p in own) else 0
    weight_bits = input_bits = REAL_BITS
    if binary:
        weight_bits = _bits(module.weight_quantizer, 1, _weight_grid(module), channels=0)
        inputs = _input_grid(module)
        input_bits = _bits(module.input_quantizer, REAL_BITS, inputs, channels=1)
    bops = macs if weight_bits == input_bits == 1 else 0
    return {
        "name": name,
        "kind": type(module).__name__,
        "output": tuple(outputs[-1]) if outputs else None,
        "parameters": parameters,
        "bits": weight_bits * weights + REAL_BITS * (parameters - weights),
        "macs": macs - bops,
        "bops": bops,
    }


def _products(module: nn.Module) -> int:
    """Return how many products are summed for one element of a layer's output."""
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.in_channels // module.groups * math.prod(module.kernel_size)
    return 0


def _grid(layer: BinaryLayer) -> Tensor:
    """Return numbers from -2 to 2, on the layer's device, where its quantizers may have theirs."""
    device = layer.weight.device
    return linspace(-2, 2, 4096, device="cpu" if device.type == "meta" else device)


def _weight_grid(layer: BinaryLayer) -> Tensor:
    """Return numbers from -2 to 2 in each output channel, in as many dimensions as weights have.

    A layer of experts quantizes all of them at once: its output channels are those of all.
    """
    weight = layer.weight.flatten(0, 1) if layer.weight.dim() == 5 else layer.weight
    grid = _grid(layer)[::4].view(1, -1, *[1] * (weight.dim() - 2))  # in all channels: fewer
    return grid.expand(len(weight), *grid.shape[1:])


def _input_grid(layer: BinaryLayer) -> Tensor:
    """Return numbers from -2 to 2 in each channel; an input quantizer may have one scale for each.

    Their shape is (1, C, H, W) for a convolution of two dimensions, else (N, features).
    """
    grid = _grid(layer)
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return grid.view(-1, 1).expand(-1, layer.in_features)
    dimensions = len(layer.kernel_size)
    sides = [round(4096 ** (1 / dimensions))] * dimensions
    return grid.view(1, 1, *sides).expand(1, layer.in_channels, *sides)


def _bits(quantizer, unquantized: int, grid: Tensor, channels: int) -> int:
    """Return the bits of what a quantizer returns; ``unquantized`` where there is none.

    They are those of the first channel, out of the dimension ``channels`` of ``grid``.
    """
    if quantizer is None:
        return unquantized
    if function_of(quantizer) is stochastic_sign:
        return 1  # known, without drawing from its generator
    with no_grad(), random.fork_rng([grid.device] if grid.is_cuda else []):
        quantized = quantizer(grid)
    levels = len(quantized.select(channels, 0).unique())
    return max(1, math.ceil(math.log2(levels))) if levels <= MOST_LEVELS else REAL_BITS
