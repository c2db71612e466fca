"""Several processes: DistributedDataParallel, FSDP2, distributed checkpoints.

Two processes are started once; they run every check below in turn and write down what each raised.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rwn_ext import PartialConv2d, convert, merge_state_dict, set_subsets_, split_state_dict, subsets

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

CHOICE = {"*": 0.1, "3": [0, 7, 19]}
CHECKS: dict[str, Callable[[Path], None]] = {}


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CHECKS[function.__name__] = function
    return function


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(11)
    return nn.Sequential(
        nn.Conv2d(3, 40, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(40), nn.Conv2d(40, 20, 3, stride=2), nn.ReLU(),
        nn.Conv2d(20, 10, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4),
    ).to(dtype)  # fmt: skip


def partial(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return convert(network(dtype), CHOICE)


def batch(step: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The whole batch, alike on every rank."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 8, 8, generator=generator, dtype=dtype), torch.randint(4, (4,), generator=generator)


def backward(model: nn.Module, step: int = 0, dtype: torch.dtype = torch.float32) -> None:
    """Of this rank's share of the batch, with fixed statistics, so that the ranks together compute what one would."""
    images, labels = batch(step, dtype)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    F.cross_entropy(model.eval()(images[rank::ranks]), labels[rank::ranks]).backward()


def whole_gradients(step: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What one process computes of the whole batch."""
    model = partial(dtype).eval()
    images, labels = batch(step, dtype)
    F.cross_entropy(model(images), labels).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def learned(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


@check
def ddp_all_reduces_the_learned_part_alone(folder: Path) -> None:
    counted = []

    def count(_, bucket):
        counted.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)

    totals = {}
    for fraction in (None, 0.4, 0.1):
        model = network() if fraction is None else convert(network(), fraction)
        ddp = DistributedDataParallel(model)
        ddp.register_comm_hook(None, count)
        counted.clear()
        backward(ddp)
        totals[fraction] = sum(counted)
        assert totals[fraction] == 4 * sum(p.numel() for p in learned(model))
    rest = 4 * (2 * 40 + 10 * 4 + 4)
    for fraction in (0.4, 0.1):
        assert totals[fraction] - rest == fraction * (totals[None] - rest)


@check
def ddp_gradients_are_those_of_one_process(folder: Path) -> None:
    model = partial(torch.float64)
    backward(DistributedDataParallel(model), dtype=torch.float64)
    expected = whole_gradients(dtype=torch.float64)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(expected)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-10, atol=1e-12)


@check
def ddp_all_reduces_the_learned_rows_of_linear_layers(folder: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(3)
        plain = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
        return convert(plain, {"0": [1, 7], "2": 1.0}, linear=True).double()

    x, counted = torch.randn(8, 6, generator=torch.Generator().manual_seed(5)).double(), []

    def count(_, bucket):
        counted.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)

    ours, alone = model(), model()
    ddp = DistributedDataParallel(ours)
    ddp.register_comm_hook(None, count)
    ddp(x[dist.get_rank() :: dist.get_world_size()]).square().mean().backward()
    alone(x).square().mean().backward()
    assert sum(counted) == 8 * (2 * 6 + 2 + 10 * 4 + 4)
    for one, other in zip(learned(ours), learned(alone), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)


@check
def ddp_needs_no_search_for_unused_parameters(folder: Path) -> None:
    model = convert(network(), {"*": 0, "3": 1})
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(learned(model), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        backward(ddp, step)
        optimizer.step()
    same_everywhere(model)


def same_everywhere(model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        first = value.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, value), name


@check
def ddp_follows_a_switch_of_the_same_size_and_refuses_another(folder: Path) -> None:
    model = partial()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(learned(model), lr=0.1, momentum=0.9)
    for step, choice in enumerate([None, [3, 8, 9], [1, 2, 3]]):
        if choice is not None:
            set_subsets_(model, {"3": (choice, None)}, optimizer=optimizer)
        optimizer.zero_grad()
        backward(ddp, step)
        gathered = [torch.empty_like(model[3].weight_trainable.grad) for _ in range(2)]
        dist.all_gather(gathered, model[3].weight_trainable.grad)
        assert gathered[0].any() and torch.equal(*gathered)
        optimizer.step()
    same_everywhere(model)
    set_subsets_(model, {"3": ([1, 2], None)}, optimizer=optimizer)
    backward(ddp)
    with pytest.raises(RuntimeError, match="Expected to have finished reduction in the prior iteration") as caught:
        backward(ddp)
    del ddp, caught
    gc.collect()
    optimizer.zero_grad()
    backward(DistributedDataParallel(model))
    optimizer.step()
    same_everywhere(model)


@check
def ddp_gives_unfrozen_fixed_parts_gradients_of_zero(folder: Path) -> None:
    """A limit: it does not let them stay without one, so weight decay moves them; made before, it leaves them alone."""
    model = partial()
    before = DistributedDataParallel(model)
    model.requires_grad_(True)
    backward(before)
    assert model[3].weight_frozen.grad is None
    del before
    backward(DistributedDataParallel(model))
    assert torch.equal(model[3].weight_frozen.grad, torch.zeros_like(model[3].weight_frozen))


@check
def zero_shards_the_state_of_the_learned_part(folder: Path) -> None:
    model, alone = partial(), partial()
    ddp = DistributedDataParallel(model)
    sharding = ZeroRedundancyOptimizer(learned(model), torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    whole = torch.optim.AdamW(learned(alone), lr=0.01, weight_decay=0.1)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    for step in range(3):
        for optimizer, net in ((sharding, ddp), (whole, DistributedDataParallel(alone))):
            optimizer.zero_grad()
            backward(net, step)
            optimizer.step()
    for (name, ours), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7, msg=name)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    kept = torch.tensor([sum(state["exp_avg"].numel() for state in sharding.optim.state.values())])
    assert 0 < kept < sum(p.numel() for p in learned(model))
    dist.all_reduce(kept)
    assert kept == sum(p.numel() for p in learned(model))


@check
def ddp_state_dicts_are_those_of_conv2d(folder: Path) -> None:
    ours, plain = DistributedDataParallel(partial()), DistributedDataParallel(network())
    assert list(ours.state_dict()) == list(plain.state_dict()) and "module.3.weight" in ours.state_dict()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1)
    ours.load_state_dict(plain.state_dict())
    alone = network()
    state = ours.state_dict()
    nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "module.")
    alone.load_state_dict(state)
    assert torch.equal(alone[3].weight, plain.module[3].weight)


@check
def synchronised_batch_norm_leaves_the_layers(folder: Path) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(partial())
    assert isinstance(model[2], nn.SyncBatchNorm) and isinstance(model[3], PartialConv2d)
    after = convert(nn.SyncBatchNorm.convert_sync_batchnorm(network()), CHOICE)
    assert isinstance(after[2], nn.SyncBatchNorm) and subsets(after) == subsets(model)
    same_everywhere(model)


def sharded(model: nn.Module, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    """By layer; the policy is for the convolutions."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, PartialConv2d):
            fully_shard(layer, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())
    return fully_shard(model, mesh=mesh)


@check
def fsdp_computes_and_learns_what_one_process_does(folder: Path) -> None:
    model = sharded(partial(torch.float64))
    backward(model, dtype=torch.float64)
    expected = whole_gradients(dtype=torch.float64)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) and parameter.requires_grad == (name in expected)
        if parameter.requires_grad:
            torch.testing.assert_close(full(parameter.grad), expected[name], rtol=1e-10, atol=1e-12)
        else:
            assert parameter.grad is None
    frozen = {name: full(p.detach()).clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step, torch.float64)
        optimizer.step()
    for name, value in frozen.items():
        assert torch.equal(full(model.get_parameter(name).detach()), value), name


