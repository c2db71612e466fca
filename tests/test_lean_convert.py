"""convert(lean=True): the bits of the non-lean conversion over training, less kept, and what stays as it is."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from architectures import MobileNetV2, resnet18, resnet50
from torch import nn
from torch.utils.checkpoint import checkpoint

import rwn_ext
from rwn_ext.lean import explain
from rwn_ext.memory import measure_cpu
from rwn_ext.paper.networks import build
from rwn_ext.report import saved_for_backward

NETS = {name: lambda name=name: build(name, 10, seed=0) for name in ("wrn-10-2", "densenet-bc-22-12", "vgg11-bn")}
NETS |= {"alexnet": lambda: build("alexnet", 10, seed=0), "resnet18": lambda: resnet18(10)}
NETS |= {"resnet50": lambda: resnet50(10), "mobilenet-v2": lambda: MobileNetV2(10)}
NETS |= {"wrn-dropout": lambda: build("wrn-10-1", 10, dropout=0.3, seed=0)}
LONG = ("wrn-10-2", "densenet-bc-22-12", "resnet18")
CHOICES = {
    "part": {"trainable": 0.1},
    "all": {"trainable": 1.0},
    "none": {"trainable": 0},
    "inputs": {"trainable": 0.5, "trainable_inputs": 0.25},
    "frozen-norm": {"trainable": 0.1, "norm": "frozen"},
    "frozen-norm-inputs": {"trainable": 1.0, "trainable_inputs": 0.125, "norm": "frozen"},
}


def assert_trains_the_same(net: str, choice: dict, dtype: torch.dtype, steps: int, accumulate=1, size=16, ckpt=False):
    torch.manual_seed(0)
    base = NETS[net]().to(dtype)
    plain, lean = (rwn_ext.convert(copy.deepcopy(base), lean=lean, **choice) for lean in (False, True))
    models = (plain, lean)
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.01, momentum=0.9, weight_decay=1e-4)
        for m in models
    ]
    for step in range(steps):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            for _ in range(accumulate):
                x = torch.randn(4, 3, size, size, dtype=dtype, requires_grad=True)
                output = checkpoint(model, x, use_reentrant=False) if ckpt else model(x)
                loss = F.cross_entropy(output.float(), torch.randint(10, (4,)))
                loss.backward()
            losses.append((loss.detach(), x.grad))
            if step == 0:
                grads = [p.grad for p in model.parameters() if p.requires_grad]
                losses[-1] += tuple(grads)
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True)), f"step {step}"
    for (name, a), b in zip(plain.state_dict().items(), lean.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("net", NETS)
def test_training_has_the_same_bits(net: str, dtype: torch.dtype):
    """Loss, gradients of input and parameters, then weights and running statistics."""
    size = 32 if net in ("vgg11-bn", "resnet50", "mobilenet-v2", "alexnet") else 16
    assert_trains_the_same(net, CHOICES["part"], dtype, 50 if net in LONG and dtype == torch.float32 else 3, size=size)


@pytest.mark.parametrize("choice", [name for name in CHOICES if name != "part"])
@pytest.mark.parametrize("net", ["wrn-dropout", "densenet-bc-22-12"])
def test_whatever_is_learned_the_bits_are_the_same(net: str, choice: str):
    assert_trains_the_same(net, CHOICES[choice], torch.float32, 2)


@pytest.mark.parametrize("ckpt", [False, True], ids=["accumulation", "checkpointing"])
def test_accumulation_and_checkpointing_on_top(ckpt: bool):
    assert_trains_the_same("wrn-dropout", CHOICES["part"], torch.float32, 2, accumulate=3, ckpt=ckpt)


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("net", NETS)
def test_every_network_and_choice(net: str, choice: str, dtype: torch.dtype):
    assert_trains_the_same(net, CHOICES[choice], dtype, 50 if net in LONG else 3, size=32)


def kept(model: nn.Module, size: int = 32, input_gradient: bool = False) -> int:
    x = torch.randn(8, 3, size, size, requires_grad=input_gradient)
    with saved_for_backward(model) as saved:
        model(x)
    return saved.bytes


@pytest.mark.parametrize(
    ("net", "choice", "target", "input_gradient"),
    [
        ("wrn-10-2", {"trainable": 0.1}, 0.52, False),
        ("wrn-dropout", {"trainable": 0.1}, 0.38, False),
        ("densenet-bc-22-12", {"trainable": 0.1}, 0.34, False),
        ("vgg11-bn", {"trainable": 0.1}, 0.55, False),
        ("resnet50", {"trainable": 0.1}, 0.85, False),
        ("wrn-10-2", {"trainable": 0, "norm": "frozen"}, 0.06, True),
        ("densenet-bc-22-12", {"trainable": 0, "norm": "frozen"}, 0.06, True),
        ("resnet50", {"trainable": 1.0, "trainable_inputs": 0.125, "norm": "frozen"}, 0.16, False),
        ("mobilenet-v2", {"trainable": 1.0, "trainable_inputs": 0.125, "norm": "frozen"}, 0.10, False),
    ],
    ids=str,
)
def test_bytes_kept_of_plain_torch_s(net: str, choice: dict, target: float, input_gradient: bool):
    plain = NETS[net]()
    lean = rwn_ext.convert(copy.deepcopy(plain), lean=True, **choice)
    size = 64 if net in ("resnet50", "mobilenet-v2") else 32
    assert kept(lean, size, input_gradient) <= target * kept(plain, size)


class Gate(nn.Module):
    """y is kept by a product, by a convolution with hooks, by a concatenation's reader: nothing to gain."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.relu = nn.ReLU()
        self.conv2.register_forward_hook(lambda *_: None)

    def forward(self, x):
        y = self.relu(self.norm(self.conv1(x)))
        return self.conv2(y) * y + F.relu(torch.cat([y, y], 1)).mean()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("choice", CHOICES)
