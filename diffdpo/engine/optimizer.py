"""AdamW's settings, as every engine takes them. No torch in here."""

from dataclasses import dataclass

from diffdpo.settings.engine import EngineSettings


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW's settings. ``learning_rate`` is the peak; each step is told its own."""

    learning_rate: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    max_grad_norm: float = 0.0  # 0: no clipping

    @classmethod
    def of(cls, settings: EngineSettings) -> "OptimizerOptions":
        """From the flags, the rate of which must have been chosen by now."""
        assert settings.learning_rate is not None, "config.resolve has chosen one"
        return cls(
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=(settings.adam_beta1, settings.adam_beta2),
            epsilon=settings.adam_epsilon,
            max_grad_norm=settings.max_grad_norm,
        )
