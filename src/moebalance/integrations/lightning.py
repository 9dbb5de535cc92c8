"""Follow a Lightning Trainer: step, log, save in its checkpoints and resume from them.

    trainer = Trainer(callbacks=[BalanceCallback(PhiBalancing(strength=0.01))])

With automatic optimization the trainer's loss is L_i · s/A for each of A micro-batches under a
gradient scaler's factor s, and the balancing term is scaled by the same s/A. Where the module
scales its loss itself, only the loss can tell: it must be followed, and a step without is refused.
Written against Lightning 2.6, installed as `lightning` or as `pytorch_lightning`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from moebalance.attachment import attach
from moebalance.core.handle import Balancing
from moebalance.methods.base import Method

try:
    from lightning.pytorch import Callback  # type: ignore[import-not-found]
except ModuleNotFoundError:
    from pytorch_lightning import Callback  # type: ignore[import-not-found]


class BalanceCallback(Callback):  # type: ignore[misc]
    """Let a Lightning Trainer drive the balancing.

    Ends the balancing step with the optimizer step, keeps the term's strength in proportion to the
    loss, logs the metrics, and saves and restores the state with the trainer's checkpoints.

    A module that optimizes by hand (`automatic_optimization = False`) or overrides `backward` must
    pass its loss through `balancing.follow` before it scales or divides it.

    Args:
        balancing: what `moebalance.attach` returned; or a method, to be attached to the trainer's
            module when it starts. It stays attached afterwards.
        prefix: put before each metric's name in the logs.
        optimizer: index, in what `configure_optimizers` returns, of the optimizer whose steps end a
            balancing step: the one of the routers. Needed only where there are several.

    Raises:
        TypeError: `balancing` is neither.
    """

    def __init__(
        self,
        balancing: Balancing | Method,
        *,
        prefix: str = "moe/",
        optimizer: int | None = None,
    ) -> None:
        if not isinstance(balancing, Balancing | Method):
            raise TypeError(
                f"BalanceCallback({balancing!r}): give what moebalance.attach(model, …) returned, "
                "or a Method such as PhiBalancing(strength=0.01)."
            )
        self._method = balancing if isinstance(balancing, Method) else None
        self._balancing = balancing if isinstance(balancing, Balancing) else None
        self._module: Any = None
        self._saved: Mapping[str, Any] | None = None
        self.prefix, self.optimizer = prefix, optimizer
        self._steps_on: Any = None
        self._release: Callable[[], None] = _nothing
        self._trainer_scales = True
        self._backward_ran = self._step_is_due = False

    @property
    def balancing(self) -> Balancing:
        """The handle on the balanced layers.

        Raises:
            RuntimeError: the callback was given a method, and no trainer has started yet.
        """
        if self._balancing is None:
            raise RuntimeError(
                f"BalanceCallback({self._method!r}) has no model yet: it attaches to the module "
                "of the trainer that it is given to as callbacks=[…], when that starts."
            )
        return self._balancing

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach, if that is left to this callback.

        Raises:
            ValueError: the method does not fit the model.
            RuntimeError: the strategy accumulates gradients by itself.
        """
        if trainer.strategy.handles_gradient_accumulation:
            raise RuntimeError(
                f"{type(trainer.strategy).__name__} accumulates and scales gradients by itself, "
                "out of sight: use strategy='ddp', or call balancing.follow(loss) and "
                "balancing.step() in a loop of your own."
            )
        self._take(pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach: a model that was trained under a selection price is evaluated under it."""
        self._take(pl_module)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach, as for validation."""
        self._take(pl_module)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach, as for validation."""
        self._take(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the optimizer to follow.

        Raises:
            ValueError: there are several, and none was named.
        """
        self._let_go()
        self._steps_on = self._choose(trainer.optimizers)
        handle = self._steps_on.register_step_post_hook(self._after_optimizer)
        self._release = handle.remove
        # By name: one module class may come as lightning.pytorch's and as pytorch_lightning's.
        stock = type(pl_module).backward.__qualname__ == "LightningModule.backward"
        self._trainer_scales = pl_module.automatic_optimization and stock
        if not self._trainer_scales and self.balancing.method.traits.charges:
            # Unless the loss is followed the term is NaN: seen before the optimizer takes it.
            self.balancing.set_loss_scale(float("nan"))
        self.balancing.discard()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Scale the term of this micro-batch as the trainer has scaled its loss.

        Raises:
            RuntimeError: the optimizer asks for the gradients of one step more than once.
        """
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if self._step_is_due:
            if scaler is None:
                raise RuntimeError(
                    f"{type(self._steps_on).__name__} evaluates its closure more than once in a "
                    "step, and each time its tokens would be counted: use an optimizer that does "
                    "not."
                )
            self._end_step()  # the scaler skipped the optimizer's step
        self._backward_ran = True
        if self._trainer_scales:
            factor = 1.0 if scaler is None else scaler.get_scale()
            self.balancing.set_loss_scale(factor / trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Begin to add up what the ranks counted, while the optimizer runs.

        Raises:
            RuntimeError: the module scales its loss itself, and did not have it followed.
        """
        # A step whose training_step returned None is the optimizer's alone.
        if optimizer is not self._steps_on or not self._backward_ran:
            return
        if not self._trainer_scales and self.balancing.method.traits.charges:
            layer = next(iter(self.balancing.layers.values()))
            if bool(layer.loss_scale.isnan()):
                raise RuntimeError(
                    f"{type(pl_module).__name__} runs its own backward, so that the trainer cannot "
                    "tell how the loss is scaled: in training_step, write "
                    "loss = balancing.follow(loss) before you divide or scale it."
                )
        self.balancing.reduce()
        self._step_is_due = True

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the metrics of the last finished step, when the trainer logs."""
        if self._step_is_due:
            self._end_step()  # the scaler skipped the optimizer's step
        if self.balancing.steps and trainer._logger_connector.should_update_logs:
            found = self.balancing.metrics()
            pl_module.log_dict({self.prefix + name: value for name, value in found.items()})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Let go of the optimizer."""
        self._let_go()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let go of the optimizer."""
        self._let_go()

    def state_dict(self) -> dict[str, Any]:
        """The balancing state, for the trainer's checkpoint."""
        # Never empty, which Lightning would leave out: a tuner saves before the trainer starts.
        return {"balancing": None if self._balancing is None else self._balancing.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; at once, or on attaching.

        Raises:
            ValueError: the state does not fit.
        """
        self._saved = state["balancing"]
        if self._balancing is not None:
            self._restore()

    def on_load_checkpoint(
        self, trainer: Any, pl_module: Any, checkpoint: Mapping[str, Any]
    ) -> None:
        """Refuse to resume from a checkpoint that holds no balancing state.

        Raises:
            ValueError: it holds none.
        """
        if trainer.state.fn == "fit" and self.state_key not in checkpoint["callbacks"]:
            raise ValueError(
                f"The checkpoint holds no state of {self.state_key}, so that balancing would start "
                "anew in the middle of training: resume from one that was saved with this "
                "callback, or load the weights alone with load_from_checkpoint."
            )

    def _take(self, pl_module: Any) -> None:
        """Attach to the trainer's module if that is left to this callback."""
        if self._method is None:
            _unshare(self.balancing)
        if self._method is None or pl_module is self._module:
            return
        if self._balancing is not None:
            self._balancing.detach()
        self._module, self._balancing = pl_module, attach(pl_module, self._method)
        self._restore()

    def _restore(self) -> None:
        saved, self._saved = self._saved, None
        if saved is not None:
            self.balancing.load_state_dict(saved)

    def _choose(self, optimizers: Sequence[Any]) -> Any:
        if self.optimizer is None and len(optimizers) == 1:
            return optimizers[0]
        if self.optimizer is None or not 0 <= self.optimizer < len(optimizers):
            names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
            raise ValueError(
                f"BalanceCallback(optimizer={self.optimizer}) with {len(optimizers)} optimizers "
                f"({names}): give the index of the one that trains the routers; a balancing step "
                "ends with each of its steps."
            )
        return optimizers[self.optimizer]

    def _after_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._step_is_due:
            self._end_step()

    def _end_step(self) -> None:
        self._backward_ran = self._step_is_due = False
        self.balancing.step()

    def _let_go(self) -> None:
        self._release()
        self._release = _nothing
        self._backward_ran = self._step_is_due = False
        if self._balancing is not None:
            self._balancing.set_loss_scale(1.0)


def _unshare(balancing: Balancing) -> None:
    """Give this process tensors of its own, if it was spawned with a balancing made elsewhere.

    The ranks that a launcher spawns on CPU receive one tensor in shared memory, and would all count
    into it. Lightning parts them again for parameters and buffers of its module, and no others.
    """
    for layer in balancing.layers.values():
        if layer.running.is_cuda or not layer.running.is_shared():  # type: ignore[no-untyped-call]
            continue
        layer.remake(Tensor.clone)
        for buffer in layer.buffers():
            buffer.data = buffer.data.clone()
    balancing.share_cells()


def _nothing() -> None:
    pass
