"""Linear divergences against plain full-logits torch, Liger and TRL; gradients in float64; memory; edges."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rollout_kernels.errors import BadOption, BadTensor
from rollout_kernels.linear_divergence import (
    JSD,
    Divergence,
    ForwardKL,
    HiddenStates,
    Logits,
    ReverseKL,
    Sampled,
    SampledKL,
    Teacher,
    TopK,
    linear_divergence,
    linear_divergence_per_token,
)
from rollout_kernels.linear_divergence.heads import Head
from rollout_kernels.linear_divergence.reference import full_divergence, top_k_divergence
from rollout_kernels.mxfp4 import dequantize, quantize
from rollout_kernels.peak_memory import peak_bytes

DIVERGENCES = [ReverseKL(), ForwardKL(), JSD(0.5), JSD(0.1)]
T, HS, HT, V = 7, 6, 9, 23


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sides(vs: int = V, vt: int = V, tokens: int = T) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student hidden states and head, teacher hidden states and head, in float64; the sizes of all differ."""
    return randn(tokens, HS, seed=1), randn(vs, HS, seed=2), randn(tokens, HT, seed=3), randn(vt, HT, seed=4)


def top_k_of(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    logprobs, indices = torch.log_softmax(logits / temperature, -1).topk(k, -1)
    return TopK(indices, logprobs)


# --- gradients


@pytest.mark.parametrize("reduction", ["fused", "per_token"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("form", ["hidden", "logits", "hidden_top_k", "top_k"])
def test_gradients_are_those_of_the_value(divergence: Divergence, form: str, reduction: str) -> None:
    hs, ws, ht, wt = sides()
    weights = randn(T, seed=5).abs()
    top_k = 4 if form == "hidden_top_k" else None

    def value(*tensors: Tensor) -> Tensor:
        teacher: Teacher
        if form == "logits":
            teacher = Logits(tensors[2])
        elif form == "top_k":
            teacher = top_k_of(ht @ wt.T, 5, 1.7)
        else:
            teacher = HiddenStates(tensors[2], tensors[3])
        options = {"temperature": 1.7, "top_k": top_k, "chunk_tokens": 3}
        if reduction == "per_token":
            return linear_divergence_per_token(tensors[0], tensors[1], teacher, divergence, **options)  # type: ignore[arg-type]
        return linear_divergence(
            tensors[0],
            tensors[1],
            teacher,
            divergence,
            scale_by_squared_temperature=True,
            token_weights=weights,
            **options,  # type: ignore[arg-type]
        ).loss

    teacher_tensors = {"logits": [ht @ wt.T], "top_k": []}.get(form, [ht, wt])
    inputs = [t.clone().requires_grad_() for t in (hs, ws, *teacher_tensors)]
    assert torch.autograd.gradcheck(value, inputs, fast_mode=False)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_of_sampled_estimators(estimator: str) -> None:
    hs, ws, ht, wt = sides()
    tokens = torch.arange(T) * 3 % V
    teacher = Sampled(tokens, torch.log_softmax(ht @ wt.T, -1).gather(-1, tokens[:, None])[:, 0])

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_divergence(hidden, weight, teacher, SampledKL(estimator), temperature=0.8, chunk_tokens=2).loss  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(value, [hs.requires_grad_(), ws.requires_grad_()])


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 2), (1, 3), ()])
@pytest.mark.parametrize("per_token", [False, True])
def test_only_what_requires_a_gradient_gets_one(needed: tuple[int, ...], per_token: bool) -> None:
    tensors = [t.clone().requires_grad_(i in needed) for i, t in enumerate(sides())]
    everything = [t.clone().requires_grad_() for t in sides()]
    for hs, ws, ht, wt in (tensors, everything):
        teacher = HiddenStates(ht, wt)
        if per_token:
            loss = linear_divergence_per_token(hs, ws, teacher).mean()
        else:
            loss = linear_divergence(hs, ws, teacher).loss
        assert loss.requires_grad is any(t.requires_grad for t in (hs, ws, ht, wt))
        if loss.requires_grad:
            loss.backward()
    for i, (one, other) in enumerate(zip(tensors, everything)):
        if i in needed:
            torch.testing.assert_close(one.grad, other.grad)
        else:
            assert one.grad is None


