"""vit.py against a float64 loop in NumPy, a convolution and formulas."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rounding import assert_rounded, network_rounding
import vit

pytestmark = pytest.mark.numeric


def randomised(model, seed=0):
    """Away from initialisation, where zero biases and unit norms hide what is never computed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def timm_keys(depth, last):
    keys = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    for i in range(depth):
        for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            keys |= {f"blocks.{i}.{layer}.weight", f"blocks.{i}.{layer}.bias"}
    return keys | {f"{name}.{kind}" for name in last for kind in ("weight", "bias")}


def test_vit_keys_and_size_are_timms():
    model = vit.ViT(224, 16, 3, 768, 12, 12, num_classes=14)
    assert set(model.state_dict()) == timm_keys(12, ("fc_norm", "head"))
    assert set(vit.ViT(16, 4, 1, 24, 2, 3).state_dict()) == timm_keys(2, ("norm",))
    assert sum(p.numel() for p in model.parameters()) == 85_809_422  # as timm counts a ViT-B/16


@pytest.mark.parametrize("pool", [1, 2, 4])
def test_pooled_head_against_means_by_hand(pool):
    sizes = dict(img_size=32, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=3)
    model = vit.ViT(**sizes, pool=pool).eval()
    torch.nn.init.normal_(model.fc_norm.weight)
    images = torch.rand(2, 1, 32, 32)
    grid = model.tokens(images)[:, 1:].view(2, 4, 4, 8)  # row, column
    side, means = 4 // pool, []
    for y in range(pool):
        for x in range(pool):
            region = grid[:, y * side : (y + 1) * side, x * side : (x + 1) * side]
            means.append(model.fc_norm(region.mean((1, 2))))
    atol = network_rounding(model, lambda: model(images))
    torch.testing.assert_close(model(images), model.head(torch.cat(means, 1)), atol=atol, rtol=0)


def test_pool_must_divide_the_grid():
    with pytest.raises(ValueError, match="pool 3 must divide the 4 patches a side"):
        vit.ViT(img_size=32, patch_size=8, embed_dim=8, depth=1, num_heads=2, pool=3)


def layer_norm64(x, weight, bias):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6) * weight + bias


def vit64(state, image, patch, heads):
    """One image (H, W) through the ViT in float64 NumPy, patch by patch and head by head."""
    s = {k: v.double().numpy() for k, v in state.items()}
    H, W = image.shape
    kernel = s["patch_embed.proj.weight"].reshape(-1, patch * patch)
    tokens = [s["cls_token"][0, 0] + s["pos_embed"][0, 0]]
    for i in range(H // patch):
        for j in range(W // patch):
            pixels = image[i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].reshape(-1)
            patch_token = kernel @ pixels + s["patch_embed.proj.bias"]
            tokens.append(patch_token + s["pos_embed"][0, len(tokens)])
    x = np.stack(tokens)
    dim, size = x.shape[1], x.shape[1] // heads
    for i in range(sum(k.endswith("norm1.weight") for k in s)):
        b = {k[len(f"blocks.{i}.") :]: v for k, v in s.items() if k.startswith(f"blocks.{i}.")}
        y = layer_norm64(x, b["norm1.weight"], b["norm1.bias"])
        qkv = y @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]
        out = np.zeros_like(x)
        for h in range(heads):
            starts = (part * dim + h * size for part in range(3))
            q, k, v = (qkv[:, start : start + size] for start in starts)
            scores = np.exp(q @ k.T / math.sqrt(size))
            out[:, h * size : (h + 1) * size] = scores / scores.sum(1, keepdims=True) @ v
        x = x + out @ b["attn.proj.weight"].T + b["attn.proj.bias"]
        y = layer_norm64(x, b["norm2.weight"], b["norm2.bias"])
        hidden = y @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        x = x + hidden @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
    x = layer_norm64(x[1:].mean(0), s["fc_norm.weight"], s["fc_norm.bias"])
    return s["head.weight"] @ x + s["head.bias"]


def test_vit_forward_against_float64():
    torch.manual_seed(0)
    model = randomised(vit.ViT(16, 4, 1, 24, 2, 3, num_classes=5)).eval()
    images = torch.randn(2, 1, 16, 16)
    expected = [vit64(model.state_dict(), image[0].double().numpy(), 4, 3) for image in images]
    atol = network_rounding(model, lambda: model(images))
    np.testing.assert_allclose(model(images).detach().numpy(), expected, atol=atol, rtol=0)


def test_patchify_order_and_round_trip():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert vit.patchify(image, 2)[0].tolist() == expected
    images = torch.randn(3, 2, 12, 12)
    assert torch.equal(vit.unpatchify(vit.patchify(images, 4), 4, channels=2), images)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_patch_embedding_is_the_strided_convolution(in_chans):
    embed, images = vit.PatchEmbed(4, in_chans, 24), torch.randn(2, in_chans, 16, 12)
    weight, bias = embed.proj.weight, embed.proj.bias
    expected = F.conv2d(images, weight, bias, stride=4).flatten(2).transpose(1, 2)
    terms = F.conv2d(images.abs(), weight.abs(), bias.abs(), stride=4)
    assert_rounded(embed(images), expected, terms)


def test_sincos_positions_against_the_formula():
    table = vit.sincos_positions(16, 3)
    assert table.shape == (1, 10, 16) and not table[0, 0].any()
    y, x = 2, 1
    for i in range(4):
        frequency = 1 / 10000 ** (i / 4)
        expected = [wave(place * frequency) for place in (x, y) for wave in (math.sin, math.cos)]
        assert table[0, 1 + y * 3 + x, i::4].tolist() == pytest.approx(expected, abs=1e-6)


def test_drop_path_keeps_the_expectation():
    torch.manual_seed(0)
    block = vit.Block(8, 2, drop_path=0.4).train()
    x = torch.ones(20000, 1, 1)
    y = block.drop(x)
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert y.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(block.eval().drop(x), x)
