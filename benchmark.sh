#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# The paper's Table 1 and Figure 2, and more, out of one command:
#
#   bash benchmark.sh list table1      its commands, one a line, each complete
#   bash benchmark.sh run table1       run those not finished; may be interrupted and repeated until all are done
#   bash benchmark.sh report table1    a Markdown table; results/table1.csv, figure2.png and curves.png
#   sbatch --array=0-62%8 benchmark.sh run table1      on a SLURM cluster, one line of the list each
#
# Targets:
#   table1     9 D4RL datasets x (all rewards, 1% labeled, 1% imputed) x (TD3+BC, IQL), and behaviour cloning: 63 runs
#   figure2    2 of them, with 1% and 5% labeled and the runs of table1 that belong to the picture: 18 runs
#   labels     3 of them, imputed from 0.01%, 0.1%, 1% and 10% labels, beyond the paper: 24 runs
#   bundled    table1 on the bundled dataset with 3 seeds and 10,000 updates, minutes on a laptop: 7 runs
#
# Settings, from the environment: DATASETS=folder, D4RL-schema files that replace the target's datasets (named
# halfcheetah-*.hdf5, hopper-*.hdf5, walker2d-*.hdf5, or after any other Gymnasium environment); JOBS at a time (1);
# SEEDS (5); UPDATES (1000000); OPTIONS for every run, such as --eval-workers 8; RUNS, where the run directories are
# (runs/benchmark); PYTHON (python).
set -uo pipefail

fail() { echo "error: $*" >&2 && exit 2; }

action=${1:-} target=${2:-}
[[ $action =~ ^(list|run|report|one)$ && $target =~ ^(table1|figure2|labels|bundled)$ ]] ||
    fail "usage: bash benchmark.sh list|run|report table1|figure2|labels|bundled"
[[ -z ${DATASETS:-} || -d $DATASETS ]] || fail "no folder DATASETS=$DATASETS"
[[ -z ${DATASETS:-} ]] || DATASETS=$(realpath "$DATASETS")
self=$(realpath "$0") home=$(dirname "$(realpath "$0")")
[[ -e $home/td3bc_imputed.py ]] || home=${SLURM_SUBMIT_DIR:-$home} # SLURM runs a copy of this script from elsewhere
cd "$home" && [[ -e td3bc_imputed.py ]] || fail "no td3bc_imputed.py in $home: submit from the folder of the scripts"
jobs=${JOBS:-1} runs=${RUNS:-runs/benchmark} python=${PYTHON:-python}
[[ $jobs =~ ^[1-9][0-9]*$ ]] || fail "JOBS must be a positive number, not $jobs"
cores=${SLURM_CPUS_PER_TASK:-$(nproc)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + jobs - 1) / jobs))}

# Datasets, and settings: algorithm, rewards, fraction of labels.
seeds=5 updates=1000000 more=()
settings=({td3bc,iql}" "{"oracle 1","labeled 0.01","imputed 0.01"} "bc oracle 1")
case $target in
    table1) datasets=({halfcheetah,hopper,walker2d}-medium{,-replay,-expert}-v2) ;;
    figure2)
        datasets=(walker2d-medium-replay-v2 halfcheetah-medium-expert-v2)
        settings=({td3bc,iql}" "{"oracle 1","labeled 0.01","labeled 0.05","imputed 0.01"} "bc oracle 1") ;;
    labels)
        datasets=({halfcheetah,hopper,walker2d}-medium-replay-v2)
        settings=({td3bc,iql}" imputed "{0.0001,0.001,0.01,0.1}) ;;
    bundled) datasets=(halfcheetah-medium-replay-mini) seeds=3 updates=10000 more=(--eval-freq 1000) ;;
esac
if [[ -n ${DATASETS:-} ]]; then
    mapfile -t datasets < <(cd "$DATASETS" && find . -maxdepth 1 -name \*.hdf5 | LC_ALL=C sort | sed "s:./::; s:.hdf5$::")
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
            options=(--env-id "$dataset" --rewards "$rewards")
            [[ -z ${DATASETS:-} ]] || options+=(--dataset-path "$DATASETS/$dataset.hdf5")
            [[ $rewards == oracle ]] || options+=(--label-fraction "$fraction")
            [[ $algorithm != bc ]] || options+=(--alpha 0)
            options+=(--num-seeds "${SEEDS:-$seeds}" --num-updates "${UPDATES:-$updates}" "${more[@]}")
            echo "$python ${algorithm/#bc/td3bc}_imputed.py$(printf " %q" "${options[@]}")${OPTIONS:+ $OPTIONS}" \
                "--run-dir $(printf "%q" "$runs/${dataset}__${setting// /__}") --resume"
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
    ((code)) || echo "$command" >"$run_dir/command" # the same words finish no other run than this one
    if ((code)); then
        echo "[$((number + 1))/$total] failed with exit code $code: $command"
        [[ -z ${FAILED:-} ]] || echo "$command" >>"$FAILED"
    elif ((jobs > 1)); then
        echo "[$((number + 1))/$total] $(tail -n 1 "$run_dir.log")"
    fi
    return $code
}

