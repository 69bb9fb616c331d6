"""MRM, masked record modeling: a ViT learns from radiographs and reports of which parts are hidden.

Paper: Zhou et al., "Advancing Radiograph Representation Learning with Masked Record Modeling",
ICLR 2023.

    python mrm.py                                        # pretrains the tiny preset on demo records
    python mrm.py --data csv --root DIR --preset base    # the paper's ViT-B/16 on DIR/training.csv
    python mrm.py --reconstruct --weights runs/mrm       # a picture of what it restores
    python mrm.py --attention --weights runs/mrm         # a picture of where it looks
    torchrun --nproc_per_node=2 mrm.py ...               # several GPUs

A record is a film and its report; nobody has to label it. The encoder sees a part of the film. From
what it makes of that, one decoder restores the rest of the film, and another guesses the words that
are hidden in the report. Fine-tuning keeps the encoder alone.

    film, 2H x 2W ----------------------> its N patches of 2p x 2p pixels
      |                                                        |
      | half the size                                    (1) image loss
      v                                                        |
    film, H x W                       +--> IMAGE DECODER --> N patches of 2p x 2p pixels
      |                               |
      | N patches of p x p pixels     |
      v                               |
    V of them, visible --> ENCODER --> latent, 1 + V tokens
                                      |
                                      | mean of the V tokens, one vector
                                      v
    report with hidden words --> REPORT DECODER --> the hidden words -- (2) report loss

The image decoder works at twice the encoder's resolution: the latent has to hold finer detail than
the encoder was shown, at a quarter of the patches that showing it would take. The report decoder
gets one vector, so that what the words need must stand in the mean of the patches. A classifier's
head sees such a mean later, over all patches. Both leave the class token out, to which the image
decoder may attend; it is there because MAE's and timm's weights have it. Both losses weigh 1, as in
the paper.

    (1) image loss  = sum_n mask_n mean((prediction_n - target_n)^2) / sum_n mask_n
    (2) report loss = -1/|hidden| sum over hidden tokens t of log p(t | visible words, patches)
    (3) loss        = image loss + report loss

mask_n is 1 for a hidden patch n, whose target_n is its pixels with mean 0 and variance 1.

A batch of the tiny preset (base: 448 pixels, 196 patches of which 49 are visible, width 768):

    encoder         films (32, 1, 96, 96) -> half the size (32, 1, 48, 48)
                    -> 16 patches (32, 16, 128) -> 14 visible (32, 14, 128)
                    -> class token first (32, 15, 128) -> 1 block -> latent (32, 15, 128)
    image decoder   latent -> (32, 15, 32) -> with 2 mask tokens (32, 17, 32) -> 1 block
                    -> (32, 16, 576), 16 patches of 24 x 24 pixels
    report decoder  mean of 14 tokens (32, 1, 128) -> (32, 1, 64), added to the L <= 40 tokens of
                    each report (32, L, 64) -> 1 block -> (hidden tokens, 438): the demo's reports
                    make 438 tokens of the 800 that are allowed

Where this file departs from the paper or its official code, and why:
 1. The sin-cos frequencies go from 1 down to 1e-4, as in MAE. The official code divides twice and
    stops at 0.1. Published weights work, because they carry their own `pos_embed`.
 2. The report loss counts hidden tokens alone, as equation 2 has it. The official code counts
    visible words and padding too. So the vocabulary head runs on hidden tokens only, which saves
    half of the largest product.
 3. Images are never flipped, because their reports say left and right.
 4. Tokens are byte pairs trained on the reports at hand instead of BERT's word pieces. A word is
    still hidden whole.
 5. The last few records (`holdout`) are never trained on; losses and pictures show them.
 6. The report decoder is pre-norm and normalises the image's vector before it adds it to the
    words. The official post-norm BERT needs many more steps before its guesses depend on the
    image. Dropout acts on what a branch adds, not on attention weights too.
 7. In the presets tiny and mini each image is standardised by itself. In tiny alone, 1/8 of the
    patches and 90 % of the words are hidden: its ViT has 16 patches, and the visible words of a
    demo report would give many hidden ones away without a look at the image.

Shapes: B batch, N patches, V visible patches, D width, p pixels a side of a patch, C channels, L
tokens of a report. Before this file comes lora.py, after it finetune.py. data.py and common.py need
not be read: their functions say by their names what they do (`hide_words` draws the hidden words).
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import re
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import common
import data
from common import InputError, RunConfig, option

# --------------------------------------------------------------------------------------------------
# Patches and positions


def patchify(images, p):
    """(B, C, H, W) -> (B, N, p*p*C), patches row by row; in a patch: row, column, channel (MAE)."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // p, p, W // p, p)  # (B, C, rows, p, columns, p)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, rows, columns, p, p, C)
    return x.reshape(B, (H // p) * (W // p), p * p * C)  # (B, N, p*p*C)


def unpatchify(patches, p, channels=1):
    """The inverse of `patchify` for square images: (B, N, p*p*C) -> (B, C, H, W)."""
    B, N, _ = patches.shape
    side = math.isqrt(N)
    x = patches.reshape(B, side, side, p, p, channels)  # (B, rows, columns, p, p, C)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, rows, p, columns, p)
    return x.reshape(B, channels, side * p, side * p)  # (B, C, H, W)


def sincos_positions(dim, side):
    """Fixed 2-D sin-cos positions (1, 1 + side*side, dim), the class token's (zero) first.
    Four quarters of `dim` hold sin x, cos x, sin y and cos y at falling frequencies, as in MAE."""
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width divisible by 4, found {dim}")
    frequency = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # (D/4,)
    place = torch.arange(side, dtype=torch.float64)
    y, x = torch.meshgrid(place, place, indexing="ij")
    x, y = x.reshape(-1, 1) * frequency, y.reshape(-1, 1) * frequency  # angles (N, D/4)
    patches = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()  # (N, D)
    return torch.cat([torch.zeros(1, dim), patches]).unsqueeze(0)


# --------------------------------------------------------------------------------------------------
# The vision transformer (Dosovitskiy et al., 2021), under timm's names


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q k^T / sqrt(D / heads)) v in each head, then `proj`."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x):
        """(B, N, D) -> q, k and v, each (B, heads, N, D/heads)."""
        B, N, _ = x.shape
        return self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)

    def forward(self, x, mask=None):
        """x (B, N, D); mask (B, 1, 1, N) bool: which tokens are attended to (None: all)."""
        q, k, v = self.heads(x)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))  # heads side by side again: (B, N, D)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, on each token by itself."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)). In training a
    sample skips a branch with the probability `drop_path` (Huang et al., 2016), and a number of a
    branch becomes zero with the probability `dropout`."""

    def __init__(self, dim, num_heads, drop_path=0.0, dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path, self.dropout = drop_path, dropout

    def drop(self, x):
        """A branch's output x (B, N, D) after dropout and drop path. Its expectation is x."""
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        kept = torch.empty(len(x), 1, 1, dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * kept / keep

    def forward(self, x, mask=None):
        x = x + self.drop(self.attn(self.norm1(x), mask))
        return x + self.drop(self.mlp(self.norm2(x)))


def checkpoint_blocks(model):
    """Lets each transformer block of `model` keep its input alone, and run again in the backward
    pass (Chen et al., 2016): less memory for one more forward pass. Dropout and drop path draw the
    same numbers again, so that losses and gradients stay as they are. Returns the model."""
    for block in model.modules():
        if isinstance(block, Block):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return model


class PatchEmbed(nn.Module):
    """A linear map of each patch. Its weight has a convolution's shape, as in timm."""

    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, images):
        """(B, C, H, W) -> (B, N, D), as one matrix product, which a CPU does faster."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, p*p*C), as `patchify` has it
        return F.linear(patchify(images, self.proj.kernel_size[0]), weight, self.proj.bias)


def init_weights(module):
    """Xavier-uniform linear layers with zero bias, as MAE and MRM initialise them."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class ViT(nn.Module):
    """Vision transformer for square images of `img_size` pixels.
    With `num_classes` it returns logits (B, num_classes): head(fc_norm(mean of patch tokens)). With
    `pool` > 1 the means of pool x pool regions stand side by side instead, so that the head knows
    where something is. Without classes it returns norm(tokens) (B, 1 + N, D). Raises ValueError for
    sizes that do not divide."""

    def __init__(self, img_size=224, patch_size=16, in_chans=1, embed_dim=768, depth=12,
                 num_heads=12, num_classes=0, drop_path=0.0, pool=1):
        super().__init__()
        if img_size % patch_size or embed_dim % num_heads:
            raise ValueError(f"img_size {img_size} must be a multiple of patch_size {patch_size}, "
                             f"and embed_dim {embed_dim} of num_heads {num_heads}")
        side = img_size // patch_size
        if side % pool:
            raise ValueError(f"pool {pool} must divide the {side} patches a side")
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.pool = pool
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, side))
        rates = torch.linspace(0, drop_path, depth).tolist()  # deeper blocks are skipped more often
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate) for rate in rates)
        if num_classes:
            self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6)
            self.head = nn.Linear(pool**2 * embed_dim, num_classes)
        else:
            self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.view(embed_dim, -1))

    def embed(self, images):
        """(B, C, H, W) -> (B, N, D): embedded patches with their positions, without class token."""
        expected = (self.in_chans, self.img_size, self.img_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(f"expected images (B, *{expected}), found {tuple(images.shape)}")
        return self.patch_embed(images) + self.pos_embed[:, 1:]

    def add_class_token(self, x):
        """(B, n, D) -> (B, 1 + n, D): the class token, with its position, comes first."""
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)  # (B, 1, D)
        return torch.cat([cls, x], dim=1)

    def run_blocks(self, x):
        """(B, n, D) -> (B, 1 + n, D): puts the class token first and runs every block."""
        x = self.add_class_token(x)
        for block in self.blocks:
            x = block(x)
        return x

    def tokens(self, images):
        """(B, C, H, W) -> (B, 1 + N, D) after all blocks, before the last norm."""
        return self.run_blocks(self.embed(images))

    def pool_patches(self, x):
        """Patch tokens (B, N, D) -> (B, pool * pool * D): the normalised mean of each region."""
        if self.pool == 1:
            return self.fc_norm(x.mean(1))
        side = math.isqrt(x.shape[1])
        grid = x.transpose(1, 2).unflatten(2, (side, side))  # (B, D, side, side)
        regions = F.adaptive_avg_pool2d(grid, self.pool).flatten(2).transpose(1, 2)
        return self.fc_norm(regions).flatten(1)  # from (B, pool * pool, D)

    def forward(self, images):
        tokens = self.tokens(images)
        if hasattr(self, "head"):
            return self.head(self.pool_patches(tokens[:, 1:]))
        return self.norm(tokens)


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
        # BERT's small weights: the vector of the image must not drown those of the words
        nn.init.normal_(self.image_embed.weight, std=0.02)
        for embedding in (self.token_embed, self.position_embed):
            nn.init.normal_(embedding.weight, std=dim**-0.5)

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
        (B, 1 + V, D), mask (B, N) with 1 = hidden, and ids_restore (B, N)."""
        # 1. Positions are added before the patches change their places
        x = self.embed(images)  # (B, N, D)
        B, N, D = x.shape
        visible = int(N * (1 - mask_ratio))
        # 2. Every patch draws a number. Sorting them shuffles the patches: ids_shuffle[k] is the
        #    patch at place k
        if noise is None:
            noise = torch.rand(B, N, device=x.device)
        ids_shuffle = noise.argsort(dim=1)  # (B, N)
        # 3. Sorting the permutation inverts it: ids_restore[n] is the place of patch n
        ids_restore = ids_shuffle.argsort(dim=1)  # (B, N)
        # 4. The encoder runs on the first V places alone, which makes it cheap
        kept = ids_shuffle[:, :visible, None].expand(-1, -1, D)  # (B, V, D)
        latent = self.norm(self.run_blocks(x.gather(1, kept)))  # (B, 1 + V, D)
        # 5. A patch is hidden where its place lies behind the V that were kept
        mask = (ids_restore >= visible).float()  # (B, N)
        return latent, mask, ids_restore

    def decode_image(self, latent, ids_restore):
        """latent (B, 1 + V, D) -> patches (B, N, (2p)^2 C) at twice the encoder's resolution."""
        x = self.decoder_embed(latent)  # (B, 1 + V, d), d the decoder's width
        B, N = ids_restore.shape
        # Every hidden patch enters as the same learned token, which only its position tells apart
        hidden = self.mask_token.expand(B, N + 1 - x.shape[1], -1).to(x.dtype)
        patches = torch.cat([x[:, 1:], hidden], dim=1)  # (B, N, d) in shuffled order
        patches = patches.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[2]))  # in order
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed  # (B, 1 + N, d)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, 1:]))

    def image_loss(self, images, prediction, mask):
        """Equation 1: sum_n mask_n mean((prediction_n - target_n)^2) / sum_n mask_n.
        The targets are the patches of images (B, C, 2H, 2W); prediction (B, N, (2p)^2 C)."""
        hidden = mask.bool()
        target, _, _ = standardize_patches(patchify(images, 2 * self.patch_size)[hidden])
        return (prediction[hidden].float() - target).square().mean()

    def report_loss(self, latent, tokens, inputs, hidden, padding):
        """Equation 2: -1/|hidden| sum over hidden tokens t of log p(t | visible words, patches).
        A record without a report, which is padding alone, has no part in it."""
        rows = ~padding.all(1)  # (B,)
        if not rows.any():  # several processes wait until each parameter has a gradient: here 0
            rows[0], padding = True, torch.zeros_like(padding)
        logits = self.report_decoder(latent[rows, 1:], inputs[rows], hidden[rows], padding[rows])
        if len(logits) == 0:
            return logits.float().sum()
        return F.cross_entropy(logits.float(), tokens[hidden])

    def forward(self, images, report=None, image=True, mask_ratio=0.75, noise=None):
        """The two losses of a batch of records, of images (B, C, 2H, 2W) and reports.
        report is (tokens, inputs, hidden, padding), each (B, L): the true ids, the ids with the
        mask token at hidden words, and as bools the hidden tokens and those beyond the end. Without
        `image` or `report` that part is left out, and its loss is 0."""
        latent, mask, ids_restore = self.encode(half_size(images), mask_ratio, noise)
        image_loss = report_loss = latent.new_zeros(())
        if image:
            image_loss = self.image_loss(images, self.decode_image(latent, ids_restore), mask)
        if report is not None:
            report_loss = self.report_loss(latent, *report)
        return image_loss, report_loss


