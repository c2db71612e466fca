"""The paper's training run: SGD by its schedule, a log line and a checkpoint every epoch, exact resumption."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rwn_ext import set_subsets_, subsets
from rwn_ext.files import replacing
from rwn_ext.paper import data, networks
from rwn_ext.paper.graphed import Captured
from rwn_ext.paper.magnitudes import magnitudes, means
from rwn_ext.paper.schedules import Schedule

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
OPTIMIZERS = ("sgd", "adam")
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Config:
    """One run. Everything but where and for how long decides its numbers."""

    net: str
    schedule: Schedule
    part: int | float | None = None
    frozen: str = "random"
    only: str | None = None
    bn: str = "learned"
    dropout: float | None = None
    seed: int = 0
    dim: int = 0
    select: str = "last"
    gamma: str = "ones"
    optimizer: str = "sgd"
    start: Path | None = None
    """The folder of a run whose weights this one begins with; a classifier of another size begins anew."""
    amp: str | None = None
    channels_last: bool = False
    compile: bool = False
    graph: bool = False
    """Whether training and evaluation steps are captured in CUDA graphs; a CPU computes the same without."""
    device: str = "cpu"
    out: Path = Path("runs/run")

    def identity(self, images: data.ImageSet) -> dict[str, Any]:
        """What a run must share with a checkpoint to continue it."""
        values = dataclasses.asdict(self)
        schedule = {k: v for k, v in values.pop("schedule").items() if k != "epochs"}
        for name in ("out", "device", "compile", "graph", "start"):
            del values[name]
        identity = values | schedule | {"data": images.name, "image_size": images.train.images.size(-1)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in identity.items()}


class Diverged(RuntimeError):
    """The loss is no longer a number."""


class Watcher(Protocol):
    """Who is told how a run goes."""

    def batch(self, done: int, total: int, epoch: int) -> None: ...

    def epoch(self, record: dict[str, Any]) -> None: ...


class Run:
    """A run ready to go: every choice checked, the network built, the checkpoint (if resumed) loaded, nothing written.

    Each epoch draws its order, augmentation and dropout from (seed, epoch) alone, so a resumed run continues bit for
    bit wherever the machine computes the same twice.

    Raises ValueError (DataError for data) for a choice that cannot be run and a checkpoint that cannot be resumed.
    """

    def __init__(self, config: Config, images: data.ImageSet, *, resume: bool = False) -> None:
        self.config, self.ranks = config, Ranks()
        _check(config, self.ranks)
        self.device = torch.device(self.ranks.local_device(config.device))
        self.images = images.to(self.device) if _fits(images, self.device) else images
        if config.graph and self.images.train.images.device.type != self.device.type:
            raise ValueError(f"graph: the images of {images.name} do not fit on {self.device}; leave it out")
        start = None if config.start is None else read_checkpoint(config.start / CHECKPOINT)["model"]
        self.identity = config.identity(images) | {"start": None if start is None else _hash(start)}
        self.model = self.network(config.seed, start)
        self.history: list[dict[str, Any]] = []
        state = self._checkpoint(resume)
        if state is not None:
            with self._checkpoint_errors():
                set_subsets_(self.model, state["subsets"])
                self.model.load_state_dict(state["model"])
                self.history = state["history"]
        self.model.to(self.device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._check_input()
        self.optimizer = self._new_optimizer()
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        """Of an epoch so far: the loss, what was classified correctly."""
        self.correct = torch.zeros(1, dtype=torch.float64, device=self.device)
        self._captured_lr: float | None = None
        self._captured_learn: Callable[[Tensor, Tensor], None] | None = None
        self._judge: Callable[[Tensor], None] = Captured(self._count_correct) if config.graph else self._count_correct
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        if state is not None:
            with self._checkpoint_errors():
                self._restore_optimizer(state)

    @property
    def best(self) -> float:
        """The highest test accuracy so far: the number the paper reports."""
        return max((record["test_accuracy"] for record in self.history), default=0.0)

    def network(self, seed: int, start: Mapping[str, Tensor] | None = None) -> networks.Network:
        """A network of this run's kind."""
        config = self.config
        return networks.build(
            config.net, self.images.num_classes, config.part, config.frozen, config.only, config.bn, config.dropout,
            seed, dim=config.dim, select=config.select, gamma=config.gamma, start=start,
        )  # fmt: skip

    @property
    def learned_weights(self) -> int:
        """How many numbers are learned."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def train(self, watcher: Watcher) -> float:
        """Trains the epochs that are left; returns the best test accuracy, in percent."""
        for _ in self.epochs(watcher):
            pass
        return self.best

    def epochs(self, watcher: Watcher) -> Iterator[dict[str, Any]]:
        """Trains an epoch each time it is asked for the next, as long as any is left; yields the epoch's record."""
        learner: nn.Module = self.model
        if self.ranks.size > 1:
            learner = DistributedDataParallel(learner)
        self._captured_learn = None
        if self.config.compile:
            learner = torch.compile(learner)  # type: ignore[assignment]
        if self.ranks.first:
            self.config.out.mkdir(parents=True, exist_ok=True)
            self._write_log()
        for epoch in range(len(self.history), self.config.schedule.epochs):
            started = time.perf_counter()
            lr = self.config.schedule.lr_at(epoch)
            loss, accuracy = self._train_epoch(learner, epoch, lr, watcher)
            if not math.isfinite(loss):
                raise Diverged(f"the loss of epoch {epoch + 1} is {loss}; lower --lr, or train without --amp")
            test_accuracy = self._evaluate()
            record = {
                "epoch": epoch + 1, "lr": lr, "train_loss": loss, "train_accuracy": accuracy,
                "test_accuracy": test_accuracy, "best": max(self.best, test_accuracy),
                "seconds": round(time.perf_counter() - started, 3), "learned_weights": self.learned_weights,
                "magnitudes": means(magnitudes(self.model.state_dict(), subsets(self.model))),
            }  # fmt: skip
            self.history.append(record)
            if self.ranks.first:
                self.save()
                self._write_log()
                watcher.epoch(record)
            yield record

    def _train_epoch(self, learner: nn.Module, epoch: int, lr: float, watcher: Watcher) -> tuple[float, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Order and augmentation are drawn alike on every rank; dropout must differ between them.
        seed = 1_000_003 * self.config.seed + epoch
        order = torch.Generator().manual_seed(seed)
        augmentation = torch.Generator(self.device).manual_seed(seed + self.ranks.rank * 500_009)
        torch.manual_seed(seed + self.ranks.rank * 500_009)
        learner.train()
        size, flip, padding = self.config.schedule.batch_size, self.images.flip, self.images.padding
        batches = data.batch_rows(
            self.images.train, size, generator=order, rank=self.ranks.rank, world_size=self.ranks.size
        )
        learn = self._learning(learner, lr)
        self.sums.zero_()
        count = 0
        for done, rows in enumerate(batches, 1):
            learn(rows, data.draws(len(rows), augmentation, padding=padding, flip=flip))
            count += len(rows) * self.ranks.size
            watcher.batch(done, len(batches), epoch)
        loss_sum, correct_sum = self.ranks.sum(self.sums.clone()).tolist()
        return loss_sum / count, 100 * correct_sum / count

    def _learning(self, learner: nn.Module, lr: float) -> Callable[[Tensor, Tensor], None]:
        """A step on these rows of the training set with these random numbers, that adds to `sums`."""

        def learn(rows: Tensor, draws: Tensor) -> None:
            images, labels = self._rows(self.images.train, rows)
            loss, logits = self.step(learner, data.crop_flip(images, draws, padding=self.images.padding), labels)
            correct = (logits.argmax(1) == labels).sum()
            self.sums += torch.stack([loss.double() * len(labels), correct.double()])

        if not self.config.graph:
            return learn
        if self._captured_learn is None or self._captured_lr != lr:
            # The learning rate is captured as a number.
            self._captured_lr, self._captured_learn = lr, Captured(learn)
        return self._captured_learn

    def _rows(self, split: data.Split, rows: Tensor) -> tuple[Tensor, Tensor]:
        """On the device, also of a set that is too large for it."""
        images, labels = split.images.index_select(0, rows), split.labels.index_select(0, rows)
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def step(self, learner: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One step of SGD on uint8 images (N, 3, H, W); the loss and the logits before it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, logits = self.loss(learner, images, labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), logits.detach()

    def loss(self, learner: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch, to be differentiated, and its logits."""
        with self._autocast():
            logits = learner(self._prepare(images))
            return F.cross_entropy(logits, labels), logits

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Test accuracy in percent, each rank classifying its share with the running statistics of the first."""
        self.ranks.share_buffers(self.model)
        self.model.eval()
        self.correct.zero_()
        for rows in data.batch_rows(self.images.test, self.config.schedule.batch_size * self.ranks.size):
            share = rows[self.ranks.rank :: self.ranks.size]
            if len(share):
                self._judge(share)
        return 100 * self.ranks.sum(self.correct.clone()).item() / len(self.images.test)

    def _count_correct(self, rows: Tensor) -> None:
        images, labels = self._rows(self.images.test, rows)
        with self._autocast():
            logits = self.model(self._prepare(images))
        self.correct += (logits.argmax(1) == labels).sum()

    @torch.no_grad()
    def probabilities(self) -> Tensor:
        """The model's softmax of every test image, (N, classes)."""
        self.model.eval()
        parts = []
        for rows in data.batch_rows(self.images.test, self.config.schedule.batch_size):
            images, _ = self._rows(self.images.test, rows)
            with self._autocast():
                parts.append(self.model(self._prepare(images)).float().softmax(1))
        return torch.cat(parts)

    def _prepare(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return data.normalize(images, self.images.mean, self.images.std).contiguous(memory_format=layout)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.amp is None:
            return nullcontext()
        return torch.autocast(self.device.type, AMP_DTYPES[self.config.amp])

    @torch.no_grad()
    def _check_input(self) -> None:
        """The images must survive the network's poolings."""
        size = self.images.train.images.size(-1)
        mode = self.model.training
        try:
            self.model.eval()(torch.zeros(1, 3, size, size, device=self.device))
        except RuntimeError as error:
            raise ValueError(f"{self.config.net} cannot take {size}x{size} images ({error})") from None
        finally:
            self.model.train(mode)

    def _checkpoint(self, resume: bool) -> dict[str, Any] | None:
        path = self.config.out / CHECKPOINT
        if not resume:
            if path.exists():
                raise ValueError(f"{path} exists: pass --resume to continue that run, or another --out for a new one")
            return None
        if not path.exists():
            raise ValueError(f"{path} does not exist: there is nothing to resume; leave --resume out to start")
        state = read_checkpoint(path)
        identity = _LATER | state["identity"]
        if not identity.pop("learn_bn", True):
            identity["bn"] = "frozen"
        for key, value in self.identity.items():
            # repr: 1 filter and all of them, 1.0, are equal to Python.
            there = identity.get(key)
            if repr(there) != repr(value):
                raise ValueError(
                    f"{path} is of another run: {key}={there!r} there, {value!r} here; "
                    "give its own arguments or another --out"
                )
        with self._checkpoint_errors():
            for number, record in enumerate(state["history"], 1):
                if record["epoch"] != number or not isinstance(record["test_accuracy"], float):
                    raise ValueError(f"its record {number} is {record!r}")
        return state

    def _new_optimizer(self) -> torch.optim.Optimizer:
        learned, schedule = [p for p in self.model.parameters() if p.requires_grad], self.config.schedule
        if self.config.optimizer == "adam":
            capturable = self.config.graph and self.device.type == "cuda"
            return torch.optim.Adam(learned, lr=schedule.lr, weight_decay=schedule.weight_decay, capturable=capturable)
        # On a CPU, torch's default takes four passes and calls for each of many small Parameters.
        return torch.optim.SGD(
            learned, lr=schedule.lr, momentum=schedule.momentum, weight_decay=schedule.weight_decay,
            fused=self.device.type == "cpu",
        )  # fmt: skip

    def _restore_optimizer(self, state: dict[str, Any]) -> None:
        """Moments and the scaler's scale; every learned parameter has moments of its shape after an epoch."""
        own = [{k: v for k, v in group.items() if k in _SETTINGS} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        moments = ("exp_avg", "exp_avg_sq") if self.config.optimizer == "adam" else ("momentum_buffer",)
        kept = self.config.optimizer == "adam" or self.config.schedule.momentum
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            if any(group[key] != value for key, value in settings.items() if key not in ("capturable", "fused")):
                raise ValueError("its optimizer has other settings")
            # The checkpoint may be of a run on another device, or of one that did not fuse.
            group["fused"] = settings["fused"]
            if "capturable" in settings:
                # The checkpoint may be of a run that was captured, or not.
                group["capturable"] = settings["capturable"]
                device = self.device if group["capturable"] else "cpu"
                for moments_of in self.optimizer.state.values():
                    moments_of["step"] = moments_of["step"].to(device)
            for parameter in group["params"] if kept and self.history else ():
                for moment in moments:
                    if self.optimizer.state[parameter][moment].shape != parameter.shape:
                        raise ValueError("its momentum is of other shapes")
        self.scaler.load_state_dict(state["scaler"])

    @contextmanager
    def _checkpoint_errors(self) -> Iterator[None]:
        """Whatever a checkpoint holds that does not fit: one error that says so."""
        try:
            yield
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            path = self.config.out / CHECKPOINT
            raise ValueError(f"{path} is no checkpoint of this run ({reason}); give another --out") from None

    def save(self) -> None:
        """Writes the checkpoint."""
        self.config.out.mkdir(parents=True, exist_ok=True)
        state = {
            "identity": self.identity,
            "subsets": subsets(self.model),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
        }
        with replacing(self.config.out / CHECKPOINT) as path:
            torch.save(state, path)

    def _write_log(self) -> None:
        """The whole log from the history, so that it never says more or less than the checkpoint."""
        with replacing(self.config.out / LOG) as path:
            path.write_text("".join(json.dumps(record) + "\n" for record in self.history))


def _fits(images: data.ImageSet, device: torch.device) -> bool:
    """Whether the images may take their place on the device: half of what is free there at most."""
    if device.type != "cuda":
        return True
    total = sum(split.images.numel() for split in (images.train, images.test))
    return total <= torch.cuda.mem_get_info(device)[0] // 2


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a run has saved. Raises ValueError for a file that is none or holds code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = "it does not hold tensors and plain values alone"
        raise ValueError(f"{path} is no checkpoint that can be read ({reason}); remove it to start anew") from None
    kinds = {"identity": dict, "subsets": dict, "model": dict, "optimizer": dict, "scaler": dict, "history": list}
    if not isinstance(state, dict) or any(not isinstance(state.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{path} is no checkpoint of this program; give another --out")
    return state


# Settings of an optimizer that a run decides; what older checkpoints do not say because there was one choice alone.
_SETTINGS = ("momentum", "weight_decay", "betas", "capturable", "fused")
_LATER = {"bn": "learned", "dim": 0, "select": "last", "gamma": "ones", "optimizer": "sgd"}


def _hash(state: Mapping[str, Tensor]) -> str:
    """Of the values of a state dict."""
    whole = hashlib.sha256()
    for key in sorted(state):
        whole.update(key.encode() + state[key].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()[:16]


def _check(config: Config, ranks: Ranks) -> None:
    """What can be known before anything is built."""
    if config.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={config.optimizer!r} is unknown; choose one of {', '.join(OPTIMIZERS)}")
    if config.amp is not None and config.amp not in AMP_DTYPES:
        raise ValueError(f"amp={config.amp!r} is unknown; choose one of {', '.join(AMP_DTYPES)}")
    if config.graph and (config.amp == "fp16" or ranks.size > 1):
        raise ValueError("graph: a CUDA graph can hold no loss scaling (use amp='bf16') and no other processes' work")
    if torch.device(config.device).type not in ("cpu", "cuda"):
        raise ValueError(f"device={config.device!r} cannot train here; choose cpu or cuda")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed={config.seed} is outside 0..{2**32 - 1}")
    if config.schedule.batch_size % ranks.size:
        raise ValueError(f"batch_size={config.schedule.batch_size} must be a multiple of the {ranks.size} processes")
    place = next(folder for folder in (config.out, *config.out.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"out={config.out}: {place} is no folder that can be written to; give another --out")


class Ranks:
    """The processes of this run: one, or as many as torchrun started."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.first = self.rank == 0

    def local_device(self, device: str) -> str:
        """The device of this process; joins the others."""
        if self.size == 1:
            return device
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return device

    def sum(self, values: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
