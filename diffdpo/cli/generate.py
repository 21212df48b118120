"""Answers sampled from a masked diffusion model, unmasking the surest tokens first.

    python launch/generate.py --prompt "12 + 30 =" --stream
    python launch/generate.py --model_name_or_path GSAI-ML/LLaDA-8B-Instruct --prompts in.jsonl --output out.jsonl

--prompts is a text file with a prompt a line, or JSON lines with "prompt" (text or chat messages) and perhaps "id".
--output gets JSON lines {"id", "prompt", "answer", "tokens"}; without it the answers are printed.
"""

import json
import sys
from pathlib import Path
from typing import Any

from diffdpo.command import Parser
from diffdpo.errors import UserError

ORDERS = ("low_confidence", "maskgit_plus", "top_margin", "entropy", "random")
MASKED = "░"


def build_parser() -> Parser:
    """The flags. Names and defaults of the sampler's are the fields of diffdpo.sampling.decode.Decoding."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    parser.add_argument("--prompts", help="file of prompts: text with one a line, or .jsonl")
    parser.add_argument("--output", help="file for JSON lines; None: print the answers")
    parser.add_argument("--model_name_or_path", help="folder, hub name or adapter folder; None: the bundled model")
    parser.add_argument(
        "--template", default="auto", choices=("auto", "chat", "plain"), help="auto: chat if there is one"
    )
    parser.add_argument("--num_samples", type=int, default=1, help="answers a prompt")
    parser.add_argument("--gen_length", type=int, default=128, help="tokens of the answer region")
    parser.add_argument("--block_length", type=int, default=32, help="blocks are filled from left to right")
    parser.add_argument("--steps", type=int, help="over the whole answer; None: one token a step")
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
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights")
    parser.add_argument("--load_in_4bit", action="store_true", help="NF4 weights (bitsandbytes)")
    return parser


def main(argv: list[str]) -> None:
    """Sample --num_samples answers to every prompt."""
    args = build_parser().parse_args(argv)
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise UserError(f"--output {args.output}: its folder does not exist; create it first")
    if args.output and Path(args.output).is_dir():
        raise UserError(f"--output {args.output} is a folder; name a file")
    prompts = read_prompts(args)
    options = sampler_options(args)
    loaded = load(args)
    from diffdpo.sampling.prompt import encode_prompt

    encoded = [encode_prompt(prompt, loaded, args.template) for _, prompt in prompts for _ in range(args.num_samples)]
    from diffdpo.sampling.decode import sample

    show = Display(loaded, len(encoded)) if args.stream else None
    with Answers(args, prompts, loaded.tokenizer) as out:
        try:
            sample(
                loaded.model,
                loaded.spec,
                encoded,
                seed=args.seed,
                batch_size=args.batch_size,
                on_step=show,
                on_answer=out.add,
                **options,
            )
        finally:
            if show:
                show.close()


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
    return str(record.get("id", number)), prompt


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

    Decoding(**options)
    return options


def load(args):
    """The model, its tokenizer and its spec."""
    from diffdpo.evaluation.score_models import device_named
    from diffdpo.models.bundled import model_or_bundled
    from diffdpo.models.load import load_model

    name, device = model_or_bundled(args.model_name_or_path), device_named(args.device)
    return load_model(name, dtype=args.dtype, device=device, load_in_4bit=args.load_in_4bit)


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
    """Where answers go: a line of --output as soon as a batch is done, or printed at the end."""

    def __init__(self, args, prompts: list[tuple[str, Any]], tokenizer):
        self.tokenizer, self.path = tokenizer, args.output
        self.prompts = [named for named in prompts for _ in range(args.num_samples)]
        self.texts: list[str] = []

    def __enter__(self) -> "Answers":
        self.file = open(self.path, "w", encoding="utf-8") if self.path else None
        return self

    def add(self, index: int, tokens: list[int]) -> None:
        key, prompt = self.prompts[index]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        self.texts.append(text)
        if self.file:
            line = {"id": key, "prompt": prompt, "answer": text, "tokens": len(tokens)}
            self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self.file.flush()

    def __exit__(self, *failure) -> None:
        if self.file:
            self.file.close()
            print(f"{len(self.texts)} answers in {self.path}", file=sys.stderr)
            return
        for (key, _), text in zip(self.prompts, self.texts, strict=False):
            print(f"[{key}] {text}" if len(self.prompts) > 1 else text)
