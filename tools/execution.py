"""Execute one chapter in a process of its own: `python -m tools.execution '{...}'`.

The process that builds the book (`tools.build`) starts this one and reads its events from its
standard output, one JSON object per line. The kernel's own output goes to standard error.
"""

import json
import os
import re
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from tools import chapters
from tools.chapters import BookError, Chapter

CELL_SECONDS = 600


def tell(event: str, **details: Any) -> None:
    print(json.dumps({"event": event, **details}), flush=True)


def keep_events_apart() -> None:
    """Keep the kernel, which inherits file descriptors 1 and 2, from writing among the events."""
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)


def build(chapter: Chapter, folder: Path | None, overrides: dict[str, Any], force: bool) -> None:
    """Execute the chapter if that is still needed once its lock is held, and publish it."""
    with chapters.locked(chapter, lambda text: tell("note", text=text)):
        if not force and chapters.state(chapter, folder, overrides)[0] == "fresh":
            tell("fresh")
            return
        record = {
            "key": chapters.key(chapter, overrides),
            "parameters": chapters.check_parameters(chapter, overrides),
            "versions": chapters.installed_versions(),
        }
        executed = execute(chapter, overrides)
        check(chapter, executed)
        text = executed if overrides else chapter.read()
        chapters.write_atomically(
            chapter.notebook(folder), chapters.compose(text, executed, record)
        )
        tell("executed")


def execute(chapter: Chapter, overrides: dict[str, Any]) -> NotebookNode:
    """Run the chapter with papermill in an empty folder; nothing is written to the book."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    notebook = chapter.read()
    total = len(chapters.code_cells(notebook))
    running: list[NotebookNode] = []

    def progress(cell: NotebookNode, cell_index: int) -> None:
        running.append(cell)
        tell("cell", number=len(running), total=total)

    with tempfile.TemporaryDirectory(prefix="bnnbook-") as empty:
        try:
            return papermill.execute_notebook(
                notebook,
                None,
                parameters=overrides,
                kernel_name="python3",
                cwd=empty,
                progress_bar=False,
                execution_timeout=CELL_SECONDS,
                start_timeout=120,
                iopub_timeout=60,  # the default of 4 s fails on a busy machine
                on_cell_execute=progress,
            )
        except PapermillExecutionError as error:
            traceback = "\n".join(error.traceback) or f"{error.ename}: {error.evalue}"
            raise failure(chapter, running[-1], traceback) from error
        except Exception as error:  # the kernel died, a cell took too long, no kernel started
            if not running:
                raise
            raise failure(chapter, running[-1], f"{type(error).__name__}: {error}") from error


def failure(chapter: Chapter, cell: NotebookNode, reason: str) -> BookError:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", reason)
    return BookError(f"{chapters.where(chapter, cell)}\n\n{plain}")


def check(chapter: Chapter, executed: NotebookNode) -> None:
    """Refuse outputs that may not be published."""
    nbformat.validate(executed)
    for cell, reason in chapters.faults(executed):
        raise failure(chapter, cell, f"the cell left {reason}")


def main() -> int:
    # An exception, so that papermill ends the kernel and the empty folder is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    keep_events_apart()
    job = json.loads(sys.argv[1])
    chapter = Chapter(Path(job["root"]), job["name"])
    folder = Path(job["folder"]) if job["folder"] else None
    try:
        build(chapter, folder, job["overrides"], job["force"])
    except (BookError, OSError) as error:
        tell("failed", text=str(error))
        return 1
    return 0


def environment(root: Path, published: bool) -> dict[str, str]:
    """The environment of a chapter's process: a reader's own must not change the results."""
    import importlib.util

    matplotlib = Path(importlib.util.find_spec("matplotlib").origin).parent
    ours = {
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(":"),
        "PYTHONHASHSEED": "0",
        # One thread, so that sums keep their order; the other cores are for the other chapters.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        # Freed memory waits for the next tensor: fresh pages are slow, on some machines very.
        "MALLOC_MMAP_THRESHOLD_": str(2**25),  # the most that glibc allows
        "MALLOC_TRIM_THRESHOLD_": str(2**30),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MATPLOTLIBRC": str(matplotlib / "mpl-data" / "matplotlibrc"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "COLUMNS": "80",
    }
    if published:
        # The published run is the small one, on a CPU, whatever the machine.
        ours["CUDA_VISIBLE_DEVICES"] = ""
    # A reader's own records, data sets and precision have no place in a published chapter.
    private = {"BNNBOOK_RESULTS", "BNNBOOK_DATA", "BNNBOOK_PRECISION"} if published else set()
    return {k: v for k, v in os.environ.items() if k not in private} | ours


if __name__ == "__main__":
    raise SystemExit(main())
