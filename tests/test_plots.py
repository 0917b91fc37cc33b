"""Figures: what is drawn is what was given, on the axes that were given."""

import ast
import inspect
import itertools
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch

mpl.use("Agg")

import matplotlib.pyplot as plt
from toy import run

from bnnbook import filters, plots
from bnnbook.binarize import (
    approx_sign,
    hard_sigmoid,
    real_weight,
    sign,
    ste_sign,
    stochastic_sign,
    swish_sign,
)
from bnnbook.experiments.binaryconnect import PAPER, VARIANTS


@pytest.fixture(autouse=True)
def style():
    """Give every test matplotlib's defaults, and let it leave no figure and no style behind."""
    with mpl.rc_context():
        yield
    plt.close("all")


@pytest.fixture
def ax():
    return plt.figure().add_subplot()


def lines(ax):
    return {line.get_label(): line for line in ax.lines}


def xy(line):
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def histories(seeds=(0, 1)):
    runs = itertools.product(("none", "stochastic"), seeds, (1, 2, 3, 4))
    frame = pd.DataFrame(runs, columns=["variant", "seed", "epoch"]).assign(experiment="toy")
    generator = np.random.default_rng(0)
    frame["train_loss"] = generator.uniform(0.1, 1, len(frame))
    frame["validation_accuracy"] = generator.uniform(0.8, 0.99, len(frame))
    return frame


def errors_frame():
    rows = [("stochastic", 0.0120), ("none", 0.0131), ("stochastic", 0.0124), ("none", 0.0135),
            ("none", 0.0127)]  # fmt: skip
    return pd.DataFrame(rows, columns=["variant", "test_error"])


def rates_frame():
    runs = itertools.product(VARIANTS["table1"], (0.001, 0.01, 0.1), (0, 1))
    frame = pd.DataFrame(runs, columns=["variant", "lr", "seed"])
    frame["test_error"] = np.random.default_rng(0).uniform(0.01, 0.2, len(frame))
    return frame


def densities():
    return {name: np.random.default_rng(i).dirichlet(np.ones(50)) / 0.04
            for i, name in enumerate(("deterministic", "stochastic"))}  # fmt: skip


def stacks(count=25):
    shape = (count, 3, 4)
    values = np.arange(np.prod(shape)).reshape(shape) % 251
    return {"none": values.astype(np.uint8), "dropout": 250 - values.astype(np.uint8)}


def drawn(name):
    """Call a function that draws: return the figure, what it returned, the axes it was given."""
    figure, axes = plt.subplots(1, 2)
    calls = {
        "quantizer": (plots.quantizer, ste_sign),
        "training_curves": (plots.training_curves, histories()),
        "weight_histogram": (plots.weight_histogram, densities()),
        "features": (plots.features, stacks()),
        "learning_rates": (plots.learning_rates, rates_frame()),
        "errors": (plots.errors, errors_frame(), PAPER["table2 mnist"]),
        "z_plane": (plots.z_plane, *filters.ema_cascade(0.2, 0.5)),
    }
    function, *arguments = calls[name]
    given = axes if name in ("weight_histogram", "features") else axes[0]
    return figure, function(*arguments, given), given


DRAWING = [name for name, function in inspect.getmembers(plots, inspect.isfunction)
           if function.__module__ == plots.__name__ and not name.startswith("_")
           and name != "use_style"]  # fmt: skip


@pytest.mark.parametrize("name", DRAWING)
def test_every_function_draws_on_the_axes_given_and_returns_them(name):
    figure, returned, given = drawn(name)
    assert returned is given
    assert plt.get_fignums() == [figure.number]
    for ax in np.atleast_1d(given):
        assert ax.has_data()
    if given is figure.axes[0]:
        assert not figure.axes[1].has_data()


@pytest.mark.parametrize("name", DRAWING)
def test_no_figure_has_a_title(name):
    figure, _, _ = drawn(name)
    figure.canvas.draw()
    assert figure.get_suptitle() == ""
    for ax in figure.axes:
        assert [ax.get_title(loc=where) for where in ("left", "center", "right")] == [""] * 3


