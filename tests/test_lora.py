"""lora.py against the formula in float64, merging, adapter files, and peft as oracle of the
export."""

import contextlib
import copy

import pytest
import torch
import torch.nn as nn

from support import script as common
import lora
from support import weights
from rounding import assert_rounded, network_rounding
from vit import ViT


def assert_same(got, expected, model, images):
    """The results of two forms of a model, but for rounding."""
    atol = network_rounding(model, lambda: model(images))
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)


def random_layer(parts=(True, False, True), rank=3, bias=True, seed=0):
    torch.manual_seed(seed)
    layer = lora.LoRALinear(10, 12, rank, alpha=8, dropout=0.0, parts=parts, bias=bias)
    nn.init.normal_(layer.lora_B)  # at initialisation B is zero and LoRA is never seen
    return layer


def formula(layer, x):
    """y = x W^T + b + (alpha / r) x A_g^T B_g^T on the columns of each adapted part, in float64,
    part by part."""
    W, A, B = (p.double() for p in (layer.weight, layer.lora_A, layer.lora_B))
    y = x.double() @ W.T + (layer.bias.double() if layer.bias is not None else 0)
    size, r, g, parts = len(W) // len(layer.parts), layer.rank, 0, []
    for p, on in enumerate(layer.parts):
        columns = y[..., p * size : (p + 1) * size]
        if on:
            low = x.double() @ A[g * r : (g + 1) * r].T
            columns = columns + 8 / r * low @ B[g * size : (g + 1) * size].T
            g += 1
        parts.append(columns)
    return torch.cat(parts, -1)


def absolute(layer):
    """The layer with the absolute values of its weights."""
    layer = copy.deepcopy(layer)
    for parameter in layer.parameters():
        parameter.data.abs_()
    return layer


