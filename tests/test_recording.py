"""Recording many runs: their order, in parallel, in time, killed, failed, and imported."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bnnbook import data, experiments, graphs, probes, recording, records
from bnnbook.experiments import liu2021
from bnnbook.recording import Job

NAME = "binaryconnect.clipping"
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    """Records and data sets lie in an empty folder; this process and its helpers have a thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BNNBOOK_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("BNNBOOK_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("BNNBOOK_COMMIT", "abc")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(variant="clipped", seed=0, epochs=2):
    return Job(NAME, variant, seed, "small", epochs)


def record(variant="clipped", seed=0, epochs=2, **changes):
    """A made-up record of the small experiment."""
    values = {
        "experiment": NAME, "variant": variant, "seed": seed, "scale": "small",
        "shortened": f"{epochs} of 12 epochs", "dataset": "digits", "dataset_sha256": "00ff",
        "recipe": {"epochs": epochs}, "history": [{"epoch": i + 1} for i in range(epochs)],
        "metrics": {"test_error": 0.5}, "seconds": 3.0 * epochs,
        "environment": {"device": "Abacus 9000", "commit": "abc", "dirty": False},
    }  # fmt: skip
    return records.Record(**values | changes)


def same(one: records.Record, other: records.Record) -> bool:
    """Whether two runs gave the same numbers."""

    def numbers(r):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in r.history], r.metrics

    return numbers(one) == numbers(other)


# --- What is to do -----------------------------------------------------------------------------


def test_every_experiment_has_its_place_in_the_order():
    assert sorted(experiments.PRIORITY) == sorted(experiments.names())


def test_the_first_seed_of_everything_comes_first():
    jobs = recording.all_jobs()
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    first = [job.experiment for job in jobs if job.seed == 0]
    assert list(dict.fromkeys(first)) == [
        name for name in experiments.PRIORITY if "full" in experiments.find(name)[2]
    ]
    assert len(jobs) == len(set(jobs)) == 3 * len(first)


def test_only_what_was_asked_for():
    jobs = recording.all_jobs("small", [NAME], seeds=[7], epochs=2)
    assert jobs == [small("clipped", 7), small("unclipped", 7)]
    with pytest.raises(ValueError, match=r"unknown experiment 'binaryconnect\.table9'"):
        recording.all_jobs(only=["binaryconnect.table9"])


def test_what_has_no_full_scale_is_an_error_and_not_nothing():
    with pytest.raises(ValueError, match=f"{NAME} has no full scale; known: small"):
        recording.all_jobs("full", ["binaryconnect.table2", NAME])


def test_a_papers_name_means_all_its_experiments():
    jobs = recording.all_jobs("full", ["binaryconnect"], [0])
    named = {n for n in experiments.names() if n.startswith("binaryconnect.")}
    assert {job.experiment for job in jobs} == named - {NAME}
    assert jobs == [j for j in recording.all_jobs(seeds=[0]) if j.experiment in named]
    with pytest.raises(ValueError, match="unknown experiment 'binary'"):
        recording.all_jobs(only=["binary"])


def test_the_order_is_the_books():
    first = ["quist2023.order", "quist2023.alpha_sweep", "quist2023.alpha_decay",
             "quist2023.scale_invariance", "helwegen2019.figure1", "helwegen2019.section52_short",
             "binaryconnect.table2_cifar10", "alexnet.figure1"]  # fmt: skip
    assert list(experiments.PRIORITY[: len(first)]) == first


def test_the_states_of_a_run(tmp_path):
    runs, job = tmp_path / "runs", small(epochs=None)

    def kind(of=job, folders=(None,)):
        return recording.state(of, folders, runs).kind

    assert kind() == "missing"
    records.save(record(epochs=5))
    assert (kind(), recording.state(job, [None], runs).words) == ("shortened", "5 of 12 epochs")
    # asked for a shorter run, a longer one will do
    assert [kind(small(epochs=n)) for n in (4, 5, 6)] == ["recorded", "recorded", "shortened"]
    runs.mkdir()
    job.checkpoint(runs).touch()
    assert kind() == "partial"
    records.save(record(epochs=12, shortened=None), tmp_path / "elsewhere")
    assert kind() == "partial"
    assert kind(folders=[None, tmp_path / "elsewhere"]) == "recorded"
    assert small().checkpoint(runs) != job.checkpoint(runs)  # another length is another run


ABACUS = ("Abacus 9000", "float32")


def write_checkpoint(job, epoch):
    """Write the part of a checkpoint that tells how far it is."""
    path = job.checkpoint(Path("runs"))
    path.parent.mkdir(exist_ok=True)
    torch.save({"epoch": epoch, "model": [torch.zeros(3)]}, path)
    return path


def test_how_far_a_checkpoint_is():
    job, runs = small(epochs=None), Path("runs")
    path = write_checkpoint(job, 11)
    assert recording.state(job, [None], runs).words == "partial, 11 of 12 epochs"
    path.write_bytes(path.read_bytes()[:100])
    assert recording.state(job, [None], runs).words == "partial, 0 of 12 epochs"
    path.unlink()
    assert recording.epochs_done(path) == recording.epochs_done(path / "none.pt") == 0


def write_trainings(job):
    """Write the checkpoints of a run of several trainings: 3 and 2 epochs, and one damaged."""
    folder = job.checkpoint(Path("runs"))
    for name, epochs in {"first.pt": 3, "rate0.1/epoch0.pt": 2}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rows = [{"epoch": n + 1, "seconds": 5.0} for n in range(epochs)]
        torch.save({"epoch": epochs, "rows": rows, "model": [torch.zeros(3)]}, folder / name)
    (folder / "last.pt").write_bytes(b"damaged")
    (folder / "last.pt.17.part").write_bytes(b"half")
    return folder


