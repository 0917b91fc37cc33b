"""Command line of `tools.chapters`: decides what to do about each chapter and shows progress."""

import argparse
import ast
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tools import chapters, execution
from tools.chapters import BookError, Chapter

# What every kernel says when it starts, about a connection that never leaves this machine.
NOISE = re.compile(
    r"TCP without encryption|caught in kernel|ipykernel#|Debugger warning|frozen modules|PYDEVD"
    r"|PYTHON_FROZEN"
)


class Screen:
    """Lines of progress, each with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.lock = threading.Lock()
        self.last: dict[str, float] = {}

    def say(self, text: str) -> None:
        with self.lock:
            print(f"[{time.monotonic() - self.start:5.1f} s] {text}", flush=True)

    def cell(self, name: str, number: int, total: int) -> None:
        """Report a cell, at most every five seconds per chapter."""
        now = time.monotonic()
        if number == 1 or now - self.last.get(name, 0.0) > 5:
            self.last[name] = now
            self.say(f"{name}: cell {number}/{total}")


class Builder:
    """Executes chapters side by side, each in its own process, and ends them when interrupted."""

    def __init__(self, root: Path, folder: Path | None, overrides: dict[str, Any], force: bool):
        self.root, self.folder, self.overrides, self.force = root, folder, overrides, force
        self.screen = Screen()
        self.processes: list[subprocess.Popen] = []
        self.stopping = False

    def run(self, wanted: list[Chapter], jobs: int) -> dict[str, list[str]]:
        """What became of each chapter: executed, text renewed, fresh or failed."""
        result: dict[str, list[str]] = {"executed": [], "refreshed": [], "fresh": [], "failed": []}
        stale = []
        for chapter in wanted:
            found, why = chapters.state(chapter, self.folder, self.overrides)
            if self.force or found == "stale":
                self.screen.say(f"{chapter.name}: to execute ({'forced' if self.force else why})")
                stale.append(chapter)
            elif found == "text":
                self.refresh(chapter)
                result["refreshed"].append(chapter.name)
            else:
                result["fresh"].append(chapter.name)
        for name, outcome in self.execute(stale, jobs):
            result[outcome].append(name)
        return result

    def refresh(self, chapter: Chapter) -> None:
        with chapters.locked(chapter, lambda text: self.screen.say(f"{chapter.name}: {text}")):
            chapters.renew(chapter, self.folder)
        self.screen.say(f"{chapter.name}: text renewed, outputs kept")

    def execute(self, stale: list[Chapter], jobs: int) -> list[tuple[str, str]]:
        if not stale:
            return []
        with ThreadPoolExecutor(jobs) as pool:
            try:
                futures = [pool.submit(self.one, chapter) for chapter in stale]
                return [future.result() for future in as_completed(futures)]
            except BaseException:
                self.stopping = True
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()
                raise

    def one(self, chapter: Chapter) -> tuple[str, str]:
        """Execute one chapter in its own process and session, so that Ctrl-C reaches only us."""
        job = {
            "root": str(self.root),
            "name": chapter.name,
            "folder": str(self.folder) if self.folder else None,
            "overrides": self.overrides,
            "force": self.force,
        }
        started = time.monotonic()
        with (
            tempfile.TemporaryFile() as said,
            subprocess.Popen(
                [sys.executable, "-m", "tools.execution", json.dumps(job)],
                cwd=chapters.ROOT,
                env=execution.environment(self.root, published=not self.overrides),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                start_new_session=True,
            ) as process,
        ):
            self.processes.append(process)
            if self.stopping:
                process.terminate()
            outcome, text = self.follow(chapter.name, process)
            process.wait()
            said.seek(0)
            lines = said.read().decode(errors="replace").splitlines()
        if self.stopping:
            return chapter.name, "failed"
        lines = [line for line in lines if not NOISE.search(line)] + text
        print("\n".join(lines), file=sys.stderr, end="\n" if lines else "")
        seconds = time.monotonic() - started
        self.screen.say(f"{chapter.name}: {outcome} in {seconds:.1f} s")
        return chapter.name, outcome

    def follow(self, name: str, process: subprocess.Popen) -> tuple[str, list[str]]:
        """Read the events of a chapter's process until it ends."""
        outcome, text = "failed", []
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "cell":
                self.screen.cell(name, event["number"], event["total"])
            elif event["event"] == "note":
                self.screen.say(f"{name}: {event['text']}")
            elif event["event"] == "failed":
                text.append(f"{name}: {event['text']}")
            else:
                outcome = event["event"]
        return outcome, text

    def stop(self) -> None:
        """End the chapters' processes; each ends its kernel before it goes."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def check(root: Path, names: list[str]) -> int:
    """Name the chapters that are not fresh; execute nothing."""
    states = {chapter.name: chapters.state(chapter) for chapter in chapters.find(root, names)}
    late = {name: why for name, (found, why) in states.items() if found != "fresh"}
    for name, why in late.items():
        print(f"stale: {name} ({why}): run `make notebooks`")
    return 1 if late else 0


def build(arguments: argparse.Namespace) -> int:
    overrides = {name: _value(text) for name, text in arguments.parameter}
    if overrides and not arguments.output:
        raise BookError(
            "-p needs --output DIR: notebooks/ holds only what the default parameters give"
        )
    wanted = chapters.find(arguments.root, arguments.names)
    for chapter in wanted:
        chapters.check_parameters(chapter, overrides)
    if not arguments.output:
        chapters.check_versions(arguments.root)
    builder = Builder(arguments.root, arguments.output, overrides, arguments.force)
    result = builder.run(wanted, arguments.jobs)
    parts = [f"{len(names)} {outcome}" for outcome, names in result.items() if names]
    builder.screen.say(f"chapters: {', '.join(parts) or 'none'}")
    if result["failed"]:
        print(f"failed: {', '.join(result['failed'])}; old notebooks kept", file=sys.stderr)
    return 1 if result["failed"] else 0


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _cores() -> int:
    """The cores that this process may use, in a container fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a number of processes, not {text!r}")
    return int(text)


def _folder(text: str) -> Path:
    return Path(text).resolve()


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m tools.chapters")
    command = main.add_subparsers(dest="command", required=True)
    build = command.add_parser("build", help="execute the chapters that are not fresh")
    build.add_argument("names", nargs="*", metavar="NAME", help="chapters (default: all)")
    build.add_argument("--force", action="store_true", help="execute fresh chapters too")
    build.add_argument("--check", action="store_true", help="only name those that are not fresh")
    build.add_argument(
        "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="set a parameter of the chapters; needs --output",
    )  # fmt: skip
    build.add_argument("--output", type=_folder, metavar="DIR", help="default: notebooks/")
    build.add_argument("--jobs", type=_count, default=_cores(), help="processes at once")
    build.add_argument("--root", type=_folder, default=chapters.ROOT, help=argparse.SUPPRESS)
    return main


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        if arguments.check:
            return check(arguments.root, arguments.names)
        return build(arguments)
    except BookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; old notebooks kept", file=sys.stderr)
        return 128 + signal.SIGINT
