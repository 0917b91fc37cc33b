"""What `import bnnbook` and its modules add to `import torch`, each in a fresh interpreter."""

import subprocess
import sys

from benchmarks.timing import row

CODE = "import time, torch; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
STATEMENTS = {
    "import bnnbook": "import bnnbook",
    "import of layers, optim, models, training": (
        "from bnnbook import binarize, layers, models, optim, data, probes, training"
    ),
}


def run(device, repeats: int) -> list[dict]:
    """Time the imports after torch; here, "ratio" is a time in seconds."""
    table = []
    for name, statement in STATEMENTS.items():
        command = [sys.executable, "-c", CODE.format(statement)]
        times = [
            float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            for _ in range(min(repeats, 5))
        ]
        table.append(row(f"{name}, seconds", min(times), 1.0, "<= 0.3", min(times) <= 0.3))
    return table
