from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from deploy.triton import main
from runtime.engines.tensorrt.plan import read_sidecar
from runtime.errors import FileError, ModelError, OptionError
from runtime.manifest import CamOutput, Manifest
from tests.fake_tensorrt import CHANNELS, CLASSES, SIZE, write_plan

_F = descriptor_pb2.FieldDescriptorProto
# The part of model_config.proto that is written: message -> field -> (number, type, repeated, message or enum).
_MESSAGES: dict[str, dict[str, tuple[int, int, bool, str]]] = {
    "Shape": {"shape": (1, _F.TYPE_INT64, True, "")},
    "Tensor": {
        "name": (1, _F.TYPE_STRING, False, ""),
        "data_type": (2, _F.TYPE_ENUM, False, "DataType"),
        "dims": (3, _F.TYPE_INT64, True, ""),
        "reshape": (4, _F.TYPE_MESSAGE, False, "Shape"),
        "label_filename": (5, _F.TYPE_STRING, False, ""),
    },
    "Group": {"kind": (1, _F.TYPE_ENUM, False, "Kind"), "count": (2, _F.TYPE_INT32, False, "")},
    "Cuda": {"graphs": (1, _F.TYPE_BOOL, False, "")},
    "Optimization": {"cuda": (1, _F.TYPE_MESSAGE, False, "Cuda")},
    "Batching": {"preferred_batch_size": (1, _F.TYPE_INT32, True, "")},
    "Value": {"string_value": (1, _F.TYPE_STRING, False, "")},
    "Parameter": {"key": (1, _F.TYPE_STRING, False, ""), "value": (2, _F.TYPE_MESSAGE, False, "Value")},
    "ModelConfig": {
        "name": (1, _F.TYPE_STRING, False, ""),
        "platform": (2, _F.TYPE_STRING, False, ""),
        "max_batch_size": (4, _F.TYPE_INT32, False, ""),
        "input": (5, _F.TYPE_MESSAGE, True, "Tensor"),
        "output": (6, _F.TYPE_MESSAGE, True, "Tensor"),
        "instance_group": (7, _F.TYPE_MESSAGE, True, "Group"),
        "default_model_filename": (8, _F.TYPE_STRING, False, ""),
        "dynamic_batching": (11, _F.TYPE_MESSAGE, False, "Batching"),
        "optimization": (12, _F.TYPE_MESSAGE, False, "Optimization"),
        "parameters": (14, _F.TYPE_MESSAGE, True, "Parameter"),
    },
}
_ENUMS = {"DataType": {"TYPE_UINT8": 2, "TYPE_INT64": 9, "TYPE_FP32": 11}, "Kind": {"KIND_GPU": 1}}


def parse(text: str) -> Any:
    """Read config.pbtxt by protobuf's own parser, which refuses unknown fields."""
    file = descriptor_pb2.FileDescriptorProto(name="triton.proto", package="t", syntax="proto2")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, repeated, of) in fields.items():
            label = _F.LABEL_REPEATED if repeated else _F.LABEL_OPTIONAL
            message.field.add(
                name=field, number=number, type=kind, label=label, type_name=f".t.{of}" if of else None
            )
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for value, number in values.items():
            enum.value.add(name=value, number=number)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    config = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))()
    return text_format.Parse(text, config)


def tensors(entries: Any) -> list[tuple[str, int, list[int]]]:
    return [(entry.name, entry.data_type, list(entry.dims)) for entry in entries]


def test_the_configuration_is_read_back(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(plan), "--repository", str(tmp_path / "models"), "--instances", "2"])
    folder = tmp_path / "models" / "engine"
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")) == [
        "1",
        "1/model.plan",
        "classes.txt",
        "config.pbtxt",
    ]
    assert (folder / "1" / "model.plan").read_bytes() == plan.read_bytes()
    assert (folder / "classes.txt").read_text().splitlines() == list(read_sidecar(plan).manifest.classes)
    config = parse((folder / "config.pbtxt").read_text())
    assert (config.name, config.platform, config.max_batch_size) == ("engine", "tensorrt_plan", 8)
    assert tensors(config.input) == [("image", 2, [*SIZE, CHANNELS]), ("target", 9, [1])]
    assert config.input[1].HasField("reshape")
    assert list(config.input[1].reshape.shape) == []
    assert tensors(config.output) == [
        ("logits", 11, [CLASSES]),
        ("gradient", 11, [CHANNELS, *SIZE]),
        ("saliency", 11, list(SIZE)),
    ]
    assert config.output[0].label_filename == "classes.txt"
    assert (config.instance_group[0].kind, config.instance_group[0].count) == (1, 2)
    assert config.optimization.cuda.graphs
    assert list(config.dynamic_batching.preferred_batch_size) == [4]
    (parameter,) = config.parameters
    assert Manifest.from_json(parameter.value.string_value, "config") == read_sidecar(plan).manifest
    assert capsys.readouterr().out.startswith(f"{folder}: serve it with tritonserver --model-repository=")


