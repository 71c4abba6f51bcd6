"""NVIDIA's own parser and builder, on a machine without a GPU: TensorRT-RTX ahead of time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from export.engine.builder import BuildOptions, build, check_options, load_bindings, parse, reported_products
from export.engine.layers import layers
from export.engine.lowering import lower
from export.pipeline import export
from runtime.errors import EngineError, ModelError, OptionError
from runtime.onnx_bytes import without_gradient
from tests.qdq_models import conv_model
from tests.toy_models import randomize_norms
from train import checkpoint as checkpoints
from train import loop
from train.checkpoint import Checkpoint
from train.data.images import ImageData
from train.quantization.spec import QuantSpec
from train.recipe import default_recipe

ROOT = Path(__file__).parents[1]
BATCH = BuildOptions(batch=(1, 8, 32))
# TensorRT-RTX, called as TensorRT is, says that its timing caches do nothing.
caches_do_nothing = pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")


@pytest.fixture(scope="module")
def trt() -> ModuleType:
    return pytest.importorskip(
        "tensorrt_rtx_bindings", reason="no wheel of TensorRT-RTX here: pip install 'clearpact[tensorrt-aot]'"
    )


def products(trt: ModuleType, model: bytes) -> dict[str, set[str]]:
    """Return what the layers' products take in the plan, by layer."""
    built = build(trt, "tensorrt_rtx", model, "model.onnx", BATCH)
    assert len(built.plan) > 1000
    assert built.products is not None
    return {name: set(types) for name, types in built.products.items()}


def int8_by_layer(trt: ModuleType, model: bytes, **choices: Any) -> dict[str, tuple[str, set[str]]]:
    """Lower and build a file; return what each layer was to be, and the types of its inputs in the plan."""
    lowered = lower(model, "model.onnx", **choices)
    found = products(trt, lowered.onnx)
    return {layer.name: (layer.precision, found.get(layer.name, set())) for layer in lowered.layers}


def exported(checkpoint: Checkpoint) -> bytes:
    return export(checkpoint, target="tensorrt").model.SerializeToString()


def checkpoint(name: str, digits: ImageData, bits: int) -> Checkpoint:
    """Return an untrained network with BatchNorm statistics as if it were trained."""
    made = loop.start(name, digits, QuantSpec(bits), default_recipe("digits"))
    model = made.network()
    randomize_norms(model)
    made.state_dict = model.state_dict()
    return made


def assert_as_chosen(trt: ModuleType, model: bytes, forward: int) -> None:
    """With and without saliency: every layer chosen for INT8 multiplies Int8, and no other does."""
    for contents in (model, without_gradient(model)):
        for name, (precision, types) in int8_by_layer(trt, contents).items():
            assert types, f"{name} is not among the builder's products"
            assert ("Int8" in types) == (precision == "INT8"), name
        chosen = [p for p, _ in int8_by_layer(trt, contents).values()]
        assert chosen.count("INT8") == forward
        assert len(chosen) == (2 * forward - 1 if contents is model else forward)  # the last is a Gather


def test_cnn2_multiplies_int8_where_it_was_chosen(trt: ModuleType, digits_models: dict[str, Path]) -> None:
    assert_as_chosen(trt, digits_models["tensorrt"].read_bytes(), forward=4)


def test_resnet20_in_4_bits_multiplies_int8_where_it_was_chosen(
    trt: ModuleType, resnet_checkpoint: Checkpoint
) -> None:
    assert_as_chosen(trt, exported(resnet_checkpoint), forward=20)


# A plan of a shipped ResNet-20 takes 12 s; the test above has one of 4 bits.
SHIPPED = [
    pytest.param(path, id=path.stem, marks=pytest.mark.slow if "resnet20" in path.stem else ())
    for path in sorted((ROOT / "deploy" / "models").glob("*.pt"))
]


@pytest.mark.parametrize("path", SHIPPED)
def test_shipped_models_multiply_int8_where_it_was_chosen(trt: ModuleType, path: Path) -> None:
    shipped = checkpoints.load(path)
    assert_as_chosen(trt, exported(shipped), forward={"cnn2": 4, "resnet20": 20}[shipped.arch["name"]])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits", "forward"), [("cnn2", 4, 4), ("resnet20", 8, 20)])
def test_the_other_networks_multiply_int8_where_it_was_chosen(
    trt: ModuleType, digits: ImageData, name: str, bits: int, forward: int
) -> None:
    assert_as_chosen(trt, exported(checkpoint(name, digits, bits)), forward)


