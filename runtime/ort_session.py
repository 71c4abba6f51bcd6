"""Sessions on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime

from runtime.errors import EngineError, ModelError
from runtime.manifest import Manifest

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class ORTSession:
    """A model in ONNX Runtime; see runtime.session.Session."""

    engine = "ort"

    def __init__(self, model: bytes, manifest: Manifest, source: str, *, device: str, threads: int | None) -> None:
        self.version: str = onnxruntime.__version__
        self.manifest = manifest
        self.device = device
        self._source = source
        provider = _PROVIDERS.get(device)
        available = onnxruntime.get_available_providers()
        if provider not in available:
            found = ", ".join(name for name, p in _PROVIDERS.items() if p in available)
            raise EngineError(f"device {device!r}: ONNX Runtime does not find it; expected one of: {found}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; its warnings are for graph authors
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        try:
            session = onnxruntime.InferenceSession(model, options, providers=[provider])
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ModelError(
                f"{source}: ONNX Runtime cannot load it ({reason}); export it with --target ort"
            ) from None
        # Where a provider's libraries do not load, ONNX Runtime takes the CPU and says so in a log only.
        if provider not in session.get_providers():
            raise EngineError(f"device {device!r}: ONNX Runtime cannot start it; check its driver, or use cpu")
        self._session: onnxruntime.InferenceSession | None = session
        self.outputs = tuple(output.name for output in session.get_outputs())
        self._inputs = [value.name for value in session.get_inputs()]
        # Without this, every run computes every output and throws away what was not asked for.
        self._run_options = onnxruntime.RunOptions()
        self._run_options.only_execute_path_to_fetches = True

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: tuple[str, ...] = ("logits",)
    ) -> dict[str, np.ndarray]:
        """Run the model once; see runtime.session.Session."""
        session = self._session  # held here, so that closing in another thread does not free it now
        if session is None:
            raise EngineError(f"{self._source}: the model is closed; open it again")
        feeds = dict(inputs)
        if "target" in self._inputs and "target" not in feeds:
            feeds["target"] = np.full(len(feeds["image"]), -1, np.int64)  # must be fed, even where it is not used
        return dict(zip(outputs, session.run(list(outputs), feeds, self._run_options), strict=True))

    def close(self) -> None:
        """Free the model."""
        self._session = None


def open(model: bytes, manifest: Manifest, source: str, *, device: str, threads: int | None) -> ORTSession:
    """Load a model on ONNX Runtime.

    Args:
        model: contents of the ONNX file.
        manifest: of the file.
        source: its name, for messages.
        device: "cpu" or "cuda".
        threads: CPU threads of one inference, or None.

    Raises:
        EngineError: this build of ONNX Runtime has no such device.
        ModelError: ONNX Runtime cannot load the model.
    """
    return ORTSession(model, manifest, source, device=device, threads=threads)
