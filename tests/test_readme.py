"""The README's commands, snippets, quoted lines and links are true."""

import importlib
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tyro

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = "\n".join(BLOCKS).splitlines()
PREFIX = r"(PYTHONPATH=tests )?(python|uv run) (tests/)?"  # what stands before a script's name
PYTHON_COMMANDS = [line for line in COMMANDS if re.match(PREFIX + r"\w+\.py", line)]
BENCHMARKS = [line for line in COMMANDS if line.startswith("bash benchmark.sh")]
HOW_IT_WORKS = README.split("## How it works")[1].split("\n## ")[0]
SHORT = ["--num-updates", "20", "--reward-epochs", "1", "--device", "cpu", "--compile", "off"]
SCRIPTS = ("td3bc_imputed", "iql_imputed", "reward_model")


def parse(command, more=()):
    """The script of a command, and the arguments it would get; those in `more` win."""
    words = shlex.split(re.sub(PREFIX, "", command), comments=True)
    module = importlib.import_module(words[0].removesuffix(".py"))
    known = {"--" + name.replace("_", "-") for name in module.Args.__dataclass_fields__}
    for name, value in zip(more[::2], more[1::2]):
        if name in known:
            words += [name, value]
    return module, tyro.cli(module.Args, args=words[1:])


@pytest.mark.parametrize("command", PYTHON_COMMANDS)
def test_every_command_is_understood(command):
    parse(command)


@pytest.mark.parametrize("command", BENCHMARKS)
def test_every_benchmark_target_exists(command):
    target = shlex.split(command, comments=True)[3]
    assert subprocess.check_output(["bash", ROOT / "benchmark.sh", "list", target])


def test_every_file_of_the_tests_that_is_named_exists():
    for name in re.findall(r"tests/[\w/.]+\.\w+", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(\w+\.py)`", README):  # a script, or a file of the section Tests
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


def test_a_hundred_labels_go_from_log_to_policy_as_written():
    """The three commands in their order, made short, and the snippet that uses the policy."""
    commands = [line for line in PYTHON_COMMANDS if "my_log.hdf5" in line or "full.hdf5" in line]
    assert len(commands) == 3
    for command in commands:
        module, args = parse(command, SHORT)
        module.main(args)
    Path("snippet.py").write_text(SNIPPETS[1])
    assert runpy.run_path("snippet.py")["action"].shape == (6,)


def test_the_snippet_writes_a_log_that_can_be_read(capsys):
    Path("snippet.py").write_text(SNIPPETS[0])
    runpy.run_path("snippet.py")
    dataset = importlib.import_module("td3bc_imputed").load_dataset(None, Path("example.hdf5"))
    assert "10 episodes" in capsys.readouterr().out
    assert 80 <= (~np.isnan(dataset.rewards)).sum() <= 100  # of rows that are transitions


def test_quoted_lines_stand_in_the_scripts():
    blocks = re.findall(r"```\n(.*?)```", HOW_IT_WORKS, re.DOTALL)
    lines = [line.strip() for line in "\n".join(blocks).splitlines() if line != "..."]
    assert len(lines) >= 4
    for name in SCRIPTS:
        text = (ROOT / f"{name}.py").read_text("utf-8")
        for line in lines:
            assert line in text, f"{name}: {line}"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert f"\n## {target[1:].capitalize()}\n" in README
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_option_named_exists():
    known = {"--help", "--array", "--cpus-per-task"}  # sbatch's
    known |= {"--extra-index-url", "--with-requirements"}  # pip's and uv's
    for name in (*SCRIPTS, "benchmark_speed", "new_tasks"):
        options = importlib.import_module(name).Args.__dataclass_fields__
        known |= {"--" + option.replace("_", "-") for option in options}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known


def test_it_can_be_read_in_one_sitting():
    assert len(README.encode()) <= 18 * 1024
