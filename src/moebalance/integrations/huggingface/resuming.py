"""The balancing state and a Trainer's checkpoints: save next to one, go on from one, take the best.

A handle may outlive a training: a second one begins at step 0 of the trainer, and so does the next
attempt of `auto_find_batch_size` after an out-of-memory. So the state file names the trainer's step
next to the handle's own, and a checkpoint is known by the former.
"""

import logging
from pathlib import Path
from typing import Any

from moebalance.core.handle import Balancing
from moebalance.core.state import check_values
from moebalance.integrations.huggingface.state_file import STATE_FILE, read, save

logger = logging.getLogger("moebalance")


def save_beside(balancing: Balancing, args: Any, state: Any) -> None:
    """Save the state next to the checkpoint that a trainer just wrote."""
    save(balancing, _own_folder(args, state), global_step=state.global_step)


def resume(
    balancing: Balancing,
    args: Any,
    state: Any,
    *,
    given: Path | None,
    told: Path | None = None,
    state_file: bool,
) -> None:
    """Take up the state of the checkpoint that a trainer resumes from.

    Args:
        balancing: the handle.
        args: the trainer's arguments.
        state: the trainer's state.
        given: a folder that the user named for the state.
        told: the folder that `Trainer.train` was told to resume from, if that is known.
        state_file: whether checkpoints have the state in a file.

    Raises:
        FileNotFoundError: there is no state.
        ValueError: it is another step's, does not fit, or cannot be trained with.
    """
    folder = given or told or _named_folder(args) or _own_folder(args, state)
    steps = balancing.steps
    by_hand = steps == state.global_step or (not state_file and steps > state.global_step)
    if by_hand and not (folder / STATE_FILE).is_file():
        return
    saved = read(folder)
    check_values(saved)
    _check_step(saved, folder, state.global_step, given=given is not None)
    balancing.load_state_dict(saved)


def follow_best(balancing: Balancing, args: Any, state: Any) -> None:
    """Where a trainer ends with the weights of its best checkpoint, take its state too."""
    best = state.best_model_checkpoint
    if not args.load_best_model_at_end or best is None:
        return
    if Path(best).name == _own_folder(args, state).name:
        return
    if not (Path(best) / STATE_FILE).is_file():
        logger.warning(
            "moebalance: the trainer loaded the weights of %s, which has no %s, so the balancing "
            "state is still the last step's. Use BalanceCallback(…, state_file=True).",
            best,
            STATE_FILE,
        )
        return
    last = {name: layer.last_total for name, layer in balancing.layers.items()}
    balancing.load_state_dict(read(best))
    for name, layer in balancing.layers.items():
        layer.last_total = last[name]  # metrics() still tells of the last step that was trained
    logger.info("moebalance: took the balancing state of the best checkpoint, %s.", best)


def _check_step(saved: dict[str, Any], folder: Path, step: int, *, given: bool) -> None:
    path, at = folder / STATE_FILE, saved.get("global_step")
    if at is not None and at != step:
        raise ValueError(
            f"{path} was saved at the trainer's step {at}, but training resumes at step {step}: "
            "give the folder of the checkpoint that is resumed from, with the state saved in it, "
            f"as BalanceCallback(…, resume_from=…). Its file must be of step {step}."
        )
    if at is not None or saved["steps"] == step:
        return
    if given:
        logger.warning(
            "moebalance: %s does not name a step of the trainer. It was saved after %d steps of "
            "balancing and is taken for step %d, as resume_from=… says.",
            path,
            saved["steps"],
            step,
        )
        return
    raise ValueError(
        f"{path} was saved after {saved['steps']} steps of balancing, but training resumes at step "
        f"{step}, and the file does not name a step of the trainer. If the handle was used before "
        "that training, and the file belongs to this checkpoint, say so: "
        f"BalanceCallback(…, resume_from={str(folder)!r})."
    )


def _own_folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _named_folder(args: Any) -> Path | None:
    """The folder that the arguments name, if it has a state; on a command line it may be "True"."""
    named = args.resume_from_checkpoint
    found = Path(named) if isinstance(named, str) else None
    return found if found is not None and (found / STATE_FILE).is_file() else None
