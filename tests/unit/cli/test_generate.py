import json

import pytest

from diffdpo.cli import generate
from diffdpo.errors import UserError
from diffdpo.models.architecture.from_scratch import new_model, train_tokenizer
from diffdpo.models.load import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["12 + 3 = 15"] * 5, vocab_size=280)
    save_model(new_model(tokenizer, width=32, layers=1, heads=2, seed=0), tokenizer, folder)
    return str(folder)


def test_file_of_prompts_to_json_lines(folder, tmp_path):
    turns = [{"role": "user", "content": "4"}]
    lines = [{"id": "a", "prompt": "12 + 3"}, {"prompt": turns}]
    (tmp_path / "in.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    out = tmp_path / "out.jsonl"
    arguments = ["--prompts", str(tmp_path / "in.jsonl"), "--prompt", "1", "--gen_length", "8", "--num_samples", "2"]
    generate.main([*arguments, "--model_name_or_path", folder, "--output", str(out), "--temperature", "1"])
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in written] == ["0", "0", "a", "a", "3", "3"]
    assert written[4]["prompt"] == turns
    assert written[0]["answer"] != written[1]["answer"]
    assert all(0 <= line["tokens"] <= 8 for line in written)


def test_streaming_prints_the_same_answers(folder, capsys):
    arguments = ["--prompt", "12", "--gen_length", "8", "--model_name_or_path", folder]
    generate.main(arguments)
    plain = capsys.readouterr().out
    generate.main([*arguments, "--stream"])
    assert plain.strip() in capsys.readouterr().out


def test_display_stops_at_the_terminator(folder):
    display = generate.Display(generate.load(generate.build_parser().parse_args(["--model_name_or_path", folder])), 1)
    display.close()
    a, mask, end = display.tokenizer("5").input_ids[0], display.spec.mask_token_id, display.spec.terminator_id
    assert display.text([a, mask, mask, a, end, a, mask]) == "5░░5"
    assert display.text([mask, a]) == "░5"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no prompt"),
        (["--prompts", "/nowhere.jsonl"], "nowhere.jsonl"),
        (["--prompt", "x", "--num_samples", "0"], "num_samples is 0"),
        (["--prompt", "x", "--steps", "7"], "multiple of the 4 blocks"),
        (["--prompt", "x", "--output", "/no/such/folder/x"], "folder does not exist"),
        (["--prompt", "x", "--model_name_or_path", "/no/such/model"], "no such folder"),
        (["--prompt", "x", "--output", "/"], "is a folder"),
        (["--prompts", "/"], "cannot be read: Is a directory"),
        (["--prompt", "x", "--temperature", "nan"], "temperature is nan"),
    ],
)
def test_user_errors(arguments, words):
    with pytest.raises(UserError, match=words):
        generate.main(arguments)


def test_only_line_feeds_end_a_line(tmp_path):
    odd = "one\u2028two\u0085three\x0cfour"
    (tmp_path / "in.txt").write_bytes(f"{odd}\r\nfive\n".encode())
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": odd}, ensure_ascii=False) + "\n")
    for name, expected in (("in.txt", [odd, "five"]), ("in.jsonl", [odd])):
        args = generate.build_parser().parse_args(["--prompts", str(tmp_path / name)])
        assert [prompt for _, prompt in generate.read_prompts(args)] == expected


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "in.json").write_text('[{"prompt": "1"}]')
    with pytest.raises(UserError, match=r"in\.json is neither \.jsonl nor text"):
        generate.main(["--prompts", str(tmp_path / "in.json")])


BAD_LINES = ["{", '{"text": "x"}', '{"prompt": 3}', '{"prompt": []}', '["x"]', '{"prompt": [{}]}', '{"prompt": [1, 2]}']
BAD_LINES += ['{"prompt": [["role", "content"]]}', '{"prompt": [{"role": "user", "content": null}]}']


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "in.jsonl").write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(UserError, match="line 2"):
        generate.main(["--prompts", str(tmp_path / "in.jsonl")])


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "in.txt").write_bytes(b"fine\n\xff\xfe")
    with pytest.raises(UserError, match=r"in\.txt is not UTF-8 text .*at byte 5"):
        generate.main(["--prompts", str(tmp_path / "in.txt")])


def test_answers_before_a_failure_are_kept(folder, tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("\ufeff1\n2\n3\n", encoding="utf-8")  # with the mark some editors put first
    out = tmp_path / "out.jsonl"

    def one_answer(model, spec, prompts, *, on_answer, **options):
        on_answer(0, [5, 6])
        raise KeyboardInterrupt

    monkeypatch.setattr("diffdpo.sampling.decode.sample", one_answer)
    arguments = ["--prompts", str(tmp_path / "in.txt"), "--gen_length", "8", "--batch_size", "1"]
    out.write_text("an earlier run's answers\n")
    with pytest.raises(KeyboardInterrupt):
        generate.main([*arguments, "--model_name_or_path", folder, "--output", str(out)])
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl.partial").read_text().splitlines()]
    assert [(line["prompt"], line["tokens"]) for line in lines] == [("1", 2)]
    assert out.read_text() == "an earlier run's answers\n", "replaced only by a finished file"


def answers(folder, lines: list, tmp_path, *more: str) -> dict[str, str]:
    """Answers of sampled noise by id."""
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    out = tmp_path / "out.jsonl"
    flags = ["--prompts", str(tmp_path / "in.jsonl"), "--gen_length", "8", "--temperature", "1", "--output", str(out)]
    generate.main([*flags, "--model_name_or_path", folder, *more])
    assert not out.with_name("out.jsonl.partial").exists()
    return {line["id"]: line["answer"] for line in map(json.loads, out.read_text().splitlines())}


def test_a_prompt_that_is_too_long_is_told_of_for_itself(folder, tmp_path, capsys):
    good = [{"id": "a", "prompt": "12 + 3"}, {"id": "c", "prompt": "3"}]
    expected = answers(folder, [good[0], {"id": "b", "prompt": "7"}, good[1]], tmp_path)
    found = answers(folder, [good[0], {"id": "b", "prompt": "1 " * 2000}, good[1]], tmp_path)
    assert found == {key: expected[key] for key in "ac"}, "the noise of the others is what it was"
    assert "left out prompt 'b': it has " in capsys.readouterr().err
    before = (tmp_path / "out.jsonl").read_text()
    with pytest.raises(UserError, match="together more than the model's context of 1024"):
        answers(folder, [{"id": "b", "prompt": "1 " * 2000}], tmp_path)
    assert (tmp_path / "out.jsonl").read_text() == before


def test_the_file_of_prompts_is_not_written_over(folder, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "1"}')
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "in.jsonl")
    for output in ("in.jsonl", "link.jsonl"):
        with pytest.raises(UserError, match="is the file of --prompts"):
            generate.main(["--prompts", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / output)])
    assert (tmp_path / "in.jsonl").read_text() == '{"prompt": "1"}'


def test_an_id_of_null_is_none(folder, tmp_path):
    lines = [{"id": None, "prompt": "1"}, {"id": 0, "prompt": "2"}, {"prompt": "3"}]
    assert list(answers(folder, lines, tmp_path)) == ["1", "0", "3"]


@pytest.mark.parametrize(
    ("flags", "told"), [([], True), (["--temperature", "1"], False), (["--remasking", "random"], False)]
)
def test_samples_that_are_all_the_same_are_told_of(folder, capsys, flags, told):
    arguments = ["--prompt", "1", "--num_samples", "2", "--gen_length", "8", "--model_name_or_path", folder]
    generate.main([*arguments, *flags])
    assert ("they are all the same" in capsys.readouterr().err) == told
