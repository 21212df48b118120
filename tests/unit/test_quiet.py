"""What is kept from the screen, and what is not."""

import logging
import warnings

import pytest

from diffdpo.quiet import LOGGERS, NO_NEWS, hush


@pytest.fixture(autouse=True)
def as_it_was():
    before = {name: list(logging.getLogger(name).filters) for name in LOGGERS}
    with warnings.catch_warnings():
        yield
    for name, filters in before.items():
        logging.getLogger(name).filters[:] = filters


def said(name: str, text: str) -> bool:
    """Whether a warning of this logger would be handled."""
    record = logging.LogRecord(name, logging.WARNING, "x.py", 1, text, (), None)
    return bool(logging.getLogger(name).filter(record))


@pytest.mark.parametrize("name", LOGGERS)
def test_only_what_is_no_news_is_kept_back(name):
    hush()
    hush()
    assert not any(said(name, text + " ...") for text in NO_NEWS)
    assert said(name, "a checkpoint is damaged") and said("diffdpo", NO_NEWS[0])


@pytest.mark.parametrize(
    ("module", "kind", "shown"),
    [
        ("transformers.utils", FutureWarning, False),
        ("torch", FutureWarning, False),
        ("transformers.utils", UserWarning, True),
        ("torchvision_of_mine", FutureWarning, True),
        ("__main__", FutureWarning, True),
    ],
)
def test_warnings_to_authors_are_kept_from_users(module, kind, shown):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        hush()
        warnings.warn_explicit("it will change", kind, "x.py", 1, module=module)
    assert bool(heard) == shown
