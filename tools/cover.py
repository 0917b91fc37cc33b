"""The picture of the first page, as its chapter drew it: `python -m tools.cover [--check]`.

README.md and book/intro.md show book/assets/cover.png. It is a copy, byte for byte, of the figure
that pyproject.toml names as `cover` under [tool.bnnbook].
"""

import argparse
import base64
import sys
import tomllib
from pathlib import Path

import nbformat

from tools.chapters import ROOT, BookError, code_cells, write_atomically

COVER = Path("book/assets/cover.png")


def drawn(root: Path = ROOT) -> bytes:
    """The figure that pyproject.toml names, as a PNG, from the executed chapter that has it."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    name = settings["tool"]["bnnbook"]["cover"]
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        for cell in code_cells(nbformat.read(path, as_version=4)):
            if cell.metadata.get("mystnb", {}).get("figure", {}).get("name") != name:
                continue
            for output in cell.outputs:
                if encoded := output.get("data", {}).get("image/png"):
                    return base64.b64decode(encoded)
    raise BookError(f"no executed chapter has the figure {name}, the cover in pyproject.toml")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.cover")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    path = arguments.root / COVER
    try:
        picture = drawn(arguments.root)
    except BookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if path.is_file() and path.read_bytes() == picture:
        return 0
    if arguments.check:
        print(f"{path.name}: not the chapter's figure: run `make notebooks`")
        return 1
    write_atomically(path, picture)
    print(f"{path.name}: renewed from its chapter")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
