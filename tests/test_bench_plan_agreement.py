from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.plan_agreement import compare, main
from runtime.engines.tensorrt.session import open as open_plan
from runtime.errors import ModelError, OptionError
from runtime.session import open_session
from tests.fake_cuda import FakeGpu
from tests.fake_tensorrt import CHANNELS, SIZE, write_plan


def test_a_plan_agrees_with_itself_in_every_number(gpu: FakeGpu, plan: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (11, *SIZE, CHANNELS), np.uint8)
    first, second = open_plan(plan), open_plan(plan)
    found = compare(first, second, images)
    assert (found.images, found.differing, found.largest_difference) == (11, 0, 0.0)
    assert found.spearman == pytest.approx(1)
    assert found.least_spearman == pytest.approx(1)
    assert found.top_overlap == 1
    first.close()
    second.close()


def test_a_plan_of_classes_only_is_compared_in_its_logits(gpu: FakeGpu, plan: Path, tmp_path: Path) -> None:
    images = np.zeros((3, *SIZE, CHANNELS), np.uint8)
    images[:, 0] = 200
    only, whole = open_plan(write_plan(tmp_path / "class.plan", saliency=False)), open_plan(plan)
    found = compare(only, whole, images)
    assert (found.differing, found.spearman, found.top_overlap) == (0, None, None)
    only.close()
    whole.close()


def test_two_engines_of_one_file_are_compared(
    digits_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(digits_models["openvino"])
    main([model, model, "--data", "digits", "--images", "100", "--engine", "ort", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 100
    assert [engine.split()[0] for engine in found["engines"]] == ["openvino", "ort"]
    assert found["differing"] == 0
    assert found["largest_difference"] < 0.02
    assert found["spearman"] > 0.99
    main([model, model, "--data", "digits", "--images", "10", "--engine", "ort"])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("0 of 10 images in another class, logits differ by at most ")
    assert out[1].startswith("maps: Spearman ")


def test_models_of_other_classes_are_refused(gpu: FakeGpu, plan: Path, digits_models: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"engine.plan: not built from .*: inputs or classes differ; rebuild it$"):
        main([str(plan), str(digits_models["ort"]), "--data", "digits"])
    assert open_session(digits_models["ort"]).max_batch is None


def test_wrong_options_are_refused(plan: Path) -> None:
    with pytest.raises(OptionError, match=r"^--images 0: expected a whole number from 1$"):
        main([str(plan), "x.onnx", "--data", "digits", "--images", "0"])
