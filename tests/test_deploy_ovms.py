"""A repository for OpenVINO Model Server, loaded in OpenVINO as the server would, and its client over HTTP."""

from __future__ import annotations

import json
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy import kserve
from deploy.ovms import main
from runtime import Classifier
from runtime.errors import EngineError, FileError, ModelError, OptionError
from runtime.manifest import Manifest, read_manifest
from train.data.images import ImageData

openvino = pytest.importorskip("openvino", reason="no OpenVINO here: pip install 'clearpact[openvino]'")
# What src/schema.cpp of the server allows in an entry, as far as it is written here.
KINDS = {"name": str, "base_path": str, "target_device": str, "shape": dict, "nireq": int, "plugin_config": dict}


class ModelServer:
    """Reads config.json and answers requests of protocol 2 as the server does, by OpenVINO itself."""

    def __init__(self, repository: Path) -> None:
        self.models, self.core = {}, openvino.Core()
        config = json.loads((repository / "config.json").read_text())
        assert config.keys() == {"model_config_list"}
        for entry in config["model_config_list"]:
            assert entry.keys() == {"config"}
            self.models[entry["config"]["name"]] = self.loaded(repository, **entry["config"])
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                try:
                    head, content = server.answer(self.path, body, int(self.headers[kserve._HEAD_LENGTH]))
                except LookupError as error:
                    head, content = json.dumps({"error": str(error)}).encode(), b""
                    self.send_response(404)
                else:
                    self.send_response(200)
                    self.send_header(kserve._HEAD_LENGTH, str(len(head)))
                self.send_header("Content-Length", str(len(head) + len(content)))
                self.end_headers()
                self.wfile.write(head + content)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def loaded(self, repository: Path, **config: Any) -> Any:
        assert {name: type(value) for name, value in config.items()} == KINDS
        versions = [p for p in (repository / config["base_path"]).iterdir() if p.is_dir()]
        (file,) = max(versions, key=lambda p: int(p.name)).glob("*.onnx")
        model = self.core.read_model(file)
        inputs = {port.get_any_name(): port for port in model.inputs}
        assert inputs.keys() == config["shape"].keys()
        model.reshape({inputs[name]: json.loads(f"[{shape[1:-1]}]") for name, shape in config["shape"].items()})
        assert config["nireq"] >= int(config["plugin_config"]["NUM_STREAMS"])
        compiled = self.core.compile_model(model, config["target_device"], config["plugin_config"])
        assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
        return compiled

    def answer(self, path: str, body: bytes, head_bytes: int) -> tuple[bytes, bytes]:
        found = re.fullmatch(r"/v2/models/([\w.-]+)/infer", path)
        assert found, path
        if found[1] not in self.models:
            raise LookupError("Model with requested name is not found")
        request = json.loads(body[:head_bytes])
        inputs, at = {}, head_bytes
        for tensor in request["inputs"]:
            size = tensor["parameters"]["binary_data_size"]
            dtype = {"UINT8": np.uint8, "INT64": np.int64}[tensor["datatype"]]
            inputs[tensor["name"]] = np.frombuffer(body[at : at + size], dtype).reshape(tensor["shape"])
            at += size
        assert at == len(body)
        computed = self.models[found[1]](inputs)
        wanted = [output["name"] for output in request["outputs"]]
        arrays = [computed[name].astype(np.float32) for name in wanted]
        outputs = [{"name": name, "shape": list(array.shape), "datatype": "FP32",
                    "parameters": {"binary_data_size": array.nbytes}}
                   for name, array in zip(wanted, arrays, strict=True)]  # fmt: skip
        head = json.dumps({"model_name": found[1], "outputs": outputs}).encode()
        return head, b"".join(array.tobytes() for array in arrays)


def made(model: Path, repository: Path) -> Path:
    main([str(model), "--repository", str(repository), "--name", "explained"])
    main(
        [str(model), "--repository", str(repository), "--name", "digits", "--outputs", "logits", "--streams", "2"]
    )
    return repository


@pytest.fixture
def repository(digits_models: dict[str, Path], tmp_path: Path) -> Path:
    return made(digits_models["openvino"], tmp_path / "models")


@pytest.fixture(scope="module")
def served(
    digits_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ModelServer, Path]]:
    repository = made(digits_models["openvino"], tmp_path_factory.mktemp("served") / "models")
    server = ModelServer(repository)
    yield server, repository
    server.http.shutdown()
    server.http.server_close()


