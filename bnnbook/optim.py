"""Optimizers for binary weights, the choice of their parameters, and learning-rate scaling.

The papers' three update rules are of one family: the gradient is filtered, and a weight flips when
it has the sign of its filtered gradient and that gradient exceeds a threshold.

- `Bop` keeps weights of exactly -1 or +1 and one moving average, of rate gamma; any threshold.
- `CascadedEMA` keeps weights of exactly -1 or +1 and two averages, of rates gamma and alpha, one
  behind the other; threshold 0.
- `LatentSGD` keeps real (latent) weights, of which the sign is used. Started from 0, they are a
  scaled copy of the cascade's second average, with alpha = lr times weight_decay.

Two more are this book's own, and take such rules apart. `RankedFlips` is told how many weights
flip and chooses which; `CounterSGD` keeps latent weights in integers of a few bits.

``group["lr"]`` is the rate that a torch scheduler decays: alpha of `CascadedEMA`, gamma of `Bop`,
the learning rate of `LatentSGD` and `CounterSGD`, the fraction of `RankedFlips`. `rate_as_lr` lets
a scheduler set any other rate.
"""

import functools
import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor, nn

from bnnbook.binarize import sign, stochastic_sign
from bnnbook.layers import (
    ExpertBinaryConv2d,
    binary_layers,
    clip_latent_weights,
    stored_weight,
)

Tensors = list[Tensor]


def decayed_sum(sums: Tensors, terms: Tensors, decay, scale) -> None:
    r"""Update in place :math:`x \leftarrow (1 - d)\,x + c\,u`, of which all three rules are made.

    x = ``sums`` and u = ``terms`` are lists of tensors, d = ``decay`` and c = ``scale`` numbers or
    0-dimensional tensors. With c = d, x is the exponential moving average of u with rate d.

    >>> x = [torch.zeros(1)]
    >>> decayed_sum(x, [torch.ones(1)], 0.1, 0.1); x
    [tensor([0.1000])]
    """
    torch._foreach_mul_(sums, 1 - decay)
    torch._foreach_add_(sums, torch._foreach_mul(terms, scale))


def flip_where(weights: Tensors, filtered: Tensors, threshold) -> None:
    r"""Flip in place the weights with :math:`\theta\,g > \tau`; equality flips nothing.

    :math:`\theta` = ``weights`` (±1), g = ``filtered`` gradients, :math:`\tau` = ``threshold``.
    Written as arithmetic instead of masked assignment, so that nothing waits for the device. NaN
    flips nothing.

    >>> weights = [torch.tensor([1.0, 1.0, -1.0, -1.0])]
    >>> flip_where(weights, [torch.tensor([0.2, -0.2, 0.0, -0.2])], 0.1); weights
    [tensor([-1.,  1., -1.,  1.])]
    """
    flips = torch._foreach_mul(filtered, weights)
    torch._foreach_sub_(flips, threshold)
    torch._foreach_sign_(flips)
    torch._foreach_clamp_min_(flips, 0)  # 1 where a weight flips, else 0
    flips = [f.to(w.dtype) for f, w in zip(flips, weights, strict=True)]
    torch._foreach_addcmul_(weights, weights, flips, value=-2)


