"""The figures of the README that no script of the project prints. Not a test: it needs minutes.

    python tests/measure.py pixels DEMO      # logistic regression of the demo films' pixels: AUROC
    python tests/measure.py vit              # steps of ViT-B/16, float32 against bfloat16
    python tests/measure.py limits           # steps of ViT-B/16 beside their products alone
    python tests/measure.py scaling          # how a LoRA step grows with size, depth, rank, images
    python tests/measure.py overheads        # what a step of the tiny MRM consists of
    python tests/measure.py crops            # a batch's crops: film by film, by threads, at once
    python tests/measure.py feeding [DEMO]   # mrm.py by ways to feed it, and with films for nothing
    python tests/measure.py memory           # peak memory of ViT-B/16, full against LoRA
    python tests/measure.py step             # an NC + R step, the official code against ours
    python tests/measure.py motions RUN      # the share of each kind of motion that a run's R finds
    python tests/measure.py bound SEED       # NC at level 5 with the true flow in R's place
    python tests/measure.py lungs COVID DIR  # writes the lists of COVID's lung masks into DIR
    python tests/measure.py unet OUT ...     # a U-Net in UPerNet's place
    python tests/measure.py real COVID NIH DIR  # writes real records for pretraining into DIR
    python tests/measure.py cache FILMS DIR  # what --cache DIR saves on a folder of films

The command `unet` takes the options of finetune.py after its folder; `pixels` needs
tests/requirements.txt.
"""

import contextlib
import functools
import io
import itertools
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from support import weights as weights_module
from support import script as common
import data
import finetune
import lora
import mrm
from more import improved, segment
import vit
import reggan
from kernels import cpu


def pixels(root, layout="demo", split="", ratio=100, side=32):
    """Fits a logistic regression of side x side pixels to the training labels, at five strengths
    of regularisation. Prints the mean AUROC over the classes on the validation list, and on the
    test list for the strength that is best on the validation list."""
    from sklearn.linear_model import LogisticRegression

    films, labels = {}, {}
    for part, path in data.split_files(layout, root, split, int(ratio)).items():
        names, values = data.read_list(path, skip_bad=True)
        paths = data.find_images(layout, root, names, path)
        images = [image for image, _ in data.ImageSet(paths, int(side))]
        films[part], labels[part] = torch.stack(images).flatten(1).numpy(), values.numpy()
    mean, std = films["train"].mean(0), films["train"].std(0) + 1e-6
    films, results = {part: (x - mean) / std for part, x in films.items()}, []
    for strength in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        scores = {part: np.zeros_like(y) for part, y in labels.items()}
        for k, y in enumerate(labels["train"].T):
            if 0 < y.sum() < len(y):
                probe = LogisticRegression(C=strength, max_iter=300).fit(films["train"], y)
                for part, x in films.items():
                    scores[part][:, k] = probe.decision_function(x)
        val, test = (finetune.mean_auroc(scores[part], labels[part]) for part in ("val", "test"))
        results.append((val, strength, test))
        print(f"C {strength:g}: mean AUROC on val {val:.3f}", flush=True)
    val, strength, test = max(results)
    print(f"C {strength:g}, the best on val: test {test:.3f}")


def official_layers(module):
    """Puts torch's own layers, which the official code uses, where ours stand in for them."""
    for name, child in module.named_children():
        if isinstance(child, cpu.InstanceNorm):
            setattr(module, name, torch.nn.LazyInstanceNorm2d(affine=False))
        elif isinstance(child, (cpu.Reflect, cpu.LastConv)):
            child.__class__ = type(child).__base__
        official_layers(child)
    return module


