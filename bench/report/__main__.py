"""`python -m bench.report`: one HTML file with what was trained, exported and measured."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.report")

import argparse
import datetime
from collections.abc import Sequence
from dataclasses import replace

from bench.measure.data import LabelledImages, collected
from bench.measure.environment import environment
from bench.measure.streams import ImageStream
from bench.networks.opened import stream_for
from bench.report.confusion import confusion_section
from bench.report.curves import curves_section
from bench.report.glance import glance_section
from bench.report.layers import layers_section, look_into
from bench.report.maps import explain, maps_section
from bench.report.measurements import measurements
from bench.report.page import document
from bench.report.provenance import commands_section, environment_section
from bench.report.sources import Sources, files_of, read
from bench.report.speed import front_section, latency_section
from bench.report.subjects import Subject, open_subjects, own_samples
from bench.report.training import training_section
from runtime import command
from runtime.files import write_atomically
from runtime.outputs import check_outputs
from train.data.splits import sources_of

EXAMPLES = """
  python -m bench.report runs/mnist-cnn2-8bit-sgt -o report.html
  python -m bench.report runs/mnist-cnn2-8bit-sgt results.jsonl --data mnist -o report.html
  python -m bench.report ckpt.onnx --data mnist_test.npz -o report.html    # without torch
  python -m bench.report bench/results -o report.html                      # records alone
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report and say where it is."""
    options = _parser().parse_args(argv)
    command.check_counts(options, samples=1, images=1)
    check_outputs(
        [options.output], inputs=[*files_of(options.sources), *sources_of(options.data, options.data_root)]
    )
    here = environment()
    sources = read(options.sources)
    subjects = open_subjects(sources, engine=options.engine)
    samples: list[LabelledImages | None] = []
    for subject in subjects:
        test = _images(subject, options)
        if test is None:
            samples.append(own_samples(subject.run) if subject.run is not None else None)
            continue
        some = collected(test.evenly_spaced(min(options.samples, len(test.positions))))
        samples.append(some)
        sources = replace(sources, records=(*sources.records, *measurements(subject, test, some, here)))
    write_atomically(options.output, _page(sources, subjects, samples, here, options))
    print(options.output)


def _images(subject: Subject, options: argparse.Namespace) -> ImageStream | None:
    if options.data is None or not subject.networks:
        return None
    return stream_for(subject.networks, options.data, options.data_root)


def _page(
    sources: Sources,
    subjects: Sequence[Subject],
    samples: Sequence[LabelledImages | None],
    here: dict[str, str | int | float],
    options: argparse.Namespace,
) -> str:
    pairs = list(zip(subjects, samples, strict=True))
    explained = [explain(subject, images, options.images) for subject, images in pairs if images is not None]
    layers = [look_into(subject, images, engine=options.engine) for subject, images in pairs]
    names = ", ".join(dict.fromkeys(subject.name for subject in subjects[:3])) or "Recorded measurements"
    names += f" and {len(subjects) - 3} more" if len(subjects) > 3 else ""
    lead = f"{datetime.date.today():%d %B %Y}, clearpact {here['commit']}"
    return document(options.title or names, lead, [
        glance_section(sources, subjects, explained),
        front_section(sources), latency_section(sources), training_section(sources), curves_section(sources),
        maps_section(explained), confusion_section(sources), layers_section(layers, sources),
        environment_section(sources, here), commands_section(sources, here),
    ])  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("bench.report", "Write one HTML file with all that is known of runs.", EXAMPLES)
    parser.add_argument("sources", nargs="+", metavar="source",
                        help="run folder, ckpt.pt, .onnx or .jsonl file, or folder of .jsonl files")  # fmt: skip
    parser.add_argument("-o", "--output", required=True, help="HTML file to write")
    parser.add_argument("--title", help="of the page (default: the names of runs and files)")
    parser.add_argument("--engine", choices=("openvino", "ort"), help="of .onnx files (default: as exported)")
    images = parser.add_argument_group("images, for accuracy, confusion matrix and masked-accuracy curves")
    images.add_argument("--data", help="digits, mnist, fashion-mnist, cifar10 or an .npz file")
    images.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    images.add_argument("--samples", type=int, default=256,
                        help="how many for curves, maps and layers, evenly spaced (default: 256)")  # fmt: skip
    images.add_argument("--images", type=int, default=8, help="how many maps to show (default: 8)")
    return parser


if __name__ == "__main__":
    command.run(main)
