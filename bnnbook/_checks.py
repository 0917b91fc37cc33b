"""What `training.train` refuses before it begins, and what it looks at while it runs."""

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from bnnbook.data import Dataset
from bnnbook.layers import BinaryLayer
from bnnbook.optim import CounterSGD

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


# --- Before a run ------------------------------------------------------------------------------


def check_data(data, batch_size: int, **counts) -> None:
    """Raise an error for data that is no `Dataset`, and for counts of it that do not fit.

    counts: the other whole numbers by name; each but the seed must be at least 1.
    """
    if not isinstance(data, Dataset):
        raise TypeError(
            f"data must be a bnnbook.data.Dataset, not a {type(data).__name__}: data.load makes "
            "one of a known set, data.Dataset of your own images and labels"
        )
    for name, number in {"batch_size": batch_size, **counts}.items():
        if not isinstance(number, Integral):
            raise TypeError(f"{name} must be a whole number, not {number!r}")
        if number < 1 and name not in ("seed", "batch_size"):
            raise ValueError(f"{name} must be at least 1, not {number}")
    if not 1 <= batch_size <= len(data.train_labels):
        raise ValueError(
            f"batch_size must be from 1 to the {len(data.train_labels)} training images, "
            f"not {batch_size}"
        )


def check_device(model: nn.Module, device: torch.device) -> None:
    """Raise ValueError for a model on another kind of device than the run."""
    wrong = {p.device.type for p in model.parameters()} - {device.type}
    if wrong:
        raise ValueError(
            f"the model is on {wrong.pop()}, the run on {device.type}: move the model there "
            "before the optimizers are made, or name the model's device"
        )


def check_optimizers(optimizers: Sequence, model: nn.Module, loss: Callable) -> None:
    """Raise an error for optimizers that cannot train this model, or not these weights of it."""
    if not optimizers:
        raise ValueError("no optimizer was given")
    _check_held(optimizers, model, loss)
    _check_not_latent(optimizers, model)
    _check_counters(optimizers, model)


def check_steps(parts: Iterable) -> None:
    """Raise ValueError for an optimizer or scheduler whose step needs more than `train` gives."""
    for part in parts:
        _, *parameters = inspect.signature(type(part).step).parameters.values()  # after self
        for each in parameters:
            if each.default is each.empty and each.kind == each.POSITIONAL_OR_KEYWORD:
                raise ValueError(
                    f"{type(part).__name__}.step needs its {each.name}, which train does not give "
                    "it: use another one, or a loop of your own"
                )


def check_schedulers(schedulers: Iterable, optimizers: Iterable, model: nn.Module) -> None:
    """Raise ValueError for the scheduler of another optimizer of the model's parameters."""
    known = {id(group) for optimizer in optimizers for group in optimizer.param_groups}
    ours = {id(parameter) for parameter in model.parameters()}
    for scheduler in schedulers:
        views = getattr(getattr(scheduler, "optimizer", None), "param_groups", ())
        groups = [getattr(view, "group", view) for view in views]  # made on optim.rate_as_lr
        held = {id(parameter) for group in groups for parameter in group["params"]}
        if not held.isdisjoint(ours) and known.isdisjoint(map(id, groups)):
            raise ValueError(
                f"{type(scheduler).__name__} belongs to another optimizer than those of this run: "
                "make it with one of them"
            )


def _check_not_latent(optimizers, model: nn.Module) -> None:
    """Raise ValueError if an optimizer that flips ±1 holds latent weights, or biases and gains."""
    flipped = {id(p) for o in optimizers if getattr(o, "binary", False)
               for group in o.param_groups for p in group["params"]}  # fmt: skip
    for name, layer in model.named_modules():
        latent = isinstance(layer, BinaryLayer) and layer.weight_quantizer is not None
        if latent and id(layer.weight) in flipped:
            raise ValueError(
                f"{name}.weight is latent: its layer has a weight_quantizer; Bop and "
                "CascadedEMA are for layers with weight_quantizer=None"
            )
        kinds = ("weight", "bias") if isinstance(layer, NORMS) else ("bias",)
        for kind in kinds:
            if id(getattr(layer, kind, None)) in flipped:
                raise ValueError(
                    f"{name}.{kind} is real, of a {type(layer).__name__}: Bop and CascadedEMA "
                    "flip binary weights; optim.split_parameters tells the two apart"
                )


