"""MRM, masked record modeling: a ViT learns radiographs from hidden image patches and hidden report words.

    python mrm.py                                   # pretrain the tiny preset on the demo records
    python mrm.py --data csv --root DIR --preset base        # the paper's ViT-B/16 on DIR/training.csv
    python mrm.py --reconstruct --weights runs/mrm  # picture: original, masked input, restored, report
    torchrun --nproc_per_node=2 mrm.py ...          # several GPUs

Paper: Zhou et al., "Advancing Radiograph Representation Learning with Masked Record Modeling", ICLR 2023.

Where this file departs from the paper or its official code, and why:
 1. The sin-cos frequencies are 10000^(-i / (D/4)), from 1 down to 1e-4; the official code divides twice and stops at
    0.1. Weights carry their own `pos_embed`, so published ones load and work all the same.
 2. The report loss counts hidden tokens alone (the paper's equation 2); the official code counts every position,
    visible words and padding included.
 3. Images are never flipped: their reports say left and right.
 4. Words are byte pairs trained on the reports at hand instead of BERT's 30,000 pieces; a word is still hidden whole.
 5. The vocabulary head runs on hidden tokens only: the same loss, half of the largest multiplication saved.
 6. The last few records (`holdout`) are never trained on; log.jsonl and --reconstruct show the losses and words there.
 7. The report decoder is pre-norm and normalises the image's vector first. The official post-norm BERT, with its
    unnormalised vector, needs many more steps before its words, and through them the encoder, heed the image. Its
    blocks are the ViT's: dropout acts on what a branch adds, not on attention weights too.
 8. The tiny preset alone: each image is standardised by itself, 1/8 of patches and 90 % of words are hidden. Its ViT has
    16 patches, and a demo report's visible words give many hidden ones away without a look at the image.

Shapes: B batch, N patches, V visible patches, D width, p patch side in pixels, C channels, L report tokens.
"""
import dataclasses
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import InputError, RunConfig, option

# ---------------------------------------------------------------------------------------------------------------------
# Patches and positions


