"""What the line above a folded cell says, and where a line may break."""

from types import SimpleNamespace

import pytest
from docutils import nodes

from tools import pages


def cell(code: str, *shown: nodes.Node, tags=(), hides: str = "input") -> nodes.container:
    """A folded cell, as MyST-NB reads it; without outputs, it has no part for them."""
    parts = [nodes.container("", nodes.literal_block("", code))]
    if shown:
        parts.append(nodes.container("", nodes.container("", *shown)))
    return nodes.container("", *parts, hide_mode=hides, cell_metadata={"tags": list(tags)})


FIGURE = nodes.figure("", nodes.image())
CLAIM = nodes.raw("", '<table class="bnnbook-claim">', format="html")
FRAME = nodes.raw("", '<table class="dataframe">', format="html")


@pytest.mark.parametrize(
    ("folded", "what"),
    [
        (cell("ax.plot(x)", FIGURE), "the code of this figure"),
        (cell("ax.plot(x)", FRAME, FIGURE), "the code of this figure"),
        (cell("claims.check(a)", CLAIM), "how this is checked"),
        (cell("runs.groupby(a)", FRAME), "the code of this table"),
        (cell("from torch import nn"), "the imports"),
        (cell("x = 1"), "the code"),
        (cell("seeds: int = 2", tags=["parameters"]), "the settings of this page's runs"),
        (cell("claims.verdicts()", nodes.literal_block(), hides="all"), "what the tests compare"),
        (cell("claims.check(a)", CLAIM, hides="all"), "the claims"),
    ],
)
def test_a_fold_says_what_is_in_it(folded, what):
    page = nodes.Element("", nodes.container("", folded, nodes.paragraph()))
    pages.name_folds(None, page)
    assert folded["prompt_show"] == f"Show {what}"
    assert folded["prompt_hide"] == f"Hide {what}"


def test_a_fold_is_read_aloud_by_its_line():
    from myst_nb.sphinx_ import HideCodeCellNode, visit_HideCellInput

    writer = SimpleNamespace(body=[])
    visit_HideCellInput(writer, HideCodeCellNode(prompt_show="Show A", prompt_hide="Hide A"))
    context = {"body": "".join(writer.body)}
    assert "aria-label" in context["body"]  # as MyST-NB writes it
    pages.read_aloud(None, "page", "page.html", context, None)
    assert "aria-label" not in context["body"]
    assert "Show A" in context["body"]


def test_an_open_cell_gets_no_line():
    shown = nodes.container("", nodes.container(), cell_metadata={})
    pages.name_folds(None, nodes.Element("", shown))
    assert "prompt_show" not in shown


def test_a_number_keeps_its_unit():
    words = "In 17.0 % of 8 × 8 digits, 0.65 ± 0.34, n = 3, 2 · 10; a % b and when = 3 stay."
    code, text = nodes.literal("", words), nodes.inline("", words)
    pages.keep_units(None, nodes.Element("", nodes.paragraph("", "", text, code)))
    assert code.astext() == words
    assert text.astext().replace("\u00a0", " ") == words
    assert text.astext().split(" ") == [
        "In", "17.0\u00a0%", "of", "8\u00a0×\u00a08", "digits,", "0.65\u00a0±\u00a00.34,",
        "n\u00a0=\u00a03,", "2\u00a0·\u00a010;", "a", "%", "b", "and", "when", "=", "3", "stay.",
    ]  # fmt: skip
