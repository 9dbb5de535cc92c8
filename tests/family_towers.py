"""Settings of whole models with a vision tower; their text parts are in `family_configs.py`."""

from family_configs import _GEMMA, _HEAD, _TWO, OTHER_FAMILIES, Settings

# `SHARED` and the changes of a caller go to their text part.
_TOWER: Settings = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
MULTIMODAL_FAMILIES: dict[str, Settings] = {
    "gemma4": {
        "text_config": _GEMMA,
        "vision_config": {
            **_TWO,
            **_HEAD,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "position_embedding_size": 16,
        },
    },
    "llama4": {
        "text_config": OTHER_FAMILIES["llama4_text"],
        "vision_config": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "vision_output_dim": 16,
            "image_size": 28,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
    },
    "qwen3_5_moe": {"text_config": OTHER_FAMILIES["qwen3_5_moe_text"], "vision_config": _TOWER},
    "qwen3_vl_moe": {
        "text_config": OTHER_FAMILIES["qwen3_vl_moe_text"],
        "vision_config": {**_TOWER, "deepstack_visual_indexes": [0]},
    },
}