def test_how_far_a_run_of_several_trainings_is():
    job, runs = small(epochs=None), Path("runs")
    folder = write_trainings(job)
    words = "partial, 5 epochs of several trainings"
    assert recording.state(job, [None], runs) == recording.State("partial", words)
    assert recording.epochs_and_seconds(folder) == (5, 25.0)
    assert recording.epochs_done(folder) == 0  # not of the job's own 12
    shutil.rmtree(folder)
    folder.mkdir()
    words = "partial, 0 epochs of several trainings"
    assert recording.state(job, [None], runs).words == words


def test_checkpoints_of_cpu_and_gpu_do_not_meet(monkeypatch):
    """A GPU computes with another precision and would refuse the CPU's checkpoint."""
    job, runs = small(), Path("runs")
    assert job.checkpoint(runs, "cpu").name == f"{NAME}-clipped-small-2epochs-seed0.pt"
    runs.mkdir()
    job.checkpoint(runs, "cpu").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    names = {job.checkpoint(runs, device).name for device in ("auto", "cuda", "cuda:1")}
    assert names == {f"{NAME}-clipped-small-2epochs-seed0-cuda.pt"}
    kinds = [recording.state(job, [None], runs, device).kind for device in ("cpu", "cuda")]
    assert kinds == ["partial", "missing"]
    with recording.lock(job, runs) as is_ours:
        assert is_ours
        assert [path.suffix for path in sorted(runs.iterdir())] == [".pt", ".lock"]


def test_checkpoints_of_two_precisions_do_not_meet(monkeypatch):
    """But their records would be the same file, so they share a lock."""
    job, runs = small(), Path("runs")
    runs.mkdir()
    monkeypatch.setenv("BNNBOOK_PRECISION", "bfloat16")
    path = job.checkpoint(runs, "cpu")
    assert path.name == f"{NAME}-clipped-small-2epochs-seed0-bfloat16.pt"
    path.touch()
    with recording.lock(job, runs) as is_ours:
        assert is_ours
        monkeypatch.setenv("BNNBOOK_PRECISION", "float32")
        assert job.checkpoint(runs, "cpu").name == f"{NAME}-clipped-small-2epochs-seed0.pt"
        assert recording.state(job, [None], runs, "cpu").kind == "missing"
        with recording.lock(job, runs) as is_another:
            assert not is_another


def test_minutes_are_those_measured_in_the_same_conditions():
    records.save(record(epochs=5))
    there = recording.seconds_an_epoch(ABACUS, [None])
    assert recording.estimate(small(epochs=None), there) == 3.0 * 12
    assert recording.estimate(small(epochs=4), there) == 3.0 * 4
    assert recording.estimate(small(epochs=4), there, done=3) == 3.0
    assert recording.estimate(Job("binaryconnect.table2", "none", 0), there) is None
    assert recording.seconds_an_epoch(("Abacus 10000", "float32"), [None]) == {}
    assert recording.seconds_an_epoch(("Abacus 9000", "bfloat16"), [None]) == {}


def test_the_minutes_of_several_trainings_are_those_of_all():
    """Such a record's history is that of the last training, or has the epochs of all of them."""
    recipe = {"epochs": 4, "dataset": "mnist"}
    rows = [{"epoch": n + 1, "seconds": 2.0} for n in range(4)]
    two = record(epochs=4, recipe=recipe, history=rows, seconds=16.0)
    search = record(epochs=4, recipe=recipe, history=3 * rows, seconds=24.0)
    for each in (two, search):
        records.save(each, overwrite=True)
        there = recording.seconds_an_epoch(ABACUS, [None])
        assert recording.estimate(small(epochs=4), there) == each.seconds
        assert recording.estimate(small("unclipped", epochs=8), there) == 2 * each.seconds
        assert there[recording._alike(recipe)] == 2.0  # what it has in common with others


def test_each_variant_has_minutes_of_its_own():
    records.save(record("clipped", seconds=2.0))
    records.save(record("unclipped", seconds=8.0))
    there = recording.seconds_an_epoch(ABACUS, [None])
    assert [recording.estimate(small(v), there) for v in ("clipped", "unclipped")] == [2.0, 8.0]


def test_an_experiment_without_a_record_takes_the_minutes_of_one_like_it():
    """The same network on the same data in the same batches takes as long."""
    recipe = vars(experiments.find("helwegen2019.figure1")[2]["full"])
    records.save(record("bop", experiment="helwegen2019.figure1", scale="full", recipe=recipe))
    there = recording.seconds_an_epoch(ABACUS, [None])
    assert recording.estimate(Job("helwegen2019.latent_inference", "adam", 0), there) == 3.0 * 100
    other = Job("helwegen2019.section52", "bop", 0)  # in batches of 50
    assert recording.estimate(other, there) is None


# --- Many runs ---------------------------------------------------------------------------------


def test_runs_side_by_side_equal_runs_one_by_one(tmp_path):
    jobs = [small("clipped"), small("unclipped"), small("clipped", 1)]
    said = []
    outcome = recording.work_through(jobs, seconds=300, at_once=2, say=said.append)
    assert sorted(map(str, outcome.done)) == sorted(map(str, jobs))
    assert (outcome.failed, outcome.stopped, outcome.waiting) == ({}, [], [])
    assert sorted(said[:2]) == sorted(f"{job} starts" for job in jobs[:2])
    assert [line.endswith(" starts") for line in said].count(True) == 3
    assert [" -> " in line for line in said].count(True) == 3
    assert len(said) == 6
    for job in jobs:
        recording.run(job, results=tmp_path / "alone", runs=tmp_path / "alone")
        alone = recording.read_record(job, tmp_path / "alone")
        assert same(recording.read_record(job, None), alone)
    assert not list(tmp_path.glob("runs/*"))


# --- One run in several experiments ------------------------------------------------------------

ONE, DECAY = "liu2021.two_step", "liu2021.weight_decay"  # without decay, the latter is one step


def one_step(name=ONE, variant="one-step", epochs=1, **settings):
    return Job(name, variant, 0, "small", epochs, **settings)


