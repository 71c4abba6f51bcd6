"""What verification takes for a tie, what for an error, and what it says of one."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from export.deploy_form import deploy_form, folded_layers
from export.onnx import main
from export.verification.exact import in_float64, on_codes
from export.verification.forward import Verification, run_layer_by_layer, verify
from export.verification.last_layer import logit_step
from export.verification.ties import TIE_STEPS, check_ties, nearly_tied
from runtime.errors import ModelError
from tests.exports import class_only
from train.checkpoint import Checkpoint
from train.quantization.quantize import float_weight, quantize, quantizers, weight_quantizer
from train.quantization.spec import QuantSpec


@pytest.fixture
def halves() -> nn.Module:
    """One value, on the grid of integers, then on that of even integers: every odd one is a tie."""
    network = quantize(nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 3)), QuantSpec(8), input_scale=1.0)
    first = network.get_submodule("0")
    with torch.no_grad():
        float_weight(first).fill_(1.0)
        first.bias.zero_()
        quantizers(network)["_1"].alpha.fill_(2.0 * 127)
    return network.eval()


VALUES = torch.arange(127.0).reshape(-1, 1)
NAMES = ("quantizers.input_1_grid", "quantizers._1")


def check(network: nn.Module, change: dict[int, int]) -> None:
    """Verify a graph that gives every 0..126 its code, but for `change`, value to difference."""
    codes = dict(zip(NAMES, (VALUES.clone(), (VALUES / 2).round()), strict=True))
    for value, difference in change.items():
        codes["quantizers._1"][value] += difference
    expected, _ = run_layer_by_layer(network, network, VALUES, codes)
    exact, _ = run_layer_by_layer(in_float64(network), network, VALUES.double(), codes)
    check_ties({name: (codes[name] - expected[name]).abs() for name in NAMES}, exact)


def test_each_layer_is_given_the_graphs_codes(halves: nn.Module) -> None:
    codes = dict(zip(NAMES, (VALUES + 2, VALUES * 0 + 3), strict=True))
    expected, logits = run_layer_by_layer(halves, halves, VALUES, codes)
    assert torch.equal(expected["quantizers.input_1_grid"], VALUES)
    assert torch.equal(expected["quantizers._1"], ((VALUES + 2) / 2).round())
    assert torch.allclose(logits, halves.get_submodule("2")(torch.full((127, 1), 6.0)))
    exact, _ = run_layer_by_layer(in_float64(halves), halves, VALUES.double(), codes)
    assert torch.equal(exact["quantizers._1"], (VALUES.double() + 2) / 2)


@pytest.mark.parametrize("change", [{}, {5: 1}, {7: -1}, {5: 1, 7: -1, 125: 1}])
def test_a_tie_may_go_either_way_by_one(halves: nn.Module, change: dict[int, int]) -> None:
    """5 / 2 rounds to 2, half to even, and 7 / 2 to 4."""
    check(halves, change)


@pytest.mark.parametrize("change", [{6: 1}, {6: -1}, {5: 2}, {7: -2}, {5: 1, 8: 1}])
def test_one_code_that_differs_elsewhere_is_an_error(halves: nn.Module, change: dict[int, int]) -> None:
    largest = max(abs(difference) for difference in change.values())
    with pytest.raises(
        ModelError,
        match=rf"activation quantizers\._1: 1 of 127 codes differ from the trained network's, by up to {largest}, "
        "where no rounding explains it; the export is not exact",
    ):
        check(halves, change)


def test_how_near_a_tie_is(halves: nn.Module) -> None:
    bias = halves.get_submodule("0").bias
    with torch.no_grad():
        bias.fill_(-TIE_STEPS)  # half of it in steps of the second grid: 7 / 2 is below the border now
        check(halves, {})
        bias.fill_(-4 * TIE_STEPS)
    with pytest.raises(ModelError, match=f"{len(range(3, 127, 4))} of 127 codes differ"):
        check(halves, {})


def test_the_float64_network_has_the_float32_networks_codes(halves: nn.Module) -> None:
    exact = in_float64(halves)
    for name in ("0", "2"):
        weight = halves.get_submodule(name).weight.detach()
        assert torch.equal(exact.get_submodule(name).weight, weight.double())
        assert weight_quantizer(halves.get_submodule(name)) is not None  # the network itself is as it was
    x = torch.arange(127.0).reshape(-1, 1)
    assert torch.allclose(exact(x.double()).float(), halves(x))


def test_sums_of_codes_are_exact_wherever_float32_holds_them() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=4, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(392, 1024), nn.ReLU(), nn.Linear(1024, 10),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for norm in (network[1], network[4]):
            norm.running_var.uniform_(0.5, 2)
            norm.running_mean.normal_()
            norm.weight.uniform_(-1, 1)
        network[10].weight.fill_(1.0)  # 1,024 codes of 255, times 127, leave float32's whole numbers
    network = quantize(network, QuantSpec(8, full_range=True), input_scale=1 / 32, image_shape=(3, 32, 32)).eval()
    x = torch.randint(-128, 128, (4, 3, 32, 32)).double() / 32
    whole = in_float64(network)
    for name in ("0", "3", "8"):  # weights in float64 are not rounded to float32
        layer = network.get_submodule(name)
        quantizer, weight = weight_quantizer(layer), float_weight(layer).detach()
        assert quantizer is not None
        scale = quantizer.scale(weight).double().reshape(-1, *[1] * (weight.ndim - 1))
        whole.get_submodule(name).parametrizations["weight"][0].weight = quantizer.codes(weight) * scale
    codes = on_codes(network, (3, 32, 32))
    kinds = {name: codes.get_submodule(name).weight.dtype for name in ("0", "3", "8", "10")}
    assert kinds == {"0": torch.float32, "3": torch.float32, "8": torch.float32, "10": torch.float64}
    inside: dict[nn.Module, list[torch.Tensor]] = {whole: [], codes: []}
    for one, found in inside.items():
        for module in quantizers(one).values():
            module.register_forward_pre_hook(lambda module, inputs, found=found: found.append(inputs[0]))
    with torch.no_grad():
        torch.testing.assert_close(codes(x), whole(x), rtol=1e-13, atol=1e-13)
    assert len(inside[codes]) == 4
    for found, expected in zip(inside[codes], inside[whole], strict=True):
        assert found.std() > 0.01
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_images_whose_best_logits_nearly_tie_are_nearly_tied() -> None:
    trained = torch.tensor([[1.0, 0.0], [1.0, 0.9], [0.5, 0.45]], dtype=torch.float64)
    moved = trained + torch.tensor([[0.0, 0.04], [0.0, 0.0], [0.0, 0.0]])
    assert nearly_tied(trained, moved).tolist() == [False, False, True]


def with_initializer(model: onnx.ModelProto, name: str, change: float, *, times: float = 1.0) -> onnx.ModelProto:
    changed = copy.deepcopy(model)
    for tensor in changed.graph.initializer:
        if tensor.name == name:
            values = numpy_helper.to_array(tensor) * numpy_helper.to_array(tensor).dtype.type(times)
            values.flat[0] += values.dtype.type(change)
            tensor.CopyFrom(numpy_helper.from_array(values, name))
    return changed


def test_verification_names_the_weight_that_differs(
    digits_models: dict[str, Path], digits_checkpoint: Checkpoint
) -> None:
    network = digits_checkpoint.network()
    form = deploy_form(network, digits_checkpoint.input)
    model = class_only(digits_models["openvino"])
    images = digits_checkpoint.samples["images"][:8]
    verify(model, form, network, digits_checkpoint.input, images)
    with pytest.raises(ModelError, match=r"weight conv2\.codes: differs from the checkpoint's"):
        verify(with_initializer(model, "network.conv2.codes", 1), form, network, digits_checkpoint.input, images)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("network.conv2.bias", r"activation quantizers\.relu2: .* codes differ"),
        ("network.fc2.bias", "logits: differ"),
    ],
)
def test_verification_names_the_activation_that_differs(
    digits_models: dict[str, Path], digits_checkpoint: Checkpoint, name: str, message: str
) -> None:
    network = digits_checkpoint.network()
    form = deploy_form(network, digits_checkpoint.input)
    model = with_initializer(class_only(digits_models["openvino"]), name, 1)
    with pytest.raises(ModelError, match=message):
        verify(model, form, network, digits_checkpoint.input, digits_checkpoint.samples["images"][:8])


@pytest.mark.parametrize("smaller", [1.0, 2.0**-30])
def test_what_float32_may_round_otherwise_is_no_difference_of_logits(
    digits_models: dict[str, Path], digits_checkpoint: Checkpoint, smaller: float
) -> None:
    """With next to no weight in the last layer, logits are its bias, and one rounding is many of its steps."""
    network = digits_checkpoint.network()
    images, model = digits_checkpoint.samples["images"][:8], class_only(digits_models["openvino"])
    with torch.no_grad():
        float_weight(network.get_submodule("fc2")).mul_(smaller)
        largest = float(network(digits_checkpoint.input.normalize(images)).abs().max())
    form = deploy_form(network, digits_checkpoint.input)
    step = float(logit_step(form, torch.zeros(1, 10)).max())
    eps = largest * torch.finfo(torch.float32).eps
    model = with_initializer(model, "network.fc2.scale", 0.0, times=smaller)

    def changed(by: float) -> Verification:
        moved = with_initializer(model, "network.fc2.bias", by)
        return verify(moved, form, network, digits_checkpoint.input, images)

    assert (step > 8 * eps) == (smaller == 1)
    assert changed(0.0).max_logit_steps < 1e-3
    assert changed(2 * eps).max_logit_steps < 1e-3
    for wrong in (max(1.5 * step, 8 * eps), 0.1):
        with pytest.raises(ModelError, match="logits: differ"):
            changed(wrong)


def test_a_failed_check_writes_nothing(
    digits_checkpoint_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "model.onnx"
    output.write_bytes(b"before")
    original = folded_layers

    def tampered(form: object) -> object:
        layers = original(form)  # type: ignore[arg-type]
        codes = layers["conv1"].codes
        assert codes is not None
        layers["conv1"].codes = codes + 1
        return layers

    monkeypatch.setattr("export.verification.forward.folded_layers", tampered)
    with pytest.raises(ModelError, match=r"weight conv1\.codes"):
        main([str(digits_checkpoint_path), "--int8", "-o", str(output)])
    assert output.read_bytes() == b"before"
