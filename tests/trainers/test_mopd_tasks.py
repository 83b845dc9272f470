"""Problems, their split and verifier; models, checkpoints and kill schedules of the distillation demo."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from rollout_wal.trainers.ledger import write_state
from rollout_wal.trainers.mopd import results
from rollout_wal.trainers.mopd.advantages import ADVANTAGE_MAX, weigh
from rollout_wal.trainers.mopd.checkpoint import drop_older, last_checkpoint, load_checkpoint, save_checkpoint
from rollout_wal.trainers.mopd.config import Job, StudentConfig
from rollout_wal.trainers.mopd.kills import draw_kills
from rollout_wal.trainers.mopd.models import MAX_ANSWER_TOKENS, accuracy, decode, encode, make_model, teach
from rollout_wal.trainers.mopd.tasks import DOMAINS, Domain, Problem, problems, reward


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_verifier_takes_the_answer_and_nothing_else(domain: Domain) -> None:
    for problem in islice(problems(domain, "train"), 200):
        assert reward(problem, problem.answer) == 1.0
        assert len(problem.answer) + 1 <= MAX_ANSWER_TOKENS
        for wrong in ("", problem.answer + "1", problem.answer[:-1], "?", problem.answer[:-1] + "?"):
            assert reward(problem, wrong) == 0.0


def test_answers_are_right_by_our_own_arithmetic() -> None:
    for p in islice(problems("addition", "train"), 200):
        a, first, b, second, c = p.prompt[:-1]
        signs = {"+": 1, "-": -1}
        assert int(p.answer) == int(a) + signs[first] * int(b) + signs[second] * int(c)
    for p in islice(problems("sorting", "train"), 200):
        assert p.answer == "".join(sorted(p.prompt[:-1], reverse=p.prompt[-1] == ">"))


def test_a_number_that_is_off_by_one_is_wrong_though_reasoning_gym_would_take_it() -> None:
    problem = next(p for p in problems("sorting", "train") if p.answer[0] == "2" and p.answer[-1] > "2")
    assert reward(problem, "1" + problem.answer[1:]) == 0.0


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_splits_share_no_prompt_and_numbers_are_stable(domain: Domain) -> None:
    train = [p.prompt for p in islice(problems(domain, "train"), 800)]
    held = [p.prompt for p in islice(problems(domain, "held_out"), 100)]
    assert not set(train) & set(held)
    assert train == [p.prompt for p in islice(problems(domain, "train"), 800)]
    assert [p.prompt for p in islice(problems(domain, "train", start=500), 50)] != train[:50]


def test_characters_go_there_and_back() -> None:
    text = "0123456789+-=<>"
    assert decode([*encode(text), 1, 5, 5]) == text
    assert decode([0, 31]) == "??"


def test_greedy_accuracy_agrees_with_decoding_one_by_one() -> None:
    """Taught on eight problems only, the model knows them; its accuracy elsewhere is measured the slow way too."""
    torch.set_num_threads(1)
    known = list(islice(problems("sorting", "train"), 8))
    model = make_model(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(torch.equal(value, make_model(3).state_dict()[name]) for name, value in before.items())
    teach(model, lambda _: known, 60)
    asked = known + list(islice(problems("sorting", "held_out"), 24))
    assert accuracy(model, known) == 1.0
    solved = sum(_alone(model, problem) for problem in asked)
    assert accuracy(model, asked) == pytest.approx(solved / len(asked))


@torch.no_grad()
def _alone(model: torch.nn.Module, problem: Problem) -> float:
    ids = encode(problem.prompt)
    for _ in range(MAX_ANSWER_TOKENS):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 1:
            return reward(problem, decode(ids[len(problem.prompt) :]))
    return 0.0


def test_a_checkpoint_gives_back_weights_moments_and_state_and_half_of_one_is_passed_over(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    first = save_checkpoint(tmp_path, model, optimizer, {"batches": 2, "step": 3})
    second = save_checkpoint(tmp_path, model, optimizer, {"batches": 10, "step": 30})
    (tmp_path / "000011").mkdir()  # cut short: no ledger state in it
    assert last_checkpoint(tmp_path) == second
    drop_older(tmp_path, second)
    assert not first.exists()
    other = torch.nn.Linear(3, 2)
    resumed = torch.optim.AdamW(other.parameters(), lr=0.1)
    assert load_checkpoint(second, other, resumed) == {"batches": 10, "step": 30}
    for one, two in ((model, optimizer), (other, resumed)):  # one more step from each: only equal moments agree
        two.zero_grad()
        one(torch.ones(1, 3)).sum().backward()
        two.step()
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)
    write_state(tmp_path / "000012", {"batches": 12})
    assert last_checkpoint(tmp_path) == tmp_path / "000012"


def test_a_sequence_counts_up_to_its_first_rejected_token_and_places_are_compared_within_a_domain() -> None:
    """Prompts of one and two tokens; the first domain has two sequences, the second domain one."""
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    opinion = torch.tensor([[0.0, 1.0, -15.0, 2.0], [0.5, -1.0, 0.25, 0.0], [9.0, -0.5, 0.0, 0.0]])
    first = torch.tensor([[True], [True], [False]]).expand(3, 4)
    advantage, kept = weigh(opinion, mask, [first, ~first])
    assert kept.tolist() == torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]]).bool().tolist()
    # Places: 1.0 beside 0.5, -3 beside -1, 0.25 alone; the second domain's tokens are each alone.
    assert advantage[kept].tolist() == [0.25, -1.0, -0.25, 1.0, 0.0, 0.0, 0.0]
    assert float(weigh(opinion[2:], mask[2:], [])[0][0, 0]) == ADVANTAGE_MAX


def test_kills_follow_from_the_seed_and_the_unkilled_arm_has_none() -> None:
    config = StudentConfig(batches=20, trainer_kills=4, server_kills=3)
    kills = draw_kills(config)
    assert kills == draw_kills(config)
    assert kills != draw_kills(replace(config, seed=1))
    assert [k.victim for k in kills].count("trainer") == 4
    assert [k.victim for k in kills].count("server") == 3
    assert all(0 <= k.batch < 19 and 0 <= k.share < 1 for k in kills)
    assert draw_kills(replace(config, arm="unkilled")) == []
    assert draw_kills(replace(config, arm="restart")) == kills


def test_a_job_survives_its_way_through_json(tmp_path: Path) -> None:
    job = Job(StudentConfig(objective="full_vocabulary", seed=4), tmp_path, tmp_path / "m", "127.0.0.1:1", 2)
    assert Job.from_json(job.to_json()) == job


def test_time_lost_is_what_a_gap_with_a_kill_takes_beyond_the_usual() -> None:
    """Batches every second; a kill at 2.5 s costs until the first batch that had not been there before."""
    times = [(0, 0.0, 0), (1, 1.0, 0), (2, 2.0, 0), (1, 6.0, 1), (2, 7.0, 1), (3, 8.0, 1), (4, 9.0, 1), (5, 10.0, 1)]
    lines = [{"batch": n, "time": t, "life": life, "worker_deaths": 2} for n, t, life in times]
    events = [
        {"event": "start", "who": "trainer", "time": -1.0},
        {"event": "kill", "who": "trainer", "time": 2.5},
        {"event": "kill", "who": "server", "time": 2.6},
    ]
    run = results.Run(StudentConfig(), lines[:1], events, lines, {})
    assert run.lost == [{"batch": 3, "who": ["trainer", "server"], "seconds": 5.0}]
    assert run.worker_deaths == 4
    assert run.seconds == 11.0
    assert run.kills("trainer") == 1


def test_lines_that_a_crash_cut_short_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text(json.dumps({"a": 1}) + "\n" + '{"b":')
    assert results.read_lines(path) == [{"a": 1}]
    assert results.read_lines(tmp_path / "absent") == []