@check
def fsdp_in_bfloat16_keeps_float32_parameters_and_gradients(folder: Path) -> None:
    half = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    model, seen = sharded(partial(), half), []
    model[3].register_forward_pre_hook(lambda module, inputs: seen.extend([module.weight.dtype, inputs[0].dtype]))
    backward(model)
    assert seen == [torch.bfloat16, torch.bfloat16]
    expected = whole_gradients()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        if parameter.requires_grad:
            grad = full(parameter.grad)
            assert grad.dtype == torch.float32
            assert (grad - expected[name]).norm() < 0.05 * expected[name].norm() + 1e-4, name
    torch.nn.utils.clip_grad_norm_(learned(model), 1.0)


@check
def fsdp_state_dicts_hold_parts_and_merge(folder: Path) -> None:
    model, reference = sharded(partial()), partial()
    state = model.state_dict()
    assert "3.weight_trainable" in state and "3.weight" not in state
    assert all(isinstance(value, DTensor) for key, value in state.items() if "running" not in key and "num" not in key)
    merged = merge_state_dict(reference, state)
    whole = reference.state_dict()
    assert list(merged) == list(whole) and all(torch.equal(full(merged[key]), whole[key]) for key in whole)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        merged = merge_state_dict(reference, gathered)
        plain = network()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.zero_()
        plain.load_state_dict(merged)
        assert all(torch.equal(value, whole[key]) for key, value in plain.state_dict().items())
    for key, value in whole.items():
        whole[key] = value + 1
    parts = split_state_dict(reference, whole)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, parts if dist.get_rank() == 0 else {}, options=options)
    merged = merge_state_dict(reference, model.state_dict())
    assert all(torch.equal(full(merged[key]), whole[key]) for key in whole)
    with pytest.raises(RuntimeError, match=r"3\.weight is whole, .* sharded: convert .*split_state_dict"):
        model.load_state_dict(whole)


