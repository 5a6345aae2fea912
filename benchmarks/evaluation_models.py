"""Models for the benchmark `evaluation.py`, and their folders of Hugging Face's stock classes.

Flow: `evaluation.py` and `evaluation_ours.py` make the same model of a job; the first writes it
with `export`, for the peer to load.

A pre-norm SwiGLU model with rotary positions is their Llama, with query/key norms their Qwen3; both
turn channel pairs (i, i + C/2), as we do.
"""

import json
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from summerlm.checkpoint.load import load
from summerlm.core.config import read_settings
from summerlm.core.errors import UsageError
from summerlm.core.ranks import ALONE
from summerlm.generate.engine import LanguageModel
from summerlm.model.config import ModelConfig
from summerlm.parallel.config import ParallelConfig
from summerlm.parallel.layout import lay_out
from summerlm.recipes.settings import Settings
from summerlm.tokenizer.learn import learn_bpe
from summerlm.tokenizer.mistral import mistral_v3
from summerlm.tokenizer.pipeline import BOS, EOS

CPU = torch.device("cpu")
APART = {"init_std": 0.1, "zero_init_outputs": False}  # random weights that tell choices apart


def make_model(job: dict[str, Any]) -> LanguageModel:
    """Make a model.

    Args:
        job: `run`, a folder; or `config`, a file of settings whose model gets random weights, the
            same each time.

    Returns:
        The model with its tokenizer, in evaluation mode.
    """
    if "run" in job:
        loaded = load(Path(job["run"]), CPU)
        return LanguageModel(loaded.model, loaded.tokenizer)
    config = read_settings(Settings, Path(job["config"]), []).model
    config = config.model_copy(update=APART)
    tokenizer = mistral_v3()
    if config.vocabulary != tokenizer.vocabulary:
        texts = list(topics.topics.values())  # prose that every Python has
        tokenizer = learn_bpe(texts, config.vocabulary)
    layout = lay_out(config, ParallelConfig(), ALONE, seed=0, device=CPU, dtype=None)
    return LanguageModel(layout.model.eval(), tokenizer)


def export(lm: LanguageModel, folder: Path) -> None:
    """Write a model as `AutoModelForCausalLM` and `AutoTokenizer` read it.

    Args:
        lm: The model.
        folder: Where to; made.

    Raises:
        UsageError: If no stock class computes what the model computes.
    """
    config = lm.config
    lacking = ("alibi", "mlp_bias", "layer_scale", "logit_soft_cap")
    if not config.rope or any(getattr(config, name) for name in lacking):
        raise UsageError(f"a stock model has rope, and none of {', '.join(lacking)}")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_settings(config, lm)))
    save_file(
        _weights(lm.model.state_dict(), config), folder / "model.safetensors", {"format": "pt"}
    )
    lm.tokenizer.save(folder)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, lm.tokenizer.bos)]
    )
    backend.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    words |= {"pad_token": EOS, "model_max_length": config.context}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))


def _settings(config: ModelConfig, lm: LanguageModel) -> dict[str, Any]:
    kind = "Qwen3" if config.qk_norm else "Llama"
    return {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_hidden,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "max_position_embeddings": config.context,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "hidden_act": "silu",
        "dtype": "float32",
        "bos_token_id": lm.tokenizer.bos,
        "eos_token_id": lm.tokenizer.eos,
    }


def _weights(ours: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename, and take apart what we fuse; padded rows of the vocabulary are left out."""
    V, C = config.vocabulary, config.head_dim
    rows = [n * C for n in (config.heads, config.kv_heads, config.kv_heads)]
    theirs = {
        "model.embed_tokens.weight": ours["embedding.weight"][:V],
        "model.norm.weight": ours["final_norm.weight"],
    }
    if not config.tied_embeddings:
        theirs["lm_head.weight"] = ours["head.weight"][:V]
    for i in range(config.layers):
        own, layer = f"blocks.{i}.", f"model.layers.{i}."
        q, k, v = ours[own + "attention.qkv.weight"].split(rows)
        gate, up = ours[own + "mlp.gate_up.weight"].chunk(2)
        theirs |= {
            layer + "self_attn.q_proj.weight": q,
            layer + "self_attn.k_proj.weight": k,
            layer + "self_attn.v_proj.weight": v,
            layer + "self_attn.o_proj.weight": ours[own + "attention.output.weight"],
            layer + "input_layernorm.weight": ours[own + "attention_norm.weight"],
            layer + "post_attention_layernorm.weight": ours[own + "mlp_norm.weight"],
            layer + "mlp.gate_proj.weight": gate,
            layer + "mlp.up_proj.weight": up,
            layer + "mlp.down_proj.weight": ours[own + "mlp.down.weight"],
        }
        if config.qk_norm:
            theirs[layer + "self_attn.q_norm.weight"] = ours[own + "attention.query_norm.weight"]
            theirs[layer + "self_attn.k_norm.weight"] = ours[own + "attention.key_norm.weight"]
    return {name: weight.contiguous() for name, weight in theirs.items()}
