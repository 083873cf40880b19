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


def make_data(folder, *names):
    """A folder for DATASETS, of empty files."""
    (folder / "data").mkdir()
    for name in names:
        (folder / "data" / f"{name}.hdf5").touch()
    return folder / "data"


def list_commands(target, **settings):
    return bash("list", target, **settings).splitlines()


def parse_all(line):
    """Of each command for Python in a line: its script, and the arguments that it would run with."""
    found = []
    for command in line.replace(" || ", " && ").split(" && "):
        python, script, *words = shlex.split(command)
        if python == "python":
            module = importlib.import_module(script.removesuffix(".py"))
            found.append((module.__name__, tyro.cli(module.Args, args=words)))
    return found


def parse(line):
    return parse_all(line)[-1]


def find_run_dir(line):
    words = shlex.split(line)
    return Path(words[len(words) - words[::-1].index("--run-dir")])


# --- list ---
@pytest.mark.parametrize(
    ("target", "lines"),
    [
        ("table1", 63),
        ("figure2", 18),
        ("controls", 72),
        ("labels", 64),
        ("bundled", 7),
        ("newtask", 43),
    ],
)
def test_every_line_of_a_list_is_a_run_of_its_own(target, lines):
    commands = list_commands(target)
    assert len(commands) == len({find_run_dir(line) for line in commands}) == lines


@pytest.mark.parametrize("target", ["figure2", "controls", "labels", "bundled"])
def test_every_line_of_a_list_is_understood_by_its_script(target, tmp_path):
    data = make_data(tmp_path, "hopper-own")
    for line in list_commands(target, DATASETS=data, SEEDS=1, FRACTIONS="0.1"):
        script, args = parse(line)
        assert script == "reward_model" or args.resume


def test_the_lines_of_table_1_are_those_of_the_paper():
    commands = list_commands("table1")
    first_nine = {command.split()[3] for command in commands[:9]}
    assert len(first_nine) == 9, "datasets vary fastest: each is downloaded once"
    counts = {
        "--rewards oracle": 27,
        "--rewards imputed --label-fraction 0.01 ": 18,
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
    labeled = [line for line in list_commands("figure2") if "--rewards labeled" in line]
    assert len(labeled) == 8 and sum("--label-fraction 0.05" in line for line in labeled) == 4
    for line in list_commands("bundled"):
        assert "--num-seeds 3 --num-updates 10000 --eval-freq 1000 " in line


def test_controls_are_both_agents_with_zeros_and_means_on_every_dataset():
    lines = list_commands("controls")
    for rewards in ("oracle", "imputed", "zero", "mean"):
        for script in ("td3bc_imputed.py", "iql_imputed.py"):
            same = [x.split() for x in lines if script in x and f"--rewards {rewards} " in x]
            assert len({words[3] for words in same}) == len(same) == 9
    hidden = [line for line in lines if "--rewards oracle" not in line]
    assert all("--label-fraction 0.01 " in line for line in hidden)


@pytest.fixture(scope="module")
def few_labels():
    """The commands in each line of the target labels."""
    lines = list_commands("labels", FRACTIONS="0.05 0.002", SEEDS=2)
    return [parse_all(line) for line in lines]


def test_labels_judges_the_reward_models_in_one_run_of_a_dataset(few_labels):
    sweeps = [args for ((script, args), *_) in few_labels if getattr(args, "sweep", False)]
    assert len({args.env_id for args in sweeps}) == len(sweeps) == 2
    for args in sweeps:
        assert (args.label_fraction, args.num_seeds) == (0.05, 2), "up to the most labels"


def test_labels_trains_all_seeds_at_once_by_the_papers_reward_model(few_labels):
    agents = [commands[0][1] for commands in few_labels if commands[0][0] == "td3bc_imputed"]
    imputed = [args for args in agents if args.rewards == "imputed"]
    runs = {(args.env_id, args.label_fraction) for args in imputed}
    assert len(runs) == len(imputed) == 4
    assert {args.num_seeds for args in imputed} == {2}


def test_labels_completes_and_trains_by_the_gaussian_process_seed_by_seed(few_labels):
    runs = set()
    for (first, complete), (second, train) in (x for x in few_labels if len(x) == 2):
        assert (first, second) == ("reward_model", "td3bc_imputed")
        assert (complete.reward_model, train.num_seeds) == ("gp", 1)
        assert complete.output_path == train.dataset_path and complete.env_id == train.env_id
        assert complete.seed == train.seed and complete.run_dir != train.run_dir
        assert train.label_fraction is None and train.rewards == "imputed"
        runs.add((complete.env_id, complete.label_fraction, complete.seed))
    assert len(runs) == 2 * 2 * 2
    assert {seed for _, _, seed in runs} == {0, 1}


def test_a_dataset_completed_from_another_file_is_not_taken_for_this_one(tmp_path):
    completed = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "hopper-own.hdf5").touch()
        settings = {"DATASETS": tmp_path / name, "RUNS": tmp_path / "runs", "FRACTIONS": "0.1"}
        commands = [parse_all(line) for line in list_commands("labels", SEEDS=1, **settings)]
        completed.append(commands[-1][0][1].output_path)
    assert completed[0] != completed[1]


