"""The house's two rules: a file of models/ stands alone, and what runs stages never imports a script."""
import ast
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from conftest import ROOT

SCRIPTS = ("train_repae_e", "finetune_vae", "sample_ddp", "evaluate_fid")
PAPER = sorted((ROOT / "models").glob("*.py"))
RUNTIME = sorted((ROOT / "models" / "runtime").glob("*.py"))
OWN = {"models", *SCRIPTS, *(path.stem for path in (*PAPER, *RUNTIME))}


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
    assert not OWN & {name.split(".")[0] for name in imported(path)}


def main(argv):
    """In a process of its own: import each file of models/ from a folder of its own, then run lines on it.

    The packages are loaded there already; the project is forgotten, and no longer on the path.
    """
    folder, *lines = argv
    sys.path[:] = [p for p in sys.path if "site-packages" in p or not Path(p).resolve().is_relative_to(ROOT)]
    for path in PAPER:
        for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
            del sys.modules[name]
        alone = Path(folder, path.stem)
        alone.mkdir()
        shutil.copy(path, alone)
        sys.path.insert(0, str(alone))
        assert Path(importlib.import_module(path.stem).__file__).parent == alone
        for line in lines:
            if line.split()[1] == path.stem:
                exec(line, {})
        sys.path.pop(0)


def test_files_of_models_import_alone(tmp_path):
    """And so do the README's lines for whoever copies one."""
    section = (ROOT / "README.md").read_text().split("## Copying a part")[1].split("```")[1]
    lines = [line.split("  ")[0] for line in section.splitlines() if line.startswith("from ")]
    assert len({line.split()[1] for line in lines} & {path.stem for path in PAPER}) == 4
    process = processes.start("test_layout", [tmp_path, *lines], tmp_path / "log")
    processes.wait_for(lambda: process.exitcode == 0, [process], tmp_path / "log")


TESTS = [path for path in sorted((ROOT / "tests").glob("*.py")) if "fault" not in path.name]
WRITTEN = [*PAPER, *RUNTIME, *(ROOT / f"{s}.py" for s in SCRIPTS), *TESTS]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: p.name)
def test_lines_end_at_110_columns(path):
    assert not [line for line in path.read_text().splitlines() if len(line) > 110]


@pytest.mark.parametrize("path", [*RUNTIME, *(ROOT / f"{s}.py" for s in SCRIPTS)], ids=lambda p: p.name)
def test_nothing_imports_a_script(path):
    assert not set(SCRIPTS) & {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("command, words", [
    (["train_repae_e.py"], ("data:", "losses:", "torchrun --nproc-per-node 8 train_repae_e.py")),
    (["finetune_vae.py"], ("losses:", "measuring, instead of training:", "exporting, instead of training:",
                           "finetune_vae.py --export out/e2e-vae")),
    (["sample_ddp.py"], ("checkpoint:", "samples:", "solver and guidance:", "output:", "running:",
                         "torchrun --nproc-per-node", "sample_ddp.py --exp-path")),
    (["evaluate_fid.py"], ("further metrics:", "evaluate_fid.py --save-ref ref.npz", "--kid-subsets",
                           "torchrun")),
    (["-m", "models.runtime.prepare"], ("--skip-corrupt", "models.runtime.prepare data/imagenet/train")),
])
def test_help_and_a_mistyped_flag_answer_without_torch(tmp_path, command, words):
    """Its import takes seconds. Groups of flags and examples are on the page."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not to be imported')")

    def answer(*flags):
        return subprocess.run([sys.executable, *command, *flags], cwd=ROOT, env={"PYTHONPATH": str(tmp_path)},
                              capture_output=True, text=True)
    page = answer("--help")
    assert page.returncode == 0 and page.stderr == "" and all(word in page.stdout for word in words)
    for flags in ([["--no-such-flag"]] + [["--cfg-scale", "nan"]] * ("--cfg-scale" in page.stdout)):
        wrong = answer(*flags)
        assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
        assert wrong.stderr.startswith("error: ")
