import doctest
import json
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup

from bnnbook import claims, records

MIME = "application/vnd.bnnbook.claim+json"


@pytest.fixture(autouse=True)
def fresh():
    claims.reset()
    yield
    claims.reset()


def check(id="toy.claim", statement="A statement.", **changes):
    values = {"paper": "1.29 %", "measured": [1.0, 2.0, 3.0], "holds": True, "unit": "%"}
    return claims.check(id, statement, **values | changes)


def test_doctests():
    result = doctest.testmod(claims)
    assert result.attempted >= 2
    assert result.failed == 0


def save(root, variant, error, seed=0, epochs=4, device="a GPU", precision="float32",
         **changes):  # fmt: skip
    values = {
        "experiment": "toy.sweep", "variant": variant, "seed": seed, "scale": "full",
        "shortened": None if epochs == 4 else f"{epochs} of 4 epochs", "dataset": "digits",
        "dataset_sha256": "0" * 64, "seconds": 1.0, "environment": {"device": device},
        "recipe": {"epochs": epochs, "precision": precision}, "metrics": {"test_error": error},
    }  # fmt: skip
    records.save(records.Record(**values | changes), root)


def check_recorded(root, **changes):
    values = {"variants": ["sgd", "adam"], "above": 1.0, "paper": "2 points", "unit": "points"}
    return claims.check_recorded(
        "toy.sweep", "Adam is better by a point.", "toy.sweep", root=root,
        value=lambda r: 100 * (r["sgd"].metrics["test_error"] - r["adam"].metrics["test_error"]),
        **values | changes,
    )  # fmt: skip


# --- Verdicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("holds", "verdict"),
    [
        (True, "reproduced"),
        (False, "not reproduced"),
        (np.bool_(True), "reproduced"),
        (np.bool_(False), "not reproduced"),
        (torch.tensor(False), "not reproduced"),
    ],
)
def test_verdict_follows_holds(holds, verdict):
    claim = check(holds=holds)
    assert claim.verdict == verdict
    assert claims.verdicts() == {"toy.claim": verdict}


def test_an_open_claim():
    claim = claims.check("toy.open", "Needs a GPU.", paper="10 %", scale="full")
    assert claim.verdict == "only at full scale, not yet recorded"
    assert claim.hardware is None
    assert claim.measured == {
        "values": [], "n": 0, "mean": None, "spread": None, "unit": "", "text": ""
    }  # fmt: skip


@pytest.mark.parametrize("holds", [1, 0, "yes", np.array([True]), np.array([True, False]), 1.0])
def test_holds_must_be_a_truth_value(holds):
    with pytest.raises(ValueError, match=r"toy.claim: holds must be True, False or None"):
        check(holds=holds)


def test_no_verdict_without_measurement_and_no_measurement_without_verdict():
    with pytest.raises(ValueError, match="needs a verdict"):
        check(holds=None)
    for holds in (True, False):
        with pytest.raises(ValueError, match="needs a verdict"):
            check(measured=None, holds=holds)
    assert claims.verdicts() == {}


# --- What was measured -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, iter])
def test_runs_have_mean_spread_and_n(kind):
    values = [1.25, 2.0, 2.5]
    measured = check(measured=kind(values)).measured
    assert measured["values"] == values
    assert measured["n"] == 3
    assert measured["mean"] == pytest.approx(statistics.fmean(values))
    assert measured["spread"] == pytest.approx(np.std(values, ddof=1))
    assert measured["unit"] == "%"
    assert measured["text"] == "1.92 ± 0.63 % (n = 3)"


@pytest.mark.parametrize("one", [0.987654, [0.987654], np.float64(0.987654)])
def test_one_run_has_no_spread(one):
    measured = check(measured=one, unit="").measured
    assert measured["n"] == 1
    assert measured["spread"] is None
    assert measured["text"] == "0.988 (n = 1)"


def test_a_count_is_shown_in_full():
    assert check(measured=60965224, unit="").measured["text"] == "60965224 (n = 1)"


