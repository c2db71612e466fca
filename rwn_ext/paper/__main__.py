"""The paper's programs: `python -m rwn_ext.paper train`, `sweep`, `reproduce`, `ensemble`, `tasks`, `transfer`, ..."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rwn_ext.convert import NORMS
from rwn_ext.paper import data, networks
from rwn_ext.paper.heap import keep_freed_memory
from rwn_ext.paper.networks import NAMES
from rwn_ext.paper.schedules import Schedule, schedule_of
from rwn_ext.paper.training import AMP_DTYPES, CHECKPOINT, OPTIMIZERS, Config, Diverged, Ranks, Run, read_checkpoint
from rwn_ext.subsets import POLICIES, parse


def main(arguments: list[str] | None = None) -> int:
    """Runs a program; its exit code: 0 done, 1 failed on the way, 2 for a choice or file that cannot be used, 130 when
    interrupted."""
    options = _parser().parse_args(arguments)
    if not all(map(importlib.util.find_spec, options.needs)):
        return _fail("the programs need a few more packages: pip install 'rwn_ext[paper]'")
    keep_freed_memory()
    return options.program(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rwn_ext.paper", description=__doc__)
    programs = parser.add_subparsers(required=True, metavar="PROGRAM")
    train = programs.add_parser("train", help="train one network the paper's way", description=_train.__doc__)
    train.set_defaults(program=_train, needs=("rich",))
    _add_run_flags(train)
    train.add_argument("--data", type=Path, metavar="FOLDER", help=DATA)
    train.add_argument("--start", type=Path, metavar="FOLDER", help="begin with the weights of the run in this folder")
    train.add_argument("--resume", action="store_true", help="continue the run in --out")
    train.add_argument(
        "--compare", action="store_true", help="train a twin in plain nn.Conv2d beside it and print the ratio of times"
    )
    ensemble = programs.add_parser("ensemble", help="networks from one start, averaged", description=_ensemble.__doc__)
    ensemble.set_defaults(program=_ensemble, needs=("rich", "safetensors"))
    _add_run_flags(ensemble)
    ensemble.add_argument("--data", type=Path, metavar="FOLDER", help=DATA)
    ensemble.add_argument("--members", type=int, default=5, help="how many (default 5)")
    ensemble.add_argument("--start-epochs", type=int, default=0, help=START)
    tasks = programs.add_parser("tasks", help="several tasks over one backbone", description=_tasks.__doc__)
    tasks.set_defaults(program=_tasks, needs=("rich", "safetensors"))
    _add_run_flags(tasks)
    tasks.add_argument(
        "--data", type=Path, metavar="FOLDER", action="append", help=f"a task, or what is made into tasks: {DATA}"
    )
    tasks.add_argument("--split", type=int, metavar="N", help="tasks: the classes in N groups")
    tasks.add_argument(
        "--rotations", type=int, choices=(2, 3, 4), help="tasks: the images turned by 0, 90, ... degrees"
    )
    tasks.add_argument("--start-epochs", type=int, default=0, help=START + ", on the first task")
    transfer = programs.add_parser(
        "transfer", help="a trained network learns by one part", description=_transfer.__doc__
    )
    transfer.set_defaults(program=_transfer, needs=("rich", "safetensors"))
    _add_run_flags(transfer)
    transfer.add_argument("--data", type=Path, metavar="FOLDER", help=f"of the target: {DATA}")
    transfer.add_argument(
        "--source", type=Path, metavar="FOLDER", help="what the network has learned before (default: --data, whose "
        "images the target then turns by 90 degrees)",
    )  # fmt: skip
    transfer.add_argument("--start-epochs", type=int, help="on the source (default: --epochs)")
    transfer.add_argument("--parts", nargs="+", metavar="PART", help="default: each part of the network, nothing, all")
    magnitudes = programs.add_parser("magnitudes", help="of a run's weights", description=_magnitudes.__doc__)
    magnitudes.set_defaults(program=_magnitudes, needs=("rich",))
    magnitudes.add_argument("run", type=Path, metavar="FOLDER", help="of a training run")
    sweep = programs.add_parser("sweep", help="train every combination of a file", description=_sweep.__doc__)
    sweep.set_defaults(program=_sweep, needs=("rich", "tomllib" if sys.version_info >= (3, 11) else "tomli"))
    sweep.add_argument("file", type=Path, metavar="FILE.toml", help="tables [fixed] and [grid] of train's flags")
    sweep.add_argument("--out", type=Path, metavar="FOLDER", help="of the runs (default: in runs/)")
    sweep.add_argument("--jobs", type=int, default=1, help="runs at once, each a process (default 1)")
    sweep.add_argument("--budget-epochs", type=int, help="train no run for longer")
    sweep.add_argument("--data", type=Path, metavar="FOLDER", help="as for train")
    figure = programs.add_parser("reproduce", help="a figure of the paper", description=_reproduce.__doc__)
    figure.set_defaults(program=_reproduce, needs=("rich", "matplotlib"))
    figure.add_argument("figure", nargs="*", metavar="FIGURE", help="--list names them")
    figure.add_argument("--list", action="store_true", help="the figures and the families of networks in each")
    figure.add_argument("--data", type=Path, metavar="FOLDER", help="CIFAR as for train; else small networks on digits")
    figure.add_argument("--out", type=Path, metavar="FOLDER", default=Path("reproduced"), help="(default: reproduced)")
    figure.add_argument("--family", nargs="+", default=(), help="of networks (default: the figure's first)")
    figure.add_argument("--seeds", type=int, help="runs of everything, for mean and spread (default 1)")
    figure.add_argument("--jobs", type=int, help="runs at once (default: as many as cores or GPUs)")
    figure.add_argument("--budget-epochs", type=int, help="train no run for longer")
    figure.add_argument("--rounds", type=int, help="of timing steps (default 9); 0 measures no costs")
    figure.add_argument("--quick", action="store_true", help="two epochs, one seed, three rounds: to see it work")
    figure.add_argument("--device", help="as for train")
    figure.add_argument("--amp", choices=AMP_DTYPES, help="as for train")
    figure.add_argument("--channels-last", action="store_true", help="as for train")
    figure.add_argument("--compile", action="store_true", help="as for train")
    figure.add_argument("--graph", action="store_true", help="as for train")
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


DATA = "CIFAR-10 or -100 as officially unpacked; without one, scikit-learn's digits"
START = "the shared start is trained for so long (default 0: it is random)"


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    """What every program that trains needs to know of a run."""
    what = parser.add_argument_group("what is learned")
    what.add_argument("--net", required=True, help=NAMES)
    what.add_argument(
        "--part", type=_part, help="of every convolution: 0.1 a fraction, 1 one filter, 1.0 all (default)"
    )
    what.add_argument(
        "--frozen", choices=networks.FROZEN, default="random",
        help="values of what is not learned: the network's own random ones (default), zero, or other random ones",
    )  # fmt: skip
    what.add_argument(
        "--only",
        help="learn one part of the network: conv1, block1, ..., fc, several (conv1+fc), or nothing (BN alone)",
    )
    what.add_argument(
        "--dim", type=int, choices=range(4), default=0,
        help="along which --part chooses: 0 filters (default); 1 input channels, 2 rows or 3 columns of the "
        "kernel, of these at least one",
    )  # fmt: skip
    what.add_argument("--select", choices=POLICIES, default="last", help="which of them: the last (default), ...")
    what.add_argument(
        "--bn", choices=networks.BN, default="learned", help="gamma and beta of BatchNorm; none: networks without it"
    )
    what.add_argument("--gamma", choices=networks.GAMMA, default="ones", help="of BatchNorm, to begin with")
    what.add_argument("--dropout", type=float, help="of wide residual networks (default: the paper's)")
    how = parser.add_argument_group("schedule (default: the paper's for the network)")
    how.add_argument("--epochs", type=int)
    how.add_argument("--batch-size", type=int, help="over all processes")
    how.add_argument("--lr", type=float)
    how.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd", help="adam has --lr 0.001 unless given")
    how.add_argument("--momentum", type=float)
    how.add_argument("--weight-decay", type=float)
    how.add_argument("--milestones", type=int, nargs="*", metavar="EPOCH", help="epochs after which the rate drops")
    how.add_argument("--factor", type=float, help="by which the rate drops")
    how.add_argument("--seed", type=int, default=0)
    where = parser.add_argument_group("data, machine, files")
    where.add_argument("--image-size", type=int, help="of the digits (default 32)")
    where.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    where.add_argument("--amp", choices=AMP_DTYPES, help="mixed precision")
    where.add_argument("--channels-last", action="store_true", help="NHWC, the faster layout on most machines")
    where.add_argument("--compile", action="store_true", help="torch.compile the network")
    where.add_argument(
        "--graph", action="store_true", help="capture steps in CUDA graphs: nothing but kernels; a CPU trains the same"
    )
    where.add_argument("--out", type=Path, metavar="FOLDER", help="of all that is written (default: in runs/)")


def _part(text: str) -> int | float:
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _train(options: argparse.Namespace) -> int:
    """Trains one of the paper's networks, wholly or partly, by the paper's schedule; with torchrun on several GPUs.

    Every epoch ends with a line in log.jsonl and a checkpoint, from which --resume continues.
    """
    from rwn_ext.paper.comparison import compare
    from rwn_ext.paper.progress import train_with_progress

    def way_on(run: Run) -> str:
        return "--resume continues after the last whole epoch" if run.history else "no epoch was done; start again"

    show = compare if options.compare else train_with_progress
    return _run(lambda: _prepared(options), show, way_on)


def _prepared(options: argparse.Namespace) -> Run:
    """The run that the train program's flags ask for."""
    if options.compare and Ranks().size > 1:
        raise ValueError("compare takes turns on one device; start it without torchrun")
    config = replace(_config(options), start=options.start)
    images = data.load(options.data, image_size=options.image_size)
    return Run(replace(config, out=options.out or _folder(config, images.name)), images, resume=options.resume)


