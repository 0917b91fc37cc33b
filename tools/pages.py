"""A Sphinx extension: folded cells say what is in them, and numbers keep their units."""

from docutils import nodes
from sphinx.application import Sphinx

from bnnbook.claims import unbroken

AS_IT_IS = (nodes.literal, nodes.FixedTextElement, nodes.math, nodes.math_block, nodes.raw)


def subject(cell: nodes.container) -> str:
    """What the code of a folded cell is for, in the words of the line above it."""
    tags = cell["cell_metadata"].get("tags", [])
    code, *output = cell.children
    shown = "".join(part.astext() for part in output)
    if "parameters" in tags:
        return "the settings of this page's runs"
    if cell["hide_mode"] == "all":  # the outputs are folded, too
        return "the claims" if "bnnbook-claim" in shown else "what the tests compare"
    if any(part.next_node(nodes.figure) for part in output):
        return "the code of this figure"
    if "bnnbook-claim" in shown:
        return "how this is checked"
    if "<table" in shown:
        return "the code of this table"
    return "the imports" if code.astext().startswith(("import ", "from ")) else "the code"


def name_folds(app: Sphinx, doctree: nodes.document) -> None:
    """Give each folded cell of a page its line."""
    for cell in doctree.findall(nodes.container):
        if cell.get("hide_mode"):
            what = subject(cell)
            cell["prompt_show"], cell["prompt_hide"] = f"Show {what}", f"Hide {what}"


def keep_units(app: Sphinx, doctree: nodes.document) -> None:
    """Let no line of text break within what `unbroken` keeps together."""
    for text in list(doctree.findall(nodes.Text)):
        if not isinstance(text.parent, AS_IT_IS):
            text.parent.replace(text, nodes.Text(unbroken(text)))


def read_aloud(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    """Let screen readers read that line, and not MyST-NB's label, which is the same on all."""
    body = context.get("body", "")
    context["body"] = body.replace('<summary aria-label="Toggle hidden content">', "<summary>")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the hooks; Sphinx calls this."""
    app.connect("doctree-read", name_folds)
    app.connect("doctree-read", keep_units)
    app.connect("html-page-context", read_aloud)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
