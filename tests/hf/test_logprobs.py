"""The chunked log-prob function against log_softmax of full logits, values and gradients."""

from __future__ import annotations

import pytest
import torch

from engines.hf import logprobs as module
from engines.hf.logprobs import Unembedding
from engines.operations import LoraSpec
from engines.tuning.lora import Adapter, Gradient, Segment, Site
from engines.tuning.projection import project

ROWS, WIDTH, VOCABULARY = 23, 16, 61
SITES = [Site("lm_head", WIDTH, VOCABULARY)]
SPEC = LoraSpec(rank=3, seed=0, alpha=6.0)


def random_adapter(seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(SITES, SPEC, torch.randn(3 * (WIDTH + VOCABULARY), generator=generator) * 0.3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize(
    ("kept", "chunk"), [(2**26, 2**24), (0, 2**24), (0, 5 * VOCABULARY), (2**26, 5 * VOCABULARY)]
)
def test_equals_log_softmax_of_full_logits(
    monkeypatch: pytest.MonkeyPatch, kept: int, chunk: int, width: int, bias: bool
) -> None:
    monkeypatch.setattr(module, "KEPT_LOGITS", kept)
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk)
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    offset = torch.randn(VOCABULARY, generator=generator) if bias else None
    hidden = torch.randn(ROWS, WIDTH, generator=generator, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (ROWS, width), generator=generator)
    upstream = torch.randn(ROWS, width, generator=generator)
    first, second = random_adapter(1), random_adapter(2)
    sums = [Gradient(first), Gradient(second)]
    segments = [Segment(first, 0, 9, sums[0]), Segment(second, 12, ROWS, sums[1])]
    variables = [hidden]

    logits = hidden @ weight.t() + (0 if offset is None else offset)
    deltas = [torch.zeros_like(logits[9:12])]
    for adapter, rows in ((first, hidden[:9]), (second, hidden[12:])):
        pair = adapter.factors[0]
        assert pair is not None
        a, b = (factor.clone().requires_grad_(True) for factor in pair)
        variables += [a, b]
        deltas.append(adapter.scale * rows @ a.t() @ b.t())
    expected = (logits + torch.cat([deltas[1], deltas[0], deltas[2]])).log_softmax(1).gather(1, targets)
    expected_grads = torch.autograd.grad((expected * upstream).sum(), variables)

    unembedding = Unembedding(weight, offset, 0)
    found = unembedding.logprobs(hidden, targets, segments)
    grads = [*torch.autograd.grad((found * upstream).sum(), hidden)]
    grads += [factor for own in sums for factor in own.factors[0] or ()]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        torch.testing.assert_close(
            unembedding.logprobs(hidden, targets, segments), expected, rtol=0, atol=1e-5
        )
        chunks = [logits for _, logits in unembedding.chunks(hidden, segments)]
        torch.testing.assert_close(
            torch.cat(chunks).log_softmax(1).gather(1, targets), expected, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("chunk", [2**24, 5 * VOCABULARY])
def test_a_long_batch_without_an_adapter_here_has_the_gradient_of_full_logits(
    monkeypatch: pytest.MonkeyPatch, chunk: int, width: int, bias: bool
) -> None:
    """Its chunks are computed once where each row has one target; adapters of other layers get theirs by `hidden`."""
    monkeypatch.setattr(module, "KEPT_LOGITS", 0)
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk)
    computed: list[int] = []

    def counted(rows: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
        computed.append(len(rows))
        return project(rows, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "project", counted)
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    offset = torch.randn(VOCABULARY, generator=generator) if bias else None
    hidden = torch.randn(ROWS, WIDTH, generator=generator, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (ROWS, width), generator=generator)
    upstream = torch.randn(ROWS, width, generator=generator)
    full = hidden @ weight.t() + (0 if offset is None else offset)
    expected = full.log_softmax(1).gather(1, targets)
    found = Unembedding(weight, offset, 0).logprobs(hidden, targets, [])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    (grad,) = torch.autograd.grad((found * upstream).sum(), hidden)
    (expected_grad,) = torch.autograd.grad((expected * upstream).sum(), hidden)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)
    assert sum(computed) == (ROWS if width == 1 else 2 * ROWS)


def test_long_batches_leave_no_logits_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd keeps between the passes does not grow with rows times vocabulary."""
    monkeypatch.setattr(module, "KEPT_LOGITS", ROWS * VOCABULARY - 1)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 5 * VOCABULARY)
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    weight = torch.randn(VOCABULARY, WIDTH)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = Unembedding(weight, None, 0).logprobs(hidden, torch.zeros(ROWS, 1, dtype=torch.int64), [])
    assert max(saved) <= weight.numel() < ROWS * VOCABULARY
    assert out.grad_fn is not None and out.grad_fn.kept == []  # type: ignore[attr-defined]


def test_bfloat16_logits_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64; bfloat16 itself holds three digits. The weight is widened in parts, the last one smaller."""
    monkeypatch.setattr("engines.tuning.projection.WIDENED", 7 * 64)
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(size, 64, generator=generator).bfloat16() for size in (9, 40))
    bias = torch.randn(40, generator=generator).bfloat16()
    for own in (None, bias):
        found = project(hidden, weight, own)
        expected = hidden.double() @ weight.double().t() + (0 if own is None else own.double())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_target_of_no_measurable_probability_has_its_log_prob_still() -> None:
    """exp(-300) is zero in float32; the log-prob against a sum in float64. The rows become their softmax."""
    logits = torch.tensor([[0.0, 300.0, 299.0], [-1e4, 5.0, -1e4]])
    wanted = logits.double().log_softmax(1)
    found = module.logprobs_(logits, torch.tensor([[0, 2], [2, 1]]))
    torch.testing.assert_close(found.double(), torch.stack([wanted[0, [0, 2]], wanted[1, [2, 1]]]))
    torch.testing.assert_close(logits.double(), wanted.exp(), rtol=1e-5, atol=1e-30)
