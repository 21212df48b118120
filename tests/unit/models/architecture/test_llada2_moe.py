"""LLaDA2-MoE against a plain implementation written from the layout: one row, one token and one expert at a time."""

import filecmp
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffdpo.errors import UserError
from diffdpo.models.architecture.llada2_moe import LLaDA2MoeModelLM
from diffdpo.models.architecture.router import balance_loss, take_spread, train_routers, whole_with_routers
from diffdpo.models.load import load_model, save_model
from diffdpo.models.lora.adapters import add_lora, reference
from diffdpo.noise.options import NoiseOptions
from diffdpo.sampling.decode import sample
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.rows import forward_rows
from tests.support.block_reference import BATCH, MASK, WORDS, tokenizer

CONFIG = {
    "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "attention_dropout": 0.0, "dtype": "bfloat16",
    "auto_map": {"AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
                 "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM"},
    "embedding_dropout": 0.0, "eos_token_id": 1, "first_k_dense_replace": 1, "head_dim": 8, "hidden_act": "silu",
    "hidden_size": 24, "initializer_range": 0.02, "intermediate_size": 40, "max_position_embeddings": 32768,
    "max_window_layers": 28, "moe_intermediate_size": 12, "moe_router_enable_expert_bias": True, "n_group": 4,
    "norm_head": False, "norm_topk_prob": True, "num_attention_heads": 4, "num_experts": 16, "num_experts_per_tok": 3,
    "num_hidden_layers": 3, "num_key_value_heads": 2, "num_shared_experts": 1, "output_dropout": 0.0,
    "output_router_logits": False, "pad_token_id": 1, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-6,
    "rope_scaling": None, "rope_theta": 600000, "routed_scaling_factor": 2.5, "router_dtype": "fp32",
    "score_function": "sigmoid", "sliding_window": 4096, "tie_word_embeddings": False, "topk_group": 2,
    "transformers_version": "4.52.3", "use_bias": False, "use_cache": True, "use_qk_norm": True, "use_qkv_bias": False,
    "use_rmsnorm": True, "use_sliding_window": False, "vocab_size": WORDS, "mask_token_id": MASK,
}  # fmt: skip