def test_the_same_runs_of_other_experiments():
    assert set(experiments.same_runs("bulat2021.experts", "four", "full")) == {
        ("bulat2021.gate", "softmax"), ("bulat2021.start", "replicated")}  # fmt: skip
    assert experiments.same_runs("bulat2021.experts", "two", "full") == ()
    named = {name for name, _ in experiments.same_runs("quist2023.order", "second-none", "full")}
    assert named == {"quist2023.alpha_sweep"}  # and not "spectra", which records more
    assert experiments.same_runs("beyond.rates", "free-0.1", "small") == (
        ("beyond.alphas_middle", "0.1"),)  # fmt: skip
    assert experiments.same_runs("helwegen2019.figure1", "middle", "full") == ()


@pytest.mark.parametrize("paper", experiments.MODULES, ids=lambda paper: paper.__name__)
def test_runs_of_one_recipe_are_one_run_whatever_the_experiment(paper, monkeypatch):
    """What lets a record stand for several: only its name tells of which experiment it is."""
    names = getattr(paper, "BY_RECIPE", ())
    if not names:
        pytest.skip("each of this paper's experiments measures something of its own")
    first = paper.VARIANTS[names[0]][0]
    recipe = paper.find_recipe(names[0], first, "small", 3)  # as many as bulat2021 has stages
    with monkeypatch.context() as patch:
        patch.setattr(paper, "find_recipe", lambda *_: recipe)
        done = [getattr(paper, name)(paper.VARIANTS[name][-1], epochs=recipe.epochs, device="cpu")
                for name in names]  # fmt: skip
    assert len({r.experiment for r in done}) == len(names)
    for other in done[1:]:
        assert same(done[0], other)
        assert (done[0].recipe, done[0].arrays) == (other.recipe, other.arrays)


def test_a_run_of_two_experiments_is_made_once(tmp_path):
    jobs, said = [one_step(), one_step(DECAY, "0x")], []
    outcome = recording.work_through(jobs, seconds=300, at_once=2, say=said.append)
    assert (outcome.done, outcome.failed) == (jobs, {})
    copied = records.record_path(DECAY, "0x", 0, "small")
    assert [said[0], *said[2:]] == [
        f"{jobs[0]} starts", f"{jobs[1]} starts",  # after the first has ended
        f"{jobs[1]}: the run of {ONE} one-step, its record copied -> {copied}",
    ]  # fmt: skip
    made, copy = (recording.read_record(job, None) for job in jobs)
    assert (copy.experiment, copy.variant) == (DECAY, "0x")
    assert vars(copy) | {"experiment": ONE, "variant": "one-step"} == vars(made)
    recording.run(jobs[1], results=tmp_path / "alone", runs=tmp_path / "alone")
    assert same(copy, recording.read_record(jobs[1], tmp_path / "alone"))


def shared(job, folder=None):
    there = recording.state(job, [folder], Path("runs"), "cpu")
    assert (there.kind == "shared") == (recording.same_run(job, [folder], "cpu") is not None)
    assert not (there.kind == "shared" and there.is_done)  # its record is still to be copied
    return there.kind == "shared"


def test_which_record_of_another_experiment_is_the_run_asked_for(tmp_path, monkeypatch):
    def there(**changes):
        changes = {"experiment": ONE, "variant": "one-step"} | changes
        records.save(record(epochs=2) if not changes else record(**{"epochs": 2} | changes),
                     tmp_path / "r", overwrite=True)  # fmt: skip

    def is_shared(epochs, **changes):
        return shared(one_step(DECAY, "0x", epochs, **changes), tmp_path / "r")

    there()
    assert is_shared(2)
    words = recording.state(one_step(DECAY, "0x", 2), [tmp_path / "r"], Path("runs"), "cpu").words
    assert words == f"same run as {ONE} one-step"
    assert not is_shared(1)  # a longer run is another one: the learning rates differ
    assert not is_shared(3)
    assert not is_shared(None)
    monkeypatch.setenv("BNNBOOK_PRECISION", "bfloat16")
    assert not is_shared(2)
    monkeypatch.delenv("BNNBOOK_PRECISION")
    there(shortened=None, recipe={"epochs": 6})
    assert is_shared(None)
    assert is_shared(6)
    assert not is_shared(2)  # or the shortened runs of a comparison had no partner
    assert not shared(one_step(DECAY, "1x", 2), tmp_path / "r")
    assert not shared(replace(one_step(DECAY, "0x", 2), seed=1), tmp_path / "r")


def test_a_run_of_two_experiments_has_one_lock_and_one_checkpoint(tmp_path):
    """Whichever of them begins it: another call waits, or goes on from there."""
    here, there = one_step(), one_step(DECAY, "0x")
    assert here.checkpoint(tmp_path) == there.checkpoint(tmp_path)
    with recording.lock(here, tmp_path) as ours, recording.lock(there, tmp_path) as theirs:
        assert (ours, theirs) == (True, False)
    assert here.file_name != one_step(DECAY, "1x").file_name
    crew = recording._Crew("cpu", None, Path("runs"), 2, None, str)
    crew.running = {1: (here, None)}
    assert not crew.is_free(there)
    assert crew.is_free(replace(there, seed=1))
    assert crew.is_free(one_step(DECAY, "1x"))
    assert recording.state(there, [None], Path("runs"), "cpu").kind == "missing"
    Path("runs").mkdir()
    here.checkpoint(Path("runs")).mkdir()
    assert recording.state(there, [None], Path("runs"), "cpu").kind == "partial"


def test_a_run_that_needs_only_a_copy_takes_no_time(tmp_path):
    job = one_step(DECAY, "0x")
    crew = recording._Crew("cpu", None, Path("runs"), 1, None, str)
    crew.measured = {(DECAY, "small"): 100.0}
    assert crew.remaining(job) == 100.0
    records.save(record(experiment=ONE, variant="one-step", epochs=1))
    assert crew.remaining(job) == 0.0
    checkpoint = job.checkpoint(Path("runs"))
    checkpoint.mkdir(parents=True)
    assert recording.state(job, [None], Path("runs"), "cpu").kind == "shared"


