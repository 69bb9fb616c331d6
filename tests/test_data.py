"""Tests of data.py (reading, lists, reports, batches, pairs, audit) against PIL, scikit-image
and pydicom; every kind of bad input has its one line."""

import functools
import os
import signal
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import skimage.data
import skimage.transform
import torch
import torch.nn.functional as F
from PIL import Image
from test_script import fails

from support import script as common
import data

SHARED = Path(__file__).resolve().parents[1] / "../shared"


@pytest.fixture(scope="module")
def photo():
    """A real grey picture with fine detail, uint8 (512, 512)."""
    return skimage.data.camera()


def save(path, array, **options):
    """Writes an array as .npy or as a picture, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(np.ascontiguousarray(array)).save(path, **options)
    return path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---- Reading images


def test_png_of_every_kind(tmp_path, photo):
    path = tmp_path / "a.png"

    def read(picture):
        picture.save(path)
        image = data.read_image(path)
        assert image.dtype == torch.float32 and 0 <= image.min() and image.max() <= 1
        return image.numpy()

    grey = photo[None] / np.float32(255)
    assert np.array_equal(read(Image.fromarray(photo)), grey)
    deep = photo.astype(np.uint16) * 257 - photo % 7 * (photo > 0)  # 16 bits that 8 cannot hold
    assert np.allclose(read(Image.fromarray(deep)), deep[None] / 65535, atol=1e-7)
    pixels, white = data.read_pixels(path)
    assert np.array_equal(pixels, deep) and white == 65535
    assert np.array_equal(read(Image.fromarray(photo > 100)), (photo > 100)[None])
    assert np.array_equal(read(Image.fromarray(photo).convert("P")), grey)
    alpha = np.dstack([photo, photo, photo, photo.T])
    assert np.array_equal(read(Image.fromarray(alpha)), grey)
    colour = np.stack([photo, photo.T, 255 - photo], -1)
    expected = colour @ [0.299, 0.587, 0.114] / 255
    assert np.abs(read(Image.fromarray(colour))[0] - expected).max() < 1 / 255
    pixels, white = data.read_pixels(path)
    assert np.array_equal(pixels, colour) and white == 255


def test_resizing_agrees_with_pil(tmp_path, photo):
    picture = Image.fromarray(photo[:300])  # (300, 512)
    picture.save(tmp_path / "a.png")
    for short in (299, 128, 33, 400):
        image = data.read_image(tmp_path / "a.png", short)
        size = (round(512 * short / 300), short)
        assert image.shape == (1, size[1], size[0])
        expected = np.asarray(picture.resize(size, Image.BICUBIC))
        assert np.abs(image[0].numpy() * 255 - expected).max() <= 1.01
    floats = photo[:300] / np.float32(255)
    expected = np.asarray(Image.fromarray(floats).resize((171, 100), Image.BICUBIC)).clip(0, 1)
    floats = torch.from_numpy(floats[None])
    assert np.abs(data.resize(floats, 100)[0].numpy() - expected).max() < 1e-4
    assert data.resize(floats[None], (40, 50)).shape == (1, 1, 40, 50)


def test_jpeg_is_decoded_at_reduced_size(tmp_path, photo, monkeypatch):
    big = np.asarray(Image.fromarray(photo).resize((1600, 1200), Image.BICUBIC))
    save(tmp_path / "a.jpg", big, quality=92)
    save(tmp_path / "colour.jpg", np.dstack([big] * 3), quality=92)
    reference = skimage.transform.resize(big / 255, (240, 320), anti_aliasing=True)
    decoded, load = [], Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(self.size) or load(self))
    for name in ("a.jpg", "colour.jpg"):
        image = data.read_image(tmp_path / name, 240)
        assert image.shape == (1, 240, 320) and np.abs(image[0].numpy() - reference).mean() < 0.01
        assert np.corrcoef(image[0].numpy().ravel(), reference.ravel())[0, 1] > 0.995  # no shift
    assert (400, 300) in decoded and (1600, 1200) not in decoded
    assert data.read_image(tmp_path / "a.jpg").shape == (1, 1200, 1600)
    assert data.read_pixels(tmp_path / "colour.jpg", 240)[0].shape == (300, 400, 3)


PLAIN = np.full((100, 100), -1000, np.int16)
PLAIN[40:44, 40:44] = np.arange(16).reshape(4, 4) * 100  # 0.16 % of it


@pytest.mark.parametrize("array, expected", [
    (np.array([[0, 255]], np.uint8), [[0, 1]]),
    (np.array([[0, 65535, 13107]], np.uint16), [[0, 1, 0.2]]),
    (np.array([[0, 65535]], ">u2"), [[0, 1]]),
    (np.array([[0.25, 0.5]], np.float16), [[0.25, 0.5]]),  # within [0, 1]: kept
    (np.array([[-1, 0, 1]], np.float32), [[0, 0.5, 1]]),  # else stretched
    (np.array([[-1000, 0, 1000]], np.int16), [[0, 0.5, 1]]),
    (np.array([[0, 0.5, 2.0]]), [[0, 0.25, 1]]),
    (np.array([[-0.005, 0.25, 0.5]]), [[0, 0.25, 0.5]]),  # a hair outside: clipped
    (np.array([[5.0, 5.0]]), [[0, 0]]),
    (np.array([[[0.5], [0.25]]]), [[0.5, 0.25]]),
    (PLAIN, (PLAIN + 1000.0) / 2500)])  # a small object on a plain ground is not lost
def test_npy(tmp_path, array, expected):
    image = data.read_image(save(tmp_path / "a.npy", array))
    assert image.shape == (1, *np.shape(expected)) and np.allclose(image[0], expected, atol=1e-6)


def write_dicom(path, pixels, **attributes):
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    record = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    record.Rows, record.Columns = pixels.shape
    record.SamplesPerPixel, record.PixelRepresentation = 1, 0
    record.PhotometricInterpretation = "MONOCHROME2"
    record.BitsAllocated, record.BitsStored, record.HighBit = 16, 12, 11
    record.PixelData = pixels.astype("<u2").tobytes()
    for name, value in attributes.items():
        setattr(record, name, value)
    record.save_as(path, enforce_file_format=True)


def between(values, among=None):
    """The rule of scale by sorting: 0 and 1 are the numbers beyond which 0.5 % lie at each end."""
    ordered = sorted((values if among is None else among).ravel().tolist())
    low, high = ordered[len(ordered) // 200], ordered[-1 - len(ordered) // 200]
    return (np.clip(values, low, high) - low) / (high - low)


def test_dicom(tmp_path, photo, monkeypatch):
    pytest.importorskip("pydicom")
    path, raw = tmp_path / "a.dcm", photo.astype(np.uint16) * 16
    whole = between(raw.astype(float))
    windowed = ((raw * 2.0 - 1000 - 1999.5) / 2999 + 0.5).clip(0, 1)  # DICOM PS3.3 C.11.2.1.2
    for expected, tags in (
            (whole, {}), (1 - whole, {"PhotometricInterpretation": "MONOCHROME1"}),
            (windowed, {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 2000,
                        "WindowWidth": 3000}),
            # A window that the pixels do not fill is not stretched to them
            ((raw - 4095.5) / 8191 + 0.5, {"WindowCenter": 4096, "WindowWidth": 8192})):
        write_dicom(path, raw, **tags)
        assert np.allclose(data.read_image(path)[0], expected, atol=1e-5)
    path.rename(tmp_path / "without_ending")  # told by content
    assert data.read_image(tmp_path / "without_ending", 64).shape == (1, 64, 64)
    (tmp_path / "junk.dcm").write_bytes(b"junk" * 100)
    fails(lambda: data.read_image(tmp_path / "junk.dcm"), "junk.dcm", "expected one grey frame")
    fails(lambda: data.read_slice(tmp_path / "without_ending"), "without_ending", "DICOM")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    fails(lambda: data.read_image(tmp_path / "without_ending"), "without_ending", "pip install")


def test_padding_of_dicom_is_left_out_of_the_stretch(tmp_path):
    pytest.importorskip("pydicom")
    path, ramp = tmp_path / "a.dcm", np.mgrid[:64, :64].sum(0).astype(np.int64) * 30 + 100
    inside = np.zeros((64, 64), bool)
    inside[8:, 8:] = True
    expected = np.where(inside, between(ramp, ramp[inside]), 0)
    deep = {"BitsStored": 16, "HighBit": 15}
    for value, tags in ((65535, deep | {"PixelPaddingValue": 65535}), (0, {"PixelPaddingValue": 0}),
                        (40, {"PixelPaddingValue": 20, "PixelPaddingRangeLimit": 90}),
                        (90, {"PixelPaddingValue": 90, "PixelPaddingRangeLimit": 20}),
                        (-2000, deep | {"PixelRepresentation": 1, "PixelPaddingValue": -2000})):
        write_dicom(path, np.where(inside, ramp, value).astype("<i2" if value < 0 else "<u2"),
                    **tags)
        assert np.allclose(data.read_image(path)[0], expected, atol=1e-5), value
    write_dicom(path, np.where(inside, ramp, 0), PixelPaddingValue=0,
                PhotometricInterpretation="MONOCHROME1")
    assert np.allclose(data.read_image(path)[0], np.where(inside, 1 - expected, 0), atol=1e-5)
    write_dicom(path, np.zeros((40, 40)), PixelPaddingValue=0)
    assert not data.read_image(path).any()


def test_the_decoder_that_is_missing_is_named(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.encaps import encapsulate

    path = tmp_path / "a.dcm"
    for syntax in ("1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80"):  # JPEG lossless, JPEG-LS
        write_dicom(path, np.zeros((40, 40)))
        record = pydicom.dcmread(path)
        record.file_meta.TransferSyntaxUID = syntax
        record.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
        record["PixelData"].is_undefined_length = True
        record.save_as(path)
        with pytest.raises(common.InputError, match="found .*pylibjpeg.*Unable to decompress"):
            data.read_image(path)  # what to install comes first


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_followed_by_every_reader(tmp_path, orientation, photo):
    upright = photo[:96, :64]
    stored = {1: lambda p: p, 2: np.fliplr, 3: lambda p: np.rot90(p, 2), 4: np.flipud,
              5: np.transpose, 6: np.rot90, 7: lambda p: np.rot90(p, 2).T,
              8: lambda p: np.rot90(p, -1)}[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.jpg", "a.png", "a.tif"):
        path = save(tmp_path / name, stored, exif=exif,
                    **({"quality": 98} if name == "a.jpg" else {}))
        image, slice_ = data.read_image(path), data.read_slice(path)
        assert image.shape == (1, 96, 64) and np.abs(image[0].numpy() * 255 - upright).mean() < 2
        assert data.read_pixels(path)[0].shape == (96, 64)
        assert np.abs((slice_[0].numpy() + 1) * 127.5 - upright).mean() < 2
        assert data.read_image(path, 32).shape == (1, 48, 32)


def test_unreadable_images_have_one_clear_line(tmp_path, photo):
    for name in ("a.png", "a.jpg"):
        path = save(tmp_path / name, photo)
        whole = path.read_bytes()
        for part in (20, len(whole) // 2, len(whole) - 40):
            path.write_bytes(whole[:part])
            fails(lambda: data.read_image(path, 64), path, "expected a complete")
    for text in ("", "this is text" * 20):
        path = write(tmp_path / "text.png", text)
        fails(lambda: data.read_image(path), "text.png: expected a complete", "cannot identify")
    fails(lambda: data.read_image(tmp_path / "none.png"), "none.png: no such image")
    fails(lambda: data.read_image(tmp_path), tmp_path)
    for array in (np.zeros((2, 3, 4, 5)), np.array([[np.nan]]), np.array([["a"]]), np.zeros((0, 3)),
                  np.array([{}], dtype=object)):  # the last is pickled
        fails(lambda: data.read_image(save(tmp_path / "a.npy", array)), "a.npy")


def test_other_shapes_and_sizes_of_pictures_are_refused_in_one_line(tmp_path):
    pages = [Image.fromarray(np.full((40, 40), i, np.uint8)) for i in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    fails(lambda: data.read_image(tmp_path / "a.tif"), "a.tif", "one page", "3")
    wide = np.arange(1600, dtype=np.int32).reshape(40, 40) * 100
    path = save(tmp_path / "b.tif", wide)  # 32 bits: stretched, not clipped to 16
    assert np.allclose(data.read_image(path)[0], between(wide), atol=1e-6)
    # Of a colour of 16 bits PIL would keep the upper eight: of a 12-bit image, four
    for value, found in (((50_000).to_bytes(4, "big") * 2, "2500000000 pixels"),
                         (bytes([0, 0, 0, 2] * 2 + [16, 2]), "16 bits in grey alone")):
        path = save(tmp_path / "c.png", np.zeros((2, 12), np.uint8))  # as long as (2, 2, 3) of 16
        head = bytearray(path.read_bytes())
        head[16 : 16 + len(value)] = value  # sides; bits and kind of colour
        head[29:33] = zlib.crc32(head[12:29]).to_bytes(4, "big")
        path.write_bytes(head)
        fails(lambda: data.read_image(path), "c.png", found)


def test_a_tiff_of_16_bits_with_white_as_0_is_refused(tmp_path, photo):
    path = save(tmp_path / "a.tif", photo.astype(np.uint16) * 257)
    assert np.allclose(data.read_image(path)[0], photo / 255, atol=1e-6)
    save(path, photo.astype(np.uint16) * 257, tiffinfo={262: 0})
    fails(lambda: data.read_image(path), "a.tif", "expected 0 for black")


@pytest.mark.parametrize("where", [(3, 3), (0, 17)])
@pytest.mark.parametrize("value", [-1e-6, -0.5, 1.5, 65535.0])
def test_a_pixel_outside_0_to_1_changes_no_other(tmp_path, photo, value, where):
    dim = photo[:200, :200].astype(np.float32) / 512
    one = data.read_image(save(tmp_path / "a.npy", dim))[0]
    assert np.allclose(one, dim, atol=1e-6)
    dim[where] = value
    two = data.read_image(save(tmp_path / "b.npy", dim))[0]
    assert ((one != two).nonzero() == torch.tensor([where])).all() and two[where] in (0, 1)


@pytest.mark.parametrize("name", ["a.png", "a.npy", "a.dcm", "b.dcm", "n.npy"])
@pytest.mark.parametrize("size", [1, 30])
def test_a_dead_pixel_or_a_marker_leaves_the_grey_levels(tmp_path, photo, name, size):
    """A square of 65535 in an image of 12 bits, 0.4 % of it at most: the rest is read as before."""
    film = np.asarray(Image.fromarray(photo).resize((480, 480))).astype(np.uint16) * 8  # to 2040
    film[:5] = 4095  # an edge of the film, over 1 %
    marked = film.copy()
    marked[100 : 100 + size, 50 : 50 + size] = 65535 if name != "n.npy" else 32767
    images = []
    for i, pixels in enumerate((film, marked)):
        path = tmp_path / f"{i}{name}"
        if name.endswith(".dcm"):
            pytest.importorskip("pydicom")
            window = {"WindowCenter": 2048, "WindowWidth": 4096} if name == "b.dcm" else {}
            write_dicom(path, pixels, BitsStored=16, HighBit=15, **window)
        else:
            save(path, pixels.astype(np.int16 if name == "n.npy" else np.uint16))
        images.append(data.read_image(path)[0])
    one, two = images
    rest = torch.ones_like(one, dtype=torch.bool)
    rest[100 : 100 + size, 50 : 50 + size] = False
    assert (two[~rest] == 1).all() and (one[rest] - two[rest]).abs().max() < 0.02
    assert len((two[rest] * 255).round().unique()) > 110 and two[rest].std() > 0.15


def test_one_white_for_a_set_of_16_bits(tmp_path, photo):
    for end in (".png", ".npy"):
        paths = [str(save(tmp_path / f"{name}{end}", film)) for name, film in
                 (("dark", photo.astype(np.uint16)), ("light", photo.astype(np.uint16) * 16))]
        alone = data.ImageSet(paths, 512)[[0, 1], 0][0]
        dark, light = data.ImageSet(paths, 512, white=4095)[[0, 1], 0][0]
        assert (alone[0] - alone[1]).abs().max() < 0.01  # by their bits they look alike
        assert abs(dark.max() - photo.max() / 4095) < 0.003 and light.max() > 0.9
    assert data.read_image(paths[1], white=255).max() == 1  # beyond white is white


def test_list_images(tmp_path, capsys):
    for name in ("b.png", "sub/a.JPG", ".hidden.png", "notes.txt"):
        write(tmp_path / name, "")
    assert data.list_images(tmp_path) == [str(tmp_path / "b.png"), str(tmp_path / "sub/a.JPG")]
    assert "1 files are no images and left out" in capsys.readouterr().err
    fails(lambda: data.list_images(tmp_path / "none"), "none", "No such file")
    (tmp_path / "empty").mkdir()
    fails(lambda: data.list_images(tmp_path / "empty"), "empty", "found none")


def test_linked_folders_are_followed_and_loops_end(folder, tmp_path, monkeypatch):
    root = tmp_path / "films"
    save(root / "sub/a.png", np.zeros((40, 40), np.uint8))
    (root / "link").symlink_to(folder / "images")
    (root / "again").symlink_to(root / "link")
    (root / "sub/up").symlink_to(root)
    found = [Path(path).relative_to(root).as_posix() for path in data.list_images(root)]
    linked = [name.split("/")[1] for name in found if name.startswith(("link/", "again/"))]
    assert "sub/a.png" in found and len(found) == 6
    assert sorted(linked) == ["a0.png", "a1.png", "b0.png", "c0.png", "c1.png"]
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("images"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    fails(lambda: data.list_images(folder), folder / "images", "Permission denied")


# ---- Lists and reports


def test_read_list(tmp_path):
    # A byte order mark, a blank line, spaces, a tab and commas
    text = "\ufeffa.png 0 1 1 \n\nchest 1 of 2.png 1 0 0\nsub/b.dcm\t0 0 0\nc,d.png, 1,0.0, 1,\n"
    names, labels = data.read_list(write(tmp_path / "l.txt", text))
    assert names == ["a.png", "chest 1 of 2.png", "sub/b.dcm", "c,d.png"]
    assert labels.dtype == torch.float32
    assert labels.tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 0, 1]]
    path = write(tmp_path / "l.txt", "1.2.276.0.7230010\n1.2.276.0.7230011\n")  # SIIM
    names, labels = data.read_list(path)
    assert names == ["1.2.276.0.7230010", "1.2.276.0.7230011"] and labels.shape == (2, 0)


@pytest.mark.parametrize("text, line", [
    ("a.png 0 1\nb.png 1\n", 2), ("a.png 0\nb.png -1\n", 2), ("a.png 0\nb.png x\n", 2),
    ("a.png 0\nb.png 1\na.png 0\n", 3), ("a.png 11\nb.png 1\n", "line 1:"), ("", "empty list")])
def test_a_bad_line_of_a_list_is_named(tmp_path, text, line):
    fails(lambda: data.read_list(write(tmp_path / "l.txt", text)), "l.txt", line)


def make_folder(root, photo, lists, files=()):
    """A small data set: lists {file: {name: labels}}, each image with different pixels."""
    for i, name in enumerate(dict.fromkeys(name for rows in lists.values() for name in rows)):
        save(root / "images" / name, np.roll(photo[:64, :64], i, 0))
    for file, rows in lists.items():
        write(root / file, "".join(f"{name} {labels}\n" for name, labels in rows.items()))
    for name, text in dict(files).items():
        write(root / name, text)
    return root


@pytest.fixture
def folder(tmp_path, photo):
    patients = "a0.png,1\na1.png,1\nb0.png,2\nc0.png,3\nimages/c1.png,4\n"
    return make_folder(
        tmp_path / "set", photo,
        {"train_1.txt": {"a0.png": "0 1"}, "train_list.txt": {"a0.png": "0 1", "a1.png": "1 0"},
         "val_list.txt": {"b0.png": "1 1"}, "test_list.txt": {"c0.png": "0 0", "c1.png": "1 0"}},
        {"classes.txt": "Edema\nNodule\n", "patients.csv": "image_path,patient_id\n" + patients})


def test_find_images(folder):
    found = data.find_images("nih", folder, ["a0.png", "images/a1.png", "b0.png"], None)
    assert found == [str(folder / "images" / name) for name in ("a0.png", "a1.png", "b0.png")]
    path = write(folder / "l.txt", "aa0.png 0\na1.png 0\n0.png 1\n")
    names = ["a1.png", "0.png", "x.png"]
    fails(lambda: data.find_images("nih", folder, names, path), path, "line 3: no image '0.png'",
          "2 of 3")
    names, _ = data.read_list(path)
    fails(lambda: data.find_images("csv", folder, names, path), path, "line 1: no image 'aa0.png'")


def test_read_reports(folder):
    path = write(folder / "training.csv", "\ufeff study , image_path , report_content\n"
                 '1, a0.png ,"Heart size normal, ""clear"" lungs.\nNo effusion."\n\n'
                 "2,images/b0.png,Edema.\n")
    paths, reports = data.read_reports(path, folder)
    assert paths == [str(folder / "images/a0.png"), str(folder / "images/b0.png")]
    assert reports == ['Heart size normal, "clear" lungs.\nNo effusion.', "Edema."]
    fails(lambda: data.read_reports(folder / "none.csv", folder), "none.csv: no such file")
    blank = write(path, HEAD + "a0.png,Edema.\nb0.png, \n")
    assert data.read_reports(blank, folder)[1] == ["Edema.", ""]


HEAD = "image_path,report_content\n"
OPEN = HEAD + 'a0.png,Clear.\na1.png,"The heart is normal\nb0.png,Clear.\n'  # a quote not closed


@pytest.mark.parametrize("text, parts", [
    ("", ["line 1", "image_path, report_content", "an empty file"]),
    ("image,report\n", ["line 1", "found image, report"]), (HEAD, ["found none"]),
    ("image_path,report_content,report_content\na0.png,x,y\n", ["line 1", "each once"]),
    (HEAD + ",Edema.\n", ["an image and its report"]),
    (HEAD + "a0.png,Edema.\nb0.png\n", ["line 3", "expected 2 fields", "found 1"]),
    (HEAD + "a0.png,x\nz.png,y\n", ["line 3", "'z.png'"]),
    (HEAD + "a0.png,x\na1.png,The heart is normal, the lungs are clear\n", ["line 3", "3 fields"]),
    (OPEN + 'c0.png,Tip "5 cm" above\n', ["line 3", "double quote"]),
    (OPEN, ["line 3", "double quote"]),
    (OPEN + 'c0.png,"\nc1.png,Clear.\n', ["line 3", "a row in a field"]),
    (HEAD + 'a0.png,x\na1.png,"two\nlines"\nb0.png,Clear. "x" y\nc1.png,"Clear."x\n',
     ["line 6", "double quote"]),
    (HEAD + "a0.png,x\na1.png,ok\n" + 'b0.png,"' + "long " * 40_000 + '"\n',
     ["line 4", "field larger"])])
def test_a_damaged_csv_is_refused_with_its_line(folder, text, parts):
    path = write(folder / "training.csv", text)
    fails(lambda: data.read_reports(path, folder), path, *parts)


# ---- Crops and batches


def test_random_resized_crop_follows_torchvisions_rule(monkeypatch):
    boxes, resize = [], data.resize
    axes = torch.arange(90.0), torch.arange(160.0)
    coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # a pixel knows its place
    monkeypatch.setattr(data, "resize",
                        lambda image, *how: boxes.append(image) or resize(image, *how))
    many = coordinates.expand(2000, -1, -1, -1)
    crops = data.random_resized_crop(many, 8, (0.1, 0.6), generator=seeded(0))
    assert crops.shape == (2000, 2, 8, 8)
    h, w = torch.tensor([box.shape[1:] for box in boxes]).T
    share, aspect = h * w / (90 * 160), w / h
    assert 0.09 < share.min() and share.max() < 0.61
    assert 0.3 < share.mean() < 0.4  # uniform, less what does not fit
    assert aspect.min() > 0.72 and aspect.max() < 1.38 and abs(aspect.log().mean()) < 0.05
    top, left = torch.stack([box[:, 0, 0] for box in boxes]).T
    assert abs((top / (90 - h).clamp(min=1)).mean() - 0.5) < 0.03
    assert abs((left / (160 - w)).mean() - 0.5) < 0.03
    boxes.clear()  # nothing of that area fits: the central crop of the nearest aspect
    data.random_resized_crop(coordinates[None], 8, (1.0, 1.0))
    assert boxes[0].shape == (2, 90, 120) and boxes[0][1, 0, 0] == 20


def test_crops_repeat_differ_and_take_any_shape(photo):
    image = torch.from_numpy(photo[None] / np.float32(255))

    def draw(images):
        return data.random_resized_crop(images, 96, generator=seeded(3))

    crops = draw(image.expand(5, -1, -1, -1))
    assert torch.equal(crops, draw([image] * 5)) and 0 <= crops.min() and crops.max() <= 1
    assert len({crop.numpy().tobytes() for crop in crops}) == 5
    assert draw([image[:, :100], image[:, :, :200]]).shape == (2, 1, 96, 96)
    whole = data.random_resized_crop(image[None], 128, (1.0, 1.0), (1.0, 1.0))[0]
    assert torch.equal(whole, data.resize(image, 128))


def test_half_of_the_crops_are_flipped():
    images = torch.arange(12.0).reshape(1, 1, 3, 4).expand(400, -1, -1, -1) / 12
    plain, flipped = (data.crop_and_flip(images, seeded(0), 3, 0.9, flip)
                      for flip in (False, True))
    mirrored = (flipped == plain.flip(-1)).all((1, 2, 3))
    assert ((flipped == plain).all((1, 2, 3)) ^ mirrored).all() and 150 < mirrored.sum() < 250


def test_normalize():
    grey = torch.full((1, 1, 2, 2), 0.75)
    assert torch.equal(data.normalize(grey, 0.5, 0.25), torch.ones(1, 1, 2, 2))
    images = torch.rand(3, 1, 20, 20, generator=seeded(0)) * torch.tensor(
        [1.0, 0.5, 0.0])[:, None, None, None]
    own = data.normalize(images).numpy()  # each image by itself; one of a single grey stays finite
    for image, found in zip(images.numpy(), own):
        np.testing.assert_allclose(found, (image - image.mean()) / (image.std() + 1e-3), atol=1e-5)


@pytest.fixture(scope="module")
def paths(tmp_path_factory, photo):
    """11 images of 48 x 48; and 3 of other shapes and depths."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(11):
        save(folder / f"{i:02d}.png", photo[i * 40 : i * 40 + 48, :48])
    save(folder / "wide.npy", photo[:48, :90])
    save(folder / "x_tall.png", photo[:100, :60].astype(np.uint16) * 257)
    save(folder / "y_big.jpg", photo)
    return data.list_images(folder)


