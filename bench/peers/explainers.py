"""Who explains: the input gradient of one checkpoint's network, by us and by PyTorch's ways to it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from bench.measure.cold_start import Loading
from bench.networks.network import CHECKPOINT_NAME
from bench.peers.contenders import Found, loading_torch
from bench.peers.names import OURS, OURS_WITH_MAP
from bench.peers.torch_ways import INSTALL_PEERS
from export.pipeline import export
from runtime.files import write_atomically
from train import checkpoint as checkpoints
from train.checkpoint import Checkpoint

_IN_TORCH = {"Captum Saliency": "captum", "PyTorch autograd": "eager", "torch.compile autograd": "compiled"}
# Name -> engine, whether in INT8, precision of the gradient.
_EXPORTS = {
    "ONNX Runtime FP32 + map": ("ort", False, "float32"),
    "OpenVINO FP32 + map": ("openvino", False, "float32"),
    "ONNX Runtime INT8 + map": ("ort", True, "float32"),
    "OpenVINO INT8 + f32 map": ("openvino", True, "float32"),
    OURS_WITH_MAP: ("openvino", True, "auto"),
}


def explainers(checkpoint: Checkpoint, folder: Path) -> Found[Loading]:
    """Return how what gives logits and the input gradient of the predicted class on the CPU is loaded, by name.

    All go from pixels uint8 [N, H, W, C] to logits and maps. The class alone, INT8 on OpenVINO, is among them.

    Args:
        checkpoint: quantized.
        folder: where the file of each is written.
    """
    checkpoints.save(checkpoint, folder / CHECKPOINT_NAME)
    missing = {}
    if importlib.util.find_spec("captum") is None:
        missing = {name: INSTALL_PEERS for name, way in _IN_TORCH.items() if way == "captum"}
    found = {
        name: loading_torch(checkpoint, folder, way=way, explain=True)
        for name, way in _IN_TORCH.items()
        if name not in missing
    }
    for name, (engine, int8, precision) in _EXPORTS.items():
        path = folder / f"{name}.onnx"
        write_atomically(path, export(checkpoint, int8=int8, target=engine, saliency_precision=precision).data)
        found[name] = Loading("runtime", path, engine, explain=True)
    # Of the same file: what the map costs, on top of the class.
    found[OURS] = Loading("runtime", found[OURS_WITH_MAP].path, "openvino")
    return Found(found, missing)
