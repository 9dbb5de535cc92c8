"""Where packed sequences end. Megatron tells its layers (`packed_seq_params`), but not routers."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn


def follow(chunks: Iterable[nn.Module], routers: Iterable[Any]) -> Iterator[Callable[[], None]]:
    """Hand `packed_seq_params` from each call of a layer on to the routers in it.

    A layer that is recomputed is called again, with those of its own micro-batch.

    Args:
        chunks: the model.
        routers: its balanced routers.

    Yields:
        How to stop it, for each module that is watched.
    """
    wanted = {id(router): router for router in routers}
    for chunk in chunks:
        for module in chunk.modules():
            inside = [
                wanted[id(m)] for m in module.modules() if id(m) in wanted and m is not module
            ]
            if inside:
                before: Any = partial(_tell, inside)
                yield module.register_forward_pre_hook(before, with_kwargs=True).remove


def _tell(routers: list[Any], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if "packed_seq_params" in kwargs:
        for router in routers:
            router.packed_seq_params = kwargs["packed_seq_params"]


def bounds(router: Any) -> Int[Tensor, "bounds"] | None:
    """Where packed sequences of this micro-batch begin and end on this rank, or None.

    Raises:
        ValueError: tensor parallelism cuts the sequences, or the MoE layer is recomputed alone.
    """
    told, config = router.packed_seq_params, router.config
    if told is None or told.qkv_format != "thd" or not router.balance.by_sequence:
        return None
    alone = config.recompute_granularity == "selective" and "moe" in config.recompute_modules
    if router.tp_group.size() > 1 or alone:
        reason = "sequence parallelism cuts them" if not alone else "recomputing 'moe' loses them"
        raise ValueError(
            f"{router.balance.method!r} looks at single sequences, which are packed here, and "
            f"{reason}. Take a method that does not, such as PhiBalancing, or do without it."
        )
    ends: Tensor = (
        told.cu_seqlens_q if told.cu_seqlens_q_padded is None else told.cu_seqlens_q_padded
    )
    # Context parallelism gives each rank its part of each sequence.
    here: Tensor = ends // router.tp_cp_group.size()
    return here
