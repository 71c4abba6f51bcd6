"""Constants of a layer under the layer's own name, where PyTorch's exporter has merged equal ones.

It merges what is equal bit for bit: weights of layers that are cloned or called twice, biases that are all 0.
Passes and verification find a layer's codes by its name, and may lower one of the layers alone.
"""

from __future__ import annotations

import ast

import onnx

from export.graph import GraphFacts

_LAYERS = {"Conv", "Gemm", "MatMul"}
_SCOPES = "pkg.torch.onnx.name_scopes"
_PARTS = ("codes", "scale")


def give_layers_their_constants(model: onnx.ModelProto) -> None:
    """Let every layer read codes, scales and bias named after it, in place; a copy where another's is read.

    Requires the exporter's notes on which module a node comes from. Ensures, for a layer of module `network.a`
    with codes, initializers `network.a.codes` and `network.a.scale`, and `network.a.bias` where it reads a bias.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    facts = GraphFacts(model)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        module = _module(node)
        if node.op_type in _LAYERS and module:
            for index, name in enumerate(node.input):
                source = facts.producer.get(name)
                own = f"{module}.bias"
                if name in constants and index == 2 and name.endswith(".bias") and name != own:
                    node.input[index] = _copied(graph, constants, name, own)
                elif source is not None and source.op_type == "DequantizeLinear" and source.input[0] in constants:
                    merged = list(source.input[:2])
                    named = [f"{module}.{part}" for part in _PARTS]
                    if merged == named or not all(
                        m.endswith(f".{p}") for m, p in zip(merged, _PARTS, strict=True)
                    ):
                        continue
                    copy = onnx.NodeProto()
                    copy.CopyFrom(source)
                    copy.name, copy.output[0] = f"{source.name}/{module}", f"{name}/{module}"
                    copy.input[:2] = [_copied(graph, constants, m, n) for m, n in zip(merged, named, strict=True)]
                    nodes.append(copy)
                    node.input[index] = copy.output[0]
        nodes.append(node)
    read = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    nodes = [n for n in nodes if n.op_type != "DequantizeLinear" or n.output[0] in read]
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    for tensor in [t for t in graph.initializer if t.name.endswith((".codes", ".scale", ".bias"))]:
        if tensor.name not in read:
            graph.initializer.remove(tensor)


def _module(node: onnx.NodeProto) -> str:
    """Return the name of the module that a node comes from: `network.a.b`."""
    for note in node.metadata_props:
        if note.key == _SCOPES:
            scopes = ast.literal_eval(note.value)
            return str(scopes[-2]) if len(scopes) > 1 else ""
    return ""


def _copied(graph: onnx.GraphProto, constants: dict[str, onnx.TensorProto], name: str, own: str) -> str:
    if own not in constants:
        tensor = graph.initializer.add()
        tensor.CopyFrom(constants[name])
        tensor.name = own
        constants[own] = tensor
    return own
