"""Benchmarks keep what they have measured, wherever they are run from and whenever they end."""

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from benchmarks import ablations, choice_accuracy, on_policy, process_memory, segment_memory, throughput
from tests.second_device import AWAY, second_device  # before the first backward, which counts the devices
from tests.support.paths import ROOT


def test_segment_memory_keeps_every_point(tmp_path, monkeypatch):
    """Broken off at the third: two are on disk."""
    peaks = iter([1.0, 2.0])

    def measure(point):
        if (peak := next(peaks, None)) is None:
            raise KeyboardInterrupt
        return {"peak_mib": peak, "seconds": 0.1}

    monkeypatch.setattr(segment_memory, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["segment_memory.py", "--output", str(tmp_path / "memory")])
    with pytest.raises(KeyboardInterrupt):
        segment_memory.main()
    assert [point["peak_mib"] for point in json.loads((tmp_path / "memory.json").read_text())["points"]] == [1.0, 2.0]
    assert "| all | plain | 1.0 | 2.0 |" in (tmp_path / "memory.md").read_text()
    assert segment_memory.OUTPUT == ROOT / "docs/benchmarks/segment_memory"


def test_throughput_names_the_commands_that_made_its_table():
    args = Namespace(numbers="4", repeats=1, warm_up=0)
    record = {"way": "plain", "n": 4, "strategy": "one graph", "seconds": 1.0, "pairs_per_second": 1.0}
    records = [record | {"shape": shape, "utilisation": 0.5} for shape in ("tiny", "medium")]
    records[0]["command"] = throughput.command_of("tiny", args)
    text = throughput.table(records, "a machine")
    assert "`python benchmarks/throughput.py --shapes tiny --numbers 4 --repeats 1 --warm_up 0 --keep`" in text
    assert (
        "commands that were not recorded (medium (n = 4))" in text and "`python benchmarks/throughput.py`" not in text
    )


def test_process_memory_tells_growth_by_allocator_and_why_a_run_failed(tmp_path, monkeypatch):
    points = [("glibc", 64, 1150), ("glibc", 2, 1000), ("jemalloc", 2, 700), ("jemalloc", 64, 707)]
    points = [{"allocator": name, "n": n, "mb": mb, "cpu_seconds": 1.5} for name, n, mb in points]
    text = process_memory.table(points, "a machine")
    assert "--numbers 2,64`" in text and "| glibc | 1,000 (1.5) | 1,150 (1.5) | +15.0% |" in text
    assert "| jemalloc | 700 (1.5) | 707 (1.5) | +1.0% |" in text
    process_memory.write_inputs(tmp_path)
    monkeypatch.setattr(process_memory, "FLAGS", [*process_memory.FLAGS, "--no_such_flag"])
    with pytest.raises(SystemExit, match="no_such_flag"):
        process_memory.measure(tmp_path, 2, {})


