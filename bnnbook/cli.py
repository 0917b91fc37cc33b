"""The command line: ``bnnbook list · run · record · data``."""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from bnnbook import __version__

app = typer.Typer(
    help="Run the book's experiments, and manage their records and data sets.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip

Data = Annotated[
    Path | None,
    typer.Option("--root", "--data", help="Folder of the data sets (default: BNNBOOK_DATA)."),
]
LARGEST_SEED = 2**32 - 1  # NumPy's; torch takes more
Results = Annotated[
    Path | None, typer.Option(help="Folder of the records (default: BNNBOOK_RESULTS).")
]
Runs = Annotated[
    Path,
    typer.Option(callback=lambda path: path.expanduser(),
                 help="Folder for the checkpoints of unfinished runs."),
]  # fmt: skip
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[
    str | None,
    typer.Option(help="auto, float32, bfloat16 or float16 (default: BNNBOOK_PRECISION, or auto: "
                      "bfloat16 on a GPU that has it, float32 on a CPU)."),
]  # fmt: skip


def _show_version(wanted: bool) -> None:
    if wanted:
        import torch

        typer.echo(f"bnnbook {__version__} (torch {torch.__version__})")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True,
                     help="Show the versions of bnnbook and torch, and exit."),
    ] = False,
) -> None:  # fmt: skip
    """Accept the options that stand before a command."""


@app.command("list")
def list_experiments(results: Results = None) -> None:
    """List the experiments with their variants, their scales and their records."""
    from bnnbook import experiments, records

    wrong: list[Exception] = []
    for name in experiments.names():
        _, variants, recipes = experiments.find(name)
        known = name in records.experiments(results)
        have = records.read_all(name, results, wrong.append) if known else ()
        kinds = [f"{r.variant} seed {r.seed} ({r.shortened or r.scale})" for r in have]
        typer.echo(name)
        typer.echo(f"  variants: {', '.join(variants)}\n  scales: {', '.join(recipes)}")
        typer.echo(f"  records: {', '.join(kinds) or 'none'}")
    for error in wrong:
        typer.echo(f"bnnbook: {error}", err=True)
    if wrong:
        raise typer.Exit(1)


@app.command()
def run(
    experiment: Annotated[str, typer.Argument(help="A name from `bnnbook list`.")],
    variant: Annotated[list[str] | None, typer.Option(help="Repeatable (default: all).")] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(min=0, max=LARGEST_SEED, help="Repeatable (default: 0)."),
    ] = None,
    scale: Annotated[str, typer.Option(help="small (seconds) or full.")] = "small",
    epochs: Annotated[
        int | None, typer.Option(help="Shorten the recipe to this; the record says so.")
    ] = None,
    device: Device = "auto",
    precision: Precision = None,
    overwrite: Annotated[bool, typer.Option(help="Replace existing records.")] = False,
    data: Data = None,
    results: Results = None,
    runs: Runs = Path("runs"),
) -> None:
    """Run an experiment and record it; after Ctrl-C, the same command continues the run.

    A run that has a record is skipped, unless the record has fewer epochs: then it is replaced.
    Of a run that another experiment has recorded, the record is copied.
    Small-scale records go to the folder of --runs, unless --results or BNNBOOK_RESULTS names one.
    """
    from bnnbook import experiments, recording

    _use_data(data)
    _use_precision(precision)
    _, variants, recipes = experiments.find(experiment)
    _check_known("variant", variant or (), variants)
    _check_known("scale", [scale], recipes)
    if scale == "small" and results is None and not os.environ.get("BNNBOOK_RESULTS"):
        results = runs  # the package's own folder is for full-scale records, which chapters read
    if epochs is not None and epochs > (whole := recipes[scale].epochs):
        raise ValueError(f"--epochs shortens a recipe: that of {experiment} has {whole}")
    if not recording.is_shorter(experiment, scale, epochs):
        epochs = None
    for number in seed or [0]:
        for name in variant or variants:
            job = recording.Job(experiment, name, number, scale, epochs)
            if overwrite or not _is_recorded(job, device, results, runs):
                _run_one(job, device, results, runs)


