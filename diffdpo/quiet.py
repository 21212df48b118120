"""Words of other libraries that are no news to who runs a command here: kept from the screen. No torch in here."""

import logging
import warnings

NO_NEWS = (
    "Setting accelerator to CPU",  # DeepSpeed, where the line of the engine says so
    "Failed to load CPU gemm_4bit_forward",  # bitsandbytes, of a kernel that is not used: it has no gradient
)
LOGGERS = ("DeepSpeed", "bitsandbytes.backends.cpu.ops")
OTHERS = r"(accelerate|bitsandbytes|datasets|deepspeed|huggingface_hub|mlflow|peft|torch|transformers)(\.|$)"


class _NoNews(logging.Filter):
    """Everything else of these loggers is shown."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(NO_NEWS)


def hush() -> None:
    """For this process, before these libraries are imported: lines that nobody can act on, and warnings to their own
    authors of what will change. Errors and other warnings stay."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(known, _NoNews) for known in logger.filters):
            logger.addFilter(_NoNews())
    for kind in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=kind, module=OTHERS)
