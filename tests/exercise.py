"""Blanks a function in a copy of the repository and runs the tests that judge it.

    python tests/exercise.py 1     # the first time: makes runs/exercise1, where everything fails
    python tests/exercise.py 1     # and again, after each change that you make there

tests/exercises.md says what each function has to do, tests/solutions.md how it can be done. A copy
that is there is never overwritten: delete its folder to start again.
"""

import ast
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
EXERCISES = {  # number: file, function, test file, words that choose the tests (pytest's -k)
    1: ("lora.py", "LoRALinear.forward", "test_lora.py",
        "forward_and or a_layer_w or a_merged_l or dropout_is_on"),
    2: ("mrm.py", "MRM.encode", "test_mrm.py", "test_masking or decode_image"),
    3: ("kernels/warp.py", "warp_reference", "test_kernels.py",
        "warp_reference or warp_gradcheck or warp_golden[reference]"),
    4: ("mrm.py", "MRM.image_loss", "test_mrm.py", "image_loss_is_the_formula"),
    5: ("reggan.py", "training_step", "test_reggan.py", "a_step_trains or registration_losses"),
    6: ("finetune.py", "weighted_auroc", "test_finetune.py",
        "auroc_against or auroc_worked or weights_count or unknown_labels or not_finite_have"),
}


def copy_repository(folder):
    """Copies the program and its tests, without what runs have left."""
    for pattern in ("*.py", "pytest.ini", "*/*.py"):
        for path in REPOSITORY.glob(pattern):
            target = Path(folder, path.relative_to(REPOSITORY))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def blank(path, name, code="raise NotImplementedError\n"):
    """Leaves the signature and the docstring of a function, and `code` behind them. Returns the
    line of it."""
    lines, node = path.read_text().splitlines(keepends=True), ast.parse(path.read_text())
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", "") == part)
    start = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
    indent = " " * node.body[0].col_offset
    lines[start : node.end_lineno] = [textwrap.indent(code, indent)]
    path.write_text("".join(lines))
    return start + 1


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].isdigit() or int(sys.argv[1]) not in EXERCISES:
        sys.exit(f"usage: python tests/exercise.py {' | '.join(map(str, EXERCISES))}")
    file, function, tests, words = EXERCISES[int(sys.argv[1])]
    folder = Path("runs", f"exercise{sys.argv[1]}")
    if not folder.exists():
        copy_repository(folder)
        blank(folder / file, function)
    command = [sys.executable, "-m", "pytest", "-x", "--durations=0", f"tests/{tests}", "-k", words]
    if subprocess.run(command, cwd=folder).returncode:
        sys.exit(f"write {function} in {folder / file}")
