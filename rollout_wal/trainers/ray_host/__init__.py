"""A rollout backend as a Ray actor: rollouts for whoever runs on the cluster, and a host that may die.

    from rollout_wal.trainers.ray_host import start_host

    host = start_host("models/tiny", "/data/runs/wal", workers=2, num_gpus=1)
    rollouts = ray.get(host.generate.remote("step-0", prompts, SamplingParams(max_tokens=512), group_size=8))
    ray.get(host.consumed.remote([r.id for r in rollouts], epoch=0, step=0))

One backend owns its directory, and many Ray tasks and actors want rollouts; so the backend lives in an actor of its
own and the others call it by name. Ray restarts the actor when it dies and sends the calls again that were not
answered. That is safe because every call here may come twice: a cohort that is in the log goes on, whoever asks, and
`consumed` and `release` leave out what is gone already.

Ray carries arguments and answers between its processes in its own way, which is pickle. Nothing of that is written to
disk, and whoever can reach a Ray cluster can run code on it anyway.
"""

from .host import RolloutHost
from .start import DEFAULT_NAME, get_host, start_host

__all__ = ["DEFAULT_NAME", "RolloutHost", "get_host", "start_host"]
