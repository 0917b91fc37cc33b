"""The book's own chapters: executed, up to date, and built as the design asks."""

import ast
import base64
import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from bnnbook import claims
from tools import chapters, claims_table, cover, imports

ROOT = chapters.ROOT
CHAPTERS = [pytest.param(chapter, id=chapter.name) for chapter in chapters.find(ROOT)]
every_chapter = pytest.mark.parametrize("chapter", CHAPTERS)


def notebook(chapter: chapters.Chapter) -> nbformat.NotebookNode:
    return nbformat.read(chapter.notebook(), as_version=4)


def cells(chapter: chapters.Chapter) -> list[nbformat.NotebookNode]:
    return chapters.code_cells(notebook(chapter))


def has_image(cell: nbformat.NotebookNode) -> bool:
    return any(
        kind in output.get("data", {}) for output in cell.outputs for kind in chapters.IMAGES
    )


def pixels_per_dot(cell: nbformat.NotebookNode) -> float:
    """How many of a figure's pixels lie side by side where a page has one."""
    [output] = [each for each in cell.outputs if "image/png" in each.get("data", {})]
    image = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
    return image.width / output.metadata["image/png"]["width"]


def test_every_text_has_its_notebook_and_the_other_way_round():
    assert CHAPTERS, "book/ holds no chapter"
    texts = {chapter.values[0].name for chapter in CHAPTERS}
    assert texts == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


@every_chapter
def test_notebook_is_fresh(chapter):
    assert chapters.state(chapter) == ("fresh", "nothing changed")
    text = [(cell.cell_type, cell.source) for cell in chapter.read().cells]
    assert text == [(cell.cell_type, cell.source) for cell in notebook(chapter).cells]


@every_chapter
def test_notebook_was_executed_without_fault(chapter):
    nbformat.validate(notebook(chapter))
    counts = [cell.execution_count for cell in cells(chapter)]
    assert counts == list(range(1, len(counts) + 1))
    assert [reason for _, reason in chapters.faults(notebook(chapter))] == []
    marks = {tag for cell in notebook(chapter).cells for tag in chapters.tags(cell)}
    # papermill does not honour the first; the others are traces of a run that went wrong.
    assert not marks & {"raises-exception", "papermill-error-cell-tag", "injected-parameters"}


@every_chapter
def test_notebook_holds_facts_and_claims(chapter):
    facts = [cell for cell in cells(chapter) if "nbval-check-output" in chapters.tags(cell)]
    assert facts, "nbval would compare nothing"
    assert all(cell.outputs for cell in facts)
    assert claims.from_notebook(notebook(chapter))
    assert any("check-figure" in chapters.tags(cell) for cell in cells(chapter))


@every_chapter
def test_figures_have_alt_text_name_and_caption(chapter):
    for cell in cells(chapter):
        figure = cell.metadata.get("mystnb", {})
        assert has_image(cell) == ("figure" in figure), cell.source
        if has_image(cell):
            alt = figure["image"]["alt"]
            assert len(alt) >= 20, cell.source
            assert not alt.endswith(".png")
            assert figure["figure"]["name"].startswith("fig-")
            assert figure["figure"]["caption"]
            assert 1.9 < pixels_per_dot(cell) < 2.1  # sharp on fine screens, too
        if "check-figure" in chapters.tags(cell):
            assert has_image(cell)


@every_chapter
def test_code_is_to_be_read(chapter):
    for cell in cells(chapter):
        # nbval does not see a closing semicolon: the value's text would be compared.
        assert not cell.source.rstrip().endswith(";"), cell.source
        tree = imports.parse(cell.source)
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)], cell.source
        names = {name.partition(".")[0] for name in imports.imported_names(tree, "")}
        assert not names & {"tests", "tools", "conftest"}, cell.source


@every_chapter
def test_first_cell_installs_the_release_on_colab_only(chapter):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cell = cells(chapter)[0]
    assert {"nbval-skip", "remove-cell"} <= set(chapters.tags(cell))
    assert 'if "google.colab" in sys.modules:' in cell.source
    (install,) = re.findall(r"^ +[%!]pip .*", cell.source, re.MULTILINE)
    assert "--no-deps" in install
    assert f"{project['urls']['Repository']}@v{project['version']}" in install
    assert not re.search(r" (-U|--upgrade)\b", install)


