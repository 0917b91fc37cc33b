"""A training run in a file: written atomically, read without running code, tied to its run."""

import contextlib
import copy
import inspect
import io
import itertools
import os
import pickle
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import CellType

import numpy as np
import torch
from torch import Tensor, nn

from bnnbook.layers import QUANTIZED
from bnnbook.records import unused_name

FORMAT = 1
# What torch.load raises for a file that is cut short or was not written by torch.
DAMAGE = (pickle.UnpicklingError, EOFError, RuntimeError, OSError, LookupError, TypeError,
          ValueError)  # fmt: skip
ZIP = b"PK\3\4"  # how the files of torch.save begin


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or belongs to another run; the message says which and what to do."""


# --- The file ----------------------------------------------------------------------------------


def write(state: dict, path: Path) -> None:
    """Write ``state`` as a checkpoint; the old file stays until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    sums = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(True)  # `read` compares them
        torch.save({"format": FORMAT, **_as_python(state)}, part)
        part.replace(path)
    finally:
        torch.serialization.set_crc32_options(sums)
        part.unlink(missing_ok=True)


def read(path: Path) -> dict:
    """Return the contents of a checkpoint.

    Raises CheckpointError for a file that is cut short, which is moved aside to NAME.corrupt, and
    for one that has changed since, or is of another kind or format, which stays where it is; and
    OSError for a file that cannot be opened.
    """
    content = path.read_bytes()
    _check_intact(path, content)
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        number = state["format"]
    except DAMAGE as error:
        raise CheckpointError(
            f"{path} is a file of another kind ({type(error).__name__}), and was left as it "
            "is; name another file for the checkpoint, or remove this one"
        ) from error
    if number != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {number}, this version reads {FORMAT}: use "
            "the version of bnnbook that wrote it, or remove it to start anew"
        )
    return state


def _check_intact(path: Path, content: bytes) -> None:
    """Raise CheckpointError for a file of torch's that has changed or is cut short.

    What is cut short, or empty, is moved aside.
    """
    if not ZIP.startswith(content[: len(ZIP)]) and content.strip(b"\0"):
        return  # torch never wrote it
    try:  # torch itself compares no checksums
        changed = zipfile.ZipFile(io.BytesIO(content)).testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        aside = unused_name(path)
        path.rename(aside)
        raise CheckpointError(
            f"{path} is not a whole checkpoint ({error}); it was moved to {aside.name}. Run again "
            "to start from the beginning"
        ) from error
    except RuntimeError:  # encrypted, or packed in another way: of another kind
        return
    if changed:
        raise CheckpointError(
            f"{path} has changed since it was written: its part {changed} has another checksum. "
            "Remove it to start anew"
        )


def compare(path: Path, here: Mapping, there: Mapping) -> None:
    """Raise CheckpointError if a value of the run, ``here``, differs in the checkpoint, ``there``.

    path: the checkpoint's file, for the message.
    """
    for name, value in here.items():
        if value != there.get(name):
            raise CheckpointError(
                f"{path} belongs to another run: its {name} is {there.get(name)}, here it is "
                f"{value}; remove the file to start anew, or name another one"
            )


def check_parts(parts: Iterable) -> None:
    """Raise ValueError for a model, optimizer, scheduler or probe that a checkpoint cannot hold.

    `bnnbook.training.train` asks before the first step, not at the first checkpoint.
    """
    for part in parts:
        lacking = [m for m in ("state_dict", "load_state_dict") if not hasattr(part, m)]
        if lacking:
            raise ValueError(f"with a checkpoint {type(part).__name__} needs a {lacking[0]}")
        file = io.BytesIO()
        try:
            torch.save(_as_python(part.state_dict(), with_tensors=False), file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{type(part).__name__}.state_dict() holds more than tensors, numbers, strings "
                f"and collections of them, which is all that a checkpoint can hold ({error})"
            ) from error


def load_part(path: Path, part, saved: dict) -> None:
    """Give a part of a run its saved state; raise CheckpointError if it does not take it.

    path: the checkpoint's file, for the message.
    """
    try:
        part.load_state_dict(saved)
    except (RuntimeError, ValueError, LookupError) as error:
        raise CheckpointError(
            f"{path} has a state that this {type(part).__name__} does not take ({error}); what is "
            "in a state must be there from the start. Remove the file to start anew"
        ) from error


