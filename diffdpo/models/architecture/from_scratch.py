"""A small new model of LLaDA's layout with its own tokenizer: what ``launch/sft.py`` starts from without a checkpoint.

The tokenizer is byte-level, so it can write any text; digits are single tokens (a number is never one opaque piece),
each with or without the space before it.
"""

from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

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
    tokenizer: PreTrainedTokenizerFast, *, width: int, layers: int, heads: int, seed: int, max_length: int = 1024
) -> LLaDAModelLM:
    """A model with random weights, a function of ``seed`` alone (the global generator is left as it was)."""
    config = LLaDAConfig.create(
        d_model=width,
        n_layers=layers,
        n_heads=heads,
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_sequence_length=max_length,
        weight_tying=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LLaDAModelLM(config)
