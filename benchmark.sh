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
#   labels     the 2 of figure2: how good are rewards imputed from few to many labels, by the
#              paper's reward model and by a Gaussian process (not in the paper), and TD3+BC with
#              them? 64 runs, many of one seed: of each, the process completes a dataset, which
#              stays in its folder as full.hdf5; the report draws labels.png
#   bundled    table1 on the bundled dataset with 3 seeds and 10,000 updates, half an hour on two
#              cores: 7 runs
#   newtask    an old log, a new task (tests/new_tasks.py): a robot that learned to run as fast as
#              it can, to move at a given speed; all rewards, 100 labels imputed by the Gaussian
#              process, 1% by the paper's model, 100 labels alone or with a constant elsewhere, and
#              behaviour cloning; 30 to 1,000 labels of the first task; the report draws
#              newtask.png. The bundled dataset at 2 m/s, and Pendulum: 43 runs, some hours on two
#              cores; with DATASETS also the tasks of the old logs there
#
# Settings, from the environment (defaults in parentheses):
#   DATASETS   a folder of D4RL-schema files that replace the target's datasets (named
#              halfcheetah-*.hdf5, hopper-*.hdf5, walker2d-*.hdf5, or after any other Gymnasium
#              environment)
#   JOBS       runs at a time (1)
#   SEEDS      seeds of each run (5; bundled, newtask: 3)
#   UPDATES    updates of each run (1000000; bundled: 10000; newtask: 16000, Pendulum half of it)
#   FRACTIONS  of labelled transitions, for the target labels (0.00003 0.0001 0.0003 0.001 0.01);
#              0.00005 0.00015 0.0005 0.0015 0.005 are 10 to 1,000 labels of 200,000 transitions
#   OPTIONS    more options for every agent, such as --eval-workers 8
#   RUNS       where the run directories are (runs/benchmark, beside this script)
#   PYTHON     (python); may be several words, such as
#              "uv run --with-requirements requirements.txt python"
set -uo pipefail

fail() { echo "error: $*" >&2 && exit 2; }

targets="table1|figure2|controls|labels|bundled|newtask"
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
seeds=${SEEDS:-5} updates=${UPDATES:-1000000} more=""
read -ra fractions <<<"${FRACTIONS:-0.00003 0.0001 0.0003 0.001 0.01}"
datasets=({halfcheetah,hopper,walker2d}-medium{,-replay,-expert}-v2)
new_tasks=(halfcheetah-medium-replay-speed{3,4} hopper-medium-replay-speed0)
two_datasets=(walker2d-medium-replay-v2 halfcheetah-medium-expert-v2)
settings=({td3bc,iql}" "{"oracle 1","labeled 0.01","imputed 0.01"} "bc oracle 1")
case $target in
    figure2)
        datasets=("${two_datasets[@]}")
        settings=({td3bc,iql}" "{"oracle 1","labeled 0.01","labeled 0.05","imputed 0.01"})
        settings+=("bc oracle 1") ;;
    controls) settings=({td3bc,iql}" "{"oracle 1","imputed 0.01","zero 0.01","mean 0.01"}) ;;
    labels)
        largest=$(printf "%s\n" "${fractions[@]}" | LC_ALL=C sort -g | tail -n 1)
        datasets=("${two_datasets[@]}")
        settings=("reward_model sweep $largest" "td3bc oracle 1")
        for fraction in "${fractions[@]}"; do
            settings+=("td3bc imputed $fraction")
            for ((seed = 0; seed < seeds; seed++)); do
                settings+=("td3bc imputed-gp $fraction/seed$seed")
            done
        done ;;
    bundled)
        datasets=(halfcheetah-medium-replay-mini)
        seeds=${SEEDS:-3} updates=${UPDATES:-10000} more=" --eval-freq 1000" ;;
    newtask)
        datasets=(halfcheetah-medium-replay-mini-speed2 pendulum)
        seeds=${SEEDS:-3} updates=${UPDATES:-16000}
        settings=("td3bc oracle 1" "bc oracle 1" "iql oracle 1")
        for algorithm in td3bc iql; do
            for ((seed = 0; seed < seeds; seed++)); do
                settings+=("$algorithm imputed-gp 100/seed$seed")
            done
            settings+=("$algorithm "{"mean 100","zero 100","labeled 100","imputed 0.01"})
        done ;;
esac
if [[ $target == newtask ]]; then
    for task in "${new_tasks[@]}"; do
        [[ ! -e ${DATASETS:-}/${task%-speed*}.hdf5 ]] || datasets+=("$task")
    done
