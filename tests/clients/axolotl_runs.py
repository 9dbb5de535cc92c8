"""axolotl's three kinds of run: its command with a plugin, as docs/integrations.md says."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from client_settings import LENGTH, LORA_LAYERS, PACK, STRENGTH, TRAINER

SHARED = ("gradient_accumulation_steps", "learning_rate", "logging_steps", "use_cpu")
"""What axolotl calls as Transformers does."""
SFT = {"datasets": [{"type": "chat_template", "field_messages": "messages"}]}
PAIRS = {"type": "chat_template.default", "field_messages": "conversations"}
DPO = {"rl": "dpo", "datasets": [{**PAIRS, "split": "train"}]}
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_modules": LORA_LAYERS,
}
SITUATIONS: dict[str, dict[str, Any]] = {
    "packing": {**SFT, "sample_packing": True, "pad_to_sequence_len": True, "sequence_len": PACK},
    "partly frozen": {**SFT, "unfrozen_parameters": ["model.layers.1.*", "lm_head.weight"]},
    "LoRA + DPO": {**DPO, **LORA, "lora_modules_to_save": ["gate"]},
    "LoRA + DPO, router frozen": {**DPO, **LORA},
}
PLUGIN = """
from axolotl.integrations.base import BasePlugin
from spy import Spy

class SpyPlugin(BasePlugin):
    def add_callbacks_post_trainer(self, cfg, trainer):
        return [Spy()]
"""


def main(situation: str, folder: Path) -> None:
    """Train once."""
    (folder / "spying.py").write_text(PLUGIN, encoding="utf-8")
    own = SITUATIONS[situation]
    data = str(folder / ("dpo.jsonl" if "rl" in own else "sft.jsonl"))
    settings = {
        "base_model": str(folder),
        "plugins": ["moebalance.integrations.axolotl.MoebalancePlugin", "spying.SpyPlugin"],
        "moebalance": {"method": "phi", "strength": STRENGTH},
        "chat_template": "tokenizer_default",
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        "sequence_len": LENGTH,
        "micro_batch_size": TRAINER["per_device_train_batch_size"],
        "num_epochs": TRAINER["num_train_epochs"],
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "val_set_size": 0,
        **{name: TRAINER[name] for name in SHARED},
        **own,
    }
    settings["datasets"] = [
        {"path": data, "ds_type": "json", **each} for each in settings["datasets"]
    ]
    (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = ["axolotl", "train", str(folder / "run.yaml"), "--launcher", "python"]
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
