"""more/convert.py: encoders of others against the layers written out in torch, run lengths against
SIIM's own loop, smaller copies against PIL and against what a run reads."""

import dataclasses
import os
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
from more import convert
from rounding import network_rounding
from support.script import InputError, save_checkpoint
from support.weights import encoder_sizes, load_encoder, read_weights
from vit import ViT

D, PATCH, SIDE, HEADS = 12, 4, 3, 3
NAMES = [(("layernorm_before", "layernorm_after"), ("intermediate.dense", "output.dense")),
         (("norm1", "norm2"), ("mlp.fc1", "mlp.fc2"))]  # of norms and MLP: ViT's and DINOv2's


def hugging_face(dinov2):
    """Random tensors of a ViT of width 12 with 2 blocks under Hugging Face's names, DINOv2's with
    LayerScale."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "embeddings.cls_token": (1, 1, D), "embeddings.position_embeddings": (1, 1 + SIDE**2, D),
        "embeddings.patch_embeddings.projection.weight": (D, 3, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (D,),
        "layernorm.weight": (D,), "layernorm.bias": (D,)}
    norms, mlp = NAMES[dinov2]
    for at in ("encoder.layer.0.", "encoder.layer.1."):
        weights = {f"attention.attention.{part}": (D, D) for part in ("query", "key", "value")}
        weights |= {"attention.output.dense": (D, D), mlp[0]: (4 * D, D), mlp[1]: (D, 4 * D)}
        weights |= {name: (D,) for name in norms}
        for name, shape in weights.items():
            shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
        if dinov2:
            shapes |= {f"{at}layer_scale{k}.lambda1": (D,) for k in (1, 2)}
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def their_tokens(t, images):
    """The tokens (B, 1 + N, D) of such an encoder, written out with separate q, k and v."""
    def layer(x, name):
        return F.linear(x, t[name + ".weight"], t[name + ".bias"])

    def norm(x, name):
        return F.layer_norm(x, (D,), t[name + ".weight"], t[name + ".bias"], 1e-6)

    norms, mlp = NAMES["encoder.layer.0.norm1.weight" in t]
    at = "embeddings.patch_embeddings.projection."
    x = F.conv2d(images.expand(-1, 3, -1, -1), t[at + "weight"], t[at + "bias"], stride=PATCH)
    x = torch.cat([t["embeddings.cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1)
    x = x + t["embeddings.position_embeddings"]
    for at in ("encoder.layer.0.", "encoder.layer.1."):
        y = norm(x, at + norms[0])
        q, k, v = (layer(y, f"{at}attention.attention.{part}").unflatten(2, (HEADS, -1))
                   .transpose(1, 2) for part in ("query", "key", "value"))
        weights = (q @ k.mT / (D / HEADS) ** 0.5).softmax(-1)
        y = layer((weights @ v).transpose(1, 2).flatten(2), at + "attention.output.dense")
        x = x + y * t.get(at + "layer_scale1.lambda1", 1)
        y = layer(F.gelu(layer(norm(x, at + norms[1]), at + mlp[0])), at + mlp[1])
        x = x + y * t.get(at + "layer_scale2.lambda1", 1)
    return x


def converted(path):
    """A ViT of three heads that has what `weights` makes of a file."""
    out = path.with_name("new.pt")
    convert.weights(convert.ConvertConfig(source=str(path), out=str(out)))
    tensors, saved = read_weights(out)
    sizes = encoder_sizes(tensors, saved, out, num_heads=HEADS)
    assert sizes == dict(img_size=12, patch_size=4, embed_dim=12, depth=2, num_heads=3)
    model = ViT(**sizes, num_classes=2).eval()
    load_encoder(model, tensors, out)
    return model


@pytest.mark.parametrize("dinov2", [False, True], ids=["vit", "dinov2"])
@pytest.mark.parametrize("wrapping", ["", "vit.", "safetensors", "timm", "visual.trunk."])
def test_other_layouts_compute_what_they_say(tmp_path, dinov2, wrapping):
    theirs, images = hugging_face(dinov2), torch.randn(2, 1, 12, 12)
    path, tensors = tmp_path / "weights.pt", theirs
    if wrapping in ("timm", "visual.trunk."):  # timm's names keep LayerScale apart
        tensors = convert.as_timm({n: x for n, x in theirs.items() if "layer_scale" not in n})
        tensors |= {f"blocks.{i}.ls{k}.gamma": theirs[f"encoder.layer.{i}.layer_scale{k}.lambda1"]
                    for i in range(2) for k in (1, 2) if dinov2}
    if wrapping == "safetensors":
        path = path.with_suffix(".safetensors")
        pytest.importorskip("safetensors.torch").save_file(tensors, path)
    else:
        start = wrapping if wrapping.endswith(".") else ""
        tensors = {start + name: tensor for name, tensor in tensors.items()}
        save_checkpoint(path, tensors | {"text.token_embedding.weight": torch.ones(4, 4)})
    with pytest.raises(InputError, match="expected another place than .*weights"):
        convert.weights(convert.ConvertConfig(source=str(path), out=str(path)))
    model, expected = converted(path), their_tokens(theirs, images)
    atol = network_rounding(model, lambda: model.tokens(images))
    torch.testing.assert_close(model.tokens(images), expected, atol=atol, rtol=0)


WHOLE, FOREIGN = "expected a ViT with whole layers", "expected no such tensor"


@pytest.mark.parametrize("name, shape, message", [
    ("embeddings.register_tokens", (1, 4, 12), f"register_tokens: {FOREIGN}"),
    ("encoder.layer.0.mlp.weights_in.weight", (1,), f"blocks.0.mlp.weights_in.weight: {FOREIGN}"),
    ("embeddings.distillation_token", (1,), f"distillation_token: {FOREIGN}"),
    ("encoder.layer.0.attention.attention.q_norm.weight", (1,), f"attn.q_norm.weight: {FOREIGN}"),
    ("cls_token", (1,), f"{WHOLE}, found two tensors cls_token"),
    ("ln_pre.weight", (1,), f"ln_pre.weight: {FOREIGN}"),
    ("encoder.layer.0.layer_scale1.lambda1", (5,), WHOLE),
    ("encoder.layer.1.layer_scale2.lambda1", (), WHOLE),
    ("encoder.layer.0.attention.attention.key.weight", (11, 12), "the encoder does not fit"),
    ("encoder.layer.0.attention.attention.value.bias", None, WHOLE),
    ("encoder.layer.1.mlp.fc2.bias", None, WHOLE),
    ("encoder.layer.0.attention.output.dense.weight", (7, 12), WHOLE)])
def test_encoders_that_compute_otherwise_or_in_part_are_refused(tmp_path, name, shape, message):
    tensors = hugging_face(True)
    tensors.pop(name, None)
    if shape is not None:
        tensors[name] = torch.ones(shape)
    save_checkpoint(tmp_path / "w.pt", tensors)
    file = "w.pt" if message.startswith(WHOLE) else "new.pt"  # refused where it is loaded
    with pytest.raises(InputError, match=f"{file}: .*{message}"):
        converted(tmp_path / "w.pt")


def test_unreadable_safetensors_are_one_line(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    for content in (b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}', b"nonsense"):
        path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(8))
        with pytest.raises(InputError, match="a.safetensors: not readable by pip's safeten"):
            converted(path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as where it is not installed
    with pytest.raises(InputError, match="not readable by pip's safetensors .import of"):
        converted(path)


# --------------------------------------------------------------------------------------------------
# Masks


def siim_mask(text, width, height):
    """As the competition's own code decodes a row."""
    mask, position, numbers = np.zeros(width * height), 0, list(map(int, text.split()))
    for start, length in zip(numbers[0::2], numbers[1::2]):
        mask[position + start : position + start + length] = 255
        position += start + length
    return mask.reshape(width, height).T


