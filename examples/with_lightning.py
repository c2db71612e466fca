"""A partly learned network in Lightning: what is learned travels in its checkpoints, the optimizer sees the rest never.

python examples/with_lightning.py --out lightning
python examples/with_lightning.py --out lightning --epochs 10 --resume
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from rwn_ext import convert, set_subsets_, subsets
from rwn_ext.paper import data, networks


class PartlyLearned(LightningModule):
    def __init__(self, num_classes: int, fraction: float) -> None:
        super().__init__()
        self.network = convert(networks.build("wrn-10-2", num_classes, seed=0), fraction)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        self.log("accuracy", 100 * (self.network(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        learned = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(learned, lr=0.05, momentum=0.9, weight_decay=5e-4)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["subsets"] = subsets(self.network)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Lightning loads weights and momentum afterwards.
        set_subsets_(self.network, checkpoint["subsets"])


def loader(split: data.Split, *, shuffle: bool) -> DataLoader:
    return DataLoader(TensorDataset(split.images / 127.5 - 1, split.labels), batch_size=64, shuffle=shuffle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the checkpoint")
    parser.add_argument("--resume", action="store_true", help="continue from it")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--fraction", type=float, default=0.1, help="of each layer's filters")
    parser.add_argument("--images", type=int, help="train on the first so many (default: all)")
    parser.add_argument("--accelerator", default="auto")
    options = parser.parse_args()

    seed_everything(0, verbose=False)
    digits = data.load(None, image_size=8)
    train = data.Split(digits.train.images[: options.images], digits.train.labels[: options.images])
    trainer = Trainer(
        max_epochs=options.epochs,
        accelerator=options.accelerator,
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[ModelCheckpoint(options.out, save_last=True, save_top_k=0)],
    )
    trainer.fit(
        PartlyLearned(digits.num_classes, options.fraction),
        loader(train, shuffle=True),
        loader(digits.test, shuffle=False),
        ckpt_path=options.out / "last.ckpt" if options.resume else None,
    )
    print(f"after {trainer.current_epoch} epochs  test accuracy {trainer.callback_metrics['accuracy']:.1f} %")


if __name__ == "__main__":
    main()
