"""The reference holds every public name, and the page for researchers runs as it stands."""

import contextlib
import doctest
import importlib
import inspect
import io
import pkgutil
import re
import symtable
from pathlib import Path

import pytest
import torch
import yaml
from sphinx.application import Sphinx

import bnnbook
from bnnbook.layers import binary_layers
from tools import api

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "book" / "api"
PAGE = (ROOT / "book" / "own-code.md").read_text(encoding="utf-8")


# --- Every public name -------------------------------------------------------------------------


def modules() -> list[str]:
    """All modules of the library; the command line is documented by its commands."""
    found = pkgutil.walk_packages(bnnbook.__path__, "bnnbook.")
    names = ["bnnbook", *(module.name for module in found)]
    return [name for name in names if name not in ("bnnbook.__main__", "bnnbook.cli")]


def public_names(name: str) -> set[str]:
    """What a module offers at run time: all that it does not import, and its ``__all__``."""
    module = importlib.import_module(name)
    symbols = symtable.symtable(inspect.getsource(module), name, "exec").get_symbols()
    imported = {symbol.get_name() for symbol in symbols if symbol.is_imported()}
    own = {key for key, value in vars(module).items()
           if key[0] != "_" and key not in imported and not inspect.ismodule(value)}  # fmt: skip
    return {f"{name}.{key}" for key in own | set(getattr(module, "__all__", ()))}


def home(path: str) -> str:
    """The shortest path of a name: that of a package which lists it in its ``__all__``."""
    module, _, name = path.rpartition(".")
    package = module.rpartition(".")[0]
    listed = package and name in getattr(importlib.import_module(package), "__all__", ())
    return f"{package}.{name}" if listed else path


@pytest.mark.parametrize("module", modules())
def test_every_public_name_is_found(module):
    found = {name.path for each in (module, *api.modules_in(module)) for name in api.public(each)}
    assert {home(path) for path in public_names(module)} <= found


def test_what_is_found_is_there_once():
    found = [name.path for module in modules() for name in api.public(module)]
    assert len(found) == len(set(found)) > 100
    for path in found:
        pkgutil.resolve_name(path)
    assert "bnnbook.models.binaryconnect_mlp" in found  # where users import it
    assert "bnnbook.layers.Tensor" not in found


def test_every_module_has_its_page():
    top = [name.name for name in pkgutil.iter_modules(bnnbook.__path__) if name.name[0] != "_"]
    listed = re.findall(r"- file: book/api/(\w+)", (ROOT / "_toc.yml").read_text("utf-8"))
    assert sorted(listed) == sorted([*top, "index"])
    index = (REFERENCE / "index.rst").read_text(encoding="utf-8")
    assert " ".join(re.findall(r"api-names:: (.*)", index)).split() == listed[1:]
    for name in set(top) - {"cli"}:
        page = (REFERENCE / f"{name}.rst").read_text(encoding="utf-8")
        assert page.split("\n")[0] == name
        assert f".. api:: bnnbook.{name}\n" in page


def test_every_command_is_described():
    from bnnbook import cli

    text = api.commands_text()
    commands = {c.name or c.callback.__name__ for c in cli.app.registered_commands}
    assert commands == set(re.findall(r"^bnnbook (\w+)$", text, re.MULTILINE))
    for words in ("``--minutes", "``experiment", "[default: small]", "``--runs``,"):
        assert words in text


# --- The text of an entry ----------------------------------------------------------------------


def constant(source: str) -> str:
    return api.comment_at(source, api.ast.parse(source).body[-1])


@pytest.mark.parametrize(("source", "comment"), [
    ("# Above.\nA = 1", "Above."),
    ("# Two\n# lines.\nA = 1", "Two lines."),
    ("A = 1  # beside", "beside"),
    ("A = (1,\n     2)  # fmt: skip", ""),
    ("# --- Part ---\nA = 1", ""),
    ("# Of another.\n\nA = 1", ""),
    ("B = 2  # of B\nA = 1", ""),
    ("A = '# none'", ""),
])  # fmt: skip
def test_the_comment_at_a_constant_describes_it(source, comment):
    assert constant(source) == comment


@pytest.mark.parametrize(("module", "name", "first"), [
    ("bnnbook.binarize", "sign", "def sign("),
    ("bnnbook.layers", "BinaryLinear", "class BinaryLinear("),
    ("bnnbook.layers", "BinaryLinear.forward", "    def forward("),
    ("bnnbook.models", "binaryconnect_mlp", "def binaryconnect_mlp("),
    ("bnnbook.records", "cpu_model", "@functools.cache"),
    ("bnnbook.data", "NAMES", "NAMES = "),
])  # fmt: skip
def test_a_source_link_names_the_lines_of_the_definition(module, name, first):
    link = api.source_link("py", {"module": module, "fullname": name})
    address, _, lines = link.partition("#")
    file = ROOT / address.removeprefix(f"{bnnbook.REPOSITORY}/blob/main/")
    start, end = re.fullmatch(r"L(\d+)-L(\d+)", lines).groups()
    text = file.read_text(encoding="utf-8").splitlines()[int(start) - 1 : int(end)]
    assert text[0].startswith(first)
    assert text[-1].strip()


