"""The pipeline from a chapter's text to its notebook, on a toy book with a toy library."""

import base64
import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
from PIL import Image

from tools import build, chapters, execution

FRONT_MATTER = """---
kernelspec:
  display_name: Python 3
  language: python
  name: python3
accelerator: GPU
colab:
  gpuType: T4
  provenance: []
---

# Toy

A sentence.
"""

CELLS = [
    ("nbval-skip", 'import sys\n\nif "google.colab" in sys.modules:\n    %pip install nothing'),
    ("parameters", "seed: int = 3\nscale = 'small'"),
    ("nbval-check-output", "from bnnbook import constants\n\nprint(seed)\nconstants.answer()"),
    ("nbval-ignore-output", "import time\n\nprint(time.time())"),
    ("check-figure", "import bnnbook.plots\n\nfigure = bnnbook.plots.line()"),
]

LIBRARY = {
    "__init__.py": "",
    "constants.py": "def answer():\n    from .deeper import FACTOR\n\n    return 6 * FACTOR\n",
    "deeper.py": "FACTOR = 7\n",
    "plots.py": (
        "import matplotlib.pyplot as plt\n\nimport bnnbook.experiments.first as first\n\n\n"
        "def line():\n    plt.plot([1, 2, first.three()])\n"
    ),
    "bnnbook.mplstyle": "lines.linewidth: 2\n",
    "experiments/__init__.py": "",
    "experiments/first.py": "def three():\n    return 3\n",
    "experiments/second.py": "",
    "unreached.py": "",
    "results/first/seed0.json": "{}",
    "results/first.table/seed0.json": "{}",
    "results/second/seed0.json": "{}",
}


def write_chapter(root: Path, cells, name: str = "toy", text: str = FRONT_MATTER) -> Path:
    blocks = [f"```{{code-cell}} ipython3\n:tags: [{tag}]\n\n{code}\n```" for tag, code in cells]
    path = root / "book" / f"{name}.md"
    path.write_text("\n\n".join([text, *blocks]) + "\n", encoding="utf-8")
    return path


def run(root: Path, *arguments: str) -> int:
    return build.main(["build", "--root", str(root), *arguments])


def code_cells(path: Path):
    return chapters.code_cells(nbformat.read(path, as_version=4))


