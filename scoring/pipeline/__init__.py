"""Engine, scorer and learner, joined by what is durable anyway: the log, the dataset, and its column groups.

options        bounds, freshness, replay
batch          what the learner gets
pipeline       what a training loop holds
stages         what runs behind it
state          rollouts on their way; recovery: what the dataset knows of them
metrics        for Prometheus

There is no queue on disk. What has been generated is in the log until it is consumed; what waits for scores is in the
dataset without them; what waits for the learner has them. Whoever dies, the stages are worked out again from that.
"""

from .batch import ScoredBatch
from .options import PipelineOptions, PromptBatch
from .pipeline import Pipeline
from .state import PipelineStats

__all__ = ["Pipeline", "PipelineOptions", "PipelineStats", "PromptBatch", "ScoredBatch"]
