"""How many samples the next step needs for a wanted standard error (``--target_stderr``)."""

import math

MINIMUM = 2  # one row cannot say how noisy it is


def next_num_samples(num_samples: int, *, stderr: float, target: float, maximum: int) -> int:
    """n for the next step, MINIMUM .. ``maximum``, from this step's ``num_samples`` and its ``stderr``.

    The standard error falls as n^-1/2, so n (stderr / target)² would have met the target, up to the noise in ``stderr``
    itself; n at most doubles or halves at a time, to ride that out. ``stderr`` and ``target`` have one unit (the
    training loop's: rewards, β times the log-ratio in nats; "noise/ratio_stderr" of ``losses.metrics.means`` times β),
    and ``stderr`` must be reduced over all ranks, so that every rank gets the same n. An unknown one (NaN) leaves n as
    it is.
    """
    if target <= 0:
        raise ValueError(f"target must be above 0, got {target}")
    if not math.isfinite(stderr):
        return max(MINIMUM, min(num_samples, maximum))
    wanted = math.ceil(num_samples * min(4.0, stderr / target) ** 2)
    wanted = max(num_samples // 2, min(wanted, 2 * num_samples))
    return min(max(MINIMUM, wanted), max(maximum, MINIMUM))
