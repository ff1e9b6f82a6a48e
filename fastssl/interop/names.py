"""Rename the weights of other libraries' encoders to Transformers' names.

A table is a list of rules, each a pattern that a whole name must match and its replacement. The first matching rule
applies; a name that matches no rule stays unchanged. (The names `weight_g` and `weight_v` of weight norm need no rule:
older versions of Transformers used them too, and `Encoder.load_weights` reads them.)
"""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

Rules = Sequence[tuple[str, str]]

#: fairseq's wav2vec 2.0, HuBERT and data2vec audio, and Microsoft's WavLM, whose code is derived from fairseq.
FAIRSEQ: Rules = (
    (r"mask_emb", r"masked_spec_embed"),
    # A block is convolution (0), dropout, norm (2), GELU. A layer norm sits between two transpositions, so it is 2.1.
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.(\w+)", r"feature_extractor.conv_layers.\1.conv.\2"),
    (r"feature_extractor\.conv_layers\.(\d+)\.2(?:\.1)?\.(\w+)", r"feature_extractor.conv_layers.\1.layer_norm.\2"),
    (r"layer_norm\.(\w+)", r"feature_projection.layer_norm.\1"),
    (r"post_extract_proj\.(\w+)", r"feature_projection.projection.\1"),
    # data2vec's stack of convolutions comes first, because its names contain one more number.
    (r"encoder\.pos_conv\.(\d+)\.0\.(\w+)", r"encoder.pos_conv_embed.layers.\1.conv.\2"),
    (r"encoder\.pos_conv\.0\.(.+)", r"encoder.pos_conv_embed.conv.\1"),
    (
        r"encoder\.layers\.(\d+)\.self_attn\.relative_attention_bias\.(.+)",
        r"encoder.layers.\1.attention.rel_attn_embed.\2",
    ),
    (r"encoder\.layers\.(\d+)\.self_attn\.grep_linear\.(\w+)", r"encoder.layers.\1.attention.gru_rel_pos_linear.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.grep_a", r"encoder.layers.\1.attention.gru_rel_pos_const"),
    (r"encoder\.layers\.(\d+)\.self_attn\.(.+)", r"encoder.layers.\1.attention.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.(\w+)", r"encoder.layers.\1.layer_norm.\2"),
    (r"encoder\.layers\.(\d+)\.fc1\.(\w+)", r"encoder.layers.\1.feed_forward.intermediate_dense.\2"),
    (r"encoder\.layers\.(\d+)\.fc2\.(\w+)", r"encoder.layers.\1.feed_forward.output_dense.\2"),
)

#: torchaudio's `Wav2Vec2Model`; its WavLM keeps a `torch.nn.MultiheadAttention` inside its attention.
TORCHAUDIO: Rules = (
    (r"encoder\.feature_projection\.(.+)", r"feature_projection.\1"),
    (r"encoder\.transformer\.layers\.(\d+)\.attention\.attention\.(.+)", r"encoder.layers.\1.attention.\2"),
    (r"encoder\.transformer\.(.+)", r"encoder.\1"),
)


def renamed(weights: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Rename weights by a table, and split attention's `in_proj` tensors into those of `q_proj`, `k_proj` and `v_proj`.

    Args:
        weights: Tensors by their names in the other library.
        rules: The table, such as `FAIRSEQ`.

    Returns:
        The same tensors by Transformers' names; the parts of a split tensor are views (D, D) or (D,) of it.
    """
    compiled = [(re.compile(pattern), name) for pattern, name in rules]
    found = {}
    for old, tensor in weights.items():
        new = next((match.expand(name) for pattern, name in compiled if (match := pattern.fullmatch(old))), old)
        stem, packed, kind = new.partition(".attention.in_proj_")
        if packed:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{stem}.attention.{letter}_proj.{kind}"] = part
        else:
            found[new] = tensor
    return found
