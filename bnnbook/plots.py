"""Figures: records and tensors in, axes out. Nothing here trains, and no figure has a title."""

import itertools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes

# Each regulariser has the same colour in every figure.
COLORS = {
    "none": "#222222",
    "deterministic": "#0072b2",
    "stochastic": "#d55e00",
    "dropout": "#009e73",
}


def use_style() -> None:
    """Use the book's matplotlib style from here on; notebooks get figures of twice the pixels."""
    plt.style.use(Path(__file__).with_name("bnnbook.mplstyle"))
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina")


def _colors(variants, known: Mapping[str, str] = COLORS) -> dict[str, str]:
    """Return a colour for each variant: the known one, or the next free one of the cycle."""
    colors = {variant: known[variant] for variant in variants if variant in known}
    taken = {mpl.colors.to_hex(color) for color in colors.values()}
    cycle = [f"C{i}" for i in range(10)]
    free = [color for color in cycle if mpl.colors.to_hex(color) not in taken] or cycle
    others = [variant for variant in dict.fromkeys(variants) if variant not in known]
    return colors | {variant: free[i % len(free)] for i, variant in enumerate(others)}


def quantizer(function: Callable, ax: Axes, *, span: float = 2.0, points: int = 801) -> Axes:
    """Draw a quantizer's forward and backward function, both computed from the quantizer itself.

    A stochastic quantizer is shown by its draws; the backward curve is the gradient that autograd
    returns, 0 for a quantizer without one.
    """
    grid = torch.linspace(-span, span, points, device="cpu")
    x, y, gradient = _forward_and_backward(function, grid)
    if len(y.unique()) == 2 and (y[1:] != y[:-1]).sum() > 2:  # draws, not a step function
        ax.plot(x, y, ".", ms=2.5, color="C0", label="forward, one draw each")
    else:
        ax.step(x, y, where="post", color="C0", label="forward")
    ax.plot(x, gradient, "--", color="C1", label="backward")
    lowest, highest = torch.stack([y, gradient]).aminmax()
    low, high = min(-1, lowest.item()), max(1, highest.item())
    ax.set(xlabel="w", ylim=(low - 0.35, high + 0.35), xlim=(-span, span),
           yticks=sorted({-1, 0, 1, round(low), round(high)}))  # fmt: skip
    return ax


def _forward_and_backward(function: Callable, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return x, the function's values and its gradient there; 0 where autograd has none."""
    with torch.enable_grad():
        y = function(x.requires_grad_())
        found = torch.autograd.grad(y.sum(), x, allow_unused=True) if y.requires_grad else (None,)
    gradient = torch.zeros_like(x) if found[0] is None else found[0]
    return x.detach(), y.detach(), gradient


def training_curves(histories, ax: Axes) -> Axes:
    """Draw BinaryConnect's figure 3: training cost (dotted), validation error (solid, in %).

    ``histories`` is a frame as of `records.histories`: variant, seed, epoch, train_loss,
    validation_accuracy. Lines are means over the seeds, bands their range. Without the first two
    columns, as in the frame of a `training.History`, it is one run. Raises ValueError for a frame
    without validation_accuracy.
    """
    if "validation_accuracy" not in histories:
        raise ValueError("no validation accuracy to draw: train on data.hold_out(n)")
    missing = {"variant": "run", "seed": 0}.items()
    histories = histories.assign(**{k: v for k, v in missing if k not in histories})
    cost = ax.twinx()
    colors = _colors(histories.variant)
    for variant, runs in histories.groupby("variant", sort=False):
        color = colors[variant]
        told = runs.dropna(subset="validation_accuracy")  # not every epoch need be evaluated
        error = 100 * (1 - told.pivot(index="epoch", columns="seed", values="validation_accuracy"))
        ax.plot(error.index, error.mean(axis=1), color=color, label=variant)
        ax.fill_between(error.index, error.min(axis=1), error.max(axis=1), color=color, alpha=0.15)
        loss = runs.groupby("epoch").train_loss.mean()
        cost.plot(loss.index, loss, ":", color=color)
    ax.set(xlabel="epoch", ylabel="validation error (%), solid", yscale="log")
    cost.set(ylabel="training cost, dotted", yscale="log")
    cost.grid(False)
    cost.spines["right"].set_visible(True)
    _plain_percent(ax.yaxis)
    return ax


def _plain_percent(axis) -> None:
    axis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(mpl.ticker.LogFormatter(minor_thresholds=(1, 0.5)))


def weight_histogram(densities: Mapping[str, np.ndarray], axes, bound: float = 1.0):
    """Draw each density of latent weights over [-bound, bound] in its own axes (figure 2)."""
    for ax, (name, density) in zip(axes, densities.items(), strict=True):
        edges = np.linspace(-bound, bound, len(density) + 1)
        ax.stairs(density, edges, fill=True, color=COLORS.get(name, "C0"))
        ax.set(xlabel="latent weight", xlim=(-bound, bound))
        ax.annotate(name, (0.5, 0.95), xycoords="axes fraction", ha="center", va="top")
    axes[0].set_ylabel("density")
    return axes


def features(images: Mapping[str, np.ndarray], axes):
    """Draw each array (count, H, W) of features as a square mosaic in its own axes (figure 1)."""
    for ax, (name, stack) in zip(axes, images.items(), strict=True):
        ax.imshow(_mosaic(stack), interpolation="nearest")
        ax.set_xlabel(name)
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        for spine in ax.spines.values():
            spine.set_visible(False)
    return axes


def _mosaic(stack: np.ndarray) -> np.ndarray:
    side = int(np.sqrt(len(stack)))
    framed = np.pad(stack[: side * side], ((0, 0), (1, 1), (1, 1)), constant_values=255)
    return np.vstack([np.hstack(framed[i : i + side]) for i in range(0, side * side, side)])


def learning_rates(frame, ax: Axes) -> Axes:
    """Draw test error (%) over the initial learning rate, solid with scaling, dashed without.

    ``frame`` has the columns variant ("adam", "adam-scaled", …), lr and test_error (a fraction).
    A variant and its "-scaled" one share a colour and a marker.
    """
    known = {"sgd": "C0", "nesterov": "C1", "adam": "C2"}
    colors = _colors([name.removesuffix("-scaled") for name in frame.variant], known)
    markers = dict(zip(colors, itertools.cycle("os^Dv")))
    for variant, runs in frame.groupby("variant", sort=False):
        optimizer = variant.removesuffix("-scaled")
        scaled = variant != optimizer
        error = 100 * runs.groupby("lr").test_error.mean()
        ax.plot(error.index, error, "-" if scaled else "--", label=variant, ms=4,
                color=colors[optimizer], marker=markers[optimizer],
                mfc=None if scaled else "white")  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="first learning rate", ylabel="test error (%)")
    _plain_percent(ax.yaxis)
    return ax


