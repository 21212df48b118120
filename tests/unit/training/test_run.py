"""Settings to parts: what is chosen for the user, and the final model."""

import json

import pytest
import torch

from data_pipeline.dataset import open_dataset
from data_pipeline.errors import DataError
from diffdpo.config import BUNDLED_RATE, FULL_RATE, LORA_RATE, SftConfig, TrainConfig, resolve
from diffdpo.engine.choice import choose_engine
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.models.encoder import make_encoder
from diffdpo.models.load import load_model
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.setup import data as run_data
from diffdpo.setup.context import RunContext, open_context
from diffdpo.setup.model import save_final
from diffdpo.training.finish import CLOSING, finish
from diffdpo.training.guard import Watch
from diffdpo.training.heartbeat import Pulse


def engine_of(config: TrainConfig):
    return choose_engine(resolve(config), processes=1, cuda=False, bf16_able=False)


WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def test_the_final_model_scores_identically(tiny_model, tmp_path):
    loaded = load_model(str(tiny_model))
    engine = PlainEngine(MaskedLogProbs(loaded.model.requires_grad_(True), loaded.spec), WORLD, OptimizerOptions(0.1))
    row = [torch.tensor([[3, 4, loaded.spec.mask_token_id, 6]]), torch.tensor([4])]
    at = [torch.tensor([0]), torch.tensor([2]), torch.tensor([5])]
    engine.backward(-engine(*row, *at).sum(), last=True)
    engine.step(0.1)
    save_final(tmp_path / "final", engine, loaded)
    again = load_model(str(tmp_path / "final"))
    with torch.no_grad():
        assert torch.equal(MaskedLogProbs(again.model, again.spec)(*row, *at), engine(*row, *at))
        before = load_model(str(tiny_model))
        assert not torch.equal(MaskedLogProbs(before.model, before.spec)(*row, *at), engine(*row, *at))


def test_the_rate_follows_what_is_trained():
    assert resolve(TrainConfig()).learning_rate == BUNDLED_RATE
    assert resolve(TrainConfig(model_name_or_path="x")).learning_rate == FULL_RATE
    assert resolve(TrainConfig(model_name_or_path="x", use_peft=True)).learning_rate == LORA_RATE
    assert resolve(TrainConfig(learning_rate=3.0)).learning_rate == 3.0
    assert resolve(SftConfig()).learning_rate == SftConfig.learning_rate


def test_losses_and_their_weights():
    loss = TrainConfig(loss_type="sigmoid,ipo", loss_weights="1.0,0.5", sft_weight=0.05).loss()
    assert loss.names == ("sigmoid", "ipo", "sft") and loss.weights == (1.0, 0.5, 0.05)
    for wrong in ({"loss_type": "sigmoidal"}, {"loss_weights": "1,2"}, {"loss_weights": "x"}):
        with pytest.raises(UserError):
            TrainConfig(**wrong).loss()


@pytest.mark.parametrize(("enabled", "flag", "what"), [(True, None, True), (False, False, False), ("auto", True, True)])
def test_bf16_may_be_set_in_the_json(tmp_path, enabled, flag, what):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": enabled}}))
    assert engine_of(TrainConfig(ds_config=str(path), bf16=flag)).bf16 is what


def test_json_and_flag_may_not_contradict(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}')
    with pytest.raises(UserError, match="--ds_config sets bf16"):
        engine_of(TrainConfig(ds_config=str(path), bf16=False))


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_an_output_folder_that_cannot_be_made_is_named(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        open_context(TrainConfig(output_dir=str(tmp_path / below)), "train")


def test_a_mistake_leaves_no_folder_behind(tmp_path):
    open_context(TrainConfig(output_dir=str(tmp_path / "run"), tracking_uri="none"), "train")
    assert not (tmp_path / "run").exists()


def test_another_run_s_checkpoint_does_not_overwrite_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    other = tmp_path / "other" / "checkpoints" / "step-2"
    with pytest.raises(UserError, match="is of another"):
        open_context(TrainConfig(output_dir=str(tmp_path / "run"), resume_from_checkpoint=str(other)), "train")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss_type": "sigmoid,sft", "sft_weight": 0.1}, "use one of the two"),
        ({"loss_type": "sigmoid,sft", "loss_weights": "1,nan"}, "finite"),
    ],
)
def test_losses_that_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        TrainConfig(**settings).loss()


def test_bf16_needs_master_weights():
    with pytest.raises(UserError, match="ds_config"):
        engine_of(TrainConfig(bf16=True))
    assert engine_of(TrainConfig()).bf16 is False


def test_flags_of_truncation_and_of_damaged_records_reach_the_loader(tiny_model, tmp_path):
    loaded = load_model(str(tiny_model))
    config = TrainConfig(truncation="drop", answer_truncation="drop", strict=True, per_device_train_batch_size=1)
    encoder = make_encoder(config, loaded.tokenizer, loaded.spec)
    assert (encoder.truncation, encoder.answer_truncation) == ("drop", "drop")
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    dataset = open_dataset(str(tmp_path / "a.jsonl"), cache_dir=tmp_path / "cache")
    (shard,) = (tmp_path / "cache").rglob("*.tar")
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DataError, match=r"changed_record.*without --strict"):
        next(run_data.train_loader(config, dataset, encoder, WORLD).steps())


@pytest.mark.parametrize("saved", [False, True], ids=["no checkpoint", "a checkpoint"])
def test_an_interruption_says_where_the_run_was_and_what_there_is(tmp_path, capsys, saved):
    if saved:
        (tmp_path / "checkpoints" / "step-4").mkdir(parents=True)
        (tmp_path / "checkpoints" / "step-4" / "run.json").write_text("{}")
    config = TrainConfig()
    watch = Watch(Pulse(WORLD, tmp_path, 0.0))
    place = RunContext(World(0, 0, 1, torch.device("cpu")), tmp_path, tmp_path / "cache", "run")
    with pytest.raises(KeyboardInterrupt), finish(place, None, watch, config) as end:
        end.phase = "in the evaluation"
        raise KeyboardInterrupt
    said = capsys.readouterr().out
    assert "stopped in the evaluation" in said and end.status == "KILLED"
    assert ("step-4; go on from there with --output_dir" in said) == saved
    # what follows the last evaluation has no usual time: slow drawing is no hang
    assert watch.pulse.stage == CLOSING and watch.pulse.limit() == float("inf")


def test_in_another_folder_the_first_one_s_journal_is_not_missed(tmp_path):
    from diffdpo.training.run import _goes_on_here

    checkpoint = tmp_path / "first/checkpoints/step-2"
    assert _goes_on_here(checkpoint, tmp_path / "first") and not _goes_on_here(checkpoint, tmp_path / "second")
    assert not _goes_on_here(None, tmp_path / "first")
