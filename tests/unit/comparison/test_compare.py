"""Runs beside each other: what differs, which is better, and whether that may be chance."""

import csv
import json
import math

import numpy as np
import pytest

from diffdpo.cli.compare import main
from diffdpo.comparison.find import find_runs
from diffdpo.comparison.paired import sign_flip_p
from diffdpo.comparison.tables import (
    compare,
    differences_table,
    estimate_cell,
    gaps,
    results_table,
    runs_table,
    verdict,
)
from diffdpo.errors import UserError
from tests.support.recorded_run import recorded_run


def compared(*folders, **options):
    return compare(find_runs([str(folder) for folder in folders]), **options)


def noisy(mean: float, count: int = 40, seed: int = 0) -> list[float]:
    return (mean + np.random.default_rng(seed).normal(size=count)).tolist()


def test_what_differs_comes_first_and_where_it_lies_does_not_count(tmp_path):
    one = recorded_run(tmp_path / "one", margins=noisy(0.5), learning_rate=1e-4, beta=0.1, save_steps=5)
    two = recorded_run(tmp_path / "two", margins=noisy(0.5), learning_rate=3e-4, beta=0.1, save_steps=7)
    found = compared(one, two)
    assert found.settings == ("learning_rate",)
    table = runs_table(found)
    assert table.columns[:2] == ("run", "learning_rate")
    assert [row[:2] for row in table.rows] == [("one", "0.0001"), ("two", "0.0003")]
    assert table.rows[0][-4:] == ("10", "4.0", "1.50", "0:01:00")


def test_a_difference_on_the_same_items_is_tested_item_by_item(tmp_path):
    base = noisy(0.2)
    better = [margin + 0.5 + 0.05 * (-1) ** i for i, margin in enumerate(base)]
    found = compared(
        recorded_run(tmp_path / "a", margins=base, learning_rate=1e-4),
        recorded_run(tmp_path / "b", margins=better, learning_rate=3e-4),
    )
    (difference,) = found.differences["rewards/margins"]
    assert difference.change.mean == pytest.approx(0.5) and difference.change.count == 40
    assert difference.change.stderr < 0.01, "paired: the spread between items has gone"
    assert difference.p < 0.001
    assert found.metric == "rewards/accuracies" and verdict(found)[0].startswith("Best preference accuracy: b")


def test_none_is_best_where_several_are_equal(tmp_path):
    for name, rate in (("a", 1e-4), ("b", 3e-4)):
        recorded_run(tmp_path / name, margins=noisy(0.5), learning_rate=rate)
    (equal,) = verdict(compared(tmp_path))
    assert equal.startswith("Best preference accuracy: a, b alike, ")


def test_p_is_exact_for_few_items_and_that_of_mcnemar_for_yes_and_no():
    assert sign_flip_p(np.array([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])) == pytest.approx(2 / 32)
    assert sign_flip_p(np.array([1.0, -1.0])) == 1.0 and sign_flip_p(np.zeros(5)) == 1.0
    discordant = np.array([1.0] * 15 + [-1.0] * 5)  # exact two-sided binomial of 15 in 20
    exact = 2 * sum(math.comb(20, k) for k in range(15, 21)) / 2**20
    assert sign_flip_p(discordant) == pytest.approx(exact, rel=0.15)
    rng = np.random.default_rng(3)
    assert np.mean([sign_flip_p(rng.normal(size=30)) < 0.05 for _ in range(200)]) < 0.1


def test_numbers_that_mean_other_things_are_not_subtracted(tmp_path):
    found = compared(
        recorded_run(tmp_path / "a", margins=noisy(1), beta=0.1, values={"loss": noisy(1)}),
        recorded_run(tmp_path / "b", margins=noisy(2), beta=0.2, values={"loss": noisy(1)}),
        recorded_run(tmp_path / "other data", margins=noisy(1), learning_rate=1.0, data="others"),
    )
    assert [d.change is None for d in found.differences["rewards/margins"]] == [True, True]
    assert "--beta" in found.differences["loss"][0].why_not
    accuracy, other = found.differences["rewards/accuracies"]
    assert accuracy.change is not None and other.change is None and "data" in other.why_not


def test_items_that_both_have_are_enough(tmp_path):
    long, short = [0.5] * 8, [1.0] * 5
    found = compared(
        recorded_run(tmp_path / "a", margins=long, learning_rate=1),
        recorded_run(tmp_path / "b", margins=short, learning_rate=2, names=[f"record-{i}" for i in range(3, 8)]),
    )
    change = found.differences["rewards/margins"][0].change
    assert (change.count, change.mean) == (5, 0.5)