@every_chapter
def test_second_cell_is_the_form_of_parameters(chapter):
    tagged = [index for index, c in enumerate(cells(chapter)) if "parameters" in chapters.tags(c)]
    assert tagged == [1]
    cell = cells(chapter)[1]
    assert cell.metadata.cellView == "form"
    parameters = chapters.default_parameters(chapter.read())
    assert {"scale", "device"} <= set(parameters)
    assert parameters["scale"] == "small"
    assert cell.source.count("# @param") == len(parameters)
    assert notebook(chapter).metadata.bnnbook.parameters == parameters


@every_chapter
def test_settings_are_checked_before_anything_is_trained(chapter):
    assert "experiments.check_settings(scale, seeds, epochs" in cells(chapter)[2].source


@every_chapter
def test_colab_gets_a_gpu(chapter):
    metadata = notebook(chapter).metadata
    assert metadata.accelerator == "GPU"
    assert metadata.colab == {"gpuType": "T4", "provenance": []}


@every_chapter
def test_notebook_stays_small_and_keeps_no_trace_of_a_machine(chapter):
    text = chapter.notebook().read_text(encoding="utf-8")
    figures = sum(len(output["data"]["image/png"]) for cell in cells(chapter)
                  for output in cell.outputs if "image/png" in output.get("data", {}))  # fmt: skip
    # figures of 200 pixels an inch are most of it; text and code stay far below
    assert len(text) < 1_400_000
    assert len(text) - figures < 500_000
    assert str(ROOT) not in text
    assert str(Path.home()) + "/" not in text


def test_tables_of_claims_are_up_to_date():
    assert [path.name for path in claims_table.outdated(ROOT)] == []


def test_the_cover_is_the_figure_of_its_chapter():
    assert (ROOT / cover.COVER).read_bytes() == cover.drawn()


# ---------------------------------------------------------------------------------------------
# nbval must notice when the library lies


def changed_library(folder: Path, file: str, old: str, new: str) -> None:
    """Copy the library into `folder`, with one constant changed."""
    shutil.copytree(ROOT / "bnnbook", folder / "bnnbook")
    path = folder / "bnnbook" / file
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file} no longer holds {old!r} once: choose another constant"
    path.write_text(text.replace(old, new), encoding="utf-8")


def nbval(path: Path, library: Path) -> subprocess.CompletedProcess:
    """Run nbval on a notebook, with the library that lies in the folder `library`."""
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env"]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", "--rootdir", path.parent, path],
        cwd=path.parent,
        env=os.environ | {"PYTHONPATH": str(library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def beginning(chapter: chapters.Chapter, words: str) -> nbformat.NotebookNode:
    """The chapter's beginning, to the first checked cell whose code holds `words`."""
    found = notebook(chapter)
    for index, cell in enumerate(found.cells):
        if "nbval-check-output" in chapters.tags(cell) and words in cell.source:
            found.cells = found.cells[: index + 1]
            return found
    raise AssertionError(f"no checked cell of {chapter.name} holds {words!r}: choose other words")


# Chapter, words in the code of the checked cell that has to notice, and the change.
PLANTED = ("binaryconnect", "stochastic_sign(", "binarize.py", "=1) + 1) / 2", "=1) + 1.1) / 2")


def test_nbval_fails_when_a_constant_of_the_library_is_changed(tmp_path):
    name, words, *change = PLANTED
    (chapter,) = chapters.find(ROOT, [name])
    path = tmp_path / f"{name}.ipynb"
    nbformat.write(beginning(chapter, words), path)
    changed_library(tmp_path / "changed", *change)
    honest, lying = nbval(path, ROOT), nbval(path, tmp_path / "changed")
    assert honest.returncode == 0, honest.stdout
    assert lying.returncode == 1, lying.stdout
    assert "mismatch" in lying.stdout
