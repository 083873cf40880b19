"""What two scripts both need is the same text in each, in the same place: names what drifted."""

import ast
import difflib
import io
import re
import tokenize
import tomllib
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
AGENTS = ("td3bc_imputed.py", "iql_imputed.py")
SCRIPTS = (*AGENTS, "reward_model.py")
PAIRS = list(combinations(SCRIPTS, 2))
# What a script has of its own: what it is called with, and the algorithm.
OWN = {"docstring", "imports", "Args", "check_arguments", "main", "__main__"}
ALGORITHM = {"make_transitions", "Agent", "critic_backward", "actor_backward", "update"}
BY_ALGORITHM = {"compile_losses", "MAY_CHANGE"}  # IQL's rate depends on the number of updates
IQL_ALONE = {"StateMLP", "init_orthogonal", "target_q", "value_backward", "set_actor_rate"}
LINES = {"td3bc_imputed.py": 985, "iql_imputed.py": 1_030, "reward_model.py": 1_005}


def read(script):
    return (ROOT / script).read_text("utf-8")


def name_of(node):
    match node:
        case ast.FunctionDef() | ast.ClassDef():
            return node.name
        case ast.Assign(targets=[target]) | ast.AugAssign(target=target):
            return ast.unparse(target)
        case ast.Expr(value=ast.Call(func=function)):
            return ast.unparse(function)
        case ast.Import() | ast.ImportFrom():
            return "imports"
        case ast.If():
            return "__main__"
        case ast.Expr(value=ast.Constant()):
            return "docstring"
    raise ValueError(ast.unparse(node))


def blocks_of(script):
    """Each function, class and constant with the comments above it: name -> (heading, text)."""
    lines = read(script).splitlines()
    blocks, heading, start = {}, "", 0
    for node in ast.parse(read(script)).body:
        text = []
        for line in lines[start : node.end_lineno]:
            if line.startswith(("# --- TD3+BC ", "# --- IQL ")):
                heading = "the algorithm"
            elif line.startswith("# ---"):
                heading = line
            elif line:
                text.append(line)
        start = node.end_lineno
        name = name_of(node)
        if name in blocks:  # gather = compiled(gather), the next import
            blocks[name][1].extend(text)
        else:
            blocks[name] = (heading, text)
    return blocks


def differing_lines(first, second):
    return [line for line in difflib.ndiff(first, second) if line[0] in "+-"]


# --- The copies ---
@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_what_two_scripts_share_is_the_same_text_under_the_same_heading(pair):
    first, second = map(blocks_of, pair)
    shared = first.keys() & second.keys() - OWN - ALGORITHM - BY_ALGORITHM
    assert len(shared) > 25
    for name in shared:
        assert first[name] == second[name], f"{name} differs between {pair}"


@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_what_two_scripts_share_stands_in_the_same_order(pair):
    first, second = map(blocks_of, pair)
    shared = first.keys() & second.keys() - ALGORITHM
    assert [name for name in first if name in shared] == [name for name in second if name in shared]


def test_the_agents_share_everything_but_the_algorithm():
    td3bc, iql = map(blocks_of, AGENTS)
    assert td3bc.keys() ^ iql.keys() == IQL_ALONE
    assert td3bc["imports"] == iql["imports"]
    assert td3bc["__main__"] == iql["__main__"]
    assert {td3bc[name][0] for name in ALGORITHM} == {"the algorithm"}
    assert {iql[name][0] for name in ALGORITHM} == {"the algorithm"}


def test_main_differs_only_where_it_calls_the_algorithm():
    td3bc, iql = (blocks_of(script)["main"][1] for script in AGENTS)
    calls = r"_imputed__|set_actor_rate|policy_freq|first_update \+ 1|tqdm\("
    for line in differing_lines(td3bc, iql):
        assert re.search(calls, line), line