# --- values


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_to_plain_full_logits(divergence: Divergence, dtype: torch.dtype) -> None:
    ours = [t.to(dtype).requires_grad_() for t in sides(tokens=12)]
    plain = [t.detach().clone().requires_grad_() for t in ours]
    hs, ws, ht, wt = plain
    expected = full_divergence(hs @ ws.T, ht @ wt.T, divergence, 0.7)
    weights = randn(12, seed=6).abs().to(dtype)
    (expected * weights).sum().backward()

    hs, ws, ht, wt = ours
    result = linear_divergence(
        hs.view(3, 4, HS),
        ws,
        HiddenStates(ht.view(3, 4, HT), wt),
        divergence,
        temperature=0.7,
        token_weights=weights.view(3, 4),
        reduction="sum",
    )
    result.loss.backward()
    assert result.per_token.shape == (3, 4)
    assert not result.per_token.requires_grad
    torch.testing.assert_close(result.per_token.flatten(), expected.detach())
    torch.testing.assert_close(result.loss, (expected * weights).sum().detach())
    for one, other in zip(ours, plain):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("k", [1, 5, V])
def test_top_k_with_tail_equals_plain(divergence: Divergence, k: int) -> None:
    hs, ws, ht, wt = sides()
    expected = top_k_divergence(hs @ ws.T, ht @ wt.T, k, divergence, 1.3) if k < V else None
    full = full_divergence(hs @ ws.T, ht @ wt.T, divergence, 1.3)
    inside = linear_divergence(hs, ws, HiddenStates(ht, wt), divergence, temperature=1.3, top_k=k).per_token
    given = linear_divergence(hs, ws, top_k_of(ht @ wt.T, k, 1.3), divergence, temperature=1.3).per_token
    torch.testing.assert_close(inside, full if expected is None else expected)
    torch.testing.assert_close(given, inside)
    assert (inside >= 0).all()
    assert (inside <= full + 1e-12).all()  # coarser distributions are never further apart


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_sampled_estimators_are_unbiased_where_they_claim_to_be(estimator: str) -> None:
    """The exact expectation: every token once, weighted with its probability under the student."""
    hidden, ws, ht, wt = randn(1, HS, seed=1).requires_grad_(), *sides()[1:]
    ht = ht[:1]
    ls, lt = torch.log_softmax(hidden @ ws.T, -1)[0], torch.log_softmax(ht @ wt.T, -1)[0]
    tokens = torch.arange(V)
    result = linear_divergence(
        hidden.expand(V, -1),
        ws,
        Sampled(tokens, lt),
        SampledKL(estimator),  # type: ignore[arg-type]
        token_weights=ls.exp().detach(),
        reduction="sum",
    )
    (gradient,) = torch.autograd.grad(result.loss, hidden)
    reverse = linear_divergence(hidden, ws, HiddenStates(ht, wt), ReverseKL())
    forward = linear_divergence(hidden, ws, HiddenStates(ht, wt), ForwardKL())
    if estimator != "k2":
        torch.testing.assert_close(result.loss, reverse.loss)
    expected = {
        "k1": torch.zeros_like(hidden),
        "k2": torch.autograd.grad(reverse.loss, hidden)[0],
        "k3": torch.autograd.grad(forward.loss, hidden)[0],
    }[estimator]
    torch.testing.assert_close(gradient, expected)
    if estimator != "k1":
        assert (result.per_token >= 0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from(DIVERGENCES), st.sampled_from([None, 3]))
