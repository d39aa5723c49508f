"""The fallback family: common names of transformer parts, for models that no other family knows.

What it does not recognise has no role and is never guessed at; users of roles must say what they leave out.
"""

from s2d.models.family import FALLBACK, Family, register_family

GENERIC = register_family(
    Family(
        name=FALLBACK,
        modality="text",
        norm_position="pre",
        models=(),  # chosen when nothing else matches
        roles=(
            (r"(^|\.)(tok_embeddings|wte|wpe|embed_tokens|shared|word_embeddings|embedding|embed)$", "embedding"),
            (r"(^|\.)(patch_embed(ding)?s?)(\.proj(ection)?)?$", "patch_embed"),
            (r"(attn|attention)\.(qkv|Wqkv|c_attn|query_key_value)$", "qkv"),
            (r"self_attn$", "qkv"),  # torch's own encoder layers keep in_proj_weight there
            (r"(attn|attention)\.(\w+\.)?(q|q_proj|query|to_q)$", "q"),
            (r"(attn|attention)\.(\w+\.)?(k|k_proj|key|to_k)$", "k"),
            (r"(attn|attention)\.(\w+\.)?(v|v_proj|value|to_v)$", "v"),
            (r"(attn|attention)\.(\w+\.)?(o|proj|o_proj|out_proj|out|to_out|c_proj|Wo|dense)$", "proj"),
            (r"(mlp|ffn|feed_forward)\.(gate_proj|w1|wi_0)$", "gate"),
            (r"((mlp|ffn|feed_forward)\.(fc1|up_proj|c_fc|lin1|w3|wi|wi_1|Wi|dense_h_to_4h)|(^|\.)linear1)$", "fc1"),
            (r"((mlp|ffn|feed_forward)\.(fc2|down_proj|c_proj|lin2|w2|wo|Wo|dense_4h_to_h)|(^|\.)linear2)$", "fc2"),
            (r"(mlp|ffn|feed_forward)\.(act|act_fn|activation|activation_fn)$", "activation"),
            (r"\d+\.(norm1|ln_1|attn_norm|input_layernorm|layernorm_before|layer_norm1)$", "norm1"),
            (r"\d+\.(norm2|ln_2|mlp_norm|post_attention_layernorm|layernorm_after|layer_norm2)$", "norm2"),
            (r"(^|\.)(norm|ln_f|final_norm|final_layer_norm)$", "norm_final"),
            (r"pooler(\.dense)?$", "pooler"),
        ),
        block=r"(^|\.)(layers?|blocks|h|resblocks)\.\d+$",
    )
)
