"""Reduce what pip prints to signs of progress: `pip … | python -m tools.installing`."""

import re
import sys
from collections.abc import Iterable, Iterator

EVERY = 25
LARGE_MB = 100


def milestones(lines: Iterable[str]) -> Iterator[str]:
    """A line for every 25 packages and each large download; from an error on, everything."""
    packages, failed = 0, False
    for line in lines:
        failed = failed or bool(re.match(r"\s*(ERROR|error|Traceback)\b", line))
        size = re.match(r"\s*Downloading (\S+) \(([\d.]+) MB\)", line)
        if failed:
            yield line.rstrip()
        elif line.startswith(("Collecting ", "Requirement already satisfied")):
            packages += 1
            if packages % EVERY == 0:
                yield f"  {packages} packages found"
        elif size and float(size[2]) >= LARGE_MB:
            yield f"  downloading {size[1].rpartition('/')[2]} ({size[2]} MB)"
        elif line.startswith("Installing collected packages"):
            yield f"  unpacking {line.count(',') + 1}"
        elif line.startswith("Successfully installed"):
            yield f"  installed {len(line.split()) - 2}"


if __name__ == "__main__":
    for milestone in milestones(sys.stdin):
        print(milestone, flush=True)
