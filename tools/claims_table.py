"""The claims of all executed chapters as tables: `python -m tools.claims_table [--check]`.

README.md gets the headlines that pyproject.toml names under [tool.bnnbook] (all claims if it names
none), book/what-holds.md all claims, and book/intro.md the number of claims with each verdict. On
each page two markers enclose the table.
"""

import argparse
import re
import sys
import tomllib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nbformat
import yaml

from bnnbook import claims
from tools.chapters import ROOT, BookError, write_atomically

BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"
OURS = "not in the paper"  # so begins the paper's column of a claim that is the book's own
WHERE = "Scale, hardware"  # the heading of what `_where` returns
# What stands in the place of the hardware where nothing was trained.
NO_RUN = ("exact", "a count", "arithmetic", "closed form", "a formula", "a simulation",
          "the authors' logs, not our run")  # fmt: skip
SHORTENED = re.compile(r"\b\d+ of \d+ epochs\b")  # in a number from `claims.check_recorded`


@dataclass(frozen=True)
class ChapterClaims:
    """The claims of one chapter, in the order of its cells."""

    path: Path
    title: str
    claims: list[dict[str, Any]]


def collect(root: Path = ROOT) -> list[ChapterClaims]:
    """The claims of every notebook that `_toc.yml` names, in its order."""
    listed = [root / name for name in _toc_files(root / "_toc.yml") if name.endswith(".ipynb")]
    missing = [path for path in listed if not path.is_file()]
    if missing:
        raise BookError(f"{missing[0]} is in _toc.yml but not there: run `make notebooks`")
    unlisted = set((root / "notebooks").glob("*.ipynb")) - set(listed)
    if unlisted:
        raise BookError(f"{min(unlisted)} is not in _toc.yml: name it there, or remove it")
    return [_chapter(path) for path in listed]


def _chapter(path: Path) -> ChapterClaims:
    notebook = nbformat.read(path, as_version=4)
    lines = [line for cell in notebook.cells for line in cell.source.splitlines()]
    title = next((line[2:].strip() for line in lines if line.startswith("# ")), path.stem)
    try:
        return ChapterClaims(path, title, claims.from_notebook(notebook))
    except ValueError as error:
        raise BookError(f"{path.name}: {error}") from error


def _toc_files(path: Path) -> list[str]:
    if not path.is_file():
        raise BookError(f"{path} is missing: it orders the chapters")

    def walk(node: Any) -> list[str]:
        if isinstance(node, list):
            return [name for child in node for name in walk(child)]
        if isinstance(node, dict):
            own = [node["file"]] if "file" in node else []
            return own + [name for child in node.values() for name in walk(child)]
        return []

    return walk(yaml.safe_load(path.read_text(encoding="utf-8")))


def headlines(chapters: list[ChapterClaims], ids: list[str]) -> list[ChapterClaims]:
    """The chapters with only the claims of these ids; raise BookError for an unknown id."""
    known = [claim["id"] for chapter in chapters for claim in chapter.claims]
    if lost := [name for name in ids if name not in known]:
        raise BookError(f"pyproject.toml: no chapter claims {', '.join(map(repr, lost))}")
    return [
        replace(chapter, claims=[claim for claim in chapter.claims if claim["id"] in ids])
        for chapter in chapters
    ]


def tally(chapters: list[ChapterClaims]) -> str:
    """How many claims there are, and how many with each verdict, as a sentence."""
    counts = _counts(chapters)
    parts = [f"{n} {verdict}" for n, verdict in zip(counts, claims.BADGE, strict=True) if n]
    total = f"{sum(counts)} claim{'s' * (sum(counts) != 1)}"
    return f"{total}: {'; '.join(parts)}. {_ours(chapters)}".rstrip()


def _ours(chapters: list[ChapterClaims]) -> str:
    """How many of the claims no paper makes, as a sentence; "" if there are none."""
    claimed = [claim for chapter in chapters for claim in chapter.claims]
    verdicts = [each["verdict"] for each in claimed if (each["paper"] or "").startswith(OURS)]
    if not verdicts:
        return ""
    of_these = f"{len(verdicts)} of these {'is' if len(verdicts) == 1 else 'are'} ours"
    failed = verdicts.count(claims.NOT_REPRODUCED)
    return f"{of_these} and no paper's{f', {failed} of them not reproduced' * bool(failed)}."


def total(chapters: list[ChapterClaims]) -> str:
    """The `tally` of the whole book, and what it rests on."""
    return f"{tally(chapters)}\n\n{evidence(chapters)}".rstrip()


def evidence(chapters: list[ChapterClaims]) -> str:
    """What the reproduced claims rest on, as a sentence; "" if there are none."""
    claimed = [claim for chapter in chapters for claim in chapter.claims]
    held = [claim for claim in claimed if claim["verdict"] == claims.REPRODUCED]
    full = [claim for claim in held if claim["scale"] == "full"]
    shortened = sum(bool(SHORTENED.search(claim["measured"]["text"])) for claim in full)
    computed = sum(claim["hardware"] in NO_RUN for claim in held)
    small = len(held) - len(full) - computed
    short = f" ({shortened} of these shortened)" * (shortened > 0)
    parts = [
        (len(full), f"{len(full)} rest on recorded runs{short}"),
        (small, f"{small} on what the chapters compute live"),
        (computed, f"{computed} on counts, formulas, simulations or the authors' logs"),
    ]
    listed = ", ".join(words for number, words in parts if number)
    return f"Of the {len(held)} reproduced claims, {listed}." if held else ""


