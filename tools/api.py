"""The API reference, as a Sphinx extension that finds the library's public names by itself.

On a page, ``.. api:: bnnbook.layers`` documents a module, ``.. api-names:: layers models`` lists
what modules hold, and ``.. api-commands::`` describes the command line.
"""

import ast
import contextlib
import copy
import inspect
import io
import pkgutil
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

import bnnbook

ROOT = Path(__file__).resolve().parent.parent
BRANCH = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]["branch"]
PACKAGE = Path(bnnbook.__file__).parent
LONGEST_VALUE = 88  # characters of a constant's value that are shown


@dataclass(frozen=True)
class Name:
    """A public name: as a user writes it, the module that defines it, and the statement."""

    path: str
    module: str
    node: ast.stmt

    @property
    def kind(self) -> str:
        """What autodoc calls it: function, class, exception or data."""
        if isinstance(self.node, ast.FunctionDef):
            return "function"
        if isinstance(self.node, ast.ClassDef):
            return "exception" if issubclass(self.object, BaseException) else "class"
        return "data"

    @property
    def object(self) -> object:
        """The object itself, even where a module has the same path."""
        return pkgutil.resolve_name(":".join(self.path.rsplit(".", 1)))


# --- Names: read from the library's text, nothing is imported ------------------------------------


