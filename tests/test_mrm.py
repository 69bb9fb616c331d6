"""mrm.py against independent formulas: the ViT against a float64 loop, masking and losses against NumPy, learning."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import mrm

TINY = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, decoder_dim=16, decoder_depth=1,
            decoder_heads=2, report_dim=16, report_depth=1, report_heads=2, report_length=12, report_dropout=0.0)


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
    model = mrm.ViT(img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12, num_heads=12, num_classes=14)
    assert set(model.state_dict()) == timm_keys(12, ("fc_norm", "head"))
    assert set(mrm.ViT(16, 4, 1, 24, 2, 3).state_dict()) == timm_keys(2, ("norm",))
    assert sum(p.numel() for p in model.parameters()) == 85_809_422  # ViT-B/16 with 14 classes; timm counts the same


def test_paper_parameter_count():
    """'Less Could Be Better': rank 4 on q and v of a ViT-B with 14 classes trains 159,758 parameters."""
    import lora

    model = lora.add_lora(mrm.ViT(in_chans=3, num_classes=14), rank=4)
    assert lora.count_parameters(model)["trainable"] == 159_758


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
            tokens.append(kernel @ pixels + s["patch_embed.proj.bias"] + s["pos_embed"][0, len(tokens)])
    x = np.stack(tokens)
    dim = x.shape[1]
    size = dim // heads
    for i in range(sum(k.endswith("norm1.weight") for k in s)):
        b = {k[len(f"blocks.{i}.") :]: v for k, v in s.items() if k.startswith(f"blocks.{i}.")}
        qkv = layer_norm64(x, b["norm1.weight"], b["norm1.bias"]) @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]
        out = np.zeros_like(x)
        for h in range(heads):
            q, k, v = (qkv[:, part * dim + h * size : part * dim + (h + 1) * size] for part in range(3))
            scores = np.exp(q @ k.T / math.sqrt(size))
            out[:, h * size : (h + 1) * size] = scores / scores.sum(1, keepdims=True) @ v
        x = x + out @ b["attn.proj.weight"].T + b["attn.proj.bias"]
        hidden = layer_norm64(x, b["norm2.weight"], b["norm2.bias"]) @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        x = x + hidden @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
    x = layer_norm64(x[1:].mean(0), s["fc_norm.weight"], s["fc_norm.bias"])
    return s["head.weight"] @ x + s["head.bias"]


def test_vit_forward_against_float64():
    torch.manual_seed(0)
    model = randomised(mrm.ViT(16, 4, 1, 24, 2, 3, num_classes=5)).eval()
    images = torch.randn(2, 1, 16, 16)
    expected = [vit64(model.state_dict(), image[0].double().numpy(), 4, 3) for image in images]
    np.testing.assert_allclose(model(images).detach().numpy(), expected, atol=2e-5)


def test_patchify_order_and_round_trip():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert mrm.patchify(image, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    images = torch.randn(3, 2, 12, 12)
    assert torch.equal(mrm.unpatchify(mrm.patchify(images, 4), 4, channels=2), images)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_patch_embedding_is_the_strided_convolution(in_chans):
    embed, images = mrm.PatchEmbed(4, in_chans, 24), torch.randn(2, in_chans, 16, 12)
    expected = F.conv2d(images, embed.proj.weight, embed.proj.bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(images), expected)


def test_sincos_positions_against_the_formula():
    table = mrm.sincos_positions(16, 3)
    assert table.shape == (1, 10, 16) and not table[0, 0].any()
    y, x = 2, 1
    for i in range(4):
        frequency = 1 / 10000 ** (i / 4)
        expected = [math.sin(x * frequency), math.cos(x * frequency), math.sin(y * frequency), math.cos(y * frequency)]
        assert table[0, 1 + y * 3 + x, i::4].tolist() == pytest.approx(expected, abs=1e-6)


def test_masking_hides_the_noisiest_patches_and_ignores_their_pixels():
    torch.manual_seed(0)
    model = randomised(mrm.MRM(**TINY)).eval()
    images, noise = torch.randn(2, 1, 16, 16), torch.rand(2, 16)
    latent, mask, restore = model.encode(images, 0.75, noise)
    assert latent.shape == (2, 1 + 4, 24) and mask.sum(1).tolist() == [12, 12]
    for row, row_mask in zip(noise, mask):
        assert row[row_mask == 0].max() < row[row_mask == 1].min()
    patches = mrm.patchify(images, 4)
    patches[mask == 1] = 99.0
    again, _, _ = model.encode(mrm.unpatchify(patches, 4), 0.75, noise)
    assert torch.equal(latent, again)
    # with nothing hidden, encode is the plain ViT in a shuffled order: the class token is the same
    full, mask, restore = model.encode(images, 0.0, noise)
    whole = model.norm(model.tokens(images))
    torch.testing.assert_close(full[:, 0], whole[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(full[:, 1:].gather(1, restore[..., None].expand(-1, -1, 24)), whole[:, 1:], atol=1e-5, rtol=0)


def test_image_loss_is_the_formula_and_ignores_visible_patches():
    torch.manual_seed(0)
    model = mrm.MRM(**TINY)
    target, prediction = torch.randn(2, 1, 32, 32), torch.randn(2, 16, 64)
    mask = (torch.rand(2, 16) < 0.75).float()
    total = 0.0
    for b in range(2):
        for n in range(16):
            i, j = divmod(n, 4)
            pixels = target[b, 0, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].double().numpy().reshape(-1)
            pixels = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)
            total += mask[b, n].item() * ((prediction[b, n].double().numpy() - pixels) ** 2).mean()
    assert model.image_loss(target, prediction, mask).item() == pytest.approx(total / mask.sum().item(), rel=1e-5)
    prediction[mask == 0] += 100
    assert model.image_loss(target, prediction, mask).item() == pytest.approx(total / mask.sum().item(), rel=1e-5)


def test_decode_image_puts_patches_back_in_their_place():
    """With decoder blocks that do nothing, a visible patch's prediction depends on that patch's own latent."""
    torch.manual_seed(0)
    model = mrm.MRM(**TINY | dict(decoder_depth=0)).eval()
    images = torch.randn(1, 1, 16, 16)
    latent, mask, restore = model.encode(images, 0.75, torch.rand(1, 16))
    latent = latent.detach().requires_grad_()
    prediction = model.decode_image(latent, restore)
    assert prediction.shape == (1, 16, 64)
    for place in (mask[0] == 0).nonzero().flatten().tolist():
        (gradient,) = torch.autograd.grad(prediction[0, place].square().sum(), latent, retain_graph=True)
        used = gradient[0].abs().sum(1).nonzero().flatten().tolist()
        assert used == [1 + restore[0, place].item()]


def batch(vocab=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, vocab, (3, 12), generator=generator)
    hidden = torch.rand(3, 12, generator=generator) < 0.5
    padding = torch.zeros(3, 12, dtype=torch.bool)
    padding[1, 8:] = True
    hidden &= ~padding
    inputs = tokens.clone()
    inputs[hidden] = 1
    tokens[padding] = inputs[padding] = 0
    return torch.randn(3, 1, 32, 32, generator=generator), (tokens, inputs, hidden, padding)


def test_report_loss_counts_hidden_tokens_and_ignores_padding():
    images, (tokens, inputs, hidden, padding) = batch()
    torch.manual_seed(0)
    model = randomised(mrm.MRM(**TINY, vocab_size=30)).eval()
    noise = torch.rand(3, 16)
    _, loss = model(images, (tokens, inputs, hidden, padding), noise=noise)
    latent, _, _ = model.encode(mrm.half_size(images), 0.75, noise)
    logits = model.report_decoder(latent[:, 1:], inputs, torch.ones_like(hidden), padding).view(3, 12, 30).double()
    expected = [-logits[b, j].log_softmax(-1)[tokens[b, j]].item() for b, j in hidden.nonzero().tolist()]
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-5)
    changed = torch.where(padding, 7, inputs)  # whatever stands beyond the end
    _, again = model(images, (tokens, changed, hidden, padding), noise=noise)
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)


def test_the_report_sees_the_image():
    images, report = batch()
    torch.manual_seed(0)
    model = randomised(mrm.MRM(**TINY, vocab_size=30)).eval()
    noise = torch.rand(3, 16)
    assert model(images, report, noise=noise)[1].item() != model(-images, report, noise=noise)[1].item()
    model(images, report, image=False, noise=noise)[1].backward()
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0


def test_report_dropout_acts_in_training_alone():
    images, report = batch()
    torch.manual_seed(0)
    model = randomised(mrm.MRM(**TINY | dict(report_dropout=0.5), vocab_size=30))
    noise = torch.rand(3, 16)
    first, second = (model(images, report, image=False, noise=noise)[1].item() for _ in range(2))
    assert first != second
    model.eval()
    first, second = (model(images, report, image=False, noise=noise)[1].item() for _ in range(2))
    assert first == second


def test_overfits_one_batch_of_records():
    images, report = batch()
    torch.manual_seed(0)
    model = mrm.MRM(**TINY, vocab_size=30)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    noise = torch.rand(3, 16)
    first = None
    for _ in range(200):
        image_loss, report_loss = model(images, report, noise=noise)
        (image_loss + report_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        first = first or (image_loss.item(), report_loss.item())
    assert image_loss.item() < 0.5 * first[0]  # predicting each patch's mean leaves 1.0
    assert report_loss.item() < 0.1 < math.log(30) * 0.9 < first[1]


def test_drop_path_keeps_the_expectation():
    torch.manual_seed(0)
    block = mrm.Block(8, 2, drop_path=0.4).train()
    x = torch.ones(20000, 1, 1)
    y = block.branch(x)
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert y.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(block.eval().branch(x), x)


def test_three_channel_weights_load_exactly_for_grey(capsys):
    torch.manual_seed(0)
    colour, grey = randomised(mrm.ViT(16, 4, 3, 24, 2, 3, num_classes=5)), mrm.ViT(16, 4, 1, 24, 2, 3, num_classes=5)
    mrm.load_encoder(grey, colour.state_dict(), "colour.pth")
    images = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(grey(images), colour(images.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-5)
    assert "colour.pth: 32 tensors loaded, 0 new, 0 left" in capsys.readouterr().out


def test_positions_are_resized_and_other_encoders_refused(capsys):
    small = randomised(mrm.ViT(16, 4, 1, 24, 2, 3))
    large = mrm.ViT(32, 4, 1, 24, 2, 3, num_classes=2)
    mrm.load_encoder(large, small.state_dict(), "small.pth")
    out = capsys.readouterr().out
    assert "4 new (fc_norm, head)" in out and "2 left (norm)" in out
    grid = small.pos_embed[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(8, 8), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(large.pos_embed[:, 1:], expected)
    for other in (mrm.ViT(16, 4, 1, 48, 2, 3), mrm.ViT(16, 4, 1, 24, 3, 3), mrm.ViT(16, 8, 1, 24, 2, 3)):
        with pytest.raises(data.InputError, match="small.pth: the encoder does not fit"):
            mrm.load_encoder(other, small.state_dict(), "small.pth")
    with pytest.raises(data.InputError, match="1 blocks in the model, 2 in the file"):
        mrm.load_encoder(mrm.ViT(16, 4, 1, 24, 1, 3), small.state_dict(), "small.pth")
    with pytest.raises(data.InputError, match="x.pth: expected a ViT's tensors"):
        mrm.encoder_sizes({"model_head.weight": torch.zeros(1)}, {}, "x.pth")
