"""Preference pairs of a model's own answers: sampled, judged by a verifier, set against one another, written as shards.

    python launch/make_pairs.py --prompts problems.jsonl --verifier gsm8k --output_dir pairs
    torchrun --nproc_per_node 8 launch/make_pairs.py --prompts in.jsonl --verifier my_judge:right --output_dir pairs

--prompts is a text file (.txt) with a prompt a line, JSON lines with "prompt" and perhaps "answer" (the right result),
or any training data: the right answer is then the chosen one. Killed and run again it goes on; with other --verifier or
--pairing it pairs the answers that are there anew.
"""

from diffdpo.cli.flags import parse_config
from diffdpo.config import PairsConfig
from diffdpo.errors import UserError


def main(argv: list[str]) -> None:
    """Make the pairs."""
    config = parse_config(PairsConfig, argv, __doc__ or "")
    if not config.output_dir:
        raise UserError("--output_dir is missing: name the folder that the pairs go to")
    from diffdpo.engine.world import shutdown_distributed
    from diffdpo.onpolicy.make import make_pairs

    make_pairs(config, say=lambda text: print(text, flush=True))
    shutdown_distributed()
