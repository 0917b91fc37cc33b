"""Why the optimizers' buffers are float32: what bfloat16 ones do, with either kind of rounding.

Each weight's gradient is a small mean plus noise (signal-to-noise ratio 0.01), and in one case the
mean alone. The table has, for the second half of the run, the share of weights that flip per step
and the share of signs that differ from those of the float32 run.
"""

import torch

from benchmarks.timing import best
from bnnbook.binarize import sign
from bnnbook.optim import CascadedEMA

GAMMA = 0.1


def stochastically(x: torch.Tensor) -> torch.Tensor:
    """Round float32 to bfloat16 values, up or down with a probability that keeps the mean."""
    bits = x.view(torch.int32)
    bits = bits + torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=x.device)
    return (bits & ~0xFFFF).view(torch.float32)


ROUNDINGS = {"float32": None, "nearest": lambda x: x.bfloat16().float(),
             "stochastic": stochastically}  # fmt: skip


def simulate(alpha: float, gradients, steps: int, n: int) -> dict[str, dict]:
    """Run the cascade on the same gradients with each kind of buffer."""
    runs = {}
    for name in ROUNDINGS:
        weight = torch.nn.Parameter(torch.ones(n))
        runs[name] = weight, CascadedEMA([weight], alpha, GAMMA)
    flips, differ = dict.fromkeys(ROUNDINGS, 0.0), dict.fromkeys(ROUNDINGS, 0.0)
    for step in range(steps):
        gradient = gradients(step)
        for name, (weight, optimizer) in runs.items():
            before, weight.grad = weight.detach().clone(), gradient
            optimizer.step()
            for buffer in optimizer.state[weight].values():
                if ROUNDINGS[name]:
                    buffer.copy_(ROUNDINGS[name](buffer))
            if step >= steps // 2:
                flips[name] += (weight != before).float().mean().item()
                other = runs["float32"][0]
                differ[name] += (sign(weight) != sign(other)).float().mean().item()
    half = steps - steps // 2
    return {k: {"flips": flips[k] / half, "differ": differ[k] / half} for k in ROUNDINGS}


def run(device, repeats: int, steps: int = 4000, n: int = 10_000) -> list[dict]:
    """Compare the buffers for two alphas under noise, and where a mean without noise reverses."""
    torch.manual_seed(0)
    mean, table = 0.01 * torch.randn(n), []
    cases = {f"noise, alpha = {a:g}": (a, lambda _: mean + torch.randn(n)) for a in (1e-2, 1e-3)}
    turned = lambda step: mean if step < steps // 2 else -mean  # noqa: E731
    cases["no noise, the mean turns round, alpha = 0.0002"] = (2e-4, turned)
    for name, (alpha, gradients) in cases.items():
        for rounding, found in simulate(alpha, gradients, steps, n).items():
            table.append({"what": f"{rounding} buffers: {name}", **found})
    return [*table, cost(device, repeats)]


def cost(device: torch.device, repeats: int) -> dict:
    """Time the stochastic rounding of two buffers of ten million weights against a fused step."""
    weight = torch.nn.Parameter(torch.ones(10_000_000, device=device))
    weight.grad = torch.randn_like(weight)
    optimizer = CascadedEMA([weight], 1e-3, GAMMA, fused=True)
    x = torch.randn_like(weight)
    times = best(
        {"step": optimizer.step, "rounding": lambda: (stochastically(x), stochastically(x))},
        device, repeats,
    )  # fmt: skip
    what = "stochastic rounding of both buffers / a fused step with float32 ones"
    return {"what": what, "ratio": times["rounding"] / times["step"]}