def test_seeds_are_averaged_and_give_the_error_bar(tmp_path):
    for seed, mean in enumerate((0.0, 1.0, 2.0)):
        recorded_run(tmp_path / f"low-s{seed}", margins=[mean] * 4, seed=seed)
        recorded_run(tmp_path / f"high-s{seed}", margins=[mean + 1] * 4, seed=seed, learning_rate=1.0)
    found = compared(tmp_path)
    assert [len(group.runs) for group in found.groups] == [3, 3]
    assert found.groups[0].name == "high (seeds 0, 1, 2)"
    after = found.groups[1].after["rewards/margins"]
    assert (after.mean, after.stderr, after.count) == (1.0, pytest.approx(1 / 3**0.5), 3)
    change = found.differences["rewards/margins"][0].change
    assert change.mean == pytest.approx(-1.0) and len(results_table(found).rows) == 2


def test_one_seed_alone_has_the_error_bar_of_its_items(tmp_path):
    found = compared(recorded_run(tmp_path / "a", margins=[0.0, 2.0]))
    assert estimate_cell("rewards/margins", found.groups[0].after["rewards/margins"]) == "1.000 ± 1.000"
    assert differences_table(found) is None


def test_runs_that_are_not_whole_do_not_stop_the_others(tmp_path):
    recorded_run(tmp_path / "whole", margins=noisy(1))
    torn = recorded_run(tmp_path / "torn", margins=noisy(1), finished=False, learning_rate=2)
    with (torn / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 11, "ti')
    for name in ("held_out.json", "environment.json"):
        (torn / name).write_text("{")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").touch()
    found = compared(tmp_path)
    states = {run.name: (run.status, run.steps) for run in found.runs}
    assert states == {"empty": ("broken off", 0), "torn": ("broken off", 10), "whole": ("finished", 10)}
    told = "\n".join(gaps(found))
    assert "1 of 12 lines" in told and "environment.json" in told and "empty: no line" in told
    assert verdict(found)[0].startswith("Best preference accuracy: whole")


def test_figures_that_are_not_finite_are_said_to_be(tmp_path):
    bad = recorded_run(tmp_path / "bad", margins=noisy(1), learning_rate=9.0)
    summary = json.loads((bad / "summary.json").read_text())
    for figures in summary["held_out"].values():
        figures["after"]["mean"] = None  # as summary.json writes NaN
    (bad / "summary.json").write_text(json.dumps(summary))
    found = compared(bad, recorded_run(tmp_path / "good", margins=noisy(1)))
    assert results_table(found).rows[0][1].startswith("not finite")
    assert verdict(found)[0].startswith("Best preference accuracy: good") and "bad" in verdict(found)[1]


def test_two_runs_of_one_name_are_told_apart(tmp_path):
    for place in ("x", "y"):
        recorded_run(tmp_path / place / "run", margins=noisy(1), learning_rate={"x": 1, "y": 2}[place])
    assert [run.name for run in compared(tmp_path).runs] == ["run (x/run)", "run (y/run)"]


def test_a_supervised_run_beside_a_preference_run(tmp_path):
    sft = recorded_run(tmp_path / "sft", values={"loss": noisy(1)}, answer_canvas=0)
    found = compared(sft, recorded_run(tmp_path / "dpo", margins=noisy(1), values={"loss": noisy(1)}))
    assert found.runs[0].command == "sft" and found.metric == "loss"
    assert "command" in found.differences["loss"][0].why_not


def test_the_command_writes_a_page_and_a_table(tmp_path, capsys):
    for name in ("a", "b"):
        recorded_run(tmp_path / "runs" / f"{name} </script>", margins=noisy(1), learning_rate=ord(name))
    page, table = tmp_path / "page.html", tmp_path / "table.csv"
    assert main([str(tmp_path / "runs"), "--html", str(page), "--csv", str(table)]) == 0
    text = page.read_text()
    assert "a &lt;/script&gt;" in text and "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    data = text.split('id="data">')[1].split("</script>")[0]
    panels = {panel["name"] for section in json.loads(data)["sections"] for panel in section["panels"]}
    assert {"loss", "eval/rewards/margins", "pairs_per_second"} <= panels
    rows = list(csv.DictReader(table.open()))
    assert [row["setting/learning_rate"] for row in rows] == ["97", "98"]
    assert float(rows[0]["rewards/margins"]) == pytest.approx(sum(noisy(1)) / 40)
    assert "Best preference accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "diffdpo compare"),
        (["missing"], "missing"),
        (["{tmp}/nothing"], "no run"),
        (["{tmp}/file"], "is a file"),
        (["{tmp}/run", "--baseline", "x"], "--baseline"),
        (["{tmp}/run", "--metric", "x"], "--metric"),
        (["{tmp}/run", "--html", "{tmp}/nowhere/page.html"], "--html .*folder does not exist"),
        (["{tmp}/run", "--csv", "{tmp}/file/table.csv"], "--csv .*folder does not exist"),
        (["{tmp}/run", "--csv", "{tmp}"], "--csv .*is a folder"),
        (["{tmp}/run", "--csv", "{tmp}/" + 300 * "a"], "--csv .*too long"),
        (["{tmp}/run", "--html", "/proc/page.html"], "--html .*cannot be written: No such file"),
        (["--sync", "missing"], "--sync"),
        (["--experiment_name", "x"], "MLflow store"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").touch()
    recorded_run(tmp_path / "run", margins=noisy(1))
    with pytest.raises(UserError, match=named) as caught:
        main([argument.format(tmp=tmp_path) for argument in arguments])
    assert "\n" not in str(caught.value)


def test_a_second_run_of_the_same_seed_is_no_second_seed(tmp_path):
    for name, seed in (("a", 0), ("a again", 0), ("b", 1)):
        recorded_run(tmp_path / name, margins=[1.0, -1.0, 2.0, 3.0], seed=seed)
    found = compare(find_runs([str(tmp_path)]))
    assert [[run.name for run in group.runs] for group in found.groups] == [["a", "b"], ["a again"]]
    assert found.groups[1].after["rewards/accuracies"].stderr > 0, "over its items, not over copies of itself"


def test_a_damaged_file_of_a_run_is_told_and_stops_nothing(tmp_path):
    damage = {
        "summary.json": "[]",
        "held_out.json": "{",
        "asked.yaml": "- a",
        "environment.json": "3",
        "mlflow.json": "",
    }
    damage |= {"config.yaml": "a: [", "metrics.jsonl": "{"}
    whole = recorded_run(tmp_path / "whole", margins=noisy(1))
    for name, text in damage.items():
        folder = recorded_run(tmp_path / name, margins=noisy(0.5), learning_rate=2)
        (folder / name).write_text(text)
    found = compared(whole, *(tmp_path / name for name in damage))
    for run in found.runs[1:]:
        assert run.status == "finished" and "rewards/margins" in run.after
        assert any(run.name in gap or "no line of" in gap for gap in run.gaps), run.name
    assert found.runs[0].gaps == ()


def test_a_finished_run_without_a_summary_has_its_newest_figures(tmp_path):
    folder = recorded_run(tmp_path / "a", margins=[1.0, 2.0])
    (folder / "summary.json").write_text('{"steps": 10, "sec')
    (run,) = find_runs([str(folder)])
    assert run.status == "finished" and run.after["rewards/margins"].mean == 1.5
    assert run.gaps == ("summary.json is damaged or cannot be read; held-out figures are the newest of metrics.jsonl",)
    (folder / "summary.json").unlink()
    (folder / "mlflow.json").write_text('{"status": "FINISHED"}')
    assert find_runs([str(folder)])[0].status == "finished"


def test_a_value_of_another_kind_than_a_number_is_told(tmp_path):
    folder = recorded_run(tmp_path / "a", margins=[1.0, 2.0], max_steps="many")
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"seconds": "long", "peak_memory_gib": [], "held_out": {"rewards/margins": {"after": 3}}}
    (folder / "summary.json").write_text(json.dumps(summary))
    found = compared(folder)
    assert len(runs_table(found).rows) == 1
    told = "\n".join(gaps(found))
    assert all(f"{name} of" in told for name in ("seconds", "peak_memory_gib", "max_steps"))


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, "x", [1.0]])
def test_an_item_whose_value_is_no_number_is_left_out_and_told(tmp_path, bad):
    one = recorded_run(tmp_path / "one", margins=[0.0] * 8, learning_rate=1)
    two = recorded_run(tmp_path / "two", margins=[1.0] * 8, learning_rate=2)
    items = json.loads((two / "held_out.json").read_text())
    items["after"]["rewards/margins"][3] = bad
    (two / "held_out.json").write_text(json.dumps(items))
    found = compared(one, two)
    change = found.differences["rewards/margins"][0].change
    assert (change.count, change.mean) == (7, 1.0)
    assert any("two: 1 of 8 values of rewards/margins in held_out.json" in gap for gap in gaps(found))