def test_words_are_shown_as_they_are():
    measured = check(measured="the same order").measured
    assert measured["text"] == "the same order"
    assert measured["values"] == []
    assert measured["n"] is None


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ([], "measured is empty"),
        ([1.0, float("nan")], "measured holds nan"),
        (float("inf"), "measured holds inf"),
        (np.array([1.0, np.nan]), "measured holds nan"),
        ([1.0, "2"], "which is not a number"),
        ([True], "which is not a number"),
        ([None], "which is not a number"),
        ({"a": 1.0}, "must be numbers or text, not dict"),
        (b"1", "must be numbers or text, not bytes"),
        ([[1.0], [2.0]], "which is not a number"),
    ],
)
def test_measurements_that_are_none(measured, message):
    with pytest.raises(ValueError, match=message):
        check(measured=measured)
    assert claims.verdicts() == {}


@pytest.mark.parametrize(
    ("mean", "spread", "text"),
    [
        (98.765, 0.123, "98.8 ± 0.1"),
        (0.98765, 0.00123, "0.988 ± 0.001"),
        (0.98765, 0.00012, "0.988 ± 0.0001"),
        (0.5, 0.0, "0.500 ± 0.000"),
        (0.0, 0.0, "0.00 ± 0.00"),
        (0.0, 0.0321, "0.0000 ± 0.0321"),
        (-1.234, None, "−1.23"),
        (123.4, 5.67, "123 ± 6"),
        (12345.6, 789.1, "1.23e+04 ± 7.9e+02"),
        (1.5e-9, None, "1.5e−09"),
        (1, None, "1.00"),
        (0.0001, 0.5, "0.000 ± 0.500"),
        (-0.0001, 0.5, "0.000 ± 0.500"),  # no −0.000
    ],
)
def test_three_digits(mean, spread, text):
    assert claims.three_digits(mean, spread) == text


# --- Identity ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "id", ["binaryconnect.table1.sgd", "a", "a-b.c3", "expert-bnn.figure-4", "1bit.x"]
)
def test_good_ids(id):
    assert check(id).id == id


@pytest.mark.parametrize(
    "id", ["", "A", "a b", "a..b", ".a", "a.", "a_b", "ä", "a/b", "a.-b", "a\n", None, 3]
)
def test_malformed_ids(id):
    with pytest.raises(ValueError, match="malformed id"):
        check(id)


def test_an_id_belongs_to_one_claim():
    check()
    with pytest.raises(ValueError, match=r"toy.claim is already .*'A statement.'"):
        check(statement="Another statement.")
    with pytest.raises(ValueError, match="already"):
        check(paper="2 %")
    assert claims.verdicts() == {"toy.claim": "reproduced"}
    check(measured=[9.0], holds=False)  # the cell was run again with other parameters
    assert claims.verdicts() == {"toy.claim": "not reproduced"}


def test_the_ledger_keeps_the_order_and_can_be_emptied():
    for id in ("b", "a", "c"):
        check(id)
    assert list(claims.verdicts()) == ["b", "a", "c"]
    claims.verdicts().clear()  # a copy
    assert len(claims.verdicts()) == 3
    claims.reset()
    assert claims.verdicts() == {}
    check("b", statement="Now another one.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"statement": " "}, "statement is empty"),
        ({"statement": None}, "statement is empty"),
        ({"paper": 1.29}, "paper must be text, not 1.29"),
        ({"source": 3}, "source must be text"),
        ({"hardware": 3}, "hardware must be text"),
        ({"scale": "medium"}, "unknown scale 'medium'; known: small, full"),
    ],
)
def test_bad_texts_and_scale(changes, message):
    with pytest.raises(ValueError, match=message):
        check(**changes)


def test_hardware_is_this_machine_at_small_scale_and_must_be_said_at_full():
    if not torch.cuda.is_initialized():
        assert check().hardware == records.cpu_model()
    assert check(hardware="Abacus").hardware == "Abacus"
    with pytest.raises(ValueError, match="on what hardware"):
        check(scale="full")
    assert check(scale="full", hardware="one H100").hardware == "one H100"


# --- Display -----------------------------------------------------------------------------------


def test_a_claim_cannot_be_changed():
    with pytest.raises(AttributeError):
        check().verdict = "reproduced"