def patchify(images, p):
    """(B, C, H, W) -> (B, N, p*p*C), row by row; within a patch: row, column, channel, as in MAE."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(patches, p, channels=1):
    """The inverse of `patchify` for square images: (B, N, p*p*C) -> (B, C, H, W)."""
    B, N, _ = patches.shape
    side = math.isqrt(N)
    x = patches.reshape(B, side, side, p, p, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, channels, side * p, side * p)


def sincos_positions(dim, side, cls_token=True):
    """Fixed 2-D sin-cos positions (1, [1 +] side*side, dim): a quarter each sin x, cos x, sin y, cos y, as in MAE."""
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width divisible by 4, found {dim}")
    frequency = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # (D/4,)
    place = torch.arange(side, dtype=torch.float64)
    y, x = torch.meshgrid(place, place, indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (x, y)]  # 2 of (N, D/4)
    positions = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()
    if cls_token:
        positions = torch.cat([torch.zeros(1, dim), positions])
    return positions.unsqueeze(0)


# ---------------------------------------------------------------------------------------------------------------------
# The vision transformer, under timm's names


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, mask=None):
        """x (B, N, D); mask (B, 1, 1, N) bool: which tokens are attended to (None: all)."""
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # 3 of (B, heads, N, D/heads)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. `drop_path`: the probability of skipping a branch for a sample (Huang et al., 2016);
    `dropout`: of zeroing a number of a branch."""

    def __init__(self, dim, num_heads, drop_path=0.0, dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path, self.dropout = drop_path, dropout

    def branch(self, x):
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * torch.empty(len(x), 1, 1, dtype=x.dtype, device=x.device).bernoulli_(keep) / keep

    def forward(self, x, mask=None):
        x = x + self.branch(self.attn(self.norm1(x), mask))
        return x + self.branch(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, images):
        """(B, C, H, W) -> (B, N, D). One matrix product: a convolution whose stride is its kernel, faster on a CPU."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, p*p*C), as `patchify` orders a patch
        return F.linear(patchify(images, self.proj.kernel_size[0]), weight, self.proj.bias)


class ViT(nn.Module):
    """Vision transformer with timm's state-dict keys (Dosovitskiy et al., 2021; LayerNorm eps 1e-6).

    With `num_classes` > 0: tokens -> mean over patches -> fc_norm -> head, logits (B, num_classes); without, `norm` on
    every token. Square images of `img_size` pixels. Raises ValueError where the sizes do not divide.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=1, embed_dim=768, depth=12, num_heads=12, num_classes=0,
                 drop_path=0.0):
        super().__init__()
        if img_size % patch_size or embed_dim % num_heads:
            raise ValueError(f"img_size {img_size} must be a multiple of patch_size {patch_size}, and embed_dim "
                             f"{embed_dim} of num_heads {num_heads}")
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, img_size // patch_size))
        rates = torch.linspace(0, drop_path, depth).tolist()  # deeper blocks are skipped more often
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate) for rate in rates)
        if num_classes:
            self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6)
            self.head = nn.Linear(embed_dim, num_classes)
        else:
            self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.view(embed_dim, -1))

    def tokens(self, images):
        """(B, C, H, W) -> (B, 1 + N, D) after all blocks, before the last norm."""
        expected = (self.in_chans, self.img_size, self.img_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(f"expected images of shape (B, {', '.join(map(str, expected))}), found {tuple(images.shape)}")
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return x

    def features(self, images):
        """(B, C, H, W) -> (B, D): the mean over patch tokens, normalised. What the head, or a linear probe, sees."""
        return self.fc_norm(self.tokens(images)[:, 1:].mean(1))

    def forward(self, images):
        if hasattr(self, "head"):
            return self.head(self.features(images))
        return self.norm(self.tokens(images))


def init_weights(module):
    """Xavier-uniform linear layers with zero bias, as MAE and MRM initialise them."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------------------------------------
# Masked record modeling


class ReportDecoder(nn.Module):
    """Fills the hidden words of a report in, given the image: a small BERT (paper section 3.2), pre-norm.

    The image enters as one normalised vector added to every token embedding. The vocabulary head shares the embedding's
    weights.
    """

    def __init__(self, vocab_size, image_dim, dim=384, depth=6, num_heads=6, max_length=100, dropout=0.1):
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
        nn.init.normal_(self.image_embed.weight, std=0.02)  # BERT's; a larger image vector would drown the words
        for embedding in (self.token_embed, self.position_embed):
            nn.init.normal_(embedding.weight, std=dim**-0.5)

    def forward(self, image_tokens, inputs, hidden, padding):
        """image_tokens (B, V, D), inputs (B, L) token ids, hidden and padding (B, L) bool -> logits (hidden.sum(), vocab)."""
        image = self.image_embed(self.image_norm(image_tokens.mean(1, keepdim=True)))  # (B, 1, dim)
        x = self.dropout(self.token_embed(inputs) + self.position_embed.weight[: inputs.shape[1]] + image)
        for block in self.blocks:
            x = block(x, ~padding[:, None, None, :])
        return F.linear(self.norm(x[hidden]), self.token_embed.weight, self.bias)


def normalised(patches):
    """Patches (..., P) with mean 0 and variance 1 each (MAE's `norm_pix_loss`), their mean and deviation (..., 1)."""
    mean = patches.mean(-1, keepdim=True)
    centred = patches - mean
    std = (centred.square().sum(-1, keepdim=True) / (patches.shape[-1] - 1) + 1e-6).sqrt()
    return centred / std, mean, std


def half_size(images):
    """(B, C, 2H, 2W) -> (B, C, H, W): what the encoder sees of the images that the decoder restores."""
    return F.interpolate(images, scale_factor=0.5, mode="bicubic", antialias=True)


class MRM(ViT):
    """Encoder, image decoder and report decoder. The encoder's keys are the ViT's own, at the top level.

    The encoder sees images of `img_size` pixels with patches of `patch_size`; the image decoder restores them at twice
    that resolution. `vocab_size` 0 leaves the report decoder out.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=1, embed_dim=768, depth=12, num_heads=12, decoder_dim=768,
                 decoder_depth=4, decoder_heads=6, vocab_size=0, report_dim=384, report_depth=6, report_heads=6,
                 report_length=100, report_dropout=0.1):
        super().__init__(img_size, patch_size, in_chans, embed_dim, depth, num_heads)
        self.pos_embed.requires_grad_(False)  # fixed sin-cos
        self.decoder_embed = nn.Linear(embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder_dim, img_size // patch_size), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, (2 * patch_size) ** 2 * in_chans)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            part.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)
        if vocab_size:
            self.report_decoder = ReportDecoder(vocab_size, embed_dim, report_dim, report_depth, report_heads,
                                                report_length, report_dropout)

    def encode(self, images, mask_ratio, noise=None):
        """Encodes a random subset of patches (MAE's masking).

        images (B, C, H, W); noise (B, N): the patches with the lowest noise stay visible (drawn if None).
        Returns latent (B, 1 + V, D), mask (B, N) with 1 = hidden, ids_restore (B, N) for `decode_image`.
        """
        x = self.patch_embed(images) + self.pos_embed[:, 1:]  # (B, N, D)
        B, N, D = x.shape
        visible = int(N * (1 - mask_ratio))
        if noise is None:
            noise = torch.rand(B, N, device=x.device)
        ids_shuffle = noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        x = x.gather(1, ids_shuffle[:, :visible, None].expand(-1, -1, D))
        mask = (ids_restore >= visible).float()
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1)
        x = torch.cat([cls, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore

    def decode_image(self, latent, ids_restore):
        """latent (B, 1 + V, D) -> predicted patches (B, N, (2p)^2 C) at twice the encoder's resolution."""
        x = self.decoder_embed(latent)
        B, N = ids_restore.shape
        hidden = self.mask_token.expand(B, N + 1 - x.shape[1], -1).to(x.dtype)
        patches = torch.cat([x[:, 1:], hidden], dim=1)
        patches = patches.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[2]))  # back in image order
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, 1:]))

    def image_loss(self, target_images, prediction, mask):
        """Mean squared error on hidden patches (paper equation 1): sum_n mask_n mean((pred_n - target_n)^2) / sum mask.

        target_images (B, C, 2H, 2W), prediction (B, N, (2p)^2 C), mask (B, N).
        """
        hidden = mask.bool()
        target, _, _ = normalised(patchify(target_images, 2 * self.patch_size)[hidden])
        return (prediction[hidden].float() - target).square().mean()

    def forward(self, images, report=None, image=True, mask_ratio=0.75, noise=None):
        """The two losses of a batch of records (paper equation 3 adds them 1:1).

        images (B, C, 2H, 2W), encoded at half that size. report: (tokens, inputs, hidden, padding), each (B, L): the
        true ids, the ids with hidden words replaced by the mask token, which are hidden, which are beyond the end.
        Returns (image loss, report loss); 0 for a part left out.
        """
        latent, mask, ids_restore = self.encode(half_size(images), mask_ratio, noise)
        image_loss = report_loss = latent.new_zeros(())
        if image:
            image_loss = self.image_loss(images, self.decode_image(latent, ids_restore), mask)
        if report is not None:
            tokens, inputs, hidden, padding = report
            logits = self.report_decoder(latent[:, 1:], inputs, hidden, padding)
            # -1/|hidden| sum over hidden words of log p(word | visible words, visible patches)
            report_loss = F.cross_entropy(logits.float(), tokens[hidden])
        return image_loss, report_loss


