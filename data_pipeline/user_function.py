"""A user's function by name, ``module:function``: imported from the working folder or from what is installed."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from data_pipeline.errors import DataError


def user_function(name: str, parameters: Sequence[str], *, what: str) -> Callable[..., Any]:
    """The function that ``name`` (``module:function``, or ``path/to/file.py:function``) stands for.

    It runs the module's code: it is the user's own, named on the user's own command line. DataError, naming ``what`` it
    is for, where there is no such module or function, where importing it fails, and where it does not take the
    ``parameters``.
    """
    module_name, _, function_name = name.rpartition(":")
    if not module_name or not function_name:
        raise DataError(f"{what} {name!r} is not written module:function; for example my_tasks:judge")
    module = _imported(module_name, f"{what} {name}")
    found: Any = module
    for part in function_name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        there = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        listed = f"; it has {', '.join(sorted(there)[:8])}" if there else ""
        raise DataError(f"{what} {name}: {module_name} has no function {function_name}{listed}")
    try:
        inspect.signature(found).bind(*parameters)
    except TypeError as error:
        asked = ", ".join(parameters)
        raise DataError(f"{what} {name}: it must take ({asked}), and {function_name} does not: {error}") from None
    except ValueError:
        pass  # a builtin without a signature: the call will tell
    return found


def _imported(module_name: str, where: str) -> ModuleType:
    path = Path(module_name)
    if path.suffix == ".py" and not path.is_file():
        raise DataError(f"{where}: there is no file {path}")
    try:
        return _of_file(path) if path.suffix == ".py" else _of_name(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise DataError(
                f"{where}: there is no module {module_name}, in the working folder or installed; run the command "
                "where the file lies, or write path/to/file.py:function"
            ) from None
        raise DataError(f"{where}: importing {module_name} needs {missing}, which is not installed") from error
    except Exception as error:
        raise DataError(f"{where}: importing {module_name} failed: {type(error).__name__}: {error}") from error


def _of_file(path: Path) -> ModuleType:
    """By its place: a file named like an installed module is not taken for that one. Once for each file."""
    name = f"user_function_{path.resolve().as_posix()}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None, "a .py file has a loader"
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _of_name(name: str) -> ModuleType:
    """The working folder is looked in last: it must not hide an installed package."""
    folder = str(Path.cwd())
    added = folder not in sys.path and "" not in sys.path
    if added:
        sys.path.append(folder)
    try:
        return importlib.import_module(name)
    finally:
        if added:
            sys.path.remove(folder)
