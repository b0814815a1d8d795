"""
Every command that README, docs/reference.md, the scripts' docstrings and speedrun.sh show is one
that the scripts, and torch's own launcher, accept as it stands; README's file tree names every file.

python -m pytest tests/test_commands.py
"""
import argparse
import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "docs/reference.md").read_text()
SCRIPTS = sorted(p.stem for p in (ROOT / "scripts").glob("*.py") if p.stem != "__init__")


def commands_in(text):
    """The `python -m scripts...` and `torchrun ...` lines of a text, without their comments."""
    text = text.replace("\\\n", " ")
    # Between backticks a command may go on in the next line of a paragraph.
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", lambda match: match[0].replace("\n", " "), text)
    found = []
    for line in text.splitlines():
        for match in re.finditer(r"(?:torchrun|python) [^`]*-m scripts\.\w+[^`]*", line):
            found.append(match[0].split(" #")[0].split(" | ")[0].split(" && ")[0].strip())
    return found


def documented():
    texts = {"README.md": README, "docs/reference.md": REFERENCE}
    for name in SCRIPTS:
        texts[name] = importlib.import_module(f"scripts.{name}").__doc__
    return [(where, command) for where, text in texts.items() for command in commands_in(text)]


class Parsed(Exception):
    """Raised in place of running a script, once its flags are parsed."""


def check_script(name, flags, monkeypatch):
    """The script takes these flags: its parser, and what it refuses after parsing."""
    script = importlib.import_module(name)
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args):
        raise Parsed(parse_args(self, *args))

    def stop(*args):
        raise Parsed

    with monkeypatch.context() as patch:
        # compute_init comes after all checks of flags, but in two scripts after other work as well.
        if hasattr(script, "compute_init") and name not in ("scripts.bench", "scripts.lmms"):
            patch.setattr(script, "compute_init", stop)
        else:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(Parsed):
            script.main(flags)


def check_command(command, monkeypatch):
    """A whole command line, given to torch's launcher where it is one."""
    words = shlex.split(re.sub(r"\$\(.*?\)", "1", command))
    if words[0] == "torchrun" or "torch.distributed.run" in words:
        start = words.index("torch.distributed.run") + 1 if words[0] != "torchrun" else 1
        launch = get_args_parser().parse_args(words[start:])
        assert launch.module, command
        # Without it, --run would be ambiguous to torchrun, whoever adds it to the command.
        assert f"-m {launch.training_script} -- " in command, command
        check_script(launch.training_script, launch.training_script_args, monkeypatch)
    else:
        at = words.index("-m")
        check_script(words[at + 1], words[at + 2:], monkeypatch)


@pytest.mark.parametrize("where, command", documented(), ids=lambda value: value[:60])
def test_documented_commands_are_accepted(where, command, monkeypatch):
    check_command(command, monkeypatch)


def test_every_script_shows_a_command():
    shown = {where for where, _ in documented()}
    assert set(SCRIPTS) <= shown


FAKE_PYTHON = """#!/usr/bin/env bash
# Stands in for $PYTHON: writes its arguments down instead of running them.
if [[ "$*" == -c*'device="cuda"'* ]]; then exit "${CUDA_STATUS:-0}"; fi
if [ "$1" = -c ]; then echo 2; exit 0; fi
printf '%q ' python "$@" >> "$COMMANDS"
echo >> "$COMMANDS"
"""
FAKE_NVIDIA_SMI = """#!/usr/bin/env bash
# Stands in for nvidia-smi: a GPU, with an old driver.
echo 535.104
"""


