"""`python -m deploy.web`: a page that runs an exported model in a browser, from any web server."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m deploy.web")

from collections.abc import Sequence
from pathlib import Path

from deploy.web.page import pinned_version, write_page
from runtime import command
from runtime.errors import OptionError
from runtime.images import list_images

EXAMPLES = """
  python -m export.onnx deploy/models/mnist-cnn2-8bit-sgt.pt --target ort -o digits.onnx
  make web-runtime                                             # once: npm fetches ONNX Runtime Web
  python -m deploy.web digits.onnx -o page
  python -m http.server --directory page                       # then open http://localhost:8000
  python -m deploy.web model.onnx -o page --examples photos/cat/1.jpg photos/dog/7.png
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page's folder and say how to open it."""
    parser = command.parser(
        "deploy.web",
        "Write a page that runs a model in a browser: nothing is uploaded, and it works offline.",
        EXAMPLES,
    )
    parser.add_argument("model", type=Path, help="ONNX file of python -m export.onnx, best with --target ort")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder to write; a former page is replaced"
    )
    parser.add_argument(
        "--examples", nargs="+", metavar="IMAGE", default=[], help="pictures, or folders, to offer"
    )
    parser.add_argument("--runtime", metavar="FOLDER", type=Path, help="node_modules with onnxruntime-web "
                        f"{pinned_version()} (default: beside this command)")  # fmt: skip
    parser.add_argument("--no-webgpu", action="store_true", help="leave WebGPU's runtime out (27 MB)")
    options = parser.parse_args(argv)
    examples = list_images(options.examples)
    for path in (options.model, *examples):
        if options.output.resolve() in path.resolve().parents:
            raise OptionError(f"--output {options.output}: holds {path}, which is read; name another folder")
    written = write_page(
        options.model, options.output, runtime=options.runtime, examples=examples, webgpu=not options.no_webgpu
    )
    if written.target != "ort":
        print(f"note: exported for {written.target}; browsers run files of `export.onnx --target ort` faster")
    every, first = written.all_bytes / 1e6, written.first_bytes / 1e6
    print(f"{written.folder}: {every:.1f} MB, of which a browser loads {first:.1f}")
    print(f"serve it with any web server: python -m http.server --directory {written.folder}")


if __name__ == "__main__":
    command.run(main)