@pytest.mark.parametrize("name", DRAWING)
def test_a_figure_does_not_depend_on_when_it_is_drawn(name):
    def pixels():
        figure = drawn(name)[0]
        figure.canvas.draw()
        return np.asarray(figure.canvas.buffer_rgba()).copy()

    assert np.array_equal(pixels(), pixels())


# --- Style -------------------------------------------------------------------------------------


def test_the_style_is_used():
    assert mpl.rcParams["axes.spines.top"]
    plots.use_style()
    assert not mpl.rcParams["axes.spines.top"]
    assert mpl.rcParams["figure.constrained_layout.use"]
    assert mpl.rcParams["axes.prop_cycle"].by_key()["color"][0] == "#0072b2"


def test_every_line_of_the_style_is_a_setting_that_matplotlib_knows():
    path = Path(inspect.getsourcefile(plots)).with_name("bnnbook.mplstyle")
    lines = path.read_text(encoding="utf-8").splitlines()
    written = [line.partition(":")[0] for line in lines if not line.startswith("#")]
    style = mpl.rc_params_from_file(path, use_default_template=False)
    assert sorted(style) == sorted(written)


def test_the_colours_are_in_the_cycle_and_differ():
    plots.use_style()
    cycle = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
    assert set(plots.COLORS) == set(VARIANTS["table2"])
    assert len({mpl.colors.to_hex(color) for color in plots.COLORS.values()}) == 4
    assert {plots.COLORS[v] for v in ("deterministic", "stochastic", "dropout")} <= set(cycle)


# --- Quantizers --------------------------------------------------------------------------------


@pytest.mark.parametrize(("function", "forward", "backward"), [
    (ste_sign, lambda x: np.where(x >= 0, 1, -1), lambda x: np.abs(x) <= 1),
    (partial(ste_sign, clip_value=None), lambda x: np.where(x >= 0, 1, -1), np.ones_like),
    (hard_sigmoid, lambda x: np.clip((x + 1) / 2, 0, 1), lambda x: 0.5 * (np.abs(x) <= 1)),
    (real_weight, lambda x: x, np.ones_like),
])  # fmt: skip
def test_a_quantizer_is_drawn_as_it_is(ax, function, forward, backward):
    plots.quantizer(function, ax, span=1.5, points=601)
    assert set(lines(ax)) == {"forward", "backward"}
    x, y = xy(lines(ax)["forward"])
    np.testing.assert_allclose(x, np.linspace(-1.5, 1.5, 601), atol=1e-6)
    np.testing.assert_allclose(y, forward(x), atol=1e-6)
    x, y = xy(lines(ax)["backward"])
    np.testing.assert_allclose(y, backward(x), atol=1e-6)
    assert ax.get_xlim() == (-1.5, 1.5)
    assert lines(ax)["forward"].get_linestyle() != lines(ax)["backward"].get_linestyle()


@pytest.mark.parametrize(("function", "ticks"), [
    (ste_sign, [-1, 0, 1]), (stochastic_sign, [-1, 0, 1]), (sign, [-1, 0, 1]),
    (approx_sign, [-1, 0, 1, 2]), (swish_sign, [-1, 0, 1, 5]), (real_weight, [-2, -1, 0, 1, 2]),
])  # fmt: skip
def test_nothing_of_a_quantizer_is_cut_off(ax, function, ticks):
    plots.quantizer(function, ax)
    values = np.concatenate([xy(line)[1] for line in ax.lines])
    low, high = ax.get_ylim()
    assert low == pytest.approx(min(-1, values.min()) - 0.35)
    assert high == pytest.approx(max(1, values.max()) + 0.35)
    assert ax.get_yticks().tolist() == ticks


@pytest.mark.parametrize("function", [sign, lambda x: sign(x) + torch.zeros(1).requires_grad_()])
def test_a_quantizer_without_a_gradient_is_drawn_with_gradient_zero(ax, function):
    plots.quantizer(function, ax)
    x, y = xy(lines(ax)["backward"])
    assert len(x) == 801
    assert not y.any()
    assert set(xy(lines(ax)["forward"])[1]) == {-1, 1}


