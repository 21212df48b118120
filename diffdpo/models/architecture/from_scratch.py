"""A small new model of LLaDA's layout (or, with blocks, of SDAR's) with its own tokenizer: what ``launch/sft.py``
starts from without a checkpoint.

The tokenizer is byte-level, so it can write any text; digits are single tokens (a number is never one opaque piece),
each with or without the space before it.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from diffdpo.models.architecture.backbone import MaskedLM
from diffdpo.models.architecture.block_families import SDARConfig, SDARForCausalLM
from diffdpo.models.architecture.llada import LLaDAConfig, LLaDAModelLM

BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"  # LLaDA's names; EOS is the padding too, as there
PIECES = r" ?\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s+"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most ``vocab_size`` tokens, the three special ones first; at least 259."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, mask_token=MASK
    )


def new_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    width: int,
    layers: int,
    heads: int,
    seed: int,
    max_length: int = 1024,
    block_size: int = 0,
) -> MaskedLM:
    """A model with random weights, a function of ``seed`` alone (the global generator is left as it was).

    LLaDA's layout; with a ``block_size`` SDAR's, block-causal.
    """
    ids = {
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if block_size:
            return SDARForCausalLM(_sdar(len(tokenizer), width, layers, heads, max_length, block_size, ids))
        return LLaDAModelLM(_llada(len(tokenizer), width, layers, heads, max_length, ids))


def _sdar(
    vocabulary: int, width: int, layers: int, heads: int, max_length: int, block_size: int, ids: dict[str, Any]
) -> SDARConfig:
    sizes: dict[str, Any] = {"max_position_embeddings": max_length, **ids}
    return SDARConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=32 * math.ceil(width / 12),
        vocab_size=vocabulary,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        block_size=block_size,
        architectures=["SDARForCausalLM"],
        **sizes,
    )


def _llada(vocabulary: int, width: int, layers: int, heads: int, max_length: int, ids: dict[str, Any]) -> LLaDAConfig:
    return LLaDAConfig.create(
        d_model=width,
        n_layers=layers,
        n_heads=heads,
        vocab_size=vocabulary,
        max_sequence_length=max_length,
        weight_tying=True,
        **ids,
    )
