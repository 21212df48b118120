"""A short run whose final model goes to a stand-in for the hub, told in TRL's words."""

import huggingface_hub.constants as hub

from diffdpo.cli.flags import parse_config
from diffdpo.config import TrainConfig
from diffdpo.models.load import load_model
from diffdpo.tracking.journal import read_journal
from diffdpo.training.preference import train
from tests.support.hub import hub_to_write

TOKEN = "hf_a_secret_that_nobody_may_read"


def test_a_run_pushes_its_model_and_writes_its_token_nowhere(tmp_path, pairs_file, monkeypatch, capsys):
    flags = ["--dataset_name", str(pairs_file), "--report_to", "none", "--warmup_ratio", "0.5", "--eval_strategy", "no"]
    flags += ["--max-steps", "4", "--per_device_train_batch_size", "2", "--num_mc_samples", "1", "--save_strategy=no"]
    flags += ["--max_eval_pairs", "2", "--num_eval_problems", "0", "--max_length", "128", "--max_prompt_length", "64"]
    flags += ["--learning_rate", "1e-3", "--push_to_hub", "--hub_model_id", "alice/aligned", "--hub_token", TOKEN]
    flags += ["--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["train.py", *flags])
    with hub_to_write(tmp_path / "repository", user="alice", token=TOKEN) as server:
        monkeypatch.setattr(hub, "ENDPOINT", server.address)
        result = train(parse_config(TrainConfig, flags, ""))
    assert result.complete and server.name == "alice/aligned"
    final = tmp_path / "run" / "final"
    pushed = {path.name: path.read_bytes() for path in (tmp_path / "repository").iterdir()}
    assert pushed == {path.name: path.read_bytes() for path in final.iterdir()} and "README.md" in pushed
    load_model(str(tmp_path / "repository"))
    lines = read_journal(tmp_path / "run" / "metrics.jsonl")
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates[:2] == [5e-4, 1e-3], "half of the four steps are warm-up"
    out, err = capsys.readouterr()
    assert "hub     " in out and TOKEN not in out + err
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
