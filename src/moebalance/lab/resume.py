"""Whether a run begins or goes on, and what stands in the way of either."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from moebalance.integrations.huggingface.sharded import is_distributed
from moebalance.lab.checkpoints import last_whole_checkpoint
from moebalance.lab.damage import step_of
from moebalance.lab.identity import Identity, refuse_other_run
from moebalance.lab.recipe import FINAL, Recipe
from moebalance.runlog import LOG_NAME, read_run

logger = logging.getLogger(__name__)


class Start(NamedTuple):
    """Where a run starts.

    Attributes:
        recipe: the recipe, sharded if the checkpoint is one of a sharded run.
        checkpoint: what it goes on from; None to begin.
        longer: whether it gets more steps than it was started with.
        nothing_left: whether the run is complete, its model too.
    """

    recipe: Recipe
    checkpoint: Path | None = None
    longer: bool = False
    nothing_left: bool = False


def find_start(
    recipe: Recipe, identity: Identity, folder: Path, *, resume: bool, save_model: bool
) -> Start:
    """Find where a run in this folder starts.

    Args:
        recipe: what is asked for now.
        identity: identity of the run that is asked for.
        folder: folder of the run.
        resume: go on from the last whole checkpoint, if there is one.
        save_model: whether the run leaves its model in `final`.

    Raises:
        ValueError: the folder holds another run, or an earlier one that would be overwritten.
    """
    found = last_whole_checkpoint(folder) if resume else None
    if found is None:
        _refuse_earlier_run(folder, resume=resume, save_model=save_model)
        if resume:
            logger.warning(
                "There is nothing to resume in %s: it holds no whole checkpoint ([train] "
                "save_every). Training begins at the first step.",
                folder,
            )
        return Start(recipe)
    path, steps = folder / LOG_NAME, recipe.train.steps
    longer = refuse_other_run(path, recipe, identity)
    whole = not longer and step_of(found) >= steps and read_run(path).status == "complete"
    nothing_left = whole and (not save_model or (folder / FINAL).exists())
    if nothing_left:
        logger.warning(
            "There is nothing to resume in %s: all %d steps are done. Give a larger [train] steps "
            "to make this run longer.",
            folder,
            steps,
        )
    return Start(_laid_out_as(recipe, found), found, longer, nothing_left)


def _laid_out_as(recipe: Recipe, checkpoint: Path) -> Recipe:
    """The recipe, sharded if its checkpoint is: any number of ranks can go on with that."""
    if is_distributed(checkpoint):
        return replace(recipe, train=replace(recipe.train, sharded=True))
    if recipe.train.sharded:
        raise ValueError(
            f"{checkpoint} was saved by a run on whole copies of the model: go on with it without "
            "[train] sharded (or accelerate's FSDP), on any number of processes."
        )
    return recipe


def _refuse_earlier_run(folder: Path, *, resume: bool, save_model: bool) -> None:
    if not resume and next(folder.glob("checkpoint-*"), None) is not None:
        raise ValueError(
            f"{folder} holds checkpoints of an earlier run: go on with it (--resume), choose "
            "another folder (--out), or remove them."
        )
    if save_model and (folder / FINAL).exists():
        raise ValueError(
            f"{folder / FINAL} is the model of an earlier run: choose another folder (--out), or "
            "remove it."
        )
