"""What a report is made of: training runs, exported files, and the records of measurements."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.measure.record import numbered
from bench.networks.network import CHECKPOINT_NAME, display_name
from bench.report.page import legible
from runtime.errors import FileError, OptionError
from runtime.files import read_bytes
from runtime.manifest import Manifest, read_manifest

if TYPE_CHECKING:
    from train.checkpoint import Checkpoint

EXPECTED = "expected a run folder, ckpt.pt, .onnx file, .jsonl file or a folder of them"
_EXPORTED_NAME = "ckpt.onnx"
# Where a record comes from that the report measured itself.
HERE = "measured for this report"


@dataclass(frozen=True)
class Record:
    """One result of a bench command.

    Args:
        source: file and line it comes from, for messages; how it came about otherwise.
        values: what the command recorded.
    """

    source: str
    values: dict[str, Any]

    @property
    def bench(self) -> str:
        """Name of the measurement."""
        return str(self.values["bench"])


@dataclass(frozen=True)
class Run:
    """A training run.

    Args:
        name: from `bench.networks.opened.display_name`.
        file: its checkpoint, for messages and commands.
        sha256: of that file, which the files exported from it name.
        checkpoint: its contents.
    """

    name: str
    file: Path
    sha256: str
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Model:
    """An exported file."""

    name: str
    file: Path
    contents: bytes
    manifest: Manifest


@dataclass(frozen=True)
class Sources:
    """All that was given, in the order in which it was given."""

    runs: tuple[Run, ...]
    models: tuple[Model, ...]
    records: tuple[Record, ...]

    def latest(self, *benches: str) -> list[Record]:
        """Return the records of some measurements; of those of the same thing only the last."""
        found = {}
        for record in self.records:
            if record.bench in benches:
                with reading(record) as values:
                    found[_what(values)] = record
        return list(found.values())


def read(paths: Sequence[str]) -> Sources:
    """Return what is in files and folders; the .onnx and .jsonl files of a run folder belong to the run.

    Raises:
        FileError: a file is missing, damaged, or of another kind.
        OptionError: a path is neither of the kinds that there are, or a run needs what is not installed.
    """
    runs: list[Run] = []
    models: list[Model] = []
    records: list[Record] = []
    for file in files_of(paths):
        if file.suffix == ".pt":
            runs.append(_read_run(file))
        elif file.suffix == ".onnx":
            contents = read_bytes(file)
            models.append(Model(display_name(file), file, contents, read_manifest(contents, str(file))))
        elif file.suffix == ".jsonl":
            records += _read_records(file)
        else:
            raise OptionError(f"{file}: {EXPECTED}")
    return Sources(tuple(runs), tuple(models), tuple(records))


def files_of(paths: Sequence[str]) -> list[Path]:
    """Return the files that `read` reads, each once."""
    files: dict[Path, None] = {}
    for path in map(Path, paths):
        files |= dict.fromkeys(_inside(path) if path.is_dir() else [path])
    return list(files)


@contextlib.contextmanager
def reading(record: Record) -> Iterator[dict[str, Any]]:
    """Give a record's values to a block of code that knows their form.

    Raises:
        FileError: they are of another one.
    """
    try:
        yield record.values
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise FileError(
            f"{record.source}: a {record.bench!r} record of another form, expected what its bench command writes; "
            "measure it again, or remove the line"
        ) from None


def _inside(folder: Path) -> list[Path]:
    run = folder / CHECKPOINT_NAME
    found = [file for file in (run, folder / _EXPORTED_NAME) if file.exists()]
    found += sorted(folder.glob("*.jsonl"))
    if not found:
        raise FileError(f"{folder}: holds neither {CHECKPOINT_NAME} nor .jsonl files; {EXPECTED}")
    return found


def _read_run(file: Path) -> Run:
    try:
        from train import checkpoint as checkpoints
    except ImportError as error:
        raise OptionError(f"{file}: a run needs {error.name}; pip install 'clearpact[train]'") from None
    checkpoint = checkpoints.load(file)
    return Run(display_name(file), file, hashlib.sha256(read_bytes(file)).hexdigest(), checkpoint)


def _read_records(file: Path) -> Iterator[Record]:
    for number, values in numbered(file):
        yield Record(f"{file}, line {number}", _legible(values))


def _legible(value: Any) -> Any:
    """Return a JSON value whose texts any file can hold and any font measure."""
    if isinstance(value, str):
        return legible(value)
    if isinstance(value, dict):
        return {legible(key): _legible(item) for key, item in value.items()}
    return [_legible(item) for item in value] if isinstance(value, list) else value


def _what(values: dict[str, Any]) -> str:
    """Return what a record measured; two records with the same are the same measurement, done twice."""
    names = ("bench", "arch", "bits", "input", "threads", "model", "precision", "target", "engine", "fill",
             "canvas", "device", "choice", "batch", "row")  # fmt: skip
    # A comparison that asked for accuracy too measured the same times.
    data = values.get("data") if "latency" not in values else None
    networks = values.get("networks")
    measured = [(n.get("model"), n.get("precision")) for n in networks] if isinstance(networks, list) else None
    batches = list(values["latency"]) if values["bench"] == "latency" else None
    return json.dumps([*(values.get(name) for name in names), data, measured, batches])
