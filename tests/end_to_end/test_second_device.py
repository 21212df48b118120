"""Whole commands on a device that is not the host's: as on a GPU, a forgotten `.to(device)` ends them, or a constant
that stayed on the host. The numbers are those of a run on the host."""

import dataclasses
import json
from itertools import pairwise, permutations
from pathlib import Path

import pytest
import torch
import yaml

from diffdpo.engine.world import World
from diffdpo.errors import TrainingError
from diffdpo.losses.preference import LOSSES
from diffdpo.reference.refresh import mix_in
from diffdpo.settings.noise import ESTIMATORS
from diffdpo.settings.reference import ReferenceSettings
from diffdpo.settings.segments import SegmentSettings
from tests.second_device import AWAY, second_device

SHORT = (
    *("--max_steps", "2", "--num_generated_pairs", "12", "--per_device_train_batch_size", "2", "--save_steps", "1"),
    *("--max_eval_pairs", "2", "--num_eval_problems", "0", "--num_mc_samples", "2", "--tracking_uri", "none"),
    *("--max_length", "96", "--max_prompt_length", "48", "--segment_rows", "3", "--per_device_eval_batch_size", "2"),
)
FLAGS = {"adapter_off": ("--use_peft", "--lora_r", "2"), "adapter_start": ("--adapter_name_or_path", "adapter")}
FLAGS |= {"ipo,sft": ("--loss_weights", "1,1"), "trajectory": ("--num_diffusion_steps", "4")}
COLUMNS = ("segmentation", "reference", "loss_type", "score_estimator")
QUICK = (  # every value of each column
    ("none", "copy", "sigmoid", "trajectory"),
    ("checkpoint", "precomputed", "ipo,sft", "uniform_t"),
    ("two_pass", "adapter_off", "aot", "stratified_t"),
    ("deferred", "none", "sigmoid", "mask_count"),
    ("two_pass", "adapter_start", "kto", "mask_count_mirror"),
    ("checkpoint", "none", "simpo", "balanced"),
    ("deferred", "copy", "apo_zero_unpaired", "paired"),
    ("none", "adapter_start", "ipo,sft", "quadrature"),
)
ROWS = (  # and each with several of every other column
    *QUICK,
    ("two_pass", "adapter_off", "kto", "paired"),
    ("two_pass", "copy", "aot", "uniform_t"),
    ("deferred", "precomputed", "sigmoid", "stratified_t"),
    ("deferred", "adapter_off", "ipo,sft", "trajectory"),
    ("none", "adapter_off", "simpo", "mask_count"),
    ("checkpoint", "adapter_off", "sigmoid", "mask_count_mirror"),
    ("none", "precomputed", "sigmoid", "balanced"),
    ("two_pass", "none", "aot", "quadrature"),
    ("none", "adapter_off", "apo_zero_unpaired", "quadrature"),
)


@pytest.fixture(autouse=True)
def here(tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_model)


@pytest.fixture
def away(monkeypatch):
    world = World(rank=0, local_rank=0, size=1, device=AWAY)
    monkeypatch.setattr("diffdpo.setup.context.init_distributed", lambda **_: world)
    with second_device() as kind:
        yield kind


@pytest.fixture(scope="session")
def adapter(tiny_model, tmp_path_factory):
    """An adapter that is not nothing, on the tiny model."""
    from diffdpo.models.load import load_model, save_model
    from diffdpo.models.lora.adapters import add_lora

    loaded, folder = load_model(str(tiny_model)), tmp_path_factory.mktemp("adapter")
    model = add_lora(loaded.model, loaded.spec, r=2)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data.normal_(std=0.1)
    save_model(model, loaded.tokenizer, folder)
    return folder


def train(out: str, *flags: str, named: bool = True) -> dict[int, dict]:
    """The lines of its steps. ``named``: the tiny model is."""
    from diffdpo.cli.train import main

    model = ["--model_name_or_path", "tiny"] if named else []
    assert main([*SHORT, *model, "--output_dir", out, *flags]) == 0
    return journal(Path(out))


