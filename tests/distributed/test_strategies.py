"""The same gradient from every strategy, loss, engine and number of processes: that of one graph in one process."""

import json
import sys
from pathlib import Path

import pytest
import torch

from diffdpo.losses.preference import LOSSES

BIN = Path(sys.executable).parent
WORKER = "tests/distributed/gradients.py"
ALL, DEFERRABLE = ["none", "checkpoint", "two_pass"], ["none", "checkpoint", "two_pass", "deferred"]
COUPLED = [name for name, loss in LOSSES.items() if loss.scope == "batch" or loss.needs_reference_point]
SEPARATE = [name for name in LOSSES if name not in COUPLED]
SMALL = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10000}
ZERO = {
    "plain": None,
    "ZeRO-1": {"stage": 1, "reduce_bucket_size": 10000},
    "ZeRO-2": {"stage": 2, "reduce_bucket_size": 10000},
    "ZeRO-2 offload": {"stage": 2, "reduce_bucket_size": 10000, "offload_optimizer": {"device": "cpu"}},
    "ZeRO-3": {"stage": 3, **SMALL},
    "ZeRO-3 offload": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
        **SMALL,
    },
}
ENGINES = {name: {"ds": config} for name, config in ZERO.items()}
ENGINES |= {
    "FSDP2": {"fsdp": {}},
    "FSDP2 offload": {"fsdp": {"offload": True}},
    "FSDP2 kept": {"fsdp": {"reshard_after_forward": False}},
    "FSDP2 copies": {"fsdp": {"shard_size": 1}},  # as many copies as processes
}
FP32, BF16 = 1e-5, 3e-2


def case(name: str, engine: str, **settings) -> dict:
    return {"name": name, **ENGINES[engine], "strategies": ALL, "losses": ["sigmoid"], **settings}


@pytest.fixture
def compare(command, tiny_model, pairs_file, tmp_path):
    """Run cases on some processes; {case strategy loss: result}, already checked for equal calls."""

    def run(
        cases: list[dict], *, processes: int, model: Path = tiny_model, pairs: Path = pairs_file, timeout: float = 480
    ) -> dict[str, dict]:
        out = tmp_path / "found.json"
        done = command(
            [
                *(str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(processes), WORKER),
                *(str(model), str(pairs), json.dumps(cases), str(out)),
            ],
            timeout=timeout,
            PYTHONPATH=str(Path.cwd()),
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        found = json.loads(out.read_text())
        for name, result in found.items():
            assert result["sharded"] == (result["stage"] == 3 and result["cut"]), name  # DeepSpeed cuts for one too
            if result["stage"] == 3 or (result["stage"] == 2 and "LoRA" not in name and not result["repeated"]):
                assert result["calls"] == [result["calls"][0]] * processes, f"{name}: ranks out of step"
        return found

    return run


def check(found: dict[str, dict], limit: float) -> None:
    wrong = {name: result["error"] for name, result in found.items() if not result["error"] <= limit}
    assert not wrong, wrong
    if limit == FP32:
        for name, result in found.items():
            assert result["loss"][0] == pytest.approx(result["loss"][1], rel=1e-4), name


@pytest.mark.distributed
def test_all_weights_on_two_processes(compare):
    cases = [
        case("plain", "plain", strategies=["deferred"], losses=["sigmoid,sft"]),
        case("ZeRO-3", "ZeRO-3", strategies=["two_pass"]),
        case("FSDP2", "FSDP2", strategies=["checkpoint", "two_pass"], losses=["sigmoid,sft"], layers=True),
        case("FSDP2 keeps", "FSDP2", strategies=["two_pass"], layers=True, keeps="products"),
        case("rows over 2", "plain", strategies=["none", "checkpoint"], losses=["sigmoid,sft"], rows_over=2),
    ]
    check(compare(cases, processes=2), FP32)


@pytest.mark.distributed
def test_lora_on_two_processes(compare):
    cases = [
        case("ZeRO-2 LoRA", "ZeRO-2", strategies=["deferred"], lora=True),
        case("ZeRO-3 LoRA", "ZeRO-3", strategies=["deferred"], lora=True, losses=["nca_pair"]),
        case("FSDP2 LoRA", "FSDP2 offload", strategies=["deferred", "two_pass"], lora=True, losses=["nca_pair"]),
        case("FSDP2 keeps LoRA", "FSDP2", strategies=["none"], layers=True, keeps="products", lora=True),
        case("rows over 2 LoRA", "plain", strategies=["two_pass"], losses=["kto"], rows_over=2, lora=True, layers=True),
    ]
    check(compare(cases, processes=2), FP32)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(960)
@pytest.mark.parametrize("trained", ["all", "LoRA"])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("engine", list(ENGINES))
def test_every_loss_and_strategy(compare, engine, processes, trained):
    whole = engine in ("plain", "ZeRO-1") or (engine == "ZeRO-2" and processes == 1)
    cases = {
        "all": [
            case("full", engine, losses=SEPARATE, strategies=DEFERRABLE if whole else ALL),
            case("full, layers", engine, layers=True, strategies=DEFERRABLE if whole else ALL),
            case("coupled", engine, losses=COUPLED, strategies=["two_pass"]),
        ],
        "LoRA": [
            case("LoRA", engine, lora=True, strategies=DEFERRABLE, losses=SEPARATE),
            case("LoRA, layers", engine, lora=True, layers=True, strategies=DEFERRABLE),
        ],
    }
    check(compare(cases[trained], processes=processes, timeout=900), FP32)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(960)
@pytest.mark.parametrize("trained", ["all", "LoRA"])
def test_every_loss_and_strategy_with_rows_over_two_processes(compare, trained):
    lora = {"rows_over": 2, "lora": trained == "LoRA"}
    cases = [
        case("rows over 2", "plain", losses=SEPARATE, **lora),
        case("rows over 2, layers", "plain", layers=True, **lora),
        case("rows over 2, coupled", "plain", losses=COUPLED, strategies=["two_pass"], **lora),
    ]
    check(compare(cases, processes=2, timeout=900), FP32)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "plain"])
