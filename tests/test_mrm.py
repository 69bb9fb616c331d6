"""mrm.py against independent formulas: masking and losses against NumPy, learning; runs, their
options and their resumption."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support import script as common
from support import tokenizer as tokenizer_module
import data
import mrm
import vit
from rounding import network_rounding
from support.script import InputError
from test_script import in_processes
from test_vit import randomised

TINY = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, decoder_dim=16,
            decoder_depth=1, decoder_heads=2, report_dim=16, report_depth=1, report_heads=2,
            report_length=12, report_dropout=0.0)


@pytest.mark.numeric
def test_masking_hides_the_noisiest_patches_and_ignores_their_pixels():
    torch.manual_seed(0)
    model = randomised(mrm.MRM(**TINY)).eval()
    images, noise = torch.randn(2, 1, 16, 16), torch.rand(2, 16)
    latent, mask, restore = model.encode(images, 0.75, noise)
    assert latent.shape == (2, 1 + 4, 24) and mask.sum(1).tolist() == [12, 12]
    for row, row_mask in zip(noise, mask):
        assert row[row_mask == 0].max() < row[row_mask == 1].min()
    patches = vit.patchify(images, 4)
    patches[mask == 1] = 99.0
    again, _, _ = model.encode(vit.unpatchify(patches, 4), 0.75, noise)
    assert torch.equal(latent, again)
    latent, mask, _ = model.encode(images, 0.7)  # 4.8 patches are 4, any of them
    latent[:, 1:].sum().backward()
    assert model.patch_embed.proj.weight.grad.any()
    assert latent.shape[1] == 1 + 4 and mask.sum(1).tolist() == [12, 12]
    assert mask.dtype == torch.float32 and not torch.equal(mask[0], mask[1])
    # with nothing hidden, encode is the plain ViT in a shuffled order: the class token is the same
    full, mask, restore = model.encode(images, 0.0, noise)
    whole = model.norm(model.tokens(images))
    atol = network_rounding(model, lambda: model.norm(model.tokens(images)))
    torch.testing.assert_close(full[:, 0], whole[:, 0], atol=atol, rtol=0)
    torch.testing.assert_close(full[:, 1:].gather(1, restore[..., None].expand(-1, -1, 24)),
                               whole[:, 1:], atol=atol, rtol=0)


@pytest.mark.numeric
def test_image_loss_is_the_formula_and_ignores_visible_patches():
    torch.manual_seed(0)
    model = mrm.MRM(**TINY)
    target, prediction = torch.randn(2, 1, 32, 32), torch.randn(2, 16, 64)
    mask = (torch.rand(2, 16) < 0.75).float()
    mask[:, 0], target[0, :, :8, :8] = 1, 0.5  # a patch of one grey value, and nearly one
    target[1, :, :8, :8] *= 1e-3
    total = 0.0
    for b in range(2):
        for n in range(16):
            i, j = divmod(n, 4)
            pixels = target[b, 0, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].double().numpy().reshape(-1)
            pixels = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)
            total += mask[b, n].item() * ((prediction[b, n].double().numpy() - pixels) ** 2).mean()
    for change in (0, 100):
        prediction[mask == 0] += change
        loss = model.image_loss(target, prediction, mask).item()
        assert loss == pytest.approx(total / mask.sum().item(), rel=1e-5)
    model.image_loss(target, prediction.requires_grad_(), mask).backward()
    assert torch.equal(prediction.grad.any(2), mask.bool())


@pytest.mark.numeric
def test_decode_image_puts_patches_back_in_their_place():
    """With decoder blocks that do nothing, a visible patch's prediction depends on that patch's own
    latent."""
    torch.manual_seed(0)
    model = mrm.MRM(**TINY | dict(decoder_depth=0)).eval()
    images = torch.randn(1, 1, 16, 16)
    latent, mask, restore = model.encode(images, 0.75, torch.rand(1, 16))
    latent = latent.detach().requires_grad_()
    prediction = model.decode_image(latent, restore)
    assert prediction.shape == (1, 16, 64)
    for place in (mask[0] == 0).nonzero().flatten().tolist():
        (gradient,) = torch.autograd.grad(prediction[0, place].square().sum(), latent,
                                          retain_graph=True)
        used = gradient[0].abs().sum(1).nonzero().flatten().tolist()
        assert used == [1 + restore[0, place].item()]
    hidden = (mask[0] == 1).nonzero().flatten()  # these are the mask token at their own position
    tokens = model.mask_token[0] + model.decoder_pos_embed[0, 1 + hidden]
    atol = network_rounding(model, lambda: model.decode_image(latent, restore))
    torch.testing.assert_close(prediction[0, hidden],
                               model.decoder_pred(model.decoder_norm(tokens)), atol=atol, rtol=0)


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


@pytest.mark.numeric
def test_report_loss_counts_hidden_tokens_and_ignores_padding():
    images, (tokens, inputs, hidden, padding) = batch()
    torch.manual_seed(0)
    model = randomised(mrm.MRM(**TINY, vocab_size=30)).eval()
    noise = torch.rand(3, 16)
    _, loss = model(images, (tokens, inputs, hidden, padding), noise=noise)
    latent, _, _ = model.encode(mrm.half_size(images), 0.75, noise)
    logits = model.report_decoder(latent[:, 1:], inputs, torch.ones_like(hidden), padding)
    logits = logits.view(3, 12, 30).double()
    expected = [-logits[b, j].log_softmax(-1)[tokens[b, j]].item()
                for b, j in hidden.nonzero().tolist()]
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-5)
    changed = torch.where(padding, 7, inputs)  # whatever stands beyond the end
    _, again = model(images, (tokens, changed, hidden, padding), noise=noise)
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.numeric
def test_a_record_without_a_report_counts_for_the_image_loss_alone():
    images, (tokens, inputs, hidden, padding) = batch()
    padding[2], hidden[2], tokens[2], inputs[2] = True, False, 0, 0
    torch.manual_seed(0)
    model = randomised(mrm.MRM(**TINY, vocab_size=30)).eval()
    noise = torch.rand(3, 16)
    image_loss, loss = model(images, (tokens, inputs, hidden, padding), noise=noise)
    both = [part[:2] for part in (tokens, inputs, hidden, padding)]
    alone = model(images[:2], both, noise=noise[:2])[1].item()
    assert loss.item() == pytest.approx(alone, rel=1e-6)
    assert image_loss.item() == model(images, noise=noise)[0].item()
    # No report at all: the loss is 0, and every parameter gets the gradient 0 that processes share
    nothing = [torch.zeros_like(tokens[:, :1])] * 2
    nothing += [torch.zeros(3, 1, dtype=torch.bool), torch.ones(3, 1, dtype=torch.bool)]
    image_loss, loss = model(images, nothing, noise=noise)
    assert loss.item() == 0
    (image_loss + loss).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            here = parameter.grad.abs().sum() > 0
            assert here != name.startswith("report_decoder."), name


@pytest.mark.numeric
def test_the_report_decoder_sees_the_mean_of_all_visible_patches():
    _, (_, inputs, hidden, padding) = batch()
    torch.manual_seed(0)
    decoder = randomised(mrm.MRM(**TINY, vocab_size=30)).report_decoder.eval()
    tokens = torch.randn(3, 5, 24, requires_grad=True)
    logits = decoder(tokens, inputs, hidden, padding)
    (gradient,) = torch.autograd.grad(logits.square().sum(), tokens)
    torch.testing.assert_close(gradient, gradient.mean(1, keepdim=True).expand_as(gradient))
    assert gradient.abs().sum(-1).min() > 0
    torch.testing.assert_close(decoder(tokens.flip(1), inputs, hidden, padding), logits)


def test_report_dropout_acts_in_training_alone():
    images, report = batch()
    torch.manual_seed(0)
    model = randomised(mrm.MRM(**TINY | dict(report_dropout=0.5), vocab_size=30))
    noise = torch.rand(3, 16)
    for training in (True, False):
        model.train(training)
        first, second = (model(images, report, noise=noise)[1].item() for _ in range(2))
        assert (first != second) == training


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


def test_cosine_lr():
    rates = [mrm.cosine_lr(step, 100, 10, 2.0, 0.2) for step in range(101)]
    found = rates[0], rates[9], max(rates), rates[55], rates[100]
    assert found == pytest.approx((0.2, 2, 2, 1.1, 0.2))
    assert all(a < b for a, b in zip(rates[:9], rates[1:10]))
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert mrm.cosine_lr(0, 10, 0, 1.0) == 1.0


def test_one_rule_of_weight_decay():
    """Weights of linear maps and embeddings decay; biases, norms, lone tokens and positions do
    not."""
    model = mrm.MRM(**TINY, vocab_size=30)
    decayed = {name for name, parameter in model.named_parameters() if mrm.decays(name, parameter)}
    assert "blocks.0.attn.qkv.weight" in decayed and "patch_embed.proj.weight" in decayed
    assert "report_decoder.token_embed.weight" in decayed
    assert not decayed & {"cls_token", "mask_token", "pos_embed", "report_decoder.bias"}
    assert not any(name.endswith(".bias") or "norm" in name for name in decayed)
    config = mrm.MRMConfig(lr=1.0, weight_decay=0.3)
    groups = mrm.make_adamw(model, config, torch.device("cpu")).param_groups
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {named[id(p)] for group in groups for p in group["params"]} == trained
    for group in groups:
        expected = {name in decayed for name in (named[id(p)] for p in group["params"])}
        assert expected == {group["weight_decay"] == 0.3} and group["weight_decay"] in (0.3, 0)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """40 records in the csv layout."""
    root = tmp_path_factory.mktemp("films")
    (root / "images").mkdir()
    rng, rows = np.random.default_rng(0), ["image_path,report_content"]
    for i in range(40):
        pixels = rng.integers(0, 255, (96, 96)).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
        rows.append(f"{i}.png,The heart is normal in film {i} and the lungs are clear.")
    (root / "training.csv").write_text("\n".join(rows) + "\n")
    return root


def record_run(root, out, **options):
    given = dict(data="csv", root=str(root), out=str(out), device="cpu", dtype="fp32", holdout=8,
                 batch_size=4, steps=4)
    return mrm.MRMConfig(**given | options)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_typed_options_win_over_the_preset():
    filled = mrm.fill_options(mrm.MRMConfig(), world=1)
    found = filled.steps, filled.epochs, filled.batch_size, filled.vocab_size, filled.mean
    assert found == (4800, None, 32, 800, None) and filled.std is None
    assert filled.lr == pytest.approx(8e-3 * 32 / 256)
    typed = dict(warmup=0.0, min_crop=0.5, mask_ratio=0.25, word_ratio=0.25, vocab_size=300,
                 batch_size=16, weight_decay=0.0)
    filled = mrm.fill_options(mrm.MRMConfig(preset="base", epochs=3, **typed), world=2)
    assert {name: getattr(filled, name) for name in typed} == typed
    assert (filled.steps, filled.epochs) == (None, 3)
    assert filled.lr == pytest.approx(1.5e-4 * 16 / 256)
    # The batch is that of a step: neither processes nor passes change it or the rate
    for passes, world, batch in ((4, 1, 32), (1, 4, 32), (2, 8, 32), (3, 4, 24)):
        filled = mrm.fill_options(mrm.MRMConfig(accumulate=passes), world=world)
        assert filled.lr == pytest.approx(8e-3 * batch / 256) and filled.batch_size == batch
    assert mrm.fill_options(mrm.MRMConfig(lr=0.5), world=1).lr == 0.5  # the typed peak wins
    assert mrm.fill_options(mrm.MRMConfig(mean=0.0, std=1.0), world=1).mean == 0.0  # 0 means 0
    with pytest.raises(InputError, match="--mean and --std: expected both"):
        mrm.fill_options(mrm.MRMConfig(mean=0.0), world=1)


def test_the_command_line_takes_zero_and_small_floats(films, tmp_path):
    options = "--data csv --holdout 8 --batch-size 4 --epochs 0.25 --mean 0 --std 0.5 --lr 1e-5"
    options += f" --warmup 0 --device cpu --root {films} --out {tmp_path}"
    done = subprocess.run([sys.executable, Path(mrm.__file__), *options.split()], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["mean"], saved["std"], saved["lr"]) == (0, 0.5, 1e-5) and saved["warmup"] == 0
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 2  # a quarter of 32 / 4
    assert common.load_checkpoint(tmp_path / "last.pt")["mean"] == 0


def test_a_run_says_what_ran(films, tmp_path):
    """That a run which is stopped goes on bit for bit: test_interruption.py."""
    whole = mrm.pretrain(record_run(films, tmp_path))
    saved = json.loads((tmp_path / "config.json").read_text())
    state = common.load_checkpoint(tmp_path / "last.pt")
    assert state["config"] == saved and saved["vocab_size"] == 800 and saved["word_ratio"] == 0.5
    assert saved["lr"] == whole["lr"] == pytest.approx(8e-3 * 4 / 256)
    assert {"images_per_second", "share_waiting_for_data", "seconds", "batch_size", "steps",
            "heldout_image_loss", "heldout_report_loss"} <= whole.keys()
    again = mrm.pretrain(record_run(films, tmp_path, resume=True))  # of a finished run
    for name in ("image_loss", "report_loss", "heldout_image_loss", "heldout_report_loss"):
        assert again[name] == whole[name], name


@pytest.mark.parametrize("options, message", [
    (dict(holdout=0), r"--holdout: expected a number in \[1, inf\), found 0"),
    (dict(accumulate=0), "--accumulate"), (dict(steps=2, epochs=1), "--steps and --epochs"),
    *((dict(word_ratio=x), r"--word-ratio: expected a number in \(0, 1\]") for x in (2.0, -1, 0.0)),
    *((dict(mask_ratio=x), r"--mask-ratio: expected a number in \(0, 1\)") for x in (0.0, -0.5)),
    (dict(mask_ratio=0.99), "--mask-ratio: expected .* leaves 1 to 35 of 36 patches visible, ")])
def test_options_that_cannot_be_used_are_one_line(films, tmp_path, options, message):
    with pytest.raises(InputError, match=message) as error:
        mrm.pretrain(record_run(films, tmp_path / "run", **options))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_picture_of_what_a_run_restores(films, tmp_path, capsys):
    run = record_run(films, tmp_path / "run", steps=1)
    mrm.pretrain(run)
    again = mrm.MRMConfig(weights=str(tmp_path / "run"), device="cpu")
    for asked, count in ((again, 6), (dataclasses.replace(again, holdout=4), 4)):
        (tmp_path / "run/reconstruction.png").unlink()
        capsys.readouterr()
        mrm.reconstruct(asked)  # which knows the records of its run
        out = capsys.readouterr().out
        assert f"of the hidden tokens of {count} reports are guessed" in out
        assert f"records of {films}" in out and "drawing" not in out
        assert (tmp_path / "run/reconstruction.png").stat().st_size > 0
    state = common.load_checkpoint(tmp_path / "run/last.pt")
    model = mrm.MRM(**state["arguments"]).eval()
    model.load_state_dict(state["model"])
    images = torch.rand(3, 1, 96, 96)
    with torch.no_grad():
        rows, _ = mrm.restored_pictures(model, images, mrm.fill_options(run, 1))
    patches = [torch.stack([vit.patchify(picture[None], 16)[0] for picture in row]) for row in rows]
    for original, masked, restored in patches:  # hidden ones are one grey
        hidden = masked.std(-1) < 1e-6
        assert hidden.sum() == 27 and torch.equal(masked[~hidden], restored[~hidden])
        torch.testing.assert_close(restored[~hidden], original[~hidden], atol=1e-5, rtol=0)


def test_words_below_a_picture_are_coloured_by_the_guesses():
    tokenizer = tokenizer_module.train_tokenizer(["large left effusion, no edema"] * 2, 300)
    tokens, word_of = tokenizer_module.encode_reports(tokenizer, ["left effusion, no edema"], 30)
    hidden, guesses = (word_of == 1) | (word_of == 4), tokens.clone()
    guesses[word_of == 4] = tokenizer.encode_single_token(b"x")
    words = mrm.coloured_words(tokenizer, tokens[0], guesses[0], hidden[0], word_of[0])
    colours = [mrm.VISIBLE, mrm.RIGHT, mrm.VISIBLE, mrm.VISIBLE, mrm.WRONG]
    assert words == list(zip([" left", " effusion", ",", " no", " edema"], colours))


def test_the_shapes_in_the_head_are_those_of_the_tiny_preset():
    model = mrm.MRM(**mrm.MODELS["tiny"], vocab_size=348)
    decoder, found = model.report_decoder, []
    before = [model.patch_embed, model.blocks[0], model.decoder_blocks[0], decoder.blocks[0]]
    after = [model.patch_embed, model.blocks[0], model.decoder_embed, model.decoder_pred]
    for part in before:
        part.register_forward_pre_hook(lambda _, given: found.append(tuple(given[0].shape)))
    for part in after + [decoder.image_norm, decoder.image_embed]:
        part.register_forward_hook(lambda _, __, output: found.append(tuple(output.shape)))
    tokens, none = torch.zeros(32, 40, dtype=torch.long), torch.zeros(32, 40, dtype=torch.bool)
    report, ratio = (tokens, tokens, ~none, none), mrm.PRESETS["tiny"]["mask_ratio"]
    model(torch.rand(32, 1, 96, 96), report, mask_ratio=ratio)
    assert len(found) == 10
    for shape in found:
        assert f"({', '.join(map(str, shape))})".replace("40", "L") in mrm.__doc__, shape


def parts_with_gradient(model, loss):
    """The parts of a model that a loss sends a gradient to."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name.split(".")[0] for name, p in model.named_parameters()
            if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("fresh", [True, False])
