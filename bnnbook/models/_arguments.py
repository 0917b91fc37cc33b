"""Checks of the constructors' arguments, which raise ValueError."""

from collections.abc import Collection
from numbers import Integral


def check_choice(argument: str, value, known: Collection) -> None:
    """Raise ValueError unless ``value`` is one of ``known``.

    >>> check_choice("pooling", 4, (2, 3))
    Traceback (most recent call last):
    ...
    ValueError: unknown pooling 4; known: 2, 3
    """
    if value not in tuple(known):
        listed = ", ".join(str(each) for each in known)
        raise ValueError(f"unknown {argument} {value!r}; known: {listed}")


def check_counts(**counts) -> None:
    """Raise ValueError unless each argument is a positive integer or a sequence of them.

    >>> check_counts(classes=10, widths=(16, 32))
    >>> check_counts(experts=0)
    Traceback (most recent call last):
    ...
    ValueError: experts: positive integers, not 0
    """
    for argument, value in counts.items():
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        if not numbers or not all(isinstance(n, Integral) and n > 0 for n in numbers):
            raise ValueError(f"{argument}: positive integers, not {value!r}")


def check_lengths(length: int, **sequences) -> None:
    """Raise ValueError unless each argument is a sequence of the given length.

    >>> check_lengths(3, convolutions=(6, 6))
    Traceback (most recent call last):
    ...
    ValueError: convolutions: 3 numbers, not 2
    """
    for argument, value in sequences.items():
        if len(value) != length:
            raise ValueError(f"{argument}: {length} numbers, not {len(value)}")
