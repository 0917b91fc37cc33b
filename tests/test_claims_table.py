"""Tables of claims in README.md, book/what-holds.md and book/intro.md, on a fabricated book."""

import nbformat
import pytest
from test_compare import claim, notebook

from bnnbook import claims
from tools import claims_table

PYPROJECT = '[project.urls]\nHomepage = "https://example.org/book/"\n'
PAGE = f"# Page\n\nbefore\n\n{claims_table.BEGIN}\n{claims_table.END}\n\nafter\n"


@pytest.fixture
def book(tmp_path):
    """Two chapters, `b` before `a` in the table of contents, and pages with empty markers."""
    for folder in ("book", "notebooks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    toc = "root: book/intro\nparts:\n- chapters:\n  - file: notebooks/b.ipynb\n"
    toc += "    sections:\n    - file: notebooks/a.ipynb\n  - file: book/what-holds\n"
    (tmp_path / "_toc.yml").write_text(toc, encoding="utf-8")
    write(tmp_path, "a", [claim("a.one")])
    write(tmp_path, "b", [claim("b.one"), claim("b.two", claims.NOT_REPRODUCED)])
    for page in ("README.md", "book/what-holds.md", "book/intro.md"):
        (tmp_path / page).write_text(PAGE, encoding="utf-8")
    return tmp_path


def write(book, name: str, found: list[dict]) -> None:
    nb = notebook(claims=[entry | {"statement": f"{entry['id']} holds"} for entry in found])
    nb.cells.insert(0, nbformat.v4.new_markdown_cell(f"Text.\n\n# Chapter {name.upper()}"))
    nbformat.write(nb, book / "notebooks" / f"{name}.ipynb")


def run(book, *arguments: str) -> int:
    return claims_table.main(["--root", str(book), *arguments])


def rows(path, heads=False) -> list[str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    rules = {number for number, line in enumerate(lines) if line.startswith("| ---")}
    return [line for n, line in enumerate(lines) if not {n, n + 1 - heads} & rules]


def test_claims_are_collected_in_the_order_of_the_book(book):
    found = claims_table.collect(book)
    assert [chapter.title for chapter in found] == ["Chapter B", "Chapter A"]
    assert [c["id"] for chapter in found for c in chapter.claims] == ["b.one", "b.two", "a.one"]


def test_both_tables_are_written_between_their_markers(book):
    assert run(book) == 0
    readme, page = book / "README.md", book / "book" / "what-holds.md"
    chapter = "[Chapter B](https://example.org/book/notebooks/b.html#b.two)"
    assert rows(readme)[1] == f"| {chapter} | b.two holds | p | x | small, cpu | not reproduced |"
    badge = '<span class="verdict reproduced">reproduced</span>'
    there = '<a href="../notebooks/a.html#a.one" aria-label="to the check">→</a>'
    assert rows(page)[2] == f"| a.one holds {there} | {badge} | p | x | small, cpu |"
    for path in (readme, page):
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# Page\n\nbefore\n\n<!-- claims:begin -->\n\n")
        end = ":::" if path == page else "|"
        assert text.endswith(f"{end}\n\n<!-- claims:end -->\n\nafter\n")


def test_what_the_reproduced_claims_rest_on_is_counted(book):
    record = {"scale": "full", "hardware": "GPU"}
    short = {"measured": {"text": "0.9 points gained, 9 of 135 epochs (n = 1)", "values": [0.9]}}
    lost = claims.NOT_REPRODUCED
    write(book, "a", [claim("a.one") | record, claim("a.two") | record | short])
    write(book, "b", [claim("b.one") | {"hardware": "a count"}, claim("b.two"), claim("b.three"),
                      claim("b.four", lost), claim("b.five", lost) | record | short])  # fmt: skip
    assert run(book) == 0
    line = ("Of the 5 reproduced claims, 2 rest on recorded runs (1 of these shortened), 2 on "
            "what the chapters compute live, 1 on counts, formulas, simulations or the authors' "
            "logs.\n"            )  # fmt: skip
    for page in ("README.md", "book/what-holds.md", "book/intro.md"):
        text = (book / page).read_text(encoding="utf-8")
        assert text.count(line) == text.count("reproduced claims") == 1


def test_what_was_not_run_names_no_machine():
    """In the book itself: words instead of hardware are among those that the table knows."""
    words = {c["hardware"] for chapter in claims_table.collect() for c in chapter.claims}
    assert {each for each in words if each and each[0].islower()} == set(claims_table.NO_RUN)


def test_the_books_own_claims_are_counted(book):
    own = {"paper": "not in the paper; a prediction of ours"}
    write(book, "a", [claim("a.one") | own, claim("a.two") | {"paper": None}])
    assert run(book) == 0
    line = "4 claims: 3 reproduced; 1 not reproduced. 1 of these is ours and no paper's.\n"
    for page in ("README.md", "book/what-holds.md"):
        assert line in (book / page).read_text(encoding="utf-8")
    assert "2 claims: 2 reproduced. 1 of these is ours" in (
        book / "book" / "what-holds.md"
    ).read_text(encoding="utf-8")
    front = (book / "book" / "intro.md").read_text(encoding="utf-8")
    assert ":::\n\n1 of these is ours and no paper's.\n\nOf the 3 reproduced claims" in front


def test_the_books_own_claims_that_failed_are_counted(book):
    own = {"paper": "not in the paper; a prediction of ours"}
    write(book, "a", [claim("a.one") | own, claim("a.two", claims.NOT_REPRODUCED) | own])
    assert run(book) == 0
    line = "2 of these are ours and no paper's, 1 of them not reproduced.\n"
    for page in ("README.md", "book/what-holds.md", "book/intro.md"):
        assert line in (book / page).read_text(encoding="utf-8")


def test_the_page_has_a_table_a_chapter_and_counts_its_claims(book):
    assert run(book) == 0
    text = (book / "book" / "what-holds.md").read_text(encoding="utf-8")
    parts = [line for line in text.splitlines() if line.startswith("## ") or "claim" in line[:9]]
    assert parts == [
        "3 claims: 2 reproduced; 1 not reproduced.",
        "(claims-b)=",
        "## [Chapter B](../notebooks/b.ipynb)", "2 claims: 1 reproduced; 1 not reproduced.",
        "(claims-a)=",
        "## [Chapter A](../notebooks/a.ipynb)", "1 claim: 1 reproduced.",
    ]  # fmt: skip
    assert "[Chapter B](#claims-b) · [Chapter A](#claims-a)" in text.splitlines()


def test_the_first_page_counts_the_verdicts_of_each_chapter(book):
    assert run(book) == 0
    head, *rest = rows(book / "book" / "intro.md", heads=True)
    assert [field.partition(">")[2].partition("<")[0] for field in head.split(" | ")[1:]] == [
        "reproduced", "not reproduced", "open",
    ]  # fmt: skip
    assert rest == [
        "| [Chapter B](../notebooks/b.ipynb) | 1 | 1 | 0 |",
        "| [Chapter A](../notebooks/a.ipynb) | 1 | 0 | 0 |",
        "| **All** | 2 | 1 | 0 |",
    ]


def test_the_readme_shows_the_headlines_and_counts_all(book):
    (book / "pyproject.toml").write_text(
        f'{PYPROJECT}\n[tool.bnnbook]\nheadlines = ["a.one", "b.two"]\n', encoding="utf-8"
    )
    assert run(book) == 0
    text = (book / "README.md").read_text(encoding="utf-8")
    assert [row.split(" | ")[1] for row in rows(book / "README.md")] == [
        "b.two holds", "a.one holds",
    ]  # fmt: skip
    assert "3 claims: 2 reproduced; 1 not reproduced.\n" in text
    assert len(rows(book / "book" / "what-holds.md")) == 3


def test_a_headline_that_no_chapter_claims_is_an_error(book, capsys):
    (book / "pyproject.toml").write_text(
        f'{PYPROJECT}\n[tool.bnnbook]\nheadlines = ["a.one", "a.gone"]\n', encoding="utf-8"
    )
    assert run(book) == 1
    assert "no chapter claims 'a.gone'" in capsys.readouterr().err


def test_check_fails_until_the_tables_are_up_to_date(book, capsys):
    assert run(book, "--check") == 1
    assert "README.md: its table of claims is out of date" in capsys.readouterr().out
    assert (book / "README.md").read_text(encoding="utf-8") == PAGE
    assert run(book) == 0
    assert run(book, "--check") == 0
    assert run(book) == 0
    write(book, "a", [claim("a.one", claims.NOT_REPRODUCED)])
    assert run(book, "--check") == 1


def test_a_bar_or_a_line_break_does_not_break_the_table(book):
    write(book, "a", [claim("a.one") | {"paper": "|w| <= 1\nalways"}])
    assert run(book) == 0
    assert r"| \|w\| <= 1 always |" in rows(book / "README.md")[2]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda book: (book / "README.md").unlink(), "README.md is missing"),
        (lambda book: (book / "README.md").write_text("# No markers"), "needs the line"),
        (lambda book: (book / "_toc.yml").unlink(), "_toc.yml is missing"),
        (lambda book: (book / "notebooks" / "a.ipynb").unlink(), "run `make notebooks`"),
        (lambda book: write(book, "c", [claim("c.one")]), "is not in _toc.yml"),
        (lambda book: write(book, "a", [claim(), claim()]), "stands twice"),
        (lambda book: write(book, "a", [claim(verdict="perhaps")]), "unknown verdict"),
    ],
)
def test_what_is_wrong_is_said(book, damage, words, capsys):
    damage(book)
    assert run(book) == 1
    assert words in capsys.readouterr().err
