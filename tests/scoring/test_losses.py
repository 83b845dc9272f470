"""Objectives against a second implementation in numpy float64 that loops over tokens, and gradients by gradcheck."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rollout_kernels.errors import BadOption, BadTensor
from rollout_kernels.linear_divergence import JSD, ForwardKL, ReverseKL
from scoring import losses

B, T, V, K = 4, 7, 11, 3


@pytest.fixture
def data() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)

    def logprobs(spread: float = 0.3) -> Tensor:
        return -torch.rand(B, T, generator=g, dtype=torch.float64) * spread - 0.5

    mask = torch.rand(B, T, generator=g) > 0.3
    mask[2] = False  # a sequence of which nothing counts
    mask[0] = True
    return {
        "new": logprobs(0.9),
        "old": logprobs(),
        "behav": logprobs(2.0),
        "teacher": logprobs(),
        "reference": logprobs(),
        "advantages": torch.randn(B, generator=g, dtype=torch.float64),
        "token_advantages": torch.randn(B, T, generator=g, dtype=torch.float64),
        "mask": mask,
        "student_logits": torch.randn(B, T, V, generator=g, dtype=torch.float64),
        "teacher_logits": torch.randn(B, T, V, generator=g, dtype=torch.float64),
    }


def plain_mean(values: np.ndarray, mask: np.ndarray, how: str) -> float:
    rows = [[values[b, t] for t in range(T) if mask[b, t]] for b in range(B)]
    if how == "sum":
        return math.fsum(v for row in rows for v in row)
    if how == "token_mean":
        return math.fsum(v for row in rows for v in row) / sum(map(len, rows))
    return float(np.mean([np.mean(row) for row in rows if row]))


def plain_tokens(mask: np.ndarray, value: Callable[[int, int], float]) -> np.ndarray:
    out = np.zeros((B, T))
    for b in range(B):
        for t in range(T):
            if mask[b, t]:
                out[b, t] = value(b, t)
    return out


def plain_clip(new: float, old: float, a: float, low: float, high: float) -> float:
    r = math.exp(new - old)
    return -min(r * a, min(max(r, 1 - low), 1 + high) * a)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
def test_policy_gradient_objectives_agree_with_plain_loops(data: dict[str, Tensor], reduction: Any) -> None:
    d = {k: v.numpy() for k, v in data.items()}
    mask, n, o, h, ref = d["mask"], d["new"], d["old"], d["behav"], d["reference"]
    A, At = d["advantages"], d["token_advantages"]

    def ratio(x: np.ndarray, y: np.ndarray, b: int, t: int) -> float:
        return math.exp(x[b, t] - y[b, t])

    def k3(b: int, t: int) -> float:
        rho = ratio(ref, n, b, t)
        return rho - 1 - math.log(rho)

    def pop(b: int, t: int) -> float:
        k = ratio(o, h, b, t)
        return (k if 0.7 <= k <= 1.9 else 0.0) * plain_clip(n[b, t], o[b, t], A[b], 0.1, 0.3)

    def cascade(b: int, t: int) -> float:
        r = ratio(n, h, b, t)
        return -(r if 0.7 <= r <= 1.9 else 0.0) * At[b, t] * n[b, t]

    x = data
    cases: list[tuple[Tensor, Callable[[int, int], float]]] = [
        (
            losses.policy_gradient_loss(x["new"], x["advantages"], x["mask"], reduction=reduction),
            lambda b, t: -A[b] * n[b, t],
        ),
        (
            losses.opd_loss(x["new"], x["teacher"], x["mask"], reduction=reduction),
            lambda b, t: -(d["teacher"][b, t] - n[b, t]) * n[b, t],
        ),
        (
            losses.grpo_loss(
                x["new"],
                x["old"],
                x["advantages"],
                x["mask"],
                clip_low=0.1,
                clip_high=0.3,
                reference_logprobs_BT=x["reference"],
                kl_weight=0.7,
                reduction=reduction,
            ),
            lambda b, t: plain_clip(n[b, t], o[b, t], A[b], 0.1, 0.3) + 0.7 * k3(b, t),
        ),
        (
            losses.truncated_importance_loss(
                x["new"],
                x["old"],
                x["behav"],
                x["token_advantages"],
                x["mask"],
                cap=1.5,
                clip_low=0.1,
                clip_high=0.3,
                reduction=reduction,
            ),
            lambda b, t: min(ratio(o, h, b, t), 1.5) * plain_clip(n[b, t], o[b, t], At[b, t], 0.1, 0.3),
        ),
        (
            losses.icepop_loss(
                x["new"],
                x["old"],
                x["behav"],
                x["advantages"],
                x["mask"],
                alpha=0.7,
                beta=1.9,
                clip_low=0.1,
                clip_high=0.3,
                reduction=reduction,
            ),
            pop,
        ),
        (
            losses.masked_importance_loss(
                x["new"],
                x["behav"],
                x["token_advantages"],
                x["mask"],
                ratio_low=0.7,
                ratio_high=1.9,
                reduction=reduction,
            ),
            cascade,
        ),
        (
            losses.three_policy_loss(
                x["new"],
                x["old"],
                x["behav"],
                x["advantages"],
                x["mask"],
                clip_low=0.1,
                clip_high=0.3,
                reduction=reduction,
            ),
            lambda b, t: ratio(o, h, b, t) * plain_clip(n[b, t], o[b, t], A[b], 0.1, 0.3),
        ),
    ]
    for found, value in cases:
        assert float(found) == pytest.approx(plain_mean(plain_tokens(mask, value), mask, reduction), rel=1e-12)
    kept = losses.icepop_keep(x["old"], x["behav"], x["mask"], alpha=0.7, beta=1.9)
    expected = plain_tokens(mask, lambda b, t: 0.7 <= ratio(o, h, b, t) <= 1.9).astype(bool)
    assert (kept.numpy() == expected).all()
    assert 0 < expected.sum() < mask.sum(), "the band must matter in this test"


def test_group_advantages(data: dict[str, Tensor]) -> None:
    rewards = torch.tensor([1.0, 0.1, 0.1, 0.1, 3.0, 5.0, 0.0, 2.0], dtype=torch.float64)
    groups = torch.tensor([9, 4, 4, 4, 7, 7, 9, 9])
    found = losses.group_advantages(rewards, groups).numpy()
    for g in (9, 7):
        own = rewards.numpy()[groups.numpy() == g]
        np.testing.assert_allclose(
            found[groups.numpy() == g], (own - own.mean()) / (own.std(ddof=1) + 1e-6), rtol=1e-12
        )
    assert (found[1:4] == 0).all(), "equal rewards teach nothing, rounding included"
    plain = losses.group_advantages(rewards, groups, divide_by_std=False).numpy()
    assert plain[4] == -1.0
    assert losses.group_advantages(rewards[:1], groups[:1]).item() == 0.0


def test_token_advantages(data: dict[str, Tensor]) -> None:
    t, s, r, mask = (data[k].numpy() for k in ("teacher", "new", "reference", "mask"))
    opd = losses.opd_advantages(data["teacher"], data["new"], data["mask"])
    np.testing.assert_allclose(opd.numpy(), plain_tokens(mask, lambda b, i: t[b, i] - s[b, i]), rtol=1e-12)
    ex = losses.exopd_advantages(data["teacher"], data["new"], data["reference"], data["mask"], extrapolation=1.7)
    expected = plain_tokens(mask, lambda b, i: 1.7 * (t[b, i] - r[b, i]) - (s[b, i] - r[b, i]))
    np.testing.assert_allclose(ex.numpy(), expected, rtol=1e-10)
    one = losses.exopd_advantages(data["teacher"], data["new"], data["reference"], data["mask"], extrapolation=1.0)
    np.testing.assert_allclose(one.numpy(), opd.numpy(), atol=1e-14)
    mixed = losses.mix_with_outcome(opd, data["advantages"], data["mask"], alpha=0.5).numpy()
    a = data["advantages"].numpy()
    np.testing.assert_allclose(mixed, plain_tokens(mask, lambda b, i: t[b, i] - s[b, i] + 0.5 * a[b]), rtol=1e-12)
    both = torch.stack((data["teacher"], data["reference"]))
    weights = torch.tensor([[0.25, 1.0, 0.5, 0.0], [0.75, 0.0, 0.5, 1.0]], dtype=torch.float64)
    many = losses.multi_teacher_advantages(both, weights, data["new"], data["mask"]).numpy()
    w = weights.numpy()
    expected = plain_tokens(mask, lambda b, i: w[0, b] * (t[b, i] - s[b, i]) + w[1, b] * (r[b, i] - s[b, i]))
    np.testing.assert_allclose(many, expected, rtol=1e-10, atol=1e-15)
    both[0, 3] = torch.nan  # weight 0: not read
    again = losses.multi_teacher_advantages(both, weights, data["new"], data["mask"]).numpy()
    np.testing.assert_array_equal(again, many)


def test_teachers_of_single_tokens(data: dict[str, Tensor]) -> None:
    """As a router by segment has it: each token has teachers of its own, and the others' columns hold nothing."""
    t, s, r, mask = (data[k].numpy() for k in ("teacher", "new", "reference", "mask"))
    g = torch.Generator().manual_seed(5)
    scored = (torch.rand(2, B, T, generator=g) > 0.4) & data["mask"]
    weights = torch.rand(2, B, T, generator=g, dtype=torch.float64)
    both = torch.stack((data["teacher"], data["reference"])).masked_fill(~scored, torch.nan)
    weights = weights.masked_fill(~scored, torch.nan).nan_to_num(0.0)
    student = data["new"].clone().requires_grad_()
    found = losses.multi_teacher_advantages(both, weights, student, scored)
    assert not found.requires_grad
    k, w = scored.numpy(), weights.numpy()
    expected = plain_tokens(
        mask,
        lambda b, i: sum(w[n, b, i] * (x[b, i] - s[b, i]) for n, x in enumerate((t, r)) if k[n, b, i]),
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-15)
    assert (scored.any(0) != data["mask"]).any()
    for wrong in (torch.ones(3), torch.ones(2, B + 1), torch.ones(2, 1, T)):
        with pytest.raises(BadTensor, match="weights has shape"):
            losses.multi_teacher_advantages(both, wrong.double(), data["new"], scored)
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(BadTensor, match="weights holds a negative weight, an infinity or NaN"):
            losses.multi_teacher_advantages(both, torch.tensor([1.0, value]), data["new"], scored)
    unread = losses.multi_teacher_advantages(both, weights.masked_fill(~scored, torch.nan), student, scored)
    torch.testing.assert_close(unread, found, rtol=0, atol=0)
    with pytest.raises(BadTensor, match="mask"):
        losses.multi_teacher_advantages(both, weights, data["new"], scored[:1])


