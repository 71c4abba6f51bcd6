"""A graph in its plainest form: sorted, one branch of every If, operators written out, shapes that are constants.

Whoever reads a graph operator by operator, to differentiate it or to quantize it, then needs fewer operators.
Nothing here changes what the graph computes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import onnx
import onnx.inliner
from onnx import defs, helper, numpy_helper

from export.graph import GraphFacts, graphs_inside, infer_shapes, read_by

# Their bodies are loops or draw at random, and what they give is a constant or no number at all.
_KEPT = {"Bernoulli", "BlackmanWindow", "HammingWindow", "HannWindow", "Range", "SequenceMap"}
# Bodies lie in each other this deep at most: SwiGLU, Swish, CastLike.
_DEEPEST = 4


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Put every node after those that it reads, in place; as far as there is such an order."""
    computed = {name for node in graph.node for name in node.output if name}
    waiting, done = list(graph.node), []
    known: set[str] = set()
    while waiting:
        ready, left = [], []
        for node in waiting:
            if (read_by(node) & computed) <= known:
                ready.append(node)
                known.update(node.output)
            else:
                left.append(node)
        if not ready:
            break  # a circle: the checker says so
        done += ready
        waiting = left
    if done[: len(graph.node)] != list(graph.node):
        ordered = [*done, *waiting]
        del graph.node[:]
        graph.node.extend(ordered)


def take_constant_branches(model: onnx.ModelProto) -> None:
    """Put the branch that is always taken in the place of every If whose condition is a constant, in place."""
    graph = model.graph
    waiting = [node for node in graph.node if node.op_type == "If"]
    while waiting:
        facts, taken = GraphFacts(infer_shapes(model)), False
        for node in waiting:
            condition = facts.value(node.input[0])
            if condition is not None:
                _take_branch(graph, node, "then_branch" if condition.item() else "else_branch")
                taken = True
        waiting = [node for node in graph.node if node.op_type == "If"] if taken else []


def expand_functions(model: onnx.ModelProto, known: Collection[str]) -> onnx.ModelProto:
    """Return the model with the bodies of the ONNX operators that are not `known`; itself where there is none.

    ONNX gives Mish, Selu, ReduceL2, RMSNormalization, Attention and many more a body of simpler operators. One
    whose body cannot be written here, such as an Attention that leaves inputs out, stays as it is.
    """
    tried: set[str] = set()
    for _ in range(_DEEPEST):
        found = {n.op_type for n in model.graph.node if not n.domain} - tried - _KEPT - set(known)
        for name in sorted(kind for kind in found if _has_body(kind, model)):
            tried.add(name)
            model = _with_bodies_of(name, model)
    return model


def _with_bodies_of(name: str, model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the bodies of one kind of operator, itself where ONNX cannot write them."""
    typed = infer_shapes(model)
    # The inliner (onnx 1.23) asks for the types of constants, too, and does not look at the constants for them.
    typed.graph.value_info.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer
    )
    defaults = [a.default_value for a in _schema(name, model).attributes.values() if a.default_value.name]
    for node in typed.graph.node:
        if node.op_type == name:  # nor does it know what attributes are by default
            present = {a.name for a in node.attribute}
            node.attribute.extend(value for value in defaults if value.name not in present)
    try:
        result = onnx.inliner.inline_selected_functions(typed, [("", name)], inline_schema_functions=True)
    except RuntimeError:
        return model
    del result.graph.value_info[:]
    result.graph.value_info.extend(model.graph.value_info)
    return result


def hold_shapes(model: onnx.ModelProto) -> None:
    """Make constants, in place, of what is computed from shapes and is the same whatever the batch."""
    graph = model.graph
    facts = GraphFacts(infer_shapes(model))
    while facts.of_shapes:  # what becomes a constant may make the shape of something else known
        held = {name: value for name in facts.of_shapes if (value := facts.value(name)) is not None}
        left = [node for node in graph.node if not held.keys() >= set(filter(None, node.output))]
        wanted = {name for node in left for name in read_by(node)} | {value.name for value in graph.output}
        if len(left) == len(graph.node):
            return
        del graph.node[:]
        graph.node.extend(left)
        graph.initializer.extend(
            numpy_helper.from_array(value, name) for name, value in held.items() if name in wanted
        )
        facts = GraphFacts(infer_shapes(model))


def as_rows(model: onnx.ModelProto, facts: GraphFacts, name: str) -> str:
    """Return the tensor [N, K] of a tensor [N, K] or [N, K, 1, 1]; of the latter a node is added, in place."""
    if facts.rank(name) == 2:
        return name
    rows = f"{name}/rows"
    model.graph.node.append(helper.make_node("Flatten", [name], [rows], name=rows, axis=1))
    kept = [value for value in model.graph.output if value.name != name]
    if len(kept) < len(model.graph.output):
        _, classes = facts.shape(name)[:2]
        kept.append(helper.make_tensor_value_info(rows, facts.type(name), [None, classes]))
    values = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
    del model.graph.output[:]
    model.graph.output.extend(values)
    return rows


def is_flat(facts: GraphFacts, name: str) -> bool:
    """Return whether a tensor is [N, K], perhaps with axes of size 1 behind."""
    if not facts.has_rank(name):
        return False
    _, *rest = facts.shape(name) or (None,)
    return len(rest) >= 1 and all(size == 1 for size in rest[1:])


def _schema(name: str, model: onnx.ModelProto) -> defs.OpSchema:
    opset = next((o.version for o in model.opset_import if o.domain == ""), 0)
    return defs.get_schema(name, opset, "")


def _has_body(name: str, model: onnx.ModelProto) -> bool:
    try:
        schema: Any = _schema(name, model)
    except defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)


def _take_branch(graph: onnx.GraphProto, node: onnx.NodeProto, name: str) -> None:
    branch = next(a.g for a in node.attribute if a.name == name)
    own = {output for inner in branch.node for output in inner.output if output}
    own |= {tensor.name for tensor in branch.initializer}
    # Another branch may have the same names inside.
    renamed = {old: f"{node.output[0]}/{old}" for old in own}
    nodes = [_renamed(inner, renamed) for inner in branch.node]
    nodes += [
        helper.make_node("Identity", [renamed.get(value.name, value.name)], [output])
        for value, output in zip(branch.output, node.output, strict=True)
    ]
    for tensor in branch.initializer:
        graph.initializer.add().CopyFrom(tensor)
        graph.initializer[-1].name = renamed[tensor.name]
    place = next(i for i, other in enumerate(graph.node) if other is node or other == node)
    ordered = [*graph.node[:place], *nodes, *graph.node[place + 1 :]]
    del graph.node[:]
    graph.node.extend(ordered)


def _renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    """Return a copy of a node that reads and writes tensors by new names, in its own branches, too."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [names.get(name, name) for name in copy.input]
    copy.output[:] = [names.get(name, name) for name in copy.output]
    for graph in graphs_inside(copy):
        inner = [_renamed(other, names) for other in graph.node]
        del graph.node[:]
        graph.node.extend(inner)
        for value in graph.output:
            value.name = names.get(value.name, value.name)
    return copy
