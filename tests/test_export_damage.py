"""Whatever a pass of the export does wrong, the file that comes out is refused: its last bytes are verified."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from export import pipeline as exporter
from export.choices import TARGETS
from export.verification.agreement import GradientGraph
from export.verification.engine_run import run_on_engine
from runtime.errors import ModelError
from runtime.onnx_bytes import GRADIENT_PREFIX
from tests.toy_models import move_alphas
from train import loop
from train.checkpoint import Checkpoint
from train.data.images import ImageData
from train.model import QuantizedModel
from train.models import factory
from train.quantization.spec import QuantSpec
from train.recipe import default_recipe

PASSES = {
    "openvino": ["to_onnx", "differentiate", "average_exactly", "keep_rounding", "own_constants"],
    "ort": [
        "to_onnx", "store_float_weights", "differentiate", "take_pixels_as_codes", "clip_after_pooling",
        "keep_float", "move_codes", "hold_signed_codes", "own_constants",
    ],
    "tensorrt": ["to_onnx", "differentiate"],
}  # fmt: skip


def constants(model: onnx.ModelProto, chosen: Callable[[str], bool]) -> list[onnx.TensorProto]:
    return [t for t in model.graph.initializer if chosen(t.name)]


def ruin(tensor: onnx.TensorProto, change: Callable[[np.ndarray], np.ndarray]) -> None:
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(change(values).astype(values.dtype), tensor.name))


def last_bias(model: onnx.ModelProto) -> None:
    (bias,) = constants(model, lambda name: name.endswith(("fc2.bias", "fc2.bias_codes")))
    ruin(bias, lambda b: b + np.arange(b.size))


def one_code(model: onnx.ModelProto) -> None:
    weights = constants(model, lambda name: "conv2" in name and name.endswith((".codes", ".weight")))
    ruin(weights[0], lambda w: np.where(np.arange(w.size).reshape(w.shape) == 17, -w - (w == 0), w))


def a_scale(model: onnx.ModelProto) -> None:
    (scale,) = constants(model, lambda name: name.endswith("fc1.scale"))
    ruin(scale, lambda s: s * np.float32(1.01))


def an_operator(model: onnx.ModelProto) -> None:
    (pooling,) = [n for n in model.graph.node if n.op_type == "MaxPool"][:1]
    kernel = next(a for a in pooling.attribute if a.name == "kernel_shape")
    pads = next((a for a in pooling.attribute if a.name == "pads"), None)
    if pads is not None:
        pooling.attribute.remove(pads)
    kernel.ints[:] = [1, 2]


def the_gradient(model: onnx.ModelProto) -> None:
    """Of all its constants: a gate that opens elsewhere, a scale that is another, an axis that is turned."""
    for tensor in constants(model, lambda name: name.startswith(GRADIENT_PREFIX)):
        if tensor.data_type == onnx.TensorProto.FLOAT:
            ruin(tensor, lambda v: v * np.float32(0.5))


DAMAGES = [last_bias, one_code, a_scale, an_operator]
CASES = [
    (target, name, damage)
    for target in TARGETS
    for name in PASSES[target]
    for damage in [*DAMAGES, *([the_gradient] if name not in ("to_onnx", "store_float_weights") else [])]
]


@pytest.fixture(scope="module")
def made(digits_checkpoint: Checkpoint) -> Iterator[pytest.MonkeyPatch]:
    """The graph that the exporter makes of the digits network, made once for each target."""
    kept: dict[str, bytes] = {}
    original = exporter.to_onnx

    def once(form: Any, model: QuantizedModel, target: str) -> onnx.ModelProto:
        if model.facts != digits_checkpoint.model().facts:
            return original(form, model, target)
        if target not in kept:
            kept[target] = original(form, model, target).SerializeToString()
        return onnx.load_model_from_string(kept[target])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "to_onnx", once)
        yield patch


def damaged(pass_: Callable[..., Any], damage: Callable[[onnx.ModelProto], None]) -> Callable[..., Any]:
    def run(model: Any, *args: Any, **options: Any) -> Any:
        made = pass_(model, *args, **options)
        found = made.model if isinstance(made, GradientGraph) else made if made is not None else model
        damage(found)
        return made

    return run


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("target", TARGETS)
def test_the_passes_are_all_there_are(digits_checkpoint: Checkpoint, target: str) -> None:
    exported = exporter.export(digits_checkpoint, target=target)
    assert exported.model == onnx.load_model_from_string(exported.data)
    of_target = [getattr(p, "func", p).__name__ for p in exporter.lowerings(target, int8=True)]
    assert of_target == PASSES[target][-len(of_target) :] or not of_target
    assert len(of_target) == {"openvino": 3, "ort": 6, "tensorrt": 0}[target]


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize(("target", "name", "damage"), CASES)
def test_a_pass_that_ruins_its_graph_ends_the_export(
    digits_checkpoint: Checkpoint,
    target: str,
    name: str,
    damage: Callable[[onnx.ModelProto], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exporter, name, damaged(getattr(exporter, name), damage))
    with pytest.raises(ModelError, match=r"the export is not exact|codes differ|engine computes"):
        exporter.export(digits_checkpoint, target=target, saliency_precision="float32")


class Averaging(nn.Module):
    """Its pooling averages the codes of a grid, which OpenVINO rounds, if it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.pool, self.head = nn.AvgPool2d(2), nn.Linear(16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.conv1(x)))
        return self.head(torch.relu(self.conv2(x)).flatten(1))