def test_a_reference_is_a_constant_and_a_distant_one_no_overflow(data: dict[str, Tensor]) -> None:
    new, reference = (data[k].clone().requires_grad_() for k in ("new", "reference"))
    loss = losses.grpo_loss(
        new, data["old"], data["advantages"], data["mask"], reference_logprobs_BT=reference, kl_weight=0.5
    )
    loss.backward()
    assert reference.grad is None
    assert new.grad is not None
    far = losses.grpo_loss(
        data["new"] - 200.0,
        data["old"] - 200.0,
        data["advantages"],
        data["mask"],
        reference_logprobs_BT=data["reference"],
        kl_weight=0.5,
    )
    assert torch.isfinite(far)


def plain_jsd(p: np.ndarray, q: np.ndarray, beta: float) -> float:
    """p teacher, q student."""

    def kl(x: np.ndarray, y: np.ndarray) -> float:
        return math.fsum(a * math.log(a / b) for a, b in zip(x, y) if a > 0)

    if beta in (0.0, 1.0):
        return kl(p, q) if beta == 0.0 else kl(q, p)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def plain_softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(("student_v", "teacher_v"), [(V, V), (V, V - 3), (V - 3, V)])
def test_gkd(data: dict[str, Tensor], beta: float, student_v: int, teacher_v: int) -> None:
    s, t = data["student_logits"][..., :student_v], data["teacher_logits"][..., :teacher_v]
    common = min(student_v, teacher_v)
    found = losses.gkd_loss(s, t, data["mask"], beta=beta, temperature=1.5)
    mask = data["mask"].numpy()

    def value(b: int, i: int) -> float:
        p, q = (plain_softmax(x[b, i, :common].numpy() / 1.5) for x in (t, s))
        return plain_jsd(p, q, beta)

    assert float(found) == pytest.approx(plain_mean(plain_tokens(mask, value), mask, "token_mean"), rel=1e-10)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("outside", ["bucket", "renormalize"])
