"""Fixtures that several test modules share."""

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
