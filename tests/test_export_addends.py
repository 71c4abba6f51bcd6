"""Grids on what residual sums add: exact on CPU engines, added as codes by ONNX Runtime, refused for TensorRT."""

from __future__ import annotations

import pytest

from bench.layers.engine_graph import executed
from export.pipeline import export
from runtime.errors import OptionError
from tests.exports import exported, exported_class
from tests.toy_models import randomize_norms
from train import loop
from train.checkpoint import Checkpoint
from train.data.images import ImageData
from train.quantization.quantize import start_alphas
from train.quantization.spec import QuantSpec
from train.recipe import default_recipe


def untrained(digits: ImageData, quant: QuantSpec) -> Checkpoint:
    checkpoint = loop.start("resnet20", digits, quant, default_recipe("digits"))
    model = randomize_norms(checkpoint.network())
    start_alphas(model, checkpoint.input.normalize(checkpoint.samples["images"]))
    checkpoint.state_dict = model.state_dict()
    return checkpoint


@pytest.fixture(scope="module")
def addends_checkpoint(digits: ImageData) -> Checkpoint:
    return untrained(digits, QuantSpec(8, quantize_adds=True))


@pytest.fixture(scope="module")
def full_checkpoint(digits: ImageData) -> Checkpoint:
    return untrained(digits, QuantSpec(8, quantize_adds=True, full_range=True))


@pytest.mark.parametrize("grid", ["addends_checkpoint", "full_checkpoint"])
@pytest.mark.parametrize("target", ["openvino", "ort"])
def test_addends_on_grids_are_exported_exactly(request: pytest.FixtureRequest, grid: str, target: str) -> None:
    found = exported(request.getfixturevalue(grid), target=target).verification
    assert found.activation_codes == 256 * (8 * 8 * (1 + 16 * 10) + 4 * 4 * 32 * 9 + 2 * 2 * 64 * 9 + 64)
    assert found.flipped_codes < 1e-5 * found.activation_codes
    assert found.max_logit_steps < 0.5


@pytest.mark.parametrize("target", ["openvino", "ort"])
def test_on_the_full_range_saturation_is_the_clip(
    addends_checkpoint: Checkpoint, full_checkpoint: Checkpoint, target: str
) -> None:
    def clips(checkpoint: Checkpoint) -> int:
        nodes = exported_class(checkpoint, target=target).graph.node
        return sum(node.op_type == "Clip" for node in nodes)

    assert (clips(addends_checkpoint), clips(full_checkpoint)) == (29, 0)


def test_onnx_runtime_adds_codes_where_addends_have_grids(
    addends_checkpoint: Checkpoint, resnet_checkpoint: Checkpoint
) -> None:
    def counts(checkpoint: Checkpoint) -> tuple[int, int]:
        model = exported_class(checkpoint, target="ort")
        operators = [text.split()[-1] for text in executed(model.SerializeToString(), "ort").values()]
        return operators.count("QLinearConv"), operators.count("QLinearAdd")

    assert counts(addends_checkpoint) == (19, 9)
    assert counts(resnet_checkpoint) == (10, 0)


def test_addends_on_grids_do_not_go_to_tensorrt(addends_checkpoint: Checkpoint) -> None:
    with pytest.raises(
        OptionError, match="a network trained with --quantize-adds rounds what it adds; train it without"
    ):
        export(addends_checkpoint, target="tensorrt")