class FlipOptimizer(torch.optim.Optimizer):
    """Base class of the optimizers of binary and latent weights: all but their update rules.

    A subclass defines ``buffers`` (the names of a weight's buffers, which start at 0), ``check``
    (the bounds of a group's numbers), ``rates`` (the numbers that a step takes) and ``update``
    (how a step changes weights and buffers).
    """

    lr_name: str  # what the paper calls group["lr"]
    binary = True  # the weights are exactly -1 or +1

    def __init__(self, params: Iterable, defaults: dict):
        defaults = _with_lr(defaults, self.lr_name)
        params = params if isinstance(params, Tensor) else list(params)  # torch refuses a tensor
        for group in params:  # before the weights of any group are changed
            if isinstance(group, dict):
                self.check({**defaults, **_with_lr(group, self.lr_name)})
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group, after a check of its rates; binary weights become ±1 (0 becomes either)."""
        group = _with_lr(param_group, self.lr_name)
        self.check({**self.defaults, **group})
        super().add_param_group(group)
        weights = self.param_groups[-1]["params"]
        try:
            for weight in weights:
                self.check_weight(weight)
        except ValueError:
            del self.param_groups[-1]  # nothing of a refused group stays
            raise
        if self.binary:
            for weight in weights:
                binarize_(weight)

    def check_weight(self, weight: Tensor) -> None:
        """Raise ValueError for a dtype that cannot hold weights of this kind."""
        if not weight.is_floating_point():
            raise ValueError(f"a weight is stored in a floating-point type, not {weight.dtype}")
        if not self.binary and torch.finfo(weight.dtype).bits < 32:
            raise ValueError(
                f"latent weights in {weight.dtype} would lose small updates and their decay: keep "
                "them in float32, and let torch.autocast compute in half precision"
            )

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Update every weight that has a gradient; return the closure's loss, if there is one.

        Raises ValueError for a rate set outside its bounds or under another key than "lr", for a
        latent weight of a `layers.BinaryLayer` where weights of ±1 are expected, and the reverse.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            self._check_group(group)
            rates = self.rates(group)
            weights, gradients, buffers = self._gather(group)
            if not weights:
                continue
            if group["fused"]:  # rates as tensors: each new number would recompile
                rates = [torch.tensor(rate, dtype=torch.float64, device="cpu") for rate in rates]
                _compiled(self.update)(weights, gradients, buffers, *rates)
            elif weights[0].is_cuda:
                self.update(weights, gradients, buffers, *rates)
            else:  # on a CPU one tensor at a time, which stays in the cache
                for one in zip(weights, gradients, *buffers, strict=True):
                    weight, gradient, *states = ([tensor] for tensor in one)
                    self.update(weight, gradient, states, *rates)
        return loss

    def _check_group(self, group: dict) -> None:
        """Raise ValueError for a rate under a key that no step reads, and for latent weights."""
        if self.lr_name != "lr" and self.lr_name in group:
            raise ValueError(f"set {self.lr_name} as group['lr'], not as group['{self.lr_name}']")
        if self.binary and any(getattr(weight, "latent", False) for weight in group["params"]):
            raise ValueError(
                f"{type(self).__name__} holds a latent weight: its layer has a weight_quantizer, "
                "whose gradient at ±1 may be 0 or turned round; make the layer with "
                "weight_quantizer=None, or call set_quantizers(None, ...)"
            )
        if not self.binary and any(getattr(w, "latent", True) is False for w in group["params"]):
            raise ValueError(
                f"{type(self).__name__} holds a weight that must stay ±1: its layer has no "
                "weight_quantizer; give it one, or take an optimizer such as Bop"
            )

    def _gather(self, group: dict) -> tuple[Tensors, Tensors, list[Tensors]]:
        """Return the weights that have a gradient, their gradients, and their buffers by name.

        The lists of buffers stand in the order of ``buffers``; those that are missing are created.
        """
        names = self.buffers(group)
        weights = [weight for weight in group["params"] if weight.grad is not None]
        gradients = []
        for weight in weights:
            dtype = _buffer_dtype(weight)
            for name in names:
                if name not in self.state[weight]:
                    self.state[weight][name] = torch.zeros_like(weight, dtype=dtype)
            gradient = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
            gradients.append(gradient.to(dtype))
        return weights, gradients, [[self.state[w][name] for w in weights] for name in names]

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore buffers and rates; buffers of half-precision weights stay in float32.

        Raises ValueError, before anything is changed, for a state whose groups lack a number, or
        none of whose weights has a buffer, of this optimizer's, as those of another kind may.
        """
        # torch adds keys to the defaults that no group has
        own = set(self.defaults).intersection(*self.param_groups)
        missing = set().union(*(own.difference(group) for group in state_dict["param_groups"]))
        if missing:
            raise ValueError(f"this is no state of {type(self).__name__}: its groups have no "
                             f"{', '.join(sorted(missing))}")  # fmt: skip
        for group in state_dict["param_groups"]:
            kept = [state_dict["state"].get(index, {}).keys() for index in group["params"]]
            absent = set(self.buffers(group)).difference(*filter(None, kept))
            if absent and any(kept):
                raise ValueError(f"this is no state of {type(self).__name__}: its weights have no "
                                 f"{', '.join(sorted(absent))}")  # fmt: skip
        super().load_state_dict(state_dict)  # which casts each buffer to its weight's type
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for index, saved in state_dict["state"].items():
            weight = weights[index]
            wide = {
                k: v.to(weight.device, _buffer_dtype(weight), copy=True) for k, v in saved.items()
            }
            self.state[weight].update(wide)


def _with_lr(group: dict, name: str) -> dict:
    """Return the group with the rate called ``name`` under torch's key for it."""
    group = dict(group)
    if name in group:
        group["lr"] = group.pop(name)
    return group


def _buffer_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of a weight's buffers: half precision would lose small updates."""
    return torch.promote_types(weight.dtype, torch.float32)


@functools.cache
def _compiled(update: Callable) -> Callable:
    return torch.compile(update)


@torch.no_grad()
def binarize_(weight: Tensor) -> Tensor:
    """Replace a weight by its sign, in place; an exact 0 becomes -1 or +1 at random.

    Drawn from torch's global generator. A weight that stayed 0 could never flip.
    """
    zero = weight == 0
    signs = sign(weight)
    # without zeros nothing is drawn: runs with other optimizers stay comparable
    if not weight.is_meta and zero.any():
        signs = torch.where(zero, stochastic_sign(torch.zeros_like(weight)), signs)
    return weight.copy_(signs)


