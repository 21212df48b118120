"""A tokenizer beside a saved model: the files it came from, or files that transformers 4 and 5 read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffdpo.models.architecture.from_scratch import new_model
from diffdpo.models.bundled import model_or_bundled
from diffdpo.models.checkpoint.tokenizer_files import CONFIG, TEMPLATE, save_tokenizer
from diffdpo.models.load import load_model, load_tokenizer, save_model
from diffdpo.models.lora.adapters import add_lora

CHAT = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
TEXT = "12 + 3 = 15"


@pytest.fixture
def published(tmp_path, tokenizer):
    """A folder as transformers 4 writes it, with files that 5 would not write."""
    folder = tmp_path / "published"
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / CONFIG).read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast", "odd": 1}
    settings = {key: value for key, value in settings.items() if key not in ("backend", "is_local")}
    (folder / CONFIG).write_text(json.dumps(settings | {"chat_template": CHAT}))
    (folder / TEMPLATE).unlink(missing_ok=True)
    (folder / "special_tokens_map.json").write_text('{\n  "eos_token": "<|endoftext|>"}\n')
    return folder


def test_what_was_read_is_kept_byte_for_byte(published, tmp_path):
    save_tokenizer(load_tokenizer(str(published)), tmp_path / "saved")
    there = {path.name: path.read_bytes() for path in published.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == there


def test_a_tokenizer_with_code_of_its_own_keeps_its_code_and_its_vocabulary(tmp_path):
    folder = tmp_path / "dream"
    folder.mkdir()
    letters = [*"abc", "Ġ", "Ċ"]
    (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenization_dream.py").write_text("raise SystemExit('never run')\n")
    end, mask = "<|endoftext|>", "<|mask|>"
    added = {"5": {"content": end, "special": True}, "6": {"content": mask, "special": True}}
    named = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
    settings = {"tokenizer_class": "DreamTokenizer", "auto_map": named, "added_tokens_decoder": added}
    named_tokens = {"eos_token": end, "pad_token": end, "unk_token": end, "mask_token": mask}
    (folder / CONFIG).write_text(json.dumps(settings | named_tokens))
    save_tokenizer(load_tokenizer(str(folder)), tmp_path / "saved")
    there = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == there


def test_a_tokenizer_with_more_tokens_is_written_as_both_versions_read_it(published, tmp_path):
    tokenizer = load_tokenizer(str(published))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    save_tokenizer(tokenizer, tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / CONFIG).read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and settings["chat_template"] == CHAT
    assert not isinstance(settings.get("extra_special_tokens"), list) and not {"backend", "is_local"} & settings.keys()
    again = load_tokenizer(str(tmp_path / "saved"))
    assert again.get_vocab() == tokenizer.get_vocab() and again.chat_template == CHAT
    assert again("<|new|>" + TEXT).input_ids == tokenizer("<|new|>" + TEXT).input_ids


def test_files_that_changed_since_are_not_taken(published, tmp_path):
    tokenizer = load_tokenizer(str(published))
    settings = json.loads((published / CONFIG).read_text())
    (published / CONFIG).write_text(json.dumps(settings | {"chat_template": "another"}))
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved")).chat_template == CHAT


def _take_template_out(folder):
    settings = json.loads((folder / CONFIG).read_text())
    del settings["chat_template"]
    (folder / CONFIG).write_text(json.dumps(settings))
    (folder / TEMPLATE).write_text(CHAT)
    return settings


@pytest.mark.parametrize("named", [False, True])
def test_a_template_in_a_file_of_its_own_stands_in_the_config_too(published, tmp_path, named):
    """4.46 does not read the file."""
    settings = _take_template_out(published)
    if named:
        (published / "additional_chat_templates").mkdir()
        (published / "additional_chat_templates" / "rag.jinja").write_text("rag" + CHAT)
    save_tokenizer(load_tokenizer(str(published)), tmp_path / "saved")
    there = json.loads((tmp_path / "saved" / CONFIG).read_text())
    templates = [{"name": "default", "template": CHAT}, {"name": "rag", "template": "rag" + CHAT}]
    found = there.pop("chat_template")
    assert (sorted(found, key=lambda each: each["name"]) == templates) if named else found == CHAT
    assert there == settings
    again = load_tokenizer(str(tmp_path / "saved"))
    assert again.chat_template == ({each["name"]: each["template"] for each in templates} if named else CHAT)
    names = {str(path.relative_to(published)) for path in published.rglob("*.json*")} | {TEMPLATE}
    assert {name for name in names if not (tmp_path / "saved" / name).is_file()} == set()


OLD = """
import json, sys, transformers
from transformers import AutoTokenizer
assert transformers.__version__.startswith(sys.argv[3]), transformers.__version__
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
turns = [{"role": "user", "content": "1"}]
chat = tokenizer.apply_chat_template(turns, tokenize=False) if tokenizer.chat_template else ""
print(json.dumps([tokenizer(sys.argv[2]).input_ids, tokenizer.eos_token_id, tokenizer.pad_token_id, chat]))
"""


@pytest.fixture(scope="module", params=[("4.46", "0.21"), ("4.57", "0.23")], ids=["4.46", "4.57"])
def transformers_4(request, tmp_path_factory):
    """A version of transformers, and a folder with it for PYTHONPATH: the oldest and the newest that are pinned."""
    version, below = request.param
    folder = tmp_path_factory.mktemp("transformers_4")
    packages = [f"transformers=={version}.*", "huggingface_hub<1", f"tokenizers<{below}"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
    if subprocess.run(command, timeout=500).returncode:
        pytest.skip(f"transformers {version} cannot be had here")
    return version, folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["new", "kept", "template in a file", "more tokens", "adapter", "bundled"])
def test_transformers_4_reads_it_alike(command, published, tokenizer, tmp_path, transformers_4, kind):
    folder = tmp_path / "saved"
    if kind == "template in a file":
        _take_template_out(published)
    ours = tokenizer if kind in ("new", "adapter") else load_tokenizer(str(published))
    if kind == "more tokens":
        ours.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    if kind == "adapter":
        save_model(new_model(tokenizer, width=32, layers=1, heads=2, seed=0), tokenizer, tmp_path / "base")
        loaded = load_model(tmp_path / "base")
        save_model(add_lora(loaded.model, loaded.spec, r=2), loaded.tokenizer, folder)
    elif kind == "bundled":
        folder = Path(model_or_bundled(None))
        ours = load_tokenizer(str(folder))
    else:
        save_tokenizer(ours, folder)
    text = TEXT + ("<|new|>" if kind == "more tokens" else "")
    version, packages = transformers_4
    line = [sys.executable, "-c", OLD, str(folder), text, version]
    done = command(line, PYTHONPATH=str(packages), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    chat = "<user>1" if kind in ("kept", "template in a file", "more tokens") else ""
    assert json.loads(done.stdout) == [ours(text).input_ids, ours.eos_token_id, ours.pad_token_id, chat]
