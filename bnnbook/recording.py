"""Run what has no record yet: the most valuable first, in parallel, within a given time.

Every run is a process of its own. If one fails or is killed, the others go on; several share a GPU
or the cores of a CPU. As they share nothing else, a run's numbers do not depend on how many others
run beside it, with one exception: on a CPU they also share the threads, and convolutions may round
differently with another number of threads, which the record names. Runs batched into one step
would round differently in any case (``benchmarks/replicas.py`` times such batches; on a CPU they
are slower than single runs, except for the smallest networks).
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path

import torch
from tqdm import tqdm

from bnnbook import checkpoints, data, experiments, graphs, records, training
from bnnbook.records import Record

SEEDS = (0, 1, 2)
GRACE = 20.0  # seconds before the end in which unfinished runs write their checkpoints
# Recipes that agree in these settings take about as long for an epoch.
LIKE = ("dataset", "network", "hidden", "widths", "blocks", "width", "experts", "batch_size")


@dataclass(frozen=True)
class Job:
    """One run to be recorded; ``epochs`` shortens its recipe, None leaves it as it is."""

    experiment: str
    variant: str
    seed: int
    scale: str = "full"
    epochs: int | None = None

    def __post_init__(self):
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {self.epochs}")

    def __str__(self) -> str:
        return f"{self.experiment} {self.variant} seed {self.seed}"

    @property
    def recipe(self):
        """The experiment's recipe at this scale, before the variant changes it."""
        return experiments.find(self.experiment).recipes[self.scale]

    @property
    def planned(self) -> int:
        """The number of epochs that its recipe declares, and its record: of each step, if any."""
        recipe = experiments.recipe(self.experiment, self.variant, self.scale, self.epochs)
        return recipe.epochs

    @property
    def file_name(self) -> str:
        """The stem of the names of this run's files in the folder of unfinished runs.

        One run of several experiments has one name.
        """
        same = experiments.same_runs(self.experiment, self.variant, self.scale)
        experiment, variant = min([(self.experiment, self.variant), *same])
        length = "" if self.epochs is None else f"-{self.epochs}epochs"
        return f"{experiment}-{variant}-{self.scale}{length}-seed{self.seed}"

    def checkpoint(self, runs: Path, device: str = "auto") -> Path:
        """Return the file or folder in which the unfinished run is kept.

        Its name has the number of epochs, if that was shortened, because the learning rates follow
        from it: another number is another run. So is a run on another kind of device or in another
        precision.
        """
        return runs / f"{self.file_name}{_way_of_computing(device)}.pt"


def _way_of_computing(device: str) -> str:
    """Return what sets checkpoints apart from those of a CPU in float32: "-cuda", for example."""
    chosen = training.choose_device(device)
    kind = "" if chosen.type == "cpu" else f"-{chosen.type}"
    is_usual = training.autocast_dtype(chosen) == training.usual_dtype(chosen)
    return kind if is_usual else f"{kind}-{training.precision(chosen)}"


def all_jobs(scale: str = "full", only: Sequence[str] = (), seeds: Sequence[int] = SEEDS,
             epochs: int | None = None) -> list[Job]:  # fmt: skip
    """Return the runs of all experiments, or of those in ``only``, the most valuable first.

    The first seed of everything comes before the second of anything; within a seed the order is
    that of `bnnbook.experiments.PRIORITY`. A paper's name in ``only``, such as "quist2023", stands
    for all its experiments. ``epochs`` shortens the recipes that have more. Raises ValueError for
    an unknown scale, for fewer epochs than one, and for a name in ``only`` that is unknown or has
    no experiment of this scale.
    """
    if scale not in records.SCALES:
        raise ValueError(f"unknown scale {scale!r}; known: {', '.join(records.SCALES)}")
    chosen = {each for name in only for each in _meant_by(name, scale)}
    named = [n for n in experiments.PRIORITY if not only or n in chosen]
    return [
        Job(name, variant, seed, scale, epochs if is_shorter(name, scale, epochs) else None)
        for seed in seeds
        for name in named
        if scale in experiments.find(name).recipes
        for variant in experiments.find(name).variants
    ]


def is_shorter(experiment: str, scale: str, epochs: int | None) -> bool:
    """Return whether this number of epochs, if there is one, shortens the experiment's recipe."""
    return epochs is not None and epochs < experiments.find(experiment).recipes[scale].epochs


