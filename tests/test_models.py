"""Models as people have them, of torchvision, timm and of our tests: converted, trained, restored."""

from __future__ import annotations

import copy
import warnings

import architectures
import pytest
import torch
import torch.nn.functional as F
from libraries import installed
from torch import Tensor, nn

from rwn_ext import PartialConv2d, convert, restore

PLAIN, LEAN, FROZEN_NORMS = {}, {"lean": True}, {"lean": True, "norm": "frozen"}
MODELS = {
    ("torchvision", "resnet50"): [PLAIN, FROZEN_NORMS],
    ("torchvision", "mobilenet_v3_small"): [PLAIN, LEAN, FROZEN_NORMS],
    ("torchvision", "efficientnet_b0"): [PLAIN],
    ("torchvision", "densenet121"): [PLAIN],
    ("torchvision", "regnet_y_400mf"): [PLAIN, LEAN],
    ("timm", "mobilenetv3_small_050"): [PLAIN],
    ("timm", "efficientnet_b0"): [PLAIN],
    ("timm", "convnext_atto"): [PLAIN, LEAN],
    ("timm", "regnety_002"): [PLAIN],
    ("architectures", "resnet18"): [PLAIN],
    ("architectures", "MobileNetV2"): [PLAIN],
}


def build(library: str, name: str) -> nn.Module:
    torch.manual_seed(0)
    if library == "architectures":
        model = getattr(architectures, name)(num_classes=4)
    elif library == "torchvision":
        installed("torchvision")
        model = installed("torchvision.models").get_model(name, num_classes=4)
    else:
        model = installed("timm").create_model(name, num_classes=4)
    return model.double()


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64), torch.tensor([1, 3])


def loss_of(model: nn.Module, step: int = 0) -> Tensor:
    images, labels = batch(step)
    torch.manual_seed(step)  # of dropout and stochastic depth
    return F.cross_entropy(model(images), labels)


@pytest.mark.parametrize(
    ("library", "name", "options"),
    [
        pytest.param(*model, options, id="-".join([*model, *(f"{k}={v}" for k, v in options.items())]))
        for model, choices in MODELS.items()
        for options in choices
    ],
)
@pytest.mark.works_with(
    "models of torchvision and timm (ResNet, MobileNetV3, EfficientNet, ConvNeXt, DenseNet, RegNet)"
)
def test_converted_trained_and_restored(library: str, name: str, options: dict):
    original = build(library, name)
    with warnings.catch_warnings():
        # Some blocks read self.training, which lean says.
        warnings.filterwarnings("ignore", "kept as they are")
        model = convert(copy.deepcopy(original), 0.1, **options)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PartialConv2d)}
    convs = {name: layer for name, layer in original.named_modules() if isinstance(layer, nn.Conv2d)}
    assert layers.keys() == convs.keys()

    if "norm" in options:
        for module in original.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    expected, loss = loss_of(original), loss_of(model)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    expected.backward()
    loss.backward()
    compared = 0
    for name, layer in layers.items():
        if layer.weight_trainable is not None:
            whole = convs[name].weight.grad
            error = (layer.weight_trainable.grad - whole[list(layer.filters.indices)]).norm()
            assert error <= 1e-6 * whole.norm() + 1e-12, name
            compared += 1
    assert compared > len(layers) // 2

    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-2)
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    optimizer.step()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    assert all(p.isfinite().all() for p in model.parameters())
    moved = [name for name, value in before.items() if not torch.equal(model.get_parameter(name), value)]
    assert len(moved) > len(before) // 2

    images, _ = batch(9)
    with torch.no_grad():
        expected = model.eval()(images)
        restored = restore(model)
        torch.testing.assert_close(restored(images), expected, rtol=1e-9, atol=1e-9)
    assert type(restored) is type(original) and restored.state_dict().keys() == original.state_dict().keys()
    assert not any(isinstance(layer, PartialConv2d) for layer in restored.modules())
    original.eval().load_state_dict(restored.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(original(images), expected, rtol=1e-9, atol=1e-9)
