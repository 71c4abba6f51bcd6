"""Who explains: the input gradient of one checkpoint's network, by us and by PyTorch's ways to it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from bench.peers.names import OURS, OURS_WITH_MAP
from export.deploy_form import deploy_form
from export.pipeline import export
from runtime.classifier import Classifier
from runtime.errors import OptionError
from runtime.manifest import INPUT_NAME, TARGET_NAME
from train.checkpoint import Checkpoint


def explainers(checkpoint: Checkpoint, images: np.ndarray, *, threads: int) -> dict[str, Callable[[], object]]:
    """Return name -> function that gives logits and the input gradient of the predicted class.

    The opponents run the float network on images that are normalized already, which is less work than ours do; the
    class alone, INT8 on OpenVINO, is there to compare with.

    Raises:
        OptionError: Captum is not installed.
    """
    try:
        from captum.attr import Saliency
    except ImportError:
        raise OptionError("--explain compares with Captum; pip install 'clearpact[peers]'") from None
    network = deploy_form(checkpoint.network(), checkpoint.input, int8=False).network
    x = checkpoint.input.normalize(torch.from_numpy(images).permute(0, 3, 1, 2)).contiguous()
    saliency = Saliency(network)

    def with_captum() -> object:
        with torch.no_grad():
            target = network(x).argmax(1)
        return saliency.attribute(x.requires_grad_(), target)

    def autograd(model: Callable[[torch.Tensor], torch.Tensor]) -> object:
        leaf = x.detach().requires_grad_()
        logits = model(leaf)
        return logits, torch.autograd.grad(logits.amax(1).sum(), leaf)

    compiled = torch.compile(network)
    calls: dict[str, Callable[[], object]] = {
        "Captum Saliency": with_captum,
        "PyTorch autograd": functools.partial(autograd, network),
        "torch.compile autograd": functools.partial(autograd, compiled),
    }
    inputs: dict[str, np.ndarray] = {INPUT_NAME: images, TARGET_NAME: np.full(len(images), -1, np.int64)}
    for name, engine, int8, precision in (
        ("ONNX Runtime FP32 + map", "ort", False, "float32"),
        ("OpenVINO FP32 + map", "openvino", False, "float32"),
        ("ONNX Runtime INT8 + map", "ort", True, "float32"),
        ("OpenVINO INT8 + f32 map", "openvino", True, "float32"),
        (OURS_WITH_MAP, "openvino", True, "auto"),
    ):
        exported = export(checkpoint, int8=int8, target=engine, saliency_precision=precision)
        model = exported.model.SerializeToString()
        session = Classifier(model, engine=engine, threads=threads).session
        calls[name] = functools.partial(session.run, inputs, ("logits", "saliency"))
    calls[OURS] = functools.partial(session.run, {INPUT_NAME: images})
    return calls