def test_local_support(data: dict[str, Tensor], beta: float, outside: Any) -> None:
    s, t, mask = data["student_logits"], data["teacher_logits"], data["mask"]
    log_t = torch.log_softmax(t, -1)
    support = losses.union_support(s, t.topk(K, -1).indices, K)
    for b in range(B):
        for i in range(T):
            expected = {*t[b, i].topk(K).indices.tolist(), *s[b, i].topk(K).indices.tolist()}
            ids = [x for x in support[b, i].tolist() if x >= 0]
            assert set(ids) == expected
            assert len(ids) == len(expected)
    teacher = log_t.gather(-1, support.clamp(min=0)).masked_fill(support < 0, torch.nan)  # never read
    found = losses.local_support_loss(s, support, teacher, mask, beta=beta, outside=outside)

    def value(b: int, i: int) -> float:
        ids = [x for x in support[b, i].tolist() if x >= 0]
        p, q = (plain_softmax(x[b, i].numpy()) for x in (t, s))
        p, q = ((x[ids], x.sum() - x[ids].sum()) for x in (p, q))
        if outside == "bucket":
            return plain_jsd(np.append(*p), np.append(*q), beta)
        return plain_jsd(p[0] / p[0].sum(), q[0] / q[0].sum(), beta)

    assert float(found) == pytest.approx(
        plain_mean(plain_tokens(mask.numpy(), value), mask.numpy(), "token_mean"), rel=1e-9
    )
    # The whole vocabulary as the support is the full divergence.
    everything = torch.arange(V).expand(B, T, V)
    full = losses.local_support_loss(s, everything, log_t, mask, beta=beta, outside=outside)
    assert float(full) == pytest.approx(float(losses.gkd_loss(s, t, mask, beta=beta)), rel=1e-10)


