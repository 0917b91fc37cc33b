import doctest
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import bnnbook
from bnnbook import records
from bnnbook.records import Record, RecordError

ENVIRONMENT = {"device": "Abacus 9000", "commit": "abc", "dirty": False, "torch": "2.11"}


@pytest.fixture(autouse=True)
def no_default_root(monkeypatch, tmp_path):
    monkeypatch.setenv("BNNBOOK_RESULTS", str(tmp_path / "default"))


def make(**changes):
    values = {
        "experiment": "toy.table1",
        "variant": "sgd",
        "seed": 3,
        "scale": "full",
        "dataset": "digits",
        "dataset_sha256": "00ff",
        "recipe": {"lr": 0.1, "hidden": (128, 64), "optimizer": "sgd", "clip": True},
        "shortened": "30 of 1000 epochs",
        "history": [
            {"epoch": 1, "train_loss": 0.123456789, "test_accuracy": 0.5},
            {"epoch": 2, "train_loss": 0.1},
        ],
        "metrics": {"test_accuracy": 0.987654321, "epochs": 2},
        "arrays": {"weights": records.encode_array(np.arange(6, dtype=np.float32))},
        "environment": dict(ENVIRONMENT),
        "seconds": 12.5,
        "started": "2026-01-02T03:04:05Z",
    }
    return Record(**values | changes)


def test_doctests():
    result = doctest.testmod(records)
    assert result.attempted >= 2
    assert result.failed == 0


# --- Save and read -----------------------------------------------------------------------------


def test_round_trip(tmp_path):
    record = make()
    path = records.save(record, tmp_path)
    assert path == tmp_path / "toy.table1" / "sgd-seed3.json"
    back = records.read(path)
    assert back.history == [
        {"epoch": 1, "train_loss": 0.123457, "test_accuracy": 0.5},
        {"epoch": 2, "train_loss": 0.1},
    ]
    assert back.metrics == record.metrics  # the final numbers are not rounded
    assert back.recipe == record.recipe | {"hidden": [128, 64]}
    names = ("experiment", "variant", "seed", "scale", "shortened", "dataset", "dataset_sha256")
    for name in (*names, "environment", "arrays", "seconds", "started", "format"):
        assert getattr(back, name) == getattr(record, name), name
    # What was read and is written again is the same file, byte for byte.
    before = path.read_bytes()
    assert records.save(back, tmp_path, overwrite=True).read_bytes() == before


def test_a_run_of_several_experiments_is_counted_once():
    """And runs side by side, as long and begun in the same minute, each."""
    run, other = make(), make(variant="adam", metrics={"test_accuracy": 0.9})
    copy = make(experiment="toy.figure2", variant="first")
    assert records.distinct(iter([run, other, copy, make(seed=4)])) == [run, other, make(seed=4)]
    assert records.distinct([]) == []


def test_small_scale_has_its_own_folder(tmp_path):
    full = records.save(make(), tmp_path)
    small = records.save(make(scale="small"), tmp_path)
    assert small == tmp_path / "toy.table1" / "small" / "sgd-seed3.json"
    assert records.find("toy.table1", "sgd", 3, tmp_path) == full
    assert records.find("toy.table1", "sgd", 3, tmp_path, scale="small") == small
    assert records.find("toy.table1", "sgd", 4, tmp_path) is None
    assert records.find("toy.table1", "adam", 3, tmp_path) is None
    assert records.find("other", "sgd", 3, tmp_path) is None


def test_the_file_does_not_depend_on_the_order_of_keys(tmp_path):
    one = records.save(make(), tmp_path / "a").read_bytes()
    turned = {k: dict(reversed(v.items())) for k, v in vars(make()).items() if k == "recipe"}
    metrics = dict(reversed(make().metrics.items()))
    assert records.save(make(**turned, metrics=metrics), tmp_path / "b").read_bytes() == one


def test_the_file_is_plain_json_small_and_readable(tmp_path):
    rng = np.random.default_rng(0)
    names = ("train_loss", "train_accuracy", "test_accuracy", "flip_ratio", "seconds")
    history = [{"epoch": i} | dict(zip(names, rng.random(5), strict=True)) for i in range(1000)]
    text = records.save(make(history=history), tmp_path).read_text()
    assert len(text) < 60_000
    value = json.loads(text)
    assert list(value)[:4] == ["format", "experiment", "variant", "seed"]
    assert len(value["history"]["train_loss"]) == 1000
    assert text.count("\n") < 60
    assert text.endswith("}\n")


