"""A second device made of the CPU: what is on it must not meet what is on the CPU, as on a GPU.

What it computes, it computes on the CPU, so its numbers are those of the CPU bit for bit. It has
no random numbers and no streams of its own, and it never lags behind Python.
"""

import torch
from torch import library
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "second"
aten = torch.ops.aten
# As on a GPU, the first take tensors of the CPU, too, and the second take indices from there.
MOVES = {aten.copy_.default, aten._to_copy.default}
INDEXES = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
FACTORIES = ("arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace",
             "randperm", "randperm.generator")  # fmt: skip


class Backend(backend_registration._DummyBackendModule):
    """What torch asks of a device's module; it would be ``torch.second``."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
CPU, DEVICE = torch.device("cpu"), torch.device(NAME, 0)


class Second(torch.Tensor):
    """A tensor on the second device; its values are in ``held``, a tensor on the CPU."""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, layout=held.layout, device=DEVICE,
        )  # fmt: skip
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})

    def _set_data(self, new):
        torch.Tensor.data.__set__(self, new)
        self.held = new.detach().held

    data = property(torch.Tensor.data.__get__, _set_data)

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *, force=False):
        if not force:
            raise TypeError(f"can't convert a tensor on {DEVICE} to numpy")
        return self.detach().cpu().numpy()

    def __format__(self, spec):
        return format(self.item(), spec) if spec else repr(self)

    def __reduce_ex__(self, protocol):
        return self.detach().held.requires_grad_(self.requires_grad).__reduce_ex__(protocol)

    def __repr__(self):
        return f"{self.held}, on {DEVICE}"


def bare(value):
    """Return the tensor on the CPU that holds a second device's tensor; other values unchanged."""
    return value.held if isinstance(value, Second) else value


def compute(operation, args, kwargs):
    """Do an operation on the second device, or between it and another one."""
    _check_devices(operation, args, kwargs)
    target = kwargs.get("device")
    if target is not None and target.type == NAME:
        kwargs = {**kwargs, "device": CPU}
    result = operation(*tree_map(bare, args), **tree_map(bare, kwargs))
    if target is not None and target.type != NAME:  # a move away
        return result
    if operation is aten.copy_.default and not isinstance(args[0], Second):
        return args[0]
    known = {id(x.held): x for x in tree_leaves((args, kwargs)) if isinstance(x, Second)}
    return tree_map(lambda x: _on_device(x, known), result)


def _check_devices(operation, args, kwargs) -> None:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
    met = [args[0], *args[2:]] if operation in INDEXES else tensors
    strangers = [x for x in met if not isinstance(x, Second) and getattr(x, "ndim", 0)]
    if strangers and operation not in MOVES:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices in "
            f"{operation}: {[(str(x.device), *x.shape) for x in tensors]}"
        )


def _on_device(value, known):
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) not in known:
        return Second(value)
    outer = known[id(value)]
    if (outer.shape, outer.stride()) != (value.shape, value.stride()):  # changed in place
        torch.Tensor.data.__set__(outer, Second(value))
    return outer


# --- What makes tensors without being given one ------------------------------------------------


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    memory_format = memory_format or torch.contiguous_format
    return Second(torch.empty(size, dtype=dtype, memory_format=memory_format, device=CPU))


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return Second(torch.empty_strided(size, stride, dtype=dtype, device=CPU))


def _factory(name):
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(aten, packet), overload or "default")

    def make(*args, dtype=None, layout=None, device=None, pin_memory=None, **kwargs):
        _check_devices(operation, args, kwargs)
        return Second(operation(*args, dtype=dtype, device=CPU, **kwargs))

    return make


def _copy_from(source, target, non_blocking=False):
    bare(target).copy_(bare(source))
    return target


operations = library.Library("aten", "IMPL", "PrivateUse1")
operations.impl("empty.memory_format", _empty)
operations.impl("empty_strided", _empty_strided)
operations.impl("_copy_from", _copy_from)
for name in FACTORIES:
    operations.impl(name, _factory(name))
autocast = library.Library("_", "IMPL", "AutocastPrivateUse1")
autocast.fallback(library.fallthrough_kernel)
