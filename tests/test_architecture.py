"""The library as text: who may import whom, what is never called, and how the code reads."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bnnbook"
FILES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN = {"papermill", "jupytext", "nbval", "jupyter_book", "nbformat", "nbclient", "tests",
             "tools"}  # fmt: skip
ONLY_IN = {"typer": {"cli"}}
ONLY_INSIDE_FUNCTIONS = {"IPython", "torchvision", "sklearn", "pandas"}
# A module imports only what stands before it; `source` imports nothing of the library.
ORDER = ("binarize", "layers", "models", "inference", "filters", "optim", "data", "probes",
         "_checks", "records",
         "graphs", "checkpoints", "training", "experiments", "recording", "claims",
         "plots", "source", "cli", "__main__")  # fmt: skip
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def module_of(path):
    """The first name below the package: "models" for models/binaryconnect.py, "" for itself."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(tree, package="bnnbook"):
    """Yield (dotted name, inside a function) of all that a module in ``package`` imports."""
    inside = {id(child) for node in ast.walk(tree) if isinstance(node, FUNCTIONS)
              for child in ast.walk(node)}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                yield f"{base}.{alias.name}", id(node) in inside


def import_errors(text, module, package="bnnbook"):
    """Return what is wrong with the imports of a module's text."""
    wrong = []
    for name, lazy in imports(ast.parse(text), package):
        root, _, rest = name.partition(".")
        if root in FORBIDDEN or module not in ONLY_IN.get(root, {module}):
            wrong.append(f"{module or root} imports {name}")
        if root in ONLY_INSIDE_FUNCTIONS and not lazy:
            wrong.append(f"{module} imports {name} outside of a function")
        if root == "bnnbook" and not may_import(module, rest.partition(".")[0]):
            wrong.append(f"{module or root} imports {name}")
    return wrong


def may_import(module, other):
    if other not in ORDER:  # a name of the package itself, such as __version__
        return bool(module) and f"{other} = " in (PACKAGE / "__init__.py").read_text("utf-8")
    if module == other:  # the files of one folder
        return (PACKAGE / module).is_dir()
    return module in ORDER and module != "source" and ORDER.index(other) < ORDER.index(module)


def unsafe_calls(text):
    """Return the lines of calls that could run code from a file, such as torch.load."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        safe = {
            "torch.load": keywords.get("weights_only") == "True",
            "np.load": keywords.get("allow_pickle", "False") == "False",
            "numpy.load": keywords.get("allow_pickle", "False") == "False",
            **dict.fromkeys(["eval", "exec", "pickle.load", "pickle.loads"], False),
            **dict.fromkeys(["pickle.Unpickler", "load", "loads"], False),
        }
        if not safe.get(ast.unparse(node.func), True):
            found.append(node.lineno)
    return found


def undocumented(tree):
    """Yield the names of public functions, classes and methods without a docstring."""
    for node in tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield node.name
            if isinstance(node, ast.ClassDef):
                yield from (f"{node.name}.{name}" for name in undocumented(node))


def code_lines(function, lines):
    """Count the lines of a function that hold code: no docstring, comment or blank line."""
    numbers = set(range(function.lineno, function.end_lineno + 1))
    if ast.get_docstring(function):
        numbers -= set(range(function.body[0].lineno, function.body[0].end_lineno + 1))
    return sum(bool(lines[n - 1].strip()) and lines[n - 1].strip()[0] != "#" for n in numbers)


def lengths():
    """Return {file and name: lines of code} of all functions and methods."""
    found = {}
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, FUNCTIONS):
                name = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                found[name] = code_lines(node, text.splitlines())
    return found


def each_file(*paths):
    return pytest.mark.parametrize(
        "path", paths or FILES, ids=lambda path: str(path.relative_to(ROOT))
    )


# --- Imports -----------------------------------------------------------------------------------


@each_file()
def test_a_module_imports_only_what_stands_above_it(path):
    package = ".".join(["bnnbook", *path.relative_to(PACKAGE).parts[:-1]])
    assert import_errors(path.read_text(encoding="utf-8"), module_of(path), package) == []


@pytest.mark.parametrize(("module", "text"), [
    ("binarize", "from bnnbook.layers import BinaryLinear"),
    ("layers", "def f():\n    from bnnbook import models"),
    ("data", "from . import training"),
    ("data", "from .training import train"),
    ("claims", "import bnnbook.plots as plots"),
    ("source", "from bnnbook import binarize"),
    ("", "from bnnbook import binarize"),
    ("layers", "from bnnbook import layers"),
    ("cli", "from bnnbook import utils"),
    ("cli", "from bnnbook import __verzion__"),
    ("unheard", "from bnnbook import binarize"),
    ("claims", "from IPython.display import display"),
    ("data", "import torchvision.datasets"),
    ("records", "import pandas as pd"),
    ("plots", "import typer"),
    ("training", "from tests.reference import ste"),
    ("source", "def f():\n    import jupytext"),
])  # fmt: skip
def test_a_wrong_import_is_found(module, text):
    assert len(import_errors(text, module)) == 1


@pytest.mark.parametrize(("module", "package", "text"), [
    ("layers", "bnnbook", "from bnnbook.binarize import sign"),
    ("records", "bnnbook", "from . import __version__"),
    ("claims", "bnnbook", "from . import records"),
    ("models", "bnnbook.models", "from bnnbook.models.binaryconnect import binaryconnect_mlp"),
    ("experiments", "bnnbook.experiments", "from ..training import train"),
    ("claims", "bnnbook", "def f():\n    from IPython.display import display"),
    ("cli", "bnnbook", "import typer"),
])  # fmt: skip
def test_a_right_import_is_let_through(module, package, text):
    assert import_errors(text, module, package) == []


def test_every_module_has_its_place_in_the_order():
    assert {module_of(path) for path in FILES} - {""} <= set(ORDER)


def test_no_module_is_a_drawer():
    drawers = re.compile(r"(utils?|helpers?|misc|common|tools)\.py|(utils?|helpers?|misc|common)")
    names = {path.name for path in PACKAGE.rglob("*")}
    assert [name for name in names if drawers.fullmatch(name)] == []


def test_importing_the_library_costs_nothing():
    """Nothing heavy at all for `import bnnbook` and for the command line's help."""
    statements = {
        "import bnnbook": ["torch", "numpy"],
        "import bnnbook.cli": ["torch", "numpy"],
        "from bnnbook import binarize, layers, optim": [],
        "from bnnbook import records, claims, source": ["torch"],
    }
    heavy = ["torchvision", "sklearn", "pandas", "matplotlib", "seaborn", "IPython"]
    code = ("import json, sys\n{}\n"
            "print(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))")  # fmt: skip
    for statement, more in statements.items():
        done = subprocess.run([sys.executable, "-c", code.format(statement)], cwd=ROOT, text=True,
                              capture_output=True, check=True)  # fmt: skip
        loaded = json.loads(done.stdout)
        assert "bnnbook" in loaded
        assert set(loaded) & {*heavy, *more} == set(), statement