def test_the_chunk_size_does_not_matter(one: int, other: int, divergence: Divergence, top_k: int | None) -> None:
    results = []
    for chunk in (one, other):
        tensors = [t.clone().requires_grad_() for t in sides(tokens=17)]
        hs, ws, ht, wt = tensors
        out = linear_divergence(hs, ws, HiddenStates(ht, wt), divergence, top_k=top_k, chunk_tokens=chunk)
        out.loss.backward()
        results.append((out.loss.detach(), out.per_token, *(t.grad for t in tensors)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("vs", "vt"), [(V, V + 9), (V + 9, V)])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_vocabularies_of_different_sizes_are_compared_over_the_common_prefix(
    divergence: Divergence, vs: int, vt: int
) -> None:
    tensors = [t.clone().requires_grad_() for t in sides(vs, vt)]
    hs, ws, ht, wt = tensors
    out = linear_divergence(hs, ws, HiddenStates(ht, wt), divergence)
    out.loss.backward()
    # Masking with −inf, written down as such.
    longest = max(vs, vt)
    masked = torch.full((T, longest), -torch.inf, dtype=torch.float64)
    student, teacher = masked.clone(), masked.clone()
    student[:, :V], teacher[:, :V] = (hs @ ws.T).detach()[:, :V], (ht @ wt.T).detach()[:, :V]
    expected = full_divergence(student[:, :V], teacher[:, :V], divergence)
    torch.testing.assert_close(torch.log_softmax(student, -1)[:, :V], torch.log_softmax(student[:, :V], -1))
    torch.testing.assert_close(out.per_token, expected)
    for weight in (ws, wt):
        assert weight.grad is not None
        assert weight.grad[:V].abs().min() > 0
        assert not weight.grad[V:].any()
    from_logits = linear_divergence(hs, ws, Logits((ht @ wt.T).detach()), divergence)
    torch.testing.assert_close(from_logits.per_token, expected)


def test_top_k_tokens_beyond_the_student_s_vocabulary_are_conditioned_away() -> None:
    hs, ws, ht, wt = sides(V, V + 9)
    full = HiddenStates(ht, wt)
    every = linear_divergence(hs, ws, top_k_of(ht @ wt.T, V + 9), ForwardKL()).per_token
    torch.testing.assert_close(every, linear_divergence(hs, ws, full, ForwardKL()).per_token)


def test_temperature_scaling() -> None:
    hs, ws, ht, wt = sides()
    plain = linear_divergence(hs, ws, HiddenStates(ht, wt), temperature=3.0)
    scaled = linear_divergence(hs, ws, HiddenStates(ht, wt), temperature=3.0, scale_by_squared_temperature=True)
    torch.testing.assert_close(scaled.loss, 9 * plain.loss)
    torch.testing.assert_close(scaled.per_token, plain.per_token)
    total = linear_divergence(hs, ws, HiddenStates(ht, wt), temperature=3.0, normalizer=100.0)
    torch.testing.assert_close(total.loss, plain.loss * T / 100)


def test_a_packed_teacher_head_equals_its_dequantised_self() -> None:
    packed = quantize(randn(150, 64, seed=1, dtype=torch.float32))
    hs, ws, ht = (randn(*s, seed=i, dtype=torch.float32) for i, s in enumerate([(5, HS), (140, HS), (5, 64)]))
    hs.requires_grad_()
    one = linear_divergence(hs, ws, HiddenStates(ht, packed))
    other = linear_divergence(hs, ws, HiddenStates(ht, dequantize(packed, torch.float32)))
    torch.testing.assert_close(one.per_token, other.per_token)
    one.loss.backward()
    assert hs.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    half = [t.to(dtype).requires_grad_() for t in sides()]
    wide = [t.detach().float().requires_grad_() for t in half]
    results = []
    for hs, ws, ht, wt in (half, wide):
        with torch.autocast("cpu", dtype=torch.bfloat16):  # must not reach the computation
            out = linear_divergence(hs, ws, HiddenStates(ht, wt))
        out.loss.backward()
        results.append(out)
    assert results[0].per_token.dtype == torch.float32
    torch.testing.assert_close(results[0].per_token, results[1].per_token)
    for h, w in zip(half, wide):
        assert h.grad is not None
        assert h.grad.dtype == dtype
        torch.testing.assert_close(h.grad.float(), w.grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("trained", [(0,), (0, 1, 2, 3)])
@pytest.mark.parametrize("tokens", [1, 4096])
def test_a_loss_scale_saves_float16_gradients(tokens: int, trained: tuple[int, ...], per_token: bool) -> None:
    """Of many tokens: gradients that float16 rounds to 0 without a loss scale. Of one: a scale beyond float16."""
    scale = 65536.0
    hs, ws = randn(tokens, HS, seed=1), randn(V, HS, seed=2)
    near = hs + 0.003 * randn(tokens, HS, seed=3), ws + 0.003 * randn(V, HS, seed=4)
    half = [t.half() for t in (hs, ws, *near)]
    grads = []
    for factor, dtype in ((1.0, torch.float64), (scale, torch.float16)):
        tensors = [t.to(dtype).requires_grad_(i in trained) for i, t in enumerate(half)]
        teacher = HiddenStates(tensors[2], tensors[3])
        if per_token:
            loss = linear_divergence_per_token(tensors[0], tensors[1], teacher).mean()
        else:
            loss = linear_divergence(tensors[0], tensors[1], teacher).loss
        (loss * factor).backward()
        grads.append([tensors[i].grad for i in trained])
    for expected, found in zip(*grads):
        assert expected is not None
        assert found is not None
        assert found.dtype == torch.float16
        error = (found.double() / scale - expected).norm() / expected.norm()
        assert error < 1e-3
    if tokens > 1:
        assert (grads[0][0].half() == 0).float().mean() > 0.02  # type: ignore[union-attr]


def test_a_float16_head_rounds_no_gradient() -> None:
    """As on a GPU, where such a head is multiplied as it is."""
    weight, grad, hidden = (randn(*s, seed=i, dtype=torch.float32) for i, s in enumerate([(V, HS), (T, V), (T, HS)]))
    head, grad = Head(weight.half(), V, torch.float32, as_is=True), grad * 1e-9
    torch.testing.assert_close(head.hidden_gradient(grad), grad @ weight.half().float(), atol=0.0, rtol=1e-4)
    total = torch.zeros(V, HS)
    head.add_weight_gradient(total, grad, hidden)
    torch.testing.assert_close(total, grad.T @ hidden, atol=0.0, rtol=1e-4)


def test_extreme_logits_stay_finite() -> None:
    ws = torch.eye(4, dtype=torch.float32)
    hs = torch.tensor([[1000.0, 0, 0, 0], [0, 0, 0, -1000.0]], requires_grad=True)
    ht = torch.tensor([[0, 1000.0, 0, 0], [-1000.0, 0, 0, 0]])
    for divergence in DIVERGENCES:
        for top_k in (None, 2):
            hs.grad = None
            out = linear_divergence(hs, ws, HiddenStates(ht, ws), divergence, top_k=top_k)
            out.loss.backward()
            assert hs.grad is not None
            assert torch.isfinite(hs.grad).all()
            if isinstance(divergence, JSD):
                assert out.per_token[0].item() == pytest.approx(entropy(divergence.beta), rel=1e-5)


def entropy(beta: float) -> float:
    """JSD(beta) of two distributions that share nothing."""
    return -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta))


