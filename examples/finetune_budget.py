"""Fine-tune a trained ResNet on new classes within a budget of bytes, and see how the budget is spent.

A small ResNet learns the digits 0-4 first, which stands for a pretrained network. Then it learns 5-9: its filters are
chosen by the norm of their gradient on the new classes, so that what backward keeps, the gradients and the optimizer's
state together stay within the budget; normalisation is frozen, and the new classifier is learned whole.

    python examples/finetune_budget.py --budget "1.5 MB"
    python examples/finetune_budget.py --budget 0.1 --select magnitude      # a tenth of the weights
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwn_ext import convert
from rwn_ext.paper import data
from rwn_ext.report import memory

Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Two convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = nn.Conv2d(channels, width, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.downsample(x)).relu()


class ResNet(nn.Module):
    def __init__(self, channels: int, classes: int, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = Block(width, width, 1)
        self.layer2 = Block(width, 2 * width, 2)
        self.layer3 = Block(2 * width, 4 * width, 2)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.fc(x.mean((2, 3)))


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def part(split: data.Split, classes: range) -> Batch:
    """The images of these digits, which become classes 0, 1, ..."""
    chosen = (split.labels >= classes.start) & (split.labels < classes.stop)
    return split.images[chosen] / 127.5 - 1, split.labels[chosen] - classes.start


def batches(examples: Batch, epoch: int, size: int = 64) -> list[Batch]:
    order = torch.randperm(len(examples[0]), generator=torch.Generator().manual_seed(epoch))
    return [(examples[0][i], examples[1][i]) for i in order.split(size)]


def train(model: nn.Module, examples: Batch, epochs: int) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    model.train()
    for epoch in range(epochs):
        for batch in batches(examples, epoch):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()


def accuracy(model: nn.Module, examples: Batch) -> float:
    with torch.no_grad():
        return (model.eval()(examples[0]).argmax(1) == examples[1]).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="1.5 MB", help='bytes such as "1.5 MB", or a fraction of the weights')
    parser.add_argument("--select", default="gradient", choices=["gradient", "magnitude"])
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    budget = options.budget if any(c.isalpha() for c in options.budget) else float(options.budget)

    torch.manual_seed(0)
    digits = data.load(None, image_size=8)
    model = ResNet(digits.train.images.size(1), 5)
    train(model, part(digits.train, range(5)), options.epochs)
    print(f"digits 0-4 learned: test accuracy {accuracy(model, part(digits.test, range(5))):.1%}")

    new, test = part(digits.train, range(5, 10)), part(digits.test, range(5, 10))
    model.fc = nn.Linear(model.fc.in_features, 5)
    print(f"digits 5-9 before fine-tuning: test accuracy {accuracy(model, test):.1%}")
    example = batches(new, 0)[0][0]
    convert(
        model, budget=budget, example=example, select=options.select, loss=loss_of, batches=batches(new, 0)[:2],
        norm="frozen", verbose=True,
    )  # fmt: skip
    train(model, new, options.epochs)
    print(f"digits 5-9 after fine-tuning: test accuracy {accuracy(model, test):.1%}")
    print(memory(model.train(), example))


if __name__ == "__main__":
    main()
