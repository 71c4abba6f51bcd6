"""What both engines must do alike. Measured: on digits_checkpoint, a CPU with AVX-512 and AMX."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
import torch

from export.deploy_form import FoldedQuantizer, deploy_form, folded_layers
from runtime import ClearpactError
from runtime.engines import ort
from runtime.engines.compiled_cache import CompiledCache
from runtime.engines.openvino import _MAX_SHAPES, float_precision
from runtime.errors import EngineError, FileError, ModelError, OptionError
from runtime.session import ENGINES, Session, open_session
from train.checkpoint import Checkpoint
from train.data.images import ImageData

ROOT = Path(__file__).parents[1]
BOTH = pytest.mark.parametrize("engine", ["openvino", "ort"])


@pytest.fixture(scope="module")
def images(digits: ImageData) -> np.ndarray:
    return digits.test_images.permute(0, 2, 3, 1).contiguous().numpy()


@pytest.fixture(scope="module")
def trained_logits(digits_checkpoint: Checkpoint, digits: ImageData) -> np.ndarray:
    with torch.no_grad():
        return digits_checkpoint.network()(digits_checkpoint.input.normalize(digits.test_images)).numpy()


@pytest.fixture(scope="module")
def last_layer(digits_checkpoint: Checkpoint) -> tuple[float, np.ndarray]:
    """Scale of the last layer's input, and the value of one step of its accumulator [K]."""
    form = deploy_form(digits_checkpoint.network(), digits_checkpoint.input)
    scale = [m for m in form.network.modules() if isinstance(m, FoldedQuantizer)][-1].scale
    weight_scale = list(folded_layers(form).values())[-1].scale
    assert weight_scale is not None
    return float(scale), (scale * weight_scale).numpy()


def run(session: Session, images: np.ndarray) -> np.ndarray:
    return session.run({"image": images})["logits"]


@BOTH
@pytest.mark.parametrize("name", ["openvino", "ort", "float"])
def test_every_engine_gives_the_checkpoints_class_on_all_test_images(
    digits_models: dict[str, Path], trained_logits: np.ndarray, images: np.ndarray, name: str, engine: str
) -> None:
    logits = run(open_session(digits_models[name], engine=engine), images)
    assert logits.dtype == np.float32
    assert logits.shape == (360, 10)
    differing = np.count_nonzero(logits.argmax(1) != trained_logits.argmax(1))
    # The float file leaves out the rounding that the network was trained with.
    assert differing <= (2 if name == "float" else 0)


@pytest.mark.parametrize("name", ["openvino", "ort"])
def test_openvino_has_the_trained_networks_accumulators_on_all_but_one_image_in_a_hundred(
    digits_models: dict[str, Path], trained_logits: np.ndarray, images: np.ndarray,
    last_layer: tuple[float, np.ndarray], name: str,
) -> None:  # fmt: skip
    # Less than half a step apart names one whole number: the last accumulators are equal. What remains is the
    # order of float additions, 0.14 steps at most. An image next to a tie may have another code further in front,
    # then a logit is hundreds of steps off; measured: none or 1 of 360, by the trained weights; nothing between.
    logits = run(open_session(digits_models[name], engine="openvino"), images)
    steps = (np.abs(logits - trained_logits) / last_layer[1]).max(1)
    assert np.mean(steps >= 0.5) <= 0.01
    assert steps.max() < 10 * 127
    assert np.median(steps) < 0.1


@pytest.mark.parametrize("name", ["openvino", "ort"])
def test_onnx_runtime_differs_on_few_images_and_by_few_codes(
    digits_models: dict[str, Path], trained_logits: np.ndarray, images: np.ndarray,
    last_layer: tuple[float, np.ndarray], digits_checkpoint: Checkpoint, name: str,
) -> None:  # fmt: skip
    # Its fused kernels now and then round a code next to a tie the other way; one code of the last layer's input
    # moves a logit by up to 127 steps. Measured: 17 % of the images differ, by 758 steps (0.018) at most.
    difference = np.abs(run(open_session(digits_models[name], engine="ort"), images) - trained_logits)
    steps = difference / last_layer[1]
    assert np.mean(steps.max(1) > 1) < 0.3
    assert steps.max() < 10 * 127
    assert np.median(steps) < 0.1