def test_mime_bundle():
    claim = check(hardware="Abacus", source="table 2")
    bundle = claim._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", MIME}
    value = json.loads(json.dumps(bundle[MIME], allow_nan=False))
    assert value == {
        "id": "toy.claim",
        "statement": "A statement.",
        "paper": "1.29 %",
        "source": "table 2",
        "measured": {
            "values": [1.0, 2.0, 3.0], "n": 3, "mean": 2.0, "spread": 1.0, "unit": "%",
            "text": "2.00 ± 1.00 % (n = 3)",
        },
        "scale": "small",
        "hardware": "Abacus",
        "verdict": "reproduced",
    }  # fmt: skip
    for word in ("toy.claim", "reproduced", "A statement.", "1.29 %", "± 1.00", "Abacus"):
        assert word in bundle["text/plain"]
    assert claim._repr_mimebundle_(include=None, exclude=None) == bundle


def test_the_same_check_gives_the_same_bytes():
    one = json.dumps(check()._repr_mimebundle_())
    claims.reset()
    assert json.dumps(check()._repr_mimebundle_()) == one


@pytest.mark.parametrize(
    ("holds", "badge"), [(True, "reproduced"), (False, "not-reproduced"), (None, "open")]
)
def test_the_html_is_a_table_with_one_row(holds, badge):
    measured = None if holds is None else [1.0, 2.0]
    claim = check(holds=holds, measured=measured, hardware="Abacus", source="table 2")
    soup = BeautifulSoup(claim._repr_html_(), "html.parser")
    table = soup.find("table", class_="bnnbook-claim")
    assert table["id"] == claim.id  # to which the table of all claims leads
    heads = [th.text for th in table.select("thead th")]
    assert heads == ["claim", "paper", "ours", "scale, hardware", "verdict"]
    (row,) = table.select("tbody tr")
    cells = [td.text for td in row.find_all("td")]
    # spaces at which no line breaks keep a number with its unit and spread, and n with its own
    ours = "—" if holds is None else "1.50\u00a0±\u00a00.71\u00a0% (n\u00a0=\u00a02)"
    where = "small scale, Abacus"
    assert cells == ["A statement.", "1.29\u00a0% (table 2)", ours, where, claim.verdict]
    assert row.select_one("span.verdict")["class"] == ["verdict", badge]


def test_html_is_escaped_everywhere():
    evil = '<script>alert("1")</script>&'
    claim = check(
        statement=evil, paper=evil, source=evil, hardware=evil, unit=evil, measured=[1.0, 2.0]
    )
    html = claim._repr_html_()
    assert "<script" not in html
    soup = BeautifulSoup(html, "html.parser")
    assert soup.find("script") is None
    assert soup.find("td").text == evil
    assert html.count("&lt;script&gt;") == 5
    words = check("toy.words", measured=evil)._repr_html_()
    assert "<script" not in words


# --- Notebooks ---------------------------------------------------------------------------------


def run_cells(sources):
    """Run cells in a fresh kernel and return the executed notebook."""
    import nbformat
    from nbclient import NotebookClient

    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    NotebookClient(nb, kernel_name="python3", timeout=60).execute()
    nbformat.validate(nb)
    return nb


def test_in_a_notebook():
    pytest.importorskip("nbclient")
    nb = run_cells(
        [
            "from bnnbook import claims",
            "claims.check('toy.one', 'One.', measured=[1.0], holds=True, hardware='any')",
            "claims.check('toy.two', 'Two.')",
            "claims.glue('toy-number', '0.5 %')",
            "claims.verdicts()",
        ]
    )
    outputs = [cell.outputs for cell in nb.cells]
    found = claims.from_notebook(nb)
    assert [c["id"] for c in found] == ["toy.one", "toy.two"]
    assert found[0]["measured"]["text"] == "1.00 (n = 1)"
    assert set(outputs[1][0].data) == {"text/plain", "text/html", MIME}
    (glued,) = outputs[3]
    assert glued.output_type == "display_data"
    assert glued.data == {"application/papermill.record/text/plain": "0.5 %"}
    assert glued.metadata == {
        "scrapbook": {"name": "toy-number", "mime_prefix": "application/papermill.record/"}
    }
    assert "only at full scale" in outputs[4][0].data["text/plain"]
    assert claims.from_notebook(json.loads(json.dumps(nb))) == found  # a plain dict will do