# --------------------------------------------------------------------------------------------------
# Options and presets

MEAN, STD = 0.4978, 0.2449  # of MIMIC-CXR's pixels in [0, 1], from the official code
# Below this width a CPU trains faster in float32 than in bfloat16 (Zen 4: at width 128 1.4 times
# faster, at 256 the same, at 768 1.7 times slower)
NARROW = 256
SOURCE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # changes when this file does

BASE = dict(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, decoder_dim=768,
            decoder_depth=4, decoder_heads=6, report_dim=384, report_depth=6, report_heads=6,
            report_length=100)
MODELS = {
    "tiny": dict(img_size=48, patch_size=12, embed_dim=128, depth=1, num_heads=4, decoder_dim=32,
                 decoder_depth=1, decoder_heads=2, report_dim=64, report_depth=1, report_heads=2,
                 report_length=40, report_dropout=0.0),
    "mini": dict(img_size=64, patch_size=8, embed_dim=192, depth=4, num_heads=3, decoder_dim=96,
                 decoder_depth=1, decoder_heads=3, report_dim=96, report_depth=1, report_heads=3,
                 report_length=60, report_dropout=0.0),
    "small": BASE | dict(embed_dim=384, num_heads=6, decoder_dim=384, report_depth=4),
    "base": BASE,
}
PAPER = dict(epochs=200, warmup=0.2, batch_size=256, base_lr=1.5e-4, min_crop=0.2, mask_ratio=0.75,
             word_ratio=0.5, mean=MEAN, std=STD)