def scorecard(chapters: list[ChapterClaims]) -> str:
    """How many claims of each verdict a chapter has, and all of them together."""
    rows = [
        [f"[{chapter.title}](../notebooks/{chapter.path.name})", *_counts([chapter])]
        for chapter in chapters
        if chapter.claims
    ]
    # in short, so that the table fits a phone
    badges = [_badge(verdict, kind.replace("-", " ")) for verdict, kind in claims.BADGE.items()]
    header = ["Chapter", *badges]
    table = _table(header, [*rows, ["**All**", *_counts(chapters)]])
    counts = f":::{{div}} bnnbook-counts\n\n{table}\n\n:::"
    return "\n\n".join(filter(None, (counts, _ours(chapters), evidence(chapters))))


def _counts(chapters: list[ChapterClaims]) -> list[int]:
    found = Counter(claim["verdict"] for chapter in chapters for claim in chapter.claims)
    return [found[verdict] for verdict in claims.BADGE]


def _badge(verdict: str, words: str | None = None) -> str:
    return f'<span class="verdict {claims.BADGE[verdict]}">{words or verdict}</span>'


def short_table(chapters: list[ChapterClaims], site: str) -> str:
    """Chapter, claim, the paper's number, ours, where, verdict; links to published pages."""
    rows = [
        [
            f"[{chapter.title}]({site}notebooks/{chapter.path.stem}.html#{claim['id']})",
            claim["statement"],
            claim["paper"],
            claim["measured"]["text"],
            _where(claim),
            claim["verdict"],
        ]
        for chapter in chapters
        for claim in chapter.claims
    ]
    return _table(["Chapter", "Claim", "Paper", "Ours", WHERE, "Verdict"], rows)


def chapter_tables(chapters: list[ChapterClaims]) -> str:
    """All claims: the count, then for each chapter a heading, its count and its table."""
    header = ["Claim", "Verdict", "Paper", "Ours", WHERE]
    claimed = [chapter for chapter in chapters if chapter.claims]
    to_each = (f"[{each.title}](#claims-{each.path.stem})" for each in claimed)
    parts = [total(chapters), " · ".join(to_each)]
    for chapter in claimed:
        parts += [
            f"(claims-{chapter.path.stem})=",
            f"## [{chapter.title}](../notebooks/{chapter.path.name})",
            tally([chapter]),
            ":::{div} bnnbook-wide",
            _table(header, [_row(claim, chapter.path.stem) for claim in chapter.claims]),
            ":::",
        ]
    return "\n\n".join(parts)


def _row(claim: dict[str, Any], chapter: str) -> list[str]:
    source = f" ({claim['source']})" if claim["source"] else ""
    # HTML, since Sphinx knows no anchors in a notebook's outputs
    there = f'<a href="../notebooks/{chapter}.html#{claim["id"]}" aria-label="to the check">→</a>'
    return [
        f"{claim['statement']}{source} {there}",
        _badge(claim["verdict"]),
        claim["paper"],
        claim["measured"]["text"],
        _where(claim),
    ]


def _where(claim: dict[str, Any]) -> str:
    return ", ".join(filter(None, (claim["scale"], claim["hardware"])))


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_field, line)) + " |" for line in lines)


def _field(value: Any) -> str:
    """A value inside one field of a Markdown table."""
    if value is None or value == "":
        return "—"
    return " ".join(str(value).split()).replace("|", "\\|")


def inserted(path: Path, table: str) -> str:
    """The text of `path` with `table` between its markers."""
    if not path.is_file():
        raise BookError(f"{path} is missing: it holds a table of claims")
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise BookError(f"{path}: needs the line `{BEGIN}` and after it `{END}`, each once")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}"


def outdated(root: Path = ROOT) -> dict[Path, str]:
    """The files whose table differs from the notebooks, each with its right text."""
    chapters = collect(root)
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    site = settings["project"]["urls"]["Homepage"]
    chosen = settings.get("tool", {}).get("bnnbook", {}).get("headlines")
    shown = chapters if chosen is None else headlines(chapters, chosen)
    texts = {
        root / "README.md": f"{total(chapters)}\n\n{short_table(shown, site)}",
        root / "book" / "what-holds.md": chapter_tables(chapters),
        root / "book" / "intro.md": scorecard(chapters),
    }
    texts = {path: inserted(path, table) for path, table in texts.items()}
    return {path: new for path, new in texts.items() if new != path.read_text(encoding="utf-8")}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.claims_table")
    parser.add_argument("--check", action="store_true", help="only name what is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    try:
        late = outdated(arguments.root)
    except BookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path, text in late.items():
        if arguments.check:
            print(f"{path.name}: its table of claims is out of date: run `make notebooks`")
        else:
            write_atomically(path, text)
            print(f"{path.name}: table of claims renewed")
    return 1 if late and arguments.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
