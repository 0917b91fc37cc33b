"""Fixtures that several test modules share."""

import os
import signal
from pathlib import Path

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
