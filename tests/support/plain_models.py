"""The families' forward passes written plainly from their layout descriptions: no imports from the package.

Every function takes a state dict with the published names and the published config keys, one row of tokens at a time,
and returns the logits of the whole row. Slow and obvious on purpose; fp64 throughout when the weights are fp64.
"""

import math

import torch


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rope(x_TD, frequencies):
    """Rotate each head vector: dimension j pairs with j + D/2, angle position * frequency_j."""
    out = torch.empty_like(x_TD)
    half = x_TD.shape[1] // 2
    for position in range(x_TD.shape[0]):
        for j in range(half):
            angle = position * float(frequencies[j])
            cos, sin = math.cos(angle), math.sin(angle)
            out[position, j] = x_TD[position, j] * cos - x_TD[position, j + half] * sin
            out[position, j + half] = x_TD[position, j + half] * cos + x_TD[position, j] * sin
    return out


def default_frequencies(head_size, theta):
    return [theta ** (-2 * j / head_size) for j in range(head_size // 2)]


def llama3_frequencies(head_size, theta, *, factor, low, high, original):
    out = []
    for frequency in default_frequencies(head_size, theta):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            out.append(frequency)
        elif wavelength > original / low:
            out.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append((1 - smooth) * frequency / factor + smooth * frequency)
    return out


def attention(q, k, v, *, heads, kv_heads, frequencies, norm_q=None, norm_k=None):
    """Every token attends to every token; query head h uses key head h // (heads / kv_heads)."""
    size = q.shape[1] // heads
    outputs = []
    for head in range(heads):
        group = head // (heads // kv_heads)
        qh = q[:, head * size : (head + 1) * size]
        kh = k[:, group * size : (group + 1) * size]
        vh = v[:, group * size : (group + 1) * size]
        if norm_q is not None:
            qh, kh = norm_q(qh), norm_k(kh)
        scores = rope(qh, frequencies) @ rope(kh, frequencies).T / math.sqrt(size)
        outputs.append(torch.softmax(scores, dim=-1) @ vh)
    return torch.cat(outputs, dim=1)


def silu(x):
    return x / (1 + torch.exp(-x))


def llada_logits(weights, config, ids):
    """LLaDA: names model.transformer.*; the head is transformer.ff_out, or wte when tied."""
    top = "model.transformer."
    eps, heads = config["rms_norm_eps"], config["n_heads"]
    frequencies = default_frequencies(config["d_model"] // heads, config["rope_theta"])
    x = weights[top + "wte.weight"][ids]
    for layer in range(config["n_layers"]):

        def w(name, layer=layer):
            return weights[f"{top}blocks.{layer}.{name}.weight"]

        h = rms_norm(x, w("attn_norm"), eps)
        q, k, v = h @ w("q_proj").T, h @ w("k_proj").T, h @ w("v_proj").T
        if config.get("include_qkv_bias"):
            bias = f"{top}blocks.{layer}."
            q, k, v = (
                t + weights[f"{bias}{name}_proj.bias"] for t, name in zip((q, k, v), ("q", "k", "v"), strict=True)
            )
        mixed = attention(q, k, v, heads=heads, kv_heads=config["n_kv_heads"], frequencies=frequencies)
        x = x + mixed @ w("attn_out").T
        h = rms_norm(x, w("ff_norm"), eps)
        x = x + (silu(h @ w("ff_proj").T) * (h @ w("up_proj").T)) @ w("ff_out").T
    x = rms_norm(x, weights[top + "ln_f.weight"], eps)
    logits = x @ weights[top + ("wte" if config["weight_tying"] else "ff_out") + ".weight"].T
    return logits / math.sqrt(config["d_model"]) if config.get("scale_logits") else logits


def decoder_logits(weights, config, ids, frequencies):
    """Dream, Qwen2, Qwen3 and Llama layouts without the causal mask. Row i predicts token i + 1."""
    eps, heads = config["rms_norm_eps"], config["num_attention_heads"]
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."

        def linear(name, h, prefix=prefix):
            out = h @ weights[f"{prefix}{name}.weight"].T
            bias = weights.get(f"{prefix}{name}.bias")
            return out if bias is None else out + bias

        def head_norm(name, prefix=prefix):
            weight = weights.get(f"{prefix}self_attn.{name}.weight")
            return None if weight is None else lambda t: rms_norm(t, weight, eps)

        h = rms_norm(x, weights[prefix + "input_layernorm.weight"], eps)
        mixed = attention(
            *(linear(f"self_attn.{name}_proj", h) for name in "qkv"),
            heads=heads,
            kv_heads=config["num_key_value_heads"],
            frequencies=frequencies,
            norm_q=head_norm("q_norm"),
            norm_k=head_norm("k_norm"),
        )
        x = x + linear("self_attn.o_proj", mixed)
        h = rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], eps)
        x = x + linear("mlp.down_proj", silu(linear("mlp.gate_proj", h)) * linear("mlp.up_proj", h))
    x = rms_norm(x, weights["model.norm.weight"], eps)
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return x @ weights[head + ".weight"].T