def _ensemble(options: argparse.Namespace) -> int:
    """Trains networks from one start, each another part or by another order, and averages what they say."""
    from rwn_ext.paper import experiments

    def prepare() -> experiments.Experiment:
        images = data.load(options.data, image_size=options.image_size)
        config = _named(_config(options), options, "ensemble", images.name)
        return experiments.ensemble(config, images, options.members, options.start_epochs)

    return _run(prepare, experiments.Experiment.run, _continues)


def _tasks(options: argparse.Namespace) -> int:
    """Learns several tasks over one backbone; each is stored as what it has learned alone."""
    from rwn_ext.paper import experiments

    def prepare() -> experiments.Experiment:
        sets = [data.load(folder, image_size=options.image_size) for folder in options.data or [None]]
        if options.split is not None:
            sets = [task for images in sets for task in data.split_classes(images, options.split)]
        if options.rotations is not None:
            sets = [data.rotated(images, turns) for images in sets for turns in range(options.rotations)]
        config = _named(_config(options), options, "tasks", "+".join(images.name for images in sets))
        return experiments.tasks(config, sets, options.start_epochs)

    return _run(prepare, experiments.Experiment.run, _continues)


def _transfer(options: argparse.Namespace) -> int:
    """Trains a network on one set of images, and lets each of its parts alone learn another."""
    from rwn_ext.paper import experiments

    def prepare() -> experiments.Experiment:
        config = _config(options)
        if options.only is not None:
            raise ValueError(f"only={options.only!r}: a transfer learns one part after the other; give --parts")
        target = data.load(options.data, image_size=options.image_size)
        if options.source is None:
            source, target = target, data.rotated(target, 1)
        else:
            source = data.load(options.source, image_size=options.image_size)
        parts = options.parts or [*networks.build(config.net, 2).parts, "nothing", experiments.ALL]
        epochs = config.schedule.epochs if options.start_epochs is None else options.start_epochs
        config = _named(config, options, "transfer", f"{source.name}-to-{target.name}")
        return experiments.transfer(config, source, target, parts, epochs)

    return _run(prepare, experiments.Experiment.run, _continues)