def test_bf16(compare, engine):
    cases = [
        case("full", engine, bf16=True, strategies=["none", "two_pass", "checkpoint"]),
        case("LoRA", engine, bf16=True, lora=True, strategies=DEFERRABLE),
    ]
    check(compare(cases, processes=2, timeout=600), BF16)


@pytest.fixture(scope="module")
def block_model(tiny_model, tmp_path_factory) -> Path:
    """As ``tiny_model``, block-causal."""
    from diffdpo.models.architecture.from_scratch import new_model
    from diffdpo.models.load import load_tokenizer, save_model

    tokenizer, folder = load_tokenizer(str(tiny_model)), tmp_path_factory.mktemp("blocks") / "block_model"
    save_model(new_model(tokenizer, width=32, layers=2, heads=2, seed=0, block_size=4), tokenizer, folder)
    return folder


@pytest.mark.distributed
def test_block_causal_rows_on_two_processes(compare, block_model):
    """Clean tokens shared by a pair's segments, or run in each where ranks must call equally often."""
    cases = [
        case("plain", "plain", strategies=["none", "deferred"]),
        case("ZeRO-2 LoRA", "ZeRO-2", strategies=["deferred"], lora=True),
        case("ZeRO-3", "ZeRO-3", strategies=["two_pass"], layers=True),
        case("ZeRO-3 LoRA", "ZeRO-3", strategies=["deferred"], lora=True),
        case("FSDP2", "FSDP2", strategies=["checkpoint"]),
        case("FSDP2 LoRA", "FSDP2 offload", strategies=["two_pass"], lora=True),
    ]
    check(compare(cases, processes=2, model=block_model), FP32)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(960)
def test_ranks_with_other_numbers_of_pairs(compare, tmp_path):
    """Five pairs in a step of eight: the second rank has one of four. Nobody waits for ever, and the gradient is that
    of five pairs in one process."""
    path = tmp_path / "five.jsonl"
    texts = [{"prompt": f"{n} + 1 =", "chosen": f"{n + 1} " * 4 * n, "rejected": str(n)} for n in range(1, 6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in texts))
    cases = [case(name, name, strategies=["checkpoint", "two_pass"], layers=True) for name in ENGINES]
    cases += [
        case("rows over 2", "plain", rows_over=2),
        case("FSDP2 LoRA", "FSDP2", lora=True, strategies=["deferred"]),
    ]
    check(compare(cases, processes=2, pairs=path, timeout=900), FP32)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(960)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("engine", list(ENGINES))
def test_block_causal_rows_with_every_strategy(compare, block_model, engine, processes):
    whole = engine in ("plain", "ZeRO-1") or (engine == "ZeRO-2" and processes == 1)
    cases = [
        case("full", engine, strategies=DEFERRABLE if whole else ALL),
        case("full, layers", engine, layers=True, strategies=DEFERRABLE if whole else ALL),
        case("LoRA", engine, lora=True, strategies=DEFERRABLE),
        case("LoRA, layers, exact", engine, lora=True, layers=True, estimator="exact", strategies=DEFERRABLE),
    ]
    check(compare(cases, processes=processes, model=block_model, timeout=900), FP32)


@pytest.fixture(scope="module")
def experts_model(tiny_model, tmp_path_factory) -> Path:
    """As ``tiny_model``, a block-causal mixture of experts."""
    from diffdpo.models.architecture.llada2_moe import LLaDA2MoeConfig, LLaDA2MoeModelLM
    from diffdpo.models.load import load_model, save_model

    tiny, folder = load_model(str(tiny_model)), tmp_path_factory.mktemp("experts") / "experts_model"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}
    sizes |= {"n_group": 2, "topk_group": 1, "num_shared_experts": 1, "first_k_dense_replace": 1, "block_size": 4}
    numbers = {"routed_scaling_factor": 2.5, "partial_rotary_factor": 0.5, "rope_theta": 1e4, "rms_norm_eps": 1e-6}
    ids = {"mask_token_id": tiny.spec.mask_token_id, "eos_token_id": tiny.spec.terminator_id}
    rest = {"vocab_size": tiny.model.head.weight.shape[0], "tie_word_embeddings": False}
    config = LLaDA2MoeConfig(**sizes, **numbers, **ids, pad_token_id=tiny.spec.pad_token_id, **rest)
    save_model(LLaDA2MoeModelLM(config), tiny.tokenizer, folder)
    return folder