def test_a_diff_of_the_agents_shows_the_algorithms_in_at_most_200_lines():
    td3bc, iql = (read(script).splitlines() for script in AGENTS)
    assert len(differing_lines(td3bc, iql)) <= 200


# --- Headings ---
def headings_of(script):
    return re.findall(r"^# -.*", read(script), re.MULTILINE)


@pytest.mark.parametrize("script", SCRIPTS)
def test_headings_are_of_one_style_and_none_stands_twice(script):
    headings = headings_of(script)
    assert len(set(headings)) == len(headings)
    for heading in headings:
        assert re.fullmatch(r"# --- [A-Z].* ---", heading), heading


def test_the_science_comes_first_and_only_its_heading_differs():
    td3bc, iql = map(headings_of, AGENTS)
    assert td3bc[:2] == iql[:2] == headings_of("reward_model.py")[:2]
    assert td3bc[1].startswith("# --- Reward model ")
    assert td3bc[2].startswith("# --- TD3+BC ")
    assert iql[2].startswith("# --- IQL ")
    assert td3bc[3:] == iql[3:]
    for script in SCRIPTS:
        before = read(script).split(td3bc[0])[0]
        assert len(before.splitlines()) < 120, "the science begins late"


# --- Arguments ---
def fields_of(script):
    """The text of each argument, with the comments above it but for headings."""
    (args,) = (node for node in ast.parse(read(script)).body if name_of(node) == "Args")
    lines, fields, start = read(script).splitlines(), {}, args.lineno
    for node in args.body:
        text = [line for line in lines[start : node.end_lineno] if "# --- " not in line and line]
        fields[node.target.id] = text
        start = node.end_lineno
    return fields


@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_shared_arguments_have_the_same_default_and_help(pair):
    first, second = map(fields_of, pair)
    own = {"scale_rewards", "learning_rate", "tau", "num_updates"}  # of an algorithm
    own |= {"num_seeds", "run_dir"} if "reward_model.py" in pair else set()
    shared = first.keys() & second.keys()
    for name in shared - own:
        assert first[name] == second[name], f"--{name} differs between {pair}"
    assert len(shared) > 10


# --- The first lines ---
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_begins_with_its_licence_and_the_requirements(script):
    text = read(script)
    assert text.startswith("# SPDX-License-Identifier: MIT\n# /// script\n")
    block = re.search(r"^# /// script\n(.*?)^# ///$", text, re.MULTILINE | re.DOTALL)[1]
    metadata = tomllib.loads(re.sub("^#", "", block, flags=re.MULTILINE))
    assert metadata["dependencies"] == (ROOT / "requirements.txt").read_text().split()


# --- The budget: what comes in takes as much out ---
def code_tokens(script):
    """Number of tokens on each line of code; a string, formatted or not, is one."""
    notes = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}
    counts, depth = Counter(), 0
    for token in tokenize.generate_tokens(io.StringIO(read(script)).readline):
        kind = tokenize.tok_name[token.type]
        depth -= kind == "FSTRING_END"  # from Python 3.12 on, what a string formats is tokens, too
        if depth == 0 and kind not in notes | {"FSTRING_END"}:
            counts[token.start[0]] += 1
        depth += kind == "FSTRING_START"
    return counts


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_stays_as_short_and_as_plain_as_it_is(script):
    rule = f"{script}: what comes in takes as much out"
    lines = read(script).splitlines()
    assert len(lines) <= LINES[script], rule
    tokens = code_tokens(script)
    assert sum(tokens.values()) / len(tokens) < 10.65, f"{rule}, and is not packed"
    wide = [line for line in lines if len(line) > 100 and not re.search("[0-9a-f]{64}", line)]
    assert len(wide) <= 2, rule
    for node in ast.walk(ast.parse(read(script))):
        if isinstance(node, ast.FunctionDef):
            limit = 115 if node.name == "main" else 60
            assert node.end_lineno - node.lineno < limit, f"{rule}: {node.name} is too long"
