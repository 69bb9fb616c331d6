"""Numbers of the pages that no script of the project prints. Not a test: most need minutes.

    python tests/measure.py pixels DEMO      # logistic regression of the demo's pixels: AUROC
    python tests/measure.py speedrun [COMMAND]  # the race: seconds and AUROC of three seeds
    python tests/measure.py limits           # steps of ViT-B/16 beside their products alone
    python tests/measure.py memory           # peak memory of ViT-B/16, full against LoRA
    python tests/measure.py step             # a NC + R step, the official code against ours
    python tests/measure.py bound SEED       # NC at level 5 with the true flow in R's place
    python tests/measure.py unet OUT ...     # a U-Net in UPerNet's place; options of more.segment
    python tests/measure.py dice NAME=RUN,RUN,... ...  # segmentation.md of runs, seed by seed
    python tests/measure.py real COVID NIH DIR  # writes real records for pretraining into DIR

`pixels` needs tests/requirements.txt. Run with OMP_NUM_THREADS=1 for the numbers of one core.
"""

import itertools
import json
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import finetune
import lora
import mrm
import reggan
import vit
from kernels import cpu
from more import improved, segment
from support.recipes import RECIPES, recipe_for
from support.script import (
    fill, markdown_table, mean_and_deviation, parse_config, write_csv)
from support.weights import ENCODER_SIZES


def pixels(root, layout="demo", split="", ratio=100, side=32):
    """Logistic regression of side x side pixels at five strengths of regularisation. Prints the
    mean AUROC over the classes on val, and on test for the strength that is best on val."""
    from sklearn.linear_model import LogisticRegression

    inputs, labels = {}, {}
    for name, part in data.read_parts(layout, root, split, int(ratio))[0].items():
        images, _ = data.ImageSet(part.paths, int(side))[range(len(part.paths)), 0]
        inputs[name], labels[name] = images.flatten(1).numpy(), part.labels.numpy()
    mean, std = inputs["train"].mean(0), inputs["train"].std(0) + 1e-6
    inputs, results = {part: (x - mean) / std for part, x in inputs.items()}, []
    for strength in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        scores = {part: np.zeros_like(y) for part, y in labels.items()}
        for k, y in enumerate(labels["train"].T):
            if 0 < y.sum() < len(y):
                probe = LogisticRegression(C=strength, max_iter=300).fit(inputs["train"], y)
                for part, x in inputs.items():
                    scores[part][:, k] = probe.decision_function(x)
        val, test = (finetune.auroc(scores[part], labels[part])[0] for part in ("val", "test"))
        results.append((val, strength, test))
    print("AUROC on val {:.3f}, by C = {:g}; on test {:.3f}".format(*max(results)))


RACE = "python finetune.py --compare --methods full --ratios 10 --seeds 1 --seed {seed}"


def speedrun(command=RACE):
    """Runs the command in an empty folder for the seeds 0, 1 and 2. Prints the seconds from start
    to end, and the test AUROC of the newest result.json that has one."""
    results = []
    for seed in range(3):
        with tempfile.TemporaryDirectory() as folder:
            script, *rest = shlex.split(command.format(seed=seed).removeprefix("python "))
            began = time.time()
            subprocess.run([sys.executable, str(REPOSITORY / script), *rest], cwd=folder,
                           check=True, stdout=subprocess.DEVNULL)
            seconds = time.time() - began
            found = sorted(Path(folder).rglob("result.json"), key=lambda path: path.stat().st_mtime)
            tested = [json.loads(path.read_text()) for path in found]
            results.append((seconds, [r["auroc"] for r in tested if "auroc" in r][-1]))
        print(f"seed {seed}: {results[-1][0]:.0f} s, test AUROC {results[-1][1]:.3f}", flush=True)
    seconds, score = np.mean(results, axis=0)
    print(f"mean {seconds:.0f} s, AUROC {score:.3f}: {'counts' if score >= 0.85 else 'too low'}")


# --------------------------------------------------------------------------------------------------
# Speed and memory of the papers' networks