@pytest.mark.numeric
@pytest.mark.parametrize("parts", [(True,), (True, False, True), (False, True), (True, True, True)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_against_float64(parts, bias):
    for dtype in (torch.float32, torch.float64):
        layer = random_layer(parts, bias=bias).to(dtype)
        x = torch.randn(2, 5, 10, dtype=dtype, requires_grad=True)
        weights, positive = torch.randn(2, 5, 12, dtype=dtype), absolute(layer)
        sizes = x.detach().abs().requires_grad_()
        wrt, wrt_sizes = (x, layer.lora_A, layer.lora_B), (sizes, positive.lora_A, positive.lora_B)
        cases = ((layer(x), weights, wrt), (formula(layer, x), weights, wrt),
                 (formula(positive, sizes), weights.abs(), wrt_sizes))  # sums of absolute values
        found = [[y, *torch.autograd.grad((y * w).sum(), inputs)] for y, w, inputs in cases]
        for got, truth, sums in zip(*found):
            assert_rounded(got, truth, sums)


@pytest.mark.numeric
def test_a_layer_worked_on_paper():
    """W = 0, b = (0, 1), A = (1, 2), B = (3,) on the second part, alpha / r = 2:
    y = (0, 1 + 2 * 3 * (1 x1 + 2 x2))."""
    layer = lora.LoRALinear(2, 2, 1, alpha=2, dropout=0.0, parts=(False, True))
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([0.0, 1.0]))
        layer.lora_A.copy_(torch.tensor([[1.0, 2.0]]))
        layer.lora_B.fill_(3)
    assert layer(torch.tensor([[1.0, 10.0]])).tolist() == [[0.0, 127.0]]


def test_a_fresh_layer_is_the_plain_one_and_learns_through_b_first():
    torch.manual_seed(0)
    layer = lora.LoRALinear(10, 12, 3, parts=(True, False, True), dropout=0.0)
    x, bound = torch.randn(5, 10), 10**-0.5  # 1 / sqrt(in), whatever the number of parts
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert not layer.lora_B.any()
    assert 0.8 * bound < layer.lora_A.abs().max() <= bound
    layer(x).square().sum().backward()
    assert not layer.lora_A.grad.any() and layer.lora_B.grad.any()


def test_med_pefts_shapes_and_errors():
    layer = random_layer(rank=3)
    assert layer.lora_A.shape == (2 * 3, 10) and layer.lora_B.shape == (2 * 12 // 3, 3)
    for arguments in (dict(rank=0), dict(rank=2, parts=(False, False)),
                      dict(rank=2, parts=(True,) * 5)):
        with pytest.raises(ValueError, match="LoRA needs rank"):
            lora.LoRALinear(10, 12, **arguments)


def vit(seed=0, **kwargs):
    torch.manual_seed(seed)
    sizes = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=3)
    return ViT(**sizes | kwargs)


def trained(model):
    torch.manual_seed(1)
    for layer in lora.lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


def test_add_lora_changes_nothing_but_what_is_trained():
    model, images = vit(), torch.randn(4, 1, 16, 16)
    before, keys = model(images), set(model.state_dict())
    lora.add_lora(model, rank=2, dropout=0.0)
    assert torch.equal(model(images), before)
    assert {key for key in model.state_dict() if "lora_" not in key} == keys
    trained(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert not any("lora_" in n or n.split(".")[0] in ("fc_norm", "head") for n in frozen)
    moving = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(images).square().sum().backward()
    optimizer.step()
    state = dict(model.named_parameters())
    assert all(torch.equal(state[n], p) for n, p in frozen.items())
    assert not any(torch.equal(state[n], p) for n, p in moving.items())
    with pytest.raises(ValueError, match="LoRA layer already"):
        lora.add_lora(model)
    with pytest.raises(ValueError, match="no linear layer"):
        lora.add_lora(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.numeric
def test_merging_is_the_same_model_once():
    model, images = trained(lora.add_lora(vit(), rank=2)).eval(), torch.randn(4, 1, 16, 16)
    weights = [layer.weight.detach().clone() for layer in lora.lora_layers(model)]
    before = model(images)
    lora.merge_lora(model)
    assert_same(model(images), before, model, images)
    once = [layer.weight.detach().clone() for layer in lora.lora_layers(model)]
    lora.merge_lora(model.train().eval())  # a second call adds nothing, nor do train() and eval()
    for layer, weight, plain in zip(lora.lora_layers(model), once, weights):
        assert torch.equal(layer.weight, weight)
        k = slice(24, 48)
        assert torch.equal(weight[k], plain[k])  # k is not adapted
        assert not torch.equal(weight, plain)


@pytest.mark.numeric
def test_a_merged_layer_has_no_dropout_and_one_product():
    layer, x = random_layer(), torch.randn(64, 10)
    layer.dropout = 0.5
    lora.merge_lora(layer)
    for training in (True, False):
        plain = nn.functional.linear(x, layer.weight, layer.bias)
        assert torch.equal(layer.train(training)(x), plain)
    once = (random_layer().weight.double() + layer.delta()).float()
    assert torch.equal(layer.weight, once)  # rounded once


def test_dropout_is_on_in_training_alone():
    layer, x = random_layer(), torch.randn(64, 10)
    layer.dropout = 0.5
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_dropout_is_on_the_input_of_a():
    """With W, A, B and x of ones an output is 64, of W, and 2 times a binomial count of 64 halves:
    mean 64, deviation 8. Dropout behind A would give 0 or 128 alone, deviation 64; before W, too,
    a deviation of 16."""
    layer = lora.LoRALinear(64, 3, 1, alpha=1, dropout=0.5, parts=(True, False, True), bias=False)
    with torch.no_grad():
        for tensor in (layer.weight, layer.lora_A, layer.lora_B):
            tensor.fill_(1)
    torch.manual_seed(0)
    y, plain, other = layer.train()(torch.ones(2000, 64)).detach().T - 64
    assert torch.equal(y, other) and not plain.any()  # one mask for all parts
    assert abs(y.mean().item() - 64) < 1 and abs(y.std().item() - 8) < 1
    assert torch.equal(y, 2 * (y / 2).round())


def test_adapter_round_trip(tmp_path):
    model, images = trained(lora.add_lora(vit(), rank=2)).eval(), torch.randn(2, 1, 16, 16)
    path = tmp_path / "adapter.pt"
    lora.save_adapter(path, model, classes=["a", "b", "c"])
    for _ in range(2):
        again = vit().eval()
        assert lora.load_adapter(again, path)["classes"] == ["a", "b", "c"]
        assert torch.equal(again(images), model(images))
        saved = common.load_checkpoint(path)  # older files name more settings
        saved["lora"]["dora"] = False
        common.save_checkpoint(path, saved)


def test_paper_parameter_count_and_size(tmp_path):
    """'Less Could Be Better': rank 4 on q and v of a ViT-B with 14 classes trains 159,758
    parameters. The adapter is under two percent of the encoder alone."""
    model = lora.add_lora(ViT(in_chans=3, num_classes=14), rank=4)
    assert lora.count_parameters(model)["trainable"] == 159_758
    lora.save_adapter(tmp_path / "adapter.pt", model)
    assert (tmp_path / "adapter.pt").stat().st_size < 0.02 * 4 * 85_809_408


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    lora.save_adapter(tmp_path / "adapter.pt", lora.add_lora(vit(), rank=2))
    common.save_checkpoint(tmp_path / "model.pt", {"model": vit().state_dict()})
    part = common.load_checkpoint(tmp_path / "adapter.pt")
    del part["adapter"]["head.weight"]
    common.save_checkpoint(tmp_path / "part.pt", part)
    for model, name, message in (
            (vit(embed_dim=48), "adapter.pt", ".*does not fit the model"),
            (lora.add_lora(vit(), rank=3), "adapter.pt",
             r".*lora_A \(4, 24\) does not fit the model \(\(6, 24\)\)"),
            (vit(depth=1), "adapter.pt", r"blocks.1.* does not fit the model \(no such tensor\)"),
            (vit(), "model.pt", "expected an adapter"), (vit(), "none.pt", "no such checkpoint"),
            (vit(), "part.pt", "head.weight is missing and does not fit the model")):
        with pytest.raises(common.InputError, match=f"{name}: {message}"):
            lora.load_adapter(model, tmp_path / name)


@pytest.mark.numeric
def test_the_plain_form_in_the_head_is_the_layer():
    """The eight lines are run as they stand there, and equal `LoRALinear` with one part."""
    lines = lora.__doc__.splitlines()
    first = next(i for i, line in enumerate(lines) if "class PlainLoRA" in line)
    code = "\n".join(line[4:] for line in lines[first : first + 8])
    names = dict(vars(lora), F=nn.functional)
    exec(code, names)
    torch.manual_seed(0)
    layer, linear = random_layer((True,)), nn.Linear(10, 12)
    plain, x = names["PlainLoRA"](linear, layer.rank, 8).eval(), torch.randn(5, 10)
    assert torch.equal(plain(x), linear(x))  # B is zero at the start
    state = {"lin.weight": layer.weight, "lin.bias": layer.bias}
    plain.load_state_dict(state | {"A": layer.lora_A, "B": layer.lora_B})
    assert_rounded(plain(x), layer(x), formula(absolute(layer), x.abs()))
    trained_names = {name for name, p in plain.named_parameters() if p.requires_grad}
    assert trained_names == {"A", "B"}
    wide = nn.Linear(400, 2)  # A is drawn alike: the bound of 40,000 uniform numbers, to 1 %
    drawn = names["PlainLoRA"](wide, 100, 8).A, lora.LoRALinear(400, 2, 100).lora_A
    for A in drawn:
        assert 0.99 * 400**-0.5 < A.abs().max() <= 400**-0.5
        assert A.std().item() == pytest.approx((3 * 400) ** -0.5, rel=0.02)


def medpeft_checkpoint(rank=2):
    """A checkpoint as MED-PEFT's code saves it, and its logits by the formula: q and v of the fused
    qkv get 32 / r B_g A_g, one convolution of two groups there."""
    state, generator = vit(seed=4).state_dict(), torch.Generator().manual_seed(6)
    plain = {name: tensor.clone() for name, tensor in state.items()}
    for i in range(2):
        A = torch.randn(2 * rank, 24, generator=generator) * 0.2
        B = torch.randn(48, rank, generator=generator) * 0.1
        delta = nn.functional.conv1d(A[None], B[..., None], groups=2)[0] * 32 / rank
        plain[f"blocks.{i}.attn.qkv.weight"][:24] += delta[:24]
        plain[f"blocks.{i}.attn.qkv.weight"][48:] += delta[24:]
        state[f"blocks.{i}.attn.qkv.lora_A"], state[f"blocks.{i}.attn.qkv.lora_B"] = A, B
    return state, plain


@pytest.mark.numeric
def test_import_of_med_pefts_checkpoints(tmp_path):
    state, plain = medpeft_checkpoint()
    path = tmp_path / "checkpoint-best_auroc.pth"
    common.save_checkpoint(path, {"model": state, "epoch": 3})
    config = lora.LoRAConfig(weights=str(path), out=str(tmp_path / "a.pt"))
    lora.import_medpeft(config)
    lora.merge(lora.LoRAConfig(adapter=str(tmp_path / "a.pt")))
    merged = common.load_checkpoint(tmp_path / "merged.pt")["model"]
    assert merged.keys() == plain.keys()
    for name, tensor in plain.items():
        assert_rounded(merged[name], tensor)
    again, images = vit(seed=7).eval(), torch.randn(2, 1, 16, 16)
    weights.load_encoder(again, weights.read_weights(tmp_path / "merged.pt")[0], "merged.pt")
    adapted = vit(seed=4).eval()
    lora.load_adapter(adapted, tmp_path / "a.pt")
    assert_same(adapted(images), again(images), again, images)
    common.save_checkpoint(path, {"model": plain})
    with pytest.raises(common.InputError, match="expected a checkpoint of MED-PEFT"):
        lora.import_medpeft(config)
    # Read as weights, LoRA is not left out without a word
    common.save_checkpoint(path, {"model": state})
    with pytest.raises(common.InputError, match="lora_A: expected no such tensor"):
        weights.load_encoder(vit(), weights.read_weights(path)[0], path)


@pytest.mark.numeric
@pytest.mark.parametrize("targets", [
    *lora.TARGETS.values(), {"qkv": (True, False, True), "fc1": (True,), "proj": (True, True)}])
def test_targets_are_read_by_peft_and_from_an_adapter(tmp_path, targets):
    peft = pytest.importorskip("peft")
    base, images = vit(), torch.randn(2, 1, 16, 16)
    common.save_checkpoint(tmp_path / "base.pt", {"model": base.state_dict()})
    model = trained(lora.add_lora(base, rank=2, targets=targets)).eval()
    assert len(lora.lora_layers(model)) == 2 * len(targets)  # of two blocks
    lora.save_adapter(tmp_path / "adapter.pt", model, weights=str(tmp_path / "base.pt"))
    again = vit()
    lora.load_adapter(again, tmp_path / "adapter.pt")
    assert torch.equal(again.eval()(images), model(images))
    adapter, out = str(tmp_path / "adapter.pt"), str(tmp_path / "peft")
    lora.export_peft(lora.LoRAConfig(adapter=adapter, out=out))
    theirs = peft.PeftModel.from_pretrained(vit(), str(tmp_path / "peft")).eval()
    assert_same(theirs(images), model(images), model, images)


def damaged(saved, entry):
    adapter, settings, B = saved["adapter"], saved["lora"], "blocks.0.attn.qkv.lora_B"
    return saved | {
        "no base": {"weights": ""},
        "no LoRA": {"adapter": {n: t for n, t in adapter.items() if "lora_" not in n}},
        "number": {"adapter": 3, "lora": 3},
        "whole numbers": {"adapter": adapter | {B: adapter[B].long()}},
        "settings": {"lora": {"rank": 2}},
        "rank": {"lora": settings | {"rank": "two"}},
        "targets": {"lora": settings | {"targets": 3}},
        "no B": {"adapter": {n: t for n, t in adapter.items() if n != B}},
        "short B": {"adapter": adapter | {B: adapter[B][:6]}},
    }[entry]


def load_into_model(config):
    lora.load_adapter(vit(), config.adapter)


@pytest.mark.parametrize("command", [lora.merge, lora.export_peft, load_into_model])
@pytest.mark.parametrize("entry, message", [
    ("no base", "its base weights .* are not there; give them with --weights"),
    ("no LoRA", "expected an adapter"), ("number", "expected an adapter"),
    ("whole numbers", "expected an adapter"), ("settings", "expected an adapter"),
    ("rank", r"does not fit"), ("targets", r"does not fit"), ("no B", r"does not fit"),
    ("short B", r"does not fit")])
def test_damaged_adapters_end_a_command_with_one_line(tmp_path, command, entry, message):
    common.save_checkpoint(tmp_path / "base.pt", {"model": vit().state_dict()})
    path = tmp_path / "adapter.pt"
    lora.save_adapter(path, lora.add_lora(vit(), rank=2), weights=str(tmp_path / "base.pt"))
    common.save_checkpoint(path, damaged(common.load_checkpoint(path), entry))
    if command is load_into_model and entry == "no base":
        return command(lora.LoRAConfig(adapter=str(path)))  # the model has its base
    with pytest.raises(common.InputError, match=f"adapter.pt: .*{message}") as error:
        command(lora.LoRAConfig(adapter=str(path), out=str(tmp_path / "out")))
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.pt", "base.pt"]


@pytest.mark.parametrize("command", [lora.merge, lora.export_peft])
def test_commands_refuse_other_weights_and_places_they_cannot_write(tmp_path, command):
    for name, model in (("base", vit()), ("wide", vit(embed_dim=48))):
        common.save_checkpoint(tmp_path / f"{name}.pt", {"model": model.state_dict()})
    path = str(tmp_path / "adapter.pt")
    lora.save_adapter(path, lora.add_lora(vit(), rank=2), weights=str(tmp_path / "base.pt"))
    message = "adapter.pt: blocks.0.attn.qkv does not fit .*wide.pt"
    with pytest.raises(common.InputError, match=message):
        command(lora.LoRAConfig(adapter=path, weights=str(tmp_path / "wide.pt")))
    for out in (path + "/out", str(tmp_path / "base.pt")):
        with pytest.raises(common.InputError, match="adapter.pt.* cannot be written|another place"):
            command(lora.LoRAConfig(adapter=path, out=out))
    assert len(list(tmp_path.iterdir())) == 3


def test_usage_and_help(monkeypatch, capsys):
    for words in ([], ["split"]):
        monkeypatch.setattr("sys.argv", ["lora.py", *words])
        with pytest.raises(common.InputError, match="usage: python lora.py merge"):
            lora.main()
    for words in (["--help"], ["-h"], ["merge", "--help"]):
        monkeypatch.setattr("sys.argv", ["lora.py", *words])
        with contextlib.suppress(SystemExit):
            lora.main()
        out, err = capsys.readouterr()
        assert "adapter" in out and not err, words
