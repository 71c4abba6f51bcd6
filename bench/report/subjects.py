"""What the report looks into: a run with its float network, its quantized one, and the file exported from it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from bench.measure.data import LabelledImages
from bench.networks.network import Network
from bench.networks.opened import exported_network, open_networks
from bench.report.sources import Model, Run, Sources
from runtime import command
from runtime.errors import OptionError
from runtime.manifest import read_manifest
from runtime.onnx_bytes import output_names
from train.choices import FLOAT_BITS

_ENGINES = {"openvino": "OpenVINO", "ort": "ONNX Runtime", "tensorrt": "TensorRT"}


@dataclass(frozen=True)
class Subject:
    """A run, an exported file, or both where the one was made from the other.

    Args:
        name: of the run, or of the file.
        run: None where only the file was given.
        model: the file; of a run whose file was not given, exported for the report; None where no engine is there.
        networks: those that explain themselves: float, fake-quantized, exported, as far as they exist.
        remark: what a reader must know about them.
    """

    name: str
    run: Run | None
    model: Model | None
    networks: tuple[Network, ...]
    remark: str = ""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        if self.run is not None:
            return self.run.checkpoint.classes
        assert self.model is not None
        return self.model.manifest.classes


def open_subjects(sources: Sources, *, engine: str | None) -> list[Subject]:
    """Return a subject for every run and for every file that comes from none of them.

    Args:
        sources: from `bench.report.sources.read`.
        engine: of the exported files; None takes the one that each was exported for.

    Raises:
        ClearpactError: a run cannot be exported, or its engine or what reads it is not installed.
    """
    found, used = [], set()
    for run in sources.runs:
        made_from = [model for model in sources.models if model.manifest.checkpoint == run.sha256]
        used |= {id(model) for model in made_from}
        found += [_of_run(run, model, engine) for model in made_from] or [_of_run(run, None, engine)]
    others = [model for model in sources.models if id(model) not in used]
    remark = "Its checkpoint is none of the runs here." if sources.runs else ""
    found += [Subject(model.name, None, model, _explaining(model, engine), remark) for model in others]
    return found


def role(network: Network) -> str:
    """Return what a network is to its run, such as "INT8 on OpenVINO"."""
    engine = network.engine.split()[0]
    if engine == "torch":
        return "float" if network.precision == "float" else f"fake-quantized, {network.precision}"
    return f"{network.precision.upper()} on {_ENGINES.get(engine, engine)}"


def own_samples(run: Run) -> LabelledImages:
    """Return the test images that a checkpoint holds."""
    samples = run.checkpoint.samples
    images = samples["images"].permute(0, 2, 3, 1).contiguous().numpy()
    return LabelledImages(f"{run.checkpoint.recipe.data} (in the checkpoint)", images, samples["labels"].numpy())


def _of_run(run: Run, model: Model | None, engine: str | None) -> Subject:
    trained = open_networks(str(run.file), with_float=True)
    trained.sort(key=lambda network: network.precision != "float")
    remark = ""
    if model is None:
        target = engine or _installed_engine()
        if target is None:
            return Subject(run.name, run, None, tuple(trained), "No inference engine is installed; pip install "
                           "'clearpact[openvino]' for what the exported file does.")  # fmt: skip
        model, remark = _exported_here(run, target), f"Exported for this report, for {_ENGINES[target]}."
    return Subject(run.name, run, model, (*trained, *_explaining(model, engine)), remark)


def _explaining(model: Model, engine: str | None) -> tuple[Network, ...]:
    if "saliency" not in output_names(model.contents):
        return ()
    return (exported_network(model.contents, model.name, engine=engine),)


def _installed_engine() -> str | None:
    modules = {"openvino": "openvino", "ort": "onnxruntime"}
    return next((engine for engine, module in modules.items() if importlib.util.find_spec(module)), None)


def _exported_here(run: Run, target: str) -> Model:
    try:
        from export.pipeline import export
    except ImportError as error:
        raise OptionError(
            f"{run.file}: its export needs {error.name}; pip install 'clearpact[export]', or name its .onnx file"
        ) from None
    command.status(f"exporting {run.name} ...")
    int8 = run.checkpoint.quant.bits != FLOAT_BITS
    exported = export(run.checkpoint, int8=int8, target=target, checkpoint_sha256=run.sha256)
    command.status("")
    contents = exported.model.SerializeToString()
    return Model(run.name, run.file, contents, read_manifest(contents, str(run.file)))
