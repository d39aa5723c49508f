"""Llama-type decoders (transformers): Llama, SmolLM2 and 3, Mistral, Qwen2 and 3, Gemma, Phi-3, OLMo."""

from s2d.models.family import Family, register_family

LLAMA = register_family(
    Family(
        name="llama",
        modality="causal-lm",
        norm_position="pre",
        models=(r".*\.(Llama|SmolLM3|Mistral|Ministral|Qwen2|Qwen3|Gemma|Phi3|Olmo)(Model|ForCausalLM)",),
        roles=(
            (r"embed_tokens$", "embedding"),
            (r"input_layernorm$", "norm1"),
            (r"self_attn\.q_proj$", "q"),
            (r"self_attn\.k_proj$", "k"),
            (r"self_attn\.v_proj$", "v"),
            (r"self_attn\.qkv_proj$", "qkv"),
            (r"self_attn\.(q_norm|k_norm)$", "norm_inner"),
            (r"self_attn\.o_proj$", "proj"),
            (r"post_attention_layernorm$", "norm2"),
            (r"mlp\.gate_proj$", "gate"),
            (r"mlp\.(up_proj|gate_up_proj)$", "fc1"),
            (r"mlp\.(act_fn|activation_fn)$", "activation"),
            (r"mlp\.down_proj$", "fc2"),
            (r"^(model\.|.*language_model\.)?norm$", "norm_final"),
            (r"lm_head$", "head"),
        ),
        block=r"(^|\.)layers\.\d+$",
    )
)