def test_never_above_plain_torch(choice: str, norm: bool):
    plain = Gate(norm)
    lean = rwn_ext.convert(copy.deepcopy(plain), lean=True, **CHOICES[choice])
    # Per-channel vectors aside.
    assert kept(lean, input_gradient=True) <= kept(plain, input_gradient=True) + 1024


def test_what_was_fused_and_what_was_not_and_why():
    told = explain(rwn_ext.convert(Gate(False), 0.5, lean=True))
    assert told["conv2"] == "it has hooks" and "no activation that a block makes" in told["conv1"]
    assert told["relu"].startswith("its output is kept for ")
    told = explain(build("wrn-10-1", 10, 0.1, lean=True))
    assert told["block2.0.conv1"] == told["block2.0.shortcut"] == told["block2.0.bn1"]
    assert told["block2.0.bn1"].startswith("in the block block2.0.bn1")


class Overwriting(nn.Module):
    """What is written in place is seen by all who read it, under any name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.conv1(x)
        y = name = self.norm(x)
        y += x
        z = self.norm2(self.conv2(name))
        z += name
        return F.relu(z, inplace=True) + z, F.relu(name + z)


@pytest.mark.parametrize("norm", ["train", "frozen"])
def test_sums_in_place_stay_in_place(norm: str):
    base, results = Overwriting(), []
    for lean in (False, True):
        model = rwn_ext.convert(copy.deepcopy(base), 0.5, lean=lean, norm=norm)
        x = torch.linspace(-1, 1, 2 * 3 * 8 * 7).view(2, 3, 8, 7).requires_grad_()
        outputs = model(x)
        torch.manual_seed(0)
        torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])
        results.append([*outputs, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert explain(model)["norm"] == "its output is overwritten, and read"


def test_residual_sums_take_no_memory_of_their_own():
    """In place as they are written, and the activation after them in their memory, as in plain nn."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)

        def forward(self, x):
            y = self.norm(x)
            y += x
            return self.relu(y)

    peaks = []
    for lean in (False, True):
        model = rwn_ext.convert(nn.Sequential(nn.Conv2d(3, 8, 1), Residual(), nn.Conv2d(8, 1, 1)), 1.0, lean=lean)
        x = torch.randn(4, 3, 64, 64, requires_grad=True)
        peaks.append(measure_cpu(lambda mark, model=model, x=x: (model(x), mark())[0])[1])
    assert peaks[1] <= peaks[0] + 1000