def test_a_folder_of_files_replaces_the_datasets(tmp_path):
    for name in ("hopper-own.hdf5", "Pusher-v5.hdf5", "notes.txt"):
        (tmp_path / name).touch()
    settings = {"SEEDS": 3, "UPDATES": 50, "OPTIONS": "--eval-workers 4"}
    commands = list_commands("table1", DATASETS=tmp_path, **settings)
    assert len(commands) == 14
    for line in commands:
        assert "--num-seeds 3 --num-updates 50 --eval-workers 4 --run-dir" in line
    start = f"--env-id Pusher-v5 --dataset-path {tmp_path}/Pusher-v5.hdf5 --rewards oracle"
    assert start in commands[0]


def test_folders_are_those_that_the_caller_means_and_may_have_spaces(tmp_path):
    (tmp_path / "my data").mkdir()
    (tmp_path / "my data" / "hopper-own.hdf5").touch()
    settings = {"FRACTIONS": "0.1", "SEEDS": 1}
    for line in list_commands("labels", DATASETS="my data", RUNS="my runs", **settings):
        args = parse_all(line)[0][1]
        assert args.dataset_path == tmp_path / "my data" / "hopper-own.hdf5"
        assert args.run_dir.is_relative_to(tmp_path / "my runs")


@pytest.mark.parametrize("words", [("list", "table2"), ("start", "table1"), ("", "")])
def test_a_wrong_word_is_an_error_with_the_usage(words):
    usage = (
        "usage: bash benchmark.sh list|run|report table1|figure2|controls|labels|bundled|newtask"
    )
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


def test_a_dataset_is_completed_once_also_if_its_agent_is_run_again(stand_in, tmp_path):
    data = make_data(tmp_path, "hopper-own")
    settings = {"DATASETS": data, "FRACTIONS": "0.1", "SEEDS": 1, **stand_in}
    # reward_model.py's run writes the completed dataset; the first training on it fails.
    text = (tmp_path / "stand_in.sh").read_text()
    fail = f"if [[ $* == *full.hdf5* && ! -e {tmp_path}/repaired ]]; then exit 2; fi"
    complete = 'if [[ $* == *--output-path* ]]; then touch "$run_dir/full.hdf5"; exit; fi'
    text = text.replace("if [[ $run_dir", f"{complete}; {fail}; if [[ $run_dir")
    (tmp_path / "stand_in.sh").write_text(text)
    assert "failed, 1 of 4:" in bash("run", "labels", code=1, **settings)
    run_dir = tmp_path / "runs" / "hopper-own__td3bc__imputed-gp__0.1" / "seed0"
    _, _, _, complete, train = [Path(call.split()[1]) for call in calls(tmp_path)]
    assert complete.parent == train == run_dir
    (tmp_path / "repaired").touch()
    assert bash("run", "labels", **settings).count("finished before") == 3
    assert [Path(call.split()[1]) for call in calls(tmp_path)[5:]] == [run_dir]
    assert bash("run", "labels", **settings).count("finished before") == 4


