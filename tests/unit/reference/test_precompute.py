"""The pass before training: the numbers of ``copy`` to the bit, nothing scored twice, nothing left in memory."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from data_pipeline.reader import open_dataset
from diffdpo.config import TrainConfig
from diffdpo.engine.choice import EngineChoice
from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.models.encoder import make_encoder
from diffdpo.models.load import load_model, load_tokenizer_and_spec
from diffdpo.noise.options import NoiseOptions
from diffdpo.reference import precompute as module
from diffdpo.reference.precompute import ReferencePass
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.rows import score_rows
from diffdpo.scores.segments import make_segments
from diffdpo.setup import data as run_data

WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


class Run:
    """A configuration with its data, and how many rows its passes have scored."""

    def __init__(self, tiny_model, pairs_file, tmp_path, monkeypatch):
        self.cache_dir, self.rows, self.stop_after = tmp_path / "cache", 0, None
        self.config = TrainConfig(
            model_name_or_path=str(tiny_model),
            train_data=str(pairs_file),
            reference="precomputed",
            per_device_train_batch_size=4,
            per_device_eval_batch_size=3,
            num_mc_samples=2,
            max_length=128,
            max_prompt_length=64,
            learning_rate=1e-3,
            max_steps=18,
        )
        options = {"cache_dir": self.cache_dir, "eval_fraction": 0.2}
        self.sets = [open_dataset(str(pairs_file), split=split, **options) for split in ("train", "eval")]
        monkeypatch.setattr(module, "PART_RECORDS", 16)
        monkeypatch.setattr(module, "score_rows", self._counted)

    def _counted(self, forward, rows, *, segments):
        if self.stop_after is not None and self.rows >= self.stop_after:
            raise KeyboardInterrupt
        self.rows += len(rows)
        return score_rows(forward, rows, segments=segments)

    def precompute(self, **changed):
        self.rows = 0
        config = replace(self.config, **changed)
        tokenizer, spec = load_tokenizer_and_spec(config.model_name_or_path)
        encoder = make_encoder(config, tokenizer, spec)
        options = {"encoder": encoder, "spec": spec, "cache_dir": self.cache_dir, "say": print}
        work = ReferencePass(config, EngineChoice(), WORLD, **options)
        loader = run_data.train_loader(config, self.sets[0], encoder, WORLD)
        held_out = run_data.eval_loader(config, self.sets[1], encoder, WORLD)
        return work.complete(
            [
                work.training(loader, last=run_data.total_steps(config, loader)),
                work.held_out(held_out),
            ]
        )

    def compare(self, precomputed, **changed):
        """(largest difference from scores computed on the fly, of training and held-out rows; pairs compared)."""
        config = replace(self.config, **changed)
        loaded = load_model(config.model_name_or_path)
        forward = MaskedLogProbs.of(loaded.model, loaded.spec, config).requires_grad_(False)
        encoder = make_encoder(config, loaded.tokenizer, loaded.spec)
        noise = NoiseOptions.of(config, loaded.spec)
        segments = make_segments(config, EngineChoice(), WORLD.device)
        steps = run_data.train_loader(config, self.sets[0], encoder, WORLD).steps()
        batches = [next(steps)[0] for _ in range(config.max_steps)]
        worst, count = 0.0, 0
        for reference, some in (
            (precomputed.train, batches),
            (precomputed.held_out, run_data.eval_batches(config, self.sets[1], encoder, WORLD)),
        ):
            for batch in some:
                rows = noise.draw_rows(batch, WORLD.device)
                live_R = score_rows(forward, rows, segments=segments)
                assert live_R.abs().max() > 1
                worst = max(worst, float((reference(rows, batch) - live_R).abs().max()))
                count += int((batch.weight_B2.sum(1) > 0).sum())
        return worst, count


@pytest.fixture
def run(tiny_model, pairs_file, tmp_path, monkeypatch):
    return Run(tiny_model, pairs_file, tmp_path, monkeypatch)


def test_the_numbers_of_a_copy_to_the_bit_over_epochs(run):
    precomputed = run.precompute()
    worst, count = run.compare(precomputed)
    assert worst == 0.0
    assert count >= 18 * 4 - 3 + len(run.sets[1]) - 2, "more than an epoch, and the held-out pairs"


def test_nothing_is_scored_twice(run):
    run.precompute(max_steps=4)
    short = run.rows
    run.precompute()
    assert short > 0 and run.rows == 14 * 4 * 2 * 2, "a longer run adds the steps it has more"
    run.precompute()
    assert run.rows == 0
    run.precompute(learning_rate=1.0, beta=0.5, loss_type="ipo", output_dir="elsewhere")
    assert run.rows == 0, "what the reference does not depend on changes nothing"
    run.precompute(seed=1)
    assert run.rows > 0


def test_a_broken_pass_goes_on_where_it_was(run):
    run.stop_after = 100
    with pytest.raises(KeyboardInterrupt):
        run.precompute()
    done, run.stop_after = run.rows, None
    run.precompute()
    everything = 18 * 4 * 4 + 5 * 3 * 4
    assert done == 112 and everything - done < run.rows <= everything - done + 16 * 4, "at most a part is lost"
    assert run.compare(run.precompute())[0] == 0.0


def test_damaged_parts_are_named_and_scored_again(run, capsys):
    run.precompute()
    path = sorted(run.cache_dir.glob("reference_scores/*-train/epoch-0/*.part"))[1]
    path.write_bytes(path.read_bytes()[:-1])
    precomputed = run.precompute()
    assert run.rows == 16 * 4 and f"{path} is damaged" in capsys.readouterr().out
    assert run.compare(precomputed)[0] == 0.0


def test_a_damaged_part_is_told_once(run, capsys):
    """Also where later runs cut the missing records into other parts, or need none of them."""
    run.precompute()
    path = sorted(run.cache_dir.glob("reference_scores/*-train/epoch-0/*.part"))[-1]
    path.write_bytes(path.read_bytes()[:-1])
    run.precompute(max_steps=2)
    assert run.rows == 0 and f"{path} is damaged" in capsys.readouterr().out
    run.precompute()
    assert run.rows > 0 and "damaged" not in capsys.readouterr().out
    run.precompute()
    assert run.rows == 0 and "damaged" not in capsys.readouterr().out


def test_other_shapes_are_used_and_told(run, capsys):
    run.precompute()
    precomputed = run.precompute(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=18)
    assert run.rows == 0 and "micro_batch': 4" in capsys.readouterr().out
    worst, _ = run.compare(precomputed, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert 0 <= worst < 1e-4  # nats; scores of rows are tens to hundreds


def test_held_out_scores_are_made_in_the_run_s_own_shapes(run):
    run.precompute(max_steps=2)
    precomputed = run.precompute(max_steps=2, per_device_eval_batch_size=5)
    assert run.rows == 3 * 5 * 4
    assert run.compare(precomputed, max_steps=2, per_device_eval_batch_size=5)[0] == 0.0


def test_a_named_cache_of_other_settings_is_refused(run, tmp_path):
    folder = str(tmp_path / "named")
    run.precompute(reference_cache=folder)
    with pytest.raises(UserError, match="made with score_estimator balanced, this run has mask_count"):
        run.precompute(reference_cache=folder, score_estimator="mask_count")
    assert run.rows == 0
    run.precompute(reference_cache=folder)
    assert run.rows == 0


def test_the_model_leaves_memory(run, monkeypatch):
    seen = []
    held = module.hold_frozen
    monkeypatch.setattr(
        module, "hold_frozen", lambda choice, m, world: (seen.append(weakref.ref(m)), held(choice, m, world))[1]
    )
    run.precompute(max_steps=2)
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None


def test_another_reference_is_read_from_its_folder(run, tiny_model, tmp_path):
    from diffdpo.models.architecture.from_scratch import new_model
    from diffdpo.models.load import save_model

    tokenizer = load_model(str(tiny_model)).tokenizer
    save_model(new_model(tokenizer, width=16, layers=1, heads=2, seed=5), tokenizer, tmp_path / "other")
    precomputed = run.precompute(ref_model_name_or_path=str(tmp_path / "other"), max_steps=2)
    assert run.compare(precomputed, max_steps=2)[0] > 1e-3, "these are not the policy's scores"
    assert run.compare(precomputed, max_steps=2, model_name_or_path=str(tmp_path / "other"))[0] == 0.0


def test_a_score_that_is_not_finite_is_never_kept(run, monkeypatch):
    """It would be found at the first step of every run that reads it, and by `--precompute_only` never."""
    right = module.score_rows

    def damaged(forward, rows, *, segments):
        f_R = right(forward, rows, segments=segments)
        f_R[0] = float("nan")
        return f_R

    monkeypatch.setattr(module, "score_rows", damaged)
    with pytest.raises(UserError, match=r"no finite score to \d+ of \d+ records"):
        run.precompute()
    assert not list(run.cache_dir.rglob("*.part"))
