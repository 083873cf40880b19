#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# The paper's Table 1 and Figure 2, and more, from one script:
#
#   bash benchmark.sh list table1      its commands, one per line
#   bash benchmark.sh run table1       run those not finished; may be interrupted (Ctrl-C, kill %1)
#                                      and repeated
#   bash benchmark.sh report table1    Markdown tables; results/table1.csv and pictures beside it,
#                                      which replace another target's
#   sbatch --array=0-62%8 benchmark.sh run table1      on a SLURM cluster, one command per task
#
# Targets:
#   table1     9 D4RL datasets x (all rewards, 1% labeled, 1% imputed) x (TD3+BC, IQL), and
#              behaviour cloning: 63 runs; its report draws overview.png, figure2.png, curves.png
#   figure2    2 of these datasets: their 14 runs of table1, and 4 more with 5% labeled: 18 runs
#   controls   all 9 with every hidden reward set to zero or to the mean of the labels, and with all
#              and with imputed rewards to compare: 72 runs, 36 of them table1's
#   labels     the 2 of figure2: TD3+BC with rewards imputed from few to many labels, by the paper's
#              reward model and by the Gaussian process (not in the paper): 22 runs; its report
#              draws labels.png
#   bundled    table1 on the bundled dataset with 3 seeds and 10,000 updates, half an hour on two
#              cores: 7 runs
#
# Settings, from the environment (defaults in parentheses):
#   DATASETS   a folder of D4RL-schema files that replace the target's datasets (named
#              halfcheetah-*.hdf5, hopper-*.hdf5, walker2d-*.hdf5, or after any other Gymnasium
#              environment)
#   JOBS       runs at a time (1)
#   SEEDS      seeds of each run (5; bundled: 3)
#   UPDATES    updates of each run (1000000; bundled: 10000)
#   FRACTIONS  of labelled transitions, for the target labels (0.00003 0.0001 0.0003 0.001 0.01);
#              0.00005 0.00015 0.0005 0.0015 0.005 are 10 to 1,000 labels of 200,000 transitions
#   OPTIONS    more options for every run, such as --eval-workers 8
#   RUNS       where the run directories are (runs/benchmark, beside this script)
#   PYTHON     (python); may be several words, such as
#              "uv run --with-requirements requirements.txt python"
set -uo pipefail

fail() { echo "error: $*" >&2 && exit 2; }

targets="table1|figure2|controls|labels|bundled"
action=${1:-} target=${2:-}
[[ $action =~ ^(list|run|report|one)$ && $target =~ ^($targets)$ ]] ||
    fail "usage: bash benchmark.sh list|run|report $targets"