def test_glue_refuses_what_is_not_text():
    with pytest.raises(TypeError, match=r"glue\('x', …\) takes text, not float"):
        claims.glue("x", 0.123456)
    for name in ("", " ", None):
        with pytest.raises(ValueError, match="must not be empty"):
            claims.glue(name, "text")


def test_glue_displays_raw_with_metadata(monkeypatch):
    seen = []
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: seen.append((a, k)))
    assert claims.glue("x", "0.5 %") is None
    claims.glue("x", "0.6 %")
    (arguments, keywords), again = seen
    assert arguments == ({"application/papermill.record/text/plain": "0.5 %"},)
    assert keywords["raw"] is True
    assert keywords["metadata"]["scrapbook"]["name"] == "x"
    assert again[0] != arguments


@pytest.mark.parametrize("text", ["1.00", "0.10", "12", "(1, 2)", "'", "1,000", "0.5 %", "", "−3"])
def test_glued_text_is_shown_as_it_is(text, monkeypatch):
    """The page's tool evaluates what reads as a literal: 1.00 used to be shown as 1.0."""
    variables = pytest.importorskip("myst_nb.core.variables")
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, **_: shown.extend(data.values()))
    claims.glue("x", text)
    assert variables.format_plain_text(shown[0], "") == text


def notebook(*found):
    outputs = [{"output_type": "execute_result", "data": {MIME: c}} for c in found]
    cells = [{"cell_type": "markdown", "source": "text"}]
    cells += [{"cell_type": "code", "outputs": [{"output_type": "stream"}, o]} for o in outputs]
    return {"cells": cells}


def test_from_notebook_refuses_what_is_not_a_sound_claim():
    good = check()._repr_mimebundle_()[MIME]
    assert claims.from_notebook(notebook(good)) == [good]
    assert claims.from_notebook(notebook()) == []
    with pytest.raises(ValueError, match=r"'toy\.claim' stands twice"):
        claims.from_notebook(notebook(good, good))
    with pytest.raises(ValueError, match="unknown verdict 'maybe'"):
        claims.from_notebook(notebook(good | {"verdict": "maybe"}))
    short = {k: v for k, v in good.items() if k != "measured"}
    with pytest.raises(ValueError, match=r"misses the keys \['measured'\]"):
        claims.from_notebook(notebook(short))


def test_claims_do_not_import_ipython():
    code = "import sys, bnnbook.claims; sys.exit('IPython' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- Claims on records -------------------------------------------------------------------------


@pytest.mark.parametrize(("adam", "verdict"), [(0.09, "reproduced"), (0.11, "not reproduced")])
def test_a_claim_on_records_compares_the_means_over_common_seeds(tmp_path, adam, verdict):
    for seed, sgd in enumerate((0.10, 0.12)):
        save(tmp_path, "sgd", sgd, seed)
        save(tmp_path, "adam", adam, seed)
    save(tmp_path, "adam", 0.9, seed=2)  # without a partner
    save(tmp_path, "lion", 0.0)
    claim = check_recorded(tmp_path)
    assert claim.verdict == verdict
    assert claim.measured["values"] == pytest.approx([100 * (0.10 - adam), 100 * (0.12 - adam)])
    assert (claim.scale, claim.hardware, claim.paper) == ("full", "a GPU", "2 points")
    assert claim.measured["unit"] == "points"


def test_a_claim_on_records_can_be_too_good(tmp_path):
    save(tmp_path, "sgd", 0.10)
    save(tmp_path, "adam", 0.05)
    assert check_recorded(tmp_path, below=5.1).verdict == "reproduced"
    assert check_recorded(tmp_path, below=4.9).verdict == "not reproduced"


def test_the_hardware_names_a_precision_other_than_float32(tmp_path):
    for seed, precision in enumerate(("float32", "bfloat16")):
        for variant, error in (("sgd", 0.10), ("adam", 0.05)):
            save(tmp_path, variant, error, seed=seed, precision=precision)
    assert check_recorded(tmp_path).hardware == "a GPU, a GPU in bfloat16"


def test_runs_of_another_precision_are_not_compared(tmp_path):
    save(tmp_path, "sgd", 0.10)
    save(tmp_path, "adam", 0.05, precision="bfloat16")
    assert check_recorded(tmp_path).verdict == claims.OPEN


