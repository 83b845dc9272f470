"""verl's own agent loop manager and workers, on a host that is killed under them.

The configuration is verl's, composed by Hydra from its own files; the workers are its Ray actors. No server of vLLM or
SGLang runs: the adapter's agent loop never asks for one. What only a whole run shows is in test_main_ppo.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
import verl
from hosts import kill_host, stop, wait_until
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from verl import DataProto
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import get_rollout_replica_class

from rollout_wal.backend import RolloutBackend
from rollout_wal.dataset import open_dataset
from rollout_wal.errors import BadInput, CheckpointMismatch
from rollout_wal.params import SamplingParams
from rollout_wal.trainers.ledger import STATE_FILE
from rollout_wal.trainers.verl.agent_loop import COHORT
from rollout_wal.trainers.verl.manager import AgentLoopManager, AgentLoopManagerTQ, Cohorts
from rollout_wal.trainers.verl.settings import Settings

N = 2
PROMPTS = ["1+2=", "3+4=", "5+6=", "7+8="]
RESPONSE = 100
CALLBACK = "rollout_wal.trainers.verl.checkpoints.ConsumeWithCheckpoints"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verl")


@pytest.fixture(scope="module")
def config(model: Path, folder: Path) -> Any:
    """verl's configuration."""
    ours = "+actor_rollout_ref.rollout.custom.rollout_wal"
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        return compose(
            "ppo_trainer",
            [
                f"actor_rollout_ref.model.path={model}",
                "actor_rollout_ref.rollout.name=rollout_wal",
                "actor_rollout_ref.rollout.agent.num_workers=1",
                f"actor_rollout_ref.rollout.n={N}",
                "actor_rollout_ref.rollout.prompt_length=32",
                f"actor_rollout_ref.rollout.response_length={RESPONSE}",
                "actor_rollout_ref.rollout.calculate_log_probs=True",
                f"{ours}.path={folder / 'wal'}",
                f"{ours}.host=verl",
                f"{ours}.archive={folder / 'archive'}",
                f"{ours}.num_cpus=0.5",
                f"{ours}.slots=8",
                f"{ours}.backend.segment_bytes=262144",
                f"trainer.checkpoint_callback_class={CALLBACK}",
                f"trainer.default_local_dir={folder / 'checkpoints'}",
            ],
        )


@pytest.fixture(scope="module")
def manager(cluster: None, config: Any) -> Iterator[Any]:
    """One for all tests, which use the steps in order: its workers take long to start, for they import verl."""
    yield AgentLoopManager.create(config=config, llm_client=LLMServerClient(config))
    with contextlib.suppress(ValueError):
        stop(ray.get_actor("verl"))


def batch(step: int, *, validate: bool = False, texts: list[str] = PROMPTS) -> DataProto:
    """As verl's trainer makes it: each prompt n times in a row."""
    rows = [[{"role": "user", "content": text}] for text in texts for _ in range(1 if validate else N)]
    raw = np.empty(len(rows), dtype=object)
    raw[:] = rows
    return DataProto.from_dict(
        tensors={"dummy": torch.zeros(len(rows), 1)},
        non_tensors={"raw_prompt": raw, "data_source": np.array(["sums"] * len(rows), dtype=object)},
        meta_info={"global_steps": step, "validate": validate},
    )


def restart(manager: Any) -> None:
    """The trainer's process is new. All that the adapter keeps in it is in `Cohorts`; verl's workers keep nothing, and
    starting them anew would only cost the import of verl."""
    manager.cohorts = Cohorts(manager.config)


def told(output: DataProto) -> list[list[int]]:
    return [
        row[mask.bool()].tolist()
        for row, mask in zip(output.batch["responses"], output.batch["attention_mask"][:, 32:], strict=True)
    ]


def undisturbed(output: DataProto, model: Path, folder: Path, seed: int) -> list[list[int]]:
    """What the rollouts of these prompts are when nothing dies, and there is neither Ray nor verl."""
    prompts = [
        row[mask.bool()].tolist()
        for row, mask in zip(output.batch["prompts"], output.batch["attention_mask"][:, :32], strict=True)
    ]
    with RolloutBackend(model, folder, slots=8) as backend:
        found = backend.generate(prompts[::N], SamplingParams(max_tokens=RESPONSE), group_size=N, seed=seed)
        return [r.tokens.tolist() for r in sorted(found, key=lambda r: r.index)]


def test_the_host_is_killed_under_the_agent_loops(manager: Any, model: Path, tmp_path: Path) -> None:
    """With a kill of the host, its backend and its workers in the middle, everything is as without."""
    host = manager.cohorts.host
    killed: list[int] = []

    def kill_in_the_middle() -> None:
        wait_until(lambda: ray.get(host.balance.remote()).begun > 0, seconds=280.0)
        killed.append(kill_host(host))

    threading.Thread(target=kill_in_the_middle, daemon=True).start()
    output = manager.generate_sequences(batch(1))
    wait_until(lambda: bool(killed), seconds=120.0)
    assert killed != [ray.get(host.pid.remote())]
    rows = told(output)
    assert len(rows) == len(PROMPTS) * N
    assert rows[0] != rows[1]  # one prompt, two samples
    assert rows == undisturbed(output, model, tmp_path, manager.config.actor_rollout_ref.rollout.seed + 1)
    mask, logprobs = output.batch["response_mask"], output.batch["rollout_log_probs"]
    assert mask.sum(1).tolist() == [len(r) for r in rows]
    assert bool((logprobs[mask.bool()] < 0).all())
    assert not logprobs[~mask.bool()].any()
    extra = output.non_tensor_batch
    assert [len(v) for v in extra["policy_versions"]] == [len(r) for r in rows]
    assert len(set(extra["rollout_id"])) == len(rows)
    assert set(extra["censored"]) == {None}
    assert set(extra[COHORT]) == {"verl.0/1000"}
    # The same step again, in a trainer that was started again: nothing is sampled, the same comes.
    restart(manager)
    assert told(manager.generate_sequences(batch(1))) == rows
    assert ray.get(host.balance.remote()).begun == len(rows)
    restart(manager)
    # It comes out of an actor that had it from another, so it is Ray's error with ours in its text.
    with pytest.raises(ray.exceptions.RayError, match="another prompt or other parameters"):
        manager.generate_sequences(batch(1, texts=PROMPTS[::-1]))


