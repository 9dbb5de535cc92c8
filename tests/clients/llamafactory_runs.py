"""LLaMA-Factory's three kinds of run: `run_exp` with a callback, as docs/integrations.md says."""

import json
import sys
from pathlib import Path

from client_settings import LENGTH, LORA_LAYERS, PACK, STRENGTH, TRAINER
from llamafactory.train.tuner import run_exp  # before torch is set up by others
from spy import Spy

import moebalance as mb

PACKED = {"stage": "sft", "finetuning_type": "full", "packing": True, "cutoff_len": PACK}
LORA = {"finetuning_type": "lora", "lora_target": ",".join(LORA_LAYERS), "lora_rank": 4}
SITUATIONS = {
    "packing": PACKED,
    "neat packing": {**PACKED, "neat_packing": True},
    "partly frozen": {"stage": "sft", "finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "LoRA + DPO": {"stage": "dpo", **LORA, "additional_target": "gate"},
    "LoRA + DPO, router frozen": {"stage": "dpo", **LORA},
}


def _datasets(folder: Path) -> None:
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user"}
    tags = {**tags, "assistant_tag": "assistant"}
    sft = {"file_name": "sft.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}}
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    dpo = {"file_name": "dpo.jsonl", "formatting": "sharegpt", "ranking": True, "columns": columns}
    info = {"sft": {**sft, "tags": tags}, "dpo": {**dpo, "tags": tags}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def main(situation: str, folder: Path) -> None:
    """Train once."""
    _datasets(folder)
    settings = {
        "model_name_or_path": str(folder),
        "dataset_dir": str(folder),
        "template": "default",
        "do_train": True,
        "output_dir": str(folder / "out"),
        "cutoff_len": LENGTH,
        **TRAINER,
        **SITUATIONS[situation],
    }
    settings["dataset"] = settings["stage"]
    balance = mb.huggingface.BalanceCallback(mb.PhiBalancing(strength=STRENGTH))
    run_exp(settings, callbacks=[balance, Spy()])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
