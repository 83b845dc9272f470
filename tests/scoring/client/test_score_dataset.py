"""Scoring datasets: what is asked for, what is added, and what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from rollout_wal.dataset import DatasetWriter, Masked, Sample, SegmentKind, open_dataset
from scoring.client import ClientOptions, ScoringClient
from scoring.dataset_scoring import ScoringSpec, score_dataset
from scoring.errors import BadConfiguration, ScoringError
from scoring.items import Wanted
from scoring.routing import Decision, DomainRouter, FunctionRouter, Route, SegmentRouter, routed
from scoring.score_command import score
from scoring.teachers.hf import HfTeacherSource

QUICK = ClientOptions(attempts=3, backoff_s=0.01, backoff_max_s=0.05, patience_s=0.5)
RICH = Wanted(True, 4, True, True)


def samples(count: int, tokenizer: str = "", *, seed: int = 0, **more: Any) -> list[Sample]:
    """Prompts of 6 tokens; responses of 12, of which the tool's output in the middle was not sampled."""
    rng = np.random.default_rng(seed)
    kinds = [SegmentKind.PROMPT] * 6 + [SegmentKind.SAMPLED] * 4 + [SegmentKind.TOOL_CALL] * 2
    kinds += [SegmentKind.TOOL_OUTPUT] * 3 + [SegmentKind.FINAL_ANSWER] * 3
    return [
        Sample(
            key=f"job/{i}",
            rollout=i,
            token_ids=rng.integers(4, 260, 18).astype(np.int32),
            prompt_length=6,
            segment_kinds=np.array(kinds, np.uint8),
            policy_runs=((0, 12),),
            group=f"g{i // 4}",
            domain="math" if i % 2 else "code",
            tokenizer_digest=tokenizer,
            sampling={"temperature": 0.7},
            **more,
        )
        for i in range(count)
    ]


@pytest.fixture
def sources(kin: Callable[[int], Path]) -> list[HfTeacherSource]:
    names = (("t-math", 0), ("t-code", 1))
    return [HfTeacherSource(name, kin(seed), precision="float32") for name, seed in names]


@pytest.fixture
def digest(sources: list[HfTeacherSource]) -> str:
    return sources[0].info.provenance.tokenizer_digest


ROUTER = DomainRouter({"math": "t-math", "code": {"t-code": 0.75, "t-math": 0.25}})


def scores_of(folder: Path, group: str) -> dict[str, dict[str, tuple[bytes, bytes]]]:
    """Every value and mask of a column group, by sample."""
    dataset = open_dataset(folder)
    out: dict[str, dict[str, tuple[bytes, bytes]]] = {}
    for key in dataset.metadata(["sample"])["sample"].to_pylist():
        row = dataset.payload(key, group)
        if row is not None:
            out[key] = {n: (np.where(_wide(c), c.values, 0).tobytes(), c.valid.tobytes()) for n in row if (c := row[n])}
    return out


def _wide(column: Masked) -> Any:
    return column.valid.reshape(-1, *[1] * (column.values.ndim - 1))