def test_a_record_that_could_not_be_imported_is_not_copied(tmp_path):
    """At full scale: of it, the import would refuse all that came with it."""
    full = Job("bulat2021.gate", "softmax", 0, "full", 9)
    of_changed = {"device": "Abacus 9000", "commit": "abc", "dirty": True}
    four = {"experiment": "bulat2021.experts", "variant": "four", "scale": "full", "epochs": 9}
    records.save(record(**four, environment=of_changed))
    assert recording.same_run(full, [None], "cpu") is None
    records.save(record(**four), overwrite=True)
    assert recording.same_run(full, [None], "cpu").variant == "four"


def test_a_run_whose_record_to_copy_is_damaged_is_made():
    path = records.save(record(experiment=ONE, variant="one-step", epochs=1))
    path.write_text("{")
    jobs = [one_step(DECAY, "0x"), small()]
    outcome = recording.work_through(jobs, seconds=300, say=str)
    assert (outcome.done, outcome.failed) == (jobs, {})
    assert not path.exists()  # it was moved aside


def test_of_several_records_of_the_run_the_latest_is_copied():
    started = "2026-11-2{}T09:20+00:00"
    for day, name, variant in ((1, "experts", "two"), (3, "start", "replicated"),
                               (2, "experts_cifar100", "two")):  # fmt: skip
        records.save(record(experiment=f"bulat2021.{name}", variant=variant,
                            started=started.format(day)))  # fmt: skip
    job = one_step("bulat2021.gate", "softmax", 2)
    assert recording.same_run(job, [None], "cpu").experiment == "bulat2021.start"


def test_records_of_another_folder_are_copied_too(tmp_path):
    """As with --out: the other experiment's record is among those that are there already."""
    records.save(record(experiment=ONE, variant="one-step", epochs=1), tmp_path / "package")
    out = tmp_path / "out"
    outcome = recording.work_through([one_step(DECAY, "0x")], seconds=300, results=out,
                                     folders=[tmp_path / "package"], say=str)  # fmt: skip
    assert outcome.done == [one_step(DECAY, "0x")]
    assert [r.experiment for r in records.read_all(root=out)] == [DECAY]


def test_a_shortened_record_gives_way_to_a_shared_one_of_the_whole_run(tmp_path):
    job = one_step(DECAY, "0x", None)
    records.save(record(experiment=DECAY, variant="0x", epochs=1))
    records.save(record(experiment=ONE, variant="one-step", shortened=None))
    assert recording.work_through([job], seconds=300, say=str).done == [job]
    assert recording.read_record(job, None).shortened is None


# --- What fails --------------------------------------------------------------------------------


def test_a_run_that_fails_does_not_stop_the_others():
    jobs, said = [small("unclipped"), small()], []
    Path("runs").mkdir()
    jobs[0].checkpoint(Path("runs")).write_text("")
    outcome = recording.work_through(jobs, seconds=300, say=said.append)
    assert outcome.done == jobs[1:]
    assert list(outcome.failed) == jobs[:1]
    assert outcome.failed[jobs[0]].startswith("Traceback")
    assert "is not a whole checkpoint" in outcome.failed[jobs[0]]
    assert said[0] == f"{jobs[0]} starts"
    assert said[1].startswith(f"{jobs[0]}: failed, ")


def test_a_run_that_cannot_be_a_cuda_graph_starts_anew_without(monkeypatch):
    """In another process, for the GPU may have left the first one unfit; so do its like."""
    asked, said = [], []

    def run(job, *arguments):
        asked.append(os.environ.get("BNNBOOK_GRAPHS"))
        if asked[-1] != "0":
            raise graphs.GraphError("operation not permitted when stream is capturing")
        return "done", f"{job} done"

    def start(crew, job):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        with monkeypatch.context() as patch:  # as a process has an environment of its own
            patch.setenv("BNNBOOK_GRAPHS", "1")
            graph = job.experiment not in crew.stepwise
            recording._work(job, theirs, *crew.settings, graph)
        crew.running[ours] = job, Reported()

    monkeypatch.setattr(recording, "_run_unless_another_does", run)
    monkeypatch.setattr(recording, "_obey_the_parent_only", lambda: None)
    monkeypatch.setattr(recording.signal, "signal", lambda *_: None)
    monkeypatch.setattr(recording._Crew, "start", start)
    jobs = [small(), small(seed=1), Job("quist2023.order", "second-none", 0, "small", 2)]
    outcome = recording.work_through(jobs, seconds=300, say=said.append)
    assert asked == ["1", "0", "0", "1", "0"]
    assert (outcome.done, outcome.failed) == (jobs, {})
    assert said[1] == (f"{jobs[0]} starts anew without CUDA graphs: operation not permitted when "
                       "stream is capturing")  # fmt: skip


