"""The exercises: a blanked function fails the tests that judge it and the solution passes them, the
judges see planted faults, and the counts on the page are those of the judges."""

import contextlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exercise import EXERCISES, REPOSITORY, blank, copy_repository

import finetune
import lora
import mrm
import reggan
import test_reggan
from kernels import triton
from support.weights import ENCODER_SIZES
from vit import ViT

PAGE = (REPOSITORY / "tests" / "exercises.md").read_text()
SOLUTIONS = (REPOSITORY / "tests" / "solutions.md").read_text()


def section(number, page=PAGE, mark="###"):
    return re.search(rf"^{mark} {number}\b.*?(?=^##|\Z)", page, re.M | re.S)[0]


def solution(number):
    """The first code of the solution of an exercise."""
    return re.search(r"```python\n(.*?)```", section(number, SOLUTIONS, "##"), re.S)[1]


def counts(number):
    """{"passed": n, "failed": m} as the page says of the judge of an exercise."""
    found = re.findall(r"\*\*([^*]*(?:passed|failed)[^*]*)\*\*", section(number))[0]
    return {word: int(n) for n, word in re.findall(r"(\d+)\s(passed|failed)", found)}


def judge(folder, words, files, *options):
    """Runs the chosen tests in one process: {test: whether it passed}."""
    command = [sys.executable, "-m", "pytest", *options, "-rA", "--tb=no", "--durations=0", *files,
               "-k", words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    lines = re.findall(r"^(PASSED|FAILED|ERROR) tests/(.*?)(?: - .*)?$", done.stdout, re.M)
    results = {name: word == "PASSED" for word, name in lines}
    assert results, done.stdout[-2000:] + done.stderr[-2000:]
    return results


def tally(results, words):
    """Of the tests whose names hold one of the words of an expression of "or"."""
    chosen = [passed for name, passed in results.items()
              if any(word in name for word in words.split(" or "))]
    return {word: n for word, n in (("passed", sum(chosen)),
                                    ("failed", len(chosen) - sum(chosen))) if n}


@pytest.mark.parametrize("blanked", [(1, 3, 5), (2, 4, 6)], ids=str)
def test_blanked_functions_fail_and_the_solutions_of_the_others_pass(tmp_path, blanked):
    copy_repository(tmp_path)
    for number, (file, function, _, _) in EXERCISES.items():
        if number in blanked:
            blank(tmp_path / file, function)
        else:
            blank(tmp_path / file, function, solution(number))
    files = sorted({f"tests/{tests}" for _, _, tests, _ in EXERCISES.values()})
    results = judge(tmp_path, " or ".join(words for *_, words in EXERCISES.values()), files)
    for number, (_, _, tests, words) in EXERCISES.items():
        own = {name: passed for name, passed in results.items() if name.startswith(tests)}
        n = counts(number)["passed"]
        expected = {"failed": n} if number in blanked else {"passed": n}
        assert tally(own, words) == expected, (number, own)


FAULTS = {"zero_grad of G": ("opt_g.zero_grad()\n", ""),
          "zero_grad of D": ("opt_d.zero_grad()\n", ""),
          "pool": ("pools[side](fake.detach())", "fake.detach()"), "detach": (".detach())", ")"),
          "R's losses": ("losses |= registration", "_ = registration"), "nothing": ("", ""),
          "A's pool": ("pools[side]", 'pools["B"]'), "update": ("scaler.update()\n", "")}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_judge_of_exercise_5_sees_faults(monkeypatch, fault):
    code = solution(5)
    assert FAULTS[fault][0] in code
    code = code.replace(*FAULTS[fault])
    names = dict(vars(reggan))
    header = ("def training_step(model, config, a, b, opt_g, opt_d, pools, autocast=nullcontext, "
              "scaler=torch.amp.GradScaler(enabled=False)):\n")
    exec(header + "".join(f"    {line}\n" for line in code.splitlines()), names)
    monkeypatch.setattr(reggan, "training_step", names["training_step"])
    words = EXERCISES[5][3].split(" or ")
    found = []
    for name, test in vars(test_reggan).items():
        if name.startswith("test_") and any(word in name for word in words):
            for arguments in (("unet",), ("coarse",)) if "follow" in name else ((),):
                try:
                    test(*arguments)
                except Exception:
                    found.append(name)
    assert bool(found) == (fault != "nothing"), found


def test_changes_of_the_code_do_what_the_page_says(tmp_path):
    """Exercises 8 to 11 and 13 in one copy: they touch different functions."""
    copy_repository(tmp_path)

    def change(file, old, new):
        text = (tmp_path / file).read_text()
        assert text.count(old) == 1, (file, old)
        (tmp_path / file).write_text(text.replace(old, new))

    lora_b = re.search(r"^( +)self\.lora_B = .*\n", Path(REPOSITORY, "lora.py").read_text(), re.M)
    change("lora.py", lora_b[0], lora_b[0] + lora_b[1] + solution(8))
    change("lora.py", "TARGETS = {", "TARGETS = {" + solution(9))
    noise = re.search(r"^( +)noise = torch.rand\(B, N.*\n", Path(REPOSITORY, "mrm.py").read_text(),
                      re.M)
    change("mrm.py", noise[0], "".join(noise[1] + line + "\n" for line in
                                       solution(10).splitlines()))
    loss = (tmp_path / "mrm.py").read_text()
    loss = loss[loss.index("def image_loss"):loss.index("def report_loss")]
    change("mrm.py", loss, loss.replace(".square()", ".abs()"))
    (tmp_path / "more" / "gdl.py").write_text(solution(13))
    words = {8: "fresh_layer or changes_nothing", 9: "targets_are_read",
             10: "test_masking or decode_image", 11: "image_loss_is"}
    files = [f"tests/test_{name}.py" for name in ("lora", "mrm")]
    results = judge(tmp_path, " or ".join(words.values()), files)
    for number, chosen in words.items():
        assert f'-k {chosen}' in section(number).replace('"', "")
        assert tally(results, chosen) == counts(number), (number, results)
    hosts = judge(tmp_path, "every_host and gdl", ["tests/test_reggan.py"], "-p", "more.gdl")
    assert tally(hosts, "every_host") == counts(13), hosts


def test_the_kernels_without_dropout_fail_where_inputs_drop():
    """Exercise 15: the tests of its judge with p = 0 and those with another."""
    command = [sys.executable, "-m", "pytest", "tests/test_kernels.py", "--collect-only", "-q",
               "-o", "addopts=", "-k", "test_lora_kernels"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stdout
    names = re.findall(r"test_lora_kernels\[(.*)\]", listed)
    if not names:
        pytest.skip("no Triton here")
    without = sum("-0.0-" in name for name in names)
    assert {"passed": without, "failed": len(names) - without} == counts(15)


def test_auprc_is_scikit_learns(tmp_path):
    """Exercise 14, with ties."""
    from sklearn.metrics import average_precision_score

    names, rng = {"np": np}, np.random.default_rng(0)
    exec(solution(14), names)
    scores, labels = rng.integers(0, 20, 300) / 20, rng.integers(0, 2, 300)
    expected = average_precision_score(labels, scores)
    assert names["auprc"](scores, labels) == pytest.approx(expected, abs=1e-15)


def test_dora_is_pefts(tmp_path, monkeypatch, capsys):
    """Exercise 16: the judge on the page says True of the solution, and False of plain LoRA."""
    pytest.importorskip("peft")
    script = re.search(r"```python\n(.*?)```", section(16), re.S)[1]
    (tmp_path / "judge.py").write_text(script)
    monkeypatch.syspath_prepend(str(tmp_path))
    for wrong in (False, True):
        code = solution(16).replace("(m / lengths)", "1") if wrong else solution(16)
        (tmp_path / "mine.py").write_text(code + ("    return y + 0 * m" if wrong else ""))
        sys.modules.pop("mine", None)
        with contextlib.suppress(RuntimeError):
            runpy.run_path(str(tmp_path / "judge.py"))
        lines = capsys.readouterr().out.split()
        assert lines[:1] == ["False"] if wrong else lines == ["True"] * 4


def test_the_singular_values_of_an_adapter(tmp_path, monkeypatch, capsys):
    """Exercise 17: r of them are above zero in each of q and v."""
    torch.manual_seed(0)
    vit = ViT(16, 8, 1, 32, 2, 2, num_classes=3)
    Path(tmp_path, "runs/finetune").mkdir(parents=True)
    torch.save({"model": vit.state_dict()}, tmp_path / "base.pt")
    fingerprint = lora.fingerprint(vit.state_dict())
    lora.add_lora(vit, rank=4)
    for layer in lora.lora_layers(vit):
        torch.nn.init.normal_(layer.lora_B)
    lora.save_adapter(tmp_path / "runs/finetune/adapter.pt", vit, base_fingerprint=fingerprint,
                      weights=str(tmp_path / "base.pt"))
    monkeypatch.chdir(tmp_path)
    exec(solution(17), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(": 4 of 32, length" in line for line in lines)


def test_attention_is_the_networks_own():
    """Exercise 18: rows sum to 1, and the weights times v are what the network attends."""
    torch.manual_seed(0)
    model = ViT(32, 8, 1, 32, 2, 2, num_classes=3).eval()
    images, names = torch.randn(2, 1, 32, 32), {}
    exec(solution(18).split("if __name__")[0], names)
    found = names["attention"](model, images)
    x = model.blocks[0](model.add_class_token(model.embed(images)))
    q, k, v = model.blocks[1].attn.heads(model.blocks[1].norm1(x))
    eye = torch.eye(v.shape[2]).expand(*v.shape[:2], -1, -1)  # with v = 1 the output is the weights
    weights = torch.nn.functional.scaled_dot_product_attention(q, k, eye)
    assert torch.allclose(found, weights[:, :, 1:].mean((1, 2)), atol=1e-6)
    assert torch.allclose(found.sum(1), torch.ones(2), atol=1e-6)


def test_counts_of_parameters_on_the_page():
    """Exercises 8, 9 and 19, of the ViT that the first command makes and its 7 findings."""
    sizes = {name: value for name, value in mrm.MODELS["tiny"].items() if name in ENCODER_SIZES}
    targets = lora.TARGETS | eval("{" + solution(9) + "}")

    def adapted(rank, name="qv"):
        model = lora.add_lora(ViT(**sizes, num_classes=7), rank, targets=targets[name])
        return f"{lora.count_parameters(model)['lora']:,}"

    for rank in (1, 4, 32):
        assert f"| rank {rank} | {adapted(rank)} |" in section(8)
    assert f"{adapted(4, 'qv-fc1')} LoRA parameters" in section(9)
    names = dict(vars(finetune), METHODS={})
    exec(solution(19), names)
    model = ViT(**sizes, num_classes=7)
    names["METHODS"]["bitfit"](model, None)
    trained = lora.count_parameters(model)["trainable"]
    assert f"**{trained:,}**" in section(19)


def test_a_blanked_function_keeps_signature_and_docstring(tmp_path):
    path = tmp_path / "file.py"
    body = ['        """Says."""', "        # how", "        return x"]
    path.write_text("\n".join(["class A:", "    def f(self, x):", *body, "", "B = 1", ""]))
    assert blank(path, "A.f") == 4
    assert path.read_text().splitlines()[1:] == ["    def f(self, x):", '        """Says."""',
                                                 "        raise NotImplementedError", "", "B = 1"]


def test_the_exercises_on_paper_are_those_of_the_script():
    for number, (file, function, tests, _) in EXERCISES.items():
        heading = section(number).splitlines()[0]
        assert f"`{file}`" in heading and f"`{function}`" in heading, heading
        assert tests in section(number)
    numbers = [int(n) for n in re.findall(r"^### (\d+)\. ", PAGE, re.M)]
    assert numbers == [int(n) for n in re.findall(r"^## (\d+)$", SOLUTIONS, re.M)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_script_makes_a_folder_and_judges_it(tmp_path):
    run = [sys.executable, str(REPOSITORY / "tests" / "exercise.py")]
    done = subprocess.run([*run, "99"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("usage: ")
    assert not Path(tmp_path, "runs").exists()
    done = subprocess.run([*run, "1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "NotImplementedError" in done.stdout
    assert done.stderr == "write LoRALinear.forward in runs/exercise1/lora.py\n"


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
    done = subprocess.run([sys.executable, "try.py"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.stdout == printed, done.stderr[-2000:]