def test_what_is_not_there_has_no_source_link():
    for name in ("Nothing", "BinaryLinear.nothing", "Tensor"):
        assert api.source_link("py", {"module": "bnnbook.layers", "fullname": name}) is None


@pytest.mark.parametrize(("path", "what", "arguments", "returns"), [
    ("binarize:ste_sign", "function", "(x: Tensor, clip_value: float | None=1.0)", "Tensor"),
    ("layers:BinaryLayer.binary_weight", "method", "()", "Tensor"),
    ("layers:SquaredHingeLoss", "class", "(reduction: str='mean')", ""),
    ("data:Dataset.to", "method", "(device: torch.device | str)", "Dataset"),
    ("training:train_epoch", "function", "(run: _Run)", "None"),
    ("records:cpu_model", "function", "()", "str"),
    ("experiments.bulat2021:Fit", "class",
     "(model: nn.Module, rows: list[dict], dataset: data.Dataset, "
     "preprocess: Callable[[Tensor], Tensor], recipe: Recipe, stage1: Tensor)", ""),  # a dataclass
    ("optim:FlipOptimizer", "class", "(params: Iterable, defaults: dict)", ""),
    ("experiments.beyond:CascadedEMA", "class",
     "(params: Iterable, alpha: float, gamma: float, *, fused: bool=False)", ""),
])  # fmt: skip
def test_a_signature_reads_as_in_the_source(path, what, arguments, returns):
    thing = pkgutil.resolve_name(f"bnnbook.{path}")
    assert api.written_signature(None, what, path, thing) == (arguments, returns)


@pytest.mark.parametrize(("path", "what"), [
    ("bnnbook.training:History.frame", "property"),
    ("torch.nn:Linear.forward", "method"),
])  # fmt: skip
def test_a_signature_that_is_not_in_our_source_is_autodocs(path, what):
    assert api.written_signature(None, what, path, pkgutil.resolve_name(path)) is None


def test_the_comments_at_the_fields_of_a_class_are_shown():
    from bnnbook.experiments.binaryconnect import Recipe

    lines = ["The settings of one training run, complete.", ""]
    api.list_arguments(None, "class", "Recipe", Recipe, None, lines)
    assert lines[lines.index("``lr_end``") + 1] == "    reached exponentially, one step an epoch"
    assert "``epochs``" not in lines


def test_the_examples_of_the_extension_hold():
    result = doctest.testmod(api)
    assert result.attempted > 4
    assert result.failed == 0


# --- References from a docstring ---------------------------------------------------------------


def built(folder: Path, text: str) -> tuple[str, str]:
    """Build one page strictly; return its HTML and the warnings."""
    for name in ("source", "out"):
        (folder / name).mkdir()
    (folder / "source" / "index.rst").write_text(f"Page\n====\n\n{text}", encoding="utf-8")
    warnings = io.StringIO()
    options = {"extensions": ["tools.api"], "default_role": "py:obj", "nitpicky": True}
    paths = [str(folder / name) for name in ("source", "out", "out")]
    with contextlib.redirect_stdout(None):
        app = Sphinx(paths[0], None, *paths[1:], "html", options, status=None, warning=warnings)
        app.build()
    return (folder / "out" / "index.html").read_text(encoding="utf-8"), warnings.getvalue()


def test_names_in_backticks_become_links_and_a_wrong_one_is_a_warning(tmp_path):
    names = "`source.show`, `torch.nn.Conv2d`, `source.none`, `torch.none`"
    html, warnings = built(tmp_path, f".. api:: bnnbook.source\n\n{names}")
    assert 'href="#bnnbook.source.show" title' in html
    assert ">torch.nn.Conv2d<" in html
    assert re.findall(r"not found: ([\w.]+)", warnings) == ["source.none", "torch.none"]


# --- The page for researchers ------------------------------------------------------------------

SNIPPETS = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict:
    """The page's names after its snippets ran in order; what each prints is what it shows."""
    names: dict = {}
    with contextlib.chdir(tmp_path_factory.mktemp("own")), torch.random.fork_rng(devices=[]):
        for code, shown in SNIPPETS:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, "own-code.md", "exec"), names)
            assert printed.getvalue() == shown, code
    return names


def test_the_snippets_run_and_print_what_they_show(names):
    assert len(SNIPPETS) > 8
    assert PAGE.count("```text") == sum(bool(shown) for _, shown in SNIPPETS)


@pytest.mark.parametrize("network", ["net", "bop"])
def test_weights_trained_without_latent_ones_are_exactly_binary(names, network):
    for layer in binary_layers(names[network]):
        assert layer.weight_quantizer is None
        assert layer.weight.detach().abs().eq(1).all()


@pytest.mark.parametrize("network", ["net", "bop", "latent"])
def test_the_networks_of_the_page_learn(names, network):
    assert names["accuracy"](names[network]) > 0.6  # chance is 0.1


def test_latent_weights_are_clipped(names):
    for layer in binary_layers(names["latent"]):
        assert layer.weight.abs().max() <= 1
        assert layer.weight.unique().numel() > 1000


def test_the_page_installs_from_the_repository():
    (command,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    assert command == f"pip install git+{bnnbook.REPOSITORY}\n"
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert config["repository"]["url"] == bnnbook.REPOSITORY
