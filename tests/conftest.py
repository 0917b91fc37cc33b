"""Fixtures that several test modules share."""

import os
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest

# What a shell runs in the background ignores Ctrl-C, and hands that on to the processes it starts;
# some tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the repository."""
    return ROOT


@pytest.fixture
def press_ctrl_c_at():
    """A function that lets this process get a SIGINT after so many training steps."""
    from bnnbook import probes

    def press(step: int, patch: pytest.MonkeyPatch) -> None:
        count, original = [], probes.FlipRatio.step

        def counted(self):
            original(self)
            count.append(1)
            if len(count) == step:
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(probes.FlipRatio, "step", counted)

    return press


@pytest.fixture
def toy_images(tmp_path, monkeypatch):
    """A function that puts 32 + 16 random colour images of a size, 10 classes, under "toy"."""

    def put(size: int) -> None:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (48, size, size, 3), dtype=np.uint8)
        labels = rng.permutation(np.arange(48) % 10)
        np.savez(tmp_path / "toy.npz", x_train=images[:32], y_train=labels[:32],
                 x_test=images[32:], y_test=labels[32:])  # fmt: skip
        monkeypatch.setenv("BNNBOOK_DATA", str(tmp_path))

    return put


@pytest.fixture(scope="session")
def compiler():
    """Skip where torch.compile finds no C++ compiler or no Python headers."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, in what it imports
        try:
            torch.compile(torch.neg)(torch.ones(3))
        except Exception as error:
            pytest.skip(f"torch.compile does not work here: {error}")
