"""more/convert.py: encoders of others against the layers written out in torch, run lengths against
SIIM's own loop, smaller copies against PIL and against what a run reads."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
from more import convert
from support import script
from support.weights import encoder_sizes, load_encoder, read_weights
from vit import ViT


def hugging_face(dinov2):
    """Random tensors of a ViT of width 12 with 2 blocks under Hugging Face's names, DINOv2's with
    LayerScale, and the tokens (B, 1 + N, D) that they give, written out with separate q, k, v."""
    generator = torch.Generator().manual_seed(3)

    def new(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    D, p, n = 12, 4, 3
    t = {
        "embeddings.cls_token": new(1, 1, D),
        "embeddings.position_embeddings": new(1, 1 + n * n, D),
        "embeddings.patch_embeddings.projection.weight": new(D, 3, p, p),
        "embeddings.patch_embeddings.projection.bias": new(D),
        "layernorm.weight": new(D),
        "layernorm.bias": new(D),
    }
    norms = ("norm1", "norm2") if dinov2 else ("layernorm_before", "layernorm_after")
    mlp = ("mlp.fc1", "mlp.fc2") if dinov2 else ("intermediate.dense", "output.dense")
    for i in range(2):
        at = f"encoder.layer.{i}."
        for part in ("query", "key", "value"):
            t[at + f"attention.attention.{part}.weight"] = new(D, D)
            t[at + f"attention.attention.{part}.bias"] = new(D)
        for name, shape in (
            ("attention.output.dense", (D, D)),
            (mlp[0], (4 * D, D)),
            (mlp[1], (D, 4 * D)),
        ):
            t[at + name + ".weight"], t[at + name + ".bias"] = new(*shape), new(shape[0])
        for name in norms:
            t[at + name + ".weight"], t[at + name + ".bias"] = new(D) + 1, new(D)
        if dinov2:
            t[at + "layer_scale1.lambda1"], t[at + "layer_scale2.lambda1"] = new(D), new(D)

    def tokens(images, heads=3):
        linear = torch.nn.functional.linear

        def layer(x, name):
            return linear(x, t[name + ".weight"], t[name + ".bias"])

        def norm(x, name):
            mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
            return (x - mean) / (var + 1e-6).sqrt() * t[name + ".weight"] + t[name + ".bias"]

        x = torch.nn.functional.conv2d(
            images.expand(-1, 3, -1, -1),
            t["embeddings.patch_embeddings.projection.weight"],
            t["embeddings.patch_embeddings.projection.bias"],
            stride=p,
        )
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([t["embeddings.cls_token"].expand(len(x), -1, -1), x], 1)
        x = x + t["embeddings.position_embeddings"]
        for i in range(2):
            at, y = f"encoder.layer.{i}.", norm(x, f"encoder.layer.{i}.{norms[0]}")
            q, k, v = (
                layer(y, at + f"attention.attention.{part}")
                .unflatten(2, (heads, -1))
                .transpose(1, 2)
                for part in ("query", "key", "value")
            )
            weights = (q @ k.transpose(2, 3) / (D / heads) ** 0.5).softmax(-1)
            y = layer((weights @ v).transpose(1, 2).flatten(2), at + "attention.output.dense")
            x = x + y * t.get(at + "layer_scale1.lambda1", 1)
            y = torch.nn.functional.gelu(layer(norm(x, at + norms[1]), at + mlp[0]))
            x = x + layer(y, at + mlp[1]) * t.get(at + "layer_scale2.lambda1", 1)
        return x

    return t, tokens


def converted(path):
    """A ViT of three heads that has what `weights` makes of a file."""
    out = path.with_name("new.pt")
    convert.weights(convert.ConvertConfig(source=str(path), out=str(out)))
    tensors, saved = read_weights(out)
    sizes = encoder_sizes(tensors, saved, out, num_heads=3)
    assert sizes == dict(img_size=12, patch_size=4, embed_dim=12, depth=2, num_heads=3)
    model = ViT(**sizes, num_classes=2).eval()
    load_encoder(model, tensors, out)
    return model


@pytest.mark.parametrize("dinov2", [False, True], ids=["vit", "dinov2"])
@pytest.mark.parametrize("wrapping", ["", "vit.", "safetensors", "timm", "visual.trunk."])
def test_other_layouts_compute_what_they_say(tmp_path, dinov2, wrapping):
    tensors, tokens = hugging_face(dinov2)
    path = tmp_path / "weights.pt"
    if wrapping in ("timm", "visual.trunk."):  # timm's names keep LayerScale apart
        plain = {name: x for name, x in tensors.items() if "layer_scale" not in name}
        scales = {
            f"blocks.{i}.ls{k}.gamma": tensors[f"encoder.layer.{i}.layer_scale{k}.lambda1"]
            for i in range(2)
            for k in (1, 2)
            if dinov2
        }
        tensors = convert.as_timm(plain) | scales
    if wrapping == "safetensors":
        safetensors = pytest.importorskip("safetensors.torch")
        path = tmp_path / "weights.safetensors"
        safetensors.save_file(tensors, path)
    else:
        start = wrapping if wrapping.endswith(".") else ""
        tensors = {start + name: tensor for name, tensor in tensors.items()}
        script.save_checkpoint(path, tensors | {"text.token_embedding.weight": torch.ones(4, 4)})
    model, images = converted(path), torch.randn(2, 1, 12, 12)
    torch.testing.assert_close(model.tokens(images), tokens(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "extra, message",
    [
        ("embeddings.register_tokens", "does not fit: register_tokens: expected no such tensor"),
        ("encoder.layer.0.mlp.weights_in.weight", "blocks.0.mlp.weights_in.weight: expected no"),
        ("embeddings.distillation_token", "distillation_token: expected no such tensor"),
        ("encoder.layer.0.attention.attention.q_norm.weight", "blocks.0.attn.q_norm.weight: exp"),
        ("cls_token", "expected a ViT with whole layers, found two tensors cls_token"),
        ("ln_pre.weight", "ln_pre.weight: expected no such tensor"),
    ],
)
def test_encoders_that_compute_otherwise_are_refused_by_name(tmp_path, extra, message):
    tensors, _ = hugging_face(True)
    script.save_checkpoint(tmp_path / "w.pt", tensors | {extra: torch.ones(1, 4, 12)})
    with pytest.raises(script.InputError, match=f"w.pt: .*{message}"):
        converted(tmp_path / "w.pt")
    assert not (tmp_path / "new.pt").exists()


def test_an_output_does_not_replace_its_source(tmp_path):
    path = tmp_path / "new.pt"
    script.save_checkpoint(path, hugging_face(True)[0])
    with pytest.raises(script.InputError, match="expected another place than .*new.pt"):
        converted(path)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("encoder.layer.0.layer_scale1.lambda1", (5,)),
        ("encoder.layer.1.layer_scale2.lambda1", ()),
        ("encoder.layer.0.attention.attention.key.weight", (12, 11)),
        ("encoder.layer.0.attention.attention.key.weight", (11, 12)),
        ("encoder.layer.0.attention.attention.value.bias", ()),
        ("encoder.layer.0.attention.attention.value.bias", None),
        ("encoder.layer.1.mlp.fc2.bias", None),
        ("encoder.layer.0.attention.output.dense.weight", (7, 12)),
    ],
)
def test_layouts_with_parts_that_do_not_fit_are_refused(tmp_path, name, shape):
    tensors, _ = hugging_face(True)
    del tensors[name]
    if shape is not None:
        tensors[name] = torch.ones(shape)
    script.save_checkpoint(tmp_path / "w.pt", tensors)
    with pytest.raises(script.InputError, match=r"w.pt: (the encoder does not fit|expected a ViT)"):
        converted(tmp_path / "w.pt")


@pytest.mark.parametrize(
    "content",
    [
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}',
        b"nonsense",
    ],
)
def test_damaged_safetensors_are_one_line(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(8))
    with pytest.raises(script.InputError, match="a.safetensors: not readable as safetensors"):
        converted(path)


def test_without_safetensors_a_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(script.InputError, match="pip install safetensors"):
        converted(tmp_path / "a.safetensors")


# --------------------------------------------------------------------------------------------------
# Masks


def siim_mask(text, width, height):
    """As the competition's own code decodes a row."""
    mask, position = np.zeros(width * height), 0
    numbers = [int(number) for number in text.split()]
    for start, length in zip(numbers[0::2], numbers[1::2]):
        position += start
        mask[position : position + length] = 255
        position += length
    return mask.reshape(width, height).T