def test_a_data_set_that_is_lacking_is_told_once_and_costs_no_more_time(tmp_path):
    """What needs it is not tried again, and what needs another goes on."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "mnist.npz").write_bytes(b"PK\x03\x04 cut short")
    jobs = [Job("binaryconnect.table2", "none", seed, "full", 1) for seed in range(3)]
    said = []
    outcome = recording.work_through([*jobs, small()], seconds=300, say=said.append)
    assert outcome.done == [small()]
    assert list(outcome.failed) == jobs
    (why,) = set(outcome.failed.values())
    assert why.startswith(str(folder / "mnist.npz"))
    assert "\n" not in why
    assert said[1] == f"{jobs[0]} and 2 more on mnist: failed, {why}"
    assert [line for line in said if "starts" in line] == [
        f"{jobs[0]} starts",
        f"{small()} starts",
    ]


def test_images_that_only_the_reader_has_are_told_once_too():
    jobs = [Job("alexnet.kernels", v, 0, "full", 1) for v in ("two-towers", "one-tower")]
    said = []
    outcome = recording.work_through(jobs, seconds=300, device="cpu", say=said.append)
    assert list(outcome.failed) == jobs
    (why,) = set(outcome.failed.values())
    assert "put a tiny-imagenet-20.npz there" in why
    others = f"{jobs[0]} and 1 more on tiny-imagenet-20: failed, {why}"
    assert said == [f"{jobs[0]} starts", others]


def test_runs_side_by_side_on_a_lacking_data_set_say_so_once():
    said, jobs = [], [Job("quist2023.order", "second-none", seed) for seed in range(4)]
    crew = recording._Crew("cpu", None, Path("runs"), 2, None, said.append)
    crew.outcome.waiting = jobs[2:]
    crew.note(jobs[0], "lacking", "it is not there, says the first")
    crew.note(jobs[1], "lacking", "it is not there, says the second")
    assert len(said) == 1
    assert sorted(map(str, crew.outcome.failed)) == sorted(map(str, jobs))
    assert set(crew.outcome.failed.values()) == {"it is not there, says the first"}
    assert crew.outcome.waiting == []


def test_what_a_run_took_is_the_measure_of_those_to_come():
    crew = recording._Crew("cpu", None, Path("runs"), 1, None, lambda line: None)
    assert crew.remaining(small()) == 0
    here = {"device": records.device_name("cpu"), "commit": "abc", "dirty": False}
    for device, seconds in ((here, 6.0), (here | {"device": "Abacus 9000"}, 60.0)):
        records.save(record(environment=device, seconds=seconds), overwrite=True)
        crew.note(small(), "done", "it is done")
    assert crew.remaining(small(epochs=9)) == 3.0 * 9
    assert crew.remaining(small("unclipped", epochs=9)) == 3.0 * 9


def test_a_run_that_is_almost_done_is_not_passed_over(monkeypatch):
    """149 of 150 epochs are done: one is left, not 150."""
    write_checkpoint(small(epochs=150), 149)
    pace = {(NAME, "small"): 10.0}
    crew = recording._Crew("auto", None, Path("runs"), 1, None, lambda line: None, pace)
    crew.outcome.waiting = [small(epochs=100), small(epochs=150)]
    monkeypatch.setattr(crew, "start", lambda job: crew.running.update(begun=job))
    crew.fill(20)
    assert crew.running == {"begun": small(epochs=150)}


def test_what_several_trainings_have_taken_is_not_to_come():
    job = small(epochs=None)
    crew = recording._Crew("auto", None, Path("runs"), 1, None, print, {(NAME, "small"): 3.0})
    assert crew.remaining(job) == 3.0 * 12
    write_trainings(job)
    assert crew.remaining(job) == 3.0 * 12 - 25.0
    crew.measured = {(NAME, "small"): 1.0}
    assert crew.remaining(job) == 0


def test_processes_share_the_threads_that_this_one_may_use(monkeypatch):
    """On one core of 64, or with OMP_NUM_THREADS, that is not the machine's number of cores."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    torch.set_num_threads(6)
    for at_once, threads in ((1, None), (2, 3), (4, 1), (9, 1)):
        crew = recording._Crew("cpu", None, Path("runs"), at_once, None, print)
        assert crew.settings[3] == threads


def test_full_scale_records_without_a_commit_are_warned_of_before_they_are_made(monkeypatch):
    monkeypatch.setattr(recording._Crew, "fill", lambda crew, left: crew.outcome.waiting.clear())
    job, warned = Job("quist2023.order", "second-none", 0), []
    states = {("abc", False): "", ("abc", True): "was changed", (None, None): "BNNBOOK_COMMIT"}
    for state, words in states.items():
        monkeypatch.setattr(records, "git_state", lambda state=state: state)
        said = []
        recording.work_through([small(), job], seconds=9, say=said.append)
        assert [words in line for line in said] == [True] * bool(words)
        recording.work_through([small()], seconds=9, say=warned.append)
    assert warned == []


@pytest.mark.parametrize("seconds", [0, -60.0, float("nan")])
def test_a_time_that_is_none_is_refused(seconds):
    with pytest.raises(ValueError, match=r"the time must be positive, not (0|-1|nan) minutes"):
        recording.work_through([small()], seconds=seconds)


@pytest.mark.parametrize("minutes", [-1.0, float("nan")])
def test_a_time_between_checkpoints_that_is_none_is_refused(minutes):
    with pytest.raises(ValueError, match=r"minutes between checkpoints: 0 or more, not (-1|nan)"):
        recording.work_through([small()], seconds=60, checkpoint_minutes=minutes)