@cache
def file_of(module: str) -> Path:
    """The file of a module."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def tree_of(module: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(file_of(module).read_text(encoding="utf-8"))


@cache
def modules_in(package: str) -> tuple[str, ...]:
    """The public modules right below a package, none for a plain module."""
    found = pkgutil.iter_modules([str(PACKAGE.parent.joinpath(*package.split(".")))])
    return tuple(f"{package}.{module.name}" for module in found if module.name[0] != "_")


@cache
def public(module: str) -> tuple[Name, ...]:
    """The public names that a module's own text defines, in order.

    A name in the ``__all__`` of the package above belongs to the package: users import it there.
    """
    package = module.rpartition(".")[0]
    exported = _exported(package) if package else ()
    return tuple(
        Name(f"{package if name in exported else module}.{name}", module, node)
        for node in tree_of(module).body
        for name in _defined(node)
        if not name.startswith("_")
    )


def _exported(package: str) -> list[str]:
    for node in tree_of(package).body:
        if "__all__" in _defined(node):
            return ast.literal_eval(node.value)
    return []


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from (each.id for each in ast.walk(target) if isinstance(each, ast.Name))


# --- Pages -------------------------------------------------------------------------------------


def module_text(module: str, underline: str = "-") -> str:
    """The documentation of a module and of the modules below it, as reStructuredText."""
    names = public(module)
    constants = [name for name in names if name.kind == "data"]
    parts = [f".. automodule:: {module}\n"]
    if any(name.path == module for name in names):  # models.alexnet means the function
        parts = [f".. automodule:: {module}\n   :no-index:\n"]
    parts += [_documented(name) for name in names if name.kind != "data"]
    if constants:
        parts += [_heading("Constants", underline), *map(_constant, constants)]
    if module != bnnbook.__name__:  # its modules have pages of their own
        for below in modules_in(module):
            parts += [_heading(below.rpartition(".")[2], underline), module_text(below, "~")]
    return "\n".join(parts)


def _heading(title: str, underline: str) -> str:
    return f"{title}\n{underline * len(title)}\n"


def _documented(name: Name) -> str:
    text = f".. auto{name.kind}:: {name.path}\n"
    if name.kind in ("class", "exception"):
        text += "   :members:\n"
        if name.object.__bases__ != (object,):
            text += "   :show-inheritance:\n"
    return text


def _constant(name: Name) -> str:
    """A constant with the comment at it, and its value if that is short."""
    module, _, short = name.path.rpartition(".")
    source = file_of(name.module).read_text(encoding="utf-8")
    value = " ".join(ast.unparse(name.node.value).split()) if name.node.value else ""
    text = f".. py:data:: {short}\n   :module: {module}\n"
    if 0 < len(value) <= LONGEST_VALUE:
        text += f"   :value: {value}\n"
    return f"{text}\n   {_escaped(comment_at(source, name.node))}\n"


def comment_at(source: str, node: ast.stmt) -> str:
    """The comment right above a statement, or at the end of its lines.

    >>> text = "# One.\\nA = 1\\nB = (2,\\n     3)  # Two.  # fmt: skip\\n# --- Part ---\\nC = 4"
    >>> [comment_at(text, node) for node in ast.parse(text).body]
    ['One.', 'Two.', '']
    """
    comments, first = _comments(source), node.lineno
    while first - 1 in comments and comments[first - 1].line.lstrip().startswith("#"):
        first -= 1
    lines = [comments[n].string for n in range(first, node.end_lineno + 1) if n in comments]
    text = " ".join(line.replace("# fmt: skip", "").strip("# ") for line in lines)
    return "" if text.startswith("---") else text.strip()


@cache
def _comments(source: str) -> dict[int, tokenize.TokenInfo]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}


def _escaped(text: str) -> str:
    r"""The text, with what stands between backticks as a literal.

    >>> _escaped("a_b of `train`, see ``fit``")
    'a\\_b of ``train``, see ``fit``'
    """
    plain_and_code = re.split(r"`+([^`]+)`+", text)
    return "".join(
        f"``{part}``" if number % 2 else re.sub(r"([\\*`|_])", r"\\\1", part)
        for number, part in enumerate(plain_and_code)
    )


def names_text(modules: list[str]) -> str:
    """What each module is for, in its first sentence, with links to its names."""
    parts = []
    for short in modules:
        module = f"{bnnbook.__name__}.{short}"
        parts.append(f":doc:`{short} <{short}>`\n    {first_sentence(tree_of(module))}\n")
        names = [name for each in (module, *modules_in(module)) for name in public(each)]
        links = [
            f":py:obj:`{name.path.removeprefix(f'{module}.')} <{name.path}>`"
            for name in names
            if name.kind != "data"
        ]
        if short != "cli":
            parts.append(f"    {', '.join(links)}\n")
    return "\n".join(parts)


def first_sentence(node: ast.AST) -> str:
    """The first sentence of a docstring, on one line.

    >>> first_sentence(ast.parse("'''One, e.g. this. Two.\\n\\nThree.'''"))
    'One, e.g. this.'
    """
    paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.:])\s+(?=[A-Z])", paragraph)[0]


# --- Docstrings and signatures -----------------------------------------------------------------


def written_signature(app: Sphinx, what: str, name: str, thing, *_) -> tuple[str, str] | None:
    """The signature as the source has it, with its own names for types (autodoc expands them)."""
    is_class = what in ("class", "exception")
    node, path = _node_of(thing), getattr(thing, "__qualname__", "").split(".")
    if is_class and isinstance(node, ast.ClassDef):
        if fields := _fields_signature(node):
            return fields
        node, path = _node_of(thing.__init__), [*path, "__init__"]  # it may be inherited
    if not isinstance(node, ast.FunctionDef):
        return None  # made by a decorator, or another library's
    node = copy.deepcopy(node)
    _unquote_annotations(node)
    if len(path) > 1 and "staticmethod" not in map(ast.unparse, node.decorator_list):
        del (node.args.posonlyargs or node.args.args)[0]
    returns = "" if is_class or node.returns is None else ast.unparse(node.returns)
    return f"({ast.unparse(node.args)})", returns


def _node_of(thing) -> ast.AST | None:
    """Where a function or a class of ours is defined; None for other things."""
    module = getattr(thing, "__module__", None) or ""
    path = getattr(thing, "__qualname__", "").split(".")
    ours = module.partition(".")[0] == bnnbook.__name__
    return _find(tree_of(module), path) if ours and all(path) else None


def _fields_signature(node: ast.ClassDef) -> tuple[str, str] | None:
    """The signature of a dataclass, which has no __init__ in the source; else None."""
    made_by = [ast.unparse(each) for each in node.decorator_list]
    if not any(each.startswith("dataclass") for each in made_by):
        return None
    fields = []
    for each in node.body:
        if isinstance(each, ast.AnnAssign):
            text = ast.unparse(each)  # a default that a function makes is shown as its call
            fields.append(re.sub(r"field\(default_factory=(\w+)\)", r"\1()", text))
    first = ["*"] if "kw_only=True" in "".join(made_by) else []
    return f"({', '.join([*first, *fields])})", ""


def _unquote_annotations(function: ast.FunctionDef) -> None:
    for node in ast.walk(function):
        for field in ("annotation", "returns"):
            value = getattr(node, field, None)
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                setattr(node, field, ast.parse(value.value, mode="eval").body)


def list_arguments(app: Sphinx, what: str, name: str, thing, options, lines: list[str]) -> None:
    """Turn a docstring's lines ``argument: what it does`` into a definition list, in place.

    For a class, the comments at its fields are appended.
    """
    if what in ("function", "method", "class"):
        lines[:] = with_argument_list(lines, set(inspect.signature(thing).parameters))
    if what == "class":
        lines += [line for field in commented_fields(thing) for line in field]


def commented_fields(thing: type) -> Iterator[tuple[str, str]]:
    """The fields of a class that have a comment, as entries of a definition list."""
    source = file_of(thing.__module__).read_text(encoding="utf-8")
    for node in _find(tree_of(thing.__module__), thing.__qualname__.split(".")).body:
        comment = comment_at(source, node) if isinstance(node, ast.AnnAssign) else ""
        if comment:
            yield f"``{node.target.id}``", f"    {_escaped(comment)}"


def with_argument_list(lines: list[str], arguments: set[str]) -> list[str]:
    """The lines of a docstring, with those about ``arguments`` as a definition list.

    >>> with_argument_list(["Do.", "a, b: two", "numbers.", "", "c: no argument"], {"a", "b"})
    ['Do.', '', '``a``, ``b``', '    two', '    numbers.', '', 'c: no argument']
    """
    result, inside = [], False
    for line in lines:
        match = re.fullmatch(r"(\w+(?:, \w+)*): (.+)", line)
        if match and set(match[1].split(", ")) <= arguments:
            term = ", ".join(f"``{argument}``" for argument in match[1].split(", "))
            result += ["", term, f"    {match[2]}"]
            inside = True
        else:
            inside = inside and bool(line)
            result.append(f"    {line}" if inside else line)
    return result


# --- The command line --------------------------------------------------------------------------


def commands_text() -> str:
    """Each command with what its --help says, as reStructuredText."""
    import typer

    from bnnbook import cli

    group = typer.main.get_command(cli.app)
    parts = [f".. automodule:: {cli.__name__}\n"]
    for name, command in group.commands.items():
        context = command.make_context(f"bnnbook {name}", [], resilient_parsing=True)
        usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
        parts += [_heading(f"bnnbook {name}", "-"), f".. code-block:: text\n\n   {usage}\n"]
        parts += [_literals(paragraph) for paragraph in command.help.split("\n\n")]
        records = [parameter.get_help_record(context) for parameter in command.params]
        parts += [f"``{term}``\n    {_literals(text)}" for term, text in records]
    return "\n\n".join(parts) + "\n"


def _literals(text: str) -> str:
    """Text with words in backticks, and options, as literals.

    >>> _literals("See `bnnbook list` and --runs.")
    'See ``bnnbook list`` and ``--runs``.'
    """
    text = " ".join(text.split())
    return re.sub(r"`([^`]+)`|(?<![\w-])(--[a-z]+)", lambda m: f"``{m[1] or m[2]}``", text)


# --- Links -------------------------------------------------------------------------------------


def source_link(domain: str, info: dict[str, str]) -> str | None:
    """The address of a name's lines in the repository, for sphinx.ext.linkcode."""
    for module in (info["module"], *modules_in(info["module"])):
        node = _find(tree_of(module), info["fullname"].split("."))
        if node is not None:
            path = file_of(module).relative_to(PACKAGE.parent).as_posix()
            decorators = getattr(node, "decorator_list", [])
            first = min([node.lineno, *(each.lineno for each in decorators)])
            lines = f"#L{first}-L{node.end_lineno}"
            return f"{bnnbook.REPOSITORY}/blob/{BRANCH}/{path}{lines}"
    return None


