"""MRM, masked record modeling: a ViT learns from X-rays and reports whose hidden parts it restores.

Paper: Zhou et al., "Advancing Radiograph Representation Learning with Masked Record Modeling",
ICLR 2023.

    python mrm.py                                        # pretrains the tiny preset on demo records
    python mrm.py --data csv --root DIR --preset base    # the paper's ViT-B/16 on DIR/training.csv
    python mrm.py --reconstruct --weights runs/mrm       # a picture of what it restores
    torchrun --nproc_per_node=2 mrm.py ...               # several GPUs

A record is an X-ray and its report; nobody has to label it. The encoder sees a part of the image.
From what it makes of that, one decoder restores the rest, and another guesses the words that are
hidden in the report. Fine-tuning keeps only the encoder.

    image, 2H x 2W ---------------------> its N patches of 2p x 2p pixels
      |                                                        |
      | half the size                                    (1) image loss
      v                                                        |
    image, H x W                      +--> IMAGE DECODER --> N patches of 2p x 2p pixels
      |                               |
      | N patches of p x p pixels     |
      v                               |
    V of them, visible --> ENCODER --> latent, 1 + V tokens
                                      |
                                      | mean of the V tokens, one vector
                                      v
    report with hidden words --> REPORT DECODER --> the hidden words -- (2) report loss

The image decoder restores twice the resolution that the encoder was shown: the latent must let it
guess finer detail than the input shows, and the encoder sees a quarter of the patches that a
full-size input would have. The report decoder gets one vector, the mean of the patches, so that it
must hold what the words need: a classifier later reads such a mean, of all patches and with a
norm of its own. The class token is in neither mean. It exists because MAE's and timm's weights have
one; the image decoder may attend to it. As in the paper three quarters of the patches and half of
the words are hidden, and both losses weigh 1. Ours: no flips, as reports say left and right; byte
pairs, not word pieces; norms first in the report decoder (tests/departures.md).

    (1) image loss  = sum_n mask_n mean((prediction_n - target_n)^2) / sum_n mask_n
    (2) report loss = -1/|hidden| sum over hidden tokens t of log p(t | visible words, patches)
    (3) loss        = image loss + report loss

mask_n is 1 for a hidden patch n; a visible one could be copied. target_n is its pixels with mean 0
and variance 1, so that structure counts and brightness does not.

A batch of the tiny preset (base: 448 pixels, 196 patches of which 49 are visible, width 768):

    encoder         images (32, 1, 96, 96) -> half the size (32, 1, 48, 48)
                    -> 36 patches (32, 36, 128) -> 9 visible (32, 9, 128)
                    -> class token first (32, 10, 128) -> 2 blocks -> latent (32, 10, 128)
    image decoder   latent -> (32, 10, 64) -> with 27 mask tokens (32, 37, 64) -> 1 block
                    -> (32, 36, 256), 36 patches of 16 x 16 pixels
    report decoder  mean of 9 tokens (32, 1, 128) -> (32, 1, 64), added to the L <= 40 tokens of
                    each report (32, L, 64) -> 1 block -> (hidden tokens, vocabulary of 348)

Shapes: B batch, N patches, V visible patches, D width, p pixels a side of a patch, C channels, L
tokens of a report. Before this file comes vit.py, after it lora.py.
"""

import dataclasses
import functools
import hashlib
import math
import time
from pathlib import Path
from typing import ClassVar

from support.script import (  # before torch: it sets how threads wait
    RUNNING, InputError, RunConfig, RunLog, Saving, Timed, autocast_for, check_finite,
    checkpoint_file, draw_curves, even_batch, fill, join, last_state, mean_over_processes,
    number_of_steps, option, parse_config, restore, run_script, save_grid, save_state, scaler_for,
    seed_rank, with_dtype,
)
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from support.tokenizer import encode_reports, load_tokenizer, save_tokenizer, train_tokenizer
from support.weights import load_encoder, read_weights
from vit import Block, ViT, init_weights, patchify, sincos_positions, unpatchify

# --------------------------------------------------------------------------------------------------
# The report decoder. The image decoder is part of `MRM`, because it has MAE's keys


