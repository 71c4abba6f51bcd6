from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.agreement import main
from bench.measure.streams import in_memory
from bench.networks.agreement import Spread, compare
from bench.networks.opened import exported_network
from runtime.errors import ModelError, OptionError
from runtime.explanations.agreement import spearman, top_overlap
from runtime.files import write_atomically
from tests.code_gate import with_code_gate
from tests.exports import exported
from tests.fake_cuda import FakeGpu
from tests.fake_tensorrt import CHANNELS, SIZE, write_plan
from train.checkpoint import Checkpoint
from train.data.images import ImageData


def test_the_spread_of_eleven_images() -> None:
    assert Spread.of(np.arange(11.0)[::-1]) == Spread(5.0, 5.0, 1.0, 0.0, 10)


def test_a_plan_agrees_with_itself_whatever_its_largest_batch(gpu: FakeGpu, plan: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (71, *SIZE, CHANNELS), np.uint8)
    first, second = (exported_network(plan, name) for name in ("first", "second"))
    found = compare(first, second, in_memory("random", images, np.zeros(71, np.int64)))
    assert (found.images, found.differing, found.largest_difference) == (71, 0, 0.0)
    assert found.spearman is not None
    assert found.top_overlap is not None
    assert found.spearman.least == pytest.approx(1)
    assert found.top_overlap.least == 1
    first.close()
    second.close()


def test_a_plan_of_classes_only_is_compared_in_its_logits(gpu: FakeGpu, plan: Path, tmp_path: Path) -> None:
    images = np.zeros((3, *SIZE, CHANNELS), np.uint8)
    images[:, 0] = 200
    with pytest.raises(ModelError, match="gives classes only; export it again without --no-saliency"):
        exported_network(write_plan(tmp_path / "class.plan", saliency=False), "class")
    only = exported_network(tmp_path / "class.plan", "class", classes_only=True)
    whole = exported_network(plan, "whole")
    found = compare(only, whole, in_memory("grey", images, np.zeros(3, np.int64)))
    assert (found.differing, found.spearman, found.top_overlap) == (0, None, None)
    with pytest.raises(ModelError, match="gives classes only"):
        only.explain(images, np.zeros(3, np.int64))
    only.close()
    whole.close()


def test_two_engines_of_one_file(digits_models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    model, engines = str(digits_models["openvino"]), ("--engine", "openvino", "--engine", "ort")
    main([model, model, "--data", "digits", "--images", "100", *engines, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 100
    assert [side["engine"].split()[0] for side in found["networks"]] == ["openvino", "ort"]
    assert found["differing"] == 0
    assert found["largest_difference"] < 0.02
    assert found["spearman"]["least"] > 0.99
    main([model, model, "--data", "digits", "--images", "10", *engines])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("A  ")
    assert ", int8, openvino " in out[0]
    assert out[2].startswith("0 of 10 images of digits in another class, logits differ by at most ")
    assert out[4].startswith("Spearman ")
    assert len(max(out[:6], key=len)) <= 100


def test_two_exports_differ_as_their_gates_do_in_torch(
    digits_checkpoint: Checkpoint, digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exported with --gate code and --gate ste, the maps of the true class against autograd's."""
    files = []
    for gate in ("code", "ste"):
        files.append(tmp_path / f"{gate}.onnx")
        found = exported(digits_checkpoint, target="openvino", gate=gate, saliency_precision="float32")
        write_atomically(files[-1], found.model.SerializeToString())
    record = tmp_path / "results.jsonl"
    main([*map(str, files), "--data", "digits", "--target", "true", "--allow-dirty", "--record", str(record)])
    recorded = json.loads(record.read_text())
    maps = []
    for network in (with_code_gate(digits_checkpoint.network()), digits_checkpoint.network()):
        x = digits_checkpoint.input.normalize(digits.test_images[:]).requires_grad_()
        chosen = network(x).gather(1, digits.test_labels[:, None])
        maps.append(torch.autograd.grad(chosen.sum(), x)[0].abs().amax(1).numpy())
    for name, expected in (("spearman", spearman(*maps)), ("top_overlap", top_overlap(*maps))):
        for key in ("mean", "median", "lowest_decile"):
            assert recorded[name][key] == pytest.approx(getattr(Spread.of(expected), key), abs=2e-3)
        assert 0.5 < recorded[name]["lowest_decile"] < recorded[name]["mean"] < 1
    out = capsys.readouterr().out.splitlines()
    assert out[3].startswith("maps of the true class ")
    assert out[4].split()[1:4] == [f"{recorded['spearman'][k]:.3f}" for k in ("mean", "median", "lowest_decile")]


def test_a_file_against_its_checkpoint_and_against_the_float_network(
    digits_checkpoint_path: Path, digits_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(digits_models["openvino"]), str(digits_checkpoint_path), "--data", "digits", "--json"]
    found = []
    for more in ((), ("--float",)):
        main([*command, *more])
        found.append(json.loads(capsys.readouterr().out))
    assert [row["networks"][1]["precision"] for row in found] == ["8 bit", "float"]
    assert found[0]["differing"] == 0
    assert 0.9 < found[1]["spearman"]["mean"] < found[0]["spearman"]["mean"] <= 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--images", "0"), "--images 0: expected a whole number from 1"),
        (("--threads", "0"), "--threads 0: expected a whole number from 1"),
        (("--engine", "ort") * 3, "--engine: given 3 times, expected once for both, or of A and of B"),
    ],
)
def test_wrong_options_are_refused(more: tuple[str, ...], message: str) -> None:
    with pytest.raises(OptionError, match=f"^{message}$"):
        main(["a.onnx", "b.onnx", "--data", "digits", *more])


def test_models_of_other_classes_are_refused(gpu: FakeGpu, plan: Path, digits_models: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match="trained on"):
        main([str(plan), str(digits_models["ort"]), "--data", "digits"])