@check
def fsdp_layers_are_chosen_before_sharding(folder: Path) -> None:
    model = sharded(partial())
    with pytest.raises(RuntimeError, match=r"3: .*sharded.*choose what is learned before"):
        set_subsets_(model, {"3": ([1], None)})


@check
def fsdp_from_the_meta_device(folder: Path) -> None:
    with torch.device("meta"):
        model = partial()
    model = sharded(model).to_empty(device="cpu")
    torch.manual_seed(dist.get_rank())
    for layer in model:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    values = {name: full(p.detach()) for name, p in model.named_parameters()}
    for name, value in values.items():
        assert value.isfinite().all(), name
        first = value.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, value), name
    assert 0.1 < values["3.weight_frozen"].abs().max() * 360**0.5 <= 1 and values["3.weight_trainable"].any()


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(2):
        optimizer.zero_grad()
        images, labels = batch(step)
        F.cross_entropy(model.eval()(images), labels).backward()
        optimizer.step()


@check
def checkpoints_cross_world_sizes(folder: Path) -> None:
    """Two processes load what one has saved, train on, and save what the test then loads into one."""
    model = sharded(partial())
    optimizer = torch.optim.AdamW(learned(model), lr=0.01)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=folder / "from-one")
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    expected = torch.load(folder / "from-one.pt", weights_only=True)
    merged = merge_state_dict(partial(), model.state_dict())
    assert all(torch.equal(full(merged[key]), expected[key]) for key in expected)
    trained(model, optimizer)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(states, checkpoint_id=folder / "from-two")


@check
def unsharded_models_look_like_conv2d_to_distributed_checkpoints(folder: Path) -> None:
    model, plain = partial(), network()
    state = get_model_state_dict(model)
    assert list(state) == list(plain.state_dict())
    for value in state.values():
        value.add_(1)
    set_model_state_dict(model, state)
    assert torch.equal(model[3].weight, plain[3].weight + 1)
    ddp = DistributedDataParallel(model)
    assert list(get_model_state_dict(ddp)) == list(state)


def run_checks(rank: int, folder: Path) -> None:
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "0"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results = {}
    for name, function in CHECKS.items():
        try:
            function(folder)
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
        (folder / f"results{rank}").write_bytes(pickle.dumps(results))
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two processes, now done, left their results and checkpoints."""
    folder = tmp_path_factory.mktemp("two")
    model = partial()
    optimizer = torch.optim.AdamW(learned(model), lr=0.01)
    trained(model, optimizer)
    # In parts, as the sharded model will want it.
    _, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": split_state_dict(model, model.state_dict()), "optimizer": optimizer_state}
    dcp.save(state, checkpoint_id=folder / "from-one", no_dist=True)
    torch.save(model.state_dict(), folder / "from-one.pt")
    mp.start_processes(run_checks, (folder,), nprocs=2, start_method="spawn")
    return folder


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.works_with(
    "DistributedDataParallel, which sends the learned part alone and needs no `find_unused_parameters`"
)
@pytest.mark.works_with(
    "FSDP2 (`fully_shard`), also in bfloat16; `merge_state_dict` and `split_state_dict` convert its state"
)
@pytest.mark.works_with("SyncBatchNorm")
@pytest.mark.works_with("ZeRO (`ZeroRedundancyOptimizer`): the state of the learned part is shared out")
@pytest.mark.does_not(
    "switch the subset of a layer that is sharded (FSDP2), nor load a whole `weight` into it: `split_state_dict`"
)
@pytest.mark.does_not("keep a DistributedDataParallel over a switch to another size: delete it and wrap anew")
@pytest.mark.does_not(
    "stay fixed in a DistributedDataParallel made after `requires_grad_(True)`: zero gradients, but weight decay"
)
def test_two_processes(name: str, folder: Path):
    for rank in (0, 1):
        results = pickle.loads((folder / f"results{rank}").read_bytes())
        assert results[name] == "", f"rank {rank}: {results[name]}"


@pytest.mark.works_with("distributed checkpoints, across world sizes and into a model that is not sharded")
def test_one_process_loads_what_two_have_saved(folder: Path):
    """It equals one process that has gone on by itself."""
    expected = partial()
    optimizer = torch.optim.AdamW(learned(expected), lr=0.01)
    for _ in range(2):
        trained(expected, optimizer)
    model = partial()
    states = {"model": split_state_dict(model, model.state_dict())}
    dcp.load(states, checkpoint_id=folder / "from-two", no_dist=True)
    model.load_state_dict(merge_state_dict(model, states["model"]))
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    plain = network()
    plain.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(plain[3].weight, model[3].weight)
