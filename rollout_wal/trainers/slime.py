"""slime's rollout and generate functions on a rollout backend.

    --rollout-function-path rollout_wal.trainers.slime.generate_rollout
    --eval-function-path slime.rollout.sglang_rollout.generate_rollout
    --custom-generate-function-path rollout_wal.trainers.slime.generate

Either the first, which fills a whole batch and makes it one cohort, or the last, which leaves slime's own loop in place
and makes each sample a cohort of its own. Both run in slime's rollout manager, one process, where `use_backend`
says which backend is theirs.

Written from slime's definitions of `Sample`, its data source and its rollout functions, of which this uses the names
only: nothing of slime is imported, so what slime passes in is what comes out.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import msgpack
import numpy as np

from ..backend import FinishedRollout, RolloutBackend
from ..engines.base import FinishReason
from ..errors import BadInput, problem
from ..params import SamplingParams
from . import slime_rewards
from .facts import Facts, left_out
from .ledger import TrainerLedger, abandon

#: What `generate_rollout` puts into a sample's metadata, one mapping under this name.
METADATA: Final = "rollout_wal"
_DROPPED: Final = {"skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim", "custom_params"}
_TRUNCATED: Final = {FinishReason.MAX_TOKENS, FinishReason.CONTEXT, FinishReason.TURN_LIMIT}


class DataSource(Protocol):
    """What is used of slime's data source."""

    def get_samples(self, num_samples: int) -> list[list[Any]]: ...


class _Bound:
    """The backend of this process, and the tokenizer of its model."""

    def __init__(self, backend: RolloutBackend, tokenizer: Any, run: str, archive: Path | None) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self.run = run
        self.ledger = TrainerLedger(backend, run, archive=archive, extras={"trainer": "slime"})
        self._evaluations: Counter[str] = Counter()

    def evaluation(self, request: str) -> str:
        """The name of its cohort, another one each time."""
        self._evaluations[request] += 1
        return f"{self.run}/eval/{request}.{self._evaluations[request]}"


_bound: _Bound | None = None


def use_backend(
    backend: RolloutBackend, tokenizer: Any, *, run: str = "slime", archive: Path | None = None
) -> TrainerLedger:
    """Say which backend this process's rollout functions use. Call it before slime calls them.

    Args:
        tokenizer: slime's, or any with `encode(text, add_special_tokens=)`, `decode(ids)`.
        run, archive: of the `TrainerLedger`.

    Returns:
        The ledger: `restore` it from slime's checkpoint before the first rollout, and `commit` it with each new one.
    """
    global _bound
    _bound = _Bound(backend, tokenizer, run, archive)
    return _bound.ledger


def _binding() -> _Bound:
    if _bound is None:
        raise BadInput(
            problem(
                "no rollout backend was given to this process",
                consequence="Nothing was sampled",
                remedy="Call rollout_wal.trainers.slime.use_backend(backend, tokenizer) first",
            )
        )
    return _bound


# -- the whole rollout function ---------------------------------------------------------------------------------------


def generate_rollout(args: Any, rollout_id: int, data_source: DataSource, evaluation: bool = False) -> list[list[Any]]:
    """slime's `--rollout-function-path`: the groups of rollout `rollout_id`, sampled, with their rewards.

    `rollout_batch_size` groups are taken from the data source and all of them are trained on: nothing is sampled beyond
    and nothing is dropped for being late, so the batch is what was submitted. Asked for again after a restart, with the
    data source back at its checkpoint, it is the same batch under the same ids.

    Returns:
        Groups of slime's own samples, filled in. slime takes a plain list of groups as its legacy form of the output.

    `--rollout-sample-filter-path` and `--rollout-all-samples-process-path` are called as slime's own function calls
    them: the first marks samples in place, the second sees them.

    Raises:
        BadInput: evaluation (set `--eval-function-path`), images, a dynamic filter or partial rollouts: the latter drop
            or cut rollouts by when they finished. top-p below 1 where slime replays it.
        CohortMismatch: the data source gave other prompts for this `rollout_id` than before.
    """
    if evaluation:
        raise _refused("evaluation", "pass --eval-function-path with slime's own, and --custom-generate-function-path")
    for name, why in (
        ("dynamic_sampling_filter_path", "it drops groups and samples others until enough have passed"),
        ("partial_rollout", "rollouts here are never cut at the end of a step; they go on"),
    ):
        if getattr(args, name, None):
            raise _refused(name, why)
    bound = _binding()
    groups = data_source.get_samples(int(args.rollout_batch_size))
    _check_replay(groups[0][0], float(args.rollout_top_p))
    prompts = [_prompt(bound, group[0]) for group in groups]
    sizes = {len(group) for group in groups}
    if len(sizes) != 1 or any(_prompt(bound, s) != prompts[g] for g, group in enumerate(groups) for s in group):
        raise _refused("groups of unequal sizes or prompts", "a cohort is so many samples of each of its prompts")
    rollouts = bound.ledger.generate(
        int(rollout_id),
        prompts,
        sampling(_defaults(args)),
        group_size=sizes.pop(),
        seed=int(getattr(args, "rollout_seed", 0) or 0) + int(rollout_id),
        metadata=[{"rollout_id": int(rollout_id), "group_index": group[0].group_index} for group in groups],
    )
    samples = [sample for group in groups for sample in group]
    for sample, rollout in zip(samples, rollouts, strict=True):
        fill(sample, rollout, bound.tokenizer)
    asyncio.run(slime_rewards.reward(args, groups))
    if getattr(args, "rollout_sample_filter_path", None):
        slime_rewards.load(args.rollout_sample_filter_path)(args, groups)
    if getattr(args, "rollout_all_samples_process_path", None):
        slime_rewards.load(args.rollout_all_samples_process_path)(args, groups, data_source)
    rewards = {
        r.id: slime_rewards.number(args, s.reward) for s, r in zip(samples, rollouts, strict=True) if r.censored is None
    }
    verifier = str(getattr(args, "custom_rm_path", None) or f"slime rm_hub {getattr(args, 'rm_type', '')}".strip())
    facts = {
        r.id: Facts(
            verifier, left_out=left_out(r.output.sampled_T, np.array(s.loss_mask, bool) & (not s.remove_sample))
        )
        for s, r in zip(samples, rollouts, strict=True)
    }
    # slime trains on rollout n in its step n, both counted from 0.
    bound.ledger.used(int(rollout_id), int(rollout_id) + 1, rewards, facts)
    return groups