def test_a_gradient_is_drawn_where_none_is_wanted(ax):
    with torch.no_grad():
        plots.quantizer(ste_sign, ax)
    assert set(xy(lines(ax)["backward"])[1]) == {0, 1}


def test_the_step_of_the_sign_is_drawn_at_zero(ax):
    plots.quantizer(ste_sign, ax)
    line = lines(ax)["forward"]
    vertices = line.get_path().vertices  # corners of the steps
    assert line.get_drawstyle() == "steps-post"
    jump = np.flatnonzero(np.diff(vertices[:, 1]) > 0)
    assert vertices[jump + 1, 0] == pytest.approx([0], abs=1e-6)


def test_a_random_quantizer_is_drawn_as_dots_with_its_own_gradient(ax):
    torch.manual_seed(3)
    plots.quantizer(stochastic_sign, ax)
    dots = lines(ax)["forward, one draw each"]
    assert (dots.get_linestyle(), dots.get_marker()) == ("None", ".")
    x, y = xy(dots)
    torch.manual_seed(3)
    expected = stochastic_sign(torch.linspace(-2, 2, 801)).numpy()
    np.testing.assert_array_equal(y, expected)
    assert set(y[np.abs(x) < 0.5]) == {-1, 1}
    assert set(xy(lines(ax)["backward"])[1]) == {1}


# --- Curves, dots, histograms, mosaics ---------------------------------------------------------


def test_training_curves_are_means_in_per_cent(ax):
    frame = histories(seeds=(0, 1, 5))
    plots.training_curves(frame, ax)
    cost = next(other for other in ax.figure.axes if other is not ax)
    assert len(ax.lines) == len(cost.lines) == len(ax.collections) == 2
    for i, variant in enumerate(("none", "stochastic")):
        runs = frame[frame.variant == variant].groupby("epoch")
        x, y = xy(lines(ax)[variant])
        np.testing.assert_array_equal(x, [1, 2, 3, 4])
        np.testing.assert_allclose(y, 100 - 100 * runs.validation_accuracy.mean())
        np.testing.assert_allclose(xy(cost.lines[i])[1], runs.train_loss.mean())
        assert cost.lines[i].get_linestyle() == ":"
        band = ax.collections[i].get_paths()[0].vertices[:, 1]
        assert band.min() == pytest.approx(100 * (1 - runs.validation_accuracy.max().max()))
        assert band.max() == pytest.approx(100 * (1 - runs.validation_accuracy.min().min()))
        colors = {
            mpl.colors.to_hex(line.get_color()) for line in (lines(ax)[variant], cost.lines[i])
        }
        assert colors == {plots.COLORS[variant]}


def test_runs_of_two_experiments_cannot_be_mixed_up_in_one_curve(ax):
    frame = histories()
    both = pd.concat([frame, frame.assign(experiment="other")])
    with pytest.raises(ValueError, match="duplicate"):
        plots.training_curves(both, ax)


def test_training_curves_of_one_run_are_those_of_its_history(ax):
    frame = run(4)[1].frame
    plots.training_curves(frame, ax)
    cost = next(other for other in ax.figure.axes if other is not ax)
    (line,) = ax.lines
    x, y = xy(line)
    np.testing.assert_array_equal(x, [1, 2, 3, 4])
    np.testing.assert_allclose(y, 100 - 100 * frame.validation_accuracy)
    np.testing.assert_allclose(xy(cost.lines[0])[1], frame.train_loss)
    assert list(frame.columns) == list(run(1)[1].frame.columns)  # the frame is left as it was
    with pytest.raises(ValueError, match="hold_out"):
        plots.training_curves(frame.drop(columns="validation_accuracy"), ax)


def test_training_curves_join_the_epochs_that_were_evaluated(ax):
    history = run(4, evaluate_every=2)[1].frame
    plots.training_curves(history, ax)
    assert ax.lines[0].get_xdata().tolist() == [2, 4]
    assert np.isfinite(ax.lines[0].get_ydata()).all()


