"""What a chapter shows of the library: the text itself, without docstrings."""

import ast
import importlib
import inspect
import io
import pkgutil
import re
import tokenize

import IPython.display
import pytest

import bnnbook
from bnnbook import binarize, layers, optim, source
from bnnbook.experiments import binaryconnect

MODULES = [importlib.import_module(info.name)
           for info in pkgutil.walk_packages(bnnbook.__path__, "bnnbook.")
           if not info.name.endswith("__main__")]  # fmt: skip
DEFINED = [value for module in MODULES for value in vars(module).values()
           if (inspect.isfunction(value) or inspect.isclass(value))
           and value.__module__ == module.__name__ and "<" not in value.__qualname__]  # fmt: skip


@pytest.fixture
def shown(monkeypatch):
    """What was displayed in the notebook."""
    values = []
    monkeypatch.setattr(IPython.display, "display", values.append)
    return values


def code(markdown):
    """The code inside the one fenced block that the Markdown is."""
    found = re.fullmatch(r"```python\n(.*)\n```", markdown.data, re.DOTALL)
    assert not re.search("^ *```", found[1], re.MULTILINE)  # which would end the block
    return found[1]


def without_docstrings(tree):
    for node in ast.walk(tree):
        kind = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        if kind and ast.get_docstring(node) and len(node.body) > 1:
            del node.body[0]
    return ast.dump(tree)


def comments(text):
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def test_one_markdown_block_with_the_file_and_the_functions(shown):
    assert source.show(binarize.hard_sigmoid, layers.clip_latent_weights) is None
    (markdown,) = shown
    assert isinstance(markdown, IPython.display.Markdown)
    text = code(markdown)
    assert text.splitlines()[0] == "# binarize.py, layers.py"
    names = [node.name for node in ast.parse(text).body]
    assert names == ["hard_sigmoid", "clip_latent_weights"]


def test_a_file_is_named_once(shown):
    source.show(optim.glorot_coefficient, optim.glorot_scaled_groups)
    assert code(shown[0]).splitlines()[0] == "# optim.py"


def test_a_function_is_shown_word_for_word(shown):
    source.show(layers.clip_latent_weights)
    text = inspect.getsource(layers.clip_latent_weights)
    head, _, rest = text.partition("\n")
    assert code(shown[0]) == f"# layers.py\n{head}\n{rest[rest.index('    if not') :].rstrip()}"


@pytest.mark.parametrize("each", DEFINED, ids=lambda each: f"{each.__module__}.{each.__name__}")
def test_what_is_shown_is_the_code_without_docstrings_and_nothing_else(each, shown):
    source.show(each)
    text, original = code(shown[0]), inspect.getsource(each)
    assert ast.dump(ast.parse(text)) == without_docstrings(ast.parse(original))
    kept = [comment for comment in comments(original) if comment != "# fmt: skip"]
    assert comments(text)[1:] == kept  # the first names the file
    assert not re.search(r"^ *(def|class)\b.*:\n\n", text, re.MULTILINE)


def test_a_method_is_moved_to_the_margin(shown):
    source.show(layers.BinaryLinear.forward)
    assert code(shown[0]).splitlines()[1].startswith("def forward(self")


def test_a_body_that_is_only_a_docstring_stays():
    text = 'class Gone(RuntimeError):\n    """It is gone."""\n'
    assert source.without_docstrings(text).strip() == text.strip()


def test_what_has_no_source_is_not_shown(shown):
    with pytest.raises(TypeError):
        source.show(binaryconnect.fit, len)
    assert shown == []


def test_the_file_of_a_decorated_function_is_its_own(monkeypatch):
    from bnnbook import training

    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    source.show(training.reestimate_batchnorm)  # torch.no_grad wraps it
    assert shown[0].data.startswith("```python\n# training.py\n@torch.no_grad()\n")
