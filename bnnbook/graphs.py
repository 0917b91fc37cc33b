"""CUDA graphs: the kernels of a training step, recorded once and then launched together.

Python launches a step's hundreds of kernels one by one. If they are small, the GPU waits for
Python; a graph is a single launch.
"""

import functools
import gc
import os
from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

WARM_UP = 3  # runs before the recording, in which libraries choose and load their kernels
# Where torch keeps the hooks of a module or a parameter.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
         "_post_accumulate_grad_hooks")  # fmt: skip


class GraphError(RuntimeError):
    """A step cannot be recorded or replayed as a CUDA graph; the message says what to do."""


class Graph:
    """A function of no arguments, recorded on a CUDA device; calling the graph replays it.

    function: made of tensor operations on the device, without waiting for it. A replay reads its
    inputs from the same places in memory, so change tensors in place. It runs ``WARM_UP`` times
    before it is recorded. A Python number in it keeps its value from the recording; random numbers
    of the device are drawn anew in each replay.
    device: the CUDA device.

    The tensors that a call returns, and those that the function leaves elsewhere, such as
    gradients, are overwritten by the next call. Raises GraphError if the function cannot be
    recorded, and torch.OutOfMemoryError.
    """

    def __init__(self, function: Callable, device: torch.device):
        self.graph, stream = torch.cuda.CUDAGraph(), _stream(device)
        with torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            try:
                with torch.cuda.graph(self.graph, stream=stream):
                    self.outputs = function()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # after which CUDA may fail in this process
                raise GraphError(
                    f"the step cannot be recorded as a CUDA graph ({error}); start anew with "
                    "BNNBOOK_GRAPHS=0 in the environment to train without graphs"
                ) from error

    def __call__(self):
        self.graph.replay()
        return self.outputs


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return a device's one stream for recordings: cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream(device)


def is_wanted(device: torch.device) -> bool:
    """Return whether to record graphs on a device: on CUDA, unless BNNBOOK_GRAPHS is 0.

    >>> is_wanted(torch.device("cpu"))
    False
    """
    return device.type == "cuda" and os.environ.get("BNNBOOK_GRAPHS") != "0"


def count_hooks(model: nn.Module) -> int:
    """Return the number of hooks of the model and its parameters, which a replay would skip.

    >>> count_hooks(nn.Linear(2, 2))
    0
    """
    parts = [*model.modules(), *model.parameters()]
    return sum(len(getattr(part, hooks, None) or ()) for part in parts for hooks in HOOKS)


def is_held(model: nn.Module) -> bool:
    """Return whether an earlier result of the model still refers to its parameters.

    Gradients of such parameters are accumulated on the CUDA stream of that result, which takes no
    part in a recording.

    >>> model = nn.Linear(2, 2)
    >>> is_held(model)
    False
    >>> kept = model(torch.ones(2))
    >>> is_held(model)
    True
    """
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(map(_has_accumulator, learned)):
        gc.collect()
    return any(map(_has_accumulator, learned))


def _has_accumulator(parameter: nn.Parameter) -> bool:
    """Whether something keeps the node that accumulates the gradient: a new one has no mark."""
    get_gradient_edge(parameter).node.metadata["seen by bnnbook"] = True
    return "seen by bnnbook" in get_gradient_edge(parameter).node.metadata
