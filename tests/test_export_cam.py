"""Class activation maps: in the graph, on the engines, beside the package grad-cam and beside their formulas."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from bench.measure.session_latency import frame_latency
from export.choices import explanations
from export.deploy_form import deploy_form
from export.gradient.cam import find_cams
from export.gradient.walk import append_input_gradient
from export.layer_names import check_layers, find_layer
from export.onnx import main
from export.pipeline import ExportResult, export
from export.reference import reference_run
from export.verification.cams import transcribed
from runtime import Classifier
from runtime.classify import main as classify
from runtime.errors import ModelError, OptionError
from runtime.images.resizing import resize_maps
from runtime.manifest import CAM_METHODS
from runtime.onnx_bytes import with_outputs
from runtime.session import open_session
from tests.exports import exported
from train.checkpoint import Checkpoint
from train.data.images import ImageData

ALL = tuple((method, "") for method in CAM_METHODS)


@pytest.fixture(scope="module")
def images(digits: ImageData) -> np.ndarray:
    return digits.test_images[:8].permute(0, 2, 3, 1).contiguous().numpy()


@pytest.fixture(scope="module")
def cam_file(digits_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits checkpoint with maps of layers and without the gradient."""
    path = tmp_path_factory.mktemp("cam") / "cam.onnx"
    path.write_bytes(exported(digits_checkpoint, saliency=False, cams=(*ALL, ("layercam", "conv1"))).data)
    return path