@pytest.mark.parametrize(("at_once", "is_shown"), [(1, False), (2, True)])
def test_one_run_alone_has_the_terminal_for_its_own_bar(monkeypatch, at_once, is_shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    crew = recording._Crew("cpu", None, Path("runs"), at_once, None, print)
    assert crew.bar.disable is not is_shown


def test_the_time_is_kept_and_a_later_call_continues(tmp_path):
    """5000 epochs do not fit: the run is stopped with a checkpoint, which the next call finds."""
    jobs, began = [small(epochs=5000), small("unclipped")], time.monotonic()
    outcome = recording.work_through(jobs, seconds=20, say=lambda line: None)
    assert time.monotonic() - began < 25
    assert (outcome.stopped, outcome.waiting, outcome.done) == (jobs[:1], jobs[1:], [])
    assert recording.state(jobs[0], [None], Path("runs")).kind == "partial"
    # With a measured pace the run that fits goes first.
    pace = {(NAME, "small"): 1.0}
    outcome = recording.work_through(jobs, seconds=30, measured=pace, say=lambda line: None)
    assert outcome.done == jobs[1:]
    assert outcome.stopped == jobs[:1]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def count_steps(monkeypatch):
    """Return a list that grows by 1 with every step of a training in this process."""
    steps, step = [], probes.FlipRatio.step

    def counted(probe):
        steps.append(1)
        step(probe)

    monkeypatch.setattr(probes.FlipRatio, "step", counted)
    return steps


def start_worker(job, runs):
    """Start a process that writes a checkpoint after every step."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe(duplex=False)
    settings = "cpu", None, runs, 1, 0.0
    process = context.Process(target=recording._work, args=(job, theirs, *settings))
    process.start()
    theirs.close()
    return process, pipe


def position(checkpoint):
    """How far a checkpoint is: (epochs, steps)."""
    state = torch.load(checkpoint, weights_only=True)
    return state["epoch"], state["step"]


def test_killed_and_continued_equals_uninterrupted(tmp_path, monkeypatch):
    job, runs = small(epochs=4), tmp_path / "runs"
    straight, _ = recording.run(job, device="cpu", results=tmp_path / "straight", runs=runs)
    checkpoint = job.checkpoint(runs, "cpu")
    process, _ = start_worker(job, runs)
    wait_for(lambda: checkpoint.exists() and position(checkpoint) > (1, 0))
    seen = position(checkpoint)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = position(checkpoint)
    assert kept >= seen  # all that was saved before the end is there
    assert recording.read_record(job, None) is None
    steps = count_steps(monkeypatch)
    resumed, path = recording.run(job, device="cpu", runs=runs)
    assert same(resumed, straight)
    recipe = job.recipe  # and only what came after it is done again
    an_epoch = (1300 - recipe.validation) // recipe.batch_size
    assert len(steps) == (4 - kept[0]) * an_epoch - kept[1]
    assert not checkpoint.exists()
    assert records.read(path).metrics == straight.metrics


def test_a_process_that_still_starts_is_stopped_and_has_not_failed():
    """Python needs seconds to import torch: until then it must not die of SIGTERM."""
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    outcome = recording.work_through([small(epochs=5000)], seconds=300, say=lambda line: None)
    assert outcome.interrupted
    assert (outcome.stopped, outcome.failed) == ([small(epochs=5000)], {})


def test_a_signal_while_a_process_ends_loses_no_job(monkeypatch):
    """What a process reported is noted, whenever Ctrl-C comes."""

    class Ends(Reported):
        def join(self, timeout=None):
            os.kill(os.getpid(), signal.SIGINT)

    def start(crew, job):
        pipe, theirs = multiprocessing.Pipe(duplex=False)
        theirs.send(("done", "recorded"))
        crew.running[pipe] = job, Ends()

    monkeypatch.setattr(recording._Crew, "start", start)
    outcome = recording.work_through([small(), small(seed=1)], seconds=9, say=lambda line: None)
    assert (outcome.done, outcome.waiting) == ([small()], [small(seed=1)])
    assert outcome.interrupted


class Reported:
    """A process that has reported and yet does not end."""

    exitcode, killed = -9, False

    def join(self, timeout=None):
        assert timeout is not None or self.killed, "it waits for ever"

    def kill(self):
        self.killed = True


@pytest.mark.parametrize("sent", [b"", b"\0\0\1\0 cut short"], ids=["nothing", "half"])
def test_a_process_that_dies_while_it_reports_has_failed(sent):
    ours, theirs = multiprocessing.Pipe(duplex=False)
    os.write(theirs.fileno(), sent)
    theirs.close()
    said = []
    crew = recording._Crew("cpu", None, Path("runs"), 1, None, said.append)
    crew.running[ours] = small(), Reported()
    crew.collect(1)
    words = "the process died without a word (exit status -9)"
    assert crew.outcome.failed == {small(): words}
    assert said == [f"{small()}: failed, {words}"]


def test_one_of_two_calls_runs_a_job(tmp_path):
    job, said = small(), []
    Path("runs").mkdir()
    with recording.lock(job, Path("runs")) as is_ours:
        assert is_ours
        with recording.lock(job, Path("runs")) as is_another:
            assert not is_another
        outcome = recording.work_through([job], seconds=60, say=said.append)
    assert (outcome.stopped, outcome.failed) == ([job], {})
    assert said[1:] == [f"{job}: left to another process, which is at work on it"]
    path = records.save(record())
    before = path.read_bytes()
    outcome = recording.work_through([job], seconds=60, say=said.append)
    assert outcome.done == [job]
    assert said[3:] == [f"{job}: recorded by another process"]
    assert path.read_bytes() == before
    assert not list(Path("runs").iterdir())


def test_runs_of_two_lengths_share_a_lock():
    """For their records would be the same file, and the shorter could replace the longer."""
    Path("runs").mkdir()
    with recording.lock(small(epochs=3), Path("runs")) as is_ours:
        assert is_ours
        with recording.lock(small(epochs=None), Path("runs")) as is_another:
            assert not is_another


def test_jobs_with_too_few_epochs_for_their_steps_are_left_out():
    jobs, said = recording.all_jobs(only=["liu2021"], epochs=1), []
    left = recording.possible(jobs, said.append)
    gone = {f"{job.experiment} {job.variant}" for job in set(jobs) - set(left)}
    assert {"liu2021.steps_short two-step-1x", "liu2021.steps_long twice-4x"} <= gone
    assert not any("one-step" in name for name in gone)
    assert said == [f"{name} is left out: 2 steps cannot share 1 epochs" for name in sorted(gone)]
    assert recording.possible(recording.all_jobs(), said.append) == recording.all_jobs()


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    checkpoint = small(epochs=1).checkpoint(tmp_path / "runs")
    path = records.record_path(NAME, "clipped", 0, "small")
    parts = [
        tmp_path / "runs" / f"{checkpoint.name}.17.part",
        path.with_name(f".{path.name}.17.part"),
    ]
    other = path.with_name(".unclipped-seed0.json.17.part")
    for part in (*parts, other):
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    folder = Job("binaryconnect.table1", "adam", 0).checkpoint(tmp_path / "runs")
    (folder / "rate0.1").mkdir(parents=True)
    within = [folder / "run.pt.17.part", folder / "rate0.1" / "epoch0.pt.17.part"]
    for part in within:
        part.touch()
    recording.work_through([small(epochs=1)], seconds=60, say=lambda line: None)
    assert [part.exists() for part in (*parts, other)] == [False, False, True]
    job = Job("binaryconnect.table1", "adam", 0)
    recording._remove_parts(job, None, tmp_path / "runs", "auto")
    assert [part.exists() for part in within] == [False, False]


@pytest.mark.parametrize("folder", ["results", "runs"])
def test_a_folder_that_cannot_be_written_is_an_error_before_hours_of_work(monkeypatch, folder):
    monkeypatch.setattr(recording._Crew, "start", lambda crew, job: pytest.fail("it began"))
    Path("file").touch()
    with pytest.raises(OSError, match="file"):
        recording.work_through([small()], seconds=9, **{folder: Path("file") / "in it"})
    with pytest.raises(NotADirectoryError, match=r"^file is not a folder$"):
        recording.work_through([small()], seconds=9, **{folder: Path("file")})
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "read-only")
    with pytest.raises(PermissionError, match="read-only cannot be written"):
        recording.work_through([small()], seconds=9, **{folder: Path("read-only")})


def test_a_worker_without_a_first_process_ends_in_silence(tmp_path, capfd):
    job = small(epochs=5000)
    process, pipe = start_worker(job, tmp_path / "runs")
    pipe.close()
    wait_for(job.checkpoint(tmp_path / "runs", "cpu").exists)
    process.terminate()
    process.join(60)
    assert (process.exitcode, capfd.readouterr().err) == (0, "")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_stays_behind(tmp_path, number):
    """Whether the first process is asked to stop or killed, its helper saves and ends."""
    job = Job("alexnet.kernels", "two-towers", 0, "small", None)  # which takes some seconds
    command = [sys.executable, "-m", "bnnbook", "record", "--scale", "small", "--only",
               job.experiment, "--seed", "0", "--checkpoint-minutes", "0.001"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    checkpoint = job.checkpoint(tmp_path / "runs")
    wait_for(checkpoint.exists)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "stopped, its checkpoint continues it" in out
        assert "0 recorded, 0 failed, 2 to do: the same command continues" in out
    assert children
    wait_for(lambda: not any(is_running(child) for child in children))
    assert checkpoint.exists()
    assert not list((tmp_path / "runs").glob("*.part"))


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- Import ------------------------------------------------------------------------------------


@pytest.fixture
def theirs(tmp_path):
    return tmp_path / "theirs"


def test_records_are_taken_over_unless_longer_ones_are_there(theirs):
    records.save(record("clipped", 0, epochs=3))
    records.save(record("clipped", 1, epochs=9))
    records.save(record("clipped", 2, epochs=12, shortened=None))
    new = [records.save(r, theirs) for r in (
        record("clipped", 0, epochs=6), record("clipped", 1, epochs=9, seconds=1.0),
        record("clipped", 2, epochs=9), record("unclipped", 0))]  # fmt: skip
    kept = [recording.read_record(small("clipped", seed), None) for seed in (1, 2)]
    assert recording.merge(theirs) == [
        f"{NAME}/small/clipped-seed0.json: replaces 3 of 12 epochs",
        f"{NAME}/small/clipped-seed1.json: kept, not shorter",
        f"{NAME}/small/clipped-seed2.json: kept, not shorter",
        f"{NAME}/small/unclipped-seed0.json: new",
    ]
    there = records.find(NAME, "clipped", 0, scale="small")
    assert there.read_bytes() == new[0].read_bytes()
    assert records.find(NAME, "unclipped", 0, scale="small").read_bytes() == new[3].read_bytes()
    assert [recording.read_record(small("clipped", seed), None) for seed in (1, 2)] == kept


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tamper(path):
    value = json.loads(path.read_text())
    value["metrics"]["test_error"] = 0.1
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (tamper, "its checksum does not fit: it was changed after it was written"),
        (lambda path: rewrite(path, format=1), "its format is 1, this version reads 2"),
        (lambda path: rewrite(path, format=3), "its format is 3, this version reads 2"),
        (lambda path: path.write_text(path.read_text()[:200]), "Expecting|Unterminated"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "decode"),
        (lambda path: path.write_text(""), "it is not JSON: "),
        (lambda path: path.write_text("{}"), "it is not a record of bnnbook"),
    ],
    ids=["tampered", "old", "new", "cut", "bytes", "empty", "foreign"],
)
def test_a_bad_record_is_refused_and_nothing_is_imported(theirs, damage, words):
    records.save(record("clipped"), theirs)
    bad = records.save(record("unclipped"), theirs)
    damage(bad)
    before = bad.read_bytes()
    with pytest.raises(records.RecordError, match=words) as refused:
        recording.merge(theirs)
    assert str(bad) in str(refused.value)
    assert bad.read_bytes() == before  # it is theirs: it is left where it is
    assert not records.results_folder().exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experiment": "toy.table"}, "unknown experiment 'toy.table'; known: "),
        ({"variant": "pressed"}, "unknown variant 'pressed'; known: clipped, unclipped"),
        ({"scale": "full"}, "unknown scale 'full'; known: small"),
        ({"dataset_sha256": "1234"}, "digits has SHA-256 1234…, not 00ff… as those here"),
    ],
)
def test_a_record_of_something_else_is_refused(theirs, changes, words):
    records.save(record("clipped", 1))
    records.save(record(**changes), theirs)
    with pytest.raises(records.RecordError, match=words):
        recording.merge(theirs)
    assert recording.read_record(small(), None) is None


def test_their_records_must_agree_on_the_data_too(theirs):
    records.save(record("clipped"), theirs)
    records.save(record("unclipped", dataset_sha256="1234"), theirs)
    with pytest.raises(records.RecordError, match=r"as clipped-seed0\.json"):
        recording.merge(theirs)


@pytest.mark.parametrize("changes", [{"commit": None}, {"dirty": True}, {"dirty": None}])
def test_a_full_scale_record_must_name_what_ran(theirs, changes):
    """What test_results.py would refuse later is refused before it is there."""
    wrong = {"device": "Abacus 9000", "commit": "abc", "dirty": False} | changes
    made = {"experiment": "binaryconnect.table2", "variant": "none", "environment": wrong}
    records.save(record(**made, scale="small"), theirs)
    assert recording.merge(theirs) == ["binaryconnect.table2/small/none-seed0.json: new"]
    records.save(record(**made, scale="full"), theirs)
    with pytest.raises(records.RecordError, match="it names no commit, or a changed one"):
        recording.merge(theirs)


def test_an_import_needs_a_folder_with_records(theirs):
    theirs.mkdir()
    with pytest.raises(records.RecordError, match="no records under"):
        recording.merge(theirs)
    path = records.save(record(), theirs)
    for wrong in (path, theirs / "nowhere"):
        with pytest.raises(NotADirectoryError, match=f"{wrong.name} is not a folder"):
            recording.merge(wrong)


def test_of_several_records_of_a_run_the_longest_is_taken(theirs):
    for folder, epochs in (("a", 5), ("b", 9), ("c", 2)):
        records.save(record(epochs=epochs), theirs / folder)
    assert recording.merge(theirs) == [
        f"{NAME}/small/clipped-seed0.json: new",
        f"{NAME}/small/clipped-seed0.json: replaces 5 of 12 epochs",
        f"{NAME}/small/clipped-seed0.json: kept, not shorter",
    ]
    assert recording.read_record(small(), None).shortened == "9 of 12 epochs"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_an_import_is_written(theirs, monkeypatch, number):
    records.save(record("clipped"), theirs)
    records.save(record("unclipped"), theirs)
    write = records.write_atomically

    def interrupted(path, text):
        os.kill(os.getpid(), number)
        write(path, text)

    monkeypatch.setattr(records, "write_atomically", interrupted)
    recording.merge(theirs)
    assert len(list(records.read_all())) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
from bnnbook import recording, records

at, where = int(sys.argv[2]), sys.argv[3]
count, save, replace = [], records.save, Path.replace

def kill_in_the_middle(part, path):
    if len(count) == at and where == "in":
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(part, path)

def kill_between_two(*arguments, **options):
    count.append(1)
    path = save(*arguments, **options)
    if len(count) == at and where == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return path

Path.replace, records.save = kill_in_the_middle, kill_between_two
recording.merge(Path(sys.argv[1]))
"""


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}  # fmt: skip


