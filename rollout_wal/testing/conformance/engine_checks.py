"""What any `Engine` owes. Each check takes an engine that runs nothing, and leaves it that way.

They raise ConformanceError; `engine_tests.EngineConformance` makes pytest tests of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ...engines.base import Engine, FinishReason, Request
from ...errors import BadInput, BadPrompt, RolloutWalError
from ...params import SamplingParams
from .driving import Output, advance, cut, drive, emptied, request
from .settings import Conformance, ConformanceError, close_logprobs, require, same_tokens, valid_logprobs

#: Ways to draw that a resume must not change: each depends on what came before in a way of its own.
SAMPLINGS: dict[str, dict[str, float | int]] = {
    "plain": {},
    "filters": {"temperature": 1.1, "top_p": 0.95, "top_k": 50, "min_p": 0.01},
    "greedy": {"temperature": 0.0},
    "repetition": {"repetition_penalty": 1.3},
    "presence": {"presence_penalty": 0.8, "frequency_penalty": 0.4},
    "min_tokens": {"min_tokens": 12},
}


def sampling_named(name: str, settings: Conformance) -> SamplingParams:
    """One of SAMPLINGS, at the length of the settings."""
    length = settings.max_tokens
    options = dict(SAMPLINGS[name])
    options["min_tokens"] = min(int(options.get("min_tokens", 0)), length)
    return SamplingParams(max_tokens=length, ignore_eos=name != "min_tokens", **options)  # type: ignore[arg-type]


def resume_equals_uninterrupted(engine: Engine, settings: Conformance, sampling: SamplingParams) -> None:
    """Cut anywhere and resumed from its tokens, a rollout goes on as if nothing had happened: the same tokens, the
    same logprobs, the same end. It is the promise that all others rest on."""
    with emptied(engine):
        wholes = [request(i, p, sampling, noise_key=1000 + i) for i, p in enumerate(settings.prompts)]
        outputs = drive(engine, wholes)
        got, expected = [], []
        for whole in wholes:
            out = outputs[whole.slot]
            for at in settings.cuts(len(out.tokens)):
                slot = at % 64
                rest = drive(engine, [cut(whole, out.tokens, at, slot)])[slot]
                got.append(rest.tokens)
                expected.append(out.tokens[at:])
                if rest.tokens == out.tokens[at:]:
                    what = f"prompt {whole.slot} resumed at token {at}"
                    close_logprobs(rest.logprobs, out.logprobs[at:], settings, what)
                    close_logprobs(rest.sampling_logprobs, out.sampling_logprobs[at:], settings, what + " (sampling)")
                    require(rest.finish is out.finish, f"{what}: ended as {rest.finish.name}, not {out.finish.name}")
        same_tokens(got, expected, settings, "resumed rollouts")


def resumed_in_company(engine: Engine, settings: Conformance) -> None:
    """Resumed together at different places, while others begin: the batch is another, the tokens are the same."""
    sampling = sampling_named("plain", settings)
    with emptied(engine):
        whole = request(0, settings.prompts[0], sampling, noise_key=77)
        out = drive(engine, [whole])[0]
        cuts = settings.cuts(len(out.tokens))
        others = [request(32 + i, p, sampling, noise_key=500 + i) for i, p in enumerate(settings.prompts)]
        resumed = [cut(whole, out.tokens, at, slot) for slot, at in enumerate(cuts)]
        together = drive(engine, [*resumed, *others])
        got = [together[slot].tokens for slot in range(len(cuts))]
        same_tokens(got, [out.tokens[at:] for at in cuts], settings, "rollouts resumed together")


def logprobs_are_the_models(engine: Engine, settings: Conformance) -> None:
    """`logprob` is the model's own; `sampling_logprob` that of the law drawn from: equal if nothing changes the law,
    0 if the draw is certain, and under filters never below."""
    with emptied(engine):
        for name in ("plain", "greedy", "filters"):
            sampling = sampling_named(name, settings)
            if name == "filters":
                sampling = SamplingParams(max_tokens=sampling.max_tokens, ignore_eos=True, top_k=20)
            out = drive(engine, [request(0, settings.prompts[0], sampling, noise_key=3)])[0]
            own, drawn = np.asarray(out.logprobs), np.asarray(out.sampling_logprobs)
            valid_logprobs(own, settings, f"{name}: logprob")
            valid_logprobs(drawn, settings, f"{name}: sampling_logprob")
            if name == "plain":
                close_logprobs(drawn, own, settings, "sampling_logprob at temperature 1 without filters")
            elif name == "greedy":
                close_logprobs(drawn, np.zeros(len(own)), settings, "sampling_logprob at temperature 0")
            else:
                bad = np.flatnonzero(drawn < own - settings.logprob_atol)
                require(not len(bad), f"a filter made the drawn token less likely, at tokens {bad.tolist()}")
            require(float(np.ptp(own)) > settings.logprob_atol, f"{name}: all logprobs are {own[0]}: none was computed")


def noise_is_the_keys(engine: Engine, settings: Conformance) -> None:
    """The same key, the same rollout; another key, another. A key is the seed of one rollout and of no other."""
    sampling, prompt = sampling_named("plain", settings), settings.prompts[0]
    with emptied(engine):
        keys = (11, 11, 12, 11 + (1 << 63))
        outputs = drive(engine, [request(i, prompt, sampling, noise_key=k) for i, k in enumerate(keys)])
        same_tokens([outputs[1].tokens], [outputs[0].tokens], settings, "the same key twice")
        for slot in (2, 3):
            different = outputs[slot].tokens != outputs[0].tokens
            require(different, f"noise keys {keys[0]} and {keys[slot]} gave the same {settings.max_tokens} tokens")


def finish_predicate(engine: Engine, settings: Conformance) -> None:
    """Limits count what was sampled, over all attempts; observed tokens count for nothing and end nothing."""
    prompt, info = settings.prompts[0], engine.info
    six = SamplingParams(max_tokens=6, ignore_eos=True)
    with emptied(engine):
        mixed = request(0, prompt, six, prefix=[9, 10, 11, 12], prefix_sampled=[True, False, False, True])
        out = drive(engine, [mixed])[0]
        require(
            (len(out.tokens), out.finish) == (4, FinishReason.MAX_TOKENS),
            f"max_tokens=6 after 2 sampled and 2 observed tokens: {len(out.tokens)} more ({out.finish.name}), not 4",
        )
        free = drive(engine, [request(0, prompt, sampling_named("plain", settings), noise_key=5)])[0].tokens
        stop = free[len(free) // 2]
        first = free.index(stop)
        stopping = SamplingParams(max_tokens=settings.max_tokens, ignore_eos=True, stop_token_ids=(stop,))
        for at in sorted({0, first // 2, first}):
            whole = request(0, prompt, stopping, noise_key=5)
            out = drive(engine, [cut(whole, free, at, 0)])[0]
            require(
                out.finish is FinishReason.STOP_TOKEN and out.tokens == free[at : first + 1],
                f"stop token {stop}, resumed at {at}: ended after {len(out.tokens)} tokens as {out.finish.name}, "
                f"not after {first + 1 - at} as STOP_TOKEN",
            )
        over = [([9, stop], stopping), ([9, 10], SamplingParams(max_tokens=2))]
        if info.eos_token_ids:
            over.append(([9, info.eos_token_ids[0]], SamplingParams(max_tokens=settings.max_tokens)))
        for prefix, sampling in over:
            _refused(
                engine, request(0, prompt, sampling, prefix=prefix), f"the prefix {prefix}, which ends the rollout,"
            )
        if info.eos_token_ids:
            observed = request(
                0, prompt, SamplingParams(max_tokens=3), prefix=[9, info.eos_token_ids[0]], prefix_sampled=[True, False]
            )
            require(len(drive(engine, [observed])[0].tokens) > 0, "an observed end of sequence ended the rollout")


def minimum_holds_over_resumes(engine: Engine, settings: Conformance) -> None:
    """min_tokens counts over all attempts: what the engine would do uninterrupted is what it does resumed."""
    sampling = SamplingParams(max_tokens=settings.max_tokens, min_tokens=settings.max_tokens // 2)
    eos = set(engine.info.eos_token_ids)
    with emptied(engine):
        wholes = [request(i, settings.prompts[0], sampling, noise_key=40 + i) for i in range(16)]
        outputs = drive(engine, wholes)
        for whole in wholes:
            tokens = outputs[whole.slot].tokens
            early = [t for t in tokens[: sampling.min_tokens - 1] if t in eos]
            require(not early, f"an end of sequence before min_tokens={sampling.min_tokens}: {tokens}")
        resumed = [cut(w, outputs[w.slot].tokens, len(outputs[w.slot].tokens) // 3, w.slot) for w in wholes]
        again = drive(engine, resumed)
        same_tokens(
            [again[w.slot].tokens for w in wholes],
            [outputs[w.slot].tokens[len(outputs[w.slot].tokens) // 3 :] for w in wholes],
            settings,
            "rollouts with min_tokens, resumed before it",
        )


def abort_frees_and_spares(engine: Engine, settings: Conformance) -> None:
    """Aborted between steps, a slot is free at once, and its neighbours notice nothing."""
    sampling = sampling_named("plain", settings)
    with emptied(engine):
        wanted = drive(engine, [request(1, settings.prompts[1], sampling, noise_key=2)])[1].tokens
        outputs: dict[int, Output] = {0: Output(), 1: Output()}
        engine.add(request(0, settings.prompts[0], sampling, noise_key=1))
        engine.add(request(1, settings.prompts[1], sampling, noise_key=2))
        advance(engine, outputs, steps=3)
        before = engine.unfinished
        engine.abort(0)
        require(
            engine.unfinished == before - 1,
            f"abort left {engine.unfinished} of {before} requests unfinished, not one less",
        )
        engine.abort(0)
        engine.abort(60000)
        fresh = request(0, settings.prompts[0], SamplingParams(max_tokens=3, ignore_eos=True), noise_key=9)
        outputs[0] = Output()
        engine.add(fresh)
        advance(engine, outputs)
        require(
            len(outputs[0].tokens) == 3, f"a slot used again after abort gave {len(outputs[0].tokens)} tokens, not 3"
        )
        same_tokens([outputs[1].tokens], [wanted], settings, "the neighbour of an aborted request")


def slots_are_the_callers(engine: Engine, settings: Conformance) -> None:
    """Any 16-bit slot, refused while in use, free as soon as the step that finished it returns."""
    two = SamplingParams(max_tokens=2, ignore_eos=True)
    with emptied(engine, range(1)):
        try:
            out = drive(engine, [request(65535, settings.prompts[0], two)])
            require(len(out[65535].tokens) == 2, "slot 65535 was not run to its end")
            engine.add(request(0, settings.prompts[0], two))
            _refused(engine, request(0, settings.prompts[1], two), "a slot that is in use")
            outputs = {0: Output()}
            advance(engine, outputs)
            require(len(outputs[0].tokens) == 2, "a refused request disturbed the one in its slot")
            require(
                len(drive(engine, [request(0, settings.prompts[1], two)])[0].tokens) == 2, "a finished slot is not free"
            )
        finally:
            engine.abort(65535)


def bad_prompts_are_refused(engine: Engine, settings: Conformance) -> None:
    """And change nothing."""
    one = SamplingParams(max_tokens=2, ignore_eos=True)
    for bad in ([], [5, engine.info.vocab_size], [-1]):
        _refused(engine, request(0, bad, one), f"the prompt {bad}", BadPrompt)
    require(engine.unfinished == 0, f"{engine.unfinished} requests are unfinished after nothing but refusals")


def weights_update(engine: Engine, settings: Conformance, original: Path) -> None:
    """Replaced between steps: tokens stay, and the next one is what the new weights say about all of them.

    `original` is loaded again afterwards.
    """
    if settings.other_weights is None:
        raise ValueError("the check of a weights update needs Conformance.other_weights")
    version, digest = engine.policy_version, engine.info.weights_digest
    sampling = sampling_named("plain", settings)
    wholes = [request(i, p, sampling, noise_key=900 + i) for i, p in enumerate(settings.prompts)]
    with emptied(engine):
        try:
            outputs = drive(engine, wholes, steps=settings.max_tokens // 3)
            before = {slot: list(out.tokens) for slot, out in outputs.items()}
            engine.load_weights(Path(settings.other_weights), version + 1)
            require(
                engine.policy_version == version + 1,
                f"policy_version is {engine.policy_version} after an update to {version + 1}",
            )
            require(engine.info.weights_digest != digest, "other weights have the same weights_digest")
            advance(engine, outputs)
            kept = all(outputs[s].tokens[: len(b)] == b for s, b in before.items())
            require(kept, "an update changed tokens that had been sampled before it")
            # A rollout that begins now has no old KV: it is what the others must be like.
            fresh = drive(engine, [cut(w, before[w.slot], len(before[w.slot]), w.slot) for w in wholes])
            same_tokens(
                [outputs[w.slot].tokens[len(before[w.slot]) :] for w in wholes],
                [fresh[w.slot].tokens for w in wholes],
                settings,
                "rollouts that were running during a weights update",
            )
        finally:
            engine.load_weights(original, version + 2)
        require(engine.info.weights_digest == digest, "the first weights, loaded again, have another weights_digest")


def _refused(
    engine: Engine,
    bad: Request,
    what: str,
    error: type[RolloutWalError] | tuple[type[RolloutWalError], ...] = (BadInput, BadPrompt),
) -> None:
    before = engine.unfinished
    try:
        engine.add(bad)
    except error:
        require(
            engine.unfinished == before, f"{what} was refused, but {engine.unfinished - before} requests were added"
        )
        return
    engine.abort(bad.slot)
    raise ConformanceError(f"{what} was accepted")


Check = Callable[[Engine, Conformance], None]

#: The checks that need nothing but an engine.
CHECKS: tuple[Check, ...] = (
    resumed_in_company,
    logprobs_are_the_models,
    noise_is_the_keys,
    finish_predicate,
    minimum_holds_over_resumes,
    abort_frees_and_spares,
    slots_are_the_callers,
    bad_prompts_are_refused,
)
