"""Networks to measure explanations of, whatever runs them: an exported file on its engine, a checkpoint in torch.

Torch is imported only for checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.measure import data
from bench.measure.streams import ImageStream
from bench.networks.network import Network, display_name, find
from runtime.classifier import Classifier
from runtime.errors import ModelError, OptionError
from runtime.manifest import INPUT_NAME, TARGET_NAME
from train.data.names import is_folder


def open_networks(
    path: str,
    *,
    engine: str | None = None,
    threads: int | None = None,
    parallel_runs: int = 1,
    with_float: bool = False,
    classes_only: bool = False,
) -> list[Network]:
    """Return the network in a file and, if asked for, the float network that was quantized to it.

    Args:
        path: ONNX file, plan, checkpoint (.pt), or run folder with a checkpoint in it.
        engine: of ONNX files; None takes the one the file was exported for.
        threads: CPU threads of one inference; None leaves the number to the engine.
        parallel_runs: how many threads will call at the same time.
        with_float: of a quantized checkpoint, add its network with the quantizers off: float weights, and PACT
            only clips.
        classes_only: also take a file without maps.

    Raises:
        ClearpactError: the file is missing or of another kind, gives classes only, or needs what is not installed.
    """
    file = find(path)
    name = display_name(file)
    if file.suffix != ".pt":
        return [
            exported_network(
                file, name, engine=engine, threads=threads, parallel_runs=parallel_runs, classes_only=classes_only
            )
        ]
    try:
        from bench.networks.checkpoint import checkpoint_networks
    except ImportError as error:
        raise OptionError(
            f"{file}: a checkpoint needs {error.name}; pip install 'clearpact[train]', or name an exported file"
        ) from None
    return checkpoint_networks(file, name, threads=threads, with_float=with_float)


def stream_for(networks: Sequence[Network], name: str, root: str) -> ImageStream:
    """Return the test split that the networks can be compared on.

    Args:
        networks: one at least.
        name: data set or .npz file, see `bench.measure.data.stream`.
        root: folder of the data set's files.

    Raises:
        OptionError: the networks were trained on another data set, or on different ones, or take other images.
        FileError: the file is missing or of another kind, or the data set is not there.
    """
    first = networks[0]
    for network in networks:
        if network.data != first.data:
            raise OptionError(
                f"{network.name}: trained on {network.data}, but {first.name} on {first.data}; "
                "compare networks of one data set"
            )
        if network.classes != first.classes:
            raise OptionError(
                f"{network.name}: classes {', '.join(network.classes[:3])} ..., expected those of {first.name} in "
                f"their order, {', '.join(first.classes[:3])} ...; compare networks of the same classes"
            )
    test = data.stream(name, root, size=first.shape[:2], classes=first.classes, trained_on=first.data)
    if not name.endswith((".npz", ".json")) and not is_folder(name) and name != first.data:
        raise OptionError(f"--data {name}: {first.name} was trained on {first.data}; use --data {first.data}")
    for network in networks:
        shape, highest = test.shape, test.labels.max()
        if shape != network.shape or highest >= len(network.classes):
            raise OptionError(
                f"--data {name}: images {list(shape)} with labels up to {highest}, expected {list(network.shape)} "
                f"and below {len(network.classes)} for {network.name}; name the data it was trained on"
            )
    return test


def exported_network(
    source: Path | bytes,
    name: str,
    *,
    engine: str | None = None,
    threads: int | None = None,
    parallel_runs: int = 1,
    classes_only: bool = False,
) -> Network:
    """Return the network in an ONNX file or a plan.

    Args:
        source: the file, or its contents.
        name: of the network, also in messages.
        engine: None takes the one it was exported for.
        threads: CPU threads of one inference; None leaves the number to the engine.
        parallel_runs: see `open_networks`.
        classes_only: likewise.

    Raises:
        ClearpactError: the file is missing or of another kind, gives classes only, or needs what is not installed.
    """
    session = Classifier(source, engine=engine, threads=threads, parallel_runs=parallel_runs).session
    manifest = session.manifest
    explains = "saliency" in session.outputs
    file = source if isinstance(source, Path) else name
    without_maps = ModelError(f"{file}: gives classes only; export it again without --no-saliency")
    if not explains and not classes_only:
        session.close()
        raise without_maps

    def run(inputs: dict[str, np.ndarray], outputs: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Return the outputs; a plan takes as many images at a time as it was built for."""
        n = len(inputs[INPUT_NAME])
        size = session.max_batch or n
        parts = [
            session.run({key: np.ascontiguousarray(value[i : i + size]) for key, value in inputs.items()}, outputs)
            for i in range(0, n, size)
        ]
        return {key: np.concatenate([part[key] for part in parts]) for key in outputs}

    def logits(images: np.ndarray) -> np.ndarray:
        return run({INPUT_NAME: images}, ("logits",))["logits"]

    def explain(images: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not explains:
            raise without_maps
        found = run({INPUT_NAME: images, TARGET_NAME: target}, ("logits", "saliency"))
        return found["logits"], found["saliency"]

    return Network(
        name=name,
        precision=manifest.precision,
        engine=f"{session.engine} {session.version}",
        data=manifest.data,
        shape=(*manifest.input.size, manifest.input.channels),
        classes=manifest.classes,
        logits=logits,
        explain=explain,
        explains=explains,
        close=session.close,
    )