def test_a_plan_of_classes_only_has_neither_target_nor_maps(tmp_path: Path) -> None:
    path = write_plan(tmp_path / "class.plan", saliency=False)
    main([str(path), "--repository", str(tmp_path), "--name", "digits", "--outputs", "logits"])
    config = parse((tmp_path / "digits" / "config.pbtxt").read_text())
    assert tensors(config.input) == [("image", 2, [*SIZE, CHANNELS])]
    assert tensors(config.output) == [("logits", 11, [CLASSES])]


def test_maps_of_layers_are_served_in_their_own_size(tmp_path: Path) -> None:
    manifest = read_sidecar(write_plan(tmp_path / "a.plan")).manifest
    with_map = replace(manifest, cams=(CamOutput("cam_conv2", "layercam", "conv2", (4, 5)),))
    main([str(write_plan(tmp_path / "cam.plan", manifest=with_map)), "--repository", str(tmp_path)])
    config = parse((tmp_path / "cam" / "config.pbtxt").read_text())
    assert tensors(config.output)[-1] == ("cam_conv2", 11, [4, 5])
    assert Manifest.from_json(config.parameters[0].value.string_value, "config") == with_map


def test_a_fixed_batch_is_part_of_the_shapes(tmp_path: Path) -> None:
    main([str(write_plan(tmp_path / "four.plan", batch=(4, 4, 4))), "--repository", str(tmp_path)])
    config = parse((tmp_path / "four" / "config.pbtxt").read_text())
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert tensors(config.input) == [("image", 2, [4, *SIZE, CHANNELS]), ("target", 9, [4])]
    assert not config.input[1].HasField("reshape")
    assert tensors(config.output)[0] == ("logits", 11, [4, CLASSES])


def test_classes_with_quotes_survive(tmp_path: Path) -> None:
    manifest = read_sidecar(write_plan(tmp_path / "a.plan")).manifest
    odd = Manifest(manifest.arch, manifest.precision, manifest.target, manifest.input, ('"', "\\", "ä", "é\n"))
    main([str(write_plan(tmp_path / "odd.plan", manifest=odd)), "--repository", str(tmp_path)])
    config = parse((tmp_path / "odd" / "config.pbtxt").read_text())
    assert Manifest.from_json(config.parameters[0].value.string_value, "config").classes == odd.classes


def test_nothing_half_written_is_left(plan: Path, tmp_path: Path) -> None:
    plan.write_bytes(plan.read_bytes() + b" ")
    with pytest.raises(ModelError, match=r"engine.plan: sha256 .*; build it again"):
        main([str(plan), "--repository", str(tmp_path / "models")])
    assert not (tmp_path / "models").exists()


def test_a_model_that_is_there_is_left_alone(plan: Path, tmp_path: Path) -> None:
    main([str(plan), "--repository", str(tmp_path / "models")])
    before = (tmp_path / "models" / "engine" / "config.pbtxt").read_bytes()
    with pytest.raises(
        FileError, match=r"models/engine: is there already; remove it first, or give another --name$"
    ):
        main([str(plan), "--repository", str(tmp_path / "models"), "--instances", "3"])
    assert (tmp_path / "models" / "engine" / "config.pbtxt").read_bytes() == before
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["engine"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--outputs", "saliency"], "^--outputs saliency: expected logits, and any of gradient, saliency$"),
        (["--outputs", "logits,heat"], "^--outputs logits,heat: expected logits"),
        (["--instances", "0"], "^--instances 0: expected a whole number from 1$"),
        (["--name", "../up"], r"^--name '../up': expected letters, digits"),
    ],
)
def test_wrong_options_are_refused(plan: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        main([str(plan), "--repository", str(tmp_path), *arguments])