def test_teacher_logits_of_minus_infinity_exclude_tokens() -> None:
    hs, ws, ht, wt = sides()
    logits = ht @ wt.T
    logits[2, 5:] = -torch.inf
    for divergence in (ForwardKL(), JSD(0.5)):
        out = linear_divergence(hs.requires_grad_(), ws, Logits(logits), divergence)
        out.loss.backward()
        assert torch.isfinite(hs.grad).all()  # type: ignore[arg-type]
    with pytest.raises(BadTensor, match=r"token \[2\] is inf.*ForwardKL"):
        linear_divergence(hs, ws, Logits(logits), ReverseKL())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.floats(0.01, 30.0), st.sampled_from(DIVERGENCES))
def test_top_k_is_never_negative(seed: int, k: int, sharpness: float, divergence: Divergence) -> None:
    hs, ws, logits = randn(4, 5, seed=seed).float(), randn(9, 5, seed=seed + 1).float(), randn(4, 9, seed=seed + 2)
    teacher = top_k_of((logits * sharpness).float(), k)
    rounded = TopK(teacher.indices.int(), teacher.logprobs.half())  # what a wire might carry
    assert (linear_divergence(hs, ws, rounded, divergence).per_token >= -1e-6).all()


def test_ragged_top_k_ignores_padding() -> None:
    hs, ws, ht, wt = sides()
    full = top_k_of(ht @ wt.T, 5)
    indices, logprobs = full.indices.clone(), full.logprobs.clone()
    indices[3, 2:], logprobs[3, 2:] = -1, torch.nan
    hs.requires_grad_()
    ragged = linear_divergence(hs, ws, TopK(indices, logprobs))
    two = linear_divergence(hs, ws, TopK(full.indices[:, :2], full.logprobs[:, :2])).per_token
    five = linear_divergence(hs, ws, full).per_token
    torch.testing.assert_close(ragged.per_token, torch.where(torch.arange(T) == 3, two, five))
    ragged.loss.backward()
    assert torch.isfinite(hs.grad).all()  # type: ignore[arg-type]


