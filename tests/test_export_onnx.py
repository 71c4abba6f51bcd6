from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from export.deploy_form import deploy_form, fold_weight, folded_layers
from export.gradient.joining import NORMALIZED
from export.onnx import main
from export.pipeline import export
from runtime.errors import OptionError
from runtime.manifest import METADATA_KEY, Manifest, read_manifest
from runtime.onnx_bytes import output_names
from tests.commands import run_command
from tests.exports import class_only, exported, pixels
from tests.toy_models import DepthwiseNet, FunctionalNet, randomize_norms
from train.checkpoint import Checkpoint
from train.input_spec import InputSpec
from train.quantization.quantize import float_weight, quantize, start_alphas, weight_quantizer
from train.quantization.spec import QuantSpec

ROOT = Path(__file__).parents[1]
SPEC = InputSpec((12, 12), 3, (128 / 255,) * 3, (0.25,) * 3)


def toy(model: nn.Module, bits: int) -> nn.Module:
    torch.manual_seed(1)
    quantized = quantize(randomize_norms(model), QuantSpec(bits), input_scale=SPEC.grid_scale).eval()
    start_alphas(quantized, torch.randn(16, 3, 12, 12))
    return quantized


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("make", [FunctionalNet, DepthwiseNet])
def test_deploy_form_computes_the_fake_quantized_network(make: type[nn.Module], bits: int) -> None:
    network = toy(make(), bits)
    images = torch.randint(0, 256, (8, 12, 12, 3), dtype=torch.uint8)
    expected = network(SPEC.normalize(images.permute(0, 3, 1, 2)))
    assert torch.allclose(deploy_form(network, SPEC)(images), expected, atol=1e-4)


def test_folding_flips_codes_under_a_negative_gamma_and_clears_a_dead_channel() -> None:
    conv, norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
    wrapped = quantize(nn.Sequential(conv, norm, nn.ReLU()), QuantSpec(8, first_last_bits=4), input_scale=0.1)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -3.0, 0.0]))
        norm.running_var.copy_(torch.tensor([4.0, 9.0, 1.0]))
    layer = wrapped.get_submodule("0")
    quantizer = weight_quantizer(layer)
    assert quantizer is not None
    codes, scale = quantizer.codes(float_weight(layer)), quantizer.scale(float_weight(layer)).detach()
    folded = fold_weight(layer, norm)
    assert torch.equal(folded.codes[0], codes[0])
    assert torch.equal(folded.codes[1], -codes[1])
    assert folded.codes[2].count_nonzero() == 0
    assert folded.scale[:2].tolist() == pytest.approx(scale[:2].tolist(), rel=1e-4)
    assert folded.scale[2] > 0


