"""verl's own agent loop managers and workers, on a host that is killed under them.

The configuration is verl's, composed by Hydra from its own files; the workers are its Ray actors. No server of vLLM or
SGLang runs: the adapter's agent loop never asks for one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
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

from rollout_wal.errors import BadInput, CheckpointMismatch
from rollout_wal.trainers.ledger import STATE_FILE
from rollout_wal.trainers.verl.agent_loop import COHORT
from rollout_wal.trainers.verl.manager import AgentLoopManager, AgentLoopManagerTQ, Cohorts
from rollout_wal.trainers.verl.settings import Settings

N = 2
PROMPTS = ["1+2=", "3+4=", "5+6=", "7+8="]
RESPONSE = 100
ONE = "actor_rollout_ref.rollout.agent.num_workers=1"


@pytest.fixture
def config(cluster: None, model: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """verl's configuration; whoever started a host by it need not stop it."""
    names: list[str] = []

    def make(name: str, *overrides: str) -> Any:
        names.append(name)
        with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
            return compose(
                "ppo_trainer",
                [
                    f"actor_rollout_ref.model.path={model}",
                    "actor_rollout_ref.rollout.name=rollout_wal",
                    "actor_rollout_ref.rollout.agent.num_workers=2",
                    f"actor_rollout_ref.rollout.n={N}",
                    "actor_rollout_ref.rollout.prompt_length=32",
                    f"actor_rollout_ref.rollout.response_length={RESPONSE}",
                    "actor_rollout_ref.rollout.calculate_log_probs=True",
                    f"+actor_rollout_ref.rollout.custom.rollout_wal.path={tmp_path / 'wal'}",
                    f"+actor_rollout_ref.rollout.custom.rollout_wal.host={name}",
                    f"+actor_rollout_ref.rollout.custom.rollout_wal.archive={tmp_path / 'archive'}",
                    "+actor_rollout_ref.rollout.custom.rollout_wal.num_cpus=0.5",
                    "+actor_rollout_ref.rollout.custom.rollout_wal.slots=8",
                    "+actor_rollout_ref.rollout.custom.rollout_wal.backend.segment_bytes=262144",
                    f"trainer.default_local_dir={tmp_path / 'checkpoints'}",
                    *overrides,
                ],
            )

    yield make
    for name in names:
        with contextlib.suppress(ValueError):
            stop(ray.get_actor(name))


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


def start(config: Any, manager: Any = AgentLoopManager) -> Any:
    return manager.create(config=config, llm_client=LLMServerClient(config))


def restart(manager: Any) -> None:
    """The trainer's process is new. All that the adapter keeps in it is in `Cohorts`; verl's workers keep nothing, and
    starting them anew would only cost the import of verl."""
    manager.cohorts = Cohorts(manager.config)


def told(output: DataProto) -> list[list[int]]:
    return [
        row[mask.bool()].tolist()
        for row, mask in zip(output.batch["responses"], output.batch["attention_mask"][:, 32:], strict=True)
    ]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, list[list[int]]]:
    return {}


