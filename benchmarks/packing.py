"""Whether runs that share a device get done sooner: whole ones, and steps beside each other.

Whole: `bnnbook record --jobs 1`, 2 and 4. Steps: those of the runs of `benchmarks/replicas.py`, in
so many processes at once. What replicas in one process do instead, that benchmark says.
"""

import contextlib
import multiprocessing
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.replicas import KINDS, Kind, again, alone, compared
from benchmarks.timing import row
from bnnbook.recording import Job, work_through

AT_ONCE = (2, 4)
RUNS, EPOCHS = 4, 40  # of the digits recipe: small networks in small steps, which launches bound
PACE = 0.25  # seconds of steps between two words to a process


def run(device, repeats: int) -> list[dict]:
    """Time runs and steps, some at once; "ratio" is to one after the other.

    The start of each process (some seconds) counts in a whole run, and so does loading the data.
    """
    whole, table = seconds(1, device), []
    for at_once in AT_ONCE:
        took = seconds(at_once, device)
        table.append(row(f"{RUNS} runs, {at_once} at once", took, whole, "< 1", took < whole))
    return table + steps(device, repeats, KINDS)


def seconds(at_once: int, device) -> float:
    """Return the wall time of four runs of the filter on digits."""
    jobs = [
        Job("quist2023.latent_parity", "filter", seed, "small", EPOCHS) for seed in range(RUNS)
    ]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        outcome = work_through(jobs, seconds=3600, at_once=at_once, device=str(device),
                               results=Path(folder), runs=Path(folder, "runs"),
                               say=lambda line: None)  # fmt: skip
        took = time.perf_counter() - began
    if len(outcome.done) < RUNS:
        raise RuntimeError("a run failed: " + "".join(outcome.failed.values()))
    return took


def steps(device: torch.device, repeats: int, kinds: dict[str, Kind]) -> list[dict]:
    """Time as many steps of each kind in several processes as in one alone."""
    table, threads = [], torch.get_num_threads()
    with crew(max(AT_ONCE), kinds, device) as pipes:
        for name, kind in kinds.items():
            first = partial(worked, pipes[:1], name)
            first(1, threads)  # slower than those that follow
            n = round(PACE / first(1, threads)) or 1
            for count in AT_ONCE:
                together = partial(worked, pipes[:count], name, n, max(1, threads // count))
                images = n * count * kind.batch
                found = compared(together, partial(first, n * count, threads), images, repeats)
                table.append({"what": f"{name}: {count} processes / alone", **found})
    return table


@contextlib.contextmanager
def crew(count: int, kinds: dict[str, Kind], device: torch.device):
    """Start processes with runs of their own, and end them; yields a pipe to each."""
    context, pipes, workers = multiprocessing.get_context("spawn"), [], []
    try:
        for seed in range(count):
            ours, theirs = context.Pipe()
            worker = context.Process(target=work, args=(theirs, kinds, seed, device), daemon=True)
            worker.start()
            theirs.close()  # so that a process that dies is noticed
            pipes.append(ours)
            workers.append(worker)
        for pipe in pipes:
            pipe.recv()  # it is ready
        yield pipes
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def work(pipe, kinds: dict[str, Kind], seed: int, device: torch.device) -> None:
    """Do, in a process, as many steps of a kind as the pipe says, again and again."""
    runs = {
        name: partial(alone(kind, kind.model(seed, device)), *kind.batches(seed, device)[0])
        for name, kind in kinds.items()
    }
    pipe.send(None)
    while True:
        name, count, threads = pipe.recv()
        torch.set_num_threads(threads)
        pipe.send(timing.seconds(partial(again, runs[name], count), device))


def worked(pipes: list, name: str, count: int, threads: int) -> float:
    """Return the seconds until each process has done so many steps."""
    began = time.perf_counter()
    for pipe in pipes:
        pipe.send((name, count, threads))
    for pipe in pipes:
        pipe.recv()
    return time.perf_counter() - began
