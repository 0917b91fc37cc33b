"""What is shown of pip's output, and what a chapter installs where."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from zipfile import ZipFile

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

import bnnbook
from tools.installing import EVERY, milestones

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_a_long_installation_is_a_handful_of_lines():
    lines = [f"Collecting package{number}\n  Using cached x\n" for number in range(2 * EVERY)]
    lines = [line + "\n" for text in lines for line in text.splitlines()]
    lines += ["  Downloading https://x/torch-2.whl (800.1 MB)\n", "  Downloading y.whl (2.0 MB)\n"]
    lines += ["Installing collected packages: a, b\n", "Successfully installed a-1 b-2\n"]
    assert list(milestones(lines)) == [
        f"  {EVERY} packages found",
        f"  {2 * EVERY} packages found",
        "  downloading torch-2.whl (800.1 MB)",
        "  unpacking 2",
        "  installed 2",
    ]


def test_an_error_is_shown_whole():
    lines = ["WARNING: noise\n", "ERROR: no matching distribution\n", "details\n"]
    assert list(milestones(lines)) == ["ERROR: no matching distribution", "details"]


# --- The first cell of a chapter, as Colab opens it ---------------------------------------------


def magics(cell: str) -> list[tuple[str, str]]:
    """What a cell asks of IPython's magics when a notebook runs it."""
    asked = []
    shell = SimpleNamespace(run_line_magic=lambda name, line: asked.append((name, line)))
    exec(TransformerManager().transform_cell(cell), {"get_ipython": lambda: shell})
    return asked


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def first_cell(request) -> str:
    """The first code of an executed chapter."""
    cells = nbformat.read(request.param, as_version=4).cells
    return next(cell.source for cell in cells if cell.cell_type == "code")


def test_on_colab_a_chapter_installs_the_release_and_nothing_else(first_cell, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    ((name, line),) = magics(first_cell)
    release = f"bnnbook @ git+{bnnbook.REPOSITORY}@v{bnnbook.__version__}"
    # without --no-deps pip could replace the PyTorch that fits Colab's GPU
    assert (name, shlex.split(line)) == ("pip", ["install", "-q", "--no-deps", release])


def test_elsewhere_a_chapter_installs_nothing(first_cell, monkeypatch):
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    assert magics(first_cell) == []


def test_there_are_chapters_to_look_at():
    assert len(NOTEBOOKS) > 1


def test_what_pip_builds_holds_every_file_of_the_library(tmp_path):
    # here the library is linked, so that a file missing from the wheel is missed on Colab only
    source = tmp_path / "source"
    library = shutil.copytree(
        ROOT / "bnnbook", source / "bnnbook", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    files = {p.relative_to(source).as_posix() for p in library.rglob("*") if p.is_file()}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*pip, *options, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert files - set(ZipFile(wheel).namelist()) == set()
