"""The library's own source, shown in a chapter, so that no code is written twice."""

import ast
import inspect
import textwrap
from pathlib import Path


def show(*objects) -> None:
    """Display functions or classes as highlighted code in a notebook, without their docstrings.

    The chapter explains them in its own words; the docstrings are in the library.
    """
    from IPython.display import Markdown, display

    plain = [inspect.unwrap(each) for each in objects]  # a decorator may be from another file
    files = dict.fromkeys(Path(inspect.getsourcefile(each)).name for each in plain)
    text = "\n\n\n".join(without_docstrings(inspect.getsource(each)) for each in objects)
    display(Markdown(f"```python\n# {', '.join(files)}\n{text}\n```"))


def without_docstrings(source: str) -> str:
    r"""Return the source of a function or class without docstrings and ``# fmt: skip`` marks.

    >>> print(without_docstrings('def f(x):\n    "Return x."\n    return x\n'))
    def f(x):
        return x
    """
    source = textwrap.dedent(source)
    lines = [line.removesuffix("  # fmt: skip") for line in source.splitlines()]
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node)
        if documented and len(node.body) > 1:
            docstring = node.body[0]
            for number in range(docstring.lineno - 1, docstring.end_lineno):
                lines[number] = None
    kept = [line for line in lines if line is not None]
    return "\n".join(_without_leading_blanks(kept))


def _without_leading_blanks(lines: list[str]) -> list[str]:
    """Drop the blank lines that a cut docstring leaves right below its def or class line."""
    return [
        line
        for i, line in enumerate(lines)
        if line.strip() or (i and not lines[i - 1].rstrip().endswith(":"))
    ]