def test_both_losses_reach_the_encoder_and_each_its_own_decoder_only(fresh):
    images, report = batch()
    torch.manual_seed(0)
    model = mrm.MRM(**TINY, vocab_size=30)
    model = model if fresh else randomised(model)
    noise = torch.rand(3, 16)
    encoder = {"cls_token", "patch_embed", "blocks", "norm"}
    decoder = {"decoder_embed", "mask_token", "decoder_blocks", "decoder_norm", "decoder_pred"}
    losses = model(images, report, noise=noise)
    assert parts_with_gradient(model, losses[0]) == encoder | decoder
    loss = model(images, report, noise=noise)[1]
    assert parts_with_gradient(model, loss) == encoder | {"report_decoder"}
    for parameter in model.report_decoder.parameters():
        assert parameter.grad is not None and parameter.grad.any()
    every = set(dict(model.named_parameters())) - {"pos_embed", "decoder_pos_embed"}
    model.zero_grad(set_to_none=True)
    sum(model(images, report, noise=noise)).backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == every


def test_a_run_goes_on_for_more_steps_and_never_for_fewer(films, tmp_path):
    mrm.pretrain(record_run(films, tmp_path / "run", steps=2))
    with pytest.raises(InputError, match="at least the 2 steps that .*last.pt has taken, found 1"):
        mrm.pretrain(record_run(films, tmp_path / "run", steps=1, resume=True))
    more = record_run(films, tmp_path / "run", steps=None, epochs=0.5, resume=True)
    result = mrm.pretrain(more)
    assert result["steps"] == 4  # half of 32 / 4
    lines = log_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[3]["lr_of_step"] == pytest.approx(mrm.cosine_lr(3, 4, 1, result["lr"]))