def errors(frame, paper: Mapping[str, tuple[float, float]], ax: Axes) -> Axes:
    """Draw each run's test error (%) as a dot beside the paper's mean ± spread (a diamond).

    ``frame`` has the columns variant and test_error (a fraction); ``paper`` maps a variant to
    (mean, spread) in per cent, with a spread of None where the paper gives none. A variant that is
    not in ``paper`` has no diamond.
    """
    variants = list(dict.fromkeys(frame.variant))
    colors = _colors(variants)
    for i, variant in enumerate(variants):
        ours = 100 * frame.test_error[frame.variant == variant]
        rows = i - np.linspace(0.04, 0.2, len(ours))  # apart, so that equal runs all show
        ax.plot(ours, rows, "o", ms=5, alpha=0.8, color=colors[variant])
        if variant in paper:
            mean, spread = paper[variant]
            ax.errorbar(mean, i + 0.15, xerr=spread, fmt="D", ms=5, color="black", mfc="white")
    ax.set(yticks=range(len(variants)), yticklabels=variants, xlabel="test error (%)")
    ax.invert_yaxis()
    return ax


def z_plane(b: np.ndarray, a: np.ndarray, ax: Axes) -> Axes:
    """Draw the poles (crosses) and zeros (circles) of a filter (b, a) in the complex plane.

    b and a hold the coefficients of :math:`1, z^{-1}, z^{-2}, \\dots`, as `filters` returns them.
    A pole inside the grey unit circle decays, one off the real axis rings. A number beside a zero
    is its multiplicity.
    """
    size = max(len(a), len(b))
    turn = np.linspace(0, 2 * np.pi, 200)
    ax.plot(np.cos(turn), np.sin(turn), color="#999999", lw=1)
    zeros, poles = (np.roots(np.pad(each, (0, size - len(each)))) for each in (b, a))
    for zero in np.unique(zeros.round(9)):
        ax.plot(zero.real, zero.imag, "o", ms=8, mfc="none", color="C0")
        if (count := int(np.isclose(zeros, zero).sum())) > 1:
            ax.annotate(str(count), (zero.real, zero.imag), (6, 6), textcoords="offset points")
    ax.plot(poles.real, poles.imag, "x", ms=8, mew=2, color="C1")
    ax.set(aspect="equal", xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), xticks=(-1, 0, 1),
           yticks=(-1, 0, 1))  # fmt: skip
    return ax