def _magnitudes(options: argparse.Namespace) -> int:
    """Writes how large each filter's learned and fixed weights are in a run's checkpoint, to magnitudes.json there."""
    from rwn_ext.paper.magnitudes import Magnitudes, of_checkpoint
    from rwn_ext.paper.progress import show_magnitudes

    def prepare() -> Magnitudes:
        return of_checkpoint(read_checkpoint(options.run / CHECKPOINT))

    return _run(prepare, lambda found: show_magnitudes(found, options.run / "magnitudes.json"), _continues)


def _config(options: argparse.Namespace) -> Config:
    """The run that the flags of `_add_run_flags` ask for."""
    return Config(
        net=options.net, schedule=_schedule(options), part=options.part, frozen=options.frozen, only=options.only,
        bn=options.bn, dropout=options.dropout, seed=options.seed, dim=options.dim, select=options.select,
        gamma=options.gamma, optimizer=options.optimizer, amp=options.amp,
        channels_last=options.channels_last, compile=options.compile, graph=options.graph,
        device=_device(options.device),
    )  # fmt: skip


def _named(config: Config, options: argparse.Namespace, experiment: str, images: str) -> Config:
    """With the folder that was asked for, or one in runs/."""
    return replace(config, out=options.out or _folder(config, f"{experiment}-{images}"))