def test_a_checkpoint_of_verl_consumes_what_it_contains(manager: Any, config: Any, folder: Path) -> None:
    from verl.trainer.ppo.checkpoint_callback import build_checkpoint_callback

    callback = build_checkpoint_callback(config)  # by verl, from its configuration
    host = manager.cohorts.host
    restart(manager)
    assert len(told(manager.generate_sequences(batch(0, validate=True)))) == 4
    first = told(manager.generate_sequences(batch(1)))
    second = told(manager.generate_sequences(batch(2)))
    step_1, step_2 = (folder / "checkpoints" / f"global_step_{step}" for step in (1, 2))
    step_1.mkdir(parents=True)
    (step_1 / "data.pt").write_bytes(b"verl's")
    kill_host(host)  # what the host knew of the steps is gone with it; the log knows
    callback.on_save(trainer=None, global_step=1, checkpoint_dir=str(step_1), async_save=False)
    assert (step_1 / STATE_FILE).is_file()
    counts = ray.get(host.cohorts.remote())
    assert {name: c.gone for name, c in counts.items()} == {"verl.0/1000": 8, "verl.0/2000": 0, "verl.0/eval/0.0.0": 4}
    # The trainer dies, and goes on from there: step 1 is over, step 2 comes again.
    restart(manager)
    assert told(manager.generate_sequences(batch(2))) == second != first
    callback.on_save(trainer=None, global_step=2, checkpoint_dir=str(step_2), async_save=True)
    assert ray.get(host.cohorts.remote())["verl.0/2000"].gone == 0
    restart(manager)
    with pytest.raises(CheckpointMismatch, match="has consumed batch 1000"):
        manager.generate_sequences(batch(1))  # from the beginning, while the log is further
    # Killed between verl's checkpoint of step 2 and ours: verl goes on from it, so the log follows.
    step_2.mkdir(exist_ok=True)
    restart(manager)
    manager.generate_sequences(batch(3))
    assert ray.get(host.cohorts.remote())["verl.0/2000"].gone == 8
    assert len(open_dataset(folder / "archive").metadata().to_pylist()) == 16


def test_the_weights_go_the_way_of_verl(manager: Any, config: Any, model: Path) -> None:
    """By the classes that verl looks up for its actor workers; with the workers themselves in test_main_ppo.py."""
    from safetensors.torch import load_file
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.rollout.base import get_rollout_class

    rollout = config.actor_rollout_ref.rollout
    replica = get_rollout_replica_class("rollout_wal")(0, rollout, config.actor_rollout_ref.model, gpus_per_node=1)
    asyncio.run(replica.launch_servers())
    host = replica.server_handle
    asyncio.run(replica.sleep())
    asyncio.run(replica.wake_up())
    adapter = get_rollout_class("rollout_wal")(
        config=rollout, model_config=omega_conf_to_dataclass(config.actor_rollout_ref.model), device_mesh=None
    )
    weights = load_file(str(model / "model.safetensors"))
    asyncio.run(adapter.update_weights(iter(weights.items()), global_steps=3))
    assert ray.get(host.policy_version.remote()) == 0
    name = next(n for n in weights if n.endswith("layers.0.mlp.down_proj.weight"))
    changed = {**weights, name: weights[name] + 0.25}
    asyncio.run(adapter.update_weights(iter(changed.items()), global_steps=4))
    assert ray.get(host.policy_version.remote()) == 1
    with pytest.raises(BadInput, match="with an adapter"):
        asyncio.run(adapter.update_weights(iter({}.items()), peft_config=object()))
    output = manager.generate_sequences(batch(5))
    assert {v for row in output.non_tensor_batch["policy_versions"] for v in row} == {1}
    assert set(output.non_tensor_batch["min_global_steps"]) == {4}


def test_modes_whose_steps_depend_on_time_are_refused(config: Any) -> None:
    other = OmegaConf.merge(config, {"trainer": {"v1": {"trainer_mode": "colocate_async"}}})
    with pytest.raises(BadInput, match="colocate_async"):
        AgentLoopManagerTQ(other)


def test_settings_are_checked() -> None:
    with pytest.raises(BadInput, match="path is not set"):
        Settings.of(OmegaConf.create({"custom": None}))
    with pytest.raises(BadInput, match="unknown options \\['slot'\\]"):
        Settings.of(OmegaConf.create({"custom": {"rollout_wal": {"path": "x", "slot": 3}}}))
    made = Settings.of(OmegaConf.create({"custom": {"rollout_wal": {"path": "x", "backend": {"grace_s": 1}}}}))
    assert made.cohort(3, 2) == "verl.0/3002"
    assert made.backend == {"grace_s": 1}
