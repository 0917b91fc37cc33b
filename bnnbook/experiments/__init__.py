"""The papers' experiments: one module a paper, one function per figure or table.

Each function runs one variant with one seed at one scale and returns a `records.Record`.
"""

from bnnbook.experiments import alexnet, binaryconnect, helwegen2019, quist2023

PAPERS = (alexnet, binaryconnect, helwegen2019, quist2023)


def names() -> list[str]:
    """Return the experiments' names, paper by paper.

    >>> "binaryconnect.table2" in names()
    True
    """
    return [f"{_short(paper)}.{name}" for paper in PAPERS for name in paper.VARIANTS]


def find(name: str):
    """Return (function, variants, recipes) of an experiment such as "binaryconnect.table2"."""
    if name not in names():
        raise ValueError(f"unknown experiment {name!r}; known: {', '.join(names())}")
    paper = next(p for p in PAPERS if name.startswith(_short(p) + "."))
    short = name.removeprefix(_short(paper) + ".")
    return getattr(paper, short), paper.VARIANTS[short], paper.RECIPES[short]


def _short(paper) -> str:
    return paper.__name__.rpartition(".")[2]