def _check_counters(optimizers, model: nn.Module) -> None:
    """Raise ValueError if no gradient passes the quantizer to the counters of a `CounterSGD`."""
    largest = {id(p): 2 ** group["bits"] - 1 for o in optimizers if isinstance(o, CounterSGD)
               for group in o.param_groups for p in group["params"]}  # fmt: skip
    for name, layer in model.named_modules():
        latent = isinstance(layer, BinaryLayer) and layer.weight_quantizer is not None
        bound = largest.get(id(layer.weight), 1) if latent else 1
        if bound > 1 and not _passes_gradient(layer.weight_quantizer, layer.weight, bound):
            raise ValueError(
                f"the quantizer of {name or 'the network'} passes no gradient to a counter of "
                f"{bound}: take one that does, such as ste_sign with clip_value=None"
            )


def _passes_gradient(quantizer: Callable, weight: Tensor, bound: int) -> bool:
    """Return whether any gradient reaches weights of ±bound; leaves the quantizer as it is."""
    devices = [weight.device] if weight.is_cuda else []
    with torch.enable_grad(), torch.random.fork_rng(devices):
        weights = (bound * torch.randn_like(weight).sign()).requires_grad_()
        outputs = copy.deepcopy(quantizer)(weights)
        if not outputs.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(outputs, weights, torch.randn_like(outputs))
    return bool(gradient.any())


def _check_held(optimizers, model, loss) -> None:
    """Raise an error for what is no optimizer, or holds no or shared parameters."""
    modules = [part for part in (model, loss) if isinstance(part, nn.Module)]
    ours = {id(parameter) for module in modules for parameter in module.parameters()}
    taken: set[int] = set()
    for optimizer in optimizers:
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"{optimizer!r} is no optimizer of torch, nor like one")
        if not any(id(p) in ours for p in parameters_of(optimizer)):
            raise ValueError(
                f"{type(optimizer).__name__} holds no parameter of this model: was it made for "
                "another, or before a layer was replaced?"
            )
        held = {id(parameter) for parameter in parameters_of(optimizer)}
        if held & taken:
            raise ValueError(
                f"{type(optimizer).__name__} holds {len(held & taken)} parameters that an "
                "optimizer before it holds, too: give each parameter to one of them"
            )
        taken |= held


def parameters_of(part) -> Iterable[Tensor]:
    """Return the parameters that a module or an optimizer holds."""
    if isinstance(part, nn.Module):
        return part.parameters()
    return (p for group in part.param_groups for p in group["params"])


# --- While it runs ------------------------------------------------------------------------------


@torch.no_grad()
def not_finite(model: nn.Module, optimizers: Iterable = ()) -> list[str]:
    """Return the names of the tensors of a model and its optimizers that hold NaN or infinity."""
    held = {name: tensor for name, tensor in _held(model, optimizers) if tensor.numel()}
    if not held:
        return []
    device = next(iter(held.values())).device  # Adam counts its steps on the CPU
    # aminmax takes one pass over memory, and both are NaN if an entry is; one wait for the device
    ends = [torch.stack(tensor.aminmax()).to(device, torch.float64) for tensor in held.values()]
    finite = torch.stack(ends).isfinite().all(1).tolist()
    return [name for name, is_finite in zip(held, finite, strict=True) if not is_finite]


def _held(model: nn.Module, optimizers: Iterable) -> Iterable[tuple[str, Tensor]]:
    """Yield the floating-point tensors of a model and of its optimizers' states, by name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    yield from ((name, p) for p, name in names.items() if p.is_floating_point())
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            yield name, buffer.clamp(min=0)  # an attention mask holds -inf
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            whose = f"of {names.get(parameter, 'a parameter')} in {type(optimizer).__name__}"
            for name, value in state.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    yield f"{name} {whose}", value


def check_binary(model: nn.Module) -> None:
    """Raise ValueError if weights without a quantizer are not ±1: results would not be binary."""
    for name, layer in model.named_modules():
        is_binary = isinstance(layer, BinaryLayer) and layer.weight_quantizer is None
        if is_binary and not (layer.weight.abs() == 1).all():
            raise ValueError(
                f"{name}.weight is not ±1 any more. Without a weight_quantizer only an optimizer "
                "that flips signs (Bop, CascadedEMA) may hold it: see split_parameters"
            )
