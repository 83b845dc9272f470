"""Weights change only as declared: whole, durable before any token of them, and true for every token, whoever dies."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rollout_wal.backend import RolloutBackend
from rollout_wal.backend.weights import same_weights, save_weights
from rollout_wal.errors import ArchitectureMismatch, BadInput, TokenizerMismatch, UndeclaredWeights
from rollout_wal.params import SamplingParams
from rollout_wal.testing.tiny_models import make_tiny_model

LONG = SamplingParams(max_tokens=400, ignore_eos=True)
SHORT = SamplingParams(max_tokens=40)


@pytest.fixture(scope="module")
def successor(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model after an optimizer step: all its weights are a little different."""
    folder = tmp_path_factory.mktemp("models") / "successor"
    shutil.copytree(model, folder)
    nudge(folder, 1)
    return folder


def nudge(folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    moved = {
        k: v + 0.05 * v.std() * torch.randn(v.shape, generator=generator) for k, v in tensors.items() if v.dim() > 1
    }
    save_file({**tensors, **moved}, folder / "model.safetensors", metadata={"format": "pt"})


def check_versions(folders: dict[int, Path], rollouts: list[Any]) -> set[int]:
    """Each token's logprob is that of the weights it claims to be of. Returns the versions that occur."""
    seen: set[int] = set()
    models = {v: AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for v, f in folders.items()}
    for r in rollouts:
        tokens = torch.from_numpy(np.concatenate([r.prompt, r.tokens]).astype(np.int64))
        of = {}
        with torch.inference_mode():
            for version, model in models.items():
                logprobs = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
                at = torch.arange(len(r.prompt) - 1, len(tokens) - 1)
                of[version] = logprobs[at, tokens[at + 1]].numpy()
        version_T = r.output.version_T
        assert (np.diff(version_T) >= 0).all()
        seen |= set(version_T.tolist())
        expected = np.stack([of[v] for v in sorted(of)])[
            np.searchsorted(sorted(of), version_T), np.arange(len(version_T))
        ]
        np.testing.assert_allclose(r.output.logprob.value_T, expected, atol=2e-3)
        others = np.abs(of[min(of)] - of[max(of)])
        assert np.median(others) > 0.01  # the versions could be mistaken for one another otherwise
    return seen


def test_an_update_in_flight_is_true_for_every_token(
    backend: Callable[..., RolloutBackend], model: Path, successor: Path, prompts: Any, until: Any
) -> None:
    with backend(first_version=3) as b:
        iterator = b.generate(prompts, LONG)
        until(lambda: b.stats.tokens > 300)
        digest = b.update_weights(successor, 7)
        b.kill_worker("0")  # it comes back on the version in force, and says so of its tokens
        rollouts = list(iterator)
        assert check_versions({3: model, 7: successor}, rollouts) == {3, 7}
        assert b.update_weights(successor, 7) == digest  # once more, as after a crash: nothing changes
        with pytest.raises(BadInput, match="does not follow the logged version 7"):
            b.update_weights(model, 6)
        with pytest.raises(BadInput, match="does not follow"):
            b.update_weights(model, 7)  # the same number, other weights
        assert len(list(b.generate(prompts, SHORT))) == 8
    with backend() as b:  # a resume loads the logged version, whatever the model's folder holds
        rollouts = list(b.generate(prompts, SHORT, seed=1))
        assert {v for r in rollouts for v in r.output.version_T.tolist()} == {7}
        check_versions({3: model, 7: successor}, rollouts)


@pytest.mark.slow
def test_tensors_are_kept_for_as_long_as_they_are_in_force(
    backend: Callable[..., RolloutBackend], model: Path, successor: Path, prompts: Any, tmp_path: Path
) -> None:
    tensors = load_file(successor / "model.safetensors")
    with backend(workers=1) as b:
        for version in (1, 2):
            scaled = {k: v * (1 + 0.01 * (version - 1)) for k, v in tensors.items()}
            b.update_weights(scaled, version)
            assert [p.name for p in (tmp_path / "wal" / "weights").iterdir()] == [f"{version:010d}.1"]
        b.update_weights(scaled, 2)
        assert len(list((tmp_path / "wal" / "weights").iterdir())) == 1
    with backend(workers=1) as b:
        rollouts = list(b.generate(prompts, SHORT))
        assert {v for r in rollouts for v in r.output.version_T.tolist()} == {2}


@pytest.mark.slow
def test_weights_that_cannot_be_loaded_leave_the_old_ones_in_force(
    backend: Callable[..., RolloutBackend], model: Path, successor: Path, prompts: Any, tmp_path: Path
) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(successor, torn)
    data = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(data[: len(data) // 2])
    other = make_tiny_model(tmp_path / "other", "qwen3")
    with backend() as b:
        for folder, error in ((torn, BadInput), (other, ArchitectureMismatch), (tmp_path / "none", BadInput)):
            with pytest.raises(error):
                b.update_weights(folder, 1)
            rollouts = list(b.generate(prompts, SHORT))
            assert len(rollouts) == 8
            assert {v for r in rollouts for v in r.output.version_T.tolist()} == {0}
        b.update_weights(successor, 1)
        check_versions({0: model, 1: successor}, list(b.generate(prompts, SHORT, seed=2)))


@pytest.mark.parametrize(
    "stage", [pytest.param("asked", marks=pytest.mark.slow), "prepared", pytest.param("logged", marks=pytest.mark.slow)]
)
def test_a_worker_that_dies_during_an_update(
    backend: Callable[..., RolloutBackend],
    model: Path,
    successor: Path,
    prompts: Any,
    until: Any,
    stage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with backend() as b:
        iterator = b.generate(prompts, LONG)
        until(lambda: b.stats.tokens > 200)
        c = b._running()
        victim = max(c._workers, key=lambda w: len(w.running))
        declare = c.wal.declare_policy
        send = victim.send
        killed = threading.Event()

        def kill() -> None:
            if not killed.is_set():
                killed.set()
                victim.signal(signal.SIGKILL)
                assert victim.dead(10.0)

        def sending(message: dict[str, Any]) -> None:
            send(message)
            if message["t"] == "prepare" and stage == "asked":
                kill()

        def declaring(*args: Any) -> int:
            if stage == "prepared":
                kill()
            lsn = declare(*args)
            if stage == "logged":
                c.wal.wait_durable(lsn)
                kill()
            return lsn

        monkeypatch.setattr(victim, "send", sending)
        monkeypatch.setattr(c.wal, "declare_policy", declaring)
        b.update_weights(successor, 1)
        assert killed.is_set()
        rollouts = list(iterator)
        assert b.stats.deaths == 1
        assert check_versions({0: model, 1: successor}, rollouts) == {0, 1}
        assert sum(r.interruptions for r in rollouts) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "version"), [("prepared", 0), ("appended", None), ("logged", 1)])
def test_a_backend_that_dies_during_an_update(
    job: Any, model: Path, successor: Path, stage: str, version: int | None
) -> None:
    dying = job(
        die_at=stage, update_after=3, source=successor, group_size=4, sampling={"max_tokens": 600, "ignore_eos": True}
    )
    assert dying.process.wait(90) == -signal.SIGKILL
    assert not dying.events("updated")
    last = job(group_size=4, sampling={"max_tokens": 600, "ignore_eos": True})
    assert last.process.wait(90) == 0
    (_, second) = [i for i, line in enumerate(last.lines()) if line["event"] == "started"]
    delivered = [line for line in last.lines()[second:] if line["event"] == "delivered"]
    versions = {v for line in delivered for v in line["versions"]}
    ends = {line["versions"][-1] for line in delivered if not line["again"]}
    assert len(ends) == 1  # every worker is wholly on one version
    if version is not None:
        assert ends == {version}
    assert versions <= {0, *ends}
    rollouts = [_Delivered(line) for line in delivered]
    check_versions({0: model, 1: successor}, rollouts)


class _Delivered:
    """A line of a job's output, with the fields that `check_versions` reads."""

    def __init__(self, line: dict[str, Any]) -> None:
        from types import SimpleNamespace

        index = int(line["key"].partition("/")[2])
        self.prompt = np.asarray([1, 40 + index // 4, 50 + 2 * (index // 4), 60 + 3 * (index // 4)])
        self.tokens = np.asarray(line["tokens"])
        value_T = np.frombuffer(bytes.fromhex(line["logprobs"]), np.float32)
        self.output = SimpleNamespace(version_T=np.asarray(line["versions"]), logprob=SimpleNamespace(value_T=value_T))


def test_weights_edited_without_a_declared_version(
    backend: Callable[..., RolloutBackend], model: Path, prompts: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(model, folder)
    with backend(engine=str(folder)) as b:
        list(b.generate(prompts, SHORT))
    original = (folder / "model.safetensors").read_bytes()
    nudge(folder, 2)
    with pytest.raises(UndeclaredWeights, match=r"policy version 0 was logged with .* from"):
        backend(engine=str(folder)).start()
    (folder / "model.safetensors").write_bytes(original)
    moved = folder.rename(tmp_path / "moved")  # another place, the same weights
    with backend(engine=str(moved)) as b:
        assert len(list(b.generate(prompts, SHORT))) == 8
    tokenizer = json.loads((moved / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (moved / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(TokenizerMismatch, match="the log was written with tokenizer"):
        backend(engine=str(moved)).start()
    with pytest.raises(ArchitectureMismatch, match="the log was written with architecture"):
        backend(engine=make_tiny_model(tmp_path / "other", "qwen3")).start()
    with backend() as b:  # the log is usable still
        assert len(list(b.generate(prompts, SHORT))) == 8


def test_tied_weights_as_tensors(model: Path, tmp_path: Path, prompts: Any) -> None:
    """One memory under two names, which safetensors does not write."""
    folder = tmp_path / "tied"
    tied = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(folder)
    for path in model.glob("tokenizer*"):
        shutil.copy(path, folder)
    with torch.no_grad():
        tied.lm_head.weight *= 1.5
    assert tied.lm_head.weight.data_ptr() == tied.model.embed_tokens.weight.data_ptr()
    saved = tmp_path / "saved"
    tied.save_pretrained(saved)
    for path in model.glob("tokenizer*"):
        shutil.copy(path, saved)
    digests = []
    for number, weights in enumerate((tied.state_dict(), saved)):
        with RolloutBackend(folder, tmp_path / f"wal-{number}", segment_bytes=1 << 18) as b:
            digests.append(b.update_weights(weights, version=1))
            assert {int(v) for r in b.generate(prompts, SHORT) for v in r.output.version_T} == {1}
    assert digests[0] == digests[1]


class _Gathered(dict[str, Callable[[], torch.Tensor]]):
    """Tensors that are made when they are asked for, and that nobody else keeps."""

    def __init__(self, makers: dict[str, Callable[[], torch.Tensor]]) -> None:
        super().__init__(makers)
        self.gathered: list[str] = []

    def __getitem__(self, name: str) -> Any:
        self.gathered.append(name)
        return super().__getitem__(name)()

    def items(self) -> Any:
        return ((name, self[name]) for name in self)


def test_each_tensor_is_gathered_once_and_none_is_taken_for_one_that_is_gone(model: Path, tmp_path: Path) -> None:
    makers = {f"layer{i}": functools.partial(torch.full, (64, 64), float(i)) for i in range(6)}
    tensors = _Gathered({**makers, "turned": lambda: torch.arange(4096.0).view(64, 64).t()})
    saved = save_weights(tensors, tmp_path / "saved", 1, like=str(model))
    assert sorted(tensors.gathered) == sorted(tensors)
    found = load_file(saved / "model.safetensors")
    assert {name: float(found[name][0, 0]) for name in makers} == {f"layer{i}": float(i) for i in range(6)}
    assert same_weights(tensors, saved)
    assert not same_weights(_Gathered({**tensors, "layer6": lambda: torch.zeros(64, 64)}), saved)


def test_one_memory_under_two_dtypes_is_two_tensors(model: Path, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(4, dtype=torch.int32)}
    tensors["b"] = tensors["a"].view(torch.float32)
    saved = save_weights(tensors, tmp_path / "saved", 1, like=str(model))
    found = load_file(saved / "model.safetensors")
    assert {name: t.dtype for name, t in found.items()} == {"a": torch.int32, "b": torch.float32}
    assert same_weights(tensors, saved)


@pytest.mark.parametrize(
    ("names", "written"),
    [
        (("embed", "head"), {"embed", "head", "other"}),
        (("head",), {"head", "other"}),
        (("embed",), {"embed", "other"}),
        ((), {"embed", "other"}),
    ],
)
def test_tied_tensors_are_written_under_the_names_that_the_model_has(
    tmp_path: Path, names: tuple[str, ...], written: set[str]
) -> None:
    like = tmp_path / "model"
    like.mkdir()
    if names:
        save_file({name: torch.zeros(3, 3) for name in names}, like / "model.safetensors")
    tied = torch.arange(9.0).view(3, 3)
    tensors = {"embed": tied, "head": tied.detach(), "other": torch.ones(2)}
    saved = save_weights(tensors, tmp_path / "saved", 1, like=str(like))
    found = load_file(saved / "model.safetensors")
    assert set(found) == written
    assert all(torch.equal(t, tensors[name]) for name, t in found.items())
    assert same_weights(tensors, saved)


def test_what_is_no_plain_tensor_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    class Shard(torch.Tensor):
        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return [], None

        @classmethod
        def __tensor_unflatten__(cls, *_: Any) -> None: ...

        @classmethod
        def __torch_dispatch__(cls, *_: Any, **__: Any) -> None: ...

    shard = torch.Tensor._make_wrapper_subclass(Shard, (4, 4))
    for value, kind in (
        (shard, "Shard"),
        (torch.zeros(4, 4, device="meta"), "Tensor on meta"),
        (np.zeros((4, 4), np.float32), "ndarray"),
    ):
        for call in (
            lambda tensors: save_weights(tensors, tmp_path / "saved", 1, like=str(model)),
            lambda tensors: same_weights(tensors, model),
        ):
            with pytest.raises(BadInput, match=rf"the weight second is a {kind}.*full_tensor\(\)"):
                call({"lm_head.weight": load_file(model / "model.safetensors")["lm_head.weight"], "second": value})
    assert not (tmp_path / "saved").exists()