elif [[ -n ${DATASETS:-} ]]; then
    datasets=()
    while read -r file; do datasets+=("$(basename "$file" .hdf5)"); done < <(
        find "$DATASETS" -maxdepth 1 -name \*.hdf5 | LC_ALL=C sort
    )
    ((${#datasets[@]})) || fail "no .hdf5 files in DATASETS=$DATASETS"
fi

# Datasets vary fastest: runs started together download different files, and each file once.
lines=()
for setting in "${settings[@]}"; do
    for dataset in "${datasets[@]}"; do lines+=("$dataset $setting"); done
done
if [[ $target == newtask ]]; then
    for labels in 30 300 1000; do
        for ((seed = 0; seed < seeds; seed++)); do
            lines+=("${datasets[0]} td3bc imputed-gp $labels/seed$seed")
        done
    done
fi
run_dirs() {
    for line in "${lines[@]}"; do echo "$runs/${line// /__}"; done
}
commands() {
    for line in "${lines[@]}"; do
        read -r dataset algorithm rewards fraction <<<"$line"
        run_dir=$runs/${line// /__} script=${algorithm/#bc/td3bc}_imputed.py
        data=(--env-id "$dataset") number=$updates
        [[ -z ${DATASETS:-} ]] || data+=(--dataset-path "$DATASETS/$dataset.hdf5")
        [[ $target != newtask ]] || score_log
        case $rewards in
            sweep) sweep ;;
            imputed-gp) complete_and_train ;;
            *) train ;;
        esac
    done
}
# Before the command of a new task: its log, unless that is scored already. It sets the simulator,
# and a number of labels as the fraction of the log's rows.
score_log() {
    local scored=$runs/$dataset.hdf5 folder=${DATASETS:-} rows=200000 robot=HalfCheetah
    local task simulator
    case $dataset in
        pendulum) task=(Pendulum) simulator=Pendulum-v1 rows=20000 number=$((updates / 4 * 2)) ;;
        *-mini-*) rows=100000 folder=tests/data ;;&
        walker2d-*) robot=Walker2d ;;&
        hopper-*) robot=Hopper ;;&
        *-speed*)
            task=("${robot}Speed${dataset##*-speed}" --log "$folder/${dataset%-speed*}.hdf5")
            simulator=new_tasks:${task[0]}-v0 ;;
    esac
    [[ $fraction != [1-9][0-9]* ]] ||
        fraction=$(awk "BEGIN { print ${fraction%/*} / $rows }")${fraction#"${fraction%/*}"}
    data=(--env-id "$simulator" --dataset-path "$scored") more=" --eval-freq $((number / 10 * 2))"
    echo -n "export PYTHONPATH=tests; test -e$(quote "$scored") || $python tests/new_tasks.py"
    echo -n "$(quote "${task[@]}" --path "$scored") && "
}
quote() { printf " %q" "$@"; }
train() {
    options=("${data[@]}" --rewards "$rewards")
    [[ $rewards == oracle ]] || options+=(--label-fraction "$fraction")
    [[ $algorithm != bc ]] || options+=(--alpha 0)
    options+=(--num-seeds "$seeds" --num-updates "$number")
    echo "$python $script$(quote "${options[@]}")$more${OPTIONS:+ $OPTIONS}" \
        "--run-dir$(quote "$run_dir") --resume"
}
sweep() {
    options=("${data[@]}" --label-fraction "$fraction" --num-seeds "$seeds" --sweep)
    echo "$python reward_model.py$(quote "${options[@]}" --run-dir "$run_dir")"
}
# One seed, in two steps: the first completes the dataset, unless that is done, the second trains.
complete_and_train() {
    seed=${fraction#*/seed}
    options=("${data[@]}" --reward-model gp --label-fraction "${fraction%/*}" --seed "$seed")
    # Named after these options, so that none takes a dataset that others have completed.
    folder=$run_dir/gp-$(cksum <<<"${options[*]}" | cut -d " " -f 1) full=$folder/full.hdf5
    options+=(--run-dir "$folder" --output-path "$full")
    echo "mkdir -p$(quote "$folder"); test -e$(quote "$full") ||" \
        "$python reward_model.py$(quote "${options[@]}")" \
        "&& $python $script$(quote "${data[@]:0:2}" --dataset-path "$full")" \
        "--num-updates $number$more${OPTIONS:+ $OPTIONS}" \
        "--seed $seed --run-dir$(quote "$run_dir") --resume"
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
        mkdir -p "$(dirname "$run_dir")" && eval "$command" >>"$run_dir.log" 2>&1
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
import sys
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import h5py
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

# Romeo & Bagdanov (2024), Table 1, as printed: seven columns. Then three of CORL (Tarasov et al.
# 2022), README of github.com/corl-team/CORL at eeeeef2, last scores, 4 seeds.
PAPER_SETTINGS = ["bc oracle 1", "td3bc oracle 1", "iql oracle 1"]
PAPER_SETTINGS += ["td3bc labeled 0.01", "iql labeled 0.01"]
PAPER_SETTINGS += ["td3bc imputed 0.01", "iql imputed 0.01"]
CORL_SETTINGS = ["bc oracle 1", "td3bc oracle 1", "iql oracle 1"]
PUBLISHED = """
halfcheetah-medium-v2         42.60  48.30  47.40  10.03  18.28  48.50  44.46  42.40  48.10  48.31
hopper-medium-v2              52.90  59.30  66.30  11.32  15.53  58.13  36.47  53.51  60.37  67.53
walker2d-medium-v2            75.30  83.70  78.30   6.00   1.21  82.81  69.87  63.23  82.71  80.91
halfcheetah-medium-replay-v2  36.60  44.60  44.20   2.60  13.38  44.71  32.73  35.66  44.84  44.46
hopper-medium-replay-v2       18.10  60.90  94.70   5.11   4.56  52.46  26.42  29.81  64.42  97.43
walker2d-medium-replay-v2     26.00  81.80  73.90   5.37   1.44  69.15  47.38  21.80  85.62  82.15
halfcheetah-medium-expert-v2  55.20  90.70  86.70  21.84  19.28  87.88  51.77  55.95  90.78  94.74
hopper-medium-expert-v2       52.50  98.00  91.50  11.62  21.84  83.65  22.94  52.30 101.17 107.42
walker2d-medium-expert-v2    107.50 110.10 109.60   8.77   8.04  89.30 107.38  98.96 110.03 111.72
"""

AGENTS = {"bc": "BC", "td3bc": "TD3+BC", "iql": "IQL"}
# What follows the fraction of labels: "1% + imputed".
REWARDS = {"oracle": "", "labeled": "", "imputed": " + imputed", "imputed-gp": " + imputed (GP)"}
REWARDS |= {"zero": " + zeros", "mean": " + mean"}
# One for each thing, in all pictures. Okabe & Ito's, and brown: the colour-blind tell them apart.
COLORS = {"oracle": "black", "imputed": "#E69F00", "imputed-gp": "#009E73", "labeled": "#56B4E9"}
COLORS |= {"zero": "#D55E00", "mean": "#CC79A7", "bc": "#8C510A"}
# What must be the same for runs to stand in one table, beside the versions of the libraries. Not
# compared are the options of one algorithm alone, scale_rewards, device, compile, when it was
# evaluated, and the scripts themselves, whose hashes the report prints.
PROTOCOL = ["num_updates", "eval_episodes", "seed", "num_seeds", "batch_size", "learning_rate"]
PROTOCOL += ["gamma", "tau", "reward_hidden_dim", "reward_epochs", "reward_learning_rate"]
PROTOCOL += ["reward_batch_size"]


class Run(NamedTuple):
    """A finished run, or several that differ in their seed alone."""

    paths: list
    dataset: str
    setting: str  # algorithm, rewards, fraction of labels: "td3bc imputed 0.01"
    config: dict
    result: dict
    scores: np.ndarray  # each seed's last evaluation
    evaluations: np.ndarray  # a row for each seed and evaluation: update, score


# Below, `runs` are those of one protocol, {(dataset, setting): Run}.


def split_name(path):
    """dataset__algorithm__rewards__fraction, or a folder seed0 in it -> dataset, setting."""
    name = path.name if "__" in path.name else path.parent.name
    dataset, *words = name.rsplit("__", 3)
    return dataset, " ".join(words)


def is_sweep(path):
    return "__reward_model__sweep__" in path.name


def is_finished(path):
    """It has these; a copy of its directory may lack some."""
    needed = ["config.json", "result.json"] + ([] if is_sweep(path) else ["scores.csv"])
    return all((path / name).exists() for name in needed)


def read_json(path):
    return json.loads(path.read_text())


def read_run(path):
    config, result = read_json(path / "config.json"), read_json(path / "result.json")
    scores = np.array(result["per_seed"], float)  # what is null there was NaN
    table = np.loadtxt(path / "scores.csv", delimiter=",", skiprows=1, ndmin=2)
    column = 2 if result["metric"] == "return" else 3  # of update, seed, return, score
    return Run([path], *split_name(path), config, result, scores, table[:, [0, column]])


def read_runs(paths):
    """Runs that differ in their seeds alone become one."""
    alike = {}
    for path in paths:
        run = read_run(path)
        key = run.dataset, run.setting, protocol(run, but="seed")
        alike.setdefault(key, []).append(run)
    return list(map(join, alike.values()))


def join(several):
    configs = [run.config for run in several]
    seed, num_seeds = [config["seed"] for config in configs], [x["num_seeds"] for x in configs]
    return several[0]._replace(
        paths=[run.paths[0] for run in several],
        config=configs[0] | {"seed": min(seed), "num_seeds": sum(num_seeds)},
        scores=np.concatenate([run.scores for run in several]),
        evaluations=np.concatenate([run.evaluations for run in several]),
    )


def protocol(run, but=None):
    values = {name: run.config.get(name) for name in PROTOCOL if name != but}
    values.update(run.result["versions"])
    return tuple(f"{name} {value}" for name, value in values.items())


def scripts(runs):
    """Which scripts made the runs, by the beginning of their SHA-256."""
    names = set()
    for run in runs.values():
        script = "iql_imputed.py" if run.setting.startswith("iql") else "td3bc_imputed.py"
        sha256 = run.config.get("script_sha256") or run.result["script_sha256"]  # of older scripts
        names.add(f"{script} {sha256[:9]}")
    return ", ".join(sorted(names))


def title(setting):
    """As people say it: "TD3+BC 1% + imputed"."""
    algorithm, rewards, fraction = setting.split()
    if algorithm == "bc":
        return "BC"
    return f"{AGENTS[algorithm]} {percent(fraction)}{REWARDS[rewards]}"


def percent(fraction):
    """Of a number of labels: "100 labels"."""
    share = float(fraction)
    return f"{share:g} labels" if share > 1 else f"{100 * share:g}%"


def with_std(scores, digits=1):
    """Of several seeds also their std, with n, as in result.json."""
    std = f" ± {np.std(scores):.{digits}f}" if len(scores) > 1 else ""
    return f"{np.mean(scores):.{digits}f}{std}"


# --- Tables ---
def print_table(header, rows):
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def read_published():
    """{(dataset, setting): score} of the paper, and of CORL."""
    paper, corl = {}, {}
    for line in PUBLISHED.strip().splitlines():
        dataset, *values = line.split()
        values = list(map(float, values))
        paper |= {(dataset, setting): x for setting, x in zip(PAPER_SETTINGS, values)}
        corl |= {(dataset, setting): x for setting, x in zip(CORL_SETTINGS, values[7:])}
    return paper, corl


def add_averages(scores, datasets, settings):
    """The row "average", in each column that is complete."""
    for setting in settings:
        column = [scores.get((dataset, setting)) for dataset in datasets]
        if None not in column:
            scores["average", setting] = np.mean(column)


def print_scores(runs, datasets, settings):
    """A row for each dataset, a column for each setting; published figures in brackets."""
    paper, corl = read_published()
    ours = {key: np.mean(run.scores) for key, run in runs.items()}
    texts = {key: with_std(run.scores) for key, run in runs.items()}
    names = list(datasets)
    if metric(runs) == "score" and len(datasets) > 1:  # raw returns of several tasks have no mean
        names.append("average")
        for table in (ours, paper, corl):
            add_averages(table, datasets, settings)
        texts |= {key: f"{ours[key]:.1f}" for key in ours if key[0] == "average"}

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
    published = [] if paper is None else [f"{paper:.1f}"]
    published += [] if corl is None else [f"CORL {corl:.1f}"]
    return f"{text} ({'; '.join(published)})".strip() if published else text


def ratio(above, below):
    if above is None or below is None or below <= 0:
        return ""
    return f"{above / below:.2f}"


def metric(runs):
    metrics = {run.result["metric"] for run in runs.values()}
    return " or ".join(sorted(metrics))


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
            limits = f"{low:.1f} to {high:.1f}" if len(scores[0]) > 1 else "needs several seeds"
            middle = f"{iqm(np.ravel(scores)):.1f}"
            rows.append([title(setting), middle, limits, str(len(scores))])
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
            keys = [(dataset, f"{algorithm} {name} 0.01") for name in ("imputed", "zero", "mean")]
            if all(key in runs for key in keys):
                imputed, zero, mean = [runs[key].scores for key in keys]
                print(f"- {dataset}, {AGENTS[algorithm]}: imputation", end=" ")
                print(f"scores {with_std(imputed)}; zero {compare(zero, imputed)};", end=" ")
                print(f"mean {compare(mean, imputed)}")
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


def print_labels(runs, datasets, fractions):
    """Of TD3+BC, a row for each number of labels."""
    rows = []
    for dataset in datasets:
        oracle = runs.get((dataset, "td3bc oracle 1"))
        for fraction in fractions:
            models = ("imputed", "imputed-gp")
            found = [runs.get((dataset, f"td3bc {rewards} {fraction}")) for rewards in models]
            if any(found):
                number = count_labels(found[1])
                row = [dataset, percent(fraction), f"{number:,}" if number else ""]
                row += [with_std(run.scores) if run else "" for run in [*found, oracle]]
                rows.append(row)
    print("TD3+BC: mean ± std over seeds of the last evaluation.\n")
    columns = ["rewards by MLP", "rewards by GP", "true rewards"]
    print_table(["dataset", "labelled", "labels", *columns], rows)


def count_labels(run):
    """Of a run with rewards by the Gaussian process: reward_model.py has counted them."""
    for path in run.paths[0].glob("gp-*/result.json") if run else []:
        return read_json(path)["num_labels"]


def print_sweeps(sweeps):
    rows = []
    for dataset, table in sweeps.items():
        for count in dict.fromkeys(row["labels"] for row in table):
            r2s = [np.array(row["r2"], float) for row in table if row["labels"] == count]
            rows.append([dataset, f"{count:,}", *(with_std(each, digits=3) for each in r2s)])
    print("Reward models: mean ± std over seeds of R² on the hidden rewards.\n")
    print_table(["dataset", "labels", "MLP", "GP", "linear"], rows)


NEW_TASK_COLUMNS = {
    "oracle 1": "all rewards",
    "imputed-gp 100": "100 labels + imputed (GP)",
    "imputed 0.01": "1% + imputed (MLP)",
    "labeled 100": "100 labels alone",
    "mean 100": "+ mean",
    "zero 100": "+ zeros",
}


def print_new_tasks(runs, datasets):
    """A row for each task and agent; then the first task with more and with fewer labels."""
    rows = []
    for dataset in datasets:
        log = scored_log(runs, dataset)
        for algorithm in ("td3bc", "iql"):
            keys = [f"{algorithm} {setting}" for setting in NEW_TASK_COLUMNS] + ["bc oracle 1"]
            found = [runs.get((dataset, key)) for key in keys]
            if any(found[:-1]):
                updates = next(run for run in found if run).config["num_updates"]
                cells = [with_std_and_r2(run) if run else "" for run in found]
                mean = f"{log_returns(log).mean():.1f}" if log else ""
                rows.append([name_task(dataset), AGENTS[algorithm], f"{updates:,}", *cells, mean])
    print("Returns: mean ± std over seeds of the last evaluation (R² of the imputed rewards).\n")
    columns = [*NEW_TASK_COLUMNS.values(), "BC", "the log's mean"]
    print_table(["task", "agent", "updates", *columns], rows)

    rows = []
    for number in (30, 100, 300, 1000):
        run = runs.get((datasets[0], f"td3bc imputed-gp {number}"))
        if run:
            rows.append([f"{number:,}", with_std(r2(run), 3), with_std(run.scores)])
    print(f"{name_task(datasets[0])}, TD3+BC, rewards by the Gaussian process:\n")
    print_table(["labels", "R²", "return"], rows)


def with_std_and_r2(run):
    share = f" (R² {np.mean(r2(run)):.2f})" if len(r2(run)) > 0 else ""
    return with_std(run.scores) + share


def scored_log(runs, dataset):
    """The old log with the new task's rewards; None where it or its run is missing."""
    run = runs.get((dataset, "td3bc oracle 1"))
    path = Path(run.config["dataset_path"]) if run else None
    return path if path and path.exists() else None


def log_returns(log):
    """Of each episode, in the new task."""
    with h5py.File(log) as file:
        rewards, ends = file["rewards"][:], file["terminals"][:] + file["timeouts"][:] > 0
    return np.add.reduceat(rewards, [0, *np.flatnonzero(ends[:-1]) + 1])


def r2(run):
    """Of each seed's imputed rewards, on the rewards hidden from it; none without reward model."""
    desks = [path for run_dir in run.paths for path in run_dir.glob("gp-*/result.json")]
    if desks:  # the process's, by reward_model.py
        return np.array([read_json(path)["quality"]["gp"]["r2"][0] for path in desks], float)
    return np.array((run.result["reward_model"] or {"r2": []})["r2"], float)


def write_csv(path, runs):
    paper, corl = read_published()
    columns = ["dataset", "algorithm", "rewards", "label_fraction", "metric", "mean", "std"]
    columns += ["num_updates", "eval_episodes", "seeds", "reward_r2", "paper", "corl"]
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for key, run in runs.items():
            row = [run.dataset, *run.setting.split(), run.result["metric"]]
            row += [np.mean(run.scores), np.std(run.scores), run.config["num_updates"]]
            row += [run.config["eval_episodes"], len(run.scores)]
            row += [np.mean(r2(run)) if len(r2(run)) > 0 else None, paper.get(key), corl.get(key)]
            table.writerow(row)


# --- The imputed rewards of a run, by the script that trained it ---
def impute_again(run, num_rows=5000):
    """True and imputed rewards of transitions whose reward the first seed's model never saw.

    By the reward model in the run's checkpoint; None if the dataset is not here."""
    import torch

    import td3bc_imputed  # here, since it takes seconds

    config = run.config
    seeds = range(config["seed"], config["seed"] + config["num_seeds"])
    try:
        with redirect_stdout(sys.stderr):  # the report is what goes to stdout
            path = config["dataset_path"]
            dataset = td3bc_imputed.load_dataset(config["env_id"], path and Path(path))
            rows = td3bc_imputed.choose_labels(dataset.rewards, config["label_fraction"], seeds)
    except td3bc_imputed.UserError as error:
        print(f"- cannot be loaded: {run.dataset}, {error}\n")
        return None
    # A reward model as the run made it, for as many seeds; then the weights that it had found.
    observations, actions, labels = dataset.observations, dataset.actions, dataset.rewards[rows]
    generators = td3bc_imputed.make_generators(seeds, stream=1)
    settings = config["reward_hidden_dim"], generators
    reward_model = td3bc_imputed.RewardModel(observations, actions, labels, *settings)
    path = run.paths[0] / "checkpoint.pt"
    state = torch.load(path, map_location="cpu", weights_only=True)
    reward_model.load_state_dict(state["reward_model"])

    hidden = ~np.isnan(dataset.rewards)
    hidden[rows[0]] = False
    some = np.random.default_rng(0).permutation(np.flatnonzero(hidden))[:num_rows]
    imputed = td3bc_imputed.predict_rewards(reward_model, observations[some], actions[some])
    return dataset.rewards[some], imputed[0], labels.shape[1]


# --- Pictures ---
# At most 6.5 inches wide, so that their letters can be read where a picture has 400 pixels.
def draw_overview(runs, datasets, path):
    """Left: imputed against true rewards. Right: what agents make of 1%, 1% + imputed, 100%."""
    size = (6.5, max(3.2, 1.3 + 0.5 * len(datasets)))
    figure = plt.figure(figsize=size, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.6])
    draw_rewards(left.subplots(), runs, datasets)

    td3bc, iql = right.subplots(1, 2, sharex=True)
    draw_bars(td3bc, runs, datasets, "td3bc")
    draw_bars(iql, runs, datasets, "iql")
    names = [dataset.removesuffix("-v2").replace("-", "\n", 1) for dataset in datasets]
    td3bc.set_yticks(range(len(datasets)), names)
    iql.set_yticks([])
    style = {"ncols": 3, "columnspacing": 1, "handlelength": 1, "frameon": False}
    bars = td3bc.get_legend_handles_labels()
    right.legend(*bars, title="Agents trained on", loc="outside upper center", **style)
    save(figure, path)


def draw_rewards(axes, runs, datasets):
    """Of the first dataset that has a finished run with imputed rewards, and its checkpoint."""
    axes.set_box_aspect(1)
    for dataset in datasets:
        run = runs.get((dataset, "td3bc imputed 0.01"))
        # Older scripts, whose checkpoints are others, did not note theirs in config.json.
        if run and "script_sha256" in run.config and (run.paths[0] / "checkpoint.pt").exists():
            break
    else:
        axes.set_title("No run of TD3+BC with\nimputed rewards yet")
        return
    found = impute_again(run)
    if found is None:
        return
    true, imputed, num_labels = found
    draw_scatter(axes, true, imputed, "imputed")
    axes.set_title(f"Hidden rewards, imputed\nfrom {num_labels:,} labels")
    corner = {"transform": axes.transAxes, "va": "top"}
    axes.text(0.05, 0.95, f"R² = {r2(run)[0]:.3f}", **corner)


def draw_bars(axes, runs, datasets, algorithm):
    """A group of three bars for each dataset, from above."""
    settings = {"labeled 0.01": "1%", "imputed 0.01": "1% + imputed", "oracle 1": "100%"}
    for place, (setting, label) in enumerate(settings.items()):
        found = [runs.get((dataset, f"{algorithm} {setting}")) for dataset in datasets]
        scores = [run.scores if run else [np.nan] for run in found]
        rows = np.arange(len(datasets)) + 0.27 * (place - 1)
        color = COLORS[setting.split()[0]]
        style = {"xerr": spread(scores), "ecolor": "gray", "color": color, "label": label}
        axes.barh(rows, [np.mean(each) for each in scores], 0.25, **style)
    # Places of their own also for datasets without a run: the agents share the names on the left.
    axes.set_ylim(len(datasets) - 0.5, -0.5)
    axes.set(title=AGENTS[algorithm], xlabel=metric(runs))


def draw_new_tasks(runs, datasets, path):
    """Returns of each task, from the log's own mean to left or right; and a hundred labels' R²."""
    tasks = [dataset for dataset in datasets if scored_log(runs, dataset)]
    num_rows = len(tasks) // 2 + 1
    shape, size = (num_rows, 2), (6.5, 0.5 + 2.3 * num_rows)
    figure, rows = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    panels = list(rows.flat)
    for axes, dataset in zip(panels, tasks):
        draw_new_task(axes, runs, dataset)
    for axes in panels[1 : len(tasks) : 2]:
        axes.set_yticklabels([])  # as on the left
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    draw_gp_rewards(panels[len(tasks)], runs, tasks)
    handles = [plt.Rectangle((0, 0), 1, 1, color="gray", alpha=alpha) for alpha in (1, 0.5)]
    names = ["TD3+BC", "IQL"]
    if len(panels) > len(tasks) + 1:
        panels[-1].legend(handles, names, loc="center", frameon=False)
    else:
        figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    save(figure, path)


def name_task(dataset):
    """hopper-medium-v2 -> hopper-medium; halfcheetah-medium-replay-speed3 -> HalfCheetah, 3 m/s."""
    log, _, speed = dataset.removesuffix("-v2").partition("-speed")
    if not speed:
        return log.replace("pendulum", "Pendulum")
    log = log.replace("-medium-replay", "").capitalize().replace("cheetah", "Cheetah")
    return f"{log}, {speed} m/s"


def draw_new_task(axes, runs, dataset):
    bars = {"all rewards": ["oracle 1"], "100 + imputed": ["imputed-gp 100"]}
    bars |= {"100 labels alone": ["labeled 100"], "100 + constant": ["mean 100", "zero 100"]}
    base = log_returns(scored_log(runs, dataset)).mean()
    for algorithm, shift, alpha in (("td3bc", -0.2, 1), ("iql", 0.2, 0.5)):
        for place, settings in enumerate(bars.values()):
            found = [runs.get((dataset, f"{algorithm} {setting}")) for setting in settings]
            color = COLORS[settings[0].split()[0].removesuffix("-gp")]
            draw_from(axes, base, found, place + shift, {"color": color, "alpha": alpha})
    bc = [runs.get((dataset, "bc oracle 1"))]
    draw_from(axes, base, bc, len(bars), {"color": COLORS["bc"]})
    axes.axvline(base, color="gray", linewidth=1)
    side = "right" if base > np.mean(axes.get_xlim()) else "left"
    axes.text(base, -0.55, " the log's mean ", fontsize="small", color="gray", ha=side)
    axes.set_yticks(range(len(bars) + 1), [*bars, "BC"])
    axes.set(xlabel="return", ylim=(len(bars) + 0.5, -0.9))
    axes.set_title(name_task(dataset), fontsize="medium")
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))


