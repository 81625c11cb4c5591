"""The house's two rules: a file of models/ stands alone, and what runs stages never imports a script."""
import ast
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = ("train_repae_e", "finetune_vae", "sample_ddp", "evaluate_fid")
PAPER = sorted((ROOT / "models").glob("*.py"))
RUNTIME = sorted((ROOT / "models" / "runtime").glob("*.py"))


def imported(path):
    """Full names of the modules that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            yield node.module


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.name)
def test_a_file_of_models_imports_nothing_of_the_project(path):
    own = {"models", *SCRIPTS, *(p.stem for p in (*PAPER, *RUNTIME))}
    assert not own & {name.split(".")[0] for name in imported(path)}


def test_files_of_models_import_alone(tmp_path):
    """Each copied into a folder of its own; one process imports them all, each with only that on the path."""
    for path in PAPER:
        (tmp_path / path.stem).mkdir()
        shutil.copy(path, tmp_path / path.stem)
    code = ("import sys\n"
            "for name, line in zip(sys.argv[2::2], sys.argv[3::2]):\n"
            "    sys.path.insert(0, f'{sys.argv[1]}/{name}')\n"
            "    __import__(name, fromlist=line.split(' import ')[1].split(', ') if line else [])\n"
            "    if line:\n"
            "        for n in line.split(' import ')[1].split(', '):\n"
            "            assert hasattr(sys.modules[name], n), n\n"
            "    sys.path.pop(0)\n")
    section = (ROOT / "README.md").read_text().split("## Copying a part")[1].split("```")[1]
    lines = {line.split()[1]: line.split("  ")[0] for line in section.splitlines()
             if line.startswith("from ")}
    assert len(lines) == 4
    arguments = [word for path in PAPER for word in (path.stem, lines.get(path.stem, ""))]
    subprocess.run([sys.executable, "-I", "-c", code, str(tmp_path), *arguments], check=True, cwd=tmp_path)


@pytest.mark.parametrize("path", [*PAPER, *RUNTIME, *(ROOT / f"{s}.py" for s in SCRIPTS)],
                         ids=lambda p: p.name)
def test_lines_end_at_110_columns(path):
    assert not [line for line in path.read_text().splitlines() if len(line) > 110]


@pytest.mark.parametrize("path", [*RUNTIME, *(ROOT / f"{s}.py" for s in SCRIPTS)], ids=lambda p: p.name)
def test_nothing_imports_a_script(path):
    assert not set(SCRIPTS) & {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("command, words", [
    (["train_repae_e.py"], ("data:", "losses:", "torchrun --nproc-per-node 8 train_repae_e.py")),
    (["finetune_vae.py"], ("losses:", "measuring, instead of training:", "exporting, instead of training:",
                           "finetune_vae.py --export out/e2e-vae")),
    (["sample_ddp.py"], ("solver and guidance:", "sample_ddp.py --exp-path")),
    (["evaluate_fid.py"], ("further metrics:", "evaluate_fid.py --save-ref")),
    (["-m", "models.runtime.prepare"], ("--skip-corrupt", "models.runtime.prepare data/imagenet/train")),
])
def test_help_and_a_mistyped_flag_answer_without_torch(tmp_path, command, words):
    """Its import takes seconds. Groups of flags and examples are on the page."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not to be imported')")

    def answer(flag):
        return subprocess.run([sys.executable, *command, flag], cwd=ROOT, env={"PYTHONPATH": str(tmp_path)},
                              capture_output=True, text=True)
    page = answer("--help")
    assert page.returncode == 0 and page.stderr == "" and all(word in page.stdout for word in words)
    wrong = answer("--no-such-flag")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1
