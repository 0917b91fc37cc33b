"""How fast an epoch of three full-scale recipes is, on random images of CIFAR-10's shape.

Each runs through its experiment's own code. On a GPU, steps replayed as a CUDA graph are compared
with ordinary ones, and the rate of multiplications with that of a plain matrix product; the goals
are for an H200. On a CPU there is a short epoch of the one recipe that is not too slow for it, in
float32 and in bfloat16.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.timing import best
from bnnbook.experiments import binaryconnect, helwegen2019, quist2023
from bnnbook.models import summary
from bnnbook.training import autocast_dtype

IMAGES = {"cpu": 1024, "cuda": 50_000}
SIZE = {"cpu": 1024, "cuda": 8192}  # of the square matrices whose product sets the rate


@dataclass
class Case:
    """A recipe's training; ``goal`` is the most seconds that an epoch should take on an H200."""

    fit: Callable
    recipe: quist2023.Recipe | helwegen2019.Recipe | binaryconnect.Recipe
    goal: float | None = None
    options: tuple = ()


CASES = {
    "Bi-Real Net 20, batch 256": Case(quist2023.fit, quist2023.FULL, 3.0),
    "BinaryNet, batch 100": Case(helwegen2019.fit, helwegen2019.CIFAR, 1.8),
    "BinaryConnect's network, batch 50": Case(
        binaryconnect.fit, binaryconnect.CIFAR10, None, ("stochastic",)
    ),
}


def write_images(folder: Path, n: int) -> None:
    """Write n training and n / 5 test images of CIFAR-10's shape as the data set "random"."""
    rng = np.random.default_rng(0)
    sets = {}
    for name, count in (("train", n), ("test", n // 5)):
        sets[f"x_{name}"] = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        sets[f"y_{name}"] = np.arange(count) % 10
    np.savez(folder / "random.npz", **sets)


def matrix_rate(device: torch.device) -> float:
    """Return the multiplications per second of a matrix product, in the dtype of training."""
    n, dtype = SIZE[device.type], autocast_dtype(device) or torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return n**3 / best({"product": lambda: a @ b}, device, 10)["product"]


def timed(case: Case, device: torch.device, graph: bool,
          precision: str = "auto") -> tuple[float, int, int]:  # fmt: skip
    """Return the second epoch's seconds, with its test, training images and multiplications."""
    chosen = {"BNNBOOK_GRAPHS": str(int(graph)), "BNNBOOK_PRECISION": precision}
    with patch.dict(os.environ, chosen):
        fitted = case.fit(replace(case.recipe, dataset="random", epochs=2), *case.options,
                          device=device)  # fmt: skip
    macs = summary(fitted.model.cpu(), (3, 32, 32)).loc["total", ["macs", "bops"]].sum()
    # a training image counts three times: once forward, twice backward
    images = len(fitted.dataset.train_images)  # without those held out
    passes = 3 * images + len(fitted.dataset.test_images)
    return fitted.history.rows[-1]["seconds"], images, int(macs) * passes


def row(name: str, case: Case, device: torch.device, rate: float) -> dict:
    """Return a recipe's line of the table; "ratio" is the time with a graph over that without."""
    seconds, images, products = timed(case, device, graph=True)
    found = {"what": f"{name}, an epoch", "seconds": seconds,
             "images_per_second": images / seconds,
             "share_of_matrix_rate": products / seconds / rate}  # fmt: skip
    if device.type == "cpu":
        return found
    stepped = timed(case, device, graph=False)[0]
    goal = {} if case.goal is None else {"goal": f"<= {case.goal} s", "met": seconds <= case.goal}
    return found | {"ratio": seconds / stepped, "plain_seconds": stepped} | goal


def in_bfloat16(name: str, case: Case, device: torch.device, float32: float) -> dict:
    """Return the line that compares an epoch in bfloat16, its test apart, with one in float32."""
    seconds, *_ = timed(case, device, graph=False, precision="bfloat16")
    return {"what": f"{name}, an epoch in bfloat16 / float32", "seconds": seconds,
            "plain_seconds": float32, "ratio": seconds / float32}  # fmt: skip


def run(device: torch.device, repeats: int) -> list[dict]:
    """Time the recipes one after the other; ``repeats`` is ignored, because an epoch is long."""
    rate = matrix_rate(device)
    names = list(CASES) if device.type == "cuda" else list(CASES)[:1]
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, BNNBOOK_DATA=folder):
        write_images(Path(folder), IMAGES[device.type])
        table = [row(name, CASES[name], device, rate) for name in names]
        if device.type == "cpu":
            case = CASES[names[0]]
            table.append(in_bfloat16(names[0], case, device, table[0]["seconds"]))
        return table
