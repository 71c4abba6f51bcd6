"""Networks that others wrote: they stay as they are, and what a graph cannot hold is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.optim import Adam

from runtime.errors import ModelError
from train.checkpoint import new_network
from train.input_spec import InputSpec
from train.models.cnn2 import CNN2
from train.quantization.description import all_zero_channels
from train.quantization.quantize import float_weight, quantize, quantizers, start_alphas
from train.quantization.quantizers import PACT, WeightQuantizer
from train.quantization.signs import relu_bound
from train.quantization.spec import QuantSpec
from train.quantization.tracing import trace
from train.state import load_state

SHAPE = (3, 8, 8)


class Net(nn.Module):
    """Two layers, and between them whatever is to be tried."""

    def __init__(self, between: Callable[[Tensor], Tensor], modules: dict[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.parts = nn.ModuleDict(modules or {})
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.norm(self.conv(x)))
        return self.head(self.conv2(x).mean((2, 3)))


def net(between: Callable[[Tensor], Tensor]) -> Net:
    torch.manual_seed(0)
    return Net(between).eval()


def test_the_original_stays_bit_identical() -> None:
    model = net(torch.relu)
    x = torch.randn(2, *SHAPE)
    before, output = {k: v.clone() for k, v in model.state_dict().items()}, model(x)
    quantized = quantize(model, QuantSpec(4), image_shape=SHAPE)
    start_alphas(quantized, x)
    with torch.no_grad():
        for parameter in quantized.parameters():
            parameter.add_(1)
    assert torch.equal(model(x), output)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(model.conv) is nn.Conv2d
    own = {id(p) for p in model.parameters()}
    assert not any(id(p) in own for p in quantized.parameters())


def test_a_graph_module_is_not_edited() -> None:
    graph = fx.symbolic_trace(net(torch.relu))
    code, names = graph.code, [n for n, _ in graph.named_modules()]
    x = torch.randn(2, *SHAPE)
    output = graph(x)
    for bits in (8, 4):  # twice: the first one leaves no quantizer behind
        assert len(quantizers(quantize(graph, QuantSpec(bits)))) == 3
    assert (graph.code, [n for n, _ in graph.named_modules()]) == (code, names)
    assert torch.equal(graph(x), output)


@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential], ids=["itself", "inside another"])
def test_what_is_quantized_already_is_refused(wrap: Callable[[nn.Module], nn.Module]) -> None:
    once = quantize(net(torch.relu), QuantSpec(8))
    with pytest.raises(ModelError, match=r"is quantized already \(.*\); quantize the float network"):
        quantize(wrap(once), QuantSpec(4))


def through_view(x: Tensor) -> Tensor:
    v = x.view(-1)
    v += 1
    return x


def through_slice(x: Tensor) -> Tensor:
    x[:, :2].mul_(0.5)
    return x


def through_chunk(x: Tensor) -> Tensor:
    a, _ = x.chunk(2, 1)
    a.relu_()
    return x


def through_flatten(x: Tensor) -> Tensor:
    F.relu(torch.flatten(x, 2), inplace=True)
    return x


def view_read_later(x: Tensor) -> Tensor:
    v = x.transpose(2, 3)
    x *= 2
    return v


def into_out(x: Tensor) -> Tensor:
    return torch.add(x, x, out=x)


@pytest.mark.parametrize(
    ("between", "named"),
    [
        (through_view, "iadd"), (through_slice, "mul_"), (through_chunk, "relu_"), (through_flatten, "relu"),
        (view_read_later, "imul"),
    ],
)  # fmt: skip
def test_a_write_through_a_view_is_refused_by_name(between: Callable[[Tensor], Tensor], named: str) -> None:
    with pytest.raises(ModelError, match=f"^{named}: writes in place into a part or view of"):
        quantize(net(between), QuantSpec(8))


@pytest.mark.parametrize("part", [nn.Identity(), nn.Dropout(0.5), nn.Flatten(2)])
def test_a_write_through_a_module_is_refused(part: nn.Module) -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.part, self.conv2 = nn.Conv2d(3, 4, 3), part, nn.Conv2d(4, 5, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            self.part(x).add_(1)
            return self.conv2(x).flatten(1)

    with pytest.raises(ModelError, match=r"^add_: writes in place into a part or view of 'conv'"):
        quantize(Writing().eval(), QuantSpec(8))


def add_alone(x: Tensor) -> Tensor:
    y = x * 1
    y += x
    return y


def method_alone(x: Tensor) -> Tensor:
    x.mul_(2).clamp_(-1, 1)
    return x


def own_view(x: Tensor) -> Tensor:
    return x.flatten(2).add_(1).unflatten(2, (8, 8))


def relu_function(x: Tensor) -> Tensor:
    torch.sigmoid_(x)
    F.leaky_relu(x, 0.1, inplace=True)
    return x


@pytest.mark.parametrize("between", [add_alone, method_alone, own_view, relu_function])
def test_a_write_that_nothing_else_reads_is_traced_exactly(between: Callable[[Tensor], Tensor]) -> None:
    model = net(between)
    x = torch.randn(2, *SHAPE)
    assert torch.equal(trace(model, SHAPE)(x), model(x))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_a_graph_that_computes_something_else_is_refused() -> None:
    model = net(torch.relu)
    model.conv2 = nn.Sequential(Counting(), model.conv2)  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"its graph computes something else from 'conv2.0' on; look before it"):
        quantize(model, QuantSpec(8), image_shape=SHAPE)


def test_the_comparison_leaves_buffers_modes_and_random_numbers() -> None:
    model = net(torch.relu).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    quantize(model, QuantSpec(8), image_shape=SHAPE)
    trace(model, SHAPE)
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert model.norm.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("between", "signed"),
    [
        (lambda x: torch.relu(x) + torch.relu(-x), False),
        (lambda x: torch.add(torch.relu(x), torch.relu(-x)), False),
        (lambda x: torch.add(torch.relu(x), torch.relu(-x), alpha=2), False),
        (lambda x: torch.add(torch.relu(x), torch.relu(-x), alpha=-1), True),
        (lambda x: torch.relu(x).add(torch.relu(-x), alpha=-1), True),
        (lambda x: torch.relu(x).add_(torch.relu(-x), alpha=-1), True),
        (lambda x: torch.add(input=x, other=torch.relu(-x)), True),
        (lambda x: torch.relu(x).mul(other=-1), True),
        (lambda x: torch.relu(x) * 2.0, False),
        (lambda x: torch.relu(x) * -2.0, True),
        (lambda x: torch.relu(x) + -0.5, True),
        (lambda x: torch.sub(torch.relu(x), 1), True),
        (lambda x: F.avg_pool2d(torch.relu(x), 3, 1, 1), False),
        (lambda x: F.avg_pool2d(torch.relu(x), 3, 1, 1, divisor_override=-9), True),
        (lambda x: torch.abs(x) + x.square(), False),
        (lambda x: torch.cat(tensors=[torch.relu(x[:, :2]) * 2, x[:, 2:]], dim=1), True),
        (lambda x: torch.cat([torch.sigmoid(x[:, :2]), x[:, 2:].exp()], 1), False),
    ],
)
def test_signs_are_inferred_from_every_argument(between: Callable[[Tensor], Tensor], signed: bool) -> None:
    quantized = quantize(net(between), QuantSpec(8), input_scale=0.01)
    modules = dict(quantized.named_modules())
    (reader,) = (n for n in quantized.graph.nodes if n.target == "conv2")  # type: ignore[union-attr]
    quantizer = modules[str(reader.args[0].target)]
    assert isinstance(quantizer, PACT)
    assert (quantizer.qmin < 0) is signed


@pytest.mark.parametrize(
    ("between", "bound"),
    [
        (lambda x: x.clamp(min=0), math.inf), (lambda x: x.clamp(0), math.inf), (lambda x: x.clamp(0, 4), 4.0),
        (lambda x: torch.clamp(x, min=0, max=2.5), 2.5), (lambda x: torch.clip(input=x, min=0.0), math.inf),
        (lambda x: x.clamp_min(0), math.inf), (lambda x: torch.clamp_min(x, 0), math.inf),
        (lambda x: x.clamp_(min=0, max=6), 6.0), (lambda x: F.hardtanh(x, 0, 6), 6.0),
        (lambda x: F.hardtanh(x, min_val=0, max_val=1), 1.0), (lambda x: nn.functional.relu6(x), 6.0),
        (lambda x: x.clamp(max=0), None), (lambda x: x.clamp(-1, 1), None), (lambda x: x.clamp(0.1, 1), None),
        (lambda x: F.hardtanh(x), None), (lambda x: x.clamp(min=0, max=0), None),
    ],
)  # fmt: skip
def test_clips_at_zero_are_relus(between: Callable[[Tensor], Tensor], bound: float | None) -> None:
    model = net(between)
    traced = trace(model, SHAPE)
    (reader,) = (n for n in traced.graph.nodes if n.target == "conv2")
    assert relu_bound(reader.args[0], dict(traced.named_modules())) == bound
    pact = next(
        q for q in quantizers(quantize(model, QuantSpec(8), input_scale=0.01)).values() if isinstance(q, PACT)
    )
    assert pact.largest_start == (math.inf if bound is None else bound)
    assert (pact.qmin == 0) is (bound is not None)


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize(
    "end",
    [
        nn.Softmax(1), nn.Softmax(dim=-1), lambda x: F.softmax(x, 1), lambda x: torch.softmax(x, dim=1),
        lambda x: x.softmax(-1),
    ],
)  # fmt: skip
def test_a_softmax_at_the_end_is_left_out_and_told(end: Callable[[Tensor], Tensor], bits: int) -> None:
    class Ending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(torch.relu)
            self.end = end

        def forward(self, x: Tensor) -> Tensor:
            return self.end(self.net(x))

    model, x = Ending().eval(), torch.randn(2, *SHAPE)
    with pytest.warns(UserWarning, match="Ending ends in a softmax: what that is given is taken as the logits"):
        found = quantize(model, QuantSpec(bits), image_shape=SHAPE)
    if bits == 32:
        assert torch.equal(found(x), model.net(x))
    assert torch.allclose(model(x).sum(1), torch.ones(2))
    assert (found(x) < 0).any()


def test_a_softmax_over_something_else_stays() -> None:
    model = net(lambda x: torch.softmax(x, 1))
    graph = quantize(model, QuantSpec(8)).graph
    assert any(node.target is torch.softmax for node in graph.nodes)  # type: ignore[union-attr]


@pytest.mark.parametrize("start", [-0.1, 0.0, 1e-30])
def test_a_step_at_or_below_zero_is_learned_up_again(start: float) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3)
    weight = layer.weight.detach()
    quantizer = WeightQuantizer(weight, 4, "lsq")
    with torch.no_grad():
        quantizer.learned_scale[:4] = start
    floor = weight.flatten(1).abs().amax(1) / 7 / 1024
    assert torch.allclose(quantizer.scale(weight)[:4], floor[:4], rtol=1e-6)
    optimizer = Adam(quantizer.parameters(), lr=0.002)
    for _ in range(300):
        optimizer.zero_grad()
        (quantizer(weight) - weight).square().sum().backward()
        optimizer.step()
    error = (quantizer(weight) - weight).square().flatten(1).sum(1)
    assert (error[:4] <= 2 * error[4:].max()).all()
    assert (quantizer.learned_scale > floor).all()


def test_a_step_below_its_floor_is_not_pushed_further_down() -> None:
    weight = torch.ones(2, 3)
    quantizer = WeightQuantizer(weight, 4, "lsq")
    with torch.no_grad():
        quantizer.learned_scale.fill_(-1.0)
    gradients = []
    for sign in (1, -1):
        quantizer.zero_grad()
        (sign * quantizer(weight)).sum().backward()
        assert quantizer.learned_scale.grad is not None
        gradients.append(quantizer.learned_scale.grad.clone())
    assert torch.equal(gradients[0], torch.zeros(2))
    assert (gradients[1] < 0).all()


def test_channels_of_zeros_are_counted() -> None:
    model = quantize(net(torch.relu), QuantSpec(4, "lsq"))
    assert all_zero_channels(model) == {}
    with torch.no_grad():
        float_weight(model.get_submodule("conv2"))[1:3] = 0
        float_weight(model.get_submodule("head"))[0] = 0
    assert all_zero_channels(model) == {"conv2": 2, "head": 1}


@pytest.mark.parametrize("prefixes", [("module.",), ("_orig_mod.",), ("module.", "_orig_mod."), ()])
def test_prefixes_of_wrappers_are_taken_off(prefixes: tuple[str, ...]) -> None:
    source, model = net(torch.relu), Net(torch.relu)
    load_state(model, {"".join(prefixes) + k: v for k, v in source.state_dict().items()}, "a.pt")
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("conv.bias"), "a.pt: holds no 'conv.bias', expected the state of Net"),
        (lambda s: s.update(more=torch.ones(1)), "a.pt: 'more' is unknown, expected the state of Net"),
        (lambda s: s.update({"head.weight": torch.ones(7, 4)}),
         r"a.pt: 'head.weight' has shape \[7, 4\], expected \[5, 4\]"),
        (lambda s: s.update({"head.weight": 3}), "a.pt: 'head.weight' is a int, expected a tensor"),
        (lambda s: s["norm.running_var"].fill_(math.nan), r"'norm.running_var' holds NaN \(4 of 4 values\)"),
        (lambda s: s["conv.weight"][0].fill_(math.inf), r"'conv.weight' holds infinity \(27 of 108 values\)"),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_told_in_one_line(change: Callable[[dict], object], told: str) -> None:
    state = {k: v.clone() for k, v in net(torch.relu).state_dict().items()}
    change(state)
    model = net(torch.relu)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ModelError, match=told) as raised:
        load_state(model, state, "a.pt")
    assert "\n" not in str(raised.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_network_of_other_width_is_told() -> None:
    state = CNN2(1, (8, 8), 7).state_dict()
    spec = InputSpec((8, 8), 1, (0.5,), (0.5,))
    arch = {"name": "cnn2", "channels": 1, "size": (8, 8), "classes": 10}
    with pytest.raises(ModelError, match=r"parameters of cnn2: 'fc2.weight' has shape \[7, .*\], expected \[10, "):
        new_network(arch, QuantSpec(8), spec, state)


def test_the_start_of_alphas_leaves_the_statistics_of_batchnorm() -> None:
    model = quantize(net(torch.relu).train(), QuantSpec(4), image_shape=SHAPE)
    before = {k: v.clone() for k, v in model.named_buffers()}
    alpha = next(q for q in quantizers(model).values() if isinstance(q, PACT)).alpha
    start_alphas(model, torch.randn(16, *SHAPE))
    assert alpha.item() != 6.0
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())
