"""The command line: ``bnnbook list · run · record · data``."""

import os
import shutil
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Run the book's experiments, and look after their records and data sets.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip

RECORD_SEEDS = (0, 1, 2)

Data = Annotated[
    Path | None,
    typer.Option("--root", "--data", help="Folder of the data sets; else BNNBOOK_DATA."),
]
Results = Annotated[Path | None, typer.Option(help="Folder of records; else BNNBOOK_RESULTS.")]
Runs = Annotated[Path, typer.Option(help="Folder of the checkpoints of unfinished runs.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


@app.command("list")
def list_experiments(results: Results = None) -> None:
    """List the experiments, their variants and scales, and the records there are of them."""
    from bnnbook import experiments, records

    for name in experiments.names():
        _, variants, recipes = experiments.find(name)
        have = records.read_all(name, results) if name in records.experiments(results) else ()
        kinds = [f"{r.variant} seed {r.seed} ({r.shortened or r.scale})" for r in have]
        typer.echo(name)
        typer.echo(f"  variants: {', '.join(variants)}\n  scales: {', '.join(recipes)}")
        typer.echo(f"  records: {', '.join(kinds) or 'none'}")


@app.command()
def run(
    experiment: Annotated[str, typer.Argument(help="A name that `bnnbook list` shows.")],
    variant: Annotated[list[str] | None, typer.Option(help="Repeatable; default all.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Repeatable; default 0.")] = None,
    scale: Annotated[str, typer.Option(help="small (seconds) or full.")] = "small",
    epochs: Annotated[int | None, typer.Option(help="Shorten the recipe; recorded.")] = None,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace records that are there.")] = False,
    data: Data = None,
    results: Results = None,
    runs: Runs = Path("runs"),
) -> None:
    """Run an experiment and record it; interrupted with Ctrl-C, the same command continues.

    Records of small-scale runs go to the folder of --runs, unless another one is named.
    """
    from bnnbook import experiments, records

    _use_data(data)
    _, variants, recipes = experiments.find(experiment)
    _check_known("variant", variant or (), variants)
    _check_known("scale", [scale], recipes)
    if scale == "small" and results is None and not os.environ.get("BNNBOOK_RESULTS"):
        results = runs  # the package's own folder is for full-scale records, which chapters read
    for number in seed or [0]:
        for name in variant or variants:
            there = records.find(experiment, name, number, results, scale)
            if there and not overwrite:
                typer.echo(f"{there} is there already; --overwrite replaces it")
                continue
            _run_one(experiment, name, number, scale, epochs, device, results, runs)


@app.command()
def record(
    minutes: Annotated[float, typer.Option(help="Stop in time; a later call continues.")] = 60,
    device: Device = "auto",
    data: Data = None,
    results: Results = None,
    runs: Runs = Path("runs"),
) -> None:
    """Run the full-scale runs that are not recorded yet, or only in a shortened form."""
    from bnnbook import experiments

    _use_data(data)
    missing = [
        (name, variant, number)
        for name in experiments.names()
        for number in RECORD_SEEDS
        for variant in experiments.find(name)[1]
        if "full" in experiments.find(name)[2] and not _is_recorded(name, variant, number, results)
    ]
    failed = []
    with _interrupt_after(60 * minutes) as timer:
        for run_ in missing:
            try:
                _run_one(*run_, "full", None, device, results, runs)
            except ArithmeticError as error:  # one run that diverges does not stop the others
                typer.echo(f"failed: {error}", err=True)
                failed.append(run_)
            except typer.Exit:
                if not timer.finished.is_set():
                    raise
                typer.echo("the time is up; the same command continues")
                return
    if failed:
        raise typer.Exit(1)
    typer.echo("all full-scale runs are recorded")


@app.command("data")
def show_data(
    name: Annotated[str | None, typer.Argument(help="Load this set (downloads it).")] = None,
    data: Data = None,
) -> None:
    """List the data sets found, or load one and print its size and SHA-256."""
    from bnnbook import data as sets

    _use_data(data)
    if name is None:
        typer.echo(f"known: {', '.join(sets.NAMES)}")
        typer.echo(f"NAME.npz under {sets.root_folder()}: "
                   f"{', '.join(sets.found(sets.root_folder())) or 'none'}")  # fmt: skip
        return
    loaded = sets.load(name)
    typer.echo(f"{loaded}\nsha256 {loaded.sha256}")


def _run_one(experiment, variant, seed, scale, epochs, device, results, runs: Path) -> None:
    from bnnbook import experiments, records

    function, _, _ = experiments.find(experiment)
    # The number of epochs sets how fast the learning rate falls: another number is another run.
    length = "" if epochs is None else f"-{epochs}epochs"
    checkpoint = runs / f"{experiment}-{variant}-{scale}{length}-seed{seed}.pt"
    runs.mkdir(parents=True, exist_ok=True)  # a folder that cannot be had is an error right away
    what = f"{experiment} {variant} seed {seed} ({scale} scale)"
    typer.echo(f"{what}{' continues' if checkpoint.exists() else ''} ...")
    try:
        done = function(variant, seed=seed, scale=scale, epochs=epochs, device=device,
                        checkpoint=checkpoint)  # fmt: skip
    except KeyboardInterrupt:
        where = f"{checkpoint} holds the run, the same command continues it"
        typer.echo(f"stopped; {where if checkpoint.exists() else 'nothing was saved'}", err=True)
        raise typer.Exit(130) from None
    path = records.save(done, results, overwrite=True)
    if checkpoint.is_dir():  # an experiment of several trainings keeps one for each
        shutil.rmtree(checkpoint)
    checkpoint.unlink(missing_ok=True)
    typer.echo(f"{what}: test error {100 * done.metrics['test_error']:.2f} %, "
               f"{done.seconds:.0f} s on {done.environment['device']} -> {path}")  # fmt: skip


def _check_known(what: str, names, known) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")


def _is_recorded(experiment: str, variant: str, seed: int, results: Path | None) -> bool:
    from bnnbook import records

    path = records.find(experiment, variant, seed, results)
    return path is not None and records.read(path).shortened is None


def _use_data(folder: Path | None) -> None:
    if folder is not None:
        os.environ["BNNBOOK_DATA"] = str(folder)


@contextmanager
def _interrupt_after(seconds: float):
    """Send this process a Ctrl-C after so many seconds: the run in progress saves and stops."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()
    try:
        yield timer
    finally:
        timer.cancel()


def main() -> None:
    """Run the command line; expected errors are one line, not a traceback."""
    try:
        app()
    except (ValueError, ArithmeticError, RuntimeError, OSError) as error:
        if os.environ.get("BNNBOOK_DEBUG"):
            raise
        typer.echo(f"bnnbook: {error}", err=True)
        typer.echo("(BNNBOOK_DEBUG=1 shows the traceback)", err=True)
        sys.exit(1)
