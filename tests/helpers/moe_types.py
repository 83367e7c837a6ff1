"""Small configurations of every MoE model type of mlx-lm, and checkpoints of them.

A type that mlx-lm has and that has no entry here fails `tests/models/test_model_types.py`: add its
config.json, with 8 experts of which 2 are used, and sizes that are multiples of 32.
"""

import copy
import importlib
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import quantize_model, save_config

#: Types of which no small configuration is made, and why.
WITHOUT_CONFIG = {
    "prism_hadamard_qwen35": "its packed dense weights have a manifest that only their tool writes",
    "qwen3_5": "the language model inside qwen3_5_moe, which has configurations in toys.py",
}

_T = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
_M = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}
_MLA = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 4,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 256,
    "type": "yarn",
}
_DEEPSEEK = {
    **_T,
    **_M,
    **_MLA,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.0,
    "num_hidden_layers": 3,
    "rope_scaling": _YARN,
}
_BAILING = {
    **_T,
    **_M,
    "num_experts": 8,
    "num_shared_experts": 1,
    "norm_topk_prob": True,
    "rope_theta": 1000,
    "first_k_dense_replace": 1,
}
_GLM = {
    **_T,
    **_M,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "norm_topk_prob": True,
    "head_dim": 32,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "rope_theta": 1000,
    "rope_scaling": None,
    "use_qk_norm": True,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "partial_rotary_factor": 0.5,
}
_INDEXER = {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 16}
_GEMMA = {
    **_T,
    "model_type": "gemma4_text",
    "head_dim": 16,
    "global_head_dim": 16,
    "num_global_key_value_heads": 2,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
}
_LONGCAT = {
    **_T,
    **_MLA,
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "ffn_hidden_size": 64,
    "moe_topk": 3,
    "expert_ffn_hidden_size": 64,
    "n_routed_experts": 8,
    "zero_expert_num": 4,
    "num_layers": 2,
    "routed_scaling_factor": 1.0,
    "rope_theta": 1000,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "attention_bias": False,
}
_QWEN = {
    **_T,
    **_M,
    "num_experts": 8,
    "head_dim": 32,
    "rope_theta": 1000.0,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_MISTRAL4 = {
    **_T,
    **_M,
    **_MLA,
    "model_type": "mistral4",
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "topk_group": 1,
    "n_group": 2,
    "first_k_dense_replace": 0,
    "head_dim": 48,
    "qk_head_dim": 48,
    "rope_theta": 100000.0,
    "rope_parameters": {
        **{k: v for k, v in _YARN.items() if k != "type"},
        "rope_type": "yarn",
        "rope_theta": 100000.0,
        "llama_4_scaling_beta": 0.1,
    },
}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_proj_bias": False,
    "mamba_d_state": 32,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_conv_bias": False,
}