def test_image_set(paths):
    same, mixed = data.ImageSet(paths[:11], 48), data.ImageSet(paths, 40)
    for image_set in (same, mixed):
        before = [image_set[[i], 0][0][0] for i in range(len(image_set))]
        shapes = {tuple(image.shape) for image in before}
        assert len(before) == len(image_set) and shapes == {(1, image_set.size, image_set.size)}
        assert image_set.preload() is image_set and image_set.cache is not None
        order = torch.randperm(len(image_set), generator=seeded(0)).tolist()
        images, indices = image_set[order, 0]
        assert torch.equal(images, torch.stack([before[i] for i in order]))
        assert indices.tolist() == order
    assert torch.equal(data.ImageSet(paths[:1], 48)[[0], 0][0][0], data.read_image(paths[0]))
    wide = data.read_image(paths[11])[:, :, 21:69]  # centre crop
    assert torch.equal(data.ImageSet(paths[11:12], 48)[[0], 0][0][0], wide)
    large = data.ImageSet(paths, 40).preload(limit=1000)
    assert large.cache is None  # read when asked for
    many = data.ImageSet(paths * 20, 40).preload()  # by several processes, in order
    assert len(many.cache) == 280
    assert all(torch.equal(a, b) for a, b in zip(many.cache, mixed.cache * 20))


