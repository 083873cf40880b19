"""What two scripts both need is the same text in each; names the part that drifted."""

import ast
import difflib
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What each agent may have of its own: its arguments, networks, losses and update, and the lines of main that call them.
ALGORITHM = {"Args", "Agent", "make_agent", "reward_scale", "value_loss", "critic_loss"}
ALGORITHM |= {"td_target", "actor_loss", "update", "main"}
PAIRS = [("td3bc_imputed.py", "iql_imputed.py"), ("td3bc_imputed.py", "reward_model.py")]


def parts(script):
    """Source text of every top-level function, class and constant, with the comments inside it."""
    text = (ROOT / script).read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign):
            found[node.targets[0].id] = ast.get_source_segment(text, node)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    return found


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_shared_parts_are_the_same_text(pair):
    first, second = map(parts, pair)
    drifted = [name for name in first if name in second and name not in ALGORITHM and first[name] != second[name]]
    assert not drifted, f"{drifted} differ between {pair}"


def test_the_agents_share_everything_but_the_algorithm():
    first, second = parts("td3bc_imputed.py"), parts("iql_imputed.py")
    assert set(first) ^ set(second) <= ALGORITHM


def test_main_differs_only_where_it_calls_the_algorithm():
    mains = [parts(script)["main"].splitlines() for script in ("td3bc_imputed.py", "iql_imputed.py")]
    lines = [line for line in difflib.ndiff(*mains) if line[0] in "+-"]
    words = "policy_freq|data = Batch|columns|reward_scale|batch|noise|update|actor_rate|globals"
    assert len(lines) <= 20 and all(re.search(words, line) for line in lines), lines


@pytest.mark.parametrize("script", ["td3bc_imputed.py", "iql_imputed.py"])
def test_shared_arguments_have_the_same_default_and_help(script):
    shared = {line for line in parts("td3bc_imputed.py")["Args"].splitlines() if re.match(r"    \w+:", line)}
    shared &= {line for line in parts("iql_imputed.py")["Args"].splitlines()}
    own = {"alpha", "policy_noise", "noise_clip", "policy_freq", "expectile", "temperature", "num_updates"}
    for line in parts(script)["Args"].splitlines():
        if match := re.match(r"    (\w+):", line):
            assert match[1] in own or line in shared, f"--{match[1]} differs"


@pytest.mark.parametrize("script", ["td3bc_imputed.py", "iql_imputed.py", "reward_model.py"])
def test_script_header_equals_requirements(script):
    text = (ROOT / script).read_text()
    block = re.search(r"^# /// script\n(.*?)^# ///$", text, re.MULTILINE | re.DOTALL)[1]
    metadata = tomllib.loads("\n".join(line.removeprefix("#") for line in block.splitlines()))
    assert metadata["dependencies"] == (ROOT / "requirements.txt").read_text().split()
    assert text.startswith("# SPDX-License-Identifier: MIT\n")