@pytest.mark.parametrize(("at", "where"), [(1, "in"), (1, "after"), (2, "in"), (2, "after")])
def test_an_import_that_was_killed_is_finished_by_the_next(theirs, at, where):
    """Each record is whole, the old one or the new one; nothing half-written stays."""
    records.save(record("clipped", epochs=1))
    for each in (record("clipped", epochs=2), record("unclipped"), record("unclipped", 1)):
        records.save(each, theirs)
    here = records.results_folder()
    before, expected = files_of(here), files_of(theirs)
    command = [sys.executable, "-c", KILLED, str(theirs), str(at), where]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    after = {path: raw for path, raw in files_of(here).items() if path.suffix == ".json"}
    written = at - (where == "in")
    assert sum(expected[path] == raw for path, raw in after.items()) == written
    assert all(raw in (expected[path], before.get(path)) for path, raw in after.items())
    assert len(list(records.read_all())) == max(written, 1)
    lines = recording.merge(theirs)
    assert files_of(here) == expected
    assert [line.endswith("kept, not shorter") for line in lines].count(True) == written


def test_an_import_that_is_refused_leaves_all_files_as_they_are(theirs):
    records.save(record("clipped", epochs=1))
    records.save(record("clipped", epochs=2), theirs)
    records.save(record("unclipped"), theirs)
    tamper(records.save(record("unclipped", 1), theirs))
    both = records.results_folder(), theirs
    before = [files_of(folder) for folder in both]
    with pytest.raises(records.RecordError, match="nothing was imported"):
        recording.merge(theirs)
    assert [files_of(folder) for folder in both] == before


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_import_changes_nothing(theirs, monkeypatch, error):
    records.save(record("clipped", epochs=1))
    records.save(record("clipped", epochs=2), theirs)
    records.save(record("unclipped"), theirs)
    records.save(record("unclipped", 1), theirs)
    here = records.results_folder()
    before = {path: path.read_bytes() for path in here.rglob("*.json")}
    save, count = records.save, []

    def interrupted(*arguments, **options):
        count.append(1)
        if len(count) == 3:
            raise error
        return save(*arguments, **options)

    monkeypatch.setattr(records, "save", interrupted)
    with pytest.raises(type(error)):
        recording.merge(theirs)
    assert {path: path.read_bytes() for path in here.rglob("*.json")} == before
    monkeypatch.undo()


