"""A deploy-form network as an ONNX graph, with the names by which passes and verification find their way."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m export.onnx")

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx
import torch

from export.deploy_form import DeployForm, FoldedQuantizer
from export.gradient.joining import NORMALIZED
from export.graph import GraphFacts
from export.operators import OPSET, translations
from export.passes.layer_constants import give_layers_their_constants
from export.verification.probes import CODES_SUFFIX, UNCLIPPED_SUFFIX
from runtime.errors import ModelError
from runtime.manifest import INPUT_NAME
from train.model import QuantizedModel


def to_onnx(form: DeployForm, trained: QuantizedModel, target: str) -> onnx.ModelProto:
    """Return the graph of a deploy form, its batch open, with Q/DQ for one of TARGETS.

    Ensures that the normalized image, every activation's codes and values, and every layer's constants have the
    names that passes and verification look for.

    Raises:
        ModelError: fewer than two samples, or a graph that is not what the exporter used to make.
    """
    example = trained.samples[:2].permute(0, 2, 3, 1).contiguous()
    if len(example) < 2:
        raise ModelError("samples: fewer than two images, expected more; the file is verified on them")
    with _quiet_exporter():
        program = torch.onnx.export(
            form,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT_NAME],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            custom_translation_table=translations(target),
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    give_layers_their_constants(model)
    _name_values(model, form)
    return model


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep torch's exporter from writing to the terminal what only its authors can act on."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_values(model: onnx.ModelProto, form: DeployForm) -> None:
    """Name what later passes and readers look for: the normalized image, and every grid with its codes."""
    facts = GraphFacts(model)
    names = {_normalized(facts): NORMALIZED}
    # Quantizers stand in the graph in the order of their calls; their values are told apart by what they compute,
    # since the exporter merges equal constants.
    calls = [
        str(node.target)
        for node in form.network.graph.nodes  # type: ignore[union-attr]
        if node.op == "call_module" and isinstance(form.network.get_submodule(str(node.target)), FoldedQuantizer)
    ]
    weights = {t.name for t in model.graph.initializer}
    dequantized = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] not in weights]
    if len(dequantized) != len(calls) * int(any(m.rounds for m in _folded_quantizers(form))):
        raise ModelError(f"exported graph: {len(dequantized)} activation grids, expected {len(calls)}")
    for node, name in zip(dequantized, calls, strict=False):
        codes = facts.producer[node.input[0]]
        if codes.op_type == "Clip":
            names[codes.input[0]] = f"{name}{UNCLIPPED_SUFFIX}"
        names[node.input[0]] = f"{name}{CODES_SUFFIX}"
        names[node.output[0]] = name
    for node in model.graph.node:
        node.input[:] = [names.get(v, v) for v in node.input]
        node.output[:] = [names.get(v, v) for v in node.output]
    for value in model.graph.value_info:
        value.name = names.get(value.name, value.name)
    # The exporter's notes are stack traces with the paths of this machine.
    del model.graph.metadata_props[:]
    for part in (*model.graph.node, *model.graph.initializer, *model.graph.value_info, *model.graph.input,
                 *model.graph.output):  # fmt: skip
        del part.metadata_props[:]
        part.doc_string = ""


def _normalized(facts: GraphFacts) -> str:
    """Return the name of the normalized image; what asks the image for its batch alone is passed over."""
    name, kinds = INPUT_NAME, []
    for expected in (("Transpose",), ("Cast",), ("Sub",), ("Mul", "Div")):
        readers = [node for node in facts.consumers[name] if node.op_type != "Shape"]
        kinds.append(" or ".join(node.op_type for node in readers))
        if len(readers) != 1 or readers[0].op_type not in expected:
            raise ModelError(f"exported graph: starts with {', '.join(kinds)}, expected the normalization")
        name = readers[0].output[0]
    return str(name)


def _folded_quantizers(form: DeployForm) -> list[FoldedQuantizer]:
    return [m for m in form.network.modules() if isinstance(m, FoldedQuantizer)]
