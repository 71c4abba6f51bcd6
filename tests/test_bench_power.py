"""Sensors, on text in the documented formats (bench/measure/power.py says where they are documented)."""

from __future__ import annotations

import contextlib
import itertools
import sys
from pathlib import Path

import pynvml
import pytest

from bench.measure.power import (
    Meter,
    ina_meter,
    measure_energy,
    nvml_meter,
    parse_tegrastats,
    rapl_meter,
    tegrastats_meter,
    total_watts,
)
from runtime.engines.tensorrt.cuda_choice import VARIABLE
from runtime.errors import EngineError
from tests.fake_cuda import FakeGpu

ORIN_NX = (
    "11-21-2026 09:00:00 RAM 3021/15523MB (lfb 4x4MB) SWAP 0/7762MB (cached 0MB) CPU [2%@1190,0%@1190,off,off] "
    "EMC_FREQ 0%@2133 GR3D_FREQ 37%@[611] VIC_FREQ 729 APE 174 cpu@48.5C soc2@47.3C tj@49.1C "
    "VDD_IN 5210mW/5180mW VDD_CPU_GPU_CV 1204mW/1190mW VDD_SOC 1322mW/1320mW"
)
AGX_ORIN = (
    "RAM 5921/30588MB (lfb 5x4MB) CPU [1%@729,0%@729] GR3D_FREQ 99%@[1300,1300] gpu@45C "
    "VDD_GPU_SOC 4391mW/4391mW VDD_CPU_CV 399mW/399mW VIN_SYS_5V0 3526mW/3476mW"
)
NANO = "RAM 1024/3964MB (lfb 1x4MB) IRAM 0/252kB(lfb 252kB) CPU [1%@102] POM_5V_IN 1897/1897 POM_5V_GPU 40/80"


def test_tegrastats_names_its_rails() -> None:
    assert parse_tegrastats(ORIN_NX) == {"VDD_IN": 5.21, "VDD_CPU_GPU_CV": 1.204, "VDD_SOC": 1.322}
    assert parse_tegrastats(AGX_ORIN) == {"VDD_GPU_SOC": 4.391, "VDD_CPU_CV": 0.399, "VIN_SYS_5V0": 3.526}
    assert parse_tegrastats(NANO) == {"POM_5V_IN": 1.897, "POM_5V_GPU": 0.04}
    assert parse_tegrastats("nothing of the kind") == {}


def test_the_input_rail_is_the_total_and_otherwise_the_rails_add_up() -> None:
    assert total_watts(parse_tegrastats(ORIN_NX)) == 5.21
    assert total_watts(parse_tegrastats(AGX_ORIN)) == pytest.approx(4.391 + 0.399 + 3.526)
    assert total_watts(parse_tegrastats(NANO)) == 1.897


def test_a_running_tegrastats_is_followed() -> None:
    code = f"import sys; print({ORIN_NX!r}, flush=True); sys.stdin.read()"
    with contextlib.ExitStack() as stack:
        meter = tegrastats_meter(stack, (sys.executable, "-c", code))
        assert meter is not None
        assert (meter.name, meter.watts()["VDD_IN"]) == ("tegrastats", 5.21)


def test_without_tegrastats_there_is_no_meter() -> None:
    with contextlib.ExitStack() as stack:
        assert tegrastats_meter(stack, ("no-such-tegrastats",)) is None
        assert tegrastats_meter(stack, (sys.executable, "-c", "print('no rail')")) is None


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


def test_ina3221_rails_are_volts_times_amperes(tmp_path: Path) -> None:
    write(tmp_path / "hwmon0", name="cpu_thermal", temp1_input="48000")
    write(
        tmp_path / "hwmon3", name="ina3221", in1_label="VDD_IN", in1_input="19152", curr1_input="272",
        in2_label="VDD_CPU_GPU_CV", in2_input="19144", curr2_input="40", in3_label="NC", in3_input="0",
        curr3_input="0", in7_label="Sum of shunt voltages", in7_input="1560",
    )  # fmt: skip
    meter = ina_meter(tmp_path)
    assert meter is not None
    assert meter.watts() == {"VDD_IN": pytest.approx(5.209344), "VDD_CPU_GPU_CV": pytest.approx(0.76576)}
    assert total_watts(meter.watts()) == pytest.approx(5.209344)


def test_ina238_gives_power_itself(tmp_path: Path) -> None:
    write(tmp_path / "hwmon1", name="ina238", power1_input="31250000", in1_input="20016", curr1_input="1561")
    meter = ina_meter(tmp_path)
    assert meter is not None
    assert meter.watts() == {"VIN": 31.25}


def test_a_machine_without_ina_sensors_has_no_such_meter(tmp_path: Path) -> None:
    assert ina_meter(tmp_path) is None
    write(tmp_path / "hwmon0", name="coretemp", temp1_input="48000")
    assert ina_meter(tmp_path) is None