def test_training_curves_of_one_variant_need_no_name(ax):
    frame = histories().query("variant == 'none'").drop(columns="variant")
    plots.training_curves(frame, ax)
    (line,) = ax.lines
    np.testing.assert_allclose(
        xy(line)[1], 100 - 100 * frame.groupby("epoch").validation_accuracy.mean())  # fmt: skip


def test_errors_places_each_run_and_the_papers_number(ax):
    frame, paper = errors_frame(), {"stochastic": (1.18, 0.04), "none": (1.3, None)}
    plots.errors(frame, paper, ax)
    ax.figure.canvas.draw()
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["stochastic", "none"]
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    diamonds = [line for line in ax.lines if line.get_marker() == "D"]
    for i, variant in enumerate(labels):
        x, y = xy(dots[i])
        np.testing.assert_allclose(x, 100 * frame.test_error[frame.variant == variant])
        assert np.abs(y - ax.get_yticks()[i]).max() < 0.5
        assert len(set(y)) == len(y)  # equal runs do not hide each other
        x, y = xy(diamonds[i])
        assert (x.item(), round(y.item())) == (paper[variant][0], i)
    (bars,) = (c for c in ax.collections if len(c.get_segments()))
    assert [segment[:, 0].tolist() for segment in bars.get_segments()] == [
        pytest.approx([1.14, 1.22])
    ]
    assert ax.yaxis_inverted()


def test_learning_rates_are_means_in_per_cent(ax):
    frame = rates_frame()
    plots.learning_rates(frame, ax)
    assert list(lines(ax)) == list(VARIANTS["table1"])
    for variant, line in lines(ax).items():
        x, y = xy(line)
        runs = frame[frame.variant == variant].groupby("lr")
        np.testing.assert_allclose(x, [0.001, 0.01, 0.1])
        np.testing.assert_allclose(y, 100 * runs.test_error.mean())
        assert line.get_linestyle() == ("-" if variant.endswith("-scaled") else "--")
        plain = lines(ax)[variant.partition("-")[0]]
        assert line.get_color() == plain.get_color()
        assert line.get_marker() == plain.get_marker()
    assert len({line.get_color() for line in ax.lines}) == 3
    assert len({line.get_marker() for line in ax.lines}) == 3
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_variants_of_ones_own_have_colours_and_labels_too(ax):
    """Each variant its own: none shares the colour of another in the figure."""
    plots.use_style()
    names = ["mine", "deterministic", "my-other", "stochastic", "third"]
    frame = pd.DataFrame({"variant": names, "test_error": [0.01, 0.02, 0.03, 0.04, 0.05]})
    plots.errors(frame, {"deterministic": (1.29, 0.08), "third": (2.0, None)}, ax)
    dots = {names[round(xy(line)[1].item())]: mpl.colors.to_hex(line.get_color())
            for line in ax.lines if line.get_marker() == "o"}  # fmt: skip
    assert list(dots) == names
    assert len(set(dots.values())) == 5
    assert dots["deterministic"] == plots.COLORS["deterministic"]
    assert [label.get_text() for label in ax.get_yticklabels()] == names
    diamonds = [xy(line) for line in ax.lines if line.get_marker() == "D"]
    assert [(x.item(), names[round(y.item())]) for x, y in diamonds] == [
        (1.29, "deterministic"), (2.0, "third")]  # fmt: skip


def test_optimizers_of_ones_own_have_a_colour_with_and_without_scaling(ax):
    plots.use_style()
    names = ["adam", "my-lion", "my-lion-scaled", "my-bop", "sgd-scaled"]
    runs = itertools.product(names, (0.1, 0.01))
    frame = pd.DataFrame(runs, columns=["variant", "lr"]).assign(test_error=0.1)
    plots.learning_rates(frame, ax)
    drawn = {name: (mpl.colors.to_hex(line.get_color()), line.get_linestyle())
             for name, line in lines(ax).items()}  # fmt: skip
    assert list(drawn) == names
    assert [style for _, style in drawn.values()] == ["--", "--", "-", "--", "-"]
    assert drawn["my-lion"][0] == drawn["my-lion-scaled"][0]
    assert len({color for color, _ in drawn.values()}) == 4
    assert drawn["adam"][0] == mpl.colors.to_hex("C2")