@pytest.mark.distributed
def test_a_trained_router_on_two_processes(compare, experts_model):
    """Its gradient is that of one graph, and its balance loss lies where it must; without the flag there is none."""
    cases = [
        case("ZeRO-3", "ZeRO-3", strategies=["two_pass"], router=True),
        case("FSDP2 LoRA", "FSDP2", strategies=["deferred"], lora=True, router=True),
        case("frozen", "FSDP2", strategies=["none"]),
    ]
    found = compare(cases, processes=2, model=experts_model)
    check(found, FP32)
    balance = {name: result["balance"] for name, result in found.items()}
    assert balance.pop("frozen none sigmoid") is None
    assert all(1 <= value <= 8 for value in balance.values())


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(960)
@pytest.mark.parametrize("engine", list(ENGINES))
def test_experts_and_routers_with_every_strategy(compare, experts_model, engine):
    whole = engine in ("plain", "ZeRO-1")
    cases = [
        case("full", engine, router=True, strategies=DEFERRABLE if whole else ALL),
        case("full, frozen", engine, layers=True, strategies=["two_pass"]),
        case("LoRA", engine, lora=True, router=True, strategies=DEFERRABLE),
        case("LoRA, layers", engine, lora=True, router=True, layers=True, strategies=["two_pass"]),
    ]
    check(compare(cases, processes=2, model=experts_model, timeout=900), FP32)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(960)
def test_compiled_blocks_under_fsdp2(compare):
    cases = [
        case("full", "FSDP2", compiled=True, strategies=["none", "checkpoint", "two_pass"]),
        case("layers", "FSDP2 offload", compiled=True, layers=True, strategies=["two_pass"]),
        case("LoRA", "FSDP2", compiled=True, lora=True, strategies=["deferred", "two_pass"]),
        case("LoRA, layers", "FSDP2", compiled=True, lora=True, layers=True, strategies=["deferred"]),
        case("copies", "FSDP2 copies", compiled=True, strategies=["two_pass"]),
    ]
    check(compare(cases, processes=2, timeout=900), FP32)


def greedy(engine: str, **settings) -> dict:
    return case(f"{engine} {settings}", engine, strategies=["two_pass"], **{"segment": 8, "greedy": True, **settings})


@pytest.mark.slow
@pytest.mark.distributed
def test_out_of_memory_in_the_middle_of_a_backward(compare):
    """One process: whatever ZeRO-1 and 2 have begun is forgotten."""
    cases = [greedy(engine, lora=lora) for engine in ("ZeRO-1", "ZeRO-2", "ZeRO-2 offload") for lora in (False, True)]
    found = compare(cases, processes=1)
    assert all(result["repeated"] for result in found.values())
    check(found, FP32)


@pytest.mark.slow
@pytest.mark.distributed
def test_out_of_memory_on_one_rank_only(compare):
    """All repeat: where gradients are reduced at the end of a step, ranks can ask one another before."""
    cases = [greedy("plain"), greedy("ZeRO-1")]
    cases += [greedy(engine, lora=True) for engine in ("plain", "ZeRO-1", "ZeRO-2", "ZeRO-2 offload")]
    found = compare(cases, processes=2)
    assert all(result["repeated"] for result in found.values())
    check(found, FP32)


@pytest.fixture(scope="module")
def short_pairs(tmp_path_factory) -> Path:
    """Answers of one to three characters, so that ``exact`` draws 1 to 15 rows or more."""
    path = tmp_path_factory.mktemp("short") / "pairs.jsonl"
    lines = [
        {"prompt": f"{a} + {b} =", "chosen": str(a + b), "rejected": str(a * 100 + b)[: 1 + a % 3]}
        for a in range(1, 9)
        for b in (3, 70, 210)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ZeRO-2", "ZeRO-3"])
def test_exact_draws_as_many_segments_on_every_rank(compare, short_pairs, engine):
    """Rows of ``exact`` depend on the answers: 2^L - 1. Ranks that must run equally many forwards agree on the most."""
    cases = [
        case("exact", engine, estimator="exact", strategies=["checkpoint", "two_pass"], losses=["sigmoid", "aot"][:1]),
        case("exact LoRA", engine, estimator="exact", lora=True, strategies=["two_pass", "deferred"]),
        case("exact coupled", engine, estimator="exact", strategies=["two_pass"], losses=COUPLED),
    ]
    check(compare(cases, processes=2, pairs=short_pairs), FP32)
