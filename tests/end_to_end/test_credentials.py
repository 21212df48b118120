"""A run whose tracking address has a password: no file and no line of the run has it."""

import os
import sys

from diffdpo.settings.credentials import PASSWORD, TOKEN

SECRETS = ("sw0rdfish", "t0ken-of-alice")


def test_no_file_and_no_line_of_a_run_has_the_password(command, tiny_model, pairs_file, tmp_path):
    out = tmp_path / "run"
    flags = ["--tracking_uri", f"http://alice:{SECRETS[0]}@127.0.0.1:9", "--tracking_timeout", "0.1"]
    flags += ["--model_name_or_path", str(tiny_model), "--train_data", str(pairs_file), "--output_dir", str(out)]
    flags += ["--max_steps", "1", "--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "8"]
    flags += ["--num_eval_problems", "0", "--eval_fraction", "0.1", "--num_mc_samples", "1", "--save_steps", "1"]
    done = command([sys.executable, "launch/train.py", *flags], timeout=580, **{TOKEN: SECRETS[1], PASSWORD: ""})
    assert done.returncode == 0, done.stderr
    files = [path for path in out.rglob("*") if path.is_file()]
    names = {os.path.relpath(path, out) for path in files}
    assert {"config.yaml", "asked.yaml", "environment.json", "mlflow.json", "final/README.md"} <= names
    for secret in SECRETS:
        assert secret not in done.stdout + done.stderr
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
    assert "http://127.0.0.1:9" in done.stdout, "where the run is to be seen"
