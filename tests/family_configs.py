"""Settings of the tiny models in `families.py`: what each family adds to `SHARED`.

Every model is as small as its code allows: 8 experts, 2 for each token and 2 routers, unless
`families.EXPECTED` says otherwise; 4 groups of experts, 2 of them open, where a family has groups;
no dropout and no jitter. Only common families have a layer without experts before their two with:
to trace one more layer is what costs time, and not how large its tensors are.
"""

VOCABULARY = 64

Settings = dict[str, object]

SHARED: Settings = {
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

# How families name the number of experts and of layers, and the experts' width.
_TWO: Settings = {"num_hidden_layers": 2, "num_experts_per_tok": 2}
_TOPK: Settings = {"num_hidden_layers": 2, "moe_topk": 2, "intermediate_size": 16}
_LOCAL = {**_TWO, "intermediate_size": 16, "num_local_experts": 8}
_NUMBERED = {**_TWO, "intermediate_size": 32, "moe_intermediate_size": 16, "num_experts": 8}
_ROUTED = {
    **_TWO,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
}
_ERNIE: Settings = {
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "moe_num_experts": 8,
    "moe_k": 2,
    "moe_num_shared_experts": 1,
}
_SHARED_EXPERT: Settings = {"shared_expert_intermediate_size": 16}
_DENSE_FIRST: Settings = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
_ALL_SPARSE: Settings = {"first_k_dense_replace": 0}
_SPARSE: Settings = {"mlp_layer_types": ["sparse", "sparse"]}
_GROUPS: Settings = {"n_group": 4, "topk_group": 2}
_ONE_GROUP: Settings = {"n_group": 1, "topk_group": 1}

# Kinds of attention and their small parts.
_HEAD: Settings = {"head_dim": 16}
_LATENT: Settings = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_INDEXER: Settings = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
_MIXED: Settings = {"hc_mult": 2, "hc_sinkhorn_iters": 2}  # residual streams
_DELTA: Settings = {
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_conv_kernel_dim": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
_ROPE: Settings = {"rope_type": "default", "rope_theta": 10_000.0}
_KIMI_DELTA: Settings = {"linear_head_dim": 8, "linear_num_heads": 2, "linear_conv_kernel_dim": 2}
_FULL: Settings = {"layer_types": ["full_attention", "full_attention"]}
_GRANITE = {**_LOCAL, "shared_intermediate_size": 16}
_OCR = {**_ROUTED, **_SPARSE, **_GROUPS, "topk_method": "group_limited_greedy"}
_DEEPSEEK = {**_ROUTED, **_LATENT}
_SPARSE_ATTENTION = {**_ROUTED, **_SPARSE, **_LATENT, **_INDEXER, **_GROUPS}
_GEMMA: Settings = {
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "top_k_experts": 2,
    "enable_moe_block": True,
    "head_dim": 16,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCABULARY,
    **_FULL,
}
_INKLING: Settings = {
    **_TWO,
    **_HEAD,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "d_rel": 4,
    "rel_extent": 16,
    "conv_kernel_size": 2,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
}

COMMON_FAMILIES: dict[str, Settings] = {
    "mixtral": _LOCAL,
    "qwen2_moe": {**_NUMBERED, **_SHARED_EXPERT},
    "qwen3_moe": {**_NUMBERED, **_HEAD},
    "olmoe": {**_TWO, "intermediate_size": 16, "num_experts": 8},
    "gpt_oss": {**_LOCAL, **_HEAD, "rope_parameters": {"rope_type": "default"}},
    "deepseek_v2": {**_DEEPSEEK, **_DENSE_FIRST, **_ONE_GROUP, "topk_method": "greedy"},
    "deepseek_v3": {**_DEEPSEEK, **_DENSE_FIRST, **_GROUPS},
    "glm4_moe": {**_ROUTED, **_DENSE_FIRST, **_ONE_GROUP, **_HEAD},
    "granitemoe": _LOCAL,
    "jamba": {
        **_TWO,
        "num_hidden_layers": 4,
        "intermediate_size": 16,
        "num_experts": 8,
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
        **_ERNIE,
        "num_hidden_layers": 3,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 1,
    },
    "minimax": {**_LOCAL, "block_size": 8, "layer_types": ["full_attention", "linear_attention"]},
}

OTHER_FAMILIES: dict[str, Settings] = {
    "afmoe": {**_NUMBERED, **_HEAD, "num_dense_layers": 0, "num_shared_experts": 1},
    "aria_text": {**_TOPK, "moe_num_experts": 8, "moe_num_shared_experts": 1},
    "axk1": {**_ROUTED, **_SPARSE, **_LATENT, **_GROUPS},
    "axk2": {**_SPARSE_ATTENTION, "gated_norm_rank": 4},
    "bailing_hybrid": {
        **_ROUTED,
        **_ALL_SPARSE,
        **_LATENT,
        **_GROUPS,
        "num_local_experts": 8,
        "head_dim": 8,
        "short_conv_kernel_size": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "beam": {**_NUMBERED, **_SPARSE, **_HEAD, **_GROUPS, **_FULL},
    "cohere2_moe": {**_NUMBERED, **_SPARSE, **_HEAD, "num_shared_experts": 1},
    "dbrx": {
        "d_model": 32,
        "n_heads": 2,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": _OCR,
    "deepseek_v32": _SPARSE_ATTENTION,
    "deepseek_v4": {
        **_TWO,
        **_HEAD,
        **_INDEXER,
        **_MIXED,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "q_lora_rank": 8,
        "o_lora_rank": 8,
        "o_groups": 2,
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "layer_types": ["sliding_attention"] * 3,
    },
    "diffusion_gemma_text": _GEMMA,
    "doge": {**_TWO, "intermediate_size": 16, "is_moe": True, "num_experts": 16},
    "dots1": {**_ROUTED, **_ALL_SPARSE, **_GROUPS},
    "dots3_note_text": {
        **_SPARSE_ATTENTION,
        "shared_experts_intermediate_size": 16,
        "layer_types": ["indexed_attention"] * 2,
    },
    "ernie4_5_vl_moe_text": {
        **_ERNIE,
        **_SPARSE,
        "moe_intermediate_size": [16, 16],  # of text and of images
        "rope_parameters": {**_ROPE, "mrope_section": [2, 2, 4]},
    },
    "exaone_moe": {**_NUMBERED, **_SPARSE, **_GROUPS, "sliding_window": 8},
    "flex_olmo": {**_TWO, "intermediate_size": 16, "num_experts": 8},
    "flint": {**_NUMBERED, **_SHARED_EXPERT, **_HEAD, "mlp_only_layers": []},
    "gemma4_text": _GEMMA,
    "glm4_moe_lite": {**_ROUTED, **_SPARSE, **_LATENT, **_GROUPS},
    "glm4v_moe_text": {
        **_ROUTED,
        **_ALL_SPARSE,
        **_GROUPS,
        "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]},
    },
    "glm5_next_text": {
        **_SPARSE_ATTENTION,
        **_KIMI_DELTA,
        **_MIXED,
        "qk_rope_head_dim": 0,
        "index_kpool": 4,
        "layer_types": ["indexed_attention", "linear_attention"],
    },
    "glm_moe_dsa": _SPARSE_ATTENTION,
    "granitemoe_swa": _GRANITE,
    "granitemoehybrid": {
        **_GRANITE,
        "mamba_n_heads": 4,
        "mamba_d_state": 4,
        "mamba_d_conv": 2,
        "mamba_expand": 1,
        "mamba_chunk_size": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "granitemoeshared": _GRANITE,
    "hunyuan_v1_moe": {**_TOPK, **_HEAD, "num_experts": 8},
    "hy_v3": {**_NUMBERED, **_SPARSE, **_HEAD},
    "hy_v4": {**_SPARSE_ATTENTION, "hc_mult": 2, "head_dim": 16},
    "inkling2_text": {**_INKLING, "n_layers_per_attn_res_block": 1},
    "inkling_text": {
        **_INKLING,
        **_SPARSE,
        "intermediate_size": 32,
        "n_shared_experts": 1,
        "unpadded_vocab_size": VOCABULARY,
    },
    "jetmoe": {**_LOCAL, "kv_channels": 8},
    "kimi_linear": {
        **_ROUTED,
        **_SPARSE,
        **_LATENT,
        **_GROUPS,
        **_KIMI_DELTA,
        "num_local_experts": 8,
        "q_lora_rank": None,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "kolibri1": {**_NUMBERED, **_SHARED_EXPERT, **_HEAD},
    "laguna": {**_NUMBERED, **_SPARSE, **_SHARED_EXPERT, **_HEAD, **_FULL},
    "lfm2_moe": {
        **_NUMBERED,
        "num_dense_layers": 0,
        "layer_types": ["conv", "full_attention"],
    },
    "llama4_text": {**_LOCAL, **_HEAD, "intermediate_size_mlp": 32, "num_experts_per_tok": 1},
    "longcat_flash": {
        **_LATENT,
        "num_layers": 2,
        "ffn_hidden_size": 32,
        "expert_ffn_hidden_size": 16,
        "n_routed_experts": 8,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "head_dim": 8,
    },
    "mellum": {**_NUMBERED, **_HEAD},
    "mimo_v2_flash": {
        **_ROUTED,
        **_SPARSE,
        **_GROUPS,
        **_HEAD,
        "v_head_dim": 16,
        "num_key_value_heads": 1,  # its sliding layers have twice as many
    },
    "minimax_m2": {**_LOCAL, **_HEAD},
    "minimax_m3_vl_text": {
        **_LOCAL,
        **_SPARSE,
        **_HEAD,
        **_FULL,
        "rotary_dim": 8,
        "dense_intermediate_size": 32,
        "shared_intermediate_size": 16,
    },
    "mistral4": {**_DEEPSEEK, **_GROUPS},
    "mistral_large4_text": _SPARSE_ATTENTION,
    "muse_spark_text": {
        **_LOCAL,
        **_SPARSE,
        **_HEAD,
        **_FULL,
        "moe_intermediate_size": 16,
        "moe_hidden_size": 16,
    },
    "nemotron_h": {
        **_ROUTED,
        **_GROUPS,
        **_HEAD,
        "ssm_state_size": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "conv_kernel": 2,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    },
    "nllb-moe": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
        "num_experts": 8,
        **dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop", "dropout"), 0.0),
        **dict.fromkeys(("attention_dropout", "moe_token_dropout"), 0.0),
    },
    "openai_privacy_filter": {**_LOCAL, **_HEAD, "num_labels": 5},
    # Not a jitter: experts within this distance of the best share in its gradient.
    "phimoe": {**_LOCAL, "router_jitter_noise": 1.0},
    "qwen3_5_moe_text": {**_NUMBERED, **_SHARED_EXPERT, **_DELTA},
    "qwen3_next": {**_NUMBERED, **_SHARED_EXPERT, **_DELTA},
    "qwen3_omni_moe_talker_text": {**_NUMBERED, **_SHARED_EXPERT},
    "qwen3_omni_moe_text": _NUMBERED,
    "qwen3_vl_moe_text": {**_NUMBERED, **_HEAD},
    "qwen4_exp_text": {
        **_NUMBERED,
        **_SHARED_EXPERT,
        **_DELTA,
        "hc_count": 2,
        "hc_lowrank": 8,
        "layer_types": ["linear_attention", "linear_attention"],
    },
    "solar_open": {**_ROUTED, **_GROUPS, **_HEAD},
    "step3p5": {**_ROUTED, **_SPARSE, **_HEAD, "share_expert_dim": 16, "sliding_window": 8},
    "switch_transformers": {
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 16,
        "num_heads": 2,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_experts": 8,
        "dropout_rate": 0.0,
        "router_jitter_noise": 0.0,
        "decoder_start_token_id": 0,
    },
    "unlimited_ocr_text": _OCR,
    "zaya": {**_NUMBERED, **_HEAD, "num_experts_per_tok": 1, "router_hidden_size": 16},
}

# From Transformers 5.24 on.
NEWER_FAMILIES: dict[str, Settings] = {
    "hy_v4_vl_text": {
        **_SPARSE_ATTENTION,
        "hc_mult": 2,
        "rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]},
    },
    # Its second layer is looped: its router is called twice in a forward.
    "inkling2_loop_text": {
        **_INKLING,
        "unpadded_vocab_size": VOCABULARY,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "loop_num_passes": 2,
        "loop_gate_rank": 4,
    },
    "lara_mini": {**_NUMBERED, **_SHARED_EXPERT, **_DELTA},
    "sarvam_mla": {**_DEEPSEEK, **_ALL_SPARSE, **_GROUPS},
    "sarvam_moe": {**_ROUTED, **_ALL_SPARSE, **_ONE_GROUP, **_HEAD},
}