def test_ablations_go_on_where_they_were_killed(tmp_path, monkeypatch):
    """A run is replaced by its result; broken off at the third cell, the first two are not run again."""
    ran = []

    def run(command, **_):
        flags = dict(zip(command[4::2], command[5::2], strict=True))
        if len(ran) == 2:
            ran.append("killed")
            raise KeyboardInterrupt
        ran.append(flags["--beta"])
        folder = Path(flags["--output_dir"])
        folder.mkdir(parents=True)
        held_out = {"exact_match": {"after": {"mean": 0.25 + 0.1 * int(flags["--seed"])}}}
        summary = {"held_out": held_out, "pairs_per_second": 2.0, "peak_memory_gib": 1.0}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "metrics.jsonl").write_text(json.dumps({"rewards/margins": 0.5}) + "\n")
        return Namespace(returncode=0)

    monkeypatch.setattr(ablations.subprocess, "run", run)
    monkeypatch.setattr(
        sys, "argv", ["ablations.py", "--full", "--only", "beta", "--seeds", "2", "--out", str(tmp_path)]
    )
    with pytest.raises(KeyboardInterrupt):
        ablations.main()
    ablations.main()
    assert ran == ["0.02", "0.1", "killed", "0.5", "2.0", "0.02", "0.1", "0.5", "2.0"]
    assert "| 0.02 | 200 | 2 | 30.0% ± 5.0% | - | - | 2.0 | 1.00 |" in (tmp_path / "ablations.md").read_text()
    assert (tmp_path / "beta.png").exists() and not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--problems", "12"], "cell beta 0.1 was run with other settings (num_eval_problems); give another folder"),
        (["--steps", "0"], "--steps is 0; it must be 1 or more"),
        (["--only", "gamma"], "gamma"),
    ],
)
def test_ablations_do_not_mix_what_was_run_otherwise(flags, said, tmp_path, monkeypatch, capsys):
    cell = next(cell for cell in ablations.cells() if cell.name == "0.1")
    kept = {"question": "beta", "name": "0.1", "seed": 0, "steps": 40, "flags": ablations.flags_of(cell, 0, 40, 200)}
    ablations.keep(tmp_path / "cells" / "x.json", kept)
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--quick", "--out", str(tmp_path), *flags])
    with pytest.raises(SystemExit, match="2"):
        ablations.main()
    assert said in capsys.readouterr().err


def test_a_failed_cell_is_an_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations.subprocess, "run", lambda command, **_: Namespace(returncode=1))
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--quick", "--only", "weights", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2 cells failed and are left out: weights all, seed 0; weights LoRA"):
        ablations.main()


def test_rounds_are_set_beside_one_offline_run(tmp_path):
    for seed in (0, 1):
        shares = {"start": (0.1, -0.2, 0), "round 1": (0.3 + 0.2 * seed, 0.1, 10 + seed)}
        rows = {
            name: {"exact_match": e, "from_short": -a, "from_offline": a, "updates": u}
            for name, (e, a, u) in shares.items()
        }
        (tmp_path / f"judged-{seed}.json").write_text(json.dumps(rows))
    lines = on_policy.table(tmp_path).splitlines()
    assert "| start | 0 | 10.0%, 10.0% | 10.0% ± 0.0% | 20.0% ± 0.0% | -20.0% ± 0.0% |" in lines
    assert "| round 1 | 10-11 | 30.0%, 50.0% | 40.0% ± 10.0% | -10.0% ± 0.0% | 10.0% ± 0.0% |" in lines


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    """The driver with parts that take no time, and what was run."""
    from benchmarks import gpu_evidence

    run = []

    def found(part, args, left):
        run.append(part.name)
        return {"state": "failed" if part.name == "head" else "done", "seconds": 0, "told": "a\nlast line"}

    monkeypatch.setattr(gpu_evidence, "run_part", found)
    return gpu_evidence, tmp_path / "gpu.json", run


def test_gpu_evidence_leaves_out_what_the_minutes_do_not_suffice_for(evidence):
    driver, file, run = evidence
    assert driver.main(["--minutes", "0.5", "--json", str(file), "--device", "cpu"]) == 1, "head has failed"
    parts = json.loads(file.read_text())["parts"]
    assert list(parts) == [part.name for part in driver.PARTS]
    left_out = {name for name, part in parts.items() if part["state"] == "left out"}
    assert left_out == {part.name for part in driver.PARTS if part.seconds > 27} and left_out.isdisjoint(run)
    assert all("it needs" in parts[name]["left_out"] for name in left_out)


def test_gpu_evidence_does_what_is_asked(evidence, capsys, monkeypatch):
    driver, file, run = evidence
    assert driver.main(["--json", str(file), "--device", "cpu", "--parts", "machine,attention"]) == 0
    assert run == ["machine", "attention"]
    monkeypatch.setattr(driver, "finds_gpu", lambda: False)
    for words, said in (
        (["--json", str(file), "--parts", "everything"], "everything"),
        (["--json", str(file)], "--device cpu --tiny"),
        (["--json", str(file), "--device", "cpu", "--minutes", "-1"], "above 0"),
    ):
        with pytest.raises(SystemExit):
            driver.main(words)
        assert said in capsys.readouterr().err


