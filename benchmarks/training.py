"""Images a second of training.train against a plain PyTorch loop, in one process.

    python benchmarks/training.py [--device cpu] [--images 4096]

Data shaped like CIFAR-10, the same real network, augmentation (random crop with padding 4, flip),
batch size and optimizer for both. The plain loop is what a tutorial would write: a DataLoader with
two workers, torchvision's transforms one image at a time, float32. Also: what binary weights cost.
"""

import argparse
import json
import time

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from bnnbook import data, records, training
from bnnbook.models import binaryconnect_cnn


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


def network(weights: str, device) -> nn.Module:
    torch.manual_seed(0)
    return binaryconnect_cnn(widths=(16, 32, 64), hidden=128, weights=weights).to(device)


def plain_seconds(dataset, device, batch_size) -> float:
    """Time one epoch of the plain loop, workers already started by a first one."""
    model = network("real", device)
    optimizer = torch.optim.Adam(model.parameters())
    images = Images(dataset.train_images, dataset.train_labels)
    loader = DataLoader(
        images, batch_size, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
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


def our_seconds(dataset, device, batch_size, weights="real") -> float:
    """Time the second epoch of training.train, its evaluation of a few test images included."""
    model = network(weights, device)
    optimizer, augment = torch.optim.Adam(model.parameters()), data.crop_flip(4)
    history = training.train(
        model, dataset, optimizer, epochs=2, batch_size=batch_size, augment=augment, device=device
    )
    return history.rows[-1]["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = training.choose_device(options.device)
    images = torch.randint(0, 256, (options.images, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (options.images,))
    names = tuple("0123456789")
    dataset = data.Dataset(images, labels, images[:100], labels[:100], names, "random")
    ours, plain, binary = [], [], []
    for _ in range(options.repeats):
        ours.append(our_seconds(dataset, device, options.batch_size))
        plain.append(plain_seconds(dataset, device, options.batch_size))
        binary.append(our_seconds(dataset, device, options.batch_size, "deterministic"))
    result = {
        "images_per_second": options.images / min(ours),
        "plain_images_per_second": options.images / min(plain),
        "ratio_to_plain": min(plain) / min(ours),
        "binary_to_real_time": min(binary) / min(ours),
        "repeats": options.repeats,
        "device": records.device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    main()
