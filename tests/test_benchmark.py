"""benchmark.sh: its lists, failures and interruptions, SLURM's tasks, the numbers it reports."""

import csv
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import h5py
import matplotlib as mpl
import numpy as np
import pytest
import tyro

import td3bc_imputed

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmark.sh"
MINI = "halfcheetah-medium-replay-mini"
VERSIONS = {"torch": "2.13.0", "numpy": "2.4.6"}
HASHES = {"td3bc": "0123456789abcdef", "bc": "0123456789abcdef", "iql": "fedcba9876543210"}


def without_settings():
    """The environment without what benchmark.sh reads from it."""
    settings = [
        "DATASETS",
        "JOBS",
        "SEEDS",
        "UPDATES",
        "FRACTIONS",
        "OPTIONS",
        "RUNS",
        "PYTHON",
        "OMP_NUM_THREADS",
    ]
    environment = os.environ.items()
    return {k: v for k, v in environment if k not in settings and not k.startswith("SLURM")}


def bash(action, target, code=0, script=SCRIPT, **settings):
    environment = without_settings()
    if action == "report":
        environment["PYTHON"] = sys.executable
    for name, value in settings.items():
        environment[name] = str(value)
    command = ["bash", script, action, target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def list_commands(target, **settings):
    return bash("list", target, **settings).splitlines()


def parse(command):
    """The script of a command, and the arguments that it would run with."""
    _, script, *words = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    return module.__name__, tyro.cli(module.Args, args=words)


# --- list ---
@pytest.mark.parametrize(
    ("target", "lines"),
    [("table1", 63), ("figure2", 18), ("controls", 72), ("labels", 22), ("bundled", 7)],
)
def test_every_line_of_a_list_is_a_command_that_its_script_understands(target, lines):
    arguments = [parse(command)[1] for command in list_commands(target)]
    assert len(arguments) == lines
    assert len({args.run_dir for args in arguments}) == lines
    assert all(args.resume for args in arguments)


def test_the_lines_of_table_1_are_those_of_the_paper():
    commands = list_commands("table1")
    first_nine = {parse(command)[1].env_id for command in commands[:9]}
    assert len(first_nine) == 9, "datasets vary fastest: each is downloaded once"
    counts = {
        "--rewards oracle": 27,
        "--rewards imputed --label-fraction 0.01 --reward-model mlp ": 18,
        "--label-fraction 0.01": 36,
        "--alpha 0 ": 9,
        "iql_imputed.py": 27,
        "--num-seeds 5 --num-updates 1000000 ": 63,
    }
    for words, count in counts.items():
        assert sum(words in command for command in commands) == count, words


@pytest.mark.parametrize(("target", "shared"), [("figure2", 14), ("controls", 36), ("labels", 4)])
def test_a_run_that_two_targets_need_is_the_same_line_in_both(target, shared):
    assert len(set(list_commands("table1")) & set(list_commands(target))) == shared


def test_the_lines_of_figure2_and_bundled_have_their_settings():
    runs = [parse(command)[1] for command in list_commands("figure2")]
    assert {args.label_fraction for args in runs if args.rewards == "labeled"} == {0.01, 0.05}
    for command in list_commands("bundled"):
        args = parse(command)[1]
        assert (args.num_seeds, args.num_updates, args.eval_freq) == (3, 10_000, 1_000)


def test_controls_are_both_agents_with_zeros_and_means_on_every_dataset():
    runs = [parse(command) for command in list_commands("controls")]
    for rewards in ("oracle", "imputed", "zero", "mean"):
        for script in ("td3bc_imputed", "iql_imputed"):
            same = [args for name, args in runs if (name, args.rewards) == (script, rewards)]
            assert len({args.env_id for args in same}) == len(same) == 9
    hidden = [args for _, args in runs if args.rewards != "oracle"]
    assert {args.label_fraction for args in hidden} == {0.01}


def test_labels_sweeps_fractions_with_both_reward_models():
    runs = [parse(command)[1] for command in list_commands("labels", FRACTIONS="0.002 0.05")]
    imputed = [args for args in runs if args.rewards == "imputed"]
    sweep = {(args.reward_model, args.label_fraction, args.env_id) for args in imputed}
    assert len(runs) == 10 and len(sweep) == len(imputed) == 8
    assert {fraction for _, fraction, _ in sweep} == {0.002, 0.05}
    assert {model for model, _, _ in sweep} == {"mlp", "gp"}


def test_a_folder_of_files_replaces_the_datasets(tmp_path):
    for name in ("hopper-own.hdf5", "Pusher-v5.hdf5", "notes.txt"):
        (tmp_path / name).touch()
    settings = {"SEEDS": 3, "UPDATES": 50, "OPTIONS": "--eval-workers 4"}
    commands = list_commands("table1", DATASETS=tmp_path, **settings)
    assert len(commands) == 14
    for line in commands:
        assert "--num-seeds 3 --num-updates 50 --eval-workers 4 --run-dir" in line
    start = f"--env-id Pusher-v5 --rewards oracle --dataset-path {tmp_path}/Pusher-v5.hdf5"
    assert start in commands[0]


def test_folders_are_those_that_the_caller_means_and_may_have_spaces(tmp_path):
    (tmp_path / "my data").mkdir()
    (tmp_path / "my data" / "hopper-own.hdf5").touch()
    for line in list_commands("table1", DATASETS="my data", RUNS="my runs"):
        args = parse(line)[1]
        assert args.dataset_path == tmp_path / "my data" / "hopper-own.hdf5"
        assert args.run_dir.parent == tmp_path / "my runs"


@pytest.mark.parametrize("words", [("list", "table2"), ("start", "table1"), ("", "")])
def test_a_wrong_word_is_an_error_with_the_usage(words):
    usage = "usage: bash benchmark.sh list|run|report table1|figure2|controls|labels|bundled"
    assert usage in bash(*words, code=2)


def test_wrong_settings_are_errors(tmp_path):
    assert "no folder DATASETS=/no/such" in bash("list", "table1", code=2, DATASETS="/no/such")
    assert "no .hdf5 files" in bash("list", "table1", code=2, DATASETS=tmp_path)
    assert "JOBS must be" in bash("list", "table1", code=2, JOBS="many")


# --- run: with a stand-in for python, which finishes a run, fails, or takes long ---
@pytest.fixture
def stand_in(tmp_path):
    """Settings under which a run is one call of `stand_in.sh`, noted in `calls`."""
    (tmp_path / "stand_in.sh").write_text(
        f"""run_dir=$(sed 's/.*--run-dir \\([^ ]*\\).*/\\1/' <<<"$*")
        echo "$OMP_NUM_THREADS $run_dir" >>{tmp_path}/calls
        trap 'exit 130' INT; while [[ -e {tmp_path}/slow ]]; do sleep 0.05; done
        if [[ $run_dir == *iql__oracle* && ! -e {tmp_path}/repaired ]]; then exit 2; fi
        mkdir -p "$run_dir" && touch "$run_dir/result.json" && echo "result        of $run_dir"
        """
    )
    return {"PYTHON": f"bash {tmp_path}/stand_in.sh", "RUNS": tmp_path / "runs"}


def calls(tmp_path):
    return (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize("jobs", [1, 2])
def test_run_goes_on_past_a_failure_and_when_repeated_runs_only_that(stand_in, tmp_path, jobs):
    output = bash("run", "bundled", code=1, JOBS=jobs, **stand_in)
    assert len(calls(tmp_path)) == 7
    assert "[7/7] " in output and "failed, 1 of 7:" in output
    assert "iql__oracle" in output.splitlines()[-1]
    (tmp_path / "repaired").touch()
    output = bash("run", "bundled", JOBS=jobs, **stand_in)
    assert output.count("finished before") == 6
    assert len(calls(tmp_path)) == 8


def test_a_finished_run_does_not_finish_one_of_other_settings(stand_in, tmp_path):
    (tmp_path / "repaired").touch()
    bash("run", "bundled", **stand_in)
    assert bash("run", "bundled", **stand_in).count("finished before") == 7
    assert "finished before" not in bash("run", "bundled", UPDATES=7, **stand_in)


def test_a_run_of_table_1_is_not_repeated_for_the_controls(stand_in, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "hopper-own.hdf5").touch()
    (tmp_path / "repaired").touch()
    bash("run", "table1", DATASETS=tmp_path / "data", **stand_in)
    output = bash("run", "controls", DATASETS=tmp_path / "data", **stand_in)
    assert output.count("finished before") == 4
    new = calls(tmp_path)[7:]
    assert len(new) == 4
    assert all("__zero__" in call or "__mean__" in call for call in new)


def test_a_run_killed_by_the_system_does_not_stop_the_others(stand_in, tmp_path):
    text = (tmp_path / "stand_in.sh").read_text()
    (tmp_path / "stand_in.sh").write_text(text.replace("exit 2; fi", "kill -9 $$; fi"))
    assert "failed, 1 of 7:" in bash("run", "bundled", code=1, **stand_in)
    assert len(calls(tmp_path)) == 7


def test_jobs_share_the_cores(stand_in, tmp_path):
    (tmp_path / "repaired").touch()
    bash("run", "bundled", JOBS=10_000, **stand_in)
    assert {call.split()[0] for call in calls(tmp_path)} == {"1"}


def test_jobs_share_the_cores_of_a_slurm_task(stand_in, tmp_path):
    (tmp_path / "repaired").touch()
    bash("run", "bundled", JOBS=2, SLURM_CPUS_PER_TASK=14, **stand_in)
    assert {call.split()[0] for call in calls(tmp_path)} == {"7"}


def test_a_run_that_sigterm_stopped_is_the_last(stand_in, tmp_path):
    text = (tmp_path / "stand_in.sh").read_text()
    (tmp_path / "stand_in.sh").write_text(text.replace("mkdir -p", "exit 143; mkdir -p"))
    bash("run", "bundled", code=130, **stand_in)
    assert len(calls(tmp_path)) == 1


def test_a_repeated_run_adds_to_its_log(stand_in, tmp_path):
    bash("run", "bundled", code=1, JOBS=2, **stand_in)
    log = tmp_path / "runs" / f"{MINI}__iql__oracle__1.log"
    log.write_text("why it failed\n")
    (tmp_path / "repaired").touch()
    bash("run", "bundled", JOBS=2, **stand_in)
    assert log.read_text().startswith("why it failed\n")


def start_run(stand_in, tmp_path):
    """A process of `benchmark.sh run` in the middle of its first run."""
    (tmp_path / "slow").touch()
    environment = without_settings() | {name: str(value) for name, value in stand_in.items()}
    command = ["bash", SCRIPT, "run", "bundled"]
    # As in a terminal: what was started with & ignores Ctrl-C, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    signal.signal(signal.SIGINT, before)
    while not (tmp_path / "calls").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    return process


def test_an_interrupted_run_stops_and_goes_on_when_repeated(stand_in, tmp_path):
    process = start_run(stand_in, tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    assert process.wait(10) != 0
    assert len(calls(tmp_path)) == 1, "it went on with the next run"
    (tmp_path / "slow").unlink()
    (tmp_path / "repaired").touch()
    assert bash("run", "bundled", **stand_in).count("result ") == 7


def test_nothing_is_started_after_the_script_was_killed(stand_in, tmp_path):
    process = start_run(stand_in, tmp_path)
    process.terminate()
    process.wait(10)
    (tmp_path / "slow").unlink()
    while not list(tmp_path.glob("runs/*/command")):  # the run under way ends by itself
        time.sleep(0.05)
    time.sleep(0.3)
    assert len(calls(tmp_path)) == 1, "it went on with the next run"


def test_a_slurm_task_runs_its_own_line_from_the_folder_it_was_submitted_from(stand_in, tmp_path):
    spooled = shutil.copy(SCRIPT, tmp_path / "slurm_script")

    def run_task(number, folder, code=0):
        slurm = {"SLURM_ARRAY_TASK_ID": number, "SLURM_SUBMIT_DIR": folder}
        return bash("run", "bundled", script=spooled, code=code, **stand_in, **slurm)

    run_task(3, ROOT, code=2)
    (tmp_path / "repaired").touch()
    assert "[4/7]" in run_task(3, ROOT)
    assert os.listdir(tmp_path / "runs") == [f"{MINI}__iql__oracle__1"]
    assert "lines 0 to 6, not 7" in run_task(7, ROOT, code=2)
    assert "submit from the folder" in run_task(0, tmp_path, code=2)


# --- report ---
@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of benchmark.sh, as a module."""
    mpl.use("agg")
    path = tmp_path_factory.mktemp("python") / "benchmark_report.py"
    path.write_text(SCRIPT.read_text().split("<<'PYTHON'\n")[1].removesuffix("PYTHON\n"))
    spec = importlib.util.spec_from_file_location("benchmark_report", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def report(python, tmp_path):
    """`benchmark.sh report` of the runs in tmp_path, without a process of its own."""

    def run(target, **settings):
        run_dirs = [shlex.split(line)[-2] for line in list_commands(target, **settings)]
        with redirect_stdout(StringIO()) as output:
            python.main(target, [Path(run_dir) for run_dir in run_dirs])
        return output.getvalue()

    return run


def make_run(folder, name, per_seed, **changes):
    """A finished run whose numbers are known; `changes` are to its config.json and result.json."""
    run_dir = folder / "runs" / "benchmark" / name
    run_dir.mkdir(parents=True)
    common = {"num_updates": 20, "eval_episodes": 10}
    result = {"metric": "score", "mean": np.mean(per_seed), "std": 0.0, "per_seed": per_seed}
    result |= {"versions": VERSIONS, "script_sha256": HASHES[name.split("__")[1]]}
    result |= {"reward_model": {"r2": [0.5] * len(per_seed)} if "imputed" in name else None}
    config = {"num_seeds": len(per_seed), "batch_size": 256, "env_id": name.split("__")[0]}
    (run_dir / "result.json").write_text(json.dumps(result | common | changes))
    (run_dir / "config.json").write_text(json.dumps(config | common | changes))
    rows = ["update,seed,return,score"]
    for update in (10, 20):
        rows += [f"{update},{seed},{score},{score}" for seed, score in enumerate(per_seed)]
    (run_dir / "scores.csv").write_text("\n".join([*rows, ""]))


def find_row(output, *start):
    """The row of a Markdown table that starts with these cells, by the table's header."""
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells[:1] in (["dataset"], ["setting"]):
            header = cells
        if cells and cells[: len(start)] == list(start):
            return dict(zip(header, cells))
    raise AssertionError(f"no row {start} in {output}")


def make_data(folder, *names):
    """A folder for DATASETS, of empty files."""
    (folder / "data").mkdir()
    for name in names:
        (folder / "data" / f"{name}.hdf5").touch()
    return folder / "data"


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A folder with five runs of table 1, and its report, as a user calls it."""
    folder = tmp_path_factory.mktemp("known")
    make_run(folder, "hopper-medium-v2__td3bc__oracle__1", [0.0, 10.0, 20.0, 30.0])
    make_run(folder, "walker2d-medium-v2__td3bc__oracle__1", [40.0, 50.0, 100.0, 700.0])
    make_run(folder, "hopper-medium-v2__iql__labeled__0.01", [0.0] * 4)
    make_run(folder, "walker2d-medium-v2__iql__labeled__0.01", [10.0] * 4)
    make_run(folder, "hopper-medium-v2__td3bc__imputed__0.01", [9.0] * 4)
    shutil.copy(SCRIPT, folder)
    (folder / "td3bc_imputed.py").touch()
    return folder, bash("report", "table1", script=folder / "benchmark.sh")


def test_the_report_has_the_statistics_known_by_hand(known):
    _, output = known
    hopper = find_row(output, "hopper-medium-v2")
    assert hopper["TD3+BC 100%"].startswith("15.0 ± 11.2 (")  # the population's std: 11.18
    assert hopper["TD3+BC 1% + imputed"].startswith("9.0 ± 0.0 (")
    assert hopper["TD3+BC imputed / 100%"] == "0.60"
    # The middle four of 0, 10, 20, 30, 40, 50, 100, 700.
    assert find_row(output, "TD3+BC 100%")["IQM"] == "35.0"
    # Drawn within each task, equal seeds leave no interval.
    labeled = find_row(output, "IQL 1%")
    assert labeled["IQM"] == "5.0" and labeled["95% bootstrap interval"] == "5.0 to 5.0"
    assert labeled["tasks"] == "2"


def test_the_interval_holds_95_of_100_resamples(python):
    """From 2.5 to 97.5%, by chances that can be counted."""
    # Of three draws from 0, 0 and 1, 3.7% are all ones, and 30% all zeros.
    assert tuple(python.interval(np.array([[0.0, 0.0, 1.0]]))) == (0, 1)
    # Of five draws from four zeros and a one, 5.8% hold three ones or more, 0.7% four or more;
    # the mean of the middle three is then 2/3 or more, or 1.
    one = np.array([[0.0, 0.0, 0.0, 0.0, 1.0]])
    assert python.interval(one) == pytest.approx((0, 2 / 3))
    assert python.interval(1 - one) == pytest.approx((1 / 3, 1))


def test_the_figures_of_the_paper_are_all_right(python):
    """By the sums of the columns of its Table 1."""
    paper = python.read_scores(python.PAPER, python.PAPER_SETTINGS)
    sums = {name: sum(paper[key] for key in paper if key[1] == name) for _, name in paper}
    assert list(sums) == python.PAPER_SETTINGS
    expected = [466.7, 677.4, 692.6, 82.66, 103.56, 616.59, 439.42]
    assert list(sums.values()) == pytest.approx(expected)


def test_names_of_datasets_may_hold_the_separator(python):
    assert python.split_name(Path("a__b__iql__oracle__1")) == ("a__b", "iql oracle 1")


def test_the_figures_of_the_paper_and_of_corl_stand_in_brackets(known):
    _, output = known
    hopper = find_row(output, "hopper-medium-v2")
    assert hopper["TD3+BC 100%"].endswith(" (59.3; CORL 60.4)")
    assert hopper["TD3+BC 1%"] == "(11.3)"
    assert hopper["TD3+BC 1% + imputed"].endswith(" (58.1)")
    average = find_row(output, "average")
    assert average["TD3+BC 100%"] == "(75.3; CORL 76.4)" and average["TD3+BC 1%"] == "(9.2)"


def test_the_report_says_what_was_run_and_what_is_missing(known):
    _, output = known
    assert "5 of 63 runs; iql_imputed.py fedcba987, td3bc_imputed.py 012345678;" in output
    assert "num_updates 20, eval_episodes 10, " in output
    assert "num_seeds 4" in output and "torch 2.13.0" in output
    assert output.count("- missing: ") == 58
    assert "- missing: runs/benchmark/hopper-medium-v2__bc__oracle__1" in output


@pytest.mark.parametrize("lost", ["config.json", "scores.csv", "result.json"])
def test_a_run_that_was_not_copied_whole_is_missing(lost, report, tmp_path):
    for setting in ("oracle__1", "imputed__0.01"):
        make_run(tmp_path, f"hopper-medium-v2__td3bc__{setting}", [1.0, 2.0])
    Path("runs/benchmark/hopper-medium-v2__td3bc__oracle__1", lost).unlink()
    output = report("table1")
    assert "- missing: runs/benchmark/hopper-medium-v2__td3bc__oracle__1" in output
    assert find_row(output, "hopper-medium-v2")["TD3+BC 1% + imputed"].startswith("1.5 ± 0.5")


def test_the_csv_file_has_a_row_for_each_run(known):
    folder, _ = known
    with open(folder / "results" / "table1.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    oracle, imputed = rows[0], rows[2]
    names = ("dataset", "algorithm", "rewards", "mean", "paper", "corl", "reward_r2")
    values = ["hopper-medium-v2", "td3bc", "oracle", "15.0", "59.3", "60.37", ""]
    assert [oracle[name] for name in names] == values
    values = ["hopper-medium-v2", "td3bc", "imputed", "9.0", "58.13", "", "0.5"]
    assert [imputed[name] for name in names] == values


def test_the_average_is_over_all_datasets_or_not_given(report, tmp_path):
    data = make_data(tmp_path, "hopper-a", "hopper-b")
    make_run(tmp_path, "hopper-a__iql__oracle__1", [10.0, 12.0])
    make_run(tmp_path, "hopper-b__iql__oracle__1", [11.0, 13.0])
    make_run(tmp_path, "hopper-a__iql__imputed__0.01", [5.0, 6.0])
    output = report("table1", DATASETS=data)
    average = find_row(output, "average")
    assert average["IQL 100%"] == "11.5" and average["IQL 1% + imputed"] == ""
    assert "paper" not in output, "it has no figures for these datasets"


def test_runs_of_another_protocol_are_left_out_and_named(report, tmp_path):
    for setting in ("td3bc__oracle__1", "iql__oracle__1", "bc__oracle__1"):
        make_run(tmp_path, f"{MINI}__{setting}", [1.0, 2.0, 3.0])
    make_run(tmp_path, f"{MINI}__td3bc__imputed__0.01", [99.0] * 3, num_updates=40)
    other = VERSIONS | {"torch": "1.0"}
    make_run(tmp_path, f"{MINI}__iql__imputed__0.01", [99.0] * 3, versions=other)
    output = report("bundled")
    assert "3 of 7 runs" in output and "99.0" not in output
    assert f"- left out, num_updates 40: runs/benchmark/{MINI}__td3bc__imputed" in output
    assert f"- left out, torch 1.0: runs/benchmark/{MINI}__iql__imputed" in output


@pytest.mark.parametrize("name", ["gamma", "tau", "seed", "learning_rate", "reward_epochs"])
def test_a_run_with_another_option_is_of_another_protocol(report, tmp_path, name):
    make_run(tmp_path, f"{MINI}__td3bc__oracle__1", [1.0, 2.0, 3.0])
    make_run(tmp_path, f"{MINI}__iql__oracle__1", [1.0, 2.0, 3.0])
    make_run(tmp_path, f"{MINI}__bc__oracle__1", [99.0] * 3, **{name: 7})
    assert f"- left out, {name} 7" in report("bundled")


def test_a_return_that_is_not_a_number_is_no_traceback(report, tmp_path):
    make_run(tmp_path, f"{MINI}__td3bc__oracle__1", [1.0, 2.0, 3.0], mean=None, std=None)
    path = Path(f"runs/benchmark/{MINI}__td3bc__oracle__1/result.json")
    path.write_text(path.read_text().replace('"per_seed": [1.0', '"per_seed": [null'))
    make_run(tmp_path, f"{MINI}__iql__oracle__1", [1.0, 2.0, 3.0])
    row = find_row(report("bundled"), MINI)
    assert row["TD3+BC 100%"] == "nan ± nan" and row["IQL 100%"] == "2.0 ± 0.8"


@pytest.mark.parametrize(
    ("target", "pictures"),
    [
        ("figure2", ["figure2.png", "curves.png"]),
        ("controls", ["curves.png"]),
        ("bundled", ["overview.png", "figure2.png", "curves.png"]),
    ],
)
def test_every_target_has_a_table_and_its_pictures(report, tmp_path, target, pictures):
    data = make_data(tmp_path, "hopper-a", "hopper-b")
    for k, command in enumerate(list_commands(target, DATASETS=data)):
        run_dir = Path(shlex.split(command)[-2])
        make_run(tmp_path, run_dir.name, [k + 1.0, k + 2.0, k + 3.0])
    output = report(target, DATASETS=data)
    assert "missing" not in output
    files = {f"{target}.csv", *pictures}
    assert set(os.listdir("results")) == files
    assert set(output.splitlines()[-1].split(", ")) == {f"results/{name}" for name in files}
    for name in pictures:
        assert Path("results", name).read_bytes().startswith(b"\x89PNG")


def test_controls_are_said_to_do_worse_as_well_or_better_than_imputation(report, tmp_path):
    scores = {
        "td3bc__imputed": [50.0, 56.0],  # mean 53, std 3
        "td3bc__zero": [43.0, 51.0],  # 47 ± 4: lower by 6, more than sqrt(3² + 4²) = 5
        "td3bc__mean": [44.0, 52.0],  # 48 ± 4: lower by 5
        "iql__imputed": [50.0, 56.0],
        "iql__zero": [54.0, 62.0],  # 58 ± 4: higher by 5
        "iql__mean": [55.0, 63.0],  # 59 ± 4: higher by 6
    }
    for setting, per_seed in scores.items():
        make_run(tmp_path, f"hopper-medium-v2__{setting}__0.01", per_seed)
    make_run(tmp_path, "walker2d-medium-v2__td3bc__zero__0.01", [1.0, 2.0])  # beside nothing
    output = report("controls")
    td3bc, iql = [line for line in output.splitlines() if "imputation scores" in line]
    assert td3bc.startswith("- hopper-medium-v2, TD3+BC: imputation scores 53.0 ± 3.0;")
    assert td3bc.endswith("zero does worse, 47.0 ± 4.0; mean **does as well**, 48.0 ± 4.0")
    assert iql.startswith("- hopper-medium-v2, IQL: imputation scores 53.0 ± 3.0;")
    assert iql.endswith("zero **does as well**, 58.0 ± 4.0; mean **does better**, 59.0 ± 4.0")


def write_dataset(path, rows):
    """Random transitions of Hopper, all labelled, in one episode."""
    generator = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"] = generator.normal(size=(rows, 11))
        file["actions"] = generator.uniform(-1, 1, size=(rows, 3))
        file["rewards"] = generator.normal(size=rows)
        file["terminals"] = np.arange(rows) == rows - 1
        file["timeouts"] = np.zeros(rows, bool)


def test_labels_counts_them_and_gives_score_and_r2_of_both_models(report, tmp_path):
    data = make_data(tmp_path, "hopper-own")
    write_dataset(data / "hopper-own.hdf5", rows=400)
    path = {"dataset_path": str(data / "hopper-own.hdf5")}
    make_run(tmp_path, "hopper-own__td3bc__oracle__1", [20.0, 22.0], **path)
    mlp = {"reward_model": {"r2": [0.25, 0.75]}}
    make_run(tmp_path, "hopper-own__td3bc__imputed__0.01", [3.0, 5.0], **path, **mlp)
    make_run(tmp_path, "hopper-own__td3bc__imputed__0.1", [4.0, 6.0], **path, **mlp)
    gp = {"reward_model": {"r2": [0.9, 0.8]}}
    make_run(tmp_path, "hopper-own__td3bc__imputed-gp__0.01", [7.0, 7.0], **path, **gp)
    output = report("labels", DATASETS=data, FRACTIONS="0.1 0.01 0.001")
    few = find_row(output, "hopper-own", "1%")
    assert few["labels"] == "4" and few["true rewards: score"] == "21.0 ± 1.0"
    assert few["MLP: score"] == "4.0 ± 1.0" and few["MLP: R²"] == "0.500"
    assert few["GP: score"] == "7.0 ± 0.0" and few["GP: R²"] == "0.850"
    many = find_row(output, "hopper-own", "10%")
    assert many["labels"] == "40" and many["MLP: score"] == "5.0 ± 1.0" and many["GP: R²"] == ""
    assert "| 0.1% |" not in output, "no run of that fraction"
    assert "missing: runs/benchmark/hopper-own__td3bc__imputed-gp__0.1" in output
    assert Path("results/labels.png").exists()


def test_labels_without_the_dataset_has_its_table_and_says_what_is_not_drawn(report, tmp_path):
    data = make_data(tmp_path, "hopper-own")
    make_run(tmp_path, "hopper-own__td3bc__imputed__0.01", [3.0, 5.0], dataset_path="moved.hdf5")
    output = report("labels", DATASETS=data, FRACTIONS="0.01")
    assert find_row(output, "hopper-own", "1%")["MLP: score"] == "4.0 ± 1.0"
    assert "cannot be loaded: hopper-own, moved.hdf5" in output
    assert not Path("results/labels.png").exists()


def test_the_first_picture_shows_the_imputed_rewards_of_the_run_itself(python, report, tmp_path):
    data = make_data(tmp_path, "hopper-own")
    write_dataset(data / "hopper-own.hdf5", rows=400)
    run_dir = Path("runs/benchmark/hopper-own__td3bc__imputed__0.01")
    words = f"--env-id hopper-own --dataset-path {data}/hopper-own.hdf5 --run-dir {run_dir}"
    words += " --label-fraction 0.01 --seed 3 --num-seeds 2 --reward-epochs 20"
    words += " --num-updates 2 --eval-episodes 1 --device cpu --compile off"
    td3bc_imputed.main(tyro.cli(td3bc_imputed.Args, args=words.split()))
    run = python.read_run(run_dir)
    true, imputed, num_labels = python.impute_again(run)
    assert num_labels == 4 and len(true) == len(imputed) == 396
    r2 = 1 - np.mean((imputed - true) ** 2) / np.var(true)
    assert r2 == pytest.approx(run.result["reward_model"]["r2"][0], abs=1e-5)
    assert "cannot be loaded" not in report("table1", DATASETS=data)
    assert Path("results/overview.png").exists()


def test_a_dataset_without_imputed_rewards_does_not_break_the_first_picture(report, tmp_path):
    make_run(tmp_path, "hopper-medium-v2__td3bc__oracle__1", [1.0, 2.0])
    make_run(tmp_path, "walker2d-medium-v2__td3bc__imputed__0.01", [1.0, 2.0])  # no checkpoint
    assert "results/overview.png" in report("table1")


def test_bars_stand_beside_the_name_of_their_dataset_also_if_runs_are_missing(python, tmp_path):
    make_run(tmp_path, "hopper-b__iql__oracle__1", [1.0, 2.0])
    run = python.read_run(Path("runs/benchmark/hopper-b__iql__oracle__1"))
    axes = python.plt.figure().subplots(1, 2)
    for each, algorithm in zip(axes, ("td3bc", "iql")):  # the first has no run at all
        python.draw_bars(
            each, {("hopper-b", "iql oracle 1"): run}, ["hopper-a", "hopper-b"], algorithm
        )
    assert axes[0].get_ylim() == axes[1].get_ylim() == (1.5, -0.5)


def test_raw_returns_are_not_averaged_over_tasks(report, tmp_path):
    make_run(tmp_path, "hopper-medium-v2__td3bc__oracle__1", [1.0, 2.0], metric="return")
    output = report("table1")
    assert "1.5 ± 0.5" in output and "average" not in output and "IQM" not in output
    make_run(tmp_path, "walker2d-medium-v2__td3bc__oracle__1", [1.0, 2.0])
    assert "IQM" not in report("table1"), "a return and a score"


def test_curves_of_returns_are_returns(python, tmp_path):
    make_run(tmp_path, "hopper-own__td3bc__oracle__1", [1.0, 3.0], metric="return")
    run = python.read_run(Path("runs/benchmark/hopper-own__td3bc__oracle__1"))
    rows = ["update,seed,return,score", "10,0,1.0,nan", "10,1,3.0,nan"]
    (run.path / "scores.csv").write_text("\n".join(rows))
    axes = python.plt.figure().subplots()
    python.draw_curve(axes, run, ["1"])
    assert axes.lines[0].get_ydata() == [2]


def test_bars_are_named_by_what_they_are(python, tmp_path):
    runs = {}
    for setting, score in (("labeled__0.01", 1.0), ("imputed__0.01", 2.0), ("oracle__1", 3.0)):
        make_run(tmp_path, f"hopper-own__iql__{setting}", [score, score])
        run = python.read_run(Path(f"runs/benchmark/hopper-own__iql__{setting}"))
        runs[run.dataset, run.setting] = run
    axes = python.plt.figure().subplots()
    python.draw_bars(axes, runs, ["hopper-own"], "iql")
    handles, labels = axes.get_legend_handles_labels()
    widths = {label: handle[0].get_width() for handle, label in zip(handles, labels)}
    assert widths == {"1% of rewards": 1, "1% + imputed": 2, "100%": 3}


def test_without_a_finished_run_the_report_says_so(tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    (tmp_path / "td3bc_imputed.py").touch()
    output = bash("report", "bundled", code=1, script=tmp_path / "benchmark.sh")
    assert "no finished run of bundled in runs/benchmark" in output


def test_python_may_be_several_words(tmp_path):
    python = f"env 'A=two words' {sys.executable}"
    output = bash("report", "bundled", 1, RUNS=tmp_path, PYTHON=python)
    assert "no finished run of bundled" in output