def _find(tree: ast.AST, parts: list[str]) -> ast.stmt | None:
    for node in tree.body:
        if parts[0] in _defined(node):
            return _find(node, parts[1:]) if parts[1:] else node
    return None


def resolve(app: Sphinx, env, node: nodes.Element, content: nodes.Element):
    """Resolve what Sphinx does not: the library's names without ``bnnbook.``, and torch's.

    Other libraries' names stay plain text (a link would need their index from the network), but
    they must exist. For anything else Sphinx warns.
    """
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    objects = env.get_domain("py").objects
    found = [name for name in objects if name.endswith(f".{target}")]
    if f"{bnnbook.__name__}.{target}" in found:
        found = [f"{bnnbook.__name__}.{target}"]
    if len(found) == 1:
        entry = objects[found[0]]
        return make_refnode(
            app.builder, node["refdoc"], entry.docname, entry.node_id, content, found[0]
        )
    private = target.rpartition(".")[2].startswith("_")
    known = private or _is_foreign(target, node.get("py:module"))
    return content if not found and known else None


@cache
def _is_foreign(name: str, module: str | None) -> bool:
    """Whether another library has this name, or a module of ours imports an object under it."""
    if name.partition(".")[0] == bnnbook.__name__:
        return False
    spaces = [f"{each}:" for each in (module, *modules_in(module))] if module else []
    for space in ["", *spaces]:
        with contextlib.suppress(ImportError, AttributeError, ValueError):
            pkgutil.resolve_name(space + name)
            return True
    return False


class _Generated(SphinxDirective):
    """A directive whose content is made from its arguments."""

    optional_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        text = self.text(" ".join(self.arguments).split())
        return self.parse_text_to_nodes(text, allow_section_headings=True)


class _Module(_Generated):
    text = staticmethod(lambda arguments: module_text(*arguments))


class _Names(_Generated):
    text = staticmethod(names_text)


class _Commands(_Generated):
    text = staticmethod(lambda arguments: commands_text())


def _use_source_link(app: Sphinx, config) -> None:
    config.linkcode_resolve = source_link  # a function cannot stand in _config.yml


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives and the links; Sphinx calls this."""
    app.setup_extension("sphinx.ext.autodoc")
    app.setup_extension("sphinx.ext.linkcode")
    app.connect("config-inited", _use_source_link)
    app.connect("autodoc-process-signature", written_signature)
    app.connect("autodoc-process-docstring", list_arguments)
    app.connect("missing-reference", resolve)
    app.add_directive("api", _Module)
    app.add_directive("api-names", _Names)
    app.add_directive("api-commands", _Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
