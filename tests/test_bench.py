"""The benchmarks' report says what the results say, names what loses, flags what became slower; the README agrees."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench import machine, networks, pictures, readme, report, turns, wire
from bench.competitors import (
    CHECKPOINTED,
    FROZEN,
    FROZEN_PLAIN,
    LEAN,
    LORA,
    OTHERS,
    OURS,
    PLAIN,
    SLICED,
    WAYS,
    rivals,
    with_convolutions,
)
from bench.floors import convolution_floor, network_floor, predicted
from bench.group import WHOLE, Group, Ratio, ratio
from bench.networks import Step, checkpointed
from bench.oracle import LayerOracle, NetworkOracle, WrongResultError
from bench.page import page, uncertain
from bench.rates import Rates
from bench.results import Results, ResultsError, load
from bench.turns import FEWEST, Effort, in_turns
from rwn_ext import ops, planner

ROOT = Path(__file__).parents[1]
MACHINE = {
    "device": "some CPU", "threads": 2, "python_version": "3.11", "torch": "2.13", "dtype": "float32",
    "rates": {"bytes_per_second": 2e10, "flops_per_second": 1e11},
}  # fmt: skip


def written(folder: Path, seconds: dict[str, list[float]], **machine: object) -> Path:
    """A results folder with one group of these rounds."""
    kept = dict.fromkeys(seconds, 2_000_000)
    return saved(
        folder,
        Group("layer", "a layer", {"p": 0.1}, seconds, (PLAIN,), {"forward": seconds}, kept, rivals=others(seconds)),
        **machine,
    )


def others(names) -> dict[str, list[str]]:
    return {name: found for name in names if (found := rivals(name, names))}


def saved(folder: Path, *groups: Group, **machine: object) -> Path:
    """A results folder with these groups."""
    benchmarks = [
        group.facts(name) | {"stats": {"median": 0.001, "iqr": 0.0001, "rounds": 9}}
        for group in groups
        for name in group.seconds
    ]
    content = {
        "machine_info": MACHINE | machine, "commit_info": {"id": "c" * 40, "time": "", "dirty": False},
        "benchmarks": benchmarks, "datetime": "2026-01-01",
        "tests": {"files": ["tests/test_some.py"], "outcome": "passed"},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(content))
    return folder


def steady(value: float) -> list[float]:
    return [value * (1 + 0.001 * i) for i in range(9)]


def test_a_ratio_is_taken_within_rounds_and_its_interval_holds_most_of_them():
    drifting = {PLAIN: [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]}
    drifting["rwn_ext"] = [0.5 * value for value in drifting[PLAIN]]
    assert ratio(drifting, "rwn_ext", PLAIN) == (0.5, 0.5, 0.5)
    drifting["rwn_ext"][0] = 100.0
    drifting["rwn_ext"][8] = 0.1
    # Of nine rounds, the second lowest and the second highest bound the median with 96 % confidence.
    assert ratio(drifting, "rwn_ext", PLAIN) == (0.5, 0.5, 0.5)


def test_page_marks_what_loses(tmp_path):
    folder = written(tmp_path / "new", {PLAIN: steady(1.0), OURS: steady(1.2), "sliced aten": steady(1.1)})
    text = page(load(folder))
    assert "Of 2 comparisons with others it is faster in 0, slower in 2 and undecided in 0" in text
    assert "| layer | a layer, p 0.1 | rwn_ext, nn.Conv2d | 1.20 [1.20, 1.20] |" in text
    assert "| layer | a layer, p 0.1 | rwn_ext, sliced aten | 1.09 [1.09, 1.09] |" in text
    assert "| layer | 0 | 2 | 0 |" in text
    assert "**rwn_ext** (loses)" in text and "sliced aten, " not in text
    assert "| 2.00 |" in text and "| bench.json | cccccccccc | 20 | 100 |" in text
    assert "Tested before: tests/test_some.py (passed)." in text
    winning = written(tmp_path / "winning", {PLAIN: steady(1.0), OURS: steady(0.8), "sliced aten": steady(0.9)})
    assert "faster in 2, slower in 0" in page(load(winning)) and "(loses)" not in page(load(winning))
    assert "It loses nowhere" in page(load(winning))


def test_what_the_noise_hides_is_undecided(tmp_path):
    noisy = [0.7, 0.8, 0.9, 0.9, 0.9, 1.1, 1.2, 1.3, 1.4]
    text = page(load(written(tmp_path, {PLAIN: [1.0] * 9, OURS: noisy, "sliced aten": steady(3.0)})))
    assert "Of 2 comparisons with others it is faster in 1, slower in 0 and undecided in 1" in text
    assert "| layer | 1 | 0 | 1 |" in text and "(loses)" not in text


def test_a_cell_says_how_sure_it_is():
    assert uncertain(Ratio(0.6, 0.55, 0.61)) == "0.60 ±.05"
    assert uncertain(Ratio(0.94, 0.8, 1.1)) == "(0.94 ±.16)"
    assert uncertain(Ratio(2.5, 1.2, 3.75)) == "2.50 ±1.30"
    assert uncertain(Ratio(1.0, 1.0, 1.0)) == "1.00"


def test_the_title_names_the_device(tmp_path):
    rounds = {PLAIN: steady(1.0), OURS: steady(0.8)}
    assert page(load(written(tmp_path, rounds))).splitlines()[0] == "# Benchmarks: some CPU, 2 CPU threads"
    gpu = load(written(tmp_path, rounds, device="some GPU", dtype="bfloat16"))
    assert page(gpu).splitlines()[0] == "# Benchmarks: some GPU"


def test_every_file_has_its_commit_and_rates(tmp_path):
    folder = written(tmp_path, {PLAIN: steady(1.0)})
    newer = json.loads((folder / "bench.json").read_text())
    newer["commit_info"] = {"id": "d" * 40, "dirty": True}
    newer["machine_info"]["rates"]["bytes_per_second"] = 3e10
    (folder / "more.json").write_text(json.dumps(newer))
    (folder / "memory.json").write_text(json.dumps({"commit_info": {"id": "e" * 40, "dirty": False}}))
    text = page(load(folder))
    assert (
        "| bench.json | cccccccccc | 20 | 100 |" in text and "| more.json | dddddddddd and changes | 30 | 100 |" in text
    )
    assert "| memory.json | eeeeeeeeee |  |  |" in text


def test_more_than_the_floor_s_speed_is_explained(tmp_path):
    def text(seconds: float) -> str:
        group = Group("layer", "a layer", {"p": 0.1}, {PLAIN: [1.0] * 9}, floor={PLAIN: seconds})
        return page(load(saved(tmp_path, group)))

    assert "1 of 1 shares exceed 100%, the highest is 125%" in text(1.25) and "exceed" not in text(0.8)


def test_what_keeps_more_than_plain_is_named(tmp_path):
    rounds = {PLAIN: steady(1.0), OURS: steady(0.8)}
    group = Group("layer", "a layer", {"p": 0.1}, rounds, kept={PLAIN: 100, OURS: 110}, rivals=others(rounds))
    assert "rwn_ext keeps 1.10 of nn.Conv2d's bytes" in page(load(saved(tmp_path, group)))


def test_the_answer_comes_first(tmp_path):
    groups = []
    for net, share, kept in (("net a", 0.6, 50), ("net b", 0.8, 30)):
        rounds = {
            PLAIN: steady(1.0), FROZEN: steady(0.5), f"{OURS} p = 0.1": steady(share), f"{LEAN} p = 0.1": steady(0.9),
            f"{LORA} p = 0.1": steady(0.95), "sliced aten p = 0.1": steady(0.7),
        }  # fmt: skip
        more = {PLAIN: {"kept_bytes": 100, "training_bytes": 40}, f"{LEAN} p = 0.1": {"kept_bytes": kept}}
        more[f"{OURS} p = 0.1"] = {"kept_bytes": 100, "training_bytes": 10}
        groups.append(Group("step", net, {"batch": 4}, rounds, more=more, rivals=others(rounds)))
    answer = page(load(saved(tmp_path, *groups))).split("##")[0]
    assert "takes 0.60 to 0.80 of `nn.Conv2d`'s time (0.70 in the median of 2 networks)" in answer
    assert "with nothing learned at all, which is the ceiling, it takes 0.50" in answer
    assert "keeps 0.30 to 0.50 of the bytes for backward**, and takes 0.90 of the time" in answer
    assert "Gradients and optimizer state need 0.25 of the memory." in answer
    # net b loses to sliced aten, and so does the lean model of either; LoRA is not the fastest.
    assert "| net b | 1 ms | 0.80 ±.00 | 0.50 ±.00 | 0.70 ±.00, sliced aten | 0.30 |" in answer
    assert "Of 12 comparisons with others it is faster in 9, slower in 3 and undecided in 0" in answer


def test_rivals_do_the_same():
    names = [PLAIN, FROZEN, *(f"{way} p = {p}" for way in (OURS, LEAN, LORA) for p in (0.1, 0.4)), CHECKPOINTED,
             f"compiled {PLAIN}", f"compiled {OURS} p = 0.1"]  # fmt: skip
    assert rivals(f"{OURS} p = 0.1", names) == [PLAIN, f"{LORA} p = 0.1"]
    assert rivals(f"{LEAN} p = 0.4", names) == [PLAIN, f"{LORA} p = 0.4"]
    assert rivals(f"compiled {OURS} p = 0.1", names) == [f"compiled {PLAIN}"]
    assert rivals(PLAIN, names) == rivals(FROZEN, names) == rivals(CHECKPOINTED, names) == []
    assert rivals(OURS, WAYS) == [PLAIN, *OTHERS]


def test_memory_has_its_section_where_it_was_measured(tmp_path):
    folder = written(tmp_path, {PLAIN: steady(1.0), OURS: steady(0.8)})
    assert "## Memory" not in page(load(folder))
    case = {"case": "wrn-28-4, p=.1", "process": 0.514, "allocator": 0.509, "target": 0.52}
    (folder / "memory.json").write_text(json.dumps({"text": "Of plain nn.", "cases": [case]}))
    assert "Of plain nn.\n\n| case | process | allocator | target |" in page(load(folder))
    assert "| wrn-28-4, p=.1 | 0.514 | 0.509 | 0.520 |" in page(load(folder))


def test_speeds_relative_to_the_ceiling_have_their_section(tmp_path):
    assert "ceiling" not in page(load(written(tmp_path / "none", {PLAIN: steady(1.0)}))).partition("## How this")[0]
    seconds = {FROZEN: [1.0] * 9, f"{OURS} p = 0.1": [1.25] * 2 + [2.0] * 5 + [4.0] * 2}
    folder = saved(tmp_path / "some", Group("ceiling", "a net", {"batch": 32}, seconds, against=(FROZEN,)))
    assert report.main([str(folder)]) == 0
    assert "| a net | 32 | 9 | 0.50 [0.25, 0.80] |" in page(load(folder))


def test_the_page_says_what_there_was_no_time_for(tmp_path):
    folder = written(tmp_path / "new", {PLAIN: steady(1.0), OURS: steady(0.9)})
    assert "left out" not in page(load(folder))
    file = folder / "bench.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"left_out": 3}))
    assert "3 cases of bench.json are left out" in page(load(folder))


def test_report_writes_the_page_and_its_pictures(tmp_path, capsys):
    folder = written(tmp_path / "new", {PLAIN: steady(1.0), "rwn_ext": steady(0.9)})
    assert report.main([str(folder)]) == 0
    assert (folder / "report.md").read_text().startswith("# Benchmarks: some CPU")
    assert pictures.outdated(load(folder), folder) == []


def test_a_picture_is_of_its_results_and_its_code(tmp_path):
    folder = written(tmp_path / "new", {PLAIN: steady(1.0), OURS: steady(0.9)})
    results = load(folder)
    assert pictures.outdated(results, folder) == ["layers.png"]
    pictures.draw(results, folder)
    assert pictures.outdated(results, folder) == []
    assert pictures.outdated(load(written(folder, {PLAIN: steady(1.0), OURS: steady(0.8)})), folder) == ["layers.png"]
    code = tmp_path / "code.py"
    code.write_text("old")
    picture = pictures.Picture(results.entries, pictures.layers, str(code))
    before = picture.fingerprint
    code.write_text("new")
    assert picture.fingerprint != before


def test_every_way_looks_its_own(tmp_path):
    names = [*WAYS, LEAN, CHECKPOINTED, "another way p = 0.1", "memsave_torch, all frozen"]
    found = pictures.looks(names)
    assert len({look.color for look in found.values()}) == len(found) == len(names)
    alike = (PLAIN, f"{PLAIN} again", f"compiled {PLAIN}", f"captured {PLAIN}")
    assert pictures.looks(alike).keys() == pictures.looks([PLAIN]).keys()


def test_pictures_take_what_was_measured(tmp_path):
    """Few points, contenders that are new, bytes that nothing keeps: a picture all the same."""
    rounds = {PLAIN: steady(1.0), f"compiled {PLAIN}": steady(0.9), "another way": steady(0.7), OURS: steady(0.8)}
    kept = {PLAIN: 100, "another way": 0, OURS: 100}
    groups = [Group("scaling", "batch", {"batch": n}, rounds, kept=kept, predicted=dict.fromkeys(rounds, 1.0))
              for n in (4, 8)]  # fmt: skip
    groups += [Group("step", "a net", {}, rounds), Group("layer", "a layer", {"p": 0.1}, rounds)]
    sent = {"subject": "DDP", "case": {"net": "a net", "processes": 2, "p": 0.1}, "sent_bytes": 11, "ring_bytes": 10}
    wire_group = Group("scaling", "DDP", {}, {OURS: [1.0] * 9}, (), more={OURS: sent | {"gradient_bytes": 10}})
    folder = saved(tmp_path, *groups, wire_group)
    assert report.main([str(folder)]) == 0
    assert sorted(path.name for path in folder.glob("*.png")) == ["layers.png", "scaling.png", "steps.png"]


@pytest.mark.parametrize(("now", "lines"), [(0.7, 1), (0.52, 0), (0.4, 0)])
def test_a_regression_is_more_than_five_percent_beyond_noise(tmp_path, capsys, now: float, lines: int):
    old = written(tmp_path / "old", {PLAIN: steady(1.0), "rwn_ext": steady(0.5)})
    new = written(tmp_path / "new", {PLAIN: steady(3.0), "rwn_ext": steady(3 * now)})
    assert report.main([str(new), "--against", str(old)]) == lines
    assert ("0.50 [0.50, 0.50] -> 0.70 [0.70, 0.70]" in capsys.readouterr().out) == bool(lines)


def test_noise_is_no_regression(tmp_path):
    noisy = [0.4, 0.9, 0.5, 0.8, 0.5, 0.7, 0.9, 0.4, 0.7]
    old = written(tmp_path / "old", {PLAIN: steady(1.0), "rwn_ext": steady(0.5)})
    new = written(tmp_path / "new", {PLAIN: steady(1.0), "rwn_ext": noisy})
    assert report.regressions(load(new), load(old)) == []


def test_kernels_and_bytes_regress_too(tmp_path, capsys):
    def results(name: str, seconds: float, kept: int, **machine: object) -> Results:
        rounds = {WHOLE: steady(1.0), OURS: steady(seconds), "unfold": steady(seconds)}
        kernel = Group("kernel", "a layer", {"learned": "4/64"}, rounds, (WHOLE,))
        rounds = {PLAIN: steady(1.0), OURS: steady(0.5), "sliced aten": steady(seconds)}
        layer = Group("layer", "a layer", {"p": 0.1}, rounds, kept={PLAIN: 1_000_000, OURS: kept})
        return load(saved(tmp_path / name, kernel, *([layer] if kept else []), **machine))

    old, new = results("old", 0.5, 1_000_000), results("new", 0.6, 1_100_000)
    found = report.regressions(new, old)
    # What others do is not ours to mend.
    assert found == [
        "kernel, a layer, learned 4/64: rwn_ext 0.50 [0.50, 0.50] -> 0.60 [0.60, 0.60] of full wgrad's time",
        "layer, a layer, p 0.1: rwn_ext keeps 1.00 -> 1.10 MB for backward",
    ]
    assert report.notes(new, old) == []
    fewer = results("fewer", 0.5, 0, torch="2.11")
    assert report.notes(fewer, old) == [
        "note: torch was 2.13, is 2.11", "note: 1 of 2 earlier measurements have no counterpart"
    ]  # fmt: skip
    assert report.main([str(tmp_path / "fewer"), "--against", str(tmp_path / "old")]) == 0
    assert "no counterpart" in capsys.readouterr().out


def test_all_bytes_regress_too(tmp_path):
    def results(name: str, more: float) -> Results:
        rounds = {PLAIN: steady(1.0), f"{OURS} p = 0.1": steady(0.5)}
        facts = {"peak_bytes": 2e6 * more, "training_bytes": 1e6 * more}
        folder = saved(tmp_path / name, Group("step", "a net", {}, rounds, more=dict.fromkeys(rounds, facts)))
        cases = [
            {"case": "a case", "process": 0.5 * more, "allocator": 0.4},
            {"case": name, "process": 1, "allocator": 1},
        ]
        (folder / "memory.json").write_text(json.dumps({"cases": cases, "text": ""}))
        return load(folder)

    assert report.regressions(results("new", 1.04), results("old", 1)) == []
    assert report.regressions(results("new", 1.1), results("old", 1)) == [
        "step, a net, : rwn_ext p = 0.1 needs 2.00 -> 2.20 MB at the peak",
        "step, a net, : rwn_ext p = 0.1 needs 1.00 -> 1.10 MB for gradients and optimizer",
        "memory, a case: 0.500 -> 0.550 of plain's, by the process",
    ]
    assert report.notes(results("new", 1), results("old", 1)) == [
        "note: 1 of 3 earlier measurements have no counterpart"
    ]  # fmt: skip


def test_what_noise_would_hide_is_counted(tmp_path, capsys):
    noisy = [0.4, 0.9, 0.5, 0.8, 0.5, 0.7, 0.9, 0.4, 0.7]
    old = written(tmp_path / "old", {PLAIN: [1.0] * 9, OURS: [0.5] * 9, FROZEN: noisy})
    new = written(tmp_path / "new", {PLAIN: [1.0] * 9, OURS: [0.5] * 9, FROZEN: noisy})
    assert report.main([str(new), "--against", str(old)]) == 0
    said = "nothing became slower or keeps more\nnote: 1 of 2 times vary too much to show 5 % more\n"
    assert capsys.readouterr().out == said


def test_folders_that_hold_no_results_are_named(tmp_path, capsys):
    assert report.main([str(tmp_path / "missing")]) == 2
    assert "missing is no folder" in capsys.readouterr().err
    with pytest.raises(ResultsError, match="holds no results"):
        load(tmp_path)
    folder = written(tmp_path / "mixed", {PLAIN: steady(1.0)})
    (folder / "bench.json").rename(folder / "older.json")
    with pytest.raises(ResultsError, match="different machines"):
        load(written(folder, {PLAIN: steady(1.0)}, torch="2.11"))
    (folder / "older.json").write_text("{")
    with pytest.raises(ResultsError, match=r"older\.json cannot be read"):
        load(folder)


def test_readme_says_what_the_results_say(capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr().out


def test_nothing_is_measured_while_the_tests_are_red(tmp_path):
    wrong = "from rwn_ext import ops; right = ops._run\n"
    wrong += "ops._run = lambda *args: (2 * right(*args)[0], None)\n"
    (tmp_path / "wrong.py").write_text(wrong)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTEST_PLUGINS": "wrong"}
    command = [sys.executable, "-m", "pytest", "bench/bench_calls.py", "--quick", "-q"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "so nothing is measured" in done.stdout + done.stderr and "median ms" not in done.stdout


def convolution(groups: int) -> tuple[nn.Conv2d, LayerOracle]:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, 2, padding=1, groups=groups, bias=False)
    x = torch.randn(2, 6, 7, 7).requires_grad_()
    return conv, LayerOracle(conv, x, torch.randn(2, 6, 4, 4))


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_computes_a_convolution(way: str, groups: int):
    if way == LORA and groups > 1:
        pytest.skip("it is for dense convolutions")
    conv, exact = convolution(groups)
    exact.check(way, WAYS[way](conv, 2), 0 if "frozen" in way else 2)


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    # Large enough for the planner not to compute all filters.
    conv = nn.Conv2d(16, 32, 3, padding=1, bias=False)
    exact = LayerOracle(conv, torch.randn(8, 16, 16, 16).requires_grad_(), torch.randn(8, 32, 16, 16))
    right = ops._run
    monkeypatch.setattr(ops, "_run", lambda *args: (1.001 * right(*args)[0], None))
    with pytest.raises(WrongResultError, match=r"grad_weight of rwn_ext is off by 0.001"):
        exact.check(OURS, WAYS[OURS](conv, 4), 4)
    wrong = WAYS[PLAIN](conv, 4)
    with torch.no_grad():
        wrong.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(WrongResultError, match="output of plain is off by nan"):
        exact.check("plain", wrong, 4)


def test_a_wrong_network_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))
    exact = NetworkOracle.of(networks.model_of("wrn-10-1", PLAIN), images, labels)
    assert len(exact.gradients) == 9
    for row in (PLAIN, FROZEN, FROZEN_PLAIN, CHECKPOINTED, *(f"{way} p = 0.4" for way in (OURS, LEAN, *OTHERS))):
        model = networks.model_of("wrn-10-1", row)
        exact.check(row, model, model, images, labels)
        assert model.training and all(p.grad is None for p in model.parameters())
    with pytest.raises(WrongResultError, match="loss of other"):
        other = networks.build("wrn-10-1", 10, 0.4, seed=1)
        exact.check("other", other, other, images, labels)
    # The gradient of other filters.
    right = ops._run
    monkeypatch.setattr(ops, "_run", lambda *args: (right(*args)[0].flip(0), None))
    with pytest.raises(WrongResultError, match="grad_weight of"):
        model = networks.model_of("wrn-10-1", f"{OURS} p = 0.4")
        exact.check(f"{OURS} p = 0.4", model, model, images, labels)
    # Fewer filters than the row's.
    with pytest.raises(WrongResultError, match=r"no grad_weight of .* of rwn_ext p = 0.8, or another"):
        exact.check(f"{OURS} p = 0.8", model, model, images, labels)


@pytest.mark.parametrize("net", ["wrn-10-1", "densenet-bc-22-12", "mobilenet-v2"])
def test_both_frozen_networks_learn_the_same(net: str):
    learned = [
        sorted(tuple(p.shape) for p in networks.model_of(net, row).parameters() if p.requires_grad)
        for row in (FROZEN, FROZEN_PLAIN)
    ]
    assert learned[0] == learned[1]


def test_sliced_gradients_under_autocast():
    conv, x = nn.Conv2d(8, 16, 3, padding=1), torch.randn(2, 8, 6, 6)
    plain, sliced = WAYS[PLAIN](conv, 4), WAYS[SLICED](conv, 4)
    for module in (plain, sliced):
        with torch.autocast("cpu", torch.bfloat16):
            module(x).float().square().mean().backward()
    torch.testing.assert_close(sliced.learned.grad, plain.weight.grad[-4:], rtol=0.02, atol=1e-3)


def test_the_bytes_a_checkpointed_step_keeps_are_the_allocator_s(monkeypatch: pytest.MonkeyPatch):
    """Of two checkpointed units the input of each, of which the first is the images; of plain layers their inputs."""

    def unit() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False))

    def network() -> nn.Module:
        return nn.Sequential(unit(), unit(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

    images, labels, activation = torch.randn(8, 4, 32, 32), torch.randint(10, (8,)), 4 * 8 * 4 * 32 * 32
    random_state = 2 * len(torch.get_rng_state())  # which recomputation starts from
    for make, kept in ((network, 4), (lambda: checkpointed(network()), 2)):
        monkeypatch.setattr(networks, "model_of", lambda net, row, make=make: make())
        found = Step("wrn-10-1", PLAIN, images, labels).memory()
        # The pooling keeps its input's sizes alone, but the graph holds what it returns: a few hundred numbers.
        extra = found["kept_bytes"] - (kept - 1) * activation
        assert 0 <= extra < random_state + 4096, (found, kept)
        weights = 4 * sum(p.numel() for p in network().parameters())
        assert found["training_bytes"] == 2 * weights
        assert found["peak_bytes"] > found["kept_bytes"] + 2 * weights


def test_rounds_fit_into_the_time_but_are_enough(monkeypatch: pytest.MonkeyPatch):
    assert [Effort(10, 9, 41).rounds(seconds) for seconds in (100, 1, 0.5, 0.01)] == [9, 10, 20, 41]
    called: list[str] = []
    seconds = in_turns({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, Effort(0, FEWEST, FEWEST))
    assert [len(times) for times in seconds.values()] == [FEWEST, FEWEST]
    assert len(called) == 2 * (1 + FEWEST)
    # With fewer rounds not even the extremes bound the median with 95 % confidence.
    assert 2 * 0.5**FEWEST <= 0.05 < 2 * 0.5 ** (FEWEST - 1)
    assert turns.Effort(1).least >= FEWEST


RATE = Rates(bytes_per_second=1e9, flops_per_second=1e10)


def test_the_floor_is_bytes_or_operations():
    sizes = (2, 3, 8, 8), (4, 3, 3, 3), (2, 4, 8, 8)
    x, w, y = 384, 108, 512
    # Bound by operations: 27 multiply-adds an output.
    slow = Rates(1e12, 1e9)
    assert convolution_floor(slow, *sizes, 4, 4) == pytest.approx(3 * 2 * 27 * y / 1e9)
    assert convolution_floor(slow, *sizes, 1, 4) == pytest.approx(2.25 * 2 * 27 * y / 1e9)
    fast = Rates(1e6, 1e15)
    assert convolution_floor(fast, *sizes, 0, 4) == pytest.approx(2 * 4 * (x + w + y) / 1e6)
    assert convolution_floor(fast, *sizes, 1, 4, input_gradient=False) == pytest.approx(
        4 * (x + w + y) / 1e6 + 4 * (x + (y + w) / 4) / 1e6
    )
    # With stride 2, a kernel of one row reaches every second one; the input's gradient is written whole.
    strided = (2, 3, 8, 8), (4, 3, 1, 2), (2, 4, 4, 4)
    assert convolution_floor(fast, *strided, 4, 4) == pytest.approx(4 * (2 * x / 2 + x + 3 * (24 + 128)) / 1e6)
    linear = (5, 7, 3), (4, 3), (5, 7, 4)
    assert convolution_floor(fast, *linear, 0, 4) == pytest.approx(2 * 4 * (105 + 12 + 140) / 1e6)


def test_the_floor_of_a_network_is_the_sum_of_its_layers(monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1))
    images = torch.randn(2, 3, 8, 8)
    first = (2, 3, 8, 8), (4, 3, 3, 3), (2, 4, 8, 8)
    second = (2, 4, 8, 8), (8, 4, 3, 3), (2, 8, 8, 8)

    def expected(learned: tuple[int, int], relu_passes: int) -> float:
        # The images need no gradient; what lies above something learned does.
        total = convolution_floor(RATE, *first, learned[0], 4, input_gradient=False)
        total += relu_passes * 2 * 4 * 512 / 1e9
        return total + convolution_floor(RATE, *second, learned[1], 4, input_gradient=learned[0] > 0)

    assert network_floor(model, images, RATE, 4) == pytest.approx(expected((4, 8), 2))
    assert model.training
    half = with_convolutions(model, WAYS[OURS], 0.5)
    assert network_floor(half, images, RATE, 4) == pytest.approx(expected((2, 4), 2))
    half[0].requires_grad_(False)
    assert network_floor(half, images, RATE, 4) == pytest.approx(expected((0, 4), 1))


def test_a_lean_step_has_the_floor_of_ours():
    """Its layers are parts of blocks, which are not called."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 3))
    ours = with_convolutions(copy.deepcopy(plain), WAYS[OURS], 0.5)
    steps = {PLAIN: plain, f"{OURS} p = 0.5": ours, f"{LEAN} p = 0.5": nn.Identity()}
    images = torch.randn(2, 3, 8, 8)
    floors = networks.floors_of({row: SimpleNamespace(model=model) for row, model in steps.items()}, images, RATE, 4)
    assert floors[f"{LEAN} p = 0.5"] == floors[f"{OURS} p = 0.5"] == network_floor(ours, images, RATE, 4)
    assert floors[PLAIN] == network_floor(plain, images, RATE, 4) > floors[f"{OURS} p = 0.5"]


