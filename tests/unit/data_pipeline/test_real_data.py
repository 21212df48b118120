"""Published data sets through every converter and file type (folder in DIFFDPO_REAL_DATA)."""

import csv
import gzip
import json

import pytest

from data_pipeline.convert import ConvertOptions
from data_pipeline.dataset import open_dataset
from data_pipeline.encode import Drop, Encoder
from data_pipeline.reader import PairLoader
from data_pipeline.records import AnswerRecord, PreferenceRecord
from data_pipeline.shard_builder import BuildOptions, build
from data_pipeline.sources.candidates import Pairing
from data_pipeline.stages import RecordReader

# file: rows, records, kind of record, whether the prompt is a conversation
EXPECTED = {
    "gsm8k_model_vs_model_pairs": (1944, 1944, PreferenceRecord, False),
    "gsm8k_groundtruth_vs_wrong_pairs": (2649, 2649, PreferenceRecord, False),
    "llada_gsm8k_onpolicy_pairs": (519, 519, PreferenceRecord, False),
    "hh_rlhf_harmless_base_test": (1857, 1857, PreferenceRecord, True),
    "hh_rlhf_raw_sample": (400, 399, PreferenceRecord, True),
    "gsm8k_train": (7473, 7473, AnswerRecord, False),
    "gsm8k_test_part": (1059, 1059, AnswerRecord, False),
}


def rows_of(folder, name):
    with gzip.open(folder / f"{name}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def records_of(dataset):
    reader = RecordReader(dataset)
    return [reader(number) for number in range(len(dataset))]


@pytest.mark.parametrize("name", EXPECTED)
def test_published_files(real_data, cache, name):
    rows, count, kind, conversation = EXPECTED[name]
    dataset = open_dataset(str(real_data / f"{name}.jsonl.gz"), cache_dir=cache)
    report = dataset.manifest["provenance"]["report"]
    dropped = sum(item["count"] for item in report["dropped"].values())
    assert (report["rows"], len(dataset), dropped) == (rows, count, rows - count)
    records = records_of(dataset)
    assert all(isinstance(record, kind) for record in records)
    assert {isinstance(record.prompt, tuple) for record in records} == {conversation}


def test_raw_transcripts_give_the_prompts_their_authors_cut(real_data, cache):
    """The raw sample and the cut file are the same corpus: every prompt in both ends at the same turn."""
    raw, cut = (
        {r.id: r for r in records_of(open_dataset(str(real_data / f"{name}.jsonl.gz"), cache_dir=cache))}
        for name in ("hh_rlhf_raw_sample", "hh_rlhf_harmless_base_test")
    )
    assert len(raw.keys() & cut.keys()) >= 0.75 * len(raw)  # ids are hashes of prompt, chosen and rejected
    for record in raw.values():
        assert record.prompt[-1]["role"] == "user"
        assert [turn["role"] for turn in (*record.chosen, *record.rejected)] == ["assistant", "assistant"]
        assert not any("\n\nHuman:" in turn["content"] for turn in record.prompt)


GRADED = [("gsm8k_model_vs_model_pairs", layout) for layout in ("lists", "objects", "models", "long")]
GRADED += [("gsm8k_groundtruth_vs_wrong_pairs", "lists"), ("llada_gsm8k_onpolicy_pairs", "lists")]


@pytest.mark.parametrize(("name", "layout"), GRADED)
def test_candidates_from_graded_solutions(real_data, tmp_path, cache, name, layout):
    """The graded model solutions, gathered by question and paired again: the published pairs, right against wrong."""
    by_question: dict[str, dict[str, bool]] = {}
    for row in rows_of(real_data, name):
        answers = by_question.setdefault(row["prompt"], {})
        answers |= {row["chosen"]: True, row["rejected"]: False}
    if layout == "lists":
        rows = [{"question": q, "candidates": list(a), "correct": list(a.values())} for q, a in by_question.items()]
    elif layout == "objects":
        rows = [
            {"question": q, "answers": [{"text": t, "is_correct": c} for t, c in a.items()]}
            for q, a in by_question.items()
        ]
    elif layout == "models":
        rows = [
            {"question": q} | {f"model{i}": {"solution": t, "is_correct": c} for i, (t, c) in enumerate(a.items())}
            for q, a in by_question.items()
        ]
    else:
        rows = [{"question": q, "answer": t, "is_correct": c} for q, a in by_question.items() for t, c in a.items()]
    source = tmp_path / "graded.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = {}
    for policy in ("all", "matched", "one"):
        options = BuildOptions(convert=ConvertOptions(pairing=Pairing(policy)))
        dataset = open_dataset(str(source), cache_dir=cache, build_options=options)
        records = records_of(dataset)
        counts[policy] = len(records)
        assert all(by_question[r.prompt][r.chosen] and not by_question[r.prompt][r.rejected] for r in records)
    assert counts["one"] == len(by_question)
    assert counts["all"] >= EXPECTED[name][0] >= counts["matched"] >= counts["one"]
    if name == "gsm8k_model_vs_model_pairs":
        assert counts["all"] >= 1944 > counts["matched"] > counts["one"]


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "datasets"])
def test_every_file_type_holds_the_same_pairs(real_data, tmp_path, cache, kind):
    rows = rows_of(real_data, "llada_gsm8k_onpolicy_pairs")
    path = tmp_path / f"pairs.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        data = pytest.importorskip("datasets").Dataset.from_list(rows)
        data.to_parquet(path) if kind == "parquet" else data.save_to_disk(path)
    original = open_dataset(str(real_data / "llada_gsm8k_onpolicy_pairs.jsonl.gz"), cache_dir=cache)
    made = open_dataset(str(path), cache_dir=cache)
    assert made.fingerprint == original.fingerprint


