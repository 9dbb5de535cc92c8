"""Training goes on from a checkpoint as if nothing had happened, on as many ranks as there are."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import moebalance as mb
from layout_cases import shard
from layout_models import WIDTH, Stack, losses
from moebalance import LossFree, PhiBalancing, SwitchLoss, Together
from moebalance.core import handle as body
from processes import COLLECTIVE_S, Failure, outcomes, run

BOTH = Together(PhiBalancing(strength=0.1, peek=False), LossFree(speed=0.01))
"""An average and a price, and the same gradient however the tokens are split."""


def same(a: Any, b: Any) -> bool:
    """Bit for bit, of nested dicts and lists of tensors and numbers."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """To the rounding of another order of summation."""
    assert a.keys() == b.keys()
    return all((a[key] - b[key]).abs().max() <= 1e-6 for key in a)


def tokens(step: int, half: int, *, of: int = 2) -> Tensor:
    """A half, or another part, of the four sequences of a step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 6, WIDTH, generator=generator, dtype=torch.float64) + 0.5
    return x.chunk(of)[half]


# --- a rank is killed -------------------------------------------------------------------------

MOMENTS = ("between micro-batches", "with the message under way")


def session(folder: Path | None, dies: str | None = None) -> dict[str, Any]:
    """Six steps, or what is left of them after the folder's checkpoint; the state at the end."""
    model = Stack(BOTH)
    balancing = mb.attach(model)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    parts = {"model": model, "optimizer": optimizer, "balancing": balancing}
    checkpoint = None if folder is None else folder / "last.pt"
    if checkpoint is not None and checkpoint.exists():
        for name, state in torch.load(checkpoint).items():
            parts[name].load_state_dict(state)
    for step in range(balancing.steps, 6):
        moment = dies if step == 4 and dist.get_rank() == 1 else None
        for half in range(2):
            with nullcontext() if half == 1 else wrapped.no_sync():
                loss = losses(wrapped(tokens(step, 2 * half + dist.get_rank(), of=4))).mean()
                (balancing.follow(loss) / 2).backward()
            if moment == "between micro-batches":
                os.kill(os.getpid(), signal.SIGKILL)
        balancing.reduce()
        optimizer.step()
        optimizer.zero_grad()
        if moment == "with the message under way":
            os.kill(os.getpid(), signal.SIGKILL)
        balancing.step()
        if checkpoint is not None and step % 2 == 1 and dist.get_rank() == 0:
            partial = checkpoint.with_suffix(".partial")
            torch.save({name: part.state_dict() for name, part in parts.items()}, partial)
            partial.replace(checkpoint)
    return {name: part.state_dict() for name, part in parts.items()}


def finish(folders: list[Path]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run that nothing interrupted, and the rest of those that were killed."""
    return session(None), [session(folder) for folder in folders]


@pytest.mark.survives(
    "Killed and resumed",
    "`kill -9` of a rank between micro-batches, or with the message under way",
    "error: on the other rank; from the last checkpoint the run continues bit for bit",
)
def test_a_run_whose_rank_was_killed_goes_on_bit_for_bit_from_its_last_checkpoint(tmp_path):
    folders = []
    for number, moment in enumerate(MOMENTS):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        survivor, killed = outcomes(session, 2, folders[-1], moment, limit_s=6 * COLLECTIVE_S)
        assert killed.endswith(f"(ended with {-signal.SIGKILL})")
        # The other rank does not go on alone, nor does it wait for ever.
        assert isinstance(survivor, Failure)
        # Its error is raised; gloo may then abort the process while it winds up.
        assert "Traceback" in survivor
        assert survivor.endswith(("(ended with 1)", f"(ended with {-signal.SIGABRT})"))
        assert torch.load(folders[-1] / "last.pt")["balancing"]["steps"] == 4
    for whole, pieces in run(finish, 2, folders):
        assert whole["balancing"]["steps"] == 6
        for piece in pieces:
            assert same(whole, piece)


def crash_once(folder: Path) -> str:
    """As compiled code that corrupts memory now and then."""
    if not (folder / "crashed").exists():
        (folder / "crashed").touch()
        os.abort()
    return "done"


def test_a_rank_that_crashes_in_compiled_code_is_run_once_more(tmp_path):
    assert run(crash_once, 1, tmp_path) == ["done"]
    (tmp_path / "crashed").unlink()
    (answer,) = outcomes(crash_once, 1, tmp_path)
    assert answer.crashed


# --- torch's distributed checkpoints ----------------------------------------------------------

# A single process may read and write them too, which torch remarks upon.
single = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Trained(NamedTuple):
    """Balancing state when saved or loaded; two steps later the method's own, and the routers."""

    at: dict[str, Any]
    after: dict[str, Tensor]
    gates: dict[str, Tensor]
    steps: int


def checkpointed(folder: Path, *, load: bool) -> Trained:
    """Three steps and a checkpoint, or take one up; then two steps more. FSDP2 on many ranks."""
    model = Stack(BOTH)
    balancing = mb.attach(model)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks > 1:
        shard(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)

    def train(*steps: int) -> None:
        for step in steps:
            rank = dist.get_rank() if ranks > 1 else 0
            losses(model(tokens(step, rank, of=ranks))).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            balancing.step()

    if not load:
        train(0, 1, 2)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "balancing": balancing}
    (dcp.load if load else dcp.save)(state, checkpoint_id=folder)
    if load:
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    at = balancing.state_dict()
    train(3, 4)
    after = {name: tensor for name, tensor in model.named_buffers() if ".state_" in name}
    gates = {name: layer.gate.detach() for name, layer in model.layers.items()}
    gates = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gates.items()}
    return Trained(at, after, gates, balancing.steps)


