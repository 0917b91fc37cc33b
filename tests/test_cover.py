"""The picture of the first page is the one that its chapter drew, on a fabricated book."""

import base64

import nbformat
import pytest
from test_compare import cell, notebook, picture, shown

from tools import cover

PYPROJECT = '[tool.bnnbook]\ncover = "fig-b-two"\n'


@pytest.fixture
def book(tmp_path):
    """Two chapters with a figure each; the second one's is the cover."""
    (tmp_path / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    (tmp_path / "notebooks").mkdir()
    write(tmp_path, "a", "fig-a-one", shade=10)
    write(tmp_path, "b", "fig-b-two", shade=20)
    return tmp_path


def write(book, chapter: str, figure: str, shade: int) -> None:
    drawing = cell("draw()", [shown(text="hello"), shown(png=picture(shade))])
    drawing.metadata["mystnb"] = {"figure": {"name": figure}}
    nb = notebook()
    nb.cells += [cell("1", [shown(png=picture())]), drawing]
    nbformat.write(nb, book / "notebooks" / f"{chapter}.ipynb")


def run(book, *arguments: str) -> int:
    return cover.main(["--root", str(book), *arguments])


def test_the_cover_is_the_chapters_figure_byte_for_byte(book, capsys):
    assert run(book) == 0
    assert (book / cover.COVER).read_bytes() == base64.b64decode(picture(20))
    assert "renewed" in capsys.readouterr().out
    assert run(book) == 0
    assert capsys.readouterr().out == ""


def test_check_fails_until_the_cover_is_up_to_date(book, capsys):
    assert run(book, "--check") == 1
    assert not (book / cover.COVER).exists()
    assert run(book) == run(book, "--check") == 0
    write(book, "b", "fig-b-two", shade=30)
    capsys.readouterr()
    assert run(book, "--check") == 1
    assert "make notebooks" in capsys.readouterr().out
    assert (book / cover.COVER).read_bytes() == base64.b64decode(picture(20))


@pytest.mark.parametrize("outputs", [[], [shown(text="no picture")]])
def test_a_cover_that_no_chapter_drew_is_an_error(book, capsys, outputs):
    assert run(book) == 0
    path = book / "notebooks" / "b.ipynb"
    nb = nbformat.read(path, as_version=4)
    nb.cells[-1].outputs = outputs
    nbformat.write(nb, path)
    assert run(book) == 1
    assert "fig-b-two" in capsys.readouterr().err
    assert (book / cover.COVER).read_bytes() == base64.b64decode(picture(20))