PAIRS = [name for name, (_, _, kind, _) in EXPECTED.items() if kind is PreferenceRecord]
PARTS = [300, pytest.param(0, marks=pytest.mark.slow, id="all")]  # records of each file
QUESTIONS = [name for name in EXPECTED if name not in PAIRS]


def as_turns(text, role):
    return text if isinstance(text, tuple) else ({"role": role, "content": text},)


@pytest.mark.parametrize("count", PARTS)
@pytest.mark.parametrize("name", PAIRS)
def test_the_same_pairs_in_the_other_layouts_of_the_field(real_data, tmp_path, cache, name, count):
    """Every file of pairs as explicit, implicit and UltraFeedback-like conversations, as rows of text, as unpaired."""
    records = records_of(open_dataset(str(real_data / f"{name}.jsonl.gz"), cache_dir=cache, max_records=count))
    turns = [
        (as_turns(r.prompt, "user"), as_turns(r.chosen, "assistant"), as_turns(r.rejected, "assistant"))
        for r in records
    ]

    def read(layout, made):
        path = tmp_path / f"{layout}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
        return records_of(open_dataset(str(path), cache_dir=cache))

    def keys(found):
        return {json.dumps([r.prompt, r.chosen, r.rejected]) for r in found}

    original = {json.dumps(parts) for parts in turns}
    explicit = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in turns]
    implicit = [{"chosen": p + c, "rejected": p + r} for p, c, r in turns]
    feedback = [{"prompt": p[0]["content"], "chosen": p + c, "rejected": p + r, "score_chosen": 9} for p, c, r in turns]
    texts = [{"prompt": p[0]["content"], "chosen": c[0]["content"], "rejected": r[0]["content"]} for p, c, r in turns]
    assert keys(read("explicit", explicit)) == keys(read("implicit", implicit)) == original
    assert keys(read("feedback", feedback)) == original
    assert [(r.chosen, r.rejected) for r in read("texts", texts)] == [(t["chosen"], t["rejected"]) for t in texts]
    single = [
        {"prompt": p, "completion": answer, "label": label}
        for p, c, r in turns
        for answer, label in ((c, True), (r, False))
    ]
    unpaired = read("unpaired", single)
    assert all(isinstance(r, AnswerRecord) for r in unpaired)
    assert len(unpaired) == len({json.dumps(row) for row in single})


