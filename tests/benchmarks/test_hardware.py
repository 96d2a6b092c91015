"""The count of a step's arithmetic, against one that goes product by product."""

from __future__ import annotations

import pytest

from benchmarks.hardware import OTHERS, PRODUCTS, WITH_ADAPTERS, Layer, kind_of, work
from benchmarks.plain import padded
from benchmarks.tenants import RANK
from benchmarks.workload import Shape, shaped_batches


def test_the_work_of_a_step_is_that_of_its_products() -> None:
    layers = [Layer(3, 5, 2), Layer(5, 4, 1)]
    lengths, rank, width, depth = [2, 3], 2, 6, 2
    weights = adapters = attention = 0
    for tokens in lengths:
        for inputs, outputs in [(3, 5), (3, 5), (5, 4)]:
            weights += 2 * (2 * tokens * inputs * outputs)  # the rows there, their gradient back
            for left, right in ((inputs, rank), (rank, outputs)):
                adapters += 2 * (
                    2 * tokens * left * right
                )  # what a gradient needs of it, and its own gradient
        seen = sum(1 for query in range(tokens) for key in range(tokens) if key <= query)
        there = ("scores", "sum of values")
        back = ("scores again", "of values", "of probabilities", "of queries", "of keys")
        attention += depth * len(there + back) * 2 * seen * width
    found = work(layers, width, depth, lengths, rank)
    assert found == (weights, adapters, attention)
    assert found.total == weights + adapters + attention


@pytest.mark.parametrize(
    ("operation", "shapes", "expected"),
    [
        ("aten::mm", [[100, 64], [64, 32]], PRODUCTS),
        ("aten::mm", [[100, 64], [64, RANK]], WITH_ADAPTERS),
        ("mkldnn::_linear_pointwise", [[100, 64], [32, 64]], PRODUCTS),
        ("mkldnn::_linear_pointwise", [[100, 64], [RANK, 64]], WITH_ADAPTERS),
        ("aten::addmm_", [[100, 64], [100, RANK], [RANK, 64]], WITH_ADAPTERS),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [[1, 2, 3, 4]], "attention"),
        ("aten::_fused_adamw_", [], "optimizer"),
        ("aten::exp_", [[3]], "exponentials, sums"),
        ("aten::mul", [[RANK]], "arithmetic of items"),
        ("aten::copy_", [[3]], "copying"),
        ("aten::view", [[3]], OTHERS),
    ],
)
def test_operations_are_told_apart(operation: str, shapes: list[list[int]], expected: str) -> None:
    assert kind_of(operation, shapes) == expected


def test_a_step_of_different_lengths_is_padded_for_the_plain_loop_and_counts_no_padding() -> None:
    [step] = shaped_batches(50, 1, Shape(5, 2, 9))
    inputs, targets, mask = padded(step)
    lengths = [batch.inputs.shape[1] for batch in step]
    assert len(set(lengths)) > 1
    assert inputs.shape == targets.shape == mask.shape == (5, max(lengths))
    for row, batch in enumerate(step):
        own = lengths[row]
        assert mask[row].tolist() == [1] * own + [0] * (max(lengths) - own)
        assert inputs[row, :own].tolist() == batch.inputs[0].tolist()
        assert targets[row].tolist() == batch.targets[0].tolist() + [-100] * (max(lengths) - own)


def test_a_step_of_equal_lengths_needs_no_mask() -> None:
    steps = shaped_batches(50, 3, Shape(4, 6, 6))
    assert len(steps) == 3
    [batch] = steps[0]
    inputs, targets, mask = padded(steps[0])
    assert mask is None
    assert inputs.tolist() == batch.inputs.tolist() and targets.tolist() == batch.targets.tolist()