def draw_from(axes, base, found, place, style):
    """A bar from the log's mean to the best run's."""
    scores = [run.scores for run in found if run]
    if scores:
        best = max(scores, key=np.mean)
        style |= {"xerr": spread([best]), "left": base, "ecolor": "gray"}
        axes.barh([place], [np.mean(best) - base], 0.38, **style)


def draw_gp_rewards(axes, runs, datasets):
    """Of the first task: what the process imputes from a hundred labels, and what is true."""
    run = runs.get((datasets[0], "td3bc imputed-gp 100")) if datasets else None
    found = list(run.paths[0].glob("gp-*/full.hdf5")) if run else []
    if not found:
        return
    axes.set_axis_on()
    with h5py.File(scored_log(runs, datasets[0])) as file:
        true = file["rewards"][:]
    with h5py.File(found[0]) as file:
        imputed, labeled = file["rewards"][:], file["labeled"][:]
    some = np.random.default_rng(0).permutation(np.flatnonzero(~labeled))[:5000]
    draw_scatter(axes, true[some], imputed[some], "imputed")
    axes.set_title(f"rewards imputed from\n100 labels, R² = {r2(run)[0]:.2f}", fontsize="medium")


def draw_scatter(axes, true, imputed, rewards):
    axes.plot(true, imputed, ".", color=COLORS[rewards], markersize=3, alpha=0.5)
    ends = [true.min(), true.max()]
    axes.plot(ends, ends, color=COLORS["oracle"], linewidth=1)
    axes.set(xlabel="true reward", ylabel="imputed reward")


