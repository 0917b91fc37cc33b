"""The benchmarks run, and say what they measured; how fast anything is, no test decides."""

import json

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import buffers, timing

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