def test_the_repository_has_the_servers_layout(repository: Path) -> None:
    files = sorted(path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file())
    assert files == ["config.json", "digits/1/model.onnx", "digits/manifest.json", "explained/1/model.onnx",
                     "explained/manifest.json"]  # fmt: skip
    explained, digits = json.loads((repository / "config.json").read_text())["model_config_list"]
    assert explained["config"]["shape"] == {"image": "(1,8,8,1)", "target": "(1)"}
    assert digits["config"]["shape"] == {"image": "(1,8,8,1)"}
    assert digits["config"]["plugin_config"] == {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": "2"}
    assert (repository / "digits/1/model.onnx").stat().st_size < (
        repository / "explained/1/model.onnx"
    ).stat().st_size


def test_a_client_gets_the_class_and_the_map_of_the_classifier(
    served: tuple[ModelServer, Path], digits_models: dict[str, Path], digits: ImageData
) -> None:
    server, repository = served
    manifest = Manifest.from_json((repository / "explained" / "manifest.json").read_text(), "manifest.json")
    assert manifest == read_manifest(digits_models["openvino"].read_bytes(), "model")
    with Classifier(digits_models["openvino"]) as classifier:
        for n in range(6):
            # Larger than the model's image: the client resizes as the classifier does.
            image = np.kron(digits.test_images[n, 0].numpy(), np.ones((3, 3), np.uint8))
            expected, why = classifier.predict(image), classifier.explain(image)
            label, probability, map = kserve.classify(server.address, "explained", image, manifest, map="saliency")
            assert (label, probability) == (expected.label, pytest.approx(expected.probability, abs=1e-5))
            assert map is not None
            np.testing.assert_allclose(map, np.abs(why.attribution).max(0), atol=1e-5)
            assert kserve.classify(server.address, "digits", image, manifest) == (
                expected.label, pytest.approx(expected.probability, abs=1e-5), None,
            )  # fmt: skip


def test_a_server_without_the_binary_extension_is_understood() -> None:
    answer = {"outputs": [{"name": "logits", "shape": [1, 3], "datatype": "FP32", "data": [0.5, -1, 2]}]}
    content = json.dumps(answer).encode()
    np.testing.assert_array_equal(kserve._tensors(content, len(content))["logits"], [[0.5, -1, 2]])


def test_what_a_server_refuses_is_one_line(
    served: tuple[ModelServer, Path], digits_models: dict[str, Path]
) -> None:
    server, _ = served
    manifest = read_manifest(digits_models["openvino"].read_bytes(), "model")
    image = np.zeros((8, 8), np.uint8)
    with pytest.raises(
        EngineError, match=rf"^{server.address}: refuses the request for other \(404: Model with req"
    ):
        kserve.classify(server.address, "other", image, manifest)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(EngineError, match=rf"^{nobody}: does not answer \(.*refused\); check the address"):
        kserve.classify(nobody, "digits", image, manifest)


@pytest.mark.parametrize("content", [b"<html>", b"{}", b'{"outputs": [{"name": "logits"}]}', b"[]"])
def test_another_protocol_is_told(content: bytes) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
        with pytest.raises(EngineError, match="the answer is not KServe's protocol 2; check that the port"):
            kserve.infer(f"http://127.0.0.1:{http.server_address[1]}", "m", {"image": np.zeros(1, np.uint8)}, [])
        http.shutdown()


def test_a_model_that_is_there_is_left_alone(repository: Path, digits_models: dict[str, Path]) -> None:
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    with pytest.raises(
        FileError, match=r"models/digits: is there already; remove it first, or give another --name$"
    ):
        main([str(digits_models["openvino"]), "--repository", str(repository), "--name", "digits"])
    assert before == {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}


def test_a_removed_model_takes_its_place_again_and_others_entries_stay(
    repository: Path, digits_models: dict[str, Path]
) -> None:
    config = repository / "config.json"
    edited = json.loads(config.read_text())
    edited["mediapipe_config_list"] = [{"name": "other"}]
    config.write_text(json.dumps(edited))
    shutil.rmtree(repository / "digits")
    main([str(digits_models["openvino"]), "--repository", str(repository), "--name", "digits", "--batch", "4"])
    written = json.loads(config.read_text())
    assert written["mediapipe_config_list"] == [{"name": "other"}]
    assert [entry["config"]["name"] for entry in written["model_config_list"]] == ["explained", "digits"]
    assert written["model_config_list"][1]["config"]["shape"] == {"image": "(4,8,8,1)", "target": "(4)"}


def test_another_programs_config_is_left_alone(digits_models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"models": []}')
    with pytest.raises(
        FileError, match=r"config.json: no configuration of OpenVINO Model Server, expected model_c"
    ):
        main([str(digits_models["openvino"]), "--repository", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ["--outputs", "saliency"],
            OptionError,
            "^outputs saliency: expected logits, and any of saliency, gradient$",
        ),
        (["--outputs", "logits,heat"], OptionError, "^outputs logits,heat: expected logits"),
        (["--batch", "0"], OptionError, "^--batch 0: expected a whole number from 1$"),
        (["--streams", "-1"], OptionError, "^--streams -1: expected a whole number from 1$"),
        (["--name", "../up"], OptionError, "^--name '../up': expected letters, digits"),
        (["--name", ".."], OptionError, "^--name '..': expected letters, digits"),
        (["--name", "config.json"], OptionError, "^--name 'config.json': expected"),
    ],
)
def test_wrong_options_are_refused(
    digits_models: dict[str, Path], tmp_path: Path, arguments: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        main([str(digits_models["openvino"]), "--repository", str(tmp_path), *arguments])
    assert list(tmp_path.iterdir()) == []


def test_a_file_for_another_engine_is_refused(digits_models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"ort.onnx: exported for ort, expected openvino; export it again with"):
        main([str(digits_models["ort"]), "--repository", str(tmp_path)])
