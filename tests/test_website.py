"""When the site is built, on a toy book and with a stand-in for jupyter-book."""

import subprocess

import pytest

from tools import website


@pytest.fixture
def book(tmp_path):
    for folder in ("book", "notebooks", "bnnbook/__pycache__", "tools"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("_config.yml", "_toc.yml", "requirements.lock", "book/intro.md"):
        (tmp_path / name).write_text("first", encoding="utf-8")
    return tmp_path


@pytest.fixture
def builds(book, monkeypatch):
    """The options of each build; the stand-in writes a page and ends with `builds.code`."""

    class Builds(list):
        code = 0

    done = Builds()

    def run(command, **_):
        done.append(command[command.index("build") + 2 :])
        (book / "_build" / "html").mkdir(parents=True, exist_ok=True)
        (book / "_build" / "html" / "index.html").write_text("page", encoding="utf-8")
        return subprocess.CompletedProcess(command, done.code)

    monkeypatch.setattr(subprocess, "run", run)
    return done


def build(book, *options: str) -> int:
    return website.main(["--root", str(book), *options])


def test_nothing_changed_builds_nothing_and_says_where_the_book_is(book, builds, capsys):
    assert build(book) == build(book) == 0
    assert builds == [["--all", "-q"]]
    printed = capsys.readouterr().out
    assert "up to date" in printed
    assert printed.count(f"the book: {(book / '_build' / 'html' / 'index.html').as_uri()}") == 2


@pytest.mark.parametrize(
    "name", ["book/intro.md", "_toc.yml", "notebooks/new.ipynb", "bnnbook/new.py", "tools/api.py"]
)
def test_a_changed_or_new_source_builds_again(book, builds, name):
    build(book)
    (book / name).write_text("second", encoding="utf-8")
    build(book)
    assert len(builds) == 2


def test_a_removed_source_builds_again_and_a_cache_does_not(book, builds):
    build(book)
    (book / "bnnbook" / "__pycache__" / "x.pyc").write_text("new", encoding="utf-8")
    build(book)
    assert len(builds) == 1
    (book / "book" / "intro.md").unlink()
    build(book)
    assert len(builds) == 2


def test_a_failed_build_is_repeated(book, builds):
    build(book)
    (book / "_toc.yml").write_text("wrong", encoding="utf-8")
    builds.code = 1
    assert build(book) == build(book) == 1
    assert len(builds) == 3
    # Back to what was built last with success: the pages are the failed build's all the same.
    (book / "_toc.yml").write_text("first", encoding="utf-8")
    assert build(book) == 1
    assert len(builds) == 4


def test_strict_starts_from_nothing(book, builds):
    build(book)
    (book / "_build" / "html" / "old.html").write_text("old", encoding="utf-8")
    assert build(book, "--strict") == 0
    assert not (book / "_build" / "html" / "old.html").exists()
    assert builds[-1] == ["--all", "-W", "--keep-going", "-n"]
    assert build(book) == 0
    assert len(builds) == 2
