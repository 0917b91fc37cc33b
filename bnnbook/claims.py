"""A paper's claim, our measurement and the verdict: shown in a chapter, and readable by tools."""

import math
import re
import statistics
from ast import literal_eval
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from . import records

MIME = "application/vnd.bnnbook.claim+json"
REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
OPEN = "only at full scale, not yet recorded"
# The CSS class of each verdict.
BADGE = {REPRODUCED: "reproduced", NOT_REPRODUCED: "not-reproduced", OPEN: "open"}
# A space between a number and what belongs to it.
WITHIN = re.compile(r"(?<=\d) (?=[%×±·])|(?<=[×±·]) (?=\d)|(?<=\bn) (?==)|(?<=\bn =) ")
ID = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")

_checked: dict[str, "Claim"] = {}


@dataclass(frozen=True)
class Claim:
    """A claim with its verdict; as the value of a notebook cell it is shown as a table row.

    ``measured`` holds values, n, mean, spread (sample standard deviation, None when n < 2), unit
    and text. ``n`` is 0 for a claim that was not measured, and None if ``measured`` was text.
    """

    id: str
    statement: str
    paper: str | None
    source: str | None
    measured: dict[str, Any]
    scale: str
    hardware: str | None
    verdict: str

    def __str__(self) -> str:
        paper, ours = self.paper or "—", self.measured["text"] or "—"
        where = ", ".join(filter(None, (self.scale, self.hardware)))
        return (
            f"{self.id}: {self.verdict}\n  {self.statement}\n"
            f"  paper: {paper}\n  ours: {ours} [{where}]"
        )

    def _repr_html_(self) -> str:
        where = f"{self.scale} scale" + (f", {self.hardware}" if self.hardware else "")
        paper = self.paper or "—"
        if self.source:
            paper += f" ({self.source})"
        cells = [self.statement, paper, self.measured["text"] or "—", where]
        row = "".join(f"<td>{unbroken(escape(cell))}</td>" for cell in cells)
        badge = f'<span class="verdict {BADGE[self.verdict]}">{escape(self.verdict)}</span>'
        heads = ("claim", "paper", "ours", "scale, hardware", "verdict")
        head = "".join(f'<th scope="col">{name}</th>' for name in heads)
        return (
            f'<table class="bnnbook-claim" id="{escape(self.id)}"><thead><tr>{head}</tr>'
            f"</thead><tbody><tr>{row}<td>{badge}</td></tr></tbody></table>"
        )

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        return {"text/plain": str(self), "text/html": self._repr_html_(), MIME: asdict(self)}


def unbroken(text: str) -> str:
    """Return text with spaces that break no line within "0.65 ± 0.34 %", "8 × 8" and "n = 3".

    >>> unbroken("0.65 ± 0.34 % (n = 3)").split(" ")
    ['0.65\\xa0±\\xa00.34\\xa0%', '(n\\xa0=\\xa03)']
    """
    return WITHIN.sub("\u00a0", text)


def check(
    id: str,
    statement: str,
    paper: str | None = None,
    measured: Sequence[float] | float | str | None = None,
    holds: bool | None = None,
    scale: str = "small",
    unit: str = "",
    hardware: str | None = None,
    source: str | None = None,
) -> Claim:
    """State a paper's claim, what was measured, and whether the claim holds.

    ``measured`` is a sequence of numbers (one per run), one number, or text; ``holds`` is the
    verdict on it. Both are None for a claim that needs a full-scale run which is not yet recorded.
    ``paper`` is the paper's number as text, and ``source`` where the paper gives it. ``hardware``
    is this machine by default; at full scale it must be given, because the run may have been made
    elsewhere.

    The same ``id`` may be checked again with new measurements, as when a cell is run twice, but
    not with another ``statement`` or ``paper``. Raises ValueError for that, for malformed
    arguments, for a number that is not finite, and for a verdict without a measurement or a
    measurement without a verdict.

    >>> print(check("toy.sum", "1 + 1 is 2", "2", measured=1 + 1, holds=True, hardware="any"))
    toy.sum: reproduced
      1 + 1 is 2
      paper: 2
      ours: 2 (n = 1) [small, any]
    """
    _check_texts(id, statement, paper, unit, hardware, source)
    if scale not in records.SCALES:
        raise ValueError(f"{id}: unknown scale {scale!r}; known: {', '.join(records.SCALES)}")
    verdict = _verdict(id, measured, holds)
    summary = _summary(id, measured, unit)
    if verdict != OPEN and hardware is None:
        if scale == "full":
            raise ValueError(f"{id}: say on what hardware= the full-scale runs were made")
        hardware = records.device_name()
    claim = Claim(id, statement, paper, source, summary, scale, hardware, verdict)
    before = _checked.get(id, claim)
    if (before.statement, before.paper) != (claim.statement, claim.paper):
        raise ValueError(f"{id} is already the id of another claim: {before.statement!r}")
    _checked[id] = claim
    return claim


