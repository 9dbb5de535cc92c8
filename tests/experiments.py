"""A small recipe on two domains of words, for the tests of the main job."""

from __future__ import annotations

import json
from pathlib import Path

from moebalance.lab.recipe import Recipe

MODEL = {
    "architecture": "qwen3_moe",
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
}


def write_text(root: Path) -> Path:
    """Two domains of a few files each."""
    for domain, words in {"animals": "cat dog bird fish ", "numbers": "1 23 456 7890 "}.items():
        (root / domain).mkdir()
        for part in range(6):
            (root / domain / f"{part}.txt").write_text(f"{part} {words * 200}")
    return root


def small(text: Path) -> Recipe:
    """Six steps of two micro-batches; two methods to compare."""
    return Recipe.parse(
        {
            "name": "small",
            "model": MODEL,
            "data": {"source": str(text), "seq_len": 32},
            "train": {
                "steps": 6,
                "batch_size": 2,
                "accumulation": 2,
                "eval_sequences": 8,
                "snapshot_every": 3,
            },
            "compare": {"methods": ["none", "phi"], "seeds": [0], "batching": ["one-domain"]},
        },
        source="small.toml",
    )


def write_toml(path: Path, text: Path, steps: int = 3) -> Path:
    model = "\n".join(f"{key} = {json.dumps(value)}" for key, value in MODEL.items())
    path.write_text(
        f"[model]\n{model}\n[data]\nsource = {json.dumps(str(text))}\nseq_len = 32\n"
        f"[train]\nsteps = {steps}\nbatch_size = 2\neval_sequences = 4\n[method]\nname = 'phi'\n"
    )
    return path