def vit_step(method="lora", images=8, dtype=torch.bfloat16, size=224, depth=12, rank=4):
    """A ViT-B/16 of 14 classes with the optimiser of the paper's recipe for 1 % of NIH, and a
    function that runs one of its training steps on random images."""
    recipe = finetune.RECIPES["mrm", method, "nih", 1] | {"rank": rank}
    config = common.fill(finetune.FinetuneConfig(method=method), recipe)
    sizes = {name: value for name, value in mrm.BASE.items() if name in weights_module.ENCODER_SIZES}
    model = finetune.build_model(config, sizes | {"img_size": size, "depth": depth}, 14).train()
    optimizer = finetune.optimizer_by_layer(model, config)
    films, targets = torch.rand(images, 1, size, size), torch.rand(images, 14).round()

    def run(first=images):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(films[:first])
        finetune.label_loss(logits.float(), targets[:first]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, run


def record_step(images, words, dtype=torch.float32, mask_ratio=0.75, word_ratio=0.5, **sizes):
    """A function that runs one training step of MRM on random records of `words` tokens."""
    model = mrm.MRM(**sizes).train()
    optimizer = mrm.make_adamw(model, mrm.MRMConfig(lr=1e-4), torch.device("cpu"))
    films = torch.rand(images, 1, 2 * sizes["img_size"], 2 * sizes["img_size"])
    tokens = torch.randint(sizes["vocab_size"], (images, words))
    hidden = torch.rand(images, words) < word_ratio
    padding = torch.zeros_like(hidden)
    report = tokens, tokens.masked_fill(hidden, 0), hidden, padding

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = sum(model(films, report, mask_ratio=mask_ratio))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def median_times(runs, rounds=3, clock=time.process_time):
    """Seconds for each of {name: function}: the median of `rounds` turns, in each of which every
    function runs, after one to warm up. The clock is by default the process's own CPU time, which
    other processes hardly disturb, and which with several threads is their sum."""
    times = {name: [] for name in runs}
    for turn in range(1 + rounds):
        for name, run in runs.items():
            began = clock()
            run()
            times[name] += [clock() - began] * (turn > 0)
    return {name: sorted(values)[rounds // 2] for name, values in times.items()}


def vit(rounds=3):
    """Seconds a step of ViT-B/16: LoRA of rank 4 on 8 images of 224 x 224, and MRM on 4
    records of 448 x 448 with 100 tokens, in float32 and in bfloat16 autocast."""
    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        runs["LoRA, batch 8", dtype] = vit_step(dtype=dtype)[1]
        runs["MRM, batch 4", dtype] = record_step(4, 100, dtype, **mrm.BASE, vocab_size=30000)
    for (name, dtype), seconds in median_times(runs, rounds, time.time).items():
        print(f"{name}, {dtype}: {seconds:.2f} s a step")


def memory(*cell):
    """MiB that a step of ViT-B/16 at 224 x 224 in bfloat16 takes on top of what is there after the
    imports, weights and optimiser included: full and LoRA, 8 and 64 images, with and without
    --checkpoint-activations, each cell in a process of its own. Three words name a cell."""
    if not cell:
        for cell in itertools.product(("lora", "full"), ("8", "64"), ("keep", "checkpoint")):
            command = [sys.executable, __file__, "memory", *cell]
            print(
                subprocess.run(command, capture_output=True, text=True).stdout, end="", flush=True
            )
        return
    method, images, how = cell
    before = common.peak_memory_mib(torch.device("cpu"))
    model, run = vit_step(method, int(images))
    if how == "checkpoint":
        mrm.checkpoint_blocks(model)
    run(1)  # after a step of one image the optimiser has its state
    began = time.process_time()
    run()
    peak, seconds = common.peak_memory_mib(torch.device("cpu")), time.process_time() - began
    print(f"{' '.join(cell)}: {peak - before:.0f} MiB, {seconds:.1f} s of CPU a step")


def products(rows, dtype, weights, width=768):
    """(GFLOP, function) of the products of a ViT's block alone, at `rows` rows: forward and for the
    gradients of the inputs and, with `weights`, of the weights."""
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
    """loralib's merged linear layer, which MED-PEFT uses."""
    rows, width = x.flatten(0, 1), len(self.weight) // 3
    after_A = F.linear(F.dropout(rows, self.dropout), self.lora_A)  # (M, 2R)
    after_B = F.conv1d(after_A.t().unsqueeze(0), self.lora_B.unsqueeze(-1), groups=2)[0].t()
    columns = torch.arange(3 * width, device=x.device).view(3, width)[[0, 2]].flatten()
    padded = after_B.new_zeros(len(rows), 3 * width).index_copy(1, columns, after_B)
    y = F.linear(rows, self.weight, self.bias) + padded * self.scale
    return y.view(*x.shape[:2], -1)


def official(run):
    """`run` with the papers' forms of attention and of LoRA."""

    def run_official():
        with (
            mock.patch.object(vit.Attention, "forward", official_attention),
            mock.patch.object(lora.LoRALinear, "forward", official_lora),
        ):
            run()

    return run_official


def limits(images=8, rounds=3):
    """How fast a step of ViT-B/16 is beside its products alone, full and LoRA, in the papers' form
    too. On one core (OMP_NUM_THREADS=1), as the two commands after this one."""
    rows, runs, counts = int(images) * 197, {}, {}
    for method, dtype in itertools.product(("lora", "full"), (torch.bfloat16, torch.float32)):
        name = f"{method}, {str(dtype)[6:]}"
        # 2 rows x parameters for each product; attention has q k^T and weights v
        count, runs[name, "products"] = products(rows, dtype, method == "full")
        counts[name] = 12 * count, 3 * 12 * 4 * rows * 197 * 768 / 1e9
        runs[name, "ours"] = vit_step(method, int(images), dtype)[1]
        if dtype == torch.float32:
            runs[name, "official"] = official(vit_step(method, int(images), dtype)[1])
    times = median_times(runs, int(rounds))
    for (name, form), seconds in times.items():
        linear, attention = counts[name]
        speed, ceiling = (linear + attention) / seconds, linear / 12 / times[name, "products"]
        if form != "products":
            print(
                f"{name}, {form}: {linear:.0f} + {attention:.0f} GFLOP, {seconds:.2f} s, "
                f"{speed:.0f} of {ceiling:.0f} GFLOP/s, {100 * speed / ceiling:.0f} %"
            )


def scaling(images=2, rounds=3):
    """How the time of a LoRA step of ViT-B/16 grows with image size, depth, rank and number of
    images: the exponent is the slope of the logarithms."""
    grow = {"size": (112, 160, 224, 320), "depth": (3, 6, 12, 24), "rank": (4, 16, 64, 256)}
    for option, values in (grow | {"images": (1, 2, 4, 8)}).items():
        runs = {value: vit_step(**{"images": int(images), option: value})[1] for value in values}
        times = median_times(runs, int(rounds))
        slope = np.polyfit(np.log(values), np.log(list(times.values())), 1)[0]
        shown = ", ".join(f"{value}: {seconds:.2f} s" for value, seconds in times.items())
        print(f"{option} {shown}; exponent {slope:.2f}", flush=True)


def overheads(rounds=20):
    """What a step of the tiny MRM consists of, and how fast each kind of work is alone."""
    ratios = {name: mrm.PRESETS["tiny"][name] for name in ("mask_ratio", "word_ratio")}
    run = record_step(32, 19, **ratios, **mrm.MODELS["tiny"], vocab_size=364)
    small = torch.rand(8)
    run()  # the optimiser makes its state
    with FlopCounterMode(display=False) as operations, Bytes() as moved:
        run()
    count, alone = products(32 * 10, torch.float32, True, 128)
    large = torch.rand(2, 2**24)
    runs = {"step": run, "products": alone, "copy": lambda: large[0].copy_(large[1])}
    runs["calls"] = lambda: [small + 1 for _ in range(1000)]
    times = median_times(runs, rounds)
    print(
        f"tiny MRM: {operations.get_total_flops() / 1e9:.2f} GFLOP, {moved.total / 1e6:.0f} MB, "
        f"{moved.calls} operations in {1000 * times['step']:.1f} ms; alone "
        f"{count / times['products']:.0f} GFLOP/s, {2**27 / times['copy'] / 1e9:.1f} GB/s, "
        f"{1000 * times['calls']:.1f} us a call of an operation"
    )


def crops(films=32, side=96, rounds=100):
    """Milliseconds of the crops of a batch of demo films: film by film as `random_resized_crop`
    has them, each half in a thread of its own, and as two products of the whole batch with the
    weights of the same bicubic interpolation, which the crops of this size enlarge."""
    images = torch.rand(films, side, side)
    sides = torch.randint(side // 2, side + 1, (2, films))  # heights, widths
    boxes = [images[i, None, : sides[0, i], : sides[1, i]] for i in range(films)]

    def one_by_one(boxes=boxes):
        return [data.resize(box, (side, side)) for box in boxes]

    def two_threads():
        half = pool.submit(one_by_one, boxes[films // 2 :])
        return one_by_one(boxes[: films // 2]) + half.result()

    def weights(length):
        centres = (torch.arange(side) + 0.5) * (length[:, None] / side)
        x = (torch.arange(side) + 0.5 - centres[..., None]).abs()
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        w = torch.where(x <= 1, near, far) * (
            (x < 2) & (torch.arange(side) < length[:, None, None])
        )
        return w / w.sum(-1, keepdim=True)  # (B, side, side)

    def at_once():
        return (weights(sides[0]) @ images @ weights(sides[1]).mT).clamp_(0, 1)

    with ThreadPoolExecutor(1) as pool:
        runs = {"film by film": one_by_one, "two threads": two_threads, "at once": at_once}
        assert torch.allclose(torch.cat(one_by_one()), at_once(), atol=1e-5)
        for name, seconds in median_times(runs, rounds, time.perf_counter).items():
            print(f"{name}: {1000 * seconds:.2f} ms")
    for size, side in ((1157, 448), (578, 224)):  # what pretraining and fine-tuning crop
        large = [torch.rand(1, size, round(1.2 * size)) for _ in range(8)]
        crop = functools.partial(data.random_resized_crop, large, side)
        seconds = median_times({"crop": crop}, 30, time.perf_counter)["crop"]
        print(f"from {size} to {side} pixels: {1000 * seconds / 8:.2f} ms a film")


def feeding(demo="demo", steps=600):
    """Images/s of mrm.py on the folder `demo`, and the share of its time spent waiting for data: as
    it is, with a worker, with a thread that makes the next batch during a step, and with batches
    that cost nothing, the first twenty again and again."""
    load = data.load_batches

    def thread(dataset, keys, workers):
        with ThreadPoolExecutor(1) as pool:
            batch = pool.submit(dataset.__getitem__, next(keys))
            for key in keys:
                made, batch = batch.result(), pool.submit(dataset.__getitem__, key)
                yield made
            yield batch.result()

    def nothing(dataset, keys, workers):
        first = [dataset[key] for key in itertools.islice(keys, 20)]
        yield from itertools.islice(itertools.cycle(first), int(steps))

    ways = {"as it is": (load, 0), "a worker": (load, 1), "a thread": (thread, 0)}
    for name, (way, workers) in (ways | {"nothing": (nothing, 0)}).items():
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(data, "load_batches", way):
            config = mrm.MRMConfig(root=demo, steps=int(steps), out=folder, workers=workers)
            with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
                result = mrm.pretrain(config)
        speed, waiting = result["images_per_second"], 100 * result["share_waiting_for_data"]
        print(f"{name}: {speed:.0f} images/s, {waiting:.1f} % waiting", flush=True)


def official_step(model, a, b, opt_g, opt_d):
    """The step of Kid-Liet/Reg-GAN: D is trained along in G's backward pass, the generator runs
    again for D's step."""
    opt_g.zero_grad()
    fake = model.netG_A2B(a)
    flow = model.registration(fake, b)
    losses = {
        "adversarial": reggan.lsgan(model.netD_B(fake), True),
        "correction": 20 * reggan.correction(fake, flow, b),
        "smooth": 10 * reggan.smoothness(flow),
    }
    sum(losses.values()).backward()
    opt_g.step()
    opt_d.zero_grad()
    with torch.no_grad():
        fake = model.netG_A2B(a)
    losses["d"] = reggan.lsgan(model.netD_B(b), True) + reggan.lsgan(model.netD_B(fake), False)
    losses["d"].backward()
    opt_d.step()
    return losses


class Bytes(TorchDispatchMode):
    """Counts operations and the bytes of the tensors that they read and write, views left out."""

    total = calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.calls += 1
            self.total += sum(
                t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)
            )
        return out


def step(rounds=3, size=256):
    """The step of --paper, batch 1, 256 x 256.

    The official code's form in float32, ours in float32 and in bfloat16 autocast, and ours with the
    coarse-to-fine R in bfloat16, all from the same weights of G and D. Every R starts with a zero
    flow, so the first steps agree whatever R is made of. Prints the losses of the first step and
    how G(a) differs after it, operations and bytes, and seconds, in turn in one process.
    """
    a, b = torch.rand(2, 1, 1, size, size) * 2 - 1

    def form(official=False, autocast=contextlib.nullcontext, **options):
        config = reggan.complete(reggan.Config(paper=True, **options))
        torch.manual_seed(0)  # G and D are made before R
        model = reggan.build(config, 1, 1, (size, size))
        if official:
            official_layers(model).requires_grad_(True)
        optimizers = [
            torch.optim.Adam(
                reggan.trainable(model, *prefixes), 1e-4, (0.5, 0.999), fused=not official
            )
            for prefixes in (("netG", "registration"), ("netD",))
        ]
        if official:
            return model, lambda: official_step(model, a, b, *optimizers)
        pools = {"B": reggan.Pool(0)}
        return model, lambda: reggan.training_step(
            model, config, a, b, *optimizers, pools, autocast
        )

    def bfloat16():
        return torch.autocast("cpu", torch.bfloat16)

    forms = {
        "official, float32": form(official=True),
        "ours, float32": form(),
        "ours, bfloat16": form(autocast=bfloat16),
        "ours with the coarse-to-fine R, bfloat16": form(autocast=bfloat16, reg_net="coarse"),
    }
    fakes = {}
    for name, (model, run) in forms.items():
        losses = {key: round(float(value.detach()), 5) for key, value in run().items()}
        with torch.no_grad():
            fakes[name] = model.translate(a)
        difference = (fakes[name] - fakes["official, float32"]).abs()
        with FlopCounterMode(display=False) as operations, Bytes() as moved:
            run()
        print(
            f"{name}: losses of step 1 {losses}; G(a) after it differs by {difference.mean():.1e} "
            f"in the mean, {difference.max():.1e} at most; "
            f"{operations.get_total_flops() / 1e9:.0f} GFLOP, {moved.total / 1e9:.1f} GB",
            flush=True,
        )
    times = {name: [] for name in forms}
    for _ in range(rounds):
        for name, (_, run) in forms.items():
            began = time.time()
            run()
            times[name].append(time.time() - began)
    medians = {name: sorted(values)[rounds // 2] for name, values in times.items()}
    for name, values in times.items():
        print(
            f"{name}: {' '.join(f'{v:.2f}' for v in values)} s a step, "
            f"{medians['official, float32'] / medians[name]:.2f} times as fast"
        )


@torch.no_grad()
def motions(*runs, rounds=20):
    """For each run, the slope of R's flow on the true flow in shift, zoom and rotation:
    least-squares fits of an affine flow to both over the foreground of misaligned pairs of val, at
    the run's own level. 1 is all of it."""
    for run in runs:
        model, translate, config, _ = reggan.load_generator(run)
        model.eval()
        pairs = reggan.all_pairs(config)[1][1]
        y, x = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in pairs.shape), indexing="ij")
        plane, fits = torch.stack((torch.ones_like(y), y, x), -1).flatten(0, 1), []  # (H W, 3)
        for epoch in range(rounds):
            a, b, true = pairs[[(epoch, index) for index in range(len(pairs))]]
            flows = torch.stack((model.registration(translate(a), b), true), 1).flatten(
                3
            )  # (B, 2, 2, H W)
            for pair, inside in zip(flows.mT, (b != -1).any(1).flatten(1)):
                fits.append(
                    torch.linalg.lstsq(plane[inside].expand(2, -1, -1), pair[:, inside]).solution
                )
        found, true = torch.stack(fits, 1)  # (N, 3, 2) each
        parts = {
            "shift": lambda fit: fit[:, 0],
            "zoom": lambda fit: fit[:, 1, 0] + fit[:, 2, 1],
            "rotation": lambda fit: fit[:, 2, 0] - fit[:, 1, 1],
        }
        shares = {
            name: (part(found) * part(true)).sum() / part(true).square().sum()
            for name, part in parts.items()
        }
        print(
            f"{run}: " + ", ".join(f"{name} {share:.2f}" for name, share in shares.items()),
            flush=True,
        )


class TrueFlow(improved.CoarseToFine):
    """In training the true flow of the batch, which `bound` leaves in `flow`."""

    flow = None

    def forward(self, fake, real):
        return TrueFlow.flow if self.training else super().forward(fake, real)


def bound(seed):
    """The result of NC whose correction uses the true flow of each misaligned pair: what a perfect
    R would reach."""
    all_pairs = reggan.all_pairs

    def with_true_flow(config):
        pairs, val, test = all_pairs(config)
        pairs.with_flow, batches = True, pairs.batches

        def pairs_alone(*args):
            for a, b, TrueFlow.flow in batches(*args):
                yield a, b

        pairs.batches = pairs_alone
        return pairs, val, test

    reggan.all_pairs, improved.CoarseToFine = with_true_flow, TrueFlow
    config = improved.Config(
        size=32,
        epochs=60.0,
        dtype="fp32",
        noise=5.0,
        seed=int(seed),
        smooth=0.0,
        drift=0.0,
        synthetic=0.0,
        out=f"runs/bound-{seed}",
    )
    result = reggan.train(config)
    print(f"seed {seed}: PSNR {result['psnr']:.2f} dB, MAE {result['mae']:.4f}")


def lungs(covid, folder, seed=0):
    """Lists of the films in COVID/images that have a mask in COVID/lung_masks: a third of the
    patients for test_list, a tenth for val_list, the others for train_list. A film without a known
    patient is a patient of its own."""
    covid, folder = Path(covid).absolute(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "images").symlink_to(covid / "images")
    stems = {path.stem for path in (covid / "lung_masks").iterdir()}
    names = sorted(path.name for path in (covid / "images").iterdir() if path.stem in stems)
    patients = [patient or name for patient, name in zip(data.patient_ids(covid, names), names)]
    order = sorted(set(patients))
    order = [order[i] for i in torch.randperm(len(order), generator=common.seeded(seed)).tolist()]
    ends = [len(order) // 3, len(order) // 3 + len(order) // 10]
    parts = {"test": order[: ends[0]], "val": order[ends[0] : ends[1]], "train": order[ends[1] :]}
    for part, members in parts.items():
        listed = [name for name, patient in zip(names, patients) if patient in members]
        (folder / f"{part}_list.txt").write_text("\n".join(listed) + "\n")
        print(f"{part}: {len(listed)} films of {len(members)} patients")


def real(covid, nih, folder):
    """Records for pretraining on real films: NIH's training list, without reports, and the films
    of COVID with their notes. DIR/test.txt holds the test lists of its six published splits, for
    --exclude, which leaves their patients out too."""
    covid, nih, folder = Path(covid), Path(nih), Path(folder)
    (folder / "images").mkdir(parents=True)
    listed = [name for name, *_ in data.read_csv(covid / "records.csv", ("image_path",))]
    notes = dict(
        row[1:] for row in data.read_csv(covid / "training.csv", ("image_path", "report_content"))
    )
    rows = [[path.name, notes.get(path.name, "")] for path in sorted((covid / "images").iterdir())]
    rows += [[line.split()[0], ""] for line in (nih / "train_list.txt").read_text().splitlines()]
    for name, _ in rows:
        source = covid if (covid / "images" / name).exists() else nih
        (folder / "images" / name).symlink_to((source / "images" / name).absolute())
    common.write_csv(folder / "training.csv", ["image_path", "report_content"], rows)
    (folder / "patients.csv").write_bytes((covid / "records.csv").read_bytes())
    tests = sorted((covid / "splits").glob("*/test.txt"))
    (folder / "test.txt").write_text("".join(path.read_text() for path in tests))
    print(f"{len(rows)} films, {len(notes)} notes; {len(listed)} of COVID have a patient")


class UNet(torch.nn.Module):
    """U-Net (Ronneberger et al., 2015) of five levels, `width` channels in the first and twice as
    many in each next one: two 3 x 3 convolutions a level with norms, max pooling down, bilinear
    up."""

    def __init__(self, img_size, norm, width=9):
        super().__init__()
        self.img_size, self.blocks = img_size, torch.nn.ModuleList()  # no blocks of a ViT
        self.register_buffer("cls_token", torch.zeros(1, 1, 1), persistent=False)  # as narrow
        widths = [width * 2**level for level in range(5)]

        def two(inputs, outputs):
            layers = (
                segment.ConvNorm(inputs, outputs, 3, norm),
                segment.ConvNorm(outputs, outputs, 3, norm),
            )
            return torch.nn.Sequential(*layers)

        self.down = torch.nn.ModuleList(two(a, b) for a, b in zip([1, *widths], widths))
        self.up = torch.nn.ModuleList(two(a + b, a) for a, b in zip(widths, widths[1:]))
        self.last = torch.nn.Conv2d(width, 1, 1)

    def forward(self, x):
        levels = []
        for layer in self.down:
            x = layer(F.max_pool2d(x, 2) if levels else x)
            levels.append(x)
        for layer, skip in zip(reversed(self.up), reversed(levels[:-1])):
            x = layer(torch.cat([skip, F.interpolate(x, scale_factor=2, mode="bilinear")], dim=1))
        return self.last(x)


def unet(out, *options):
    """Trains and tests a U-Net exactly as finetune.py does UPerNet: lists, crops, losses,
    optimiser, rate, choice on val, metrics. There is no auxiliary head, and all layers have the
    same rate."""
    command = ["--task", "segment", "--weights", "scratch", "--layer-decay", "1", "--out", out]
    config = common.parse_config(finetune.FinetuneConfig, [*command, *options])
    finetune.build_model = lambda config, *_: UNet(config.img_size, config.norm)
    finetune.finetune(config)


def cache(films, folder, side=224):
    """Prints the milliseconds of CPU that a film of the folder `films` costs, decoded, read from
    the cache `folder` and from memory, with its random crop to side x side pixels and without."""
    torch.set_num_threads(1)
    data.cores = lambda: 1  # the time of other processes is not counted
    paths, side = data.list_images(films)[:1000], int(side)
    crop = functools.partial(mrm.augment, side=side, min_crop=0.2)
    decoded, cached = (data.ImageSet(paths, 2 * side, crop, folder=f) for f in ("", folder))
    batches = [(list(range(len(paths)))[i : i + 64], i) for i in range(0, len(paths), 64)]

    def cost(name, call):
        began = time.process_time()
        call()
        print(f"{name}: {1000 * (time.process_time() - began) / len(paths):.3f} ms a film")

    cost("fills the cache", lambda: cached.preload(0))
    cost("looks through the full cache", lambda: cached.preload(0))
    for name, images in (("decoded", decoded), ("cached", cached)):
        cost(f"{name}", lambda: [images.read(i) for i in range(len(paths))])
        cost(f"{name}, with its crop", lambda: [images[batch] for batch in batches])
    cost("from the cache into memory", cached.preload)
    cost("in memory, with its crop", lambda: [cached[batch] for batch in batches])
    files = [file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()]
    print(f"{len(paths)} films, {sum(files) / 2**20:.0f} MiB")


COMMANDS = (pixels, vit, limits, scaling, overheads, crops, feeding, memory, step, motions)
COMMANDS += (bound, lungs, unet, real, cache)

if __name__ == "__main__":
    command = {function.__name__: function for function in COMMANDS}.get(" ".join(sys.argv[1:2]))
    if command is None:
        sys.exit(__doc__)
    command(*sys.argv[2:])