def journal(folder: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


def means_of(report: dict) -> dict[str, float]:
    """The figures of an evaluation's first result."""
    figures = report["results"][0]["figures"]
    return {name: figure["mean"] for name, figure in figures.items() if "mean" in figure}


def generate(folder: str) -> list[dict]:
    """Answers sampled on a device that is named to the command as a GPU would be."""
    from diffdpo.cli.generate import main

    asked = ["--prompt", "1 + 2 =", "--gen_length", "8", "--block_length", "4", "--output", "answers.jsonl"]
    main([*asked, "--model_name_or_path", folder, "--device", str(AWAY), "--temperature", "0.5"])
    return [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]


class Counted:
    """``calls`` of a function."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=[] if row in QUICK else pytest.mark.slow) for row in ROWS],
    ids="-".join,
)
def test_training_there(away, row, adapter):
    flags = [flag for column, value in zip(COLUMNS, row, strict=True) for flag in (f"--{column}", value)]
    starts = row[1] == "adapter_start"
    if starts:
        Path("adapter").symlink_to(adapter)
    steps = train("out", *flags, *(flag for value in row for flag in FLAGS.get(value, ())), named=not starts)
    assert sorted(steps) == [1, 2]
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in steps.values())
    taken = yaml.safe_load(Path("out/config.yaml").read_text())
    assert tuple(taken[column] for column in COLUMNS) == row


def is_tied(loss: str) -> bool:
    """Whether one strategy alone serves it."""
    return any(LOSSES[name].scope == "batch" or LOSSES[name].needs_reference_point for name in loss.split(","))


def choices_of(settings: type, name: str) -> set[str]:
    (field,) = (each for each in dataclasses.fields(settings) if each.name == name)
    return set(field.metadata["choices"]) - {"auto"}


def test_the_rows_reach_everything():
    strategies, references, losses, estimators = (set(column) for column in zip(*QUICK, strict=True))
    assert strategies == choices_of(SegmentSettings, "segmentation")
    assert references == choices_of(ReferenceSettings, "reference")
    assert estimators == {*ESTIMATORS} - {"exact"}  # of short answers: blocks take it
    taken = [LOSSES[name] for loss in losses for name in loss.split(",")]
    for ask in (lambda it: it.scope, lambda it: it.reference_free, lambda it: it.needs_reference_point):
        assert {ask(loss) for loss in taken} == {ask(loss) for loss in LOSSES.values()}
    for i, j in permutations(range(len(COLUMNS)), 2):
        for value in {row[i] for row in ROWS}:
            met = {row[j] for row in ROWS if row[i] == value}
            tied = COLUMNS[j] == "segmentation" and COLUMNS[i] == "loss_type" and is_tied(value)
            assert tied or len(met) > 1, f"{value} goes with {met} alone"


WAYS = {
    "inputs on the host": ("--gradient_checkpointing", "--activation_offload", "cpu"),
    "layers, some kept": ("--gradient_checkpointing", "--checkpoint_keeps", "products"),
    "bf16": ("--use_peft", "--lora_r", "2", "--bf16", "true"),
    "adafactor": ("--optim", "adafactor"),
    "muon": ("--optim", "muon"),
    "adamw_8bit": ("--optim", "adamw_8bit"),
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow if way in ("adafactor", "adamw_8bit") else []) for way in WAYS]
)
def test_other_ways_there(away, way):
    steps = train("out", "--segmentation", "two_pass", "--reference", "none", "--loss_type", "simpo", *WAYS[way])
    assert sorted(steps) == [1, 2]
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in steps.values())
    told, copied = away.its_streams.told, way == "inputs on the host"
    each = (told["page_locked"], told["wait_stream"], told["record_event"], told["wait_event"])
    assert len(set(each)) == 1 and bool(each[0]) is copied  # one copy there, sent for and waited for once
    assert told["record_stream"] == 2 * each[0]


def test_the_numbers_are_the_host_s_and_it_goes_on_from_a_checkpoint(monkeypatch):
    flags = ["--segmentation", "deferred", "--use_peft", "--lora_r", "2", "--num_eval_problems", "1"]
    wanted = train("host", *flags)
    world = World(rank=0, local_rank=0, size=1, device=AWAY)
    monkeypatch.setattr("diffdpo.setup.context.init_distributed", lambda **_: world)
    with second_device():
        found = train("there", *flags)
        Path("again/checkpoints").mkdir(parents=True)
        Path("there/checkpoints/step-1").rename("again/checkpoints/step-1")
        again = train("again", *flags, "--resume_from_checkpoint", "latest")
        assert generate("there/final")
    for step, line in wanted.items():
        assert found[step]["loss"] == pytest.approx(line["loss"], abs=1e-5)
        assert found[step]["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-3)
    assert again[2]["loss"] == found[2]["loss"]
    host, there = (json.loads((Path(name) / "summary.json").read_text()) for name in ("host", "there"))
    assert set(host) == set(there)


def test_the_sampler_s_order_there(away):
    import diffdpo

    pairs = [{"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 11 or so"}]
    order = {"score_estimator": "sampler_order", "segment_rows": 1}
    there, here = (diffdpo.load("tiny", device=device) for device in (str(AWAY), "cpu"))
    (found,), (wanted,) = (diffdpo.score(pairs, model, **order) for model in (there, here))
    for side in ("chosen", "rejected"):
        assert found[side]["score"] == pytest.approx(wanted[side]["score"], abs=1e-4)


def test_a_reference_that_moves_there(away, monkeypatch):
    apart = []

    def watched(reference, policy, *, alpha):
        weights = list(zip(reference.parameters(), policy.parameters(), strict=True))
        before = sum(float((a - b).detach().abs().sum()) for a, b in weights)
        mix_in(reference, policy, alpha=alpha)
        apart.append((before, sum(float((a - b).detach().abs().sum()) for a, b in weights)))

    monkeypatch.setattr("diffdpo.reference.refresh.mix_in", watched)
    steps = train("out", "--sync_ref_model", "--ref_model_sync_steps", "1", "--learning_rate", "1e-3")
    assert sorted(steps) == [1, 2] and len(apart) == 2
    assert all(after == pytest.approx(0.4 * before, rel=1e-3) for before, after in apart) and apart[-1][0] > 0


@pytest.mark.slow
def test_a_step_that_diverged_is_taken_again_there(away, capsys):
    from diffdpo.cli.train import main

    with pytest.raises(TrainingError, match="--replay"):
        train("out", "--learning_rate", "1e30", "--warmup_steps", "0", "--max_grad_norm", "0")
    (culprit,) = Path("out").glob("culprit-step-*.json")
    capsys.readouterr()
    assert main(["--config", "out/config.yaml", "--replay", str(culprit)]) == 0
    told = capsys.readouterr().out
    assert "<- not finite" in told and "in the run loss" in told


def test_segments_that_fit_are_measured_there(away):
    assert sorted(train("out", "--segment_rows", "0", "--max_memory", "0.5")) == [1, 2]


def test_blocks_there(away):
    from diffdpo.cli.sft import main

    shape = ["--width", "16", "--layers", "1", "--heads", "2", "--vocab_size", "300", "--block_size", "4"]
    sft = [*SHORT, "--num_generated_answers", "40", *shape, "--output_dir", "blocks", "--segment_rows", "0"]
    assert main([flag for flag in sft if flag not in ("--num_generated_pairs", "12")]) == 0
    flags = ["--model_name_or_path", "blocks/final", "--segmentation", "two_pass", "--score_estimator", "auto"]
    assert sorted(train("out", *flags)) == [1, 2]


def test_packed_attention_there(away, monkeypatch):
    """The call of the kernel for rows of unequal lengths, with attention row by row in its place."""
    from diffdpo.models.architecture import layout

    def row_by_row(q, k, v, cuts, _cuts, longest, _longest, **options):
        assert cuts.dtype == torch.int32 and cuts.device == q.device and longest == int(cuts.diff().max())
        ends = cuts.tolist()
        parts = [[t[a:b].transpose(0, 1)[None] for t in (q, k, v)] for a, b in pairwise(ends)]
        attend = torch.nn.functional.scaled_dot_product_attention
        return torch.cat([attend(*part, **options)[0].transpose(0, 1) for part in parts])

    away.flash = True
    monkeypatch.setattr(layout, "varlen_attn", row_by_row)
    lengths, ids = [5, 3, 5], torch.arange(3)
    packed = layout.Layout.packed(lengths, 5, device=AWAY)
    q, k, v = (torch.randn(13, heads, 8, dtype=torch.bfloat16).to(AWAY) for heads in (4, 2, 2))
    assert len(packed.buckets) == 2 and len(ids) == 3
    packed_out = packed.attend(q, k, v)
    away.flash = False
    assert torch.allclose(packed_out.cpu().float(), packed.attend(q, k, v).cpu().float(), atol=1e-2)


def test_experts_of_a_layer_at_once_there(away, monkeypatch):
    from diffdpo.models.architecture import experts
    from diffdpo.models.architecture.llada2_moe import Expert

    monkeypatch.setattr(experts, "grouped_linear", counted := Counted(experts.grouped_linear))
    torch.manual_seed(0)
    mlps = torch.nn.ModuleList(Expert(16, 24) for _ in range(4))
    h_NK, expert_NT, weight_NT = torch.randn(9, 16), torch.arange(18).remainder(4).view(9, 2), torch.rand(9, 2)
    here = experts.mix_experts(h_NK, mlps, expert_NT, weight_NT)
    assert not counted.calls
    there = experts.mix_experts(h_NK.to(AWAY), mlps.to(AWAY), expert_NT.to(AWAY), weight_NT.to(AWAY))
    there.sum().backward()
    assert counted.calls == 3 and torch.allclose(there.detach().cpu(), here, atol=1e-5)
    assert all(parameter.grad.device == AWAY for parameter in mlps.parameters())


def test_logits_of_half_precision_are_not_rounded_there(away):
    from diffdpo.models.architecture.token_log_probs import token_log_probs

    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((20, 64), (300, 64)))
    target = torch.randint(0, 300, (20,), generator=generator)
    exact = token_log_probs(hidden.double(), weight.double(), target, logits_budget=None)
    there = token_log_probs(hidden.to(AWAY), weight.to(AWAY), target.to(AWAY), logits_budget=None).cpu()
    rounded = token_log_probs(hidden, weight, target, logits_budget=None)
    assert (there - exact).abs().max() < 1e-4 < 1e-2 < (rounded - exact).abs().max()


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_notebook_there(whole, monkeypatch):
    """``import diffdpo`` twice over in one process: trained, scored; stopped and gone on with, evaluated, sampled."""
    import diffdpo

    class StopAtOnce(diffdpo.Callback):
        def on_step(self, step, report):
            return True

    pairs = [{"prompt": f"{a} + 1 =", "chosen": f" {a + 1}", "rejected": f" {a + 2}"} for a in range(1, 5)]
    common = {"train_data": pairs, "per_device_train_batch_size": 2, "eval_fraction": 0.0, "num_mc_samples": 2}
    common |= {"tracking_uri": "none", "learning_rate": 1e-3, "max_steps": 2 if whole else 1}

    def cells(device: str) -> list:
        """What each gives in numbers."""
        first = diffdpo.train("tiny", output_dir=f"first-{device}", **common)
        loaded = diffdpo.load(first.output_dir / "final", device=device)
        adapter = {"use_peft": True, "lora_r": 2, "output_dir": f"second-{device}", **common}
        if whole:
            stopped = diffdpo.train(loaded, callbacks=StopAtOnce(), **adapter)
            assert (stopped.steps, stopped.complete) == (1, False)
            adapter["resume_from_checkpoint"] = "latest"
        second = diffdpo.train(loaded, **adapter)
        assert first.complete and second.complete
        assert {p.device.type for run in (first, second) for p in run.model.parameters()} == {loaded.device.type}
        lines = diffdpo.score(pairs, second.output_dir / "final", reference=loaded, num_mc_samples=2)
        losses = [line["loss"] for run in (first, second) for line in journal(run.output_dir).values()]
        found = [*losses, *(line["chosen"]["log_ratio"] for line in lines)]
        if whole:
            found.append(means_of(diffdpo.evaluate(pairs, model=loaded, num_mc_samples=2, tracking_uri="none")))
            asked = ["1 + 1 =", "2 + 1 ="]
            assert len(diffdpo.generate(asked, second.output_dir / "final", gen_length=4, device=device)) == 2
        return found

    wanted = cells("cpu")
    world = World(rank=0, local_rank=0, size=1, device=AWAY)
    monkeypatch.setattr("diffdpo.setup.context.init_distributed", lambda **_: world)
    monkeypatch.setattr("diffdpo.api.init_distributed", lambda **_: world)
    with second_device():
        found = cells(str(AWAY))
    assert len(wanted) == (9 if whole else 6)
    for there, here in zip(found, wanted, strict=True):
        assert there == pytest.approx(here, abs=1e-4)
