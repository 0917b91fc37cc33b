"""CUDA graphs: the kernels of a training step, recorded once and then launched together.

Python launches a step's hundreds of kernels one by one. If they are small, the GPU waits for
Python; a graph is a single launch.
"""

import contextlib
import functools
import gc
import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from bnnbook.layers import QUANTIZED

# By how much a replayed gradient may differ from a step's, relative to its norm. They round alike;
# what Python draws or counts makes them differ by far more.
MOST_OFF = 0.01
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
                # after a failure torch leaves its own stream current, so ours is left by itself
                with torch.cuda.stream(stream), torch.cuda.graph(self.graph, stream=stream):
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


class GraphedPasses:
    """The forward and backward pass of a run of `training.train`, replayed as a CUDA graph.

    Called with the places of a batch's images, it returns their loss and hits, and leaves the
    gradients at the parameters. Raises GraphError for passes that a replay does not repeat.
    """

    def __init__(self, run):
        self.index = torch.arange(run.batch_size, device=run.device)
        self.parameters = run.parameters
        with _undone(run):
            self.graph = Graph(partial(self.step, run, self.index), run.device)
        self.fixed = _fixed_in_a_graph(run)
        self.grads = [parameter.grad for parameter in self.parameters]
        self.check(run)
        self.check_fixed(run)

    def step(self, run, index: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients into new tensors; the graph keeps those of its recording."""
        run.clear_gradients()
        return run.passes(index)

    def check(self, run) -> None:
        """Raise GraphError if a replay on other images differs from an ordinary step on them."""
        index = (self.index + run.batch_size) % len(run.labels)
        with _undone(run):
            self.step(run, index)
        stepped = [p.grad for p in self.parameters if p.grad is not None]
        with _undone(run):
            self(index)
        replayed = [p.grad for p in self.parameters if p.grad is not None]
        off = sum((a - b).float().norm() ** 2 for a, b in zip(stepped, replayed, strict=True))
        if off > MOST_OFF**2 * sum(a.float().norm() ** 2 for a in stepped):
            raise GraphError(
                "replayed as a CUDA graph, the step gives other gradients. If augment, "
                "preprocess, the loss or the model uses a number that Python draws or counts, "
                "train with graph=False"
            )
        run.clear_gradients()

    def check_fixed(self, run) -> None:
        """Raise GraphError if something has changed that a replay takes as it was recorded."""
        now = _fixed_in_a_graph(run)
        changed = [name for name in {**self.fixed, **now} if self.fixed.get(name) != now.get(name)]
        if changed:
            raise GraphError(
                f"{changed[0]} has changed since the step was recorded as a CUDA graph, and a "
                "replay would not know: train with graph=False, or change tensors in place"
            )

    def __call__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        self.index.copy_(index)
        outputs = self.graph()
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            parameter.grad = grad  # `clear_gradients` has set it to None
        return outputs


def _fixed_in_a_graph(run) -> dict[str, object]:
    """Return, by name, what a replay takes as recorded: where tensors are, and plain numbers."""
    found: dict[str, object] = {}
    for prefix, part in (("", run.model), ("loss", run.loss)):
        if not isinstance(part, nn.Module):
            continue
        for name, tensor in (*part.named_parameters(prefix), *part.named_buffers(prefix)):
            found[name] = tensor.data_ptr(), tensor.requires_grad
        for name, module in part.named_modules(prefix=prefix):
            for key, value in vars(module).items():
                if type(value) in (bool, int, float, str) and key != "training":
                    found[f"{key} of {name or 'the network'}"] = value
                elif key in QUANTIZED:
                    found[f"{key} of {name or 'the network'}"] = id(value)
    return found


@contextlib.contextmanager
def _undone(run):
    """Undo what the passes change besides gradients: buffers and the random generators."""
    modules = [part for part in (run.model, run.loss) if isinstance(part, nn.Module)]
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    devices = [run.device] if run.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


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
