"""Answers sampled from a masked diffusion model, unmasking the surest tokens first.

    python launch/generate.py --prompt "12 + 30 =" --stream
    python launch/generate.py --model_name_or_path GSAI-ML/LLaDA-8B-Instruct --prompts in.jsonl --output out.jsonl

--prompts is a text file with a prompt a line, or JSON lines with "prompt" (text or chat messages) and perhaps "id".
--output gets JSON lines {"id", "prompt", "answer", "tokens"}; without it the answers are printed. The file is written
beside, as FILE.partial, and takes its name when it is whole. A prompt that cannot be answered is told of and left out.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffdpo.command import Parser
from diffdpo.errors import UserError
from diffdpo.models.checkpoint.adapter_folder import check_adapter

ORDERS = ("low_confidence", "maskgit_plus", "top_margin", "entropy", "random")
MASKED = "░"


def build_parser() -> Parser:
    """The flags. Names and defaults of the sampler's are the fields of diffdpo.sampling.decode.Decoding."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    parser.add_argument("--prompts", help="file of prompts: text with one a line, or .jsonl")
    parser.add_argument("--output", help="file for JSON lines; default: print the answers")
    parser.add_argument("--model_name_or_path", help="folder, hub name or adapter folder; default: the bundled model")
    parser.add_argument("--adapter_name_or_path", help="LoRA adapter on it; without a model: on the base it names")
    parser.add_argument(
        "--template", default="auto", choices=("auto", "chat", "plain"), help="auto: chat if there is one"
    )
    parser.add_argument("--num_samples", type=int, default=1, help="answers a prompt")
    parser.add_argument("--gen_length", type=int, default=128, help="tokens of the answer region")
    parser.add_argument(
        "--block_length", type=int, default=0, help="blocks are filled from left to right; 0: 32, or the model's"
    )
    parser.add_argument("--steps", type=int, help="over the whole answer; default: one token a step")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    parser.add_argument("--cfg_scale", type=float, default=0.0, help="classifier-free guidance; doubles the forwards")
    parser.add_argument("--remasking", default="low_confidence", choices=ORDERS, help="what is unmasked first")
    parser.add_argument(
        "--threshold", type=float, help="unmask every token at least this sure; --steps is then the most"
    )
    parser.add_argument("--block_cache", action="store_true", help="reuse keys outside the block; faster, approximate")
    parser.add_argument("--on_eos", default="allow", choices=("allow", "last", "forbid"), help="when answers may end")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling noise")
    parser.add_argument("--batch_size", type=int, default=8, help="answers made at a time: speed and memory")
    parser.add_argument("--stream", action="store_true", help=f"show the unmasking; {MASKED} is a mask")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights; auto: bfloat16 on a GPU that has it, else float32",
    )
    parser.add_argument("--block_size", type=int, help="of the model, where config.json does not say (a2d-*); 0: full")
    parser.add_argument("--load_in_4bit", action="store_true", help="NF4 weights (bitsandbytes)")
    return parser


def main(argv: list[str]) -> None:
    """Sample --num_samples answers to every prompt."""
    args = build_parser().parse_args(argv)
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    check_output(args)
    if args.adapter_name_or_path:
        check_adapter(args.adapter_name_or_path)
    prompts = read_prompts(args)
    options = sampler_options(args)
    if args.num_samples > 1 and not args.temperature and args.remasking != "random":
        print(f"--num_samples {args.num_samples}: at --temperature 0 they are all the same", file=sys.stderr)
    loaded = load(args)
    found = encoded(prompts, args, loaded)
    asked = [Asked(i, *named, ids) for number, named, ids in found for i in samples_of(number, args)]
    from diffdpo.sampling.decode import sample

    show = Display(loaded, len(asked)) if args.stream else None
    with Answers(args, asked, loaded.tokenizer) as out:
        try:
            sample(
                loaded.model,
                loaded.spec,
                [one.ids for one in asked],
                seed=[(args.seed, one.number) for one in asked],
                batch_size=args.batch_size,
                on_step=show,
                on_answer=out.add,
                **options,
            )
        finally:
            if show:
                show.close()


@dataclass(frozen=True)
class Asked:
    """An answer to be made. ``number``: among all asked for, which its noise follows from."""

    number: int
    key: str
    prompt: Any
    ids: list[int]


def check_output(args) -> None:
    """UserError for an --output that cannot be made, or that is what is read."""
    if not args.output:
        return
    output = Path(args.output)
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: its folder does not exist; create it first")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; name a file")
    if args.prompts and output.exists() and Path(args.prompts).exists() and output.samefile(args.prompts):
        raise UserError(f"--output {output} is the file of --prompts; name another")


def encoded(prompts: list[tuple[str, Any]], args, loaded) -> Iterator[tuple[int, tuple[str, Any], list[int]]]:
    """(number, (id, prompt), tokens) of the prompts that can be answered; the others are told of on stderr. UserError,
    with the first one's reason, where none can."""
    from diffdpo.sampling.decode import prompt_obstacle
    from diffdpo.sampling.prompt import encode_prompt

    found, left_out = [], list[str]()
    for number, (key, prompt) in enumerate(prompts):
        try:
            ids = encode_prompt(prompt, loaded, args.template)
            obstacle = prompt_obstacle(loaded.model, loaded.spec, ids, args.gen_length)
        except UserError as error:
            obstacle = str(error)
        if obstacle:
            left_out.append(f"prompt {key!r}: {obstacle}")
        else:
            found.append((number, (key, prompt), ids))
    if not found:
        raise UserError(f"{left_out[0]} (and so for all {len(left_out)} prompts)" if left_out[1:] else left_out[0])
    for line in left_out:
        print(f"left out {line}", file=sys.stderr)
    yield from found


