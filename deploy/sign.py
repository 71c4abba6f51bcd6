"""`python -m deploy.sign`: sign model files, so that a device runs no others."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m deploy.sign")

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime import command
from runtime.engines.tensorrt.plan import sidecar_path
from runtime.errors import FileError, OptionError
from runtime.files import read_bytes, write_atomically
from runtime.outputs import check_outputs
from runtime.session import is_plan
from runtime.signature import check_signature, signature_path, signed_message

EXAMPLES = """
  python -m deploy.sign --new-key maker.pem            # maker.pem stays here, maker.pub.pem goes to the devices
  python -m deploy.sign model.onnx --key maker.pem     # -> model.onnx.sig
  python -m deploy.sign engine.plan --key maker.pem    # the plan and its sidecar
  python -m deploy.sign model.onnx --check maker.pub.pem
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Make a pair of keys, sign files, or check their signatures."""
    parser = command.parser("deploy.sign", "Sign model files with Ed25519, or check their signatures.", EXAMPLES)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="ONNX files, or plans with their sidecars")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--new-key", type=Path, metavar="NAME.pem", help="make a private key and NAME.pub.pem")
    what.add_argument("--key", type=Path, metavar="NAME.pem", help="sign with this private key")
    what.add_argument("--check", type=Path, metavar="NAME.pub.pem", help="check with this public key")
    options = parser.parse_args(argv)
    if bool(options.models) == bool(options.new_key):
        raise OptionError("expected models to sign or to check, or --new-key alone; see --help")
    if options.new_key:
        print(f"{options.new_key}, {new_key(options.new_key)}")
        return
    check_outputs([signature_path(model) for model in options.models if options.key], inputs=options.models)
    for model in options.models:
        if options.key:
            print(sign(model, options.key))
        else:
            check_signature(model, *_contents(model), options.check)
            print(f"{model}: signed by the owner of {options.check}")


def sign(model: str | os.PathLike[str], key: Path) -> Path:
    """Write the signature of a model, with its sidecar, beside it.

    Raises:
        FileError: a file cannot be read or written.
        OptionError: `key` holds no Ed25519 private key, or the package `cryptography` is missing.
    """
    message = signed_message(*_contents(model))
    path = signature_path(model)
    write_atomically(path, base64.b64encode(_private_key(key).sign(message)) + b"\n")
    return path


def new_key(path: Path) -> Path:
    """Write a new private key, readable by its owner alone, and return where the public one is.

    Raises:
        FileError: one of the files is there, or cannot be written.
        OptionError: the package `cryptography` is missing.
    """
    serialization, ed25519 = _cryptography()
    public = path.with_name(f"{path.stem}.pub.pem")
    for made in (path, public):
        if made.exists():
            raise FileError(f"{made}: is there, and a key is not replaced; name another file")
    pair = ed25519.Ed25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    private = pair.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(private)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror}); name another file") from None
    write_atomically(public, pair.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return public


def _contents(model: str | os.PathLike[str]) -> tuple[bytes, bytes | None]:
    return read_bytes(model), read_bytes(sidecar_path(model)) if is_plan(model) else None


def _private_key(path: Path) -> Any:
    serialization, ed25519 = _cryptography()
    try:
        found = serialization.load_pem_private_key(read_bytes(path), password=None)
    except (ValueError, TypeError):
        found = None
    if not isinstance(found, ed25519.Ed25519PrivateKey):
        raise OptionError(
            f"--key {path}: no Ed25519 private key in PEM; make one: python -m deploy.sign --new-key"
        )
    return found


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise OptionError("signing needs the package cryptography; pip install 'clearpact[sign]'") from None
    return serialization, ed25519


if __name__ == "__main__":
    command.run(main)