@BOTH
def test_outputs_are_memory_of_their_own(digits_models: dict[str, Path], images: np.ndarray, engine: str) -> None:
    session = open_session(digits_models["openvino"], engine=engine)
    first = run(session, images[:1])
    kept = first.copy()
    assert not np.array_equal(run(session, images[1:2]), kept)
    assert np.array_equal(first, kept)


@BOTH
def test_the_input_is_left_as_it_was_and_may_be_read_only(
    digits_models: dict[str, Path], images: np.ndarray, engine: str
) -> None:
    session = open_session(digits_models["openvino"], engine=engine)
    frozen = images[:4].copy()
    frozen.flags.writeable = False
    assert np.array_equal(run(session, frozen), run(session, images[:4].copy()))
    assert np.array_equal(frozen, images[:4])


def test_openvino_keeps_a_static_shape_for_each_of_the_batch_sizes_used_last(
    digits_models: dict[str, Path], images: np.ndarray
) -> None:
    session = open_session(digits_models["openvino"], engine="openvino")
    expected = run(session, images[:1])
    for batch in [*range(1, _MAX_SHAPES + 4), 1, 2, 20, 3]:
        logits = run(session, images[:batch])
        assert logits.shape == (batch, 10)
        assert np.allclose(logits[:1], expected, atol=1e-4)
    kept = [batch for batch, _ in session._variants]  # type: ignore[attr-defined]
    assert len(kept) == _MAX_SHAPES
    assert {1, 2, 20, 3, _MAX_SHAPES + 3} <= set(kept)
    assert 0 not in kept


@BOTH
def test_eight_threads_that_meet_new_batch_sizes_together_get_the_single_threaded_results(
    digits_models: dict[str, Path], images: np.ndarray, engine: str
) -> None:
    sizes = list(range(1, 9))
    reference = open_session(digits_models["openvino"], engine=engine, threads=1)
    expected = {size: run(reference, images[size : 2 * size]) for size in sizes}
    session = open_session(digits_models["openvino"], engine=engine, threads=1)
    start = threading.Barrier(8)
    wrong: list[object] = []

    def work(first: int) -> None:
        start.wait()
        try:
            for turn in range(40):
                size = sizes[(first + turn) % len(sizes)]
                found = run(session, images[size : 2 * size])
                # One engine may add floats in another order in a kernel for another batch size: a few ulps.
                if not np.allclose(found, expected[size], rtol=0, atol=1e-5):
                    wrong.append((size, found))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@BOTH
def test_a_closed_session_says_so_and_closes_again_in_silence(
    digits_models: dict[str, Path], images: np.ndarray, engine: str
) -> None:
    session = open_session(digits_models["openvino"], engine=engine)
    run(session, images[:1])
    session.close()
    session.close()
    for batch in (1, 2):
        with pytest.raises(EngineError, match=r"openvino.onnx: the model is closed; open it again$"):
            run(session, images[:batch])


@BOTH
def test_closing_while_others_run_gives_results_or_the_closed_error(
    digits_models: dict[str, Path], images: np.ndarray, engine: str
) -> None:
    session = open_session(digits_models["openvino"], engine=engine, threads=1)
    expected = run(session, images[:3])
    unexpected: list[object] = []
    running = threading.Barrier(5)

    def work() -> None:
        assert np.array_equal(run(session, images[:3]), expected)
        running.wait()
        try:
            while np.array_equal(found := run(session, images[:3]), expected):
                pass
            unexpected.append(found)
        except EngineError as error:
            if "closed" not in str(error):
                unexpected.append(error)
        except Exception as error:
            unexpected.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    running.wait()
    session.close()
    for thread in threads:
        thread.join()
    assert unexpected == []


def test_the_engine_is_the_one_the_file_was_made_for(digits_models: dict[str, Path]) -> None:
    engines = {name: open_session(path).engine for name, path in digits_models.items()}
    assert engines == {"openvino": "openvino", "ort": "ort", "tensorrt": "openvino", "float": "openvino"}


def test_a_session_states_engine_version_and_device(digits_models: dict[str, Path]) -> None:
    import onnxruntime

    session = open_session(digits_models["ort"], device="CPU", threads=2)
    assert (session.engine, session.version, session.device) == ("ort", onnxruntime.__version__, "cpu")
    assert session.manifest.target == "ort"


