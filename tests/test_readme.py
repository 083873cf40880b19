"""The README's commands, snippets, quoted lines and links are true."""

import importlib
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = "\n".join(BLOCKS).splitlines()
PYTHON_COMMANDS = [line for line in COMMANDS if re.match(r"(python|uv run) \w+\.py", line)]
BENCHMARKS = [line for line in COMMANDS if line.startswith("bash benchmark.sh")]
HOW_IT_WORKS = README.split("## How it works")[1].split("\n## ")[0]
SHORT = ["--num-updates", "20", "--reward-epochs", "1", "--device", "cpu", "--compile", "off"]
SCRIPTS = ("td3bc_imputed", "iql_imputed", "reward_model")


def parse(command, more=()):
    """The script of a command, and the arguments it would get; those in `more` win."""
    words = shlex.split(command.removeprefix("uv run "), comments=True)
    words = [word for word in words if word != "python"]
    module = importlib.import_module(words[0].removesuffix(".py"))
    known = {"--" + name.replace("_", "-") for name in vars(module.Args())}
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


def test_a_hundred_labels_go_from_file_to_policy_as_written(tmp_path, monkeypatch):
    """The snippets in their order, with the commands between them made short."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    own_log, policy = SNIPPETS
    Path("snippet.py").write_text(own_log)
    runpy.run_path("snippet.py")
    for command in PYTHON_COMMANDS:
        if "my_log.hdf5" in command or "full.hdf5" in command:
            module, args = parse(command, SHORT)
            module.main(args)
    Path("snippet.py").write_text(policy)
    assert runpy.run_path("snippet.py")["action"].shape == (6,)


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
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_option_named_exists():
    known = {"--help", "--array", "--cpus-per-task"}  # sbatch's
    known |= {"--extra-index-url", "--with-requirements"}  # pip's and uv's
    for name in (*SCRIPTS, "benchmark_speed"):
        arguments = importlib.import_module(name).Args()
        known |= {"--" + option.replace("_", "-") for option in vars(arguments)}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known


def test_it_can_be_read_in_one_sitting():
    assert len(README.encode()) <= 18 * 1024