def _meant_by(name: str, scale: str) -> list[str]:
    """Return the experiments of this scale that a name stands for: itself, or all of a paper."""
    of_paper = [each for each in experiments.PRIORITY if each.startswith(f"{name}.")]
    found = of_paper or [name]
    having = [each for each in found if scale in experiments.find(each).recipes]
    if not having:
        known = ", ".join(experiments.find(found[0]).recipes)
        raise ValueError(f"{name} has no {scale} scale; known: {known}")
    return having


def possible(jobs: Iterable[Job], say: Callable[[str], object]) -> list[Job]:
    """Return the jobs that have epochs enough for all their steps; ``say`` which have not."""
    reasons = {}
    for name, variant, scale, epochs in {
        (j.experiment, j.variant, j.scale, j.epochs) for j in jobs
    }:
        try:
            experiments.recipe(name, variant, scale, epochs)
        except ValueError as error:
            reasons[name, variant] = error
    for (name, variant), reason in sorted(reasons.items()):
        say(f"{name} {variant} is left out: {reason}")
    return [job for job in jobs if (job.experiment, job.variant) not in reasons]


# --- What there is -----------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """How far a run is, in words.

    ``kind`` is recorded, shared, shortened, partial or missing.
    """

    kind: str
    words: str

    @property
    def is_done(self) -> bool:
        """Whether the job has its record."""
        return self.kind == "recorded"


def state(job: Job, folders: Iterable, runs: Path, device: str = "auto") -> State:
    """Return how far a run is, by the records in ``folders`` and its checkpoint in ``runs``.

    A shortened record is as good as recorded if it has at least the epochs that the job asks for.
    A run that only another experiment has recorded (`same_run`) is "shared": the record is still
    to be copied. A checkpoint from another kind of device or in another precision does not count.
    """
    found = [r for folder in folders if (r := read_record(job, folder)) is not None]
    lengths = [length_of(r) for r in found if r.shortened is not None]
    if len(lengths) < len(found) or (job.epochs and max(lengths, default=0) >= job.planned):
        return State("recorded", "recorded")
    if other := same_run(job, folders, device):
        return State("shared", f"same run as {other.experiment} {other.variant}")
    checkpoint = job.checkpoint(runs, device)
    if checkpoint.is_dir():  # only the experiment knows how many trainings it will have
        epochs, _ = epochs_and_seconds(checkpoint)
        return State("partial", f"partial, {epochs} epochs of several trainings")
    if checkpoint.exists():
        return State("partial", f"partial, {epochs_done(checkpoint)} of {job.planned} epochs")
    if found:
        return State("shortened", str(found[0].shortened))
    return State("missing", "missing")


def read_record(job: Job, folder) -> Record | None:
    """Return the job's record in a folder, or None if there is none."""
    path = records.find(job.experiment, job.variant, job.seed, folder, job.scale)
    return None if path is None else records.read(path)


def same_run(job: Job, folders: Iterable, device: str = "auto") -> Record | None:
    """Return the record of the very same run that another experiment has in ``folders``, or None.

    It counts if it is as long as the job asks for and in the precision in which the job would
    compute; at full scale it must name its commit. Of several, it is the one that was begun last:
    later versions of the library may round differently.
    """
    same = experiments.same_runs(job.experiment, job.variant, job.scale)
    others = [replace(job, experiment=name, variant=variant) for name, variant in same]
    found = [read_record(other, folder) for other in others for folder in folders]
    serving = [r for r in found if r is not None and _serves(r, job, device)]
    return max(serving, key=lambda record: record.started or "", default=None)


def _serves(record: Record, job: Job, device: str) -> bool:
    is_as_long = length_of(record) == job.planned if job.epochs else record.shortened is None
    made_by = record.environment.get("commit"), record.environment.get("dirty")
    is_importable = job.scale != "full" or _is_repeatable(*made_by)
    precision = training.precision(training.choose_device(device))
    return is_as_long and is_importable and record.precision == precision


def copy_record(job: Job, record: Record, results: Path | None = None) -> str:
    """Write the record of the `same_run` as the job's own, and return a line about it."""
    own = replace(record, experiment=job.experiment, variant=job.variant)
    path = records.save(own, results, overwrite=True)
    return f"{job}: the run of {record.experiment} {record.variant}, its record copied -> {path}"