@pytest.mark.slow
def test_int8_gradients_multiply_int8_too(trt: ModuleType, digits: ImageData) -> None:
    made = export(checkpoint("resnet20", digits, 8), target="tensorrt", saliency_precision="int8")
    found = int8_by_layer(trt, made.model.SerializeToString())
    assert all(("Int8" in types) == (precision == "INT8") for precision, types in found.values())
    assert {precision for precision, _ in found.values()} == {"INT8"}
    assert len(found) == 39


def test_controls_without_int8_show_none(trt: ModuleType, digits_models: dict[str, Path]) -> None:
    """A float file, a file whose weights alone are codes, and a plan in fp16: the check would tell."""
    for model, choices, expected in (
        (without_gradient(digits_models["float"].read_bytes()), {}, {"Half", "Float"}),
        (conv_model(float_input=True).SerializeToString(), {}, {"Half"}),
        (conv_model(float_weight=True).SerializeToString(), {}, {"Half"}),
        (conv_model().SerializeToString(), {"precision": "fp16"}, {"Half"}),
        (conv_model().SerializeToString(), {"precision": "fp16", "islands": "fp32"}, {"Float"}),
        (conv_model().SerializeToString(), {}, {"Int8"}),
    ):
        found = int8_by_layer(trt, model, **choices)
        assert set().union(*(types for _, types in found.values())) == expected


def test_gradients_multiply_float16(trt: ModuleType, digits_models: dict[str, Path]) -> None:
    found = int8_by_layer(trt, digits_models["tensorrt"].read_bytes())
    gradients = [types for name, (_, types) in found.items() if name.startswith("grad/")]
    assert gradients == [{"Half"}] * 3


# What the rules of export/engine/rules.py are for: NVIDIA's own words and deeds, without them.


def test_a_uint8_grid_would_pass_with_a_warning_and_be_read_as_int8(trt: ModuleType) -> None:
    import numpy as np

    built = build(trt, "tensorrt_rtx", conv_model(code_type=np.uint8).SerializeToString(), "model.onnx", BATCH)
    assert built.products == {"conv": ("Int8",)}
    (warning,) = built.warnings
    assert "UINT8" in warning
    assert "Defaulting to INT8 instead" in warning
    assert warning.endswith("(2 times)")


@pytest.mark.parametrize("arguments", [{"weight_axis": 1}, {"scales_per_channel": True}])
def test_scales_on_the_wrong_axis_would_be_computed_in_float_without_a_word(
    trt: ModuleType, arguments: dict[str, Any]
) -> None:
    built = build(trt, "tensorrt_rtx", conv_model(**arguments).SerializeToString(), "model.onnx", BATCH)
    assert set(built.products["conv"]) == {"Float"}
    assert built.warnings == ()


@pytest.mark.parametrize(
    ("arguments", "node", "told"),
    [
        ({"zero_point": 3}, "quantize", "Non-zero zero point is not supported"),
        ({"int32_bias": True}, "bias_grid", "input has type Int32"),
    ],
)
def test_the_parser_s_refusal_is_one_line_with_the_node(
    trt: ModuleType, arguments: dict[str, Any], node: str, told: str
) -> None:
    with pytest.raises(ModelError, match=rf"^model\.onnx: TensorRT's parser refuses '{node}': .*{told}") as error:
        parse(trt, conv_model(**arguments).SerializeToString(), "model.onnx")
    assert "\n" not in str(error.value)
    assert "cudaError" not in str(error.value)


def test_what_is_no_graph_is_refused_in_one_line(trt: ModuleType) -> None:
    with pytest.raises(ModelError, match=r"^model\.onnx: TensorRT's parser refuses ") as error:
        parse(trt, b"no onnx at all", "model.onnx")
    assert "\n" not in str(error.value)


@caches_do_nothing
def test_the_builder_s_failure_is_one_line_with_its_reason(trt: ModuleType) -> None:
    """TensorRT-RTX has no lean runtime to put into a version-compatible plan."""
    options = dataclasses.replace(BATCH, version_compatible=True)
    with pytest.raises(EngineError, match=r"^model\.onnx: the builder failed: .*libnvinfer_lean") as error:
        build(trt, "tensorrt", conv_model().SerializeToString(), "model.onnx", options)
    assert "\n" not in str(error.value)


