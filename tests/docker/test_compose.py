"""compose.yaml and the values it asks for."""

import copy
import re

import pytest
import yaml

from tests.cluster.lines import train_config
from tests.docker.compose import VARIABLE, read_compose, read_env
from tests.docker.image import exec_form, read_dockerfile
from tests.support.paths import ROOT

COMPOSE = ROOT / "docker/compose.yaml"
SECRETS = dict.fromkeys(read_env(ROOT / "docker/.env.example"), "filled in")


@pytest.fixture
def compose():
    return read_compose(COMPOSE, SECRETS)


def test_it_follows_the_specification(compose):
    assert set(compose["services"]) == {"trainer", "trainer-cpu", "mlflow", "postgres"}


@pytest.mark.parametrize("place", [[], ["services", "mlflow"], ["services", "postgres", "healthcheck"]])
def test_an_unknown_key_would_be_found(compose, place, tmp_path):
    broken = copy.deepcopy(compose)
    found = broken
    for key in place:
        found = found[key]
    found["intervall"] = "3s"
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(broken))
    with pytest.raises(Exception, match="intervall"):
        read_compose(tmp_path / "compose.yaml", SECRETS)


def test_every_secret_is_asked_for_and_none_is_given():
    text, asked = COMPOSE.read_text(), read_env(ROOT / "docker/.env.example")
    assert {name for name, _ in VARIABLE.findall(text)} == set(asked) and set(asked.values()) == {""}
    secret = re.findall(r"(?:PASSWORD|SECRET_KEY): *(\S+)", text)
    assert len(secret) == 5 and all(value.startswith("${") for value in secret)


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("value", [None, ""])
def test_nothing_starts_without_one(name, value):
    given = SECRETS | {name: value} if value is not None else {k: v for k, v in SECRETS.items() if k != name}
    with pytest.raises(ValueError, match=f"{name}: fill in docker/.env"):
        read_compose(COMPOSE, given)


def test_filled_in_values_are_not_committed(command):
    assert command(["git", "check-ignore", "docker/.env"]).returncode == 0


def test_volumes_images_and_services_are_there(compose):
    for name, service in compose["services"].items():
        used = {volume.split(":")[0] for volume in service["volumes"]}
        assert used <= set(compose["volumes"]), name
        assert re.fullmatch(r"[\w/-]+:(?!latest)[\w.-]+", service["image"]), name
        for other, how in service.get("depends_on", {}).items():
            assert "healthcheck" in compose["services"][other] and how == {"condition": "service_healthy"}
        if "build" in service:
            dockerfile = ROOT / service["build"]["dockerfile"]
            mounted = [volume.split(":")[1] for volume in service["volumes"]]
            kept = next(exec_form(i.value) for i in read_dockerfile(dockerfile) if i.name == "VOLUME")
            assert sorted(mounted) == sorted(kept), name  # the image makes them writable for its user


def test_the_trainer_s_flags_exist(compose, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("trainer", "trainer-cpu"):
        line = compose["services"][name]["command"]
        config = train_config(line)
        assert config.tracking_uri == "http://mlflow:5000" and config.resume_from_checkpoint == "auto"
        assert compose["services"][name]["stop_grace_period"] == "2m" and config.stop_seconds < 120
        image = next(
            i for i in read_dockerfile(ROOT / compose["services"][name]["build"]["dockerfile"]) if i.name == "CMD"
        )
        start = exec_form(image.value)
        assert line[: line.index("launch/train.py")] == start[: start.index("launch/train.py")]