class ReportDecoder(nn.Module):
    """Guesses the hidden words of a report, given the image: a small BERT (paper, section 3.2).
    The image enters as one normalised vector that is added to every token embedding. The vocabulary
    head shares the weights of the token embedding."""

    def __init__(self, vocab_size, image_dim, dim=384, depth=6, num_heads=6, max_length=100,
                 dropout=0.1):
        super().__init__()
        self.image_norm = nn.LayerNorm(image_dim)
        self.image_embed = nn.Linear(image_dim, dim)
        self.token_embed = nn.Embedding(vocab_size, dim)
        self.position_embed = nn.Embedding(max_length, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, num_heads, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.apply(init_weights)
        # BERT's 0.02: Xavier's would make the image 2 to 5 times as large beside the words
        nn.init.normal_(self.image_embed.weight, std=0.02)
        for embedding in (self.token_embed, self.position_embed):
            nn.init.normal_(embedding.weight, std=dim**-0.5)  # the first logits are of size 1

    def forward(self, image_tokens, inputs, hidden, padding):
        """image_tokens (B, V, D), inputs (B, L) token ids, hidden and padding (B, L) bool.
        Returns logits (hidden.sum(), vocab): one row for each hidden token, in order."""
        image = self.image_norm(image_tokens.mean(1, keepdim=True))  # (B, 1, D)
        positions = self.position_embed.weight[: inputs.shape[1]]  # (L, dim)
        x = self.dropout(self.token_embed(inputs) + positions + self.image_embed(image))
        attended = ~padding[:, None, None, :]  # (B, 1, 1, L): tokens beyond the end say nothing
        for block in self.blocks:
            x = block(x, attended)  # (B, L, dim)
        return F.linear(self.norm(x[hidden]), self.token_embed.weight, self.bias)


# --------------------------------------------------------------------------------------------------
# Masked record modeling


def standardize_patches(patches):
    """Patches (..., P) with mean 0 and variance 1 each, and their mean and deviation (..., 1).
    (x - mean) / sqrt(var + 1e-6), var unbiased: MAE's `norm_pix_loss`."""
    mean = patches.mean(-1, keepdim=True)
    centred = patches - mean
    std = (centred.square().sum(-1, keepdim=True) / (patches.shape[-1] - 1) + 1e-6).sqrt()
    return centred / std, mean, std


def half_size(images):
    """(B, C, 2H, 2W) -> (B, C, H, W): the encoder sees images at half the decoder's resolution."""
    return F.interpolate(images, scale_factor=0.5, mode="bicubic", antialias=True)


class MRM(ViT):
    """Encoder (the ViT itself, with its keys), image decoder and report decoder. `img_size` and
    `patch_size` are what the encoder sees. `vocab_size` 0 leaves the report decoder out."""

    def __init__(self, img_size=224, patch_size=16, in_chans=1, embed_dim=768, depth=12,
                 num_heads=12, decoder_dim=768, decoder_depth=4, decoder_heads=6, vocab_size=0,
                 report_dim=384, report_depth=6, report_heads=6, report_length=100,
                 report_dropout=0.1):
        super().__init__(img_size, patch_size, in_chans, embed_dim, depth, num_heads)
        self.pos_embed.requires_grad_(False)  # fixed sin-cos
        self.decoder_embed = nn.Linear(embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        positions = sincos_positions(decoder_dim, img_size // patch_size)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, decoder_heads)
                                            for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, (2 * patch_size) ** 2 * in_chans)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            part.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)
        if vocab_size:
            sizes = report_dim, report_depth, report_heads, report_length, report_dropout
            self.report_decoder = ReportDecoder(vocab_size, embed_dim, *sizes)

    def encode(self, images, mask_ratio, noise=None):
        """Encodes a random subset of the patches of images (B, C, H, W): MAE's masking.
        The patches with the lowest noise (B, N) stay visible; None draws it. Returns latent
        (B, 1 + V, D), behind the last norm, mask (B, N) with 1 = hidden, and ids_restore (B, N)."""
        # 1. Positions come before the shuffle: after it a place does not say where a patch was
        x = self.embed(images)  # (B, N, D)
        B, N, D = x.shape
        visible = int(N * (1 - mask_ratio))  # V, as MAE rounds it
        # 2. Every patch draws a number. Sorting them shuffles the patches: ids_shuffle[k] is the
        #    patch at place k. Noise .6 .1 .9 .3 gives 1 3 0 2
        if noise is None:
            noise = torch.rand(B, N, device=x.device)
        ids_shuffle = noise.argsort(dim=1)  # (B, N)
        # 3. Sorting the permutation inverts it: ids_restore[n] is the place of patch n. 2 0 3 1
        ids_restore = ids_shuffle.argsort(dim=1)  # (B, N)
        # 4. The encoder runs on the first V alone: cheap, and without mask tokens, as in use later
        kept = ids_shuffle[:, :visible, None].expand(-1, -1, D)  # (B, V, D)
        latent = self.norm(self.run_blocks(x.gather(1, kept)))  # (B, 1 + V, D)
        # 5. A patch is hidden where its place lies behind the V that were kept. V = 2: 1 0 1 0
        mask = (ids_restore >= visible).float()  # (B, N)
        return latent, mask, ids_restore

    def decode_image(self, latent, ids_restore):
        """latent (B, 1 + V, D) -> patches (B, N, (2p)^2 C) at twice the encoder's resolution."""
        x = self.decoder_embed(latent)  # (B, 1 + V, d), d the decoder's width
        B, N = ids_restore.shape
        # Every hidden patch enters as the same learned token, which only its position tells apart
        hidden = self.mask_token.expand(B, N - x[:, 1:].shape[1], -1).to(x.dtype)  # (B, N - V, d)
        patches = torch.cat([x[:, 1:], hidden], dim=1)  # (B, N, d) in shuffled order
        patches = patches.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[2]))  # in order
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed  # (B, 1 + N, d)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, 1:]))

    def image_loss(self, images, prediction, mask):
        """Equation 1: sum_n mask_n mean((prediction_n - target_n)^2) / sum_n mask_n.
        Only hidden patches are picked. images (B, C, 2H, 2W); prediction (B, N, (2p)^2 C)."""
        hidden = mask.bool()
        target, _, _ = standardize_patches(patchify(images, 2 * self.patch_size)[hidden])
        return (prediction[hidden].float() - target).square().mean()

    def report_loss(self, latent, tokens, inputs, hidden, padding):
        """Equation 2: -1/|hidden| sum over hidden tokens t of log p(t | visible words, patches).
        A record without a report, which is padding alone, has no part in it."""
        rows = ~padding.all(1)  # (B,)
        if not rows.any():  # torchrun wants every gradient: a row with nothing hidden gives 0
            rows[0], padding = True, torch.zeros_like(padding)
        logits = self.report_decoder(latent[rows, 1:], inputs[rows], hidden[rows], padding[rows])
        if len(logits) == 0:
            return logits.float().sum()
        return F.cross_entropy(logits.float(), tokens[hidden])

    def forward(self, images, report=None, mask_ratio=0.75, noise=None):
        """The two losses of a batch of records, of images (B, C, 2H, 2W) and reports.
        report is (tokens, inputs, hidden, padding), each (B, L): the true ids, the ids with the
        mask token at hidden words, and as bools the hidden tokens and those beyond the end. Without
        `report` the report loss is 0."""
        latent, mask, ids_restore = self.encode(half_size(images), mask_ratio, noise)
        report_loss = latent.new_zeros(())
        image_loss = self.image_loss(images, self.decode_image(latent, ids_restore), mask)
        if report is not None:
            report_loss = self.report_loss(latent, *report)
        return image_loss, report_loss


