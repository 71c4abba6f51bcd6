"""What the tables call our contenders, and whom each is held against."""

from __future__ import annotations

OURS = "OpenVINO INT8"
OURS_WITH_MAP = f"{OURS} + map"
# The same engine's own quantization after training.
PTQ = {OURS: "NNCF PTQ", "ONNX Runtime INT8": "ONNX Runtime PTQ"}