[[ -z ${DATASETS:-} || -d $DATASETS ]] || fail "no folder DATASETS=$DATASETS"
[[ -z ${DATASETS:-} ]] || DATASETS=$(realpath "$DATASETS")
[[ ${RUNS:-/} == /* ]] || RUNS=$PWD/$RUNS
self=$(realpath "$0") home=$(dirname "$(realpath "$0")")
# SLURM runs a copy of this script from elsewhere.
[[ -e $home/td3bc_imputed.py ]] || home=${SLURM_SUBMIT_DIR:-$home}
cd "$home" && [[ -e td3bc_imputed.py ]] ||
    fail "no td3bc_imputed.py in $home: submit from the folder of the scripts"
jobs=${JOBS:-1} runs=${RUNS:-runs/benchmark} python=${PYTHON:-python}
[[ $jobs =~ ^[1-9][0-9]*$ ]] || fail "JOBS must be a positive number, not $jobs"
cores=${SLURM_CPUS_PER_TASK:-$(getconf _NPROCESSORS_ONLN)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + jobs - 1) / jobs))}

# Datasets, and settings: algorithm, rewards, fraction of labels.
seeds=5 updates=1000000 more=""
read -ra fractions <<<"${FRACTIONS:-0.00003 0.0001 0.0003 0.001 0.01}"
datasets=({halfcheetah,hopper,walker2d}-medium{,-replay,-expert}-v2)
two_datasets=(walker2d-medium-replay-v2 halfcheetah-medium-expert-v2)
settings=({td3bc,iql}" "{"oracle 1","labeled 0.01","imputed 0.01"} "bc oracle 1")
case $target in
    figure2)
        datasets=("${two_datasets[@]}")
        settings=({td3bc,iql}" "{"oracle 1","labeled 0.01","labeled 0.05","imputed 0.01"})
        settings+=("bc oracle 1") ;;
    controls) settings=({td3bc,iql}" "{"oracle 1","imputed 0.01","zero 0.01","mean 0.01"}) ;;
    labels)
        datasets=("${two_datasets[@]}") settings=("td3bc oracle 1")
        for fraction in "${fractions[@]}"; do
            settings+=("td3bc imputed $fraction" "td3bc imputed-gp $fraction")
        done ;;
    bundled)
        datasets=(halfcheetah-medium-replay-mini)
        seeds=3 updates=10000 more=" --eval-freq 1000" ;;
esac
if [[ -n ${DATASETS:-} ]]; then
    datasets=()
    while read -r file; do datasets+=("$(basename "$file" .hdf5)"); done < <(
        find "$DATASETS" -maxdepth 1 -name \*.hdf5 | LC_ALL=C sort
    )
    ((${#datasets[@]})) || fail "no .hdf5 files in DATASETS=$DATASETS"
fi

# Datasets vary fastest: runs started together download different files, and each file once.
run_dirs() {
    for setting in "${settings[@]}"; do
        for dataset in "${datasets[@]}"; do echo "$runs/${dataset}__${setting// /__}"; done
    done
}
commands() {
    for setting in "${settings[@]}"; do
        for dataset in "${datasets[@]}"; do
            read -r algorithm rewards fraction <<<"$setting"
            script=${algorithm/#bc/td3bc}_imputed.py run_dir=$runs/${dataset}__${setting// /__}
            options=(--env-id "$dataset" --rewards "${rewards%-gp}")
            [[ -z ${DATASETS:-} ]] || options+=(--dataset-path "$DATASETS/$dataset.hdf5")
            [[ $rewards == oracle ]] || options+=(--label-fraction "$fraction")
            [[ $rewards != imputed ]] || options+=(--reward-model mlp)
            [[ $rewards != imputed-gp ]] || options+=(--reward-model gp)
            [[ $algorithm != bc ]] || options+=(--alpha 0)
            options+=(--num-seeds "${SEEDS:-$seeds}" --num-updates "${UPDATES:-$updates}")
            echo "$python $script$(printf " %q" "${options[@]}")$more${OPTIONS:+ $OPTIONS}" \
                "--run-dir $(printf "%q" "$run_dir") --resume"
        done
    done
}

# Run one line of the list, by its number from 0; what fails is noted in the file $FAILED.
one() {
    local number=$1 total command run_dir code
    total=$(run_dirs | wc -l)
    command=$(commands | sed -n "$((number + 1))p") run_dir=$(run_dirs | sed -n "$((number + 1))p")
    [[ -n $command ]] || fail "$target has lines 0 to $((total - 1)), not $number"
    if [[ -e $run_dir/result.json && $(cat "$run_dir/command" 2>/dev/null) == "$command" ]]; then
        echo "[$((number + 1))/$total] finished before: $run_dir"
        return 0
    fi
    echo "[$((number + 1))/$total] $command"
    if ((jobs > 1)); then # several progress bars at once would overwrite each other
        mkdir -p "$runs" && eval "$command" >>"$run_dir.log" 2>&1
    else
        eval "$command"
    fi
    code=$?
    if ((code)); then
        echo "[$((number + 1))/$total] failed with exit code $code: $command"
        [[ -z ${FAILED:-} ]] || echo "$command" >>"$FAILED"
        return $code
    fi
    echo "$command" >"$run_dir/command" # finished by this command; another one runs it again
    ((jobs == 1)) || echo "[$((number + 1))/$total] $(tail -n 1 "$run_dir.log")"
}

case $action in
    list) commands; exit ;;
    one) # for xargs, which goes on after any code but 255: after Ctrl-C or SIGTERM none begins,
        # nor after `run` was killed
        kill -0 "${RUNNER:-$$}" 2>/dev/null || exit 255
        one "$3"
        case $? in 130 | 143) exit 255 ;; *) exit 0 ;; esac ;;
    run)
        if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
            one "$SLURM_ARRAY_TASK_ID"
            exit
        fi
        FAILED=$(mktemp) && export FAILED RUNNER=$$
        trap 'rm -f "$FAILED"' EXIT
        last=$(($(run_dirs | wc -l) - 1))
        seq 0 "$last" | xargs -P "$jobs" -I{} bash "$self" one "$target" {} || exit 130
        [[ -s $FAILED ]] || exit 0
        echo "failed, $(wc -l <"$FAILED") of $(run_dirs | wc -l):" && cat "$FAILED"
        exit 1 ;;
esac

# The report, from the run directories.
expected=()
while read -r run_dir; do expected+=("$run_dir"); done < <(run_dirs)
export MPLBACKEND=agg
eval "exec $python"' - "$target" "${expected[@]}"' <<'PYTHON'
"""A target's report, from its run directories: Markdown tables, a CSV file and pictures."""

import csv
import json
import math
import sys
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

# Romeo & Bagdanov (2024), Table 1, as printed.
PAPER_SETTINGS = ["bc oracle 1", "td3bc oracle 1", "iql oracle 1"]
PAPER_SETTINGS += ["td3bc labeled 0.01", "iql labeled 0.01"]
PAPER_SETTINGS += ["td3bc imputed 0.01", "iql imputed 0.01"]
PAPER = """
halfcheetah-medium-v2         42.60  48.30  47.40  10.03  18.28  48.50  44.46
hopper-medium-v2              52.90  59.30  66.30  11.32  15.53  58.13  36.47
walker2d-medium-v2            75.30  83.70  78.30   6.00   1.21  82.81  69.87
halfcheetah-medium-replay-v2  36.60  44.60  44.20   2.60  13.38  44.71  32.73
hopper-medium-replay-v2       18.10  60.90  94.70   5.11   4.56  52.46  26.42
walker2d-medium-replay-v2     26.00  81.80  73.90   5.37   1.44  69.15  47.38
halfcheetah-medium-expert-v2  55.20  90.70  86.70  21.84  19.28  87.88  51.77
hopper-medium-expert-v2       52.50  98.00  91.50  11.62  21.84  83.65  22.94
walker2d-medium-expert-v2    107.50 110.10 109.60   8.77   8.04  89.30 107.38
"""
# CORL (Tarasov et al. 2022), README of github.com/corl-team/CORL at eeeeef2, last scores, 4 seeds.
CORL_SETTINGS = ["bc oracle 1", "td3bc oracle 1", "iql oracle 1"]
CORL = """
halfcheetah-medium-v2         42.40  48.10  48.31
hopper-medium-v2              53.51  60.37  67.53
walker2d-medium-v2            63.23  82.71  80.91
halfcheetah-medium-replay-v2  35.66  44.84  44.46
hopper-medium-replay-v2       29.81  64.42  97.43
walker2d-medium-replay-v2     21.80  85.62  82.15
halfcheetah-medium-expert-v2  55.95  90.78  94.74
hopper-medium-expert-v2       52.30 101.17 107.42
walker2d-medium-expert-v2     98.96 110.03 111.72
"""

AGENTS = {"bc": "BC", "td3bc": "TD3+BC", "iql": "IQL"}
AGENT_COLORS = {"bc": "tab:green", "td3bc": "tab:blue", "iql": "tab:orange"}
REWARDS = {  # what follows the fraction of labels: "1% + imputed"
    "oracle": "",
    "labeled": "",
    "imputed": " + imputed",
    "imputed-gp": " + imputed (GP)",
    "zero": " + zeros",
    "mean": " + mean",
}
REWARD_COLORS = {  # Okabe & Ito's: the colour-blind tell them apart
    "oracle": "#E69F00",
    "labeled": "#999999",
    "imputed": "#0072B2",
    "imputed-gp": "#009E73",
    "zero": "#D55E00",
    "mean": "#CC79A7",
}
# What must be the same for runs to stand in one table, beside the versions of the libraries. Not
# compared are the options of one algorithm alone, scale_rewards, device, compile, when it was
# evaluated, and the scripts themselves, whose hashes the report prints.
PROTOCOL = ["num_updates", "eval_episodes", "seed", "num_seeds", "batch_size", "learning_rate"]
PROTOCOL += ["gamma", "tau", "matmul_precision", "reward_hidden_dim", "reward_epochs"]
PROTOCOL += ["reward_learning_rate", "reward_batch_size"]


class Run(NamedTuple):
    """A finished run; dataset and setting are in the name of its folder."""

    path: Path
    dataset: str
    setting: str  # algorithm, rewards, fraction of labels: "td3bc imputed 0.01"
    config: dict
    result: dict
    scores: np.ndarray  # each seed's last evaluation


# Below, `runs` are those of one protocol, {(dataset, setting): Run}.


def split_name(path):
    """dataset__algorithm__rewards__fraction -> dataset, setting."""
    dataset, *words = path.name.rsplit("__", 3)
    return dataset, " ".join(words)


def is_finished(path):
    """A run that was evaluated leaves these three; a copy of its directory may lack some."""
    return all((path / name).exists() for name in ("config.json", "scores.csv", "result.json"))


def read_run(path):
    config = json.loads((path / "config.json").read_text())
    result = json.loads((path / "result.json").read_text())
    scores = np.array(result["per_seed"], float)  # what is null there was NaN
    return Run(path, *split_name(path), config, result, scores)


def protocol(run):
    values = {name: run.config.get(name) for name in PROTOCOL}
    values.update(run.result["versions"])
    return tuple(f"{name} {value}" for name, value in values.items())


def scripts(runs):
    """Which scripts made the runs, by the beginning of their SHA-256."""
    names = set()
    for run in runs.values():
        script = "iql_imputed.py" if run.setting.startswith("iql") else "td3bc_imputed.py"
        names.add(f"{script} {run.result['script_sha256'][:9]}")
    return ", ".join(sorted(names))


def title(setting):
    """As people say it: "TD3+BC 1% + imputed"."""
    algorithm, rewards, fraction = setting.split()
    if algorithm == "bc":
        return "BC"
    return f"{AGENTS[algorithm]} {percent(fraction)}{REWARDS[rewards]}"


def percent(fraction):
    return f"{100 * float(fraction):g}%"


def with_std(scores):
    """Over seeds; the std of these, with n, as in result.json."""
    return f"{np.mean(scores):.1f} ± {np.std(scores):.1f}"


# --- Tables ---
def print_table(header, rows):
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def read_scores(text, settings):
    """{(dataset, setting): score} of a published table."""
    scores = {}
    for line in text.strip().splitlines():
        dataset, *values = line.split()
        for setting, value in zip(settings, values):
            scores[dataset, setting] = float(value)
    return scores


def add_averages(scores, datasets, settings):
    """The row "average", in each column that is complete."""
    for setting in settings:
        column = [scores.get((dataset, setting)) for dataset in datasets]
        if None not in column:
            scores["average", setting] = np.mean(column)


def print_scores(runs, datasets, settings):
    """A row for each dataset, a column for each setting; published figures in brackets."""
    paper, corl = read_scores(PAPER, PAPER_SETTINGS), read_scores(CORL, CORL_SETTINGS)
    ours = {key: np.mean(run.scores) for key, run in runs.items()}
    texts = {key: with_std(run.scores) for key, run in runs.items()}
    names = list(datasets)
    if have_scores(runs) and len(datasets) > 1:  # raw returns of several tasks have no mean
        names.append("average")
        for table in (ours, paper, corl):
            add_averages(table, datasets, settings)
        for setting in settings:
            if ("average", setting) in ours:
                texts["average", setting] = f"{ours['average', setting]:.1f}"

    header = ["dataset", *map(title, settings)]
    rows = []
    for name in names:
        keys = [(name, setting) for setting in settings]
        cells = [in_brackets(texts.get(key, ""), paper.get(key), corl.get(key)) for key in keys]
        rows.append([name, *cells])
    for algorithm in ("td3bc", "iql"):
        imputed, oracle = f"{algorithm} imputed 0.01", f"{algorithm} oracle 1"
        if imputed in settings and oracle in settings:
            header.append(f"{AGENTS[algorithm]} imputed / 100%")
            for name, row in zip(names, rows):
                row.append(ratio(ours.get((name, imputed)), ours.get((name, oracle))))
    print("Mean ± std over seeds of the last evaluation.")
    if {dataset for dataset, _ in paper}.intersection(datasets):
        print("In brackets the paper's figure; for 100% and BC also CORL's.")
    print()
    print_table(header, rows)


def in_brackets(text, paper, corl):
    published = []
    if paper is not None:
        published.append(f"{paper:.1f}")
    if corl is not None:
        published.append(f"CORL {corl:.1f}")
    if not published:
        return text
    return f"{text} ({'; '.join(published)})".strip()


def ratio(above, below):
    if above is None or below is None or below <= 0:
        return ""
    return f"{above / below:.2f}"


def have_scores(runs):
    return all(run.result["metric"] == "score" for run in runs.values())


def iqm(scores):
    """Mean of the middle half, of the last axis."""
    scores = np.sort(scores, axis=-1)
    cut = scores.shape[-1] // 4
    return scores[..., cut : scores.shape[-1] - cut].mean(axis=-1)


def interval(scores, resamples=10_000):
    """95% bootstrap interval of the IQM of scores, (tasks, seeds).

    Seeds are drawn anew within each task (Agarwal et al. 2021)."""
    tasks, seeds = scores.shape
    drawn = np.random.default_rng(0).integers(seeds, size=(resamples, tasks, seeds))
    samples = np.take_along_axis(scores[np.newaxis], drawn, axis=2)
    return np.percentile(iqm(samples.reshape(resamples, -1)), [2.5, 97.5])


def print_iqm(runs, settings):
    rows = []
    for setting in settings:
        scores = [run.scores for run in runs.values() if run.setting == setting]
        if scores:
            low, high = interval(np.array(scores))
            middle = f"{iqm(np.ravel(scores)):.1f}"
            rows.append([title(setting), middle, f"{low:.1f} to {high:.1f}", str(len(scores))])
    print_table(["setting", "IQM", "95% bootstrap interval", "tasks"], rows)


def print_controls(runs, datasets):
    """Say where rewards that know nothing of the task do as well as imputed ones."""
    print(
        "A control gives every hidden reward the same value: zero, or the mean of the labels.\n"
        "It does as well as imputation where their means over seeds differ by no more than\n"
        "the spread of the seeds, sqrt(std² + std²). Where a control does as well or better,\n"
        "the scores on that dataset do not show that imputed rewards are of use.\n"
    )
    for dataset in datasets:
        for algorithm in ("td3bc", "iql"):
            imputed = runs.get((dataset, f"{algorithm} imputed 0.01"))
            zero = runs.get((dataset, f"{algorithm} zero 0.01"))
            mean = runs.get((dataset, f"{algorithm} mean 0.01"))
            if imputed and zero and mean:
                print(f"- {dataset}, {AGENTS[algorithm]}:", end=" ")
                print(f"imputation scores {with_std(imputed.scores)};", end=" ")
                print(f"zero {compare(zero.scores, imputed.scores)};", end=" ")
                print(f"mean {compare(mean.scores, imputed.scores)}")
    print()


def compare(control, imputed):
    if len(imputed) == 1:
        return f"{with_std(control)}, with one seed not to be told apart"
    difference = np.mean(control) - np.mean(imputed)
    spread = np.hypot(np.std(control), np.std(imputed))
    if difference < -spread:
        return f"does worse, {with_std(control)}"
    if difference > spread:
        return f"**does better**, {with_std(control)}"
    return f"**does as well**, {with_std(control)}"


def print_labels(runs, datasets, fractions, numbers):
    """A row for each number of labels: score and R² with either reward model."""
    rows = []
    for dataset in datasets:
        oracle = runs.get((dataset, "td3bc oracle 1"))
        for fraction in fractions:
            models = ("imputed", "imputed-gp")
            found = [runs.get((dataset, f"td3bc {rewards} {fraction}")) for rewards in models]
            if not any(found):
                continue
            row = [dataset, percent(fraction), str(numbers.get((dataset, fraction), ""))]
            for run in found:
                row.append(with_std(run.scores) if run else "")
                row.append(f"{np.mean(r2(run)):.3f}" if run else "")
            row.append(with_std(oracle.scores) if oracle else "")
            rows.append(row)
    print("TD3+BC, mean ± std over seeds of the last evaluation; R² on the hidden rewards.\n")
    columns = ["MLP: score", "MLP: R²", "GP: score", "GP: R²", "true rewards: score"]
    print_table(["dataset", "labelled", "labels", *columns], rows)


def r2(run):
    """Of each seed's imputed rewards, on the rewards hidden from it; NaN if not defined."""
    return np.array(run.result["reward_model"]["r2"], float)


def write_csv(path, runs):
    paper, corl = read_scores(PAPER, PAPER_SETTINGS), read_scores(CORL, CORL_SETTINGS)
    names = ["metric", "mean", "std", "num_updates", "eval_episodes"]
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        header = ["dataset", "algorithm", "rewards", "label_fraction", *names]
        table.writerow([*header, "seeds", "reward_r2", "paper", "corl"])
        for key, run in runs.items():
            row = [run.dataset, *run.setting.split(), *(run.result[name] for name in names)]
            row.append(len(run.scores))
            # Of a run without a reward model, it is null.
            row.append(np.mean(r2(run)) if run.result["reward_model"] else None)
            table.writerow([*row, paper.get(key), corl.get(key)])


# --- What a run was trained on, by the script that trained it ---
def load_dataset(run):
    """The dataset it was trained on; None, and a line that says why, if it is not here."""
    import td3bc_imputed  # here, since it takes seconds

    path = run.config["dataset_path"]
    try:
        with redirect_stdout(sys.stderr):  # the report is what goes to stdout
            return td3bc_imputed.load_dataset(run.config["env_id"], path and Path(path))
    except td3bc_imputed.UserError as error:
        print(f"- cannot be loaded: {run.dataset}, {error}\n")


def count_labels(runs, datasets, fractions):
    """{(dataset, fraction): number of labels}"""
    import td3bc_imputed

    numbers = {}
    for dataset in datasets:
        run = next(run for run in runs.values() if run.dataset == dataset)
        loaded = load_dataset(run)
        if loaded:
            for fraction in fractions:
                one_seed = range(1)  # every seed has as many
                labels = td3bc_imputed.split_labels(loaded.rewards, float(fraction), one_seed)
                numbers[dataset, fraction] = labels.shape[1]
    return numbers


def impute_again(run, num_rows=5000):
    """True and imputed rewards of transitions whose reward the first seed's model never saw.

    By the reward model in the run's checkpoint."""
    import torch

    import td3bc_imputed

    dataset = load_dataset(run)
    if dataset is None:
        return None
    # A reward model as the run made it, for as many seeds; then the weights that it had found.
    config = run.config
    seeds = range(config["seed"], config["seed"] + config["num_seeds"])
    labels = td3bc_imputed.split_labels(dataset.rewards, config["label_fraction"], seeds)
    generators = td3bc_imputed.make_generators(seeds, stream=1)
    args = SimpleNamespace(**config)
    reward_model = td3bc_imputed.RewardModel(dataset, labels, generators, args)
    state = torch.load(run.path / "checkpoint.pt", map_location="cpu", weights_only=True)
    reward_model.load_state_dict(state["reward_model"])

    hidden = ~np.isnan(dataset.rewards)
    hidden[labels[0]] = False
    rows = np.random.default_rng(0).permutation(np.flatnonzero(hidden))[:num_rows]
    part = dataset._replace(
        observations=dataset.observations[rows],
        actions=dataset.actions[rows],
        rewards=dataset.rewards[rows],
    )
    no_labels = labels[:, :0]  # none of these rows is one
    imputed = td3bc_imputed.impute_rewards(reward_model, part, no_labels)
    return part.rewards, imputed[0], labels.shape[1]


# --- Pictures ---
def draw_overview(runs, datasets, path):
    """Left: imputed against true rewards. Right: what agents make of 1%, 1% + imputed, 100%."""
    size = (7.5, max(3.2, 1.3 + 0.44 * len(datasets)))
    figure = plt.figure(figsize=size, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.6])
    draw_rewards(left.subplots(), runs, datasets)

    td3bc, iql = right.subplots(1, 2, sharex=True)
    draw_bars(td3bc, runs, datasets, "td3bc")
    draw_bars(iql, runs, datasets, "iql")
    names = [dataset.removesuffix("-v2").replace("-", "\n", 1) for dataset in datasets]
    td3bc.set_yticks(range(len(datasets)), names)
    iql.set_yticks([])
    handles, labels = td3bc.get_legend_handles_labels()
    right.legend(
        handles,
        labels,
        title="Score of agents trained on",
        title_fontsize="large",
        loc="outside upper center",
        ncols=3,
        columnspacing=1,
        frameon=False,
    )
    save(figure, path, dpi=220)


def draw_rewards(axes, runs, datasets):
    """Of the first dataset that has a finished run with imputed rewards."""
    axes.set_box_aspect(1)
    axes.set(xlabel="true reward", ylabel="imputed reward")
    for dataset in datasets:
        run = runs.get((dataset, "td3bc imputed 0.01"))
        if run and (run.path / "checkpoint.pt").exists():
            break
    else:
        axes.set_title("No run of TD3+BC with\nimputed rewards yet")
        return
    found = impute_again(run)
    if found is None:
        return
    true, imputed, num_labels = found
    axes.plot(true, imputed, ".", color=REWARD_COLORS["imputed"], markersize=3, alpha=0.3)
    ends = [true.min(), true.max()]
    axes.plot(ends, ends, color="black", linewidth=1)
    axes.set_title(f"Hidden rewards, imputed\nfrom {num_labels:,} labels")
    corner = {"transform": axes.transAxes, "fontsize": "large", "va": "top"}
    axes.text(0.05, 0.95, f"R² = {r2(run)[0]:.3f}", **corner)
    corner = {"transform": axes.transAxes, "fontsize": "small", "ha": "right"}
    axes.text(0.95, 0.05, dataset, **corner)


def draw_bars(axes, runs, datasets, algorithm):
    """A group of three bars for each dataset, from above."""
    settings = {"labeled 0.01": "1% of rewards", "imputed 0.01": "1% + imputed", "oracle 1": "100%"}
    for place, (setting, label) in enumerate(settings.items()):
        found = [runs.get((dataset, f"{algorithm} {setting}")) for dataset in datasets]
        scores = [run.scores if run else [np.nan] for run in found]
        rows = np.arange(len(datasets)) + 0.27 * (place - 1)
        means = [np.mean(each) for each in scores]
        stds = [np.std(each) for each in scores]
        color = REWARD_COLORS[setting.split()[0]]
        axes.barh(rows, means, 0.25, xerr=stds, color=color, label=label)
    # Places of their own also for datasets without a run: the agents share the names on the left.
    axes.set_ylim(len(datasets) - 0.5, -0.5)
    axes.set(title=AGENTS[algorithm], xlabel=metric(runs))


def metric(runs):
    metrics = {run.result["metric"] for run in runs.values()}
    return " or ".join(sorted(metrics))


def save(figure, path, dpi=150):
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def add_legend(figure, ncols):
    """One below all panels; what several have in common stands there once."""
    entries = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            entries[label] = handle
    labels = list(entries)
    figure.legend(entries.values(), labels, loc="outside lower center", ncols=ncols)


def draw_figure2(runs, datasets, settings, path):
    """As the paper's: boxes over seeds at 1% and 5%; lines at 100%, 1% + imputed, and BC."""
    columns = min(len(datasets), 3)
    rows = math.ceil(len(datasets) / columns)
    size = (2.4 + 3 * columns, 1 + 3 * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    fractions = fractions_of(settings, "labeled")
    for axes, dataset in zip(panels.flat, datasets):
        for setting, style in (("imputed 0.01", "--"), ("oracle 1", "-")):
            draw_line(axes, runs.get((dataset, f"td3bc {setting}")), style, width=2)
            draw_line(axes, runs.get((dataset, f"iql {setting}")), style, width=1)
        draw_line(axes, runs.get((dataset, "bc oracle 1")), ":", width=2)
        for x, fraction in enumerate(fractions):
            draw_box(axes, runs.get((dataset, f"td3bc labeled {fraction}")), x - 0.18, hatch="")
            draw_box(axes, runs.get((dataset, f"iql labeled {fraction}")), x + 0.18, hatch="///")
        axes.set_xticks(range(len(fractions)), [percent(fraction) for fraction in fractions])
        axes.set(title=dataset, xlim=(-0.6, len(fractions) - 0.4), ylabel=metric(runs))
        axes.set_xlabel("transitions with a reward")
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    for axes in panels.flat[len(datasets) :]:
        axes.axis("off")
    add_legend(figure, ncols=2 if columns == 1 else 4)
    save(figure, path)


def draw_line(axes, run, style, width):
    if run:
        color = AGENT_COLORS[run.setting.split()[0]]
        mean = np.mean(run.scores)
        label = title(run.setting)
        axes.axhline(mean, color=color, linestyle=style, linewidth=width, label=label)


def draw_box(axes, run, x, hatch):
    if run:
        algorithm = run.setting.split()[0]
        axes.boxplot(
            [run.scores],
            positions=[x],
            widths=0.3,
            whis=(0, 100),
            manage_ticks=False,
            patch_artist=True,
            label=f"{AGENTS[algorithm]}, labelled only",
            boxprops={"facecolor": AGENT_COLORS[algorithm], "hatch": hatch, "alpha": 0.8},
            medianprops={"color": "black"},
        )


def fractions_of(settings, rewards):
    fractions = {setting.split()[2] for setting in settings if setting.split()[1] == rewards}
    return sorted(fractions, key=float)


def draw_labels(runs, datasets, fractions, numbers, path):
    """Score and R² against the number of labels, with either reward model."""
    size = (1 + 3 * len(datasets), 5.5)
    figure, panels = plt.subplots(
        2, len(datasets), figsize=size, sharex="col", squeeze=False, layout="constrained"
    )
    for dataset, (above, below) in zip(datasets, panels.T):
        oracle = runs.get((dataset, "td3bc oracle 1"))
        if oracle:
            mean = np.mean(oracle.scores)
            above.axhline(mean, color=REWARD_COLORS["oracle"], label="true rewards")
        ticks = set()
        # Side by side, so that no error bar hides another.
        for rewards, label, shift in (("imputed", "MLP", 0.96), ("imputed-gp", "GP", 1.04)):
            found = [runs.get((dataset, f"td3bc {rewards} {fraction}")) for fraction in fractions]
            found = [run for run in found if run]
            counts = [numbers[dataset, run.setting.split()[2]] for run in found]
            ticks.update(counts)
            x = [shift * count for count in counts]
            style = {"color": REWARD_COLORS[rewards], "label": label, "marker": "o", "capsize": 3}
            draw_points(above, x, [run.scores for run in found], style)
            draw_points(below, x, [r2(run) for run in found], style)
        above.set(title=dataset, ylabel=f"TD3+BC's {metric(runs)}", xscale="log")
        above.set_ylim(bottom=min(0, above.get_ylim()[0]))
        below.set(xlabel="labels", ylabel="R² of hidden rewards", ylim=(-0.05, 1.05))
        below.set_xticks(list(ticks), [f"{tick:,}" for tick in ticks], fontsize="small")
        below.minorticks_off()
    add_legend(figure, ncols=3)
    save(figure, path)


def draw_points(axes, x, values, style):
    """Mean and std over seeds."""
    means = [np.mean(seeds) for seeds in values]
    stds = [np.std(seeds) for seeds in values]
    axes.errorbar(x, means, stds, **style)


def draw_curves(runs, datasets, settings, path):
    """Score against updates: mean over seeds, and their standard deviation as a band."""
    names = {setting.split()[0] for setting in settings}
    algorithms = [name for name in ("td3bc", "iql") if name in names]
    size = (1.5 + 3.5 * len(algorithms), 1 + 2.2 * len(datasets))
    shape = (len(datasets), len(algorithms))
    figure, panels = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for dataset, row in zip(datasets, panels):
        for algorithm, axes in zip(algorithms, row):
            for setting in settings:
                run = runs.get((dataset, setting))
                if run and setting.split()[0] in (algorithm, "bc"):
                    draw_curve(axes, run, fractions_of(settings, setting.split()[1]))
            axes.set_title(f"{AGENTS[algorithm]}, {dataset}", fontsize="medium")
            axes.set(xlabel="updates", ylabel=metric(runs))
    add_legend(figure, ncols=2 * len(algorithms))
    save(figure, path)


def draw_curve(axes, run, fractions):
    """The fewer the labels, the paler."""
    # Its columns: update, seed, return, score; the rows of an evaluation stand together.
    table = np.loadtxt(run.path / "scores.csv", delimiter=",", skiprows=1, ndmin=2)
    updates, _, returns, scores = table.T
    values = returns if run.result["metric"] == "return" else scores
    values = values.reshape(-1, len(run.scores))  # (evaluations, seeds)
    updates = np.unique(updates)
    mean, std = values.mean(axis=1), values.std(axis=1)

    algorithm, rewards, fraction = run.setting.split()
    color = AGENT_COLORS["bc"] if algorithm == "bc" else REWARD_COLORS[rewards]
    alpha = (1 + fractions.index(fraction)) / len(fractions)
    label = title(run.setting).removeprefix(f"{AGENTS[algorithm]} ")
    axes.plot(updates, mean, color=color, alpha=alpha, label=label)
    axes.fill_between(updates, mean - std, mean + std, color=color, alpha=0.15 * alpha)


def print_absent(runs, found, paths, common):
    """Runs that are in no table: of another protocol, or not finished."""
    lines = []
    for run in found:
        if run not in runs.values():
            others = [part for part in protocol(run) if part not in common]
            lines.append(f"- left out, {', '.join(others)}: {run.path}")
    finished = {run.path for run in found}
    lines += [f"- missing: {path}" for path in paths if path not in finished]
    if lines:
        print("\n".join(lines) + "\n")


def main(target, paths):
    found = [read_run(path) for path in paths if is_finished(path)]
    if not found:
        sys.exit(f"error: no finished run of {target} in {paths[0].parent}")
    common, _ = Counter(protocol(run) for run in found).most_common(1)[0]
    runs = {(run.dataset, run.setting): run for run in found if protocol(run) == common}
    names = [split_name(path) for path in paths]
    datasets = list(dict.fromkeys(dataset for dataset, _ in names))
    settings = list(dict.fromkeys(setting for _, setting in names))
    trained = {dataset for dataset, _ in runs}
    present = [dataset for dataset in datasets if dataset in trained]

    print(f"# {target}\n")
    print(f"{len(runs)} of {len(paths)} runs; {scripts(runs)}; {', '.join(common)}.\n")
    fractions = fractions_of(settings, "imputed")
    if target == "labels":
        numbers = count_labels(runs, present, fractions)
        print_labels(runs, datasets, fractions, numbers)
    else:
        print_scores(runs, datasets, settings)
    if have_scores(runs):
        print_iqm(runs, settings)
    if target == "controls":
        print_controls(runs, datasets)
    print_absent(runs, found, paths, common)

    results = Path("results")
    results.mkdir(exist_ok=True)
    write_csv(results / f"{target}.csv", runs)
    written = [f"{target}.csv", "curves.png"]
    draw_curves(runs, present, settings, results / "curves.png")
    if target in ("table1", "figure2", "bundled"):
        draw_figure2(runs, present, settings, results / "figure2.png")
        written.append("figure2.png")
    if target in ("table1", "bundled"):
        draw_overview(runs, present, results / "overview.png")
        written.append("overview.png")
    if target == "labels" and numbers:
        counted = [dataset for dataset in present if (dataset, fractions[0]) in numbers]
        draw_labels(runs, counted, fractions, numbers, results / "labels.png")
        written.append("labels.png")
    print(", ".join(f"results/{name}" for name in written))


if __name__ == "__main__":
    main(sys.argv[1], [Path(path) for path in sys.argv[2:]])
PYTHON