def ledger_state(rollout_id: int) -> dict[str, Any]:
    """What slime's checkpoint of rollout `rollout_id` must hold, once its step is in it; see `TrainerLedger.state`.

    slime has no hook for it among its rollout functions: its manager tells the data source to `save(rollout_id)`. So a
    data source of one's own (`--data-source-path`) is the place, as in docs/trainers.md.
    """
    return _binding().ledger.state(int(rollout_id) + 1, int(rollout_id) + 1)


# -- one sample -------------------------------------------------------------------------------------------------------


async def generate(args: Any, sample: Any, sampling_params: Mapping[str, Any], evaluation: bool = False) -> Any:
    """slime's `--custom-generate-function-path`: fill one sample in. slime computes its reward.

    slime names a sample by its `index`, which goes on counting with its data source. The cohort is named by it and by
    the contents of the request, so that a request that is repeated after a restart finds its rollout. slime aborts
    what it has no use for any more by cancelling this: the rollout goes on in the backend, and waits for its sample
    until `let_go`.

    Evaluations count their indices from 0 each time. So their cohorts are named by the policy version and by how often
    the same was asked for under it, and are let go as they are delivered.
    """
    bound = _binding()
    prompt = _prompt(bound, sample)
    params = sampling(sampling_params)
    if not evaluation:
        _check_replay(sample, params.top_p)
    seed = int(getattr(args, "rollout_seed", 0) or 0)
    packed: bytes = msgpack.packb([prompt, params.to_dict(), seed])
    of_request = f"{sample.index}/{hashlib.sha256(packed).hexdigest()[:16]}"

    async def rollout_of(cohort: str) -> FinishedRollout | None:
        found = bound.backend.generate_async(
            [prompt],
            params,
            seed=(seed << 32) + int(sample.index or 0),
            cohort=cohort,
            metadata=[{"index": sample.index, "group_index": sample.group_index}],
        )
        async for rollout in found:
            return rollout
        return None

    if evaluation:
        while True:
            name = bound.evaluation(f"v{bound.backend.policy_version}/{of_request}")
            if (rollout := await rollout_of(name)) is not None:  # else it was let go before a restart
                await asyncio.to_thread(bound.backend.release, [rollout.id])
                return fill(sample, rollout, bound.tokenizer)
    if (rollout := await rollout_of(f"{bound.run}/sample/{of_request}")) is not None:
        return fill(sample, rollout, bound.tokenizer)
    raise BadInput(
        problem(
            f"the rollout of sample {sample.index} was consumed or released before",
            consequence="Nothing was sampled",
            remedy="Start from the newest checkpoint, or give the run another name",
        )
    )


def let_go(below: int) -> None:
    """The rollouts of all samples with an `index` below this are over: those of `generate`, not of `generate_rollout`.

    Call it when a checkpoint of slime is durable, with the `sample_index` of the data source in it: the source goes on
    from there, so nobody asks for a sample below it again. Without it the log keeps them all. They are not archived,
    for nobody says which of them slime trained on.
    """
    bound = _binding()
    prefix = f"{bound.run}/sample/"
    for name, count in bound.backend.cohorts().items():
        index = name.removeprefix(prefix).split("/")[0]
        if name.startswith(prefix) and index.isdecimal() and int(index) < below and count.gone < count.size:
            abandon(bound.backend, name)  # slime has cancelled what is still in flight


