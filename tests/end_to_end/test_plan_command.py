"""`launch/plan.py`: what it prints, and one line with exit code 2 for every mistake."""

import json

import pytest

from tests.support.paths import ROOT

MODEL = "diffdpo/pretrained/arithmetic"


def test_a_plan_and_its_json(command, python, tmp_path):
    out = tmp_path / "plan.json"
    flags = ["--model_name_or_path", MODEL, "--ds_config", "ds_configs/4080_offload.json", "--max_length", "128"]
    flags += ["--max_prompt_length", "64", "--gpu", "RTX 4080", "--host_memory", "64GiB", "--save_json", str(out)]
    done = command([python, "launch/plan.py", *flags])
    assert done.returncode == 0, done.stderr
    assert "RTX 4080: needs" in done.stdout and "fits" in done.stdout and "H200" in done.stdout
    plan = json.loads(out.read_text())
    assert plan["fits"] and plan["advice"] is None
    at_worst = [
        p for p in plan["parts"] if p["place"] == "device" and plan["needed"]["device"]["moment"] in p["moments"]
    ]
    assert plan["needed"]["device"]["bytes"] == sum(part["bytes"] for part in at_worst)


def test_advice_is_a_setting_that_fits(tmp_path, monkeypatch, capsys):
    from launch.plan import main

    monkeypatch.chdir(ROOT)
    out = tmp_path / "plan.json"
    flags = ["--model_name_or_path", f"{MODEL}/config.json", "--gpu_memory", "1.4GiB", "--num_mc_samples", "64"]
    main([*flags, "--segmentation", "none", "--save_json", str(out)])
    printed = capsys.readouterr().out
    assert "DOES NOT FIT" in printed and "it fits with: --" in printed
    advice = json.loads(out.read_text())["advice"]
    assert advice["needed"]["device"] <= 1.4 * 2**30 and "segmentation" in advice["flags"]


def test_max_memory_is_planned_and_left_out_by_the_advice(monkeypatch, capsys):
    from launch.plan import main

    monkeypatch.chdir(ROOT)
    main(["--model_name_or_path", MODEL, "--gpu", "RTX 4080", "--max_memory", "0.9"])
    assert "max_memory 64 rows a segment, 8 x 1 pairs a step" in capsys.readouterr().out
    main(["--model_name_or_path", MODEL, "--gpu_memory", "1.5GiB", "--max_memory", "0.9", "--num_mc_samples", "16"])
    printed = capsys.readouterr().out
    assert "max_memory " in printed and ("DOES NOT FIT" not in printed or "it fits with: --max_memory 0" in printed)


def test_a_gpu_of_any_given_numbers(tmp_path, monkeypatch, capsys):
    """Its rates make its time, and stand among the assumptions."""
    from launch.plan import main

    monkeypatch.chdir(ROOT)
    seconds = []
    for flops in ("200T", "20T"):
        out = tmp_path / "plan.json"
        flags = ["--gpu_flops", flops, "--gpu_flops_fp32", flops, "--gpu_bandwidth", "900G", "--gpu_link", "16G"]
        main(["--model_name_or_path", MODEL, "--gpu_memory", "20GiB", *flags, "--save_json", str(out)])
        assert f"rates as given: {flops[:-1]}.0 TFLOP/s in 16 bits" in capsys.readouterr().out
        plan = json.loads(out.read_text())
        seconds += [time["policy"] for name, time in plan["time"].items() if "as given" in name]
    assert seconds[1] > 1.1 * seconds[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model_name_or_path", "nowhere/config.json"], "no such file"),
        (["--model_name_or_path", "tests"], "has no config.json"),
        (["--model_name_or_path", MODEL, "--gpu", "RTX 9999"], "RTX 9999"),
        (["--model_name_or_path", MODEL, "--gpu_memory", "sixteen"], "--gpu_memory"),
        (["--model_name_or_path", MODEL, "--host_memory", "64"], "--host_memory"),
        (["--model_name_or_path", MODEL, "--ds_config", "nowhere.json"], "nowhere.json"),
        (["--model_name_or_path", MODEL, "--gpu_memory", "0GiB"], "is nothing"),
        (["--model_name_or_path", MODEL, "--gpu_memory", "-5GiB"], "--gpu_memory '-5GiB' is no size"),
        (["--model_name_or_path", MODEL, "--gpu", "H100", "--gpu_flops", "-.5T"], "--gpu_flops '-.5T' is no rate"),
        (["--model_name_or_path", MODEL, "--gpu", "H100", "--gpu_bandwidth", "fast"], "--gpu_bandwidth"),
        (["--model_name_or_path", MODEL, "--max_memory", "0.9"], "give --gpu or --gpu_memory"),
        (["--model_name_or_path", MODEL, "--gpu_link", "32G"], "give --gpu_memory or --gpu"),
        (["--model_name_or_path", MODEL, "--save_json", "tests"], "is a folder"),
        (["--model_name_or_path", MODEL, "--num_gpus", "0"], "--num_gpus"),
        (["--model_name_or_path", MODEL, "--no_such_flag", "1"], "no_such_flag"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(flags, said, monkeypatch, capsys):
    import data_pipeline.cli
    from data_pipeline.errors import DataError
    from diffdpo.errors import UserError
    from launch.plan import main

    monkeypatch.chdir(ROOT)
    try:
        code = data_pipeline.cli.exit_code(main, flags, (UserError, DataError))
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err.strip()
    assert code == 2 and said in err and "\n" not in err
