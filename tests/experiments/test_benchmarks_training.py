"""Benchmarks of training arms: tiny runs of each, and their reports on lines made by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel

from nas.data import Data
from nas.strategies import Pass, Step
from nas.supernet import Supernet
from nas.train_settings import TrainSettings
from tests.nas.training import SPACES, corners

SPACE = SPACES["coupled"]
QUICK = TrainSettings(batch_size=24, arithmetic="fp32", learning_rate=0.05)
Load = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def data() -> Data:
    return corners()


# arms ----------------------------------------------------------------------------------------------------


def test_two_arms_are_compared_as_by_a_paired_t_test(load_benchmark: Load, rng: np.random.Generator) -> None:
    base, other = rng.normal(0.7, 0.02, 5), rng.normal(0.72, 0.02, 5)
    values = {"base": dict(enumerate(base)), "other": dict(enumerate(other))}
    row = load_benchmark("arms").compared(values, "base")["arms"]["other"]
    interval = ttest_rel(other, base).confidence_interval(0.95)
    assert row["difference"] == pytest.approx(np.mean(other - base), abs=1e-5)
    assert row["interval"] == pytest.approx((interval.high - interval.low) / 2, abs=1e-5)


def test_noise_is_what_arm_and_seed_leave_over(load_benchmark: Load) -> None:
    values = {
        "base": {0: 0.50, 1: 0.60, 2: 0.70},
        "same": {0: 0.52, 1: 0.60, 2: 0.68},  # residuals against the base: half of +-0.02
        "far": {0: 0.91, 1: 1.00, 2: 1.09},
        "low": {0: 0.21, 1: 0.30, 2: 0.39},
        "half": {0: 0.9},
    }
    found = load_benchmark("arms").compared(values, "base")
    rows = found["arms"]
    assert {arm: row.get("verdict") for arm, row in rows.items()} == {
        "base": None, "same": "no difference beyond noise", "far": "better", "low": "worse",
    }  # fmt: skip
    assert found["unfinished"] == ["half"]
    # the seeds' means stand 0.09 apart; what is left of each arm is (-, 0, +) of 0.01, 0.01, 0, 0
    assert found["noise"] == pytest.approx((2 * (0.01**2 + 0.01**2) / 6) ** 0.5, abs=1e-5)
    assert rows["far"]["difference"] == pytest.approx(0.4) and rows["far"]["differences"] == [0.41, 0.4, 0.39]
    assert rows["base"]["std_between_seeds"] == pytest.approx(0.1)


def test_one_seed_or_no_base_says_nothing(load_benchmark: Load) -> None:
    compared = load_benchmark("arms").compared
    row = compared({"base": {0: 0.5}, "other": {0: 0.9}}, "base")["arms"]["other"]
    assert row["verdict"] == "one seed: unknown" and row["interval"] is None and row["difference"] == 0.4
    assert compared({"other": {0: 0.9}}, "base")["arms"] == {}
    assert compared({}, "base")["arms"] == {}


def test_pieces_of_work_are_done_once(load_benchmark: Load, tmp_path: Path) -> None:
    arms, log = load_benchmark("arms"), tmp_path / "x_runs.jsonl"
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\nitem = json.loads(sys.argv[-1])\n"
        f"open({str(tmp_path / 'calls')!r}, 'a').write(f\"{{item['seed']}}\")\n"
        "print('noise'); print(json.dumps({'item': item, 'twice': 2 * item['seed']}))\n"
    )
    command = [sys.executable, str(script)]
    arms.do([{"seed": 3}], log, command, 1)
    items = [{"seed": 4}, {"seed": 3}]
    assert [line["twice"] for line in arms.finished(items, log)] == [6]
    arms.do(items, log, command, 1)
    assert (tmp_path / "calls").read_text() == "34"
    assert [line["twice"] for line in arms.finished(items, log)] == [8, 6]
    assert arms.finished([{"seed": 5}], log) == []


# craft ---------------------------------------------------------------------------------------------------


def test_craft_trains_and_evaluates_an_arm(load_benchmark: Load, data: Data, tmp_path: Path) -> None:
    craft = load_benchmark("craft")
    networks = [SPACE.smallest, SPACE.largest]
    items = craft.planned(["base", "class_weights", "sandwich_kl"], [0], 2, 1, 0.05)
    assert [(item["arm"], item["seed"]) for item in items][2:] == [("sandwich_kl", 0), ("sandwich_kl", 1)]
    lines = [
        {
            "item": item,
            **craft.work(item, data, tmp_path / f"{item['arm']}{item['seed']}", space=SPACE, networks=networks),
        }
        for item in items
    ]
    for line in lines:
        assert line["networks"] == [line["smallest"], line["largest"]]
        assert all(0 <= value <= 1 for value in line["smallest"].values())
    assert lines[0]["macs"] == lines[1]["macs"]  # the same seed draws the same architectures
    found = craft.report(lines)
    assert set(found["sorted"]["arms"]) == {"base", "class_weights"}
    assert found["sandwich"]["arms"] == {}  # its base is missing
    json.dumps(found, allow_nan=False)


def test_every_arm_changes_what_it_is_called(load_benchmark: Load) -> None:
    craft = load_benchmark("craft")
    classes = ("a", "b", "c", "d")
    items = {item["arm"]: item for item in craft.planned(list(craft.ARMS), [1], 3000, 800, 0.2)}
    settings = {arm: craft.settings_of(item, classes) for arm, item in items.items()}
    base = settings["base"]
    assert base == replace(craft.RECIPE, steps=3000, learning_rate=0.2)
    assert settings["class_weights"] == replace(base, class_weights={"d": 4.0})
    assert settings["adamw_0.003"] == replace(base, optimizer="adamw", learning_rate=0.003, weight_decay=0.05)
    assert settings["bias_loss_twice_the_rate"] == replace(base, bias_loss=True, learning_rate=0.4)
    assert settings["fifth_of_steps_coreset"].steps == 600 and settings["fifth_coreset"].steps == 3000
    assert settings["sandwich_kl"] == replace(base, strategy="sandwich", distillation="kl", steps=800)
    for arm, found in settings.items():
        changes = found != base or craft.ARMS[arm].data
        assert bool(changes) == (arm != "base"), arm


def test_craft_counts_hits_of_the_weighted_class(load_benchmark: Load) -> None:
    labels, guessed = np.array([3, 3, 3, 0, 1, 2]), np.array([3, 3, 0, 3, 1, 3])
    found = load_benchmark("craft").figures_of(guessed, labels)
    assert found == {"accuracy": 0.5, "recall": 2 / 3, "precision": 0.5}
    assert load_benchmark("craft").figures_of(np.zeros(2), np.zeros(2)) == {
        "accuracy": 1.0,
        "recall": 0.0,
        "precision": 0.0,
    }


def craft_line(arm: str, seed: int, accuracies: list[float], recall: float = 0.5) -> dict[str, Any]:
    def of(accuracy: float) -> dict[str, float]:
        return {"accuracy": accuracy, "recall": recall, "precision": 0.5}

    return {
        "item": {"arm": arm, "seed": seed, "steps": 10},
        "macs": 2e12,
        "rollbacks": 0.0,
        "networks": [of(accuracy) for accuracy in accuracies],
        "smallest": of(accuracies[0]),
        "largest": of(accuracies[-1]),
    }


def test_craft_says_what_helped_and_what_hurt(load_benchmark: Load) -> None:
    lines = [
        craft_line("base", 0, [0.50, 0.60, 0.70]),
        craft_line("base", 1, [0.52, 0.72, 0.62]),
        craft_line("average_0.99", 0, [0.65, 0.75, 0.852]),
        craft_line("average_0.99", 1, [0.67, 0.77, 0.868]),
        craft_line("class_weights", 0, [0.501, 0.601, 0.701], recall=0.9),
        craft_line("class_weights", 1, [0.519, 0.62, 0.72], recall=0.9),
        craft_line("fifth_random", 0, [0.40, 0.35, 0.30]),
        craft_line("fifth_random", 1, [0.41, 0.36, 0.313]),
        craft_line("mixup_0.2", 0, [0.9, 0.9, 0.9]),
    ]
    found = load_benchmark("craft").report(lines)["sorted"]
    arms = found["arms"]
    assert {arm: row["verdict"] for arm, row in arms.items()} == {
        "base": "the base", "average_0.99": "helped", "class_weights": "no difference beyond noise",
        "fifth_random": "hurt",
    }  # fmt: skip
    assert "mixup_0.2" in found["unfinished"]
    assert arms["class_weights"]["figures"]["recall"]["verdict"] == "better"
    assert arms["class_weights"]["figures"]["smallest_accuracy"]["mean"] == 0.51
    assert arms["average_0.99"]["tmacs"] == 2.0
    # ranks: 123 of the base's seed 0, 132 of its seed 1; Spearman of these two is 1 - 6 * 2 / 24
    assert arms["base"]["rank_correlation"] == {"same_seed": None, "other_seeds": 0.5}
    assert arms["average_0.99"]["rank_correlation"] == {"same_seed": 0.75, "other_seeds": 0.75}
    assert arms["fifth_random"]["rank_correlation"] == {"same_seed": -0.75, "other_seeds": -0.75}


# batch norms ---------------------------------------------------------------------------------------------


def test_own_norms_begin_as_the_shared_ones_and_part(load_benchmark: Load) -> None:
    script = load_benchmark("batch_norm_arms")
    few = script.fixed_set(SPACE)
    own, shared = script.OwnNorms(SPACE, few, seed=3).train(), Supernet(SPACE, seed=3).train()
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for architecture in few:
        assert torch.equal(own(x, architecture), shared(x, architecture))
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    own.zero_grad()
    own(x, few[0]).square().sum().backward()
    with_gradient = {name for name, p in own.named_parameters() if p.grad is not None and ".norm_" in name}
    assert with_gradient and all(name.startswith(f"norms.{few[0].id}.") for name in with_gradient)
    moved = {name for name, tensor in own.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(name.startswith(f"norms.{few[0].id}.") for name in moved)  # running statistics
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if name.endswith("norm_shift"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    assert torch.allclose(own.eval().extract(few[1])(x), own(x, few[1]), atol=1e-5)
    assert not torch.allclose(own(x, few[1]), shared.eval()(x, few[1]), atol=1e-2)


def test_own_norms_are_counted_and_others_refused(load_benchmark: Load) -> None:
    script = load_benchmark("batch_norm_arms")
    few = (SPACE.smallest, SPACE.largest)
    own, shared = script.OwnNorms(SPACE, few), Supernet(SPACE)
    assert script.trained_numbers(shared)["all"] == sum(parameter.numel() for parameter in shared.parameters())
    scales = {a: sum(layer.out_shape[0] for layer in SPACE.lower(a).layers if layer.norm) for a in few}
    added = script.trained_numbers(own)["all"] - script.trained_numbers(shared)["all"]
    assert added == 2 * sum(scales.values()) - 2 * scales[SPACE.largest]  # the largest uses all of the shared norms
    other = next(a for a in SPACE.all() if a not in few)
    for use in (own.extract, lambda architecture: own(torch.zeros(1, 1, 8, 8), architecture)):
        with pytest.raises(ValueError, match="has no norms here"):
            use(other)


def test_batch_norm_arms_train_and_report(load_benchmark: Load, data: Data, tmp_path: Path) -> None:
    script = load_benchmark("batch_norm_arms")
    items = script.planned([0], 3, 0.05)
    lines = [{"item": item, **script.work(item, data, tmp_path / item["kind"], space=SPACE)} for item in items]
    assert len(lines[0]["as_trained"]) == len(script.fixed_set(SPACE)) == min(8, SPACE.size)
    assert lines[1]["trained_numbers"]["all"] > lines[0]["trained_numbers"]["all"]
    found = script.report(lines)
    assert len(found["in_words"]) == 4
    json.dumps(found, allow_nan=False)


def test_batch_norm_arms_in_words(load_benchmark: Load) -> None:
    script = load_benchmark("batch_norm_arms")
    lines = [
        {
            "item": {"kind": kind, "seed": seed}, "rollbacks": 0.0,
            "trained_numbers": {"all": {"shared": 1000, "own": 1500}[kind], "norms": 1},
            "as_trained": [as_trained + seed / 1000, 0.1], "recalibrated": [recalibrated, 0.1],
        }
        for kind, as_trained, recalibrated in (("shared", 0.3, 0.7), ("own", 0.705, 0.7))
        for seed in (0, 1)
    ]  # fmt: skip
    found = script.report(lines)
    shared, own = found["figures"]["largest"]["shared"]["arms"], found["figures"]["largest"]["own"]["arms"]
    assert shared["shared"]["difference"] == pytest.approx(-0.3995) and shared["shared"]["verdict"] == "worse"
    assert own["own"]["difference"] == pytest.approx(0.0055) and "shared" not in own
    assert found["figures"]["worst"]["own"]["arms"]["own"]["mean"] == 0.1
    assert found["by_network"]["own"] == [0.7055, 0.1]
    assert found["in_words"][0].startswith("Shared norms with the statistics of training are -19.98 points")
    assert found["in_words"][-1] == "Norms of their own add 500 trained numbers, 50.0%, for 8 architectures."


# arithmetic ----------------------------------------------------------------------------------------------


def test_arithmetics_are_timed_and_trained(
    load_benchmark: Load, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load_benchmark("arithmetic")
    assert script.TIMED_ARMS[script.COMPILED]["compile"]
    quick = {**script.TIMED_ARMS, script.COMPILED: {"arithmetic": script.BASE}}  # compiling takes a minute
    monkeypatch.setattr(script, "TIMED_ARMS", quick)
    speeds, trainings = script.planned([0], 2, 1)[:2], script.planned([0], 2, 1)[2:]
    assert [item["arm"] for item in trainings] == ["fp32", "fp32_channels_last", "bf16_channels_last"]
    items = [*speeds, trainings[1]]
    setting = (SPACE, replace(QUICK, batch_size=8))
    lines = [
        {"item": item, **script.work(item, data, tmp_path, timed=setting, trained=setting, networks=[SPACE.smallest])}
        for item in items
    ]
    assert lines[0]["macs"] > lines[1]["macs"]
    for line in lines[:2]:
        assert {len(found) for found in line["seconds"].values()} == {2} and line["batch"] == 8
        assert all(second > 0 for found in line["seconds"].values() for second in found)
    assert lines[2]["mean_accuracy"] == lines[2]["smallest_accuracy"]
    json.dumps(script.report(lines, script.this_machine()), allow_nan=False)


def test_arithmetic_report_takes_ratios_turn_by_turn(load_benchmark: Load) -> None:
    script = load_benchmark("arithmetic")
    seconds = {"fp32": [4.0, 8.0, 2.0], "fp32_channels_last": [2.0, 2.0, 2.0], "bf16_channels_last": [1.0, 4.0, 1.0]}
    seconds[script.COMPILED] = [0.5, 0.5, 0.5]
    line = {"device": "cpu", "architecture": "a", "macs": 7, "batch": 64, "compile_s": 61.0, "seconds": seconds}
    lines = [{"item": {"kind": "speed", "network": "largest"}, **line}]
    machine = replace(script.this_machine(), flags=frozenset({"avx2", "amx_bf16"}))
    found = script.report(lines, machine)
    row = found["speed"]["largest"]
    rates = {"fp32": 16.0, "fp32_channels_last": 32.0, "bf16_channels_last": 64.0, script.COMPILED: 128.0}
    assert row["images_per_s"] == rates
    assert row["times_as_fast"]["bf16_channels_last / fp32"] == {"median": 2.0, "quartiles": [2.0, 3.0]}
    assert row["times_as_fast"]["fp32_channels_last / fp32"]["median"] == 2.0
    assert "Compiled in 61 s, it trains 4.00 times as fast as not compiled." in found["in_words"]
    assert found["in_words"][0] == "The processor has bf16 instructions (amx_bf16)."
    without = script.report(lines, replace(machine, flags=frozenset({"avx2"})))
    assert without["bf16_instructions"] == [] and "no bf16 instructions" in without["in_words"][0]


# a planted NaN -------------------------------------------------------------------------------------------


class Fixed:
    """Always the same step."""

    def step(self, number: int) -> Step:
        return Step((Pass((SPACE.smallest,)), Pass((SPACE.largest,))), 0.5)


def test_a_nan_is_planted_once(load_benchmark: Load) -> None:
    planted, fixed = load_benchmark("planted_nan").Planted(Fixed(), 3), Fixed()
    for number in (0, 2, 4):
        assert planted.step(number) == fixed.step(number)
    assert all(np.isnan(one.weight) for one in planted.step(3).passes)
    assert planted.step(3) == fixed.step(3)  # after the rollback, and when asked what is watched


def test_planted_steps_are_in_the_middle(load_benchmark: Load) -> None:
    script = load_benchmark("planted_nan")
    found = [script.planted_at(seed, 100) for seed in range(200)]
    assert min(found) >= 10 and max(found) < 90 and len(set(found)) > 50
    assert script.planted_at(7, 100) == script.planted_at(7, 100)


def test_a_planted_run_recovers_and_a_clean_one_does_not_notice(
    load_benchmark: Load, data: Data, tmp_path: Path
) -> None:
    script = load_benchmark("planted_nan")
    settings = replace(QUICK, batch_size=48, evaluate_every=1)
    lines = [
        {"item": item, **script.work(item, data, tmp_path / item["arm"], space=SPACE, settings=settings)}
        for item in script.planned("corners", [1], 9)
    ]
    clean, planted = lines
    an_epoch = len(data["train"]) // 48
    assert (clean["rollbacks"], clean["planted_at"], clean["steps_repeated"]) == (0, None, 0)
    assert planted["rollbacks"] == 1 and 1 <= planted["planted_at"] < 9
    assert planted["steps_repeated"] == planted["planted_at"] % an_epoch  # the last good state ends an epoch
    assert planted["reasons"] == [f"the loss became nan at step {planted['planted_at']}"]
    again = script.work(lines[1]["item"], data, tmp_path / "planted", space=SPACE, settings=settings)
    assert again["rollbacks"] == 1 and again["accuracies"] == planted["accuracies"]


def planted_line(arm: str, seed: int, largest: float, repeated: int = 0) -> dict[str, Any]:
    return {
        "item": {"arm": arm, "seed": seed, "steps": 9, "data": "digits"},
        "accuracies": {"smallest": 0.5, "middle": 0.6 + seed / 10, "largest": largest},
        "rollbacks": int(arm == "planted"),
        "planted_at": 5 if arm == "planted" else None,
        "steps_repeated": repeated,
        "test_images": 719,
    }


def test_planted_report(load_benchmark: Load) -> None:
    lines = [planted_line("clean", seed, 0.8 + seed / 100) for seed in range(3)]
    lines += [planted_line("planted", seed, 0.7 + seed / 101, repeated=4 + seed) for seed in range(3)]
    found = load_benchmark("planted_nan").report(lines)
    assert found["accuracy"]["largest"]["arms"]["planted"]["verdict"] == "worse"
    assert found["accuracy"]["middle"]["arms"]["planted"]["verdict"] == "no difference beyond noise"
    assert found["accuracy"]["middle"]["arms"]["clean"]["std_between_seeds"] == pytest.approx(0.1)
    assert found["rollbacks"] == {"clean": [0, 0, 0], "planted": [1, 1, 1]}
    assert "beyond the standard deviation of 1.00" in found["in_words"][2]
    assert found["in_words"][-1] == "3 of 3 planted runs recovered with one rollback, repeating 4 to 6 steps."


def test_the_command_does_one_piece_or_reports(
    load_benchmark: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_benchmark("planted_nan")
    monkeypatch.setattr(script, "DIGITS_RECIPE", replace(script.DIGITS_RECIPE, batch_size=256))
    out = tmp_path / "planted.json"
    command = ["planted_nan.py", "--steps", "5", "--seeds", "0", "--runs", str(tmp_path / "runs"), "--out", str(out)]
    lines = []
    for item in script.planned("digits", [0], 5):
        monkeypatch.setattr(sys, "argv", [*command, "--item", json.dumps(item)])
        script.main()
        lines.append(capsys.readouterr().out.strip().splitlines()[-1])
    (tmp_path / "planted_runs.jsonl").write_text("".join(f"{line}\n" for line in lines))
    monkeypatch.setattr(sys, "argv", [*command, "--report"])
    script.main()
    found = json.loads(out.read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert found["pieces"] == {"done": 2, "planned": 2} and found["seeds"] == [0] and found["test_images"] == 719
    assert str(tmp_path) not in out.read_text()


# equal FLOPs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sorted", "delayed", "attentive"])
def test_budgets_are_kept(load_benchmark: Load, name: str) -> None:
    """All planned steps added up by hand, forward once and backward twice, cost about the budget."""
    equal = load_benchmark("equal_flops")
    budget = 2e10
    steps = equal.steps_within(name, budget)
    strategy = equal.STRATEGIES[name](equal.SPACE, 0, steps, replace(equal.RECIPE, strategy=name))
    spent = 0.0
    for number in range(steps):
        for one in strategy.step(number).passes:
            macs = [equal.SPACE.lower(architecture).macs for architecture in one.candidates]
            spent += 64 * (3 * sum(macs) / len(macs) + (sum(macs) if len(macs) > 1 else 0))
    assert spent == pytest.approx(budget, rel=0.1)  # so few steps are lucky or not


def test_the_space_has_243_networks_and_all_strategies_the_same_rates(load_benchmark: Load) -> None:
    equal = load_benchmark("equal_flops")
    items = equal.tuning(1e11)
    assert equal.SPACE.size == 243
    for arm in (*equal.STRATEGIES, "alone"):
        own = [item for item in items if item["arm"] == arm]
        assert [item["learning_rate"] for item in own] == list(equal.RATES)
        assert len({item["steps"] for item in own}) == 1
    assert len({json.dumps(item, sort_keys=True) for item in items}) == len(items) == 49


def tuned_lines(equal: ModuleType, best: float) -> list[dict[str, Any]]:
    return [
        {"item": item, "rollbacks": 0.0, "val_search": [0.5 - abs(item["learning_rate"] - best) / 10] * 3}
        for item in equal.tuning(1e11)
    ]


def test_a_learning_rate_at_an_end_or_of_a_collapsed_training_is_not_chosen(load_benchmark: Load) -> None:
    equal = load_benchmark("equal_flops")
    lines = tuned_lines(equal, best=0.4)
    assert set(equal.best_rates(lines).values()) == {0.4}
    for line in lines:
        line["rollbacks"] = float(line["item"]["learning_rate"] == 0.4)
    assert set(equal.best_rates(lines).values()) == {0.2}
    with pytest.raises(ValueError, match=r"sorted was best at 1\.6, an end of the rates tried"):
        equal.best_rates(tuned_lines(equal, best=1.6))
    with pytest.raises(ValueError, match="has 6 of 7 learning rates tried"):
        equal.best_rates(lines[:-7] + lines[-6:])


def test_the_report_of_equal_flops(load_benchmark: Load, rng: np.random.Generator) -> None:
    equal = load_benchmark("equal_flops")
    macs = np.array([equal.SPACE.lower(one).macs for one in equal.SPACE.all()]) / 1e6
    lines = tuned_lines(equal, best=0.4)
    few = equal.chosen(equal.ALONE)
    for place, arm in enumerate(equal.STRATEGIES):
        for seed in range(3):
            front = 0.6 - 0.05 * place + 0.01 * macs + 0.001 * seed + rng.normal(0, 0.0005)
            test = [0.5 + equal.SPACE.lower(one).macs / 1e8 for one in few]
            lines.append(
                {"item": {"kind": "train", "arm": arm, "learning_rate": 0.4, "seed": seed, "steps": 10},
                 "macs": 3e12, "rollbacks": 0.0, "val_front": front.tolist(), "test": test,
                 "test_ends": [0.5, 0.6], "test_shared_norms": [value - 0.1 for value in test]}
            )  # fmt: skip
    for seed in (0, 1):
        for number, one in enumerate(few):
            alone = {"kind": "alone", "arm": "alone", "seed": seed, "architecture": str(one)}
            lines.append({"item": alone, "test": [0.5 + number / 100 if seed else 0.9 - number / 100]})
    found = equal.report(lines, 3e12)
    json.dumps(found, allow_nan=False)
    assert found["best_on_val_front"] == "sorted"
    told = found["differences_to_best"]["mean_accuracy"]["arms"]
    assert told["sandwich"]["verdict"] == "worse"
    assert told["sandwich"]["difference"] == pytest.approx(-0.05, abs=2e-3)
    assert found["alone"]["kendall_tau_between_seeds"] == -1.0
    row = found["trainings"][0]
    assert row["kendall_tau_macs"] == 1.0 and row["recalibration_gain"] == pytest.approx(0.1)
    assert row["tmacs"] == 3.0 and 0 < row["hypervolume_share"] < 1
