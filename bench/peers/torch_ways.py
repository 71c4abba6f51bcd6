"""PyTorch's ways to classify and to explain with the float network of a checkpoint, on the CPU and on CUDA.

All take pixels in host memory and give results in host memory, normalize with constants that lie on the device,
and run one after the other. Besides plain PyTorch there is what its tuning guide and NVIDIA's recommend: autocast
to float16 with weights in it, channels last, CUDA graphs, torch.compile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.deploy_form import deploy_form
from runtime.errors import EngineError
from train.checkpoint import Checkpoint
from train.input_spec import InputSpec

INSTALL_PEERS = "pip install 'clearpact[peers]'"

_GRAPH_WARM_UPS = 3  # on a stream of their own, before CUDA records: cuDNN searches, memory is allocated

Run = Callable[[Tensor], tuple[Tensor, ...]]
"""Pixels uint8 [N, H, W, C] on the device -> results float32 there."""


@dataclass(frozen=True)
class TorchWay:
    """How PyTorch is set up.

    Args:
        precision: "float32", or what autocast computes in; the weights then have it, too.
        channels_last: convolutions in the layout that tensor cores, and the pixels, have.
        compiled: mode of torch.compile, "" for eager execution.
        cuda_graph: what one run launches is recorded for each shape, and launched at once.
        captum: explain by Captum's Saliency, not by one forward and one backward pass.
    """

    precision: str = "float32"
    channels_last: bool = False
    compiled: str = ""
    cuda_graph: bool = False
    captum: bool = False


WAYS = {
    "eager": TorchWay(),
    "captum": TorchWay(captum=True),
    "compiled": TorchWay(compiled="default"),
    "graph": TorchWay(precision="float16", channels_last=True, cuda_graph=True),
    "max-autotune": TorchWay(precision="float16", channels_last=True, compiled="max-autotune"),
}
"""By the name that `bench.measure.cold_start.Loading` has. Mode max-autotune records CUDA graphs itself."""


class Normalized(nn.Module):
    """Pixels uint8 [N, H, W, C] -> float32 [N, C, H, W], as `InputSpec.normalize` makes them.

    Its constants lie on the device: InputSpec makes them anew, and a GPU would wait for a copy in every run.
    """

    offset: Tensor
    factor: Tensor

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        black, white = (
            spec.normalize(torch.full((1, spec.channels, 1, 1), level, dtype=torch.uint8)).double()
            for level in (0, 255)
        )
        factor = (white - black) / 255
        self.register_buffer("factor", factor.float())
        self.register_buffer("offset", (-black / factor).float())

    def forward(self, pixels: Tensor) -> Tensor:
        """Return what the network takes."""
        return (pixels.permute(0, 3, 1, 2).float() - self.offset) * self.factor


def classify_in_torch(checkpoint: Checkpoint, way: TorchWay, device: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from images uint8 [N, H, W, C] to logits float32 [N, K].

    Args:
        checkpoint: its float network classifies.
        way: how PyTorch is set up.
        device: "cuda" or "cpu".
    """
    normalized, network = _placed(checkpoint, way, device)
    whole: Any = nn.Sequential(normalized, network)
    called = torch.compile(whole, mode=way.compiled) if way.compiled else whole

    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        with torch.inference_mode(), _precision(way, device):
            return (called(pixels).float(),)

    between = _between_hosts(run, way, device)
    return lambda images: between(images)[0]


def explain_in_torch(
    checkpoint: Checkpoint, way: TorchWay, device: str
) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
    """Return a function from images uint8 [N, H, W, C] to logits float32 [N, K] and the predicted classes' maps.

    Args:
        checkpoint: its float network is explained.
        way: how PyTorch is set up.
        device: "cuda" or "cpu".

    Raises:
        EngineError: Captum is not installed.
    """
    normalized, network = _placed(checkpoint, way, device)
    called: Any = torch.compile(network, mode=way.compiled) if way.compiled else network

    def by_autograd(pixels: Tensor) -> tuple[Tensor, ...]:
        x = _leaf(normalized, pixels, way)
        with _precision(way, device):
            logits = called(x)
        (gradient,) = torch.autograd.grad(logits.amax(1).sum(), x)
        return logits.detach().float(), gradient.abs().amax(1).float()

    return _between_hosts(_by_captum(normalized, network, way) if way.captum else by_autograd, way, device)


def _by_captum(normalized: nn.Module, network: nn.Module, way: TorchWay) -> Run:
    try:
        from captum.attr import Saliency
    except ImportError:
        raise EngineError(INSTALL_PEERS) from None
    saliency = Saliency(network)

    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        x = _leaf(normalized, pixels, way)
        with torch.no_grad():
            logits = network(x)
        return logits, saliency.attribute(x, logits.argmax(1)).detach().amax(1)

    return run


def _placed(checkpoint: Checkpoint, way: TorchWay, device: str) -> tuple[nn.Module, nn.Module]:
    """Return normalization and float network on the device, in the way's layout and precision."""
    network = deploy_form(checkpoint.network(), checkpoint.input, int8=False).network.to(device)
    if way.channels_last:
        network = network.to(memory_format=torch.channels_last)
    if way.precision != "float32":
        network = network.to(getattr(torch, way.precision))
    return Normalized(checkpoint.input).to(device), network


def _leaf(normalized: nn.Module, pixels: Tensor, way: TorchWay) -> Tensor:
    layout = torch.channels_last if way.channels_last else torch.contiguous_format
    x: Tensor = normalized(pixels).contiguous(memory_format=layout)
    return x.requires_grad_()


def _precision(way: TorchWay, device: str) -> contextlib.AbstractContextManager[object]:
    if way.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, getattr(torch, way.precision))


def _between_hosts(run: Run, way: TorchWay, device: str) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
    launch = _recorded(run, device) if way.cuda_graph else lambda host: run(host.to(device))

    def call(images: np.ndarray) -> tuple[np.ndarray, ...]:
        # The copy back waits for a GPU, which works while the host goes on.
        return tuple(result.cpu().numpy() for result in launch(torch.from_numpy(images)))

    return call


def _recorded(run: Run, device: str) -> Run:
    """Return a function that records one run for each shape as a CUDA graph, and then launches it."""
    graphs: dict[torch.Size, tuple[Tensor, tuple[Tensor, ...], Any]] = {}

    def launch(host: Tensor) -> tuple[Tensor, ...]:
        if host.shape not in graphs:
            graphs[host.shape] = _record(run, host.to(device))
        given, results, graph = graphs[host.shape]
        given.copy_(host)
        graph.replay()
        return results

    return launch


def _record(run: Run, given: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Any]:
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(_GRAPH_WARM_UPS):
            run(given)
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(given)
    return given, results, graph
