"""A partly learned network in a loop of Hugging Face's accelerate: prepare, backward, save_state, load_state.

python examples/with_accelerate.py --out accelerate
accelerate launch examples/with_accelerate.py --out accelerate --epochs 10 --resume
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

from rwn_ext import convert
from rwn_ext.paper import data, networks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the checkpoint")
    parser.add_argument("--resume", action="store_true", help="continue from it")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--fraction", type=float, default=0.1, help="of each layer's filters")
    parser.add_argument("--images", type=int, help="train on the first so many (default: all)")
    options = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(0)
    digits = data.load(None, image_size=8)
    images, labels = digits.train.images[: options.images], digits.train.labels[: options.images]
    loader = DataLoader(TensorDataset(images / 127.5 - 1, labels), batch_size=64, shuffle=True)
    # The state holds the weights, not which of them are learned: the same arguments choose the same.
    model = convert(networks.build("wrn-10-2", digits.num_classes, seed=0), options.fraction)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.05, momentum=0.9, weight_decay=5e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    done = 0
    if options.resume:
        accelerator.load_state(str(options.out))
        done = int((options.out / "epochs").read_text())
    for epoch in range(done + 1, options.epochs + 1):
        model.train()
        for batch, targets in loader:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(batch), targets))
            accelerator.clip_grad_norm_(learned, 5.0)
            optimizer.step()
        model.eval()
        with torch.no_grad():
            logits = model((digits.test.images / 127.5 - 1).to(accelerator.device))
        accuracy = 100 * (logits.argmax(1).cpu() == digits.test.labels).float().mean()
        accelerator.print(f"epoch {epoch}  test accuracy {accuracy:.1f} %", flush=True)
        accelerator.save_state(str(options.out))
        if accelerator.is_main_process:
            (options.out / "epochs").write_text(str(epoch))


if __name__ == "__main__":
    main()
