"""Whether runs that share a device finish sooner: `bnnbook record` with `--jobs` 1, 2 and 4.

`benchmarks/replicas.py` measures the alternative, runs batched into the steps of one process.
"""

import tempfile
import time
from pathlib import Path

from benchmarks.timing import row
from bnnbook.recording import Job, work_through

RUNS, EPOCHS = 4, 40  # of the digits recipe: steps so small that launches bound them


def run(device, repeats: int) -> list[dict]:
    """Time four runs, 1, 2 and 4 at once; "ratio" compares with one after the other.

    The times include the start of each process (some seconds) and loading the data.
    """
    alone, table = seconds(1, device), []
    for at_once in (2, 4):
        took = seconds(at_once, device)
        table.append(row(f"{RUNS} runs, {at_once} at once", took, alone, "< 1", took < alone))
    return table


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