# --- What is never called ----------------------------------------------------------------------


@each_file()
def test_no_file_that_is_read_can_run_code(path):
    assert unsafe_calls(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("call", [
    "torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=w)",
    "np.load(path, allow_pickle=True)", "numpy.load(path, allow_pickle=flag)", "eval('1')",
    "pickle.loads(path)", "loads(path)",
])  # fmt: skip
def test_an_unsafe_call_is_found(call):
    assert unsafe_calls(f"def f(path):\n    return {call}") == [2]


@pytest.mark.parametrize("call", [
    "torch.load(p, weights_only=True)", "np.load(p)", "np.load(p, allow_pickle=False)",
    "model.eval()", "json.load(p)",
])  # fmt: skip
def test_a_safe_call_is_let_through(call):
    assert unsafe_calls(call) == []


# --- How it reads ------------------------------------------------------------------------------


@each_file()
def test_every_public_thing_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert list(undocumented(tree)) == []
    assert ast.get_docstring(tree) or path.name == "__main__.py"


def test_a_missing_docstring_is_found():
    text = 'def f(): ...\ndef _g(): ...\nclass C:\n    "C."\n    def m(self): ...\n    x = 1'
    assert list(undocumented(ast.parse(text))) == ["f", "C.m"]


def test_functions_are_short():
    found = lengths()
    assert len(found) > 100
    short = sum(count < 20 for count in found.values()) / len(found)
    longest = sorted(found.items(), key=lambda item: -item[1])[:5]
    assert short >= 0.8, f"{short:.0%} of the functions are under 20 lines; longest: {longest}"
    assert longest[0][1] <= 60, longest


def test_docstrings_comments_and_blank_lines_are_not_code():
    text = 'def f(\n    x,\n):\n    """One.\n\n    Two.\n    """\n\n    # three\n    return x\n'
    assert code_lines(ast.parse(text).body[0], text.splitlines()) == 4


@each_file()
def test_lines_are_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 99] == []


MACHINE_PATH = re.compile(r"(?<![\w.~$/:-])/(work|tmp|home|root|Users|mnt|scratch)/\w")
TEXTS = [path for pattern in ("bnnbook/**/*.py", "bnnbook/**/*.json", "bnnbook/*.mplstyle",
                              "tools/*.py", "benchmarks/*.py", "book/*.md", "notebooks/*.ipynb",
                              "*.md", "*.toml", "*.yml", "Makefile", ".ci/run",
                              ".github/workflows/*.yml")
         for path in sorted(ROOT.glob(pattern))]  # fmt: skip


@each_file(*TEXTS)
def test_no_text_names_a_path_of_somebodys_machine(path):
    text = path.read_text(encoding="utf-8")
    assert [match[0] for match in MACHINE_PATH.finditer(text)] == []


def test_a_path_of_somebodys_machine_is_found():
    assert MACHINE_PATH.search("see " + "/".join(["", "home", "me", "x.py"]))
    assert not MACHINE_PATH.search("https://example.org/home/page and a/tmp/b")
