"""Damaged files of every kind that the readers open: each is read, or refused in one short message.

    MEDVISION_FUZZ=1000000 MEDVISION_FUZZ_SEED=7 python -m pytest tests/test_fuzz.py

The first number is the count of damaged files, the second one chooses them.
"""

import argparse
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import write_dicom

import data
import lora
from support import tokenizer
from support.script import InputError, load_checkpoint, read_json

COUNT = int(os.environ.get("MEDVISION_FUZZ", 2000))
SEED = int(os.environ.get("MEDVISION_FUZZ_SEED", 0))
PIECES = (b"", b"\0", b"\xff", b"\n", b'"', b",", b" ", b"../", b"/etc/passwd", b"-1", b"nan",
          b"1e999", b"0" * 30, b"\xff\xfe", b"\r", b"{", b"[" * 3000, b"(", b"\\", "é影".encode(),
          b"\x80\x02}", b"cos\nsystem\n")


def mutate(content, rng, other):
    """`content` with 1 to 3 changes, mostly in its head, where formats keep what they say of
    themselves."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        size = len(content) or 1
        place = int(rng.integers(size if rng.random() < 0.4 else min(size, 400)))
        kind = rng.integers(7)
        if kind == 0:
            content[place : place + 1] = bytes([rng.integers(256)])
        elif kind == 1:
            bit = 1 << int(rng.integers(8))
            content[place : place + 1] = bytes([byte ^ bit for byte in content[place : place + 1]])
        elif kind == 2:
            content[place : place + int(rng.integers(9))] = PIECES[rng.integers(len(PIECES))]
        elif kind == 3:
            del content[place:]
        elif kind == 4:
            del content[place : place + int(rng.integers(1, 40))]
        elif kind == 5:
            content[place:place] = content[place // 2 : place // 2 + int(rng.integers(1, 60))]
        else:
            content[place : place + 40] = other[place : place + 40]
    return bytes(content)


def model():
    return lora.add_lora(torch.nn.Sequential(torch.nn.Linear(6, 4)), rank=2, targets={"0": (True,)})


def write_samples(root):
    """Small sound files of every kind, as {name: reader}."""
    rng = np.random.default_rng(0)
    pixels = (rng.random((40, 36)) * 255).astype(np.uint8)
    deep = pixels.astype(np.uint16) * 16

    def image(path):
        found = data.read_image(path, 16)
        assert found.shape[0] == 1 and 0 <= found.min() and found.max() <= 1

    def piece(path):
        found = data.read_slice(path, (0, 255), blank=True)
        assert found.ndim == 3 and -1 <= found.min() and found.max() <= 1

    def mask(path):
        data.read_pixels(path, grey=True)

    def names(path):
        found, labels = data.read_list(path)
        data.find_images("csv", root, found, path)
        data.not_excluded(root, [str(root / "images/a.png")], path)

    samples = {
        "list.txt": names, "training.csv": lambda path: data.read_reports(path, root),
        "patients.csv": lambda path: list(data.read_csv(path, ("image_path", "patient_id"))),
        "adapter.pt": lambda path: lora.load_adapter(model(), path), "run.json": read_json,
        "t.tiktoken": tokenizer.load_tokenizer, "zip.pt": load_checkpoint,
        "old.pt": load_checkpoint, "grey.png": image, "colour.png": piece,
        "deep.png": image, "mask.png": mask, "a.jpg": image, "a.tif": piece, "float.tif": image,
        "a.bmp": mask, "a.npy": image, "slice.npy": piece}
    (root / "list.txt").write_text("a.png 0 1 1\nb.png 1 0 0\n./images/a.png 0 0 0\n")
    (root / "training.csv").write_text(
        "study,image_path,report_content\n"
        '1,a.png,"The heart is normal, the ""lungs"" are clear.\nNo effusion."\n2,b.png,Edema.\n')
    (root / "patients.csv").write_text("image_path,patient_id\na.png,1\nb.png,2\n")
    (root / "run.json").write_text('{"lr": 0.1, "names": ["a", "b"], "none": null, "step": 12}\n')
    reports = ["the heart is normal", "the lungs are clear"] * 3
    tokenizer.save_tokenizer(tokenizer.train_tokenizer(reports, 270), root / "t.tiktoken")
    state = {"model": {"w": torch.randn(3, 4), "b": torch.arange(5)}, "step": 3,
             "args": argparse.Namespace(lr=0.1), "config": {"lr": 0.1}}
    torch.save(state, root / "zip.pt")
    torch.save(state, root / "old.pt", _use_new_zipfile_serialization=False)
    about = {"rank": 2, "alpha": 32.0, "dropout": 0.0, "targets": {"0": (True,)}}
    torch.save({"adapter": lora.lora_state_dict(model()), "lora": about}, root / "adapter.pt")
    (root / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, array, options in (
            ("images/a.png", pixels, {}), ("images/b.png", pixels, {}), ("grey.png", pixels, {}),
            ("colour.png", np.dstack([pixels] * 3), {}), ("deep.png", deep, {}),
            ("mask.png", pixels > 99, {}), ("a.jpg", pixels, {"exif": exif}), ("a.bmp", pixels, {}),
            ("a.tif", pixels, {"compression": "tiff_lzw"}),
            ("float.tif", pixels / np.float32(255), {})):
        Image.fromarray(array).save(root / name, **options)
    np.save(root / "a.npy", deep)
    np.save(root / "slice.npy", pixels.astype(np.float32))
    try:
        import nibabel

        nibabel.save(nibabel.Nifti1Image(deep.astype(np.int16), np.eye(4)), root / "a.nii")
        nibabel.save(nibabel.Nifti1Image(pixels, np.eye(4)), root / "b.nii.gz")
        samples |= {"a.nii": image, "b.nii.gz": piece}
    except ImportError:
        pass
    try:
        write_dicom(root / "a.dcm", deep, PixelPaddingValue=0, WindowCenter=2000, WindowWidth=3000,
                    RescaleSlope=1, RescaleIntercept=0)
        samples |= {"a.dcm": image}
    except ImportError:
        pass
    return samples


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused_in_one_message(tmp_path, capsys):
    samples = write_samples(tmp_path)
    sound = {name: (tmp_path / name).read_bytes() for name in samples}
    for name, read in samples.items():
        read(tmp_path / name)  # each is read as it is
    names, refused, escaped = list(samples), 0, []
    (tmp_path / "damaged").mkdir()
    for i in range(COUNT):
        rng = np.random.default_rng([SEED, i])
        name, other = names[i % len(names)], names[rng.integers(len(names))]
        path = tmp_path / "damaged" / name
        path.write_bytes(mutate(sound[name], rng, sound[other]))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                samples[name](path)
        except InputError as error:
            refused += 1
            said = str(error)
            if "\n" in said or len(said) > 1500:
                escaped.append(f"{SEED}, {i}, {name}: {len(said)} characters: {said[:200]}")
        except BaseException as error:
            escaped.append(f"{SEED}, {i}, {name}: {type(error).__name__}: {str(error)[:200]}")
            if isinstance(error, KeyboardInterrupt):
                break
    capsys.readouterr()
    assert not escaped, "\n".join([f"{len(escaped)} of {COUNT}", *escaped[:40]])
    assert refused > COUNT / 4
    if COUNT > 2000:
        print(f"{COUNT} damaged files from seed {SEED}: {refused} refused, {COUNT - refused} read")
