"""What a release of Transformers must do: a Trainer, padding, resuming, export. Prints JSON.

Runs in each environment; takes nothing of Transformers that is newer than 5.6. Whole families are
examined by `python tests/family_page.py --count`.
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

import moebalance as mb
from families import loss, tiny, tokens
from training import BalanceCallback, Rows, agree, plain, term_gradients


def accumulation(folder: Path) -> None:
    """A term is the same in one and in four micro-batches."""
    make = plain(folder, Rows(8))
    (whole,) = term_gradients(make, per_device_train_batch_size=8)
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    (parts,) = term_gradients(make, **sizes)
    assert agree(parts, whole), "the term changes with the micro-batches"


def padding(folder: Path) -> None:
    """A Trainer's padding is not counted."""
    lengths = [12, 5, 9, 3]
    callback = BalanceCallback(mb.NoBalancing())
    make = plain(folder, Rows(4, lengths), per_device_train_batch_size=4)
    make(tiny("qwen3_moe"), [callback]).train()
    found = callback.balancing.metrics()["tokens"]
    assert found == sum(lengths), f"{found:.0f} tokens counted for {sum(lengths)}"


def resuming(folder: Path) -> None:
    """A run that is cut and resumed ends with the state of one that is not."""
    settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.0}
    states = []
    for steps, resume in ((4, None), (2, None), (4, folder / "cut" / "checkpoint-2")):
        callback = BalanceCallback(mb.PhiBalancing())
        out = folder / ("whole" if not states else "cut")
        trainer = plain(out, Rows(16), **settings)(tiny("qwen3_moe"), [callback], max_steps=steps)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        states.append(torch.cat([b.reshape(-1) for b in _buffers(callback.balancing)]))
    assert torch.allclose(states[0], states[2]), "the state differs after resuming"
    assert not torch.allclose(states[0], states[1]), "the state did not move"


def export(folder: Path) -> None:
    """A trained selection price is in the exported weights."""
    model = tiny("deepseek_v3")
    balancing = mb.attach(model, mb.LossFree(speed=0.1))
    loss(model, tokens()).backward()
    balancing.step()
    price = balancing.layers["model.layers.1.mlp.gate"].price
    mb.huggingface.export(model, balancing, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    bias = loaded.get_submodule("model.layers.1.mlp.gate").e_score_correction_bias
    assert price.any(), "the price did not move"
    assert torch.equal(bias.reshape(-1), -price), "the bias is not the price"


CHECKS: tuple[Callable[[Path], None], ...] = (accumulation, padding, resuming, export)


def outcome(check: Callable[[Path], None]) -> str:
    """Works, or why not."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            check(Path(folder))
        except ValueError as error:  # said by `attach`
            return f"refused: {str(error).partition(':')[0]}"
        except Exception as error:
            return f"{type(error).__name__}: {error}".partition("\n")[0]
    return "works"


def _buffers(balancing: mb.Balancing) -> list[torch.Tensor]:
    return [buffer for layer in balancing.layers.values() for buffer in layer.buffers()]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    found = {check.__name__: outcome(check) for check in CHECKS}
    print(json.dumps({"transformers": transformers.__version__, "found": found}))