def assert_of_the_package(
    checkpoint: Checkpoint, result: ExportResult, images: np.ndarray, modules: dict[str, str]
) -> None:
    """Compare a float export's maps with those of the package; modules: by layer, what gives its activation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Here, since this import takes seconds, and only slow tests need it.
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.image import scale_cam_image
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    packages = {
        "gradcam": pytorch_grad_cam.GradCAM,
        "hirescam": pytorch_grad_cam.HiResCAM,
        "layercam": pytorch_grad_cam.LayerCAM,
    }
    model = checkpoint.model()
    network = deploy_form(model.evaluated(), model.input, int8=False).network
    network.register_parameter("device", nn.Parameter(torch.zeros(1)))  # the package looks for one
    x = model.input.normalize(torch.from_numpy(images).permute(0, 3, 1, 2)).requires_grad_()
    targets = np.arange(len(x)) % 10
    found = reference_run(result.model)[0]({"image": images, "target": targets})
    assert {(cam.method, cam.layer) for cam in result.manifest.cams} == {
        (method, layer) for method in CAM_METHODS for layer in modules
    }
    for cam in result.manifest.cams:
        module = network.get_submodule(modules[cam.layer])
        with packages[cam.method](model=network, target_layers=[module]) as package:
            theirs = package(input_tensor=x, targets=[ClassifierOutputTarget(int(k)) for k in targets])
        # It scales twice: before and after it takes the mean of its layers, of which there is one.
        ours = scale_cam_image(scale_cam_image(found[cam.output], theirs.shape[:0:-1]))
        assert np.abs(ours - theirs).max() < 1e-4, cam.output
        assert theirs.std() > 0.05


@pytest.mark.slow  # the import of the package alone takes seconds; a transcription is compared below
def test_maps_are_those_of_the_package_grad_cam(digits_checkpoint: Checkpoint, images: np.ndarray) -> None:
    cams = tuple((method, layer) for method in CAM_METHODS for layer in ("conv2", "conv1"))
    result = exported(digits_checkpoint, int8=False, saliency=False, cams=cams)
    modules = {"conv2": "quantizers.relu2", "conv1": "quantizers.relu1"}
    assert_of_the_package(digits_checkpoint, result, images, modules)


@pytest.mark.slow
def test_a_resnets_maps_are_those_of_the_package_grad_cam(
    resnet_checkpoint: Checkpoint, images: np.ndarray
) -> None:
    modules = {"stage3.2.conv2": "quantizers.stage3_2_relu2", "stage2.1": "quantizers.stage2_1_relu2"}
    cams = tuple((method, layer) for method in CAM_METHODS for layer in ("", "stage2.1"))
    result = export(resnet_checkpoint, int8=False, saliency=False, cams=cams)
    assert_of_the_package(resnet_checkpoint, result, images, modules)


def test_an_exported_networks_maps_are_autograds_on_its_codes(digits_checkpoint: Checkpoint) -> None:
    result = exported(digits_checkpoint, saliency=False, cams=(*ALL, ("layercam", "conv1")))
    assert [cam.cam.layer for cam in result.cams] == ["conv2"] * 3 + ["conv1"]
    for cam in result.cams:
        assert cam.median_error is not None
        assert cam.median_error < 1e-5
        assert cam.engine_difference is not None
        assert cam.engine_difference < 1e-4
        assert cam.price is not None
        assert cam.price > 1


def test_before_a_mean_and_one_layer_grad_cam_is_hirescam() -> None:
    """Draelos and Carin 2020, section 3.4; and only the head is differentiated: no convolution is added."""
    body = "a = Relu(c) b = Conv(a, w) d = Relu(b) m = ReduceMean<keepdims=0>(d, axes) logits = MatMul(m, head)"
    model = _parsed(f"c = Conv(x, w) {body}", head=np.random.default_rng(1).normal(size=(3, 2)))
    explained = append_input_gradient(model, outputs=(), cams=find_cams(model, ALL))
    added = [node.op_type for node in explained.graph.node if node.name.startswith("grad/")]
    assert {"Conv", "MatMul"}.isdisjoint(added)
    assert len(added) <= 20
    x = np.random.default_rng(0).normal(size=(8, 3, 4, 4)).astype(np.float32)
    found = reference_run(explained)[0]({"x": x, "target": np.arange(8) % 2})
    maps = {method: found[f"cam_node_{method}"] for method in CAM_METHODS}
    np.testing.assert_allclose(maps["gradcam"], maps["hirescam"], rtol=1e-4, atol=1e-6)
    assert not np.allclose(maps["gradcam"], maps["layercam"])


@pytest.mark.parametrize("engine", ["openvino", "ort"])
def test_the_classifier_gives_them(cam_file: Path, images: np.ndarray, engine: str) -> None:
    graph = reference_run(onnx.load(cam_file))[0]({"image": images, "target": np.full(8, -1)})
    with Classifier(cam_file, engine=engine, threads=1) as classifier:
        for cam in classifier.manifest.cams:
            found = classifier.explain(images, method=cam.method, layer=cam.layer)
            expected = resize_maps(graph[cam.output], found.map.shape[1:])
            # A code at a tie may be another one on the engine.
            np.testing.assert_allclose(found.map, expected, rtol=0.01, atol=0.01 * expected.max())
            assert (found.method, found.attribution.shape[2:]) == (cam.method, cam.size)
        assert classifier.explain(images[0]).method == CAM_METHODS[0]
        other = classifier.explain(images, target=3, method="layercam")
        np.testing.assert_array_equal(other.target, 3)
        with pytest.raises(ModelError, match=r"maps by gradcam, hirescam, layercam alone; .* --explain gradient"):
            classifier.explain(images, method="smoothgrad")
        with pytest.raises(OptionError, match="layer 'fc1': expected one of conv2, conv1"):
            classifier.explain(images, method="layercam", layer="fc1")
        with pytest.raises(OptionError, match=r"method 'cam': expected one of gradient, .*layercam"):
            classifier.explain(images, method="cam")


def test_no_class_gives_a_map_of_zeros(cam_file: Path, images: np.ndarray) -> None:
    session = open_session(cam_file, engine="openvino", threads=1)
    output = session.manifest.cams[0].output
    found = session.run({"image": images, "target": np.full(8, 10)}, ("logits", output))
    assert not found[output].any()


def test_frames_are_timed_to_the_first_map_of_a_file_without_gradient(cam_file: Path) -> None:
    session = open_session(cam_file, engine="ort", threads=1)
    found = frame_latency(session, (20, 30), explain=True, runs=2, seconds=0.01)
    session.close()
    assert {name: row.n for name, row in found.items()} == dict.fromkeys(
        ("network", "frame to class", "network + map", "frame to class + map"), 2
    )


def test_one_output_of_a_file_needs_no_other(cam_file: Path, images: np.ndarray) -> None:
    whole = cam_file.read_bytes()
    model = onnx.load_from_string(with_outputs(whole, ("logits", "cam_conv1")))
    onnx.checker.check_model(model, full_check=True)
    assert [o.name for o in model.graph.output] == ["logits", "cam_conv1"]
    assert len(model.graph.node) < len(onnx.load_from_string(whole).graph.node)
    feeds = {"image": images, "target": np.full(8, -1)}
    np.testing.assert_array_equal(
        reference_run(model)[0](feeds)["cam_conv1"],
        reference_run(onnx.load_from_string(whole))[0](feeds)["cam_conv1"],
    )


def test_the_class_alone_is_the_same_with_and_without_maps(digits_models: dict[str, Path], cam_file: Path) -> None:
    alone = onnx.load_from_string(with_outputs(digits_models["openvino"].read_bytes(), ("logits",)))
    stripped = onnx.load_from_string(with_outputs(cam_file.read_bytes(), ("logits",)))
    for part in ("node", "initializer", "input", "output"):
        one, other = ({p.SerializeToString() for p in getattr(m.graph, part)} for m in (stripped, alone))
        assert one == other


# Which activation is a layer's.

_STEM = "c = Conv(x, w) "


@pytest.mark.parametrize(
    ("body", "activation"),
    [
        ("y = Relu(c)", "y"),
        ("s = Sigmoid(c) y = Mul(c, s)", "y"),
        ("h = HardSwish(c) y = Add(h, c)", "c"),  # two branches read it
        ("r = Relu(c) n = Add(r, x) y = Relu(n)", "y"),
        ("r = Relu(c) g = ReduceMean<keepdims=1>(r, axes) s = Sigmoid(g) y = Mul(r, s)", "r"),  # a gate follows
        ("r = Relu(c) y = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(r)", "r"),
        ("q = QuantizeLinear(c, step, zero) d = DequantizeLinear(q, step, zero) y = Neg(d)", "d"),
    ],
)
def test_a_layers_activation_is_what_the_next_layer_reads(body: str, activation: str) -> None:
    model = _classifier(_STEM + body)
    (cam,) = find_cams(model, [("layercam", "")])
    assert cam.activation == activation
    assert cam.output.output == "cam_c"
    explained = append_input_gradient(model, outputs=(), cams=[cam])
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    run = reference_run(explained, [activation])[0]({"x": x, "target": np.array([0, 1])})
    # The rest of the network by finite differences, a pixel at a time.
    rest = _classifier((_STEM + body).partition(f"{activation} = ")[2].partition(") ")[2], source=activation, x=x)
    gradient = _numeric(rest, run[activation], [0, 1])
    expected = transcribed("layercam", torch.from_numpy(run[activation]), gradient)
    np.testing.assert_allclose(run["cam_c"], expected, rtol=0.02, atol=0.02 * expected.max())


def _classifier(body: str, source: str = "x", x: np.ndarray | None = None) -> onnx.ModelProto:
    """Return a network of a body that gives y, and a head: the squares of y's pixels, mixed."""
    text = body if "y = " in body or source == "y" else f"{body} y = Identity({source})"
    mix = np.random.default_rng(1).normal(size=(12 if "MaxPool" in body else 48, 2))
    return _parsed(f"{text} f = Flatten(y) p = Mul(f, f) logits = MatMul(p, mix)", source, mix=mix, x=x)


