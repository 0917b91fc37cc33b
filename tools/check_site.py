"""Check the built site against its promises: `python -m tools.check_site [_build/html]`.

Each check takes a `Site` and yields one sentence for each problem, with the page's path in front.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from bs4 import BeautifulSoup, Tag

from bnnbook import claims

ROOT = Path(__file__).resolve().parent.parent
COLAB = "https://colab.research.google.com/github/"
# What a browser fetches by itself, as CSS selectors with the attribute that holds the address.
RESOURCES = {
    "script[src]": "src",
    "img[src]": "src",
    "iframe[src]": "src",
    "source[src]": "src",
    "video[src]": "src",
    "audio[src]": "src",
    "embed[src]": "src",
    "object[data]": "data",
    "link[rel~=stylesheet][href]": "href",
    "link[rel~=icon][href]": "href",
    "link[rel~=preload][href]": "href",
    "link[rel~=modulepreload][href]": "href",
    "link[rel~=manifest][href]": "href",
    "link[rel~=preconnect][href]": "href",
    "link[rel~=dns-prefetch][href]": "href",
}
CSS_ADDRESS = re.compile(r"""(?:@import\s+|url\(\s*)["']?([^"'()\s;]+)""")
CSS_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
FILE_NAME = re.compile(r"\.(png|jpe?g|svg|gif|webp)$|^_images|[0-9a-f]{20}", re.IGNORECASE)
# Unresolved MyST markup shows as its own source.
ROLES = "glue|eq|cite|numref|ref|doc|term|prf|math|code"
LEFTOVER = re.compile(rf"\{{({ROLES})[:}}][\w:}}]*|undefined label|`[^`]*`|~\w+\.\w+")


class Site:
    """The pages of a built site, parsed once."""

    def __init__(self, html: Path, root: Path = ROOT):
        self.html = Path(html).resolve()
        self.root = Path(root).resolve()
        self._texts: dict[Path, list[str]] = {}

    @cached_property
    def pages(self) -> dict[Path, BeautifulSoup]:
        """Every HTML page of the site by its path, the theme's own templates left out."""
        paths = sorted(self.html.rglob("*.html"))
        wanted = [path for path in paths if "_static" not in path.relative_to(self.html).parts]
        return {path: BeautifulSoup(path.read_bytes(), "html.parser") for path in wanted}

    @cached_property
    def anchors(self) -> dict[Path, set[str]]:
        """The names that a link may point at, for each page."""
        return {
            path: {tag["id"] for tag in page.select("[id]")}
            | {tag["name"] for tag in page.select("a[name]")}
            for path, page in self.pages.items()
        }

    @cached_property
    def config(self) -> dict:
        """The book's _config.yml."""
        return yaml.safe_load((self.root / "_config.yml").read_text(encoding="utf-8"))

    @cached_property
    def chapters(self) -> dict[Path, Path]:
        """The page of each chapter with its notebook in the repository."""
        notebooks = sorted((self.root / "notebooks").glob("*.ipynb"))
        return {self.html / "notebooks" / f"{path.stem}.html": path for path in notebooks}

    def lines(self, file: Path, fragment: str) -> str:
        """The first two lines that a fragment such as L3-L9 points to in a file."""
        if file not in self._texts:
            self._texts[file] = file.read_text(encoding="utf-8").splitlines()
        match = re.match(r"L(\d+)", fragment)
        first = int(match[1]) - 1 if match else 0
        return "\n".join(self._texts[file][first : first + 2])

    def name(self, path: Path) -> str:
        """A page's path as the problems print it."""
        return path.relative_to(self.html).as_posix()

    def target(self, page: Path, address: str) -> Path:
        """The file that a relative address on a page points to."""
        path = unquote(urlsplit(address).path)
        target = (page.parent / path).resolve() if path else page
        return target / "index.html" if target.is_dir() else target


def is_outside(address: str) -> bool:
    """Whether fetching this address leaves the site; data: and blob: addresses do not."""
    parts = urlsplit(address.strip())
    return bool(parts.netloc) or parts.scheme in ("http", "https", "ws", "wss", "ftp")


def pages_exist(site: Site) -> Iterator[str]:
    """The pages that the site cannot do without are there."""
    if not site.pages:
        yield f"{site.html}: no page: build the site with `make book`"
        return
    wanted = [site.html / name for name in ("index.html", "search.html", "book/intro.html")]
    for path in [*wanted, *site.chapters]:
        if path not in site.pages:
            yield f"{site.name(path)}: the page is missing"
    if not site.chapters:
        yield "notebooks: there is no chapter"


def resources(site: Site) -> Iterator[str]:
    """Whatever a page makes the browser fetch must lie in the site."""
    for path, page in site.pages.items():
        for address in _addresses(page):
            if is_outside(address):
                yield f"{site.name(path)}: loads {address} from the network"
            elif not urlsplit(address).scheme and not site.target(path, address).is_file():
                yield f"{site.name(path)}: loads {address}, which does not exist"


def _addresses(page: BeautifulSoup) -> Iterator[str]:
    for selector, attribute in RESOURCES.items():
        yield from (tag[attribute] for tag in page.select(selector))
    for tag in page.select("[srcset]"):
        yield from (part.split()[0] for part in tag["srcset"].split(",") if part.strip())
    for text in [style.get_text() for style in page.select("style")]:
        yield from css_addresses(text)
    for tag in page.select("[style]"):
        yield from css_addresses(tag["style"])


def css_addresses(text: str) -> list[str]:
    """The addresses that a style sheet loads.

    >>> css_addresses('@import "a.css"; b { background: url(c.png) } /* url(d.png) */')
    ['a.css', 'c.png']
    """
    return CSS_ADDRESS.findall(CSS_COMMENT.sub("", text))


def style_sheets(site: Site) -> Iterator[str]:
    """No style sheet may load anything from the network."""
    for path in sorted(site.html.rglob("*.css")):
        for address in css_addresses(path.read_text(encoding="utf-8")):
            # Only these leave the site; `url(#name)` and data: stay inside.
            if is_outside(address.removeprefix("url(")):
                yield f"{site.name(path)}: loads {address} from the network"


def images(site: Site) -> Iterator[str]:
    """Every image says in words what it shows; every figure has a caption."""
    for path, page in site.pages.items():
        for image in page.select("article img"):
            alt, source = image.get("alt", "").strip(), image.get("src", "")
            where = f"{site.name(path)}: image {source[-60:]}"
            if not alt or FILE_NAME.search(alt) or alt == Path(source).stem:
                yield f"{where} has no alternative text, but {alt!r}"
            figure, link = image.find_parent("figure"), image.find_parent("a")
            if figure is None:
                if link is None:  # a badge is a button, not a figure
                    yield f"{where} is not in a figure with a caption"
                continue
            if not _caption(figure):
                yield f"{where} is in a figure without a caption"
            if link is not None:
                yield f"{where} is a link, so it does not scroll on a phone"


def _caption(figure: Tag) -> str:
    """A figure's caption without its number."""
    caption = figure.select_one("figcaption")
    text = caption.select_one(".caption-text") or caption if caption else None
    return text.get_text(" ", strip=True).strip("# ") if text else ""


def links(site: Site) -> Iterator[str]:
    """Every link inside the site leads to a page, and to an anchor that is there."""
    for path, page in site.pages.items():
        for address in sorted({link["href"] for link in page.select("a[href]")} | _refresh(page)):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc or address == "#":
                continue
            target = site.target(path, address)
            anchors = site.anchors.get(target)
            if not target.is_file():
                yield f"{site.name(path)}: the link {address} leads nowhere"
            elif parts.fragment and anchors is not None and unquote(parts.fragment) not in anchors:
                yield f"{site.name(path)}: the link {address} names no anchor of its page"


def _refresh(page: BeautifulSoup) -> set[str]:
    """The addresses to which a page redirects."""
    tags = page.select("meta[content]")
    contents = [tag["content"] for tag in tags if tag.get("http-equiv", "").lower() == "refresh"]
    return {content.partition("url=")[2] for content in contents}


def buttons(site: Site) -> Iterator[str]:
    """A chapter's Colab button and download button lead to its notebook."""
    address = site.config["repository"]["url"].removeprefix("https://github.com/")
    start = f"{COLAB}{address}/blob/{site.config['repository']['branch']}/"
    for path, notebook in site.chapters.items():
        page = site.pages.get(path)
        if page is None:
            continue  # pages_exist says so
        wanted = start + notebook.relative_to(site.root).as_posix()
        found = {link["href"] for link in page.select(f'a.btn[href^="{COLAB}"]')}
        if found != {wanted}:
            yield f"{site.name(path)}: the Colab button opens {sorted(found)}, not {wanted}"
        yield from _download(site, path, page, notebook)
    for path, page in site.pages.items():
        for link in page.select(f'a[href^="{COLAB}"]'):
            file = site.root / link["href"].removeprefix(start)
            if not link["href"].startswith(start) or not file.is_file():
                yield f"{site.name(path)}: {link['href']} is no notebook of this repository"


def _download(site: Site, path: Path, page: BeautifulSoup, notebook: Path) -> Iterator[str]:
    found = [link["href"] for link in page.select("a.btn-download-source-button[href]")]
    if len(found) != 1:
        yield f"{site.name(path)}: {len(found)} download buttons"
        return
    file = site.target(path, found[0])
    if not file.is_file() or file.read_bytes() != notebook.read_bytes():
        yield f"{site.name(path)}: the download {found[0]} differs from {notebook.name}"


def source_links(site: Site) -> Iterator[str]:
    """A link into the repository names a file that is there, and lines that hold its name."""
    repository = site.config["repository"]
    start = f"{repository['url']}/blob/{repository['branch']}/"
    for path, page in site.pages.items():
        for link in page.select(f'a[href^="{start}"]'):
            parts = urlsplit(link["href"].removeprefix(start))
            file = site.root / unquote(parts.path)
            entry = link.find_parent("dt", id=True)
            if not file.is_file():
                yield f"{site.name(path)}: the link {link['href']} names no file of the repository"
            elif entry and entry["id"].rpartition(".")[2] not in site.lines(file, parts.fragment):
                yield f"{site.name(path)}: the source of {entry['id']} is not at {link['href']}"


def entries(site: Site) -> Iterator[str]:
    """Each entry of the reference leads to its source and, but for constants, is described."""
    for path, page in site.pages.items():
        for entry in page.select("dl.py > dt[id]"):
            if not entry.select_one('a[href*="/blob/"]'):
                yield f"{site.name(path)}: {entry['id']} has no link to its source"
            described = entry.find_next_sibling("dd").get_text(strip=True)
            if not described and "data" not in entry.parent["class"]:
                yield f"{site.name(path)}: {entry['id']} has no description"


def mathjax(site: Site) -> Iterator[str]:
    """MathJax is loaded once by a page with formulas, and never twice."""
    for path, page in site.pages.items():
        scripts = [tag["src"] for tag in page.select("script[src]")]
        count = sum("mathjax" in source.lower() for source in scripts)
        if count > 1:
            yield f"{site.name(path)}: loads MathJax {count} times"
        elif not count and page.select_one("article .math"):
            yield f"{site.name(path)}: has formulas but does not load MathJax"


def search_index(site: Site) -> Iterator[str]:
    """The search index knows every page and the words of the chapters' titles."""
    path = site.html / "searchindex.js"
    if not path.is_file():
        yield "searchindex.js: missing, so the search finds nothing"
        return
    text = path.read_text(encoding="utf-8").removeprefix("Search.setIndex(").removesuffix(")")
    index = json.loads(text)
    for page, notebook in site.chapters.items():
        document = f"notebooks/{notebook.stem}"
        if document not in index["docnames"]:
            yield f"searchindex.js: does not know {document}"
            continue
        words = set(_words_of(index, index["docnames"].index(document)))
        title = site.pages[page].select_one("article h1") if page in site.pages else None
        if title and not any(_indexed(word, words) for word in title.get_text(" ").split()):
            yield f"searchindex.js: has no word of the title of {document}"


def _words_of(index: dict, number: int) -> Iterator[str]:
    for terms in (index["terms"], index["titleterms"]):
        for word, documents in terms.items():
            if number in (documents if isinstance(documents, list) else [documents]):
                yield word


def _indexed(word: str, words: set[str]) -> bool:
    """Whether a word or its stem is among the indexed words."""
    word = re.sub(r"\W", "", word.lower())
    return len(word) > 3 and any(len(w) > 3 and word.startswith(w) for w in words)


def claims_listed(site: Site) -> Iterator[str]:
    """Each claim stands on its chapter's page and, in full, on the page "What holds"."""
    rows = list(_table_rows(site.pages.get(site.html / "book" / "what-holds.html")))
    table, count = "book/what-holds.html", 0
    for path, notebook in site.chapters.items():
        page = site.pages.get(path)
        text = plain(page.select_one("article").get_text(" ")) if page else ""
        for claim in claims.from_notebook(json.loads(notebook.read_text(encoding="utf-8"))):
            count += 1
            if plain(claim["statement"]) not in text:
                yield f"{site.name(path)}: does not show its claim {claim['id']}"
            mistakes = [_row_mistakes(row, claim) for row in rows if _is_of(row, claim, notebook)]
            if not mistakes:
                yield f"{table}: the claim {claim['id']} is missing"
            elif all(mistakes):
                wrong = ", ".join(min(mistakes, key=len))
                yield f"{table}: the claim {claim['id']} is not right in: {wrong}"
    if count != len(rows):
        yield f"{table}: {len(rows)} rows for {count} claims"


def _table_rows(page: BeautifulSoup | None) -> Iterator[dict[str, Tag]]:
    """The rows of a page's tables: column's head in lower case -> cell, "chapter" -> heading."""
    for table in page.select("article table") if page else ():
        heads = [head.get_text(" ", strip=True).lower() for head in table.select("thead th")]
        above = table.find_previous("h2") or page.new_tag("h2")
        for row in table.select("tbody tr"):
            yield {"chapter": above, **dict(zip(heads, row.select("td"), strict=True))}


def _is_of(row: dict[str, Tag], claim: dict, notebook: Path) -> bool:
    """Whether a row is about this claim of this chapter."""
    linked = [link["href"] for link in row["chapter"].select("a[href]")]
    here = any(f"/{notebook.stem}.html" in href for href in linked)
    return here and plain(row["claim"].get_text(" ")).startswith(plain(claim["statement"]))


def _row_mistakes(row: dict[str, Tag], claim: dict) -> list[str]:
    """The columns of a row that differ from the claim."""
    wanted = {
        "paper": claim["paper"],
        "ours": claim["measured"]["text"],
        "scale, hardware": ", ".join(filter(None, (claim["scale"], claim["hardware"]))),
        "verdict": claim["verdict"],
    }
    cells = {head: plain(row[head].get_text(" ")) if head in row else "" for head in wanted}
    return [head for head, words in wanted.items() if cells[head] != plain(words or "—")]


def plain(text: str) -> str:
    """Text without markup, and with plain quotation marks and dashes.

    >>> plain("`a`  “b” – *c*")
    'a "b" - c'
    """
    text = re.sub(r"[`*$\\]", "", text)
    for old, new in (("“", '"'), ("”", '"'), ("‘", "'"), ("’", "'"), ("–", "-"), ("—", "-")):
        text = text.replace(old, new)
    return " ".join(text.split())


def leftovers(site: Site) -> Iterator[str]:
    """No markup that should have become something else is left in the text."""
    for path, page in site.pages.items():
        article = page.select_one("article")
        if article is None:
            continue
        for tag in article.select(".system-message, .problematic"):
            yield f"{site.name(path)}: Sphinx's complaint is on the page: {tag.get_text()[:80]!r}"
        texts = [t for t in article.find_all(string=True) if not t.find_parent(["code", "pre"])]
        for found in LEFTOVER.finditer("".join(texts)):
            yield f"{site.name(path)}: unresolved markup {found[0]!r}"


CHECKS = (
    pages_exist, resources, style_sheets, images, links, buttons, source_links, entries,
    mathjax, search_index, claims_listed, leftovers,
)  # fmt: skip


def problems(html: Path, root: Path = ROOT) -> list[str]:
    """Return what is wrong with a built site, one sentence each; empty when nothing is."""
    site = Site(html, root)
    return [problem for check in CHECKS for problem in check(site)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.check_site")
    parser.add_argument("html", nargs="?", type=Path, default=ROOT / "_build" / "html")
    arguments = parser.parse_args(argv)
    found = problems(arguments.html)
    for problem in found:
        print(problem)
    print(f"{len(found)} problems in {arguments.html}" if found else "the site keeps its promises")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