def tensors():
    """Published names, random values."""
    c, generator = CONFIG, torch.Generator().manual_seed(0)
    size, head, wide, narrow = 24, 8, 40, 12
    shapes = {"model.word_embeddings": (WORDS, size), "lm_head": (WORDS, size), "model.norm": (size,)}
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        shapes |= {p + "input_layernorm": (size,), p + "post_attention_layernorm": (size,)}
        shapes |= {p + "attention.query_key_value": (8 * head, size), p + "attention.dense": (size, 4 * head)}
        shapes |= {p + "attention.query_layernorm": (head,), p + "attention.key_layernorm": (head,)}
        mlps = {p + "mlp": wide}
        if layer:
            mlps = {p + f"mlp.experts.{e}": narrow for e in range(16)} | {p + "mlp.shared_experts": narrow}
            shapes[p + "mlp.gate"] = (16, size)
        for name, width in mlps.items():
            shapes |= {name + ".gate_proj": (width, size), name + ".up_proj": (width, size)}
            shapes[name + ".down_proj"] = (size, width)
    found = {
        name + ".weight": torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    for layer in (1, 2):
        found[f"model.layers.{layer}.mlp.gate.expert_bias"] = torch.randn(16, generator=generator) * 0.2
    return found


@pytest.fixture
def published(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    everything, index = tensors(), {}
    for shard in (1, 2, 3):
        name = f"model-0000{shard}-of-00003.safetensors"
        part = {key: everything[key] for key in sorted(everything)[shard - 1 :: 3]}
        save_file(part, folder / name, {"format": "pt"})
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    tokenizer().save_pretrained(folder)
    return folder


def norm(x, weight):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


def mlp(w, name, h):
    gate, up = w[name + ".gate_proj.weight"] @ h, w[name + ".up_proj.weight"] @ h
    return w[name + ".down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)


def experts(w, name, h):
    """One token through the router and its experts."""
    score = 1 / (1 + torch.exp(-(w[name + ".gate.weight"] @ h)))
    choice = (score + w[name + ".gate.expert_bias"]).tolist()
    worth = {g: sum(sorted(choice[4 * g : 4 * g + 4])[-2:]) for g in range(4)}
    best = sorted(worth, key=worth.get)[-2:]
    chosen = sorted((e for e in range(16) if e // 4 in best), key=lambda e: choice[e])[-3:]
    total = sum(score[e] for e in chosen)
    routed = sum(score[e] / total * 2.5 * mlp(w, f"{name}.experts.{e}", h) for e in chosen)
    return routed + mlp(w, name + ".shared_experts", h)


def turned(x, position):
    """Rotary positions on the first half of a head of 8."""
    out = x.clone()
    for j in range(2):
        angle = position * 600000 ** (-2 * j / 4)
        out[j] = x[j] * math.cos(angle) - x[j + 2] * math.sin(angle)
        out[j + 2] = x[j + 2] * math.cos(angle) + x[j] * math.sin(angle)
    return out


def plain_logits(w, ids, block):
    x = [w["model.word_embeddings.weight"][i] for i in ids]
    for layer in range(3):
        p = f"model.layers.{layer}."
        q, k, v = [], [], []
        for position, token in enumerate(x):
            h = (w[p + "attention.query_key_value.weight"] @ norm(token, w[p + "input_layernorm.weight"])).view(8, 8)
            ql, kl = w[p + "attention.query_layernorm.weight"], w[p + "attention.key_layernorm.weight"]
            q.append([turned(norm(h[i], ql), position) for i in range(4)])
            k.append([turned(norm(h[i], kl), position) for i in (4, 5)])
            v.append([h[6], h[7]])
        after = []
        for i, token in enumerate(x):
            seen = [j for j in range(len(x)) if j // block <= i // block]
            heads = []
            for head in range(4):
                weight = torch.stack([q[i][head] @ k[j][head // 2] / math.sqrt(8) for j in seen]).softmax(0)
                heads.append(sum(weight[n] * v[j][head // 2] for n, j in enumerate(seen)))
            token = token + w[p + "attention.dense.weight"] @ torch.cat(heads)
            h = norm(token, w[p + "post_attention_layernorm.weight"])
            after.append(token + (experts(w, p + "mlp", h) if layer else mlp(w, p + "mlp", h)))
        x = after
    return torch.stack([w["lm_head.weight"] @ norm(token, w["model.norm.weight"]) for token in x])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
def test_logits_equal_the_plain_implementation(published, dtype, tolerance):
    loaded = load_model(published, dtype=dtype)
    assert type(loaded.model) is LLaDA2MoeModelLM and loaded.spec.block_size == 32
    loaded.model.config.block_size = 4  # so that blocks matter within 11 tokens
    ids = [5, 6, 7, MASK, 9, 10, MASK, 12, 13, 14, MASK]
    w = {name: value.to(getattr(torch, dtype)) for name, value in tensors().items()}
    expected = plain_logits(w, ids, 4)
    assert (loaded.model(torch.tensor([ids])).logits[0] - expected).abs().max() <= tolerance * expected.abs().max()


def test_saved_as_published(published, tmp_path):
    loaded = load_model(published)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors().keys() and all(torch.equal(back[k], v) for k, v in tensors().items())
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert all(
        written.get(k) == v for k, v in CONFIG.items() if k not in ("dtype", "transformers_version", "use_cache")
    )
    again = load_model(tmp_path / "back")
    save_model(again.model, again.tokenizer, tmp_path / "again")
    assert filecmp.cmp(tmp_path / "back" / "model.safetensors", tmp_path / "again" / "model.safetensors", shallow=False)


def rows_of(spec):
    return NoiseOptions("mask_count", 2, 0, MASK, None, spec.block_size).draw_rows(BATCH, torch.device("cpu"))


def test_all_but_the_router_trains(published):
    loaded = load_model(published)
    loaded.model.requires_grad_(True)
    forward_rows(MaskedLogProbs(loaded.model, loaded.spec), rows_of(loaded.spec)).sum().backward()
    frozen = {name for name, p in loaded.model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name in tensors() if ".mlp.gate." in name}
    assert all(p.grad is not None for p in loaded.model.parameters() if p.requires_grad)


def test_a_trained_router(published):
    """In full training its weight, beside an adapter a copy of it; the selection bias never."""
    loaded = load_model(published)
    train_routers(loaded.model)
    loaded.model.requires_grad_(True)
    whole = MaskedLogProbs(loaded.model, loaded.spec)
    forward_rows(whole, rows_of(loaded.spec)).sum().backward()
    assert all(float(layer.mlp.gate.weight.grad.abs().sum()) > 0 for layer in loaded.model.blocks[1:])
    assert {n for n, p in loaded.model.named_parameters() if not p.requires_grad} == {
        n for n in tensors() if n.endswith("expert_bias")
    }
    adapted = add_lora(loaded.model, loaded.spec, r=2, modules_to_save=whole_with_routers(loaded.model, "norm"))
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.0)
    module = MaskedLogProbs(adapted, loaded.spec)
    expected = forward_rows(module, rows_of(loaded.spec)).detach()
    forward_rows(module, rows_of(loaded.spec)).sum().backward()
    optimizer.step()
    changed = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert sum("gate.modules_to_save.default.weight" in name for name in changed) == 2
    assert not any("expert_bias" in name or "original_module" in name for name in changed)
    with reference(adapted):
        assert torch.equal(forward_rows(module, rows_of(loaded.spec)).detach(), expected)


def test_balance_of_a_router(published):
    """Against the formula, token by token; what the reference runs is not in it."""
    loaded = load_model(published)
    assert take_spread(loaded.model.requires_grad_(True)) is None
    train_routers(loaded.model)
    loaded.model.requires_grad_(True)
    gate, h = loaded.model.blocks[1].mlp.gate, torch.randn(50, 24)
    with torch.no_grad():
        gate(torch.ones(5, 24))
    chosen, _ = gate(h)
    score = torch.sigmoid(h @ gate.weight.T).detach()
    score = score / score.sum(1, keepdim=True)
    expected = sum(16 * float((chosen == e).sum()) / 150 * float(score[:, e].mean()) for e in range(16))
    spread = take_spread(loaded.model)
    assert spread.shape == (2, 2, 16) and balance_loss(spread[:1]) == pytest.approx(expected, rel=1e-5)
    assert balance_loss(torch.ones(3, 2, 16)) == pytest.approx(1)
    assert not take_spread(loaded.model).any()


def test_no_router_to_train(tiny_model):
    with pytest.raises(UserError, match="--train_router: models of type 'llada' have no router"):
        train_routers(load_model(tiny_model).model)


def test_an_adapter_goes_on_attention_and_shared_experts(published):
    loaded = load_model(published)
    adapted = add_lora(loaded.model, loaded.spec, r=2)
    names = {name.split(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(names) == 3 * 2 + 3 * 3 and not any(".experts." in name for name in names)
    forward_rows(MaskedLogProbs(adapted, loaded.spec), rows_of(loaded.spec)).sum().backward()
    names = {
        n
        for n, p in add_lora(load_model(published).model, loaded.spec, r=2, target_modules="up_proj").named_parameters()
        if p.requires_grad
    }
    assert any(".experts.15." in name for name in names)


def test_nf4_and_sampling(published):
    pytest.importorskip("bitsandbytes")
    loaded = load_model(published, load_in_4bit=True)
    assert type(loaded.model.model.layers[1].mlp.experts[0].up_proj).__name__ == "Linear4bit"
    assert forward_rows(MaskedLogProbs(loaded.model, loaded.spec), rows_of(loaded.spec)).isfinite().all()
    (answer,) = sample(loaded.model, loaded.spec, [[5, 6, 7]], gen_length=8, steps=8)
    assert MASK not in answer


@torch.no_grad()
def test_kept_blocks_give_the_tokens_of_recomputing_all(published):
    """Blocks of 4, one token a step, the surest first; the forward of everything at every step."""
    settings = json.loads((published / "config.json").read_text()) | {"block_size": 4}
    (published / "config.json").write_text(json.dumps(settings))
    loaded = load_model(published, dtype="float64")
    prompts = [[5, 6, 7], [8, 9, 10, 11], [3] * 9]
    for prompt, answer in zip(prompts, sample(loaded.model, loaded.spec, prompts, gen_length=8, steps=8), strict=True):
        x = prompt + [MASK] * (-(len(prompt) + 8) % 4 + 8)
        for first in range(len(prompt) // 4 * 4, len(x), 4):
            while MASK in x[first : first + 4]:
                logits = loaded.model(torch.tensor([x[: first + 4]])).logits[0]
                logits[:, MASK] = -torch.inf
                sure = {i: logits[i].softmax(-1).max(-1) for i in range(first, first + 4) if x[i] == MASK}
                best = max(sure, key=lambda i: float(sure[i].values))
                x[best] = int(sure[best].indices)
        written = x[len(prompt) :][:8]
        assert answer == (written[: written.index(1)] if 1 in written else written)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"score_function": "softmax"}, "score_function='softmax'"),
        ({"n_group": 3}, "num_experts=16, not a multiple of n_group=3"),
        ({"num_experts_per_tok": 9}, "2 groups hold 8"),
        ({"use_qk_norm": False}, "use_qk_norm=False"),
        ({"use_bias": True}, "use_bias=True"),
        ({"topk_group": 5}, "topk_group=5 of n_group=4"),
        ({"partial_rotary_factor": 0.4}, "rotates 3 of 8"),
        ({"num_experts": None}, "lacks num_experts"),
    ],
)
def test_relatives_are_refused(published, changes, words):
    settings = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (published / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=words):
        load_model(published)
