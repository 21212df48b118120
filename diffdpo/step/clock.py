"""Seconds of a step by part, without holding the device up: on a GPU by events, which are read after the step."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Clock:
    """``clock("noise", work, ...)`` calls ``work(...)`` and adds its time to that part."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, part: str, work: Callable[..., T], *args: Any, **options: Any) -> T:
        """What ``work`` returns."""
        if self.cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = work(*args, **options)
            end.record()
            self.events.append((part, start, end))
            return result
        started = time.perf_counter()
        result = work(*args, **options)
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started
        return result

    def taken(self) -> dict[str, float]:
        """Seconds by part since it was last asked. Call it after what waits for the device anyway."""
        for part, start, end in self.events:
            end.synchronize()
            self.seconds[part] = self.seconds.get(part, 0.0) + start.elapsed_time(end) / 1000
        found, self.seconds, self.events = self.seconds, {}, []
        return found