def test_the_prediction_knows_what_is_planned(monkeypatch: pytest.MonkeyPatch):
    conv = nn.Conv2d(32, 32, 3, padding=1, bias=False)
    x = torch.randn(8, 32, 16, 16).contiguous(memory_format=torch.channels_last)

    def share(way: str) -> float:
        ours, plain = (predicted(WAYS[name](conv, 8), conv, x, Rates(1e12, 1e9)) for name in (way, PLAIN))
        return ours / plain

    assert share(FROZEN) == pytest.approx(2 / 3) and share(OURS) == pytest.approx((2 + 1 / 4) / 3)
    monkeypatch.setattr(planner, "plan", lambda problem: planner.Plan("full", "asked for"))
    assert share(OURS) == pytest.approx(1)


def test_sockets_count_what_ddp_sends():
    """A ring of two processes sends the gradients once."""
    found = wire.sent(2, [0.1])
    assert found.keys() == {(2, 0.1)}
    assert found[2, 0.1] == pytest.approx(wire.gradient_bytes(0.1), rel=0.02)
    assert wire.gradient_bytes(0.1) < 0.11 * wire.gradient_bytes(1.0)


def test_results_that_grow_do_not_make_the_commit_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    results, code = tmp_path / "bench" / "results" / "memory.json", tmp_path / "code.py"
    results.write_text("{}")
    code.write_text("")
    git = ["git", "-c", "user.name=Someone", "-c", "user.email=someone@example.org"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "All"]):
        subprocess.run([*git, *command], check=True)
    clean = machine.commit()
    assert len(clean["id"]) == 40 and not clean["dirty"]
    results.write_text("{ }")
    assert machine.commit() == clean
    code.write_text("changed")
    assert machine.commit() == clean | {"dirty": True}
