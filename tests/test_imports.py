"""What a piece of code reaches through its imports."""

import pytest

from tools.imports import parse, reached_files


@pytest.fixture
def root(tmp_path):
    files = {
        "pack/__init__.py": "",
        "pack/alone.py": "",
        "pack/top.py": "from . import alone\n\nREST = (\n    7\n    % 4\n)\n",
        "pack/lazy.py": "def f():\n    from .inner.leaf import x\n\n    return x\n",
        "pack/inner/__init__.py": "from .. import alone\n",
        "pack/inner/leaf.py": "from .twig import y as x\n",
        "pack/inner/twig.py": "import pack.lazy\n\ny = 1\n",
        "other.py": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "reached"),
    [
        ("import other, json", set()),
        ("import pack", {"__init__"}),
        ("from pack import alone", {"__init__", "alone"}),
        ("import pack.alone as a", {"__init__", "alone"}),
        ("import pack\npack.alone.f()", {"__init__", "alone"}),
        ("from pack.top import f", {"__init__", "alone", "top"}),
        ("from pack.inner import twig", {"__init__", "alone", "inner", "twig", "lazy", "leaf"}),
        (
            "if True:\n    from pack import lazy",
            {"__init__", "alone", "inner", "lazy", "leaf", "twig"},
        ),
    ],
)
def test_reached_files(root, source, reached):
    files = reached_files([source], root, "pack")
    names = {
        f.parent.name if f.name == "__init__.py" and f.parent.name != "pack" else f.stem
        for f in files
    }
    assert names == reached


def test_magics_do_not_hide_imports():
    tree = parse("%matplotlib inline\nif x:\n    !ls\nimport pack")
    assert len(tree.body) == 3


def test_a_mistake_in_the_library_names_its_file(root):
    (root / "pack" / "alone.py").write_text("def", encoding="utf-8")
    with pytest.raises(SyntaxError, match="alone"):
        reached_files(["import pack.alone"], root, "pack")
