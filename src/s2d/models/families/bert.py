"""BERT-type text encoders (transformers): MiniLM, BERT, RoBERTa, XLM-R, ELECTRA, CamemBERT, MPNet, DistilBERT.

All norms come after the residual sum, so a block's input is already normalised: what feeds q, k and v is the previous
block's norm2 (or the embeddings' norm), what feeds fc1 is norm1.
"""

from s2d.models.family import Family, register_family

BERT = register_family(
    Family(
        name="bert",
        modality="text",
        norm_position="post",
        models=(r".*\.(Bert|Roberta|XLMRoberta|Camembert|Electra|MPNet|DistilBert)Model",),
        roles=(
            (r"embeddings\.(word|position|token_type)_embeddings$", "embedding"),
            (r"relative_attention_bias$", "embedding"),
            (r"embeddings_project$", "embedding"),
            (r"embeddings\.LayerNorm$", "norm_embed"),
            (r"attention\.(self\.query|attn\.q|q_lin)$", "q"),
            (r"attention\.(self\.key|attn\.k|k_lin)$", "k"),
            (r"attention\.(self\.value|attn\.v|v_lin)$", "v"),
            (r"attention\.(output\.dense|attn\.o|out_lin)$", "proj"),
            (r"(attention\.(output\.)?LayerNorm|sa_layer_norm)$", "norm1"),
            (r"(intermediate\.dense|ffn\.lin1)$", "fc1"),
            (r"(intermediate_act_fn|ffn\.activation)$", "activation"),
            (r"layer\.\d+\.(output\.dense|ffn\.lin2)$", "fc2"),
            (r"layer\.\d+\.(output\.LayerNorm|output_layer_norm)$", "norm2"),
            (r"pooler\.dense$", "pooler"),
            (
                r"(cls\.predictions|lm_head|predictions|classifier)\..*(dense|decoder|out_proj|LayerNorm|layer_norm)$",
                "head",
            ),
            (r"(pre_classifier|qa_outputs)$", "head"),
        ),
        block=r"(encoder|transformer)\.layer\.\d+$",
    )
)
