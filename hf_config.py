"""The dialects of Hugging Face's config.json: to model.py's ModelConfig and back, with nothing lost unseen.

A file may leave out what its family's code has as default, and names have changed: RoPE's base and scaling stand in
`rope_theta` and `rope_scaling`, or in one `rope_parameters`; experts are counted by `num_experts` or by
`num_local_experts`. Any field may change what the model computes. So each one is taken over, checked by value, or known
to be without effect; what is none of these is refused by name.

    fields_of(config, known)   config.json's dict -> keyword arguments of ModelConfig
    config_of(fields)          those of a ModelConfig -> config.json's dict, as transformers 4 and 5 read it
    extend_context(config, n)  a ModelConfig for longer texts, by RoPE scaling
"""

import dataclasses

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MOE = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef", "router_z_loss_coef",
       "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")  # Mixtral: the first 4
OURS = ("qk_norm", "n_shared_experts", "position_embedding_type", "attn_logit_softcapping", "final_logit_softcapping")
NOT_WRITTEN = ("attention", "kernels")  # how to compute, not what
UNWRITTEN = {  # what transformers takes where a file is silent, if it is not ModelConfig's default
    "mistral": {"sliding_window": 4096},
    "qwen3": {"head_dim": 128},
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False}}
MUST_BE = {"hidden_act": ("silu", "swish"), "mlp_bias": (False,), "partial_rotary_factor": (1, None),
           "router_jitter_noise": (0, None), "rope_interleaved": (False,), "use_mrope": (False,)}
TAKEN_APART = {"model_type", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "num_local_experts",
               "layer_types", "use_sliding_window", "max_window_layers"}
WITHOUT_EFFECT = {"architectures", "torch_dtype", "dtype", "transformers_version", "transformers.js_config",
                  "use_cache", "pretraining_tp", "_name_or_path", "output_router_logits", "is_llama_config",
                  "unk_token_id", "return_dict", "output_attentions", "output_hidden_states", "max_sequence_length",
                  "_attn_implementation_autoset", "unsloth_version", "unsloth_fixed"}


def fields_of(config: dict, known: set[str]) -> dict:
    """Keyword arguments of ModelConfig, whose fields are `known`. ValueError names what is missing, or would change the
    forward pass unseen."""
    family = config["model_type"]
    needed = SIZES if family == "llama" else (*SIZES, "num_key_value_heads")
    if silent := [name for name in needed if config.get(name) is None]:  # ModelConfig's defaults are not HF's
        raise ValueError(f"config.json: {', '.join(silent)} must be given")
    known = known - {*NOT_WRITTEN} - (set() if family == "glassbox" else {"qk_norm"})
    values = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False, "max_position_embeddings": 2048}
    values |= UNWRITTEN.get(family, {}) | {name: config[name] for name in known & config.keys()}
    if "num_local_experts" in config:
        values["num_experts"] = config["num_local_experts"]

    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})  # the older, the newer dialect
    values["rope_theta"] = float(rope.pop("rope_theta", values["rope_theta"]))
    partial = rope.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    if "original_max_position_embeddings" in config:
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    if rope.get("rope_type", rope.get("type")) == "dynamic":  # a file has the trained length, ModelConfig the new
        rope["original_max_position_embeddings"] = values["max_position_embeddings"]
        values["max_position_embeddings"] = round(values["max_position_embeddings"] * rope.get("factor", 1))
    values["rope_scaling"] = rope

    if family != "glassbox":
        values["qk_norm"] = family.startswith("qwen3")
    if family == "qwen2":
        values["attention_bias"] = True  # on q, k and v; its config.json does not say so
    if family.startswith("qwen") and not config.get("use_sliding_window", False):
        values["sliding_window"] = None
    windowed = values.get("sliding_window") is not None  # in all layers, or in none:
    must_be = MUST_BE | ({"max_window_layers": (0, None)} if windowed and family != "qwen3_moe" else {})
    for name, value in (config | {"partial_rotary_factor": partial}).items():
        if name in must_be and value not in must_be[name]:
            raise ValueError(f"config.json: {name} = {value!r} is not supported; it must be {must_be[name][0]!r}")
    layer_types = set(config.get("layer_types") or [])
    if layer_types - {"sliding_attention" if windowed else "full_attention"}:
        raise ValueError(f"config.json: layer_types {sorted(layer_types)}: not supported; all must be alike")
    if odd := config.keys() - known - must_be.keys() - TAKEN_APART - WITHOUT_EFFECT:
        raise ValueError(f"config.json: {', '.join(sorted(odd))}: unknown here, and may change what the model computes")
    return values


def config_of(fields: dict) -> dict:
    """config.json's dict, but for `architectures`."""
    family, scaling = fields["model_type"], dict(fields["rope_scaling"] or {})
    unsaid = {"mixtral": OURS + MOE[4:], "qwen3_moe": OURS, "glassbox": ()}.get(family, OURS + MOE)
    unsaid += {"qwen2": ("attention_bias",), "llama": ("sliding_window",)}.get(family, ())
    config = {"hidden_act": "silu", "torch_dtype": "float32"}
    config |= {name: value for name, value in fields.items() if name not in NOT_WRITTEN + unsaid}
    if family == "mixtral":
        config["num_local_experts"] = config.pop("num_experts")
    if family.startswith("qwen"):
        config["use_sliding_window"] = fields["sliding_window"] is not None
        config["max_window_layers"] = fields["num_hidden_layers"] if fields["sliding_window"] is None else 0
    if scaling.get("rope_type") == "dynamic":
        config["max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    return config | {"rope_scaling": scaling or None}


def extend_context(config, seq_len: int, kind: str | None):
    """The ModelConfig for texts of seq_len positions: itself if it takes them, else with RoPE scaled to them by `kind`.

    kind: linear, dynamic or yarn (see model.inverse_frequency); the factor is the ratio of the lengths. ValueError:
    none is given but one is needed; positions that are learned; a model that is scaled already."""
    known, scaling = config.max_position_embeddings, config.rope_scaling
    if seq_len <= known:
        return config
    if config.position_embedding_type == "alibi":  # distances have no trained length
        return dataclasses.replace(config, max_position_embeddings=seq_len)
    if scaling or config.position_embedding_type == "learned":
        why = f"scaled by {scaling['rope_type']} already" if scaling else "a learned vector each"
        raise ValueError(f"--seq_len {seq_len}: the model knows {known} positions, {why}: it takes no more")
    if kind not in ("linear", "dynamic", "yarn"):
        raise ValueError(f"--seq_len {seq_len}: the model knows {known} positions; --rope_scaling linear, dynamic or "
                         f"yarn would stretch them{f', not {kind!r}' if kind else ''}")
    scaling = {"rope_type": kind, "factor": seq_len / known, "original_max_position_embeddings": known}
    return dataclasses.replace(config, max_position_embeddings=seq_len, rope_scaling=scaling)