@pytest.mark.parametrize(("divergence", "beta"), [(ReverseKL(), 1.0), (ForwardKL(), 0.0), (JSD(0.3), 0.3)])
def test_full_vocabulary_equals_gkd_on_the_same_logits(data: dict[str, Tensor], divergence: Any, beta: float) -> None:
    g = torch.Generator().manual_seed(1)
    hidden_s = torch.randn(B, T, 5, generator=g, dtype=torch.float64, requires_grad=True)
    hidden_t = torch.randn(B, T, 6, generator=g, dtype=torch.float64)
    head_s = torch.randn(V, 5, generator=g, dtype=torch.float64, requires_grad=True)
    head_t = torch.randn(V - 2, 6, generator=g, dtype=torch.float64)
    found = losses.full_vocabulary_loss(hidden_s, head_s, hidden_t, head_t, data["mask"], divergence=divergence)
    expected = losses.gkd_loss(hidden_s @ head_s.T, hidden_t @ head_t.T, data["mask"], beta=beta)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    for ours, theirs in zip(
        torch.autograd.grad(found, (hidden_s, head_s)), torch.autograd.grad(expected, (hidden_s, head_s))
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_head_that_both_sides_share_is_a_constant_as_the_teacher_s(data: dict[str, Tensor]) -> None:
    g = torch.Generator().manual_seed(1)
    hidden_s, hidden_t = (torch.randn(B, T, 5, generator=g, dtype=torch.float64) for _ in range(2))
    head = torch.randn(V, 5, generator=g, dtype=torch.float64, requires_grad=True)
    found = losses.full_vocabulary_loss(hidden_s, head, hidden_t, head, data["mask"])
    expected = losses.gkd_loss(hidden_s @ head.T, hidden_t @ head.T, data["mask"], beta=1.0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, head)[0] for loss in (found, expected)))
    teacher_head = head.detach().clone().requires_grad_()
    losses.full_vocabulary_loss(hidden_s, head, hidden_t, teacher_head, data["mask"]).backward()
    assert teacher_head.grad is None


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_excluded_tokens(data: dict[str, Tensor], temperature: float) -> None:
    """An infinite divergence is an error; a finite one is that of the distributions, whatever the temperature."""
    s, mask = data["student_logits"], data["mask"]
    keep = torch.arange(V) < V - 2
    one = torch.ones(B, T, 1, dtype=torch.bool)
    lacking = data["teacher_logits"].masked_fill(~keep, -torch.inf)
    for beta in (0.0, 0.5):
        found = losses.gkd_loss(s, lacking, mask, beta=beta, temperature=temperature)

        def value(b: int, i: int) -> float:
            p, q = (plain_softmax(x[b, i].numpy() / temperature) for x in (lacking, s))
            return plain_jsd(p, q, beta)  # noqa: B023

        assert float(found) == pytest.approx(plain_mean(plain_tokens(mask.numpy(), value), mask.numpy(), "token_mean"))
    with pytest.raises(BadTensor, match=r"token \[0, 0\] is infinite at beta=1.0: the teacher excludes"):
        losses.gkd_loss(s, lacking, mask, beta=1.0, temperature=temperature)
    with pytest.raises(BadTensor, match=r"token \[0, 0\] is infinite at beta=0.0: the student excludes"):
        losses.gkd_loss(lacking, s, mask, beta=0.0, temperature=temperature)
    student = s.masked_fill(~keep, -torch.inf).requires_grad_()
    for beta in (0.0, 0.5, 1.0):  # what both exclude adds nothing
        both = losses.gkd_loss(student, lacking, mask, beta=beta, temperature=temperature)
        without = losses.gkd_loss(s[..., keep], lacking[..., keep], mask, beta=beta, temperature=temperature)
        torch.testing.assert_close(both, without)
        assert torch.isfinite(torch.autograd.grad(both, student)[0]).all()
    with pytest.raises(BadTensor, match="log-softmax of teacher_logits"):
        losses.gkd_loss(s, lacking.masked_fill(one, -torch.inf), mask)
    everything, log_t = torch.arange(V).expand(B, T, V), torch.log_softmax(s / temperature, -1)
    with pytest.raises(BadTensor, match=r"infinite at beta=0.0: the student excludes"):
        losses.local_support_loss(lacking, everything, log_t, mask, beta=0.0, temperature=temperature)


