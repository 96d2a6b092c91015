"""A rebuilt loss computes what torch.fx computes with the traced one, and is held to its limits while it runs."""

from __future__ import annotations

import math
import time

import pytest
import torch
import torch.nn.functional as F

from engines.graphs import CustomLoss, GraphNode, decode_loss, encode_loss
from engines.interface import UserError
from engines.losses import growth
from engines.losses.allowed import FUNCTIONS, METHODS
from engines.losses.graph import check_graph
from engines.losses.growth import Allowance
from engines.losses.rebuilding import _FUNCTIONS, _METHODS, LossProgram, slope_of
from tests.engines.traced import Function, call, graph, method, neutral, traced

T = torch.Tensor
Returned = tuple[T, dict[str, T]]


def slicing(logprobs: T, advantages: T) -> Returned:
    loss = -(logprobs[1:] * advantages[:-1]).sum() + logprobs[..., 0].square() - logprobs[::2].mean()
    return loss, {"custom/first:sum": logprobs[0], "custom/length:mean": logprobs[-1] + logprobs.shape[0]}


def softmax_like(logprobs: T, advantages: T) -> Returned:
    weights = F.softmax(advantages, dim=-1)
    spread = F.logsigmoid(logprobs) * weights + torch.log_softmax(logprobs / 2, 0)
    loss = -spread.sum() + torch.logsumexp(logprobs, dim=0) + F.softplus(-logprobs).mean()
    return loss, {"custom/entropy:mean": -(weights * weights.log()).sum()}


def several_inputs(logprobs: T, advantages: T, mask: T, scale: T, old: T) -> Returned:
    ratio = torch.exp(logprobs - old).clamp(0.02, 50.0)
    kept = torch.where(mask > 0, ratio * advantages, 0.0)
    loss = -(kept.sum() / mask.sum().clamp_min(1.0)) * scale
    return loss, {"custom/kept:sum": kept.detach().sum(), "custom/kl:mean": (old - logprobs).mean()}


def matrices(logprobs: T, target_distribution: T) -> Returned:
    cross = -(target_distribution * logprobs).sum(dim=-1)
    pairs = torch.einsum("tk,sk->ts", logprobs, target_distribution).tril()
    best = torch.max(logprobs, dim=1).values.mean() + logprobs.T.matmul(target_distribution).diagonal().sum()
    return cross.mean() + 1e-3 * pairs.sum() + best, {"custom/cross:sum": cross.sum()}


def indices(logprobs: T, target_tokens: T, advantages: T) -> Returned:
    order = torch.argsort(advantages, descending=True)
    counts = F.one_hot(target_tokens % 4, 4).to(torch.float32).sum(0)
    top, _ = torch.topk(logprobs, 2)
    chosen = (
        logprobs[advantages > 0].sum()
        + logprobs[order[:3]].prod()
        + logprobs.gather(0, target_tokens % 3).sum()
    )
    return chosen + (counts / counts.sum()).max() * top.sum(), {}


def python_numbers(logprobs: T, advantages: T) -> Returned:
    length = logprobs.shape[0]
    scale = math.sqrt(length) / (length**2 + 1) - length // 3 % 2
    centred = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
    padded = F.pad(centred, (0, 1), value=-math.inf)[:length].masked_fill(centred < 0, 0.0)
    loss = (logprobs.to(torch.float64) * padded).cumsum(0).mean().float() * scale
    loss += torch.stack([logprobs.min(), logprobs.median()]).sum()
    halves = torch.split(logprobs, 2)
    return loss + halves[0].sum() - halves[-1].sum(), {"custom/scale:mean": loss * 0 + scale}


def in_place(logprobs: T, advantages: T) -> Returned:
    copy = logprobs.clone()
    copy.mul_(2.0).clamp_(min=-2.0)
    advantages.fill_(0.5)
    return (copy + advantages).sum(), {}


LOSSES: list[tuple[Function, dict[str, int]]] = [
    (slicing, {"advantages": 1}),
    (softmax_like, {"advantages": 1}),
    (several_inputs, {"advantages": 1, "mask": 1, "scale": 0, "old": 1}),
    (matrices, {"target_distribution": 2}),
    (indices, {"target_tokens": 1, "advantages": 1}),
    (python_numbers, {"advantages": 1}),
    (in_place, {"advantages": 1}),
]


