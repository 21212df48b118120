"""A byte-level tokenizer made on the spot, small corpora, and shards of them."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# As LLaDA's: the header of the assistant's turn is appended always, asked for or not.
PHANTOM_TEMPLATE = (
    "{% for message in messages %}<head>{{ message['role'] }}</head>{{ message['content'] | trim }}<eot>{% endfor %}"
    "<head>assistant</head>"
)
SPECIAL = ["<pad>", "<eos>", "<mask>", "<head>", "</head>", "<eot>"]


def byte_tokenizer(merges: list[tuple[str, str]] | None = None, **kwargs) -> PreTrainedTokenizerFast:
    """Bytes as tokens, plus the given merges."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges or [])]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges or []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "mask_token": "<mask>"}
    extra = {"additional_special_tokens": ["<head>", "</head>", "<eot>"]}
    return PreTrainedTokenizerFast(tokenizer_object=core, **named, **extra, **kwargs)


def pair_rows(count: int, start: int = 0) -> list[dict]:
    """Pairs of varied length; the prompt names the number."""
    return [
        {
            "id": f"r{i}",
            "prompt": f"question {i} ",
            "chosen": f"good {i} " + "a" * (i % 13),
            "rejected": f"bad {i} " + "b" * (i % 7),
        }
        for i in range(start, start + count)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Without chat template."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """With a template that appends a phantom header."""
    made = byte_tokenizer()
    made.chat_template = PHANTOM_TEMPLATE
    return made


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache folder of this test only."""
    return tmp_path / "cache"


@pytest.fixture
def make_rows():
    """``pair_rows``."""
    return pair_rows


@pytest.fixture
def jsonl():
    """``write_jsonl``."""
    return write_jsonl


@pytest.fixture
def make_tokenizer():
    """``byte_tokenizer``."""
    return byte_tokenizer