def _check_rate(name: str, rate: float) -> None:
    if not 0 < rate <= 1:
        raise ValueError(f"{name} must be in (0, 1], not {rate}")


class CascadedEMA(FlipOptimizer):
    r"""Flip a weight when its twice averaged gradient points the same way (Quist et al., 2023).

    With :math:`\nabla_i` the gradient with respect to the binary weight :math:`\theta`, in step i

    .. math::

        m_i &= (1 - \gamma)\, m_{i-1} + \gamma\, \nabla_i \\
        g_i &= (1 - \alpha)\, g_{i-1} + \alpha\, m_i \\
        \theta_i &= -\theta_{i-1} \text{ where } g_i\, \theta_{i-1} > 0,
        \text{ else } \theta_{i-1}

    from :math:`m_0 = g_0 = 0`. This is what SGD with momentum and weight decay does to the signs
    of latent weights that start at 0 (see `LatentSGD`). Learning rate, initial magnitude and
    clipping drop out; multiplying a weight's gradients by a positive constant changes nothing.

    params: weights of layers with ``weight_quantizer=None``, or groups of them; they become ±1.
    alpha: :math:`\alpha` in (0, 1]; the filter remembers about 1/alpha steps. This is
    ``group["lr"]``, which any torch scheduler may decay, down to 0.
    gamma: :math:`\gamma` in (0, 1], 1 minus the momentum; 1 makes the filter first-order.
    fused: compile the update with `torch.compile` into one pass over memory. On a CPU results are
    the same bit for bit (a GPU's compiler may round a product and a sum together). Compilation
    takes some seconds for each new set of shapes; after eight sets in one process torch warns and
    goes on uncompiled.

    After the first step every weight is minus the sign of its first gradient, so about half of
    them flip. Weights without a gradient are left alone. State: two buffers per weight, in float32
    or wider: in bfloat16 a filter with alpha below 1/512 can get stuck, and stochastic rounding
    costs more than the step itself (``benchmarks/buffers.py``). Raises ValueError for a rate
    outside (0, 1].

    >>> weight = nn.Parameter(torch.tensor([1.0, -1.0, 1.0]))
    >>> optimizer = CascadedEMA([weight], alpha=0.01, gamma=0.1)
    >>> weight.grad = torch.tensor([0.3, 0.3, 0.0])
    >>> optimizer.step(); weight.data
    tensor([-1., -1.,  1.])

    Source: the released optimizer ``cema_optimizer.py``, which multiplies alpha by an lr of 1.
    """

    lr_name = "alpha"

    def __init__(self, params: Iterable, alpha: float, gamma: float, *, fused: bool = False):
        super().__init__(params, {"alpha": alpha, "gamma": gamma, "fused": fused})

    @staticmethod
    def update(weights, gradients, buffers, gamma, alpha) -> None:
        """Do one step of the rule on lists of tensors."""
        m, g = buffers
        decayed_sum(m, gradients, gamma, gamma)
        decayed_sum(g, m, alpha, alpha)
        flip_where(weights, g, 0.0)

    @staticmethod
    def buffers(group: dict) -> tuple[str, ...]:
        """Name the buffers: m and g."""
        return ("momentum", "filtered_gradient")

    @staticmethod
    def check(group: dict) -> None:
        """Raise ValueError unless both rates lie in (0, 1]."""
        _check_rate("alpha", group["lr"])
        _check_rate("gamma", group["gamma"])

    @staticmethod
    def rates(group: dict) -> tuple[float, ...]:
        """Return gamma and alpha as they are in this step."""
        return _in_bounds(group, "gamma"), _in_bounds(group, "lr")