PRESETS = {  # the values of the options that the user does not type
    "tiny": dict(steps=4800, warmup=0.02, batch_size=32, base_lr=1.6e-2, min_crop=0.85,
                 mask_ratio=0.125, word_ratio=0.9, mean=None, std=None, vocab_size=800),
    "mini": dict(steps=6000, warmup=0.05, batch_size=64, base_lr=4e-3, min_crop=0.4,
                 mask_ratio=0.75, word_ratio=0.5, mean=None, std=None, vocab_size=1500),
    "small": PAPER | dict(vocab_size=8000),
    "base": PAPER | dict(vocab_size=30000),
}
RECORDS = dict(data="demo", root="", exclude="", holdout=64)  # the records of a new run


@dataclasses.dataclass(frozen=True, kw_only=True)
class MRMConfig(RunConfig):
    data: str = option(None, "demo records, or csv: a training.csv with columns image_path and "
                       "report_content (default: demo; for --reconstruct the run's)",
                       choices=["demo", "csv"])
    root: str = option(None, "data folder (demo: where the demo records are, or are drawn)")
    exclude: str = option(None, "list file: its images and those of its patients are left out")
    cache: str = option("", "folder that keeps the decoded images (8 bits) for the next run",
                        free=True)
    skip_bad: bool = option(False, "leave out images that cannot be read, with a count")
    allow_outside: bool = option(False, "read images that the table names outside of --root")
    preset: str = option("tiny", "model and recipe; base is the paper's", choices=list(MODELS))
    weights: str = option("", "start from this checkpoint's encoder (the paper starts from MAE's); "
                          "from a run of this script also from its decoders and its vocabulary")
    image_only: bool = option(False, "ablation: restore images only")
    report_only: bool = option(False, "ablation: restore reports only")
    mask_ratio: float = option(None, "share of image patches hidden", within="(0, 1)")
    word_ratio: float = option(None, "share of report words hidden", within="(0, 1]")
    vocab_size: int = option(None, "tokens of the reports' vocabulary", within="[259, inf)")
    min_crop: float = option(None, "smallest share of an image in a crop", within="(0, 1]")
    mean: float = option(None, "mean of the pixels in [0, 1] (tiny, mini: each image's)",
                         within="(-inf, inf)")
    std: float = option(None, "deviation of the pixels (tiny, mini: each's own)", within="(0, inf)")
    base_lr: float = option(None, "peak learning rate at a batch of 256, where --lr is "
                            "not given", within="(0, inf)")
    warmup: float = option(None, "share of the steps in which the rate rises", within="[0, 1]")
    weight_decay: float = option(0.05, "weight decay of AdamW", within="[0, inf)")
    accumulate: int = option(1, "forward and backward passes a step", within="[1, inf)")
    checkpoint_activations: bool = option(False, "blocks run again in the backward pass instead of "
                                          "keeping what they computed: less memory", free=True)
    holdout: int = option(None, "last records, never trained on, for the losses in the log and "
                          "--reconstruct (default: 64)", within="[1, inf)")
    reconstruct: bool = option(False, "draw what --weights restores, and stop", free=True)
    attention: bool = option(False, "draw where the encoder of --weights looks, and stop",
                             free=True)
    words: str = option("left,right,bilateral", "words of the reports that --attention asks about",
                        free=True)