def test_a_run_starts_from_another_with_its_decoders_and_vocabulary(films, tmp_path, capsys):
    """The words of the new reports get the numbers of the old run's tokenizer."""
    options = dict(vocab_size=290, steps=2)
    mrm.pretrain(record_run(films, tmp_path / "first", **options))
    root = shutil.copytree(films, tmp_path / "root")
    text = (root / "training.csv").read_text()
    (root / "training.csv").write_text(text.replace("heart is normal", "aorta looks widened"))
    mrm.pretrain(record_run(root, tmp_path / "alone", **options))
    on = dict(weights=str(tmp_path / "first"), steps=1, lr=1e-12, weight_decay=0.0)
    capsys.readouterr()
    mrm.pretrain(record_run(root, tmp_path / "on", **on))
    assert "the vocabulary of" in capsys.readouterr().out
    first, alone, taken = ((tmp_path / name / "tokenizer.tiktoken").read_bytes()
                           for name in ("first", "alone", "on"))
    assert taken == first != alone
    first, moved = (common.load_checkpoint(tmp_path / name / "last.pt")["model"]
                    for name in ("first", "on"))
    for name, tensor in first.items():  # at a rate of 1e-12 nothing moves
        torch.testing.assert_close(moved[name], tensor, atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="--vocab-size with --weights .*: expected none"):
        mrm.pretrain(record_run(root, tmp_path / "typed", vocab_size=300, **on))


