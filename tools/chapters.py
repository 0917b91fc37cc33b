"""From `book/*.md` to the executed `notebooks/*.ipynb`: `python -m tools.chapters build`.

A chapter is executed again only when its key changes: the hash of its code cells, its parameters,
the library files that it can reach, the locked versions of torch, NumPy and Matplotlib, and how
figures are stored. When only its text has changed, it is renewed around the stored outputs.
"""

import ast
import base64
import contextlib
import fcntl
import hashlib
import importlib.metadata
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from nbformat import NotebookNode

from tools.imports import parse, reached_files

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "bnnbook"
VERSIONED = ("torch", "numpy", "matplotlib")
# The other tags concern the page and the checks; changing one needs no execution.
EXECUTION_TAGS = {"parameters", "nbval-ignore-output"}
IMAGES = ("image/png", "image/jpeg")
# Figures are stored with as many colours as keep them within this RMS of the drawing, 0 to 255.
PALETTES = (128, 256)
PALETTE_RMS = 1.0


class BookError(Exception):
    """A fault that the author of a chapter has to mend; the message says which."""


@dataclass(frozen=True)
class Chapter:
    """One chapter: its text and, elsewhere, its executed notebook."""

    root: Path
    name: str

    @property
    def source(self) -> Path:
        return self.root / "book" / f"{self.name}.md"

    def notebook(self, folder: Path | None = None) -> Path:
        return (folder or self.root / "notebooks") / f"{self.name}.ipynb"

    def read(self) -> NotebookNode:
        """The text as a notebook without outputs."""
        import jupytext

        try:
            return jupytext.read(self.source)
        except Exception as error:
            raise BookError(
                f"{self.source}: cannot be read as a MyST notebook: {error}"
            ) from error


def find(root: Path = ROOT, names: list[str] | None = None) -> list[Chapter]:
    """The chapters called `names`, or all: texts in `book/` with a kernel and a code cell."""
    known = [Chapter(root, path.stem) for path in sorted((root / "book").glob("*.md"))]
    known = [chapter for chapter in known if _is_chapter(chapter.source)]
    if not names:
        return known
    unknown = sorted(set(names) - {chapter.name for chapter in known})
    if unknown:
        listed = ", ".join(chapter.name for chapter in known) or "none"
        raise BookError(f"unknown chapter: {', '.join(unknown)} (known: {listed})")
    return [chapter for chapter in known if chapter.name in names]


