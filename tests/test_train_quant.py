from __future__ import annotations

import copy
import dataclasses
import operator

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from runtime.errors import ModelError, OptionError
from tests.toy_models import Attention, DepthwiseNet, FunctionalNet, MobileNet, PatchMLP, TwoBranches
from train.models.cnn2 import CNN2
from train.models.resnet20 import ResNet20
from train.quantization.description import describe
from train.quantization.quantize import float_weight, quantize, quantizers, start_alphas, weight_quantizer
from train.quantization.quantizers import PACT, InputQuantizer
from train.quantization.spec import QuantSpec


def test_every_relu_call_gets_a_clip_of_its_own() -> None:
    model = quantize(FunctionalNet(), QuantSpec(8), input_scale=0.01)
    found = quantizers(model)
    assert list(found) == ["x_grid", "relu", "relu_1", "relu_2", "relu_3", "relu_4"]
    assert len({id(q) for q in found.values()}) == 6
    assert isinstance(found["x_grid"], InputQuantizer)
    assert all(isinstance(q, PACT) and q.qmin == 0 for n, q in found.items() if n != "x_grid")


def test_quantizing_leaves_the_function_close_and_on_its_grids() -> None:
    torch.manual_seed(0)
    model = FunctionalNet().eval()
    x = torch.randn(4, 3, 8, 8)
    expected = model(x)
    quantized = quantize(copy.deepcopy(model), QuantSpec(8), input_scale=4 / 127).eval()
    start_alphas(quantized, x, quantile=1.0)
    assert torch.allclose(quantized(x), expected, atol=0.05)
    assert not torch.equal(quantized(x), expected)


def test_every_quantized_layer_reads_integers_and_multiplies_integers() -> None:
    for model in (CNN2(3, (12, 12), 4), ResNet20(3, (12, 12), 4), FunctionalNet(), DepthwiseNet()):
        quantized = quantize(model.eval(), QuantSpec(4), input_scale=1 / 64).eval()
        seen: list[torch.Tensor] = []
        layers = [m for m in quantized.modules() if weight_quantizer(m) is not None]
        for layer in layers:
            layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        quantized(torch.randn(2, 3, 12, 12))
        assert len(seen) >= len(layers) > 0
        scales = [q.scale.detach() for q in quantizers(quantized).values()]
        for x in seen:
            assert any(torch.allclose(x / scale, (x / scale).round(), atol=1e-4) for scale in scales)


def test_addends_of_residual_sums_lie_on_grids_of_8_bits() -> None:
    model = quantize(ResNet20(3, (12, 12), 4).eval(), QuantSpec(4, quantize_adds=True), input_scale=1 / 64).eval()
    found = quantizers(model)
    branches = [name for name in found if name.endswith("bn2_grid")]
    assert len(branches) == 9
    assert len(found) == 1 + 19 + 9 + 1
    for name in branches:
        assert (found[name].bits, found[name].qmin, found[name].qmax) == (8, -127, 127)
    assert found["stage1_0_relu2"].bits == 4
    sums = [n for n in model.graph.nodes if n.target is operator.add]
    values: dict[str, torch.Tensor] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            values[n.name] = super().run_node(n)
            return values[n.name]

    Recorder(model).run(torch.randn(2, 3, 12, 12))
    scales = [q.scale.detach() for q in found.values()]
    for addend in [values[a.name] for node in sums for a in node.all_input_nodes]:
        codes = [addend / scale for scale in scales]
        assert any(torch.allclose(c, c.round(), atol=1e-3) for c in codes)


def test_only_sums_that_are_rounded_get_grids_for_what_they_add() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.conv1(x))
            y = torch.relu(self.conv2(y) + torch.sigmoid(y))
            return y + nn.functional.pad(y[:, :, :, 1:], (1, 0), value=1.0)

    found = quantizers(quantize(Net(), QuantSpec(8, quantize_adds=True), input_scale=1 / 64))
    assert {name: q.qmin for name, q in found.items()} == {
        "x_grid": -128, "relu": 0, "conv2_grid": -127, "sigmoid_grid": 0, "relu_1": 0,
    }  # fmt: skip