def test_gradients(data: dict[str, Tensor]) -> None:
    """gradcheck where the value's derivative is the gradient; where constants are detached, their frozen values."""
    d, mask = data, data["mask"]
    new = d["new"].clone().requires_grad_()
    logits = d["student_logits"].clone().requires_grad_()
    support = losses.union_support(d["student_logits"], d["teacher_logits"].topk(K, -1).indices, K)
    teacher = torch.log_softmax(d["teacher_logits"], -1).gather(-1, support.clamp(min=0))
    advantages = d["token_advantages"]
    of_new: list[Callable[[Tensor], Tensor]] = [
        lambda x: losses.policy_gradient_loss(x, advantages, mask),
        lambda x: losses.grpo_loss(x, d["old"], advantages, mask, reference_logprobs_BT=d["reference"], kl_weight=0.3),
        lambda x: losses.truncated_importance_loss(x, d["old"], d["behav"], advantages, mask),
        lambda x: losses.icepop_loss(x, d["old"], d["behav"], advantages, mask),
        lambda x: losses.three_policy_loss(x, d["old"], d["behav"], advantages, mask),
    ]
    for f in of_new:
        assert torch.autograd.gradcheck(f, (new,))
    of_logits: list[Callable[[Tensor], Tensor]] = [
        lambda x: losses.gkd_loss(x, d["teacher_logits"], mask, beta=0.3),
        lambda x: losses.gkd_loss(x, d["teacher_logits"], mask, beta=1.0),
        lambda x: losses.local_support_loss(x, support, teacher, mask),
        lambda x: losses.local_support_loss(x, support, teacher, mask, beta=0.4, outside="renormalize"),
    ]
    for f in of_logits:
        assert torch.autograd.gradcheck(f, (logits,))
    # OPD and the masked objective hold weights constant: the gradient is −w·a/n, not the derivative of the value.
    (grad,) = torch.autograd.grad(losses.opd_loss(new, d["teacher"], mask), new)
    expected = torch.where(mask, -(d["teacher"] - d["new"]) / mask.sum(), 0.0)
    torch.testing.assert_close(grad, expected)
    found = losses.masked_importance_loss(new, d["behav"], advantages, mask, ratio_low=0.7, ratio_high=1.9)
    (grad,) = torch.autograd.grad(found, new)
    r = (d["new"] - d["behav"]).exp()
    expected = torch.where(mask & (r >= 0.7) & (r <= 1.9), -r * advantages / mask.sum(), 0.0)
    torch.testing.assert_close(grad, expected)