# --------------------------------------------------------------------------------------------------
# Options and presets

MEAN, STD = 0.4978, 0.2449  # of MIMIC-CXR's pixels in [0, 1], from the official code

BASE = dict(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, decoder_dim=768,
            decoder_depth=4, decoder_heads=6, report_dim=384, report_depth=6, report_heads=6,
            report_length=100)
MODELS = {
    "tiny": dict(img_size=48, patch_size=8, embed_dim=128, depth=2, num_heads=4, decoder_dim=64,
                 decoder_depth=1, decoder_heads=2, report_dim=64, report_depth=1, report_heads=2,
                 report_length=40, report_dropout=0.0),
    "mini": dict(img_size=64, patch_size=8, embed_dim=192, depth=4, num_heads=3, decoder_dim=96,
                 decoder_depth=1, decoder_heads=3, report_dim=96, report_depth=1, report_heads=3,
                 report_length=60, report_dropout=0.0),
    "small": BASE | dict(embed_dim=384, num_heads=6, decoder_dim=384, report_depth=4),
    "base": BASE,
}
HIDDEN = dict(mask_ratio=0.75, word_ratio=0.5)
PAPER = HIDDEN | dict(epochs=200, warmup=0.2, batch_size=256, base_lr=1.5e-4, min_crop=0.2,
                      mean=MEAN, std=STD)