@pytest.mark.parametrize("content", [{"after": []}, {"after": {"rewards/margins": 7}}, {"records": [{}], "after": {}}])
def test_items_of_another_shape_are_told(tmp_path, content):
    one = recorded_run(tmp_path / "one", margins=[0.0] * 8, learning_rate=1)
    two = recorded_run(tmp_path / "two", margins=[1.0] * 8, learning_rate=2)
    items = json.loads((two / "held_out.json").read_text())
    (two / "held_out.json").write_text(json.dumps(items | content))
    found = compared(one, two)
    assert found.differences["rewards/margins"][0].change is None
    assert any(gap.startswith("two: ") and "held_out.json" in gap for gap in gaps(found))


def test_settings_that_could_not_be_read_are_said_to_be_unknown(tmp_path):
    recorded_run(tmp_path / "a", margins=noisy(1))
    (recorded_run(tmp_path / "b", margins=noisy(2)) / "config.yaml").write_text("{")
    found = compared(tmp_path)
    assert found.differences["rewards/margins"][0].why_not == "settings unknown of b"
    assert found.differences["rewards/accuracies"][0].change is not None, "it depends on no setting"


def test_a_verdict_over_fewer_items_than_the_runs_have_says_so(tmp_path):
    recorded_run(tmp_path / "first", margins=[1.0, -1.0] * 6, learning_rate=1)
    recorded_run(tmp_path / "second", margins=[1.0] * 7 + [-1.0], learning_rate=2)
    found = compared(tmp_path)
    assert "the difference over the 8 items both have is +37.5" in verdict(found)[1]
    table = results_table(found)
    assert [row[1].partition(" (n ")[2] for row in table.rows] == ["12)", "8)"] and "n: held-out items" in table.note
    assert ", n 8)" in differences_table(found).rows[0][1]


