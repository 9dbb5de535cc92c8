"""Tiny random models of the Transformers families that the tests attach to."""

import warnings

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 64

_SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
_DEEPSEEK = {
    "num_hidden_layers": 3,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_LOCAL = {
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_QWEN = {
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}

FAMILIES: dict[str, dict[str, object]] = {
    "mixtral": _LOCAL,
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**_QWEN, "head_dim": 16},
    "olmoe": {
        "num_hidden_layers": 2,
        "intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "gpt_oss": {**_LOCAL, "head_dim": 16, "rope_parameters": {"rope_type": "default"}},
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**_DEEPSEEK, "n_group": 4, "topk_group": 2},
    "glm4_moe": {
        "num_hidden_layers": 3,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 16,
    },
    "granitemoe": _LOCAL,
    "jamba": {
        "num_hidden_layers": 4,
        "intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 0,
        "mamba_d_state": 4,
        "mamba_d_conv": 2,
        "mamba_expand": 1,
        "mamba_dt_rank": 4,
    },
    "ernie4_5_moe": {
        "num_hidden_layers": 3,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "minimax": {**_LOCAL, "block_size": 8, "layer_types": ["full_attention", "linear_attention"]},
}


def tiny(family: str, **changes: object) -> PreTrainedModel:
    """A model with the same random weights at every call, in training mode, without dropout."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the families' own advice on their own settings
        config = AutoConfig.for_model(family, **{**_SHARED, **FAMILIES[family], **changes})
        return AutoModelForCausalLM.from_config(config).train()


def tokens(batch: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    """Token ids (batch, length) without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)
