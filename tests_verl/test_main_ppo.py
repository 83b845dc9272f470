"""verl's entry point, `python -m verl.trainer.main_ppo`, on a CPU, its rollouts from here; killed, and going on.

Everything in it is verl's own: its configuration, its task runner, its trainer of version 1, its FSDP workers (gloo),
its TransferQueue, its reward loop and its checkpoints. What verl lacks is a CPU among its platforms: `cpu_platform`
registers one where verl lets others register theirs. Ray counts a GPU that nobody uses.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hosts import wait_until

from rollout_wal.dataset import open_dataset
from rollout_wal.errors import BadInput
from rollout_wal.job_view import JobView
from rollout_wal.testing.tiny_models import make_tiny_model

HERE = Path(__file__).parent
GROUPS, N, STEPS = 4, 2, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and prompts in verl's format."""
    folder = tmp_path_factory.mktemp("data")
    make_tiny_model(folder / "model", mean_length=30.0)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}+{i}="}],
            "data_source": "sums",
            "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
            "extra_info": {"index": i},
        }
        for i in range(GROUPS * STEPS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "prompts.parquet")
    return folder


def overrides(data: Path, folder: Path) -> list[str]:
    ours = "rollout_wal.trainers.verl"
    return [
        # What docs/trainers.md says.
        "actor_rollout_ref.rollout.name=rollout_wal",
        f"+actor_rollout_ref.rollout.agent.agent_loop_manager_class={ours}.manager.AgentLoopManagerTQ",
        f"+actor_rollout_ref.rollout.custom.rollout_wal.path={folder / 'wal'}",
        f"+actor_rollout_ref.rollout.custom.rollout_wal.archive={folder / 'archive'}",
        "+actor_rollout_ref.rollout.custom.rollout_wal.num_cpus=0.5",
        "+actor_rollout_ref.rollout.custom.rollout_wal.slots=8",
        f"trainer.checkpoint_callback_class={ours}.checkpoints.ConsumeWithCheckpoints",
        # A short run.
        "algorithm.adv_estimator=grpo",
        f"data.train_files={data / 'prompts.parquet'}",
        f"data.val_files={data / 'prompts.parquet'}",
        f"data.train_batch_size={GROUPS}",
        "data.max_prompt_length=32",
        "data.max_response_length=64",
        "data.dataloader_num_workers=0",
        "data.seed=1",
        f"actor_rollout_ref.model.path={data / 'model'}",
        f"actor_rollout_ref.rollout.n={N}",
        "actor_rollout_ref.rollout.agent.num_workers=1",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={GROUPS}",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "reward.num_workers=1",
        f"reward.custom_reward_function.path={HERE / 'vowels.py'}",
        "trainer.logger=console",
        "trainer.val_before_train=False",
        "trainer.save_freq=1",
        f"trainer.total_training_steps={STEPS}",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        f"hydra.run.dir={folder / 'hydra'}",
        # A CPU, in float32, without flash attention.
        "trainer.device=cpu",
        "trainer.n_gpus_per_node=1",
        "actor_rollout_ref.model.use_remove_padding=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision="
        "{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "actor_rollout_ref.rollout.free_cache_engine=False",
        # A small cluster of its own: verl's actors want a CPU each, its placement a GPU.
        "ray_kwargs.ray_init.num_cpus=8",
        "+ray_kwargs.ray_init.num_gpus=1",
        "+ray_kwargs.ray_init.include_dashboard=False",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    ]


@pytest.fixture
def main_ppo(data: Path) -> Iterator[Callable[[Path], subprocess.Popen[bytes]]]:
    """Starts the entry point; what is left of it after the test is killed."""
    running: list[subprocess.Popen[bytes]] = []

    def start(folder: Path) -> subprocess.Popen[bytes]:
        folder.mkdir(exist_ok=True)
        env = {
            **os.environ,
            "VERL_PLATFORM": "cpu",
            "VERL_ENGINE_DEVICE": "cuda",
        }  # its FSDP engine, where there is none
        env["VERL_USE_EXTERNAL_MODULES"] = "cpu_platform,rollout_wal.trainers.verl.engine"
        with (folder / "output.txt").open("ab") as output:
            command = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides(data, folder)]
            running.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env))
        return running[-1]

    yield start
    for process in running:
        kill_all(process)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to verl's driver, to its cluster, and to all who are on it, as when a machine dies."""
    with contextlib.suppress(psutil.NoSuchProcess):
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        _, alive = psutil.wait_procs(everyone[1:], timeout=60)
        assert not alive


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    code = process.wait(timeout=600)
    assert code == 0, (folder / "output.txt").read_text()[-6000:]