def _as_python(value, with_tensors: bool = True):
    """Return a state with Python's numbers for NumPy's, which `read` would refuse as code.

    Collections are copied, of the same class and with their attributes. Without ``with_tensors``
    there is None for each tensor, since tensors can always be held.
    """
    convert = partial(_as_python, with_tensors=with_tensors)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor) and not with_tensors:
        return None
    if type(value) in (list, tuple):
        return type(value)(map(convert, value))
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.clear()
        for key, held in value.items():
            copied[convert(key)] = convert(held)
        return copied
    return value


# --- What a run is set to ----------------------------------------------------------------------


def settings(model: nn.Module, functions: Mapping[str, Callable | None],
             **stepped: Iterable) -> dict[str, object]:  # fmt: skip
    """Return a run's settings by name, as strings, numbers and collections of them.

    Two runs with the same settings compute the same, as far as that can be seen from outside: a
    function is compared by its name and by the values that it was made with, not by its code.

    functions: the functions that the run was given, by argument name, such as ``loss``.
    stepped: the run's ``optimizers`` and ``schedulers``, by these names.
    """
    parameters = model.named_parameters()
    frozen = [name for name, parameter in parameters if not parameter.requires_grad]
    found: dict[str, object] = {"list of frozen parameters": frozen}
    for name, layer in model.named_modules():
        for key, value in _as_first_seen(layer, _made_with).items():
            found[f"{key} of {name or 'the network'}"] = value
        for kind in QUANTIZED:  # which may be replaced between runs
            if (quantizer := getattr(layer, kind, None)) is not None:
                found[f"{kind} of {name or 'the network'}"] = _as_first_seen(quantizer, _described)
    for name, function in functions.items():
        holder = function.__self__ if inspect.ismethod(function) else function
        describe = _module_described if isinstance(holder, nn.Module) else _described
        found[f"setting of {name}"] = _as_first_seen(holder, describe)
    for kind, parts in stepped.items():
        for number, part in enumerate(parts):
            for key, value in _as_first_seen(part, _numbers).items():
                found[f"{key} of {type(part).__name__} ({number} of the {kind})"] = value
    return found


def name_of(function: Callable | None) -> str:
    """Return the name of a function, or of the class of another object."""
    name = getattr(function, "__qualname__", type(function).__name__)
    holder = getattr(function, "__self__", None)  # of a class method, such as Function.apply
    return f"{holder.__qualname__}.{function.__name__}" if isinstance(holder, type) else name


def _described(value, depth: int = 8) -> str:
    """Return a function's name and the plain values and tensors that it was made with, as text.

    None is left out, because it may stand for a value that the function has yet to compute.
    """
    if isinstance(value, nn.Parameter):  # which changes, like a network's buffers
        return f"parameter {tuple(value.shape)}"
    if isinstance(value, Tensor):
        return _fingerprint(value)
    if _is_array(value):
        return _fingerprint(torch.as_tensor(value))
    if _is_plain(value) or isinstance(value, nn.Module):  # not a network's buffers, which change
        return repr(value)
    told = [v for v in _made_from(value) if v is not None and _is_describable(v)]
    return f"{name_of(value)}({', '.join(_described(v, depth - 1) for v in told if depth)})"


def _module_described(module: nn.Module) -> str:
    """Return a module, such as a loss, as text, with its plain attributes and its buffers."""
    parts = (value for part in module.modules() for value in _attributes(part))
    shown = [repr(value) for value in parts if _is_plain(value)]
    return " ".join([repr(module), *shown, *map(_fingerprint, module.buffers())])


def _made_with(layer: nn.Module) -> dict[str, str]:
    """Return the plain attributes named like what a layer's class is called with, as text.

    Its repr need not show them. What else it holds may be a counter, or a cache.
    """
    own = vars(layer)
    names = [name for name in inspect.signature(type(layer).__init__).parameters if name in own]
    return {name: repr(own[name]) for name in names if _is_plain(own[name])}