case $action in
    list) commands; exit ;;
    one) # for xargs, which goes on after any code but 255: a run stopped by Ctrl-C or SIGTERM stops the others
        one "$3"
        case $? in 130 | 143) exit 255 ;; *) exit 0 ;; esac ;;
    run)
        if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
            one "$SLURM_ARRAY_TASK_ID" && exit || exit
        fi
        FAILED=$(mktemp) && export FAILED
        trap 'rm -f "$FAILED"' EXIT
        seq 0 $(($(run_dirs | wc -l) - 1)) | xargs -P "$jobs" -I{} bash "$self" one "$target" {} || exit 130
        [[ -s $FAILED ]] || exit 0
        echo "failed, $(wc -l <"$FAILED") of $(run_dirs | wc -l):" && cat "$FAILED"
        exit 1 ;;
esac

# The report, from the run directories alone.
mapfile -t expected < <(run_dirs)
MPLBACKEND=agg exec "$python" - "$target" "${expected[@]}" <<'PYTHON'
import csv
import json
import sys
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

# Table 1 of Romeo & Bagdanov (2024), as printed: (BC, TD3+BC, IQL) with all rewards, with 1%, with 1% + imputed.
PAPER = """
halfcheetah-medium-v2        42.60 48.30  47.40   10.03 18.28   48.50 44.46
hopper-medium-v2             52.90 59.30  66.30   11.32 15.53   58.13 36.47
walker2d-medium-v2           75.30 83.70  78.30    6.00  1.21   82.81 69.87
halfcheetah-medium-replay-v2 36.60 44.60  44.20    2.60 13.38   44.71 32.73
hopper-medium-replay-v2      18.10 60.90  94.70    5.11  4.56   52.46 26.42
walker2d-medium-replay-v2    26.00 81.80  73.90    5.37  1.44   69.15 47.38
halfcheetah-medium-expert-v2 55.20 90.70  86.70   21.84 19.28   87.88 51.77
hopper-medium-expert-v2      52.50 98.00  91.50   11.62 21.84   83.65 22.94
walker2d-medium-expert-v2   107.50 110.10 109.60   8.77  8.04   89.30 107.38
"""
COLUMNS = ["bc oracle 1", "td3bc oracle 1", "iql oracle 1", "td3bc labeled 0.01", "iql labeled 0.01"]
COLUMNS += ["td3bc imputed 0.01", "iql imputed 0.01"]
PAPER = {row.split()[0]: dict(zip(COLUMNS, map(float, row.split()[1:]))) for row in PAPER.split("\n") if row}
NAMES = {"bc": "BC", "td3bc": "TD3+BC", "iql": "IQL"}
COLORS = {"bc": "tab:green", "td3bc": "tab:blue", "iql": "tab:orange"}
Run = namedtuple("Run", "dataset setting path config result scores")


def title(setting):
    algorithm, rewards, fraction = setting.split()
    if rewards == "oracle":
        return NAMES[algorithm] + (" 100%" if algorithm != "bc" else "")
    return f"{NAMES[algorithm]} {100 * float(fraction):g}%" + (" + imputed" if rewards == "imputed" else "")


def read_run(path):
    """A finished run; its setting is in the name of its folder: dataset__algorithm__rewards__fraction."""
    dataset, *setting = path.name.rsplit("__", 3)
    scores = np.loadtxt(path / "scores.csv", delimiter=",", skiprows=1, ndmin=2)  # update, seed, return, score
    config, result = (json.loads((path / name).read_text()) for name in ("config.json", "result.json"))
    return Run(dataset, " ".join(setting), path, config, result, scores)


def protocol(run):
    """What must be the same for runs to stand in one table."""
    names = "num_updates eval_episodes seed num_seeds eval_seed batch_size learning_rate gamma tau matmul_precision"
    names += " reward_hidden_dim reward_epochs reward_learning_rate reward_batch_size"
    parts = {name: run.config.get(name) for name in names.split()} | run.result["versions"]
    return tuple(f"{name} {value}" for name, value in parts.items())


