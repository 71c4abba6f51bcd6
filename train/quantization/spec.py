"""How a network is to be quantized: bits, quantizers, ranges."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from runtime.errors import OptionError
from train.choices import FLOAT_BITS, QUANTIZED_BITS, WEIGHT_METHODS

# Field of older checkpoints -> what it is called now.
_RENAMED = {"weights": "weight_quantizer", "full_grid": "full_range", "addends": "quantize_adds"}


@dataclass(frozen=True)
class QuantSpec:
    """How a network is quantized.

    Args:
        bits: weights and activations, 2 to 8 (32 leaves the network in float).
        weight_quantizer: one of train.choices.WEIGHT_METHODS.
        first_last_bits: bits of the first and the last layer.
        full_range: 8-bit activations use 0..255 (signed: -128..127) instead of 0..127 (-127..127), which every
            engine has; not exact on TensorRT.
        alpha: initial clipping value of every PACT, until `start_alphas` sets it from data.
        layer_bits: bits of single layers by module name, overriding the above.
        quantize_adds: the inputs of an addition before a PACT get 8-bit grids of their own, so that ONNX Runtime
            adds codes.
        bias_grid: evaluated and shipped, biases are whole steps of their accumulators (accumulators.py), so that
            ONNX Runtime's integer kernels add them exactly.
    """

    bits: int = 8
    weight_quantizer: str = "absmax"
    first_last_bits: int = 8
    full_range: bool = False
    alpha: float = 6.0
    layer_bits: dict[str, int] = field(default_factory=dict)
    quantize_adds: bool = False
    bias_grid: bool = True

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            OptionError: a field is outside its range.
        """
        if self.bits not in (*QUANTIZED_BITS, FLOAT_BITS):
            raise OptionError(f"bits {self.bits!r}: expected a whole number from 2 to 8, or 32 for float")
        if self.bits == FLOAT_BITS and self.layer_bits:
            raise OptionError(
                "bits 32 leave every layer in float, but bits of single layers are given; choose one"
            )
        for name, bits in {"first and last layer": self.first_last_bits, **self.layer_bits}.items():
            if bits not in QUANTIZED_BITS:
                raise OptionError(f"bits {bits!r} of {name}: expected a whole number from 2 to 8")
        if self.weight_quantizer not in WEIGHT_METHODS:
            raise OptionError(
                f"weight quantizer {self.weight_quantizer!r}: expected one of {', '.join(WEIGHT_METHODS)}"
            )
        if not self.alpha > 0:
            raise OptionError(f"alpha {self.alpha!r}: expected a positive clipping value")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantSpec:
        """Return the spec a checkpoint holds.

        Raises:
            OptionError: a field is unknown or out of range.
        """
        values = {_RENAMED.get(name, name): value for name, value in values.items()}
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise OptionError(f"quantization spec: unknown fields {sorted(unknown)}; made by a newer version")
        # A network of a version that had no such grid was evaluated, and is to ship, without.
        return cls(**{"bias_grid": False} | values)
