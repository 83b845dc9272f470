"""Auditing a table of somebody else's rollouts: the three formats, what they lack, and what they give away."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from pyarrow import parquet

from rollout_wal.audit.command import audit
from rollout_wal.audit.estimate import hazard_per_token, restart_prediction
from rollout_wal.audit.lengths import LengthDistribution
from rollout_wal.audit.policies import Policy, Restart, Resume
from rollout_wal.audit.recorded import Codes, read_recorded
from rollout_wal.audit.schedules import Interruptions, constant, never
from rollout_wal.audit.signature import restart_hazard, signature, untilted
from rollout_wal.audit.simulate import simulate
from rollout_wal.audit.table import RolloutTable
from rollout_wal.audit.theory import predict
from rollout_wal.errors import AuditError

LAWS = [LengthDistribution.geometric(mean, 240) for mean in np.linspace(15, 90, 40)]


def simulated(process: Interruptions, policy: Policy, seed: int) -> RolloutTable:
    return simulate(LAWS, process, policy, rollouts=8000, seed=seed).table


def records(table: RolloutTable, *, reason: bool = True, **fixed: Any) -> list[dict[str, Any]]:
    out = []
    for i in range(len(table)):
        row: dict[str, Any] = {
            "prompt": f"prompt {table.prompt_N[i]}",
            "length": int(table.length_N[i]),
            "interrupted": int(table.interruptions_N[i]),
        }
        if reason:
            row["reason"] = str(table.reason_N[i])
        out.append(row | fixed)
    return out


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    match path.suffix:
        case ".parquet":
            parquet.write_table(pa.Table.from_pylist(rows), path)
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        case ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def restarted() -> RolloutTable:
    return simulated(constant(0.008), Restart(), 1)


@pytest.fixture(scope="module")
def resumed() -> RolloutTable:
    return simulated(constant(0.008), Resume(5, "commit"), 2)


@pytest.fixture(scope="module")
def calm() -> RolloutTable:
    return simulated(never(), Resume(0, "commit"), 3)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_every_format_reads_the_same(tmp_path: Path, restarted: RolloutTable, suffix: str) -> None:
    rows = records(restarted, worker="w1", start=0.5, reward=1.25, domain="math")[:500]
    rows[3]["reward"] = None
    recorded = read_recorded(write(tmp_path / f"data{suffix}", rows))
    table = recorded.arms["data"]
    assert recorded.begun_known
    np.testing.assert_array_equal(table.length_N, restarted.length_N[:500])
    np.testing.assert_array_equal(table.interruptions_N, restarted.interruptions_N[:500])
    assert table.worker_N is not None
    assert set(table.worker_N.tolist()) == {0}
    assert np.isnan(table.extras["reward"][3])
    assert table.extras["reward"][4] == 1.25
    assert table.extras["domain"][0] == "math"


def test_prompts_have_the_same_code_in_every_file(tmp_path: Path) -> None:
    one = [{"prompt": p, "length": 5, "interrupted": False} for p in ("a", "b")]
    two = [{"prompt": p, "length": 5, "interrupted": True} for p in ("b", "c", "a")]
    codes = Codes()
    read_recorded(write(tmp_path / "one.jsonl", one), codes)
    second = read_recorded(write(tmp_path / "two.jsonl", two), codes).arms["two"]
    assert second.prompt_N.tolist() == [1, 2, 0]
    assert second.interruptions_N.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "length": 5}], "has no column interrupted"),
        ([{"prompt": "a", "length": 5.5, "interrupted": 0}], "no whole numbers"),
        ([{"prompt": "a", "length": "long", "interrupted": 0}], "not of whole numbers"),
        ([{"prompt": None, "length": 5, "interrupted": 0}, {"prompt": "a", "length": 5, "interrupted": 0}], "1 empty"),
        ([{"prompt": "a", "length": 0, "interrupted": 0}], "length below 1"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(AuditError, match=message):
        read_recorded(write(tmp_path / "bad.jsonl", rows))


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="does not exist"):
        read_recorded(tmp_path / "none.parquet")
    (tmp_path / "odd.xlsx").write_bytes(b"x")
    with pytest.raises(AuditError, match="unknown kind"):
        read_recorded(tmp_path / "odd.xlsx")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(AuditError, match="cannot be read"):
        read_recorded(tmp_path / "torn.parquet")


def test_the_signature_tells_restarting_from_resuming(restarted: RolloutTable, resumed: RolloutTable) -> None:
    one, two = signature(restarted), signature(resumed)
    assert one is not None
    assert two is not None
    assert one.kind == "restarts"
    assert two.kind == "resumes"
    assert one.within_prompts
    # The hazard and the true mean come back out of the biased data alone.
    assert one.hazard == pytest.approx(0.008, rel=0.06)
    assert one.mean_if_restarted == pytest.approx(LengthDistribution.mixture(LAWS).mean, rel=0.04)


def test_the_signature_from_flags_alone(restarted: RolloutTable, resumed: RolloutTable) -> None:
    kinds = []
    for table in (restarted, resumed):
        flagged = RolloutTable(
            table.prompt_N, table.length_N, (table.interruptions_N > 0).astype(np.int64), table.reason_N
        )
        found = signature(flagged)
        assert found is not None
        kinds.append(found.kind)
    assert kinds == ["restarts", "resumes"]


@pytest.mark.parametrize("flags", [False, True])
def test_the_hazard_from_prompts_of_very_different_lengths(flags: bool) -> None:
    """A flag is not a number of attempts: most flags are of the long prompts, of which each had many."""
    laws = [LengthDistribution.uniform(1, longest) for longest in (20, 400) * 5]
    table = simulate(laws, constant(0.01), Restart(), rollouts=20_000, seed=4).table
    if flags:
        table = replace(table, interruptions_N=(table.interruptions_N > 0).astype(np.int64))
    assert restart_hazard(table) == pytest.approx(-np.log(0.99), rel=0.03)
    assert untilted(table, restart_hazard(table)).mean == pytest.approx(105.5, rel=0.02)


def test_flags_of_prompts_that_hardly_repeat_are_those_of_one_law() -> None:
    table = simulate(LengthDistribution.uniform(1, 200), constant(0.01), Restart(), rollouts=20_000, seed=5).table
    flagged = replace(
        table, interruptions_N=(table.interruptions_N > 0).astype(np.int64), prompt_N=np.arange(20_000) // 2
    )
    assert restart_hazard(flagged) == pytest.approx(-np.log(0.99), rel=0.03)
    assert restart_hazard(replace(flagged, interruptions_N=np.ones(20_000, dtype=np.int64))) > 0.05


def test_the_hazard_is_the_probability_that_was_built_in() -> None:
    """The last token of a delivered rollout is not exposed, and a probability is no rate."""
    law = LengthDistribution.uniform(1, 20)
    table = simulate(law, constant(0.05), Restart(), rollouts=100_000, seed=6).table
    for known in (table, replace(table, recomputed_N=None)):
        assert hazard_per_token(known) == pytest.approx(0.05, rel=0.01)
    calm = simulate(law, never(), Restart(), rollouts=100_000, seed=7).table
    told = restart_prediction(calm, hazard_per_token(table))
    assert told is not None
    assert told.delta_relative == pytest.approx(predict(law, constant(0.05), Restart()).delta_relative, rel=0.02)


def test_no_interruptions_no_signature(calm: RolloutTable) -> None:
    assert signature(calm) is None
    assert restart_hazard(calm) == 0.0


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(audit, ["data", *arguments])
    return result.exit_code, result.output


def test_data_without_a_reference(tmp_path: Path, restarted: RolloutTable, resumed: RolloutTable) -> None:
    biased = write(tmp_path / "biased.parquet", records(restarted))
    sound = write(tmp_path / "sound.parquet", records(resumed))
    code, output = run(str(biased), "--fail-on-bias", "--json")
    assert code == 3
    result = json.loads(output)
    assert result["verdict"] == "biased"
    assert -0.4 < result["estimated_delta_relative"] < -0.2
    code, output = run(str(sound), "--fail-on-bias", "--json")
    assert code == 4  # that it is unbiased cannot be shown without a reference
    assert json.loads(output)["signature"]["kind"] == "resumes"
    assert run(str(biased))[0] == 0


def test_data_with_a_reference(
    tmp_path: Path, restarted: RolloutTable, resumed: RolloutTable, calm: RolloutTable
) -> None:
    reference = write(tmp_path / "calm.csv", records(calm))
    biased = write(tmp_path / "biased.jsonl", records(restarted, reason=False))
    sound = write(tmp_path / "sound.jsonl", records(resumed))
    code, output = run(
        str(biased),
        "--reference",
        str(reference),
        "--fail-on-bias",
        "--json",
        "--margin",
        "0.06",
        "--out",
        str(tmp_path),
    )
    assert code == 3
    cell = json.loads(output)["cells"][0]
    assert cell["verdict"] == "biased"
    assert cell["predicted_agrees"]
    assert {h["name"]: h["verdict"] for h in cell["hypotheses"]}["H1"] == "not checked"
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "biased" in (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "audit.json").read_text(encoding="utf-8")) == json.loads(output)
    code, output = run(str(sound), "--reference", str(reference), "--fail-on-bias", "--json", "--margin", "0.06")
    assert (code, json.loads(output)["cells"][0]["verdict"]) == (0, "equivalent")


def test_arms_in_one_file_and_what_was_censored(tmp_path: Path, calm: RolloutTable, restarted: RolloutTable) -> None:
    rows = records(calm, arm="reference") + records(restarted, arm="spot")
    rows[-1]["reason"] = "deadline"
    code, output = run(str(write(tmp_path / "both.jsonl", rows)), "--json")
    assert code == 0
    cell = json.loads(output)["cells"][0]
    assert cell["name"] == "spot"
    assert cell["censored"]["deadline"]["rollouts"] == 1
    assert {h["name"]: h["verdict"] for h in cell["hypotheses"]}["H1"] == "broken"


def test_a_file_of_references_alone_is_refused(tmp_path: Path, calm: RolloutTable) -> None:
    code, output = run(str(write(tmp_path / "r.jsonl", records(calm, arm="reference"))))
    assert code == 1
    assert "nothing to audit" in output