def test_a_dataset_that_could_not_be_completed_is_not_trained_on(stand_in, tmp_path):
    settings = {"DATASETS": make_data(tmp_path, "hopper-own"), "FRACTIONS": "0.1", "SEEDS": 1}
    text = (tmp_path / "stand_in.sh").read_text()
    text = text.replace(
        "if [[ $run_dir", "if [[ $* == *--output-path* ]]; then exit 2; fi; if [[ $run_dir"
    )
    (tmp_path / "stand_in.sh").write_text(text)
    assert "failed, 1 of 4:" in bash("run", "labels", code=1, **settings, **stand_in)
    assert len(calls(tmp_path)) == 4


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
def report(python, monkeypatch, tmp_path):
    """`benchmark.sh report` of the runs in tmp_path, without a process of its own."""

    def run(target, pictures=False, **settings):
        run_dirs = [find_run_dir(line) for line in list_commands(target, **settings)]
        with monkeypatch.context() as patch, redirect_stdout(StringIO()) as output:
            for name in ("curves", "figure2", "overview", "labels", "new_tasks"):
                if not pictures:
                    patch.setattr(python, f"draw_{name}", lambda *args: None)
            python.main(target, run_dirs)
        return output.getvalue()

    return run


def make_run(folder, name, per_seed, **changes):
    """A finished run whose numbers are known; `changes` are to its config.json and result.json."""
    run_dir = folder / "runs" / "benchmark" / name
    run_dir.mkdir(parents=True)
    result = {"metric": "score", "per_seed": per_seed, "versions": VERSIONS}
    result |= {"mean": np.mean(per_seed), "std": np.std(per_seed)}
    result |= {"reward_model": {"r2": [0.5] * len(per_seed) if "imputed" in name else []}}
    config = {"num_updates": 20, "eval_episodes": 10, "batch_size": 256, "seed": 0}
    config |= {"num_seeds": len(per_seed), "env_id": name.split("__")[0]}
    config |= {"script_sha256": HASHES[name.split("__")[1]]}
    (run_dir / "result.json").write_text(json.dumps(result | changes))
    (run_dir / "config.json").write_text(json.dumps(config | changes))
    rows = ["update,seed,return,score"]
    for update in (10, 20):
        rows += [f"{update},{seed},{score},{score}" for seed, score in enumerate(per_seed)]
    (run_dir / "scores.csv").write_text("\n".join([*rows, ""]))


def find_row(output, *start):
    """The row of a Markdown table that starts with these cells, by the table's header."""
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells[:1] in (["dataset"], ["setting"], ["task"], ["labels"]):
            header = cells
        if cells and cells[: len(start)] == list(start):
            return dict(zip(header, cells))
    raise AssertionError(f"no row {start} in {output}")


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


def test_the_published_figures_are_all_right(python):
    """By the sums of the columns of the paper's Table 1, and CORL's averages over the nine."""
    paper, corl = python.read_published()
    sums = {name: sum(paper[key] for key in paper if key[1] == name) for _, name in paper}
    assert list(sums) == python.PAPER_SETTINGS
    expected = [466.7, 677.4, 692.6, 82.66, 103.56, 616.59, 439.42]
    assert list(sums.values()) == pytest.approx(expected)
    means = [
        np.mean([corl[key] for key in corl if key[1] == name]) for name in python.CORL_SETTINGS
    ]
    assert means == pytest.approx([50.40, 76.45, 81.63], abs=0.01)


def test_names_of_datasets_may_hold_the_separator(python):
    assert python.split_name(Path("a__b__iql__oracle__1")) == ("a__b", "iql oracle 1")
    path = Path("a__b__td3bc__imputed-gp__0.1", "seed3")
    assert python.split_name(path) == ("a__b", "td3bc imputed-gp 0.1")


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
    make_run(tmp_path, f"{MINI}__td3bc__oracle__1", [1.0, 2.0, 3.0])
    path = Path(f"runs/benchmark/{MINI}__td3bc__oracle__1/result.json")
    path.write_text(path.read_text().replace('"per_seed": [1.0', '"per_seed": [null'))
    make_run(tmp_path, f"{MINI}__iql__oracle__1", [1.0, 2.0, 3.0])
    row = find_row(report("bundled"), MINI)
    assert row["TD3+BC 100%"] == "nan ± nan" and row["IQL 100%"] == "2.0 ± 0.8"


@pytest.mark.parametrize(
    ("target", "pictures"),
    [
        ("controls", ["curves.png"]),
        ("bundled", ["overview.png", "figure2.png", "curves.png"]),
    ],
)
def test_a_target_has_a_table_and_its_pictures(report, tmp_path, target, pictures):
    data = make_data(tmp_path, "hopper-a", "hopper-b")
    for k, command in enumerate(list_commands(target, DATASETS=data)):
        run_dir = find_run_dir(command)
        make_run(tmp_path, run_dir.name, [k + 1.0, k + 2.0, k + 3.0])
    output = report(target, pictures=True, DATASETS=data)
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