def iqm(scores):
    """Mean of the middle half of all scores."""
    scores = np.sort(np.ravel(scores))
    cut = len(scores) // 4
    return scores[cut : len(scores) - cut].mean()


def interval(scores, resamples=10_000):
    """95% interval of the IQM of scores (tasks, seeds), seeds drawn anew within each task (Agarwal et al. 2021)."""
    tasks, seeds = scores.shape
    drawn = np.random.default_rng(0).integers(seeds, size=(resamples, tasks, seeds))
    return np.percentile([iqm(scores[np.arange(tasks)[:, None], rows]) for rows in drawn], [2.5, 97.5])


def print_table(header, rows):
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    print("".join("| " + " | ".join(row) + " |\n" for row in rows))


def average(values):
    """Mean of a column, None unless it is complete."""
    return np.mean(values) if values and None not in values else None


def figure2(runs, datasets, boxed, path):
    """Boxes over seeds by fraction of labels; lines: BC, all rewards, 1% imputed. After the paper's Figure 2."""
    figure, panels = plt.subplots(1, len(datasets), figsize=(2.4 + 3 * len(datasets), 4), squeeze=False)
    for axes, dataset in zip(panels[0], datasets):
        found = {run.setting: run.result["per_seed"] for run in runs if run.dataset == dataset}
        fractions = sorted({setting.split()[2] for setting in found if setting.split()[1] == boxed}, key=float)
        for offset, algorithm, hatch in ((-0.18, "td3bc", ""), (0.18, "iql", "///")):
            for rewards, style in (("oracle 1", "-"), ("imputed 0.01", "--")):
                if f"{algorithm} {rewards}" in found and boxed != rewards.split()[0]:
                    line = {"color": COLORS[algorithm], "linestyle": style, "label": title(f"{algorithm} {rewards}")}
                    axes.axhline(np.mean(found[f"{algorithm} {rewards}"]), linewidth=2 if offset < 0 else 1, **line)
            for x, fraction in enumerate(fractions):
                scores = found.get(f"{algorithm} {boxed} {fraction}")
                if scores:
                    face = {"facecolor": COLORS[algorithm], "hatch": hatch, "alpha": 0.8}
                    box = {"patch_artist": True, "boxprops": face, "medianprops": {"color": "black"}, "whis": (0, 100)}
                    axes.boxplot([scores], positions=[x + offset], widths=0.3, manage_ticks=False, **box)
        if "bc oracle 1" in found:
            axes.axhline(np.mean(found["bc oracle 1"]), color=COLORS["bc"], linestyle=":", label="BC")
        axes.set_xticks(range(len(fractions)), [f"{100 * float(fraction):g}%" for fraction in fractions])
        axes.set(title=dataset, xlabel="share of transitions with a reward", xlim=(-0.6, len(fractions) - 0.4))
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    panels[0][0].set_ylabel(runs[0].result["metric"])
    handles = {label: handle for axes in panels[0] for handle, label in zip(*axes.get_legend_handles_labels())}
    handles |= {f"{NAMES[a]} {boxed}": plt.Rectangle((0, 0), 1, 1, facecolor=COLORS[a], hatch=h, alpha=0.8)
                for a, h in (("td3bc", ""), ("iql", "///"))}  # fmt: skip
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2 + 2 * (len(datasets) > 1))
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)


