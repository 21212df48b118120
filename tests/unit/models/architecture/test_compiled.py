"""Compiled blocks: the same numbers, no new graphs for other lengths, nothing else about the model changed."""

import copy
import json

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffdpo.config import TrainConfig, make_config
from diffdpo.errors import UserError
from diffdpo.models.architecture import compiled
from diffdpo.models.architecture.spec import LLADA_LORA_TARGETS, FamilySpec
from diffdpo.models.load import load_model
from diffdpo.models.lora.adapters import add_lora, reference
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from tests.support.published import LLADA, write

SPEC = FamilySpec("llada", 2, 1, 1, "LLaDABlock", LLADA_LORA_TARGETS)
TRAINED = ("all", "LoRA")


@pytest.fixture
def counter(monkeypatch):
    """Tracing without inductor, which takes half a minute; counts graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    call = torch.compile(compiled.call_block, dynamic=True, backend=counter)
    monkeypatch.setattr(compiled, "compiled_call", lambda: call)
    yield counter
    torch._dynamo.reset()


def scorers(model, trained, **options):
    policy = add_lora(model, SPEC, r=2) if trained == "LoRA" else model.requires_grad_(True)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return MaskedLogProbs(policy, SPEC, **options), MaskedLogProbs(policy, SPEC, compile_blocks=True, **options)


def rows(*lengths):
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.randint(3, 100, (len(lengths), max(lengths)), generator=generator)
    row = torch.arange(len(lengths)).repeat_interleave(2)
    position = torch.tensor([p for length in lengths for p in (1, length - 1)])
    return ids, torch.tensor(lengths), row, position, ids[row, position] + 1


def scores_and_gradients(scorer, batch):
    parameters = [p for p in scorer.parameters() if p.requires_grad]
    scores = scorer(*batch)
    return scores.detach(), torch.autograd.grad(scores.sum(), parameters)


@pytest.mark.parametrize(
    ("trained", "layer_checkpointing"),
    [
        ("LoRA", False),
        pytest.param("LoRA", True, marks=pytest.mark.slow),
        pytest.param("all", False, marks=pytest.mark.slow),
        pytest.param("all", True, marks=pytest.mark.slow),
    ],
)
def test_the_same_scores_and_gradients_and_no_graph_for_other_lengths(model, counter, trained, layer_checkpointing):
    plain, fast = scorers(model, trained, layer_checkpointing=layer_checkpointing)
    batches = [rows(5, 9, 9), rows(12, 4), rows(3, 7, 11, 20, 20, 33)]  # 2 to 5 buckets
    graphs = []
    for batch in batches:
        (scores, gradients), (expected, wanted) = (scores_and_gradients(way, batch) for way in (fast, plain))
        assert torch.allclose(scores, expected, rtol=0, atol=1e-10)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(gradients, wanted, strict=True))
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and graphs[-1] == graphs[0]


def test_policy_and_reference_are_the_same_numbers_at_the_start(model, counter):
    policy = add_lora(model, SPEC, r=2)
    fast = MaskedLogProbs(policy, SPEC, compile_blocks=True)
    frozen = copy.deepcopy(fast).requires_grad_(False)
    with torch.no_grad(), reference(policy):
        off = fast(*rows(5, 9, 9))
    assert torch.allclose(fast(*rows(5, 9, 9)), off, rtol=0, atol=1e-5)  # with a graph and without one
    before = counter.frame_count
    assert torch.allclose(frozen(*rows(5, 9, 9)), off, rtol=0, atol=1e-5)
    assert counter.frame_count > before  # a copy is compiled too
    assert set(fast.state_dict()) == set(MaskedLogProbs(policy, SPEC).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("trained", TRAINED)
def test_inductor_gives_the_same(model, trained):
    torch._dynamo.reset()
    plain, fast = scorers(model, trained)  # fp64
    for batch in (rows(5, 9, 9), rows(3, 7, 11, 20, 20, 33)):
        (scores, gradients), (expected, wanted) = (scores_and_gradients(way, batch) for way in (fast, plain))
        assert torch.allclose(scores, expected, rtol=0, atol=1e-10)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(gradients, wanted, strict=True))


def test_without_a_compiler_it_is_refused(model):
    nowhere = torch._inductor.config.patch({"cpp.cxx": ("/nowhere/c++",)})
    with nowhere, pytest.raises(UserError, match=r"finds no C\+\+ compiler; install g\+\+"):
        MaskedLogProbs(model, SPEC, compile_blocks=True)


def test_where_it_gains_nothing_it_is_refused(tmp_path):
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(UserError, match="torch_compile gains nothing under ZeRO-3"):
        make_config(TrainConfig, {"torch_compile": True, "ds_config": str(path)})
    assert make_config(TrainConfig, {"torch_compile": True, "engine": "fsdp2"}).torch_compile


def test_4_bit_layers_compile_to_no_more_graphs(counter, tmp_path, tokenizer):
    """bitsandbytes' product is an operator that a graph holds: the one break of a block stays its attention."""
    pytest.importorskip("bitsandbytes")
    write(tmp_path / "published", LLADA, tokenizer, shards=1)
    frames = {}
    for four in (False, True):
        model = load_model(tmp_path / "published", load_in_4bit=four).model
        before = counter.frame_count
        plain, compiled_ = scorers(model, "LoRA")
        wanted, found = (scores_and_gradients(scorer, rows(5, 9, 3)) for scorer in (plain, compiled_))
        assert torch.allclose(found[0], wanted[0], rtol=0, atol=1e-5)
        for ours, theirs in zip(found[1], wanted[1], strict=True):
            assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
        frames[four] = counter.frame_count - before
    assert frames[True] == frames[False]
