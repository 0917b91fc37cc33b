"""How things are timed: in turns, in one process, taking the best of many repeats."""

import time
from collections.abc import Callable

import torch


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Time one call, waiting for the device before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def best(functions: dict[str, Callable], device: torch.device, repeats: int) -> dict[str, float]:
    """Return each function's shortest time in seconds.

    The functions take turns, so that a machine that is busy for a while slows all of them; a first
    call of each is not counted.
    """
    for function in functions.values():
        function()
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function, device))
    return {name: min(values) for name, values in times.items()}


def row(what: str, ours: float, plain: float, limit: str, holds: bool, unit: str = "time") -> dict:
    """Return one line of the table: the ratio of our time to the plain one, and the goal.

    With another ``unit`` than "time" the ratio is that of the speeds.
    """
    ratio = ours / plain if unit == "time" else plain / ours
    return {"what": what, "ratio": ratio, "goal": limit, "met": holds,
            "seconds": ours, "plain_seconds": plain}  # fmt: skip