def speedrun(tmp_path, kind, **environment):
    """speedrun.sh with a fake python and a fake GPU. -> (exit status, stderr, its commands)."""
    for name, text in (("python", FAKE_PYTHON), ("nvidia-smi", FAKE_NVIDIA_SMI)):
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)
    log = tmp_path / "commands"
    log.touch()
    environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "COMMANDS": str(log),
                   "PATH": f"{tmp_path}:{os.environ['PATH']}",
                   "CHECKPOINTS": str(tmp_path / "out"), "HF_HOME": str(tmp_path / "hub"),
                   **environment}
    ended = subprocess.run(["bash", str(ROOT / "speedrun.sh"), kind], env=environment,
                           capture_output=True, text=True)
    commands = [line for line in log.read_text().splitlines() if "scripts." in line]
    return ended.returncode, ended.stderr, commands


@pytest.mark.parametrize("trial", ["", "1"])
@pytest.mark.parametrize("kind", ["nano", "page", "small", "gpu", "full"])
def test_commands_of_speedrun_are_accepted(kind, trial, tmp_path, monkeypatch):
    status, err, commands = speedrun(tmp_path, kind, TRIAL=trial)
    assert status == 0, err
    assert len(commands) >= 3
    for command in commands:
        check_command(command, monkeypatch)
    on_gpu = kind in ("small", "gpu", "full") and not trial
    trained = [line for line in commands if "train" in line and "tok_train --out" not in line]
    assert all(("--device-type cuda" in line) == on_gpu for line in trained)


@pytest.mark.parametrize("kind", ["small", "gpu", "full"])
def test_a_gpu_that_torch_cannot_use_is_an_error(kind, tmp_path):
    """An old driver: torch would train on the CPU without a word."""
    status, err, commands = speedrun(tmp_path, kind, CUDA_STATUS="1", TRIAL="")
    assert status == 1 and not commands
    assert "driver 535.104" in err and "set TORCH_INDEX_URL" in err


FAKE_PYTHON3 = """#!/usr/bin/env bash
# Stands in for python3 on the PATH: makes a .venv whose python writes down what pip is asked for,
# fails to install what $BROKEN names, and then fails, so that nothing is trained.
if [ "$1" != -m ]; then exit 0; fi
mkdir -p .venv/bin
cat > .venv/bin/python <<'END'
#!/usr/bin/env bash
echo "$@" >> "$COMMANDS"
if [ "$2" != pip ]; then exit 7; fi
if [ -n "${BROKEN:-}" ] && [[ " $* " == *" $BROKEN "* ]]; then exit 5; fi
END
chmod +x .venv/bin/python
"""