# --- masks and edges


@pytest.mark.parametrize("per_token", [False, True])
def test_masked_tokens_are_never_read(per_token: bool) -> None:
    hs, ws, ht, wt = sides()
    mask = torch.tensor([True, False, True, True, False, True, True])
    expected = linear_divergence_per_token(hs[mask], ws, HiddenStates(ht[mask], wt))
    hs[~mask], ht[~mask] = torch.nan, torch.inf
    hs.requires_grad_()
    if per_token:
        values = linear_divergence_per_token(hs, ws, HiddenStates(ht, wt), mask=mask)
        loss = values.sum() / mask.sum()
    else:
        loss, values = linear_divergence(hs, ws, HiddenStates(ht, wt), mask=mask)
    torch.testing.assert_close(values[mask], expected)
    assert not values[~mask].any()
    torch.testing.assert_close(loss, expected.mean())
    loss.backward()
    assert hs.grad is not None
    assert not hs.grad[~mask].any()
    assert (hs.grad[mask].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("shape", [(T,), (0,), (2, 0)])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_nothing_to_learn_from_is_a_loss_of_zero_with_zero_gradients(
    divergence: Divergence, shape: tuple[int, ...]
) -> None:
    hs, ws = torch.randn(*shape, HS, requires_grad=True), torch.randn(V, HS, requires_grad=True)
    mask = torch.zeros(shape, dtype=torch.bool)
    out = linear_divergence(hs, ws, HiddenStates(torch.randn(*shape, HT), torch.randn(V, HT)), divergence, mask=mask)
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert out.per_token.shape == shape
    teacher = HiddenStates(torch.randn(*shape, HT), torch.randn(V, HT))
    assert linear_divergence(hs, ws, teacher, divergence, mask=mask, normalizer=mask.sum()).loss.item() == 0.0
    for tensor in (hs, ws):
        assert tensor.grad is not None
        assert not tensor.grad.any()
    values = linear_divergence_per_token(hs, ws, HiddenStates(torch.randn(*shape, HT), torch.randn(V, HT)), mask=mask)
    assert not values.any()


def test_strides_do_not_matter() -> None:
    hs, ws, ht, wt = sides()
    hs2, ws2, ht2, wt2 = (t.T.contiguous().T for t in (hs, ws, ht, wt))
    assert not ws2.is_contiguous()
    tensors = [hs2.requires_grad_(), ws2.requires_grad_()]
    out = linear_divergence(*tensors, HiddenStates(ht2, wt2))
    out.loss.backward()
    torch.testing.assert_close(out.per_token, full_divergence(hs2 @ ws2.T, ht2 @ wt2.T, ReverseKL()).detach())


def test_backward_scales_and_can_be_repeated() -> None:
    hs, ws, ht, wt = sides()
    hs.requires_grad_()
    loss = linear_divergence(hs, ws, HiddenStates(ht, wt)).loss
    (once,) = torch.autograd.grad(loss, hs, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, hs)
    torch.testing.assert_close(thrice, 3 * once)


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "hidden size": (lambda: call(ws=randn(V, HS + 1)), r"student_weight has shape \[23, 7\].*\[any, 6\]"),
    "teacher tokens": (lambda: call(ht=randn(T + 1, HT)), r"teacher\.hidden has shape \[8, 9\].*\[7, any\]"),
    "teacher head": (lambda: call(wt=randn(V, HT - 1)), r"teacher\.weight has shape \[23, 8\].*\[any, 9\]"),
    "packed head": (lambda: call(wt=quantize(randn(V, 32).float())), r"teacher\.weight has shape \[23, 32\]"),
    "integer hidden": (lambda: call(hs=torch.zeros(T, HS, dtype=torch.int64)), r"student_hidden .*int64"),
    "meta device": (lambda: call(ws=randn(V, HS).to("meta")), r"student_weight .*meta.*student_hidden"),
    "mask dtype": (lambda: call(mask=torch.ones(T)), r"mask .*float32.*bool"),
    "mask shape": (lambda: call(mask=torch.ones(T + 1, dtype=torch.bool)), r"mask has shape \[8\].*\[7\]"),
    "weights shape": (lambda: call(token_weights=torch.ones(T, 1)), r"token_weights has shape \[7, 1\]"),
    "weights nan": (lambda: call(token_weights=with_nan(torch.ones(T))), r"token_weights .* nan at index \[4\]"),
    "weights gradient": (lambda: call(token_weights=torch.ones(T, requires_grad=True)), "requires a gradient"),
    "nan": (lambda: call(hs=with_nan(randn(T, HS))), r"token \[4\] is nan: student_hidden .*there"),
    "nan teacher": (lambda: call(ht=with_nan(randn(T, HT))), r"token \[4\] is nan: the teacher"),
    "nan jsd": (lambda: call(hs=with_nan(randn(T, HS)), divergence=JSD()), r"token \[4\] is nan"),
    "repeated": (lambda: call(teacher=TopK(torch.zeros(T, 2, dtype=torch.int64), -torch.ones(T, 2))), "repeats"),
    "logits as top-k": (lambda: call(teacher=TopK(torch.zeros(T, 1, dtype=torch.int32), torch.ones(T, 1))), "positive"),
    "probability": (lambda: call(teacher=TopK(torch.arange(3).repeat(T, 1), torch.zeros(T, 3))), "more than 1"),
    "sampled id": (
        lambda: call(teacher=Sampled(torch.full((T,), V), -torch.ones(T)), divergence=SampledKL()),
        "outside the student's vocabulary of 23 at unmasked token 0",
    ),
    "sampled nan": (
        lambda: call(teacher=Sampled(torch.arange(T), with_nan(torch.ones(T))), divergence=SampledKL()),
        "infinity or NaN at unmasked token 4",
    ),
}