def _is_chapter(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    front_matter = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    return bool(front_matter and "kernelspec:" in front_matter[1] and "```{code-cell}" in text)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def default_parameters(notebook: NotebookNode) -> dict[str, Any]:
    """Names and default values that the cell tagged `parameters` assigns."""
    defaults = {}
    for cell in code_cells(notebook):
        if "parameters" in tags(cell):
            for node in parse(cell.source).body:
                if isinstance(node, ast.AnnAssign | ast.Assign) and node.value is not None:
                    target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                    defaults[ast.unparse(target)] = ast.literal_eval(node.value)
    return defaults


def check_parameters(chapter: Chapter, overrides: dict[str, Any]) -> dict[str, Any]:
    """All parameters of the chapter with their values; raise BookError for an unknown override."""
    try:
        defaults = default_parameters(chapter.read())
    except (SyntaxError, ValueError) as error:
        raise BookError(
            f"{chapter.source}: the cell tagged `parameters` may hold only lines such as"
            f" `seed: int = 0`: {error}"
        ) from error
    unknown = sorted(set(overrides) - set(defaults))
    if unknown:
        listed = ", ".join(defaults) or "none"
        raise BookError(
            f"{chapter.name}: unknown parameter: {', '.join(unknown)} (known: {listed})"
        )
    return defaults | overrides


# ---------------------------------------------------------------------------------------------
# The key


def key(chapter: Chapter, overrides: dict[str, Any] | None = None) -> str:
    """The hash of everything that the outputs of a chapter depend on."""
    cells = code_cells(chapter.read())
    sources = [_normal_source(cell.source) for cell in cells]
    parts = {
        "cells": sources,
        "tags": [sorted(EXECUTION_TAGS.intersection(tags(cell))) for cell in cells],
        "parameters": check_parameters(chapter, overrides or {}),
        "files": {
            path.relative_to(chapter.root).as_posix(): _sha256(path.read_bytes())
            for path in library_files(chapter, sources)
        },
        "versions": _locked_versions(chapter.root),
        "palettes": [*PALETTES, PALETTE_RMS],
    }
    return _sha256(json.dumps(parts, sort_keys=True).encode())


def library_files(chapter: Chapter, sources: list[str]) -> list[Path]:
    """The library's modules that the cells can import, and the data files those modules read."""
    try:
        files = reached_files(sources, chapter.root, PACKAGE)
    except SyntaxError as error:
        raise BookError(f"{chapter.name}: code does not parse: {error}") from error
    package = chapter.root / PACKAGE
    if package / "plots.py" in files:
        files |= set(package.glob("*.mplstyle"))
    for module in [file.stem for file in files if file.parent == package / "experiments"]:
        # Records lie in results/<experiment>/, the experiment being a module or a part of one.
        files |= set((package / "results").glob(f"{module}/**/*.json"))
        files |= set((package / "results").glob(f"{module}.*/**/*.json"))
    return sorted(files)


def _normal_source(source: str) -> str:
    return "\n".join(line.rstrip() for line in source.strip().splitlines())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _locked_versions(root: Path) -> dict[str, str]:
    """The versions in the lock, so that all machines that follow it compute the same key."""
    lock = root / "requirements.lock"
    if not lock.is_file():
        return installed_versions()
    pins = re.findall(r"^([\w-]+)==(\S+)", lock.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: version for name, version in pins if name in VERSIONED}


def check_versions(root: Path) -> None:
    """Raise BookError unless the locked versions are installed: the key would be wrong."""
    installed = installed_versions()
    for name, version in _locked_versions(root).items():
        if installed[name] != version:
            raise BookError(
                f"{name} {installed[name]} is installed, but requirements.lock says {version}:"
                " run `make setup`, or write elsewhere with --output DIR"
            )


def installed_versions() -> dict[str, str]:
    """The installed versions, without a build's suffix such as `+cu128`."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in VERSIONED}


# ---------------------------------------------------------------------------------------------
# The notebook file


def compose(text: NotebookNode, executed: NotebookNode, record: dict[str, Any]) -> str:
    """The notebook file: cells and metadata of the text, outputs of the executed notebook.

    Nothing in it depends on when or where it was made.
    """
    sources = [cell.source for cell in code_cells(text)]
    if sources != [cell.source for cell in code_cells(executed)]:
        raise BookError("the executed notebook holds other code cells than the text")
    for cell, done in zip(code_cells(text), code_cells(executed), strict=True):
        cell.execution_count = done.execution_count
        cell.outputs = [] if "nbval-ignore-output" in tags(cell) else _merged(done.outputs)
    for index, cell in enumerate(text.cells):
        cell.id = f"{index:03d}-{hashlib.sha1(cell.source.encode()).hexdigest()[:8]}"
        for volatile in ("papermill", "execution"):
            cell.metadata.pop(volatile, None)
        if not tags(cell):
            cell.metadata.pop("tags", None)
    for volatile in ("jupytext", "papermill"):
        text.metadata.pop(volatile, None)
    language = dict(executed.metadata.get("language_info", {"name": "python"}))
    language.pop("version", None)
    text.metadata.update(language_info=language, bnnbook=record)
    text.nbformat, text.nbformat_minor = 4, 5
    return nbformat.writes(text) + "\n"


def _merged(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs with adjacent pieces of a stream joined, because where it broke was chance."""
    merged: list[NotebookNode] = []
    for output in outputs:
        last = merged[-1] if merged else None
        if last and "name" in output and output.get("name") == last.get("name"):
            last.text += output.text
        else:
            merged.append(output)
    for output in merged:
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = _with_palette(output.data["image/png"])
    return merged


def _with_palette(encoded: str) -> str:
    """A PNG with the first of the `PALETTES` that keeps its look, if that is smaller.

    A photograph or a grid of coloured kernels has too many colours, and stays as drawn.
    """
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    opaque = image.mode == "RGB" or (
        image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255)
    )
    if not opaque:  # done before, or of a kind that RGB does not hold
        return encoded
    drawn = image.convert("RGB")
    for colours in PALETTES:
        few = drawn.quantize(colours, dither=Image.Dither.NONE)
        if rms(np.asarray(few.convert("RGB")), np.asarray(drawn)) < PALETTE_RMS:
            small = io.BytesIO()
            few.save(small, "png", optimize=True)
            return min(base64.b64encode(small.getvalue()).decode() + "\n", encoded, key=len)
    return encoded


