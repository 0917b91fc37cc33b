"""The command line: what it writes, says and refuses, and how a run is stopped and continued."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import bnnbook
from bnnbook import cli, data, experiments, recording, records
from bnnbook.experiments import binaryconnect

NAME = "binaryconnect.clipping"
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    """Run in an empty folder, with records and data sets there and nowhere else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BNNBOOK_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("BNNBOOK_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("BNNBOOK_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def tiny(monkeypatch):
    """A small recipe that takes no time."""
    recipe = replace(binaryconnect.SMALL, hidden=(32, 32), epochs=3, batch_size=50, validation=300)
    monkeypatch.setitem(binaryconnect.RECIPES, "clipping", {"small": recipe})


def invoke(*arguments, code=0):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def call(monkeypatch, capsys, *arguments):
    """Return exit status, output and errors of the program, run in this process."""
    monkeypatch.setattr(sys, "argv", ["bnnbook", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code, *capsys.readouterr()


def environment(**changes):
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | changes


def program(*arguments, **changes):
    """Run ``python -m bnnbook`` as a user does."""
    command = [sys.executable, "-m", "bnnbook", *map(str, arguments)]
    return subprocess.run(command, env=environment(**changes), capture_output=True, text=True)


def plain(text):
    """The text without colours, which help has on some CI machines."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def toy_record(variant="a", seed=0, **changes):
    values = {
        "experiment": "toy.table", "variant": variant, "seed": seed, "scale": "full",
        "dataset": "digits", "dataset_sha256": "00", "seconds": 1.0,
        "environment": {"device": "Abacus 9000", "commit": "abc", "dirty": False},
        "metrics": {"test_error": 0.25},
    }  # fmt: skip
    return records.Record(**values | changes)


class Toy:
    """An experiment that trains nothing; it notes how it was called and what is to happen then."""

    def __init__(self, monkeypatch, scales=("small", "full")):
        self.calls, self.then = [], lambda: None
        recipes = dict.fromkeys(scales, SimpleNamespace(dataset="digits", epochs=1000))
        toy = experiments.Experiment(self.run, ("a", "b"), recipes)
        other = experiments.Experiment(self.run, ("never",), {"small": None})
        found = {"toy.table": toy, "toy.other": other}
        monkeypatch.setattr(experiments, "names", lambda: list(found))
        monkeypatch.setattr(experiments, "PRIORITY", tuple(found))
        monkeypatch.setattr(experiments, "find", found.__getitem__)
        monkeypatch.setattr(experiments, "recipe", lambda *_: SimpleNamespace(epochs=1000))
        monkeypatch.setattr(experiments, "same_runs", lambda *_: ())

    def run(self, variant, *, checkpoint, **options):
        self.calls.append({"variant": variant, "checkpoint": checkpoint} | options)
        self.then()
        return toy_record(variant, options["seed"], scale=options["scale"])

    def called(self):
        return [(each["variant"], each["seed"]) for each in self.calls]


@pytest.fixture
def toy(monkeypatch):
    return Toy(monkeypatch)


def without_time(record):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in record.history]


# --- Help and list -----------------------------------------------------------------------------


def test_help_lists_the_commands():
    done = program("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("list", "run", "record", "data"):
        assert re.search(rf"^\W*{command}\s+[A-Z]", plain(done.stdout), re.MULTILINE), command
    assert plain(program().stdout).split() == plain(done.stdout).split()


@pytest.mark.parametrize("command", ["list", "run", "record", "data"])
def test_every_command_has_help(command):
    output = plain(invoke(command, "--help").output)
    assert "Usage:" in output
    assert "--" in output.replace("--help", "")


def test_the_versions_are_shown():
    line = f"bnnbook {bnnbook.__version__} (torch {torch.__version__})\n"
    assert program("--version").stdout == line
    assert "--version" in plain(invoke("--help").output)


def test_list_shows_experiments_variants_scales_and_records(tmp_path):
    records.save(toy_record("clipped", 3, experiment=NAME, scale="small"))
    records.save(toy_record("clipped", 4, experiment=NAME, shortened="1 of 15 epochs"))
    other = tmp_path / "others"
    records.save(toy_record("adam", 7, experiment="binaryconnect.table1"), other)
    blocks = re.split(r"^(?=\S)", invoke("list").stdout, flags=re.MULTILINE)[1:]
    assert [block.splitlines()[0] for block in blocks] == experiments.names()
    for name, block in zip(experiments.names(), blocks, strict=True):
        _, variants, recipes = experiments.find(name)
        assert f"variants: {', '.join(variants)}\n" in block
        assert f"scales: {', '.join(recipes)}\n" in block
        assert ("records: none" in block) == (name != NAME)
    block = blocks[experiments.names().index(NAME)]
    assert "clipped seed 3 (small)" in block
    assert "clipped seed 4 (1 of 15 epochs)" in block
    elsewhere = invoke("list", "--results", other).stdout
    assert "adam seed 7 (full)" in elsewhere
    assert "clipped seed 3" not in elsewhere


def test_list_names_a_damaged_record_and_shows_the_others():
    path = records.save(toy_record("clipped", 3, experiment=NAME))
    records.save(toy_record("clipped", 4, experiment=NAME))
    records.save(toy_record("adam", 7, experiment="binaryconnect.table1"))
    path.write_text("{")
    result = invoke("list", code=1)
    blocks = re.split(r"^(?=\S)", result.stdout, flags=re.MULTILINE)[1:]
    assert [block.splitlines()[0] for block in blocks] == experiments.names()
    assert "records: clipped seed 4 (full)\n" in blocks[experiments.names().index(NAME)]
    assert "records: adam seed 7 (full)\n" in result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"bnnbook: {path} is damaged: it is not JSON")
    assert invoke("list").stderr == ""  # the damaged file was moved aside, as it said


# --- Run ---------------------------------------------------------------------------------------


def test_run_records_once_and_overwrites_only_when_told(tmp_path, tiny):
    results, runs = tmp_path / "TMP", tmp_path / "TMP2"
    command = ["run", NAME, "--variant", "clipped", "--results", results, "--runs", runs]
    first = invoke(*command, "--epochs", 1)
    path = results / NAME / "small" / "clipped-seed0.json"
    record = records.read(path)
    assert str(path) in first.stdout
    assert f"test error {100 * record.metrics['test_error']:.2f} %" in first.stdout
    assert (record.variant, record.shortened) == ("clipped", "1 of 3 epochs")
    assert list(runs.iterdir()) == []
    assert not (tmp_path / "results").exists()

    written = path.read_bytes()
    second = invoke(*command, "--epochs", 1)
    assert second.stdout == f"{path} is there already (1 of 3 epochs); --overwrite replaces it\n"
    assert path.read_bytes() == written

    invoke(*command, "--epochs", 1, "--overwrite")
    assert path.read_bytes() != written  # it took another time
    assert records.read(path).shortened == "1 of 3 epochs"


def test_a_shortened_record_does_not_spare_a_longer_run(tmp_path, tiny):
    """As `bnnbook record` has it."""
    command = ["run", NAME, "--variant", "clipped", "--runs", tmp_path / "runs"]
    path = records.record_path(NAME, "clipped", 0, "small")
    invoke(*command, "--epochs", 1)
    for options, length, before in ((["--epochs", 2], 2, "1 of 3"), ([], 3, "2 of 3")):
        longer = invoke(*command, *options)
        line = f"{path} is shortened ({before} epochs): this run replaces it\n"
        assert longer.stdout.startswith(line)
        assert len(records.read(path).history) == length
    for options in ([], ["--epochs", 2]):
        spared = invoke(*command, *options)
        assert spared.stdout == f"{path} is there already; --overwrite replaces it\n"
    assert records.read(path).shortened is None


def test_run_copies_the_record_of_the_same_run(tmp_path):
    """Of another experiment, unless --overwrite asks for a run of its own."""
    one = ["liu2021.two_step", "--variant", "one-step"]
    same = ["liu2021.weight_decay", "--variant", "0x"]
    options = ["--epochs", 1, "--results", tmp_path, "--runs", tmp_path, "--device", "cpu"]
    invoke("run", *one, *options)
    path = records.record_path("liu2021.weight_decay", "0x", 0, "small", tmp_path)
    copied = invoke("run", *same, *options)
    assert copied.stdout.endswith(
        f": the run of liu2021.two_step one-step, its record copied -> {path}\n")  # fmt: skip
    copy, copied_bytes = records.read(path), path.read_bytes()
    assert "is there already" in invoke("run", *same, *options).stdout
    invoke("run", *same, *options, "--overwrite")
    own = records.read(path)
    assert own.environment == copy.environment
    assert (own.metrics, without_time(own)) == (copy.metrics, without_time(copy))
    assert path.read_bytes() != copied_bytes  # each row of its history took another time


def test_run_takes_all_variants_and_several_seeds(tiny):
    invoke("run", NAME, "--seed", 0, "--seed", 5, "--epochs", 1)
    found = {(r.variant, r.seed) for r in records.read_all(NAME)}
    assert found == {(v, s) for v in ("clipped", "unclipped") for s in (0, 5)}
    invoke("run", NAME, "--variant", "clipped", "--seed", 9, "--epochs", 1, "--device", "cpu")
    assert {(r.variant, r.seed) for r in records.read_all(NAME)} == found | {("clipped", 9)}


def test_run_and_record_take_a_precision(tiny, monkeypatch):
    monkeypatch.setenv("BNNBOOK_PRECISION", "float32")  # which the options overrule
    command = ("run", NAME, "--variant", "clipped", "--epochs", 1, "--device", "cpu")
    invoke(*command, "--precision", "bfloat16")
    assert os.environ["BNNBOOK_PRECISION"] == "bfloat16"  # for the processes that it may start
    invoke(*command, "--seed", 1, "--precision", "auto")
    invoke("record", "--scale", "small", "--only", NAME, "--seed", 2, "--epochs", 1,
           "--device", "cpu", "--precision", "bfloat16")  # fmt: skip
    seen = {(r.variant, r.seed): r.recipe["precision"] for r in records.read_all(NAME)}
    half, full = "bfloat16", "float32"
    assert seen == {("clipped", 0): half, ("clipped", 1): full,
                    ("clipped", 2): half, ("unclipped", 2): half}  # fmt: skip


@pytest.mark.parametrize("command", [["run", NAME], ["record", "--list"]])
def test_an_unknown_precision(monkeypatch, capsys, command):
    code, _, err = call(monkeypatch, capsys, *command, "--precision", "half")
    known = "auto, float32, bfloat16, float16"
    assert (code, err) == (1, f"bnnbook: unknown precision 'half'; known: {known}\n")


def test_run_passes_its_options_on(toy, tmp_path):
    invoke("run", "toy.table", "--variant", "b", "--seed", 3, "--scale", "full", "--epochs", 7,
           "--device", "cpu", "--data", tmp_path / "sets")  # fmt: skip
    (options,) = toy.calls
    checkpoint = options.pop("checkpoint")
    assert options == {"variant": "b", "seed": 3, "scale": "full", "epochs": 7, "device": "cpu"}
    assert checkpoint.parent == Path("runs")
    assert os.environ["BNNBOOK_DATA"] == str(tmp_path / "sets")
    assert records.find("toy.table", "b", 3) is not None


def test_a_small_run_leaves_the_shipped_records_alone(tiny, monkeypatch, tmp_path):
    """They count towards the freshness of the chapters that read them."""
    monkeypatch.delenv("BNNBOOK_RESULTS")
    before = sorted(records.results_folder().rglob("*"))
    result = invoke("run", NAME, "--variant", "clipped", "--epochs", 1, "--runs", tmp_path / "my")
    assert sorted(records.results_folder().rglob("*")) == before
    path = records.find(NAME, "clipped", 0, tmp_path / "my", "small")
    assert str(path) in result.stdout


def test_records_of_the_two_scales_are_kept_apart(toy):
    invoke("run", "toy.table", "--variant", "a")
    invoke("run", "toy.table", "--variant", "a", "--scale", "full")
    assert [each["scale"] for each in toy.calls] == ["small", "full"]
    assert [records.find("toy.table", "a", 0, None, scale) is not None
            for scale in records.SCALES] == [True, True]  # fmt: skip


def test_every_run_has_its_own_checkpoint(toy):
    for options in ([], ["--epochs", 1], ["--epochs", 11], ["--seed", 1], ["--scale", "full"]):
        invoke("run", "toy.table", "--overwrite", *options)
    files = {each["checkpoint"] for each in toy.calls}
    assert len(files) == len(toy.calls) == 10


# --- What is refused ---------------------------------------------------------------------------


def refused(monkeypatch, capsys, *arguments, hint=False):
    """Return the one line that the program says before it exits with status 1.

    A hint at the traceback follows where the words may not be enough.
    """
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert (code, out) == (1, "")
    line, *others = err.splitlines()
    assert others == ["(BNNBOOK_DEBUG=1 shows the traceback)"] * hint
    return line


@pytest.mark.parametrize(("arguments", "words"), [
    (["run", "binaryconnect.table7"], ["'binaryconnect.table7'", *experiments.names()]),
    (["run", NAME, "--variant", "cut"], ["variant 'cut'", "clipped, unclipped"]),
    (["run", NAME, "--variant", "clipped", "--variant", "cut"], ["variant 'cut'"]),
    (["run", NAME, "--scale", "medium"], ["scale 'medium'", "known: small"]),
    (["run", NAME, "--scale", "full"], ["scale 'full'", "known: small"]),
    (["run", "binaryconnect.table2", "--scale", "large"], ["scale 'large'", "small, full"]),
    (["data", "imagenet"], ["data set 'imagenet'", *data.NAMES]),
])  # fmt: skip
def test_an_unknown_name_is_one_line_with_the_known_ones(monkeypatch, capsys, arguments, words):
    line = refused(monkeypatch, capsys, *arguments)
    assert all(word in line for word in ["bnnbook: unknown", *words])
    assert not Path("results").exists()


@pytest.mark.parametrize(("device", "words"), [
    ("cuda", ["'cuda' was asked for", "no CUDA GPU", "'cpu'"]),
    ("cuda:1", ["was asked for", "no CUDA GPU"]),
    ("abacus", ["unknown device 'abacus'", "auto, cpu, cuda, cuda:N"]),
    ("meta", ["unknown device 'meta'", "auto, cpu, cuda, cuda:N"]),
])  # fmt: skip
def test_a_device_that_is_not_there(monkeypatch, capsys, device, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code, _, err = call(monkeypatch, capsys, "run", NAME, "--device", device)
    assert code == 1
    assert all(word in err.splitlines()[0] for word in words)
    assert "Traceback" not in err
    assert not Path("results").exists()


def test_a_data_set_that_cannot_be_had_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mnist.npz").write_bytes(b"not an archive")
    line = refused(monkeypatch, capsys, "data", "mnist", hint=True)
    assert str(tmp_path / "data" / "mnist.npz") in line


@pytest.mark.parametrize(("arguments", "named"), [
    (["run"], "experiment"), (["run", NAME, "--seed", "one"], "--seed"), (["train"], "train"),
    (["run", NAME, "--sede", "1"], "--sede"), (["record", "--minutes", "soon"], "--minutes"),
    (["run", NAME, "--seed", "-1"], "--seed"), (["run", NAME, "--seed", str(2**32)], "--seed"),
    (["record", "--seed", str(2**32)], "--seed"),
])  # fmt: skip
def test_a_command_that_makes_no_sense_shows_the_usage(monkeypatch, capsys, arguments, named):
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert "Usage:" in plain(err)
    assert named in plain(err).partition("Error")[2]


def test_the_program_exits_with_one_line():
    done = program("run", "nonsense")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("bnnbook: unknown experiment 'nonsense'; known: alexnet.")
    assert "Traceback" not in done.stderr


def test_debugging_shows_the_traceback():
    done = program("run", "nonsense", BNNBOOK_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ValueError: unknown experiment 'nonsense'" in done.stderr


@pytest.mark.parametrize("option", ["--runs", "--results"])
def test_a_folder_that_is_a_file_is_an_error_before_the_run(monkeypatch, capsys, toy, option):
    Path("taken").write_text("a file")
    line = refused(monkeypatch, capsys, "run", "toy.table", option, "taken")
    assert line == f"bnnbook: {option}: taken is not a folder"
    assert toy.calls == []


def forbid(folder, monkeypatch):
    """Let a folder that is there be one that cannot be written, whoever runs the tests."""
    Path(folder).mkdir()
    monkeypatch.setattr(os, "access", lambda p, mode: (Path(p), mode) != (Path(folder), os.W_OK))


def freeze(folder, monkeypatch):
    """Let a folder that is not there be one that cannot be made."""
    mkdir = Path.mkdir

    def refuse(path, *arguments, **options):
        if path == Path(folder):
            raise OSError(30, "Read-only file system", str(path))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)


@pytest.mark.parametrize("make", [forbid, freeze])
@pytest.mark.parametrize(("command", "option"), [
    (["run", "toy.table"], "--runs"), (["run", "toy.table"], "--results"),
    (["record"], "--runs"), (["record"], "--results"), (["record"], "--out"),
])  # fmt: skip
def test_a_folder_that_cannot_be_written_is_an_error_before_the_run(
    monkeypatch, capsys, toy, worked, make, command, option
):
    make("locked", monkeypatch)
    line = refused(monkeypatch, capsys, *command, option, "locked")
    assert line.startswith(f"bnnbook: {option}: locked")
    assert line.endswith("; name another folder")
    assert (toy.calls, worked) == ([], [])


def test_a_run_that_another_process_is_at_work_on_is_left_to_it(monkeypatch, capsys, toy):
    Path("runs").mkdir()
    with recording.lock(recording.Job("toy.table", "a", 0, "small"), Path("runs")):
        line = refused(monkeypatch, capsys, "run", "toy.table", "--variant", "a")
    assert "toy.table a seed 0: another process is at work on it" in line
    assert toy.calls == []
    invoke("run", "toy.table", "--variant", "a")
    assert len(toy.calls) == 1


def test_an_error_of_another_library_keeps_the_hint(monkeypatch, capsys, toy):
    """Its words are not ours, and may say nothing to the reader."""
    toy.then = lambda: torch.nn.Flatten(2, 1)(torch.zeros(2, 3, 4))
    code, _, err = call(monkeypatch, capsys, "run", "toy.table", "--variant", "a")
    assert code == 1
    assert err.splitlines()[-1] == "(BNNBOOK_DEBUG=1 shows the traceback)"
    toy.then = lambda: json.loads("{")  # a ValueError, but not one of ours
    code, _, err = call(monkeypatch, capsys, "run", "toy.table", "--variant", "a")
    assert code == 1
    assert err.splitlines()[-1] == "(BNNBOOK_DEBUG=1 shows the traceback)"


def test_an_unexpected_error_is_not_hidden(monkeypatch, toy):
    toy.then = lambda: {}["gone"]
    monkeypatch.setattr(sys, "argv", ["bnnbook", "run", "toy.table"])
    with pytest.raises(KeyError, match="gone"):
        cli.main()


# --- Data --------------------------------------------------------------------------------------


def test_data_lists_what_is_known_and_what_is_found(tmp_path):
    empty = invoke("data").stdout
    assert ", ".join(data.NAMES) in empty
    assert f"{tmp_path / 'data'}: none" in empty
    (tmp_path / "sets").mkdir()
    arrays = {"x_train": np.zeros((6, 4, 4), np.uint8), "y_train": np.arange(6) % 2,
              "x_test": np.ones((2, 4, 4), np.uint8), "y_test": np.arange(2)}  # fmt: skip
    np.savez(tmp_path / "sets" / "mine.npz", **arrays)
    assert "mine" in invoke("data", "--data", tmp_path / "sets").stdout
    assert "in torchvision's layout there: none\n" in empty
    (tmp_path / "sets" / "cifar-10-python.tar.gz").touch()
    shown = invoke("data", "--data", tmp_path / "sets").stdout
    assert "in torchvision's layout there: cifar10\n" in shown
    shown = invoke("data", "mine", "--data", tmp_path / "sets").stdout
    assert "6 train" in shown
    assert data.load("mine", tmp_path / "sets").sha256 in shown


def test_data_digits_prints_its_sha256():
    shown = invoke("data", "digits").stdout
    assert re.search(r"^sha256 ([0-9a-f]{64})$", shown, re.MULTILINE)[1] == (
        data.load("digits").sha256
    )
    assert "1300 train + 497 test" in shown


# --- Record ------------------------------------------------------------------------------------


@pytest.fixture
def worked(monkeypatch):
    """Note what `recording.work_through` is called with; all jobs are done, it answers."""
    calls = []

    def work_through(jobs, **options):
        calls.append({"jobs": [(j.variant, j.seed) for j in jobs], **options})
        return recording.Outcome(done=list(jobs))

    monkeypatch.setattr(recording, "work_through", work_through)
    return calls


def test_record_runs_what_is_missing_or_shortened(toy, worked):
    records.save(toy_record("a", 0, shortened="30 of 1000 epochs"))
    records.save(toy_record("b", 0))
    records.save(toy_record("b", 1, scale="small"))
    assert "5 recorded, 0 failed, 0 to do" in invoke("record", "--minutes", 5).stdout
    assert worked[0]["jobs"] == [("a", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert worked[0]["seconds"] == 300
    assert worked[0]["at_once"] == 1
    for variant, seed in worked[0]["jobs"]:
        records.save(toy_record(variant, seed), overwrite=True)
    invoke("record", "--minutes", 5)
    assert worked[1]["jobs"] == []


def test_record_elsewhere_counts_what_is_there_too(toy, worked, tmp_path):
    records.save(toy_record("a", 0))
    records.save(toy_record("b", 0), tmp_path / "out")
    invoke("record", "--seed", 0, "--seed", 1, "--out", tmp_path / "out", "--jobs", 3)
    assert worked[0]["jobs"] == [("a", 1), ("b", 1)]
    assert (worked[0]["results"], worked[0]["at_once"]) == (tmp_path / "out", 3)
    assert worked[0]["folders"] == [None, tmp_path / "out"]  # where a shared run's record may lie


def test_a_small_record_leaves_the_shipped_records_alone(toy, worked, monkeypatch):
    monkeypatch.delenv("BNNBOOK_RESULTS")
    invoke("record", "--scale", "small", "--runs", "my")
    assert worked[0]["results"] == Path("my")


def test_what_failed_is_told_at_the_end_with_its_traceback(toy, monkeypatch):
    jobs = [recording.Job("toy.table", "a", seed) for seed in range(3)]
    test = recording.Outcome(done=jobs[:1], failed={jobs[1]: "Traceback\nKeyError: 3\n"},
                             waiting=jobs[2:])  # fmt: skip
    monkeypatch.setattr(recording, "work_through", lambda jobs, **options: test)
    result = invoke("record", code=1)
    assert "toy.table a seed 1 failed:\nTraceback\nKeyError: 3\n" in result.output
    assert "1 recorded, 1 failed, 1 to do: the same command continues" in result.output
    test.interrupted = True
    invoke("record", code=130)


def test_one_reason_of_many_failures_is_told_once(toy, monkeypatch):
    jobs = [recording.Job("toy.table", "a", seed) for seed in range(3)]
    test = recording.Outcome(failed=dict.fromkeys(jobs, "digits is not here: put it there"))
    monkeypatch.setattr(recording, "work_through", lambda jobs, **options: test)
    output = invoke("record", code=1).output
    assert "toy.table a seed 0 and 2 more failed:\ndigits is not here: put it there\n" in output
    assert output.count("digits is not here") == 1
    assert "0 recorded, 3 failed, 0 to do" in output


def test_record_list_shows_every_state_and_runs_nothing(toy, worked):
    records.save(toy_record("a", 0, shortened="30 of 1000 epochs"))
    records.save(toy_record("b", 2))
    Path("runs").mkdir()
    torch.save({"epoch": 40}, "runs/toy.table-b-full-seed1.pt")
    lines = invoke("record", "--list", "--device", "cpu").stdout.splitlines()
    assert worked == []
    shown = [" ".join(line.split()) for line in lines[1:]]
    assert shown == [
        "– toy.table a 0: 30 of 1000 epochs, 1: missing, 2: missing",
        "– toy.table b 0: missing, 1: partial, 40 of 1000 epochs, 2: recorded",
    ]


def test_record_list_of_the_books_own_experiments():
    shown = invoke("record", "--list").stdout
    for name in experiments.names():
        assert (f" {name} " in shown) == ("full" in experiments.find(name)[2])


def test_record_imports_and_says_what(toy, tmp_path):
    records.save(toy_record("a", 0), tmp_path / "theirs")
    assert invoke("record", "--import", tmp_path / "theirs").stdout == (
        "toy.table/a-seed0.json: new\n"
    )
    assert records.find("toy.table", "a", 0) is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["record", "--minutes", 0], "the time must be positive"),
        (["record", "--minutes", "nan"], "the time must be positive, not nan minutes"),
        (["record", "--only", NAME], f"{NAME} has no full scale; known: small"),
        (["record", "--out", "file.json"], "file.json is not a folder"),
        (["record", "--import", "file.json"], "file.json is not a folder"),
        (["record", "--import", ".", "--list"], "leave out --list, --out"),
        (["record", "--import", ".", "--out", "records"], "leave out --list, --out"),
        (["record", "--jobs", 0], "at least one run at a time, not 0"),
        (["record", "--only", "nothing.here"], "unknown experiment 'nothing.here'; known: "),
        (["record", "--scale", "huge"], "unknown scale 'huge'; known: small, full"),
        (["record", "--import", "nowhere"], "nowhere is not a folder"),
        (["record", "--epochs", 0], "epochs must be at least 1, not 0"),
        (["run", NAME, "--epochs", -3], "epochs must be at least 1, not -3"),
    ],
)
def test_what_makes_no_sense_is_one_line(monkeypatch, capsys, arguments, words):
    Path("file.json").touch()
    assert words in refused(monkeypatch, capsys, *arguments)


@pytest.mark.parametrize(("text", "words"), [
    ("", "it is not JSON: "), ("{}", "it is not a record of bnnbook; nothing was imported"),
])  # fmt: skip
def test_a_stray_file_in_an_import_is_named(monkeypatch, capsys, text, words):
    Path("theirs").mkdir()
    Path("theirs/notes.json").write_text(text)
    line = refused(monkeypatch, capsys, "record", "--import", "theirs", hint=True)
    assert line.startswith("bnnbook: theirs/notes.json: ")
    assert words in line


def test_a_damaged_record_is_named_and_not_replaced(monkeypatch, capsys, toy, worked):
    path = records.save(toy_record("a", 0))
    path.write_text("{")
    assert str(path) in refused(monkeypatch, capsys, "record", "--minutes", 5, hint=True)
    assert worked == []
    assert path.with_name(path.name + ".corrupt").read_text() == "{"


# --- Ctrl-C ------------------------------------------------------------------------------------


SLOW = """
import sys, time
from bnnbook import cli, probes

step = probes.FlipRatio.step

def slow(self):
    step(self)
    print("stepping", flush=True)
    time.sleep(0.05)

probes.FlipRatio.step = slow
sys.argv[0] = "bnnbook"
cli.main()
"""


def test_sigint_leaves_a_checkpoint_and_the_same_command_continues(tmp_path):
    arguments = ["run", NAME, "--variant", "clipped", "--epochs", "2", "--device", "cpu"]
    command, pipe = [sys.executable, "-c", SLOW, *arguments], subprocess.PIPE
    with subprocess.Popen(command, env=environment(), stdout=pipe, stderr=pipe, text=True) as run:
        while "stepping" not in run.stdout.readline():
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    (checkpoint,) = Path("runs").iterdir()
    assert f"stopped; {checkpoint} holds the run" in errors
    assert "Traceback" not in errors
    assert torch.load(checkpoint, weights_only=True)["step"] > 0
    assert not list(Path("results").iterdir())

    done = program(*arguments)
    assert done.returncode == 0, done.stderr
    assert "continues" in done.stdout
    assert list(Path("runs").iterdir()) == []
    record = records.read(records.find(NAME, "clipped", 0, scale="small"))
    assert record.shortened == f"2 of {binaryconnect.RECIPES['clipping']['small'].epochs} epochs"
    assert len(record.history) == 2


def test_an_interrupted_run_gives_the_same_record(tiny, monkeypatch, tmp_path, press_ctrl_c_at):
    command = ["run", NAME, "--variant", "clipped", "--epochs", 2]
    invoke(*command, "--results", tmp_path / "straight")
    with monkeypatch.context() as patch:
        press_ctrl_c_at(23, patch)
        invoke(*command, code=130)
    invoke(*command)
    where = (NAME, "clipped", 0)
    straight = records.read(records.find(*where, tmp_path / "straight", "small"))
    resumed = records.read(records.find(*where, scale="small"))
    assert (resumed.metrics, resumed.arrays) == (straight.metrics, straight.arrays)
    assert without_time(resumed) == without_time(straight)


def test_a_run_of_another_length_does_not_continue_this_one(tiny, monkeypatch, press_ctrl_c_at):
    """Its learning rate falls at another pace."""
    command = ["run", NAME, "--variant", "clipped"]
    with monkeypatch.context() as patch:
        press_ctrl_c_at(5, patch)
        invoke(*command, "--epochs", 2, code=130)
    invoke(*command)
    record = records.read(records.find(NAME, "clipped", 0, scale="small"))
    start, end = record.recipe["lr_start"], record.recipe["lr_end"]
    assert [row["lr"] for row in record.history] == pytest.approx(
        [start, (start * end) ** 0.5, end], rel=1e-5
    )


def test_stopped_before_anything_was_saved(toy):
    def stop():
        raise KeyboardInterrupt

    toy.then = stop
    result = invoke("run", "toy.table", code=130)
    assert "nothing was saved" in result.stderr
    assert len(toy.calls) == 1
    assert not list(Path("results").iterdir())


def test_ctrl_c_while_the_record_is_written_loses_nothing(tiny, monkeypatch, press_ctrl_c_at):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    command = ["run", NAME, "--variant", "clipped"]
    with monkeypatch.context() as patch:
        patch.setattr(records, "save", interrupted)
        invoke(*command, code=130)
    press_ctrl_c_at(1, monkeypatch)  # no step is done again
    assert "continues" in invoke(*command).stdout
    assert len(records.read(records.find(NAME, "clipped", 0, scale="small")).history) == 3
    assert list(Path("runs").iterdir()) == []


def test_a_damaged_checkpoint_is_named_and_moved_aside(tiny, monkeypatch, capsys, press_ctrl_c_at):
    command = ["run", NAME, "--variant", "clipped"]
    with monkeypatch.context() as patch:
        press_ctrl_c_at(5, patch)
        invoke(*command, code=130)
    (checkpoint,) = Path("runs").iterdir()
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
    code, _, err = call(monkeypatch, capsys, *command)
    assert code == 1
    assert str(checkpoint) in err.splitlines()[0]
    assert [path.name for path in Path("runs").iterdir()] == [checkpoint.name + ".corrupt"]
    assert not list(Path("results").iterdir())
    invoke(*command)
    assert len(json.loads(records.find(NAME, "clipped", 0, scale="small").read_text())) > 1


def test_epochs_do_not_lengthen_a_recipe(tiny, monkeypatch, capsys):
    command = ["run", NAME, "--variant", "clipped"]
    code, _, err = call(monkeypatch, capsys, *command, "--epochs", 4)
    assert code == 1
    assert f"--epochs shortens a recipe: that of {NAME} has 3" in err
    invoke(*command, "--epochs", 3)
    assert records.read(records.find(NAME, "clipped", 0, scale="small")).shortened is None
    assert "is there already" in invoke(*command).stdout


@pytest.mark.parametrize("option", [("--only", NAME), ("--seed", 1), ("--epochs", 2)])
def test_an_import_chooses_nothing(option, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "record", "--import", "there", *option)
    assert code == 1
    assert "--import takes a whole folder" in err


def test_the_home_folder_of_unfinished_runs_has_its_short_name(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    invoke("run", NAME, "--variant", "clipped", "--runs", "~/runs")
    assert (tmp_path / "home" / "runs").is_dir()
    assert not Path("~").exists()