@pytest.mark.parametrize("count", PARTS)
@pytest.mark.parametrize("name", QUESTIONS)
def test_the_same_answers_in_the_other_layouts(real_data, tmp_path, cache, name, count):
    rows = rows_of(real_data, name)[: count or None]
    whole = open_dataset(str(real_data / f"{name}.jsonl.gz"), cache_dir=cache, max_records=count)
    expected = [(r.prompt, r.answer) for r in records_of(whole)]
    layouts = {
        "completion": [{"prompt": row["question"], "completion": row["answer"]} for row in rows],
        "messages": [
            {"messages": [*as_turns(row["question"], "user"), *as_turns(row["answer"], "assistant")]} for row in rows
        ],
        "labelled": [{"prompt": row["question"], "completion": row["answer"], "label": True} for row in rows],
    }
    for layout, made in layouts.items():
        path = tmp_path / f"{layout}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
        found = [(r.prompt, r.answer) for r in records_of(open_dataset(str(path), cache_dir=cache))]
        if layout == "messages":
            found = [(prompt[0]["content"], answer[0]["content"]) for prompt, answer in found]
        assert found == expected


def test_pairs_of_a_question_stay_together(real_data, tmp_path):
    names = ("model_vs_model", "groundtruth_vs_wrong")
    sources = [str(real_data / f"gsm8k_{name}_pairs.jsonl.gz") for name in names]
    build(sources, tmp_path / "out", BuildOptions(eval_fraction=0.1, shuffle_seed=0))
    prompts = []
    for side in ("train", "eval"):
        dataset = open_dataset(str(tmp_path / "out"), split=side)
        prompts.append({record.prompt for record in records_of(dataset)})
        assert set(dataset.manifest["sources"]) == {"gsm8k-model-solutions"}
    assert not prompts[0] & prompts[1]
    assert len(prompts[1]) == round(0.1 * (len(prompts[0]) + len(prompts[1])))


def test_boundaries_of_real_text(real_data, cache, chat_tokenizer):
    """Decoding the scored tokens gives back the answer, whatever the text."""
    dataset = open_dataset(str(real_data / "hh_rlhf_raw_sample.jsonl.gz"), cache_dir=cache)
    encoder = Encoder(chat_tokenizer, max_length=1 << 14)
    for record in records_of(dataset)[:200]:
        pair = encoder(record)
        assert not isinstance(pair, Drop)
        for side, answer in ((pair.chosen, record.chosen), (pair.rejected, record.rejected)):
            scored = side.ids[side.prompt_length :]
            assert chat_tokenizer.decode(scored) == answer[0]["content"] + "<eos>"


def test_an_epoch_of_real_pairs(real_data, cache, tokenizer):
    sources = [str(real_data / f"{name}.jsonl.gz") for name in list(EXPECTED)[:5]]
    dataset = open_dataset(sources, cache_dir=cache)
    encoder = Encoder(tokenizer, max_length=512)
    order = {"seed": 1, "global_batch_size": 64, "micro_batch_size": 16, "batching": "balanced"}
    seen, dropped = [], 0
    for rank in range(2):
        loader = PairLoader(dataset, encoder, rank=rank, world_size=2, **order)
        for batch in loader:
            seen += [name for name in batch.ids if name]
            assert int(batch.lengths_B2.max()) <= 512
        assert not loader.faults
        dropped += sum(loader.dropped.values())
    assert len(set(seen)) == len(seen) == len(dataset) - dropped
    assert dropped < 0.02 * len(dataset)