def _parsed(body: str, source: str = "x", **constants: np.ndarray | None) -> onnx.ModelProto:
    graph = f"g (float[N,3,4,4] {source}) => (float[N,2] logits) {{ {body} }}"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {graph}')
    weight = np.random.default_rng(1).normal(size=(3, 3, 1, 1))
    floats = {"w": weight, "step": np.array(0.02), **constants}
    tensors = [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in floats.items() if v is not None]
    tensors += [numpy_helper.from_array(v, k) for k, v in (("axes", np.array([2, 3])), ("zero", np.int8(0)))]
    read = {name for node in model.graph.node for name in node.input} - {source}
    model.graph.initializer.extend(tensor for tensor in tensors if tensor.name in read)
    for node in model.graph.node:
        node.name = "node" if "Conv" in node.op_type and node.input[0] != "x" else node.output[0]
    return model


def _numeric(model: onnx.ModelProto, activation: np.ndarray, classes: list[int]) -> Tensor:
    run, (source,) = reference_run(model)[0], (value.name for value in model.graph.input)
    gradient, step = np.zeros_like(activation), np.float32(1e-2)
    for place in np.ndindex(activation.shape[1:]):
        moved = [activation.copy(), activation.copy()]
        for one, sign in zip(moved, (1, -1), strict=True):
            one[(slice(None), *place)] += sign * step
        ahead, behind = (run({source: one})["logits"][np.arange(2), classes] for one in moved)
        gradient[(slice(None), *place)] = (ahead - behind) / (2 * step)
    return torch.from_numpy(gradient)


