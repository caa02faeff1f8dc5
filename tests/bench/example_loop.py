"""Peer of the training loop: what the public pytorch/examples MNIST program does, at its settings.

Written anew from those settings: convolutions of 32 and 64 channels, dropout 0.25 and 0.5, a
hidden layer of 128, Adadelta at rate 1.0 times 0.7 an epoch, batches of 64, test batches of 1,000.
As there without an accelerator: the data loader works in the training process, in file order.

python -m tests.bench.example_loop FOLDER THREADS MAX_EPOCHS TARGET [BATCHES]
(FOLDER holds MNIST/raw as torchvision lays it out; with BATCHES, only so many are timed.)
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


class Net(nn.Module):
    """The example's net: 1.2 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(9216, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, 10),
            nn.LogSoftmax(dim=1),
        )

    def forward(self, images_NCHW: Tensor) -> Tensor:
        log_probabilities_NK: Tensor = self.layers(images_NCHW)
        return log_probabilities_NK


def main(folder: str, num_threads: int, max_epochs: int, target: float, num_batches: int) -> None:
    """Train until the test accuracy reaches the target; print the seconds and epochs as JSON."""
    torch.set_num_threads(num_threads)
    torch.manual_seed(1)
    start_s = time.perf_counter()
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )
    train, test = (
        datasets.MNIST(folder, train=part, transform=transform) for part in (True, False)
    )
    loader: Any = DataLoader(train, batch_size=64)
    net = Net()
    optimizer = torch.optim.Adadelta(net.parameters(), lr=1.0)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.7)
    if num_batches:
        start_s = time.perf_counter()
        _epoch(net, optimizer, itertools.islice(loader, num_batches))
        print(json.dumps({"images_per_s": 64 * num_batches / (time.perf_counter() - start_s)}))
        return
    accuracies: list[float] = []
    while len(accuracies) < max_epochs and (not accuracies or accuracies[-1] < target):
        _epoch(net, optimizer, loader)
        accuracies.append(_accuracy(net, DataLoader(test, batch_size=1000)))
        scheduler.step()
        print(f"epoch {len(accuracies)}: {accuracies[-1]:.2%}", file=sys.stderr, flush=True)
    print(json.dumps({"seconds": time.perf_counter() - start_s, "accuracies": accuracies}))


def _epoch(net: Net, optimizer: torch.optim.Optimizer, batches: Any) -> None:
    net.train()
    for images, labels in batches:
        optimizer.zero_grad()
        functional.nll_loss(net(images), labels).backward()
        optimizer.step()


def _accuracy(net: Net, batches: Any) -> float:
    net.eval()
    correct = total = 0
    with torch.no_grad():
        for images, labels in batches:
            correct += int((net(images).argmax(dim=1) == labels).sum())
            total += len(labels)
    return correct / total


if __name__ == "__main__":
    main(
        sys.argv[1],
        int(sys.argv[2]),
        int(sys.argv[3]),
        float(sys.argv[4]),
        int(sys.argv[5]) if len(sys.argv) > 5 else 0,
    )
