"""The built site keeps its promises, and the checks of them notice when it does not."""

import doctest
import json
import posixpath
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, Page, find_chromium
from sphinx.util.inventory import InventoryFile

from bnnbook import claims
from tools import api, check_site

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 390  # pixels of a phone


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> Path:
    """The site that `make book` built; where there is none it is built, outside the repository."""
    built = ROOT / "_build" / "html"
    if (built / "index.html").is_file():
        return built
    out = tmp_path_factory.mktemp("site")
    program = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", program, "build", str(ROOT), "--path-output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out / "_build" / "html"


def test_the_site_keeps_its_promises(html):
    assert check_site.problems(html) == []


def test_the_reference_has_every_public_name(html):
    with (html / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", posixpath.join)
    kinds = [kind for kind in inventory if kind.startswith("py:")]
    pages = {name: entry[2] for kind in kinds for name, entry in inventory[kind].items()}
    tops = set(api.modules_in("bnnbook")) - {"bnnbook.cli"}  # its page lists commands
    modules = ["bnnbook", *tops, *(below for top in tops for below in api.modules_in(top))]
    found = [(module, name.path) for module in modules for name in api.public(module)]
    assert len(found) > 100
    for module, path in found:
        page = module.split(".")[1] if "." in module else "index"
        assert pages[path] == f"book/api/{page}.html#{path}"


# The checker on a site of five small pages: clean as it stands, and with one defect at a time.

CLAIM = {
    "id": "toy.sum", "statement": "One and one is two", "paper": "2.0 %", "source": "Table 1",
    "measured": {"values": [2.0, 2.1], "n": 2, "mean": 2.05, "spread": 0.0707, "unit": "%",
                 "text": "2.05 ± 0.07 % (n = 2)"},
    "scale": "small", "hardware": "a CPU", "verdict": "reproduced",
}  # fmt: skip
NOTEBOOK = {"cells": [{"outputs": [{"data": {check_site.claims.MIME: CLAIM}}]}]}
COLAB = check_site.COLAB + "somebody/book/blob/main/notebooks/toy.ipynb"
SOURCE = "https://github.com/somebody/book/blob/main/toy.py"
CONFIG = "repository: {url: https://github.com/somebody/book, branch: main}\n"
HEAD = """<html><head><link rel="stylesheet" href="{up}_static/site.css"/>
<link rel="icon" href="{up}_static/dot.svg"/><script src="{up}_static/mathjax.js"></script></head>
<body><a href="{up}book/intro.html">Home</a><a href="#">Top</a><article>"""
TAIL = "</article></body></html>"
PAGES = {
    "index.html": '<meta http-equiv="Refresh" content="0; url=book/intro.html" />',
    "search.html": HEAD.format(up="") + "<h1>Search</h1>" + TAIL,
    "book/intro.html": HEAD.format(up="../") + '<h1>Intro</h1><a href="../notebooks/toy.html#one">'
    'Toy</a><a href="https://example.org">Elsewhere</a><code>{eq}`a`</code>'
    f'<dl class="py"><dt id="toy.add">add()<a href="{SOURCE}#L3-L4">[source]</a></dt>'
    f'<dd>Add.</dd></dl><dl class="py data"><dt id="toy.A">A<a href="{SOURCE}#L1-L1">[source]</a>'
    "</dt><dd></dd></dl>" + TAIL,
    "book/what-holds.html": HEAD.format(up="../") + "<h2><a href='../notebooks/toy.html'>Toy</a>"
    "</h2><table><thead><tr><th>Claim</th><th>Verdict</th><th>Paper</th><th>Ours</th>"
    "<th>Scale, hardware</th></tr></thead><tbody><tr><td>One and one is two (Table 1)</td>"
    "<td>reproduced</td><td>2.0 %</td><td>2.05 ± 0.07 % (n = 2)</td><td>small, a CPU</td></tr>"
    "</tbody></table>" + TAIL,
    "notebooks/toy.html": HEAD.format(up="../") + f'<a class="btn" href="{COLAB}">Colab</a>'
    '<a class="btn-download-source-button" href="../_sources/notebooks/toy.ipynb">.ipynb</a>'
    '<h1 id="one">Training</h1><p>One and one is two. <span class="math">x</span></p>'
    '<figure><img alt="A dot in the middle." src="../_static/dot.svg"/><figcaption>'
    '<span class="caption-number">Fig. 1</span><span class="caption-text">A dot.</span>'
    "</figcaption></figure>" + TAIL,
    "_static/site.css": "/* url(http://comment) */ body { background: url(dot.svg) }",
    "_static/dot.svg": "<svg/>",
    "_static/mathjax.js": "",
    "_sources/notebooks/toy.ipynb": json.dumps(NOTEBOOK),
    "searchindex.js": "Search.setIndex("
    '{"docnames": ["notebooks/toy"], "terms": {"train": 0}, "titleterms": {}})',
}  # fmt: skip


def small_site(root: Path) -> Path:
    """Write the small site and its repository; return the folder of its pages."""
    files = {f"html/{name}": text for name, text in PAGES.items()}
    files |= {"_config.yml": CONFIG, "notebooks/toy.ipynb": json.dumps(NOTEBOOK)}
    files["toy.py"] = "A = 1\n\n@cache\ndef add(): ...\n"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root / "html"


def test_the_checker_passes_a_clean_site(tmp_path):
    assert check_site.problems(small_site(tmp_path), tmp_path) == []


TOY, HOLDS, INTRO = "notebooks/toy.html", "book/what-holds.html", "book/intro.html"
DEFECTS = [
    # file, what is replaced, by what, what the checker must say
    (TOY, TAIL, '<script src="https://cdn.example/a.js"></script>', "from the network"),
    (TOY, TAIL, '<script src="//cdn.example/a.js"></script>', "from the network"),
    (TOY, TAIL, '<link rel="preload" href="http://cdn.example/a">', "from the network"),
    (TOY, TAIL, '<link rel="shortcut icon" href="http://cdn.example/a">', "from the network"),
    (TOY, TAIL, '<iframe src="https://cdn.example/a"></iframe>', "from the network"),
    (TOY, TAIL, '<video><source src="https://cdn.example/a"></video>', "from the network"),
    (TOY, TAIL, '<p srcset="dot.svg 1x, https://cdn.example/a 2x"></p>', "from the network"),
    (TOY, TAIL, "<style>@import 'https://cdn.example/a.css';</style>", "from the network"),
    (TOY, TAIL, '<p style="background:url(https://cdn.example/a)"></p>', "from the network"),
    (TOY, "../_static/site.css", "https://cdn.example/site.css", "from the network"),
    (TOY, "../_static/dot.svg", "http://cdn.example/dot.svg", "from the network"),
    (TOY, "../_static/mathjax.js", "../_static/none-mathjax.js", "which does not exist"),
    ("_static/site.css", "dot.svg", '"//cdn.example/f.woff"', "site.css: loads //cdn"),
    ("_static/site.css", "body", '@import "https://cdn.example/a.css"; body', "site.css: loads"),
    (TOY, 'alt="A dot in the middle."', "", "no alternative text"),
    (TOY, "A dot in the middle.", "../_images/ab.png", "no alternative text"),
    (TOY, "A dot in the middle.", "dot", "no alternative text"),
    (TOY, "A dot.</span>", "</span>", "without a caption"),
    (TOY, "figcaption", "p", "without a caption"),
    (TOY, "<figure><img", "<figure><a href='../_static/dot.svg'><img", "does not scroll"),
    (TOY, "figure", "div", "not in a figure"),
    (INTRO, "toy.html#one", "toy.html#two", "names no anchor"),
    (INTRO, "toy.html#one", "tou.html", "leads nowhere"),
    ("search.html", "book/intro.html", "intro.html", "leads nowhere"),
    ("index.html", "book/intro.html", "intro.html", "leads nowhere"),
    (TOY, "/main/notebooks/toy.ipynb", "/main/notebooks/toy.md", "the Colab button opens"),
    (TOY, "somebody/book/blob", "anybody/book/blob", "no notebook of this repository"),
    (TOY, 'class="btn"', "", "the Colab button opens []"),
    (INTRO, "https://example.org", COLAB + "x", "no notebook of this repository"),
    (TOY, "btn-download-source-button", "", "0 download buttons"),
    ("_sources/notebooks/toy.ipynb", "One", "Two", "differs from toy.ipynb"),
    (INTRO, "toy.py#L3", "tow.py#L3", "names no file of the repository"),
    (INTRO, "#L3", "#L1", "the source of toy.add is not at"),
    (INTRO, "#L3", "#L30", "the source of toy.add is not at"),
    (INTRO, f'<a href="{SOURCE}#L3-L4">[source]</a>', "", "toy.add has no link to its source"),
    (INTRO, "<dd>Add.", "<dd>", "toy.add has no description"),
    (INTRO, "py data", "py", "toy.A has no description"),
    (TOY, "</head>", '<script src="../_static/mathjax.js"></script></head>', "MathJax 2 times"),
    (TOY, '<script src="../_static/mathjax.js">', "<script>", "does not load MathJax"),
    ("searchindex.js", "notebooks/toy", "notebooks/other", "does not know notebooks/toy"),
    ("searchindex.js", "train", "brain", "no word of the title"),
    (TOY, "One and one is two.", "One and one.", "does not show its claim toy.sum"),
    (HOLDS, "One and one is two", "Two and two is four", "claim toy.sum is missing"),
    (HOLDS, "toy.html'>Toy", "other.html'>Toy", "claim toy.sum is missing"),
    (HOLDS, "<td>2.0 %</td>", "<td>2.1 %</td>", "not right in: paper"),
    (HOLDS, "2.05 ± 0.07 % (n = 2)", "2.05 %", "not right in: ours"),
    (HOLDS, "a CPU", "a GPU", "not right in: scale, hardware"),
    (HOLDS, "small, ", "full, ", "not right in: scale, hardware"),
    (HOLDS, ", hardware</th>", ", machine</th>", "not right in: scale, hardware"),
    (HOLDS, "h2", "h3", "claim toy.sum is missing"),
    (HOLDS, "<td>reproduced", "<td>not reproduced", "not right in: verdict"),
    (HOLDS, "</tbody>", "<tr>" + 5 * "<td>x</td>" + "</tr></tbody>", "2 rows for 1 claims"),
    (TOY, "One and one is two.", "One and one is two {glue:text}`a`.", "{glue:text}"),
    (TOY, "One and one is two.", "One and one is two {eq}`a`.", "{eq}"),
    (TOY, "One and one is two.", "One and one is two {cite:p}`a`.", "{cite:p}"),
    (TOY, "<p>", '<p class="system-message">', "Sphinx's complaint"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "message"), DEFECTS)
def test_the_checker_sees_a_planted_defect(tmp_path, name, old, new, message):
    html = small_site(tmp_path)
    text = PAGES[name]
    assert old in text
    (html / name).write_text(text.replace(old, new), encoding="utf-8")
    assert message in "\n".join(check_site.problems(html, tmp_path))


@pytest.mark.parametrize("name", ["index.html", "search.html", INTRO, TOY, "searchindex.js"])
def test_the_checker_sees_a_missing_file(tmp_path, name):
    html = small_site(tmp_path)
    (html / name).unlink()
    assert f"{name}: " in "\n".join(check_site.problems(html, tmp_path))


def test_the_examples_of_the_checker_hold():
    result = doctest.testmod(check_site)
    assert result.attempted > 1
    assert result.failed == 0


def test_the_checker_sees_an_empty_site(tmp_path):
    html = small_site(tmp_path)
    shutil.rmtree(html)
    assert "build the site" in "\n".join(check_site.problems(html, tmp_path))


def test_the_command_exits_with_one_where_there_are_problems(tmp_path, capsys):
    assert check_site.main([str(small_site(tmp_path))]) == 1
    assert "problems in" in capsys.readouterr().out


# The site in a browser, opened from its files.


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium here: install chromium or google-chrome to test the pages in one")
    with Browser(program, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def pages_of(html: Path) -> list[Path]:
    """The pages that a reader opens: the front page, the chapters, the pages beside them."""
    return sorted([*html.glob("book/*.html"), *html.glob("notebooks/*.html")])


# What a page must not show once its scripts are done; each expression gives a list of words.
RENDERED = "!document.querySelector('.math') || !!document.querySelector('mjx-container')"
MISTAKES = {
    "a formula is not typeset": "[...document.querySelectorAll('article .math')]"
    ".filter(e => !e.querySelector('mjx-container')).map(e => e.textContent)",
    "a formula has an error": "[...document.querySelectorAll("
    "'mjx-merror, [data-mjx-error], mjx-mtext[style*=\"color: red\"]')].map(e => e.outerHTML)",
    "an image is broken": "[...document.images]"
    ".filter(e => e.complete && !e.naturalWidth).map(e => e.src)",
}  # fmt: skip


def mistakes(page: Page) -> list[str]:
    """What is wrong with an open page: its console, its requests, its formulas and images."""
    page.wait_for(RENDERED, seconds=10)
    page.evaluate("window.MathJax && MathJax.startup ? MathJax.startup.promise.then(() => 0) : 0")
    outside = [url for url in page.requests if not url.startswith(("file:", "data:", "blob:"))]
    found = [f"console: {error}" for error in page.errors] + [f"request: {u}" for u in outside]
    for name, expression in MISTAKES.items():
        found += [f"{name}: {text}" for text in page.evaluate(expression)]
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_open_without_a_mistake(browser, html, dark):
    found = {}
    for path in pages_of(html):
        page = browser.open(path.as_uri(), dark=dark)
        found[path.name] = mistakes(page)
        theme = page.evaluate("document.documentElement.dataset.theme")
        light = page.evaluate("getComputedStyle(document.body).color")  # rgb(r, g, b) of the text
        assert theme == ("dark" if dark else "light")
        assert (int(light.split("(")[1].split(",")[0]) > 128) == dark
        page.close()
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
    assert "intro.html" in found


def test_formulas_are_typeset(browser, html):
    page = browser.open((html / "book" / "notation.html").as_uri())
    assert mistakes(page) == []
    assert page.evaluate("document.querySelectorAll('mjx-container').length") > 10
    page.close()


def test_the_claims_of_a_verdict_can_be_hidden(browser, html):
    """By boxes above the tables, and all are shown at first."""
    page = browser.open((html / "book" / "what-holds.html").as_uri())
    shown = ("[...document.querySelectorAll('td .verdict')].filter(e => e.checkVisibility())"
             ".map(e => e.textContent)")  # fmt: skip
    before = page.evaluate(shown)
    assert set(before) == set(claims.BADGE)
    for verdict, name in claims.BADGE.items():
        page.evaluate(f"document.querySelector('input[name={name}]').click()")
        assert page.evaluate(shown) == [each for each in before if each != verdict]
        page.evaluate(f"document.querySelector('input[name={name}]').click()")
    assert page.evaluate(shown) == before
    page.close()


def test_pages_do_not_scroll_sideways_on_a_phone(browser, html):
    widths = {}
    for path in pages_of(html):
        page = browser.open(path.as_uri(), width=WIDTH, height=844)
        mistakes(page)
        page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
        widths[path.name] = width_of(page)
        page.close()
    assert widths == dict.fromkeys(widths, WIDTH)


def test_the_reference_opens_without_a_mistake_on_a_phone_in_the_dark(browser, html):
    found = {}
    for path in sorted(html.glob("book/api/*.html")):
        page = browser.open(path.as_uri(), width=WIDTH, height=844, dark=True)
        wrong = [*mistakes(page), *([f"{width_of(page)} pixels wide"] * (width_of(page) > WIDTH))]
        found |= {path.name: wrong} if wrong else {}
        page.close()
    assert found == {}
    assert (html / "book" / "api" / "layers.html").is_file()


def width_of(page: Page) -> int:
    """How wide the page is when one scrolls it sideways."""
    return page.evaluate("Math.max(document.documentElement.scrollWidth, innerWidth)")


def test_the_search_works_from_a_file(browser, html):
    page = browser.open((html / "search.html").as_uri() + "?q=binary")
    links = "[...document.querySelectorAll('#search-results li a')].map(e => e.href)"
    assert page.wait_for("document.querySelectorAll('#search-results li a').length > 0")
    page.wait_for("document.querySelector('#search-results').innerText.includes('finished')")
    found = " ".join(page.evaluate(links))
    for path in sorted(html.glob("notebooks/*.html")):
        assert path.name in found
    page.close()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<script>console.error('planted')</script>", "console: planted"),
        ("<script>throw new Error('planted')</script>", "console: Error: planted"),
        ("<script>Promise.reject(new Error('planted'))</script>", "console: Error: planted"),
        ("<script src='none.js'></script>", "console: Failed to load resource"),
        ("<img src='https://outside.invalid/a.png'>", "request: https://outside.invalid/a.png"),
        (
            "<script>fetch('http://outside.invalid/a')</script>",
            "request: http://outside.invalid/a",
        ),
        ("<script>setTimeout(() => fetch('http://outside.invalid/a'), 100)</script>", "request:"),
        ("<style>p {background: url(//outside.invalid/a)}</style><p>a", "outside.invalid/a"),
        ("<img src='data:image/png;base64,AAAA'>", "an image is broken"),
        ("<article><p class='math'>\\(x\\)</p></article>", "a formula is not typeset"),
    ],
)
def test_the_browser_sees_a_planted_mistake(browser, tmp_path, monkeypatch, body, message):
    monkeypatch.setattr(sys.modules[__name__], "RENDERED", "true")
    path = tmp_path / "planted.html"
    path.write_text(f"<!doctype html><html><body>{body}</body></html>", encoding="utf-8")
    page = browser.open(path.as_uri())
    assert message in "\n".join(mistakes(page))
    page.close()


