"""transformers' Llama and Qwen models in fp64: their norms and rotary positions are made in fp32 otherwise."""

import torch


def widen(model):
    """The same model with norms and rotary positions in the dtype of its weights; in place."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _norm(module)
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = _rotary(model.config, model.lm_head.weight.dtype)
    return model


def _norm(module):
    def forward(x):
        return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon))

    return forward


def _rotary(config, dtype):
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    theta = config.rope_parameters["rope_theta"]
    frequency = 1 / theta ** (torch.arange(0, size, 2, dtype=dtype) / size)

    def forward(x, position_ids, *_, **__):
        angle = position_ids[:, :, None].to(dtype) * frequency
        both = torch.cat((angle, angle), -1)
        return both.cos(), both.sin()

    return forward