def make_desk(folder, name, num_labels, table=()):
    """What reward_model.py leaves: a sweep, or beside a completed dataset."""
    run_dir = folder / "runs" / "benchmark" / name
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text("{}")
    result = {"num_labels": num_labels, "table": list(table), "quality": {"gp": {"r2": [0.9]}}}
    (run_dir / "result.json").write_text(json.dumps(result))


def test_labels_has_a_table_of_scores_and_one_of_r2_and_its_picture(report, tmp_path):
    """The seeds of the Gaussian process are runs of their own, one result in the table."""
    data = make_data(tmp_path, "hopper-own")
    make_run(tmp_path, "hopper-own__td3bc__oracle__1", [20.0, 22.0])
    make_run(tmp_path, "hopper-own__td3bc__imputed__0.01", [3.0, 5.0])
    for seed, score in ((0, 6.0), (1, 10.0)):
        name = f"hopper-own__td3bc__imputed-gp__0.01/seed{seed}"
        make_run(tmp_path, name, [score], seed=seed)
        make_desk(tmp_path, f"{name}/gp-1234", num_labels=1234)
    table = []
    for model, r2 in (("mlp", [0.25, 0.75]), ("gp", [0.8, 0.9]), ("linear", [None, 0.3])):
        table.append({"labels": 1000, "model": model, "r2": r2})
        table.append({"labels": 1234, "model": model, "r2": [0.9, 0.9]})
    make_desk(tmp_path, "hopper-own__reward_model__sweep__0.1", 1234, table)
    output = report("labels", DATASETS=data, FRACTIONS="0.1 0.01", SEEDS=2, pictures=True)
    assert "5 of 8 runs" in output and "seed 0, num_seeds 2" in output
    scores, r2s = output.split("Reward models:")
    row = find_row(scores, "hopper-own", "1%")
    assert row["labels"] == "1,234" and row["true rewards"] == "21.0 ± 1.0"
    assert row["rewards by MLP"] == "4.0 ± 1.0" and row["rewards by GP"] == "8.0 ± 2.0"
    row = find_row(r2s, "hopper-own", "1,000")
    assert row["MLP"] == "0.500 ± 0.250" and row["GP"] == "0.850 ± 0.050"
    assert row["linear"] == "nan ± nan"
    assert find_row(r2s, "hopper-own", "1,234")["MLP"] == "0.900 ± 0.000"
    assert output.count("missing: ") == 3 and "imputed-gp__0.1/seed1" in output
    assert Path("results/labels.png").exists()
    with open("results/labels.csv") as file:
        rows = {row["rewards"]: row for row in csv.DictReader(file)}
    assert rows["imputed-gp"]["seeds"] == "2" and rows["imputed-gp"]["mean"] == "8.0"


# --- newtask ---
def test_a_new_tasks_log_is_scored_once_before_its_command(tmp_path):
    lines = list_commands("newtask", SEEDS=2)
    assert len(lines) == 2 * (3 + 2 * 6) + 3 * 2
    for line in lines:
        words = line.split()
        scored = words[words.index("-e") + 1].rstrip(";")
        assert f"--path {scored} && " in line and "export PYTHONPATH=tests; " in line
        assert "--env-id new_tasks:HalfCheetahSpeed2-v0 " in line or "--env-id Pendulum-v1 " in line
    args = parse_all(lines[0].split(" && ")[1])[0][1]
    assert (args.num_updates, args.rewards) == (16_000, "oracle")
    assert args.num_updates % args.eval_freq == 0


def test_a_new_task_has_as_many_labels_as_it_says():
    rows = {"halfcheetah-medium-replay-mini": 99_900, "pendulum": 19_900}
    for line in list_commands("newtask", SEEDS=1):
        for words in line.split(" && ")[1:]:
            for _, args in parse_all(words):
                setting = str(args.run_dir).split("__")[3].split("/")[0]
                if setting in ("30", "100", "300") and args.label_fraction:
                    name = next(name for name in rows if name in str(args.run_dir))
                    assert abs(round(args.label_fraction * rows[name]) - int(setting)) <= 1


