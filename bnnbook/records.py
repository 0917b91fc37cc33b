"""A finished run as a small JSON file with its provenance.

A record lies at ``root/EXPERIMENT/VARIANT-seedK.json`` when the run was at full scale, and at
``root/EXPERIMENT/small/VARIANT-seedK.json`` when it was at small scale. The root is the argument
``root``, else the environment variable ``BNNBOOK_RESULTS``, else the package's own ``results``.
"""

import base64
import binascii
import functools
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

FORMAT = 2  # format 2 added the checksum
SCALES = ("small", "full")
PACKAGE = Path(__file__).resolve().parent
SCALARS = (str, bool, int, float, type(None))  # of JSON
# Of arrays, with their byte order in the file.
DTYPES = {"uint8": "|u1", "float32": "<f4"}
# Of an experiment or a variant.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
RUN_KEYS = ["experiment", "variant", "seed", "scale"]
RUN_COLUMNS = [*RUN_KEYS, "shortened", "dataset", "device", "seconds", "commit"]


class RecordError(RuntimeError):
    """A record cannot be written or imported, or its file is damaged or was changed by hand."""


class _NewerFormatError(ValueError):
    """A record was written by a later version of this library."""


@dataclass(kw_only=True)
class Record:
    """One run: what was run, on what, and what came out.

    ``recipe`` holds every hyperparameter; ``shortened`` says in words how the run departs from the
    paper's recipe, or is None. ``history`` has one dict per epoch, ``metrics`` the final numbers,
    ``arrays`` small arrays as `encode_array` returns them; ``environment`` is what
    `environment` returns. ``seconds`` is wall time and ``started`` a UTC time in ISO 8601.
    Values are plain JSON values; a number that is not finite is refused when the record is saved.
    The file has one more key, ``checksum``: the SHA-256 of all the others.
    """

    format: int = FORMAT
    experiment: str
    variant: str
    seed: int
    scale: str
    shortened: str | None = None
    dataset: str
    dataset_sha256: str
    seconds: float | None = None
    started: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    arrays: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """The name of the dtype that training computed in."""
        return self.recipe.get("precision", "float32")

    @property
    def made_on(self) -> str:
        """The device's name, and the precision if that was not float32."""
        device = self.environment["device"]
        return device if self.precision == "float32" else f"{device} in {self.precision}"


# --- Where, and by what ------------------------------------------------------------------------


def results_folder(root: str | os.PathLike | None = None) -> Path:
    """Return the folder of the records: ``root``, else BNNBOOK_RESULTS, else the package's own."""
    return Path(root or os.environ.get("BNNBOOK_RESULTS") or PACKAGE / "results").expanduser()


def experiments(root: str | os.PathLike | None = None) -> list[str]:
    """Return the names of the experiments that have a folder of records."""
    folder = results_folder(root)
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def record_path(experiment: str, variant: str, seed: int, scale: str = "full", root=None) -> Path:
    """Return where the record of a run lies, whether it exists or not.

    Raises ValueError for an unknown scale and for a malformed name.
    """
    for what, name in (("experiment", experiment), ("variant", variant)):
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"{what} {name!r}: use letters, digits and . _ + = - only")
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; known: {', '.join(SCALES)}")
    folder = results_folder(root) / experiment
    return (folder / "small" if scale == "small" else folder) / f"{variant}-seed{int(seed)}.json"


def find(experiment: str, variant: str, seed: int, root=None, scale: str = "full") -> Path | None:
    """Return the file of a run's record, or None if there is none."""
    path = record_path(experiment, variant, seed, scale, root)
    return path if path.is_file() else None