def averaging(channels: int, classes: int, size: tuple[int, int]) -> nn.Module:
    torch.manual_seed(0)
    return Averaging()


@pytest.fixture
def fresh(digits: ImageData) -> Checkpoint:
    """Two bits everywhere, and every clip at 1, a multiple of the steps before it: full of ties."""
    factory.allow(f"{__name__}:averaging")
    checkpoint = loop.start(
        f"{__name__}:averaging", digits, QuantSpec(2, first_last_bits=2), default_recipe("digits")
    )
    alphas = [name for name in checkpoint.state_dict if name.endswith(".alpha")]
    checkpoint.state_dict.update({name: torch.tensor(1.0) for name in alphas})
    return checkpoint


def test_what_only_the_engine_does_wrong_ends_the_export(
    fresh: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is right, operator by operator; OpenVINO's plugin computes another."""
    network = fresh.training_network()
    move_alphas(network, torch.Generator().manual_seed(4))
    fresh.state_dict = network.state_dict()
    exported = exporter.export(fresh, target="openvino", saliency=False)
    found = exported.engine
    assert found is not None
    assert (found.changed_classes, found.differing, found.batches) == (0, 0, (1, 64))
    assert found.median_difference < 1e-5
    assert exported.verification.tied_share < 0.02
    monkeypatch.setattr(exporter, "lowerings", lambda target, *, int8, takes_pixels: [])
    with pytest.raises(ModelError, match=r"openvino .*, batches of 1 and 64: .* computes another network"):
        exporter.export(fresh, target="openvino", saliency=False)


def test_a_network_full_of_ties_is_told_and_not_judged(fresh: Checkpoint) -> None:
    exported = exporter.export(fresh, target="openvino", saliency=False)
    assert exported.verification.tied_share > 0.1
    other = fresh.network()
    with torch.no_grad():
        other.get_submodule("head").bias.add_(torch.arange(10.0))
    images = fresh.samples["images"]
    told = run_on_engine(exported.data, "openvino", other, fresh.input, images, tied=True)
    assert told is not None
    assert told.changed_classes > 0
    with pytest.raises(ModelError, match=r"The engine computes another network"):
        run_on_engine(exported.data, "openvino", other, fresh.input, images)
    assert run_on_engine(exported.data, "tensorrt", other, fresh.input, images) is None
