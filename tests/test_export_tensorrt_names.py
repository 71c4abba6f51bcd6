"""Every name of TensorRT's bindings that the code uses is there in every release it is meant for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tensorrt_names

# `make tensorrt-bindings` unpacks the wheels here; nothing is downloaded while tests run.
FOLDER = tensorrt_names.ROOT / "build" / "tensorrt-bindings"
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
# What the bindings' library wants of NVIDIA's: enough to import it, not to call anything.
STUBS = "".join(
    f"void *{name}(void) {{ return 0; }}\n"
    for name in (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "getBuilderPluginRegistry",
        "getNvOnnxParserVersion",
        "getPluginRegistry",
        "initLibNvInferPlugins",
    )
)


def test_the_names_are_read_from_the_source() -> None:
    names = tensorrt_names.names_of_the_builder()
    assert names >= {
        "Builder",
        "Builder.build_serialized_network",
        "BuilderFlag.GPU_FALLBACK",
        "HardwareCompatibilityLevel.AMPERE_PLUS",
        "IBuilderConfig.add_optimization_profile",
        "ILogger.Severity",
        "INetworkDefinition.num_inputs",
        "IOptimizationProfile.set_shape",
        "ITimingCache.serialize",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "ParserError.node_name",
    }
    assert tensorrt_names.used_names("trt.A.B.c(config.flag, x.y, f().z)") == {"A.B", "IBuilderConfig.flag"} | {
        "A"
    }


def test_the_names_of_running_are_read_from_the_source() -> None:
    names = tensorrt_names.names_of_the_session()
    assert names >= {
        "EngineInspector.get_engine_information",
        "ICudaEngine.create_execution_context",
        "ICudaEngine.get_tensor_profile_shape",
        "IExecutionContext.execute_async_v3",
        "IExecutionContext.profiler",
        "IExecutionContext.set_input_shape",
        "ILogger.INTERNAL_ERROR",
        "IProfiler.__init__",
        "LayerInformationFormat.JSON",
        "Runtime.DLA_core",
        "Runtime.deserialize_cuda_engine",
        "TensorIOMode.INPUT",
        "nptype",
    }


def test_tensorrt_rtx_has_every_name_that_the_code_uses() -> None:
    bindings = pytest.importorskip(
        "tensorrt_rtx_bindings", reason="no wheel of TensorRT-RTX here: pip install 'clearpact[tensorrt-aot]'"
    )
    names = tensorrt_names.names_of_the_builder() | tensorrt_names.names_of_the_session()
    assert list(tensorrt_names.missing(bindings, names)) == []
    assert list(tensorrt_names.missing(bindings, {"IBuilderConfig.no_such"})) == ["IBuilderConfig.no_such"]


@pytest.mark.slow
@pytest.mark.parametrize("release", ["10.3", "10.16", "11.4"])  # 10.3 is JetPack 6's
def test_tensorrt_has_every_name_that_the_code_uses(release: str, tmp_path: Path) -> None:
    found = sorted(FOLDER.glob(f"{release}.*"))
    if not found:
        pytest.skip(f"no bindings of TensorRT {release} in {FOLDER}: run `make tensorrt-bindings`")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the stubs of NVIDIA's libraries")
    (tmp_path / "stubs.c").write_text(STUBS)
    for library in LIBRARIES:
        name = f"lib{library}.so.{release.split('.')[0]}"
        shared = ["-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(tmp_path / name)]
        subprocess.run([compiler, *shared, str(tmp_path / "stubs.c")], check=True)
    done = subprocess.run(
        [sys.executable, str(Path(tensorrt_names.__file__)), str(found[-1])],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    # What is missing in 10.3 and used where it is there.
    refused = (
        "refused: --hardware same-compute-capability: TensorRT 10.3.0 has no such plans (10.16 has); leave it out"
    )
    expected = [found[-1].name, *([refused] if release == "10.3" else [])]
    assert (done.stdout.splitlines(), done.stderr, done.returncode) == (expected, "", 0)