def test_as_many_items_everywhere_are_not_counted(tmp_path):
    for name, mean in (("first", 0.0), ("second", 0.7)):
        recorded_run(tmp_path / name, margins=noisy(mean), learning_rate=mean)
    found = compared(tmp_path)
    assert "item by item" in verdict(found)[1] and "n 40" not in str(results_table(found))
    assert "n 40" not in str(differences_table(found))


def test_a_baseline_that_nothing_can_be_set_against_is_told(tmp_path):
    first = recorded_run(tmp_path / "first", finished=False)
    others = [recorded_run(tmp_path / f"run {n}", margins=noisy(n, seed=n), learning_rate=n) for n in (1, 2)]
    note = differences_table(compared(first, *others)).note
    assert "first (broken off) has no held-out results" in note and "--baseline 'run 1' sets the others" in note
    assert "--baseline" not in differences_table(compared(first, others[0])).note, "no other would do better"
    assert "nothing is set" not in differences_table(compared(*others, first)).note


def test_a_file_that_cannot_be_written_is_met_before_all_work(tmp_path, monkeypatch):
    monkeypatch.setattr("diffdpo.comparison.find.find_runs", lambda *_, **__: pytest.fail("work was done"))
    monkeypatch.setattr("diffdpo.comparison.sync.sync", lambda *_: pytest.fail("work was done"))
    for flag in ("--csv", "--html"):
        with pytest.raises(UserError, match=f"^{flag} /proc/x cannot be written: .*; give another file$"):
            main([str(tmp_path), "--sync", str(tmp_path), flag, "/proc/x"])


def test_the_look_at_a_file_leaves_nothing_and_a_full_disk_is_told_with_its_flag(tmp_path, monkeypatch):
    run = recorded_run(tmp_path / "run", margins=noisy(1))
    (tmp_path / "old.csv").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffdpo.comparison.text.write_csv", full)
    with pytest.raises(UserError, match=r"^--csv .*old\.csv cannot be written: No space left on device"):
        main([str(run), "--csv", str(tmp_path / "old.csv"), "--html", str(tmp_path / "page.html")])
    assert (tmp_path / "old.csv").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.csv", "run"]