def kill_host(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the rollout host's process."""
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess, IndexError):
            if child.cmdline()[0].startswith("ray::RolloutHost"):
                child.send_signal(signal.SIGKILL)
                return
    raise AssertionError("no host is running")


def begun(folder: Path, cohort: str) -> bool:
    """As another process sees it in the log."""
    if not (folder / "wal" / "job").is_dir():
        return False
    try:
        view = JobView(folder / "wal")
        view.refresh()
    except BadInput:  # it is being made
        return False
    return any(c.record.name == cohort for c in view.job.cohorts.values()) and bool(view.job.rollouts)


def wait_for_second_step(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """It samples, and what verl said of the first one has come through Ray: that is late, and would die with it."""
    wait_until(lambda: begun(folder, "verl.0/2000"), 400.0, process=process)
    wait_until(lambda: bool(differences(folder)), process=process)


def differences(folder: Path) -> list[float]:
    """Of each step, the largest between the logged probabilities and those of verl's actor, as verl prints them."""
    found = re.findall(r"training/rollout_probs_diff_max:(\S+)", (folder / "output.txt").read_text())
    return [float(difference) for difference in found]


def archived(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = open_dataset(folder / "archive").metadata().to_pylist()
    return sorted(rows, key=lambda row: str(row["sample"]))


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    path = folder / "checkpoints" / f"global_step_{step}" / "actor" / "model_world_size_1_rank_0.pt"
    state = torch.load(path, weights_only=False)
    return {name: (t.to_local() if hasattr(t, "to_local") else t) for name, t in state.items()}


def check_run(folder: Path) -> None:
    """Each rollout was used once, by its step; its log-probabilities are those that verl's actor computes."""
    assert (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == str(STEPS)
    rows = archived(folder)
    assert len({row["sample"] for row in rows}) == len(rows) == GROUPS * N * STEPS
    steps = Counter(json.loads(row["extras"])["optimizer_step"] for row in rows)
    assert steps == dict.fromkeys(range(1, STEPS + 1), GROUPS * N)
    # Each step sampled with the weights of the one before: the way of the weights is FSDP's.
    versions = {(str(row["sample"]).split("/")[1], *row["policy_versions"]) for row in rows}
    assert versions == {("1000", 0), ("2000", 1)}
    found = differences(folder)
    assert len(found) >= STEPS
    assert max(found) < 1e-5
    first, last = weights(folder, 1), weights(folder, STEPS)
    assert any(not torch.equal(first[name], last[name]) for name in first)


@pytest.mark.timeout(1500)
def test_killed_and_started_again_it_trains_on_every_rollout_once(
    main_ppo: Callable[[Path], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    run = main_ppo(folder)
    wait_until(lambda: begun(folder, "verl.0/1000"), 400.0, process=run)
    kill_host(run)  # Ray starts it again, and verl's agent loops get their answers
    wait_for_second_step(folder, run)
    kill_all(run)  # the trainer and all others, in its second step
    finish(main_ppo(folder), folder)
    check_run(folder)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_it_ends_where_the_uninterrupted_run_ends(
    main_ppo: Callable[[Path], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    finish(main_ppo(reference), reference)
    check_run(reference)
    run = main_ppo(killed)
    wait_for_second_step(killed, run)
    kill_all(run)
    finish(main_ppo(killed), killed)
    check_run(killed)
    columns = ("sample", "response_length", "policy_versions", "finish_reason", "extras")
    assert [[row[c] for c in columns] for row in archived(killed)] == [
        [row[c] for c in columns] for row in archived(reference)
    ]
    ours, theirs = weights(killed, STEPS), weights(reference, STEPS)
    for name, tensor in theirs.items():
        # verl names its prompts at random and sorts by that: the order of a sum may differ.
        torch.testing.assert_close(ours[name], tensor, rtol=0.0, atol=1e-5)
