"""The YAML of a sweep: its cells, their names, and mistakes in it."""

import shlex

import pytest

from diffdpo.cli.sweep import main
from diffdpo.errors import UserError
from diffdpo.sweep.grid import read_grid


def grid_of(tmp_path, text: str):
    path = tmp_path / "tries.yaml"
    path.write_text(text)
    return read_grid(path)


def test_every_combination_and_every_entry_of_the_list(tmp_path):
    grid = grid_of(
        tmp_path,
        "fixed: {max-steps: 5, use_peft: true}\n"
        "grid: {beta: [0.1, 0.2], seed: [0, 1]}\n"
        "list: [{loss_type: [sigmoid, ipo]}, {learning_rate: 1e-4}]\n",
    )
    assert (grid.name, grid.command, len(grid.cells)) == ("tries", "train", 8)
    assert len({cell.name for cell in grid.cells}) == 8
    assert grid.cells[0].words() == shlex.split(
        "--max_steps 5 --use_peft true --loss_type sigmoid ipo --beta 0.1 --seed 0"
    )
    assert grid.cells[-1].name == "learning_rate=1e-4 beta=0.2 seed=1"


def test_names_are_folders_of_one_level_and_tell_long_values_apart(tmp_path):
    values = [f"/data/{'x' * 120}/{name}.jsonl" for name in ("a", "b")]
    cells = grid_of(tmp_path, f"grid: {{train_data: {values}}}").cells
    assert len({cell.name for cell in cells}) == 2
    assert all("/" not in cell.name and len(cell.name) < 120 for cell in cells)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "holds no sweep"),
        ("- a", "holds no sweep"),
        ("grid: [", "not a YAML file"),
        ("beta: [1, 2]", "beta is no part"),
        ("fixed: {beta: 1}", "tries nothing"),
        ("grid: {beta: 0.1}", "give a list"),
        ("grid: {beta: []}", "give a list"),
        ("grid: [beta]", "flags by name"),
        ("grid: {beta: [0.1, 0.1]}", "twice"),
        ("list: {beta: 1}", "give entries|entries"),
        ("list: [beta]", "flags by name"),
        ("{grid: {beta: [1]}, list: [{beta: 2}]}", "in the list and in the grid"),
        ("{command: evaluate, grid: {beta: [1]}}", "command"),
        ("grid: {output_dir: [a, b]}", "output_dir"),
        ("{name: a/b, grid: {beta: [1]}}", "name is"),
        ("grid: {bta: [0.1]}", "--beta meant"),
        ("grid: {beta: [0.1, -1]}", "beta=-1: --beta"),
        ("grid: {beta: [0.1, high]}", "a number"),
        ("grid: {use_peft: [maybe]}", "true or false"),
        ("{optuna: {trials: 3, space: {beta: [1]}}, grid: {beta: [1]}}", "take grid and list out"),
        ("optuna: {trials: 3}", "space is empty"),
        ("optuna: {space: {beta: [1]}}", "trials is None"),
        ("optuna: {trials: 0, space: {beta: [1]}}", "trials is 0"),
        ("optuna: {trials: 3, sampler: x, space: {beta: [1]}}", "sampler is unknown"),
        ("optuna: {trials: 3, space: {beta: {low: 1}}}", "give a list of values, or"),
        ("optuna: {trials: 3, space: {beta: {low: 2, high: 1}}}", "give a list of values, or"),
        ("optuna: {trials: 3, space: {beta: {low: 0, high: 1, log: true}}}", "above 0"),
        ("optuna: {trials: 3, space: {bta: {low: 0.1, high: 1}}}", "--beta meant"),
        ("optuna: {trials: 3, space: {beta: {low: -1, high: 1}}}", "beta=-1: --beta"),
        ("{grid: {beta: [0.1]}, grid: {seed: [1]}}", "grid stands twice, in line 1"),
        ("grid:\n  beta: [0.1]\n  seed: [0]\n  beta: [0.2]", "beta stands twice, in lines 2 and 4"),
        ("{fixed: {max_steps: 1, max_steps: 2}, grid: {beta: [1]}}", "max_steps stands twice"),
        ("list: [{beta: 1, beta: 2}]", "beta stands twice"),
        ("optuna: {trials: 3, trials: 4, space: {beta: [1]}}", "trials stands twice"),
        ("optuna: {trials: 3, space: {beta: {low: 1, low: 2, high: 3}}}", "low stands twice"),
        (
            "{fixed: {max_steps: 1, max-steps: 2}, grid: {beta: [1]}}",
            "fixed: max_steps stands twice, as .* and max-steps",
        ),
        ("grid: {max-steps: [1], --max_steps: [2]}", "grid: max_steps stands twice"),
        ("list: [{max-steps: 1, max_steps: 2}]", "entry 1: max_steps stands twice"),
        ("optuna: {trials: 3, space: {max-steps: [1], max_steps: [2]}}", "space: max_steps stands twice"),
        ("{fixed: {beta: 1}, grid: {beta: [0.1, 0.2]}}", "beta stands in fixed"),
        ("{fixed: {max_steps: 1}, grid: {max-steps: [2, 3]}}", "max_steps stands in fixed"),
        ("{fixed: {beta: 1}, list: [{beta: 2}, {beta: 3}]}", "beta stands in fixed"),
        ("{fixed: {beta: 1}, optuna: {trials: 3, space: {beta: [2, 3]}}}", "beta stands in fixed"),
        ("grid: {learning_rate: [1e-4, 0.0001]}", "learning_rate: 1e-4 and 0.0001 are the same"),
        ("grid: {max_steps: [10, 1e1], beta: [0.1, 0.2]}", "max_steps: 10 and 1e1 are the same"),
        ("grid: {use_peft: [true, 'yes']}", "use_peft: true and yes are the same"),
        ("list: [{beta: 1, seed: 2}, {seed: 2, beta: 1.0}]", "beta: 1 and 1.0 are the same"),
        ("list: [{beta: 1, seed: 2}, {seed: 2, beta: 1}]", "are the same run"),
        (
            "optuna: {trials: 3, space: {seed: [1, 2, 3], learning_rate: [1e-4, 0.0001]}}",
            "learning_rate: 0.0001 and 1e-4",
        ),
        ("optuna: {trials: 3, space: {beta: [1, 2, 1]}}", "beta has 1 twice"),
        ("grid: {beta: [0.1, null]}", "grid: beta has no value"),
        ("grid: {loss_type: [[ipo, null]]}", "grid: loss_type has no value"),
        ("{fixed: {max_steps: }, grid: {beta: [1]}}", "fixed: max_steps has no value"),
        ("list: [{beta: null}]", "entry 1: beta has no value"),
        ("optuna: {trials: 3, space: {beta: [1, null]}}", "beta has no value"),
        ("optuna: {trials: 3, metric: , space: {beta: [1]}}", "metric has no value"),
        ("{name: , grid: {beta: [1]}}", "name has no value"),
        ("{list: {}, grid: {beta: [1]}}", "list is"),
        ("{fixed: {config: nowhere.yaml}, grid: {beta: [1]}}", "nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_line_before_any_run(tmp_path, monkeypatch, text, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tries.yaml").write_text(text)
    with pytest.raises(UserError, match=named) as caught:
        main(["tries.yaml"])
    assert "\n" not in " ".join(str(caught.value).split()) and not (tmp_path / "outputs").exists()


def test_flags_for_a_scheduler_s_array(tmp_path, capsys):
    (tmp_path / "g.yaml").write_text("grid: {beta: [0.1, 0.2]}")
    assert main([str(tmp_path / "g.yaml"), "--print_flags"]) == 0
    assert capsys.readouterr().out == "--beta 0.1\n--beta 0.2\n"


def test_what_only_looks_alike_is_kept(tmp_path, monkeypatch, capsys):
    """Texts that would be equal numbers, a value of fixed that some entries leave, and YAML's merged mappings."""
    monkeypatch.chdir(tmp_path)
    for text, count in (
        ("grid: {experiment_name: ['1', '1.0']}", 2),
        ("{fixed: {beta: 1}, list: [{loss_type: ipo}, {beta: 2}]}", 2),
        ("list: [&a {beta: 1, seed: 1}, &b {<<: *a, seed: 2}, {<<: *b, beta: 2}]", 3),
    ):
        (tmp_path / "g.yaml").write_text(text)
        assert main(["g.yaml", "--print_flags"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == count
