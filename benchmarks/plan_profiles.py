"""The single-card profiles as the planner sees them: the table of docs/4080.md.

    python benchmarks/plan_profiles.py     # prints it; writes docs/4080.md and docs/benchmarks/plan_profiles.json

Planned from config.json files (docs/shapes), not measured: no GPU is needed and none is used.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from diffdpo.cards import GPUS
from diffdpo.cli.flags import parse_config
from diffdpo.config import TrainConfig
from diffdpo.planner.hardware import Host
from diffdpo.planner.memory import DEVICE, DISK, HOST, needed
from diffdpo.planner.plan import Machine, Plan, make_plan
from diffdpo.planner.sizes import GIB, gib

ROOT = Path(__file__).parents[1]
DOC = ROOT / "docs/4080.md"
BEGIN, END = "<!-- table: python benchmarks/plan_profiles.py -->\n", "<!-- end of table -->\n"
MACHINE = Machine(GPUS["RTX 4080"], Host(64 * GIB))


@dataclass(frozen=True)
class Profile:
    """A row: a model's shape, a recipe and a DeepSpeed JSON; ``most`` GiB of GPU memory is the target."""

    title: str
    shape: str
    recipe: str
    ds_config: str
    most: float | None

    def argv(self) -> list[str]:
        """As typed behind launch/plan.py."""
        shape, recipe, ds = f"docs/shapes/{self.shape}", f"recipes/{self.recipe}", f"ds_configs/{self.ds_config}"
        return ["--model_name_or_path", shape, "--config", recipe, "--ds_config", ds]


PROFILES = (
    Profile("LLaDA-8B, QLoRA", "llada8b.json", "llada8b_qlora.yaml", "4080_qlora.json", 14.5),
    Profile("3B, all parameters", "qwen3b.json", "full3b.yaml", "4080_offload.json", 15.0),
    Profile("Dream-7B, QLoRA", "dream7b.json", "llada8b_qlora.yaml", "4080_qlora.json", 14.5),
    Profile("SDAR-8B, QLoRA", "sdar8b.json", "sdar8b_qlora.yaml", "4080_qlora.json", 14.5),
    Profile("LLaDA2.0-mini, QLoRA", "llada2mini.json", "llada2mini_qlora.yaml", "4080_qlora.json", 14.5),
    Profile("LLaDA-8B, all parameters", "llada8b.json", "llada8b_full.yaml", "zero3_nvme.json", None),
)


def plan(profile: Profile) -> Plan:
    """Paths are relative to the project's root."""
    config: TrainConfig = parse_config(TrainConfig, profile.argv(), "")
    return make_plan(config, MACHINE)


def row(profile: Profile, planned: Plan) -> str:
    """One line of the table."""
    time = planned.time(GPUS["RTX 4080"])
    worst = needed(planned.parts, DEVICE)[1]
    gpu, host, disk = (gib(planned.need(place)) for place in (DEVICE, HOST, DISK))
    target = f"{profile.most:.1f}" if profile.most else "16"
    fits = "fits" if not planned.short() else "does not fit"
    return (
        f"| {profile.title} | {gpu:.1f} ({worst}) | {target} | {host:.1f} | {disk:.0f} | {time.seconds:.0f} "
        f"| {time.pairs} | {fits} |\n"
    )


def table(plans: list[Plan]) -> str:
    """Markdown."""
    head = (
        "| profile | GPU GiB (worst moment) | target | host GiB | NVMe GiB | s a step | pairs a step | on 16 + 64 GiB |"
    )
    return head + "\n|---|---|---|---|---|---|---|---|\n" + "".join(map(row, PROFILES, plans))


def main() -> None:
    plans = [plan(profile) for profile in PROFILES]
    text = table(plans)
    print(text)
    before, _, rest = DOC.read_text().partition(BEGIN)
    DOC.write_text(before + BEGIN + text + END + rest.partition(END)[2])
    records = [
        {"profile": p.title, "argv": p.argv(), "parts": [vars(part) for part in planned.parts]}
        for p, planned in zip(PROFILES, plans, strict=True)
    ]
    (ROOT / "docs/benchmarks/plan_profiles.json").write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
