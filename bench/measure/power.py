"""Power and energy, from the sensor that the machine has.

- NVML on desktops and servers: `nvmlDeviceGetTotalEnergyConsumption`, in mJ since the driver was loaded (Volta and
  later), otherwise `nvmlDeviceGetPowerUsage`, in mW, averaged over a second by the driver
  (https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html).
- The INA3221 (Orin, Xavier) or INA238 (Thor) of a Jetson through hwmon: `in*_label`, `in*_input` in mV,
  `curr*_input` in mA, `power*_input` in uW (https://docs.kernel.org/hwmon/ina3221.html, .../ina238.html; rails:
  Jetson Linux Developer Guide, "Platform Power and Performance").
- `tegrastats` where those cannot be read: "RAIL NOW mW/AVERAGE mW" (Jetson Linux Developer Guide, "Tegrastats
  Utility").

- RAPL on CPUs, through powercap: `energy_uj` of every package, where it may be read
  (https://docs.kernel.org/power/powercap/powercap.html).

NVML counts the board of the GPU, RAPL the processor's packages, a Jetson's input rail the whole module.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.engines.tensorrt.cuda import Cuda
from runtime.engines.tensorrt.cuda_choice import find_cuda
from runtime.errors import EngineError

_SAMPLE_S = 0.02
# Rails that feed the whole module; where there is none, the others add up to it.
_INPUT_RAILS = ("VDD_IN", "VIN", "POM_5V_IN")
_CHIPS = ("ina3221", "ina3221x", "ina238")


@dataclass(frozen=True)
class Meter:
    """A sensor.

    Args:
        name: what it is, for reports.
        watts: reads every rail.
        joules: reads an energy counter, None where there is none.
    """

    name: str
    watts: Callable[[], dict[str, float]]
    joules: Callable[[], float] | None = None


@dataclass(frozen=True)
class Energy:
    """What a workload drew.

    Args:
        source: the sensor.
        images: how many were processed.
        seconds: how long that took.
        watts: mean power meanwhile.
        idle_watts: mean power before, doing nothing.
        millijoules_per_image: energy of one image, all that was drawn.
        millijoules_per_image_above_idle: what the work added to idling.
    """

    source: str
    images: int
    seconds: float
    watts: float
    idle_watts: float
    millijoules_per_image: float
    millijoules_per_image_above_idle: float


def measure_energy(
    call: Callable[[], object], batch: int, meter: Meter, *, seconds: float = 5.0, idle_seconds: float = 2.0
) -> Energy:
    """Run `call`, which processes `batch` images, again and again, and read the sensor meanwhile."""
    with _mean_watts(meter) as idle:
        time.sleep(idle_seconds)
    call()
    began, calls = time.perf_counter(), 0
    with _mean_watts(meter) as busy:
        while time.perf_counter() - began < seconds or not calls:
            call()
            calls += 1
        lasted = time.perf_counter() - began
    images = calls * batch
    return Energy(
        source=meter.name,
        images=images,
        seconds=lasted,
        watts=busy[0],
        idle_watts=idle[0],
        millijoules_per_image=1000 * busy[0] * lasted / images,
        millijoules_per_image_above_idle=1000 * (busy[0] - idle[0]) * lasted / images,
    )


@contextlib.contextmanager
def open_meter(device: int | None = 0) -> Iterator[Meter]:
    """Give the machine's sensor: a Jetson's, otherwise NVML's for CUDA's GPU of that number; None is for the CPU.

    Raises:
        EngineError: there is none, or it cannot be told which GPU is meant.
    """
    with contextlib.ExitStack() as stack:
        if device is None:
            meter = ina_meter() or rapl_meter() or tegrastats_meter(stack)
        else:
            meter = ina_meter() or nvml_meter(device, stack) or tegrastats_meter(stack)
        if meter is None:
            wanted, check = (
                ("RAPL", "that /sys/class/powercap/intel-rapl:0/energy_uj may be read (root, or chmod a+r)")
                if device is None
                else ("NVML (pip install nvidia-ml-py)", "that nvidia-smi shows the GPU")
            )
            raise EngineError(
                f"energy: no sensor found, expected {wanted}, or a Jetson's INA sensors or tegrastats; "
                f"check {check}, or measure without --energy"
            )
        yield meter


def total_watts(rails: dict[str, float]) -> float:
    """Return the power of the input rail where there is one, otherwise the sum."""
    return next((rails[name] for name in _INPUT_RAILS if name in rails), sum(rails.values()))


def ina_meter(root: Path = Path("/sys/class/hwmon")) -> Meter | None:
    """Return the meter of a Jetson's INA sensors under hwmon; None where there are none that can be read."""

    def read() -> dict[str, float]:
        return {name: watts for chip in _ina_chips(root) for name, watts in _ina_rails(chip)}

    try:
        return Meter("INA sensors", read) if read() else None
    except OSError:
        return None


def _ina_chips(root: Path) -> list[Path]:
    names = sorted(root.glob("hwmon*/name"))
    return [path.parent for path in names if path.read_text().strip() in _CHIPS]


def _ina_rails(chip: Path) -> Iterator[tuple[str, float]]:
    for power in sorted(chip.glob("power[0-9]*_input")):
        label = chip / power.name.replace("_input", "_label")
        # The INA238 has one channel and no label: it sits at the module's input.
        yield (label.read_text().strip() if label.exists() else "VIN"), int(power.read_text()) / 1e6
    for label in sorted(chip.glob("in[1-3]_label")):
        name, current = label.read_text().strip(), chip / f"curr{label.name[2]}_input"
        if name not in ("NC", "Sum of shunt voltages") and current.exists():
            millivolts = int((chip / f"in{label.name[2]}_input").read_text())
            yield name, millivolts * int(current.read_text()) / 1e6


