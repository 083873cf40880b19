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
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
QUOTED = re.findall(r"```\n(.*?)```", README.split("## How it works")[1].split("## ")[0], re.DOTALL)
SHORT = ["--num-updates", "20", "--eval-episodes", "1", "--reward-epochs", "1", "--device", "cpu"]


def parse(command, *more):
    """The script of a command, and the arguments it would get; those in `more` win."""
    _, script, *arguments = shlex.split(command, comments=True)
    module = importlib.import_module(script.removesuffix(".py"))
    return module, tyro.cli(module.Args, args=[*arguments, *more])


@pytest.mark.parametrize(
    "command", [line for line in COMMANDS if line.startswith("python") and ".py" in line.split()[1]]
)
def test_every_command_is_understood(command):
    if "tests/" not in command:
        parse(command)
    else:
        assert (ROOT / command.split()[1]).exists()


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("bash benchmark.sh")])
def test_every_benchmark_target_exists(command):
    words = shlex.split(command, comments=True)
    subprocess.run(["bash", ROOT / "benchmark.sh", "list", words[3]], check=True, capture_output=True)


def execute(snippet):
    Path("snippet.py").write_text(snippet)
    runpy.run_path("snippet.py")


def test_own_data_and_the_saved_models_work_as_written(tmp_path, monkeypatch):
    """The snippets in their order, with the commands between them made short."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    own, minari, *others = [snippet for snippet in SNIPPETS if "d3rlpy" not in snippet and "imageio" not in snippet]
    for snippet in (own, minari):
        execute(snippet)
    for command in COMMANDS:
        if "runs/mine" in command or "mine/log-v0" in command:
            module, args = parse(command, *SHORT)
            module.main(args)
    module, args = parse("python reward_model.py --run-dir runs/my_run --reward-epochs 1 --device cpu")
    module.main(args)
    assert len(others) == 3, "the policy, the reward model, and seeds as a batch dimension"
    for snippet in others:
        execute(snippet)


def test_the_snippets_that_need_other_libraries_are_valid_python():
    for snippet in SNIPPETS:
        compile(snippet, "README.md", "exec")


def test_quoted_lines_stand_in_the_scripts():
    scripts = [(ROOT / name).read_text() for name in ("td3bc_imputed.py", "iql_imputed.py", "reward_model.py")]
    lines = [line.strip() for block in QUOTED for line in block.splitlines() if line != "..."]
    assert len(lines) >= 4
    for line in lines:
        assert all(line in text for text in scripts), line


def test_links_within_the_page_and_to_files_lead_somewhere():
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)", README, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_option_named_exists():
    modules = [
        importlib.import_module(name) for name in ("td3bc_imputed", "iql_imputed", "reward_model", "benchmark_speed")
    ]
    known = {"--" + name.replace("_", "-") for module in modules for name in vars(module.Args())}
    known |= {"--help", "--no-cuda-graph", "--index-url", "--array", "--cpus-per-task"}  # tyro's, pip's and sbatch's
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known