def test_gpu_evidence_tries_where_it_will_write_before_a_part_has_run(evidence, capsys, monkeypatch):
    driver, file, run = evidence
    places = [("/nowhere/found.json", "no folder /nowhere"), ("/dev/null", "a device"), (file.parent, "a folder")]
    if sys.platform == "linux":
        places.append(("/proc/found.json", "cannot be written"))
    for place, said in places:
        with pytest.raises(SystemExit) as ended:
            driver.main(["--json", str(place), "--device", "cpu"])
        told = capsys.readouterr()
        assert ended.value.code == 2 and said in told.err and "Traceback" not in told.err
    full_disk(monkeypatch)
    with pytest.raises(SystemExit):
        driver.main(["--json", str(file), "--device", "cpu"])
    assert "No space left on device" in capsys.readouterr().err
    assert run == [] and not list(file.parent.iterdir())


def full_disk(monkeypatch, after=0):
    """No room for what is written beside a file, after so many writes."""
    real, writes = Path.write_bytes, iter(range(after))

    def write(path, *args, **kwargs):
        if path.name.endswith(".partial") and next(writes, None) is None:
            real(path, b"half")
            raise OSError(28, "No space left on device")
        data = args[0] if isinstance(args[0], bytes) else args[0].encode()
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    monkeypatch.setattr(Path, "write_text", write)


def test_what_gpu_evidence_measured_is_printed_where_the_disk_gets_full(evidence, capsys, monkeypatch):
    """Room for the trial and for the first part; a later one finds none, and neither does the end."""
    driver, file, run = evidence
    full_disk(monkeypatch, after=2)
    assert driver.main(["--json", str(file), "--device", "cpu", "--parts", "machine,attention,self_test"]) == 2
    told = capsys.readouterr()
    assert run == ["machine", "self_test", "attention"], "a GPU's minutes go on"
    assert list(json.loads(file.read_text())["parts"]) == ["machine"]
    assert list(json.loads(told.out.splitlines()[-1])["parts"]) == run
    assert told.err.count("\n") == 1 and "No space left" in told.err
    assert list(file.parent.iterdir()) == [file], "what was half written is taken away"


def test_a_failed_part_s_line_is_its_exception(evidence, monkeypatch, capsys):
    """Whatever a library says after it."""
    from benchmarks import gpu_evidence, gpu_parts
    from benchmarks.gpu_setting import Setting

    def fails(setting):
        raise ValueError("the shapes differ\nmore of it")

    monkeypatch.setitem(gpu_parts.PARTS, "head", fails)
    found = gpu_parts.found_by("head", Setting("cpu", True))
    judged = gpu_evidence.judged(1, json.dumps(found), "Failed to load gemm_4bit; pip install kernels", late=False)
    assert judged["state"] == "failed" and gpu_evidence.in_words(judged) == "ValueError: the shapes differ"
    assert "Traceback" in capsys.readouterr().err
    killed = gpu_evidence.judged(-7, "", "a line of a library", late=False)
    assert killed["state"] == "failed" and "Bus error" in gpu_evidence.in_words(killed)


