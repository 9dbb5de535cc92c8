"""Tensors that are not plainly where they are used: partitioned, sharded, offloaded, on meta."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


@contextmanager
def gathered(tensor: Tensor) -> Iterator[Tensor]:
    """The whole of a tensor, to be read or written in place; of DeepSpeed ZeRO-3 it is gathered."""
    if not hasattr(tensor, "ds_id"):
        yield tensor
        return
    import deepspeed  # type: ignore[import-not-found, unused-ignore]

    # All ranks write the same, and the first one's is kept.
    with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
        yield tensor


@torch.no_grad()
def read(tensor: Tensor) -> Tensor:
    """A copy of the whole tensor, flat."""
    with gathered(tensor) as whole:
        plain = whole.full_tensor() if isinstance(whole, DTensor) else whole
        return plain.detach().clone().reshape(-1)


@torch.no_grad()
def write(tensor: Tensor, values: Tensor) -> None:
    """Overwrite the whole tensor, of whatever shape, without telling autograd."""
    with gathered(tensor) as whole:
        if isinstance(whole, DTensor):
            fitting = values.to(whole.device, whole.dtype).reshape(whole.shape)
            whole.data.copy_(distribute_tensor(fitting, whole.device_mesh, whole.placements))
        else:
            whole.data.copy_(values.view(whole.shape))


def home(router: nn.Module) -> torch.device | None:
    """Where a router computes; None while its weights are on meta and nothing says more."""
    for parameter in router.parameters():
        if not parameter.is_meta:
            return parameter.device
    for module in router.modules():  # offloaded by Accelerate, which brings weights in for a call
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None