def test_opd_gradient_is_that_of_the_reverse_kl_in_expectation() -> None:
    """Exactly, over all tokens of a small vocabulary, each weighted by its probability."""
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(V, generator=g, dtype=torch.float64, requires_grad=True)
    teacher = torch.log_softmax(torch.randn(V, generator=g, dtype=torch.float64), -1)
    student = torch.log_softmax(logits, -1)
    total = sum(
        float(student[y].detach().exp())
        * torch.autograd.grad(
            losses.opd_loss(student[y].view(1, 1), teacher[y].view(1, 1), torch.ones(1, 1, dtype=torch.bool)),
            logits,
            retain_graph=True,
        )[0]
        for y in range(V)
    )
    (expected,) = torch.autograd.grad((student.exp() * (student - teacher)).sum(), logits)
    torch.testing.assert_close(total, expected)


def test_what_is_masked_is_never_read(data: dict[str, Tensor]) -> None:
    mask = data["mask"]
    poisoned = {k: v.masked_fill(~mask, torch.nan) for k, v in data.items() if v.shape == mask.shape and k != "mask"}

    def run(x: dict[str, Tensor]) -> list[Tensor]:
        new = x["new"].clone().requires_grad_()
        found = losses.three_policy_loss(new, x["old"], x["behav"], x["token_advantages"], mask)
        found = found + losses.opd_loss(new, x["teacher"], mask)
        return [found.detach(), *torch.autograd.grad(found, new)]

    for ours, clean in zip(run(poisoned), run(data)):
        torch.testing.assert_close(ours, clean, rtol=0, atol=0)
    values = data["new"].masked_fill(~mask, torch.nan).requires_grad_()
    for how in ("token_mean", "sequence_mean", "sum"):
        loss = losses.reduce_tokens(values, mask, how)  # type: ignore[arg-type]
        torch.testing.assert_close(loss, losses.reduce_tokens(data["new"].masked_fill(~mask, 0.0), mask, how))  # type: ignore[arg-type]
        assert torch.isfinite(torch.autograd.grad(loss, values)[0]).all()
    logits = data["student_logits"].masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    loss = losses.gkd_loss(logits, data["teacher_logits"], mask)
    assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


