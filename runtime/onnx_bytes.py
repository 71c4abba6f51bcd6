"""ONNX files as bytes: what a device must know of them without an ONNX library.

Only protobuf's outermost layers are read (https://protobuf.dev/programming-guides/encoding); the numbers below are
those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

# ModelProto
_GRAPH, _METADATA_PROPS = 7, 14
# StringStringEntryProto
_KEY, _VALUE = 1, 2
# GraphProto and its nodes.
_NODE, _OUTPUT = 1, 12
_NODE_INPUT, _NODE_OUTPUT = 1, 2
# Its lists of tensors, and the number of the name in each: initializer, input, output, value_info.
_NAME_OF = {5: 8, 11: 1, 12: 1, 13: 1}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# What `export.gradient` adds to a graph is named so.
GRADIENT_PREFIX = "grad/"


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
    """Return the file without what explains: the input `target` and all that only maps need."""
    return with_outputs(model, ("logits",))


def with_outputs(model: bytes, outputs: Sequence[str]) -> bytes:
    """Return the file with these outputs alone, and nothing that only others need.

    Args:
        model: contents of a file whose nodes are in order and without control flow.
        outputs: names among its outputs.
    """
    kept = []
    for number, content, whole in _fields(model):
        if number != _GRAPH:
            kept.append(whole)
            continue
        parts = list(_fields(content))
        needed = {name.encode() for name in outputs}
        unused = set()
        for at in range(len(parts) - 1, -1, -1):
            if parts[at][0] != _NODE:
                continue
            of_node = [(field, inner) for field, inner, _ in _fields(parts[at][1])]
            if needed.isdisjoint(inner for field, inner in of_node if field == _NODE_OUTPUT):
                unused.add(at)
            else:
                needed.update(inner for field, inner in of_node if field == _NODE_INPUT)
        graph = b"".join(
            part
            for at, (field, inner, part) in enumerate(parts)
            if at not in unused and (field not in _NAME_OF or _name(field, inner) in needed)
        )
        kept.append(_encoded_varint(_GRAPH << 3 | _BYTES) + _encoded_varint(len(graph)) + graph)
    return b"".join(kept)


def _name(field: int, content: bytes) -> bytes:
    return _lengths(content).get(_NAME_OF[field], b"")


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
