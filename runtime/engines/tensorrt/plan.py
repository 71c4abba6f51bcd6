"""The sidecar of a TensorRT plan: `engine.plan.json`, which says what `engine.plan` is and where it may run.

A plan is executable code for one version, one kind of GPU and one platform. Its sidecar is written last, so that a
plan without one is not a whole plan.

    version              1
    manifest             the model's manifest, see runtime/manifest.py
    onnx_sha256          of the ONNX file the plan was built from, hexadecimal
    plan_sha256          of the plan itself
    builder              "tensorrt", or "tensorrt_rtx": built ahead of time, for the runtime of that name
    builder_version      such as "10.16.1.11"
    version_compatible   whether later releases can run it (a session must then allow the host code in it)
    compute_capability   of the GPU it was built on, such as "8.7"; "" where it was built without one
    hardware             which GPUs it runs on, one of HARDWARE
    device               name of the GPU it was built on, "" where it was built without one
    driver               CUDA version of the driver it was built under, such as "13.0", or ""
    platform             such as "linux-x86_64"
    dla_core             core of the deep learning accelerator it runs on, or null
    batch                smallest, most frequent and largest batch
    int8_layers          names of the layers that compute on INT8
    rebuild              the command line that builds it again
"""

from __future__ import annotations

import hashlib
import json
import os
import platform as platforms
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from runtime.errors import ModelError
from runtime.files import read_bytes
from runtime.manifest import Manifest

VERSION = 1
SUFFIX = ".json"
BUILDERS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX ahead-of-time"}
"""Builder to the label that every result of it carries: measurements on one are no measurements on the other."""

HARDWARE = ("same", "same-compute-capability", "ampere-plus")
"""The GPU it was built on and its like; any of that compute capability; any discrete one from 8.0 on."""