@pytest.mark.parametrize("kill", [False, True])
def test_the_agent_loop_manager_of_verl(
    config: Callable[..., Any], kill: bool, undisturbed: dict[str, list[list[int]]]
) -> None:
    """With a kill of the host, its backend and its workers in the middle, everything is as without."""
    manager = start(config(f"loop-{kill}"))
    host = manager.cohorts.host
    killed: list[int] = []
    if kill:

        def kill_in_the_middle() -> None:
            wait_until(lambda: ray.get(host.balance.remote()).begun > 0, seconds=280.0)
            killed.append(kill_host(host))

        threading.Thread(target=kill_in_the_middle, daemon=True).start()
    output = manager.generate_sequences(batch(1))
    if kill:
        wait_until(lambda: bool(killed), seconds=120.0)
        assert killed != [ray.get(host.pid.remote())]
    rows = told(output)
    assert len(rows) == len(PROMPTS) * N
    assert rows[0] != rows[1]  # one prompt, two samples
    assert rows == undisturbed.setdefault("rows", rows)
    mask, logprobs = output.batch["response_mask"], output.batch["rollout_log_probs"]
    assert mask.sum(1).tolist() == [len(r) for r in rows]
    assert bool((logprobs[mask.bool()] < 0).all())
    assert not logprobs[~mask.bool()].any()
    extra = output.non_tensor_batch
    assert [len(v) for v in extra["policy_versions"]] == [len(r) for r in rows]
    assert len(set(extra["rollout_id"])) == len(rows)
    assert set(extra["censored"]) == {None}
    assert set(extra[COHORT]) == {"verl.0/1000"}
    if kill:
        # The same step again, in a trainer that was started again: nothing is sampled, the same comes.
        restart(manager)
        assert told(manager.generate_sequences(batch(1))) == rows
        assert ray.get(host.balance.remote()).begun == len(rows)
        restart(manager)
        # It comes out of an actor that had it from another, so it is Ray's error with ours in its text.
        with pytest.raises(ray.exceptions.RayError, match="another prompt or other parameters"):
            manager.generate_sequences(batch(1, texts=PROMPTS[::-1]))


def test_a_checkpoint_of_verl_consumes_what_it_contains(config: Callable[..., Any], tmp_path: Path) -> None:
    from verl.trainer.ppo.checkpoint_callback import build_checkpoint_callback

    path = "rollout_wal.trainers.verl.checkpoints.ConsumeWithCheckpoints"
    made = config("checkpoints", f"trainer.checkpoint_callback_class={path}", ONE)
    callback = build_checkpoint_callback(made)  # by verl, from its configuration
    manager = start(made)
    host = manager.cohorts.host
    assert len(told(manager.generate_sequences(batch(0, validate=True)))) == 4
    first = told(manager.generate_sequences(batch(1)))
    second = told(manager.generate_sequences(batch(2)))
    folder = tmp_path / "checkpoints" / "global_step_1"
    folder.mkdir(parents=True)
    (folder / "data.pt").write_bytes(b"verl's")
    kill_host(host)  # what the host knew of the steps is gone with it; the log knows
    callback.on_save(trainer=None, global_step=1, checkpoint_dir=str(folder), async_save=False)
    assert (folder / STATE_FILE).is_file()
    counts = ray.get(host.cohorts.remote())
    assert {name: c.gone for name, c in counts.items()} == {"verl.0/1000": 8, "verl.0/2000": 0, "verl.0/eval/0.0.0": 4}
    # The trainer dies, and goes on from there: step 1 is over, step 2 comes again.
    restart(manager)
    assert told(manager.generate_sequences(batch(2))) == second != first
    callback.on_save(
        trainer=None, global_step=2, checkpoint_dir=str(folder.with_name("global_step_2")), async_save=True
    )
    assert ray.get(host.cohorts.remote())["verl.0/2000"].gone == 0
    restart(manager)
    with pytest.raises(CheckpointMismatch, match="has consumed batch 1000"):
        manager.generate_sequences(batch(1))  # from the beginning, while the log is further
    # Killed between verl's checkpoint of step 2 and ours: verl goes on from it, so the log follows.
    folder.with_name("global_step_2").mkdir(exist_ok=True)
    restart(manager)
    manager.generate_sequences(batch(3))
    assert ray.get(host.cohorts.remote())["verl.0/2000"].gone == 8
    from rollout_wal.dataset import open_dataset

    assert len(open_dataset(tmp_path / "archive").metadata().to_pylist()) == 16


