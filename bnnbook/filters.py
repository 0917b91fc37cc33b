r"""Gradient filters: what a binary weight sees of its gradients, as signal processing.

A latent weight trained by SGD with weight decay :math:`\lambda`, learning rate :math:`\varepsilon`
and momentum :math:`1 - \gamma` is, up to the factor :math:`-1/\lambda`, the gradient passed
through two exponential moving averages (EMAs),

.. math:: m_i = (1-\gamma)\, m_{i-1} + \gamma \nabla_i, \qquad
          g_i = (1-\alpha)\, g_{i-1} + \alpha\, m_i, \qquad \alpha = \varepsilon\lambda,

and the binary weight is :math:`\theta_i = -\operatorname{sign} g_i`. This reading, a second-order
linear low-pass filter with an infinite impulse response, is that of Quist, Li, van Gemert (ICLR
2023), from its abstract and introduction. We could not read the body of the paper (sections 3 to
5): unless a docstring says otherwise, the equations here are our own derivations. The tests check
each against a simulation or against exact arithmetic.

``rates`` is ``(alpha,)`` (or just ``alpha``), ``(alpha, gamma)`` or longer: one rate per EMA, each
in (0, 1]; anything else raises ValueError. A rate of 1 passes its input through. As long as the
rates are constant, their order does not matter. Time is counted in training steps, angular
frequency ``omega`` in radians per step, from 0 to :math:`\pi`.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, signal, special

Rates = float | Sequence[float]


def _checked(rates: Rates) -> NDArray:
    """Return the rates as a float vector; raise ValueError unless all are in (0, 1]."""
    array = np.atleast_1d(rates)
    real = array.dtype.kind in "fiu" and array.ndim == 1 and array.size > 0
    if not (real and np.all((array > 0) & (array <= 1))):
        raise ValueError(f"rates must be one or more real numbers in (0, 1], not {rates!r}")
    return array.astype(float)


# --- The filter ----------------------------------------------------------------------------------


def ema_cascade(*rates: float) -> tuple[NDArray, NDArray]:
    r"""Return the transfer function (b, a) of a cascade of EMAs, as scipy.signal writes it.

    .. math:: H(z) = \prod_k \frac{r_k}{1 - (1 - r_k) z^{-1}}; \qquad \text{for two rates } \quad
              g_i = \alpha\gamma \nabla_i + (2 - \alpha - \gamma)\, g_{i-1}
              - (1 - \alpha)(1 - \gamma)\, g_{i-2}.

    b holds one number, :math:`\prod_k r_k`; a has one entry more than there are ``rates``
    :math:`r_k`. That momentum and weight decay form such a filter is the claim of Quist et al.
    (abstract). It holds for constant rates; for changing ones see `decaying_direct_form`. Rounding
    the coefficients a limits the relative accuracy of this form to about
    :math:`10^{-16}/\prod_k r_k`; `ema_sections` has no such limit.

    >>> b, a = ema_cascade(0.5, 0.25)
    >>> b.tolist(), a.tolist()
    ([0.125], [1.0, -1.25, 0.375])
    """
    r = _checked(rates)
    return np.array([r.prod()]), np.poly(1 - r)


def ema_sections(*rates: float) -> NDArray:
    """Return the cascade as sections for ``scipy.signal.sosfilt``, one per EMA: (rates, 6).

    Row k is ``[r_k, 0, 0, 1, -(1 - r_k), 0]``. Each EMA keeps its own state, as an optimizer
    would, so small rates lose no precision.

    >>> ema_sections(0.25).tolist()
    [[0.25, 0.0, 0.0, 1.0, -0.75, 0.0]]
    """
    r = _checked(rates)
    sections = np.zeros((len(r), 6))
    sections[:, 0], sections[:, 3], sections[:, 4] = r, 1, r - 1
    return sections


def poles(rates: Rates) -> NDArray:
    r"""Return the poles :math:`p_k = 1 - r_k` of the cascade, in the order of ``rates``.

    They are real and in [0, 1): the filter is stable and does not oscillate.

    >>> poles((0.25, 0.5)).tolist()
    [0.75, 0.5]
    """
    return 1 - _checked(rates)


def filter_gradients(rates: Rates, gradients: ArrayLike,
                     axis: int = 0) -> NDArray:  # fmt: skip
    r"""Return the filtered gradients :math:`g_i` of the gradients :math:`\nabla_i`, from g = 0 on.

    ``gradients`` has the steps along ``axis``, and any other axes, for instance one of weights.
    The result has the same shape, in float64. The binary weight is
    :math:`-\operatorname{sign} g_i`.

    >>> filter_gradients(0.5, [8.0, 0.0, 8.0]).tolist()
    [4.0, 2.0, 5.0]
    """
    return signal.sosfilt(ema_sections(*_checked(rates)), gradients, axis=axis)


# --- Responses -----------------------------------------------------------------------------------


def impulse_response(rates: Rates, n: int) -> NDArray:
    r"""Return :math:`h_0 \dots h_{n-1}`: the weight in g of the gradient of k steps ago.

    First order :math:`h_k = \alpha p^k`; second order
    :math:`h_k = \alpha\gamma\,(p^{k+1} - q^{k+1})/(p - q)`, which is
    :math:`\alpha^2 (k+1) p^k` for equal rates; :math:`p = 1 - \alpha`, :math:`q = 1 - \gamma`.
    Computed by running the cascade, so nearly equal ``rates`` are no special case.
    Raises ValueError unless ``n`` is at least 1.

    >>> impulse_response((0.5, 0.5), 4).tolist()
    [0.25, 0.25, 0.1875, 0.125]
    """
    if n < 1:
        raise ValueError(f"n must be at least 1 step, not {n!r}")
    return filter_gradients(rates, np.eye(1, n)[0])


def step_response(rates: Rates, n: int) -> NDArray:
    r"""Return :math:`s_k = \sum_{j \le k} h_j` for k < n: g after gradients step from 0 to 1.

    First order :math:`s_k = 1 - (1-\alpha)^{k+1}`. It rises to 1 and never overshoots. Raises
    ValueError unless ``n`` is at least 1.

    >>> step_response(0.5, 3).tolist()
    [0.5, 0.75, 0.875]
    """
    if n < 1:
        raise ValueError(f"n must be at least 1 step, not {n!r}")
    return filter_gradients(rates, np.ones(n))


def frequency_response(rates: Rates, omega: ArrayLike) -> NDArray:
    r"""Return the complex gain :math:`H(e^{j\omega})` at each ``omega``, in radians per step.

    .. math:: H = \prod_k \frac{r_k}{1 - p_k e^{-j\omega}}, \qquad
              |H|^2 = \prod_k \frac{r_k^2}{1 + p_k^2 - 2 p_k \cos\omega}, \qquad p_k = 1 - r_k.

    At frequency 0 the gain is 1. Above the ``rates`` it falls as :math:`\alpha/\omega` (20 dB per
    decade) for one EMA, as :math:`\alpha\gamma/\omega^2` (40 dB per decade) for two, down to
    :math:`\prod_k r_k/(2 - r_k)` at the Nyquist frequency :math:`\pi`. The result has the shape of
    ``omega``.

    >>> abs(frequency_response((0.5, 0.5), [0.0, math.pi])).round(4).tolist()
    [1.0, 0.1111]
    """
    r = _checked(rates)
    shift = np.expm1(-1j * np.asarray(omega, dtype=float))  # z^-1 - 1, exact also near 0
    return np.prod(r / (r - (1 - r) * shift[..., None]), axis=-1)


def group_delay(rates: Rates, omega: ArrayLike) -> NDArray:
    r"""Return the delay, in steps, of the envelope of a wave of frequency ``omega``.

    .. math:: -\frac{d \arg H}{d\omega} = \sum_k D(1 - r_k), \qquad
              D(p) = \frac{p\cos\omega - p^2}{1 + p^2 - 2 p\cos\omega}

    The result has the shape of ``omega``; at 0 it is `delay`.

    >>> group_delay((0.5, 0.25), [0.0, math.pi]).round(3).tolist()
    [4.0, -0.762]
    """
    r = _checked(rates)
    p = 1 - r
    half = np.sin(np.asarray(omega, dtype=float)[..., None] / 2) ** 2  # (1 - cos omega) / 2
    return np.sum(p * (r - 2 * half) / (r**2 + 4 * p * half), axis=-1)


def delay(rates: Rates) -> float:
    r"""Return the mean age of the gradients in g, in steps: :math:`\sum_k k h_k`.

    It equals :math:`\sum_k (1 - r_k)/r_k`, the group delay at frequency 0: the delays of the EMAs
    add up.

    >>> round(delay((0.001, 0.1)))
    1008
    """
    r = _checked(rates)
    return float(np.sum((1 - r) / r))


def _span(rates: Rates) -> int:
    """Return a number of steps that covers the peak and the median of the impulse response.

    The response is unimodal: its mode lies within 1.74 standard deviations of the mean, its
    median within one.
    """
    r = _checked(rates)
    return int(delay(r) + 2 * math.sqrt(np.sum((1 - r) / r**2))) + 2


def peak(rates: Rates) -> tuple[int, float]:
    r"""Return (step, height) of the maximum of the impulse response.

    First order: :math:`(0, \alpha)`, the latest gradient counts most. Second order: the smallest
    integer that is at least :math:`\ln(\gamma/\alpha)/\ln(p/q) - 1`, or :math:`1/\alpha - 2` for
    equal rates, but not below 0; p and q are the `poles`.

    >>> peak((0.001, 0.1))[0]
    44
    """
    h = impulse_response(rates, _span(rates))
    return int(h.argmax()), float(h.max())


def reaction_delay(rates: Rates) -> int:
    r"""Return the steps by which g lags when the mean gradient reverses: :math:`s_k \ge 1/2`.

    When the mean gradient changes from -1 to +1, the mean of g becomes :math:`2 s_k - 1` with
    `step_response` :math:`s_k`, so the sign of g follows at the median of the impulse response.
    k = 0 is the first gradient of the new sign. First order: :math:`\ln 2/\alpha` for small
    :math:`\alpha`.

    >>> reaction_delay(0.001), reaction_delay((0.001, 0.1))
    (692, 701)
    """
    return int(np.searchsorted(step_response(rates, _span(rates)), 0.5))


def cutoff(rates: Rates) -> float:
    r"""Return the frequency, in radians per step, where the power :math:`|H|^2` falls to 1/2.

    First order :math:`\cos\omega_c = 1 - \alpha^2/(2(1-\alpha))`, about :math:`\alpha`. Second
    order: about :math:`\alpha` if :math:`\gamma \gg \alpha`, 0.6436 :math:`\alpha` for small equal
    rates. Infinite if even the Nyquist frequency keeps more than half of its power.

    >>> round(cutoff((0.001, 0.001)), 7)
    0.0006439
    """
    r = _checked(rates)
    slope = 4 * (1 - r) / r**2  # 1 / |H|^2 = prod(1 + slope u) with u = sin^2(omega / 2)
    if np.prod(1 + slope) < 2:
        return math.inf
    # in units of 1 / slope.max() the root lies between 0 and 1, whatever the rates
    root = optimize.brentq(lambda v: np.log1p(slope / slope.max() * v).sum() - math.log(2),
                           0, 2, xtol=1e-15)  # fmt: skip
    return 2 * math.asin(min(1, math.sqrt(root / slope.max())))


# --- White noise through the filter --------------------------------------------------------------


def _noise_moments(rates: Rates) -> tuple[float, float]:
    """Return the variance of g and half the variance of its increments, for unit white noise.

    ``now[j, k]`` is the covariance of the EMAs j and k at the same step, ``lag[j, k]`` that of j
    one step earlier with k; number 0 is the noise itself. All terms are positive, so nothing
    cancels. The slowest EMA stands last, so that its increment, a difference, loses no digits
    either.
    """
    r = np.array([1, *sorted(_checked(rates), reverse=True)])
    p = 1 - r
    now, lag = np.zeros((2, len(r), len(r)))
    now[:, 0] = r.cumprod()
    for j in range(1, len(r)):
        for k in range(1, j + 1):
            both = p[k] * r[j] * lag[k, j - 1] + r[k] * now[j, k - 1]
            now[j, k] = both / (r[j] + r[k] - r[j] * r[k])
            lag[j, k] = p[k] * now[j, k] + r[k] * lag[j, k - 1]
            lag[k, j] = p[j] * now[j, k] + r[j] * lag[k, j - 1]
    half_step = r[-1] ** 2 / 2 * (now[-2, -2] - 2 * lag[-1, -2] + now[-1, -1])
    return float(now[-1, -1]), float(half_step)


def noise_gain(rates: Rates) -> float:
    r"""Return the variance of g for white gradient noise of variance 1: :math:`\sum_k h_k^2`.

    First order :math:`\alpha/(2-\alpha)`; second order
    :math:`\alpha\gamma(1+pq)\,/\,[(2-\alpha)(2-\gamma)(1-pq)]` with the `poles` p and q.
    Exact for any number of ``rates``.

    >>> round(noise_gain(0.5), 6), round(noise_gain((0.5, 0.5)), 6)
    (0.333333, 0.185185)
    """
    return _noise_moments(rates)[0]


def effective_window(rates: Rates) -> float:
    r"""Return how many gradients a plain mean needs for the same noise: :math:`1/\sum_k h_k^2`.

    First order :math:`(2-\alpha)/\alpha`; second order about :math:`2(1/\alpha + 1/\gamma)`.

    >>> round(effective_window((0.001, 0.1)), 1)
    2017.9
    """
    return 1 / noise_gain(rates)


def lag_one_correlation(rates: Rates) -> float:
    r"""Return :math:`\rho_1`, the correlation of g with itself a step later, for white noise.

    First order :math:`1 - \alpha`; second order :math:`(p+q)/(1+pq)` with the `poles` p and q.

    >>> round(lag_one_correlation((0.5, 0.5)), 6)
    0.8
    """
    variance, half_step = _noise_moments(rates)
    return 1 - half_step / variance


def flip_rate(rates: Rates, snr: float = 0.0) -> float:
    r"""Return the flips of a binary weight per step when its gradient is white Gaussian noise.

    .. math:: \frac{\arccos \rho_1}{\pi} = \frac{2}{\pi} \arctan a, \qquad
              a^2 = \frac{1-\rho_1}{1+\rho_1} = \frac{\alpha}{2-\alpha} \quad\text{or}\quad
              \frac{\alpha\gamma}{(2-\alpha)(2-\gamma)}

    for one or two rates, with :math:`\rho_1` the `lag_one_correlation`; exact for any number of
    them. `flip_rate_limit` has the short forms for small ``rates``. Two EMAs flip about
    :math:`\sqrt{\gamma/2}` times as often as the slower one alone.

    A mean gradient of ``snr`` standard deviations lowers the rate to :math:`4\,T(u, a)`, where T
    is Owen's function and u = snr :math:`/\sqrt{\sum h_k^2}` the mean of g over its standard
    deviation. The formula is open-loop: in a network, a flip changes the mean gradient of its
    weight. Raises ValueError for a negative ``snr``.

    >>> round(flip_rate(0.001), 5), round(flip_rate((0.001, 0.1)), 5)
    (0.01424, 0.00327)
    """
    if not snr >= 0:
        raise ValueError(f"snr must not be negative, not {snr!r}")
    variance, half_step = _noise_moments(rates)
    # not from rho_1 itself: near 1 that would lose half of the digits
    a = math.sqrt(half_step / (2 * variance - half_step))
    return float(4 * special.owens_t(snr / math.sqrt(variance), a))


def flip_rate_limit(rates: Rates) -> float:
    r"""Return the leading term of `flip_rate` for small rates of one, two or three EMAs.

    .. math:: \frac{\sqrt{2\alpha}}{\pi}, \qquad \frac{\sqrt{\alpha\gamma}}{\pi}, \qquad
              \frac{1}{\pi}\sqrt{\frac{\alpha\gamma\delta}{\alpha+\gamma+\delta}}

    The last is :math:`\sqrt{\alpha\gamma/2}/\pi` for :math:`\alpha \ll \gamma = \delta`: a third
    EMA saves only another factor of 0.71. One EMA of noise is a discrete Ornstein-Uhlenbeck path,
    whose zero crossings come in bursts; two make it differentiable, and Rice's formula counts its
    crossings. Raises ValueError for more than three ``rates``.

    >>> round(flip_rate_limit((0.001, 0.1)), 5)
    0.00318
    """
    r = _checked(rates)
    if len(r) > 3:
        raise ValueError(f"the limit is known for one to three rates, not {len(r)}")
    square = (2 * r[0], r.prod(), r.prod() / r.sum())[len(r) - 1]
    return math.sqrt(square) / math.pi


def flip_rate_nongaussian(alpha: float, absolute_ratio: float) -> float:
    r"""Return the flips per step of one EMA of white noise that need not be Gaussian.

    .. math:: \sqrt{\alpha/\pi}\; E|\nabla|/\sigma, \qquad \alpha \ll 1

    ``absolute_ratio`` is :math:`E|\nabla|/\sigma`: 0.798 (:math:`\sqrt{2/\pi}`) for a Gaussian, 1
    for :math:`\pm 1`, less for heavy tails or sparse gradients. Raises ValueError outside (0, 1].
    A second EMA nearly removes this dependence, as its own window makes the noise more Gaussian:
    for :math:`\gamma = 0.1` use `flip_rate`; simulations lie 6 % below it for Student's t with
    three degrees of freedom, and 14 % below it if nine gradients in ten are 0.

    >>> round(flip_rate_nongaussian(0.001, 1.0), 4)
    0.0178
    """
    (alpha,) = _checked((alpha,))
    if not 0 < absolute_ratio <= 1:
        raise ValueError(f"E|x| / sigma lies in (0, 1], not {absolute_ratio!r}")
    return math.sqrt(alpha / math.pi) * absolute_ratio


def bop_flip_rate(gamma: float, threshold: float, sigma: float = 1.0) -> float:
    r"""Return the flips per step of a Bop weight whose gradient is white Gaussian noise.

    Bop (Helwegen et al., NeurIPS 2019, Algorithm 2) flips w where w m > ``threshold``
    :math:`\tau`, with m an EMA of rate ``gamma``. For :math:`\tau = 0` the rate is that of
    `flip_rate`. Otherwise m has to travel from one threshold to the other between two flips, which
    for a discrete Ornstein-Uhlenbeck process driven by noise of standard deviation ``sigma``
    :math:`\sigma` gives

    .. math:: \frac{\gamma}{\sqrt{2\pi}\int_0^c e^{u^2/2} du}
              = \frac{\gamma}{\pi \operatorname{erfi}(c/\sqrt 2)}, \qquad
              c = \frac{\tau + 0.5826\,\gamma\sigma}{\sigma\sqrt{\gamma/(2-\gamma)}}

    flips per step. The constant 0.5826 :math:`= -\zeta(1/2)/\sqrt{2\pi}` accounts for the
    overshoot of a discrete walk. This is our own approximation for small ``gamma``: for
    :math:`\tau \ge \gamma\sigma/2` it is within 0.5 % at ``gamma`` = 0.01 and 4 % at 0.1; as
    :math:`\tau \to 0` it is 8 % too high. Raises ValueError for a negative ``threshold`` or a
    ``sigma`` that is not positive.

    >>> round(bop_flip_rate(0.001, 0.0), 4), round(bop_flip_rate(0.001, 1e-6, 1.7e-4), 4)
    (0.0142, 0.0014)
    """
    (gamma,) = _checked((gamma,))
    if not (threshold >= 0 and sigma > 0):
        raise ValueError(f"need threshold >= 0 and sigma > 0, not {threshold!r} and {sigma!r}")
    if threshold == 0:
        return flip_rate(gamma)
    c = (threshold / sigma + 0.5826 * gamma) / math.sqrt(gamma / (2 - gamma))
    return float(gamma / (math.pi * special.erfi(c / math.sqrt(2))))


# --- First order against second order ------------------------------------------------------------


def same_noise_alpha(rates: Rates) -> float:
    r"""Return the rate of the single EMA with the same `noise_gain` G: :math:`2G/(1+G)`.

    It errs as often and reacts about as fast as the cascade (`wrong_sign_probability`,
    `reaction_delay`), but flips more often.

    >>> round(same_noise_alpha((0.001, 0.1)), 7)
    0.0009906
    """
    gain = noise_gain(rates)
    return 2 * gain / (1 + gain)


def same_flip_rate_alpha(rates: Rates) -> float:
    r"""Return the rate of the single EMA with the same `flip_rate`: :math:`1 - \rho_1`.

    For two rates it is :math:`\alpha\gamma/(1 + pq)`, about :math:`\alpha\gamma/2`: such an EMA
    takes about :math:`2/\gamma` times as long as the cascade to react.

    >>> round(same_flip_rate_alpha((0.001, 0.1)), 8)
    5.266e-05
    """
    variance, half_step = _noise_moments(rates)
    return half_step / variance


def wrong_sign_probability(rates: Rates, snr: float, steps: ArrayLike | None = None) -> NDArray:
    r"""Return the probability that g has the wrong sign, for a mean gradient in Gaussian noise.

    .. math:: \Phi\left(-\mathrm{snr}\,(2 s_k - 1)\,/\sqrt{\textstyle\sum h^2}\right)

    ``snr`` is the mean of a single step's gradient over its standard deviation. ``steps`` are the
    steps k since the mean reversed, with 0 for the first gradient of the new sign, and :math:`s_k`
    is `step_response`; ``None`` means long ago, :math:`s_k = 1`. The result has the shape of
    ``steps``. Raises ValueError for a negative ``snr`` or step, and for no steps.

    >>> wrong_sign_probability((0.001, 0.1), 0.02, [0, 701, 10_000]).round(2).tolist()
    [0.82, 0.5, 0.18]
    """
    steps = None if steps is None else np.asarray(steps)
    if steps is not None and not steps.size:
        raise ValueError("steps must not be empty")
    if not snr >= 0 or (steps is not None and steps.min() < 0):
        raise ValueError(f"snr and steps must not be negative, not {snr!r} and {steps!r}")
    s = 1.0 if steps is None else step_response(rates, int(steps.max()) + 1)[steps]
    return special.ndtr(-snr * (2 * s - 1) / math.sqrt(noise_gain(rates)))


def steps_remembered(rates: Rates, start: float, sigma: float = 1.0) -> float:
    r"""Return the steps after which an initial value no longer decides the sign of g.

    .. math:: i^* = \frac{\ln\left(|g_0|\,/\,(\sigma\sqrt{\sum h^2})\right)}{-\ln(1-\alpha)}
              \approx \frac{1}{\alpha} \ln\frac{\lambda |w_0| \sqrt{N}}{\sigma}

    After these steps :math:`|g_0| (1-\alpha)^i` has decayed to the standard deviation of the
    filtered noise. ``start`` is :math:`|g_0| = \lambda |w_0|`, :math:`\alpha` the first of
    ``rates``, ``sigma`` the gradient's standard deviation :math:`\sigma`, and N the
    `effective_window`. A weight trained for fewer steps hardly flips. Returns 0 if ``start`` is
    below that noise. Raises ValueError unless ``start`` is 0 or more and ``sigma`` is positive.

    >>> round(steps_remembered(0.001, start=1.0))
    3798
    """
    if not (start >= 0 and sigma > 0):
        raise ValueError(f"need start >= 0 and sigma > 0, not {start!r} and {sigma!r}")
    ratio = start / (sigma * math.sqrt(noise_gain(rates)))
    alpha = _checked(rates)[0]
    return math.log(ratio) / -math.log1p(-alpha) if ratio > 1 and alpha < 1 else 0.0


# --- Rates that change while training ------------------------------------------------------------


def decaying_cascade(gradients: ArrayLike, alphas: Sequence[float], gamma: float) -> NDArray:
    r"""Return the filtered gradients :math:`g_i` under :math:`\alpha`-decay: two EMAs, literally.

    :math:`g_i = (1-\alpha_i)\, g_{i-1} + \alpha_i m_i`, with m the EMA of ``gradients`` with rate
    ``gamma``; g and m start at 0. ``gradients``: (steps, ...); ``alphas``: one rate per step, as
    from a learning-rate schedule with a fixed weight decay. The order of the two EMAs now matters;
    this is the order in Quist et al.'s released optimizer. Raises ValueError unless there is one
    alpha per step.

    >>> decaying_cascade([8.0, 8.0], [0.5, 0.25], gamma=0.5).tolist()
    [2.0, 3.0]
    """
    m = filter_gradients(gamma, gradients)
    alphas = _checked(alphas)
    if len(alphas) != len(m):
        raise ValueError(f"need one alpha per step, not {len(alphas)} for {len(m)} steps")
    filtered, g = np.empty_like(m), 0.0
    for i, alpha in enumerate(alphas):
        g = filtered[i] = (1 - alpha) * g + alpha * m[i]
    return filtered


def decaying_flip_rates(alphas: Sequence[float], gamma: float = 1.0) -> NDArray:
    r"""Return the flips in each step for white Gaussian noise through `decaying_cascade`.

    .. math:: \frac{1}{\pi} \arctan \frac{\alpha_i\sqrt{V_g V_m - C^2}}{(1-\alpha_i) V_g
              + \alpha_i C}, \qquad V_m = (1-\gamma)^2 V_{m_{i-1}} + \gamma^2,

    with :math:`V_g` the variance of :math:`g_{i-1}`, :math:`V_m` that of :math:`m_i` and C their
    covariance, all for gradients of variance 1 and from g = m = 0 on; the quotient compares
    :math:`g_i = (1-\alpha_i) g_{i-1} + \alpha_i m_i` with :math:`g_{i-1}`. ``alphas``: one rate
    per step; ``gamma``: of the other EMA, 1 for none. The first step flips a half, because the
    weight that it meets is random. Later ones flip more than `flip_rate` of the rate says until g
    has run for about 1/alpha steps, and less once a falling alpha no longer forgets. Our own
    derivation. Raises ValueError for rates outside (0, 1].

    >>> decaying_flip_rates([0.5, 0.5, 0.25]).round(3).tolist()
    [0.5, 0.352, 0.171]
    """
    alphas, (gamma,) = _checked(alphas), _checked((gamma,))
    turned = np.full(len(alphas), np.pi / 2)
    vm = vg = c = 0.0
    for i, alpha in enumerate(alphas):
        vm, c = (1 - gamma) ** 2 * vm + gamma**2, (1 - gamma) * c
        if i:
            across = alpha * math.sqrt(vg * vm - c**2)
            turned[i] = math.atan2(across, (1 - alpha) * vg + alpha * c)
        vg = (1 - alpha) ** 2 * vg + 2 * alpha * (1 - alpha) * c + alpha**2 * vm
        c = (1 - alpha) * c + alpha * vm
    return turned / np.pi


def freeze_point(alphas: Sequence[float]) -> int:
    r"""Return the first step from which the remaining decaying rates sum to at most 1.

    .. math:: \min\Big\{ t : \sum_{i \ge t} \alpha_i \le 1 \Big\}

    Before this step g keeps forgetting, and flips follow `flip_rate` of the current alpha; from
    there on g no longer forgets what it holds, and flips die out sooner than that law says. Out of
    T steps, a fraction of :math:`\sqrt{2/(\alpha_0 T)}` follows it when alpha falls linearly to 0,
    and about :math:`(12/(\pi^2\alpha_0 T))^{1/3}` along a cosine; for a constant alpha it is the
    last :math:`1/\alpha` steps. Returns 0 if all ``alphas`` together sum to at most 1. Raises
    ValueError unless there is at least one rate and all are from 0 to 1.

    >>> freeze_point([0.5, 0.5, 0.5, 0.25, 0.25])
    2
    """
    rates = np.asarray(alphas, dtype=float)
    if rates.ndim != 1 or not len(rates) or not ((rates >= 0) & (rates <= 1)).all():
        raise ValueError("need a sequence of rates, each from 0 to 1")
    left = np.cumsum(rates[::-1])[::-1]
    return int(np.searchsorted(-left, -1.0 - 1e-9))  # sums are rounded


def decaying_direct_form(alphas: Sequence[float], gamma: float) -> list[tuple[NDArray, NDArray]]:
    r"""Return the (b, a) of each step, in g and the gradient alone, under :math:`\alpha`-decay.

    .. math:: g_i = \alpha_i\gamma\nabla_i + [(1-\alpha_i) + (1-\gamma) r_i]\, g_{i-1}
              - (1-\gamma)(1-\alpha_{i-1})\, r_i\, g_{i-2}, \qquad r_i = \alpha_i/\alpha_{i-1}.

    There is one pair for each of ``alphas``; `time_varying_filter` runs them. To put
    :math:`\alpha_i` into the recursion for constant rates, ``ema_cascade(alphas[i], gamma)``,
    would leave out :math:`r_i`, and is wrong as soon as :math:`\alpha` changes.

    >>> [(b.tolist(), a.tolist()) for b, a in decaying_direct_form([0.5, 0.25], 0.5)]
    [([0.25], [1.0, -1.0, 0.25]), ([0.125], [1.0, -1.0, 0.125])]
    """
    alphas, (gamma,) = _checked(alphas), _checked((gamma,))
    before = np.concatenate([alphas[:1], alphas[:-1]])  # g = 0 before the first step: any will do
    r = alphas / before
    q = 1 - gamma
    a = np.stack([np.ones_like(r), alphas - 1 - q * r, q * (1 - before) * r], axis=1)
    return list(zip(gamma * alphas[:, None], a, strict=True))


def time_varying_filter(
    coefficients: Iterable[tuple[ArrayLike, ArrayLike]], gradients: ArrayLike
) -> NDArray:
    r"""Filter gradients by a recursion whose coefficients (b, a) may change at each step.

    :math:`g_i = b_0 \nabla_i - a_1 g_{i-1} - a_2 g_{i-2} - \dots`, from g = 0 on.
    ``coefficients``: one pair (b, a) per step, where b has one entry, :math:`a_0 = 1`, and all a
    have the same length; ``gradients``: (steps, ...). Raises ValueError unless there is one pair
    per step, and for another b or :math:`a_0`.

    >>> time_varying_filter([ema_cascade(0.5)] * 3, [8.0, 0.0, 8.0]).tolist()
    [4.0, 2.0, 5.0]
    """
    gradients, coefficients = np.asarray(gradients, dtype=float), list(coefficients)
    if len(coefficients) != len(gradients):
        raise ValueError(f"need one (b, a) per step, not {len(coefficients)} for {len(gradients)}")
    if any(len(b) != 1 or a[0] != 1 for b, a in coefficients):
        raise ValueError("each b must have one entry, and each a must begin with 1")
    g = np.zeros_like(gradients)
    for i, (b, a) in enumerate(coefficients):
        g[i] = b[0] * gradients[i] - sum(a[k] * g[i - k] for k in range(1, min(len(a), i + 1)))
    return g


# --- What torch.optim.SGD does -------------------------------------------------------------------


def _sgd_step(lr, momentum, weight_decay, dampening, nesterov) -> float:
    """Return lr times the gradient's factor in the momentum buffer; check SGD's settings."""
    if not (lr > 0 and 0 <= momentum < 1 and weight_decay >= 0 and 0 <= dampening < 1):
        raise ValueError(
            "need lr > 0, 0 <= momentum < 1, weight_decay >= 0 and 0 <= dampening < 1, not "
            f"{lr!r}, {momentum!r}, {weight_decay!r} and {dampening!r}"
        )
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError("Nesterov momentum needs a momentum above 0 and a dampening of 0")
    return lr * (1 - dampening) if momentum else lr  # without momentum torch ignores dampening


def critical_damping(momentum: float, nesterov: bool = False) -> float:
    r"""Return the largest product lr · weight_decay for which SGD is a cascade of EMAs.

    :math:`(1 - \sqrt\mu)^2` for ``momentum`` :math:`\mu`, and
    :math:`\left(\frac{1-\mu}{1+\mu}\right)^2` for Nesterov momentum. Above it the poles are
    complex: the filter rings. Raises ValueError for a ``momentum`` outside [0, 1).

    >>> round(critical_damping(0.9), 5), round(critical_damping(0.9, nesterov=True), 5)
    (0.00263, 0.00277)
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), not {momentum!r}")
    return ((1 - momentum) / (1 + momentum) if nesterov else 1 - math.sqrt(momentum)) ** 2