def length_of(record: Record) -> int:
    """Return the number of epochs that a record's recipe declares."""
    return int(record.recipe.get("epochs", len(record.history)))


def epochs_done(checkpoint: Path) -> int:
    """Return the completed epochs in a checkpoint; 0 if it is missing, damaged or a folder."""
    return epochs_and_seconds(checkpoint)[0] if checkpoint.is_file() else 0


def epochs_and_seconds(checkpoint: Path) -> tuple[int, float]:
    """Return the completed epochs in a checkpoint, or in all those of a folder, and their seconds.

    A damaged checkpoint counts as nothing.
    """
    if checkpoint.is_dir():
        try:
            each = [epochs_and_seconds(path) for path in checkpoint.rglob("*.pt")]
        except OSError:  # the run has just ended, and its folder is being removed
            return 0, 0.0
        return sum(epochs for epochs, _ in each), sum(seconds for _, seconds in each)
    try:
        # mmap: no weights are read, only the few numbers beside them
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        return state["epoch"], sum(row["seconds"] for row in state.get("rows", ()))
    except checkpoints.DAMAGE:
        return 0, 0.0


def conditions(device: str) -> tuple[str, str]:
    """Return what a run's speed depends on: the name of the chosen device, and the precision."""
    chosen = training.choose_device(device)
    return records.device_name(chosen), training.precision(chosen)


def seconds_an_epoch(here: tuple[str, str], folders: Iterable) -> dict[tuple[str, ...], float]:
    """Return how many seconds an epoch took in the records made on a device, in a precision.

    ``here`` is such a pair, as from `conditions`. The keys are (experiment, scale, variant); for
    variants without a record, (experiment, scale); and for experiments without one, the settings
    that their recipe shares with another's (`LIKE`).
    """
    found: dict[tuple[str, ...], float] = {}
    for folder in folders:
        for record in records.read_all(root=folder):
            if (record.environment.get("device"), record.precision) == here:
                _add_pace(found, record)
    return found


def _add_pace(measured: dict[tuple[str, ...], float], record: Record) -> None:
    """Note how long an epoch of a record took, under all keys of `seconds_an_epoch`.

    For the record's own experiment, that is the time of all its trainings per epoch of the recipe;
    another experiment has other trainings, so for it the time of a single epoch counts.
    """
    if record.seconds and record.history:
        key = record.experiment, record.scale
        for each in ((*key, record.variant), key):
            measured[each] = record.seconds / length_of(record)
        took = [row["seconds"] for row in record.history if "seconds" in row]
        measured[_alike(record.recipe)] = sum(took or [record.seconds]) / len(record.history)


def _alike(recipe: Mapping) -> tuple[str, ...]:
    """Return the key that a recipe shares with all recipes whose epochs take about as long."""
    return tuple(json.dumps(recipe.get(name) or None) for name in LIKE)


def estimate(job: Job, measured: Mapping, done: int = 0) -> float | None:
    """Return the seconds that a run will take after ``done`` epochs, judging by ``measured``.

    That is what `seconds_an_epoch` returns; None if nothing like the run is in it.
    """
    key = job.experiment, job.scale
    for each in ((*key, job.variant), key, _alike(vars(job.recipe))):
        if each in measured:
            return measured[each] * max(0, job.planned - done)
    return None


# --- One run -----------------------------------------------------------------------------------


def run(job: Job, *, device: str = "auto", results: Path | None = None, runs: Path = Path("runs"),
        progress: bool | None = None) -> tuple[Record, Path]:  # fmt: skip
    """Run one job, from its checkpoint if it has one; return its record and the record's path.

    The checkpoint is removed only after the record has been written.
    """
    function, _, _ = experiments.find(job.experiment)
    runs.mkdir(parents=True, exist_ok=True)
    checkpoint = job.checkpoint(runs, device)
    options = {} if progress is None else {"progress": progress}
    done = function(job.variant, seed=job.seed, scale=job.scale, epochs=job.epochs, device=device,
                    checkpoint=checkpoint, **options)  # fmt: skip
    path = records.save(done, results, overwrite=True)
    if checkpoint.is_dir():  # an experiment of several trainings keeps one for each
        shutil.rmtree(checkpoint)
    checkpoint.unlink(missing_ok=True)
    return done, path