def siim(tmp_path, rows, names=("1.2.276.0.1", "1.2.276.0.10"), shape=(5, 7)):
    for name in names:
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros(shape, np.uint8)).save(path)
    text = "".join(f"{name}, {runs}\n" for name, runs in rows)
    (tmp_path / "rle.csv").write_text("ImageId, EncodedPixels\n" + text)
    return dict(source=str(tmp_path / "rle.csv"), root=str(tmp_path))


def test_run_lengths_become_masks_of_the_whole_name(tmp_path):
    first, second = "3 2 4 3", "0 1 33 1"  # the second has the first and the last pixel
    rows = [("1.2.276.0.1", first), ("1.2.276.0.1", "20 5"), ("1.2.276.0.10", second)]
    names = ("1.2.276.0.1", "1.2.276.0.10", "1.2.276.0.100", "1.2.276")
    convert.masks(convert.ConvertConfig(**siim(tmp_path, [*rows, ("1.2.276", "-1")], names)))
    mask = np.array(Image.open(tmp_path / "masks/1.2.276.0.1.png"))
    assert (mask == np.maximum(siim_mask(first, 7, 5), siim_mask("20 5", 7, 5))).all()
    assert mask.dtype == np.uint8 and mask[3, 0] == 255 and mask[2, 0] == 0  # down the columns
    mask = np.array(Image.open(tmp_path / "masks/1.2.276.0.10.png"))
    assert mask[0, 0] == mask[4, 6] == 255 and (mask > 0).sum() == 2
    assert not np.array(Image.open(tmp_path / "masks/1.2.276.png")).any()
    assert len(list((tmp_path / "masks").iterdir())) == 3
    keys = data.image_keys(tmp_path, [tmp_path / "images/1.2.276.0.1.png"])
    assert data.find_masks(tmp_path / "masks", keys) == [str(tmp_path / "masks/1.2.276.0.1.png")]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([("1.2.276.0", "1 2")], "no film below .* has the name 1.2.276.0 "),
        ([("1.2.276.0.1", "1 2 3")], "line 2: expected .* found 1 2 3"),
        ([("1.2.276.0.1", "1 -2")], "line 2: expected .* found 1 -2"),
        ([("1.2.276.0.1", "")], "line 2: expected .* found nothing"),
        ([("1.2.276.0.1", "30 6")], "1.2.276.0.1: expected runs within 35 pixels.* pixel 36"),
        ([("1.2.276.0.1", "20 2 25 3")], "1.2.276.0.1: expected .* counted from the last run"),
        ([("1.2.276.0.1", "-1"), ("1.2.276.0.1", "1 2")], "line 3: expected -1 alone"),
        ([("1.2.276.0.1", "1 2"), ("1.2.276.0.1", "-1")], "line 3: expected -1 alone"),
    ],
)
def test_run_lengths_that_do_not_fit_are_refused(tmp_path, rows, message):
    with pytest.raises(script.InputError, match=f"rle.csv: {message}"):
        convert.masks(convert.ConvertConfig(**siim(tmp_path, rows)))


