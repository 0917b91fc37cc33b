"""Print tables of timings, and keep them in one JSON file per device."""

import argparse
import importlib
import json
import re
import sys
import traceback
from pathlib import Path

import pandas
import torch

from bnnbook import records, training

FOLDER = Path(__file__).parent
NAMES = ("optimizers", "network", "loop", "probing", "importing", "buffers", "packing",
         "packed", "replicas", "recipes")  # fmt: skip


def measured(name: str, device: torch.device, repeats: int) -> list[dict]:
    """Run one benchmark module, print its table and return it."""
    table = importlib.import_module(f"benchmarks.{name}").run(device, repeats)
    print(
        f"\n{name}\n{pandas.DataFrame(table).to_string(index=False, float_format='{:.4g}'.format)}"
    )
    return table


def main(argv: list[str] | None = None) -> None:
    """Run the named benchmarks, or all, and write their tables beside the others in the file."""
    known = ", ".join(NAMES)
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {known}; default: all")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--repeats", type=int, default=20, help="timings of each function")
    parser.add_argument("--out", type=Path, default=FOLDER / "results", help="folder of the JSON")
    options = parser.parse_args(argv)
    unknown = set(options.names) - set(NAMES)
    if unknown:
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}; known: {known}")
    device = training.choose_device(options.device)
    hardware = records.device_name(device)
    path = options.out / (re.sub(r"\W+", "-", hardware).strip("-").lower() + ".json")
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    failed = []
    for name in options.names or NAMES:
        try:
            table = measured(name, device, options.repeats)
        except Exception:  # whatever it is, the others are measured
            traceback.print_exc()
            failed.append(name)
            continue
        results[name] = {
            "hardware": hardware, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "repeats": options.repeats, "table": table,
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if results:
        print(f"\nwritten to {path}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