def sgd_filter(
    lr: float, momentum: float = 0.0, weight_decay: float = 0.0, *, dampening: float = 0.0,
    nesterov: bool = False,
) -> tuple[NDArray, NDArray]:  # fmt: skip
    r"""Return ``torch.optim.SGD`` as a filter (b, a) from gradients to latent weights, from w = 0.

    torch adds the weight decay to the momentum buffer, which has no factor :math:`1-\mu`:

    .. math:: \frac{-\eta(1-\tau)}{1 - (1+\mu-\eta(1-\tau)\lambda)z^{-1} + \mu z^{-2}}
              \quad\text{or, for Nesterov momentum,}\quad \frac{-\eta[(1+\mu) - \mu z^{-1}]}
              {1 - (1+\mu)(1-\eta\lambda)z^{-1} + \mu(1-\eta\lambda)z^{-2}}

    with ``lr`` :math:`\eta`, ``momentum`` :math:`\mu`, ``weight_decay`` :math:`\lambda`,
    ``dampening`` :math:`\tau`. The gain at frequency 0 is :math:`-1/\lambda`: the latent weight is
    :math:`w_i = -g_i/\lambda` for a filtered gradient g, which without Nesterov momentum is that
    of a cascade with the rates of `sgd_rates`. torch does not dampen the first gradient; to
    reproduce that, divide it by :math:`1-\tau` before filtering. Raises ValueError for settings
    that torch refuses, for a momentum of 1 or more and for a dampening outside [0, 1).

    >>> b, a = sgd_filter(0.5, momentum=0.5, weight_decay=0.25)
    >>> b.tolist(), a.tolist()
    ([-0.5], [1.0, -1.375, 0.5])
    """
    step = _sgd_step(lr, momentum, weight_decay, dampening, nesterov)
    keep = 1 - step * weight_decay
    if nesterov:
        a = [1, -(1 + momentum) * keep, momentum * keep]
        return -step * np.array([1 + momentum, -momentum]), np.array(a)
    return np.array([-step]), np.array([1, -(momentum + keep), momentum])


