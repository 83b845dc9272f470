"""TRL's DistillationTrainer on the rollouts of a backend, with teachers behind a scoring service.

The teachers read what the student sampled and answer with log-probabilities or with hidden states; the student learns
from either by an objective of `scoring.losses`. Many teachers may take part, each sample has one.

Shape legend: B = completions of a micro-batch, C = completion tokens (padded), H = a teacher's hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import trl
from numpy.typing import NDArray

from ...backend import FinishedRollout, RolloutBackend
from ...dataset import Provenance
from ...errors import BadInput, problem
from ..facts import Facts, left_out
from ..ledger import Fork
from .arguments import check_arguments, check_student, conflict
from .common import BackendTrainer

try:
    from rollout_kernels.linear_divergence import JSD, Divergence, ForwardKL, ReverseKL
    from rollout_kernels.logprobs import logprobs_from_hidden
    from scoring.client import ScoringClient
    from scoring.items import ScoreItem, Scores, Wanted
    from scoring.losses import full_vocabulary_loss, masked_importance_loss, opd_advantages
except ImportError as error:
    from ...errors import MissingExtra

    raise MissingExtra(error.name or "grpc", "scoring", "distillation from a scoring service") from None

Objective = Literal["sampled", "full_vocabulary"]
Route = Callable[[Mapping[str, Any]], str]


class DistillationTrainer(BackendTrainer, trl.DistillationTrainer):
    """`trl.DistillationTrainer` whose completions come from a `RolloutBackend` and whose teachers answer over gRPC.

    Takes what `trl.DistillationTrainer` takes, except `teacher_model`, and

    Args:
        backend, run, archive, max_staleness, fork: as for `GRPOTrainer`.
        scorer: a client of the scoring service, entered. A checkpoint of the trainer holds which checkpoint each
            teacher had; after a restart another one's scores are refused, unless the client's own `pins` name it.
        route: from a row of the data set to the id of its teacher; None: its column `teacher`.
        objective: "sampled": on-policy distillation from the teacher's log-probability of each sampled token, weighed
            by how much more likely it has become since it was sampled; beyond a factor of two either way, by 0.
            "full_vocabulary": the exact divergence of each next token, from the teacher's hidden states and LM head:
            the reverse KL, or what TRL's `beta` says.

    Raises:
        BadInput: options that cannot be honoured together; the message says which.
    """

    def __init__(
        self,
        *args: Any,
        backend: RolloutBackend,
        scorer: ScoringClient,
        route: Route | None = None,
        objective: Objective = "sampled",
        run: str = "distillation",
        archive: str | Path | None = None,
        max_staleness: int | None = None,
        fork: Fork = False,
        **kwargs: Any,
    ) -> None:
        check_arguments(args, kwargs, refused={"teacher_model": "the teachers are behind the scoring service"})
        if objective not in get_args(Objective):
            raise BadInput(
                problem(
                    f"objective={objective!r} is not known",
                    consequence="No trainer was made",
                    remedy=f"Pass one of {list(get_args(Objective))}",
                )
            )
        super().__init__(*args, **kwargs)
        self._divergence = _divergence(objective, float(self.beta))
        check_student(self.accelerator.unwrap_model(self.model))
        self._scorer = scorer
        self._route = route or _teacher_column
        self._router = "column teacher" if route is None else getattr(route, "__qualname__", type(route).__qualname__)
        self._objective = objective
        self._teachers: list[str] = []
        self._heads: dict[str, Any] = {}
        self._last: list[FinishedRollout] = []
        # TRL drops the columns that its own `training_step` does not know; the route may need any of them.
        self.args.remove_unused_columns = False
        self._use_backend(backend, run, archive, fork, max_staleness, {"objective": objective})

    @property
    def _generate_every(self) -> int:
        return int(self.args.gradient_accumulation_steps)

    # -- generation and scores ----------------------------------------------------------------------------------------

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, has_tool_images: bool = False
    ) -> list[list[int]]:
        if images:
            raise conflict("images in the prompts", "the backend samples text only")
        self._last = self._collect(prompt_ids, 1)
        # TRL cannot hold an empty completion; nothing is learnt from what stands for one.
        return [r.tokens.tolist() or [int(self._tokenizer.pad_token_id)] for r in self._last]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """As in TRL, with the teachers' answers in further columns."""
        output = super()._generate_and_score_completions(inputs)
        teachers = [self._route(row) for row in inputs]
        scores = self._score(self._last, teachers)
        if self.model.training:
            self._facts = {
                r.id: Facts(
                    teachers=(teacher,),
                    router=self._router,
                    left_out=left_out(r.output.sampled_T, self._used(r, score)),
                )
                for r, teacher, score in zip(self._last, teachers, scores, strict=True)
            }
        output |= self._columns(output["completion_ids"], teachers, scores)
        output["num_items_in_batch"] = self.accelerator.gather(output["scored_mask"].sum()).sum()
        return dict(output)

    def _score(self, rollouts: list[FinishedRollout], teachers: list[str]) -> list[Scores | None]:
        """One answer for each rollout that may be learnt from.

        Raises:
            ScoringError: a teacher cannot answer. Nothing was trained on the batch; started again, it comes again.
        """
        wanted = Wanted(logprobs=True, hidden_states=self._objective == "full_vocabulary")
        tokenizer = self._backend.info.tokenizer_digest
        items: dict[int, ScoreItem] = {}
        for index, (rollout, teacher) in enumerate(zip(rollouts, teachers, strict=True)):
            if rollout.censored is None and len(rollout.tokens):
                token_ids = np.concatenate([rollout.prompt, rollout.tokens]).astype(np.int32)
                span = (len(rollout.prompt), len(token_ids))
                items[index] = ScoreItem(
                    token_ids,
                    span,
                    teacher=teacher,
                    temperature=float(self.temperature) or 1.0,
                    wanted=wanted,
                    expected=Provenance(teacher, tokenizer_digest=tokenizer),
                )
        found: list[Scores | None] = [None] * len(rollouts)
        order = list(items)
        for index, answer in self._scorer.score([items[i] for i in order]):
            if not isinstance(answer, Scores):
                raise answer
            found[order[index]] = answer
        return found

    def _used(self, rollout: FinishedRollout, score: Scores | None) -> NDArray[np.bool_]:
        """[T]: which tokens are learnt from."""
        output = rollout.output
        used_T = output.sampled_T & self._fresh(rollout) & (False if score is None else score.valid)
        if self._objective == "sampled":
            used_T &= output.sampling_logprob.valid_T
        return used_T

    def _columns(self, completion_ids_BC: Any, teachers: list[str], scores: list[Scores | None]) -> dict[str, Any]:
        rows, width = completion_ids_BC.shape
        mask_BC = np.zeros((rows, width), np.bool_)
        logprobs_BC = np.zeros((rows, width), np.float32)
        sampling_BC = np.zeros((rows, width), np.float32)
        widths = [0 if s is None or s.hidden_states is None else s.hidden_states.shape[1] for s in scores]
        hidden_BCH = np.zeros((rows, width, max(widths)), np.uint16)
        for row, (rollout, score) in enumerate(zip(self._last, scores, strict=True)):
            if score is None:
                continue
            length = len(rollout.tokens)
            used_T = mask_BC[row, :length] = self._used(rollout, score)
            assert score.logprobs is not None
            logprobs_BC[row, :length] = np.where(score.valid, score.logprobs, 0.0)
            sampling_BC[row, :length] = np.where(used_T, rollout.output.sampling_logprob.value_T, 0.0)
            if score.hidden_states is not None:
                hidden_BCH[row, :length, : score.hidden_states.shape[1]] = score.hidden_states
        self._teachers += sorted(set(teachers) - set(self._teachers))
        device = completion_ids_BC.device
        columns = {
            "scored_mask": torch.from_numpy(mask_BC).to(device),
            "teacher_logprobs": torch.from_numpy(logprobs_BC).to(device),
            "sampling_logprobs": torch.from_numpy(sampling_BC).to(device),
            "teacher_index": torch.tensor([self._teachers.index(t) for t in teachers], device=device),
        }
        if self._objective == "full_vocabulary":
            hidden = torch.from_numpy(hidden_BCH.view(np.int16)).view(torch.bfloat16)
            columns["teacher_hidden"] = hidden.to(device)
            columns["teacher_width"] = torch.tensor(widths, device=device)
        return columns

    # -- loss -------------------------------------------------------------------------------------------------------

    def _compute_loss(self, unwrapped_student: Any, inputs: Any, num_items_in_batch: Any) -> tuple[Any, Any, Any]:
        """(loss, sum of the student's entropies, number of tokens), as TRL's own."""
        completion_ids_BC, mask_BC = inputs["completion_ids"], inputs["scored_mask"]
        input_ids = torch.cat([inputs["prompt_ids"], completion_ids_BC], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        hidden_BCH = self._get_last_hidden_state(
            unwrapped_student, input_ids, attention_mask, completion_ids_BC.size(1)
        )
        head = unwrapped_student.get_output_embeddings().weight
        count = num_items_in_batch if num_items_in_batch is not None else mask_BC.sum().clamp(min=1)
        # In pieces: the logits of a micro-batch are never there at once. Over the whole vocabulary the loss does the
        # same by itself, and this is for the metric, without a graph.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._objective == "sampled"):
            student = logprobs_from_hidden(
                hidden_BCH[mask_BC],
                head,
                completion_ids_BC[mask_BC],
                temperature=float(self.temperature) or 1.0,
                entropy=True,
            )
        assert student.entropy is not None
        if self._objective == "sampled":
            logprobs_BC = student.logprob.new_zeros(mask_BC.shape).masked_scatter(mask_BC, student.logprob)
            advantages_BC = opd_advantages(inputs["teacher_logprobs"], logprobs_BC, mask_BC)
            # What was drawn greedily was not drawn from a distribution: there is none to correct for.
            sampling_BC = inputs["sampling_logprobs"] if self.temperature else logprobs_BC.detach()
            loss = masked_importance_loss(logprobs_BC, sampling_BC, advantages_BC, mask_BC, normalizer=count)
        else:
            loss = self._full_vocabulary(hidden_BCH, head, inputs, count)
        return loss, student.entropy.detach().sum(), mask_BC.sum()

    def _full_vocabulary(self, hidden_BCH: Any, head: Any, inputs: Any, count: Any) -> Any:
        """Each teacher's samples against its own head; the sum of them over all tokens."""
        total = hidden_BCH.sum() * 0.0
        for index in inputs["teacher_index"].unique().tolist():
            rows = inputs["teacher_index"] == index
            mask_BC = inputs["scored_mask"][rows]
            if not mask_BC.any():
                continue
            width = int(inputs["teacher_width"][rows].max())
            total = total + full_vocabulary_loss(
                hidden_BCH[rows],
                head,
                inputs["teacher_hidden"][rows][..., :width],
                self._head(self._teachers[index]).to(hidden_BCH.device),
                mask_BC,
                divergence=self._divergence,
                temperature=float(self.temperature) or 1.0,
                normalizer=count,
            )
        return total

    def _head(self, teacher: str) -> Any:
        if teacher not in self._heads:
            self._heads[teacher] = self._scorer.head(teacher).tensor()
        return self._heads[teacher]

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _own_state(self) -> dict[str, Any]:
        return {"teachers": dict(self._scorer.pins)}

    def _take_up(self, state: Mapping[str, Any]) -> None:
        for teacher, checkpoint in state.get("teachers", {}).items():
            self._scorer.pins.setdefault(teacher, checkpoint)


def _divergence(objective: Objective, beta: float) -> Divergence | None:
    """What TRL's `beta` asks for: JSD(beta), with forward and reverse KL at its ends."""
    if objective == "sampled":
        if beta != 1.0:
            raise conflict(f"beta={beta} with objective='sampled'", "sampled tokens estimate the reverse KL alone")
        return None
    return ReverseKL() if beta == 1.0 else ForwardKL() if beta == 0.0 else JSD(beta)


def _teacher_column(row: Mapping[str, Any]) -> str:
    if not isinstance(row.get("teacher"), str):
        raise BadInput(
            problem(
                f"a row of the data set names no teacher: its columns are {sorted(row)}",
                consequence="The batch was sampled and not trained on; it comes again",
                remedy="Add a column 'teacher', or pass route=",
            )
        )
    return str(row["teacher"])