def test_metadata_decides_and_the_numbers_are_those_of_a_direct_forward(
    host: Any, kin: Any, sources: Any, digest: str, tmp_path: Path
) -> None:
    DatasetWriter(tmp_path, writer_id="w").seal([routed(s, ROUTER) for s in samples(10, digest)])
    with ScoringClient([host(sources).target], QUICK) as client:
        report = score_dataset(tmp_path, client, ScoringSpec(wanted=RICH, temperature="sampled"))
    assert (report.pairs, report.committed, report.failed) == (15, 15, 0)
    assert report.by_teacher == {"t-math": 10, "t-code": 5}
    dataset = open_dataset(tmp_path)
    rows = {row["sample"]: row for row in dataset.metadata().to_pylist()}
    assert rows["job/0"]["teachers"] == ["t-code", "t-math"]
    assert (rows["job/0"]["router_id"], rows["job/0"]["router_reason"]) == ("domain", "domain 'code'")
    assert rows["job/0"]["router_version"] == ROUTER.version
    for name, seed in (("t-math", 0), ("t-code", 1)):
        model = AutoModelForCausalLM.from_pretrained(kin(seed), dtype=torch.float32)
        for key, row in rows.items():
            found = dataset.payload(key, f"teacher.{name}")
            if name not in row["teachers"]:
                assert found is None
                continue
            tokens = dataset.payload(key)
            assert tokens is not None
            assert found is not None
            ids = torch.from_numpy(tokens.array("token_ids").astype(np.int64))
            with torch.inference_mode():
                output = model(input_ids=ids[None], output_hidden_states=True)
            logits = output.logits[0].double()[:, : sources[0].info.vocabulary] / 0.7
            expected = torch.log_softmax(logits, -1).numpy()
            mask = tokens.array("loss_mask").astype(bool)
            assert mask.sum() == 9
            for column in ("logprobs", "topk_ids", "topk_logprobs", "tail_mass", "entropy", "weight"):
                np.testing.assert_array_equal(found[column].valid, mask, err_msg=column)
            weight = 1.0 if row["domain"] == "math" else {"t-math": 0.25, "t-code": 0.75}[name]
            at = np.flatnonzero(mask)
            np.testing.assert_array_equal(found["weight"].values[at], np.float32(weight))
            np.testing.assert_allclose(found["logprobs"].values[at], expected[at - 1, ids[at]], atol=1e-5)
            top = np.sort(expected[at - 1], axis=-1)[:, ::-1][:, :4]
            np.testing.assert_allclose(found["topk_logprobs"].values[at], top, atol=1e-5)
            np.testing.assert_allclose(found["tail_mass"].values[at], 1 - np.exp(top).sum(-1), atol=1e-5)
            hidden = dataset.payload(key, f"hidden.{name}")
            assert hidden is not None
            assert hidden.dtype("hidden_states") == "bfloat16"
            bits = torch.from_numpy(hidden["hidden_states"].values[at].view(np.int16)).view(torch.bfloat16)
            torch.testing.assert_close(bits.float(), output.hidden_states[-1][0, at - 1], atol=0.02, rtol=0.02)


def test_what_is_there_is_not_scored_again_and_other_outputs_need_another_name(
    host: Any, sources: Any, digest: str, tmp_path: Path
) -> None:
    DatasetWriter(tmp_path, writer_id="w").seal([routed(s, ROUTER) for s in samples(6, digest)])
    with ScoringClient([host(sources).target], QUICK) as client:
        score_dataset(tmp_path, client)
        again = score_dataset(tmp_path, client)
        assert (again.scored, again.already, again.pairs) == (0, 9, 9)
        with pytest.raises(BadConfiguration, match="topk_ids"):
            score_dataset(tmp_path, client, ScoringSpec(wanted=Wanted(True, 4)))
        other = score_dataset(tmp_path, client, ScoringSpec(wanted=Wanted(True, 4), prefix="wide."))
        assert other.committed == 9
        DatasetWriter(tmp_path, writer_id="w").seal([routed(s, ROUTER) for s in samples(8, digest)[6:]])
        assert score_dataset(tmp_path, client).scored == 3
    assert set(open_dataset(tmp_path).groups) == {
        *("tokens", "teacher.t-math", "teacher.t-code", "wide.teacher.t-math", "wide.teacher.t-code")
    }


def test_another_checkpoint_does_not_go_on_where_the_first_left_off(
    host: Any, sources: Any, kin: Any, digest: str, tmp_path: Path
) -> None:
    writer = DatasetWriter(tmp_path, writer_id="w")
    writer.seal([routed(s, DomainRouter({}, default="t-math")) for s in samples(3, digest)])
    with ScoringClient([host(sources).target], QUICK) as client:
        score_dataset(tmp_path, client)
    writer.seal([routed(s, DomainRouter({}, default="t-math")) for s in samples(6, digest)[3:]])
    changed = host([HfTeacherSource("t-math", kin(2), precision="float32")]).target
    with ScoringClient([changed], QUICK) as client:
        report = score_dataset(tmp_path, client)
    assert (report.scored, report.failed) == (0, 3)
    first = sources[0].info.provenance.checkpoint
    assert first in report.failures[0]
    with ScoringClient([changed], replace(QUICK, other_checkpoints=True)) as client:
        report = score_dataset(tmp_path, client)
    assert (report.scored, report.fallback) == (3, 3)