def test_the_weights_go_the_way_of_verl(config: Callable[..., Any], model: Path) -> None:
    import asyncio

    from safetensors.torch import load_file
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.rollout.base import get_rollout_class

    made = config("weights", ONE)
    rollout = made.actor_rollout_ref.rollout
    replica = get_rollout_replica_class("rollout_wal")(0, rollout, made.actor_rollout_ref.model, gpus_per_node=1)
    asyncio.run(replica.launch_servers())
    host = replica.server_handle
    asyncio.run(replica.sleep())
    asyncio.run(replica.wake_up())
    adapter = get_rollout_class("rollout_wal")(
        config=rollout, model_config=omega_conf_to_dataclass(made.actor_rollout_ref.model), device_mesh=None
    )
    weights = load_file(str(model / "model.safetensors"))
    asyncio.run(adapter.update_weights(iter(weights.items()), global_steps=0))
    assert ray.get(host.policy_version.remote()) == 0
    name = next(n for n in weights if n.endswith("layers.0.mlp.down_proj.weight"))
    changed = {**weights, name: weights[name] + 0.25}
    asyncio.run(adapter.update_weights(iter(changed.items()), global_steps=1))
    assert ray.get(host.policy_version.remote()) == 1
    with pytest.raises(BadInput, match="with an adapter"):
        asyncio.run(adapter.update_weights(iter({}.items()), peft_config=object()))
    output = start(made).generate_sequences(batch(1))
    assert {v for row in output.non_tensor_batch["policy_versions"] for v in row} == {1}
    assert set(output.non_tensor_batch["min_global_steps"]) == {1}


def test_the_manager_of_the_trainer_of_version_1(config: Callable[..., Any]) -> None:
    """Answers go through TransferQueue, as its trainer reads them."""
    import transfer_queue as tq
    from verl.utils import tensordict_utils as tu

    made = config("tq", ONE)
    with pytest.raises(BadInput, match="colocate_async"):
        start(config("refused", "trainer.v1.trainer_mode=colocate_async"), AgentLoopManagerTQ)
    made.transfer_queue.enable = True
    tq.init(made.transfer_queue)
    try:
        manager = start(made, AgentLoopManagerTQ)
        raw = np.empty(len(PROMPTS), dtype=object)
        raw[:] = [[{"role": "user", "content": text}] for text in PROMPTS]
        uids = np.array([f"uid{i}" for i in range(len(PROMPTS))], dtype=object)
        prompts = tu.get_tensordict({"raw_prompt": raw, "uid": uids, "index": np.arange(4, dtype=object)})
        tu.assign_non_tensor_data(prompts, "global_steps", 1)
        tags = [{"is_prompt": True, "status": "pending", "global_steps": 1}] * len(PROMPTS)
        tq.kv_batch_put(keys=list(uids), partition_id="train", tags=tags)
        manager.generate_sequences(prompts)

        def tags_now() -> dict[str, Any]:
            found: dict[str, Any] = tq.kv_list("train")["train"]
            return found

        wait_until(lambda: all(tags_now()[u]["status"] in ("finished", "failure") for u in uids))
        assert {tags_now()[u]["status"] for u in uids} == {"finished"}
        keys = sorted(k for k in tags_now() if k not in set(uids))
        assert len(keys) == len(PROMPTS) * N
        data = tq.kv_batch_get(
            keys=keys, partition_id="train", fields=["responses", "response_mask", "rollout_log_probs"]
        )
        for response, mask, logprobs in zip(
            data["responses"], data["response_mask"], data["rollout_log_probs"], strict=True
        ):
            assert len(response) == len(mask) == len(logprobs)
            assert bool(mask.all())
        assert ray.get(manager.cohorts.host.cohorts.remote())["verl.0/1000"].size == len(PROMPTS) * N
    finally:
        tq.close()


def test_settings_are_checked() -> None:
    with pytest.raises(BadInput, match="path is not set"):
        Settings.of(OmegaConf.create({"custom": None}))
    with pytest.raises(BadInput, match="unknown options \\['slot'\\]"):
        Settings.of(OmegaConf.create({"custom": {"rollout_wal": {"path": "x", "slot": 3}}}))
    made = Settings.of(OmegaConf.create({"custom": {"rollout_wal": {"path": "x", "backend": {"grace_s": 1}}}}))
    assert made.cohort(3, 2) == "verl.0/3002"
    assert made.backend == {"grace_s": 1}
