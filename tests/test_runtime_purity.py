"""What may be imported by whom, and how the entry modules start."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from runtime.command import USER_ERROR

ROOT = Path(__file__).parents[1]
STAGES = ("train", "export", "runtime", "bench", "deploy")
ENTRY_MODULES = sorted(
    path.relative_to(ROOT)
    for stage in STAGES
    for path in (ROOT / stage).rglob("*.py")
    # The console script starts others, and is no module to run: tests/test_runtime_console.py.
    if "\n    command.run(main)" in path.read_text() and path.name != "console.py"
)
each_entry = pytest.mark.parametrize("path", ENTRY_MODULES, ids=str)


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__main__").removesuffix(".__init__")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_every_entry_module_is_known() -> None:
    names = {module_name(path) for path in ENTRY_MODULES}
    assert names >= {"train", "train.data", "export.onnx", "runtime.classify", "bench.latency", "bench.accuracy",
                     "bench.compare", "bench.demo", "deploy.edge_app"}  # fmt: skip


def test_importing_runtime_loads_no_engine_and_no_other_stage() -> None:
    banned = ["torch", "torchvision", "onnx", "onnxruntime", "openvino", "PIL", "tqdm", "sklearn", "matplotlib",
              "train", "export", "bench", "deploy"]  # fmt: skip
    done = python("-c", f"import sys, runtime; print([m for m in {banned} if m in sys.modules])")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_every_module_of_runtime_but_the_engines_own_imports_with_numpy_alone(tmp_path: Path) -> None:
    site = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs"):
        if (site / name).exists():
            (tmp_path / name).symlink_to(site / name)
    (tmp_path / "runtime").symlink_to(ROOT / "runtime")
    modules = [module_name(p.relative_to(ROOT)) for p in (ROOT / "runtime").rglob("*.py")]
    sessions = {f"runtime.engines.{name}" for name in ("openvino", "ort", "tensorrt.session")}
    modules = sorted({*modules} - sessions)
    assert len(modules) >= 20
    code = f"import importlib\nfor name in {modules}: importlib.import_module(name)\nprint('imported')"
    done = python("-S", "-c", code, PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1", PYTHONSAFEPATH="1")
    assert (done.stdout, done.stderr) == ("imported\n", "")


@pytest.mark.parametrize("engine", ["openvino", "ort"])
def test_a_classifier_predicts_where_torch_onnx_and_train_cannot_be_imported(
    digits_models: dict[str, Path], engine: str
) -> None:
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "onnx", "train", "export", "PIL", "tqdm"):
            raise AssertionError(f"{{name}} was imported")
sys.meta_path.insert(0, Refuse())
import numpy as np
from runtime import Classifier
with Classifier({str(digits_models["openvino"])!r}, engine={engine!r}) as classifier:
    print(len(classifier.predict(np.zeros((3, 20, 20, 3), np.uint8))))
"""
    done = python("-c", code)
    assert (done.stdout, done.stderr) == ("3\n", "")


@each_entry
def test_a_module_run_as_a_plain_script_names_the_right_command(path: Path) -> None:
    done = python(str(path))
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr == f"run it as a module: python -m {module_name(path)}\n"


@each_entry
def test_help_shows_the_command_with_examples_of_options_that_exist(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = ".".join(path.with_suffix("").parts)
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(name).main(["--help"])
    assert caught.value.code == 0
    usage, examples = capsys.readouterr().out.split("examples:\n")
    assert usage.startswith(f"usage: python -m {module_name(path)} ")
    command = f"python -m {module_name(path)}"
    own = [line.split("#")[0].split() for line in examples.splitlines() if line.strip().startswith(command)]
    assert own
    known = set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", usage))
    assert {word for words in own for word in words[3:] if word.startswith("-")} <= known


@each_entry
def test_an_unknown_option_is_one_line_that_names_the_help(path: Path) -> None:
    module = importlib.import_module(".".join(path.with_suffix("").parts))
    from runtime.errors import OptionError

    with pytest.raises(OptionError, match=rf"; see python -m {module_name(path)} --help$") as caught:
        module.main(["--no-such-option"])
    assert "\n" not in str(caught.value)


def test_a_user_error_of_a_real_process_is_one_line_and_status_2() -> None:
    done = python("-m", "runtime.classify", "absent.onnx", "absent.png", "--top", "three")
    assert done.returncode == USER_ERROR
    assert done.stdout == ""
    assert done.stderr == (
        "error: argument --top: invalid int value: 'three'; see python -m runtime.classify --help\n"
    )


def test_help_of_a_real_process_leaves_with_status_0() -> None:
    done = python("-m", "runtime.classify", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "examples:" in done.stdout


def test_importing_the_openvino_engine_loads_numpys_interface_once_for_all_threads() -> None:
    # Left to two threads' first runs, OpenVINO's loading of it stopped the process in 2 of 4 trials.
    code = (
        "import numpy, runtime.engines.openvino as engine\n"
        "loads = []\n"
        "version = numpy.lib.NumpyVersion\n"
        "numpy.lib.NumpyVersion = lambda text: loads.append(text) or version(text)\n"
        "print(engine.openvino.Tensor(numpy.arange(3)).data.sum(), loads)"
    )
    done = python("-c", code)
    assert (done.stdout, done.stderr) == ("3 []\n", "")