def test_what_came_back_from_another_machine_is_the_same_file(tmp_path):
    """Recorded with --out, copied, imported: byte for byte."""
    done, path = recording.run(small(epochs=1), results=tmp_path / "out", runs=tmp_path / "runs")
    shutil.copytree(tmp_path / "out", tmp_path / "copied")
    recording.merge(tmp_path / "copied", tmp_path / "mine")
    mine = records.find(NAME, "clipped", 0, tmp_path / "mine", "small")
    assert mine.read_bytes() == path.read_bytes()
    assert done.dataset_sha256 == data.load("digits").sha256


def test_a_shortened_run_of_two_steps_counts_as_recorded(tmp_path):
    """Its epochs are those of both steps, the record's those of each."""
    job = recording.Job("liu2021.steps_short", "two-step-1x", 0, "small", epochs=2)
    records.save(liu2021.steps_short("two-step-1x", scale="small", epochs=2), tmp_path)
    assert recording.state(job, [tmp_path], tmp_path / "runs", "cpu").kind == "recorded"
    longer = recording.Job("liu2021.steps_short", "two-step-1x", 0, "small", epochs=4)
    assert recording.state(longer, [tmp_path], tmp_path / "runs", "cpu").kind == "shortened"


def test_epochs_shorten_only_the_recipes_that_have_more():
    lengths = {job.experiment: job.epochs for job in recording.all_jobs(epochs=9)}
    assert lengths["quist2023.order"] == 9
    assert lengths["beyond.alphas_short"] is None