def test_refusals(data: dict[str, Tensor]) -> None:
    mask = data["mask"]
    broken = data["teacher"].clone()
    broken[0, 3] = torch.nan
    with pytest.raises(BadTensor, match=r"teacher_logprobs.*nan at index \[0, 3\]"):
        losses.opd_loss(data["new"], broken, mask)
    with pytest.raises(BadTensor, match="has shape"):
        losses.opd_loss(data["new"], data["teacher"][:, :-1], mask)
    with pytest.raises(BadOption, match="band"):
        losses.icepop_loss(data["new"], data["old"], data["behav"], data["advantages"], mask, alpha=3.0, beta=2.0)
    with pytest.raises(BadOption, match="kl_weight"):
        losses.grpo_loss(data["new"], data["old"], data["advantages"], mask, kl_weight=0.1)
    with pytest.raises(BadOption, match="reduction"):
        losses.opd_loss(data["new"], data["teacher"], mask, reduction="mean")  # type: ignore[arg-type]
    support = losses.union_support(data["student_logits"], data["teacher_logits"].topk(K, -1).indices, K)
    teacher = torch.log_softmax(data["teacher_logits"], -1).gather(-1, support.clamp(min=0))
    nan, twice, logits = data["student_logits"].clone(), support.clone(), teacher + 9.0
    nan[0, 2, 4] = torch.nan
    twice[0, 3, 1] = twice[0, 3, 0]
    for args, what in (
        ((nan, support, teacher), "student_logits.*nan"),
        ((data["student_logits"], twice, teacher), "repeats an index"),
        ((data["student_logits"], support, logits), "no log-probability"),
    ):
        with pytest.raises(BadTensor, match=what):
            losses.local_support_loss(*args, mask)
    nothing = torch.zeros_like(mask)
    assert float(losses.opd_loss(data["new"], data["teacher"], nothing)) == 0.0


def test_normalizer_replaces_the_count(data: dict[str, Tensor]) -> None:
    args = data["new"], data["teacher"], data["mask"]
    total = losses.opd_loss(*args, reduction="sum")
    torch.testing.assert_close(losses.opd_loss(*args, normalizer=float(B * T)), total / (B * T))


@pytest.mark.parametrize("wrong", [-4.0, math.nan, math.inf, 0.0])
@pytest.mark.parametrize("form", [float, torch.tensor])
def test_a_normalizer_that_is_none_is_refused(data: dict[str, Tensor], wrong: float, form: Any) -> None:
    with pytest.raises(BadOption, match="normalizer="):
        losses.opd_loss(data["new"], data["teacher"], data["mask"], normalizer=form(wrong))


def test_where_nothing_counts_a_normalizer_of_0_gives_0_with_a_graph(data: dict[str, Tensor]) -> None:
    nothing, new = torch.zeros_like(data["mask"]), data["new"].clone().requires_grad_()
    for normalizer in (nothing.sum(), 0, 3.0):
        loss = losses.opd_loss(new, data["teacher"], nothing, normalizer=normalizer)
        assert loss.item() == 0.0
        (grad,) = torch.autograd.grad(loss, new)
        assert not grad.any()


def test_ranks_whose_gradients_are_averaged_normalise_by_tokens_per_rank(data: dict[str, Tensor]) -> None:
    new, advantages, mask = data["new"].clone().requires_grad_(), data["advantages"], data["mask"]
    (expected,) = torch.autograd.grad(losses.policy_gradient_loss(new, advantages, mask), new)
    parts = [slice(0, 1), slice(1, B)]
    share = mask.sum() / len(parts)
    ranks = [losses.policy_gradient_loss(new[p], advantages[p], mask[p], normalizer=share) for p in parts]
    averaged = sum(torch.autograd.grad(loss, new)[0] for loss in ranks) / len(parts)
    torch.testing.assert_close(averaged, expected)