class Branching(nn.Module):
    """Its own forward cannot be traced, its child's can."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))

    def forward(self, x):
        return self.body(x) if x.sum() > 0 else self.body(-x)


class ReadsTraining(Branching):
    def forward(self, x):
        return self.body(F.dropout(x, 0.5, self.training))


class Checkpointed(Branching):
    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [(Branching, "control flow"), (ReadsTraining, "self.training"), (Checkpointed, "checkpointing")],
)
def test_what_cannot_be_traced_stays_and_its_children_become_lean(cls, reason: str):
    with pytest.warns(UserWarning, match=f"the model .not traced: .*{reason}"):
        lean = rwn_ext.convert(cls(), 0.5, lean=True)
    assert type(lean) is cls and explain(lean)["body.1"].startswith("in the block body.1")
    plain = rwn_ext.restore(copy.deepcopy(lean))
    for training in (True, False):
        x, outputs = torch.randn(2, 3, 8, 8), []
        for model in (lean, plain):
            torch.manual_seed(1)
            outputs.append(model.train(training)(x))
        assert torch.equal(*outputs)


def test_restore_gives_back_class_norms_and_flags():
    model = NETS["wrn-10-2"]()
    model.bn.bias.requires_grad_(False)
    model.bn.eval()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    cls, x = type(model), torch.randn(2, 3, 16, 16)
    expected = model.eval()(x)
    model.train()
    model.bn.eval()
    lean = rwn_ext.convert(model, 0.1, lean=True, norm="frozen")
    assert lean is model and isinstance(lean, cls) and type(lean).__name__ == cls.__name__
    assert not any(m.training for m in lean.train().modules() if isinstance(m, nn.BatchNorm2d))
    assert not any(p.requires_grad for m in lean.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert torch.equal(lean(x), expected)
    restored = rwn_ext.restore(lean)
    assert type(restored) is cls and {n: p.requires_grad for n, p in restored.named_parameters()} == flags
    assert {type(m) for m in restored.modules() if isinstance(m, nn.BatchNorm2d)} == {nn.BatchNorm2d}
    # As after lean.train() of a plain model.
    assert restored.block1[0].bn1.training and restored.bn.training


@pytest.mark.parametrize("training", [True, False])
def test_a_mode_set_while_norms_are_frozen_holds_for_the_restored_model(training: bool):
    """As it would have for plain layers: a model in evaluation mode computes the same when restored."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model = rwn_ext.convert(model.train(not training), 0.5, norm="frozen").train(training)
    assert not model[1].training
    x = torch.randn(2, 3, 6, 6)
    output = model(x)
    restored = rwn_ext.restore(model)
    assert restored[1].training == restored.training == training
    torch.testing.assert_close(restored.eval()(x), output)


def test_copies_and_pickles_stay_lean():
    lean = build("wrn-10-1", 10, 0.1, seed=0, lean=True)
    file = io.BytesIO()
    torch.save(lean, file)
    file.seek(0)
    x = torch.randn(2, 3, 16, 16)
    for again in (copy.deepcopy(lean), torch.load(file, weights_only=False)):
        assert kept(again) == kept(lean) and torch.equal(again(x), lean(x))
        assert again.state_dict().keys() == build("wrn-10-1", 10).state_dict().keys()
        with torch.no_grad():
            again.fc.weight.zero_()
    assert lean.fc.weight.any()


def test_what_is_done_to_modules_later_counts():
    lean, calls = build("wrn-10-1", 10, 0.1, seed=0, lean=True), []
    lean.block1[0].conv2.register_forward_hook(lambda *_: calls.append(1))
    lean.fc = nn.Linear(64, 3)
    assert lean(torch.randn(2, 3, 16, 16)).shape == (2, 3) and calls == [1]


