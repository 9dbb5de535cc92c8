"""What the runs of every client have in common."""

from typing import Any

TRAINER: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 1,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
}
"""By their names in Transformers' `TrainingArguments`."""

STRENGTH = 0.01
LENGTH, PACK = 256, 128
"""Tokens of a row at most, and of a pack."""
LORA_LAYERS = ["q_proj", "v_proj"]