def test_a_report_decoder_without_its_tokenizer_is_refused(films, tmp_path):
    mrm.pretrain(record_run(films, tmp_path / "first", vocab_size=290, steps=2))
    (tmp_path / "first/tokenizer.tiktoken").unlink()
    on = dict(weights=str(tmp_path / "first"), steps=1, lr=1e-12, weight_decay=0.0, seed=5)
    with pytest.raises(InputError, match="tokenizer.tiktoken: expected the tokenizer of"):
        mrm.pretrain(record_run(films, tmp_path / "on", **on))
    mrm.pretrain(record_run(films, tmp_path / "on", image_only=True, **on))  # needs no words
    first, on = (common.load_checkpoint(tmp_path / name / "last.pt")["model"]
                 for name in ("first", "on"))
    torch.testing.assert_close(first["decoder_pred.weight"], on["decoder_pred.weight"])
    assert not any(name.startswith("report_decoder") for name in on)


def test_resuming_on_other_records_is_refused(films, tmp_path):
    root = shutil.copytree(films, tmp_path / "films")
    mrm.pretrain(record_run(root, tmp_path / "run", steps=1))
    text = (root / "training.csv").read_text()
    for other in (text.replace("film 3 ", "film 33 "), "\n".join(text.splitlines()[:-1])):
        (root / "training.csv").write_text(other)
        with pytest.raises(InputError, match=r"last\.pt: expected a run with the same records as"):
            mrm.pretrain(record_run(root, tmp_path / "run", steps=1, resume=True))