# ---------------------------------------------------------------------------------------------------------------------
# Loading weights


def load_encoder(model, state, source):
    """Loads a ViT or MRM state dict into `model` (ViT or MRM) as far as it fits, and prints what happened.

    Three-channel patch embeddings become one-channel by summing over input channels (exact for grey repeated three
    times); `pos_embed` is resized where the grid differs. Raises InputError, naming `source`, where the encoder does
    not fit: another width, depth or patch size.
    """
    own = model.state_dict()
    state = dict(state)
    kernel = state.get("patch_embed.proj.weight")
    if kernel is not None and kernel.shape[1] == 3 and own["patch_embed.proj.weight"].shape[1] == 1:
        state["patch_embed.proj.weight"] = kernel.sum(1, keepdim=True)
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in state and name in own and state[name].shape[2] == own[name].shape[2]:
            state[name] = resize_positions(state[name], own[name].shape[1])
    encoder = [name for name in own if name.split(".")[0] in ("cls_token", "pos_embed", "patch_embed", "blocks")]
    for name in encoder:
        plain = name.replace(".lora_A", "").replace(".lora_B", "")
        if plain == name and (name not in state or state[name].shape != own[name].shape):
            found = f"shape {tuple(state[name].shape)}" if name in state else "no such tensor"
            raise InputError(f"{source}: the encoder does not fit: {name} is {tuple(own[name].shape)} in the model, "
                             f"the file has {found}")
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    if len(blocks) > len(model.blocks):
        raise InputError(f"{source}: the encoder does not fit: {len(model.blocks)} blocks in the model, {len(blocks)} in the file")
    fits = {name: tensor for name, tensor in state.items() if name in own and tensor.shape == own[name].shape}
    model.load_state_dict(fits, strict=False)
    new, left = sorted(own.keys() - fits.keys()), sorted(state.keys() - fits.keys())
    print(f"{source}: {len(fits)} tensors loaded, {len(new)} new{shorten(new)}, {len(left)} left{shorten(left)}")