def test_training_curves_of_ones_own_variants_have_one_colour_each(ax):
    plots.use_style()
    frame = histories().replace({"variant": {"none": "mine", "stochastic": "deterministic"}})
    plots.training_curves(frame, ax)
    cost = next(other for other in ax.figure.axes if other is not ax)
    solid, dotted = ([mpl.colors.to_hex(line.get_color()) for line in each.lines]
                     for each in (ax, cost))  # fmt: skip
    assert solid == dotted
    assert solid[0] != solid[1] == plots.COLORS["deterministic"]


def test_more_variants_than_colours_begin_the_cycle_again(ax):
    mpl.rcParams["axes.prop_cycle"] = mpl.cycler(color=[plots.COLORS["deterministic"]])
    names = ["deterministic", "one", "two"]
    frame = pd.DataFrame({"variant": names, "test_error": 0.1})
    plots.errors(frame, {}, ax)
    assert len([line for line in ax.lines if line.get_marker() == "o"]) == 3


@pytest.mark.parametrize("bound", [1.0, 1.5])
def test_a_weight_histogram_has_the_area_of_its_density(bound):
    axes = plt.figure().subplots(1, 2)
    given = {name: density / bound for name, density in densities().items()}
    plots.weight_histogram(given, axes, bound)
    for ax, (name, density) in zip(axes, given.items(), strict=True):
        (patch,) = ax.patches
        heights, edges, _ = patch.get_data()
        np.testing.assert_array_equal(heights, density)
        assert (heights * np.diff(edges)).sum() == pytest.approx(1)
        assert (edges[0], edges[-1]) == ax.get_xlim() == (-bound, bound)
        assert [text.get_text() for text in ax.texts] == [name]
        assert mpl.colors.to_hex(patch.get_facecolor()) == plots.COLORS[name]


def test_features_are_one_mosaic_in_reading_order():
    axes = plt.figure().subplots(1, 2)
    plots.features(stacks(26), axes)  # the last is left out: 5 × 5 fit
    for ax, (name, stack) in zip(axes, stacks(26).items(), strict=True):
        mosaic = ax.images[0].get_array()
        assert mosaic.shape == (5 * (3 + 2), 5 * (4 + 2))
        for i in range(25):
            row, column = 5 * (i // 5), 6 * (i % 5)
            tile = mosaic[row : row + 5, column : column + 6]
            np.testing.assert_array_equal(tile[1:-1, 1:-1], stack[i])
            frame = [tile[0], tile[-1], tile[:, 0], tile[:, -1]]
            assert all((side == 255).all() for side in frame)
        assert ax.get_xlabel() == name
        assert (len(ax.get_xticks()), len(ax.get_yticks())) == (0, 0)


@pytest.mark.parametrize(("draw", "given"), [
    (plots.weight_histogram, densities), (plots.features, stacks),
])  # fmt: skip
def test_as_many_axes_as_variants(draw, given):
    with pytest.raises(ValueError, match="argument"):
        draw(given(), plt.figure().subplots(1, 3))


def test_plots_imports_nothing_that_trains():
    tree = ast.parse(inspect.getsource(plots))
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                for alias in node.names]  # fmt: skip
    imported += [n.module or "." for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    roots = {name.partition(".")[0] for name in imported}
    assert roots == {"collections", "itertools", "pathlib", "sys", "matplotlib",
                     "matplotlib_inline", "numpy", "torch"}  # fmt: skip


def test_the_z_plane_shows_poles_and_how_often_a_zero_is_there(ax):
    plots.z_plane(*filters.ema_cascade(0.2, 0.5), ax)
    crosses = [line for line in ax.lines if line.get_marker() == "x"]
    (circle,) = (line for line in ax.lines if line.get_marker() == "o")
    assert sorted(xy(crosses[0])[0]) == pytest.approx([0.5, 0.8])
    assert xy(circle) == (0, 0)
    assert [text.get_text() for text in ax.texts] == ["2"]
