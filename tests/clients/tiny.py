"""A tiny Mixture-of-Experts model on disk, its byte tokenizer, and what it is trained on.

Runs in each client's environment; imports nothing of this repository.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

LAYERS, EXPERTS = 2, 8
PAD, END = "<pad>", "<end>"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}<end>{% else %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ROWS = [
    {
        "prompt": f"Say {word} {n} times.",
        "chosen": f"{word} " * n,
        "rejected": f"no{word} " * (n % 3),
    }
    for n, word in enumerate(("oak", "elm", "ash", "yew", "fir", "box", "bay", "fig") * 2, start=1)
]
"""Rows of unequal length, so that batches are padded and packs are not full."""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, one for padding, one for the end."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), PAD, END]
    bare = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bare.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token=PAD, eos_token=END)
    made.chat_template = TEMPLATE
    return made


def model(words: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """Two layers of eight experts."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    return Qwen3MoeForCausalLM(config)


def save(folder: Path) -> None:
    """Model, tokenizer, and conversations as `sft.jsonl` and `dpo.jsonl`."""
    words = tokenizer()
    words.save_pretrained(folder)
    model(words).save_pretrained(folder)
    _write(folder / "sft.jsonl", [{"messages": _talk(r["prompt"], r["chosen"])} for r in ROWS])
    pairs = [
        {
            "messages": _talk(row["prompt"], row["chosen"]),
            "rejected_response": row["rejected"],
            "conversations": _talk(row["prompt"]),
            "chosen": {"role": "assistant", "content": row["chosen"]},
            "rejected": {"role": "assistant", "content": row["rejected"]},
        }
        for row in ROWS
    ]
    _write(folder / "dpo.jsonl", pairs)


def _talk(*turns: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
