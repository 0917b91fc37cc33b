"""Literal NumPy twins of the update rules and of products of bits, transcribed one at a time."""

import numpy as np


def sign(x: float) -> float:
    """BinaryConnect, equation 1."""
    return 1.0 if x >= 0 else -1.0


def hard_sigmoid(x: float) -> float:
    """BinaryConnect, equation 3."""
    return max(0.0, min(1.0, (x + 1) / 2))


def squared_hinge(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """BinaryConnect's loss, one value an output: max(0, 1 - t y)^2 with t = ±1."""
    loss = np.empty_like(outputs)
    for n, row in enumerate(outputs):
        for k, y in enumerate(row):
            t = 1.0 if k == targets[n] else -1.0
            loss[n, k] = max(0.0, 1 - t * y) ** 2
    return loss


def binaryconnect_step(w: np.ndarray, gradient: np.ndarray, rate: float) -> np.ndarray:
    """Algorithm 1, step 3: w <- clip(w - rate * dC/dw_b)."""
    new = np.empty_like(w)
    for i in np.ndindex(w.shape):
        new[i] = max(-1.0, min(1.0, w[i] - rate * gradient[i]))
    return new


def binaryconnect_linear(w, x, targets, rate, steps):
    """Train a linear layer by Algorithm 1; return the latent weights and each step's binary ones.

    The loss is the mean squared hinge, its gradient taken at the binary weights.
    Shapes: w (classes, inputs), x (N, inputs), targets (N,).
    """
    history = []
    for _ in range(steps):
        binary = np.vectorize(sign)(w)
        outputs = x @ binary.T
        t = np.where(np.arange(w.shape[0]) == targets[:, None], 1.0, -1.0)
        slope = -2 * t * np.maximum(0.0, 1 - t * outputs) / outputs.size
        w = binaryconnect_step(w, slope.T @ x, rate)
        history.append(np.vectorize(sign)(w))
    return w, np.array(history)


def bop_step(w, m, gradient, gamma, threshold):
    """Helwegen et al., algorithm 2; returns the new weights and buffer."""
    w, m = w.copy(), m.copy()
    for i in np.ndindex(w.shape):
        m[i] = (1 - gamma) * m[i] + gamma * gradient[i]
        if abs(m[i]) > threshold and np.sign(m[i]) == np.sign(w[i]):
            w[i] = -w[i]
    return w, m


def cascaded_ema_step(w, m, g, gradient, alpha, gamma):
    """Quist et al., two averages and the flip; returns the new weights and both buffers."""
    w, m, g = w.copy(), m.copy(), g.copy()
    for i in np.ndindex(w.shape):
        m[i] = (1 - gamma) * m[i] + gamma * gradient[i]
        g[i] = (1 - alpha) * g[i] + alpha * m[i]
        if g[i] * w[i] > 0:
            w[i] = -w[i]
    return w, m, g


def latent_sgd_step(w, m, gradient, lr, gamma, weight_decay, clip=np.inf):
    """Quist et al., the latent-weight optimizer; returns the new latent weights and buffer."""
    w, m = w.copy(), m.copy()
    for i in np.ndindex(w.shape):
        m[i] = (1 - gamma) * m[i] + gamma * gradient[i]
        w[i] = (1 - lr * weight_decay) * w[i] - lr * m[i]
        w[i] = min(max(w[i], -clip), clip)
    return w, m


def ranked_flips(w, strength, count):
    """This book's rule: flip the count weights of the largest positive strength, first on ties."""
    w = w.copy()
    flat = [float(strength[i]) for i in np.ndindex(w.shape)]
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))
    for position in order[:count]:
        if flat[position] > 0:
            index = np.unravel_index(position, w.shape)
            w[index] = -w[index]
    return w


def evidence_step(kind, m, s, gradient, alpha, gamma):
    """The evidence of RankedFlips; returns it and both buffers."""
    e, m, s = np.empty_like(m), m.copy(), s.copy()
    for i in np.ndindex(m.shape):
        if kind == "gradient":
            e[i] = gradient[i]
        elif kind == "first":
            e[i] = m[i] = (1 - alpha) * m[i] + alpha * gradient[i]
        elif kind == "second":
            m[i] = (1 - gamma) * m[i] + gamma * gradient[i]
            e[i] = s[i] = (1 - alpha) * s[i] + alpha * m[i]
        else:
            m[i] = (1 - alpha) * m[i] + alpha * gradient[i]
            s[i] = (1 - alpha) * s[i] + alpha * gradient[i] ** 2
            e[i] = m[i] / np.sqrt(s[i])
    return e, m, s


def counter_step(level, gradient, lr, bits):
    """This book's counter, levels 0 ... 2^b - 1 of the latent weights -1 ... 1, to nearest."""
    level = level.copy()
    top = 2**bits - 1
    for i in np.ndindex(level.shape):
        latent = 2 * level[i] / top - 1 - lr * gradient[i]
        nearest = int(np.floor((latent + 1) / 2 * top + 0.5))
        level[i] = min(max(nearest, 0), top)
    return level


def pack(signs) -> list[int]:
    """One word for every 64 signs, bit i of a word being 1 where its i-th sign is not negative."""
    words = [0] * -(-len(signs) // 64)
    for i, value in enumerate(signs):
        words[i // 64] |= int(value >= 0) << (i % 64)
    return words


def xnor_product(a: list[int], b: list[int], n: int) -> int:
    """n - 2 popcount(a xor b), the ones counted by Python."""
    return n - 2 * sum((x ^ y).bit_count() for x, y in zip(a, b, strict=True))


def binary_convolution(x, w, stride, padding, dilation, groups):
    """Add up signs of x (C, H, W) times w (out, C / groups, kh, kw); the border counts as 0."""
    out, depth, kh, kw = w.shape
    _, height, width = x.shape
    rows = (height + 2 * padding - dilation * (kh - 1) - 1) // stride + 1
    columns = (width + 2 * padding - dilation * (kw - 1) - 1) // stride + 1
    y = np.zeros((out, rows, columns), dtype=int)
    for o, i, j, c, p, q in np.ndindex(out, rows, columns, depth, kh, kw):
        row, column = i * stride - padding + p * dilation, j * stride - padding + q * dilation
        if 0 <= row < height and 0 <= column < width:
            channel = o // (out // groups) * depth + c
            y[o, i, j] += int(sign(x[channel, row, column]) * sign(w[o, c, p, q]))
    return y