class Bop(FlipOptimizer):
    r"""Flip a weight when its averaged gradient exceeds a threshold (Helwegen et al., 2019).

    With :math:`g_t` the gradient with respect to the binary weight w, in step t (algorithm 2)

    .. math::

        m_t &= (1 - \gamma)\, m_{t-1} + \gamma\, g_t \\
        w_t &= -w_{t-1} \text{ where } |m_t| > \tau
        \text{ and } \operatorname{sign} m_t = \operatorname{sign} w_{t-1},
        \text{ else } w_{t-1}

    from :math:`m_0 = 0`. The paper's equation 6 has :math:`\ge`, its algorithm 2 and this class
    :math:`>`. On a tie the released code sets the weight to +1; here it stays as it is. With
    ``threshold=0`` this is `CascadedEMA` with gamma = 1 and this gamma as alpha.

    params: weights of layers with ``weight_quantizer=None``, or groups of them; they become ±1.
    gamma: :math:`\gamma`, the adaptivity rate, in (0, 1]. This is ``group["lr"]``, which any torch
    scheduler may decay, down to 0.
    threshold: :math:`\tau \ge 0`, in units of the gradient (the loss's scale matters).
    fused: as for `CascadedEMA`.

    State: one buffer per weight. Raises ValueError for a rate outside (0, 1] or a threshold < 0.

    >>> weight = nn.Parameter(torch.tensor([1.0, 1.0, -1.0]))
    >>> optimizer = Bop([weight], gamma=0.1, threshold=0.01)
    >>> weight.grad = torch.tensor([0.3, 0.05, 0.3])
    >>> optimizer.step(); weight.data
    tensor([-1.,  1., -1.])
    """

    lr_name = "gamma"

    def __init__(self, params: Iterable, gamma: float, threshold: float, *, fused: bool = False):
        super().__init__(params, {"gamma": gamma, "threshold": threshold, "fused": fused})

    @staticmethod
    def update(weights, gradients, buffers, gamma, threshold) -> None:
        """Do one step of the rule on lists of tensors."""
        (m,) = buffers
        decayed_sum(m, gradients, gamma, gamma)
        flip_where(weights, m, threshold)

    @staticmethod
    def buffers(group: dict) -> tuple[str, ...]:
        """Name the buffer: m."""
        return ("momentum",)

    @staticmethod
    def check(group: dict) -> None:
        """Raise ValueError for a rate outside (0, 1] or a threshold that is no number >= 0."""
        _check_rate("gamma", group["lr"])
        if not 0 <= group["threshold"] < math.inf:
            raise ValueError(f"threshold must be a number >= 0, not {group['threshold']}")

    @staticmethod
    def rates(group: dict) -> tuple[float, ...]:
        """Return gamma and threshold as they are in this step."""
        return _in_bounds(group, "lr"), _in_bounds(group, "threshold", math.inf)


class LatentSGD(FlipOptimizer):
    r"""Train latent weights by SGD with momentum as a moving average and decoupled weight decay.

    With :math:`\nabla_i` the gradient that reaches the binary weight :math:`\operatorname{sign} w`

    .. math::

        m_i &= (1 - \gamma)\, m_{i-1} + \gamma\, \nabla_i \\
        w_i &= w_{i-1} - \varepsilon\, (m_i + \lambda\, w_{i-1})

    from :math:`m_0 = 0`, and then w is clipped to [-clip, clip] if ``clip`` is given. This is
    the latent-weight optimizer that Quist et al. (2023) start from; ``torch.optim.SGD`` is another
    filter: its decay passes through the momentum buffer and its gradient is not multiplied by
    :math:`\gamma`.

    Seen from the binary weights, :math:`-\lambda w` is a gradient averaged twice, with the rates
    :math:`\gamma` and :math:`\alpha = \varepsilon\lambda`. Without clipping and from w = 0, the
    signs are those of `CascadedEMA`, for every :math:`\varepsilon` with the same product. In a
    network this takes a quantizer that passes every gradient, such as `ste_sign` with
    ``clip_value=None`` (its default stops them beyond 1), and a cascade that starts from the same
    signs, +1 where w is 0.

    params: latent weights, or groups of them; not in half precision.
    lr: :math:`\varepsilon \ge 0`.
    gamma: :math:`\gamma` in (0, 1], 1 minus the momentum.
    weight_decay: :math:`\lambda`, with :math:`\varepsilon\lambda \le 1`. A negative one makes
    latent weights grow without bound, which Liu et al. (2021) try on purpose.
    clip: bound of the latent weights, or None.
    fused: as for `CascadedEMA`.

    State: one buffer per weight. Raises ValueError for numbers outside these
    bounds. A latent weight that decays to exactly 0, which takes a product
    :math:`\varepsilon\lambda > 1/2`, counts as +1.

    >>> weight = nn.Parameter(torch.tensor([0.1, -0.5]))
    >>> optimizer = LatentSGD([weight], lr=0.5, weight_decay=0.1)
    >>> weight.grad = torch.tensor([1.0, 0.0])
    >>> optimizer.step(); weight.data
    tensor([-0.4050, -0.4750])
    """

    lr_name = "lr"
    binary = False

    def __init__(self, params: Iterable, lr: float, gamma: float = 1.0, weight_decay: float = 0.0,
                 clip: float | None = None, *, fused: bool = False):  # fmt: skip
        defaults = {"lr": lr, "gamma": gamma, "weight_decay": weight_decay, "clip": clip}
        super().__init__(params, {**defaults, "fused": fused})

    @staticmethod
    def update(weights, gradients, buffers, gamma, decay, lr, *clip) -> None:
        """Do one step of the rule on lists of tensors; decay is lr times weight_decay."""
        (m,) = buffers
        decayed_sum(m, gradients, gamma, gamma)
        decayed_sum(weights, m, decay, -lr)
        for bound in clip:
            for weight in weights:
                weight.clamp_(-bound, bound)

    @staticmethod
    def buffers(group: dict) -> tuple[str, ...]:
        """Name the buffer: m, which a schedule of gamma needs even where gamma is 1."""
        return ("momentum",)

    @staticmethod
    def check(group: dict) -> None:
        """Raise ValueError unless gamma, lr, weight_decay and clip lie within their bounds."""
        _check_rate("gamma", group["gamma"])
        lr, decay, clip = group["lr"], group["weight_decay"], group["clip"]
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr must be a number >= 0, not {lr}")
        if not -math.inf < lr * decay <= 1:
            raise ValueError(f"lr * weight_decay must be at most 1, not {lr} * {decay}")
        _check_clip(clip)

    @staticmethod
    def rates(group: dict) -> tuple[float, ...]:
        """Return gamma, lr times weight_decay, lr and, if there is one, the clipping bound."""
        decay = group["weight_decay"]
        if not abs(decay) < math.inf:
            raise ValueError(f"weight_decay must be a number, not {decay}")
        lr = _in_bounds(group, "lr", 1 / decay if decay > 0 else math.inf)
        _check_clip(group["clip"])
        clip = () if group["clip"] is None else (group["clip"],)
        return _in_bounds(group, "gamma"), lr * decay, lr, *clip


