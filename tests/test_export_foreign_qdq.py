"""Quantized files of other makers keep their codes: logits and map are those of the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from tests.test_export_onnx_forms import CHANNELS, CLASSES, FRAMES, SIDE, exported, run


def qdq_net(kind: str) -> onnx.ModelProto:
    """Return a quantized net as Brevitas writes it (QCDQ, 4 bits), or with float16 scales, as Model Optimizer."""
    random = np.random.default_rng(3)
    half = kind != "QCDQ"
    floats = np.float16 if half else np.float32
    largest = 7 if kind == "QCDQ" else 127
    values = {
        "xs": floats(1 / 127), "z8": np.int8(0), "zu": np.uint8(0), "s": floats(0.09), "wz": np.zeros(6, np.int8),
        "w8": random.integers(-largest, largest + 1, (6, CHANNELS, 3, 3), dtype=np.int8),
        "ws": random.uniform(0.4, 0.6, 6).astype(floats) / floats(largest),
        "b32": random.integers(-400, 400, 6, dtype=np.int32), "bz": np.zeros(6, np.int32),
        "lo": np.int8(-7), "hi": np.int8(7), "l0": np.uint8(0), "h15": np.uint8(15),
        "h": random.normal(size=(CLASSES, 6, 1, 1)).astype(np.float32),
    }  # fmt: skip
    values["bs"] = (values["xs"] * values["ws"]).astype(floats)
    weight = "wc = Clip(w8, lo, hi) wd = DequantizeLinear<axis=0>(wc, ws, wz)"
    codes = "k = Clip(q, l0, h15) d = DequantizeLinear(k, s, zu)"
    image, bias, end = "x", "bd = DequantizeLinear<axis=0>(b32, bs, bz)", "e = Identity(d)"
    if half:
        weight, codes = "wd = DequantizeLinear<axis=0>(w8, ws, wz)", "d = DequantizeLinear(q, s, zu)"
        image, end = "x16", "e = Cast<to=1>(d)"
    front = "x16 = Cast<to=10>(x) " if half else ""
    body = (
        f"{front}xq = QuantizeLinear({image}, xs, z8) xd = DequantizeLinear(xq, xs, z8) {weight} {bias} "
        f"c = Conv<pads=[1,1,1,1]>(xd, wd, bd) r = Relu(c) q = QuantizeLinear(r, s, zu) {codes} {end} "
        "p = GlobalAveragePool(e) y = Conv(p, h)"
    )
    if kind == "float16 scales alone":  # products in float32
        body = body.replace("Conv<pads=[1,1,1,1]>(xd, wd, bd)", "Conv<pads=[1,1,1,1]>(xf, wf, bf)")
        body = body.replace("c = Conv", "xf = Cast<to=1>(xd) wf = Cast<to=1>(wd) bf = Cast<to=1>(bd) c = Conv")
        body = body.replace("q = QuantizeLinear(r", "rh = Cast<to=10>(r) q = QuantizeLinear(rh")
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["": 19]> net (float[1,{CHANNELS},{SIDE},{SIDE}] x) => '
        f"(float[1,{CLASSES},1,1] y) {{ {body} }}"
    )
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(v), k) for k, v in values.items() if k in used
    )
    return model


@pytest.mark.parametrize(
    ("kind", "target"),
    [("QCDQ", "openvino"), ("QCDQ", "ort"), ("float16", "ort"), ("float16 scales alone", "openvino")],
)
def test_files_of_brevitas_and_model_optimizer_are_taken_as_they_are(
    kind: str, target: str, tmp_path: Path
) -> None:
    path = tmp_path / "net.onnx"
    model = qdq_net(kind)
    path.write_bytes(model.SerializeToString())
    classifier = exported(path, "--mean", "0.5", "--std", "0.5", target=target)
    x = np.ascontiguousarray(
        ((FRAMES / np.float32(255) - np.float32(0.5)) / np.float32(0.5)).transpose(0, 3, 1, 2)
    )
    # OpenVINO computes the sums of float16 in float32, and so rounds some codes otherwise.
    near = 1e-5 if target == "ort" or kind == "QCDQ" else 0.02
    np.testing.assert_allclose(classifier.logits(FRAMES), run(path, x), atol=near)
    value = {
        t.name: torch.from_numpy(numpy_helper.to_array(t).astype(np.float32)) for t in model.graph.initializer
    }
    pixels = torch.from_numpy(x)
    codes = (pixels / value["xs"]).round().clamp(-128, 127)
    gate_in = (codes > -128) & (codes < 127)
    image = (codes * value["xs"]).requires_grad_()
    weight = value["w8"] * value["ws"].reshape(-1, 1, 1, 1)
    sums = torch.nn.functional.conv2d(image, weight, value["b32"] * value["bs"], padding=1)
    found = (sums / value["s"]).round()
    passed = (found > 0) & (found < (15 if kind == "QCDQ" else 255))
    assert 0.02 < (found >= 15).float().mean() < 0.5  # of QCDQ some codes are clipped
    logits = torch.einsum("nchw,kc->nk", torch.where(passed, sums, 0), value["h"].flatten(1)) / SIDE**2
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), image)
    expected = (gradient * gate_in).abs().amax(1).numpy()
    maps = classifier.explain(FRAMES, target=1).map
    assert (np.abs(maps - expected) > 0.01 * expected.max()).mean() < 0.02  # where a code was rounded otherwise
