"""Comparison of freshly executed notebooks with the committed ones, on fabricated notebooks."""

import base64
import io

import nbformat
import numpy as np
import pytest
from PIL import Image

from bnnbook import claims
from tools import compare

v4 = nbformat.v4


def picture(shade: int = 255, size: tuple[int, int] = (20, 30), changed: int = 0) -> str:
    """A grey PNG with `changed` black pixels, as a notebook stores it."""
    pixels = np.full((*size, 3), shade, dtype=np.uint8)
    pixels.reshape(-1, 3)[:changed] = 0
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def claim(name: str = "toy.claim", verdict: str = claims.REPRODUCED, value: float = 0.5) -> dict:
    measured = {"values": [value], "n": 1, "mean": value, "spread": None, "unit": "", "text": "x"}
    parts = {"statement": "s", "paper": "p", "source": None, "scale": "small", "hardware": "cpu"}
    return {"id": name, "measured": measured, "verdict": verdict, **parts}


def shown(**data) -> nbformat.NotebookNode:
    kinds = {"text": "text/plain", "png": "image/png", "claim": claims.MIME}
    return v4.new_output("display_data", data={kinds[name]: x for name, x in data.items()})


def cell(source: str, outputs: list, *tags: str) -> nbformat.NotebookNode:
    metadata = {"tags": list(tags)}
    return v4.new_code_cell(source, outputs=outputs, metadata=metadata, execution_count=1)


def notebook(**changes) -> nbformat.NotebookNode:
    """A chapter with a fact, a claim, an exact figure and a figure that depends on training."""
    stream = v4.new_output("stream", name="stdout", text=changes.get("fact", "3 flips\n"))
    cells = [
        cell("print(flips)", [stream], *changes.get("fact_tags", ["nbval-check-output"])),
        cell("check()", [shown(claim=c) for c in changes.get("claims", [claim()])]),
        cell("exact()", [shown(png=p) for p in changes.get("exact", [picture()])], "check-figure"),
        cell("trained()", [shown(png=p) for p in changes.get("trained", [picture()])]),
        cell(changes.get("code", "pass"), []),
    ]
    return v4.new_notebook(cells=cells)


def found(fresh: nbformat.NotebookNode, committed: nbformat.NotebookNode) -> str:
    return "\n".join(compare.differences(fresh, committed))


def test_equal_notebooks_have_no_differences():
    assert found(notebook(), notebook()) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fact": "4 flips\n"}, "cell 0: fact changed"),
        ({"fact": ""}, "cell 0: fact changed"),
        ({"claims": [claim(verdict=claims.NOT_REPRODUCED)]}, "toy.claim: not reproduced"),
        ({"claims": []}, "toy.claim: missing, committed: reproduced"),
        ({"claims": [claim(), claim("new")]}, "new: reproduced, committed: missing"),
        ({"claims": [claim(), claim()]}, "twice"),
        ({"exact": [picture(changed=10)]}, "cell 2: figure changed: RMS"),
        ({"exact": [picture(size=(20, 31))]}, "cell 2: figure of (20, 31) pixels"),
        ({"exact": []}, "cell 2: 0 images, committed 1"),
        ({"trained": []}, "cell 3: 0 images, committed 1"),
        ({"trained": [picture(), picture()]}, "cell 3: 2 images, committed 1"),
        ({"code": "changed"}, "the code cells differ"),
    ],
)
def test_each_change_is_found(changes, words):
    assert words in found(notebook(**changes), notebook())


@pytest.mark.parametrize(
    "changes",
    [
        {"claims": [claim(value=0.25)]},  # a number may differ, the verdict may not
        {"exact": [picture(shade=254)]},  # another machine's antialiasing
        {"trained": [picture(shade=0)]},
    ],
)
def test_what_another_machine_may_change_passes(changes):
    assert found(notebook(**changes), notebook()) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fact_tags": []}, "no cell is tagged nbval-check-output"),
        ({"fact": ""}, "prints nothing"),
        ({"claims": []}, "no claim is checked"),
        ({"exact": []}, "it draws nothing"),
    ],
)
def test_a_chapter_that_checks_nothing_is_refused(changes, words):
    assert words in found(notebook(**changes), notebook(**changes))


def test_rms_is_over_all_pixels_on_0_to_255():
    black, white = np.zeros((2, 2, 4), np.uint8), np.full((2, 2, 4), 255, np.uint8)
    assert compare.rms(black, white) == 255
    half = np.concatenate([black, white])
    assert compare.rms(half, np.zeros_like(half)) == pytest.approx(255 / np.sqrt(2))


@pytest.fixture
def folders(tmp_path):
    """Two folders, fresh and committed, each with the notebook of one chapter."""
    pair = tmp_path / "fresh", tmp_path / "committed"
    for folder in pair:
        folder.mkdir()
        nbformat.write(notebook(), folder / "toy.ipynb")
    return pair


def test_command_prints_a_table_and_succeeds(folders, capsys):
    assert compare.main([str(folder) for folder in folders]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split() == ["toy.ipynb", "1", "facts", "1", "claims", "1", "figures", "equal"]


def test_command_fails_on_a_difference(folders, capsys):
    nbformat.write(notebook(fact="4 flips\n"), folders[0] / "toy.ipynb")
    assert compare.main([str(folder) for folder in folders]) == 1
    assert "1 differences" in capsys.readouterr().out


@pytest.mark.parametrize("side", [0, 1])
def test_command_fails_on_a_missing_notebook(folders, side, capsys):
    (folders[side] / "toy.ipynb").unlink()
    assert compare.main([str(folder) for folder in folders]) == 1
    assert f"missing in {folders[side]}" in capsys.readouterr().out


def test_command_fails_on_nothing_to_compare(tmp_path, capsys):
    assert compare.main([str(tmp_path), str(tmp_path)]) == 1
    assert "no notebooks to compare" in capsys.readouterr().err
