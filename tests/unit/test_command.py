"""What every command sets before torch is imported."""

import os

import pytest

from diffdpo import command


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in command.ALLOCATORS:
        monkeypatch.delenv(name, raising=False)
    yield
    os.environ.pop(command.ALLOCATORS[0], None)


@pytest.mark.parametrize(("version", "sets"), [("2.13.0+cu130", True), ("2.12.1", False), ("3.0", True)])
def test_the_allocator_is_told_where_torch_understands_it(monkeypatch, version, sets):
    monkeypatch.setattr(command.metadata, "version", lambda name: version)
    command.set_allocator()
    assert (os.environ.get(command.ALLOCATORS[0]) == command.ALLOCATOR) is sets


@pytest.mark.parametrize("name", command.ALLOCATORS)
def test_what_the_user_says_stands(monkeypatch, name):
    monkeypatch.setenv(name, "backend:native")
    command.set_allocator()
    assert os.environ[name] == "backend:native" and not set(command.ALLOCATORS) - {name} & set(os.environ)


def test_without_torch(monkeypatch):
    monkeypatch.setattr(command, "_has_torch", lambda: False)
    command.set_allocator()
    assert command.ALLOCATORS[0] not in os.environ
