"""Reading a published `config.json` strictly: what is missing or contradictory is an error that names the key."""

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from diffdpo.errors import UserError

Setting = Any
"""Type of a field that must be given: None until it is, then what `require` checks it to be."""

RELATIVES: dict[str, tuple] = {
    "num_experts": (0, None),
    "block_size": (None,),
    "bd_size": (None,),
    "partial_rotary_factor": (1.0, None),
    "clip_qkv": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_shift": (0, 1, None),
}
"""Keys of other models under the same `model_type` (LLaDA-MoE, block diffusion, clipping): value allowed here."""
BLOCK_KEYS = {"block_size", "bd_size"}
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation")
LIKELY_TYPO = 0.9
"""Share of equal letters (difflib's ratio) from which an unknown key is taken for a misspelt one."""


def context_of(config: Any) -> int | None:
    """Tokens that a model was made for, where its config says so."""
    return getattr(config, "max_position_embeddings", None)


def block_size_of(config: PreTrainedConfig) -> int | None:
    """Tokens of a block of a block-causal family; None where attention is full, which is also written as 0."""
    return getattr(config, "block_size", None) or None


class PublishedConfig(PreTrainedConfig):
    """A config whose fields all start as None, so that nothing is guessed, and which writes back only what is set.

    (A null written for a key that was absent overrides the published code's default.) `optional_keys`: those whose
    absence is no error, so that a misspelt one would go unnoticed. `own_keys`:
    those of RELATIVES that mean something here. `least_block`: of a family that can be block-causal,
    the least `block_size` it may have (0 stands for full attention); None: it cannot.
    """

    optional_keys: ClassVar[frozenset[str]] = frozenset()
    own_keys: ClassVar[frozenset[str]] = frozenset()
    least_block: ClassVar[int | None] = None

    def to_dict(self) -> dict:
        """As in transformers, without the note of which keys were null."""
        return {key: value for key, value in super().to_dict().items() if key != "_null_keys"}

    def to_diff_dict(self) -> dict:
        """What is set, and the nulls that were read: the published code's default may be another value than null."""
        kept = {key: value for key, value in super().to_diff_dict().items() if value is not None}
        return kept | {key: None for key in getattr(self, "_null_keys", ()) if getattr(self, key, None) is None}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):  # type: ignore[override]
        """As in transformers, which would take the last of two names of one setting, and ignore a misspelt one."""
        if cls.least_block is not None:
            cls._check_block_keys(config_dict)
        for alias, name in cls.attribute_map.items():
            one, other = config_dict.get(name), config_dict.get(alias)
            if None not in (one, other) and one != other:
                raise UserError(f"{cls.model_type} config has {name}={one!r} and {alias}={other!r}: they must be equal")
        absent = cls.optional_keys - config_dict.keys()
        for key in config_dict.keys() - cls.optional_keys:
            for meant in difflib.get_close_matches(key, absent, 1, LIKELY_TYPO):
                raise UserError(f"{cls.model_type} config has {key}, which nothing reads: is {meant} meant?")
        # which kernel another program uses: PyTorch chooses it here, and transformers would ask for a package
        # and which scaling there is not: transformers warns of the name, whatever it holds
        known = {k: v for k, v in config_dict.items() if k not in KERNEL_KEYS and (k, v) != ("rope_scaling", None)}
        made = super().from_dict(known, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        config._null_keys = [key for key, value in known.items() if value is None and key not in RELATIVES]
        return made

    @classmethod
    def _check_block_keys(cls, given: Mapping[str, Any]) -> None:
        """Other families' name for a block's size says the same as this one's own, or nothing."""
        own = cls.attribute_map.get("block_size", "block_size")
        for name in BLOCK_KEYS - {own, "block_size"}:
            found, size = given.get(name), given.get(own, given.get("block_size"))
            if found is not None and found != size:
                said = f"{own}={size!r}" if size is not None else f"no {own}, which is this family's name for it"
                raise UserError(f"{cls.model_type} config has {name}={found!r} and {said}: correct config.json")

    def require(self, kinds: Mapping[str, type], optional: Mapping[str, type]) -> None:
        """Every key of `kinds` is there, and it and every set key of `optional` is of its type.

        An int counts as a float; numbers are finite and above 0, ids apart.
        """
        own = self.own_keys | (set() if self.least_block is None else BLOCK_KEYS)
        self.allow_only(
            {key: allowed for key, allowed in RELATIVES.items() if key not in own}
        )  # first: a relative lacks keys that nobody could add
        if self.least_block is not None:
            self._check_block(self.least_block)
        missing = [key for key in kinds if getattr(self, key, None) is None]
        if missing:
            raise UserError(f"{self.model_type} config lacks {', '.join(missing)}: add the key(s) to config.json")
        for key, kind in {**kinds, **optional}.items():
            value = getattr(self, key, None)
            if value is None:
                continue
            fits = _is_a(kind, value)
            amount = kind in (int, float) and fits and not key.endswith("token_id")
            self.refuse(
                [
                    (not fits, f"has {key}={value!r}; expected: {kind.__name__}"),
                    (amount and not 0 < value < math.inf, f"has {key}={value!r}; it must be above 0"),
                ]
            )

    def _check_block(self, least: int) -> None:
        """`block_size` is known: the same tensors mean another model under another one."""
        key, found = self.attribute_map.get("block_size", "block_size"), self.block_size
        full = " (0 where attention is full)" if least == 0 else ""
        known = type(found) is int and found >= least
        self.refuse(
            [
                (
                    found is None,
                    f"does not say how many tokens a block has{full}, and nothing else tells: give --block_size, or "
                    f"add {key} to config.json",
                ),
                (found is not None and not known, f"has {key}={found!r}; expected: a whole number from {least}{full}"),
            ]
        )

    def allow_only(self, supported: Mapping[str, tuple]) -> None:
        """Every key of `supported` that is set has one of its values."""
        for key, allowed in supported.items():
            found = getattr(self, key, None)
            known = any(found == value and _is_a(type(value), found) for value in allowed)
            self.refuse([(not known, f"has {key}={found!r}; supported: {_listed(allowed)}")])

    def check_token_ids(self, rows: int) -> None:
        """Mask, end and padding are tokens of an embedding with `rows` rows, where they are set."""
        for key in ("mask_token_id", "eos_token_id", "pad_token_id"):
            found = getattr(self, key, None)
            several = found if isinstance(found, list) and key == "eos_token_id" else None
            for token in several or [found]:
                known = token is None or (type(token) is int and 0 <= token < rows)
                self.refuse([(not known, f"has {key}={found!r}, no token of the vocabulary of {rows}")])

    def refuse(self, rules: Iterable[tuple[object, str]]) -> None:
        """Raise for the first (wrong, message) whose `wrong` is true."""
        for wrong, message in rules:
            if wrong:
                raise UserError(f"{self.model_type} config {message}")


def _is_a(kind: type, value: object) -> bool:
    """JSON's types: true is no number, 1.0 no integer; an integer is a number as well."""
    return type(value) is kind or (kind is float and type(value) is int)


def _listed(allowed: tuple) -> str:
    return ", ".join(repr(value) for value in allowed if value is not None) or "no such key"