@pytest.mark.parametrize(("function", "ranks"), LOSSES, ids=[function.__name__ for function, _ in LOSSES])
@pytest.mark.parametrize("length", [6, 33])
def test_it_is_what_the_sdk_computes_to_the_last_bit(
    function: Function, ranks: dict[str, int], length: int
) -> None:
    shapes = {0: (), 1: (length,), 2: (length, 3)}
    rank = 2 if function is matrices else 1
    handle = traced(function, logprobs=rank, **ranks)
    loss = decode_loss(encode_loss(neutral(handle)))
    check_graph(loss)
    torch.manual_seed(length)
    values = [-torch.rand(shapes[rank])]
    for name, dimensions in ranks.items():
        drawn = torch.randn(shapes[dimensions])
        values.append((drawn.abs() * 10).long() if name == "target_tokens" else drawn)
    found, expected = [[value.clone() for value in values] for _ in range(2)]
    found[0].requires_grad_()
    expected[0].requires_grad_()

    total, metrics = LossProgram(loss).run(found, Allowance())
    meant, meant_metrics = handle.graph(*expected)
    assert total.item() == meant.item()
    assert metrics == {name: float(value.detach()) for name, value in meant_metrics.items()}
    (slope,) = torch.autograd.grad(meant, expected[0])
    assert slope.abs().sum() > 0
    assert torch.equal(slope_of(total, found[0]), slope)


def test_every_name_of_the_list_is_a_function() -> None:
    assert _FUNCTIONS.keys() == FUNCTIONS.keys()
    assert _METHODS.keys() == METHODS.keys()
    assert all(callable(function) for function in (*_FUNCTIONS.values(), *_METHODS.values()))


# ---------------------------------------------------------------------------- limits


def failure(loss: CustomLoss, length: int = 1000, rank: int = 1) -> str:
    """What a loss of the list's operations is refused with while it runs, at once."""
    check_graph(loss)
    logprobs = -torch.rand((length,) if rank == 1 else (length, 2)).requires_grad_()
    begun = time.perf_counter()
    with pytest.raises(UserError) as caught:
        LossProgram(loss).run([logprobs], Allowance())
    assert time.perf_counter() - begun < 5.0  # torch prepares some calls when they are made first
    return str(caught.value)


LOGPROBS = {"ref": "logprobs"}
HUGE = [
    (method("x", "repeat", "logprobs", 10**6),),
    (method("x", "expand", "logprobs", {"tuple": [10**9, 1000]}), method("y", "exp", "x")),
    (method("x", "expand", "logprobs", {"tuple": [2**53, 1000]}), method("y", "contiguous", "x")),
    (method("x", "new_zeros", "logprobs", {"tuple": [10**5, 10**5]}),),
    (call("x", "torch.nn.functional.pad", "logprobs", {"tuple": [0, 10**10]}),),
    (call("x", "torch.repeat_interleave", "logprobs", 10**7),),
    (method("x", "long", "logprobs"), method("z", "abs", "x"), call("y", "torch.nn.functional.one_hot", "z", 10**9)),
    (call("x", "torch.outer", "logprobs", "logprobs"), call("y", "torch.kron", "x", "x")),
    (call("x", "torch.cartesian_prod", "logprobs", "logprobs", "logprobs"),),
    (method("a", "unsqueeze", "logprobs", 1), method("b", "unsqueeze", "a", 2),
     call("x", "operator.mul", "logprobs", "a"), call("y", "operator.mul", "x", "b")),
    (method("x", "tile", "logprobs", {"tuple": [10**8]}),),
    (method("x", "sort", "logprobs"), method("i", "long", "logprobs"),
     GraphNode("call_function", "r", "torch.add", [{"ref": "i"}, 10**6]),
     call("y", "torch.repeat_interleave", "logprobs", "r")),
    (method("x", "diag_embed", "logprobs"), method("y", "diag_embed", "x")),
]  # fmt: skip


