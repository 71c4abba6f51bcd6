"""A TensorRT plan from an ONNX graph, over whichever of NVIDIA's bindings are at hand.

`tensorrt` 10 and 11 build for the GPU they run on. `tensorrt_rtx` builds ahead of time, without a GPU; its plans
are finished on the device, by TensorRT-RTX. All networks are strongly typed: the graph's types are the plan's.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections import Counter
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from runtime.engines.tensorrt.plan import BUILDERS
from runtime.errors import EngineError, ModelError, OptionError

_MODULES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_INSTALL = {"tensorrt": "clearpact[tensorrt]", "tensorrt_rtx": "clearpact[tensorrt-aot]"}
_HARDWARE = {"same-compute-capability": "SAME_COMPUTE_CAPABILITY", "ampere-plus": "AMPERE_PLUS"}
# What a builder without a GPU says of itself, beside the error that is meant.
_NOISE = re.compile(r"\[?checkMacros\.cpp|cudaError 35")


@dataclass(frozen=True)
class BuildOptions:
    """What a plan is to be.

    Args:
        batch: smallest, most frequent and largest batch.
        workspace_bytes: most memory one kernel may use while it runs; None leaves it to the builder.
        level: effort of the builder, 0 to 5; more takes longer and may give a faster plan.
        version_compatible: later releases can run it, too; a little slower.
        hardware: GPUs it runs on, one of runtime.engines.tensorrt.plan.HARDWARE.
        dla_core: core of a Jetson's deep learning accelerator; what it cannot compute goes to the GPU.
    """

    batch: tuple[int, int, int] = (1, 1, 1)
    workspace_bytes: int | None = None
    level: int = 3
    version_compatible: bool = False
    hardware: str = "same"
    dla_core: int | None = None


@dataclass(frozen=True)
class BuildResult:
    """A plan and what the builder told of it.

    Args:
        plan: its contents.
        timing_cache: measurements of kernels that make the next build faster; empty where there are none.
        warnings: of parser and builder, each once, one line each.
        products: layer of the ONNX graph to the types its product's inputs have in the plan, such as ("Int8",);
            None where the builder does not tell.
    """

    plan: bytes
    timing_cache: bytes
    warnings: tuple[str, ...]
    products: dict[str, tuple[str, ...]] | None


def load_bindings(builder: str) -> tuple[ModuleType, str]:
    """Return NVIDIA's bindings and which of runtime.engines.tensorrt.plan.BUILDERS they are.

    Args:
        builder: one of BUILDERS, or "auto": the first that is installed.

    Raises:
        EngineError: they are not installed, or do not load.
    """
    reasons = []
    for name in BUILDERS if builder == "auto" else (builder,):
        for module in _MODULES[name]:
            try:
                return importlib.import_module(module), name
            except ImportError as error:
                reasons.append(str(error).split("\n")[0])
    wanted = " or ".join(
        f"pip install '{_INSTALL[name]}'" for name in (BUILDERS if builder == "auto" else (builder,))
    )
    hint = " (without a GPU: the second)" if builder == "auto" else ""
    raise EngineError(f"TensorRT cannot be imported ({reasons[0]}); {wanted}{hint}")


def parse(trt: Any, model: bytes, source: str) -> tuple[str, ...]:
    """Have NVIDIA's parser read a graph, and return its warnings.

    Raises:
        ModelError: it refuses the graph; the text names the node.
        EngineError: the builder does not start, as where TensorRT finds no GPU.
    """
    _, _, log = _parsed(trt, model, source)
    return log.warnings()


def hardware_level(trt: Any, hardware: str) -> Any:
    """Return TensorRT's level for an option of HARDWARE.

    Raises:
        OptionError: this release has no such plans, as 10.3 of JetPack 6 for one compute capability.
    """
    level = getattr(trt.HardwareCompatibilityLevel, _HARDWARE[hardware], None)
    if level is None:
        raise OptionError(
            f"--hardware {hardware}: TensorRT {trt.__version__} has no such plans (10.16 has); leave it out"
        )
    return level


def build(
    trt: Any, builder_name: str, model: bytes, source: str, options: BuildOptions, timing_cache: bytes = b""
) -> BuildResult:
    """Build a plan.

    Args:
        trt: NVIDIA's bindings.
        builder_name: which they are, one of runtime.engines.tensorrt.plan.BUILDERS.
        model: ONNX graph that the passes of export/engine/__main__.py made ready.
        source: its name, for messages.
        options: what the plan is to be.
        timing_cache: of an earlier build, or empty.

    Raises:
        OptionError: the builder cannot do what an option asks for.
        ModelError: the parser refuses the graph.
        EngineError: the builder fails; the text is its own.
    """
    check_options(builder_name, options)
    builder, network, log = _parsed(trt, model, source)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = options.level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware in _HARDWARE:
        config.hardware_compatibility_level = hardware_level(trt, options.hardware)
    if options.dla_core is not None:
        # Asked here, since the builder itself falls back to the GPU in silence.
        if options.dla_core >= builder.num_DLA_cores:
            raise EngineError(
                f"DLA core {options.dla_core}: this machine has {builder.num_DLA_cores}; drop --dla-core"
            )
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = options.dla_core
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    config.add_optimization_profile(_profile(builder, network, options.batch, source))
    caches = builder_name == "tensorrt"  # on TensorRT-RTX they do nothing
    if caches:
        _set_timing_cache(config, timing_cache, log)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{source}: the builder failed: {log.reason()}")
    cache = config.get_timing_cache() if caches else None
    return BuildResult(
        plan=bytes(plan),
        timing_cache=bytes(cache.serialize()) if cache is not None else b"",
        warnings=log.warnings(),
        products=reported_products(log.texts),
    )


def reported_products(texts: list[str]) -> dict[str, tuple[str, ...]] | None:
    """Return the types of the inputs of every matrix product, from the builder's list of the plan's layers.

    TensorRT-RTX gives it at verbose severity, one kernel a line. A product is a kernel of the type correlation (a
    convolution) or gemm, or one fused at run time; its name, and the metadata, are those of ONNX nodes.
    """
    text = next((text for text in texts if text.startswith("Layers:")), None)
    if text is None:
        return None
    products = {}
    for line in text.split("\n"):
        kernel = re.match(
            r"Name: (?P<name>[^,]*), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], Cons", line
        )
        if kernel is None or kernel["type"] not in ("correlation", "gemm", "runtime_fusion"):
            continue
        types = tuple(re.findall(r"Datatype: (\w+)", kernel["inputs"]))
        # A fused kernel may hold a layer and what follows it; a plain one tells in its name whose product it is.
        names = re.findall(r"\[ONNX Layer: ([^\]]*)\]", line)
        own = [name for name in names if re.match(rf"{re.escape(name)}(_U\d+)?_myl", kernel["name"])]
        products.update(dict.fromkeys(own or names, types))
    return products


def _parsed(trt: Any, model: bytes, source: str) -> tuple[Any, Any, _Log]:
    log = _Log()
    logger = _logger(trt)
    logger.log_to = log
    try:
        builder = trt.Builder(logger)
    except TypeError:  # what the bindings make of a builder that does not start
        raise EngineError(
            f"TensorRT's builder does not start ({log.reason()}); check that nvidia-smi shows the GPU, or build "
            "ahead of time with --builder tensorrt_rtx"
        ) from None
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        error = parser.get_error(0)
        node = error.node_name() or error.node_operator() or "the graph"
        raise ModelError(f"{source}: TensorRT's parser refuses {node!r}: {_one_line(error.desc())}")
    return builder, network, log


def check_options(builder_name: str, options: BuildOptions) -> None:
    """Raise OptionError where a builder cannot do what an option asks for."""
    if not 0 <= options.level <= 5:
        raise OptionError(f"optimization level {options.level}: expected 0 to 5")
    if builder_name == "tensorrt_rtx":
        asked = {
            "--version-compatible": options.version_compatible,
            "--hardware": options.hardware != "same",
            "--dla-core": options.dla_core is not None,
        }
        for option in (name for name, value in asked.items() if value):
            raise OptionError(f"{option}: TensorRT-RTX has no such plans; drop it, or use --builder tensorrt")


def _profile(builder: Any, network: Any, batch: tuple[int, int, int], source: str) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        first, *rest = tensor.shape
        if -1 in rest:
            raise ModelError(
                f"{source}: input {tensor.name!r} has open sizes {list(tensor.shape)}, expected the batch alone"
            )
        if first == -1:
            profile.set_shape(tensor.name, *([size, *rest] for size in batch))
        elif set(batch) != {first}:
            raise OptionError(
                f"batch {batch}: {source} has the fixed batch {first}; ask for that, or export it again"
            )
    return profile


def _set_timing_cache(config: Any, data: bytes, log: _Log) -> None:
    for contents in (data, b""):
        cache = config.create_timing_cache(contents)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return
        log.add(True, "the timing cache is of another version or GPU and was not used")


class _Log:
    """What one build says: all texts, and which of them are warnings or errors."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._warnings: Counter[str] = Counter()
        self._errors: list[str] = []

    def add(self, warning: bool, text: str, *, error: bool = False) -> None:
        self.texts.append(text)
        if error:
            self._errors.append(text)
        elif warning:
            self._warnings[_one_line(text)] += 1

    def warnings(self) -> tuple[str, ...]:
        return tuple(text if n == 1 else f"{text} ({n} times)" for text, n in self._warnings.items())

    def reason(self) -> str:
        meant = [text for text in self._errors if not _NOISE.search(text)] or self._errors
        return _one_line(meant[0]) if meant else "no reason given"


@functools.cache
def _logger(trt: Any) -> Any:
    """Return the process's one logger: the libraries keep the first they are given, whatever follows."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.log_to = _Log()

        def log(self, severity: Any, message: str) -> None:
            kinds = trt.ILogger.Severity
            error = severity in (kinds.ERROR, kinds.INTERNAL_ERROR)
            self.log_to.add(severity == kinds.WARNING, message, error=error)

    return Logger()


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not _NOISE.search(line)]
    return " ".join(" ".join(lines).split())[:400]
