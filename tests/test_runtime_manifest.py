from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import ModelError
from runtime.manifest import METADATA_KEY, ImageInput, Manifest, read_manifest

EXAMPLE = Manifest(
    arch="cnn2",
    precision="int8",
    target="ort",
    input=ImageInput((8, 9), 1, (0.5,), (0.25,), "none"),
    classes=("cat", "dog"),
    layers=({"name": "conv1", "kind": "Conv2d", "bits": None, "input": None},),
    metrics={"test_accuracy": 98.5},
    data="digits",
    checkpoint="ab12",
    versions={"onnx": "1"},
)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
finite = st.floats(-10, 10)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    channels = draw(st.sampled_from([1, 3]))
    return Manifest(
        arch=draw(text),
        precision=draw(st.sampled_from(["int8", "fp32"])),
        target=draw(text),
        input=ImageInput(
            size=(draw(st.integers(1, 4096)), draw(st.integers(1, 4096))),
            channels=channels,
            mean=tuple(draw(st.lists(finite, min_size=channels, max_size=channels))),
            std=tuple(draw(st.lists(st.floats(1e-6, 10), min_size=channels, max_size=channels))),
            resize=draw(st.sampled_from(["bilinear", "crop", "none"])),
        ),
        classes=tuple(draw(st.lists(text, min_size=1, max_size=5))),
        layers=tuple(
            draw(st.lists(st.dictionaries(text, text | st.none() | st.integers(), max_size=3), max_size=3))
        ),
        metrics=draw(st.dictionaries(text, finite, max_size=3)),
        data=draw(text),
        checkpoint=draw(text),
        versions=draw(st.dictionaries(text, text, max_size=3)),
    )


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def length_delimited(field: int, contents: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(contents)) + contents


def metadata(key: str, value: str) -> bytes:
    return length_delimited(14, length_delimited(1, key.encode()) + length_delimited(2, value.encode()))


def changed(**changes: Any) -> str:
    """EXAMPLE as JSON with fields replaced; `input__x` replaces a field of the input, `...` removes one."""
    values = json.loads(EXAMPLE.to_json())
    for name, value in changes.items():
        at, key = (values["input"], name[7:]) if name.startswith("input__") else (values, name)
        if value is ...:
            del at[key]
        else:
            at[key] = value
    return json.dumps(values)


@given(manifests())
def test_json_gives_back_the_manifest(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json(), "m.onnx") == manifest


@given(manifests())
def test_a_manifest_travels_through_a_file_that_onnx_wrote(manifest: Manifest) -> None:
    model = onnx.ModelProto(ir_version=10, producer_name="someone")
    onnx.helper.set_model_props(model, {"other": "x", METADATA_KEY: manifest.to_json(), "": ""})
    assert read_manifest(model.SerializeToString(), "m.onnx") == manifest


@pytest.mark.parametrize("name", ["openvino", "ort", "tensorrt", "float"])
def test_an_exported_file_says_to_us_what_it_says_to_onnx(digits_models: dict[str, Path], name: str) -> None:
    props = {p.key: p.value for p in onnx.load(digits_models[name]).metadata_props}
    manifest = read_manifest(digits_models[name].read_bytes(), "m.onnx")
    values = json.loads(props[METADATA_KEY])
    assert json.loads(manifest.to_json()) == values
    assert manifest.input == ImageInput((8, 8), 1, (128 / 255,), (values["input"]["std"][0],), "bilinear")
    assert manifest.classes == tuple("0123456789")
    assert manifest.precision == ("fp32" if name == "float" else "int8")
    assert manifest.target == ("openvino" if name == "float" else name)
    assert [layer["name"] for layer in manifest.layers] == ["conv1", "conv2", "fc1", "fc2"]


def test_literal_bytes_with_every_wire_type_are_read() -> None:
    model = (
        b"\x08\x0a"  # ir_version 10
        b"\x10\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"  # field 2: a varint of ten bytes, -1
        b"\x1d\x01\x02\x03\x04"  # field 3: fixed32
        b"\x21\x01\x02\x03\x04\x05\x06\x07\x08"  # field 4: fixed64
        b"\x82\x7d\x02hi"  # field 2000: a tag of two bytes
        b"\x72\x00"  # an empty entry of metadata_props
        b"\x72\x07\x0a\x03key\x12\x00"  # {"key": ""}
    ) + metadata(METADATA_KEY, EXAMPLE.to_json())
    assert len(EXAMPLE.to_json()) > 127  # its length takes two bytes
    assert read_manifest(model, "m.onnx") == EXAMPLE


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (b"", "an empty file"),
        (b"\x08", "truncated at 1 bytes"),
        (b"\x72\x05ab", "truncated at 4 bytes"),
        (b"\x1d\x01\x02\x03", "truncated at 4 bytes"),
        (b"\x21\x01\x02\x03\x04\x05\x06\x07", "truncated at 8 bytes"),
        (b"\x72\x02\x0a\x09", "truncated at 2 bytes"),
        (b"\x0b", "no protobuf message"),
        (b"\x08" + b"\xff" * 11, "no protobuf message"),
        (b"#!/usr/bin/env python\nprint('hello')\n", "no protobuf message"),
    ],
)
def test_bytes_that_are_no_onnx_file_are_named_as_such(model: bytes, found: str) -> None:
    with pytest.raises(ModelError, match=f"^m.onnx: {found}.*, expected an ONNX file; copy or export it again$"):
        read_manifest(model, "m.onnx")