def siim(tmp_path, rows, names=("1.2.276.0.1", "1.2.276.0.10")):
    for name in names:
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((5, 7), np.uint8)).save(path)
    text = "".join(f"{name}, {runs}\n" for name, runs in rows)
    (tmp_path / "rle.csv").write_text("ImageId, EncodedPixels\n" + text)
    return convert.ConvertConfig(source=str(tmp_path / "rle.csv"), root=str(tmp_path))


def test_run_lengths_become_masks_of_the_whole_name(tmp_path, monkeypatch):
    first, second = "3 2 4 3", "0 1 33 1"  # the second has the first and the last pixel
    rows = [("1.2.276.0.1", first), ("1.2.276.0.1", "20 5"), ("1.2.276.0.10", second)]
    names = ("1.2.276.0.1", "1.2.276.0.10", "1.2.276.0.100", "1.2.276")
    monkeypatch.chdir(tmp_path.parent)  # the root may be relative
    config = siim(tmp_path, [*rows, ("1.2.276", "-1")], names)
    convert.masks(dataclasses.replace(config, root=tmp_path.name))
    mask = np.array(Image.open(tmp_path / "masks/1.2.276.0.1.png"))
    assert (mask == np.maximum(siim_mask(first, 7, 5), siim_mask("20 5", 7, 5))).all()
    assert mask.dtype == np.uint8 and mask[3, 0] == 255 and mask[2, 0] == 0  # down the columns
    mask = np.array(Image.open(tmp_path / "masks/1.2.276.0.10.png"))
    assert mask[0, 0] == mask[4, 6] == 255 and (mask > 0).sum() == 2
    assert not np.array(Image.open(tmp_path / "masks/1.2.276.png")).any()
    assert len(list((tmp_path / "masks").iterdir())) == 3
    keys = data.image_keys(tmp_path, [tmp_path / "images/1.2.276.0.1.png"])
    assert data.find_masks(tmp_path / "masks", keys) == [str(tmp_path / "masks/1.2.276.0.1.png")]
    convert.masks(dataclasses.replace(config, out="elsewhere"))
    assert len(os.listdir("elsewhere")) == 3