def test_images_alone_need_no_reports(films, tmp_path):
    root = shutil.copytree(films, tmp_path / "films")
    (root / "training.csv").write_text("image,text\n0.png,clear\n")
    with pytest.raises(InputError, match=r"training\.csv: line 1: .*image_path"):
        mrm.pretrain(record_run(root, tmp_path / "run"))
    (root / "training.csv").write_text("image_path\n" + "".join(f"{i}.png\n" for i in range(40)))
    result = mrm.pretrain(record_run(root, tmp_path / "run", steps=2, image_only=True))
    assert result["report_loss"] == 0 and not (tmp_path / "run/tokenizer.tiktoken").exists()
    again = mrm.pretrain(record_run(root, tmp_path / "run", steps=2, image_only=True, resume=True))
    assert again["image_loss"] == result["image_loss"]
    mrm.reconstruct(mrm.MRMConfig(weights=str(tmp_path / "run"), device="cpu"))


@pytest.mark.parametrize("passes", [1, 2])
def test_a_run_moves_every_network_that_it_trains(films, tmp_path, passes):
    options = dict(steps=2, weight_decay=0.0, accumulate=passes)
    mrm.pretrain(record_run(films, tmp_path / "run", **options))
    saved = common.load_checkpoint(tmp_path / "run/last.pt")
    torch.manual_seed(0)
    for name, fresh in mrm.MRM(**saved["arguments"]).named_parameters():
        moved = not torch.equal(fresh, saved["model"][name])
        assert moved == fresh.requires_grad, name