class Nvml:
    """The module `pynvml` in the calls used, for two GPUs, with the errors that it raises."""

    NVMLError = pynvml.NVMLError

    def __init__(self, *, counter: bool = True, driver: bool = True, gpus: int = 2) -> None:
        self._counter, self._driver, self._gpus = counter, driver, gpus
        self._millijoules = itertools.count(1000, 25)
        self.shut_down = 0

    def nvmlInit(self) -> None:  # noqa: N802
        if not self._driver:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.shut_down += 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self._gpus

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return f"0000:0{index + 1}:00.0"

    def nvmlDeviceGetHandleByPciBusId(self, address: bytes) -> str:  # noqa: N802
        if address not in (b"0000:01:00.0", b"0000:02:00.0"):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return address.decode()

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        return {"0000:01:00.0": 10_000, "0000:02:00.0": 65_250}[handle]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        if not self._counter:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return next(self._millijoules)


def test_nvml_gives_the_counter_where_there_is_one_and_power_otherwise(gpu: FakeGpu) -> None:
    gpu.addresses = [b"0000:02:00.0"]
    for counter, name in ((True, "NVML energy counter"), (False, "NVML power")):
        library = Nvml(counter=counter)
        with contextlib.ExitStack() as stack:
            meter = nvml_meter(0, stack, library)
            assert meter is not None
            assert (meter.name, meter.watts()) == (name, {"board": 65.25})
            assert (meter.joules is not None) == counter
            if meter.joules is not None:
                assert meter.joules() == 1.025  # 1000 mJ were read to find out
        assert library.shut_down == 1


def test_cudas_gpu_is_found_by_its_address_on_the_bus_not_by_its_number(gpu: FakeGpu) -> None:
    # CUDA counts the fastest first, NVML along the bus.
    gpu.addresses, gpu.devices = [b"0000:02:00.0", b"0000:01:00.0", b"0000:09:00.0"], 3
    with contextlib.ExitStack() as stack:
        found = [nvml_meter(number, stack, Nvml()) for number in range(3)]
    assert [meter and meter.watts() for meter in found] == [{"board": 65.25}, {"board": 10.0}, None]


def test_without_cuda_only_a_single_gpu_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setenv(VARIABLE, "cuda-bindings")
    with contextlib.ExitStack() as stack:
        meter = nvml_meter(0, stack, Nvml(gpus=1))
        assert meter is not None
        assert meter.watts() == {"board": 10.0}
        with pytest.raises(EngineError, match=r"^energy: which of 2 GPUs cuda:1 is, only CUDA says; pip install"):
            nvml_meter(1, stack, Nvml())


def test_nvml_without_a_driver_is_no_meter() -> None:
    with contextlib.ExitStack() as stack:
        assert nvml_meter(0, stack, Nvml(driver=False)) is None


def test_rapl_adds_the_packages_up_also_where_a_counter_starts_again(tmp_path: Path) -> None:
    for number, (name, microjoules) in enumerate((("package-0", 900), ("package-1", 5), ("psys", 7))):
        write(tmp_path / f"intel-rapl:{number}", name=name, energy_uj=str(microjoules), max_energy_range_uj="999")
    write(tmp_path / "intel-rapl:0:0", name="core", energy_uj="1", max_energy_range_uj="999")
    meter = rapl_meter(tmp_path)
    assert meter is not None
    assert meter.joules is not None
    assert meter.joules() == 0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100")  # 200 more, over the end of the range
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("25")
    assert meter.joules() == pytest.approx(220e-6)
    assert meter.joules() == pytest.approx(220e-6)
    assert rapl_meter(tmp_path / "absent") is None
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("")  # as one that may not be read
    assert rapl_meter(tmp_path) is None


def test_energy_of_an_image_from_samples_and_from_a_counter() -> None:
    sampled = measure_energy(lambda: None, 4, Meter("s", lambda: {"VDD_IN": 6.0}), seconds=0.1, idle_seconds=0.05)
    assert (sampled.watts, sampled.idle_watts) == (pytest.approx(6.0), pytest.approx(6.0))
    assert sampled.millijoules_per_image == pytest.approx(6000 * sampled.seconds / sampled.images)
    assert sampled.millijoules_per_image_above_idle == pytest.approx(0.0, abs=1e-9)
    assert sampled.images % 4 == 0
    readings = iter([10.0, 10.5, 11.0, 14.0])  # joules: idle from and to, busy from and to
    counted = measure_energy(
        lambda: None, 1, Meter("c", dict, lambda: next(readings)), seconds=0.2, idle_seconds=0.1
    )
    assert counted.millijoules_per_image == pytest.approx(3000 / counted.images, rel=0.01)
    idle_joules = counted.idle_watts * counted.seconds
    assert counted.millijoules_per_image_above_idle == pytest.approx(
        (3 - idle_joules) * 1000 / counted.images, rel=0.05
    )