def shorten(names):
    tops = list(dict.fromkeys(name.split(".")[0] for name in names))
    return f" ({', '.join(tops)})" if names else ""


def resize_positions(positions, length):
    """(1, 1 + n*n, D) -> (1, length, D) with length = 1 + m*m, bicubic over the grid; the class token's stays."""
    if positions.shape[1] == length:
        return positions
    n, m = math.isqrt(positions.shape[1] - 1), math.isqrt(length - 1)
    grid = positions[:, 1:].reshape(1, n, n, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(m, m), mode="bicubic", antialias=True)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining

MEAN, STD = 0.4978, 0.2449  # of MIMIC-CXR, the official code's
NARROW = 256  # a training step in bfloat16 on a CPU (Zen 4): at width 128 1.4 times slower, at 256 even, at 768 1.7 times faster
BASE = dict(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, decoder_dim=768, decoder_depth=4,
            decoder_heads=6, report_dim=384, report_depth=6, report_heads=6, report_length=100)
PRESETS = {  # the model; the recipe
    "tiny": (dict(img_size=48, patch_size=12, embed_dim=128, depth=1, num_heads=4, decoder_dim=32, decoder_depth=1,
                  decoder_heads=2, report_dim=64, report_depth=1, report_heads=2, report_length=40, report_dropout=0.0),
             dict(vocab_size=800, steps=4800, epochs=0, warmup=0.02, batch_size=32, base_lr=1.6e-2, min_crop=0.85,
                  mask_ratio=0.125, word_ratio=0.9, mean=None, std=None)),
    "small": (BASE | dict(embed_dim=384, num_heads=6, decoder_dim=384, report_depth=4),
              dict(vocab_size=8000, steps=0, epochs=200, warmup=0.2, batch_size=256, base_lr=1.5e-4, min_crop=0.2, mask_ratio=0.75,
                   word_ratio=0.5, mean=MEAN, std=STD)),
    "base": (BASE,
             dict(vocab_size=30000, steps=0, epochs=200, warmup=0.2, batch_size=256, base_lr=1.5e-4, min_crop=0.2, mask_ratio=0.75,
                  word_ratio=0.5, mean=MEAN, std=STD)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MRMConfig(RunConfig):
    data: str = option("demo", "demo records, or csv: a training.csv with image_path,report_content", choices=["demo", "csv"])
    root: str = option("", "data folder (demo: where the demo records are, or are drawn)")
    exclude: str = option("", "list file whose images, and other images of their patients, are left out of pretraining")
    preset: str = option("tiny", "model and recipe: tiny (the demo), small, base (the paper's ViT-B/16)", choices=list(PRESETS))
    weights: str = option("", "start from this checkpoint's encoder (the paper starts from MAE's)")
    image_only: bool = option(False, "ablation: restore images only")
    report_only: bool = option(False, "ablation: restore reports only")
    mask_ratio: float = option(0.0, "share of image patches hidden (0: the preset's; 0.75 in the paper)")
    word_ratio: float = option(0.0, "share of report words hidden (0: the preset's; 0.5 in the paper)")
    steps: int = option(0, "optimiser steps (0: the preset's)")
    epochs: float = option(0, "passes over the records, instead of --steps")
    batch_size: int = option(0, "records a step and process (0: the preset's)")
    accumulate: int = option(1, "forward and backward passes a step")
    base_lr: float = option(0, "learning rate at an effective batch of 256 (0: the preset's)")
    holdout: int = option(64, "last records, never trained on, for the losses in the log and --reconstruct")
    reconstruct: bool = option(False, "write a picture of what --weights restores on held-out records, and stop")


def read_records(config):
    """The records of `config.root`/training.csv less the excluded: (image paths, reports)."""
    root = data.demo_root(config.root) if config.data == "demo" else Path(config.root)
    paths, reports = data.read_reports(root / "training.csv", root)
    if config.exclude:
        keep = data.not_excluded(paths, config.exclude, root)
        paths, reports = [paths[i] for i in keep], [reports[i] for i in keep]
        print(f"{len(keep)} records are left after excluding the images and patients of {config.exclude}")
    if len(paths) < 2 * config.holdout:
        raise InputError(f"{root / 'training.csv'}: expected at least {2 * config.holdout} records for --holdout "
                         f"{config.holdout}, found {len(paths)}")
    return paths, reports


def hide(tokenizer, tokens, words, ratio, generator=None):
    """One draw of hidden words: (tokens, inputs, hidden, padding), trimmed to the longest report of the batch."""
    length = int((words >= 0).sum(1).max())
    tokens, words = tokens[:, :length], words[:, :length]
    inputs, hidden = data.hide_words(tokenizer, tokens, words, ratio, generator)
    return tokens, inputs, hidden, words < 0


@torch.no_grad()
def evaluate(model, tokenizer, images, tokens, words, config, autocast, device):
    """Losses on held-out records with a fixed draw of hidden patches and words."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(len(images), model.pos_embed.shape[1] - 1, generator=generator).to(device)
    report = None
    if not config.image_only:
        report = [part.to(device) for part in hide(tokenizer, tokens, words, config.word_ratio, generator)]
    with autocast():
        image_loss, report_loss = model(images, report, not config.report_only, config.mask_ratio, noise)
    model.train()
    return {"heldout_image_loss": image_loss.item(), "heldout_report_loss": report_loss.item()}


def pretrain(config):
    """Trains an MRM as `config` says and leaves last.pt, tokenizer.tiktoken, log.jsonl, result.json and pictures in
    `config.out`. Returns the result. Raises InputError for data, weights or folders that cannot be used."""
    sizes, recipe = PRESETS[config.preset]
    config = dataclasses.replace(config, mask_ratio=config.mask_ratio or recipe["mask_ratio"],
                                 word_ratio=config.word_ratio or recipe["word_ratio"])
    mean, std = recipe["mean"], recipe["std"]
    out = Path(config.out or "runs/mrm")
    if config.image_only and config.report_only:
        raise InputError("--image-only and --report-only exclude each other")
    if not 0 < config.word_ratio <= 1:
        raise InputError(f"--word-ratio {config.word_ratio:g}: expected a share above 0 and up to 1")
    patches = (sizes["img_size"] // sizes["patch_size"]) ** 2
    if not 1 <= int(patches * (1 - config.mask_ratio)) < patches:
        raise InputError(f"--mask-ratio {config.mask_ratio:g}: expected a share that leaves 1 to {patches - 1} of {patches} "
                         "patches visible")
    start_time = time.time()
    device, autocast, rank, world = data.start_run(config, sizes["embed_dim"] < NARROW)
    if rank == 0:
        data.check_writable(out)
    paths, reports = read_records(config)
    saved = data.load_checkpoint(out / "last.pt") if config.resume else None

    # Records: every token of every report in memory, images as `ImageSet` caches them
    train = len(paths) - config.holdout
    if saved:
        tokenizer = data.load_tokenizer(out / "tokenizer.tiktoken")
    else:
        tokenizer = data.train_tokenizer(reports[:train], recipe["vocab_size"])
    tokens, words = data.encode_reports(tokenizer, reports, sizes["report_length"])
    side = 2 * sizes["img_size"]
    crop = (recipe["min_crop"], 1.0)

    def augment(images, generator):
        return data.random_resized_crop(images, side, crop, generator=generator)

    batch_size = config.batch_size or recipe["batch_size"]
    image_set = data.ImageSet(paths[:train], side, augment, config.seed)
    image_set.preload()
    heldout = torch.stack([image for image, _ in data.ImageSet(paths[train:], side)]).to(device)
    heldout = data.normalize(heldout, mean, std)

    # Model and optimiser: AdamW, no weight decay on biases, norms and tokens
    arguments = sizes | dict(vocab_size=0 if config.image_only else tokenizer.n_vocab)
    model = MRM(**arguments).to(device)
    if config.weights and not saved:
        load_encoder(model, weights_of(config.weights)[0], config.weights)
    log = data.RunLog(out, config, rank, config.resume, start_time)
    if rank == 0 and not saved:
        data.save_tokenizer(tokenizer, out / "tokenizer.tiktoken")
    effective = batch_size * config.accumulate * world
    epochs = config.epochs or (0 if config.steps else recipe["epochs"])
    steps = round(epochs * train / effective) if epochs else config.steps or recipe["steps"]
    peak = (config.base_lr or recipe["base_lr"]) * effective / 256
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1 and p.shape[:-1] != (1, 1)]
    other = [p for p in model.parameters() if p.requires_grad and not (p.ndim > 1 and p.shape[:-1] != (1, 1))]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=device.type != "mps")
    step = 0
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        data.set_random_state(saved["random"])
        step = saved["step"]
    parallel = model
    if world > 1:
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=config.report_only)
    else:
        print(f"MRM {config.preset}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {train} "
              f"records, {steps} steps of {effective}, {device}")

    def save(step):
        if rank == 0:
            state = {"model": model.state_dict(), "arguments": arguments, "mean": mean, "std": std, "step": step,
                     "mask_ratio": config.mask_ratio, "word_ratio": config.word_ratio,
                     "optimizer": optimizer.state_dict(), "random": data.random_state()}
            data.save_checkpoint(out / "last.pt", state)

    batches = iter(data.train_batches(image_set, batch_size, step * config.accumulate, steps * config.accumulate,
                                      config.seed, rank, world, config.workers))
    history, waited, began, first = [], 0.0, time.time(), step
    every = max(1, steps // 20)
    for step in tqdm(range(step, steps), initial=step, total=steps, desc="pretrain", disable=rank > 0):
        for group in optimizer.param_groups:
            group["lr"] = data.cosine_lr(step, steps, round(recipe["warmup"] * steps), peak)
        losses = torch.zeros(2, device=device)
        for _ in range(config.accumulate):
            moment = time.time()
            images, index = next(batches)
            waited += time.time() - moment
            images = data.normalize(images.to(device, non_blocking=True), mean, std)
            report = None
            if not config.image_only:
                report = [part.to(device) for part in hide(tokenizer, tokens[index], words[index], config.word_ratio)]
            with autocast():
                image_loss, report_loss = parallel(images, report, not config.report_only, config.mask_ratio)
            ((image_loss + report_loss) / config.accumulate).backward()
            losses += torch.stack([image_loss, report_loss]).detach().float() / config.accumulate
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0 or step + 1 == steps:
            image_loss, report_loss = losses.tolist()
            if not math.isfinite(image_loss + report_loss):
                raise InputError(f"step {step + 1}: the loss is not finite; lower --base-lr or use --dtype fp32")
            line = {"step": step + 1, "image_loss": image_loss, "report_loss": report_loss,
                    "lr": optimizer.param_groups[0]["lr"],
                    "images_per_second": (step + 1 - first) * effective / (time.time() - began)}
            line |= evaluate(model, tokenizer, heldout, tokens[train:], words[train:], config, autocast, device)
            history.append(line)
            log.line(**line)
            save(step + 1)
    seconds = time.time() - began
    result = {"preset": config.preset, "steps": steps, "records": train, "parameters": sum(p.numel() for p in model.parameters()),
              "images_per_second": (steps - first) * effective / seconds, "share_waiting_for_data": waited / seconds,
              "peak_memory_mib": data.peak_memory_mib(device), "seconds": time.time() - log.start} | history[-1]
    log.json("result.json", result)
    if rank == 0:
        xs = [line["step"] for line in history]
        names = ("image_loss", "heldout_image_loss", "report_loss", "heldout_report_loss")
        data.save_plot(out / "curves.png", {name: (xs, [line[name] for line in history]) for name in names},
                       "MRM pretraining", "step", "loss")
        print(f"held-out losses: image {result['heldout_image_loss']:.3f}, report {result['heldout_report_loss']:.3f}; "
              f"{result['images_per_second']:.0f} images/s, {100 * result['share_waiting_for_data']:.0f} % of the time "
              f"waiting for data; {out / 'last.pt'}")
    return result


ENCODER = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")


def encoder_sizes(state, saved, source, num_heads=0):
    """The ViT arguments that a state dict asks for. Heads are in no tensor: from the file, the option, or width / 64.

    Raises InputError, naming `source`, where the tensors are not a ViT's.
    """
    if "sizes" in saved or "arguments" in saved:
        return {name: value for name, value in saved.get("sizes", saved.get("arguments")).items() if name in ENCODER}
    try:
        dim, _, patch, _ = state["patch_embed.proj.weight"].shape
        side = math.isqrt(state["pos_embed"].shape[1] - 1) * patch
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    except (KeyError, ValueError, AttributeError):
        raise InputError(f"{source}: expected a ViT's tensors (patch_embed.proj.weight, pos_embed, blocks.*), found "
                         f"{', '.join(sorted(state)[:4]) or 'none'}") from None
    return dict(img_size=side, patch_size=patch, embed_dim=dim, depth=depth, num_heads=num_heads or max(1, dim // 64))


def weights_of(path):
    """The checkpoint of a run's folder, or a file: (its state dict, the whole file's dict)."""
    state = data.load_checkpoint(data.checkpoint_file(path, "best.pt", "last.pt"))
    return state.get("model", state), state


# ---------------------------------------------------------------------------------------------------------------------
# Looking at it


@torch.no_grad()
def reconstruct(config, count=6):
    """Writes OUT/reconstruction.png from held-out records: original, masked input, restored image, and the report with
    its hidden words and the model's guesses. Raises InputError where --weights is no MRM checkpoint."""
    run = Path(config.weights or "runs/mrm")
    state, saved = weights_of(run)
    if "arguments" not in saved or "decoder_pred.weight" not in state:
        raise InputError(f"{run}: expected an MRM checkpoint of this script, found one without the decoders")
    folder = run if run.is_dir() else run.parent
    device, autocast, _, _ = data.start_run(config)
    model = MRM(**saved["arguments"]).to(device).eval()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{run}: the weights do not fit this version's MRM: {' '.join(str(error).split())[:200]}") from None
    paths, reports = read_records(config)
    paths, reports = paths[-config.holdout:][:count], reports[-config.holdout:][:count]
    images = torch.stack([image for image, _ in data.ImageSet(paths, 2 * model.img_size)]).to(device)
    grey_mean, grey_std = data.statistics(images, saved["mean"], saved["std"])
    images = data.normalize(images, grey_mean, grey_std)
    latent, mask, ids_restore = model.encode(half_size(images), config.mask_ratio or saved["mask_ratio"])

    # Restored: hidden patches as predicted, visible ones as they are, at the target's own mean and deviation
    patch = 2 * model.patch_size
    patches, unseen = patchify(images, patch), mask[..., None]
    _, mean, std = normalised(patches)
    prediction = model.decode_image(latent, ids_restore).float() * std + mean
    grey = torch.full_like(patches, patches.mean())
    pictures = [images, unpatchify(patches * (1 - unseen) + grey * unseen, patch),
                unpatchify(patches * (1 - unseen) + prediction * unseen, patch)]
    pictures = [(picture * grey_std + grey_mean).clamp(0, 1).cpu() for picture in pictures]

    captions = [""] * count
    if hasattr(model, "report_decoder"):
        tokenizer = data.load_tokenizer(folder / "tokenizer.tiktoken")
        tokens, words = data.encode_reports(tokenizer, reports, saved["arguments"]["report_length"])
        tokens, inputs, hidden, padding = report = hide(tokenizer, tokens, words, config.word_ratio or saved["word_ratio"])
        guesses = tokens.clone()
        guesses[hidden] = model.report_decoder(latent[:, 1:], *(part.to(device) for part in report[1:])).argmax(-1).cpu()
        right = (guesses == tokens)[hidden].float().mean().item()
        print(f"{100 * right:.1f} % of the hidden tokens are guessed right")
        captions = [caption(tokenizer, *row) for row in zip(tokens, guesses, hidden, padding)]
    out = Path(config.out or folder)
    data.save_grid(out / "reconstruction.png", list(zip(*pictures)), ["original", "masked input", "restored"], captions, scale=2)
    print(out / "reconstruction.png")


def caption(tokenizer, tokens, guesses, hidden, padding):
    """The report in one line; a run of hidden tokens as [truth > guess], or [truth] where the guess is right."""
    text, start, length = "", 0, int((~padding).sum())
    while start < length:
        end = start
        while end < length and hidden[end] == hidden[start]:
            end += 1
        truth, guess = tokenizer.decode(tokens[start:end].tolist()), tokenizer.decode(guesses[start:end].tolist())
        if hidden[start]:
            truth = f" [{truth.strip()}]" if truth == guess else f" [{truth.strip()} > {guess.strip()}]"
        text, start = text + truth, end
    return text.strip()


def main():
    config = data.parse_config(MRMConfig, description=__doc__)
    reconstruct(config) if config.reconstruct else pretrain(config)


if __name__ == "__main__":
    data.run_script(main)