def parse_tegrastats(line: str) -> dict[str, float]:
    """Return the rails in a line of tegrastats, in watts as of now.

    They read "VDD_IN 5210mW/5180mW", present and mean power, before JetPack 5 without the unit.
    """
    rails = re.findall(r"(?<!\S)([A-Z][A-Z0-9_]*) (\d+)(?:mW)?/(\d+)(?:mW)?(?!\S|MB)", line)
    return {name: int(now) / 1000 for name, now, _ in rails if name not in ("RAM", "SWAP", "IRAM")}


def tegrastats_meter(stack: contextlib.ExitStack, command: tuple[str, ...] = ("tegrastats",)) -> Meter | None:
    """Return a meter that reads a running tegrastats; None where there is none or it names no rail."""
    try:
        process = subprocess.Popen([*command, "--interval", "100"], stdout=subprocess.PIPE, text=True)
    except OSError:
        return None
    stack.enter_context(process)
    stack.callback(process.terminate)
    assert process.stdout is not None
    latest = [parse_tegrastats(process.stdout.readline())]
    if not latest[0]:
        return None

    def follow() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            latest[0] = parse_tegrastats(line) or latest[0]

    threading.Thread(target=follow, daemon=True).start()
    return Meter("tegrastats", lambda: latest[0])


def nvml_meter(device: int, stack: contextlib.ExitStack, library: Any = None) -> Meter | None:
    """Return NVML's meter of a GPU; None where NVML or its driver is not there, or does not know the GPU.

    Args:
        device: CUDA's number of the GPU. NVML counts along the PCI bus, CUDA by speed and by CUDA_VISIBLE_DEVICES,
            so that only the address on the bus tells which one is meant.
        stack: where NVML is shut down.
        library: the module `pynvml`.

    Raises:
        EngineError: there are several GPUs, and CUDA cannot be asked which of them is meant.
    """
    try:
        nvml = library or importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no library or no driver
        return None
    stack.callback(nvml.nvmlShutdown)
    try:
        handle = _nvml_handle(nvml, device)
        nvml.nvmlDeviceGetPowerUsage(handle)
    except nvml.NVMLError:
        return None

    def watts() -> dict[str, float]:
        return {"board": nvml.nvmlDeviceGetPowerUsage(handle) / 1000}

    def joules() -> float:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000)

    try:
        joules()
    except nvml.NVMLError:  # before Volta
        return Meter("NVML power", watts)
    return Meter("NVML energy counter", watts, joules)


def _nvml_handle(nvml: Any, device: int) -> Any:
    address = pci_address(device)
    if address is not None:
        return nvml.nvmlDeviceGetHandleByPciBusId(address)
    count = nvml.nvmlDeviceGetCount()
    if count > 1:
        raise EngineError(
            f"energy: which of {count} GPUs cuda:{device} is, only CUDA says; pip install cuda-bindings"
        )
    return nvml.nvmlDeviceGetHandleByIndex(0)


def pci_address(device: int) -> bytes | None:
    """Return the address on the PCI bus of CUDA's GPU of that number, such as b"0000:65:00.0"; None if unknown."""
    try:
        cuda = Cuda(find_cuda("the GPU's address").runtime)
        address = cuda.call("cudaDeviceGetPCIBusId", 32, device)
    except EngineError:
        return None
    return bytes(address).split(b"\0")[0]


def rapl_meter(root: Path = Path("/sys/class/powercap")) -> Meter | None:
    """Return the meter of the processor's packages (RAPL); None where their counters cannot be read."""
    packages = []
    for name in sorted(root.glob("intel-rapl:*/name")):
        try:
            if name.read_text().startswith("package"):
                packages.append(_Counter(name.with_name("energy_uj"), name.with_name("max_energy_range_uj")))
        except (OSError, ValueError):  # readable for root alone on most systems
            return None
    if not packages:
        return None
    return Meter("RAPL packages", dict, lambda: sum(package.joules() for package in packages))


class _Counter:
    """A counter of microjoules that starts again from 0 now and then."""

    def __init__(self, file: Path, largest: Path) -> None:
        self._file, self._range_uj = file, int(largest.read_text())
        self._last_uj, self._total_uj = int(file.read_text()), 0

    def joules(self) -> float:
        """Return the energy since it was opened."""
        now_uj = int(self._file.read_text())
        self._total_uj += (now_uj - self._last_uj) % (self._range_uj + 1)
        self._last_uj = now_uj
        return self._total_uj / 1e6


@contextlib.contextmanager
def _mean_watts(meter: Meter) -> Iterator[list[float]]:
    """Give a list that holds the mean power of the block once it is left."""
    found: list[float] = []
    began = time.perf_counter()
    if meter.joules is not None:
        before = meter.joules()
        yield found
        found.append((meter.joules() - before) / (time.perf_counter() - began))
        return
    done, times, watts = threading.Event(), [began], [total_watts(meter.watts())]

    def sample() -> None:
        while not done.wait(_SAMPLE_S):
            watts.append(total_watts(meter.watts()))
            times.append(time.perf_counter())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
    watts.append(total_watts(meter.watts()))
    times.append(time.perf_counter())
    # Trapezoids: a sensor is not read at even intervals while all cores are busy.
    energy = float(np.sum((np.array(watts[1:]) + np.array(watts[:-1])) / 2 * np.diff(times)))
    found.append(energy / (times[-1] - times[0]))
