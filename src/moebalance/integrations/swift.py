"""ms-swift: a callback under a name, for `--external_plugins` and `--callbacks`.

The user's plugin file, `balance.py`:

    import moebalance as mb
    from moebalance.integrations.swift import register

    register(mb.PhiBalancing(strength=0.01))

and on the command line `--external_plugins balance.py --callbacks moebalance`. Written against
ms-swift 4.6, whose trainers make the callbacks named by `--callbacks` from `callbacks_map`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moebalance.integrations.huggingface import BalanceCallback
from moebalance.methods.base import Method

_TRAINING = ("pt", "sft", "rlhf")
"""Names of the scripts that train; others read the plugin file and make no trainer."""


def register(method: Method, *, name: str = "moebalance", **options: Any) -> None:
    """Let `--callbacks NAME` attach `method` to the trainer's model.

    Calling it again with the same name replaces the method: data-loading workers read the plugin
    file again.

    Args:
        method: the method.
        name: what `--callbacks` calls it.
        options: for `BalanceCallback`, such as `resume_from`.

    Raises:
        TypeError: `method` is no method.
        ValueError: the command line trains, and its `--callbacks` does not name it.
    """
    BalanceCallback(method, **options)  # refuse bad arguments before a model is loaded
    _refuse_unnamed(name, sys.argv)
    from swift.callbacks import callbacks_map  # type: ignore[import-not-found]

    def make(args: Any, trainer: Any) -> BalanceCallback:
        # Each start of ms-swift writes to a folder of its own: what it resumes from is elsewhere.
        folder = {"resume_from": getattr(args, "resume_from_checkpoint", None)}
        return BalanceCallback(method, **{**folder, **options})

    callbacks_map[name] = make


def _refuse_unnamed(name: str, arguments: Sequence[str]) -> None:
    """ms-swift writes its configuration file out as arguments, so they are the whole truth."""
    if Path(arguments[0]).stem not in _TRAINING or "--external_plugins" not in arguments:
        return
    if name not in arguments and f"--callbacks={name}" not in arguments:
        raise ValueError(
            f"A balancing callback is registered as {name!r}, but nothing calls it: add "
            f"--callbacks {name} to the command, or callbacks: [{name}] to the configuration."
        )
