"""Names and passwords in addresses: taken out for every record, and found again by who sends."""

import base64
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import yaml

from diffdpo.config import ScoreConfig, TrainConfig, make_config, to_yaml
from diffdpo.errors import TrainingError, UserError
from diffdpo.settings.base import changed, public, without_secrets
from diffdpo.settings.credentials import PASSWORD, STORE, TOKEN, USER, given_back, hidden, in_a_line, taken, untold
from diffdpo.tracking.journal import Journal
from diffdpo.tracking.mlflow_run import Shipped, ship_later
from diffdpo.tracking.run import Tracking, tracking_uri

SECRET = "sw0rdfish"


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch):
    for name in (USER, PASSWORD, TOKEN, STORE):
        monkeypatch.setenv(name, "")  # so that what a test sets in os.environ is undone
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("given", "kept", "user", "password"),
    [
        ("http://alice:sw0rdfish@host:5000/base", "http://host:5000/base", "alice", SECRET),
        ("https://alice:p%40ss%2F1@host", "https://host", "alice", "p@ss/1"),
        ("https://alice:p@ss@host", "https://host", "alice", "p@ss"),
        ("https://alice@host", "https://host", "alice", None),
        ("postgresql+psycopg2://a:b@db/x?sslmode=require", "postgresql+psycopg2://db/x?sslmode=require", "a", "b"),
        ("mysql://db/x?user=a&password=b", "mysql://db/x", "a", "b"),
        ("http://host:5000", "http://host:5000", None, None),
        ("sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/a@b/mlflow.db", None, None),
        ("none", "none", None, None),
    ],
)
def test_who_asks_goes_to_the_environment(given, kept, user, password):
    assert taken(given) == kept and taken(kept) == kept
    assert (os.environ.get(USER), os.environ.get(PASSWORD)) == (user, password)


@pytest.mark.parametrize("sign", "/?#")
def test_a_password_whose_end_is_unclear_is_refused_and_not_shown(sign):
    with pytest.raises(UserError, match="password") as caught:
        make_config(TrainConfig, {"tracking_uri": f"http://alice:sw{sign}0rdfish@host"})
    assert "alice" not in str(caught.value) and "0rdfish" not in str(caught.value)


def test_a_password_with_both_an_at_and_a_slash_is_refused_and_not_shown():
    with pytest.raises(UserError, match="password") as caught:
        taken("http://alice:p@ss/sw0rdfish@host")
    assert SECRET not in str(caught.value)


def test_a_long_error_keeps_its_last_words(monkeypatch):
    monkeypatch.setenv(PASSWORD, SECRET)
    said = in_a_line(OSError(f"asked\nfor {SECRET} " + "again and again " * 30 + "Connection refused"))
    assert said.startswith("asked for *** again") and said.endswith("Connection refused") and len(said) < 170


@pytest.mark.parametrize(
    "address",
    [
        "https://host/?access_token=sw0rdfish",
        "https://host/?pass=sw0rdfish",
        "https://host/#key=sw0rdfish",
        "mssql://db/?odbc_connect=PWD%3Dx",
    ],
)
def test_a_secret_parameter_that_nobody_takes_out_is_refused_and_not_shown(address):
    with pytest.raises(UserError, match="secret among its parameters") as caught:
        taken(address)
    assert SECRET not in str(caught.value) and TOKEN in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        f"https://alice:{SECRET}@host/x",
        f"https://alice:sw/{SECRET}@host/x",
        f"https://host/x?X-Amz-Signature={SECRET}&b=1",
        f"https://host/x?AWSAccessKeyId={SECRET}",
        f"https://host/x;token={SECRET}",
        f"https://host/x?key={SECRET},https://host/y?jwt={SECRET}",
    ],
)
def test_addresses_are_shown_without_secrets(address):
    assert SECRET not in hidden(address) and "host/x" in hidden(address) and hidden("a@b?key=c") == "a@b?key=c"