def in_words(job: Job, done: Record, path: Path) -> str:
    """Return a line of text about a finished run."""
    short = f", {done.shortened}" if done.shortened else ""
    return (f"{job} ({done.scale} scale{short}): test error "
            f"{100 * done.metrics['test_error']:.2f} %, {done.seconds:.0f} s on "
            f"{done.made_on} -> {path}")  # fmt: skip


# --- Many runs ---------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How the jobs of one call of `work_through` ended."""

    done: list[Job] = field(default_factory=list)
    stopped: list[Job] = field(default_factory=list)  # can continue from a checkpoint
    failed: dict[Job, str] = field(default_factory=dict)  # with the traceback or the reason
    waiting: list[Job] = field(default_factory=list)  # not begun
    interrupted: bool = False


def work_through(jobs: Sequence[Job], *, seconds: float, at_once: int = 1, device: str = "auto",
                 results: Path | None = None, runs: Path = Path("runs"), folders: Sequence = (),
                 measured: dict | None = None, checkpoint_minutes: float | None = None,
                 say=print) -> Outcome:  # fmt: skip
    """Run the jobs in order, ``at_once`` in parallel, and stop before ``seconds`` are over.

    A run that cannot finish in the remaining time, judging by ``measured`` (see `estimate`) and by
    the runs finished meanwhile, is passed over as long as another one can; if none can, the first
    one goes as far as it gets. Runs that are unfinished `GRACE` seconds before the end (or a tenth
    of the time, if that is less) write their checkpoints, and so they do on Ctrl-C and SIGTERM. A
    run that another call is working on is left to that call. A run that several experiments share
    is made once: the others copy its record (`same_run`), also from one of the ``folders``. A run
    whose steps cannot be recorded as a CUDA graph starts anew without graphs, which are then
    not tried again in its experiment.
    If a data set cannot be loaded, all waiting runs on it count as failed.
    ``say`` is called with a line when a run starts and another when it ends.

    Raises ValueError unless ``at_once`` and ``seconds`` are positive, and OSError for a folder
    that cannot be written.
    """
    if at_once < 1:
        raise ValueError(f"at least one run at a time, not {at_once}")
    if not seconds > 0:  # nan is not
        raise ValueError(f"the time must be positive, not {seconds / 60:g} minutes")
    if checkpoint_minutes is not None and not checkpoint_minutes >= 0:
        raise ValueError(f"minutes between checkpoints: 0 or more, not {checkpoint_minutes:g}")
    check_folders(runs, records.results_folder(results))
    if any(job.scale == "full" for job in jobs):
        _warn_without_commit(say)
    crew = _Crew(device, results, runs, at_once, checkpoint_minutes, say, measured, folders)
    crew.outcome.waiting = list(jobs)
    end = time.monotonic() + seconds
    last = end - min(GRACE, seconds / 10)
    with _stops_noted() as stops, crew.bar:
        try:
            while (crew.outcome.waiting or crew.running) and time.monotonic() < last and not stops:
                crew.fill(last - time.monotonic())
                crew.collect(min(0.5, last - time.monotonic()))  # then a look at ``stops``
        finally:
            crew.outcome.interrupted = bool(stops)
            now = time.monotonic()
            crew.dismiss(end if now >= last else now + GRACE)
    return crew.outcome


def check_folders(*folders: Path) -> None:
    """Make the folders; raise OSError now, not after hours, for one that cannot be written."""
    for folder in folders:
        if folder.exists():
            _check_is_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written; name another folder")


def _check_is_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")


def _is_repeatable(commit: str | None, dirty: bool | None) -> bool:
    """Whether the commit is known, and the library known to be unchanged since."""
    return bool(commit) and dirty is False


def _warn_without_commit(say) -> None:
    """Warn, before hours of work, if its records could not be imported."""
    commit, dirty = records.git_state()
    if not _is_repeatable(commit, dirty):
        what = ("the library was changed since its commit: commit first" if commit else
                "the library's commit is not known: name it by BNNBOOK_COMMIT")  # fmt: skip
        say(f"warning: {what}, or --import will refuse these records")


