"""`python -m export.gradient`: append the input gradient to a file that was not made here."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m export.gradient")

from collections.abc import Sequence
from pathlib import Path

from export.choices import GATES
from export.gradient.walk import append_input_gradient
from export.image_size import fix_size, size_of
from export.model_file import read_model
from export.passes.hold_signed_codes import hold_signed_codes
from runtime import command
from runtime.errors import ModelError
from runtime.files import write_atomically
from runtime.outputs import check_outputs


def main(argv: Sequence[str] | None = None) -> None:
    """Read an ONNX classifier, append its input gradient, write the result."""
    arguments = command.parser(
        "export.gradient",
        "Append the input gradient to an ONNX classifier: one run then returns the class and the map that "
        "explains it.",
        """
  python -m export.gradient model.onnx                             # -> model_saliency.onnx
  python -m export.gradient model.onnx -o explained.onnx --raw     # the gradient [N, C, H, W], not its map
  python -m export.gradient model.onnx --input pixels --logits fc  # where the model leaves a choice
  python -m export.gradient model.onnx --size 224                  # where it leaves the image's size open
""",
    )
    arguments.add_argument("model", help="an ONNX classifier, ours or not")
    arguments.add_argument("-o", "--output", help="the file to write (default: MODEL_saliency.onnx)")
    arguments.add_argument(
        "--input", help="the float tensor to differentiate by (default: 'normalized', or the only input)"
    )
    arguments.add_argument("--logits", help="the [N, K] tensor to differentiate (default: the only such output)")
    arguments.add_argument("--size", metavar="PIXELS", help="of an image whose size the file leaves open, or HxW")
    arguments.add_argument("--raw", action="store_true", help="the output `gradient`, not its map")
    arguments.add_argument(
        "--gate",
        choices=GATES,
        default="code",
        help="where quantized activations pass the gradient (default: %(default)s)",
    )
    options = arguments.parse_args(argv)
    path = Path(options.model)
    output = Path(options.output or path.with_name(f"{path.stem}_saliency.onnx"))
    check_outputs([output], inputs=[path])
    model, beside = read_model(path)
    check_outputs([output], inputs=beside)
    if options.size:
        fix_size(model, size_of(options.size))
    try:
        explained = append_input_gradient(
            model,
            input=options.input,
            logits=options.logits,
            outputs=("gradient",) if options.raw else ("saliency",),
            gate=options.gate,
        )
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    hold_signed_codes(explained)
    write_atomically(output, explained.SerializeToString())
    added = len(explained.graph.node) - len(model.graph.node)
    print(f"{output}: {len(model.graph.node)} nodes, and {added} of the gradient")


if __name__ == "__main__":
    command.run(main)