@pytest.mark.slow
def test_parts_are_left_out_or_do_without_packages_that_cannot_be_imported(tmp_path, monkeypatch):
    from benchmarks import gpu_evidence

    for package in ("bitsandbytes", "deepspeed"):
        (tmp_path / "shadow" / package).mkdir(parents=True)
        (tmp_path / "shadow" / package / "__init__.py").write_text("raise ImportError('of another CUDA')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "shadow"))
    flags = ["--json", str(tmp_path / "cpu.json"), "--device", "cpu", "--tiny", "--minutes", "8"]
    assert gpu_evidence.main([*flags, "--parts", "machine,qlora,throughput,full3b"]) == 0
    parts = json.loads((tmp_path / "cpu.json").read_text())["parts"]
    said = {
        package: f"{package} cannot be imported: ImportError: of another CUDA"
        for package in ("bitsandbytes", "deepspeed")
    }
    assert parts["machine"]["state"] == "done" and set(said.values()) <= set(parts["machine"]["summary"])
    assert parts["throughput"]["state"] == "done"
    for part, package in (("qlora", "bitsandbytes"), ("full3b", "deepspeed")):
        assert parts[part]["state"] == "left out" and parts[part]["left_out"] == said[package]


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_of_gpu_evidence_outlives_it(sent, tmp_path):
    """One part is finished and the next is at work, in a process of its own."""
    (tmp_path / "part.py").write_text(
        "import sys, time\n"
        "if 'machine' in sys.argv: print('{}'); sys.exit()\n"
        "open('begun', 'w').close(); time.sleep(60)\n"
    )
    flags = ["--device", "cpu", "--json", "cpu.json", "--parts", "machine,self_test"]
    # tests under nohup, or behind an &, have signals ignored, which gpu_evidence leaves so
    script = (
        "import signal, sys; [signal.signal(one, signal.SIG_DFL) for one in (signal.SIGHUP, signal.SIGINT)]; "
        f"from benchmarks import gpu_evidence as it; it.__file__ = 'part.py'; sys.exit(it.main({flags}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    children: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        children = psutil.Process(driver.pid).children()
        assert len(children) == 1
        driver.send_signal(sent)
        _, told = driver.communicate(timeout=30)
        gone, alive = psutil.wait_procs(children, timeout=10)
        assert gone and not alive
        assert list(json.loads((tmp_path / "cpu.json").read_text())["parts"]) == ["machine"]
        if sent != signal.SIGKILL:
            assert driver.returncode == 128 + sent and told == f"ended by {sent.name}\n"
            assert {path.name for path in tmp_path.iterdir()} == {"part.py", "begun", "cpu.json"}
    finally:
        for process in (driver, *children):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def test_a_part_that_hangs_or_breaks_is_a_line(tmp_path, monkeypatch):
    from benchmarks import gpu_evidence

    monkeypatch.setattr(gpu_evidence, "__file__", str(tmp_path / "part.py"))
    args, part = Namespace(device="cpu", tiny=True, json=tmp_path / "cpu.json"), gpu_evidence.Part("x", "", 0, 60)
    (tmp_path / "part.py").write_text("print('CUDA error'); raise SystemExit(3)")
    assert gpu_evidence.run_part(part, args, 30)["state"] == "failed"
    (tmp_path / "part.py").write_text("import time; print('begun', flush=True); time.sleep(60)")
    cut = gpu_evidence.run_part(part, args, 1.5)
    assert cut["state"] == "cut short" and cut["seconds"] < 10


LONGER = ("self_test", "qlora", "throughput", "attention", "full3b")


@pytest.mark.parametrize("part", ["machine", "head", *(pytest.param(one, marks=pytest.mark.slow) for one in LONGER)])
def test_a_part_works_on_a_cpu(part, tmp_path):
    from benchmarks import gpu_evidence

    flags = ["--minutes", "5", "--json", str(tmp_path / "cpu.json"), "--device", "cpu", "--tiny", "--parts", part]
    assert gpu_evidence.main(flags) == 0
    found = json.loads((tmp_path / "cpu.json").read_text())["parts"][part]
    assert found["state"] == "done" and found["summary"]


@pytest.mark.parametrize("part", ["head", "attention", pytest.param("throughput", marks=pytest.mark.slow)])
def test_a_part_goes_a_gpu_s_ways(part, monkeypatch):
    from benchmarks import gpu_parts
    from benchmarks.gpu_setting import Setting

    monkeypatch.setattr(Setting, "device", AWAY)
    with second_device() as kind:
        found = gpu_parts.PARTS[part](Setting("cuda", True))
        assert kind.synchronized and all(way["seconds"] and way["peak_bytes"] for way in found["ways"].values())


def test_real_questions_have_four_choices_and_the_right_one_anywhere(tmp_path):
    pairs = [
        {"prompt": f"q{n}", "chosen": f"right {n}", "rejected": f"wrong {n} {m}"} for n in range(6) for m in range(4)
    ]
    pairs += [{"prompt": "few", "chosen": "right", "rejected": f"wrong {m % 2}"} for m in range(4)]
    answers = [{"question": f"q{n}", "answer": f"{'long ' * n}{n}"} for n in range(8)]
    for name, rows, count in (("pairs", pairs, 6), ("answers", answers, 8)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = list(choice_accuracy.real_questions(file))
        assert [question for question, _, _ in found] == [f"q{n}" for n in range(count)]
        assert [right for _, _, right in found] == [n % 4 for n in range(count)]
        for number, (_, choices, right) in enumerate(found):
            assert len(set(choices)) == 4
            assert choices[right] == (f"right {number}" if name == "pairs" else answers[number]["answer"])


def test_what_a_gradient_costs_by_hand(monkeypatch):
    """Four pairs with gradients at right angles, two of them told apart for good and known to be by every guess."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("gradient_error")

    def drawn(rows, gradients=True):
        ratio_P2N = np.zeros((4, 2, rows))
        ratio_P2N[2:, 0] = 200.0 / rows  # h = 200 β = 20
        gradient_P2K = np.stack([3 * np.eye(4), np.zeros((4, 4))], 1) if gradients else np.zeros((4, 2, 0))
        return benchmark.Drawn(ratio_P2N, gradient_P2K, np.full((4, 2), 8))

    of_all = {"balanced 4": drawn(4), "balanced 2": drawn(2), "few 1": drawn(1, False), "few 2": drawn(2, False)}
    found = benchmark.schemes(benchmark.Loss(beta=0.1, sft=0.0), of_all)
    assert found["balanced 4, flat"]["error"] == pytest.approx(2 * (0.05 * 3) ** 2 / 4)
    assert found["balanced 4, flat"]["times"] == 1 and found["balanced 4, one graph"]["times"] == pytest.approx(1.25)
    assert found["balanced 2, flat"]["times"] == pytest.approx(2), "as good, from half the rows"
    assert found["coefficient from 1, flat"]["times"] == pytest.approx(5 / 3.5)
    assert found["selective, flat, best τ"]["times"] == pytest.approx(5 / 3.5, rel=1e-2), "half of the backwards"
    assert found["screen by 1 own, one graph, best τ"]["times"] == pytest.approx(5 / 2.5, rel=1e-2)
    assert found["screen by 1 own, one graph, fixed"]["kept"] == pytest.approx((2 + 2 * 0.05) / 4)


def test_a_screened_step_is_of_the_same_rows(monkeypatch):
    """Where nothing is learned every pair goes on; a pair's loss is the same whoever else has been left out."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    screening = importlib.import_module("screening")
    models = screening.load_models(None, None, dpo_steps=0, device="cpu", seed=0)
    models.policy.model.load_state_dict(models.reference.model.state_dict())
    pairs = list(islice(screening.pairs_of(models, screening.generate_pairs(8, seed=0)), 4))
    assert screening.probabilities(models, pairs, 0, 3).tolist() == [1.0] * 4
    models.policy.model.head.weight.data *= 0  # every token costs the same: the shorter answer is preferred
    p_P = screening.probabilities(models, pairs, 0, 3)
    assert ((p_P >= 0.05) & (p_P <= 1)).all() and len(set(p_P)) > 1
    whole, some = (screening.losses(models, each, 0, 3) for each in (pairs, pairs[1::2]))
    torch.testing.assert_close(whole[1::2], some)
