"""Build the site from the notebooks as they are: `python -m tools.website [--strict]`.

It goes to _build/html. No notebook is executed, and nothing is done if none of the site's sources
has changed since the last build.
"""

import argparse
import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from tools.chapters import ROOT, write_atomically

SOURCES = (
    "_config.yml", "_toc.yml", "book", "notebooks", "bnnbook", "tools/api.py", "tools/pages.py",
    "requirements.lock",
)  # fmt: skip
IGNORED = {"__pycache__", ".ipynb_checkpoints"}
JUPYTER_BOOK = "from jupyter_book.cli.main import main; main()"


def digest(root: Path) -> str:
    """The hash of everything that the site is made from."""
    total = hashlib.sha256()
    for source in (root / name for name in SOURCES):
        files = [source] if source.is_file() else sorted(source.rglob("*"))
        for path in files:
            if path.is_file() and not IGNORED.intersection(path.parts):
                total.update(f"{path.relative_to(root)}\0".encode())
                total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def build(root: Path, strict: bool) -> int:
    """Build what is out of date; with `strict`, build everything and take warnings as errors."""
    folder = root / "_build"
    stamp, sources = folder / ".sources", digest(root)
    if strict:
        shutil.rmtree(folder, ignore_errors=True)
    elif (folder / "html" / "index.html").is_file() and stamp.is_file():
        if stamp.read_text(encoding="utf-8") == sources:
            print("the site is up to date")
            return 0
        stamp.unlink()
    options = ["-W", "--keep-going", "-n"] if strict else ["-q"]
    # --all, because a changed title or table of contents shows on every page.
    command = [sys.executable, "-c", JUPYTER_BOOK, "build", str(root), "--all", *options]
    code = subprocess.run(command, cwd=root, stdin=subprocess.DEVNULL).returncode
    if code == 0:
        write_atomically(stamp, sources)
    return code


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.website")
    parser.add_argument("--strict", action="store_true", help="from nothing; warnings are errors")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    root = arguments.root.resolve()
    (root / ".cache").mkdir(exist_ok=True)
    # Of two builds at once, the second waits and then finds the site up to date.
    with (root / ".cache" / "website.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code = build(root, arguments.strict)
    if code == 0:
        index = root / "_build" / "html" / "index.html"
        print(f"the book: {index.as_uri()}\n      or: make serve", flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