def test_two_films_of_a_name_have_no_mask(tmp_path):
    options = siim(tmp_path, [("a", "1 2")], names=("a",))
    (tmp_path / "images/other").mkdir()
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(tmp_path / "images/other/a.png")
    with pytest.raises(script.InputError, match="expected a name of its own .* two folders"):
        convert.masks(convert.ConvertConfig(**options))


# --------------------------------------------------------------------------------------------------
# Smaller copies


def film(shape, top, seed=0):
    """A smooth random film of whole numbers up to `top`."""
    coarse = np.random.default_rng(seed).random((6, 6)).astype(np.float32)
    image = np.array(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC))
    return ((image - image.min()) / np.ptp(image) * top).round()


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "set"
    for name in ("images/deep", "masks/deep"):
        (root / name).mkdir(parents=True)
    Image.fromarray(film((90, 120), 255).astype(np.uint8)).save(root / "images/a.png")
    Image.fromarray(film((90, 120), 255).astype(np.uint8)).save(root / "images/deep/B.JPG")
    Image.fromarray(film((90, 120), 3900, 1).astype(np.uint16)).save(root / "images/twelve.png")
    Image.fromarray(np.stack([film((90, 120), 255, s) for s in range(3)], 2).astype(np.uint8)).save(
        root / "images/colour.tif"
    )
    sharp = np.random.default_rng(5).integers(0, 2, (90, 120)).astype(np.uint8) * 255
    sharp[:9, :9], sharp[20:50], sharp[50:80] = 128, 0, 255  # grey, so that it is no mask
    Image.fromarray(sharp).save(root / "images/sharp.png")
    np.save(root / "images/f.npy", (film((90, 120), 2000) - 1000).astype(np.float32))
    Image.fromarray(film((20, 50), 255).astype(np.uint8)).save(root / "images/small.png")
    mask = Image.fromarray((film((90, 120), 255) > 128).astype(np.uint8) * 7)
    mask.save(root / "masks/a.png")
    (root / "train_list.txt").write_text("a.png 1\ndeep/B.JPG 0\n")
    return root


