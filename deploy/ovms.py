"""`python -m deploy.ovms`: a model repository for OpenVINO Model Server from an exported file.

    REPOSITORY/config.json            every model of the repository: its folder, shapes and the engine's settings
    REPOSITORY/NAME/1/model.onnx      the outputs that were asked for, and nothing that only others need
    REPOSITORY/NAME/manifest.json     classes and temperature, for clients

The configuration follows the server's schema (https://github.com/openvinotoolkit/model_server, src/schema.cpp).
The server lacks two things that `runtime` does: on x86 processors without VNNI it does not keep OpenVINO's int16
sums exact, and it does not resize images as training did; `deploy.kserve` is a client that does.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m deploy.ovms")

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.whole_folder import folder_at_once
from runtime import command
from runtime.errors import FileError, ModelError, OptionError
from runtime.files import read_bytes, write_atomically
from runtime.manifest import INPUT_NAME, TARGET_NAME, Manifest, read_manifest
from runtime.onnx_bytes import output_names, with_outputs

EXAMPLES = """
  python -m deploy.ovms model.onnx --repository models                                   # class and map
  python -m deploy.ovms model.onnx --repository models --name digits --outputs logits    # the class alone
  python -m deploy.ovms model.onnx --repository models --name digits8 --outputs logits --batch 8 --streams 2
"""

CONFIG_NAME = "config.json"


def settings(
    manifest: Manifest, name: str, *, explained: bool, batch: int = 1, streams: int = 1
) -> dict[str, Any]:
    """Return the entry of one model in config.json.

    Args:
        manifest: of the file.
        name: of the model and of its folder.
        explained: the file has the input `target`.
        batch: images of a request. It is fixed: an open one costs a fifth more, and OpenVINO computes some graphs
            wrongly with it.
        streams: requests that run at the same time.
    """
    height, width = manifest.input.size
    shape = {INPUT_NAME: f"({batch},{height},{width},{manifest.input.channels})"}
    if explained:
        shape[TARGET_NAME] = f"({batch})"
    return {
        "config": {
            "name": name,
            "base_path": name,  # beside config.json
            "target_device": "CPU",
            "shape": shape,
            "nireq": streams,
            # Left to itself, OpenVINO computes in bfloat16 where the processor has it, and other classes come out.
            "plugin_config": {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": str(streams)},
        }
    }


def write_repository(
    model: Path, repository: Path, name: str, *, outputs: tuple[str, ...] | None = None, batch: int = 1,
    streams: int = 1,
) -> Path:  # fmt: skip
    """Write the model's folder and its entry in config.json, and return the folder.

    Args:
        model: exported for OpenVINO.
        repository: folder of the server's models.
        name: of the model in it.
        outputs: among those of the file; None takes all.
        batch: images of a request.
        streams: requests that run at the same time.

    Raises:
        FileError: the model is there already, config.json is not the server's, or a file cannot be written.
        ModelError: the file was exported for another engine.
        OptionError: the file has no such outputs.
    """
    contents = read_bytes(model)
    manifest = read_manifest(contents, str(model))
    if manifest.target != "openvino":
        raise ModelError(
            f"{model}: exported for {manifest.target}, expected openvino; export it again with --target openvino"
        )
    known = output_names(contents)
    outputs = known if outputs is None else outputs
    if "logits" not in outputs or set(outputs) - set(known) or len(set(outputs)) < len(outputs):
        raise OptionError(f"outputs {','.join(outputs)}: expected logits, and any of {', '.join(known[1:])}")
    folder = repository / name
    if folder.exists():
        raise FileError(f"{folder}: is there already; remove it first, or give another --name")
    config = _with(
        _read_config(repository / CONFIG_NAME), name,
        settings(manifest, name, explained=outputs != ("logits",), batch=batch, streams=streams),
    )  # fmt: skip
    with folder_at_once(folder) as temporary:
        write_atomically(temporary / "1" / "model.onnx", with_outputs(contents, outputs))
        write_atomically(temporary / "manifest.json", manifest.to_json())
    # Last: a server that watches the file then finds the folder.
    write_atomically(repository / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
    return folder


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"model_config_list": []}
    try:
        config = json.loads(read_bytes(path))
        [entry["config"]["name"] for entry in config["model_config_list"]]
    except (ValueError, KeyError, TypeError):
        raise FileError(
            f"{path}: no configuration of OpenVINO Model Server, expected model_config_list; "
            "name another repository"
        ) from None
    assert isinstance(config, dict)
    return config


def _with(config: dict[str, Any], name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with one entry more, or another one of that name."""
    others = [other for other in config["model_config_list"] if other["config"]["name"] != name]
    return {**config, "model_config_list": [*others, entry]}


def main(argv: Sequence[str] | None = None) -> None:
    """Write a model repository, or add a model to one."""
    parser = command.parser("deploy.ovms", "Make a model repository for OpenVINO Model Server.", EXAMPLES)
    parser.add_argument("model", help="ONNX file of python -m export.onnx --target openvino")
    parser.add_argument("--repository", required=True, help="folder of the server's models")
    parser.add_argument("--name", help="of the model (default: the file's)")
    parser.add_argument("--outputs", help="of the file, parted by commas (default: all)")
    parser.add_argument("--batch", type=int, default=1, help="images of a request (default: 1)")
    parser.add_argument("--streams", type=int, default=1, help="requests that run at a time (default: 1)")
    options = parser.parse_args(argv)
    command.check_counts(options, batch=1, streams=1)
    name = options.name or Path(options.model).stem
    if not re.fullmatch(r"[\w-][\w.-]*", name) or name == CONFIG_NAME:
        raise OptionError(f"--name {name!r}: expected letters, digits, '.', '_' and '-'")
    outputs = options.outputs and tuple(part.strip() for part in options.outputs.split(","))
    repository = Path(options.repository)
    folder = write_repository(
        Path(options.model), repository, name, outputs=outputs, batch=options.batch, streams=options.streams
    )
    print(f"{folder}: serve it with ovms --config_path {repository / CONFIG_NAME} --rest_port 8000")


if __name__ == "__main__":
    command.run(main)