def test_a_run_says_how_many_records_have_no_report(films, tmp_path, capsys):
    root = shutil.copytree(films, tmp_path / "films")
    table = root / "training.csv"
    head, *rows = table.read_text().splitlines()
    blank = [f"{i}.png," for i in range(40)]
    table.write_text("\n".join([head, *blank[:31], *rows[31:35], *blank[35:]]) + "\n")
    result = mrm.pretrain(record_run(root, tmp_path / "run", steps=8, batch_size=2))
    assert f"{table}: 36 of 40 records have no report" in capsys.readouterr().out
    losses = [line["report_loss"] for line in log_of(tmp_path / "run")]
    assert 0 in losses and max(losses) > 3 and result["heldout_report_loss"] > 3
    mrm.reconstruct(mrm.MRMConfig(weights=str(tmp_path / "run"), device="cpu"))
    table.write_text("\n".join([head, *rows[:32], *blank[32:]]) + "\n")
    result = mrm.pretrain(record_run(root, tmp_path / "none", steps=1))
    assert math.isnan(result["heldout_report_loss"]) and result["heldout_image_loss"] > 0
    table.write_text("\n".join([head, *blank]) + "\n")
    with pytest.raises(InputError, match="a report of a record"):
        mrm.pretrain(record_run(root, tmp_path / "other", steps=1))