_AMPERE = (8, 0)
# Version-compatible plans run on later releases of their major version, and across this boundary (support matrix
# of TensorRT 11.4.1, "Engine Portability").
_NEXT_MAJOR = ((10, 11),)
_REBUILD = "python -m export.engine MODEL.onnx -o {plan}"
_KINDS = {str: "a text", int: "a whole number", bool: "true or false", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class PlanSidecar:
    """What is known of a plan; see the module's text for the fields."""

    manifest: Manifest
    onnx_sha256: str
    plan_sha256: str
    builder: str
    builder_version: str
    version_compatible: bool = False
    compute_capability: str = ""
    hardware: str = "same"
    device: str = ""
    driver: str = ""
    platform: str = ""
    dla_core: int | None = None
    batch: tuple[int, int, int] = (1, 1, 1)
    int8_layers: tuple[str, ...] = ()
    rebuild: str = ""

    @property
    def label(self) -> str:
        """What results of the plan are called: "TensorRT 10.16.1.11" or "TensorRT-RTX ahead-of-time 1.7.1.116"."""
        return f"{BUILDERS[self.builder]} {self.builder_version}"

    def to_json(self) -> str:
        """Return the JSON text that `from_json` reads."""
        values = {**asdict(self), "manifest": json.loads(self.manifest.to_json())}
        return json.dumps({"version": VERSION, **values}, indent=1)

    @classmethod
    def from_json(cls, text: str, source: str) -> PlanSidecar:
        """Read a sidecar.

        Args:
            text: JSON.
            source: name of its file, for messages.

        Raises:
            ModelError: not JSON, another version, or a field is missing or of the wrong kind.
        """
        remedy = f"build the plan again: {_REBUILD.format(plan=source.removesuffix(SUFFIX))}"
        try:
            values = json.loads(text)
            version = values.pop("version")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ModelError(f"{source}: is not a plan's readable JSON; {remedy}") from None
        if version != VERSION:
            raise ModelError(f"{source}: sidecar version {version}, expected {VERSION}; {remedy}")
        try:
            return _from_values(values, source)
        except ValueError as error:
            raise ModelError(f"{source}: sidecar {error}; {remedy}") from None

    def verify(
        self,
        plan: bytes,
        source: str,
        *,
        builder: str,
        version: str,
        compute_capability: str,
        platform: str | None = None,
    ) -> None:
        """Refuse a plan that is not the one described, or that cannot run here, before anything loads it.

        Args:
            plan: its contents.
            source: its name, for messages.
            builder: the runtime at hand, one of BUILDERS.
            version: of that runtime.
            compute_capability: of the GPU at hand, such as "8.7".
            platform: of this machine; None asks it.

        Raises:
            ModelError: the plan was altered, or is for another runtime, version, platform or GPU; the text ends
                with the command that builds it again.
        """
        platform = platform or this_platform()
        found = hashlib.sha256(plan).hexdigest()
        here = f"{BUILDERS.get(builder, builder)} {version}"
        problem = ""
        if found != self.plan_sha256:
            problem = f"sha256 {found[:12]}, but its sidecar is for {self.plan_sha256[:12]}"
        elif builder != self.builder or not self._runs_on_version(version):
            problem = f"built with {self.label}, but this is {here}"
        elif platform != self.platform:
            problem = f"built on {self.platform}, but this is {platform}"
        elif not self._runs_on_gpu(compute_capability):
            only = "" if self.hardware == "same" else f" for {self.hardware}"
            problem = (
                f"built on compute capability {self.compute_capability}{only}, but this is {compute_capability}"
            )
        if problem:
            rebuild = self.rebuild or _REBUILD.format(plan=source)
            raise ModelError(f"{source}: {problem}; build it again, on this machine: {rebuild}")

    def _runs_on_version(self, version: str) -> bool:
        if not self.version_compatible:
            return version == self.builder_version
        built, here = _numbers(self.builder_version), _numbers(version)
        return built <= here and (built[:1] == here[:1] or (*built[:1], *here[:1]) in _NEXT_MAJOR)

    def _runs_on_gpu(self, compute_capability: str) -> bool:
        # Built without a GPU (TensorRT-RTX): the plan is finished for the GPU at hand when it is loaded.
        if not self.compute_capability:
            return True
        if self.hardware == "ampere-plus":
            return _numbers(compute_capability) >= _AMPERE
        return compute_capability == self.compute_capability


def sidecar_path(plan: str | os.PathLike[str]) -> Path:
    """Return the path of a plan's sidecar: `engine.plan.json` of `engine.plan`."""
    plan = Path(plan)
    return plan.with_name(plan.name + SUFFIX)


def read_sidecar(plan: str | os.PathLike[str]) -> PlanSidecar:
    """Return the sidecar of a plan.

    Raises:
        ModelError: there is none, or it is unreadable; the text ends with the command that builds the plan again.
        FileError: it cannot be read.
    """
    contents = read_sidecar_bytes(plan)
    return PlanSidecar.from_json(contents.decode("utf-8", "replace"), str(sidecar_path(plan)))


def read_sidecar_bytes(plan: str | os.PathLike[str]) -> bytes:
    """Return the contents of a plan's sidecar; raises as `read_sidecar` where there is none."""
    path = sidecar_path(plan)
    if not path.exists():
        rebuild = _REBUILD.format(plan=plan)
        raise ModelError(
            f"{plan}: its sidecar {path.name} is missing; copy both files, or build it again: {rebuild}"
        )
    return read_bytes(path)


def this_platform() -> str:
    """Return the platform of this machine as sidecars name it, such as "linux-x86_64" or "linux-aarch64"."""
    return f"{sys.platform}-{platforms.machine().lower()}"


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (10, 16, 1, 11)."""
    numbers = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _from_values(values: dict[str, Any], source: str) -> PlanSidecar:
    """Return the sidecar in a JSON object; raises ValueError with the field, its value and what it must be."""
    names = [f.name for f in fields(PlanSidecar)]
    unknown = values.keys() - set(names)
    if unknown:
        raise ValueError(f"field {min(unknown)}: not known to this release")
    for name in names:
        if name not in values:
            raise ValueError(f"field {name}: missing")
    for name in names:
        kinds = {"manifest": dict, "version_compatible": bool, "batch": list, "int8_layers": list}
        kind = kinds.get(name, str)
        if name != "dla_core" and not isinstance(values[name], kind):
            raise ValueError(f"field {name} {values[name]!r}: expected {_KINDS[kind]}")
    batch, core = values["batch"], values["dla_core"]
    counts = [n for n in batch if isinstance(n, int) and n >= 1]
    for name, ok, expected in (
        ("builder", values["builder"] in BUILDERS, f"one of {', '.join(BUILDERS)}"),
        ("hardware", values["hardware"] in HARDWARE, f"one of {', '.join(HARDWARE)}"),
        ("dla_core", core is None or (isinstance(core, int) and core >= 0), "null or a whole number from 0"),
        ("batch", len(batch) == len(counts) == 3 and batch == sorted(counts), "three rising whole numbers from 1"),
        ("int8_layers", all(isinstance(n, str) for n in values["int8_layers"]), "texts"),
    ):
        if not ok:
            raise ValueError(f"field {name} {values[name]!r}: expected {expected}")
    manifest = Manifest.from_json(json.dumps(values["manifest"]), source)
    return PlanSidecar(
        **{
            **values,
            "manifest": manifest,
            "batch": tuple(batch),
            "int8_layers": tuple(values["int8_layers"]),
        }
    )
