"""
README's file tree and commands hold for the code as it stands.

    python -m pytest tests/test_readme.py -v
"""
import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_file_tree_names_every_file():
    tree = README.split("## Files")[1].split("```")[1]
    folder, named = "", set()
    for line in tree.strip().splitlines():
        name = line.split()[0]
        folder = name if name.endswith("/") else folder if line.startswith(" ") else ""
        if not name.endswith("/"):
            named.add(folder + name)
    there = {f"{d}/{f.name}" for d in ("nanochat", "scripts", "tasks") for f in (ROOT / d).glob("*.py") if f.name != "__init__.py"}
    assert named - {"tasks/words.txt", "setup_env.sh"} == there


def test_commands_name_modules_and_flags_that_exist(capsys):
    for module, flags in re.findall(r"-m (scripts\.\w+)((?: [^\s#`]+)*)", README):
        main = importlib.import_module(module).main
        try:
            main(["--help"])
        except SystemExit:
            pass
        text = capsys.readouterr().out
        for flag in re.findall(r"--[\w-]+", flags):
            assert flag in text, f"README uses {flag} of {module}, which has no such flag"
