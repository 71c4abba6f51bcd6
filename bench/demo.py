"""`make demo`: the whole way on handwritten digits, from training to the device, in about a minute.

Trains the two-layer network twice, in float and with 8-bit PACT and saliency guidance, exports both, classifies
the test images through `runtime.Classifier`, and shows why each network decides so, side by side.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.demo")

import functools
import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bench.accuracy import confusion_matrix, score
from bench.measure import data
from bench.measure.statistics import measure, summarize, told
from export.onnx import main as export_main
from runtime import command
from runtime.classifier import Classifier
from runtime.files import write_atomically
from runtime.manifest import INPUT_NAME
from runtime.prediction import softmax
from train.__main__ import main as train_main

_SHOWN = 12  # images in the picture


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo into a folder."""
    parser = command.parser(
        "bench.demo", "Train, export, classify and measure on digits.", "  python -m bench.demo"
    )
    parser.add_argument("-o", "--output", default="demo", help="folder for models and pictures (default: demo)")
    parser.add_argument("--epochs", type=int, default=30, help="of each training (default: 30)")
    options = parser.parse_args(argv)
    folder = Path(options.output)

    models = {}
    for name, method, bits, precision in (("float", "plain", "32", "--fp32"), ("int8", "sgt", "8", "--int8")):
        print(f"\n== {name}: train and export")
        train_main(["--data", "digits", "--arch", "cnn2", "--method", method, "--bits", bits, "--name", name,
                    "--epochs", str(options.epochs), "--runs", str(folder), "--overwrite"])  # fmt: skip
        models[name] = folder / f"digits_{name}.onnx"
        export_main([str(folder / name / "ckpt.pt"), precision, "-o", str(models[name])])

    print("\n== classify the test images with runtime.Classifier, one thread")
    test = data.load("digits")
    classifiers = {name: Classifier(path, threads=1) for name, path in models.items()}
    frame = test.images[:1]
    samples = measure(
        {n: functools.partial(c.session.run, {INPUT_NAME: frame}) for n, c in classifiers.items()}, seconds=2.0
    )
    print(f"{'':10}{'accuracy %':>12}{'p50 ms':>10}{'p90 ms':>10}{'file bytes':>12}")
    predicted = {}
    for name, classifier in classifiers.items():
        predicted[name] = classifier.predict(list(test.images))
        classes = np.array([p.index for p in predicted[name]])
        scores = score(confusion_matrix(test.labels, classes, len(classifier.manifest.classes)))
        row = summarize(samples[name])
        print(f"{name:10}{scores.accuracy:12.2f}{row.p50_ms:10.4f}{told(row.p90_ms, 4):>10}"
              f"{models[name].stat().st_size:12,}")  # fmt: skip
    differing = sum(a.index != b.index for a, b in zip(predicted["float"], predicted["int8"], strict=True))
    print(f"{differing} of {len(test.labels)} test images classified differently by the two networks")

    draw_samples(test, classifiers, folder / "samples.png")
    for classifier in classifiers.values():
        classifier.close()
    for picture in ("alpha.png", "curves.png"):
        shutil.copyfile(folder / "int8" / picture, folder / picture)
    print(f"\npictures: {', '.join(str(folder / p) for p in ('samples.png', 'alpha.png', 'curves.png'))}")
    print(f"next:     python -m runtime.classify {models['int8']} PHOTO.png")


def draw_samples(test: data.LabelledImages, classifiers: Mapping[str, Classifier], path: Path) -> Figure:
    """Draw test images, and over them why each network decides so, into a PNG file; wrong ones first.

    Each image has its map by every network, for the class that the network predicts, and one more by the last
    network: for the true class where it is wrong, else for the runner-up.

    Args:
        test: images and labels.
        classifiers: by name; the last one chooses the images.
        path: of the picture.
    """
    *_, last = classifiers.values()
    predictions = last.predict(list(test.images))
    wrong = [i for i, p in enumerate(predictions) if p.index != test.labels[i]]
    # The first of each class, then the second of each, so that all classes are shown.
    right = sorted(
        set(range(len(predictions))) - set(wrong), key=lambda i: np.sum(test.labels[:i] == test.labels[i])
    )
    chosen = np.array([*wrong[: _SHOWN // 3], *right][:_SHOWN])
    images, names = test.images[chosen], last.manifest.classes
    others = [
        test.labels[i] if i in set(wrong) else names.index(predictions[i].top[1][0]) for i in chosen.tolist()
    ]
    explained = [(f"{name}: why", classifier.explain(images)) for name, classifier in classifiers.items()]
    explained.append((f"{[*classifiers][-1]}: why not", last.explain(images, target=others)))
    columns = 1 + len(explained)
    figure = Figure(figsize=(2 * columns * 1.25, _SHOWN / 2 * 1.55), layout="constrained")
    grid = figure.subplots(_SHOWN // 2, 2 * columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for place, index in enumerate(chosen.tolist()):
        cells = grid[place // 2, columns * (place % 2) : columns * (place % 2 + 1)]
        color = "crimson" if index in set(wrong) else "black"
        cells[0].imshow(images[place, :, :, 0], cmap="gray")
        cells[0].set_title(f"it is {names[test.labels[index]]}", fontsize=9, color=color)
        for axes, (title, found) in zip(cells[1:], explained, strict=True):
            axes.imshow(found.overlay()[place])
            share = softmax(found.logits[place : place + 1])[0, found.target[place]]
            axes.set_title(f"{title} {names[found.target[place]]}\n{share:.1%}", fontsize=8, color=color)
    figure.suptitle(
        f"Why the networks decide so: {len(wrong)} of {len(predictions)} test images wrong by the last one (red)"
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_atomically(path, picture.getvalue())
    return figure


if __name__ == "__main__":
    command.run(main)
