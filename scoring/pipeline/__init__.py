"""Engine, scorer and learner, joined by what is durable anyway: the log, the dataset, and its column groups.

options        bounds, freshness, replay
batch          what the learner gets
pipeline       the stages
metrics        for Prometheus

There is no queue on disk. What has been generated is in the log until it is consumed; what waits for scores is in the
dataset without them; what waits for the learner has them. Whoever dies, the stages are worked out again from that.
"""

from .batch import ScoredBatch
from .options import PipelineOptions, PromptBatch
from .pipeline import Pipeline, PipelineStats

__all__ = ["Pipeline", "PipelineOptions", "PipelineStats", "PromptBatch", "ScoredBatch"]