def test_another_tokenizer_is_refused_by_name(host: Any, sources: Any, tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path, writer_id="w")
    writer.seal([routed(s, DomainRouter({}, default="t-math")) for s in samples(3, "another")])
    with ScoringClient([host(sources).target], QUICK) as client:
        report = score_dataset(tmp_path, client)
        assert report.failed == 3
        assert "tokenizer_digest" in report.failures[0]
        assert "another" in report.failures[0]
        with pytest.raises(Exception, match="2 samples could not be scored"):
            score_dataset(tmp_path, client, ScoringSpec(failures_max=2))
    assert open_dataset(tmp_path).groups == ("tokens",)


def test_routers(host: Any, sources: Any, digest: str, tmp_path: Path) -> None:
    by_segment = SegmentRouter({SegmentKind.TOOL_CALL: "t-code"}, default="t-math")
    first, second, third, fourth = samples(4, digest)
    sealed = [routed(first, by_segment)]

    def by_length(sample: Any) -> Decision:
        return Decision((Route("t-code", 2.0, ((6, 8),)), Route("t-code", 1.0, ((8, 18),))), "it is long")

    sealed.append(routed(second, FunctionRouter(by_length, "length", "7")))
    with pytest.raises(ScoringError, match="'code'"):
        routed(third, DomainRouter({"math": "t-math"}))
    for wrong in (Route("t", -1.0), Route("t", 1.0, ((5, 99),)), Route("")):
        with pytest.raises(ScoringError, match="decided on"):
            routed(third, FunctionRouter(lambda _, r=wrong: Decision((r,), ""), "f", "1"))
    with pytest.raises(ScoringError, match="twice"):
        routed(third, FunctionRouter(lambda _: Decision((Route("t"), Route("t")), ""), "f", "1"))
    DatasetWriter(tmp_path, writer_id="w").seal([*sealed, third, fourth])
    with ScoringClient([host(sources).target], QUICK) as client:
        report = score_dataset(tmp_path, client)
        assert (report.committed, report.unrouted) == (3, 2)
        dataset = open_dataset(tmp_path)
        tools = dataset.payload("job/0", "teacher.t-code")["logprobs"].valid  # type: ignore[index, union-attr]
        assert np.flatnonzero(tools).tolist() == [10, 11]
        others = dataset.payload("job/0", "teacher.t-math")["logprobs"].valid  # type: ignore[index, union-attr]
        assert np.flatnonzero(others).tolist() == [6, 7, 8, 9, 15, 16, 17]
        weights = dataset.payload("job/1", "teacher.t-code")["weight"]  # type: ignore[index]
        assert weights.values[weights.valid].tolist() == [2, 2, 1, 1, 1, 1, 1, 1, 1]  # type: ignore[union-attr]
        assert dataset.metadata()["router_version"].to_pylist()[1] == "7"
        # What its metadata does not route, a router may when it is scored; that is on record, and binding.
        late = ScoringSpec(router=DomainRouter({"math": "t-math", "code": "t-code"}))
        assert score_dataset(tmp_path, client, late).committed == 2
        assert "routing" in open_dataset(tmp_path).groups
        assert score_dataset(tmp_path, client, late).scored == 0
        with pytest.raises(BadConfiguration, match="was routed by domain@"):
            score_dataset(tmp_path, client, ScoringSpec(router=DomainRouter({}, default="t-math")))