def spread(scores):
    """Error bars, the std over seeds; none if there is but one."""
    stds = [np.std(each) if len(each) > 1 else 0 for each in scores]
    return stds if any(stds) else None


def save(figure, path, ncols=None):
    """With one legend below all panels; what several have in common stands there once."""
    if ncols:
        entries = {}
        for axes in figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels()):
                entries[label] = handle
        labels = list(entries)
        figure.legend(entries.values(), labels, loc="outside lower center", ncols=ncols)
    figure.savefig(path, dpi=220)
    plt.close(figure)


def draw_figure2(runs, datasets, settings, path):
    """As the paper's: boxes over seeds at 1% and 5%; lines at 100%, 1% + imputed, and BC."""
    figure, panels = make_panels(datasets, {"td3bc": "TD3+BC", "iql": "IQL"})
    fractions = fractions_of(settings, "labeled")
    for (dataset, algorithm), axes in panels.items():
        draw_line(axes, runs.get((dataset, f"{algorithm} oracle 1")), "-")
        draw_line(axes, runs.get((dataset, f"{algorithm} imputed 0.01")), "--")
        draw_line(axes, runs.get((dataset, "bc oracle 1")), ":")
        for x, fraction in enumerate(fractions):
            draw_box(axes, runs.get((dataset, f"{algorithm} labeled {fraction}")), x)
        axes.set_xticks(range(len(fractions)), [percent(fraction) for fraction in fractions])
        axes.set(xlabel="transitions with a reward", ylabel=metric(runs))
        axes.set_xlim(-0.6, len(fractions) - 0.4)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    save(figure, path, ncols=2)