def fill_options(config, world):
    """The configuration that runs: `config` with the preset's values and the peak learning rate.
    Raises InputError for options that contradict each other."""
    preset = PRESETS[config.preset]
    pixels = pixel_statistics(config, preset["mean"], preset["std"])
    config = common.fill(config, RECORDS | {"out": "runs/mrm"} | preset | pixels)
    common.share_of_batch(config, world)  # refuses a batch that cannot be shared evenly
    if config.lr is None:  # the linear scaling rule (Goyal et al., 2017)
        config = dataclasses.replace(config, lr=config.base_lr * config.batch_size / 256)
    else:
        config = dataclasses.replace(config, base_lr=None)
    if config.image_only and config.report_only:
        raise InputError("--image-only and --report-only exclude each other")
    sizes = MODELS[config.preset]
    patches = (sizes["img_size"] // sizes["patch_size"]) ** 2
    if not 1 <= int(patches * (1 - config.mask_ratio)) < patches:
        some = f"a share that leaves 1 to {patches - 1} of {patches} patches visible"
        raise InputError("--mask-ratio", some, config.mask_ratio)
    return config


def pixel_statistics(config, mean, std):
    """{"mean", "std"} for `common.fill`, None for each image's own. Where the user types only one
    of the two, the other is MIMIC-CXR's instead of each image's own."""
    if mean is None and (config.mean is not None or config.std is not None):
        mean, std = MEAN, STD
    return {"mean": mean, "std": std}


# --------------------------------------------------------------------------------------------------
# Records


def read_records(config):
    """The records of `config.root`/training.csv without the excluded: (image paths, reports).
    With --image-only the reports are empty, and the file needs no column of them."""
    root = data.demo_root(config.root) if config.data == "demo" else Path(config.root)
    listed = root / "training.csv"
    if config.image_only:
        names = [name for _, name in data.read_csv(listed, ("image_path",))]
        paths = data.find_images("csv", root, names, listed, config.allow_outside)
        reports = [""] * len(names)
    else:
        paths, reports = data.read_reports(listed, root, config.allow_outside)
    if config.skip_bad:
        keep = data.readable(paths)
        paths, reports = [paths[i] for i in keep], [reports[i] for i in keep]
    if config.exclude:
        keep = data.not_excluded(paths, config.exclude, root)
        paths, reports = [paths[i] for i in keep], [reports[i] for i in keep]
        print(f"{config.exclude}: {len(keep)} records are left without its images and patients")
    count = len(paths) - config.holdout
    if count < config.holdout:
        least = f"at least {2 * config.holdout} records for --holdout {config.holdout}"
        raise InputError(listed, least, len(paths))
    empty = reports.count("")
    if empty and not config.image_only:
        if not any(reports[:count]) or not any(reports[count:]):
            some = "a report among the held-out records and among the others (or --image-only)"
            raise InputError(listed, some, "none")
        kept = "records have no report, and count for the image loss alone"
        print(f"{listed}: {empty} of {len(reports)} {kept}")
    return paths, reports


@dataclasses.dataclass
class Records:
    """The images and encoded reports of a pretraining run."""

    images: data.ImageSet  # of the training records
    heldout: torch.Tensor  # images of the held-out records, normalised, on the device
    tokenizer: object
    tokens: torch.Tensor  # (n, L) of all reports, those of the held-out records last
    words: torch.Tensor  # (n, L): which word of its report a token belongs to

    def batches(self, config, step, steps, rank, world):
        """The batches (images, rows) of this process from step `step` on, timed."""
        share, passes = common.share_of_batch(config, world), config.accumulate
        first, last = step * passes, steps * passes
        device = self.heldout.device
        crop_on = device if device.type == "cuda" else None
        batches = data.train_batches(self.images, share, first, last, config.seed, rank, world,
                                     config.workers, crop_on=crop_on)
        return common.Timed(batches, device, world)

    def report_batch(self, rows, config, generator=None):
        """The reports `rows` as `MRM.forward` takes them, with newly drawn hidden words."""
        if config.image_only:
            return None
        tokens, words = self.tokens[rows], self.words[rows]
        report = mask_report(self.tokenizer, tokens, words, config.word_ratio, generator)
        return [part.to(self.heldout.device) for part in report]


def mask_report(tokenizer, tokens, words, ratio, generator=None):
    """Draws the hidden words of a batch and cuts it to its longest report.
    Returns [tokens, inputs, hidden, padding], as `MRM.forward` takes them."""
    length = max(1, int((words >= 0).sum(1).max()))
    tokens, words = tokens[:, :length], words[:, :length]
    inputs, hidden = data.hide_words(tokenizer, tokens, words, ratio, generator)
    return [tokens, inputs, hidden, words < 0]


def load_records(config, paths, reports, device, tokenizer=None):
    """`Records` of these paths and reports. Learns the tokenizer where none is given; a resumed
    run reads its own."""
    sizes, count = MODELS[config.preset], len(paths) - config.holdout
    tokens = words = None
    if not config.image_only:
        if config.resume:
            tokenizer = data.load_tokenizer(Path(config.out) / "tokenizer.tiktoken")
        elif tokenizer is None:
            tokenizer = data.train_tokenizer(reports[:count], config.vocab_size)
        tokens, words = data.encode_reports(tokenizer, reports, sizes["report_length"])
    side = kept = 2 * sizes["img_size"]
    if config.preset not in ("tiny", "mini"):  # these two are meant for small films, short runs
        # The paper crops the full film. Here a film keeps as many pixels as its smallest crop, of
        # area `min_crop` and aspect 3/4, needs to have `side` of its own across: 1,157 for 448
        kept = math.ceil(side / math.sqrt(config.min_crop * 3 / 4))
    crop = functools.partial(augment, side=side, min_crop=config.min_crop)
    white = data.common_scale(paths[:count], paths[count:])  # one scale for all records
    images = data.ImageSet(paths[:count], kept, crop, config.seed, white, enlarge=False,
                           folder=config.cache).preload()
    heldout = data.ImageSet(paths[count:], side, deep=white, folder=config.cache)
    heldout = torch.stack([image for image, _ in heldout]).to(device)
    heldout = data.normalize(heldout, config.mean, config.std)
    return Records(images, heldout, tokenizer, tokens, words)


def augment(images, generator, side, min_crop, flip=False, **crop):
    """Random crops (B, C, side, side) of at least the share `min_crop` of each image; `flip`
    mirrors half of them. `crop`: pair and mode of `data.random_resized_crop`. It is no local
    function, because worker processes find it by its name."""
    images = data.random_resized_crop(images, side, (min_crop, 1.0), generator=generator, **crop)
    return data.random_flip(images, generator) if flip else images


# --------------------------------------------------------------------------------------------------
# The optimiser and its learning rate


def decays(name, parameter):
    """Whether weight decay acts on a parameter: it does on weights of linear maps and embeddings,
    and not on biases, norms, positions, the class or mask token (MAE's fine-tuning)."""
    return parameter.ndim > 1 and name not in ("cls_token", "mask_token", "pos_embed")


def make_optimizer(model, config, device):
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


def autocast_for(config, model, device):
    """`common.autocast` for a ViT: on a CPU, --dtype auto takes bfloat16 for wide models alone."""
    return common.autocast(config, device, narrow=model.cls_token.shape[-1] < NARROW)


# --------------------------------------------------------------------------------------------------
# Pretraining


@torch.no_grad()
def evaluate(model, records, config, autocast):
    """The losses on the held-out records, with the same hidden patches and words every time."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(len(records.heldout), model.pos_embed.shape[1] - 1, generator=generator)
    noise = noise.to(records.heldout.device)  # (B, N)
    report = records.report_batch(slice(len(records.images), None), config, generator)
    image = not config.report_only
    with autocast():
        losses = model(records.heldout, report, image, config.mask_ratio, noise)
    model.train()
    return {"heldout_image_loss": losses[0].item(), "heldout_report_loss": losses[1].item()}


def pretrain(config):
    """Trains an MRM as `config` says and returns the content of result.json. Leaves config.json,
    last.pt, tokenizer.tiktoken, log.jsonl, result.json and curves.png in `config.out`."""
    start = time.time()
    device, rank, world = common.join(config)
    asked, config = config, fill_options(config, world)
    paths, reports = read_records(config)
    steps = common.number_of_steps(config, len(paths) - config.holdout, config.batch_size)
    facts = {  # a resumed run must have the same
        "records": hashlib.sha256(repr((paths, reports)).encode()).hexdigest(),
        "number_of_processes": world,
        "images_of_a_step": config.batch_size,
    }
    saved = common.last_state(config, steps, **facts)
    tensors, tokenizer, before = None, None, saved
    if not saved:
        tensors, tokenizer, before = read_start(config, asked.vocab_size)
    records = load_records(config, paths, reports, device, tokenizer)
    vocab_size = 0 if config.image_only else records.tokenizer.n_vocab
    arguments = MODELS[config.preset] | {"vocab_size": vocab_size}
    common.seed(config.seed)
    model = MRM(**arguments).to(device)
    if tensors is not None:
        load_encoder(model, tensors, config.weights)
    if config.checkpoint_activations:
        checkpoint_blocks(model)
    facts |= {"arguments": arguments, "steps": steps, "mask_ratio": config.mask_ratio,
              "word_ratio": config.word_ratio, "mean": config.mean, "std": config.std}
    # By these hashes fine-tuning knows whether it tests on films that were trained on here
    root = data.demo_root(config.root) if config.data == "demo" else config.root
    facts["trained_on"] = data.hash_films(root, records.images.paths, before.get("trained_on"))
    log = common.RunLog(config.out, config, rank, saved and saved["history"], start)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if rank == 0:
        sizes = f"{parameters / 1e6:.1f} M parameters, {len(records.images)} records"
        print(f"MRM {config.preset}: {sizes}, {steps} steps of {config.batch_size}, {device}")
        if records.tokenizer:
            data.save_tokenizer(records.tokenizer, log.out / "tokenizer.tiktoken")
    last = train(config, model, records, steps, saved, facts, log, world)
    result = {"preset": config.preset, "records": len(records.images), "parameters": parameters,
              "steps": steps, "batch_size": config.batch_size, **last, "lr": config.lr,
              "mrm.py": SOURCE, "seconds": time.time() - start}
    log.json("result.json", result)
    if rank == 0:
        image, report = result["heldout_image_loss"], result["heldout_report_loss"]
        speed, waiting = result["images_per_second"], 100 * result["share_waiting_for_data"]
        print(f"held-out losses: image {image:.3f}, report {report:.3f}; {speed:.0f} images/s, "
              f"{waiting:.0f} % of the time waiting for data; {log.out / 'last.pt'}")
    return result


def train(config, model, records, steps, saved, facts, log, world):
    """The training loop. Returns what the last evaluation measured."""
    device, passes, every = records.heldout.device, config.accumulate, max(1, steps // 20)
    paths = records.images.paths  # a list that takes milliseconds to make
    autocast, optimizer = autocast_for(config, model, device), make_optimizer(model, config, device)
    common.seed_rank(config.seed, log.rank)
    step, parallel, image = 0, model, not config.report_only
    if saved:
        step = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        common.restore_rank(saved, log.rank)
    if world > 1:  # without the image loss the image decoder gets no gradients
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=not image)
    batches = records.batches(config, step, steps, log.rank, world)

    def save(step):
        state = facts | {"model": model.state_dict(), "step": step}
        common.save_state(log, config, world, state | {"optimizer": optimizer.state_dict()})

    with common.Saving(save, world) as saving:
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
                # Only the multiplications run in bfloat16. The losses are float32, because
                # bfloat16's two or three digits would round away what one step gains
                with autocast():
                    image_loss, report_loss = parallel(images, report, image, config.mask_ratio)
                ((image_loss + report_loss) / passes).backward()  # equation 3
                losses += torch.stack([image_loss, report_loss]).detach() / passes
                seen += rows.tolist()
            # A finite loss can have a gradient that is not, which would spoil every weight
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            common.check_finite(step + 1, paths, seen, loss=losses, gradient=norm)
            optimizer.step()
            optimizer.zero_grad()
            # Films that are never trained on tell learning from knowing by heart
            if (step + 1) % every == 0 or step + 1 == steps:
                image_loss, report_loss = common.average(losses, world).tolist()
                line = {"step": step + 1, "image_loss": image_loss, "report_loss": report_loss}
                speed, heldout = batches.speed(), evaluate(model, records, config, autocast)
                log.line(**line, lr_of_step=lr, **speed, **heldout)
                log.curves("MRM pretraining", "image_loss", "heldout_image_loss", "report_loss",
                           "heldout_report_loss")
                save(step + 1)
            saving.after(step + 1)
    return log.history[-1]


# --------------------------------------------------------------------------------------------------
# Beyond the paper: weights of others

ENCODER_SIZES = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")
ENCODER_PARTS = ("cls_token", "pos_embed", "patch_embed", "blocks")  # how its tensors' names begin
HEADS = {128: 4, 192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # by width: tiny here, timm, MAE
# Parts of other ViTs that change the encoder's result: register and distillation tokens, a norm
# before the blocks, relative and rotary positions, SwiGLU. Decoders and old heads may be left out
FOREIGN = re.compile("reg_tok|register|storage_tok|dist_tok|distil|norm_pre|ln_pre|rel_pos|relative"
                     r"|rope|blocks\.\d+\.mlp\.(w12|weights_in|gate_proj|fc1_g)\.")
# Hugging Face's names of a ViT and of DINOv2, those of transformers 5 too, and ours
RENAMED = (("embeddings.patch_embeddings.projection", "patch_embed.proj"),
           ("embeddings.cls_token", "cls_token"), ("embeddings.position_embeddings", "pos_embed"),
           ("encoder.layer.", "blocks."), ("layers.", "blocks."),
           ("attention.attention.", "attn."), ("attention.q_proj", "attn.query"),
           ("attention.k_proj", "attn.key"), ("attention.v_proj", "attn.value"),
           ("attention.o_proj", "attn.proj"), ("attention.output.dense", "attn.proj"),
           ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"),
           ("layernorm_before", "norm1"), ("layernorm_after", "norm2"),
           ("layer_scale1.lambda1", "ls1.gamma"), ("layer_scale2.lambda1", "ls2.gamma"),
           ("layernorm", "norm"), ("embeddings.", ""))
NO_PLACE = "the encoder does not fit: the model has no place for"


def as_timm(tensors, source="weights"):
    """A ViT's tensors under timm's names, for this file's ViT. What does not fit stays as it is,
    and `load_encoder` refuses it by name. No file names the epsilon of LayerNorm, which is 1e-6
    here and 1e-12 in Hugging Face's ViT."""
    tensors = dict(tensors)
    if any("embeddings.patch_embeddings.projection" in name for name in tensors):
        for name in list(tensors):
            new = name
            for theirs, ours in RENAMED:
                new = new.replace(theirs, ours)
            if new != name and new in tensors:
                raise InputError(source, "one layout of a ViT", f"both {name} and {new}")
            tensors[new] = tensors.pop(name)
    for name in list(tensors):
        if re.search(r"\.attn\.query\.(weight|bias)$", name):  # q, k and v become one `qkv`
            parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            shapes = {tuple(tensors[part].shape) if part in tensors else () for part in parts}
            if len(shapes) == 1 and shapes != {()}:
                joined = torch.cat([tensors.pop(part) for part in parts])
                tensors[name.replace(".query.", ".qkv.")] = joined
        if re.search(r"\.ls[12]\.gamma$", name):
            # LayerScale multiplies what a branch adds by gamma (D,). The linear layer before it
            # does so too, exactly, once its rows are multiplied by gamma
            start = name.replace("ls1.gamma", "attn.proj.").replace("ls2.gamma", "mlp.fc2.")
            layer, gamma = (start + "weight", start + "bias"), tensors[name]
            if all(part in tensors and tensors[part].shape[:1] == gamma.shape for part in layer):
                gamma = tensors.pop(name).float()
                for part, factor in zip(layer, (gamma[:, None], gamma)):
                    tensors[part] = tensors[part].float() * factor
    return tensors


def read_weights(path):
    """Reads a checkpoint (a file or a run's folder): (its tensors by name, all that it holds).
    An entry such as `state_dict` is opened, and a prefix such as `module.` or `visual.trunk.` comes
    off the names; tensors without the encoder's prefix are left out."""
    path = common.checkpoint_file(path, "best.pt", "last.pt")
    saved = tensors = common.load_checkpoint(path)
    for name in ("model", "state_dict", "model_ema", "teacher", "module"):
        if isinstance(tensors.get(name), dict):
            tensors = tensors[name]
    tensors = {str(name): tensor for name, tensor in tensors.items() if torch.is_tensor(tensor)}
    tensors = as_timm(tensors, path)
    first = "patch_embed.proj.weight"
    prefixes = [name.removesuffix(first) for name in tensors if ("." + name).endswith("." + first)]
    if len(prefixes) > 1:
        raise InputError(path, "one encoder", f"several: {', '.join(map(repr, sorted(prefixes)))}")
    for prefix in prefixes:
        inside = [name for name in tensors if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): tensors[name] for name in inside}
    return tensors, saved