@pytest.mark.parametrize("name, runs, message", [
    ("1.2.276.0", "1 2", "no image below .* has the name 1.2.276.0 "),
    ("1.2.276.0.1", "1 2 3", "line 2: expected .* found 1 2 3"),
    ("1.2.276.0.1", "1 -2", "line 2: expected .* found 1 -2"),
    ("1.2.276.0.1", "", "line 2: expected .* found nothing"),
    ("1.2.276.0.1", "30 6", "1.2.276.0.1: expected runs within 35 pixels.* pixel 36"),
    ("1.2.276.0.1", "20 2 25 3", "1.2.276.0.1: expected .* counted from the last run"),
])
def test_run_lengths_that_do_not_fit_are_refused(tmp_path, name, runs, message):
    with pytest.raises(InputError, match=f"rle.csv: {message}"):
        convert.masks(siim(tmp_path, [(name, runs)]))
    with pytest.raises(InputError, match="expected a name of its own .* two folders"):
        convert.masks(siim(tmp_path, [("a", "1 2")], names=("a", "other/a")))


# --------------------------------------------------------------------------------------------------
# Smaller copies


def picture(top, seed=0):
    """A smooth random picture (90, 120) of whole numbers up to `top`."""
    coarse = np.random.default_rng(seed).random((6, 6)).astype(np.float32)
    image = np.array(Image.fromarray(coarse).resize((120, 90), Image.Resampling.BICUBIC))
    image = ((image - image.min()) / np.ptp(image) * top).round()
    return image.astype(np.uint8 if top < 256 else np.uint16)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "set"
    sharp = np.random.default_rng(5).integers(0, 2, (90, 120)).astype(np.uint8) * 255
    sharp[:9, :9], sharp[20:50], sharp[50:80] = 128, 0, 255  # grey, so that it is no mask
    images = {
        "images/a.png": picture(255), "images/deep/B.JPG": picture(255),
        "images/twelve.png": picture(3900, 1), "images/sharp.png": sharp,
        "images/colour.tif": np.stack([picture(255, seed) for seed in range(3)], 2),
        "images/small.png": picture(255)[:20, :50],
        "masks/a.png": (picture(255) > 128).astype(np.uint8) * 7}
    for name, pixels in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name)
    np.save(root / "images/f.npy", picture(2000).astype(np.float32) - 1000)
    (root / "images/c.dcm").write_bytes(b"a DICOM file is not read")
    (root / "train_list.txt").write_text("a.png 1\ndeep/B.JPG 0\n")
    return root


