"""The final model on the Hugging Face hub, where ``--push_to_hub`` asks for it.

Whether the hub knows the user is asked before anything slow begins; the push is the last thing a run does, when all of
it is on the disk. The token is in no message.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.hub import in_a_line
from diffdpo.config import RunConfig
from diffdpo.engine.world import World
from diffdpo.errors import TrainingError, UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def check_hub(config: RunConfig, world: World) -> None:
    """UserError where a push is asked for and the hub does not know who asks. One process asks for all."""
    if not config.push_to_hub:
        return
    trouble = world.broadcast(_trouble_with_user(config) if world.is_main else "")
    if trouble:
        raise UserError(f"--push_to_hub: {trouble}; see `hf auth login`, or give --hub_token")


def push_final(config: RunConfig, world: World, folder: Path, *, run_folder: Path) -> str:
    """Put ``folder`` on the hub; the address. TrainingError, on every process, where it did not arrive.

    Its name there is ``--hub_model_id``, else that of ``run_folder``. A repository that does not exist is made; files
    it has besides stay.
    """
    name = config.hub_model_id or run_folder.name
    address, trouble = world.broadcast(_pushed(config, name, folder) if world.is_main else ("", ""))
    if trouble:
        raise TrainingError(
            f"the final model is in {folder} and did not reach the hub ({trouble}); push it with `hf upload {name} "
            f"{folder}`"
        )
    return address


def _trouble_with_user(config: RunConfig) -> str:
    try:
        _api(config).whoami()
    except Exception as error:  # no token, a wrong one, no network: of many kinds, by several libraries
        return f"the hub does not tell who you are ({_without_token(error, config)})"
    return ""


def _pushed(config: RunConfig, name: str, folder: Path) -> tuple[str, str]:
    """(address, '') or ('', what went wrong)."""
    api = _api(config)
    try:
        made = api.create_repo(name, private=config.hub_private_repo, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="diffdpo: the final model")
    except Exception as error:  # as above; a failed push must not look like a failed run
        return "", _without_token(error, config)
    return str(made), ""


def _api(config: RunConfig) -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(token=config.hub_token)


def _without_token(error: Exception, config: RunConfig) -> str:
    text = in_a_line(error)
    return text.replace(config.hub_token, "***") if config.hub_token else text