PRESETS = {  # the values of the options that the user does not type
    "tiny": HIDDEN | dict(steps=4800, warmup=0.2, batch_size=32, base_lr=8e-3, min_crop=0.85,
                          mean=None, std=None, vocab_size=800),
    "mini": HIDDEN | dict(steps=6000, warmup=0.05, batch_size=64, base_lr=4e-3, min_crop=0.4,
                          mean=None, std=None, vocab_size=1500),
    "small": PAPER | dict(vocab_size=8000),
    "base": PAPER | dict(vocab_size=30000),
}
RECORDS = dict(data="demo", root="", exclude="", holdout=64, white=None)  # the records of a new run


@dataclasses.dataclass(frozen=True, kw_only=True)
class MRMConfig(RunConfig):
    script: ClassVar = "mrm"
    data: str = option(None, "demo, or csv: ROOT/training.csv of image_path and report_content "
                       "(default: demo; for --reconstruct the run's)", choices=["demo", "csv"])
    root: str = option(None, "data folder (demo: where the demo records are, or are drawn)")
    exclude: str = option(None, "list file: its images and those of its patients are left out")
    preset: str = option("tiny", "model and recipe; base is the paper's", choices=list(MODELS))
    weights: str = option("", "start from this checkpoint's encoder (the paper starts from MAE's); "
                          "from a run of this script also from its decoders and its vocabulary")
    image_only: bool = option(False, "ablation: restore images only")
    mask_ratio: float = option(None, "share of image patches hidden", within="(0, 1)")
    word_ratio: float = option(None, "share of report words hidden", within="(0, 1]")
    vocab_size: int = option(None, "tokens of the reports' vocabulary", within="[259, inf)")
    min_crop: float = option(None, "smallest share of an image in a crop", within="(0, 1]")
    mean: float = option(None, "mean of the pixels in [0, 1] (tiny, mini: each image's)")
    std: float = option(None, "deviation of the pixels (as the mean)", within="(0, inf)")
    warmup: float = option(None, "share of the steps in which the rate rises", within="[0, 1]")
    weight_decay: float = option(0.05, "weight decay of AdamW", within="[0, inf)")
    accumulate: int = option(1, "forward and backward passes a step", within="[1, inf)")
    white: int = option(None, "white of 16-bit images (default: by its bits)", within="[1, 65535]")
    holdout: int = option(None, "last records, whose patients are not trained on, for the log's "
                          "losses and --reconstruct (default: 64)", within="[1, inf)")
    reconstruct: bool = option(False, "draw what --weights restores, and stop", free=True,
                              takes=("weights", "mask_ratio", "word_ratio", "mean", "std",
                                     *RECORDS, *RUNNING))