def test_names_of_layers() -> None:
    """By the weight, as the network calls it; what names begin with means the last of them."""
    model = _parsed("c = Conv(x, w) r = Relu(c) d = Conv(r, v) logits = ReduceMax<keepdims=0>(d, axes)",
                    v=np.ones((3, 3, 1, 1)))  # fmt: skip
    for tensor, name in zip(model.graph.initializer, ("network.stage1.conv1.codes", "stage1.conv2.weight"),
                            strict=False):  # fmt: skip
        for node in model.graph.node:
            node.input[:] = [name if i == tensor.name else i for i in node.input]
        tensor.name = name
    layers = ("", "stage1.conv1", "stage1", "d")
    found = [find_cams(model, [("gradcam", layer)])[0] for layer in layers]
    assert [cam.output.output for cam in found] == ["cam_stage1.conv2", "cam_stage1.conv1", "cam_stage1", "cam_d"]
    assert [cam.activation for cam in found] == ["d", "r", "d", "d"]
    with pytest.raises(
        ModelError, match=r"'stage9': no convolution of this name; expected one of stage1.conv1, st"
    ):
        find_cams(model, [("gradcam", "stage9")])
    with pytest.raises(OptionError, match="a map twice"):
        find_cams(model, [("gradcam", "stage1"), ("gradcam", "stage1")])
    many = [f"layer{stage}.{block}.conv{i}" for stage in (1, 2) for block in (0, 1) for i in (1, 2)]
    for asked, near in (("layr2", "layer2"), ("layer2.0.con1", "layer2.0.conv1")):
        with pytest.raises(ModelError, match=f"near it are {near}, .* of 8 from layer1.0.conv1 to layer2.1.conv2"):
            find_layer(many, asked)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("saliency", "--explain saliency: expected gradient, gradcam, hirescam, layercam"),
        ("gradient:conv1", "the gradient is by the image and has no layer; drop :conv1"),
        ("gradcam,gradcam", "gradcam twice"),
        ("", "--explain : expected"),
    ],
)
def test_wrong_methods(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        explanations(text, no_saliency=False)


def test_the_command_prints_each_maps_price_and_classify_draws_it(
    digits_checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], images: np.ndarray
) -> None:
    path = tmp_path / "cam.onnx"
    main([str(digits_checkpoint_path), "--explain", "gradient,layercam", "--target", "ort", "-o", str(path)])
    out = " ".join(capsys.readouterr().out.split())
    assert "explains: cam_conv2: layercam of conv2, " in out
    assert "times the class alone" in out
    assert out.endswith("int8 for ort, class and input gradient, layercam")
    from PIL import Image

    Image.fromarray(images[0, :, :, 0]).save(tmp_path / "digit.png")
    drawn = tmp_path / "heat.png"
    arguments: list[Any] = [path, tmp_path / "digit.png", "--explain", drawn, "--explain-method", "layercam"]
    assert classify([str(a) for a in arguments]) == 0
    assert drawn.exists()


def test_modules_without_a_name_in_the_graph_are_found_by_value(digits: ImageData) -> None:
    """A float network of anyone's, whose activation function is not a module of ours."""
    from export.own_network import quantized_model
    from export.sources.images import RealImages
    from tests.toy_models import small_convnet
    from train.input_spec import InputSpec

    torch.manual_seed(0)
    network: nn.Module = small_convnet(1, (8, 8), 10).eval()
    found = RealImages("digits", calibration=digits.train_images[:32], test=digits.test_images[:32])
    spec = InputSpec(size=(8, 8), channels=1, mean=(0.0,), std=(1.0,))
    model, _ = quantized_model(network, spec, found, [str(n) for n in range(10)], bits=32)
    cams = (("gradcam", "0"), ("hirescam", ""))
    check_layers(network, (1, 8, 8), cams)
    with pytest.raises(ModelError, match="layer '1': no convolution of this name; expected one of 0, 3"):
        check_layers(network, (1, 8, 8), (*cams, ("layercam", "1")))
    result = export(model, int8=False, saliency=False, cams=cams)
    assert [cam.output for cam in result.manifest.cams] == ["cam_0", "cam_3"]
    assert all(cam.median_error is not None and cam.median_error < 1e-5 for cam in result.cams)
