"""What trainers do with a loss of their own making: how a micro-batch weighs in its step.

A step's loss is Σ_i w_i L_i over its micro-batches; the balancing term is Σ_i w_i R_i with the same
weights, so that its strength means the same however a step is split. Where the model computes L_i,
hooks on the model read w_i. Where the trainer does, this is how (Transformers 5.23, TRL 1.16; A is
the number of micro-batches of this very step, n_i of N labels are in micro-batch i):

- label smoothing, `compute_loss_func`: the labels never reach the model. R_i weighs 1/A.
- TRL's SFT: −Σ log p / N from the model's `log_probs`, whose gradient tells w_i = n_i/N.
- SFT with "dft", DPO, KTO, reward: a mean of the micro-batch, divided by A. R_i weighs 1/A.
- GRPO: "grpo", "bnpo", "dr_grpo", "sapo", "luspo" as DPO. "dapo", "cispo" and "vespo" divide by
  the tokens of a whole generation, so that a step's weights need not sum to one; R_i weighs 1/A,
  as TRL weighs the models' own balancing losses.

- `compute_loss` that leaves the model's loss out, but calls `super()` with the labels of the step:
  R_i weighs n_i/N. So it does where the Trainer divides such a loss once more
  (`loss_is_scaled_for_ga = False`), by A.

- `compute_loss` that calls the model without `num_items_in_batch` and returns its loss, a mean of
  the micro-batch. The Trainer then divides by A or does not: it thinks that the loss knows the
  labels of the step, and adds up A means. R_i weighs 1/A, and a warning says so once.

So the weights of a step sum to 1 everywhere. A gradient scaler multiplies all of them.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import has_length
from transformers.utils.generic import ModelOutput

from moebalance.core.handle import Balancing
from moebalance.integrations.huggingface.routers import transformers_model

logger = logging.getLogger("moebalance")


class Epoch:
    """How many micro-batches each optimizer step of an epoch has; the last one may have fewer.

    Args:
        batches: micro-batches in an epoch; None if nobody knows, as for a stream of data, whose
            last step is then taken for a full one.
        accumulation: micro-batches in a full step.
        done: steps of this epoch that were taken before the training was interrupted.
    """

    def __init__(self, batches: int | None, accumulation: int, *, done: int = 0) -> None:
        self.batches, self.accumulation, self.step = batches, accumulation, done
        self._done = done

    @classmethod
    def of(cls, args: Any, state: Any, batches: "DataLoader[Any] | None") -> "Epoch":
        """The epoch in which a Trainer starts or resumes."""
        accumulation = args.gradient_accumulation_steps
        if batches is None or not has_length(batches):
            return cls(None, accumulation)
        steps = max(-(-len(batches) // accumulation), 1)
        done = 0 if args.ignore_data_skip else state.global_step % steps
        return cls(len(batches), accumulation, done=done)

    def begin(self) -> None:
        """Start at the first step, or where the interrupted epoch goes on."""
        self.step, self._done = self._done, 0

    @property
    def micro_batches(self) -> int:
        """Of the coming step.

        >>> [Epoch(6, 4, done=step).micro_batches for step in range(2)]
        [4, 2]
        """
        left = 0 if self.batches is None else self.batches - self.step * self.accumulation
        return min(self.accumulation, left) if left > 0 else self.accumulation


def scaler_factor(optimizer: Any) -> float:
    """What a gradient scaler multiplies the loss by; 1 without one.

    DeepSpeed has none: its own optimizer, which accelerate wraps, scales the loss in fp16.
    """
    scaler = getattr(optimizer, "scaler", None)
    if scaler is not None:
        return float(scaler.get_scale())
    own = getattr(getattr(optimizer, "optimizer", None), "loss_scale", None)
    return float(own) if isinstance(own, int | float | Tensor) else 1.0


def silence_enabled_loss(trainer: Any) -> Callable[[], None]:
    """Have a TRL trainer leave out a balancing loss that it saw switched on; return the undo.

    ORPO and CPO read `output_router_logits` of the model's configuration when they are made. With
    it switched off since, they would add a coefficient times None.
    """
    if _is_trl(getattr(trainer, "args", None)) or not getattr(trainer, "aux_loss_enabled", False):
        return _nothing
    logger.warning(
        "moebalance: switched off the balancing loss that %s adds for output_router_logits=True "
        "(router_aux_loss_coef=%s); detach() switches it on again.",
        type(trainer).__name__,
        getattr(trainer, "aux_loss_coef", None),
    )
    trainer.aux_loss_enabled = False

    def undo() -> None:
        trainer.aux_loss_enabled = True

    return undo


def silence_trainer_loss(args: Any, model: nn.Module) -> Callable[[], None]:
    """Have a TRL trainer leave out the model's own balancing loss, which it adds if not told so.

    Its trainers read the setting when they are made, some before and some after this is called.
    To the early ones `follow_outputs` hands a loss of zero.

    Returns:
        What gives the model's configuration back the coefficient that a trainer overwrites.

    Raises:
        ValueError: the loss was asked for.
    """
    if not _is_trl(args):
        return _nothing
    if args.router_aux_loss_coef:
        raise ValueError(
            f"{type(args).__name__}(router_aux_loss_coef={args.router_aux_loss_coef}) adds the "
            "model's own balancing loss to the one of moebalance: set router_aux_loss_coef=0.0, or "
            "train without a BalanceCallback."
        )
    inner = transformers_model(model)
    config = None if inner is None else inner.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if args.router_aux_loss_coef is None:
        args.router_aux_loss_coef = 0.0
        if coefficient:
            logger.warning(
                "moebalance: set router_aux_loss_coef=0.0 in the %s, as the trainer would add the "
                "model's own balancing loss (coefficient %s).",
                type(args).__name__,
                coefficient,
            )
    return _nothing if config is None else partial(_restore, config, coefficient)


def follow_outputs(args: Any, model: nn.Module, balancing: Balancing) -> Callable[[], None]:
    """Hook a model whose outputs a TRL trainer makes its loss from; return the undo."""
    if not _is_trl(args):
        return _nothing
    # In SFT alone: every other loss weighs its tokens by more than their number.
    token_mean = getattr(args, "loss_type", None) == "nll"

    def before(
        model: nn.Module, given: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not kwargs.get("output_router_logits"):
            return None
        return given, {**kwargs, "output_router_logits": False}

    def after(
        module: nn.Module, given: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        log_probs = output.get("log_probs") if isinstance(output, ModelOutput) else None
        if not isinstance(log_probs, Tensor):
            return None
        if isinstance(output.get("loss"), Tensor) and kwargs.get("shift_labels") is None:
            # Nobody reads it, except where sequences are sharded. DistributedDataParallel hands
            # such outputs a gradient of zero, which would be taken for the scale of the loss.
            output["loss"] = output["loss"].detach()
        if output.get("aux_loss") is None:
            output["aux_loss"] = log_probs.new_zeros(())
        # A copy of the model has this hook, too.
        if token_mean and module is model and module.training and torch.is_grad_enabled():
            output["log_probs"] = cast(
                Tensor,
                _ReadWeight.apply(  # type: ignore[no-untyped-call]
                    log_probs, output["label_mask"], *balancing.loss_scales()
                ),
            )
        return output

    handles = (
        model.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        model.register_forward_hook(after, with_kwargs=True),
    )

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def _is_trl(args: Any) -> bool:
    return hasattr(args, "router_aux_loss_coef")


def _restore(config: Any, coefficient: float | None) -> None:
    if coefficient is not None:
        config.router_aux_loss_coef = coefficient


def _nothing() -> None:
    pass


class _ReadWeight(torch.autograd.Function):
    """Return log-probabilities unchanged; write how much their labels weigh in the loss to cells.

    The loss is −w · (mean over labelled positions), so each position's gradient is −w/n.
    """

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, labelled: Tensor, *cells: Tensor) -> Tensor:
        ctx.cells = cells
        ctx.save_for_backward(labelled)
        return log_probs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        (labelled,) = ctx.saved_tensors
        weight = -(gradient.float() * labelled).sum()
        for cell in ctx.cells:
            cell.copy_(weight)
        return gradient, None, *[None for _ in ctx.cells]