def test_numpy_and_torch_scalars_become_numbers(tmp_path):
    metrics = {"a": np.float32(0.5), "b": torch.tensor(2), "c": np.int64(7)}
    back = records.read(records.save(make(metrics=metrics), tmp_path))
    assert back.metrics == {"a": 0.5, "b": 2, "c": 7}
    assert isinstance(back.metrics["c"], int)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {"loss": NAN}}, "metrics.loss is nan"),
        ({"metrics": {"loss": np.float32(INF)}}, "metrics.loss is inf"),
        ({"metrics": {"loss": torch.tensor(NAN)}}, "metrics.loss is nan"),
        ({"history": [{"epoch": 1}, {"epoch": 2, "x": -INF}]}, r"history\[1\].x is -inf"),
        ({"recipe": {"betas": [0.9, NAN]}}, r"recipe.betas\[1\] is nan"),
        ({"seconds": INF}, "seconds is inf"),
        ({"recipe": {"root": Path("x")}}, "recipe.root: a .*Path is not a JSON value"),
        ({"recipe": {"w": np.zeros(3)}}, "recipe.w: a ndarray"),
        ({"recipe": {"a": {1: 2}}}, "recipe.a: the key 1"),
        ({"metrics": {"name": "good"}}, "metrics.name is not a number"),
        ({"seed": "3x"}, "3x"),
        ({"experiment": "../toy"}, r"experiment '\.\./toy'"),
        ({"variant": "a/b"}, "variant 'a/b'"),
        ({"variant": ""}, "variant ''"),
        ({"scale": "medium"}, "unknown scale 'medium'; known: small, full"),
        ({"dataset": None}, "dataset is of type NoneType"),
        ({"arrays": {"w": {"shape": [2], "dtype": "uint8", "base64": "AQ=="}}}, "malformed array"),
        ({"format": 3}, "format is 3"),
    ],
)
def test_save_refuses_and_names_the_key(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        records.save(make(**changes), tmp_path)
    assert not list(tmp_path.rglob("*.json*"))


def test_an_existing_record_is_replaced_only_when_told(tmp_path):
    path = records.save(make(), tmp_path)
    before = path.read_bytes()
    other = make(metrics={"test_accuracy": 0.1})
    with pytest.raises(RecordError, match="overwrite=True") as caught:
        records.save(other, tmp_path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    records.save(other, tmp_path, overwrite=True)
    assert records.read(path).metrics == {"test_accuracy": 0.1}


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_record_and_no_rubbish(tmp_path, monkeypatch, where):
    path = records.save(make(), tmp_path)
    before = path.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    if where == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RecordError, match=r"No space left.*BNNBOOK_RESULTS"):
        records.save(make(metrics={}), tmp_path, overwrite=True)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_write_leaves_no_rubbish(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        records.save(make(), tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_where_the_records_are(tmp_path, monkeypatch):
    assert records.results_folder() == tmp_path / "default"
    assert records.results_folder(tmp_path) == tmp_path
    monkeypatch.delenv("BNNBOOK_RESULTS")
    assert records.results_folder() == Path(bnnbook.__file__).parent / "results"


def test_the_default_root_is_used_by_all(tmp_path):
    path = records.save(make())
    assert path.is_relative_to(tmp_path / "default")
    assert records.find("toy.table1", "sgd", 3) == path
    assert records.experiments() == ["toy.table1"]
    assert len(records.load()) == 1
    assert len(records.histories()) == 2


# --- Damaged files -----------------------------------------------------------------------------


def damage(text, case):
    value = json.loads(text)
    changed = {
        "cut": text[: len(text) // 2],
        "empty": "",
        "not json": "hello",
        "a list": "[1, 2]",
        "nan": text.replace("0.987654321", "NaN"),
        "too large a number": text.replace("0.987654321", "1e999"),
        "missing key": json.dumps({k: v for k, v in value.items() if k != "recipe"}),
        "unknown key": json.dumps(value | {"colour": 1}),
        "other format": json.dumps(value | {"format": 0}),
        "no format": json.dumps({k: v for k, v in value.items() if k != "format"}),
        "seed is text": json.dumps(value | {"seed": "3"}),
        "seed is bool": json.dumps(value | {"seed": True}),
        "unknown scale": json.dumps(value | {"scale": "medium"}),
        "history is rows": json.dumps(value | {"history": [{"epoch": 1}]}),
        "ragged history": json.dumps(value | {"history": {"epoch": [1, 2], "x": [1]}}),
        "column is a number": json.dumps(value | {"history": {"epoch": 1}}),
        "tampered": text.replace("0.987654321", "0.997654321"),
        "no checksum": json.dumps({k: v for k, v in value.items() if k != "checksum"}),
        "metric is text": json.dumps(value | {"metrics": {"a": "b"}}),
        "metric is a bool": json.dumps(value | {"metrics": {"a": True}}),
        "array is cut": json.dumps(
            value | {"arrays": {"w": value["arrays"]["weights"] | {"shape": [7]}}}
        ),
        "array is no base64": json.dumps(
            value | {"arrays": {"w": value["arrays"]["weights"] | {"base64": "?!"}}}
        ),
        "array is a list": json.dumps(value | {"arrays": {"w": [1, 2]}}),
        "deep": "[" * 100_000,
    }
    return changed[case]


CASES = [
    ("cut", "is damaged"),
    ("empty", "Expecting value"),
    ("not json", "it is not JSON: Expecting value"),
    ("a list", "not a JSON object"),
    ("nan", "NaN"),
    ("too large a number", "1e999"),
    ("missing key", r"misses the known keys \['recipe'\]"),
    ("unknown key", r"has the unknown keys \['colour'\]"),
    ("other format", "format is 0, this version reads 2"),
    ("no format", "it is not a record of bnnbook"),
    ("seed is text", "seed is of type str"),
    ("seed is bool", "seed is of type bool"),
    ("unknown scale", "unknown scale"),
    ("history is rows", "history is of type list"),
    ("tampered", "checksum does not fit"),
    ("no checksum", "checksum does not fit"),
    ("ragged history", "differ in length"),
    ("column is a number", "not a list"),
    ("metric is text", "metrics.a is not a number"),
    ("metric is a bool", "metrics.a is not a number"),
    ("array is cut", "malformed array"),
    ("array is no base64", "malformed array"),
    ("array is a list", "malformed array"),
    ("deep", "recursion"),
]


def test_a_record_of_a_later_format_is_refused_and_left_alone(tmp_path):
    path = records.save(make(), tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))
    with pytest.raises(RecordError, match="format is 3, this version reads 2; install"):
        records.read(path)
    assert path.exists()


@pytest.mark.parametrize(("case", "message"), CASES)
def test_a_damaged_record_is_named_and_moved_aside(tmp_path, case, message):
    path = records.save(make(), tmp_path)
    text = damage(path.read_text(), case)
    path.write_text(text)
    with pytest.raises(RecordError, match=message) as caught:
        records.load("toy.table1", tmp_path)
    aside = path.with_name("sgd-seed3.json.corrupt")
    assert str(path) in str(caught.value)
    assert str(aside) in str(caught.value)
    assert aside.read_text() == text
    assert not path.exists()
    assert len(records.load("toy.table1", tmp_path)) == 0  # the run is missing now, not wrong


def test_bytes_that_are_not_text_are_damage_too(tmp_path):
    path = records.save(make(), tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match="corrupt"):
        records.read(path)


def test_a_second_damaged_record_does_not_overwrite_the_first(tmp_path):
    for text in ("one", "two", "three"):
        path = records.save(make(), tmp_path)
        path.write_text(text)
        with pytest.raises(RecordError):
            records.read(path)
    aside = sorted(path.parent.iterdir())
    assert [p.name.removeprefix("sgd-seed3.json.") for p in aside] == [
        "corrupt",
        "corrupt-2",
        "corrupt-3",
    ]
    assert [p.read_text() for p in aside] == ["one", "two", "three"]


def test_a_damaged_record_that_cannot_be_moved_is_still_named(tmp_path, monkeypatch):
    path = records.save(make(), tmp_path)
    path.write_text("{")

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(RecordError, match="could not be moved") as caught:
        records.read(path)
    assert str(path) in str(caught.value)
    assert path.read_text() == "{"


def test_a_missing_file_is_not_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        records.read(tmp_path / "none.json")


# --- Frames ------------------------------------------------------------------------------------


@pytest.fixture
def several(tmp_path):
    for seed in (10, 2):
        records.save(make(seed=seed, metrics={"test_accuracy": seed / 100}), tmp_path)
    records.save(make(variant="adam", shortened=None, recipe={"lr": 1e-3}), tmp_path)
    records.save(make(scale="small"), tmp_path)
    records.save(make(experiment="toy.table2", history=[]), tmp_path)
    return tmp_path


def test_load_has_one_row_a_run(several):
    frame = records.load("toy.table1", several)
    assert list(frame.columns[:9]) == records.RUN_COLUMNS
    assert list(zip(frame.scale, frame.variant, frame.seed, strict=True)) == [
        ("full", "adam", 3),
        ("full", "sgd", 2),
        ("full", "sgd", 10),
        ("small", "sgd", 3),
    ]
    assert frame["metrics.test_accuracy"].tolist() == [0.987654321, 0.02, 0.1, 0.987654321]
    assert frame["recipe.lr"].tolist() == [1e-3, 0.1, 0.1, 0.1]
    assert set(frame.device) == {"Abacus 9000"}
    assert set(frame.commit) == {"abc"}
    assert frame.shortened.isna().tolist() == [True, False, False, False]
    assert set(records.load(root=several).experiment) == {"toy.table1", "toy.table2"}


def test_read_all_goes_on_after_a_damaged_record_only_when_told(several):
    later = several / "toy.table2" / "sgd-seed3.json"
    bad = [several / "toy.table1" / "sgd-seed2.json", later]
    for path in bad:
        path.write_text("{")
    later.write_text(json.dumps({"format": 99}))
    errors = []
    left = [(r.scale, r.variant, r.seed) for r in records.read_all(None, several, errors.append)]
    assert left == [("full", "adam", 3), ("full", "sgd", 10), ("small", "sgd", 3)]
    assert [type(error) for error in errors] == [RecordError] * 2
    assert all(str(path) in str(error) for path, error in zip(bad, errors, strict=True))
    with pytest.raises(RecordError, match="format is 99"):
        list(records.read_all(root=several))


def test_histories_are_tidy(several):
    frame = records.histories("toy.table1", several)
    assert list(frame.columns[:4]) == ["experiment", "variant", "seed", "scale"]
    assert len(frame) == 8
    run = frame[(frame.variant == "sgd") & (frame.seed == 2)]
    assert run.epoch.tolist() == [1, 2]
    assert run.test_accuracy.isna().tolist() == [False, True]
    assert records.histories("toy.table2", several).empty


def test_unknown_experiment_lists_the_known_ones(several):
    for function in (records.load, records.histories):
        with pytest.raises(ValueError, match=r"'toy.table3'.*known: toy.table1, toy.table2"):
            function("toy.table3", several)
    with pytest.raises(ValueError, match="known: none"):
        records.load("toy.table1", several / "absent")


@pytest.mark.parametrize("folder", ["", "absent"])
def test_no_records_give_an_empty_frame_with_columns(tmp_path, folder):
    frame = records.load(root=tmp_path / folder)
    assert isinstance(frame, pd.DataFrame)
    assert frame.empty
    assert list(frame.columns) == records.RUN_COLUMNS
    assert list(records.histories(root=tmp_path / folder).columns) == records.RUN_KEYS
    assert records.experiments(tmp_path / folder) == []


def test_other_files_are_no_records(several):
    (several / "toy.table1" / "README.md").write_text("hello")
    (several / "notes.json").write_text("hello")
    assert len(records.load(root=several)) == 5


def test_the_shipped_records_are_sound(monkeypatch):
    monkeypatch.delenv("BNNBOOK_RESULTS")
    root = records.results_folder()
    for path in root.rglob("*.json"):
        record = records.read(path)
        key = (record.experiment, record.variant, record.seed)
        assert records.find(*key, root, scale=record.scale) == path
        assert path.stat().st_size < 200_000
        assert record.environment["device"]
        assert len(record.dataset_sha256) == 64
    assert not list(root.rglob("*.corrupt*"))


# --- Arrays ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (2, 3, 4), (0,), ()])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_arrays_round_trip(shape, dtype):
    array = (np.random.default_rng(0).random(shape) * 200).astype(dtype)
    value = json.loads(json.dumps(records.encode_array(array)))
    back = records.decode_array(value)
    assert back.dtype == array.dtype
    assert back.flags.writeable
    assert np.array_equal(back, array)
    assert records.encode_array(torch.tensor(array)) == value


def test_a_tensor_with_gradient_and_a_view_can_be_encoded():
    tensor = torch.arange(6.0).reshape(2, 3).requires_grad_()
    assert records.decode_array(records.encode_array(tensor.T)).tolist() == tensor.T.tolist()


@pytest.mark.parametrize("array", [np.zeros(2), np.zeros(2, int), torch.zeros(2).double(), [1, 2]])
def test_other_dtypes_are_refused(array):
    with pytest.raises(ValueError, match="convert it to uint8 or float32"):
        records.encode_array(array)


def test_arrays_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        records.encode_array(np.array([1, np.inf], dtype=np.float32))


@pytest.mark.parametrize("change", [{"dtype": "float64"}, {"shape": [5]}, {"base64": "A"}, {}])
def test_malformed_arrays_are_refused(change):
    value = records.encode_array(np.zeros(4, np.float32)) | change
    if not change:
        del value["base64"]
    with pytest.raises(ValueError, match="malformed array"):
        records.decode_array(value)


# --- Provenance --------------------------------------------------------------------------------


def test_environment_says_what_a_number_depends_on():
    found = records.environment("cpu")
    assert found["device"] == records.cpu_model()
    assert found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert found["numpy"] == np.__version__
    assert found["bnnbook"] == bnnbook.__version__
    assert set(found) >= {"cuda", "commit", "dirty"}
    json.dumps(found)


def test_an_absent_environment_is_filled_in_when_saving(tmp_path):
    back = records.read(records.save(make(environment={}), tmp_path))
    assert back.environment["torch"] == torch.__version__
    assert back.environment["device"]


def test_cpu_model_without_proc(monkeypatch):
    def absent(*arguments, **keywords):
        raise FileNotFoundError

    records.cpu_model.cache_clear()
    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    try:
        assert records.cpu_model() == "riscv64"
    finally:
        records.cpu_model.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_named_and_is_the_default_once_used():
    torch.zeros(1, device="cuda")
    assert records.device_name("cuda:0") == torch.cuda.get_device_name(0)
    assert records.device_name() == torch.cuda.get_device_name(0)
    assert records.device_name("cpu") == records.cpu_model()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository with a library in it; returns (git, package folder)."""
    if shutil.which("git") is None:
        pytest.skip("no git")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    package = tmp_path / "repository" / "library"
    (package / "results").mkdir(parents=True)

    def git(*arguments):
        identity = ("-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(package.parent), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (package / "__init__.py").write_text("x = 1\n")
    git("init", "-q")
    monkeypatch.setattr(records, "PACKAGE", package)
    return git, package


def test_git_state_of_a_checkout(checkout):
    git, package = checkout
    assert records.git_state() == (None, None)  # not yet tracked
    git("add", ".")
    assert records.git_state() == (None, None)  # no commit yet
    git("commit", "-q", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert records.git_state() == (commit, False)
    (package / "results" / "new.json").write_text("{}")  # a new record is no change of the library
    (package.parent / "notes.txt").write_text("hello")
    assert records.git_state() == (commit, False)
    (package / "__init__.py").write_text("x = 2\n")
    assert records.git_state() == (commit, True)
    git("checkout", "-q", ".")
    (package / "new_module.py").write_text("")
    assert records.git_state() == (commit, True)


def test_an_installed_copy_inside_another_checkout_has_no_commit(checkout, monkeypatch):
    git, package = checkout
    git("add", ".")
    git("commit", "-q", "-m", "one")
    other = package.parent / ".venv" / "library"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("")
    monkeypatch.setattr(records, "PACKAGE", other)
    assert records.git_state() == (None, None)


def test_no_git_at_all(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert records.git_state() == (None, None)
    assert records.environment("cpu")["commit"] is None


def test_records_do_not_import_torch():
    code = "import sys, bnnbook.records, bnnbook.claims; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("place", ["other-seed2.json", "sgd-seed4.json", "small/sgd-seed3.json"])
def test_a_record_under_the_name_of_another_run_counts_as_none(tmp_path, place):
    path = records.save(make(), tmp_path)
    moved = path.parent / place
    moved.parent.mkdir(exist_ok=True)
    shutil.copy(path, moved)
    with pytest.raises(RecordError, match=r"the record of another run, .* sgd-seed3\.json in"):
        records.read(moved)
    assert moved.exists()
    assert len(list(records.read_all(root=tmp_path, on_error=lambda error: None))) == 1


def test_a_record_may_be_a_link_to_a_file_of_any_name(tmp_path):
    path = records.save(make(), tmp_path)
    path.rename(tmp_path / "stored")
    path.symlink_to(tmp_path / "stored")
    assert records.read(path).variant == "sgd"


@pytest.mark.parametrize("value", [np.complex64(1), np.datetime64("2026-01-01"), np.bytes_(b"x")])
def test_scalars_that_json_lacks_are_named(value):
    with pytest.raises(ValueError, match=r"key\.a: a .* is not a JSON value"):
        records._plain({"a": value}, "key")


def test_rows_are_dicts():
    with pytest.raises(ValueError, match=r"history\[1\] is no dict"):
        records._columns([{"epoch": 1}, 2])


def test_an_array_of_another_type_is_refused_also_where_numpy_lacks_it():
    with pytest.raises(ValueError, match="array of bfloat16: convert it"):
        records.encode_array(torch.ones(2, dtype=torch.bfloat16))