def check_recorded(
    id: str,
    statement: str,
    experiment: str,
    variants: Sequence[str],
    value: Callable[[dict[str, records.Record]], float],
    above: float = 0.0,
    below: float = math.inf,
    *,
    paper: str | None = None,
    source: str | None = None,
    unit: str = "",
    shortened: bool = False,
    root=None,
) -> Claim:
    """State a claim about an experiment's full-scale records; it is open while a variant has none.

    For each seed that all ``variants`` have, ``value`` is called with a dict of their records by
    variant and returns a number; the claim holds if the mean of these numbers lies between
    ``above`` and ``below``. Only runs of the whole recipe count, unless ``shortened`` is True:
    then the longest runs that all variants have count, and their length is added to the ``unit``.
    Runs of different precision are not compared with each other.

    Raises ValueError as `check` does, and for an empty ``variants``. ``root`` is as in
    `records.load`.
    """
    sets = recorded_sets(experiment, variants, shortened, root)
    if not sets:
        return check(id, statement, paper, scale="full", unit=unit, source=source)
    runs = [run for found in sets for run in found.values()]
    measured = [value(found) for found in sets]
    return check(
        id, statement, paper, measured, above < statistics.fmean(measured) < below, "full",
        unit=", ".join(filter(None, (unit, runs[0].shortened))),
        hardware=", ".join(sorted({run.made_on for run in runs})), source=source,
    )  # fmt: skip


def recorded_sets(
    experiment: str, variants: Sequence[str], shortened: bool = False, root=None
) -> list[dict[str, records.Record]]:
    """Return one dict per seed: a full-scale record of every variant, the longest that all have.

    A run of its whole recipe counts as longer than any shortened one, whatever its epochs: those
    of one step and of two half as long are paired. The arguments are as in `check_recorded`; the
    list is empty while a variant has no record. Raises ValueError for an empty ``variants``.
    """
    if not variants:
        raise ValueError(f"{experiment}: name at least one variant")
    found: dict[tuple[float, int, str], dict[str, records.Record]] = {}
    known = experiment in records.experiments(root)
    for run in records.read_all(experiment, root) if known else ():
        counts = run.scale == "full" and (shortened or not run.shortened)
        if counts and run.variant in variants:
            epochs = run.recipe["epochs"] if run.shortened else math.inf
            key = epochs, run.seed, run.precision
            found.setdefault(key, {})[run.variant] = run
    complete = {key: runs for key, runs in found.items() if len(runs) == len(set(variants))}
    longest = max((key[0] for key in complete), default=None)
    return [complete[key] for key in sorted(complete) if key[0] == longest]


def _check_texts(id, statement, paper, unit, hardware, source) -> None:
    if not isinstance(id, str) or not ID.fullmatch(id):
        raise ValueError(f"malformed id {id!r}: lower-case words joined by dots or hyphens")
    if not isinstance(statement, str) or not statement.strip():
        raise ValueError(f"{id}: the statement is empty")
    texts = {"paper": paper, "unit": unit, "hardware": hardware, "source": source}
    for name, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{id}: {name} must be text, not {text!r}")


def _verdict(id: str, measured, holds) -> str:
    if (measured is None) != (holds is None):
        raise ValueError(
            f"{id}: a measurement needs a verdict and a verdict a measurement: give measured= and "
            f"holds=, or neither"
        )
    if holds is None:
        return OPEN
    # numpy.bool and a one-element tensor of bool count as bool; 1, "yes" or an array do not.
    if not isinstance(holds, bool):
        holds = holds.item() if getattr(holds, "ndim", None) == 0 else holds
    if not isinstance(holds, bool):
        raise ValueError(f"{id}: holds must be True, False or None, not {holds!r}")
    return REPRODUCED if holds else NOT_REPRODUCED


def _summary(id: str, measured, unit: str) -> dict[str, Any]:
    """Return the measured dict of a claim: values, n, mean, spread, unit, text."""
    summary = {"values": [], "n": 0, "mean": None, "spread": None, "unit": unit, "text": ""}
    if measured is None:
        return summary
    if isinstance(measured, str):
        if not measured.strip():
            raise ValueError(f"{id}: the measurement is empty")
        return summary | {"n": None, "text": measured}
    values = [_number(id, value) for value in _sequence(measured)]
    if not values:
        raise ValueError(f"{id}: measured is empty")
    mean, n = statistics.fmean(values), len(values)
    spread = statistics.stdev(values) if n > 1 else None
    whole = n == 1 and isinstance(values[0], int)
    text = f"{values[0]}".replace("-", "−") if whole else three_digits(mean, spread)
    text = " ".join(filter(None, (text, unit, f"(n = {n})")))
    return summary | {"values": values, "n": n, "mean": mean, "spread": spread, "text": text}