def test_old_logs_that_are_there_add_their_tasks(tmp_path):
    data = make_data(tmp_path, "halfcheetah-medium-replay", "hopper-medium-replay", "hopper-own")
    run_dirs = [find_run_dir(line) for line in list_commands("newtask", DATASETS=data)]
    names = [str(path.relative_to("runs/benchmark")) for path in run_dirs]
    tasks = dict.fromkeys(name.split("__")[0] for name in names)
    assert list(tasks) == [
        "halfcheetah-medium-replay-mini-speed2",
        "pendulum",
        "halfcheetah-medium-replay-speed3",
        "halfcheetah-medium-replay-speed4",
        "hopper-medium-replay-speed0",
    ]


def test_the_report_of_new_tasks_has_the_returns_known_by_hand(report, tmp_path):
    task = "halfcheetah-medium-replay-mini-speed2"
    (tmp_path / "runs" / "benchmark").mkdir(parents=True)
    log = tmp_path / "runs" / "benchmark" / f"{task}.hdf5"
    with h5py.File(log, "w") as file:
        file["rewards"] = np.arange(6.0)  # two episodes, of return 0 + 1 + 2 and 3 + 4 + 5
        file["terminals"] = np.zeros(6, bool)
        file["timeouts"] = np.arange(6) == 2
    common = {"metric": "return", "dataset_path": str(log)}
    make_run(tmp_path, f"{task}__td3bc__oracle__1", [100.0, 120.0], **common)
    make_run(tmp_path, f"{task}__bc__oracle__1", [-10.0, -10.0], **common)
    make_run(tmp_path, f"{task}__td3bc__mean__100", [1.0, 3.0], **common)
    make_run(tmp_path, f"{task}__td3bc__zero__100", [7.0, 9.0], **common)
    for number, score in ((100, 50.0), (1000, 60.0)):
        for seed in (0, 1):
            name = f"{task}__td3bc__imputed-gp__{number}/seed{seed}"
            make_run(tmp_path, name, [score + seed], seed=seed, num_updates=40, **common)
            make_desk(tmp_path, f"{name}/gp-1", num_labels=number)
            with h5py.File(tmp_path / "runs/benchmark" / name / "gp-1/full.hdf5", "w") as file:
                file["rewards"], file["labeled"] = np.ones(6), np.arange(6) == 0
    output = report("newtask", SEEDS=2, pictures=True)
    row = find_row(output, "HalfCheetah-mini, 2 m/s", "TD3+BC")
    assert row["all rewards"] == "110.0 ± 10.0" and row["BC"] == "-10.0 ± 0.0"
    assert row["100 labels + imputed (GP)"] == "50.5 ± 0.5 (R² 0.90)"
    assert row["+ mean"] == "2.0 ± 1.0" and row["+ zeros"] == "8.0 ± 1.0"
    assert row["the log's mean"] == "7.5" and row["100 labels alone"] == ""
    assert find_row(output, "1,000") == {
        "labels": "1,000",
        "R²": "0.900 ± 0.000",
        "return": "60.5 ± 0.5",
    }
    assert Path("results/newtask.png").exists() and Path("results/curves.png").exists()


def test_a_result_that_lacks_a_seed_is_not_compared_with_whole_ones(report, tmp_path):
    data = make_data(tmp_path, "hopper-own")
    make_run(tmp_path, "hopper-own__td3bc__oracle__1", [20.0, 22.0])
    make_run(tmp_path, "hopper-own__td3bc__imputed__0.01", [3.0, 5.0])
    make_run(tmp_path, "hopper-own__td3bc__imputed-gp__0.01/seed1", [99.0], seed=1)
    output = report("labels", DATASETS=data, FRACTIONS="0.01", SEEDS=2)
    assert "99.0" not in output and "- left out, seed 1, num_seeds 1: " in output
    assert "missing: runs/benchmark/hopper-own__td3bc__imputed-gp__0.01/seed0" in output


def test_one_seed_has_no_interval(report, tmp_path):
    for setting in ("oracle__1", "imputed__0.01", "labeled__0.01"):
        make_run(tmp_path, f"hopper-medium-v2__td3bc__{setting}", [5.0])
    output = report("table1")
    assert find_row(output, "hopper-medium-v2")["TD3+BC 1%"] == "5.0 (11.3)"
    assert find_row(output, "TD3+BC 1%")["95% bootstrap interval"] == "needs several seeds"
    assert "5.0 ±" not in output


def test_one_thing_has_one_color_in_all_pictures(python):
    assert python.REWARDS.keys() < python.COLORS.keys()
    assert len(set(python.COLORS.values())) == len(python.COLORS)


