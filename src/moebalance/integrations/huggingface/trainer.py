"""Follow a Hugging Face Trainer: step, log, save next to its checkpoints and resume with it."""

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from moebalance.core.handle import Balancing
from moebalance.core.layer import LayerBalance
from moebalance.integrations.huggingface.hooks import attach, hooks_of
from moebalance.integrations.huggingface.interrupted import on_leaving
from moebalance.integrations.huggingface.model_hooks import ModelHooks
from moebalance.integrations.huggingface.native_loss import silence_native_loss
from moebalance.integrations.huggingface.reporting import (
    SHOWN,
    Reporting,
    calling_trainer,
    resumed_folder,
)
from moebalance.integrations.huggingface.resuming import follow_best, resume, save_beside
from moebalance.integrations.huggingface.router_hook import RouterHook
from moebalance.integrations.huggingface.routers import transformers_model
from moebalance.integrations.huggingface.trainer_loss import (
    Epoch,
    follow_outputs,
    scaler_factor,
    silence_enabled_loss,
    silence_trainer_loss,
)
from moebalance.integrations.named.hooks import layers_of
from moebalance.methods.base import Method

logger = logging.getLogger("moebalance")


class BalanceCallback(Reporting):
    """Let a Hugging Face Trainer (or TRL's) drive the balancing.

    Ends the balancing step with the optimizer step, keeps the term's strength in proportion to the
    loss, adds the metrics to the trainer's logs, for all of its reporters, saves the state next to
    each checkpoint and takes it up again on resuming.

    Args:
        balancing: what `moebalance.attach` returned; or a method, to be attached to the trainer's
            model when the trainer is made. It stays attached after training.
        prefix: put before each metric's name in the logs.
        show: what the trainer's TensorBoard, W&B and trackio show next to them. `percentiles`
            are of MaxVio, Gini and the dead fraction over layers, `layers` MaxVio and the dead
            fraction of each; `images` (layer × expert, coloured by load) and `tables` (the hottest
            and coldest experts) are sent when steps have grown by 5 %. `()` shows nothing more.
        resume_from: folder of the checkpoint to resume from; found by itself where the trainer's
            arguments name it as `resume_from_checkpoint`, or in the trainer's own output folder.
        state_file: whether to save the state as a file next to each checkpoint; False where the
            checkpoint itself holds it, as those of `torch.distributed.checkpoint` can.

    Raises:
        TypeError: `balancing` is neither.
        ValueError: a word of `show` is unknown.
    """

    def __init__(
        self,
        balancing: Balancing | Method,
        *,
        prefix: str = "moe/",
        show: Iterable[str] = SHOWN,
        resume_from: str | Path | None = None,
        state_file: bool = True,
    ) -> None:
        if not isinstance(balancing, Balancing | Method):
            raise TypeError(
                f"BalanceCallback({balancing!r}): give what moebalance.attach(model, …) returned, "
                "or a Method such as PhiBalancing(strength=1e-3)."
            )
        super().__init__(prefix, show)
        self._method = balancing if isinstance(balancing, Method) else None
        self._balancing = balancing if isinstance(balancing, Balancing) else None
        self.resume_from = None if resume_from is None else Path(resume_from)
        self.state_file = state_file
        self._epoch = Epoch(None, 1)
        self._restore_config: Callable[[], None] = lambda: None
        self._hooks: list[ModelHooks] = []
        self._followed: nn.Module | None = None
        self._unfollow: Callable[[], None] = lambda: None
        self._unwatch: Callable[[], None] = lambda: None

    @property
    def balancing(self) -> Balancing:
        """The handle on the balanced layers.

        Raises:
            RuntimeError: the callback was given a method, and no trainer has shown it a model yet.
        """
        if self._balancing is None:
            raise RuntimeError(
                f"BalanceCallback({self._method!r}) has no model yet: it attaches to the model "
                "of the trainer that it is given to as callbacks=[…]."
            )
        return self._balancing

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach, if that is left to this callback, before the trainer compiles or wraps the model.

        Raises:
            ValueError: the method does not fit the model, or the trainer was told to add the
                model's own balancing loss.
        """
        super().on_init_end(args, state, control, **kwargs)
        self._restore_config = silence_trainer_loss(args, kwargs["model"])
        self._take(args, kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that what is about to be trained is balanced, and resume if the trainer does.

        Raises:
            RuntimeError: training on replicas (torch.nn.DataParallel).
            FileNotFoundError, ValueError: the trainer resumes, and there is no state that fits.
            ValueError: the model's routers are frozen, or others than were attached to; or the
                trainer was told to add the model's own balancing loss.
        """
        super().on_train_begin(args, state, control, **kwargs)
        if args.n_gpu > 1:
            raise RuntimeError(
                f"torch.nn.DataParallel over {args.n_gpu} GPUs: its replicas are counted nowhere. "
                "Let one GPU be visible (CUDA_VISIBLE_DEVICES)."
            )
        silence_trainer_loss(args, kwargs["model"])
        self._restore_config()
        self._take(args, kwargs["model"])
        _check_routers(self.balancing, kwargs["model"])
        model = transformers_model(kwargs["model"])
        if model is not None:
            self.balancing.on_detach(silence_native_loss(model))
        self._epoch = Epoch.of(args, state, kwargs.get("train_dataloader"))
        trainer = calling_trainer(self)
        self.balancing.on_detach(silence_enabled_loss(trainer))
        self._hooks = hooks_of(kwargs["model"])
        for hooks in self._hooks:
            hooks.divided_again = getattr(trainer, "loss_is_scaled_for_ga", None) is False
            hooks.undivided = None
        self.balancing.on_detach(self._end)
        self._unwatch()
        self._unwatch = on_leaving(trainer, kwargs["model"], self._give_up)
        self._scale(kwargs.get("optimizer"))
        self.balancing.discard()
        if state.global_step > 0:
            resume(
                self.balancing,
                args,
                state,
                given=self.resume_from,
                told=resumed_folder(trainer),
                state_file=self.state_file,
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the epoch's steps from the first one that is not skipped."""
        self._epoch.begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the weight of this step's micro-batches, for losses that the trainer makes."""
        self._scale(kwargs.get("optimizer"))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to add up what all ranks counted, while the optimizer works."""
        self.balancing.reduce()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the balancing step."""
        self.balancing.step()
        self._epoch.step += 1

    def measured(self, logs: dict[str, Any]) -> dict[str, float]:
        """The metrics of the step."""
        return self.balancing.metrics()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the state next to the checkpoint just written."""
        if self.state_file and state.is_world_process_zero:
            save_beside(self.balancing, args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where the trainer went back to its best checkpoint, go with it."""
        self._end()
        follow_best(self.balancing, args, state)

    def _end(self) -> None:
        """From now on losses are nobody's but the user's."""
        self._unwatch()
        self._rate(1)
        self.balancing.set_loss_scale(1.0)

    def _give_up(self) -> None:
        """The trainer was interrupted: what it counted of its last step belongs to no step."""
        self._end()
        self.balancing.discard()

    def _take(self, args: Any, model: nn.Module) -> None:
        """Attach to `model` if that is left to this callback, and follow what the trainer does."""
        if self._method is not None and not any(_tied(self._balancing, model)):
            if self._balancing is not None:
                logger.info("moebalance: attaching to another model; balancing starts anew.")
                self._balancing.detach()
            self._balancing, self._followed = attach(model, self._method), None
        if self._followed is not model:
            self._unfollow()
            self._followed, self._unfollow = model, follow_outputs(args, model, self.balancing)
            self.balancing.on_detach(self._unfollow)

    def _scale(self, optimizer: Any) -> None:
        micro_batches, scaler = self._epoch.micro_batches, scaler_factor(optimizer)
        self._rate(micro_batches, scaler)
        self.balancing.set_loss_scale(scaler / micro_batches)

    def _rate(self, micro_batches: int, scaler: float = 1.0) -> None:
        for hooks in self._hooks:
            hooks.micro_batches, hooks.scaler = micro_batches, scaler


def _tied(balancing: Balancing | None, model: nn.Module) -> Iterator[tuple[str, LayerBalance]]:
    """Routers of `model` that `balancing` balances, by name; PEFT's unused originals left out."""
    layers = [] if balancing is None else list(balancing.layers.values())
    for name, module in model.named_modules():
        if "original_module" in name.split("."):
            continue
        owners = [getattr(hook, "__self__", None) for hook in module._forward_hooks.values()]
        found = [owner.layer for owner in owners if isinstance(owner, RouterHook)]
        for layer in [*found, *layers_of(module), module]:
            if any(layer is own for own in layers):
                yield name, layer


def _check_routers(balancing: Balancing, model: nn.Module) -> None:
    """Refuse to train a model whose routers are not the balanced ones, or cannot learn.

    Raises:
        ValueError: a router was copied or replaced since it was attached to, or is frozen under a
            method that works through its gradient.
    """
    tied = list(_tied(balancing, model))
    missing = [
        name for name, own in balancing.layers.items() if not any(layer is own for _, layer in tied)
    ]
    if missing:
        raise ValueError(
            f"{missing[0]} (of {len(missing)} such routers) is balanced, but is not part of the "
            "model that is about to be trained. PEFT copies the modules in modules_to_save, and a "
            "trainer's model_init makes a new model: attach to what get_peft_model returned, or "
            "let the callback do it with BalanceCallback(PhiBalancing(…))."
        )
    if not balancing.method.traits.charges:
        return
    for name, _ in tied:
        adapted = model.get_submodule(name.removesuffix(".base_layer"))
        if isinstance(adapted, LayerBalance):
            continue  # a BalancedRouter, which is handed its logits and has no weight of its own
        if not any(parameter.requires_grad for parameter in adapted.parameters()):
            raise ValueError(
                f"{balancing.method!r} works through the gradient of the router, but {name} was "
                "frozen since it was attached to. Train it (with PEFT: modules_to_save or "
                "target_parameters), or use a method that selects, such as LossFree."
            )
