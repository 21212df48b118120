"""A folder that one of the hosts does not see is refused; one that all see is left as it was."""

from types import SimpleNamespace

import pytest

from diffdpo.errors import UserError
from diffdpo.setup import shared_folder


def world(sees: str):
    """Of rank 0, with another rank that sees ``sees``."""
    return SimpleNamespace(
        size=2, is_main=True, broadcast=lambda v: v, barrier=lambda: None, all_gather_object=lambda own: [own, sees]
    )


@pytest.mark.parametrize("blind", ["", "worker-2"])
def test_what_is_seen(tmp_path, monkeypatch, blind):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    if blind:
        with pytest.raises(UserError, match="worker-2"):
            shared_folder.check_seen_by_all(tmp_path / "a" / "b", world(blind))
    else:
        shared_folder.check_seen_by_all(tmp_path / "a" / "b", world(blind))
    assert list(tmp_path.iterdir()) == []


def test_one_host_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    shared_folder.check_seen_by_all(tmp_path, world("worker-2"))


def test_a_file_that_never_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_folder, "PATIENCE", 0.3)
    assert not shared_folder._appears(tmp_path / "nothing")
    assert shared_folder._appears(tmp_path)
