"""Watching a device: shares and drifts beside the file's reference, from several threads."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import numpy as np
import pytest

from runtime import Explanation, Monitor, Prediction
from runtime.errors import ModelError, OptionError
from runtime.manifest import ImageInput, Manifest
from runtime.reference import Reference

REFERENCE = Reference(
    images=100, class_shares=(0.5, 0.3, 0.2), confidences=(*[0.0] * 9, 1.0), scores=(5.0, 1.0), threshold=3.0,
    map_output="saliency", map_shares=tuple([1 / 9] * 9),
)  # fmt: skip
MANIFEST = Manifest(
    "cnn2", "int8", "ort", ImageInput((6, 6), 1, (0.5,), (0.5,)), ('a"\n', "b", "c"), reference=REFERENCE
)


def prediction(index: int, *, score: float = 5.0, probability: float = 0.95) -> Prediction:
    logits = np.full(3, -100, np.float32)
    logits[index] = score
    return Prediction(MANIFEST.classes[index], index, probability, (), logits)


def explanation(row: int, column: int) -> Explanation:
    attribution = np.zeros((1, 6, 6), np.float32)
    attribution[0, row, column] = -2
    return Explanation(np.abs(attribution[0]), np.int64(0), "a", np.zeros(3), attribution, "gradient",
                       np.zeros((6, 6), np.uint8))  # fmt: skip


def test_nothing_is_known_before_the_first_image() -> None:
    report = Monitor(MANIFEST).report()
    assert report["images"] == 0
    assert report["classes"]["drift"] is None
    assert report["out_of_distribution"]["share"] is None
    assert "clearpact_images_total 0" in Monitor(MANIFEST).to_prometheus()


def test_what_the_validation_did_has_no_drift() -> None:
    monitor = Monitor(MANIFEST)
    for index, count in enumerate((5, 3, 2)):
        for _ in range(count):
            assert monitor.add(prediction(index))
    report = monitor.report()
    assert report["classes"]["drift"] == pytest.approx(0)
    assert report["confidence"]["drift"] == pytest.approx(0)
    assert report["confidence"]["mean"] == pytest.approx(0.95)
    assert report["out_of_distribution"]["share"] == 0
    assert report["out_of_distribution"]["mean_score"] == pytest.approx(5)
    assert report["map"]["drift"] is None


def test_other_images_show() -> None:
    monitor = Monitor(MANIFEST)
    assert not monitor.add(prediction(2, score=2.9, probability=0.31), explanation(5, 0))
    report = monitor.report()
    assert report["classes"]["drift"] == pytest.approx(0.8)
    assert report["confidence"]["shares"]["0.3-0.4"] == 1
    assert report["out_of_distribution"]["share"] == 1
    assert report["map"]["shares"]["bottom left"] == 1
    assert report["map"]["drift"] == pytest.approx(8 / 9)
    assert json.loads(monitor.to_json()) == report


def test_a_window_forgets() -> None:
    forever, window = Monitor(MANIFEST), Monitor(MANIFEST, window=10)
    for monitor in (forever, window):
        for _ in range(100):
            monitor.add(prediction(0))
        for _ in range(30):
            monitor.add(prediction(1, score=0))
    assert forever.report()["out_of_distribution"]["share"] == pytest.approx(30 / 130)
    assert window.report()["out_of_distribution"]["share"] == pytest.approx(1 - np.exp(-3), abs=0.01)
    assert window.report()["images"] == 130


def test_prometheus_reads_it() -> None:
    monitor = Monitor(MANIFEST)
    monitor.add(prediction(0), explanation(0, 0))
    text = monitor.to_prometheus({"device": "line 3"})
    lines = text.splitlines()
    assert 'clearpact_images_total{device="line 3"} 1' in lines
    assert r'clearpact_class_share{device="line 3",class="a\"\n"} 1' in lines
    assert 'clearpact_map_share{device="line 3",region="top left"} 1' in lines
    assert text.endswith("\n")
    types = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(types) == len(set(types))


def test_threads_lose_nothing() -> None:
    monitor = Monitor(MANIFEST)

    def work(index: int) -> None:
        for _ in range(500):
            monitor.add(prediction(index))

    threads = [threading.Thread(target=work, args=(index % 3,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = monitor.report()
    assert report["images"] == 3000
    assert report["classes"]["shares"]["b"] == pytest.approx(1 / 3)


def test_what_cannot_be_watched() -> None:
    with pytest.raises(ModelError, match="export it again with --validation"):
        Monitor(replace(MANIFEST, reference=None))
    with pytest.raises(OptionError, match="window 0"):
        Monitor(MANIFEST, window=0)
    other = replace(explanation(0, 0), method="smoothgrad")
    with pytest.raises(OptionError, match="by smoothgrad: expected one image's by gradient"):
        Monitor(MANIFEST).add(prediction(0), other)


@pytest.mark.parametrize(
    "change", [{"images": 0}, {"class_shares": [1.0]}, {"threshold": "high"}, {"scores": [1, None]}]
)
def test_damaged_references_are_refused(change: dict[str, object]) -> None:
    values = json.loads(MANIFEST.to_json())
    assert Manifest.from_json(json.dumps(values), "m") == MANIFEST
    values["reference"].update(change)
    with pytest.raises(ModelError, match="m: manifest field reference"):
        Manifest.from_json(json.dumps(values), "m")