def test_an_unknown_engine_is_refused_with_the_known_ones(digits_models: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match=r"^engine 'tflite': expected one of openvino, ort$"):
        open_session(digits_models["ort"], engine="tflite")


@pytest.mark.parametrize(("engine", "name"), [("openvino", "OpenVINO"), ("ort", "ONNX Runtime")])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(
    digits_models: dict[str, Path], engine: str, name: str
) -> None:
    with pytest.raises(EngineError, match=f"^device 'abacus': {name} does not find it; expected one of: .*cpu"):
        open_session(digits_models["ort"], engine=engine, device="abacus")


@BOTH
@pytest.mark.parametrize("threads", [0, -1])
def test_less_than_one_thread_is_refused(digits_models: dict[str, Path], engine: str, threads: int) -> None:
    with pytest.raises(OptionError, match=f"^threads {threads}: expected a whole number from 1$"):
        open_session(digits_models["ort"], engine=engine, threads=threads)


@BOTH
def test_a_missing_file_and_a_folder_are_file_errors(tmp_path: Path, engine: str) -> None:
    with pytest.raises(FileError, match=r"absent.onnx: no such file; check the path$"):
        open_session(tmp_path / "absent.onnx", engine=engine)
    with pytest.raises(FileError, match=f"^{tmp_path}: is a folder, expected a file"):
        open_session(tmp_path, engine=engine)


@BOTH
def test_a_manifest_on_a_graph_that_the_engine_cannot_load_is_one_line(
    digits_models: dict[str, Path], engine: str
) -> None:
    model = onnx.load(digits_models["openvino"])
    model.graph.node[0].op_type = "Nonsense"
    name = "OpenVINO cannot read it" if engine == "openvino" else "ONNX Runtime cannot load it"
    with pytest.raises(ModelError, match=rf"^model bytes: {name} \(.*\); export it") as caught:
        open_session(model.SerializeToString(), engine=engine)
    assert "\n" not in str(caught.value)


