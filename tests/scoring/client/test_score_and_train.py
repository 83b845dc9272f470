"""The whole way, as the example goes it: generate, seal, score with two teachers, load, loss, backward."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rollout_wal.dataset import open_dataset

EXAMPLE = Path(__file__).parents[3] / "examples" / "score_and_train.py"


def test_the_example_trains_on_scores_that_are_the_teachers_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("score_and_train", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    divergences = example.main(tmp_path)
    assert len(divergences) > 1
    assert all(0 < kl < 20 for kl in divergences)
    assert "36 scored now, 0 before" in capsys.readouterr().out
    dataset = open_dataset(tmp_path / "data")
    rows = dataset.metadata().to_pylist()
    assert len(rows) == 24
    for name in example.TEACHERS:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / name, dtype=torch.float32)
        for row in rows[:8]:
            found, tokens = dataset.payload(row["sample"], f"teacher.{name}"), dataset.payload(row["sample"])
            assert (found is None) == (name not in row["teachers"])
            if found is None or tokens is None:
                continue
            ids = torch.from_numpy(tokens.array("token_ids").astype(np.int64))
            with torch.inference_mode():
                logprobs = torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), -1)
            at = np.flatnonzero(tokens.array("loss_mask"))
            expected = logprobs[at - 1, ids[at]].numpy()
            np.testing.assert_allclose(found["logprobs"].values[at], expected, atol=1e-5)  # type: ignore[union-attr]
    routed = {(row["domain"], row["router_id"], tuple(row["teachers"])) for row in rows}
    assert routed == {("math", "domain", ("sums",)), ("chat", "domain", ("words", "sums"))}
    assert json.loads(rows[0]["extras"])["routes"]

    example.main(tmp_path)  # as after a crash: nothing is generated or scored twice
    assert "0 scored now, 36 before" in capsys.readouterr().out
    assert open_dataset(tmp_path / "data").num_samples == 24
