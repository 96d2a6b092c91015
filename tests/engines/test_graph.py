"""A traced loss is accepted or refused by its nodes alone, with the place and the reason, and at once."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import msgspec
import pytest

from engines.graphs import CustomLoss, GraphInput, GraphNode, decode_loss, encode_loss
from engines.interface import UserError
from engines.losses.allowed import FUNCTIONS, METHODS, canonical
from engines.losses.graph import MAX_NODES, MAX_VALUES, check_graph
from tests.engines.traced import call, graph, method, placeholder, returning

LOGPROBS = {"ref": "logprobs"}
GIVEN = placeholder("logprobs")


def refused(loss: CustomLoss) -> str:
    begun = time.perf_counter()
    with pytest.raises(UserError) as caught:
        check_graph(loss)
    assert time.perf_counter() - begun < 0.05
    assert len(str(caught.value)) < 600
    return str(caught.value)


def changed(**changes: Any) -> CustomLoss:
    return msgspec.structs.replace(graph(), **changes)


def test_a_graph_of_allowed_nodes_passes_and_survives_its_encoding() -> None:
    shape = GraphNode("call_function", "shape", "getattr", [{"ref": "scaled"}, "shape"])
    loss = graph(call("scaled", "operator.mul", "logprobs", 2.0), shape, method("clone", "clone", "scaled"))
    check_graph(loss)
    assert decode_loss(encode_loss(loss)) == loss


@pytest.mark.parametrize(
    "target",
    [
        "torch.load", "torch.save", "torch.rand_like", "torch.empty_like", "torch.ops.aten.add", "os.system",
        "builtins.eval", "eval", "torch.utils.cpp_extension.load", "torch.autograd.grad", "operator.attrgetter",
        "operator.methodcaller", "operator.setitem", "torch.nn.functional.dropout", "torch.bernoulli",
        "torch.from_file",
        "math.factorial", "math.comb", "subprocess.Popen", "torch.hub.load", "__import__", "torch.exp.__globals__",
        "torch.nn.functional.relu_", "torch.classes.load_library", "x" * 10_000, "",
    ],
)  # fmt: skip
def test_a_function_that_is_not_on_the_list_is_refused_by_name(target: str) -> None:
    assert f"graph.nodes[1] calls {target[:80]!r}" in refused(graph(call("bad", target, "logprobs")))


@pytest.mark.parametrize(
    "target",
    [
        "backward", "item", "numpy", "tolist", "cuda", "data_ptr", "untyped_storage", "set_", "resize_",
        "register_hook",
        "requires_grad_", "random_", "uniform_", "apply_", "map_", "__reduce__", "__class__", "_make_subclass",
        "share_memory_",
        "new_empty", "new", "to_sparse", "pin_memory", "is_shared", "dropout",
    ],
)  # fmt: skip
def test_a_method_that_is_not_on_the_list_is_refused_by_name(target: str) -> None:
    assert f"calls the method {target!r}" in refused(graph(method("bad", target, "logprobs")))


@pytest.mark.parametrize("name", ["__class__", "grad_fn", "data", "_cdata", "grad", "x" * 100, "__globals__"])
def test_only_some_attributes_are_read(name: str) -> None:
    bad = GraphNode("call_function", "bad", "getattr", [{"ref": "logprobs"}, name])
    assert "a loss may read H, T, device" in refused(graph(bad))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"ref": "later"}, "refers to 'later', which is no earlier node"),
        ({"ref": "bad"}, "refers to 'bad'"),
        ({"code": "1 + 1"}, "has the key 'code'; allowed are ref, tuple"),
        ({"ref": "logprobs", "tuple": []}, "an object with 2 keys"),
        ({}, "an object with 0 keys"),
        ({"slice": [1, 2]}, "has the key 'slice'"),
        ({"dtype": "object"}, "is the dtype 'object'; allowed are bfloat16"),
        ({"device": "cuda"}, "is the device 'cuda'; allowed are cpu"),
        ({"device": "meta"}, "is the device 'meta'"),
        ({"layout": "sparse_coo"}, "is the layout 'sparse_coo'"),
        ({"float": "1e5"}, "is the float '1e5'"),
        ({"ellipsis": False}, "is the ellipsis False"),
        (2**53 + 1, "beyond ±2^53"),
        (-(10**300), "beyond ±2^53"),
        ("x" * 201, "a text of 201 characters"),
        ([0] * (MAX_VALUES + 1), f"hold more than {MAX_VALUES} values"),
        ([[[[[[[[[[[[[[0]]]]]]]]]]]]]], "nested deeper than 12"),
        ({"tuple": [{"tuple": [{"ref": "nobody"}]}]}, "refers to 'nobody'"),
        ({"dict": {"k" * 201: 1}}, "a key of 201 characters"),
        (b"bytes", "is a bytes"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused_where_it_stands(value: Any, words: str) -> None:
    for bad, place in (
        (GraphNode("call_function", "bad", "torch.add", [{"ref": "logprobs"}, value]), "args[1]"),
        (
            GraphNode("call_function", "bad", "torch.add", [{"ref": "logprobs"}], {"other": value}),
            "kwargs['other']",
        ),
    ):
        sentence = refused(graph(bad))
        assert sentence.startswith(f"graph.nodes[1].{place}")
        assert words in sentence


@pytest.mark.parametrize("name", ["out", "generator", "pin_memory", "a b", "__init__ "])
def test_results_go_nowhere_else(name: str) -> None:
    assert "kwargs has" in refused(
        graph(call("bad", "torch.add", "logprobs", 1, **{name: {"ref": "logprobs"}}))
    )


@pytest.mark.parametrize(
    "bad",
    [
        method("bad", "to", "logprobs", device="cuda:0"),
        call("bad", "torch.zeros_like", "logprobs", device="meta"),
        GraphNode("call_method", "bad", "to", [{"ref": "logprobs"}, "cuda"]),
        GraphNode("call_method", "bad", "type", [{"ref": "logprobs"}, "torch.cuda.FloatTensor"]),
    ],
)
def test_a_loss_stays_on_its_device(bad: GraphNode) -> None:
    assert "a loss is computed on the device cpu" in refused(graph(bad))


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (changed(nodes=()), "begins with the parameters ''; inputs has logprobs"),
        (changed(nodes=(placeholder("logprobs"),)), "does not end with its output node"),
        (changed(nodes=(GIVEN, returning("logprobs"), placeholder("b"))), "parameters 'logprobs, b'"),
        (changed(nodes=(GIVEN, returning("logprobs"), method("m", "sum", "logprobs"))), "after the output"),
        (changed(nodes=(GraphNode("call_function", "x", "torch.add"), GIVEN)), "begins with the parameters"),
        (changed(nodes=(GIVEN, GIVEN)), "parameters"),
        (changed(inputs=()), "inputs has 0 entries"),
        (changed(inputs=(GraphInput("logprobs", 1),) * 17), "inputs has 17 entries"),
        (changed(inputs=(GraphInput("weights", 1),)), "inputs[0] is 'weights' of rank 1; it must be logprobs"),
        (changed(inputs=(GraphInput("logprobs", 0),)), "rank 0; it must be logprobs, of rank 1 or 2"),
        (changed(inputs=(GraphInput("logprobs", 1), GraphInput("x", 3))), "inputs[1].rank is 3"),
        (changed(inputs=(GraphInput("logprobs", 1), GraphInput("X y", 1))), "inputs[1].name is 'X y'"),
        (changed(inputs=(GraphInput("logprobs", 1), GraphInput("a", 1), GraphInput("a", 1))), "names an input twice"),
        (graph(GraphNode("get_attr", "x", "weight")), "graph.nodes[1].op is 'get_attr'"),
        (graph(GraphNode("call_module", "x", "linear")), "graph.nodes[1].op is 'call_module'"),
        (graph(method("logprobs", "sum", "logprobs")), "each node has a name of its own"),
        (graph(method("a-b", "sum", "logprobs")), "name is 'a-b'"),
        (graph(GraphNode("call_method", "x", "sum", [3.0])), "calls the method 'sum' of a constant"),
        (graph(GraphNode("call_method", "x", "sum")), "calls the method 'sum' of a constant"),
    ],
)  # fmt: skip
def test_what_is_no_loss_is_refused(loss: CustomLoss, words: str) -> None:
    assert words in refused(loss)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([{"ref": "logprobs"}], "must return (loss, metrics)"),
        ([], "must return (loss, metrics)"),
        ([{"tuple": [1.0, {"dict": {}}]}], "must return (loss, metrics)"),
        ([{"tuple": [{"ref": "logprobs"}, {"dict": {}}, 1]}], "must return (loss, metrics)"),
        ([{"tuple": [LOGPROBS, {"dict": {"loss:sum": LOGPROBS}}]}], "the metric 'loss:sum' must be named"),
        ([{"tuple": [LOGPROBS, {"dict": {"custom/a:max": LOGPROBS}}]}], "custom/<name>:sum"),
        ([{"tuple": [{"ref": "logprobs"}, {"dict": {"custom/a:sum": 1.0}}]}], "a value that the graph computes"),
    ],
)  # fmt: skip
def test_what_is_returned_is_a_loss_and_metrics(returned: list[Any], words: str) -> None:
    nodes = (placeholder("logprobs"), GraphNode("output", "output", "output", returned))
    assert words in refused(changed(nodes=nodes))


def test_a_million_nodes_are_refused_at_once() -> None:
    node = method("x", "sum", "logprobs")
    assert f"has 1000001 nodes; at most {MAX_NODES}" in refused(
        changed(nodes=(placeholder("logprobs"), *[node] * 1_000_000))
    )


def test_as_many_nodes_as_are_allowed_are_checked_in_milliseconds() -> None:
    names = ["logprobs", *(f"n{index}" for index in range(MAX_NODES - 3))]
    nodes = [call(name, "torch.add", before, 1) for before, name in pairwise(names)]
    loss = graph(*nodes)
    assert len(loss.nodes) == MAX_NODES
    begun = time.process_time()
    check_graph(loss)
    assert time.process_time() - begun < 0.1


def test_functions_are_known_by_what_torch_calls_them_inside() -> None:
    """The names that torch.fx gives them change from version to version."""
    assert canonical("torch._C._nn.softplus") == "torch.nn.functional.softplus"
    assert canonical("torch._C._nn.log_sigmoid") == "torch.nn.functional.logsigmoid"
    assert canonical("torch.functional.einsum") == "torch.einsum"
    assert canonical("torch._C._special.special_expit") == "torch.special.expit"
    assert canonical("_operator.mul") == "operator.mul"
    assert not [
        name for name in (*FUNCTIONS, *METHODS) if "rand" in name or "empty" in name or "save" in name
    ]