def make_panels(datasets, columns):
    """{(dataset, name of a column): axes}, by the titles of columns."""
    size = (6.5, 1 + 2.4 * len(datasets))
    shape = (len(datasets), len(columns))
    figure, rows = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    panels = {}
    for dataset, row in zip(datasets, rows):
        for name, axes in zip(columns, row):
            axes.set_title(f"{columns[name]}\n{name_task(dataset)}", fontsize="medium")
            panels[dataset, name] = axes
    return figure, panels


def draw_line(axes, run, style):
    if run:
        label, color = name_curve(run.setting), color_of(run.setting)
        axes.axhline(np.mean(run.scores), color=color, linestyle=style, label=label)


def draw_box(axes, run, x):
    if run:
        style = {"patch_artist": True, "boxprops": {"facecolor": color_of(run.setting)}}
        style |= {"medianprops": {"color": "black"}, "label": "labelled transitions only"}
        axes.boxplot([run.scores], positions=[x], widths=0.3, whis=(0, 100), **style)


def color_of(setting):
    algorithm, rewards, _ = setting.split()
    return COLORS["bc" if algorithm == "bc" else rewards]


def name_curve(setting):
    """Beside others of the same agent."""
    return title(setting).removeprefix("TD3+BC ").removeprefix("IQL ")