def tokenizer_path(weights):
    """The file of the tokenizer: in the folder of a run, or beside a checkpoint of it."""
    weights = Path(weights)
    return (weights if weights.is_dir() else weights.parent) / "tokenizer.tiktoken"


def read_start(config, vocab_size):
    """What --weights starts a run from: (tensors, tokenizer or None to learn a new one, all that
    the file holds). A report decoder knows words by the numbers that its run's tokenizer gives
    them. So it comes with the tokenizer.tiktoken beside it, and a typed `vocab_size` is refused."""
    if not config.weights:
        return None, None, {}
    tensors, saved = read_weights(config.weights)
    if "report_decoder.bias" not in tensors or config.image_only:
        return tensors, None, saved
    path = tokenizer_path(config.weights)
    if not path.exists():
        raise InputError(path, "the tokenizer of the report decoder in --weights", "none")
    if vocab_size is not None:
        none = f"none, because the vocabulary of {path} is taken over"
        raise InputError(f"--vocab-size with --weights {config.weights}", none, vocab_size)
    tokenizer = data.load_tokenizer(path)
    print(f"{path}: the vocabulary of {tokenizer.n_vocab} tokens is taken over")
    return tensors, tokenizer, saved


def encoder_sizes(tensors, saved, source, num_heads=None):
    """The arguments of a ViT for a checkpoint: those it names, else what its tensors' shapes say.
    The number of heads is in no shape: it is `num_heads`, or that of a well-known width."""
    for name in sorted(tensors or ()):
        if FOREIGN.match(name):
            raise InputError(f"{source}: {NO_PLACE} {name}, which changes its result")
    known = saved.get("sizes", saved.get("arguments"))
    if isinstance(known, dict):
        sizes = {name: known[name] for name in known if name in ENCODER_SIZES}
        whole = all(isinstance(value, int) and value > 0 for value in sizes.values())
        if not whole or not set(ENCODER_SIZES) - {"in_chans"} <= sizes.keys():
            raise InputError(source, f"whole numbers above 0 as {', '.join(ENCODER_SIZES)}", sizes)
        return sizes
    try:
        dim, _, patch, _ = tensors["patch_embed.proj.weight"].shape
        positions = tensors["pos_embed"]
        depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    except (KeyError, ValueError):
        expected = "a ViT's tensors (patch_embed.proj.weight, pos_embed, blocks.*)"
        raise InputError(source, expected, ", ".join(sorted(tensors)[:4]) or "none") from None
    heads = num_heads or HEADS.get(dim)
    if heads is None:
        unknown = "the number of attention heads cannot be read from weights of width"
        raise InputError(f"{source}: {unknown} {dim}; give it with --num-heads")
    side = grid_side(positions, source) * patch
    return dict(img_size=side, patch_size=patch, embed_dim=dim, depth=depth, num_heads=heads)


