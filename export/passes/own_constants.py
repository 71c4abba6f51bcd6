"""Codes and zero points of its own for every weight, which ONNX Runtime needs on x86 processors without VNNI.

There products u8 x s8 are added in 16 bits, which do not hold pixels' codes up to 255. ONNX Runtime can turn
weights into u8 instead, whose products it adds in 32 bits (`session.x64quantprecision`, which the runtime asks
for). It replaces codes and zero point of each weight, and gives up on a file in which two weights share them.
"""

from __future__ import annotations

from collections import Counter

import onnx

_CODES, _ZERO_POINT = 0, 2  # inputs of DequantizeLinear


def own_constants(model: onnx.ModelProto) -> None:
    """Copy, in place, the constants that a weight's DequantizeLinear shares with other nodes."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers = Counter(name for node in graph.node for name in node.input)
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[_CODES] not in constants:
            continue
        for place in (_CODES, _ZERO_POINT)[: len(node.input) - 1]:
            name = node.input[place]
            if readers[name] > 1:
                copy = graph.initializer.add()
                copy.CopyFrom(constants[name])
                copy.name = node.input[place] = f"{node.output[0]}/{name}"
