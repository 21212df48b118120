"""Block-causal scores the plain way: transformers' models under an explicit 4-D mask, one block and mask at a time."""

import itertools
import json
from math import comb

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from data_pipeline.batch import collate
from data_pipeline.encode import TokenAnswer, TokenPair

WORDS, MASK, EOS = 40, 39, 1
SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": WORDS,
    "intermediate_size": 48, "eos_token_id": EOS, "pad_token_id": EOS, "bos_token_id": 0, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
FAMILIES = {
    "sdar": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 12}, "block_size", "SDARForCausalLM", 0),
    "Fast_dLLM_Qwen": (Qwen2Config, Qwen2ForCausalLM, {}, "bd_size", "Fast_dLLM_QwenForCausalLM", 1),
    "a2d-qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}, "block_size", "A2DQwen3LMHeadModel", 0),
}


def published(folder, family, block, **changes):
    """transformers' model with random weights in fp64, saved as the family is published. Returns (model, shift)."""
    config_class, model_class, extra, key, name, shift = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(**SHAPE, **extra)
    config._attn_implementation = "sdpa"  # the eager one takes its softmax in fp32
    model = model_class(config).double().eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.35) if parameter.dim() > 1 else parameter.data.add_(
            torch.randn_like(parameter) / 9
        )
    model.model.embed_tokens.padding_idx = (
        None  # transformers would leave the pad token, here the end, without gradient
    )
    model.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    theta = settings.pop("rope_parameters")["rope_theta"]
    settings |= {"model_type": family, "architectures": [name], key: block, "mask_token_id": MASK, "rope_theta": theta}
    settings |= {"fuse_cross_entropy": False, "sliding_window": None, "attn_implementation": "sdpa"} | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))
    tokenizer().save_pretrained(folder)
    return model, shift


def tokenizer():
    """Words w2, w3, ...; id 39 is a mask that it does not name."""
    vocabulary = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, WORDS - 1)} | {"<|MASK|>": MASK}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def block_causal(length, block, dtype):
    """Additive [1, 1, L, L]: a token sees its block and those before."""
    of = torch.arange(length) // block
    mask = torch.zeros(length, length, dtype=dtype).masked_fill(of[:, None] < of[None, :], float("-inf"))
    return mask[None, None]


def token_log_probs(model, ids, masked, block, shift):
    """{position: log p} of the `masked` positions, all of one block; what stands behind that block does not exist."""
    last = (max(masked) // block + 1) * block
    noisy = torch.tensor(ids[:last])
    noisy[list(masked)] = MASK
    dtype = model.lm_head.weight.dtype
    logits = model(noisy[None], attention_mask=block_causal(len(noisy), block, dtype)).logits[0]
    logp = logits.log_softmax(-1)
    return {i: logp[i - shift, ids[i]] for i in masked}


def exact_score(model, ids, prompt, block, shift):
    """Σ over blocks of Σ_m f(m) / (k C(L, k)): every mask of every block by itself."""
    total = 0.0
    for first in range(prompt // block * block, len(ids), block):
        own = range(max(prompt, first), min(first + block, len(ids)))
        for k in range(1, len(own) + 1):
            for masked in itertools.combinations(own, k):
                values = token_log_probs(model, ids, masked, block, shift).values()
                total = total + sum(values) / (k * comb(len(own), k))
    return total


PROMPT = [5, 6, 7, 8, 9, 10]


def answers(*texts, prompt=PROMPT):
    return [TokenAnswer(np.array([*prompt, *text, 1], np.int32), len(prompt)) for text in texts]


def batch_of(*pairs):
    made = [
        TokenPair(str(i), *answers(*pair[:2], prompt=pair[2] if len(pair) > 2 else PROMPT))
        for i, pair in enumerate(pairs)
    ]
    return collate(made, pad_id=0, epoch=0, step=0, micro=0, last_micro=True)


BATCH = batch_of(
    ([11, 12, 13, 14, 15], [11, 12, 20]),  # a block and more in common
    ([21], [22, 23, 24, 25, 26, 27, 28], [7, 8, 9, 10]),  # the prompt ends with a block
    ([31, 32, 33], [31, 32, 33, 34], [4]),  # a prompt within the first block
)