def _check_clip(clip: float | None) -> None:
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be None or > 0, not {clip}")


class CounterSGD(FlipOptimizer):
    r"""Train latent weights by clipped SGD, kept in counters of b bits (this book's experiment).

    A counter v is one of the :math:`2^b` odd integers from :math:`-V` to V,
    :math:`V = 2^b - 1`; it stands for the latent weight :math:`v / V`, its sign for the binary
    weight. With :math:`\nabla` the gradient that reaches the binary weight,

    .. math:: v \leftarrow \operatorname{clip}\big(R(v - \varepsilon V \nabla), -V, V\big)

    R rounds to an odd integer: to the nearest one, upwards on a tie, or to one of the two
    neighbours at random, so that the mean is right. As b grows this becomes `LatentSGD` with
    gamma 1 and clip 1, the SGD of BinaryConnect. Rounded to nearest, an update of
    :math:`\varepsilon |\nabla| < 1/V` is lost. With one bit there is no memory but the weight:
    it flips if :math:`\varepsilon \nabla \theta > 1`, or with probability
    :math:`\varepsilon \nabla \theta / 2`.

    params: latent weights w, or groups of them; each becomes the odd integer nearest to V w that
    has its sign. A tensor that holds odd integers only, and not only ±1, holds counters already.
    The counters are stored as floating-point numbers, exactly; a device would use b bits. In a
    network they take a quantizer that passes every gradient, such as `ste_sign` with
    ``clip_value=None``: its default stops those of all counters but ±1.
    lr: :math:`\varepsilon \ge 0`.
    bits: b, from 1 to 16.
    stochastic: how R rounds; the numbers are drawn from torch's global generator.

    State: none. Raises ValueError for numbers outside these bounds.

    >>> weight = nn.Parameter(torch.tensor([0.1, -0.5]))
    >>> optimizer = CounterSGD([weight], lr=0.5, bits=2, stochastic=False)
    >>> weight.data
    tensor([ 1., -1.])
    >>> weight.grad = torch.tensor([1.0, 0.2])
    >>> optimizer.step(); weight.data
    tensor([-1., -1.])
    """

    lr_name = "lr"
    binary = False

    def __init__(self, params: Iterable, lr: float, bits: int, *, stochastic: bool = True):
        defaults = {"lr": lr, "bits": bits, "stochastic": stochastic}
        super().__init__(params, {**defaults, "fused": False})

    @torch.no_grad()
    def add_param_group(self, param_group: dict) -> None:
        """Add a group, after a check of its numbers; its weights become counters."""
        super().add_param_group(param_group)
        bound = 2 ** self.param_groups[-1]["bits"] - 1
        for weight in self.param_groups[-1]["params"]:
            if _are_counters(weight):  # as in a network that was loaded first
                weight.clamp_(-bound, bound)
                continue
            size = 1 + _even(weight.abs() * bound - 1, stochastic=False)
            # the sign of a weight near 0 is kept, too
            weight.copy_(sign(weight) * size.clamp_(max=bound))

    @staticmethod
    def update(weights, gradients, buffers, lr, bits, stochastic) -> None:
        """Do one step of the rule on lists of tensors."""
        bound = 2**bits - 1
        for counter, gradient in zip(weights, gradients, strict=True):
            counter.add_(_even(gradient * (-lr * bound), stochastic)).clamp_(-bound, bound)

    @staticmethod
    def buffers(group: dict) -> tuple[str, ...]:
        """Name the buffers: none."""
        return ()

    @staticmethod
    def check(group: dict) -> None:
        """Raise ValueError unless lr and bits lie within their bounds."""
        if not 0 <= group["lr"] < math.inf:
            raise ValueError(f"lr must be a number >= 0, not {group['lr']}")
        if type(group["bits"]) is not int or not 1 <= group["bits"] <= 16:
            raise ValueError(f"bits must be an integer from 1 to 16, not {group['bits']}")

    @staticmethod
    def rates(group: dict) -> tuple:
        """Return lr, bits and the kind of rounding."""
        lr = _in_bounds(group, "lr", math.inf)
        CounterSGD.check({**group, "lr": lr})
        return lr, group["bits"], group["stochastic"]


