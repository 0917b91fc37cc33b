"""Compare fresh notebooks with the committed ones: `python -m tools.compare FRESH_DIR`.

Facts must be equal to the letter, claims must keep their verdicts, and figures that depend on no
training must look the same; of other figures only the number counts.
"""

import argparse
import base64
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from nbformat import NotebookNode
from PIL import Image

from bnnbook import claims
from tools.chapters import IMAGES, ROOT, code_cells, rms, tags

# Root mean square over all pixels and channels, 0 to 255. The same drawing on another machine
# gives 0 or a small fraction; one more epoch of training in a curve gave 22.
RMS_LIMIT = 2.0


def differences(fresh: NotebookNode, committed: NotebookNode) -> Iterator[str]:
    """What differs between two executions of one chapter, in words."""
    new, old = code_cells(fresh), code_cells(committed)
    if [cell.source for cell in new] != [cell.source for cell in old]:
        yield "the code cells differ: the committed notebook is stale"
        return
    if not any("nbval-check-output" in tags(cell) for cell in old):
        yield "no cell is tagged nbval-check-output: nothing would be compared"
    for index, (now, then) in enumerate(zip(new, old, strict=True)):
        yield from (f"cell {index}: {text}" for text in _cell_differences(now, then))
    yield from _claim_differences(fresh, committed)


def _cell_differences(fresh: NotebookNode, committed: NotebookNode) -> Iterator[str]:
    new, old = images(fresh), images(committed)
    if len(new) != len(old):
        yield f"{len(new)} images, committed {len(old)}"
    elif "check-figure" in tags(committed):
        if not old:
            yield "tagged check-figure, but it draws nothing"
        for now, then in zip(new, old, strict=True):
            yield from _figure_differences(now, then)
    if "nbval-check-output" in tags(committed):
        now, then = texts(fresh), texts(committed)
        if not any(text for _, text in then):
            yield "tagged nbval-check-output, but it prints nothing"
        if now != then:
            yield f"fact changed\n  committed: {then}\n  fresh:     {now}"


def _figure_differences(fresh: np.ndarray, committed: np.ndarray) -> Iterator[str]:
    if fresh.shape != committed.shape:
        yield f"figure of {fresh.shape[:2]} pixels, committed {committed.shape[:2]}"
    elif (distance := rms(fresh, committed)) > RMS_LIMIT:
        yield f"figure changed: RMS {distance:.2f} of 255, limit {RMS_LIMIT}"


def _claim_differences(fresh: NotebookNode, committed: NotebookNode) -> Iterator[str]:
    try:
        new, old = verdicts(fresh), verdicts(committed)
    except ValueError as error:
        yield str(error)
        return
    if not old:
        yield "no claim is checked in this chapter"
    for name in sorted(new.keys() | old.keys()):
        if new.get(name) != old.get(name):
            now, then = new.get(name, "missing"), old.get(name, "missing")
            yield f"claim {name}: {now}, committed: {then}"


def verdicts(notebook: NotebookNode) -> dict[str, str]:
    """The verdicts in a notebook's outputs, by the id of the claim."""
    return {claim["id"]: claim["verdict"] for claim in claims.from_notebook(notebook)}


def images(cell: NotebookNode) -> list[np.ndarray]:
    """The pictures among a cell's outputs as RGBA pixels."""
    encoded = [
        output.data[kind]
        for output in cell.outputs
        for kind in IMAGES
        if kind in output.get("data", {})
    ]
    decoded = [Image.open(io.BytesIO(base64.b64decode(text))) for text in encoded]
    return [np.asarray(image.convert("RGBA")) for image in decoded]


def texts(cell: NotebookNode) -> list[Any]:
    """What a cell printed or displayed, pictures left out, each piece with its kind."""
    found = []
    for output in cell.outputs:
        if output.output_type == "stream":
            found.append((output.name, output.text))
        elif output.output_type == "error":
            found.append(("error", f"{output.ename}: {output.evalue}"))
        else:
            found += [(kind, text) for kind, text in output.data.items() if kind not in IMAGES]
    return found


def compare(fresh: Path, committed: Path) -> dict[str, list[str]]:
    """Differences by chapter, over the notebooks of two folders."""
    names = sorted({path.name for folder in (fresh, committed) for path in folder.glob("*.ipynb")})
    result = {}
    for name in names:
        absent = [folder for folder in (fresh, committed) if not (folder / name).is_file()]
        if absent:
            result[name] = [f"missing in {absent[0]}"]
        else:
            pair = [nbformat.read(folder / name, as_version=4) for folder in (fresh, committed)]
            result[name] = list(differences(*pair))
    return result


def report(name: str, committed: Path, problems: list[str]) -> str:
    """One line about a chapter: what was compared, and whether it agrees."""
    path = committed / name
    cells = code_cells(nbformat.read(path, as_version=4)) if path.is_file() else []
    facts = sum("nbval-check-output" in tags(cell) for cell in cells)
    figures = sum("check-figure" in tags(cell) for cell in cells)
    stated = sum(
        claims.MIME in output.get("data", {}) for cell in cells for output in cell.outputs
    )
    verdict = f"{len(problems)} differences" if problems else "equal"
    return f"{name:32}{facts:4} facts {stated:4} claims {figures:4} figures  {verdict}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.compare")
    parser.add_argument("fresh", type=Path, help="folder of freshly executed notebooks")
    parser.add_argument("committed", type=Path, nargs="?", default=ROOT / "notebooks")
    arguments = parser.parse_args(argv)
    result = compare(arguments.fresh, arguments.committed)
    if not result:
        print("error: no notebooks to compare", file=sys.stderr)
        return 1
    for name, problems in result.items():
        print(report(name, arguments.committed, problems))
        for problem in problems:
            print(f"  {problem}")
    return 1 if any(result.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