def test_the_browser_sees_nothing_on_a_clean_page(browser, tmp_path):
    path = tmp_path / "clean.html"
    path.write_text("<!doctype html><html><body><p>clean</p></body></html>", encoding="utf-8")
    page = browser.open(path.as_uri())
    assert mistakes(page) == []
    page.close()


def test_the_browser_sees_a_formula_with_an_error(browser, html, tmp_path):
    script = (html / "_static" / "mathjax" / "tex-mml-chtml.js").as_uri()
    for formula in (r"\nosuchmacro", r"\frac{1}"):
        path = tmp_path / "formula.html"
        body = f"<article><p class='math'>\\({formula}\\)</p></article>"
        path.write_text(f"<script defer src='{script}'></script>{body}", encoding="utf-8")
        page = browser.open(path.as_uri())
        assert "a formula has an error" in "\n".join(mistakes(page))
        page.close()


def test_the_browser_sees_a_page_that_is_too_wide(browser, tmp_path):
    path = tmp_path / "wide.html"
    meta = '<meta name="viewport" content="width=device-width">'
    for wide, expected in ((600, False), (200, True)):
        path.write_text(f"{meta}<body style='margin: 0'><p style='width: {wide}px'>a</p>")
        page = browser.open(path.as_uri(), width=WIDTH, height=844)
        assert (width_of(page) == WIDTH) == expected
        page.close()