@pytest.mark.parametrize("nodes", HUGE)
def test_values_that_would_not_fit_are_refused_before_they_are_made(nodes: tuple[GraphNode, ...]) -> None:
    assert "would hold more than 134217728 numbers" in failure(graph(*nodes))


def test_what_is_kept_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value is small enough; together they are not."""
    monkeypatch.setattr(growth, "MAX_ELEMENTS", 1_000_000)
    nodes = [call("x0", "torch.outer", "logprobs", "logprobs")]
    nodes += [call(f"x{index}", "torch.exp", f"x{index - 1}") for index in range(1, 200)]
    assert failure(graph(*nodes), length=100).startswith("x100: torch.exp: the values of one datum")


def test_work_adds_up_over_the_data() -> None:
    loss = graph(call("x", "torch.outer", "logprobs", "logprobs"), call("y", "torch.matmul", "x", "x"))
    program, allowance = LossProgram(loss), Allowance()
    logprobs = -torch.rand(1024)
    done = 0
    with pytest.raises(UserError, match=r"y: torch.matmul: the loss takes too long on this many data"):
        for _ in range(100):
            program.run([logprobs], allowance)
            done += 1
    assert 10 <= done <= 16  # 2^34 / 2^30


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ((call("x", "operator.pow", 10, 10**6),), "too large a number"),
        ((call("x", "operator.lshift", 1, 10**6),), "too large a number"),
        ((call("x", "operator.pow", 2, 60), call("y", "operator.mul", "x", 2**50)), "too large a number"),
        ((GraphNode("call_function", "x", "operator.mul", [[0] * 100, 10**9]),), "it was given list, int"),
        ((GraphNode("call_function", "x", "operator.mod", ["%1000000000d", 1]),), "it was given str, int"),
        ((call("x", "operator.add", "logprobs", {"tuple": [1]}),), "x: operator.add: unsupported operand"),
        ((method("x", "view", "logprobs", 7),), "x: the method view: shape '[7]' is invalid"),
        ((method("x", "gather", "logprobs", 0, {"tuple": []}),), "x: the method gather:"),
        ((method("s", "size", "logprobs"), method("x", "exp", "s")), "it was called on a Size, not on a tensor"),
        ((call("x", "torch.log", "logprobs", "logprobs", "logprobs"),), "x: torch.log:"),
        ((GraphNode("call_function", "x", "getattr", [LOGPROBS, "values"]),), "values cannot be read from a Tensor"),
        ((method("x", "repeat", "logprobs", 10**9, 10**9),), "repeat: Storage size calculation overflowed"),
        ((call("x", "operator.getitem", "logprobs", 5000),), "index 5000 is out of bounds"),
        ((call("x", "math.sqrt", "logprobs"),), "x: math.sqrt:"),
        ((call("x", "operator.truediv", 1, 0),), "division by zero"),
        ((GraphNode("call_function", "x", "torch.norm", [LOGPROBS], {"p": "nuc"}),), "the kind of norm 'nuc'"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_told_with_its_node(nodes: tuple[GraphNode, ...], words: str) -> None:
    assert words in failure(graph(*nodes))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda logprobs: (logprobs, {}), "must return a scalar tensor as its loss, not torch.float32 [9]"),
        (lambda logprobs: (logprobs.sum(), {"custom/a:sum": logprobs}), "the metric 'custom/a:sum' must be one number"),
        (lambda logprobs: (logprobs.shape, {}), "not Size"),
    ],
)  # fmt: skip
def test_what_is_returned_must_be_numbers(function: Function, words: str) -> None:
    loss = neutral(traced(function, logprobs=1))
    with pytest.raises(UserError) as caught:
        LossProgram(loss).run([torch.zeros(9)], Allowance())
    assert words in str(caught.value)


@pytest.mark.parametrize("function", [lambda logprobs: (logprobs.detach().sum(), {}),
                                      lambda logprobs: (logprobs.argmax(), {})])  # fmt: skip
def test_a_loss_without_gradient_is_refused(function: Function) -> None:
    leaf = torch.zeros(9, requires_grad=True)
    total, _ = LossProgram(neutral(traced(function, logprobs=1))).run([leaf], Allowance())
    with pytest.raises(UserError, match="does not depend on logprobs"):
        slope_of(total, leaf)
