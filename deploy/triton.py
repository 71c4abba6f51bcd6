"""`python -m deploy.triton`: a model repository for NVIDIA's Triton Inference Server from a plan.

    REPOSITORY/NAME/config.pbtxt       inputs, outputs, batching
    REPOSITORY/NAME/classes.txt        class names, which Triton adds to classification results
    REPOSITORY/NAME/1/model.plan

The configuration follows model_config.proto (https://github.com/triton-inference-server/common); the server must
bring the TensorRT that the plan was built with, since it runs the plan as it is.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m deploy.triton")

import json
import re
from collections.abc import Sequence
from pathlib import Path

from deploy.whole_folder import folder_at_once
from runtime import command
from runtime.engines.tensorrt.plan import PlanSidecar, read_sidecar
from runtime.errors import FileError, OptionError
from runtime.files import read_bytes, write_atomically
from runtime.manifest import INPUT_NAME, TARGET_NAME

EXAMPLES = """
  python -m deploy.triton engine.plan --repository models                   # class and map
  python -m deploy.triton class.plan --repository models --outputs logits   # of a plan built with --no-saliency
  python -m deploy.triton engine.plan --repository models --name digits --instances 2
"""

OUTPUTS = ("logits", "gradient", "saliency")


def configuration(
    sidecar: PlanSidecar, name: str, *, outputs: tuple[str, ...] = OUTPUTS, instances: int = 1
) -> str:
    """Return the text of config.pbtxt.

    Args:
        sidecar: of the plan.
        name: of the model in the repository.
        outputs: those of the plan, among OUTPUTS and the maps of layers; all but `logits` need the input
            `target`.
        instances: execution contexts on each GPU.
    """
    manifest = sidecar.manifest
    (height, width), channels = manifest.input.size, manifest.input.channels
    smallest, usual, largest = sidecar.batch
    # With a fixed batch Triton may not batch on its own: it would pad nothing.
    batched = smallest == 1
    first = [] if batched else [largest]
    shapes = {
        "logits": [len(manifest.classes)],
        "gradient": [channels, height, width],
        "saliency": [height, width],
        **{cam.output: list(cam.size) for cam in manifest.cams},
    }
    blocks = [_tensor("input", INPUT_NAME, "TYPE_UINT8", [*first, height, width, channels])]
    if outputs != ("logits",):
        # One number an image: Triton's shapes have a size at least, TensorRT's is the batch alone.
        reshape = "  reshape { shape: [ ] }" if batched else ""
        blocks.append(_tensor("input", TARGET_NAME, "TYPE_INT64", first or [1], reshape))
    for output in outputs:
        labels = '  label_filename: "classes.txt"' if output == "logits" else ""
        blocks.append(_tensor("output", output, "TYPE_FP32", [*first, *shapes[output]], labels))
    lines = [
        f"# {sidecar.label}, compute capability {sidecar.compute_capability or 'any'}: the server needs the same.",
        f"name: {_quoted(name)}",
        'platform: "tensorrt_plan"',
        'default_model_filename: "model.plan"',
        f"max_batch_size: {largest if batched else 0}",
        *blocks,
        f"instance_group [ {{ kind: KIND_GPU count: {instances} }} ]",
        "optimization { cuda { graphs: true } }",
    ]
    if batched and largest > 1:
        lines.append(f"dynamic_batching {{ preferred_batch_size: [ {usual} ] }}")
    lines.append(
        f"parameters {{ key: {_quoted('clearpact')} value {{ string_value: {_quoted(manifest.to_json())} }} }}"
    )
    return "\n".join(lines) + "\n"


def write_repository(
    plan: Path, repository: Path, name: str, *, outputs: tuple[str, ...] = OUTPUTS, instances: int = 1
) -> Path:
    """Write the model's folder, as a whole or not at all, and return it.

    Raises:
        FileError: the folder is there already, or cannot be written.
        ModelError: the plan has no sidecar, or is not the one that it describes.
    """
    sidecar = read_sidecar(plan)
    contents = read_bytes(plan)
    # Only whether it is whole: it may be served on another machine than this.
    sidecar.verify(
        contents,
        str(plan),
        builder=sidecar.builder,
        version=sidecar.builder_version,
        compute_capability=sidecar.compute_capability,
        platform=sidecar.platform,
    )
    folder = repository / name
    if folder.exists():
        raise FileError(f"{folder}: is there already; remove it first, or give another --name")
    with folder_at_once(folder) as temporary:
        write_atomically(temporary / "1" / "model.plan", contents)
        write_atomically(temporary / "classes.txt", "".join(f"{label}\n" for label in sidecar.manifest.classes))
        text = configuration(sidecar, name, outputs=outputs, instances=instances)
        write_atomically(temporary / "config.pbtxt", text)
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """Write a model repository."""
    parser = command.parser("deploy.triton", "Make a model repository for Triton from a plan.", EXAMPLES)
    parser.add_argument("plan", help="plan of python -m export.engine, with its sidecar")
    parser.add_argument("--repository", required=True, help="folder of the server's models")
    parser.add_argument("--name", help="of the model (default: the plan's)")
    parser.add_argument("--outputs",
                        help=f"of the plan (default: {','.join(OUTPUTS)}, and its maps of layers)")  # fmt: skip
    parser.add_argument("--instances", type=int, default=1, help="execution contexts on each GPU (default: 1)")
    options = parser.parse_args(argv)
    known = (*OUTPUTS, *(cam.output for cam in read_sidecar(Path(options.plan)).manifest.cams))
    outputs = known if options.outputs is None else tuple(part.strip() for part in options.outputs.split(","))
    if "logits" not in outputs or set(outputs) - set(known) or len(set(outputs)) < len(outputs):
        raise OptionError(f"--outputs {options.outputs}: expected logits, and any of {', '.join(known[1:])}")
    command.check_counts(options, instances=1)
    name = options.name or Path(options.plan).stem
    if not re.fullmatch(r"[\w.-]+", name):
        raise OptionError(f"--name {name!r}: expected letters, digits, '.', '_' and '-'")
    folder = write_repository(
        Path(options.plan), Path(options.repository), name, outputs=outputs, instances=options.instances
    )
    print(f"{folder}: serve it with tritonserver --model-repository={options.repository}")


def _tensor(kind: str, name: str, dtype: str, dims: Sequence[int], more: str = "") -> str:
    sizes = ", ".join(str(size) for size in dims)
    return f"{kind} [ {{\n  name: {_quoted(name)}\n  data_type: {dtype}\n  dims: [ {sizes} ]\n{more}\n}} ]"


def _quoted(text: str) -> str:
    """Return a text as protobuf's text format writes it, which for these characters is JSON's way too."""
    return json.dumps(text, ensure_ascii=False)


if __name__ == "__main__":
    command.run(main)
