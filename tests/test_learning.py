"""The paper's story in half a minute: with 100 labels, imputed rewards teach what labelled transitions alone do not."""

import json
from pathlib import Path

import td3bc_imputed as script

MARGIN = 5.0  # normalised score; measured differences were 15 and more


def mean_score(rewards):
    """Mean normalised score of the evaluations after 1,000 and 1,500 updates on the bundled dataset."""
    arguments = ["--rewards", rewards, "--label-fraction", "0.001", "--num-updates", "1500", "--eval-freq", "500"]
    arguments += ["--eval-episodes", "5", "--run-dir", rewards, "--device", "cpu"]
    script.main(script.tyro.cli(script.Args, args=arguments))
    scores = [float(line.split(",")[3]) for line in Path(rewards, "scores.csv").read_text().splitlines()[2:]]
    return sum(scores) / len(scores)


def test_imputed_rewards_beat_labelled_transitions_alone():
    imputed, labeled = mean_score("imputed"), mean_score("labeled")
    quality = json.loads(Path("imputed/result.json").read_text())["reward_model"]
    assert quality["r2"][0] > 0.8 and quality["return_correlation"][0] > 0.95
    assert imputed > labeled + MARGIN, (imputed, labeled)