@functools.cache
def cpu_model() -> str:
    """Return the processor's name, e.g. "AMD EPYC 7763 64-Core Processor"."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.processor() or platform.machine()


def device_name(device=None) -> str:
    """Return a device's name; by default the GPU's if this process has used one, else the CPU's.

    A plain ``"cpu"`` gives the processor's model.
    """
    torch = sys.modules.get("torch")
    if device is None:
        device = "cuda" if torch is not None and torch.cuda.is_initialized() else "cpu"
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return cpu_model() if str(device).startswith("cpu") else str(device)


def environment(device=None) -> dict[str, Any]:
    """Return what a result may depend on: device, threads, versions, and the library's commit.

    ``dirty`` is True if the library's files, other than its records, differ from that commit; both
    come from `git_state` and are None if the commit is not known.
    """
    import numpy
    import torch

    from . import __version__

    commit, dirty = git_state()
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "bnnbook": __version__,
        "commit": commit,
        "dirty": dirty,
    }


def git_state() -> tuple[str | None, bool | None]:
    """Return the commit of the library's git checkout, and whether the library differs from it.

    For an unchanged copy without the ``.git`` folder, the environment variable BNNBOOK_COMMIT can
    name the commit. Both are None if the commit is not known.
    """
    if named := os.environ.get("BNNBOOK_COMMIT"):
        return named, False
    # An installed copy may lie in another project's checkout: it counts only if git tracks it.
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None, None
    changed = _git("status", "--porcelain", "--", ".", ":(exclude)results")
    return commit, None if changed is None else bool(changed)


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(PACKAGE), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# --- Arrays ------------------------------------------------------------------------------------


def encode_array(array) -> dict[str, Any]:
    """Return a small uint8 or float32 array (or tensor) as a JSON value.

    Raises ValueError for another dtype and for values that are not finite.

    >>> import numpy as np
    >>> encode_array(np.array([[1, 2, 255]], dtype=np.uint8))
    {'shape': [1, 3], 'dtype': 'uint8', 'base64': 'AQL/'}
    """
    import numpy as np

    array = array.detach().cpu() if hasattr(array, "detach") else np.asarray(array)
    kind = getattr(array.dtype, "name", str(array.dtype).removeprefix("torch."))
    if kind not in DTYPES:
        raise ValueError(f"array of {kind}: convert it to {' or '.join(DTYPES)} first")
    array = np.asarray(array)
    if not np.isfinite(array).all():
        raise ValueError("the array holds values that are not finite")
    data = array.astype(DTYPES[array.dtype.name]).tobytes()
    shape, text = list(array.shape), base64.b64encode(data).decode()
    return {"shape": shape, "dtype": array.dtype.name, "base64": text}


def decode_array(value: dict[str, Any]):
    """Return the NumPy array that `encode_array` encoded; raise ValueError for any other value."""
    import numpy as np

    try:
        data = base64.b64decode(value["base64"], validate=True)
        array = np.frombuffer(data, DTYPES[value["dtype"]]).reshape(value["shape"])
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise ValueError(f"malformed array: {type(error).__name__}: {error}") from error
    return array.astype(value["dtype"])  # native byte order, and writable


# --- Write -------------------------------------------------------------------------------------


def save(
    record: Record, root: str | os.PathLike | None = None, *, overwrite: bool = False
) -> Path:
    """Write a record atomically and return its path.

    An empty ``environment`` is filled in. Numbers in the history are rounded to 6 significant
    digits. Raises ValueError, naming the key, for a value that is not finite or not JSON, and
    RecordError if the record exists (unless ``overwrite``) or the folder cannot be written.
    """
    path = record_path(record.experiment, record.variant, record.seed, record.scale, root)
    if not record.environment:
        record.environment = environment(record.recipe.get("device"))
    text = _dumps(record)
    if path.exists() and not overwrite:
        raise RecordError(f"{path} exists: pass overwrite=True to replace it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise RecordError(
            f"cannot write {path}: {error}; name another folder by --results, root= or "
            "BNNBOOK_RESULTS"
        ) from error
    return path


def write_atomically(path: Path, text: str) -> None:
    """Write a text file atomically: a reader finds the whole old text or the whole new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # as in `parts_of`
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def parts_of(path: Path) -> list[Path]:
    """Return the unfinished files of processes that are writing ``path`` or were killed at it."""
    return sorted(path.parent.glob(f".{path.name}.*.part"))


def _dumps(record: Record) -> str:
    """Return the record as JSON, one line per key of a dict and per column of the history."""
    lines = []
    for key in (f.name for f in fields(Record)):
        value = getattr(record, key)
        value = _columns(value) if key == "history" else _plain(value, key)
        if isinstance(value, dict) and value:
            names = value if key == "history" else sorted(value)
            rows = ",\n".join(f"  {json.dumps(k)}: {_compact(value[k])}" for k in names)
            lines.append(f'"{key}": {{\n{rows}\n}}')
        else:
            lines.append(f'"{key}": {_compact(value)}')
    total = checksum(json.loads("{" + ",".join(lines) + "}"))
    text = "{\n" + ",\n".join([*lines, f'"checksum": "{total}"']) + "\n}\n"
    parse(text)  # what cannot be read back is never written
    return text