def test_a_teacher_may_read_another_context(host: Any, sources: Any, kin: Any, digest: str, tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path, writer_id="w")
    writer.seal([routed(s, DomainRouter({}, default="t-math")) for s in samples(2, digest)])
    hint = np.arange(20, 31, dtype=np.int32)
    with ScoringClient([host(sources).target], QUICK) as client:
        score_dataset(tmp_path, client, ScoringSpec(teacher_prefix=lambda sample, teacher: hint))
    dataset = open_dataset(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(kin(0), dtype=torch.float32)
    ids = dataset.payload("job/1").array("token_ids")  # type: ignore[union-attr]
    read = torch.from_numpy(np.concatenate((hint, ids[6:])).astype(np.int64))
    with torch.inference_mode():
        logits = model(input_ids=read[None]).logits[0].double()[:, : sources[0].info.vocabulary]
    found = dataset.payload("job/1", "teacher.t-math")["logprobs"]  # type: ignore[index]
    at = np.flatnonzero(found.valid)  # type: ignore[union-attr]
    expected = torch.log_softmax(logits, -1)[at - 6 + len(hint) - 1, ids[at]]
    np.testing.assert_allclose(found.values[at], expected.numpy(), atol=1e-5)  # type: ignore[union-attr]


def test_censored_samples_wait_to_be_asked_for(host: Any, sources: Any, digest: str, tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path, writer_id="w")
    writer.seal([routed(s, DomainRouter({}, default="t-math")) for s in samples(2, digest, censored="deadline")])
    with ScoringClient([host(sources).target], QUICK) as client:
        assert score_dataset(tmp_path, client).censored == 2
        assert score_dataset(tmp_path, client, ScoringSpec(censored=True)).committed == 2


def test_killed_scorers_and_servers_leave_every_score_once_and_right(
    host: Any, sources: Any, digest: str, tmp_path: Path
) -> None:
    """SIGKILL to the command again and again, with a server that is stopped and comes back in between."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        DatasetWriter(folder, writer_id="w").seal([routed(s, ROUTER) for s in samples(120, digest)])
    served = host(sources)
    port = served.server.port
    with ScoringClient([served.target], QUICK) as client:
        score_dataset(whole, client, ScoringSpec(wanted=RICH))
    command = [sys.executable, "-m", "scoring.score_command", str(killed), "--server", served.target, "--json"]
    command += ["--outputs", "logprobs,topk=4,entropy,hidden", "--commit-seconds", "0", "--window", "4"]
    counts = []
    for attempt in range(3):
        before = _count(killed)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 60
            while _count(killed) < before + 10 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            if attempt == 1:
                served.stop()
                host(sources, address=f"127.0.0.1:{port}")
                time.sleep(0.3)
            os.kill(process.pid, signal.SIGKILL)
        counts.append(_count(killed))
    assert counts[0] < 180, "the first run was killed too late to show anything"
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["already"] + report["committed"] == report["pairs"] == 180
    for group in ("teacher.t-math", "teacher.t-code", "hidden.t-math", "hidden.t-code"):
        found, expected = scores_of(killed, group), scores_of(whole, group)
        assert found.keys() == expected.keys()
        if group.startswith("teacher"):
            _close(killed, whole, group)
        rows = [f.payload.rows for f in open_dataset(killed).state.group_files if f.group == group]
        assert sum(rows) == len(expected), "some score was stored twice"


def _count(folder: Path) -> int:
    state = open_dataset(folder, check_files=False).state
    return sum(f.payload.rows for f in state.group_files if f.group.startswith("teacher."))


def _close(one: Path, other: Path, group: str) -> None:
    """Equal up to the rounding of other batch-mates."""
    a, b = open_dataset(one), open_dataset(other)
    for key in a.metadata(["sample"])["sample"].to_pylist():
        x, y = a.payload(key, group), b.payload(key, group)
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            np.testing.assert_array_equal(x["logprobs"].valid, y["logprobs"].valid)
            at = np.flatnonzero(x["logprobs"].valid)
            np.testing.assert_allclose(x["logprobs"].values[at], y["logprobs"].values[at], atol=2e-5)


def test_the_command_routes_reports_and_says_what_is_wrong(
    host: Any, sources: Any, digest: str, tmp_path: Path
) -> None:
    DatasetWriter(tmp_path / "d", writer_id="w").seal(samples(8, digest))
    server = ["--server", host(sources, tokens=("secret",)).target, "--patience", "1"]
    run = CliRunner().invoke
    refused = run(score, [str(tmp_path / "d"), *server, "--route", "*=t-math"])
    assert refused.exit_code == 1
    assert "UNAUTHENTICATED" in refused.output
    (tmp_path / "token").write_text("secret\n")
    server += ["--token-file", str(tmp_path / "token")]
    routes = ["--route", "math=t-math", "--route", "*=t-code:0.5+t-math:0.5"]
    done = run(score, [str(tmp_path / "d"), *server, *routes, "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["committed"], report["by_teacher"]) == (12, {"t-code": 4, "t-math": 8})
    again = run(score, [str(tmp_path / "d"), *server, *routes])
    assert "0 scored now" in again.output
    assert "12 before, of 12" in again.output
    for bad in (["--outputs", "topk"], ["--outputs", "x"], ["--route", "math"], ["--route", "a=b:c"]):
        assert run(score, [str(tmp_path / "d"), *server, *bad]).exit_code == 2
    assert run(score, [str(tmp_path / "d"), *server, "--temperature", "warm"]).exit_code == 2
    text = run(score, ["--help"]).output
    for word in ("Kill it at any time", "serve-teachers", "topk=K", "--tls", "--route"):
        assert word in text