def _continues(_: object) -> str:
    return "the same command continues"


def _sweep(options: argparse.Namespace) -> int:
    """Trains every combination of a TOML file and ends with a table. Stopped and started again, it continues."""
    from rwn_ext.paper.sweep import Sweep

    out = options.out or Path("runs") / options.file.stem
    failed = []

    def prepare() -> Sweep:
        return Sweep.of_file(
            options.file, out, jobs=options.jobs, budget_epochs=options.budget_epochs, data=options.data
        )

    def run(sweep: Sweep) -> None:
        failed.append(sweep.run())

    code = _run(prepare, run, _continues)
    return code or int(any(failed))


def _reproduce(options: argparse.Namespace) -> int:
    """Trains what a figure of the paper shows and draws it, with the paper's own numbers where the data are its own.

    On the digits each network is a small one of its family, on CIFAR the paper's. Stopped and started again, it
    continues; finished, it draws anew. Figures that share runs and --out train them once.
    """
    from rwn_ext.paper import presets
    from rwn_ext.paper.reproduce import QUICK, Reproduction
    from rwn_ext.paper.sweep import flags

    if options.list or not options.figure:
        for name in presets.names():
            preset = presets.preset(name)
            print(f"{name:14} {preset.title} ({', '.join(preset.families)})")
        return 0
    shared = {"device": options.device, "amp": options.amp, "channels-last": options.channels_last}
    shared |= {"compile": options.compile, "graph": options.graph}
    settings = {"seeds": options.seeds, "budget_epochs": options.budget_epochs, "rounds": options.rounds}
    chosen = {key: value for key, value in settings.items() if value is not None}
    failed: list[int] = []

    def run_of(choices: dict[str, Any], out: Path) -> Run:
        return _prepared(_parser().parse_args(["train", *flags(choices), "--out", str(out)]))

    def prepare() -> list[Reproduction]:
        return [
            Reproduction(
                presets.preset(name), options.data, options.out, prepare=run_of, families=options.family,
                jobs=options.jobs, machine_flags={key: value for key, value in shared.items() if value},
                **((QUICK if options.quick else {}) | chosen),
            )
            for name in options.figure
        ]  # fmt: skip

    def run(figures: list[Reproduction]) -> None:
        failed.extend(figure.run() for figure in figures)

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
    if options.optimizer == "adam":
        given.setdefault("lr", 1e-3)
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
    part = "all" if config.part is None else f"part{config.part}"
    choices = [part, f"dim{config.dim}" if config.dim else "", config.frozen, config.only or ""]
    choices += [config.select if config.select != "last" else "", "" if config.bn == "learned" else f"bn-{config.bn}"]
    choices += ["gamma-uniform" if config.gamma == "uniform" else "", "" if config.optimizer == "sgd" else "adam"]
    choices += ["" if config.start is None else f"from-{config.start.name}", f"seed{config.seed}"]
    return Path("runs") / "-".join([images, config.net, *filter(None, choices)])


if __name__ == "__main__":
    sys.exit(main())