def fill_options(config, world):
    """The configuration that runs: `config` with the preset's values and the peak learning rate.
    Raises InputError for options that contradict each other."""
    preset, sizes = dict(PRESETS[config.preset]), MODELS[config.preset]
    base_lr = preset.pop("base_lr")
    config = fill(config, RECORDS | {"out": "runs/mrm"} | preset)
    config = even_batch(config, world * config.accumulate)
    # The linear scaling rule (Goyal et al.)
    config = fill(config, {"lr": base_lr * config.batch_size / 256})
    patches = (sizes["img_size"] // sizes["patch_size"]) ** 2
    if (config.mean is None) != (config.std is None):
        raise InputError("--mean and --std", "both or none", "one of them")
    if not 1 <= int(patches * (1 - config.mask_ratio)) < patches:
        raise InputError("--mask-ratio", f"a share that leaves 1 to {patches - 1} of {patches} "
                         "patches visible", config.mask_ratio)
    return config


# --------------------------------------------------------------------------------------------------
# Records


def read_records(config):
    """The records of training.csv without the excluded ones: (image paths, reports).
    With --image-only the reports are empty, and the file needs no column of them."""
    root = data.demo_root(config.root) if config.data == "demo" else Path(config.root)
    listed = root / "training.csv"
    if config.image_only:
        names = [name for _, name in data.read_csv(listed, ("image_path",))]
        paths, reports = data.find_images("csv", root, names, listed), [""] * len(names)
    else:
        paths, reports = data.read_reports(listed, root)
    if config.exclude:
        keep, count = data.not_excluded(root, paths, config.exclude), len(paths)
        paths, reports = [paths[i] for i in keep], [reports[i] for i in keep]
        print(f"{config.exclude}: {len(keep)} records are left, of {count}, without its patients")
    # What is held out shares no patient with what is trained on, and no image that has two reports
    owners, first = data.units(data.identify(root, paths)), len(paths) - config.holdout
    heldout = set(owners[-config.holdout :])
    keep = [i for i, owner in enumerate(owners) if i >= first or owner not in heldout]
    paths, reports = [paths[i] for i in keep], [reports[i] for i in keep]
    if len(paths) < 2 * config.holdout:
        least = f"at least {2 * config.holdout} records for --holdout {config.holdout}"
        raise InputError(listed, least, f"{len(paths)}, without patients that are held out")
    if "" in reports and not config.image_only:
        if not any(reports[: -config.holdout]):
            raise InputError(listed, "a report of a record (or --image-only)", "none")
        print(f"{listed}: {reports.count('')} of {len(reports)} records have no report, and count "
              "for the image loss alone")
    return paths, reports


@dataclasses.dataclass
class Records:
    """The images and encoded reports of a pretraining run."""

    training: data.ImageSet  # the images of the training records
    heldout: torch.Tensor  # images of the held-out records, normalised, on the device
    tokenizer: object
    tokens: torch.Tensor  # (n, L) of all reports, those of the held-out records last
    word_of: torch.Tensor  # (n, L): the word that a token belongs to, by number; -1 beyond the end

    def report_batch(self, rows, config, generator=None):
        """The reports `rows` as `MRM.forward` takes them, with newly drawn hidden words."""
        if config.image_only:
            return None
        report = mask_report(self.tokenizer, self.tokens[rows], self.word_of[rows],
                             config.word_ratio, generator)
        return [part.to(self.heldout.device) for part in report]


def hide_words(tokenizer, tokens, word_of, ratio, generator=None):
    """Hides round(ratio * words) of each report's words, at least one, with all their tokens.
    tokens, word_of: (B, L) from `encode_reports`. Returns (inputs, hidden): inputs carry <mask>
    where hidden (B, L) is True."""
    # Whole words, as in the paper: a part of one that stays visible would give the rest away
    words = word_of.max(1).values + 1  # (B,), of each report
    hide = (ratio * words.double()).round().long().clamp(min=1).minimum(words)
    # As with the patches, every word draws a number. The words with the lowest are hidden
    draws = torch.rand(len(words), max(1, int(words.max())), generator=generator).to(words.device)
    draws[torch.arange(draws.shape[1], device=words.device) >= words[:, None]] = 2.0  # no word
    is_hidden = draws.argsort(1).argsort(1) < hide[:, None]  # (B, words)
    hidden = is_hidden.gather(1, word_of.clamp(min=0)) & (word_of >= 0)  # (B, L), by tokens
    return tokens.masked_fill(hidden, tokenizer.encode_single_token("<mask>")), hidden


def mask_report(tokenizer, tokens, word_of, ratio, generator=None):
    """Draws the hidden words of a batch and cuts it to its longest report.
    Returns [tokens, inputs, hidden, padding], as `MRM.forward` takes them."""
    length = max(1, int((word_of >= 0).sum(1).max()))
    tokens, word_of = tokens[:, :length], word_of[:, :length]
    inputs, hidden = hide_words(tokenizer, tokens, word_of, ratio, generator)
    return [tokens, inputs, hidden, word_of < 0]


def load_records(config, paths, reports, device, tokenizer=None):
    """`Records` of these paths and reports. Learns the tokenizer where none is given; a resumed
    run reads its own."""
    sizes, count = MODELS[config.preset], len(paths) - config.holdout
    tokens = word_of = None
    if not config.image_only:
        if config.resume:
            tokenizer = load_tokenizer(Path(config.out) / "tokenizer.tiktoken")
        elif tokenizer is None:
            tokenizer = train_tokenizer(reports[:count], config.vocab_size)
        tokens, word_of = encode_reports(tokenizer, reports, sizes["report_length"])
    side = stored = 2 * sizes["img_size"]
    if config.preset not in ("tiny", "mini"):  # these two are meant for small images, short runs
        # The paper crops the full image. Here an image is kept so large that its smallest crop, of
        # area `min_crop` and aspect 3/4, still has `side` pixels across: 1,157 for 448
        stored = math.ceil(side / math.sqrt(config.min_crop * 3 / 4))
    crop = functools.partial(data.crop_and_flip, side=side, min_crop=config.min_crop, flip=False)
    training = data.ImageSet(paths[:count], stored, crop, config.seed, enlarge=False,
                             white=config.white).preload()
    heldout, _ = data.ImageSet(paths[count:], side, white=config.white)[range(config.holdout), 0]
    heldout = data.normalize(heldout.to(device), config.mean, config.std)
    return Records(training, heldout, tokenizer, tokens, word_of)


# --------------------------------------------------------------------------------------------------
# The optimiser and its learning rate


def decays(name, parameter):
    """Whether weight decay acts on a parameter: it does on weights of linear maps and embeddings,
    and not on biases, norms, sin-cos positions, the class or mask token (MAE's fine-tuning)."""
    return parameter.ndim > 1 and name not in ("cls_token", "mask_token", "pos_embed")


def make_adamw(model, config, device):
    """AdamW over what is trained, with weight decay where `decays` says so."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in trained if decays(n, p)],
               "weight_decay": config.weight_decay},
              {"params": [p for n, p in trained if not decays(n, p)], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=device.type != "mps")


def cosine_lr(step, steps, warmup, peak, floor=0.0):
    """Learning rate of `step` (from 0): it rises linearly to `peak` in `warmup` steps, then falls
    to `floor` along half a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


# --------------------------------------------------------------------------------------------------
# Pretraining


@torch.no_grad()
def heldout_losses(model, records, config, autocast):
    """The losses on the held-out records, with the same hidden patches and words every time."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(len(records.heldout), model.pos_embed.shape[1] - 1, generator=generator)
    noise = noise.to(records.heldout.device)  # (B, N)
    report = records.report_batch(slice(len(records.training), None), config, generator)
    with autocast():
        losses = model(records.heldout, report, config.mask_ratio, noise)
    model.train()
    image_loss, report_loss = (loss.item() for loss in losses)
    if report and not report[2].any():
        report_loss = math.nan  # no held-out record has a report
    return {"heldout_image_loss": image_loss, "heldout_report_loss": report_loss}


def pretrain(config):
    """Trains an MRM as `config` says and returns the content of result.json. Leaves config.json,
    last.pt, tokenizer.tiktoken, log.jsonl, result.json, curves.png and reconstruction.png in
    `config.out`."""
    start = time.time()
    device, rank, world = join(config)  # this is process `rank` of `world`
    typed_vocab_size, config = config.vocab_size, fill_options(config, world)
    paths, reports = read_records(config)
    count = len(paths) - config.holdout  # of training records; the others are held out
    steps = number_of_steps(config, count, config.batch_size)
    facts = {"records": hashlib.sha256(repr((paths, reports)).encode()).hexdigest(),
             "number_of_processes": world}  # a resumed run must have the same
    saved = last_state(config, steps, **facts)
    config = with_dtype(config, device, world, saved, MODELS[config.preset]["embed_dim"])
    tensors, tokenizer, trained_on = None, None, (saved or {}).get("trained_on", [])
    if not saved and config.weights:
        tensors, tokenizer, trained_on = read_start(config, typed_vocab_size)
    records = load_records(config, paths, reports, device, tokenizer)
    vocab_size = 0 if config.image_only else records.tokenizer.n_vocab
    arguments = MODELS[config.preset] | {"vocab_size": vocab_size}
    torch.manual_seed(config.seed)
    model = MRM(**arguments).to(device)
    if tensors is not None:
        load_encoder(model, tensors, config.weights)
    facts |= {"arguments": arguments, "mean": config.mean, "std": config.std}
    # The model knows these images and what reports say of them: fine-tuning warns by these names
    root = (config.root or "demo") if config.data == "demo" else config.root
    own = data.marks(data.identify(root, records.training.paths))
    facts["trained_on"] = sorted({*own, *trained_on})
    log = RunLog(config.out, config, rank, saved and saved["history"], start)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if rank == 0:
        print(f"MRM {config.preset}: {parameters / 1e6:.1f} M parameters, {count} records, "
              f"{steps} steps of {config.batch_size}, {device}")
        if records.tokenizer:
            save_tokenizer(records.tokenizer, log.out / "tokenizer.tiktoken")
    run_steps(config, model, records, steps, saved, facts, log, world)
    result = {"preset": config.preset, "records": count, "parameters": parameters, "steps": steps,
              "batch_size": config.batch_size, **log.history[-1], "lr": config.lr,
              "seconds": time.time() - start}
    log.json("result.json", result)
    if rank == 0:
        draw_restored(model, paths[count:], reports[count:], records.tokenizer, config)
        image, report = result["heldout_image_loss"], result["heldout_report_loss"]
        speed, waiting = result["images_per_second"], 100 * result["share_waiting_for_data"]
        print(f"held-out losses: image {image:.3f}, report {report:.3f}; {speed:.0f} images/s, "
              f"{waiting:.0f} % of the time waiting for data; {log.out / 'last.pt'}")
    return result


def run_steps(config, model, records, steps, saved, facts, log, world):
    """The training loop. `saved` is the state that it goes on from, or None."""
    device, passes, every = records.heldout.device, config.accumulate, max(1, steps // 20)
    optimizer, paths = make_adamw(model, config, device), records.training.paths
    autocast, scaler = autocast_for(config, device), scaler_for(config, device)
    seed_rank(config.seed, log.rank)
    step, parallel = 0, nn.parallel.DistributedDataParallel(model) if world > 1 else model
    if saved:
        step = saved["step"]
        restore(saved, log.rank, model=model, optimizer=optimizer, scaler=scaler)
    batches = Timed(data.train_batches(
        records.training, config.batch_size // (world * passes), step * passes, steps * passes,
        config.seed, log.rank, world, config.workers), world)

    def save(step):
        state = facts | {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                         "scaler": scaler.state_dict(), "step": step}
        save_state(log, config, world, state)

    with Saving(save, world) as saving:
        for step in batches.steps(step, steps, "pretrain", log.rank):
            # The rate rises slowly at first, while Adam has seen too few gradients to scale them
            lr = cosine_lr(step, steps, round(config.warmup * steps), config.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            losses, seen = torch.zeros(2, device=device), []
            # Several small batches add up their gradients where a large one exceeds the memory
            for _ in range(passes):
                images, rows = next(batches)
                images = images.to(device, non_blocking=True)
                images = data.normalize(images, config.mean, config.std)
                # Other words are hidden each time, so that no report can be learned by heart
                report = records.report_batch(rows, config)
                # Only products run in bfloat16. It has two or three digits, too few for the
                # softmax and the squares of the losses, which are float32
                with autocast():
                    both = parallel(images, report, config.mask_ratio)
                scaler.scale(sum(both) / passes).backward()  # equation 3
                losses += torch.stack(both).detach() / passes
                seen += rows.tolist()
            # A finite loss can have a gradient that is not, which would spoil every weight
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            check_finite(step + 1, paths, seen, scaler, loss=losses, gradient=norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            # Records that are never trained on show whether it learns or only memorises
            if (step + 1) % every == 0 or step + 1 == steps:
                mean_over_processes([losses])
                image_loss, report_loss = losses.tolist()
                line = {"step": step + 1, "image_loss": image_loss, "report_loss": report_loss}
                speed, heldout = batches.speed(), heldout_losses(model, records, config, autocast)
                log.line(**line, lr_of_step=lr, **speed, **heldout)
                draw_curves(log, "MRM pretraining", {
                    f"{loss} loss": [f"{loss}_loss", f"heldout_{loss}_loss"]
                    for loss in ("image", "report")})
                save(step + 1)
            saving.after(step + 1)


def read_start(config, typed_vocab_size):
    """What --weights starts a run from: (tensors, tokenizer or None to learn a new one, the images
    that the weights were trained on). A report decoder knows words by the numbers of its run's
    tokenizer: it comes with the tokenizer.tiktoken beside it, and --vocab-size is refused."""
    tensors, held = read_weights(config.weights)
    trained_on = held.get("trained_on", [])
    if "report_decoder.bias" not in tensors or config.image_only:
        return tensors, None, trained_on
    path = checkpoint_file(config.weights, "last.pt").with_name("tokenizer.tiktoken")
    if not path.exists():
        raise InputError(path, "the tokenizer of the report decoder in --weights", "none")
    if typed_vocab_size is not None:
        raise InputError(f"--vocab-size with --weights {config.weights}",
                         f"none, because the vocabulary of {path} is taken over", typed_vocab_size)
    tokenizer = load_tokenizer(path)
    print(f"{path}: the vocabulary of {tokenizer.n_vocab} tokens is taken over")
    return tensors, tokenizer, trained_on


# --------------------------------------------------------------------------------------------------
# A picture of what a model restores

VISIBLE, RIGHT, WRONG = "#888888", "#118833", "#cc2222"  # words that were shown, guessed, missed


@torch.no_grad()
def draw_restored(model, paths, reports, tokenizer, config, count=6):
    """Draws OUT/reconstruction.png of the first `count` of these records: the image, what the
    encoder sees of it, what the decoder restores; below it the report, where hidden words are green
    if the model guesses them and red if not."""
    device = model.cls_token.device
    images = data.ImageSet(paths[:count], 2 * model.img_size, white=config.white)
    images = images[range(len(images)), 0][0].to(device)
    generator, model = torch.Generator().manual_seed(0), model.eval()
    pictures, latent = restored_pictures(model, images, config, generator)
    for _, masked, _ in pictures:  # white lines between the patches
        masked[:, :: 2 * model.patch_size] = masked[:, :, :: 2 * model.patch_size] = 1.0
    captions = None
    if tokenizer:
        length = model.report_decoder.position_embed.num_embeddings
        tokens, word_of = encode_reports(tokenizer, reports[:count], length)
        report = mask_report(tokenizer, tokens, word_of, config.word_ratio, generator)
        tokens, hidden = report[0], report[2]
        logits = model.report_decoder(latent[:, 1:], *(part.to(device) for part in report[1:]))
        guesses = tokens.masked_scatter(hidden, logits.argmax(-1).cpu())
        if hidden.any():
            right = (guesses == tokens)[hidden].float().mean()
            print(f"{100 * right:.1f} % of the hidden tokens of {len(images)} reports are guessed")
        captions = [coloured_words(tokenizer, *row) for row in
                    zip(tokens, guesses, hidden, word_of[:, : tokens.shape[1]])]
    path = Path(config.out) / "reconstruction.png"
    save_grid(path, pictures, ["image", "visible patches", "restored"], captions, scale=2)
    print(path)


def restored_pictures(model, images, config, generator=None):
    """Rows (image, its visible patches, restored) of images (B, C, H, W) in [0, 1], and the latent.
    The model predicts standardised patches. Here each prediction takes the mean and deviation of
    its true patch, so the picture looks better than the prediction is."""
    grey_mean, grey_std = data.statistics(images, config.mean, config.std)
    images = data.normalize(images, config.mean, config.std)
    noise = torch.rand(len(images), model.pos_embed.shape[1] - 1, generator=generator)
    latent, mask, ids_restore = model.encode(half_size(images), config.mask_ratio,
                                             noise.to(images.device))
    side, hidden = 2 * model.patch_size, mask[..., None].bool()  # (B, N, 1)
    patches = patchify(images, side)
    _, mean, std = standardize_patches(patches)
    prediction = model.decode_image(latent, ids_restore).float() * std + mean
    masked = torch.where(hidden, patches.mean(), patches)
    restored = torch.where(hidden, prediction, patches)
    columns = [images, unpatchify(masked, side), unpatchify(restored, side)]
    columns = [(column * grey_std + grey_mean).clamp(0, 1).cpu() for column in columns]
    return list(zip(*columns)), latent


def coloured_words(tokenizer, tokens, guesses, hidden, word_of):
    """The words of a report (L,) as (text, colour). Each hidden word is guessed by itself, so that
    the guesses beside each other need make no sentence."""
    words = []
    for word in range(int(word_of.max()) + 1):
        here = word_of == word
        colour = RIGHT if torch.equal(tokens[here], guesses[here]) else WRONG
        words.append((tokenizer.decode(tokens[here].tolist()),
                      colour if hidden[here].any() else VISIBLE))
    return words


def reconstruct(config):
    """Draws reconstruction.png again for the run `config.weights`, on the records that it held out
    or on those of --root."""
    if not config.weights:
        raise InputError("--reconstruct needs --weights RUN, the folder of a run of this script, "
                         "such as runs/mrm-demo, which python finetune.py --lora leaves")
    tensors, held = read_weights(config.weights)
    if not {"arguments", "config"} <= held.keys() or "decoder_pred.weight" not in tensors:
        raise InputError(config.weights, "an MRM checkpoint of this script", "no decoders")
    ran = RECORDS | held["config"]  # the options of that run say which records it held out
    if config.holdout and config.holdout > ran["holdout"]:
        most = f"at most the run's {ran['holdout']}; it was trained on the others"
        raise InputError("--holdout", most, config.holdout)
    taken = {name: ran[name] for name in (*RECORDS, "mask_ratio", "word_ratio", "mean", "std")}
    folder = checkpoint_file(config.weights, "last.pt").parent
    config = fill(config, taken | {"out": str(folder)})
    config = dataclasses.replace(config, image_only=ran["image_only"])
    print(f"{config.weights}: records of {config.root or config.data}")
    device, _, _ = join(config)
    model = MRM(**held["arguments"]).to(device)
    model.load_state_dict(tensors)
    paths, reports = (part[-config.holdout :] for part in read_records(config))
    tokenizer = None if config.image_only else load_tokenizer(folder / "tokenizer.tiktoken")
    draw_restored(model, paths, reports, tokenizer, config)


def main():
    config = parse_config(MRMConfig, description=__doc__)
    if config.reconstruct:
        reconstruct(config)
    else:
        pretrain(config)


if __name__ == "__main__":
    run_script(main)
