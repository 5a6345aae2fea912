"""A model of ours as a stock class of Hugging Face's transformers, for tests that compare both.

A pre-norm SwiGLU model with rotary positions is their Llama, with query/key norms their Qwen3.
What these classes can't say (ALiBi, layer scale, soft caps, biased MLPs) is refused.
"""

from typing import Any

import torch
import transformers
from torch import Tensor

from summerlm.model.config import ModelConfig
from summerlm.model.transformer import Transformer
from summerlm.tokenizer.pipeline import BOS, EOS
from summerlm.tokenizer.tokenizer import Tokenizer


def to_stock_model(model: Transformer, tokenizer: Tokenizer) -> transformers.PreTrainedModel:
    """Copy a model's weights, float32, into the stock class of its shape, in evaluation mode."""
    config = model.config
    lacking = (config.alibi, config.mlp_bias, config.layer_scale, config.logit_soft_cap)
    assert config.rope
    assert not any(lacking)
    kind = "Qwen3" if config.qk_norm else "Llama"
    settings = getattr(transformers, f"{kind}Config")(**_settings(config, tokenizer))
    stock = getattr(transformers, f"{kind}ForCausalLM")(settings)
    stock.load_state_dict(_weights(model.state_dict(), config))
    return stock.float().eval()


def to_stock_tokenizer(tokenizer: Tokenizer, folder: Any) -> transformers.PreTrainedTokenizerFast:
    """Wrap the same pipeline; BOS is put in front where special tokens are asked for."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    tokenizer.save(folder)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=EOS
    )


def _settings(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_hidden,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "max_position_embeddings": config.context,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": None,
        "use_cache": True,
    }


def _weights(ours: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename, and take apart what we fuse; padded rows of the vocabulary are left out."""
    V, C = config.vocabulary, config.head_dim
    head = "embedding.weight" if config.tied_embeddings else "head.weight"
    theirs = {
        "model.embed_tokens.weight": ours["embedding.weight"][:V],
        "model.norm.weight": ours["final_norm.weight"],
        "lm_head.weight": ours[head][:V],
    }
    for i in range(config.layers):
        own, layer = f"blocks.{i}.", f"model.layers.{i}."
        rows = [n * C for n in (config.heads, config.kv_heads, config.kv_heads)]
        qkv = dict(zip("qkv", ours[own + "attention.qkv.weight"].split(rows), strict=True))
        gate, up = ours[own + "mlp.gate_up.weight"].chunk(2)
        theirs |= {f"{layer}self_attn.{k}_proj.weight": part for k, part in qkv.items()}
        theirs |= {
            layer + "input_layernorm.weight": ours[own + "attention_norm.weight"],
            layer + "post_attention_layernorm.weight": ours[own + "mlp_norm.weight"],
            layer + "self_attn.o_proj.weight": ours[own + "attention.output.weight"],
            layer + "mlp.gate_proj.weight": gate,
            layer + "mlp.up_proj.weight": up,
            layer + "mlp.down_proj.weight": ours[own + "mlp.down.weight"],
        }
        if config.qk_norm:
            for name in ("query", "key"):
                norm = ours[f"{own}attention.{name}_norm.weight"]
                theirs[f"{layer}self_attn.{name[0]}_norm.weight"] = norm
    return {name: weight.detach().to(torch.float32).clone() for name, weight in theirs.items()}
