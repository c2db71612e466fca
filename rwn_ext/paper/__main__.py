"""The paper's programs: `python -m rwn_ext.paper train`, `sweep` and `demo`."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from rwn_ext.convert import NORMS
from rwn_ext.paper import data
from rwn_ext.paper.networks import NAMES
from rwn_ext.paper.schedules import Schedule, schedule_of
from rwn_ext.paper.training import AMP_DTYPES, Config, Diverged, Run
from rwn_ext.subsets import parse


def main(arguments: list[str] | None = None) -> int:
    """Runs a program; its exit code: 0 done, 1 failed on the way, 2 for a choice or file that cannot be used, 130 when
    interrupted."""
    options = _parser().parse_args(arguments)
    if not all(map(importlib.util.find_spec, options.needs)):
        return _fail("the programs need a few more packages: pip install 'rwn_ext[paper]'")
    return options.program(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rwn_ext.paper", description=__doc__)
    programs = parser.add_subparsers(required=True, metavar="PROGRAM")
    train = programs.add_parser("train", help="train one network the paper's way", description=_train.__doc__)
    train.set_defaults(program=_train, needs=("rich",))
    what = train.add_argument_group("what is learned")
    what.add_argument("--net", required=True, help=NAMES)
    what.add_argument(
        "--part", type=_part, help="of every convolution: 0.1 a fraction, 1 one filter, 1.0 all (default)"
    )
    what.add_argument("--frozen", choices=("random", "zero"), default="random", help="values of what is not learned")
    what.add_argument("--only", help="learn one part of the network: conv1, block1, ..., fc, or nothing (BN alone)")
    what.add_argument("--bn", choices=("learned", "frozen"), default="learned", help="gamma and beta of BatchNorm")
    what.add_argument("--dropout", type=float, help="of wide residual networks (default: the paper's)")
    how = train.add_argument_group("schedule (default: the paper's for the network)")
    how.add_argument("--epochs", type=int)
    how.add_argument("--batch-size", type=int, help="over all processes")
    how.add_argument("--lr", type=float)
    how.add_argument("--momentum", type=float)
    how.add_argument("--weight-decay", type=float)
    how.add_argument("--milestones", type=int, nargs="*", metavar="EPOCH", help="epochs after which the rate drops")
    how.add_argument("--factor", type=float, help="by which the rate drops")
    how.add_argument("--seed", type=int, default=0)
    where = train.add_argument_group("data, machine, files")
    where.add_argument(
        "--data", type=Path, metavar="FOLDER", help="CIFAR-10 or -100 as officially unpacked; else digits"
    )
    where.add_argument("--image-size", type=int, help="of the digits (default 32)")
    where.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    where.add_argument("--amp", choices=AMP_DTYPES, help="mixed precision")
    where.add_argument("--channels-last", action="store_true", help="NHWC, the faster layout on most machines")
    where.add_argument("--compile", action="store_true", help="torch.compile the network")
    where.add_argument("--out", type=Path, metavar="FOLDER", help="of checkpoint.pt and log.jsonl (default: in runs/)")
    where.add_argument("--resume", action="store_true", help="continue the run in --out")
    sweep = programs.add_parser("sweep", help="train every combination of a file", description=_sweep.__doc__)
    sweep.set_defaults(program=_sweep, needs=("rich", "tomllib" if sys.version_info >= (3, 11) else "tomli"))
    sweep.add_argument("file", type=Path, metavar="FILE.toml", help="tables [fixed] and [grid] of train's flags")
    sweep.add_argument("--out", type=Path, metavar="FOLDER", help="of the runs (default: in runs/)")
    sweep.add_argument("--jobs", type=int, default=1, help="runs at once, each a process (default 1)")
    sweep.add_argument("--budget-epochs", type=int, help="train no run for longer")
    sweep.add_argument("--data", type=Path, metavar="FOLDER", help="as for train")
    footprint = programs.add_parser("memory", help="what a training step keeps", description=_memory.__doc__)
    footprint.set_defaults(program=_memory, needs=("rich", "matplotlib"))
    footprint.add_argument("--net", required=True, help=NAMES)
    footprint.add_argument("--part", type=_part, help="as for train")
    footprint.add_argument("--lean", action="store_true", help="keep for backward only what the learned part needs")
    footprint.add_argument("--norm", choices=NORMS, default="train", help="frozen: BatchNorm is fixed altogether")
    footprint.add_argument("--batch-size", type=int, default=128)
    footprint.add_argument("--image-size", type=int, default=32)
    footprint.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    footprint.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of memory.json and memory.png (default: in runs/)"
    )
    demo = programs.add_parser("demo", help="what learning less saves, on digits", description=_demo.__doc__)
    demo.set_defaults(program=_demo, needs=("rich", "matplotlib", "sklearn"))
    demo.add_argument("--out", type=Path, metavar="FOLDER", default=Path("demo"))
    demo.add_argument("--epochs", type=int, default=10)
    demo.add_argument("--rounds", type=int, default=15, help="of the timing at the end")
    demo.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    return parser


def _part(text: str) -> int | float:
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _train(options: argparse.Namespace) -> int:
    """Trains one of the paper's networks, wholly or partly, by the paper's schedule; with torchrun on several GPUs.

    Every epoch ends with a line in log.jsonl and a checkpoint, from which --resume continues.
    """
    from rwn_ext.paper.progress import train_with_progress

    def prepare() -> Run:
        config = Config(
            net=options.net, schedule=_schedule(options), part=options.part, frozen=options.frozen, only=options.only,
            learn_bn=options.bn == "learned", dropout=options.dropout, seed=options.seed, amp=options.amp,
            channels_last=options.channels_last, compile=options.compile, device=_device(options.device),
        )  # fmt: skip
        images = data.load(options.data, image_size=options.image_size)
        return Run(replace(config, out=options.out or _folder(config, images.name)), images, resume=options.resume)

    def way_on(run: Run) -> str:
        return "--resume continues after the last whole epoch" if run.history else "no epoch was done; start again"

    return _run(prepare, train_with_progress, way_on)


def _sweep(options: argparse.Namespace) -> int:
    """Trains every combination of a TOML file and ends with a table. Stopped and started again, it continues."""
    from rwn_ext.paper.sweep import Sweep

    out = options.out or Path("runs") / options.file.stem
    failed = []

    def prepare() -> Sweep:
        return Sweep(options.file, out, jobs=options.jobs, budget_epochs=options.budget_epochs, data=options.data)

    def run(sweep: Sweep) -> None:
        failed.append(sweep.run())

    code = _run(prepare, run, lambda _: "the same command continues")
    return code or int(any(failed))


def _memory(options: argparse.Namespace) -> int:
    """Measures one training step of a network: what each layer keeps for backward, in plain nn and now; draws it."""
    from rwn_ext.paper.footprint import Footprint

    def prepare() -> Footprint:
        part = "all" if options.part is None else f"part{options.part}"
        choices = [options.net, part, *(["lean"] if options.lean else []), options.norm]
        return Footprint(
            options.net, options.part, options.lean, options.norm, options.batch_size, options.image_size,
            _device(options.device), options.out or Path("runs") / "-".join(["memory", *choices]),
        )  # fmt: skip

    return _run(prepare, Footprint.show, lambda _: "the same command measures anew")


def _demo(options: argparse.Namespace) -> int:
    """Trains wrn-16-2 on handwritten digits, wholly and with ever less of it learned: what is saved?"""
    from rwn_ext.paper.demo import Demo

    def prepare() -> Demo:
        return Demo(options.out, options.epochs, options.rounds, _device(options.device))

    return _run(prepare, Demo.show, lambda _: "the demo starts anew next time")


def _run(prepare: Callable, run: Callable, way_on: Callable[..., str]) -> int:
    """Prepares, then runs; errors of the preparation are the user's to mend and cost nothing."""
    try:
        prepared = prepare()
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        return _fail(" ".join(str(error).split()))
    try:
        run(prepared)
    except KeyboardInterrupt:
        print(f"interrupted; {way_on(prepared)}", file=sys.stderr)
        return 130
    except (Diverged, OSError) as error:
        print(f"failed: {error}; {way_on(prepared)}", file=sys.stderr)
        return 1
    if dist.is_initialized():
        # Together: whoever leaves while another still talks to it takes both down.
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _schedule(options: argparse.Namespace) -> Schedule:
    names = ("batch_size", "weight_decay", "epochs", "factor", "lr", "momentum", "milestones")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "milestones" in given:
        given["milestones"] = tuple(given["milestones"])
    return replace(schedule_of(options.net), **given)


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}: torch finds no usable GPU; leave --device out to train on the CPU")
    return name


def _folder(config: Config, images: str) -> Path:
    """runs/ and what tells this run from another."""
    choices = [f"part{config.part}" if config.part is not None else "all", config.frozen, config.only or ""]
    choices += ["" if config.learn_bn else "bn-frozen", f"seed{config.seed}"]
    return Path("runs") / "-".join([images, config.net, *filter(None, choices)])


if __name__ == "__main__":
    sys.exit(main())