def test_no_row_of_a_film_that_is_held_out_is_trained_on(films, tmp_path):
    table = shutil.copytree(films, tmp_path / "films") / "training.csv"
    table.write_text(table.read_text() + "8.png,Two reports.\n")
    (table.parent / "patients.csv").write_text("image_path,patient_id\n3.png,p\n39.png,p\n")
    paths, _ = mrm.read_records(record_run(table.parent, tmp_path))
    expected = [i for i in range(40) if i not in (3, 8)] + [8]
    assert [Path(path).name for path in paths] == [f"{i}.png" for i in expected]


def test_a_checkpoint_names_the_films_that_it_was_trained_on(films, tmp_path):
    (tmp_path / "exclude.txt").write_text("3.png\n")
    run = record_run(films, tmp_path / "run", steps=2, exclude=str(tmp_path / "exclude.txt"))
    mrm.pretrain(run)
    names = [f"{i}.png" for i in range(40)]
    expected = [i < 32 and i != 3 for i in range(40)]  # 8 of the others are held out

    def trained(out):
        seen = set(common.load_checkpoint(tmp_path / out / "last.pt")["trained_on"])
        return [unit in seen for unit in data.units(data.identify(films, names))]

    assert trained("run") == expected
    more = dict(steps=1, weights=str(tmp_path / "run"), holdout=12)
    mrm.pretrain(record_run(films, tmp_path / "more", **more))
    expected[3] = True  # of the second run alone; those from 28 on are of the first
    assert trained("more") == expected
    mrm.pretrain(record_run(films, tmp_path / "more", **more | dict(steps=3, resume=True)))
    assert trained("more") == expected


@pytest.mark.parametrize("lr", [1e30, 1e36])
def test_a_loss_that_is_not_finite_is_noticed_at_its_step(films, tmp_path, lr, monkeypatch):
    monkeypatch.setattr(common.Saving.__init__, "__defaults__", (1, -1))  # every step is saved
    with pytest.raises(InputError, match=r"step [23]: .* is not finite; lower --lr") as error:
        mrm.pretrain(record_run(films, tmp_path / "run", steps=60, lr=lr, warmup=0.0))
    assert "\n" not in str(error.value)
    state = common.load_checkpoint(tmp_path / "run/last.pt")
    assert state["step"] <= 2 and all(tensor.isfinite().all() for tensor in state["model"].values())


def test_a_gradient_that_is_not_finite_is_noticed_where_the_loss_is(films, tmp_path, monkeypatch):
    """The third loss gets a term whose value is 0 and whose gradient is NaN: sqrt(0 x)."""
    monkeypatch.setattr(common.Saving.__init__, "__defaults__", (1, -1))  # every step is saved
    forward, calls = mrm.MRM.forward, []

    def third_is_steep(self, *args):
        image_loss, report_loss = forward(self, *args)
        calls.append(self.training)
        if self.training and sum(calls) == 3:
            image_loss = image_loss + (0 * image_loss).sqrt()
        return image_loss, report_loss

    monkeypatch.setattr(mrm.MRM, "forward", third_is_steep)
    with pytest.raises(InputError, match="step 3: the gradient is not finite; lower --lr"):
        mrm.pretrain(record_run(films, tmp_path / "run", steps=60))
    state = common.load_checkpoint(tmp_path / "run/last.pt")
    assert state["step"] == 2 and all(x.isfinite().all() for x in state["model"].values())


DRIVER = """
import sys
sys.path.insert(0, {repository!r})
import torch, data, finetune, mrm
from support.script import run_script
def noise_of(images, p):
    return (mrm.patchify(images, p).sum(-1) * 997) % 1
encode = mrm.MRM.encode
def encode_by_image(self, images, ratio, noise=None):
    return encode(self, images, ratio, noise_of(images, self.patch_size))
mrm.MRM.encode = encode_by_image
def hide(enc, tokens, words, ratio, generator=None):
    hidden = torch.zeros_like(words, dtype=torch.bool)
    hidden[:, 1:9:2] = True
    return tokens.masked_fill(hidden, enc.encode_single_token("<mask>")), hidden
mrm.hide_words = hide
options = dict(data="csv", root={root!r}, out=sys.argv[2], device="cpu", dtype="fp32", steps=4,
               lr=1e-3, batch_size=8, min_crop=1.0)
if sys.argv[1] == "mrm":
    options |= dict(holdout=8, accumulate=int(sys.argv[3]))
    run_script(lambda: mrm.pretrain(mrm.MRMConfig(**options)))
else:
    options |= dict(weights="scratch", method="full", evaluations=4)
    run_script(lambda: finetune.finetune(finetune.FinetuneConfig(**options)))
"""