def test_smaller_copies_are_what_a_run_reads(folder, tmp_path, capsys):
    out = tmp_path / "small"
    convert.shrink(convert.ConvertConfig(root=str(folder), out=str(out), size=30))
    assert "6 films made smaller, 3 files copied as they are" in capsys.readouterr().out
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert {path.relative_to(out) for path in out.rglob("*") if path.is_file()} == set(paths)
    for name in ("train_list.txt", "images/small.png", "images/f.npy"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    for path in paths:
        if path.suffix in (".txt", ".npy") or path.name == "small.png" or path.parts[0] == "masks":
            continue
        film, copy = data.resize(data.read_image(folder / path), 30), data.read_image(out / path)
        assert copy.shape == (1, 30, 40)
        torch.testing.assert_close(copy, film, atol=0.02, rtol=0)
        with Image.open(folder / path) as before, Image.open(out / path) as after:
            assert after.mode == before.mode and after.format == before.format
    with Image.open(folder / "images/a.png") as picture:  # PIL's own bicubic, rounded otherwise
        theirs = np.array(picture.resize((40, 30), Image.Resampling.BICUBIC)).astype(int)
    difference = np.array(Image.open(out / "images/a.png")) - theirs
    assert abs(difference).max() <= 1 and abs(difference.mean()) < 0.1  # rounded, not cut off
    mask, film = (np.array(Image.open(part / "masks/a.png")) for part in (out, folder))
    assert mask.shape == (30, 40) and set(np.unique(mask)) == {0, 7}
    assert (mask == film[1::3, 1::3]).all()  # the pixel in the middle of each 3 x 3
    assert data.read_mask(out / "masks/a.png", (30, 40), "a.png").shape == (30, 40)


def test_folders_that_are_no_new_folder_are_refused(folder, tmp_path):
    for out in ("", str(folder), str(folder / "images/new"), str(tmp_path)):
        with pytest.raises(script.InputError, match="--out: expected a new folder outside --root"):
            convert.shrink(convert.ConvertConfig(root=str(folder), out=out, size=30))
    with pytest.raises(script.InputError, match="--root: expected a folder"):
        convert.shrink(convert.ConvertConfig(root=str(tmp_path / "none"), out=str(tmp_path / "x")))


def test_films_without_a_right_copy_are_named(folder, tmp_path):
    (folder / "images/b.png").write_bytes(b"no picture")
    with pytest.raises(script.InputError, match="1 of 10 files have no .*b.png: expected"):
        convert.shrink(convert.ConvertConfig(root=str(folder), out=str(tmp_path / "x"), size=30))
    (folder / "images/b.png").unlink()
    # 12 bits by its finest detail alone, which a smaller copy does not have: a run would take the
    # copy for one of 10 bits and make it four times as bright
    fine = np.full((90, 120), 500, np.uint16)
    fine[::2, ::2], fine[0, 0] = 1040, 0
    Image.fromarray(fine).save(folder / "images/b.png")
    options = dict(root=str(folder), size=30)
    with pytest.raises(script.InputError, match="b.png: a run would scale its copy's numbers"):
        convert.shrink(convert.ConvertConfig(**options, out=str(tmp_path / "y")))
    convert.shrink(convert.ConvertConfig(**options, out=str(tmp_path / "z"), white=4095))


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_dicom_stays_dicom(tmp_path, kind):
    pydicom = pytest.importorskip("pydicom")
    source = pydicom.data.get_testdata_file("CT_small.dcm", read=True)
    source.PhotometricInterpretation = kind
    (tmp_path / "set").mkdir()
    source.save_as(tmp_path / "set/a.dcm")
    convert.shrink(
        convert.ConvertConfig(root=str(tmp_path / "set"), out=str(tmp_path / "o"), size=64)
    )
    film = data.resize(data.read_image(tmp_path / "set/a.dcm"), 64)
    copy = data.read_image(tmp_path / "o/a.dcm")
    assert (film - copy).abs().mean() < 0.02 and copy.shape == (1, 64, 64)
    record = pydicom.dcmread(tmp_path / "o/a.dcm")
    assert "PixelSpacing" not in record and record.PatientID == source.PatientID


def test_commands_end_with_one_line(folder, tmp_path, monkeypatch, capsys):
    for argv in (["convert"], ["convert", "split"]):
        monkeypatch.setattr("sys.argv", argv)
        with pytest.raises(script.InputError, match="usage: python -m more.convert weights"):
            convert.main()
    arguments = ["shrink", "--root", str(folder), "--out", str(tmp_path / "o"), "--size", "30"]
    monkeypatch.setattr("sys.argv", ["convert", *arguments])
    convert.main()
    assert capsys.readouterr().out.count("\n") == 1