def test_a_database_is_asked_with_them_and_a_server_is_not_named_with_them():
    clean = taken("postgresql://alice:p%40ss@db/x")
    assert given_back(clean) == "postgresql://alice:p%40ss@db/x"
    assert given_back("http://host") == "http://host" and given_back("sqlite:///x.db") == "sqlite:///x.db"
    assert given_back("mysql://bob:own@db/x") == "mysql://bob:own@db/x"


def test_no_record_of_settings_has_them():
    given = f"http://alice:{SECRET}@host:5000"
    signed = f"https://bob:{SECRET}@files/x.jsonl?X-Amz-Signature={SECRET}&part=1"
    config = make_config(TrainConfig, {"tracking_uri": given, "train_data": signed})
    shown = [to_yaml(config), repr(public(config)), yaml.safe_dump(changed(config))]
    shown += without_secrets(["train.py", "--tracking_uri", given, f"--train_data={signed}"], config)
    assert not any(SECRET in text for text in shown)
    assert public(config)["tracking_uri"] == "http://host:5000"
    assert public(config)["train_data"] == "https://***@files/x.jsonl?X-Amz-Signature=***&part=1"
    assert config.train_data == signed, "the run itself needs it"


@pytest.mark.parametrize("text", ["a://b/c@d", "user@host", "x@main", "https://host/a?tokens_per_row", "no address"])
def test_what_is_no_secret_stays(text):
    assert hidden(text) == text


def test_other_settings_are_told_as_they_are():
    config = make_config(ScoreConfig, {"pairs": "a.jsonl", "num_mc_samples": 3})
    assert public(config)["pairs"] == "a.jsonl" and changed(config) == {"pairs": "a.jsonl", "num_mc_samples": 3}


@pytest.mark.parametrize(
    ("given", "environment", "found"),
    [
        (None, f"http://alice:{SECRET}@host", "http://host"),
        ("http://other", "http://host", "http://other"),
        ("none", "http://host", None),
    ],
)
def test_the_environment_names_the_store_where_no_flag_does(tmp_path, monkeypatch, given, environment, found):
    monkeypatch.setenv(STORE, environment)
    assert tracking_uri(given, tmp_path / "run") == found


def test_a_wrong_store_of_the_environment_is_named_as_such(tmp_path, monkeypatch):
    monkeypatch.setenv(STORE, f"ftp://alice:{SECRET}@host")
    with pytest.raises(UserError, match=rf"^{STORE} ftp://host is no MLflow store") as caught:
        tracking_uri(None, tmp_path / "run")
    assert SECRET not in str(caught.value)


@pytest.fixture
def server():
    """Asks everybody for a password; ``seen`` are the Authorization headers."""
    seen: list[str] = []

    class Asking(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers.get("Authorization", ""))
            said = seen[-1].encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_POST = do_GET

        def log_message(self, *words):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Asking) as listening:
        Thread(target=listening.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{listening.server_port}", seen
        listening.shutdown()


def test_a_later_shipper_has_them_from_the_environment_or_says_what_is_missing(tmp_path, server, monkeypatch):
    address, seen = server
    uri = taken(f"http://alice:{SECRET}@{address}")
    tracking = Tracking(tmp_path, Journal(tmp_path))
    tracking.start_mlflow(Shipped(uri, "experiment", "run"))
    assert not tracking.close("FINISHED", timeout=20, curves=False)  # of a busy machine; the answer ends it
    expected = "Basic " + base64.b64encode(f"alice:{SECRET}".encode()).decode()
    assert expected in seen
    assert not any(SECRET in path.read_text() for path in tmp_path.iterdir() if path.is_file())
    with pytest.raises(TrainingError) as caught:
        ship_later(tmp_path)
    assert SECRET not in str(caught.value) and USER not in str(caught.value), "they are there"
    monkeypatch.delenv(USER)
    monkeypatch.delenv(PASSWORD)
    with pytest.raises(TrainingError, match=f"{USER} and {PASSWORD}") as caught:
        ship_later(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_token_is_not_told_either(monkeypatch):
    monkeypatch.setenv(TOKEN, SECRET)
    assert untold(f"Bearer {SECRET} is not valid") == "Bearer *** is not valid"
