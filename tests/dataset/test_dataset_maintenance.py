"""Scores added later, tombstones, merging, retention, verification, and the command line over all of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from rollout_wal.dataset import ColumnGroup, DatasetWriter, Masked, Provenance, Sample, open_dataset, tokens_crc32c
from rollout_wal.dataset.command import dataset as command
from rollout_wal.dataset.errors import DatasetDamaged, DatasetError, DatasetMismatch, DatasetTooNew
from rollout_wal.dataset.layout import StepLayouts
from rollout_wal.dataset.manifest import MANIFEST_FOLDER
from rollout_wal.dataset.merge import merge
from rollout_wal.dataset.retention import Retention, retain, vacuum
from rollout_wal.dataset.verify import verify

MakeSample = Callable[..., Sample]


def keys(folder: Path) -> list[str]:
    return open_dataset(folder).metadata(["sample"])["sample"].to_pylist()


def digests(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.arrow")}


def test_scores_are_added_without_touching_the_payload(
    tmp_path: Path, make_sample: MakeSample, make_teacher_group: Callable[..., ColumnGroup]
) -> None:
    samples = [make_sample(i, response=500) for i in range(6)]
    writer = DatasetWriter(tmp_path, writer_id="w", compression={"teacher.code": "zstd"})
    writer.seal(samples)
    before = digests(tmp_path)
    scores = {s.key: make_teacher_group(s.token_ids, "code") for s in samples}
    info = writer.add_columns("teacher.code", {k: scores[k] for k in ("job/4", "job/1")})
    assert info.added == ("job/4", "job/1")
    after = digests(tmp_path)
    assert {name: after[name] for name in before} == before

    again = DatasetWriter(tmp_path, writer_id="other").add_columns("teacher.code", scores)
    assert (again.added, again.present) == (("job/0", "job/2", "job/3", "job/5"), ("job/1", "job/4"))
    dataset = open_dataset(tmp_path)
    for sample in samples:
        row = dataset.payload(sample.key, "teacher.code")
        assert row is not None
        assert row.key == sample.key
        np.testing.assert_array_equal(row.array("topk_ids"), scores[sample.key].columns["topk_ids"])
    assert open_dataset(tmp_path, version=2).payload("job/0", "teacher.code") is None

    better = replace(scores["job/2"], columns={**scores["job/2"].columns, "topk_ids": np.zeros((505, 4), np.int32)})
    writer.add_columns("teacher.code", {"job/2": better}, replace=True)
    row = open_dataset(tmp_path).payload("job/2", "teacher.code")
    assert row is not None
    assert not row.array("topk_ids").any()
    assert verify(open_dataset(tmp_path)) == []


def test_hidden_states_are_bfloat16_and_apart(tmp_path: Path, make_sample: MakeSample) -> None:
    import torch

    sample = make_sample(0, response=3)
    hidden = torch.randn(sample.length, 16).bfloat16()
    group = ColumnGroup({"states": hidden.view(torch.uint16).numpy()}, bfloat16=frozenset({"states"}))
    DatasetWriter(tmp_path, writer_id="w").seal([replace(sample, groups={"hidden.math": group})])
    dataset = open_dataset(tmp_path)
    row = dataset.payload("job/0", "hidden.math")
    assert row is not None
    assert row.dtype("states") == "bfloat16"
    assert torch.equal(torch.from_numpy(row.array("states").copy()).view(torch.bfloat16), hidden)
    assert dataset.files("hidden.math") != dataset.files("tokens")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: {"tokens_crc32c": 17}, "checksum 0x00000011; the sample's tokens have"),
        (
            lambda g: {"provenance": Provenance("t", tokenizer_digest="f" * 32)},
            r"tokenizer 'f+'; the dataset's is '7+'",
        ),
        (
            lambda g: {"columns": g.columns | {"logprobs": Masked(np.full(16, np.nan, np.float32), np.arange(16) > 9)}},
            r"sample 'job/0': column 'teacher.math.logprobs' is not finite at position 10 \(nan\)",
        ),
        (lambda g: {"columns": g.columns | {"topk_ids": np.zeros((16, 5), np.int32)}}, r"is \[T, 5\] of int32; in the"),
        (lambda g: {"columns": {"tail_mass": np.zeros(3, np.float32)}}, "has 3 entries and the sample has 16 tokens"),
        (lambda g: {"columns": {"names": np.array(["a"] * 16)}}, "cannot be stored"),
        (lambda g: {"bfloat16": frozenset({"nothing"})}, "has no columns"),
    ],
)
def test_scores_that_do_not_belong_are_refused(
    tmp_path: Path,
    make_sample: MakeSample,
    make_teacher_group: Callable[..., ColumnGroup],
    change: Callable[[ColumnGroup], dict[str, Any]],
    message: str,
) -> None:
    writer = DatasetWriter(tmp_path, writer_id="w")
    writer.seal([make_sample(0), make_sample(1, teacher="math")])
    group = make_teacher_group(make_sample(0).token_ids, "math")
    before = digests(tmp_path)
    with pytest.raises(DatasetMismatch, match=message):
        writer.add_columns("teacher.math", {"job/0": replace(group, **change(group))})
    assert digests(tmp_path) == before
    assert writer.add_columns("teacher.math", {"job/0": group}).added == ("job/0",)
    with pytest.raises(DatasetError, match="no sample 'job/9'"):
        writer.add_columns("teacher.math", {"job/9": group})
    with pytest.raises(DatasetMismatch, match="every sample is sealed with"):
        writer.add_columns("tokens", {"job/0": group})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_digest": "0" * 32}, r"tokenizer '0+'; the dataset's is '7+'"),
        ({"token_ids": np.arange(16) - 3}, "token id -3 at position 0"),
        ({"token_ids": np.arange(16) + 2**31}, "token id 2147483648 at position 0"),
        ({"segment_kinds": np.full(16, 9, np.uint8)}, "unknown segment kind 9 at position 0"),
        ({"segment_kinds": np.full(16, 259)}, "unknown segment kind 259 at position 0"),
        ({"loss_mask": np.ones(16, np.bool_)}, "loss mask is on at position 0, a PROMPT token"),
        ({"logprobs": Masked(np.full(16, -np.inf, np.float32), np.arange(16) > 4)}, r"position 5 \(-inf\)"),
        ({"logprobs": Masked(np.zeros(4, np.float32), np.ones(4, np.bool_))}, "4 entries"),
        ({"policy_runs": ((1, 4),)}, "do not add up to its 11 response tokens"),
        ({"prompt_length": 17}, "prompt_length 17 of 16 tokens"),
        ({"reward": float("nan")}, "its reward is nan"),
        ({"key": ""}, "Pass a key"),
    ],
)
def test_a_sample_that_is_not_sound_is_refused(
    tmp_path: Path, make_sample: MakeSample, change: dict[str, Any], message: str
) -> None:
    writer = DatasetWriter(tmp_path, writer_id="w")
    writer.seal([make_sample(7)])
    before = digests(tmp_path)
    with pytest.raises(DatasetMismatch, match=message):
        writer.seal([make_sample(0), replace(make_sample(1), **change)])
    assert digests(tmp_path) == before
    assert writer.seal([make_sample(0)]).added == ("job/0",)


def test_a_tombstoned_sample_stays_away(tmp_path: Path, make_sample: MakeSample) -> None:
    samples = [make_sample(i) for i in range(6)]
    writer = DatasetWriter(tmp_path, writer_id="w")
    writer.seal(samples[:3])
    writer.seal(samples[3:])
    assert writer.tombstone(["job/1", "job/5"], "reward hacking").added == ("job/1", "job/5")
    assert writer.tombstone(["job/1"], "again").added == ()
    assert keys(tmp_path) == ["job/0", "job/2", "job/3", "job/4"]
    assert DatasetWriter(tmp_path, writer_id="x").seal(samples).added == ()
    assert keys(tmp_path) == ["job/0", "job/2", "job/3", "job/4"]
    dataset = open_dataset(tmp_path)
    for key in keys(tmp_path):
        row = dataset.payload(key)
        assert row is not None
        assert row.key == key
    with pytest.raises(DatasetError, match="no sample 'job/1'"):
        dataset.payload("job/1")
    with pytest.raises(DatasetMismatch, match="never had the samples"):
        writer.tombstone(["job/99"], "typo")
    assert open_dataset(tmp_path, version=2).num_samples == 6


def test_merging_keeps_each_rollout_once(tmp_path: Path, make_sample: MakeSample) -> None:
    samples = [make_sample(i, teacher="math" if i % 2 else None) for i in range(9)]
    for name, members in (("a", samples[:5]), ("b", samples[3:8])):
        writer = DatasetWriter(tmp_path / name, writer_id=name)
        writer.seal(members)
    DatasetWriter(tmp_path / "a", writer_id="t").tombstone(["job/0"], "bad")
    target = DatasetWriter(tmp_path / "all", writer_id="m")
    target.seal(samples[8:])
    info = merge(target, [tmp_path / "a", tmp_path / "b"])
    assert sorted(info.added) == [f"job/{i}" for i in range(1, 8)]
    assert sorted(info.present) == ["job/3", "job/4"]
    assert sorted(keys(tmp_path / "all")) == [f"job/{i}" for i in range(1, 9)]
    merged = open_dataset(tmp_path / "all")
    for i in range(1, 9):
        row = merged.payload(f"job/{i}")
        assert row is not None
        np.testing.assert_array_equal(row.array("token_ids"), samples[i].token_ids)
        if i in (1, 3, 5, 7):
            assert merged.payload(f"job/{i}", "teacher.math") is not None
    assert verify(merged) == []

    version = target.version
    assert merge(target, [tmp_path / "a", tmp_path / "b"]).added == ()
    assert target.version == version, "a merge that adds nothing makes no version"
    DatasetWriter(tmp_path / "b", writer_id="b2").seal([make_sample(20)])
    assert merge(target, [tmp_path / "b"]).added == ("job/20",)
    assert DatasetWriter(tmp_path / "all", writer_id="x").seal([samples[0]]).added == (), "tombstones travel"


def test_datasets_that_do_not_fit_are_not_merged(tmp_path: Path, make_sample: MakeSample) -> None:
    DatasetWriter(tmp_path / "a", writer_id="a").seal([make_sample(0)])
    DatasetWriter(tmp_path / "b", writer_id="b").seal([make_sample(1, tokenizer_digest="other")])
    DatasetWriter(tmp_path / "c", writer_id="c").seal([make_sample(2, key="job/0")])
    target = DatasetWriter(tmp_path / "all", writer_id="m")
    with pytest.raises(DatasetMismatch, match="tokenizer 'other'"):
        merge(target, [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(DatasetMismatch, match="has tokens of checksum"):
        merge(target, [tmp_path / "a", tmp_path / "c"])
    (payload,) = open_dataset(tmp_path / "a").files("tokens")
    raw = bytearray(payload.read_bytes())
    raw[500] ^= 1
    payload.write_bytes(raw)
    with pytest.raises(DatasetDamaged, match="its manifest says"):
        merge(target, [tmp_path / "a"])
    assert target.version == 0
    assert not list((tmp_path / "all").rglob("*.arrow"))


def test_retention_frees_the_disk_and_forgets_nobody(tmp_path: Path, make_sample: MakeSample) -> None:
    def at_version(number: int, version: int) -> Sample:
        return make_sample(number, teacher="math", policy_runs=((version, 11),))

    writer = DatasetWriter(tmp_path, writer_id="w")
    old, mixed = [at_version(i, 1) for i in range(3)], [at_version(3, 1), at_version(4, 9), at_version(5, 9)]
    writer.seal(old)
    writer.seal(mixed)
    with pytest.raises(DatasetError, match="rule is empty"):
        retain(writer, Retention())
    info = retain(writer, Retention(start_version_min=5))
    assert info.added == ("job/0", "job/1", "job/2", "job/3")
    assert retain(writer, Retention(start_version_min=5)).added == ()
    assert keys(tmp_path) == ["job/4", "job/5"]

    dataset = open_dataset(tmp_path)
    assert vacuum(dataset) == {}, "everything is younger than the grace time"
    would = vacuum(dataset, grace_s=-1, dry_run=True)
    gone = vacuum(dataset, grace_s=-1)
    assert gone == would
    assert sorted(name.split("/")[0] for name in gone) == ["index", "payload", "payload"]
    assert verify(open_dataset(tmp_path)) == []
    assert DatasetWriter(tmp_path, writer_id="x").seal(old + mixed).added == ()
    row = open_dataset(tmp_path).payload("job/4", "teacher.math")
    assert row is not None

    assert retain(writer, Retention(tokens_max=20)).added == ("job/4",)
    assert retain(writer, Retention(age_s_max=0.0)).added == ("job/5",)
    assert keys(tmp_path) == []


def test_a_column_group_of_which_nothing_stays_is_one_that_nobody_has(tmp_path: Path, make_sample: MakeSample) -> None:
    writer = DatasetWriter(tmp_path, writer_id="w")
    writer.seal([make_sample(0, teacher="math", policy_runs=((1, 11),))])
    writer.seal([make_sample(1, policy_runs=((9, 11),))])
    retain(writer, Retention(start_version_min=5))
    dataset = open_dataset(tmp_path)
    assert dataset.groups == ("tokens", "teacher.math"), "its columns are fixed for good"
    assert dataset.files("teacher.math") == []
    assert dataset.keys_with("teacher.math") == set()
    assert dataset.provenance("teacher.math").num_rows == 0
    assert dataset.locations("teacher.math")["file"].tolist() == [-1]
    assert dataset.payload("job/1", "teacher.math") is None
    rows = {name: np.zeros(1, np.int64) for name in ("row", "rank", "bin", "start", "length")}
    layout = StepLayouts(dataset, ["tokens", "teacher.math"], need_all=False).of(rows)
    assert [len(blocks.cost_N) for blocks in layout.groups] == [1, 0]
    with pytest.raises(DatasetError, match=r"'job/1' has no column group 'teacher.math'"):
        StepLayouts(dataset, ["teacher.math"]).of(rows)


def test_vacuum_removes_what_a_dead_writer_left(tmp_path: Path, make_sample: MakeSample) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    DatasetWriter(tmp_path, writer_id="w").seal([make_sample(0)])
    left = tmp_path / "payload" / "tokens" / "dead-0.arrow.tmp"
    left.write_bytes(b"half a file")
    assert vacuum(open_dataset(tmp_path), grace_s=3600) == {}
    os.utime(left, (0, 0))
    assert vacuum(open_dataset(tmp_path), grace_s=3600) == {"payload/tokens/dead-0.arrow.tmp": 11}
    assert keys(tmp_path) == ["job/0"]


def test_vacuum_goes_by_the_newest_version_whatever_it_is_given(tmp_path: Path, make_sample: MakeSample) -> None:
    writer = DatasetWriter(tmp_path, writer_id="w")
    writer.seal([make_sample(0, teacher="math")])
    held = open_dataset(tmp_path)
    writer.seal([make_sample(1, teacher="math")])
    left = tmp_path / "payload" / "tokens" / "dead-0.arrow"
    left.write_bytes(b"half a file")
    for path in tmp_path.rglob("*.arrow"):
        os.utime(path, (0, 0))
    assert vacuum(held) == {"payload/tokens/dead-0.arrow": 11}
    assert keys(tmp_path) == ["job/0", "job/1"]
    assert verify(open_dataset(tmp_path)) == []


def damage_nothing(folder: Path) -> None:
    pass


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)


def foreign(path: Path) -> None:
    with pa.ipc.new_file(path, pa.schema([("x", pa.int64())])) as file:
        file.write_table(pa.table({"x": [1]}))


@pytest.mark.parametrize("which", ["metadata", "payload/tokens", "payload/teacher.math", "index/teacher.math"])
@pytest.mark.parametrize("damage", [truncate, flip, foreign, Path.unlink])
def test_verify_finds_damage_of_every_kind(
    tmp_path: Path, make_sample: MakeSample, which: str, damage: Callable[[Path], None]
) -> None:
    DatasetWriter(tmp_path, writer_id="w").seal([make_sample(i, teacher="math") for i in range(20)])
    assert verify(open_dataset(tmp_path)) == []
    (path,) = (tmp_path / which).glob("*.arrow")
    damage(path)
    faults = verify(open_dataset(tmp_path, check_files=False))
    assert str(path.relative_to(tmp_path)) in {f.file for f in faults}
    if damage is not flip:
        with pytest.raises(DatasetDamaged, match=path.name):
            open_dataset(tmp_path)


def test_a_foreign_file_of_the_right_size_is_refused(tmp_path: Path, make_sample: MakeSample) -> None:
    DatasetWriter(tmp_path, writer_id="w").seal([make_sample(0)])
    (path,) = (tmp_path / "metadata").glob("*.arrow")
    size = path.stat().st_size
    schema = pa.schema([("sample", pa.string())], metadata={"pad": "x" * (size // 8)})
    with pa.ipc.new_file(path, schema) as file:
        file.write_table(pa.table({"sample": ["a"]}, schema=schema))
    assert path.stat().st_size < size
    raw = path.read_bytes()
    path.write_bytes(raw[:8] + b"\0" * (size - len(raw)) + raw[8:])
    with pytest.raises(DatasetDamaged, match=r"cannot be used|not one of a rollout dataset"):
        open_dataset(tmp_path).metadata()
    path.write_bytes(b"\0" * size)
    with pytest.raises(DatasetDamaged, match="cannot be used"):
        open_dataset(tmp_path).metadata()


def test_manifests_that_cannot_be_read(tmp_path: Path, make_sample: MakeSample) -> None:
    with pytest.raises(DatasetError, match="is not a rollout dataset"):
        open_dataset(tmp_path)
    writer = DatasetWriter(tmp_path, writer_id="w")
    writer.seal([make_sample(0)])
    with pytest.raises(DatasetError, match="no version 7; its newest is 1"):
        open_dataset(tmp_path, version=7)
    newest = tmp_path / MANIFEST_FOLDER / f"{1:020d}.json"
    sound = newest.read_text()
    newest.write_text(sound.replace('"format": 1', '"format": 2'))
    for attempt in (lambda: open_dataset(tmp_path), lambda: DatasetWriter(tmp_path, writer_id="x")):
        with pytest.raises(DatasetTooNew, match="format 2; this version reads up to format 1"):
            attempt()
    for damaged in (sound[:-40], sound.replace('"rows": 1', '"rows": 2'), "[]", ""):
        newest.write_text(damaged)
        with pytest.raises(DatasetDamaged, match="not a sound manifest"):
            open_dataset(tmp_path)
    assert open_dataset(tmp_path, version=0).num_samples == 0
    newest.write_text(sound)
    assert keys(tmp_path) == ["job/0"]


def test_checkpoints_say_the_same_as_the_versions(tmp_path: Path, make_sample: MakeSample) -> None:
    writer = DatasetWriter(tmp_path, writer_id="w")
    for i in range(70):
        writer.seal([make_sample(i, prompt=1, response=1)])
    checkpoint = tmp_path / MANIFEST_FOLDER / "checkpoint.json"
    with_it = open_dataset(tmp_path).state
    assert open_dataset(tmp_path, version=10).num_samples == 10
    damaged = checkpoint.read_bytes()[:-9]
    checkpoint.write_bytes(damaged)
    assert open_dataset(tmp_path).state == with_it
    checkpoint.unlink()
    assert open_dataset(tmp_path).state == with_it
    assert with_it.version == 70


@pytest.mark.parametrize("bad", ["", "../up", "a/b", ".hidden", "x" * 65, "nul\0"])
def test_writer_ids_become_no_paths(tmp_path: Path, bad: str) -> None:
    with pytest.raises(DatasetMismatch, match="file name"):
        DatasetWriter(tmp_path, writer_id=bad)


def test_group_names_become_no_paths(tmp_path: Path, make_sample: MakeSample) -> None:
    group = ColumnGroup({"x": np.zeros(16, np.float32)})
    names = ["../../up", "..", "a/b", "naïve", ".", "%2F"]
    folder = tmp_path / "inside" / "data"
    DatasetWriter(folder, writer_id="w").seal([make_sample(0, groups=dict.fromkeys(names, group))])
    assert {p.parent.parent.name for p in tmp_path.rglob("*.arrow") if "payload" in p.parts} == {"payload"}
    assert [p for p in tmp_path.rglob("*.arrow") if folder not in p.parents] == []
    dataset = open_dataset(folder)
    for name in names:
        assert dataset.payload("job/0", name) is not None


def test_the_command_line(tmp_path: Path, make_sample: MakeSample) -> None:
    runner = CliRunner()

    def run(*arguments: Any, status: int = 0) -> Any:
        result = runner.invoke(command, [*map(str, arguments), "--json"])
        assert result.exit_code == status, result.output
        return json.loads(result.stdout) if status == 0 else result.output

    a, b, both = tmp_path / "a", tmp_path / "b", tmp_path / "both"
    DatasetWriter(a, writer_id="w").seal([make_sample(i, teacher="math", interruptions=i % 2) for i in range(10)])
    DatasetWriter(b, writer_id="w").seal([make_sample(i, censored="deadline") for i in range(8, 14)])
    assert run("merge", both, a, b) == {"version": 1, "added": 14, "present": 2}
    found = run("stats", both)
    assert (found["samples"], found["interrupted"], found["teachers"]) == (14, 5, {"math": 10})
    assert found["censored"] == {"deadline": 4}
    assert found["response_tokens"] == 14 * 11
    assert found["groups"]["teacher.math"]["bytes"] > 0
    assert run("tombstone", both, "job/3", "--reason", "bad")["tombstoned"] == 1
    planned = run("plan", both, tmp_path / "plan.arrow", "--token-budget", 64, "--domain", "math")
    assert planned["planned"] == 5
    whole = run("plan", both, tmp_path / "whole.arrow", "--token-budget", 128, "--whole-groups")
    assert whole["planned"] >= 5
    assert run("verify", both)["faults"] == []
    assert run("retain", both, "--tokens-max", 32)["gone"] == 11
    assert run("vacuum", both, "--grace-hours", -1, "--dry-run")["deleted"] is False
    assert "all is sound" in runner.invoke(command, ["verify", str(a)]).output
    assert "samples" in runner.invoke(command, ["stats", str(a)]).output

    (payload,) = open_dataset(a).files("tokens")
    flip(payload)
    broken = runner.invoke(command, ["verify", str(a)])
    assert broken.exit_code == 1
    assert payload.name in broken.output
    shutil.rmtree(b / MANIFEST_FOLDER)
    assert "is not a rollout dataset" in run("stats", b, status=1)
    assert runner.invoke(command, ["plan", str(a), "x", "--token-budget", "9", "--max-lag", "1"]).exit_code == 2


def test_a_checksum_is_of_the_tokens_whatever_their_dtype() -> None:
    tokens = np.arange(9)
    assert tokens_crc32c(tokens) == tokens_crc32c(tokens.astype(np.int32)) == tokens_crc32c(tokens.astype(np.uint16))
    assert tokens_crc32c(tokens) != tokens_crc32c(tokens[::-1])