class _Crew:
    """The processes at work."""

    def __init__(self, device, results, runs, at_once, checkpoint_minutes, say, measured=None,
                 folders=()):  # fmt: skip
        self.device, self.results, self.runs = device, results, runs
        self.folders = [results, *folders]
        self.at_once, self.say, self.measured = at_once, say, dict(measured or {})
        self.running: dict = {}  # pipe of a process -> (job, process)
        self.lacking: dict[str, str] = {}  # data set that cannot be loaded -> reason
        self.stepwise: set[str] = set()  # experiments that run without CUDA graphs
        self.outcome = Outcome()
        # torch counts the cores that this process may use, which can be fewer than there are
        threads = max(1, torch.get_num_threads() // at_once) if at_once > 1 else None
        self.settings = device, results, runs, threads, checkpoint_minutes, self.folders
        # a single run shows its own bar, and a terminal has room for only one
        show = at_once > 1 and sys.stderr.isatty()
        self.bar = tqdm(unit="run", disable=not show, leave=False)

    def fill(self, left: float) -> None:
        """Start jobs until ``at_once`` are running; ``left`` is the remaining time in seconds."""
        while len(self.running) < self.at_once:
            free = [job for job in self.outcome.waiting if self.is_free(job)]
            if not free:
                return
            job = next((j for j in free if self.remaining(j) <= left), free[0])
            self.outcome.waiting.remove(job)
            self.tell(f"{job} starts")
            self.start(job)

    def is_free(self, job: Job) -> bool:
        """Whether no running process is making the very same run for another experiment."""
        return job.file_name not in {each.file_name for each, _ in self.running.values()}

    def remaining(self, job: Job) -> float:
        """Return the seconds that a job will still take; 0 if they cannot be estimated."""
        with contextlib.suppress(records.RecordError, OSError):  # then it is not to be copied
            if same_run(job, self.folders, self.device):
                return 0.0
        checkpoint = job.checkpoint(self.runs, self.device)
        if checkpoint.is_dir():  # its epochs are those of several trainings
            _, seconds = epochs_and_seconds(checkpoint)
            return max(0.0, (estimate(job, self.measured) or 0) - seconds)
        return estimate(job, self.measured, epochs_done(checkpoint)) or 0

    def start(self, job: Job) -> None:
        """Start a job in a new process, spawned because a forked one cannot use CUDA."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        graph = job.experiment not in self.stepwise
        process = context.Process(target=_work, args=(job, theirs, *self.settings, graph))
        with _stops_held_back():
            process.start()
        theirs.close()
        self.running[ours] = job, process
        self.show()

    def collect(self, timeout: float) -> None:
        """Wait until a process reports or ``timeout`` is over, and note how its job ended."""
        for pipe in wait(list(self.running), max(0.0, timeout)):
            job, process = self.running.pop(pipe)
            try:
                kind, text = pipe.recv()
            except (EOFError, OSError):  # it died before or while it reported
                kind, text = "failed", ""
            process.join(5)
            process.kill()  # in case it has reported and yet does not end
            process.join()
            if not text and kind == "failed":
                text = f"the process died without a word (exit status {process.exitcode})"
            self.note(job, kind, text)

    def note(self, job: Job, kind: str, text: str) -> None:
        """File a job under its outcome, and say so."""
        if kind == "lacking":
            self.give_up(job, text)
        elif kind == "refused":
            self.stepwise.add(job.experiment)
            self.outcome.waiting.insert(0, job)
            self.tell(f"{job} starts anew without CUDA graphs: {text}")
            return
        elif kind == "failed":
            self.outcome.failed[job] = text
            last = text.strip().rpartition("\n")[2]
            self.tell(f"{job}: failed, {last}")
        else:
            getattr(self.outcome, kind).append(job)
            self.tell(text)
        if kind == "done":
            self.learn(job)
        self.bar.update()
        self.show()

    def give_up(self, job: Job, why: str) -> None:
        """File a job and all that wait for its data set as failed, and say so once for all."""
        name, waiting = job.recipe.dataset, self.outcome.waiting
        is_news = name not in self.lacking
        why = self.lacking.setdefault(name, why)
        same = [j for j in waiting if j.recipe.dataset == name]
        waiting[:] = [j for j in waiting if j not in same]
        self.outcome.failed |= dict.fromkeys([job, *same], why)
        if is_news:
            others = f" and {len(same)} more on {name}" if same else ""
            self.tell(f"{job}{others}: failed, {why}")

    def learn(self, job: Job) -> None:
        """Use the pace of a finished run to estimate those to come."""
        record = read_record(job, self.results)
        here = conditions(self.device)
        if record is not None and (record.environment.get("device"), record.precision) == here:
            _add_pace(self.measured, record)

    def tell(self, text: str) -> None:
        """Say a line, above the progress bar if there is one."""
        with contextlib.nullcontext() if self.bar.disable else tqdm.external_write_mode():
            self.say(text)

    def show(self) -> None:
        """Show the running jobs on the progress bar."""
        self.bar.total = self.bar.n + len(self.running) + len(self.outcome.waiting)
        self.bar.set_description(" · ".join(str(job) for job, _ in self.running.values()))

    def dismiss(self, end: float) -> None:
        """Ask the running processes to stop, collect their reports, kill those left at ``end``."""
        for _, process in self.running.values():
            process.terminate()
        while self.running and time.monotonic() < end:
            self.collect(end - time.monotonic())
        for job, process in self.running.values():
            process.kill()
            process.join()
            self.note(job, "stopped", f"{job}: killed, it did not stop in time")
        self.running.clear()


def _work(job, pipe, device, results, runs, threads, checkpoint_minutes, folders=(),
          graph=True) -> None:  # fmt: skip
    """Do a job in this process, and report how it ended."""
    if not graph:
        os.environ["BNNBOOK_GRAPHS"] = "0"
    try:
        _obey_the_parent_only()
        if threads is not None:
            torch.set_num_threads(threads)
        if checkpoint_minutes is not None:
            training.CHECKPOINT_MINUTES = checkpoint_minutes
        alone = threads is None and sys.stderr.isatty()
        report = _run_unless_another_does(job, device, results, runs, folders, alone)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # too late to stop: the record is there
    except KeyboardInterrupt:
        there = job.checkpoint(runs, device).exists()
        what = "its checkpoint continues it" if there else "nothing was saved yet"
        report = "stopped", f"{job}: stopped, {what}"
    except data.DataError as error:
        report = "lacking", str(error)
    except graphs.GraphError as error:  # CUDA may fail in this process, not in another
        report = ("refused", str(error)) if graph else ("failed", traceback.format_exc())
    except BaseException:  # whatever it is, the other runs go on
        report = "failed", traceback.format_exc()
    with contextlib.suppress(BrokenPipeError):  # the parent has died
        pipe.send(report)


def _run_unless_another_does(job, device, results, runs: Path, folders: Sequence,
                             progress: bool) -> tuple[str, str]:  # fmt: skip
    """Run a job, unless another process or experiment does or has; return how that ended."""
    runs.mkdir(parents=True, exist_ok=True)
    with lock(job, runs) as is_ours:
        if not is_ours:
            return "stopped", f"{job}: left to another process, which is at work on it"
        if state(job, [results], runs, device).is_done:
            return "done", f"{job}: recorded by another process"
        if record := same_run(job, folders, device):
            return "done", copy_record(job, record, results)
        _remove_parts(job, results, runs, device)
        done, path = run(job, device=device, results=results, runs=runs, progress=progress)
        return "done", in_words(job, done, path)


@contextlib.contextmanager
def lock(job: Job, runs: Path):
    """Hold the lock of a run, and yield whether it is ours; a process that dies releases it.

    There is one lock for all devices, precisions and lengths, because their records would be the
    same file.
    Where there are no such locks (Windows, some network file systems), it always counts as ours.
    """
    try:
        import fcntl
    except ImportError:
        yield True
        return
    path = runs / f"{replace(job, epochs=None).file_name}.pt.lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            yield True
            return
        if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
            yield False  # whoever held it before has just removed the file that we locked
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


def _remove_parts(job: Job, results: Path | None, runs: Path, device: str) -> None:
    """Remove the unfinished files of processes that were killed at this job."""
    checkpoint = job.checkpoint(runs, device)
    record = records.record_path(job.experiment, job.variant, job.seed, job.scale, results)
    for part in (*runs.glob(f"{checkpoint.name}.*.part"), *checkpoint.rglob("*.part"),
                 *records.parts_of(record)):  # fmt: skip
        part.unlink(missing_ok=True)


# --- Signals -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _stops_noted():
    """Yield a list that collects Ctrl-C and SIGTERM, which then interrupt nothing."""
    stops: list[int] = []
    with training.stops_handled(lambda number, frame: stops.append(number)):
        yield stops


@contextlib.contextmanager
def _stops_held_back():
    """Block Ctrl-C and SIGTERM in a process started here, until it unblocks them itself."""
    resource_tracker.ensure_running()  # else starting it would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, training.STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _obey_the_parent_only() -> None:
    """Turn SIGTERM, even a pending one, into a KeyboardInterrupt, and ignore Ctrl-C.

    Ctrl-C on a terminal reaches every process of the group. Only the parent shall react to it, by
    asking each process once to stop: a second signal would cut a checkpoint short.
    """
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_stop_without_parent, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, training.STOPS)


def _interrupt(number, frame) -> None:
    raise KeyboardInterrupt


def _stop_without_parent() -> None:
    """Stop this process, with a checkpoint, when its parent has died."""
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


# --- Records from elsewhere --------------------------------------------------------------------


def merge(source: Path, root: Path | None = None) -> list[str]:
    """Import the records of the folder ``source``, all or none; return a line for each file.

    A record is refused, and with it all the others, if it is damaged or was changed; if its
    experiment, variant or scale is unknown; if it is of full scale and names no commit, or a
    changed one; or if its data set has another SHA-256 than the one of that name in the existing
    records or in the same folder. A shortened record never replaces a longer one, nor does any
    record replace one of the same length. Ctrl-C waits until the files are written; if the import
    is killed between two files, repeating it writes the rest.

    Raises `records.RecordError` for a refused record and for a folder without records,
    NotADirectoryError if ``source`` is not a folder, and OSError for an unreadable file.
    """
    _check_is_folder(Path(source))
    paths = sorted(p for p in Path(source).rglob("*.json") if not p.name.startswith("."))
    if not paths:
        raise records.RecordError(f"no records under {source}")
    known = {r.dataset: (r.dataset_sha256, "those here") for r in records.read_all(root=root)}
    new: dict[Path, Record] = {}
    lines = []
    for path in paths:
        record = _checked(path, known)
        where = records.record_path(record.experiment, record.variant, record.seed, record.scale,
                                    root)  # fmt: skip
        there = new.get(where) or (records.read(where) if where.exists() else None)
        words = _comparison(record, there)
        lines.append(f"{where.relative_to(records.results_folder(root)).as_posix()}: {words}")
        if words != "kept, not shorter":
            new[where] = record
    with _stops_noted():
        _replace_all(new, root)
    return lines


def _checked(path: Path, known: dict) -> Record:
    """Return the record in a file; raise RecordError, and leave the file, if it is refused."""
    try:
        record = records.parse(path.read_text(encoding="utf-8"))
        _, variants, recipes = experiments.find(record.experiment)
        for what, name, names in (("variant", record.variant, variants),
                                  ("scale", record.scale, recipes)):  # fmt: skip
            if name not in names:
                raise ValueError(f"unknown {what} {name!r}; known: {', '.join(names)}")
        made_by = record.environment.get("commit"), record.environment.get("dirty")
        if record.scale == "full" and not _is_repeatable(*made_by):
            raise ValueError("it names no commit, or a changed one: nobody could repeat it")
        sha256, whose = known.setdefault(record.dataset, (record.dataset_sha256, path.name))
        if sha256 != record.dataset_sha256:
            raise ValueError(
                f"its data set {record.dataset} has SHA-256 {record.dataset_sha256[:12]}…, "
                f"not {sha256[:12]}… as {whose}: results on different data do not mix"
            )
    except (ValueError, RecursionError) as error:
        raise records.RecordError(f"{path}: {error}; nothing was imported") from error
    return record


def _comparison(record: Record, there: Record | None) -> str:
    """Return how a record compares with the one that is there, if any."""
    if there is None:
        return "new"
    is_longer = there.shortened is not None and (
        record.shortened is None or length_of(record) > length_of(there)
    )
    return f"replaces {there.shortened}" if is_longer else "kept, not shorter"


def _replace_all(new: dict[Path, Record], root: Path | None) -> None:
    """Write the records; if one cannot be written, restore the files that were there."""
    before = [(path, path.read_bytes() if path.exists() else None) for path in new]
    try:
        for record in new.values():
            records.save(record, root, overwrite=True)
    except BaseException:
        for path, content in before:
            if content is None:
                path.unlink(missing_ok=True)
            else:
                records.write_atomically(path, content.decode())
        raise
    for part in (part for path in new for part in records.parts_of(path)):
        part.unlink(missing_ok=True)  # of an import that was killed