def _sequence(measured) -> list:
    measured = measured.tolist() if hasattr(measured, "tolist") else measured
    if isinstance(measured, (Mapping, bytes)):
        raise ValueError(f"measured must be numbers or text, not {type(measured).__name__}")
    return list(measured) if hasattr(measured, "__iter__") else [measured]


def _number(id: str, value) -> float | int:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{id}: measured holds {value!r}, which is not a number")
    if not math.isfinite(value):
        raise ValueError(f"{id}: measured holds {value}")
    return value


def three_digits(mean: float, spread: float | None = None) -> str:
    """Return ``mean ± spread`` with three significant digits of the larger one.

    The spread has as many decimals as the mean, or one significant digit if it would become 0.

    >>> three_digits(0.98765, 0.0123), three_digits(98.765), three_digits(1.5, 0.0001)
    ('0.988 ± 0.012', '98.8', '1.50 ± 0.0001')
    >>> three_digits(0.142, 1e-17), three_digits(-0.142, math.nan)
    ('0.142 ± 0.000', '−0.142')
    """
    return _digits(mean, spread).replace("-", "−")


def _digits(mean: float, spread: float | None) -> str:
    if spread is not None and not spread > 1e-9 * abs(mean):  # rounding, or the NaN of one run
        spread = None if math.isnan(spread) else 0.0
    size = max(abs(mean), spread or 0) or 1.0
    decimals = 2 - math.floor(math.log10(float(f"{size:.3g}")))  # 0.9996 is 1.00
    decimals = max(decimals, 0) if size < 1000 else decimals
    if not 0 <= decimals <= 6:
        return f"{mean:.3g}" if spread is None else f"{mean:.3g} ± {spread:.2g}"
    text = f"{round(mean, decimals) + 0.0:.{decimals}f}"  # + 0.0 makes -0.0 a 0.0
    if spread is None:
        return text
    rounded = f"{spread:.{decimals}f}"
    return f"{text} ± {rounded if float(rounded) or not spread else f'{spread:.1g}'}"


def verdicts() -> dict[str, str]:
    """Return the verdicts of all claims checked so far, by id: for a cell that tests compare."""
    return {id: claim.verdict for id, claim in _checked.items()}


def reset() -> None:
    """Forget all claims that have been checked."""
    _checked.clear()


def glue(name: str, text: str) -> None:
    """Bind a number in the chapter's prose to this cell: ``{glue:text}`name``` shows ``text``.

    Round the number yourself: ``glue("error", f"{error:.2f} %")``. Raises ValueError for an empty
    ``name`` and TypeError for a ``text`` that is not a string.
    """
    from IPython.display import display

    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"the name of a glued text must not be empty: {name!r}")
    if not isinstance(text, str):
        raise TypeError(
            f"glue({name!r}, …) takes text, not {type(text).__name__}: format it first"
        )
    # the page shows the value of what reads as a Python literal: 1.00 as 1.0, but "1.00" as 1.00
    shown = repr(text) if _is_literal(text) else text
    prefix = "application/papermill.record/"
    scrapbook = {"name": name, "mime_prefix": prefix}
    display({f"{prefix}text/plain": shown}, raw=True, metadata={"scrapbook": scrapbook})


def _is_literal(text: str) -> bool:
    try:
        literal_eval(text)
    except (SyntaxError, TypeError, ValueError):
        return False
    return True


def from_notebook(nb: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the claims in an executed notebook's outputs, in order, as dicts.

    Raises ValueError for a claim that lacks a key, has an unknown verdict, or repeats an id.
    """
    found: dict[str, dict[str, Any]] = {}
    for claim in _outputs(nb):
        missing = set(Claim.__annotations__) - set(claim)
        if missing:
            raise ValueError(f"claim {claim.get('id')!r} misses the keys {sorted(missing)}")
        if claim["verdict"] not in BADGE:
            raise ValueError(f"claim {claim['id']!r} has the unknown verdict {claim['verdict']!r}")
        if claim["id"] in found:
            raise ValueError(f"claim {claim['id']!r} stands twice in the notebook")
        found[claim["id"]] = dict(claim)
    return list(found.values())


def _outputs(nb: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for cell in nb["cells"]:
        for output in cell.get("outputs", ()):
            if MIME in output.get("data", {}):
                yield output["data"][MIME]
