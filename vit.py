"""The vision transformer (ViT): it cuts an image into patches, which then look at each other.

    z = [class token, patches E] + positions                    N + 1 tokens of D numbers each
    z = z + attention(norm(z)),  z = z + mlp(norm(z))           in each block
    attention(x) = softmax(q k^T / sqrt(D / heads)) v           q, k and v: three linear maps of x
    logits = head(norm(mean of the patch tokens))

The class token belongs to no patch, only attention reads it. Tensors have timm's names, so that
weights of MRM, MAE (masked autoencoders), MED-PEFT (lora.py's paper) and timm load as they are.

One batch of the demo: X-rays (32, 1, 48, 48) -> 36 patches of 8 x 8 pixels (32, 36, 64) ->
(32, 36, 128) -> class token first (32, 37, 128) -> two blocks, in which q, k and v are
(32, 4, 37, 32) each -> (32, 37, 128) -> mean of the patch tokens (32, 128) -> 7 logits (32, 7)

Paper: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; sin-cos positions as in MAE.
Next: mrm.py. Shapes: B batch, N patches, n visible, D width, p pixels a side of one, C channels."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

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
    """2-D sin-cos positions (1, 1 + side*side, dim), the class token's (zero) first; fixed in
    mrm.py; finetune.py's full trains it. Four quarters of `dim` hold sin x, cos x, sin y, cos y."""
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width divisible by 4, found {dim}")
    frequency = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # (D/4,)
    place = torch.arange(side, dtype=torch.float64)
    y, x = torch.meshgrid(place, place, indexing="ij")
    x, y = x.reshape(-1, 1) * frequency, y.reshape(-1, 1) * frequency  # angles (N, D/4)
    patches = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()  # (N, D)
    return torch.cat([torch.zeros(1, dim), patches]).unsqueeze(0)


# --------------------------------------------------------------------------------------------------
# The vision transformer, under timm's names


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q k^T / sqrt(D / heads)) v in each head, then `proj`."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x):
        """(B, N, D) -> q, k and v in one tensor, (3, B, heads, N, D/heads)."""
        B, N, _ = x.shape
        return self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)

    def forward(self, x, attended=None):
        """x (B, N, D); attended (B, 1, 1, N) bool: tokens that are no padding (None: all)."""
        q, k, v = self.heads(x)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attended)
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
    sample skips a branch (attention or mlp) with the probability `drop_path` (Huang et al., 2016),
    and each number of a branch becomes zero with the probability `dropout`."""

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

    def forward(self, x, attended=None):
        x = x + self.drop(self.attn(self.norm1(x), attended))
        return x + self.drop(self.mlp(self.norm2(x)))


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
        self.pool = pool  # regions a side whose means the head sees
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
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
