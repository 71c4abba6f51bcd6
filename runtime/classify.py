"""`python -m runtime.classify`: classify image files with an exported model."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m runtime.classify")

import argparse
import functools
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime import command
from runtime.classifier import Classifier
from runtime.errors import FileError, ImageError, OptionError
from runtime.explanations.attribution import METHODS
from runtime.explanations.picture import CLOSE, COLORMAPS
from runtime.images import MAX_PIXELS, folders_in, list_images, load_image
from runtime.manifest import CAM_METHODS
from runtime.outputs import check_outputs
from runtime.prediction import Prediction
from runtime.session import ENGINES

EXAMPLES = """
  python -m runtime.classify model.onnx photo.png
  python -m runtime.classify model.onnx photos/ --top 5
  python -m runtime.classify model.onnx *.jpg --json > predictions.jsonl
  python -m runtime.classify model.onnx photo.png --explain heat.png
  python -m runtime.classify model.onnx photos/ --explain heats/ --explain-method smoothgrad
  python -m runtime.classify model.onnx photo.png --explain heat.png --explain-method layercam
  python -m runtime.classify model.onnx photos/ --explain heats/ --side-by-side
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line per image; an unreadable one gets an error line, the others are classified all the same."""
    parser = command.parser("runtime.classify", "Classify image files with an exported model.", EXAMPLES)
    parser.add_argument("model", help="ONNX file of python -m export.onnx, or plan of export.engine")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--top", type=int, default=3, help="classes to list (default: 3)")
    parser.add_argument("--engine", choices=tuple(ENGINES), help="default: the one the model was exported for")
    parser.add_argument("--device", help="default: cpu; cuda for a plan")
    parser.add_argument("--threads", type=int, help="CPU threads of one inference (default: the engine's choice)")
    parser.add_argument("--cache", metavar="FOLDER", help="keep compiled models there, to start faster next time")
    parser.add_argument("--key", metavar="PEM", help="public key that the model must be signed with")
    parser.add_argument("--version-compatible", action="store_true", help="run the code that such a plan carries")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS,
                        help=f"refuse an image of more (default: {MAX_PIXELS:,})")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object per image")
    parser.add_argument("--explain", metavar="PATH", type=Path, help="picture to write, or a folder of them")
    methods = (*METHODS, *CAM_METHODS)
    parser.add_argument(
        "--explain-method", "--method", dest="method", choices=methods, metavar="METHOD",
        help=f"of --explain: {', '.join(methods)} (default: gradient, or the file's map)",
    )  # fmt: skip
    parser.add_argument("--side-by-side", action="store_true",
                        help="of --explain: frame, map, overlay; of a close or wrong call two")  # fmt: skip
    parser.add_argument("--no-caption", action="store_true",
                        help="of --explain: leave class, probability and method out")  # fmt: skip
    parser.add_argument("--colormap", choices=tuple(COLORMAPS), default="inferno",
                        help="of --explain (default: inferno)")  # fmt: skip
    parser.add_argument("--layer", help="of a class activation map, where the file has several")
    options = parser.parse_args(argv)
    command.check_counts(options, top=1)
    paths = list_images(options.images)
    for folder in folders_in(options.images):
        name = command.printable(str(folder))
        print(
            f"note: {name}: a folder in a folder is not looked into; name it to have it classified",
            file=sys.stderr,
        )
    pictures = _pictures(options, paths)
    failed = 0
    with Classifier(
        options.model, engine=options.engine, device=options.device, threads=options.threads, cache=options.cache,
        key=options.key, version_compatible=options.version_compatible,
    ) as classifier:  # fmt: skip
        names = {path: command.printable(str(path)) for path in paths}
        width = max(map(len, names.values()))
        for path in paths:
            try:
                image = load_image(path, max_pixels=options.max_pixels)
                (prediction,) = classifier.predict([image], top_k=options.top)
                if options.explain:
                    _draw(classifier, image, prediction, pictures[path], path.parent.name, options)
            except (FileError, ImageError) as error:
                print(f"error: {command.printable(str(error))}", file=sys.stderr)
                failed += 1
                continue
            if options.json:
                print(json.dumps({"image": str(path), "label": prediction.label, "index": prediction.index,
                                  "probability": prediction.probability, "top": prediction.top}))  # fmt: skip
            else:
                top = "  ".join(f"{command.printable(label)} {p:6.1%}" for label, p in prediction.top)
                print(f"{names[path]:{width}}  {top}")
    return command.USER_ERROR if failed else 0


def _draw(
    classifier: Classifier,
    image: np.ndarray,
    prediction: Prediction,
    picture: Path,
    folder: str,
    options: argparse.Namespace,
) -> None:
    """Write the picture of one image; side by side, a close or wrong call has the second class's map, too.

    A call is wrong where the folder is named like another class.
    """
    explain = functools.partial(classifier.explain, image, method=options.method, layer=options.layer)
    best, *second = np.argsort(-prediction.logits, kind="stable")[:2]
    runner_up = None
    if options.side_by_side and second:
        gap = float(prediction.logits[best] - prediction.logits[second[0]])
        close = gap < -math.log(CLOSE)
        wrong = folder in classifier.manifest.classes and folder != prediction.label
        runner_up = explain(int(second[0])) if close or wrong else None
    explain().save(picture, caption=not options.no_caption, side_by_side=options.side_by_side,
                   runner_up=runner_up, colormap=options.colormap)  # fmt: skip


def _pictures(options: argparse.Namespace, paths: list[Path]) -> dict[Path, Path]:
    """Return the picture to write for each image, having checked that it can be written and replaces nothing."""
    where: Path | None = options.explain
    if where is None:
        return {}
    if len(paths) == 1 and not where.is_dir():
        pictures = {paths[0]: where}
    elif where.suffix and not where.is_dir():
        raise OptionError(f"--explain {where}: one file for {len(paths)} images, expected a folder")
    else:
        # 1.jpg and 1.png of one folder get pictures of their own.
        stems = Counter(path.stem.casefold() for path in dict.fromkeys(paths))
        names = {path: path.name if stems[path.stem.casefold()] > 1 else path.stem for path in paths}
        pictures = {path: where / f"{name}.png" for path, name in names.items()}
    check_outputs(pictures.values(), inputs=[options.model, *paths])
    for folder in map(Path, options.images):
        if folder.is_dir() and any(picture.resolve().parent == folder.resolve() for picture in pictures.values()):
            raise OptionError(f"--explain {where}: lies among the images of {folder}; name another folder")
    return pictures


if __name__ == "__main__":
    command.run(main)
