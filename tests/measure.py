"""The figures of the README that no script of the project prints. Not a test: it needs minutes.

    python tests/measure.py pixels DEMO     # logistic regression of the pixels of the demo records in DEMO: validation AUROC
    python tests/measure.py step            # seconds of an NC + R step: the official code's form against ours
"""
import copy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F

import data
import reggan


def pixels(root):
    """Mean AUROC over the classes for the best of four strengths of regularisation, on 32 x 32 pixels, all training labels."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    parts = []
    for part in ("train", "val"):
        names, labels = data.read_list(data.split_files("demo", root)[part])
        paths = data.find_images("demo", root, names, part)
        films = torch.stack([image for image, _ in data.ImageSet(paths, 32)]).flatten(1).numpy()
        parts.append((films, labels.numpy()))
    (x, y), (val_x, val_y) = parts
    mean, std = x.mean(0), x.std(0) + 1e-6
    for C in (1e-4, 1e-3, 1e-2, 1e-1):
        scores = []
        for k in range(y.shape[1]):
            probe = LogisticRegression(C=C, max_iter=300).fit((x - mean) / std, y[:, k])
            scores.append(roc_auc_score(val_y[:, k], probe.decision_function((val_x - mean) / std)))
        print(f"C {C:g}: mean AUROC {sum(scores) / len(scores):.3f}", flush=True)


def official_step(model, a, b, opt_g, opt_d):
    """The step of Kid-Liet/Reg-GAN: D is trained along in G's backward pass, the generator runs again for D's step."""
    opt_g.zero_grad()
    fake = model.netG_A2B(a)
    flow = model.registration(fake, b)
    (20 * F.l1_loss(reggan.warp(fake, flow), b) + 10 * reggan.smoothness(flow) + reggan.lsgan(model.netD_B(fake), True)).backward()
    opt_g.step()
    opt_d.zero_grad()
    with torch.no_grad():
        fake = model.netG_A2B(a)
    (reggan.lsgan(model.netD_B(b), True) + reggan.lsgan(model.netD_B(fake), False)).backward()
    opt_d.step()


def step(rounds=3):
    """Batch 1, 256 x 256, the paper's networks, float32, in turn in one process; first that one step of both agrees."""
    torch.manual_seed(0)
    config = reggan.Config(width=64, downs=2, blocks=9, lr=1e-4)
    a, b = torch.rand(2, 1, 1, 256, 256) * 2 - 1
    ours = reggan.build(config, 1, 1, (256, 256))
    theirs = copy.deepcopy(ours).requires_grad_(True)
    adam = dict(lr=1e-4, betas=(0.5, 0.999))
    runs = {"official": (official_step, theirs, [torch.optim.Adam([p for n, p in theirs.named_parameters() if n.startswith(prefixes)], **adam)
                                                 for prefixes in (("netG", "registration"), ("netD",))]),
            "ours": (None, ours, [torch.optim.Adam(reggan.trainable(ours, *prefixes), fused=True, **adam)
                                  for prefixes in (("netG", "registration"), ("netD",))])}

    def run(name):
        function, model, (opt_g, opt_d) = runs[name]
        began = time.time()
        if function:
            function(model, a, b, opt_g, opt_d)
        else:
            reggan.training_step(model, config, a, b, opt_g, opt_d, {"B": reggan.Pool()})
        return time.time() - began

    for name in runs:
        run(name)
    with torch.no_grad():
        fakes = [model.translate(a) for _, model, _ in runs.values()]
    print(f"after one step of each, the largest difference of G(a) is {(fakes[0] - fakes[1]).abs().max():.1e}")
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name in runs:
            times[name].append(run(name))
    medians = {name: sorted(values)[rounds // 2] for name, values in times.items()}
    print({name: [round(v, 2) for v in values] for name, values in times.items()}, f"ratio of medians {medians['official'] / medians['ours']:.2f}")


if __name__ == "__main__":
    {"pixels": pixels, "step": step}[sys.argv[1]](*sys.argv[2:])