def grid_side(positions, source):
    """The side n of the patch grid of positions (1, 1 + n*n, D), the class token's first."""
    length = positions.shape[1] if positions.ndim == 3 else 0
    side = math.isqrt(max(0, length - 1))
    if side < 1 or length != 1 + side * side:
        expected = "positions (1, 1 + n*n, width), the class token's (or zeros) and a square grid's"
        raise InputError(f"{source}: pos_embed", expected, tuple(positions.shape))
    return side


def resize_positions(positions, length, source):
    """(1, 1 + n*n, D) -> (1, length = 1 + m*m, D), bicubic; the class token's stays as it is."""
    n, m = grid_side(positions, source), math.isqrt(length - 1)
    if n == m:
        return positions
    grid = positions[:, 1:].float().reshape(1, n, n, -1).permute(0, 3, 1, 2)  # (1, D, n, n)
    grid = F.interpolate(grid, size=(m, m), mode="bicubic", antialias=True)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def load_encoder(model, tensors, source):
    """Loads the tensors that fit into `model` (ViT or MRM), and prints how many did.

    A patch embedding of three channels is summed to one, which is exact for grey repeated three
    times. `pos_embed` is resized where the grid differs. A ViT leaves `norm`, because it has a new
    `fc_norm`. An encoder of another width, depth or patch size is refused by the tensor's name, and
    so are one that computes with more tensors and numbers that are not finite.
    """
    own, tensors = model.state_dict(), dict(tensors)
    for name in own.keys() & tensors.keys():
        if own[name].is_floating_point():  # all but the batches that a batch norm has counted
            tensor = tensors[name]
            if tensor.layout != torch.strided or not tensor.is_floating_point():
                raise InputError(f"{source}: {name}", "floating-point numbers", tensor.dtype)
            if not torch.isfinite(tensor.float()).all():
                raise InputError(f"{source}: {name}", "finite numbers", "NaN or infinity")
    kernel = tensors.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 4 and kernel.shape[1] == 3 and model.in_chans == 1:
        tensors["patch_embed.proj.weight"] = kernel.sum(1, keepdim=True)
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in tensors and name in own and tensors[name].shape[-1] == own[name].shape[2]:
            tensors[name] = resize_positions(tensors[name], own[name].shape[1], source)
    fits = {name: t for name, t in tensors.items() if name in own and t.shape == own[name].shape}
    new, left = own.keys() - fits.keys(), tensors.keys() - fits.keys()
    for name in sorted(new):
        if name.split(".")[0] in ENCODER_PARTS and "lora_" not in name:
            found = tuple(tensors[name].shape) if name in tensors else "no such tensor"
            where = f"{source}: the encoder does not fit: {name}"
            raise InputError(where, f"{tuple(own[name].shape)}, as the model has", found)
    for name in sorted(left):
        if name.split(".")[0] in ENCODER_PARTS or FOREIGN.match(name):
            depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
            blocks = f"{len(model.blocks)} blocks in the model, {depth} in the file"
            advice = "; see python lora.py import-medpeft" if "lora_" in name else ""
            result = f"which changes its result ({blocks}){advice}"
            raise InputError(f"{source}: {NO_PLACE} {name}, {result}")
    model.load_state_dict(fits, strict=False)
    counts = [f"{len(fits)} tensors loaded"]
    for word, names in (("new", new), ("left", left)):
        parts = ", ".join(sorted({name.split(".")[0] for name in names}))
        counts.append(f"{len(names)} {word}" + (f" ({parts})" if parts else ""))
    print(f"{source}: {', '.join(counts)}")