def test_every_truncation_of_a_model_is_an_error_that_names_the_file() -> None:
    graph = onnx.parser.parse_graph("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 21)])
    onnx.helper.set_model_props(model, {METADATA_KEY: EXAMPLE.to_json()})
    data = model.SerializeToString()
    assert read_manifest(data, "m.onnx") == EXAMPLE
    for length in range(len(data)):
        with pytest.raises(ModelError, match=r"^m\.onnx: .*; (copy or )?export it"):
            read_manifest(data[:length], "m.onnx")


@given(st.binary(max_size=200))
def test_random_bytes_are_a_model_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(ModelError, match=r"^m\.onnx: "):
        read_manifest(data, "m.onnx")


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_random_manifests_in_a_sound_file_are_a_model_error_and_nothing_else(before: bytes, value: bytes) -> None:
    entry = length_delimited(1, METADATA_KEY.encode()) + length_delimited(2, value)
    with pytest.raises(ModelError, match=r"^m\.onnx: "):
        read_manifest(length_delimited(7, before) + length_delimited(14, entry), "m.onnx")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)


FIELDS = [*json.loads(EXAMPLE.to_json()), *(f"input__{name}" for name in ("size", "mean", "std", "resize"))]


@given(st.sampled_from(FIELDS), json_values)
def test_any_value_in_any_field_is_read_as_it_is_or_refused(name: str, value: Any) -> None:
    written = changed(**{name: value})
    try:
        manifest = Manifest.from_json(written, "m.onnx")
    except ModelError:
        with pytest.raises(ModelError, match=r"^m\.onnx: manifest "):
            Manifest.from_json(written, "m.onnx")
        return
    assert json.loads(manifest.to_json()) == json.loads(written)


def test_an_onnx_file_of_another_program_has_no_manifest(tmp_path: Path) -> None:
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    onnx.helper.set_model_props(model, {"author": "someone"})
    message = "^m.onnx: an ONNX file without a clearpact manifest; export it with `python -m export.onnx`$"
    with pytest.raises(ModelError, match=message):
        read_manifest(model.SerializeToString(), "m.onnx")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"version"', "{}", "[" * 50_000, "\ufffd"])
def test_a_manifest_that_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match=r"^m\.onnx: its manifest is not readable JSON; export it with"):
        Manifest.from_json(text, "m.onnx")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"version": 2}, "manifest version 2, expected 1"),
        ({"arch": 5}, "manifest field arch 5: expected a text"),
        ({"arch": ...}, "manifest field arch: missing"),
        ({"input": ...}, "manifest field input: missing"),
        ({"input": [8, 8]}, r"manifest field input \[8, 8\]: expected an object"),
        ({"layers": ["conv"]}, r"manifest field layers\[0\] 'conv': expected an object"),
        ({"classes": "cats"}, "manifest field classes 'cats': expected a list"),
        ({"classes": []}, r"manifest field classes \[\]: expected at least one name"),
        ({"classes": ["a", 2]}, r"manifest field classes\[1\] 2: expected a text"),
        ({"metrics": {"test_accuracy": "high"}}, "manifest field test_accuracy 'high': expected a number"),
        ({"colour": "blue"}, "manifest field colour: not known to this release"),
        ({"input__size": [8]}, r"manifest field size \[8\]: expected two whole numbers from 1"),
        ({"input__size": [8, 0]}, r"manifest field size \[8, 0\]: expected two whole numbers from 1"),
        ({"input__size": [8.5, 8]}, r"manifest field size\[0\] 8.5: expected a whole number"),
        ({"input__channels": 4}, "manifest field channels 4: expected 1 or 3"),
        ({"input__channels": True}, "manifest field channels True: expected a whole number"),
        ({"input__channels": ...}, "manifest field channels: missing"),
        ({"input__mean": [0.5, 0.5]}, r"manifest field mean \[0.5, 0.5\]: expected 1 numbers"),
        ({"input__std": [0]}, r"manifest field std \[0\]: expected 1 numbers above 0"),
        ({"input__std": [float("nan")]}, r"manifest field std \[nan\]: expected 1 numbers above 0"),
        ({"input__mean": [10**400]}, "manifest int too large to convert to float"),
        ({"input__resize": "cubic"}, "manifest field resize 'cubic': expected one of bilinear, crop, none"),
        ({"input__resize": ...}, "manifest field resize None: expected one of bilinear, crop, none"),
    ],
)
def test_a_wrong_field_is_named_with_what_it_must_be(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(ModelError, match=f"^m.onnx: {found}; export it with `python -m export.onnx`$"):
        Manifest.from_json(changed(**changes), "m.onnx")