@BOTH
def test_a_model_cut_off_in_its_last_field_is_never_loaded_wrongly(
    digits_models: dict[str, Path], images: np.ndarray, engine: str
) -> None:
    data = digits_models["openvino"].read_bytes()
    expected = run(open_session(data, engine=engine), images[:4])
    for length in [*range(0, len(data), len(data) // 40), *range(len(data) - 20, len(data))]:
        try:
            found = run(open_session(data[:length], engine=engine), images[:4])
        except ClearpactError:
            continue
        assert np.array_equal(found, expected), length


def _bare(folder: Path, *packages: str) -> dict[str, str]:
    """Make a place where only `runtime` and some packages can be imported; return the environment that uses it."""
    site = Path(np.__file__).parents[1]
    for package in ("numpy", *packages):
        (folder / package).symlink_to(site / package)
    if (site / "numpy.libs").exists():
        (folder / "numpy.libs").symlink_to(site / "numpy.libs")
    (folder / "runtime").symlink_to(ROOT / "runtime")
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def _bare_python(code: str, folder: Path, *packages: str, arguments: tuple[str, ...] = ()) -> str:
    # -S: no site-packages.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, *arguments],
        env=_bare(folder, *packages), cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


OPEN = """
import sys
from runtime.session import open_session
from runtime.errors import EngineError
try:
    print(open_session(sys.argv[1], engine=sys.argv[2] or None).engine)
except EngineError as error:
    print(error)
"""


@pytest.mark.parametrize("engine", list(ENGINES))
def test_an_engine_that_is_not_installed_is_named_with_the_command_that_installs_it(
    digits_models: dict[str, Path], tmp_path: Path, engine: str
) -> None:
    package = ENGINES[engine][1]
    found = _bare_python(OPEN, tmp_path, arguments=(str(digits_models["ort"]), engine))
    assert found == f"engine {engine}: {package} is not installed; pip install 'clearpact[{engine}]'\n"


def test_without_any_engine_the_error_names_all_that_could_be_installed(
    digits_models: dict[str, Path], tmp_path: Path
) -> None:
    assert _bare_python(OPEN, tmp_path, arguments=(str(digits_models["ort"]), "")) == (
        "no inference engine is installed, expected one of openvino, ort; "
        "pip install 'clearpact[openvino]' or 'clearpact[ort]'\n"
    )


def test_where_the_files_own_engine_is_missing_the_installed_one_runs_it(
    digits_models: dict[str, Path], tmp_path: Path
) -> None:
    assert _bare_python(OPEN, tmp_path, "openvino", arguments=(str(digits_models["ort"]), "")) == "openvino\n"


def test_an_engine_whose_package_is_broken_is_one_line(digits_models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise ImportError('libfoo.so.1: cannot open')")
    assert _bare_python(OPEN, tmp_path, arguments=(str(digits_models["ort"]), "")) == (
        "engine ort: onnxruntime is installed but cannot be loaded (libfoo.so.1: cannot open); "
        "pip install --force-reinstall 'clearpact[ort]'\n"
    )


def test_the_engines_own_options_reach_it(digits_models: dict[str, Path], images: np.ndarray) -> None:
    model = digits_models["openvino"]
    expected = run(open_session(model), images[:5])
    half = open_session(model, options={"INFERENCE_PRECISION_HINT": "bf16"})
    (variant,) = half._variants.values()  # type: ignore[attr-defined]
    assert variant._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "bf16"
    assert np.allclose(run(half, images[:5]), expected, atol=0.5)
    for providers in (["CPUExecutionProvider"], [("CPUExecutionProvider", {})]):
        session = open_session(model, engine="ort", providers=providers)
        assert session.device == "cpu"
        assert (run(session, images[:5]).argmax(1) == expected.argmax(1)).all()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"options": {"NO_SUCH": 1}},
            EngineError,
            r"does not compile it for cpu \(NotFound: Unsupported property NO",
        ),
        (
            {"options": {"INFERENCE_PRECISION_HINT": "f17"}},
            EngineError,
            r"\(Wrong value f17 for property .*\); check",
        ),
        (
            {"engine": "ort", "options": {"threads": 1}},
            OptionError,
            "^option 'threads': ONNX Runtime has none on the",
        ),
        (
            {"providers": ["CPUExecutionProvider"]},
            OptionError,
            "^providers are ONNX Runtime's, in place of a device",
        ),
        ({"engine": "ort", "device": "cpu", "providers": ["A"]}, OptionError, "^providers are ONNX Runtime's"),
        (
            {"engine": "ort", "providers": ["ROCMExecutionProvider"]},
            EngineError,
            "^provider 'ROCMExecutionProvider': O",
        ),
        ({"engine": "ort", "providers": []}, OptionError, "^providers: none given"),
        ({"engine": "ort", "device": "cuda:x"}, EngineError, "^device 'cuda:x': ONNX Runtime does not find it"),
        ({"engine": "ort", "device": "cpu:1"}, EngineError, "^device 'cpu:1': ONNX Runtime does not find it"),
    ],
)
def test_wrong_options_of_an_engine_are_one_line_at_opening(
    digits_models: dict[str, Path], given: dict[str, Any], error: type[ClearpactError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        open_session(digits_models["openvino"], **given)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="the plugin of the NPU is part of the wheel for Linux")
def test_float_islands_compute_in_what_the_device_has() -> None:
    # OpenVINO's own plugin says so, without an NPU.
    core = openvino.Core()
    assert float_precision(core, "npu") == {"INFERENCE_PRECISION_HINT": "f16"}
    assert float_precision(core, "cpu") == {"INFERENCE_PRECISION_HINT": "f32"}
    assert float_precision(core, "no_such") == {}


def test_tensorrt_in_onnx_runtime_gets_the_files_precision_and_keeps_its_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort.onnxruntime, "get_available_providers", lambda: names)
    folder = tmp_path / "cache"
    (first, ours), (second, rest) = ort._device_providers("tensorrt:1", "int8", CompiledCache(folder), {})
    assert [first, second] == names[:2]
    assert ours == {
        "device_id": "1", "trt_fp16_enable": "1", "trt_int8_enable": "1",
        "trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1", "trt_timing_cache_path": str(folder),
    }  # fmt: skip
    assert rest == {"device_id": "1"}
    assert folder.stat().st_mode & 0o777 == 0o700
    (_, ours), _ = ort._device_providers("tensorrt", "fp32", None, {"trt_fp16_enable": False})
    assert ours == {"trt_fp16_enable": "0", "trt_int8_enable": "0"}
    assert ort._device_providers("cuda", "int8", None, {"device_id": 2}) == [(names[1], {"device_id": "2"})]