def fractions_of(settings, rewards):
    fractions = {setting.split()[2] for setting in settings if setting.split()[1] == rewards}
    return sorted(fractions, key=float)


def draw_labels(runs, datasets, fractions, sweeps, path):
    """Score and R² against the number of labels, with either reward model."""
    figure, panels = make_panels(datasets, {"score": "TD3+BC", "r2": "Rewards"})
    for dataset in datasets:
        left, right = panels[dataset, "score"], panels[dataset, "r2"]
        # Side by side, so that no error bar hides another.
        for model, rewards, shift in (("mlp", "imputed", 0.96), ("gp", "imputed-gp", 1.04)):
            scores = {}
            for fraction in fractions:
                run = runs.get((dataset, f"td3bc {rewards} {fraction}"))
                count = count_labels(runs.get((dataset, f"td3bc imputed-gp {fraction}")))
                if run and count:
                    scores[count] = run.scores
            table = [row for row in sweeps.get(dataset, []) if row["model"] == model]
            r2s = {row["labels"]: np.array(row["r2"], float) for row in table}
            for axes, points in ((left, scores), (right, r2s)):
                x = [shift * count for count in points]
                means = [np.mean(each) for each in points.values()]
                style = {"color": COLORS[rewards], "label": model.upper(), "marker": "o"}
                axes.errorbar(x, means, spread(points.values()), capsize=3, **style)
                axes.set(xlabel="labels", xscale="log")
                axes.xaxis.set_major_formatter("{x:,.0f}")
                axes.xaxis.set_minor_formatter("")
        draw_line(left, runs.get((dataset, "td3bc oracle 1")), "-")
        left.set(ylabel=metric(runs), ylim=(min(0, left.get_ylim()[0]), None))
        right.set(ylabel="R² of hidden rewards", ylim=(max(-1, right.get_ylim()[0]), 1.05))
    save(figure, path, ncols=3)