def test_one_graph_for_the_compiler():
    lean = build("wrn-10-1", 10, 0.1, seed=0, lean=True).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.compiler.reset()
    results = []
    for call in (torch.compile(lean, backend="aot_eager", fullgraph=True), lean):
        lean.zero_grad()
        call(x).square().sum().backward()
        results.append([p.grad.clone() for p in lean.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b) for a, b in zip(*results, strict=True))


def test_a_wrong_norm_is_named():
    with pytest.raises(ValueError, match="norm='froze' is unknown"):
        rwn_ext.convert(resnet18(), 0.1, norm="froze")
    with pytest.raises(ValueError, match=r"^1 has no running statistics to freeze"):
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
        rwn_ext.convert(net, 0.1, norm="frozen")
    assert type(net[0]) is nn.Conv2d


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"trainable": 1.0, "trainable_inputs": 0.25}, list(range(12, 16))),
        ({"trainable": 1.0, "trainable_inputs": 3, "select": "first"}, list(range(6))),
        ({"trainable": [1, 15], "trainable_inputs": [7]}, [15]),
    ],
    ids=str,
)
def test_input_channels_of_a_depthwise_convolution(options: dict, expected: list[int]):
    conv = rwn_ext.convert(nn.Sequential(nn.Conv2d(8, 16, 3, groups=8)), **options)[0]
    assert list(conv.filters.indices) == expected and conv.inputs.is_full


def test_the_lean_model_trains_under_ddp(tmp_path):
    torch.multiprocessing.spawn(_train_in_two, (str(tmp_path / "rendezvous"),), nprocs=2)


def _train_in_two(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    grads = []
    for lean in (False, True):
        model = nn.parallel.DistributedDataParallel(build("wrn-10-1", 10, 0.1, seed=0, lean=lean))
        torch.manual_seed(rank)
        model(torch.randn(2, 3, 16, 16)).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    # Over several processes a SyncBatchNorm trains as torch's own, which needs GPUs; frozen it is part of a block.
    with pytest.raises(ValueError, match="GPU"):
        synchronised(True)(torch.randn(2, 3, 8, 8))
    assert_synchronised_is_the_same("cpu", norm="frozen")
    torch.distributed.destroy_process_group()


def synchronised(lean: bool, **choice) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    return rwn_ext.convert(nn.SyncBatchNorm.convert_sync_batchnorm(net), 0.5, lean=lean, **choice)


def assert_synchronised_is_the_same(device: str, fused: bool = True, **choice) -> None:
    results = []
    x = torch.randn(4, 3, 8, 8, device=device)
    for lean in (False, True):
        model, image = synchronised(lean, **choice).to(device), x.clone().requires_grad_()
        assert isinstance(model[1], nn.SyncBatchNorm)
        output = model(image)
        assert ("BlockFunction" in type(output.grad_fn).__name__) == (lean and fused)
        output.square().mean().backward()
        results.append([image.grad, *(p.grad for p in model.parameters() if p.requires_grad), *model.buffers()])
    for ours, torchs in zip(*results, strict=True):
        assert torch.equal(ours, torchs) if device == "cpu" else torch.allclose(ours, torchs, atol=1e-5)


@pytest.mark.parametrize("norm", ["train", "frozen"])
def test_synchronised_norms_in_one_process_have_the_same_bits(norm: str):
    assert_synchronised_is_the_same("cpu", norm=norm)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_synchronised_norms_of_two_processes(tmp_path):
    torch.multiprocessing.spawn(_synchronised_in_two, (str(tmp_path / "rendezvous"),), nprocs=2)


def _synchronised_in_two(rank: int, file: str) -> None:
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", init_method=f"file://{file}", rank=rank, world_size=2)
    assert_synchronised_is_the_same(f"cuda:{rank}", fused=False)
    torch.distributed.destroy_process_group()


def test_a_traceable_model_is_converted_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rwn_ext.convert(resnet18(10), 0.1, lean=True)