def _are_counters(weight: Tensor) -> bool:
    """Return whether these are odd integers, but not all ±1, as binary weights are."""
    return bool((weight.abs() > 1).any() and (weight.remainder(2) == 1).all())


def _even(moves: Tensor, stochastic: bool) -> Tensor:
    """Round to even integers, by which an odd counter moves and stays odd; 0 remains 0."""
    offset = torch.rand_like(moves) if stochastic else 0.5
    return torch.floor(moves / 2 + offset).mul_(2)


class RankedFlips(FlipOptimizer):
    r"""Flip a given number of weights, those with the strongest evidence (this book's experiment).

    In step t each weight tensor, of n elements, flips :math:`k = f_t n` of them, a fraction being
    rounded up or down at random so that the mean is right. They are those with the largest
    :math:`e\,\theta`, as far as it is positive, where e is the ``evidence``:

    - "gradient": this batch's gradient :math:`\nabla`;
    - "first": its moving average m of rate :math:`\alpha`;
    - "second": the :math:`g` of `CascadedEMA`, of rates :math:`\gamma` and :math:`\alpha`;
    - "normalised": :math:`m / \sqrt{v}` as in Adam, v being the average of :math:`\nabla^2`, both
      of rate :math:`\alpha` (Adam's corrections of the start would not change the order);
    - "asked": random numbers, for the weights that the second order asks to flip, those with
      :math:`g\,\theta > 0`;
    - "random": random numbers, for all weights.

    The rule is of no paper: it separates *how many* weights flip, which all the papers' rules
    decide implicitly, from *which*. A weight without evidence, :math:`e = 0`, does not flip. Of
    equal ones the first flip, in the order of the tensor's elements.

    params: weights of layers with ``weight_quantizer=None``, or groups of them; they become ±1.
    fraction: f in (0, 1]. This is ``group["lr"]``, which any torch scheduler may decay, down to 0.
    evidence: one of the names above.
    alpha, gamma: the rates, in (0, 1].

    State: none, one or two buffers per weight. On a GPU each step waits for the device. Random
    numbers come from torch's global generators. Raises ValueError for an unknown evidence and for
    a rate outside its bounds.

    >>> weight = nn.Parameter(torch.tensor([1.0, 1.0, -1.0, 1.0]))
    >>> optimizer = RankedFlips([weight], fraction=0.25, evidence="gradient")
    >>> weight.grad = torch.tensor([0.2, 0.3, 0.9, -0.9])
    >>> optimizer.step(); weight.data
    tensor([ 1., -1., -1.,  1.])
    """

    lr_name = "fraction"
    BUFFERS: ClassVar[dict[str, tuple[str, ...]]] = {
        "gradient": (),
        "first": ("filtered_gradient",),
        "second": ("momentum", "filtered_gradient"),
        "normalised": ("filtered_gradient", "square"),
        "asked": ("momentum", "filtered_gradient"),
        "random": (),
    }

    def __init__(self, params: Iterable, fraction: float, evidence: str = "second",
                 alpha: float = 0.01, gamma: float = 0.1):  # fmt: skip
        defaults = {"fraction": fraction, "evidence": evidence, "alpha": alpha, "gamma": gamma}
        super().__init__(params, {**defaults, "fused": False})

    @staticmethod
    def update(weights, gradients, buffers, fraction, evidence, alpha, gamma) -> None:
        """Do one step of the rule on lists of tensors."""
        found = _evidence(evidence, gradients, buffers, alpha, gamma)
        for weight, e in zip(weights, found, strict=True):
            strength = e * weight
            if evidence in ("asked", "random"):
                asked = strength > 0 if evidence == "asked" else True
                strength = (1 - torch.rand_like(strength)) * asked
            count = int(fraction * weight.numel() + torch.rand((), device="cpu").item())
            flip_strongest(weight, strength, count)

    @staticmethod
    def buffers(group: dict) -> tuple[str, ...]:
        """Name the buffers that the evidence takes; raise ValueError for an unknown one."""
        _check_evidence(group["evidence"])
        return RankedFlips.BUFFERS[group["evidence"]]

    @staticmethod
    def check(group: dict) -> None:
        """Raise ValueError for an unknown evidence, or a rate outside (0, 1]."""
        _check_evidence(group["evidence"])
        _check_rate("fraction", group["lr"])
        _check_rate("alpha", group["alpha"])
        _check_rate("gamma", group["gamma"])

    @staticmethod
    def rates(group: dict) -> tuple:
        """Return the fraction as it is in this step, the evidence and the averages' rates."""
        averages = _in_bounds(group, "alpha"), _in_bounds(group, "gamma")
        return _in_bounds(group, "lr"), group["evidence"], *averages


