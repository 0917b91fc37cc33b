"""Images per second of `training.train` against a plain PyTorch loop, and the memory of both.

Data shaped like CIFAR-10, the same real network, augmentation (random crop with padding 4, flip),
batch size and optimizer for both. The plain loop is what a tutorial would write: a DataLoader with
two workers, torchvision's transforms one image at a time, float32.
"""

import gc
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from benchmarks.timing import row
from bnnbook import data, training
from bnnbook.models import binaryconnect_cnn

IMAGES = {"cpu": 4096, "cuda": 20_000}
BATCH = 128


class Images(TorchDataset):
    """CIFAR-10-shaped images, transformed one at a time as torchvision's data sets do."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels
        self.transform = transforms.Compose([
            transforms.ToPILImage(), transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        ])  # fmt: skip

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.labels[index]


def network(device) -> nn.Module:
    """Return a small real network of BinaryConnect's shape."""
    torch.manual_seed(0)
    return binaryconnect_cnn(widths=(16, 32, 64), hidden=128, weights="real").to(device)


def random_images(n: int) -> data.Dataset:
    """Return n images shaped like CIFAR-10's."""
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (n,))
    return data.Dataset(images, labels, images[:100], labels[:100], data.DIGITS, "random")


def plain_seconds(dataset, device) -> float:
    """Time the second epoch of the plain loop, whose workers the first one has started."""
    model = network(device)
    optimizer = torch.optim.Adam(model.parameters())
    images = Images(dataset.train_images, dataset.train_labels)
    loader = DataLoader(
        images, BATCH, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )
    for _ in range(2):
        start = time.perf_counter()
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds


def our_seconds(dataset, device) -> float:
    """Time the second epoch of training.train, its evaluation of a few test images included."""
    model = network(device)
    optimizer, augment = torch.optim.Adam(model.parameters()), data.crop_flip(4)
    history = training.train(
        model, dataset, optimizer, epochs=2, batch_size=BATCH, augment=augment, device=device
    )
    return history.rows[-1]["seconds"]


LOOPS = {"ours": our_seconds, "plain": plain_seconds}


def peak_bytes(name: str, device: torch.device, dataset) -> int:
    """Return the peak memory of a loop: on the GPU, or on a CPU that of a process of its own."""
    if device.type == "cuda":
        gc.collect()  # what other benchmarks have left in cycles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        LOOPS[name](dataset, device)
        return torch.cuda.max_memory_allocated(device) - before
    code = f"from benchmarks import loop; loop.print_peak({name!r}, {len(dataset.train_images)})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024


def print_peak(name: str, images: int) -> None:
    """Print the peak resident memory of this process after two epochs, in KiB (Linux).

    getrusage will not do: its peak includes that of the process which started this one. The plain
    loop's two workers are not counted.
    """
    LOOPS[name](random_images(images), torch.device("cpu"))
    status = Path("/proc/self/status").read_text(encoding="ascii")
    print(re.search(r"VmHWM:\s+(\d+)", status)[1])


def run(device: torch.device, repeats: int) -> list[dict]:
    """Time an epoch of each, a few times in turn, and measure the peak memory."""
    dataset = random_images(IMAGES[device.type])
    times = {name: [] for name in LOOPS}
    for _ in range(max(1, repeats // 5)):
        for name, loop in LOOPS.items():
            times[name].append(loop(dataset, device))
    ours, plain = (min(times[name]) for name in LOOPS)
    goal = 1.5 if device.type == "cpu" else 5
    speed = row("images a second, train / plain loop", ours, plain, f">= {goal}",
                plain >= goal * ours, "speed")  # fmt: skip
    held, plain_held = (peak_bytes(name, device, dataset) for name in LOOPS)
    memory = {"what": "peak memory, train / plain loop", "ratio": held / plain_held,
              "goal": "<= 1", "met": held <= plain_held, "bytes": held}  # fmt: skip
    return [speed, memory]
