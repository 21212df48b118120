"""How sampled answers become pairs: who judges them, and which are set against one another."""

from dataclasses import dataclass
from typing import ClassVar

from diffdpo.errors import UserError
from diffdpo.settings.base import Settings, setting

PAIRINGS = ("best_worst", "right_wrong", "margin", "length_matched")


@dataclass(frozen=True, kw_only=True)
class PairingSettings(Settings):
    """The verifier and the pairing."""

    title: ClassVar[str] = "pairs"

    verifier: str = setting(
        "arithmetic",
        "arithmetic, gsm8k, number, exact, regex:PATTERN, module:function, scores:FILE; none: sample and end",
        common=True,
    )
    pairing: str = setting("best_worst", "which answers of a prompt make pairs", choices=PAIRINGS, common=True)
    right_at: float = setting(0.5, "score from which an answer is right")
    margin: float = setting(0.0, "least difference of the scores in a pair", at_least=0)
    max_pairs: int = setting(4, "most pairs a prompt; 0: all there are", at_least=0, common=True)

    def check(self) -> None:
        """What one way of pairing alone reads; and a margin that can be reached."""
        if self.pairing == "margin" and not self.margin:
            raise UserError("--pairing margin pairs by the difference of scores; say how large with --margin")
        for name in ("margin", "right_at"):
            if getattr(self, name) > 1 and not self.verifier.startswith("scores:"):
                raise UserError(f"--{name} is {getattr(self, name):g}, and --verifier {self.verifier} says 0 to 1")
