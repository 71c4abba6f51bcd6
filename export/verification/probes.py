"""The codes that an exported graph computes inside: where each quantizer's are, whatever passes moved them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from export.deploy_form import DeployForm, FoldedQuantizer
from export.reference import Run, reference_run
from runtime.errors import ModelError

CODES_SUFFIX = ".codes"
# Codes as QuantizeLinear gives them, where the clip of the grid comes after it; or, moved, after a pooling.
UNCLIPPED_SUFFIX = ".codes/unclipped"


@dataclass(frozen=True)
class Probe:
    """One quantizer's codes in a graph.

    Args:
        value: name of the tensor.
        zero_point: of its codes; an engine may store signed ones in unsigned bytes.
        clip: smallest and largest code, where the graph clips them later; else None.
    """

    value: str
    zero_point: int
    clip: tuple[int, int] | None


@dataclass(frozen=True)
class ProbedGraph:
    """A graph that also gives its codes.

    Args:
        run: outputs and probed values, by name, of the inputs.
        probes: by quantizer.
        reference: what runs it.
    """

    run: Run
    probes: dict[str, Probe]
    reference: str

    def codes(self, found: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """Return every quantizer's codes, int32, of what `run` found."""
        codes = {}
        for name, probe in self.probes.items():
            code = torch.from_numpy(found[probe.value].astype(np.int32) - probe.zero_point)
            codes[name] = code if probe.clip is None else code.clamp(*probe.clip)
        return codes


def probe(model: onnx.ModelProto, form: DeployForm) -> ProbedGraph:
    """Make a graph give its codes.

    Args:
        model: an exported graph.
        form: deploy form it was made from.

    Raises:
        ModelError: a quantizer's codes are not in the graph.
    """
    probes = {
        name: _probe(model, name, quantizer)
        for name, quantizer in form.network.named_modules()
        if isinstance(quantizer, FoldedQuantizer) and quantizer.rounds
    }
    run, reference = reference_run(model, [p.value for p in probes.values()])
    return ProbedGraph(run, probes, reference)


def zero_points_of(model: onnx.ModelProto) -> dict[str, int]:
    """Return the zero point of every activation's codes by the name of their tensor."""
    constants = {t.name: t for t in model.graph.initializer}
    found: dict[str, int] = {}
    # A pass may move codes, so that they are read elsewhere: the zero point there is that of their source, too.
    source: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and len(node.input) > 2:
            found[node.output[0]] = int(numpy_helper.to_array(constants[node.input[2]]))
        elif node.op_type == "DequantizeLinear":
            zero_point = constants.get(node.input[2]) if len(node.input) > 2 else None
            if zero_point is not None and not zero_point.dims and node.input[0] not in constants:
                code = node.input[0]
                while code:
                    found.setdefault(code, int(numpy_helper.to_array(zero_point)))
                    code = source.get(code, "")
        elif node.input:
            source[node.output[0]] = node.input[0]
    return {name: point for name, point in found.items() if CODES_SUFFIX in name}


def _probe(model: onnx.ModelProto, name: str, quantizer: FoldedQuantizer) -> Probe:
    zero_points = zero_points_of(model)
    for suffix, clip in ((CODES_SUFFIX, None), (UNCLIPPED_SUFFIX, (quantizer.qmin, quantizer.qmax))):
        if f"{name}{suffix}" in zero_points:
            return Probe(f"{name}{suffix}", zero_points[f"{name}{suffix}"], clip)
    raise ModelError(f"activation {name}: its codes are not in the graph; the export is not exact")
