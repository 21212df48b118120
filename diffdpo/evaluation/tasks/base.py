"""A task: items made from records, what a model does with each of them, and what that comes to.

A task knows nothing of files, processes or other tasks. ``evaluation/suite.py`` runs it over the command's processes
and goes on where it stopped; training runs it between steps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from diffdpo.models.load import LoadedModel

Line = dict[str, Any]
"""What came of one item, as JSON: ``id`` and whatever the task's figures are made of."""
Forward = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated. ``policy``: its log-probabilities of masked tokens, as ``MaskedLogProbs`` or an engine
    gives them; ``reference``: the same of a second model."""

    loaded: LoadedModel
    policy: Forward
    device: torch.device
    reference: Forward | None = None


@dataclass(frozen=True)
class Key:
    """What an item is known by: its record's id, and 16 hex digits of what is asked, which tell whether a line that
    was written before is of this item."""

    id: str
    digest: str


class Task(Protocol):
    """Items, and what they are asked for."""

    name: str
    keys: list[Key]
    left_out: list[str]
    """Records that make no item here, each with the reason, as words for the user."""

    def identity(self) -> Mapping[str, Any]:
        """What a line depends on besides item and model: settings of noise, encoding and sampling."""
        ...

    def lines(self, subject: Subject, numbers: Sequence[int]) -> list[Line]:
        """One line for each of these items. The same whatever other items are asked for with it."""
        ...

    def figures(self, lines: Sequence[Line]) -> dict[str, Any]:
        """What the lines come to: figures by name, each with its error (``estimate.figure``), and breakdowns."""
        ...

    def values(self, lines: Sequence[Line]) -> dict[str, float]:
        """The value of each item, by id, that two models are compared by; larger is better."""
        ...
