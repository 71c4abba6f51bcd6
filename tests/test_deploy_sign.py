"""Signed files, on real keys: what was signed is run, and nothing else is."""

from __future__ import annotations

import base64
import shutil
from pathlib import Path

import numpy as np
import pytest

from deploy.sign import main
from runtime import Classifier
from runtime.engines.tensorrt.plan import sidecar_path
from runtime.errors import FileError, ModelError, OptionError
from runtime.session import open_session
from runtime.signature import signature_path
from tests.fake_cuda import FakeGpu
from tests.fake_tensorrt import images


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs of keys: ours and theirs."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        main(["--new-key", str(folder / f"{name}.pem")])
    return folder


@pytest.fixture
def model(digits_models: dict[str, Path], tmp_path: Path, keys: Path) -> Path:
    """A signed ONNX file."""
    path = tmp_path / "model.onnx"
    shutil.copy(digits_models["ort"], path)
    main([str(path), "--key", str(keys / "ours.pem")])
    return path


def test_a_signed_file_runs_and_one_that_was_altered_does_not(model: Path, keys: Path) -> None:
    public = keys / "ours.pub.pem"
    for key in (public, str(public), public.read_bytes()):
        assert Classifier(model, key=key).predict(np.zeros((8, 8), np.uint8)).label
    main([str(model), "--check", str(public)])
    altered = bytearray(model.read_bytes())
    altered[-1] ^= 1
    model.write_bytes(altered)
    refused = r"model.onnx: its signature model.onnx.sig is by another key or of other contents than these"
    with pytest.raises(ModelError, match=refused):
        Classifier(model, key=public)
    with pytest.raises(ModelError, match=refused):
        main([str(model), "--check", str(public)])


@pytest.mark.parametrize(
    "damaged", [b"", b"not base64 \xff", base64.b64encode(b"short"), base64.b64encode(bytes(64))]
)
def test_what_is_no_signature_of_ours_is_refused(model: Path, keys: Path, damaged: bytes) -> None:
    with pytest.raises(ModelError, match=r"is by another key or of other contents"):
        Classifier(model, key=keys / "theirs.pub.pem")
    signature_path(model).write_bytes(damaged)
    with pytest.raises(ModelError, match=r"is by another key or of other contents"):
        Classifier(model, key=keys / "ours.pub.pem")
    signature_path(model).unlink()
    with pytest.raises(ModelError, match=r"model.onnx: is not signed, expected model.onnx.sig beside it; sign it"):
        Classifier(model, key=keys / "ours.pub.pem")
    Classifier(model)  # without a key nothing is asked for


def test_a_plan_is_signed_with_its_sidecar(gpu: FakeGpu, plan: Path, keys: Path) -> None:
    main([str(plan), "--key", str(keys / "ours.pem")])
    with Classifier(plan, key=keys / "ours.pub.pem") as classifier:
        classifier.predict(images(1)[0])
    sidecar = sidecar_path(plan)
    sidecar.write_text(sidecar.read_text().replace('"version_compatible": false', '"version_compatible": true'))
    calls = len(gpu.calls)
    with pytest.raises(
        ModelError, match=r"engine.plan: its signature engine.plan.sig is by another key or of other"
    ):
        Classifier(plan, key=keys / "ours.pub.pem", version_compatible=True)
    assert len(gpu.calls) == calls


def test_keys_are_private_and_never_replaced(keys: Path, tmp_path: Path) -> None:
    assert (keys / "ours.pem").stat().st_mode & 0o777 == 0o600
    assert b"PRIVATE" not in (keys / "ours.pub.pem").read_bytes()
    with pytest.raises(FileError, match=r"ours.pem: is there, and a key is not replaced"):
        main(["--new-key", str(keys / "ours.pem")])
    (tmp_path / "half.pub.pem").touch()
    with pytest.raises(FileError, match=r"half.pub.pem: is there"):
        main(["--new-key", str(tmp_path / "half.pem")])
    assert not (tmp_path / "half.pem").exists()


def test_wrong_keys_and_options_are_refused(model: Path, keys: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.pem").write_text("no key")
    for key in (tmp_path / "notes.pem", keys / "ours.pem", b"no key"):
        with pytest.raises(OptionError, match=r": no Ed25519 public key in PEM"):
            Classifier(model, key=key)
    for key in (tmp_path / "notes.pem", keys / "ours.pub.pem"):
        with pytest.raises(OptionError, match=r"^--key .*: no Ed25519 private key in PEM"):
            main([str(model), "--key", str(key)])
    with pytest.raises(FileError, match=r"absent.pem: no such file"):
        Classifier(model, key=tmp_path / "absent.pem")
    with pytest.raises(OptionError, match=r"^key: the signature of model bytes is nowhere"):
        open_session(model.read_bytes(), key=keys / "ours.pub.pem")
    with pytest.raises(OptionError, match=r"^version_compatible is for plans on a GPU"):
        open_session(model, version_compatible=True)
    for arguments in (["--key", "a.pem"], [str(model), "--new-key", "a.pem"]):
        with pytest.raises(OptionError, match=r"^expected models to sign or to check"):
            main(arguments)
