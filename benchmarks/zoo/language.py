"""Transformers and state-space models over token ids, from `transformers`: tiny configurations, random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn
from torch.export import Dim

from benchmarks.zoo.architecture import Architecture, Sample, awakened

WORDS, LONG = 120, 64
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE: dict[str, Any] = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2}
ENCODER: dict[str, Any] = {
    **WIDE, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": LONG,
}  # fmt: skip
DECODER: dict[str, Any] = {**ENCODER, **SPECIAL, "use_cache": False}
GPT: dict[str, Any] = {
    **SPECIAL, "vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LONG, "use_cache": False,
    "initializer_range": 0.18,
}  # fmt: skip
PAIRED: dict[str, Any] = {
    **SPECIAL, "vocab_size": WORDS, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "max_position_embeddings": LONG, "decoder_start_token_id": 0, "use_cache": False,
}  # fmt: skip
STATE: dict[str, Any] = {**SPECIAL, "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1, "use_cache": False}
LENGTHS = (16, 11, 16, 9)
SIZES = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=LONG)}
OTHER_SIZES = {0: SIZES[0], 1: Dim("decoder_length", min=2, max=LONG)}


def tokens(index: int) -> Mapping[str, torch.Tensor]:
    """Sentences as a tokenizer gives them: ids and a mask of padding, of a length that changes."""
    length = LENGTHS[index % len(LENGTHS)]
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, length - 3 :] = 0
    ids = torch.randint(3, WORDS, (2, length)) * mask
    return transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask})


def ids_only(index: int) -> dict[str, torch.Tensor]:
    """Token ids without padding, of a length that changes."""
    return {"input_ids": torch.randint(3, WORDS, (2, LENGTHS[index % len(LENGTHS)]))}


def ids_of_16(index: int) -> dict[str, torch.Tensor]:
    """Token ids, always 16: the export unrolls over them, or asks for multiples."""
    return {"input_ids": torch.randint(3, WORDS, (2, 16))}


def pairs(index: int) -> dict[str, torch.Tensor]:
    """Sentences for an encoder and their beginnings for a decoder, of different lengths."""
    return {**tokens(index), "decoder_input_ids": torch.randint(3, WORDS, (2, 5 + index % 2))}


def model(kind: str, attention: str = "eager", **settings: Any) -> Callable[[], nn.Module]:
    """A `transformers` model with random weights, by class name, with its kind of attention."""

    def make() -> nn.Module:
        chosen = getattr(transformers, kind)
        return awakened(chosen._from_config(chosen.config_class(**settings), attn_implementation=attention)).eval()

    return make


def entry(name: str, family: str, make: Callable[[], nn.Module], batch: Any, *covers: str) -> Architecture:
    """An entry whose dataloader gives keyword inputs of several lengths."""

    def sample() -> Sample:
        example = dict(batch(0))
        sizes = {key: OTHER_SIZES if key.startswith("decoder") else SIZES for key in example}
        return Sample(make(), (), example, sizes)

    always = ("token ids", "dynamic batch", "two sequence lengths", "keyword inputs", "dataclass outputs")
    return Architecture(name, family, sample, batch, covers=(*always, *covers))


def of_one_length(name: str, family: str, make: Callable[[], nn.Module], *covers: str) -> Architecture:
    """An entry whose sequences are always 16 tokens."""
    made = entry(name, family, make, ids_of_16)
    fixed = ("token ids", "keyword inputs", "dataclass outputs")
    return replace(made, make=lambda: Sample(make(), (), ids_of_16(0)), covers=(*fixed, *covers))


ENCODERS = (
    entry(
        "bert", "encoder", model("BertModel", "sdpa", **ENCODER), tokens,
        "encoder transformer", "learned positions", "boolean mask", "mask through scaled_dot_product_attention",
    ),
    entry(
        "roberta_classifier", "encoder",
        model("XLMRobertaForSequenceClassification", **ENCODER, pad_token_id=0, num_labels=3), tokens,
        "large finite mask",
    ),
    entry("albert", "encoder", model("AlbertModel", **ENCODER, embedding_size=16), tokens, "shared parameters"),
    entry(
        "deberta", "encoder",
        model("DebertaV2Model", **ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8),
        tokens, "large finite mask",
    ),
    entry("mpnet", "encoder", model("MPNetModel", **ENCODER), tokens, "large finite mask"),
    entry("fnet", "encoder", model("FNetModel", **WIDE, intermediate_size=64, tpu_short_seq_length=LONG), ids_only,
          "complex part"),
    entry(
        "modern_bert", "encoder",
        model("ModernBertModel", "sdpa", **ENCODER, **SPECIAL, cls_token_id=1, sep_token_id=2, local_attention=8),
        tokens, "rotary positions", "boolean mask", "mask through scaled_dot_product_attention",
    ),
    entry("convbert", "encoder", model("ConvBertModel", **ENCODER, embedding_size=32), tokens, "large finite mask"),
    of_one_length(
        "funnel", "encoder",
        model("FunnelModel", vocab_size=WORDS, block_sizes=[1, 1], num_decoder_layers=1, d_model=32, n_head=4,
              d_head=8, d_inner=64),
    ),
    of_one_length("xlnet", "encoder", model("XLNetModel", vocab_size=WORDS, d_model=32, n_layer=2, n_head=4)),
)  # fmt: skip
DECODERS = (
    entry("gpt2", "decoder", model("GPT2LMHeadModel", "sdpa", **GPT), tokens, "decoder transformer",
          "learned positions", "mask through scaled_dot_product_attention"),
    entry("llama", "decoder", model("LlamaForCausalLM", **DECODER, num_key_value_heads=2), tokens,
          "decoder transformer", "rotary positions", "large finite mask"),
    entry("gpt_neox", "decoder", model("GPTNeoXForCausalLM", "sdpa", **DECODER), ids_only, "rotary positions"),
    entry("gemma2", "decoder", model("Gemma2ForCausalLM", **DECODER, num_key_value_heads=2, head_dim=8,
                                     sliding_window=8), tokens, "rotary positions", "large finite mask"),
    entry("bloom", "decoder", model("BloomForCausalLM", **{**DECODER, "n_layer": 2, "n_head": 4}), tokens,
          "large finite mask"),
    entry("mixtral", "decoder", model("MixtralForCausalLM", "sdpa", **DECODER, num_key_value_heads=2,
                                      num_local_experts=3, num_experts_per_tok=2), ids_only, "multi-output op"),
    entry("falcon", "decoder", model("FalconForCausalLM", "sdpa", **DECODER), tokens, "rotary positions"),
    entry("codegen", "decoder", model("CodeGenForCausalLM", **GPT, rotary_dim=4), tokens, "rotary positions"),
)  # fmt: skip
STATE_SPACE = (
    of_one_length("rwkv", "state space", model("RwkvModel", **{**STATE, "num_hidden_layers": 2}), "state-space model"),
    of_one_length("mamba", "state space", model("MambaForCausalLM", **STATE, state_size=4), "state-space model"),
    of_one_length(
        "mamba2", "state space",
        model("Mamba2ForCausalLM", **STATE, state_size=8, head_dim=8, num_heads=4, n_groups=1, chunk_size=8),
        "state-space model",
    ),
)  # fmt: skip
ENCODER_DECODERS = (
    entry(
        "t5", "encoder-decoder",
        model("T5ForConditionalGeneration", vocab_size=WORDS, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
              use_cache=False),
        pairs, "encoder-decoder transformer", "shared parameters", "large finite mask",
    ),
    entry(
        "bart", "encoder-decoder", model("BartForConditionalGeneration", "sdpa", **PAIRED), pairs,
        "encoder-decoder transformer", "learned positions", "mask through scaled_dot_product_attention",
    ),
)  # fmt: skip
LANGUAGE = ENCODERS + DECODERS + STATE_SPACE + ENCODER_DECODERS
