"""A node that changes no number and that no engine's optimizer moves, merges or quantizes anything through."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import helper, numpy_helper

_LOWEST = "barrier/lowest"


def barrier(value: str, result: str) -> onnx.NodeProto:
    """Return the maximum of a float value and the lowest float; its graph needs `replace_nodes`."""
    return helper.make_node("Max", [value, _LOWEST], [result], name=result)


def take_barriers_away(graph: onnx.GraphProto) -> None:
    """Let, in place, the readers of barriers read the values before them, so that no gradient passes one."""
    barriers = [node for node in graph.node if node.op_type == "Max" and _LOWEST in node.input]
    before = {node.output[0]: node.input[0] for node in barriers}
    kept = [node for node in graph.node if node.output[0] not in before]
    for node in kept:
        node.input[:] = [before.get(name, name) for name in node.input]
    replace_nodes(graph, kept)


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Give a graph other nodes, in their order, and the constant that barriers among them read."""
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    if any(_LOWEST in node.input for node in kept) and _LOWEST not in {t.name for t in graph.initializer}:
        lowest = np.array(np.finfo(np.float32).min, np.float32)
        graph.initializer.append(numpy_helper.from_array(lowest, _LOWEST))


def replace_nodes_read(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Give a graph other nodes, without those that read codes for nobody."""
    used = {value.name for value in graph.output}
    kept = []
    for node in reversed(nodes):
        if node.op_type not in ("Clip", "DequantizeLinear") or node.output[0] in used:
            used.update(node.input)
            kept.append(node)
    replace_nodes(graph, kept[::-1])