def checksum(value: dict[str, Any]) -> str:
    """Return the SHA-256 of a record's keys and values, in whatever order and layout.

    The key ``checksum`` itself does not count.
    """
    others = {key: part for key, part in value.items() if key != "checksum"}
    return hashlib.sha256(_compact(others).encode()).hexdigest()


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)


def _plain(value: Any, key: str) -> Any:
    """Return ``value`` as plain JSON values; ``key`` names it in an error."""
    if isinstance(value, dict):
        bad = [k for k in value if not isinstance(k, str)]
        if bad:
            raise ValueError(f"{key}: the key {bad[0]!r} is not a string")
        return {k: _plain(v, f"{key}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{key}[{i}]") for i, v in enumerate(value)]
    if not isinstance(value, SCALARS):
        if getattr(value, "ndim", None) != 0:
            raise ValueError(f"{key}: a {type(value).__name__} is not a JSON value")
        kind, value = type(value).__name__, value.item()  # a NumPy or torch scalar
        if not isinstance(value, SCALARS):
            raise ValueError(f"{key}: a {kind} is not a JSON value")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{key} is {value}: a record holds finite numbers only")
        return float(value)
    return value


def _columns(history: list[dict[str, Any]]) -> dict[str, list]:
    """Turn rows into columns, which take a third of the space; a missing value becomes null."""
    wrong = [i for i, row in enumerate(history) if not isinstance(row, dict)]
    if wrong:
        raise ValueError(f"history[{wrong[0]}] is no dict, a row by its columns' names")
    rows = [_plain(row, f"history[{i}]") for i, row in enumerate(history)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [_six_digits(row.get(name)) for row in rows] for name in names}


