"""A tape that plays the part of a CUDA graph on another device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bnnbook import graphs

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
         "aten::_unique2"}  # fmt: skip


def waits(operation, args, kwargs=None) -> bool:
    """Return whether Python would have to wait for a GPU to finish this operation."""
    name = operation._schema.name
    if name in ("aten::copy_", "aten::_to_copy"):
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        devices = {x.device for x in tensors} | {(kwargs or {}).get("device") or args[0].device}
        return len(devices) > 1
    masks = name.startswith("aten::index") and any(
        isinstance(index, torch.Tensor) and index.dtype == torch.bool
        for index in tree_leaves(args[1:2])
    )
    return name in WAITS or masks


def without_history(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


def address(tensor) -> int:
    return getattr(tensor, "held", tensor).data_ptr()


class Tape(TorchDispatchMode):
    """A `graphs.Graph` for a device without CUDA: plays each operation again, on the same memory.

    As a CUDA graph it runs no Python. What an operation returns goes where it went when it was
    recorded, and every number that was not a tensor then stays what it was.
    """

    def __init__(self, function, device):
        super().__init__()
        self.operations = []
        for _ in range(graphs.WARM_UP):
            function()
        with self:
            self.outputs = function()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if waits(operation, args, kwargs):
            raise RuntimeError(f"{operation} is not permitted when stream is capturing")
        result = operation(*args, **(kwargs or {}))
        # the same memory without its history, which a graph does not keep either
        known = tree_map(without_history, (args, kwargs or {}, result))
        self.operations.append((operation, *known))
        return result

    @torch.no_grad()
    def __call__(self):
        for operation, args, kwargs, result in self.operations:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and address(old) != address(new):
                    old.copy_(new)  # neither a view nor an operation in place
        return self.outputs