def leftovers(root: Path) -> list[Path]:
    return sorted(p for p in (root / "notebooks").iterdir() if p.suffix != ".ipynb")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A toy book in a folder with a space, executed once."""
    root = tmp_path_factory.mktemp("toy book")
    for name, text in LIBRARY.items():
        path = root / "bnnbook" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (root / "book").mkdir()
    (root / "book" / "intro.md").write_text("# Prose only\n", encoding="utf-8")
    write_chapter(root, CELLS)
    assert run(root) == 0
    return root


@pytest.fixture
def toy(built, tmp_path) -> Path:
    """A copy of the executed toy book, to be changed."""
    return Path(shutil.copytree(built, tmp_path / "toy book"))


@pytest.fixture
def no_kernel(monkeypatch):
    """Executing a chapter is an error."""

    def refuse(self, chapter):
        raise AssertionError(f"{chapter.name} would be executed")

    monkeypatch.setattr(build.Builder, "one", refuse)


def test_notebook_holds_outputs_and_no_trace_of_the_run(built):
    path = built / "notebooks" / "toy.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    install, parameters, fact, volatile, figure = chapters.code_cells(notebook)
    assert [c.execution_count for c in chapters.code_cells(notebook)] == [1, 2, 3, 4, 5]
    assert install.outputs == parameters.outputs == volatile.outputs == []
    assert fact.outputs[0].text == "3\n"
    assert fact.outputs[1].data["text/plain"] == "42"
    assert "image/png" in figure.outputs[0].data
    assert set(notebook.metadata) == {
        *("accelerator", "bnnbook", "colab", "kernelspec", "language_info"),
    }
    assert notebook.metadata.accelerator == "GPU"
    assert notebook.metadata.colab == {"gpuType": "T4", "provenance": []}
    assert notebook.metadata.bnnbook.parameters == {"seed": 3, "scale": "small"}
    assert set(notebook.metadata.bnnbook) == {"key", "parameters", "versions"}
    text = path.read_text(encoding="utf-8")
    assert not any(word in text for word in ("papermill", str(built), "injected", sys.version))


def test_second_execution_is_byte_identical(toy):
    path = toy / "notebooks" / "toy.ipynb"
    before = path.read_bytes()
    path.unlink()
    assert run(toy) == 0
    assert path.read_bytes() == before


def test_nothing_changed_writes_nothing(toy, no_kernel, capsys):
    path = toy / "notebooks" / "toy.ipynb"
    before = path.stat()
    assert run(toy) == 0
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert "1 fresh" in capsys.readouterr().out


def test_prose_and_captions_are_renewed_without_execution(toy, no_kernel, capsys):
    path = toy / "notebooks" / "toy.ipynb"
    old = code_cells(path)
    source = toy / "book" / "toy.md"
    text = source.read_text(encoding="utf-8").replace("A sentence.", "Another.\n\n+++\n\nMore.")
    text = text.replace(":tags: [check-figure]", ":tags: [check-figure, hide-input]")
    source.write_text(text, encoding="utf-8")
    assert run(toy, "--check") == 1
    assert "stale: toy (its text changed)" in capsys.readouterr().out
    assert run(toy) == 0
    assert "1 refreshed" in capsys.readouterr().out
    notebook = nbformat.read(path, as_version=4)
    assert "Another." in notebook.cells[0].source
    assert notebook.cells[1].source == "More."
    new = chapters.code_cells(notebook)
    assert [cell.outputs for cell in new] == [cell.outputs for cell in old]
    assert new[-1].metadata.tags == ["check-figure", "hide-input"]
    assert run(toy, "--check") == 0


STALE = "stale"
FRESH = "fresh"


@pytest.mark.parametrize(
    ("file", "found"),
    [
        ("bnnbook/__init__.py", STALE),
        ("bnnbook/constants.py", STALE),
        ("bnnbook/deeper.py", STALE),  # imported inside a function, relatively
        ("bnnbook/plots.py", STALE),
        ("bnnbook/bnnbook.mplstyle", STALE),
        ("bnnbook/experiments/__init__.py", STALE),
        ("bnnbook/experiments/first.py", STALE),
        ("bnnbook/results/first/seed0.json", STALE),
        ("bnnbook/results/first.table/seed0.json", STALE),
        ("bnnbook/results/first/seed1.json", STALE),
        ("bnnbook/unreached.py", FRESH),
        ("bnnbook/experiments/second.py", FRESH),
        ("bnnbook/results/second/seed0.json", FRESH),
        ("bnnbook/results/firstborn/seed0.json", FRESH),
    ],
)
def test_only_what_a_chapter_reaches_makes_it_stale(toy, file, found):
    path = toy / file
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write("# changed\n")
    assert chapters.state(chapters.Chapter(toy, "toy"))[0] == found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("print(seed)", "print(seed + 0)"),
        ("seed: int = 3", "seed: int = 4"),
        ("[nbval-ignore-output]", "[hide-input]"),
    ],
)
def test_code_parameters_and_tags_make_it_stale(toy, old, new):
    source = toy / "book" / "toy.md"
    text = source.read_text(encoding="utf-8")
    assert old in text
    source.write_text(text.replace(old, new), encoding="utf-8")
    assert chapters.state(chapters.Chapter(toy, "toy"))[0] == STALE


def test_locked_versions_make_it_stale(toy):
    chapter = chapters.Chapter(toy, "toy")
    lock = toy / "requirements.lock"
    lock.write_text("numpy==2.0.0\n    # via x\nother==1.0\n", encoding="utf-8")
    before = chapters.key(chapter)
    lock.write_text("numpy==2.0.0\nother==1.1\n", encoding="utf-8")
    assert chapters.key(chapter) == before
    with pytest.raises(chapters.BookError, match=r"but requirements\.lock says 2\.0\.0"):
        chapters.check_versions(toy)
    lock.write_text("numpy==2.0.1\nother==1.1\n", encoding="utf-8")
    assert chapters.key(chapter) != before


@pytest.mark.parametrize("damage", ["truncate", "outputs"])
def test_a_damaged_notebook_is_stale(toy, damage):
    path = toy / "notebooks" / "toy.ipynb"
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        notebook = nbformat.read(path, as_version=4)
        for cell in chapters.code_cells(notebook):
            cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, path)
    assert chapters.state(chapters.Chapter(toy, "toy"))[0] == STALE


def test_a_change_of_the_library_changes_the_outputs(toy, capsys):
    (toy / "bnnbook" / "deeper.py").write_text("FACTOR = 8\n", encoding="utf-8")
    assert run(toy) == 0
    assert "toy: to execute (the library" in capsys.readouterr().out
    fact = code_cells(toy / "notebooks" / "toy.ipynb")[2]
    assert fact.outputs[1].data["text/plain"] == "48"


def test_overridden_parameters_go_elsewhere(toy, capsys):
    path = toy / "notebooks" / "toy.ipynb"
    before = path.read_bytes()
    assert run(toy, "-p", "seed", "11") == 1
    assert "-p needs --output" in capsys.readouterr().err
    assert run(toy, "-p", "seed", "11", "--output", str(toy / "elsewhere")) == 0
    assert path.read_bytes() == before
    other = nbformat.read(toy / "elsewhere" / "toy.ipynb", as_version=4)
    assert other.metadata.bnnbook.parameters == {"seed": 11, "scale": "small"}
    assert "11\n" in [
        output.get("text") for c in chapters.code_cells(other) for output in c.outputs
    ]


def test_an_unknown_parameter_or_chapter_is_refused(toy, no_kernel, capsys):
    assert run(toy, "-p", "sede", "1", "--output", str(toy / "elsewhere")) == 1
    assert "unknown parameter: sede (known: seed, scale)" in capsys.readouterr().err
    assert run(toy, "tyo") == 1
    assert "unknown chapter: tyo (known: toy)" in capsys.readouterr().err


def test_code_that_does_not_parse_is_named(toy, no_kernel, capsys):
    (toy / "bnnbook" / "deeper.py").write_text("FACTOR = (\n", encoding="utf-8")
    assert run(toy) == 1
    assert "bnnbook/deeper.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("first = 1\nfirst / 0", "ZeroDivisionError: division by zero"),
        ("import sys\n_ = sys.stderr.write('a warning')", "output on stderr:\na warning"),
        ("object()", "an object's address"),
    ],
)
def test_a_failing_cell_is_named_and_the_old_notebook_stays(toy, capsys, code, reason):
    path = toy / "notebooks" / "toy.ipynb"
    before = path.read_bytes()
    source = write_chapter(toy, [*CELLS[1:3], ("hide-input", code)])
    assert run(toy) == 1
    printed = capsys.readouterr()
    line = source.read_text(encoding="utf-8").splitlines().index(code.splitlines()[0]) + 1
    first = code.splitlines()[0]
    assert f"toy: code cell 2 of 3 (book/toy.md:{line}): {first}" in printed.err
    assert reason in printed.err
    assert "failed: toy; old notebooks kept" in printed.err
    assert path.read_bytes() == before
    assert leftovers(toy) == []


def test_a_dead_kernel_is_a_failure(toy, capsys):
    before = (toy / "notebooks" / "toy.ipynb").read_bytes()
    write_chapter(toy, [("x", "import os\n\nos._exit(3)")])
    assert run(toy) == 1
    assert "code cell 0 of 1" in capsys.readouterr().err
    assert (toy / "notebooks" / "toy.ipynb").read_bytes() == before


def start(root: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tools.chapters", "build", "--root", str(root)],
        cwd=chapters.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path: Path, seconds: float = 60) -> str:
    end = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path} was never written"
        time.sleep(0.05)
    return path.read_text()


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_leaves_everything_as_it_was(toy, number):
    before = (toy / "notebooks" / "toy.ipynb").read_bytes()
    started = toy / "started"
    place = f"Path({str(started)!r})"
    tell = f"from pathlib import Path\nimport os\n_ = {place}.write_text(str(os.getpid()))"
    write_chapter(toy, [("x", tell), ("x", "import time\n\ntime.sleep(100)")])
    with start(toy) as process:
        kernel = int(wait_for(started))
        process.send_signal(number)
        process.communicate(timeout=120)  # a hang is what it must catch, not a busy machine
        assert process.returncode == 128 + number
    end = time.monotonic() + 30
    while is_running(kernel):
        assert time.monotonic() < end, "the kernel outlived the build"
        time.sleep(0.1)
    assert (toy / "notebooks" / "toy.ipynb").read_bytes() == before
    assert leftovers(toy) == []


def test_of_two_builds_at_once_one_waits_and_finds_it_fresh(toy):
    (toy / "bnnbook" / "deeper.py").write_text("FACTOR = 9\n", encoding="utf-8")
    with start(toy) as first, start(toy) as second:
        printed = [process.communicate(timeout=60)[0] for process in (first, second)]
        assert first.returncode == second.returncode == 0
    assert sorted("toy: executed in" in text for text in printed) == [False, True]
    waiting = next(text for text in printed if "toy: executed in" not in text)
    assert "another build is at work on it: waiting" in waiting
    assert "toy: fresh in" in waiting
    assert chapters.state(chapters.Chapter(toy, "toy"))[0] == FRESH


def test_a_full_disk_leaves_the_old_file(toy, monkeypatch):
    path = toy / "notebooks" / "toy.ipynb"
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        chapters.write_atomically(path, "new")
    assert path.read_bytes() == before
    assert leftovers(toy) == []


def test_the_readers_own_settings_do_not_reach_a_chapter(toy, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("BNNBOOK_DATA", "elsewhere")
    monkeypatch.setenv("BNNBOOK_RESULTS", "elsewhere")
    published = execution.environment(toy, published=True)
    assert published["OMP_NUM_THREADS"] == "1"
    assert "inline" in published["MPLBACKEND"]
    assert not {"BNNBOOK_DATA", "BNNBOOK_RESULTS"} & set(published)
    assert execution.environment(toy, published=False)["BNNBOOK_DATA"] == "elsewhere"
    assert published["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in {
        name for name in execution.environment(toy, published=False) if name not in os.environ
    }


def test_streams_are_joined_however_they_arrived():
    pieces = [nbformat.v4.new_output("stream", name="stdout", text=text) for text in "ab"]
    other = nbformat.v4.new_output("stream", name="stderr", text="c")
    assert [o.text for o in chapters._merged([*pieces, other])] == ["ab", "c"]


def encoded_png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def decoded_png(encoded):
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def shades(count):
    """A picture of two hues and 240 x 240 pixels: `count` shades, and each of them 1 lighter."""
    noise = np.random.default_rng(0).integers(0, 2, (240, 240))
    grid = np.linspace(0, 250, count // 2).round()[np.arange(240) * (count // 2) // 240]
    grey = np.broadcast_to(grid, (240, 240)) + noise
    return np.stack([grey, grey, np.where(np.arange(240)[:, None] < 120, grey, 251 - grey)], -1)


@pytest.mark.parametrize(("count", "colours"), [(80, 128), (240, 256)])
def test_figures_are_stored_with_as_few_colours_as_look_the_same(count, colours):
    pixels = shades(count)
    encoded = encoded_png(pixels)
    small = chapters._with_palette(encoded)
    stored = decoded_png(small)
    assert stored.mode == "P"
    assert colours / 2 < len(stored.getcolors()) <= colours
    assert len(small) < len(encoded)
    assert chapters.rms(np.asarray(stored.convert("RGB")), pixels) < 1
    assert chapters._with_palette(small) == small


def test_a_figure_of_many_colours_stays_as_drawn():
    many = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).repeat(4, 0).repeat(4, 1)
    assert chapters._with_palette(encoded_png(many)) == encoded_png(many)
    ramp = np.stack(np.broadcast_arrays(np.arange(120), np.arange(120)[:, None], 128), -1)
    assert chapters._with_palette(encoded_png(ramp)) == encoded_png(ramp)


def test_a_figure_that_rgb_does_not_hold_stays_as_drawn():
    veil = np.dstack([shades(80), np.full((240, 240), 254)])
    deep = io.BytesIO()
    Image.fromarray(np.arange(57600, dtype=np.uint16).reshape(240, 240)).save(deep, "png")
    for encoded in (encoded_png(veil), base64.b64encode(deep.getvalue()).decode() + "\n"):
        assert chapters._with_palette(encoded) == encoded
    solid = np.dstack([shades(80), np.full((240, 240), 255)])
    assert decoded_png(chapters._with_palette(encoded_png(solid))).mode == "P"


def test_a_palette_that_makes_the_file_larger_is_not_taken():
    ramp = np.broadcast_to(np.arange(120)[:, None, None], (120, 4, 3))
    encoded = encoded_png(ramp)
    few = io.BytesIO()
    decoded_png(encoded).quantize(128).save(few, "png", optimize=True)
    assert len(base64.b64encode(few.getvalue())) > len(encoded)
    assert chapters._with_palette(encoded) == encoded


def test_another_way_to_store_figures_makes_a_chapter_stale(toy, monkeypatch):
    (chapter,) = chapters.find(toy)
    before = chapters.key(chapter)
    for name, value in {"PALETTES": (64, 256), "PALETTE_RMS": 2.0}.items():
        with monkeypatch.context() as patch:
            patch.setattr(chapters, name, value)
            assert chapters.key(chapter) != before
    assert chapters.key(chapter) == before