def test_a_tie_is_no_gain(tmp_path):
    save(tmp_path, "sgd", 0.10)
    save(tmp_path, "adam", 0.10)
    assert check_recorded(tmp_path, above=0.0).verdict == "not reproduced"


def test_a_claim_whose_records_are_not_all_there_is_open(tmp_path):
    assert check_recorded(tmp_path).verdict == claims.OPEN  # not even the experiment's folder
    save(tmp_path, "sgd", 0.10)
    save(tmp_path, "adam", 0.05, seed=1)
    save(tmp_path, "adam", 0.05, scale="small")
    save(tmp_path, "sgd", 0.10, seed=2, epochs=2)
    save(tmp_path, "adam", 0.05, seed=2)
    assert check_recorded(tmp_path).verdict == claims.OPEN
    save(tmp_path, "adam", 0.05)
    assert check_recorded(tmp_path).verdict == "reproduced"


def test_shortened_runs_count_only_where_they_are_let_in(tmp_path):
    for epochs, adam in ((1, 0.2), (2, 0.05), (3, 0.3)):
        save(tmp_path, "adam", adam, epochs=epochs, seed=epochs)
        if epochs < 3:
            save(tmp_path, "sgd", 0.10, epochs=epochs, seed=epochs, device="a CPU")
    assert check_recorded(tmp_path).verdict == claims.OPEN
    claim = check_recorded(tmp_path, shortened=True)  # the longest that both have: two epochs
    (runs,) = claims.recorded_sets("toy.sweep", ["sgd", "adam"], shortened=True, root=tmp_path)
    assert {name: run.recipe["epochs"] for name, run in runs.items()} == {"sgd": 2, "adam": 2}
    assert claims.recorded_sets("toy.sweep", ["sgd", "adam"], root=tmp_path) == []
    assert claim.measured["values"] == pytest.approx([5.0])
    assert claim.measured["text"] == "5.00 points, 2 of 4 epochs (n = 1)"
    assert claim.hardware == "a CPU, a GPU"
    for variant, error in (("sgd", 0.10), ("adam", 0.08)):
        save(tmp_path, variant, error)
    claim = check_recorded(tmp_path, shortened=True)  # a whole run is longer than any
    assert claim.measured["text"] == "2.00 points (n = 1)"


def test_whole_runs_are_paired_whatever_the_epochs_of_a_step(tmp_path):
    save(tmp_path, "one-step", 0.20)
    save(tmp_path, "two-step", 0.10, recipe={"epochs": 2}, shortened=None)
    (runs,) = claims.recorded_sets("toy.sweep", ["one-step", "two-step"], root=tmp_path)
    assert {name: run.recipe["epochs"] for name, run in runs.items()} == {
        "one-step": 4, "two-step": 2}  # fmt: skip
    save(tmp_path, "one-step", 0.30, epochs=5, seed=1)  # more epochs, but not the whole recipe
    save(tmp_path, "two-step", 0.30, epochs=5, seed=1)
    assert claims.recorded_sets("toy.sweep", ["one-step", "two-step"], True, tmp_path) == [runs]


def test_a_claim_on_records_names_variants_and_gives_finite_numbers(tmp_path):
    with pytest.raises(ValueError, match=r"toy\.sweep: name at least one variant"):
        check_recorded(tmp_path, variants=[])
    save(tmp_path, "sgd", 0.10)
    save(tmp_path, "adam", 0.05)
    with pytest.raises(ValueError, match="measured holds nan"):
        claims.check_recorded("toy.nan", "None.", "toy.sweep", ["sgd"], lambda r: float("nan"),
                              root=tmp_path)  # fmt: skip


@pytest.mark.parametrize("text", ["", "  "])
def test_a_verdict_needs_words_or_numbers(text):
    with pytest.raises(ValueError, match="the measurement is empty"):
        claims.check("toy.blank", "x", measured=text, holds=True, hardware="any")


@pytest.mark.parametrize(("number", "text"), [(0.9996, "1.00"), (99.96, "100"), (999.6, "1000")])
def test_a_number_that_is_rounded_up_keeps_three_digits(number, text):
    assert claims.three_digits(number) == text


def test_a_text_that_reads_like_an_impossible_set_is_text():
    claims.glue("set", "{[]}")