def curves(runs, datasets, path):
    """Score against updates: mean over seeds, and their standard deviation as a band."""
    figure, panels = plt.subplots(len(datasets), 2, figsize=(6.5, 1 + 2.2 * len(datasets)), squeeze=False)
    styles = {"oracle": "-", "imputed": "--", "labeled": ":"}
    fractions = sorted({run.setting.split()[2] for run in runs}, key=float, reverse=True)
    for axes, (dataset, algorithm) in zip(panels.flat, [(d, a) for d in datasets for a in ("td3bc", "iql")]):
        for run in runs:
            name, rewards, fraction = run.setting.split()
            if run.dataset != dataset or name not in (algorithm, "bc"):
                continue
            updates, column = np.unique(run.scores[:, 0]), 2 if run.result["metric"] == "return" else 3
            table = run.scores[:, column].reshape(len(updates), -1)  # (evaluations, seeds)
            shade = str(0.7 * fractions.index(fraction) / len(fractions))  # the fewer labels, the paler
            color, style = ("tab:green", "-.") if name == "bc" else (shade, styles[rewards])
            mean, std = table.mean(axis=1), table.std(axis=1)
            axes.plot(updates, mean, style, color=color, linewidth=1.5, label=title(run.setting).split(" ", 1)[-1])
            axes.fill_between(updates, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
        axes.set_title(f"{dataset}\n{NAMES[algorithm]}", fontsize="small")
        axes.set(xlabel="updates", ylabel=runs[0].result["metric"])
    handles = {label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)


target, paths = sys.argv[1], [Path(path) for path in sys.argv[2:]]
found = [read_run(path) for path in paths if (path / "result.json").exists()]
if not found:
    sys.exit(f"error: no finished run of {target} in {paths[0].parent}")
common, _ = Counter(map(protocol, found)).most_common(1)[0]
runs = [run for run in found if protocol(run) == common]
datasets = list(dict.fromkeys(path.name.rsplit("__", 3)[0] for path in paths))
settings = list(dict.fromkeys(" ".join(path.name.rsplit("__", 3)[1:]) for path in paths))
seeds = {(run.dataset, run.setting): run.result["per_seed"] for run in runs}

commits = sorted({str(run.result["commit"])[:9] for run in runs})
print(f"# {target}\n\n{len(runs)} of {len(paths)} runs, commit {', '.join(commits)}; {', '.join(common)}.")
print("Mean ± std over seeds of the last evaluation; in brackets the paper's figure.\n")
rows, columns = [], defaultdict(list)
for dataset in datasets:
    row = [dataset]
    for setting in settings:
        scores, paper = seeds.get((dataset, setting)), PAPER.get(dataset, {}).get(setting)
        columns[setting].append(None if scores is None else np.mean(scores))
        columns[setting, "paper"].append(paper)
        cell = "" if scores is None else f"{np.mean(scores):.1f} ± {np.std(scores):.1f}"
        row.append(cell + (f" ({paper:.1f})" if paper is not None else ""))
    rows.append(row)
means = {key: average(values) for key, values in columns.items()}
scores_alone = all(run.result["metric"] == "score" for run in runs)  # raw returns of several tasks have no mean
if scores_alone and len(datasets) > 1:
    ours = ["" if means[setting] is None else f"{means[setting]:.1f}" for setting in settings]
    paper = ["" if means[setting, "paper"] is None else f" ({means[setting, 'paper']:.1f})" for setting in settings]
    rows.append(["average", *map("".join, zip(ours, paper))])
for algorithm in ("td3bc", "iql"):
    oracle, imputed = f"{algorithm} oracle 1", f"{algorithm} imputed 0.01"
    if oracle in settings and imputed in settings:
        settings_row = [(columns[imputed][i], columns[oracle][i]) for i in range(len(datasets))]
        settings_row += [(means[imputed], means[oracle])] * (len(rows) - len(datasets))
        for row, (above, below) in zip(rows, settings_row):
            row.append(f"{above / below:.2f}" if above is not None and (below or 0) > 0 else "")
ratios = [f"{NAMES[a]} imputed / 100%" for a in ("td3bc", "iql") if f"{a} oracle 1" in settings]
print_table(["dataset", *map(title, settings), *ratios], rows)

if scores_alone:
    rows = []
    for setting in settings:
        scores = np.array([seeds[dataset, setting] for dataset in datasets if (dataset, setting) in seeds])
        if len(scores):
            low, high = interval(scores)
            rows.append([title(setting), f"{iqm(scores):.1f}", f"{low:.1f} to {high:.1f}", str(len(scores))])
    print_table(["setting", "IQM", "95% bootstrap interval", "tasks"], rows)
for run in found:
    if run not in runs:
        print(f"- left out, {', '.join(sorted(set(protocol(run)) - set(common)))}: {run.path}")
for path in paths:
    if path not in [run.path for run in found]:
        print(f"- missing: {path}")

Path("results").mkdir(exist_ok=True)
with open(f"results/{target}.csv", "w", newline="") as file:
    names = ["metric", "mean", "std", "num_updates", "eval_episodes"]
    table = csv.writer(file)
    table.writerow(["dataset", "algorithm", "rewards", "label_fraction", *names, "seeds", "paper"])
    for run in runs:
        rest = [len(run.result["per_seed"]), PAPER.get(run.dataset, {}).get(run.setting)]
        table.writerow([run.dataset, *run.setting.split(), *(run.result[name] for name in names), *rest])
boxed, name = ("imputed", "labels") if target == "labels" else ("labeled", "figure2")
present = [dataset for dataset in datasets if any(run.dataset == dataset for run in runs)]
figure2(runs, present, boxed, f"results/{name}.png")
curves(runs, present, "results/curves.png")
print(f"\nresults/{target}.csv, results/{name}.png, results/curves.png")
PYTHON