def save_and_load(own: Path, other: Path) -> tuple[Trained, Trained]:
    return checkpointed(own, load=False), checkpointed(other, load=True)


@pytest.mark.survives(
    "Killed and resumed",
    "A distributed checkpoint is resumed by more or fewer ranks (FSDP2)",
    "goes on: equal up to rounding",
)
@single
def test_a_distributed_checkpoint_is_taken_up_by_more_or_fewer_ranks(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    whole = checkpointed(alone, load=False)
    ranks = run(save_and_load, 2, together, alone)
    again = checkpointed(together, load=True)
    for saved, loaded in ranks:
        assert same(loaded.at, whole.at)
        assert same(again.at, saved.at)
        for went_on, origin in ((loaded, whole), (again, saved)):
            assert went_on.steps == origin.steps == 5
            assert close(went_on.after, origin.after)
            assert close(went_on.gates, origin.gates)


def saved_by(method, folder: Path) -> None:
    balancing = mb.attach(Stack(method))
    dcp.save({"balancing": balancing}, checkpoint_id=folder)


def trained(method=BOTH):
    model = Stack(method)
    balancing = mb.attach(model)
    losses(model(tokens(0, 0))).mean().backward()
    balancing.step()
    return balancing


@pytest.mark.survives(
    "Damaged and foreign states",
    "A distributed checkpoint of another method",
    "refused: with both names",
)
@single
def test_a_distributed_checkpoint_of_another_method_is_refused(tmp_path):
    saved_by(SwitchLoss(), tmp_path)
    balancing = trained(mb.GlobalBatchLoss())
    before = balancing.state_dict()
    with pytest.raises(ValueError, match=r"belongs to SwitchLoss.*balanced by GlobalBatchLoss"):
        dcp.load({"balancing": balancing}, checkpoint_id=tmp_path)
    assert same(balancing.state_dict(), before)


@pytest.mark.survives(
    "Damaged and foreign states",
    "A truncated distributed checkpoint",
    "refused: the state stays",
)
@single
def test_a_truncated_distributed_checkpoint_leaves_the_state_as_it_was(tmp_path):
    saved_by(BOTH, tmp_path)
    (file,) = tmp_path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    balancing = trained()
    before = balancing.state_dict()
    with pytest.raises(dcp.api.CheckpointException):
        dcp.load({"balancing": balancing}, checkpoint_id=tmp_path)
    assert same(balancing.state_dict(), before)


@pytest.mark.survives(
    "Damaged and foreign states",
    "A state of another format",
    "refused: with both formats",
)
@single
@pytest.mark.parametrize("written", [2, 4])
def test_a_state_of_another_format_is_refused_and_says_both(written, tmp_path, monkeypatch):
    with monkeypatch.context() as other_version:
        other_version.setattr(body, "FORMAT", written)
        saved_by(BOTH, tmp_path)
    balancing = trained()
    before = balancing.state_dict()
    with pytest.raises(ValueError, match=f"format {written}; this version reads 3"):
        dcp.load({"balancing": balancing}, checkpoint_id=tmp_path)
    assert same(balancing.state_dict(), before)


# --- the file beside a Transformers checkpoint ------------------------------------------------


@pytest.mark.survives(
    "Damaged and foreign states",
    "A truncated state file",
    "refused: the state stays",
)
def test_a_truncated_state_file_is_refused(tmp_path):
    file = mb.huggingface.save(trained(), tmp_path)
    file.write_bytes(file.read_bytes()[:-8])
    balancing = trained()
    before = balancing.state_dict()
    with pytest.raises(ValueError, match=r"moebalance\.safetensors is damaged"):
        mb.huggingface.load(balancing, tmp_path)
    assert same(balancing.state_dict(), before)


@pytest.mark.survives(
    "Damaged and foreign states",
    "A foreign file in the place of the state file",
    "refused: it was not written by moebalance",
)
def test_a_foreign_file_in_the_place_of_the_state_is_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / mb.huggingface.STATE_FILE)
    with pytest.raises(ValueError, match="was not written by moebalance"):
        mb.huggingface.load(trained(), tmp_path)
