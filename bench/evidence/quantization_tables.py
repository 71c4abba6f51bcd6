"""What docs/your-model.md shows of quantization after training: one function a table, from records to Markdown.

Of several records of the same thing the last one counts, so that measuring again replaces a figure.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.evidence.markdown import markdown
from bench.evidence.speed_tables import ENGINES
from bench.measure.record import Record

_MAKERS = {"clearpact": "**clearpact**"}


def after_training(records: Sequence[Record]) -> str:
    """Return what each maker's quantization takes and gives, network by network."""
    latest = {(found["network"], found["data"]): found for found in records if found["bench"] == "ptq"}
    rows = []
    for (network, data), found in latest.items():
        of = "test images" if found["truth"] == "labels" else "images: the float network's class"
        what = f"{_short(network)}, {found['n']:,} {of} of {data}"
        for row in found["rows"].values():
            beside = row.get("beside")
            quantized = row["maker"] != "float"
            rows.append([
                what, _MAKERS.get(row["maker"], row["maker"]), str(row["bits"]) if quantized else "32",
                ENGINES[row["engine"]], f"{row['quantizing_s']:.0f} + {row['file_s']:.0f}" if quantized else "",
                str(row["lines"]) if quantized else "", f"{row['accuracy']:.2f}",
                f"{beside['accuracy']:+.2f} ± {beside['standard_error']:.2f}" if beside else "",
                f"{row['latency']['p50_ms']:.3f}",
                f"{beside['times']:.3f}" if beside else "",
            ])  # fmt: skip
            what = ""
    header = ["network, images", "by", "bits", "engine", "seconds: quantized + file", "lines", "%",
              "beside the engine's own, %", "p50, ms", "times the engine's own"]  # fmt: skip
    return markdown(header, rows, "llrlrrrrrr")


def moved_classes(records: Sequence[Record]) -> str:
    """Return how many images an engine puts into another class, and how near their codes were to a tie."""
    latest = {
        (found["network"], found["data"], found["bits"], found["target"]): found
        for found in records if found["bench"] == "moved classes"
    }  # fmt: skip
    rows = [
        [
            f"{_short(network)}, {data}, {bits} bit", ENGINES[target], f"{len(found['moved'])} of {found['n']:,}",
            f"{found['on_engine']:,}",
            str(max((one["largest"] for one in found["moved"]), default=0)),
            f"{max((one['farthest_steps'] for one in found['moved']), default=0):.0e}",
            f"{found['moved_in_float32']}, {found['in_float32']:,}",
        ]
        for (network, data, bits, target), found in latest.items()
    ]  # fmt: skip
    header = ["network", "engine", "classes moved", "images with a code that differs", "largest difference, steps",
              "farthest from a tie, steps", "both in PyTorch's float32"]  # fmt: skip
    return markdown(header, rows, "llrrrrr")


def map_limits(records: Sequence[Record]) -> str:
    """Return how much the maps of each variant of a network agree with the float network's."""
    latest = {(found["network"], found["data"]): found for found in records if found["bench"] == "map limits"}
    variants = list(dict.fromkeys(name for found in latest.values() for name in found["spearman"]))
    known = [found["spearman"] for found in latest.values()]
    rows = [[name, *(f"{one[name]:.3f}" if name in one else "" for one in known)] for name in variants]
    networks = [f"{_short(network)}, {data}" for network, data in latest]
    return markdown(["Spearman with the float network's maps", *networks], rows, "l" + "r" * len(networks))


def _short(network: str) -> str:
    """Return a factory's or a file's name without the way there."""
    return network.rpartition("/")[2].rpartition(".")[2] if ":" in network else network.rpartition("/")[2]
