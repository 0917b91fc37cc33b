"""Products of packed signs against float32 matrix products of the same signs.

The ratios that papers give are those of hand-written GPU kernels. These are the library's, in
PyTorch operations on 64-bit words: more than ten passes over memory for one product of words.
"""

import torch
from torch.nn.functional import linear

from benchmarks.timing import best, row
from bnnbook.binarize import sign
from bnnbook.inference import pack, xnor_product

BATCH = 256
SIZES = (1024, 4096)  # of BinaryNet's and of AlexNet's fully connected layers


def cases(size: int, device: torch.device) -> dict:
    """Return the functions to time: BATCH rows of inputs times a (size, size) weight."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        sign(torch.randn(rows, size, generator=generator)).to(device) for rows in (BATCH, size)
    )
    a, b = pack(x), pack(weight)
    return {
        "float32": lambda: linear(x, weight),
        "packed": lambda: xnor_product(a, b, size),
        "packed, with packing the inputs": lambda: xnor_product(pack(x), b, size),
    }


def run(device: torch.device, repeats: int) -> list[dict]:
    """Time them in turns; "ratio" is the packed product's time over that of float32."""
    table = []
    for size in SIZES:
        times = best(cases(size, device), device, repeats)
        plain = times.pop("float32")
        for name, time in times.items():
            what = f"{name} / float32, {BATCH} x {size} by {size} x {size}"
            table.append(row(what, time, plain, "", None))
    return table