def samples_of(number: int, args) -> range:
    """The numbers of a prompt's answers: the same ones whatever other prompts are left out."""
    return range(number * args.num_samples, (number + 1) * args.num_samples)


def read_prompts(args) -> list[tuple[str, Any]]:
    """(id, prompt) of --prompt and --prompts."""
    prompts: list[tuple[str, Any]] = [(str(i), prompt) for i, prompt in enumerate(args.prompt)]
    if args.prompts:
        path = Path(args.prompts)
        read = json_prompt if path.suffix == ".jsonl" else lambda path, number, line: (str(number), line)
        prompts += [read(path, number, line) for number, line in enumerate(lines_of(path), start=1) if line.strip()]
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT or --prompts FILE with at least one line")
    return prompts


def lines_of(path: Path) -> list[str]:
    """A file's lines, which end at line feeds alone: JSON may hold Unicode's other separators as they are."""
    if path.suffix in (".json", ".gz", ".csv", ".parquet"):
        raise UserError(f"--prompts {path} is neither .jsonl nor text with a prompt a line; make it one of them")
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise UserError(f"--prompts {path} cannot be read: {error.strerror}") from error


def json_prompt(path: Path, number: int, line: str) -> tuple[str, Any]:
    """(id, prompt) of a JSON line."""
    try:
        record = json.loads(line)
        prompt = record["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'--prompts {path} line {number}: not a JSON object with "prompt"') from error
    if not isinstance(prompt, str) and not is_turns(prompt):
        raise UserError(f"--prompts {path} line {number}: prompt must be text or a list of role and content, both text")
    key = record.get("id")
    return str(number if key is None else key), prompt


def is_turns(prompt: object) -> bool:
    """Whether these are chat messages, at least one."""
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(turn, dict) for turn in prompt)
        and all(isinstance(turn.get(key), str) for turn in prompt for key in ("role", "content"))
    )


def sampler_options(args) -> dict:
    """The fields of Decoding, checked before a model is loaded."""
    names = (
        "gen_length",
        "block_length",
        "temperature",
        "cfg_scale",
        "remasking",
        "threshold",
        "block_cache",
        "on_eos",
    )
    options = {name: getattr(args, name) for name in names}
    options["block_length"] = min(args.block_length, max(1, args.gen_length))
    options["steps"] = args.gen_length if args.steps is None else args.steps
    from diffdpo.sampling.decode import Decoding

    Decoding(**options | {"block_length": options["block_length"] or args.gen_length})  # before a model is loaded
    return options


def load(args):
    """The model, its tokenizer and its spec."""
    from diffdpo.evaluation.score_models import device_named, dtype_named
    from diffdpo.models.load import load_with_adapter

    device = device_named(args.device)
    options = {"dtype": dtype_named(args.dtype, device), "device": device, "load_in_4bit": args.load_in_4bit}
    options["block_size"] = args.block_size
    return load_with_adapter(args.model_name_or_path, args.adapter_name_or_path, **options)


class Display:
    """Redraws the answers as they fill in; text behind a terminator is not shown."""

    def __init__(self, loaded, count: int):
        from rich.live import Live

        self.tokenizer, self.spec = loaded.tokenizer, loaded.spec
        self.frames = [""] * count
        self.live = Live(refresh_per_second=20, transient=True)
        self.live.start()

    def __call__(self, index: int, tokens: list[int]) -> None:
        from rich.text import Text

        self.frames[index] = self.text(tokens)
        self.live.update(Text("\n".join(frame for frame in self.frames if frame)))

    def text(self, tokens: list[int]) -> str:
        stop = next((i for i, token in enumerate(tokens) if token in self.spec.terminators), len(tokens))
        pieces: list[str] = []
        run: list[int] = []
        for token in [*tokens[:stop], self.spec.mask_token_id]:
            if token == self.spec.mask_token_id:
                pieces += [self.tokenizer.decode(run), MASKED]
                run = []
            else:
                run.append(token)
        return "".join(pieces[:-1])

    def close(self) -> None:
        self.live.stop()


class Answers:
    """Where answers go: a line of --output as soon as a batch is done, or printed at the end.

    Lines are written to FILE.partial, so a file that is there is replaced by a finished one only.
    """

    def __init__(self, args, asked: list[Asked], tokenizer):
        self.tokenizer, self.asked = tokenizer, asked
        self.path = Path(args.output) if args.output else None
        self.texts: list[str] = []

    def __enter__(self) -> "Answers":
        self.file = None
        if self.path:
            # a device or a pipe is written to as it is
            beside = self.path.is_file() or not self.path.exists()
            self.partial = self.path.with_name(self.path.name + ".partial") if beside else self.path
            self.file = self.partial.open("w", encoding="utf-8")
        return self

    def add(self, index: int, tokens: list[int]) -> None:
        one = self.asked[index]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        self.texts.append(text)
        if self.file:
            line = {"id": one.key, "prompt": one.prompt, "answer": text, "tokens": len(tokens)}
            self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self.file.flush()

    def __exit__(self, *failure) -> None:
        if self.file and self.path:
            self.file.close()
            whole = failure == (None, None, None)
            if whole and self.partial != self.path:
                self.partial.replace(self.path)
            print(f"{len(self.texts)} answers in {self.path if whole else self.partial}", file=sys.stderr)
            return
        for one, text in zip(self.asked, self.texts, strict=False):
            print(f"[{one.key}] {text}" if len(self.asked) > 1 else text)
