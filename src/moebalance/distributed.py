"""How many processes share the balancing: for now one.

Sums are not reduced across ranks yet. A rank on its own would balance its own tokens, and under a
selection method route differently from the others; so more than one is refused, not tolerated.
"""

import torch.distributed as dist


def world_size() -> int:
    """Number of processes in the default group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def refuse_several(processes: int) -> None:
    """Refuse to balance on more than one process.

    Raises:
        RuntimeError: `processes` is greater than 1.
    """
    if processes > 1:
        raise RuntimeError(
            f"Training on {processes} processes: this version of moebalance does not reduce its "
            "sums across ranks, so each would balance its own tokens. Train on one process."
        )
