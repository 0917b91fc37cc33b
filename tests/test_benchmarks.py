"""The benchmarks run, and say what they measured; how fast anything is, no test decides."""

import json
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import __main__ as command
from benchmarks import buffers, packed, recipes, replicas, timing
from bnnbook.experiments import quist2023
from bnnbook.models import binaryconnect_mlp, birealnet20

CPU = torch.device("cpu")


def test_results_are_written_beside_what_the_file_holds(tmp_path, capsys):
    for _ in range(2):
        command.main(["importing", "--device", "cpu", "--repeats", "1", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    assert list(results) == ["importing"]
    assert results["importing"]["torch"] == torch.__version__
    assert {row["goal"] for row in results["importing"]["table"]} == {"<= 0.3"}
    assert "import bnnbook" in capsys.readouterr().out


def test_a_benchmark_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def measured(name, device, repeats):
        if name == "loop":
            raise RuntimeError("no such kernel")
        return []

    monkeypatch.setattr(command, "measured", measured)
    options = ["--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="failed: loop"):
        command.main(["loop", "packed", *options])
    assert "RuntimeError: no such kernel" in capsys.readouterr().err
    (path,) = tmp_path.glob("*.json")
    assert list(json.loads(path.read_text(encoding="utf-8"))) == ["packed"]


def test_an_unknown_benchmark_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        command.main(["speed"])
    assert "unknown benchmark speed; known: optimizers, network" in capsys.readouterr().err


def test_functions_take_turns_and_the_shortest_time_counts():
    calls = []
    times = timing.best({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, 3)
    assert "".join(calls) == "ab" * 4
    assert all(time > 0 for time in times.values())


def test_rounding_at_random_is_to_bfloat16_and_right_on_average():
    torch.manual_seed(0)
    x = torch.full((100_000,), 1.002)  # between 1 and 1 + 2^-7
    rounded = buffers.stochastically(x)
    assert rounded.unique().tolist() == [1.0, 1.0078125]
    assert rounded.mean().item() == pytest.approx(1.002, abs=1e-4)


def test_float32_buffers_are_the_reference():
    torch.manual_seed(0)
    found = buffers.simulate(0.1, lambda _: torch.randn(50), steps=40, n=50)
    assert found["float32"]["differ"] == 0
    assert found["float32"]["flips"] > 0


def test_packed_products_are_timed_beside_the_same_products(monkeypatch):
    monkeypatch.setattr(packed, "SIZES", (70,))
    results = [function() for function in packed.cases(70, CPU).values()]
    assert all(result.float().equal(results[0]) for result in results)
    table = packed.run(CPU, 1)
    assert [row["what"] for row in table] == [
        "packed / float32, 256 x 70 by 70 x 70",
        "packed, with packing the inputs / float32, 256 x 70 by 70 x 70",
    ]
    assert all(row["ratio"] == row["seconds"] / row["plain_seconds"] for row in table)


MLP = partial(binaryconnect_mlp, 12, (16, 16))
NET = partial(birealnet20, widths=(4, 8), convolutions=(2, 2), weight_quantizer=None)
TINY = {
    "perceptron": replicas.Kind(MLP, replicas.latent, replicas.HINGE, (12,), 10),
    "Bi-Real Net": replicas.Kind(NET, replicas.flipping, cross_entropy, (3, 8, 8), 10),
}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", TINY.values(), ids=TINY)
def test_replicas_in_one_step_are_the_runs_alone(kind, float64):
    count, steps = 3, 8
    models = [kind.model(seed, CPU) for seed in range(count)]
    start = [{name: t.clone() for name, t in model.state_dict().items()} for model in models]
    step, state = replicas.batched(kind, models)
    for batch in replicas.stacked(kind, count, CPU, steps):
        step(*batch)
    for seed, model in enumerate(models):
        single = replicas.alone(kind, model)
        for batch in kind.batches(seed, CPU, steps):
            single(*batch)
        assert model.state_dict().keys() == state.keys()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(state[name][seed], tensor, rtol=1e-9, atol=1e-9)
            assert not torch.equal(tensor, start[seed][name]), name


def test_replicas_draw_their_own_dropout():
    kind = TINY["perceptron"]
    model = partial(MLP, dropout=0.5)().train()
    step, state = replicas.batched(kind, [model, model])
    ((inputs, labels),) = kind.batches(0, CPU)
    step(torch.stack([inputs] * 2), torch.stack([labels] * 2))
    first, second = state["1.weight"]
    assert not torch.equal(first, second)


def test_replicas_are_timed_and_followed(monkeypatch):
    monkeypatch.setattr(replicas, "REPLICAS", (2,))
    timed, strayed = replicas.run(CPU, 1, {"tiny": TINY["perceptron"]})
    assert timed["what"] == "tiny: 2 in one step / alone"
    assert timed["ratio"] == timed["seconds"] / timed["plain_seconds"]
    assert timed["images_per_second"] == pytest.approx(2 * 10 / timed["seconds"])
    assert 0 <= strayed["differ"] < 0.5


def test_the_median_of_ratios_counts_and_the_first_repeat_does_not():
    ours, plain = iter([9.0, 2.0, 3.0, 16.0]), iter([1.0, 1.0, 1.0, 2.0])
    found = replicas.compared(lambda: next(ours), lambda: next(plain), 6, repeats=3)
    assert found == {"ratio": 3.0, "seconds": 3.0, "plain_seconds": 1.0, "images_per_second": 2.0}


def test_an_epoch_of_a_recipe_is_timed_with_its_multiplications(monkeypatch):
    short = replace(quist2023.FULL, batch_size=50)
    monkeypatch.setattr(recipes, "IMAGES", {"cpu": 100})
    monkeypatch.setattr(recipes, "SIZE", {"cpu": 16})
    asked = []

    def fit(*arguments, **options):
        asked.append(os.environ["BNNBOOK_PRECISION"])
        return quist2023.fit(*arguments, **options)

    monkeypatch.setattr(recipes, "CASES", {"two steps": recipes.Case(fit, short)})
    found, halved = recipes.run(CPU, repeats=1)
    assert found["images_per_second"] == pytest.approx(100 / found["seconds"])
    assert found["share_of_matrix_rate"] > 0
    assert halved["ratio"] == halved["seconds"] / found["seconds"]
    assert asked == ["auto", "bfloat16"]