# --------------------------------------------------------------------------------------------------
# Segmentation, after the paper's experiment on SIIM: UPerNet on the ViT

POOLS = (1, 2, 3, 6)  # cells a side of the pyramid pooling


def make_norm(kind, channels):
    """Batch norm, as published, or group norm, which does not depend on the size of a batch."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    # A map of one cell needs several channels a group: one number less its mean is always 0
    return nn.GroupNorm(math.gcd(8, channels) if channels > 8 else 1, channels)


class ConvNorm(nn.Sequential):
    """A convolution that keeps the size of the map, then norm and ReLU."""

    def __init__(self, inputs, outputs, kernel, norm):
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        super().__init__(conv, make_norm(norm, outputs), nn.ReLU())


def resize_to(x, like):
    """A map x (B, C, h, w) at the size of the map `like`."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear")


class UPerHead(nn.Module):
    """The decoder of UPerNet (Xiao et al., 2018), on four maps of one resolution.
    The maps are rescaled x4, x2, x1 and x0.5. The coarsest one is pooled to 1, 2, 3 and 6 cells a
    side, and from there the pyramid is added up to the finest map. All four are fused at last."""

    def __init__(self, dim, channels, norm="batch"):
        super().__init__()
        twice = [nn.ConvTranspose2d(dim, dim, 2, stride=2) for _ in range(2)]
        self.up4 = nn.Sequential(twice[0], make_norm(norm, dim), nn.GELU(), twice[1])
        self.up2 = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.pooled = nn.ModuleList(ConvNorm(dim, channels, 1, norm) for _ in POOLS)
        self.top = ConvNorm(dim + len(POOLS) * channels, channels, 3, norm)
        self.lateral = nn.ModuleList(ConvNorm(dim, channels, 1, norm) for _ in range(3))
        self.smooth = nn.ModuleList(ConvNorm(channels, channels, 3, norm) for _ in range(3))
        self.fuse = ConvNorm(4 * channels, channels, 3, norm)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, 1, 1))
        few = math.ceil(channels / 3)  # 256 of 768, as published
        # A second head, on the third map, which acts in training alone
        conv = ConvNorm(dim, few, 3, norm)
        self.auxiliary = nn.Sequential(conv, nn.Dropout2d(0.1), nn.Conv2d(few, 1, 1))

    def forward(self, maps):
        """Four maps (B, D, n, n), shallow to deep -> [logits (B, 1, 4n, 4n)] and, in training, the
        auxiliary ones (B, 1, n, n)."""
        one, two, three, four = maps
        one, two, four = self.up4(one), self.up2(two), F.max_pool2d(four, 2, ceil_mode=True)
        pools = [resize_to(conv(F.adaptive_avg_pool2d(four, cells)), four)
                 for conv, cells in zip(self.pooled, POOLS)]
        x = self.top(torch.cat([four, *pools], dim=1))
        levels = [x]
        for lateral, smooth, fine in zip(self.lateral, self.smooth, (three, two, one)):
            fine = lateral(fine)
            x = fine + resize_to(x, fine)  # what is known of the coarser map comes down to this one
            levels.append(smooth(x))
        x = self.fuse(torch.cat([resize_to(level, levels[-1]) for level in levels], dim=1))
        return [self.classify(x)] + ([self.auxiliary(three)] if self.training else [])


class UPerNet(ViT):
    """ViT with UPerNet on the tokens after a third, a half, two thirds and all of its blocks.
    `channels` is the width of the head (the paper: 768); norm: batch or group."""

    def __init__(self, channels=768, norm="batch", **sizes):
        super().__init__(**sizes)
        del self.norm  # UPerNet takes the tokens as they leave the blocks
        depth = len(self.blocks)
        self.chosen = [math.ceil(depth * share) for share in (1 / 3, 1 / 2, 2 / 3, 1)]
        self.head = UPerHead(self.cls_token.shape[2], channels, norm)

    def forward(self, images):
        """(B, C, H, W) -> logits (B, 1, H, W) of each pixel. In training a second channel holds
        those of the auxiliary head."""
        side = self.img_size // self.patch_size
        x, after = self.add_class_token(self.embed(images)), []
        for block in self.blocks:
            x = block(x)  # (B, 1 + N, D)
            after.append(x)
        chosen = [after[number - 1][:, 1:] for number in self.chosen]  # each (B, N, D)
        logits = self.head([x.transpose(1, 2).unflatten(2, (side, side)) for x in chosen])
        return torch.cat([resize_to(each, images) for each in logits], dim=1)


# --------------------------------------------------------------------------------------------------
# Pictures of what a model restores, and of where it looks


def open_run(config, count):
    """The run `config.weights` and its first `count` held-out records: (config with that run's
    options, MRM, its checkpoint, images (B, C, 2H, 2W) in [0, 1], reports)."""
    if not config.weights:
        raise InputError("--reconstruct and --attention need --weights RUN, the folder of a run of "
                         "this script, such as the main job's runs/mrm-demo")
    run = Path(config.weights)
    tensors, saved = read_weights(run)
    if "arguments" not in saved or "decoder_pred.weight" not in tensors:
        raise InputError(run, "an MRM checkpoint of this script", "one without the decoders")
    ran = saved.get("config", {})  # the options of that run say which records it held out
    filled = {name: ran.get(name, RECORDS[name]) for name in RECORDS}
    if config.holdout and config.holdout > filled["holdout"]:
        most = f"at most the run's {filled['holdout']}; it was trained on the others"
        raise InputError("--holdout", most, config.holdout)
    filled |= {name: saved[name] for name in ("mask_ratio", "word_ratio")}
    filled |= pixel_statistics(config, saved["mean"], saved["std"])
    config = common.fill(config, filled | {"out": str(run if run.is_dir() else run.parent)})
    config = dataclasses.replace(config, image_only=ran.get("image_only", False))
    print(f"{run}: records of {config.root or config.data}")
    device, _, _ = common.join(config)
    common.seed(config.seed)
    model = MRM(**saved["arguments"]).to(device).eval()
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{run}: the weights do not fit this version's MRM: {reason}") from None
    paths, reports = read_records(config)
    white = data.common_scale(paths[: -config.holdout], paths[-config.holdout :])  # as in training
    paths, reports = paths[-config.holdout :][:count], reports[-config.holdout :][:count]
    images = data.ImageSet(paths, 2 * model.img_size, deep=white)
    images = torch.stack([image for image, _ in images]).to(device)
    return config, model, saved, images, reports