@pytest.mark.parametrize("script", ["mrm", "finetune"])
def test_two_processes_and_accumulation_give_the_losses_of_one(films, tmp_path, script):
    """With masks that depend on the image alone, half the batch in each of two processes, or in two
    passes of mrm.py, is the batch."""
    root = shutil.copytree(films, tmp_path / "films")
    rows = [f"{i}.png {i % 2}\n" for i in range(40)]
    for part, lines in (("train", rows[:24]), ("val", rows[24:33]), ("test", rows[33:])):
        (root / f"{part}_list.txt").write_text("".join(lines))
    repository = str(Path(mrm.__file__).parent)
    (tmp_path / "driver.py").write_text(DRIVER.format(repository=repository, root=str(root)))
    lines, runs = {}, (("one", 1, 1), ("two", 2, 1), ("passes", 1, 2))
    for name, processes, passes in runs if script == "mrm" else runs[:2]:
        in_processes(processes, tmp_path / "driver.py", script, tmp_path / name, passes)
        lines[name] = log_of(tmp_path / name)
    losses = [key for key in lines["one"][0] if key.endswith(("loss", "auroc"))]
    assert len(lines["one"]) == 4 and len(losses) == (4 if script == "mrm" else 3)
    for other in lines.keys() - {"one"}:
        for ours, theirs in zip(lines["one"], lines[other], strict=True):
            expected = [theirs[key] for key in losses]
            assert [ours[key] for key in losses] == pytest.approx(expected, rel=1e-4), other
        config = json.loads((tmp_path / other / "config.json").read_text())
        assert config["lr"] == pytest.approx(1e-3) and config["batch_size"] == 8


def test_ranks_draw_their_own_numbers():
    drawn = []
    for rank in (0, 1, 2):
        torch.manual_seed(5)
        common.seed_rank(5, rank)
        drawn.append(torch.rand(4).tolist())
    torch.manual_seed(5)
    assert drawn[0] == torch.rand(4).tolist()  # one process alone goes on as it was seeded
    assert len({tuple(row) for row in drawn}) == 3


def test_held_out_losses_hide_the_same_every_time(films, tmp_path):
    config = mrm.fill_options(record_run(films, tmp_path), 1)
    records = mrm.load_records(config, *mrm.read_records(config), torch.device("cpu"))
    model = mrm.MRM(**mrm.MODELS["tiny"], vocab_size=records.tokenizer.n_vocab)
    autocast = common.autocast_for(dataclasses.replace(config, dtype="fp32"), torch.device("cpu"))
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(mrm.heldout_losses(model, records, config, autocast))
    assert losses[0] == losses[1]


def test_crops_of_the_papers_presets_are_not_enlarged(tmp_path, monkeypatch):
    """Every crop of a large film has at least the pixels that it becomes; a small film is kept."""
    paths = [str(tmp_path / name) for name in ("a.png", "b.png", "large.png", "small.png")]
    for path, shape in zip(paths, ((96, 96), (96, 96), (1500, 1300), (300, 400))):
        pixels = np.arange(np.prod(shape), dtype=np.uint32).astype(np.uint8)
        Image.fromarray(pixels.reshape(shape)).save(path)
    paths = paths[2:] + paths[:2]
    config = dict(preset="small", holdout=2, image_only=True, device="cpu")
    config = mrm.fill_options(mrm.MRMConfig(**config), world=1)
    images = mrm.load_records(config, paths, [""] * 4, torch.device("cpu")).training
    shapes = [tuple(images.reader(item).shape) for item in images.items]
    assert shapes == [(1, 1335, 1157), (1, 300, 400)]
    seen, resize = [], data.resize
    monkeypatch.setattr(data, "resize", lambda x, *how: seen.append(x.shape[1:]) or resize(x, *how))
    for draw in range(3):
        batch, _ = images[[0] * 20, draw]
        assert batch.shape == (20, 1, 448, 448)
    narrow = [min(shape) for shape in seen]
    assert len(seen) == 60 and min(narrow) >= 448 and min(narrow) < 700
    tiny = mrm.fill_options(mrm.MRMConfig(holdout=2, image_only=True), world=1)
    assert mrm.load_records(tiny, paths, [""] * 4, torch.device("cpu")).training.size == 96
