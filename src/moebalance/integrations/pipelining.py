"""Pipeline stages: leave out of the statistics what torch does to learn a stage's shapes.

A `PipelineStage` of torch 2.13 made without `input_args` and `output_args` is tried before its
first step, and again whenever training turns to evaluation or back: a real forward and backward on
uninitialised memory, which would be counted like any other.
"""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor

from moebalance.core.layer import LayerBalance
from moebalance.routing import Sums

logger = logging.getLogger("moebalance")

_UNKNOWN = (
    "moebalance: how %s learns its shapes is unknown here. If it does so by a trial run, that is "
    "counted: give it input_args and output_args."
)


def ignore_trial_runs(stages: Iterable[Any], layers: Iterable[LayerBalance]) -> None:
    """From now on put the layers' sums back after each trial run of these stages.

    Call it once, before the schedule's first step, with all stages of this process.

    Args:
        stages: the `torch.distributed.pipelining.PipelineStage`s of one schedule.
        layers: what is balanced in them, such as `balancing.layers.values()`.
    """
    kept = _Kept(list(layers))
    for stage in stages:
        if hasattr(stage, "_forward_metadata_inference"):
            stage._forward_metadata_inference = partial(
                kept.first, stage._forward_metadata_inference
            )
            stage._post_metadata_inference_cleanup = partial(
                kept.restore, stage._post_metadata_inference_cleanup
            )
        else:
            logger.warning(_UNKNOWN, type(stage).__name__)


class _Kept:
    """The layers' sums from before a trial run; torch tries all stages, then cleans all up."""

    def __init__(self, layers: list[LayerBalance]) -> None:
        self.layers = layers
        self.sums: list[tuple[Tensor, Sums | None]] | None = None

    def first(self, infer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.sums is None:
            self.sums = [(layer.running.clone(), layer.watched) for layer in self.layers]
        return infer(*args, **kwargs)

    def restore(self, clean_up: Callable[[], None]) -> None:
        clean_up()
        if self.sums is not None:
            for layer, (running, watched) in zip(self.layers, self.sums, strict=True):
                layer.running.copy_(running)
                layer.watched = watched
            self.sums = None