@caches_do_nothing
def test_a_timing_cache_is_given_back_and_one_that_cannot_be_read_costs_a_warning_only(trt: ModuleType) -> None:
    """TensorRT-RTX gives caches that it cannot read itself: what is kept of them on TensorRT is not seen here."""
    first = build(trt, "tensorrt", conv_model().SerializeToString(), "m", BATCH)
    assert first.warnings == ()
    assert len(first.timing_cache) > 0
    again = build(trt, "tensorrt", conv_model().SerializeToString(), "m", BATCH, first.timing_cache)
    assert again.products == first.products
    assert any("timing cache" in warning for warning in again.warnings)
    assert build(trt, "tensorrt_rtx", conv_model().SerializeToString(), "m", BATCH).timing_cache == b""


def test_a_dla_that_is_not_there_is_refused_where_the_builder_would_fall_back(trt: ModuleType) -> None:
    with pytest.raises(EngineError, match="DLA core 0: this machine has 0"):
        build(trt, "tensorrt", conv_model().SerializeToString(), "m", dataclasses.replace(BATCH, dla_core=0))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"version_compatible": True}, "--version-compatible: TensorRT-RTX has no such plans"),
        ({"hardware": "ampere-plus"}, "--hardware: TensorRT-RTX has no such plans"),
        ({"dla_core": 0}, "--dla-core: TensorRT-RTX has no such plans"),
        ({"level": 6}, "optimization level 6: expected 0 to 5"),
    ],
)
def test_what_a_builder_cannot_do_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        check_options("tensorrt_rtx", dataclasses.replace(BATCH, **changes))


def test_a_fixed_batch_is_built_as_it_is_and_no_other_way(trt: ModuleType) -> None:
    model = conv_model()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    data = model.SerializeToString()
    assert build(trt, "tensorrt_rtx", data, "m", BuildOptions(batch=(4, 4, 4))).products == {"conv": ("Int8",)}
    with pytest.raises(OptionError, match="has the fixed batch 4"):
        build(trt, "tensorrt_rtx", data, "model.onnx", BATCH)


def test_open_image_sizes_are_refused(trt: ModuleType) -> None:
    model = conv_model()
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "H2"
    with pytest.raises(ModelError, match=r"input 'x' has open sizes \[-1, 32, -1, 8\]"):
        build(trt, "tensorrt_rtx", model.SerializeToString(), "model.onnx", BATCH)


def test_options_reach_the_builder(trt: ModuleType) -> None:
    options = BuildOptions(batch=(1, 8, 32), workspace_bytes=1 << 28, level=1)
    assert build(trt, "tensorrt_rtx", conv_model().SerializeToString(), "m", options).products == {
        "conv": ("Int8",)
    }


def test_a_list_of_layers_tells_products_from_what_follows_them() -> None:
    text = (
        "Layers:\n"
        "Name: conv_myl0_2, LayerType: correlation, Inputs: [ { Datatype: Int8 }], "
        "Constants: [ { Datatype: Float }], Outputs: [], Metadata: [ONNX Layer: conv][ONNX Layer: weight_grid]\n"
        "Name: __myl_MulAdd_3, LayerType: kgen, Inputs: [ { Datatype: Float }], "
        "Constants: [], Metadata: [ONNX Layer: conv]\n"
        "Name: __myl_CorrMul_4, LayerType: runtime_fusion, Inputs: [ { Datatype: Half }], "
        "Constants: [], Metadata: [ONNX Layer: grad/conv][ONNX Layer: grad/mul]\n"
    )
    assert reported_products(["Parsing", text]) == {
        "conv": ("Int8",), "grad/conv": ("Half",), "grad/mul": ("Half",),
    }  # fmt: skip
    assert reported_products(["Parsing"]) is None


def test_bindings_that_are_not_installed_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineError, match=r"pip install 'clearpact\[tensorrt\]' or pip install 'clearpact\[tenso"):
        load_bindings("auto")
    with pytest.raises(EngineError, match=r"; pip install 'clearpact\[tensorrt-aot\]'$"):
        load_bindings("tensorrt_rtx")


def test_the_float_layers_of_a_float_file_are_listed(digits_models: dict[str, Path]) -> None:
    lowered = lower(without_gradient(digits_models["float"].read_bytes()), "float.onnx")
    assert [layer.precision for layer in lowered.layers] == ["FP16", "FP16", "FP16", "FP32"]
    assert lowered.int8_layers == ()
    assert [layer.precision for layer in layers(onnx.load_from_string(lowered.onnx))] == [
        layer.precision for layer in lowered.layers
    ]