def _six_digits(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


# --- Read --------------------------------------------------------------------------------------


def read(path: str | os.PathLike) -> Record:
    """Read one record.

    Raises RecordError for a damaged file, which is moved aside to NAME.json.corrupt, and for a
    record of a later format or under the name of another run, which stays where it is; and OSError
    for an unreadable file.
    """
    path = Path(path)
    try:
        record = parse(path.read_text(encoding="utf-8"))
    except _NewerFormatError as error:  # not damaged: it stays where it is
        raise RecordError(f"{path}: {error}; install the newest bnnbook") from error
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
        raise RecordError(f"{path} is damaged: {error}; {_move_aside(path)}") from error
    own = record_path(record.experiment, record.variant, record.seed, record.scale)
    if not path.absolute().match(str(own.relative_to(results_folder()))):
        raise RecordError(f"{path} holds the record of another run, whose file is {own.name} in "
                          f"{own.parent.name}: move it there, or remove it")  # fmt: skip
    return record


def unused_name(path: Path) -> Path:
    """Return NAME.corrupt, or with a number if there is such a file, for a damaged file."""
    aside, n = path.with_name(f"{path.name}.corrupt"), 1
    while aside.exists():
        n += 1
        aside = path.with_name(f"{path.name}.corrupt-{n}")
    return aside


def _move_aside(path: Path) -> str:
    aside = unused_name(path)
    try:
        path.rename(aside)
    except OSError as error:
        return f"it could not be moved to {aside} ({error})"
    return f"moved aside to {aside}"


def parse(text: str) -> Record:
    """Return the record in the text of a file; raise ValueError, saying what is wrong with it."""
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    if "format" not in value:
        raise ValueError("it is not a record of bnnbook")
    if type(value.get("format")) is int and value["format"] > FORMAT:
        raise _NewerFormatError(f"its format is {value['format']}, this version reads {FORMAT}")
    if value.get("format") != FORMAT:
        raise ValueError(f"its format is {value.get('format')!r}, this version reads {FORMAT}")
    names = [f.name for f in fields(Record)]
    written = value.pop("checksum", None)
    for what, wrong in (("misses", set(names) - set(value)), ("has", set(value) - set(names))):
        if wrong:
            raise ValueError(f"it {what} the {'un' * (what == 'has')}known keys {sorted(wrong)}")
    for name in names:
        _check_type(name, value[name])
    record_path(value["experiment"], value["variant"], value["seed"], value["scale"])
    rows = _rows(value["history"])
    if written != checksum(value):
        raise ValueError("its checksum does not fit: it was changed after it was written")
    return Record(**value | {"history": rows})


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds the number {text}")
    return value


def _check_type(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` has the type that belongs to the record's key ``name``."""
    types = {
        "format": int, "seed": int, "seconds": (int, float, type(None)),
        "shortened": (str, type(None)), "started": (str, type(None)),
        **dict.fromkeys(["experiment", "variant", "scale", "dataset", "dataset_sha256"], str),
        **dict.fromkeys(["environment", "recipe", "metrics", "history", "arrays"], dict),
    }  # fmt: skip
    if isinstance(value, bool) or not isinstance(value, types[name]):
        raise ValueError(f"{name} is of type {type(value).__name__}")
    if name == "metrics":
        for key, number in value.items():
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise ValueError(f"metrics.{key} is not a number: {number!r}")
    if name == "arrays":
        for array in value.values():
            decode_array(array)


def _rows(columns: dict[str, list]) -> list[dict[str, Any]]:
    if not all(isinstance(column, list) for column in columns.values()):
        raise ValueError("a column of the history is not a list")
    if len({len(column) for column in columns.values()}) > 1:
        raise ValueError("the columns of the history differ in length")
    rows = zip(*columns.values(), strict=True)
    return [{k: v for k, v in zip(columns, row, strict=True) if v is not None} for row in rows]


def read_all(
    experiment: str | None = None,
    root: str | os.PathLike | None = None,
    on_error: Callable[[Exception], object] | None = None,
) -> Iterator[Record]:
    """Yield all records, or those of one experiment, by experiment, scale, variant and seed.

    A file that cannot be read raises RecordError or OSError (see `read`); ``on_error``, if given,
    is called with that error instead, and the other records are still yielded. Raises ValueError,
    listing the known ones, for an experiment without records.
    """
    known = experiments(root)
    if experiment is not None and experiment not in known:
        listed = ", ".join(known) or "none"
        raise ValueError(
            f"no records of experiment {experiment!r} under {results_folder(root)}; "
            f"known: {listed}"
        )
    for name in known if experiment is None else [experiment]:
        folder = results_folder(root) / name
        paths = [path for where in (folder, folder / "small") for path in where.glob("*.json")]
        found = _read_each(sorted(paths), on_error)
        yield from sorted(found, key=lambda r: (r.scale, r.variant, r.seed))


def _read_each(paths: Iterable[Path], on_error: Callable | None) -> Iterator[Record]:
    for path in paths:
        try:
            yield read(path)
        except (RecordError, OSError) as error:
            if on_error is None:
                raise
            on_error(error)


def distinct(runs: Iterable[Record]) -> list[Record]:
    """Return the runs, each once: some are a record of several experiments.

    Copies differ in the names of the experiment and the variant only.
    """
    found: dict[str, Record] = {}
    for r in runs:
        found.setdefault(_compact([r.seed, r.recipe, r.started, r.seconds, r.metrics]), r)
    return list(found.values())


def load(experiment: str | None = None, root: str | os.PathLike | None = None):
    """Return the records as a pandas DataFrame, one row per run.

    Columns: experiment, variant, seed, scale, shortened, dataset, device, seconds, commit, then
    ``recipe.X`` and ``metrics.Y``. Without records the frame is empty and has the first nine.
    Raises ValueError, listing the known ones, for an experiment without records.
    """
    import pandas as pd

    rows = []
    for r in read_all(experiment, root):
        flat = vars(r) | {key: r.environment.get(key) for key in ("device", "commit")}
        row = {name: flat[name] for name in RUN_COLUMNS}
        row |= {f"recipe.{k}": v for k, v in r.recipe.items()}
        rows.append(row | {f"metrics.{k}": v for k, v in r.metrics.items()})
    return pd.DataFrame(rows, columns=None if rows else RUN_COLUMNS)


def histories(experiment: str | None = None, root: str | os.PathLike | None = None):
    """Return the histories as a tidy pandas DataFrame, one row per epoch of a run.

    Columns: experiment, variant, seed, scale, then those of the history. Raises ValueError as
    `load` does.
    """
    import pandas as pd

    rows = [
        {key: getattr(r, key) for key in RUN_KEYS} | row
        for r in read_all(experiment, root)
        for row in r.history
    ]
    return pd.DataFrame(rows, columns=None if rows else RUN_KEYS)
