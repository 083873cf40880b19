"""benchmark.sh: its lists, what it does with failures and interruptions, SLURM's tasks, and the numbers of its report."""

import csv
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmark.sh"
VERSIONS = {"torch": "2.13.0", "numpy": "2.4.6"}


def bash(action, target, code=0, script=SCRIPT, **settings):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMP"))}
    environment |= {"PYTHON": sys.executable} if action == "report" else {}
    environment |= {name: str(value) for name, value in settings.items()}
    done = subprocess.run(
        ["bash", script, action, target], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


# --- list ---
@pytest.mark.parametrize(("target", "lines"), [("table1", 63), ("figure2", 18), ("labels", 24), ("bundled", 7)])
def test_every_line_of_a_list_is_a_command_that_its_script_understands(target, lines):
    commands = [shlex.split(line) for line in bash("list", target).splitlines()]
    arguments = [tyro.cli(importlib.import_module(c[1].removesuffix(".py")).Args, args=c[2:]) for c in commands]
    assert len(arguments) == len({args.run_dir for args in arguments}) == lines
    assert all(args.resume for args in arguments)


def test_the_lines_of_table_1_are_those_of_the_paper():
    commands = bash("list", "table1").splitlines()
    assert len({shlex.split(line)[3] for line in commands[:9]}) == 9, "datasets vary fastest: each is downloaded once"
    for words, count in (("--rewards oracle", 27), ("--label-fraction 0.01", 36), ("--alpha 0 ", 9), ("iql_", 27)):
        assert sum(words in line for line in commands) == count, words
    assert all("--num-seeds 5 --num-updates 1000000 " in line for line in commands)
    assert set(bash("list", "figure2").splitlines()) & set(commands), "figure2 takes runs from table1"


def test_a_folder_of_files_replaces_the_datasets(tmp_path):
    for name in ("hopper-own.hdf5", "Pusher-v5.hdf5", "notes.txt"):
        (tmp_path / name).touch()
    commands = bash("list", "table1", DATASETS=tmp_path, SEEDS=3, UPDATES=50, OPTIONS="--eval-workers 4").splitlines()
    assert len(commands) == 14
    for line in commands:
        assert "--num-seeds 3 --num-updates 50 --eval-workers 4 --run-dir" in line
    assert f"--env-id Pusher-v5 --rewards oracle --dataset-path {tmp_path}/Pusher-v5.hdf5" in commands[0]


@pytest.mark.parametrize("words", [("list", "table2"), ("start", "table1"), ("", "")])
def test_a_wrong_word_is_an_error_with_the_usage(words):
    assert "usage: bash benchmark.sh list|run|report" in bash(*words, code=2)


def test_wrong_settings_are_errors(tmp_path):
    assert "no folder DATASETS=/no/such" in bash("list", "table1", code=2, DATASETS="/no/such")
    assert "no .hdf5 files" in bash("list", "table1", code=2, DATASETS=tmp_path)
    assert "JOBS must be" in bash("list", "table1", code=2, JOBS="many")


# --- run: with a stand-in for python, which finishes a run, fails, or takes long ---
@pytest.fixture
def stand_in(tmp_path):
    """Settings for benchmark.sh under which a run is one call of `stand_in.sh`, noted in `calls`."""
    (tmp_path / "stand_in.sh").write_text(
        f"""run_dir=$(sed 's/.*--run-dir \\([^ ]*\\).*/\\1/' <<<"$*")
        echo "$OMP_NUM_THREADS $run_dir" >>{tmp_path}/calls
        if [[ -e {tmp_path}/slow ]]; then trap 'exit 130' INT; sleep 30 & wait; fi
        if [[ $run_dir == *iql__oracle* && ! -e {tmp_path}/repaired ]]; then exit 2; fi
        mkdir -p "$run_dir" && touch "$run_dir/result.json" && echo "result        of $run_dir"
        """
    )
    return {"PYTHON": f"bash {tmp_path}/stand_in.sh", "RUNS": tmp_path / "runs"}


@pytest.mark.parametrize("jobs", [1, 2])
def test_run_goes_on_past_a_failure_and_when_repeated_runs_only_that(stand_in, tmp_path, jobs):
    output = bash("run", "bundled", code=1, JOBS=jobs, **stand_in)
    assert len((tmp_path / "calls").read_text().splitlines()) == 7
    assert "[7/7] " in output and "failed, 1 of 7:" in output and "iql__oracle" in output.splitlines()[-1]
    (tmp_path / "repaired").touch()
    output = bash("run", "bundled", JOBS=jobs, **stand_in)
    assert output.count("finished before") == 6
    assert len((tmp_path / "calls").read_text().splitlines()) == 8


def test_a_finished_run_does_not_finish_one_of_other_settings(stand_in, tmp_path):
    (tmp_path / "repaired").touch()
    bash("run", "bundled", **stand_in)
    assert bash("run", "bundled", **stand_in).count("finished before") == 7
    assert "finished before" not in bash("run", "bundled", UPDATES=7, **stand_in)


def test_a_run_killed_by_the_system_does_not_stop_the_others(stand_in, tmp_path):
    text = (tmp_path / "stand_in.sh").read_text()
    (tmp_path / "stand_in.sh").write_text(text.replace("exit 2; fi", "kill -9 $$; fi"))
    assert "failed, 1 of 7:" in bash("run", "bundled", code=1, **stand_in)
    assert len((tmp_path / "calls").read_text().splitlines()) == 7


def test_jobs_share_the_cores(stand_in, tmp_path):
    (tmp_path / "repaired").touch()
    bash("run", "bundled", JOBS=10_000, **stand_in)
    assert {line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()} == {"1"}


def test_an_interrupted_run_stops_and_goes_on_when_repeated(stand_in, tmp_path):
    (tmp_path / "slow").touch()
    environment = os.environ | {name: str(value) for name, value in stand_in.items()}
    process = subprocess.Popen(["bash", SCRIPT, "run", "bundled"], env=environment, start_new_session=True)
    while not (tmp_path / "calls").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    assert process.wait(10) != 0
    assert len((tmp_path / "calls").read_text().splitlines()) == 1, "it went on with the next run"
    (tmp_path / "slow").unlink()
    (tmp_path / "repaired").touch()
    assert bash("run", "bundled", **stand_in).count("result ") == 7


def test_a_slurm_task_runs_its_own_line_from_the_folder_it_was_submitted_from(stand_in, tmp_path):
    spooled = shutil.copy(SCRIPT, tmp_path / "slurm_script")
    slurm = {"SLURM_ARRAY_TASK_ID": 3, "SLURM_SUBMIT_DIR": ROOT}
    bash("run", "bundled", script=spooled, code=2, **stand_in, **slurm)
    (tmp_path / "repaired").touch()
    assert "[4/7]" in bash("run", "bundled", script=spooled, **stand_in, **slurm)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["halfcheetah-medium-replay-mini__iql__oracle__1"]
    slurm = {"SLURM_ARRAY_TASK_ID": 7, "SLURM_SUBMIT_DIR": ROOT}
    assert "lines 0 to 6, not 7" in bash("run", "bundled", script=spooled, code=2, **stand_in, **slurm)
    slurm = {"SLURM_ARRAY_TASK_ID": 0, "SLURM_SUBMIT_DIR": tmp_path}
    assert "submit from the folder" in bash("run", "bundled", script=spooled, code=2, **stand_in, **slurm)


# --- report ---
def make_run(folder, name, per_seed, num_updates=20, versions=VERSIONS, metric="score"):
    """A finished run whose numbers are known."""
    run_dir = folder / name
    run_dir.mkdir(parents=True)
    result = {"metric": metric, "mean": sum(per_seed) / len(per_seed), "std": 0.0, "per_seed": per_seed}
    result |= {"num_updates": num_updates, "eval_episodes": 10, "versions": versions, "commit": "0123456789abcdef"}
    (run_dir / "result.json").write_text(json.dumps(result))
    config = {"num_updates": num_updates, "eval_episodes": 10, "num_seeds": len(per_seed), "batch_size": 256}
    (run_dir / "config.json").write_text(json.dumps(config))
    rows = [f"{u},{k},{s},{s}" for u in (num_updates // 2, num_updates) for k, s in enumerate(per_seed)]
    (run_dir / "scores.csv").write_text("\n".join(["update,seed,return,score", *rows]) + "\n")


@pytest.fixture
def workplace(tmp_path):
    """A copy of the project's folder to write results/ into, and the folder of its runs."""
    for name in ("benchmark.sh", "td3bc_imputed.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path, tmp_path / "runs" / "benchmark"


def report(workplace, target, **settings):
    return bash("report", target, script=workplace[0] / "benchmark.sh", **settings)


def test_the_report_has_the_statistics_known_by_hand(workplace):
    folder, runs = workplace
    make_run(runs, "hopper-medium-v2__td3bc__oracle__1", [0.0, 10.0, 20.0, 30.0])
    make_run(runs, "walker2d-medium-v2__td3bc__oracle__1", [40.0, 50.0, 100.0, 700.0])
    make_run(runs, "hopper-medium-v2__iql__labeled__0.01", [0.0] * 4)
    make_run(runs, "walker2d-medium-v2__iql__labeled__0.01", [10.0] * 4)
    make_run(runs, "hopper-medium-v2__td3bc__imputed__0.01", [9.0, 9.0, 9.0, 9.0])
    output = report(workplace, "table1")
    assert "5 of 63 runs, commit 012345678; num_updates 20, eval_episodes 10, " in output
    assert "num_seeds 4" in output and "torch 2.13.0" in output
    hopper = next(line for line in output.splitlines() if line.startswith("| hopper-medium-v2"))
    cells = [cell.strip() for cell in hopper.split("|")]
    assert cells[2] == "15.0 ± 11.2 (59.3)"  # the population's std of 0, 10, 20, 30 is 11.18
    assert cells[4] == "9.0 ± 0.0 (58.1)" and cells[3] == "(11.3)" and cells[9] == "0.60"
    assert "| TD3+BC 100% | 35.0 |" in output  # the middle four of 0, 10, 20, 30, 40, 50, 100, 700
    assert "| IQL 1% | 5.0 | 5.0 to 5.0 | 2 |" in output  # drawn within each task, equal seeds leave no interval
    assert "| TD3+BC 1% + imputed | 9.0 | 9.0 to 9.0 | 1 |" in output
    assert output.count("- missing: ") == 58 and "- missing: runs/benchmark/hopper-medium-v2__bc__oracle__1" in output
    rows = list(csv.DictReader((folder / "results" / "table1.csv").open()))
    assert len(rows) == 5
    assert [rows[0][key] for key in ("dataset", "algorithm", "mean", "paper")] == [
        "hopper-medium-v2",
        "td3bc",
        "15.0",
        "59.3",
    ]


def test_the_average_is_over_all_datasets_or_not_given(workplace, tmp_path):
    for k, name in enumerate(("hopper-a", "hopper-b")):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.hdf5").touch()
        make_run(workplace[1], f"{name}__iql__oracle__1", [10.0 + k, 12.0 + k])
    make_run(workplace[1], "hopper-a__iql__imputed__0.01", [5.0, 6.0])
    output = report(workplace, "table1", DATASETS=tmp_path / "data")
    average = next(line for line in output.splitlines() if line.startswith("| average"))
    assert [cell.strip() for cell in average.split("|")][5:8] == ["11.5", "", ""]


def test_runs_of_another_protocol_are_left_out_and_named(workplace):
    for seed_score, setting in ((1.0, "td3bc__oracle__1"), (2.0, "iql__oracle__1"), (3.0, "bc__oracle__1")):
        make_run(workplace[1], f"halfcheetah-medium-replay-mini__{setting}", [seed_score] * 3)
    make_run(workplace[1], "halfcheetah-medium-replay-mini__td3bc__imputed__0.01", [99.0] * 3, num_updates=40)
    other = VERSIONS | {"torch": "1.0"}
    make_run(workplace[1], "halfcheetah-medium-replay-mini__iql__imputed__0.01", [99.0] * 3, versions=other)
    output = report(workplace, "bundled")
    assert "3 of 7 runs" in output and "99.0" not in output
    assert "- left out, num_updates 40: runs/benchmark/halfcheetah-medium-replay-mini__td3bc__imputed" in output
    assert "- left out, torch 1.0: runs/benchmark/halfcheetah-medium-replay-mini__iql__imputed" in output


@pytest.mark.parametrize("target", ["figure2", "labels", "bundled"])
def test_every_target_has_a_table_and_two_pictures(workplace, target):
    for k, line in enumerate(bash("list", target).splitlines()):
        make_run(workplace[1], Path(shlex.split(line)[-2]).name, [k + 1.0, k + 2.0, k + 3.0])
    output = report(workplace, target)
    assert "missing" not in output
    picture = "labels" if target == "labels" else "figure2"
    for name in (f"{target}.csv", f"{picture}.png", "curves.png"):
        assert (workplace[0] / "results" / name).stat().st_size > 100
        assert f"results/{name}" in output.splitlines()[-1]


def test_raw_returns_are_not_averaged_over_tasks(workplace):
    make_run(workplace[1], "hopper-medium-v2__td3bc__oracle__1", [1.0, 2.0], metric="return")
    output = report(workplace, "table1")
    assert "1.5 ± 0.5" in output and "average" not in output and "IQM" not in output


def test_without_a_finished_run_the_report_says_so(workplace):
    assert "no finished run of bundled in runs/benchmark" in bash(
        "report", "bundled", code=1, script=workplace[0] / "benchmark.sh"
    )