@app.command()
def record(
    minutes: Annotated[
        float, typer.Option(help="Stop within this time; a later call continues.")
    ] = 60,
    only: Annotated[
        list[str] | None, typer.Option(help="An experiment or a paper; repeatable.")
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(min=0, max=LARGEST_SEED, help="Repeatable (default: 0, 1, 2)."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Shorten longer recipes to this; the records say so.")
    ] = None,
    scale: Annotated[str, typer.Option(help="full, or small for a trial.")] = "full",
    jobs: Annotated[int, typer.Option(help="Runs at once, each in its own process.")] = 1,
    device: Device = "auto",
    precision: Precision = None,
    show: Annotated[
        bool, typer.Option("--list", help="List the state of every run, and run nothing.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the records here instead of to --results.")
    ] = None,
    take: Annotated[
        Path | None, typer.Option("--import", help="Check this folder's records and import them.")
    ] = None,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="Minutes between two checkpoints.")
    ] = 1,
    data: Data = None,
    results: Results = None,
    runs: Runs = Path("runs"),
) -> None:
    """Run what has no record yet, or only a shortened one: the most valuable first, in --minutes.

    Unfinished runs keep a checkpoint in the folder of --runs, and the same command continues them
    to the same numbers. A run that several experiments share is made once, and its record copied.
    A run that fails does not stop the others.
    Small-scale records go to the folder of --runs, unless --results, --out or BNNBOOK_RESULTS
    names one.
    """
    from bnnbook import recording, records

    _use_data(data)
    _use_precision(precision)
    if take is not None:
        if show or out is not None or only or seed or epochs is not None:
            raise ValueError("--import takes a whole folder and does nothing else: leave out "
                             "--list, --out, --only, --seed and --epochs")  # fmt: skip
        typer.echo("\n".join(recording.merge(take, results)))
        return
    if scale == "small" and (out or results) is None and not os.environ.get("BNNBOOK_RESULTS"):
        results = runs  # as `run` does
    folders = [results] if out is None else [results, out]
    asked = recording.all_jobs(scale, only or (), seed or recording.SEEDS, epochs)
    wanted = recording.possible(asked, typer.echo)
    if show:
        _show_states(wanted, folders, runs, device)
        return
    _check_folder("--runs", runs)
    _check_folder("--results" if out is None else "--out", records.results_folder(out or results))
    missing = [j for j in wanted if not recording.state(j, folders, runs, device).is_done]
    outcome = recording.work_through(
        missing, seconds=60 * minutes, at_once=jobs, device=device, results=out or results,
        runs=runs, folders=folders, measured=_measured(device, folders),
        checkpoint_minutes=checkpoint_minutes, say=typer.echo,
    )  # fmt: skip
    _report(outcome)


def _report(outcome) -> None:
    """Say what failed and what is left; exit with 1 after a failure, with 130 after Ctrl-C."""
    reasons: dict[str, list] = {}
    for job, text in outcome.failed.items():
        reasons.setdefault(text.rstrip(), []).append(job)
    for text, jobs in reasons.items():  # a missing data set is one reason for many
        more = f" and {len(jobs) - 1} more" if len(jobs) > 1 else ""
        typer.echo(f"\n{jobs[0]}{more} failed:\n{text}", err=True)
    left = len(outcome.stopped) + len(outcome.waiting)
    typer.echo(f"{len(outcome.done)} recorded, {len(outcome.failed)} failed, {left} to do"
               f"{': the same command continues' if left else ''}")  # fmt: skip
    if outcome.interrupted:
        raise typer.Exit(130)
    if outcome.failed:
        raise typer.Exit(1)


def _measured(device: str, folders) -> dict:
    from bnnbook import recording

    return recording.seconds_an_epoch(recording.conditions(device), folders)


def _show_states(wanted, folders, runs: Path, device: str) -> None:
    """Print a line for each variant: the minutes per run, and the state of each seed."""
    from bnnbook import recording

    measured = _measured(device, folders)
    name, precision = recording.conditions(device)
    typer.echo(f"minutes per run on {name}, {precision}; – if no run like it was recorded there")
    lines: dict[tuple, list] = {}
    for job in wanted:
        lines.setdefault((job.experiment, job.variant), []).append(job)
    for (experiment, variant), jobs in lines.items():
        seconds = recording.estimate(jobs[0], measured)
        states = [recording.state(job, folders, runs, device) for job in jobs]
        words = [f"{job.seed}: {each.words}" for job, each in zip(jobs, states, strict=True)]
        minutes = "–" if seconds is None else f"{seconds / 60:.1f}"
        typer.echo(f"{minutes:>7}  {f'{experiment} {variant}':<46}  {', '.join(words)}")


