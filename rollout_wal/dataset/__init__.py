"""Finished rollouts as Arrow files: light metadata to plan with, heavy per-token payload to train on."""

from .extras import extras_from_json, extras_to_json
from .freshness import Freshness, fresh_tokens, token_versions
from .loader import LoadedSample, Loader, MiniBatch
from .plan import Plan
from .planner import PlanReport, PlanSpec, plan
from .reader import Dataset, open_dataset
from .rows import PayloadRow
from .sample import ColumnGroup, Masked, Provenance, Sample, tokens_crc32c
from .segments import SAMPLED_KINDS, SegmentKind, loss_mask
from .writer import CommitInfo, DatasetWriter

__all__ = [
    "SAMPLED_KINDS",
    "ColumnGroup",
    "CommitInfo",
    "Dataset",
    "DatasetWriter",
    "Freshness",
    "LoadedSample",
    "Loader",
    "Masked",
    "MiniBatch",
    "PayloadRow",
    "Plan",
    "PlanReport",
    "PlanSpec",
    "Provenance",
    "Sample",
    "SegmentKind",
    "extras_from_json",
    "extras_to_json",
    "fresh_tokens",
    "loss_mask",
    "open_dataset",
    "plan",
    "token_versions",
    "tokens_crc32c",
]