@pytest.mark.parametrize("target", ["openvino", "ort", "tensorrt"])
def test_reference_evaluator_gives_the_trained_networks_logits(
    digits_models: dict[str, Path], digits_checkpoint: Checkpoint, target: str
) -> None:
    model = class_only(digits_models[target])
    images = pixels(digits_checkpoint, 32)
    (found,) = ReferenceEvaluator(model).run(None, {"image": images})
    with torch.no_grad():
        tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
        expected = digits_checkpoint.network()(digits_checkpoint.input.normalize(tensor)).numpy()
    assert np.abs(found - expected).max() < 1e-4
    assert np.array_equal(found.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("target", ["openvino", "ort", "tensorrt"])
def test_resnet_codes_are_the_checkpoints(resnet_checkpoint: Checkpoint, target: str) -> None:
    made = exported(resnet_checkpoint, target=target)
    found = made.verification
    weights = [float_weight(m).numel() for m in resnet_checkpoint.network().modules() if weight_quantizer(m)]
    assert found.weight_codes == sum(weights) == 268_048
    assert found.activation_codes == 256 * (8 * 8 * (1 + 16 * 7) + 4 * 4 * 32 * 6 + 2 * 2 * 64 * 6 + 64)
    assert found.flipped_codes < 1e-5 * found.activation_codes
    assert found.max_logit_steps < 0.5
    on_device = {t.name: numpy_helper.to_array(t) for t in made.model.graph.initializer}
    assert on_device["network.stage1.0.conv1.codes"].dtype == np.int8
    assert np.abs(on_device["network.stage1.0.conv1.codes"]).max() == 7


@pytest.mark.parametrize(
    ("target", "before_q", "zero_point"),
    [
        ("openvino", {"Clip"}, np.uint8),
        ("ort", {"Conv", "Add", "Reshape"}, np.uint8),
        ("tensorrt", {"Clip", "Relu"}, np.int8),
    ],
)
def test_each_target_gets_its_own_lowering(
    resnet_checkpoint: Checkpoint, target: str, before_q: set[str], zero_point: type
) -> None:
    model = exported(resnet_checkpoint, target=target).model
    producers = {v: n for n in model.graph.node for v in n.output}
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    activations = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    (image,) = [n for n in model.graph.node if "quantizers.x_grid.codes" in n.input]
    # ONNX Runtime's kernels want unsigned bytes for signed codes, too: those that the pixels are.
    expected = (np.uint8, 128) if target == "ort" else (np.int8, 0)
    assert (constants[image.input[2]].dtype, constants[image.input[2]]) == expected
    if target == "ort":
        assert producers[image.input[0]].op_type == "Transpose"
        assert list(image.output) == [NORMALIZED]
    else:
        assert activations.pop(0).input[0] == NORMALIZED
    assert len(activations) == 20
    for node in activations:
        assert producers[node.input[0]].op_type in before_q
        assert constants[node.input[2]].dtype == zero_point
        assert constants[node.input[2]] == 0


def test_batch_is_dynamic_and_rows_do_not_depend_on_it(
    digits_models: dict[str, Path], digits_checkpoint: Checkpoint
) -> None:
    model = class_only(digits_models["openvino"])
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    evaluator = ReferenceEvaluator(model)
    images = pixels(digits_checkpoint, 5)
    (together,) = evaluator.run(None, {"image": images})
    apart = np.concatenate([evaluator.run(None, {"image": images[i : i + 1]})[0] for i in range(5)])
    assert np.allclose(together, apart, atol=1e-5)


def test_the_class_alone_is_the_file_as_exported_without_saliency(
    digits_models: dict[str, Path], digits_checkpoint: Checkpoint
) -> None:
    expected = exported(digits_checkpoint, saliency=False).model
    found = class_only(digits_models["openvino"])
    assert list(found.graph.node) == list(expected.graph.node)
    assert {t.name for t in found.graph.initializer} == {t.name for t in expected.graph.initializer}
    assert list(found.graph.input) == list(expected.graph.input)
    assert list(found.graph.output) == list(expected.graph.output)
    assert found.metadata_props == expected.metadata_props
    assert output_names(digits_models["openvino"].read_bytes()) == ("logits", "saliency", "gradient")


def test_float_export_of_a_float_network(digits_checkpoint: Checkpoint, resnet_checkpoint: Checkpoint) -> None:
    for checkpoint in (digits_checkpoint, resnet_checkpoint):
        made = exported(checkpoint, int8=False)
        assert not {"QuantizeLinear", "DequantizeLinear"} & {n.op_type for n in made.model.graph.node}
        assert made.verification.max_logit_difference < 1e-3
        assert all(layer["bits"] is None for layer in made.manifest.layers)


def test_manifest_travels_in_the_file(digits_models: dict[str, Path], digits_checkpoint: Checkpoint) -> None:
    model = class_only(digits_models["openvino"])
    (text,) = [p.value for p in model.metadata_props if p.key == METADATA_KEY]
    manifest = Manifest.from_json(text, "test")
    assert (manifest.arch, manifest.precision, manifest.target, manifest.data) == (
        "cnn2",
        "int8",
        "openvino",
        "digits",
    )
    assert manifest.input.size == (8, 8)
    assert manifest.classes == tuple("0123456789")
    assert manifest.metrics["test_accuracy"] == digits_checkpoint.test_accuracy
    assert [layer["name"] for layer in manifest.layers] == ["conv1", "conv2", "fc1", "fc2"]
    assert {layer["bits"] for layer in manifest.layers} == {8}


def test_int8_of_a_float_network_is_refused(digits_checkpoint: Checkpoint) -> None:
    floating = dataclasses.replace(digits_checkpoint, quant=QuantSpec(32))
    with pytest.raises(
        OptionError, match="trained in float; train it with --bits 8, --calibrate it, or export --fp32"
    ):
        export(floating)


def test_the_full_range_does_not_go_to_tensorrt(digits_checkpoint: Checkpoint) -> None:
    full = dataclasses.replace(digits_checkpoint, quant=QuantSpec(8, full_range=True))
    assert export(full, target="ort").verification.flipped_codes < 10
    with pytest.raises(OptionError, match="target tensorrt: has signed activations only"):
        export(full, target="tensorrt")


def test_command_verifies_writes_and_prints(
    digits_checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep" / "model.onnx"
    main([str(digits_checkpoint_path), "--int8", "-o", str(output)])
    out = capsys.readouterr().out
    assert "  conv1                Conv2d  8-bit codes; input 8-bit -128..127, scale" in out
    assert "verified: 52,768 weight codes equal; on 256 images" in out
    (text,) = [p.value for p in onnx.load(output).metadata_props if p.key == METADATA_KEY]
    assert (
        Manifest.from_json(text, "").checkpoint == hashlib.sha256(digits_checkpoint_path.read_bytes()).hexdigest()
    )


def test_user_errors_end_with_status_2_and_one_line(
    tmp_path: Path, digits_checkpoint_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.pt").write_text("no checkpoint")
    for arguments, expected in (
        ([str(tmp_path / "none.pt"), "--int8"], "none.pt: no such file"),
        ([str(tmp_path / "text.pt"), "--int8"], "text.pt: 13 bytes that are no complete torch file"),
        ([str(digits_checkpoint_path), "--int8", "--fp32"], "not allowed with argument --int8"),
        ([str(digits_checkpoint_path), "--int8", "-o", "/proc/nowhere/model.onnx"], "cannot be written"),
        ([str(digits_checkpoint_path), "--int8", "-o", str(tmp_path)], "is a folder, expected the name of a file"),
    ):
        done = run_command(main, arguments, capsys)
        assert done.status == 2
        assert done.err.startswith("error: ")
        assert expected in done.err
        assert done.err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["text.pt"]


@pytest.mark.parametrize(("option", "precision"), [([], "int8"), (["--fp32"], "fp32"), (["--int8"], "int8")])
def test_a_checkpoint_knows_its_precision(
    option: list[str], precision: str, digits_checkpoint_path: Path, tmp_path: Path
) -> None:
    main([str(digits_checkpoint_path), *option, "--no-saliency", "-o", str(tmp_path / "model.onnx")])
    assert read_manifest((tmp_path / "model.onnx").read_bytes(), "model").precision == precision


def test_the_file_says_nothing_of_the_machine_it_was_made_on(digits_models: dict[str, Path]) -> None:
    for path in digits_models.values():
        data = path.read_bytes()
        assert str(ROOT).encode() not in data
        assert b"deploy_form.py" not in data
        assert [p.key for p in onnx.load_from_string(data).metadata_props] == [METADATA_KEY]


@pytest.mark.parametrize("int8", [True, False])
def test_any_normalization_is_in_the_graph(digits_checkpoint: Checkpoint, int8: bool) -> None:
    spec = dataclasses.replace(digits_checkpoint.input, mean=(0.13,), std=(0.31,))
    assert not spec.exact
    state = digits_checkpoint.state_dict | {"quantizers.x_grid.scale": torch.tensor(spec.grid_scale)}
    exported = export(dataclasses.replace(digits_checkpoint, input=spec, state_dict=state), int8=int8)
    assert "Div" in {n.op_type for n in exported.model.graph.node}
    assert exported.manifest.input.mean == (0.13,)
    assert (
        exported.verification.max_logit_steps < 0.5 if int8 else exported.verification.max_logit_difference < 1e-3
    )


def optimized_by_ort(model: onnx.ModelProto, tmp_path: Path) -> onnx.GraphProto:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # it warns that the file fits this machine only
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(tmp_path / "optimized.onnx").graph


def test_onnx_runtime_dequantizes_no_weight_while_it_runs(
    digits_checkpoint: Checkpoint, resnet_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    for checkpoint, products, floats in (
        (digits_checkpoint, {"QLinearConv": 2, "QGemm": 2}, []),
        (
            resnet_checkpoint,
            {"QLinearConv": 10, "QGemm": 1},
            [f"stage{s}.{b}.conv2" for s in (1, 2, 3) for b in range(3)],
        ),
    ):
        model = exported(checkpoint, target="ort", saliency=False).model
        stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        form = deploy_form(checkpoint.network(), checkpoint.input)
        layers = folded_layers(form)
        assert [name for name in layers if f"network.{name}.weight" in stored] == floats
        for name in floats:
            layer = layers[name]
            assert layer.codes is not None
            assert layer.scale is not None
            expected = layer.codes * layer.scale.reshape(-1, *[1] * (layer.codes.ndim - 1))
            np.testing.assert_array_equal(stored[f"network.{name}.weight"], expected)
        last = "fc2" if "fc2" in layers else "fc"
        codes, scale = (stored[f"network.{last}.bias_{part}"] for part in ("codes", "scale"))
        assert codes.dtype == np.int32
        np.testing.assert_allclose(codes * scale, layers[last].bias, rtol=1e-6)
        optimized = optimized_by_ort(model, tmp_path)
        for operator, count in products.items():
            assert [n.op_type for n in optimized.node].count(operator) == count
        constants = {t.name for t in optimized.initializer}
        assert not [n for n in optimized.node if n.op_type == "DequantizeLinear" and n.input[0] in constants]