@torch.no_grad()
def reconstruct(config, count=6):
    """Draws OUT/reconstruction.png for held-out records: original, masked input, restored image,
    and the report with its hidden words and the model's guesses."""
    config, model, saved, images, reports = open_run(config, count)
    pictures, latent = restored_pictures(model, images, config)
    captions = [""] * len(images)
    if hasattr(model, "report_decoder"):
        tokenizer = data.load_tokenizer(tokenizer_path(config.weights))
        tokens, words = data.encode_reports(tokenizer, reports, saved["arguments"]["report_length"])
        tokens, *masked = mask_report(tokenizer, tokens, words, config.word_ratio)
        hidden = masked[1]
        logits = model.report_decoder(latent[:, 1:], *(part.to(images.device) for part in masked))
        guesses = tokens.clone()
        guesses[hidden] = logits.argmax(-1).cpu()
        right = (guesses == tokens)[hidden].float()
        if len(right):
            print(f"{100 * right.mean():.1f} % of the hidden tokens are guessed right")
        captions = [caption(tokenizer, *row) for row in zip(tokens, guesses, hidden, words)]
    out = Path(config.out) / "reconstruction.png"
    common.save_grid(out, pictures, ["original", "masked input", "restored"], captions, scale=2)
    print(out)


def restored_pictures(model, images, config):
    """Rows (original, masked input, restored) of images (B, C, H, W) in [0, 1], and the latent.
    The model predicts standardised patches, so that each prediction takes the mean and deviation of
    its true patch here, which flatters it."""
    grey_mean, grey_std = data.statistics(images, config.mean, config.std)
    images = data.normalize(images, config.mean, config.std)
    latent, mask, ids_restore = model.encode(half_size(images), config.mask_ratio)
    side, hidden = 2 * model.patch_size, mask[..., None].bool()  # (B, N, 1)
    patches = patchify(images, side)
    _, mean, std = standardize_patches(patches)
    prediction = model.decode_image(latent, ids_restore).float() * std + mean
    masked = torch.where(hidden, patches.mean(), patches)
    restored = torch.where(hidden, prediction, patches)
    columns = [images, unpatchify(masked, side), unpatchify(restored, side)]
    columns = [(column * grey_std + grey_mean).clamp(0, 1).cpu() for column in columns]
    return list(zip(*columns)), latent


def caption(tokenizer, tokens, guesses, hidden, words):
    """A report in one line, its hidden words as [truth > guess], or [truth] if guessed right. Each
    is guessed by itself, so that the guesses beside each other need make no sentence."""
    text, length = "", int((words >= 0).sum())
    for word, places in itertools.groupby(range(length), words.tolist().__getitem__):
        places = list(places)
        is_hidden = hidden[places[0]]
        truth, guess = (tokenizer.decode(ids[places].tolist()) for ids in (tokens, guesses))
        if not is_hidden:
            text += truth
        elif truth == guess:
            text += f" [{truth.strip()}]"
        else:
            text += f" [{truth.strip()} > {guess.strip()}]"
    return text.strip()


def overlay(films, values):
    """Films (B, 1, H, W) in [0, 1] -> (B, 3, H, W), with patches in red where their values (B, N)
    are above 0 and in blue where they are below."""
    side = math.isqrt(values.shape[1])
    values = values / values.abs().amax(1, keepdim=True).clamp(min=1e-9)  # (B, N) in [-1, 1]
    values = F.interpolate(values.view(-1, 1, side, side), size=films.shape[2:])  # (B, 1, H, W)
    colour = torch.cat([values > 0, values > 1, values < 0], dim=1).float()  # red, green, blue
    return films + 0.6 * values.abs() * (colour - films)


def draw_attention(config, count=6):
    """Draws OUT/attention.png for held-out films: where the class token of the last block looks,
    and which patches speak for (red) and against (blue) the words `config.words` of the report.

    The report decoder has no attention over patches, because it sees their mean. So the map of the
    words is gradient times token, <d log p(words) / d token_n, token_n>, with them hidden and as
    many others as in training. A side is the word that only the film gives away; the name of a
    finding often follows from the rest of its sentence. The caption compares log p with what it is
    by the patches of the next film: where they are alike, the map explains nothing. The class token
    has no task of its own in MRM, so that its look says less.
    """
    config = dataclasses.replace(config, device="cpu")  # some films alone
    config, model, saved, images, reports = open_run(config, None)
    if config.image_only:
        raise InputError(f"--attention --weights {config.out}", "a run with reports", "images only")
    tokenizer = data.load_tokenizer(tokenizer_path(config.weights))
    tokens, words = data.encode_reports(tokenizer, reports, saved["arguments"]["report_length"])
    hidden = torch.zeros_like(tokens, dtype=torch.bool)
    found, asked = set(), [word.strip() for word in config.words.lower().split(",")]
    for row, report in enumerate(reports):
        for number, word in enumerate(data.split_words(report)):
            if word.strip().lower() in asked:
                hidden[row] |= words[row] == number
                found.add(word.strip().lower())
    rows = hidden.any(1).nonzero().flatten()[:count]  # the first films whose reports have them
    if len(rows) == 0:
        raise InputError("--words", "words that a held-out report holds", config.words)
    for word in set(asked) - found:
        common.warn(f"--words: no held-out report holds {word!r} as one word")
    images, tokens, words, asked_for = images[rows], tokens[rows], words[rows], hidden[rows]
    _, hidden = data.hide_words(tokenizer, tokens, words, config.word_ratio)
    hidden |= asked_for
    inputs = tokens.masked_fill(hidden, tokenizer.encode_single_token("<mask>"))
    with torch.no_grad():
        films = half_size(data.normalize(images, config.mean, config.std))
        x, last = model.add_class_token(model.embed(films)), model.blocks[-1]
        for before in model.blocks[:-1]:
            x = before(x)
        q, k, _ = last.attn.heads(last.norm1(x))  # (B, heads, 1 + N, D/heads)
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(-1)
        looks = weights.mean(1)[:, 0, 1:]  # (B, N): from the class token, the mean over heads
        patches = model.norm(last(x))[:, 1:]  # (B, N, D)

    def log_p(patches):
        """(B,): log p of the words that are asked about, by the patches (B, N, D) of each film."""
        logits = model.report_decoder(patches, inputs, hidden, words < 0)
        each = -F.cross_entropy(logits, tokens[hidden], reduction="none")
        return (torch.zeros(tokens.shape).masked_scatter(hidden, each) * asked_for).sum(1)

    own, others = log_p(patches.requires_grad_()), log_p(patches.detach().roll(1, 0))
    (gradient,) = torch.autograd.grad(own.sum(), patches)
    speaks = (gradient * patches.detach()).sum(2)  # (B, N)
    captions = [f"{tokenizer.decode(ids[chosen].tolist()).strip()}: log p {mine:.1f}"
                + f", by the next film {other:.1f}" * (len(rows) > 1) for ids, chosen, mine, other
                in zip(tokens, asked_for, own.tolist(), others.tolist())]
    grid = list(zip(images, overlay(images, looks), overlay(images, speaks)))
    out = Path(config.out) / "attention.png"
    titles = ["film", "class token", "for (red), against (blue)"]
    common.save_grid(out, grid, titles, captions, scale=2)
    print(out)


def main():
    config = common.parse_config(MRMConfig, description=__doc__)
    if config.reconstruct:
        reconstruct(config)
    elif config.attention:
        draw_attention(config)
    else:
        pretrain(config)


if __name__ == "__main__":
    common.run_script(main)
