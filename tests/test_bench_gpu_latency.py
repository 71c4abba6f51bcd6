"""`bench.latency` on plans, against the models of CUDA and TensorRT, whose times are known exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.latency import main
from bench.measure import power
from bench.measure.gpu_latency import PHASES, phase_samples, streams_images_per_second
from runtime.engines.tensorrt.session import open as open_plan
from runtime.errors import EngineError, ModelError, OptionError
from tests.fake_cuda import FakeGpu
from tests.fake_tensorrt import CHANNELS, CLASSES, KERNEL_MS, SIZE, write_plan

PIXELS = SIZE[0] * SIZE[1] * CHANNELS


def test_phases_are_those_between_the_events(gpu: FakeGpu, plan: Path) -> None:
    session = open_plan(plan)
    ways = {"class": (("logits",), True), "map": (("logits", "saliency"), False)}
    images = np.zeros((2, *SIZE, CHANNELS), np.uint8)
    since = len(gpu.calls)
    found = phase_samples(session, images, ways, runs=7, seconds=1, warm_up_seconds=0.0)
    for name, down_bytes in (("class", 2 * CLASSES * 4), ("map", 2 * (CLASSES + SIZE[0] * SIZE[1]) * 4)):
        assert found[name].shape == (7, len(PHASES))
        enqueue, h2d, compute, d2h, end_to_end = found[name].T
        np.testing.assert_allclose(h2d, (2 * PIXELS + 2 * 8) / 1e6, rtol=1e-9)
        np.testing.assert_allclose(compute, KERNEL_MS, rtol=1e-9)
        np.testing.assert_allclose(d2h, down_bytes / 1e6, rtol=1e-9)
        assert np.all((enqueue > 0) & (enqueue < end_to_end))
    # The class by a graph, recorded once; the map enqueued every time.
    assert gpu.calls[since:].count("cudaStreamBeginCapture") == 1
    launched, enqueued = (gpu.calls[since:].count(n) for n in ("cudaGraphLaunch", "execute_async_v3"))
    assert launched > 7
    assert enqueued > 7
    session.close()


def test_several_streams_are_in_flight_at_once(gpu: FakeGpu, plan: Path) -> None:
    session = open_plan(plan)
    rate = streams_images_per_second(
        session, np.zeros((4, *SIZE, CHANNELS), np.uint8), ("logits",), streams=3, seconds=0.05
    )
    assert rate > 0
    session.close()


def test_json_has_every_figure_of_a_plan(
    gpu: FakeGpu, plan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        power, "ina_meter", lambda: power.Meter("a sensor", lambda: {"VDD_IN": 8.0, "VDD_GPU": 5.0})
    )
    arguments = [str(plan), "--batch", "1,8", "--explain", "--streams", "2", "--profile", "--energy", "--spin"]
    main([*arguments, "--runs", "3", "--seconds", "0.05", "--no-cold-start", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert (result["engine"], result["device"], result["precision"]) == ("tensorrt 10.16.1.11", "cuda:0", "int8")
    assert result["plan"]["label"] == "TensorRT 10.16.1.11"
    assert result["plan"]["compute_capability"] == "8.7"
    names = ["class", "class, no graph", "class + map", "class + map, no graph"]
    for batch in ("1", "8"):
        assert list(result["latency"][batch]) == list(result["phases"][batch]) == names
        for name in names:
            phases = result["phases"][batch][name]
            assert list(phases) == list(PHASES)
            assert phases["compute"]["p50_ms"] == pytest.approx(KERNEL_MS)
            assert phases["compute"]["p99_ms"] is None  # of 3 runs
            assert result["latency"][batch][name]["p50_ms"] == phases["end_to_end"]["p50_ms"]
        assert result["streams"][batch] > 0
    assert [layer["precision"] for layer in result["layers"]] == ["copy", "INT8", "FP16", "?"]
    assert list(result["energy"]) == ["class", "class + map"]
    for drawn in result["energy"].values():
        assert (drawn["source"], drawn["watts"], drawn["idle_watts"]) == (
            "a sensor",
            pytest.approx(8),
            pytest.approx(8),
        )
        assert drawn["millijoules_per_image"] == pytest.approx(8000 * drawn["seconds"] / drawn["images"])


def test_a_person_reads_the_phases_side_by_side(
    gpu: FakeGpu, plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(plan), "--runs", "3", "--seconds", "0.05", "--profile", "--streams", "2", "--no-cold-start"])
    out = capsys.readouterr().out.splitlines()
    assert out[4].split() == ["enqueue", "H2D", "compute", "D2H", "end", "to", "end"]
    assert out[5].split()[:2] == ["class", "p50"]
    assert out[5].split()[4] == "0.250"
    assert [line.split()[0] for line in out[6:9]] == ["p90", "p95", "p99"]
    assert any(line.startswith("      2 streams: ") for line in out)
    assert any("INT8  conv1 + relu1  <- node_conv2d, node_relu" in line for line in out)


@pytest.mark.parametrize("option", ["--profile", "--streams=2"])
def test_what_only_a_gpu_has_is_refused_on_a_cpu(digits_models: dict[str, Path], option: str) -> None:
    with pytest.raises(OptionError, match=r"^--(profile|streams|energy): .*plan"):
        main([str(digits_models["ort"]), "--runs", "2", "--no-cold-start", option])


def test_phases_of_an_engine_without_them_are_null(
    digits_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(digits_models["ort"]), "--runs", "2", "--seconds", "0.05", "--no-cold-start", "--json"])
    assert json.loads(capsys.readouterr().out)["phases"] == {"1": {"class": None}}


def test_without_a_sensor_energy_says_what_was_looked_for(
    gpu: FakeGpu, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ina_meter", "nvml_meter", "rapl_meter", "tegrastats_meter"):
        monkeypatch.setattr(power, name, lambda *_: None)
    with pytest.raises(EngineError, match=r"^energy: no sensor found, expected NVML \(pip .*, or a Jetson"):
        main([str(plan), "--runs", "2", "--seconds", "0.05", "--energy", "--no-cold-start"])
    with (
        pytest.raises(EngineError, match=r"^energy: no sensor found, expected RAPL, or .*energy_uj may be read"),
        power.open_meter(None),
    ):
        pass


def test_explain_needs_a_plan_with_maps(gpu: FakeGpu, tmp_path: Path) -> None:
    path = write_plan(tmp_path / "class.plan", saliency=False)
    with pytest.raises(ModelError, match=r"^--explain: this model gives classes only"):
        main([str(path), "--explain", "--no-cold-start"])
