"""Which files of a package a piece of Python reaches through its imports."""

import ast
import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

MAGIC = re.compile(r"^(\s*)[%!].*$", re.MULTILINE)


def reached_files(sources: Iterable[str], root: Path, package: str) -> set[Path]:
    """The files of `package` (a folder in `root`) that running `sources` can import.

    Imports inside functions count, because a chapter calls functions. An import by a computed name
    is not seen.
    """
    found: set[Path] = set()
    todo = {file for source in sources for file in _direct(source, root, package, "")}
    while todo:
        file = todo.pop()
        found.add(file)
        module = ".".join(file.relative_to(root).with_suffix("").parts)
        # Relative imports start at the folder, for an __init__.py, too.
        parent = module.rpartition(".")[0]
        source = file.read_text(encoding="utf-8")
        try:
            todo |= set(_direct(source, root, package, parent)) - found
        except SyntaxError as error:
            raise SyntaxError(f"{file.relative_to(root)}: {error}") from error
    return found


def parse(source: str) -> ast.Module:
    """The syntax tree of a module or of a code cell; its lines for IPython count as `pass`."""
    try:
        return ast.parse(source)
    except SyntaxError:
        return ast.parse(MAGIC.sub(r"\1pass", source))


def _direct(source: str, root: Path, package: str, parent: str) -> Iterator[Path]:
    for name in imported_names(parse(source), parent):
        if name.partition(".")[0] == package:
            yield from _files(name, root)


def imported_names(tree: ast.Module, parent: str) -> Iterator[str]:
    """Dotted names imported, or reached as attributes (`bnnbook.data.load`)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), parent)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if re.fullmatch(r"[\w.]+", name):
                yield name


def _files(name: str, root: Path) -> Iterator[Path]:
    """The files that `import name` runs: every parent package's `__init__.py`, then the module."""
    path = root
    for part in name.split("."):
        path = path / part
        candidates = (path.with_name(f"{part}.py"), path / "__init__.py")
        yield from (file for file in candidates if file.is_file())
