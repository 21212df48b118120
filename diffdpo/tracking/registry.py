"""A run's final model in MLflow's registry: a version with an alias, which loads with ``mlflow.pyfunc`` and answers."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

from diffdpo.errors import TrainingError, UserError
from diffdpo.settings.credentials import in_a_line
from diffdpo.settings.tracking import name_and_alias
from diffdpo.tracking.mlflow_run import Shipped, client_of

FOLDER = "model"  # among the run's artifacts
PARAMETERS = {"gen_length": 64, "block_length": 16, "temperature": 0.0, "seed": 0}
"""Of ``predict``, with their defaults."""


def register(output_dir: Path, text: str) -> str:
    """Log ``final/`` to the run as a model and make it a version. ``NAME version 3, alias newest``.

    UserError where there is no such run or model; TrainingError, in one line, when MLflow does not take it.
    """
    name, alias = name_and_alias(text)
    shipped, final = Shipped.read(output_dir), output_dir / "final"
    if not final.is_dir():
        raise UserError(f"{output_dir} has no final/; only a finished run can be registered")
    if shipped.run_id is None:
        raise UserError(f"{output_dir} is not in MLflow yet; send it first: python -m diffdpo.tracking {output_dir}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of signatures and examples, which are given
            version = _register(shipped, shipped.run_id, final, name, alias)
    except Exception as error:  # every kind of store fails in its own way
        reason = in_a_line(error)
        raise TrainingError(f"{shipped.tracking_uri} does not take the model ({reason})") from error
    return f"{name} version {version}, alias {alias}"


def _register(shipped: Shipped, run_id: str, final: Path, name: str, alias: str) -> str:
    from mlflow.exceptions import MlflowException

    client = client_of(shipped.tracking_uri)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".model") as folder:
        _save(final, Path(folder) / FOLDER)
        client.log_artifacts(run_id, str(Path(folder) / FOLDER), FOLDER)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"{client.get_run(run_id).info.artifact_uri}/{FOLDER}"
    version = client.create_model_version(name, source, run_id=run_id).version
    client.set_registered_model_alias(name, alias, version)
    return str(version)


def _save(final: Path, folder: Path) -> None:
    """The model's files with what makes them a ``pyfunc``."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    kinds: dict[type, Any] = {int: "long", float: "double"}
    params = [ParamSpec(key, kinds[type(value)], value) for key, value in PARAMETERS.items()]
    mlflow.pyfunc.save_model(
        str(folder),
        python_model=str(Path(__file__).with_name("pyfunc_model.py")),
        artifacts={"model": str(final.resolve())},
        signature=ModelSignature(Schema([ColSpec("string")]), Schema([ColSpec("string")]), ParamSchema(params)),
        pip_requirements=["diffdpo"],
    )
