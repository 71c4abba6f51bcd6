"""Signatures of model files: who made a file, which its own checksum cannot tell.

A signature lies beside its model, `model.onnx.sig`: Ed25519 (RFC 8032), in base64, over the SHA-256 of the file
and that of its sidecar, where it has one. `python -m deploy.sign` writes it. The private key stays where models
are made; a device has the public one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from pathlib import Path
from typing import Any

from runtime.errors import ModelError, OptionError
from runtime.files import read_bytes

SUFFIX = ".sig"
_PURPOSE = b"clearpact signed model 1\n"


def signature_path(model: str | os.PathLike[str]) -> Path:
    """Return the path of a model's signature: `engine.plan.sig` of `engine.plan`."""
    model = Path(model)
    return model.with_name(model.name + SUFFIX)


def signed_message(model: bytes, sidecar: bytes | None) -> bytes:
    """Return what is signed of a model's contents and its sidecar's; None where it has none."""
    digests = [hashlib.sha256(model).digest(), b"" if sidecar is None else hashlib.sha256(sidecar).digest()]
    return _PURPOSE + b"".join(digests)


def check_signature(
    path: str | os.PathLike[str], model: bytes, sidecar: bytes | None, key: str | os.PathLike[str] | bytes
) -> None:
    """Refuse a model that the owner of a key did not sign.

    Args:
        path: of the model, beside which its signature lies.
        model: its contents, as they will be loaded.
        sidecar: contents of its sidecar; None where it has none.
        key: Ed25519 public key: path of a PEM file, or its contents.

    Raises:
        ModelError: there is no signature, or it is of other contents or by another key.
        FileError: the key or the signature cannot be read.
        OptionError: it is no such key, or the package `cryptography` is missing.
    """
    public = _public_key(key)
    beside = signature_path(path)
    if not beside.exists():
        raise ModelError(
            f"{path}: is not signed, expected {beside.name} beside it; sign it: python -m deploy.sign"
        )
    from cryptography.exceptions import InvalidSignature

    try:
        signature = base64.b64decode(read_bytes(beside).strip(), validate=True)
        public.verify(signature, signed_message(model, sidecar))
    except (InvalidSignature, binascii.Error):
        raise ModelError(
            f"{path}: its signature {beside.name} is by another key or of other contents than these; copy the "
            "model, its sidecar and its signature again, and do not run it before they fit"
        ) from None


def _public_key(key: str | os.PathLike[str] | bytes) -> Any:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError:
        raise OptionError("signatures need the package cryptography; pip install 'clearpact[sign]'") from None
    name = "key" if isinstance(key, bytes) else f"key {key}"
    contents = key if isinstance(key, bytes) else read_bytes(key)
    try:
        found = load_pem_public_key(contents)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        found = None
    if not isinstance(found, Ed25519PublicKey):
        raise OptionError(
            f"{name}: no Ed25519 public key in PEM; make one: python -m deploy.sign --new-key NAME.pem"
        )
    return found