def test_the_runs_behind_the_readme_can_be_read(report, tmp_path):
    """They are of older scripts, which wrote other files: the same numbers, in other places."""
    data, runs = make_data(tmp_path, "hopper-medium-replay"), ROOT / ".github" / "runs"
    output = report("figure2", DATASETS=data, RUNS=runs)
    row = find_row(output, "hopper-medium-replay")
    assert row["TD3+BC 100%"] == "32.6 ± 5.6" and row["IQL 1% + imputed"] == "31.6 ± 2.8"
    assert row["BC"] == "18.0 ± 7.5" and row["IQL 1%"] == "3.3 ± 2.0"
    path = runs / "hopper-medium-replay__bc__oracle__1" / "result.json"
    assert f"td3bc_imputed.py {json.loads(path.read_text())['script_sha256'][:9]}" in output


def test_the_lines_of_labels_leave_what_the_report_reads(report, tmp_path):
    """For real, but with a process that has all scripts loaded already."""
    data = make_data(tmp_path, "hopper-own")
    write_dataset(data / "hopper-own.hdf5", rows=400)
    options = "--eval-episodes 1 --device cpu --compile off"
    settings = {"SEEDS": 1, "UPDATES": 2, "OPTIONS": options, "FRACTIONS": "0.02"}
    lines = list_commands("labels", DATASETS=data, **settings)
    for line in (lines[0], lines[-1]):  # a sweep, a dataset completed and trained on
        for script, args in parse_all(line):
            if script == "reward_model" and args.output_path:
                args.output_path.parent.mkdir(parents=True)
            importlib.import_module(script).main(args)
    output = report("labels", DATASETS=data, **settings)
    assert "2 of 4 runs" in output and "left out" not in output
    row = find_row(output, "hopper-own", "2%")
    assert row["labels"] == "8" and row["rewards by GP"] != ""
    assert find_row(output.split("Reward models:")[1], "hopper-own", "8")["MLP"] != ""
    # The agent was trained on what was imputed from its own seed's labels.
    run_dir = Path("runs/benchmark/hopper-own__td3bc__imputed-gp__0.02/seed0")
    (path,) = run_dir.glob("gp-*/full.hdf5")
    with h5py.File(path) as file, h5py.File(data / "hopper-own.hdf5") as source:
        rows = td3bc_imputed.choose_labels(source["rewards"][:], 0.02, range(1))
        np.testing.assert_array_equal(np.flatnonzero(file["labeled"]), rows[0])
    config = json.loads((run_dir / "config.json").read_text())
    assert (config["dataset_path"], config["seed"]) == (str(path), 0)


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
    assert "cannot be loaded" not in report("table1", pictures=True, DATASETS=data)
    assert Path("results/overview.png").exists()


def test_the_first_picture_does_without_a_checkpoint_or_with_one_of_an_older_script(
    python, tmp_path
):
    make_run(tmp_path, "hopper-a__td3bc__oracle__1", [1.0, 2.0])
    make_run(tmp_path, "hopper-b__td3bc__imputed__0.01", [1.0, 2.0])
    make_run(tmp_path, "hopper-c__td3bc__imputed__0.01", [1.0, 2.0])
    path = Path("runs/benchmark/hopper-c__td3bc__imputed__0.01")
    (path / "checkpoint.pt").write_bytes(b"of other names")
    config = json.loads((path / "config.json").read_text())
    del config["script_sha256"]
    (path / "config.json").write_text(json.dumps(config))
    found = map(python.read_run, sorted(path.parent.iterdir()))
    axes = python.plt.figure().subplots()
    runs = {(run.dataset, run.setting): run for run in found}
    python.draw_rewards(axes, runs, ["hopper-a", "hopper-b", "hopper-c"])
    assert axes.get_title().startswith("No run") and not axes.lines


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
    (run.paths[0] / "scores.csv").write_text("\n".join(rows))
    axes = python.plt.figure().subplots()
    python.draw_curve(axes, python.read_run(run.paths[0]), ["1"])
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
    assert widths == {"1%": 1, "1% + imputed": 2, "100%": 3}


def test_without_a_finished_run_the_report_says_so(tmp_path):
    python = f"env 'A=two words' {sys.executable}"  # PYTHON may be several words
    output = bash("report", "bundled", 1, RUNS=tmp_path, PYTHON=python)
    assert f"no finished run of bundled in {tmp_path}" in output