def with_nan(tensor: Tensor) -> Tensor:
    tensor[4] = torch.nan
    return tensor


def call(**changes: object) -> object:
    hs, ws, ht, wt = sides()
    given_ = {"hs": hs, "ws": ws, "ht": ht, "wt": wt} | {k: changes.pop(k) for k in list(changes) if len(k) == 2}
    teacher = changes.pop("teacher", None) or HiddenStates(given_["ht"], given_["wt"])  # type: ignore[arg-type]
    return linear_divergence(given_["hs"], given_["ws"], teacher, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors_are_named(case: str) -> None:
    run, message = BAD[case]
    with pytest.raises(BadTensor, match=message):
        run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
        ({"top_k": V + 1}, "top_k=24"),
        ({"normalizer": 0.0}, "normalizer=0.0"),
        ({"normalizer": -1.0}, "normalizer=-1.0"),
        ({"reduction": "max"}, "reduction='max'"),
        ({"divergence": SampledKL()}, "HiddenStates"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        call(**options)
    for beta in (0.0, 1.0, math.nan):
        with pytest.raises(BadOption, match="ForwardKL"):
            JSD(beta)
    with pytest.raises(BadOption, match="k4"):
        SampledKL("k4")  # type: ignore[arg-type]


# --- memory


def peak_of(tokens: int, vocabulary: int, chunk: int, *, frozen: bool = True, plain: bool = False) -> int:
    f = torch.float32
    hs, ws = randn(tokens, 16, dtype=f).requires_grad_(), randn(vocabulary, 16, dtype=f).requires_grad_(not frozen)
    ht, wt = randn(tokens, 16, seed=1, dtype=f), randn(vocabulary, 16, seed=1, dtype=f)

    def ours() -> None:
        linear_divergence(hs, ws, HiddenStates(ht, wt), chunk_tokens=chunk).loss.backward()

    def full() -> None:
        full_divergence(hs @ ws.T, ht @ wt.T, ReverseKL()).mean().backward()

    return peak_bytes(full if plain else ours)


def test_peak_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    v, chunk = 4096, 16
    buffer = chunk * v * 4
    few, many = peak_of(64, v, chunk), peak_of(1024, v, chunk)
    row = 4 * (16 * 4 + 8)  # bytes that each token may take: gradients of hidden states and a few numbers
    assert few < 4 * buffer
    assert many - few < 960 * row
    assert peak_of(64, v, 2 * chunk) > 1.5 * few  # the measure does see buffers
    assert peak_of(1024, v, chunk, plain=True) > 3 * 1024 * v * 4
    with_head = peak_of(1024, v, chunk, frozen=False)
    assert with_head - many < 1.1 * v * 16 * 4 + buffer  # one gradient of the head, not two


def test_a_packed_teacher_head_is_never_whole() -> None:
    packed = quantize(randn(8192, 1024, dtype=torch.float32))
    hs, ws = randn(4, 16, dtype=torch.float32).requires_grad_(), randn(8192, 16, dtype=torch.float32)
    teacher = HiddenStates(randn(4, 1024, dtype=torch.float32), packed)

    def run() -> None:
        linear_divergence(hs, ws, teacher).loss.backward()

    assert peak_bytes(run) < 0.6 * 8192 * 1024 * 4


def test_without_grad_mode_no_gradient_is_computed() -> None:
    v = 20_000
    hs, ws, ht, wt = (randn(*s, dtype=torch.float32).requires_grad_() for s in [(8, 16), (v, 16), (8, 16), (v, 16)])

    def run() -> None:
        with torch.no_grad():
            assert not linear_divergence(hs, ws, HiddenStates(ht, wt), chunk_tokens=1).loss.requires_grad
            linear_divergence_per_token(hs, ws, HiddenStates(ht, wt), chunk_tokens=1)

    assert peak_bytes(run) < 0.5 * v * 16 * 4


def test_a_frozen_head_allocates_no_gradient() -> None:
    v = 20_000
    frozen, trained = peak_of(8, v, 1), peak_of(8, v, 1, frozen=False)
    assert trained - frozen > 0.9 * v * 16 * 4


# --- other libraries, where they are right


@pytest.mark.parametrize(("beta", "divergence"), [(0.0, ForwardKL()), (1.0, ReverseKL()), (0.3, JSD(0.3))])
def test_agrees_with_liger(beta: float, divergence: Divergence) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger is not installed", exc_type=ImportError)

    hs, ws, ht, wt = (t.float() for t in sides())
    hs.requires_grad_()
    ws.requires_grad_()
    labels = torch.zeros(T, dtype=torch.int64)
    labels[2] = -100
    loss = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=1.5, compiled=False
    )
    theirs = loss(hs, ws, ht, wt, labels)
    expected = torch.autograd.grad(theirs, (hs, ws))
    out = linear_divergence(hs, ws, HiddenStates(ht, wt), divergence, temperature=1.5, mask=labels != -100)
    torch.testing.assert_close(out.loss, theirs)
    for one, other in zip(torch.autograd.grad(out.loss, (hs, ws)), expected):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("beta", "divergence"), [(0.0, ForwardKL()), (1.0, ReverseKL()), (0.3, JSD(0.3))])
def test_agrees_with_trl(beta: float, divergence: Divergence) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chunked = pytest.importorskip(
            "trl.kernels.chunked_divergence", reason="trl is not installed", exc_type=ImportError
        )

    tensors = [t.float() for t in sides()]
    hs, ws, ht, wt = tensors[0].requires_grad_(), tensors[1].requires_grad_(), *tensors[2:]
    theirs, _ = chunked.ChunkedDivergenceFunction.apply(hs, ws, None, ht, wt, None, beta, 1.5)
    ours = linear_divergence_per_token(hs, ws, HiddenStates(ht, wt), divergence, temperature=1.5)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(torch.autograd.grad(ours.sum(), (hs, ws)), torch.autograd.grad(theirs.sum(), (hs, ws))):
        torch.testing.assert_close(one, other)