CONFIGS: dict[str, dict] = {
    "Klear": {**_QWEN, "n_shared_experts": 1, "attention_bias": False},
    "afmoe": {
        **_T,
        **_M,
        "num_experts": 8,
        "head_dim": 32,
        "rope_theta": 100.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "sliding_window": 16,
        "num_shared_experts": 1,
    },
    "bailing_hybrid": {
        **_BAILING,
        **_MLA,
        "n_group": 2,
        "topk_group": 1,
        "layer_group_size": 2,
        "group_norm_size": 4,
        "routed_scaling_factor": 2.5,
        "head_dim": 16,
    },
    "bailing_moe": _BAILING,
    "bailing_moe_linear": {
        **_BAILING,
        "num_key_value_heads": 4,
        "layer_group_size": 2,
        "group_norm_size": 1,
        "first_k_dense_replace": 0,
    },
    "bailing_moe_v3": {
        **_BAILING,
        **_MLA,
        "moe_shared_expert_intermediate_size": 64,
        "n_group": 2,
        "topk_group": 1,
        "head_dim": 32,
        "num_hidden_layers": 4,
    },
    "deepseek": {**_T, **_M, "n_shared_experts": 1, "n_routed_experts": 8}
    | {"num_key_value_heads": 4, "first_k_dense_replace": 1},
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": {**_DEEPSEEK, **_INDEXER},
    "deepseek_v41": {
        **_T,
        **_M,
        "num_hidden_layers": 6,
        "head_dim": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "o_groups": 2,
        "o_lora_rank": 32,
        "n_routed_experts": 8,
        "sliding_window": 4,
        "compress_ratios": [0, 2, 2, 2, 1, 1],
        "kv_source_layer_ids": [1, 4],
        "index_source_layer_ids": [1, 2, 4, 5],
        "candidate_source_layer_id": 4,
        "candidate_topk_blocks": 2,
        "candidate_block_size": 2,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": 3,
    },
    "dots1": {
        **_T,
        **_M,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "rope_theta": 1000,
        "routed_scaling_factor": 1.0,
    },
    "ernie4_5_moe": {
        **_T,
        "rope_theta": 1000,
        "use_bias": False,
        "tie_word_embeddings": False,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_capacity": [],
        "moe_intermediate_size": 64,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "exaone_moe": {
        **_T,
        **_M,
        "head_dim": 32,
        "num_experts": 8,
        "num_shared_experts": 1,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "is_moe_layer": [False, True],
        "rope_theta": 1000.0,
    },
    "gemma4": {"text_config": _GEMMA, "vocab_size": 160},
    "gemma4_text": _GEMMA,
    "glm4_moe": _GLM,
    "glm4_moe_lite": {
        **_T,
        **_M,
        **_MLA,
        "n_routed_experts": 8,
        "routed_scaling_factor": 1.0,
        "rope_theta": 1000,
    },
    "glm_moe_dsa": {
        **{k: v for k, v in _DEEPSEEK.items() if k != "rope_scaling"},
        **_INDEXER,
        "moe_layer_freq": 1,
        "attention_bias": False,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "gpt_oss": {
        **_T,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 16,
        "rope_theta": 10000,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granitemoe": {
        **_T,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "rope_theta": 1000,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "granitemoehybrid": {
        **_T,
        **_MAMBA,
        "attention_bias": False,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 0.25,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
        "rope_theta": 1000.0,
    },
    "hunyuan": {
        **_T,
        "attention_bias": False,
        "moe_topk": [2, 2],
        "num_experts": 8,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "rope_theta": 1000,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    },
    "jamba": {
        **_T,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "mamba_dt_rank": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "layers_block_type": ["mamba", "attention"],
    },
    "kimi_k25": {"text_config": {**_DEEPSEEK, "model_type": "deepseek_v3"}},
    "kimi_k3": {
        "text_config": {
            **_T,
            **_MLA,
            "model_type": "kimi_linear",
            "num_hidden_layers": 4,
            "linear_attn_config": {
                "kda_layers": [1, 2, 3],
                "full_attn_layers": [4],
                "num_heads": 2,
                "head_dim": 32,
                "short_conv_kernel_size": 4,
                "gate_lower_bound": -5.0,
                "use_full_rank_gate": True,
            },
            "hidden_act": "situ",
            "activation_situ_beta": 4.0,
            "activation_situ_linear_beta": 25.0,
            "attn_res_block_size": 2,
            "mla_use_nope": True,
            "mla_use_output_gate": True,
            "num_experts": 8,
            "num_experts_per_token": 2,
            "num_shared_experts": 1,
            "moe_intermediate_size": 64,
            "moe_router_activation_func": "sigmoid",
            "moe_renormalize": True,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "use_grouped_topk": True,
            "num_expert_group": 1,
            "topk_group": 1,
            "routed_expert_hidden_size": 32,
            "latent_moe_use_norm": True,
            "tie_word_embeddings": False,
        }
    },
    "kimi_linear": {
        **_T,
        **{k: v for k, v in _MLA.items() if k != "q_lora_rank"},
        "head_dim": 32,
        "rope_theta": 100.0,
        "linear_attn_config": {"num_heads": 4, "head_dim": 32, "kda_layers": [1]},
        "model_max_length": 1024,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 3,
    },
    "kimi_vl": {"text_config": {**_DEEPSEEK, "n_group": 1, "rope_scaling": None}},
    "laguna": {
        **_T,
        **_M,
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"],
        "num_attention_heads_per_layer": [4, 4],
        "mlp_layer_types": ["dense", "sparse"],
        "num_experts": 8,
        "shared_expert_intermediate_size": 64,
    },
    "lfm2_moe": {
        **_T,
        **_M,
        "num_experts": 8,
        "norm_topk_prob": True,
        "use_expert_bias": True,
        "num_dense_layers": 1,
        "norm_eps": 1e-5,
        "conv_bias": True,
        "conv_L_cache": 3,
        "rope_theta": 10000,
        "full_attn_idxs": [0, 2],
        "num_hidden_layers": 3,
    },
    "llama4": {
        "text_config": {
            **_T,
            "model_type": "llama4",
            "attention_bias": False,
            "attention_chunk_size": 8,
            "head_dim": 16,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 64,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 4,
            "num_local_experts": 8,
            "rope_scaling": None,
            "rope_theta": 1000,
            "use_qk_norm": True,
            "attn_temperature_tuning": 4,
            "floor_scale": 8192,
            "attn_scale": 0.1,
        }
    },
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": _LONGCAT,
    "mellum": {
        **_T,
        **_M,
        "num_experts": 8,
        "head_dim": 16,
        "tie_word_embeddings": False,
        "norm_topk_prob": True,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            k: {"rope_theta": 10000.0, "rope_type": "default"}
            for k in ("sliding_attention", "full_attention")
        },
    },
    "mimo_v2_flash": {
        **_T,
        **_M,
        "hybrid_layer_pattern": [0, 1, 0],
        "moe_layer_freq": [0, 1, 1],
        "num_hidden_layers": 3,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 16,
        "n_shared_experts": 1,
        "n_routed_experts": 8,
        "routed_scaling_factor": None,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "n_group": 2,
        "topk_group": 1,
        "layernorm_epsilon": 1e-5,
        "rope_theta": 1000.0,
        "swa_rope_theta": 1000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "head_dim": 32,
        "v_head_dim": 16,
        "swa_head_dim": 32,
        "swa_v_head_dim": 16,
        "partial_rotary_factor": 0.5,
        "attention_value_scale": 0.707,
    },
    "minimax": {
        **_T,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "shared_intermediate_size": 64,
        "rope_theta": 1000,
        "rotary_dim": 16,
    },
    "minimax_m3_vl": {
        "text_config": {
            **_T,
            "model_type": "minimax_m3_vl",
            "dense_intermediate_size": 64,
            "shared_intermediate_size": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rope_theta": 1000.0,
            "head_dim": 16,
            "rotary_dim": 8,
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": False,
            "routed_scaling_factor": 2.0,
            "use_qk_norm": True,
            "use_gemma_norm": True,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "moe_layer_freq": [0, 1],
            "index_local_blocks": 1,
        }
    },
    "mistral3": {"text_config": _MISTRAL4},
    "mistral4": _MISTRAL4,
    "mixtral": {**_T, "num_local_experts": 8, "num_experts_per_tok": 2},
    "muse_spark": {
        "text_config": {
            **_T,
            **_M,
            "head_dim": 16,
            "post_norm_eps": 1e-8,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "layer_rope_theta": [10000.0, 0],
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 8,
            "final_logit_softcapping": 20.0,
            "output_multiplier": 0.7071067811865476,
            "num_local_experts": 8,
            "moe_hidden_size": 32,
            "routed_scaling_factor": 1.5,
        },
        "image_token_id": 159,
    },
    "nemotron_h": {
        **_T,
        **_M,
        "attention_bias": False,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 2,
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "hybrid_override_pattern": ["M", "E", "*", "E"],
        "num_hidden_layers": 4,
        "head_dim": 16,
        "moe_shared_expert_intermediate_size": 32,
        "moe_latent_size": 32,
        "n_group": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    "olmoe": {**_T, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "phimoe": {
        **_T,
        "num_local_experts": 8,
        "rope_theta": 1000.0,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "short_mscale": 1.0,
            "long_mscale": 1.0,
            "original_max_position_embeddings": 256,
        },
    },
    "phixtral": {
        "num_vocab": 160,
        "model_dim": 64,
        "num_heads": 4,
        "num_layers": 2,
        "rotary_dim": 16,
        "num_local_experts": 8,
    },
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 64},
    "qwen3_5_moe": {
        "text_config": {
            **_QWEN,
            "model_type": "qwen3_5_moe_text",
            "shared_expert_intermediate_size": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4,
            "full_attention_interval": 2,
            "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25},
        }
    },
    "qwen3_moe": _QWEN,
    "qwen3_next": {
        **_QWEN,
        "shared_expert_intermediate_size": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 2,
        "partial_rotary_factor": 0.25,
    },
    "qwen3_vl_moe": {"text_config": {**_QWEN, "model_type": "qwen3_moe"}},
    "solar_open": _GLM,
    "step3p5": {
        **{k: v for k, v in _T.items() if k != "num_key_value_heads"},
        "num_attention_groups": 2,
        "head_dim": 16,
        "sliding_window": 4,
        "num_hidden_layers": 3,
        "partial_rotary_factors": [1.0, 1.0, 1.0],
        "moe_num_experts": 8,
        "moe_top_k": 2,
        "moe_intermediate_size": 64,
        "share_expert_dim": 64,
        "moe_layers_enum": "1,2",
    },
}


def config_of(name: str) -> dict:
    """Return the config.json of a small model of a type."""
    return copy.deepcopy({"model_type": name, **CONFIGS[name]}) | {"model_type": name}


def write_moe(
    directory: Path, name: str, *, bits: int | None = None, mode: str = "affine", **fields
) -> Path:
    """Write a checkpoint of random weights, as mlx-lm writes it, and return its directory.

    Args:
        bits: None leaves it unquantised.
        fields: replace fields of config.json.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = config_of(name) | fields
    module = importlib.import_module(f"mlx_lm.models.{name}")
    model = module.Model(module.ModelArgs.from_dict(copy.deepcopy(config)))
    model.update(tree_unflatten(_weights(model)))
    if bits is not None:
        group = 16 if mode == "nvfp4" else 32
        model, config = quantize_model(model, config, group, bits, mode=mode)
    mx.save_safetensors(
        str(directory / "model.safetensors"), dict(tree_flatten(model.parameters()))
    )
    save_config(config, directory / "config.json")
    return directory


def _weights(model) -> list[tuple[str, mx.array]]:
    """Return weights that keep activations near 1 and let each token choose other experts."""
    weights = []
    key = mx.random.key(7)
    for name, old in sorted(tree_flatten(model.parameters())):
        if not mx.issubdtype(old.dtype, mx.floating):
            weights.append((name, old))
            continue
        key, sub = mx.random.split(key)
        noise = mx.random.normal(old.shape, key=sub)
        if name.endswith("A_log"):
            new = mx.abs(noise)
        elif "norm" in name or (old.ndim == 1 and not name.endswith("bias")):
            new = 1 + 0.1 * noise
        elif old.ndim == 1 or name.endswith("bias"):
            new = 0.1 * noise
        else:
            router = name.endswith(("gate.weight", "router.weight", "classifier.weight"))
            new = (3 if router else 1) * noise * old.shape[-1] ** -0.5
        dtype = mx.float32 if old.ndim == 1 else mx.bfloat16
        weights.append((name, new.astype(dtype)))
    return weights
