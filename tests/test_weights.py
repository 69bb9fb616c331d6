"""support/weights.py: checkpoints of the usual wrappings load exactly; what does not fit is refused
by name."""

import datetime
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from support import weights
from support.script import InputError, load_checkpoint
from test_script import fails
from test_vit import randomised
from vit import ViT


def test_three_channel_weights_load_exactly_for_grey(capsys):
    torch.manual_seed(0)
    colour = randomised(ViT(16, 4, 3, 24, 2, 3, num_classes=5))
    grey = ViT(16, 4, 1, 24, 2, 3, num_classes=5)
    weights.load_encoder(grey, colour.state_dict(), "colour.pth")
    images = torch.randn(2, 1, 16, 16)
    expected = colour(images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(grey(images), expected, atol=1e-5, rtol=1e-5)
    assert "colour.pth: 32 tensors loaded, 0 new, 0 left" in capsys.readouterr().out


def test_positions_are_resized_and_other_encoders_refused(capsys):
    small = randomised(ViT(16, 4, 1, 24, 2, 3))
    large = ViT(32, 4, 1, 24, 2, 3, num_classes=2)
    weights.load_encoder(large, small.state_dict(), "small.pth")
    out = capsys.readouterr().out
    assert "4 new (fc_norm, head)" in out and "2 left (norm)" in out
    grid = small.pos_embed[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(8, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(large.pos_embed[:, 1:], expected.flatten(2).transpose(1, 2))
    for other in (ViT(16, 4, 1, 48, 2, 3), ViT(16, 4, 1, 24, 3, 3), ViT(16, 8, 1, 24, 2, 3)):
        fails(lambda: weights.load_encoder(other, small.state_dict(), "small.pth"),
              "small.pth: the encoder does not fit")
    shallow = ViT(16, 4, 1, 24, 1, 3)
    fails(lambda: weights.load_encoder(shallow, small.state_dict(), "small.pth"),
          "blocks.1.attn.proj.bias: expected no such tensor")


def file_of(path, content):
    torch.save(content, path)
    return path


def vit_tensors(**extra):
    torch.manual_seed(3)
    return randomised(ViT(16, 4, 1, 24, 2, 3)).state_dict() | extra


def below(prefix, tensors, **others):
    return {prefix + name: tensor for name, tensor in tensors.items()} | others


WRAPPED = {
    "model": lambda t: {"model": t},
    "state_dict": lambda t: {"state_dict": t, "epoch": 3},
    "model_ema": lambda t: {"model_ema": t},
    "teacher": lambda t: {"student": {}, "teacher": below(
        "module.backbone.", t, **{"module.head.mlp.weight": torch.ones(3)})},
    "a model that is a name": lambda t: {"model": "vit_b", "state_dict": t},
    "compiled": lambda t: {"model": below("module._orig_mod.", t)},
    "encoder and decoder": lambda t: below("encoder.", t, cls_token=torch.ones(1, 1, 24)) | {
        "decoder.blocks.0.w": torch.ones(2)},
    "double precision": lambda t: {n: x.double() for n, x in t.items()} | {"epoch": 3},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_usual_wrappings_are_opened(tmp_path, kind):
    plain = vit_tensors()
    tensors, saved = weights.read_weights(file_of(tmp_path / "w.pt", WRAPPED[kind](plain)))
    sizes = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3)
    assert weights.encoder_sizes(tensors, saved, "w.pt", 3) == sizes
    model = ViT(16, 4, 1, 24, 2, 3)
    weights.load_encoder(model, tensors, "w.pt")
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())


def test_several_encoders_in_a_file_are_refused(tmp_path):
    both = below("student.", vit_tensors()) | below("momentum.", vit_tensors())
    fails(lambda: weights.read_weights(file_of(tmp_path / "w.pt", both)),
          "expected one encoder, found several: ['momentum.', 'student.'")


@pytest.mark.parametrize("name", [
    "blocks.0.ls1.gamma", "blocks.1.attn.q_norm.weight", "blocks.0.attn.qkv.lora_A", "reg_token",
    "register_tokens", "norm_pre.weight", "blocks.0.attn.relative_position_bias_table",
    "rel_pos_bias.weight", "dist_token", "patch_embed.norm.weight", "blocks.2.norm1.weight",
    "rope_embed.periods"])
def test_tensors_that_would_change_the_result_are_refused_by_name(name):
    with pytest.raises(InputError, match=rf"w\.pt: .*fit: {name}: expected no such tensor"):
        weights.load_encoder(ViT(16, 4, 1, 24, 2, 3), vit_tensors(**{name: torch.ones(24)}), "w.pt")


@pytest.mark.parametrize("name, spoil, message", [
    ("blocks.0.norm1.weight", lambda x: x / 0, "expected finite .* found NaN or infinity"),
    ("cls_token", lambda x: x.double() * 1e300, "expected finite .* found NaN or infinity"),
    ("blocks.1.mlp.fc1.bias", lambda x: x.long(), "floating-point numbers, found torch.int64"),
    ("pos_embed", lambda x: x.to_sparse(), "expected finite floating-point numbers"),
    ("pos_embed", lambda x: x[:, 1:], r"positions \(1, 1 \+ n\*n, width\).* found \(1, 16, 24\)"),
    ("pos_embed", lambda x: torch.cat([x, x[:, :1]], 1), r"found \(1, 18, 24\)"),
    ("pos_embed", lambda x: x[0], r"found \(17, 24\)"),
    ("patch_embed.proj.weight", lambda x: x[:, 0], "does not fit: patch_embed.proj.weight"),
])
def test_tensors_that_are_no_weights_are_refused_by_name(name, spoil, message):
    tensors = vit_tensors()
    tensors[name] = spoil(tensors[name])
    with pytest.raises(InputError, match=f"w.pt: .*{message}") as error:
        weights.load_encoder(ViT(16, 4, 1, 24, 2, 3), tensors, "w.pt")
    assert name in str(error.value)


def test_numbers_of_numpy_are_data_and_code_is_not(tmp_path):
    kinds = (np.float64, np.float32, np.float16, np.int64, np.uint8, np.bool_)
    numbers = {kind.__name__: kind(1) for kind in kinds}
    path = file_of(tmp_path / "w.pt", {"model": vit_tensors(), **numbers})
    assert load_checkpoint(path).items() >= numbers.items()
    with zipfile.ZipFile(path) as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for name in new.namelist():  # as numpy 1 wrote it
            old.writestr(name, new.read(name).replace(b"numpy._core.", b"numpy.core."))
    assert load_checkpoint(tmp_path / "old.pt").items() >= numbers.items()
    file_of(path, {"model": {}, "when": datetime.date(2026, 1, 1)})
    fails(lambda: load_checkpoint(path), "found code to run", "date")


def test_decoders_and_old_heads_may_be_left(capsys):
    names = ("decoder_blocks.0.ls1.gamma", "head.weight", "fc_norm.weight", "mask_token",
             "head_dist.bias")
    extra = {name: torch.ones(3) for name in names}
    weights.load_encoder(ViT(16, 4, 1, 24, 2, 3), vit_tensors(**extra), "w.pt")
    said = capsys.readouterr().out
    assert "5 left (decoder_blocks, fc_norm, head, head_dist, mask_token)" in said


def test_heads_are_known_or_asked_for(capsys):
    def sizes(dim, heads=None):
        tensors = {"patch_embed.proj.weight": torch.ones(dim, 1, 4, 4),
                   "pos_embed": torch.ones(1, 17, dim), "blocks.0.x": torch.ones(1)}
        return weights.encoder_sizes(tensors, {}, "w.pt", heads)["num_heads"]

    assert [sizes(dim) for dim in (192, 384, 768, 1024, 1280)] == [3, 6, 12, 16, 16]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5 and said[1].startswith("w.pt: 6 heads, as is usual at width 384")
    assert sizes(320, 5) == 5 and sizes(1280, 20) == 20
    for dim in (64, 320, 1152):
        fails(lambda: sizes(dim), f"expected --num-heads, which weights of width {dim}")
    assert not capsys.readouterr().out  # the file or the option says it
    whole = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3)
    for known in (dict(embed_dim=24), whole | dict(embed_dim=-24), whole | dict(img_size="16")):
        fails(lambda: weights.encoder_sizes({}, {"sizes": known}, "w.pt"),
              "w.pt: expected whole numbers above 0")


def test_weights_of_others_are_sent_to_their_conversion(tmp_path):
    theirs = {"embeddings.patch_embeddings.projection.weight": torch.ones(8, 3, 4, 4)}
    for call in (lambda: weights.read_weights(tmp_path / "a.safetensors"),
                 lambda: weights.encoder_sizes(theirs, {}, "w.pt")):
        fails(call, "python -m more.convert weights")