def rms(first: np.ndarray, second: np.ndarray) -> float:
    """The root mean square difference of two pictures of the same shape, 0 to 255."""
    return float(np.sqrt(np.mean((first.astype(float) - second.astype(float)) ** 2)))


def faults(notebook: NotebookNode) -> Iterator[tuple[NotebookNode, str]]:
    """The code cells whose outputs must not be published, each with the reason."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            text = output_text(output)
            if output.output_type == "error":
                yield cell, f"an error: {output.ename}: {output.evalue}"
            elif output.get("name") == "stderr":
                yield cell, f"output on stderr:\n{text}"
            elif address := re.search(r".*\bat 0x[0-9a-f]+.*", text):
                yield cell, f"an object's address, which changes every time: {address[0].strip()}"


def output_text(output: NotebookNode) -> str:
    """All the text in an output."""
    data = output.get("data", {})
    parts = [str(value) for kind, value in sorted(data.items()) if kind not in IMAGES]
    return "\n".join([output.get("text", ""), *parts]).strip("\n")


def where(chapter: Chapter, cell: NotebookNode) -> str:
    """A cell's place as an author finds it: number (from 0, as nbval counts), line, first line."""
    cells = code_cells(chapter.read())
    index = next((i for i, c in enumerate(cells) if c.source == cell.source), None)
    first = next(iter(cell.source.strip().splitlines()), "")
    if index is None:
        return f"injected parameters: {first}"
    text = chapter.source.read_text(encoding="utf-8")
    line = text.count("\n", 0, text.find(cell.source)) + 1
    place = chapter.source.relative_to(chapter.root)
    return f"code cell {index} of {len(cells)} ({place}:{line}): {first}"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically: at any moment `path` is the whole old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------
# The state of a chapter


def state(
    chapter: Chapter, folder: Path | None = None, overrides: dict[str, Any] | None = None
) -> tuple[str, str]:
    """("fresh", "text" or "stale", and why): nothing to do, text to renew, or to execute."""
    path = chapter.notebook(folder)
    expected = key(chapter, overrides)
    if not path.is_file():
        return "stale", "no notebook yet"
    try:
        stored = nbformat.read(path, as_version=4)
    except Exception as error:
        return "stale", f"the notebook is damaged: {type(error).__name__}"
    if stored.metadata.get("bnnbook", {}).get("key") != expected:
        old = [_normal_source(cell.source) for cell in code_cells(stored)]
        new = [_normal_source(cell.source) for cell in code_cells(chapter.read())]
        changed = "its code" if old != new else "the library, its records or versions"
        return "stale", f"{changed} changed"
    if any(cell.execution_count is None for cell in code_cells(stored)):
        return "stale", "the notebook was never executed"
    if renewed(chapter, stored) != path.read_text(encoding="utf-8"):
        return "text", "its text changed"
    return "fresh", "nothing changed"


def renewed(chapter: Chapter, stored: NotebookNode) -> str:
    """The notebook file with today's text around the stored outputs."""
    text = chapter.read()
    # With equal keys, sources differ at most in trailing blanks: the outputs still belong to them.
    for cell, old in zip(code_cells(text), code_cells(stored), strict=True):
        old.source = cell.source
    return compose(text, stored, dict(stored.metadata["bnnbook"]))


def renew(chapter: Chapter, folder: Path | None = None) -> None:
    path = chapter.notebook(folder)
    write_atomically(path, renewed(chapter, nbformat.read(path, as_version=4)))


@contextlib.contextmanager
def locked(chapter: Chapter, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the chapter's lock: of two builds at once, the second waits."""
    path = chapter.root / ".cache" / f"{chapter.name}.lock"
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build is at work on it: waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    import signal
    import sys

    from tools.build import main

    # Like Ctrl-C: an exception, so that the chapters' processes are ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    raise SystemExit(main())
