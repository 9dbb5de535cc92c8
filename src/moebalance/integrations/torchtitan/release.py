"""Which torchtitan these routers are written for, told by the router that they derive from."""

import inspect
from typing import Any

from torchtitan.models.common.moe import (  # type: ignore[import-not-found]
    TokenChoiceTopKRouter,
)

_KNOWN = ["self", "x_BLD", "expert_bias_E"]


def check_release(router: Any = TokenChoiceTopKRouter) -> None:
    """Refuse a torchtitan whose routers take something else than those of 0.3.0.

    A clone of its main branch has the version of the last release, hence the look at the function.
    There routers get tokens (T, D) instead of sequences (B, L, D).

    Raises:
        ImportError: says what the router takes, and what to install.
    """
    taken = list(inspect.signature(router.forward).parameters)
    if taken != _KNOWN:
        raise ImportError(
            f"This torchtitan's {router.__name__}.forward takes ({', '.join(taken)}); moebalance "
            f"is written for torchtitan 0.3.0, where it takes ({', '.join(_KNOWN)}). Install "
            "torchtitan==0.3.0, or route your layers with moebalance.BalancedRouter."
        )
