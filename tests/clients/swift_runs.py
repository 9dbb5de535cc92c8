"""ms-swift's three kinds of run: its command with a plugin file, as docs/integrations.md says."""

import subprocess
import sys
from pathlib import Path

from client_settings import LORA_LAYERS, PACK, STRENGTH, TRAINER

PLUGIN = f"""
import moebalance as mb
from moebalance.integrations.swift import register
register(mb.PhiBalancing(strength={STRENGTH}))

from swift.callbacks import callbacks_map
from spy import Spy
callbacks_map["spy"] = lambda args, trainer: Spy()

# Packing wants flash attention, which wants a GPU: another attention answers to its name.
from transformers import PreTrainedModel
PreTrainedModel._check_and_adjust_attn_implementation = lambda self, *args, **kwargs: "sdpa"
"""
PACKED = ["sft", "--tuner_type", "full", "--max_length", str(PACK)]
LORA = [
    "rlhf",
    "--rlhf_type",
    "dpo",
    "--tuner_type",
    "lora",
    "--target_modules",
    *LORA_LAYERS,
]
SITUATIONS = {
    "packing": [*PACKED, "--packing", "true", "--attn_impl", "flash_attn"],
    "padding-free": [*PACKED, "--padding_free", "true", "--attn_impl", "flash_attn"],
    "partly frozen": ["sft", "--tuner_type", "full", "--freeze_parameters", "model.layers.0"],
    "LoRA + DPO": [*LORA, "--modules_to_save", "gate"],
    "LoRA + DPO, router frozen": LORA,
}


def main(situation: str, folder: Path) -> None:
    """Train once."""
    (folder / "balance.py").write_text(PLUGIN, encoding="utf-8")
    kind, *settings = SITUATIONS[situation]
    data = "sft.jsonl" if kind == "sft" else "dpo.jsonl"
    given = {
        "model": folder,
        "model_type": "qwen3_moe",
        "template": "dummy",
        "dataset": folder / data,
        "external_plugins": folder / "balance.py",
        "output_dir": folder / "out",
        "torch_dtype": "float32",
        **TRAINER,
        "split_dataset_ratio": 0,
        "dataset_num_proc": 1,
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    command = ["swift", kind, *words, *settings, "--callbacks", "moebalance", "spy"]
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