@pytest.mark.parametrize("preload", [False, True])
def test_train_batches_depend_on_the_step_alone(paths, preload):
    crop = functools.partial(data.random_resized_crop, size=32)

    def steps(start, stop, workers=0, rank=0, world=1):
        image_set = data.ImageSet(paths, 48, crop, seed=5)
        image_set.preload() if preload else None
        return list(data.train_batches(image_set, 4, start, stop, 5, rank, world, workers))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a machine of one core warns of two workers
        first, later, worked = steps(0, 9), steps(5, 9), steps(0, 9, workers=2)
    assert first[0][0].shape == (4, 1, 32, 32) and first[0][0].dtype == torch.float32
    for (a, i), (b, j) in list(zip(first[5:], later)) + list(zip(first, worked)):
        assert torch.equal(a, b) and i.tolist() == j.tolist()
    order = torch.cat([index for _, index in first]).tolist()
    assert sorted(order[:14]) == sorted(order[14:28]) == list(range(14))
    assert order[:14] != order[14:28]
    shares = [torch.cat([index for _, index in steps(0, 4, rank=rank, world=2)]).reshape(4, 4)
              for rank in range(2)]  # two processes take turns in the same row
    assert torch.cat(shares, 1).flatten()[:28].tolist() == order[:28]
    assert not torch.equal(first[0][0][0], first[3][0][0])


