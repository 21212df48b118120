"""Runs sent to MLflow after their end: what a server that was away has missed."""

from pathlib import Path

from diffdpo.errors import TrainingError, UserError
from diffdpo.tracking.lock import is_held
from diffdpo.tracking.mlflow_run import STATE_FILE, Shipped, ship_later


def sync(folder: Path) -> bool:
    """Send a run, and say what came of it. False where it could not be sent."""
    if not (folder / STATE_FILE).exists():
        print(f"{folder}: was not told to MLflow (--tracking_uri none)")
        return True
    if is_held(folder):
        print(f"{folder}: is running, and sends by itself")
        return True
    try:
        if Shipped.read(folder).delivered:
            print(f"{folder}: all of it is in MLflow")
            return True
        print(f"{folder}: all {ship_later(folder)} lines are in MLflow now")
        return True
    except (UserError, TrainingError) as error:
        print(f"{folder}: NOT sent: {error}")
        return False
