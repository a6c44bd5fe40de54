"""How six tools read adapter files, as data: names of layers, spellings of factors, scales, reasons to
refuse.

Read off their loaders and checked by running them: A1111 1.10.1, Forge dfdcbab6, ComfyUI 0.3.64 (0.8 and 0.12
agree in what is here), InvokeAI 8e71a8a5, kohya sd-scripts 48d368fa, diffusers 0.42.1 with transformers 5.24
and peft 0.21. `reading.py` interprets the rows; a tool that changes its rules needs another row here and
nothing else.
"""

from lora_core.formats.compat.dialects import Dialect, Leaves, Names, Tool

OTHER_LEAVES = {
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "full difference": ("diff",),
    "norm": ("w_norm",),
    "bias": ("diff_b",),
}
"""What follows a name's dot in files of other kinds, by the kind that it makes of a layer."""

MORE_LEAVES = ("diff_b", "b_norm", "dora_scale", "lora_magnitude_vector")
"""What else may follow it."""

SAME_BASE = {1280: 2048}
"""A width that InvokeAI takes for a base's, to the width of that base's text context."""

_KOHYA = Leaves(".lora_down.weight", ".lora_up.weight", ".lora_mid.weight")
_KOHYA_PLAIN = Leaves(".lora_down.weight", ".lora_up.weight")
_PEFT_LOSING_ALPHA = Leaves(".lora_A.weight", ".lora_B.weight", alpha="")
_GRAPH_LEAVES = (
    _KOHYA,
    Leaves("_lora.down.weight", "_lora.up.weight"),
    Leaves(".lora_A.weight", ".lora_B.weight"),
    Leaves(".lora.down.weight", ".lora.up.weight"),
    Leaves(".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
)
_IN_ENCODER = r"text_model\..+"
_IN_BLOCKS = r".*(?:attentions|resnets|downsamplers|upsamplers)\..+"
_LDM_TOO = Names("unet", "lora_unet_{ldm_flat}")
_FLAT = Names("unet", "lora_unet_{flat}")
_TE = Names("text_encoder", "lora_te_{flat}", _IN_ENCODER, encoders=1)
_TE1 = Names("text_encoder", "lora_te1_{flat}", _IN_ENCODER, encoders=2)
_TE2 = Names("text_encoder_2", "lora_te2_{flat}", _IN_ENCODER, encoders=2)
_OTHERS = ("LoHa", "LoKr", "full difference", "norm")
_IN_LAYERS = r"text_model\.encoder\..+"

_GRAPH_NORMS = (
    _LDM_TOO,
    _FLAT,
    Names("unet", "diffusion_model.{ldm}"),
    Names("unet", "lycoris_{flat}"),
)
_GRAPH_NAMES = (
    _LDM_TOO,
    _FLAT,
    Names("unet", "diffusion_model.{ldm}"),
    Names("unet", "lycoris_{flat}"),
    Names("unet", "{processor}"),
    Names("unet", "unet.{processor}"),
    Names("text_encoder", "lora_te_{flat}", _IN_ENCODER),
    Names("text_encoder", "lora_te1_{flat}", _IN_ENCODER),
    Names("text_encoder", "text_encoder.{path}", _IN_ENCODER),
    Names("text_encoder_2", "lora_te2_{flat}"),
    Names("text_encoder_2", "text_encoder_2.{path}", _IN_ENCODER),
)

TOOLS = (
    Tool(
        "A1111",
        (
            Dialect(
                (
                    _LDM_TOO,
                    Names("unet", "lora_unet_{flat}", r"(?!add_embedding).+", blocks="diffusers"),
                    # It counts blocks as the first family does, where the coarsest level has no attention.
                    Names(
                        "unet",
                        "lora_unet_{flat}",
                        r"(?!add_embedding|up_blocks\.0\.upsamplers).+",
                        blocks="ldm",
                    ),
                    _TE,
                    Names("text_encoder", "lora_te1_{flat}", _IN_ENCODER, encoders=1, open_clip=False),
                    _TE1,
                    _TE2,
                ),
                (_KOHYA, _PEFT_LOSING_ALPHA),
                others=_OTHERS,
                norms=(
                    _LDM_TOO,
                    Names("unet", "lora_unet_{flat}", r"(?!conv_norm_out).+"),
                    Names("text_encoder", "lora_te_{flat}", _IN_LAYERS, encoders=1, open_clip=False),
                    Names("text_encoder", "lora_te1_{flat}", encoders=2),
                ),
                dora="columns",
                beside=("bundle_emb.",),
                unused=(".diff_b",),
                strict="layers",
                whole_attention=True,
            ),
        ),
    ),
    Tool(
        "Forge",
        (
            Dialect(
                _GRAPH_NAMES,
                _GRAPH_LEAVES,
                others=(*_OTHERS, "bias"),
                norms=_GRAPH_NORMS,
                dora="base rows",
                tucker_lokr="fails",
                most_unmatched=12,
            ),
        ),
    ),
    Tool(
        "ComfyUI",
        (
            Dialect(
                (
                    *_GRAPH_NAMES,
                    *(
                        Names(part, f"text_encoders.{clip}.transformer.{{path}}", _IN_ENCODER)
                        for part, clip in (
                            ("text_encoder", "clip_l"),
                            ("text_encoder", "clip_h"),
                            ("text_encoder_2", "clip_g"),
                        )
                    ),
                ),
                (*_GRAPH_LEAVES, Leaves(".lora_A.default.weight", ".lora_B.default.weight")),
                others=(*_OTHERS, "bias"),
                norms=_GRAPH_NORMS,
                dora="base rows",
                tucker_lokr="lost",
            ),
        ),
    ),
    Tool(
        "InvokeAI",
        (
            Dialect(
                (
                    Names("unet", "lora_unet_{ldm_flat}", blocks="ldm"),
                    _FLAT,
                    _TE,
                    _TE1,
                    Names("text_encoder_2", "lora_te2_{flat}", encoders=2),
                ),
                (_KOHYA,),
                others=_OTHERS,
                norms=(
                    Names("unet", "lora_unet_{ldm_flat}", blocks="ldm"),
                    _FLAT,
                    *(Names("text_encoder", f"lora_{te}_{{flat}}") for te in ("te", "te1")),
                    Names("text_encoder_2", "lora_te2_{flat}"),
                ),
                dora="columns",
                beside=("bundle_emb",),
                unused=("bundle_emb", ".diff_b"),
                strict="stems",
                one_naming="refuse",
                told_by_shapes=True,
            ),
        ),
    ),
    Tool(
        "kohya",
        (
            Dialect(
                (
                    Names("unet", "lora_unet_{flat}", _IN_BLOCKS, blocks="diffusers"),
                    Names("unet", "lora_unet_{ldm_flat}", _IN_BLOCKS, blocks="ldm"),
                    Names(
                        "unet", "lora_unet_{flat}", _IN_BLOCKS, blocks="ldm", given="down_blocks|up_blocks"
                    ),
                    _TE,
                    _TE1,
                    _TE2,
                ),
                (_KOHYA_PLAIN,),
                zero_is_rank=True,
                exact_shapes=True,
                one_naming="first",
            ),
        ),
    ),
    Tool(
        "diffusers",
        (
            Dialect(
                (
                    Names("unet", "lora_unet_{flat}", blocks="diffusers"),
                    Names(
                        "unet",
                        "lora_unet_{ldm_flat}",
                        r"conv_in|conv_out|time_embedding\..+",
                        blocks="diffusers",
                    ),
                    Names("unet", "lora_unet_{ldm_flat}", blocks="ldm"),
                    Names("unet", "lora_unet_{flat}", r"(?!add_embedding).+", blocks="ldm"),
                    *(
                        Names("text_encoder", f"lora_{te}_{{{form}}}")
                        for te in ("te", "te1")
                        for form in ("flat", "bare_flat")
                    ),
                    Names("text_encoder_2", "lora_te2_{flat}", encoders=2),
                ),
                (_KOHYA_PLAIN,),
                starts=("lora_te_", "lora_unet_", "lora_te1_", "lora_te2_"),
                ignores=(".dora_scale",),
                strict="keys",
                alphas="component",
                own_alpha=(
                    ("unet", r"(?!.*\.attn[12]\.to_).+"),
                    *(
                        (part, r".*\.mlp\.fc[12]|text_projection")
                        for part in ("text_encoder", "text_encoder_2")
                    ),
                ),
                exact_shapes=True,
                spelled=True,
                needs_match=True,
                one_naming="drop",
            ),
            Dialect(
                (
                    Names("unet", "unet.{path}"),
                    Names("unet", "unet.{processor}"),
                    Names("unet", "unet.{older}"),
                    *(
                        Names(part, f"{part}.{{{form}}}")
                        for part, forms in (
                            ("text_encoder", ("path", "bare", "older", "older_bare")),
                            ("text_encoder_2", ("path", "older")),
                        )
                        for form in forms
                    ),
                ),
                (
                    Leaves(".lora_A.weight", ".lora_B.weight", spelling="peft", alpha=""),
                    Leaves("_lora.down.weight", "_lora.up.weight", spelling="old", alpha=""),
                    Leaves(
                        ".lora_linear_layer.down.weight",
                        ".lora_linear_layer.up.weight",
                        spelling="linear",
                        alpha="",
                    ),
                    Leaves(".lora.down.weight", ".lora.up.weight", spelling="unet", alpha=""),
                ),
                ignores=(".dora_scale",),
                dora="rows",
                alphas="header",
                exact_shapes=True,
                spelled=True,
                needs_match=True,
                must_hold="lora",
            ),
        ),
    ),
)

_ENDINGS = {
    leaf
    for tool in TOOLS
    for dialect in tool.dialects
    for pair in dialect.leaves
    for leaf in (pair.down, pair.up, pair.mid, pair.alpha)
    if leaf
}
SUFFIXES = (
    *sorted(_ENDINGS, key=len, reverse=True),
    *(f".{leaf}" for leaves in (*OTHER_LEAVES.values(), MORE_LEAVES) for leaf in leaves),
)
"""All that can follow a layer's name in a key that some tool knows."""

MEANT_FOR = {"kohya": tuple(tool.name for tool in TOOLS), "diffusers": ("diffusers",)}
"""Which tools a file of a format is meant for."""