def fill(sample: Any, rollout: FinishedRollout, tokenizer: Any) -> Any:
    """Put a rollout into slime's sample, and return that.

    `tokens` become prompt and response; `loss_mask` is 1 where a token was sampled and its log-probability is known;
    `rollout_log_probs` are those of the sampling distribution, and 0.0 under mask 0, as slime has it for tokens of the
    environment. `weight_versions` has one entry for each run of tokens under one policy version, as slime has one for
    each request. A censored rollout is ABORTED, its mask is 0 throughout, and `remove_sample` is set.
    """
    output, censored = rollout.output, rollout.censored is not None
    used = output.sampled_T & output.sampling_logprob.valid_T & (not censored)
    versions = [int(v) for v in output.version_T[output.sampled_T]]
    sample.tokens = [*rollout.prompt.tolist(), *output.token_T.tolist()]
    sample.response = tokenizer.decode(output.token_T.tolist())
    sample.response_length = len(output)
    sample.loss_mask = used.astype(int).tolist()
    sample.rollout_log_probs = np.where(used, output.sampling_logprob.value_T, 0.0).astype(float).tolist()
    sample.weight_versions = [str(v) for i, v in enumerate(versions) if i == 0 or versions[i - 1] != v]
    sample.remove_sample = bool(censored or getattr(sample, "remove_sample", False))
    status = type(sample.status)
    if censored:
        sample.status = status.ABORTED
    elif rollout.finish_reason in _TRUNCATED:
        sample.status = status.TRUNCATED
    else:
        sample.status = status.COMPLETED
    sample.metadata = dict(sample.metadata or {}) | {
        METADATA: {
            "rollout": rollout.id,
            "key": rollout.key,
            "policy_versions": output.turn_version_T.tolist(),
            "interruptions": rollout.interruptions,
            "censored": rollout.censored,
        }
    }
    return sample


def sampling(params: Mapping[str, Any]) -> SamplingParams:
    """slime's sampling parameters (those of SGLang) as this project's.

    Raises:
        BadSampling: one that is not known here and would change what is drawn.
    """
    raw = {k: v for k, v in params.items() if k not in _DROPPED and v is not None}
    out: dict[str, Any] = {"max_tokens": int(raw.pop("max_new_tokens"))}
    out["top_k"] = max(0, int(raw.pop("top_k", -1)))
    for theirs, ours in (("min_new_tokens", "min_tokens"), ("stop_token_ids", "stop_token_ids")):
        if theirs in raw:
            out[ours] = raw.pop(theirs)
    stop = raw.pop("stop", ())
    out["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    raw.pop("sampling_seed", None)  # every rollout has a seed of its own
    return SamplingParams.from_dict({**raw, **out})


def _defaults(args: Any) -> dict[str, Any]:
    """The sampling parameters that slime would pass for training."""
    return {
        "temperature": args.rollout_temperature,
        "top_p": args.rollout_top_p,
        "top_k": args.rollout_top_k,
        "max_new_tokens": args.rollout_max_response_len,
        "stop": getattr(args, "rollout_stop", None),
        "stop_token_ids": getattr(args, "rollout_stop_token_ids", None),
    }


def _prompt(bound: _Bound, sample: Any) -> list[int]:
    """Token ids. slime renders the chat template in its data source, so a prompt is text, unless it is not set to."""
    images = getattr(sample, "multimodal_inputs", None) or {}
    if any(value is not None for value in images.values()):
        raise _refused("images in the prompts", "the backend samples text only")
    if sample.tokens and not sample.response_length:
        ids = sample.tokens  # a data source that has tokenized it
    elif isinstance(sample.prompt, str):
        ids = bound.tokenizer.encode(sample.prompt, add_special_tokens=False)
    else:
        ids = bound.tokenizer.apply_chat_template(
            list(sample.prompt), tokenize=True, add_generation_prompt=True, return_dict=False
        )
    return [int(i) for i in ids]


def _check_replay(sample: Any, top_p: float) -> None:
    """Newer versions of slime train under top-p with the candidates that SGLang drew each token from."""
    if top_p != 1.0 and hasattr(sample, "rollout_top_p_token_ids"):
        raise _refused(f"top-p {top_p} with slime's replay of it", "the candidates of a token are not logged")


def _refused(what: str, why: str) -> BadInput:
    return BadInput(
        problem(
            f"{what} and a rollout backend do not go together: {why}",
            consequence="Nothing was sampled",
            remedy="Leave it out, or use what is named",
        )
    )