def sgd_rates(
    lr: float, momentum: float = 0.0, weight_decay: float = 0.0, *, dampening: float = 0.0,
    nesterov: bool = False,
) -> tuple[float, float] | tuple[complex, complex]:  # fmt: skip
    r"""Return the (alpha, gamma) whose poles ``torch.optim.SGD`` has with these settings.

    .. math:: \alpha\gamma = \eta\lambda, \qquad \alpha + \gamma = 1 - \mu + \eta\lambda
              \quad\text{(Nesterov's: } 1 - \mu + (1+\mu)\eta\lambda \text{)}

    with the arguments of `sgd_filter`, where :math:`\eta` stands for :math:`\eta(1-\tau)`. So
    :math:`\gamma \approx 1-\mu` and :math:`\alpha \approx \eta\lambda/(1-\mu)`: ten times
    :math:`\eta\lambda` at a momentum of 0.9. Nesterov's filter also has a zero. alpha is 0 without
    weight decay: a running sum.

    The two are complex (a conjugate pair of type ``complex``) where :math:`\eta\lambda` exceeds
    `critical_damping`: no cascade of EMAs equals that filter, and all functions that take
    ``rates`` refuse them. For absurdly large products, above :math:`(1+\sqrt\mu)^2`, or above 1
    for Nesterov momentum, they are real again, but not both at most 1. Raises ValueError as
    `sgd_filter` does.

    >>> alpha, gamma = sgd_rates(0.1, momentum=0.9, weight_decay=1e-4)
    >>> round(alpha, 8), round(gamma, 5)
    (0.00010009, 0.09991)
    """
    product = _sgd_step(lr, momentum, weight_decay, dampening, nesterov) * weight_decay
    excess = critical_damping(momentum, nesterov) - product
    if nesterov:
        total = 1 - momentum + (1 + momentum) * product
        square = excess * (1 + momentum) ** 2 * (1 - product)
    else:
        total = 1 - momentum + product
        square = excess * ((1 + math.sqrt(momentum)) ** 2 - product)
    if square < 0:
        gamma = complex(total, math.sqrt(-square)) / 2
        return gamma.conjugate(), gamma
    gamma = (total + math.sqrt(square)) / 2
    return product / gamma, gamma
