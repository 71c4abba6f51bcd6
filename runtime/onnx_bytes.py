"""ONNX files as bytes: what a device must know of them without an ONNX library.

Only protobuf's outermost layers are read (https://protobuf.dev/programming-guides/encoding); the numbers below are
those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator

# ModelProto
_GRAPH, _METADATA_PROPS = 7, 14
# StringStringEntryProto
_KEY, _VALUE = 1, 2
# GraphProto: its lists of named things, and the number of the name in each.
_OUTPUT = 12
_NAME_OF = {1: 3, 5: 8, 11: 1, 12: 1, 13: 1}  # node, initializer, input, output, value_info

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# What `export.gradient` adds to a graph is named so.
GRADIENT_PREFIX = "grad/"
_GRADIENT_NAMES = ("target", "saliency", "gradient")


def metadata(model: bytes) -> dict[str, str]:
    """Return the entries of `metadata_props`.

    Raises:
        ValueError: not a protobuf message, or a truncated one.
    """
    entries = [_lengths(content) for number, content, _ in _fields(model) if number == _METADATA_PROPS]
    return {
        entry.get(_KEY, b"").decode("utf-8", "replace"): entry.get(_VALUE, b"").decode("utf-8", "replace")
        for entry in entries
    }


def output_names(model: bytes) -> tuple[str, ...]:
    """Return the names of the graph's outputs."""
    graphs = [content for number, content, _ in _fields(model) if number == _GRAPH]
    outputs = [content for graph in graphs for number, content, _ in _fields(graph) if number == _OUTPUT]
    return tuple(_lengths(output)[_NAME_OF[_OUTPUT]].decode("utf-8", "replace") for output in outputs)


def without_gradient(model: bytes) -> bytes:
    """Return the file without what `export.gradient` added: the input `target` and all that only maps need."""
    kept = []
    for number, content, whole in _fields(model):
        if number != _GRAPH:
            kept.append(whole)
            continue
        graph = b"".join(part for field, inner, part in _fields(content) if not _of_gradient(field, inner))
        kept.append(_encoded_varint(_GRAPH << 3 | _BYTES) + _encoded_varint(len(graph)) + graph)
    return b"".join(kept)


def _of_gradient(field: int, content: bytes) -> bool:
    if field not in _NAME_OF:
        return False
    name = _lengths(content).get(_NAME_OF[field], b"").decode("utf-8", "replace")
    return name in _GRADIENT_NAMES or name.startswith(GRADIENT_PREFIX)


def _lengths(message: bytes) -> dict[int, bytes]:
    """Return the length-delimited fields of a message by number, the last of each."""
    return {number: content for number, content, _ in _fields(message) if number}


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield every field: its number (0 unless length-delimited), its contents, and its whole encoding."""
    at = 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            _, at = _varint(message, at)
            yield 0, b"", message[start:at]
            continue
        if wire not in (_FIXED64, _BYTES, _FIXED32):
            raise ValueError(f"no protobuf message (byte {at})")
        length, at = _varint(message, at) if wire == _BYTES else (8 if wire == _FIXED64 else 4, at)
        if at + length > len(message):
            raise ValueError(f"truncated at {len(message)} bytes")
        end = at + length
        yield (number if wire == _BYTES else 0), message[at:end], message[start:end]
        at = end


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError(f"truncated at {len(message)} bytes")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"no protobuf message (byte {at})")


def _encoded_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