def test_eval_batches_cover_everything_once(paths):
    image_set = data.ImageSet(paths, 48)
    batches = list(data.eval_batches(image_set, 4))
    assert [len(images) for images, _ in batches] == [4, 4, 4, 2]
    assert torch.cat([i for _, i in batches]).tolist() == list(range(14))
    shares = [torch.cat([i for _, i in data.eval_batches(image_set, 4, rank, 3)]).tolist()
              for rank in range(3)]
    assert sorted(sum(shares, [])) == list(range(14)) and shares[1] == [1, 4, 7, 10, 13]


def test_a_truncated_image_ends_a_run_with_its_line(paths, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(Path(paths[0]).read_bytes()[:300])
    image_set = data.ImageSet([paths[0], str(bad)], 48)
    fails(image_set.preload, bad)
    fails(data.ImageSet(paths * 20 + [str(bad)], 48).preload, bad)  # read by several processes
    for workers in (0, 1):
        with pytest.raises(common.InputError) as error:
            list(data.eval_batches(image_set, 2, workers=workers))
        assert str(error.value).startswith(f"{bad}: expected a complete")  # no traceback before it
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL  # torch's would raise a second time


def test_image_sets_and_batches_work_where_workers_are_spawned(paths, tmp_path):
    code = f"""
import sys, types, functools, multiprocessing
sys.path.insert(0, {str(Path(data.__file__).parent)!r})
import data
from support import script
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn", force=True)
    import torch
    data.sys = script.sys = types.SimpleNamespace(platform="darwin", stderr=sys.stderr)
    paths = {paths!r}
    crop = functools.partial(data.random_resized_crop, size=24)
    sets = [data.ImageSet(paths, 48, crop, 3) for _ in range(2)]
    one, two = (list(data.train_batches(s, 4, 0, 3, 3, workers=w)) for s, w in zip(sets, (0, 1)))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(one, two))
    read = functools.partial(data.read_bytes, side=16)
    assert len(data.over_images(read, paths * 20)) == 20 * len(paths)
    print("equal")
"""
    write(tmp_path / "main.py", code)
    run = subprocess.run([sys.executable, tmp_path / "main.py"], capture_output=True, text=True)
    assert run.stdout == "equal\n", run.stderr[-2000:]


# ---- Data sets: lists and tables


def test_parts_of_lists_and_their_classes(folder, tmp_path, photo):
    parts, classes = data.read_parts("csv", folder)
    assert classes == ["Edema", "Nodule"] and list(parts) == ["train", "val", "test"]
    assert parts["val"].labels.shape == (1, 2)
    assert parts["test"].paths == [str(folder / "images" / name) for name in ("c0.png", "c1.png")]
    assert len(data.read_parts("csv", folder, ratio=1)[0]["train"].names) == 1
    fails(lambda: data.read_parts("csv", folder, ratio=10), "train_10.txt: no such list")
    write(folder / "classes.txt", "Edema\nEdema\n")
    fails(lambda: data.read_parts("csv", folder), "different classes (Edema, Edema)")
    (folder / "classes.txt").unlink()
    assert data.read_parts("csv", folder)[1] == ["class 1", "class 2"]
    fails(lambda: data.read_parts("nih", folder), "expected 14 labels a line", "found 2")
    for layout in ("splits/covid1/{}.txt", "covid1/iscovid_{}.txt"):  # ours, the official code's
        lists = [layout.format(part) for part in ("train", "val", "test")]
        rows = dict.fromkeys(lists, {"a.png": "0", "b.png": "1"})
        covid = make_folder(tmp_path / layout[:6], photo, rows)
        parts, classes = data.read_parts("covid", covid, "covid1")
        assert classes == ["covid"] and parts["test"].names == ["a.png", "b.png"]
    for arguments in (("covid1", 10), ("covid2",), ("",)):
        fails(lambda: data.read_parts("covid", covid, *arguments), "no such list", *arguments)


def table(root, name, lines):
    write(root / name, "\n".join(lines) + "\n")
    return root


def read_table(layout, root, *arguments, **options):
    """{part: (names, labels)} of a table whose images are not there."""
    with mock.patch.object(data, "find_images", lambda data, root, names, *_: names):
        parts, _ = data.read_parts(layout, root, "", *arguments, **options)
    return {name: (part.names, part.labels) for name, part in parts.items()}


def test_a_table_of_ones_own_splits_by_patient(tmp_path):
    lines = ["image,Edema,Mass,patient"]
    lines += [f"{i}.png,{i % 2},{['', '1.0', '0.0'][i % 3]},p{i // 4}" for i in range(400)]
    root = table(tmp_path, "labels.csv", lines)
    parts = read_table("csv", root)
    sizes = {part: len(names) for part, (names, _) in parts.items()}
    assert sum(sizes.values()) == 400
    assert sizes["train"] > 220 and sizes["val"] > 16 and sizes["test"] > 40
    people = {part: {int(n[:-4]) // 4 for n in names} for part, (names, _) in parts.items()}
    assert not people["train"] & people["test"] and not people["train"] & people["val"]
    names, labels = parts["train"]
    expected = [[int(n[:-4]) % 2, int(n[:-4]) % 3 == 1] for n in names]
    assert torch.equal(labels, torch.tensor(expected).float())
    few = read_table("csv", root, ratio=10)
    assert few["test"][0] == parts["test"][0] and set(few["train"][0]) < set(names)
    assert 4 <= len(few["train"][0]) < 80
    # More records do not move a patient to another part
    again = read_table("csv", table(tmp_path, "labels.csv", [*lines, "new.png,1,0,p999"]))
    assert [n for n in again["test"][0] if n != "new.png"] == parts["test"][0]
    fails(lambda: data.read_parts("csv", root, "covid1"), "no such list", "--split covid1")


def test_no_patient_falls_into_two_parts_beside_a_given_split(tmp_path):
    """Images without a part follow their patient; a name that only begins with one is a class."""
    parts = ["" if i % 2 or i >= 20 else "test" for i in range(200)]
    lines = [f"{i}.png,{i % 3 % 2},p{i // 2},{part}" for i, part in enumerate(parts)]
    root = table(tmp_path, "labels.csv", ["image,patient_age,patient,split", *lines])
    assert data.table_classes("csv", root / "labels.csv") == ["patient_age"]
    found = [{int(name[:-4]) for name in names} for names, _ in read_table("csv", root).values()]
    assert set(range(20)) <= found[2] and all(found)
    people = [{i // 2 for i in part} for part in found]
    assert len(set.union(*people)) == sum(map(len, people)) == 100


def test_a_split_depends_on_the_image_and_says_that_patients_are_unknown(tmp_path, capsys):
    names, expected = [f"f{i:03d}.png" for i in range(200)], None
    for form in ("{}", "images/{}", f"{tmp_path}/images/{{}}", "./{}"):
        rows = [f"{form.format(name)},{i % 2}" for i, name in enumerate(names)]
        parts = read_table("csv", table(tmp_path, "labels.csv", ["image,Edema", *rows]))
        found = [[os.path.basename(name) for name in listed] for listed, _ in parts.values()]
        expected = expected or found
        assert found == expected and "of 200 of 200" in capsys.readouterr().err, form
    rows = [f"{name},{i % 2},p{i}" for i, name in enumerate(names)]
    read_table("csv", table(tmp_path, "labels.csv", ["image,Edema,patient", *rows]))
    assert not capsys.readouterr().err
    rows[7] = "f007.png,1,"
    read_table("csv", table(tmp_path, "labels.csv", ["image,Edema,patient", *rows]))
    assert "of 1 of 200 images, such as f007:" in capsys.readouterr().err
    given = ("train", "valid", "test")
    rows = [f"{name},{i % 2},{given[i % 3]}" for i, name in enumerate(names)]
    parts = read_table("csv", table(tmp_path, "labels.csv", ["image,Edema,split", *rows]))
    assert [listed for listed, _ in parts.values()] == [names[i::3] for i in range(3)]
    assert not capsys.readouterr().err  # nothing is divided here
    read_table("csv", table(tmp_path, "labels.csv", ["image,Edema,split", "g.png,1,", *rows]))
    assert "of 201 of 201 images" in capsys.readouterr().err  # one image is


def test_minus_1_is_what_the_option_says(tmp_path, folder):
    rows = [f"{i}.png,{(0, 1, -1)[i % 3]},{('-1.0', '1', '')[i % 3]},{part}"
            for i, part in enumerate(["train", "val", "test"] * 3)]
    root = table(tmp_path / "own", "labels.csv", ["image,Edema,Mass,split", *rows])
    fails(lambda: read_table("csv", root), "labels.csv: line 2", "'-1.0'", "--uncertain")
    write(tmp_path / "own/test_list.txt", "1.png 0 1\n")  # one list asks for the others
    fails(lambda: data.read_parts("csv", tmp_path / "own"), "train_list.txt: no such list")
    (tmp_path / "own/test_list.txt").unlink()
    for uncertain, value in (("ones", 1), ("zeros", 0), ("ignore", float("nan"))):
        parts = read_table("csv", root, uncertain=uncertain)
        assert np.array_equal(parts["train"][1], [[0, value]] * 3, equal_nan=True)
        assert np.array_equal(parts["test"][1], [[value, 0]] * 3, equal_nan=True)
        write(folder / "val_list.txt", "b0.png 1 -1\n")
        labels = data.read_parts("csv", folder, uncertain=uncertain)[0]["val"].labels
        assert np.array_equal(labels, [[1, value]], equal_nan=True)
    fails(lambda: data.read_parts("csv", folder), "val_list.txt: line 1", "--uncertain")


@pytest.mark.parametrize("folder, name", [
    ("images", "Data_Entry_2017.csv"), ("images", "Data_Entry_2017_v2020.csv"),
    ("images_{:03d}/images", "Data_Entry_2017.csv"), ("all_classes", "Data_Entry_2017_v2020.csv")])
def test_nih_is_found_as_it_is_published(tmp_path, photo, folder, name):
    rows = ["Image Index,Finding Labels,Follow-up #,Patient ID"]
    for i in range(60):
        path = tmp_path / folder.format(i // 20 + 1) / f"{i // 2:08d}_{i % 2:03d}.png"
        save(path, photo[i : i + 8, :8])
        rows.append(f"{path.name},{('No Finding', 'Mass|Hernia')[i % 2]},0,{i // 2}")
    parts, classes = data.read_parts("nih", table(tmp_path, name, rows))
    assert sum(len(part.paths) for part in parts.values()) == 60
    for part in parts.values():
        assert all(map(os.path.isfile, part.paths))
        for name, row in zip(part.names, part.labels):
            found = [c for c, y in zip(classes, row) if y]
            assert found == ["Mass", "Hernia"] * name.endswith("1.png")
    people = [{name[:8] for name in part.names} for part in parts.values()]
    assert sum(map(len, people)) == len(set.union(*people)) == 30
    listed = [row[:16] for row in rows[1:] if row[:8] in ("00000007", "00000009")]
    labelled = [f"{name} 0 1" for name in listed]  # as MRM publishes NIH's
    table(tmp_path, "test_list.txt", labelled)  # all others are for training
    parts, _ = data.read_parts("nih", tmp_path)
    assert parts["test"].names == listed and len(parts["train"].names) > 3 * len(parts["val"].names)


@pytest.mark.parametrize("prefix", ["", "CheXpert-v1.0/", "CheXpert-v1.0-small/",
                                    "CheXpert-v1.0 batch 1 (validate & csv)/"])
def test_chexpert_is_read_in_every_size(tmp_path, prefix):
    header = "Path,Sex,Cardiomegaly,Atelectasis,Consolidation,Edema,Pleural Effusion,Fracture"
    rows = [f"{prefix}train/patient{i:05d}/study1/view1_frontal.jpg,Male,1.0,,0.0,-1.0,-1,-1"
            for i in range(80)]
    table(tmp_path, "train.csv", [header, *rows])
    test = f"{prefix}valid/patient00081/study1/view1_frontal.jpg,Male,1.0,0.0,0.0,0.0,1.0,"
    parts = read_table("chexpert", table(tmp_path, "valid.csv", [header, test]))
    names, labels = parts["train"]
    assert names[0].startswith("train/patient000") and len(parts["test"][0]) == 1
    assert dict(zip(data.CHEXPERT_CLASSES, labels[0].tolist())) == {
        "Atelectasis": 0, "Cardiomegaly": 1, "Consolidation": 0, "Edema": 1, "Pleural Effusion": 1}


def test_rsnas_boxes_are_one_label_a_patient(tmp_path):
    rows = ["patientId,x,y,width,height,Target"]
    rows += [f"p{i},,,,,0" for i in range(40)] + ["q,1,2,3,4,1", "q,5,6,7,8,1"]
    parts = read_table("rsna", table(tmp_path, "stage_2_train_labels.csv", rows))
    every = {n: float(y) for names, labels in parts.values() for n, y in zip(names, labels)}
    assert len(every) == 41 and every.pop("stage_2_train_images/q.dcm") == 1
    assert set(every.values()) == {0.0}
    table(tmp_path, "stage_2_train_labels.csv", [*rows, "q,,,,,0"])
    fails(lambda: read_table("rsna", tmp_path), "line 44", "q.dcm' is listed before")


@pytest.mark.parametrize("layout, name, lines, message", [
    ("csv", "labels.csv", ["name,Edema", "a.png,1"], "line 1: expected the columns image, name"),
    ("csv", "labels.csv", ["image", "a.png"], "line 1: expected a header `image,finding"),
    ("csv", "labels.csv", ["image,F,F", "a.png,1,0"], "line 1: .* each once"),
    ("csv", "labels.csv", ["image,Edema", "a.png,2"], "line 2: expected labels .*found '2'"),
    ("csv", "labels.csv", ["image,Edema", "a.png,yes"], "line 2: .* found 'yes'"),
    ("csv", "labels.csv", ["image,Edema", "a.png,1", "./a.png,0"], "line 3: 'a.png' is listed"),
    ("csv", "labels.csv", ["image,Edema,split", "a.png,1,dev"], "line 2: .* found 'dev'"),
    ("csv", "labels.csv", ["image,Edema,split", "a.png,1,train"], "images of the part val"),
    ("csv", "labels.csv", ["image,Edema", "a.png,1,0"], "line 2: expected 2 fields, .*found 3"),
    ("rsna", "stage_2_train_labels.csv", ["patientId,x", "a,1"], "the columns patientId, Tar"),
    ("chexpert", "train.csv", ["Path,Edema", "a.jpg,1"], "line 1: expected the columns Path")])
def test_bad_tables_are_one_line(tmp_path, layout, name, lines, message):
    root = table(tmp_path, name, lines)
    with pytest.raises(common.InputError, match=message) as error:
        read_table(layout, root)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_images_that_are_missing_or_damaged_are_left_out_where_asked(folder, capsys):
    write(folder / "train_list.txt", "a3.png 1 1\na0.png 0 1\na2.png 0 0\na1.png 1 0\n")
    (folder / "images/a2.png").write_bytes((folder / "images/a1.png").read_bytes()[:300])
    fails(lambda: data.read_parts("csv", folder), "train_list.txt: line 1", "a3.png", "1 of 4")
    part = data.read_parts("csv", folder, skip_bad=True)[0]["train"]
    assert part.names == ["a0.png", "a1.png"] and part.labels.tolist() == [[0, 1], [1, 0]]
    assert [Path(path).name for path in part.paths] == part.names and len(part.owners) == 2
    said = capsys.readouterr().err
    assert "train_list.txt: 2 of 4 images of train are left out, the first:" in said
    assert said.count("left out") == 1 and "a3.png: no such image" in said
    for path in folder.glob("images/b*"):
        path.unlink()
    fails(lambda: data.read_parts("csv", folder, skip_bad=True), "val_list.txt", "the part val")


# ---- Patients and the audit


def test_units_are_patients_where_they_are_known(folder):
    def units(*names):
        return data.units(data.identify(folder, names))

    assert units("a0.png", "c1.png", "z.png") == ["1", "4", "z"]
    (folder / "patients.csv").unlink()
    mimic = "p10/p10000032/s50414267/02aa804e-bde0afdd"
    expected = {
        "00000013_005.png": "00000013", str(folder / "images/00000013_006.png"): "00000013",
        "images_004/images/00000013_007.png": "00000013", "100000013_005.png": "100000013_005",
        "20230115_001.png": "20230115_001",  # a date
        "CheXpert/train/patient00007/study1/view1_frontal.jpg": "patient00007",
        f"files/{mimic}.jpg": "p10000032", "p10000032.png": "p10000032", "x.png": "x"}
    assert units(*expected) == list(expected.values())
    copies = data.identify(folder, [f"{mimic}.dcm", f"images/{mimic}.jpg", f"/old/{mimic}.jpg"])
    assert len(set(copies)) == 1
    write(folder / "labels.csv",
          "image,Edema,patient\na0.png,1,p1\nc1.png,0,\n00000013_005.png,1,p9\n")
    write(folder / "records.csv", "image_path,patient_id\na0.png,r1\nc1.png,r2\n")  # blank: r2
    assert units("a0.png", "c1.png", "00000013_005.png") == ["p1", "r2", "p9"]
    write(folder / "patients.csv", "image,patient\na0.png,1\n")
    fails(lambda: units("a0.png"), "patients.csv", "image_path, patient_id")
    write(folder / "classes.txt", "Edema\n")  # of a table's columns it chooses
    assert data.table_classes("csv", folder / "labels.csv") == ["Edema"]
    write(folder / "demo.json", "{}")  # drawn images are called like NIH's
    (folder / "patients.csv").unlink()
    assert units("00000014_005.png", "x.png") == ["demo 00000014", "demo x"]


def test_an_image_and_its_patient_are_excluded_however_they_are_written(tmp_path, photo, capsys):
    """4 patients with 3 images each, named as MIMIC-CXR names them; the images may be a link."""
    names = [f"p10/p1000000{p}/s5000000{k}/{p}{k}a-b.png" for p in range(4) for k in range(3)]
    root, real = tmp_path / "set", tmp_path / "store"
    for i, name in enumerate(names):
        save(real / name, np.roll(photo[:40, :40], i))
    write(root / "training.csv", HEAD + "".join(f"{name},Clear.\n" for name in names))
    (root / "images").symlink_to(real)
    paths = data.read_reports(root / "training.csv", root)[0]
    written = [names[4], f"images/{names[4]}", f"{root}/images/{names[4]}", f"{real}/{names[4]}",
               f"files/{names[4]}", f"./{names[4]}"]
    for name in written:  # one image of the second of four patients
        path = write(tmp_path / "x.txt", f"{name} 0 1\n")
        assert data.not_excluded(root, paths, path) == [0, 1, 2, 6, 7, 8, 9, 10, 11], name
    assert not capsys.readouterr().err
    listed = write(tmp_path / "x.csv", f"study,image_path\n1,files/{names[0]}\n2,{names[11]}\n")
    assert data.not_excluded(root, paths, listed) == [3, 4, 5, 6, 7, 8]
    path = write(tmp_path / "x.txt", f"{names[4]}\n/elsewhere/a.png\nb.png\n")
    assert len(data.not_excluded(root, paths, path)) == 9
    said = "2 of 3 names are of no image and no patient here, the first: '/elsewhere/a.png'"
    assert said in capsys.readouterr().err


def test_names_of_ones_own_are_excluded_however_they_are_written(folder, tmp_path, monkeypatch):
    link = tmp_path / "link"
    link.symlink_to(folder)
    (folder / "patients.csv").unlink()
    monkeypatch.chdir(tmp_path)
    for root in ("set", "./set", f"{tmp_path}/set", "link"):
        paths = data.find_images("csv", root, ["a0.png", "images/a1.png", "b0.png"], None)
        for name in ("a1.png", "images/a1.png", f"{os.path.abspath(root)}/images/a1.png",
                     "images//a1.png", r"images\a1.png", "a1"):
            path = write(tmp_path / "x.txt", f"{name}\n")
            assert data.not_excluded(root, paths, path) == [0, 2], (root, name)
    before = data.marks(data.identify(folder, ["images/a1.png"]))
    assert data.seen(data.identify(link, ["a0.png", "a1.png"]), before) == [False, True]
    assert data.seen([("7", ""), ("a", "7")], data.marks([("b", "7")])) == [False, True]


def audit(root, capsys, **options):
    status = data.audit(data.AuditConfig(root=str(root), **options))
    return status, capsys.readouterr().out


def test_the_audit_finds_what_two_parts_share(folder, tmp_path, capsys):
    status, text = audit(folder, capsys)
    assert status == 0 and "nothing wrong" in text and "Edema 1, Nodule 0" in text
    (folder / "patients.csv").rename(tmp_path / "patients.csv")
    status, text = audit(folder, capsys)
    assert status == 0 and "nothing wrong" not in text and "of 5 no patient is known" in text
    (tmp_path / "patients.csv").rename(folder / "patients.csv")
    write(folder / "test_list.txt", "c0.png 0 0\nc1.png 1 0\na1.png 1 0\nd.png 0 1\n")
    Image.open(folder / "images/b0.png").save(folder / "images/d.png", compress_level=0)
    (folder / "images/c0.png").write_bytes((folder / "images/c0.png").read_bytes()[:500])
    path = write(tmp_path / "before.txt", "c1.png\n")
    status, text = audit(folder, capsys, pretraining=str(path))
    assert status == 1 and "train and test: 1 patients in both: 1" in text
    assert "val and test: 1 images with the same pixels: b0.png = d.png" in text
    assert "c0.png: expected a complete" in text
    assert "test and pretraining: 1 patients in both: 4" in text
    write(path, "elsewhere/c1.jpg\n")
    data.audit(data.AuditConfig(root=str(folder), pretraining=str(path)))
    assert "none of its 1 names, such as 'elsewhere/c1.jpg', is of an" in capsys.readouterr().err


# ---- Masks


def test_masks_of_a_folder_and_what_is_wrong_with_them(tmp_path):
    mask = np.zeros((20, 30), np.uint8)
    mask[4:9, 20:28] = 255
    for name, pixels in {"a": mask, "bits": mask > 0, "ones": mask // 255}.items():
        save(tmp_path / f"{name}.png", pixels)
    for source in data.find_masks(tmp_path, ["a", "bits", "ones"]):
        assert (data.read_mask(source, (20, 30), "film") == (mask > 0)).all()
    three = np.maximum(mask, (np.arange(30) < 5) * np.uint8(7))
    for pixels in (np.maximum(mask, 7), three, mask | 255):
        source = save(tmp_path / "wrong.png", pixels)
        fails(lambda: data.read_mask(source, (20, 30), "film"), "wrong.png: expected a mask of",
              "the values 0 and one other")
    source = save(tmp_path / "small.png", mask[:, 1:])
    fails(lambda: data.read_mask(source, (20, 30), "film"), "(20, 30) pixels, as film", "(20, 29)")
    fails(lambda: data.find_masks(tmp_path, ["a", "gone"]), "gone.png: no such mask (1 of 2 are")
    assert data.find_masks(tmp_path, ["a", "gone"], {1})[1] is None


def test_a_mask_is_its_indices_and_has_no_transparency(tmp_path):
    mask = np.zeros((20, 30), bool)
    mask[4:9, 20:28] = True
    path = str(tmp_path / "m.png")
    for palette in ([0] * 3 + [255, 0, 0], [9] * 6):  # red, alike
        picture = Image.fromarray(mask.astype(np.uint8), "P")
        picture.putpalette(palette)
        picture.save(path)
        assert (data.read_mask(path, (20, 30), "film") == mask).all()
        picture.save(path, transparency=0)
        fails(lambda: data.read_mask(path, (20, 30), "film"), "m.png", "without transparency")
    picture.putpalette([255] * 3 + [0] * 3)  # as Pillow's quantize has it: which is the object?
    picture.save(path)
    fails(lambda: data.read_mask(path, (20, 30), "film"), "m.png", "the darkest")
    three = Image.fromarray(mask.astype(np.uint8) + (np.arange(30) < 5) * np.uint8(2), "P")
    three.putpalette([0] * 3 + [255] * 6)
    three.save(path)
    fails(lambda: data.read_mask(path, (20, 30), "film"), "m.png", "3 values")
    for bands in ("LA", "RGBA"):
        planes = [Image.new("L", (30, 20))] * len(bands)
        planes[-1] = Image.fromarray(mask * np.uint8(255))
        Image.merge(bands, planes).save(path)
        fails(lambda: data.read_mask(path, (20, 30), "film"), "m.png", f"mode {bands}")
    planes = [planes[-1]] * 3 + [Image.new("L", (30, 20), 255)]  # nothing is transparent
    Image.merge("RGBA", planes).save(path)
    assert (data.read_mask(path, (20, 30), "film") == mask).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_crops_and_flips_move_image_and_mask_together(tmp_path, workers):
    """The mask is where the film is bright: it stays so, and keeps two values, through it all."""
    rng, paths, masks = np.random.default_rng(0), [], []
    for i in range(6):
        film = skimage.transform.resize(rng.random((5, 6)), (70 + i, 90)) > 0.55
        paths.append(save(tmp_path / f"{i}.png", (50 + 150 * film).astype(np.uint8)))
        masks.append(str(save(tmp_path / f"mask{i}.png", film)))
    augment = functools.partial(data.crop_and_flip, side=32, min_crop=0.3, flip=True)
    whole = data.ImageSet(paths, 64, masks=masks)
    crops = data.ImageSet(paths, 64, augment, masks=masks)
    loaded = data.ImageSet(paths, 64, augment, masks=masks).preload()
    batches = list(data.train_batches(crops, 6, 0, 4, seed=1, workers=workers))
    again = data.train_batches(loaded, 6, 0, 4, seed=1)
    for (pairs, rows), (second, _) in zip(batches, again, strict=True):
        assert pairs.shape == (6, 2, 32, 32) and torch.equal(pairs, second)
        image, mask = pairs.unbind(1)
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert ((image > 0.49) == (mask > 0.5)).float().mean() > 0.97
        assert not torch.equal(pairs, data.resize(whole[rows, 0][0], (32, 32)))
    assert whole[[0], 0][0].shape == (1, 2, 64, 64)  # all of the film, and not its centre


def test_a_resized_mask_takes_the_nearest_pixel():
    pair = torch.rand(2, 12, 20).round()
    found = data.resize(pair, (7, 9))[1]
    rows, columns = ((torch.arange(n) + 0.5) * side // n for n, side in ((7, 12), (9, 20)))
    assert torch.equal(found, pair[1][rows.long()][:, columns.long()])


# ---- Pairs


@pytest.mark.parametrize("shape, size", [
    ((192, 192), 32), ((181, 217), 64), ((50, 90), 33), ((40, 40), 100), ((192, 192), 191)])
def test_the_background_of_a_slice_survives_every_resize(shape, size):
    y, x = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    slice_ = np.where(np.hypot(x / 0.6, y / 0.5) < 1, 0.3 * np.cos(9 * x) - 0.2, -1)
    slice_ = torch.from_numpy(slice_.astype(np.float32))[None]
    fitted = data.fit_square(slice_, size)
    assert fitted.shape == (1, size, size) and fitted.dtype == torch.float32
    H, W = (round(side * size / max(shape)) for side in shape)

    def scale(image):
        return F.interpolate(image.double()[None], (H, W), mode="bilinear", antialias=True)[0]

    place = np.s_[:, (size - H) // 2 : (size - H) // 2 + H, (size - W) // 2 : (size - W) // 2 + W]
    expected = torch.zeros(1, size, size, dtype=torch.bool)
    expected[place] = scale(slice_ != -1) > 1e-9  # the share of the foreground
    assert torch.equal(fitted != -1, expected) and 0.1 < expected.float().mean() < 0.5
    assert (fitted[place] - scale(slice_)).abs().max() < 2e-5  # its weights are float32


@pytest.mark.parametrize("noise, elastic", [(0, 0.0), (3, 0.0), (5, 2.0)])
def test_the_background_of_a_moved_slice_is_exact(noise, elastic):
    y, x = np.mgrid[-1:1:96j, -1:1:96j]
    a = np.where(np.hypot(x / 0.5, y / 0.6) < 1, 0.25, -1).astype(np.float32)
    a = torch.from_numpy(a)[None]
    for image in data.misalign(a, a.clone(), np.random.default_rng(1), noise, elastic)[:2]:
        assert abs((image != -1).float().mean() - (a != -1).float().mean()) < 0.08
        assert (image[:, 0] == -1).all() and (image[:, :, -1] == -1).all()
        assert torch.equal(data.fit_square(image, 48)[:, 0], torch.full((1, 48), -1.0))


def nifti(path, array, affine=None, slope=None):
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.Nifti1Image(array, np.diag([2.0, 3.0, 4.0, 1.0]) if affine is None else affine)
    image.header.set_xyzt_units("mm", "sec")
    if slope:
        image.header.set_slope_inter(*slope)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def test_a_nifti_with_a_slope_keeps_its_values_unit_and_axes(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    ramp = np.arange(1600, dtype=np.int16).reshape(40, 40, 1)
    source = nifti(tmp_path / "a.nii.gz", ramp, slope=(0.001, -0.5))
    image = data.read_slice(source, (-0.5, 1.1))
    assert image.shape == (1, 40, 40)
    data.write_slice(tmp_path / "out.nii.gz", image, source, (-0.5, 1.1))
    one, two = nibabel.load(source), nibabel.load(tmp_path / "out.nii.gz")
    assert one.shape == two.shape == (40, 40, 1) and (one.affine == two.affine).all()
    assert np.abs(one.get_fdata() - two.get_fdata()).max() < 1e-6
    assert one.header.get_zooms() == two.header.get_zooms() and two.get_data_dtype() == np.float32


def test_three_slices_of_a_volume_are_no_colours(tmp_path, photo):
    volume = np.stack([photo[:40, :40]] * 3, -1)
    path = nifti(tmp_path / "v.nii.gz", volume.astype(np.int16))
    save(tmp_path / "v.npy", volume / 255)
    for read in (data.read_image, data.read_slice):
        fails(lambda: read(path), "v.nii.gz", "(40, 40, 3)")
        read(tmp_path / "v.npy")  # these are colours


def test_a_blank_slice_is_read_where_it_may_be(tmp_path):
    black = np.zeros((40, 40), np.uint8)
    for name, array in (("a.npy", black - 1.0), ("b.png", black)):
        path = save(tmp_path / name, array)
        assert (data.read_slice(path, blank=True) == -1).all()
        fails(lambda: data.read_slice(path), name, "constant")


@pytest.mark.parametrize("other, refused", [
    ([[-1, 0, 0], [0, 1, 0], [0, 0, 1]], "('L', 'A')"), ([[0, 1, 0], [1, 0, 0], [0, 0, 1]], "('A'"),
    ([[1, 0, 0], [0, 0, 1], [0, 1, 0]], "('R', 'S')"), ([[1, 0, 0], [0, 1, 0], [0, 0, -1]], ""),
    ([[2, 0.1, 0], [-0.1, 2, 0], [0, 0, 5]], "")])
def test_pairs_of_nifti_lie_alike(tmp_path, photo, other, refused):
    """Mirrored, transposed, of another plane; but the direction of the slices, the size of a pixel
    and a small tilt do not matter."""
    affine = np.eye(4)
    for side in "AB":
        image = (photo[200:240, 200:240, None] / 127.5 - 1).astype(np.float32)
        nifti(tmp_path / "t" / side / "s.nii.gz", image, affine)
        affine[:3, :3] = other
    if refused:
        fails(lambda: data.Pairs(tmp_path / "t"), "B/s.nii.gz", "('R', 'A')", "as its A", refused)
    else:
        assert len(data.Pairs(tmp_path / "t")) == 1


def test_pairs_whose_numbers_mean_something_else_ask_for_their_range(tmp_path, photo):
    def pair(name, a, b, file="s.npy"):
        for side, image in (("A", a), ("B", b)):
            save(tmp_path / name / side / file, image)
        return tmp_path / name

    ramp, disc = np.arange(1600).reshape(40, 40), np.hypot(*(np.mgrid[:40, :40] - 19.5)) < 15
    twelve = pair("12", *[(ramp * 2).astype(np.uint16)] * 2, "s.png")
    fails(lambda: data.Pairs(twelve), twelve / "A", "--rescale")
    assert data.Pairs(twelve, rescale="0,4095")[[(0, 0)]][0].max() > 0.5
    grey = np.where(disc, 0.2 + photo[:40, :40] / 400, 0).astype(np.float32)
    both, one = pair("both", grey, grey), pair("one", grey * 2 - 1, grey)
    fails(lambda: data.Pairs(both), both / "A", "0 to 0.", "--rescale")
    fails(lambda: data.Pairs(one), one / "B", "0 to 0.", "--rescale")
    assert data.Pairs(one, rescale="-1,1,0,1").shape == (40, 40)
    fails(lambda: data.Pairs(one, rescale="-3,-2"), "more than half above it")
    ulp = np.linspace(-1, 1.0000001, 1600, dtype=np.float32).reshape(40, 40)
    assert data.Pairs(pair("ulp", ulp, -ulp))[[(0, 0)]][0].max() == 1
    b = data.Pairs(both, rescale="0,1").item(0, 0)[1]
    assert torch.equal(b[0] != -1, torch.from_numpy(disc))
    bright = np.where(disc, 0.5, -1)  # all of the object above 0
    assert len(data.Pairs(pair("bright", bright, bright))) == 1
    assert len(data.Pairs(pair("full", grey + 0.1, grey + 0.1), rescale="-1,1")) == 1  # said so
    wide = pair("wide", grey[5:], grey[5:])  # padding is no background
    fails(lambda: data.Pairs(wide, size=40), wide / "A", "--rescale")


@pytest.mark.parametrize("name, kind, channels", [
    ("s.npy", np.float16, 1), ("s.npy", np.float16, 3), ("u.npy", np.uint8, 1),
    ("u.npy", np.uint8, 3), ("d.png", np.uint16, 1), ("l.png", np.uint8, 1), ("l.png", np.uint8, 3),
    ("j.jpg", np.uint8, 1), ("j.jpg", np.uint8, 3), ("v.nii.gz", np.int16, 1)])
def test_a_slice_is_written_as_it_was_read(tmp_path, photo, name, kind, channels):
    """Read, written by the identity, read again: same type, range and values, to one step of the
    depth (JPEG: 12)."""
    path, out, grey = tmp_path / name, tmp_path / "out" / name, photo[:40, :36] / 255
    image = grey if channels == 1 else np.stack([grey, grey[::-1], grey[:, ::-1]], -1)
    top = 1 if kind == np.float16 else np.iinfo(kind).max
    stored = image.astype(kind) if top == 1 else (image * top).round().astype(kind)
    if name == "v.nii.gz":
        nifti(path, stored)
    else:
        save(path, stored, **{"quality": 95, "subsampling": 0} if name == "j.jpg" else {})
    read = data.read_slice(path, (0, top))
    step = {"j.jpg": 12 / 255, "s.npy": 2e-3}.get(name, 1.5 / top)
    assert read.shape == (channels, 40, 36)
    assert np.abs((read.numpy().transpose(1, 2, 0).squeeze() + 1) / 2 - image).max() < step
    data.write_slice(out, read, path, (0, top))
    assert (data.read_slice(out, (0, top)) - read).abs().max() < 2 * step
    if kind == np.uint16:  # 12 bits stay 12 bits
        data.write_slice(out, read, path, (0, 4095))
        assert (data.read_slice(out, (0, 4095)) - read).abs().max() < 1e-3
    for span in ((0, 1), (-1000, 1000), (0, 100000)) if name[-1] == "g" else ():  # B's, not A's
        data.write_slice(out, read, path, span)
        assert (data.read_slice(out, (0, top)) - read).abs().max() < 2 * step
    if name.endswith(".png"):
        assert Image.open(out).mode == Image.open(path).mode
    if name == "d.png":  # a CT as TIFF keeps its numbers
        for tiff in (np.int32(image * 1000 - 900), np.float32(image * 1000 - 900)):
            save(path := tmp_path / "ct.tif", tiff)
            data.write_slice(out, data.read_slice(path, (-1000, 200)), path, (-1000, 200))
            assert np.abs(np.array(Image.open(out)) - tiff).max() < 1e-3


def smooth():
    """A random smooth image (1, 64, 64)."""
    coarse = torch.randn(1, 1, 6, 6, generator=seeded(3))
    return F.interpolate(coarse, (64, 64), mode="bicubic", align_corners=True)[0].tanh()


@pytest.mark.parametrize("noise, elastic", [(3, 0.0), (5, 0.0), (0, 3.0), (3, 3.0)])
def test_the_true_displacement_registers_the_pair(noise, elastic):
    """f(a')[p + flow] = b' with f the identity: a and b are one image, misaligned apart."""
    image, inner = smooth(), np.s_[..., 14:-14, 14:-14]
    a, b, flow = data.misalign(image, image, np.random.default_rng(1), noise, elastic)
    registered = data.warp(a[None], flow[None])[0]
    assert (registered - b)[inner].abs().mean() < 0.1 * (a - b)[inner].abs().mean()


def test_a_level_is_degrees_of_rotation_and_twice_as_many_percent_of_shift_and_zoom():
    """Images of the coordinates show where each pixel comes from; a fit of the middle gives M and
    the shift. The extremes of 300 draws lie just inside the bounds."""
    side, level, found = 48, 4, []
    middle = np.s_[:, 16:32, 16:32]
    p = torch.from_numpy(np.mgrid[:side, :side] - (side - 1) / 2).float()
    plane = F.pad(p[middle].flatten(1), (0, 0, 0, 1), value=1.0).T  # (pixels, 3): y, x, 1
    for seed in range(300):
        moved, _ = data.misalign(p / 30, p / 30, np.random.default_rng(seed), level, 0, False)
        source = 30 * moved[middle].flatten(1).T
        fit = torch.linalg.lstsq(plane.double(), source.double()).solution  # (3, 2)
        zoom, angle = 1 / fit[:2].det().sqrt(), torch.atan2(fit[0, 1], fit[0, 0]).rad2deg()
        found.append([abs(angle), 100 * abs(zoom - 1), *(100 * fit[2].abs() / side)])
    highest = torch.tensor(found).amax(0)
    bounds = torch.tensor([level, 2 * level, 2 * level, 2 * level])
    assert (highest < bounds + 1e-2).all() and (highest > 0.97 * bounds).all(), highest


def test_level_zero_moves_both_alike_and_the_global_generators_are_left_alone():
    image, state, numpy_state = smooth(), torch.get_rng_state(), np.random.get_state()[1].copy()
    a, b, flow = data.misalign(image, image, np.random.default_rng(1), 0)
    assert torch.equal(a, b) and flow.abs().max() < 1e-3 and not torch.equal(a, image)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """A folder of 6 random pairs."""
    root, rng = tmp_path_factory.mktemp("six"), np.random.default_rng(0)
    for i in range(6):
        for side in "AB":
            save(root / side / f"{i}.npy", rng.uniform(-1, 1, (32, 32)))
    return root


def test_pairs_move_otherwise_in_every_epoch_and_alike_however_they_are_read(six, monkeypatch):
    options = dict(noise=3, elastic=2, seed=1)
    pairs, short = data.Pairs(six, **options), data.Pairs(six, **options, with_flow=False)
    monkeypatch.setattr(data.Pairs, "KEPT_BYTES", 0)
    from_disk, first = data.Pairs(six, **options), pairs.item(0, 1)
    assert pairs.kept and not from_disk.kept and len(first) == 3 and len(short.item(0, 1)) == 2
    for other in (pairs, short, from_disk):
        assert all(map(torch.equal, first, other.item(0, 1)))
    assert not torch.equal(first[0], pairs.item(1, 1)[0])


def test_batches_of_pairs_resume_and_divide(six):
    pairs = data.Pairs(six, noise=2)
    everything = list(pairs.batches(4, epochs=2, shuffle=True))
    assert [len(a) for a, *_ in everything] == [4, 2, 4, 2]
    (last,) = pairs.batches(4, epochs=2, shuffle=True, start=3)
    assert torch.equal(everything[3][0], last[0])
    shares = [list(pairs.batches(4, rank=rank, world=2)) for rank in (0, 1)]
    assert sum(len(a) for share in shares for a, *_ in share) == len(pairs)


# ---- Real data


@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "covid").is_dir(), reason="no ../shared")
class TestShared:
    def test_published_lists(self):
        root = SHARED / "covid"
        for split, sizes in {"covid1": (314, 46, 84), "viral2": (266, 42, 83)}.items():
            parts, classes = data.read_parts("covid", root, split)
            assert [part.labels.shape for part in parts.values()] == [(n, 1) for n in sizes]
            assert classes == [split[:-1]]
        # Its first line has the label 11
        fails(lambda: data.read_parts("covid", root, "viral1"), "viral1/test.txt", "line 1")

    def test_reports_less_the_test_part(self):
        paths, reports = data.read_reports(SHARED / "covid/training.csv", SHARED / "covid")
        listed = SHARED / "covid/splits/covid1/test.txt"
        kept = data.not_excluded(SHARED / "covid", paths, listed)
        assert len(paths) == len(reports) == 464 and 300 < len(kept) < 464

    def test_formats(self):
        pytest.importorskip("pydicom")
        assert data.read_image(SHARED / "formats/Fake_MONOHR1.dcm", 224).shape == (1, 224, 224)
        assert data.read_image(SHARED / "formats/00000001_000.png").shape == (1, 512, 512)
        assert data.read_image(SHARED / "covid/images/000001-1.jpg", 224).shape[1:].count(224) >= 1

    def test_audit(self, capsys):
        status, text = audit(SHARED / "covid", capsys, data="covid", split="covid1")
        assert status == 0 and "every file readable" in text