@pytest.mark.parametrize("make", [MobileNet, TwoBranches, PatchMLP, Attention])
def test_networks_of_any_style_stay_close_and_multiply_integers(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(8, 3, 16, 16)
    expected = model(x)
    quantized = quantize(copy.deepcopy(model), QuantSpec(8), input_scale=4 / 127).eval()
    start_alphas(quantized, x, quantile=1.0)
    assert 0 < (quantized(x) - expected).abs().max() < 0.02 * expected.abs().max()

    scales = [q.scale.detach() for q in quantizers(quantized).values()]
    factors: list[torch.Tensor] = []
    layers = [m for m in quantized.modules() if weight_quantizer(m) is not None]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, inputs: factors.append(inputs[0]))

    class Watch(TorchFunctionMode):
        def __torch_function__(self, f, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if f in (torch.matmul, torch.Tensor.matmul, torch.bmm):
                factors.extend(args)
            return f(*args, **(kwargs or {}))

    with Watch():
        quantized(x)
    assert len(factors) == len(layers) + (4 if make is Attention else 0)
    for factor in factors:
        assert any(torch.allclose(factor / s, (factor / s).round(), atol=1e-3) for s in scales)


def test_grids_are_signed_only_where_a_value_may_be_negative() -> None:
    def codes(model: nn.Module) -> dict[str, int]:
        return {name: q.qmin for name, q in quantizers(quantize(model, QuantSpec(8), input_scale=0.01)).items()}

    mobile = codes(MobileNet())
    assert mobile["stem_2"] == 0
    assert {
        mobile[name] for name in ("blocks_0_act_grid", "silu_grid", "mul_grid", "blocks_0_project_1_grid")
    } == {-127}
    # Of a join of non-negative parts, one the product of a clip and a sigmoid; and a maximum keeps its grid.
    assert codes(TwoBranches()) == {
        "x_grid": -128,
        "left_1": 0,
        "relu": 0,
        "relu_1": 0,
        "cat_1_grid": 0,
        "relu_2": 0,
    }
    attention = codes(Attention())
    assert attention["scaled_dot_product_attention_dropout_grid"] == 0  # of a softmax
    assert [attention[f"getitem_{i}_grid"] for i in (3, 4, 5)] == [-127] * 3  # query, key, value


def test_an_image_cut_into_patches_keeps_the_grid_of_its_pixels() -> None:
    rows = {row.name: row.activation for row in describe(quantize(PatchMLP(), QuantSpec(4), input_scale=0.01))}
    assert rows["embed"] == "8-bit -128..127, scale 0.01"


def test_the_description_lists_products_functions_and_parameters() -> None:
    class Mixed(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(super().forward(x), 2 * self.scale)  # a computed weight: no layer holds it

    rows = describe(quantize(Mixed(), QuantSpec(4), input_scale=0.01))
    assert [(r.name, r.kind, r.bits) for r in rows if r.kind == "MatMul"] == [
        ("matmul", "MatMul", 4), ("matmul_1", "MatMul", 4)
    ]  # fmt: skip
    floats = {(row.name, row.kind, row.reason) for row in rows if row.bits is None}
    assert floats == {
        ("norm", "LayerNorm", "no quantizer for this layer"),
        ("linear", "linear", "a function; only layers are quantized"),
        ("scale", "Parameter", "used outside of a layer"),
    }


def test_a_norm_that_follows_no_layer_is_not_said_to_be_folded() -> None:
    rows = {row.name: row.reason for row in describe(quantize(TwoBranches(), QuantSpec(8)))}
    assert rows["norm"] == "not right after a layer, and not folded"
    rows = {row.name: row.reason for row in describe(quantize(MobileNet(), QuantSpec(8)))}
    assert rows["blocks.0.norm"] == "folded into the layer before it at export"


def test_dropout_by_function_drops_in_training_and_only_there() -> None:
    for model in (MobileNet(), Attention()):
        quantized = quantize(model, QuantSpec(8), input_scale=0.01).train()
        kinds = [type(m) for m in quantized.modules()]
        assert kinds.count(nn.Dropout) == 1
        x = torch.randn(2, 3, 16, 16)
        assert torch.equal(quantized.eval()(x), quantized(x))


def test_a_forward_that_reads_the_mode_itself_is_refused() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if self.training else self.fc(x) * 2

    model = Auxiliary().eval()
    with pytest.raises(ModelError, match=r"Auxiliary: its forward reads self\.training, .* such as nn\.Dropout"):
        quantize(model, QuantSpec(8))
    assert not model.fc.training


def test_in_place_operations_are_kept_in_order() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            self.relu(x)  # its result is in x
            y = self.b(x)
            y += x
            return y

    torch.manual_seed(0)
    model = InPlace().eval()
    x = torch.randn(64, 4)
    expected = model(x.clone())
    quantized = quantize(model, QuantSpec(8)).eval()
    start_alphas(quantized, x, quantile=1.0)
    assert [q.qmin for q in quantizers(quantized).values()] == [-127, 0]
    assert torch.allclose(quantized(x), expected, atol=0.05)


def test_relu6_starts_at_6_at_most() -> None:
    model = quantize(nn.Sequential(nn.Linear(1, 1), nn.ReLU6(), nn.Linear(1, 1)), QuantSpec(8))
    with torch.no_grad():
        float_weight(model.get_submodule("0")).fill_(10.0)
    start_alphas(model, torch.linspace(0, 10, 50).reshape(-1, 1))
    (pact,) = (q for q in quantizers(model).values() if q.qmin == 0)
    assert isinstance(pact, PACT)
    assert pact.alpha.item() == 6.0


@pytest.mark.parametrize(
    ("name", "layers", "floating"),
    [
        ("resnet18", 21, set()),
        ("mobilenet_v2", 53, set()),
        ("mobilenet_v3_small", 54, set()),
        ("shufflenet_v2_x1_0", 57, set()),
        ("efficientnet_b0", 82, set()),
        ("vit_b_16", 26, {"LayerNorm", "MultiheadAttention", "NonDynamicallyQuantizableLinear", "Parameter"}),
    ],
)
def test_networks_of_torchvision_are_quantized_as_they_are(name: str, layers: int, floating: set[str]) -> None:
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(num_classes=10)
    rows = describe(quantize(model, QuantSpec(8)))
    assert sum(row.bits is not None for row in rows) == layers
    assert {row.kind for row in rows if row.bits is None and "folded" not in row.reason} == floating


def test_bits_of_layers_and_of_the_activations_they_read() -> None:
    spec = QuantSpec(3, layer_bits={"stage2.0.conv1": 5})
    model = quantize(ResNet20(3, (8, 8), 10), spec, input_scale=0.01)
    bits = {row.name: row.bits for row in describe(model) if row.bits}
    assert bits["conv1"] == bits["fc"] == 8
    assert bits["stage2.0.conv1"] == 5
    assert bits["stage3.2.conv2"] == 3
    found = quantizers(model)
    assert found["stage1_2_relu2"].bits == 5  # read by stage2.0.conv1
    assert found["stage1_0_relu1"].bits == 3
    assert found["flatten_grid"].bits == 8  # read by fc
    assert found["flatten_grid"].qmin == 0  # an average of what is never negative


def test_description_names_what_stays_float() -> None:
    class WithNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm = nn.GroupNorm(2, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x)).mean((2, 3))

    rows = {row.name: row for row in describe(quantize(WithNorm(), QuantSpec(8), input_scale=0.01))}
    assert rows["conv"].bits == 8
    assert rows["conv"].activation == "8-bit -128..127, scale 0.01"
    assert rows["norm"].bits is None
    assert rows["norm"].reason == "no quantizer for this layer"


def test_without_an_input_grid_a_signed_clip_is_learned() -> None:
    model = quantize(nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2)), QuantSpec(8))
    signed, unsigned = quantizers(model).values()
    assert (signed.qmin, signed.qmax) == (-127, 127)
    assert (unsigned.qmin, unsigned.qmax) == (0, 127)  # a sigmoid is never negative


