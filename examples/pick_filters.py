"""Every epoch learn the filters whose gradient is largest, with one module and one optimizer all along.

Between epochs the gradient norm of every filter is measured on a few batches, as NEq and TraDy do, and the strongest
tenth of each layer is learned next. What was learned stays; momentum follows the filters that stay chosen.

    python examples/pick_filters.py --out run.pt
    python examples/pick_filters.py --out run.pt --epochs 20 --resume      # goes on, bit for bit on a CPU
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwn_ext import convert, gradient_norms, set_subsets_, subsets
from rwn_ext.paper import data, networks

Batch = tuple[Tensor, Tensor]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def batches(split: data.Split, epoch: int, size: int = 64) -> list[Batch]:
    """The images in an order that the epoch alone decides."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(epoch))
    return [(split.images[i] / 127.5 - 1, split.labels[i]) for i in order.split(size)]


def pick(model: nn.Module, optimizer: torch.optim.Optimizer, sample: list[Batch], fraction: float) -> None:
    """Makes the `fraction` of each layer's filters with the largest gradient the ones that are learned."""
    norms = gradient_norms(model, loss_of, sample)
    strongest = {name: norm.topk(max(1, int(len(norm) * fraction))).indices for name, norm in norms.items()}
    set_subsets_(model, {name: (filters, None) for name, filters in strongest.items()}, optimizer=optimizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="of the checkpoint")
    parser.add_argument("--resume", action="store_true", help="continue from it")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--fraction", type=float, default=0.1, help="of each layer's filters")
    parser.add_argument("--images", type=int, help="train on the first so many (default: all)")
    options = parser.parse_args()

    digits = data.load(None, image_size=8)
    train = data.Split(digits.train.images[: options.images], digits.train.labels[: options.images])
    model = convert(networks.build("wrn-10-2", digits.num_classes, seed=0), options.fraction)
    done = 0
    state = torch.load(options.out, weights_only=True) if options.resume else None
    if state is not None:
        # First what is learned, then the values: the optimizer's state has the shapes of what is learned.
        set_subsets_(model, state["subsets"])
        model.load_state_dict(state["model"])
        done = state["epochs"]
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.05, momentum=0.9, weight_decay=5e-4)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])

    for epoch in range(done + 1, options.epochs + 1):
        model.train()
        epoch_batches = batches(train, epoch)
        pick(model, optimizer, epoch_batches[:2], options.fraction)
        for batch in epoch_batches:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            correct = sum(
                (model(images).argmax(1) == labels).sum().item() for images, labels in batches(digits.test, 0)
            )
        print(
            f"epoch {epoch}  test accuracy {100 * correct / len(digits.test):.1f} %  "
            f"filters of block3.0.conv1: {subsets(model)['block3.0.conv1'][0]}",
            flush=True,
        )
        torch.save(
            {
                "epochs": epoch,
                "subsets": subsets(model),
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
            },
            options.out,
        )


if __name__ == "__main__":
    main()