@app.command("data")
def show_data(
    name: Annotated[
        str | None, typer.Argument(help="Load this set, downloading it if necessary.")
    ] = None,
    data: Data = None,
) -> None:
    """List the data sets that are here, or load one and print its size and SHA-256."""
    from bnnbook import data as sets

    _use_data(data)
    if name is None:
        typer.echo(f"known: {', '.join(sets.NAMES)}")
        typer.echo(f"NAME.npz under {sets.root_folder()}: {', '.join(sets.found()) or 'none'}")
        typer.echo(f"in torchvision's layout there: {', '.join(sets.found_in_layout()) or 'none'}")
        return
    loaded = sets.load(name)
    typer.echo(f"{loaded}\nsha256 {loaded.sha256}")


def _is_recorded(job, device: str, results, runs: Path) -> bool:
    """Whether a record makes a run unnecessary; say so, or that the run replaces the record.

    The record of the same run under another experiment's name is copied.
    """
    from bnnbook import recording, records

    how_far = recording.state(job, [results], runs, device)
    there = recording.read_record(job, results)
    if how_far.kind == "shared":
        record = recording.same_run(job, [results], device)
        typer.echo(recording.copy_record(job, record, results))
        return True
    if there is None:
        return False
    path = records.record_path(job.experiment, job.variant, job.seed, job.scale, results)
    short = f" ({there.shortened})" if there.shortened else ""
    if how_far.is_done:
        typer.echo(f"{path} is there already{short}; --overwrite replaces it")
        return True
    typer.echo(f"{path} is shortened{short}: this run replaces it")
    return False


def _check_folder(option: str, folder: Path) -> None:
    """Raise ValueError now, not after the training, if the folder of an option cannot be used."""
    from bnnbook import recording

    try:
        recording.check_folders(folder)
    except OSError as error:  # the system's words name neither the option nor a remedy
        words = f"{folder} cannot be used ({error.strerror}); name another folder"
        raise ValueError(f"{option}: {words if error.strerror else error}") from error


def _run_one(job, device, results, runs: Path) -> None:
    """Run a job in this process, and say how it begins and ends."""
    from bnnbook import recording, records

    checkpoint = job.checkpoint(runs, device)
    _check_folder("--runs", runs)
    _check_folder("--results", records.results_folder(results))
    try:
        with recording.lock(job, runs) as is_ours:
            if not is_ours:
                raise ValueError(f"{job}: another process is at work on it in {runs}; wait for it")
            goes_on = " continues" if checkpoint.exists() else ""
            typer.echo(f"{job} ({job.scale} scale){goes_on} ...")
            done, path = recording.run(job, device=device, results=results, runs=runs)
    except KeyboardInterrupt:
        where = f"{checkpoint} holds the run, the same command continues it"
        typer.echo(f"stopped; {where if checkpoint.exists() else 'nothing was saved'}", err=True)
        raise typer.Exit(130) from None
    typer.echo(recording.in_words(job, done, path))


def _check_known(what: str, names, known) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")


def _use_data(folder: Path | None) -> None:
    if folder is not None:
        os.environ["BNNBOOK_DATA"] = str(folder)


def _use_precision(name: str | None) -> None:
    """Let this process, and those that it starts, compute in this precision."""
    from bnnbook import training

    if name is not None:
        _check_known("precision", [name], training.PRECISIONS)
        os.environ["BNNBOOK_PRECISION"] = name


def main() -> None:
    """Run the command line; print an expected error as one line, without a traceback."""
    try:
        app()
    except (ValueError, ArithmeticError, RuntimeError, OSError) as error:
        if os.environ.get("BNNBOOK_DEBUG"):
            raise
        typer.echo(f"bnnbook: {error}", err=True)
        if not _is_refusal(error):
            typer.echo("(BNNBOOK_DEBUG=1 shows the traceback)", err=True)
        sys.exit(1)


def _is_refusal(error: Exception) -> bool:
    """Whether bnnbook itself refused what was asked for, so that its message says everything.

    A ValueError from elsewhere, torch for example, is a surprise that a traceback may explain.
    """
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    is_ours = frame.f_globals["__name__"].partition(".")[0] == "bnnbook"
    return is_ours and isinstance(error, (ValueError, NotADirectoryError))
