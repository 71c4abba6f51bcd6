"""Codes clipped after a max pooling that thins them out.

Requires that only such poolings and the gradient read the clipped codes; others stay as they are. Ensures that
ONNX Runtime pools what comes straight from its convolution.
"""

from __future__ import annotations

import onnx
from onnx import helper

from export.graph import GraphFacts, attributes
from export.passes.barrier import replace_nodes_read
from runtime.onnx_bytes import GRADIENT_PREFIX


def clip_after_pooling(model: onnx.ModelProto) -> None:
    """Move the Clip of codes behind a max pooling that makes them fewer; edits the model in place.

    The gradient still reads the codes clipped before the pooling.

    The largest code of a window, clipped, is the largest of its clipped codes. ONNX Runtime pools in the layout of
    its convolutions only what comes straight from one; a Clip between costs a transposition of all that, too.
    """
    graph = model.graph
    facts = GraphFacts(model)
    nodes: list[onnx.NodeProto] = []
    renamed: dict[str, str] = {}
    for node in graph.node:
        nodes.append(node)
        if not _thins_out(node):
            continue
        dequantize = facts.producer.get(node.input[0])
        clip = facts.producer.get(dequantize.input[0]) if dequantize is not None else None
        if (
            dequantize is None
            or clip is None
            or (dequantize.op_type, clip.op_type) != ("DequantizeLinear", "Clip")
        ):
            continue
        values = [n.output[0] for n in facts.consumers[clip.output[0]]]
        of_class = [n for v in values for n in facts.consumers[v] if not n.output[0].startswith(GRADIENT_PREFIX)]
        if not all(map(_thins_out, of_class)):
            continue
        renamed |= {name: f"{GRADIENT_PREFIX}{name}" for name in (clip.output[0], *values)}
        result, codes = node.output[0], f"{node.output[0]}/codes"
        node.input[0], node.output[0] = clip.input[0], f"{codes}/unclipped"
        nodes += [
            helper.make_node("Clip", [*node.output, *clip.input[1:]], [codes], name=codes),
            helper.make_node("DequantizeLinear", [codes, *dequantize.input[1:]], [result], name=result),
        ]
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        if node.output[0] in renamed:  # a gradient's node now, which goes with it
            node.output[0] = node.name = renamed[node.output[0]]
    replace_nodes_read(graph, nodes)


def _thins_out(node: onnx.NodeProto) -> bool:
    """Return whether a node is a max pooling of fewer values than it takes, none of them padding."""
    found = attributes(node)
    padded = (
        any(found.get("pads", ())) or found.get("auto_pad", b"NOTSET") != b"NOTSET" or found.get("ceil_mode", 0)
    )
    return node.op_type == "MaxPool" and max(found.get("strides", (1,))) > 1 and not padded