def _check_evidence(kind: str) -> None:
    if kind not in RankedFlips.BUFFERS:
        known = ", ".join(RankedFlips.BUFFERS)
        raise ValueError(f"unknown evidence {kind!r}; known: {known}")


def _evidence(kind: str, gradients: Tensors, buffers, alpha, gamma) -> Tensors:
    """Return the evidence e of `RankedFlips`, whose averages are updated in place."""
    if not buffers:  # "gradient"; and "random", for which only the shape counts
        return gradients
    if kind == "first":
        (g,) = buffers
        decayed_sum(g, gradients, alpha, alpha)
        return g
    first, second = buffers
    if kind == "normalised":  # the averages m of the gradients and v of their squares
        decayed_sum(first, gradients, alpha, alpha)
        decayed_sum(second, torch._foreach_mul(gradients, gradients), alpha, alpha)
        # 0 where no gradient ever came, or only such whose squares underflow
        return [torch.where(v > 0, m / v.sqrt(), 0.0) for m, v in zip(first, second, strict=True)]
    decayed_sum(first, gradients, gamma, gamma)
    decayed_sum(second, first, alpha, alpha)
    return second


def flip_strongest(weight: Tensor, strength: Tensor, count: int) -> None:
    """Flip in place the ``count`` weights of the largest positive strength, the first on ties.

    weight, strength: of one shape. Fewer flip if fewer are positive; NaN flips nothing. Raises
    ValueError for a strength of another shape.

    >>> weight = torch.ones(4)
    >>> flip_strongest(weight, torch.tensor([0.5, -2.0, 0.5, 0.7]), 2); weight
    tensor([-1.,  1.,  1., -1.])
    """
    if strength.shape != weight.shape:
        raise ValueError(f"strength must have the weight's shape, {tuple(weight.shape)}, not "
                         f"{tuple(strength.shape)}")  # fmt: skip
    flat = strength.flatten()
    count = min(count, len(flat))
    if not count:
        return
    least = flat.topk(count, sorted=False).values.min()
    if not least > 0:  # too few are positive, or there are NaN
        flat = torch.where(flat > 0, flat, 0.0)
        count = min(count, int(flat.count_nonzero()))
        least = flat.topk(count, sorted=False).values.min() if count else math.inf
    index = (flat >= least).nonzero().squeeze(1)
    if len(index) > count:
        tied = flat[index] == least
        index = index[~tied | (tied.cumsum(0) <= count - (~tied).sum())]
    flipped = weight.flatten()
    flipped[index] = -flipped[index]
    weight.copy_(flipped.view(weight.shape))


def _in_bounds(group: dict, name: str, most: float = 1.0) -> float:
    """Return a number that a scheduler may have changed, even to 0, from 0 to ``most``."""
    rate = min(max(group[name], 0.0), most)
    if not abs(rate - group[name]) < 1e-9:  # LinearLR's rounding may miss 0 or 1 by a little
        raise ValueError(f"a scheduler set {name} to {group[name]}; it must stay in [0, {most:g}]")
    return rate


class _RateAsLR(dict):
    """View of an optimizer's group in which "lr" stands for another of its rates."""

    def __init__(self, optimizer: torch.optim.Optimizer, index: int, name: str):
        super().__init__()  # an entry of its own would be copied into the group that it stands for
        self.optimizer, self.index, self.name = optimizer, index, name

    @property
    def group(self) -> dict:  # looked up at each use: load_state_dict replaces the groups
        return self.optimizer.param_groups[self.index]

    def renamed(self, key: str) -> str:
        """Return this rate's key for one of the learning rate: lr, initial_lr, max_lr, ..."""
        return key.replace("lr", self.name)

    def __contains__(self, key):
        return self.renamed(key) in self.group

    def __getitem__(self, key):
        own = self.renamed(key)  # which older checkpoints lack
        return self.group[own if own in self.group else key]

    def __setitem__(self, key, value):
        self.group[self.renamed(key)] = value

    def setdefault(self, key, default=None):
        return self.group.setdefault(self.renamed(key), default)


class _StandIn(torch.optim.Optimizer):
    """Optimizer without weights whose groups are views of another optimizer's groups."""

    def __init__(self, optimizer: torch.optim.Optimizer, name: str):
        super().__init__([torch.empty(0)], {"lr": 0.0})
        count = len(optimizer.param_groups)
        self.param_groups = [_RateAsLR(optimizer, index, name) for index in range(count)]
        optimizer.register_step_post_hook(lambda *_: self.step())

    def step(self, closure=None):
        """Do nothing: schedulers count the steps."""


