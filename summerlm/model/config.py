"""The settings of the one model family: a variant is a field here.

Flow: filled from a `[model]` table by `core.config`; read by `transformer`, `init`, `plan.count`
and by everything that loads a model.
"""

from typing import Annotated, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from summerlm.core.config import Section
from summerlm.model.bias import MAX_CONTEXT

PAD_MULTIPLE = 128  # rows of the embedding and the head: a size that matmul kernels like


class ModelConfig(Section):
    """The shape of a model and the laws that hold inside it."""

    vocabulary: PositiveInt
    """Token ids that the tokenizer can give, before padding."""
    width: PositiveInt
    """Channels of the residual stream, D."""
    layers: PositiveInt
    """Blocks, each attention and MLP."""
    heads: PositiveInt
    """Query heads, H."""
    kv_heads: PositiveInt
    """Key/value heads, K; divides `heads`: equal is multi-head, fewer is grouped-query."""
    head_dim: PositiveInt
    """Channels a head, C; even with `rope`; heads * head_dim need not equal the width."""
    mlp_hidden: PositiveInt
    """Hidden channels of the SwiGLU MLP, F."""
    mlp_bias: bool = False
    """Whether the MLP's two linears add a bias."""
    norm_eps: PositiveFloat = 1e-6
    """Added to the mean square inside the root of every RMSNorm."""
    rope: bool = True
    """Whether queries and keys are rotated by their position along the row."""
    rope_base: PositiveFloat = 10_000.0
    """Base of the rotary wavelengths: pair i turns by base^(-2i/C) radians a position."""
    alibi: bool = False
    """Whether scores lose slope * distance, one slope a head."""
    qk_norm: bool = True
    """Whether queries and keys pass an RMSNorm before they are rotated."""
    layer_scale: PositiveFloat | None = None
    """First value of a learned factor a channel on each branch, or none."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share dropped in training: embeddings, attention probabilities, MLP outputs."""
    tied_embeddings: bool = False
    """Whether the output head is the embedding itself."""
    logit_soft_cap: PositiveFloat | None = None
    """Logits are cap * tanh(logits / cap), or none."""
    context: Annotated[int, Field(gt=0, le=MAX_CONTEXT)]
    """Longest row in tokens, T."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the first weights; `init.laws` says of which."""
    zero_init_outputs: bool = True
    """Whether both branches of a block start by adding nothing: their last matrices at zero."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        if self.rope and self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rope turns channel pairs")
        return self

    @property
    def padded_vocabulary(self) -> int:
        """Rows of the embedding and of the head: the vocabulary up to a multiple of 128."""
        return -(-self.vocabulary // PAD_MULTIPLE) * PAD_MULTIPLE
