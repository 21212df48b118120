"""A model folder to use or publish: a LoRA adapter merged into full weights, and weights in another dtype.

    python launch/export.py --adapter outputs/run/final --output merged
    python launch/export.py --model_name_or_path DIR --dtype bfloat16 --output half
    python launch/export.py --checkpoint outputs/run/checkpoints/step-500 --output step_500

The folder has the published layout (config, safetensors, tokenizer), so the published modeling code loads it too. It
appears whole or not at all. An adapter trained on 4-bit weights is merged into the original ones. Of a checkpoint it
does not matter which engine wrote it, on how many processes; an adapter in it is merged too.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffdpo.command import Parser
from diffdpo.errors import UserError
from diffdpo.models.checkpoint.adapter_folder import ADAPTER_CONFIG, base_of_adapter, check_base, is_adapter

DTYPES = ("auto", "float32", "bfloat16", "float16")


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", help="folder of a LoRA adapter, to be merged")
    parser.add_argument("--model_name_or_path", help="folder or hub name; default: the base that --adapter names")
    parser.add_argument("--checkpoint", help="folder under checkpoints/ of a run, by any engine")
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="of the written weights; auto: as they are read"
    )
    parser.add_argument("--block_size", type=int, help="of the model, where config.json does not say (a2d-*); 0: full")
    parser.add_argument("--max_shard_size", default="5GB", help="of a safetensors file")
    return parser


def main(argv: list[str]) -> None:
    """Load, merge if there is an adapter, write."""
    args = build_parser().parse_args(argv)
    check(args)
    from diffdpo.models.checkpoint.weights import stored_dtype
    from diffdpo.models.load import load_adapter, load_model
    from diffdpo.models.lora.adapters import merge

    if args.checkpoint:
        export_checkpoint(args)
        return
    base = args.model_name_or_path or base_of_adapter(args.adapter)
    if args.adapter and (unknown := check_base(args.adapter, base)):
        print(f"warning: {unknown}", file=sys.stderr)
    dtype = stored_dtype(base) if args.dtype == "auto" else args.dtype
    options = {"dtype": dtype, "block_size": args.block_size}
    loaded = load_adapter(args.adapter, base=base, **options) if args.adapter else load_model(base, **options)
    model = merge(loaded.model) if args.adapter else loaded.model
    write(args, model, loaded.tokenizer, base=base, dtype=dtype)


def export_checkpoint(args) -> None:
    """The model of a checkpoint, an adapter merged."""
    import torch

    from diffdpo.models.lora.adapters import merge
    from diffdpo.training.checkpoint_model import base_of_checkpoint, load_checkpoint

    loaded, base = load_checkpoint(args.checkpoint), base_of_checkpoint(args.checkpoint)
    model = merge(loaded.model) if hasattr(loaded.model, "peft_config") else loaded.model
    dtype = "float32" if args.dtype == "auto" else args.dtype
    write(args, model.to(getattr(torch, dtype)), loaded.tokenizer, base=base, dtype=dtype)


def write(args, model, tokenizer, *, base: str | None, dtype: str) -> None:
    """The folder, and a line about it."""
    from diffdpo.models.load import save_model
    from diffdpo.training.card import model_card

    with folder_in_one_piece(Path(args.output)) as folder:
        save_model(model, tokenizer, folder, max_shard_size=args.max_shard_size)
        (folder / "README.md").write_text(model_card(folder, base=base))
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size / 1e6:.2f}M parameters in {dtype} in {args.output}", file=sys.stderr)


def check(args) -> None:
    """UserError for what can be known wrong before a model is opened."""
    import re

    output = Path(args.output)
    if args.checkpoint and (args.adapter or args.model_name_or_path):
        raise UserError("--checkpoint says itself what it was trained on; leave --adapter and --model_name_or_path out")
    if not args.adapter and not args.model_name_or_path and not args.checkpoint:
        raise UserError("nothing to export: give --adapter FOLDER, --model_name_or_path NAME, both, or --checkpoint")
    if args.adapter and not is_adapter(args.adapter):
        raise UserError(f"--adapter {args.adapter} has no {ADAPTER_CONFIG}; full weights go to --model_name_or_path")
    if args.model_name_or_path and is_adapter(args.model_name_or_path):
        raise UserError(f"--model_name_or_path {args.model_name_or_path} is a LoRA adapter: give it as --adapter")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output {output} exists; name a new folder")
    if not next(folder for folder in output.absolute().parents if folder.exists()).is_dir():
        raise UserError(f"--output {output}: {output.parent} cannot be made, as a part of it is a file")
    if not re.fullmatch(r"[1-9]\d*([KMG]i?B)?", args.max_shard_size):
        raise UserError(f"--max_shard_size {args.max_shard_size}: give a size such as 5GB or 500MB")


@contextmanager
def folder_in_one_piece(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output`; it takes that name at the end, and is removed after an error."""
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=parent))
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)  # mkdtemp's is for the owner alone
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
