"""Rollouts that call tools: each has a directory of its own, every command is logged, and runs once.

    python examples/tool_rollouts.py runs/tools
    python examples/tool_rollouts.py runs/tools --model models/small --prompt "Count the files in /usr/bin."

Without a model, a tiny random one is made, which cannot write JSON: there, each of some tokens counts as a call.
Kill it at any time and start it again: the same rollouts go on, no command runs twice. Commands run as you, without
isolation: see `BubblewrapSandbox` for those of a model that you do not trust.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from rollout_wal.backend import RolloutBackend
from rollout_wal.delivery import seal
from rollout_wal.episode import Episodes, ToolCall, ToolCallParser, ToolResult
from rollout_wal.params import SamplingParams
from rollout_wal.testing.tiny_models import make_tiny_model
from rollout_wal.tool_calls import TaggedToolCalls
from sandbox_log.backends.local import LocalSandbox
from sandbox_log.live import StateChoice
from sandbox_log.log import SandboxLog
from sandbox_log.tools import SandboxTools, shell_tools


class NoteParser:
    """What a parser is, at its least: a turn that ends with one of some tokens writes its length into a file."""

    name = "notes/1"
    stop: tuple[str, ...] = ()

    def __init__(self, model: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.stop_token_ids = tuple(range(64, 90))

    def calls(self, token_T: NDArray[np.int32]) -> Sequence[ToolCall]:
        if not len(token_T) or int(token_T[-1]) not in self.stop_token_ids:
            return ()
        last = len(token_T) - 1, len(token_T)
        return [ToolCall("exec", {"command": f"echo {len(token_T)} >>notes; wc -l <notes"}, span=last)]

    def observe(self, results: Sequence[ToolResult]) -> NDArray[np.int32]:
        text = "".join(result.text for result in results)
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path, help="where everything is kept")
    arguments.add_argument("--model", type=Path)
    arguments.add_argument("--prompt", default="Call a tool.")
    arguments.add_argument("--group", type=int, default=4)
    arguments.add_argument("--max-tokens", type=int, default=60)
    given = arguments.parse_args(argv)
    folder: Path = given.folder
    model: Path = given.model or make_tiny_model(folder / "model", mean_length=60.0)
    parser: ToolCallParser = TaggedToolCalls(model) if given.model else NoteParser(model)
    prompt = Tokenizer.from_file(str(model / "tokenizer.json")).encode(given.prompt).ids

    async def make_sandbox(rollout_id: str, metadata: Mapping[str, Any]) -> LocalSandbox:
        return LocalSandbox(folder / "boxes" / f"{metadata['task']}-{rollout_id}")

    with SandboxLog(folder / "sandboxes") as log:
        tools = SandboxTools(log, make_sandbox, shell_tools(), state=StateChoice.REATTACH)
        episodes = Episodes(tools, parser, turns_max=8)
        sampling = SamplingParams(max_tokens=given.max_tokens)
        with RolloutBackend(model, folder / "wal", segment_bytes=1 << 20, episodes=episodes) as backend:
            rollouts = backend.generate(
                [prompt], sampling, group_size=given.group, cohort="step-0", metadata=[{"task": "notes"}]
            )

            def shown() -> Any:
                for r in rollouts:
                    ended = r.censored or r.finish_reason.name
                    print(f"{r.key}: {r.turns} turns, {len(r.tokens)} tokens, {ended}, sandbox {r.episode or 'none'}")
                    yield r

            done = seal(backend, shown(), folder / "data", sampling)
            print(f"{done.rollouts} rollouts, {backend.stats.tool_calls} calls")


if __name__ == "__main__":
    main()