def rate_as_lr(optimizer: torch.optim.Optimizer, name: str) -> torch.optim.Optimizer:
    """Return a stand-in whose ``lr`` is another number of the optimizer's groups, for a scheduler.

    name: a key of every group, such as "gamma" of `CascadedEMA` or "threshold" of `Bop`. Use the
    result only to construct a torch scheduler; what that sets is saved with the optimizer. Raises
    ValueError, listing the known keys, if the groups have no such number.

    >>> optimizer = CascadedEMA([nn.Parameter(torch.ones(3))], alpha=0.01, gamma=0.1)
    >>> scheduler = torch.optim.lr_scheduler.ConstantLR(rate_as_lr(optimizer, "gamma"), 0.5)
    >>> optimizer.param_groups[0]["gamma"]
    0.05
    """
    first = optimizer.param_groups[0]
    numbers = [k for k, v in first.items() if isinstance(v, Real) and not isinstance(v, bool)]
    if name not in numbers:
        raise ValueError(f"no rate {name!r} in the groups; known: {', '.join(numbers)}")
    return _StandIn(optimizer, name)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return (binary, real): the weights of binary layers, and every other parameter.

    The layer's type decides, never its name; a shared parameter is listed once, as binary if any
    of its layers is. The weights of layers with a ``weight_quantizer`` are listed as binary, too,
    but are latent: they are for torch's optimizers or `LatentSGD`, not for `Bop` or `CascadedEMA`.
    Of a weight that is computed from others (a parametrization), those are listed, as real. Raises
    ValueError if the model has no binary layer.

    >>> from bnnbook.models import binaryconnect_mlp
    >>> [len(part) for part in split_parameters(binaryconnect_mlp())]
    [4, 8]
    """
    layers = list(binary_layers(model))
    stored = [layer._parameters.get("weight") for layer in layers]
    binary = list({id(weight): weight for weight in stored if weight is not None}.values())
    if not layers:
        raise ValueError("the model has no binary layer (BinaryLinear, BinaryConv2d)")
    known = {id(weight) for weight in binary}
    return binary, [p for p in model.parameters() if id(p) not in known]


def glorot_coefficient(layer: nn.Module) -> float:
    r"""Return BinaryConnect's coefficient :math:`c = \sqrt{1.5 / (n_{in} + n_{out})}` of a layer.

    :math:`n_{in}` and :math:`n_{out}` are the fan-in and fan-out of ``layer.weight``, kernel area
    included. c is half the bound of Glorot's uniform initialisation (released code,
    ``binary_connect.py``).

    >>> round(1 / glorot_coefficient(nn.Linear(784, 1024)), 2)
    34.72
    """
    # that of one expert
    weight = layer.weight[0] if isinstance(layer, ExpertBinaryConv2d) else layer.weight
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(weight)
    return math.sqrt(1.5 / (fan_in + fan_out))


def glorot_scaled_groups(model: nn.Module, lr: float, power: int) -> list[dict]:
    r"""Return parameter groups with BinaryConnect's learning-rate scaling, for any optimizer.

    The rate of each binary layer is :math:`\eta / c^k`, that of all other parameters
    :math:`\eta`. Here :math:`\eta` = ``lr``, c = `glorot_coefficient` and k = ``power``: 1 for
    ADAM, 2 for SGD and Nesterov momentum, 0 for no scaling. The paper speaks of scaling *with* c;
    its code divides by it. Raises ValueError for other powers.

    >>> from bnnbook.models import binaryconnect_mlp
    >>> groups = glorot_scaled_groups(binaryconnect_mlp(), lr=0.01, power=1)
    >>> [round(group["lr"], 4) for group in groups]
    [0.3472, 0.3695, 0.3695, 0.2626, 0.01]
    """
    if power not in (0, 1, 2):
        raise ValueError(f"power must be 0 (no scaling), 1 (ADAM) or 2 (SGD), not {power!r}")
    _, real = split_parameters(model)
    # a shared weight once
    layers = {id(stored_weight(layer)): layer for layer in binary_layers(model)}
    scaled = [
        {"params": [layer.weight], "lr": lr / glorot_coefficient(layer) ** power}
        for layer in layers.values()
    ]
    return [*scaled, {"params": real, "lr": lr}]


def clip_after_step(optimizer: torch.optim.Optimizer, model: nn.Module, bound: float = 1.0):
    """Clip the model's latent weights to [-bound, bound] after each step of the optimizer.

    Returns the handle; ``handle.remove()`` ends it. A copy of the optimizer (``copy.deepcopy``)
    does not clip. See `layers.clip_latent_weights`.
    """
    return optimizer.register_step_post_hook(lambda *_: clip_latent_weights(model, bound))