def _is_array(value) -> bool:
    return isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf"


def _is_plain(value) -> bool:
    """Whether a value is a number, a string or a collection of them: alike in every process."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(map(_is_plain, (*value, *value.values())))
    return value is None or isinstance(value, (bool, int, float, str))


def _is_describable(value) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_describable, value))
    return callable(value) or _is_plain(value) or isinstance(value, Tensor) or _is_array(value)


def _made_from(value) -> Iterable:
    """Return what a function or an object was made with: arguments, closure, attributes."""
    value = inspect.unwrap(value) if callable(value) else value  # functools.cache hides them
    if isinstance(value, (tuple, list)):
        return value
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords, *value.keywords.values()]
    cells = getattr(value, "__closure__", None) or ()
    closed = [cell.cell_contents for cell in cells if cell != CellType()]
    return [*closed, *_attributes(value)]


def _attributes(value) -> list:
    """Return an object's public attributes, each after its name; those of a class do not count.

    A module's ``training`` is left out, because it changes during a run.
    """
    own = {} if isinstance(value, type) else getattr(value, "__dict__", {})
    shown = {k: v for k, v in own.items() if not k.startswith("_") and k != "training"}
    return [part for pair in shown.items() for part in pair]


def _fingerprint(tensor: Tensor) -> str:
    """Return a tensor as a short text: its shape, and the norm of its entries weighted by place.

    The norm is rounded, because another machine may have computed other last digits.
    """
    values = tensor.detach().double().flatten()
    places = torch.linspace(1, 2, len(values), dtype=torch.float64, device=values.device)
    return f"tensor {tuple(tensor.shape)} {(places * values).norm().item():.4g}"


def _numbers(part) -> dict[str, object]:
    """Return the plain values in the state of an optimizer or a scheduler, by name.

    And what is not in it: the functions of a schedule, and what follows each step (clipping, say).
    """
    state = part.state_dict()
    groups = state.get("param_groups", [state])
    found = {f"{key}, group {number}" if len(groups) > 1 else key:
                 dict(value) if isinstance(value, Mapping) else value
             for number, group in enumerate(groups) for key, value in group.items()
             if key != "params" and _is_plain(value)}  # fmt: skip
    # under names that the state has not, which an older file may hold without the functions
    if factors := list(map(_described, _factors(part))):
        found["factors"] = factors
    if (hooks := getattr(part, "_optimizer_step_post_hooks", None)) is not None:
        found["step hooks"] = list(map(_described, hooks.values()))
    return found


def _factors(scheduler) -> list[Callable]:
    """Return the functions of a scheduler, and of those that it consists of."""
    parts = getattr(scheduler, "_schedulers", ())
    own = getattr(getattr(scheduler, "scheduler", scheduler), "lr_lambdas", ())
    return [*own, *itertools.chain(*map(_factors, parts))]


# For each thing and each way to describe it, three descriptions: as the first run found it, as the
# last one left it, and what stands for the first in the run that is on.
_seen: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _as_first_seen(thing, describe: Callable):
    """Return describe(thing) as a first run found it, because rates and counters change in a run.

    What has changed since a run left it, somebody has set: that is described as it is now.
    """
    now = describe(thing)
    try:
        seen = _seen.setdefault(thing, {})
    except TypeError:  # it cannot be remembered without being kept alive
        return now
    first, last, _ = seen.get(describe, (now, now, now))
    seen[describe] = first, last, first if now == last else now
    return seen[describe][2]


def note_settings(
    model: nn.Module, functions: Mapping[str, Callable | None], **stepped: Iterable
) -> None:
    """Note how a run leaves its settings: what it changed itself, nobody else has set.

    Arguments as in `settings`.
    """
    quantizers = [getattr(layer, kind, None) for layer in model.modules() for kind in QUANTIZED]
    holders = [f.__self__ if inspect.ismethod(f) else f for f in functions.values()]
    for thing in (*model.modules(), *quantizers, *holders, *itertools.chain(*stepped.values())):
        with contextlib.suppress(TypeError):  # what cannot be remembered
            for describe, (_, _, first) in list(_seen.get(thing, {}).items()):
                _seen[thing][describe] = first, describe(thing), first
