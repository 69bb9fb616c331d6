"""tests/exercise.py: a blanked function fails the tests that judge it, and the original passes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from exercise import EXERCISES, REPOSITORY, blank, copy_repository

from kernels import triton


def judge(folder):
    """Runs the tests of all exercises in one process: {test: whether it passed}."""
    files = sorted({f"tests/{tests}" for _, _, tests, _ in EXERCISES.values()})
    words = " or ".join(words for _, _, _, words in EXERCISES.values())
    command = [sys.executable, "-m", "pytest", "-rA", "--tb=no", "--durations=0", *files, "-k"]
    done = subprocess.run(
        [*command, words],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    lines = [
        line.split(" - ")[0].split(" ", 1) for line in done.stdout.splitlines() if "::" in line
    ]
    results = {name.split("/")[1]: word == "PASSED" for word, name in lines}
    assert len(results) > 15, done.stdout[-2000:] + done.stderr[-2000:]
    return results


@pytest.mark.parametrize("blanked", [(1, 3, 5), (2, 4, 6)], ids=str)
def test_blanked_functions_fail_and_the_others_pass(tmp_path, blanked):
    copy_repository(tmp_path)
    for number in blanked:
        file, function, _, _ = EXERCISES[number]
        line = blank(tmp_path / file, function)
        assert (tmp_path / file).read_text().splitlines()[line - 1].strip() == (
            "raise NotImplementedError"
        )
    results = judge(tmp_path)
    for number, (_, _, tests, words) in EXERCISES.items():
        own = {
            name: passed
            for name, passed in results.items()
            if name.startswith(tests) and any(word in name for word in words.split(" or "))
        }
        assert own and set(own.values()) == {number not in blanked}, (number, own)


def test_a_blanked_function_keeps_signature_and_docstring(tmp_path):
    path = tmp_path / "file.py"
    body = ['        """Says."""', "        # how", "        return x"]
    path.write_text("\n".join(["class A:", "    def f(self, x):", *body, "", "B = 1", ""]))
    assert blank(path, "A.f") == 4
    assert path.read_text().splitlines()[1:] == [
        "    def f(self, x):",
        '        """Says."""',
        "        raise NotImplementedError",
        "",
        "B = 1",
    ]


def test_the_exercises_on_paper_are_those_of_the_script():
    text = (REPOSITORY / "tests" / "exercises.md").read_text()
    for number, (file, function, tests, _) in EXERCISES.items():
        heading = next(line for line in text.splitlines() if line.startswith(f"### {number}."))
        assert f"`{file}`" in heading and f"`{function}`" in heading, heading
        assert tests in text


def test_the_script_makes_a_folder_and_judges_it(tmp_path):
    run = [sys.executable, str(REPOSITORY / "tests" / "exercise.py")]
    done = subprocess.run([*run, "99"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("usage: ")
    assert not Path(tmp_path, "runs").exists()
    done = subprocess.run([*run, "1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "NotImplementedError" in done.stdout
    assert done.stdout.startswith("write LoRALinear.forward in ")


@pytest.mark.skipif(triton is None, reason="no Triton here")
def test_the_page_on_debugging_prints_what_it_says(tmp_path):
    page = (REPOSITORY / "tests" / "debug_kernel.md").read_text()
    right, wrong = re.findall(r"^[-+](    .*)$", page, re.M)
    script = re.search(r"```python\n(import torch.*?)```", page, re.S)[1]
    printed = re.search(r"```\n(tensor.*?)```", page, re.S)[1]
    copy_repository(tmp_path)
    kernel = tmp_path / "kernels" / "warp.py"
    assert kernel.read_text().count(right) == 1
    kernel.write_text(kernel.read_text().replace(right, wrong))
    (tmp_path / "try.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "try.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.stdout == printed, done.stderr[-2000:]
