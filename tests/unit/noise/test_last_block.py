import pytest
import torch

from diffdpo.errors import UserError
from diffdpo.models.architecture.spec import FamilySpec
from diffdpo.noise.last_block import with_whole_blocks
from diffdpo.noise.options import NoiseOptions
from diffdpo.settings.noise import NoiseSettings
from tests.support.block_reference import BATCH, EOS, MASK

SPEC = FamilySpec("sdar", MASK, EOS, EOS, "", "", block_size=4)


def test_answers_end_with_their_block_and_all_of_it_is_scored():
    filled = with_whole_blocks(BATCH, block_size=4, terminator_id=EOS)
    assert (filled.lengths_B2 % 4 == 0).all() and (filled.lengths_B2 - BATCH.lengths_B2 < 4).all()
    for b in range(len(BATCH.ids)):
        for side in (0, 1):
            old, new = int(BATCH.lengths_B2[b, side]), int(filled.lengths_B2[b, side])
            ids = filled.input_ids_B2T[b, side].tolist()
            assert ids[:old] == BATCH.input_ids_B2T[b, side, :old].tolist() and set(ids[old:new]) <= {EOS}
    settings = NoiseSettings(score_estimator="exact", fill_last_block=True)
    rows = NoiseOptions.of(settings, SPEC).draw_rows(BATCH, torch.device("cpu"))
    assert rows.tokens_A.tolist() == (filled.lengths_B2 - BATCH.prompt_lengths_B2).flatten().tolist()


def test_an_answer_that_was_cut_stays():
    cut = BATCH.input_ids_B2T.clone()
    cut[0, 0, int(BATCH.lengths_B2[0, 0]) - 1] = 7
    from dataclasses import replace

    filled = with_whole_blocks(replace(BATCH, input_ids_B2T=cut), block_size=4, terminator_id=EOS)
    assert filled.lengths_B2[0, 0] == BATCH.lengths_B2[0, 0]


def test_full_attention_has_no_last_block():
    with pytest.raises(UserError, match="has no blocks"):
        NoiseOptions.of(NoiseSettings(fill_last_block=True), FamilySpec("llada", 2, 1, 1, "", ""))