def shrink(root, out):
    convert.shrink(convert.ConvertConfig(root=str(root), out=str(out), size=30))


def test_smaller_copies_are_what_a_run_reads(folder, tmp_path, capsys):
    out = tmp_path / "small"
    same = ("train_list.txt", "small.png", "twelve.png", "f.npy", "c.dcm")
    (tmp_path / "link").mkdir()
    for entry in folder.iterdir():  # linked folders and files, as data sets often are
        (tmp_path / "link" / entry.name).symlink_to(entry)
    (tmp_path / "link/above").symlink_to(tmp_path / "link")
    (tmp_path / "link/lost.png").symlink_to(tmp_path / "lost.png")
    shrink(tmp_path / "link", out)
    assert "5 images made smaller, 5 files copied as they are" in capsys.readouterr().out
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert {path.relative_to(out) for path in out.rglob("*") if path.is_file()} == set(paths)
    for path in paths:
        if path.name in same:
            assert (out / path).read_bytes() == (folder / path).read_bytes()
        elif path.parts[0] == "images":
            whole = data.resize(data.read_image(folder / path), 30)
            copy = data.read_image(out / path)
            assert copy.shape == (1, 30, 40)
            torch.testing.assert_close(copy, whole, atol=0.02, rtol=0)
            with Image.open(folder / path) as before, Image.open(out / path) as after:
                assert after.mode == before.mode and after.format == before.format
    with Image.open(folder / "images/a.png") as whole:  # PIL's own bicubic, rounded otherwise
        theirs = np.array(whole.resize((40, 30), Image.Resampling.BICUBIC)).astype(int)
    difference = np.array(Image.open(out / "images/a.png")) - theirs
    assert abs(difference).max() <= 1 and abs(difference.mean()) < 0.1  # rounded, not cut off
    mask, whole = (np.array(Image.open(part / "masks/a.png")) for part in (out, folder))
    assert (mask == whole[1::3, 1::3]).all()  # the pixel in the middle of each 3 x 3
    assert data.read_mask(out / "masks/a.png", (30, 40), "a.png").any()


def test_what_has_no_right_copy_is_refused(folder, tmp_path):
    for out in ("", folder, folder / "images/new", tmp_path):
        with pytest.raises(InputError, match="--out: expected a new folder outside --root"):
            shrink(folder, out)
    with pytest.raises(InputError, match="--root: expected a folder"):
        shrink(tmp_path / "none", tmp_path / "x")
    (folder / "images/b.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="b.png: expected a complete PNG"):
        shrink(folder, tmp_path / "x")


def test_commands_end_with_one_line(folder, tmp_path, monkeypatch, capsys):
    for arguments in ([], ["split"]):
        monkeypatch.setattr("sys.argv", ["convert", *arguments])
        with pytest.raises(InputError, match="usage: python -m more.convert weights"):
            convert.main()
    arguments = ["shrink", "--root", str(folder), "--out", str(tmp_path / "o"), "--size", "30"]
    monkeypatch.setattr("sys.argv", ["convert", *arguments])
    convert.main()
    assert capsys.readouterr().out.count("\n") == 1