def median_times(runs, rounds=3):
    """Seconds of CPU for each of {name: function}: the median of `rounds` turns after a first."""
    times = {name: [] for name in runs}
    for turn in range(1 + rounds):
        for name, run in runs.items():
            began = time.process_time()
            run()
            times[name] += [time.process_time() - began] * (turn > 0)
    return {name: sorted(values)[rounds // 2] for name, values in times.items()}


def vit_step(method, images, dtype):
    """A training step of a ViT-B/16 of 14 classes, by the paper's recipe for 1 % of NIH."""
    recipe = recipe_for(RECIPES, "medpeft", method, "nih", 1, 0) | {"rank": 4}
    config = fill(finetune.FinetuneConfig(method=method), recipe)
    sizes = {name: value for name, value in mrm.BASE.items() if name in ENCODER_SIZES}
    model = finetune.build_model(config, sizes, range(14)).train()
    optimizer = finetune.optimizer_by_layer(model, config)
    inputs, targets = torch.rand(images, 1, 224, 224), torch.rand(images, 14).round()

    def run(first=images):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(inputs[:first])
        finetune.label_loss(logits.float(), targets[:first]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def products(rows, dtype, weights, width=768):
    """(GFLOP, function) of the products of a ViT's block alone, at `rows` rows: forward, for the
    gradients of the inputs and, with `weights`, for those of the weights."""
    runs = []
    for i, o in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
        x, w, dy = (torch.rand(shape).to(dtype) for shape in ((rows, i), (o, i), (rows, o)))
        runs += [lambda x=x, w=w: x @ w.t(), lambda w=w, dy=dy: dy @ w]
        runs += [lambda x=x, dy=dy: dy.t() @ x] * weights
    return 24 * rows * width**2 * (2 + weights) / 1e9, lambda: [run() for run in runs]


def official_attention(self, x, mask=None):
    """timm's of the papers' time: the weights of attention are made and kept."""
    q, k, v = self.heads(x)
    weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(-1)
    return self.proj((weights @ v).transpose(1, 2).flatten(2))


def official_lora(self, x):
    """The paper's merged linear layer: a grouped convolution by B, padded with zeros for k."""
    low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)  # (B, N, 2 r)
    q, v = F.conv1d(low.mT, self.lora_B[..., None], groups=2).mT.chunk(2, -1)
    added = torch.cat((q, torch.zeros_like(q), v), -1)
    return F.linear(x, self.weight, self.bias) + self.scale * added


def official(run):
    """`run` with the papers' forms of attention and of LoRA."""
    run = mock.patch.object(vit.Attention, "forward", official_attention)(run)
    return mock.patch.object(lora.LoRALinear, "forward", official_lora)(run)


def limits(images=8, rounds=3):
    """A step of ViT-B/16 beside its products alone, full and LoRA, in the papers' form too."""
    rows, runs, counts = int(images) * 197, {}, {}
    for method, dtype in itertools.product(("lora", "full"), (torch.bfloat16, torch.float32)):
        name = f"{method}, {str(dtype)[6:]}"
        # 2 rows x parameters for each product; attention has q k^T and weights v
        count, runs[name, "products"] = products(rows, dtype, method == "full")
        counts[name] = 12 * count, 3 * 12 * 4 * rows * 197 * 768 / 1e9
        runs[name, "ours"] = vit_step(method, int(images), dtype)
        if dtype == torch.float32:
            runs[name, "official"] = official(vit_step(method, int(images), dtype))
    times = median_times(runs, int(rounds))
    for (name, form), seconds in times.items():
        linear, attention = counts[name]
        speed, ceiling = (linear + attention) / seconds, linear / 12 / times[name, "products"]
        if form != "products":
            print(f"{name}, {form}: {linear:.0f} + {attention:.0f} GFLOP, {seconds:.2f} s, "
                  f"{speed:.0f} of {ceiling:.0f} GFLOP/s, {100 * speed / ceiling:.0f} %")


def memory(*cell):
    """MiB that a step of ViT-B/16 in bfloat16 takes on top of the imports, weights and optimiser
    included: full and LoRA, 8 and 64 images, each in a process of its own. Linux counts KiB."""
    if not cell:
        for cell in itertools.product(("lora", "full"), ("8", "64")):
            subprocess.run([sys.executable, __file__, "memory", *cell], check=True)
        return
    method, images = cell[0], int(cell[1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = vit_step(method, images, torch.bfloat16)
    run(1)  # after a step of one image the optimiser has its state
    run()
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{method}, {images} images: {more / 1024:.0f} MiB", flush=True)


def official_layers(module):
    """Puts torch's own layers, which the official code uses, where ours stand in for them."""
    for name, child in module.named_children():
        if isinstance(child, cpu.InstanceNorm):
            setattr(module, name, nn.LazyInstanceNorm2d(affine=False))
        elif isinstance(child, (cpu.Reflect, cpu.LastConv)):
            child.__class__ = type(child).__base__
        official_layers(child)
    return module


def official_step(model, a, b, opt_g, opt_d):
    """Kid-Liet/Reg-GAN's: D gets gradients in G's pass, the generator runs again for D's step."""
    opt_g.zero_grad()
    fake = model.netG_A2B(a)
    flow = model.registration(fake, b)
    losses = {"adversarial": reggan.lsgan(model.netD_B(fake), True),
              "correction": 20 * reggan.correction(fake, flow, b),
              "smooth": 10 * reggan.smoothness(flow)}
    sum(losses.values()).backward()
    opt_g.step()
    opt_d.zero_grad()
    with torch.no_grad():
        fake = model.netG_A2B(a)
    losses["d"] = reggan.lsgan(model.netD_B(b), True) + reggan.lsgan(model.netD_B(fake), False)
    losses["d"].backward()
    opt_d.step()
    return losses


def step(rounds=3, size=256):
    """The step of --paper, batch 1, 256 x 256: the official code's form in float32, ours in float32
    and in bfloat16 autocast, from the same weights: G's first losses agree; D's follow G's step."""
    a, b = torch.rand(2, 1, 1, int(size), int(size)) * 2 - 1

    def form(is_official, autocast=nullcontext):
        config = reggan.complete(reggan.Config(paper=True))
        torch.manual_seed(0)
        model = reggan.build(config, 1, 1, a.shape[2:])
        if is_official:
            official_layers(model).requires_grad_(True)
        optimizers = [torch.optim.Adam(reggan.trainable(model, *prefixes), 1e-4, (0.5, 0.999),
                                       fused=not is_official)
                      for prefixes in (("netG", "registration"), ("netD",))]
        if is_official:
            return lambda: official_step(model, a, b, *optimizers)
        pools = {"B": reggan.Pool(0)}
        return lambda: reggan.training_step(model, config, a, b, *optimizers, pools, autocast)

    forms = {"official, float32": form(True), "ours, float32": form(False), "ours, bfloat16":
             form(False, lambda: torch.autocast("cpu", torch.bfloat16))}
    for name, run in forms.items():
        print(f"{name}: step 1", {key: round(loss.item(), 4) for key, loss in run().items()})
    for name, seconds in median_times(forms, int(rounds)).items():
        print(f"{name}: {seconds:.2f} s a step")


# --------------------------------------------------------------------------------------------------
# What a perfect R would reach


class TrueFlow(improved.CoarseToFine):
    flow = None  # of the batch in training, which `bound` leaves here

    def forward(self, fake, real):
        return TrueFlow.flow if self.training else super().forward(fake, real)


def bound(seed, epochs=60.0):
    """NC + the true flow of each misaligned pair in the correction: what a perfect R reaches."""
    all_pairs = reggan.all_pairs

    def with_true_flow(config):
        pairs, *others = all_pairs(config)
        pairs.with_flow, batches = True, pairs.batches

        def pairs_alone(*args, **named):
            for a, b, TrueFlow.flow in batches(*args, **named):
                yield a, b

        pairs.batches = pairs_alone
        return pairs, *others

    config = improved.Config(size=32, epochs=float(epochs), dtype="fp32", noise=5.0, seed=int(seed),
                             smooth=0.0, drift=0.0, synthetic=0.0, out=f"runs/bound-{seed}")
    with (mock.patch.object(reggan, "all_pairs", with_true_flow),
          mock.patch.object(improved, "CoarseToFine", TrueFlow)):
        result = reggan.train(config)
    print(f"seed {seed}: PSNR {result['psnr']:.2f} dB, MAE {result['mae']:.4f}")


# --------------------------------------------------------------------------------------------------
# Real X-rays, and a U-Net


def real(covid, nih, folder):
    """Records for pretraining: NIH's training list, without reports, and COVID's images with their
    notes. DIR/test.txt holds the test lists of COVID's six published splits, for --exclude."""
    covid, nih, folder = Path(covid), Path(nih), Path(folder)
    (folder / "images").mkdir(parents=True)
    notes = dict(row[1:] for row in
                 data.read_csv(covid / "training.csv", ("image_path", "report_content")))
    rows = [[path.name, notes.get(path.name, "")] for path in sorted((covid / "images").iterdir())]
    rows += [[line.split()[0], ""] for line in (nih / "train_list.txt").read_text().splitlines()]
    for name, _ in rows:
        source = covid if (covid / "images" / name).exists() else nih
        (folder / "images" / name).symlink_to((source / "images" / name).absolute())
    write_csv(folder / "training.csv", ["image_path", "report_content"], rows)
    (folder / "patients.csv").write_bytes((covid / "records.csv").read_bytes())
    tests = sorted((covid / "splits").glob("*/test.txt"))
    (folder / "test.txt").write_text("".join(path.read_text() for path in tests))
    print(f"{len(rows)} images, {len(notes)} notes")


class UNet(nn.Module):
    """Ronneberger et al., 2015: five levels of two 3 x 3 convolutions with norms."""

    def __init__(self, img_size, width=9):
        super().__init__()
        self.img_size, self.blocks = img_size, nn.ModuleList()  # no blocks of a ViT
        widths = [width * 2**level for level in range(5)]

        def two(i, o):
            return nn.Sequential(segment.ConvNorm(i, o, 3), segment.ConvNorm(o, o, 3))

        self.down = nn.ModuleList(two(i, o) for i, o in zip([1, *widths], widths))
        self.up = nn.ModuleList(two(i + o, i) for i, o in zip(widths, widths[1:]))
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, x):
        levels = []
        for layer in self.down:
            x = layer(F.max_pool2d(x, 2) if levels else x)
            levels.append(x)
        for layer, skip in zip(reversed(self.up), reversed(levels[:-1])):
            x = layer(torch.cat([skip, F.interpolate(x, scale_factor=2, mode="bilinear")], dim=1))
        return self.last(x)


def unet(out, *options):
    """UPerNet's place: no auxiliary head, one rate for all layers; options of more.segment."""
    command = ["--weights", "scratch", "--out", out, *options]
    config = replace(parse_config(segment.SegmentConfig, command), layer_decay=1.0)
    with mock.patch.object(segment, "build_model", lambda c, *_: UNet(c.img_size)):
        segment.segment(config)


def dice(*groups):
    """The table of segmentation runs, NAME=RUN,RUN,... a row, and the differences of its rows."""
    rows, table = {}, []
    for group in groups:
        name, folders = group.split("=")
        runs = rows[name, "", 100] = []
        for folder in map(Path, folders.split(",")):
            result = json.loads((folder / "result.json").read_text())
            counts = data.read_csv(folder / "predictions.csv", ("both", "predicted", "true"))
            counts = np.array([row[1:] for row in counts], float).T
            draws = segment.dice_scores(counts, result["pixels"], 1000)["dice"]
            runs.append((result | {"auroc": result["dice"], "images": counts.shape[1]}, draws[1:]))
        each = {key: [result[key] for result, _ in runs] for key in (
            "dice", "dice_all", "dice_official", "area_error", "seconds", "trainable_parameters")}
        means = [f"{np.mean(values):.{3 if key[0] == 'd' else 0}f}" for key, values in each.items()]
        table.append([name, mean_and_deviation(each["dice"], 3),
                      " ".join(f"{value:.3f}" for value in each["dice"]), *means[1:]])
    print(markdown_table(["run", "test Dice, images with a mask", "each seed", "all images",
                          "official", "area error, pixels", "seconds", "trained"], table))
    pairs = [finetune.compare_rows(a, b, rows[a], rows[b])[1:]
             for b, a in itertools.combinations(rows, 2) if len(rows[a]) == len(rows[b])
             and rows[a][0][0]["images"] == rows[b][0][0]["images"]]
    text = markdown_table(["a", "b", "a - b", "95 % interval", "a ahead, seeds"], pairs)
    print(text.replace("  |", " |"))


COMMANDS = (pixels, speedrun, limits, memory, step, bound, unet, dice, real)

if __name__ == "__main__":
    command = {function.__name__: function for function in COMMANDS}.get(" ".join(sys.argv[1:2]))
    if command is None:
        sys.exit(__doc__)
    command(*sys.argv[2:])