def test_32_bits_leave_the_network_as_it_is() -> None:
    model = CNN2(1, (8, 8), 10)
    assert quantize(model, QuantSpec(32)) is model


def test_alphas_start_at_the_quantile_of_what_they_clip() -> None:
    model = quantize(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), QuantSpec(8), input_scale=1.0)
    layer = model.get_submodule("0")
    with torch.no_grad():
        float_weight(layer).fill_(1.0)
        layer.bias.zero_()
    start_alphas(model, torch.arange(-100.0, 101.0).reshape(-1, 1), quantile=0.9)
    (pact,) = (q for q in quantizers(model).values() if isinstance(q, PACT))
    assert pact.alpha.item() == pytest.approx(90.0, abs=1.0)


def test_data_dependent_control_flow_is_refused() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ModelError, match=r"Branching: torch\.fx cannot trace it .*independent of the data"):
        quantize(Branching(), QuantSpec(8))


def test_nothing_to_quantize_is_refused() -> None:
    with pytest.raises(ModelError, match="no convolution or linear layer found"):
        quantize(nn.Sequential(nn.ReLU()), QuantSpec(8))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 9}, "bits 9: expected a whole number from 2 to 8, or 32 for float"),
        ({"bits": 5.5}, "bits 5.5: expected a whole number"),
        ({"weight_quantizer": "kmeans"}, "weight quantizer 'kmeans': expected one of absmax, sawb, lsq"),
        ({"alpha": 0.0}, "alpha 0.0: expected a positive"),
        ({"layer_bits": {"conv1": 1}}, "bits 1 of conv1: expected a whole number from 2 to 8"),
    ],
)
def test_specs_out_of_range_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        QuantSpec(**values)  # type: ignore[arg-type]


def test_bits_of_a_layer_that_is_not_there_are_refused() -> None:
    with pytest.raises(OptionError, match="no layer named 'conv9'; expected one of conv1, conv2, fc1, fc2"):
        quantize(CNN2(1, (8, 8), 10), QuantSpec(8, layer_bits={"conv9": 4}))


def test_a_spec_of_version_0_1_is_read_under_its_old_names() -> None:
    old = {"bits": 4, "weights": "lsq", "full_grid": True, "addends": True, "first_last_bits": 8}
    expected = QuantSpec(4, "lsq", full_range=True, quantize_adds=True, bias_grid=False)
    assert QuantSpec.from_dict(old) == expected
    assert QuantSpec.from_dict(dataclasses.asdict(expected)) == expected