def draw_curves(runs, datasets, settings, path):
    """Score against updates: mean over seeds, and their standard deviation as a band."""
    names = {setting.split()[0] for setting in settings} - {"bc"}
    figure, panels = make_panels(datasets, {name: AGENTS[name] for name in sorted(names)[::-1]})
    for (dataset, algorithm), axes in panels.items():
        for setting in settings:
            run = runs.get((dataset, setting))
            if run and setting.split()[0] in (algorithm, "bc"):
                draw_curve(axes, run, fractions_of(settings, setting.split()[1]))
        axes.set(xlabel="updates", ylabel=metric(runs))
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    save(figure, path, ncols=2)


def draw_curve(axes, run, fractions):
    """The fewer the labels, the paler."""
    evaluated, values = run.evaluations.T
    updates = np.unique(evaluated)
    each = [values[evaluated == update] for update in updates]  # of all seeds
    mean, std = np.array([np.mean(x) for x in each]), np.array([np.std(x) for x in each])
    alpha = (1 + fractions.index(run.setting.split()[2])) / len(fractions)
    color, every = color_of(run.setting), max(1, len(updates) // 10)
    style = {"color": color, "alpha": alpha, "label": name_curve(run.setting)}
    axes.plot(updates, mean, ".-", markevery=every, **style)
    if len(run.scores) > 1:
        axes.fill_between(updates, mean - std, mean + std, color=color, alpha=0.15 * alpha)


def print_absent(runs, found, paths, common):
    """Runs that are in no table: of another protocol, or not finished."""
    lines = []
    for run in found:
        if run not in runs.values():
            others = [part for part in protocol(run) if part not in common]
            lines += [f"- left out, {', '.join(others)}: {path}" for path in run.paths]
    lines += [f"- missing: {path}" for path in paths if not is_finished(path)]
    if lines:
        print("\n".join(lines) + "\n")


def main(target, paths):
    if target == "newtask":
        PROTOCOL.remove("num_updates")  # the table says how many
    finished = [path for path in paths if is_finished(path)]
    found = read_runs([path for path in finished if not is_sweep(path)])
    swept = [path for path in finished if is_sweep(path)]
    sweeps = {split_name(path)[0]: read_json(path / "result.json")["table"] for path in swept}
    if not found:
        sys.exit(f"error: no finished run of {target} in {paths[0].parent}")
    common, _ = Counter(protocol(run) for run in found).most_common(1)[0]
    runs = {(run.dataset, run.setting): run for run in found if protocol(run) == common}
    names = [split_name(path) for path in paths if not is_sweep(path)]
    datasets = list(dict.fromkeys(dataset for dataset, _ in names))
    settings = list(dict.fromkeys(setting for _, setting in names))
    trained = {dataset for dataset, _ in runs}
    present = [dataset for dataset in datasets if dataset in trained]
    number = len(swept) + sum(len(run.paths) for run in runs.values())

    print(f"# {target}\n")
    print(f"{number} of {len(paths)} runs; {scripts(runs)}; {', '.join(common)}.\n")
    if target == "labels":
        fractions = fractions_of(settings, "imputed")
        print_labels(runs, datasets, fractions)
    elif target == "newtask":
        print_new_tasks(runs, present)
    else:
        print_scores(runs, datasets, settings)
    if metric(runs) == "score":
        print_iqm(runs, settings)
    if target == "controls":
        print_controls(runs, datasets)
    if sweeps:
        print_sweeps(sweeps)
    print_absent(runs, found, paths, common)

    results = Path("results")
    results.mkdir(exist_ok=True)
    write_csv(results / f"{target}.csv", runs)
    written = [f"{target}.csv", "curves.png"]
    if target == "newtask":
        draw_new_tasks(runs, present, results / "newtask.png")
        written.append("newtask.png")
        settings = [x for x in settings if x.split()[2] not in ("30", "300", "1000")]
    draw_curves(runs, present, settings, results / "curves.png")
    if target in ("table1", "figure2", "bundled"):
        draw_figure2(runs, present, settings, results / "figure2.png")
        written.append("figure2.png")
    if target in ("table1", "bundled"):
        draw_overview(runs, present, results / "overview.png")
        written.append("overview.png")
    if target == "labels":
        draw_labels(runs, present, fractions, sweeps, results / "labels.png")
        written.append("labels.png")
    print(", ".join(f"results/{name}" for name in written))


if __name__ == "__main__":
    main(sys.argv[1], [Path(path) for path in sys.argv[2:]])
PYTHON
