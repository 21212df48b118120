"""How a model's records become tokens: the flags of encoding joined with the family's habits."""

from transformers import PreTrainedTokenizerBase

from data_pipeline.encode import Encoder, default_template
from diffdpo.models.architecture.spec import FamilySpec
from diffdpo.settings.data import EncodingSettings


def make_encoder(config: EncodingSettings, tokenizer: PreTrainedTokenizerBase, spec: FamilySpec) -> Encoder:
    """Text to tokens by the family's habits; `python -m data_pipeline inspect` shows the same."""
    return Encoder(
        tokenizer,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        truncation=config.truncation,
        answer_truncation=config.answer_truncation,
        template=config.template or default_template(tokenizer),
        terminator=spec.terminator_id,
        forbidden_ids=(spec.mask_token_id,),
    )
