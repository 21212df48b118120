"""For each case of the self-test two models of the same numbers: on the device as a run holds it, and on the host in
float64, padded, in one graph, which is slow and right."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from data_pipeline.batch import PairBatch
from diffdpo.doctor.cases import BLOCK_SIZE, Case
from diffdpo.doctor.measured import sample_batch
from diffdpo.models.architecture.from_scratch import new_model
from diffdpo.models.bundled import BUNDLED_MODEL
from diffdpo.models.load import DTYPES, FAMILIES, LoadedModel, load_model, load_tokenizer, make_spec
from diffdpo.scores.masked_log_probs import MaskedLogProbs

SEED = 0
LIVELY = 4.0  # random weights are so small that attention hardly matters: this makes it matter
START = 0.02  # of a LoRA adapter's B, which is 0 before training


@dataclass(frozen=True)
class TwoModels:
    """``tried`` on the device, ``exact`` on the host; both score ``batch``."""

    tried: MaskedLogProbs
    exact: MaskedLogProbs
    batch: PairBatch


def two_models(case: Case, device: torch.device) -> TwoModels:
    """The models that a case compares."""
    loaded = _block_model(case) if case.blocks else _bundled(case, device)
    exact = _dequantised(loaded, case) if case.nf4 else copy.deepcopy(loaded.model).to("cpu", torch.float64)
    models = [loaded.model, exact]
    if case.nf4:
        models = [_adapted(model, loaded) for model in models]
        _copy_adapter(*models)
    else:
        models = [model.requires_grad_(True) for model in models]
    tried = MaskedLogProbs(models[0].to(device), loaded.spec, **case.scorer)
    return TwoModels(tried, MaskedLogProbs(models[1], loaded.spec, max_waste=1.0), sample_batch(loaded))


def _bundled(case: Case, device: torch.device) -> LoadedModel:
    return load_model(BUNDLED_MODEL, dtype=case.dtype, device=str(device), load_in_4bit=case.nf4)


def _block_model(case: Case) -> LoadedModel:
    """A random block-causal model with the bundled tokenizer: none comes with the package."""
    tokenizer = load_tokenizer(str(BUNDLED_MODEL))
    model = new_model(tokenizer, width=64, layers=2, heads=4, seed=SEED, block_size=BLOCK_SIZE)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(LIVELY)
    spec = make_spec(model.config, FAMILIES["sdar"], tokenizer)
    return LoadedModel(model.to(DTYPES[case.dtype]).eval(), tokenizer, spec)


def _dequantised(loaded: LoadedModel, case: Case) -> nn.Module:
    """The bundled model in float64 with the numbers that the 4-bit layers stand for."""
    from bitsandbytes.functional import dequantize_4bit

    exact = load_model(BUNDLED_MODEL, dtype=case.dtype).model.to(torch.float64)
    layers = dict(exact.named_modules())
    for name, layer in loaded.model.named_modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is not None:
            weight = layer.weight  # type: ignore[union-attr]
            layers[name].weight.data = dequantize_4bit(weight.data, state).to("cpu", torch.float64)  # type: ignore[attr-defined]
    return exact


def _adapted(model: nn.Module, loaded: LoadedModel) -> nn.Module:
    from diffdpo.models.lora.adapters import add_lora  # peft takes seconds to import

    return add_lora(model, loaded.spec, r=4, alpha=8)


def _copy_adapter(tried: nn.Module, exact: nn.Module) -> None:
    """An adapter that is not nothing, the same numbers in both."""
    generator, theirs = torch.Generator().manual_seed(SEED), dict(exact.named_parameters())
    with torch.no_grad():
        for name, parameter in tried.named_parameters():
            if parameter.requires_grad:
                value = START * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(value)
                theirs[name].copy_(value)