def set_up(tmp_path, *command, broken="", wandb_run=""):
    """Runs a script in a copy of the repository's shell scripts. -> (exit status, what pip got)."""
    for name in ("speedrun.sh", "setup_env.sh", "test.sh"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    python3 = tmp_path / "bin" / "python3"
    python3.write_text(FAKE_PYTHON3)
    python3.chmod(0o755)
    log = tmp_path / "commands"
    environment = {**os.environ, "COMMANDS": str(log), "BROKEN": broken, "TRIAL": "1",
                   "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    environment.pop("PYTHON", None)
    if wandb_run:
        environment["WANDB_RUN"] = wandb_run
    status = subprocess.run(["bash", *command], env=environment, cwd=tmp_path,
                            capture_output=True).returncode
    return status, [line for line in log.read_text().splitlines() if "pip install" in line]


@pytest.mark.parametrize("command, extras", [
    (["speedrun.sh"], set()),
    (["speedrun.sh", "page"], set()),
    (["speedrun.sh", "small"], set()),
    (["speedrun.sh", "full"], {"datasets", "huggingface_hub"}),
    (["test.sh"], {"pytest", "pytest-xdist", "datasets", "huggingface_hub", "transformers",
                   "pypdfium2"}),
    (["setup_env.sh"], set()),
])
def test_only_the_packages_that_are_needed_are_installed(tmp_path, command, extras):
    status, [torch, rest] = set_up(tmp_path, *command)
    assert status == (0 if command == ["setup_env.sh"] else 7)
    assert torch.split()[-1] == "torch==2.13.0"
    always = {"torch==2.13.0", "numpy", "pillow", "tqdm", "tiktoken", "safetensors", "matplotlib",
              "rustbpe", "rapidfuzz"}
    assert set(rest.split("check")[1].split()) == always | extras
    assert (tmp_path / ".venv" / "installed").exists()


def test_wandb_is_installed_for_a_run_that_logs_to_it(tmp_path):
    _, [_, rest] = set_up(tmp_path, "speedrun.sh", wandb_run="mine")
    assert "wandb" in rest.split()


def test_an_environment_without_pip_is_mended(tmp_path):
    """As python3 -m venv leaves it where ensurepip is missing, or is stopped."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text("#!/usr/bin/env bash\nexit 1\n")
    python.chmod(0o755)
    status, installed = set_up(tmp_path, "setup_env.sh")
    assert status == 0 and len(installed) == 2


@pytest.mark.parametrize("script", ["speedrun.sh", "test.sh", "setup_env.sh"])
def test_a_failed_installation_is_not_noted_as_done(tmp_path, script):
    status, _ = set_up(tmp_path, script, broken="tiktoken")
    assert status == 5 and not (tmp_path / ".venv" / "installed").exists()


def test_file_tree_names_every_file():
    tree = README.split("## Files")[1].split("```")[1]
    folder = ""
    named = []
    for line in tree.strip().splitlines():
        if line.endswith("/"):
            folder = line
            continue
        # Files of one line belong together; three spaces end their names.
        names = line.strip().split("   ")[0].split()
        prefix = folder if line.startswith(" ") else ""
        named += [prefix + name for name in names]
    there = set()
    for package in ("nanochat", "scripts", "tasks"):
        for path in (ROOT / package).glob("*.py"):
            if path.name != "__init__.py":
                there.add(f"{package}/{path.name}")
    assert len(named) == len(set(named))
    assert {name for name in named if name.endswith(".py")} == there
    assert all((ROOT / name).exists() for name in named)


@pytest.mark.parametrize("name", ["README.md", "FINDINGS.md", "docs/reference.md"])
def test_links_lead_to_files(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^):#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_pictures_are_there_and_light():
    """Whoever opens the repository's page loads all of them."""
    shown = set()
    for name in ("README.md", "FINDINGS.md"):
        text = (ROOT / name).read_text()
        shown.update(re.findall(r"!\[[^]]*\]\(([^)]+)\)", text))
        shown.update(re.findall(r'<img src="([^"]+)"', text))
    assert shown
    assert sum((ROOT / name).stat().st_size for name in shown) <= 300_000
    # None that nothing shows
    there = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.png")}
    assert there == {name for name in shown if name.startswith("docs/")}


def imports_of(path):
    """Our own modules that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def test_import_graph():
    """No circle and no arrow upwards: scripts -> tasks -> nanochat."""
    modules = {}
    for package in ("nanochat", "tasks", "scripts"):
        for path in (ROOT / package).glob("*.py"):
            modules[f"{package}.{path.stem}"] = path
    graph = {name: imports_of(path) & set(modules) for name, path in modules.items()}

    level = {"nanochat": 0, "tasks": 1, "scripts": 2}
    for module, targets in graph.items():
        for target in targets:
            assert level[target.split(".")[0]] <= level[module.split(".")[0]], f"{module}: {target}"

    done = set()

    def visit(module, path):
        assert module not in path, f"import circle: {' -> '.join([*path, module])}"
        if module not in done:
            for target in graph[module]:
                visit(target, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])


def test_a_documented_torchrun_line_runs(tmp_path, tokenizer_dir):
    """Two ranks, two steps, through the launcher as docs/reference.md shows it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "-m", "scripts.vis_tok_train", "--", "--run=dummy", "--preset=tiny", "--chars=10-12",
               "--num-iterations=2", "--device-batch-size=4", f"--tokenizer={tokenizer_dir}",
               f"--checkpoints={tmp_path}", "--model-tag=try", "--device-type=cpu",
               "--eval-pages=4"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    assert (tmp_path / "try/model_000002/model.safetensors").exists()
